"""A step that a device is computing, or has computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from engine.step_input import OutOfDeviceMemory

T = TypeVar("T")

_S_PER_MS = 1e-3


class Execution(Protocol):
    """`hidden` [tokens, hidden_size] is for the next stage, None from the last; the next step may overwrite it."""

    hidden: torch.Tensor | None

    def tokens(self) -> list[int]:
        """Wait for the device; the tokens of the rows that sample, none from stages before the last."""

    @property
    def busy_s(self) -> float:
        """The device's own time for the step, once `tokens` has returned."""

    def idle_s(self, before: "Execution") -> float:
        """From the end of the step before to the begin of this one, both of them done."""


@dataclass(slots=True)
class CpuExecution:
    """Computed; times are those of the runner's clock."""

    hidden: torch.Tensor | None
    sampled: list[int]
    begin_s: float
    end_s: float

    def tokens(self) -> list[int]:
        return self.sampled

    @property
    def busy_s(self) -> float:
        return self.end_s - self.begin_s

    def idle_s(self, before: Execution) -> float:
        assert isinstance(before, CpuExecution)
        return max(0.0, self.begin_s - before.end_s)


@dataclass(slots=True)
class CudaExecution:
    """Enqueued; `sampled` is pinned host memory that has the tokens after the event `end`."""

    hidden: torch.Tensor | None
    sampled: torch.Tensor
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def tokens(self) -> list[int]:
        self.end.synchronize()
        tokens: list[int] = self.sampled.tolist()
        return tokens

    @property
    def busy_s(self) -> float:
        return float(self.begin.elapsed_time(self.end)) * _S_PER_MS

    def idle_s(self, before: Execution) -> float:
        assert isinstance(before, CudaExecution)
        return max(0.0, float(before.end.elapsed_time(self.begin)) * _S_PER_MS)


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def within_memory(compute: Callable[[], T], repeatable: bool) -> T:
    """`compute()`; if memory runs out and it is repeatable, once more with all that the allocator keeps given back.

    Raises OutOfDeviceMemory.
    """
    for may_repeat in (repeatable, False):
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            if not may_repeat:
                raise OutOfDeviceMemory(
                    f"the device has too little free memory for this step ({error}): lower max_budget_tokens, "
                    "max_requests or the memory utilization"
                ) from error
        torch.cuda.empty_cache()  # not in the handler: its traceback holds the tensors of the failed attempt
    raise AssertionError
