"""Optuna studies in a database that several processes share: begun, gone on with, and searched until a limit.

A trial belongs to the process that runs it, which tells the database every few seconds that it lives. One whose process
was killed is begun again by whoever asks for the next trial `GRACE_S` later; a finished trial is never lost.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from profiles.parallel import Pool, in_parallel
from profiles.tune_objective import DIRECTIONS, METRICS, Objective, Score, best_of, finished_trials, runs_of
from profiles.tune_storage import one_at_a_time, open_storage

Kind = Literal["tuned", "random", "grid"]

STARTUP_TRIALS = 8  # the guesses among them, before the sampler trusts what it has seen


class Limit(NamedTuple):
    """A search ends at so many finished trials, or when they cost so many runs."""

    trials: int
    runs: float = float("inf")


class Progress(NamedTuple):
    """How far a search is: finished trials, their cost in runs, and the best. `asked`: one more was run just now."""

    trials: int
    runs: int
    best: Score | None
    asked: bool = False


@dataclass(frozen=True)
class Search:
    """One study: where it is kept, by which name, what it searches, how and how far."""

    url: str
    name: str
    kind: Kind
    objective: Objective
    seed: int
    limit: Limit

    def study(self) -> optuna.Study:
        return _opened(self.url, self.name, self.kind, self.seed)

    def begin(self, first: list[FrozenTrial], then: list[dict[str, Any]]) -> Progress:
        """Give the study its finished first trials and those to try next, all that it does not have yet."""
        study = self.study()
        with one_at_a_time(self.url):
            study.set_metric_names(list(METRICS))
            had = [trial.params for trial in study.get_trials(deepcopy=False)]
            study.add_trials([trial for trial in first if trial.params not in had])
            for params in then:
                study.enqueue_trial(params, skip_if_exists=True)
        return self.progress()

    def progress(self, asked: bool = False) -> Progress:
        finished = finished_trials(self.study())
        return Progress(len(finished), runs_of(finished), best_of(finished), asked)

    def one_trial(self) -> Progress:
        """Run one trial, here, unless the search is at its end."""
        before = self.progress()
        exhausted = self.kind == "grid" and not _open_trials(self.study())
        if before.trials >= self.limit.trials or before.runs >= self.limit.runs or exhausted:
            return before
        numbers: list[int] = []

        def noted(trial: optuna.Trial) -> tuple[float, float]:
            numbers.append(trial.number)
            return self.objective(trial)

        try:
            self.study().optimize(noted, n_trials=1)
        except (UpdateFinishedTrialError, ValueError):
            if not (numbers and self._was_lost(numbers[-1])):
                raise
        return self.progress(asked=True)

    def _was_lost(self, number: int) -> bool:
        """Whether this process stood still so long that another took the trial over, and it cannot be told any more."""
        history = RetryHeartbeatStaleTrialCallback.retry_history
        return any(number in history(trial) for trial in self.study().get_trials(deepcopy=False))

    def run(self, pool: Pool, at_end: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Search over the pool's processes until the limit, or until `at_end` says so before a trial."""
        begun, ended = self.progress(), False
        missing = self.limit.trials - begun.trials

        def tasks(most: int) -> Iterator[Search]:
            for _ in range(most):
                if ended or at_end():
                    return
                yield self

        # Until one trial has run to its end there is nothing to prune by: it runs alone.
        for most in (missing,) if begun.trials else (1, missing - 1):
            for _, progress in in_parallel(pool, Search.one_trial, tasks(most)):
                ended = ended or not progress.asked
                yield progress


class NumberedSampler(BaseSampler):
    """A sampler that is seeded afresh with the number of every trial, so that it is the same in whichever process.

    The kind goes into the seed: a tuner's random points are not those of the random search beside it.
    """

    def __init__(self, kind: Kind, seed: int) -> None:
        self._kind = kind
        self._seed = seed
        self._sampler = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        digest = hashlib.sha256(f"{self._kind} {self._seed} {number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "little")  # all that numpy's generator takes
        if self._kind == "tuned":
            return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True)
        return RandomSampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


@lru_cache(maxsize=8)
def _opened(url: str, name: str, kind: Kind, seed: int) -> optuna.Study:
    return optuna.create_study(
        storage=open_storage(url),
        sampler=NumberedSampler(kind, seed),
        study_name=name,
        directions=list(DIRECTIONS),
        load_if_exists=True,
    )


def load_study(url: str, name: str) -> optuna.Study:
    """To read: it is not to be searched on with the sampler it has here."""
    return optuna.load_study(study_name=name, storage=open_storage(url))


def _open_trials(study: optuna.Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
