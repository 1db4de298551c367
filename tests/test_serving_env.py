"""The environments: gymnasium's rules, the live loop's dead time, the reward, and one by one against all at once."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.random import Generator

from engine.batching import SCHEDULES
from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.codec import FORMS, Codec, Form
from envs.outcome import Outcome
from envs.serving_env import Episodes, Scenario, ServingEnv, drawn_workloads
from envs.serving_vector_env import ServingVectorEnv
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload

MODEL = StepTimeModel.from_formula((4.7e-3, 7.3e-6, 35e-9), (1.3e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
NOISY = MODEL.with_noise(0.1)
SLO = Slo(tbt_s=0.02, ttft_s=0.5)
PLANT = Plant(EngineConfig(), NOISY)
SMALL = drawn_workloads(PLANT, SLO, "poisson:30", "uniform:10-900,2-30", 12)


def random_scenario(rng: Generator) -> Scenario:
    """Small and odd: little KV, one request, huge prompts, long dead times, pipelines, all schedules, a wrong model."""
    n, longest = int(rng.integers(1, 13)), int(rng.choice([4, 60, 700, 2000]))
    prompts = rng.integers(1, longest, n)
    outputs = rng.integers(1, min(40, longest), n)
    total = int((prompts + outputs).max())
    least = int(rng.choice([1, 16, 50]))
    config = EngineConfig(
        schedule=list(SCHEDULES)[rng.integers(5)],  # type: ignore[arg-type]
        budget_tokens=2048,
        chunk_tokens=64,
        min_budget_tokens=least,
        tile_tokens=int(rng.choice([1, 16, 128])),
        max_requests=int(rng.choice([1, 3, 64])),
        block_tokens=16,
        max_model_tokens=max(total, 2),
        kv_blocks=-(-max(total, 2) // 16) + int(rng.choice([0, 1, 5, 200])),
        **(({}, {"look_ahead": True}, {"pipeline_parallel": 2})[rng.integers(3)]),  # type: ignore[arg-type]
    )
    plant = Plant(
        config,
        MODEL.with_noise(float(rng.choice([0.0, 0.3]))),
        dead_time_iterations=int(rng.integers(1, 6)),
        reserve_output=bool(rng.integers(2)),
    )
    workload = Workload(np.sort(rng.exponential(float(rng.choice([0.0, 0.1, 2.0])), n)), prompts, outputs)
    slo = Slo(tbt_s=float(rng.choice([1e-3, 0.02, 1.0])), ttft_s=[None, 0.2][rng.integers(2)], quantile=0.9)
    return Scenario(plant, workload, slo, [None, MODEL.scaled(1.5)][rng.integers(2)])


def with_a_model(rng: Generator) -> Scenario:
    scenario = random_scenario(rng)
    return scenario._replace(step_time=scenario.step_time or MODEL.scaled(0.7))


def fixed(plant: Plant, workload: Workload, slo: Slo = SLO) -> Callable[[Generator], Scenario]:
    return lambda rng: Scenario(plant, workload, slo, plant.step_time)


def play(env: ServingEnv, act: Callable[[np.ndarray], np.ndarray], seed: int) -> tuple[list[Any], float]:
    """An episode: everything that was returned, and the sum of the rewards."""
    observation, info = env.reset(seed=seed)
    returned, total, over = [observation.tobytes(), info], 0.0, False
    while not over:
        observation, reward, terminated, truncated, info = env.step(act(observation))
        returned += [observation.tobytes(), reward, terminated, truncated, info]
        total += reward
        over = terminated or truncated
    return returned, total


def constant(place: float, share: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda observation: np.array((place, share), np.float32)


def random_actions(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    return lambda observation: rng.uniform(-1, 1, 2).astype(np.float32)


@pytest.mark.parametrize("episodes", [Episodes(), Episodes(frame_skip=3, until_s=0.2)])
def test_gymnasium_has_nothing_against_it(episodes: Episodes) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(ServingEnv(SMALL, episodes))
    # It is not registered, so gymnasium cannot make it anew with other ways to render (it has none).
    assert all("alternative render modes" in str(warning.message) for warning in caught)


def test_the_same_seed_gives_the_same_episode_byte_for_byte() -> None:
    first, again, other = (play(ServingEnv(SMALL), random_actions(1), seed)[0] for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_without_a_seed_the_next_episode_is_another_and_as_reproducible() -> None:
    def two(seed: int) -> list[bytes]:
        env = ServingEnv(SMALL)
        env.reset(seed=seed)
        return [env.reset()[0].tobytes() + env.step(np.zeros(2, np.float32))[0].tobytes() for _ in range(2)]

    assert two(1) == two(1)
    assert two(1)[0] != two(1)[1]


@pytest.mark.parametrize(
    ("dead_time", "depth"),
    [
        *((1, {}), (2, {}), (4, {}), (1, {"look_ahead": True})),
        *((1, {"pipeline_parallel": 2}), (3, {"pipeline_parallel": 2})),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_law_drives_the_environment_as_it_drives_the_simulation(
    dead_time: int, depth: dict[str, Any], form: Form
) -> None:
    plant = Plant(EngineConfig(**depth), NOISY, dead_time)
    arrival_s = np.r_[np.linspace(0, 0.5, 20), np.linspace(3, 3.2, 20)]  # with a pause in between
    rng = np.random.default_rng(2)
    workload = Workload(arrival_s, rng.integers(10, 900, 40), rng.integers(1, 30, 40))

    def act(observation: np.ndarray) -> np.ndarray:
        return np.sin(1e3 * observation[:2] + observation[2])  # never twice the same, so that a shift would show

    env = ServingEnv(fixed(plant, workload), form=form)
    seed, knobs = 7, []
    observation, _ = env.reset(seed=seed)
    terminated = False
    while not terminated:
        observation, _, terminated, _, info = env.step(act(observation))
        knobs.append((info["time_s"], info["budget_tokens"], info["chunk_tokens"]))

    codec, told = Codec(SLO, NOISY, form), []

    def decide(telemetry: Telemetry, now_ns: int) -> tuple[int, int, str]:
        told.append((telemetry.scheduled_ns * 1e-9, telemetry.knobs.budget_tokens, telemetry.knobs.chunk_tokens))
        return (*codec.knobs(act(codec.observe(telemetry))), "")

    simulation_seed = int(gymnasium.utils.seeding.np_random(seed)[0].integers(2**31))
    simulation = Simulation(plant, workload, simulation_seed)
    simulation.run_law(decide)
    np.testing.assert_allclose(knobs, told[1:], atol=1e-9)
    assert len({budget for _, budget, _ in knobs}) > 10


def test_a_random_law_cannot_break_it() -> None:
    env, rng = ServingEnv(random_scenario), np.random.default_rng(0)
    for seed in range(100):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            assert env.observation_space.contains(observation)
            observation, reward, over, truncated, info = env.step(rng.uniform(-1, 1, 2).astype(np.float32))
            assert np.isfinite(reward)
            assert not truncated
        assert 0 <= info["requests_met"] <= 1


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("episodes", [Episodes(), Episodes(frame_skip=3, until_s=0.3, max_steps=40)])
@pytest.mark.parametrize("form", FORMS)
def test_all_at_once_is_the_same_as_one_by_one(mode: AutoresetMode, episodes: Episodes, form: Form) -> None:
    n, rng = 6, np.random.default_rng(1)
    source = random_scenario if form == "knobs" else with_a_model
    vector = ServingVectorEnv(source, n, episodes, mode, form)
    one_by_one = SyncVectorEnv([partial(ServingEnv, source, episodes, form)] * n, autoreset_mode=mode)
    assert vector.observation_space == one_by_one.observation_space
    assert vector.action_space == one_by_one.action_space
    results = [env.reset(seed=11) for env in (vector, one_by_one)]
    ended = 0
    for _ in range(600):
        for got, expected in zip(*results, strict=True):
            assert_same(got, expected)
        actions = rng.uniform(-1.2, 1.2, (n, 2)).astype(np.float32)
        results = [env.step(actions) for env in (vector, one_by_one)]
        ended += int((results[0][2] | results[0][3]).sum())
    assert ended > 20


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same(got[key], expected[key])
    elif expected.dtype == object:  # final observations, None where an episode goes on
        for one, other in zip(got, expected, strict=True):
            assert (one is None and other is None) or np.array_equal(one, other)
    else:
        np.testing.assert_array_equal(got, expected)


def test_many_random_episodes_side_by_side() -> None:
    env, rng = ServingVectorEnv(random_scenario, 32), np.random.default_rng(2)
    observations, _ = env.reset(seed=1000)
    ended = 0
    while ended < 400:
        observations, rewards, terminated, truncated, _ = env.step(rng.uniform(-1, 1, (32, 2)).astype(np.float32))
        assert np.all(np.abs(observations) <= 1)
        assert np.all(np.isfinite(rewards))
        assert not truncated.any()
        ended += int(terminated.sum())


def test_environments_side_by_side_can_be_seeded_one_by_one() -> None:
    env = ServingVectorEnv(random_scenario, 3)
    first = env.reset(seed=5)[0]
    assert env.reset(seed=[7, 6, 5])[0][[2, 1]].tobytes() == first[[0, 1]].tobytes()
    assert env.reset()[0].tobytes() != first.tobytes()


def gap_parts(outcome: Outcome, slo: Slo) -> float:
    """What the gaps of an episode are worth, from its token times."""
    total = 0.0
    for first, n in zip(outcome.first_token_row, outcome.workload.output_tokens, strict=True):
        gaps = np.diff(outcome.token_times_s[first : first + n])
        if len(gaps):
            assert slo.tbt_s is not None
            total += 1 - np.mean(gaps > slo.tbt_s) / (1 - slo.quantile)
    return total


def ended(plant: Plant, workload: Workload, slo: Slo, place: float) -> tuple[float, Outcome]:
    env = ServingEnv(fixed(plant, workload, slo))
    _, total = play(env, constant(place), seed=1)
    return total, env._simulation.outcome()


def test_the_reward_of_whole_prompts_is_what_is_left_of_their_ttft_and_their_gaps_in_time() -> None:
    rng = np.random.default_rng(3)
    workload = Workload(np.arange(30) * 0.2, rng.integers(10, 250, 30), rng.integers(1, 30, 30))
    slo = Slo(tbt_s=0.0052, ttft_s=0.02, quantile=0.8)
    total, outcome = ended(PLANT, workload, slo, 1.0)
    prompt_parts = np.maximum(1 - outcome.ttft_s / 0.02, 0)[1:]  # the first is computed before the first action
    assert 0 < outcome.tokens_in_slo(0.0052) < 1
    assert np.ptp(prompt_parts) > 0.1
    assert total == pytest.approx(prompt_parts.sum() + gap_parts(outcome, slo), rel=1e-9)


def test_computing_a_prompt_again_earns_nothing() -> None:
    plant = Plant(EngineConfig(kv_blocks=130, max_model_tokens=2048), MODEL)
    workload = Workload(np.zeros(12), np.full(12, 300), np.full(12, 200))
    slo = Slo(tbt_s=0.02, ttft_s=1e6)
    total, outcome = ended(plant, workload, slo, 0.5)
    assert outcome.preemptions == 5
    assert total - gap_parts(outcome, slo) == pytest.approx(12 - 256 / 300, abs=1e-3)  # 256 before the first action


def test_chunks_earn_their_part_when_they_are_computed() -> None:
    workload = Workload(np.zeros(1), np.array([1000]), np.array([1]))
    env = ServingEnv(fixed(Plant(EngineConfig(), MODEL), workload, Slo(tbt_s=0.02, ttft_s=0.1)))
    env.reset(seed=0)  # launches the first 256 tokens
    rewards, done_s = [], MODEL.mean_s(0, 0, 1, 256, 256 * 128)
    for context in (256, 512, 768):
        tokens = min(256, 1000 - context)
        done_s += MODEL.mean_s(0, 0, 1, tokens, tokens * (context + tokens / 2))
        rewards.append(tokens / 1000 * (1 - done_s / 0.1))
    action = np.array((2 * np.log(256 / 16) / np.log(2048 / 16) - 1, 1), np.float32)
    got = [env.step(action) for _ in range(4)]
    assert [step[1] for step in got] == pytest.approx([*rewards, 0.0])
    assert [step[2] for step in got] == [False, False, False, True]


def test_the_law_with_the_better_goodput_earns_more() -> None:
    rng = np.random.default_rng(5)
    workload = Workload(np.sort(rng.uniform(0, 12, 240)), rng.integers(100, 1500, 240), rng.integers(20, 100, 240))
    places = np.linspace(-1, 1, 7)
    earned, outcomes = zip(*(ended(PLANT, workload, SLO, place) for place in places), strict=True)
    goodput = [outcome.goodput(SLO) for outcome in outcomes]
    assert np.argmax(earned) == np.argmax(goodput)
    assert 0 < np.argmax(earned) < 6
    assert earned[0] < np.max(earned) - 10
    assert earned[-1] < np.max(earned) - 10


@pytest.mark.parametrize("limit", [{"until_s": 0.05}, {"max_steps": 4}])
def test_what_is_unfinished_at_the_cut_is_a_miss(limit: dict[str, float]) -> None:
    workload = Workload(np.array([0.0, 0.0, 0.0, 50.0]), np.full(4, 30), np.array([1, 1000, 1000, 1]))
    plant, slo = Plant(EngineConfig(), MODEL), Slo(tbt_s=1e-6, ttft_s=1e-6, quantile=1e-9)  # nothing is earned or lost
    returned, total = play(ServingEnv(fixed(plant, workload, slo), Episodes(**limit)), constant(1), seed=0)
    assert returned[-3:-1] == [False, True]
    assert total == pytest.approx(-2, abs=1e-6)  # of the three that came, one has its token


def test_a_skipped_frame_is_the_sum_of_its_iterations() -> None:
    def run(frame_skip: int) -> tuple[float, int, int]:
        env = ServingEnv(SMALL, Episodes(frame_skip=frame_skip))
        returned, total = play(env, constant(0.2), seed=3)
        infos = [r for r in returned if isinstance(r, dict)]
        return total, sum(i["tbts"] for i in infos), sum(i["finished_requests"] for i in infos)

    assert run(4) == pytest.approx(run(1))
    assert run(1)[2] == 12


def test_the_scores_at_the_end_are_those_of_the_outcome() -> None:
    env = ServingEnv(SMALL)
    returned, _ = play(env, constant(0.0), seed=2)
    outcome = env._simulation.outcome()
    assert returned[-1]["goodput"] == pytest.approx(outcome.goodput(SLO))
    assert returned[-1]["tokens_in_slo"] == outcome.tokens_in_slo(0.02)


@pytest.mark.parametrize("slo", [Slo(ttft_s=1.0), Slo(tbt_s=0.1, tpot_s=0.1), Slo(tbt_s=0.1, e2el_s=9.0)])
def test_a_promise_that_the_reward_does_not_know_is_refused(slo: Slo) -> None:
    env = ServingEnv(lambda rng: SMALL(rng)._replace(slo=slo))
    with pytest.raises(ValueError, match="tbt"):
        env.reset(seed=0)


def test_a_limit_needs_a_step_time_model_and_other_forms_are_unknown() -> None:
    unknown: Any = "speed"
    for form, source, message in (("limit", random_scenario, "step-time model"), (unknown, SMALL, "knobs, limit")):
        with pytest.raises(ValueError, match=message):
            for seed in range(10):
                ServingVectorEnv(source, 1, form=form).reset(seed=seed)


@pytest.mark.parametrize("wrong", [{"frame_skip": 0}, {"until_s": 0.0}, {"max_steps": -1}])
def test_wrong_limits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Episodes(**wrong)


def test_an_action_that_is_no_number_is_refused() -> None:
    action = np.array([np.nan, 0.0], np.float32)
    for env, actions in ((ServingEnv(SMALL), action), (ServingVectorEnv(SMALL, 1), action[None])):
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"NaN|not a number"):
            env.step(actions)


def test_wrong_numbers_of_actions_and_seeds_are_refused() -> None:
    env = ServingVectorEnv(SMALL, 3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="2 seeds for 3"):
        env.reset(seed=[1, 2])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros((2, 2), np.float32))
