"""What is fixed when an engine starts. Everything here is a capacity or a choice that the knobs never exceed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.batching import SCHEDULES
from engine.protocol import Bounds

MAX_TTL_S = 3600.0

ScheduleName = Literal["stall-free", "prefill-first", "orca", "request-level", "chunks-only"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Start-up choices of one engine.

    The budget and chunk are the fallback knobs: in force until a controller answers, and again when it has been silent
    for `knobs_ttl_s`. As many iterations are in flight as the pipeline has stages; with `look_ahead` one more, formed
    before the tokens of the oldest are known here, so that the device never waits for Python. `block_tokens` and
    `kv_blocks` may be 0 until the model is loaded, which settles them: what the attention backend prefers, and what the
    memory holds. Raises ValueError with the value and the remedy.
    """

    name: str = "pacer"
    schedule: ScheduleName = "stall-free"
    budget_tokens: int = 256
    chunk_tokens: int = 256
    max_budget_tokens: int = 2048
    min_budget_tokens: int = 16
    tile_tokens: int = 16
    max_requests: int = 64
    max_model_tokens: int = 2048
    block_tokens: int = 16
    kv_blocks: int = 4096
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    look_ahead: bool = False
    prefix_caching: bool = False
    knobs_ttl_s: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        for name in ("max_requests", "max_model_tokens", "tile_tokens", "tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("block_tokens", "kv_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 1, or 0 to leave it to the engine"
                )
        if self.max_model_tokens < 2:
            raise ValueError("max_model_tokens is 1; it must leave room for a prompt and an output")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if not 1 <= self.min_budget_tokens <= self.max_budget_tokens:
            raise ValueError(
                f"min_budget_tokens {self.min_budget_tokens} must be between 1 and max_budget_tokens "
                f"{self.max_budget_tokens}"
            )
        for name in ("budget_tokens", "chunk_tokens"):
            if not self.min_budget_tokens <= getattr(self, name) <= self.max_budget_tokens:
                raise ValueError(
                    f"{name} {getattr(self, name)} is outside {self.min_budget_tokens}..{self.max_budget_tokens}: "
                    "change it, or the launch bounds"
                )
        if not 0 < self.knobs_ttl_s <= MAX_TTL_S:
            raise ValueError(f"knobs_ttl_s is {self.knobs_ttl_s}; it must be above 0 and at most {MAX_TTL_S:.0f}")

    def _check_together(self) -> None:
        if self.max_requests > self.max_budget_tokens:
            raise ValueError(
                f"max_requests {self.max_requests} decodes would not fit max_budget_tokens {self.max_budget_tokens}: "
                "raise the budget bound or lower max_requests"
            )
        if 0 < self.kv_blocks * self.block_tokens < self.max_model_tokens:
            raise ValueError(
                f"{self.kv_blocks} KV blocks of {self.block_tokens} tokens cannot hold one request of "
                f"{self.max_model_tokens} tokens: raise kv_blocks or lower max_model_tokens"
            )
        if self.schedule not in ("stall-free", "chunks-only") and self.max_budget_tokens < self.max_model_tokens:
            raise ValueError(
                f"schedule {self.schedule!r} runs whole prompts, but max_budget_tokens {self.max_budget_tokens} is "
                f"below max_model_tokens {self.max_model_tokens}: raise the one or lower the other"
            )

    @property
    def depth(self) -> int:
        """Iterations in flight at once."""
        return self.pipeline_parallel + self.look_ahead

    @property
    def bounds(self) -> Bounds:
        kv_tokens = self.kv_blocks * self.block_tokens
        return Bounds(self.min_budget_tokens, self.max_budget_tokens, self.tile_tokens, self.max_requests, kv_tokens)

    @property
    def max_blocks_per_request(self) -> int:
        return -(-self.max_model_tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, and what computes it.

    A Hugging Face `folder`, or a named `shape` (see engine.shapes) with random weights; with neither the built-in 26M
    Llama with random weights. `load_format` is "auto" (the folder's safetensors) or "dummy" (random weights from the
    engine's seed). `device` is "cpu" or "cuda"; `threads` are the CPU threads of the computation; `attention` names a
    backend of engine.attention or "auto"; `memory_utilization` is the share of the GPU's memory that may be used.
    """

    folder: Path | None = None
    shape: str | None = None
    load_format: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    attention: str = "auto"
    memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.folder is not None and self.shape is not None:
            raise ValueError(f"both a model folder ({self.folder}) and a shape ({self.shape!r}) are given: choose one")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r} is not one of cpu, cuda")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization is {self.memory_utilization}; it must be above 0 and at most 1")
