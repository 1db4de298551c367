"""How long a law thinks: `decide` under its guard, while 256 requests run.

    python -m benchmarks.decision_time [--policies LAW ...] [--no-guard] [--profile FILE] [--quick] [--seed 0]

The telemetry is that of a simulated run which the law itself steers: conversation at a TBT SLO of 100 ms, on the plant
of the design (or a profile's), offered 1.2 times what it can serve, so that all 256 seats are taken. Only decisions
made with all of them taken count, the first ones not. (From telemetry published to the answer held:
benchmarks.decision_round_trip.)
"""

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.law_cells import CONVERSATION, Cell, Setting, Shifting, lengths
from benchmarks.law_disturbed import Bare
from benchmarks.report import report
from engine.protocol import Telemetry
from envs.simulator import Simulation
from envs.workload import FloatArray
from policies.catalogue import parse_law
from policies.guard import Guard
from policies.policy import Decision

GOALS_US, P99_GOAL_US = {"rl": 30.0}, 200.0
MEDIAN_GOAL_US = 50.0  # of other laws
CELL, OFFERED, WARM_UP = Cell(CONVERSATION, 100), 1.2, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["predictive", "pid"], metavar="LAW")
    parser.add_argument("--no-guard", action="store_true", help="the law's own decide, Guard left out")
    parser.add_argument("--profile", type=Path, help="another plant's step-time model, from pacer profile")
    parser.add_argument("--quick", action="store_true", help="fewer decisions, same measurement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    guarded = "without" if args.no_guard else "under"
    table = Table(title=f"decide {guarded} Guard, 256 requests running, us")
    for column in ("law", "decisions", "median", "p99", "most"):
        table.add_column(column, justify="right")
    medians, p99s, goals = {}, {}, {}
    for policy in args.policies:
        kind = Bare if args.no_guard else Guard
        costs_us = measure(policy, Setting(profile=args.profile), 120.0 if args.quick else 600.0, args.seed, kind)
        medians[policy], p99s[policy] = (float(np.percentile(costs_us, q)) for q in (50, 99))
        goals[policy] = GOALS_US.get(policy.partition(":")[0], MEDIAN_GOAL_US)
        figures = (medians[policy], p99s[policy], float(costs_us.max()))
        table.add_row(policy, str(len(costs_us)), *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    report(
        f"a law's decision {guarded} Guard at 256 running requests (us, median of the slowest law)",
        max(medians.values()),
        f"<= {', '.join(f'{goal:.0f} ({policy})' for policy, goal in goals.items())}; p99 <= {P99_GOAL_US:.0f}",
        ok=all(medians[policy] <= goal for policy, goal in goals.items()) and max(p99s.values()) <= P99_GOAL_US,
        seed=args.seed,
        **{f"{policy} median_us": median for policy, median in medians.items()},
        **{f"{policy} p99_us": p99 for policy, p99 in p99s.items()},
    )


def measure(policy: str, setting: Setting, run_s: float, seed: int, kind: type[Guard | Bare]) -> FloatArray:
    """Microseconds of each decision that counts. Raises ValueError if there are none."""
    seats = setting.plant().config.max_requests
    load = Shifting.steady(setting.guess(CELL), run_s, lengths(None, CONVERSATION), seed)
    simulation = Simulation(setting.plant(), load.at_rate(OFFERED), seed)
    law, costs_ns, now_ns = kind(parse_law(policy, CELL.slo, setting.step_time())), [], time.perf_counter_ns

    def decide(telemetry: Telemetry, at_ns: int) -> Decision | None:
        begin_ns = now_ns()
        decision = law.decide(telemetry, at_ns)
        end_ns = now_ns()
        if telemetry.queue.running_requests == seats:
            costs_ns.append(end_ns - begin_ns)
        return decision

    simulation.run_law(decide, run_s)
    if len(costs_ns) <= WARM_UP:
        raise ValueError(f"{policy!r} had all {seats} seats taken in {len(costs_ns)} decisions alone: run it longer")
    return np.array(costs_ns[WARM_UP:]) / 1e3


if __name__ == "__main__":
    main()
