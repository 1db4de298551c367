"""The arithmetic of `envs.codec`: plain Python on scalars, which the vectorised environment compiles as it is."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    """The SLO as numbers. `late_share` is the share of TBTs that may be late; a promise of all allows one in 1,000."""

    tbt_s: float
    ttft_s: float
    late_share: float

    @classmethod
    def of(cls, slo: Slo) -> "Promise":
        """Raises ValueError if the SLO has no bound on TBT."""
        if slo.tbt_s is None:
            raise ValueError(f"SLO {str(slo)!r} has no bound on TBT, which knobs are set by: add tbt:MILLISECONDS")
        return cls(float(slo.tbt_s), float(slo.ttft_s or DEFAULT_TTFT_S), max(1.0 - slo.quantile, 1e-3))


class Memory(NamedTuple):
    """What is kept between messages: sums over the short (`_short`) and the long window, and the newest values.

    Sums of gaps count every TBT: `gap` takes all of an iteration for its longest, `late` counts those beyond the SLO.
    Sums of time count every iteration whose launch was seen.
    """

    gap_last_s: float = 0.0
    gaps_short: float = 0.0
    gap_short_s: float = 0.0
    late_short: float = 0.0
    gaps_long: float = 0.0
    gap_long_s: float = 0.0
    late_long: float = 0.0
    firsts_short: float = 0.0
    ttft_short_s: float = 0.0
    tokens_short: float = 0.0
    device_short_s: float = 0.0
    predicted_short_s: float = 0.0
    stages: float = 1.0


class Done(NamedTuple):
    """One completed iteration. `tokens` and `predicted_s` (on all stages) are 0 if its launch was not seen."""

    gaps: float
    late: float
    gap_s: float
    firsts: float
    ttft_s: float
    stages: float
    device_s: float
    tokens: float
    predicted_s: float


class Now(NamedTuple):
    """One message without its completions, and what a step on one stage would take: 0.0 without a model."""

    decodes: float
    decode_context_tokens: float
    prefill_requests: float
    prefill_tokens: float
    running: float
    waiting: float
    waiting_tokens: float
    oldest_wait_s: float
    head_remaining: float
    head_context: float
    kv_usage: float
    preempted: float
    dead_time: float
    budget: float
    chunk: float
    least: float
    largest: float
    decode_s: float  # of the `probes`
    linear_s: float
    batch_s: float
    full_s: float


def remember(m: Memory, done: Done) -> Memory:
    """The memory after one more completed iteration."""
    gap_last_s, gaps_short, gap_short_s, late_short = m.gap_last_s, m.gaps_short, m.gap_short_s, m.late_short
    gaps_long, gap_long_s, late_long = m.gaps_long, m.gap_long_s, m.late_long
    firsts, ttft_s = m.firsts_short, m.ttft_short_s
    tokens, device_s, predicted_s = m.tokens_short, m.device_short_s, m.predicted_short_s
    if done.gaps > 0.0:
        gap_last_s = done.gap_s
        gaps_short = SHORT * gaps_short + done.gaps
        gap_short_s = SHORT * gap_short_s + done.gaps * done.gap_s
        late_short = SHORT * late_short + done.late
        gaps_long = LONG * gaps_long + done.gaps
        gap_long_s = LONG * gap_long_s + done.gaps * done.gap_s
        late_long = LONG * late_long + done.late
    if done.firsts > 0.0:
        firsts = SHORT * firsts + done.firsts
        ttft_s = SHORT * ttft_s + done.firsts * done.ttft_s
    if done.tokens > 0.0:
        tokens = SHORT * tokens + done.tokens
        device_s = SHORT * device_s + done.device_s
        predicted_s = SHORT * predicted_s + done.predicted_s
    return Memory(
        *(gap_last_s, gaps_short, gap_short_s, late_short, gaps_long, gap_long_s, late_long),
        *(firsts, ttft_s, tokens, device_s, predicted_s, done.stages),
    )


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


def features(m: Memory, now: Now, promise: Promise) -> tuple[float, ...]:
    """The features, in the order of FEATURES: finite and within -1 to 1, whatever the numbers are."""

    def over(a: float, b: float) -> float:
        return a / b if b > 0.0 else 0.0

    def against(r: float) -> float:
        return 1.0 - 2.0 / (r * r + 1.0) if r > 0.0 else -1.0

    def load(r: float) -> float:
        return 1.0 - 2.0 / (r + 1.0) if r > 0.0 else -1.0

    def share(r: float) -> float:
        return (2.0 * r - 1.0 if r < 1.0 else 1.0) if r > 0.0 else -1.0

    def place(tokens: float, least: float, most: float) -> float:
        return math.log(max(tokens, least) / least) / math.log(most / least) if most > least else 1.0

    return (
        against(m.gap_last_s / promise.tbt_s),
        against(over(m.gap_short_s, m.gaps_short) / promise.tbt_s),
        against(over(m.gap_long_s, m.gaps_long) / promise.tbt_s),
        against(over(m.ttft_short_s, m.firsts_short) / promise.ttft_s),
        against(over(m.device_short_s, m.predicted_short_s)),
        against(m.stages * now.decode_s / promise.tbt_s),
        against(m.stages * now.batch_s / promise.tbt_s),
        against(m.stages * now.full_s / promise.tbt_s),
        load(now.oldest_wait_s / promise.ttft_s),
        load(over(m.late_short, m.gaps_short) / promise.late_share),
        load(over(m.late_long, m.gaps_long) / promise.late_share),
        load(now.waiting_tokens * over(m.device_short_s, m.tokens_short) / promise.ttft_s),
        load(over(now.waiting_tokens, now.budget)),
        load(over(now.head_remaining, now.budget)),
        load(over(now.head_context, now.largest)),
        load(over(over(now.decode_context_tokens, now.decodes), now.largest)),
        load(now.prefill_requests),
        load(now.dead_time),
        share(over(now.batch_s - now.decode_s, now.batch_s)),
        share(over(now.batch_s - now.linear_s, now.batch_s)),
        share(over(now.decodes + now.prefill_tokens, now.budget)),
        share(over(now.prefill_tokens, now.decodes + now.prefill_tokens)),
        share(over(now.head_context, now.head_context + now.head_remaining)),
        share(over(now.waiting, now.running + now.waiting)),
        share(now.kv_usage),
        share(now.preempted),
        share(place(over(promise.tbt_s * m.tokens_short, m.device_short_s), now.least, now.largest)),
        share(place(now.decodes, now.least, now.largest)),
        share(place(now.budget, now.least, now.largest)),
        share(place(now.chunk, now.least, now.budget)),
    )


def knobs_of(place: float, share: float, least: int, largest: int, tile: int) -> tuple[int, int]:
    """(budget, chunk) of an action: whole tiles above one tile, within the bounds."""

    def whole(tokens: float, least: int, largest: int, tile: int) -> int:
        tiled = round(tokens) if tokens <= tile else round(tokens / tile) * tile
        highest = largest if largest <= tile else largest // tile * tile
        return max(least, min(tiled, highest))

    budget = whole(least * (largest / least) ** (0.5 * (place + 1.0)), least, largest, tile)
    chunk = whole(least * (budget / least) ** (0.5 * (share + 1.0)), least, budget, tile)
    return budget, chunk
