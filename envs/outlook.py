"""What a law can know of the iteration that its answer acts on, one dead time after the one that telemetry reports.

The arithmetic is compiled: learned laws are trained on it, lane by lane, and all laws use it in every iteration.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled
from engine.protocol import MOST_PROMPTS, BatchComposition, QueueState, Telemetry

FloatArray = NDArray[np.float64]

REMAINING, START, CHUNK = 0, 1, 2
"""Rows of the prompts, float64 [3, MOST_PROMPTS]: tokens left, their context, and what the batch computes of them."""

NO_CHUNKS = (0,) * MOST_PROMPTS
NUMBERS = [Struct(f"{n}d") for n in range(MOST_PROMPTS + 1)]


class Outlook(NamedTuple):
    """The state in which the next batch under our knobs is formed: who decodes, and which prompts are left to compute.

    Requests that end in between are not known beforehand, so the decodes are never too few. `prompts`, float64 [n, 2],
    are the first that are left, (remaining, context) in tokens, in the order in which they are served; behind them wait
    `behind_requests` that telemetry does not list, of `behind_tokens` together. `held_requests` wait as well, with
    `held_tokens`, but find no seat or no room in the KV cache, or stand behind one that finds none.
    """

    decodes: int
    decode_context_tokens: int
    prompts: FloatArray
    behind_requests: int
    behind_tokens: int
    held_requests: int = 0
    held_tokens: int = 0

    @property
    def n_prompts(self) -> int:
        return len(self.prompts) + self.behind_requests + self.held_requests

    @property
    def prompt_tokens(self) -> int:
        """All that are left to compute."""
        return int(self.prompts[:, REMAINING].sum()) + self.behind_tokens + self.held_tokens

    @property
    def head_context_tokens(self) -> int:
        return int(self.prompts[0, START]) if len(self.prompts) else 0


def foresee(telemetry: Telemetry, under_way: Sequence[tuple[int, int]] = ()) -> Outlook:
    """The state one dead time after this launch, for the stall-free schedule.

    Decodes get one token in each iteration. `under_way` are (budget, chunk) of the iterations in between, the next one
    first, where the dead time is above 1; those missing are taken to be under the knobs now in force.

    In a pipeline a batch decodes only those of one turn: this one's are taken for the next one's.
    """
    batch, queue = telemetry.batch, telemetry.queue
    prompts = np.zeros((3, MOST_PROMPTS))
    in_force, bounds = (telemetry.knobs.budget_tokens, telemetry.knobs.chunk_tokens), telemetry.bounds
    ahead = telemetry.dead_time_iterations - 1
    knobs = np.array([*under_way, *[in_force] * ahead][:ahead], np.int64).reshape(-1, 2)
    n, *others = served(
        prompts,
        list_prompts(prompts, queue, batch),
        max(queue.running_requests - batch.decode_tokens, batch.prefill_requests),
        queue.waiting_requests,
        queue.waiting_prompt_tokens,
        (bounds.max_requests - queue.running_requests, (1.0 - telemetry.kv_usage) * bounds.kv_tokens),
        unspent(in_force[0], bounds.tile_tokens, batch.total_tokens),
    )
    n, decodes, context = run_ahead(prompts, n, batch.decode_tokens, batch.decode_context_tokens, knobs)
    return Outlook(int(decodes), int(context), prompts[:CHUNK, :n].T, *map(int, others))


def list_prompts(prompts: FloatArray, queue: QueueState, batch: BatchComposition) -> int:
    """Write to `prompts` what telemetry tells of them; returns how many those are."""
    remaining, context = queue.prompt_remaining_tokens[:MOST_PROMPTS], queue.prompt_context_tokens[:MOST_PROMPTS]
    n = min(len(remaining), len(context))
    chunks = (*batch.prefill_chunk_tokens, *NO_CHUNKS)[:MOST_PROMPTS]
    # Several times as fast as numpy's own assignment, which looks at each number's type.
    for row, tokens in ((REMAINING, remaining), (START, context), (CHUNK, chunks)):
        NUMBERS[len(tokens)].pack_into(prompts.data, row * prompts.strides[0], *tokens)
    return n


@compiled
def unspent(budget: float, tile: float, spent: float) -> float:
    """Tokens of a budget that a batch left over."""
    return (budget if budget <= tile else budget // tile * tile) - spent


@compiled
def served(
    prompts: FloatArray,
    n: int,
    begun: float,
    waiting: float,
    waiting_tokens: float,
    room: tuple[float, float],
    unspent_tokens: float,
) -> tuple[int, float, float, float, float]:
    """(of the n listed prompts those that will be served; requests behind them, their tokens; requests held, theirs).

    `begun` and `waiting` are all that there are; `room` is what admission finds, seats and tokens of the KV cache.
    Requests are admitted in their order, so the first that does not fit holds up all behind it. It takes its prompt's
    tokens at least; and it did not fit if this batch left some of its budget `unspent` while it waited. It may fit
    soon. As whoever comes to fill a batch is taken to have no context, nobody counts as held up where the prefix cache
    has some.
    """
    seats, free_tokens = room
    # Where all are listed those that wait are the last; `begun` counts, in a pipeline, who decodes in other batches.
    first = int(max(n - waiting if n < MOST_PROMPTS else min(begun, n), 0.0))
    none_fits, cached = waiting > 0.0 and unspent_tokens > 0.0, 0.0
    fit, fit_tokens, waiting_listed = n, 0.0, 0.0
    for i in range(first, n):
        waiting_listed += prompts[REMAINING, i]
        cached += prompts[START, i]
        if fit == n and (none_fits or i - first >= seats or waiting_listed > free_tokens):
            fit, fit_tokens = i, waiting_listed - prompts[REMAINING, i]
    behind = behind_tokens = 0.0
    if n == MOST_PROMPTS and begun + waiting > n:
        behind = begun + waiting - n
        behind_tokens = max(waiting_tokens - waiting_listed, behind)
    if cached == 0.0 and (none_fits or fit < n):
        return fit, 0.0, 0.0, n - fit + behind, waiting_listed - fit_tokens + behind_tokens
    return n, behind, behind_tokens, 0.0, 0.0


@compiled
def run_ahead(
    prompts: FloatArray, n: int, decodes: float, context: float, under_way: NDArray[np.int64]
) -> tuple[int, float, float]:
    """(prompts left, decodes, their context) when this batch and those `under_way` have run.

    `under_way`, int64 [iterations, 2], are their knobs. The prompts that are left take the first places.
    """
    n, decodes, context = _computed(prompts, n, decodes, context)
    for i in range(len(under_way)):
        left, chunk = under_way[i, 0] - decodes, float(under_way[i, 1])
        for k in range(n):
            part = max(min(prompts[REMAINING, k], chunk, left), 0.0)
            prompts[CHUNK, k] = part
            left -= part
        n, decodes, context = _computed(prompts, n, decodes, context)
    return n, decodes, context


@compiled
def _computed(prompts: FloatArray, n: int, decodes: float, context: float) -> tuple[int, float, float]:
    """The state when a batch with these chunks has run."""
    context += decodes
    left = 0
    for i in range(n):
        chunk, remaining, start = prompts[CHUNK, i], prompts[REMAINING, i], prompts[START, i]
        if remaining <= 0.0:
            continue
        if chunk >= remaining:
            decodes += 1.0
            context += start + remaining
            continue
        remaining, start, at = remaining - chunk, start + chunk, left
        # Those just begun take their place: the least remaining is served first.
        while chunk > 0.0 and at > 0 and prompts[REMAINING, at - 1] > remaining:
            prompts[REMAINING, at], prompts[START, at] = prompts[REMAINING, at - 1], prompts[START, at - 1]
            at -= 1
        prompts[REMAINING, at], prompts[START, at] = remaining, start
        left += 1
    return left, decodes, context
