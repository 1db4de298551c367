"""Capacity: the most requests per second that meet the SLO, for any policy, by simulation.

A run meets it if all requests finish, the median scheduling delay is at most `MAX_DELAY_S`, and every bound of the SLO
holds at its quantile: TBT over all tokens, the others over all requests (a deadline: the share of a
request's tokens that was late, over all requests). The requests of a seed, the order of their arrivals and the noise
are the same for every policy and rate; a rate only stretches the arrivals in time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.protocol import Telemetry
from envs.arrivals import named_number
from envs.outcome import FloatArray, Outcome
from envs.simulator import Decide, Plant, Simulation
from envs.slo import Slo, within
from envs.trace import Workload
from envs.workload import require_positive
from policies.catalogue import parse_law
from policies.guard import Guard

MAX_DELAY_S = 2.0
TOLERANCE = 0.02
CLAIRVOYANT = "clairvoyant"
CLAIRVOYANT_SPARE = 0.15  # of the misses that the SLO permits, so that chance does not break it
WIDEST = 2.0**12  # a rate so far from the first guess is no capacity
ROUGH_BUDGET = 512
CONFIDENCE = 0.95


class PolicySpec(NamedTuple):
    """A policy as it is written, LAW or LAW@SCHEDULE: a law of the catalogue, or `clairvoyant`.

    `clairvoyant:share=0.91` keeps the true mean time of a step within 0.91 of the TBT SLO. Without a share, it is the
    one at which the step's noise breaks the SLO a little less often than its quantile permits: 0.91 for 4 % noise.
    """

    law: str
    schedule: str

    @classmethod
    def parse(cls, text: str) -> "PolicySpec":
        law, _, schedule = text.partition("@")
        return cls(law, schedule)

    @property
    def clairvoyant(self) -> bool:
        return self.law.partition(":")[0] == CLAIRVOYANT

    def check(self, plant: Plant, slo: Slo) -> None:
        """Raises ValueError if this policy cannot run there, with the remedy."""
        self.adapt(plant)
        if self.clairvoyant:
            self.limit_s(plant, slo)
        else:
            parse_law(self.law, slo, plant.step_time)

    def limit_s(self, plant: Plant, slo: Slo) -> float:
        """Mean time of a step that clairvoyance keeps within."""
        if slo.tbt_s is None:
            raise ValueError(f"policy {CLAIRVOYANT!r} needs a bound on TBT: add tbt:MILLISECONDS to --slo")
        options = self.law.partition(":")[2]
        if not options:
            quantile = 1 - (1 - CLAIRVOYANT_SPARE) * (1 - slo.quantile)
            return slo.tbt_s / plant.step_time.factor(quantile, mixed=True)  # other steps it cannot shorten
        share = named_number(options, "share")
        require_positive("share", share)
        return share * slo.tbt_s

    def adapt(self, plant: Plant) -> Plant:
        """The plant under this schedule. One that runs whole prompts gets buffers for the longest."""
        if not self.schedule:
            return plant
        if self.clairvoyant and self.schedule != "stall-free":
            raise ValueError(
                f"policy {self.law}@{self.schedule}: {CLAIRVOYANT} is a bound for stall-free batching only"
            )
        config = plant.config
        chunks = self.schedule in ("stall-free", "chunks-only")
        most = config.max_budget_tokens if chunks else max(config.max_budget_tokens, config.max_model_tokens)
        schedule: Any = self.schedule  # EngineConfig checks it
        return replace(plant, config=replace(config, schedule=schedule, max_budget_tokens=most))


class NeverLoaded(ValueError):
    """A workload that ends before the server is loaded, at any rate."""


class Load(Protocol):
    """The requests of one seed at any rate: a `Workload`, which is stretched in time, or what changes otherwise."""

    def at_rate(self, rate: float) -> Workload: ...


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy on the requests of one seed, which arrive at any rate that is asked for."""

    plant: Plant
    load: Load
    slo: Slo
    seed: int
    policy: str

    def simulate(self, rate: float, until_s: float = np.inf, keep_log: bool = False) -> Outcome:
        """What happens at `rate` requests per second until all have ended, or until `until_s`."""
        simulation = self._begin(rate, keep_log)
        self._play(simulation, lambda: simulation.now_s >= until_s, until_s)
        return simulation.outcome()

    def meets_slo(self, rate: float) -> bool:
        """The verdict on the whole run. A run that cannot meet the SLO any more ends early, with the same verdict."""
        simulation = self._begin(rate, False)
        hopeless = self._play(simulation, lambda: is_hopeless(simulation.outcome(), self.slo, simulation.now_s))
        return not hopeless and meets(simulation.outcome(), self.slo)

    def capacity(self, guess: float | None = None, tolerance: float = TOLERANCE) -> float:
        """The largest rate found to meet the SLO, req/s; one larger by `tolerance` misses it. 0 if none meets it."""
        return largest_rate(self.meets_slo, guess or rough_capacity(self.plant, self.load.at_rate(1.0)), tolerance)

    def _begin(self, rate: float, keep_log: bool) -> Simulation:
        plant = PolicySpec.parse(self.policy).adapt(self.plant)
        return Simulation(plant, self.load.at_rate(rate), self.seed, keep_log)

    def _play(self, simulation: Simulation, give_up: Callable[[], bool], until_s: float = np.inf) -> bool:
        """Run until all requests have ended or, asked now and then, `give_up` says so. Returns whether it did."""
        spec = PolicySpec.parse(self.policy)
        law = spec.law
        if spec.clairvoyant:
            limit_s = spec.limit_s(self.plant, self.slo)
            return _play_compiled(
                simulation, lambda end_s: simulation.run_clairvoyant(limit_s, end_s), give_up, until_s
            )
        guard = Guard(parse_law(law, self.slo, self.plant.step_time))
        if law.partition(":")[0] == "static":  # it always answers the same, so it is asked once
            knobs = guard.decide(simulation.telemetry(), 0)
            assert knobs is not None
            budget, chunk, _ = knobs
            return _play_compiled(
                simulation, lambda end_s: simulation.run_static(budget, chunk, end_s), give_up, until_s
            )
        return play_law(simulation, guard.decide, give_up, until_s)


def is_hopeless(outcome: Outcome, slo: Slo, now_s: float) -> bool:
    """Whether a run, cut off at `now_s`, cannot meet the SLO any more, whatever is still to come.

    What came late stays late, and what has not come cannot come before now; all that is judged only grows with it.
    """
    return not meets(outcome.at_best(now_s), slo)


def meets(outcome: Outcome, slo: Slo) -> bool:
    """Whether the run met the SLO, by the rule above."""
    if not outcome.finished.all() or np.median(outcome.scheduling_delay_s) > MAX_DELAY_S:
        return False
    tpot_s = outcome.tpot_s
    bounds: list[tuple[float | None, FloatArray]] = [
        (slo.tbt_s, outcome.tbt_s),
        (slo.ttft_s, outcome.ttft_s),
        (slo.tpot_s, tpot_s[~np.isnan(tpot_s)]),
        (slo.e2el_s, outcome.e2el_s),
    ]
    if slo.deadline_s is not None:
        bounds.append((slo.late_share, outcome.late_shares(slo)))
    return all(bound is None or within(values, bound, slo.quantile) for bound, values in bounds)


def largest_rate(meets_slo: Callable[[float], bool], guess: float, tolerance: float = TOLERANCE) -> float:
    """The largest rate of the ladder (1 + tolerance)^k that meets the SLO, if all below it do; 0 if none does.

    From the guess on the steps double, up to half an octave, until one rate meets it and another does not; then the gap
    between them is halved. The guess sets how long it takes, not what comes out. Raises NeverLoaded if every rate meets
    it.
    """
    rung = math.log1p(tolerance)
    start, longest, widest = (round(math.log(x) / rung) for x in (guess, math.sqrt(2), WIDEST))

    def good(k: int) -> bool:
        return meets_slo(math.exp(k * rung))

    fits = misses = start
    step = 4
    if good(start):
        while good(misses := fits + step):
            fits, step = misses, min(2 * step, longest)
            if fits > start + widest:
                raise NeverLoaded(
                    f"the SLO is met at {math.exp(fits * rung):.3g} req/s and beyond: the workload ends before the "
                    "server is loaded; ask for more requests"
                )
    else:
        while not good(fits := misses - step):
            misses, step = fits, min(2 * step, longest)
            if misses < start - widest:
                return 0.0
    while misses - fits > 1:
        middle = (fits + misses) // 2
        fits, misses = (middle, misses) if good(middle) else (fits, middle)
    return math.exp(fits * rung)


def rough_capacity(plant: Plant, workload: Workload) -> float:
    """Requests per second if all tokens were computed in batches of `ROUGH_BUDGET`: a guess to start from."""
    step_s = plant.step_time.mean_s(0, 0, 1, ROUGH_BUDGET, 0.0)
    tokens = float((workload.prompt_tokens + workload.output_tokens).mean())
    return ROUGH_BUDGET / (step_s * tokens)


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its Student t interval at 95 % (NaN of a single seed)."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), math.nan)
        from scipy.stats import t as student  # noqa: PLC0415  (half a second, that other commands need not wait)

        factor = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1))
        return cls(float(np.mean(values)), factor * float(np.std(values, ddof=1)) / math.sqrt(n))


def _pause_s(simulation: Simulation, parts: int) -> float:
    """Simulated time between two questions whether to give up: so many while requests arrive, as fast as that is."""
    arrival_s = simulation.workload.arrival_s
    return max(float(arrival_s[-1] - arrival_s[0]) / parts, MAX_DELAY_S)


def _play_compiled(
    simulation: Simulation, run: Callable[[float], None], give_up: Callable[[], bool], until_s: float
) -> bool:
    """A run is a row of iterations, wherever it is cut: parts of it in turn are the same run."""
    pause_s = _pause_s(simulation, 4)
    for part in count(1):
        run(min(part * pause_s, until_s))
        if simulation.done:
            return False
        if give_up():
            return True
    raise AssertionError("count() does not end")


class _GivenUp(Exception):
    pass


def play_law(simulation: Simulation, law: Decide, give_up: Callable[[], bool], until_s: float = np.inf) -> bool:
    """Run until all requests have ended or, asked now and then, `give_up` says so. Returns whether it did.

    A law's run cannot be cut in parts (answers are under way), so it is left from within.
    """
    pause_s = _pause_s(simulation, 16)
    next_s = pause_s

    def decide(telemetry: Telemetry, now_ns: int) -> tuple[int, int, str] | None:
        nonlocal next_s
        if simulation.now_s >= next_s:
            next_s += pause_s
            if give_up():
                raise _GivenUp
        return law(telemetry, now_ns)

    try:
        simulation.run_law(decide, until_s)
    except _GivenUp:
        return True
    return not simulation.done
