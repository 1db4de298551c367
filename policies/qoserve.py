"""QoServe: spend the slack that requests have against their own deadlines."""

import math
from typing import TYPE_CHECKING, ClassVar

from engine.protocol import Telemetry
from envs.outlook import Outlook, foresee
from policies.policy import Decision
from policies.slack import Slacks

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel


class QoServe:
    """Dynamic chunking of QoServe, formerly Niyama (ASPLOS'26, arXiv 2503.22562).

    From microsoft/sarathi-serve, branch niyama_asplos2026, sarathi/core: scheduler/deadline_scheduler.py
    `_get_prefill_size_by_slack` and datatypes/sequence.py `_get_TBT_deadline`.

        slack = min over decodes of (deadline of the next token - now)
        T     = the largest of {128, 256, 512, ..., 2048, 2552} with margin * predicted time <= slack
        T     = 128 if slack <= 0;  at most 512 while free KV tokens / 32 < 1000

    Slack accumulates over a request, so this keeps promises of the `deadline` kind, not every single gap. A token is
    due one gap later than `Slacks` and the promise have it: their count of tokens has the first in it. `largest` ends
    the row of totals early, or carries it on in steps of 256.

    The predictor is our step-time model: theirs are two linear regressions in the source, for Llama-3-8B on an A100,
    and they train it anew for each model and machine. Not theirs: they choose when the batch is formed, so time and
    deadlines are carried over the dead time with the model; and a prompt that ends in between has a deadline only when
    its first token is reported. Their order of prompts (priorities,
    relegation) is not a knob. It runs as published.
    """

    AS_PUBLISHED: ClassVar = True
    RANGES: ClassVar = {"margin": (1.0, 10.0), "largest": (128, 2**20)}
    TOTALS = (128, *range(256, 2049, 256), 2552)
    LOW_MEMORY_TOTALS = (128, 256, 384, 512)
    LOW_MEMORY_TOKENS = 32 * 1000

    def __init__(
        self,
        first: Telemetry,
        tbt_slo_s: float,
        step_time: "StepTimeModel",
        ttft_slo_s: float = 6.0,
        margin: float = 1.2,
        largest: int = TOTALS[-1],
    ) -> None:
        self._tbt_slo_s = tbt_slo_s
        self._step_time = step_time
        self._margin = margin
        further = range(self.TOTALS[-1] + 256, largest + 1, 256)
        self._totals = [total for total in (*self.TOTALS, *further) if total <= largest]
        self._slacks = Slacks("deadline", tbt_slo_s, ttft_slo_s)

    def decide(self, telemetry: Telemetry) -> Decision:
        self._slacks.update(telemetry)
        outlook = foresee(telemetry)
        slack_s = self._slack_s(telemetry) if outlook.decodes > 0 else None
        free_tokens = (1.0 - telemetry.kv_usage) * telemetry.bounds.kv_tokens
        low_memory = free_tokens < self.LOW_MEMORY_TOKENS
        totals = self.LOW_MEMORY_TOTALS if low_memory else self._totals
        memory = ", low memory" if low_memory else ""
        if slack_s is None:
            return Decision(totals[-1], totals[-1], f"qoserve: no deadline ahead{memory}")
        fits, beyond = 0, len(totals)  # the first is taken, whether it fits or not
        while slack_s > 0 and beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self._margin * self._predict_s(totals[middle], outlook) <= slack_s:
                fits = middle
            else:
                beyond = middle
        return Decision(totals[fits], totals[fits], f"qoserve: slack {slack_s * 1e3:.0f} ms{memory}")

    def track(self, sent: Decision) -> None:
        pass

    def _slack_s(self, telemetry: Telemetry) -> float | None:
        """The least slack when the batch we decide on is formed; None before any deadline of its decodes is known."""
        batch, steps = telemetry.batch, telemetry.dead_time_iterations
        least_s = self._slacks.least_s(telemetry.scheduled_ns, steps)
        if math.isinf(least_s):  # they have just begun, or we have
            return self._tbt_slo_s if batch.decode_tokens > 0 else None
        step_s = self._step_time.mean_s(*batch.load)
        return least_s + self._tbt_slo_s + steps * (self._tbt_slo_s - step_s)

    def _predict_s(self, total: int, outlook: Outlook) -> float:
        """As theirs, all prompt tokens are taken to be at the context of the first prompt."""
        tokens = max(total - outlook.decodes, 0)
        attention = tokens * (outlook.head_context_tokens + 0.5 * tokens)
        return self._step_time.mean_s(outlook.decodes, outlook.decode_context_tokens, min(tokens, 1), tokens, attention)
