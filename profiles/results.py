"""What a comparison found: every run's figures, who is the best static, the means over seeds; on screen and as JSON."""

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.table import Table

from envs.outcome import FloatArray, Outcome
from envs.slo import Slo
from profiles.capacity import TOLERANCE, Interval

BEST_STATIC, ORACLE_STATIC = "best single static", "oracle static"
BINS = np.concatenate(([0.0], np.geomspace(1e-4, 1e3, 281)))  # seconds; 40 in a factor of ten
FIGURES = {
    "ttft_p50_s": ("TTFT p50", "s", 1.0, ".3f"),
    "ttft_p99_s": ("TTFT p99", "s", 1.0, ".2f"),
    "tbt_p50_s": ("TBT p50", "ms", 1e3, ".1f"),
    "tbt_p99_s": ("TBT p99", "ms", 1e3, ".1f"),
    "tpot_p99_s": ("TPOT p99", "ms", 1e3, ".1f"),
    "goodput": ("goodput", "req/s", 1.0, ".2f"),
    "throughput": ("output", "tok/s", 1.0, ".0f"),
    "finished": ("finished", "%", 1e2, ".1f"),
    "tokens_in_slo": ("tokens in SLO", "%", 1e2, ".2f"),
    "tokens_on_time": ("tokens on time", "%", 1e2, ".2f"),
}
"""Each figure that a run may have: its name in a table, the unit there, the factor to it and its digits."""
WITH_INTERVAL = ("ttft_p99_s", "tbt_p99_s", "tpot_p99_s", "goodput")


class Run(msgspec.Struct, frozen=True):
    """One policy at one rate with the requests of one seed.

    `tbt_counts` and `ttft_counts` are histograms over `BINS`; `budget` is time in s and budget in tokens of some
    iterations, if they were kept. Of the simulated `iterations`, so many were `outside` of the step-time model's range.
    """

    policy: str
    seed: int
    rate: float
    figures: dict[str, float]
    tbt_counts: list[int] = []
    ttft_counts: list[int] = []
    budget: tuple[list[float], list[float]] = ([], [])
    iterations: int = 0
    outside: int = 0


class Row(NamedTuple):
    """A contender at a rate: means over seeds with intervals. `policy` is who stands for it there."""

    contender: str
    policy: str
    rate: float
    capacity: Interval | None
    figures: dict[str, Interval]


class Comparison(msgspec.Struct, frozen=True):
    """`policies` were asked for, `statics` are the grid; `capacities` (req/s, one a seed) are empty in live mode."""

    title: str
    slo: str
    policies: list[str]
    statics: list[str]
    rates: list[float]
    capacities: dict[str, list[float]]
    runs: list[Run]
    provenance: dict[str, Any]

    @property
    def contenders(self) -> list[str]:
        return [*self.policies, BEST_STATIC, ORACLE_STATIC]

    def policy_of(self, contender: str, rate: float) -> str:
        """Who stands for a contender at a rate: the oracle picks by goodput, and may pick another at each."""
        if contender == BEST_STATIC:
            return self.best_static
        if contender == ORACLE_STATIC:
            return max(self.statics, key=lambda policy: self.mean(policy, rate, "goodput"))
        return contender

    @property
    def best_static(self) -> str:
        """The static of the grid with the highest capacity; without capacities, the highest goodput over all rates."""
        if self.capacities:
            return best_by_capacity(self.statics, self.capacities)
        return max(self.statics, key=lambda policy: sum(self.mean(policy, rate, "goodput") for rate in self.rates))

    @property
    def figures(self) -> list[str]:
        """The names of the figures that some run has, in the order of `FIGURES`."""
        return [name for name in FIGURES if any(name in run.figures for run in self.runs)]

    def of(self, policy: str, rate: float) -> list[Run]:
        return [run for run in self.runs if run.policy == policy and run.rate == rate]

    def mean(self, policy: str, rate: float, figure: str) -> float:
        return float(np.mean([run.figures[figure] for run in self.of(policy, rate)]))

    @property
    def beyond_profile(self) -> str:
        """How far not to trust the step-time profile: nothing, if it was measured on all that was simulated."""
        shares = {policy: _share_outside(self.runs, policy) for policy in self.capacities}
        if not any(shares.values()):
            return ""
        worst = max(shares, key=lambda policy: shares[policy])
        return (
            f"{_share_outside(self.runs):.1%} of the simulated iterations ({shares[worst]:.1%} under {worst}) lie "
            "outside what the step-time profile was measured on (see `measured` in it): record under such a load"
        )

    def rows(self) -> Iterator[Row]:
        for rate in self.rates:
            for contender in self.contenders:
                policy = self.policy_of(contender, rate)
                runs = self.of(policy, rate)
                known = [name for name in self.figures if all(name in run.figures for run in runs)]
                figures = {name: Interval.of([run.figures[name] for run in runs]) for name in known}
                yield Row(contender, policy, rate, self.capacity(contender), figures)

    def capacity(self, contender: str) -> Interval | None:
        """The oracle's is the best single static's: no static of the grid goes further.

        The interval is no narrower than the rung of the search: seeds that end on one rung agree within that only.
        """
        policy = self.best_static if contender in (BEST_STATIC, ORACLE_STATIC) else contender
        if policy not in self.capacities:
            return None
        mean, half_width = Interval.of(self.capacities[policy])
        return Interval(mean, math.hypot(half_width, TOLERANCE * mean))

    def write_json(self, path: Path) -> None:
        """Everything, and the rows of the table; what is not a number is null."""
        rows = [row._asdict() | {"capacity": row.capacity and row.capacity._asdict()} for row in self.rows()]
        for row in rows:
            row["figures"] = {name: interval._asdict() for name, interval in row["figures"].items()}
        everything = {"rows": rows, "beyond_profile": self.beyond_profile} | msgspec.to_builtins(self)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(everything), indent=1) + b"\n")


def _share_outside(runs: list[Run], policy: str = "") -> float:
    chosen = [run for run in runs if policy in ("", run.policy)]
    return sum(run.outside for run in chosen) / max(sum(run.iterations for run in chosen), 1)


def best_by_capacity(statics: list[str], capacities: dict[str, list[float]]) -> str:
    return max(statics, key=lambda policy: float(np.mean(capacities[policy])))


def label(row: Row) -> str:
    """The contender's name, and who stands for it."""
    return row.contender if row.contender == row.policy else f"{row.contender} ({row.policy.partition('=')[2]})"


def cells(row: Row, figures: list[str]) -> list[str]:
    """These figures as text in the units of `FIGURES`, with the interval where it matters most."""
    texts = []
    for name in figures:
        _, _, factor, form = FIGURES[name]
        if name not in row.figures:
            texts.append("-")
            continue
        mean, half_width = (factor * x for x in row.figures[name])
        texts.append(format(mean, form) + (f" ±{half_width:{form}}" if name in WITH_INTERVAL else ""))
    return texts


def column_heads(comparison: Comparison) -> list[tuple[str, str]]:
    """Name and unit of the columns after the policy's: its capacity, and `comparison.figures`."""
    return [("capacity", "req/s"), *(FIGURES[name][:2] for name in comparison.figures)]


def capacity_cell(capacity: Interval | None) -> str:
    return f"{capacity.mean:.2f} ±{capacity.half_width:.2f}" if capacity else "-"


def screen_table(comparison: Comparison) -> Table:
    title = f"{comparison.title}; the promise is {comparison.slo} (ms); mean of seeds ± half the 95 % interval"
    table = Table(title=title, title_justify="left")
    table.add_column("policy", overflow="fold")
    for name, unit in column_heads(comparison):
        table.add_column(f"{name}\n{unit}", justify="right", no_wrap=True)
    for rate, rows in groupby(comparison.rows(), lambda row: row.rate):
        table.add_section()
        table.add_row(f"[bold]at {rate:g} req/s")
        for row in rows:
            table.add_row(label(row), capacity_cell(row.capacity), *cells(row, comparison.figures))
    return table


def figures_of(outcome: Outcome, ttft_s: FloatArray, slo: Slo) -> dict[str, float]:
    """The figures of a simulated run; of a request without a first token, TTFT is how long it has waited."""
    tbt_s = outcome.tbt_s
    ttft_p50_s, ttft_p99_s = np.quantile(ttft_s, (0.5, 0.99))
    tbt_p50_s, tbt_p99_s = np.quantile(tbt_s, (0.5, 0.99)) if tbt_s.size else (0.0, 0.0)
    figures = {
        "ttft_p50_s": ttft_p50_s,
        "ttft_p99_s": ttft_p99_s,
        "tbt_p50_s": tbt_p50_s,
        "tbt_p99_s": tbt_p99_s,
        "goodput": outcome.goodput(slo),
        "throughput": outcome.throughput,
        "finished": outcome.finished.mean(),
    }
    if slo.tbt_s is not None:
        figures["tokens_in_slo"] = outcome.tokens_in_slo(slo.tbt_s)
    if slo.tpot_s is not None:
        tpot_s = outcome.tpot_s[~np.isnan(outcome.tpot_s)]
        figures["tpot_p99_s"] = np.quantile(tpot_s, 0.99) if tpot_s.size else 0.0
    if slo.deadline_s is not None:
        figures["tokens_on_time"] = outcome.tokens_on_time(slo)
    return {name: float(value) for name, value in figures.items()}


def histogram(values_s: FloatArray) -> list[int]:
    """How many values fall between the `BINS`; those beyond count in the last."""
    bins = np.searchsorted(BINS, values_s, side="right") - 1
    counts: list[int] = np.bincount(np.clip(bins, 0, len(BINS) - 2), minlength=len(BINS) - 1).tolist()
    return counts
