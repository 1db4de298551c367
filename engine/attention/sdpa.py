"""torch's scaled_dot_product_attention on gathered blocks: the backend that runs anywhere, in any dtype."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from engine.attention.backend import BLOCK_TOKENS, EagerOnly, KvCache
from engine.device_inputs import DeviceInputs
from engine.step_input import Int32, StepInput

# Keys and values of the decodes that one call handles. Gathered and attended to inside the L2 cache of a core they
# cost a fraction of what they cost beyond it; this also bounds what padding to the longest row can waste.
_GROUP_BYTES = 1 << 20
# Queries of a prefill chunk that one call handles: each tile sees only the keys up to its own last query.
_TILE_TOKENS = 64


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


class SdpaAttention(EagerOnly):
    """Batches run one at a time: the gathered keys and values live in a buffer that the next call overwrites.

    A page is the keys or the values of a block: block b has pages 2b and 2b + 1.
    """

    name = "sdpa"
    block_tokens = BLOCK_TOKENS["sdpa"]

    def __init__(self, cache: KvCache, windows: list[int | None], max_model_tokens: int) -> None:
        block = cache[0][0]
        self.cache = cache
        self.pages = [layer.flatten(0, 1) for layer in cache]
        self.windows = windows
        self.page_tokens = block.shape[1]
        self.group_blocks = max(1, _GROUP_BYTES // (block.numel() * block.element_size()))
        most_blocks = max(self.group_blocks, -(-max_model_tokens // self.page_tokens))
        # Allocated once: fresh memory of this size costs page faults on every call.
        self.scratch = block.new_empty((2 * most_blocks, *block.shape[1:]))
        self.newest_column = max_model_tokens + self.page_tokens
        self.ramps = {window: self._ramp(window) for window in set(self.windows)}

    def prepare(self, step: StepInput, inputs: DeviceInputs) -> "_SdpaBatch":
        return _SdpaBatch(self, {window: self._view(step, window) for window in self.ramps})

    def _on_device(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.scratch.device)

    def _ramp(self, window: int | None) -> torch.Tensor:
        """Mask of a query over keys in order of position, its own at `newest_column`, far enough to both sides."""
        distance = self.newest_column - torch.arange(2 * self.newest_column, device=self.scratch.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return self.scratch.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    def _mask(self, window: int | None, newest: NDArray[np.integer[Any]], n_keys: int) -> torch.Tensor:
        """[len(newest), n_keys]: row i is a query whose own key is number `newest[i]` of consecutive keys."""
        starts = self._on_device(self.newest_column - newest)
        return self.ramps[window].unfold(0, n_keys, 1).index_select(0, starts)

    def _view(self, step: StepInput, window: int | None) -> _View:
        n = step.n_decodes
        order, groups = self._decode_groups(step.context[:n], step.block_tables[:n], window)
        chunks = []
        start = n
        for row in range(n, len(step.n_tokens)):
            context, n_tokens = int(step.context[row]), int(step.n_tokens[row])
            chunks.append(self._chunk(start, n_tokens, context, step.block_tables[row], window))
            start += n_tokens
        return _View(order, groups, chunks)

    def _decode_groups(
        self, positions: Int32, tables: Int32, window: int | None
    ) -> tuple[torch.Tensor, list[_DecodeGroup]]:
        """Longest rows first, as many to a group as `group_blocks` holds when padded to the group's longest."""
        n = len(positions)
        if n == 0:
            return torch.empty(0, dtype=torch.int64), []
        first_block = np.zeros_like(positions)
        if window is not None:
            first_block = np.maximum(0, positions + 1 - window) // self.page_tokens
        n_blocks = positions // self.page_tokens + 1 - first_block
        order = np.argsort(-n_blocks, kind="stable")
        widths = n_blocks[order].tolist()
        columns = np.minimum(first_block[order, None] + np.arange(widths[0]), tables.shape[1] - 1)
        key_pages = 2 * tables[order[:, None], columns]
        pages = np.stack((key_pages, key_pages + 1))
        newest = (positions - first_block * self.page_tokens)[order]
        mask = self._mask(window, newest, widths[0] * self.page_tokens)[:, None, None]
        groups = []
        start = 0
        while start < n:
            width = widths[start]
            end = min(n, start + max(1, self.group_blocks // width))
            group_pages = self._on_device(pages[:, start:end, :width].ravel())
            groups.append(_DecodeGroup(start, end, group_pages, mask[start:end, ..., : width * self.page_tokens]))
            start = end
        return self._on_device(order), groups

    def _chunk(
        self, start: int, n_tokens: int, context: int, table: Int32, window: int | None
    ) -> tuple[torch.Tensor, list[_Tile]]:
        """A prefill chunk whose first token is number `start` of the batch: the pages it sees, and its tiles."""
        first_block = 0 if window is None else max(0, context + 1 - window) // self.page_tokens
        gathered_from = first_block * self.page_tokens
        tiles = []
        for offset in range(0, n_tokens, _TILE_TOKENS):
            size = min(_TILE_TOKENS, n_tokens - offset)
            position = context + offset
            first = 0 if window is None else max(0, position + 1 - window)
            mask = self._mask(window, position - first + np.arange(size), position + size - first)
            seen = first - gathered_from, position + size - gathered_from
            tiles.append(_Tile(start + offset, start + offset + size, *seen, mask))
        key_pages = 2 * table[first_block : (context + n_tokens - 1) // self.page_tokens + 1]
        return self._on_device(np.concatenate((key_pages, key_pages + 1))), tiles


class _SdpaBatch:
    def __init__(self, backend: SdpaAttention, views: dict[int | None, _View]) -> None:
        self.backend = backend
        self.cache = backend.cache
        self.views = views

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
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
        return out.flatten(1)

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
