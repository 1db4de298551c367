"""The floor under the wire: bare ZeroMQ between two processes, bytes of the same length, nothing around it."""

import multiprocessing
import time

import numpy as np
import zmq
from numpy.typing import NDArray

from benchmarks.sockets import temporary_endpoints
from engine.link import Endpoints

TELEMETRY_BYTES, KNOBS_BYTES = 900, 130
WARM_UP = 100


def pause(seconds: float) -> None:
    """Spin, as CUDA's synchronisation does by default."""
    end_ns = time.perf_counter_ns() + round(seconds * 1e9)
    while time.perf_counter_ns() < end_ns:
        pass


def bare_echo(pause_s: float, rounds: int) -> NDArray[np.float64]:
    """Microseconds, shape [rounds, 2]: of a send alone, and of the round trip to an echoing process."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    times_us = []
    with temporary_endpoints() as endpoints:
        pub, pull = context.socket(zmq.PUB), context.socket(zmq.PULL)
        pub.bind(endpoints.telemetry)
        pull.bind(endpoints.knobs)
        peer = multiprocessing.get_context("spawn").Process(target=_echo, args=(endpoints,))
        peer.start()
        while not pull.poll(20):  # until the subscription has arrived
            pub.send(b"x" * TELEMETRY_BYTES)
        while pull.poll(200):
            pull.recv()
        for _ in range(WARM_UP + rounds):
            started = time.perf_counter_ns()
            pub.send(b"x" * TELEMETRY_BYTES, zmq.NOBLOCK)
            sent = time.perf_counter_ns()
            while not int(pull.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                assert time.perf_counter_ns() - started < 5e9, "the echo does not answer"
            pull.recv(zmq.NOBLOCK)
            times_us.append(((sent - started) / 1e3, (time.perf_counter_ns() - started) / 1e3))
            pause(pause_s)
        pub.send(b"")
        peer.join()
        context.destroy(linger=0)
    return np.array(times_us[WARM_UP:])


def _echo(endpoints: Endpoints) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sub, push = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    sub.subscribe(b"")
    sub.connect(endpoints.telemetry)
    push.connect(endpoints.knobs)
    while sub.recv() != b"":
        push.send(b"x" * KNOBS_BYTES)
    context.destroy(linger=0)
