"""One run of a pipeline benchmark: requests in a closed loop through the core and a runner, and what it showed.

The law decides as it does beside a server, in the controller and under its guard, but in this process: the decision is
there before the next batch is formed, as it is over sockets, and takes its time while the device works.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controller.controller import Controller
from engine.config import EngineConfig
from engine.core import EngineCore, Runner
from engine.link import MemoryLink
from engine.protocol import Completion, Knobs, Telemetry
from engine.request import Abort, SamplingParams, Submit, TokenOutput
from engine.scheduler import Scheduler
from envs.workload import Workload
from policies.catalogue import Law
from policies.rehearsal import rehearse

ENGINE_ID = "pipeline"


class LawLink(MemoryLink):
    """A link whose every message is answered at once by a controller in this process."""

    def __init__(self, law: Law, clock: Callable[[], int]) -> None:
        super().__init__()
        rehearse(law)
        self._controller = Controller(self, law, None, clock)

    def publish(self, telemetry: Telemetry) -> None:
        super().publish(telemetry)
        self._controller.tick(0.0)

    def receive(self, timeout_s: float) -> list[Telemetry]:
        return self.published[-1:]

    def send(self, knobs: Knobs) -> bool:
        self.inbox = knobs
        return True


class Run(NamedTuple):
    """What was measured: `duration_s`, and in it the iterations that completed with the tokens they computed."""

    duration_s: float
    completions: list[Completion]
    tokens: int


class ClosedLoop:
    """`at_once` requests in the engine: where one ends the next comes, in the workload's order, again and again.

    `clock` gives monotonic nanoseconds.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        law: Law,
        workload: Workload,
        at_once: int,
        clock: Callable[[], int],
    ) -> None:
        self._link, self._scheduler, self._clock = LawLink(law, clock), Scheduler(config), clock
        self._core = EngineCore(*(ENGINE_ID, config, self._scheduler, runner, self._link, clock, self._deliver))
        self._next = _requests(workload)
        self._at_once = at_once
        self._running: set[str] = set()
        self._begun: set[str] = set()

    def run(self, seconds: float, warm_up_s: float) -> Run:
        """Measure for so long, once as many requests as run at once have begun to decode, or after `warm_up_s`."""
        begun_s = self._turn_until(lambda: len(self._begun) >= self._at_once, warm_up_s)
        self._link.published.clear()
        ended_s = self._turn_until(lambda: False, seconds)
        for request_id in self._running:
            self._scheduler.abort(Abort(request_id))
        while self._scheduler.has_work:  # so that the runner is free for another core
            self._core.step()
        tokens = {t.iteration: t.batch.total_tokens for t in self._link.published}
        completions = [
            completion
            for telemetry in self._link.published
            for completion in telemetry.completed
            if begun_s <= completion.completed_ns * 1e-9 < ended_s and completion.iteration in tokens
        ]
        return Run(ended_s - begun_s, completions, sum(tokens[c.iteration] for c in completions))

    def _turn_until(self, enough: Callable[[], bool], limit_s: float) -> float:
        """Returns when that was, in seconds of the clock."""
        begun_s = now_s = self._clock() * 1e-9
        while now_s - begun_s < limit_s and not enough():
            while len(self._running) < self._at_once:
                submit = next(self._next)
                self._running.add(submit.request_id)
                self._scheduler.submit(submit, self._clock())
            if self._scheduler.has_work:
                self._core.step()
            else:
                self._core.idle()  # all ended in one iteration, whose tokens are handed over now
            now_s = self._clock() * 1e-9
        return now_s

    def _deliver(self, tokens: list[TokenOutput]) -> None:
        for token in tokens:
            self._begun.add(token.request_id)
            if token.finish_reason is not None:
                self._running.discard(token.request_id)


def figures(run: Run) -> dict[str, Any]:
    """TBT and TTFT in seconds, tokens per second, and of every stage the seconds busy and idle while work waited.

    Raises ValueError for a run in which no iteration ended.
    """
    if not run.completions:
        raise ValueError(f"no iteration ended in the {run.duration_s:.1f} s that were measured: measure for longer")
    tbt_s = np.array([gap for c in run.completions for gap in c.tbt_s])
    ttft_s = np.array([first for c in run.completions for first in c.ttft_s])
    busy = np.array([[stage.busy_s for stage in c.stages] for c in run.completions])
    bubble = np.array([[stage.bubble_s for stage in c.stages] for c in run.completions])
    return {
        "duration_s": run.duration_s,
        "iterations": len(run.completions),
        "tokens": run.tokens,
        "busy_s": busy.sum(axis=0).tolist(),
        "bubble_s": bubble.sum(axis=0).tolist(),
        "bubble_share": float(bubble.sum() / (bubble.sum() + busy.sum())),
        "bubble_ms_per_ktoken": float(bubble.sum() / run.tokens * 1e6),
        "tbt_p50_s": _quantile(tbt_s, 0.5),
        "tbt_p99_s": _quantile(tbt_s, 0.99),
        "ttft_p50_s": _quantile(ttft_s, 0.5),
        "ttft_p99_s": _quantile(ttft_s, 0.99),
        "output_tokens_s": (len(tbt_s) + len(ttft_s)) / run.duration_s,
        "tokens_s": run.tokens / run.duration_s,
    }


def _quantile(values: NDArray[np.float64], q: float) -> float | None:
    return float(np.quantile(values, q)) if values.size else None


def _requests(workload: Workload) -> Iterator[Submit]:
    """In order, and from the first again once all have come."""
    pairs = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    for i, (prompt_tokens, output_tokens) in enumerate(cycle(pairs)):
        yield Submit(f"{i}", [7] * prompt_tokens, SamplingParams(max_tokens=output_tokens))
