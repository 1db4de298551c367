"""How much slower or faster than its profile a machine is, from what it is seen to do."""

from typing import NamedTuple

import numpy as np

from engine.compiled import compiled
from engine.protocol import BatchComposition, Completion
from envs.step_mean import FloatArray, step_parts
from envs.step_time import StepTimeModel

N_PARTS = 4
SPEED_STEP = 0.003  # what the common speed may change by in one iteration, one standard deviation
PART_ERROR = 0.3  # of a part of the profile, beside the common speed
PART_MEMORY = 5_000.0  # iterations after which what was learned of a part is forgotten, unless it is seen again
SLOWEST, FASTEST = 5.0, 0.2  # factors on the profile's times
OUTLIER = 4.0  # standard deviations
CHANGE, CHANGE_MEMORY = 1.6, 0.8  # of the mean normalised surprise; 5 standard deviations of it
CHANGE_STEP = 0.15
NOISE_MEMORY = 0.99
LEAST_NOISE, MOST_NOISE = 0.005, 0.3
N_SIZES, SIZE_TOKENS, EVEN_SIZES, SIZES_PER_OCTAVE = 56, 32.0, 32, 8.0
SIZE_CHANGE, SIZE_MEMORY = 2.0, 0.8  # as of `CHANGE`, of one size: a change of all is found first
SIZE_STEP, MOST_OFFSET = 0.5, 2.0

Speed = tuple[FloatArray, FloatArray]
"""How a machine runs: [parts] the factors, [N_SIZES] the o_k of `MachineSpeed`."""


class Estimate(NamedTuple):
    """What is known of a machine, for `follow`; float64, n the parts of the step time and one."""

    state: FloatArray  # [n]: s, then d_j
    covariance: FloatArray  # [n, n]
    gain: FloatArray  # [n]
    noise: FloatArray  # [3]: variances of decode-only and mixed iterations, mean surprise
    factors: FloatArray  # [parts]
    sizes: FloatArray  # [3, N_SIZES]: o_k, its variance, mean surprise

    @classmethod
    def of(cls, step_time: StepTimeModel | None) -> "Estimate":
        """Before anything was seen."""
        n, deviations = 1 + N_PARTS, profile_deviations(step_time)
        state = np.zeros(n)
        state[0] = 1.0
        noise = np.array([*deviations**2, 0.0])
        return cls(state, PART_ERROR**2 * np.eye(n), np.zeros(n), noise, np.ones(N_PARTS), np.zeros((3, N_SIZES)))


def profile_deviations(step_time: StepTimeModel | None) -> FloatArray:
    """Of decode-only and mixed iterations' time / mean, float64 [2]."""
    if step_time is None:
        return np.full(2, LEAST_NOISE)
    deviations: FloatArray = np.maximum(np.std(step_time.residuals, axis=1), LEAST_NOISE)
    return deviations


def iteration_s(completion: Completion) -> float:
    """Seconds that an iteration took of the device, or of the busiest one; a single one's wait before it is counted in.

    By the device's clock: when the host had time to look is no matter of the batch.
    """
    stages = completion.stages
    if len(stages) == 1:
        return stages[0].busy_s + stages[0].bubble_s
    return max([stage.busy_s for stage in stages]) if stages else completion.device_s


class MachineSpeed:
    """A Kalman filter for the factors on the parts of the profile's step time (`envs.step_mean.step_parts`).

        factor_j = s + d_j      s a random walk, d_j -> 0 over `PART_MEMORY` iterations, of deviation `PART_ERROR`
        measured / predicted = s + sum of share_j d_j + o_k + noise

    with share_j part j's share of the time that the profile predicts, and o_k what batches of the k-th size (`size_of`)
    that compute prompts take beyond that: 0, until surprises in a row at that size alone have shown that a kernel or
    the host serves it unlike its neighbours, which no smooth profile tells. So the machine's speed is followed
    wherever it goes, while a part that batches say nothing about returns to the profile: the estimate is bounded, and
    cannot drift when nothing excites it (compare the standing prior of Ljung and Gunnarsson, Automatica 26(1), 1990).
    Surprises are cut at `OUTLIER` deviations; a row of them to one side is a change, and opens the filter.
    """

    def __init__(self, step_time: StepTimeModel) -> None:
        self._coefficients = step_time.coefficients
        self._profile_deviations = profile_deviations(step_time)
        self._estimate = Estimate.of(step_time)
        self.factors = self._estimate.factors
        self.speed = self.factors, self._estimate.sizes[0]  # for `as_run`

    def observe(self, batch: BatchComposition, seconds: float) -> None:
        """An iteration took `seconds`; no number of seconds above 0 says nothing."""
        if not 0.0 < seconds < np.inf:
            return
        follow(self._coefficients, self._estimate, *(*map(float, batch.load), seconds))

    def predicted_s(self, batch: BatchComposition) -> float:
        """Mean seconds of an iteration, as the machine runs now."""
        return float(as_run(self._coefficients, self.speed, *map(float, batch.load)))

    def noise(self, mixed: bool) -> float:
        """Deviation of measured / predicted, as seen lately, over the profile's."""
        return float(np.sqrt(self._estimate.noise[int(mixed)]) / self._profile_deviations[int(mixed)])


@compiled
def size_of(total_tokens: float) -> int:
    """Which size a batch has: as fine as engines pad small ones, then in eighths of octaves."""
    if total_tokens <= EVEN_SIZES * SIZE_TOKENS:
        return int(np.ceil(total_tokens / SIZE_TOKENS)) - 1
    octaves = np.log2(total_tokens / (EVEN_SIZES * SIZE_TOKENS))
    return int(min(EVEN_SIZES + np.floor(SIZES_PER_OCTAVE * octaves), N_SIZES - 1.0))


@compiled
def as_run(
    coefficients: FloatArray,
    speed: Speed,
    decodes: float,
    decode_context: float,
    requests: float,
    tokens: float,
    attention: float,
) -> float:
    """Mean seconds of a batch."""
    factors, offsets = speed
    parts = step_parts(coefficients, decodes, decode_context, requests, tokens, attention)
    seconds = parts[0] * factors[0] + parts[1] * factors[1] + parts[2] * factors[2] + parts[3] * factors[3]
    if tokens > 0.0:
        seconds += offsets[size_of(decodes + tokens)] * (parts[0] + parts[1] + parts[2] + parts[3])
    return float(seconds)


@compiled
def _forget(state: FloatArray, covariance: FloatArray, sizes: FloatArray) -> None:
    """What one iteration makes of `Estimate`, whatever it shows."""
    n, keep = N_PARTS + 1, 1.0 - 1.0 / PART_MEMORY
    for i in range(1, n):
        state[i] *= keep
        for j in range(n):
            covariance[i, j] *= keep
            covariance[j, i] *= keep
        covariance[i, i] += (1.0 - keep * keep) * PART_ERROR**2
    covariance[0, 0] += SPEED_STEP**2
    for k in range(N_SIZES):  # an array at once would be made anew
        sizes[0, k] *= keep


@compiled
def _follow_size(sizes: FloatArray, size: int, surprise: float, deviation: float) -> None:
    """As `follow` does, for what one size takes beyond the others; `surprise` is of `deviation` 1."""
    gain = sizes[1, size] / deviation
    sizes[0, size] = min(max(sizes[0, size] + gain * surprise, -MOST_OFFSET), MOST_OFFSET)
    sizes[1, size] -= gain * gain
    sizes[2, size] = SIZE_MEMORY * sizes[2, size] + (1.0 - SIZE_MEMORY) * surprise
    if abs(sizes[2, size]) > SIZE_CHANGE:
        sizes[1, size] += SIZE_STEP**2
        sizes[2, size] = 0.0


@compiled
def follow(
    coefficients: FloatArray,
    estimate: Estimate,
    decodes: float,
    decode_context: float,
    requests: float,
    tokens: float,
    attention: float,
    seconds: float,
) -> None:
    """Take in an iteration of this batch that took `seconds`, a number above 0."""
    state, covariance, gain, scalars, factors, sizes = estimate
    parts = step_parts(coefficients, decodes, decode_context, requests, tokens, attention)
    predicted_s = parts[0] + parts[1] + parts[2] + parts[3]
    n, regime = N_PARTS + 1, int(tokens > 0.0)
    _forget(state, covariance, sizes)
    # Row of the measurement: 1 for the speed, and each part's share of the predicted time.
    expected, spread, size = state[0], 0.0, size_of(max(decodes + tokens, 1.0))
    for j in range(N_PARTS):
        expected += parts[j] / predicted_s * state[1 + j]
    if tokens > 0.0:
        expected, spread = expected + sizes[0, size], sizes[1, size]
    for i in range(n):
        gain[i] = covariance[i, 0]
        for j in range(N_PARTS):
            gain[i] += covariance[i, 1 + j] * parts[j] / predicted_s
        spread += gain[i] * (1.0 if i == 0 else parts[i - 1] / predicted_s)
    deviation = np.sqrt(spread + scalars[regime] * expected * expected)
    surprise = min(max((seconds / predicted_s - expected) / deviation, -OUTLIER), OUTLIER)
    for i in range(n):
        state[i] += gain[i] * surprise / deviation
    for i in range(n):
        for j in range(n):
            covariance[i, j] -= gain[i] * gain[j] / (deviation * deviation)
    if tokens > 0.0:
        _follow_size(sizes, size, surprise, deviation)
    state[0] = min(max(state[0], FASTEST), SLOWEST)
    for j in range(N_PARTS):
        factors[j] = min(max(state[0] + state[1 + j], FASTEST), SLOWEST)
    error = surprise * deviation / max(expected, FASTEST)
    variance = NOISE_MEMORY * scalars[regime] + (1.0 - NOISE_MEMORY) * error * error
    scalars[regime] = min(max(variance, LEAST_NOISE**2), MOST_NOISE**2)
    scalars[2] = CHANGE_MEMORY * scalars[2] + (1.0 - CHANGE_MEMORY) * surprise
    if abs(scalars[2]) > CHANGE:
        covariance[0, 0] += CHANGE_STEP**2
        scalars[2] = 0.0
        sizes[2, :] = 0.0  # it was not theirs
