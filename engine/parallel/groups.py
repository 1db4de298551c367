"""The ranks of one host as torch.distributed sees them: tensor groups, and the links from stage to stage.

Rank `pp_rank * tp_size + tp_rank`. NCCL on GPUs, gloo over the loopback interface on CPUs.
"""

import os
import socket
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.execution import Execution
from engine.model_runner import ModelRunner
from engine.shard import SINGLE, Collectives, Shard
from engine.step_input import StepInput

START_S = 1800.0  # until all ranks have loaded their weights: hundreds of gigabytes from a slow disk


def rank_of(shard: Shard) -> int:
    return shard.pp_rank * shard.tp_size + shard.tp_rank


def join(shard: Shard, device: torch.device, directory: Path) -> Collectives:
    """Meet the other ranks through a file in `directory`, which only they know; returns the rank's tensor group.

    Waits until all have come; for this and for any other rank, later on, no longer than START_S.
    """
    if device.type == "cpu":  # by default gloo takes the host's name for an address, which need not lead to the host
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    timeout = timedelta(seconds=START_S)  # a rank may wait for one that is still loading
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        init_method=f"file://{directory / 'ranks'}",
        rank=rank_of(shard),
        world_size=shard.tp_size * shard.pp_size,
    )
    # NCCL makes a communicator at the first use of a group, which must not fall into the capture of a CUDA graph, nor
    # take memory that has been counted as free.
    smallest(0, device)
    if shard.tp_size == 1:
        return SINGLE
    groups = [  # every rank has to name every group
        dist.new_group(range(stage * shard.tp_size, (stage + 1) * shard.tp_size), timeout)
        for stage in range(shard.pp_size)
    ]
    group = TensorGroup(groups[shard.pp_rank], shard.tp_size)
    group.all_reduce(torch.zeros(1, device=device))
    return group


def smallest(n: int, device: torch.device) -> int:
    """The smallest `n` of all ranks; every rank must ask."""
    least = torch.tensor(n, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


class TensorGroup:
    """The Collectives of the ranks that share a stage. On CUDA nothing waits: all is in the order of the stream."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self._group = group
        self._size = size

    def all_reduce(self, x: torch.Tensor) -> None:
        dist.all_reduce(x, group=self._group)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(x.new_empty(self._size, *x.shape).unbind())
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)


class StageLink:
    """Hidden states [tokens, hidden_size] from the same tensor rank of the stage before, and to that of the next.

    NCCL makes the communicators of both at their first use.
    """

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._shard, self._device = shard, device
        self._before, self._after = rank_of(shard) - shard.tp_size, rank_of(shard) + shard.tp_size
        self._depth = shard.pp_size
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def compute(self, runner: ModelRunner, step: StepInput) -> Execution:
        """The rank's part of a step; `hidden` has been passed on, and let go of. Every stage must be given the step."""
        hidden = None
        if not self._shard.is_first:
            hidden = self._receive(len(step.token_ids), runner.model.hidden_size, runner.transformer.dtype)
        execution = runner.execute(step, hidden)
        if execution.hidden is not None:
            self._send(execution.hidden)
            execution.hidden = None  # it would stay in memory for as long as the step is in flight
        return execution

    def _receive(self, n_tokens: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """On a CPU waits for them; on CUDA what is computed next on this stream does.

        In the order of the stream and not earlier, on another one: NCCL would wait on multiprocessors that the
        microbatch before still computes with, while what is sent meanwhile waits in NCCL's buffers all the same.
        """
        hidden = torch.empty(n_tokens, hidden_size, dtype=dtype, device=self._device)
        dist.recv(hidden, self._before)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        """Does not wait for the receiver, and keeps a copy until it has taken it: `hidden` may be overwritten."""
        copy = hidden.clone()
        work = dist.isend(copy, self._after)
        assert work is not None, "the rank is in the group that it sends in"
        self._sending.append((work, copy))
        if len(self._sending) > self._depth:  # has arrived: no more than `depth` microbatches are on their way
            self._sending.popleft()[0].wait()
