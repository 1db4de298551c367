"""Many simulated servers side by side: `ServingEnv` as a gymnasium vector environment, in one process.

It gives what `SyncVectorEnv` gives with as many `ServingEnv`s and the same seeds, several times as fast.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.random import Generator
from numpy.typing import NDArray

from envs.codec import Form, fills
from envs.features import Float32Array, FloatArray
from envs.lanes import Seen, begin_lane, lane_of, lists_of, step_lanes
from envs.reward import Earned, unfinished_requests
from envs.serving_env import Episodes, Scenario, Source, action_space, begin, observation_space, outcome_info
from envs.simulator import Simulation

BoolArray = NDArray[np.bool_]

EVERY_ITERATION = Episodes()


class ServingVectorEnv(gymnasium.vector.VectorEnv[Float32Array, Float32Array, NDArray[Any]]):
    """`n_envs` episodes at a time, each of a scenario that `source` draws from a generator of its own.

    Seed k gives environment i the generator of seed k + i. An episode that is over is followed by a new one: with the
    next step, whose action is then ignored and whose reward is 0 (`AutoresetMode.NEXT_STEP`), or at once
    (`SAME_STEP`: the observation is the new episode's; `final_obs` and `final_info` in `info` are the old one's).
    `form` is that of the actions, see `envs.codec`.
    """

    def __init__(
        self,
        source: Source,
        n_envs: int,
        episodes: Episodes = EVERY_ITERATION,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        form: Form = "knobs",
    ) -> None:
        if n_envs < 1:
            raise ValueError(f"n_envs is {n_envs}; it must be at least 1")
        if autoreset_mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ValueError(f"autoreset_mode is {autoreset_mode}; choose NEXT_STEP or SAME_STEP")
        self.num_envs = n_envs
        self.metadata = {"render_modes": [], "autoreset_mode": autoreset_mode}
        self.single_observation_space, self.single_action_space = observation_space(), action_space()
        self.observation_space = batch_space(self.single_observation_space, n_envs)
        self.action_space = batch_space(self.single_action_space, n_envs)
        self._source, self._episodes, self._form = source, episodes, form
        self._same_step = autoreset_mode == AutoresetMode.SAME_STEP
        self._generators: list[Generator | None] = [None] * n_envs
        self._running: dict[int, tuple[Scenario, Simulation]] = {}
        self._all = np.ones(n_envs, np.bool_)
        self._steps = np.zeros(n_envs, np.int64)
        self._over = np.zeros(n_envs, np.bool_)
        self._lanes: Any = None
        self._seen = Seen.empty(n_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32Array, dict[str, Any]]:
        """Begin all episodes anew. `seed` is one for all, as above, or one for each."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments; give one for each, or one number")
        for i, own in enumerate(seeds or [None] * self.num_envs):
            if own is not None or self._generators[i] is None:
                self._generators[i] = seeding.np_random(own)[0]
            self._begin(i)
        self._over[:] = False
        return self._seen.observations.copy(), self._info()

    def step(self, actions: Float32Array) -> tuple[Float32Array, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """Raises ValueError if an action is missing or not a number."""
        if self._lanes is None:
            raise gymnasium.error.ResetNeeded("call reset before the first step")
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(f"actions have shape {np.shape(actions)}; give {self.action_space.shape}")
        if np.isnan(actions).any():
            raise ValueError(f"actions {actions} hold NaN: the law is broken, or its observations are")
        seen, episodes, resets = self._seen, self._episodes, self._over.copy()
        clipped = np.clip(actions, -1.0, 1.0).astype(np.float64)
        step_lanes(self._lanes, ~resets, clipped, episodes.frame_skip, seen)
        self._steps += 1
        terminated = seen.done & ~resets
        truncated = (seen.time_s >= episodes.until_s) | (self._steps >= episodes.max_steps)
        truncated &= ~seen.done & ~resets
        over = self._over = terminated | truncated
        rewards = np.where(resets, 0.0, seen.earned[:, 0])
        for i in np.flatnonzero(resets).tolist():
            self._begin(i)
        for i in np.flatnonzero(truncated).tolist():
            rewards[i] -= unfinished_requests(self._running[i][1].state, episodes.until_s)
        observations, info = seen.observations.copy(), self._info()
        for i in np.flatnonzero(over).tolist():
            scenario, simulation = self._running[i]
            scores = outcome_info(simulation, scenario.slo)
            if self._same_step:
                final = {"final_obs": observations[i].copy(), "final_info": _row(info, i) | scores}
                info = self._add_info(info, final, i)
                self._begin(i)
                observations[i] = seen.observations[i]
                info = self._add_info(info, _row(self._info(), i), i)
            else:
                info = self._add_info(info, scores, i)
        if self._same_step:
            self._over = np.zeros_like(over)
        return observations, rewards, terminated, truncated, info

    def scenario(self, i: int) -> Scenario:
        """What the episode in place i is about."""
        return self._running[i][0]

    def _begin(self, i: int) -> None:
        rng = self._generators[i]
        assert rng is not None
        scenario, simulation, promise = begin(self._source, rng)
        lane = lane_of(simulation, promise, scenario.step_time, fills(self._form, scenario.step_time))
        if self._lanes is None:
            self._lanes = lists_of(lane, self.num_envs)
        begin_lane(self._lanes, i, lane, self._seen)
        self._running[i] = (scenario, simulation)
        self._steps[i] = 0

    def _info(self) -> dict[str, Any]:
        """As `ServingEnv` gives it, in arrays; gymnasium's `_key` masks say that all are there."""
        seen = self._seen
        info: dict[str, Any] = {"time_s": seen.time_s.copy()}
        info |= {"budget_tokens": seen.knobs[:, 0].copy(), "chunk_tokens": seen.knobs[:, 1].copy()}
        info |= {name: seen.earned[:, k].astype(np.int64) for k, name in enumerate(Earned._fields) if k > 0}
        return info | {f"_{name}": self._all for name in info}


def _row(info: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: values[i].item() for name, values in info.items() if not name.startswith(("_", "final"))}
