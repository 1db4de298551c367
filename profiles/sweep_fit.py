"""A sweep from start to end: load the engine, time its batches, fit the step-time model, keep both with provenance."""

import contextlib
import hashlib
import importlib.metadata
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.csv
from rich.console import Console

from engine.config import EngineConfig, ModelSource
from engine.loader import engine_facts, load_runner
from envs.step_time import StepTimeModel
from envs.step_time_error import errors
from envs.step_time_fit import fit
from profiles.sweep_timing import Samples, Sweep, progress

CAPACITIES = ("max_budget_tokens", "max_requests", "max_model_tokens", "block_tokens", "kv_blocks", "look_ahead")
PACKAGES = ("torch", "triton", "flash-attn-4", "flash-attn", "flashinfer-python")


def run_profile(
    source: ModelSource,
    config: EngineConfig,
    out: Path,
    clock: Callable[[], int],
    seconds: float,
    about: dict[str, Any],
) -> int:
    """Measure, fit and save; returns the exit status: 1 if there was too little to fit, 130 if interrupted.

    The samples go beside `out`, the file of the model; `about` goes into the provenance. `clock` gives monotonic
    nanoseconds. Raises ValueError if the engine cannot start.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    runner, config = load_runner(source, config, clock)
    stopping: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    try:
        sweep = Sweep(runner, config, clock, config.seed, stop=lambda: bool(stopping))
        with progress(seconds) as show:
            samples = sweep.run(seconds, show)
    finally:
        signal.signal(signal.SIGINT, before)
        runner.close()
    about = about | measured_on(source, config, runner.attention_name)
    return _keep(samples, config, out, about)


def fit_samples(samples: Samples, config: EngineConfig, about: dict[str, Any]) -> StepTimeModel:
    """The step-time model, judged on the batches that were drawn for that. Raises ValueError if there are too few.

    Its seconds are those that a token waits, from one completion to the next; of a pipeline, its slowest stage's.
    """
    seconds = "device_s" if config.pipeline_parallel > 1 else "interval_s"
    sizes = samples.iterations(seconds, "sizes") if "sizes" in samples.purposes else None
    model = fit(samples.iterations(seconds, "fit"), [str(about.get("source", "pacer profile"))], sizes)
    held_out = dict(model.description.held_out)
    if "judge" in samples.purposes:
        judged = errors(model, samples.iterations(seconds, "judge"))
        held_out |= {
            f"random_{name}": {key: round(figure, 5) for key, figure in figures.items()}
            for name, figures in judged.items()
        }
    batches = Counter(samples.purposes)
    provenance = {
        **model.description.provenance,
        **about,
        "seconds": seconds,
        "batches": batches,
        "ended": samples.ended,
        "capacities": {name: getattr(config, name) for name in CAPACITIES},
        "seed": config.seed,
        "versions": model.description.provenance["versions"] | _versions(),
    }
    return StepTimeModel(msgspec.structs.replace(model.description, held_out=held_out, provenance=provenance))


def measured_on(source: ModelSource, config: EngineConfig, attention: str) -> dict[str, Any]:
    """The machine and the engine, as provenance tells them."""
    facts: dict[str, Any] = msgspec.to_builtins(engine_facts(source, config, attention))
    return {"source": "pacer profile", **facts}


def _keep(samples: Samples, config: EngineConfig, out: Path, about: dict[str, Any]) -> int:
    console = Console()
    table = out.with_suffix(".samples.csv")
    pyarrow.csv.write_csv(samples.table, table)
    console.print(f"{len(samples.rows)} iterations of {len(samples.purposes)} batches: {table} ({samples.ended})")
    about = about | {"samples_sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    try:
        model = fit_samples(samples, config, about)
    except ValueError as error:
        console.print(f"too little to fit a model to: {error}")
        return 1
    model.save(out)
    for name, figures in model.description.held_out.items():
        shown = {key: f"{figures[key]:.1%}" for key in ("median_error", "sums_median_error") if key in figures}
        if shown:
            console.print(f"{name.replace('_', ' ')}: held-out median error {next(iter(shown.values()))}")
    console.print(f"step-time model: {out}")
    return 130 if samples.ended == "interrupted" else 0


def _versions() -> dict[str, str]:
    """Of the packages that compute, where installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
