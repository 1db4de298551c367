"""How many KV blocks a GPU has room for, beside the weights and all that a step needs."""

import logging
from collections import deque
from collections.abc import Callable

import torch

from engine.execution import Execution
from engine.model_runner import ModelRunner
from engine.step_input import StepInput, even_step
from engine.step_shapes import StepShape, product_sizes

logger = logging.getLogger(__name__)

_GIB = 2**30

Compute = Callable[[ModelRunner, StepInput], Execution]
"""How a runner is given a step: `ModelRunner.execute`, or together with the stages before and after it."""


def rehearse(runner: ModelRunner, compute: Compute) -> None:
    """Compute the largest step, with as many in flight as there ever are.

    Kernels are compiled then, the ranks connected, and the allocator has the memory: that of the step itself and that
    of hidden states on their way, of which a stage keeps those of `depth` steps while it sends another. Every rank must
    take part. Raises OutOfDeviceMemory or torch.OutOfMemoryError.
    """
    config = runner.config
    n_tokens = min(config.max_budget_tokens, config.max_requests * config.max_model_tokens)
    step = even_step(n_tokens, min(config.max_requests, n_tokens), config.block_tokens)
    in_flight: deque[Execution] = deque()
    for _ in range(config.depth + 1):
        if len(in_flight) == config.depth:
            in_flight.popleft().tokens()
        in_flight.append(compute(runner, step))
    for execution in in_flight:
        execution.tokens()


@torch.inference_mode()
def load_kernels(runner: ModelRunner) -> None:
    """Have the matrix kernels loaded that steps are likely to want: libraries choose them by size. None on a CPU.

    CUDA loads a kernel at its first use, and then the host waits until the device is idle: a launch is late by as long
    as the steps in flight take, and so are their tokens.
    """
    if runner.device.type == "cpu":
        return
    for n_tokens in reversed(product_sizes(runner.config.max_budget_tokens)):  # so that the allocator needs no more
        runner.transformer.multiply(n_tokens, sampled=n_tokens <= runner.config.max_requests)
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()  # what comes next takes what it needs in one piece


def blocks_that_fit(
    runner: ModelRunner,
    memory_utilization: float,
    graphs: list[StepShape],
    compute: Compute = ModelRunner.execute,
) -> int:
    """KV blocks for a runner on CUDA that has its weights and a cache of one block, used by none but this.

    `memory_utilization` is the share of the device's memory that everything on it may take. Raises ValueError, naming
    the sizes and the remedies, when a request of max_model_tokens does not fit; and like `rehearse`.
    """
    config = runner.config
    step_bytes = _step_bytes(runner, compute)
    graph_bytes = _graph_bytes(runner, graphs)
    free_bytes, total_bytes = _memory(runner)
    used_bytes = total_bytes - free_bytes
    block_bytes = sum(layer.nbytes for layer in runner.kv_cache)
    cache_bytes = int(total_bytes * memory_utilization) - used_bytes - step_bytes - graph_bytes
    blocks = cache_bytes // block_bytes
    sizes = (
        f"{memory_utilization:.0%} of {total_bytes / _GIB:.1f} GiB, less {used_bytes / _GIB:.1f} of weights and other "
        f"uses, {step_bytes / _GIB:.1f} for a step of {config.max_budget_tokens} tokens and {graph_bytes / _GIB:.1f} "
        f"of CUDA graphs, leaves {cache_bytes / _GIB:.1f} GiB for the KV cache"
    )
    if blocks < config.max_blocks_per_request:
        raise ValueError(
            f"{sizes}, and one request of {config.max_model_tokens} tokens takes "
            f"{config.max_blocks_per_request * block_bytes / _GIB:.1f}: lower max_model_tokens or max_budget_tokens, "
            "raise memory_utilization, or spread the model over more GPUs"
        )
    logger.info("%s: %d blocks of %d tokens", sizes, blocks, config.block_tokens)
    return blocks


def _step_bytes(runner: ModelRunner, compute: Compute) -> int:
    """What the largest step takes beside weights and cache."""
    rehearse(runner, compute)  # the first time takes what stays: workspaces, compiled kernels, NCCL's buffers
    _memory(runner)
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_reserved(runner.device)
    rehearse(runner, compute)
    return torch.cuda.max_memory_reserved(runner.device) - before


def _graph_bytes(runner: ModelRunner, shapes: list[StepShape]) -> int:
    """All graphs share the memory of the largest one, captured first; each has its own on top, as the second shows."""
    taken = []
    for n in range(1, min(2, len(shapes)) + 1):
        before, _ = _memory(runner)
        runner.capture(shapes[:n])
        taken.append(before - _memory(runner)[0])
        runner.capture([])
    if len(taken) < 2:
        return sum(taken)
    return taken[0] + (len(shapes) - 1) * max(0, taken[1] - taken[0])


def _memory(runner: ModelRunner) -> tuple[int, int]:
    """Free and total bytes of the device; what torch's allocator keeps for later counts as free."""
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(runner.device)
