"""The searches of one tuning: for each law a study and its baselines, one after another, each over all processes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from optuna import TrialPruned
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from profiles.parallel import Pool
from profiles.tune_baselines import Verdict, grid_search, random_search
from profiles.tune_flags import STATIC
from profiles.tune_objective import Evaluation, Objective, Problem, Score
from profiles.tune_space import Space, guess_budget
from profiles.tune_study import Limit, Progress, Search

BASELINES = 2  # searches beside each study, of equal cost


@dataclass
class Tuner:
    """Runs the searches of one call over one pool of processes, until all is done or the deadline is past.

    `left` says how many seconds are left: a study may take its share of them, and its baselines what it took.
    """

    url: str
    pool: Pool
    seed: int
    trials: int
    left: Callable[[], float]
    console: Console
    runs: float = float("inf")  # at which a study ends, if not by its trials

    def verdicts(self, problem: Problem, laws: Sequence[str]) -> Iterator[Verdict]:
        """The static's, then that of each law for which there is time left."""
        static = self.static(problem, laws_after=len(laws))
        yield static
        for done, law in enumerate(laws, start=1):
            if self.left() <= 0:
                return
            yield self.law(problem, law, static, laws_after=len(laws) - done)

    def static(self, problem: Problem, budget_only: bool = False, laws_after: int = 0) -> Verdict:
        """The static budget's, from the step-time model's own guess; and its baselines."""
        config = problem.plant.config
        space = Space.of(STATIC, config, budget_only)
        workload = problem.workloads[min(problem.workloads)]
        budget = guess_budget(problem.plant, workload, problem.slo)
        reference, (first, *others) = _reference(problem, space, budget)
        search = self._search(Objective(problem, space, reference))
        return self._judge(search, [search.objective.as_trial(first)], others, 1 + laws_after)

    def law(self, problem: Problem, law: str, static: Verdict, laws_after: int = 0) -> Verdict:
        """A law's, on an engine with the best static's knobs; and its baselines."""
        assert static.best is not None  # the guess, at least
        tuned = problem.starting_from(static.best)
        space = Space.of(law, tuned.plant.config)
        search = self._search(Objective(tuned, space, static.guess))
        return self._judge(search, [], space.guesses(0), 1 + laws_after)

    def _search(self, objective: Objective) -> Search:
        asked = f"{objective.problem.digest()} {sorted(objective.space.ranges.items())} {self.seed}"
        name = f"tuned-{objective.space.law}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
        return Search(self.url, name, "tuned", objective, self.seed, Limit(self.trials, self.runs))

    def _judge(self, search: Search, first: list[Any], then: list[dict[str, Any]], studies: int) -> Verdict:
        law, share_s = search.objective.space.law, self.left() / studies / (1 + BASELINES)
        end_s = self.left() - share_s
        tuned = self._run(search, search.begin(first, then), f"{law}: tuned", lambda: self.left() <= end_s)
        over = lambda: self.left() <= 0  # noqa: E731
        other = random_search(search, tuned)
        random = self._run(other, other.begin([], []), f"{law}: random", over)
        other, points = grid_search(search, tuned)
        grid = self._run(other, other.begin([], points), f"{law}: grid", over)
        return Verdict(law, search.name, tuned, random, grid, search.objective.reference)

    def _run(self, search: Search, begun: Progress, what: str, at_end: Callable[[], bool]) -> Progress:
        in_runs = search.kind != "tuned"
        with _bar(self.console, what, search.limit.runs if in_runs else search.limit.trials, in_runs) as advance:
            advance(begun)
            for progress in search.run(self.pool, at_end):
                advance(progress)
        return search.progress()


def _reference(problem: Problem, space: Space, budget: int) -> tuple[Score, list[dict[str, Any]]]:
    """The score of the guess, and the guesses. Should it keep the SLO at no rate, of the nearest budget that does.

    Raises ValueError if none does.
    """
    config = problem.plant.config
    for near in _both_ways(budget, config.min_budget_tokens, config.max_budget_tokens):
        guesses = space.guesses(near)
        with suppress(TrialPruned):
            return Evaluation(problem, space.candidate(guesses[0])).first_score(), guesses
    raise ValueError(
        f"no static budget keeps {problem.slo} at any rate, from {config.min_budget_tokens} to "
        f"{config.max_budget_tokens} tokens: take a weaker --slo"
    )


def _both_ways(budget: int, low: int, high: int) -> Iterator[int]:
    """Half and twice as much, a quarter and four times, and so on: steps may be too long, or prompts too slow."""
    yield budget
    below = above = budget
    while below > low or above < high:
        if below > low:
            yield (below := max(below // 2, low))
        if above < high:
            yield (above := min(2 * above, high))


@contextmanager
def _bar(console: Console, what: str, total: float, in_runs: bool) -> Iterator[Callable[[Progress], None]]:
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.fields[best]}"), console=console) as bars:
        task = bars.add_task(f"{what} ({'runs' if in_runs else 'trials'})", total=total, best="")

        def advance(progress: Progress) -> None:
            best = f"{progress.best.capacity:.2f} req/s: {progress.best.policy}" if progress.best else ""
            bars.update(task, completed=progress.runs if in_runs else progress.trials, best=best)

        yield advance
