"""The sweep of `pacer profile`: which batches it times, what it keeps, and how well its model predicts others."""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig, ModelSource
from engine.protocol import StageTimes
from engine.request import Batch, StepResult
from engine.telemetry import compose
from envs.iterations import COMPOSITION, load_iterations
from envs.step_time import StepTimeModel
from envs.step_time_error import errors
from profiles.sweep_choice import Choice
from profiles.sweep_fit import fit_samples, run_profile
from profiles.sweep_points import BatchMaker, Point, by_size, candidates, drawn
from profiles.sweep_timing import FEW, LEAST, MOST, WARM_UP, Samples, Sweep, Timing

H200 = EngineConfig(
    budget_tokens=8192,
    chunk_tokens=8192,
    max_budget_tokens=8192,
    max_requests=256,
    max_model_tokens=65_536,
    block_tokens=128,
    kv_blocks=7000,
    look_ahead=True,
)
SMALL = EngineConfig(max_budget_tokens=256, max_requests=8, max_model_tokens=512, block_tokens=16, kv_blocks=256)
TRUTH = StepTimeModel.from_formula((4.71e-3, 7.3e-6, 35e-9), (1.27e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))


@dataclass
class Modelled:
    """A device that works through its batches one after the other, in `TRUTH`'s time; fails after so many launches."""

    depth: int
    now_ns: int = 0
    launches: int = 0
    fails_after: int = 10**9
    most_in_flight: int = 0
    padding_tokens: int = 0
    flight: deque[float] = field(default_factory=deque)

    def clock(self) -> int:
        return self.now_ns

    def launch(self, batch: Batch) -> "Modelled":
        self.launches += 1
        if self.launches > self.fails_after:
            raise RuntimeError("out of memory")
        composition = compose(batch)
        self.flight.append(TRUTH.mean_s(*(getattr(composition, name) for name in COMPOSITION)))
        self.most_in_flight = max(self.most_in_flight, len(self.flight))
        assert len(self.flight) <= self.depth
        return self

    def result(self) -> StepResult:
        seconds = self.flight.popleft()
        self.now_ns += round(seconds * 1e9)
        return StepResult([0], seconds, (StageTimes(0.9 * seconds, 0.0, 1),))

    def close(self) -> None:
        pass


def swept(
    config: EngineConfig, seconds: float, stop: Callable[[], bool] = lambda: False, fails_after: int = 10**9
) -> Samples:
    runner = Modelled(config.depth, fails_after=fails_after)
    return Sweep(runner, config, runner.clock, seed=0, stop=stop).run(seconds)


def test_a_made_batch_is_what_its_point_says_with_kv_blocks_of_its_own() -> None:
    point = Point(decodes=5, decode_context=100, prefills=2, chunk=30, prefix=200)
    batch = BatchMaker(SMALL).make(point)
    composition = compose(batch)
    assert composition.decode_tokens == 5
    assert composition.decode_context_tokens == pytest.approx(500, abs=3)
    assert composition.prefill_chunk_tokens == (30, 30)
    assert composition.prefill_context_tokens == (200, 200)
    assert len(set(batch.context[:5].tolist())) == 5, "no two decodes are alike"
    held = -(-(batch.context + batch.n_tokens) // SMALL.block_tokens)
    blocks = [block for row, n in zip(batch.block_tables, held, strict=True) for block in row[:n].tolist()]
    assert len(blocks) == len(set(blocks)) <= SMALL.kv_blocks
    assert max(blocks) < SMALL.kv_blocks
    ends = (batch.context + batch.n_tokens).tolist()
    assert all(len(request.token_ids) > end for request, end in zip(batch.requests, ends, strict=True)), (
        "none in flight"
    )


@pytest.mark.parametrize("config", [SMALL, H200])
def test_candidates_reach_the_bounds_and_stay_within(config: EngineConfig) -> None:
    points = candidates(config, np.random.default_rng(0))
    assert all(point.fits(config) for point in points)
    assert max(point.decodes for point in points) == config.max_requests
    assert max(point.decodes + point.prefills * point.chunk for point in points) == config.max_budget_tokens
    kv_tokens = config.kv_blocks * config.block_tokens
    if config is H200:
        assert max(point.decodes * point.decode_context for point in points) > 0.85 * kv_tokens
    assert max(point.prefix for point in points) > 0.5 * config.max_model_tokens
    assert {point.prefills for point in points} == {0, 1, 2, 4, 8}


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_one_candidate_alone(seed: int) -> None:
    """Of two that are equal the first would be asked for again and again, since the other is what was measured."""
    points = candidates(H200, np.random.default_rng(seed))
    assert len(set(points)) == len(points)


def test_drawn_points_fit_and_are_those_of_the_seed() -> None:
    first, again, other = (list(islice(drawn(H200, np.random.default_rng(seed)), 30)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(point.fits(H200) for point in first)
    assert 0 < sum(point.prefills == 0 for point in first) < 30


def test_the_choice_begins_at_the_extremes_and_never_asks_twice() -> None:
    points = candidates(SMALL, np.random.default_rng(0))[::5]
    choice = Choice(points)
    asked = []
    while (point := choice.next()) is not None:
        asked.append(point)
        _, decodes, context, prefills, attention = point.features
        choice.learn(point, TRUTH.mean_s(decodes, context, prefills, point.prefills * point.chunk, attention))
    assert sorted(asked) == sorted(points)
    tokens = [point.features[0] for point in asked]
    assert tokens[0] <= max(tokens) / 2, "what may take long comes when there is an idea how long"
    early = asked[:48]
    for feature in range(5):
        most = max(point.features[feature] for point in points)
        assert max(point.features[feature] for point in early) >= 0.8 * most


def test_an_engine_without_room_for_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        Choice([])


def test_the_sweep_finds_the_step_time_of_a_device_within_its_bounds() -> None:
    samples = swept(H200, 30.0)
    assert samples.ended == "time"
    model = fit_samples(samples, H200, {})
    judged = errors(model, samples.iterations("interval_s", "judge"))
    assert judged["decode_only"]["median_error"] < 0.01
    assert judged["mixed"]["median_error"] < 0.02
    assert judged["all"]["r2"] > 0.99


def test_repetitions_follow_back_to_back_with_the_engines_depth() -> None:
    runner = Modelled(H200.depth)
    samples = Sweep(runner, H200, runner.clock, seed=0).run(20.0)
    assert runner.most_in_flight == H200.depth == 2
    assert not runner.flight, "all results were taken"
    counts = np.unique([row["engine_id"] for row in samples.rows], return_counts=True)[1]
    assert FEW <= counts.min() < LEAST <= counts.max() <= MOST, "long batches a few times, others until it is enough"
    assert runner.launches >= sum(counts) + WARM_UP * len(samples.purposes)
    row = samples.rows[-1]
    assert row["device_s"] == pytest.approx(0.9 * row["interval_s"], rel=1e-6), "the stage's own time, not the interval"


def test_of_a_pipeline_the_model_is_of_the_slowest_stages_time() -> None:
    config = EngineConfig(pipeline_parallel=2, max_budget_tokens=1024, max_requests=32, kv_blocks=4096)
    samples = swept(config, 20.0)
    model = fit_samples(samples, config, {})
    assert model.description.provenance["seconds"] == "device_s"
    assert model.mean_s(16, 16_000, 0, 0, 0) == pytest.approx(0.9 * TRUTH.mean_s(16, 16_000, 0, 0, 0), rel=0.03)


class Jittery(Modelled):
    """Its launches take the host longer than the device takes; at times it is three times as slow for a while."""

    def launch(self, batch: Batch) -> "Modelled":
        super().launch(batch)
        self.now_ns += 30_000_000 * (3 if self.launches % 40 < 4 else 1)
        return self

    def result(self) -> StepResult:
        self.flight.popleft()
        return StepResult([0], 0.03, (StageTimes(0.03, 0.0, 1),))


def test_where_the_host_is_what_takes_long_no_interval_is_without_a_launch() -> None:
    runner = Jittery(H200.depth)
    samples = Sweep(runner, H200, runner.clock, seed=0).run(60.0)
    intervals_s = [row["interval_s"] for row in samples.rows]
    assert runner.launches > len(intervals_s)
    assert set(np.round(intervals_s, 3)) == {0.03, 0.09}


def test_every_batch_weighs_the_same_however_often_it_was_repeated() -> None:
    often = [Timing(1.0, 1.0)] * 19 + [Timing(3.0, 3.0)]
    samples, maker = Samples(), BatchMaker(SMALL)
    samples.add(maker.make(Point(2, 30)), often, "fit")
    samples.add(maker.make(Point(0, 1, 1, 20, 0)), [Timing(1.0, 2.0), Timing(2.0, 4.0), Timing(3.0, 6.0)], "fit")
    iterations = samples.iterations("interval_s", "fit")
    assert iterations.seconds.tolist() == pytest.approx([1.0] * LEAST + [2.0, 2.8, 4.0, 5.2, 6.0])
    assert iterations.mixed.tolist() == [False] * LEAST + [True] * LEAST
    assert samples.iterations("device_s", "fit").seconds[LEAST:].tolist() == pytest.approx([1, 1.4, 2, 2.6, 3])


def test_an_interrupted_sweep_keeps_what_it_has() -> None:
    asked = iter(range(10**6))
    samples = swept(H200, 1e9, stop=lambda: next(asked) > 600)
    assert samples.ended == "interrupted"
    assert len(samples.purposes) > 20
    assert fit_samples(samples, H200, {}).description.provenance["ended"] == "interrupted"


def test_a_device_that_fails_ends_the_sweep_with_what_there_is() -> None:
    samples = swept(H200, 1e9, fails_after=800)
    assert samples.ended == "failed: out of memory"
    assert len(samples.purposes) > 20


def test_a_sweep_of_everything_ends_by_itself() -> None:
    tiny = EngineConfig(
        max_budget_tokens=32, max_requests=2, max_model_tokens=64, kv_blocks=64, budget_tokens=32, chunk_tokens=32
    )
    assert swept(tiny, 1e9).ended == "complete"


def test_the_verb_measures_the_engine_here_and_its_model_predicts_other_batches(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "profile.json"
    config = EngineConfig(
        max_budget_tokens=96, max_requests=4, max_model_tokens=256, kv_blocks=512, budget_tokens=96, chunk_tokens=96
    )
    about = {"model": "pacer-26m", "date": "2026-01-02"}
    assert run_profile(ModelSource(), config, out, time.monotonic_ns, 15.0, about) == 0
    samples = out.with_suffix(".samples.csv")
    provenance = json.loads(out.read_text())["provenance"]
    told = {name: provenance[name] for name in ("model", "date", "attention", "dtype", "seconds", "ended")}
    assert told == about | {"attention": "sdpa", "dtype": "float32", "seconds": "interval_s", "ended": "time"}
    assert provenance["samples_sha256"] == hashlib.sha256(samples.read_bytes()).hexdigest()
    assert provenance["versions"]["torch"]
    assert provenance["capacities"]["kv_blocks"] == 512
    assert len(load_iterations(samples, "device_s")) >= FEW * sum(provenance["batches"].values())
    assert sum(provenance["iterations"].values()) == LEAST * provenance["batches"]["fit"]
    model = StepTimeModel.load(out)
    assert model.mean_s(1, 64, 0, 0, 0) < model.mean_s(4, 256, 1, 92, 92 * 60)
    random = {name: figures for name, figures in model.description.held_out.items() if name.startswith("random_")}
    medians = [figures["median_error"] for figures in random.values() if "median_error" in figures]
    assert medians
    assert float(np.mean(medians)) < 0.5  # others may take half of a core away at any moment


def test_batches_by_size_are_alike_but_for_it() -> None:
    points = by_size(H200)
    assert [point.features[0] for point in points] == list(range(16, 2049, 16))
    assert {point._replace(chunk=0) for point in points} == {Point(8, 512, 1)}
    assert all(point.fits(SMALL) for point in by_size(SMALL))
    assert len(by_size(SMALL)) == 16
    assert by_size(EngineConfig(max_requests=1))[0].decodes == 0


def test_a_sweep_finds_what_single_sizes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = tuple((1 + 0.1 * np.random.default_rng(0).random(128)).tolist())
    mixed = msgspec.structs.replace(TRUTH.description.mixed, size_factors=factors)
    uneven = StepTimeModel(msgspec.structs.replace(TRUTH.description, mixed=mixed))
    monkeypatch.setattr(sys.modules[__name__], "TRUTH", uneven)
    samples = swept(H200, 120.0)
    assert samples.purposes.count("sizes") == 128
    assert samples.purposes[-1] != "sizes", "then it goes on with others"
    model = fit_samples(samples, H200, {})
    found = np.array(model.description.mixed.size_factors)
    assert np.median(np.abs(found / found.mean() / (np.array(factors) / np.mean(factors)) - 1)) < 0.01
    judged = errors(model, samples.iterations("interval_s", "judge"))
    assert judged["mixed"]["median_error"] < 0.02
    assert "size_factors" in model.text()


def test_a_sweep_too_short_for_all_sizes_times_the_smaller_ones() -> None:
    samples = swept(H200, 60.0)
    sizes = samples.iterations("interval_s", "sizes")
    tokens = np.unique(sizes.decode_tokens + sizes.prefill_tokens)
    assert tokens.tolist() == list(range(16, int(tokens.max()) + 1, 16))
    assert 512 < tokens.max() < 2048
    assert samples.purposes[-1] != "sizes", "it stays within the time that they had"
    assert swept(H200, 2.0).purposes.count("sizes") == 0
