"""The runner on a GPU: graphs, eager steps, look-ahead and the CPU agree."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import ENGINE, PROMPTS, write_checkpoint
from paged import Paged, make_request

from engine.attention.choice import default_block_tokens
from engine.config import EngineConfig, ModelSource
from engine.kv_sizing import blocks_that_fit, load_kernels
from engine.loader import load_runner
from engine.model_config import ModelConfig, read_model_config
from engine.model_runner import ModelRunner
from engine.request import Request, SamplingParams
from engine.shapes import shape
from engine.weights import dummy_weights, load_safetensors

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SMALL = replace(
    shape("mistral-7b"),
    vocab_size=4000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    sliding_windows=(None,) * 4,
)
N_NEW = 40


def requests_of(n: int, sampling: SamplingParams, longest: int, vocab_size: int) -> list[Request]:
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, vocab_size, rng.integers(1, longest)).tolist() for _ in range(n)]
    return [make_request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]


def flash_config(model: ModelConfig, look_ahead: bool = False) -> EngineConfig:
    block_tokens = default_block_tokens("auto", model, torch.bfloat16, CUDA)
    return EngineConfig(
        max_budget_tokens=1024,
        max_requests=64,
        max_model_tokens=1024,
        block_tokens=block_tokens,
        kv_blocks=64 * -(-1024 // block_tokens),
        look_ahead=look_ahead,
    )


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    """Bfloat16 with the best backend that is here, two in flight, graphs captured."""
    weights = dummy_weights(SMALL, torch.bfloat16, 3, CUDA)
    config = flash_config(SMALL, look_ahead=True)
    made = ModelRunner(SMALL, weights, config, threads=1, clock=count().__next__, device=CUDA)
    if not made.backend.captures:
        pytest.skip(f"{made.attention_name} does not run inside CUDA graphs")
    made.capture(made.graph_shapes(mixed=True))
    yield made
    made.graphs = None


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("family", ["llama-sharded", "mistral-window-10", "qwen3-wide-heads-tied"])
def test_float32_tokens_are_those_of_the_cpu(tmp_path: Path, family: str, look_ahead: bool) -> None:
    write_checkpoint(family, tmp_path)
    config, model = replace(ENGINE, look_ahead=look_ahead), read_model_config(tmp_path)
    outputs = []
    for device in (torch.device("cpu"), CUDA):
        weights = load_safetensors(tmp_path, model, torch.float32, device)
        made = ModelRunner(model, weights, config, threads=2, clock=count().__next__, device=device, attention="sdpa")
        for sampling in (SamplingParams(12), SamplingParams(12, temperature=1.0, top_p=0.9)):
            work = [make_request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)]
            outputs.append(Paged(made, config).generate(work, 37, preempt_every=5))
    assert outputs[:2] == outputs[2:]


@pytest.mark.parametrize("n_rows", [1, 3, 8, 33, 64])
@pytest.mark.parametrize("chunk_tokens", [0, 20, 64, 400])
def test_a_graph_chooses_what_the_eager_step_finds_likeliest(
    runner: ModelRunner, n_rows: int, chunk_tokens: int
) -> None:
    paged = Paged(runner, replace(runner.config, look_ahead=False))
    decodes = requests_of(n_rows - bool(chunk_tokens) or 1, SamplingParams(N_NEW), 200, SMALL.vocab_size)
    for request in decodes:
        paged.launch([(request, request.n_prompt)])
        paged.take()
    work = [(request, 1) for request in decodes]
    if chunk_tokens:
        work.append((make_request("99", list(range(chunk_tokens)), SamplingParams(N_NEW)), chunk_tokens))
    batch = paged.batch(work)
    assert runner.graphs is not None
    assert runner.graphs.fit(int(batch.n_tokens.sum()), len(work)) is not None
    logits = runner.logits(batch).float()
    chosen = torch.tensor(runner.launch(batch).result().token_ids, device=CUDA)
    best = logits.max(dim=-1).values
    # One rounding of bfloat16 apart, where the padded sizes make the matrix products sum in another order.
    assert (best - logits.gather(-1, chosen[:, None])[:, 0]).max() <= 2**-6 * logits.abs().max()


@pytest.mark.parametrize("sampling", [SamplingParams(N_NEW), SamplingParams(N_NEW, temperature=0.8, top_k=20)])
def test_two_in_flight_give_the_tokens_of_one(runner: ModelRunner, sampling: SamplingParams) -> None:
    """All decode side by side to the same length, so that the same batches run."""
    outputs = []
    for look_ahead in (False, True):
        work = requests_of(30, sampling, 30, SMALL.vocab_size)
        outputs.append(Paged(runner, replace(runner.config, look_ahead=look_ahead)).generate(work, 1024))
    assert outputs[0] == outputs[1]
    assert len({token for output in outputs[0] for token in output}) > 30


def test_steps_in_flight_report_their_time_and_the_gap_before_them(runner: ModelRunner) -> None:
    paged = Paged(runner, runner.config)
    work = requests_of(8, SamplingParams(N_NEW), 30, SMALL.vocab_size)
    for request in work:
        paged.launch([(request, request.n_prompt)])
        paged.take()
    results = []
    for _ in range(10):
        paged.launch([(request, 1) for request in work])
        if len(paged.flights) == 2:
            results.append(paged.take())
    stages = [result.stages[0] for result in results]
    assert all(0 < stage.busy_s < 0.05 and 0 <= stage.bubble_s < 0.05 for stage in stages)
    assert [stage.microbatches_in_flight for stage in stages] == [1, *[2] * 8]


def test_busy_and_bubble_add_up_to_the_time_since_there_is_work(runner: ModelRunner) -> None:
    """Twice, with the host's pauses between the steps; what the device idles before the work comes does not count."""
    paged = Paged(runner, replace(runner.config, look_ahead=False))
    (request,) = requests_of(1, SamplingParams(N_NEW), 30, SMALL.vocab_size)
    paged.launch([(request, request.n_prompt)])
    paged.take()
    runner.clock = time.monotonic_ns
    for _ in range(2):
        time.sleep(0.2)
        work_since_ns = time.monotonic_ns()
        told_s = []
        for _ in range(3):
            time.sleep(0.05)
            paged.launch([(request, 1)], work_since_ns)
            (stage,) = paged.take().stages
            assert 0.05 <= stage.bubble_s < 0.06
            told_s.append(stage.busy_s + stage.bubble_s)
        took_s = (time.monotonic_ns() - work_since_ns) * 1e-9
        assert took_s - 0.005 < sum(told_s) < took_s + 0.0005


def test_padding_is_reported(runner: ModelRunner) -> None:
    assert runner.graphs is not None
    sizes = ((9, 9), (64, 64), (65, 3), (129, 2), (513, 2))
    assert [runner.graphs.padding_tokens(*size) for size in sizes] == [7, 0, 31, 31, 0]
    paged = Paged(runner, runner.config)
    nine = paged.batch([(request, request.n_prompt) for request in requests_of(9, SamplingParams(2), 2, 100)])
    pending = runner.launch(nine)
    assert pending.padding_tokens == 7
    pending.result()


def test_the_cache_is_sized_from_what_is_free() -> None:
    torch.cuda.empty_cache()
    source = ModelSource(shape="yi-6b", dtype="bfloat16", device="cuda", memory_utilization=0.5)
    config = EngineConfig(max_requests=32, max_model_tokens=4096, block_tokens=0, kv_blocks=0)
    made, settled = load_runner(source, config, count().__next__)
    free, total = torch.cuda.mem_get_info()
    assert 0.42 < (total - free) / total < 0.56
    assert isinstance(made, ModelRunner)
    assert settled.kv_blocks * settled.block_tokens > 32 * 4096
    with pytest.raises(ValueError, match=r"leaves .* GiB for the KV cache, and one request of 4096 tokens takes"):
        made.allocate(1)
        blocks_that_fit(made, 0.05, [])


def test_a_model_larger_than_the_gpu_is_refused() -> None:
    source = ModelSource(shape="falcon-180b", dtype="bfloat16", device="cuda")
    with pytest.raises(ValueError, match=r"weights take 3\d\d\.\d GiB on each GPU"):
        load_runner(source, EngineConfig(block_tokens=0, kv_blocks=0), count().__next__)


def test_loaded_kernels_leave_no_memory_taken(runner: ModelRunner) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    load_kernels(runner)
    assert torch.cuda.memory_reserved() == before
