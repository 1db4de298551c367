"""vLLM's OpenAI server as a child process, with a token budget that can be set while it runs."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

READY_S, STOP_S = 300.0, 20.0


class VllmServer:
    def __init__(self, base_url: str, budget_file: Path) -> None:
        self.base_url = base_url
        self._budget_file = budget_file

    def set_budget(self, tokens: int) -> None:
        """In force from the next step on. The file is written in place: the scheduler holds it open."""
        with self._budget_file.open("r+") as file:
            file.write(f"{tokens:<15}")


@contextmanager
def vllm_server(path: Path, model: Path, longest: int, out: Path) -> Iterator[VllmServer]:
    """A server with the packages in `path`, healthy; gone when the context is left. Its log is vllm.log in `out`.

    Its defaults, but for what makes it comparable: 256 sequences, no prefix caching, random weights. Raises
    ConnectionError if it ends or does not come up.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    budget_file = (out / "budget").absolute()
    budget_file.write_text(f"{8192:<15}")
    environment = os.environ | {
        "PYTHONPATH": f"{path}:{Path(__file__).parent.parent}",
        "PACER_BUDGET": str(budget_file),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(longest)]
    command += ["--max-num-batched-tokens", "8192", "--max-num-seqs", "256", "--no-enable-prefix-caching"]
    command += ["--scheduler-cls", "benchmarks.vllm_budget.BudgetScheduler", "--disable-uvicorn-access-log"]
    log = out / "vllm.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = VllmServer(f"http://127.0.0.1:{port}", budget_file)
    try:
        _wait_until_healthy(server.base_url, process, log)
        yield server
    finally:
        _end(process)


def _wait_until_healthy(base_url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            break
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if urllib.request.urlopen(f"{base_url}/health", timeout=5).status == 200:
                return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise ConnectionError(f"vLLM did not come up within {READY_S:.0f} s (exit status {process.poll()}):\n{tail}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The server and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
