"""How fast the simulator is: iterations per second of one core with 64 requests running, and beside Vidur.

    python -m benchmarks.simulator_speed [--quick] [--vidur PYTHON]

PYTHON is an interpreter that has Vidur (PyPI `vidur` 0.0.26); without it only what its paper reports is printed: 35,565
runs of 16,000 requests in 12.5 hours of 96 cores, so 121 core-seconds each, on workloads and models of its own.

Every request (lengths of the sharegpt preset) is there at the start. The figure is taken from the 64th admission to the
last, while the queue is never empty, under fixed knobs and the step times of an H200. The laws are asked under Guard.

Beside Vidur whole runs are compared: the same requests, limits and rule (Sarathi's), so both should count the same
iterations. Vidur's step times come from made-up tables, as it ships none; batches do not depend on them here, nor does
what a batch costs to simulate (see `vidur_run`). Vidur's training and Pacer's compiling are left out. Times are CPU
seconds of one process, the best of several repetitions: another process on the machine disturbs them less than a clock.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import report
from engine.config import EngineConfig
from envs.outcome import Outcome
from envs.presets import PRESETS
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.state import LOG_COLUMNS
from envs.step_time import StepTimeModel
from envs.trace import Workload
from envs.workload import write_csv
from policies.catalogue import parse_law
from policies.guard import Guard

GOAL = 500_000
RUNNING = 64
BUDGET_TOKENS = 1024  # at 512 prompts wait for the budget, and two of the 64 seats stay empty
MAX_TOKENS = 8192  # prompt + output, as in the preset
BLOCK_TOKENS = 16
KV_BLOCKS = RUNNING * (MAX_TOKENS // BLOCK_TOKENS + 1)  # for all that can run: nothing is preempted
STEADY_REQUESTS = 1000
LAWS = (f"static:budget={BUDGET_TOKENS}", "pid", "predictive")
LAW_SLO, LAW_SIMULATED_S = Slo(tbt_s=0.04), 20.0
STEP_TIME = Path(__file__).parents[1] / "profiles" / "data" / "h200-mistral-7b.json"
VIDUR_REPORTED_REQUESTS, VIDUR_REPORTED_S = 16_000, 121.0
VIDUR_SETTINGS = {"vidur, as fast as it goes": ("--native",), "vidur, with its metrics": ("--metrics",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and requests, same measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vidur", metavar="PYTHON", help="an interpreter that has Vidur")
    args = parser.parse_args()
    config = EngineConfig(
        max_requests=RUNNING, max_model_tokens=MAX_TOKENS, block_tokens=BLOCK_TOKENS, kv_blocks=KV_BLOCKS
    )
    plant, console = Plant(config, StepTimeModel.load(STEP_TIME)), Console(width=110)
    compile_s = cpu_s(lambda: whole_run(plant, all_at_once(RUNNING, args.seed)))
    console.print(f"compiling, or loading what was compiled before: {compile_s:.2f} s")
    workload = all_at_once(STEADY_REQUESTS, args.seed)
    figure, running, mixed = steady_speed(plant, workload, 50 if args.quick else 300)
    console.print(f"fixed knobs: {figure:,.0f} iterations/s, {running:.1f} requests running, {mixed:.0%} mixed")
    laws = {law: round(law_speed(plant, law, workload, 2 if args.quick else 5)) for law in LAWS}
    for law, per_s in laws.items():
        console.print(f"{law} in the loop: {per_s:,} iterations/s")
    n_requests = 2000 if args.quick else VIDUR_REPORTED_REQUESTS
    beside = beside_vidur(plant, all_at_once(n_requests, args.seed), args.vidur, console)
    report(
        "simulated iterations per second of one core",
        figure,
        f">= {GOAL}",
        ok=figure >= GOAL,
        seed=args.seed,
        requests_running=running,
        mixed_share=mixed,
        laws_per_s=laws,
        **beside,
    )


def cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def all_at_once(n: int, seed: int) -> Workload:
    prompts, outputs = PRESETS["sharegpt"].sample(np.random.default_rng(seed), n).astype(np.int64)
    return Workload(np.zeros(n), prompts, outputs)


def whole_run(plant: Plant, workload: Workload, keep_log: bool = False) -> Outcome:
    simulation = Simulation(plant, workload, keep_log=keep_log)
    simulation.run_static(BUDGET_TOKENS, BUDGET_TOKENS)
    return simulation.outcome()


def steady_speed(plant: Plant, workload: Workload, repetitions: int) -> tuple[float, float, float]:
    """Iterations per second while the queue is not empty; the mean number running then, and the share of mixed ones."""
    outcome = whole_run(plant, workload, keep_log=True)
    first_s, last_s = outcome.first_scheduled_s, outcome.workload.arrival_s + outcome.e2el_s
    begin_s, end_s = float(np.sort(first_s)[RUNNING - 1]), float(first_s.max())
    present_s = np.clip(last_s, begin_s, end_s) - np.clip(first_s, begin_s, end_s)
    time_s, prefill_tokens = (outcome.log[:, LOG_COLUMNS.index(name)] for name in ("time_s", "prefill_tokens"))
    mixed = prefill_tokens[(time_s >= begin_s) & (time_s < end_s)] > 0
    best = 0.0
    for _ in range(repetitions):
        simulation = Simulation(plant, workload)
        simulation.run_static(BUDGET_TOKENS, BUDGET_TOKENS, until_s=begin_s)
        before, began = simulation.iteration, time.process_time()
        simulation.run_static(BUDGET_TOKENS, BUDGET_TOKENS, until_s=end_s)
        best = max(best, (simulation.iteration - before) / (time.process_time() - began))
    return best, float(present_s.sum()) / (end_s - begin_s), float(mixed.mean())


def law_speed(plant: Plant, spec: str, workload: Workload, repetitions: int) -> float:
    """Iterations per second under a law that is asked at each of them; the queue is not empty."""
    law, best = parse_law(spec, LAW_SLO, plant.step_time), 0.0
    for _ in range(repetitions):
        simulation, guard = Simulation(plant, workload), Guard(law)
        began = time.process_time()
        simulation.run_law(guard.decide, until_s=LAW_SIMULATED_S)
        best = max(best, simulation.iteration / (time.process_time() - began))
    return best


def beside_vidur(plant: Plant, workload: Workload, python: str | None, console: Console) -> dict[str, Any]:
    """Whole runs of the same requests; prints a table and returns its figures for the result line."""
    outcome = whole_run(plant, workload)
    seconds = min(cpu_s(lambda: whole_run(plant, workload)) for _ in range(5))
    table = Table(title=f"{len(workload):,} requests, at most {RUNNING} at a time, budget {BUDGET_TOKENS}, one core")
    for column in ("simulator", "CPU seconds a run", "iterations", "iterations/s", "times as slow"):
        table.add_column(column, justify="right" if table.columns else "left", no_wrap=True)
    table.add_row("pacer", f"{seconds:.3f}", f"{outcome.iterations:,}", f"{outcome.iterations / seconds:,.0f}", "1")
    figures: dict[str, Any] = {"requests": len(workload), "seconds_per_run": seconds, "iterations": outcome.iterations}
    ratios = {}
    for name, options in VIDUR_SETTINGS.items() if python else ():
        runs = [vidur_run(str(python), workload, options) for _ in range(3)]
        run = min(runs, key=lambda run: run["seconds"])
        ratios[name] = run["seconds"] / seconds
        per_s = run["iterations"] / run["seconds"]
        table.add_row(
            *(name, f"{run['seconds']:.3f}", f"{run['iterations']:,.0f}", f"{per_s:,.0f}", f"{ratios[name]:.0f}")
        )
        console.print(f"{name}: {run['training_seconds']:.1f} s of training not counted")
        same = run["iterations"] == outcome.iterations
        figures["same_iterations"] = same and figures.get("same_iterations", True)
    table.add_row(f"vidur, as reported ({VIDUR_REPORTED_REQUESTS:,} requests)", f"{VIDUR_REPORTED_S:.0f}", "", "", "")
    console.print(table)
    if ratios:
        fastest, with_metrics = ratios.values()
        figures |= {"vidur_times_as_slow": fastest, "vidur_with_metrics_times_as_slow": with_metrics}
    return figures | {"vidur_reported_core_s": VIDUR_REPORTED_S}


def vidur_run(python: str, workload: Workload, options: tuple[str, ...]) -> dict[str, float]:
    """What `vidur_run` prints last. Raises CalledProcessError if Vidur fails; its messages are on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.csv"
        write_csv(requests, workload)
        limits = {"running": RUNNING, "chunk-tokens": BUDGET_TOKENS, "max-tokens": MAX_TOKENS, "kv-blocks": KV_BLOCKS}
        command = [python, str(Path(__file__).with_name("vidur_run.py")), str(requests), *options]
        command += [f"--{name}={value}" for name, value in limits.items()]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
