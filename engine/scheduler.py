"""Owns every request in the engine: forms batches under the knobs, books their tokens, preempts, finishes.

No torch, no clock: times come in as arguments, so the same scheduler serves the real engine and the simulator.
"""

from collections import deque
from itertools import islice

import numpy as np

from engine.batching import SCHEDULES, Limits, RequestArrays, empty_plan, form_batch
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.prefix_cache import cached_blocks, look_up, remember
from engine.prompts import prompts_to_compute
from engine.protocol import Finished, QueueState
from engine.request import Abort, Batch, FinishReason, Request, StepOutput, Submit, TokenOutput


class Scheduler:
    """Requests in, batches out; each batch formed by `schedule` comes back to `update`, in the same order.

    A batch that could not be launched goes to `give_up` instead, before another is formed.

    Up to `config.depth` of them are in flight. `submit` and `abort` come in between. Blocks that come free may go to
    the next batch at once, whatever is in flight: the device runs batches in order.
    """

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
        self._limits = Limits(
            *(config.max_requests, config.max_budget_tokens, config.block_tokens, config.tile_tokens),
            *(config.pipeline_parallel, config.depth),
        )
        self._plan = empty_plan(config.max_requests)
        self._by_slot: dict[int, Request] = {}
        self._in_flight: deque[Batch] = deque()  # oldest first
        self._awaits = config.look_ahead and config.pipeline_parallel > 1
        self._awaited = False  # whether the tokens of the oldest count as known
        self._prefill_turn = True
        self._submitted = 0
        self._waiting_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether there are requests to serve, or batches in flight (if only for requests that were aborted)."""
        return bool(self._by_id or self._in_flight)

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
        """Forget a request and free its blocks; one that has already ended is nothing to do.

        What is in flight of it is computed for nothing.
        """
        request = self._by_id.get(abort.request_id)
        if request is None:
            return
        if request in self.waiting:
            self.waiting.remove(request)
            self._waiting_tokens -= len(request.token_ids)
        else:
            self._stop(request)
        self._drop(request)

    def schedule(self, budget_tokens: int, chunk_tokens: int, now_ns: int) -> Batch:
        """Form the next batch under the knobs and take its KV blocks.

        An empty batch means that nothing can run until one in flight has ended; it is not to be given to `update`.
        """
        assert len(self._in_flight) < self.config.depth, "as many batches are in flight as there may be"
        if self._awaits and self._in_flight and not self._awaited:
            self._await(self._in_flight[0])
        candidates = list(islice(self.waiting, self.config.max_requests))
        if self.config.prefix_caching:
            look_up(candidates, self.running, self._arrays, self.blocks)
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
        n_rows = n_decodes + n_prefills + n_admitted
        batch = self._take(n_decodes, n_rows)
        if n_rows > 0:
            self._prefill_turn = n_decodes > 0
            self._in_flight.append(batch)
        return batch

    def update(self, batch: Batch, token_ids: list[int], now_ns: int) -> StepOutput:
        """Book a completed batch: `token_ids` holds one token for each row of the batch that samples.

        Rows of requests that were aborted, preempted or done since the batch was formed are ignored.
        """
        oldest = self._in_flight.popleft()
        assert oldest is batch, "not the oldest in flight"
        output = StepOutput()
        for row, token_id in zip(np.flatnonzero(batch.samples).tolist(), token_ids, strict=True):
            request = batch.requests[row]
            if request.generation == batch.generations[row]:
                self._book(request, token_id, now_ns, output)
        if self.config.pipeline_parallel > 1 and not self._awaited:  # the next token of each can be computed now
            self._arrays.context_limit[output.ttft_slots + output.tbt_slots] += 1
        self._awaited = False
        if self.config.prefix_caching:
            remember(batch, self.blocks)
        for token in output.tokens:
            if token.finish_reason is not None:
                request = self._by_id[token.request_id]
                output.finished.append(Finished(request.slot, request.arrival_ns, request.n_prompt, request.n_output))
                self._stop(request)
                self._drop(request)
        return output

    def give_up(self, batch: Batch, error: str) -> list[TokenOutput]:
        """Take back the batch formed last, which needs more memory than there is, and make the next one need less.

        The requests with prompt chunks in it end, of decodes alone the youngest; there is always one. The other rows
        are scheduled again. Returns the ends, which tell the clients `error`.
        """
        latest = self._in_flight.pop()
        assert latest is batch, "not formed last"
        self._arrays.context[batch.slots] = batch.context
        ended = batch.requests[batch.n_decodes :] or batch.requests[-1:]
        for request in ended:
            self._stop(request)
            self._drop(request)
        return [TokenOutput(request.id, -1, FinishReason.ABORT, error=error) for request in ended]

    def queue_state(self, batch: Batch | None, now_ns: int) -> QueueState:
        """Who waits when `batch` has just been formed; None: there was nothing to form."""
        remaining, context = prompts_to_compute(batch, self._prefilling, self.waiting, self._arrays)
        return QueueState(
            running_requests=len(self.running),
            waiting_requests=len(self.waiting),
            waiting_prompt_tokens=self._waiting_tokens,
            oldest_wait_s=(now_ns - self.waiting[0].arrival_ns) * 1e-9 if self.waiting else 0.0,
            prompt_remaining_tokens=remaining,
            prompt_context_tokens=context,
        )

    def check(self) -> None:
        """Raise AssertionError if the books disagree; for tests and idle moments."""
        self.blocks.check()
        live = {r.slot for r in self.running}
        assert set(np.flatnonzero(self.blocks.held).tolist()) <= live, "blocks held by a request that does not run"
        assert len(self._by_id) == len(self.running) + len(self.waiting) == len(self._by_slot)
        assert self._prefilling == [r for r in self.running if not self._is_prefilled(r)]
        assert self._waiting_tokens == sum(len(r.token_ids) for r in self.waiting)
        slots = [r.slot for r in self.running]
        assert np.all(self._arrays.context[slots] <= self._arrays.context_limit[slots]), "a row beyond the last token"
        assert len(self._in_flight) <= self.config.depth

    def _is_prefilled(self, request: Request) -> bool:
        return bool(self._arrays.context[request.slot] >= self._arrays.prefill_end[request.slot])

    def _grow(self) -> None:
        size = len(self._arrays.context)
        more = max(64, size)
        self._arrays = RequestArrays(*(np.concatenate([a, np.zeros(more, np.int64)]) for a in self._arrays))
        self._free_slots.extend(range(size + more - 1, size - 1, -1))
        self.blocks.grow(size + more)

    def _reset(self, request: Request) -> None:
        for array in self._arrays:
            array[request.slot] = 0
        known = len(request.token_ids)
        in_all = request.n_prompt + request.sampling.max_tokens
        self._arrays.prefill_end[request.slot] = known
        self._arrays.context_limit[request.slot] = known if self.config.pipeline_parallel > 1 else in_all - 1
        self._arrays.need_blocks[request.slot] = -(-known // self.config.block_tokens)

    def _stop(self, request: Request) -> None:
        """Take it out of the running ones, whatever is in flight of it."""
        self.running.remove(request)
        self._prefilling = [r for r in self._prefilling if r is not request]
        request.generation += 1

    def _drop(self, request: Request) -> None:
        self.blocks.release(request.slot)
        del self._by_id[request.id], self._by_slot[request.slot]
        self._free_slots.append(request.slot)

    def _preempt(self, n_preempted: int) -> None:
        """Recompute preemption: blocks are freed, the tokens so far become the prompt, first in the queue again."""
        for slot in self._plan.preempted[:n_preempted].tolist():
            request = self._by_slot[slot]
            self._stop(request)
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
                self.blocks.share(request.slot, cached_blocks(request, self.blocks))
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

    def _await(self, oldest: Batch) -> None:
        """Let the next token of each of its requests be computed: by then its own are on the device."""
        self._awaited = True
        limit = self._arrays.context_limit
        for row in np.flatnonzero(oldest.samples).tolist():
            request = oldest.requests[row]
            if request.generation == oldest.generations[row]:
                last = request.n_prompt + request.sampling.max_tokens - 1  # is never computed
                limit[request.slot] = min(limit[request.slot] + 1, last)

    def _take(self, n_decodes: int, n_rows: int) -> Batch:
        """The planned batch, with blocks for its tokens; contexts go on as if it had run."""
        slots = self._plan.slots[:n_rows].copy()
        n_tokens = self._plan.tokens[:n_rows].copy()
        context = self._arrays.context[slots]
        full = context[:n_decodes] >= self.blocks.held[slots[:n_decodes]] * self.config.block_tokens
        for row in np.flatnonzero(full).tolist():
            self.blocks.extend(int(slots[row]), int(context[row]) + 1)
        ends = context + n_tokens
        samples = ends >= self._arrays.prefill_end[slots]
        self._arrays.context[slots] = ends
        if n_rows > n_decodes:
            self._prefilling = [r for r in self._prefilling if not self._is_prefilled(r)]
        requests = [self._by_slot[slot] for slot in slots.tolist()]
        tables = self.blocks.tables[slots, : self.blocks.held[slots].max(initial=0)]
        generations = [r.generation for r in requests]
        return Batch(requests, n_decodes, slots, n_tokens, context, samples, tables, generations)

    def _book(self, request: Request, token_id: int, now_ns: int, output: StepOutput) -> None:
        first = request.n_output == 0
        since_ns = request.arrival_ns if first else request.last_token_ns
        (output.ttft_s if first else output.tbt_s).append((now_ns - since_ns) * 1e-9)
        (output.ttft_slots if first else output.tbt_slots).append(request.slot)
        request.last_token_ns = now_ns
        request.token_ids.append(token_id)
        reason = None
        if token_id in request.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif request.n_output >= request.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if not first:
            output.tokens.append(TokenOutput(request.id, token_id, reason))
            return
        assert request.first_scheduled_ns is not None, "a request has a token before it was scheduled"
        queue_s = (request.first_scheduled_ns - request.arrival_ns) * 1e-9
        output.tokens.append(TokenOutput(request.id, token_id, reason, queue_s, request.cached_tokens))
