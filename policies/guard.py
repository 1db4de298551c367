"""Guard: what every law is wrapped in, so that laws stay small and no law can hurt the server for long."""

import logging
from dataclasses import dataclass

from engine.protocol import Bounds, Telemetry
from policies.catalogue import Law
from policies.policy import Decision, Policy

logger = logging.getLogger(__name__)

BINDING = 0.9  # a batch of so much of its budget was limited by it
CLOCK_DRIFT = 1e-4  # clocks of two hosts drift apart by less


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """`max_raise`: largest factor by which a law for an SLO may raise the budget at once (falling is not limited).

    `stale_s`: telemetry older than this is not acted on. `lock_in_s` and `room`: a budget that did not rise for so
    long, spent by every batch, with prompts waiting all the time, none fewer at the end, and every TBT below `room`
    times the SLO, is locked in. `max_failures`: a law that raised so often is silenced, and the engine falls back to
    its own knobs.
    """

    max_raise: float = 2.0
    stale_s: float = 0.5
    lock_in_s: float = 2.0
    room: float = 0.7
    max_failures: int = 3


class Guard:
    """A law made safe, for one engine: clamp, slew limit, stale input, failure, lock-in watch.

    The law is made from telemetry at adoption, and afresh after it raised. Knobs of one without a promise (fixed by the
    user, or a peer's law compared as published) act at once: no slew limit, and no lock-in to watch for.
    """

    def __init__(
        self,
        law: Law,
        limits: GuardLimits = GuardLimits(),
    ) -> None:
        self._make = law.make
        self._law: Policy | None = None
        self._limits = limits
        self._watch = LockInWatch(law.tbt_slo_s, limits) if law.tbt_slo_s is not None else None
        self._failures = 0
        self._offset: tuple[int, int] | None = None  # between the clocks, and when it was reckoned
        self._last: Decision | None = None

    def decide(self, telemetry: Telemetry, now_ns: int) -> Decision | None:
        """The decision to send, or None for silence. `now_ns` is this host's monotonic clock."""
        in_force = telemetry.knobs
        if self._last is None or in_force.source == "fallback":
            self._last = Decision(in_force.budget_tokens, in_force.chunk_tokens, "taking over")
        wanted = self._ask(telemetry)
        if wanted is None:
            return None
        age_s = self._age_s(telemetry, now_ns)
        stale = age_s > self._limits.stale_s
        if stale:
            wanted = self._last._replace(reason=f"stale: telemetry is {age_s:.1f} s old, holding")
        corrected = self._correct(wanted, telemetry)
        if (stale or corrected.budget_tokens != wanted.budget_tokens) and not self._track(corrected):
            return None
        bounds = telemetry.bounds
        budget, chunk, reason = corrected
        self._last = Decision(whole_tiles(budget, bounds), whole_tiles(chunk, bounds), reason)
        return self._last

    def _ask(self, telemetry: Telemetry) -> Decision | None:
        if self._failures >= self._limits.max_failures:
            return None
        try:
            if self._law is None:
                self._law = self._make(telemetry)
            decision = self._law.decide(telemetry)
            return Decision(round(decision.budget_tokens), round(decision.chunk_tokens), decision.reason)
        except Exception:  # a law may be anyone's code; it must not take the other engines down with it
            self._failed()
            return None

    def _track(self, sent: Decision) -> bool:
        """Tell the law what goes out instead of its decision; False if it fails."""
        assert self._law is not None
        try:
            self._law.track(sent)
        except Exception:  # as above
            self._failed()
            return False
        return True

    def _failed(self) -> None:
        self._failures += 1
        self._law = None
        logger.exception("the law failed (%d of %d)", self._failures, self._limits.max_failures)

    def _age_s(self, telemetry: Telemetry, now_ns: int) -> float:
        """Age above the youngest seen: clocks of two hosts have no common zero, their smallest distance stands in.

        That distance may grow by `CLOCK_DRIFT`, so that clocks that drift apart do not make all telemetry stale.
        """
        distance_ns = now_ns - telemetry.scheduled_ns
        if self._offset is None:
            self._offset = distance_ns, now_ns
        offset_ns, since_ns = self._offset
        offset_ns = min(distance_ns, offset_ns + round(CLOCK_DRIFT * (now_ns - since_ns)))
        self._offset = offset_ns, now_ns
        return (distance_ns - offset_ns) * 1e-9

    def _correct(self, wanted: Decision, telemetry: Telemetry) -> Decision:
        assert self._last is not None
        bounds = telemetry.bounds
        budget, reason = wanted.budget_tokens, wanted.reason
        ceiling = max(int(self._last.budget_tokens * self._limits.max_raise), bounds.tile_tokens)
        if self._watch and budget > ceiling:
            budget, reason = ceiling, f"{reason}; slew limit, wanted {wanted.budget_tokens}"
        floor = self._watch.floor(telemetry, self._last.budget_tokens) if self._watch else 0
        if budget < floor:
            budget, reason = floor, f"{reason}; locked in at {wanted.budget_tokens}, overruled"
        clamped = clamp(budget, bounds)
        if clamped != budget:
            reason = f"{reason}; clamped, wanted {budget}"
        chunk = wanted.chunk_tokens if wanted.chunk_tokens < wanted.budget_tokens else clamped
        return Decision(clamped, min(clamp(chunk, bounds), clamped), reason)


class LockInWatch:
    """Finds a law that starves its own requests while the SLO has room, and lifts it.

    A law that sees only the regime it is stuck in never learns that it could leave. The floor it must respect rises
    by a quarter each `lock_in_s` while the condition lasts, and is gone when the queue is empty or the room is used.
    """

    def __init__(self, tbt_slo_s: float, limits: GuardLimits) -> None:
        self._limit_s = limits.room * tbt_slo_s
        self._period_ns = int(limits.lock_in_s * 1e9)
        self._since: tuple[int, int, int] | None = None  # time, budget and prompt tokens due when it began
        self._floor = 0

    def floor(self, telemetry: Telemetry, budget_tokens: int) -> int:
        """The lowest budget allowed now; 0 without lock-in."""
        due = telemetry.queue.waiting_prompt_tokens + telemetry.queue.head_remaining_tokens
        worst_s = max((max(c.tbt_s, default=0.0) for c in telemetry.completed), default=0.0)
        if due == 0 or worst_s > self._limit_s:
            self._since, self._floor = None, 0
            return 0
        now_ns = telemetry.scheduled_ns
        if telemetry.batch.total_tokens < BINDING * telemetry.knobs.budget_tokens:
            # Seats or KV blocks hold the queue up: a larger budget would not help, and would strike when they are free.
            self._since = None
            return self._floor
        if self._since is None:
            self._since = now_ns, budget_tokens, due
        started_ns, first_budget, first_due = self._since
        if now_ns - started_ns >= self._period_ns:
            if budget_tokens <= first_budget and due >= first_due:
                self._lift(telemetry, budget_tokens, due)
            self._since = None
        return self._floor

    def _lift(self, telemetry: Telemetry, budget_tokens: int, due: int) -> None:
        bounds = telemetry.bounds
        if budget_tokens >= bounds.max_budget_tokens:
            return
        self._floor = clamp(budget_tokens + max(budget_tokens // 4, bounds.tile_tokens), bounds)
        logger.warning(
            "%s is locked in: %d tokens for %.1f s, %d prompt tokens due, room in the SLO; lifted to %d",
            telemetry.engine_id,
            budget_tokens,
            self._period_ns * 1e-9,
            due,
            self._floor,
        )


def clamp(tokens: int, bounds: Bounds) -> int:
    return max(bounds.min_budget_tokens, min(tokens, bounds.max_budget_tokens))


def whole_tiles(tokens: int, bounds: Bounds) -> int:
    """Cut to whole tiles above one tile, as the engine would; never below the least budget."""
    tile = bounds.tile_tokens
    return tokens if tokens <= tile else max(tokens // tile * tile, bounds.min_budget_tokens)
