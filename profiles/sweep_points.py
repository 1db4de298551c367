"""The batches that a sweep times: which there are on an engine, and how to make one without a scheduler."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.request import Batch, Request, SamplingParams, Submit
from envs.step_time_features import SIZE_TOKENS

IntArray = NDArray[np.int64]

PREFILLS = (1, 2, 4, 8)
SHORTEST = 16
MOST_SIZED = 2048  # tokens: from there on one more tile of a matrix product is a small part of it


class Point(NamedTuple):
    """A batch: `decodes` requests of `decode_context` tokens on average, and prompts, each a chunk behind a prefix.

    The decodes' contexts spread evenly from half to one and a half of their mean, for no two requests are alike.
    """

    decodes: int
    decode_context: int
    prefills: int = 0
    chunk: int = 0
    prefix: int = 0

    @property
    def contexts(self) -> IntArray:
        """Tokens in the KV cache of each row, decodes first; shape [rows]."""
        spread = (np.arange(self.decodes) + 0.5) / max(self.decodes, 1) - 0.5
        decodes = np.maximum(np.rint(self.decode_context * (1 + spread)), 1).astype(np.int64)
        return np.concatenate([decodes, np.full(self.prefills, self.prefix, np.int64)])

    @property
    def n_tokens(self) -> IntArray:
        """Tokens that each row computes, shape [rows]."""
        return np.repeat(np.array([1, self.chunk]), [self.decodes, self.prefills])

    @property
    def features(self) -> tuple[float, ...]:
        """(tokens, decodes, their context, prefill requests, W): what a step-time model sees of it."""
        prompt = self.prefills * self.chunk
        attention = prompt * (self.prefix + 0.5 * self.chunk)
        return self.decodes + prompt, self.decodes, self.decodes * self.decode_context, self.prefills, attention

    def blocks(self, block_tokens: int) -> IntArray:
        """KV blocks of each row, shape [rows]."""
        return -(-(self.contexts + self.n_tokens) // block_tokens)

    def fits(self, config: EngineConfig) -> bool:
        """Whether an engine of these capacities could form it: seats, budget, model length and KV cache."""
        rows = self.decodes + self.prefills
        if not (0 < rows <= config.max_requests and self.n_tokens.sum() <= config.max_budget_tokens):
            return False
        longest = int((self.contexts + self.n_tokens).max())
        return longest < config.max_model_tokens and int(self.blocks(config.block_tokens).sum()) <= config.kv_blocks


def candidates(config: EngineConfig, rng: Generator) -> list[Point]:
    """What the engine can form, each once: a grid, evenly spaced on logarithmic scales, but for tokens of mixed ones.

    These fill a budget (the largest, or a half of it, a quarter..) or, as often, lie anywhere between two: matrix
    products take their time in steps, which a few fixed numbers of tokens would hide or take for all there is.
    """
    decodes = _levels(1, config.max_requests, 14)
    alone = [Point(n, context) for n in decodes for context in _levels(SHORTEST, _longest(config, n), 8)]
    beside = [(0, 1), *((n, context) for n in decodes[::3] for context in _levels(SHORTEST, _longest(config, n), 6))]
    budgets = [config.max_budget_tokens]
    while budgets[-1] >= 2 * SHORTEST:
        budgets.append(budgets[-1] // 2)
    prefixes = (0, *_levels(8 * SHORTEST, round(0.8 * config.max_model_tokens), 6))
    mixed = []
    for (n, context), prefills, budget, prefix in product(beside, PREFILLS, budgets, prefixes):
        tokens = budget if rng.random() < 1 / 2 else int(budget * rng.uniform(0.5, 1))
        if tokens - n >= prefills * SHORTEST:
            mixed.append(Point(n, context, prefills, (tokens - n) // prefills, prefix))
    return [point for point in dict.fromkeys((*alone, *mixed)) if point.fits(config)]


def by_size(config: EngineConfig) -> list[Point]:
    """Mixed batches alike but for their size, ascending: a few decodes and a prompt, every `SIZE_TOKENS` tokens."""
    decodes = min(8, config.max_requests - 1)
    context = min(512, _longest(config, max(decodes, 1)))
    sizes = range(SIZE_TOKENS, min(MOST_SIZED, config.max_budget_tokens) + 1, SIZE_TOKENS)
    points = [Point(decodes, context, 1, size - decodes) for size in sizes]
    return [point for point in points if point.fits(config)]


def drawn(config: EngineConfig, rng: Generator) -> Iterator[Point]:
    """Batches at random, a third of them decode-only, without end: to judge a model on what no grid holds."""

    def pick(low: int, high: int) -> int:
        return round(float(np.exp(rng.uniform(np.log(low), np.log(max(high, low))))))

    while True:
        decodes = pick(1, config.max_requests)
        point = Point(decodes, pick(SHORTEST, _longest(config, decodes)))
        if rng.random() > 1 / 3:
            prefills = int(rng.choice(PREFILLS))
            chunk = max(pick(SHORTEST, config.max_budget_tokens) // prefills, 1)
            prefix = 0 if rng.random() < 1 / 3 else pick(SHORTEST, config.max_model_tokens)
            point = point._replace(prefills=prefills, chunk=chunk, prefix=prefix)
        if point.fits(config):
            yield point


class BatchMaker:
    """Makes batches of requests that no client has sent: they share one list of tokens, long enough for every context.

    So no row of one batch waits for a token of another, and any number of batches may be in flight.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        tokens = [1] * config.max_model_tokens
        self._requests = []
        for slot in range(config.max_requests):
            request = Request(Submit("sweep", [1], SamplingParams(max_tokens=1)), slot, seed=0, arrival_ns=0)
            request.token_ids = tokens
            self._requests.append(request)

    def make(self, point: Point) -> Batch:
        """The batch, every row with KV blocks of its own and a token to sample."""
        rows = point.decodes + point.prefills
        held = point.blocks(self._config.block_tokens)
        tables = np.zeros((rows, int(held.max())), np.int32)
        tables[np.arange(tables.shape[1]) < held[:, None]] = np.arange(held.sum(), dtype=np.int32)
        return Batch(
            requests=self._requests[:rows],
            n_decodes=point.decodes,
            slots=np.arange(rows),
            n_tokens=point.n_tokens,
            context=point.contexts,
            samples=np.ones(rows, np.bool_),
            block_tables=tables,
        )


def _longest(config: EngineConfig, decodes: int) -> int:
    """The longest mean context of so many decodes: the longest of them fits the model, all of them the KV cache."""
    return int(min(config.max_model_tokens / 1.5 - 2, 0.95 * config.kv_blocks * config.block_tokens / decodes))


def _levels(low: int, high: int, count: int) -> list[int]:
    """Up to `count` whole numbers from `low` to `high`, evenly apart on a logarithmic scale."""
    return sorted({round(float(x)) for x in np.geomspace(low, max(high, low), count)})
