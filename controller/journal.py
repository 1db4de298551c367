"""The journal: every decision with the telemetry it answered, as a folder of Parquet files.

A process of its own writes it, so that a decision never waits for a disk, and so that rows already sent survive the
controller's death. Each part file is complete when it appears; read the folder with any Parquet reader.
"""

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import zmq

from engine.link import make_private
from engine.protocol import Knobs, Telemetry

logger = logging.getLogger(__name__)

ROWS_A_PART = 5000
FLUSH_S = 60.0
CLOSE_S = 30.0


class JournalRow(msgspec.Struct, frozen=True):
    """One decision. `knobs` is None when the law was silent; `delivered` is false when the engine was away."""

    policy: str
    decided_ns: int
    delivered: bool
    knobs: Knobs | None
    telemetry: Telemetry


class Journal:
    """The controller's end: hands rows to the writer process and never waits; rows it cannot take are counted."""

    def __init__(self, folder: Path, socket_dir: Path, clock: Callable[[], int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        make_private(socket_dir)
        self.lost_rows = 0
        self._encoder = msgspec.msgpack.Encoder()
        address = f"ipc://{socket_dir}/journal-{multiprocessing.current_process().pid}"
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 100_000)
        self._socket.connect(address)  # the connecting end queues rows until the writer is there
        # Spawned, not forked: a fork would copy ZeroMQ's threads' locks.
        spawn = multiprocessing.get_context("spawn")
        self._writer = spawn.Process(target=_write_rows, args=(address, folder, clock), name="journal", daemon=True)
        self._writer.start()

    def record(self, row: JournalRow) -> None:
        try:
            self._socket.send(self._encoder.encode(row), zmq.NOBLOCK)
        except zmq.Again:
            self.lost_rows += 1
            if self.lost_rows & (self.lost_rows - 1) == 0:
                logger.warning("the journal's writer does not follow: %d rows lost", self.lost_rows)

    def close(self) -> None:
        """Wait until everything is on disk; not for ever, and not at all for a writer that has died."""
        if self._writer.is_alive():
            with contextlib.suppress(zmq.Again):
                self._socket.send(b"", zmq.NOBLOCK)
            self._writer.join(CLOSE_S)
        if self._writer.exitcode != 0:
            logger.error("the journal's writer ended with status %s: its last rows are lost", self._writer.exitcode)
            self._writer.kill()
        self._socket.close(linger=0)


def _write_rows(address: str, folder: Path, clock: Callable[[], int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the controller says when the last row has come, or dies
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 100_000)
    socket.bind(address)
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    poller.register(parent.sentinel, zmq.POLLIN)
    decoder = msgspec.msgpack.Decoder(JournalRow)
    rows: list[JournalRow] = []
    flushed_ns = clock()
    open_ended = True
    while open_ended:
        ready = dict(poller.poll(int(FLUSH_S * 1000)))
        if socket in ready:
            data = socket.recv()
            open_ended = data != b""
            if open_ended:
                rows.append(decoder.decode(data))
        elif parent.sentinel in ready:  # the controller died, and what it had sent has been read
            open_ended = False
        due = len(rows) >= ROWS_A_PART or clock() - flushed_ns >= FLUSH_S * 1e9
        if rows and (due or not open_ended):
            _write_part(folder, rows)
            rows.clear()
            flushed_ns = clock()


def _write_part(folder: Path, rows: list[JournalRow]) -> None:
    table = pa.Table.from_pylist([msgspec.to_builtins(row) for row in rows], schema=SCHEMA)
    taken = [int(part.stem.removeprefix("part-")) for part in folder.glob("part-*.parquet")]
    number = max(taken, default=-1) + 1
    partial = folder / f".part-{number:05d}.partial"
    pq.write_table(table, partial)
    partial.rename(folder / f"part-{number:05d}.parquet")


def _arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of an annotation of the protocol: structs nest, tuples become lists."""
    plain = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    if annotation in plain:
        return plain[annotation]
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        fields = msgspec.structs.fields(annotation)
        return pa.struct([(field.name, _arrow_type(field.type)) for field in fields])
    arguments = [a for a in get_args(annotation) if a not in (type(None), ...)]
    if get_origin(annotation) is tuple:
        return pa.list_(_arrow_type(arguments[0]))
    if isinstance(arguments[0], str):  # Literal
        return pa.string()
    return _arrow_type(arguments[0])  # X | None


SCHEMA = pa.schema(list(_arrow_type(JournalRow)))
