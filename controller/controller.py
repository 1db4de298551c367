"""The loop: telemetry in, decision out, for any number of engines."""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from controller.journal import JournalRow
from engine.protocol import MAX_COUNT, VERSION, Bounds, Knobs, Telemetry
from policies.catalogue import Law
from policies.guard import Guard

logger = logging.getLogger(__name__)

FORGET_S = 60.0


class Wire(Protocol):
    """What the controller needs of a link."""

    def receive(self, timeout_s: float) -> Iterable[Telemetry]: ...

    def send(self, knobs: Knobs) -> bool: ...


class Record(Protocol):
    """What the controller needs of a journal."""

    def record(self, row: JournalRow) -> None: ...


class Controller:
    """Answers every telemetry message of every engine; each engine has a guard, and so a law's state, of its own.

    An engine is adopted at its first telemetry. One that restarts comes with a new id, and is adopted like any other.
    `clock` gives monotonic nanoseconds; `admit` raises ValueError for an engine that this controller is not for.
    """

    def __init__(
        self,
        wire: Wire,
        law: Law,
        journal: Record | None,
        clock: Callable[[], int],
        admit: Callable[[Bounds], None] | None = None,
    ) -> None:
        self._wire = wire
        self._law = law
        self._journal = journal
        self._clock = clock
        self._admit = admit
        self._guards: dict[str, Guard] = {}
        self._sequence: dict[str, int] = {}
        self._heard_ns: dict[str, int] = {}

    def tick(self, timeout_s: float) -> int:
        """Answer what has arrived, waiting up to `timeout_s` for the first; returns how many were answered."""
        answered = 0
        for telemetry in self._wire.receive(timeout_s):
            now_ns = self._clock()
            decision = self._guard(telemetry, now_ns).decide(telemetry, now_ns)
            knobs, delivered = None, False
            if decision is not None:
                knobs = Knobs(VERSION, telemetry.engine_id, self._next(telemetry), telemetry.iteration, *decision)
                delivered = self._wire.send(knobs)
            if self._journal is not None:
                self._journal.record(JournalRow(self._law.spec, now_ns, delivered, knobs, telemetry))
            answered += 1
        return answered

    def _guard(self, telemetry: Telemetry, now_ns: int) -> Guard:
        engine_id = telemetry.engine_id
        if engine_id not in self._guards:
            if self._admit is not None:
                self._admit(telemetry.bounds)
            for gone in [e for e, heard in self._heard_ns.items() if now_ns - heard > FORGET_S * 1e9]:
                del self._guards[gone], self._sequence[gone], self._heard_ns[gone]
            logger.info("%s: adopted at %d tokens by %s", engine_id, telemetry.knobs.budget_tokens, self._law.spec)
            self._guards[engine_id] = Guard(self._law)
        self._heard_ns[engine_id] = now_ns
        return self._guards[engine_id]

    def _next(self, telemetry: Telemetry) -> int:
        """Go on from the echo: another controller may have been here before."""
        sequence = max(self._sequence.get(telemetry.engine_id, 0), telemetry.knobs.sequence) + 1
        if sequence >= MAX_COUNT:  # somebody's mischief; on its fallback the engine takes any number again
            sequence = 1
        self._sequence[telemetry.engine_id] = sequence
        return sequence
