"""Laws that are told wrong, on a plant that changes: capacity, how soon the SLO is back, and a day without end.

    python -m benchmarks.laws_robust [--traces FOLDER] [--out FOLDER] [--policies LAW ...] [--dead-times 1 2] [--quick]

Four cells, each disturbed in turn: a profile 0.7 or 1.3 times the truth, of another machine, or with attention's terms
times 3 or 0.3; step noise of 10 % where the profile says 4 %; dead time 3; a GPU 1.4 times as slow from the middle of
the run on, until three quarters of it. Capacities are set against those of the same law on the same plant that is told
the truth (of dead time 3: against the law's own dead time); recovery is watched at 0.9 of that capacity. The soak is 24
hours of conversation (--quick: 1 hour) on a day curve whose peak is 0.85 of capacity.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.capacity_table import DECODE_ONLY_S, MIXED_S
from benchmarks.law_cells import CONVERSATION, LONG_PROMPTS, QUICK_TIME, Cell, Setting, day, parser
from benchmarks.law_disturbed import (
    HOURS,
    Case,
    Change,
    DisturbedSearch,
    DisturbedTrial,
    Hours,
    Recovery,
    Settled,
    Soak,
)
from benchmarks.law_tasks import Search
from benchmarks.laws_verdicts import Entry, Goal, entries_of, report_goals
from benchmarks.tasks import Done, Result
from envs.arrivals import DAY_S
from envs.step_time import StepTimeModel
from profiles.capacity import CLAIRVOYANT, Trial
from profiles.parallel import worker_pool

CELLS = [Cell(CONVERSATION, 25), Cell(CONVERSATION, 40), Cell(LONG_PROMPTS, 40), Cell("arxiv", 100)]
SOAK_CELL, SOAK_PEAK, SOAK_PARTS, QUICK_DAY_S = Cell(CONVERSATION, 40), 0.85, 1440, 3600.0
LOAD, SLOWER = 0.9, 1.4
OTHER_MACHINE = Path(__file__).parents[1] / "profiles" / "data" / "h200-mistral-7b-pacer.json"
QUARTER = HOURS // 4


class Disturbance(NamedTuple):
    """A law in a case, and what its capacity and its recovery are measured against: the same law, told the truth."""

    case: Case
    informed: Case
    settled: Case


class Row(NamedTuple):
    """One law in one disturbance on one cell; means, and the worst of the seeds."""

    cell: Cell
    disturbance: str
    capacity: float
    of_informed: float
    back_s: float
    tail: float
    pinned: float


class Day(NamedTuple):
    """The soak in a few figures. `drift` is the last quarter's mean budget over the first's, whose load is the same."""

    late: list[float]  # shares of an hour's tokens
    budget: list[float]  # mean of an hour's mixed batches
    drift: float
    overruled: float
    starved: float

    @classmethod
    def of(cls, result: Result) -> "Day":
        hours = [{name: result[f"{name} {hour}"] for name in Hours.NAMES} for hour in range(HOURS)]

        def mean(hours: Sequence[Result]) -> float:
            return sum(hour["budget"] for hour in hours) / max(sum(hour["mixed"] for hour in hours), 1.0)

        return cls(
            [hour["late"] / max(hour["tokens"], 1.0) for hour in hours],
            [mean([hour]) for hour in hours],
            mean(hours[-QUARTER:]) / mean(hours[:QUARTER]),
            sum(hour["overruled"] for hour in hours),
            sum(hour["starved"] for hour in hours) / max(sum(hour["mixed"] for hour in hours), 1.0),
        )


def main() -> None:
    args = arguments()
    setting, entries = Setting.of(args), entries_of(args.policies, args.dead_times)
    seeds = range(args.seed, args.seed + args.seeds)
    with worker_pool() as pool:
        done = Done(pool, args.out / "tasks.jsonl")
        rows = {} if args.skip_table else table_of(done, setting, entries, seeds, not args.no_guard)
        days = {} if args.skip_soak else soak(done, setting, entries, seeds)
    console, goals = Console(width=150), []
    for entry in entries:
        if entry in rows:
            console.print(disturbed_table(entry, rows[entry]))
            goals += disturbed_goals(entry, rows[entry])
        if entry in days:
            console.print(day_table(entry, days[entry]))
            goals += day_goals(entry, days[entry])
    report_goals(console, "goals that disturbed laws met", args, goals)


def arguments() -> argparse.Namespace:
    flags = parser(__doc__, "laws-robust")
    flags.add_argument("--skip-soak", action="store_true", help="no day")
    flags.add_argument("--no-guard", action="store_true", help="the table of the bare laws; none of theirs may raise")
    flags.add_argument("--skip-table", action="store_true", help="the day alone")
    return flags.parse_args()


def disturbances(setting: Setting, dead_time: int) -> list[Disturbance]:
    plant = setting.plant(dead_time)
    truth = plant.step_time
    noisy = replace(setting, noise=2.5 * setting.noise).plant(dead_time)
    informed = Case("told the truth", plant, truth)
    profiles = {
        "profile x 0.7": truth.scaled(0.7),
        "profile x 1.3": truth.scaled(1.3),
        "another machine's": StepTimeModel.load(OTHER_MACHINE),
        "attention x 3": attention_times(3.0, setting.noise),
        "attention x 0.3": attention_times(0.3, setting.noise),
    }
    slower = tuple(Change(*change) for change in ((0.5, SLOWER), (0.75, 1.0)))
    known = tuple(change._replace(told=truth.scaled(change.slowdown)) for change in slower)
    late = setting.plant(3)
    known_late = Case("told the truth", late, truth)
    known_noise = Case("told of the noise", noisy, noisy.step_time)
    known_change = Case("told of the change", plant, truth, known)
    return [
        *(Disturbance(Case(name, plant, told), informed, informed) for name, told in profiles.items()),
        Disturbance(Case("noise x 2.5", noisy, truth), known_noise, known_noise),
        Disturbance(known_late._replace(name="dead time 3"), informed, known_late),
        Disturbance(Case("slower GPU", plant, truth, slower), known_change, known_change),
    ]


def attention_times(factor: float, noise: float) -> StepTimeModel:
    """The plant's formula with another cost of contexts: what a model with other heads would have."""
    fixed_s, decode_s, context_s = DECODE_ONLY_S
    mixed_fixed_s, token_s, mixed_context_s, w_s, request_s = MIXED_S
    mixed = (mixed_fixed_s, token_s, factor * mixed_context_s, factor * w_s, request_s)
    return StepTimeModel.from_formula((fixed_s, decode_s, factor * context_s), mixed).with_noise(noise)


def search_clairvoyant(done: Done, setting: Setting, cells: Sequence[Cell], seeds: range) -> dict[Cell, list[float]]:
    tasks = [
        Search(Trial(setting.plant(), setting.load(cell, seed, {}), cell.slo, seed, CLAIRVOYANT), cell.guess)
        for cell, seed in product(cells, seeds)
    ]
    results = iter(done.do(tasks, "clairvoyant"))
    return {cell: [next(results)["capacity"] for _ in seeds] for cell in cells}


def table_of(
    done: Done, setting: Setting, entries: Sequence[Entry], seeds: range, guarded: bool
) -> dict[Entry, list[Row]]:
    clairvoyant = search_clairvoyant(done, setting, CELLS, seeds)
    return {entry: rows_of(done, setting, entry, seeds, clairvoyant, guarded) for entry in entries}


def rows_of(
    done: Done, setting: Setting, entry: Entry, seeds: range, clairvoyant: dict[Cell, list[float]], guarded: bool
) -> list[Row]:
    each = list(product(disturbances(setting, entry.dead_time), CELLS, seeds))

    def trial(case: Case, cell: Cell, seed: int) -> DisturbedTrial:
        return DisturbedTrial(case, setting.load(cell, seed, {}), cell.slo, seed, entry.policy, guarded)

    def searched(trials: Sequence[DisturbedTrial], guesses: Sequence[float], what: str) -> list[float]:
        tasks = [DisturbedSearch(*search) for search in zip(trials, guesses, strict=True)]
        return [result["capacity"] for result in done.do(tasks, f"{entry}, {what}")]

    ideal = [clairvoyant[cell][seed - seeds.start] for _, cell, seed in each]
    informed = searched([trial(d.informed, cell, seed) for d, cell, seed in each], ideal, "told the truth")
    near = [capacity or guess for capacity, guess in zip(informed, ideal, strict=True)]
    trials = [trial(d.case, cell, seed) for d, cell, seed in each]
    capacities = searched(trials, near, "disturbed")
    rates = [LOAD * capacity for capacity in near]
    settled = [Settled(trial(d.settled, cell, seed), rate) for (d, cell, seed), rate in zip(each, rates, strict=True)]
    chances_s = [result["worst_s"] for result in done.do(settled, f"{entry}, settled")]
    runs = [Recovery(*run) for run in zip(trials, rates, chances_s, strict=True)]
    recoveries = done.do(runs, f"{entry}, recovery")
    rows, n = [], len(seeds)
    for first in range(0, len(each), n):
        disturbance, cell, _ = each[first]
        part = slice(first, first + n)
        capacity, known = float(np.mean(capacities[part])), float(np.mean(informed[part]))
        worst = [max(result[name] for result in recoveries[part]) for name in ("back_s", "tail", "pinned")]
        rows.append(Row(cell, disturbance.case.name, capacity, capacity / known if known else 0.0, *worst))
    return rows


def soak(done: Done, setting: Setting, entries: Sequence[Entry], seeds: range) -> dict[Entry, Day]:
    """The capacity is that of a full run, quick or not: a short one's would fill the day with overload."""
    capacity = search_clairvoyant(done, replace(setting, quick=False), [SOAK_CELL], seeds)[SOAK_CELL]
    day_s = QUICK_DAY_S / QUICK_TIME if setting.quick else DAY_S  # the setting cuts its phases short
    load = setting.shifting(day(SOAK_PEAK * float(np.mean(capacity)), day_s, SOAK_PARTS), seeds[0])
    tasks = [Soak(Trial(setting.plant(e.dead_time), load, SOAK_CELL.slo, seeds[0], e.policy), 1.0) for e in entries]
    return dict(zip(entries, map(Day.of, done.do(tasks, "soak")), strict=True))


def disturbed_goals(entry: Entry, rows: list[Row]) -> list[Goal]:
    return [
        Goal(entry, "capacity of the undisturbed, worst", min(row.of_informed for row in rows), at_least=0.93),
        Goal(entry, "seconds until the SLO is back, worst", max(row.back_s for row in rows), at_most=2.0),
        Goal(
            entry, "P99 TBT from 2 s after a change on, of the SLO, worst", max(row.tail for row in rows), at_most=1.0
        ),
        Goal(entry, "runs that end pinned at a bound", sum(row.pinned for row in rows), at_most=0.0),
    ]


def day_goals(entry: Entry, found: Day) -> list[Goal]:
    return [
        Goal(entry, "soak: late tokens, share of the worst hour's", max(found.late), at_most=0.01),
        Goal(entry, "soak: last quarter's mean budget over the first's, from 1", abs(found.drift - 1), at_most=0.02),
        Goal(entry, "soak: decisions that the lock-in watch overruled", found.overruled, at_most=0.0),
        Goal(entry, "soak: batches at the least budget while prompts wait, share", found.starved, at_most=0.01),
    ]


def disturbed_table(entry: Entry, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{entry}, disturbed")
    for column in ("disturbance", "workload", "SLO", "capacity", "/ told", "back, s", "tail / SLO", "pinned"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(row.disturbance, row.cell.workload, str(row.cell.slo_ms), f"{row.capacity:.3g}"),
            *(f"{row.of_informed:.3f}", f"{row.back_s:.1f}", f"{row.tail:.3f}", "YES" if row.pinned else "no"),
        )
    return table


def day_table(entry: Entry, found: Day) -> Table:
    """An hour beside the one of equal load in the other half of the day."""
    table = Table(title=f"{entry}, a day")
    for column in ("hours", "late, %", "late, %", "mean budget", "mean budget"):
        table.add_column(column, justify="right")
    for hour in range(HOURS // 2):
        other = HOURS - 1 - hour
        late = (f"{100 * found.late[h]:.2f}" for h in (hour, other))
        table.add_row(f"{hour}, {other}", *late, *(f"{found.budget[h]:.0f}" for h in (hour, other)))
    return table


if __name__ == "__main__":
    main()
