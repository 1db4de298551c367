"""Iterations recorded by NVIDIA Dynamo's forward-pass metrics, for step-time models."""

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from envs.iterations import COMPOSITION, Iterations
from envs.trace_files import decoded_lines


class _Scheduled(msgspec.Struct):
    num_prefill_requests: int
    sum_prefill_tokens: int
    sum_prefill_kv_tokens: int
    num_decode_requests: int
    sum_decode_kv_tokens: int


class _Metrics(msgspec.Struct):
    version: Literal[1]
    worker_id: str
    dp_rank: int
    counter_id: int
    wall_time: float
    scheduled_requests: _Scheduled


class _Event(msgspec.Struct):
    schema: Literal["dynamo.fpm.trace.v1"]
    fpm: _Metrics


class _Line(msgspec.Struct):
    event: _Event


def read_forward_passes(path: Path) -> Iterations:
    """A `dynamo.fpm.trace.v1` file, JSON lines, plain or gzipped (docs.nvidia.com/dynamo, forward pass metrics traces).

    A row of vLLM's workers has the time between two updates of the scheduler, the first after idling its own; so
    `intervals` is set. TensorRT-LLM's send the pass's own time: use `dataclasses.replace(..., intervals=False)`. A run
    is what one data-parallel rank of a worker counted without a gap. Idling (a heartbeat without wall time) ends it,
    and so does what a sampled trace leaves out: there no late stamp can be mended, so record in full. Of a segment
    that is still being written, the complete lines are read.

    Of the prefills the format has sums, and the variance of whole prompts: W takes n of them, c tokens together at
    contexts of L together, as equal, c * (L + c/2) / n; exact for one prefill, too low where chunk and context sizes
    differ and go together. Raises ValueError naming the file and the line.
    """
    newest: dict[tuple[str, int], tuple[int, int]] = {}  # of a rank: its last pass and that one's run
    n_runs, rows = 0, []
    for line in decoded_lines(path, _Line, may_be_cut_off=True):
        metrics = line.event.fpm
        batch = metrics.scheduled_requests
        if metrics.wall_time <= 0 or batch.num_decode_requests + batch.sum_prefill_tokens == 0:
            continue
        rank = (metrics.worker_id, metrics.dp_rank)
        before, run = newest.get(rank, (None, 0))
        if before is None or metrics.counter_id != before + 1:
            run, n_runs = n_runs, n_runs + 1
        newest[rank] = metrics.counter_id, run
        tokens, context = batch.sum_prefill_tokens, batch.sum_prefill_kv_tokens
        rows.append(
            (
                metrics.wall_time,
                batch.num_decode_requests,
                batch.sum_decode_kv_tokens,
                batch.num_prefill_requests,
                tokens,
                tokens * (context + tokens / 2) / max(batch.num_prefill_requests, 1),
                run,
            )
        )
    if not rows:
        raise ValueError(f"{path} holds no iteration: record with --fpm-trace and DYN_FPM_MODE=full while serving")
    rows.sort(key=lambda row: row[-1])  # stable: the passes of a run come together, in their order
    *floats, runs = zip(*rows, strict=True)
    columns = dict(zip(("seconds", *COMPOSITION), np.array(floats, dtype=np.float64), strict=True))
    return Iterations(**columns, run=np.array(runs))
