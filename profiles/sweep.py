"""`pacer profile`: how long this engine's iterations take, as a step-time model with its provenance.

The model goes to `--out` (see `envs.step_time`), what was measured beside it, as a table with a row for every iteration
(`envs.iterations.load_iterations` reads it). Ctrl-C ends the measurement early: what there is is kept, and fitted.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig
from engine.flags import add_model_flags, capacities, model_source

CUDA_S, CPU_S = 200.0, 75.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The engine's (its model and capacities), how long to measure, and where the answer goes."""
    add_model_flags(parser)
    add = parser.add_argument_group("sweep").add_argument
    add("--out", type=Path, default=Path("pacer-out/profile.json"), help="the step-time model; samples go beside it")
    add("--seconds", type=float, help=f"of measuring; default: {CPU_S:.0f}, on a GPU {CUDA_S:.0f}")


def run_asked(args: argparse.Namespace, clock: Callable[[], int], date: str) -> int:
    """Measure, fit and save as the flags ask; returns the exit status, as `profiles.sweep_fit.run_profile` does."""
    from profiles.sweep_fit import run_profile  # noqa: PLC0415  (torch: every verb reads these flags)

    source, most = model_source(args), capacities(args)["max_budget_tokens"]
    config = EngineConfig(name="profile", budget_tokens=most, chunk_tokens=most, **capacities(args))
    seconds = args.seconds or (CUDA_S if source.device == "cuda" else CPU_S)
    return run_profile(source, config, args.out, clock, seconds, {"date": date})
