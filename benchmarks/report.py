"""What every benchmark script prints last: one JSON line with its figure, its goal and where it was measured."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, same measurement")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def report(name: str, figure: float, goal: str, *, ok: bool, seed: int, **more: Any) -> None:
    """Print the result line. `goal` is text such as "<= 30 us"; `more` are further figures."""
    result = {
        "name": name,
        "figure": round(figure, 4),
        "goal": goal,
        "ok": ok,
        "seed": seed,
        "machine": machine(),
        "version": importlib.metadata.version("pacer"),
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in more.items()},
    }
    print(json.dumps(result))


def machine() -> str:
    """Processor and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
