"""The live runs that `benchmarks.fidelity` judges: the built-in model over HTTP, a sidecar beside it."""

import json
import multiprocessing
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import run as command_line
from engine.config import EngineConfig
from envs.iterations import Iterations
from envs.outcome import FloatArray
from envs.simulator import Plant
from envs.slo import Slo
from envs.step_time_fit import fit
from envs.trace import Workload, make_workload
from profiles.capacity import Trial
from profiles.iterations import SCHEMA, IterationRows
from profiles.live_engine import LiveEngine, live_engine

POLICIES = ("static:budget=64", "static:budget=128", "static:budget=512", "aimd", "pid")
LOADS = (0.50, 0.85, 0.95)
JUDGED = "static:budget=128"
LENGTHS = "lognormal:150/0.7/600,24/0.5/64"
CALIBRATION = 1000  # seeds from here on


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """What the live engine did with one workload under one policy. Iterations end `ended_s` after the first arrival.

    `delay_s` are the scheduling delays; NaN if one was preempted, as nothing tells whose prompt begins anew.
    """

    workload: Workload
    delay_s: FloatArray
    ttft_s: FloatArray
    tbt_s: FloatArray
    duration_s: float
    goodput: float
    iterations: Iterations
    ended_s: FloatArray


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
    began_ns: list[int] = []  # prompts begin in the order of their arrivals
    for message in messages:
        began_ns += [message["scheduled_ns"]] * message["batch"]["prefill_context_tokens"].count(0)
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
    known = len(began_ns) == len(ended) and messages[-1]["preemptions"] == messages[0]["preemptions"]
    delay_s = (np.array(began_ns) - [arrival for arrival, *_ in ended]) * 1e-9 if known else np.full(len(ended), np.nan)
    duration_s = max(t[-1] for *_, t in ended) - first_ns * 1e-9
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    ended_s = table["time_s"].to_numpy()
    return Live(
        workload,
        delay_s,
        np.array([t[0] for *_, t in ended]),
        np.concatenate(gaps),
        duration_s,
        sum(met) / duration_s,
        # Each row's own where the engine waits for every batch; where it looks ahead, sums alone can be trusted.
        replace(Iterations.from_table(table), intervals=False),
        ended_s - ended_s.max() + duration_s,  # the last one gave the last token
    )


def requests(rate: float, n: int, seed: int) -> Workload:
    return make_workload(f"poisson:{rate}", LENGTHS, np.random.default_rng(seed), n)


def start(verb: str, *flags: str) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=command_line.main, args=([verb, *flags],))
    process.start()
    return process


def served(folder: Path) -> bool:
    """Whether it holds a run that was not interrupted."""
    summary = folder / "bench.json"
    return summary.exists() and not json.loads(summary.read_text())["interrupted"]


def run_live(engine: LiveEngine, out: Path, cell: Cell, workload: Workload, slo: Slo) -> Live:
    """The live run, or what was stored of it before."""
    folder = out / cell.folder
    if not served(folder):
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
            trial = Trial(Plant(EngineConfig(), model), requests(1.0, 1000, CALIBRATION), Slo(tbt_s=tbt_s), 0, JUDGED)
            plan_file.write_text(json.dumps({"slo": str(slo), "capacity": trial.capacity(), "n": n}))
        plan = json.loads(plan_file.read_text())
        slo = Slo.parse(plan["slo"])
        print(f"promise {slo} (ms); capacity of {JUDGED}: {plan['capacity']:.2f} req/s")
        lives = {
            cell: run_live(engine, out, cell, requests(cell.load * plan["capacity"], n, cell.seed), slo)
            for seed in range(seeds)
            for cell in (Cell(policy, load, seed) for load in LOADS for policy in POLICIES)
        }
    return plan, lives, calibration
