"""What a tuner has to beat: random search and a grid, with the same trials, the same pruning, at equal cost in runs.

Neither is told the guess. A tuner that does not find more than random search is said to be no better.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from profiles.tune_objective import TOLERANCE, TTFT_SHARE, Score
from profiles.tune_study import Kind, Limit, Progress, Search


class Verdict(NamedTuple):
    """What one family's searches found, with their costs; `guess` is where the tuner began."""

    law: str
    study: str
    tuned: Progress
    random: Progress
    grid: Progress
    guess: Score

    @property
    def best(self) -> Score | None:
        """Of all three; the tuner's unless another is better by more than the search for a capacity can tell."""
        found = [progress.best for progress in (self.random, self.grid) if progress.best is not None]
        better = [score for score in found if _more(score.capacity, _capacity(self.tuned))]
        return max(better, key=lambda score: score.capacity, default=self.tuned.best)

    @property
    def beaten(self) -> bool | None:
        """Whether the tuner found more than random search, likewise; None if that had less to spend."""
        if self.random.runs < self.tuned.runs and self.random.trials < self.tuned.runs:
            return None
        return _more(_capacity(self.tuned), _capacity(self.random))

    @property
    def text(self) -> str:
        tuned, random, grid = (_capacity(progress) for progress in (self.tuned, self.random, self.grid))
        runs = f"{self.random.runs} runs"
        against = f"{tuned:.3f} req/s against {random:.3f} of random search with {runs}"
        if not self.tuned.trials:
            text = "no trial ended in time: give a longer --timeout"
        elif self.best is None:
            text = f"no trial keeps the SLO at {TTFT_SHARE:.0%} of the guess's capacity"
        elif self.beaten is None:
            text = f"not compared with random search, which had {runs} of {self.tuned.runs}: give a longer --timeout"
        elif self.beaten:
            text = f"the tuner beat random search: {against}"
        else:
            worse = _more(random, tuned)
            text = f"the tuner DID NOT BEAT random search ({'worse' if worse else 'equal'}): {against}"
        return f"{self.law}: {text}" + (f"; THE GRID FOUND MORE: {grid:.3f}" if _more(grid, max(tuned, random)) else "")


def random_search(tuned: Search, cost: Progress) -> Search:
    """As many runs as the tuner spent. Candidates met again cost nothing, so trials are limited too: one a run."""
    return _baseline(tuned, "random", cost)


def grid_search(tuned: Search, cost: Progress) -> tuple[Search, list[dict[str, float]]]:
    """As `random_search`, and the points to begin it with.

    They are a full grid of as many as the tuner had trials, in random order, so that one cut short is no worse. Another
    number of points is another grid, with a study of its own.
    """
    points = tuned.objective.space.grid(min(cost.trials, tuned.limit.trials))
    order = np.random.default_rng(tuned.seed).permutation(len(points))
    search = _baseline(tuned, "grid", cost)
    return replace(search, name=f"{search.name}-{len(points)}"), [points[i] for i in order]


def _baseline(tuned: Search, kind: Kind, cost: Progress) -> Search:
    name = re.sub("^tuned", kind, tuned.name)
    return replace(tuned, name=name, kind=kind, limit=Limit(max(cost.runs, 1), cost.runs))


def _capacity(progress: Progress) -> float:
    return progress.best.capacity if progress.best else 0.0


def _more(capacity: float, other: float) -> bool:
    """By more than the search for a capacity can tell."""
    return capacity > other * (1 + TOLERANCE / 2)
