"""The engine's main loop: knobs, batch, run, report."""

from collections.abc import Callable
from typing import Protocol

from engine.actuator import Actuator
from engine.config import EngineConfig
from engine.link import Link
from engine.request import Batch, StepResult, TokenOutput
from engine.scheduler import Scheduler
from engine.telemetry import Reporter


class Pending(Protocol):
    """A batch on the device."""

    def result(self) -> StepResult:
        """Wait for the batch."""


class Runner(Protocol):
    """Computes batches: a real model, or a model of its step time."""

    def launch(self, batch: Batch) -> Pending:
        """Start computing; must not wait for the device."""


class EngineCore:
    """One engine without its sockets to the world: `scheduler`, `runner`, `link` and `clock` are what it is made of.

    `clock` gives monotonic nanoseconds; `deliver` takes the tokens of an iteration, once the next one runs. With a real
    runner and sockets this is the live engine; with a simulated runner and a virtual clock it is the simulator; the
    core never asks which.
    """

    def __init__(
        self,
        engine_id: str,
        config: EngineConfig,
        scheduler: Scheduler,
        runner: Runner,
        link: Link,
        clock: Callable[[], int],
        deliver: Callable[[list[TokenOutput]], None],
    ) -> None:
        self.scheduler = scheduler
        self._deliver = deliver
        self._tokens: list[TokenOutput] = []
        self._runner = runner
        self._clock = clock
        self._actuator = Actuator(config, link)
        self._reporter = Reporter(engine_id, config, scheduler, link, clock)

    def step(self) -> None:
        """Run one iteration. A decision costs the engine no time: it is read, never awaited."""
        now_ns = self._clock()
        knobs = self._actuator.read(now_ns)
        batch = self.scheduler.schedule(knobs.budget_tokens, knobs.chunk_tokens, now_ns)
        pending = self._runner.launch(batch)
        self._hand_over()  # all that is sent is sent while the device works
        self._reporter.launched(batch, knobs)
        result = pending.result()
        completed_ns = self._clock()
        output = self.scheduler.update(batch, result.token_ids, completed_ns)
        self._tokens = output.tokens
        self._reporter.completed(result, output, completed_ns)

    def idle(self) -> None:
        """Hand over the last tokens, and keep in touch with the controller while there is nothing to run."""
        self._hand_over()
        self._reporter.idle(self._actuator.read(self._clock()))

    def _hand_over(self) -> None:
        if self._tokens:
            self._deliver(self._tokens)
            self._tokens = []
