"""The inner loop of the vectorised environment: many episodes side by side, stepped by one compiled call.

A lane is one episode: what `Simulation`, `Codec` and `ServingEnv` hold of it, as plain arrays. The batching rule, the
features, the actions and the reward are theirs; only telemetry is left out, its numbers are read where it reads them.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled, counted
from envs.features import FEATURES, Float32Array, FloatArray, Promise
from envs.kernel import advance, tell_prompts
from envs.outlook import CHUNK, REMAINING, START
from envs.reward import NOTHING, Earned, earned, plus
from envs.simulator import Simulation
from envs.state import IntArray, Rules, State
from envs.step_time import StepTimeModel
from envs.watch import Watch, knobs, observe

_plus = compiled(plus)


class Lane(NamedTuple):
    """One episode. What changes is in arrays."""

    state: State
    rules: Rules
    watch: Watch
    promise: Promise
    fills: bool  # an action is a limit to fill, see `envs.codec`
    kv_blocks: int
    credited: IntArray  # [requests], see `envs.reward`
    pending: IntArray  # [dead time, 2]: the knobs of the iteration launched last, and of the next ones
    launched: IntArray  # [1]: whether the last iteration was


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


def lane_of(simulation: Simulation, promise: Promise, step_time: StepTimeModel | None, fills: bool) -> Lane:
    """A new simulation as a lane. From now on the lane steps it."""
    plant, watch = simulation.plant, Watch.begin(step_time)
    config, bounds = plant.config, plant.config.bounds
    watch.message["dead_time"] = plant.dead_time_iterations
    watch.message["least"], watch.message["largest"] = bounds.min_budget_tokens, bounds.max_budget_tokens
    watch.message["tile"], watch.message["most_requests"] = bounds.tile_tokens, bounds.max_requests
    watch.message["kv_tokens"] = bounds.kv_tokens
    return Lane(
        simulation.state,
        simulation.rules,
        watch,
        promise,
        fills,
        config.kv_blocks,
        credited=np.zeros(len(simulation.workload), np.int64),
        pending=np.full((plant.dead_time_iterations, 2), (config.budget_tokens, config.chunk_tokens)),
        launched=np.zeros(1, np.int64),
    )


@compiled
def _tell_completions(lane: Lane) -> int:
    """As `Codec.take`, for each iteration that completed."""
    s, report, arrival_s = lane.state.scalars[0], lane.state.report, lane.state.requests.arrival_s
    gap = first = 0
    for i in range(s.n_done):
        told, done = report.done[i], lane.watch.done[i]
        done.iteration, done.stages = told.iteration, len(lane.state.stage_free_s)
        done.gaps, done.firsts = told.gaps_end - gap, told.firsts_end - first
        late, longest_s, ttft_s = 0, 0.0, 0.0
        while gap < told.gaps_end:
            longest_s = max(longest_s, report.gap_s[gap])
            late += report.gap_s[gap] > lane.promise.tbt_s
            gap += 1
        while first < told.firsts_end:
            ttft_s = max(ttft_s, told.completed_s - arrival_s[report.first_slots[first]])
            first += 1
        done.late, done.gap_s, done.ttft_s = late, longest_s, ttft_s
        done.device_s, done.iteration_s = 0.0, 0.0
        for busy_s in report.busy_s[i]:
            done.device_s += busy_s
            done.iteration_s = max(done.iteration_s, busy_s)
        if done.stages == 1.0:
            done.iteration_s += report.bubble_s[i, 0]
    return int(s.n_done)


@compiled
def _tell_message(lane: Lane, launched: bool, budget: int, chunk: int) -> None:
    """What the telemetry of this launch would say."""
    state, s, now, prompts = lane.state, lane.state.scalars[0], lane.watch.message[0], lane.watch.prompts
    tell_prompts(state, len(state.prompts.context))
    for i in range(s.n_prompts):
        prompts[REMAINING, i], prompts[START, i] = state.prompts.remaining[i], state.prompts.context[i]
        in_batch = launched and i < s.rows - s.decodes
        prompts[CHUNK, i] = state.plan.tokens[s.decodes + i] if in_batch else 0
    now.listed = s.n_prompts
    now.head_remaining = prompts[REMAINING, 0] if s.n_prompts > 0 else 0.0
    now.head_context = prompts[START, 0] if s.n_prompts > 0 else 0.0
    of_batch = 1.0 if launched else 0.0
    now.iteration = s.iteration
    now.decodes, now.decode_context_tokens = of_batch * s.decodes, of_batch * s.decode_context
    now.prefill_requests, now.prefill_tokens = of_batch * s.prefills, of_batch * s.prefill_tokens
    now.attention_tokens2 = of_batch * s.attention_tokens2
    now.running, now.waiting, now.waiting_tokens = s.n_running, s.tail - s.head, s.waiting_tokens
    now.oldest_wait_s = 0.0
    if s.head < s.tail:
        now.oldest_wait_s = s.now_s - state.requests.arrival_s[state.waiting[s.head]]
    now.kv_usage = 1.0 - s.free_blocks / lane.kv_blocks
    now.preemptions, now.budget, now.chunk = s.preemptions, budget, chunk


@compiled
def _write(seen: Earned, row: FloatArray) -> None:
    row[0], row[1], row[2] = seen.reward, seen.tbts, seen.late_tbts
    row[3], row[4] = seen.first_tokens, seen.finished_requests


@compiled
def _iterate(lane: Lane, i: int, out: Seen) -> Earned:
    """One iteration under the knobs whose turn it is; as `ServingEnv._iterate`."""
    s = lane.state.scalars[0]
    budget, chunk = lane.pending[0]
    s.n_logged = 0
    launched = advance(lane.state, lane.rules, budget, chunk, 0.0) > 0
    lane.launched[0] = launched
    n_done = _tell_completions(lane)
    _tell_message(lane, launched, budget, chunk)
    observe(lane.watch, lane.promise, n_done, out.observations[i])
    out.time_s[i], out.done[i] = s.now_s, s.finished == len(lane.credited)
    out.knobs[i, 0], out.knobs[i, 1] = budget, chunk
    return earned(lane.state, lane.credited, lane.promise, launched)


@counted
def step_lanes(lanes: Any, going: Any, actions: FloatArray, frame_skip: int, out: Seen) -> None:
    """A step of every lane that is `going`; as `ServingEnv.step`. `actions` is float64 [lanes, 2] within -1 to 1."""
    for i in range(len(lanes)):
        if not going[i]:
            continue
        lane, total = lanes[i], NOTHING
        for _ in range(frame_skip):
            pending = lane.pending
            answer = knobs(lane.watch, lane.promise, pending[1:], lane.fills, actions[i, 0], actions[i, 1])
            for turn in range(1, len(pending)):
                pending[turn - 1] = pending[turn]
            if not lane.launched[0]:
                pending[:, 0], pending[:, 1] = answer
            pending[-1, 0], pending[-1, 1] = answer
            total = _plus(total, _iterate(lane, i, out))
            if out.done[i]:
                break
        _write(total, out.earned[i])


@counted
def begin_lane(lanes: Any, i: int, lane: Lane, out: Seen) -> None:
    """Put a new episode in place i, and launch its first iteration; as `ServingEnv.reset`."""
    _write(_iterate(lane, i, out), out.earned[i])
    lanes[i] = lane


@counted
def lists_of(lane: Lane, n: int) -> Any:
    """A typed list with n places, for the two functions above."""
    lanes = numba.typed.List()
    for _ in range(n):
        lanes.append(lane)
    return lanes
