"""Reading a model: its config.json and its weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA3_ROPE, write_checkpoint
from safetensors.torch import load_file, save_file

from engine.model_config import Rope, read_model_config
from engine.weights import load_safetensors


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    write_checkpoint("mistral-window-10", tmp_path)
    return tmp_path


@pytest.fixture
def falcon(tmp_path: Path) -> Path:
    write_checkpoint("falcon-40b-style-biased", tmp_path)
    return tmp_path


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value != "absent"}))


def test_old_and_new_rope_keys_mean_the_same(mistral: Path) -> None:
    edit(mistral, rope_parameters=LLAMA3_ROPE)
    new = read_model_config(mistral).rope
    old_keys = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit(mistral, rope_parameters="absent", rope_scaling=old_keys, rope_theta=1000.0)
    assert read_model_config(mistral).rope == new
    edit(mistral, rope_scaling={"type": "linear", "factor": 2.0})
    expected = Rope("linear", rope_theta=1000.0, factor=2.0, original_max_position_embeddings=256)
    assert read_model_config(mistral).rope == expected


def test_end_of_sequence_ids_come_from_both_files_once_each(mistral: Path) -> None:
    edit(mistral, eos_token_id=[5, 6])
    edit(mistral, "generation_config.json", eos_token_id=[6, 9])
    assert read_model_config(mistral).eos_token_ids == (5, 6, 9)
    edit(mistral, "generation_config.json", eos_token_id=3)
    assert read_model_config(mistral).eos_token_ids == (5, 6, 3)


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": "absent"}, (4096, 4096, 4096)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, (None, None, None)),
        (
            "qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_sliding_windows_are_read_layer_by_layer(
    mistral: Path, model_type: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    edit(mistral, model_type=model_type, **changes)
    assert read_model_config(mistral).sliding_windows == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"'gpt2'.*not supported.*llama, mistral, qwen2, qwen3, falcon"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "per layer type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
        ({"hidden_size": "wide"}, r"Expected `int`, got `str` - at `\$.hidden_size`"),
        ({"vocab_size": "absent"}, "missing required field `vocab_size`"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "for 1 layers"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_name(mistral: Path, changes: dict[str, Any], message: str) -> None:
    edit(mistral, **changes)
    with pytest.raises(ValueError, match=message):
        read_model_config(mistral)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "alibi position biases are not supported"),
        ({"activation": "relu"}, "activation 'relu' is not supported"),
        ({"parallel_attn": False}, "new_decoder_architecture is always parallel"),
        ({"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3 is not supported with"),
        ({"new_decoder_architecture": False, "num_ln_in_parallel_attn": 2}, "2 is not supported without"),
        ({"hidden_size": "wide"}, r"Expected `int`, got `str` - at `\$.hidden_size`"),
        ({"num_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ],
)
def test_a_falcon_that_cannot_run_is_refused_by_name(falcon: Path, changes: dict[str, Any], message: str) -> None:
    edit(falcon, **changes)
    with pytest.raises(ValueError, match=message):
        read_model_config(falcon)


def test_a_falcon_says_little_and_means_the_7b(falcon: Path) -> None:
    said = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type")
    values = json.loads((falcon / "config.json").read_text())
    (falcon / "config.json").write_text(json.dumps({key: values[key] for key in said} | {"hidden_size": 96}))
    model = read_model_config(falcon)
    assert (model.num_key_value_heads, model.intermediate_size, model.max_position_embeddings) == (1, 384, 2048)
    assert (model.parallel_attention, model.mlp_norm, model.tie_word_embeddings) == (True, False, True)
    assert not (model.qkv_bias or model.o_bias or model.mlp_bias)


FAULTS = {
    "missing": r"1 tensors are missing: model\.norm\.weight",
    "unexpected": r"1 tensors are unexpected: surplus",
    "misshapen": r"model\.norm\.weight is \[3\] where config.json gives \[64\]",
    "damaged": "is damaged",
    "absent": r"lacks model\.safetensors",
    "shard": r"lacks model-00002\.safetensors",
    "index": "no readable weight_map",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(mistral: Path, fault: str) -> None:
    path, index = mistral / "model.safetensors", mistral / "model.safetensors.index.json"
    tensors = load_file(path)
    if fault == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, path)
    elif fault == "unexpected":
        save_file(tensors | {"surplus": torch.zeros(2)}, path)
    elif fault == "misshapen":
        save_file(tensors | {"model.norm.weight": torch.ones(3)}, path)
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:500])
    elif fault == "absent":
        path.unlink()
    elif fault == "shard":
        index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}))
    else:
        index.write_text("{}")
    with pytest.raises(ValueError, match=FAULTS[fault]):
        load_safetensors(mistral, read_model_config(mistral), torch.float32)


def test_tied_weights_may_come_with_a_copy_of_the_embedding(tmp_path: Path) -> None:
    write_checkpoint("qwen3-wide-heads-tied", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    again = load_safetensors(tmp_path, read_model_config(tmp_path), torch.float32)
    assert "head.weight" not in again
    assert torch.equal(again["embedding.weight"], tensors["model.embed_tokens.weight"])
