"""A step packed into one buffer: what views into a copy of it show, exact and padded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.packed_inputs import InputLayout
from engine.step_input import DrawnRows, StepInput
from engine.step_shapes import StepShape

BLOCK_TOKENS = 4
MAX_TOKENS, MAX_ROWS, MAX_BLOCKS = 50, 9, 7
LAYOUT = InputLayout(MAX_TOKENS, MAX_ROWS, MAX_BLOCKS, BLOCK_TOKENS)


def random_step(rng: np.random.Generator, n_decodes: int, n_chunks: int) -> StepInput:
    """Decodes and chunks at random contexts, some of the chunks unfinished."""
    n_rows = n_decodes + n_chunks
    n_tokens = np.concatenate((np.ones(n_decodes), rng.integers(1, 9, n_chunks))).astype(np.int32)
    context = rng.integers(0, MAX_BLOCKS * BLOCK_TOKENS - 8, n_rows).astype(np.int32)
    width = int(-(-(context + n_tokens).max() // BLOCK_TOKENS))
    sampled = np.flatnonzero(rng.random(n_rows) < 0.8).astype(np.int32)
    drawn = np.flatnonzero(rng.random(len(sampled)) < 0.5).astype(np.int32)
    return StepInput(
        n_decodes=n_decodes,
        n_tokens=n_tokens,
        context=context,
        token_ids=rng.integers(-9, 1000, n_tokens.sum()).astype(np.int32),
        block_tables=rng.integers(0, 500, (n_rows, width)).astype(np.int32),
        sampled_rows=sampled,
        drawn=DrawnRows(
            rows=rng.permutation(drawn),
            uniform=rng.random(len(drawn)),
            temperature=rng.random(len(drawn)),
            top_k=rng.integers(0, 99, len(drawn)).astype(np.int32),
            top_p=rng.random(len(drawn)),
            n_unfiltered=len(drawn) // 2,
        )
        if len(drawn)
        else None,
    )


def slots_of(step: StepInput) -> list[int]:
    slots = []
    for row, (context, n) in enumerate(zip(step.context.tolist(), step.n_tokens.tolist(), strict=True)):
        for position in range(context, context + n):
            block = int(step.block_tables[row, position // BLOCK_TOKENS])
            slots.append(block * BLOCK_TOKENS + position % BLOCK_TOKENS)
    return slots


class Device:
    """A buffer with what the step before left in it, and one of host memory in the same state."""

    def __init__(self, rng: np.random.Generator) -> None:
        old = torch.from_numpy(rng.integers(-(2**31), 2**31, LAYOUT.words).astype(np.int32))
        self.words, self.host = old.clone(), old.clone()
        self.arrays, self.host_arrays = LAYOUT.views(self.words), LAYOUT.host_arrays(self.host)

    def send(self, step: StepInput, shape: StepShape) -> None:
        LAYOUT.pack(step, shape, self.host_arrays)
        used = LAYOUT.used_words(shape.n_rows)
        self.words[:used] = self.host[:used]


@pytest.mark.parametrize(("n_decodes", "n_chunks"), [(1, 0), (9, 0), (0, 1), (4, 5), (0, 6), (8, 1)])
def test_what_is_packed_is_what_the_views_show(n_decodes: int, n_chunks: int) -> None:
    rng = np.random.default_rng(n_decodes + 10 * n_chunks)
    device = Device(rng)
    for _ in range(20):
        step = random_step(rng, n_decodes, n_chunks)
        device.send(step, StepShape.of(step))
        inputs = LAYOUT.inputs(device.arrays, StepShape.of(step))
        assert inputs.token_ids.tolist() == step.token_ids.tolist()
        assert inputs.positions.tolist() == step.positions.tolist()
        assert inputs.kv_slots.tolist() == slots_of(step)
        starts = [0, *np.cumsum(step.n_tokens).tolist()]
        assert inputs.query_starts.tolist() == starts
        assert inputs.context_ends.tolist() == (step.context + step.n_tokens).tolist()
        assert inputs.sampled.tolist() == [starts[row + 1] - 1 for row in step.sampled_rows.tolist()]
        width = step.block_tables.shape[1]
        assert inputs.block_tables[:, :width].tolist() == step.block_tables.tolist()
        assert (inputs.n_decodes, inputs.max_query_tokens) == (n_decodes, step.n_tokens.max())
        assert inputs.max_context_tokens == max(inputs.context_ends.tolist())
        assert {inputs.kv_slots.dtype, inputs.sampled.dtype} == {torch.int64}
        others = (inputs.token_ids, inputs.positions, inputs.query_starts, inputs.context_ends, inputs.block_tables)
        assert {tensor.dtype for tensor in others} == {torch.int32}


def test_draws_come_through_exactly() -> None:
    rng = np.random.default_rng(1)
    device = Device(rng)
    seen = 0
    for _ in range(20):
        step = random_step(rng, 6, 3)
        device.send(step, StepShape.of(step))
        draws = LAYOUT.draws(device.arrays, step)
        if step.drawn is None:
            assert draws is None
            continue
        seen += 1
        assert draws is not None
        for name in ("rows", "uniform", "temperature", "top_k", "top_p"):
            assert getattr(draws, name).tolist() == getattr(step.drawn, name).tolist()
        assert draws.n_unfiltered == step.drawn.n_unfiltered
    assert seen > 15


def padded(step: StepInput, shape: StepShape) -> dict[str, list[int]]:
    """What lies behind the step's own numbers, after a buffer full of garbage was packed."""
    device = Device(np.random.default_rng(3))
    device.send(step, shape)
    inputs = LAYOUT.inputs(device.arrays, shape)
    exact = LAYOUT.inputs(device.arrays, StepShape.of(step))
    rest = {}
    for name in ("token_ids", "positions", "kv_slots", "query_starts", "context_ends", "sampled"):
        whole, own = getattr(inputs, name).tolist(), getattr(exact, name).tolist()
        assert whole[: len(own)] == own
        rest[name] = whole[len(own) :]
    return rest


def test_a_decode_graph_is_padded_with_rows_of_one_token_that_see_nothing() -> None:
    step = random_step(np.random.default_rng(2), 5, 0)
    rest = padded(step, StepShape(8, 8, 8, 8, 1, 28))
    assert rest["query_starts"] == [6, 7, 8]
    assert rest["kv_slots"] == [-1] * 3
    assert rest["token_ids"] == rest["positions"] == rest["context_ends"] == [0] * 3
    assert rest["sampled"] == [0] * (8 - len(step.sampled_rows))


def test_a_mixed_graph_is_padded_with_rows_without_tokens() -> None:
    step = random_step(np.random.default_rng(2), 3, 2)
    n = len(step.token_ids)
    rest = padded(step, StepShape(30, 9, 9, 0, 30, 28))
    assert rest["query_starts"] == [n] * 4
    assert rest["kv_slots"] == [-1] * (30 - n)
    assert rest["token_ids"] == rest["positions"] == [0] * (30 - n)
    assert rest["context_ends"] == [0] * 4


def test_every_array_has_its_own_place() -> None:
    words = torch.zeros(LAYOUT.words, dtype=torch.int32)
    arrays = LAYOUT.views(words)
    for number, tensor in enumerate(arrays.values(), 1):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(arrays.values(), 1))
    assert {tensor.data_ptr() % 16 for tensor in arrays.values()} == {words.data_ptr() % 16}
    assert arrays["block_tables"].shape == (MAX_ROWS, MAX_BLOCKS)


def test_the_largest_step_fits() -> None:
    rng = np.random.default_rng(5)
    step = replace(
        random_step(rng, 0, MAX_ROWS),
        n_tokens=np.full(MAX_ROWS, 5, np.int32),
        context=np.full(MAX_ROWS, 23, np.int32),
        token_ids=np.arange(45, dtype=np.int32),
        block_tables=rng.integers(0, 9, (MAX_ROWS, MAX_BLOCKS)).astype(np.int32),
        sampled_rows=np.arange(MAX_ROWS, dtype=np.int32),
    )
    device = Device(rng)
    device.send(step, StepShape.of(step))
    assert LAYOUT.inputs(device.arrays, StepShape.of(step)).kv_slots.tolist() == slots_of(step)
    assert LAYOUT.used_words(MAX_ROWS) <= LAYOUT.words
