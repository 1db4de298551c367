"""`pacer bench`: replay a workload with progress on screen, print the figures, store them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from envs.slo import Slo
from envs.trace import Workload
from profiles.bench_report import format_console, summarise, write_json
from profiles.load import LoadResult, PromptKind, replay
from profiles.load import Progress as Report


@contextmanager
def progress_bar(label: str) -> Iterator[Report]:
    """A progress bar on stderr, as the callback that `replay` takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run_bench(
    workload: Workload,
    base_url: str,
    *,
    model: str | None,
    prompts: PromptKind,
    slo: Slo | None,
    grace_s: float,
    seed: int,
    save_result: Path | None,
    save_detailed: bool,
) -> int:
    """Replay and report; returns the exit status: 1 if any request failed or did not finish, 130 if interrupted."""
    rng = np.random.default_rng(seed)
    with progress_bar("requests ended") as report:
        result: LoadResult = asyncio.run(
            replay(workload, base_url, rng, model=model, prompts=prompts, grace_s=grace_s, progress=report)
        )
    summary = summarise(result, slo)
    print(format_console(summary))
    if save_result is not None:
        save_result.parent.mkdir(parents=True, exist_ok=True)
        write_json(save_result, summary, save_detailed)
    if result.interrupted:
        return 130
    return int(summary["failed"] + summary["unfinished"] > 0)
