"""What is asked of a server: request lengths, with their arrivals or without."""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CSV_HEADER = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Request lengths without arrivals: read-only int64 arrays of one length, every entry at least 1.

    `dropped_requests` counts the rows of a file that name no usable request. Raises ValueError naming the row (counted
    from 0).
    """

    prompt_tokens: IntArray
    output_tokens: IntArray
    dropped_requests: int = 0

    def __post_init__(self) -> None:
        _freeze_lengths(self)

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in order of arrival: read-only arrays of one length, at least one row.

    `arrival_s` is float64 seconds from the start of the replay, not decreasing; the token counts are int64, at least 1.
    `rejected_requests` counts what was left out as too long while the workload was made, `dropped_requests` the rows
    of a replayed file that name no usable request (recorded as failed). Raises ValueError naming the row (counted from
    0).
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    rejected_requests: int = 0
    dropped_requests: int = 0

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

    def first(self, n_requests: int | None) -> "Workload":
        """The first `n_requests` of them; None for all."""
        rows = slice(n_requests)
        return self._with(self.arrival_s[rows], self.prompt_tokens[rows], self.output_tokens[rows])

    def fitting(self, max_model_tokens: int) -> "Workload":
        """Without the requests whose prompt + output exceed `max_model_tokens`; these add to `rejected_requests`."""
        fits = self.prompt_tokens + self.output_tokens <= max_model_tokens
        if not fits.any():
            raise ValueError(f"no request fits max_model_tokens {max_model_tokens}: raise it, or take shorter requests")
        rejected = self.rejected_requests + int(len(self) - fits.sum())
        kept = self._with(self.arrival_s[fits], self.prompt_tokens[fits], self.output_tokens[fits])
        return replace(kept, rejected_requests=rejected)

    def at_scale(self, factor: float) -> "Workload":
        """The same requests from time 0 on, arriving `factor` times as fast."""
        require_positive("rate scale", factor)
        arrival_s = (self.arrival_s - self.arrival_s[0]) / factor
        return self._with(arrival_s, self.prompt_tokens, self.output_tokens)

    def at_rate(self, rate: float) -> "Workload":
        """The same requests, their arrivals stretched so that their mean rate is `rate` per second."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        if span_s == 0:
            raise ValueError(f"{len(self)} requests at one moment have no rate: take a workload with arrivals apart")
        return self.at_scale(rate * span_s / (len(self) - 1))

    def _with(self, arrival_s: FloatArray, prompt_tokens: IntArray, output_tokens: IntArray) -> "Workload":
        return replace(self, arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def write_csv(path: Path, trace: Workload | Lengths) -> None:
    """Writes what `read_csv` reads back exactly; gzipped if the name ends in .gz."""
    arrivals = [repr(t) for t in trace.arrival_s.tolist()] if isinstance(trace, Workload) else [""] * len(trace)
    rows = zip(arrivals, trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    data = "".join(f"{a},{p},{o}\n" for a, p, o in [CSV_HEADER, *rows]).encode()
    # The gzip header carries a time; a fixed one keeps equal workloads equal files.
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def require_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a positive, finite number."""
    if not 0 < value < np.inf:
        raise ValueError(f"{name} is {value}; it must be a positive, finite number")


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
