"""Measured iterations: what each computed and how long it took. A step-time model is fitted to them and judged on them.

Time stamps need care. Under asynchronous scheduling the completion of an iteration is noticed late when the next one
is slow to launch: a prompt's launch delays the stamp of the iteration before it, whose interval grows by what its own
then lacks. Nothing is lost, so sums are right where single rows are not. `stretches` therefore joins the rows between
two stamps that can be trusted. It looks at what the iterations computed, never at how long they took.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

COMPOSITION = (
    "decode_tokens",
    "decode_context_tokens",
    "prefill_requests",
    "prefill_tokens",
    "prefill_attention_tokens2",
)
LONGEST_STRETCH = 32


@dataclass(frozen=True, slots=True, eq=False)
class Iterations:
    """Iterations in order of time: float64 arrays of one length; the columns of `engine.protocol.BatchComposition`.

    `seconds` is how long each took, NaN where that is unknown. `run` (int64) tells recordings apart: rows of two runs
    are no neighbours, and held-out errors leave out whole runs if there are enough. `intervals` says that the seconds
    are differences of completion stamps that may be late; False, that every row's time is its own (device events, or
    the intervals of an engine that waits for each batch). Raises ValueError naming the row (counted from 0).
    """

    seconds: FloatArray
    decode_tokens: FloatArray
    decode_context_tokens: FloatArray
    prefill_requests: FloatArray
    prefill_tokens: FloatArray
    prefill_attention_tokens2: FloatArray
    run: IntArray | None = None
    intervals: bool = True

    def __post_init__(self) -> None:
        for name in ("seconds", *COMPOSITION):
            column = np.asarray(getattr(self, name), np.float64)
            if column.shape != np.shape(self.seconds) or column.ndim != 1:
                raise ValueError(f"{name} has shape {column.shape}: give a number for each of the {len(self)} rows")
            bad = (column <= 0) | np.isinf(column) if name == "seconds" else ~(np.isfinite(column) & (column >= 0))
            if bad.any():
                row = int(np.argmax(bad))
                raise ValueError(f"{name} in row {row} is {column[row]}: give a duration above 0, or counts of tokens")
            object.__setattr__(self, name, column)
        empty = self.decode_tokens + self.prefill_tokens == 0
        if empty.any():
            raise ValueError(f"row {int(np.argmax(empty))} computed no token: leave idle iterations out")
        run = np.zeros(len(self), np.int64) if self.run is None else np.asarray(self.run, np.int64)
        if run.shape != self.seconds.shape:
            raise ValueError(f"run has shape {run.shape}: give a number for each of the {len(self)} rows")
        object.__setattr__(self, "run", run)

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def runs(self) -> IntArray:
        """The run of every row."""
        assert self.run is not None
        return self.run

    @property
    def mixed(self) -> BoolArray:
        """Whether an iteration computes prompt tokens, shape [rows]; the others are decode-only."""
        return self.prefill_tokens > 0

    def rows(self, chosen: BoolArray) -> "Iterations":
        """The chosen rows (bool, shape [rows])."""
        columns = {name: getattr(self, name)[chosen] for name in ("seconds", *COMPOSITION, "run")}
        return Iterations(**columns, intervals=self.intervals)

    @classmethod
    def concatenate(cls, parts: Sequence["Iterations"]) -> "Iterations":
        """All parts in turn, their runs numbered anew. Raises ValueError if they were not timed in the same way."""
        if len({part.intervals for part in parts}) != 1:
            raise ValueError("give at least one recording, all with intervals or all with device times")
        names = [field.name for field in fields(cls) if field.name not in ("run", "intervals")]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        runs, first = [], 0
        for part in parts:
            numbers = np.unique(part.runs, return_inverse=True)[1]
            runs.append(numbers + first)
            first += int(numbers.max(initial=-1)) + 1
        return cls(**columns, run=np.concatenate(runs), intervals=parts[0].intervals)

    @classmethod
    def from_table(cls, table: pa.Table, seconds: str = "interval_s") -> "Iterations":
        """From a table with the composition's columns and `seconds`, such as `profiles.iterations` makes of a journal.

        `seconds` is "interval_s" (between two completions) or "device_s" (the device's own time). An interval is
        unknown where it is null or 0 (two completions, one stamp), in the first row of a run, and after idling. Our own
        tables, known by their column `iteration`, are null there. In another table, a row is taken for the first after
        idling if no request was being served before: it has no decode, and all its chunks start their prompts
        (W <= tokens^2 / 2). With prefix caching they do not start at 0: such a table needs its nulls. Raises ValueError
        naming a column that is missing.
        """
        if not table.num_rows:
            raise ValueError("no iteration in it: was anything served while it was recorded?")
        missing = [name for name in (seconds, *COMPOSITION) if name not in table.column_names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}; give a table of iterations (see profiles/iterations.py)")
        columns = {name: table[name].to_numpy().astype(np.float64) for name in (seconds, *COMPOSITION)}
        took_s = columns.pop(seconds)
        run = np.zeros(table.num_rows, np.int64)
        if "engine_id" in table.column_names:
            engine_ids = table["engine_id"].to_numpy(zero_copy_only=False).astype(str)
            run = np.cumsum(np.r_[False, engine_ids[1:] != engine_ids[:-1]])
        if seconds != "device_s":
            unknown = (took_s == 0) | (np.diff(run, prepend=-1) != 0)
            if "iteration" not in table.column_names:
                prefill, attention = columns["prefill_tokens"], columns["prefill_attention_tokens2"]
                unknown |= (columns["decode_tokens"] == 0) & (attention <= prefill**2 / 2)
            took_s = np.where(unknown, np.nan, took_s)
        return cls(seconds=took_s, **columns, run=run, intervals=seconds != "device_s")


def load_iterations(path: Path, seconds: str = "interval_s") -> Iterations:
    """The iterations of a Parquet or CSV file (`.csv`, `.csv.gz`), see `Iterations.from_table`, or of Dynamo's metrics
    (`.jsonl`, `.jsonl.gz`), see `envs.forward_passes`; "interval_s" alone is in these.

    Raises ValueError naming the file.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        if seconds != "interval_s":
            raise ValueError(f"{path} has no {seconds}: leave it out, these files give one time only")
        from envs.forward_passes import read_forward_passes  # noqa: PLC0415  (it makes what is defined here)

        return read_forward_passes(path)
    try:
        parquet = path.suffix == ".parquet"
        return Iterations.from_table(pa.parquet.read_table(path) if parquet else pa.csv.read_csv(path), seconds)
    except (ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: {error}") from error


class Stretches(NamedTuple):
    """Sums over the rows between two trusted stamps. `of_row` has shape [rows], the others [stretches]."""

    of_row: IntArray
    seconds: FloatArray  # NaN if a row's is unknown
    rows: IntArray
    mixed: BoolArray  # holds an iteration with prompt tokens

    def sums(self, values: FloatArray) -> FloatArray:
        """Sum of a value of every row over each stretch, shape [stretches]."""
        return np.bincount(self.of_row, values, len(self.rows)).astype(np.float64)


def stretches(iterations: Iterations) -> Stretches:
    """Join what lies between two trusted stamps; rows timed by themselves stay alone.

    A stamp is trusted if its iteration and the next one are both decode-only. A stretch is cut after
    `LONGEST_STRETCH` rows all the same: there a late stamp weighs little, and a long burst stays more than one sum.
    An iteration after an unknown interval joins it, for its own stamp's predecessor is in doubt.
    """
    mixed, runs = iterations.mixed, iterations.runs
    unknown = np.isnan(iterations.seconds)
    apart = np.ones(len(iterations), np.bool_)
    if iterations.intervals:
        apart[1:] = ~(mixed[1:] | mixed[:-1] | unknown[:-1]) | unknown[1:] | (runs[1:] != runs[:-1])
    first = np.flatnonzero(apart)
    since_first = np.arange(len(apart)) - np.repeat(first, np.diff(np.r_[first, len(apart)]))
    of_row = np.cumsum(since_first % LONGEST_STRETCH == 0) - 1
    count = np.bincount(of_row)
    seconds = np.bincount(of_row, iterations.seconds).astype(np.float64)
    return Stretches(of_row, seconds, count, np.bincount(of_row, mixed) > 0)
