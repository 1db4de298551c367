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
from checkpoints import ENGINE, LLAMA_SIZES, N_NEW, PROMPTS, expected_outputs, write_checkpoint

from engine.config import EngineConfig, ModelSource
from engine.core import EngineCore
from engine.link import MemoryLink
from engine.loader import load_runner
from engine.parallel.messages import Done, decode_step, encode
from engine.parallel.runner import ParallelRunner, stage_times
from engine.protocol import VERSION, Completion, Knobs, StageTimes
from engine.request import Batch, Request, SamplingParams, StepResult, Submit, TokenOutput
from engine.scheduler import Scheduler
from engine.step_input import StepInput, even_step

NextKnobs = Callable[[np.random.Generator], tuple[int, int]]
WHOLE: NextKnobs = lambda random: (256, 256)  # noqa: E731
RANDOM: NextKnobs = lambda random: tuple(random.integers(1, 257, 2).tolist())  # noqa: E731
GREEDY = SamplingParams(max_tokens=N_NEW)
DRAWN = SamplingParams(max_tokens=N_NEW, temperature=0.9, top_k=20, seed=8)
LAYOUTS = {  # family, tensor ranks, stages, and whether the next iteration is formed before the tokens are known
    "tp2 with look-ahead": ("llama-sharded", 2, 1, True),
    "pp2": ("llama-sharded", 1, 2, False),
    "tp2 x pp2": ("llama-sharded", 2, 2, False),
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
    assert max(stages[0].microbatches_in_flight for stages in told) == engine.config.depth == 2
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
    results, pending = [], [runner.launch(prefill(sizes[0]))]
    for size in sizes[1:]:
        pending.append(runner.launch(prefill(size)))
        results.append(pending.pop(0).result())
    return [*results, pending.pop().result()]


def test_busy_and_bubble_of_a_stage_add_up_to_the_time_since_the_first_batch(pipeline: ParallelRunner) -> None:
    run(pipeline, [128, 128])
    started_s = time.monotonic()
    results = run(pipeline, [128] * 8)
    took_s = time.monotonic() - started_s
    for stage in range(2):
        accounted_s = sum(r.stages[stage].busy_s + r.stages[stage].bubble_s for r in results)
        waits_for_the_rest_s = results[-1].stages[1].busy_s if stage == 0 else 0.0
        assert accounted_s + waits_for_the_rest_s == pytest.approx(took_s, rel=0.15)
    assert results[0].stages[0].bubble_s == 0.0
    assert results[0].stages[1].bubble_s == results[0].stages[0].busy_s
    assert [r.device_s for r in results] == [r.stages[0].busy_s + r.stages[1].busy_s for r in results]


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


def test_stages_wait_for_the_first_microbatch_as_long_as_it_takes_to_reach_them() -> None:
    done = [Done(0, [], 3.0, 100.0), Done(1, [], 4.0, 101.0), Done(2, [9], 5.0, 102.0)]
    assert stage_times(done, 1) == (StageTimes(3.0, 0.0, 1), StageTimes(4.0, 3.0, 1), StageTimes(5.0, 7.0, 1))
    assert stage_times(done, 3) == (StageTimes(3.0, 100.0, 3), StageTimes(4.0, 101.0, 3), StageTimes(5.0, 102.0, 3))
