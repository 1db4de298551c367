"""The report of a tuning: what was found and Optuna's own plots of every study, in one HTML file that opens offline."""

import html
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import plot_optimization_history, plot_param_importances, plot_pareto_front, plot_slice
from plotly.offline import get_plotlyjs

from engine.tuned import Tuned
from profiles.tune_study import load_study

LEAST_FOR_IMPORTANCE = 4  # fitted by trees: of fewer trials it says nothing
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 24px auto;
  padding: 0 24px; }}
h1 {{ font-size: 24px; margin: 0; }} h2 {{ font-size: 20px; margin: 40px 0 4px; }}
h3 {{ font-size: 16px; margin: 24px 0 4px; }} p {{ margin: 4px 0 12px; color: #444; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #eee; }}
pre {{ background: #f5f5f5; padding: 12px; overflow-x: auto; font-size: 12px; }}
</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1>
<p>The promise: {slo} (ms). Run by <code>--tuned FILE</code>.</p>
<table>{rows}</table>
{studies}
<h2>The file, without its step-time model</h2><pre>{file}</pre>
</body></html>
"""


def write_report(url: str, names: list[str], tuned: Tuned, path: Path) -> None:
    """Write the page of the studies `names` in the storage at `url`. It loads nothing from anywhere.

    It shows what `tuned` holds, but not the hundreds of numbers of its step-time model.
    """
    rows = {
        "policy": tuned.policy,
        "budget": f"{tuned.budget_tokens} tokens",
        "chunk": f"{tuned.chunk_tokens} tokens",
        "most sequences": str(tuned.max_requests),
    }
    rows |= {f"best {law}": text for law, text in tuned.laws.items() if text != tuned.policy}
    shown = msgspec.structs.replace(tuned, step_time=None)
    page = PAGE.format(
        title=html.escape(f"Tuned: {tuned.policy}"),
        plotly=get_plotlyjs(),
        slo=html.escape(tuned.slo),
        rows="".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items()),
        studies="\n".join(_section(load_study(url, name), i) for i, name in enumerate(names)),
        file=html.escape(msgspec.json.format(msgspec.json.encode(shown), indent=1).decode()),
    )
    path.write_text(page, encoding="utf-8")


def _section(study: optuna.Study, number: int) -> str:
    """A study's plots. One that its trials are too few or too much alike for is left out, and said so."""
    trials = study.get_trials(deepcopy=False)
    count = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    told = ", ".join(f"{n} {state.name.lower()}" for state, n in count.items() if n)
    parts = [f"<h2>{html.escape(study.study_name)}</h2><p>Trials: {told or 'none'}.</p>"]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for i, (title, text, plot) in enumerate(_plots(study, complete)):
        drawn = plot().update_layout(height=440, template="plotly_white", title=None)
        div = drawn.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"study{number}-{i}", config={"displaylogo": False}
        )
        parts.append(f"<h3>{html.escape(title)}</h3><p>{html.escape(text)}</p>{div}")
    if not complete:
        parts.append("<p>No trial is complete: there is nothing to plot.</p>")
    return "\n".join(parts)


def _plots(study: optuna.Study, complete: list[FrozenTrial]) -> list[tuple[str, str, Callable[[], go.Figure]]]:
    """Title, text and plot: history and importance of each objective, all of them against each parameter, the front."""
    if not complete:
        return []
    names = study.metric_names or [f"objective {i}" for i in range(len(study.directions))]
    searched = [name for name in complete[0].params if len({trial.params.get(name) for trial in complete}) > 1]
    plots: list[tuple[str, str, Callable[[], go.Figure]]] = []
    for i, name in enumerate(names):
        value, direction = _objective(i), study.directions[i].name.lower()
        sign = -1 if direction == "maximize" else 1

        def history(value: Callable[[FrozenTrial], float] = value, name: str = name) -> go.Figure:
            return plot_optimization_history(study, target=value, target_name=name)

        def importance(value: Callable[[FrozenTrial], float] = value, name: str = name, sign: int = sign) -> go.Figure:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks what makes the target low, and says so: hence the sign
                return plot_param_importances(study, target=lambda trial: sign * value(trial), target_name=name)

        def against(value: Callable[[FrozenTrial], float] = value, name: str = name) -> go.Figure:
            return plot_slice(study, params=searched, target=value, target_name=name)

        plots.append((f"History: {name}", f"Of every complete trial, to {direction}.", history))
        if searched:
            plots.append((f"Against each parameter: {name}", "Darker is later.", against))
        if len(searched) > 1 and len(complete) >= LEAST_FOR_IMPORTANCE and len({value(t) for t in complete}) > 1:
            plots.append((f"Importance for {name}", "How much a parameter matters for the best trials.", importance))
    if len(study.directions) > 1:
        text = "Trials that no other beats in all objectives; those that miss the promise are grey."
        plots.append(("Pareto front", text, lambda: plot_pareto_front(study, target_names=list(names))))
    return plots


def _objective(i: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: trial.values[i]
