"""`pacer train`: from a step-time profile, traces and a promise to a trained law, its scores and a report.

Several seeds learn one after the other; the one that earns most on the validation traces is kept. Each goes on where an
interrupted call left it. Nothing is written before all is known to fit together.
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
from envs.codec import CODEC_VERSION, FEATURES
from envs.iterations import load_iterations
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.step_time_fit import fit
from envs.trace import Lengths, Workload, make_workload
from policies.rl import Card, Trained
from policies.scenarios import Scenarios, fluid_capacity
from profiles.capacity import CLAIRVOYANT, NeverLoaded, Trial
from profiles.compare import GRID
from profiles.compare_flags import FALLBACK_BUDGET
from profiles.parallel import in_parallel, worker_pool
from profiles.record import BOUNDS, STAGES
from profiles.training_flags import check
from profiles.training_report import Result, write_report
from profiles.tune_flags import Capacities

if TYPE_CHECKING:
    from policies.train import Lesson

PROFILE = "profile.json"
POOL = 5000  # requests drawn of each trace, which episodes draw from
KEPT_BACK = 0.2  # of the traces for validation, where no others are named
SCORED_S, FEWEST, MOST = 40.0, 200, 3000  # how long a run is that scores a law, near capacity; and its requests
SCORED_AT, TOLERANCE = (0.5, 1.0, 2.0), 0.01  # times the bound on TBT; of a capacity
CHECK_SEED = 1_000_000  # of the machines that all seeds are checked on
RIVALS = ("pid", "predictive", CLAIRVOYANT)


def run_asked(args: argparse.Namespace, clock: Callable[[], int], date: str) -> int:
    """Train what the flags ask, score it, write the law and the report; returns the exit status.

    `clock` is in monotonic nanoseconds. Ctrl-C ends it at once: the same command goes on.
    """
    check(args)
    asked = Asked.of(args)
    lessons = asked.lessons(args)
    claim(args.out, {**asked.provenance, "codec": [CODEC_VERSION, *FEATURES]})
    asked.plant.step_time.save(args.out / PROFILE)
    console = Console(width=max(Console().width, 120))
    try:
        learn(lessons, args.minutes, clock)
    except KeyboardInterrupt:
        kept = f"What was learned, but for the last seconds, is in {args.out}: the same command goes on."
        console.print(f"Interrupted. {kept}", soft_wrap=True)
        raise
    learned = [lesson for lesson in lessons if lesson.curve]
    if not learned:
        raise ValueError(f"--minutes {args.minutes} were over before anything was learned: give more")
    card, trials, capacities = score(args, asked, learned, date)
    law, report = args.out / f"{args.out.name}.npz", args.out / "report.html"
    rate = 0.9 * max(capacities[CLAIRVOYANT][:1], default=0.0)
    write_report(Result(law.stem, card, {one.folder.name: one.curve for one in learned}, trials[0], rate), report)
    for name, share in card.scores.items():
        console.print(f"{name:>14}: {share:.3f} of clairvoyant's capacity on {', '.join(asked.checked)}")
    if not card.scores:
        console.print("Not scored: the validation traces end before the server is loaded.")
    console.print(f"Law: {law}, run by --policy rl:name={law}; report: {report}", soft_wrap=True)
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
        recorded = args.profile.is_dir()
        model = fitted(args.profile) if recorded else StepTimeModel.load(args.profile)
        name, told = (PROFILE, model.text().encode()) if recorded else (args.profile.name, args.profile.read_bytes())
        own, slo = Capacities.told(model, args.profile), Slo.parse(args.slo)
        budget = min(FALLBACK_BUDGET, own.max_budget_tokens)
        config = EngineConfig(budget_tokens=budget, chunk_tokens=budget, **msgspec.structs.asdict(own))
        taught = pools(args.traces, own.max_model_tokens, seed=0)
        if args.validation:
            checked = pools(args.validation, own.max_model_tokens, seed=1)
        else:
            parts = {kind: parted(pool) for kind, pool in taught.items()}
            taught = {kind: most for kind, (most, _) in parts.items()}
            checked = {f"{kind}, kept back": rest for kind, (_, rest) in parts.items()}
        provenance = {
            "profile": {name: hashlib.sha256(told).hexdigest()[:16]},
            "traces": {name: digest(pool) for name, pool in taught.items()},
            "validation": {name: digest(pool) for name, pool in checked.items()},
            "slo": str(slo),
            "form": args.form,
        }
        return cls(Plant(config, model), taught, checked, slo, provenance)

    def lessons(self, args: argparse.Namespace) -> "list[Lesson]":
        """One for each seed. Raises ValueError without what training needs, or if this cannot be trained for."""
        try:
            from policies.train import Lesson  # noqa: PLC0415  (stable-baselines3 is an extra)
        except ModuleNotFoundError as error:
            missing = f"training needs {error.name}, which is not installed: pip install 'pacer[train]'"
            raise ValueError(missing) from error
        model, config = self.plant.step_time, self.plant.config
        taught, checked = list(self.taught.values()), list(self.checked.values())
        judge = Scenarios(model, config, checked, self.slo, CHECK_SEED)
        return [
            Lesson(
                args.form,
                Scenarios(model, config, taught, self.slo, seed),
                judge,
                *(args.steps, seed, args.out / f"seed-{seed}"),
            )
            for seed in range(args.seed, args.seed + args.seeds)
        ]

    def trials(self, policy: str) -> list[Trial]:
        """On the machine as it was profiled: of the promise, and of others on TBT alone."""
        assert self.slo.tbt_s is not None
        others = (Slo(tbt_s=factor * self.slo.tbt_s, quantile=self.slo.quantile) for factor in SCORED_AT)
        slos = list(dict.fromkeys((self.slo, *others)))
        return [Trial(self.plant, self._load(pool), slo, 0, policy) for pool in self.checked.values() for slo in slos]

    def _load(self, kind: Lengths) -> Workload:
        rng = np.random.default_rng(2)
        carried = fluid_capacity(self.plant.step_time, kind, self.slo.tbt_s or 0.0, self.plant.config)
        n = int(np.clip(SCORED_S * carried, FEWEST, MOST))
        rows = rng.integers(len(kind), size=n)
        return Workload(gamma_arrivals(rng, n, 1.0), kind.prompt_tokens[rows], kind.output_tokens[rows])


def fitted(recording: Path) -> StepTimeModel:
    """The step-time model of what `pacer record` has kept, with the engine's capacities.

    Of device times, which no idling spoils. Raises ValueError naming what is missing, or for a pipeline, where they are
    of all stages together.
    """
    parts = sorted((recording / "iterations.parquet").glob("*.parquet"))
    if not parts:
        raise ValueError(f"{recording} holds no recording: give a folder of pacer record, or a step-time model")
    metadata = pq.read_schema(parts[-1]).metadata or {}
    try:
        bounds, stages = msgspec.json.decode(metadata[BOUNDS.encode()], type=Bounds), int(metadata[STAGES.encode()])
    except (KeyError, msgspec.DecodeError) as error:
        raise ValueError(f"{recording} does not tell what its engine can do ({error}): record again") from error
    if stages > 1:
        raise ValueError(f"{recording} is of a pipeline of {stages} stages: record an engine of one, or give a model")
    capacities = Capacities(
        bounds.max_budget_tokens,
        bounds.max_requests,
        bounds.kv_tokens,
        kv_blocks=bounds.kv_tokens // Capacities().block_tokens,
    )
    model = fit(load_iterations(recording / "iterations.parquet", "device_s"), [str(recording)])
    provenance = {**model.description.provenance, "capacities": msgspec.structs.asdict(capacities)}
    return StepTimeModel(msgspec.structs.replace(model.description, provenance=provenance))


def pools(kinds: Sequence[str], max_model_tokens: int, seed: int) -> dict[str, Lengths]:
    """What the requests of each kind are drawn from."""
    found = {}
    for kind in kinds:
        drawn = make_workload("poisson:1", kind, np.random.default_rng(seed), POOL, max_model_tokens)
        found[kind] = Lengths(drawn.prompt_tokens, drawn.output_tokens)
    return found


def parted(pool: Lengths) -> tuple[Lengths, Lengths]:
    """What is trained on, and what is kept back: no request of the one is as long as one of the other.

    Raises ValueError if all are alike.
    """
    pairs, which = np.unique(np.stack((pool.prompt_tokens, pool.output_tokens)), axis=1, return_inverse=True)
    if pairs.shape[1] < 2:
        raise ValueError("all requests of a trace are alike, so none can be kept back: name --validation")
    kept = np.random.default_rng(0).permutation(pairs.shape[1]) < max(KEPT_BACK * pairs.shape[1], 1)
    back = kept[which.ravel()]
    most, rest = (Lengths(pool.prompt_tokens[rows], pool.output_tokens[rows]) for rows in (~back, back))
    return most, rest


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


def learn(lessons: "Sequence[Lesson]", minutes: float | None, clock: Callable[[], int]) -> None:
    """Teach them, each in an equal part of the time that is left. What they took before counts."""
    from policies.train import teach  # noqa: PLC0415  (as above)

    left_s = 60.0 * (minutes or math.inf)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for turn, lesson in enumerate(lessons):
            task = bar.add_task(f"seed {lesson.seed}", total=lesson.steps)

            def show(steps: int, text: str, task: TaskID = task, seed: int = lesson.seed) -> None:
                bar.update(task, completed=steps, description=f"seed {seed}: {text}")

            teach(lesson, lambda: clock() * 1e-9, left_s / (len(lessons) - turn), show)
            left_s -= lesson.seconds


def score(
    args: argparse.Namespace, asked: Asked, lessons: "Sequence[Lesson]", date: str
) -> tuple[Card, list[Trial], dict[str, list[float]]]:
    """Write the best seed's law; its card with the scores, the trials that they come from, each law's capacities."""
    best = max(lessons, key=lambda lesson: max(point.checked for point in lesson.curve))
    learned, path = Trained.load(str(best.best)), args.out / f"{args.out.name}.npz"
    told = {"when": date, **asked.provenance, **learned.card.provenance, "seeds": len(lessons), "versions": versions()}
    card = msgspec.structs.replace(learned.card, provenance=told)
    trials = asked.trials(f"rl:name={path}")
    Trained.save(path, learned.layers, card)
    capacities = capacities_of(trials, args.processes)
    card = msgspec.structs.replace(card, scores=shares(capacities))
    return Trained.save(path, learned.layers, card).card, trials, capacities


def capacities_of(trials: Sequence[Trial], processes: int | None) -> dict[str, list[float]]:
    """Requests per second of each law in each trial, by name; `oracle static` is the best of the grid in each.

    Without the trials that end before the server is loaded under some law.
    """
    statics = [f"static:budget={min(budget, trials[0].plant.config.max_budget_tokens)}" for budget in GRID]
    names = [trials[0].policy, *RIVALS, *dict.fromkeys(statics)]
    tasks = [replace(trial, policy=name) for name in names for trial in trials]
    with worker_pool(processes) as pool:
        found = dict(in_parallel(pool, capacity, tasks))
    table = {name: [found[i * len(trials) + k] for k in range(len(trials))] for i, name in enumerate(names)}
    loaded = [all(map(math.isfinite, column)) for column in zip(*table.values(), strict=True)]
    rows = {name: [rate for rate, kept in zip(row, loaded, strict=True) if kept] for name, row in table.items()}
    best = [max(column) for column in zip(*(rows[name] for name in dict.fromkeys(statics)), strict=True)]
    return {"rl": rows[names[0]], **{law: rows[law] for law in RIVALS}, "oracle static": best}


def capacity(trial: Trial) -> float:
    """Infinite if the requests end before the server is loaded."""
    try:
        return trial.capacity(tolerance=TOLERANCE)
    except NeverLoaded:
        return math.inf


def shares(capacities: dict[str, list[float]]) -> dict[str, float]:
    """Of clairvoyant's: the geometric mean over the trials where that has any; nothing if it has none."""
    able = [k for k, ideal in enumerate(capacities[CLAIRVOYANT]) if ideal > 0.0]
    ratios = {name: [row[k] / capacities[CLAIRVOYANT][k] for k in able] for name, row in capacities.items()}
    return {name: float(np.prod(row) ** (1.0 / len(row))) for name, row in ratios.items() if row}
