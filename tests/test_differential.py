"""The live engine and the simulator, iteration by iteration: one batching rule, two ways of running it.

The real core, scheduler, block manager and reporter run beside a simulation of the same requests under the same random
knobs; the core's device takes the time that the simulation drew. Every telemetry message must say the same, with one
iteration in flight, with look-ahead, and on the stages of a pipeline.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.batching import SCHEDULES
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.link import MemoryLink
from engine.protocol import MOST_PROMPTS, VERSION, Completion, Knobs, Telemetry
from engine.request import Batch, SamplingParams, StepResult, Submit
from engine.scheduler import Scheduler
from envs.simulator import Plant, Simulation
from envs.step_time import StepTimeModel
from envs.trace import Workload

MODEL = StepTimeModel.from_formula((5e-3, 1e-5, 4e-8), (6e-3, 5e-5, 4e-8, 1e-9, 3e-4)).with_noise(0.1)
SEEDS = 12  # of each schedule, at each depth
DEPTHS: dict[str, dict[str, Any]] = {
    "one": {},
    "look-ahead": {"look_ahead": True},
    "two stages": {"pipeline_parallel": 2},
    "three stages": {"pipeline_parallel": 3},
    "two stages and look-ahead": {"pipeline_parallel": 2, "look_ahead": True},
    "three stages and look-ahead": {"pipeline_parallel": 3, "look_ahead": True},
}


@dataclass
class Device:
    """A runner and a clock: a batch is done when the simulation says so, and the core is told when it asks."""

    now_ns: int = 0
    completed_ns: list[int] = field(default_factory=list)  # of each iteration that the simulation launched
    batches: list[Batch] = field(default_factory=list)
    taken: int = 0
    padding_tokens: int = 0

    def __call__(self) -> int:
        return self.now_ns

    def launch(self, batch: Batch) -> "Device":
        self.batches.append(batch)
        return self

    def result(self) -> StepResult:
        """Of the oldest batch whose result was not taken."""
        batch, self.now_ns = self.batches[self.taken], self.completed_ns[self.taken]
        self.taken += 1
        return StepResult([0] * int(batch.samples.sum()), 0.0, ())


def random_case(schedule: str, depth: str, seed: int) -> tuple[EngineConfig, Workload]:
    """A small engine, often short of blocks or seats, and requests that press on it."""
    rng = np.random.default_rng((seed, SCHEDULES[schedule], list(DEPTHS).index(depth)))
    block_tokens = int(rng.choice([1, 4, 16]))
    longest = int(rng.integers(60, 400))
    config = EngineConfig(
        schedule=schedule,  # type: ignore[arg-type]
        budget_tokens=64,
        chunk_tokens=64,
        min_budget_tokens=1,
        max_budget_tokens=512,
        tile_tokens=int(rng.choice([1, 16, 64])),
        max_requests=int(rng.integers(1, 24)),
        max_model_tokens=longest,
        block_tokens=block_tokens,
        kv_blocks=-(-longest // block_tokens) + int(rng.integers(0, 600 // block_tokens)),
        **DEPTHS[depth],
    )
    n = int(rng.integers(1, 40))
    prompts = rng.integers(1, longest - 1, n)
    outputs = np.minimum(rng.integers(1, 60, n), longest - prompts)
    arrivals_s = np.sort(rng.uniform(0.0, float(rng.choice([0.01, 0.5, 20.0])), n))
    return config, Workload(arrivals_s, prompts, outputs)


class Pair:
    """The live core and the simulation of the same engine. The simulation goes ahead by one launch.

    All that the core takes from it is how long batches take, and when an idle engine wakes up.
    """

    def __init__(self, config: EngineConfig, workload: Workload) -> None:
        self.workload = workload
        self.simulation = Simulation(Plant(config, MODEL), workload)
        self.scheduler = Scheduler(config)
        self.device, self.link = Device(), MemoryLink()
        self.core = EngineCore(
            *("live", config, self.scheduler, self.device, self.link, self.device, lambda tokens: None)
        )
        self.submitted = 0

    def step(self, budget: int, chunk: int) -> tuple[Telemetry, Telemetry]:
        """The next message of both."""
        answered = self.simulation.iteration
        launched = self.simulation.step(budget, chunk)
        simulated = self.simulation.telemetry()
        self.link.inbox = Knobs(VERSION, "live", 0, answered, budget, chunk)
        if launched:
            self.device.completed_ns.append(self.newest_completed_ns())
            if not self.scheduler.has_work:
                self.device.now_ns = simulated.scheduled_ns
        heard = len(self.link.published)
        self.arrive()
        while self.scheduler.has_work and len(self.link.published) == heard:
            self.core.step()
            if len(self.link.published) == heard:  # it could form nothing, and waited
                self.arrive()
        if not launched:
            self.core.idle()
        assert len(self.link.published) == heard + 1
        return self.link.published[-1], simulated

    def arrive(self) -> None:
        """What the live engine's socket would have brought by now."""
        while self.submitted < len(self.workload) and self.arrival_ns(self.submitted) <= self.device.now_ns:
            row = self.submitted
            prompt, output = int(self.workload.prompt_tokens[row]), int(self.workload.output_tokens[row])
            submit = Submit(str(row), [0] * prompt, SamplingParams(max_tokens=output), self.arrival_ns(row))
            self.scheduler.submit(submit, self.device.now_ns)
            self.submitted += 1

    def newest_completed_ns(self) -> int:
        state = self.simulation.state
        scalars, completed_s = state.scalars[0], state.flight.completed_s
        newest = (int(scalars["oldest"]) + int(scalars["in_flight"]) - 1) % len(completed_s)
        return round(float(completed_s[newest]) * 1e9)

    def arrival_ns(self, row: int) -> int:
        return round(float(self.workload.arrival_s[row]) * 1e9)

    def simulated_rows(self) -> list[tuple[str, int]]:
        plan, rows = self.simulation.state.plan, int(self.simulation.state.scalars[0]["rows"])
        return [(str(slot), n) for slot, n in zip(plan.slots[:rows].tolist(), plan.tokens[:rows].tolist(), strict=True)]

    def live_rows(self) -> list[tuple[str, int]]:
        batch = self.device.batches[-1]
        return [(r.id, n) for r, n in zip(batch.requests, batch.n_tokens.tolist(), strict=True)]


NATURAL = {"engine_id", "sequence", "device_s", "stages", "slot", "tbt_slots", "ttft_slots"}
"""Fields that differ by nature: names, numbers of slots, and the device's own time."""


def differences(live: object, simulated: object, path: str = "") -> list[str]:
    """Where two messages differ; times may by a few nanoseconds, since the one clock is whole and the other is not."""
    if isinstance(live, float) and isinstance(simulated, float):
        return [] if abs(live - simulated) < 1e-8 else [f"{path}: {live} live, {simulated} simulated"]
    if isinstance(live, dict) and isinstance(simulated, dict) and live.keys() == simulated.keys():
        pairs = [(key, live[key], simulated[key]) for key in live if key not in NATURAL]
    elif isinstance(live, tuple) and isinstance(simulated, tuple) and len(live) == len(simulated):
        pairs = [(i, *pair) for i, pair in enumerate(zip(live, simulated, strict=True))]
    else:
        return [] if live == simulated else [f"{path}: {live} live, {simulated} simulated"]
    return [text for key, a, b in pairs for text in differences(a, b, f"{path}.{key}")]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulator_and_live_engine_form_the_same_batches(schedule: str, depth: str) -> None:
    preemptions = iterations = most_in_flight = most_prompts = 0
    for seed in range(SEEDS):
        config, workload = random_case(schedule, depth, seed)
        pair = Pair(config, workload)
        knobs = np.random.default_rng(seed)
        while not pair.simulation.done:
            budget, chunk = knobs.integers(1, 512, 2, endpoint=True).tolist()
            live, simulated = pair.step(budget, chunk)
            if simulated.batch.total_tokens:
                assert pair.live_rows() == pair.simulated_rows()
                work_since_s = float(pair.simulation.state.scalars[0]["work_since_s"])
                assert pair.device.batches[-1].work_since_ns == round(work_since_s * 1e9), "bubbles count from here"
            found = differences(msgspec.to_builtins(live), msgspec.to_builtins(simulated))
            assert not found, f"seed {seed}, iteration {simulated.iteration}"
            iterations += 1
            most_prompts = max(most_prompts, len(live.queue.prompt_remaining_tokens))
            most_in_flight = max(most_in_flight, int(pair.simulation.state.scalars[0]["in_flight"]))
        pair.scheduler.check()
        assert not pair.scheduler.has_work
        assert pair.simulation.outcome().finished.all()
        preemptions += simulated.preemptions
    assert iterations > 500
    assert most_in_flight == config.depth
    assert most_prompts == MOST_PROMPTS, "no queue was longer than telemetry tells: the comparison proves too little"
    if schedule != "request-level":
        assert preemptions > 0, "no case was short of KV blocks: the comparison proves too little"


@pytest.mark.parametrize("depth", DEPTHS)
def test_slots_tell_whose_token_it_is(depth: str) -> None:
    """Slot numbers differ, what they say does not: joined over a run, they give every request's own gaps."""
    config, workload = random_case("stall-free", depth, 3)
    pair = Pair(config, workload)
    gaps: tuple[dict[tuple[int, int], list[float]], ...] = ({}, {})
    while not pair.simulation.done:
        for telemetry, of_request in zip(pair.step(256, 64), gaps, strict=True):
            for completion in telemetry.completed:
                _collect(completion, of_request)
    live, simulated = (sorted(side.values()) for side in gaps)
    assert len(live) == len(simulated)
    for own, other in zip(live, simulated, strict=True):
        assert own == pytest.approx(other, abs=1e-8)
    assert sorted(map(len, live)) == sorted((workload.output_tokens - 1).tolist())


def _collect(completion: Completion, gaps: dict[tuple[int, int], list[float]]) -> None:
    """Append each gap to its request's list; a request is its slot and how often that was used before."""
    for slot in completion.ttft_slots:
        uses = sum(used == slot for used, _ in gaps)
        gaps[slot, uses] = []
    for slot, gap_s in zip(completion.tbt_slots, completion.tbt_s, strict=True):
        uses = sum(used == slot for used, _ in gaps) - 1
        gaps[slot, uses].append(gap_s)
