"""The model against transformers: same tokens for every family, whatever the chunks, the paging and the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    CHECKPOINTS,
    ENGINE,
    N_NEW,
    PROMPTS,
    VOCABULARY,
    expected_outputs,
    write_checkpoint,
)
from computer import Computer, Sequences
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model_config import PACER_26M, read_model_config
from engine.shapes import parameter_count
from engine.weights import dummy_weights, load_safetensors


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    return write_checkpoint(request.param, tmp_path), tmp_path


def computer_of(folder: Path, dtype: torch.dtype = torch.float32) -> Computer:
    model = read_model_config(folder)
    return Computer(model, load_safetensors(folder, model, dtype))


def generate(computer: Computer, budget_tokens: int) -> list[list[int]]:
    """Greedy outputs for PROMPTS, 16 at a time: each step all decodes, then chunks of prompts up to the budget."""
    cached = Sequences()
    sequences = [list(prompt) for prompt in PROMPTS]
    context = [0] * len(sequences)
    waiting, running = list(range(len(sequences))), list[int]()
    while waiting or running:
        while waiting and len(running) < ENGINE.max_requests:
            running.append(waiting.pop(0))
        decodes = [i for i in running if context[i] >= len(PROMPTS[i])]
        work = [(i, sequences[i], context[i], 1) for i in decodes]
        left = budget_tokens
        for i in running:
            n = min(left, len(sequences[i]) - context[i])
            if i not in decodes and n > 0:
                work.append((i, sequences[i], context[i], n))
                left -= n
        step = cached.step(work, len(decodes))
        tokens = computer.forward(step).argmax(-1).tolist()
        for i, _, _, n in work:
            context[i] += n
        for row, token in zip(step.sampled_rows.tolist(), tokens, strict=True):
            sequences[work[row][0]].append(token)
        for i in [i for i in running if len(sequences[i]) == len(PROMPTS[i]) + N_NEW]:
            running.remove(i)
            cached.release(i)
    return [tokens[len(prompt) :] for tokens, prompt in zip(sequences, PROMPTS, strict=True)]


def test_greedy_tokens_equal_those_of_transformers(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    expected = expected_outputs(model)
    assert len({token for tokens in expected for token in tokens}) > VOCABULARY / 3
    assert generate(computer_of(folder), budget_tokens=37) == expected


@pytest.mark.parametrize("chunk_tokens", [7, 16, 64])
def test_chunked_prefill_gives_the_logits_of_whole_prefill(checkpoint: tuple[Any, Path], chunk_tokens: int) -> None:
    computer = computer_of(checkpoint[1], torch.float64)
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, 150).tolist()
    neighbour = prompt[::-1]
    cached = Sequences()
    whole = computer.forward(cached.step([(0, prompt, 0, 150)]))
    cached.release(0)
    for context in range(0, 150, chunk_tokens):
        n = min(chunk_tokens, 150 - context)
        logits = computer.forward(cached.step([(1, neighbour, context, n), (0, prompt, context, n)]))
        assert len(logits) == 2 * (context + n == 150)
    assert logits.shape == (2, VOCABULARY)
    torch.testing.assert_close(logits[1:], whole, rtol=0, atol=1e-9)
    assert (logits[0] - whole[0]).abs().max() > 0.1


def test_logits_equal_those_of_transformers_over_a_whole_prompt(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    prompt = np.random.default_rng(9).integers(0, VOCABULARY, 150).tolist()
    logits = computer_of(folder).forward(Sequences().step([(0, prompt, 0, 150)]))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.std()))


def test_the_built_in_model_has_26_million_parameters_and_sane_logits() -> None:
    assert parameter_count(PACER_26M) == pytest.approx(26e6, rel=0.01)
    weights = dummy_weights(PACER_26M, torch.bfloat16, 4)
    again = dummy_weights(PACER_26M, torch.float32, 4)
    assert all(torch.equal(weights[name], again[name].bfloat16()) for name in again)
    assert not torch.equal(again["head.weight"], dummy_weights(PACER_26M, torch.float32, 5)["head.weight"])
    logits = Computer(PACER_26M, weights).forward(Sequences().step([(0, PROMPTS[2], 0, 80)]))
    assert not weights, "the model took all of them"
    assert logits.isfinite().all()
    assert 0.1 < float(logits.float().std()) < 2


class Products(TorchDispatchMode):
    """Notes every matrix product: the function, and what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[tuple[int, ...], ...]]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.add((str(func), tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def test_the_matrix_products_of_a_step_are_those_rehearsed_for_its_sizes(checkpoint: tuple[Any, Path]) -> None:
    """Three prompts of 11 tokens, each of which yields one: products of 33 tokens, and of 3 after the last layer."""
    computer = computer_of(checkpoint[1])
    step = Sequences().step([(i, list(range(1, 12)), 0, 11) for i in range(3)], 0)
    with Products() as computed:
        computer.forward(step)
    with Products() as rehearsed:
        computer.transformer.multiply(33, sampled=False)
        computer.transformer.multiply(3, sampled=True)
    assert len(computed.seen) >= 5
    assert computed.seen <= rehearsed.seen
