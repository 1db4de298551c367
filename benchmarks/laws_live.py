"""Laws on a real engine that has more to do than it can: what each carries, whether it keeps the promise, and what the
simulator says of it.

    python -m benchmarks.laws_live [--device cuda --profile FILE] [--out FOLDER] [--quick]

Three workloads come faster than the engine can serve them, so that requests a second, from the first arrival to the
last token, are what a policy carries: its capacity if it keeps the promise. Static budgets, one of them the best that
the simulator finds on these very requests, stand beside the law. The simulator gets the requests as they arrived, the
engine as its telemetry describes it, the profile, and one number of each run, the speed of the machine in it (as in
`benchmarks.fidelity`).

On a CPU the built-in model serves, lengths are a tenth, and the promise suits the machine; on a GPU it is Mistral-7B's
shape at 25, 40 and 100 ms. Without --profile the machine is measured first. Runs that the folder holds are not made
again. Each cell's folder has a report with pictures (`report.html`).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import DRAWS, simulate, speed
from benchmarks.gpu_fidelity import engine_of
from benchmarks.gpu_serving import serve_flags
from benchmarks.law_cells import CONVERSATION, LONG_PROMPTS
from benchmarks.laws_verdicts import Entry, Goal, geometric_mean, report_goals
from benchmarks.live_runs import read_live, start
from engine.config import EngineConfig
from envs.outcome import Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo, within
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload
from profiles.capacity import Interval, Trial
from profiles.compare import present
from profiles.compare_live import run_of
from profiles.live_engine import live_engine
from profiles.results import Comparison, Run
from profiles.tune_flags import Capacities

OVERLOAD = 1.3  # times the capacity that the simulator finds, with the predictive law
AS_SIMULATED = 0.05
LADDER = 1.06
CODE = "azure code"


class Place(NamedTuple):
    """What the machine is given to do: lengths by workload, promises (none: one that suits it), static budgets."""

    lengths: dict[str, str]
    slos_ms: tuple[int, ...]
    budgets: tuple[int, ...]
    longest: int
    run_s: float
    least_requests: int


PRESETS = {CONVERSATION: "conversation", LONG_PROMPTS: "long-prompts", CODE: "code"}
PLACES = {
    "cpu": Place({n: f"scaled:0.1,0.1:{p}" for n, p in PRESETS.items()}, (), (64, 512), 2048, 25.0, 40),
    "cuda": Place(PRESETS, (25, 40, 100), (512, 1024, 2048, 8192), 32_768, 15.0, 30),
}


class Cell(NamedTuple):
    """A workload under a promise, the laws, the best static budget there, and the requests of each seed."""

    workload: str
    slo: Slo
    laws: Sequence[str]
    oracle: str
    requests: list[Workload]

    def folder(self, out: Path) -> Path:
        return out / f"{self.workload.replace(' ', '-')}-{1e3 * (self.slo.tbt_s or 0):.0f}"

    def runs(self, place: Place) -> Iterator[tuple[str, int]]:
        """(policy, seed): the laws and the oracle on all seeds, other budgets on the first."""
        seeds = range(len(self.requests))
        yield from product((*self.laws, self.oracle), seeds)
        yield from product([p for p in map(static, place.budgets) if p != self.oracle], seeds[:1])


class Verdict(NamedTuple):
    """A policy on a cell, an entry for each seed: requests a second, live and simulated; P99 TBT over the promise."""

    live: list[float]
    simulated: list[float]
    tbt: list[float]
    simulated_tbt: list[float]

    @property
    def error(self) -> float:
        return geometric_mean(self.simulated) / geometric_mean(self.live) - 1


def static(budget: int) -> str:
    return f"static:budget={budget}"


def main() -> None:
    args = arguments()
    place, console = PLACES[args.device], Console(width=150)
    place = place if args.budgets is None else place._replace(budgets=tuple(args.budgets))
    args.out.mkdir(parents=True, exist_ok=True)
    profile = args.profile or measured(args)
    model = StepTimeModel.load(profile)
    cells = list(cells_of(args, place, Plant(EngineConfig(**msgspec.structs.asdict(Capacities.of(profile))), model)))
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


def cells_of(args: argparse.Namespace, place: Place, plant: Plant) -> Iterator[Cell]:
    """What does not depend on a run: kept in a file, so that runs made before are of the same cells."""
    model, plan = plant.step_time, args.out / "plan.json"
    known: dict[str, dict[str, Any]] = json.loads(plan.read_text()) if plan.exists() else {}
    suitable_ms = round(1.5e3 * model.mean_s(6, 6 * 160, 2, 122, 122 * 100))
    for name, slo_ms in product(args.workloads, args.slos_ms or place.slos_ms or (suitable_ms,)):
        slo, key = Slo(tbt_s=slo_ms / 1e3), f"{name} {slo_ms}"

        def requests(rate: float, n: int, seed: int, name: str = name) -> Workload:
            rng = np.random.default_rng(seed)
            return make_workload(f"poisson:{rate}", place.lengths[name], rng, n, place.longest)

        if key not in known:
            capacity = Trial(plant, requests(1.0, 600, args.seed), slo, args.seed, "predictive").capacity()
            n = max(round(capacity * place.run_s * (0.5 if args.quick else 1.0)), place.least_requests)
            known[key] = {"rate": OVERLOAD * capacity, "n": n}
        load = known[key]
        drawn = [requests(load["rate"], load["n"], seed) for seed in range(args.seed, args.seed + args.seeds)]
        load.setdefault("oracle", oracle(plant, drawn, slo))
        plan.write_text(json.dumps(known, indent=1))
        yield Cell(name, slo, args.policies, load["oracle"], drawn)


def oracle(plant: Plant, drawn: Sequence[Workload], slo: Slo) -> str:
    """The static budget of a ladder that carries most while it keeps the promise, by simulation."""
    tile, most = plant.config.tile_tokens, plant.config.max_budget_tokens
    least = -(-plant.config.min_budget_tokens // tile) * tile
    rungs = np.arange(np.log(most / least) / np.log(LADDER) + 1)
    carried = {}
    for budget in sorted({min(int(least * LADDER**k) // tile * tile, most) for k in rungs}):
        simulations = [Simulation(plant, workload, seed) for seed, workload in enumerate(drawn)]
        for simulation in simulations:
            simulation.run_static(budget, budget)
        outcomes = [simulation.outcome() for simulation in simulations]
        if all(within(outcome.tbt_s, slo.tbt_s or np.inf, slo.quantile) for outcome in outcomes):
            carried[budget] = geometric_mean(map(throughput, outcomes))
    return static(max(carried, key=lambda budget: carried[budget]) if carried else least)


def throughput(outcome: Outcome) -> float:
    return len(outcome.workload) / outcome.duration_s


def serve_missing(args: argparse.Namespace, cells: Sequence[Cell], place: Place, profile: Path) -> None:
    """Make the runs that the folder does not hold."""
    runs = [(cell, *run) for cell in cells for run in cell.runs(place)]
    missing = [run for run in runs if not (run_folder(args.out, *run) / "run.json").exists()]
    if not missing:
        return
    with live_engine(start, "laws-live", args.seed, *serve_flags(args, place.longest)) as engine:
        for cell, policy, seed in missing:
            folder = run_folder(args.out, cell, policy, seed)
            flags = ["--profile", str(profile)] if policy in cell.laws else []
            summary = engine.replay_under(policy, cell.slo, cell.requests[seed], folder, *flags)
            run = run_of(summary, policy, rate_of(cell), seed)
            (folder / "run.json").write_bytes(msgspec.json.encode(run))


def present_runs(args: argparse.Namespace, cell: Cell, place: Place) -> None:
    """Write the report of a cell's runs."""
    paths = [run_folder(args.out, cell, *run) / "run.json" for run in cell.runs(place)]
    runs = [msgspec.json.decode(path.read_bytes(), type=Run) for path in paths]
    statics = sorted({run.policy for run in runs} - set(cell.laws))
    title = f"{cell.workload}, live, {OVERLOAD} times capacity"
    made_by = {"command": "python -m benchmarks.laws_live", "seed": args.seed, "device": args.device}
    found = Comparison(title, str(cell.slo), [*cell.laws, *statics], statics, [rate_of(cell)], {}, runs, made_by)
    present(found, cell.folder(args.out))


def rate_of(cell: Cell) -> float:
    """Requests a second that arrive."""
    return float(len(cell.requests[0]) / cell.requests[0].arrival_s[-1])


def run_folder(out: Path, cell: Cell, policy: str, seed: int) -> Path:
    return cell.folder(out) / f"{policy.replace(':', '-')}-{seed}"


def judge(out: Path, cell: Cell, place: Place, model: StepTimeModel) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    bound_s = cell.slo.tbt_s or np.inf
    for policy, seed in cell.runs(place):
        folder = run_folder(out, cell, policy, seed)
        live = read_live(folder, cell.slo)
        plant = Plant(engine_of(folder, live, EngineConfig().budget_tokens), model)
        speeds = np.array([speed(model, live.iterations)])
        draws = range(1000 * seed, 1000 * seed + DRAWS)
        outcomes = [simulate(plant, live.workload, policy, cell.slo, draw, speeds) for draw in draws]
        verdict = found.setdefault(policy, Verdict([], [], [], []))
        verdict.live.append(len(live.workload) / live.duration_s)
        verdict.simulated.append(geometric_mean(map(throughput, outcomes)))
        verdict.tbt.append(float(np.quantile(live.tbt_s, cell.slo.quantile)) / bound_s)
        tbt_s = np.concatenate([outcome.tbt_s for outcome in outcomes])
        verdict.simulated_tbt.append(float(np.quantile(tbt_s, cell.slo.quantile)) / bound_s)
    return found


def table_of(cell: Cell, found: dict[str, Verdict]) -> Table:
    table = Table(title=f"{cell.workload}, {cell.slo} ms, oracle {cell.oracle}: live / simulated at the runs' speeds")
    for column in ("policy", "req/s carried", "error", "P99 TBT of the promise", "promise kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, verdict in found.items():
        table.add_row(
            *(policy, f"{geometric_mean(verdict.live):.3f} / {geometric_mean(verdict.simulated):.3f}"),
            *(f"{verdict.error:+.1%}", f"{np.mean(verdict.tbt):.3f} / {np.mean(verdict.simulated_tbt):.3f}"),
            f"{sum(share <= 1 for share in verdict.tbt)} of {len(verdict.tbt)}",
        )
    return table


def goals_of(cells: Sequence[Cell], verdicts: Sequence[dict[str, Verdict]]) -> list[Goal]:
    """Claims that a machine's noise may hide are judged by the upper end of their interval over the seeds."""
    goals = list[Goal]()
    judged = [(cell, found, law) for cell, found in zip(cells, verdicts, strict=True) for law in cell.laws]
    for cell, found, name in judged:
        entry, law, where = Entry(name), found[name], f"{cell.workload} {1e3 * (cell.slo.tbt_s or 0):.0f} ms"
        of_oracle = Interval.of([a / b for a, b in zip(law.live, found[cell.oracle].live, strict=True)])
        upper = of_oracle.mean + (0.0 if np.isnan(of_oracle.half_width) else of_oracle.half_width)
        goals += [
            Goal(entry, f"{where}: error of the simulator's requests a second", abs(law.error), at_most=AS_SIMULATED),
            Goal(entry, f"{where}: P99 TBT of the promise, mean of the seeds", float(np.mean(law.tbt)), at_most=1.0),
            Goal(
                entry,
                f"{where}: of the oracle static ({of_oracle.mean:.3f}), upper end of the interval",
                upper,
                1.10 if cell.workload == LONG_PROMPTS else 0.99,
            ),
        ]
    return goals


if __name__ == "__main__":
    main()
