"""Drives a runner without the scheduler: requests in scattered KV blocks, one or two iterations in flight."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.config import EngineConfig
from engine.request import Batch, Request, SamplingParams, StepResult, Submit


class PendingLike(Protocol):
    def result(self) -> StepResult: ...


class RunnerLike(Protocol):
    def launch(self, batch: Batch) -> PendingLike: ...


@dataclass
class Standing:
    """A request's progress, batches in flight included."""

    context: int
    prefill_end: int
    outputs: int
    blocks: list[int]
    lives: int = 0  # counted up by a preemption: tokens sampled before are thrown away


@dataclass
class Flight:
    pending: PendingLike
    sampled: list[tuple[Request, int]]


class Paged:
    """At most `max_requests` run; blocks that come free are used again, in any order."""

    def __init__(self, runner: RunnerLike, config: EngineConfig, seed: int = 0) -> None:
        self.runner, self.config = runner, config
        self.rng = np.random.default_rng(seed)
        self.free: list[int] = self.rng.permutation(config.kv_blocks).tolist()
        self.standing: dict[Request, Standing] = {}
        self.flights: deque[Flight] = deque()

    def batch(self, work: list[tuple[Request, int]]) -> Batch:
        """The next tokens of each request, decodes first; those that reach the end of what is known sample."""
        rows = [self._stand(request) for request, _ in work]
        for row, (_, n) in zip(rows, work, strict=True):
            while len(row.blocks) * self.config.block_tokens < row.context + n:
                row.blocks.append(self.free.pop())
        tables = np.zeros((len(work), max(len(row.blocks) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            tables[i, : len(row.blocks)] = row.blocks
        return Batch(
            requests=[request for request, _ in work],
            n_decodes=sum(row.context >= row.prefill_end for row in rows),
            slots=np.array([request.slot for request, _ in work]),
            n_tokens=np.array([n for _, n in work]),
            context=np.array([row.context for row in rows]),
            samples=np.array([row.context + n >= row.prefill_end for row, (_, n) in zip(rows, work, strict=True)]),
            block_tables=tables,
        )

    def launch(self, work: list[tuple[Request, int]], work_since_ns: int = 0) -> None:
        batch = self.batch(work)
        batch.work_since_ns = work_since_ns
        pending = self.runner.launch(batch)
        sampled = []
        for (request, n), samples in zip(work, batch.samples.tolist(), strict=True):
            row = self.standing[request]
            row.context += n
            row.outputs += samples
            if samples:
                sampled.append((request, row.lives))
        self.flights.append(Flight(pending, sampled))

    def take(self) -> StepResult:
        flight = self.flights.popleft()
        result = flight.pending.result()
        for (request, lives), token in zip(flight.sampled, result.token_ids, strict=True):
            if self.standing[request].lives == lives:
                request.token_ids.append(token)
        return result

    def preempt(self, request: Request) -> None:
        row = self.standing[request]
        self._release(row)
        self.standing[request] = Standing(0, len(request.token_ids), request.n_output, [], row.lives + 1)

    def generate(self, requests: list[Request], budget_tokens: int, preempt_every: int = 0) -> list[list[int]]:
        """All outputs. Every `preempt_every` steps the newest request loses its blocks."""
        waiting, running = deque(requests), list[Request]()
        step = 0
        while waiting or running or self.flights:
            step += 1
            if preempt_every and step % preempt_every == 0 and running:
                self.preempt(running[-1])
            while waiting and len(running) < self.config.max_requests:
                running.append(waiting.popleft())
            work = self._form(running, budget_tokens)
            if work:
                self.launch(work)
            if self.flights and (not work or len(self.flights) == self.config.depth):
                self.take()
            for request in [r for r in running if r.n_output == r.sampling.max_tokens]:
                running.remove(request)
                self._release(self.standing[request])
        return [request.token_ids[request.n_prompt :] for request in requests]

    def _form(self, running: list[Request], budget_tokens: int) -> list[tuple[Request, int]]:
        decodes, prefills, left = [], [], budget_tokens
        for request in running:
            row = self._stand(request)
            if row.context >= row.prefill_end:
                if row.outputs < request.sampling.max_tokens:
                    decodes.append((request, 1))
            elif left > 0:
                n = min(left, row.prefill_end - row.context)
                prefills.append((request, n))
                left -= n
        return decodes + prefills

    def _stand(self, request: Request) -> Standing:
        return self.standing.setdefault(request, Standing(0, len(request.token_ids), request.n_output, []))

    def _release(self, row: Standing) -> None:
        self.free += row.blocks
        row.blocks = []
        self.rng.shuffle(self.free)


def make_request(name: str, prompt: list[int], sampling: SamplingParams) -> Request:
    return Request(Submit(name, prompt, sampling), slot=0, seed=int(name), arrival_ns=0)
