"""`pacer compare --live`: the same comparison on a real engine that the command starts, by what its clients measure.

One engine for each schedule, one sidecar for each policy, and for every policy the same requests. Capacity is not
searched for: that would take hours.
"""

import argparse
import shlex
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from engine.config import EngineConfig
from envs.slo import Slo
from envs.trace import make_workload
from profiles.bench_report import DETAIL_KEYS
from profiles.capacity import CLAIRVOYANT, PolicySpec
from profiles.compare import present, run_compare
from profiles.compare_flags import provenance, question
from profiles.live_engine import LiveEngine, Start, live_engine
from profiles.results import Comparison, Run, histogram

REQUESTS = 60


def run_asked(start: Start, args: argparse.Namespace, when: str) -> int:
    """Compare as the flags of `pacer compare` ask, in simulation or live; returns the exit status."""
    if args.live is None:
        return run_compare(question(args, when), args.out, args.processes)
    return run_live(start, args, when)


def run_live(start: Start, args: argparse.Namespace, when: str) -> int:
    """Compare, print the table, write comparison.json and report.html to the folder; returns the exit status."""
    statics = [f"static:budget={budget}" for budget in args.grid or ()]
    statics += [policy for policy in args.policies if policy.startswith("static:") and policy not in statics]
    specs = [PolicySpec.parse(policy) for policy in dict.fromkeys((*args.policies, *statics))]
    if not args.rates:
        raise ValueError("--live needs --rates: name the requests per second to send, such as --rates 1 2")
    if any(spec.clairvoyant for spec in specs):
        raise ValueError(f"policy {CLAIRVOYANT!r} exists in simulation alone: leave it out of --policies")
    if not statics:
        raise ValueError("--live has no static budget to compare with: name some with --grid, such as --grid 64 512")
    longest = args.max_model_len or EngineConfig().max_model_tokens
    flags = [*shlex.split(args.live), "--max-model-len", str(longest)]
    rates = sorted(set(args.rates))
    runs = []
    for schedule in dict.fromkeys(spec.schedule for spec in specs):
        policies = [spec.law for spec in specs if spec.schedule == schedule]
        with live_engine(start, "compare", 0, *flags, *(["--schedule", schedule] if schedule else [])) as engine:
            for seed, rate, law in product(range(args.seeds), rates, policies):
                policy = f"{law}@{schedule}" if schedule else law
                Console(stderr=True).print(f"{policy} at {rate:g} req/s, seed {seed}")
                runs.append(_measure(engine, args, law, policy, rate, seed, longest))
    title = f"{args.trace}, live"
    source = provenance(args, when)
    present(Comparison(title, args.slo, list(args.policies), statics, rates, {}, runs, source), args.out)
    return 0


def _measure(
    engine: LiveEngine, args: argparse.Namespace, law: str, policy: str, rate: float, seed: int, longest: int
) -> Run:
    rng = np.random.default_rng(seed)
    workload = make_workload(args.arrivals, args.trace, rng, args.num_prompts or REQUESTS, longest).at_rate(rate)
    folder: Path = args.out / "runs" / f"{policy.replace(':', '-')}_{rate:g}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    slo = Slo.parse(args.slo)
    profile = ["--profile", str(args.profile)] if args.profile else []
    return run_of(engine.replay_under(law, slo, workload, folder, *profile), policy, rate, seed)


def run_of(summary: dict[str, Any], policy: str, rate: float, seed: int) -> Run:
    """A replay's summary with its details (`DETAIL_KEYS`), as a run.

    TTFT of a request without a first token is how long it has waited; one that failed or did not finish is a miss.
    """
    assert all(key in summary for key in DETAIL_KEYS)
    sent = zip(summary["ttfts"], summary["start_times"], strict=True)
    ttft_s = np.array([ttft_s or summary["duration"] - start_s for ttft_s, start_s in sent])
    tbt_s = np.concatenate([np.array(gaps, np.float64) for gaps in summary["itls"]])
    ttft_p50_s, ttft_p99_s = np.quantile(ttft_s, (0.5, 0.99)).tolist()
    tbt_p50_s, tbt_p99_s = np.quantile(tbt_s, (0.5, 0.99)).tolist() if tbt_s.size else (0.0, 0.0)
    figures = {
        "ttft_p50_s": ttft_p50_s,
        "ttft_p99_s": ttft_p99_s,
        "tbt_p50_s": tbt_p50_s,
        "tbt_p99_s": tbt_p99_s,
        "goodput": summary["request_goodput"],
        "throughput": summary["output_throughput"],
        "finished": summary["completed"] / summary["num_prompts"],
    }
    if summary.get("share_of_tokens_in_slo") is not None:
        figures["tokens_in_slo"] = summary["share_of_tokens_in_slo"]
    if summary.get("share_of_tokens_on_time") is not None:
        figures["tokens_on_time"] = summary["share_of_tokens_on_time"]
    if Slo.parse(summary["slo"]).tpot_s is not None:
        figures["tpot_p99_s"] = 1e-3 * (summary["p99_tpot_ms"] or 0.0)
    return Run(policy, seed, rate, figures, histogram(tbt_s), histogram(ttft_s))
