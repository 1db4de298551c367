"""The inner loop of the vectorised environment: many episodes side by side, stepped by one compiled call.

A lane is one episode: what `Simulation`, `Codec` and `ServingEnv` hold of it, as plain arrays. The batching rule, the
features and the reward are theirs; only telemetry is left out, its numbers are read where it reads them.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled, counted
from envs.features import (
    FEATURES,
    IN_FLIGHT,
    Composition,
    Done,
    Float32Array,
    FloatArray,
    Memory,
    Now,
    Promise,
    features,
    knobs_of,
    probes,
    remember,
)
from envs.kernel import advance, tell_prompts
from envs.reward import NOTHING, Earned, earned, plus
from envs.simulator import Simulation
from envs.state import IntArray, Rules, State
from envs.step_mean import mean_step_s
from envs.step_time import StepTimeModel

_features, _knobs_of, _plus = compiled(features), compiled(knobs_of), compiled(plus)
_probes, _remember = compiled(probes), compiled(remember)


NO_COEFFICIENTS = np.zeros(0)
NO_COEFFICIENTS.flags.writeable = False  # as a model's are: to numba that is another type


class Lane(NamedTuple):
    """One episode. What changes is in arrays."""

    state: State
    rules: Rules
    promise: Promise
    bounds: tuple[int, int, int]  # least and largest budget, tile
    kv_blocks: int
    coefficients: FloatArray  # of the step-time model that the controller knows
    credited: IntArray  # [requests], see `envs.reward`
    pending: IntArray  # [dead time, 2]: the knobs of the next iterations
    launched: FloatArray  # [IN_FLIGHT, 3]: iteration, tokens, predicted seconds
    seen: IntArray  # [2]: whether the last iteration was launched, preemptions heard of


class Seen(NamedTuple):
    """What a step gave, one row a lane."""

    observations: Float32Array  # [lanes, features]
    earned: FloatArray  # [lanes, fields of Earned]
    time_s: FloatArray
    knobs: IntArray  # [lanes, 2]
    done: NDArray[np.bool_]

    @classmethod
    def empty(cls, n: int) -> "Seen":
        observations = np.zeros((n, len(FEATURES)), np.float32)
        sums = np.zeros((n, len(Earned._fields)))
        return cls(observations, sums, np.zeros(n), np.zeros((n, 2), np.int64), np.zeros(n, np.bool_))


def lane_of(simulation: Simulation, promise: Promise, step_time: StepTimeModel | None) -> Lane:
    """A new simulation as a lane. From now on the lane steps it."""
    plant = simulation.plant
    config, bounds = plant.config, plant.config.bounds
    return Lane(
        simulation.state,
        simulation.rules,
        promise,
        (bounds.min_budget_tokens, bounds.max_budget_tokens, bounds.tile_tokens),
        config.kv_blocks,
        NO_COEFFICIENTS if step_time is None else step_time.coefficients,
        credited=np.zeros(len(simulation.workload), np.int64),
        pending=np.full((plant.dead_time_iterations, 2), (config.budget_tokens, config.chunk_tokens)),
        launched=np.full((IN_FLIGHT, 3), -1.0),
        seen=np.zeros(2, np.int64),
    )


@compiled
def _complete(lane: Lane, memory: Memory) -> Memory:
    """Remember the iterations that completed; as `Codec._done`."""
    s, report, arrival_s = lane.state.scalars[0], lane.state.report, lane.state.requests.arrival_s
    n_stages, gap, first = len(lane.state.stage_free_s), 0, 0
    for i in range(s.n_done):
        done = report.done[i]
        gaps, firsts, late, longest_s, ttft_s = done.gaps_end - gap, done.firsts_end - first, 0, 0.0, 0.0
        while gap < done.gaps_end:
            longest_s = max(longest_s, report.gap_s[gap])
            late += report.gap_s[gap] > lane.promise.tbt_s
            gap += 1
        while first < done.firsts_end:
            ttft_s = max(ttft_s, done.completed_s - arrival_s[report.first_slots[first]])
            first += 1
        launched = lane.launched[done.iteration % IN_FLIGHT]
        memory = _remember(
            memory,
            Done(
                float(gaps),
                float(late),
                longest_s,
                float(firsts),
                ttft_s,
                float(n_stages),
                report.busy_s[i].sum(),
                launched[1],
                n_stages * launched[2],
            ),
        )
    return memory


@compiled
def _mean_s(coefficients: FloatArray, probe: Composition) -> float:
    decodes, context, requests, tokens, attention = probe
    if decodes + tokens <= 0.0:
        return 0.0
    return mean_step_s(coefficients, decodes, context, requests, tokens, attention)


@compiled
def _predicted(lane: Lane, launched: bool, budget: int, head_context: int) -> tuple[float, float, float, float]:
    if len(lane.coefficients) == 0:
        return 0.0, 0.0, 0.0, 0.0
    s, of_batch = lane.state.scalars[0], 1.0 if launched else 0.0
    batch = (
        of_batch * s.decodes,
        of_batch * s.decode_context,
        of_batch * s.prefills,
        of_batch * s.prefill_tokens,
        of_batch * s.attention_tokens2,
    )
    alone, linear, whole, full = _probes(batch, float(budget), float(head_context))
    c = lane.coefficients
    return _mean_s(c, alone), _mean_s(c, linear), _mean_s(c, whole), _mean_s(c, full)


@compiled
def _now(lane: Lane, launched: bool, budget: int, chunk: int) -> Now:
    """What the telemetry of this launch would say."""
    state, s = lane.state, lane.state.scalars[0]
    tell_prompts(state, 1)
    head_remaining = head_context = 0
    if s.n_prompts > 0:
        head_remaining, head_context = state.prompts.remaining[0], state.prompts.context[0]
    decode_s, linear_s, batch_s, full_s = _predicted(lane, launched, budget, head_context)
    if launched:
        row = lane.launched[s.iteration % IN_FLIGHT]
        row[0], row[1], row[2] = s.iteration, s.decodes + s.prefill_tokens, batch_s
    preempted = s.preemptions > lane.seen[1]
    lane.seen[1] = s.preemptions
    of_batch, oldest_wait_s = 1.0 if launched else 0.0, 0.0
    if s.head < s.tail:
        oldest_wait_s = s.now_s - state.requests.arrival_s[state.waiting[s.head]]
    was_preempted = 1.0 if preempted else 0.0
    return Now(
        of_batch * s.decodes,
        of_batch * s.decode_context,
        of_batch * s.prefills,
        of_batch * s.prefill_tokens,
        float(s.n_running),
        float(s.tail - s.head),
        float(s.waiting_tokens),
        oldest_wait_s,
        float(head_remaining),
        float(head_context),
        1.0 - s.free_blocks / lane.kv_blocks,
        was_preempted,
        float(len(lane.pending)),
        float(budget),
        float(chunk),
        float(lane.bounds[0]),
        float(lane.bounds[1]),
        decode_s,
        linear_s,
        batch_s,
        full_s,
    )


@compiled
def _write(seen: Earned, row: FloatArray) -> None:
    row[0], row[1], row[2] = seen.reward, seen.tbts, seen.late_tbts
    row[3], row[4] = seen.first_tokens, seen.finished_requests


@compiled
def _iterate(lane: Lane, memory: Memory, i: int, out: Seen) -> tuple[Memory, Earned]:
    """One iteration under the knobs whose turn it is; as `ServingEnv._iterate`."""
    s = lane.state.scalars[0]
    budget, chunk = lane.pending[0]
    s.n_logged = 0
    launched = advance(lane.state, lane.rules, budget, chunk, 0.0) > 0
    lane.seen[0] = launched
    memory = _complete(lane, memory)
    now = _now(lane, launched, budget, chunk)
    for k, feature in enumerate(_features(memory, now, lane.promise)):
        out.observations[i, k] = feature
    out.time_s[i], out.done[i] = s.now_s, s.finished == len(lane.credited)
    out.knobs[i, 0], out.knobs[i, 1] = budget, chunk
    return memory, earned(lane.state, lane.credited, lane.promise, launched)


@counted
def step_lanes(lanes: Any, memories: Any, going: Any, actions: FloatArray, frame_skip: int, out: Seen) -> None:
    """A step of every lane that is `going`; as `ServingEnv.step`. `actions` is float64 [lanes, 2] within -1 to 1."""
    for i in range(len(lanes)):
        if not going[i]:
            continue
        lane, memory, total = lanes[i], memories[i], NOTHING
        least, largest, tile = lane.bounds
        answer = _knobs_of(actions[i, 0], actions[i, 1], least, largest, tile)
        for _ in range(frame_skip):
            pending = lane.pending
            for turn in range(1, len(pending)):
                pending[turn - 1] = pending[turn]
            if not lane.seen[0]:
                pending[:, 0], pending[:, 1] = answer
            pending[-1, 0], pending[-1, 1] = answer
            memory, seen = _iterate(lane, memory, i, out)
            total = _plus(total, seen)
            if out.done[i]:
                break
        memories[i] = memory
        _write(total, out.earned[i])


@counted
def begin_lane(lanes: Any, memories: Any, i: int, lane: Lane, memory: Memory, out: Seen) -> None:
    """Put a new episode in place i, and launch its first iteration; as `ServingEnv.reset`."""
    memory, seen = _iterate(lane, memory, i, out)
    lanes[i], memories[i] = lane, memory
    _write(seen, out.earned[i])


@counted
def lists_of(lane: Lane, memory: Memory, n: int) -> tuple[Any, Any]:
    """(lanes, memories): typed lists with n places, for the two functions above."""
    lanes, memories = numba.typed.List(), numba.typed.List()
    for _ in range(n):
        lanes.append(lane)
        memories.append(memory)
    return lanes, memories
