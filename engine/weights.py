"""The tensors of a model by their Hugging Face names: from safetensors files, strictly, or random from a seed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from engine.model_config import ModelConfig

Weights = dict[str, torch.Tensor]

_INIT_STD = 0.02
_NAMES_SHOWN = 5


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `model`; matrices are [out features, in features] as on disk."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_hidden_layers):
        matrices = {
            "self_attn.q_proj": (q_size, hidden, model.qkv_bias),
            "self_attn.k_proj": (kv_size, hidden, model.qkv_bias),
            "self_attn.v_proj": (kv_size, hidden, model.qkv_bias),
            "self_attn.o_proj": (hidden, q_size, model.o_bias),
            "mlp.gate_proj": (inner, hidden, model.mlp_bias),
            "mlp.up_proj": (inner, hidden, model.mlp_bias),
            "mlp.down_proj": (hidden, inner, model.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if model.qk_norm:
            norms |= {"self_attn.q_norm": model.head_dim, "self_attn.k_norm": model.head_dim}
        for name, (n_out, n_in, bias) in matrices.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = (n_out,)
        for name, size in norms.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def dummy_weights(model: ModelConfig, dtype: torch.dtype, seed: int) -> Weights:
    """Random weights, the same for the same seed whatever the dtype: normal with deviation 0.02, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in tensor_shapes(model).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=dtype)
        else:
            weights[name] = torch.empty(shape).normal_(std=_INIT_STD, generator=generator).to(dtype)
    return weights


def load_safetensors(folder: Path, model: ModelConfig, dtype: torch.dtype) -> Weights:
    """Every tensor of `model` from model.safetensors, or from the shards of model.safetensors.index.json.

    Raises ValueError naming what is wrong: files absent or damaged, tensors missing, unexpected or of another shape.
    """
    expected = tensor_shapes(model)
    weights: Weights = {}
    unexpected: list[str] = []
    misshapen: list[str] = []
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    if _is_redundant(name, model):
                        continue
                    if name not in expected:
                        unexpected.append(name)
                    elif (shape := tuple(file.get_slice(name).get_shape())) != expected[name]:
                        misshapen.append(f"{name} is {list(shape)} where config.json gives {list(expected[name])}")
                    else:
                        weights[name] = file.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): download it again") from error
    faults = [("have another shape", misshapen), ("are unexpected", unexpected)]
    if not misshapen:
        faults.append(("are missing", [name for name in expected if name not in weights]))
    problems = [f"{len(names)} tensors {what}: {_some(names)}" for what, names in faults if names]
    if problems:
        raise ValueError(f"{folder} does not hold this {model.model_type}: {'; '.join(problems)}. Check config.json")
    return weights


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names: Iterable[str] = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(msgspec.json.decode(index.read_bytes(), type=dict[str, Any])["weight_map"].values()))
        except (msgspec.MsgspecError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} has no readable weight_map: download it again") from error
    paths = [folder / name for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {_some(absent)}: only safetensors are read; convert or complete the model")
    return paths


def _is_redundant(name: str, model: ModelConfig) -> bool:
    """Old checkpoints carry the rope frequencies, and some tied ones a copy of the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (model.tie_word_embeddings and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
