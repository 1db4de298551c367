"""Real processes for end-to-end tests: `pacer serve`, `control`, `launch`, and an ear on the telemetry."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import ClassVar

import httpx
import numpy as np
import psutil
import zmq

from engine.link import ControllerLink, Endpoints
from engine.protocol import Knobs, Telemetry
from envs.trace import make_workload
from profiles.load import LoadResult, replay

PATIENCE_S = 120.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Pacer:
    """One `pacer` command in a process group of its own, as a terminal would start it."""

    started: ClassVar[list["Pacer"]] = []

    @classmethod
    def end_all(cls) -> None:
        """Kill what failed tests have left."""
        for pacer in cls.started:
            with suppress(ProcessLookupError):
                os.killpg(pacer.process.pid, signal.SIGKILL)

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "run", *arguments], start_new_session=True, env=environment
        )
        self.family: list[psutil.Process] = []
        self.started.append(self)

    def child(self) -> psutil.Process:
        """The one process that it has spawned (beside Python's resource tracker)."""
        return next(c for c in psutil.Process(self.process.pid).children() if is_spawned(c))

    def interrupt(self) -> int:
        """Ctrl-C: SIGINT to the whole process group. Returns the exit status when all of the group are gone."""
        self.remember_family()
        os.killpg(self.process.pid, signal.SIGINT)
        status = self.process.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(self.family, 10)
        assert not alive, f"left behind: {alive}"
        return status

    def kill(self) -> None:
        """kill -9 of this process alone."""
        self.remember_family()
        self.process.kill()
        self.process.wait()

    def remember_family(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def is_spawned(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # one that has just ended, a zombie too, has no command line
        return any("spawn_main" in argument for argument in process.cmdline())
    return False


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = monotonic() + patience_s
    pause = threading.Event()
    while not condition():
        assert monotonic() < deadline, f"waited {patience_s} s in vain for {what}"
        pause.wait(0.02)


class Served:
    """A served engine with its addresses."""

    def __init__(self, socket_dir: Path, name: str, *flags: str) -> None:
        self.socket_dir, self.name, self.port = socket_dir, name, free_port()
        self.flags = flags
        self.url = f"http://127.0.0.1:{self.port}"
        self.endpoints = Endpoints.ipc(socket_dir, name)
        self.start()

    def start(self) -> None:
        address = ("--socket-dir", str(self.socket_dir), "--name", self.name, "--port", str(self.port))
        self.pacer = Pacer("serve", *address, *self.flags)
        wait_for(self.healthy, "the server's health")

    def healthy(self) -> bool:
        assert self.pacer.process.poll() is None, "the server ended while starting"
        return answers(f"{self.url}/health")

    def control(self, policy: str, *flags: str) -> Pacer:
        address = ("--socket-dir", str(self.socket_dir), "--engine", self.name)
        return Pacer("control", *address, "--policy", policy, *flags)


class Ear:
    """Subscribes to an engine's telemetry, as a second controller, and keeps all of it.

    With `answer` it sends what that gives for every message, at once, and keeps it with the time it was sent at.
    """

    def __init__(self, endpoints: Endpoints, answer: Callable[[Telemetry], Knobs] | None = None) -> None:
        self.heard: list[Telemetry] = []
        self.heard_ns: list[int] = []
        self.sent: list[tuple[Knobs, int]] = []
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = ControllerLink(self._context, [endpoints])
        self._stopping = False
        self._thread = threading.Thread(target=self._listen, daemon=True)  # a failed test must not keep pytest alive
        self._thread.start()

    def _listen(self) -> None:
        while not self._stopping:
            for telemetry in self._link.receive(0.05):
                if self._answer is not None and self._link.send(knobs := self._answer(telemetry)):
                    self.sent.append((knobs, monotonic_ns()))
                self.heard_ns.append(monotonic_ns())
                self.heard.append(telemetry)
        self._link.close()
        self._context.destroy(linger=0)

    def wait_for(self, condition: Callable[[Telemetry], bool], what: str, patience_s: float = PATIENCE_S) -> Telemetry:
        """The first telemetry from now on that fulfils the condition."""
        start = len(self.heard)
        found: list[Telemetry] = []

        def look() -> bool:
            found[:] = [t for t in self.heard[start:] if condition(t)]
            return len(found) > 0

        wait_for(look, what, patience_s)
        return found[0]

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()


class Load(threading.Thread):
    """A replay in the background; `result` waits for its end."""

    def __init__(self, url: str, arrivals: str, lengths: str, n_requests: int | None, seed: int = 0) -> None:
        super().__init__(daemon=True)
        rng = np.random.default_rng(seed)
        workload = make_workload(arrivals, lengths, rng, n_requests)
        self._replay = lambda: replay(workload, url, rng)
        self._results: list[LoadResult] = []
        self.start()

    def run(self) -> None:
        self._results.append(asyncio.run(self._replay()))

    def result(self) -> LoadResult:
        self.join()
        return self._results[0]
