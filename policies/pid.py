"""PID: hold the windowed P99 TBT at a set point below the SLO, around what a step-time model allows."""

import math
from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING, ClassVar

from engine.protocol import Telemetry
from policies.cost import StepCosts, TokenCosts
from policies.policy import Decision, Iteration, IterationLog

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

BLIND = 0.92  # of the set point, where no model tells how one batch differs from another
MOST_SENT = 64  # decisions remembered: far more than any dead time


class Pid:
    """PID on the logarithm of what a batch may cost: seconds by the step-time model or, without one, tokens.

        l_i = c_i r / y_i            the cost at which iteration i, of cost c_i and TBT y_i, would have met r
        L*  = quantile of l_i over the window, 1 % for a promise of P99, weighted by decode tokens
        e   = ln(L* / L)             = ln(r / P99 of the TBTs referred to L)
        dlnL = ki e + kp d(ln L*) + kd d(d(ln L*))
        budget = the largest whose batch is foreseen to cost L

    with r = set_point * SLO: the model's own budget is that of L = r, and L / r is what feedback makes of it. The model
    may be wrong, in all or in parts, and follows the machine (`StepCosts`); without one, time counts as proportional to
    tokens. c_i is what the batch cost, or what it was foreseen to cost where that is less, so that the loop answers for
    errors of foresight too. Where the machine has become slower since, it is careful until the window has passed.

    Referring each TBT to the limit of now keeps the window from making the loop chase its own past, and makes the loop
    gain 1 whatever the machine and the dead time. P and D act on the measurement, and the form is that of velocity
    (Astrom and Hagglund, PID Controllers, 1995): taking over is bumpless, as L begins at the cost of the budget in
    force, and its difference from the model's own decays by the factor 1 - ki with each decision. Nothing winds up, as
    e is measured against L itself; besides, a limit in tokens tracks what bounds have made of it.

    Only iterations that tell something about the budget enter the window: those with prefill tokens that spent at least
    half of their budget, or that missed the set point. Without a new one the window, and with it L*, is held.
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
        step_time: "StepTimeModel | None" = None,
        set_point: float = 0.98,
        kp: float = 0.5,
        ki: float = 0.5,
        kd: float = 0.0,
        window: int = 128,
        quantile: float = 0.99,
    ) -> None:
        if first.schedule != "stall-free":  # the next batch is foreseen for that one only
            step_time = None
        self._reference_s = set_point * tbt_slo_s * (BLIND if step_time is None else 1.0)
        self._late_share = 1.0 - quantile
        self._kp, self._ki, self._kd = kp, ki, kd
        self._log = IterationLog()
        self._window = WeightedWindow(window)  # of ln l_i, weighted by decode tokens
        self._costs: TokenCosts | StepCosts = TokenCosts()
        if step_time is not None:
            self._costs = StepCosts(step_time, first)
            for factor in self._costs.noise(window):  # as if so many tokens had been seen, and the model held
                self._window.push(math.log(self._reference_s / factor), 1)
        self._log_limit = math.log(self._costs.of_budget(first.knobs.budget_tokens))
        self._measured: tuple[float, float] | None = None  # ln L* at the last two decisions
        self._answered = first.iteration
        self._foreseen: dict[int, float] = {}  # what the budget would cost that was sent in answer to an iteration

    def decide(self, telemetry: Telemetry) -> Decision:
        self._costs.see(telemetry)
        told = []
        for iteration in self._log.completed(telemetry):
            self._costs.learn(iteration.batch, iteration.measured)
            if self._tells(iteration):
                told.append(iteration)
                self._learn(iteration)
        reason = self._correct(bool(told))
        limit = math.exp(self._log_limit)
        budget = self._costs.budget(limit)
        self._answered = telemetry.iteration
        self._remember(budget)
        if self._costs.unlimited:
            return Decision(budget, budget, "pid nobody decodes, no limit")
        return Decision(budget, budget, f"pid {reason}; {self._costs.told(limit)}")

    def track(self, sent: Decision) -> None:
        self._remember(sent.budget_tokens)
        if not self._costs.depends_on_batch:
            self._log_limit = math.log(self._costs.of_budget(sent.budget_tokens))

    def _tells(self, iteration: Iteration) -> bool:
        batch, knobs, _, tbt_s = iteration
        if not tbt_s or batch.prefill_tokens == 0:
            return False
        return batch.total_tokens >= 0.5 * knobs.budget_tokens or tbt_s > self._reference_s

    def _learn(self, iteration: Iteration) -> None:
        batch, knobs, measured, tbt_s = iteration
        assert tbt_s is not None
        cost = self._costs.of(batch)
        if knobs.source == "controller":
            cost = min(cost, self._foreseen.get(knobs.iteration, cost))
        self._window.push(math.log(cost * self._reference_s / tbt_s), len(measured.tbt_s))

    def _correct(self, told: bool) -> str:
        """Move the limit towards what the window allows, once there is an earlier value. Returns why."""
        allowed = self._window.low_quantile(self._late_share)
        if allowed is None:
            return "hold: no batch spent the budget"
        if self._measured is None:
            self._measured = allowed, allowed
            return "taking over"
        error, (last, before) = allowed - self._log_limit, self._measured
        self._log_limit += self._ki * error + self._kp * (allowed - last) + self._kd * (allowed - 2.0 * last + before)
        self._measured = (allowed, last)
        if not told:
            return "hold: no batch spent the budget"
        referred_s = self._reference_s * math.exp(-error)
        return f"P99 TBT {referred_s * 1e3:.1f} ms for {self._reference_s * 1e3:.1f}"

    def _remember(self, budget_tokens: int) -> None:
        self._foreseen[self._answered] = self._costs.of_budget(budget_tokens)
        if len(self._foreseen) > MOST_SENT:
            del self._foreseen[next(iter(self._foreseen))]


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

    def low_quantile(self, share: float) -> float | None:
        """The smallest value with more than `share` of the weight at or below it. None when empty."""
        rest = share * self._total
        for value, weight in self._sorted:
            rest -= weight
            if rest < 0:
                return value
        return self._sorted[-1][0] if self._sorted else None
