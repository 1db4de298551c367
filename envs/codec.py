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

An action is float32 [2], each within -1 to 1, in one of two forms. 0 and 0 in the second form are what the predictive
law would do without its account of late tokens:

    knobs    the budget, on that scale; the chunk, on a logarithmic scale from the least budget (-1) to the budget (1)
    limit    how long the next batch may take, on a logarithmic scale around the TBT SLO less a margin for its noise,
             and for being in a pipeline, on the machine as it runs now; and how readily prompts share a batch.
             `BatchChooser` makes knobs of it
"""

import math
from struct import Struct
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engine.protocol import Completion, Telemetry
from envs.features import FEATURES, IN_FLIGHT, Done, Float32Array, Message, Promise
from envs.machine_speed import iteration_s
from envs.outlook import list_prompts
from envs.slo import Slo
from envs.watch import Watch, knobs, observe

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

__all__ = ["CODEC_VERSION", "FEATURES", "FORMS", "N_ACTIONS", "N_FEATURES", "Codec", "Form"]

CODEC_VERSION = 2
"""Of features and actions together: a law trained under another one must be refused."""

Form = Literal["knobs", "limit"]
FORMS: tuple[Form, ...] = get_args(Form)

DONE, MESSAGE = (Struct(f"{len(layout._fields)}d") for layout in (Done, Message))
N_FEATURES = len(FEATURES)
N_ACTIONS = 2


def fills(form: Form, step_time: "StepTimeModel | None") -> bool:
    """Whether actions of this form are limits to fill. Raises ValueError for another form, or if they cannot be."""
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r} of actions: choose from {', '.join(FORMS)}")
    if form == "limit" and step_time is None:
        raise ValueError("actions of the form 'limit' need to know how long a step takes: give a step-time model")
    return form == "limit"


def within(action: NDArray[np.floating]) -> tuple[float, float]:
    """The two numbers of an action; beyond -1 to 1 they count as the nearest. Raises ValueError on NaN."""
    first, second = float(action[0]), float(action[1])
    if math.isnan(first) or math.isnan(second):
        raise ValueError(f"action {action} is not a number: the law is broken, or its observations are")
    return max(-1.0, min(first, 1.0)), max(-1.0, min(second, 1.0))


class Codec:
    """The observations and the knobs of one engine, or one episode: a new one needs a new codec.

    `step_time` is what is known of the machine: one stage's time, if its pipeline has several. Raises ValueError if the
    SLO has no bound on TBT, or for actions of the form `limit` without a step-time model.
    """

    def __init__(self, slo: Slo, step_time: "StepTimeModel | None" = None, form: Form = "knobs") -> None:
        self.promise, self.fills = Promise.of(slo), fills(form, step_time)
        self.watch = Watch.begin(step_time)
        self.under_way = np.zeros((0, 2), np.int64)  # knobs of the iterations before the one that an answer acts on
        self.observation = np.zeros(N_FEATURES, np.float32)
        self._idle = False

    def observe(self, telemetry: Telemetry) -> Float32Array:
        """The observation [features] at this message. Give it every message of the engine once, in order."""
        observe(self.watch, self.promise, self.take(telemetry), self.observation)
        return self.observation.copy()

    def knobs(self, action: NDArray[np.floating]) -> tuple[int, int]:
        """(budget, chunk) in tokens of an action [2], in answer to the message that was observed last; ask once.

        Raises ValueError on NaN.
        """
        return self.gave(knobs(self.watch, self.promise, self.under_way, self.fills, *within(action)))

    def take(self, telemetry: Telemetry) -> int:
        """Write the message to `watch`, for `envs.watch.observe`; returns how many completions it tells of."""
        batch, queue, bounds, in_force = telemetry.batch, telemetry.queue, telemetry.bounds, telemetry.knobs
        completed = telemetry.completed[-IN_FLIGHT:]
        for i, completion in enumerate(completed):
            DONE.pack_into(self.watch.done.data, i * DONE.size, *self._numbers(completion))
        MESSAGE.pack_into(
            self.watch.message.data,
            0,
            telemetry.iteration,
            *batch.load,
            *(queue.running_requests, queue.waiting_requests, queue.waiting_prompt_tokens, queue.oldest_wait_s),
            *(queue.head_remaining_tokens, queue.head_context_tokens, telemetry.kv_usage, telemetry.preemptions),
            *(telemetry.dead_time_iterations, in_force.budget_tokens, in_force.chunk_tokens),
            *(bounds.min_budget_tokens, bounds.max_budget_tokens, bounds.tile_tokens),
            *(bounds.max_requests, bounds.kv_tokens),
            list_prompts(self.watch.prompts, queue, batch),
        )
        ahead, self._idle = telemetry.dead_time_iterations - 1, batch.total_tokens == 0
        if len(self.under_way) != ahead:
            self.under_way = np.full((ahead, 2), (in_force.budget_tokens, in_force.chunk_tokens), np.int64)
        return len(completed)

    def gave(self, answer: tuple[int, int]) -> tuple[int, int]:
        """These knobs answer the message that was taken last; returns them."""
        if len(self.under_way):
            self.under_way[:-1] = self.under_way[1:]
            self.track(*answer)
        return answer

    def track(self, budget_tokens: int, chunk_tokens: int) -> None:
        """These were sent, instead of the knobs that were given last."""
        # Where nothing runs, the answer is there long before the next iteration.
        self.under_way[0 if self._idle else -1 :] = budget_tokens, chunk_tokens

    def _numbers(self, completion: Completion) -> tuple[float, ...]:
        """A `Done`."""
        gaps, firsts, stages, tbt_s = completion.tbt_s, completion.ttft_s, completion.stages, self.promise.tbt_s
        longest_s = max(gaps) if gaps else 0.0
        late = sum(gap > tbt_s for gap in gaps) if longest_s > tbt_s else 0
        return (
            *(completion.iteration, len(gaps), late, longest_s),
            *(len(firsts), max(firsts) if firsts else 0.0, max(len(stages), 1)),
            *(completion.device_s, iteration_s(completion)),
        )
