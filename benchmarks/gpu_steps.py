"""What a step costs, ours beside vLLM's: the same model shape, random weights, the same batches, one GPU.

    python -m benchmarks.gpu_steps --vllm-path SITE [--out FOLDER]

SITE is the folder with vLLM's packages. Each engine has the GPU to itself, in a process of its own, and forms every
cell by its own scheduler (`benchmarks.step_cells`). Two times are compared: wall, from one completed step to the next
while the engine runs ahead as it does when it serves, and the device's, by events around a step's work. The floor of a
cell is the longer of two: its bytes (weights and KV cache, read once) at 4.3 TB/s, and its operations at 790 TFLOP/s,
both as measured on an H200. 256 requests of 4096 tokens are 137 GB of KV cache, more than an H200 has beside the
weights: that cell is measured at 3200. Cells that are stored in the folder are not measured again. On a CPU
(--device cpu) the built-in model and tiny cells show that the script works.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.model_folder import MISTRAL_7B, write_folder
from benchmarks.report import report
from benchmarks.step_cells import Cell, write_cells

MEAN_GOAL, WORST_GOAL, HOST_GOAL = 1.0, 1.1, 0.03
HOST_CELL = Cell(64, 1024)
BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12
SIDES = {"pacer": "benchmarks.our_steps", "vllm": "benchmarks.vllm_steps"}
Figures = dict[str, float]


def cells(quick: bool) -> list[Cell]:
    """Those of the comparison, and one of 64 decodes for the host's share."""
    decodes = [Cell(n, context) for n in (1, 32, 128) for context in (1024, 4096)]
    decodes += [HOST_CELL, Cell(256, 1024), Cell(256, 3200)]
    mixed = [Cell(32, 1024, total - 32, 0, steps=20) for total in (512, 1024, 2048, 4096)]
    behind = [
        Cell(32, 1024, chunk, 32_768 // chunk * chunk, steps=4 if quick else 12) for chunk in (480, 992, 2016, 4064)
    ]
    return [*decodes, *mixed, *behind]


def small_cells() -> list[Cell]:
    """What a CPU computes in seconds."""
    return [Cell(1, 32, steps=5), Cell(4, 64, steps=5), Cell(4, 32, 60, 0, steps=4), Cell(4, 32, 60, 240, steps=4)]


def floor_s(cell: Cell, figures: Figures, shape: dict[str, Any] = MISTRAL_7B) -> float:
    """The least time of a step: the longer of its bytes and its operations, of a model in bfloat16."""
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    kv_size = shape["num_key_value_heads"] * shape["head_dim"]
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * shape["intermediate_size"])
    head = hidden * shape["vocab_size"]
    context = figures["decode_context_tokens"] + figures["prefix"]
    moved = 2 * (matrices + head) + 4 * layers * kv_size * context
    pairs = cell.chunk * (figures["prefix"] + cell.chunk / 2) + figures["decode_context_tokens"]
    operations = 2 * (matrices * cell.tokens + head * (cell.decodes + 1))
    operations += 4 * layers * heads * shape["head_dim"] * pairs
    return float(max(moved / BYTES_PER_S, operations / FLOP_PER_S))


def summarise(raw: dict[str, list[float]]) -> Figures:
    """Median, P10 and P90 of both times; medians of what the batch held; the host's share of the wall time."""
    figures: Figures = {"steps": len(raw["wall_s"])}
    for name in ("wall_s", "device_s"):
        low, middle, high = np.quantile(raw[name], (0.1, 0.5, 0.9)).tolist()
        figures |= {name: middle, f"{name}_p10": low, f"{name}_p90": high}
    figures |= {name: float(np.median(raw[name])) for name in ("decode_context_tokens", "prefix")}
    figures["host_share"] = float(np.sum(raw["waits_s"]) / np.sum(raw["wall_s"]))
    return figures


def run_side(side: str, args: argparse.Namespace, chosen: list[Cell]) -> dict[str, Any]:
    """Run one engine's process and read what it stored; what is missing is missing."""
    out = args.out / f"{side}.json"
    listed = args.out / "cells.json"
    write_cells(listed, chosen)
    command = [sys.executable, "-m", SIDES[side], "--cells", str(listed), "--out", str(out)]
    environment = dict(os.environ)
    if args.device == "cuda":
        command += ["--model", str(write_folder(args.out / "mistral-7b"))]
    if side == "pacer":
        command += ["--device", args.device, "--attention", args.attention]
        command += ["--max-model-len", "8192", "--max-requests", "16", "--kv-blocks", "2048"] * (args.device == "cpu")
    else:
        root = Path(__file__).parent.parent
        environment |= {
            "PYTHONPATH": f"{args.vllm_path}:{root}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
    print(f"== {side}", flush=True)
    try:
        status = subprocess.run(command, env=environment, timeout=args.timeout, check=False).returncode
        if status:
            print(f"{side} ended with exit status {status}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{side} took more than {args.timeout:.0f} s and was ended", flush=True)
    return dict(json.loads(out.read_text())) if out.exists() else {"about": {}, "cells": {}}


def compare(chosen: list[Cell], ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every cell that either engine has measured; ratios where both have."""
    rows = []
    for cell in chosen:
        sides = {
            name: summarise(side["cells"][cell.name])
            for name, side in (("pacer", ours), ("vllm", theirs))
            if cell.name in side["cells"]
        }
        if not sides:
            continue
        row: dict[str, Any] = {"cell": cell.name, "tokens": cell.tokens, **sides}
        row["floor_s"] = floor_s(cell, next(iter(sides.values())))
        if len(sides) == 2:
            row |= {
                f"{name}_ratio": sides["pacer"][f"{name}_s"] / sides["vllm"][f"{name}_s"] for name in ("wall", "device")
            }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="milliseconds of a step: median (P10 to P90)")
    heads = (
        "batch",
        "tokens",
        "ours, wall",
        "vLLM, wall",
        "ratio",
        "ours, device",
        "vLLM, device",
        "ratio",
        "floor",
        "x",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "batch" else "right", no_wrap=True)
    for row in rows:
        line = [row["cell"], str(row["tokens"])]
        for name in ("wall", "device"):
            line += [_milliseconds(row.get(side), f"{name}_s") for side in ("pacer", "vllm")]
            line.append(f"{row[f'{name}_ratio']:.3f}" if f"{name}_ratio" in row else "-")
        nearest = row["pacer"] if "pacer" in row else row["vllm"]
        table.add_row(*line, f"{row['floor_s'] * 1e3:.2f}", f"{nearest['wall_s'] / row['floor_s']:.2f}")
    Console(width=180).print(table)


def _milliseconds(figures: Figures | None, name: str) -> str:
    if figures is None:
        return "-"
    middle, low, high = (figures[key] * 1e3 for key in (name, f"{name}_p10", f"{name}_p90"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vllm-path", type=Path, help="folder with vLLM 0.24 and what it needs; without it ours is measured alone")
    add("--out", type=Path, default=Path("pacer-out/gpu-steps"), help="folder; what it holds is not measured again")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--attention", default="auto", help="our backend")
    add("--sides", nargs="+", choices=tuple(SIDES), default=tuple(SIDES), help="which to measure now")
    add("--timeout", type=float, default=400.0, help="seconds that one side may take")
    add("--quick", action="store_true", help="fewer steps behind long prefixes")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = cells(args.quick) if args.device == "cuda" else small_cells()
    stored = {}
    for side in SIDES:
        path = args.out / f"{side}.json"
        if side not in args.sides or (side == "vllm" and args.vllm_path is None):
            stored[side] = json.loads(path.read_text()) if path.exists() else {"about": {}, "cells": {}}
            print(f"{side} is not measured now; {len(stored[side]['cells'])} cells are stored", flush=True)
        else:
            stored[side] = run_side(side, args, chosen)
    rows = compare(chosen, stored["pacer"], stored["vllm"])
    show(rows)
    judged = [row for row in rows if "wall_ratio" in row and row["cell"] != HOST_CELL.name]
    ratios = {name: np.array([row[f"{name}_ratio"] for row in judged]) for name in ("wall", "device")}
    means = {name: float(np.exp(np.log(r).mean())) if r.size else float("nan") for name, r in ratios.items()}
    worst = {name: float(r.max()) if r.size else float("nan") for name, r in ratios.items()}
    host = next((row["pacer"]["host_share"] for row in rows if row["cell"] == HOST_CELL.name and "pacer" in row), None)
    about = {side: stored[side]["about"] for side in SIDES}
    (args.out / "steps.json").write_text(
        json.dumps({"about": about, "rows": rows, "mean": means, "worst": worst}, indent=1)
    )
    report(
        "step time, ours / vLLM (wall, geometric mean of the cells)",
        means["wall"],
        f"<= {MEAN_GOAL}, none above {WORST_GOAL}; the device waits for the host <= {HOST_GOAL} at 64 decodes",
        ok=bool(means["wall"] <= MEAN_GOAL and worst["wall"] <= WORST_GOAL and host is not None and host <= HOST_GOAL),
        seed=args.seed,
        cells=len(judged),
        worst_wall=worst["wall"],
        mean_device=means["device"],
        worst_device=worst["device"],
        host_share_at_64=host,
    )


if __name__ == "__main__":
    main()
