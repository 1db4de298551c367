"""The wire for benchmarks: sockets in a directory that goes away again, and a controller process on them."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.sidecar import SidecarOptions, run
from engine.link import Endpoints
from engine.protocol import Telemetry
from envs.slo import Slo
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
    """The sidecar in a process of its own, without the journal; `policy` as on the command line, or alternate."""
    process = multiprocessing.get_context("spawn").Process(target=_control, args=(endpoints, policy))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _control(endpoints: Endpoints, policy: str) -> None:
    alternate = Law("alternate", None, lambda _: Alternate())
    law = alternate if policy == "alternate" else parse_law(policy, Slo(tbt_s=TBT_SLO_S))
    run(SidecarOptions([endpoints], law, None, Path(), None, time.monotonic_ns))
