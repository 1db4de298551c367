"""Batches in flight on the pipeline stages: how long they take, and what happens when one is done."""

import numpy as np

from engine.compiled import inlined
from envs.state import FloatArray, Rules, State
from envs.step_mean import mean_step_s


@inlined
def drop_without_blocks(state: State) -> None:
    """Take the finished and the preempted out of the running list: those are the ones that hold no KV block."""
    s = state.scalars[0]
    running, held_blocks = state.running, state.arrays.held_blocks
    kept = 0
    for i in range(s.n_running):
        slot = running[i]
        running[kept] = slot
        kept += held_blocks[slot] > 0
    s.n_running = kept


@inlined
def forget_tokens(state: State, slot: int) -> None:
    """What is in flight of a request that was preempted is computed for nothing."""
    s, samples, slots = state.scalars[0], state.flight.samples, state.flight.slots
    for age in range(s.in_flight):
        ring = (s.oldest + age) % len(samples)
        kept = 0
        for i in range(samples[ring]):
            slots[ring, kept] = slots[ring, i]
            kept += slots[ring, i] != slot
        samples[ring] = kept


@inlined
def _book_tokens(state: State, first: int) -> bool:
    """The output tokens of an iteration that is done. Returns whether any request ended.

    Arrays are taken out of the state before the loop: this is where most of the time goes.
    """
    s, requests, report, arrays = state.scalars[0], state.requests, state.report, state.arrays
    held_blocks, produced, outputs = arrays.held_blocks, requests.produced, requests.output_tokens
    first_token_row, times_s = requests.first_token_row, state.token_times_s
    gap_s, gap_slots, first_slots = report.gap_s, report.gap_slots, report.first_slots
    slots, samples = state.flight.slots[first], state.flight.samples[first]
    completed_s = state.flight.completed_s[first]
    n_gaps, n_firsts, n_finished = s.n_gaps, s.n_firsts, s.n_finished
    for i in range(samples):
        slot = slots[i]
        token = first_token_row[slot] + produced[slot]
        times_s[token] = completed_s
        if produced[slot] == 0:
            first_slots[n_firsts] = slot
            n_firsts += 1
        else:
            gap_s[n_gaps] = completed_s - times_s[token - 1]
            gap_slots[n_gaps] = slot
            n_gaps += 1
        produced[slot] += 1
        if produced[slot] == outputs[slot]:
            s.free_blocks += held_blocks[slot]
            held_blocks[slot] = 0
            report.finished_slots[n_finished] = slot
            n_finished += 1
    ended = n_finished > s.n_finished
    s.finished += n_finished - s.n_finished
    s.n_gaps, s.n_firsts, s.n_finished = n_gaps, n_firsts, n_finished
    return bool(ended)


@inlined
def await_tokens(state: State, rules: Rules) -> None:
    """Under look-ahead in a pipeline: the next token of each that the oldest iteration serves can be computed from now
    on, once the first stage has their own.
    """
    s, flight, limits = state.scalars[0], state.flight, rules.limits
    if 1 < limits.stages < limits.depth and s.in_flight > 0 and s.awaited == 0:
        s.awaited = 1
        for i in range(flight.samples[s.oldest]):
            slot = flight.slots[s.oldest, i]
            last = state.requests.prompt_tokens[slot] + state.requests.output_tokens[slot] - 1  # is never computed
            state.arrays.context_limit[slot] = min(state.arrays.context_limit[slot] + 1, last)


@inlined
def retire(state: State) -> None:
    """Wait for the oldest iteration in flight: time goes on, tokens are booked, requests end."""
    s, flight = state.scalars[0], state.flight
    first, stages = s.oldest, len(state.stage_free_s)
    s.now_s = flight.completed_s[first]
    if stages > 1 and s.awaited == 0:  # the next token of each can be computed from now on
        for i in range(flight.samples[first]):
            state.arrays.context_limit[flight.slots[first, i]] += 1
    s.awaited = 0
    if _book_tokens(state, first):
        drop_without_blocks(state)
    done = state.report.done[s.n_done]
    done.iteration, done.scheduled_s = flight.iteration[first], flight.scheduled_s[first]
    done.completed_s = flight.completed_s[first]
    for stage in range(stages):
        state.report.busy_s[s.n_done, stage] = flight.busy_s[first, stage]
        state.report.bubble_s[s.n_done, stage] = flight.bubble_s[first, stage]
    done.gaps_end, done.firsts_end, done.finished_end = s.n_gaps, s.n_firsts, s.n_finished
    s.n_done += 1
    s.in_flight -= 1
    s.oldest = (first + 1) % len(flight.samples)


@inlined
def mean_s(state: State, rules: Rules) -> float:
    """True mean time of the composed batch on one stage."""
    s = state.scalars[0]
    seconds = mean_step_s(
        rules.coefficients, s.decodes, s.decode_context, s.prefills, s.prefill_tokens, s.attention_tokens2
    )
    return float(s.slowdown * seconds)


@inlined
def _noise(seed: int, counter: int, residuals: FloatArray) -> float:
    """The factor of one batch on one stage: a hash of its number (splitmix64), so that laws meet the same noise."""
    z = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return float(residuals[np.int64(z % np.uint64(len(residuals)))])


@inlined
def drain(state: State) -> None:
    """Nothing is left to run: a stage that ended before the last one stood idle while there was work."""
    now_s, work_since_s = state.scalars[0].now_s, state.scalars[0].work_since_s
    for stage in range(len(state.stage_free_s)):
        state.stage_bubble_s[stage] += now_s - max(state.stage_free_s[stage], work_since_s)
        state.stage_free_s[stage] = now_s


@inlined
def launch(state: State, rules: Rules) -> None:
    """Put the batch on the stages: each begins when it is free and the stage before has handed over, the first one also
    not before it has the tokens that it computes.

    Contexts go on as if it had run.
    """
    s, flight, plan, arrays = state.scalars[0], state.flight, state.plan, state.arrays
    n_stages = len(state.stage_free_s)
    ring = (s.oldest + s.in_flight) % len(flight.samples)
    slots, context = flight.slots[ring], arrays.context
    samples, handed_s, awaited = s.decodes, s.now_s, s.awaited == 1
    prompt_tokens, produced = state.requests.prompt_tokens, state.requests.produced
    for row in range(s.decodes):
        slot = plan.slots[row]
        if awaited and context[slot] == prompt_tokens[slot] + produced[slot]:  # its token is in flight
            handed_s = max(handed_s, flight.completed_s[s.oldest])
        context[slot] += 1
        slots[row] = slot
    for row in range(s.decodes, s.rows):
        slot = plan.slots[row]
        context[slot] += plan.tokens[row]
        slots[samples] = slot
        samples += context[slot] >= arrays.prefill_end[slot]
    s.iteration += 1
    flight.samples[ring], flight.iteration[ring], flight.scheduled_s[ring] = samples, s.iteration, s.now_s
    expected_s, residuals = mean_s(state, rules), rules.residuals[int(s.prefill_tokens > 0)]
    for stage in range(n_stages):
        busy_s = expected_s * _noise(s.seed, s.iteration * n_stages + stage, residuals)
        start_s = max(handed_s, state.stage_free_s[stage])
        bubble_s = start_s - max(state.stage_free_s[stage], s.work_since_s)
        flight.busy_s[ring, stage], flight.bubble_s[ring, stage] = busy_s, bubble_s
        state.stage_busy_s[stage] += busy_s
        state.stage_bubble_s[stage] += bubble_s
        handed_s = start_s + busy_s
        state.stage_free_s[stage] = handed_s
    flight.completed_s[ring] = handed_s
    s.in_flight += 1
