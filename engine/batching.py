"""The one batching rule: which requests an iteration serves, and how many tokens of each.

Written once, over plain arrays, compiled by numba: the live scheduler calls it and then deals with block ids, the
simulator calls it and then advances its clock. Nothing here knows about time, tokens' values or tensors.

The default schedule is stall-free batching (Sarathi-Serve, OSDI'24, section 4.2): decodes first, then running prefills
(the shortest first, should a chunk below the budget have let several begin), then new requests, until the token budget
is spent. The others are the baselines that the paper compares with.
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

    A request can be scheduled while `context < context_limit`. On one stage that is all its tokens but the last, which
    is never computed: what an iteration in flight samples is on the device when the next one needs it. In a pipeline
    the first stage needs it while the last has yet to sample it, so the limit is the tokens whose values are known,
    and under look-ahead those, too, that the oldest iteration in flight samples: the first stage waits for these.
    """

    context: IntArray  # tokens in the KV cache, once all that is in flight has run
    context_limit: IntArray
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
    stages: int  # of the pipeline
    depth: int  # iterations in flight at once


class Plan(NamedTuple):
    """Where the rule writes its answer, int64: rows (slot, tokens) of the batch, and the slots it preempts.

    `ready` are its notes: those of the running that it can schedule.
    """

    slots: IntArray
    tokens: IntArray
    preempted: IntArray
    ready: IntArray


def empty_plan(max_requests: int) -> Plan:
    return Plan(*(np.zeros(max_requests, np.int64) for _ in Plan._fields))


@compiled
def _whole_tiles(tokens: int, tile_tokens: int) -> int:
    return tokens if tokens <= tile_tokens else tokens // tile_tokens * tile_tokens


@compiled
def _ready(running: IntArray, requests: RequestArrays, stages: int, plan: Plan) -> tuple[int, int]:
    """Write those that can be scheduled to `plan.ready`, oldest first. Returns (their number, most decodes of a batch).

    The microbatches of a pipeline share all decodes evenly, also those that are in flight.
    """
    ready = decodes = 0
    for slot in running:
        context = requests.context[slot]
        decodes += context >= requests.prefill_end[slot]
        plan.ready[ready] = slot
        ready += context < requests.context_limit[slot]
    return ready, -(-decodes // stages)


@compiled
def _place_decodes(
    running: IntArray, in_flight: int, most: int, requests: RequestArrays, limits: Limits, free: int, plan: Plan
) -> tuple[int, int, int, int]:
    """Serve the decodes, oldest first, `most` of them; where blocks run out the youngest is preempted (recompute).

    Of `running` all can be scheduled; `in_flight` others cannot, nor can they be preempted. While there are any, one
    that has none younger to preempt is left out instead: it may be older than they are, and they free blocks soon.

    Returns (rows placed, requests still running, blocks still free, requests preempted).
    """
    context, prefill_end, held_blocks = requests.context, requests.prefill_end, requests.held_blocks
    rows, end, n_preempted = 0, len(running), 0
    i = 0
    while i < end and rows < most:
        slot = running[i]
        i += 1
        if context[slot] < prefill_end[slot]:
            continue
        if context[slot] >= held_blocks[slot] * limits.block_tokens:
            keeps = i if in_flight > 0 else i - 1
            while free < 1 and end > keeps:
                end -= 1
                victim = running[end]
                free += requests.freeable_blocks[victim]
                plan.preempted[n_preempted] = victim
                n_preempted += 1
            if free < 1 or end < i:  # it was itself the youngest
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
    """Continue the prompts under way, the least remaining first, of equals the oldest. Returns (rows placed in all,
    tokens left of the budget).

    While the chunk is the budget hardly more than one is under way: the next begins with what the last has left over. A
    smaller chunk lets a short prompt begin beside a long one, and this order lets it past.
    """
    n = rows
    for i in range(end):
        remaining = requests.prefill_end[running[i]] - requests.context[running[i]]
        if remaining <= 0:
            continue
        at = n
        while at > rows and remaining < requests.prefill_end[plan.slots[at - 1]] - requests.context[plan.slots[at - 1]]:
            plan.slots[at] = plan.slots[at - 1]
            at -= 1
        plan.slots[at] = running[i]
        n += 1
    for row in range(rows, n):
        slot = plan.slots[row]
        tokens = min(requests.prefill_end[slot] - requests.context[slot], chunk, left)
        if tokens <= 0:
            return row, left
        plan.tokens[row] = tokens
        left -= tokens
    return n, left


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

    Whatever the knobs: every decode that is ready is served, in a pipeline its share of them (a budget below their
    number counts as their number), the total stays within the budget, a chunk within the cap; knobs above one tile are
    cut down to whole tiles; requests over a lowered limit drain. A request is preempted only when KV blocks run out,
    and then nothing is admitted; the last decode is left out instead while others are in flight, which may be younger.

    Returns (decodes, running prefills, admitted, preempted).
    """
    n_running = most_decodes = len(running)
    if limits.depth > 1:
        n_ready, most_decodes = _ready(running, requests, limits.stages, plan)
        running = plan.ready[:n_ready]
    budget = _whole_tiles(budget_tokens, limits.tile_tokens)
    chunk = _whole_tiles(chunk_tokens, limits.tile_tokens)
    first_chunk = 0 if schedule in (PREFILL_FIRST, ORCA, REQUEST_LEVEL) else chunk
    end, n_admitted, room = len(running), 0, limits.max_budget_tokens
    if schedule == PREFILL_FIRST or (schedule == CHUNKS_ONLY and prefill_turn):
        rows, left = _place_running_prefills(running, end, requests, chunk, budget, plan, 0)
        n_admitted = _admit(waiting, n_running, requests, limits, free_blocks, first_chunk, left, room, plan, rows)
        if rows + n_admitted > 0:
            return 0, rows, n_admitted, 0
    n_decodes, end, free, n_preempted = _place_decodes(
        running, n_running - len(running), most_decodes, requests, limits, free_blocks, plan
    )
    if n_decodes > 0 and schedule not in (STALL_FREE, ORCA):
        return n_decodes, 0, 0, n_preempted
    rows, left = n_decodes, budget - n_decodes
    if n_decodes < end:
        rows, left = _place_running_prefills(running, end, requests, chunk, left, plan, rows)
    if n_preempted == 0 and not (schedule == REQUEST_LEVEL and n_running > 0):
        room -= n_decodes
        n_admitted = _admit(waiting, n_running, requests, limits, free, first_chunk, left, room, plan, rows)
    return n_decodes, rows - n_decodes, n_admitted, n_preempted
