"""Fixed knobs: the baseline of every comparison."""

from typing import ClassVar

from engine.protocol import Telemetry
from policies.policy import Decision


class Static:
    """The same budget and chunk for ever: 512 and 2048 are the paper's, 8192 is vLLM's on an H200.

    `budget` 0 keeps the knobs found in force; `chunk` 0 means as large as the budget.
    """

    RANGES: ClassVar = {"budget": (0, 2**31), "chunk": (0, 2**31)}

    def __init__(self, first: Telemetry, budget: int = 0, chunk: int = 0) -> None:
        budget = budget or first.knobs.budget_tokens
        self._decision = Decision(budget, chunk or budget, "static")

    def decide(self, telemetry: Telemetry) -> Decision:
        return self._decision

    def track(self, sent: Decision) -> None:
        pass
