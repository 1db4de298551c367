"""What a tuner has to beat: random search and a grid, with the same trials, the same pruning, at equal cost in runs.

Neither is told the guess. A tuner that does not find more than random search is said to be no better.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from profiles.tune_objective import TOLERANCE, Score
from profiles.tune_study import Limit, Progress, Search


class Verdict(NamedTuple):
    """What one family's searches found, with their costs; `guess` is where the tuner began."""

    law: str
    study: str
    tuned: Progress
    random: Progress
    grid: Progress
    guess: Score

    @property
    def beaten(self) -> bool:
        """Whether the tuner found more than random search, by more than the search for a capacity can tell."""
        return _capacity(self.tuned) > _capacity(self.random) * (1 + TOLERANCE / 2)

    @property
    def text(self) -> str:
        tuned, other = _capacity(self.tuned), _capacity(self.random)
        against = f"{tuned:.3f} req/s against {other:.3f} of random search with {self.random.runs} runs"
        if self.beaten:
            return f"{self.law}: the tuner beat random search: {against}"
        worse = tuned < other * (1 - TOLERANCE / 2)
        return f"{self.law}: the tuner DID NOT BEAT random search ({'worse' if worse else 'equal'}): {against}"


def random_search(tuned: Search, cost: Progress) -> Search:
    """As many runs as the tuner spent. Candidates met again cost nothing, so trials are limited too: one a run."""
    return _baseline(tuned, "random", cost)


def grid_search(tuned: Search, cost: Progress) -> Search:
    """As `random_search`; begin it with `grid_points`."""
    return _baseline(tuned, "grid", cost)


def grid_points(tuned: Search, cost: Progress) -> list[dict[str, float]]:
    """A full grid of as many points as the tuner had trials, in random order, so that one cut short is no worse."""
    points = tuned.objective.space.grid(cost.trials)
    order = np.random.default_rng(tuned.seed).permutation(len(points))
    return [points[i] for i in order]


def _baseline(tuned: Search, kind: str, cost: Progress) -> Search:
    assert kind in ("random", "grid")
    name = re.sub("^tuned", kind, tuned.name)
    return replace(tuned, name=name, kind=kind, limit=Limit(max(cost.runs, 1), cost.runs))  # type: ignore[arg-type]


def _capacity(progress: Progress) -> float:
    return progress.best.capacity if progress.best else 0.0
