"""Public models by name, as shapes to be filled with random weights: sizes from their config.json."""

from dataclasses import replace
from math import prod

from engine.config import ModelSource
from engine.layout import checkpoint_tensors
from engine.model_config import PACER_26M, ModelConfig, Rope, read_model_config
from engine.shard import WHOLE, Shard

# Long enough to replay every prompt of the workload traces, whatever the models were trained for: random weights know
# no positions, and a step costs the same.
_MAX_POSITIONS = 131072


def _llama(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    rope_theta: float,
    norm_eps: float = 1e-5,
) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=_MAX_POSITIONS,
        norm_eps=norm_eps,
        rope=Rope(rope_theta=rope_theta),
        sliding_windows=(None,) * layers,
    )


def _qwen2(*sizes: int, norm_eps: float) -> ModelConfig:
    return replace(_llama(*sizes, rope_theta=1e6, norm_eps=norm_eps), model_type="qwen2", qkv_bias=True)


def _qwen3(*sizes: int) -> ModelConfig:
    return replace(_llama(*sizes, rope_theta=1e6, norm_eps=1e-6), model_type="qwen3", qk_norm=True)


def _falcon(
    hidden_size: int, layers: int, heads: int, kv_heads: int, norms: int, rope_theta: float = 10000.0, tied: bool = True
) -> ModelConfig:
    sizes = (65024, hidden_size, 4 * hidden_size, layers, heads, kv_heads)
    return replace(
        _llama(*sizes, rope_theta=rope_theta),
        model_type="falcon",
        head_dim=hidden_size // heads,
        tie_word_embeddings=tied,
        layer_norm=True,
        gated_mlp=False,
        parallel_attention=True,
        mlp_norm=norms == 2,
    )


_LLAMA31_ROPE = Rope("llama3", rope_theta=5e5, factor=8.0, original_max_position_embeddings=8192)

SHAPES = {
    # Version 0.2 and later, without a sliding window: contexts beyond the 4096 tokens of version 0.1 must cost.
    "mistral-7b": replace(_llama(32000, 4096, 14336, 32, 32, 8, rope_theta=1e6), model_type="mistral"),
    "yi-6b": _llama(64000, 4096, 11008, 32, 32, 4, rope_theta=5e6),
    "yi-34b": _llama(64000, 7168, 20480, 60, 56, 8, rope_theta=5e6),
    "llama2-7b": _llama(32000, 4096, 11008, 32, 32, 32, rope_theta=1e4),
    "llama2-70b": _llama(32000, 8192, 28672, 80, 64, 8, rope_theta=1e4),
    "llama3-8b": _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5),
    "llama3-70b": _llama(128256, 8192, 28672, 80, 64, 8, rope_theta=5e5),
    "llama3.1-8b": replace(_llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5), rope=_LLAMA31_ROPE),
    "llama3.1-70b": replace(_llama(128256, 8192, 28672, 80, 64, 8, rope_theta=5e5), rope=_LLAMA31_ROPE),
    "qwen2.5-7b": _qwen2(152064, 3584, 18944, 28, 28, 4, norm_eps=1e-6),
    "qwen2.5-32b": _qwen2(152064, 5120, 27648, 64, 40, 8, norm_eps=1e-5),
    "qwen3-8b": _qwen3(151936, 4096, 12288, 36, 32, 8),
    "qwen3-32b": _qwen3(151936, 5120, 25600, 64, 64, 8),
    "falcon-7b": _falcon(4544, 32, 71, 1, norms=1),
    "falcon2-11b": _falcon(4096, 60, 32, 8, norms=1, rope_theta=500042.0, tied=False),
    "falcon-40b": _falcon(8192, 60, 128, 8, norms=2),
    "falcon-180b": _falcon(14848, 80, 232, 8, norms=2),
}
"""Without end-of-sequence ids: random weights must not end a request."""


def shape(name: str) -> ModelConfig:
    """Raises ValueError listing the names when `name` is not one."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is not known; use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def source_model(source: ModelSource) -> ModelConfig:
    """The folder's model, the named shape, or the built-in model. Raises ValueError naming what is wrong with it."""
    if source.folder is not None:
        return read_model_config(source.folder)
    return PACER_26M if source.shape is None else shape(source.shape)


def parameter_count(model: ModelConfig) -> int:
    """Numbers that a checkpoint of `model` holds; a head tied to the embedding counts once."""
    return sum(prod(tensor.shape) for tensor in checkpoint_tensors(model).values())


def kv_bytes_per_token(model: ModelConfig, bytes_per_number: int, shard: Shard = WHOLE) -> int:
    """Of the KV cache of one rank. Raises ValueError when the ranks cannot share the heads or the layers."""
    kv_heads = len(shard.kv_heads(model.num_key_value_heads))
    layers = len(shard.layers(model.num_hidden_layers))
    return 2 * layers * kv_heads * model.head_dim * bytes_per_number
