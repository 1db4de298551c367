"""Tuning: the space, what a trial is worth, studies that outlive their processes, the baselines, and the command."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from rich.console import Console
from test_capacity import LENGTHS, PLANT

from engine.config import EngineConfig
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload
from policies.catalogue import LAWS, parse_law
from profiles import tune_study
from profiles.parallel import worker_pool
from profiles.tune_baselines import Verdict
from profiles.tune_flags import FAMILIES
from profiles.tune_objective import TOLERANCE, Evaluation, Objective, Problem, Score, finished_trials
from profiles.tune_space import LAW_RANGES, Space, guess_budget, static_knobs
from profiles.tune_study import Limit, Progress, Search
from profiles.tuner import Tuner

ROOT = Path(__file__).parent.parent
SLO = Slo.parse("tbt:100")


def problem(seeds: int = 2, slo: Slo = SLO, requests: int = 120) -> Problem:
    workloads = {
        seed: make_workload("poisson:1", LENGTHS, np.random.default_rng(seed), requests, PLANT.config.max_model_tokens)
        for seed in range(seeds)
    }
    return Problem(PLANT, workloads, slo)


def search(folder: Path, trials: int = 12, seed: int = 0, law: str = "static") -> Search:
    asked = problem()
    space = Space.of(law, asked.plant.config)
    static = Space.of("static", asked.plant.config)
    reference = Evaluation(asked, static.candidate(static.guesses(256)[0])).first_score()
    url = f"sqlite:///{folder / 'study.db'}"
    return Search(url, f"tuned-{law}", "tuned", Objective(asked, space, reference), seed, Limit(trials))


def do_all(one: Search) -> Progress:
    while (progress := one.one_trial()).asked:
        pass
    return progress


def tuner(folder: Path, pool: Any, processes: int, trials: int) -> Tuner:
    url = f"sqlite:///{folder / 'study.db'}"
    return Tuner(url, pool, processes, 0, trials, lambda: math.inf, Console(quiet=True))


@pytest.mark.parametrize("law", LAW_RANGES)
def test_a_law_can_be_set_anywhere_in_its_ranges_and_starts_as_it_is(law: str) -> None:
    space = Space.of(law, PLANT.config)
    (default,) = space.guesses(512)
    corners = itertools.product(*[(r.low, r.high) for r in space.ranges.values()])
    for params in (default, *(dict(zip(space.ranges, corner, strict=True)) for corner in corners)):
        parse_law(space.candidate(params).policy, SLO, PLANT.step_time)
    assert all(space.ranges[name]._contains(value) for name, value in default.items())
    assert set(space.ranges) == set(LAWS[law].RANGES)  # type: ignore[attr-defined]


@given(tiles=st.integers(1, 128), share=st.integers(1, 8), most=st.integers(8, 64))
def test_a_static_has_whole_tiles_and_no_chunk_above_its_budget(tiles: int, share: int, most: int) -> None:
    space = Space.of("static", PLANT.config)
    candidate = space.candidate({"budget_tiles": tiles, "chunk_share": share / 8, "max_requests": most})
    budget, chunk = static_knobs(candidate.policy)
    assert budget == 16 * tiles and 16 <= chunk <= budget and chunk % 16 == 0
    assert chunk == budget or chunk <= budget * share / 8 or chunk == 16
    assert candidate.on(PLANT).config.max_requests == most
    parse_law(candidate.policy, SLO)


def test_only_what_has_parameters_can_be_tuned() -> None:
    with pytest.raises(ValueError, match="'trtllm' has nothing to tune: choose from static, pid"):
        Space.of("trtllm", PLANT.config)


@pytest.mark.parametrize("points", [10, 100])
@pytest.mark.parametrize("law", FAMILIES)
def test_a_grid_spans_its_ranges(law: str, points: int) -> None:
    space = Space.of(law, PLANT.config)
    grid = space.grid(points)
    for name, range_ in space.ranges.items():
        values = {point[name] for point in grid}
        assert {range_.low, range_.high} <= values and all(range_._contains(value) for value in values)
    assert len({tuple(point.values()) for point in grid}) == len(grid)


def test_the_guess_is_the_largest_budget_within_the_bound_at_the_typical_load() -> None:
    flat = StepTimeModel.from_formula((1e-3, 1e-4, 0.0), (1e-3, 1e-4, 0.0, 0.0, 0.0))  # 1 ms + 0.1 ms a token
    plant = Plant(EngineConfig(), flat)
    load = Workload(np.arange(10.0), np.full(10, 300), np.full(10, 30))
    assert guess_budget(plant, load, Slo.parse("tbt:50")) == 480  # 490 tokens fit, of whole tiles 30
    assert guess_budget(plant, load, Slo.parse("tpot:50")) == 480
    assert guess_budget(plant, load, Slo.parse("tbt:0.1")) == 16
    assert guess_budget(plant, load, Slo.parse("ttft:50")) == plant.config.budget_tokens
    noisy = Plant(EngineConfig(), flat.with_noise(0.1))
    worst = np.sort(noisy.step_time.residuals[1])[-3]  # of 256 factors two may miss: less than 1 %
    assert guess_budget(noisy, load, Slo.parse("tbt:50")) == int((50 / worst - 1) * 10 // 16 * 16)
    # 0.1 us for each pair of tokens: 300 deep tokens are as slow as all, in a step of one such prompt or of three.
    deep = Plant(EngineConfig(), StepTimeModel.from_formula((1e-3, 1e-4, 0.0), (1e-3, 1e-4, 0.0, 1e-7, 0.0)))
    budget = guess_budget(deep, load, Slo.parse("tbt:50"))
    assert budget < 480 and abs(1e-3 + 1e-4 * budget + 1e-7 * (budget * 10 / 11) * 297 - 50e-3) < 2e-3


def test_a_score_is_the_capacity_and_the_ttft_of_the_same_requests() -> None:
    asked = problem()
    candidate = Space.of("static", PLANT.config).candidate({"budget_tiles": 16})
    score = Evaluation(asked, candidate).first_score()
    for seed, capacity, ttft_s in zip((0, 1), score.capacities, score.ttft_s, strict=True):
        trial = asked.trial(candidate, seed)
        assert trial.meets_slo(capacity) and not trial.meets_slo(capacity * (1 + TOLERANCE))
        assert ttft_s == np.quantile(trial.simulate(0.9 * capacity).ttft_s, 0.99)
    assert score.values == (np.mean(score.capacities), np.mean(score.ttft_s))
    assert score.violation == pytest.approx(-1 / 9)  # 0.9 of the capacity is kept with a ninth of itself to spare


def test_a_trial_far_below_the_best_is_pruned_and_one_met_again_costs_nothing(tmp_path: Path) -> None:
    one = search(tmp_path)
    good = dict(one.objective.space.guesses(256)[0])
    bad = good | {"budget_tiles": 2}
    one.begin([one.objective.as_trial(good)], [bad, good | {"budget_tiles": 13}])
    one.study().enqueue_trial(good)
    one.study().enqueue_trial(bad)
    for _ in range(4):
        one.one_trial()
    trials = finished_trials(one.study())
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    assert [trials[i].state for i in (0, 1, 3, 4)] == [complete, pruned, complete, pruned]
    assert [trials[i].user_attrs["runs"] for i in (1, 3, 4)] == [1, 0, 0]
    assert trials[3].values == trials[0].values
    assert trials[0].constraints and all(value <= 0 for value in trials[0].constraints.values())


def test_a_study_improves_on_its_guess_and_ends_at_its_limit(tmp_path: Path) -> None:
    one = search(tmp_path, trials=25)
    guesses = one.objective.space.guesses(64)
    poor = Evaluation(one.objective.problem, one.objective.space.candidate(guesses[0])).first_score()
    begun = Objective(one.objective.problem, one.objective.space, poor)
    one = Search(one.url, one.name, "tuned", begun, 0, one.limit)
    one.begin([begun.as_trial(guesses[0])], guesses[1:])
    progress = do_all(one)
    assert progress.trials == 25 and progress.best
    assert progress.best.capacity > 1.2 * poor.capacity
    again = one.one_trial()
    assert not again.asked and again == progress._replace(asked=False)


def test_the_same_seed_gives_the_same_study(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        one = search(tmp_path / name, trials=10, law="pid")
        one.begin([], one.objective.space.guesses(0))
        do_all(one)
        found.append([(trial.params, trial.values) for trial in one.study().trials])
    assert found[0] == found[1]


def test_the_baselines_spend_what_the_tuner_spent(tmp_path: Path) -> None:
    with worker_pool(1) as pool:
        found = tuner(tmp_path, pool, 1, 15).static(problem())
    assert found.random.runs >= found.tuned.runs
    most = max(t.user_attrs["runs"] for t in _trials(tmp_path, found.study.replace("tuned", "random")))
    assert found.random.runs - most < found.tuned.runs  # it stopped with the first trial past that
    assert found.grid.runs >= found.tuned.runs or found.grid.trials == len(
        Space.of("static", PLANT.config).grid(found.tuned.trials)
    )
    assert found.guess.capacity <= found.tuned.best.capacity * (1 + TOLERANCE)  # type: ignore[union-attr]


def _trials(folder: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    return finished_trials(tune_study.load_study(f"sqlite:///{folder / 'study.db'}", name))


def test_a_tuner_that_does_not_beat_random_search_is_reported_so() -> None:
    def progress(capacity: float) -> Progress:
        return Progress(3, 30, Score("static:budget=64", 8, [capacity], [1.0], 0.0, 10))

    def verdict(tuned: float, random: float) -> Verdict:
        guess = progress(1.0).best
        assert guess
        return Verdict("static", "tuned-static", progress(tuned), progress(random), progress(1.0), guess)

    assert verdict(5.2, 5.0).beaten and "the tuner beat random search" in verdict(5.2, 5.0).text
    assert not verdict(5.0, 5.0).beaten and "DID NOT BEAT random search (equal)" in verdict(5.0, 5.0).text
    assert not verdict(4.0, 5.0).beaten and "DID NOT BEAT random search (worse)" in verdict(4.0, 5.0).text
