"""What a decoder-only transformer looks like, read from a Hugging Face folder without importing its classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.falcon import falcon_keys

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "falcon")

# What transformers assumes when a key is absent from config.json, where that differs between the families.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "falcon": {},
}

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


class Rope(msgspec.Struct, frozen=True):
    """Rotary position embedding: the base and, for types other than default, how its frequencies are stretched."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and switches of one model, in the words of its config.json.

    `sliding_windows` has one entry per layer: how many tokens, itself included, a token attends to; None is all of
    them. With `parallel_attention` a block adds attention and MLP to the residual together; without `mlp_norm` both
    then read the same norm. Raises ValueError when head counts or sizes do not fit together.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_norm: bool = False
    gated_mlp: bool = True
    parallel_attention: bool = False
    mlp_norm: bool = True
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = [(name, getattr(self, name)) for name in _SIZES]
        sizes += [("sliding_window", window) for window in self.sliding_windows if window is not None]
        for name, size in sizes:
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1: correct config.json")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: correct config.json"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary embeddings need an even one: correct config.json"
            )
        if len(self.sliding_windows) != self.num_hidden_layers:
            raise ValueError(
                f"attention types for {len(self.sliding_windows)} layers, but num_hidden_layers is "
                f"{self.num_hidden_layers}: correct layer_types in config.json"
            )


PACER_26M = ModelConfig(
    model_type="llama",
    vocab_size=260,  # the 256 bytes, then <s>, </s>, <|user|>, <|assistant|>
    hidden_size=512,
    intermediate_size=1664,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
    norm_eps=1e-6,
    rope=Rope(),
    sliding_windows=(None,) * 8,
    eos_token_ids=(257,),
)
"""The built-in model: a Llama of 26 million parameters over bytes, small enough to serve from one CPU core."""


class _ConfigJson(msgspec.Struct):
    """The keys of config.json that matter here; unknown ones pass."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    parallel_attn: bool = False
    num_ln_in_parallel_attn: int = 2
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: dict[str, Any] | None = None


def read_model_config(folder: Path) -> ModelConfig:
    """The model in `folder`, from its config.json and, for further end-of-sequence ids, generation_config.json.

    Raises ValueError for a folder without config.json, malformed values, and anything this engine does not compute:
    other architectures, rope types, activations, or quantized weights.
    """
    raw = _read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED:
        raise ValueError(
            f"model_type {model_type!r} in {folder / 'config.json'} is not supported; use one of {', '.join(SUPPORTED)}"
        )
    is_falcon = model_type == "falcon"
    try:
        known = falcon_keys(raw) if is_falcon else raw
        keys = msgspec.convert(_FAMILY_DEFAULTS[model_type] | known, _ConfigJson)
    except msgspec.ValidationError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; correct that key") from error
    _refuse_unsupported(keys)
    generation = folder / "generation_config.json"
    eos = _as_ids(keys.eos_token_id) + _as_ids(
        _read_json(generation).get("eos_token_id") if generation.exists() else None
    )
    is_qwen2 = model_type == "qwen2"
    takes_attention_bias = model_type in ("llama", "qwen3", "falcon")
    return ModelConfig(
        model_type=model_type,
        vocab_size=keys.vocab_size,
        hidden_size=keys.hidden_size,
        intermediate_size=keys.intermediate_size,
        num_hidden_layers=keys.num_hidden_layers,
        num_attention_heads=keys.num_attention_heads,
        num_key_value_heads=keys.num_attention_heads if keys.num_key_value_heads is None else keys.num_key_value_heads,
        head_dim=keys.hidden_size // max(1, keys.num_attention_heads) if keys.head_dim is None else keys.head_dim,
        max_position_embeddings=keys.max_position_embeddings,
        norm_eps=keys.rms_norm_eps,
        rope=_rope(keys),
        sliding_windows=_sliding_windows(model_type, keys),
        tie_word_embeddings=keys.tie_word_embeddings,
        qkv_bias=is_qwen2 or (takes_attention_bias and keys.attention_bias),
        o_bias=takes_attention_bias and keys.attention_bias,
        mlp_bias=model_type in ("llama", "falcon") and keys.mlp_bias,
        qk_norm=model_type == "qwen3",
        layer_norm=is_falcon,
        gated_mlp=not is_falcon,
        parallel_attention=is_falcon and keys.parallel_attn,
        mlp_norm=not (is_falcon and keys.parallel_attn and keys.num_ln_in_parallel_attn == 1),
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that holds a Hugging Face model")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _refuse_unsupported(keys: _ConfigJson) -> None:
    if keys.hidden_act != "silu":
        raise ValueError(f"hidden_act {keys.hidden_act!r} is not supported; use a model with 'silu'")
    if keys.quantization_config is not None:
        method = keys.quantization_config.get("quant_method")
        raise ValueError(f"weights quantized with {method!r} are not supported; use the unquantized model")


def _rope(keys: _ConfigJson) -> Rope:
    """The rope of transformers 5's `rope_parameters`, or of the older `rope_theta` and `rope_scaling`."""
    given = keys.rope_scaling or keys.rope_parameters or {}
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"rope parameters per layer type ({', '.join(nested)}) are not supported; use one set for all")
    values: dict[str, Any] = {"rope_type": given.get("type", "default")}
    if keys.rope_theta is not None:
        values["rope_theta"] = keys.rope_theta
    if keys.partial_rotary_factor is not None:
        values["partial_rotary_factor"] = keys.partial_rotary_factor
    values["original_max_position_embeddings"] = keys.max_position_embeddings
    values |= {name: value for name, value in given.items() if value is not None}
    rope_type = values["rope_type"]
    if rope_type not in _ROPE_NEEDS:
        raise ValueError(f"rope type {rope_type!r} is not supported; use one of {', '.join(_ROPE_NEEDS)}")
    missing = [name for name in _ROPE_NEEDS[rope_type] if name not in values]
    if missing:
        raise ValueError(f"rope type {rope_type!r} needs {', '.join(missing)}: add that to config.json")
    try:
        rope = msgspec.convert(values, Rope)
    except msgspec.ValidationError as error:
        raise ValueError(f"rope parameters in config.json: {error}; correct that key") from error
    if rope.partial_rotary_factor != 1.0:
        raise ValueError(f"partial_rotary_factor {rope.partial_rotary_factor} is not supported; only 1.0 is")
    return rope


def _sliding_windows(model_type: str, keys: _ConfigJson) -> tuple[int | None, ...]:
    n_layers, window = keys.num_hidden_layers, keys.sliding_window
    if model_type == "mistral":
        return (window,) * n_layers
    if model_type in ("llama", "falcon") or not keys.use_sliding_window:
        return (None,) * n_layers
    if keys.layer_types is None:
        return tuple(window if layer >= keys.max_window_layers else None for layer in range(n_layers))
    unknown = set(keys.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layer types {', '.join(sorted(unknown))} are not supported; only full and sliding attention")
    return tuple(window if kind == "sliding_attention" else None for kind in keys.layer_types)
