"""Optuna studies in a database that several processes share: begun, gone on with, and searched until a limit.

A trial belongs to the process that runs it, which tells the database every few seconds that it lives. One whose process
was killed is begun again by whoever asks for the next trial `GRACE_S` later; a finished trial is never lost.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import Pool
from typing import Any, Literal, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, event

from profiles.parallel import in_parallel
from profiles.tune_objective import DIRECTIONS, METRICS, Objective, Score, best_of, finished_trials, runs_of

Kind = Literal["tuned", "random", "grid"]

HEARTBEAT_S, GRACE_S = 2, 10
STARTUP_TRIALS = 8  # beside the guesses, before the sampler trusts what it has seen
LOCK_WAIT_S = 60  # for another process's write to a database of one file


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
        """Give a new study its finished first trials and those to try next; one that was begun goes on."""
        study = self.study()
        if not study.get_trials(deepcopy=False):
            study.set_metric_names(list(METRICS))
            study.add_trials(first)
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
        self.study().optimize(self.objective, n_trials=1)
        return self.progress(asked=True)

    def run(self, pool: Pool, processes: int, at_end: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Search over the pool's processes until the limit, or until `at_end` says so between two trials."""
        begun = self.progress()
        missing, alone = self.limit.trials - begun.trials, begun.best is None
        # Until one trial has run to its end there is nothing to prune by: it runs alone.
        free, ended = threading.Semaphore(1 if alone else processes), threading.Event()

        def tasks() -> Iterator[Search]:
            for _ in range(missing):
                free.acquire()  # so that no more is asked for than is run
                if ended.is_set():
                    return
                yield self

        try:
            for _, progress in in_parallel(pool, Search.one_trial, tasks()):
                yield progress
                if not progress.asked or at_end():
                    ended.set()
                free.release(processes if alone and progress.best else 1)
                alone = alone and progress.best is None
        finally:
            ended.set()
            free.release()


class NumberedSampler(BaseSampler):
    """A sampler that is seeded afresh with the number of every trial, so that it is the same in whichever process."""

    def __init__(self, kind: Kind, seed: int) -> None:
        self._kind = kind
        self._seed = seed
        self._sampler = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        seed = self._seed * 1_000_003 + number
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


@lru_cache(maxsize=1)
def open_storage(url: str) -> RDBStorage:
    """The database, opened once in a process."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    storage = RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_S,
        grace_period=GRACE_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_S}} if url.startswith("sqlite:") else None,
    )
    if storage.engine.dialect.name == "sqlite":
        _lock_at_once(storage.engine)
    return storage


def _lock_at_once(engine: Engine) -> None:
    """SQLite knows no SELECT FOR UPDATE, so that two processes could both take one waiting trial. Lock from the first
    read of a transaction on (https://docs.sqlalchemy.org/en/20/dialects/sqlite.html, pysqlite's transactions).
    """

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below
        connection.execute("PRAGMA journal_mode=WAL")  # a commit need not wait for the disk, and a killed process
        connection.execute("PRAGMA synchronous=NORMAL")  # still loses nothing of it

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
    engine.dispose()  # of connections that were made before


def _open_trials(study: optuna.Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
