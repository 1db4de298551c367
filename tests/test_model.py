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
    runner_of,
    write_checkpoint,
)

from engine.config import EngineConfig
from engine.model_config import PACER_26M, read_model_config
from engine.model_runner import ModelRunner
from engine.request import Batch, Request, SamplingParams, Submit
from engine.sampler import uniform
from engine.weights import dummy_weights, tensor_shapes


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    return write_checkpoint(request.param, tmp_path), tmp_path


class Paged:
    """Requests in scattered blocks of the cache, driven batch by batch; blocks that come free are used again."""

    def __init__(self, runner: ModelRunner, seed: int = 0) -> None:
        self.runner = runner
        self.rng = np.random.default_rng(seed)
        self.free: list[int] = self.rng.permutation(ENGINE.kv_blocks).tolist()
        self.blocks: dict[str, list[int]] = {}

    def batch(self, work: list[tuple[Request, int, int]]) -> Batch:
        """`work` is (request, context, tokens), decodes first; rows that reach the last known token sample."""
        tables = np.zeros((len(work), ENGINE.max_blocks_per_request), dtype=np.int32)
        for row, (request, context, n) in enumerate(work):
            held = self.blocks.setdefault(request.id, [])
            while len(held) * ENGINE.block_tokens < context + n:
                held.append(self.free.pop())
            tables[row, : len(held)] = held
        return Batch(
            requests=[request for request, _, _ in work],
            n_decodes=sum(n == 1 and context >= request.n_prompt for request, context, n in work),
            slots=np.array([request.slot for request, _, _ in work]),
            n_tokens=np.array([n for _, _, n in work]),
            context=np.array([context for _, context, _ in work]),
            samples=np.array([context + n == len(request.token_ids) for request, context, n in work]),
            block_tables=tables,
        )

    def release(self, request: Request) -> None:
        self.free += self.blocks.pop(request.id, [])
        self.rng.shuffle(self.free)

    def generate(self, requests: list[Request], budget_tokens: int, preempt_every: int = 0) -> list[list[int]]:
        """All outputs; at most 16 requests run. Every `preempt_every` steps the newest loses its blocks."""
        waiting, running, computed = list(requests), list[Request](), dict.fromkeys((r.id for r in requests), 0)
        step = 0
        while waiting or running:
            step += 1
            if preempt_every and step % preempt_every == 0 and running:
                computed[running[-1].id] = 0
                self.release(running[-1])
            while waiting and len(running) < ENGINE.max_requests:
                running.append(waiting.pop(0))
            self.step(running, computed, budget_tokens)
            for request in [r for r in running if r.n_output == r.sampling.max_tokens]:
                running.remove(request)
                self.release(request)
        return [request.token_ids[request.n_prompt :] for request in requests]

    def step(self, running: list[Request], computed: dict[str, int], budget_tokens: int) -> None:
        decodes = [r for r in running if r.n_output and computed[r.id] == len(r.token_ids) - 1]
        work = [(r, computed[r.id], 1) for r in decodes]
        left = budget_tokens
        for r in running:
            n = min(left, len(r.token_ids) - computed[r.id])
            if r not in decodes and n > 0:
                work.append((r, computed[r.id], n))
                left -= n
        batch = self.batch(work)
        tokens = iter(self.runner.launch(batch).result().token_ids)
        for (request, context, n), samples in zip(work, batch.samples.tolist(), strict=True):
            computed[request.id] = context + n
            if samples:
                request.token_ids.append(next(tokens))
        assert next(tokens, None) is None


def make_request(name: str, prompt: list[int], sampling: SamplingParams) -> Request:
    return Request(Submit(name, prompt, sampling), slot=0, seed=int(name), arrival_ns=0)


def all_requests(sampling: SamplingParams) -> list[Request]:
    return [make_request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)]


def test_greedy_tokens_equal_those_of_transformers(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    expected = expected_outputs(model)
    assert len({token for tokens in expected for token in tokens}) > VOCABULARY / 2
    paged = Paged(runner_of(folder))
    assert paged.generate(all_requests(SamplingParams(N_NEW)), budget_tokens=37) == expected


@pytest.mark.parametrize("chunk_tokens", [7, 16, 64])
def test_chunked_prefill_gives_the_logits_of_whole_prefill(checkpoint: tuple[Any, Path], chunk_tokens: int) -> None:
    runner = runner_of(checkpoint[1], torch.float64)
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, 150).tolist()
    request, neighbour = (make_request(name, prompt[::step], SamplingParams(1)) for name, step in (("0", 1), ("1", -1)))
    paged = Paged(runner)
    whole = runner.launch(paged.batch([(request, 0, 150)])).logits()
    paged.release(request)
    for context in range(0, 150, chunk_tokens):
        n = min(chunk_tokens, 150 - context)
        pending = runner.launch(paged.batch([(neighbour, context, n), (request, context, n)]))
        logits = pending.logits()
    assert logits.shape == (2, VOCABULARY)
    torch.testing.assert_close(logits[1:], whole, rtol=0, atol=1e-9)
    assert (logits[0] - whole[0]).abs().max() > 0.1


def test_logits_equal_those_of_transformers_over_a_whole_prompt(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    runner = runner_of(folder)
    prompt = np.random.default_rng(9).integers(0, VOCABULARY, 150).tolist()
    logits = runner.launch(Paged(runner).batch([(make_request("0", prompt, SamplingParams(1)), 0, 150)])).logits()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * float(expected.std()))


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    write_checkpoint("mistral-window-10", tmp_path)
    return tmp_path


def test_sampled_tokens_survive_chunking_paging_and_preemption(mistral: Path) -> None:
    sampling = SamplingParams(N_NEW, temperature=1.0, top_p=0.95)
    runner = runner_of(mistral, torch.float64)
    plain = Paged(runner).generate(all_requests(sampling), budget_tokens=200)
    assert plain != Paged(runner).generate(all_requests(SamplingParams(N_NEW)), budget_tokens=200)
    assert Paged(runner, seed=1).generate(all_requests(sampling), budget_tokens=23, preempt_every=3) == plain


def test_a_draw_is_keyed_with_the_seed_and_the_output_position(mistral: Path) -> None:
    runner = runner_of(mistral)
    request = make_request("77", [1, 2, 3], SamplingParams(9, temperature=1.0))
    request.token_ids += [4, 5]  # two tokens of output, recomputed with the prompt as after a preemption
    pending = runner.launch(Paged(runner).batch([(request, 0, 5)]))
    assert pending.sampling is not None
    assert pending.sampling.uniform.tolist() == [uniform(77, 2)]


def test_a_prompt_that_is_not_finished_yields_no_token(mistral: Path) -> None:
    runner = runner_of(mistral)
    result = runner.launch(Paged(runner).batch([(make_request("0", PROMPTS[2], SamplingParams(1)), 0, 30)])).result()
    assert result.token_ids == []


def test_device_time_is_the_injected_clock_around_the_computation(mistral: Path) -> None:
    runner = runner_of(mistral)
    runner.clock = iter([1_000_000_000, 1_250_000_000]).__next__
    result = runner.launch(Paged(runner).batch([(make_request("0", [1, 2], SamplingParams(1)), 0, 2)])).result()
    assert result.device_s == pytest.approx(0.25)
    assert [(s.busy_s, s.bubble_s, s.microbatches_in_flight) for s in result.stages] == [(result.device_s, 0.0, 1)]


def test_a_model_length_beyond_the_models_positions_is_refused(mistral: Path) -> None:
    model, config = read_model_config(mistral), EngineConfig(max_model_tokens=300)
    with pytest.raises(ValueError, match=r"max_model_tokens 300 is beyond .* 256"):
        ModelRunner(model, dummy_weights(model, torch.float32, 0), config, threads=1, clock=lambda: 0)


def test_the_built_in_model_has_26_million_parameters_and_sane_logits() -> None:
    assert sum(int(np.prod(shape)) for shape in tensor_shapes(PACER_26M).values()) == pytest.approx(26e6, rel=0.01)
    weights = dummy_weights(PACER_26M, torch.bfloat16, 4)
    again = dummy_weights(PACER_26M, torch.float32, 4)
    assert all(torch.equal(weights[name], again[name].bfloat16()) for name in tensor_shapes(PACER_26M))
    assert not torch.equal(again["lm_head.weight"], dummy_weights(PACER_26M, torch.float32, 5)["lm_head.weight"])
    runner = ModelRunner(PACER_26M, weights, ENGINE, threads=1, clock=lambda: 0)
    logits = runner.launch(Paged(runner).batch([(make_request("0", PROMPTS[2], SamplingParams(1)), 0, 80)])).logits()
    assert logits.isfinite().all()
    assert 0.1 < float(logits.float().std()) < 2
