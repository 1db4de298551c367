"""The laws in the loop: the real core and controller, modelled step time with noise."""

import numpy as np
import pytest
from plant import Loop

from engine.config import EngineConfig
from policies.catalogue import parse_law
from policies.pid import WeightedWindow


def start(budget: int) -> EngineConfig:
    return EngineConfig(budget_tokens=budget, chunk_tokens=budget)


@pytest.mark.parametrize("first_budget", [16, 256, 2048])
@pytest.mark.parametrize("tbt_slo_s", [0.05, 0.1, 0.2])
def test_pid_holds_the_p99_tbt_at_its_set_point_from_any_start(first_budget: int, tbt_slo_s: float) -> None:
    loop = Loop("pid:set_point=0.9", tbt_slo_s, start(first_budget), noise=0.04)
    loop.run_saturated(30)
    assert 0.8 * tbt_slo_s < loop.tbt_p99_s(since_s=10) <= tbt_slo_s


def test_pid_comes_back_when_the_machine_slows_down() -> None:
    loop = Loop("pid", 0.1, noise=0.04)
    loop.run_saturated(10)
    loop.device.slowdown = 1.4
    loop.run_saturated(10)
    assert loop.tbt_p99_s(since_s=12) <= 0.1


def test_pid_learns_nothing_from_an_idle_engine() -> None:
    loop = Loop("pid", 0.1)
    loop.run_saturated(5)
    settled = loop.budgets[-1]
    while loop.core.scheduler.has_work:
        loop.step()
    before = loop.budgets[-1]
    for _ in range(500):
        loop.step()
    assert loop.budgets[-1] == before
    assert before == pytest.approx(settled, rel=0.2)


def test_a_new_controller_takes_over_without_a_bump() -> None:
    loop = Loop("pid", 0.1)
    loop.run_saturated(10)
    budget, at = loop.budgets[-1], len(loop.budgets)
    loop.take_over("pid")
    loop.run_saturated(5)
    after = np.array(loop.budgets[at:])
    assert np.abs(after / budget - 1.0).max() < 0.25
    assert all(t.knobs.source == "controller" for t in loop.link.published[at:])


def test_aimd_backs_off_on_a_breach_and_probes_when_healthy() -> None:
    loop = Loop("aimd", 0.1, start(2048))
    loop.run_saturated(20)
    gaps = np.concatenate([c.tbt_s for c in loop.completions(since_s=3)])
    assert np.mean(gaps <= 0.1) > 0.9
    assert max(loop.budgets[-200:]) > min(loop.budgets[-200:]), "it saws"
    assert np.mean(loop.budgets[-200:]) > 300, "and makes use of the room"


@pytest.mark.parametrize("law", ["pid", "aimd"])
def test_the_gap_of_a_preempted_request_is_not_blamed_on_the_budget(law: str) -> None:
    """KV blocks run out again and again; requests then wait for seconds, while no step takes longer."""
    roomy, tight = (
        Loop(law, 0.1, EngineConfig(budget_tokens=256, chunk_tokens=256, kv_blocks=blocks), noise=0.04)
        for blocks in (4096, 300)
    )
    for loop in (roomy, tight):
        loop.run_saturated(60)
    assert tight.core.scheduler.preemptions > 5
    assert max(gap for c in tight.completions() for gap in c.tbt_s) > 1.0
    assert np.median(tight.budgets[-300:]) > 0.7 * np.median(roomy.budgets[-300:])


def test_static_keeps_its_knobs_whatever_happens() -> None:
    loop = Loop("static:budget=512,chunk=128", 0.001, start(256))
    loop.run_saturated(5)
    assert set(loop.budgets[4:]) == {512}
    assert {t.knobs.chunk_tokens for t in loop.link.published[4:]} == {128}


def test_every_decision_gives_its_reason() -> None:
    loop = Loop("pid", 0.1)
    loop.run_saturated(2)
    assert all(row.knobs is not None and row.knobs.reason.startswith("pid ") for row in loop.journal)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "unknown policy 'magic': choose from static, pid, aimd"),
        ("pid:gain=3", "no parameter 'gain': it has set_point"),
        ("pid:kp=fast", "kp='fast' is not of type float"),
        ("pid:set_point=nan", "set_point=nan is outside 0.1 to 1.0"),
        ("pid:window=0", "window=0 is outside 1 to 10000"),
        ("static:budget=1.5", "budget='1.5' is not of type int"),
    ],
)
def test_a_bad_policy_spec_says_what_would_do(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_law(spec)


def test_the_window_gives_the_weighted_quantile_of_its_last_values() -> None:
    random = np.random.default_rng(1)
    window, kept = WeightedWindow(50), []
    for _ in range(300):
        value, weight = float(np.round(random.normal(), 1)), int(random.integers(1, 9))
        window.push(value, weight)
        kept = [*kept, (value, weight)][-50:]
        repeated = sorted(v for v, w in kept for _ in range(w))
        for share in (0.0, 0.01, 0.3, 0.9):
            assert window.low_quantile(share) == repeated[int(share * len(repeated))]
