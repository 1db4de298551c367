"""What a law is: telemetry in, decision out; and how one is named on the command line."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from engine.protocol import BatchComposition, Completion, InForce, Telemetry


class Decision(NamedTuple):
    """The knobs for the next iteration and, in one line, why."""

    budget_tokens: int
    chunk_tokens: int
    reason: str


class Policy(Protocol):
    """A law. Pure: no sockets, no clock, no logging, no randomness; time is what telemetry says.

    It is made from the first telemetry of an engine and starts from the knobs in force, so that taking over is
    bumpless. `decide` sees every telemetry message of that engine once, in order.
    """

    def decide(self, telemetry: Telemetry) -> Decision: ...

    def track(self, sent: Decision) -> None:
        """Go on from what was sent instead: Guard clamped, slewed or overruled it (anti-windup by tracking)."""


class Iteration(NamedTuple):
    """A completed iteration: what it computed, under which knobs, and how long it took.

    `tbt_s` is the longest gap that this iteration is to blame for: the gap of a request that was preempted in between
    is longer than the time since the completion before, and says nothing about the budget. None without any token
    that waited.
    """

    batch: BatchComposition
    knobs: InForce
    measured: Completion
    tbt_s: float | None


class IterationLog:
    """Joins completions with the compositions that were published at their launch."""

    _KEPT = 64  # far more than any pipeline has in flight

    def __init__(self) -> None:
        self._launched: OrderedDict[int, tuple[BatchComposition, InForce]] = OrderedDict()
        self._ended_ns: deque[int] = deque(maxlen=self._KEPT)

    def completed(self, telemetry: Telemetry) -> Iterator[Iteration]:
        """The iterations that this message completes, of those whose launch was seen."""
        for completion in telemetry.completed:
            launched = self._launched.pop(completion.iteration, None)
            if launched is not None:
                yield Iteration(*launched, completion, self._blame(completion))
            self._ended_ns.append(completion.completed_ns)
        if telemetry.batch.total_tokens > 0:
            self._launched[telemetry.iteration] = (telemetry.batch, telemetry.knobs)
            while len(self._launched) > self._KEPT:
                self._launched.popitem(last=False)

    def _blame(self, completion: Completion) -> float | None:
        if not completion.tbt_s:
            return None
        # A request's token before this one came with the microbatch that took the same turn on the stages.
        turns = max(len(completion.stages), 1)
        began_ns = self._ended_ns[-turns] if len(self._ended_ns) >= turns else completion.scheduled_ns
        return min(max(completion.tbt_s), (completion.completed_ns - began_ns) * 1e-9)
