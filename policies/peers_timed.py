"""Rules of other systems that size chunks by how long a step takes, without keeping any request's clock.

Theirs measure the machine first, by a profile at start or a table for one device. Here our step-time model stands in.
"""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from engine.protocol import Telemetry
from envs.outlook import foresee
from policies.policy import Decision

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel


class SglangDynamicChunk:
    """SGLang's --enable-dynamic-chunking (python/sglang/srt/managers/scheduler_components/dynamic_chunk_sizer.py).

    A prompt of l tokens alone takes f(l) = a l^2 + b l + c, fitted by least squares to 128 lengths up to 1.25 chunk.
    The next chunk x of a prompt with L tokens done is to take as long as the first one:

        f(L + x) - f(L) = f(chunk) - f(0),   then   chunk + smooth (x - chunk), at least chunk / 4, in whole 64s

    Without a > 0 the chunk stays. As theirs, it was made for pipelines under prompts alone: it keeps no SLO, and
    decodes neither count nor matter, so the budget is the chunk and the decodes. Not theirs: the model stands for
    their profile run, and the limit near the model's context length is left to the engine.
    """

    RANGES: ClassVar = {"chunk": (64, 2**20), "smooth": (0.0, 1.0)}
    ALIGN = 64
    PROFILED = 128
    MAX_PREFILL_TOKENS = 16384  # their --max-prefill-tokens

    def __init__(self, first: Telemetry, step_time: "StepTimeModel", chunk: int = 8192, smooth: float = 0.75) -> None:
        self._chunk = min(chunk, first.bounds.max_budget_tokens)
        self._smooth = smooth
        self._a, self._b = self._fit(step_time)

    def decide(self, telemetry: Telemetry) -> Decision:
        outlook = foresee(telemetry)
        done = outlook.head_context_tokens
        chunk = self.next_chunk(done)
        return Decision(chunk + outlook.decodes, chunk, f"sglang: {chunk} tokens after {done}")

    def track(self, sent: Decision) -> None:
        pass

    def next_chunk(self, done: int) -> int:
        """The chunk of a prompt with `done` tokens computed; a prompt's first chunk is the static one."""
        if done == 0 or self._a <= 0.0:
            return self._chunk
        target = self._a * self._chunk**2 + self._b * self._chunk
        slope = 2.0 * self._a * done + self._b
        solved = (-slope + (slope**2 + 4.0 * self._a * target) ** 0.5) / (2.0 * self._a)
        smoothed = self._chunk + self._smooth * (solved - self._chunk)
        chunk = min(max(int(smoothed), self._chunk // 4), self.MAX_PREFILL_TOKENS)
        return max(chunk // self.ALIGN, 1) * self.ALIGN

    def _fit(self, step_time: "StepTimeModel") -> tuple[float, float]:
        """(a, b) in seconds per token squared and per token."""
        longest = int(1.25 * self._chunk)
        steps = max(longest // self.PROFILED, 1)
        lengths = np.arange(longest, 0, -steps, dtype=np.float64)[1 : self.PROFILED]
        seconds = [step_time.mean_s(0, 0, 1, int(n), 0.5 * n * n) for n in lengths.tolist()]
        design = np.column_stack([lengths**2, lengths, np.ones_like(lengths)])
        a, b, _ = np.linalg.lstsq(design, np.array(seconds), rcond=None)[0].tolist()
        return a, max(b, 0.0)


class AscendDynamicBatch:
    """vllm-ascend's Dynamic Batch (vllm_ascend/core/scheduler_dynamic_batch.py, BudgetRefiner; RFC #3328, PR #3490).

        budget = table[decodes rounded up, their mean context rounded up]:  the largest with cost <= SLO
                 the default (largest) budget without decodes, and where the table has no entry

    Their table was measured on one device (910B3). Ours is computed when first asked for: on a grid of `context_step`
    tokens and `decode_step` requests, in steps of `budget_step`, the cost being the mean time of such a batch with its
    prompt tokens at the start of a prompt. So it knows, as theirs, neither the prompt's context nor the noise. Where no
    budget meets the SLO the table has no entry, and the default rules: that too is theirs. It runs as published.
    """

    AS_PUBLISHED: ClassVar = True
    RANGES: ClassVar = {"context_step": (1, 2**20), "decode_step": (1, 2**20), "budget_step": (1, 2**20)}

    def __init__(
        self,
        first: Telemetry,
        tbt_slo_s: float,
        step_time: "StepTimeModel",
        context_step: int = 256,
        decode_step: int = 8,
        budget_step: int = 64,
    ) -> None:
        self._tbt_slo_s = tbt_slo_s
        self._step_time = step_time
        self._context_step, self._decode_step = context_step, decode_step
        self._default = first.bounds.max_budget_tokens
        self._budgets = range(budget_step, self._default + 1, budget_step)
        self._table: dict[tuple[int, int], int | None] = {}

    def decide(self, telemetry: Telemetry) -> Decision:
        outlook = foresee(telemetry)
        if outlook.decodes == 0:
            return Decision(self._default, self._default, "ascend: nobody decodes, default budget")
        decodes = -(-outlook.decodes // self._decode_step) * self._decode_step
        mean_context = -(-outlook.decode_context_tokens // outlook.decodes)
        context = -(-mean_context // self._context_step) * self._context_step
        if (decodes, context) not in self._table:
            self._table[decodes, context] = self._entry(decodes, context)
        budget = self._table[decodes, context]
        if budget is None:
            return Decision(self._default, self._default, f"ascend: no entry for {decodes} x {context}, default budget")
        return Decision(budget, budget, f"ascend: table of {decodes} decodes at {context} tokens")

    def track(self, sent: Decision) -> None:
        pass

    def _entry(self, decodes: int, context: int) -> int | None:
        def cost(budget: int) -> float:
            tokens = max(budget - decodes, 0)
            return self._step_time.mean_s(decodes, decodes * context, min(tokens, 1), tokens, 0.5 * tokens * tokens)

        # Not by bisection: where a profile tells of single sizes, more tokens can take less time.
        return max((budget for budget in self._budgets if cost(budget) <= self._tbt_slo_s), default=None)
