"""Additive increase, multiplicative decrease: back off on a breach, probe when healthy."""

from typing import ClassVar

from engine.protocol import Telemetry
from policies.policy import Decision, IterationLog


class Aimd:
    """The law of TCP's congestion window (Chiu and Jain, 1989) on the token budget.

        breach   (a token of a mixed batch took longer than the SLO):       budget <- backoff * budget
        healthy  (prefills spent the budget, and within `probe_below` SLO): budget <- budget + probe

    After a back-off it waits out the dead time, so that one breach is not punished twice. Iterations that did not
    spend their budget say nothing about it and change nothing.
    """

    RANGES: ClassVar = {"backoff": (0.1, 0.99), "probe": (1, 4096), "probe_below": (0.1, 1.0)}

    def __init__(
        self,
        first: Telemetry,
        tbt_slo_s: float,
        backoff: float = 0.7,
        probe: int = 16,
        probe_below: float = 0.9,
    ) -> None:
        self._tbt_slo_s = tbt_slo_s
        self._backoff = backoff
        self._probe_tokens = probe
        self._probe_below = probe_below
        self._log = IterationLog()
        self._budget = float(first.knobs.budget_tokens)
        self._hold_until_iteration = 0

    def decide(self, telemetry: Telemetry) -> Decision:
        reason = "aimd hold"
        for batch, knobs, measured, worst_s in self._log.completed(telemetry):
            if worst_s is None or batch.prefill_tokens == 0:
                continue
            if worst_s > self._tbt_slo_s and measured.iteration >= self._hold_until_iteration:
                self._budget = self._backoff * min(self._budget, batch.total_tokens)
                self._hold_until_iteration = telemetry.iteration + telemetry.dead_time_iterations
                reason = f"aimd back off: TBT {worst_s * 1e3:.0f} ms"
            elif worst_s < self._probe_below * self._tbt_slo_s and batch.total_tokens >= 0.9 * knobs.budget_tokens:
                self._budget += self._probe_tokens
                reason = f"aimd probe: TBT {worst_s * 1e3:.0f} ms"
        budget = round(self._budget)
        return Decision(budget, budget, reason)

    def track(self, sent: Decision) -> None:
        self._budget = float(sent.budget_tokens)
