"""`pacer record`: a running engine's requests and iterations, from its telemetry, stored as files.

It subscribes beside any controller and sends nothing. Time is the engine's own: `arrival_s` and `time_s` both count
from the first message heard. The folder then holds

    requests.csv          arrival_s,prompt_tokens,output_tokens of the requests that came and ended meanwhile
    iterations.parquet/   a Parquet data set of part files, columns as in `profiles.iterations`; their metadata has the
                          engine's bounds, as JSON, and the number of its pipeline stages

The requests are in order of arrival; where the recording was killed, in that of their ends, which serves as well.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import zmq
from pyarrow import csv
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.link import ControllerLink, CurveKeys, Endpoints
from engine.protocol import Telemetry
from envs.workload import CSV_HEADER
from profiles.iterations import SCHEMA, IterationRows

TICK_S = 0.5  # how often signals are looked after when no telemetry comes
SILENCE_S = 60.0  # an idle engine speaks several times within that: this one is gone
ROWS_A_PART = 5000
PART_NS = 60_000_000_000
BOUNDS, STAGES = "bounds", "stages"
HEADER = f"{','.join(CSV_HEADER)}\n"


class Recording:
    """What one engine did, on its way to disk: `take` every message in order, then `close`.

    A part is written every `ROWS_A_PART` iterations or `PART_NS`; no more than that is held, or lost by a kill.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder. Raises ValueError if that cannot be, or if it holds a recording already."""
        self.engine_id = ""
        self.iterations = self.requests = 0
        self.missing_iterations = 0  # launched and completed, but this side did not follow
        self.early_requests = 0  # ended here, but came before the recording did
        self.aborted_requests = 0  # gone without an end after their first token, as far as it shows
        self.open_requests = 0  # in the engine at the last message
        self._folder = folder
        self._start_ns = self._last_ns = self._flushed_ns = 0
        self._joined, self._metadata = IterationRows(), dict[str, bytes]()
        self._iteration_rows: list[dict[str, Any]] = []
        self._request_rows: list[tuple[float, int, int]] = []
        self._streaming: set[int] = set()  # slots of the requests that have a first token and no end
        self._parts = 0
        self._newest_row = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot record to the folder {folder} ({error}): choose another --out") from error
        for path in (self._requests, self._iterations):
            if path.exists():
                raise ValueError(f"{path} belongs to an earlier recording: choose another --out")

    @property
    def seconds(self) -> float:
        """From the first message to the last."""
        return (self._last_ns - self._start_ns) * 1e-9

    @property
    def unwritten_rows(self) -> int:
        """Requests and iterations that are in memory alone."""
        return len(self._request_rows) + len(self._iteration_rows)

    def take(self, telemetry: Telemetry) -> None:
        if not self.engine_id:
            self.engine_id = telemetry.engine_id
            self._start_ns = self._flushed_ns = telemetry.scheduled_ns
            self._joined = IterationRows(self._start_ns)
            self._metadata[BOUNDS] = msgspec.json.encode(telemetry.bounds)
        self._last_ns = telemetry.scheduled_ns
        self._take_requests(telemetry)
        for row in self._joined.add(msgspec.to_builtins(telemetry)):
            if self._newest_row:
                self.missing_iterations += row["iteration"] - self._newest_row - 1
            self._newest_row = row["iteration"]
            self._iteration_rows.append(row)
            self.iterations += 1
        if len(self._iteration_rows) >= ROWS_A_PART or self._last_ns - self._flushed_ns >= PART_NS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and put the requests in order of arrival."""
        self._flush()
        if self._requests.exists():
            table = csv.read_csv(self._requests).sort_by(CSV_HEADER[0])
            partial = self._folder / ".requests.partial"
            with partial.open("wb") as file:
                file.write(HEADER.encode())
                csv.write_csv(table, file, csv.WriteOptions(include_header=False))
            partial.rename(self._requests)

    @property
    def _requests(self) -> Path:
        return self._folder / "requests.csv"

    @property
    def _iterations(self) -> Path:
        return self._folder / "iterations.parquet"

    def _take_requests(self, telemetry: Telemetry) -> None:
        for completion in telemetry.completed:
            self._metadata[STAGES] = b"%d" % max(len(completion.stages), 1)
            for slot in completion.ttft_slots:
                self.aborted_requests += slot in self._streaming
                self._streaming.add(slot)
            for request in completion.finished:
                self._streaming.discard(request.slot)
                if request.arrival_ns < self._start_ns:
                    self.early_requests += 1
                    continue
                arrival_s = (request.arrival_ns - self._start_ns) / 1e9
                self._request_rows.append((arrival_s, request.prompt_tokens, request.output_tokens))
                self.requests += 1
        self.open_requests = telemetry.queue.running_requests + telemetry.queue.waiting_requests
        if self.open_requests == 0:
            self.aborted_requests += len(self._streaming)
            self._streaming.clear()

    def _flush(self) -> None:
        if self._request_rows:
            _append(self._requests, self._request_rows)
            self._request_rows.clear()
        if self._iteration_rows:
            self._iterations.mkdir(exist_ok=True)
            part = self._iterations / f"part-{self._parts:05d}.parquet"
            partial = part.with_name(f".{part.stem}.partial")  # a part is complete when it appears
            schema = SCHEMA.with_metadata(self._metadata)
            pq.write_table(pa.Table.from_pylist(self._iteration_rows, schema=schema), partial)
            partial.rename(part)
            self._iteration_rows.clear()
            self._parts += 1
        self._flushed_ns = self._last_ns


def _append(path: Path, rows: list[tuple[float, int, int]]) -> None:
    """All rows or none: one cut off by a full disk would spoil the file."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(("" if size else HEADER) + "".join(f"{a},{p},{o}\n" for a, p, o in rows))
    except OSError:
        if size:
            os.truncate(path, size)
        else:
            path.unlink(missing_ok=True)
        raise


def run_record(
    engine: Endpoints, out: Path, duration_s: float | None, keys: CurveKeys | None, clock: Callable[[], int]
) -> int:
    """Record until SIGINT, SIGTERM, or `duration_s` after the first message; returns the exit status.

    `clock` is monotonic, in ns. Raises ConnectionError when the engine speaks another version of the protocol, falls
    silent or starts anew; what came before is stored then, too. For the first message it waits without limit.
    """
    if duration_s is not None and not duration_s > 0:
        raise ValueError(f"--duration is {duration_s}; give seconds above 0, or leave it out and end with Ctrl-C")
    recording = Recording(out)
    stopping: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.append(True))
    link = ControllerLink(zmq.Context(), [engine], keys)
    try:
        with _progress(duration_s) as show:
            _listen(link, recording, duration_s or float("inf"), stopping, show, clock)
    finally:
        link.close()
        try:
            recording.close()
        finally:
            print(_summary(recording, out))
    return 0


def _listen(
    link: ControllerLink,
    recording: Recording,
    duration_s: float,
    stopping: list[bool],
    show: Callable[[Recording], None],
    clock: Callable[[], int],
) -> None:
    heard_ns, rejected = clock(), 0
    while not stopping:
        for telemetry in link.receive(TICK_S):
            heard_ns, rejected = clock(), link.rejected
            if recording.engine_id not in ("", telemetry.engine_id):
                raise ConnectionError(
                    f"the engine started anew ({recording.engine_id!r}, then {telemetry.engine_id!r}) and a recording "
                    "is of one start: record again, to another --out"
                )
            recording.take(telemetry)
            show(recording)
            if stopping or recording.seconds >= duration_s:
                return
        silent, strange = clock() - heard_ns >= SILENCE_S * 1e9, link.rejected - rejected
        if strange and (silent or not recording.engine_id):
            messages = _count(strange, "message")
            raise ConnectionError(f"{messages} of another protocol: run the engine's version of Pacer")
        if silent and recording.engine_id:  # before the first message it may be loading, for as long as that takes
            raise ConnectionError(f"no telemetry for {SILENCE_S:.0f} s: the engine has ended, or cannot be reached")


@contextmanager
def _progress(duration_s: float | None) -> Iterator[Callable[[Recording], None]]:
    """A line on stderr that follows the recording, with a bar where its end is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("waiting for the engine", total=duration_s)

        def show(recording: Recording) -> None:
            text = f"{recording.requests} requests, {recording.iterations} iterations"
            bar.update(task, completed=recording.seconds, description=text)

        yield show


def _summary(recording: Recording, out: Path) -> str:
    if not recording.engine_id:
        return "heard nothing, stored nothing"
    missing = recording.missing_iterations
    lines = [
        f"{recording.seconds:.1f} s of {recording.engine_id} in {out}: "
        f"{_count(recording.requests, 'request')}, {_count(recording.iterations, 'iteration')}"
    ]
    for count, what in (
        (recording.open_requests, "still open at the end"),
        (recording.early_requests, "from before the recording began"),
        # Where ends were not heard, a slot that is used again proves nothing.
        (0 if missing else recording.aborted_requests, "aborted (at least)"),
    ):
        if count:
            lines.append(f"{_count(count, 'request')} {what}: not in requests.csv")
    if missing:
        lines.append(f"{_count(missing, 'iteration')} missing, with the ends of requests: this process did not follow")
    if recording.unwritten_rows:
        lines.append(f"{_count(recording.unwritten_rows, 'row')} of these could not be written")
    return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
