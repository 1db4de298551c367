"""When requests arrive: generated point processes, each chosen by a short spec (`ARRIVALS_HELP`)."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from envs.workload import FloatArray, require_positive

ARRIVALS_HELP = (
    "poisson:RATE | gamma:RATE,cv=CV | phases:SECONDS:RATE,... | day:MEAN_RATE,peak=RATIO[,seconds=LENGTH] | "
    "trace[:scale=FACTOR] (req/s)"
)
DAY_S = 86_400.0


def generated_arrivals(spec: str, n_requests: int | None, rng: Generator) -> FloatArray:
    """Arrivals in seconds from 0 on, as `ARRIVALS_HELP` says; "phases" and "day" fix their number themselves.

    Raises ValueError with the spec and the remedy.
    """
    kind, _, options = spec.partition(":")
    try:
        if kind in ("phases", "day"):
            if n_requests is not None:
                raise ValueError(f"{kind!r} fixes the number of requests; leave out n_requests {n_requests}")
            return _phases(rng, options) if kind == "phases" else _day(rng, options)
        if kind not in ("poisson", "gamma"):
            raise ValueError(f"unknown kind {kind!r}")
        if n_requests is None:
            raise ValueError("n_requests is missing")
        if kind == "poisson":
            return gamma_arrivals(rng, n_requests, float(options))
        rate, _, option = options.partition(",")
        return gamma_arrivals(rng, n_requests, float(rate), named_number(option, "cv"))
    except ValueError as error:
        raise ValueError(f"arrivals {spec!r}: {error}; write {ARRIVALS_HELP}") from error


def gamma_arrivals(rng: Generator, n: int, rate_per_s: float, cv: float = 1.0) -> FloatArray:
    """n arrivals from 0 on with gamma gaps of mean 1 / rate and coefficient of variation `cv`; cv 1 is Poisson.

    vLLM's `--burstiness` is 1 / cv^2 (the gamma shape): cv 2 is burstiness 0.25.
    """
    require_positive("rate_per_s", rate_per_s)
    require_positive("cv", cv)
    gaps_s = rng.gamma(shape=1 / cv**2, scale=cv**2 / rate_per_s, size=n - 1)
    return np.concatenate(([0.0], np.cumsum(gaps_s)))


def phase_arrivals(rng: Generator, phases: Sequence[tuple[float, float]]) -> FloatArray:
    """Poisson arrivals within each phase (seconds, requests per second), phase after phase; rate 0 is a pause."""
    parts, start_s = [], 0.0
    for duration_s, rate_per_s in phases:
        require_positive("phase seconds", duration_s)
        if not 0 <= rate_per_s < np.inf:
            raise ValueError(f"phase rate is {rate_per_s}; it must be a finite number, 0 or more")
        # Given their number, the arrivals of a Poisson process are uniform over the phase.
        count = rng.poisson(rate_per_s * duration_s)
        parts.append(start_s + np.sort(rng.uniform(0.0, duration_s, count)))
        start_s += duration_s
    return _some(np.concatenate(parts), "any phase; lengthen the phases or raise the rates")


def day_arrivals(rng: Generator, mean_rate_per_s: float, peak_ratio: float, day_s: float = DAY_S) -> FloatArray:
    """Poisson arrivals over one day whose rate is mean * (1 - (peak_ratio - 1) * cos(2 pi t / day_s)).

    The day starts at its quietest moment and peaks in its middle, at `peak_ratio` (1 to 2) times the mean. A shorter
    `day_s` compresses the day: the rates stay, the curve is passed through faster. Drawn by thinning a Poisson process
    of the peak rate (Lewis and Shedler, 1979).
    """
    require_positive("mean rate", mean_rate_per_s)
    require_positive("seconds", day_s)
    if not 1 <= peak_ratio <= 2:
        raise ValueError(f"peak is {peak_ratio}; it must be 1 to 2 times the mean rate (at 2 the night is silent)")
    candidates_s = np.sort(rng.uniform(0.0, day_s, rng.poisson(mean_rate_per_s * peak_ratio * day_s)))
    share_of_peak = (1 - (peak_ratio - 1) * np.cos(2 * np.pi * candidates_s / day_s)) / peak_ratio
    kept = rng.uniform(size=len(candidates_s)) < share_of_peak
    return _some(candidates_s[kept], "the day; lengthen it or raise the rate")


def named_number(text: str, name: str) -> float:
    """The number in `name=NUMBER`."""
    word, _, number = text.partition("=")
    if word != name:
        raise ValueError(f"{text!r} where {name}=NUMBER belongs")
    return float(number)


def _phases(rng: Generator, options: str) -> FloatArray:
    pairs = [phase.split(":") for phase in options.split(",")]
    return phase_arrivals(rng, [(float(seconds), float(rate)) for seconds, rate in pairs])


def _day(rng: Generator, options: str) -> FloatArray:
    rate, *rest = options.split(",")
    if len(rest) not in (1, 2):
        raise ValueError(f"{options!r} where MEAN_RATE,peak=RATIO belongs")
    day_s = named_number(rest[1], "seconds") if len(rest) == 2 else DAY_S
    return day_arrivals(rng, float(rate), named_number(rest[0], "peak"), day_s)


def _some(arrival_s: FloatArray, where: str) -> FloatArray:
    if not arrival_s.size:
        raise ValueError(f"no request arrived in {where}")
    return arrival_s
