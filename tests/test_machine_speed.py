"""How fast the machine is found to be, from steps drawn of a machine that is known."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.protocol import BatchComposition, Completion, StageTimes
from envs.machine_speed import FASTEST, SLOWEST, MachineSpeed, iteration_s
from envs.step_mean import step_parts
from envs.step_time import StepTimeModel

PROFILE = StepTimeModel.from_formula(
    (4.71e-3, 7.3e-6, 35e-9), (1.27e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3)
).with_noise(0.04)
STEPS_IN_2S = 80  # of 25 ms
FIXED, DECODES, ATTENTION = 1, 2, 3  # parts of a mixed iteration
Factors = float | NDArray[np.float64]
Kind = Callable[[np.random.Generator], BatchComposition]


def batch(decodes: int, tokens: int, start: int = 0, requests: int = 1) -> BatchComposition:
    chunk = tokens / requests
    attention = tokens * (start + 0.5 * chunk)
    return BatchComposition(decodes, 1500 * decodes, requests, tokens, prefill_attention_tokens2=attention)


def usual(rng: np.random.Generator) -> BatchComposition:
    """Short prompts beside decodes: 25 ms, hardly any attention in it."""
    return batch(int(rng.integers(60, 90)), int(rng.integers(600, 800)), int(rng.integers(0, 1000)))


def varied(rng: np.random.Generator) -> BatchComposition:
    """From few decodes to many, from the start of prompts to far behind it."""
    return batch(int(rng.integers(1, 200)), int(rng.integers(16, 1500)), int(rng.integers(0, 60_000)))


def true_s(made: BatchComposition, factors: Factors) -> float:
    """Mean seconds on a machine where each part of the profile's time is multiplied."""
    load = (made.decode_tokens, made.decode_context_tokens, made.prefill_requests, made.prefill_tokens)
    parts = step_parts(PROFILE.coefficients, *(*map(float, load), made.prefill_attention_tokens2))
    return float(np.sum(np.array(parts) * factors))


class Machine:
    """Takes as long as the profile says, each part times its factor, times lognormal noise; `speed` watches."""

    def __init__(self, noise: float = 0.04, profile: StepTimeModel = PROFILE) -> None:
        self.rng = np.random.default_rng(0)
        self.noise = noise
        self.speed = MachineSpeed(profile)

    def run(self, steps: int, factors: Factors, kind: Kind = usual) -> None:
        for _ in range(steps):
            made = kind(self.rng)
            noise = float(np.exp(self.noise * self.rng.standard_normal()))
            self.speed.observe(made, true_s(made, factors) * noise)

    def error(self, factors: Factors, kind: Kind = usual) -> float:
        """Predicted over true mean time, less 1: the worst of many batches."""
        errors = []
        for _ in range(200):
            made = kind(self.rng)
            errors.append(self.speed.predicted_s(made) / true_s(made, factors) - 1.0)
        return float(np.max(np.abs(errors)))


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.3, 1.4, 2.5])
@pytest.mark.parametrize("told_noise", [0.0, 0.04])
def test_a_machine_unlike_its_profile_is_known_within_two_seconds(factor: float, told_noise: float) -> None:
    machine = Machine(profile=PROFILE.with_noise(told_noise))
    machine.run(STEPS_IN_2S, factor)
    assert machine.error(factor) < 0.04


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.4), (1.4, 1.0), (0.7, 1.3), (1.3, 0.7), (1.0, 3.0)])
def test_a_change_is_known_within_two_seconds_however_long_all_was_well(before: float, after: float) -> None:
    machine = Machine()
    machine.run(4000, before)
    assert machine.error(before) < 0.03
    machine.run(STEPS_IN_2S, after)
    assert machine.error(after) < 0.04


@pytest.mark.parametrize("part", [DECODES, ATTENTION])
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_batches_that_vary_tell_which_part_is_wrong(part: int, factor: float) -> None:
    machine, factors = Machine(), np.ones(4)
    factors[part] = factor
    machine.run(5 * STEPS_IN_2S, factors, varied)
    others = [i for i in (FIXED, DECODES, ATTENTION) if i != part]
    assert machine.speed.factors[part] == pytest.approx(factor, rel=0.1)
    assert machine.speed.factors[others] == pytest.approx(1.0, abs=0.1)
    assert machine.error(factors, varied) < 0.06


def test_a_part_that_batches_say_nothing_about_goes_back_to_the_profile() -> None:
    machine, factors = Machine(), np.ones(4)
    factors[ATTENTION] = 3.0
    machine.run(1000, factors, varied)

    def without_attention(rng: np.random.Generator) -> BatchComposition:
        return batch(int(rng.integers(1, 200)), int(rng.integers(16, 900)), requests=40)

    seen = [machine.speed.factors[ATTENTION]]
    for _ in range(4):
        machine.run(5000, 1.0, without_attention)
        seen.append(machine.speed.factors[ATTENTION])
    assert seen[0] == pytest.approx(3.0, rel=0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(seen))
    assert seen[-1] < 1.2


def test_iterations_that_only_decode_are_known_apart() -> None:
    def decoding(rng: np.random.Generator) -> BatchComposition:
        n = int(rng.integers(1, 250))
        return BatchComposition(n, int(rng.integers(100, 3000)) * n)

    machine, factors = Machine(noise=0.02), np.array([1.3, 1.0, 1.3, 1.0])
    machine.run(400, factors, decoding)
    assert machine.error(factors, decoding) < 0.03
    assert machine.speed.noise(mixed=False) == pytest.approx(0.5, rel=0.2)
    assert machine.speed.noise(mixed=True) == 1.0, "nothing was seen of it"


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e9, np.inf, -1.0, np.nan])
def test_absurd_measurements_leave_factors_that_are_bounded_and_are_forgotten(seconds: float) -> None:
    machine = Machine()
    machine.run(100, 1.0)
    for _ in range(500):
        machine.speed.observe(usual(machine.rng), seconds)
        assert np.all((machine.speed.factors >= FASTEST) & (machine.speed.factors <= SLOWEST))
        assert 0.0 < machine.speed.noise(mixed=True) < 10.0
    machine.run(2 * STEPS_IN_2S, 1.0)
    assert machine.error(1.0) < 0.1


@pytest.mark.parametrize("steps_before", [5, 500])
def test_one_step_that_takes_ten_times_as_long_moves_little(steps_before: int) -> None:
    machine = Machine()
    machine.run(steps_before, 1.0)
    made = usual(machine.rng)
    before_s = machine.speed.predicted_s(made)
    machine.speed.observe(made, 10.0 * before_s)
    assert machine.speed.predicted_s(made) == pytest.approx(before_s, rel=0.05 if steps_before > 100 else 0.2)
    machine.run(STEPS_IN_2S, 1.0)
    assert machine.error(1.0) < 0.04


def test_the_noise_is_followed() -> None:
    machine = Machine()
    machine.run(1000, 1.0)
    assert machine.speed.noise(mixed=True) == pytest.approx(1.0, rel=0.15)
    machine.noise = 0.1
    machine.run(400, 1.0)
    assert machine.speed.noise(mixed=True) == pytest.approx(0.1 / 0.04, rel=0.25)
    assert machine.error(1.0) < 0.06
    machine.noise = 0.04
    machine.run(600, 1.0)
    assert machine.speed.noise(mixed=True) == pytest.approx(1.0, rel=0.2)


def sized(tokens: int) -> Kind:
    """Of that many tokens in all, 64 of them decodes."""
    return lambda rng: batch(64, tokens - 64, int(rng.integers(0, 1000)))


def test_a_size_that_is_slow_alone_is_known_and_its_neighbours_stay_as_they_are() -> None:
    machine = Machine(noise=0.02)
    for _ in range(60):
        machine.run(1, 1.4, sized(440))
        machine.run(3, 1.0, sized(380))
        machine.run(3, 1.0, sized(500))
    for tokens, factor in ((440, 1.4), (380, 1.0), (500, 1.0)):
        made = sized(tokens)(machine.rng)
        assert machine.speed.predicted_s(made) / true_s(made, 1.0) == pytest.approx(factor, rel=0.06)


def test_no_size_is_told_apart_on_a_machine_that_is_as_its_profile_but_faster_or_slower() -> None:
    machine = Machine()
    for factor in (1.0, 1.3, 0.8):
        machine.run(STEPS_IN_2S, factor, varied)
    offsets = machine.speed.speed[1]
    assert not offsets.any()


def test_an_iteration_takes_what_its_device_says_whenever_the_host_looked() -> None:
    def completed(*stages: StageTimes) -> float:
        return iteration_s(Completion(1, 0, 9_200_000, 0.004, (0.0092,), (0,), (), (), (), stages))

    assert completed() == 0.004
    assert completed(StageTimes(0.0041, 0.0005, 2)) == pytest.approx(0.0046)
    assert completed(StageTimes(0.003, 0.002, 2), StageTimes(0.004, 0.001, 2)) == 0.004
