"""Microbatches of equal time: the token budget that fills each up to one length, by the step-time model of a stage.

A pipeline stage idles whenever the microbatch before it on the other stage takes longer than its own. A static budget
makes microbatches of equal tokens, whose times differ by what their prompts have behind them.
"""

from collections import deque

from engine.protocol import Telemetry
from envs.batch_choice import AS_PROFILED, BatchChooser
from envs.outlook import Outlook, foresee
from envs.step_time import StepTimeModel
from policies.catalogue import Law
from policies.policy import Decision


class EqualTime:
    """The largest budget whose microbatch takes no longer than `target_s` on the slowest stage, on the mean.

        B = max { whole tiles b : time(decodes, their context, b - decodes prompt tokens) <= target }

    for the microbatch after the one that telemetry reports. Its decodes are taken to be those that had the same turn.
    """

    def __init__(self, step_time: StepTimeModel, target_s: float, stages: int) -> None:
        self._target_s = target_s
        self._coefficients = step_time.coefficients
        self._turns: deque[Outlook] = deque(maxlen=stages)

    def decide(self, telemetry: Telemetry) -> Decision:
        bounds, outlook = telemetry.bounds, foresee(telemetry)
        self._turns.append(outlook)
        turn = self._turns[0]
        outlook = outlook._replace(decodes=turn.decodes, decode_context_tokens=turn.decode_context_tokens)
        chooser = BatchChooser(self._coefficients, bounds.tile_tokens, bounds.max_budget_tokens)
        budget = chooser.choose(outlook, self._target_s, AS_PROFILED, share=False, even=True).budget_tokens
        return Decision(budget, budget, "equal time")

    def track(self, sent: Decision) -> None:
        pass


def equal_time(step_time: StepTimeModel, target_s: float, stages: int) -> Law:
    """The law `EqualTime`, which promises nothing: no guard limits how fast its budget rises."""
    name = f"equal {target_s * 1e3:.1f} ms"
    return Law(name, None, lambda first: EqualTime(step_time, target_s, stages))
