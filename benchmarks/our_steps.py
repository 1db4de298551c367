"""This engine's side of `benchmarks.gpu_steps`: the real core and scheduler, the model runner in this process.

python -m benchmarks.our_steps --cells CELLS.json --out OURS.json [--model FOLDER --device cuda]
"""

import gc
import time
from collections.abc import Iterator

import torch

from benchmarks.model_folder import versions
from benchmarks.step_cells import FILL_BUDGET, Step, clear_while, run_side, side_arguments
from engine.config import EngineConfig, ModelSource
from engine.core import EngineCore, Runner
from engine.link import MemoryLink
from engine.loader import load_runner
from engine.protocol import VERSION, BatchComposition, Completion, Knobs, Telemetry
from engine.request import Abort, SamplingParams, Submit
from engine.scheduler import Scheduler

ENGINE_ID = "steps"


class TelemetrySteps:
    """Joins what telemetry tells of launches with what it tells of completions."""

    def __init__(self) -> None:
        self._launched: dict[int, BatchComposition] = {}

    def take(self, telemetry: Telemetry) -> Iterator[Step]:
        for completion in telemetry.completed:
            yield _step(self._launched.pop(completion.iteration), completion)
        if telemetry.batch.total_tokens:
            self._launched[telemetry.iteration] = telemetry.batch


class Ours:
    """An engine core that is told what to do in this process, without sockets."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self._link = MemoryLink()
        self._scheduler = Scheduler(config)
        self._core = EngineCore(
            *(ENGINE_ID, config, self._scheduler, runner, self._link, time.monotonic_ns, lambda tokens: None)
        )
        self._steps = TelemetrySteps()
        self._ids: list[str] = []
        self._submitted = self._budget = 0
        self._decisions = 0

    def submit(self, prompt_tokens: int, max_tokens: int) -> None:
        self._submitted += 1
        self._ids.append(str(self._submitted))
        submit = Submit(self._ids[-1], [7] * prompt_tokens, SamplingParams(max_tokens))
        self._scheduler.submit(submit, time.monotonic_ns())

    def advance(self, budget_tokens: int) -> list[Step]:
        if budget_tokens != self._budget:
            self._decisions += 1
            self._link.inbox = Knobs(VERSION, ENGINE_ID, self._decisions, 0, budget_tokens, budget_tokens)
            self._budget = budget_tokens
        self._core.step()
        published, self._link.published = self._link.published, []
        return [step for telemetry in published for step in self._steps.take(telemetry)]

    def clear(self) -> None:
        for request_id in self._ids:
            self._scheduler.abort(Abort(request_id))
        self._ids.clear()
        clear_while(lambda: self._scheduler.has_work, lambda: self.advance(FILL_BUDGET))
        self._core.idle()  # the last measurements get out, so that they are not taken for the next cell's
        self._link.published = []
        self._steps = TelemetrySteps()


def _step(batch: BatchComposition, completion: Completion) -> Step:
    return Step(
        batch.decode_tokens,
        batch.decode_context_tokens,
        batch.prefill_chunk_tokens,
        batch.prefill_context_tokens,
        completion.completed_ns * 1e-9,
        completion.device_s,
        completion.stages[0].bubble_s,
    )


def main() -> None:
    parser = side_arguments(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--max-requests", type=int, default=256)
    parser.add_argument("--kv-blocks", type=int, default=0)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    config = EngineConfig(
        name=ENGINE_ID,
        budget_tokens=8192,
        chunk_tokens=8192,
        max_budget_tokens=8192,
        max_requests=args.max_requests,
        max_model_tokens=args.max_model_len,
        block_tokens=0,
        kv_blocks=args.kv_blocks,
        look_ahead=cuda,
        knobs_ttl_s=3600.0,
    )
    source = ModelSource(
        folder=args.model,
        load_format="dummy",
        dtype="bfloat16" if cuda else "float32",
        device=args.device,
        attention=args.attention,
        memory_utilization=args.memory,
    )
    begun_s = time.perf_counter()
    runner, config = load_runner(source, config, time.monotonic_ns)
    print(
        f"loaded in {time.perf_counter() - begun_s:.0f} s, {config.kv_blocks * config.block_tokens} KV tokens",
        flush=True,
    )
    gc.collect()
    gc.freeze()  # as the engine's process does
    about = {
        "engine": "pacer",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "attention": runner.attention_name,
        "kv_tokens": config.kv_blocks * config.block_tokens,
        "versions": versions("torch", "triton", "flash-attn-4", "flash-attn", "pacer"),
    }
    try:
        run_side(Ours(runner, config), about, args.cells, args.out)
    finally:
        runner.close()


if __name__ == "__main__":
    main()
