"""Attention of decodes whose keys are split among programs, so that few or long ones too fill every multiprocessor.

Flash-decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html), planned on the device: once per batch a kernel
cuts the rows into items of about equal length, whose number is bounded by the rows and the multiprocessors alone, so
that the grid is known without the lengths and a CUDA graph serves any of them.
"""

# ruff: noqa: N803 (capitals mark what Triton compiles in)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.attention.backend import KvCache
from engine.triton_launch import Launcher

# Programs wanted per multiprocessor: three run at a time, and the next ones keep it busy while the last of them end.
_PROGRAMS_PER_SM = 4
# Below this the joining of splits costs more than they save.
_SHORTEST_SPLIT = 128
_SPLITS_TILE = 16


@triton.jit(do_not_specialize=["rows"])
def _plan_kernel(
    context_ends,
    row_items,
    items,
    rows,
    WANTED: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    SHORTEST: tl.constexpr,
    ROWS_TILE: tl.constexpr,
):
    """One program. `row_items` [rows + 2]: the number of items, then each row's first item, and again the number.

    `items` [.., 4]: row, first key, end of the keys, the row's splits.
    """
    row = tl.arange(0, ROWS_TILE)
    inside = row < rows
    context = tl.load(context_ends + row, mask=inside, other=-1)
    first = tl.zeros_like(context)
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // KEYS * KEYS
    length = tl.maximum(context - first, 0)
    longest = tl.maximum(tl.cdiv(tl.sum(length, axis=0), WANTED), SHORTEST)
    split = tl.cdiv(tl.cdiv(length, tl.maximum(tl.cdiv(length, longest), 1)), KEYS) * KEYS
    splits = tl.where(context >= 0, tl.maximum(tl.cdiv(length, tl.maximum(split, 1)), 1), 0)
    begins = tl.cumsum(splits, axis=0) - splits
    tl.store(row_items, tl.sum(splits, axis=0))
    tl.store(row_items + 1 + row, begins, mask=inside)
    tl.store(row_items + 1 + rows, tl.sum(splits, axis=0))
    for number in range(tl.max(splits, axis=0)):
        item = items + (begins + number) * 4
        start = first + number * split
        mask = number < splits
        tl.store(item, row, mask=mask)
        tl.store(item + 1, start, mask=mask)
        tl.store(item + 2, tl.minimum(start + split, context), mask=mask)
        tl.store(item + 3, splits, mask=mask)


@triton.jit
def _over_keys(
    query,
    cache,
    table,
    item,
    first_seen,
    scale,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """For each head of `query`: the values weighed by exp2(score - highest), the sum of these weights, and highest."""
    end = tl.load(item + 2)
    dims = tl.arange(0, DIM_TILE)[None, :]
    highest = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    attended = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    for key in tl.range(tl.load(item + 1), end, KEYS, num_stages=STAGES):
        position = key + tl.arange(0, KEYS)
        seen = (position < end) & (position >= first_seen)
        if PAGE % KEYS == 0:
            page = tl.load(table + key // PAGE).to(tl.int64)
            slots = page * (2 * PAGE) + (key % PAGE + tl.arange(0, KEYS))
        else:
            page = tl.load(table + position // PAGE, mask=position < end, other=0).to(tl.int64)
            slots = page * (2 * PAGE) + position % PAGE
        # Rows of a page past the end are finite, and get weight 0.
        places = slots[:, None] * (KV_HEADS * DIM) + dims
        keys = tl.load(cache + places, mask=dims < DIM, other=0.0)
        values = tl.load(cache + PAGE * KV_HEADS * DIM + places, mask=dims < DIM, other=0.0)
        scores = tl.where(seen[None, :], tl.dot(query, tl.trans(keys)) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        attended = attended * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        highest = higher
    return attended, total, highest


@triton.jit(do_not_specialize=["table_width"])
def _attend_kernel(
    q,
    cache,
    tables,
    query_starts,
    context_ends,
    row_items,
    items,
    out,
    partial,
    lse,
    table_width,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One item and one KV head. Scores are in base 2; `scale` includes log2(e)."""
    kv_head, number = tl.program_id(0), tl.program_id(1)
    if number < tl.load(row_items):
        item = items + number * 4
        row = tl.load(item).to(tl.int64)
        first_seen = tl.load(context_ends + row) - WINDOW if WINDOW > 0 else 0
        heads = tl.arange(0, GROUP_TILE)
        dims = tl.arange(0, DIM_TILE)[None, :]
        mask = (heads < GROUP)[:, None] & (dims < DIM)
        token = tl.load(query_starts + row).to(tl.int64)
        places = ((token * KV_HEADS + kv_head) * GROUP + heads)[:, None] * DIM + dims
        query = tl.load(q + places, mask=mask, other=0.0)
        head_cache, table = cache + kv_head * DIM, tables + row * table_width
        attended, total, highest = _over_keys(
            query, head_cache, table, item, first_seen, scale, KV_HEADS, DIM, PAGE, KEYS, GROUP_TILE, DIM_TILE, STAGES
        )
        total = tl.where(total > 0.0, total, 1.0)  # a padded row has no keys; it gives zeros
        attended = attended / total[:, None]
        if tl.load(item + 3) == 1:
            tl.store(out + places, attended.to(out.dtype.element_ty), mask=mask)
        else:
            head = (number * KV_HEADS + kv_head) * GROUP + heads
            tl.store(partial + head[:, None] * DIM + dims, attended, mask=mask)
            tl.store(lse + head, highest + tl.log2(total), mask=heads < GROUP)


@triton.jit
def _join_kernel(
    out,
    row_items,
    query_starts,
    partial,
    lse,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """One head of one row: the splits' outputs, weighed by their shares of the softmax."""
    head, row = tl.program_id(0), tl.program_id(1)
    first = tl.load(row_items + 1 + row)
    splits = tl.load(row_items + 2 + row) - first
    if splits > 1:
        dims = tl.arange(0, DIM_TILE)
        in_dim = dims < DIM
        highest = -float("inf")
        total = 0.0
        joined = tl.zeros([DIM_TILE], tl.float32)
        for begin in range(0, splits, SPLITS_TILE):
            number = begin + tl.arange(0, SPLITS_TILE)
            inside = number < splits
            places = (first + number) * HEADS + head
            shares = tl.load(lse + places, mask=inside, other=float("-inf"))
            mask = inside[:, None] & in_dim[None, :]
            parts = tl.load(partial + places[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
            higher = tl.maximum(highest, tl.max(shares, axis=0))
            weights = tl.exp2(shares - higher)
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weights, axis=0)
            joined = joined * shrink + tl.sum(parts * weights[:, None], axis=0)
            highest = higher
        place = out + (tl.load(query_starts + row).to(tl.int64) * HEADS + head) * DIM + dims
        tl.store(place, (joined / total).to(out.dtype.element_ty), mask=in_dim)


_PLAN = Launcher(_plan_kernel)
_ATTEND = Launcher(_attend_kernel)
_JOIN = Launcher(_join_kernel)


@dataclass(slots=True)
class SplitPlan:
    """One batch's items by sliding window (0: none), and room for what they yield."""

    query_starts: torch.Tensor
    context_ends: torch.Tensor
    tables: torch.Tensor
    row_items: dict[int, torch.Tensor]
    items: dict[int, torch.Tensor]
    partial: torch.Tensor
    lse: torch.Tensor


class SplitDecode:
    """Plans batches of decodes, and attends to them; any page size. bfloat16, float16 or float32."""

    def __init__(self, cache: KvCache, windows: list[int | None], heads: int) -> None:
        _, _, self.page_tokens, self.kv_heads, self.head_dim = cache[0].shape
        self.cache = cache
        self.windows = [window or 0 for window in windows]
        self.heads = heads
        self.device = cache[0].device
        self.wanted_items = max(1, multiprocessors(self.device) * _PROGRAMS_PER_SM // self.kv_heads)
        self.group_tile = max(16, 1 << (heads // self.kv_heads - 1).bit_length())
        self.dim_tile = 1 << (self.head_dim - 1).bit_length()
        # Two tiles of keys and values in flight behind one of page ids; three programs fit a multiprocessor.
        self.keys_tile = 64 if self.dim_tile <= 128 else 32
        self.stages, self.warps = 5, 4
        self.scale = math.log2(math.e) / math.sqrt(self.head_dim)

    def plan(self, query_starts: torch.Tensor, context_ends: torch.Tensor, tables: torch.Tensor) -> SplitPlan:
        """Row i has one query, token query_starts[i], over the first context_ends[i] keys of the pages tables[i].

        A row of no keys yields zeros, one whose context_ends is negative is left alone. Launches a kernel per window.
        """
        rows = len(context_ends)
        most_items = rows + self.wanted_items
        plan = SplitPlan(
            query_starts,
            context_ends,
            tables,
            row_items={},
            items={},
            partial=torch.empty((most_items, self.heads, self.head_dim), device=self.device),
            lse=torch.empty((most_items, self.heads), device=self.device),
        )
        rows_tile = max(16, 1 << (rows - 1).bit_length())
        for window in set(self.windows):
            row_items = torch.empty(rows + 2, dtype=torch.int32, device=self.device)
            items = torch.empty((most_items, 4), dtype=torch.int32, device=self.device)
            constants = self.wanted_items, window, self.keys_tile, _SHORTEST_SPLIT, rows_tile
            _PLAN((1, 1, 1), (context_ends, row_items, items, rows), constants)
            plan.row_items[window], plan.items[window] = row_items, items
        return plan

    def attend(self, plan: SplitPlan, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """The plan's rows of q to those of out, both contiguous [tokens, heads, head_dim]."""
        window = self.windows[layer]
        rows = len(plan.context_ends)
        row_items, items = plan.row_items[window], plan.items[window]
        cache, tables, starts, ends = self.cache[layer], plan.tables, plan.query_starts, plan.context_ends
        group, width = self.heads // self.kv_heads, tables.stride(0)
        tiles = self.keys_tile, self.group_tile, self.dim_tile, self.stages
        _ATTEND(
            (self.kv_heads, rows + self.wanted_items, 1),
            (q, cache, tables, starts, ends, row_items, items, out, plan.partial, plan.lse, width, self.scale),
            (group, self.kv_heads, self.head_dim, self.page_tokens, window, *tiles),
            self.warps,
        )
        _JOIN(
            (self.heads, rows, 1),
            (out, row_items, starts, plan.partial, plan.lse),
            (self.heads, self.head_dim, _SPLITS_TILE, self.dim_tile),
        )


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 1 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
