"""Runs batches through the model on the CPU: `launch` prepares the inputs, `result` computes and samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention import BatchAttention, SdpaAttention, allocate_kv_cache
from engine.config import EngineConfig
from engine.model import Transformer
from engine.model_config import ModelConfig
from engine.protocol import StageTimes
from engine.request import Batch, StepResult
from engine.sampler import SamplingPlan, plan_sampling, sample
from engine.weights import Weights

_S_PER_NS = 1e-9


class ModelRunner:
    """A model with its KV cache; takes the scheduler's batches.

    `weights` (see engine.weights) fix the dtype of everything, and are emptied. `threads` is how many this process
    computes with, `clock` gives monotonic nanoseconds. Raises ValueError when `config` allows longer sequences than
    the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        config: EngineConfig,
        *,
        threads: int,
        clock: Callable[[], int],
    ) -> None:
        if config.max_model_tokens > model.max_position_embeddings:
            raise ValueError(
                f"max_model_tokens {config.max_model_tokens} is beyond the model's max_position_embeddings "
                f"{model.max_position_embeddings}: lower it"
            )
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
        self.vocab_size = model.vocab_size
        self.transformer = Transformer(model, weights, config.max_model_tokens)
        self.kv_cache = allocate_kv_cache(
            model, config.kv_blocks, config.block_tokens, self.transformer.embedding.dtype
        )
        self.attention = SdpaAttention(model, self.kv_cache, config.max_model_tokens)
        self.clock = clock

    def launch(self, batch: Batch) -> "Pending":
        """Turns the batch into tensors. The token ids are read now, so those of the iteration before must be known."""
        ends = np.cumsum(batch.n_tokens)
        first = ends - batch.n_tokens
        positions = np.arange(ends[-1]) + np.repeat(batch.context - first, batch.n_tokens)
        sampled = np.flatnonzero(batch.samples)
        return Pending(
            runner=self,
            token_ids=torch.from_numpy(_token_ids(batch)),
            positions=torch.from_numpy(positions),
            attention=self.attention.prepare(batch, positions),
            sampled=torch.from_numpy(ends[sampled] - 1),
            sampling=_plan_sampling(batch, sampled),
        )


@dataclass(slots=True)
class Pending:
    """A launched batch. Results must be taken in the order of the launches, once each."""

    runner: ModelRunner
    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: BatchAttention
    sampled: torch.Tensor
    sampling: SamplingPlan | None

    def result(self) -> StepResult:
        """Computes the batch, and the tokens of the rows that sample."""
        start_ns = self.runner.clock()
        with torch.inference_mode():
            tokens = sample(self.logits(), self.sampling)
        device_s = (self.runner.clock() - start_ns) * _S_PER_NS
        return StepResult(tokens, device_s, (StageTimes(busy_s=device_s, bubble_s=0.0, microbatches_in_flight=1),))

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """Logits [rows that sample, vocab], without sampling; writes the KV cache like `result`."""
        return self.runner.transformer.forward(self.token_ids, self.positions, self.attention, self.sampled)


def _token_ids(batch: Batch) -> NDArray[np.int64]:
    ids: list[int] = []
    for request, context, n_tokens in zip(batch.requests, batch.context.tolist(), batch.n_tokens.tolist(), strict=True):
        ids += request.token_ids[context : context + n_tokens]
    return np.array(ids, dtype=np.int64)


def _plan_sampling(batch: Batch, sampled: NDArray[np.intp]) -> SamplingPlan | None:
    requests = [batch.requests[row] for row in sampled.tolist()]
    known = (batch.context + batch.n_tokens)[sampled].tolist()
    return plan_sampling(
        [request.sampling for request in requests],
        [request.seed for request in requests],
        # Counted from the batch, not from the request: recomputing after a preemption then draws the same number.
        [n - request.n_prompt for n, request in zip(known, requests, strict=True)],
    )
