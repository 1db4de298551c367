"""The batches on which two engines are compared, and how either is made to form exactly them.

Each side runs this in a process of its own, beside its own packages: it needs nothing but Python. In a cell, so many
requests decode; their prompts are `context` tokens long, and they grow by one a step. Mixed cells add one chunk of a
prompt to every step: a prompt of its own each (prefix 0), or the last two chunks of a long one (from `prefix` on).
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

FILL_BUDGET = 8192  # token budget while prompts are computed that nobody measures
WARM_UP = 8  # steps of a cell that do not count
CHUNKS_MEASURED = 2  # of each long prompt
ENDLESS = 4096  # tokens to be decoded: more than any cell has steps


@dataclass(frozen=True, slots=True)
class Cell:
    """A batch to be repeated `steps` times."""

    decodes: int
    context: int
    chunk: int = 0
    prefix: int = 0
    steps: int = 40

    @property
    def name(self) -> str:
        chunk = f" + {self.chunk} prompt tokens at {self.prefix}" if self.chunk else ""
        return f"{self.decodes} decodes at {self.context}{chunk}"

    @property
    def tokens(self) -> int:
        return self.decodes + self.chunk

    @property
    def prompts(self) -> list[int]:
        """Tokens of each prompt that is computed while the decodes run."""
        if self.chunk == 0:
            return []
        if self.prefix == 0:
            return [self.chunk] * (WARM_UP + self.steps + 2)  # the first follows on none of its like
        return [self.prefix + CHUNKS_MEASURED * self.chunk] * -(-self.steps // CHUNKS_MEASURED)

    def is_held_by(self, step: "Step") -> bool:
        if step.decodes != self.decodes or sum(step.chunks) != self.chunk:
            return False
        end = self.prefix + (CHUNKS_MEASURED * self.chunk if self.prefix else 1)
        return self.chunk == 0 or (len(step.chunks) == 1 and self.prefix <= step.contexts[0] < end)


class Step(NamedTuple):
    """A step that an engine has completed: its batch (`contexts` are those of the chunks), and its times.

    `device_s` is the device's own, by events around the step's work; `waits_s` is how long the device waited for the
    host before it, where the engine tells.
    """

    decodes: int
    decode_context_tokens: int
    chunks: tuple[int, ...]
    contexts: tuple[int, ...]
    completed_s: float
    device_s: float
    waits_s: float = 0.0


class Engine(Protocol):
    """What either side offers."""

    def submit(self, prompt_tokens: int, max_tokens: int) -> None:
        """Queue a request of so many tokens, to be ended by nothing else."""

    def advance(self, budget_tokens: int) -> list[Step]:
        """One turn of the engine's loop; the steps that were found completed in it."""

    def clear(self) -> None:
        """Give up all requests, and wait until nothing runs."""


def measure(engine: Engine, cell: Cell) -> dict[str, list[float]]:
    """The cell's steps in steady state: each followed on a step of the same size. Raises RuntimeError if there is none.

    `wall_s` is the time from the completion of the step before to its own.
    """
    engine.clear()
    for _ in range(cell.decodes):
        engine.submit(cell.context, ENDLESS)
    last = _settle(engine, cell)
    for tokens in cell.prompts:
        engine.submit(tokens, 1)
    found: list[tuple[Step, float]] = []
    skip = WARM_UP if cell.prefix == 0 else 0
    patience = 2 * (WARM_UP + cell.steps + sum(cell.prompts) // max(cell.chunk, 1)) + 50
    while len(found) < cell.steps + skip and patience:
        patience -= 1
        for step in engine.advance(cell.tokens if cell.chunk else FILL_BUDGET):
            if cell.is_held_by(step) and (last.decodes, sum(last.chunks)) == (step.decodes, sum(step.chunks)):
                found.append((step, step.completed_s - last.completed_s))
            last = step
    engine.clear()
    steady = found[skip : skip + cell.steps]
    if not steady:
        raise RuntimeError(f"the engine never formed {cell.name}; its last step was {last}")
    return {
        "wall_s": [wall_s for _, wall_s in steady],
        "device_s": [step.device_s for step, _ in steady],
        "waits_s": [step.waits_s for step, _ in steady],
        "decode_context_tokens": [step.decode_context_tokens for step, _ in steady],
        "prefix": [sum(step.contexts) for step, _ in steady],
    }


def _settle(engine: Engine, cell: Cell) -> Step:
    """Until all decode and nothing else is left."""
    for _ in range(2 * cell.decodes * cell.context // FILL_BUDGET + 2 * cell.decodes + 50):
        for step in engine.advance(FILL_BUDGET):
            if step.decodes == cell.decodes and not step.chunks:
                return step
    raise RuntimeError(
        f"{cell.decodes} requests of {cell.context} tokens never decoded together: is the KV cache large?"
    )


def side_arguments(description: str) -> argparse.ArgumentParser:
    """The flags that both sides take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cells", type=Path, required=True, help="JSON list of cells")
    parser.add_argument("--out", type=Path, required=True, help="JSON; cells that it holds already are left out")
    parser.add_argument("--model", type=Path, help="folder with the config.json")
    parser.add_argument("--max-model-len", type=int, default=40_960)
    parser.add_argument("--memory", type=float, default=0.9, help="share of the device's memory")
    return parser


def run_side(engine: Engine, about: dict[str, Any], cells: Path, out: Path) -> None:
    """Measure every cell that is not there yet; a cell that fails is told and left out. Stored after each."""
    stored = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    stored["about"] = about
    for cell in read_cells(cells):
        if cell.name in stored["cells"]:
            continue
        begun_s = time.perf_counter()
        try:
            figures = measure(engine, cell)
        except Exception:  # whatever one cell does, the others are wanted
            traceback.print_exc()
            continue
        stored["cells"][cell.name] = figures
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(stored))
        partial.rename(out)
        wall_ms, device_ms = (median(figures[name]) * 1e3 for name in ("wall_s", "device_s"))
        took_s = time.perf_counter() - begun_s
        print(f"{cell.name}: wall {wall_ms:.2f} ms, device {device_ms:.2f} ms, {took_s:.1f} s", flush=True)


def read_cells(path: Path) -> list[Cell]:
    return [Cell(**fields) for fields in json.loads(path.read_text())]


def write_cells(path: Path, cells: list[Cell]) -> None:
    path.write_text(json.dumps([asdict(cell) for cell in cells]))


def clear_while(has_work: Callable[[], bool], turn: Callable[[], object]) -> None:
    """Let an engine that was told to drop its requests notice it."""
    for _ in range(1000):
        if not has_work():
            return
        turn()
    raise RuntimeError("the engine does not come to rest")
