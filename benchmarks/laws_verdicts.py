"""What the runs of `benchmarks.laws_table` say: each cell's standings, and whether a law met its goals."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.law_cells import LONG_PROMPTS, Cell
from benchmarks.report import report
from profiles.capacity import CLAIRVOYANT, Interval

VLLM_DEFAULT = 8192


class Entry(NamedTuple):
    """A policy, and the dead time of the plant it runs on. Fixed budgets and clairvoyance feel none: 1."""

    policy: str
    dead_time: int = 1

    @property
    def law(self) -> str:
        return self.policy.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.policy} at dead time {self.dead_time}"


class Figures(NamedTuple):
    """Of one run, as `law_tasks.Judge` tells them."""

    met: float
    unfinished: float
    ttft_median_s: float
    ttft_p99_s: float
    tbt_p99_s: float
    worst_window_tbt_s: float


class Standing(NamedTuple):
    """A cell with what was found there: capacities seed by seed, and the runs at given rates."""

    cell: Cell
    statics: dict[int, list[float]]
    clairvoyant: list[float]
    laws: dict[Entry, list[float]]
    kept: dict[Entry, Figures]
    at_oracle: dict[Entry, list[Figures]]

    @property
    def oracle(self) -> int:
        """The budget that is best here."""
        return max(self.statics, key=lambda budget: float(np.mean(self.statics[budget])))

    @property
    def oracle_entry(self) -> Entry:
        return Entry(f"static:budget={self.oracle}")

    @property
    def fixed_entries(self) -> tuple[Entry, Entry]:
        """What laws are compared with."""
        return self.oracle_entry, Entry(CLAIRVOYANT)

    def static(self, budget: int) -> float:
        return float(np.mean(self.statics[budget]))

    def capacity(self, entry: Entry) -> Interval:
        if entry in self.laws:
            return Interval.of(self.laws[entry])
        if entry == self.oracle_entry:
            return Interval.of(self.statics[self.oracle])
        return Interval.of(self.clairvoyant)

    def share(self, entry: Entry, of: float) -> float:
        """The entry's capacity in shares of another; infinite where the other has none."""
        return self.capacity(entry).mean / of if of else math.inf

    def keeps(self, entry: Entry) -> bool:
        """Whether P99 TBT was within the SLO on requests that no capacity was searched on."""
        return entry in self.kept and self.kept[entry].tbt_p99_s <= self.cell.slo_ms / 1e3

    def ttft_ratio(self, entry: Entry, figure: Callable[[Figures], float]) -> float:
        """Against the oracle static on the same requests: the geometric mean over the seeds."""
        pairs = zip(self.at_oracle[entry], self.at_oracle[self.oracle_entry], strict=True)
        return geometric_mean(figure(law) / figure(static) for law, static in pairs)


class Goal(NamedTuple):
    """One claim about one law."""

    entry: Entry
    what: str
    figure: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ok(self) -> bool:
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= self.figure <= high

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


def entries_of(policies: Sequence[str], dead_times: Sequence[int]) -> list[Entry]:
    return [Entry(policy, dead_time) for policy in policies for dead_time in dead_times]


def geometric_mean(values: Iterable[float]) -> float:
    """0 if one of them is, infinite without any zero if one is."""
    array = np.fromiter(values, np.float64)
    return 0.0 if (array == 0).any() else float(np.exp(np.log(array).mean()))


def best_single(standings: Sequence[Standing]) -> int:
    """The budget with the highest geometric mean of capacities over all cells."""
    budgets = standings[0].statics
    return max(budgets, key=lambda budget: geometric_mean(s.static(budget) for s in standings))


def goals_of(standings: Sequence[Standing], entries: Sequence[Entry]) -> list[Goal]:
    return [goal for entry in entries for goal in _goals(standings, entry)]


def _goals(standings: Sequence[Standing], entry: Entry) -> list[Goal]:
    """PID's, and for all other laws those of predictive. What needs cells that were left out is not judged."""
    single = best_single(standings)
    of_clairvoyant = geometric_mean(s.share(entry, s.capacity(Entry(CLAIRVOYANT)).mean) for s in standings)
    kept = float(np.mean([s.keeps(entry) for s in standings]))
    goals = [
        Goal(entry, "of clairvoyant, geometric mean", of_clairvoyant, 0.93 if entry.law == "pid" else 0.98),
        Goal(entry, "share of cells that kept the SLO on another seed", kept, 1.0),
    ]
    if entry.law == "pid":
        return goals
    of_oracle = {s.cell: s.share(entry, s.static(s.oracle)) for s in standings}
    goals += [
        Goal(entry, "of the oracle static, worst cell", min(of_oracle.values()), 0.99),
        Goal(
            entry,
            f"of the best single static ({single}), geometric mean",
            geometric_mean(s.share(entry, s.static(single)) for s in standings),
            1.25,
        ),
        Goal(
            entry,
            f"of vLLM's default ({VLLM_DEFAULT}), geometric mean",
            geometric_mean(s.share(entry, s.static(VLLM_DEFAULT)) for s in standings),
            3.0,
        ),
    ]
    steady = [s for s in standings if not s.cell.shifting]
    if steady:
        goals += _ttft_goals(steady, entry, "", 0.7, 0.9)
    long_prompts = [s for s in steady if s.cell.workload == LONG_PROMPTS]
    if long_prompts:
        worst = min(of_oracle[s.cell] for s in long_prompts)
        goals.append(Goal(entry, "of the oracle static, worst long-prompt cell", worst, 1.10))
        goals += _ttft_goals(long_prompts, entry, ", long prompts", 0.35, 1.1)
    return goals


def _ttft_goals(standings: Sequence[Standing], entry: Entry, where: str, median: float, p99: float) -> list[Goal]:
    medians = geometric_mean(s.ttft_ratio(entry, lambda figures: figures.ttft_median_s) for s in standings)
    p99s = geometric_mean(s.ttft_ratio(entry, lambda figures: figures.ttft_p99_s) for s in standings)
    return [
        Goal(entry, f"median TTFT of the oracle static's{where}, geometric mean", medians, at_most=median),
        Goal(entry, f"P99 TTFT of the oracle static's{where}, geometric mean", p99s, at_most=p99),
    ]


def goals_table(goals: Sequence[Goal]) -> Table:
    table = Table(title="Goals")
    for column in ("law", "dead time", "what", "figure", "goal", "met"):
        table.add_column(column)
    for goal in goals:
        met = "yes" if goal.ok else "NO"
        table.add_row(goal.entry.policy, str(goal.entry.dead_time), goal.what, f"{goal.figure:.3f}", goal.bound, met)
    return table


def report_goals(console: Console, name: str, args: argparse.Namespace, goals: Sequence[Goal], **more: Any) -> None:
    """Print the goals, and the share of them that was met as the last line; `args` as of `law_cells.parser`."""
    console.print(goals_table(goals))
    report(
        name,
        sum(goal.ok for goal in goals) / max(len(goals), 1),
        "all",
        ok=all(goal.ok for goal in goals),
        seed=args.seed,
        seeds=args.seeds,
        workloads="presets" if args.traces is None else "traces",
        **more,
        **{f"{goal.entry}: {goal.what}": goal.figure for goal in goals},
    )


def cell_table(standings: Sequence[Standing], entry: Entry) -> Table:
    """Capacities are req/s of steady cells and shares of capacity of shifting ones: mean and half its 95 % interval.

    A law's TTFT is in shares of the oracle static's; the worst minute is the worst P99 TBT of one, in ms.
    """
    single = best_single(standings)
    table = Table(title=f"{entry}; * kept the SLO on another seed at 0.98 of this capacity")
    columns = ["workload", "SLO", f"static\n{single}", *(f"static\n{budget}" for budget in (512, 2048, VLLM_DEFAULT))]
    columns += ["oracle\nstatic", "at", "clair-\nvoyant", entry.law, "/ clair-\nvoyant", "/ oracle"]
    for column in (*columns, "TTFT\nmedian", "TTFT\nP99", "worst\nminute"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in standings:
        oracle, clairvoyant, law = (_capacity(s, one) for one in (*s.fixed_entries, entry))
        worst = f"{s.kept[entry].worst_window_tbt_s * 1e3:.1f}" if entry in s.kept else "-"
        ratios = (
            s.share(entry, s.capacity(Entry(CLAIRVOYANT)).mean),
            s.share(entry, s.static(s.oracle)),
            s.ttft_ratio(entry, lambda figures: figures.ttft_median_s),
            s.ttft_ratio(entry, lambda figures: figures.ttft_p99_s),
        )
        table.add_row(
            *(s.cell.workload, str(s.cell.slo_ms)),
            *(f"{s.static(budget):.3g}" for budget in (single, 512, 2048, VLLM_DEFAULT)),
            *(oracle, str(s.oracle), clairvoyant, law, *(f"{ratio:.3f}" for ratio in ratios), worst),
        )
    return table


def _capacity(s: Standing, entry: Entry) -> str:
    mean, half_width = s.capacity(entry)
    interval = "" if math.isnan(half_width) else f"±{half_width:.2g}"
    return f"{mean:.3g}{interval}{'*' if s.keeps(entry) else ' '}"
