"""What tuning found: the table on the screen, and the tuned knobs with their provenance."""

import importlib.metadata
from typing import Any

import msgspec
from rich.table import Table

from engine.tuned import EngineFacts, Tuned
from profiles.capacity import Interval
from profiles.tune_baselines import Verdict
from profiles.tune_objective import TTFT_SHARE, Problem, Score, profile_digest, workload_digest
from profiles.tune_space import static_knobs
from profiles.tune_storage import shown
from profiles.tune_study import Progress, load_study

SEARCHES = ("tuned", "random", "grid")


def screen_table(title: str, problem: Problem, verdicts: list[Verdict]) -> Table:
    """Means over the seeds and half the 95 % interval."""
    quantile = f"P{100 * problem.slo.quantile:g}"
    table = Table(
        title=f"{title}; SLO {problem.slo}; TTFT at {TTFT_SHARE:.0%} of the guess's capacity",
        caption="a run: the requests of one seed, simulated once at one rate",
    )
    for column in ("", "capacity req/s", f"TTFT {quantile} s", "runs", "trials", "best"):
        table.add_column(column, justify="left" if column in ("", "best") else "right")
    for verdict in verdicts:
        if verdict is verdicts[0]:
            table.add_row("guess", *_figures(verdict.guess), str(verdict.guess.runs), "1", _text(verdict.guess))
        for name in SEARCHES:
            progress: Progress = getattr(verdict, name)
            found = (*_figures(progress.best), str(progress.runs), str(progress.trials), _text(progress.best))
            table.add_row(f"{verdict.law}: {name}", *found)
        table.add_section()
    return table


def tuned_of(problem: Problem, verdicts: list[Verdict], url: str, provenance: dict[str, Any]) -> Tuned:
    """The first verdict is the static's. The law with the highest capacity is the one to run, the static if equal.

    It is what any of the searches found, random search and the grid included.
    """
    static = verdicts[0].best
    assert static is not None
    found = [(verdict, verdict.best) for verdict in verdicts if verdict.best is not None]
    best = max(found, key=lambda pair: pair[1].capacity)[1]
    budget, chunk = static_knobs(static.policy)
    loads = {str(seed): workload_digest(load) for seed, load in sorted(problem.workloads.items())}
    config, description = problem.plant.config, problem.plant.step_time.description
    flags = provenance.get("flags", {})
    return Tuned(
        budget_tokens=budget,
        chunk_tokens=chunk,
        max_requests=static.max_requests,
        policy=best.policy,
        laws={verdict.law: score.policy for verdict, score in found},
        slo=str(problem.slo),
        engine=EngineFacts.of(description.provenance),
        schedule=config.schedule,
        tile_tokens=config.tile_tokens,
        kv_tokens=config.bounds.kv_tokens,
        max_model_tokens=config.max_model_tokens,
        step_time=msgspec.to_builtins(description),
        provenance={
            **provenance,
            "versions": {**provenance.get("versions", {}), "optuna": importlib.metadata.version("optuna")},
            "profile": {"file": flags.get("profile"), "digest": profile_digest(problem.plant.step_time)},
            "trace": {"text": flags.get("trace"), "arrivals": flags.get("arrivals"), "digests": loads},
            "studies": {verdict.law: {"storage": shown(url), "name": verdict.study} for verdict in verdicts},
            "scores": {verdict.law: _scores(verdict, url) for verdict in verdicts},
        },
    )


def _scores(verdict: Verdict, url: str) -> dict[str, Any]:
    searches: dict[str, Progress] = {name: getattr(verdict, name) for name in SEARCHES}
    return {
        "guess": _score(verdict.guess),
        **{name: {**_score(p.best), "trials": p.trials, "runs": p.runs} for name, p in searches.items()},
        "beat_random": verdict.beaten,
        "pareto_front": [
            {"policy": s.policy, "max_requests": s.max_requests, "capacity": s.values[0], "ttft_s": s.values[1]}
            for s in front_of(url, verdict.study)
        ],
    }


def front_of(url: str, name: str) -> list[Score]:
    """A study's trials that keep its constraint and that no other beats in both objectives; best capacity first."""
    scores = {Score.of(trial).values: Score.of(trial) for trial in load_study(url, name).best_trials}
    return [scores[values] for values in sorted(scores, reverse=True)]


def _score(score: Score | None) -> dict[str, Any]:
    if score is None:
        return {"capacity": 0.0}
    capacity, ttft_s = Interval.of(score.capacities), Interval.of(score.ttft_s)
    return {
        "policy": score.policy,
        "max_requests": score.max_requests,
        "capacity": capacity.mean,
        "capacity_half_width": capacity.half_width,
        "ttft_s": ttft_s.mean,
        "ttft_half_width_s": ttft_s.half_width,
    }


def _figures(score: Score | None) -> tuple[str, str]:
    if score is None:
        return "-", "-"
    capacity, ttft_s = Interval.of(score.capacities), Interval.of(score.ttft_s)
    return f"{capacity.mean:.3f} ± {capacity.half_width:.3f}", f"{ttft_s.mean:.3f} ± {ttft_s.half_width:.3f}"


def _text(score: Score | None) -> str:
    return f"{score.policy}, {score.max_requests} sequences" if score else "none keeps the SLO"
