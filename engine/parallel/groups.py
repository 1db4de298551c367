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
    """Between the same tensor ranks of the stages: hidden states [tokens, hidden_size] go from each stage to the next,
    and under look-ahead sampled tokens from the last to the first, which computes them in a later step.

    Every stage must make its link, and be given every step; `depth` of them may be in flight. Tokens are sent at once:
    NCCL keeps 8 small messages that nobody has asked for, and the next one occupies the device until somebody does. So
    the first stage receives all there are whenever nothing is in flight.
    """

    def __init__(self, shard: Shard, depth: int, device: torch.device) -> None:
        self._shard, self._device, self._depth = shard, device, depth
        self._before, self._after = rank_of(shard) - shard.tp_size, rank_of(shard) + shard.tp_size
        self._first, self._last = shard.tp_rank, (shard.pp_size - 1) * shard.tp_size + shard.tp_rank
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._steps = 0
        self._due: deque[tuple[int, int]] = deque()  # (step, its tokens) that the first stage has yet to receive
        self._tokens: dist.ProcessGroup | None = None
        if depth > shard.pp_size > 1:
            # With communicators of its own: what is sent in one is received in order.
            self._tokens = dist.new_group(timeout=timedelta(seconds=START_S))
            self._meet(self._tokens)

    def compute(self, runner: ModelRunner, step: StepInput) -> Execution:
        """The rank's part of a step; `hidden` has been passed on, and let go of."""
        hidden = None
        if not self._shard.is_first:
            hidden = self._receive(len(step.token_ids), runner.model.hidden_size, runner.transformer.dtype)
        elif self._tokens is not None:
            done = self._depth if step.in_flight else 1  # what ran so many steps ago is done, and its tokens are there
            self._receive_tokens(self._steps - (step.in_flight if step.has_unknown else done), runner.sampled)
            self._due.append((self._steps, len(step.sampled_rows)))
        self._steps += 1
        execution = runner.execute(step, hidden)
        if execution.hidden is not None:
            self._send(execution.hidden, self._after)
            execution.hidden = None  # it would stay in memory for as long as the step is in flight
        elif self._tokens is not None and len(step.sampled_rows) > 0:
            self._send(runner.sampled[: len(step.sampled_rows)], self._first, self._tokens)
        return execution

    def rest(self, runner: ModelRunner) -> None:
        """Nothing is in flight."""
        self._receive_tokens(self._steps, runner.sampled)

    def close(self, runner: ModelRunner) -> None:
        """Let all that was sent arrive: on a CPU a process that has ended sends no more."""
        self.rest(runner)
        while self._sending:
            self._sending.popleft()[0].wait()

    def _meet(self, tokens: dist.ProcessGroup) -> None:
        """Make the communicators of the tokens now, before what they take counts as free memory."""
        nothing = torch.zeros(1, dtype=torch.int32, device=self._device)
        if self._shard.is_first:
            dist.recv(nothing, self._last, tokens)
        elif self._shard.is_last:
            dist.send(nothing, self._first, tokens)

    def _receive_tokens(self, latest: int, sampled: torch.Tensor) -> None:
        """Those of all steps up to `latest`, of which the newest stay in `sampled`; in the order of the stream."""
        while self._due and self._due[0][0] <= latest:
            _, n_tokens = self._due.popleft()
            if n_tokens > 0:
                dist.recv(sampled[:n_tokens], self._last, self._tokens)

    def _receive(self, n_tokens: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """On a CPU waits for them; on CUDA what is computed next on this stream does.

        In the order of the stream and not earlier, on another one: NCCL would wait on multiprocessors that the
        microbatch before still computes with, while what is sent meanwhile waits in NCCL's buffers all the same.
        """
        hidden = torch.empty(n_tokens, hidden_size, dtype=dtype, device=self._device)
        dist.recv(hidden, self._before)
        return hidden

    def _send(self, x: torch.Tensor, rank: int, group: dist.ProcessGroup | None = None) -> None:
        """Does not wait for the receiver, and keeps a copy until it has taken it: `x` may be overwritten."""
        copy = x.clone()
        work = dist.isend(copy, rank, group)
        assert work is not None, "the rank is in the group that it sends in"
        self._sending.append((work, copy))
        if len(self._sending) > self._depth:  # has arrived: no more than `depth` microbatches are on their way
            self._sending.popleft()[0].wait()
