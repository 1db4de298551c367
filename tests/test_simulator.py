"""The simulator by itself: determinism, dead time, stages, the compiled laws, and what an outcome says."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.iterations import COMPOSITION
from envs.outcome import Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.state import LOG_COLUMNS
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload

QUIET = StepTimeModel.from_formula((5e-3, 1e-5, 4e-8), (6e-3, 5e-5, 4e-8, 1e-9, 3e-4))
MODEL = QUIET.with_noise(0.05)
CONFIG = EngineConfig(max_budget_tokens=8192, max_requests=32, kv_blocks=2048)


def piped(stages: int) -> EngineConfig:
    return replace(CONFIG, pipeline_parallel=stages)


def workload(n: int = 60, rate: float = 8.0, seed: int = 0) -> Workload:
    return make_workload(f"poisson:{rate}", "uniform:10-1500,1-120", np.random.default_rng(seed), n, 2048)


def ran_static(plant: Plant, requests: Workload, budget: int, seed: int = 0) -> Outcome:
    simulation = Simulation(plant, requests, seed, keep_log=True)
    simulation.run_static(budget, budget)
    return simulation.outcome()


def bytes_of(outcome: Outcome) -> bytes:
    return outcome.token_times_s.tobytes() + outcome.log.tobytes() + outcome.first_scheduled_s.tobytes()


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    plant = Plant(CONFIG, MODEL)
    runs = [bytes_of(ran_static(plant, workload(), 256, seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "depth",
    [{}, {"look_ahead": True}, {"pipeline_parallel": 2}, {"pipeline_parallel": 2, "look_ahead": True}],
)
def test_fixed_knobs_compiled_and_a_law_in_the_loop_are_one_run(depth: dict[str, Any]) -> None:
    plant = Plant(EngineConfig(budget_tokens=192, chunk_tokens=64, kv_blocks=2048, **depth), MODEL)
    compiled, asked = (Simulation(plant, workload(), 3, keep_log=True) for _ in range(2))
    compiled.run_static(192, 64)
    asked.run_law(lambda telemetry, now_ns: (192, 64, "fixed"))
    assert bytes_of(compiled.outcome()) == bytes_of(asked.outcome())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_first_stage_waits_for_the_tokens_that_it_computes(stages: int) -> None:
    """One request alone: forming its batches earlier makes none of them begin earlier."""
    alone = Workload(np.zeros(1), np.array([100]), np.array([20]))
    runs = []
    for look_ahead in (False, True):
        plant = Plant(replace(CONFIG, pipeline_parallel=stages, look_ahead=look_ahead), MODEL)
        runs.append(ran_static(plant, alone, 256).token_times_s)
    assert runs[0].tolist() == runs[1].tolist()


@pytest.mark.parametrize("dead_time", [1, 2, 4])
def test_an_answer_acts_one_dead_time_later(dead_time: int) -> None:
    simulation = Simulation(Plant(CONFIG, MODEL, dead_time_iterations=dead_time), workload(rate=1000))
    seen: list[Telemetry] = []

    def decide(telemetry: Telemetry, now_ns: int) -> tuple[int, int, str]:
        seen.append(telemetry)
        return 100 + telemetry.iteration % 1000, 64, "its own number"

    simulation.run_law(decide)
    busy = [t for t in seen if t.batch.total_tokens]
    assert len(busy) > 100
    for telemetry in busy[:dead_time]:
        assert telemetry.knobs.source == "fallback"
    for telemetry in busy[dead_time:]:
        assert telemetry.knobs.iteration == telemetry.iteration - dead_time
        assert telemetry.knobs.budget_tokens == 100 + (telemetry.iteration - dead_time) % 1000


def test_noise_is_that_of_the_regime_and_the_log_tells_what_ran() -> None:
    steady_decodes = msgspec.structs.replace(MODEL.description, decode_only=QUIET.description.decode_only)
    simulation = Simulation(Plant(CONFIG, StepTimeModel(steady_decodes)), workload(), keep_log=True)
    heard: list[Telemetry] = []
    simulation.run_law(lambda telemetry, now_ns: heard.append(telemetry))
    batches = [[getattr(t.batch, name) for name in COMPOSITION] for t in heard if t.batch.total_tokens]
    done = [completion for t in heard for completion in t.completed]
    factors: dict[bool, list[float]] = defaultdict(list)
    for batch, completion in zip(batches, done, strict=True):
        factors[batch[3] > 0].append(completion.device_s / QUIET.mean_s(*batch))
    assert factors[False] == pytest.approx([1.0] * len(factors[False]))
    assert np.abs(MODEL.residuals[1][:, None] - factors[True]).min(axis=0).max() < 1e-9
    assert np.std(factors[True]) == pytest.approx(0.05, rel=0.3)
    log = simulation.outcome().log[:, [LOG_COLUMNS.index(name) for name in COMPOSITION]]
    assert log.tolist() == batches


@pytest.mark.parametrize("dead_time", [1, 2, 3])
def test_a_silent_law_leaves_its_last_knobs_until_the_time_to_live(dead_time: int) -> None:
    config = EngineConfig(kv_blocks=2048, max_requests=32, knobs_ttl_s=0.5)
    simulation = Simulation(Plant(config, MODEL, dead_time_iterations=dead_time), workload(rate=1000))
    seen: list[Telemetry] = []

    def decide(telemetry: Telemetry, now_ns: int) -> tuple[int, int, str] | None:
        seen.append(telemetry)
        return (100 + telemetry.iteration, 64, "") if telemetry.iteration <= 10 else None

    simulation.run_law(decide)
    spoke_s = next(t.scheduled_ns for t in seen if t.iteration == 10) * 1e-9
    for telemetry in seen:
        if telemetry.iteration > 10 + dead_time:
            age_s = telemetry.scheduled_ns * 1e-9 - spoke_s
            if age_s < 0.5:
                assert telemetry.knobs.budget_tokens == 110
            elif age_s > 0.5 + dead_time * 0.1:
                assert telemetry.knobs.source == "fallback"
                assert telemetry.knobs.budget_tokens == config.budget_tokens
    assert seen[-1].knobs.source == "fallback"
    assert [t.knobs.sequence for t in seen] == sorted(t.knobs.sequence for t in seen)
    assert seen[-1].knobs.sequence == 10


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_microbatches_share_the_stages_and_no_request(stages: int) -> None:
    """Every request ends; none has two tokens in flight; microbatches end in order; stages do not overlap in time."""
    requests = workload(rate=20.0)
    simulation = Simulation(Plant(piped(stages), MODEL), requests)
    most_in_flight = 0
    while not simulation.done:
        simulation.step(256, 128)
        flight, scalars = simulation.state.flight, simulation.state.scalars[0]
        ring = [(int(scalars["oldest"]) + i) % stages for i in range(int(scalars["in_flight"]))]
        slots = np.concatenate([flight.slots[i, : flight.samples[i]] for i in ring]) if ring else np.zeros(0)
        assert len(set(slots.tolist())) == len(slots)
        ends = [flight.completed_s[i] for i in ring]
        assert ends == sorted(ends)
        most_in_flight = max(most_in_flight, len(ring))
    outcome = simulation.outcome()
    assert most_in_flight == stages
    assert outcome.finished.all()
    assert (outcome.stage_bubble_s >= 0).all()
    assert (outcome.stage_busy_s + outcome.stage_bubble_s <= outcome.duration_s * (1 + 1e-9)).all()
    assert outcome.stage_bubble_s[1] > 0


def test_unequal_microbatches_leave_bubbles_and_equal_ones_do_not() -> None:
    """The reason for equal-time microbatches: a stage waits for the longer microbatch ahead of it."""
    decodes = make_workload("poisson:1e6", "fixed:16,400", np.random.default_rng(0), 8)
    prompt = Workload(np.array([1.0]), np.array([1900]), np.array([2]))
    both = Workload(
        np.concatenate([decodes.arrival_s, prompt.arrival_s]),
        np.concatenate([decodes.prompt_tokens, prompt.prompt_tokens]),
        np.concatenate([decodes.output_tokens, prompt.output_tokens]),
    )
    plant = Plant(piped(2), QUIET)
    bubbles = [ran_static(plant, both, budget).stage_bubble_s[1] for budget in (2048, 64)]
    assert bubbles[0] > bubbles[1]


def test_stages_are_busy_or_idle_for_as_long_as_there_is_work() -> None:
    """One request alone passes two stages: each waits for the other, at the start as at the end."""
    alone = Workload(np.array([0.0, 50.0]), np.array([100, 100]), np.array([3, 3]))
    outcome = ran_static(Plant(piped(2), QUIET), alone, 256)
    steps_s = [QUIET.mean_s(0, 0, 1, 100, 5000), QUIET.mean_s(1, 100, 0, 0, 0), QUIET.mean_s(1, 101, 0, 0, 0)]
    assert outcome.stage_busy_s == pytest.approx([2 * sum(steps_s)] * 2)
    assert outcome.stage_bubble_s == pytest.approx([2 * sum(steps_s)] * 2)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_busy_and_bubble_add_up_to_the_time_with_work(stages: int) -> None:
    outcome = ran_static(Plant(piped(stages), MODEL), workload(rate=2.0), 256)
    with_work_s = outcome.stage_busy_s + outcome.stage_bubble_s
    assert with_work_s == pytest.approx(np.full(stages, with_work_s[0]))
    assert 0.3 * outcome.duration_s < with_work_s[0] < outcome.duration_s
    assert len(set(outcome.stage_busy_s.tolist())) == stages, "each stage has noise of its own"


def test_request_level_waits_for_the_group_on_all_stages() -> None:
    config = EngineConfig(
        schedule="request-level", max_budget_tokens=2048, max_requests=4, kv_blocks=2048, pipeline_parallel=3
    )
    requests = workload(12, rate=1000.0)
    outcome = ran_static(Plant(config, QUIET), requests, 2048)
    ends_s = outcome.e2el_s + requests.arrival_s
    for admitted_s in np.unique(outcome.first_scheduled_s)[1:]:
        before = outcome.first_scheduled_s < admitted_s
        assert ends_s[before].max() <= admitted_s


def test_clairvoyant_keeps_its_limit_while_anyone_decodes_and_knows_none_otherwise() -> None:
    limit_s = 0.030
    requests = workload(200, rate=12.0)
    simulation = Simulation(Plant(CONFIG, QUIET), requests, keep_log=True)
    simulation.run_clairvoyant(limit_s)
    outcome = simulation.outcome()
    busy_with_decodes = outcome.log[:, 3] > 0
    assert outcome.tbt_s.max() <= limit_s * (1 + 1e-9)
    assert outcome.tbt_s.max() > 0.97 * limit_s
    assert (outcome.log[~busy_with_decodes, 1] == CONFIG.max_budget_tokens).any()
    assert (outcome.log[busy_with_decodes, 1] < CONFIG.max_budget_tokens).any()


def test_clairvoyant_takes_the_largest_budget_that_fits() -> None:
    """Against trying every budget, at each of the first iterations."""
    limit_s, config = 0.020, EngineConfig(max_budget_tokens=512, kv_blocks=2048, max_model_tokens=2048)
    plant, requests = Plant(config, QUIET), workload(20, rate=100.0)
    simulation = Simulation(plant, requests, keep_log=True)
    simulation.run_clairvoyant(limit_s)
    chosen = simulation.outcome().log[:40, 1].astype(int).tolist()
    for k, budget in enumerate(chosen):
        fitting = []
        for tried in range(config.tile_tokens, config.max_budget_tokens + 1, config.tile_tokens):
            again = Simulation(plant, requests)
            for knob in (*chosen[:k], tried):
                again.step(knob, knob)
            batch = again.telemetry().batch
            mean_s = QUIET.mean_s(
                *(batch.decode_tokens, batch.decode_context_tokens, batch.prefill_requests),
                *(batch.prefill_tokens, batch.prefill_attention_tokens2),
            )
            if batch.decode_tokens == 0 or mean_s <= limit_s:
                fitting.append(tried)
        assert budget == max(fitting, default=config.tile_tokens)
    assert len(set(chosen)) >= 3


def test_reserved_output_is_never_preempted() -> None:
    tight = EngineConfig(max_requests=32, kv_blocks=160)
    requests = workload(80, rate=100.0)
    preempted = ran_static(Plant(tight, MODEL), requests, 512)
    reserved = ran_static(Plant(tight, MODEL, reserve_output=True), requests, 512)
    assert preempted.preemptions > 0 == reserved.preemptions
    assert preempted.finished.all() and reserved.finished.all()


def test_a_slower_machine_is_slower_from_then_on() -> None:
    simulation = Simulation(
        Plant(CONFIG, QUIET), make_workload("poisson:1e6", "fixed:4,300", np.random.default_rng(0), 4)
    )
    for _ in range(100):
        simulation.step(256, 256)
    before = simulation.telemetry().completed[0]
    simulation.slowdown = 1.5
    simulation.step(256, 256)
    simulation.step(256, 256)
    after = simulation.telemetry().completed[0]
    assert after.device_s == pytest.approx(1.5 * before.device_s, rel=0.02)


def test_telemetry_counts_every_token_once() -> None:
    requests = workload()
    simulation = Simulation(Plant(piped(2), MODEL), requests)
    counts: defaultdict[str, float] = defaultdict(float)
    while not simulation.done:
        simulation.step(256, 256)
        telemetry = simulation.telemetry()
        for completion in telemetry.completed:
            counts["gaps"] += len(completion.tbt_s)
            counts["firsts"] += len(completion.ttft_s)
            counts["output"] += sum(f.output_tokens for f in completion.finished)
            counts["busy_s"] += sum(stage.busy_s for stage in completion.stages)
    outcome = simulation.outcome()
    assert counts["firsts"] == len(requests)
    assert counts["gaps"] == requests.output_tokens.sum() - len(requests) == len(outcome.tbt_s)
    assert counts["output"] == requests.output_tokens.sum()
    assert counts["busy_s"] == pytest.approx(outcome.stage_busy_s.sum())


def test_an_outcome_agrees_with_a_plain_reckoning() -> None:
    requests = workload(40)
    outcome = ran_static(Plant(CONFIG, MODEL), requests, 192)
    slo = Slo(tbt_s=0.0165, ttft_s=0.5)
    gaps, met = [], []
    for i, (arrival_s, n) in enumerate(zip(requests.arrival_s, requests.output_tokens, strict=True)):
        row = outcome.first_token_row[i]
        times = outcome.token_times_s[row : row + n]
        assert outcome.ttft_s[i] == times[0] - arrival_s > outcome.scheduling_delay_s[i] >= 0
        assert outcome.e2el_s[i] == times[-1] - arrival_s
        gaps.extend(np.diff(times))
        met.append(slo.met(times[0] - arrival_s, np.diff(times), times[-1] - arrival_s))
        if n > 1:
            assert outcome.tpot_s[i] == pytest.approx(np.mean(np.diff(times)))
    assert sorted(outcome.tbt_s) == sorted(gaps)
    assert outcome.met(slo).tolist() == met
    assert 0 < sum(met) < len(met)
    assert outcome.goodput(slo) == sum(met) / outcome.duration_s
    assert outcome.tokens_in_slo(0.0165) == np.mean(np.array(gaps) <= 0.0165)


@pytest.mark.parametrize("text", ["tbt:16.5", "tbt:16 quantile:0.9", "tpot:14 ttft:300", "e2el:900 tbt:16.5"])
@pytest.mark.parametrize("until_s", [5.0, np.inf])
def test_requests_are_judged_as_the_slo_judges_each(text: str, until_s: float) -> None:
    slo, requests = Slo.parse(text), workload(150, rate=8.0)
    simulation = Simulation(Plant(CONFIG, MODEL), requests)
    simulation.run_static(192, 192, until_s)
    outcome = simulation.outcome()
    rows = zip(outcome.first_token_row, requests.output_tokens, strict=True)
    times = [outcome.token_times_s[row : row + n] for row, n in rows]
    latencies = zip(outcome.finished, outcome.ttft_s, times, outcome.e2el_s, strict=True)
    expected = [bool(done) and slo.met(ttft, np.diff(t), e2el) for done, ttft, t, e2el in latencies]
    assert outcome.met(slo).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_a_stalled_law_gains_nothing_by_the_cut() -> None:
    """Few tokens early and none after: the time until the cut counts, not that until the last token."""
    requests = Workload(np.arange(11) * 0.01, np.array([10] * 10 + [1900]), np.array([1] * 11))
    slow, fast = (Simulation(Plant(CONFIG, QUIET), requests) for _ in range(2))
    slow.run_static(16, 16, until_s=0.8)
    fast.run_static(2048, 2048, until_s=0.8)
    slo = Slo(ttft_s=1.0)
    assert fast.done and not slow.done
    assert slow.outcome().goodput(slo) < fast.outcome().goodput(slo)
    assert slow.outcome().duration_s >= 0.8


def test_nothing_happens_after_the_time_is_up() -> None:
    requests = Workload(np.array([0.0, 100.0]), np.array([10, 10]), np.array([2, 2]))
    for run in (lambda s: s.run_static(64, 64, until_s=5.0), lambda s: s.run_law(lambda t, now: None, until_s=5.0)):
        simulation = Simulation(Plant(CONFIG, QUIET), requests)
        run(simulation)
        assert simulation.now_s == 5.0
        outcome = simulation.outcome()
        assert outcome.finished.tolist() == [True, False]
        assert np.isnan(outcome.first_scheduled_s[1])
        assert outcome.duration_s == 5.0


def test_a_run_cut_before_it_began_has_no_goodput() -> None:
    simulation = Simulation(Plant(CONFIG, QUIET), Workload(np.array([0.0]), np.array([10]), np.array([2])))
    assert simulation.outcome().goodput(Slo(tbt_s=1.0)) == 0.0


def test_a_run_cut_short_counts_the_unfinished_as_misses() -> None:
    requests = workload(200, rate=50.0)
    simulation = Simulation(Plant(CONFIG, MODEL), requests)
    simulation.run_static(128, 128, until_s=2.0)
    outcome = simulation.outcome()
    assert 2.0 <= simulation.now_s < 2.1
    assert not outcome.finished.all()
    assert not outcome.met(Slo(e2el_s=1e9))[~outcome.finished].any()
    assert np.isnan(outcome.e2el_s[~outcome.finished]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Plant(CONFIG, MODEL, dead_time_iterations=0), "dead_time_iterations is 0"),
        (lambda: Plant(EngineConfig(prefix_caching=True), MODEL), "prefix cache"),
        (
            lambda: Simulation(Plant(CONFIG, MODEL), Workload(np.zeros(1), np.array([2000]), np.array([100]))),
            "request 0",
        ),
        (lambda: Simulation(Plant(CONFIG, MODEL), workload()).run_clairvoyant(0.0), "limit_s is 0"),
        (lambda: Simulation(Plant(piped(2), MODEL), workload()).run_clairvoyant(1.0), "one stage"),
        (lambda: Simulation(Plant(CONFIG, MODEL), workload()).run_static(0, 64), "budget_tokens 0 is outside"),
        (lambda: Simulation(Plant(CONFIG, MODEL), workload()).run_static(64, 100_000), "chunk_tokens 100000"),
        (lambda: Simulation(Plant(CONFIG, MODEL), workload()).step(9000, 64), "budget_tokens 9000"),
        (lambda: setattr(Simulation(Plant(CONFIG, MODEL), workload()), "slowdown", 0.0), "slowdown is 0"),
    ],
)
def test_bad_input_is_named(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()  # type: ignore[operator]
