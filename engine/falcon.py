"""Falcon's config.json in the words of the other families."""

from typing import Any

import msgspec


class _FalconJson(msgspec.Struct):
    """The keys that Falcon names or means otherwise, with what transformers assumes when one is absent."""

    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    vocab_size: int = 65024
    num_kv_heads: int | None = None
    ffn_hidden_size: int | None = None
    activation: str | None = "gelu"
    layer_norm_epsilon: float | None = 1e-5
    max_position_embeddings: int = 2048
    alibi: bool | None = False
    bias: bool | None = False
    multi_query: bool | None = True
    new_decoder_architecture: bool | None = False
    num_ln_in_parallel_attn: int | None = None
    parallel_attn: bool | None = True
    tie_word_embeddings: bool = True


def falcon_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the head counts, sizes and switches under the names that Llama has for them.

    Raises ValueError for a variant that this engine does not compute, msgspec.ValidationError for a malformed value.
    """
    keys = msgspec.convert(raw, _FalconJson)
    new = bool(keys.new_decoder_architecture)
    n_norms = keys.num_ln_in_parallel_attn or (2 if new else 1)
    if keys.alibi:
        raise ValueError("alibi position biases are not supported; use a Falcon with rotary embeddings (alibi false)")
    if keys.activation != "gelu":
        raise ValueError(f"activation {keys.activation!r} is not supported; use a Falcon with 'gelu'")
    if new and not keys.parallel_attn:
        raise ValueError("new_decoder_architecture is always parallel: set parallel_attn to true in config.json")
    if n_norms not in ((1, 2) if new else (1,)):
        raise ValueError(
            f"num_ln_in_parallel_attn {n_norms} is not supported {'with' if new else 'without'} "
            f"new_decoder_architecture; only {'1 and 2 are' if new else '1 is'}"
        )
    n_heads = keys.num_attention_heads
    if new:
        n_kv_heads = n_heads if keys.num_kv_heads is None else keys.num_kv_heads
    else:
        n_kv_heads = 1 if keys.multi_query else n_heads
    return raw | {
        "hidden_size": keys.hidden_size,
        "num_hidden_layers": keys.num_hidden_layers,
        "num_attention_heads": n_heads,
        "vocab_size": keys.vocab_size,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": 4 * keys.hidden_size if keys.ffn_hidden_size is None else keys.ffn_hidden_size,
        "max_position_embeddings": keys.max_position_embeddings,
        "rms_norm_eps": 1e-5 if keys.layer_norm_epsilon is None else keys.layer_norm_epsilon,
        "attention_bias": bool(keys.bias),
        "mlp_bias": bool(keys.bias),
        "parallel_attn": bool(keys.parallel_attn),
        "num_ln_in_parallel_attn": n_norms,
        "tie_word_embeddings": keys.tie_word_embeddings,
    }
