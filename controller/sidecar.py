"""The controller's process: sockets, journal and signals around `Controller.tick`."""

import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from controller.controller import Controller
from controller.journal import Journal
from engine.link import ControllerLink, CurveKeys, Endpoints
from engine.protocol import Bounds
from policies.catalogue import Law
from policies.rehearsal import rehearse

logger = logging.getLogger(__name__)

TICK_S = 0.2  # how often signals and the parent are looked after when no telemetry comes


@dataclass(frozen=True, slots=True)
class SidecarOptions:
    """Which engines, by which law, journalled where (or nowhere); `admit` raises ValueError at one it is not for."""

    engines: list[Endpoints]
    law: Law
    journal_folder: Path | None
    socket_dir: Path
    keys: CurveKeys | None
    clock: Callable[[], int]
    admit: Callable[[Bounds], None] | None = None


def run(options: SidecarOptions) -> int:
    """Control until SIGINT or SIGTERM; returns the exit status. Raises ValueError on a bad endpoint or engine."""
    stopping: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.append(True))
    parent = multiprocessing.parent_process()
    rehearse(options.law)
    link = ControllerLink(zmq.Context(), options.engines, options.keys)
    journal = Journal(options.journal_folder, options.socket_dir, options.clock) if options.journal_folder else None
    controller = Controller(link, options.law, journal, options.clock, options.admit)
    gc.freeze()  # what lives for ever need not be walked through between two decisions
    logger.info("controlling %d engine(s) by %s", len(options.engines), options.law.spec)
    try:
        while not stopping and (parent is None or os.getppid() == parent.pid):
            controller.tick(TICK_S)
    finally:
        if journal is not None:
            journal.close()
        link.close()
    return 0
