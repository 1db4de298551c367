"""Trained laws on what they have not seen: two workloads, three SLOs and two machines that nothing was trained on.

    python -m benchmarks.rl_table [--traces FOLDER] [--out FOLDER] [--policies LAW ...] [--quick]

The shipped laws were trained around `h200-mistral-7b.json`, on code, sharegpt and wide mixtures, and chosen on arxiv.
Here they run conversation and long prompts on another engine's H200 and on a CPU. Capacities, ladder and seeds are as
in `benchmarks.laws_table`, the requests in one order for all laws. Every law named rl has the goals; the others stand
beside it, pid and predictive always.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.law_cells import CONVERSATION, LONG_PROMPTS, Cell, Setting, parser
from benchmarks.laws_table import Contest, Referee
from benchmarks.laws_verdicts import Entry, Goal, Standing, entries_of, geometric_mean, report_goals
from benchmarks.tasks import Done
from profiles.capacity import CLAIRVOYANT
from profiles.parallel import worker_pool

DATA = Path(__file__).parents[1] / "profiles" / "data"
WORKLOADS = (CONVERSATION, LONG_PROMPTS)
CLAIRVOYANT_GOAL, PID_GOAL, ORACLE_GOAL = 0.97, 0.99, 0.98
BESIDE = ("pid", "predictive")


class Machine(NamedTuple):
    """A profile, the SLOs that are asked of that machine, and what lengths are times to fit it."""

    profile: Path
    slos_ms: tuple[int, ...]
    scale: float = 1.0


MACHINES = (
    Machine(DATA / "h200-mistral-7b-pacer.json", (25, 40, 100)),
    Machine(DATA / "cpu-26m.json", (60, 120, 240), 0.1),
)


class Row(NamedTuple):
    """A cell on a machine."""

    machine: str
    standing: Standing


def main() -> None:
    args = arguments()
    entries = entries_of([*dict.fromkeys((*args.policies, *BESIDE))], args.dead_times)
    seeds = range(args.seed, args.seed + args.seeds)
    rows = []
    with worker_pool() as pool:
        done = Done(pool, args.out / "tasks.jsonl")
        for machine in MACHINES:
            setting = replace(Setting.of(args), profile=machine.profile, scale=machine.scale)
            cells = [Cell(workload, slo_ms) for workload in WORKLOADS for slo_ms in machine.slos_ms]
            standings = Referee(Contest(setting, cells, entries, seeds), done).standings()
            rows += [Row(machine.profile.stem, standing) for standing in standings]
    console = Console(width=170)
    console.print(table(rows, entries))
    goals = [goal for entry in entries if entry.law == "rl" for goal in goals_of(rows, entry)]
    more = {f"{entry}: of clairvoyant": mean_share(rows, entry) for entry in entries if entry.law != "rl"}
    report_goals(console, "goals that trained laws met, held out", args, goals, cells=len(rows), **more)


def arguments() -> argparse.Namespace:
    flags = parser(__doc__, "rl-table")
    flags.set_defaults(policies=["rl:name=limit", "rl:name=knobs"], dead_times=[1])
    return flags.parse_args()


def mean_share(rows: Sequence[Row], entry: Entry) -> float:
    """Of clairvoyant's capacity, geometric mean."""
    return geometric_mean(s.share(entry, s.capacity(Entry(CLAIRVOYANT)).mean) for _, s in rows)


def goals_of(rows: Sequence[Row], entry: Entry) -> list[Goal]:
    of_pid = min(s.share(entry, s.capacity(entry._replace(policy="pid")).mean) for _, s in rows)
    of_oracle = min(s.share(entry, s.static(s.oracle)) for _, s in rows)
    return [
        Goal(entry, "of clairvoyant, geometric mean", mean_share(rows, entry), CLAIRVOYANT_GOAL),
        Goal(entry, "of pid, worst cell", of_pid, PID_GOAL),
        Goal(entry, "of the oracle static, worst cell", of_oracle, ORACLE_GOAL),
    ]


def table(rows: Sequence[Row], entries: Sequence[Entry]) -> Table:
    """Capacities in req/s, and of each law in shares of clairvoyant's."""
    found = Table(title="held out; * kept the SLO on another seed at 0.98 of its capacity")
    for column in ("machine", "workload", "SLO", "oracle static", "at", CLAIRVOYANT, *map(str, entries)):
        found.add_column(column, justify="right")
    for machine, s in rows:
        ideal = s.capacity(Entry(CLAIRVOYANT)).mean
        shares = (f"{s.share(entry, ideal):.3f}{'*' if s.keeps(entry) else ' '}" for entry in entries)
        oracle = (f"{s.static(s.oracle):.3g}", str(s.oracle), f"{ideal:.3g}")
        found.add_row(machine, s.cell.workload, str(s.cell.slo_ms), *oracle, *shares)
    return found


if __name__ == "__main__":
    main()
