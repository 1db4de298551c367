"""Capacity: the search, the verdict on a run, its early end, and where it is computed."""

import math
import multiprocessing
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from envs.outcome import Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload
from profiles.capacity import (
    TOLERANCE,
    Interval,
    Trial,
    is_hopeless,
    largest_rate,
    meets,
)
from profiles.parallel import in_parallel, worker_pool

STEP_TIME = StepTimeModel.from_formula((20e-3, 5e-5, 2e-7), (10e-3, 25e-5, 2e-7, 5e-9, 1.5e-3)).with_noise(0.04)
PLANT = Plant(EngineConfig(), STEP_TIME)
LENGTHS = "lognormal:250/0.8/1500,30/0.7/200"


def trial(policy: str, slo: str = "tbt:100", seed: int = 0, requests: int = 250) -> Trial:
    workload = make_workload("poisson:1", LENGTHS, np.random.default_rng(seed), requests, PLANT.config.max_model_tokens)
    return Trial(PLANT, workload, Slo.parse(slo), seed, policy)


def outcome(token_times_s: list[list[float]], arrival_s: list[float], scheduled_s: list[float]) -> Outcome:
    """Requests whose tokens came at these times, NaN for one that did not."""
    lengths = np.array([len(times) for times in token_times_s])
    times_s = np.concatenate(token_times_s)
    workload = Workload(np.array(arrival_s), np.ones_like(lengths), lengths)
    produced = np.array([np.count_nonzero(~np.isnan(times)) for times in token_times_s])
    rows = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    empty = np.zeros(0)
    return Outcome(workload, np.array(scheduled_s), produced, rows, times_s, 1.0, 1, 0, empty, empty, empty)


@given(limit=st.floats(0.1, 500), guess=st.floats(0.5, 50))
def test_the_search_finds_the_rung_below_the_limit_from_any_guess(limit: float, guess: float) -> None:
    found = largest_rate(lambda rate: rate <= limit, guess)
    assert found <= limit < found * (1 + TOLERANCE) * (1 + 1e-9)
    assert found == largest_rate(lambda rate: rate <= limit, limit)


def test_an_slo_that_no_rate_meets_has_capacity_0() -> None:
    assert largest_rate(lambda rate: False, 5.0) == 0.0
    assert trial("static:budget=512", "tbt:2", requests=20).capacity() == 0.0


def test_an_slo_that_every_rate_meets_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="ask for more requests"):
        largest_rate(lambda rate: True, 5.0)
    with pytest.raises(ValueError, match="more requests"):
        trial("static:budget=512", "tbt:10000", requests=10).capacity()


def test_a_run_meets_the_slo_by_its_quantiles_its_delay_and_its_end() -> None:
    nan = math.nan
    two = [[1.0, 1.1, 1.2], [1.0, 1.1, 1.4]]  # gaps 0.1 0.1 0.1 0.3: the linear 0.99 quantile is 0.294
    run = outcome(two, [0.0, 0.5], [0.5, 0.9])
    assert meets(run, Slo(tbt_s=0.295)) and not meets(run, Slo(tbt_s=0.293))
    assert meets(run, Slo(tbt_s=0.293, quantile=0.9))
    assert meets(run, Slo(ttft_s=1.0)) and not meets(run, Slo(ttft_s=0.99))
    assert meets(run, Slo(tpot_s=0.2)) and not meets(run, Slo(tpot_s=0.19))
    assert meets(run, Slo(e2el_s=1.2)) and not meets(run, Slo(e2el_s=1.19))
    assert meets(run, Slo(deadline_s=0.2)) and not meets(run, Slo(deadline_s=0.19)), "third tokens, 0.2 and 0.4 s on"
    assert meets(run, Slo(deadline_s=0.19, ttft_s=1.02)), "the second request's first token, after 0.5 s, was early"
    assert not meets(outcome([[1.0, 1.1], [1.0, nan]], [0.0, 0.5], [0.5, 0.9]), Slo(tbt_s=1))
    late = [[10.0], [10.0], [10.0]]
    assert meets(outcome(late, [0, 0, 0], [2.0, 2.0, 9.0]), Slo(tbt_s=1))
    assert not meets(outcome(late, [0, 0, 0], [1.0, 2.1, 9.0]), Slo(tbt_s=1))


def test_a_run_is_hopeless_once_the_late_ones_alone_are_too_many() -> None:
    nan = math.nan
    slo = Slo(tbt_s=0.2, ttft_s=5.0, quantile=0.75)  # of 5 gaps one may be late, of 5 requests one
    assert not is_hopeless(outcome([[1, 1.1, 1.5, nan], [1.3, 1.4, nan]], [0, 0], [0, 0]), slo, 1.5)
    assert is_hopeless(outcome([[1, 1.1, 1.5, nan], [1.3, 1.4, nan]], [0, 0], [0, 0]), slo, 1.8), "and one of 0.3 s"
    assert is_hopeless(outcome([[1, 1.3, 1.7, nan], [1.5, 1.6, nan]], [0, 0], [0, 0]), slo, 1.7)
    five = outcome([[nan]] * 5, [0.0, 3.0, 9.0, 9.0, 9.0], [0.0, 4.0, 9.0, 9.0, 9.0])
    assert not is_hopeless(five, slo, 7.9) and is_hopeless(five, slo, 8.1)
    assert not is_hopeless(outcome([[nan], [nan], [nan]], [0, 0, 0], [0, nan, nan]), slo, 1.9)
    assert is_hopeless(outcome([[nan], [nan], [nan]], [0, 0, 0], [0, nan, nan]), slo, 2.1)


def test_a_run_is_hopeless_once_it_has_lost_what_counts_from_the_first_token() -> None:
    nan = math.nan
    run = outcome([[1, 1.1, 1.2, nan]], [0.5], [0.6])
    assert not is_hopeless(run, Slo(tpot_s=0.2), 1.59) and is_hopeless(run, Slo(tpot_s=0.2), 1.61)
    assert not is_hopeless(run, Slo(e2el_s=1.0), 1.49) and is_hopeless(run, Slo(e2el_s=1.0), 1.51)
    assert not is_hopeless(run, Slo(deadline_s=0.2), 1.59) and is_hopeless(run, Slo(deadline_s=0.2), 1.61)
    early = Slo(deadline_s=0.2, ttft_s=0.7)
    assert not is_hopeless(run, early, 1.79) and is_hopeless(run, early, 1.81)
    assert not is_hopeless(run, Slo(deadline_s=0.2, quantile=0.75), 99.0), "one of four may be late"


@pytest.mark.parametrize("policy", ["static:budget=512", "static:budget=64", "clairvoyant", "pid"])
@pytest.mark.parametrize("slo", ["tbt:100", "tbt:45", "tbt:200 ttft:2500", "tbt:200 tpot:45", "tbt:999 deadline:40"])
def test_an_early_end_gives_the_verdict_of_the_whole_run(policy: str, slo: str) -> None:
    judged = trial(policy, slo)
    rates = np.geomspace(0.3, 30, 10)
    assert [judged.meets_slo(rate) for rate in rates] == [meets(judged.simulate(rate), judged.slo) for rate in rates]


def test_an_overloaded_run_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    overloaded = trial("static:budget=16")
    verdicts = list[tuple[bool, float]]()

    def noted(outcome: Outcome, slo: Slo, now_s: float) -> bool:
        verdicts.append((is_hopeless(outcome, slo, now_s), outcome.duration_s))
        return verdicts[-1][0]

    monkeypatch.setattr("profiles.capacity.is_hopeless", noted)
    assert not overloaded.meets_slo(10.0)
    assert verdicts[-1][0]
    assert verdicts[-1][1] < 0.3 * overloaded.simulate(10.0).duration_s


def test_capacity_is_met_and_the_rung_above_is_not() -> None:
    found = trial("static:budget=128").capacity()
    assert found == trial("static:budget=128").capacity(guess=found / 7)
    assert trial("static:budget=128").meets_slo(found)
    assert not trial("static:budget=128").meets_slo(found * (1 + TOLERANCE) * (1 + 1e-9))


def test_clairvoyance_is_worth_at_least_the_best_static_budget() -> None:
    statics = [trial(f"static:budget={budget}").capacity() for budget in (64, 128, 256, 512)]
    ideal = trial("clairvoyant").capacity()
    assert ideal >= max(statics) > min(statics) > 0


def test_fixed_knobs_run_compiled_as_they_would_in_the_loop() -> None:
    compiled = trial("static:budget=96,chunk=48").simulate(1.0)
    plant = Plant(EngineConfig(budget_tokens=96, chunk_tokens=48), STEP_TIME)
    asked = Simulation(plant, compiled.workload, 0)
    asked.run_law(lambda telemetry, now_ns: (96, 48, ""))
    assert (asked.outcome().token_times_s == compiled.token_times_s).all()


def test_fixed_knobs_beyond_the_bounds_are_clamped_as_the_guard_would() -> None:
    beyond, most = (trial(f"static:budget={budget}").simulate(1.0) for budget in (10**6, 2048))
    assert (beyond.token_times_s == most.token_times_s).all()


def test_a_schedule_is_part_of_a_policy() -> None:
    def p99_tbt_s(policy: str) -> float:
        return float(np.quantile(trial(policy).simulate(4.0).tbt_s, 0.99))

    assert p99_tbt_s("static:budget=512@stall-free") == p99_tbt_s("static:budget=512")
    assert p99_tbt_s("static:budget=512@prefill-first") > 2 * p99_tbt_s("static:budget=64")
    with pytest.raises(ValueError, match="'fifo' is not one of"):
        trial("static:budget=512@fifo").simulate(1.0)


def test_clairvoyance_needs_a_promise_on_tbt() -> None:
    with pytest.raises(ValueError, match="--slo"):
        trial("clairvoyant", "ttft:500").simulate(1.0)


def test_a_rate_stretches_the_arrivals_and_nothing_else() -> None:
    unit = trial("static").load.at_rate(1.0)
    fast = unit.at_rate(8.0)
    assert (len(fast) - 1) / (fast.arrival_s[-1] - fast.arrival_s[0]) == pytest.approx(8.0)
    assert (fast.prompt_tokens == unit.prompt_tokens).all()
    gaps, unit_gaps = np.diff(fast.arrival_s), np.diff(unit.arrival_s)
    assert gaps / unit_gaps == pytest.approx(np.full(len(gaps), gaps[0] / unit_gaps[0]))
    with pytest.raises(ValueError, match="no rate"):
        unit.first(1).at_rate(8.0)


def test_the_interval_is_students() -> None:
    mean, half_width = Interval.of([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(Interval.of([1.0]).half_width)


def test_where_a_trial_runs_changes_nothing_and_no_process_stays() -> None:
    tasks = [trial(policy, seed=seed, requests=100) for policy in ("static:budget=128", "pid") for seed in (0, 1)]
    found = []
    for processes in (1, 2):
        with worker_pool(processes) as pool:
            found.append(dict(in_parallel(pool, Trial.capacity, tasks)))
    assert found[0] == found[1] == {i: task.capacity() for i, task in enumerate(tasks)}
    assert not multiprocessing.active_children()


def test_processes_end_with_an_interrupted_search() -> None:
    with pytest.raises(KeyboardInterrupt), worker_pool(2) as pool:
        for _ in in_parallel(pool, Trial.capacity, [trial("pid", seed=seed) for seed in range(50)]):
            raise KeyboardInterrupt
    assert not multiprocessing.active_children()


def test_more_load_is_never_met_sooner_with_the_same_requests() -> None:
    """What bisection rests on; the noise of one run is small beside a factor of 1.3."""
    verdicts = [trial("static:budget=256").meets_slo(rate) for rate in 0.3 * 1.3 ** np.arange(18)]
    assert all(before >= after for before, after in pairwise(verdicts))
    assert {True, False} == set(verdicts)
