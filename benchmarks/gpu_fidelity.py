"""How well the simulator foretells the served runs of `benchmarks.gpu_serving`, from a profile of the same GPU.

    python -m benchmarks.gpu_fidelity --serving FOLDER --profile FILE

FOLDER is what gpu_serving wrote, FILE what `pacer profile` wrote: batches timed one by one, no request among them. The
simulator gets the requests as they arrived, the engine's bounds and the budget; throughput, TTFT and TBT of ten draws
of the noise stand beside what telemetry told. No GPU is needed.

Mixed steps of one size took the longer, the busier an H200 was: 5 to 6 % longer than profiled at 16 req/s of
conversation, 9 to 15 % at 24; decode-only steps 2 % at most, since they wait for memory, whose clock does not fall. A
profile, whose batches pause between each other, cannot know how busy a run will keep the GPU. So each run has its
speeds, the ratios of its measured to its predicted step times: the first table leaves them out, the second gives the
simulator one number of each run, for all steps (as in `benchmarks.fidelity`), the third two, of decode-only and of
mixed steps; the goals are for the third. Steps are measured by the device's clock: the host stamps a decode-only step
late while it launches a mixed one that is no CUDA graph, whose interval then lacks what the other's has too much.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import THROUGHPUT_GOAL, Figures, pooled, speed
from benchmarks.live_runs import Live, read_live
from benchmarks.report import report
from engine.config import EngineConfig
from envs.iterations import Iterations
from envs.outcome import Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.step_time_error import predict
from profiles.iterations import read_iterations

GOAL = 0.15
DRAWS = 10
BLOCK_TOKENS = 16


def engine_of(folder: Path, live: Live, budget: int) -> EngineConfig:
    """The engine that served the run, as far as telemetry tells: its bounds, and whether it looked ahead."""
    messages = pq.read_table(sorted((folder / "journal").glob("part-*.parquet"))[0], columns=["telemetry"])
    telemetry: list[dict[str, Any]] = messages["telemetry"].to_pylist()
    bounds = telemetry[0]["bounds"]
    stages = [stage for message in telemetry for c in message["completed"] for stage in c["stages"]]
    return EngineConfig(
        budget_tokens=budget,
        chunk_tokens=budget,
        max_budget_tokens=bounds["max_budget_tokens"],
        min_budget_tokens=bounds["min_budget_tokens"],
        tile_tokens=bounds["tile_tokens"],
        max_requests=bounds["max_requests"],
        max_model_tokens=int((live.workload.prompt_tokens + live.workload.output_tokens).max()),
        block_tokens=BLOCK_TOKENS,
        kv_blocks=bounds["kv_tokens"] // BLOCK_TOKENS,
        look_ahead=max(stage["microbatches_in_flight"] for stage in stages) > 1,
    )


def simulate(live: Live, config: EngineConfig, model: StepTimeModel, draws: int) -> list[Outcome]:
    outcomes = []
    for seed in range(draws):
        simulation = Simulation(Plant(config, model), live.workload, seed)
        simulation.run_static(config.budget_tokens, config.chunk_tokens)
        outcomes.append(simulation.outcome())
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serving", type=Path, required=True, help="the folder of benchmarks.gpu_serving")
    parser.add_argument("--profile", type=Path, required=True, help="step-time model of the same GPU and model")
    parser.add_argument("--quick", action="store_true", help="two draws")
    args = parser.parse_args()
    model, draws = StepTimeModel.load(args.profile), 2 if args.quick else DRAWS
    paths = sorted(args.serving.glob("pacer/*-*/bench.json"))
    folders = [path.parent for path in paths if path.parent.name != "warm-up"]
    lives = {folder: read_live(folder, Slo(tbt_s=1.0)) for folder in folders}
    timed = {folder: Iterations.from_table(read_iterations(folder / "journal"), "device_s") for folder in folders}
    known = {
        "as profiled": dict.fromkeys(folders, (1.0, 1.0)),
        "at each run's speed": {folder: (speed(model, steps),) * 2 for folder, steps in timed.items()},
        "at each run's speeds of decode-only and mixed steps": {
            folder: speeds(model, steps) for folder, steps in timed.items()
        },
    }
    shares = {}
    for title, factors in known.items():
        foretold = {}
        for folder, live in lives.items():
            config = engine_of(folder, live, budget=int(folder.name.rpartition("-")[2]))
            foretold[folder] = pooled(simulate(live, config, model.at_speeds(*factors[folder]), draws))
        told = {folder: pooled([live]) for folder, live in lives.items()}
        shares[title] = show(title, told, foretold, factors)
    blind, one_speed, informed = shares.values()
    worst = max(informed, default=float("nan"))
    report(
        "largest error of the simulator on the served runs, as a share of its goal",
        worst,
        f"<= 1 (throughput {THROUGHPUT_GOAL:.0%}, latencies {GOAL:.0%})",
        ok=bool(worst <= 1),
        seed=0,
        runs=len(folders),
        figures_within_goal=f"{sum(share <= 1 for share in informed)} of {len(informed)}",
        with_one_speed_within_goal=f"{sum(share <= 1 for share in one_speed)} of {len(one_speed)}",
        without_speeds=max(blind, default=float("nan")),
        without_speeds_within_goal=f"{sum(share <= 1 for share in blind)} of {len(blind)}",
    )


def speeds(model: StepTimeModel, iterations: Iterations) -> tuple[float, float]:
    """How much longer a run's decode-only and its mixed iterations took than predicted; 1 where it has none."""
    known, mixed = ~np.isnan(iterations.seconds), iterations.prefill_tokens > 0
    predicted_s = predict(model, iterations)
    decode_only, other = (
        float(iterations.seconds[rows].sum() / predicted_s[rows].sum()) if rows.any() else 1.0
        for rows in (known & ~mixed, known & mixed)
    )
    return decode_only, other


def show(
    title: str, told: dict[Path, Figures], foretold: dict[Path, Figures], factors: dict[Path, tuple[float, float]]
) -> list[float]:
    """Print the runs; returns the errors of all their figures as shares of their goals."""
    table = Table(title=f"live, simulated and error, {title}")
    for head in ("run", "speeds", "req/s", "mean TTFT (s)", "P99 TTFT (s)", "P99 TBT (ms)"):
        table.add_column(head, justify="right", no_wrap=True)
    goals, units = (THROUGHPUT_GOAL, GOAL, GOAL, GOAL), (1.0, 1.0, 1.0, 1e3)
    shares: list[float] = []
    for folder, measured in told.items():
        errors = [s / m - 1 for s, m in zip(foretold[folder], measured, strict=True)]
        shares += [abs(error) / goal for error, goal in zip(errors, goals, strict=True)]
        figures = zip(measured, foretold[folder], errors, units, strict=True)
        cells = [f"{m * unit:.3f} {s * unit:.3f} {e:+.1%}" for m, s, e, unit in figures]
        table.add_row(folder.name, "{:.3f} {:.3f}".format(*factors[folder]), *cells)
    Console(width=150).print(table)
    return shares


if __name__ == "__main__":
    main()
