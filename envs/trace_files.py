"""Trace files as bytes: plain or gzipped, CSV columns and JSON lines, and errors that name the line."""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

T = TypeVar("T")


@contextmanager
def open_trace(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes after a byte order mark, unzipped if it is a gzip file whatever its name.

    Raises ValueError if that is damaged.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file
        try:
            if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                stream.seek(0)
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is cut off or damaged: {error}") from error


def decoded_lines(path: Path, kind: type[T], may_be_cut_off: bool = False) -> Iterator[T]:
    """Every JSON line as `kind`; empty lines are passed over, and the last one of a file that may be cut off."""
    decoder = msgspec.json.Decoder(kind)
    with open_trace(path) as stream:
        for row, line in enumerate(line for line in _lines(stream, may_be_cut_off) if line.strip()):
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                refuse_row(path, row, str(error), error)


def _lines(stream: BinaryIO, may_be_cut_off: bool) -> Iterator[bytes]:
    if not may_be_cut_off:
        yield from stream
        return
    with suppress(EOFError):  # of a gzip file that is still being written
        yield from (line for line in stream if line.endswith(b"\n"))


def read_columns(
    path: Path, names: Sequence[str], time: pa.DataType, may_be_empty: bool = False
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Three columns of a CSV file with a header: a time, and the prompt's and the output's tokens.

    `time` is float64 (seconds) or a timestamp in ns (whole nanoseconds since 1970 come back; a UTC offset is heeded).
    With `may_be_empty` an empty time is NaN, otherwise an error.
    """
    with open_trace(path) as stream:
        header = stream.readline().decode(errors="replace").strip()
        first = next((line for line in stream if line.strip()), b"").decode(errors="replace")
    if not set(names) <= {name.strip('"') for name in header.split(",")}:
        raise ValueError(f"{path}: the first line is {header[:80]!r}; it must have the columns {','.join(names)!r}")
    if pa.types.is_timestamp(time) and re.search(r":\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)", first):
        time = pa.timestamp("ns", tz="UTC")
    types = dict(zip(names, (time, pa.float64(), pa.float64()), strict=True))  # tokens may be written as 472.0
    options = csv.ConvertOptions(column_types=types, include_columns=names, null_values=[""], strings_can_be_null=True)
    try:
        with open_trace(path) as stream:
            # One thread: only then do errors name the row.
            table = csv.read_csv(stream, csv.ReadOptions(use_threads=False), convert_options=options)
    except pa.ArrowInvalid as error:
        _refuse_arrow(path, error)
    if not len(table):
        raise ValueError(f"{path} has no row below its header")
    for name in names[may_be_empty:]:
        for row in np.flatnonzero(table[name].is_null().to_numpy())[:1]:
            refuse_row(path, int(row) + 1, f"{name} is empty")
    prompts, outputs = (table[name].to_numpy() for name in names[1:])
    for row in np.flatnonzero((prompts % 1 != 0) | (outputs % 1 != 0))[:1]:
        refuse_row(path, int(row) + 1, "tokens that are no whole number")
    times = table[names[0]]
    times = times.cast(pa.int64()) if pa.types.is_timestamp(time) else times
    return times.to_numpy(), prompts.astype(np.int64), outputs.astype(np.int64)


def refuse_row(path: Path, row: int, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raises ValueError with the line, its text and the reason; rows count from 0, empty lines and all but those."""
    with open_trace(path) as stream:
        filled = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        number, line = next(islice(filled, row, None))
    text = line.decode(errors="replace").strip()
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    raise ValueError(f"{path}, line {number}: cannot read {shown!r} ({reason})") from cause


def _refuse_arrow(path: Path, error: pa.ArrowInvalid) -> NoReturn:
    found = re.search(r"Row #(\d+): (.*)", str(error), re.DOTALL)
    if found is None:
        raise ValueError(f"{path}: {error}") from error
    refuse_row(path, int(found[1]) - 1, found[2].splitlines()[0], error)
