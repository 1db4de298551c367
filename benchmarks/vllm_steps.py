"""vLLM's side of `benchmarks.gpu_steps`: its engine core in this process, as it is by default, told what to form.

    PYTHONPATH=SITE:. VLLM_ENABLE_V1_MULTIPROCESSING=0 python -m benchmarks.vllm_steps --cells .. --out .. --model ..

The core's own loop is called, with its batch queue: one step runs ahead of the results (async scheduling), decode-only
steps are CUDA graphs. What lies outside (detokenizing, clients) is another process when it serves, and is left out. The
token budget is set, and batches are noted, in a subclass of its scheduler; events are recorded on the stream before and
after the model runner's work for a step. Written for vLLM 0.24.
"""

import gc
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.llm_engine import LLMEngine

from benchmarks.model_folder import versions
from benchmarks.step_cells import FILL_BUDGET, Step, clear_while, run_side, side_arguments


@dataclass(slots=True)
class Scheduled:
    """A batch on its way from the scheduler to its results."""

    decodes: int = 0
    decode_context_tokens: int = 0
    chunks: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    begin: Any = None
    end: Any = None
    completed_s: float = 0.0

    def step(self) -> Step:
        self.end.synchronize()  # recorded behind what the results waited for: a moment
        return Step(
            self.decodes,
            self.decode_context_tokens,
            tuple(self.chunks),
            tuple(self.contexts),
            self.completed_s,
            self.begin.elapsed_time(self.end) * 1e-3,
        )


class Watch:
    """What the scheduler and the model runner note, in order; all of it in one process."""

    budget: ClassVar[int] = FILL_BUDGET
    scheduled: ClassVar[deque[Scheduled]] = deque()  # whose work has not been launched
    launched: ClassVar[deque[Scheduled]] = deque()  # whose results have not come
    completed: ClassVar[deque[Scheduled]] = deque()


class WatchedScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM is not here when this is checked
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.max_num_scheduled_tokens = Watch.budget  # read once in every call
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            batch = Scheduled()
            for request_id, tokens in output.num_scheduled_tokens.items():
                request = self.requests[request_id]
                context = request.num_computed_tokens - tokens  # which scheduling has moved on
                if context >= request.num_prompt_tokens:
                    batch.decodes += 1
                    batch.decode_context_tokens += context
                else:
                    batch.chunks.append(tokens)
                    batch.contexts.append(context)
            Watch.scheduled.append(batch)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            batch = Watch.launched.popleft()
            batch.completed_s = time.monotonic()
            Watch.completed.append(batch)
        return super().update_from_output(scheduler_output, *args, **kwargs)


def watch_runner(runner: Any) -> None:
    """Record an event before a batch's work and one after it."""
    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

    def execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            Watch.scheduled[0].begin = _event()
        return execute_model(scheduler_output, *args, **kwargs)

    def sample(*args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(*args, **kwargs)
        batch = Watch.scheduled.popleft()
        batch.end = _event()
        Watch.launched.append(batch)
        return output

    runner.execute_model, runner.sample_tokens = execute, sample


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Theirs:
    """vLLM's engine core, stepped from here."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self.core = engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        watch_runner(self.runner)
        self._ids: list[str] = []
        self._submitted = 0

    def submit(self, prompt_tokens: int, max_tokens: int) -> None:
        self._submitted += 1
        self._ids.append(str(self._submitted))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(self._ids[-1], {"prompt_token_ids": [7] * prompt_tokens}, params)

    def advance(self, budget_tokens: int) -> list[Step]:
        Watch.budget = budget_tokens
        _, executed = self.core.step_fn()
        self.core.post_step(executed)
        steps = [batch.step() for batch in Watch.completed]
        Watch.completed.clear()
        return steps

    def clear(self) -> None:
        self._engine.abort_request(self._ids)
        self._ids.clear()
        clear_while(
            lambda: self.core.scheduler.has_requests() or bool(self.core.batch_queue), lambda: self.advance(FILL_BUDGET)
        )

    def about(self) -> dict[str, Any]:
        cache, attention = self.core.vllm_config.cache_config, "unknown"
        with suppress(Exception):  # its name lies in other places in other versions
            attention = self.runner.attn_groups[0][0].backend.get_name()
        return {
            "engine": "vllm",
            "attention": attention,
            "runner": type(self.runner).__module__,
            "async_scheduling": bool(self.core.batch_queue is not None),
            "kv_tokens": cache.num_gpu_blocks * cache.block_size,
            "versions": versions("vllm", "torch", "triton"),
        }


def main() -> None:
    args = side_arguments(__doc__ or "").parse_args()
    begun_s = time.perf_counter()
    engine_args = EngineArgs(
        model=str(args.model),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        enable_prefix_caching=False,  # every prompt is its own
        max_num_seqs=256,
        max_num_batched_tokens=FILL_BUDGET,
        max_model_len=args.max_model_len,
        gpu_memory_utilization=args.memory,
        scheduler_cls=WatchedScheduler,
        disable_log_stats=True,
        seed=0,
    )
    theirs = Theirs(LLMEngine.from_engine_args(engine_args))
    about = theirs.about()
    print(f"loaded in {time.perf_counter() - begun_s:.0f} s: {about}", flush=True)
    gc.collect()
    gc.freeze()  # as its engine process does
    run_side(theirs, about, args.cells, args.out)


if __name__ == "__main__":
    main()
