"""Rules of other systems that watch the queue, the lengths or the KV cache, but no latency.

Each is its authors' law, with their constants as defaults; the parameters are those one would set anew for another
machine. None takes a promise, so their knobs act at once. A cap on prompt tokens alone becomes a budget by adding the
decodes, which every batch holds.
"""

import math
from collections import deque
from typing import ClassVar

import numpy as np

from engine.protocol import Telemetry
from envs.outlook import foresee
from policies.policy import Decision


class PPas:
    """Prefill-pressure-aware scheduling (arXiv 2608.15171; TimoSaemann/ppas-vllm, scheduler/ppas_vllm_0.22.1.patch).

        prompt tokens <= cap       if 2 or more prompts are under way or wait, and someone decodes
        all tokens    <= largest   otherwise

    `cap` and `largest` are the paper's B_cap and B_max; its authors set another cap for each model.
    """

    RANGES: ClassVar = {"cap": (1, 2**20), "largest": (1, 2**20)}
    PROMPTS = 2  # N_th

    def __init__(self, first: Telemetry, cap: int = 2048, largest: int = 16384) -> None:
        self._cap = cap
        self._largest = largest

    def decide(self, telemetry: Telemetry) -> Decision:
        outlook = foresee(telemetry)
        if outlook.n_prompts >= self.PROMPTS and outlook.decodes > 0:
            budget = min(self._cap + outlook.decodes, self._largest)
            return Decision(budget, self._cap, f"ppas pressure: {outlook.n_prompts} prompts, {outlook.decodes} decodes")
        return Decision(self._largest, self._largest, "ppas no pressure")

    def track(self, sent: Decision) -> None:
        pass


class TrtllmTuner:
    """TensorRT-LLM's DynamicBatchTuner (cpp/tensorrt_llm/executor: dynamicBatchTuner.cpp, executorImpl.cpp).

    With ISL and OSL the mean lengths of the last `window` finished requests, and C = KV tokens / (ISL + OSL):

        B = min(max_requests, C rounded by their table)
        n = B ISL / OSL + B
        T = max(2^ceil(log2 n), 8192 if ISL/OSL > 2, 4096 if > 0.5, else 2048)

    T is the budget; B itself they also make the limit on running requests, which is no knob here. KV is counted in
    tokens where they count blocks. Until a request has finished, the knobs found in force are kept.
    """

    RANGES: ClassVar = {"window": (1, 10_000)}
    BATCH_SIZES = ((144, 128), (336, 256), (672, 512), (832, 768), (1280, 1024), (1664, 1536))  # (capacity below, size)

    def __init__(self, first: Telemetry, window: int = 128) -> None:
        self._lengths: deque[tuple[int, int]] = deque(maxlen=window)
        self._prompt_tokens = self._output_tokens = 0  # sums over `_lengths`
        self._decision = Decision(first.knobs.budget_tokens, first.knobs.budget_tokens, "trtllm: nothing finished yet")

    def decide(self, telemetry: Telemetry) -> Decision:
        news = [finished for completion in telemetry.completed for finished in completion.finished]
        for finished in news:
            self._finish(finished.prompt_tokens, finished.output_tokens)
        if self._output_tokens > 0:
            bounds, length = telemetry.bounds, (self._prompt_tokens + self._output_tokens) / len(self._lengths)
            requests = min(self.batch_size(int(bounds.kv_tokens / length)), bounds.max_requests)
            ratio = self._prompt_tokens / self._output_tokens
            budget = self.max_num_tokens(requests, ratio)
            self._decision = Decision(budget, budget, f"trtllm: {requests} requests, prompt/output {ratio:.2f}")
        return self._decision

    def track(self, sent: Decision) -> None:
        pass

    def _finish(self, prompt_tokens: int, output_tokens: int) -> None:
        if len(self._lengths) == self._lengths.maxlen:
            oldest = self._lengths[0]
            self._prompt_tokens -= oldest[0]
            self._output_tokens -= oldest[1]
        self._lengths.append((prompt_tokens, output_tokens))
        self._prompt_tokens += prompt_tokens
        self._output_tokens += output_tokens

    @classmethod
    def batch_size(cls, capacity: int) -> int:
        """Their table; above it whole 512s if `capacity` is less than 128 beyond, else `capacity` itself."""
        for below, size in cls.BATCH_SIZES:
            if capacity < below:
                return size
        whole = capacity // 512 * 512
        return whole if capacity < whole + 128 else capacity

    @staticmethod
    def max_num_tokens(requests: int, prompt_per_output: float) -> int:
        """Tokens of an iteration in which `requests` run, prompts and outputs fully overlapped; a power of 2."""
        tokens = max(int(requests * prompt_per_output + requests), 1)
        least = 8192 if prompt_per_output > 2.0 else 4096 if prompt_per_output > 0.5 else 2048
        return max(1 << (tokens - 1).bit_length(), least)


class GllmThrottle:
    """gLLM's token throttling of prompts (SC'25, arXiv 2504.14775; gty111/gLLM, gllm/pp_scheduler.py and scheduler.py).

        P = min( maxp max(0, (f - threshold) / (1 - threshold)),     f: free share of the KV cache
                 free KV tokens above the threshold,
                 max(prompt tokens due // iterp, minp) )             the last one only if more than one prompt is due

    The budget is P and the decodes. They use the first and the last term only with several stages or ranks; here they
    always act, since that is the method. Not theirs: they also spread the decodes over the microbatches of a pipeline,
    which no knob does here; and the threshold is the paper's constant, where newer code reserves for each output what
    it may still take.
    """

    RANGES: ClassVar = {
        "maxp": (1, 2**20),
        "minp": (1, 2**20),
        "iterp": (1, 1000),
        "threshold": (0.0, 0.9),
    }

    def __init__(
        self, first: Telemetry, maxp: int = 2048, minp: int = 32, iterp: int = 8, threshold: float = 0.05
    ) -> None:
        self._maxp, self._minp, self._iterp = maxp, minp, iterp
        self._threshold = threshold

    def decide(self, telemetry: Telemetry) -> Decision:
        outlook = foresee(telemetry)
        free_share = max(1.0 - telemetry.kv_usage - self._threshold, 0.0)
        tokens = round(self._maxp * free_share / (1.0 - self._threshold))
        tokens = min(tokens, int(free_share * telemetry.bounds.kv_tokens))
        due = outlook.prompt_tokens
        if outlook.n_prompts > 1:
            tokens = min(tokens, max(due // self._iterp, self._minp))
        reason = f"gllm: {tokens} prompt tokens, {due} due, {telemetry.kv_usage:.0%} of KV used"
        return Decision(tokens + outlook.decodes, max(tokens, 1), reason)

    def track(self, sent: Decision) -> None:
        pass


class SarathiDynamic:
    """Sarathi-Serve's dynamic chunking schedule (sarathi/core/scheduler/sarathi_scheduler.py, off by default there).

        sizes = linspace(low, high, stages) from high to low, rounded to 32
        size  = sizes[prompt tokens done // ceil(max_tokens / stages)]

    `size` is the whole budget, as in their code. Chunks shrink as a prompt's context grows, whatever the load: open
    loop. Their code has no default sizes; here they are the paper's two budgets, over its longest sharegpt request.
    Not theirs: one budget for all, by the stage of the prompt that is served first; and a prompt beyond `max_tokens`
    stays at `low`, where theirs stops the engine.
    """

    RANGES: ClassVar = {"low": (32, 2**20), "high": (32, 2**20), "max_tokens": (1, 2**24), "stages": (1, 1000)}

    def __init__(
        self, first: Telemetry, low: int = 512, high: int = 2048, max_tokens: int = 8192, stages: int = 4
    ) -> None:
        sizes = np.linspace(low, high, stages, dtype=np.int32)[::-1]
        self._sizes: list[int] = (np.round(sizes / 32) * 32).astype(np.int64).tolist()
        self._tokens_per_stage = math.ceil(max_tokens / stages)

    def decide(self, telemetry: Telemetry) -> Decision:
        done = foresee(telemetry).head_context_tokens
        stage = min(done // self._tokens_per_stage, len(self._sizes) - 1)
        size = self._sizes[stage]
        return Decision(size, size, f"sarathi-dynamic: stage {stage}, {done} prompt tokens done")

    def track(self, sent: Decision) -> None:
        pass
