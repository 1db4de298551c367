"""Tiny random checkpoints of every family, made by transformers, and what transformers says to 50 prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engine.config import EngineConfig

VOCABULARY = 128
N_PROMPTS, MAX_PROMPT, N_NEW = 50, 80, 12
ENGINE = EngineConfig(
    max_budget_tokens=256, max_requests=16, max_model_tokens=160, block_tokens=4, kv_blocks=16 * 40, min_budget_tokens=1
)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide, so that the likeliest token leads clearly
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_SIZES = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
FALCON_SIZES = SIZES | {"ffn_hidden_size": 96}
RNG = np.random.default_rng(5)
LENGTHS = [1, 2, MAX_PROMPT, *RNG.integers(3, MAX_PROMPT, N_PROMPTS - 3).tolist()]
PROMPTS: list[list[int]] = [RNG.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-sharded": ("llama", {}),
    "llama-llama3-rope-tied-biased": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "mistral-window-10": ("mistral", {"sliding_window": 10}),
    "qwen2-two-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 23, "max_window_layers": 1}),
    "qwen3-wide-heads-tied": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "falcon-7b-style": ("falcon", {"multi_query": True}),
    "falcon-40b-style-biased": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "tie_word_embeddings": False},
    ),
    "falcon2-11b-style": (
        "falcon",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2, "ffn_hidden_size": None},
    ),
    "falcon-sequential": ("falcon", {"multi_query": False, "parallel_attn": False}),
}
"""Model type and switches; qwen2 has one layer of full attention and two with a window."""


def write_checkpoint(checkpoint: str, folder: Path, **changes: Any) -> Any:
    """A random model of transformers, saved to `folder`; `changes` are further keys of its configuration."""
    model_type, switches = CHECKPOINTS[checkpoint]
    torch.manual_seed(11)
    sizes = FALCON_SIZES if model_type == "falcon" else LLAMA_SIZES
    config = transformers.AutoConfig.for_model(model_type, **sizes | switches | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms start at 1 and biases at 0, which would hide a lost one
                parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.3))
    model.save_pretrained(folder, max_shard_size="60KB" if checkpoint.endswith("sharded") else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == checkpoint.endswith("sharded")
    return model


def expected_outputs(model: Any) -> list[list[int]]:
    ids = torch.zeros(N_PROMPTS, MAX_PROMPT, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, MAX_PROMPT - len(prompt) :] = torch.tensor(prompt)
        mask[row, MAX_PROMPT - len(prompt) :] = 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = out[:, MAX_PROMPT:].tolist()
    return tokens
