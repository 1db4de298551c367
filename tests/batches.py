"""Random batches over a random paged cache, for whatever attends to them; and where Triton's kernels can run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch

from engine.attention.backend import KvCache
from engine.device_inputs import DeviceInputs
from engine.step_input import StepInput

CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined; no kernel was, so far


def _why_not_interpreted() -> str | None:
    if HAS_CUDA:
        return "the gpu-marked run compiles the kernels"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install triton"
    # Loops to a bound that is computed fail there with numpy 2.4.
    return None if tuple(map(int, found.split(".")[:2])) >= (3, 7) else f"triton {found} cannot interpret loops"


KERNEL_DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(_why_not_interpreted() is not None, reason=str(_why_not_interpreted()))
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""For tests of Triton kernels: interpreted on a CPU, compiled on a GPU."""


@dataclass(frozen=True)
class Shape:
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_tokens: int = 16
    layers: int = 1


def random_cache(shape: Shape, blocks: int, dtype: torch.dtype, device: torch.device, seed: int) -> KvCache:
    """No slot is zero, so that reading one slot too many shows."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (blocks, 2, shape.page_tokens, shape.kv_heads, shape.head_dim)
    return [torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(shape.layers)]


def random_q(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((tokens, shape.heads, shape.head_dim), generator=generator).to(device, dtype)


def step_of(
    rows: Sequence[tuple[int, int]], n_decodes: int, page_tokens: int, blocks: int, scattered: bool
) -> StepInput:
    """Rows are (context, tokens); their blocks follow one another, or are drawn from all of the cache."""
    context, n_tokens = np.array(rows, np.int32).T.copy()
    n_blocks = -(-(context + n_tokens) // page_tokens)
    free = np.arange(blocks)
    if scattered:
        np.random.default_rng(3).shuffle(free)
    assert n_blocks.sum() <= blocks
    tables = np.zeros((len(rows), n_blocks.max()), np.int32)
    starts = np.cumsum(n_blocks) - n_blocks
    for row, (start, n) in enumerate(zip(starts, n_blocks, strict=True)):
        tables[row, :n] = free[start : start + n]
    return StepInput(
        n_decodes=n_decodes,
        n_tokens=n_tokens,
        context=context,
        token_ids=np.zeros(n_tokens.sum(), np.int32),
        block_tables=tables,
        sampled_rows=np.arange(len(rows), dtype=np.int32),
        drawn=None,
    )


def inputs_of(step: StepInput, page_tokens: int, device: torch.device) -> DeviceInputs:
    def put(array: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
        return torch.from_numpy(array).to(device)

    positions = step.positions
    rows = np.repeat(np.arange(len(step.n_tokens)), step.n_tokens)
    slots = step.block_tables[rows, positions // page_tokens].astype(np.int64) * page_tokens + positions % page_tokens
    starts = np.concatenate(([0], np.cumsum(step.n_tokens))).astype(np.int32)
    return DeviceInputs(
        token_ids=put(step.token_ids),
        positions=put(positions),
        kv_slots=put(slots),
        query_starts=put(starts),
        context_ends=put(step.context + step.n_tokens),
        block_tables=put(step.block_tables),
        sampled=put(starts[1:].astype(np.int64) - 1),
        n_decodes=step.n_decodes,
        max_query_tokens=int(step.n_tokens.max()),
        max_context_tokens=int((step.context + step.n_tokens).max()),
    )


def plain_attention(q: torch.Tensor, layer: torch.Tensor, step: StepInput, window: int | None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(d)) v in float64, one row after another."""
    page_tokens, kv_heads = layer.shape[2:4]
    group = q.shape[1] // kv_heads
    out = torch.empty(q.shape, dtype=torch.float64)
    start = 0
    for row, (context, n) in enumerate(zip(step.context.tolist(), step.n_tokens.tolist(), strict=True)):
        end = context + n
        blocks = torch.from_numpy(step.block_tables[row, : -(-end // page_tokens)].astype(np.int64))
        keys, values = layer.cpu()[blocks].double().transpose(0, 1).flatten(1, 2)[:, :end]
        distance = torch.arange(context, end)[:, None] - torch.arange(end)
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        queries = q[start : start + n].cpu().double().transpose(0, 1)
        keys, values = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) / q.shape[2] ** 0.5
        out[start : start + n] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
        start += n
    return out.flatten(1)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())
