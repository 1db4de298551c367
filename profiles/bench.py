"""`pacer bench`: replay a workload with progress on screen, print the figures, store them."""

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from envs.slo import Slo
from envs.trace import make_workload
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


def run_asked(args: argparse.Namespace) -> int:
    """Replay and report; returns the exit status: 1 if any request failed or did not finish, 130 if interrupted."""
    rng = np.random.default_rng(args.seed)
    workload = make_workload(args.arrivals, args.lengths, rng, args.num_prompts, args.max_model_len)
    slo = Slo.parse(args.goodput) if args.goodput else None
    prompts: PromptKind = "text" if args.text else "ids"
    rng = np.random.default_rng(args.seed)
    with progress_bar("requests ended") as report:
        result: LoadResult = asyncio.run(
            replay(workload, args.base_url, rng, model=args.model, prompts=prompts, grace_s=args.grace, progress=report)
        )
    summary = summarise(result, slo)
    print(format_console(summary))
    if args.save_result is not None:
        args.save_result.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.save_result, summary, args.save_detailed)
    if result.interrupted:
        return 130
    return int(summary["failed"] + summary["unfinished"] > 0)
