"""One workload through Vidur (PyPI `vidur` 0.0.26), by an interpreter that has it: this project never imports it.

    VIDUR_PYTHON benchmarks/vidur_run.py REQUESTS.csv --running 64 --chunk-tokens 512 --max-tokens 8192 \\
        --kv-blocks 32832 [--metrics] [--native]

REQUESTS.csv has the columns arrival_s, prompt_tokens and output_tokens. The last line is one JSON object: CPU seconds
of the run and of the training before it, iterations, simulated seconds. A process does one run: Vidur numbers its
replicas on through a process, but looks them up from 0.

Vidur fetches its profiling tables from a hub. Here they come from linear formulas instead, in its columns, laid where
its download cache would keep them, with the hub switched off: no code of Vidur is changed. The times in them are made
up; what it costs to simulate a batch does not depend on them, nor do the batches when all requests are there at the
start. Training is kept short by Vidur's own options (one forest of 16 trees per operation, no search) and timed apart.
"""

import argparse
import csv
import json
import lzma
import os
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, DEVICE, NETWORK = "meta-llama/Llama-3-8B", "h100", "h100_dgx"
COMPUTE_TABLES, NETWORK_TABLES = "local/compute", "local/network"
PRODUCTS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
SMALL = ("mlp_act", "attn_rope", "add", "input_layernorm", "post_attention_layernorm")
TRACE, DATE = "trace.csv", "2023-08-21"  # Vidur reads a trace's rows of one date
BLOCK_TOKENS = 16
KV_STEP_TOKENS = 256  # Vidur rounds contexts up to it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path)
    for name in ("running", "chunk-tokens", "max-tokens", "kv-blocks"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument(
        "--metrics", action="store_true", help="keep Vidur's metrics (no plots, no trace), as by default"
    )
    parser.add_argument("--native", action="store_true", help="Vidur's step-time lookup in C++")
    args = parser.parse_args()
    requests = list(csv.DictReader(args.requests.open()))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_trace(requests)
        save_tables(args.max_tokens, args.running, args.chunk_tokens)
        print(json.dumps(simulate(args)))


def simulate(args: argparse.Namespace) -> dict[str, float]:
    """One run; its CPU seconds include the events and, with --metrics, the results' files."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", MPLBACKEND="agg", OMP_NUM_THREADS="1")
    from vidur.entities import Batch  # type: ignore[import-not-found]  # noqa: PLC0415
    from vidur.simulator import Simulator  # type: ignore[import-not-found]  # noqa: PLC0415

    began = time.process_time()
    simulator = Simulator(configuration(args))
    ready = time.process_time()
    simulator.run()
    return {
        "seconds": time.process_time() - ready,
        "training_seconds": ready - began,
        "iterations": Batch._id + 1,
        "simulated_seconds": float(simulator._time),
    }


def configuration(args: argparse.Namespace) -> Any:
    """Sarathi's schedule on one device, with room for the KV of all that can run, so that nothing is preempted."""
    from vidur import config as v  # type: ignore[import-not-found]  # noqa: PLC0415

    return v.SimulationConfig(
        cluster_config=v.ClusterConfig(
            replica_config=v.ReplicaConfig(
                model_name=MODEL, num_pipeline_stages=1, tensor_parallel_size=1, device=DEVICE, network_device=NETWORK
            ),
            cache_config=v.CacheConfig(
                block_size=BLOCK_TOKENS, num_blocks=args.kv_blocks, watermark_blocks_fraction=0.0
            ),
            replica_scheduler_config=v.SarathiSchedulerConfig(
                batch_size_cap=args.running, chunk_size=args.chunk_tokens
            ),
        ),
        request_generator_config=v.TraceRequestGeneratorConfig(
            trace_file=TRACE,
            date=DATE,
            prefill_scale_factor=1.0,
            time_scale_factor=1.0,
            max_tokens=args.max_tokens,
        ),
        execution_time_predictor_config=v.RandomForrestExecutionTimePredictorConfig(
            model_profiling_dataset=COMPUTE_TABLES,
            network_profiling_dataset=NETWORK_TABLES,
            kv_cache_prediction_granularity=KV_STEP_TOKENS,
            prediction_max_prefill_chunk_size=args.chunk_tokens,
            prediction_max_batch_size=args.running,
            prediction_max_tokens_per_request=args.max_tokens,
            use_native_execution_time_predictor=args.native,
            k_fold_cv_splits=2,
            num_training_job_threads=1,
            cache_dir="cache",
            num_estimators=[16],
            max_depth=[16],
            min_samples_split=[2],
        ),
        metrics_config=v.MetricsConfig(
            write_metrics=args.metrics, enable_chrome_trace=False, store_plots=False, output_dir="output"
        ),
    )


def save_tables(max_tokens: int, running: int, chunk_tokens: int) -> None:
    """Milliseconds of each operation of one layer: linear in tokens, attention in tokens times context."""
    shape = {"n_embd": 4096, "n_kv_head": 8, "num_tensor_parallel_workers": 1}
    mlp_shape = {**shape, "n_head": 32, "n_expanded_embd": 14336, "use_gated_mlp": True, "vocab_size": 128256}
    attention_shape = {**shape, "n_q_head": 32, "block_size": BLOCK_TOKENS}
    slopes_ms = dict.fromkeys(PRODUCTS, 1.4e-4) | dict.fromkeys(SMALL, 2e-6)
    mlp = [
        {**mlp_shape, "num_tokens": n} | {f"time_stats.{op}.median": 3e-3 + ms * n for op, ms in slopes_ms.items()}
        for n in range(1, max_tokens + 1, 128)
    ]
    prefills = [(1, chunk) for chunk in range(32, chunk_tokens + 1, 32)]
    decodes = [(batch, 0) for batch in range(1, running + 1)]
    attention = [
        {
            **attention_shape,
            "batch_size": batch,
            "prefill_chunk_size": chunk,
            "kv_cache_size": kv,
            "time_stats.attn_kv_cache_save.median": 3e-3 + 2e-6 * max(batch, chunk),
            "time_stats.attn_prefill.median": 5e-3 + 3.3e-8 * chunk * (kv + chunk / 2),
            "time_stats.attn_decode.median": 5e-3 + 1.4e-6 * batch * kv,
        }
        for batch, chunk in prefills + decodes
        for kv in range(0, max_tokens + 1, 4 * KV_STEP_TOKENS)
    ]
    compute = download_folder("compute", COMPUTE_TABLES, {"model": MODEL, "device_sku": DEVICE})
    save_table(compute / "mlp.csv.xz", mlp)
    save_table(compute / "attention.csv.xz", attention)
    download_folder("network", NETWORK_TABLES, {"sku": NETWORK})  # one device: its tables are never read


def save_trace(requests: list[dict[str, str]]) -> None:
    with Path(TRACE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("Date", "Time", "PromptTokenCount", "CompletionTokenCount"))
        table.writerows((DATE, r["arrival_s"], r["prompt_tokens"], r["output_tokens"]) for r in requests)


def download_folder(kind: str, repository: str, description: dict[str, str]) -> Path:
    """The folder of a finished download of `repository`, as the hub's client lays it out."""
    root = Path("cache", "profiling_data", kind, f"datasets--{repository.replace('/', '--')}")
    folder = root / "snapshots" / "local"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(folder.name)
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def save_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with lzma.open(path, "wt", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
