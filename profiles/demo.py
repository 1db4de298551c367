"""`pacer demo`: one engine, one bursty workload, three token budgets: a small one, a large one, and a controlled one.

The machine is measured first, and the promise and the load are set by its speed, so that the same question is asked
everywhere: what if prompts come faster than a small budget can take them, and a large one stalls every stream?
"""

import asyncio
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from envs.slo import Slo
from envs.trace import Workload, make_workload
from profiles.bench import progress_bar
from profiles.bench_report import summarise, write_json
from profiles.iterations import read_iterations
from profiles.load import replay
from profiles.plot import plot_runs

SMALL, AIM, LARGE = 32, 192, 2048
POLICIES = {f"static {budget}": f"static:budget={budget}" for budget in (SMALL, LARGE)} | {"pid": "pid"}
PHASES_S = (10, 14, 16)  # calm, burst, calm
CALM, BURST = 0.3, 1.0  # load, as a share of what a budget of AIM tokens can prefill
MEAN_PROMPT = 430
LENGTHS = "lognormal:350/0.7/1200,48/0.4/96"
READY_S = 120.0

Start = Callable[..., BaseProcess]
"""Starts a verb of the command line as a child process: `start("serve", "--port", "8000")`."""


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


class Demo:
    """The running engine, and the replays made on it one after the other."""

    def __init__(self, start: Start, server: BaseProcess, name: str, base_url: str, seed: int) -> None:
        self._start = start
        self._server = server
        self._name = name
        self._base_url = base_url
        self._seed = seed

    def replay_under(self, policy: str, slo: Slo | None, workload: Workload, folder: Path) -> dict[str, Any]:
        """Replay the workload with a sidecar running `policy`; telemetry, journal and figures go to `folder`."""
        self._wait_for("/metrics", 'source="fallback"} 1.0', self._server)  # the sidecar before has left
        journal = folder / "journal"
        flags = ["--engine", self._name, "--policy", policy, "--journal", str(journal)]
        with _running(self._start("control", *flags, *(["--slo", str(slo)] if slo else []))) as sidecar:
            self._wait_for("/metrics", 'source="controller"} 1.0', sidecar)
            with progress_bar(f"{policy:>20}") as report:
                rng = np.random.default_rng(self._seed)
                result = asyncio.run(replay(workload, self._base_url, rng, progress=report))
        summary = summarise(result, slo)
        write_json(folder / "bench.json", summary)
        pq.write_table(read_iterations(journal), folder / "telemetry.parquet")
        if result.interrupted:
            raise KeyboardInterrupt
        return summary

    def wait_until_ready(self) -> None:
        self._wait_for("/health", "", self._server)

    def _wait_for(self, path: str, text: str, process: BaseProcess) -> None:
        asyncio.run(_until(f"{self._base_url}{path}", text, process))


def run_demo(start: Start, out: Path, seed: int) -> int:
    """Run the comparison and leave telemetry, journals, figures and the picture in `out`; returns the exit status."""
    console = Console()
    shutil.rmtree(out, ignore_errors=True)
    port = _free_port()
    name = f"demo-{port}"
    console.print("Starting the engine ...")
    with _running(start("serve", "--name", name, "--port", str(port))) as server:
        demo = Demo(start, server, name, f"http://127.0.0.1:{port}", seed)
        demo.wait_until_ready()
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


def _measure(demo: Demo, folder: Path, seed: int) -> Machine:
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


async def _until(url: str, text: str, process: BaseProcess) -> None:
    """Wait until the page holds the text. Raises ConnectionError if the process dies or nothing comes for long."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(READY_S):
        while process.is_alive():
            try:
                async with session.get(url) as response:
                    if response.status == 200 and text in await response.text():
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)
    raise ConnectionError(f"{process.name} ended with exit status {process.exitcode} before it was ready")


@contextmanager
def _running(process: BaseProcess) -> Iterator[BaseProcess]:
    try:
        yield process
    finally:
        process.terminate()
        process.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
