"""A batch that the device has no memory for ends a few requests, never the engine and never the others."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from block_device import BlockDevice, LaunchedBatch, continuation
from test_in_flight import DEPTHS, SMALL, Asked, Engine, random_engine, random_requests

from engine.batching import SCHEDULES
from engine.config import EngineConfig, ModelSource
from engine.core import NO_MEMORY, EngineCore
from engine.link import MemoryLink
from engine.loader import load_runner
from engine.process import _warm_up
from engine.request import Batch, FinishReason, SamplingParams, Submit, TokenOutput
from engine.scheduler import Scheduler
from engine.step_input import OutOfDeviceMemory

CASES = 6
RUIN = -7  # no token

TooMuch = Callable[[Batch], bool]


class SmallDevice(BlockDevice):
    """Runs out of memory whenever `too_much(batch)`.

    The part of such a batch that ran before has left nothing good: all that the batch would have written is ruined, and
    the tokens of the batch before it are lost to the next.
    """

    def __init__(self, n_blocks: int, block_tokens: int, too_much: TooMuch) -> None:
        super().__init__(n_blocks, block_tokens)
        self.too_much = too_much
        self.failed: list[Batch] = []
        self._failed_before: list[tuple[int, Batch]] = []  # which launch came next

    def launch(self, batch: Batch) -> LaunchedBatch:
        if self.too_much(batch):
            self.failed.append(batch)
            self._failed_before.append((len(self.batches), batch))
            raise OutOfDeviceMemory("full")
        return super().launch(batch)

    def run(self, batch: Batch, known: list[list[int]], oldest: int) -> list[int]:
        while self._failed_before and self._failed_before[0][0] < self.ran:
            self._ruin(self._failed_before.pop(0)[1])
        return super().run(batch, known, oldest)

    def _ruin(self, batch: Batch) -> None:
        for sampled in self.sampled:
            sampled.clear()
        rows = zip(batch.block_tables, batch.context.tolist(), batch.n_tokens.tolist(), strict=True)
        for table, start, n in rows:
            for position in range(start, start + n):
                self.cache[table[position // self.block_tokens], position % self.block_tokens] = RUIN


class SmallEngine(Engine):
    device: SmallDevice

    def __init__(self, config: EngineConfig, too_much: TooMuch) -> None:
        super().__init__(config)
        self.device = SmallDevice(config.kv_blocks, config.block_tokens, too_much)
        self.core = EngineCore(
            *("e", config, self.scheduler, self.device, self.link, self.clock, self.delivered.extend)
        )

    @property
    def ended(self) -> list[str]:
        """Those that were given up, in order."""
        return [token.request_id for token in self.delivered if token.finish_reason is FinishReason.ABORT]


def serve(engine: SmallEngine, asked: dict[str, Asked], rng: np.random.Generator) -> None:
    names = list(asked)
    while names or engine.scheduler.has_work:
        while names and (rng.random() < 0.5 or not engine.scheduler.has_work):
            name = names.pop(0)
            engine.submit(name, asked[name].prompt, asked[name].max_tokens, asked[name].stops)
        engine.step(*rng.integers(1, 128, 2, endpoint=True).tolist())
    engine.finish()


def check_outputs(engine: SmallEngine, asked: dict[str, Asked]) -> None:
    """Whoever was in the way has one end, which says why, after tokens of its own; the others have all of theirs."""
    failed = engine.device.failed  # decodes come first, oldest first
    assert engine.ended == [r.id for batch in failed for r in batch.requests[batch.n_decodes :] or batch.requests[-1:]]
    finishes = Counter(token.request_id for token in engine.delivered if token.finish_reason is not None)
    assert finishes == dict.fromkeys(asked, 1)
    for name, request in asked.items():
        expected, outputs = continuation(request.prompt, request.max_tokens, request.stops), engine.tokens(name)
        if name in engine.ended:
            last = [token for token in engine.delivered if token.request_id == name][-1]
            assert (last.finish_reason, last.token_id, last.error) == (FinishReason.ABORT, -1, NO_MEMORY)
            assert outputs[:-1] == expected[: len(outputs) - 1]
        else:
            assert outputs == expected


def check_telemetry(engine: SmallEngine) -> None:
    """Batches that failed are not told of: every other one is, once, with every token."""
    completions, batches = engine.completions, engine.device.batches
    assert [c.iteration for c in completions] == list(range(1, len(batches) + 1))
    told = [t.batch.decode_tokens + t.batch.prefill_tokens for t in engine.link.published]
    assert [n for n in told if n > 0] == [int(batch.n_tokens.sum()) for batch in batches]
    n_tokens = len(engine.delivered) - len(engine.ended)
    assert sum(len(c.tbt_s) + len(c.ttft_s) for c in completions) == n_tokens
    n_finished = sum(token.finish_reason is not None for token in engine.delivered) - len(engine.ended)
    assert sum(len(c.finished) for c in completions) == n_finished


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_others_get_all_their_tokens_and_the_ended_are_told_once(depth: str, prefix_caching: bool) -> None:
    """Launches fail at random, under all schedules, amid preemptions and early stops."""
    decodes_failed = chunks_failed = preemptions = cached = completed = 0
    for seed in range(CASES):
        for number, schedule in enumerate(SCHEDULES):
            rng = np.random.default_rng((seed, number))
            config, asked = random_engine(rng, schedule, depth, prefix_caching).config, random_requests(rng)
            luck = np.random.default_rng((number, seed))
            engine = SmallEngine(config, lambda batch, luck=luck: luck.random() < 0.07)  # type: ignore[misc]
            serve(engine, asked, rng)
            check_outputs(engine, asked)
            check_telemetry(engine)
            alone = [batch.n_decodes == len(batch.requests) for batch in engine.device.failed]
            decodes_failed += sum(alone)
            chunks_failed += len(alone) - sum(alone)
            preemptions += engine.scheduler.preemptions
            cached += sum(token.cached_tokens for token in engine.delivered)
            completed += len(asked) - len(engine.ended)
    assert min(decodes_failed, chunks_failed, preemptions) > 10
    assert completed > 100
    assert (cached > 0) == prefix_caching


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_prompt_too_long_for_the_device_ends_and_the_decodes_beside_it_go_on(depth: str) -> None:
    engine = SmallEngine(replace(SMALL, **DEPTHS[depth]), lambda batch: bool(batch.n_tokens.max() > 40))
    for name in "12":
        engine.submit(name, [int(name)] * 10, 20)
    for _ in range(6):
        engine.step()
    engine.submit("3", [3] * 50, 20)
    before = len(engine.link.published)
    while not engine.device.failed:
        engine.step()
    assert engine.ended == ["3"], "told at once"
    assert len(engine.link.published) - before == len(engine.device.batches) - before, "no word of it"
    assert [request.id for request in engine.scheduler.running] == ["1", "2"]
    engine.submit("4", [4] * 30, 20)  # takes its slot and its blocks
    engine.finish()
    for name, n_prompt in (("1", 10), ("2", 10), ("4", 30)):
        assert engine.tokens(name) == continuation([int(name)] * n_prompt, 20)
    check_telemetry(engine)


@pytest.mark.parametrize("depth", ["one", "look-ahead"])
def test_of_decodes_alone_the_youngest_ends_until_the_rest_fits(depth: str) -> None:
    engine = SmallEngine(replace(SMALL, **DEPTHS[depth]), lambda batch: batch.n_decodes > 2)
    for name in "12345":
        engine.submit(name, [int(name)] * 12, 30)
    engine.finish()
    assert engine.ended == ["5", "4", "3"]
    for name in "12":
        assert engine.tokens(name) == continuation([int(name)] * 12, 30)
    check_telemetry(engine)


def test_what_is_in_flight_of_the_ended_is_computed_for_nothing_and_of_the_others_is_kept() -> None:
    """The second chunk of a prompt fails while the first is in flight, beside a decode whose token is."""
    engine = SmallEngine(
        replace(SMALL, look_ahead=True), lambda batch: len(batch.requests) == 2 and batch.context[1] > 0
    )
    engine.submit("1", [1] * 10, 20)
    for _ in range(4):
        engine.step()
    engine.submit("2", [2] * 60, 20)
    engine.step(33, 32)
    launched = len(engine.device.batches)
    assert engine.device.batches[-1].requests[1].id == "2"
    assert engine.device.ran == launched - 1
    booked = engine.scheduler.running[0].n_output
    engine.step(33, 32)
    (failed,) = engine.device.failed
    assert failed.context[0] == failed.requests[0].n_prompt + booked, "its token was on the device alone"
    assert (len(engine.device.batches), engine.device.ran) == (launched, launched)
    assert engine.scheduler.running[0].n_output == booked + 1
    assert engine.ended == ["2"]
    assert engine.scheduler.blocks.free_blocks == SMALL.kv_blocks - engine.scheduler.blocks.held.max()
    engine.step()
    again = engine.device.batches[-1]
    assert (again.requests, again.context.tolist()) == (failed.requests[:1], failed.context[:1].tolist())
    engine.finish()
    assert engine.tokens("1") == continuation([1] * 10, 20)


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_engine_without_any_memory_ends_all_and_serves_again_when_there_is_some(depth: str) -> None:
    full = True
    engine = SmallEngine(replace(SMALL, prefix_caching=True, **DEPTHS[depth]), lambda batch: full)
    for name in "1234":
        engine.submit(name, [int(name)] * 40, 5)
    engine.finish()
    assert sorted(engine.ended) == list("1234")
    assert engine.device.batches == []
    full = False
    engine.submit("1", [1] * 40, 5)
    engine.finish()
    assert engine.tokens("1")[1:] == continuation([1] * 40, 5), "no false prefix was left"
    check_telemetry(engine)


def test_an_engine_that_cannot_serve_its_own_request_does_not_start() -> None:
    device = SmallDevice(SMALL.kv_blocks, SMALL.block_tokens, lambda batch: batch.n_decodes > 0)
    with pytest.raises(RuntimeError, match="ran out of memory"):
        _warm_up(SMALL, device, iter(range(1000)).__next__)


@pytest.mark.gpu
def test_a_full_gpu_ends_the_long_prompt_and_keeps_the_decodes() -> None:
    mib = 2**20
    config = EngineConfig(
        budget_tokens=16384,
        chunk_tokens=16384,
        max_budget_tokens=16384,
        max_model_tokens=16384,
        max_requests=4,
        block_tokens=0,
        kv_blocks=0,
        look_ahead=True,
    )
    source = ModelSource(shape="yi-6b", dtype="bfloat16", device="cuda", memory_utilization=0.5)
    runner, config = load_runner(source, config, count().__next__)

    def serve(long_prompt: bool) -> tuple[list[TokenOutput], list[TokenOutput]]:
        """The outputs of two short prompts, and of one so long that its activations are hundreds of MiB."""
        delivered: list[TokenOutput] = []
        scheduler = Scheduler(config)
        core = EngineCore("e", config, scheduler, runner, MemoryLink(), count().__next__, delivered.extend)
        for name in "12":
            scheduler.submit(Submit(name, [int(name)] * 20, SamplingParams(40)), 0)
        for step in count():
            if step == 10 and long_prompt:
                scheduler.submit(Submit("long", list(range(16000)), SamplingParams(2)), 0)
            if not scheduler.has_work:
                break
            core.step()
            scheduler.check()
        core.idle()
        return [t for t in delivered if t.request_id != "long"], [t for t in delivered if t.request_id == "long"]

    alone, _ = serve(long_prompt=False)
    torch.cuda.empty_cache()
    limit = (torch.cuda.memory_reserved() + 64 * mib) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        beside, long = serve(long_prompt=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [(token.finish_reason, token.error) for token in long] == [(FinishReason.ABORT, NO_MEMORY)]
    assert sorted(beside, key=lambda t: t.request_id) == sorted(alone, key=lambda t: t.request_id)
    _, long = serve(long_prompt=True)
    assert [token.finish_reason for token in long] == [None, FinishReason.LENGTH], "there is memory again"
