"""The small operations between a layer's matrix products, which a GPU wants fused; here by torch's own operators."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class HeadNorms:
    """RMS norms that some families apply to each head's query and key before the rotation; weights are [head_dim]."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


class Ops(Protocol):
    """Tensors are contiguous and of one dtype (float32, bfloat16, float16); statistics are taken in float32."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x²) + eps) * weight, over the rows of x [tokens, hidden] (arXiv 1910.07467)."""

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """residual += x in place, both [tokens, hidden]; returns rms_norm(residual)."""

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [tokens, n] of gate_up [tokens, 2n], whose memory may be reused for it."""

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
        """Norm the heads if asked, rotate queries and keys, put keys and values in the cache; returns q.

        qkv is [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys, values; its memory may be reused. cos and sin
        are [tokens, head_dim], the first half of sin negated. `cache_layer` is [blocks, 2, block_tokens, kv_heads,
        head_dim]; `kv_slots` int64 [tokens] as in DeviceInputs, negative ones skipped. q is [tokens, heads, head_dim].
        """


class TorchOps:
    """Any device; not for CUDA graphs, since `rotate_and_store` looks at the slots."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(residual.add_(x), weight.shape, weight, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate, inplace=True).mul_(up)

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
        per_head = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
        q_and_k, v = per_head[:, :-kv_heads], per_head[:, -kv_heads:]
        if norms is not None:
            q = self.rms_norm(q_and_k[:, :heads], norms.q_weight, norms.eps)
            k = self.rms_norm(q_and_k[:, heads:], norms.k_weight, norms.eps)
            q_and_k = torch.cat((q, k), dim=1)
        rotated = _rotate(q_and_k, cos[:, None], sin[:, None])
        _store(cache_layer, kv_slots, rotated[:, heads:], v)
        return rotated[:, :heads]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def _store(cache_layer: torch.Tensor, kv_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if int(kv_slots.min()) < 0:
        kept = kv_slots >= 0
        kv_slots, k, v = kv_slots[kept], k[kept], v[kept]
    block_tokens = cache_layer.shape[2]
    # A block's keys are followed by its values, so that half of the rows before a block's keys are values.
    key_rows = torch.add(kv_slots, kv_slots // block_tokens, alpha=block_tokens)
    rows = cache_layer.flatten(0, 2)
    rows.index_put_((key_rows,), k)
    rows.index_put_((key_rows + block_tokens,), v)


def choose_ops(device: torch.device) -> Ops:
    """Fused kernels on CUDA, torch's operators elsewhere."""
    if device.type != "cuda":
        return TorchOps()
    from engine.triton_ops import TritonOps  # noqa: PLC0415 (triton comes with CUDA builds of torch only)

    return TritonOps()
