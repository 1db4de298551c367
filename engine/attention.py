"""Attention over a paged KV cache, for a flat batch of decodes and prefill chunks."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from engine.model_config import ModelConfig
from engine.request import Batch

KvCache = list[torch.Tensor]
"""One tensor a layer, [blocks, 2, block_tokens, kv_heads, head_dim]: a block's keys, then its values."""

# Keys and values of the decodes that one call handles. Gathered and attended to inside the L2 cache of a core they
# cost a fraction of what they cost beyond it; this also bounds what padding to the longest row can waste.
_GROUP_BYTES = 1 << 20
# Queries of a prefill chunk that one call handles: each tile sees only the keys up to its own last query.
_TILE_TOKENS = 64


class BatchAttention(Protocol):
    """Attention of one prepared batch."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v of the batch's tokens to the cache, then attend; called once per layer.

        q is [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], in the batch's row order; returns
        [tokens, heads, head_dim].
        """


class AttentionBackend(Protocol):
    """A way to compute attention; what depends on the batch but not on the layer is computed once, in `prepare`."""

    def prepare(self, batch: Batch, positions: NDArray[np.int64]) -> BatchAttention:
        """`positions` [tokens] is each token's index in its request, rows one after another."""


def allocate_kv_cache(model: ModelConfig, blocks: int, block_tokens: int, dtype: torch.dtype) -> KvCache:
    # Zeros, not empty: masked keys get weight 0, and 0 times the NaN of uninitialised memory would be NaN.
    shape = (blocks, 2, block_tokens, model.num_key_value_heads, model.head_dim)
    return [torch.zeros(shape, dtype=dtype) for _ in range(model.num_hidden_layers)]


@dataclass(slots=True)
class _DecodeGroup:
    """Decodes attended to in one call, rows `start` to `end` of the sorted decodes.

    `pages` are gathered; `mask` [rows, 1, 1, gathered tokens of a row] hides what a row must not see.
    """

    start: int
    end: int
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(slots=True)
class _Tile:
    """Queries `start` to `end` of the batch's tokens, over the keys `first` to `last` of the gathered ones."""

    start: int
    end: int
    first: int
    last: int
    mask: torch.Tensor


@dataclass(slots=True)
class _View:
    """What a batch sees through one sliding window: decodes in sorted `order`, then each chunk's pages and tiles."""

    order: torch.Tensor
    groups: list[_DecodeGroup]
    chunks: list[tuple[torch.Tensor, list[_Tile]]]


class SdpaAttention:
    """torch's scaled_dot_product_attention on gathered blocks: the backend that runs anywhere.

    Batches run one at a time: the gathered keys and values live in a buffer that the next call overwrites. A page is
    the keys or the values of a block: block b has pages 2b and 2b + 1.
    """

    def __init__(self, model: ModelConfig, cache: KvCache, max_model_tokens: int) -> None:
        block = cache[0][0]
        self.pages = [layer.flatten(0, 1) for layer in cache]
        self.windows = model.sliding_windows
        self.block_tokens = block.shape[1]
        self.group_blocks = max(1, _GROUP_BYTES // (block.numel() * block.element_size()))
        most_blocks = max(self.group_blocks, -(-max_model_tokens // self.block_tokens))
        # Allocated once: fresh memory of this size costs page faults on every call.
        self.scratch = torch.empty((2 * most_blocks, *block.shape[1:]), dtype=block.dtype)
        self.newest_column = max_model_tokens + self.block_tokens
        self.ramps = {window: self._ramp(window) for window in set(self.windows)}

    def prepare(self, batch: Batch, positions: NDArray[np.int64]) -> BatchAttention:
        rows = np.repeat(np.arange(len(batch.n_tokens)), batch.n_tokens)
        block_ids, offsets = batch.block_tables[rows, positions // self.block_tokens], positions % self.block_tokens
        slots = torch.from_numpy(block_ids * (2 * self.block_tokens) + offsets)
        return _SdpaBatch(self, slots, {window: self._view(batch, window) for window in self.ramps})

    def _ramp(self, window: int | None) -> torch.Tensor:
        """Mask of a query over keys in order of position, its own at `newest_column`, far enough to both sides."""
        distance = self.newest_column - torch.arange(2 * self.newest_column)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=self.scratch.dtype).masked_fill_(hidden, -torch.inf)

    def _mask(self, window: int | None, newest: NDArray[np.int64], n_keys: int) -> torch.Tensor:
        """[len(newest), n_keys]: row i is a query whose own key is number `newest[i]` of consecutive keys."""
        starts = torch.from_numpy(self.newest_column - newest)
        return self.ramps[window].unfold(0, n_keys, 1).index_select(0, starts)

    def _view(self, batch: Batch, window: int | None) -> _View:
        n = batch.n_decodes
        order, groups = self._decode_groups(batch.context[:n], batch.block_tables[:n], window)
        chunks = []
        start = n
        for row in range(n, len(batch.n_tokens)):
            context, n_tokens = int(batch.context[row]), int(batch.n_tokens[row])
            chunks.append(self._chunk(start, n_tokens, context, batch.block_tables[row], window))
            start += n_tokens
        return _View(order, groups, chunks)

    def _decode_groups(
        self, positions: NDArray[np.int64], tables: NDArray[np.int32], window: int | None
    ) -> tuple[torch.Tensor, list[_DecodeGroup]]:
        """Longest rows first, as many to a group as `group_blocks` holds when padded to the group's longest."""
        n = len(positions)
        if n == 0:
            return torch.empty(0, dtype=torch.int64), []
        first_block = np.zeros_like(positions)
        if window is not None:
            first_block = np.maximum(0, positions + 1 - window) // self.block_tokens
        n_blocks = positions // self.block_tokens + 1 - first_block
        order = np.argsort(-n_blocks, kind="stable")
        widths = n_blocks[order].tolist()
        columns = np.minimum(first_block[order, None] + np.arange(widths[0]), tables.shape[1] - 1)
        key_pages = 2 * tables[order[:, None], columns]
        pages = np.stack((key_pages, key_pages + 1))
        newest = (positions - first_block * self.block_tokens)[order]
        mask = self._mask(window, newest, widths[0] * self.block_tokens)[:, None, None]
        groups = []
        start = 0
        while start < n:
            width = widths[start]
            end = min(n, start + max(1, self.group_blocks // width))
            group_pages = torch.from_numpy(pages[:, start:end, :width].ravel())
            groups.append(_DecodeGroup(start, end, group_pages, mask[start:end, ..., : width * self.block_tokens]))
            start = end
        return torch.from_numpy(order), groups

    def _chunk(
        self, start: int, n_tokens: int, context: int, table: NDArray[np.int32], window: int | None
    ) -> tuple[torch.Tensor, list[_Tile]]:
        """A prefill chunk whose first token is number `start` of the batch: the pages it sees, and its tiles."""
        first_block = 0 if window is None else max(0, context + 1 - window) // self.block_tokens
        gathered_from = first_block * self.block_tokens
        tiles = []
        for offset in range(0, n_tokens, _TILE_TOKENS):
            size = min(_TILE_TOKENS, n_tokens - offset)
            position = context + offset
            first = 0 if window is None else max(0, position + 1 - window)
            mask = self._mask(window, position - first + np.arange(size), position + size - first)
            seen = first - gathered_from, position + size - gathered_from
            tiles.append(_Tile(start + offset, start + offset + size, *seen, mask))
        key_pages = 2 * table[first_block : (context + n_tokens - 1) // self.block_tokens + 1]
        return torch.from_numpy(np.concatenate((key_pages, key_pages + 1))), tiles


class _SdpaBatch:
    def __init__(self, backend: SdpaAttention, slots: torch.Tensor, views: dict[int | None, _View]) -> None:
        self.backend = backend
        self.key_slots = slots
        self.value_slots = slots + backend.block_tokens
        self.views = views

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        slots = self.backend.pages[layer].flatten(0, 1)
        slots.index_put_((self.key_slots,), k)
        slots.index_put_((self.value_slots,), v)
        view = self.views[self.backend.windows[layer]]
        out = q.new_empty(q.shape)
        if view.groups:
            self._attend_decodes(layer, q, view, out)
        for pages, tiles in view.chunks:
            keys, values = self._gather(layer, pages, 1)
            for tile in tiles:
                seen = slice(tile.first, tile.last)
                out[tile.start : tile.end] = F.scaled_dot_product_attention(
                    q[tile.start : tile.end].transpose(0, 1)[None],
                    keys[:, :, seen],
                    values[:, :, seen],
                    attn_mask=tile.mask,
                    enable_gqa=True,
                )[0].transpose(0, 1)
        return out

    def _attend_decodes(self, layer: int, q: torch.Tensor, view: _View, out: torch.Tensor) -> None:
        n, (n_heads, head_dim) = len(view.order), q.shape[1:]
        n_kv_heads = self.backend.scratch.shape[2]
        # The query heads that share a KV head pose as queries of one head, so that none is repeated.
        grouped = q.index_select(0, view.order).view(n, n_kv_heads, n_heads // n_kv_heads, head_dim)
        parts = []
        for group in view.groups:
            keys, values = self._gather(layer, group.pages, group.end - group.start)
            queries = grouped[group.start : group.end]
            parts.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask))
        out.index_copy_(0, view.order, torch.cat(parts).reshape(n, n_heads, head_dim))

    def _gather(self, layer: int, pages: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
        """Keys and values [rows, kv_heads, tokens, head_dim] of `pages`: all key pages, row by row, then the values."""
        scratch = self.backend.scratch[: len(pages)]
        torch.index_select(self.backend.pages[layer], 0, pages, out=scratch)
        return scratch.view(2, rows, -1, *scratch.shape[2:]).transpose(2, 3).unbind()
