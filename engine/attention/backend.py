"""What every attention backend offers, and the paged KV cache that they share."""

from typing import Protocol

import torch

from engine.device_inputs import DeviceInputs
from engine.model_config import ModelConfig
from engine.shard import Shard
from engine.step_input import StepInput

KvCache = list[torch.Tensor]
"""One tensor for each of the rank's layers, [blocks, 2, block_tokens, kv_heads, head_dim]: keys, then values."""

BLOCK_TOKENS = {
    "flash-attn-4": 128,  # its tile of keys, so that one bulk copy loads a page
    "flash-attn-2": 256,  # its paged kernels need a multiple of this
    "flashinfer": 16,
    "sdpa": 16,
}
"""Every backend, the fastest first, and the block size that it is fastest with."""


class BatchAttention(Protocol):
    """Attention of one prepared batch."""

    @property
    def cache(self) -> KvCache:
        """The backend's."""

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [tokens, heads, head_dim] to [tokens, heads * head_dim]; called once for each layer of the rank, from 0.

        The keys and values of the batch's own tokens are in `cache` already.
        """


class AttentionBackend(Protocol):
    """A way to compute attention; what depends on the batch but not on the layer is computed once, in `prepare`.

    `captures`: may run inside a CUDA graph. `block_tokens`: the blocks that it is fastest with.
    """

    name: str
    captures: bool
    block_tokens: int

    def prepare(self, step: StepInput, inputs: DeviceInputs) -> BatchAttention:
        """`inputs` is `step` on the device; batches run in the order in which they are prepared."""

    def capture(self, inputs: DeviceInputs) -> BatchAttention:
        """The same over static `inputs`, to be called within the capture: what it launches is replayed with the graph.

        Only where `captures`.
        """


class EagerOnly:
    """Of backends that read the batch on the host."""

    captures = False

    def capture(self, inputs: DeviceInputs) -> BatchAttention:
        raise AssertionError(f"{type(self).__name__} does not run inside CUDA graphs")


def allocate_kv_cache(
    model: ModelConfig, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device, shard: Shard
) -> KvCache:
    """The rank's layers and heads, as zeros: masked keys get weight 0, and 0 times the NaN of fresh memory is NaN."""
    kv_heads = len(shard.kv_heads(model.num_key_value_heads))
    shape = (blocks, 2, block_tokens, kv_heads, model.head_dim)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in shard.layers(model.num_hidden_layers)]


def layer_windows(model: ModelConfig, shard: Shard) -> list[int | None]:
    """The sliding windows of the rank's layers."""
    return [model.sliding_windows[layer] for layer in shard.layers(model.num_hidden_layers)]
