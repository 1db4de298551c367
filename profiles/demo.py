"""`pacer demo`: one engine, one bursty workload, three token budgets: a small one, a large one, and a controlled one.

The machine is measured first, and the promise and the load are set by its speed, so that the same question is asked
everywhere: what if prompts come faster than a small budget can take them, and a large one stalls every stream?
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from envs.slo import Slo
from envs.trace import Workload, make_workload
from profiles.live_engine import LiveEngine, Start, live_engine
from profiles.plot import plot_runs

SMALL, AIM, LARGE = 32, 192, 2048
POLICIES = {f"static {budget}": f"static:budget={budget}" for budget in (SMALL, LARGE)} | {"pid": "pid"}
PHASES_S = (10, 14, 16)  # calm, burst, calm
CALM, BURST = 0.3, 1.0  # load, as a share of what a budget of AIM tokens can prefill
MEAN_PROMPT = 430
LENGTHS = "lognormal:350/0.7/1200,48/0.4/96"


@dataclass(frozen=True, slots=True)
class Machine:
    """Step time of this machine: a batch of T tokens takes about `fixed_s` + `per_token_s` * T."""

    fixed_s: float
    per_token_s: float

    def step_s(self, tokens: int) -> float:
        return self.fixed_s + self.per_token_s * tokens

    def prefill_rate(self, budget_tokens: int, decodes: int) -> float:
        """Prompt tokens a second under a budget shared with `decodes` streams."""
        return (budget_tokens - decodes) / self.step_s(budget_tokens)


def run_demo(start: Start, out: Path, seed: int) -> int:
    """Run the comparison and leave telemetry, journals, figures and the picture in `out`; returns the exit status."""
    console = Console()
    shutil.rmtree(out, ignore_errors=True)
    console.print("Starting the engine ...")
    with live_engine(start, "demo", seed) as demo:
        console.print("Measuring this machine ...")
        machine = _measure(demo, out / "measure", seed)
        slo, workload = _plan(machine, seed)
        console.print(
            f"A step of T tokens takes about {machine.fixed_s * 1e3:.0f} ms + {machine.per_token_s * 1e3:.2f} ms * T.\n"
            f"The promise: {slo} (ms, P99). The load: {len(workload)} requests, with a burst in the middle."
        )
        runs = {label: (policy, out / label.replace(" ", "-")) for label, policy in POLICIES.items()}
        summaries = {label: demo.replay_under(policy, slo, workload, at) for label, (policy, at) in runs.items()}
    assert slo.tbt_s is not None
    plot_runs({label: at / "telemetry.parquet" for label, (_, at) in runs.items()}, slo.tbt_s, out / "demo.png")
    provenance = {"slo": str(slo), "seed": seed, "requests": len(workload), "machine": asdict(machine)}
    (out / "demo.json").write_text(json.dumps(provenance, indent=1))
    console.print(_table(summaries, slo))
    console.print(_verdict(summaries, slo))
    console.print(f"Telemetry and journal of each run, and the picture demo.png: {out}")
    return 0


def _measure(demo: LiveEngine, folder: Path, seed: int) -> Machine:
    """Step time over batch size, from a few requests under a large budget: a line through the iterations' medians."""
    rng = np.random.default_rng(seed)
    for budget in (SMALL, 256, 768):
        workload = make_workload("poisson:1000", f"fixed:{2 * budget},8", rng, n_requests=2)
        demo.replay_under(f"static:budget={budget}", None, workload, folder / str(budget))
    tokens, seconds = [], []
    for telemetry in folder.glob("*/telemetry.parquet"):
        table = pq.read_table(telemetry)
        batch = np.array(table["decode_tokens"]) + np.array(table["prefill_tokens"])
        for size in np.unique(batch):
            tokens.append(int(size))
            seconds.append(float(np.median(np.array(table["device_s"])[batch == size])))
    per_token_s, fixed_s = np.polyfit(tokens, seconds, 1, w=1.0 / np.array(seconds))
    return Machine(max(float(fixed_s), 1e-4), max(float(per_token_s), 1e-6))


def _plan(machine: Machine, seed: int) -> tuple[Slo, Workload]:
    """A promise that about `AIM` tokens keep, and a burst that they can carry but the small budget cannot."""
    tbt_s = 1.4 * machine.step_s(AIM)
    rate = machine.prefill_rate(AIM, decodes=8)
    calm, burst = CALM * rate / MEAN_PROMPT, BURST * rate / MEAN_PROMPT
    phases = ",".join(f"{s}:{r:.3f}" for s, r in zip(PHASES_S, (calm, burst, calm), strict=True))
    workload = make_workload(f"phases:{phases}", LENGTHS, np.random.default_rng(seed))
    return Slo(tbt_s=round(tbt_s, 2)), workload


def _table(summaries: dict[str, dict[str, Any]], slo: Slo) -> Table:
    table = Table(title=f"The same requests under three budgets; the promise is {slo} (ms, P99)")
    for column in ("budget", "TTFT p50", "TTFT p99", "TBT p50", "TBT p99", "goodput", "in SLO"):
        table.add_column(column, justify="left" if column == "budget" else "right", no_wrap=True)
    for label, summary in summaries.items():
        table.add_row(
            label,
            f"{summary['median_ttft_ms'] / 1e3:.2f} s",
            f"{summary['p99_ttft_ms'] / 1e3:.2f} s",
            f"{summary['median_itl_ms']:.0f} ms",
            f"{summary['p99_itl_ms']:.0f} ms",
            f"{summary['request_goodput']:.2f} req/s",
            f"{100 * summary['share_of_tokens_in_slo']:.1f} %",
        )
    return table


def _verdict(summaries: dict[str, dict[str, Any]], slo: Slo) -> str:
    assert slo.tbt_s is not None
    kept = [label for label, summary in summaries.items() if summary["p99_itl_ms"] <= 1e3 * slo.tbt_s]
    small, pid = summaries[f"static {SMALL}"], summaries["pid"]
    ratio = pid["p99_ttft_ms"] / small["p99_ttft_ms"]
    return (
        f"Kept the promise: {', '.join(kept) or 'none'}. TTFT p99 of pid is {ratio:.2f} of the small budget's, "
        f"its goodput {pid['request_goodput'] / max(small['request_goodput'], 1e-9):.2f} of it."
    )
