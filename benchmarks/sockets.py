"""The wire for benchmarks: sockets in a directory that goes away again, and a controller process on them."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import zmq

from controller.controller import Controller
from engine.link import ControllerLink, Endpoints
from engine.protocol import Telemetry
from policies.catalogue import Law, parse_law
from policies.policy import Decision

TBT_SLO_S = 0.1


class Alternate:
    """64 and 256 in turn: an iteration's echo tells which decision it ran under."""

    def decide(self, telemetry: Telemetry) -> Decision:
        budget = 64 if telemetry.iteration % 2 else 256
        return Decision(budget, budget, "alternate")

    def track(self, sent: Decision) -> None:
        pass


@contextmanager
def temporary_endpoints() -> Iterator[Endpoints]:
    with tempfile.TemporaryDirectory(prefix="pacer-") as directory:
        yield Endpoints.ipc(Path(directory), "bench")


@contextmanager
def controller_process(endpoints: Endpoints, policy: str) -> Iterator[None]:
    """A real controller in a process of its own, without the journal; `policy` as on the command line, or alternate."""
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    process = spawn.Process(target=_control, args=(endpoints, policy, stop))
    process.start()
    try:
        yield
    finally:
        stop.set()
        process.join()


def _control(endpoints: Endpoints, policy: str, stop: Event) -> None:
    alternate = Law("alternate", None, lambda _: Alternate())
    law = alternate if policy == "alternate" else parse_law(policy, TBT_SLO_S)
    controller = Controller(ControllerLink(zmq.Context(), [endpoints]), law, None, time.monotonic_ns)
    while not stop.is_set():
        controller.tick(0.1)
