"""A shard of a model without its runner, and sequences of tokens that are computed by it step by step."""

import numpy as np
import torch
from checkpoints import ENGINE

from engine.attention.backend import allocate_kv_cache
from engine.attention.choice import make_attention
from engine.device_inputs import DeviceInputs
from engine.model import Transformer
from engine.model_config import ModelConfig
from engine.ops import TorchOps
from engine.shard import SINGLE, WHOLE, Collectives, Shard
from engine.step_input import StepInput
from engine.weights import Weights

CPU = torch.device("cpu")


class Computer:
    """A shard of a model with its KV cache: what a runner has, without the runner."""

    def __init__(
        self, model: ModelConfig, weights: Weights, shard: Shard = WHOLE, collectives: Collectives = SINGLE
    ) -> None:
        self.transformer = Transformer(model, weights, ENGINE.max_model_tokens, TorchOps(), shard, collectives)
        cache = allocate_kv_cache(model, ENGINE.kv_blocks, ENGINE.block_tokens, self.transformer.dtype, CPU, shard)
        self.attention = make_attention("sdpa", model, cache, ENGINE, CPU, shard)

    @torch.inference_mode()
    def forward(self, step: StepInput, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocab], or what the next stage takes."""
        inputs = device_inputs(step)
        return self.transformer.forward(inputs, self.attention.prepare(step, inputs), hidden)


def device_inputs(step: StepInput) -> DeviceInputs:
    ends, positions = np.cumsum(step.n_tokens), step.positions
    rows = np.repeat(np.arange(len(step.n_tokens)), step.n_tokens)
    blocks = step.block_tables[rows, positions // ENGINE.block_tokens].astype(np.int64)
    return DeviceInputs(
        token_ids=torch.from_numpy(step.token_ids),
        positions=torch.from_numpy(positions),
        kv_slots=torch.from_numpy(blocks * ENGINE.block_tokens + positions % ENGINE.block_tokens),
        query_starts=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        context_ends=torch.from_numpy(step.context + step.n_tokens),
        block_tables=torch.from_numpy(step.block_tables),
        sampled=torch.from_numpy(ends[step.sampled_rows] - 1),
        n_decodes=step.n_decodes,
        max_query_tokens=int(step.n_tokens.max()),
        max_context_tokens=int((step.context + step.n_tokens).max()),
    )


class Sequences:
    """Sequences of tokens in scattered blocks of the cache; blocks that come free are used again."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.free: list[int] = self.rng.permutation(ENGINE.kv_blocks).tolist()
        self.blocks: dict[int, list[int]] = {}

    def step(self, work: list[tuple[int, list[int], int, int]], n_decodes: int = 0) -> StepInput:
        """`work` is (sequence, its known tokens, context, tokens), decodes first; rows that reach the end sample."""
        for sequence, _, context, n in work:
            held = self.blocks.setdefault(sequence, [])
            while len(held) * ENGINE.block_tokens < context + n:
                held.append(self.free.pop())
        width = max(len(self.blocks[sequence]) for sequence, *_ in work)
        tables = np.zeros((len(work), width), dtype=np.int32)
        for row, (sequence, *_) in enumerate(work):
            tables[row, : len(self.blocks[sequence])] = self.blocks[sequence]
        return StepInput(
            n_decodes=n_decodes,
            n_tokens=np.array([n for *_, n in work], dtype=np.int32),
            context=np.array([context for _, _, context, _ in work], dtype=np.int32),
            token_ids=np.array([t for _, tokens, c, n in work for t in tokens[c : c + n]], dtype=np.int32),
            block_tables=tables,
            sampled_rows=np.flatnonzero([c + n == len(tokens) for _, tokens, c, n in work]).astype(np.int32),
            drawn=None,
        )

    def release(self, sequence: int) -> None:
        self.free += self.blocks.pop(sequence, [])
        self.rng.shuffle(self.free)
