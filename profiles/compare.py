"""`pacer compare`: policies against each other and against static budgets, on the same simulated requests.

Every comparison holds the best single static budget of a grid (by capacity) and the oracle static (at each rate the
one of the grid with the highest goodput), whatever policies are asked for. Figures are means over seeds with Student t
intervals. A request that has not finished `GRACE_S` after the last arrival is a miss.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from envs.iterations import COMPOSITION
from envs.outcome import Outcome
from envs.simulator import Plant
from envs.slo import Slo
from envs.state import LOG_COLUMNS
from envs.trace import Workload
from profiles.capacity import PolicySpec, Trial
from profiles.parallel import Pool, in_parallel, worker_pool
from profiles.report import write_report
from profiles.results import Comparison, Run, best_by_capacity, figures_of, histogram, screen_table

GRID = (256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 8192)
SHARES = (0.5, 0.8, 0.95, 1.1)  # of the best static's capacity: below, near and past saturation
GRACE_S = 60.0
BUDGET_POINTS = 600
COMPOSED = [LOG_COLUMNS.index(name) for name in COMPOSITION]
UNFINISHED = "unfinished.jsonl"
TABLE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Question:
    """What is compared on what. `workloads` has one for each seed; rates only stretch it in time.

    Raises ValueError naming what is wrong with a policy, before anything is simulated.
    """

    title: str
    plant: Plant
    workloads: dict[int, Workload]
    slo: Slo
    policies: tuple[str, ...]
    grid: tuple[int, ...] = GRID
    rates: tuple[float, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.policies or not self.grid:
            raise ValueError("nothing to compare: name at least one policy and one static budget of the grid")
        if min(self.grid) < 1:
            raise ValueError(f"a static budget of the grid is {min(self.grid)}; it must be at least 1")
        for text in (*self.policies, *self.statics):
            PolicySpec.parse(text).check(self.plant, self.slo)

    @property
    def statics(self) -> tuple[str, ...]:
        """The grid, and the static budgets among the policies: the best of all is no worse than one that was named."""
        most = self.plant.config.max_budget_tokens
        named = (re.fullmatch(r"static:budget=(\d+)", policy) for policy in self.policies)
        budgets = {min(budget, most) for budget in self.grid} | {int(match[1]) for match in named if match}
        return tuple(f"static:budget={budget}" for budget in sorted(budgets))

    def trial(self, policy: str, seed: int) -> Trial:
        return Trial(self.plant, self.workloads[seed], self.slo, seed, policy)

    @property
    def all_policies(self) -> list[str]:
        """Those that take longest first, so that no processor waits for another at the end."""
        return sorted({*self.policies, *self.statics}, key=lambda policy: (policy.startswith("static"), policy))


class Job(NamedTuple):
    """One thing to compute: a policy's capacity, searched from `rate` on (None: anywhere), or its figures at `rate`."""

    trial: Trial
    rate: float | None
    measure: bool
    keep_budget: bool = False

    def do(self) -> Run:
        trial = self.trial
        if not self.measure:
            return Run(trial.policy, trial.seed, trial.capacity(self.rate), {})
        assert self.rate is not None
        arrival_s = trial.load.at_rate(self.rate).arrival_s
        end_s = float(arrival_s[-1]) + GRACE_S
        outcome = trial.simulate(self.rate, end_s, keep_log=True)
        ttft_s = np.where(np.isnan(outcome.ttft_s), end_s - arrival_s, outcome.ttft_s)
        figures = figures_of(outcome, ttft_s, trial.slo)
        counts = histogram(outcome.tbt_s), histogram(ttft_s)
        budget = _budget(outcome) if self.keep_budget else ([], [])
        outside = int((~trial.plant.step_time.covered(outcome.log[:, COMPOSED])).sum())
        return Run(trial.policy, trial.seed, self.rate, figures, *counts, budget, len(outcome.log), outside)

    def key(self) -> str:
        """Equal for equal jobs alone: the plant, the requests and the promise are in it."""
        t, plant, unit = self.trial, self.trial.plant, self.trial.load.at_rate(1.0)
        settings = (plant.config, plant.dead_time_iterations, plant.reserve_output, str(t.slo))
        digest = hashlib.sha256(repr(settings).encode())
        for values in (unit.arrival_s, unit.prompt_tokens, unit.output_tokens):
            digest.update(values.tobytes())
        digest.update(msgspec.json.encode(t.plant.step_time.description))
        return f"{t.policy} {t.seed} {self.rate} {self.measure} {digest.hexdigest()[:16]}"


def compare(question: Question, out: Path, processes: int | None = None) -> Comparison:
    """Search the capacities, then measure at the rates. What an interrupted call left in `out` is not done again."""
    out.mkdir(parents=True, exist_ok=True)
    seeds = sorted(question.workloads)
    trials = [question.trial(policy, seed) for policy in question.all_policies for seed in seeds]
    with worker_pool(processes) as pool:
        bench = _Bench(pool, out / UNFINISHED)
        statics = bench.do([Job(t, None, False) for t in trials if t.policy in question.statics], "static budgets")
        capacities = {policy: [run.rate for run in statics if run.policy == policy] for policy in question.statics}
        best = capacities[best_by_capacity(list(question.statics), capacities)]
        others = [t for t in trials if t.policy not in question.statics]
        # A search is short when it starts near its end: at the best static's, then at the first seed's.
        first = bench.do([Job(t, best[0] or None, False) for t in others if t.seed == seeds[0]], "first seed")
        near = {run.policy: run.rate or None for run in first}
        capacities |= {run.policy: [run.rate] for run in first}
        rest = [Job(t, near[t.policy], False) for t in others if t.seed != seeds[0]]
        for run in bench.do(rest, "other seeds"):
            capacities[run.policy].append(run.rate)
        rates = question.rates or _rates(float(np.mean(best)))
        jobs = [
            Job(t, rate, True, t.seed == seeds[0] and t.policy in question.policies) for rate in rates for t in trials
        ]
        runs = bench.do(jobs, "rates")
    (out / UNFINISHED).unlink()
    statics_asked = list(question.statics)
    return Comparison(
        question.title,
        str(question.slo),
        list(question.policies),
        statics_asked,
        list(rates),
        capacities,
        runs,
        question.provenance,
    )


def run_compare(question: Question, out: Path, processes: int | None = None) -> int:
    """Compare, print the table, write comparison.json and report.html to `out`; returns the exit status."""
    present(compare(question, out, processes), out)
    return 0


def present(comparison: Comparison, out: Path) -> None:
    console = Console(width=max(Console().width, TABLE_WIDTH))  # figures cut short would be worse than broken lines
    console.print(screen_table(comparison))
    if comparison.beyond_profile:
        console.print(comparison.beyond_profile, soft_wrap=True)
    comparison.write_json(out / "comparison.json")
    write_report(comparison, out / "report.html")
    console.print(
        f"Report with plots: {out / 'report.html'}; everything as JSON: {out / 'comparison.json'}", soft_wrap=True
    )


class _Bench:
    """Does jobs in parallel, and remembers them in a file of JSON lines, so that an interrupted comparison goes on."""

    def __init__(self, pool: Pool, path: Path) -> None:
        self._pool = pool
        self._path = path
        self._known: dict[str, Run] = {}
        path.touch()
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # the last may be cut off
                key, run = msgspec.json.decode(line, type=tuple[str, Run])
                self._known[key] = run

    def do(self, jobs: list[Job], what: str) -> list[Run]:
        """The results in the order of the jobs."""
        keys = [job.key() for job in jobs]
        open_jobs = [i for i, key in enumerate(keys) if key not in self._known]
        with _progress(what, len(jobs)) as advance, self._path.open("ab") as file:
            advance(len(jobs) - len(open_jobs))
            for number, run in in_parallel(self._pool, Job.do, [jobs[i] for i in open_jobs]):
                key = keys[open_jobs[number]]
                self._known[key] = run
                file.write(msgspec.json.encode((key, run)) + b"\n")
                file.flush()
                advance(1)
        return [self._known[key] for key in keys]


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _rates(capacity: float) -> tuple[float, ...]:
    if not capacity:
        raise ValueError("no static budget of the grid meets the SLO at any rate: name --rates, or a weaker --slo")
    return tuple(float(f"{share * capacity:.3g}") for share in SHARES)


def _budget(outcome: Outcome) -> tuple[list[float], list[float]]:
    """Time and budget of some iterations, evenly spread over them."""
    log = outcome.log[:: max(1, -(-len(outcome.log) // BUDGET_POINTS))]
    time_s, budget = (log[:, LOG_COLUMNS.index(name)] for name in ("time_s", "budget_tokens"))
    return time_s.round(3).tolist(), budget.tolist()
