"""Which attention backends this machine has, which of them suits a model, and how one is made."""

import importlib
from importlib.metadata import PackageNotFoundError, version

import torch

from engine.attention.backend import BLOCK_TOKENS, AttentionBackend, KvCache, layer_windows
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.shard import Shard

BACKENDS = tuple(BLOCK_TOKENS)

# Both flash-attn packages install a module `flash_attn`: only version 4 has `cute` of this kind, only version 2 exports
# functions at the top.
_PACKAGES = {
    "flash-attn-4": ("flash-attn-4", "flash_attn.cute.interface", "_flash_attn_fwd"),
    "flash-attn-2": ("flash-attn", "flash_attn", "flash_attn_with_kvcache"),
    "flashinfer": ("flashinfer-python", "flashinfer", "BatchPrefillWithPagedKVCacheWrapper"),
}
# Compute capability that the kernels with a page table need.
_LEAST_CAPABILITY = {"flash-attn-4": (9, 0), "flash-attn-2": (8, 0), "flashinfer": (8, 0)}


def attention_report(device: torch.device) -> list[tuple[str, bool, str]]:
    """Each backend's name, whether it can be used on `device`, and its version or why not."""
    report = []
    for name in BACKENDS:
        absence = _absence(name, device)
        report.append((name, absence is None, absence or _version(name)))
    return report


def choose_attention(name: str, model: ModelConfig, dtype: torch.dtype, block_tokens: int, device: torch.device) -> str:
    """`name` itself, or for "auto" the best backend for this model; `block_tokens` 0 leaves the block size open.

    Raises ValueError when the backend asked for is unknown, absent, or cannot compute the model.
    """
    if name == "auto":
        usable = (n for n in BACKENDS if _refusal(n, model, dtype, block_tokens, device) is None)
        return next(usable)  # sdpa refuses nothing
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is not one of auto, {', '.join(BACKENDS)}: use --attention auto")
    refusal = _refusal(name, model, dtype, block_tokens, device)
    if refusal is not None:
        raise ValueError(f"attention {name}: {refusal}; use --attention auto")
    return name


def default_block_tokens(name: str, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """The block size that suits the backend which `name` chooses. Raises ValueError like `choose_attention`."""
    return BLOCK_TOKENS[choose_attention(name, model, dtype, 0, device)]


def make_attention(
    name: str, model: ModelConfig, cache: KvCache, config: EngineConfig, device: torch.device, shard: Shard
) -> AttentionBackend:
    """The backend that `name` chooses, over the rank's `cache`. Raises ValueError like `choose_attention`."""
    chosen = choose_attention(name, model, cache[0].dtype, cache[0].shape[2], device)
    windows, heads = layer_windows(model, shard), len(shard.heads(model.num_attention_heads))
    if chosen == "flash-attn-4":
        from engine.attention.flash4 import FlashAttention4  # noqa: PLC0415 (needs triton)

        return FlashAttention4(cache, windows, heads)
    if chosen == "flash-attn-2":
        from engine.attention.flash2 import FlashAttention2  # noqa: PLC0415 (as the package)

        return FlashAttention2(cache, windows)
    if chosen == "flashinfer":
        from engine.attention.flashinfer import FlashInferAttention  # noqa: PLC0415 (an optional package)

        return FlashInferAttention(cache, windows, heads, config.depth)
    return SdpaAttention(cache, windows, config.max_model_tokens)


def _absence(name: str, device: torch.device) -> str | None:
    """Why the machine does not have the backend."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    needed, found = _LEAST_CAPABILITY[name], torch.cuda.get_device_capability(device)
    if found < needed:
        return f"needs compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
    package, module, function = _PACKAGES[name]
    missing = module.partition(".")[0]
    try:
        if hasattr(importlib.import_module(module), function):
            return None
    except ModuleNotFoundError as error:
        missing = error.name or missing
    except Exception as error:  # whatever a broken build raises, the machine does without it
        return f"{package} {_version(name)} does not load: {type(error).__name__}: {error}"
    return f"{missing} is not installed: pip install {package}"


def _version(name: str) -> str:
    try:
        return version("torch" if name == "sdpa" else _PACKAGES[name][0])
    except PackageNotFoundError:
        return "unknown version"


def _refusal(name: str, model: ModelConfig, dtype: torch.dtype, block_tokens: int, device: torch.device) -> str | None:
    """Why the backend cannot compute the model here."""
    absence = _absence(name, device)
    if name == "sdpa" or absence is not None:
        return absence
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    dim = model.head_dim
    if name == "flashinfer":
        return None if dim in (64, 128, 256) else f"head_dim {dim} is not 64, 128 or 256"
    if name == "flash-attn-2" and block_tokens % 256:
        return f"blocks of {block_tokens} tokens are not a multiple of 256"
    multiple = 16 if name == "flash-attn-4" else 8
    return None if dim <= 256 and dim % multiple == 0 else f"head_dim {dim} is not a multiple of {multiple} up to 256"
