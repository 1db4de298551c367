"""Which tensors the checkpoints of each family hold, the parameters they become, and how tensor ranks cut them.

Parameters have the same names for every family: `embedding`, `layers.N.{input_norm, qkv, q_norm, k_norm, o, mlp_norm,
up, down}`, `norm` and `head`, each with `.weight` and some with `.bias`. Projections that share an input are one
parameter: `qkv` is queries, keys, values; `up` is the gate and the up projection where there is a gate.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from engine.model_config import ModelConfig
from engine.shard import WHOLE, Shard


class Cut(Enum):
    """Which slice of a tensor [out, in] a tensor rank keeps."""

    WHOLE = auto()
    HEADS = auto()  # the outputs of its attention heads
    KV_HEADS = auto()  # the outputs of its key-value heads
    FALCON_QKV = auto()  # both, from [kv_heads, heads / kv_heads queries, a key, a value]; sorted into q, k, v
    OUT = auto()  # its share of the outputs
    IN = auto()  # its share of the inputs: the ranks' results are then summed
    FIRST_RANK = auto()  # the bias of such a sum: the first rank has it, the others have zeros
    VOCABULARY = auto()  # the rows of its token ids, zeros past the last


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a checkpoint: its shape there, and the parameter whose outputs, or next outputs, it gives."""

    parameter: str
    shape: tuple[int, ...]
    cut: Cut

    @property
    def is_norm_weight(self) -> bool:
        return self.parameter.endswith("norm.weight")


def checkpoint_tensors(model: ModelConfig, shard: Shard = WHOLE) -> dict[str, Source]:
    """By name, every tensor that the stage of `shard` needs; those of one parameter in the order they take in it."""
    falcon = model.model_type == "falcon"
    body, embedding, layers, norm = (
        ("transformer", "word_embeddings", "h", "ln_f") if falcon else ("model", "embed_tokens", "layers", "norm")
    )
    of_layer = _falcon_layer(model) if falcon else _llama_layer(model)
    vocabulary = (model.vocab_size, model.hidden_size)
    tensors: dict[str, Source] = {}
    if shard.is_first:
        tensors[f"{body}.{embedding}.weight"] = Source("embedding.weight", vocabulary, Cut.VOCABULARY)
    elif shard.is_last and model.tie_word_embeddings:
        tensors[f"{body}.{embedding}.weight"] = Source("head.weight", vocabulary, Cut.VOCABULARY)
    for layer in shard.layers(model.num_hidden_layers):
        for name, source in of_layer.items():
            tensors[f"{body}.{layers}.{layer}.{name}"] = replace(source, parameter=f"layers.{layer}.{source.parameter}")
    if shard.is_last:
        tensors |= _norm(f"{body}.{norm}", "norm", model.hidden_size, model.layer_norm)
        if not model.tie_word_embeddings:
            tensors["lm_head.weight"] = Source("head.weight", vocabulary, Cut.VOCABULARY)
    return tensors


def _llama_layer(model: ModelConfig) -> dict[str, Source]:
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    tensors = (
        _norm("input_layernorm", "input_norm", hidden)
        | _linear("self_attn.q_proj", "qkv", (q_size, hidden), Cut.HEADS, model.qkv_bias)
        | _linear("self_attn.k_proj", "qkv", (kv_size, hidden), Cut.KV_HEADS, model.qkv_bias)
        | _linear("self_attn.v_proj", "qkv", (kv_size, hidden), Cut.KV_HEADS, model.qkv_bias)
        | _linear("self_attn.o_proj", "o", (hidden, q_size), Cut.IN, model.o_bias)
        | _norm("post_attention_layernorm", "mlp_norm", hidden)
        | _linear("mlp.gate_proj", "up", (inner, hidden), Cut.OUT, model.mlp_bias)
        | _linear("mlp.up_proj", "up", (inner, hidden), Cut.OUT, model.mlp_bias)
        | _linear("mlp.down_proj", "down", (hidden, inner), Cut.IN, model.mlp_bias)
    )
    if model.qk_norm:
        tensors |= _norm("self_attn.q_norm", "q_norm", model.head_dim)
        tensors |= _norm("self_attn.k_norm", "k_norm", model.head_dim)
    return tensors


def _falcon_layer(model: ModelConfig) -> dict[str, Source]:
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size = model.num_attention_heads * model.head_dim
    qkv_size = q_size + 2 * model.num_key_value_heads * model.head_dim
    two_parallel_norms = model.parallel_attention and model.mlp_norm
    tensors = (
        _norm("ln_attn" if two_parallel_norms else "input_layernorm", "input_norm", hidden, bias=True)
        | _linear("self_attention.query_key_value", "qkv", (qkv_size, hidden), Cut.FALCON_QKV, model.qkv_bias)
        | _linear("self_attention.dense", "o", (hidden, q_size), Cut.IN, model.o_bias)
        | _linear("mlp.dense_h_to_4h", "up", (inner, hidden), Cut.OUT, model.mlp_bias)
        | _linear("mlp.dense_4h_to_h", "down", (hidden, inner), Cut.IN, model.mlp_bias)
    )
    if model.mlp_norm:
        name = "ln_mlp" if two_parallel_norms else "post_attention_layernorm"
        tensors |= _norm(name, "mlp_norm", hidden, bias=True)
    return tensors


def _linear(name: str, parameter: str, shape: tuple[int, int], cut: Cut, bias: bool) -> dict[str, Source]:
    tensors = {f"{name}.weight": Source(f"{parameter}.weight", shape, cut)}
    if bias:
        bias_cut = Cut.FIRST_RANK if cut is Cut.IN else cut
        tensors[f"{name}.bias"] = Source(f"{parameter}.bias", shape[:1], bias_cut)
    return tensors


def _norm(name: str, parameter: str, size: int, bias: bool = False) -> dict[str, Source]:
    tensors = {f"{name}.weight": Source(f"{parameter}.weight", (size,), Cut.WHOLE)}
    if bias:
        tensors[f"{name}.bias"] = Source(f"{parameter}.bias", (size,), Cut.WHOLE)
    return tensors
