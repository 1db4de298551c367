"""The ablation of Sarathi-Serve (OSDI'24, table 4): what mixing and chunking do, each alone and together.

Its setting, simulated: budget 1024, 128 requests, Poisson arrivals; step time of Yi-34B on two A100 (TP2), a formula
through the artifact's batch times (figure-2). KV memory is what 90 % of 160 GB leave beside 69 GB of weights (245 kB a
token). arXiv lengths are the preset, scaled to the paper's median prompt, since the preset is fitted to the public file
that is cut at 4k tokens. The paper's order, on both workloads: P50 TTFT is lowest with mixing alone and highest with
chunks alone; P99 TBT is lowest with both and highest with mixing alone.
"""

from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import arguments, report
from engine.config import EngineConfig, ScheduleName
from envs.simulator import Plant, Simulation
from envs.step_time import StepTimeModel
from envs.trace import make_workload

BUDGET = 1024
KV_TOKENS = 300_000
REQUESTS = 128
SCHEDULES: dict[str, ScheduleName] = {
    "mixing only (orca)": "orca",
    "chunks only": "chunks-only",
    "both (stall-free)": "stall-free",
    "neither (prefill-first)": "prefill-first",
    "request-level": "request-level",
}
MIXING, CHUNKS, BOTH = list(SCHEDULES)[:3]
WORKLOADS = {  # lengths, most tokens of a request, requests per second (the artifact's)
    "sharegpt": ("sharegpt", 8192, 1.0),
    "arxiv": ("scaled:2.586,1.0:arxiv", 16384, 0.5),
}
STEP_TIME = StepTimeModel.from_formula(
    decode_only=(46e-3, 1.1e-3, 0.0), mixed=(20e-3, 0.175e-3, 0.0, 11.4e-9, 0.0)
).with_noise(0.04)


class Figures(NamedTuple):
    p50_ttft_s: float
    p99_tbt_s: float


def run(schedule: ScheduleName, workload: str, seed: int) -> Figures:
    lengths, longest, rate = WORKLOADS[workload]
    config = EngineConfig(
        schedule=schedule,
        budget_tokens=BUDGET,
        chunk_tokens=BUDGET,
        max_budget_tokens=longest,
        max_requests=128,
        max_model_tokens=longest,
        kv_blocks=KV_TOKENS // 16,
    )
    rng = np.random.default_rng(seed)
    requests = make_workload(f"poisson:{rate}", lengths, rng, REQUESTS, longest)
    simulation = Simulation(Plant(config, STEP_TIME), requests, seed)
    simulation.run_static(BUDGET, BUDGET)
    outcome = simulation.outcome()
    return Figures(float(np.median(outcome.ttft_s)), float(np.quantile(outcome.tbt_s, 0.99)))


def main() -> None:
    args = arguments(__doc__ or "")
    seeds = range(args.seed, args.seed + (3 if args.quick else 10))
    console = Console()
    held = total = 0
    for workload in WORKLOADS:
        runs = {name: [run(schedule, workload, seed) for seed in seeds] for name, schedule in SCHEDULES.items()}
        table = Table(title=f"{workload}, mean of {len(seeds)} seeds (least to most)")
        for column in ("schedule", "P50 TTFT (s)", "P99 TBT (s)"):
            table.add_column(column, justify="left" if column == "schedule" else "right")
        for name, figures in runs.items():
            columns = np.array(figures).T
            table.add_row(name, *(f"{c.mean():.2f} ({c.min():.2f} to {c.max():.2f})" for c in columns))
        console.print(table)
        ttft, tbt = ({name: np.array(figures)[:, i] for name, figures in runs.items()} for i in (0, 1))
        ordered = [
            (ttft[MIXING], ttft[BOTH]),
            (ttft[BOTH], ttft[CHUNKS]),
            (tbt[BOTH], tbt[CHUNKS]),
            (tbt[CHUNKS], tbt[MIXING]),
        ]
        held += sum(int((lower < higher).sum()) for lower, higher in ordered)
        total += len(ordered) * len(seeds)
        means = [bool(lower.mean() < higher.mean()) for lower, higher in ordered]
        console.print(f"{workload}: TTFT mixing < both < chunks {means[:2]}; TBT both < chunks < mixing {means[2:]}")
    report(
        "the paper's ablation: pairs in its order (share, seed by seed)",
        held / total,
        ">= 1",
        ok=held == total,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
