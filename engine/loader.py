"""From a model source to a runner that computes with it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.attention.choice import choose_attention, default_block_tokens
from engine.config import EngineConfig, ModelSource
from engine.kv_sizing import Compute, blocks_that_fit, load_kernels, rehearse
from engine.model_config import ModelConfig
from engine.model_runner import ModelRunner, check_sizes
from engine.shapes import kv_bytes_per_token, parameter_count, source_model
from engine.shard import SINGLE, WHOLE, Collectives, Shard
from engine.step_input import OutOfDeviceMemory
from engine.step_shapes import slower_than_larger
from engine.tuned import EngineFacts, facts_of
from engine.weights import Weights, dummy_weights, load_safetensors

if TYPE_CHECKING:
    from engine.parallel.runner import ParallelRunner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU_KV_BLOCKS = 4096
_GIB = 2**30


def load_runner(
    source: ModelSource, config: EngineConfig, clock: Callable[[], int]
) -> tuple["ModelRunner | ParallelRunner", EngineConfig]:
    """A runner in this process, or over the processes that `config` asks for; and `config` with its KV blocks settled.

    Raises ValueError naming what is wrong with the model, the dtype, the device or the sizes.
    """
    if config.tensor_parallel * config.pipeline_parallel > 1:
        from engine.parallel.runner import ParallelRunner  # noqa: PLC0415 (its processes import this module)

        parallel = ParallelRunner(source, config, clock)
        return parallel, parallel.config
    runner = load_stage(source, config, clock)
    return runner, runner.config


def engine_facts(source: ModelSource, config: EngineConfig, attention: str) -> EngineFacts:
    """The facts of an engine that has been loaded, by the runner's `attention_name` and the GPU's own name."""
    gpu = torch.cuda.get_device_name(0) if source.device == "cuda" else None
    return facts_of(source, config, attention, gpu)


def load_stage(
    source: ModelSource,
    config: EngineConfig,
    clock: Callable[[], int],
    shard: Shard = WHOLE,
    collectives: Collectives = SINGLE,
    smallest: Callable[[int], int] = lambda blocks: blocks,
    compute: Compute = ModelRunner.execute,
) -> ModelRunner:
    """A rank's runner, on the current CUDA device if the source asks for one; its `config` has the KV blocks settled.

    `smallest` gives the least of all ranks' numbers: what fits on every rank; `compute` passes a step through this rank
    and those beside it. Raises ValueError like `load_runner`, before the weights are loaded where that can be known.
    """
    if source.dtype not in DTYPES:
        raise ValueError(f"dtype {source.dtype!r} is not one of {', '.join(DTYPES)}")
    dtype, device, model = DTYPES[source.dtype], _device(source), source_model(source)
    check_sizes(model, config, source.threads)
    choose_attention(source.attention, model, dtype, config.block_tokens, device)
    block_tokens = config.block_tokens or default_block_tokens(source.attention, model, dtype, device)
    config = replace(config, block_tokens=block_tokens)
    runner = ModelRunner(
        model,
        _load_weights(source, model, dtype, config.seed, device, shard),
        replace(config, kv_blocks=0),
        threads=source.threads,
        clock=clock,
        device=device,
        attention=source.attention,
        shard=shard,
        collectives=collectives,
    )
    if device.type == "cuda":
        _settle_on_gpu(runner, config, source.memory_utilization, smallest, compute)
    else:
        blocks = config.kv_blocks or max(_CPU_KV_BLOCKS, config.max_blocks_per_request)
        runner.config = replace(config, kv_blocks=blocks)
        runner.allocate(blocks)
    return runner


def _settle_on_gpu(
    runner: ModelRunner,
    config: EngineConfig,
    memory_utilization: float,
    smallest: Callable[[int], int],
    compute: Compute,
) -> None:
    blocks = 1
    try:
        runner.allocate(blocks)
        graphs = runner.graph_shapes(mixed=True)
        blocks = config.kv_blocks or smallest(blocks_that_fit(runner, memory_utilization, graphs, compute))
        runner.config = replace(config, kv_blocks=blocks)
        runner.allocate(blocks)
        runner.capture(graphs)
        if runner.graphs is not None:
            slow = slower_than_larger(runner.graphs.times_ms)
            # Ranks pad to the same sizes: what is slow on one of them is dropped on all.
            runner.graphs.drop([shape for shape in graphs if not smallest(int(shape not in slow))])
        load_kernels(runner)
        rehearse(runner, compute)
    except (torch.OutOfMemoryError, OutOfDeviceMemory) as error:
        token_bytes = kv_bytes_per_token(runner.model, runner.transformer.dtype.itemsize, runner.shard)
        raise ValueError(
            f"{blocks} KV blocks ({blocks * config.block_tokens * token_bytes / _GIB:.1f} GiB) and a step of "
            f"{config.max_budget_tokens} tokens do not fit a GPU beside the weights ({error}): lower kv_blocks, "
            "max_budget_tokens or memory_utilization, or spread the model over more GPUs"
        ) from error


def _device(source: ModelSource) -> torch.device:
    if source.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device {source.device!r} is asked for, but torch finds no such device here: use cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _load_weights(
    source: ModelSource, model: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device, shard: Shard
) -> Weights:
    weight_bytes = parameter_count(model) * dtype.itemsize // (shard.tp_size * shard.pp_size)
    try:
        if device.type == "cuda" and weight_bytes > torch.cuda.mem_get_info(device)[0]:
            raise torch.OutOfMemoryError
        if source.folder is None or source.load_format == "dummy":
            return dummy_weights(model, dtype, seed, device, shard)
        return load_safetensors(source.folder, model, dtype, device, shard)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"the {source.dtype} weights take {weight_bytes / _GIB:.1f} GiB on each GPU, and {free / _GIB:.1f} of "
            f"{total / _GIB:.1f} GiB are free: spread the model over more GPUs, use bfloat16 or a smaller model"
        ) from error
