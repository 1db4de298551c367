"""From a journal to a table of iterations: what each computed, under which knobs, and how long it took."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_iterations(journal: Path) -> pa.Table:
    """One row per completed iteration of one engine's journal, in order of time.

    Columns: engine_id, iteration, time_s (of completion, from the first one on), interval_s (between two completions;
    null after idling), device_s, the batch's composition, the queue, budget_tokens, chunk_tokens, source, tbt_s and
    ttft_s (lists). Raises ValueError if the folder holds no complete part.
    """
    parts = sorted(journal.glob("part-*.parquet"))
    if not parts:
        raise ValueError(f"{journal} holds no journal: give the folder that --journal named")
    messages = [row["telemetry"] for part in parts for row in pq.read_table(part).to_pylist()]
    launched = {(m["engine_id"], m["iteration"]): m for m in messages if _tokens(m) > 0}
    rows = []
    first_ns = previous_ns = None
    for message in messages:
        for completion in message["completed"]:
            launch = launched.get((message["engine_id"], completion["iteration"]))
            if launch is None:
                continue
            end_ns = completion["completed_ns"]
            first_ns = end_ns if first_ns is None else first_ns
            # Iterations follow each other without a gap unless the engine was idle: then there is no interval.
            busy = previous_ns is not None and completion["scheduled_ns"] - previous_ns < IDLE_NS
            rows.append(
                {
                    "engine_id": message["engine_id"],
                    "iteration": completion["iteration"],
                    "time_s": (end_ns - first_ns) * 1e-9,
                    "interval_s": (end_ns - previous_ns) * 1e-9 if busy else None,
                    "device_s": completion["device_s"],
                    **launch["batch"],
                    **launch["queue"],
                    "budget_tokens": launch["knobs"]["budget_tokens"],
                    "chunk_tokens": launch["knobs"]["chunk_tokens"],
                    "source": launch["knobs"]["source"],
                    "kv_usage": launch["kv_usage"],
                    "tbt_s": completion["tbt_s"],
                    "ttft_s": completion["ttft_s"],
                }
            )
            previous_ns = end_ns
    if not rows:
        raise ValueError(f"{journal} holds no completed iteration: nothing was served while it was kept")
    return pa.Table.from_pylist(rows)


IDLE_NS = 2_000_000


def _tokens(message: dict[str, dict[str, int]]) -> int:
    return message["batch"]["decode_tokens"] + message["batch"]["prefill_tokens"]
