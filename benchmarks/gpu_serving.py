"""The conversation trace served, ours beside vLLM's: TTFT and TBT under the same static budgets, the same requests.

    python -m benchmarks.gpu_serving --vllm-path SITE [--trace FILE] [--out FOLDER]

One server at a time has the GPU; the load generator (`profiles.load`) sends token ids over HTTP, one minute of Poisson
arrivals a run. A static budget is set from outside while the server runs: ours by a sidecar with the law `static`,
whose journal keeps all telemetry (`telemetry.parquet`, and what `benchmarks.live_runs.read_live` reads), vLLM's by a
scheduler that reads it from a file (`benchmarks.vllm_budget`). Runs that the folder holds are not made again. On a CPU
(--device cpu) the built-in model and a light load show that the script works.
"""

import argparse
import asyncio
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.live_runs import served, start
from benchmarks.model_folder import write_folder
from benchmarks.report import report
from benchmarks.vllm_server import vllm_server
from envs.trace import LENGTHS_HELP, Workload, make_workload
from profiles.bench import progress_bar
from profiles.bench_report import summarise, write_json
from profiles.live_engine import live_engine
from profiles.load import replay

GOAL = 1.1
LONGEST = 16_384
FIGURES = {
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "TTFT p99",
    "median_itl_ms": "TBT p50",
    "p99_itl_ms": "TBT p99",
}
Serve = Callable[[int, Workload, Path], None]
"""Serves a workload under a budget, and leaves the figures in the folder."""


def serve_flags(args: argparse.Namespace, longest: int) -> list[str]:
    """Of `pacer serve`: Mistral-7B's shape, its folder in `args.out`, or on a CPU the built-in model."""
    flags = ["--max-model-len", str(longest), "--attention", args.attention]
    if args.device == "cpu":
        return flags
    folder = write_folder(args.out / "mistral-7b")
    flags += ["--model", str(folder), "--load-format", "dummy", "--device", "cuda"]
    return [*flags, "--max-num-seqs", "256", "--max-num-batched-tokens", "8192"]


@contextmanager
def ours(args: argparse.Namespace) -> Iterator[Serve]:
    flags = serve_flags(args, LONGEST if args.device == "cuda" else 2048)
    with live_engine(start, "serving", args.seed, *flags) as engine:

        def serve(budget: int, workload: Workload, folder: Path) -> None:
            engine.replay_under(f"static:budget={budget}", None, workload, folder)

        yield serve


@contextmanager
def theirs(args: argparse.Namespace) -> Iterator[Serve]:
    model = write_folder(args.out / "mistral-7b")
    with vllm_server(args.vllm_path, model, LONGEST, args.out) as server:

        def serve(budget: int, workload: Workload, folder: Path) -> None:
            server.set_budget(budget)
            with progress_bar(f"vLLM, budget {budget}") as progress:
                rng = np.random.default_rng(args.seed)
                result = asyncio.run(replay(workload, server.base_url, rng, progress=progress))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "bench.json", summarise(result))

        yield serve


def requests(args: argparse.Namespace, rate: float, seconds: float) -> Workload:
    longest = LONGEST if args.device == "cuda" else 2048
    rng = np.random.default_rng(args.seed)
    return make_workload(f"poisson:{rate}", args.trace, rng, max(round(rate * seconds), 2), longest)


def serve_all(engine: str, args: argparse.Namespace) -> None:
    """Make every run of an engine that is not there yet; one that fails is told and left out."""
    left = [
        (rate, budget)
        for rate, budget in product(args.rates, args.budgets)
        if not served(run_folder(args.out, engine, rate, budget))
    ]
    if not left:
        return
    print(f"== {engine}", flush=True)
    try:
        with (ours if engine == "pacer" else theirs)(args) as serve:
            # Kernels that are compiled at their first use are no part of the comparison.
            serve(args.budgets[-1], requests(args, args.rates[0], 4.0), args.out / engine / "warm-up")
            for rate, budget in left:
                try:
                    serve(budget, requests(args, rate, args.seconds), run_folder(args.out, engine, rate, budget))
                except Exception:  # the other runs are wanted
                    traceback.print_exc()
    except Exception:
        traceback.print_exc()


def run_folder(out: Path, engine: str, rate: float, budget: int) -> Path:
    return out / engine / f"{rate:g}-{budget}"


def read_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every rate and budget: each engine's figures where it has run, and their ratios where both have."""
    rows = []
    for rate, budget in product(args.rates, args.budgets):
        row: dict[str, Any] = {"rate": rate, "budget": budget}
        for engine in ("pacer", "vllm"):
            path = run_folder(args.out, engine, rate, budget) / "bench.json"
            if path.exists():
                row[engine] = json.loads(path.read_text())
        if "pacer" in row and "vllm" in row:
            row["ratios"] = {name: row["pacer"][name] / row["vllm"][name] for name in FIGURES}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="ours / vLLM's = ratio; milliseconds")
    for head in ("req/s", "budget", *FIGURES.values(), "output tok/s", "not finished"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        sides = [row.get("pacer"), row.get("vllm")]
        line = [f"{row['rate']:g}", str(row["budget"])]
        for name in FIGURES:
            pair = " / ".join("-" if side is None else f"{side[name]:.1f}" for side in sides)
            line.append(pair + (f" = {row['ratios'][name]:.2f}" if "ratios" in row else ""))
        line.append(" / ".join("-" if side is None else f"{side['output_throughput']:.0f}" for side in sides))
        line.append(" / ".join("-" if side is None else str(side["failed"] + side["unfinished"]) for side in sides))
        table.add_row(*line)
    Console(width=190).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vllm-path", type=Path, help="folder with vLLM 0.24 and what it needs; without it ours is served alone")
    add("--trace", default="conversation", metavar="LENGTHS", help=LENGTHS_HELP)
    add("--rates", type=float, nargs="+", default=(16.0, 24.0))
    add("--budgets", type=int, nargs="+", default=(512, 2048, 8192))
    add("--seconds", type=float, default=60.0, help="of arrivals in each run")
    add("--out", type=Path, default=Path("pacer-out/gpu-serving"), help="folder; runs that it holds are not made again")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--attention", default="auto", help="our backend")
    add("--engines", nargs="+", choices=("pacer", "vllm"), default=("pacer", "vllm"), help="which to serve with now")
    add("--quick", action="store_true", help="20 seconds of arrivals")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.seconds = min(args.seconds, 20.0) if args.quick else args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    for engine in args.engines:
        if engine == "vllm" and args.vllm_path is None:
            print("vLLM is not served: give --vllm-path", flush=True)
            continue
        serve_all(engine, args)
    rows = read_runs(args)
    show(rows)
    (args.out / "serving.json").write_text(
        json.dumps({"trace": args.trace, "seconds": args.seconds, "rows": rows}, indent=1)
    )
    ratios = [ratio for row in rows if "ratios" in row for ratio in row["ratios"].values()]
    worst = max(ratios, default=float("nan"))
    report(
        "served latency, ours / vLLM (worst of TTFT and TBT at p50 and p99, all runs)",
        worst,
        f"<= {GOAL}",
        ok=bool(worst <= GOAL),
        seed=args.seed,
        runs=len(rows),
        compared=sum("ratios" in row for row in rows),
        trace=args.trace,
        seconds=args.seconds,
    )


if __name__ == "__main__":
    main()
