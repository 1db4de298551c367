"""The main loop: what an iteration reports, which knobs it obeys, what happens without any."""

import msgspec
import numpy as np
import pytest
from plant import Loop, VirtualClock

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.protocol import MOST_PROMPTS, VERSION, Finished, Knobs
from engine.request import Batch, SamplingParams, Submit, TokenOutput
from engine.scheduler import Scheduler


def knobs(sequence: int, iteration: int, budget: int, chunk: int) -> Knobs:
    return Knobs(VERSION, "e-1", sequence, iteration, budget, chunk)


def test_an_iteration_reports_its_batch_at_launch_and_the_measurements_of_the_one_before() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=64, chunk_tokens=64), fixed_s=0.01, per_token_s=0.001)
    loop.submit("a", 100, 3)
    messages = [loop.step() for _ in range(5)]
    assert [(t.iteration, t.batch.prefill_tokens, t.batch.decode_tokens) for t in messages] == [
        (1, 64, 0),
        (2, 36, 0),
        (3, 0, 1),
        (4, 0, 1),
        (4, 0, 0),
    ]
    assert messages[1].batch.prefill_chunk_tokens == (36,)
    assert messages[1].batch.prefill_context_tokens == (64,)
    assert messages[1].batch.prefill_attention_tokens2 == 36 * (64 + 18)
    assert messages[2].batch.decode_context_tokens == 100
    measured = [c for t in messages for c in t.completed]
    assert [c.iteration for c in measured] == [1, 2, 3, 4]
    assert measured[1].ttft_s == pytest.approx((0.074 + 0.046,))
    assert measured[2].tbt_s == pytest.approx((0.011,))
    assert measured[2].device_s == pytest.approx(0.011)
    assert measured[2].stages[0].bubble_s == 0.0


def test_slots_tell_from_the_wire_alone_whose_tokens_they_were_and_which_requests_ended() -> None:
    loop = Loop(None, fixed_s=0.01, per_token_s=0.0)
    loop.submit("long", 100, 6)
    loop.step()
    loop.submit("single", 20, 1)
    loop.step()
    loop.submit("takes the slot of single", 30, 2)
    for _ in range(6):
        loop.step()
    told = [(c.iteration, c.ttft_slots, c.tbt_slots, c.finished) for c in loop.completions()]
    long, single = told[0][1][0], told[1][1][0]
    started_ns = 1_000_000_000
    assert told == [
        (1, (long,), (), ()),
        (2, (single,), (long,), (Finished(single, started_ns + 10_000_000, 20, 1),)),
        (3, (single,), (long,), ()),
        (4, (), (long, single), (Finished(single, started_ns + 20_000_000, 30, 2),)),
        (5, (), (long,), ()),
        (6, (), (long,), (Finished(long, started_ns, 100, 6),)),
    ]


def test_padding_is_told_with_the_batch() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=64, chunk_tokens=64), padded_to=16)
    loop.submit("a", 70, 2)
    assert [loop.step().batch.padding_tokens for _ in range(4)] == [0, 10, 15, 0]


class SlowScheduler(Scheduler):
    """Takes 3 ms of the host's time to form a batch."""

    clock: VirtualClock

    def schedule(self, budget_tokens: int, chunk_tokens: int, now_ns: int) -> Batch:
        self.clock.now_ns += 3_000_000
        return super().schedule(budget_tokens, chunk_tokens, now_ns)


@pytest.mark.parametrize(("look_ahead", "then_s"), [(False, 0.003), (True, 0.0)])
def test_a_device_that_waits_for_the_host_has_a_bubble_and_one_without_work_has_none(
    look_ahead: bool, then_s: float
) -> None:
    loop = Loop(None, config=EngineConfig(look_ahead=look_ahead), fixed_s=0.01, per_token_s=0.0)
    scheduler = SlowScheduler(loop.config)
    scheduler.clock = loop.clock
    loop.core = EngineCore(
        *("e-1", loop.config, scheduler, loop.device, loop.link, loop.clock, loop.tokens.extend),
    )
    for name in ("a", "b"):
        loop.submit(name, 10, 4)
        for _ in range(20):
            loop.step()
    assert len(loop.tokens) == 8
    assert [c.stages[0].bubble_s for c in loop.completions()] == pytest.approx([0.003, then_s, then_s, then_s] * 2)


def test_tokens_are_handed_over_while_the_next_iteration_runs_and_the_last_at_once_when_idle() -> None:
    loop = Loop(None)
    loop.submit("a", 10, 3)
    counts = []
    for _ in range(4):
        loop.step()
        counts.append(len(loop.tokens))
    assert counts == [0, 1, 2, 3]
    assert [t.finish_reason for t in loop.tokens] == [None, None, "length"]


def test_with_another_iteration_on_the_device_tokens_do_not_wait_for_the_host_to_form_a_batch() -> None:
    loop = Loop(None, config=EngineConfig(look_ahead=True), fixed_s=0.01, per_token_s=0.0)
    scheduler = SlowScheduler(loop.config)
    scheduler.clock, started_ns = loop.clock, loop.clock.now_ns
    handed_over_s: list[float] = []

    def deliver(tokens: list[TokenOutput]) -> None:
        handed_over_s.extend([(loop.clock.now_ns - started_ns) * 1e-9] * len(tokens))

    loop.core = EngineCore("e-1", loop.config, scheduler, loop.device, loop.link, loop.clock, deliver)
    loop.submit("a", 10, 4)
    for _ in range(10):
        loop.step()
    # The first batch is formed in 3 ms; the device computes from then on, 10 ms each.
    assert handed_over_s == pytest.approx([0.013, 0.023, 0.033, 0.043])


def test_the_queue_is_reported() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=64, chunk_tokens=64, max_requests=1))
    loop.submit("a", 100, 3)
    loop.submit("b", 70, 3)
    telemetry = loop.step()
    assert telemetry.queue.running_requests == 1
    assert telemetry.queue.waiting_requests == 1
    assert telemetry.queue.waiting_prompt_tokens == 70
    assert telemetry.queue.prompt_remaining_tokens == (100, 70)
    assert telemetry.queue.prompt_context_tokens == (0, 0)
    assert telemetry.kv_usage == pytest.approx(7 / 4096)
    queue = loop.step().queue
    assert (queue.prompt_remaining_tokens, queue.prompt_context_tokens) == ((36, 70), (64, 0))


def test_the_first_prompts_are_told_as_they_stood_before_each_batch_in_the_order_in_which_it_serves_them() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=160, chunk_tokens=48, max_requests=12))
    scheduler, random = loop.core.scheduler, np.random.default_rng(0)
    most_told = most_served = 0
    for i in range(400):
        for _ in range(random.poisson(1.0)):
            loop.submit(f"{i} {len(scheduler._by_id)}", int(random.integers(1, 400)), int(random.integers(1, 9)))
        arrays = scheduler._arrays
        left = [(int(arrays.prefill_end[r.slot] - arrays.context[r.slot]), r) for r in scheduler.running]
        begun = [(tokens, int(arrays.context[r.slot])) for tokens, r in left if tokens > 0]
        due = [*sorted(begun, key=lambda prompt: prompt[0]), *((r.n_prompt, 0) for r in scheduler.waiting)]
        told = loop.step()
        queue, chunks = told.queue, told.batch.prefill_chunk_tokens
        pairs = list(zip(queue.prompt_remaining_tokens, queue.prompt_context_tokens, strict=True))
        assert pairs == due[:MOST_PROMPTS]
        assert told.batch.prefill_context_tokens == queue.prompt_context_tokens[: len(chunks)]
        assert all(chunk <= tokens for chunk, tokens in zip(chunks, queue.prompt_remaining_tokens, strict=False))
        most_told, most_served = max(most_told, len(due)), max(most_served, len(chunks))
    assert most_told > MOST_PROMPTS
    assert most_served > 2


def test_a_batch_of_more_prompts_than_are_told_of_tells_the_first() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=512, chunk_tokens=512))
    for i in range(MOST_PROMPTS + 9):
        loop.submit(str(i), 10 + i, 2)
    told = loop.step()
    assert told.batch.prefill_requests == 24  # the first 23 are 483 tokens together
    assert told.queue.prompt_remaining_tokens == tuple(range(10, 10 + MOST_PROMPTS))


def test_of_a_waiting_prompt_its_share_in_the_prefix_cache_is_told() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=256, chunk_tokens=256, max_requests=1, prefix_caching=True))
    loop.submit("a", 100, 5)  # the same token all over: "b" shares its first six blocks of 16
    loop.step()
    loop.submit("b", 110, 3)
    queue = loop.step().queue
    assert queue.waiting_requests == 1
    assert (queue.prompt_remaining_tokens, queue.prompt_context_tokens) == ((14,), (96,))


def test_knobs_are_in_force_in_the_next_iteration_and_echoed() -> None:
    loop = Loop(None)
    loop.submit("a", 2000, 3)
    assert loop.step().knobs.source == "fallback"
    loop.link.inbox = knobs(9, 1, 48, 32)
    telemetry = loop.step()
    assert telemetry.knobs == msgspec.structs.replace(
        telemetry.knobs, budget_tokens=48, chunk_tokens=32, sequence=9, iteration=1, source="controller"
    )
    assert telemetry.batch.prefill_chunk_tokens == (32,)


def test_without_knobs_for_the_time_to_live_the_engine_is_on_its_fallback() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=128, chunk_tokens=128, knobs_ttl_s=0.5), fixed_s=0.1)
    loop.submit("a", 2000, 48)
    loop.link.inbox = knobs(1, 0, 512, 512)
    sources = [loop.step().knobs for _ in range(8)]
    under = [k for k in sources if k.source == "controller"]
    assert 3 <= len(under) <= 5, "the last decision holds for the time to live"
    assert sources[-1].source == "fallback"
    assert sources[-1].budget_tokens == 128
    assert sources[-1].sequence == 1, "a new controller must know where to go on"


def test_time_to_first_token_counts_from_the_servers_arrival() -> None:
    loop = Loop(None, fixed_s=0.01, per_token_s=0.0)
    arrival_ns = loop.clock() - 300_000_000
    loop.core.scheduler.submit(Submit("a", [0] * 5, SamplingParams(2), arrival_ns), loop.clock())
    for _ in range(3):
        loop.step()
    assert loop.completions()[0].ttft_s == pytest.approx((0.31,))


def test_after_its_fallback_an_engine_takes_any_sequence_again() -> None:
    loop = Loop(None, config=EngineConfig(knobs_ttl_s=0.05))
    forgotten = []
    loop.link.forget = lambda: forgotten.append(loop.clock())  # type: ignore[method-assign]
    loop.link.inbox = knobs(2**53 - 1, 0, 512, 512)
    for _ in range(20):
        loop.step()
    assert len(forgotten) == 1


def test_a_request_that_ends_leaves_nothing_behind() -> None:
    loop = Loop(None)
    for i in range(5):
        loop.submit(str(i), 30, 4)
    while loop.core.scheduler.has_work:
        loop.step()
    loop.core.scheduler.check()
    assert loop.step().kv_usage == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_tokens": 4096}, "budget_tokens 4096"),
        ({"kv_blocks": 10}, "raise kv_blocks"),
        ({"schedule": "orca", "max_budget_tokens": 512}, "whole prompts"),
        ({"max_requests": 5000}, "5000 decodes"),
        ({"knobs_ttl_s": 0.0}, "knobs_ttl_s"),
        ({"knobs_ttl_s": float("inf")}, "knobs_ttl_s"),
        ({"schedule": "bogus"}, "not one of stall-free"),
        ({"max_model_tokens": 1}, "room for a prompt"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_remedy(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)  # type: ignore[arg-type]
