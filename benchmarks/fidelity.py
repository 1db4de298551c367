"""How well the simulator foretells the live engine: the same requests through both, near and far from capacity.

The built-in model serves on this machine, over HTTP, with the sidecar beside it; telemetry tells what happened. The
step-time model is fitted to the recorded iterations of the other seeds' runs and of the calibration, never to those of
the run that is judged. The simulator then gets the requests as they arrived, the engine's configuration and the law;
its throughput, TTFT and TBT, of ten draws of the noise, stand beside the live ones, pooled over the seeds.

A shared virtual machine is up to a fifth faster or slower from one minute to the next, and no step-time model can know.
So each run has its speed: the ratio of its measured to its predicted step times, one number, which also divides its
times before a model is fitted to them. The first table leaves the speed of the judged runs out, the second gives it to
the simulator; the goals are for the second. The winner is the policy of the highest goodput; where the live lead over
the simulator's choice is within the interval of their difference, either will do.
"""

import argparse
import json
import multiprocessing
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

import run as command_line
from benchmarks.report import report
from engine.config import EngineConfig
from envs.iterations import Iterations
from envs.outcome import FloatArray, Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.step_time_error import errors, predict
from envs.step_time_fit import fit
from envs.trace import Workload, make_workload
from policies.catalogue import parse_law
from policies.guard import Guard
from profiles.iterations import SCHEMA, IterationRows
from profiles.live_engine import LiveEngine, live_engine

POLICIES = ("static:budget=64", "static:budget=128", "static:budget=512", "aimd", "pid")
LOADS = (0.50, 0.85, 0.95)
JUDGED = "static:budget=128"
LENGTHS = "lognormal:150/0.7/600,24/0.5/64"
CALIBRATION = 1000  # seeds from here on
GOALS = {0.50: 0.10, 0.85: 0.10, 0.95: 0.15}
STEP_GOAL = 0.05
DRAWS = 10
THROUGHPUT_GOAL = 0.04


class Figures(NamedTuple):
    """Requests per second from first arrival to last token, and seconds."""

    throughput: float
    mean_ttft_s: float
    p99_ttft_s: float
    p99_tbt_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """What the live engine did with one workload under one policy."""

    workload: Workload
    ttft_s: FloatArray
    tbt_s: FloatArray
    duration_s: float
    goodput: float
    iterations: Iterations


class Cell(NamedTuple):
    policy: str
    load: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.load}-{self.policy.replace(':', '-')}-{self.seed}"


def read_live(folder: Path, slo: Slo) -> Live:
    """From the sidecar's journal: telemetry is all that is needed."""
    parts = sorted((folder / "journal").glob("part-*.parquet"))
    messages = [row["telemetry"] for part in parts for row in pq.read_table(part).to_pylist()]
    joined, rows = IterationRows(), []
    times: dict[int, list[float]] = {}  # of the request in each slot: first token, then every further one
    ended: list[tuple[int, int, int, list[float]]] = []
    for message in messages:
        rows += joined.add(message)
        for completion in message["completed"]:
            now_s = completion["completed_ns"] * 1e-9
            for slot, ttft_s in zip(completion["ttft_slots"], completion["ttft_s"], strict=True):
                times[slot] = [ttft_s, now_s]
            for slot in completion["tbt_slots"]:
                times[slot].append(now_s)
            for request in completion["finished"]:
                slot = request["slot"]
                ended.append((request["arrival_ns"], request["prompt_tokens"], request["output_tokens"], times[slot]))
    ended.sort(key=lambda request: request[0])
    first_ns = ended[0][0]
    workload = Workload(
        np.array([(arrival - first_ns) * 1e-9 for arrival, *_ in ended]),
        np.array([prompt for _, prompt, _, _ in ended]),
        np.array([output for _, _, output, _ in ended]),
    )
    gaps = [np.diff(t[1:]) for *_, t in ended]
    met = [slo.met(t[0], gap, t[-1] - arrival * 1e-9) for (arrival, *_, t), gap in zip(ended, gaps, strict=True)]
    duration_s = max(t[-1] for *_, t in ended) - first_ns * 1e-9
    iterations = Iterations.from_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    return Live(
        workload,
        np.array([t[0] for *_, t in ended]),
        np.concatenate(gaps),
        duration_s,
        sum(met) / duration_s,
        replace(iterations, intervals=False),  # this engine waits for each batch: every stamp can be trusted
    )


def simulate(
    workload: Workload, policy: str, slo: Slo, model: StepTimeModel, seed: int, slowdown: float = 1.0
) -> Outcome:
    simulation = Simulation(Plant(EngineConfig(), model), workload, seed)
    simulation.slowdown = slowdown
    guard = Guard(parse_law(policy, slo, model))
    simulation.run_law(guard.decide)
    return simulation.outcome()


def capacity(model: StepTimeModel, slo: Slo, n: int) -> float:
    """Most requests per second of the judged policy that keep the SLO with a median scheduling delay of 2 s at most."""

    def keeps(rate: float) -> bool:
        outcome = simulate(requests(rate, n, CALIBRATION), JUDGED, slo, model, 0)
        assert slo.tbt_s is not None
        delay_s = float(np.median(outcome.scheduling_delay_s))
        return outcome.tokens_in_slo(slo.tbt_s) >= slo.quantile and delay_s <= 2.0

    low, high = 0.1, 200.0
    while high / low > 1.01:
        rate = (low * high) ** 0.5
        low, high = (rate, high) if keeps(rate) else (low, rate)
    return low


def requests(rate: float, n: int, seed: int) -> Workload:
    return make_workload(f"poisson:{rate}", LENGTHS, np.random.default_rng(seed), n)


def start(verb: str, *flags: str) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=command_line.main, args=([verb, *flags],))
    process.start()
    return process


def run_live(engine: LiveEngine, out: Path, cell: Cell, workload: Workload, slo: Slo) -> Live:
    """The live run, or what was stored of it before."""
    folder = out / cell.folder
    if not (folder / "bench.json").exists():
        engine.replay_under(cell.policy, slo, workload, folder)
    return read_live(folder, slo)


def measure(out: Path, n: int, seeds: int) -> tuple[dict[str, Any], dict[Cell, Live], list[Live]]:
    """Calibrate, settle promise and rates, and run every cell; seeds outermost, so that drift meets all alike."""
    with live_engine(start, "fidelity", 0, "--threads", "1") as engine:
        loose = Slo(tbt_s=1.0)
        calibration = [
            run_live(
                engine, out, Cell(f"static:budget={budget}", 0.0, CALIBRATION), requests(4.0, 60, CALIBRATION), loose
            )
            for budget in (16, 32, 64, 128, 256, 512)
        ]
        plan_file = out / "plan.json"
        if not plan_file.exists():
            model = fit(Iterations.concatenate([live.iterations for live in calibration]))
            tbt_s = round(1.5 * model.mean_s(6, 6 * 160, 2, 122, 122 * 100), 3)
            slo = Slo(tbt_s=tbt_s, ttft_s=round(20 * tbt_s, 1))
            plan_file.write_text(json.dumps({"slo": str(slo), "capacity": capacity(model, slo, 1000), "n": n}))
        plan = json.loads(plan_file.read_text())
        slo = Slo.parse(plan["slo"])
        print(f"promise {slo} (ms); capacity of {JUDGED}: {plan['capacity']:.2f} req/s")
        lives = {
            cell: run_live(engine, out, cell, requests(cell.load * plan["capacity"], n, cell.seed), slo)
            for seed in range(seeds)
            for cell in (Cell(policy, load, seed) for load in LOADS for policy in POLICIES)
        }
    return plan, lives, calibration


def speed(model: StepTimeModel, iterations: Iterations) -> float:
    """How much longer the run's iterations took than predicted, on the whole."""
    known = ~np.isnan(iterations.seconds)
    return float(iterations.seconds[known].sum() / predict(model, iterations)[known].sum())


def at_one_speed(model: StepTimeModel, runs: list[Iterations]) -> Iterations:
    return Iterations.concatenate([replace(run, seconds=run.seconds / speed(model, run)) for run in runs])


def fitted(runs: list[Iterations]) -> StepTimeModel:
    """A model of the runs, each of which was at a speed of its own: what is left is the noise within a run."""
    model = fit(Iterations.concatenate(runs))
    for _ in range(2):
        model = fit(at_one_speed(model, runs))
    return model


def judge_step_time(model: StepTimeModel, runs: list[Iterations]) -> float:
    """Print median errors on runs the model has not seen; returns the larger of both regimes' at the runs' speeds."""
    floor = [errors(fit(run), run) for run in runs]
    kinds = {
        "as it is": errors(model, Iterations.concatenate(runs)),
        "at the runs' speeds": errors(model, at_one_speed(model, runs)),
    }
    for regime in ("decode_only", "mixed"):
        medians = {kind: found[regime]["median_error"] for kind, found in kinds.items()}
        medians["fitted to the very run"] = float(np.median([found[regime]["median_error"] for found in floor]))
        print(f"  step time, {regime}:", ", ".join(f"{kind} {100 * error:.1f} %" for kind, error in medians.items()))
    at_speed = kinds["at the runs' speeds"]
    return max(at_speed[regime]["median_error"] for regime in ("decode_only", "mixed"))


class Judged(NamedTuple):
    """Outcomes of every cell's draws, without and with the speed of the judged run; the step time's median error."""

    blind: dict[Cell, list[Outcome]]
    informed: dict[Cell, list[Outcome]]
    step_error: float


def judge(plan: dict[str, Any], lives: dict[Cell, Live], calibration: list[Live]) -> Judged:
    """Simulate every cell with a model that has not seen its seed."""
    slo = Slo.parse(plan["slo"])
    blind: dict[Cell, list[Outcome]] = {}
    informed: dict[Cell, list[Outcome]] = {}
    step_errors = []
    for seed in sorted({cell.seed for cell in lives}):
        others = [live.iterations for cell, live in lives.items() if cell.seed != seed]
        model = fitted([*others, *(live.iterations for live in calibration)])
        own = {cell: live for cell, live in lives.items() if cell.seed == seed}
        print(f"seed {seed}, {sum(len(live.iterations) for live in own.values())} iterations")
        step_errors.append(judge_step_time(model, [live.iterations for live in own.values()]))
        for cell, live in own.items():
            for kind, slowdown in ((blind, 1.0), (informed, speed(model, live.iterations))):
                draws = range(1000 * seed, 1000 * seed + DRAWS)
                kind[cell] = [simulate(live.workload, cell.policy, slo, model, d, slowdown) for d in draws]
    return Judged(blind, informed, max(step_errors))


def pooled(runs: list[Live] | list[Outcome]) -> Figures:
    throughput = np.mean([len(run.workload) / run.duration_s for run in runs])
    ttft_s, tbt_s = (np.concatenate([getattr(run, name) for run in runs]) for name in ("ttft_s", "tbt_s"))
    return Figures(*map(float, (throughput, ttft_s.mean(), np.quantile(ttft_s, 0.99), np.quantile(tbt_s, 0.99))))


def compare(lives: dict[Cell, Live], outcomes: dict[Cell, list[Outcome]], slo: Slo) -> tuple[float, int, bool]:
    """Print every error; returns the judged policy's largest as a share of its goal, how many figures of all policies
    are within theirs, and whether winners agree.
    """
    worst, within = 0.0, 0
    print(f"{'load':>5} {'policy':20} {'throughput':>24} {'mean TTFT':>26} {'P99 TTFT':>26} {'P99 TBT':>26}")
    for load in LOADS:
        for policy in POLICIES:
            cells = [cell for cell in lives if cell.load == load and cell.policy == policy]
            live = pooled([lives[cell] for cell in cells])
            simulated = pooled([outcome for cell in cells for outcome in outcomes[cell]])
            relative = [s / m - 1 for s, m in zip(simulated, live, strict=True)]
            columns = [
                f"{m:7.3f} {s:7.3f} {100 * e:+6.1f} %" for m, s, e in zip(live, simulated, relative, strict=True)
            ]
            print(f"{load:5.2f} {policy:20} " + "   ".join(columns))
            shares = [abs(e) / goal for e, goal in zip(relative, (THROUGHPUT_GOAL, *[GOALS[load]] * 3), strict=True)]
            within += sum(share <= 1 for share in shares)
            if policy == JUDGED:
                worst = max(worst, *shares)
    disagreeing = [load for load in LOADS if not same_winner(load, lives, outcomes, slo)]
    return worst, within, not disagreeing


def same_winner(load: float, lives: dict[Cell, Live], outcomes: dict[Cell, list[Outcome]], slo: Slo) -> bool:
    """Whether no policy beats the simulator's choice in the live runs by more than the interval of their difference."""
    seeds = sorted({cell.seed for cell in lives})
    live = {p: np.array([lives[Cell(p, load, seed)].goodput for seed in seeds]) for p in POLICIES}
    simulated = {
        p: float(np.mean([outcome.goodput(slo) for seed in seeds for outcome in outcomes[Cell(p, load, seed)]]))
        for p in POLICIES
    }
    choice = max(POLICIES, key=lambda p: simulated[p])
    winner = max(POLICIES, key=lambda p: live[p].mean())
    difference = live[winner] - live[choice]
    half = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(difference) if len(seeds) > 1 and difference.any() else 0.0
    agrees = bool(winner == choice or difference.mean() <= half)
    ranking = ", ".join(f"{p} {live[p].mean():.2f}/{simulated[p]:.2f}" for p in POLICIES)
    print(f"load {load}: goodput live/simulated: {ranking}; live winner {winner}, simulator's {choice}: {agrees}")
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pacer-out/fidelity"), help="runs are kept here, and resumed")
    args = parser.parse_args()
    n, seeds = (40, 1) if args.quick else (100, 3)
    args.out.mkdir(parents=True, exist_ok=True)
    plan, lives, calibration = measure(args.out, n, seeds)
    judged, slo = judge(plan, lives, calibration), Slo.parse(plan["slo"])
    print("\nWithout the judged runs' speeds:")
    blind, _, _ = compare(lives, judged.blind, slo)
    print("\nWith them:")
    worst, within, winners = compare(lives, judged.informed, slo)
    report(
        f"largest end-to-end error of {JUDGED}, as a share of its goal",
        worst,
        "<= 1, and the same winners",
        ok=worst <= 1 and winners,
        seed=args.seed,
        same_winners=winners,
        figures_within_goal=f"{within} of {len(Figures._fields) * len(LOADS) * len(POLICIES)}",
        without_speeds=blind,
        step_time_median_error=judged.step_error,
        capacity_req_s=plan["capacity"],
    )


if __name__ == "__main__":
    main()
