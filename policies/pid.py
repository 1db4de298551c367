"""PID: hold the windowed P99 TBT at a set point below the SLO."""

import math
from bisect import bisect_left, insort
from collections import deque
from typing import ClassVar

from engine.protocol import Telemetry
from policies.policy import Decision, Iteration, IterationLog


class Pid:
    """Velocity-form PID on the logarithm of the token budget.

        b_i = T_i * r / y_i          the budget at which iteration i (T_i tokens, TBT y_i) would have met r
        B*  = quantile of b_i over the window, 1 % for a promise of P99, weighted by decode tokens
        e   = ln(B* / B)             B the budget sent last; equals ln(r / P99 of the TBTs referred to B)
        dlnB = kp (e - e') + ki e + kd (e - 2 e' + e'')

    with r = set_point * SLO. Referring each TBT to the budget of now (time proportional to tokens) keeps the window
    from making the loop chase its own past, and makes the loop gain 1 whatever the machine (Astrom and Hagglund, PID
    Controllers, 1995, for the velocity form: bumpless, and clamping is anti-windup).

    Only iterations that tell something about the budget enter the window: those with prefill tokens that spent at
    least half of their budget, or that missed the set point. Without any new one the budget is held.
    """

    RANGES: ClassVar = {
        "set_point": (0.1, 1.0),
        "kp": (0.0, 2.0),
        "ki": (0.0, 1.0),
        "kd": (0.0, 1.0),
        "window": (1, 10_000),
    }

    def __init__(
        self,
        first: Telemetry,
        tbt_slo_s: float,
        set_point: float = 0.9,
        kp: float = 0.2,
        ki: float = 0.5,
        kd: float = 0.0,
        window: int = 128,
        quantile: float = 0.99,
    ) -> None:
        self._reference_s = set_point * tbt_slo_s
        self._late_share = 1.0 - quantile
        self._kp, self._ki, self._kd = kp, ki, kd
        self._log = IterationLog()
        self._window = WeightedWindow(window)  # of ln b_i, weighted by decode tokens
        self._log_budget = math.log(first.knobs.budget_tokens)
        self._errors: tuple[float, float] | None = None  # e', e''

    def decide(self, telemetry: Telemetry) -> Decision:
        news = [it for it in self._log.completed(telemetry) if self._tells(it)]
        if not news:
            return self._decision("hold: no batch spent the budget")
        for iteration in news:
            assert iteration.tbt_s is not None
            allowed = math.log(iteration.batch.total_tokens * self._reference_s / iteration.tbt_s)
            self._window.push(allowed, len(iteration.measured.tbt_s))
        error = self._window.low_quantile(self._late_share) - self._log_budget
        last, before = self._errors or (error, error)
        self._log_budget += self._kp * (error - last) + self._ki * error + self._kd * (error - 2.0 * last + before)
        self._errors = (error, last)
        referred_s = self._reference_s * math.exp(-error)
        return self._decision(f"P99 TBT {referred_s * 1e3:.0f} ms for {self._reference_s * 1e3:.0f}")

    def track(self, sent: Decision) -> None:
        self._log_budget = math.log(sent.budget_tokens)

    def _tells(self, iteration: Iteration) -> bool:
        batch, knobs, _, tbt_s = iteration
        if tbt_s is None or batch.prefill_tokens == 0:
            return False
        return batch.total_tokens >= 0.5 * knobs.budget_tokens or tbt_s > self._reference_s

    def _decision(self, reason: str) -> Decision:
        budget = round(math.exp(self._log_budget))
        return Decision(budget, budget, f"pid {reason}")


class WeightedWindow:
    """The last `size` values with their weights, kept sorted, so that a low quantile is a few steps away."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._arrived: deque[tuple[float, int]] = deque()
        self._sorted: list[tuple[float, int]] = []
        self._total = 0

    def push(self, value: float, weight: int) -> None:
        if len(self._arrived) == self._size:
            oldest = self._arrived.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
            self._total -= oldest[1]
        self._arrived.append((value, weight))
        insort(self._sorted, (value, weight))
        self._total += weight

    def low_quantile(self, share: float) -> float:
        """The smallest value with more than `share` of the weight at or below it. Raises IndexError when empty."""
        rest = share * self._total
        for value, weight in self._sorted:
            rest -= weight
            if rest < 0:
                return value
        return self._sorted[-1][0]
