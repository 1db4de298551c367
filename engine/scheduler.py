"""Owns every request in the engine: forms batches under the knobs, books their tokens, preempts, finishes.

No torch, no clock: times come in as arguments, so the same scheduler serves the real engine and the simulator.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from engine.batching import SCHEDULES, Limits, RequestArrays, empty_plan, form_batch
from engine.block_manager import BlockManager, extend_hashes
from engine.config import EngineConfig
from engine.protocol import Finished, QueueState
from engine.request import Abort, Batch, FinishReason, IntArray, Request, Submit, TokenOutput


@dataclass(slots=True)
class StepOutput:
    """What an iteration gave: tokens for the clients, and what `Completion` reports of them."""

    tokens: list[TokenOutput] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    tbt_slots: list[int] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    ttft_slots: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)


class Scheduler:
    """Requests in, batches out. `schedule` and `update` alternate; `submit` and `abort` come between iterations."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = BlockManager(
            config.kv_blocks, config.block_tokens, config.max_blocks_per_request, config.prefix_caching
        )
        self.running: list[Request] = []  # oldest admission first
        self._prefilling: list[Request] = []  # those of them with prompt left to compute
        self.waiting: deque[Request] = deque()
        self.preemptions = 0
        self._by_id: dict[str, Request] = {}
        self._free_slots: list[int] = []
        self._arrays = RequestArrays(*(np.zeros(0, np.int64) for _ in RequestArrays._fields))
        self._last_token_ns: IntArray = np.zeros(0, np.int64)
        self._limits = Limits(config.max_requests, config.max_budget_tokens, config.block_tokens, config.tile_tokens)
        self._plan = empty_plan(config.max_requests)
        self._by_slot: dict[int, Request] = {}
        self._prefill_turn = True
        self._submitted = 0
        self._waiting_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def submit(self, submit: Submit, now_ns: int) -> None:
        """Queue a request. Raises ValueError if it cannot ever run here (the server has checked; others may not)."""
        total = len(submit.prompt_ids) + submit.sampling.max_tokens
        if not submit.prompt_ids:
            raise ValueError(f"request {submit.request_id!r} has no prompt: it needs one token at least")
        if total > self.config.max_model_tokens:
            raise ValueError(
                f"request {submit.request_id!r} may grow to {total} tokens, the model length is "
                f"{self.config.max_model_tokens}: shorten the prompt or max_tokens"
            )
        if submit.request_id in self._by_id:
            raise ValueError(f"request id {submit.request_id!r} is already in use")
        if not self._free_slots:
            self._grow()
        slot = self._free_slots.pop()
        seed = hash((self.config.seed, self._submitted)) & (2**63 - 1)
        arrival_ns = now_ns if submit.arrival_ns is None else min(submit.arrival_ns, now_ns)
        request = Request(submit, slot, seed, arrival_ns)
        self._submitted += 1
        self._by_id[request.id] = self._by_slot[slot] = request
        self.waiting.append(request)
        self._waiting_tokens += request.n_prompt
        self._reset(request)

    def abort(self, abort: Abort) -> None:
        """Forget a request and free its blocks; one that has already ended is nothing to do."""
        request = self._by_id.get(abort.request_id)
        if request is None:
            return
        if request in self.waiting:
            self.waiting.remove(request)
            self._waiting_tokens -= len(request.token_ids)
        else:
            self.running.remove(request)
            self._prefilling = [r for r in self._prefilling if r is not request]
        self._drop(request)

    def schedule(self, budget_tokens: int, chunk_tokens: int, now_ns: int) -> Batch:
        """Form the next batch under the knobs and take its KV blocks. An empty batch means that nothing can run."""
        candidates = list(islice(self.waiting, self.config.max_requests))
        if self.config.prefix_caching:
            self._look_up_prefixes(candidates)
        else:
            self._arrays.freeable_blocks[:] = self.blocks.held
        self._arrays.held_blocks[:] = self.blocks.held
        n_decodes, n_prefills, n_admitted, n_preempted = form_batch(
            SCHEDULES[self.config.schedule],
            budget_tokens,
            chunk_tokens,
            self._prefill_turn,
            self.blocks.free_blocks,
            np.array([r.slot for r in self.running], np.int64),
            np.array([r.slot for r in candidates], np.int64),
            self._arrays,
            self._limits,
            self._plan,
        )
        self._preempt(n_preempted)
        self._admit(n_admitted, now_ns)
        self._prefill_turn = n_decodes > 0
        return self._take(n_decodes, n_decodes + n_prefills + n_admitted)

    def update(self, batch: Batch, token_ids: list[int], now_ns: int) -> StepOutput:
        """Book a completed batch: `token_ids` holds one token for each row of the batch that samples."""
        self._arrays.context[batch.slots] += batch.n_tokens
        self._prefilling = [r for r in self._prefilling if not self._is_prefilled(r)]
        sampled = batch.slots[batch.samples]
        gaps_ns = (now_ns - self._last_token_ns[sampled]).tolist()
        self._last_token_ns[sampled] = now_ns
        output = StepOutput()
        rows = np.flatnonzero(batch.samples).tolist()
        for row, token_id, gap_ns in zip(rows, token_ids, gaps_ns, strict=True):
            request = batch.requests[row]
            first = request.n_output == 0
            if first:
                output.ttft_s.append((now_ns - request.arrival_ns) * 1e-9)
                output.ttft_slots.append(request.slot)
            else:
                output.tbt_s.append(gap_ns * 1e-9)
                output.tbt_slots.append(request.slot)
            output.tokens.append(self._book(request, token_id, first))
        if self.config.prefix_caching:
            self._remember_blocks(batch)
        for token in output.tokens:
            if token.finish_reason is not None:
                request = self._by_id[token.request_id]
                output.finished.append(Finished(request.slot, request.arrival_ns, request.n_prompt, request.n_output))
                self.running.remove(request)
                self._drop(request)
        return output

    def queue_state(self, now_ns: int) -> QueueState:
        """Who waits now, after `schedule`."""
        head = self._prefilling[0] if self._prefilling else self.waiting[0] if self.waiting else None
        head_context = int(self._arrays.context[head.slot]) if head else 0
        return QueueState(
            running_requests=len(self.running),
            waiting_requests=len(self.waiting),
            waiting_prompt_tokens=self._waiting_tokens,
            oldest_wait_s=(now_ns - self.waiting[0].arrival_ns) * 1e-9 if self.waiting else 0.0,
            head_remaining_tokens=int(self._arrays.prefill_end[head.slot]) - head_context if head else 0,
            head_context_tokens=head_context,
        )

    def check(self) -> None:
        """Raise AssertionError if the books disagree; for tests and idle moments."""
        self.blocks.check()
        live = {r.slot for r in self.running}
        assert set(np.flatnonzero(self.blocks.held).tolist()) <= live, "blocks held by a request that does not run"
        assert len(self._by_id) == len(self.running) + len(self.waiting) == len(self._by_slot)
        assert self._prefilling == [r for r in self.running if not self._is_prefilled(r)]
        assert self._waiting_tokens == sum(len(r.token_ids) for r in self.waiting)

    def _is_prefilled(self, request: Request) -> bool:
        return bool(self._arrays.context[request.slot] >= self._arrays.prefill_end[request.slot])

    def _grow(self) -> None:
        size = len(self._last_token_ns)
        more = max(64, size)
        self._arrays = RequestArrays(*(np.concatenate([a, np.zeros(more, np.int64)]) for a in self._arrays))
        self._last_token_ns = np.concatenate([self._last_token_ns, np.zeros(more, np.int64)])
        self._free_slots.extend(range(size + more - 1, size - 1, -1))
        self.blocks.grow(size + more)

    def _reset(self, request: Request) -> None:
        for array in self._arrays:
            array[request.slot] = 0
        self._arrays.prefill_end[request.slot] = len(request.token_ids)
        self._arrays.need_blocks[request.slot] = self._prefill_blocks(request)

    def _prefill_blocks(self, request: Request) -> int:
        return -(-len(request.token_ids) // self.config.block_tokens)

    def _drop(self, request: Request) -> None:
        self.blocks.release(request.slot)
        del self._by_id[request.id], self._by_slot[request.slot]
        self._free_slots.append(request.slot)

    def _preempt(self, n_preempted: int) -> None:
        """Recompute preemption: blocks are freed, the tokens so far become the prompt, first in the queue again."""
        for slot in self._plan.preempted[:n_preempted].tolist():
            request = self._by_slot[slot]
            assert self.running[-1] is request, "the batching rule preempts from the tail"
            self.running.pop()
            self._prefilling = [r for r in self._prefilling if r is not request]
            self.blocks.release(slot)
            self._reset(request)
            self.waiting.appendleft(request)
            self._waiting_tokens += len(request.token_ids)
        self.preemptions += n_preempted

    def _admit(self, n_admitted: int, now_ns: int) -> None:
        admitted = [self.waiting.popleft() for _ in range(n_admitted)]
        for request in admitted:  # all cached blocks first, before any of them could be taken as a free one
            if self.config.prefix_caching:
                cached = int(self._arrays.cached_tokens[request.slot])
                self.blocks.share(request.slot, self._cached_blocks(request))
                self._arrays.context[request.slot] = cached
                if request.first_scheduled_ns is None:
                    request.cached_tokens = cached
            if request.first_scheduled_ns is None:
                request.first_scheduled_ns = now_ns
        for request in admitted:
            self.blocks.extend(request.slot, len(request.token_ids))
            self._waiting_tokens -= len(request.token_ids)
        self.running.extend(admitted)
        self._prefilling.extend(admitted)

    def _take(self, n_decodes: int, n_rows: int) -> Batch:
        slots = self._plan.slots[:n_rows].copy()
        n_tokens = self._plan.tokens[:n_rows].copy()
        context = self._arrays.context[slots]
        full = context[:n_decodes] >= self.blocks.held[slots[:n_decodes]] * self.config.block_tokens
        for row in np.flatnonzero(full).tolist():
            self.blocks.extend(int(slots[row]), int(context[row]) + 1)
        samples = context + n_tokens >= self._arrays.prefill_end[slots]
        requests = [self._by_slot[slot] for slot in slots.tolist()]
        return Batch(requests, n_decodes, slots, n_tokens, context, samples, self.blocks.tables[slots])

    def _book(self, request: Request, token_id: int, first: bool) -> TokenOutput:
        request.token_ids.append(token_id)
        reason = None
        if token_id in request.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif request.n_output >= request.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if not first:
            return TokenOutput(request.id, token_id, reason)
        assert request.first_scheduled_ns is not None, "a request has a token before it was scheduled"
        queue_s = (request.first_scheduled_ns - request.arrival_ns) * 1e-9
        return TokenOutput(request.id, token_id, reason, queue_s, request.cached_tokens)

    def _cached_blocks(self, request: Request) -> list[int]:
        """Cached blocks of its prefix, short of the last token: at least one must be computed to sample the next."""
        usable = (len(request.token_ids) - 1) // self.config.block_tokens
        return self.blocks.find_prefix(request.block_hashes[:usable])

    def _look_up_prefixes(self, candidates: list[Request]) -> None:
        for request in candidates:
            extend_hashes(request.block_hashes, request.token_ids, self.config.block_tokens)
            cached = self._cached_blocks(request)
            self._arrays.cached_tokens[request.slot] = len(cached) * self.config.block_tokens
            in_use = self.blocks.in_use(cached)  # by others: sharing them costs no free block
            self._arrays.need_blocks[request.slot] = self._prefill_blocks(request) - in_use
        for request in self.running:
            self._arrays.freeable_blocks[request.slot] = self.blocks.freeable(request.slot)

    def _remember_blocks(self, batch: Batch) -> None:
        block_tokens = self.config.block_tokens
        ends = self._arrays.context[batch.slots]
        for request, start, end in zip(batch.requests, batch.context.tolist(), ends.tolist(), strict=True):
            if start // block_tokens == end // block_tokens:
                continue
            extend_hashes(request.block_hashes, request.token_ids, block_tokens)
            for index in range(start // block_tokens, end // block_tokens):
                self.blocks.remember(request.slot, index, request.block_hashes[index])
