"""Tables of iterations: what each computed, under which knobs, and how long it took."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.protocol import VERSION

Message = dict[str, Any]
"""A `Telemetry` message as plain dictionaries."""

_INTS, _FLOATS = pa.list_(pa.int64()), pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("engine_id", pa.string()),
        ("iteration", pa.int64()),
        ("time_s", pa.float64()),
        ("interval_s", pa.float64()),
        ("device_s", pa.float64()),
        ("decode_tokens", pa.int64()),
        ("decode_context_tokens", pa.int64()),
        ("prefill_requests", pa.int64()),
        ("prefill_tokens", pa.int64()),
        ("prefill_chunk_tokens", _INTS),
        ("prefill_context_tokens", _INTS),
        ("prefill_attention_tokens2", pa.float64()),
        ("padding_tokens", pa.int64()),
        ("running_requests", pa.int64()),
        ("waiting_requests", pa.int64()),
        ("waiting_prompt_tokens", pa.int64()),
        ("oldest_wait_s", pa.float64()),
        ("head_remaining_tokens", pa.int64()),
        ("head_context_tokens", pa.int64()),
        ("budget_tokens", pa.int64()),
        ("chunk_tokens", pa.int64()),
        ("source", pa.string()),
        ("kv_usage", pa.float64()),
        ("tbt_s", _FLOATS),
        ("ttft_s", _FLOATS),
    ]
)
"""Columns of a table of iterations, one row per completed iteration in order of time.

`time_s` is the completion's, `interval_s` lies between two completions (null after idling); the batch's composition
and the queue are those of the launch, as the wire tells them (`BatchComposition`, `QueueState`; of the prompts to
compute only the first, the head).
"""


class IterationRows:
    """Joins launches with their completions, message by message; holds no more than the iterations under way.

    `time_s` counts from `start_ns`, or else from the first completion on.
    """

    def __init__(self, start_ns: int | None = None) -> None:
        self._start_ns = start_ns
        self._previous: dict[str, Message] = {}  # the last completion, by engine; none while it idles
        self._launched: dict[str, dict[int, Message]] = {}  # by engine and iteration

    def add(self, message: Message) -> list[dict[str, Any]]:
        """The rows (by `SCHEMA`) of the iterations that this message completes, where their launch was heard, too."""
        launched = self._launched.setdefault(message["engine_id"], {})
        rows = []
        for completion in message["completed"]:
            launch = launched.get(completion["iteration"])
            # Completions come in order: what was launched before this one and lost its own has no use any more.
            for iteration in [i for i in launched if i <= completion["iteration"]]:
                del launched[iteration]
            if launch is not None:
                rows.append(self._row(launch, completion))
            self._previous[message["engine_id"]] = completion
        if message["batch"]["decode_tokens"] + message["batch"]["prefill_tokens"] > 0:
            launched[message["iteration"]] = message
        else:  # nothing runs, so the next completion follows on nothing
            self._previous.pop(message["engine_id"], None)
        return rows

    def _row(self, launch: Message, completion: Message) -> dict[str, Any]:
        end_ns, previous = completion["completed_ns"], self._previous.get(launch["engine_id"])
        follows = previous is not None and previous["iteration"] + 1 == completion["iteration"]
        self._start_ns = end_ns if self._start_ns is None else self._start_ns
        queue = dict(launch["queue"])
        remaining, context = queue.pop("prompt_remaining_tokens"), queue.pop("prompt_context_tokens")
        return {
            "engine_id": launch["engine_id"],
            "iteration": completion["iteration"],
            "time_s": (end_ns - self._start_ns) * 1e-9,
            "interval_s": (end_ns - previous["completed_ns"]) * 1e-9 if follows and previous else None,
            "device_s": completion["device_s"],
            **launch["batch"],
            **queue,
            "head_remaining_tokens": remaining[0] if remaining else 0,
            "head_context_tokens": context[0] if context else 0,
            "budget_tokens": launch["knobs"]["budget_tokens"],
            "chunk_tokens": launch["knobs"]["chunk_tokens"],
            "source": launch["knobs"]["source"],
            "kv_usage": launch["kv_usage"],
            "tbt_s": completion["tbt_s"],
            "ttft_s": completion["ttft_s"],
        }


def read_iterations(journal: Path) -> pa.Table:
    """The table (`SCHEMA`) of a journal.

    Raises ValueError if the folder holds no completed iteration, or telemetry of another version of the protocol.
    """
    parts = sorted(journal.glob("part-*.parquet"))
    if not parts:
        raise ValueError(f"{journal} holds no journal: give the folder that --journal named")
    joined = IterationRows()
    # Part by part: rows as dictionaries take many times the memory of their table.
    table = pa.concat_tables(pa.Table.from_pylist(_rows_of(part, joined), schema=SCHEMA) for part in parts)
    if not table.num_rows:
        raise ValueError(f"{journal} holds no completed iteration: nothing was served while it was kept")
    return table


def _rows_of(part: Path, joined: IterationRows) -> list[dict[str, Any]]:
    messages = pq.read_table(part, columns=["telemetry"])["telemetry"].to_pylist()
    for version in {message["version"] for message in messages} - {VERSION}:
        raise ValueError(
            f"{part} holds telemetry of protocol version {version}, this Pacer reads {VERSION}: read it with the "
            "version of Pacer that kept it"
        )
    return [row for message in messages for row in joined.add(message)]
