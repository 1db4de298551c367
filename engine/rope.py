"""Rotary position embedding: the tables of cosines and sines, plain and stretched."""

import math

import torch

from engine.model_config import Rope


def rope_tables(rope: Rope, head_dim: int, n_positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [n_positions, head_dim] on the CPU; the first half of sin is negated, as the rotation needs it.

    Angles are in float32, as the models were trained: exact ones would differ from theirs at far positions.
    """
    frequencies, scale = _frequencies(rope, head_dim)
    angles = torch.arange(n_positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
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
