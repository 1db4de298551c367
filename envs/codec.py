"""Telemetry to observation and action to knobs, for learned laws: the same code where they train and where they drive.

An observation is made of telemetry alone, against the SLO and the machine's own step time, so that one law can serve
other machines, models and promises. It is float32 [30], each feature within -1 to 1, by one of three maps of its r:

    against  (r^2 - 1) / (r^2 + 1)    0 where the promise is just kept, and steepest there
    load     (r - 1) / (r + 1)        0 at r = 1, gentle: for what may be many times too much
    share    2 r - 1                  for r from 0 to 1; 1 beyond

    feature         map      r
    gap_last        against  longest TBT of the last iteration that had any / TBT SLO
    gap_short       against  longest TBT of an iteration, mean over the short window / TBT SLO
    gap_long        against  the same over the long window
    ttft            against  longest TTFT of an iteration, mean over the short window / TTFT SLO
    model_error     against  measured / predicted time of the iterations in the short window
    decode_time     against  predicted time of this batch's decodes alone / TBT SLO
    batch_time      against  predicted time of this batch / TBT SLO
    full_time       against  predicted time of its decodes, and the head's prompt up to the budget / TBT SLO
    oldest_wait     load     longest wait in the queue / TTFT SLO
    late_short      load     share of the short window's TBTs beyond the SLO / the share that its quantile allows
    late_long       load     the same over the long window
    drain           load     time to compute the waiting prompts at the present pace / TTFT SLO
    waiting         load     waiting prompt tokens / budget
    head_remaining  load     tokens left of the head prefill / budget
    head_context    load     its context / largest budget
    decode_context  load     mean context of the decodes / largest budget
    prompts         load     prompts in the batch
    dead_time       load     dead time in iterations
    prefill_time    share    of the predicted time of the batch, what its prompts add
    attention_time  share    of the predicted time of the batch, what W adds
    fill            share    tokens of the batch / budget
    prefill         share    its prompt tokens / its tokens
    head_progress   share    of the head prefill, what is computed
    queued          share    waiting / all requests
    kv_usage        share    used KV blocks
    preempting      share    1 if a request was preempted since the message before, else 0
    pace            share    where the budget lies that takes just the TBT SLO at the present pace
    decodes         share    where the budget lies that the decodes alone would spend
    budget, chunk   share    the knobs in force, as an action

Budgets lie on a logarithmic scale from the least (0) to the largest (1). The pace is the measured time per token, short
window. Times are of all pipeline stages. Where nothing was heard yet, r is 0; so it is where a step-time model is
needed and none is given. The windows are exponential, of 16 and 512 iterations; in them each TBT counts once.

An action is float32 [2], each within -1 to 1. The first is the budget, on that scale. The second is the chunk, on a
logarithmic scale from the least budget (-1) to the whole budget (1).
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.protocol import Bounds, Completion, Telemetry
from envs.features import (
    FEATURES,
    IN_FLIGHT,
    Done,
    Float32Array,
    Memory,
    Now,
    Promise,
    features,
    knobs_of,
    probes,
    remember,
)
from envs.slo import Slo

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

__all__ = ["CODEC_VERSION", "FEATURES", "N_ACTIONS", "N_FEATURES", "Codec", "to_action", "to_knobs"]

CODEC_VERSION = 1
"""Of features and actions together: a law trained under another one must be refused."""

N_FEATURES = len(FEATURES)
N_ACTIONS = 2


def to_knobs(action: NDArray[np.floating], bounds: Bounds) -> tuple[int, int]:
    """(budget, chunk) in tokens of an action [2]; beyond -1 to 1 it counts as the nearest. Raises ValueError on NaN."""
    place, share = float(action[0]), float(action[1])
    if math.isnan(place) or math.isnan(share):
        raise ValueError(f"action {action} is not a number: the law is broken, or its observations are")
    place, share = max(-1.0, min(place, 1.0)), max(-1.0, min(share, 1.0))
    return knobs_of(place, share, bounds.min_budget_tokens, bounds.max_budget_tokens, bounds.tile_tokens)


def to_action(budget_tokens: int, chunk_tokens: int, bounds: Bounds) -> Float32Array:
    """The action [2] that gives these knobs, to a tile. A chunk above the budget counts as the whole of it."""
    least, largest = bounds.min_budget_tokens, bounds.max_budget_tokens
    budget = max(least, min(budget_tokens, largest))
    chunk = max(least, min(chunk_tokens, budget))
    place = math.log(budget / least) / math.log(largest / least) if largest > least else 1.0
    share = math.log(chunk / least) / math.log(budget / least) if budget > least else 1.0
    return np.array((2.0 * place - 1.0, 2.0 * share - 1.0), np.float32)


class Codec:
    """The observations of one engine, or one episode: a new one needs a new codec.

    It keeps a `Memory` (the windows), what the iterations in flight should take, and the count of preemptions.
    `step_time` is what is known of the machine: one stage's time, if its pipeline has several. Raises ValueError if the
    SLO has no bound on TBT.
    """

    def __init__(self, slo: Slo, step_time: "StepTimeModel | None" = None) -> None:
        self._promise = Promise.of(slo)
        self._step_time = step_time
        self._memory = Memory()
        self._launched: dict[int, tuple[int, float, float]] = {}  # iteration, tokens, predicted seconds
        self._preemptions: int | None = None

    def observe(self, telemetry: Telemetry) -> Float32Array:
        """The observation [features] at this message. Give it every message of the engine once, in order."""
        for completion in telemetry.completed:
            self._memory = remember(self._memory, self._done(completion))
        batch, queue, bounds, in_force = telemetry.batch, telemetry.queue, telemetry.bounds, telemetry.knobs
        decode_s, linear_s, batch_s, full_s = self._predicted(telemetry)
        if batch.total_tokens > 0:
            launched = telemetry.iteration, float(batch.total_tokens), batch_s
            self._launched[telemetry.iteration % IN_FLIGHT] = launched
        preempted = self._preemptions is not None and telemetry.preemptions > self._preemptions
        self._preemptions = telemetry.preemptions
        now = Now(
            *(batch.decode_tokens, batch.decode_context_tokens, batch.prefill_requests, batch.prefill_tokens),
            *(queue.running_requests, queue.waiting_requests, queue.waiting_prompt_tokens, queue.oldest_wait_s),
            *(queue.head_remaining_tokens, queue.head_context_tokens, telemetry.kv_usage, preempted),
            *(telemetry.dead_time_iterations, in_force.budget_tokens, in_force.chunk_tokens),
            *(bounds.min_budget_tokens, bounds.max_budget_tokens, decode_s, linear_s, batch_s, full_s),
        )
        return np.array(features(self._memory, now, self._promise), np.float32)

    def _done(self, completion: Completion) -> Done:
        gaps, firsts, tbt_s = completion.tbt_s, completion.ttft_s, self._promise.tbt_s
        longest_s = max(gaps, default=0.0)
        late = sum(gap > tbt_s for gap in gaps) if longest_s > tbt_s else 0
        slot = completion.iteration % IN_FLIGHT
        iteration, tokens, predicted_s = self._launched.get(slot, (-1, 0.0, 0.0))
        if iteration != completion.iteration:
            tokens = predicted_s = 0.0
        stages = max(len(completion.stages), 1)
        return Done(
            *(len(gaps), late, longest_s, len(firsts), max(firsts, default=0.0)),
            *(stages, completion.device_s, tokens, stages * predicted_s),
        )

    def _predicted(self, telemetry: Telemetry) -> list[float]:
        if self._step_time is None:
            return [0.0] * 4
        batch, mean_s = telemetry.batch, self._step_time.mean_s
        composition = (
            batch.decode_tokens,
            batch.decode_context_tokens,
            batch.prefill_requests,
            batch.prefill_tokens,
            batch.prefill_attention_tokens2,
        )
        batches = probes(composition, telemetry.knobs.budget_tokens, telemetry.queue.head_context_tokens)
        return [mean_s(*probe) if probe[0] + probe[3] > 0 else 0.0 for probe in batches]
