"""Iterations in flight, at every depth: each request gets its own tokens once, and the books are always right."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from block_device import VOCABULARY, BlockDevice, continuation

from engine.batching import SCHEDULES
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.link import MemoryLink
from engine.protocol import VERSION, Completion, Knobs
from engine.request import Abort, FinishReason, SamplingParams, Submit, TokenOutput
from engine.scheduler import Scheduler

DEPTHS: dict[str, dict[str, Any]] = {
    "one": {},
    "look-ahead": {"look_ahead": True},
    "two stages": {"pipeline_parallel": 2},
    "three stages": {"pipeline_parallel": 3},
    "two stages and look-ahead": {"pipeline_parallel": 2, "look_ahead": True},
    "three stages and look-ahead": {"pipeline_parallel": 3, "look_ahead": True},
}
CASES = 8
SMALL = EngineConfig(max_budget_tokens=256, max_requests=8, max_model_tokens=128, block_tokens=4, kv_blocks=64)


class Engine:
    """The core on a `BlockDevice`; its clock ticks once each time that it is read."""

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.scheduler, self.link = config, Scheduler(config), MemoryLink()
        self.device = BlockDevice(config.kv_blocks, config.block_tokens)
        self.delivered: list[TokenOutput] = []
        self.now_ns = 0
        self.core = EngineCore(
            *("e", config, self.scheduler, self.device, self.link, self.clock, self.delivered.extend)
        )

    def clock(self) -> int:
        self.now_ns += 1
        return self.now_ns

    def submit(self, name: str, prompt: list[int], max_tokens: int, stops: tuple[int, ...] = ()) -> None:
        self.scheduler.submit(Submit(name, prompt, SamplingParams(max_tokens, stop_token_ids=stops)), self.clock())

    def step(self, budget: int = 64, chunk: int = 64) -> None:
        self.link.inbox = Knobs(VERSION, "e", 0, 0, budget, chunk)
        self.core.step()
        self.scheduler.check()

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
        self.core.idle()
        self.scheduler.check()
        assert self.scheduler.blocks.free_blocks == self.config.kv_blocks, "blocks leaked"

    def tokens(self, name: str) -> list[int]:
        return [token.token_id for token in self.delivered if token.request_id == name]

    @property
    def completions(self) -> list[Completion]:
        return [completion for telemetry in self.link.published for completion in telemetry.completed]


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    stops: tuple[int, ...]
    aborted: bool = False


def random_engine(rng: np.random.Generator, schedule: str, depth: str, prefix_caching: bool) -> Engine:
    config = EngineConfig(
        schedule=schedule,  # type: ignore[arg-type]
        budget_tokens=64,
        chunk_tokens=64,
        min_budget_tokens=1,
        max_budget_tokens=128,
        tile_tokens=int(rng.choice([1, 16])),
        max_requests=int(rng.integers(2, 16)),
        max_model_tokens=100,
        block_tokens=4,
        kv_blocks=25 + int(rng.integers(0, 20)),
        prefix_caching=prefix_caching,
        **DEPTHS[depth],
    )
    return Engine(config)


def random_requests(rng: np.random.Generator) -> dict[str, Asked]:
    """Prompts of few different tokens and common beginnings; some stop early, some may not."""
    common = rng.integers(0, 3, 60).tolist()
    asked = {}
    for i in range(int(rng.integers(1, 25))):
        shared, own = rng.integers(0, 40), rng.integers(1, 20)
        stops = tuple(rng.integers(0, VOCABULARY, int(rng.choice([0, 4]))).tolist())
        prompt = common[:shared] + rng.integers(0, 3, own).tolist()
        asked[str(i)] = Asked(prompt, int(rng.integers(1, 40)), stops)
    return asked


def serve(engine: Engine, asked: dict[str, Asked], rng: np.random.Generator) -> None:
    """All requests to their ends: they come now and then, and some are given up."""
    names = list(asked)
    while names or engine.scheduler.has_work:
        while names and (rng.random() < 0.5 or not engine.scheduler.has_work):
            name = names.pop(0)
            engine.submit(name, asked[name].prompt, asked[name].max_tokens, asked[name].stops)
        engine.step(*rng.integers(1, 128, 2, endpoint=True).tolist())
        if rng.random() < 0.05:
            victim = str(rng.integers(0, len(asked)))
            asked[victim].aborted |= victim not in names
            engine.scheduler.abort(Abort(victim))
            engine.scheduler.check()
    engine.finish()


def check_tokens(engine: Engine, asked: dict[str, Asked]) -> None:
    ended = Counter(t.request_id for t in engine.delivered if t.finish_reason is not None)
    for name, request in asked.items():
        expected = continuation(request.prompt, request.max_tokens, request.stops)
        tokens = engine.tokens(name)
        if ended[name] or not request.aborted:
            assert tokens == expected
            assert ended[name] == 1
        else:
            assert tokens == expected[: len(tokens)]


def check_telemetry(engine: Engine) -> int:
    """Every iteration is completed once, in order, every token told once. Returns the rows computed for nothing."""
    completions, batches = engine.completions, engine.device.batches
    assert [c.iteration for c in completions] == list(range(1, len(batches) + 1))
    told = [len(c.tbt_s) + len(c.ttft_s) for c in completions]
    assert sum(told) == len(engine.delivered)
    assert sum(len(c.finished) for c in completions) == sum(t.finish_reason is not None for t in engine.delivered)
    return sum(int(batch.samples.sum()) - n for batch, n in zip(batches, told, strict=True))


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_request_gets_its_own_tokens_once(depth: str, prefix_caching: bool) -> None:
    """Whatever is preempted, given up or stops while it is in flight, under all schedules."""
    preemptions = rows_wasted = ended = cached = 0
    for seed in range(CASES):
        for number, schedule in enumerate(SCHEDULES):
            rng = np.random.default_rng((seed, number))
            engine, asked = random_engine(rng, schedule, depth, prefix_caching), random_requests(rng)
            serve(engine, asked, rng)
            check_tokens(engine, asked)
            rows_wasted += check_telemetry(engine)
            preemptions += engine.scheduler.preemptions
            ended += sum(t.finish_reason is FinishReason.STOP for t in engine.delivered)
            cached += sum(t.cached_tokens for t in engine.delivered)
    assert preemptions > 20 < ended
    assert (cached > 0) == prefix_caching
    assert (rows_wasted > 0) == (depth != "one")


def test_the_next_iteration_is_launched_before_the_result_of_the_one_before() -> None:
    engine = Engine(replace(SMALL, look_ahead=True))
    engine.submit("a", [1] * 10, 5)
    engine.step()
    assert (len(engine.device.batches), engine.device.ran) == (1, 0)
    for launched in range(2, 6):
        engine.step()
        assert (len(engine.device.batches), engine.device.ran) == (launched, launched - 1)
        assert [c.iteration for c in engine.link.published[-1].completed] == ([launched - 2] if launched > 2 else [])
    assert engine.link.published[-1].queue.running_requests == 1
    engine.step()
    assert (len(engine.device.batches), engine.device.ran) == (5, 5), "its last token was in flight: no sixth batch"
    assert not engine.scheduler.has_work
    engine.finish()
    assert engine.tokens("a") == continuation([1] * 10, 5)


def test_in_a_pipeline_that_looks_ahead_a_decode_is_launched_before_the_token_that_it_computes() -> None:
    engine = Engine(replace(SMALL, pipeline_parallel=2, look_ahead=True))
    engine.submit("a", [1] * 10, 5)
    engine.step()
    for launched in range(2, 6):
        engine.step()
        assert (len(engine.device.batches), engine.device.ran) == (launched, launched - 2)
        engine.step()
        assert (len(engine.device.batches), engine.device.ran) == (launched, launched - 1), "it has two on their way"
    engine.finish()
    assert engine.tokens("a") == continuation([1] * 10, 5)
    assert len(engine.device.batches) == 5


@pytest.mark.parametrize(
    ("depth", "wasted"), [("one", 0), ("look-ahead", 1), ("two stages", 0), ("two stages and look-ahead", 1)]
)
def test_a_token_that_stops_a_request_wastes_the_row_in_flight(depth: str, wasted: int) -> None:
    prompt = [3, 1, 4]
    third = continuation(prompt, 3)[2]
    assert third not in continuation(prompt, 2)
    engine = Engine(replace(SMALL, **DEPTHS[depth]))
    engine.submit("a", prompt, 20, (third,))
    engine.finish()
    assert engine.tokens("a") == continuation(prompt, 3)
    assert engine.delivered[-1].finish_reason == FinishReason.STOP
    assert len(engine.device.batches) == 3 + wasted
    assert [len(c.finished) for c in engine.completions] == [0, 0, 1] + [0] * wasted
    assert engine.completions[-1].tbt_s == () or wasted == 0


@pytest.mark.parametrize("depth", ["look-ahead", "two stages"])
def test_what_an_aborted_request_has_in_flight_is_waited_for_before_the_engine_is_idle(depth: str) -> None:
    engine = Engine(replace(SMALL, **DEPTHS[depth]))
    engine.submit("a", [1] * 10, 20)
    engine.step()
    engine.scheduler.abort(Abort("a"))
    engine.scheduler.check()
    assert engine.scheduler.blocks.free_blocks == SMALL.kv_blocks, "free at once"
    assert engine.scheduler.has_work
    engine.submit("b", [2] * 10, 1)  # takes its slot and its blocks
    engine.finish()
    assert engine.tokens("a") == []
    assert engine.tokens("b") == continuation([2] * 10, 1)
    assert [len(c.ttft_s) for c in engine.completions] == [0, 1]


def test_a_prompt_that_was_aborted_in_flight_leaves_no_false_prefix() -> None:
    engine = Engine(replace(SMALL, look_ahead=True, prefix_caching=True))
    engine.submit("a", [1] * 40, 5)
    engine.step()
    engine.scheduler.abort(Abort("a"))
    engine.submit("b", [2] * 40, 5)  # takes its slot before its batch is booked
    engine.finish()
    engine.submit("c", [1] * 40, 5)
    engine.finish()
    assert engine.tokens("b") == continuation([2] * 40, 5)
    assert engine.tokens("c") == continuation([1] * 40, 5)


def test_a_token_in_flight_when_its_request_is_preempted_is_drawn_again() -> None:
    engine = Engine(replace(SMALL, look_ahead=True, kv_blocks=32))
    for name, first in (("old", 1), ("young", 2)):
        engine.submit(name, [first] * 50, 40)
    while engine.scheduler.preemptions == 0:
        engine.step(256, 256)
    victim = engine.scheduler.waiting[0]
    assert victim.id == "young"
    in_flight = engine.device.batches[-2]
    row = in_flight.requests.index(victim)
    assert in_flight.samples[row]
    assert len(victim.token_ids) == in_flight.context[row] + in_flight.n_tokens[row], "its token was booked"
    engine.finish()
    for name, first in (("old", 1), ("young", 2)):
        assert engine.tokens(name) == continuation([first] * 50, 40)


def preempted(engine: Engine) -> list[str]:
    """Serve all; who was preempted."""
    victims = []
    while engine.scheduler.has_work:
        before, waited = engine.scheduler.preemptions, set(engine.scheduler.waiting)
        engine.step(256, 256)
        if engine.scheduler.preemptions > before:
            victims += [request.id for request in engine.scheduler.waiting if request not in waited]
    engine.finish()
    return victims


@pytest.mark.parametrize("stages", [2, 3])
def test_the_oldest_waits_for_the_younger_in_flight_and_is_not_preempted_in_their_stead(stages: int) -> None:
    """The young one is in flight whenever the old one needs a block, and none is free."""
    engine = Engine(replace(SMALL, kv_blocks=34, pipeline_parallel=stages))
    engine.submit("old", [1] * 64, 40)
    engine.submit("young", [2] * 8, 100)
    assert set(preempted(engine)) == {"young"}
    assert engine.tokens("old") == continuation([1] * 64, 40)
    assert engine.tokens("young") == continuation([2] * 8, 100)


def test_under_look_ahead_a_request_waits_for_the_last_token_of_a_younger_one() -> None:
    """Of 32 blocks the old one holds 16 and the young one 16 with its last token in flight: they come free at once."""
    engine = Engine(replace(SMALL, kv_blocks=32, look_ahead=True))
    engine.submit("old", [1] * 61, 40)
    engine.submit("young", [2] * 60, 4)
    assert preempted(engine) == []
    assert engine.tokens("old") == continuation([1] * 61, 40)


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    engine = Engine(replace(SMALL, pipeline_parallel=3))
    engine.submit("a", [1] * 100, 3)
    for _ in range(3):
        engine.step(32, 32)
    assert [batch.n_tokens.tolist() for batch in engine.device.batches] == [[32], [32], [32]]
    assert engine.device.ran == 1
    engine.step(32, 32)
    assert engine.device.batches[-1].n_tokens.tolist() == [4]
    engine.finish()
    assert len(engine.device.batches) == 6, "its decodes wait for their tokens"
    assert engine.tokens("a") == continuation([1] * 100, 3)


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
def test_the_microbatches_of_a_pipeline_share_the_decodes(stages: int, look_ahead: bool) -> None:
    engine = Engine(replace(SMALL, pipeline_parallel=stages, look_ahead=look_ahead))
    for i in range(8):
        engine.submit(str(i), [i] * 10, 30)
    for _ in range(20):
        engine.step(128, 128)
    decodes = [batch.n_decodes for batch in engine.device.batches[-6:]]
    share = -(-8 // stages)
    assert max(decodes) == share
    assert all(sum(decodes[i : i + stages]) == 8 for i in range(6 - stages + 1))
    engine.finish()
