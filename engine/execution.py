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

    def bubble_s(self, before: "Execution | None") -> float:
        """How long the device idled before this step while there was work; both steps are done.

        From the end of the step before, or since there has been work if that is later.
        """


@dataclass(slots=True)
class CpuExecution:
    """Computed; times are those of the runner's clock, which is the engine's."""

    hidden: torch.Tensor | None
    sampled: list[int]
    work_since_s: float
    begin_s: float
    end_s: float

    def tokens(self) -> list[int]:
        return self.sampled

    @property
    def busy_s(self) -> float:
        return self.end_s - self.begin_s

    def bubble_s(self, before: Execution | None) -> float:
        assert before is None or isinstance(before, CpuExecution)
        free_s = self.work_since_s if before is None else max(before.end_s, self.work_since_s)
        return max(0.0, self.begin_s - free_s)


@dataclass(slots=True)
class Resumed:
    """Ties the device's time to the host's when work has come to an idle device.

    `event` happened on the device `waited_s` after that, by the host's clock.
    """

    event: torch.cuda.Event
    waited_s: float


@dataclass(slots=True)
class CudaExecution:
    """Enqueued; `sampled` is pinned host memory that has the tokens after the event `end`.

    `resumed` belongs to the first step since there has been work. The device did nothing since then; at all other steps
    the one before ended later than that.
    """

    hidden: torch.Tensor | None
    sampled: torch.Tensor
    resumed: Resumed | None
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def tokens(self) -> list[int]:
        self.end.synchronize()
        tokens: list[int] = self.sampled.tolist()
        return tokens

    @property
    def busy_s(self) -> float:
        return _seconds(self.begin, self.end)

    def bubble_s(self, before: Execution | None) -> float:
        if self.resumed is not None:
            self.resumed.event.synchronize()
            return max(0.0, self.resumed.waited_s + _seconds(self.resumed.event, self.begin))
        if before is None:  # of a step after rehearsals, and nobody has told since when there is work
            return 0.0
        assert isinstance(before, CudaExecution)
        return max(0.0, _seconds(before.end, self.begin))


def _seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(begin.elapsed_time(end)) * _S_PER_MS


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
