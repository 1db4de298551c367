"""What is kept of one engine for a learned law, and what is made of it: compiled, for the codec and for lanes alike.

The codec writes here what telemetry says, a lane what the simulator's state says. From then on there is one way.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled
from engine.protocol import MOST_PROMPTS
from envs.batch_choice import CROWDED, WORTH, choose
from envs.features import (
    IN_FLIGHT,
    Composition,
    Done,
    Float32Array,
    FloatArray,
    Memory,
    Message,
    Predicted,
    Promise,
    features,
    knobs_of,
    probes,
    remember,
)
from envs.machine_speed import Estimate, follow
from envs.outlook import REMAINING, START, run_ahead, served, unspent
from envs.state import IntArray
from envs.step_mean import mean_step_s
from envs.step_time import StepTimeModel

LIMIT_REACH = 0.3  # logarithm of what an action at its end makes of the time limit
PIPELINE = 0.3  # the same of what the limit is less in a pipeline: as predictive's debts make it at most
SHARE_REACH = 1.5  # the same of what sharing a batch must gain
SHARES = 8.0  # a chunk is no smaller than the budget over that: so it was when the shipped laws were trained

NO_COEFFICIENTS = np.zeros(0)
NO_COEFFICIENTS.flags.writeable = False  # as a model's are: to numba that is another type


class Watch(NamedTuple):
    """One engine, or one episode. Everything but the coefficients changes."""

    memory: NDArray[np.void]  # Memory [1]
    message: NDArray[np.void]  # Message [1], the newest
    done: NDArray[np.void]  # Done [IN_FLIGHT], what completed with it
    prompts: FloatArray  # [3, MOST_PROMPTS], see `envs.outlook`
    ahead: FloatArray  # the same, for what comes next
    launched: FloatArray  # [IN_FLIGHT, 7]: iteration, its load, predicted seconds
    coefficients: FloatArray  # of the step-time model that the controller knows
    machine: Estimate

    @classmethod
    def begin(cls, step_time: StepTimeModel | None) -> "Watch":
        """Nothing was heard yet."""
        memory = np.zeros(1, _floats(Memory))
        memory["stages"], memory["preemptions"] = 1.0, -1.0
        return cls(
            memory,
            np.zeros(1, _floats(Message)),
            np.zeros(IN_FLIGHT, _floats(Done)),
            np.zeros((3, MOST_PROMPTS)),
            np.zeros((3, MOST_PROMPTS)),
            np.full((IN_FLIGHT, 7), -1.0),
            NO_COEFFICIENTS if step_time is None else step_time.coefficients,
            Estimate.of(step_time),
        )


def _floats(layout: Any) -> "np.dtype[np.void]":
    return np.dtype([(name, np.float64) for name in layout._fields])


@compiled
def observe(watch: Watch, promise: Promise, n_done: int, out: Float32Array) -> None:
    """Take in the message with its `n_done` completions, and write the features to `out`, float32 [features]."""
    memory, now = watch.memory[0], watch.message[0]
    for i in range(n_done):
        _complete(watch, i)
    predicted = _predicted(watch)
    if now.decodes + now.prefill_tokens > 0.0:
        row = watch.launched[int(now.iteration) % IN_FLIGHT]
        row[0], row[1], row[2], row[3] = now.iteration, now.decodes, now.decode_context_tokens, now.prefill_requests
        row[4], row[5], row[6] = now.prefill_tokens, now.attention_tokens2, predicted[2]
    preempted = 1.0 if 0.0 <= memory.preemptions < now.preemptions else 0.0
    memory.preemptions = now.preemptions
    for k, feature in enumerate(features(memory, now, preempted, predicted, promise)):
        out[k] = feature


@compiled
def knobs(
    watch: Watch, promise: Promise, under_way: IntArray, fills: bool, first: float, second: float
) -> tuple[int, int]:
    """(budget, chunk) in tokens of an action within -1 to 1, as `envs.codec` says.

    `under_way`, int64 [dead time - 1, 2], are the knobs of the iterations before the one that they will act on. With
    `fills` the action is a limit to fill; else it is the knobs.
    """
    now = watch.message[0]
    least, largest, tile = int(now.least), int(now.largest), int(now.tile)
    if not fills:
        return knobs_of(first, second, least, largest, tile)
    stages, machine, begun = watch.memory[0].stages, watch.machine, max(now.running - now.decodes, now.prefill_requests)
    for row in range(len(watch.prompts)):
        for i in range(int(now.listed)):
            watch.ahead[row, i] = watch.prompts[row, i]
    n, behind, behind_tokens, _, _ = served(
        *(watch.ahead, int(now.listed), begun, now.waiting, now.waiting_tokens),
        (now.most_requests - now.running, (1.0 - now.kv_usage) * now.kv_tokens),
        unspent(now.budget, now.tile, now.decodes + now.prefill_tokens),
    )
    n, decodes, context = run_ahead(watch.ahead, n, now.decodes, now.decode_context_tokens, under_way)
    limit_s = np.inf
    if decodes > 0.0 or stages > 1.0:  # in a pipeline other microbatches' decodes wait behind it
        margin = promise.z * np.sqrt(machine.noise[1]) + (PIPELINE if stages > 1.0 else 0.0)
        limit_s = promise.tbt_s / stages * np.exp(LIMIT_REACH * first - margin)
    budget, chunk, _ = choose(
        (watch.coefficients, (machine.factors, machine.sizes[0])),
        (decodes, context),
        (watch.ahead[REMAINING, :n], watch.ahead[START, :n], behind, behind_tokens / max(behind, 1.0)),
        limit_s,
        tile,
        largest // tile,
        SHARES if now.kv_usage < CROWDED else 1.0,
        WORTH * np.exp(-SHARE_REACH * second),
        stages > 1.0,
        False,  # no shipped law was trained so
    )
    return max(budget, least), max(chunk, least)


@compiled
def _complete(watch: Watch, i: int) -> None:
    done, row = watch.done[i], watch.launched[int(watch.done[i].iteration) % IN_FLIGHT]
    if row[0] != done.iteration:
        remember(watch.memory[0], done, 0.0, 0.0)
        return
    remember(watch.memory[0], done, row[1] + row[4], row[6])
    if 0.0 < row[6] < np.inf and 0.0 < done.iteration_s < np.inf:
        follow(watch.coefficients, watch.machine, row[1], row[2], row[3], row[4], row[5], done.iteration_s)


@compiled
def _predicted(watch: Watch) -> Predicted:
    if len(watch.coefficients) == 0:
        return 0.0, 0.0, 0.0, 0.0
    now = watch.message[0]
    batch = (
        now.decodes,
        now.decode_context_tokens,
        now.prefill_requests,
        now.prefill_tokens,
        now.attention_tokens2,
    )
    alone, linear, whole, full = probes(batch, now.budget, now.head_context)
    c = watch.coefficients
    return _mean_s(c, alone), _mean_s(c, linear), _mean_s(c, whole), _mean_s(c, full)


@compiled
def _mean_s(coefficients: FloatArray, probe: Composition) -> float:
    decodes, context, requests, tokens, attention = probe
    if decodes + tokens <= 0.0:
        return 0.0
    return mean_step_s(coefficients, decodes, context, requests, tokens, attention)
