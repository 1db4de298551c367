"""What the GPU benchmarks are made of, on the CPU: cells formed exactly, closed loops."""

import time

import numpy as np
import pytest

from benchmarks.gpu_fidelity import speeds
from benchmarks.gpu_steps import cells, floor_s
from benchmarks.our_steps import Ours
from benchmarks.pipeline_runs import ClosedLoop, Run, figures
from benchmarks.step_cells import Cell, Step, measure
from engine.config import EngineConfig, ModelSource
from engine.loader import load_runner
from envs.iterations import Iterations
from envs.step_time import StepTimeModel
from envs.trace import make_workload
from policies.catalogue import parse_law


@pytest.mark.parametrize("cell", [Cell(3, 40, steps=4), Cell(2, 20, 30, 0, steps=4), Cell(2, 20, 30, 90, steps=4)])
def test_the_engine_forms_a_cell_exactly(cell: Cell) -> None:
    config = EngineConfig(
        budget_tokens=8192,
        chunk_tokens=8192,
        max_budget_tokens=8192,
        max_requests=8,
        max_model_tokens=8192,
        kv_blocks=1024,
        look_ahead=True,
        knobs_ttl_s=3600.0,
    )
    runner, config = load_runner(ModelSource(), config, time.monotonic_ns)
    engine = Ours(runner, config)
    for _ in range(2):  # a cell leaves nothing behind
        figures = measure(engine, cell)
        assert {len(values) for values in figures.values()} == {cell.steps}
        assert min(figures["wall_s"]) > 0
        grown = np.array(figures["decode_context_tokens"]) / cell.decodes - cell.context
        assert grown.min() >= 0
        assert grown.max() < 60
        chunks = {cell.prefix, cell.prefix + cell.chunk} if cell.prefix else {0}
        assert set(figures["prefix"]) <= chunks
    runner.close()


def test_a_step_holds_a_cell_only_as_a_whole() -> None:
    cell = Cell(4, 64, 60, 240)
    step = Step(4, 300, (60,), (240,), 0.0, 0.0)
    assert cell.is_held_by(step)
    assert cell.is_held_by(step._replace(contexts=(300,)))
    for other in (
        step._replace(decodes=3),
        step._replace(chunks=(59,)),
        step._replace(chunks=(30, 30), contexts=(240, 240)),
        step._replace(contexts=(180,)),
        step._replace(contexts=(360,)),
    ):
        assert not cell.is_held_by(other)


def test_the_cells_are_those_of_the_comparison() -> None:
    chosen = cells(quick=False)
    assert {(c.decodes, c.context) for c in chosen if not c.chunk} >= {(n, 1024) for n in (1, 32, 64, 128, 256)}
    assert sorted({c.tokens for c in chosen if c.chunk}) == [512, 1024, 2048, 4096]
    assert all(c.prefix % c.chunk == 0 and 28_000 < c.prefix <= 32_768 for c in chosen if c.prefix)


def test_the_floor_is_the_weights_for_a_decode_and_the_arithmetic_for_a_chunk() -> None:
    decode = floor_s(Cell(1, 1024), {"decode_context_tokens": 1024, "prefix": 0})
    assert decode == pytest.approx(14.4e9 / 4.3e12, rel=0.03)
    chunk = floor_s(Cell(32, 1024, 4064), {"decode_context_tokens": 32 * 1024, "prefix": 0})
    attention = 4 * 32 * 4096 * 4064**2 / 2  # queries by keys, and weights by values, in 32 layers of 4096
    assert chunk == pytest.approx((2 * 6.98e9 * 4096 + attention) / 790e12, rel=0.01)


def looped(lengths: str, at_once: int, seconds: float) -> Run:
    """A closed loop on the real model, under one budget."""
    config = EngineConfig(max_requests=8, kv_blocks=512, knobs_ttl_s=3600.0)
    runner, config = load_runner(ModelSource(), config, time.monotonic_ns)
    workload = make_workload("poisson:1", lengths, np.random.default_rng(0), 5)
    loop = ClosedLoop(runner, config, parse_law("static:budget=64"), workload, at_once, time.monotonic_ns)
    run = loop.run(seconds, 30.0)
    runner.close()
    return run


def test_a_closed_loop_keeps_its_requests_at_once_and_counts_what_it_measures() -> None:
    run = looped("uniform:20-40,4-8", 4, 1.5)
    row = figures(run)
    assert run.duration_s == pytest.approx(1.5, abs=1.0)
    assert row["iterations"] == len(run.completions) > 0
    assert row["tokens"] >= sum(len(c.tbt_s) for c in run.completions)
    assert len(row["busy_s"]) == 1
    assert 0 <= row["bubble_share"] < 1


def test_a_closed_loop_goes_on_where_all_its_requests_end_in_one_iteration() -> None:
    run = looped("fixed:20,2", 2, 1.0)
    assert sum(len(completion.finished) for completion in run.completions) > 2


def test_a_run_that_measured_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no iteration ended in the 0.5 s"):
        figures(Run(0.5, [], 0))


def test_a_served_run_has_a_speed_of_each_kind_of_steps() -> None:
    """An iteration whose time is not known tells nothing."""
    model = StepTimeModel.from_formula((8.4e-3, 12e-6, 30e-9), (3e-3, 62e-6, 30e-9, 1.7e-9, 0.3e-3))
    batches = [(4, 4000, 0, 0, 0.0), (4, 4004, 1, 500, 1.25e5), (5, 4600, 1, 500, 1.25e5), (5, 4605, 0, 0, 0.0)]
    took = np.array([1.02, 1.15, 1.15, 1.02]) * [model.mean_s(*batch) for batch in batches]
    took[2] = np.nan
    columns = np.array(batches, float).T
    assert speeds(model, Iterations(took, *columns)) == pytest.approx((1.02, 1.15))
