"""A rank's parameters: from safetensors files, strictly, or random from a seed."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from engine.layout import Cut, Source, checkpoint_tensors
from engine.model_config import ModelConfig
from engine.shard import WHOLE, Shard

Weights = dict[str, torch.Tensor]
"""A rank's slices by the names of engine.layout, fused: matrices are [in, out] views, the embedding is [ids, hidden].

On a GPU they lie in memory as [out, in], the order of cuBLAS's fastest kernels; on a CPU as [in, out], since one row at
a time, as in decodes, that order is read a third faster.
"""

_CPU = torch.device("cpu")
_INIT_STD = 0.02
_NAMES_SHOWN = 5


def dummy_weights(
    model: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device = _CPU, shard: Shard = WHOLE
) -> Weights:
    """Random weights: normal with deviation 0.02, norms 1; the same for the same seed whatever the dtype and shards.

    Each tensor is drawn whole, from a generator of its own, and then cut: no rank ever holds more than one of them.
    Raises ValueError when the ranks cannot share the model.
    """
    tensors = checkpoint_tensors(model, shard)
    weights, targets = _allocate(tensors, model, dtype, device, shard)
    for name, source in tensors.items():
        if source.is_norm_weight:
            targets[name].fill_(1.0)
        else:
            generator = torch.Generator(device).manual_seed(_tensor_seed(seed, name))
            drawn = torch.empty(source.shape, device=device).normal_(std=_INIT_STD, generator=generator)
            targets[name].copy_(_cut(drawn, source.cut, model, shard))
    return weights


def load_safetensors(
    folder: Path, model: ModelConfig, dtype: torch.dtype, device: torch.device = _CPU, shard: Shard = WHOLE
) -> Weights:
    """The shard's part of model.safetensors, or of the files in model.safetensors.index.json.

    The checkpoint is judged whole, on every rank. Raises ValueError naming what is wrong: files absent or damaged,
    tensors missing, unexpected or of another shape, or ranks that cannot share the model.
    """
    expected, needed = checkpoint_tensors(model), checkpoint_tensors(model, shard)
    weights, targets = _allocate(needed, model, dtype, device, shard)
    seen: set[str] = set()
    unexpected: list[str] = []
    misshapen: list[str] = []
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    if _is_redundant(name, model):
                        continue
                    seen.add(name)
                    if name not in expected:
                        unexpected.append(name)
                    elif (shape := tuple(file.get_slice(name).get_shape())) != expected[name].shape:
                        misshapen.append(
                            f"{name} is {list(shape)} where config.json gives {list(expected[name].shape)}"
                        )
                    elif name in needed:
                        targets[name].copy_(_cut(file.get_tensor(name), needed[name].cut, model, shard))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): download it again") from error
    missing = [name for name in expected if name not in seen]
    faults = [("have another shape", misshapen), ("are unexpected", unexpected), ("are missing", missing)]
    problems = [f"{len(names)} tensors {what}: {_some(names)}" for what, names in faults if names]
    if problems:
        raise ValueError(f"{folder} does not hold this {model.model_type}: {'; '.join(problems)}. Check config.json")
    return weights


def _allocate(
    tensors: dict[str, Source], model: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard
) -> tuple[Weights, Weights]:
    """The parameters, and by checkpoint name the view [out, in] or [out] into which each tensor's slice is copied."""
    shapes: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, source in tensors.items():
        whole = torch.empty(source.shape, dtype=dtype, device="meta")
        shapes[source.parameter][name] = _cut(whole, source.cut, model, shard).shape
    weights: Weights = {}
    targets: Weights = {}
    for parameter, parts in shapes.items():
        n_out, *n_in = (sum(shape[0] for shape in parts.values()), *next(iter(parts.values()))[1:])
        is_matrix = bool(n_in) and parameter != "embedding.weight"
        if is_matrix and device.type == "cpu":
            fused = torch.empty((*n_in, n_out), dtype=dtype, device=device).t()
        else:
            fused = torch.empty((n_out, *n_in), dtype=dtype, device=device)
        weights[parameter] = fused.t() if is_matrix else fused
        start = 0
        for name, shape in parts.items():
            targets[name] = fused[start : start + shape[0]]
            start += shape[0]
    return weights, targets


def _cut(tensor: torch.Tensor, cut: Cut, model: ModelConfig, shard: Shard) -> torch.Tensor:
    """The rank's slice of `tensor` [out, in] or [out]."""
    n_heads, n_kv_heads = model.num_attention_heads, model.num_key_value_heads
    if cut is Cut.HEADS:
        tensor = _heads(tensor.view(n_heads, model.head_dim, *tensor.shape[1:]), shard.heads(n_heads))
    elif cut is Cut.KV_HEADS:
        tensor = _heads(tensor.view(n_kv_heads, model.head_dim, *tensor.shape[1:]), shard.kv_heads(n_kv_heads))
    elif cut is Cut.FALCON_QKV:
        groups = tensor.view(n_kv_heads, n_heads // n_kv_heads + 2, model.head_dim, *tensor.shape[1:])
        q = _heads(groups[:, :-2].flatten(0, 1), shard.heads(n_heads))
        k, v = (_heads(groups[:, place], shard.kv_heads(n_kv_heads)) for place in (-2, -1))
        tensor = torch.cat((q, k, v))
    elif cut is Cut.OUT:
        share = shard.share(len(tensor), "features of the MLP")
        tensor = tensor[share.start : share.stop]
    elif cut is Cut.IN:
        share = shard.share(tensor.shape[1], "features of the MLP or the attention")
        tensor = tensor[:, share.start : share.stop]
    elif cut is Cut.FIRST_RANK and shard.tp_rank > 0:
        tensor = torch.zeros_like(tensor)
    elif cut is Cut.VOCABULARY:
        ids = shard.vocabulary(len(tensor))
        padding = shard.vocabulary_width(len(tensor)) - len(ids)
        tensor = F.pad(tensor[ids.start : ids.stop], (0, 0, 0, padding))
    return tensor


def _heads(per_head: torch.Tensor, heads: range) -> torch.Tensor:
    return per_head[heads.start : heads.stop].flatten(0, 1)


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


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
