"""`pacer tune`: from a step-time profile, a trace and a promise to start-up knobs and law parameters, by simulation.

One study for each law, the static budget first: its best knobs are those that the laws start from and fall back to.
Beside each stand random search and a grid of equal cost. All are kept in a database, trial by trial: an interrupted
call goes on where it was, and several calls on one database share the work.
"""

import argparse
import math
from collections.abc import Callable

from rich.console import Console

from engine.tuned import SUFFIX
from profiles.parallel import worker_pool
from profiles.tune_baselines import Verdict
from profiles.tune_flags import STATIC, problem
from profiles.tune_report import write_report
from profiles.tune_results import screen_table, tuned_of
from profiles.tune_storage import shown, storage_errors
from profiles.tuner import Tuner

TABLE_WIDTH = 150


def run_asked(args: argparse.Namespace, clock: Callable[[], int], date: str) -> int:
    """Tune what the flags ask, print the table, write the tuned knobs and the report; returns the exit status.

    `clock` is in monotonic nanoseconds. Ctrl-C ends it at once; what was found so far is kept.
    """
    asked, title, provenance = problem(args, date)
    args.out.mkdir(parents=True, exist_ok=True)
    path, report = args.out / f"{args.profile.stem}{SUFFIX}", args.out / "report.html"
    url = args.storage or f"sqlite:///{(args.out / 'study.db').resolve()}"
    console = Console(width=max(Console().width, TABLE_WIDTH))
    began_ns, seconds = clock(), args.timeout or math.inf
    laws = [law for law in dict.fromkeys(args.policies) if law != STATIC]
    verdicts: list[Verdict] = []
    try:
        with storage_errors(url), worker_pool(args.processes) as pool:
            left = lambda: seconds - (clock() - began_ns) * 1e-9  # noqa: E731
            tuner = Tuner(url, pool, args.seed, args.trials, left, Console(stderr=True))
            for verdict in tuner.verdicts(asked, laws):
                verdicts.append(verdict)
                tuned = tuned_of(asked, verdicts, url, provenance)
                tuned.save(path)
    except KeyboardInterrupt:
        console.print(
            f"Interrupted. Every finished trial is kept in {shown(url)}: the same command goes on.", soft_wrap=True
        )
        raise
    write_report(url, [verdict.study for verdict in verdicts], tuned, report)
    console.print(screen_table(title, asked, verdicts))
    for verdict in verdicts:
        console.print(verdict.text, soft_wrap=True)
    if untuned := laws[len(verdicts) - 1 :]:
        console.print(f"Not tuned, for want of time: {', '.join(untuned)}. Give a longer --timeout.", soft_wrap=True)
    console.print(f"Tuned: {path}; report: {report}; studies: {shown(url)}", soft_wrap=True)
    return 0
