"""The report of a comparison: one HTML file with its table, interactive plots and provenance, which opens offline."""

import html
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from envs.slo import Slo
from profiles.capacity import Interval
from profiles.results import (
    BEST_STATIC,
    BINS,
    ORACLE_STATIC,
    Comparison,
    Row,
    capacity_cell,
    cells,
    column_heads,
    label,
)

# Okabe and Ito's colours, told apart by colour-blind readers too, and a few more; the two static baselines are grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B", "#B2B200", "#17A2A2")
BASELINES = {BEST_STATIC: "#222222", ORACLE_STATIC: "#999999"}
INK, GRID_LINE = "#222222", "#e4e4e4"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 24px auto;
  padding: 0 24px; }}
h1 {{ font-size: 24px; margin: 0; }} h2 {{ font-size: 18px; margin: 36px 0 4px; }}
p {{ margin: 4px 0 12px; color: #444; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ padding: 3px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }}
th {{ border-bottom: 2px solid #888; vertical-align: bottom; }} th span {{ font-weight: normal; color: #666; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
tr.rate td {{ font-weight: 600; background: #f5f5f5; }} td.late {{ color: #b3261e; }}
i.key {{ display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }}
pre {{ background: #f5f5f5; padding: 12px; overflow-x: auto; font-size: 12px; }}
</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1>
<p>The promise: {slo} (ms). Means over {seeds} seed(s), ± half the 95 % interval (Student t). P99s above the promise,
and too few tokens on time, are red. A click on a legend entry hides its policy, a double click shows it alone.</p>
{table}
{beyond}
{sections}
<h2>Provenance</h2><pre>{provenance}</pre>
</body></html>
"""


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page. It loads nothing from anywhere."""
    sections = [
        ("capacity", "Capacity", "Most requests per second that meet the promise; whiskers: 95 % interval.", _capacity),
        (
            "goodput",
            "Goodput against rate",
            "Requests per second that kept the promise, each judged by itself.",
            _goodput,
        ),
        ("tbt", "Time between tokens", "Share of all gaps longer than x, requests of all seeds together.", _tbt),
        ("ttft", "Time to first token", "Share of all requests that waited longer than x.", _ttft),
        ("budget", "Token budget over time", "Of the first seed; some iterations, evenly spread over all.", _budget),
    ]
    parts = []
    for name, title, text, plot in sections:
        figure = plot(comparison)
        if figure.data:
            drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False})
            parts.append(f"<h2>{title}</h2><p>{text}</p>{drawn}")
    page = PAGE.format(
        title=html.escape(comparison.title),
        plotly=get_plotlyjs(),
        slo=html.escape(comparison.slo),
        seeds=len({run.seed for run in comparison.runs}),
        table=_table(comparison),
        beyond=f"<p>{html.escape(comparison.beyond_profile)}</p>" if comparison.beyond_profile else "",
        sections="\n".join(parts),
        provenance=html.escape(json.dumps(comparison.provenance, indent=1)),
    )
    path.write_text(page, encoding="utf-8")


def colours(comparison: Comparison) -> dict[str, str]:
    """One for each contender, the same in all plots."""
    return {policy: COLOURS[i % len(COLOURS)] for i, policy in enumerate(comparison.policies)} | BASELINES


def _table(comparison: Comparison) -> str:
    colour = colours(comparison)
    slo, names = Slo.parse(comparison.slo), [("policy", ""), *column_heads(comparison)]
    lines = ["<table><tr>", *(f"<th>{name}<br><span>{unit}</span></th>" for name, unit in names), "</tr>"]
    for rate, rows in groupby(comparison.rows(), lambda row: row.rate):
        lines.append(f'<tr class="rate"><td colspan="{len(names)}">at {rate:g} req/s</td></tr>')
        for row in rows:
            key = f'<i class="key" style="background:{colour[row.contender]}"></i>'
            broken = broken_figures(row, slo)
            marks = [' class="late"' if name in broken else "" for name in comparison.figures]
            texts = zip(cells(row, comparison.figures), marks, strict=True)
            lines.append(f"<tr><td>{key}{html.escape(label(row))}</td><td>{capacity_cell(row.capacity)}</td>")
            lines += [f"<td{mark}>{text}</td>" for text, mark in texts]
            lines.append("</tr>")
    return "".join([*lines, "</table>"])


def broken_figures(row: Row, slo: Slo) -> set[str]:
    """The figures that show that the promise was broken, in the mean over seeds."""
    most = {"ttft_p99_s": slo.ttft_s, "tbt_p99_s": slo.tbt_s, "tpot_p99_s": slo.tpot_s}
    means = {name: interval.mean for name, interval in row.figures.items()}
    broken = {name for name, bound_s in most.items() if bound_s is not None and means.get(name, 0.0) > bound_s}
    return broken | ({"tokens_on_time"} if means.get("tokens_on_time", 1.0) < slo.quantile else set())


def plain_figure(x: str, y: str) -> go.Figure:
    axis = {"gridcolor": GRID_LINE, "zerolinecolor": GRID_LINE, "linecolor": INK, "ticks": "outside"}
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=440,
        margin={"l": 70, "r": 20, "t": 50, "b": 55},
        font={"size": 13, "color": INK},
        hovermode="closest",
        showlegend=True,
    )
    figure.update_xaxes(title=x, **axis)
    figure.update_yaxes(title=y, automargin=True, **axis)
    return figure


def _capacity(comparison: Comparison) -> go.Figure:
    figure = plain_figure("req/s", "")
    figure.update_yaxes(autorange="reversed", showticklabels=False)
    for contender, colour in colours(comparison).items():
        capacity = comparison.capacity(contender)
        if capacity is None or contender == ORACLE_STATIC:
            continue  # the oracle's is the best single static's
        name = f"{contender} ({comparison.best_static.partition('=')[2]})" if contender == BEST_STATIC else contender
        whisker = {"type": "data", "array": [_finite(capacity)], "color": INK}
        text = f"{capacity.mean:.2f}"
        figure.add_bar(
            x=[capacity.mean],
            y=[name],
            name=name,
            orientation="h",
            marker_color=colour,
            error_x=whisker,
            text=text,
            textposition="inside",
            insidetextanchor="start",
            insidetextfont={"color": "white"},
        )
    return figure


def _goodput(comparison: Comparison) -> go.Figure:
    figure = plain_figure("offered rate (req/s)", "goodput (req/s)")
    rows = sorted(comparison.rows(), key=lambda row: comparison.contenders.index(row.contender))
    for contender, group in groupby(rows, lambda row: row.contender):
        points = list(group)
        goodput = [row.figures["goodput"] for row in points]
        whiskers = {"type": "data", "array": [_finite(interval) for interval in goodput], "thickness": 1}
        figure.add_scatter(
            x=[row.rate for row in points],
            y=[interval.mean for interval in goodput],
            name=contender,
            error_y=whiskers,
            mode="lines+markers",
            line=_line(comparison, contender),
            hovertext=[label(row) for row in points],
        )
    return figure


def _tbt(comparison: Comparison) -> go.Figure:
    slo = Slo.parse(comparison.slo)
    return _longer_than(comparison, "tbt_counts", "TBT (ms)", 1e3, slo.tbt_s, slo.quantile)


def _ttft(comparison: Comparison) -> go.Figure:
    slo = Slo.parse(comparison.slo)
    return _longer_than(comparison, "ttft_counts", "TTFT (s)", 1.0, slo.ttft_s, slo.quantile)


def _longer_than(
    comparison: Comparison, counts_name: str, title: str, factor: float, bound_s: float | None, quantile: float
) -> go.Figure:
    figure = plain_figure(title, "share longer than x")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", tickformat="~%", range=[-4, 0.05])
    for rate in comparison.rates:
        for contender in comparison.contenders:
            runs = comparison.of(comparison.policy_of(contender, rate), rate)
            counts = np.sum([getattr(run, counts_name) for run in runs], axis=0)
            longer = 1 - np.cumsum(counts) / max(counts.sum(), 1)
            kept = (longer > 0) & (longer < 1)
            first = max(int(np.argmax(kept)) - 1, 0)
            kept[first] = True
            _add_line(figure, comparison, contender, rate, BINS[1:][kept] * factor, longer[kept])
    _let_choose_rate(figure, comparison)
    if bound_s is not None:
        figure.add_vline(bound_s * factor, line={"color": "#b3261e", "dash": "dot", "width": 1.5})
        figure.add_hline(1 - quantile, line={"color": "#b3261e", "dash": "dot", "width": 1.5})
    return figure


def _budget(comparison: Comparison) -> go.Figure:
    figure = plain_figure("time (s)", "token budget")
    figure.update_yaxes(type="log", dtick=np.log10(2))
    for rate in comparison.rates:
        for contender in comparison.contenders:
            runs = comparison.of(comparison.policy_of(contender, rate), rate)
            budgets = [run.budget for run in runs if run.budget[0]]
            if budgets:
                _add_line(figure, comparison, contender, rate, *budgets[0], shape="hv")
    _let_choose_rate(figure, comparison)
    return figure


def _add_line(
    figure: go.Figure,
    comparison: Comparison,
    contender: str,
    rate: float,
    x: Iterable[float],
    y: Iterable[float],
    shape: str = "linear",
) -> None:
    line = _line(comparison, contender) | {"shape": shape}
    figure.add_scatter(x=list(x), y=list(y), name=contender, mode="lines", line=line, meta=rate)


def _let_choose_rate(figure: go.Figure, comparison: Comparison) -> None:
    """A button for each rate that shows its traces alone."""
    shown = _first_shown(comparison)
    for trace in figure.data:
        trace.visible = trace.meta == shown
    buttons = [
        {"label": f"{rate:g} req/s", "method": "restyle", "args": ["visible", [t.meta == rate for t in figure.data]]}
        for rate in comparison.rates
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "showactive": True}
    menu = {"type": "buttons", "direction": "right", "active": comparison.rates.index(shown), "buttons": buttons}
    figure.update_layout(updatemenus=[menu | place])


def _first_shown(comparison: Comparison) -> float:
    """The highest rate within the best static's capacity, where policies differ most and all still answer."""
    capacity = comparison.capacity(BEST_STATIC)
    within = [rate for rate in comparison.rates if capacity is None or rate <= capacity.mean]
    return max(within, default=comparison.rates[0])


def _line(comparison: Comparison, contender: str) -> dict[str, Any]:
    dash = {BEST_STATIC: "dash", ORACLE_STATIC: "dot"}.get(contender, "solid")
    return {"color": colours(comparison)[contender], "dash": dash, "width": 2}


def _finite(interval: Interval) -> float:
    return 0.0 if np.isnan(interval.half_width) else interval.half_width
