"""The engine's command-line flags, in vLLM's words where it has them, and what they ask for."""

import argparse
import os
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ModelSource

CUDA_BUDGET_TOKENS = 2048
"""Fallback token budget on a GPU, where nothing has been tuned: the larger of the two that Sarathi-Serve uses."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What `serve` and `launch` take; `engine_config` and `model_source` read it."""
    add_model_flags(parser)
    config = EngineConfig()
    add = parser.add_argument_group("engine").add_argument
    add("--served-model-name", help="the model's name in the API; default: the folder's or the shape's")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--name", default=config.name, help="names the engine's sockets")
    add("--listen", metavar="TELEMETRY,KNOBS", help="also bind these two tcp:// addresses (needs CURVE keys)")
    add("--schedule", default=config.schedule, help="stall-free, prefill-first, orca, request-level or chunks-only")
    add("--budget", type=int, help="fallback token budget, until a controller answers; default: 256, on a GPU 2048")
    add("--chunk", type=int, help="fallback chunk size; default: the budget")
    add("--min-budget", type=int, default=config.min_budget_tokens, help="smallest budget ever allowed")
    add("--tile", type=int, default=config.tile_tokens, help="GEMM tile: larger knobs are cut to whole tiles")
    add("--enable-prefix-caching", action="store_true")
    add("--knobs-ttl", type=float, default=config.knobs_ttl_s, help="seconds without knobs until the fallback")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The model, what computes it, and its capacities: these alone decide how long a step takes."""
    config, source = EngineConfig(), ModelSource()
    add = parser.add_argument_group("model").add_argument
    add("--model", type=Path, help="Hugging Face folder; without it a built-in 26M Llama with random weights")
    add("--shape", help="random weights in the shape of a known model, as in mistral-7b or llama2-70b")
    add("--load-format", choices=("auto", "dummy"), default=source.load_format, help="dummy: seeded random weights")
    add("--device", choices=("cpu", "cuda"), default=source.device)
    add("--dtype", help="float32, bfloat16 or float16; default: float32, on a GPU bfloat16")
    add("--attention", default=source.attention, help="a backend by name (see `pacer doctor`), or the best present")
    add("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="CPU threads of the computation")
    add("--tensor-parallel-size", type=int, default=config.tensor_parallel, help="ranks that share every layer")
    add("--pipeline-parallel-size", type=int, default=config.pipeline_parallel, help="stages that share out the layers")
    add(
        "--gpu-memory-utilization", type=float, default=source.memory_utilization, help="share of a GPU's memory to use"
    )
    add("--max-num-batched-tokens", type=int, help="largest budget ever allowed; default: 2048, on a GPU 8192")
    add("--max-num-seqs", type=int, help="most requests running at once; default: 64, on a GPU 256")
    add("--max-model-len", type=int, default=config.max_model_tokens, help="most tokens of a prompt and its output")
    add("--block-size", type=int, default=0, help="tokens in a KV block; 0: what the attention backend prefers")
    add("--kv-blocks", type=int, default=0, help="0: as many as the memory holds; on a CPU 4096")
    add("--seed", type=int, default=config.seed)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises ValueError naming the value and the remedy."""
    budget = args.budget or (CUDA_BUDGET_TOKENS if args.device == "cuda" else EngineConfig().budget_tokens)
    return EngineConfig(
        name=args.name,
        schedule=args.schedule,
        budget_tokens=budget,
        chunk_tokens=args.chunk or budget,
        min_budget_tokens=args.min_budget,
        tile_tokens=args.tile,
        prefix_caching=args.enable_prefix_caching,
        knobs_ttl_s=args.knobs_ttl,
        **capacities(args),
    )


def capacities(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineConfig that `add_model_flags` fills."""
    default, cuda = EngineConfig(), args.device == "cuda"
    return {
        "max_budget_tokens": args.max_num_batched_tokens or (8192 if cuda else default.max_budget_tokens),
        "max_requests": args.max_num_seqs or (256 if cuda else default.max_requests),
        "max_model_tokens": args.max_model_len,
        "block_tokens": args.block_size,
        "kv_blocks": args.kv_blocks,
        "tensor_parallel": args.tensor_parallel_size,
        "pipeline_parallel": args.pipeline_parallel_size,
        # On a GPU Python would hold up the device; on a CPU they share the cores, and a step is long.
        "look_ahead": cuda and args.pipeline_parallel_size == 1,
        "seed": args.seed,
    }


def model_source(args: argparse.Namespace) -> ModelSource:
    """Raises ValueError naming the value and the remedy."""
    return ModelSource(
        folder=args.model,
        shape=args.shape,
        load_format=args.load_format,
        dtype=args.dtype or ("bfloat16" if args.device == "cuda" else "float32"),
        device=args.device,
        threads=args.threads,
        attention=args.attention,
        memory_utilization=args.gpu_memory_utilization,
    )


def model_name(args: argparse.Namespace) -> str:
    """What the API calls the model."""
    if args.served_model_name:
        return str(args.served_model_name)
    return str(args.shape or (args.model.name if args.model else "pacer-26m"))
