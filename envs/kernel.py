"""The simulator's inner loop: the engine's own batching rule under modelled time, compiled by numba.

`advance` is one iteration; everything above it is a step of it, in the order it happens.
"""

import numpy as np

from engine.batching import IntArray, form_batch
from engine.compiled import inlined
from envs.stages import await_tokens, drain, drop_without_blocks, forget_tokens, launch, mean_s, retire
from envs.state import Rules, State


@inlined
def _blocks(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


@inlined
def _enqueue(state: State, rules: Rules, slot: int) -> None:
    """Ready a request for (re)admission: what it has so far is its prompt."""
    known = state.requests.prompt_tokens[slot] + state.requests.produced[slot]
    in_all = state.requests.prompt_tokens[slot] + state.requests.output_tokens[slot]
    held = in_all if rules.reserve_output else known
    state.arrays.context[slot] = 0
    state.arrays.context_limit[slot] = known if rules.limits.stages > 1 else in_all - 1
    state.arrays.prefill_end[slot] = known
    state.arrays.need_blocks[slot] = _blocks(held, rules.limits.block_tokens)
    state.scalars[0].waiting_tokens += known


@inlined
def _arrive(state: State, rules: Rules) -> None:
    s = state.scalars[0]
    while s.arrived < len(state.requests.arrival_s) and state.requests.arrival_s[s.arrived] <= s.now_s:
        _enqueue(state, rules, s.arrived)
        state.waiting[s.tail] = s.arrived
        s.tail += 1
        s.arrived += 1


@inlined
def _plan_batch(state: State, rules: Rules, budget: int, chunk: int) -> tuple[int, int, int, int]:
    """What the engine's rule would do under these knobs: the plan is written, nothing else changes."""
    s = state.scalars[0]
    waiting = state.waiting[s.head : min(s.tail, s.head + rules.limits.max_requests)]
    return form_batch(
        rules.schedule,
        budget,
        chunk,
        s.prefill_turn == 1,
        s.free_blocks,
        state.running[: s.n_running],
        waiting,
        state.arrays,
        rules.limits,
        state.plan,
    )


@inlined
def _compose(state: State, decodes: int, rows: int) -> None:
    """Sum up the planned batch, before it changes any context; a newcomer's context is 0 until then."""
    s, context = state.scalars[0], state.arrays.context
    slots, tokens = state.plan.slots, state.plan.tokens
    decode_context = prefill_tokens = 0
    attention_tokens2 = 0.0
    for row in range(decodes):
        decode_context += context[slots[row]]
    for row in range(decodes, rows):
        prefill_tokens += tokens[row]
        attention_tokens2 += tokens[row] * (context[slots[row]] + 0.5 * tokens[row])
    s.rows, s.decodes, s.prefills = rows, decodes, rows - decodes
    s.decode_context, s.prefill_tokens, s.attention_tokens2 = decode_context, prefill_tokens, attention_tokens2


@inlined
def _ideal_budget(state: State, rules: Rules, limit_s: float) -> int:
    """The clairvoyant law: the largest whole-tile budget whose true mean time is within the limit.

    There is no limit while nothing decodes. At least one tile (the rule serves every decode whatever the budget).
    """
    tile = rules.limits.tile_tokens
    low, high = 1, rules.limits.max_budget_tokens // tile
    probe = high  # often everything fits; else halve
    while low < high:
        decodes, prefills, admitted, _ = _plan_batch(state, rules, probe * tile, probe * tile)
        _compose(state, decodes, decodes + prefills + admitted)
        if decodes == 0 or mean_s(state, rules) <= limit_s:
            low = probe
        else:
            high = probe - 1
        probe = (low + high + 1) // 2
    return min(low * tile, rules.limits.max_budget_tokens)


@inlined
def _form(state: State, rules: Rules, budget: int, chunk: int) -> int:
    """Form the next batch under the knobs and take its KV blocks. Returns its rows."""
    s, arrays, plan, requests = state.scalars[0], state.arrays, state.plan, state.requests
    decodes, prefills, admitted, preempted = _plan_batch(state, rules, budget, chunk)
    for i in range(preempted):
        slot = plan.preempted[i]
        s.free_blocks += arrays.held_blocks[slot]
        arrays.held_blocks[slot] = 0
        forget_tokens(state, slot)
        _enqueue(state, rules, slot)
        s.head -= 1
        state.waiting[s.head] = slot
    if preempted > 0:
        s.preemptions += preempted
        drop_without_blocks(state)
    for _ in range(admitted):
        slot = state.waiting[s.head]
        s.head += 1
        arrays.held_blocks[slot] = arrays.need_blocks[slot]
        s.free_blocks -= arrays.need_blocks[slot]
        s.waiting_tokens -= arrays.prefill_end[slot]
        if np.isnan(requests.first_scheduled_s[slot]):
            requests.first_scheduled_s[slot] = s.now_s
        state.running[s.n_running] = slot
        s.n_running += 1
    context, held_blocks, slots, block_tokens = (
        arrays.context,
        arrays.held_blocks,
        plan.slots,
        rules.limits.block_tokens,
    )
    for row in range(decodes):
        slot = slots[row]
        if context[slot] >= held_blocks[slot] * block_tokens:
            held_blocks[slot] += 1
            s.free_blocks -= 1
    if decodes + prefills + admitted > 0:
        s.prefill_turn = decodes > 0
    s.budget, s.chunk = budget, chunk
    _compose(state, decodes, decodes + prefills + admitted)
    return decodes + prefills + admitted


@inlined
def _log(state: State) -> None:
    s = state.scalars[0]
    row = state.log[s.n_logged]
    row[0], row[1], row[2] = s.now_s, s.budget, s.chunk
    row[3], row[4], row[5] = s.decodes, s.prefill_tokens, s.tail - s.head
    row[6], row[7], row[8] = s.decode_context, s.prefills, s.attention_tokens2
    s.n_logged += 1


@inlined
def advance(state: State, rules: Rules, budget: int, chunk: int, limit_s: float) -> int:
    """Launch one iteration, as soon as the live engine would, and book all that completed before it was formed.

    Under the clairvoyant law (`limit_s` > 0) the knobs are ignored. Returns the rows of its batch; 0 if nothing is left
    to run for now: the next call then begins at the next arrival.
    """
    s = state.scalars[0]
    s.n_done = s.n_gaps = s.n_firsts = s.n_finished = 0
    n_requests, wait = len(state.requests.arrival_s), s.in_flight == rules.limits.depth
    if s.in_flight == 0 and s.head == s.tail and s.n_running == 0 and s.arrived < n_requests:
        s.now_s = s.work_since_s = max(s.now_s, state.requests.arrival_s[s.arrived])
    while True:
        if wait:
            retire(state)
        _arrive(state, rules)
        await_tokens(state, rules)
        if limit_s > 0.0:
            budget = chunk = _ideal_budget(state, rules, limit_s)
        if _form(state, rules, budget, chunk) > 0:
            launch(state, rules)
            _log(state)
            return int(s.rows)
        if s.in_flight == 0:
            drain(state)
            return 0
        wait = True  # for what is in flight: nothing else can run


@inlined
def _among(slots: IntArray, slot: int) -> bool:
    for other in slots:  # noqa: SIM110  (numba has no `in` for arrays)
        if other == slot:
            return True
    return False


@inlined
def tell_prompts(state: State, most: int) -> None:
    """Write the first `most` prompts to compute, as of before the batch that `advance` launched, to `state.prompts`.

    The batch serves the first of them; then come the other running ones, the shortest first; then those that wait.
    """
    s, context, prefill_end = state.scalars[0], state.arrays.context, state.arrays.prefill_end
    told, start, batch = state.prompts.remaining, state.prompts.context, state.plan.slots[s.decodes : s.rows]
    n = served = min(s.rows - s.decodes, most)
    for i in range(n):
        start[i] = context[batch[i]] - state.plan.tokens[s.decodes + i]
        told[i] = prefill_end[batch[i]] - start[i]
    for slot in state.running[: s.n_running]:
        remaining = prefill_end[slot] - context[slot]
        if remaining <= 0 or _among(batch, slot):
            continue
        at = n
        while at > served and told[at - 1] > remaining:
            if at < most:
                told[at], start[at] = told[at - 1], start[at - 1]
            at -= 1
        if at < most:
            told[at], start[at] = remaining, context[slot]
            n = min(n + 1, most)
    for slot in state.waiting[s.head : min(s.tail, s.head + most - n)]:
        told[n], start[n] = prefill_end[slot], 0
        n += 1
    s.n_prompts = n


@inlined
def run(
    state: State, rules: Rules, budget: int, chunk: int, limit_s: float, until_s: float, max_iterations: int
) -> int:
    """Iterations under one law, until all requests have ended, the time or their number is reached, or the log is full.

    Returns the rows of the last batch; its prompts are told.
    """
    s = state.scalars[0]
    arrival_s, rows = state.requests.arrival_s, 0
    for _ in range(max_iterations):
        idle = s.in_flight == 0 and s.n_running == 0 and s.head == s.tail
        if idle and s.arrived < len(arrival_s) and arrival_s[s.arrived] >= until_s:
            s.now_s = max(s.now_s, until_s)
            rows = 0
            break
        rows = advance(state, rules, budget, chunk, limit_s)
        if s.finished == len(arrival_s) or s.now_s >= until_s or s.n_logged == len(state.log):
            break
    tell_prompts(state, len(state.prompts.context))
    return rows
