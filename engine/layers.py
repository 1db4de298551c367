"""What transformer layers are made of; each part takes its parameters out of the weights that it is given."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from engine.model_config import ModelConfig
from engine.ops import HeadNorms, Ops
from engine.weights import Weights


@dataclass(slots=True)
class Linear:
    """y = x W + b, with W [in, out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += x W + b, in place."""
        y.addmm_(x, self.weight)
        if self.bias is not None:
            y.add_(self.bias)


class Norm(Protocol):
    def __call__(self, residual: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """residual += y in place, where there is a y, and then the norm of residual [tokens, hidden]."""


@dataclass(slots=True)
class RmsNorm:
    weight: torch.Tensor
    eps: float
    ops: Ops

    def __call__(self, residual: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            return self.ops.rms_norm(residual, self.weight, self.eps)
        return self.ops.add_rms_norm(residual, y, self.weight, self.eps)


@dataclass(slots=True)
class LayerNorm:
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, residual: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is not None:
            residual.add_(y)
        return F.layer_norm(residual, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class Layer:
    """`up` is the gate and the up projection where the family has a gate.

    Without `mlp_norm` the MLP reads what attention read.
    """

    input_norm: Norm
    qkv: Linear
    head_norms: HeadNorms | None
    o: Linear
    mlp_norm: Norm | None
    up: Linear
    down: Linear


def take_layer(weights: Weights, layer: int, model: ModelConfig, ops: Ops) -> Layer:
    """Layer number `layer` of the whole model."""

    def linear(name: str) -> Linear:
        name = f"layers.{layer}.{name}"
        return Linear(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None))

    def norm(name: str) -> Norm:
        return take_norm(weights, f"layers.{layer}.{name}", model, ops)

    def head_norm(name: str) -> torch.Tensor:
        return weights.pop(f"layers.{layer}.{name}.weight")

    return Layer(
        input_norm=norm("input_norm"),
        qkv=linear("qkv"),
        head_norms=HeadNorms(head_norm("q_norm"), head_norm("k_norm"), model.norm_eps) if model.qk_norm else None,
        o=linear("o"),
        mlp_norm=norm("mlp_norm") if model.mlp_norm else None,
        up=linear("up"),
        down=linear("down"),
    )


def take_norm(weights: Weights, name: str, model: ModelConfig, ops: Ops) -> Norm:
    if model.layer_norm:
        return LayerNorm(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias"), model.norm_eps)
    return RmsNorm(weights.pop(f"{name}.weight"), model.norm_eps, ops)
