"""What the tuner is held against: what the others may spend, and the verdict."""

from pathlib import Path

import optuna
from test_capacity import PLANT
from test_tune import problem, search, tuner

from profiles import tune_study
from profiles.parallel import worker_pool
from profiles.tune_baselines import Verdict, grid_search
from profiles.tune_objective import TOLERANCE, Score, finished_trials
from profiles.tune_space import Space
from profiles.tune_study import Progress


def test_the_baselines_spend_what_the_tuner_spent(tmp_path: Path) -> None:
    with worker_pool(1) as pool:
        found = tuner(tmp_path, pool, 15).static(problem())
    assert found.random.runs >= found.tuned.runs
    most = max(t.user_attrs["runs"] for t in _trials(tmp_path, found.study.replace("tuned", "random")))
    assert found.random.runs - most < found.tuned.runs  # it stopped with the first trial past that
    assert found.grid.runs >= found.tuned.runs or found.grid.trials == len(
        Space.of("static", PLANT.config).grid(found.tuned.trials)
    )
    assert found.guess.capacity <= found.tuned.best.capacity * (1 + TOLERANCE)  # type: ignore[union-attr]


def _trials(folder: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    return finished_trials(tune_study.load_study(f"sqlite:///{folder / 'study.db'}", name))


def test_a_grid_of_more_points_is_another_study(tmp_path: Path) -> None:
    one = search(tmp_path, trials=40)
    names = [grid_search(one, Progress(trials, 90, None))[0].name for trials in (8, 27, 40, 43)]
    assert len(set(names)) == 2 + (len(one.objective.space.grid(27)) != len(one.objective.space.grid(40)))
    assert names[2] == names[3]  # trials past the limit, of calls that share the work


def verdict(tuned: float, random: float, grid: float = 1.0, random_runs: int = 30) -> Verdict:
    def progress(capacity: float, runs: int) -> Progress:
        score = Score(f"static:budget={64 * capacity:.0f}", 8, [capacity], [1.0], 0.0, 10)
        return Progress(3, runs, score if capacity else None)

    guess = progress(1.0, 1).best
    assert guess
    return Verdict(
        "static", "tuned-static", progress(tuned, 30), progress(random, random_runs), progress(grid, 30), guess
    )


def test_a_tuner_that_does_not_beat_random_search_is_reported_so() -> None:
    assert verdict(5.2, 5.0).beaten and "the tuner beat random search" in verdict(5.2, 5.0).text
    assert verdict(5.0, 5.0).beaten is False and "DID NOT BEAT random search (equal)" in verdict(5.0, 5.0).text
    assert verdict(4.0, 5.0).beaten is False and "DID NOT BEAT random search (worse)" in verdict(4.0, 5.0).text
    assert verdict(5.2, 5.0, random_runs=15).beaten is None
    assert "not compared with random search, which had 15 runs of 30" in verdict(5.2, 5.0, random_runs=15).text
    assert "no trial keeps the SLO at 90% of the guess's capacity" in verdict(0, 0, 0).text
    assert "THE GRID FOUND MORE: 6.000" in verdict(5.2, 5.0, 6.0).text
    assert "THE GRID" not in verdict(5.2, 5.0, 5.21).text


def test_the_best_of_all_three_searches_is_kept() -> None:
    found = [verdict(5.2, 5.0, 5.21), verdict(5.2, 5.8, 5.0), verdict(5.2, 5.8, 6.0), verdict(0, 0, 2.0)]
    assert [v.best and v.best.capacity for v in found] == [5.2, 5.8, 6.0, 2.0]
    assert verdict(0, 0, 0).best is None
