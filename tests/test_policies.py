"""The laws in the loop: the real core and controller, modelled step time with noise."""

import numpy as np
import pytest
from plant import Loop

from engine.config import EngineConfig
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from policies.catalogue import parse_law
from policies.guard import Guard


def start(budget: int) -> EngineConfig:
    return EngineConfig(budget_tokens=budget, chunk_tokens=budget)


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "unknown policy 'magic': choose from static, pid, aimd"),
        ("pid:gain=3", "no parameter 'gain': it has set_point"),
        ("pid:kp=fast", "kp='fast' is not of type float"),
        ("pid:set_point=nan", "set_point=nan is outside 0.1 to 1.0"),
        ("pid:window=0", "window=0 is outside 1 to 10000"),
        ("static:budget=1.5", "budget='1.5' is not of type int"),
        ("pid", "policy 'pid' needs to know the promise: add --slo tbt:MILLISECONDS"),
        ("predictive", "needs to know the promise: add --slo"),
        ("sglang", "policy 'sglang' needs to know how long a step takes: add --profile FILE"),
    ],
)
def test_a_bad_policy_spec_says_what_would_do(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_law(spec)


def test_a_law_gets_the_part_of_the_promise_that_it_asks_for() -> None:
    loop = Loop(None)
    with pytest.raises(ValueError, match="add --slo tbt"):
        parse_law("aimd", Slo(ttft_s=2.0))
    with pytest.raises(ValueError, match="add --profile"):
        parse_law("predictive", Slo(tbt_s=0.1))
    assert parse_law("pid", Slo(tbt_s=0.2, ttft_s=2.0)).tbt_slo_s == 0.2
    assert parse_law("static", Slo(tbt_s=0.2)).tbt_slo_s is None, "fixed by the user: Guard lets it be"
    deadlines = [
        parse_law("qoserve", slo, loop.step_time).make(loop.step())._slacks._ttft_slo_s  # type: ignore[attr-defined]
        for slo in (Slo(tbt_s=0.1), Slo(tbt_s=0.1, ttft_s=2.0))
    ]
    assert deadlines == [6.0, 2.0], "the paper's, and the user's"


@pytest.mark.parametrize(("spec", "kept"), [("pid", 0.98), ("aimd", 0.85)])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_gap_spans_all_microbatches_of_a_pipeline(spec: str, kept: float, stages: int) -> None:
    """A law that saw one microbatch's time for a token's gap would break the promise by the number of stages."""
    slo = Slo(tbt_s=0.025 * stages)
    model = StepTimeModel.from_formula((5e-3, 1e-5, 3e-8), (2e-3, 2e-5, 4e-8, 1e-9, 3e-4)).with_noise(0.04)
    requests = make_workload("poisson:1000", "uniform:200-3000,50-200", np.random.default_rng(0), 400)
    config = EngineConfig(
        max_budget_tokens=8192, max_requests=256, max_model_tokens=4096, kv_blocks=50_000, pipeline_parallel=stages
    )
    simulation = Simulation(Plant(config, model, stages + 1), requests)
    simulation.run_law(Guard(parse_law(spec, slo)).decide)
    assert simulation.outcome().tokens_in_slo(0.025 * stages) > kept
