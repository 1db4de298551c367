"""How well the simulator foretells the live engine: the same requests through both, near and far from capacity.

The built-in model serves on this machine, over HTTP, with the sidecar beside it; telemetry tells what happened. The
step-time model is fitted to the recorded iterations of the other seeds' runs and of the calibration, never to those of
the run that is judged. The simulator then gets the requests as they arrived, the engine's configuration and the law;
its throughput, TTFT and TBT, of ten draws of the noise, stand beside the live ones, pooled over the seeds.

A shared virtual machine is up to a fifth faster or slower from one minute to the next, and no step-time model can know.
So each run has its speed: the ratio of its measured to its predicted step times, one number, which also divides its
times before a model is fitted to them. The first table leaves the speed of the judged runs out, the second gives it to
the simulator; the goals are for the second. The third gives it the course of the speed, a number for each `WINDOW_S`:
what is left there is not the machine's. The winner is the policy of the highest goodput; where the live lead over the
simulator's choice is within the interval of their difference, either will do.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.live_runs import JUDGED, LOADS, POLICIES, Cell, Live, measure
from benchmarks.report import report
from engine.config import EngineConfig
from engine.protocol import Telemetry
from envs.iterations import Iterations
from envs.outcome import FloatArray, Outcome
from envs.simulator import Plant, Simulation
from envs.slo import Slo
from envs.step_time import StepTimeModel
from envs.step_time_error import errors, predict
from envs.step_time_fit import fit
from envs.trace import Workload
from policies.catalogue import parse_law
from policies.guard import Guard
from policies.policy import Decision

GOALS = {0.50: 0.10, 0.85: 0.10, 0.95: 0.15}
STEP_GOAL = 0.05
DRAWS = 10
THROUGHPUT_GOAL = 0.04
WINDOW_S = 5.0


class Figures(NamedTuple):
    """Requests per second from first arrival to last token, and seconds."""

    throughput: float
    mean_ttft_s: float
    p99_ttft_s: float
    p99_tbt_s: float


def simulate(plant: Plant, workload: Workload, policy: str, slo: Slo, seed: int, speeds: FloatArray) -> Outcome:
    """`speeds`: how much longer than the plant's steps take, in each `WINDOW_S` from the first arrival on."""
    simulation = Simulation(plant, workload, seed)
    guard = Guard(parse_law(policy, slo, plant.step_time))

    def decide(telemetry: Telemetry, now_ns: int) -> Decision | None:
        simulation.slowdown = float(speeds[min(int(simulation.now_s / WINDOW_S), len(speeds) - 1)])
        return guard.decide(telemetry, now_ns)

    simulation.run_law(decide)
    return simulation.outcome()


def speed(model: StepTimeModel, iterations: Iterations) -> float:
    """How much longer the run's iterations took than predicted, on the whole."""
    known = ~np.isnan(iterations.seconds)
    return float(iterations.seconds[known].sum() / predict(model, iterations)[known].sum())


def course(model: StepTimeModel, live: Live) -> FloatArray:
    """The speed in each window; the whole run's where iterations fill less than a third of it."""
    known = ~np.isnan(live.iterations.seconds) & (live.ended_s >= 0)
    window = (live.ended_s[known] / WINDOW_S).astype(np.int64)
    predicted_s = np.bincount(window, predict(model, live.iterations)[known])
    measured_s = np.bincount(window, live.iterations.seconds[known])
    busy = predicted_s > WINDOW_S / 3
    return np.where(busy, measured_s / np.where(busy, predicted_s, 1.0), speed(model, live.iterations))


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
    """Outcomes of every cell's draws, without and with the judged run's speed, and with its course."""

    blind: dict[Cell, list[Outcome]]
    informed: dict[Cell, list[Outcome]]
    followed: dict[Cell, list[Outcome]]
    step_error: float


def judge(plan: dict[str, Any], lives: dict[Cell, Live], calibration: list[Live]) -> Judged:
    """Simulate every cell with a model that has not seen its seed."""
    slo = Slo.parse(plan["slo"])
    kinds: list[dict[Cell, list[Outcome]]] = [{}, {}, {}]
    step_errors = []
    for seed in sorted({cell.seed for cell in lives}):
        others = [live.iterations for cell, live in lives.items() if cell.seed != seed]
        model = fitted([*others, *(live.iterations for live in calibration)])
        own = {cell: live for cell, live in lives.items() if cell.seed == seed}
        print(f"seed {seed}, {sum(len(live.iterations) for live in own.values())} iterations")
        plant = Plant(EngineConfig(), model)
        step_errors.append(judge_step_time(model, [live.iterations for live in own.values()]))
        for cell, live in own.items():
            draws = range(1000 * seed, 1000 * seed + DRAWS)
            known = np.ones(1), np.array([speed(model, live.iterations)]), course(model, live)
            for kind, speeds in zip(kinds, known, strict=True):
                kind[cell] = [simulate(plant, live.workload, cell.policy, slo, d, speeds) for d in draws]
    blind, informed, followed = kinds
    return Judged(blind, informed, followed, max(step_errors))


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
    print("\nWith the course of the machine's speed:")
    followed, within_followed, _ = compare(lives, judged.followed, slo)
    figures = len(Figures._fields) * len(LOADS) * len(POLICIES)
    report(
        f"largest end-to-end error of {JUDGED}, as a share of its goal",
        worst,
        "<= 1, and the same winners",
        ok=worst <= 1 and winners,
        seed=args.seed,
        same_winners=winners,
        figures_within_goal=f"{within} of {figures}",
        without_speeds=blind,
        with_courses=followed,
        figures_within_goal_with_courses=f"{within_followed} of {figures}",
        step_time_median_error=judged.step_error,
        capacity_req_s=plan["capacity"],
    )


if __name__ == "__main__":
    main()
