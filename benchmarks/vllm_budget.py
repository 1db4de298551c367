"""A scheduler for vLLM whose token budget is set from outside while it serves; it runs in vLLM's engine process.

`--scheduler-cls benchmarks.vllm_budget.BudgetScheduler`, and the budget as digits in the file that PACER_BUDGET names.
"""

import os
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class BudgetScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM is not here when this is checked
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = os.open(os.environ["PACER_BUDGET"], os.O_RDONLY)
        self._most: int = self.max_num_scheduled_tokens

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        # A microsecond; and before the base class, which reads it once in every call.
        self.max_num_scheduled_tokens = min(int(os.pread(self._file, 16, 0)), self._most)
        return super().schedule(*args, **kwargs)
