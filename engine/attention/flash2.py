"""flash-attn 2 on the paged cache."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from engine.attention.backend import BLOCK_TOKENS, KvCache
from engine.device_inputs import DeviceInputs
from engine.step_input import StepInput


class FlashAttention2:
    """Decodes by the split-KV kernel, chunks by the varlen kernel: together in one varlen call decodes are slow."""

    name = "flash-attn-2"
    captures = True
    block_tokens = BLOCK_TOKENS["flash-attn-2"]

    def __init__(self, cache: KvCache, windows: list[int | None]) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: PLC0415 (an optional package)

        self.varlen = partial(flash_attn_varlen_func, causal=True)
        self.decode = partial(flash_attn_with_kvcache, causal=True)
        self.cache = cache
        self.keys = [layer[:, 0] for layer in cache]
        self.values = [layer[:, 1] for layer in cache]
        self.windows = [(-1, -1) if window is None else (window - 1, 0) for window in windows]

    def prepare(self, step: StepInput, inputs: DeviceInputs) -> "_Batch2":
        return self._batch(inputs, inputs.n_decodes)

    def capture(self, inputs: DeviceInputs) -> "_Batch2":
        return self._batch(inputs, len(inputs.context_ends) if inputs.decodes_only else 0)

    def _batch(self, inputs: DeviceInputs, n_decodes: int) -> "_Batch2":
        key_starts = F.pad(inputs.context_ends[n_decodes:].cumsum(0, dtype=torch.int32), (1, 0))
        return _Batch2(self, inputs, n_decodes, inputs.query_starts[n_decodes:] - n_decodes, key_starts)


@dataclass(slots=True)
class _Batch2:
    """The rows after the decodes have queries from `query_starts` on, and keys from `key_starts`.

    The latter are where their keys would start if they lay one after another.
    """

    backend: FlashAttention2
    inputs: DeviceInputs
    n_decodes: int
    query_starts: torch.Tensor
    key_starts: torch.Tensor

    @property
    def cache(self) -> KvCache:
        return self.backend.cache

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        n, backend, inputs = self.n_decodes, self.backend, self.inputs
        keys, values, window = backend.keys[layer], backend.values[layer], backend.windows[layer]
        parts = []
        if n:
            decoded = backend.decode(
                q[:n, None],
                keys,
                values,
                cache_seqlens=inputs.context_ends[:n],
                block_table=inputs.block_tables[:n],
                window_size=window,
            )
            parts.append(decoded[:, 0])
        if n < len(inputs.context_ends):
            attended = backend.varlen(
                q[n:],
                keys,
                values,
                self.query_starts,
                self.key_starts,
                inputs.max_query_tokens,
                inputs.max_context_tokens,
                window_size=window,
                block_table=inputs.block_tables[n:],
            )
            parts.append(attended)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
