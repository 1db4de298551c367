"""The simulated server as a gymnasium environment: observations and actions by `envs.codec`, reward by `envs.reward`.

One step is one iteration. The action answers the telemetry that was observed last and acts one dead time after it, as
in the live loop and in `Simulation.run_law`. The episode is terminated when all requests have ended.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.random import Generator

from envs.codec import N_ACTIONS, N_FEATURES, Codec, Form
from envs.features import Float32Array, Promise
from envs.reward import NOTHING, Earned, earned, plus, unfinished_requests
from envs.simulator import NEVER, Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload


def observation_space() -> "gymnasium.Space[Float32Array]":
    """See `envs.codec`."""
    return gymnasium.spaces.Box(-1.0, 1.0, (N_FEATURES,), np.float32)


def action_space() -> "gymnasium.Space[Float32Array]":
    """See `envs.codec`."""
    return gymnasium.spaces.Box(-1.0, 1.0, (N_ACTIONS,), np.float32)


class Scenario(NamedTuple):
    """What one episode is about. `step_time` is what the controller knows of the plant's: it may be wrong, or None."""

    plant: Plant
    workload: Workload
    slo: Slo
    step_time: StepTimeModel | None


Source = Callable[[Generator], Scenario]
"""Draws the scenario of an episode; all that is random in it comes from the generator."""


def drawn_workloads(plant: Plant, slo: Slo, arrivals: str, lengths: str, n_requests: int | None = None) -> Source:
    """Episodes of one plant, whose step time is known, and one SLO; each draws a new workload (`make_workload`)."""

    def source(rng: Generator) -> Scenario:
        workload = make_workload(arrivals, lengths, rng, n_requests, plant.config.max_model_tokens)
        return Scenario(plant, workload, slo, plant.step_time)

    return source


@dataclass(frozen=True, slots=True)
class Episodes:
    """How an episode is cut: `frame_skip` iterations a step; truncated at `until_s` simulated or after `max_steps`."""

    frame_skip: int = 1
    until_s: float = NEVER
    max_steps: float = NEVER

    def __post_init__(self) -> None:
        for name in ("frame_skip", "until_s", "max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


def begin(source: Source, rng: Generator) -> tuple[Scenario, Simulation, Promise]:
    """A new episode. Raises ValueError if its SLO is no `Promise`."""
    scenario = Scenario(*source(rng))
    promise = Promise.of(scenario.slo)
    return scenario, Simulation(scenario.plant, scenario.workload, int(rng.integers(2**31))), promise


def outcome_info(simulation: Simulation, slo: Slo) -> dict[str, float]:
    """The scores of an episode that is over: goodput in requests/s, and shares of requests and of TBTs in the SLO."""
    assert slo.tbt_s is not None
    outcome = simulation.outcome()
    met = outcome.met(slo)
    return {
        "goodput": float(met.sum() / outcome.duration_s) if outcome.duration_s > 0 else 0.0,
        "requests_met": float(met.mean()),
        "tokens_in_slo": outcome.tokens_in_slo(slo.tbt_s),
    }


class ServingEnv(gymnasium.Env[Float32Array, Float32Array]):
    """Serves the requests of one scenario an episode. `form` is that of the actions, see `envs.codec`.

    All iterations of a step run on its action; the codec hears of all of them, and the rewards add up. `info` tells
    what happened in the step: the time (`time_s`) and the knobs (`budget_tokens`, `chunk_tokens`) of the last
    iteration, and the fields of `Earned` but for the reward; after the last step `outcome_info` as well.
    """

    def __init__(self, source: Source, episodes: Episodes = Episodes(), form: Form = "knobs") -> None:
        self.observation_space, self.action_space = observation_space(), action_space()
        self._source, self._episodes, self._form = source, episodes, form

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._scenario, self._simulation, self._promise = begin(self._source, self.np_random)
        self._codec = Codec(self._scenario.slo, self._scenario.step_time, self._form)
        self._credited = np.zeros(len(self._scenario.workload), np.int64)
        self._steps = 0
        config, dead_time = self._scenario.plant.config, self._scenario.plant.dead_time_iterations
        self._pending = deque([(config.budget_tokens, config.chunk_tokens)] * dead_time)
        observation, seen = self._iterate()
        return observation, self._info(seen)

    def step(self, action: Float32Array) -> tuple[Float32Array, float, bool, bool, dict[str, Any]]:
        """Raises ValueError if the action is not a number."""
        if not hasattr(self, "_simulation"):
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        simulation, episodes, total = self._simulation, self._episodes, NOTHING
        for _ in range(episodes.frame_skip):
            answer = self._codec.knobs(action)
            if not self._launched:  # nothing runs: the answer is there long before the next iteration
                self._pending = deque([answer] * (simulation.plant.dead_time_iterations - 1))
            self._pending.append(answer)
            observation, seen = self._iterate()
            total = plus(total, seen)
            if simulation.done:
                break
        self._steps += 1
        reward, info, terminated = total.reward, self._info(total), simulation.done
        over = simulation.now_s >= episodes.until_s or self._steps >= episodes.max_steps
        if over and not terminated:
            reward -= unfinished_requests(simulation.state, episodes.until_s)
        if over or terminated:
            info |= outcome_info(simulation, self._scenario.slo)
        return observation, reward, terminated, over and not terminated, info

    def _iterate(self) -> tuple[Float32Array, Earned]:
        """One iteration under the knobs whose turn it is."""
        simulation = self._simulation
        self._knobs = self._pending.popleft()
        self._launched = simulation.step(*self._knobs)
        seen = earned(simulation.state, self._credited, self._promise, self._launched)
        return self._codec.observe(simulation.telemetry()), seen

    def _info(self, seen: Earned) -> dict[str, Any]:
        _, tbts, late_tbts, first_tokens, finished_requests = seen
        return {
            "time_s": self._simulation.now_s,
            "budget_tokens": self._knobs[0],
            "chunk_tokens": self._knobs[1],
            "tbts": tbts,
            "late_tbts": late_tbts,
            "first_tokens": first_tokens,
            "finished_requests": finished_requests,
        }
