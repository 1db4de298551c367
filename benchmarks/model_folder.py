"""A model folder without weights: the shape of Mistral-7B for two engines that draw random ones, with a tokenizer."""

import importlib.metadata
import json
from contextlib import suppress
from pathlib import Path

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,  # random weights have no opinion on it
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_folder(folder: Path) -> Path:
    """Mistral-7B's shape and a tokenizer of as many words; returns the folder."""
    from engine.tokenizer import number_tokenizer  # noqa: PLC0415  (its libraries take seconds to load)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B, indent=1))
    number_tokenizer(32_000).save_pretrained(folder)
    return folder


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
