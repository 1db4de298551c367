"""A real engine started for measurements, and replays on it, each under a sidecar with a law of its own."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow.parquet as pq

from envs.slo import Slo
from envs.trace import Workload
from profiles.bench import progress_bar
from profiles.bench_report import summarise, write_json
from profiles.iterations import read_iterations
from profiles.load import replay

READY_S = 300.0  # a large model loads, compiles and captures graphs

Start = Callable[..., BaseProcess]
"""Starts a verb of the command line as a child process: `start("serve", "--port", "8000")`."""


class LiveEngine:
    """The running engine, and the replays made on it one after the other."""

    def __init__(self, start: Start, server: BaseProcess, name: str, base_url: str, seed: int) -> None:
        self._start = start
        self._server = server
        self._name = name
        self._base_url = base_url
        self._seed = seed

    def replay_under(
        self, policy: str, slo: Slo | None, workload: Workload, folder: Path, *law_flags: str
    ) -> dict[str, Any]:
        """Replay the workload with a sidecar running `policy`; telemetry, journal and figures go to `folder`.

        They replace those of a replay before, which may have been interrupted: a journal of both would be of neither.
        """
        self._wait_for("/metrics", 'source="fallback"} 1.0', self._server)  # the sidecar before has left
        journal = folder / "journal"
        for part in journal.glob("part-*.parquet"):
            part.unlink()
        flags = ["--engine", self._name, "--policy", policy, "--journal", str(journal), *law_flags]
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


@contextmanager
def live_engine(start: Start, prefix: str, seed: int, *flags: str) -> Iterator[LiveEngine]:
    """An engine with its HTTP server, ready; gone when the context is left. `flags` are those of `pacer serve`."""
    port = _free_port()
    name = f"{prefix}-{port}"
    with _running(start("serve", "--name", name, "--port", str(port), *flags)) as server:
        engine = LiveEngine(start, server, name, f"http://127.0.0.1:{port}", seed)
        engine.wait_until_ready()
        yield engine


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
