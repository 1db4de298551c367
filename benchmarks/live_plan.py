"""What `benchmarks.laws_live` serves: workloads under promises, and the static budget that is best there.

It is kept in a file beside the runs, so that those made before are of the same plan.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fidelity import simulate, speed
from benchmarks.law_cells import CONVERSATION, LONG_PROMPTS
from benchmarks.laws_verdicts import geometric_mean
from benchmarks.live_runs import read_live
from envs.outcome import Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo, within
from envs.trace import Workload, make_workload

OVERLOAD = 1.3  # times what the predictive law carries of a backlog under the loosest promise, by simulation
BACKLOG = 600  # requests
LADDER = 1.06
AHEAD = (
    1.10  # on long prompts a law is to meet what defines a capacity at so many times a rate at which the oracle fails
)
CODE = "azure code"
PLAN = "plan.json"


Worth = Callable[[Sequence[Outcome]], float]
"""Of the runs of one budget, one for each seed."""


class Place(NamedTuple):
    """What the machine is given to do: lengths by workload, promises (none: one that suits it), static budgets.

    `slower`: workloads where a law's rival is served at 1 / `AHEAD` of the rate.
    """

    lengths: dict[str, str]
    slos_ms: tuple[int, ...]
    budgets: tuple[int, ...]
    longest: int
    run_s: float
    least_requests: int
    slower: tuple[str, ...] = ()


PRESETS = {CONVERSATION: "conversation", LONG_PROMPTS: "long-prompts", CODE: "code"}
PLACES = {
    "cpu": Place({n: f"scaled:0.1,0.1:{p}" for n, p in PRESETS.items()}, (), (64, 512), 2048, 25.0, 40),
    "cuda": Place(PRESETS, (25, 40, 100), (512, 1024, 2048, 8192), 32_768, 18.0, 30, (LONG_PROMPTS,)),
}


class Served(NamedTuple):
    """A run: a policy on the requests of a seed, which come at `pace` times the cell's rate."""

    policy: str
    seed: int
    pace: float = 1.0

    @property
    def name(self) -> str:
        return self.policy if self.pace == 1.0 else f"{self.policy} at 1/{1.0 / self.pace:g}"

    @property
    def folder(self) -> str:
        slower = "" if self.pace == 1.0 else f"-slower-{1.0 / self.pace:g}"
        return f"{self.policy.replace(':', '-')}-{self.seed}{slower}"


class Cell(NamedTuple):
    """A workload under a promise, the laws, the requests of each seed; and, once they are known, of the static budgets
    that keep the promise the one that carries most, and the rival, under which requests wait least at the lower rate.
    """

    workload: str
    slo: Slo
    laws: Sequence[str]
    requests: list[Workload]
    oracle: str = ""
    rival: str = ""

    @property
    def slo_ms(self) -> float:
        return round(1e3 * (self.slo.tbt_s or 0), 6)

    def folder(self, out: Path) -> Path:
        return out / f"{self.workload.replace(' ', '-')}-{self.slo_ms:.0f}"

    def run_folder(self, out: Path, run: Served) -> Path:
        """A static budget knows no promise: its run stands in all cells of the workload."""
        folder = self.folder(out) if run.policy in self.laws else out / self.workload.replace(" ", "-")
        return folder / run.folder

    def requests_of(self, run: Served) -> Workload:
        drawn = self.requests[run.seed]
        return Workload(drawn.arrival_s / run.pace, drawn.prompt_tokens, drawn.output_tokens)

    def runs(self, place: Place) -> Iterator[Served]:
        """The laws and the oracle on all seeds, other budgets on the first; of laws alone before."""
        seeds = range(len(self.requests))
        yield from starmap(Served, product(self.laws, seeds))
        if not self.oracle:
            return
        yield from starmap(Served, product([self.oracle], seeds))
        if self.workload in place.slower:
            yield from starmap(Served, product([self.rival], seeds, [1.0 / AHEAD]))
        yield from starmap(Served, product([p for p in map(static, place.budgets) if p != self.oracle], seeds[:1]))


def static(budget: int) -> str:
    return f"static:budget={budget}"


def cells_of(args: argparse.Namespace, place: Place, plant: Plant) -> Iterator[Cell]:
    """What does not depend on a run: kept in a file, so that runs made before are of the same cells.

    A workload's requests are the same under all its promises.
    """
    model, known = plant.step_time, planned(args.out)
    suitable_ms = round(1.5e3 * model.mean_s(6, 6 * 160, 2, 122, 122 * 100))
    slos = [Slo(tbt_s=slo_ms / 1e3) for slo_ms in args.slos_ms or place.slos_ms or (suitable_ms,)]
    loosest = max(slos, key=lambda slo: slo.tbt_s or 0.0)
    for name in args.workloads:

        def requests(rate: float, n: int, seed: int, name: str = name) -> Workload:
            rng = np.random.default_rng(seed)
            return make_workload(f"poisson:{rate}", place.lengths[name], rng, n, place.longest)

        if name not in known:
            backlog = requests(BACKLOG, BACKLOG, args.seed)
            capacity = throughput(simulate(plant, backlog, "predictive", loosest, args.seed, np.ones(1)))
            n = max(round(capacity * place.run_s * (0.5 if args.quick else 1.0)), place.least_requests)
            known[name] = {"rate": OVERLOAD * capacity, "n": n, "oracles": {}, "rivals": {}}
            (args.out / PLAN).write_text(json.dumps(known, indent=1))
        load = known[name]
        drawn = [requests(load["rate"], load["n"], seed) for seed in range(args.seed, args.seed + args.seeds)]
        for slo in slos:
            oracle, rival = (load.get(which, {}).get(str(slo), "") for which in ("oracles", "rivals"))
            yield Cell(name, slo, args.policies, drawn, oracle, rival)


def planned(out: Path) -> dict[str, dict[str, Any]]:
    """By workload: the rate, the number of requests, and by promise the oracle static and the rival."""
    return json.loads((out / PLAN).read_text()) if (out / PLAN).exists() else {}


def with_statics(out: Path, cell: Cell, place: Place, plant: Plant) -> Cell:
    """The cell with the static budgets that are best at the machine's speed in the runs of its first law."""
    rivals = cell.workload in place.slower
    if cell.oracle and (cell.rival or not rivals):
        return cell
    runs = [cell.run_folder(out, Served(cell.laws[0], seed)) for seed in range(len(cell.requests))]
    slowdown = geometric_mean(speed(plant.step_time, read_live(folder, cell.slo).iterations) for folder in runs)
    cell = cell._replace(oracle=cell.oracle or best_static(plant, cell.requests, cell.slo, slowdown, carried))
    if rivals:
        slower = [cell.requests_of(Served("", seed, 1.0 / AHEAD)) for seed in range(len(cell.requests))]
        cell = cell._replace(rival=cell.rival or best_static(plant, slower, cell.slo, slowdown, promptness))
    known = planned(out)
    known[cell.workload]["oracles"][str(cell.slo)] = cell.oracle
    known[cell.workload].setdefault("rivals", {})[str(cell.slo)] = cell.rival
    (out / PLAN).write_text(json.dumps(known, indent=1))
    return cell


def best_static(plant: Plant, drawn: Sequence[Workload], slo: Slo, slowdown: float, worth: Worth) -> str:
    """The static budget of a ladder that is worth most while it keeps the promise, by simulation."""
    tile, most = plant.config.tile_tokens, plant.config.max_budget_tokens
    least = -(-plant.config.min_budget_tokens // tile) * tile
    rungs = np.arange(np.log(most / least) / np.log(LADDER) + 1)
    found = {}
    for budget in sorted({min(int(least * LADDER**k) // tile * tile, most) for k in rungs}):
        simulations = [Simulation(plant, workload, seed) for seed, workload in enumerate(drawn)]
        for simulation in simulations:
            simulation.slowdown = slowdown
            simulation.run_static(budget, budget)
        outcomes = [simulation.outcome() for simulation in simulations]
        if all(within(outcome.tbt_s, slo.tbt_s or np.inf, slo.quantile) for outcome in outcomes):
            found[budget] = worth(outcomes)
    return static(max(found, key=lambda budget: found[budget]) if found else least)


def carried(outcomes: Sequence[Outcome]) -> float:
    """Requests a second."""
    return geometric_mean(map(throughput, outcomes))


def promptness(outcomes: Sequence[Outcome]) -> float:
    """The less requests wait to be scheduled, the higher."""
    return -float(np.mean([np.median(outcome.scheduling_delay_s) for outcome in outcomes]))


def throughput(outcome: Outcome) -> float:
    return len(outcome.workload) / outcome.duration_s


def rate_of(cell: Cell) -> float:
    """Requests a second that arrive."""
    return float(len(cell.requests[0]) / cell.requests[0].arrival_s[-1])
