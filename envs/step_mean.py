"""The mean time of an iteration by a packed step-time model (`envs.step_time`), compiled: the simulators' hot spot."""

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled

FloatArray = NDArray[np.float64]

LEAST_S = 1e-6
_HEAD, _CURVES = 11, 7  # entries before the curves, and how many those are (`envs.step_time._packed`)


@compiled
def _padded(c: FloatArray, tile: float, sizes: int, at: int, tokens: float) -> float:
    if sizes > 0 and tokens <= c[at + sizes - 1]:
        return float(c[at + np.searchsorted(c[at : at + sizes], tokens)])
    return float(np.ceil(tokens / tile) * tile) if tile > 1.0 else tokens


@compiled
def _curve(c: FloatArray, at: int, pieces: int, x: float) -> float:
    # No branch and no term below 0: fast, and never falling in floating point either.
    seconds = 0.0
    for i in range(at, at + 3 * pieces, 3):
        seconds += c[i + 2] * min(max(x - c[i], 0.0), c[i + 1])
    return seconds


@compiled
def sized_tokens(coefficients: FloatArray) -> float:
    """Up to how many tokens sizes have factors of their own (`Regime.size_factors`): more can take less time there."""
    return float(coefficients[9] * coefficients[10])


@compiled
def _size_factor(c: FloatArray, at: int, tokens: float) -> float:
    size = int(np.ceil(tokens / c[9])) - 1
    return float(c[at + size]) if size < c[10] else 1.0


@compiled
def step_parts(
    coefficients: FloatArray,
    decodes: float,
    decode_context_tokens: float,
    prefill_requests: float,
    prefill_tokens: float,
    prefill_attention_tokens2: float,
) -> tuple[float, float, float, float]:
    """Mean seconds of an iteration by their cause, arguments as of `mean_step_s`.

    All but attention if it only decodes, or the same if it is mixed (one of the two is 0); attention of the decodes;
    attention of the prompts.
    """
    c, context, pieces = coefficients, float(decode_context_tokens), int(coefficients[1])
    width, sizes = 3 * pieces, _HEAD + 3 * pieces * _CURVES
    alone_s = alone_context_s = mixed_s = context_s = attention_s = 0.0
    if prefill_tokens <= 0 or c[0] > 0:
        tokens = _padded(c, c[3], int(c[4]), sizes, float(decodes))
        alone_s = c[2] + _curve(c, _HEAD, pieces, tokens)
        alone_context_s = _curve(c, _HEAD + width, pieces, context)
    if prefill_tokens > 0:
        at = _HEAD + 2 * width
        tokens = _padded(c, c[6], int(c[7]), sizes + int(c[4]), float(decodes + prefill_tokens))
        mixed_s = c[5] + _curve(c, at, pieces, tokens) + _curve(c, at + width, pieces, float(decodes))
        mixed_s += _curve(c, at + 3 * width, pieces, float(prefill_requests))
        mixed_s *= _size_factor(c, sizes + int(c[4]) + int(c[7]), float(decodes + prefill_tokens))
        context_s = _curve(c, at + 2 * width, pieces, context)
        # The keys L + c that a chunk sees, exact if the batch's chunks are alike: from W = n c (L + c/2).
        keys = prefill_attention_tokens2 / prefill_tokens + 0.5 * prefill_tokens / max(float(prefill_requests), 1.0)
        attention_s = _curve(c, at + 4 * width, pieces, max(float(prefill_attention_tokens2), c[8] * keys))
    if alone_s + alone_context_s >= mixed_s + context_s + attention_s:
        return max(alone_s, LEAST_S), 0.0, alone_context_s, 0.0
    return 0.0, max(mixed_s, LEAST_S), context_s, attention_s


@compiled
def mean_step_s(
    coefficients: FloatArray,
    decodes: float,
    decode_context_tokens: float,
    prefill_requests: float,
    prefill_tokens: float,
    prefill_attention_tokens2: float,
) -> float:
    """Mean seconds of an iteration, above 0. `coefficients` are `StepTimeModel.coefficients`."""
    parts = step_parts(
        coefficients, decodes, decode_context_tokens, prefill_requests, prefill_tokens, prefill_attention_tokens2
    )
    return parts[0] + parts[1] + parts[2] + parts[3]
