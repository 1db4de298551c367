"""The engine's command-line flags, in vLLM's words where it has them, and what they ask for."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import msgspec

from engine.config import EngineConfig, ModelSource
from engine.shapes import source_model
from engine.tuned import EngineFacts, Tuned, facts_of, model_of

logger = logging.getLogger(__name__)

CUDA_BUDGET_TOKENS = 2048
"""Fallback token budget on a GPU, where nothing has been tuned: the larger of the two that Sarathi-Serve uses."""

CUDA_MAX_BUDGET_TOKENS, CUDA_MAX_REQUESTS = 8192, 256
LONGEST_BY_DEFAULT = 32_768  # a request of every position that a model knows may need more KV cache than there is


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What `serve` and `launch` take; `engine_config` and `model_source` read it."""
    add_model_flags(parser)
    add_tuned_flag(parser)
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
    add("--max-model-len", type=int, help="most tokens of a prompt and its output; default: the model's, at most 32768")
    add("--block-size", type=int, default=0, help="tokens in a KV block; 0: what the attention backend prefers")
    add("--kv-blocks", type=int, default=0, help="0: as many as the memory holds; on a CPU 4096")
    add("--seed", type=int, default=config.seed)


def add_tuned_flag(parser: argparse.ArgumentParser) -> None:
    """For verbs of the engine and of the controller, once each."""
    if "--tuned" not in parser._option_string_actions:
        text = "what `pacer tune` wrote: knobs, max seqs, policy, promise, step-time model; any flag that is given wins"
        parser.add_argument("--tuned", type=Path, metavar="FILE", help=text)


def tuned(args: argparse.Namespace) -> Tuned | None:
    """What --tuned names, with what other flags of the command say in its place; None without that flag.

    A budget that is given takes its chunk with it, as it does without a file. Raises ValueError naming the file.
    """
    if args.tuned is None:
        return None
    flags = {
        "budget": "budget_tokens",
        "chunk": "chunk_tokens",
        "max_num_seqs": "max_requests",
        "policy": "policy",
        "slo": "slo",
    }
    said = {field: vars(args)[flag] for flag, field in flags.items() if vars(args).get(flag) is not None}
    if "budget_tokens" in said:
        said.setdefault("chunk_tokens", said["budget_tokens"])
    return msgspec.structs.replace(Tuned.load(args.tuned), **said)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises ValueError naming the value and the remedy, also when --tuned is for another engine than these flags."""
    sizes = capacities(args)
    budget = args.budget
    if budget is None:
        usual = CUDA_BUDGET_TOKENS if args.device == "cuda" else EngineConfig().budget_tokens
        budget = max(args.min_budget, min(usual, sizes["max_budget_tokens"]))
    knobs = {"budget_tokens": budget, "chunk_tokens": budget if args.chunk is None else args.chunk}
    found = tuned(args)
    if found is not None:
        knobs = {name: getattr(found, name) for name in ("budget_tokens", "chunk_tokens", "max_requests")}
    config = EngineConfig(
        name=args.name,
        schedule=args.schedule,
        min_budget_tokens=args.min_budget,
        tile_tokens=args.tile,
        prefix_caching=args.enable_prefix_caching,
        knobs_ttl_s=args.knobs_ttl,
        **(sizes | knobs),
    )
    if found is not None:
        found.check(facts_of(model_source(args), config), config)
        if found.engine == EngineFacts():
            logger.warning("%s does not tell which device and model it is for: only sizes are checked", args.tuned)
    return config


def capacities(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineConfig that `add_model_flags` fills."""
    default, cuda = EngineConfig(), args.device == "cuda"
    budget, requests, length = args.max_num_batched_tokens, args.max_num_seqs, args.max_model_len
    if budget is None:
        budget = CUDA_MAX_BUDGET_TOKENS if cuda else default.max_budget_tokens
    if requests is None:
        requests = min(CUDA_MAX_REQUESTS if cuda else default.max_requests, max(1, budget))
    if length is None:
        builtin = args.model is None and args.shape is None
        model = source_model(model_source(args))
        length = default.max_model_tokens if builtin else min(model.max_position_embeddings, LONGEST_BY_DEFAULT)
    return {
        "max_budget_tokens": budget,
        "max_requests": requests,
        "max_model_tokens": length,
        "block_tokens": args.block_size,
        "kv_blocks": args.kv_blocks,
        "tensor_parallel": args.tensor_parallel_size,
        "pipeline_parallel": args.pipeline_parallel_size,
        # On a GPU Python would hold up the device; on a CPU they share the cores, and a step is long.
        "look_ahead": cuda,
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
    return model_of(model_source(args))
