"""The ranks' meeting place and links, between real processes over gloo."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.kv_sizing import rehearse
from engine.model_config import PACER_26M
from engine.model_runner import ModelRunner
from engine.parallel import groups
from engine.parallel.groups import StageLink, join, rank_of
from engine.shard import Shard
from engine.weights import dummy_weights

CPU = torch.device("cpu")
SMALL = replace(PACER_26M, num_hidden_layers=3, sliding_windows=(None,) * 3)
STAGES = 3
N_TOKENS, MOST_REQUESTS = 128, 8
PATIENCE_S = 30.0
SHORT_S = 2.0
LINKS: list[StageLink] = []  # of this process: what a link still sends must not end with the function that made it

Work = Callable[..., Any]


def run_ranks(work: Work, shards: list[Shard], folder: Path) -> list[Any]:
    """What `work(shard, folder)` returns in a process for each shard."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in shards]
    processes = [
        spawn.Process(target=_send, args=(work, shard, folder, there))
        for shard, (_, there) in zip(shards, pipes, strict=True)
    ]
    try:
        for process, (_, there) in zip(processes, pipes, strict=True):
            process.start()
            there.close()
        assert all(here.poll(PATIENCE_S) for here, _ in pipes), "a rank does not answer"
        return [here.recv() for here, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _send(work: Work, shard: Shard, folder: Path, there: Any) -> None:
    there.send(work(shard, folder))
    multiprocessing.Event().wait()  # whoever ends first would break the others' connections


def rehearsed(shard: Shard, folder: Path) -> tuple[list[float], list[tuple[int, ...]], bool]:
    """Of a rank that has rehearsed: size of the hidden states that came, shapes of the copies kept, any left over."""
    config = EngineConfig(
        pipeline_parallel=STAGES,
        look_ahead=True,
        max_model_tokens=64,
        max_requests=MOST_REQUESTS,
        max_budget_tokens=N_TOKENS,
        budget_tokens=64,
        chunk_tokens=64,
        block_tokens=16,
        kv_blocks=8,
    )
    join(shard, CPU, folder)
    LINKS.append(link := StageLink(shard, config.depth, CPU))
    weights = dummy_weights(SMALL, torch.float32, 0, CPU, shard)
    runner = ModelRunner(SMALL, weights, config, threads=1, clock=count().__next__, shard=shard)
    came: list[float] = []
    executions = []
    real = runner.execute

    def execute(step: Any, hidden: torch.Tensor | None = None) -> Any:
        if hidden is not None:
            came.append(float(hidden.norm()))
        executions.append(real(step, hidden))
        return executions[-1]

    runner.execute = execute  # type: ignore[method-assign]
    rehearse(runner, link.compute)
    return came, [tuple(copy.shape) for _, copy in link._sending], any(e.hidden is not None for e in executions)


def test_a_rehearsal_fills_the_links_as_serving_does(tmp_path: Path) -> None:
    first, middle, last = run_ranks(rehearsed, [Shard(0, 1, stage, STAGES) for stage in range(STAGES)], tmp_path)
    depth = STAGES + 1
    copies, tokens = [(N_TOKENS, SMALL.hidden_size)] * depth, [(MOST_REQUESTS,)] * depth
    assert [first[1], middle[1], last[1]] == [copies, copies, tokens]
    assert first[0] == []
    for came, _, _ in (middle, last):
        assert len(came) == depth + 1
        assert len(set(came)) == 1, "the same step every time"
        assert came[0] > 0
    assert last[0][0] != middle[0][0], "the middle stage has added its layer"
    assert not any(left_over for _, _, left_over in (first, middle, last))


def alone(shard: Shard, folder: Path) -> str:
    groups.START_S = SHORT_S
    try:
        join(shard, CPU, folder)
    except RuntimeError as error:
        return type(error).__name__
    return "joined"


def test_a_rank_does_not_wait_for_ever_for_those_that_never_come(tmp_path: Path) -> None:
    assert run_ranks(alone, [Shard(0, 2, 0, 1)], tmp_path) != ["joined"]


def left_alone(shard: Shard, folder: Path) -> str:
    groups.START_S = SHORT_S
    tensor_group = join(shard, CPU, folder)
    if rank_of(shard) == 1:
        return "silent"
    try:
        tensor_group.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return str(error)
    return "reduced"


@pytest.mark.timeout(120)
def test_the_time_allowed_holds_in_tensor_groups_too(tmp_path: Path) -> None:
    heard, silent = run_ranks(left_alone, [Shard(0, 2, 0, 1), Shard(1, 2, 0, 1)], tmp_path)
    assert silent == "silent"
    assert "imed out" in heard
