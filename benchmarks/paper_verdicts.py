"""What the runs of `benchmarks.paper_pipeline` say: the table, and predictive against the fixed schedules."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.paper_plan import PREDICTIVE

GOAL = 0.55
Row = dict[str, Any]
ORDER = ("shape", "mix", "layout", "promise")
HEADS = (
    *("ranks", "promise", "schedule", "capacity", "at once", "req/s", "kept"),
    *("TBT", "TTFT", "bubbles by stage", "ms/1k"),
)


class Verdict(NamedTuple):
    """Predictive in a pipeline, for one mix under one promise: its shares of the best fixed schedule's requests a
    second (simulated capacity; live at equal requests at once, among those that kept the promise: None if none did),
    whether it kept the promise live, and the share of the judged static budget's bubbles that it cut.
    """

    shape: str
    mix: str
    promise: str
    of_best_capacity: float
    of_best_live: float | None
    kept: bool
    bubbles_cut: float

    @property
    def ok(self) -> bool:
        live = self.of_best_live is None or self.of_best_live >= 1.0
        return self.kept and live and self.of_best_capacity >= 1.0 and self.bubbles_cut >= GOAL

    def __str__(self) -> str:
        live = "none kept it" if self.of_best_live is None else f"{self.of_best_live:.3f}"
        return (
            f"{self.shape} {self.mix} {self.promise}: {self.of_best_capacity:.3f} of the best fixed capacity "
            f"(live: {live}), promise {'kept' if self.kept else 'broken'}, {self.bubbles_cut:.1%} of the bubbles cut"
        )


def kept(row: Row) -> bool:
    return row["tbt_p99_s"] is not None and bool(row["tbt_p99_s"] <= row["promise_s"])


def judge(rows: Sequence[Row], fixed: Sequence[str]) -> Iterator[Verdict]:
    """A verdict for every pipeline, mix and promise whose runs are all there; `fixed` ends with the judged budget."""
    pipelined = [row for row in rows if row["stages"] > 1]
    for _, group in groupby(sorted(pipelined, key=_place), key=_place):
        runs = {row["policy"]: row for row in group}
        if not runs.keys() >= {PREDICTIVE, *fixed}:
            continue
        law, rivals = runs[PREDICTIVE], [runs[policy] for policy in fixed]
        best = max(row["capacity"] for row in rivals)
        best_live = max((row["requests_s"] for row in rivals if kept(row)), default=None)
        yield Verdict(
            *(law["shape"], law["mix"], law["promise"]),
            law["capacity"] / best if best else float(law["capacity"] > 0),
            None if best_live is None else law["requests_s"] / best_live,
            kept(law),
            1 - law["bubble_ms_per_ktoken"] / rivals[-1]["bubble_ms_per_ktoken"],
        )


def _place(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ORDER)


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One for each shape and mix."""
    by_mix = sorted(rows, key=lambda row: _place(row)[:2])
    for (shape, mix), group in groupby(by_mix, key=lambda row: _place(row)[:2]):
        title = f"{shape}, {mix}: capacity simulated, the rest in a closed loop; TBT in ms, TTFT in s, p50 / p99"
        table = Table(title=f"{title}; bubble ms per 1000 tokens")
        for head in HEADS:
            table.add_column(head, justify="left" if head in ("ranks", "promise", "schedule") else "right")
        for row in group:
            table.add_row(
                *(row["layout"], f"{row['promise']} {row['promise_s'] * 1e3:.0f} ms", row["policy"]),
                *(f"{row['capacity']:.2f}", str(row["at_once"]), f"{row['requests_s']:.2f}"),
                *("yes" if kept(row) else "no", pair(row, "tbt", 1e3, ".0f"), pair(row, "ttft", 1.0, ".2f")),
                *(" ".join(f"{share:.1%}" for share in stage_shares(row)), f"{row['bubble_ms_per_ktoken']:.1f}"),
            )
        yield table


def stage_shares(row: Row) -> list[float]:
    """Of every stage, the share of its time with work around in which it was idle."""
    pairs = zip(row["busy_s"], row["bubble_s"], strict=True)
    return [bubble_s / (bubble_s + busy_s) for busy_s, bubble_s in pairs]


def pair(row: Row, name: str, factor: float, form: str) -> str:
    """Two quantiles, p50 / p99, in a unit of the reader's."""
    values = (row[f"{name}_p50_s"], row[f"{name}_p99_s"])
    return " / ".join("-" if value is None else format(value * factor, form) for value in values)
