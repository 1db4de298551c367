"""The one batching rule: which requests an iteration serves, and how many tokens of each.

Written once, over plain arrays, compiled by numba: the live scheduler calls it and then deals with block ids, the
simulator calls it and then advances its clock. Nothing here knows about time, tokens' values or tensors.

The default schedule is stall-free batching (Sarathi-Serve, OSDI'24, section 4.2): decodes first, then running prefills,
then new requests, until the token budget is spent. The others are the baselines that the paper compares with.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled

IntArray = NDArray[np.int64]

STALL_FREE, PREFILL_FIRST, ORCA, REQUEST_LEVEL, CHUNKS_ONLY = range(5)
SCHEDULES = {
    "stall-free": STALL_FREE,  # decodes and prompt chunks share an iteration (Sarathi-Serve)
    "prefill-first": PREFILL_FIRST,  # whole prompts by themselves before any decode (vLLM as the paper tested it)
    "orca": ORCA,  # decodes and whole prompts share an iteration
    "request-level": REQUEST_LEVEL,  # a group runs to its end before the next is admitted (FasterTransformer)
    "chunks-only": CHUNKS_ONLY,  # chunks and decodes take turns, never mixed
}


class RequestArrays(NamedTuple):
    """State of all requests, int64, one row a slot.

    A request is a decode when `context >= prefill_end`: `prefill_end` counts the tokens that were known when it was
    (re)admitted, so a preempted request prefills its prompt and its output again.
    """

    context: IntArray  # tokens in the KV cache
    prefill_end: IntArray  # tokens to have there before its next token can be sampled
    held_blocks: IntArray  # KV blocks in its table
    freeable_blocks: IntArray  # of those, the ones that its preemption would free (the rest are shared)
    cached_tokens: IntArray  # of a waiting request, tokens found in the prefix cache
    need_blocks: IntArray  # of a waiting request, free KV blocks that its admission takes


class Limits(NamedTuple):
    """Capacities fixed at launch."""

    max_requests: int
    max_budget_tokens: int
    block_tokens: int
    tile_tokens: int


class Plan(NamedTuple):
    """Where the rule writes its answer, int64: rows (slot, tokens) of the batch, and the slots it preempts."""

    slots: IntArray
    tokens: IntArray
    preempted: IntArray


def empty_plan(max_requests: int) -> Plan:
    return Plan(*(np.zeros(max_requests, np.int64) for _ in range(3)))


@compiled
def _whole_tiles(tokens: int, tile_tokens: int) -> int:
    return tokens if tokens <= tile_tokens else tokens // tile_tokens * tile_tokens


@compiled
def _place_decodes(
    running: IntArray, requests: RequestArrays, limits: Limits, free: int, plan: Plan
) -> tuple[int, int, int, int]:
    """Serve every decode, oldest first; where blocks run out the youngest request is preempted (recompute).

    Returns (rows placed, requests still running, blocks still free, requests preempted).
    """
    context, prefill_end, held_blocks = requests.context, requests.prefill_end, requests.held_blocks
    rows, end, n_preempted = 0, len(running), 0
    i = 0
    while i < end:
        slot = running[i]
        i += 1
        if context[slot] < prefill_end[slot]:
            continue
        if context[slot] >= held_blocks[slot] * limits.block_tokens:
            while free < 1 and end >= i:
                end -= 1
                victim = running[end]
                free += requests.freeable_blocks[victim]
                plan.preempted[n_preempted] = victim
                n_preempted += 1
            if end < i:  # it was itself the youngest
                break
            free -= 1
        plan.slots[rows] = slot
        plan.tokens[rows] = 1
        rows += 1
    return rows, end, free, n_preempted


@compiled
def _place_running_prefills(
    running: IntArray, end: int, requests: RequestArrays, chunk: int, left: int, plan: Plan, rows: int
) -> tuple[int, int]:
    """Continue the prompts under way, oldest first. Returns (rows placed in all, tokens left of the budget)."""
    for i in range(end):
        slot = running[i]
        remaining = requests.prefill_end[slot] - requests.context[slot]
        if remaining <= 0:
            continue
        tokens = min(remaining, chunk, left)
        if tokens <= 0:
            break
        plan.slots[rows] = slot
        plan.tokens[rows] = tokens
        rows += 1
        left -= tokens
    return rows, left


@compiled
def _admit(
    waiting: IntArray,
    n_running: int,
    requests: RequestArrays,
    limits: Limits,
    free: int,
    chunk: int,
    left: int,
    room: int,
    plan: Plan,
    rows: int,
) -> int:
    """Admit waiting requests in order, and stop at the first that does not fit. Returns how many were admitted.

    A request's `need_blocks` are taken at its admission, and one block for each running request is left spare, so
    that a newcomer is not preempted by the next decode. `chunk` 0 means whole prompts: the first may exceed the budget
    (`left`) but never the buffers (`room`).
    """
    admitted = 0
    for slot in waiting:
        if n_running + admitted >= limits.max_requests:
            break
        remaining = requests.prefill_end[slot] - requests.cached_tokens[slot]
        need = requests.need_blocks[slot]
        if free - need < n_running + admitted:
            break
        if chunk > 0:
            tokens = min(remaining, chunk, left)
            if tokens <= 0:
                break
        else:
            tokens = remaining
            if tokens > (room if admitted == 0 else min(left, room)):
                break
        plan.slots[rows] = slot
        plan.tokens[rows] = tokens
        rows += 1
        admitted += 1
        free -= need
        left -= tokens
        room -= tokens
    return admitted


@compiled
def form_batch(
    schedule: int,
    budget_tokens: int,
    chunk_tokens: int,
    prefill_turn: bool,
    free_blocks: int,
    running: IntArray,
    waiting: IntArray,
    requests: RequestArrays,
    limits: Limits,
    plan: Plan,
) -> tuple[int, int, int, int]:
    """Form the next batch under the knobs.

    `running` and `waiting` list slots, oldest first; of `waiting` the first `max_requests` are enough. `prefill_turn`
    matters to "chunks-only": it is true when the iteration before decoded. The rows of the batch are written to
    `plan`: decodes, then running prefills, then the requests admitted (the first ones of `waiting`).

    Whatever the knobs: every decode is served (a budget below their number counts as their number), the total stays
    within the budget, a chunk within the cap; knobs above one tile are cut down to whole tiles; requests over a lowered
    limit drain. A request is preempted only when KV blocks run out, and then nothing is admitted.

    Returns (decodes, running prefills, admitted, preempted).
    """
    budget = _whole_tiles(budget_tokens, limits.tile_tokens)
    chunk = _whole_tiles(chunk_tokens, limits.tile_tokens)
    whole = schedule in (PREFILL_FIRST, ORCA, REQUEST_LEVEL)
    mixes = schedule in (STALL_FREE, ORCA)
    end, n_admitted = len(running), 0

    prefills_before = schedule == PREFILL_FIRST or (schedule == CHUNKS_ONLY and prefill_turn)
    if prefills_before or (schedule == REQUEST_LEVEL and end == 0):
        rows, left = _place_running_prefills(running, end, requests, chunk, budget, plan, 0)
        room = limits.max_budget_tokens
        n_admitted = _admit(waiting, end, requests, limits, free_blocks, 0 if whole else chunk, left, room, plan, rows)
        if rows + n_admitted > 0:
            return 0, rows, n_admitted, 0

    n_decodes, end, free, n_preempted = _place_decodes(running, requests, limits, free_blocks, plan)
    if n_decodes > 0 and not mixes:
        return n_decodes, 0, 0, n_preempted
    rows, left = n_decodes, budget - n_decodes
    if n_decodes < end:
        rows, left = _place_running_prefills(running, end, requests, chunk, left, plan, rows)
    if n_preempted == 0 and not (schedule == REQUEST_LEVEL and end > 0):
        room = limits.max_budget_tokens - n_decodes
        n_admitted = _admit(waiting, end, requests, limits, free, 0 if whole else chunk, left, room, plan, rows)
    return n_decodes, rows - n_decodes, n_admitted, n_preempted
