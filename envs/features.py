"""The arithmetic of `envs.codec`, compiled: on records and scalars, for one engine or for many lanes."""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled
from envs.slo import Slo

Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]

Composition = tuple[float, float, float, float, float]
"""Of a batch: decodes, their context, prompts, their tokens, W."""

FEATURES = (
    *("gap_last", "gap_short", "gap_long", "ttft", "model_error", "decode_time", "batch_time", "full_time"),
    *("oldest_wait", "late_short", "late_long", "drain", "waiting", "head_remaining", "head_context"),
    *("decode_context", "prompts", "dead_time"),
    *("prefill_time", "attention_time", "fill", "prefill", "head_progress", "queued", "kv_usage", "preempting"),
    *("pace", "decodes", "budget", "chunk"),
)

DEFAULT_TTFT_S = 2.0
"""Waits are measured by it where no TTFT is promised: the paper's bound on the median scheduling delay."""

SHORT, LONG = 1 - 1 / 16, 1 - 1 / 512
"""What an exponential window keeps at each iteration: about 16 and 512 of them count."""

IN_FLIGHT = 64  # far more iterations than any pipeline holds


class Promise(NamedTuple):
    """The SLO as numbers. `late_share` is the share of TBTs that may be late; a promise of all allows one in 1,000.

    `z`: a normal variable is above that in so large a share of draws.
    """

    tbt_s: float
    ttft_s: float
    late_share: float
    z: float

    @classmethod
    def of(cls, slo: Slo) -> "Promise":
        """Raises ValueError if the SLO has no bound on TBT, or one that is not among these numbers."""
        if slo.tbt_s is None:
            raise ValueError(f"SLO {str(slo)!r} has no bound on TBT, which knobs are set by: add tbt:MILLISECONDS")
        if (slo.tpot_s, slo.deadline_s, slo.e2el_s) != (None, None, None):
            raise ValueError(f"SLO {str(slo)!r}: learned laws know tbt, ttft and quantile; leave out the rest")
        late_share = max(1.0 - slo.quantile, 1e-3)
        z = NormalDist().inv_cdf(min(1.0 - late_share, 0.999)) if late_share < 1.0 else 0.0
        return cls(float(slo.tbt_s), float(slo.ttft_s or DEFAULT_TTFT_S), late_share, z)


class Memory(NamedTuple):
    """What is kept between messages: sums over the short (`_short`) and the long window, and the newest values.

    Sums of gaps count every TBT: `gap` takes all of an iteration for its longest, `late` counts those beyond the SLO.
    Sums of time count every iteration whose launch was seen. It is a record of this layout.
    """

    gap_last_s: float
    gaps_short: float
    gap_short_s: float
    late_short: float
    gaps_long: float
    gap_long_s: float
    late_long: float
    firsts_short: float
    ttft_short_s: float
    tokens_short: float
    device_short_s: float
    predicted_short_s: float
    stages: float
    preemptions: float  # heard of; below 0 before the first message


class Done(NamedTuple):
    """One completed iteration, as a record."""

    iteration: float
    gaps: float
    late: float
    gap_s: float  # the longest
    firsts: float
    ttft_s: float
    stages: float
    device_s: float
    iteration_s: float  # as of `envs.machine_speed`


class Message(NamedTuple):
    """One message without its completions and prompts, as a record."""

    iteration: float
    decodes: float
    decode_context_tokens: float
    prefill_requests: float
    prefill_tokens: float
    attention_tokens2: float
    running: float
    waiting: float
    waiting_tokens: float
    oldest_wait_s: float
    head_remaining: float
    head_context: float
    kv_usage: float
    preemptions: float
    dead_time: float
    budget: float
    chunk: float
    least: float
    largest: float
    tile: float
    most_requests: float
    kv_tokens: float
    listed: float  # prompts


Predicted = tuple[float, float, float, float]
"""Seconds on one stage of each of the `probes`; 0.0 without a model."""


@compiled
def remember(m: Any, done: Any, tokens: float, predicted_s: float) -> None:
    """Take a completed iteration in. `tokens` and `predicted_s` (one stage's) are 0 if its launch was not seen."""
    m.stages = done.stages
    if done.gaps > 0.0:
        m.gap_last_s = done.gap_s
        m.gaps_short = SHORT * m.gaps_short + done.gaps
        m.gap_short_s = SHORT * m.gap_short_s + done.gaps * done.gap_s
        m.late_short = SHORT * m.late_short + done.late
        m.gaps_long = LONG * m.gaps_long + done.gaps
        m.gap_long_s = LONG * m.gap_long_s + done.gaps * done.gap_s
        m.late_long = LONG * m.late_long + done.late
    if done.firsts > 0.0:
        m.firsts_short = SHORT * m.firsts_short + done.firsts
        m.ttft_short_s = SHORT * m.ttft_short_s + done.firsts * done.ttft_s
    if tokens > 0.0:
        m.tokens_short = SHORT * m.tokens_short + tokens
        m.device_short_s = SHORT * m.device_short_s + done.device_s
        m.predicted_short_s = SHORT * m.predicted_short_s + done.stages * predicted_s


@compiled
def probes(batch: Composition, budget: float, head_context: float) -> tuple[Composition, ...]:
    """The batches whose times are features: the decodes alone, the batch without its W, the batch, and a full one."""
    decodes, context, requests, tokens, attention = batch
    rest = max(budget - decodes, 0.0)
    return (
        (decodes, context, 0.0, 0.0, 0.0),
        (decodes, context, requests, tokens, 0.0),
        (decodes, context, requests, tokens, attention),
        (decodes, context, min(rest, 1.0), rest, rest * (head_context + 0.5 * rest)),
    )


@compiled
def _over(a: float, b: float) -> float:
    return a / b if b > 0.0 else 0.0


@compiled
def _against(r: float) -> float:
    return 1.0 - 2.0 / (r * r + 1.0) if r > 0.0 else -1.0


@compiled
def _load(r: float) -> float:
    return 1.0 - 2.0 / (r + 1.0) if r > 0.0 else -1.0


@compiled
def _share(r: float) -> float:
    return (2.0 * r - 1.0 if r < 1.0 else 1.0) if r > 0.0 else -1.0


@compiled
def _place(tokens: float, least: float, most: float) -> float:
    return math.log(max(tokens, least) / least) / math.log(most / least) if most > least else 1.0


@compiled
def features(m: Any, now: Any, preempted: float, predicted: Predicted, promise: Promise) -> tuple[float, ...]:
    """The features, in the order of FEATURES: finite and within -1 to 1, whatever the numbers are.

    `m` is a `Memory`, `now` a `Message`.
    """
    decode_s, linear_s, batch_s, full_s = predicted
    return (
        _against(m.gap_last_s / promise.tbt_s),
        _against(_over(m.gap_short_s, m.gaps_short) / promise.tbt_s),
        _against(_over(m.gap_long_s, m.gaps_long) / promise.tbt_s),
        _against(_over(m.ttft_short_s, m.firsts_short) / promise.ttft_s),
        _against(_over(m.device_short_s, m.predicted_short_s)),
        _against(m.stages * decode_s / promise.tbt_s),
        _against(m.stages * batch_s / promise.tbt_s),
        _against(m.stages * full_s / promise.tbt_s),
        _load(now.oldest_wait_s / promise.ttft_s),
        _load(_over(m.late_short, m.gaps_short) / promise.late_share),
        _load(_over(m.late_long, m.gaps_long) / promise.late_share),
        _load(now.waiting_tokens * _over(m.device_short_s, m.tokens_short) / promise.ttft_s),
        _load(_over(now.waiting_tokens, now.budget)),
        _load(_over(now.head_remaining, now.budget)),
        _load(_over(now.head_context, now.largest)),
        _load(_over(_over(now.decode_context_tokens, now.decodes), now.largest)),
        _load(now.prefill_requests),
        _load(now.dead_time),
        _share(_over(batch_s - decode_s, batch_s)),
        _share(_over(batch_s - linear_s, batch_s)),
        _share(_over(now.decodes + now.prefill_tokens, now.budget)),
        _share(_over(now.prefill_tokens, now.decodes + now.prefill_tokens)),
        _share(_over(now.head_context, now.head_context + now.head_remaining)),
        _share(_over(now.waiting, now.running + now.waiting)),
        _share(now.kv_usage),
        _share(preempted),
        _share(_place(_over(promise.tbt_s * m.tokens_short, m.device_short_s), now.least, now.largest)),
        _share(_place(now.decodes, now.least, now.largest)),
        _share(_place(now.budget, now.least, now.largest)),
        _share(_place(now.chunk, now.least, now.budget)),
    )


@compiled
def knobs_of(place: float, share: float, least: int, largest: int, tile: int) -> tuple[int, int]:
    """(budget, chunk) of an action: whole tiles above one tile, within the bounds."""

    def whole(tokens: float, least: int, largest: int, tile: int) -> int:
        tiled = round(tokens) if tokens <= tile else round(tokens / tile) * tile
        highest = largest if largest <= tile else largest // tile * tile
        return max(least, min(tiled, highest))

    budget = whole(least * (largest / least) ** (0.5 * (place + 1.0)), least, largest, tile)
    chunk = whole(least * (budget / least) ** (0.5 * (share + 1.0)), least, budget, tile)
    return budget, chunk
