"""PID: the loop around the step-time model's own budget, and the loop without one."""

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from plant import Loop

from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from policies.catalogue import parse_law
from policies.guard import Guard
from policies.pid import WeightedWindow

TRUE = ((4.71e-3, 7.3e-6, 35e-9), (1.27e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
MACHINE = StepTimeModel.from_formula(*TRUE).with_noise(0.04)
OTHER_MODEL = StepTimeModel.from_formula(TRUE[0], (1.27e-3, 20.9e-6, 1.5e-7, 3e-9, 0.28e-3)).with_noise(0.04)


def start(budget: int, most: int = 2048) -> EngineConfig:
    return EngineConfig(budget_tokens=budget, chunk_tokens=budget, max_budget_tokens=most)


def loop_of(
    spec: str, profile: bool, tbt_slo_s: float = 0.1, config: EngineConfig | None = None, **device: Any
) -> Loop:
    """An engine under the law, with the device's step-time model or with none."""
    loop = Loop(None, tbt_slo_s, config, **device)
    loop.control_by(parse_law(spec, Slo(tbt_s=tbt_slo_s), loop.step_time if profile else None))
    return loop


@pytest.mark.parametrize("profile", [True, False])
@pytest.mark.parametrize("first_budget", [16, 256, 2048])
@pytest.mark.parametrize("tbt_slo_s", [0.05, 0.1, 0.2])
def test_the_p99_tbt_is_held_at_the_set_point_from_any_start(
    first_budget: int, tbt_slo_s: float, profile: bool
) -> None:
    loop = loop_of("pid", profile, tbt_slo_s, start(first_budget), noise=0.04)
    loop.run_saturated(30)
    set_point_s = (0.98 if profile else 0.9) * tbt_slo_s
    assert 0.95 * set_point_s < loop.tbt_p99_s(since_s=10) <= 1.02 * set_point_s


@pytest.mark.parametrize("profile", [True, False])
def test_it_comes_back_when_the_machine_slows_down(profile: bool) -> None:
    loop = loop_of("pid", profile, noise=0.04)
    loop.run_saturated(10)
    loop.device.slowdown = 1.4
    loop.run_saturated(10)
    assert 0.085 < loop.tbt_p99_s(since_s=12) <= 0.1
    loop.device.slowdown = 1.0
    loop.run_saturated(30)
    assert 0.085 < loop.tbt_p99_s(since_s=40) <= 0.1, "and makes use of it when it is fast again"


@pytest.mark.parametrize("profile", [True, False])
def test_nothing_is_learned_from_an_idle_engine(profile: bool) -> None:
    loop = loop_of("pid", profile)
    loop.run_saturated(5)
    settled = np.mean(loop.budgets[-20:])
    while loop.core.scheduler.has_work:
        loop.step()
    for _ in range(500):
        loop.step()
    sent = loop.journal[-1].knobs
    assert sent is not None and sent.reason.startswith("pid nobody decodes" if profile else "pid hold")
    at = len(loop.budgets)
    loop.run_saturated(1)
    busy = [t.knobs.budget_tokens for t in loop.link.published[at:] if t.batch.decode_tokens and t.batch.prefill_tokens]
    assert busy[3:] == pytest.approx([settled] * len(busy[3:]), rel=0.1)


@pytest.mark.parametrize("profile", [True, False])
def test_small_batches_say_nothing_about_a_large_budget(profile: bool) -> None:
    """They take longer for each of their tokens, which a law that knows nothing but tokens would hold against it."""
    loop = loop_of("pid", profile)
    loop.run_saturated(10)
    settled = loop.budgets[-1]
    loop.run_saturated(10, prompt_tokens=30)
    assert loop.link.published[-1].batch.total_tokens < 0.5 * settled
    assert loop.budgets[-1] == pytest.approx(settled, rel=0.1)


@pytest.mark.parametrize("profile", [True, False])
def test_a_new_controller_takes_over_without_a_bump(profile: bool) -> None:
    loop = loop_of("pid", profile)
    loop.run_saturated(10)
    at, budget = len(loop.budgets), loop.budgets[-1]
    loop.control_by(parse_law("pid", Slo(tbt_s=0.1), loop.step_time if profile else None))
    loop.run_saturated(5)
    assert np.abs(np.array(loop.budgets[at:]) / budget - 1.0).max() < 0.2
    assert all(t.knobs.source == "controller" for t in loop.link.published[at:])


def test_the_first_decision_is_the_budget_in_force_and_the_difference_from_the_models_own_decays() -> None:
    loop = Loop(None, 0.1, start(256))
    loop.run_saturated(2)
    heard = loop.link.published[-1]
    law = parse_law("pid:set_point=1,ki=0.25", Slo(tbt_s=0.1), loop.step_time).make(heard)
    # 5 ms + 0.16 ms a token: 46 ms for 256 tokens in force, 100 ms in the end, and nothing is heard of any batch.
    budgets = [law.decide(msgspec.structs.replace(heard, completed=())).budget_tokens for _ in range(30)]
    limits_s = [0.1 * (0.04596 / 0.1) ** (0.75**n) for n in range(30)]
    assert budgets[0] == 256
    assert np.abs(np.array(budgets) - [(limit_s - 0.005) / 0.00016 for limit_s in limits_s]).max() <= 17
    assert budgets[-1] == 592


def test_a_limit_in_tokens_does_not_wind_up_at_a_bound() -> None:
    """A slow integral, long held at a bound that is far below what the SLO would allow, leaves it at once."""
    loop = loop_of("pid:ki=0.1,kp=0", False, 0.2, start(256, most=512))
    loop.run_saturated(20)
    assert loop.budgets[-1] == 512
    loop.device.slowdown = 4.0
    at = len(loop.budgets)
    loop.run_saturated(4)
    assert next(i for i, budget in enumerate(loop.budgets[at:]) if budget < 512) <= 4


def deeper(heard: Telemetry, context_tokens: int) -> Telemetry:
    """The same message with its prompts so deep, none of them in the batch."""
    n = len(heard.queue.prompt_remaining_tokens)
    queue = msgspec.structs.replace(
        heard.queue, prompt_remaining_tokens=(4000,) * n, prompt_context_tokens=(context_tokens,) * n
    )
    return msgspec.structs.replace(heard, queue=queue, completed=())


def test_the_model_feeds_forward_what_the_next_batch_will_cost() -> None:
    loop = Loop(None, 0.04)
    loop.run_saturated(2)
    heard = loop.link.published[-1]
    budgets = {}
    for profile in (MACHINE, None):
        law = parse_law("pid:ki=0,kp=0", Slo(tbt_s=0.04), profile).make(deeper(heard, 0))
        budgets[profile] = [law.decide(deeper(heard, tokens)).budget_tokens for tokens in (0, 20_000, 60_000, 0)]
    shallow, deep, deepest, again = budgets[MACHINE]
    assert shallow == again > 1.4 * deep > 2.1 * deepest, "W is of the budget and the context"
    assert len(set(budgets[None])) == 1, "tokens are tokens"


def test_there_is_no_limit_while_nobody_decodes() -> None:
    loop = loop_of("pid", True, config=start(256))
    for prompt_tokens in (100, 1900):
        loop.submit(f"{prompt_tokens}", prompt_tokens, 2)
        for _ in range(8):
            loop.step()
    answers = [row.knobs.budget_tokens for row in loop.journal if row.knobs and "no limit" in row.knobs.reason]
    assert max(answers) == 2048
    told = [t for t in loop.link.published if t.knobs.budget_tokens > 592]  # what the SLO allows to one that decodes
    assert told and all(t.batch.decode_tokens == 0 for t in told)


def overloaded(stages: int = 1, noise: float = 0.04, dead_time: int = 2) -> Simulation:
    """MACHINE with more requests than it can serve in time: how long it takes tells how much is made of the SLO."""
    config = EngineConfig(
        max_budget_tokens=8192, max_requests=256, max_model_tokens=2**14, kv_blocks=55_000, pipeline_parallel=stages
    )
    plant = Plant(config, MACHINE.with_noise(noise), dead_time, reserve_output=True)
    return Simulation(plant, make_workload("poisson:20", "uniform:100-9000,100-300", np.random.default_rng(0), 400))


@pytest.mark.parametrize("dead_time", [1, 2, 3])
@pytest.mark.parametrize(
    ("profile", "noise", "share"),
    [
        (MACHINE, 0.04, 0.97),
        (MACHINE, 0.1, 0.97),
        (MACHINE.scaled(0.7), 0.04, 0.97),
        (MACHINE.scaled(1.3), 0.04, 0.97),
        (OTHER_MODEL, 0.04, 0.97),
        (None, 0.04, 0.97),
    ],
    ids=["right", "noise 10 %", "30 % short", "30 % long", "another model's", "none"],
)
def test_the_slo_is_kept_and_made_use_of_whatever_the_profile_says(
    profile: StepTimeModel | None, noise: float, share: float, dead_time: int
) -> None:
    simulation, ideal = overloaded(noise=noise, dead_time=dead_time), overloaded(noise=noise)
    simulation.run_law(Guard(parse_law("pid", Slo(tbt_s=0.04), profile)).decide)
    ideal.run_clairvoyant(0.04 / ideal.plant.step_time.factor(0.99, mixed=True))
    outcome = simulation.outcome()
    assert outcome.tokens_in_slo(0.04) >= 0.99
    assert share * outcome.duration_s < ideal.outcome().duration_s


@pytest.mark.parametrize("seed", range(3))
def test_a_part_of_the_profile_that_is_wrong_is_found_out(seed: int) -> None:
    """Attention at 0.3 times its cost, for prompts of all depths: what one batch takes says little of the next one."""
    fixed, mixed = TRUE
    wrong = (*mixed[:2], 0.3 * mixed[2], 0.3 * mixed[3], mixed[4])
    profile = StepTimeModel.from_formula((*fixed[:2], 0.3 * fixed[2]), wrong).with_noise(0.04)
    config = EngineConfig(max_budget_tokens=8192, max_requests=256, max_model_tokens=2**17, kv_blocks=55_000)
    workload = make_workload("poisson:1.2", "long-prompts", np.random.default_rng(seed), 150, 2**17)
    simulation = Simulation(Plant(config, MACHINE, reserve_output=True), workload, seed)
    simulation.run_law(Guard(parse_law("pid", Slo(tbt_s=0.04), profile)).decide, until_s=20.0)
    assert simulation.outcome().tokens_in_slo(0.04) >= 0.997


def test_what_it_could_not_foresee_counts_as_late_too() -> None:
    """With a dead time this long, a batch often takes longer than was foreseen, and no longer than the model says."""
    simulation = overloaded(dead_time=7)
    simulation.run_law(Guard(parse_law("pid", Slo(tbt_s=0.04), MACHINE)).decide)
    assert simulation.outcome().tokens_in_slo(0.04) >= 0.99


@pytest.mark.parametrize("profile", [MACHINE, None])
def test_batches_that_do_not_mix_are_left_to_the_law_without_a_model(profile: StepTimeModel | None) -> None:
    """What is foreseen of the next batch is what stall-free batching would make of it."""
    plant = overloaded().plant
    simulation = Simulation(replace(plant, config=replace(plant.config, schedule="chunks-only")), overloaded().workload)
    simulation.run_law(Guard(parse_law("pid", Slo(tbt_s=0.04), profile)).decide)
    assert simulation.outcome().tokens_in_slo(0.04) >= 0.99


@pytest.mark.parametrize("stages", [2, 4])
def test_others_decode_in_a_pipeline_though_nobody_does_in_this_batch(stages: int) -> None:
    plant = overloaded(stages, dead_time=stages + 1).plant
    few = make_workload("poisson:1", "uniform:4000-9000,100-400", np.random.default_rng(0), 100)
    simulation = Simulation(plant, few)
    simulation.run_law(Guard(parse_law("pid", Slo(tbt_s=0.04 * stages), MACHINE)).decide)
    assert np.quantile(simulation.outcome().tbt_s, 0.999) <= 0.04 * stages


@pytest.mark.parametrize("profile", [MACHINE, None])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_pipelines_token_takes_a_turn_on_all_stages(stages: int, profile: StepTimeModel | None) -> None:
    simulation = overloaded(stages, dead_time=stages + 1)
    simulation.run_law(Guard(parse_law("pid", Slo(tbt_s=0.04 * stages), profile)).decide)
    outcome = simulation.outcome()
    assert outcome.tokens_in_slo(0.04 * stages) >= 0.985
    assert np.quantile(outcome.tbt_s, 0.98) > 0.85 * 0.04 * stages


@pytest.mark.parametrize("profile", [True, False])
def test_the_quantile_of_the_promise_reaches_the_law(profile: bool) -> None:
    budgets = []
    for quantile in (0.9, 0.999):
        loop = Loop(None, noise=0.1)
        loop.control_by(parse_law("pid", Slo(tbt_s=0.1, quantile=quantile), loop.step_time if profile else None))
        loop.run_saturated(30)
        budgets.append(np.mean(loop.budgets[-300:]))
    assert budgets[1] < 0.95 * budgets[0]


@pytest.mark.parametrize(("profile", "unit"), [(True, "ms by the model"), (False, "tokens")])
def test_every_decision_gives_its_reason(profile: bool, unit: str) -> None:
    loop = loop_of("pid", profile)
    loop.run_saturated(2)
    reasons = [row.knobs.reason for row in loop.journal if row.knobs is not None]
    assert len(reasons) == len(loop.journal) and all(reason.startswith("pid ") for reason in reasons)
    settled = reasons[-1].split("; ")
    assert settled[0].startswith("pid P99 TBT") and settled[1].endswith(unit), reasons[-1]


def test_the_window_gives_the_weighted_quantile_of_its_last_values() -> None:
    random = np.random.default_rng(1)
    window = WeightedWindow(50)
    kept: list[tuple[float, int]] = []
    assert window.low_quantile(0.01) is None
    for _ in range(300):
        value, weight = float(np.round(random.normal(), 1)), int(random.integers(1, 9))
        window.push(value, weight)
        kept = [*kept, (value, weight)][-50:]
        repeated = sorted(v for v, w in kept for _ in range(w))
        for share in (0.0, 0.01, 0.3, 0.9):
            assert window.low_quantile(share) == repeated[int(share * len(repeated))]
