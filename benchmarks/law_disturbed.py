"""Laws on a plant that is not what their profile says, or that changes under them; and a day in their life."""

import hashlib
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from benchmarks.law_tasks import TOLERANCE, gaps, trial_key
from benchmarks.tasks import Result
from engine.protocol import Telemetry
from envs.outcome import FloatArray, Outcome
from envs.simulator import Decide, Plant, Simulation
from envs.slo import Slo
from envs.state import LOG_COLUMNS
from envs.step_time import StepTimeModel
from policies.catalogue import Law, parse_law
from policies.guard import Guard
from policies.policy import Decision, Policy
from profiles.capacity import Load, Trial, is_hopeless, largest_rate, meets, play_law

WINDOW_S, STEP_S = 10.0, 0.5  # "the SLO is kept" is asked of every 10 s, from every half second on
BACK_S = 2.0
PINNED_S, PINNED_SHARE, ROOM = 5.0, 0.9, 0.7
HOURS = 24


class Change(NamedTuple):
    """From a share of the time in which requests arrive, all steps take `slowdown` times as long.

    With `told`, the law begins afresh with that profile: what a law does that knows.
    """

    at: float
    slowdown: float
    told: StepTimeModel | None = None


class Case(NamedTuple):
    """A plant, and the profile that the law is given in its stead."""

    name: str
    plant: Plant
    told: StepTimeModel
    changes: tuple[Change, ...] = ()


class DisturbedTrial(NamedTuple):
    """One law in one case on the requests of one seed, under Guard or without."""

    case: Case
    load: Load
    slo: Slo
    seed: int
    policy: str
    guarded: bool = True

    def key(self) -> str:
        plain = Trial(self.case.plant, self.load, self.slo, self.seed, self.policy)
        told = [self.case.told, *(change.told or self.case.told for change in self.case.changes)]
        digest = hashlib.sha256(msgspec.json.encode([profile.description for profile in told]))
        changes = [(change.at, change.slowdown, change.told is not None) for change in self.case.changes]
        bare = "" if self.guarded else " without Guard"
        return f"{trial_key(plain)} {changes} {digest.hexdigest()[:16]}{bare}"

    def meets_slo(self, rate: float) -> bool:
        simulation, decide = self._begin(rate)
        hopeless = play_law(simulation, decide, lambda: is_hopeless(simulation.outcome(), self.slo, simulation.now_s))
        return not hopeless and meets(simulation.outcome(), self.slo)

    def simulate(self, rate: float) -> Outcome:
        """While requests arrive, with the log."""
        simulation, decide = self._begin(rate, keep_log=True)
        end_s = float(simulation.workload.arrival_s[-1])
        play_law(simulation, decide, lambda: False, end_s)
        return simulation.outcome()

    def phases(self, outcome: Outcome) -> list[tuple[float, float]]:
        """From change to change, in seconds; the start and the last arrival are the outermost."""
        end_s = float(outcome.workload.arrival_s[-1])
        return list(pairwise([0.0, *sorted(change.at * end_s for change in self.case.changes), end_s]))

    def _begin(self, rate: float, keep_log: bool = False) -> tuple[Simulation, Decide]:
        simulation = Simulation(self.case.plant, self.load.at_rate(rate), self.seed, keep_log)
        return simulation, self._decide(simulation)

    def _decide(self, simulation: Simulation) -> Decide:
        end_s = float(simulation.workload.arrival_s[-1])
        to_come = sorted(self.case.changes, reverse=True, key=lambda change: change.at)
        law = self._law(self.case.told)

        def decide(telemetry: Telemetry, now_ns: int) -> Decision | None:
            nonlocal law
            while to_come and simulation.now_s >= to_come[-1].at * end_s:
                change = to_come.pop()
                simulation.slowdown = change.slowdown
                law = self._law(change.told) if change.told is not None else law
            return law.decide(telemetry, now_ns)

        return decide

    def _law(self, told: StepTimeModel) -> "Guard | Bare":
        return (Guard if self.guarded else Bare)(parse_law(self.policy, self.slo, told))


class Bare:
    """A law without Guard: what it says is what the plant does, so it must keep to the bounds by itself."""

    def __init__(self, law: Law) -> None:
        self._make = law.make
        self._policy: Policy | None = None

    def decide(self, telemetry: Telemetry, now_ns: int) -> Decision:
        self._policy = self._policy or self._make(telemetry)
        return self._policy.decide(telemetry)


class DisturbedSearch(NamedTuple):
    """The capacity in a case, searched from `guess` on."""

    trial: DisturbedTrial
    guess: float

    def key(self) -> str:
        return f"capacity {TOLERANCE} {self.trial.key()}"

    def do(self) -> Result:
        return {"capacity": largest_rate(self.trial.meets_slo, self.guess, TOLERANCE)}


class Settled(NamedTuple):
    """The worst 10 s of a law at one rate, by its P99 TBT; those that begin within `BACK_S` of a change do not count.

    Chance: what the SLO's quantile permits is not spread evenly over a run.
    """

    trial: DisturbedTrial
    rate: float

    def key(self) -> str:
        return f"settled {self.rate!r} {self.trial.key()}"

    def do(self) -> Result:
        outcome = self.trial.simulate(self.rate)
        settled = [windows_s(*gaps(outcome), *phase)[round(BACK_S / STEP_S) :] for phase in self.trial.phases(outcome)]
        return {"worst_s": max(float(np.max(windows, initial=0.0)) for windows in settled)}


class Recovery(NamedTuple):
    """One run in a case at one rate: how soon after a change (the start is one) is the SLO back, and for good?

    `back_s`: the first time after a change from which on P99 TBT until the next change is within the SLO, and over the
    first 10 s of that within `chance_s` at least; the longest of all changes. `tail`: P99 TBT from `BACK_S` after a
    change until the next, in shares of the SLO, the worst. `pinned`: 1 if the law ended at its lowest budget while the
    SLO had room, or at its highest while that was broken.
    """

    trial: DisturbedTrial
    rate: float
    chance_s: float  # what 10 s of a law that knows are now and then; the SLO if that is more

    def key(self) -> str:
        return f"recovery {self.rate!r} {self.chance_s!r} {self.trial.key()}"

    def do(self) -> Result:
        slo_s = self.trial.slo.tbt_s
        assert slo_s is not None
        outcome = self.trial.simulate(self.rate)
        at_s, tbt_s = gaps(outcome)
        phases = self.trial.phases(outcome)
        return {
            "back_s": max(back_after_s(at_s, tbt_s, *phase, slo_s, max(slo_s, self.chance_s)) for phase in phases),
            "tail": max(p99_s(at_s, tbt_s, start_s + BACK_S, end_s) for start_s, end_s in phases) / slo_s,
            "pinned": float(pinned(outcome, slo_s, self.trial.case.plant)),
        }


class Soak(NamedTuple):
    """A law through a day at one rate, told hour by hour: each hour is a 24th of the time in which requests arrive.

    Without requests' own times: the tokens of a day are too many to look at in the end.
    """

    trial: Trial
    rate: float

    def key(self) -> str:
        return f"soak {self.rate!r} {trial_key(self.trial)}"

    def do(self) -> Result:
        t = self.trial
        slo_s = t.slo.tbt_s
        assert slo_s is not None
        simulation = Simulation(t.plant, t.load.at_rate(self.rate), t.seed)
        hours = Hours(
            slo_s,
            float(simulation.workload.arrival_s[-1]) / HOURS,
            Guard(parse_law(t.policy, t.slo, t.plant.step_time)).decide,
        )
        simulation.run_law(hours.decide)
        return hours.result() | {"iterations": float(simulation.iteration), "finished": float(simulation.done)}


class Hours:
    """Sums over the hours of a run, taken from telemetry as it passes to the law."""

    NAMES = ("tokens", "late", "mixed", "budget", "overruled", "starved")

    def __init__(self, slo_s: float, hour_s: float, law: Decide) -> None:
        self._slo_s = slo_s
        self._hour_ns = hour_s * 1e9
        self._law = law
        self._sums = [[0] * len(self.NAMES) for _ in range(HOURS)]

    def decide(self, telemetry: Telemetry, now_ns: int) -> tuple[int, int, str] | None:
        """`mixed`: batches of decodes and prompts, `budget` their budgets in sum; `starved` of them had the least."""
        sums = self._sums[min(int(now_ns / self._hour_ns), HOURS - 1)]
        for completion in telemetry.completed:
            sums[0] += len(completion.tbt_s)
            if max(completion.tbt_s, default=0.0) > self._slo_s:
                sums[1] += sum(tbt_s > self._slo_s for tbt_s in completion.tbt_s)
        batch, budget = telemetry.batch, telemetry.knobs.budget_tokens
        if batch.decode_tokens and batch.prefill_tokens:
            sums[2] += 1
            sums[3] += budget
            sums[5] += budget <= telemetry.bounds.min_budget_tokens and telemetry.queue.waiting_requests > 0
        answer = self._law(telemetry, now_ns)
        sums[4] += answer is not None and "overruled" in answer[2]
        return answer

    def result(self) -> Result:
        return {
            f"{name} {hour}": float(n)
            for hour, sums in enumerate(self._sums)
            for name, n in zip(self.NAMES, sums, strict=True)
        }


def windows_s(at_s: FloatArray, tbt_s: FloatArray, start_s: float, end_s: float) -> FloatArray:
    """P99 TBT of every `WINDOW_S` (of half the phase, if that is less) that begins `STEP_S` after the one before.

    `at_s` need not be sorted. A window without tokens counts as 0.
    """
    order = np.argsort(at_s)
    at_s, tbt_s = at_s[order], tbt_s[order]
    window_s = min(WINDOW_S, (end_s - start_s) / 2)
    starts = np.arange(start_s, end_s - window_s + 1e-9, STEP_S)
    rows = zip(np.searchsorted(at_s, starts), np.searchsorted(at_s, starts + window_s), strict=True)
    return np.array([np.quantile(tbt_s[first:last], 0.99) if last > first else 0.0 for first, last in rows])


def back_after_s(
    at_s: FloatArray, tbt_s: FloatArray, start_s: float, end_s: float, slo_s: float, chance_s: float
) -> float:
    """As `Recovery` says, to `STEP_S`; all of the phase if the SLO is not back before its end."""
    for step, first_s in enumerate(windows_s(at_s, tbt_s, start_s, end_s)):
        after_s = step * STEP_S
        if first_s <= chance_s and p99_s(at_s, tbt_s, start_s + after_s, end_s) <= slo_s:
            return after_s
    return end_s - start_s


def p99_s(at_s: FloatArray, tbt_s: FloatArray, start_s: float, end_s: float) -> float:
    """P99 of the gaps that ended in between; 0 without any."""
    inside = tbt_s[(at_s >= start_s) & (at_s < end_s)]
    return float(np.quantile(inside, 0.99)) if len(inside) else 0.0


def pinned(outcome: Outcome, slo_s: float, plant: Plant) -> bool:
    """Over the last seconds of arrivals: nearly all mixed batches at one bound of the budget, and wrongly so."""
    end_s = float(outcome.workload.arrival_s[-1])
    time_s, budget, decodes, waiting = (
        outcome.log[:, LOG_COLUMNS.index(name)]
        for name in ("time_s", "budget_tokens", "decode_tokens", "waiting_requests")
    )
    held = budget[(time_s > end_s - PINNED_S) & (time_s <= end_s) & (decodes > 0) & (waiting > 0)]
    if not len(held):
        return False
    last_s, bounds = p99_s(*gaps(outcome), end_s - PINNED_S, end_s), plant.config.bounds
    low, high = (
        np.mean(held == bound) >= PINNED_SHARE for bound in (bounds.min_budget_tokens, bounds.max_budget_tokens)
    )
    return bool((low and last_s < ROOM * slo_s) or (high and last_s > slo_s))
