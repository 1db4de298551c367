"""The codec alone: what it says of a message, and that it says the same everywhere."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import envs.codec
from engine.config import EngineConfig
from engine.protocol import (
    VERSION,
    BatchComposition,
    Bounds,
    Completion,
    InForce,
    QueueState,
    StageTimes,
    Telemetry,
)
from envs.codec import FEATURES, N_FEATURES, Codec, within
from envs.features import Float32Array, knobs_of
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload

BOUNDS = Bounds(16, 2048, 16, 64, 65_536)
SLO = Slo(tbt_s=0.05, ttft_s=1.0)
MODEL = StepTimeModel.from_formula((4.7e-3, 7.3e-6, 35e-9), (1.3e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
NO_BATCH, NO_QUEUE = BatchComposition(), QueueState()
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
COUNT = st.integers(0, 2**53)


def bounds() -> st.SearchStrategy[Bounds]:
    return st.tuples(st.integers(1, 3000), st.integers(0, 2**18), st.integers(1, 300)).map(
        lambda drawn: Bounds(drawn[0], drawn[0] + drawn[1], drawn[2], 64, 65_536)
    )


def message(
    iteration: int = 1,
    batch: BatchComposition = NO_BATCH,
    queue: QueueState = NO_QUEUE,
    completed: tuple[Completion, ...] = (),
    knobs: tuple[int, int] = (256, 256),
    kv_usage: float = 0.0,
    preemptions: int = 0,
) -> Telemetry:
    in_force = InForce(*knobs, 0, 0, "controller")
    return Telemetry(
        *(VERSION, "e-1", iteration, 0, "stall-free", 1, in_force, BOUNDS, batch, queue, kv_usage, preemptions, 0),
        completed=completed,
    )


def completion(
    iteration: int, tbt_s: tuple[float, ...], ttft_s: tuple[float, ...] = (), device_s: float = 0.01
) -> Completion:
    stages = (StageTimes(device_s, 0.0, 1),)
    slots = tuple(range(len(tbt_s))), tuple(range(len(ttft_s)))
    return Completion(iteration, 0, 0, device_s, tbt_s, slots[0], ttft_s, slots[1], (), stages)


def named(observation: np.ndarray) -> dict[str, float]:
    return dict(zip(FEATURES, observation.tolist(), strict=True))


def observed(simulation: Simulation, codec: Codec, knobs: tuple[int, int], n: int) -> np.ndarray:
    """[n, features] under fixed knobs."""
    rows = []
    for _ in range(n):
        simulation.step(*knobs)
        rows.append(codec.observe(simulation.telemetry()))
    return np.array(rows)


def test_the_table_in_the_docstring_is_the_list_of_features() -> None:
    table = (envs.codec.__doc__ or "").split("feature  ")[1].split("Budgets lie")[0]
    rows = [line.split("  ")[2] for line in table.splitlines()[1:] if line.strip()]
    assert [name for row in rows for name in row.split(", ")] == list(FEATURES)
    assert len(set(FEATURES)) == N_FEATURES


def test_nothing_heard_and_nothing_to_do_is_the_low_end() -> None:
    seen = named(Codec(SLO, MODEL).observe(message()))
    raised = {name for name, value in seen.items() if value != -1.0}
    # The full batch that could come, the dead time of 1 and the knobs are all there is to tell.
    assert raised == {"full_time", "dead_time", "budget", "chunk"}
    assert seen["dead_time"] == 0.0


def test_what_stands_just_at_its_promise_is_0() -> None:
    codec = Codec(SLO)
    gaps = (0.05,) * 98 + (0.04,) * 2
    done = (completion(1, gaps, ttft_s=(1.0, 0.5)),)
    queue = QueueState(waiting_requests=3, waiting_prompt_tokens=256, oldest_wait_s=1.0, prompt_remaining_tokens=(256,))
    seen = named(codec.observe(message(2, queue=queue, completed=done)))
    for name in ("gap_last", "gap_short", "gap_long", "ttft", "oldest_wait", "waiting", "head_remaining"):
        assert seen[name] == pytest.approx(0.0, abs=1e-6), name
    assert seen["late_short"] == -1.0
    late = named(codec.observe(message(3, completed=(completion(2, (0.06,) * 2 + (0.05,) * 98),))))
    share = 2 / (100 * 15 / 16 + 100)
    assert late["late_short"] == pytest.approx((share / 0.01 - 1) / (share / 0.01 + 1), rel=1e-5)


def test_ratios_beyond_the_promise_are_told_apart() -> None:
    def gap_feature(gap_s: float) -> float:
        return named(Codec(SLO).observe(message(2, completed=(completion(1, (gap_s,)),))))["gap_last"]

    told = [gap_feature(ratio * 0.05) for ratio in (0.0, 0.5, 0.9, 1.0, 1.1, 2.0, 100.0)]
    assert np.all(np.diff(told) > 0)
    assert gap_feature(0.1) == pytest.approx((4 - 1) / (4 + 1))


def test_predictions_are_the_step_time_models() -> None:
    batch = BatchComposition(10, 5000, 1, 200, (200,), (300,), 200 * 400.0)
    queue = QueueState(running_requests=11, prompt_remaining_tokens=(600,), prompt_context_tokens=(300,))
    seen = named(Codec(SLO, MODEL).observe(message(1, batch, queue)))
    alone_s, whole_s = MODEL.mean_s(10, 5000, 0, 0, 0), MODEL.mean_s(10, 5000, 1, 200, 200 * 400.0)
    full_s = MODEL.mean_s(10, 5000, 1, 246, 246 * (300 + 123))
    for name, seconds in (("decode_time", alone_s), ("batch_time", whole_s), ("full_time", full_s)):
        r = seconds / 0.05
        assert seen[name] == pytest.approx((r * r - 1) / (r * r + 1), rel=1e-5)
    assert seen["prefill_time"] == pytest.approx(2 * (whole_s - alone_s) / whole_s - 1, rel=1e-5)
    assert seen["head_progress"] == pytest.approx(2 * 300 / 900 - 1, rel=1e-5)


def test_a_slow_machine_shows_in_model_error_and_pace() -> None:
    plant = Plant(EngineConfig(), MODEL)
    workload = Workload(np.zeros(8), np.full(8, 500), np.full(8, 200))
    rows = []
    for slowdown in (1.0, 2.0):
        simulation = Simulation(plant, workload)
        simulation.slowdown = slowdown
        rows.append(named(observed(simulation, Codec(SLO, MODEL), (256, 256), 40)[-1]))
    assert rows[0]["model_error"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["model_error"] == pytest.approx((4 - 1) / (4 + 1), rel=1e-5)
    assert rows[1]["pace"] < rows[0]["pace"]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_machine_and_a_promise_both_slower_look_the_same(stages: int) -> None:
    def run(factor: float) -> np.ndarray:
        requests = make_workload("poisson:20", "uniform:10-800,5-40", np.random.default_rng(4), 40)
        workload = Workload(requests.arrival_s * factor, requests.prompt_tokens, requests.output_tokens)
        model = MODEL.with_noise(0.1).scaled(factor)
        plant = Plant(EngineConfig(pipeline_parallel=stages), model, dead_time_iterations=stages)
        slo = Slo(tbt_s=0.02 * factor, ttft_s=0.3 * factor)
        return observed(Simulation(plant, workload, seed=3), Codec(slo, model), (208, 96), 300)

    np.testing.assert_allclose(run(4.0), run(1.0), atol=1e-6)


def test_the_short_window_forgets_before_the_long_one() -> None:
    codec = Codec(SLO)
    codec.observe(message(2, completed=(completion(1, (0.2,) * 10),)))
    for i in range(2, 80):
        seen = named(codec.observe(message(i + 1, completed=(completion(i, (0.01,) * 10),))))
    assert seen["late_short"] < -0.9
    assert seen["late_long"] > 0.0
    assert seen["gap_short"] < seen["gap_long"]


def test_a_preemption_is_told_once_and_not_from_before_we_came() -> None:
    codec = Codec(SLO)
    told = [named(codec.observe(message(preemptions=n)))["preempting"] for n in (7, 7, 8, 8)]
    assert told == [-1.0, -1.0, 1.0, -1.0]


def test_a_new_codec_repeats_the_observations_of_the_old() -> None:
    workload = make_workload("poisson:20", "uniform:10-800,5-40", np.random.default_rng(0), 20)
    plant = Plant(EngineConfig(), MODEL.with_noise(0.1))
    runs = [observed(Simulation(plant, workload, 1), Codec(SLO, MODEL), (256, 128), 100) for _ in range(2)]
    assert runs[0].tobytes() == runs[1].tobytes()


@given(st.data())
def test_an_observation_is_bounded_whatever_the_message_says(data: st.DataObject) -> None:
    codec = Codec(SLO, data.draw(st.sampled_from([None, MODEL])))
    for iteration in range(1, 4):
        floats = data.draw(st.lists(ANY_FLOAT, min_size=4, max_size=4))
        counts = data.draw(st.lists(COUNT, min_size=10, max_size=10))
        batch = BatchComposition(*counts[:4], prefill_attention_tokens2=abs(floats[0]))
        queue = QueueState(counts[4], counts[5], counts[6], floats[1], (counts[7],), (counts[8],))
        done = completion(iteration - 1, (floats[2],), (floats[3],), floats[1])
        telemetry = message(iteration, batch, queue, (done,), (16, 2048), floats[0], counts[9])
        observation = codec.observe(telemetry)
        assert observation.shape == (N_FEATURES,)
        assert observation.dtype == np.float32
        assert np.all(np.abs(observation) <= 1.0)


def to_knobs(action: NDArray[np.floating], bounds: Bounds) -> tuple[int, int]:
    return knobs_of(*within(action), bounds.min_budget_tokens, bounds.max_budget_tokens, bounds.tile_tokens)


def to_action(budget_tokens: int, chunk_tokens: int, bounds: Bounds) -> Float32Array:
    """The action [2] that gives these knobs, to a tile. A chunk above the budget counts as the whole of it."""
    least, largest = bounds.min_budget_tokens, bounds.max_budget_tokens
    budget = max(least, min(budget_tokens, largest))
    chunk = max(least, min(chunk_tokens, budget))
    place = math.log(budget / least) / math.log(largest / least) if largest > least else 1.0
    share = math.log(chunk / least) / math.log(budget / least) if budget > least else 1.0
    return np.array((2.0 * place - 1.0, 2.0 * share - 1.0), np.float32)


@given(bounds(), st.data())
def test_knobs_go_to_an_action_and_back_within_a_tile(limits: Bounds, data: st.DataObject) -> None:
    low, high, tile = limits.min_budget_tokens, limits.max_budget_tokens, limits.tile_tokens
    budget = data.draw(st.integers(low, high))
    chunk = data.draw(st.integers(low, budget))
    back = to_knobs(to_action(budget, chunk, limits), limits)
    assert abs(back[0] - budget) <= tile
    assert abs(back[1] - chunk) <= 2 * tile  # its scale ends at the budget, which may be a tile off
    assert to_knobs(to_action(*back, limits), limits) == back


@given(bounds(), st.floats(-2, 2), st.floats(-2, 2))
def test_every_action_is_knobs_that_the_engine_takes(limits: Bounds, place: float, share: float) -> None:
    low, high, tile = limits.min_budget_tokens, limits.max_budget_tokens, limits.tile_tokens
    budget, chunk = to_knobs(np.array([place, share]), limits)
    assert low <= chunk <= budget <= high
    for tokens in (budget, chunk):
        assert tokens <= tile or tokens % tile == 0 or tokens == low
    higher = to_knobs(np.array([place + 0.1, share]), limits)
    assert higher[0] >= budget


def test_the_ends_of_an_action_are_the_bounds() -> None:
    ends = [(-1, -1), (-1, 1), (1, -1), (1, 1), (0, 1), (0, 0)]
    knobs = [to_knobs(np.array(end, np.float32), BOUNDS) for end in ends]
    assert knobs == [(16, 16), (16, 16), (2048, 16), (2048, 2048), (176, 176), (176, 48)]


def test_the_knobs_in_force_are_seen_as_the_action_that_set_them() -> None:
    seen = named(Codec(SLO).observe(message(knobs=(512, 128))))
    assert [seen["budget"], seen["chunk"]] == pytest.approx(to_action(512, 128, BOUNDS).tolist(), abs=1e-6)


def test_a_broken_law_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        to_knobs(np.array([0.0, np.nan]), BOUNDS)


def test_an_slo_without_tbt_is_refused() -> None:
    with pytest.raises(ValueError, match="add tbt"):
        Codec(Slo(ttft_s=1.0))


def test_the_codec_keeps_the_controller_small() -> None:
    code = "import sys, envs.codec; assert not {'torch', 'gymnasium'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
