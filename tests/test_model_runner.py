"""The runner on a CPU: the same tokens whatever the chunks, the paging, the preemptions and the steps in flight."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import ENGINE, N_NEW, PROMPTS, VOCABULARY, expected_outputs, write_checkpoint
from paged import Paged, make_request

from engine.attention.backend import BatchAttention, KvCache, layer_windows
from engine.config import EngineConfig, ModelSource
from engine.device_inputs import DeviceInputs
from engine.execution import CudaExecution, Resumed, within_memory
from engine.loader import load_runner
from engine.model_config import PACER_26M, read_model_config
from engine.model_runner import ModelRunner
from engine.packed_inputs import DeviceBuffer
from engine.request import Request, SamplingParams
from engine.shard import Shard
from engine.step_input import OutOfDeviceMemory, step_input
from engine.step_shapes import (
    PaddedSizes,
    StepShape,
    decode_sizes,
    graph_shapes,
    product_sizes,
    slower_than_larger,
)
from engine.weights import dummy_weights, load_safetensors

TWO_IN_FLIGHT = replace(ENGINE, look_ahead=True)
GREEDY, DRAWN = SamplingParams(N_NEW), SamplingParams(N_NEW, temperature=1.0, top_p=0.95)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("mistral")
    return write_checkpoint("mistral-window-10", folder), folder


def runner_of(
    folder: Path,
    config: EngineConfig = ENGINE,
    dtype: torch.dtype = torch.float32,
    clock: Iterator[int] | None = None,
    shard: Shard | None = None,
) -> ModelRunner:
    model, shard = read_model_config(folder), shard or Shard()
    weights = load_safetensors(folder, model, dtype, torch.device("cpu"), shard)
    return ModelRunner(model, weights, config, threads=1, clock=(clock or count()).__next__, shard=shard)


def all_requests(sampling: SamplingParams) -> list[Request]:
    return [make_request(str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("config", [ENGINE, TWO_IN_FLIGHT], ids=["one in flight", "two in flight"])
@pytest.mark.parametrize("preempt_every", [0, 3])
def test_greedy_tokens_are_those_of_transformers(
    mistral: tuple[Any, Path], config: EngineConfig, preempt_every: int
) -> None:
    model, folder = mistral
    paged = Paged(runner_of(folder, config), config)
    assert paged.generate(all_requests(GREEDY), 37, preempt_every) == expected_outputs(model)


def test_sampled_tokens_survive_chunking_paging_preemption_and_look_ahead(mistral: tuple[Any, Path]) -> None:
    folder = mistral[1]
    plain = Paged(runner_of(folder, dtype=torch.float64), ENGINE).generate(all_requests(DRAWN), 200)
    assert plain != Paged(runner_of(folder, dtype=torch.float64), ENGINE).generate(all_requests(GREEDY), 200)
    for config in (ENGINE, TWO_IN_FLIGHT):
        paged = Paged(runner_of(folder, config, torch.float64), config, seed=1)
        assert paged.generate(all_requests(DRAWN), 23, preempt_every=3) == plain


class Attended:
    """Attention row by row, from the tensors that a graph would read."""

    def __init__(self, cache: KvCache, windows: list[int | None], inputs: DeviceInputs) -> None:
        self.cache, self.windows, self.inputs = cache, windows, inputs

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(q, torch.nan)  # what padding gets must not matter
        starts, ends = self.inputs.query_starts.tolist(), self.inputs.context_ends.tolist()
        for row, end in enumerate(ends):
            queries = slice(starts[row], starts[row + 1])
            if end == 0 or queries.start == queries.stop:
                continue
            pages = self.cache[layer][self.inputs.block_tables[row]]
            k, v = (pages[:, i].flatten(0, 1)[:end].transpose(0, 1)[None] for i in (0, 1))
            distance = torch.arange(end - (queries.stop - queries.start), end)[:, None] - torch.arange(end)
            seen = (distance >= 0) & (distance < (self.windows[layer] or end))
            rows = q[queries].transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, enable_gqa=True)
            out[queries] = attended[0].transpose(0, 1)
        return out.flatten(1)


class Replayed(PaddedSizes):
    """Stands in for CUDA graphs: computes a padded step from static inputs at every replay."""

    def __init__(self, runner: ModelRunner, shapes: list[StepShape]) -> None:
        super().__init__(shapes)
        self.runner, self.replays = runner, 0

    def replay(self, shape: StepShape) -> torch.Tensor:
        self.replays += 1
        return self.runner._compute_static(shape)


def with_static_steps(runner: ModelRunner, config: EngineConfig) -> Replayed:
    """Have steps computed as graphs compute them: one buffer, padded sizes, all greedy, draws afterwards."""
    windows = layer_windows(runner.model, runner.shard)
    runner.backend.capture = lambda inputs: Attended(runner.kv_cache, windows, inputs)  # type: ignore[method-assign]
    runner._static = DeviceBuffer(runner._layout, runner.device)
    shapes = graph_shapes(config.max_requests, config.max_budget_tokens, config.max_model_tokens, mixed=True)
    runner.graphs = replayed = Replayed(runner, shapes)  # type: ignore[assignment]
    return replayed


@pytest.mark.parametrize("config", [ENGINE, TWO_IN_FLIGHT], ids=["one in flight", "two in flight"])
def test_padded_steps_from_static_inputs_give_the_same_tokens(mistral: tuple[Any, Path], config: EngineConfig) -> None:
    folder = mistral[1]
    mixed = [SamplingParams(N_NEW, temperature=1.0), GREEDY, DRAWN]
    static, plain = (runner_of(folder, config, torch.float64) for _ in range(2))
    replayed = with_static_steps(static, config)
    outputs = []
    for runner in (static, plain):
        work = [make_request(str(i), prompt, mixed[i % 3]) for i, prompt in enumerate(PROMPTS)]
        outputs.append(Paged(runner, config).generate(work, 90, preempt_every=7))
    assert outputs[0] == outputs[1]
    assert replayed.replays > 40
    for runner, padding_tokens in ((static, 7), (plain, 0)):
        nine = Paged(runner, config).batch([(make_request(str(i), [i], GREEDY), 1) for i in range(9)])
        assert runner.launch(nine).padding_tokens == padding_tokens


def test_stages_that_hand_their_hidden_states_on_give_the_tokens_of_the_whole(mistral: tuple[Any, Path]) -> None:
    folder = mistral[1]
    whole = Paged(runner_of(folder), ENGINE)
    stages = [runner_of(folder, shard=Shard(pp_rank=rank, pp_size=3)) for rank in range(3)]
    work = [(make_request(str(i), PROMPTS[i], GREEDY), len(PROMPTS[i])) for i in range(5)]
    batch = whole.batch(work)
    hidden = None
    for stage in stages:
        execution = stage.execute(step_input(batch, ()), hidden)
        hidden = execution.hidden
        assert (hidden is None) == (stage is stages[-1]) == bool(execution.tokens())
    assert execution.tokens() == whole.runner.launch(batch).result().token_ids


def test_logits_alone_are_those_that_tokens_are_chosen_from(mistral: tuple[Any, Path]) -> None:
    paged = Paged(runner := runner_of(mistral[1]), ENGINE)
    batch = paged.batch([(make_request(str(i), PROMPTS[i], GREEDY), len(PROMPTS[i])) for i in range(6)])
    logits = runner.logits(batch)
    assert logits.shape == (6, VOCABULARY)
    assert runner.launch(batch).result().token_ids == logits.argmax(-1).tolist()


def test_a_prompt_that_is_not_finished_yields_no_token(mistral: tuple[Any, Path]) -> None:
    paged = Paged(runner_of(mistral[1]), ENGINE)
    paged.launch([(make_request("0", PROMPTS[2], GREEDY), 30)])
    assert paged.take().token_ids == []


def test_device_time_is_the_injected_clock_around_the_computation(mistral: tuple[Any, Path]) -> None:
    clock = [1_000_000_000, 1_250_000_000]
    paged = Paged(runner_of(mistral[1], clock=iter(clock)), ENGINE)
    paged.launch([(make_request("0", [1, 2], GREEDY), 2)], work_since_ns=900_000_000)
    result = paged.take()
    assert result.device_s == pytest.approx(0.25)
    (stage,) = result.stages
    assert (stage.busy_s, stage.microbatches_in_flight) == (result.device_s, 1)
    assert stage.bubble_s == pytest.approx(0.1)


def test_device_time_is_from_the_planning_of_attention_on_and_packing_is_the_hosts(
    mistral: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = [0]
    runner = runner_of(mistral[1], clock=iter(lambda: now_ns[0], None))
    pack, prepare = runner._layout.pack, runner.backend.prepare

    def slow_pack(*arguments: Any) -> None:
        now_ns[0] += 1_000_000_000
        pack(*arguments)

    def slow_prepare(*arguments: Any) -> BatchAttention:
        now_ns[0] += 1_000_000
        return prepare(*arguments)

    monkeypatch.setattr(runner._layout, "pack", slow_pack)
    monkeypatch.setattr(runner.backend, "prepare", slow_prepare)
    paged = Paged(runner, ENGINE)
    paged.launch([(make_request("0", [1, 2], GREEDY), 2)])
    (stage,) = paged.take().stages
    assert (stage.busy_s, stage.bubble_s) == pytest.approx((0.001, 1.0))


@pytest.mark.parametrize(("config", "in_flight"), [(ENGINE, 1), (TWO_IN_FLIGHT, 2)])
def test_a_gap_is_a_bubble_from_when_there_is_work(
    mistral: tuple[Any, Path], config: EngineConfig, in_flight: int
) -> None:
    """Each step takes 10 ms, and the device idles for 30 ms before it."""
    clock = iter([n * 1_000_000 for step in range(1, 5) for n in (40 * step, 40 * step + 10)])
    paged = Paged(runner_of(mistral[1], config, clock=clock), config)
    request = make_request("0", [1, 2], GREEDY)
    results = []
    for n, work_since_ms in ((2, 25), (1, 25), (1, 25), (1, 155)):
        paged.launch([(request, n)], work_since_ms * 1_000_000)
        if len(paged.flights) == config.depth:
            results.append(paged.take())
    results += [paged.take() for _ in range(len(paged.flights))]
    stages = [result.stages[0] for result in results]
    assert [s.busy_s for s in stages] == pytest.approx([0.01] * 4)
    assert [s.bubble_s for s in stages] == pytest.approx([0.015, 0.03, 0.03, 0.005])
    assert [s.microbatches_in_flight for s in stages] == [1, *[in_flight] * 3]


@dataclass
class At:
    """A CUDA event that happened at a known time of the device."""

    ms: float

    def elapsed_time(self, later: "At") -> float:
        return later.ms - self.ms

    def synchronize(self) -> None:
        """It has happened."""


def test_a_devices_bubble_counts_from_the_step_before_or_from_when_work_came_to_it_idle() -> None:
    def step(begin_ms: float, end_ms: float, resumed: Resumed | None = None) -> CudaExecution:
        return CudaExecution(None, torch.zeros(0), resumed, At(begin_ms), At(end_ms))  # type: ignore[arg-type]

    first = step(1000, 1010, Resumed(At(990), 0.002))  # type: ignore[arg-type]
    second = step(1013, 1020)
    after_a_pause = step(5000, 5010, Resumed(At(4999), 0.004))  # type: ignore[arg-type]
    assert first.bubble_s(None) == pytest.approx(0.012)
    assert second.bubble_s(first) == pytest.approx(0.003)
    assert after_a_pause.bubble_s(second) == pytest.approx(0.005)
    assert step(0, 1).bubble_s(None) == 0.0


def test_what_the_model_or_the_machine_cannot_do_is_refused(mistral: tuple[Any, Path]) -> None:
    model = read_model_config(mistral[1])
    with pytest.raises(ValueError, match=r"max_model_tokens 300 is beyond .* 256"):
        runner_of(mistral[1], replace(ENGINE, max_model_tokens=300))
    with pytest.raises(ValueError, match="threads is 0"):
        ModelRunner(model, dummy_weights(model, torch.float32, 0), ENGINE, threads=0, clock=lambda: 0)


def test_the_loader_settles_the_kv_blocks_of_a_cpu() -> None:
    config = EngineConfig(max_budget_tokens=256, max_requests=4, block_tokens=0, kv_blocks=0)
    runner, settled = load_runner(ModelSource(), config, count().__next__)
    assert (settled.block_tokens, settled.kv_blocks) == (16, 4096)
    assert settled == runner.config
    assert (runner.attention_name, runner.vocab_size) == ("sdpa", PACER_26M.vocab_size)
    own, settled = load_runner(ModelSource(), replace(config, block_tokens=8, kv_blocks=300), count().__next__)
    assert (settled.block_tokens, settled.kv_blocks) == (8, 300)
    own.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ModelSource(dtype="int8"), "dtype 'int8' is not one of float32"),
        (ModelSource(shape="mistral-8b"), "shape 'mistral-8b'"),
        pytest.param(
            ModelSource(device="cuda"),
            "'cuda' is asked for",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)
def test_the_loader_refuses_what_it_cannot_load(source: ModelSource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_runner(source, EngineConfig(), count().__next__)


def test_memory_that_runs_out_gets_one_more_chance() -> None:
    attempts = []

    def compute() -> str:
        attempts.append(len(attempts))
        if len(attempts) in {1, 3, 4, 5}:
            raise torch.OutOfMemoryError("full")
        return "done"

    assert within_memory(compute, repeatable=True) == "done"
    with pytest.raises(OutOfDeviceMemory, match="full"):
        within_memory(compute, repeatable=True)
    with pytest.raises(OutOfDeviceMemory, match="lower max_budget_tokens"):
        within_memory(compute, repeatable=False)
    assert len(attempts) == 5


@pytest.mark.parametrize("max_requests", [1, 3, 64, 100, 256, 300, 512])
def test_every_batch_of_decodes_has_a_graph_that_is_little_larger(max_requests: int) -> None:
    sizes = decode_sizes(max_requests)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_requests
    padded = PaddedSizes(graph_shapes(max_requests, 4096, 1000, mixed=False))
    for n in range(1, max_requests + 1):
        shape = padded.fit(n, n)
        assert shape is not None
        assert n <= shape.n_tokens == shape.n_rows == shape.n_decodes <= max(2 * n, n + (31 if n > 256 else 7))
        assert shape.max_query_tokens == 1


def test_mixed_steps_take_the_smallest_mixed_graph_and_large_ones_none() -> None:
    shapes = graph_shapes(48, 500, 1000, mixed=True)
    assert [shape.n_tokens for shape in shapes] == sorted((shape.n_tokens for shape in shapes), reverse=True)
    rng, padded = np.random.default_rng(0), PaddedSizes(shapes)
    for _ in range(500):
        n_rows = int(rng.integers(1, 49))
        n_tokens = int(rng.integers(n_rows + 1, 600))
        shape = padded.fit(n_tokens, n_rows)
        expected = next((n for n in range(32, 481, 32) if n >= n_tokens and min(n, 48) >= n_rows), None)
        assert (shape.n_tokens if shape else None) == expected
        assert shape is None or (shape.n_rows, shape.max_query_tokens, shape.n_decodes) == (
            min(expected, 48),
            expected,
            0,
        )
    assert not [shape for shape in graph_shapes(48, 100, 1000, mixed=False) if shape.max_query_tokens > 1]


def test_sizes_for_which_a_larger_one_is_faster_are_padded_to_that() -> None:
    shapes = graph_shapes(8, 160, 1000, mixed=True)
    times_ms = {shape: 10.0 + shape.n_tokens / 100 for shape in shapes}
    slow = {shape for shape in shapes if shape.n_tokens in (64, 128) or shape.n_decodes == 2}
    times_ms |= dict.fromkeys(slow, 14.0)
    assert slower_than_larger(times_ms) == slow
    assert not slower_than_larger(dict.fromkeys(shapes, 10.0))
    padded = PaddedSizes(shapes)
    assert padded.fit(100, 4) == padded.fit(128, 4)
    padded.drop(slow)
    fits = [padded.fit(*size) for size in ((33, 4), (64, 4), (100, 4), (160, 4), (161, 4), (2, 2))]
    assert [shape.n_tokens if shape else None for shape in fits] == [96, 96, 160, 160, None, 4]


@pytest.mark.parametrize("most_tokens", [1, 7, 96, 1000, 8192])
def test_sizes_of_products_are_ascending_and_lie_close(most_tokens: int) -> None:
    sizes = product_sizes(most_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most_tokens
    for before, size in pairwise(sizes):
        assert size - before <= max(1, size / 16)
    if most_tokens > 512:
        above = [size for size in sizes if size > 512]
        assert {size % 8 == 0 for size in above} == {True, False}, "both kinds of kernels"
