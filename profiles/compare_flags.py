"""The flags of `pacer compare`, and the question that they ask."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from engine.batching import SCHEDULES
from engine.config import EngineConfig
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.trace import ARRIVALS_HELP, LENGTHS_HELP, make_workload
from policies.catalogue import LAWS
from profiles.compare import GRID, SHARES, Question

H200 = Path(__file__).parent / "data" / "h200-mistral-7b.json"
POLICIES = (
    *(f"static:budget={budget}" for budget in (512, 2048, 8192)),
    *("pid", "aimd", "qoserve", "predictive", "clairvoyant"),
)
POLICIES_HELP = (
    "LAW[:NAME=VALUE,...][@SCHEDULE]; laws: clairvoyant (knows the true step time: the bound of all), "
    f"{', '.join(LAWS)}; schedules: {', '.join(SCHEDULES)}, as in static:budget=512@prefill-first"
)
REQUESTS = 1500
LONGEST = 131_072
FALLBACK_BUDGET = 512  # until the first decision acts
SELF_TIMED = ("phases", "day", "trace")  # arrivals that fix the number of requests


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All but where the answer goes has a default: the conversation workload on an H200, within 40 ms."""
    add = parser.add_argument
    grid = (
        f"static budgets, best and oracle among them; default: {', '.join(map(str, GRID))}; live: those of --policies"
    )
    shares = ", ".join(f"{share:g}" for share in SHARES)
    add("--trace", default="conversation", metavar="LENGTHS", help=LENGTHS_HELP)
    add("--arrivals", default="poisson:1", help=f"at each rate stretched to it: {ARRIVALS_HELP}")
    add("--slo", default="tbt:40", help='the promise in milliseconds, as in "tbt:40 ttft:2000"')
    add("--policies", nargs="+", default=POLICIES, metavar="POLICY", help=POLICIES_HELP)
    add("--grid", nargs="+", type=int, metavar="TOKENS", help=grid)
    add("--rates", nargs="+", type=float, default=(), help=f"req/s; default: {shares} of the best static's capacity")
    add("--seeds", type=int, default=3, help="how many; each has requests and noise of its own")
    add("--num-prompts", type=int, help=f"requests of a run; default: {REQUESTS}, where the arrivals do not fix it")
    add("--profile", type=Path, help="step-time model of the machine, as JSON; simulated default: an H200's")
    add("--max-num-seqs", type=int, default=256, help="most requests running at once")
    add("--max-num-batched-tokens", type=int, default=8192, help="largest budget ever allowed")
    add("--max-model-len", type=int, help="leave out requests longer than this; default: 131072; live: 2048")
    add("--kv-blocks", type=int, default=55_000, help="of 16 tokens")
    add("--dead-time", type=int, default=1, help="iterations from a report until its answer acts")
    live = "on a real engine, started here with these flags of `pacer serve`; then --rates are needed"
    add("--live", nargs="?", const="", metavar="FLAGS", help=live)
    add("--processes", type=int, help="default: one for each processor")
    add("--out", type=Path, default=Path("pacer-out/compare"), help="folder for comparison.json and report.html")


def question(args: argparse.Namespace, when: str) -> Question:
    """What the flags ask. Raises ValueError with the remedy for what does not fit together."""
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; it must be at least 1")
    longest = args.max_model_len or LONGEST
    fallback = min(FALLBACK_BUDGET, args.max_num_batched_tokens)
    config = EngineConfig(
        budget_tokens=fallback,
        chunk_tokens=fallback,
        max_requests=args.max_num_seqs,
        max_budget_tokens=args.max_num_batched_tokens,
        max_model_tokens=longest,
        kv_blocks=args.kv_blocks,
    )
    kind = args.arrivals.partition(":")[0]
    n_requests = args.num_prompts or (None if kind in SELF_TIMED else REQUESTS)
    workloads = {
        seed: make_workload(args.arrivals, args.trace, np.random.default_rng(seed), n_requests, longest)
        for seed in range(args.seeds)
    }
    return Question(
        f"{args.trace}, {kind} arrivals",
        Plant(config, StepTimeModel.load(args.profile or H200), args.dead_time),
        workloads,
        Slo.parse(args.slo),
        tuple(args.policies),
        tuple(args.grid or GRID),
        tuple(sorted(set(args.rates))),
        provenance(args, when),
    )


def provenance(args: argparse.Namespace, when: str) -> dict[str, Any]:
    """What the figures come from: the flags, the versions and the machine."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        "when": when,
        "flags": {name: value for name, value in flags.items() if name not in ("verb", "run", "processes")},
        "versions": {name: importlib.metadata.version(name) for name in ("pacer", "numpy", "numba")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
