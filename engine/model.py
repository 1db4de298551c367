"""The transformer itself: Llama, Mistral, Qwen2 and Qwen3 over flat batches and a paged KV cache."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention import BatchAttention
from engine.model_config import ModelConfig, Rope
from engine.weights import Weights


@dataclass(slots=True)
class Linear:
    """y = x W + b, with W stored [in, out]: one row at a time, as in decodes, that order is read a third faster."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += x W + b, in place."""
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


@dataclass(slots=True)
class Layer:
    """Weights of one layer; `qkv` and `gate_up` are projections that share an input, fused into single GEMMs."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Transformer:
    """A decoder-only model; `weights` (Hugging Face names, one dtype) are emptied into it, so that none is held twice.

    `max_model_tokens` is the longest sequence that `forward` will be given.
    """

    def __init__(self, model: ModelConfig, weights: Weights, max_model_tokens: int) -> None:
        self.model = model
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.layers = [_take_layer(weights, layer, model) for layer in range(model.num_hidden_layers)]
        self.norm = weights.pop("model.norm.weight")
        head = self.embedding if model.tie_word_embeddings else weights.pop("lm_head.weight")
        self.head = head.t() if model.tie_word_embeddings else head.t().contiguous()
        self.cos, self.sin = rope_tables(model.rope, model.head_dim, max_model_tokens, self.embedding.dtype)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: BatchAttention, sampled: torch.Tensor
    ) -> torch.Tensor:
        """Logits [rows, vocab] of the tokens whose indices `sampled` [rows] names; ids and positions are [tokens]."""
        x = self.embedding.index_select(0, token_ids)
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            attended = self._attend(index, layer, x, cos, sin, attention)
            if index == last:
                # From here on no token reads another, so only those that yield a logit go on.
                attended, x = attended.index_select(0, sampled), x.index_select(0, sampled)
            layer.o.add_to(x, attended)
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            layer.down.add_to(x, F.silu(gate, inplace=True).mul_(up))
        return torch.mm(self._norm(x, self.norm), self.head)

    def _attend(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: BatchAttention,
    ) -> torch.Tensor:
        n_heads = self.model.num_attention_heads
        n_rotated = n_heads + self.model.num_key_value_heads
        heads = layer.qkv(self._norm(x, layer.input_norm)).view(len(x), -1, self.model.head_dim)
        q_and_k, v = heads[:, :n_rotated], heads[:, n_rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q_and_k[:, :n_heads], layer.q_norm), self._norm(q_and_k[:, n_heads:], layer.k_norm)
            q_and_k = torch.cat((q, k), dim=1)
        rotated = _rotate(q_and_k, cos, sin)
        q, k = rotated[:, :n_heads], rotated[:, n_heads:]
        return attention.attend(index, q, k, v).flatten(1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.model.rms_norm_eps)


def rope_tables(rope: Rope, head_dim: int, n_positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [n_positions, 1, head_dim]; the first half of sin is negated, as the rotation needs it.

    Angles are in float32, as the models were trained: exact ones would differ from theirs at far positions.
    """
    frequencies, scale = _rope_frequencies(rope, head_dim)
    angles = torch.arange(n_positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def _rope_frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per position [head_dim / 2], and the factor on cos and sin."""
    base = 1.0 / rope.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.rope_type == "linear":
        return base / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, base), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, base, head_dim), _yarn_scale(rope)
    return base, 1.0


def _llama3_frequencies(rope: Rope, base: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    turns = rope.original_max_position_embeddings * base / (2 * math.pi)  # over the length of pretraining
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * base / rope.factor + kept * base


def _yarn_frequencies(rope: Rope, base: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): as llama3, but blended linearly over the dimensions instead of the frequencies."""

    def dimension_of(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    stretched = ((torch.arange(len(base), dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return stretched * base / rope.factor + (1 - stretched) * base


def _yarn_scale(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _take_layer(weights: Weights, layer: int, model: ModelConfig) -> Layer:
    prefix = f"model.layers.{layer}."

    def linear(*names: str) -> Linear:
        weight = torch.cat([weights.pop(f"{prefix}{name}.weight") for name in names])
        biases = [weights.pop(f"{prefix}{name}.bias") for name in names if f"{prefix}{name}.bias" in weights]
        return Linear(weight.t().contiguous(), torch.cat(biases) if biases else None)

    def norm(name: str) -> torch.Tensor:
        return weights.pop(f"{prefix}{name}.weight")

    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=norm("self_attn.q_norm") if model.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if model.qk_norm else None,
        o=linear("self_attn.o_proj"),
        post_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
