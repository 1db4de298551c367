"""The loop in memory, for tests: the real core, scheduler, controller and laws under a virtual clock.

Only the device is modelled: a batch takes `fixed_s + per_token_s * tokens`, times lognormal noise from a seed.
"""

from dataclasses import dataclass, field

import numpy as np

from controller.controller import Controller
from controller.journal import JournalRow
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.link import MemoryLink
from engine.protocol import Completion, Knobs, StageTimes, Telemetry
from engine.request import Batch, SamplingParams, StepResult, Submit, TokenOutput
from engine.scheduler import Scheduler
from envs.slo import Slo
from envs.step_time import StepTimeModel
from policies.catalogue import Law, parse_law


class VirtualClock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns


@dataclass
class ModelledDevice:
    """A runner whose batches take modelled time, one after another, padded to multiples of `padded_to` tokens."""

    clock: VirtualClock
    fixed_s: float = 0.005
    per_token_s: float = 0.00016
    noise: float = 0.0
    slowdown: float = 1.0
    padded_to: int = 1
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    done_ns: int = 0  # with all that was launched

    def step_time(self) -> StepTimeModel:
        """What a fit to this device would give."""
        line = (self.fixed_s, self.per_token_s, 0.0)
        return StepTimeModel.from_formula(line, (*line, 0.0, 0.0)).with_noise(self.noise)

    def launch(self, batch: Batch) -> "ModelledBatch":
        n_tokens = int(batch.n_tokens.sum())
        seconds = self.slowdown * (self.fixed_s + self.per_token_s * n_tokens)
        seconds *= float(np.exp(self.noise * self.random.standard_normal()))
        begin_ns = max(self.done_ns, self.clock.now_ns)
        bubble_s = (begin_ns - max(self.done_ns, batch.work_since_ns)) * 1e-9
        self.done_ns = begin_ns + round(seconds * 1e9)
        return ModelledBatch(self.clock, batch, seconds, bubble_s, self.done_ns, -n_tokens % self.padded_to)


@dataclass
class ModelledBatch:
    clock: VirtualClock
    batch: Batch
    seconds: float
    bubble_s: float
    done_ns: int
    padding_tokens: int

    def result(self) -> StepResult:
        self.clock.now_ns = max(self.clock.now_ns, self.done_ns)
        return StepResult(
            [0] * int(self.batch.samples.sum()), self.seconds, (StageTimes(self.seconds, self.bubble_s, 1),)
        )


class MemoryWire:
    """The controller's end of a MemoryLink."""

    def __init__(self, link: MemoryLink) -> None:
        self.link = link
        self.read = 0

    def receive(self, timeout_s: float) -> list[Telemetry]:
        news = self.link.published[self.read :]
        self.read = len(self.link.published)
        return news

    def send(self, knobs: Knobs) -> bool:
        self.link.inbox = knobs
        return True


class Rows(list[JournalRow]):
    """A journal in memory."""

    record = list[JournalRow].append


class Loop:
    """An engine and, unless `policy` is None, its controller; `run` lets them play."""

    def __init__(self, policy: str | None, tbt_slo_s: float = 0.1, config: EngineConfig | None = None, **device: float):
        self.clock = VirtualClock()
        self.device = ModelledDevice(self.clock, **device)  # type: ignore[arg-type]
        self.step_time = self.device.step_time()
        self.config = config or EngineConfig()
        self.link = MemoryLink()
        self.tokens: list[TokenOutput] = []
        self.core = EngineCore(
            *("e-1", self.config, Scheduler(self.config), self.device, self.link, self.clock, self.tokens.extend)
        )
        self.journal = Rows()
        self.controller: Controller | None = None
        self.tbt_slo_s = tbt_slo_s
        if policy is not None:
            self.take_over(policy)

    def take_over(self, policy: str) -> None:
        """A new controller process, knowing nothing."""
        self.control_by(parse_law(policy, Slo(tbt_s=self.tbt_slo_s), self.step_time))

    def control_by(self, law: Law) -> None:
        wire = MemoryWire(self.link)
        wire.read = len(self.link.published)
        self.controller = Controller(wire, law, self.journal, self.clock)

    def submit(self, name: str, prompt_tokens: int, max_tokens: int) -> None:
        self.core.scheduler.submit(
            Submit(name, [0] * prompt_tokens, SamplingParams(max_tokens=max_tokens)), self.clock()
        )

    def step(self) -> Telemetry:
        if self.core.scheduler.has_work:
            self.core.step()
        else:
            self.core.idle()
            self.clock.now_ns += 10_000_000
        if self.controller is not None:
            self.controller.tick(0.0)
        return self.link.published[-1]

    def run_saturated(self, seconds: float, prompt_tokens: int = 1500, streams: int = 8) -> None:
        """Keep `streams` endless decodes and a queue of prompts going for `seconds` of virtual time."""
        end_ns = self.clock() + round(seconds * 1e9)
        names = iter(range(10**9))
        scheduler = self.core.scheduler
        while self.clock() < end_ns:
            short = sum(r.id.startswith("stream") for r in (*scheduler.running, *scheduler.waiting))
            for _ in range(streams - short):
                self.submit(f"stream {self.clock()} {next(names)}", 8, 1500)
            while len(scheduler.waiting) < 2:
                self.submit(f"prompt {self.clock()} {next(names)}", prompt_tokens, 2)
            self.step()

    @property
    def budgets(self) -> list[int]:
        return [t.knobs.budget_tokens for t in self.link.published]

    def completions(self, since_s: float = 0.0) -> list[Completion]:
        since_ns = 1_000_000_000 + since_s * 1e9
        return [c for t in self.link.published for c in t.completed if c.completed_ns >= since_ns]

    def tbt_p99_s(self, since_s: float = 0.0) -> float:
        return float(np.percentile([g for c in self.completions(since_s) for g in c.tbt_s], 99))
