"""Tiny random checkpoints of every family, made by transformers, and what transformers says to 50 prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engine.config import EngineConfig
from engine.model_config import read_model_config
from engine.model_runner import ModelRunner
from engine.weights import load_safetensors

VOCABULARY = 128
N_PROMPTS, MAX_PROMPT, N_NEW = 50, 80, 12
ENGINE = EngineConfig(
    max_budget_tokens=256, max_requests=16, max_model_tokens=160, block_tokens=4, kv_blocks=16 * 40, min_budget_tokens=1
)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide, so that the likeliest token leads clearly
    "bos_token_id": None,
    "eos_token_id": None,
}
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
}
"""Model type and switches; qwen2 has one layer of full attention and two with a window."""


def write_checkpoint(name: str, folder: Path) -> Any:
    """A random model of transformers, saved to `folder`."""
    model_type, switches = CHECKPOINTS[name]
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | switches)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at 1 and biases at 0, which would hide a lost one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size="60KB" if name.endswith("sharded") else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == name.endswith("sharded")
    return model


def runner_of(folder: Path, dtype: torch.dtype = torch.float32) -> ModelRunner:
    model = read_model_config(folder)
    return ModelRunner(
        model, load_safetensors(folder, model, dtype), ENGINE, threads=1, clock=iter(range(10**6)).__next__
    )


def expected_outputs(model: Any) -> list[list[int]]:
    ids = torch.zeros(N_PROMPTS, MAX_PROMPT, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, MAX_PROMPT - len(prompt) :] = torch.tensor(prompt)
        mask[row, MAX_PROMPT - len(prompt) :] = 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = out[:, MAX_PROMPT:].tolist()
    return tokens
