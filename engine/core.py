"""The engine's main loop: knobs, batch, run, report."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from engine.actuator import Actuator
from engine.config import EngineConfig
from engine.link import Link
from engine.request import Batch, StepResult, TokenOutput
from engine.scheduler import Scheduler
from engine.step_input import OutOfDeviceMemory
from engine.telemetry import Reporter

logger = logging.getLogger(__name__)

NO_MEMORY = "the device ran out of memory for this request: try again later, or shorten the prompt"
"""What the clients of requests that are ended for want of memory read; the log has the details."""


class Pending(Protocol):
    """A batch on the device, which computes `padding_tokens` in vain beside it (CUDA graph sizes)."""

    padding_tokens: int

    def result(self) -> StepResult:
        """Wait for the batch."""


class Runner(Protocol):
    """Computes batches, in the order of their launches: a real model, or a model of its step time."""

    def launch(self, batch: Batch) -> Pending:
        """Start computing; must not wait for the device. A batch has at least one row.

        Raises OutOfDeviceMemory; the batch is then as if it had never been launched, except that tokens which were on
        the device alone may be lost to later launches.
        """


class EngineCore:
    """One engine without its sockets to the world: `scheduler`, `runner`, `link` and `clock` are what it is made of.

    `clock` gives monotonic nanoseconds; `deliver` takes the tokens of an iteration while another one runs. With a real
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
        self._depth = config.depth
        self._in_flight: deque[tuple[Batch, Pending]] = deque()  # oldest first
        self._work_since_ns: int | None = None  # None: there was none
        self._runner = runner
        self._clock = clock
        self._actuator = Actuator(config, link)
        self._reporter = Reporter(engine_id, config, scheduler, link, clock)

    def step(self) -> None:
        """Launch an iteration; once `depth` are in flight, or if no batch can be formed, wait for the oldest.

        A decision costs the engine no time: it is read, never awaited.
        """
        now_ns = self._clock()
        if self._work_since_ns is None:
            self._work_since_ns = now_ns
        if self._in_flight:
            self._hand_over()  # at once: clients need not wait for a launch while the device has work
        knobs = self._actuator.read(now_ns)
        batch = self.scheduler.schedule(knobs.budget_tokens, knobs.chunk_tokens, now_ns)
        batch.work_since_ns = self._work_since_ns
        launches = bool(batch.requests)
        if launches:
            try:
                self._in_flight.append((batch, self._runner.launch(batch)))
            except OutOfDeviceMemory as error:
                self._give_up(batch, error)
                return
        self._hand_over()  # all that is sent is sent while the device works
        if launches:
            self._reporter.launched(batch, knobs, self._in_flight[-1][1].padding_tokens, now_ns)
        if not launches or len(self._in_flight) == self._depth:
            self._complete()

    def idle(self) -> None:
        """Hand over the last tokens, and keep in touch with the controller while there is nothing to run."""
        assert not self._in_flight, "idle, but a batch is in flight"
        self._work_since_ns = None
        self._hand_over()
        self._reporter.idle(self._actuator.read(self._clock()))

    def _give_up(self, batch: Batch, error: OutOfDeviceMemory) -> None:
        """Go on without a batch that the device has no memory for, once all before it are done.

        Then every token is known here, and the next batch needs none that was on the device alone.
        """
        ended = self.scheduler.give_up(batch, NO_MEMORY)
        logger.error("ended %s: %s", ", ".join(token.request_id for token in ended), error)
        self._tokens.extend(ended)
        self._hand_over()
        while self._in_flight:
            self._complete()
            self._hand_over()

    def _complete(self) -> None:
        assert self._in_flight, "there is work, but no batch can be formed and none is in flight"
        batch, pending = self._in_flight.popleft()
        result = pending.result()
        completed_ns = self._clock()
        output = self.scheduler.update(batch, result.token_ids, completed_ns)
        self._tokens = output.tokens
        self._reporter.completed(result, output, completed_ns)

    def _hand_over(self) -> None:
        if self._tokens:
            self._deliver(self._tokens)
            self._tokens = []
