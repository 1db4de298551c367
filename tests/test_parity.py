"""The whole engine against transformers: the same greedy tokens, whatever the budgets do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CHECKPOINTS, N_NEW, N_PROMPTS, PROMPTS, expected_outputs, write_checkpoint
from paged import Paged, make_request

from engine.config import EngineConfig, ModelSource
from engine.core import EngineCore
from engine.link import MemoryLink
from engine.loader import load_runner
from engine.model_runner import ModelRunner
from engine.protocol import VERSION, Knobs
from engine.request import SamplingParams, Submit, TokenOutput
from engine.scheduler import Scheduler

Schedule = dict[str, Any]
WAYS: dict[str, Schedule] = {
    "whole prefill": {"knobs": lambda random: (256, 256)},
    "chunks of 7": {"knobs": lambda random: (64, 7)},
    "chunks of 16": {"knobs": lambda random: (64, 16)},
    "chunks of 64": {"knobs": lambda random: (64, 64)},
    "random knobs": {"knobs": lambda random: tuple(random.integers(1, 257, 2).tolist())},
    "forced preemption": {"knobs": lambda random: (256, 64), "kv_blocks": 42},
    "prefix cache": {"knobs": lambda random: tuple(random.integers(1, 257, 2).tolist()), "prefix_caching": True},
    "prefix cache and preemption": {"knobs": lambda random: (96, 32), "prefix_caching": True, "kv_blocks": 42},
    "look-ahead": {"knobs": lambda random: tuple(random.integers(1, 257, 2).tolist()), "look_ahead": True},
    "look-ahead and preemption": {"knobs": lambda random: (96, 32), "look_ahead": True, "kv_blocks": 42},
    "orca": {"knobs": lambda random: (128, 128), "schedule": "orca"},
}


class Engine:
    """The real core and runner over a checkpoint; an iterator stands in for the clock."""

    def __init__(self, folder: Path, way: Schedule, device: str = "cpu") -> None:
        settings = {"kv_blocks": 640, "tile_tokens": 4} | {key: way[key] for key in way if key != "knobs"}
        config = EngineConfig(
            budget_tokens=64,
            chunk_tokens=64,
            min_budget_tokens=1,
            max_budget_tokens=256,
            max_requests=16,
            max_model_tokens=160,
            block_tokens=4,
            **settings,
        )
        clock = iter(range(1, 10**9, 1000)).__next__
        runner, self.config = load_runner(ModelSource(folder=folder, device=device), config, clock)
        self.scheduler = Scheduler(self.config)
        self.link = MemoryLink()
        self.tokens: list[TokenOutput] = []
        self.core = EngineCore("e", self.config, self.scheduler, runner, self.link, clock, self.tokens.extend)
        self.next_knobs = way["knobs"]

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        random = np.random.default_rng(3)
        for i, prompt in enumerate(prompts):
            self.scheduler.submit(Submit(str(i), prompt, SamplingParams(max_tokens=N_NEW)), 0)
        outputs: list[list[int]] = [[] for _ in prompts]
        sequence = 0
        while self.scheduler.has_work:
            sequence += 1
            self.link.inbox = Knobs(VERSION, "e", sequence, sequence - 1, *self.next_knobs(random))
            self.core.step()
            self.scheduler.check()
        self.core.idle()
        for token in self.tokens:
            outputs[int(token.request_id)].append(token.token_id)
        self.tokens.clear()
        return outputs


@pytest.fixture(
    scope="module",
    params=[
        "llama-sharded",
        "mistral-window-10",
        "qwen2-two-windows",
        "qwen3-wide-heads-tied",
        "falcon-7b-style",
        "falcon-40b-style-biased",
    ],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], Path]:
    assert request.param in CHECKPOINTS
    folder = tmp_path_factory.mktemp("checkpoint")
    return expected_outputs(write_checkpoint(request.param, folder)), folder


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_transformers(family: tuple[list[list[int]], Path], way: str) -> None:
    expected, folder = family
    engine = Engine(folder, WAYS[way])
    assert engine.generate(PROMPTS) == expected
    preempted = engine.scheduler.preemptions
    assert (preempted > 0) == ("preemption" in way), f"{preempted} preemptions"
    assert engine.scheduler.blocks.free_blocks == engine.config.kv_blocks


def test_the_second_time_prompts_come_from_the_prefix_cache(family: tuple[list[list[int]], Path]) -> None:
    expected, folder = family
    engine = Engine(folder, WAYS["prefix cache"])
    assert engine.generate(PROMPTS) == expected
    before = len(engine.link.published)
    assert engine.generate(PROMPTS) == expected
    prefilled = [
        sum(t.batch.prefill_tokens for t in part)
        for part in (engine.link.published[:before], engine.link.published[before:])
    ]
    assert prefilled[1] < 0.35 * prefilled[0]
    assert len(expected) == N_PROMPTS


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["look-ahead", "prefix cache and preemption"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_gpu_gives_the_greedy_tokens_of_transformers(name: str, way: str, tmp_path: Path) -> None:
    expected = expected_outputs(write_checkpoint(name, tmp_path))
    assert Engine(tmp_path, WAYS[way], "cuda").generate(PROMPTS) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16_is_within_a_hundredth_of_float32(name: str, device: str, tmp_path: Path) -> None:
    """Against transformers in float32 over the same weights, all prompts of 16 requests in one batch."""
    model = write_checkpoint(name, tmp_path, initializer_range=0.05, hidden_size=256)  # heads as wide as real ones
    config = EngineConfig(max_budget_tokens=1024, min_budget_tokens=1, max_requests=16, max_model_tokens=160)
    source = ModelSource(folder=tmp_path, dtype="bfloat16", device=device)
    runner, config = load_runner(source, config, iter(range(10**9)).__next__)
    assert isinstance(runner, ModelRunner)
    prompts = PROMPTS[:16]
    requests = [make_request(str(i), prompt, SamplingParams(1)) for i, prompt in enumerate(prompts)]
    work = [(request, request.n_prompt) for request in requests]
    logits = runner.logits(Paged(runner, config).batch(work)).float().cpu()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 1e-2
    assert errors.max() < 3e-2
