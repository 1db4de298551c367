"""`pacer train`: from a step-time profile, traces and a promise to a trained law, its scores and a report.

Several seeds learn one after the other; the one that earns most on the validation traces is kept. Each goes on where an
interrupted call left it.
"""

import argparse
import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.config import EngineConfig
from engine.protocol import Bounds
from envs.arrivals import gamma_arrivals
from envs.iterations import load_iterations
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.step_time_fit import fit
from envs.trace import Lengths, Workload, make_workload
from policies.rl import Trained
from policies.scenarios import Scenarios, fluid_capacity
from profiles.capacity import CLAIRVOYANT, Trial
from profiles.compare import GRID
from profiles.compare_flags import FALLBACK_BUDGET
from profiles.parallel import in_parallel, worker_pool
from profiles.record import BOUNDS
from profiles.training_flags import check
from profiles.training_report import Result, write_report
from profiles.tune_flags import Capacities

if TYPE_CHECKING:
    from policies.train import Lesson

POOL = 5000  # requests drawn of each trace, which episodes draw from
SCORED_S, FEWEST, MOST = 40.0, 200, 3000  # how long a run is that scores a law, near capacity; and its requests
CHECK_SEED = 1_000_000  # of the machines that all seeds are checked on
LAWS = ("pid", "predictive", CLAIRVOYANT)


def run_asked(args: argparse.Namespace, clock: Callable[[], int], date: str) -> int:
    """Train what the flags ask, score it, write the law and the report; returns the exit status.

    `clock` is in monotonic nanoseconds. Ctrl-C ends it at once: the same command goes on.
    """
    check(args)
    asked = Asked.of(args)
    claim(args.out, asked.provenance)
    console = Console(width=max(Console().width, 120))
    try:
        lessons = learn(args, asked, clock)
    except KeyboardInterrupt:
        console.print(f"Interrupted. What was learned is in {args.out}: the same command goes on.", soft_wrap=True)
        raise
    if not lessons:
        raise ValueError(f"--minutes {args.minutes} were over before anything was learned: give more")
    best = max(lessons, key=lambda lesson: max(point.checked for point in lesson.curve))
    learned, path, report = Trained.load(str(best.best)), args.out / f"{args.out.name}.npz", args.out / "report.html"
    told = {"when": date, **asked.provenance, **learned.card.provenance, "seeds": args.seeds, "versions": versions()}
    card = msgspec.structs.replace(learned.card, provenance=told)
    trials = [asked.trial(pool, f"rl:name={path}") for pool in asked.checked.values()]
    Trained.save(path, learned.layers, card)
    capacities = capacities_of(trials, args.processes)
    card = msgspec.structs.replace(card, scores=shares(capacities))
    Trained.save(path, learned.layers, card)
    curves = {lesson.folder.name: lesson.curve for lesson in lessons}
    write_report(Result(path.stem, card, curves, trials[0], 0.9 * capacities[CLAIRVOYANT][0]), report)
    for name, share in card.scores.items():
        console.print(f"{name:>14}: {share:.3f} of clairvoyant's capacity on {', '.join(asked.checked)}")
    console.print(f"Law: {path}, run by --policy rl:name={path}; report: {report}", soft_wrap=True)
    return 0


@dataclass(frozen=True, slots=True)
class Asked:
    """The question: a machine, kinds of requests to train on and to check on, a promise, a form of the actions."""

    plant: Plant
    taught: dict[str, Lengths]
    checked: dict[str, Lengths]
    slo: Slo
    provenance: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Asked":
        profile = fitted(args.profile, args.out) if args.profile.is_dir() else args.profile
        own, slo = Capacities.of(profile), Slo.parse(args.slo)
        budget = min(FALLBACK_BUDGET, own.max_budget_tokens)
        config = EngineConfig(budget_tokens=budget, chunk_tokens=budget, **msgspec.structs.asdict(own))
        taught = pools(args.traces, own.max_model_tokens, seed=0)
        checked = pools(args.validation or args.traces, own.max_model_tokens, seed=1)
        provenance = {
            "profile": {profile.name: hashlib.sha256(profile.read_bytes()).hexdigest()[:16]},
            "traces": {name: digest(pool) for name, pool in taught.items()},
            "validation": {name: digest(pool) for name, pool in checked.items()},
            "slo": str(slo),
            "form": args.form,
        }
        return cls(Plant(config, StepTimeModel.load(profile)), taught, checked, slo, provenance)

    def trial(self, kind: Lengths, policy: str) -> Trial:
        """Of the promise itself, on the machine as it was profiled."""
        rng = np.random.default_rng(2)
        carried = fluid_capacity(self.plant.step_time, kind, self.slo.tbt_s or 0.0, self.plant.config)
        n = int(np.clip(SCORED_S * carried, FEWEST, MOST))
        rows = rng.integers(len(kind), size=n)
        workload = Workload(gamma_arrivals(rng, n, 1.0), kind.prompt_tokens[rows], kind.output_tokens[rows])
        return Trial(self.plant, workload, self.slo, 0, policy)


def fitted(recording: Path, out: Path) -> Path:
    """`profile.json` in `out`: the step-time model of what `pacer record` has kept, with the engine's capacities.

    Of device times, which no idling spoils. Raises ValueError naming what is missing.
    """
    parts = sorted((recording / "iterations.parquet").glob("*.parquet"))
    if not parts:
        raise ValueError(f"{recording} holds no recording: give a folder of pacer record, or a step-time model")
    bounds = msgspec.json.decode((pq.read_schema(parts[0]).metadata or {}).get(BOUNDS.encode(), b"{}"), type=Bounds)
    capacities = Capacities(
        bounds.max_budget_tokens,
        bounds.max_requests,
        bounds.kv_tokens,
        kv_blocks=bounds.kv_tokens // Capacities().block_tokens,
    )
    model = fit(load_iterations(recording / "iterations.parquet", "device_s"), [str(recording)])
    provenance = {**model.description.provenance, "capacities": msgspec.structs.asdict(capacities)}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "profile.json"
    StepTimeModel(msgspec.structs.replace(model.description, provenance=provenance)).save(path)
    return path


def pools(kinds: Sequence[str], max_model_tokens: int, seed: int) -> dict[str, Lengths]:
    """What the requests of each kind are drawn from."""
    found = {}
    for kind in kinds:
        drawn = make_workload("poisson:1", kind, np.random.default_rng(seed), POOL, max_model_tokens)
        found[kind] = Lengths(drawn.prompt_tokens, drawn.output_tokens)
    return found


def digest(pool: Lengths) -> str:
    return hashlib.sha256(pool.prompt_tokens.tobytes() + pool.output_tokens.tobytes()).hexdigest()[:16]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("pacer", "numpy", "torch", "stable-baselines3")}


def claim(out: Path, provenance: dict[str, Any]) -> None:
    """Raises ValueError if the folder holds what was learned for another question."""
    out.mkdir(parents=True, exist_ok=True)
    path, told = out / "asked.json", msgspec.json.encode(provenance)
    if path.exists() and path.read_bytes() != told:
        raise ValueError(f"{out} holds a training with another profile, traces, promise or form: choose another --out")
    path.write_bytes(told)


def learn(args: argparse.Namespace, asked: Asked, clock: Callable[[], int]) -> "list[Lesson]":
    """The lessons that had time: one for each seed, each with an equal part of what is left."""
    try:
        from policies.train import Lesson, teach  # noqa: PLC0415  (stable-baselines3 is an extra)
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}, which is not installed: pip install 'pacer[train]'") from error
    model, config = asked.plant.step_time, asked.plant.config
    taught, checked = list(asked.taught.values()), list(asked.checked.values())
    began_ns, seconds, lessons = clock(), 60.0 * (args.minutes or math.inf), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for turn in range(args.seeds):
            seed, now_ns = args.seed + turn, clock()
            task = bar.add_task(f"seed {seed}", total=args.steps)

            def show(steps: int, text: str, task: TaskID = task, seed: int = seed) -> None:
                bar.update(task, completed=steps, description=f"seed {seed}: {text}")

            turn_s = (seconds - (now_ns - began_ns) * 1e-9) / (args.seeds - turn)

            def left(turn_s: float = turn_s, since_ns: int = now_ns) -> float:
                return turn_s - (clock() - since_ns) * 1e-9

            lesson = Lesson(
                args.form,
                Scenarios(model, config, taught, asked.slo, seed),
                Scenarios(model, config, checked, asked.slo, CHECK_SEED),
                *(args.steps, seed, args.out / f"seed-{seed}"),
            )
            teach(lesson, left, show)
            lessons.append(lesson)
    return [lesson for lesson in lessons if lesson.curve]


def capacities_of(trials: Sequence[Trial], processes: int | None) -> dict[str, list[float]]:
    """Requests per second of each law in each trial, by name; `oracle static` is the best of the grid in each."""
    statics = [f"static:budget={min(budget, trials[0].plant.config.max_budget_tokens)}" for budget in GRID]
    names = [trials[0].policy, *LAWS, *dict.fromkeys(statics)]
    tasks = [replace(trial, policy=name) for name in names for trial in trials]
    with worker_pool(processes) as pool:
        found = dict(in_parallel(pool, Trial.capacity, tasks))
    rows = {name: [found[i * len(trials) + k] for k in range(len(trials))] for i, name in enumerate(names)}
    best = [max(column) for column in zip(*(rows[name] for name in dict.fromkeys(statics)), strict=True)]
    return {"rl": rows[names[0]], **{law: rows[law] for law in LAWS}, "oracle static": best}


def shares(capacities: dict[str, list[float]]) -> dict[str, float]:
    """Of clairvoyant's: the geometric mean over the trials where that has any, 0 if it has none."""
    found = {}
    for name, row in capacities.items():
        ratios = [own / ideal for own, ideal in zip(row, capacities[CLAIRVOYANT], strict=True) if ideal > 0.0]
        found[name] = float(np.prod(ratios) ** (1.0 / len(ratios))) if ratios else 0.0
    return found
