"""Guard: whatever a law says, the knobs that go out are safe."""

import math

import msgspec
import pytest
from plant import Loop

from engine.config import EngineConfig
from engine.protocol import Telemetry
from policies.catalogue import Law
from policies.guard import Guard, GuardLimits
from policies.policy import Decision

SECOND_NS = 1_000_000_000


class Scripted:
    """A law that says what it is told to, and remembers what it was told."""

    def __init__(self, *answers: Decision | Exception) -> None:
        self.answers = list(answers)
        self.tracked: list[Decision] = []

    def decide(self, telemetry: Telemetry) -> Decision:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def track(self, sent: Decision) -> None:
        self.tracked.append(sent)


def say(budget: float, chunk: float | None = None) -> Decision:
    return Decision(budget, budget if chunk is None else chunk, "said")  # type: ignore[arg-type]


def telemetry_of(loop: Loop, work: bool = True) -> Telemetry:
    if work and not loop.core.scheduler.has_work:
        loop.submit(f"r{loop.clock()}", 2000, 40)
    return loop.step()


def decide(law: Scripted, slo_s: float | None = 0.1, n: int = 1) -> list[Decision | None]:
    loop, guard = Loop(None), Guard(Law("scripted", slo_s, lambda _: law))
    return [guard.decide(telemetry_of(loop), loop.clock()) for _ in range(n)]


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [(say(0), 16), (say(-5), 16), (say(300.4), 288), (say(130, 70), 128), (say(100, 500), 96)],
)
def test_knobs_are_clamped_and_cut_to_whole_tiles(wanted: Decision, sent: int) -> None:
    decision = decide(Scripted(wanted))[0]
    assert decision is not None
    assert decision.budget_tokens == sent
    assert 16 <= decision.chunk_tokens <= decision.budget_tokens


def test_a_chunk_below_the_budget_is_kept() -> None:
    decision = decide(Scripted(say(256, 64)))[0]
    assert decision is not None
    assert (decision.budget_tokens, decision.chunk_tokens) == (256, 64)


def guarded(law: Scripted, budget: int, slo_s: float | None = 0.1) -> Loop:
    """A loop whose controller runs `law` under Guard."""
    loop = Loop(None, 0.1, EngineConfig(budget_tokens=budget, chunk_tokens=budget))
    loop.control_by(Law("scripted", slo_s, lambda _: law))
    return loop


def test_a_budget_rises_at_most_twofold_and_falls_at_once() -> None:
    law = Scripted(*[say(2048)] * 5, say(16))
    loop = guarded(law, 256)
    for _ in range(8):
        telemetry_of(loop)
    assert loop.budgets == [256, 512, 1024, 2048, 2048, 2048, 16, 16]
    assert [d.budget_tokens for d in law.tracked] == [512, 1024]


@pytest.mark.parametrize("answer", [RuntimeError("bug"), say(math.nan), say(math.inf)])
def test_a_law_that_fails_is_silenced_so_that_the_engine_falls_back(answer: Decision | Exception) -> None:
    built = []

    def build(_: Telemetry) -> Scripted:
        built.append(1)
        return Scripted(answer)

    loop, guard = Loop(None), Guard(Law("scripted", 0.1, build), GuardLimits(max_failures=3))
    assert [guard.decide(telemetry_of(loop), loop.clock()) for _ in range(6)] == [None] * 6
    assert len(built) == 3


def test_a_law_that_fails_once_starts_afresh() -> None:
    laws = [Scripted(RuntimeError("once")), Scripted(say(128))]
    loop, guard = Loop(None), Guard(Law("scripted", 0.1, lambda _: laws.pop(0)))
    first, second = (guard.decide(telemetry_of(loop), loop.clock()) for _ in range(2))
    assert first is None
    assert second is not None
    assert second.budget_tokens == 128


def test_stale_telemetry_is_held_not_acted_on() -> None:
    loop = guarded(Scripted(say(128), say(128), say(2048)), 256)
    for _ in range(2):
        telemetry_of(loop)
    assert loop.controller is not None
    guard = loop.controller._guards["e-1"]
    decision = guard.decide(loop.link.published[-1], loop.clock() + 3 * SECOND_NS)
    assert decision is not None
    assert decision.budget_tokens == 128
    assert "stale" in decision.reason


def test_a_law_locked_in_at_the_floor_is_overruled_and_lets_go_when_the_queue_is_gone() -> None:
    loop = guarded(Scripted(say(16)), 16)
    loop.run_saturated(30)
    assert max(loop.budgets) > 64
    assert any("overruled" in row.knobs.reason for row in loop.journal if row.knobs)
    assert loop.tbt_p99_s(since_s=5) < 0.1
    while loop.core.scheduler.has_work:
        loop.step()
    loop.step()
    assert loop.step().knobs.budget_tokens == 16


def test_a_queue_held_up_by_seats_is_not_taken_for_lock_in() -> None:
    config = EngineConfig(budget_tokens=256, chunk_tokens=256, max_requests=8)
    loop = Loop(None, 0.1, config)
    loop.control_by(Law("scripted", 0.1, lambda _: Scripted(say(256))))
    loop.run_saturated(30, streams=12)
    assert loop.link.published[-1].queue.waiting_requests > 2
    assert set(loop.budgets) == {256}


def test_a_law_whose_tracking_fails_is_silenced_too() -> None:
    class Untrackable(Scripted):
        def track(self, sent: Decision) -> None:
            raise RuntimeError("bug")

    loop, guard = Loop(None), Guard(Law("scripted", 0.1, lambda _: Untrackable(say(10_000))))
    assert [guard.decide(telemetry_of(loop), loop.clock()) for _ in range(5)] == [None] * 5


def test_a_law_is_told_of_a_stale_hold_and_does_not_wind_up() -> None:
    law = Scripted(say(128), say(128), say(2048))
    loop = guarded(law, 256)
    for _ in range(2):
        telemetry_of(loop)
    assert loop.controller is not None
    loop.controller._guards["e-1"].decide(loop.link.published[-1], loop.clock() + 3 * SECOND_NS)
    assert law.tracked[-1].budget_tokens == 128


def test_clocks_that_drift_apart_do_not_make_telemetry_stale() -> None:
    loop, guard = Loop(None), Guard(Law("scripted", 0.1, lambda _: Scripted(say(128))))
    telemetry = telemetry_of(loop)
    for minute in range(0, 24 * 60):
        here_ns = minute * 60 * SECOND_NS
        there_ns = round(here_ns * (1 - 3e-5))
        decision = guard.decide(msgspec.structs.replace(telemetry, scheduled_ns=there_ns), here_ns)
        assert decision is not None
        assert "stale" not in decision.reason


def test_a_budget_fixed_by_the_user_is_never_overruled() -> None:
    loop = Loop("static:budget=16", 0.1, EngineConfig(budget_tokens=16, chunk_tokens=16))
    loop.run_saturated(10)
    assert set(loop.budgets) == {16}


def test_a_law_with_its_slo_spent_is_left_alone() -> None:
    loop = guarded(Scripted(say(512)), 512)
    loop.run_saturated(10)
    assert set(loop.budgets) == {512}
