"""Laws on a real engine that has more to do than it can: what each carries, whether it keeps the promise, and what the
simulator says of it.

    python -m benchmarks.laws_live [--device cuda --profile FILE] [--out FOLDER] [--quick]

Three workloads come faster than the engine can serve them, so that requests a second, from the first arrival to the
last token, are what a policy carries: its capacity if it keeps the promise. Static budgets, one of them the best that
the simulator finds on these very requests at the machine's speed under the law, stand beside it; a budget's run serves
for every promise. On a GPU with long prompts, the budget of those that keep the promise under which requests wait least
(by the same simulation) is served at 1 / 1.1 of the rate, too: a law that keeps to what defines a capacity
(`profiles.capacity`) at the whole rate, while this rival does not at the lower one, has on these requests 1.1 times the
capacity of any static budget at least. The simulator gets the requests as they arrived, the engine as its telemetry
describes it, the profile, and one number of each run, the speed of the machine in it (as in `benchmarks.fidelity`).

On a CPU the built-in model serves, lengths are a tenth, and the promise suits the machine; on a GPU it is Mistral-7B's
shape at 25, 40 and 100 ms. Without --profile the machine is measured first. Runs that the folder holds are not made
again. Each cell's folder has a report with pictures (`report.html`).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import DRAWS, simulate, speed
from benchmarks.gpu_fidelity import engine_of
from benchmarks.gpu_serving import serve_flags
from benchmarks.laws_verdicts import Entry, Goal, geometric_mean, report_goals
from benchmarks.live_plan import (
    AHEAD,
    OVERLOAD,
    PLACES,
    PRESETS,
    Cell,
    Place,
    Served,
    cells_of,
    rate_of,
    throughput,
    with_statics,
)
from benchmarks.live_runs import read_live, served, start
from engine.config import EngineConfig
from envs.simulator import Plant
from envs.step_time import StepTimeModel
from profiles.capacity import MAX_DELAY_S, Interval
from profiles.compare import present
from profiles.live_engine import live_engine
from profiles.results import Comparison, Run, histogram
from profiles.tune_flags import Capacities

AS_SIMULATED = 0.05


class Verdict(NamedTuple):
    """A policy on a cell, an entry for each seed: requests a second, until the last token, and P99 TBT over the
    promise, live and simulated; median scheduling delay; and requests a second until the last one's first token, for
    one late request with a long output can be all that a run waits for.
    """

    live: list[float]
    simulated: list[float]
    tbt: list[float]
    simulated_tbt: list[float]
    delay_s: list[float]
    begun: list[float]

    @property
    def error(self) -> float:
        return geometric_mean(self.simulated) / geometric_mean(self.live) - 1

    @property
    def within(self) -> list[bool]:
        """Whether each run's rate is within capacity."""
        return [tbt <= 1 and delay_s <= MAX_DELAY_S for tbt, delay_s in zip(self.tbt, self.delay_s, strict=True)]

    @property
    def beyond(self) -> list[bool]:
        """Whether it is beyond; a delay that is not known does not say so."""
        return [tbt > 1 or delay_s > MAX_DELAY_S for tbt, delay_s in zip(self.tbt, self.delay_s, strict=True)]


def main() -> None:
    args = arguments()
    place, console = PLACES[args.device], Console(width=150)
    place = place if args.budgets is None else place._replace(budgets=tuple(args.budgets))
    args.out.mkdir(parents=True, exist_ok=True)
    profile = args.profile or measured(args)
    model = StepTimeModel.load(profile)
    plant = Plant(EngineConfig(**msgspec.structs.asdict(Capacities.of(profile))), model)
    cells = list(cells_of(args, place, plant))
    serve_missing(args, cells, place, profile)
    cells = [with_statics(args.out, cell, place, plant) for cell in cells]
    serve_missing(args, cells, place, profile)
    for cell in cells:
        present_runs(args, cell, place)
    verdicts = [judge(args.out, cell, place, model) for cell in cells]
    for cell, found in zip(cells, verdicts, strict=True):
        console.print(table_of(cell, found))
    report_goals(
        console, f"goals that {' and '.join(args.policies)} met live", args, goals_of(cells, verdicts), cells=len(cells)
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--profile", type=Path, help="step-time model of this machine, from pacer profile")
    add("--attention", default="auto", help="backend")
    add("--policies", nargs="+", default=["predictive"], metavar="LAW")
    add("--workloads", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS))
    add("--slos-ms", type=int, nargs="+", help="instead of the machine's")
    add("--budgets", type=int, nargs="*", help="static ones beside the oracle, instead of the machine's")
    add("--seeds", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("pacer-out/laws-live"))
    add("--quick", action="store_true", help="one seed, half as many requests")
    args = parser.parse_args()
    args.seeds, args.traces = 1 if args.quick else args.seeds, None
    return args


def measured(args: argparse.Namespace) -> Path:
    """The profile that `pacer profile` makes of this engine. Raises ChildProcessError if it fails."""
    path: Path = args.out / "profile.json"
    if not path.exists():
        process = start("profile", *serve_flags(args, PLACES[args.device].longest), "--out", str(path))
        process.join()
        if process.exitcode:
            raise ChildProcessError(f"pacer profile ended with exit status {process.exitcode}")
    return path


def serve_missing(args: argparse.Namespace, cells: Sequence[Cell], place: Place, profile: Path) -> None:
    """Make the runs that the folder does not hold."""
    wanted = {cell.run_folder(args.out, run): (cell, run) for cell in cells for run in cell.runs(place)}
    missing = {folder: run for folder, run in wanted.items() if not served(folder)}
    if not missing:
        return
    with live_engine(start, "laws-live", args.seed, *serve_flags(args, place.longest)) as engine:
        for folder, (cell, run) in missing.items():
            slo, flags = (cell.slo, ["--profile", str(profile)]) if run.policy in cell.laws else (None, [])
            engine.replay_under(run.policy, slo, cell.requests_of(run), folder, *flags)


def present_runs(args: argparse.Namespace, cell: Cell, place: Place) -> None:
    """Write the report of a cell's runs."""
    runs = [run_of(args.out, cell, run) for run in cell.runs(place) if run.pace == 1.0]
    statics = sorted({run.policy for run in runs} - set(cell.laws))
    title = f"{cell.workload}, live, {OVERLOAD} times capacity"
    made_by = {"command": "python -m benchmarks.laws_live", "seed": args.seed, "device": args.device}
    found = Comparison(title, str(cell.slo), [*cell.laws, *statics], statics, [rate_of(cell)], {}, runs, made_by)
    present(found, cell.folder(args.out))


def run_of(out: Path, cell: Cell, run: Served) -> Run:
    folder = cell.run_folder(out, run)
    live, summary = read_live(folder, cell.slo), json.loads((folder / "bench.json").read_text())
    ttft_p50_s, ttft_p99_s = np.quantile(live.ttft_s, (0.5, 0.99)).tolist()
    tbt_p50_s, tbt_p99_s = np.quantile(live.tbt_s, (0.5, 0.99)).tolist()
    figures = {
        "ttft_p50_s": ttft_p50_s,
        "ttft_p99_s": ttft_p99_s,
        "tbt_p50_s": tbt_p50_s,
        "tbt_p99_s": tbt_p99_s,
        "goodput": live.goodput,
        "throughput": summary["output_throughput"],
        "finished": summary["completed"] / summary["num_prompts"],
        "tokens_in_slo": cell.slo.share_of_tokens(live.tbt_s),
    }
    return Run(run.policy, run.seed, rate_of(cell), figures, histogram(live.tbt_s), histogram(live.ttft_s))


def judge(out: Path, cell: Cell, place: Place, model: StepTimeModel) -> dict[str, Verdict]:
    """By the runs' names."""
    found: dict[str, Verdict] = {}
    for run in cell.runs(place):
        verdict = found.setdefault(run.name, Verdict([], [], [], [], [], []))
        judge_run(cell, run, cell.run_folder(out, run), model, verdict)
    return found


def judge_run(cell: Cell, run: Served, folder: Path, model: StepTimeModel, verdict: Verdict) -> None:
    """Add its entries to the verdict."""
    bound_s, live = cell.slo.tbt_s or np.inf, read_live(folder, cell.slo)
    plant = Plant(engine_of(folder, live, EngineConfig().budget_tokens), model)
    speeds = np.array([speed(model, live.iterations)])
    draws = range(1000 * run.seed, 1000 * run.seed + DRAWS)
    outcomes = [simulate(plant, live.workload, run.policy, cell.slo, draw, speeds) for draw in draws]
    verdict.live.append(len(live.workload) / live.duration_s)
    verdict.simulated.append(geometric_mean(map(throughput, outcomes)))
    verdict.tbt.append(float(np.quantile(live.tbt_s, cell.slo.quantile)) / bound_s)
    tbt_s = np.concatenate([outcome.tbt_s for outcome in outcomes])
    verdict.simulated_tbt.append(float(np.quantile(tbt_s, cell.slo.quantile)) / bound_s)
    verdict.delay_s.append(float(np.median(live.delay_s)))
    verdict.begun.append(len(live.workload) / float((live.workload.arrival_s + live.ttft_s).max()))


def table_of(cell: Cell, found: dict[str, Verdict]) -> Table:
    table = Table(title=f"{cell.workload}, {cell.slo} ms, oracle {cell.oracle}: live / simulated at the runs' speeds")
    columns = ("policy", "req/s carried", "error", "P99 TBT of the promise", "promise kept", "median delay, s")
    for column in (*columns, "to first tokens, req/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, verdict in found.items():
        table.add_row(
            *(policy, f"{geometric_mean(verdict.live):.3f} / {geometric_mean(verdict.simulated):.3f}"),
            *(f"{verdict.error:+.1%}", f"{np.mean(verdict.tbt):.3f} / {np.mean(verdict.simulated_tbt):.3f}"),
            f"{sum(share <= 1 for share in verdict.tbt)} of {len(verdict.tbt)}",
            *(f"{np.mean(verdict.delay_s):.2f}", f"{geometric_mean(verdict.begun):.3f}"),
        )
    return table


def goals_of(cells: Sequence[Cell], verdicts: Sequence[dict[str, Verdict]]) -> list[Goal]:
    """Claims that a machine's noise may hide are judged by the upper end of their interval over the seeds."""
    goals = list[Goal]()
    judged = [(cell, found, law) for cell, found in zip(cells, verdicts, strict=True) for law in cell.laws]
    for cell, found, name in judged:
        entry, law, where = Entry(name), found[name], f"{cell.workload} {cell.slo_ms:g} ms"
        of_oracle = Interval.of([a / b for a, b in zip(law.live, found[cell.oracle].live, strict=True)])
        upper = of_oracle.mean + (0.0 if np.isnan(of_oracle.half_width) else of_oracle.half_width)
        goals += [
            Goal(entry, f"{where}: error of the simulator's requests a second", abs(law.error), at_most=AS_SIMULATED),
            Goal(entry, f"{where}: P99 TBT of the promise, mean of the seeds", float(np.mean(law.tbt)), at_most=1.0),
            Goal(
                entry,
                f"{where}: of the oracle static ({of_oracle.mean:.3f}), upper end of the interval",
                upper,
                0.99,
            ),
        ]
        if rival := found.get(Served(cell.rival, 0, 1.0 / AHEAD).name):
            ahead = np.logical_and(law.within, rival.beyond).mean()
            what = f"{where}: within capacity at {AHEAD} times a rate that no static is, share of the seeds"
            goals.append(Goal(entry, what, float(ahead), at_least=1.0))
    return goals


if __name__ == "__main__":
    main()
