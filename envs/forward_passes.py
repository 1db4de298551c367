"""Iterations recorded by NVIDIA Dynamo's forward-pass metrics, for step-time models."""

from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from envs.trace_files import decoded_lines
from envs.workload import FloatArray, IntArray


class ForwardPasses(NamedTuple):
    """One row per iteration: arrays of one length, float64 but for `run`; in the order of `envs.iterations.Iterations`.

    `prefill_attention_tokens2` is W = sum of c * (L + c/2) over the prefill chunks c at context L. `run` (int64)
    numbers the workers' data-parallel ranks, in order of appearance. Each row was timed by itself (`intervals=False`):
    a sampled trace leaves out what came between.
    """

    seconds: FloatArray
    decode_tokens: FloatArray
    decode_context_tokens: FloatArray
    prefill_requests: FloatArray
    prefill_tokens: FloatArray
    prefill_attention_tokens2: FloatArray
    run: IntArray


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
    wall_time: float
    scheduled_requests: _Scheduled


class _Event(msgspec.Struct):
    schema: Literal["dynamo.fpm.trace.v1"]
    fpm: _Metrics


class _Line(msgspec.Struct):
    event: _Event


def read_forward_passes(path: Path) -> ForwardPasses:
    """A `dynamo.fpm.trace.v1` file, JSON lines, plain or gzipped (docs.nvidia.com/dynamo, forward pass metrics traces).

    Idle heartbeats (no wall time, or nothing scheduled) are left out. The format has sums over the prefills only: W
    takes n of them, c tokens together at contexts of L together, as equal, c * (L + c/2) / n; exact for one prefill,
    too low where chunk and context sizes differ and go together. Raises ValueError naming the file and the line.
    """
    runs: dict[tuple[str, int], int] = {}
    rows = []
    for line in decoded_lines(path, _Line):
        metrics = line.event.fpm
        batch = metrics.scheduled_requests
        if metrics.wall_time <= 0 or batch.num_decode_requests + batch.sum_prefill_tokens == 0:
            continue
        run = runs.setdefault((metrics.worker_id, metrics.dp_rank), len(runs))
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
    *floats, run_ids = zip(*rows, strict=True)
    seconds, decodes, decode_context, prefills, prefill_tokens, attention = np.array(floats, dtype=np.float64)
    numbers = np.array(run_ids, dtype=np.int64)
    return ForwardPasses(seconds, decodes, decode_context, prefills, prefill_tokens, attention, numbers)
