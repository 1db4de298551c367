"""Predict the step, and give prompts what the TBT SLO leaves them."""

from typing import TYPE_CHECKING, ClassVar

from engine.protocol import Telemetry
from policies.outlook import Outlook, foresee
from policies.policy import Decision

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel


class Predictive:
    """The largest budget whose step, by the step-time model, meets the TBT SLO with a given probability.

        B = max { whole tiles b : Q_q[ time(decodes, their context, b - decodes prompt tokens) ] <= SLO }

    for the batch that the answer acts on (`foresee`): that is one dead time ahead. While nobody decodes, nobody waits
    for a token, and there is no limit.
    """

    RANGES: ClassVar = {"quantile": (0.5, 0.9999)}

    def __init__(self, first: Telemetry, tbt_slo_s: float, step_time: "StepTimeModel", quantile: float = 0.99) -> None:
        self._tbt_slo_s = tbt_slo_s
        self._step_time = step_time
        self._quantile = quantile
        self._factors = step_time.factor(quantile, False), step_time.factor(quantile, True)

    def decide(self, telemetry: Telemetry) -> Decision:
        if any(len(completion.stages) > 1 for completion in telemetry.completed):
            raise NotImplementedError("predictive does not model pipeline stages yet: choose pid or aimd")
        outlook, bounds = foresee(telemetry), telemetry.bounds
        if outlook.decodes == 0:
            budget = bounds.max_budget_tokens
            return Decision(budget, budget, "predictive: nobody decodes, no limit")
        fits, beyond = 0, bounds.max_budget_tokens // bounds.tile_tokens + 1  # tiles; the answer is in [fits, beyond)
        while beyond - fits > 1:
            tiles = (fits + beyond) // 2
            if self._step_s(tiles * bounds.tile_tokens, outlook) <= self._tbt_slo_s:
                fits = tiles
            else:
                beyond = tiles
        budget = max(fits * bounds.tile_tokens, bounds.min_budget_tokens)
        step_s = self._step_s(budget, outlook)
        reason = f"predictive: {step_s * 1e3:.1f} ms at quantile {self._quantile:g} for {self._tbt_slo_s * 1e3:.0f}"
        return Decision(budget, budget, reason)

    def track(self, sent: Decision) -> None:
        pass

    def _step_s(self, budget: int, outlook: Outlook) -> float:
        tokens = max(budget - outlook.decodes, 0)
        requests, attention = outlook.prefill(tokens)
        mean_s = self._step_time.mean_s(outlook.decodes, outlook.decode_context_tokens, requests, tokens, attention)
        return self._factors[tokens > 0] * mean_s
