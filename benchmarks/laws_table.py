"""Laws against static budgets and clairvoyance: capacity and TTFT, on fifteen steady cells and three that shift.

    python -m benchmarks.laws_table [--traces FOLDER] [--out FOLDER] [--policies LAW ...] [--dead-times 1 2] [--quick]
        [--profile FILE]

The oracle static of a cell is the best of a ladder of whole tiles, 6 % apart, for that cell alone; the best single
static is the one of the ladder with the highest geometric mean over all cells. Capacities are searched to 1 %, on the
same requests for all. The SLO counts as kept if P99 TBT is within it at 0.98 of the mean capacity, on a seed that was
not searched on. TTFT is taken at 0.9 of the oracle static's capacity. What an interrupted call left in --out is not
done again.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.law_cells import (
    CONVERSATION,
    LONG_PROMPTS,
    SHIFTING_CELLS,
    SHIFTING_SLO_MS,
    STEADY_CELLS,
    Cell,
    Setting,
    parser,
)
from benchmarks.law_tasks import Climb, Judge, Search
from benchmarks.laws_verdicts import Entry, Figures, Standing, cell_table, entries_of, goals_of, report_goals
from benchmarks.tasks import Done, Result
from engine.protocol import Bounds
from profiles.capacity import CLAIRVOYANT, Load, Trial
from profiles.parallel import worker_pool

LOWEST, LADDER = 64, 1.06
FIXED = (512, 2048, 8192)
TTFT_SHARE, KEPT_SHARE = 0.9, 0.98
CLIMB_FROM = 0.3  # of clairvoyance, where the smallest budget may be


class Contest(NamedTuple):
    """What is run: cells, laws with their dead times, seeds; `spare` is the seed that nothing is searched on."""

    setting: Setting
    cells: list[Cell]
    entries: list[Entry]
    seeds: range

    @property
    def spare(self) -> int:
        return self.seeds.stop


def main() -> None:
    args = arguments()
    contest = Contest(
        replace(Setting.of(args), profile=args.profile),
        [cell for cell in (*STEADY_CELLS, *SHIFTING_CELLS) if _chosen(cell, args)],
        entries_of(args.policies, args.dead_times),
        range(args.seed, args.seed + args.seeds),
    )
    if not contest.cells:
        raise SystemExit(f"no cell is of {args.workloads} at {args.slos_ms} ms: leave one of the flags out")
    with worker_pool() as pool:
        standings = Referee(contest, Done(pool, args.out / "tasks.jsonl")).standings()
    console = Console(width=170)
    for entry in contest.entries:
        console.print(cell_table(standings, entry))
    goals = goals_of(standings, contest.entries)
    report_goals(console, "goals that laws met", args, goals, cells=len(standings))


def arguments() -> argparse.Namespace:
    flags = parser(__doc__, "laws-table")
    flags.add_argument("--workloads", nargs="+", metavar="NAME", help='only these, such as "azure conv" day')
    flags.add_argument("--slos-ms", type=int, nargs="+", metavar="MS", help="only cells of these SLOs")
    flags.add_argument(
        "--profile", type=Path, help="another plant's step-time model and capacities, from pacer profile"
    )
    return flags.parse_args()


class Referee:
    """Asks for the tasks, in the order in which one's results are another's guesses."""

    def __init__(self, contest: Contest, done: Done) -> None:
        self._contest = contest
        self._done = done
        self._loads: dict[tuple[Cell, int], Load] = {}
        self._clairvoyant: dict[Cell, list[float]] = {}

    def standings(self) -> list[Standing]:
        contest = self._contest
        steady = {cell for cell in contest.cells if not cell.shifting}
        if any(cell.shifting for cell in contest.cells):  # their rates are set by these
            steady |= {Cell(name, SHIFTING_SLO_MS) for name in (CONVERSATION, LONG_PROMPTS)}
        self._search_clairvoyant(sorted(steady))
        self._search_clairvoyant([cell for cell in contest.cells if cell.shifting])
        ladders = self._ladders()
        capacities = self._capacities()
        statics = {cell: {int(b): [seed[b] for seed in climbs] for b in climbs[0]} for cell, climbs in ladders.items()}
        found = [
            Standing(
                cell, statics[cell], self._clairvoyant[cell], {e: capacities[e, cell] for e in contest.entries}, {}, {}
            )
            for cell in contest.cells
        ]
        kept, at_oracle = self._kept(found), self._at_oracle(found)
        return [s._replace(kept=kept[s.cell], at_oracle=at_oracle[s.cell]) for s in found]

    def _trial(self, cell: Cell, seed: int, policy: str, dead_time: int = 1) -> Trial:
        if (cell, seed) not in self._loads:
            means = {steady: float(np.mean(values)) for steady, values in self._clairvoyant.items()}
            self._loads[cell, seed] = self._contest.setting.load(cell, seed, means)
        return Trial(self._contest.setting.plant(dead_time), self._loads[cell, seed], cell.slo, seed, policy)

    def _search_clairvoyant(self, cells: Sequence[Cell]) -> None:
        seeds = self._contest.seeds
        guesses = {cell: self._contest.setting.guess(cell) for cell in cells}
        tasks = [Search(self._trial(cell, seed, CLAIRVOYANT), guesses[cell]) for cell, seed in product(cells, seeds)]
        results = iter(self._done.do(tasks, "clairvoyant"))
        self._clairvoyant |= {cell: [next(results)["capacity"] for _ in seeds] for cell in cells}

    def _ladders(self) -> dict[Cell, list[Result]]:
        contest = self._contest
        budgets = ladder(contest.setting.plant().config.bounds)
        tasks = [
            Climb(self._trial(cell, seed, "static"), budgets, CLIMB_FROM * near)
            for cell, seed, near in self._each_seed()
        ]
        results = iter(self._done.do(tasks, "static budgets"))
        return {cell: [next(results) for _ in contest.seeds] for cell in contest.cells}

    def _capacities(self) -> dict[tuple[Entry, Cell], list[float]]:
        contest = self._contest
        tasks = [
            Search(self._trial(cell, seed, *entry), near)
            for entry in contest.entries
            for cell, seed, near in self._each_seed()
        ]
        results = iter(self._done.do(tasks, "laws"))
        each = product(contest.entries, contest.cells)
        return {pair: [next(results)["capacity"] for _ in contest.seeds] for pair in each}

    def _each_seed(self) -> Iterator[tuple[Cell, int, float]]:
        """Every cell and seed, with the capacity of clairvoyance there."""
        for cell in self._contest.cells:
            for seed, near in zip(self._contest.seeds, self._clairvoyant[cell], strict=True):
                yield cell, seed, near

    def _kept(self, found: list[Standing]) -> dict[Cell, dict[Entry, Figures]]:
        """At `KEPT_SHARE` of the capacity, on the spare seed; of those that have a capacity."""
        wanted = [
            (s.cell, entry, rate)
            for s in found
            for entry in (*s.fixed_entries, *self._contest.entries)
            if (rate := KEPT_SHARE * s.capacity(entry).mean)
        ]
        tasks = [Judge(self._trial(cell, self._contest.spare, *entry), rate) for cell, entry, rate in wanted]
        results = self._done.do(tasks, "kept at 0.98")
        table: dict[Cell, dict[Entry, Figures]] = {s.cell: {} for s in found}
        for (cell, entry, _), result in zip(wanted, results, strict=True):
            table[cell][entry] = Figures(**result)
        return table

    def _at_oracle(self, found: list[Standing]) -> dict[Cell, dict[Entry, list[Figures]]]:
        """At `TTFT_SHARE` of the oracle static's capacity, seed by seed."""
        wanted = [
            (s.cell, entry, seed, TTFT_SHARE * capacity)
            for s in found
            for entry in (*s.fixed_entries, *self._contest.entries)
            for seed, capacity in zip(self._contest.seeds, s.statics[s.oracle], strict=True)
        ]
        tasks = [Judge(self._trial(cell, seed, *entry), rate) for cell, entry, seed, rate in wanted]
        results = self._done.do(tasks, "TTFT at 0.9")
        table: dict[Cell, dict[Entry, list[Figures]]] = {s.cell: {} for s in found}
        for (cell, entry, _, _), result in zip(wanted, results, strict=True):
            table[cell].setdefault(entry, []).append(Figures(**result))
        return table


def ladder(bounds: Bounds) -> tuple[int, ...]:
    """Whole tiles from `LOWEST` on in steps of a tile or of 6 %, whichever is more; the usual fixed budgets too."""
    budgets, budget, tile = set(FIXED), LOWEST, bounds.tile_tokens
    while budget < bounds.max_budget_tokens:
        budgets.add(budget)
        budget = max(budget + tile, round(budget * LADDER / tile) * tile)
    return tuple(sorted(budgets))


def _chosen(cell: Cell, args: argparse.Namespace) -> bool:
    named = args.workloads is None or cell.workload in args.workloads
    return named and (args.slos_ms is None or cell.slo_ms in args.slos_ms)


if __name__ == "__main__":
    main()
