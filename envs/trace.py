"""Workloads: who asks when for how much. Read from a file, or generated from distributions and a seeded generator.

A workload is arrival times and (prompt, output) lengths in tokens. Each half is chosen by a short spec, see
`make_workload`. A new trace format is one function `(path) -> Workload | Lengths`, entered in `READERS`.
"""

import csv
import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Sampler = Callable[[Generator, int], IntArray]

ARRIVALS_HELP = "poisson:RATE | gamma:RATE,cv=CV | phases:SECONDS:RATE,... | trace | trace:scale=FACTOR (req/s)"
LENGTHS_HELP = (
    "fixed:PROMPT,OUTPUT | uniform:LOW-HIGH,LOW-HIGH | lognormal:MEDIAN/SIGMA/MAX,MEDIAN/SIGMA/MAX | csv:PATH (tokens)"
)
CSV_HEADER = ["arrival_s", "prompt_tokens", "output_tokens"]
_UNLIMITED = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Request lengths without arrivals: read-only int64 arrays of one length, every entry at least 1.

    Raises ValueError naming the row (counted from 0).
    """

    prompt_tokens: IntArray
    output_tokens: IntArray

    def __post_init__(self) -> None:
        _freeze_lengths(self)

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in order of arrival: read-only arrays of one length, at least one row.

    `arrival_s` is float64 seconds from the start of the replay, not decreasing; the token counts are int64, at least 1.
    `rejected_requests` counts what was left out as too long while the workload was made. Raises ValueError naming the
    row (counted from 0).
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    rejected_requests: int = 0

    def __post_init__(self) -> None:
        _freeze_lengths(self)
        arrival_s = np.array(self.arrival_s, dtype=np.float64)
        if arrival_s.shape != self.prompt_tokens.shape:
            raise ValueError(f"{arrival_s.shape} arrivals for {len(self)} requests; give one arrival_s for each")
        for row in np.flatnonzero(~(np.isfinite(arrival_s) & (arrival_s >= 0)))[:1]:
            raise ValueError(f"row {row}: arrival_s is {arrival_s[row]}; it must be a finite number, 0 or more")
        for row in np.flatnonzero(np.diff(arrival_s) < 0)[:1] + 1:
            raise ValueError(f"row {row}: arrival_s {arrival_s[row]} is before the row above; sort by arrival_s")
        arrival_s.flags.writeable = False
        object.__setattr__(self, "arrival_s", arrival_s)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def fitting(self, max_model_tokens: int) -> "Workload":
        """Without the requests whose prompt + output exceed `max_model_tokens`; these add to `rejected_requests`."""
        fits = self.prompt_tokens + self.output_tokens <= max_model_tokens
        if not fits.any():
            raise ValueError(f"no request fits max_model_tokens {max_model_tokens}: raise it, or take shorter requests")
        rejected = self.rejected_requests + int(len(self) - fits.sum())
        return Workload(self.arrival_s[fits], self.prompt_tokens[fits], self.output_tokens[fits], rejected)

    def at_scale(self, factor: float) -> "Workload":
        """The same requests from time 0 on, arriving `factor` times as fast."""
        _require_positive("rate scale", factor)
        arrival_s = (self.arrival_s - self.arrival_s[0]) / factor
        return Workload(arrival_s, self.prompt_tokens, self.output_tokens, self.rejected_requests)


@dataclass(frozen=True, slots=True)
class LengthSource:
    """Samples pairs of lengths, int64 [2, n] (prompts, outputs); pairs beyond a limit are to be drawn again."""

    sample: Sampler
    max_prompt_tokens: int = _UNLIMITED
    max_output_tokens: int = _UNLIMITED

    def draw(self, n: int, rng: Generator, max_model_tokens: int | None = None) -> tuple[Lengths, int]:
        """n pairs within the limits (prompt + output at most `max_model_tokens`), and how many draws were rejected."""
        limit = _UNLIMITED if max_model_tokens is None else max_model_tokens
        parts: list[IntArray] = []
        kept = rejected = 0
        while kept < n:
            pairs = self.sample(rng, max(n, 1000))
            fits = (pairs[0] <= self.max_prompt_tokens) & (pairs[1] <= self.max_output_tokens)
            fits &= pairs.sum(axis=0) <= limit
            rows = np.flatnonzero(fits)[: n - kept]
            if not rows.size:
                raise ValueError(f"no draw of {len(fits)} is within max_model_tokens {limit} and the spec's own MAX")
            parts.append(pairs[:, rows])
            kept += len(rows)
            drawn = int(rows[-1]) + 1 if kept == n else len(fits)
            rejected += drawn - len(rows)
        return Lengths(*np.concatenate(parts, axis=1)), rejected


def make_workload(
    arrivals: str, lengths: str, rng: Generator, n_requests: int | None = None, max_model_tokens: int | None = None
) -> Workload:
    """A workload from two specs (`ARRIVALS_HELP`, `LENGTHS_HELP`); the same specs and seed give the same bytes.

    "trace" replays the rows of the lengths' file in order, the first `n_requests` of them, at its own arrivals times
    `scale`. "phases" fix the number of requests themselves. All others need `n_requests`, and draw lengths (from a
    file: rows with replacement). Requests of prompt + output > `max_model_tokens` are left out ("trace") or drawn
    again, and counted in `rejected_requests`. Raises ValueError with the spec and the remedy.
    """
    if n_requests is not None and n_requests < 1:
        raise ValueError(f"n_requests is {n_requests}; it must be at least 1")
    kind, _, options = arrivals.partition(":")
    if kind == "trace":
        recorded = _recorded(lengths)
        if isinstance(recorded, Lengths):
            raise ValueError(f"arrivals 'trace': {lengths!r} has lengths only; generate arrivals: {ARRIVALS_HELP}")
        rows = slice(n_requests)
        workload = Workload(recorded.arrival_s[rows], recorded.prompt_tokens[rows], recorded.output_tokens[rows])
        workload = workload.at_scale(_option(options, "scale") if options else 1.0)
        return workload if max_model_tokens is None else workload.fitting(max_model_tokens)
    arrival_s = _generated_arrivals(arrivals, n_requests, rng)
    drawn, rejected = length_source(lengths).draw(len(arrival_s), rng, max_model_tokens)
    return Workload(arrival_s, drawn.prompt_tokens, drawn.output_tokens, rejected)


def gamma_arrivals(rng: Generator, n: int, rate_per_s: float, cv: float = 1.0) -> FloatArray:
    """n arrivals from 0 on with gamma gaps of mean 1 / rate and coefficient of variation `cv`; cv 1 is Poisson.

    vLLM's `--burstiness` is 1 / cv^2 (the gamma shape): cv 2 is burstiness 0.25.
    """
    _require_positive("rate_per_s", rate_per_s)
    _require_positive("cv", cv)
    gaps_s = rng.gamma(shape=1 / cv**2, scale=cv**2 / rate_per_s, size=n - 1)
    return np.concatenate(([0.0], np.cumsum(gaps_s)))


def phase_arrivals(rng: Generator, phases: Sequence[tuple[float, float]]) -> FloatArray:
    """Poisson arrivals within each phase (seconds, requests per second), phase after phase; rate 0 is a pause."""
    parts, start_s = [], 0.0
    for duration_s, rate_per_s in phases:
        _require_positive("phase seconds", duration_s)
        if not 0 <= rate_per_s < np.inf:
            raise ValueError(f"phase rate is {rate_per_s}; it must be a finite number, 0 or more")
        # Given their number, the arrivals of a Poisson process are uniform over the phase.
        count = rng.poisson(rate_per_s * duration_s)
        parts.append(start_s + np.sort(rng.uniform(0.0, duration_s, count)))
        start_s += duration_s
    arrival_s = np.concatenate(parts)
    if not arrival_s.size:
        raise ValueError("no request arrived in any phase; lengthen the phases or raise the rates")
    return arrival_s


def length_source(spec: str) -> LengthSource:
    """What a lengths spec (`LENGTHS_HELP`) draws from. Raises ValueError with the spec and the remedy."""
    kind, _, options = spec.partition(":")
    if kind in READERS:
        pool = _recorded(spec)
        pairs = np.stack([pool.prompt_tokens, pool.output_tokens])
        return LengthSource(lambda rng, n: pairs[:, rng.integers(len(pool), size=n)])
    try:
        first, second = options.split(",")
        (prompt, max_prompt), (output, max_output) = _distribution(kind, first), _distribution(kind, second)
    except ValueError as error:
        raise ValueError(f"lengths {spec!r}: {error}; write {LENGTHS_HELP}") from error
    return LengthSource(lambda rng, n: np.stack([prompt(rng, n), output(rng, n)]), max_prompt, max_output)


def read_csv(path: Path) -> Workload | Lengths:
    """A CSV file `arrival_s,prompt_tokens,output_tokens`, plain or gzipped; `Lengths` if every arrival is empty.

    Raises ValueError naming the file and the line.
    """
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw).decode()
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if header != CSV_HEADER:
        raise ValueError(f"{path}: the first line is {','.join(header)!r}; it must be {','.join(CSV_HEADER)!r}")
    arrivals: list[float | None] = []
    lengths: list[tuple[int, int]] = []
    for row in reader:
        try:
            arrival, prompt, output = row
            arrivals.append(float(arrival) if arrival else None)
            lengths.append((int(prompt), int(output)))
        except ValueError as error:
            raise ValueError(f"{path}, line {reader.line_num}: cannot read {','.join(row)!r} ({error})") from error
    prompts, outputs = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    given_s = np.array([arrival for arrival in arrivals if arrival is not None])
    if 0 < len(given_s) < len(arrivals):
        raise ValueError(f"{path}: data row {arrivals.index(None)} has no arrival_s; give it to all rows, or to none")
    try:
        return Workload(given_s, prompts, outputs) if len(given_s) else Lengths(prompts, outputs)
    except ValueError as error:
        raise ValueError(f"{path}, data {error}") from error


def write_csv(path: Path, trace: Workload | Lengths) -> None:
    """Writes what `read_csv` reads back exactly; gzipped if the name ends in .gz."""
    arrivals = [repr(t) for t in trace.arrival_s.tolist()] if isinstance(trace, Workload) else [""] * len(trace)
    rows = zip(arrivals, trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    data = "".join(f"{a},{p},{o}\n" for a, p, o in [tuple(CSV_HEADER), *rows]).encode()
    # The gzip header carries a time; a fixed one keeps equal workloads equal files.
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


READERS: dict[str, Callable[[Path], Workload | Lengths]] = {"csv": read_csv}


def _freeze_lengths(target: Lengths | Workload) -> None:
    for name in ("prompt_tokens", "output_tokens"):
        values = np.array(getattr(target, name))
        if values.ndim != 1 or values.dtype.kind not in "iu" or not values.size:
            raise ValueError(f"{name} has shape {values.shape}, type {values.dtype}; give a flat list of integers")
        for row in np.flatnonzero(values < 1)[:1]:
            raise ValueError(f"row {row}: {name} is {values[row]}; it must be at least 1")
        values = values.astype(np.int64)
        values.flags.writeable = False
        object.__setattr__(target, name, values)
    if target.prompt_tokens.shape != target.output_tokens.shape:
        raise ValueError(f"{len(target.prompt_tokens)} prompts but {len(target.output_tokens)} outputs; give pairs")


def _generated_arrivals(spec: str, n_requests: int | None, rng: Generator) -> FloatArray:
    kind, _, options = spec.partition(":")
    try:
        if kind == "phases":
            if n_requests is not None:
                raise ValueError(f"the phases fix the number of requests; leave out n_requests {n_requests}")
            pairs = [phase.split(":") for phase in options.split(",")]
            return phase_arrivals(rng, [(float(seconds), float(rate)) for seconds, rate in pairs])
        if kind not in ("poisson", "gamma"):
            raise ValueError(f"unknown kind {kind!r}")
        if n_requests is None:
            raise ValueError("n_requests is missing")
        if kind == "poisson":
            return gamma_arrivals(rng, n_requests, float(options))
        rate, _, option = options.partition(",")
        return gamma_arrivals(rng, n_requests, float(rate), _option(option, "cv"))
    except ValueError as error:
        raise ValueError(f"arrivals {spec!r}: {error}; write {ARRIVALS_HELP}") from error


def _recorded(spec: str) -> Workload | Lengths:
    kind, _, path = spec.partition(":")
    if kind not in READERS:
        raise ValueError(f"lengths {spec!r} is not a trace file; write one of {', '.join(READERS)} and :PATH")
    return READERS[kind](Path(path))


def _option(text: str, name: str) -> float:
    word, _, number = text.partition("=")
    if word != name:
        raise ValueError(f"{text!r} where {name}=NUMBER belongs")
    return float(number)


def _distribution(kind: str, text: str) -> tuple[Sampler, int]:
    """One side of a lengths spec: what draws its token counts, and the most tokens that it may have."""
    if kind == "lognormal":
        median, sigma, most = text.split("/")
        return _lognormal(float(median), float(sigma)), int(most)
    if kind not in ("fixed", "uniform"):
        raise ValueError(f"unknown kind {kind!r}")
    low, high = (int(text), int(text)) if kind == "fixed" else map(int, text.split("-"))
    if not 1 <= low <= high:
        raise ValueError(f"{text!r} is not a number of tokens, or a rising range of them, from 1 on")
    return lambda rng, n: rng.integers(low, high, n, endpoint=True), high


def _lognormal(median: float, sigma: float) -> Sampler:
    _require_positive("median", median)
    _require_positive("sigma", sigma)
    # A wild draw is kept within int64; it is beyond any sensible max, and so drawn again.
    return lambda rng, n: np.clip(np.rint(rng.lognormal(np.log(median), sigma, n)), 1, 2**53).astype(np.int64)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise ValueError(f"{name} is {value}; it must be a positive, finite number")
