"""What a learned law is trained on: scenarios drawn far and wide around one machine, its workloads and its promise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from engine.config import EngineConfig
from envs.arrivals import gamma_arrivals
from envs.features import Promise
from envs.serving_env import Scenario
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import PARTS, StepTimeModel
from envs.workload import Lengths, Workload

MACHINES = 200  # drawn once: each costs a millisecond
BEND = 0.5  # deviation of the logarithm of each part of a machine's step time
BLUNDER, PART_BLUNDER = 0.15, 0.25  # the same of what the controller's profile has wrong: of all, and of each part
TRUTHFUL = 0.4  # of the profiles have nothing wrong
MOST_NOISE, USUAL_NOISE = 0.1, 0.04
STAGES = (1, 1, 2, 4)  # of a pipeline, drawn evenly
MOST_DEAD_TIME = 3  # and one more for each stage beyond the first
PROMISES = 3.0  # so many times as long, or as short, as the one asked for: as if the machine were faster, or slower
LOADS = (0.3, 1.25)  # of capacity
BURSTS = 3.0  # largest coefficient of variation of the arrivals; one is Poisson
ITERATIONS, FEWEST, MOST = 600, 12, 400  # of an episode, roughly; and its requests
ROOM = 0.8  # of the promise is what decodes alone may take, and a fluid server aims at


@dataclass(frozen=True, slots=True)
class Machine:
    """How many pipeline stages there are, how long steps take on each, and how long the controller thinks they do."""

    stages: int
    truth: StepTimeModel
    told: StepTimeModel

    @classmethod
    def draw(cls, profile: StepTimeModel, rng: Generator) -> "Machine":
        """`profile` is that of all layers on one device; stages share them evenly."""
        noise, stages = rng.uniform(0.0, MOST_NOISE), int(rng.choice(STAGES))
        truth = profile.scaled(1.0 / stages).bent(
            dict(zip(PARTS, np.exp(BEND * rng.standard_normal(len(PARTS))), strict=True))
        )
        if rng.random() < TRUTHFUL:
            return cls(stages, truth.with_noise(noise), truth.with_noise(noise))
        wrong = np.exp(BLUNDER * rng.standard_normal() + PART_BLUNDER * rng.standard_normal(len(PARTS)))
        told = truth.bent(dict(zip(PARTS, wrong, strict=True)))
        return cls(stages, truth.with_noise(noise), told.with_noise(USUAL_NOISE))


class Scenarios:
    """Draws scenarios, as `envs.serving_env.Source`: of variants of one machine, kinds of requests and one promise.

    The load is drawn in shares of a fluid server's capacity, so that every kind of requests comes in underload and in
    overload; an episode has about as many iterations of each. Raises ValueError for an SLO that is no `Promise`, or
    one that nothing drawn can keep.
    """

    def __init__(
        self, profile: StepTimeModel, config: EngineConfig, kinds: Sequence[Lengths], slo: Slo, seed: int
    ) -> None:
        self._promise = Promise.of(slo)
        rng = np.random.default_rng(seed)
        self._machines = [Machine.draw(profile, rng) for _ in range(MACHINES)]
        self._config, self._kinds, self._slo = config, kinds, slo
        if not any(self._draw(rng) for _ in range(MACHINES)):
            raise ValueError(f"the promise {str(slo)!r} is too short for this machine: decodes alone take longer")

    def __call__(self, rng: Generator) -> Scenario:
        while (scenario := self._draw(rng)) is None:
            pass
        return scenario

    def _draw(self, rng: Generator) -> Scenario | None:
        """None if decodes alone would break the promise that was drawn."""
        machine = self._machines[int(rng.integers(len(self._machines)))]
        kind = self._kinds[int(rng.integers(len(self._kinds)))]
        asked_s = np.array((self._promise.tbt_s, self._promise.ttft_s))
        tbt_s, ttft_s = (asked_s * PROMISES ** rng.uniform(-1, 1, 2)).tolist()
        config = replace(self._config, pipeline_parallel=machine.stages)
        rate = fluid_capacity(machine.truth, kind, tbt_s, config)
        if rate == 0.0:
            return None
        n = int(np.clip(rate * ROOM * tbt_s / machine.stages * ITERATIONS, FEWEST, MOST))
        rows = rng.integers(len(kind), size=n)
        arrival_s = gamma_arrivals(rng, n, rate * rng.uniform(*LOADS), rng.uniform(1.0, BURSTS))
        workload = Workload(arrival_s, kind.prompt_tokens[rows], kind.output_tokens[rows])
        dead_time = int(rng.integers(1, MOST_DEAD_TIME + machine.stages))
        plant = Plant(config, machine.truth, dead_time, bool(rng.integers(2)))
        return Scenario(plant, workload, Slo(tbt_s, ttft_s, quantile=self._slo.quantile), machine.told)


def fluid_capacity(machine: StepTimeModel, kind: Lengths, tbt_s: float, config: EngineConfig) -> float:
    """Requests per second that a server of mean batches carries, each within `ROOM` of the SLO; 0 if it carries none.

    At a rate r, batches of t seconds hold r t prompts, and of the r * output * t seconds' decodes one token each; as
    many as there are seats, and room in the KV cache. In a pipeline t is a stage's part of the SLO.
    """
    stages = config.pipeline_parallel
    prompt, output = float(kind.prompt_tokens.mean()), float(kind.output_tokens.mean())
    squares, t = float((kind.prompt_tokens.astype(np.float64) ** 2).mean()), ROOM * tbt_s / stages
    held = config.kv_blocks * config.block_tokens / (prompt + output)
    low, high = 0.0, min(config.max_requests, held) / (output * t * stages)
    for _ in range(20):
        rate = 0.5 * (low + high)
        decodes, prompts = rate * output * t, rate * t
        batch = (decodes, decodes * (prompt + 0.5 * output), prompts, prompts * prompt, 0.5 * prompts * squares)
        low, high = (rate, high) if machine.mean_s(*batch) <= t else (low, rate)
    return low if low * t * ITERATIONS >= 1.0 else 0.0
