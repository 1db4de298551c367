"""The simulator's state as plain arrays, so that numba can hold it: one row a request, in order of arrival.

A request's row is its slot. Times are float64 seconds from the start of the workload.
"""

from typing import NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from engine.batching import Limits, Plan, RequestArrays, empty_plan
from engine.protocol import MOST_PROMPTS
from envs.trace import Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LOG_COLUMNS = (
    *("time_s", "budget_tokens", "chunk_tokens", "decode_tokens", "prefill_tokens", "waiting_requests"),
    *("decode_context_tokens", "prefill_requests", "prefill_attention_tokens2"),
)
LOG_ROWS = 1 << 14


class Scalars(NamedTuple):
    """The state's single numbers; in the state they are one record of this layout."""

    now_s: float  # when the iteration launched last was formed
    work_since_s: float  # when the last idle time ended
    slowdown: float  # factor on all step times
    arrived: int  # requests that have arrived
    finished: int
    n_running: int
    head: int  # the waiting queue is `waiting[head:tail]`
    tail: int
    waiting_tokens: int  # prompt tokens of the waiting
    free_blocks: int
    prefill_turn: int  # 1 if the last batch decoded; for the schedule that takes turns
    preemptions: int
    iteration: int
    seed: int
    oldest: int  # of the iterations in flight, its place in the ring
    in_flight: int
    awaited: int  # 1 if the tokens of the oldest count as known: the first stage waits for them
    n_done: int  # iterations completed since the one before was launched
    n_gaps: int  # ... and their tokens that were not the first of their request
    n_firsts: int
    n_finished: int
    n_prompts: int  # in `Prompts`
    rows: int  # the batch formed last
    decodes: int
    decode_context: int
    prefills: int
    prefill_tokens: int
    attention_tokens2: float
    budget: int
    chunk: int
    n_logged: int


class Done(NamedTuple):
    """A completed iteration; the `end`s are where its part of the report's arrays ends."""

    iteration: int
    gaps_end: int
    firsts_end: int
    finished_end: int
    scheduled_s: float
    completed_s: float


def _record(layout: type) -> "np.dtype[np.void]":
    return np.dtype([(name, np.dtype(kind)) for name, kind in get_type_hints(layout).items()])


class Requests(NamedTuple):
    """What each request is, and what has become of it; float64 and int64 [n requests]."""

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    first_token_row: IntArray  # of `token_times_s`
    first_scheduled_s: FloatArray  # NaN until then
    produced: IntArray  # output tokens so far, without those in flight


class Flight(NamedTuple):
    """Iterations in flight: a ring of [depth]."""

    samples: IntArray  # how many requests get a token
    slots: IntArray  # [depth, max requests]: which, in the order of the batch
    iteration: IntArray
    scheduled_s: FloatArray
    completed_s: FloatArray
    busy_s: FloatArray  # [depth, stages]
    bubble_s: FloatArray


class Report(NamedTuple):
    """What completed since the iteration before was launched, as telemetry tells it."""

    done: NDArray[np.void]  # Done [depth]
    busy_s: FloatArray  # [depth, stages]
    bubble_s: FloatArray
    gap_s: FloatArray  # [depth * max requests], as those below
    gap_slots: IntArray
    first_slots: IntArray
    finished_slots: IntArray


class Prompts(NamedTuple):
    """The first prompts to compute, as telemetry tells them (`QueueState`): int64 [MOST_PROMPTS]."""

    remaining: IntArray
    context: IntArray


class State(NamedTuple):
    """Everything that changes."""

    scalars: NDArray[np.void]  # Scalars [1]
    requests: Requests
    arrays: RequestArrays
    running: IntArray  # slots, oldest admission first
    waiting: IntArray  # slots, from `head` to `tail`
    plan: Plan
    flight: Flight
    stage_free_s: FloatArray  # [stages]
    stage_busy_s: FloatArray
    stage_bubble_s: FloatArray
    token_times_s: FloatArray  # of all output tokens, request after request
    report: Report
    prompts: Prompts
    log: FloatArray  # [LOG_ROWS, LOG_COLUMNS]


class Rules(NamedTuple):
    """Everything that does not."""

    schedule: int
    limits: Limits
    reserve_output: int  # 1: KV blocks of prompt + output are taken at admission
    coefficients: FloatArray  # of the step-time model
    residuals: FloatArray  # [2, 256]: equally likely factors around its mean, decode-only and mixed


def initial_state(workload: Workload, limits: Limits, kv_blocks: int, seed: int) -> State:
    """Nothing has arrived yet, all blocks are free."""
    n, seats, depth, stages = len(workload), limits.max_requests, limits.depth, limits.stages
    tokens = depth * seats  # most of them in all iterations in flight
    scalars = np.zeros(1, _record(Scalars))
    scalars["free_blocks"], scalars["slowdown"], scalars["seed"], scalars["prefill_turn"] = kv_blocks, 1.0, seed, 1
    first_token_row = np.concatenate(([0], np.cumsum(workload.output_tokens)[:-1]))
    lengths = (workload.arrival_s, workload.prompt_tokens, workload.output_tokens)
    held = _ints(n)
    return State(
        scalars=scalars,
        requests=Requests(*lengths, first_token_row, np.full(n, np.nan), _ints(n)),
        arrays=RequestArrays(_ints(n), _ints(n), _ints(n), held, held, _ints(n), _ints(n)),
        running=_ints(seats),
        waiting=_ints(n),
        plan=empty_plan(seats),
        flight=Flight(
            samples=_ints(depth),
            slots=_ints(depth, seats),
            iteration=_ints(depth),
            scheduled_s=np.zeros(depth),
            completed_s=np.zeros(depth),
            busy_s=np.zeros((depth, stages)),
            bubble_s=np.zeros((depth, stages)),
        ),
        stage_free_s=np.zeros(stages),
        stage_busy_s=np.zeros(stages),
        stage_bubble_s=np.zeros(stages),
        token_times_s=np.full(int(workload.output_tokens.sum()), np.nan),
        report=Report(
            done=np.zeros(depth, _record(Done)),
            busy_s=np.zeros((depth, stages)),
            bubble_s=np.zeros((depth, stages)),
            gap_s=np.zeros(tokens),
            gap_slots=_ints(tokens),
            first_slots=_ints(tokens),
            finished_slots=_ints(tokens),
        ),
        prompts=Prompts(_ints(MOST_PROMPTS), _ints(MOST_PROMPTS)),
        log=np.zeros((LOG_ROWS, len(LOG_COLUMNS))),
    )


def _ints(*shape: int) -> IntArray:
    return np.zeros(shape, np.int64)
