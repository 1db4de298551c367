"""The report of a training: learning curves, and what the law does beside the predictive one. It opens offline."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from envs.outcome import FloatArray
from envs.state import LOG_COLUMNS
from policies.rl import Card
from profiles.capacity import Trial
from profiles.report import COLOURS, plain_figure

if TYPE_CHECKING:
    from policies.train import Point

POINTS = 1500  # of a scatter
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 24px auto;
  padding: 0 24px; }}
h1 {{ font-size: 24px; margin: 0; }} h2 {{ font-size: 18px; margin: 36px 0 4px; }}
p {{ margin: 4px 0 12px; color: #444; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #eee; }}
pre {{ background: #f5f5f5; padding: 12px; overflow-x: auto; font-size: 12px; }}
</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1>
<p>Capacity on the validation traces within {slo} (ms), in shares of clairvoyant's, geometric mean.</p>
<table>{scores}</table>
{sections}
<h2>Provenance</h2><pre>{card}</pre>
</body></html>
"""


class Result(NamedTuple):
    """A trained law, how each seed learned, and a trial with the rate (req/s) at which it is looked at."""

    name: str
    card: Card
    curves: "Mapping[str, Sequence[Point]]"
    trial: Trial
    rate: float


def write_report(result: Result, path: Path) -> None:
    """Write the page. It loads nothing from anywhere."""
    laws = (result.trial.policy, "predictive")
    logs = {law.partition(":")[0]: mixed_batches(result.trial, law, result.rate) for law in laws}
    at = f"Mixed batches of one run on the first validation trace at {result.rate:.3g} req/s, some of all."
    sections = [
        ("earned", "Learning", "Share of what could be earned in the validation episodes.", _curves(result, "checked")),
        ("late", "Late tokens", "Share of all tokens in these episodes.", _curves(result, "late_tokens")),
        ("decodes", "Budget against decodes", at, _against(logs, "decode_tokens", "decodes")),
        ("context", "Budget against context", at, _against(logs, "decode_context_tokens", "context of all decodes")),
    ]
    drawn = (
        f"<h2>{title}</h2><p>{text}</p>"
        + figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False})
        for name, title, text, figure in sections
    )
    rows = (f"<tr><th>{html.escape(name)}</th><td>{share:.3f}</td></tr>" for name, share in result.card.scores.items())
    page = PAGE.format(
        title=html.escape(f"Trained: {result.name}"),
        plotly=get_plotlyjs(),
        slo=html.escape(str(result.trial.slo)),
        scores="".join(rows),
        sections="\n".join(drawn),
        card=html.escape(msgspec.json.format(msgspec.json.encode(result.card), indent=1).decode()),
    )
    path.write_text(page, encoding="utf-8")


def mixed_batches(trial: Trial, law: str, rate: float) -> FloatArray:
    """Rows of the simulator's log, float64 [at most POINTS, LOG_COLUMNS]."""
    if not rate > 0.0:
        return np.zeros((0, len(LOG_COLUMNS)))
    log = replace(trial, policy=law).simulate(rate, keep_log=True).log
    decodes, prompts = (log[:, LOG_COLUMNS.index(name)] for name in ("decode_tokens", "prefill_tokens"))
    mixed = log[(decodes > 0) & (prompts > 0)]
    return mixed[:: max(1, -(-len(mixed) // POINTS))]


def _curves(result: Result, what: str) -> go.Figure:
    figure = plain_figure("iterations learned from", "share")
    for colour, (name, points) in zip(COLOURS * len(result.curves), result.curves.items(), strict=False):
        x, y = [point.steps for point in points], [getattr(point, what) for point in points]
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"color": colour, "width": 2})
    return figure


def _against(logs: Mapping[str, FloatArray], column: str, title: str) -> go.Figure:
    figure = plain_figure(title, "token budget")
    figure.update_yaxes(type="log", dtick=np.log10(2))
    for colour, (name, log) in zip(COLOURS, logs.items(), strict=False):
        x, y = (log[:, LOG_COLUMNS.index(one)].tolist() for one in (column, "budget_tokens"))
        figure.add_scatter(x=x, y=y, name=name, mode="markers", marker={"color": colour, "size": 4, "opacity": 0.5})
    return figure
