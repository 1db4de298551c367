"""The tuner against an exhaustive grid of static budgets, and against random search: the fifteen cells of the design.

    python -m benchmarks.tuning_table [--traces FOLDER] [--out FOLDER] [--quick]

Settings of `benchmarks.capacity_table`; without --traces, this repository's presets stand in for the public workloads.
The exhaustive grid is a ladder of whole tiles, 3 % apart, each searched from its neighbour's capacity on; the tuner,
random search and an even grid get the range of the ladder. Cost is counted in runs: a seed's requests, simulated once
at one rate. What an interrupted call left in --out is not done again.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.capacity_table import DECODE_ONLY_S, MAX_PROMPT_TOKENS, MIXED_S, NOISE, REQUESTS, SLOS_MS, TABLE, draw
from benchmarks.report import report
from benchmarks.tasks import Done, Result
from engine.config import EngineConfig
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import Workload, make_workload
from profiles.capacity import rough_capacity
from profiles.parallel import worker_pool
from profiles.tune_baselines import Verdict
from profiles.tune_objective import TOLERANCE, Evaluation, Problem
from profiles.tune_space import Candidate
from profiles.tune_study import Progress
from profiles.tuner import Tuner

PRESETS = {
    "azure conv": "conversation",
    "mooncake conv": "long-prompts",
    "azure code": "code",
    "sharegpt 8k": "sharegpt",
    "arxiv": "arxiv",
}
LOWEST, HIGHEST, LADDER = 256, 8192, 1.03
TRIALS, RUNS = 30, 110  # a study ends by the one or by the other
NEAR_GOAL, COST_GOAL, RANDOM_GOAL = 0.02, 0.10, 13
LADDER_FILE = "ladder.jsonl"


class Cell(NamedTuple):
    """A workload under a TBT SLO: capacity at each budget of the ladder, its cost, and the searches."""

    workload: str
    slo_ms: int
    ladder: dict[int, float]
    ladder_runs: int
    verdict: Verdict

    @property
    def best_budget(self) -> int:
        return max(self.ladder, key=lambda budget: self.ladder[budget])

    def share(self, progress: Progress) -> float:
        """Of the ladder's best capacity."""
        return progress.best.capacity / self.ladder[self.best_budget] if progress.best else 0.0

    @property
    def cost(self) -> float:
        return self.verdict.tuned.runs / self.ladder_runs

    @property
    def no_worse_than_random(self) -> bool:
        """By more than the search for a capacity can tell."""
        return self.share(self.verdict.tuned) >= self.share(self.verdict.random) * (1 - TOLERANCE / 2)

    @property
    def ok(self) -> bool:
        return self.share(self.verdict.tuned) >= 1 - NEAR_GOAL and self.cost <= COST_GOAL


class Climb(NamedTuple):
    """One seed's requests up the ladder."""

    problem: Problem
    seed: int

    def key(self) -> str:
        return f"{self.problem.digest()} {self.seed} {LADDER}"

    def do(self) -> Result:
        """The capacity at each budget, and the runs in all."""
        near = rough_capacity(self.problem.plant, self.problem.workloads[self.seed])
        found: Result = {}
        runs = 0
        for budget in ladder():
            evaluation = Evaluation(self.problem, Candidate(f"static:budget={budget}", self.most))
            found[str(budget)] = evaluation.capacity(self.seed, near)
            near = found[str(budget)] or near
            runs += evaluation.runs
        return {**found, "runs": runs}

    @property
    def most(self) -> int:
        return self.problem.plant.config.max_requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder of the five public workloads")
    parser.add_argument("--out", type=Path, default=Path("pacer-out/tuning-table"), help="what was done is kept here")
    parser.add_argument("--quick", action="store_true", help="400 requests: capacities come out higher")
    parser.add_argument("--seed", type=int, default=0, help="the first one, and the search's own")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of the tuner; random search spends as many runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cells = measure(args)
    Console(width=150).print(table(cells))
    no_worse = sum(cell.no_worse_than_random for cell in cells)
    worst = min(cell.share(cell.verdict.tuned) for cell in cells)
    report(
        "tuned static's capacity as a share of the exhaustive grid's best, worst of the cells",
        worst,
        f">= {1 - NEAR_GOAL} at <= {COST_GOAL:.0%} of its cost, and no worse than random search in {RANDOM_GOAL} of 15",
        ok=all(cell.ok for cell in cells) and no_worse >= RANDOM_GOAL,
        seed=args.seed,
        seeds=args.seeds,
        cells=len(cells),
        cells_ok=sum(cell.ok for cell in cells),
        no_worse_than_random=no_worse,
        better_than_random=sum(cell.verdict.beaten is True for cell in cells),
        worst_cost=max(cell.cost for cell in cells),
        workloads="presets" if args.traces is None else "traces",
    )


def measure(args: argparse.Namespace) -> list[Cell]:
    seeds = range(args.seed, args.seed + args.seeds)
    n = 400 if args.quick else REQUESTS
    loads = {(name, seed): requests(args.traces, name, n, seed) for name in TABLE for seed in seeds}
    problems = {
        (name, slo_ms): Problem(PLANT, {seed: loads[name, seed] for seed in seeds}, Slo(tbt_s=slo_ms / 1e3))
        for name, slo_ms in product(TABLE, SLOS_MS)
    }
    console = Console(stderr=True)
    with worker_pool() as pool:
        url = f"sqlite:///{(args.out / 'study.db').resolve()}"
        tuner = Tuner(url, pool, args.seed, args.trials, lambda: math.inf, console, RUNS)
        verdicts = {}
        for cell, problem in problems.items():
            console.print(f"{cell[0]}, {cell[1]} ms")
            verdicts[cell] = tuner.static(problem, budget_only=True)
        done = Done(pool, args.out / LADDER_FILE)
        climbs = iter(done.do([Climb(problem, seed) for problem in problems.values() for seed in seeds], "ladder"))
    return [Cell(*cell, *summed([next(climbs) for _ in seeds]), verdicts[cell]) for cell in problems]


def summed(climbs: list[Result]) -> tuple[dict[int, float], int]:
    """Mean capacities over the climbs, and their cost."""
    means = {budget: float(np.mean([climb[str(budget)] for climb in climbs])) for budget in ladder()}
    return means, int(sum(climb["runs"] for climb in climbs))


def ladder() -> list[int]:
    """Whole tiles from `LOWEST` to `HIGHEST`, in steps of a tile or of 3 %, whichever is more."""
    return list(_ladder(PLANT.config.tile_tokens))


def _ladder(tile: int) -> Iterator[int]:
    budget = LOWEST
    while budget < HIGHEST:
        yield budget
        budget = max(budget + tile, round(budget * LADDER / tile) * tile)
    yield HIGHEST


def plant() -> Plant:
    step_time = StepTimeModel.from_formula(DECODE_ONLY_S, MIXED_S).with_noise(NOISE)
    config = EngineConfig(
        max_requests=256,
        min_budget_tokens=LOWEST,
        max_budget_tokens=HIGHEST,
        max_model_tokens=2**17,
        kv_blocks=880_000 // 16,
    )
    return Plant(config, step_time, reserve_output=True)


PLANT = plant()


def requests(traces: Path | None, name: str, n: int, seed: int) -> Workload:
    if traces is not None:
        return draw(traces / TABLE[name].file, n, seed)
    return make_workload("poisson:1", PRESETS[name], np.random.default_rng(seed), n, MAX_PROMPT_TOKENS)


def table(cells: list[Cell]) -> Table:
    """Capacities in req/s, means over the seeds; shares are of the exhaustive grid's best."""
    columns: tuple[Any, ...] = ("workload", "SLO ms", "grid best", "at", "runs", "tuned", "at", "share", "cost")
    columns += ("random", "share", "even grid", "guess", "ok", ">= random")
    out = Table(title="Tuned static against the exhaustive grid; random search and even grid at the tuner's cost")
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        v = cell.verdict
        assert v.tuned.best is not None
        out.add_row(
            *(cell.workload, str(cell.slo_ms), f"{cell.ladder[cell.best_budget]:.3f}", str(cell.best_budget)),
            *(str(cell.ladder_runs), f"{v.tuned.best.capacity:.3f}", v.tuned.best.policy.partition("=")[2]),
            *(f"{cell.share(v.tuned):.3f}", f"{cell.cost:.1%}"),
            *(f"{v.random.best.capacity:.3f}" if v.random.best else "-", f"{cell.share(v.random):.3f}"),
            *(f"{cell.share(v.grid):.3f}", f"{cell.share(Progress(1, 0, v.guess)):.3f}"),
            *("yes" if cell.ok else "NO", "yes" if cell.no_worse_than_random else "NO"),
        )
    return out


if __name__ == "__main__":
    main()
