"""What a trial is worth: the capacity of a candidate and its TTFT, on the same requests for all, and what that cost.

Cost is counted in runs: the requests of one seed, simulated once at one rate. A search for a capacity takes about four
from a good guess, a dozen from a bad one; a trial that is pruned at once takes one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload
from profiles.capacity import Trial, largest_rate, rough_capacity
from profiles.tune_space import Candidate, Space, static_knobs

TOLERANCE = 0.01
TTFT_SHARE = 0.9
PRUNED_BELOW = 0.98  # of the best trial's capacity with the same requests
DIRECTIONS: tuple[Literal["maximize"], Literal["minimize"]] = ("maximize", "minimize")
METRICS = ("capacity (req/s)", "TTFT (s)")
CONSTRAINT = "SLO at the common rate"


@dataclass(frozen=True)
class Problem:
    """What is tuned for: an engine, a promise, and requests. `workloads` has one for each seed.

    Raises ValueError without any workload.
    """

    plant: Plant
    workloads: Mapping[int, Workload]
    slo: Slo
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not self.workloads:
            raise ValueError("no seed to tune on: ask for at least 1, better 3")

    def trial(self, candidate: Candidate, seed: int) -> Trial:
        return Trial(candidate.on(self.plant), self.workloads[seed], self.slo, seed, candidate.policy)

    def starting_from(self, score: "Score") -> "Problem":
        """The same on an engine whose own knobs are those of a static that was tried."""
        budget, chunk = static_knobs(score.policy)
        config = replace(self.plant.config, budget_tokens=budget, chunk_tokens=chunk, max_requests=score.max_requests)
        return replace(self, plant=replace(self.plant, config=config))

    def digest(self) -> str:
        """Equal for equal problems alone."""
        plant = self.plant
        settings = (plant.config, plant.dead_time_iterations, plant.reserve_output, str(self.slo), self.tolerance)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(profile_digest(plant.step_time).encode())
        for seed, load in sorted(self.workloads.items()):
            digest.update(f"{seed} {workload_digest(load)}".encode())
        return digest.hexdigest()[:12]


class Score(msgspec.Struct, frozen=True):
    """One figure a seed: capacity in req/s and TTFT in seconds at the SLO's quantile, at the common rate of the seed.

    `runs` is what it cost; `violation` how far below the common rate the worst seed's capacity is, in shares of it
    (the SLO is kept at that rate if it is 0 or less).
    """

    policy: str
    max_requests: int
    capacities: list[float]
    ttft_s: list[float]
    violation: float
    runs: int

    @property
    def capacity(self) -> float:
        return float(np.mean(self.capacities))

    @property
    def values(self) -> tuple[float, float]:
        """The objectives, in the order of `DIRECTIONS`."""
        return self.capacity, float(np.mean(self.ttft_s))

    @classmethod
    def of(cls, trial: FrozenTrial) -> "Score":
        """What was noted with a trial that ran to its end."""
        return msgspec.convert(trial.user_attrs, cls)


class Evaluation:
    """Computes the score of one candidate, and counts the runs."""

    def __init__(self, problem: Problem, candidate: Candidate) -> None:
        self.problem = problem
        self.candidate = candidate
        self.runs = 0

    def capacity(self, seed: int, near: float, prune: bool = False) -> float:
        """Searched from `near` on. Raises TrialPruned if that is asked for and `near` itself misses the SLO."""
        trial, began = self.problem.trial(self.candidate, seed), self.runs

        def meets_slo(rate: float) -> bool:
            self.runs += 1
            met = trial.meets_slo(rate)
            if prune and not met and self.runs == began + 1:
                raise optuna.TrialPruned
            return met

        return largest_rate(meets_slo, near, self.problem.tolerance)

    def ttft_s(self, seed: int, rate: float) -> float:
        self.runs += 1
        outcome = self.problem.trial(self.candidate, seed).simulate(rate)
        return float(np.quantile(outcome.ttft_s, self.problem.slo.quantile))

    def score(self, rates: Sequence[float], near: Sequence[float], prune: bool) -> Score:
        """One rate for the TTFT and one to search from for each seed, in ascending order of the seeds."""
        seeds = sorted(self.problem.workloads)
        capacities = [self.capacity(seed, start, prune) for seed, start in zip(seeds, near, strict=True)]
        return self._scored(capacities, rates)

    def first_score(self) -> Score:
        """Without knowing anything: the rates for the TTFT are taken from its own capacities.

        Raises TrialPruned if it keeps the SLO at no rate.
        """
        near = rough_capacity(self.problem.plant, next(iter(self.problem.workloads.values())))
        capacities: list[float] = []
        for seed in sorted(self.problem.workloads):
            capacities.append(self.capacity(seed, near))
            near = capacities[-1]
            if not near:
                raise optuna.TrialPruned
        return self._scored(capacities, common_rates(capacities))

    def _scored(self, capacities: list[float], rates: Sequence[float]) -> Score:
        ttft_s = [self.ttft_s(seed, rate) for seed, rate in zip(sorted(self.problem.workloads), rates, strict=True)]
        violation = max(1 - found / rate for found, rate in zip(capacities, rates, strict=True))
        return Score(*self.candidate, capacities, ttft_s, violation, self.runs)


@dataclass(frozen=True)
class Objective:
    """An Optuna objective: (capacity, TTFT), means over the seeds.

    TTFT is taken at one rate a seed, the same for every candidate of every study: `TTFT_SHARE` of the capacity of
    `reference`, the first guess, from whose capacities searches begin before any trial has ended. A candidate must keep
    the SLO there, which is the study's constraint. It is pruned as soon as it misses the SLO at `PRUNED_BELOW` of the
    best trial's capacity with the same requests: mostly after one run. While none keeps the constraint, it has to come
    as near to it as the nearest did, less as much. One that was tried before is not run again.
    """

    problem: Problem
    space: Space
    reference: Score

    def __call__(self, trial: optuna.Trial) -> tuple[float, float]:
        candidate = self.space.candidate(self.space.suggest(trial))
        finished = finished_trials(trial.study)
        evaluation = Evaluation(self.problem, candidate)
        try:
            score = _known(finished, candidate) or self._score(evaluation, finished)
        except optuna.TrialPruned:
            for name, value in {**candidate._asdict(), "runs": evaluation.runs}.items():
                trial.set_user_attr(name, value)
            raise
        for name, value in msgspec.structs.asdict(score).items():
            trial.set_user_attr(name, value)
        trial.set_constraint(CONSTRAINT, score.violation)
        return score.values

    def _score(self, evaluation: Evaluation, finished: list[FrozenTrial]) -> Score:
        rates, best = common_rates(self.reference.capacities), best_of(finished)
        if best is not None:
            to_beat = best.capacities
        else:
            nearest = max((1 - score.violation for score in _scores(finished)), default=0.0)
            to_beat = [nearest * rate for rate in rates]
        if not all(to_beat):
            return evaluation.score(rates, self.reference.capacities, prune=False)
        return evaluation.score(rates, [PRUNED_BELOW * capacity for capacity in to_beat], prune=True)

    def as_trial(self, params: Mapping[str, Any]) -> FrozenTrial:
        """The reference, as the trial that found it."""
        return optuna.create_trial(
            values=self.reference.values,
            params=dict(params),
            distributions=dict(self.space.ranges),
            user_attrs=msgspec.structs.asdict(self.reference),
            constraints={CONSTRAINT: self.reference.violation},
        )


def _known(finished: list[FrozenTrial], candidate: Candidate) -> Score | None:
    """What an earlier trial of the same found, at no cost. Raises TrialPruned if that was pruned."""
    for other in finished:
        if (other.user_attrs["policy"], other.user_attrs["max_requests"]) == candidate:
            if other.state == TrialState.PRUNED:
                raise optuna.TrialPruned
            return msgspec.structs.replace(Score.of(other), runs=0)
    return None


def common_rates(capacities: Sequence[float]) -> list[float]:
    return [TTFT_SHARE * capacity for capacity in capacities]


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those that told something: to their end, or pruned after a run."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in trials if "policy" in trial.user_attrs]


def best_of(trials: Sequence[FrozenTrial]) -> Score | None:
    """Of those that keep the constraint the highest capacity; within the search's rung of it, the lowest TTFT."""
    scores = [score for score in _scores(trials) if score.violation <= 0]
    if not scores:
        return None
    top = max(score.capacity for score in scores)
    return min((s for s in scores if s.capacity >= top * (1 - TOLERANCE / 2)), key=lambda score: score.values[1])


def _scores(trials: Sequence[FrozenTrial]) -> list[Score]:
    return [Score.of(trial) for trial in trials if trial.state == TrialState.COMPLETE]


def runs_of(trials: Sequence[FrozenTrial]) -> int:
    return sum(trial.user_attrs["runs"] for trial in trials)


def profile_digest(step_time: StepTimeModel) -> str:
    return hashlib.sha256(msgspec.json.encode(step_time.description)).hexdigest()[:12]


def workload_digest(workload: Workload) -> str:
    digest = hashlib.sha256()
    for values in (workload.arrival_s, workload.prompt_tokens, workload.output_tokens):
        digest.update(values.tobytes())
    return digest.hexdigest()[:12]
