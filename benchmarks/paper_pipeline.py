"""The pipeline experiment of Sarathi-Serve (OSDI'24), with adaptive budgets added: tensor parallel against a pipeline
of two stages, prefill-first and static budgets against the predictive law, whose microbatches are of equal time.

    python -m benchmarks.paper_pipeline [--gpus 8] [--shapes llama2-70b falcon-180b] [--minutes 9.5] [--out FOLDER]

On the same ranks: a sweep (`pacer profile`) for a step-time model; a decode iteration of 32 requests at 4k tokens, of
which the pipeline's, times 5 and 25, is the strict and the relaxed promise on P99 TBT; then the runs. Capacity by the
paper's rule (the promise kept, median scheduling delay within 2 s) would take hours a schedule live: the simulator
finds it on the measured model. Live, all schedules get the same requests in a closed loop, as many at a time as are
there when the best fixed schedule is at its capacity. Requests a second are tokens a second over a request's mean
tokens, since half a minute is too short to count requests. The law is the one of `pacer control`, under its guard.

A call ends before the next run would pass `--minutes`, and the same command goes on: what the folder holds is not made
again, and is judged without any GPU once it is all there. With --device cpu the built-in model on gloo processes,
lengths and budgets a tenth, rehearses the command; its figures say nothing of GPUs.
"""

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from itertools import product
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks.paper_plan import (
    PLACES,
    PROMISES,
    Measured,
    Plan,
    Setting,
    promises_s,
    requests,
    search_capacities,
    settings,
)
from benchmarks.paper_verdicts import GOAL, Row, Verdict, judge, kept, tables
from benchmarks.pipeline_ranks import Ranks
from benchmarks.pipeline_runs import ClosedLoop, figures
from benchmarks.report import machine, report
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time import StepTimeModel
from policies.catalogue import parse_law
from profiles.capacity import PolicySpec
from profiles.parallel import worker_pool

REQUESTS = 400
SEARCH_S = 60.0  # allowed for the capacities of a setting
BUILT_IN = "pacer-26m"


class OutOfTime(Exception):
    """What comes next would end too late."""


class Call:
    """One call of the command: the folder with what was found before, and the time it may take."""

    def __init__(self, args: argparse.Namespace, ends_s: float) -> None:
        self.args, self.place = args, PLACES[args.device]
        self._ends_s = ends_s
        self._plan_file, self._rows_file = args.out / "plan.json", args.out / "runs.json"
        plan, rows = self._plan_file, self._rows_file
        self.plan: Plan = msgspec.json.decode(plan.read_bytes(), type=Plan) if plan.exists() else {}
        self.rows: list[Row] = json.loads(rows.read_text()) if rows.exists() else []

    def missing(self, setting: Setting) -> list[tuple[str, str, str]]:
        """(promise, mix, policy) of the runs that are still to be made."""
        made = {row["key"] for row in self.rows}
        runs = product(self.args.promises, self.args.mixes, self.place.policies)
        return [run for run in runs if " ".join((setting.name, *run)) not in made]

    def make(self, setting: Setting) -> None:
        """All that is missing of a setting. Raises OutOfTime, and ValueError when its ranks cannot start."""
        if not self.missing(setting):
            return
        new = setting.name not in self.plan
        self._require(self.place.loading_s + (self.args.sweep + SEARCH_S) * new)
        print(f"== {setting.name}", flush=True)
        ranks = Ranks(setting.source(self.args.device), setting.config(self.args.device))
        try:
            self._measure(setting, ranks)
            for run in self.missing(setting):
                self._require(self.args.warm_up + self.args.seconds)
                self._run(setting, ranks, *run)
        finally:
            ranks.close()

    def _require(self, seconds: float) -> None:
        if time.monotonic() + seconds > self._ends_s:
            raise OutOfTime

    def _measure(self, setting: Setting, ranks: Ranks) -> None:
        """The step-time model, the decode iteration and the capacities, unless they are known."""
        args, path = self.args, self._profile(setting)
        ranks.step_time(path, args.sweep, args.seed)
        if setting.name not in self.plan:
            self.plan[setting.name] = Measured(ranks.config, ranks.iteration_s(self.place.decode))
            print(f"decode iteration: {self.plan[setting.name].decode_s * 1e3:.1f} ms", flush=True)
        measured = self.plan[setting.name]
        if not measured.mixes:
            bounds_s = promises_s(self.plan, setting.shape, args.gpus)
            searches = len(self.place.mixes) * len(bounds_s) * len(self.place.policies)
            with worker_pool(min(args.processes, searches)) as pool:
                found = search_capacities(pool, path, measured, self.place, bounds_s, args.seed)
                measured.mixes = dict(found)
        self._plan_file.write_bytes(msgspec.json.format(msgspec.json.encode(self.plan), indent=1))

    def _run(self, setting: Setting, ranks: Ranks, promise: str, mix: str, policy: str) -> None:
        args, of_mix = self.args, self.plan[setting.name].mixes[mix]
        bound_s = promises_s(self.plan, setting.shape, args.gpus)[promise]
        workload = requests(self.place, mix, REQUESTS, args.seed + 1)  # others than those of the search
        spec, model = PolicySpec.parse(policy), StepTimeModel.load(self._profile(setting))
        config, law = spec.adapt(Plant(ranks.config, model)).config, parse_law(spec.law, Slo(tbt_s=bound_s), model)
        at_once = of_mix.at_once[promise]
        loop = ClosedLoop(ranks.runner, config, law, workload, at_once, time.monotonic_ns)
        found = figures(loop.run(args.seconds, args.warm_up))
        mean_tokens = float((workload.prompt_tokens + workload.output_tokens - 1).mean())  # the last is not computed
        row = {"key": " ".join((setting.name, promise, mix, policy)), **setting._asdict(), "layout": setting.layout}
        row |= {"mix": mix, "promise": promise, "promise_s": bound_s, "policy": policy, "at_once": at_once}
        row |= {"capacity": of_mix.capacity[promise][policy], "requests_s": found["tokens_s"] / mean_tokens} | found
        self.rows.append(row)
        self._rows_file.write_text(json.dumps(self.rows, indent=1))
        told = f"{row['requests_s']:.2f} requests/s, bubbles {row['bubble_share']:.1%}"
        print(f"{row['key']}: {told}, promise {'kept' if kept(row) else 'broken'}", flush=True)

    def _profile(self, setting: Setting) -> Path:
        path: Path = self.args.out / f"{setting.name}.json"
        return path

    def save(self, verdicts: list[Verdict], missing: int) -> None:
        """The results with all that tells how they were made."""
        profiles = {name: StepTimeModel.load(self.args.out / f"{name}.json") for name in self.plan}
        results = {
            "command": shlex.join(["python", "-m", "benchmarks.paper_pipeline", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "seed": self.args.seed,
            "missing_runs": missing,
            "settings": {
                name: {"decode_s": measured.decode_s, **profiles[name].description.provenance}
                for name, measured in self.plan.items()
            },
            "verdicts": [verdict._asdict() for verdict in verdicts],
            "rows": self.rows,
        }
        (self.args.out / "paper-pipeline.json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="8: TP8 and TP4-PP2; 4: TP4 and TP2-PP2; 2: TP2 and PP2")
    add("--shapes", nargs="+", help="default: llama2-70b falcon-180b, the second not on 2 GPUs")
    add("--mixes", nargs="+", choices=tuple(PLACES["cuda"].mixes), default=list(PLACES["cuda"].mixes))
    add("--promises", nargs="+", choices=tuple(PROMISES), default=list(PROMISES))
    add("--minutes", type=float, default=9.5, help="no run begins that would end later")
    add("--seconds", type=float, default=15.0, help="of measuring in each run")
    add("--warm-up", type=float, default=25.0, help="seconds at most until requests at once have begun to decode")
    add("--sweep", type=float, default=60.0, help="seconds of the sweep for a step-time model")
    add("--processes", type=int, default=os.cpu_count() or 1, help="of the search for capacities")
    add(
        "--out", type=Path, default=Path("pacer-out/paper-pipeline"), help="folder; runs that it holds are not repeated"
    )
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--quick", action="store_true", help="half as long runs and sweeps")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "cpu":
        args.shapes = [BUILT_IN]
    args.shapes = args.shapes or ["llama2-70b", "falcon-180b"][: 1 if args.gpus < 4 else 2]
    if args.quick:
        args.seconds, args.sweep = args.seconds / 2, args.sweep / 2
    return args


def main() -> None:
    begun_s = time.monotonic()
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    call, console = Call(args, begun_s + 60 * args.minutes), Console(width=170)
    chosen = settings(args.shapes, args.gpus)
    for setting in chosen:
        try:
            call.make(setting)
        except OutOfTime:
            print(f"{args.minutes:g} minutes are over: the same command goes on", flush=True)
            break
        except Exception:  # what fails is told and left out: other settings may run
            traceback.print_exc()
    missing = sum(len(call.missing(setting)) for setting in chosen)
    verdicts = list(judge(call.rows, call.place.fixed))
    for table in tables(call.rows):
        console.print(table)
    for verdict in verdicts:
        console.print(str(verdict), soft_wrap=True)
    call.save(verdicts, missing)
    nothing = float("nan")
    report(
        "bubble seconds a token that the predictive law cuts from the largest static budget in a pipeline (least)",
        min((verdict.bubbles_cut for verdict in verdicts), default=nothing),
        f">= {GOAL}, promise kept, at least the requests a second of the best fixed schedule",
        ok=bool(verdicts) and not missing and all(verdict.ok for verdict in verdicts),
        seed=args.seed,
        of_best_capacity=min((verdict.of_best_capacity for verdict in verdicts), default=nothing),
        of_best_live=min((v.of_best_live for v in verdicts if v.of_best_live is not None), default=nothing),
        promises_kept=sum(verdict.kept for verdict in verdicts),
        verdicts=len(verdicts),
        runs=len(call.rows),
        missing_runs=missing,
        device=args.device,
        gpus=args.gpus,
    )


if __name__ == "__main__":
    main()
