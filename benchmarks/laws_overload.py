"""Laws under more than a server can do: goodput at 1.5 times capacity against its peak, and the TBT of who is served.

    python -m benchmarks.laws_overload [--traces FOLDER] [--out FOLDER] [--policies LAW ...] [--dead-times 1 2]

On the fifteen steady cells requests arrive at shares of clairvoyance's capacity, for 120 s or as long as 500 take to
come at capacity, whichever is more (--quick: half of that). Goodput is the requests per second that ended after the
first quarter of that time, each judged by itself: P99 of its TBT within the SLO. The goodput with TTFT within 10 s as
well is told, not judged: knobs do not choose whom to serve, and first come, first served makes all wait.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.law_cells import STEADY_CELLS, Cell, Setting, Shifting, lengths, parser
from benchmarks.law_tasks import Search, gaps, trial_key
from benchmarks.laws_verdicts import Entry, Goal, entries_of, geometric_mean, report_goals
from benchmarks.tasks import Done, Result
from envs.slo import Slo
from profiles.capacity import CLAIRVOYANT, Trial
from profiles.parallel import worker_pool

RUN_S, RUN_REQUESTS, QUICK, WARM_UP = 120.0, 500, 0.5, 0.25
SHARES = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
TTFT_S = 10.0
GOAL = 0.9


class Overloaded(NamedTuple):
    """One run at a share of capacity, cut where arrivals end; goodput in requests per second."""

    trial: Trial
    share: float
    run_s: float

    def key(self) -> str:
        return f"overload {self.share!r} {self.run_s!r} {TTFT_S} {trial_key(self.trial)}"

    def do(self) -> Result:
        outcome = self.trial.simulate(self.share, self.run_s)
        begin_s = WARM_UP * self.run_s
        ended_s = outcome.workload.arrival_s + outcome.e2el_s
        counted = ended_s >= begin_s  # not who has not ended
        slo = self.trial.slo
        prompt = Slo(tbt_s=slo.tbt_s, ttft_s=TTFT_S, quantile=slo.quantile)
        at_s, tbt_s = gaps(outcome)
        return {
            "goodput": float((outcome.met(slo) & counted).sum()) / (self.run_s - begin_s),
            "goodput_prompt": float((outcome.met(prompt) & counted).sum()) / (self.run_s - begin_s),
            "tbt_p99_s": float(np.quantile(tbt_s[at_s >= begin_s], slo.quantile)),
        }


class Row(NamedTuple):
    """A policy on a cell: means over the seeds, one entry for each of `SHARES`."""

    cell: Cell
    goodput: list[float]
    goodput_prompt: list[float]
    tbt_p99_s: list[float]

    @property
    def kept(self) -> float:
        """Goodput of the last share over the peak."""
        return self.goodput[-1] / max(self.goodput) if max(self.goodput) else 0.0

    @property
    def tbt(self) -> float:
        """P99 TBT of the last share, in shares of the SLO."""
        return self.tbt_p99_s[-1] / (self.cell.slo_ms / 1e3)


def main() -> None:
    args = parser(__doc__, "laws-overload").parse_args()
    setting, entries = Setting.of(args), [*entries_of(args.policies, args.dead_times), Entry(CLAIRVOYANT)]
    seeds = range(args.seed, args.seed + args.seeds)
    with worker_pool() as pool:
        rows = measure(Done(pool, args.out / "tasks.jsonl"), setting, entries, seeds)
    console, goals = Console(width=150), [goal for entry in entries[:-1] for goal in goals_of(entry, rows[entry])]
    for entry in entries:
        console.print(table_of(entry, rows[entry]))
    report_goals(
        console,
        "goals that overloaded laws met",
        args,
        goals,
        clairvoyant_goodput_of_peak=geometric_mean(row.kept for row in rows[entries[-1]]),
    )


def measure(done: Done, setting: Setting, entries: Sequence[Entry], seeds: range) -> dict[Entry, list[Row]]:
    searches = [
        Search(Trial(setting.plant(), setting.load(cell, seed, {}), cell.slo, seed, CLAIRVOYANT), cell.guess)
        for cell, seed in product(STEADY_CELLS, seeds)
    ]
    found = iter(done.do(searches, "clairvoyant"))
    capacities = {cell: float(np.mean([next(found)["capacity"] for _ in seeds])) for cell in STEADY_CELLS}

    def run(entry: Entry, cell: Cell, share: float, seed: int) -> Overloaded:
        run_s = max(RUN_S, RUN_REQUESTS / capacities[cell]) * (QUICK if setting.quick else 1.0)
        load = Shifting.steady(capacities[cell], run_s, lengths(setting.traces, cell.workload), seed)
        trial = Trial(setting.plant(entry.dead_time), load, cell.slo, seed, entry.policy)
        return Overloaded(trial, share, run_s)

    results = iter(done.do([run(*each) for each in product(entries, STEADY_CELLS, SHARES, seeds)], "overload"))

    def row(cell: Cell) -> Row:
        shares = [[next(results) for _ in seeds] for _ in SHARES]
        means = {name: [float(np.mean([run[name] for run in runs])) for runs in shares] for name in Row._fields[1:]}
        return Row(cell, **means)

    return {entry: [row(cell) for cell in STEADY_CELLS] for entry in entries}


def goals_of(entry: Entry, rows: Sequence[Row]) -> list[Goal]:
    return [
        Goal(entry, "goodput at 1.5 x capacity of its peak, worst cell", min(row.kept for row in rows), at_least=GOAL),
        Goal(entry, "P99 TBT at 1.5 x capacity, of the SLO, worst cell", max(row.tbt for row in rows), at_most=1.0),
    ]


def table_of(entry: Entry, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{entry}: goodput in req/s at shares of clairvoyance's capacity; at 1.5 the rest")
    for column in ("workload", "SLO", *map(str, SHARES), "of peak", "TBT / SLO", f"with TTFT <= {TTFT_S:.0f} s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row.cell.workload, str(row.cell.slo_ms), *(f"{goodput:.3g}" for goodput in row.goodput)),
            *(f"{row.kept:.3f}", f"{row.tbt:.3f}", f"{row.goodput_prompt[-1]:.3g}"),
        )
    return table


if __name__ == "__main__":
    main()
