"""Starting: what is refused before the weights are loaded, what is rehearsed, and how a start is broken off."""

import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import LLAMA_SIZES
from live import free_port, is_spawned, wait_for

from engine.config import EngineConfig, ModelSource
from engine.doctor import diagnose
from engine.execution import Execution
from engine.kv_sizing import rehearse
from engine.loader import _settle_on_gpu, load_stage
from engine.model_config import PACER_26M
from engine.model_runner import ModelRunner
from engine.shard import Shard
from engine.step_input import OutOfDeviceMemory, StepInput
from engine.weights import dummy_weights

SMALL = replace(PACER_26M, num_hidden_layers=2, sliding_windows=(None,) * 2)
CONFIG = EngineConfig(max_model_tokens=64, max_requests=8, max_budget_tokens=256, block_tokens=16, kv_blocks=0)
TOO_MUCH = [torch.OutOfMemoryError("CUDA out of memory"), OutOfDeviceMemory("too little free memory for this step")]


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ({}, {"max_model_tokens": 513}, "max_model_tokens 513 is beyond the model's max_position_embeddings 512"),
        ({"attention": "flash-attn-2"}, {"block_tokens": 16}, "attention flash-attn-2: needs a CUDA device"),
        ({"threads": 0}, {}, "threads is 0"),
    ],
)
def test_what_cannot_run_is_refused_before_the_weights_are_loaded(
    tmp_path: Path, source: dict[str, int | str], config: dict[str, int], message: str
) -> None:
    keys = LLAMA_SIZES | {"model_type": "llama", "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(keys))  # and no weights: to load them is another error
    asked = ModelSource(**{"folder": tmp_path, **source})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_stage(asked, EngineConfig(**{"max_model_tokens": 512} | config), count().__next__)  # type: ignore[arg-type]


def runner_of(config: EngineConfig) -> ModelRunner:
    weights = dummy_weights(SMALL, torch.float32, 0, torch.device("cpu"), Shard())
    return ModelRunner(SMALL, weights, config, threads=1, clock=count().__next__)


class Watched:
    """Passes steps on to the runner; knows their sizes, and how many at once were not waited for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.sizes: list[int] = []
        self.in_flight = self.most_in_flight = 0

    def compute(self, runner: ModelRunner, step: StepInput) -> Execution:
        if self.error is not None and len(self.sizes) == 1:
            raise self.error
        self.sizes.append(len(step.token_ids))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return _Watched(self, runner.execute(step))  # type: ignore[return-value]


class _Watched:
    def __init__(self, watched: Watched, execution: Execution) -> None:
        self._watched, self._execution = watched, execution

    def tokens(self) -> list[int]:
        self._watched.in_flight -= 1
        return self._execution.tokens()


@pytest.mark.parametrize("look_ahead", [False, True])
def test_the_largest_step_is_rehearsed_with_all_in_flight_that_may_be(look_ahead: bool) -> None:
    watched, config = Watched(), replace(CONFIG, look_ahead=look_ahead, kv_blocks=4)
    rehearse(runner_of(config), watched.compute)
    assert watched.sizes == [256] * (config.depth + 1)
    assert (watched.most_in_flight, watched.in_flight) == (config.depth, 0)


@pytest.mark.parametrize("error", TOO_MUCH, ids=lambda error: type(error).__name__)
def test_a_rehearsal_without_enough_memory_names_the_sizes_and_the_remedies(error: Exception) -> None:
    runner = runner_of(CONFIG)
    asked = replace(CONFIG, kv_blocks=40)
    with pytest.raises(ValueError, match=r"^40 KV blocks \(0\.0 GiB\) and a step of 256 tokens .* lower kv_blocks"):
        _settle_on_gpu(runner, asked, 0.9, lambda blocks: blocks, Watched(error).compute)


@pytest.mark.parametrize("error", TOO_MUCH, ids=lambda error: type(error).__name__)
def test_no_memory_for_the_first_block_is_a_refusal_too(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def allocate(runner: ModelRunner, blocks: int) -> None:
        raise error

    runner = runner_of(CONFIG)
    monkeypatch.setattr(ModelRunner, "allocate", allocate)
    with pytest.raises(ValueError, match=r"^1 KV blocks .* do not fit a GPU beside the weights"):
        _settle_on_gpu(runner, CONFIG, 0.9, lambda blocks: blocks, ModelRunner.execute)


class Starting:
    """`pacer serve` over two ranks that are held up while they start, so that it starts for as long as that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = (folder / "said").open("w+")
        flags = ("--socket-dir", str(folder / "sockets"), "--port", str(free_port()), "--tensor-parallel-size", "2")
        (folder / "tmp").mkdir()
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
        self.server = psutil.Popen(
            [sys.executable, "-m", "run", "serve", *flags], stderr=self.said, stdout=self.said, env=environment
        )
        wait_for(lambda: len(self.ranks()) == 2, "the ranks' processes")
        self.family = self.server.children(recursive=True)
        for rank in self.ranks():
            rank.suspend()

    def ranks(self) -> list[psutil.Process]:
        engines = [child for child in self.server.children() if is_spawned(child)]
        return [rank for engine in engines for rank in engine.children() if is_spawned(rank)]

    def output(self) -> str:
        self.said.seek(0)
        return self.said.read()


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Starting]:
    starting = Starting(tmp_path)
    yield starting
    for process in deque([starting.server, *starting.family]):
        if process.is_running():
            process.kill()
    starting.server.wait()
    starting.said.close()


@pytest.mark.parametrize(("signal_name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_start_broken_off_leaves_nothing_behind(starting: Starting, signal_name: str, status: int) -> None:
    """SIGKILL: the engine notices that its parent is gone. The others: the parent ends the engine first."""
    starting.server.send_signal(getattr(__import__("signal"), signal_name))
    assert starting.server.wait(8) == status
    _, alive = psutil.wait_procs(starting.family, 8)
    assert not alive
    assert list((starting.folder / "tmp").iterdir()) == []
    assert "Traceback" not in starting.output()
    assert "killed" not in starting.output()


def test_the_doctor_says_what_sdpa_costs_on_a_gpu() -> None:
    assert [line for line in diagnose() if line.startswith("on CUDA, sdpa waits for the host in every step")]
