"""Train a law for `policies.rl`: PPO in the vectorised environment, one seed at a time. It needs stable-baselines3.

A seed's folder holds `checkpoint.zip` (all that PPO goes on from), `curve.jsonl` (a line for every check) and the best
law so far, judged on scenarios that it is not trained on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from envs.codec import CODEC_VERSION, FEATURES, N_ACTIONS, Form
from envs.serving_env import Episodes, Source
from envs.serving_vector_env import ServingVectorEnv
from policies.rl import Card, Layer, Trained, write_whole
from policies.scenarios import STAGES

N_ENVS, ROLLOUT, BATCH, EPOCHS = 64, 256, 2048, 4
HIDDEN = 64
DISCOUNT, TRACE = 0.995, 0.95  # gamma and lambda: about 200 iterations ahead
LEARNING_RATE, FIRST_LOG_DEVIATION = 5e-4, -1.5
SCALE = 0.05  # of the reward, so that values are near 1
CHECK_EVERY, CHECKED = 8, 48  # rollouts from check to check; episodes of one

Clock = Callable[[], float]
"""Seconds, from anywhere on."""


class Point(msgspec.Struct, frozen=True):
    """A line of the learning curve: shares of what could be earned, lately in training (None before an episode has
    ended) and on the scenarios to check on; and of late tokens there. `seconds` were spent so far.
    """

    steps: int
    trained: float | None
    checked: float
    late_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one seed learns from, what it is checked on, in which form it acts, and how long."""

    form: Form
    taught: Source
    checked: Source
    steps: int
    seed: int
    folder: Path

    @property
    def best(self) -> Path:
        return self.folder / f"{self.folder.name}.npz"

    @property
    def curve(self) -> list[Point]:
        """As far as it has been learned."""
        path = self.folder / "curve.jsonl"
        return (
            [msgspec.json.decode(line, type=Point) for line in path.read_bytes().splitlines()] if path.exists() else []
        )

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return max((point.seconds for point in self.curve), default=0.0)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.zip"

    def add(self, point: Point) -> None:
        lines = (msgspec.json.encode(one) + b"\n" for one in (*self.curve, point))
        write_whole(self.folder / "curve.jsonl", b"".join(lines))


class SideBySide(VecEnv):
    """`ServingVectorEnv` as stable-baselines3 wants it. Rewards are scaled by the number of an episode's requests, so
    that every kind of requests counts alike.
    """

    def __init__(self, env: ServingVectorEnv, seed: int) -> None:
        self._env, self.first_seed = env, seed
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        observations, _ = self._env.reset(seed=self.first_seed)
        self._requests = np.array([len(self._env.scenario(i).workload) for i in range(self.num_envs)], np.float64)
        self._earned = np.zeros(self.num_envs)
        self._steps = np.zeros(self.num_envs, np.int64)
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, terminated, truncated, info = self._env.step(self._actions)
        shares = rewards / (2.0 * self._requests)
        self._earned += shares
        self._steps += 1
        infos: list[dict[str, Any]] = [NO_INFO] * self.num_envs
        over = terminated | truncated
        for i in np.flatnonzero(over).tolist():
            episode = {"r": float(self._earned[i]), "l": int(self._steps[i])}
            infos[i] = {"terminal_observation": info["final_obs"][i], "episode": episode}
            infos[i] |= {"TimeLimit.truncated": bool(truncated[i])}
            self._earned[i], self._steps[i] = 0.0, 0
            self._requests[i] = len(self._env.scenario(i).workload)
        return observations, (SCALE * MEAN_REQUESTS * shares).astype(np.float32), over, infos

    def close(self) -> None:
        self._env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self._env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("the environments side by side have nothing to set")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("the environments side by side have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


NO_INFO: dict[str, Any] = {}
MEAN_REQUESTS = 200.0


class Teacher(BaseCallback):
    """Checks the law now and then, keeps the best, and a checkpoint of every update; ends in time."""

    def __init__(self, lesson: Lesson, spent: Clock, seconds: float, show: Callable[[int, str], None]) -> None:
        super().__init__()
        self._lesson, self._spent, self._seconds, self._show = lesson, spent, seconds, show
        self.rollouts = 0

    def _on_step(self) -> bool:
        return self._spent() < self._seconds

    def _on_rollout_start(self) -> None:
        """The one before has been learned from."""
        if self.rollouts:
            self.keep()
        if self.rollouts and self.rollouts % CHECK_EVERY == 0:
            self.check()

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        earned = _mean_earned(self.model)
        self._show(self.num_timesteps, "" if earned is None else f"{earned:.3f} earned")

    def keep(self) -> None:
        partial = self._lesson.folder / "checkpoint.partial.zip"
        self.model.save(partial)
        partial.replace(self._lesson.checkpoint)

    def check(self) -> None:
        lesson, layers = self._lesson, layers_of(self.model)
        before = lesson.curve
        earned, late_tokens = check(layers, lesson)
        point = Point(self.num_timesteps, _mean_earned(self.model), earned, late_tokens, self._spent())
        if all(earned > other.checked for other in before):
            card = Card(CODEC_VERSION, FEATURES, lesson.form, max(STAGES), "", point.steps, {"seed": lesson.seed})
            Trained.save(lesson.best, layers, card)
        self.logger.record("check/earned", earned)
        self.logger.record("check/late_tokens", late_tokens)
        lesson.add(point)


def teach(lesson: Lesson, clock: Clock, seconds: float, show: Callable[[int, str], None]) -> None:
    """Train until the lesson's steps are done, or so many seconds were spent on it; goes on from the checkpoint.

    What is compiled first takes none of these. `show` is told the steps that are done, and how it goes.
    """
    torch.set_num_threads(1)  # so small a network gains nothing from more
    lesson.folder.mkdir(parents=True, exist_ok=True)
    vector = ServingVectorEnv(lesson.taught, N_ENVS, Episodes(), AutoresetMode.SAME_STEP, lesson.form)
    env = SideBySide(vector, (lesson.seed + 1) * 1_000_000)
    model = PPO.load(lesson.checkpoint, env, device="cpu") if lesson.checkpoint.exists() else _new(lesson, env)
    model.tensorboard_log = str(lesson.folder.parent / "tensorboard")  # of a checkpoint too, which may have been moved
    env.first_seed += model.num_timesteps % 1_000_000  # other episodes than before
    if model.num_timesteps >= lesson.steps or lesson.seconds >= seconds:
        return
    vector.reset(seed=0)
    vector.step(np.zeros((N_ENVS, N_ACTIONS), np.float32))
    began_s, done = clock() - lesson.seconds, model.num_timesteps
    teacher = Teacher(lesson, lambda: clock() - began_s, seconds, show)
    model.learn(lesson.steps - done, teacher, reset_num_timesteps=not done, tb_log_name=lesson.folder.name)
    if teacher.rollouts:
        teacher.keep()
        teacher.check()


def _new(lesson: Lesson, env: SideBySide) -> PPO:
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: LEARNING_RATE * max(left, 0.05),
        n_steps=ROLLOUT,
        batch_size=BATCH,
        n_epochs=EPOCHS,
        gamma=DISCOUNT,
        gae_lambda=TRACE,
        policy_kwargs={"net_arch": [HIDDEN, HIDDEN], "log_std_init": FIRST_LOG_DEVIATION},
        seed=lesson.seed,
        device="cpu",
    )


def layers_of(model: Any) -> tuple[Layer, ...]:
    """The network from observation to the mean action."""
    modules: Iterable[Any] = (*model.policy.mlp_extractor.policy_net, model.policy.action_net)
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    return tuple(
        (np.ascontiguousarray(m.weight.detach().numpy().T, np.float32), m.bias.detach().numpy().astype(np.float32))
        for m in linear
    )


def check(layers: tuple[Layer, ...], lesson: Lesson) -> tuple[float, float]:
    """(share earned of what could be, share of late tokens) by the mean action, on the same episodes every time."""
    law = Trained(lesson.folder.name, layers, Card(CODEC_VERSION, FEATURES, lesson.form, 1, "", 0))
    env = ServingVectorEnv(lesson.checked, CHECKED, Episodes(), form=lesson.form)
    observations, _ = env.reset(seed=0)
    requests = np.array([len(env.scenario(i).workload) for i in range(CHECKED)])
    going = np.ones(CHECKED, np.bool_)
    earned, tokens, late = np.zeros((3, CHECKED))
    while going.any():
        observations, rewards, terminated, truncated, info = env.step(law.act(observations))
        earned += going * rewards
        tokens += going * info["tbts"]
        late += going * info["late_tbts"]
        going &= ~(terminated | truncated)
    return float(np.mean(earned / (2.0 * requests))), float(np.mean(late / np.maximum(tokens, 1.0)))


def _mean_earned(model: Any) -> float | None:
    episodes = [episode["r"] for episode in model.ep_info_buffer or ()]
    return float(np.mean(episodes)) if episodes else None
