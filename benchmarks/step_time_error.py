"""How well a step-time model fitted to the sweeps of a telemetry folder predicts the runs, which it has not seen.

The folder holds tables of iterations (`.csv.gz`, `.csv`, `.parquet`; the columns of `profiles/iterations.py`): the fit
sees the files whose names contain "sweep", and is judged on those that contain "run". For each file and regime the
first table gives errors row by row (every row with a known time, late time stamps included) and of the sums between
two trusted stamps (see envs/iterations.py). The second gives R2 of both. A late stamp moves time from one row to the
next, so no model gets R2 of rows near 1: that of a model fitted to the judged file itself is printed beside it.
`--out` keeps the model with these figures. What a call of the compiled mean takes is measured as well.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec
import numba
from rich.console import Console
from rich.table import Table

from benchmarks.report import report
from envs.iterations import FloatArray, Iterations, load_iterations
from envs.step_mean import mean_step_s
from envs.step_time import StepTimeModel
from envs.step_time_error import errors
from envs.step_time_fit import fit

MIXED_GOAL, DECODE_ONLY_GOAL, R2_GOAL, CALL_GOAL_NS = 0.05, 0.025, 0.96, 100.0
CALLS = 10_000
SUFFIXES = (".csv", ".csv.gz", ".parquet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--telemetry", type=Path, required=True, help="folder with *sweep* and *run* tables")
    parser.add_argument("--seconds", default="interval_s", choices=("interval_s", "device_s"), help="column to model")
    parser.add_argument("--out", type=Path, help="write the fitted model, with these figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer timed calls, same measurement")
    args = parser.parse_args()
    try:
        return judge(args.telemetry, args.seconds, args.out, 50 if args.quick else 500)
    except (ValueError, OSError) as error:
        print(f"step_time_error: {error}", file=sys.stderr)
        return 2


def judge(telemetry: Path, seconds: str, out: Path | None, loops: int) -> int:
    files = sorted(path for path in telemetry.iterdir() if path.name.endswith(SUFFIXES))
    recordings = {path.name: load_iterations(path, seconds) for path in files}
    sweeps = {name: recording for name, recording in recordings.items() if "sweep" in name}
    runs = {name: recording for name, recording in recordings.items() if "run" in name and name not in sweeps}
    if not sweeps or not runs:
        raise ValueError(f"{telemetry} needs tables with sweep and with run in their names")
    model = fit(Iterations.concatenate(list(sweeps.values())), list(sweeps))
    judged = errors(model, Iterations.concatenate(list(runs.values())))
    _print_tables(model, sweeps, runs, judged)
    call_ns = _call_ns(model, loops)
    if out:
        rounded = {
            f"runs_{name}": {key: round(figure, 5) for key, figure in figures.items()}
            for name, figures in judged.items()
        }
        held_out = model.description.held_out | rounded
        provenance = {**model.description.provenance, "judged_on": list(runs)}
        description = msgspec.structs.replace(model.description, held_out=held_out, provenance=provenance)
        StepTimeModel(description).save(out)
    mixed, decode_only = (judged.get(name, {}).get("median_error", math.nan) for name in ("mixed", "decode_only"))
    r2 = judged["all"]["r2_sums"]
    report(
        "step time of unseen runs, mixed iterations (median relative error)",
        mixed,
        f"<= {MIXED_GOAL}; decode-only <= {DECODE_ONLY_GOAL}, R2 of sums >= {R2_GOAL}, call < {CALL_GOAL_NS:.0f} ns",
        ok=mixed <= MIXED_GOAL and decode_only <= DECODE_ONLY_GOAL and r2 >= R2_GOAL and call_ns < CALL_GOAL_NS,
        seed=0,  # there is no randomness
        decode_only=decode_only,
        r2_sums=r2,
        r2_rows=judged["all"]["r2"],
        call_ns=call_ns,
    )
    return 0


def _print_tables(
    model: StepTimeModel,
    sweeps: dict[str, Iterations],
    runs: dict[str, Iterations],
    judged: dict[str, dict[str, float]],
) -> None:
    table = Table()
    for column in ("file", "regime", "rows", "median", "mean", "P90", "bias", "sums", "median", "mean", "P90", "bias"):
        table.add_column(column, justify="left" if column in ("file", "regime") else "right")
    for name, recording in (*sweeps.items(), *runs.items()):
        _add_rows(table, f"{name} (fitted to)" if name in sweeps else name, errors(model, recording))
        table.add_section()
    _add_rows(table, "all runs", judged)
    # Wide enough for every column: a table that a pipe cuts off is of no use.
    console = Console(width=max(Console().width, 190))
    console.print(table)
    summary = Table(*("file", "times unknown", "within range", "R2 of rows", "if fitted to them", "R2 of sums"))
    for name, recording in runs.items():
        figures = errors(model, recording)["all"]
        shown = (figures["unknown_times"], figures["covered"], figures["r2"], _own_r2(recording), figures["r2_sums"])
        summary.add_row(name, *(f"{figure:.4g}" for figure in shown))
    console.print(summary)


def _own_r2(recording: Iterations) -> float:
    """Of a model that was fitted to the recording itself; NaN if it is too short for that."""
    try:
        return errors(fit(recording), recording)["all"]["r2"]
    except ValueError:
        return math.nan


def _add_rows(table: Table, name: str, figures: dict[str, dict[str, float]]) -> None:
    kinds = ("median_error", "mean_error", "p90_error", "bias")
    for regime in ("decode_only", "mixed"):
        cells = []
        for prefix in ("", "sums_"):
            values = figures.get(regime, {})
            cells.append(f"{values.get(f'{prefix}count', 0):.0f}")
            cells += [f"{values.get(prefix + kind, float('nan')):.2%}" for kind in kinds]
        table.add_row(name, regime, *cells)


def _loop(coefficients: FloatArray, calls: int) -> float:
    total_s = 0.0
    for i in range(calls):
        total_s += mean_step_s(coefficients, i & 63, 1000 * (i & 63), 1 + (i & 1), i & 1023, float(i))
    return total_s


def _call_ns(model: StepTimeModel, loops: int) -> float:
    """Of the fastest loop, each short enough to fit between two turns of other processes."""
    loop = cast(Callable[[FloatArray, int], float], numba.njit(_loop))
    loop(model.coefficients, 1)
    took_s = []
    for _ in range(loops):
        start_s = time.perf_counter()
        loop(model.coefficients, CALLS)
        took_s.append(time.perf_counter() - start_s)
    return min(took_s) / CALLS * 1e9


if __name__ == "__main__":
    sys.exit(main())
