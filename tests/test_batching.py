"""Properties of the batching rule and the scheduler, over random requests and random knobs."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching import SCHEDULES
from engine.config import EngineConfig, ScheduleName
from engine.request import Abort, Batch, SamplingParams, StepOutput, Submit
from engine.scheduler import Scheduler

TILE = 8
MAX_BUDGET = 256
KNOB = st.integers(1, MAX_BUDGET)


def make_config(schedule: str = "stall-free", kv_blocks: int = 64, prefix_caching: bool = False) -> EngineConfig:
    return EngineConfig(
        schedule=schedule,  # type: ignore[arg-type]
        budget_tokens=64,
        chunk_tokens=64,
        min_budget_tokens=1,
        max_budget_tokens=MAX_BUDGET,
        tile_tokens=TILE,
        max_requests=12,
        max_model_tokens=160,
        block_tokens=8,
        kv_blocks=kv_blocks,
        prefix_caching=prefix_caching,
    )


def submit(scheduler: Scheduler, name: str, prompt: list[int], max_tokens: int, now_ns: int = 0) -> None:
    scheduler.submit(Submit(name, prompt, SamplingParams(max_tokens=max_tokens)), now_ns)


def token_of(batch: Batch, row: int) -> int:
    """A next token that depends on all tokens so far, as a model's would."""
    return (sum(batch.requests[row].token_ids) * 31 + 7) % 97


@dataclass
class Drive:
    """Runs a scheduler iteration by iteration, and checks what must hold in each."""

    scheduler: Scheduler
    outputs: dict[str, list[int]] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    tokens_by_slot: dict[int, int] = field(default_factory=dict)
    time_ns: int = 0

    def step(self, budget: int, chunk: int) -> Batch:
        scheduler = self.scheduler
        arrays = scheduler._arrays
        decoding = {r.id for r in scheduler.running if arrays.context[r.slot] >= arrays.prefill_end[r.slot]}
        preempted_before = scheduler.preemptions
        batch = scheduler.schedule(budget, chunk, self.time_ns)
        scheduler.check()
        served = {r.id for r in batch.requests[: batch.n_decodes]}
        lost = decoding - served
        if scheduler.config.schedule in ("stall-free", "orca"):
            assert len(lost) <= scheduler.preemptions - preempted_before, "a decode was not served"
        self.check_shape(batch, budget, chunk)
        self.time_ns += 1_000_000
        tokens = [token_of(batch, row) for row in np.flatnonzero(batch.samples)]
        output = scheduler.update(batch, tokens, self.time_ns)
        for token in output.tokens:
            self.outputs.setdefault(token.request_id, []).append(token.token_id)
        self.check_slots(batch, output)
        scheduler.check()
        self.batches.append(batch)
        return batch

    def check_slots(self, batch: Batch, output: StepOutput) -> None:
        """Slots alone tell the tokens apart: who got its first, who its next, and who had how many at its end."""
        assert len(output.ttft_s) == len(output.ttft_slots)
        assert len(output.tbt_s) == len(output.tbt_slots)
        assert sorted(output.ttft_slots + output.tbt_slots) == sorted(batch.slots[batch.samples].tolist())
        for slot in output.ttft_slots:
            self.tokens_by_slot[slot] = 1
        for slot in output.tbt_slots:
            self.tokens_by_slot[slot] += 1
        ended = [token.request_id for token in output.tokens if token.finish_reason is not None]
        assert [self.tokens_by_slot.pop(f.slot) for f in output.finished] == [len(self.outputs[name]) for name in ended]
        by_name = {request.id: request for request in batch.requests}
        assert [(f.slot, f.arrival_ns, f.prompt_tokens, f.output_tokens) for f in output.finished] == [
            (r.slot, r.arrival_ns, r.n_prompt, r.n_output) for r in map(by_name.__getitem__, ended)
        ]

    def check_shape(self, batch: Batch, budget: int, chunk: int) -> None:
        assert len(batch.requests) > 0, "there is work but the batch is empty"
        assert len({r.id for r in batch.requests}) == len(batch.requests), "a request has two rows"
        assert np.all(batch.n_tokens > 0)
        assert np.all(batch.n_tokens[: batch.n_decodes] == 1)
        assert len(self.scheduler.running) <= self.scheduler.config.max_requests
        total, chunks = int(batch.n_tokens.sum()), batch.n_tokens[batch.n_decodes :]
        assert total <= MAX_BUDGET
        if self.scheduler.config.schedule in ("stall-free", "chunks-only"):
            assert total <= max(budget, batch.n_decodes)
            assert np.all(chunks <= chunk)
        for row, request in enumerate(batch.requests):
            held = self.scheduler.blocks.held[request.slot]
            assert held * 8 >= batch.context[row] + batch.n_tokens[row], "tokens without a block to put them in"


@st.composite
def request_mixes(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    prompts = st.lists(st.integers(0, 3), min_size=1, max_size=100)
    return draw(st.lists(st.tuples(prompts, st.integers(1, 40)), min_size=1, max_size=20))


def expected_tokens(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append((sum(tokens) * 31 + 7) % 97)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prefix_caching", [False, True])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_request_ends_with_its_own_tokens_whatever_the_knobs(
    schedule: ScheduleName, prefix_caching: bool, data: st.DataObject
) -> None:
    mix = data.draw(request_mixes())
    kv_blocks = data.draw(st.integers(20, 80))
    drive = Drive(Scheduler(make_config(schedule, kv_blocks, prefix_caching)))
    arrivals = sorted(data.draw(st.lists(st.integers(0, 30), min_size=len(mix), max_size=len(mix))))
    iteration = 0
    while arrivals or drive.scheduler.has_work:
        while arrivals and (arrivals[0] <= iteration or not drive.scheduler.has_work):
            arrivals.pop(0)
            index = len(mix) - len(arrivals) - 1
            submit(drive.scheduler, str(index), *mix[index])
        drive.step(data.draw(KNOB), data.draw(KNOB))
        iteration += 1
        assert iteration < 20_000, "a request starves"
    for index, (prompt, max_tokens) in enumerate(mix):
        assert drive.outputs[str(index)] == expected_tokens(prompt, max_tokens)
    assert not drive.tokens_by_slot, "a request ended without being reported"
    assert drive.scheduler.blocks.free_blocks == kv_blocks, "blocks leaked"


@settings(max_examples=60, deadline=None)
@given(mix=request_mixes(), victims=st.lists(st.integers(0, 19), max_size=10), prefix_caching=st.booleans())
def test_an_abort_frees_the_blocks_at_once(
    mix: list[tuple[list[int], int]], victims: list[int], prefix_caching: bool
) -> None:
    drive = Drive(Scheduler(make_config(kv_blocks=30, prefix_caching=prefix_caching)))
    for index, (prompt, max_tokens) in enumerate(mix):
        submit(drive.scheduler, str(index), prompt, max_tokens)
    for victim in victims:
        if not drive.scheduler.has_work:
            break
        drive.step(48, 16)
        drive.scheduler.abort(Abort(str(victim)))
        drive.scheduler.check()
        assert all(r.id != str(victim) for r in drive.scheduler.running)
    while drive.scheduler.has_work:
        drive.step(48, 16)
    assert drive.scheduler.blocks.free_blocks == 30


def test_a_budget_below_the_number_of_decodes_still_serves_every_decode() -> None:
    drive = Drive(Scheduler(make_config()))
    for i in range(10):
        submit(drive.scheduler, str(i), [1, 2], 20)
    drive.step(64, 64)
    batch = drive.step(3, 3)
    assert batch.n_decodes == 10
    assert len(batch.requests) == 10


def test_the_total_lands_on_a_whole_tile_when_prompts_spend_the_budget() -> None:
    drive = Drive(Scheduler(make_config()))
    for i in range(3):
        submit(drive.scheduler, str(i), [1] * 3, 30)
    drive.step(64, 64)
    submit(drive.scheduler, "long", [1] * 100, 5)
    batch = drive.step(45, 45)
    assert batch.n_decodes == 3
    assert int(batch.n_tokens.sum()) == 40


def test_a_chunk_below_the_budget_lets_a_short_prompt_past_a_long_one() -> None:
    drive = Drive(Scheduler(make_config()))
    submit(drive.scheduler, "long", [1] * 120, 5)
    submit(drive.scheduler, "short", [1] * 10, 5)
    whole = drive.step(32, 32)
    assert [r.id for r in whole.requests] == ["long"]
    shared = drive.step(32, 16)
    assert [(r.id, n) for r, n in zip(shared.requests, shared.n_tokens, strict=True)] == [("long", 16), ("short", 10)]


def test_of_the_prompts_under_way_the_least_remaining_is_served_first_and_of_equals_the_oldest() -> None:
    drive = Drive(Scheduler(make_config()))
    for name, length in (("long", 90), ("equal", 30), ("short", 20), ("same", 30)):
        submit(drive.scheduler, name, [1] * length, 5)
    drive.step(64, 8)
    submit(drive.scheduler, "new", [1] * 2, 5)
    second = drive.step(64, 8)
    assert [r.id for r in second.requests] == ["short", "equal", "same", "long", "new"]
    third = drive.step(24, 16)
    rows = [(r.id, n) for r, n in zip(third.requests, third.n_tokens.tolist(), strict=True)]
    assert third.n_decodes == 1
    assert rows == [("new", 1), ("short", 4), ("equal", 14), ("same", 5)], "decodes before them all; none for the long"


@settings(max_examples=60, deadline=None)
@given(mix=request_mixes(), data=st.data())
def test_prompts_under_way_are_served_in_order_before_anyone_is_admitted(
    mix: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    scheduler = Scheduler(make_config(kv_blocks=240))
    drive = Drive(scheduler)
    for index, (prompt, max_tokens) in enumerate(mix):
        submit(scheduler, str(index), prompt, max_tokens)
    while scheduler.has_work:
        budget, chunk = (
            data.draw(st.integers(8, MAX_BUDGET)) // TILE * TILE,
            data.draw(st.sampled_from([1, 5, 8, 16, 32])),
        )
        arrays, running = scheduler._arrays, list(scheduler.running)
        left = [(int(arrays.prefill_end[r.slot] - arrays.context[r.slot]), r.id) for r in running]
        under_way = sorted((pair for pair in left if pair[0] > 0), key=lambda pair: pair[0])
        tokens = budget - sum(n <= 0 for n, _ in left)
        expected = []
        for remaining, name in under_way:
            n = min(remaining, chunk, tokens)
            expected += [(name, n)] * (n > 0)
            tokens -= max(n, 0)
        batch = drive.step(budget, chunk)
        rows = [(r.id, n) for r, n in zip(batch.requests, batch.n_tokens.tolist(), strict=True)]
        served = rows[batch.n_decodes :][: len(expected)]
        assert served == expected
        assert {name for name, _ in rows[batch.n_decodes + len(expected) :]}.isdisjoint(r.id for r in running)


@settings(max_examples=60, deadline=None)
@given(mix=request_mixes(), data=st.data())
def test_while_the_chunk_is_the_budget_no_two_prompts_are_under_way_so_that_their_order_means_nothing(
    mix: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    drive = Drive(Scheduler(make_config(kv_blocks=data.draw(st.integers(20, 80)))))
    for index, (prompt, max_tokens) in enumerate(mix):
        submit(drive.scheduler, str(index), prompt, max_tokens)
    while drive.scheduler.has_work:
        budget = data.draw(KNOB)
        drive.step(budget, budget)
        arrays = drive.scheduler._arrays
        assert sum(arrays.context[r.slot] < arrays.prefill_end[r.slot] for r in drive.scheduler.running) <= 1


def test_preemption_takes_the_youngest_and_nothing_is_admitted_with_it() -> None:
    drive = Drive(Scheduler(make_config(kv_blocks=20)))
    for i in range(4):
        submit(drive.scheduler, str(i), [1] * 20, 60)
    while drive.scheduler.preemptions == 0:
        drive.step(256, 256)
    assert drive.scheduler.waiting[0].id == "3" or drive.scheduler.waiting[0].id == "2"
    assert drive.scheduler.running[0].id == "0"
    while drive.scheduler.has_work:
        drive.step(256, 256)
    assert {len(tokens) for tokens in drive.outputs.values()} == {60}


def order_of_work(schedule: ScheduleName) -> list[tuple[int, int]]:
    """(decodes, prefill tokens) of the iterations that serve two prompts, the second arriving after the first."""
    drive = Drive(Scheduler(make_config(schedule)))
    submit(drive.scheduler, "first", [1] * 40, 4)
    shapes = []
    while drive.scheduler.has_work:
        batch = drive.step(32, 32)
        shapes.append((batch.n_decodes, int(batch.n_tokens[batch.n_decodes :].sum())))
        if len(shapes) == 2:
            submit(drive.scheduler, "second", [2] * 40, 2)
    return shapes


@pytest.mark.parametrize(
    ("schedule", "shapes"),
    [
        ("stall-free", [(0, 32), (0, 8), (1, 31), (1, 9), (2, 0)]),
        ("prefill-first", [(0, 40), (1, 0), (0, 40), (2, 0), (1, 0)]),
        ("orca", [(0, 40), (1, 0), (1, 40), (2, 0)]),
        ("request-level", [(0, 40), (1, 0), (1, 0), (1, 0), (0, 40), (1, 0)]),
        ("chunks-only", [(0, 32), (0, 8), (1, 0), (0, 32), (1, 0), (0, 8), (2, 0)]),
    ],
)
def test_each_schedule_orders_the_work_in_its_own_way(schedule: ScheduleName, shapes: list[tuple[int, int]]) -> None:
    assert order_of_work(schedule) == shapes


def test_a_shared_prefix_is_computed_once() -> None:
    drive = Drive(Scheduler(make_config(prefix_caching=True)))
    prefix = list(range(64))
    submit(drive.scheduler, "a", [*prefix, 5], 30)
    drive.step(256, 256)
    drive.step(256, 256)
    submit(drive.scheduler, "b", [*prefix, 6], 3)
    batch = drive.step(256, 256)
    assert int(batch.context[1]) == 64
    assert int(batch.n_tokens[1]) == 1
    tables = drive.scheduler.blocks.tables
    a, b = (next(r for r in drive.scheduler.running if r.id == name).slot for name in "ab")
    assert tables[a, :8].tolist() == tables[b, :8].tolist()
    assert tables[a, 8] != tables[b, 8]


def test_a_prefix_in_use_by_another_costs_no_free_block() -> None:
    drive = Drive(Scheduler(make_config(kv_blocks=20, prefix_caching=True)))
    prefix = list(range(96))
    submit(drive.scheduler, "a", [*prefix, 5], 30)
    drive.step(256, 256)
    assert drive.scheduler.blocks.free_blocks == 7, "too few for another whole prompt of 13 blocks"
    submit(drive.scheduler, "b", [*prefix, 6], 3)
    assert [r.id for r in drive.step(256, 256).requests] == ["a", "b"]
    assert drive.scheduler.blocks.free_blocks == 6


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [([], 5, "has no prompt"), ([1], 0, "max_tokens is 0"), ([1] * 150, 11, "model length is 160")],
)
def test_a_request_that_cannot_run_is_refused_with_the_reason(prompt: list[int], max_tokens: int, message: str) -> None:
    scheduler = Scheduler(make_config())
    with pytest.raises(ValueError, match=message):
        submit(scheduler, "x", prompt, max_tokens)
    assert not scheduler.has_work
