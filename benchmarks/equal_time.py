"""Microbatches of equal time: the token budget that fills each up to one length, by the step-time model of a stage.

A pipeline stage idles whenever the microbatch before it on the other stage takes longer than its own. A static budget
makes microbatches of equal tokens, whose times differ by what their prompts have behind them.
"""

from collections import deque

from engine.protocol import Telemetry
from envs.step_time import StepTimeModel
from policies.batch_choice import AS_PROFILED, BatchChooser
from policies.outlook import Outlook, foresee


class StaticBudget:
    """The same budget for every microbatch."""

    def __init__(self, tokens: int) -> None:
        self.name = f"static {tokens}"
        self._tokens = tokens

    def budget(self, telemetry: Telemetry) -> int:
        return self._tokens


class EqualTime:
    """The largest budget whose microbatch takes no longer than `target_s` on the slowest stage, on the mean.

        B = max { whole tiles b : time(decodes, their context, b - decodes prompt tokens) <= target }

    for the microbatch after the one that telemetry reports. Its decodes are taken to be those that had the same turn.
    """

    def __init__(self, step_time: StepTimeModel, target_s: float, stages: int, name: str) -> None:
        self.name = name
        self.target_s = target_s
        self._coefficients = step_time.coefficients
        self._turns: deque[Outlook] = deque(maxlen=stages)

    def budget(self, telemetry: Telemetry) -> int:
        bounds, outlook = telemetry.bounds, foresee(telemetry)
        self._turns.append(outlook)
        turn = self._turns[0]
        outlook = outlook._replace(decodes=turn.decodes, decode_context_tokens=turn.decode_context_tokens)
        chooser = BatchChooser(self._coefficients, bounds.tile_tokens, bounds.max_budget_tokens)
        return max(chooser.choose(outlook, self.target_s, AS_PROFILED, False).budget_tokens, bounds.min_budget_tokens)
