"""What the live benchmark of the laws makes of its runs; the runs themselves are too long for a test."""

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.law_cells import LONG_PROMPTS
from benchmarks.laws_live import Verdict, goals_of
from benchmarks.live_plan import OVERLOAD, PLACES, Cell, Served, best_static, carried, cells_of, promptness
from benchmarks.live_runs import read_live
from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import make_workload

MODEL = StepTimeModel.from_formula((8e-3, 1e-4, 1e-8), (8e-3, 2e-4, 1e-8, 2e-8, 1e-4))
PLANT = Plant(EngineConfig(), MODEL)
CELL = Cell(LONG_PROMPTS, Slo(tbt_s=0.1), ["predictive"], [], "static:budget=64", "static:budget=512")


@pytest.mark.parametrize("slowdown", [1.0, 1.3])
def test_the_oracle_keeps_the_promise_and_a_larger_budget_does_not(slowdown: float) -> None:
    slo = Slo(tbt_s=0.06)
    drawn = [make_workload("poisson:50", "uniform:100-900,10-60", np.random.default_rng(s), 60) for s in range(2)]
    found = int(best_static(PLANT, drawn, slo, slowdown, carried).rpartition("=")[2])

    def p99_s(budget: int) -> float:
        simulations = [Simulation(PLANT, workload, seed) for seed, workload in enumerate(drawn)]
        for simulation in simulations:
            simulation.slowdown = slowdown
            simulation.run_static(budget, budget)
        return max(float(np.quantile(simulation.outcome().tbt_s, 0.99)) for simulation in simulations)

    assert p99_s(found) <= 0.06 < p99_s(int(1.3 * found) // 16 * 16)


@pytest.mark.parametrize("kv_blocks", [4096, 70])
def test_the_scheduling_delay_is_read_from_a_journal(kv_blocks: int, tmp_path: Path) -> None:
    """Unless a request was preempted, whose prompt then begins again."""
    config = EngineConfig(kv_blocks=kv_blocks, max_requests=8, max_model_tokens=1100)
    drawn = make_workload("poisson:20", "uniform:100-900,10-60", np.random.default_rng(0), 40)
    simulation = Simulation(Plant(config, MODEL), drawn)
    rows = list[dict[str, Any]]()

    def decide(heard: Telemetry, now_ns: int) -> tuple[int, int, str]:
        rows.append({"telemetry": msgspec.to_builtins(heard)})
        return 256, 256, "fixed"

    simulation.run_law(decide)
    (tmp_path / "journal").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "journal" / "part-00000.parquet")
    live, outcome = read_live(tmp_path, Slo(tbt_s=0.1)), simulation.outcome()
    assert (outcome.preemptions > 0) == (kv_blocks == 70)
    if outcome.preemptions:
        assert np.isnan(live.delay_s).all()
    else:
        assert live.delay_s == pytest.approx(outcome.scheduling_delay_s, abs=1e-6)
        assert live.delay_s.max() > 0.1


def test_the_rival_lets_requests_wait_least() -> None:
    """Another budget than the one that carries most, by a hair."""
    drawn = [make_workload("poisson:4", "uniform:200-1800,10-30", np.random.default_rng(0), 60)]
    slo = Slo(tbt_s=0.3)
    budgets = [best_static(PLANT, drawn, slo, 1.0, worth) for worth in (carried, promptness)]
    waits_s = []
    for budget in budgets:
        simulation = Simulation(PLANT, drawn[0], 0)
        simulation.run_static(*[int(budget.rpartition("=")[2])] * 2)
        waits_s.append(float(np.median(simulation.outcome().scheduling_delay_s)))
        assert np.quantile(simulation.outcome().tbt_s, 0.99) <= 0.3
    assert waits_s[1] < 0.95 * waits_s[0]


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    args = argparse.Namespace(
        out=tmp_path,
        workloads=[LONG_PROMPTS],
        slos_ms=[60],
        seeds=2,
        seed=0,
        quick=True,
        device="cpu",
        policies=["predictive"],
    )
    (cell,) = cells_of(args, PLACES["cpu"], PLANT)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (load,) = plan.values()
    assert [len(workload) for workload in cell.requests] == [load["n"]] * 2
    assert len(cell.requests[0]) / cell.requests[0].arrival_s[-1] == pytest.approx(load["rate"], rel=0.4)
    assert load["rate"] > OVERLOAD * 0.1
    slower = Plant(EngineConfig(), MODEL.scaled(2.0))
    (again,) = cells_of(args, PLACES["cpu"], slower)
    assert (again.oracle, len(again.requests[0])) == (cell.oracle, load["n"]), "runs made before are of this plan"


def verdict(live: list[float], tbt: list[float], delay_s: float = 1.0, simulated: float = 1.0) -> Verdict:
    n = len(live)
    return Verdict(live, [simulated] * n, tbt, [1.0] * n, [delay_s] * n, live)


STEADY = [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("carried", "ok"), [([1.02, 0.97, 0.98], True), ([0.96, 0.97, 0.95], False)])
def test_the_oracle_is_to_be_reached_within_the_interval(carried: list[float], ok: bool) -> None:
    found = {"predictive": verdict(carried, [0.98, 1.0, 0.99]), CELL.oracle: verdict(STEADY, STEADY)}
    error, tbt, of_oracle = goals_of([CELL], [found])
    assert error.ok
    assert tbt.ok
    assert of_oracle.ok == ok


@pytest.mark.parametrize(
    ("tbt", "delay_s", "slower_tbt", "slower_delay_s", "ok"),
    [
        (0.98, 1.9, 0.7, 2.1, True),  # the rival's queue is too long at the lower rate
        (0.98, 1.9, 1.1, 0.1, True),  # or its tokens are late
        (0.98, 1.9, 0.7, 1.9, False),  # its capacity may be as high as that
        (0.98, 2.1, 0.7, 3.0, False),  # the law's own rate is beyond its capacity
        (1.01, 0.1, 0.7, 3.0, False),
        (0.98, 1.9, 0.7, np.nan, False),  # nobody knows
    ],
)
def test_on_long_prompts_a_law_is_to_have_a_tenth_more_capacity(
    tbt: float, delay_s: float, slower_tbt: float, slower_delay_s: float, ok: bool
) -> None:
    found = {
        "predictive": verdict(STEADY[:1], [tbt], delay_s),
        CELL.oracle: verdict(STEADY[:1], [1.0]),
        Served(CELL.rival, 0, 1 / 1.1).name: verdict(STEADY[:1], [slower_tbt], slower_delay_s),
    }
    ahead = goals_of([CELL], [found])[-1]
    assert "1.1 times" in ahead.what
    assert ahead.ok == ok


def test_the_rival_on_long_prompts_is_served_at_a_lower_rate_on_a_gpu(tmp_path: Path) -> None:
    drawn = make_workload("poisson:5", "uniform:100-900,10-60", np.random.default_rng(0), 20)
    cell = CELL._replace(requests=[drawn])
    runs = [*cell.runs(PLACES["cuda"])]
    (slower,) = (run for run in runs if run.pace < 1)
    assert slower.policy == cell.rival
    assert cell.requests_of(slower).arrival_s == pytest.approx(1.1 * drawn.arrival_s)
    assert len({cell.run_folder(tmp_path, run) for run in runs}) == len(runs)
    assert all(run.pace == 1 for run in cell.runs(PLACES["cpu"]))
    assert [run.policy for run in cell._replace(oracle="").runs(PLACES["cuda"])] == ["predictive"]


def test_a_simulator_that_is_off_by_a_tenth_is_told() -> None:
    found = {name: verdict(STEADY[:2], [1.2, 1.0], simulated=1.1) for name in ("predictive", CELL.oracle)}
    error, tbt, _ = goals_of([CELL], [found])
    assert error.figure == pytest.approx(0.1)
    assert tbt.figure == pytest.approx(1.1)
    assert not (error.ok or tbt.ok)
