"""The operations of engine.ops as one Triton kernel each; all are bound by memory, and touch it once.

Tile shapes follow from the model's sizes alone, so that nothing is tuned or compiled while a CUDA graph is captured
once each kernel has run.
"""

# ruff: noqa: N803 (capitals mark what Triton compiles in)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from engine.ops import HeadNorms
from engine.triton_launch import Launcher

_SILU_TILE = 1024


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, TILE)
    inside = columns < WIDTH
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    scaled = values * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_kernel(residual, x, weight, out, eps, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, TILE)
    inside = columns < WIDTH
    added = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it is normed, as what the next layer reads is.
    stored = (tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32) + added).to(
        residual.dtype.element_ty
    )
    tl.store(residual + row + columns, stored, mask=inside)
    values = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    scaled = values * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_and_mul_kernel(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(places, half, mask):
    """The first and the second halves of heads whose first halves lie at `places`."""
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(places + half, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(places, first, second, half, mask):
    tl.store(places, first.to(places.dtype.element_ty), mask=mask)
    tl.store(places + half, second.to(places.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(first, second, weight, cos, sin, columns, inside, eps, NORM: tl.constexpr, DIM: tl.constexpr):
    """Both halves of each head [heads, DIM / 2], normed where asked, then rotated."""
    half = DIM // 2
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / DIM + eps)[:, None]
        first = first * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        second = second * scale * tl.load(weight + half + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_first = tl.load(cos + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + half + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + half + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first * cos_first + second * sin_first, second * cos_second + first * sin_second


@triton.jit
def _rotate_and_store_kernel(
    qkv,
    cos,
    sin,
    cache,
    kv_slots,
    q,
    q_weight,
    k_weight,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
):
    """One token and one KV head: the query heads that share it, its key and its value."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    half: tl.constexpr = DIM // 2
    columns = tl.arange(0, HALF_TILE)
    inside = columns < half
    cos, sin = cos + token * DIM, sin + token * DIM
    row = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM)
    heads = tl.arange(0, GROUP_TILE)
    mask = (heads < group)[:, None] & inside[None, :]
    places = (kv_head * group + heads)[:, None] * DIM + columns[None, :]
    first, second = _halves(row + places, half, mask)
    first, second = _rotated(first, second, q_weight, cos, sin, columns, inside, eps, NORM, DIM)
    _store_halves(q + token * (HEADS * DIM) + places, first, second, half, mask)
    slot = tl.load(kv_slots + token)
    if slot >= 0:
        within, key = inside[None, :], row + (HEADS + kv_head) * DIM + columns[None, :]
        # A block's keys are followed by its values, so that half of what lies before a block's keys are values.
        place = cache + ((slot + slot // PAGE * PAGE) * KV_HEADS + kv_head) * DIM + columns[None, :]
        key_first, key_second = _halves(key, half, within)
        key_first, key_second = _rotated(key_first, key_second, k_weight, cos, sin, columns, inside, eps, NORM, DIM)
        _store_halves(place, key_first, key_second, half, within)
        value_first, value_second = _halves(key + KV_HEADS * DIM, half, within)
        _store_halves(place + PAGE * KV_HEADS * DIM, value_first, value_second, half, within)


_RMS_NORM = Launcher(_rms_norm_kernel)
_ADD_RMS_NORM = Launcher(_add_rms_norm_kernel)
_SILU_AND_MUL = Launcher(_silu_and_mul_kernel)
_ROTATE_AND_STORE = Launcher(_rotate_and_store_kernel)


class TritonOps:
    """CUDA only. x and qkv must be contiguous: a strided one would be read wrongly, so it is refused by an assert."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert x.is_contiguous()
        out = torch.empty_like(x)
        tile, warps = _row_tile(x.shape[1])
        _RMS_NORM((x.shape[0], 1, 1), (x, weight, out, eps), (x.shape[1], tile), warps)
        return out

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert x.is_contiguous() and residual.is_contiguous()
        out = torch.empty_like(x)
        tile, warps = _row_tile(x.shape[1])
        _ADD_RMS_NORM((x.shape[0], 1, 1), (residual, x, weight, out, eps), (x.shape[1], tile), warps)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        assert gate_up.is_contiguous()
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, width)
        _SILU_AND_MUL((tokens, -(-width // _SILU_TILE), 1), (gate_up, out), (width, _SILU_TILE))
        return out

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache_layer: torch.Tensor,
        kv_slots: torch.Tensor,
        heads: int,
        kv_heads: int,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and cache_layer.is_contiguous()
        tokens, head_dim = len(qkv), cache_layer.shape[4]
        q = qkv.new_empty(tokens, heads, head_dim)
        group_tile, half_tile = _next_power(heads // kv_heads), _next_power(head_dim // 2)
        q_weight, k_weight, eps = (cos, cos, 0.0) if norms is None else (norms.q_weight, norms.k_weight, norms.eps)
        _ROTATE_AND_STORE(
            (tokens, kv_heads, 1),
            (qkv, cos, sin, cache_layer, kv_slots, q, q_weight, k_weight, eps),
            (heads, kv_heads, head_dim, cache_layer.shape[2], norms is not None, group_tile, half_tile),
            # Two 16-byte loads a thread; more heads than eight warps can hold in registers do not occur.
            min(8, max(1, group_tile * half_tile // 256)),
        )
        return q


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _row_tile(width: int) -> tuple[int, int]:
    """A tile that holds a row, and the warps that read it with two 16-byte loads a thread, or more in long rows."""
    tile = _next_power(width)
    return tile, min(16, max(1, tile // 512))
