"""The plant, simulated: the engine's own batching rule under modelled time.

A `Simulation` is one run of one workload. The laws that need no telemetry (fixed knobs, clairvoyant) run compiled; all
others are asked once an iteration with the telemetry that the live engine would have published.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from engine.batching import SCHEDULES, Limits
from engine.config import EngineConfig
from engine.protocol import (
    VERSION,
    BatchComposition,
    Completion,
    Finished,
    InForce,
    QueueState,
    StageTimes,
    Telemetry,
)
from envs.kernel import run
from envs.outcome import Outcome
from envs.state import LOG_COLUMNS, LOG_ROWS, Done, FloatArray, Rules, Scalars, initial_state
from envs.step_time import StepTimeModel
from envs.trace import Workload

NEVER = np.inf
TINY_S = 1e-9  # a run that was cut off before its first arrival has no duration to divide by

Decide = Callable[[Telemetry, int], tuple[int, int, str] | None]
"""A law under its guard: telemetry and monotonic nanoseconds in; budget, chunk and reason out, or None for silence."""


@dataclass(frozen=True, slots=True)
class Plant:
    """What is simulated: an engine by its own configuration, and how long its batches take.

    `step_time` is the time of a batch on one of the pipeline's stages, with the noise around it. Forming a batch takes
    none: look-ahead, which hides that, only delays what is heard and who is admitted. Knobs that answer iteration N act
    on iteration N + `dead_time_iterations`: 1 for the live engine, however many are in flight; 2 in vLLM under async
    scheduling, stages + 1 in its pipelines. With `reserve_output`, KV for prompt and output is taken at admission, so
    nothing is ever preempted; else the engine's rule (the prompt's blocks at admission) holds. It has no prefix cache.
    """

    config: EngineConfig
    step_time: StepTimeModel
    dead_time_iterations: int = 1
    reserve_output: bool = False

    def __post_init__(self) -> None:
        if self.dead_time_iterations < 1:
            raise ValueError(f"dead_time_iterations is {self.dead_time_iterations}; it must be at least 1")
        if self.config.prefix_caching:
            raise ValueError("the simulator has no token values, so no prefix cache: set prefix_caching to False")


class Simulation:
    """One run. `step` launches an iteration, `telemetry` tells of it; `run_*` go to the end.

    Raises ValueError if a request could never run on this plant. The same plant, workload, knobs and seed give the same
    run, bit by bit, and iteration i draws the same quantile of the noise under every law.
    """

    def __init__(self, plant: Plant, workload: Workload, seed: int = 0, keep_log: bool = False) -> None:
        self.plant = plant
        self.workload = workload
        config = plant.config
        limits = Limits(
            *(config.max_requests, config.max_budget_tokens, config.block_tokens, config.tile_tokens),
            *(config.pipeline_parallel, config.depth),
        )
        _check(plant, workload)
        model = plant.step_time
        schedule, reserve = SCHEDULES[config.schedule], int(plant.reserve_output)
        self.rules = Rules(schedule, limits, reserve, model.coefficients, model.residuals)
        self.state = initial_state(workload, limits, config.kv_blocks, seed)
        self._scalars = self.state.scalars[0]
        self._logs: list[FloatArray] | None = [] if keep_log else None
        self._in_force = InForce(config.budget_tokens, config.chunk_tokens, 0, 0, "fallback")
        self._bounds = config.bounds

    @property
    def now_s(self) -> float:
        """When the iteration launched last was formed."""
        return float(self._scalars["now_s"])

    @property
    def iteration(self) -> int:
        return int(self._scalars["iteration"])

    @property
    def done(self) -> bool:
        return bool(self._scalars["finished"] == len(self.workload))

    @property
    def slowdown(self) -> float:
        """Factor on all step times from now on; 1.0 is the model's own speed."""
        return float(self._scalars["slowdown"])

    @slowdown.setter
    def slowdown(self, factor: float) -> None:
        if not factor > 0:
            raise ValueError(f"slowdown is {factor}; it must be a positive factor on all step times")
        self._scalars["slowdown"] = factor

    def step(self, budget_tokens: int, chunk_tokens: int) -> bool:
        """Launch one iteration under the knobs; False if nothing can run before the next arrival.

        Telemetry tells them as the controller's answer to the iteration that is one dead time before.
        """
        answered = max(0, self.iteration + 1 - self.plant.dead_time_iterations)
        return self._launch(InForce(budget_tokens, chunk_tokens, answered, answered, "controller"))

    def run_static(self, budget_tokens: int, chunk_tokens: int, until_s: float = NEVER) -> None:
        """Fixed knobs until all requests have ended, or until `until_s`. Raises ValueError for knobs out of bounds."""
        self._check_knobs(budget_tokens, chunk_tokens)
        self._in_force = InForce(budget_tokens, chunk_tokens, self.iteration, self.iteration, "controller")
        self._run(budget_tokens, chunk_tokens, 0.0, until_s)

    def run_clairvoyant(self, limit_s: float, until_s: float = NEVER) -> None:
        """The bound for all laws: before each batch, the largest budget whose true mean time is within `limit_s`.

        It knows the step-time model and the very batch that would be formed, without dead time; what it does not know
        is the noise. Nothing limits it while nothing decodes. Raises ValueError for several stages, or another schedule
        than stall-free: there a batch without decodes keeps others' decodes waiting, and this is no bound.
        """
        stages, schedule = self.plant.config.pipeline_parallel, self.plant.config.schedule
        if stages > 1 or schedule != "stall-free":
            raise ValueError(
                f"clairvoyant is a bound for stall-free batching on one stage, not for {schedule} on {stages}: compare "
                "with static budgets there"
            )
        if not limit_s > 0:
            raise ValueError(f"limit_s is {limit_s}; it must be a positive number of seconds")
        self._run(0, 0, limit_s, until_s)

    def run_law(self, decide: Decide, until_s: float = NEVER) -> None:
        """A law in the loop: asked at every launch, obeyed `dead_time_iterations` later.

        While it is silent its last knobs stay in force, for the time to live; then the engine's own are.
        """
        fallback, dead_time = self._in_force, self.plant.dead_time_iterations
        newest, answered_s = fallback, self.now_s
        pending = deque([newest] * dead_time)
        while not self.done and self.now_s < until_s:
            launched = self._launch(pending.popleft(), until_s)
            answer = decide(self.telemetry(), round(self.now_s * 1e9))
            if answer is not None:
                newest = InForce(answer[0], answer[1], newest.sequence + 1, self.iteration, "controller")
                answered_s = self.now_s
            elif self.now_s - answered_s > self.plant.config.knobs_ttl_s:
                newest = msgspec.structs.replace(fallback, sequence=newest.sequence, iteration=newest.iteration)
            if not launched:  # nothing runs: the answer to the idle message is there long before the next iteration
                pending = deque([newest] * (dead_time - 1))
            pending.append(newest)

    def _launch(self, knobs: InForce, until_s: float = NEVER) -> bool:
        self._check_knobs(knobs.budget_tokens, knobs.chunk_tokens)
        self._in_force = knobs
        rows = run(self.state, self.rules, knobs.budget_tokens, knobs.chunk_tokens, 0.0, until_s, 1)
        self._keep_log(LOG_ROWS)
        return rows > 0

    def _check_knobs(self, budget_tokens: int, chunk_tokens: int) -> None:
        bounds = self._bounds
        for name, value in (("budget_tokens", budget_tokens), ("chunk_tokens", chunk_tokens)):
            if not bounds.min_budget_tokens <= value <= bounds.max_budget_tokens:
                raise ValueError(
                    f"{name} {value} is outside the launch bounds {bounds.min_budget_tokens}.."
                    f"{bounds.max_budget_tokens}: clamp it, as Guard does"
                )

    def _run(self, budget: int, chunk: int, limit_s: float, until_s: float) -> None:
        while not self.done and self.now_s < until_s:
            run(self.state, self.rules, budget, chunk, limit_s, until_s, LOG_ROWS)
            self._keep_log(1)

    def _keep_log(self, at_least: int) -> None:
        rows = int(self._scalars["n_logged"])
        if rows >= at_least:
            if self._logs is not None:
                self._logs.append(self.state.log[:rows].copy())
            self._scalars["n_logged"] = 0

    def outcome(self) -> Outcome:
        """What has happened so far."""
        self._keep_log(1)
        state, requests = self.state, self.state.requests
        first_s = self.workload.arrival_s[0]
        end_s = max(float(np.nanmax(state.token_times_s, initial=0.0)), 0.0 if self.done else self.now_s)
        return Outcome(
            workload=self.workload,
            first_scheduled_s=requests.first_scheduled_s.copy(),
            produced=requests.produced.copy(),
            first_token_row=requests.first_token_row.copy(),
            token_times_s=state.token_times_s.copy(),
            duration_s=max(float(end_s - first_s), TINY_S),
            iterations=self.iteration,
            preemptions=int(self._scalars["preemptions"]),
            stage_busy_s=state.stage_busy_s.copy(),
            stage_bubble_s=state.stage_bubble_s.copy(),
            log=np.concatenate(self._logs) if self._logs else np.zeros((0, len(LOG_COLUMNS))),
        )

    def telemetry(self) -> Telemetry:
        """What the live engine publishes when it launches the iteration that `step` formed, or finds nothing to run."""
        s = Scalars(*self._scalars.item())
        now_ns = round(s.now_s * 1e9)
        idle = s.in_flight == 0
        return Telemetry(
            version=VERSION,
            engine_id="simulated",
            iteration=s.iteration,
            scheduled_ns=now_ns,
            schedule=self.plant.config.schedule,
            dead_time_iterations=self.plant.dead_time_iterations,
            knobs=self._in_force,
            bounds=self._bounds,
            batch=BatchComposition() if idle else self._composition(s),
            queue=self._queue(s),
            kv_usage=1.0 - s.free_blocks / self.plant.config.kv_blocks,
            preemptions=s.preemptions,
            rejected_knobs=0,
            completed=self._completions(s.n_done) if s.n_done else (),
        )

    def _composition(self, s: Scalars) -> BatchComposition:
        chunks: tuple[int, ...] = ()
        contexts: tuple[int, ...] = ()
        if s.prefills:
            plan = self.state.plan
            slots, tokens = plan.slots[s.decodes : s.rows], plan.tokens[s.decodes : s.rows]
            chunks = tuple(tokens.tolist())
            contexts = tuple((self.state.arrays.context[slots] - tokens).tolist())
        return BatchComposition(
            s.decodes, s.decode_context, s.prefills, s.prefill_tokens, chunks, contexts, s.attention_tokens2
        )

    def _queue(self, s: Scalars) -> QueueState:
        state = self.state
        waits = s.head < s.tail
        return QueueState(
            running_requests=s.n_running,
            waiting_requests=s.tail - s.head,
            waiting_prompt_tokens=s.waiting_tokens,
            oldest_wait_s=s.now_s - float(state.requests.arrival_s[state.waiting[s.head]]) if waits else 0.0,
            prompt_remaining_tokens=tuple(state.prompts.remaining[: s.n_prompts].tolist()),
            prompt_context_tokens=tuple(state.prompts.context[: s.n_prompts].tolist()),
        )

    def _completions(self, n_done: int) -> tuple[Completion, ...]:
        report, requests = self.state.report, self.state.requests
        gaps_begin = firsts_begin = finished_begin = 0
        completions = []
        for i, record in enumerate(report.done[:n_done].tolist()):
            done = Done(*record)
            firsts = report.first_slots[firsts_begin : done.firsts_end]
            finished = report.finished_slots[finished_begin : done.finished_end]
            stages = zip(report.busy_s[i].tolist(), report.bubble_s[i].tolist(), strict=True)
            completions.append(
                Completion(
                    iteration=done.iteration,
                    scheduled_ns=round(done.scheduled_s * 1e9),
                    completed_ns=round(done.completed_s * 1e9),
                    device_s=float(report.busy_s[i].sum()),
                    tbt_s=tuple(report.gap_s[gaps_begin : done.gaps_end].tolist()),
                    ttft_s=tuple((done.completed_s - requests.arrival_s[firsts]).tolist()),
                    stages=tuple(StageTimes(busy_s, bubble_s, self.rules.limits.depth) for busy_s, bubble_s in stages),
                    tbt_slots=tuple(report.gap_slots[gaps_begin : done.gaps_end].tolist()),
                    ttft_slots=tuple(firsts.tolist()),
                    finished=tuple(self._finished(slot) for slot in finished.tolist()),
                )
            )
            gaps_begin, firsts_begin, finished_begin = done.gaps_end, done.firsts_end, done.finished_end
        return tuple(completions)

    def _finished(self, slot: int) -> Finished:
        requests = self.state.requests
        return Finished(
            slot,
            round(float(requests.arrival_s[slot]) * 1e9),
            int(requests.prompt_tokens[slot]),
            int(requests.output_tokens[slot]),
        )


def _check(plant: Plant, workload: Workload) -> None:
    config = plant.config
    totals = workload.prompt_tokens + workload.output_tokens
    for row in np.flatnonzero(totals > config.max_model_tokens)[:1]:
        raise ValueError(
            f"request {row} has {totals[row]} tokens, the simulated engine takes {config.max_model_tokens}: "
            "use workload.fitting(...), or raise max_model_tokens"
        )
