"""FlashInfer on the paged cache: its kernels are planned on the host, once per batch, for any mix of rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention.backend import BLOCK_TOKENS, EagerOnly, KvCache
from engine.device_inputs import DeviceInputs
from engine.step_input import StepInput

_LEAST_WORKSPACE_BYTES = 128 << 20  # FlashInfer's recommendation
_QUERY_TILE = 128  # FlashInfer's largest
_SPLIT_PAGES = 16  # of one request, that it splits among programs, whose results another kernel merges


class FlashInferAttention(EagerOnly):
    """Decode-only batches by its decode kernel on tensor cores, others by its prefill kernel.

    A plan is copied to the device from a host buffer of its wrapper, asynchronously: a wrapper must not be planned
    again before its last batch has started. Hence as many in turn as there are batches in flight, and one.
    """

    name = "flashinfer"
    block_tokens = BLOCK_TOKENS["flashinfer"]

    def __init__(self, cache: KvCache, windows: list[int | None], heads: int, depth: int) -> None:
        import flashinfer  # noqa: PLC0415 (an optional package)

        _, _, self.page_tokens, self.kv_heads, self.head_dim = cache[0].shape
        self.cache = cache
        self.windows = windows
        self.heads = heads
        workspace = torch.empty(self._workspace_bytes(), dtype=torch.uint8, device=cache[0].device)
        self.decode = [
            {
                window: flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
                for window in set(windows)
            }
            for _ in range(depth + 1)
        ]
        self.prefill = [
            {window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD") for window in set(windows)}
            for _ in range(depth + 1)
        ]
        self.turn = 0
        self._load_decode()

    def prepare(self, step: StepInput, inputs: DeviceInputs) -> "_FlashInferBatch":
        ends = step.context + step.n_tokens
        n_pages = -(-ends // self.page_tokens)
        # Host arrays: the plan reads them there, and would fetch tensors of the device.
        page_starts = _starts(n_pages)
        pages = torch.from_numpy(step.block_tables[np.arange(step.block_tables.shape[1]) < n_pages[:, None]])
        last_page_tokens = torch.from_numpy((ends - (n_pages - 1) * self.page_tokens).astype(np.int32))
        pages = pages.pin_memory().to(self.cache[0].device, non_blocking=True)
        self.turn = (self.turn + 1) % len(self.prefill)
        wrappers = (self.decode if inputs.decodes_only else self.prefill)[self.turn]
        kv = page_starts, pages, last_page_tokens
        for window, wrapper in wrappers.items():
            if inputs.decodes_only:
                wrapper.plan(*kv, *self._shape(), **self._options(window))
            else:
                wrapper.plan(_starts(step.n_tokens), *kv, *self._shape(), causal=True, **self._options(window))
        return _FlashInferBatch(self, wrappers)

    def _load_decode(self) -> None:
        """Attend to some pages: the engine sizes its memory by prefills, and what loads kernels must not be timed."""
        pages = torch.zeros(_SPLIT_PAGES, dtype=torch.int32, device=self.cache[0].device)
        kv = _starts(np.full(1, _SPLIT_PAGES)), pages, torch.full((1,), self.page_tokens, dtype=torch.int32)
        q = self.cache[0].new_zeros(1, self.heads, self.head_dim)
        for window, wrapper in self.decode[0].items():
            wrapper.plan(*kv, *self._shape(), **self._options(window))
            wrapper.run(q, self.cache[0])

    def _workspace_bytes(self) -> int:
        """For partial results in float32: keys are split among at most two programs a multiprocessor."""
        programs = 2 * torch.cuda.get_device_properties(self.cache[0].device).multi_processor_count
        queries = self.heads * (programs // self.kv_heads) * _QUERY_TILE
        return max(_LEAST_WORKSPACE_BYTES, queries * (self.head_dim + 1) * 4 + 1024)

    def _shape(self) -> tuple[int, ...]:
        return self.heads, self.kv_heads, self.head_dim, self.page_tokens

    def _options(self, window: int | None) -> dict[str, Any]:
        dtype = self.cache[0].dtype
        return {"window_left": -1 if window is None else window - 1, "q_data_type": dtype, "kv_data_type": dtype}


@dataclass(slots=True)
class _FlashInferBatch:
    backend: FlashInferAttention
    wrappers: dict[int | None, Any]

    @property
    def cache(self) -> KvCache:
        return self.backend.cache

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        wrapper = self.wrappers[self.backend.windows[layer]]
        attended: torch.Tensor = wrapper.run(q, self.backend.cache[layer])
        return attended.flatten(1)


def _starts(counts: np.ndarray[Any, np.dtype[np.integer[Any]]]) -> torch.Tensor:
    """int32 [len(counts) + 1]: 0, then the running sums."""
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
