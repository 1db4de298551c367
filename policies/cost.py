"""What a batch costs, so that a limit on it can be put into tokens: by a step-time model, or by tokens alone."""

from typing import TYPE_CHECKING

import numpy as np

from engine.protocol import BatchComposition, Completion, Telemetry
from envs.batch_choice import BatchChooser
from envs.machine_speed import MachineSpeed, iteration_s
from envs.outlook import foresee

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel


class TokenCosts:
    """A batch costs its tokens: its time counts as proportional to them."""

    depends_on_batch = False
    unlimited = False

    def see(self, telemetry: Telemetry) -> None:
        """Nothing in it changes what a token costs."""

    def learn(self, batch: BatchComposition, measured: Completion) -> None:
        """Nor does what a batch took."""

    def of(self, batch: BatchComposition) -> float:
        return float(batch.total_tokens)

    def of_budget(self, budget_tokens: int) -> float:
        return float(budget_tokens)

    def budget(self, cost: float) -> int:
        return round(cost)

    def told(self, cost: float) -> str:
        return f"{cost:.0f} tokens"


class StepCosts:
    """A batch costs the mean seconds that the model gives it, on the machine as it runs now (`MachineSpeed`); a budget,
    those of the next batch if it is filled.

    `unlimited`: nobody decodes in the next batch, so nobody waits for it. In a pipeline others may, in other batches.
    """

    depends_on_batch = True

    def __init__(self, step_time: "StepTimeModel", first: Telemetry) -> None:
        bounds = first.bounds
        self._model = step_time
        self._speed = MachineSpeed(step_time)
        self._chooser = BatchChooser(step_time.coefficients, bounds.tile_tokens, bounds.max_budget_tokens)
        self._least, self._most = bounds.min_budget_tokens, bounds.max_budget_tokens
        self._stages = 0  # not known before a batch has ended
        self.see(first)

    @property
    def unlimited(self) -> bool:
        return self._outlook.decodes == 0 and self._stages == 1

    def see(self, telemetry: Telemetry) -> None:
        for completion in telemetry.completed:
            self._stages = max(len(completion.stages), 1)
        self._outlook = foresee(telemetry)

    def learn(self, batch: BatchComposition, measured: Completion) -> None:
        self._speed.observe(batch, iteration_s(measured))

    def of(self, batch: BatchComposition) -> float:
        return self._speed.predicted_s(batch)

    def of_budget(self, budget_tokens: int) -> float:
        newcomer = (float(budget_tokens), 0.0)
        filled = self._outlook._replace(prompts=np.vstack((self._outlook.prompts, newcomer)))
        return self._chooser.step_s(filled, budget_tokens, self._speed.speed)

    def budget(self, cost: float) -> int:
        if self.unlimited:
            return self._most
        choice = self._chooser.choose(self._outlook, cost, self._speed.speed, share=False, even=self._stages > 1)
        return max(choice.budget_tokens, self._least)

    def noise(self, n: int) -> list[float]:
        """n equally likely factors of a mixed batch's time over its mean."""
        factors = np.quantile(self._model.residuals[1], (np.arange(n) + 0.5) / n, method="hazen")
        return [float(factor) for factor in factors]

    def told(self, cost: float) -> str:
        return f"{cost * 1e3:.1f} ms by the model"
