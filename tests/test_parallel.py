"""Several ranks, each a process: the tokens of one process, what the stages report, and what happens when one dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from checkpoints import CHECKPOINTS, ENGINE, LLAMA_SIZES, N_NEW, PROMPTS, expected_outputs, write_checkpoint

from engine.config import EngineConfig, ModelSource
from engine.core import EngineCore, Pending, Runner
from engine.link import MemoryLink
from engine.loader import load_runner
from engine.parallel.messages import Ready, decode_from_rank, decode_step, encode
from engine.parallel.runner import ParallelRunner
from engine.protocol import VERSION, Completion, Knobs, Telemetry
from engine.request import Batch, Request, SamplingParams, StepResult, Submit, TokenOutput
from engine.scheduler import Scheduler
from engine.step_input import StepInput, even_step
from engine.step_shapes import PaddedSizes, graph_shapes

NextKnobs = Callable[[np.random.Generator], tuple[int, int]]
WHOLE: NextKnobs = lambda random: (256, 256)  # noqa: E731
RANDOM: NextKnobs = lambda random: tuple(random.integers(1, 257, 2).tolist())  # noqa: E731
GREEDY = SamplingParams(max_tokens=N_NEW)
DRAWN = SamplingParams(max_tokens=N_NEW, temperature=0.9, top_k=20, seed=8)
LAYOUTS = {  # family, tensor ranks, stages, and whether the next iteration is formed before the tokens are known
    "tp2 with look-ahead": ("llama-sharded", 2, 1, True),
    "pp2": ("llama-sharded", 1, 2, False),
    "pp3 with look-ahead": ("llama-sharded", 1, 3, True),
    "tp2 x pp2 with look-ahead": ("llama-sharded", 2, 2, True),
    "tp2 x pp2 of one shared KV head": ("falcon-7b-style", 2, 2, False),
}


class Engine:
    """The real core over the ranks that `settings` ask for; requests come from `generate`."""

    def __init__(self, source: ModelSource, **settings: Any) -> None:
        shape = {
            name: getattr(ENGINE, name) for name in ("max_requests", "max_model_tokens", "block_tokens", "kv_blocks")
        }
        bounds = {"min_budget_tokens": 1, "max_budget_tokens": 256, "tile_tokens": 4}
        self.runner, self.config = load_runner(source, EngineConfig(**shape | bounds | settings), time.monotonic_ns)
        self.link = MemoryLink()

    def generate(self, next_knobs: NextKnobs, sampling: SamplingParams = GREEDY) -> list[list[int]]:
        random = np.random.default_rng(3)
        tokens: list[TokenOutput] = []
        core = EngineCore(
            *("e", self.config, Scheduler(self.config), self.runner, self.link, time.monotonic_ns, tokens.extend)
        )
        for i, prompt in enumerate(PROMPTS):
            core.scheduler.submit(Submit(str(i), prompt, sampling), 0)
        sequence = 0
        while core.scheduler.has_work:
            sequence += 1
            self.link.inbox = Knobs(VERSION, "e", sequence, sequence - 1, *next_knobs(random))
            core.step()
            core.scheduler.check()
        core.idle()
        outputs: list[list[int]] = [[] for _ in PROMPTS]
        for token in tokens:
            outputs[int(token.request_id)].append(token.token_id)
        return outputs

    def completions(self) -> list[Completion]:
        return [completion for telemetry in self.link.published for completion in telemetry.completed]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Folder of each checkpoint, and what transformers says to the prompts."""
    made = {}
    for name in {family for family, *_ in LAYOUTS.values()}:
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, expected_outputs(write_checkpoint(name, folder))
    return made


@pytest.fixture(scope="module", params=LAYOUTS)
def split(
    request: pytest.FixtureRequest, families: dict[str, tuple[Path, list[list[int]]]]
) -> Iterator[tuple[Engine, Path, list[list[int]]]]:
    family, tensor, stages, look_ahead = LAYOUTS[request.param]
    folder, expected = families[family]
    engine = Engine(ModelSource(folder), tensor_parallel=tensor, pipeline_parallel=stages, look_ahead=look_ahead)
    yield engine, folder, expected
    engine.runner.close()


def test_greedy_tokens_are_those_of_transformers(split: tuple[Engine, Path, list[list[int]]]) -> None:
    engine, _, expected = split
    assert engine.generate(WHOLE) == expected
    assert engine.generate(RANDOM) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2), (2, 2)], ids=["tp2", "pp2", "tp2 x pp2"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_several_gpus_give_the_greedy_tokens_of_transformers(
    name: str, tensor: int, stages: int, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < tensor * stages:
        pytest.skip(f"needs {tensor * stages} GPUs")
    expected = expected_outputs(write_checkpoint(name, tmp_path))
    source = ModelSource(tmp_path, device="cuda")
    engine = Engine(source, tensor_parallel=tensor, pipeline_parallel=stages, look_ahead=True)
    try:
        assert engine.generate(WHOLE) == expected
        assert engine.generate(RANDOM) == expected
    finally:
        engine.runner.close()


def test_drawn_tokens_are_those_of_one_process(split: tuple[Engine, Path, list[list[int]]]) -> None:
    engine, folder, expected = split
    drawn = engine.generate(RANDOM, DRAWN)
    assert drawn == Engine(ModelSource(folder)).generate(WHOLE, DRAWN)
    assert drawn != expected


def test_as_many_iterations_are_in_flight_as_the_depth_allows(split: tuple[Engine, Path, list[list[int]]]) -> None:
    engine, _, _ = split
    engine.link.published.clear()
    engine.generate(WHOLE)
    told = [completion.stages for completion in engine.completions()]
    assert {len(stages) for stages in told} == {engine.config.pipeline_parallel}
    assert max(stages[0].microbatches_in_flight for stages in told) == engine.config.depth >= 2
    assert all(times.busy_s > 0 and times.bubble_s >= 0 for stages in told for times in stages)


def test_closing_ends_every_process_and_leaves_no_file(split: tuple[Engine, Path, list[list[int]]]) -> None:
    """The last test of each layout."""
    runner = split[0].runner
    assert isinstance(runner, ParallelRunner)
    folder, ranks = Path(runner._folder.name), [psutil.Process(process.pid) for process in runner._ranks]
    assert folder.stat().st_mode & 0o077 == 0
    assert all(rank.is_running() for rank in ranks)
    runner.close()
    assert [process.exitcode for process in runner._ranks] == [0] * len(ranks)
    assert not any(rank.is_running() for rank in ranks)
    assert not folder.exists()
    runner.close()  # once more is no harm


@pytest.fixture(scope="module")
def pipeline() -> Iterator[ParallelRunner]:
    """Two stages of the built-in model, whose steps take a time that goes with their tokens."""
    config = EngineConfig(pipeline_parallel=2, max_model_tokens=512, kv_blocks=64, block_tokens=16)
    runner, _ = load_runner(ModelSource(), config, time.monotonic_ns)
    assert isinstance(runner, ParallelRunner)
    yield runner
    runner.close()


def prefill(n_tokens: int) -> Batch:
    """The first `n_tokens` of a prompt, in the blocks from 0 on."""
    request = Request(Submit("p", [7] * 512, SamplingParams(max_tokens=1)), 0, 0, 0)
    return Batch(
        requests=[request],
        n_decodes=0,
        slots=np.zeros(1, np.int64),
        n_tokens=np.array([n_tokens]),
        context=np.zeros(1, np.int64),
        samples=np.ones(1, np.bool_),
        block_tables=np.arange(32, dtype=np.int32)[None],
    )


def run(runner: ParallelRunner, sizes: list[int]) -> list[StepResult]:
    """Batches of these sizes, two in flight."""
    batches, results, pending = [prefill(size) for size in sizes], list[StepResult](), list[Pending]()
    work_since_ns = time.monotonic_ns()
    for batch in batches:
        batch.work_since_ns = work_since_ns
        pending.append(runner.launch(batch))
        if len(pending) == 2:
            results.append(pending.pop(0).result())
    return [*results, pending.pop().result()]


def test_the_first_microbatch_passes_the_stages_one_after_another(pipeline: ParallelRunner) -> None:
    run(pipeline, [128, 128])
    results = run(pipeline, [128] * 4)
    first, second = results[0].stages
    assert first.bubble_s < 0.3 * first.busy_s
    assert first.bubble_s + first.busy_s <= second.bubble_s < 1.3 * (first.bubble_s + first.busy_s)
    assert [r.device_s for r in results] == [r.stages[0].busy_s + r.stages[1].busy_s for r in results]


@pytest.mark.parametrize("n_requests", [1, 2, 4])
def test_stages_are_busy_or_idle_for_as_long_as_there_is_work(pipeline: ParallelRunner, n_requests: int) -> None:
    """Whether microbatches follow each other or, for one request alone, each waits for the token of the one before."""
    check_times(pipeline, pipeline.config, n_requests)


def test_one_process_is_busy_or_idle_for_as_long_as_there_is_work() -> None:
    runner, config = load_runner(ModelSource(), EngineConfig(max_model_tokens=512, kv_blocks=64), time.monotonic_ns)
    check_times(runner, config, 2)


def check_times(runner: Runner, config: EngineConfig, n_requests: int) -> None:
    """Twice a burst of requests, with a pause between: a stage's times add up to those from burst to its last token."""
    link, worked_s = MemoryLink(), 0.0
    core = EngineCore("e", config, Scheduler(config), runner, link, time.monotonic_ns, lambda tokens: None)
    for burst in range(2):
        time.sleep(0.5)
        began_s = time.monotonic()
        for i in range(n_requests):
            core.scheduler.submit(Submit(f"{burst}.{i}", [1] * 64, SamplingParams(30)), time.monotonic_ns())
        while core.scheduler.has_work:
            core.step()
        worked_s += time.monotonic() - began_s
        core.idle()
    stages = [completion.stages for telemetry in link.published for completion in telemetry.completed]
    told_s = [sum(times[stage].busy_s + times[stage].bubble_s for times in stages) for stage in range(len(stages[0]))]
    drained_s = sum(telemetry.completed[-1].stages[-1].busy_s for telemetry in idle_messages(link))
    assert 0.95 * worked_s < told_s[-1] < worked_s, "the last stage works to the end"
    for early_s in told_s[:-1]:
        assert 0.93 * worked_s < early_s + drained_s < worked_s
    busy_s = [sum(times[stage].busy_s for times in stages) for stage in range(len(stages[0]))]
    if n_requests == 1:
        assert sum(busy_s) < worked_s, "alone, a request is on one stage at a time"


def idle_messages(link: MemoryLink) -> list[Telemetry]:
    return [telemetry for telemetry in link.published if not telemetry.batch.total_tokens]


def test_padding_is_that_of_the_graphs_that_the_ranks_have(
    pipeline: ParallelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipeline.launch(prefill(40))
    monkeypatch.setattr(pipeline, "_sizes", PaddedSizes(graph_shapes(64, 128, 512, mixed=True)))
    padded = pipeline.launch(prefill(40))
    assert (plain.padding_tokens, padded.padding_tokens) == (0, 24)
    assert plain.result().token_ids == padded.result().token_ids


def test_bubbles_grow_when_microbatches_differ_in_length(pipeline: ParallelRunner) -> None:
    def bubble_share(sizes: list[int]) -> float:
        stages = [times for result in run(pipeline, sizes)[1:] for times in result.stages]
        bubble_s = sum(times.bubble_s for times in stages)
        return bubble_s / (bubble_s + sum(times.busy_s for times in stages))

    bubble_share([256, 16])
    assert bubble_share([256, 16] * 4) > bubble_share([136] * 8) + 0.1


def test_an_engine_hears_of_a_killed_rank_and_ends_the_others(pipeline: ParallelRunner) -> None:
    """The last test of the pipeline."""
    pending = pipeline.launch(prefill(256))
    pid = pipeline._ranks[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^rank 1 \(stage 1, tensor rank 0\) died with exit status -9$"):
        pending.result()
        pipeline.launch(prefill(16)).result()
    assert not any(process.is_alive() for process in pipeline._ranks)
    assert not multiprocessing.active_children()
    pipeline.close()


def test_an_engine_hears_what_went_wrong_in_a_step() -> None:
    runner = ParallelRunner(
        ModelSource(), EngineConfig(kv_blocks=64, block_tokens=16, max_model_tokens=512), time.monotonic_ns
    )
    batch = prefill(16)
    batch.requests[0].token_ids[3] = 260  # the first that the model does not know
    with pytest.raises(RuntimeError, match="index out of range"):
        runner.launch(batch).result()
    assert not multiprocessing.active_children()


def test_a_model_that_cannot_be_split_is_refused_with_the_reason(tmp_path: Path) -> None:
    keys = LLAMA_SIZES | {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 66, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=r"^3 attention heads cannot be shared evenly by 2 tensor-parallel ranks"):
        Engine(ModelSource(tmp_path, load_format="dummy"), tensor_parallel=2)
    assert not multiprocessing.active_children()


ORPHANS = """
import sys, time
from engine.config import EngineConfig, ModelSource
from engine.parallel.runner import ParallelRunner

runner = ParallelRunner(ModelSource(), EngineConfig(kv_blocks=256, block_tokens=16), time.monotonic_ns)
print(runner._folder.name, *(process.pid for process in runner._ranks), flush=True)
time.sleep(60)
"""


def test_ranks_end_with_the_engine_that_started_them() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        folder, *pids = engine.stdout.readline().split()
        ranks = [psutil.Process(int(pid)) for pid in pids]
        engine.kill()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    assert not Path(folder).exists()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.flags.writeable and bool(np.array_equal(a, b))
    return bool(a == b)


def test_a_step_arrives_as_it_was_sent() -> None:
    step = even_step(37, 5, block_tokens=4)
    for sent in (
        step,
        StepInput(1, *(np.array([-1], np.int32),) * 3, np.zeros((1, 7), np.int32)[:, ::2], step.n_tokens, None),
    ):
        got = decode_step(encode(sent))
        for name in StepInput.__slots__:
            if name != "drawn" or sent.drawn is None:
                assert same(getattr(got, name), getattr(sent, name)), name
        if sent.drawn is not None:
            assert got.drawn is not None
            assert all(same(getattr(got.drawn, name), getattr(sent.drawn, name)) for name in sent.drawn.__slots__)


def test_a_rank_tells_which_sizes_it_has_graphs_of() -> None:
    ready = Ready(3, EngineConfig(), 100, "sdpa", tuple(graph_shapes(64, 128, 1000, mixed=True)))
    assert decode_from_rank(encode(ready)) == ready
