"""What telemetry and knobs cost the engine in an iteration, with real sockets and a real controller process (pid).

Measured around exactly what the link adds to a step: `Actuator.read` (knobs that really arrived), `Reporter.launched`
(compose, encode, publish) and `Reporter.completed`; the empty measurement, taken in every iteration, is subtracted.
32 decodes and a prompt chunk are scheduled each time. Between the calls the host waits 5 ms for its device by
spinning, as CUDA's synchronisation does by default; the second figure has a matrix product there instead, as on a CPU
engine, which leaves the caches cold.
"""

import time
from collections.abc import Callable

import numpy as np
import zmq

from benchmarks.report import arguments, report
from benchmarks.sockets import controller_process, temporary_endpoints
from engine.actuator import Actuator
from engine.config import EngineConfig
from engine.link import Endpoints, EngineLink
from engine.protocol import StageTimes
from engine.request import SamplingParams, StepResult, Submit
from engine.scheduler import Scheduler
from engine.telemetry import Reporter

GOAL_US = 30.0
STEP_S = 0.005


def spin() -> None:
    end_ns = time.perf_counter_ns() + round(STEP_S * 1e9)
    while time.perf_counter_ns() < end_ns:
        pass


def multiply() -> None:
    """About as long, through 12 MB of operands."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((256, 1024), np.float32)
    a @ rng.standard_normal((1024, 512), np.float32)


def measure(endpoints: Endpoints, device: Callable[[], None], iterations: int) -> np.ndarray:
    """Cost of each iteration, microseconds."""
    config = EngineConfig(kv_blocks=8192)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    scheduler = Scheduler(config)
    link = EngineLink(context, [endpoints], f"bench-{device.__name__}", config.bounds)
    actuator = Actuator(config, link)
    reporter = Reporter(f"bench-{device.__name__}", config, scheduler, link, time.monotonic_ns)
    now = time.perf_counter_ns
    costs_us, answered = [], 0
    for i in range(iterations):
        top_up(scheduler, i)
        t0 = now()
        t1 = now()  # what measuring itself takes
        knobs = actuator.read(time.monotonic_ns())
        t2 = now()
        batch = scheduler.schedule(knobs.budget_tokens, knobs.chunk_tokens, time.monotonic_ns())
        t3 = now()
        reporter.launched(batch, knobs)
        t4 = now()
        device()
        result = StepResult([1] * int(batch.samples.sum()), STEP_S, (StageTimes(STEP_S, 0.0, 1),))
        output = scheduler.update(batch, result.token_ids, time.monotonic_ns())
        t5 = now()
        reporter.completed(result, output, t5)
        t6 = now()
        costs_us.append((t2 - t1 + t4 - t3 + t6 - t5 - 3 * (t1 - t0)) / 1e3)
        answered += knobs.iteration == reporter.iteration - 1
    link.close()
    context.destroy(linger=0)
    assert answered > 0.5 * iterations, "the controller did not answer: the figure would lack the knobs' cost"
    return np.array(costs_us[100:])


def top_up(scheduler: Scheduler, i: int) -> None:
    """Keep 32 decodes and a queue of prompts."""
    while len(scheduler.waiting) < 4:
        scheduler.submit(Submit(f"prompt {i} {len(scheduler.waiting)}", [1] * 1500, SamplingParams(1)), 0)
    for row in range(32 - sum(r.id.startswith("decode") for r in scheduler.running)):
        scheduler.submit(Submit(f"decode {i} {row}", [1] * 4, SamplingParams(max_tokens=2000)), 0)


def main() -> None:
    args = arguments(__doc__ or "")
    iterations = 600 if args.quick else 3000
    costs = {}
    for device in (spin, multiply):
        with temporary_endpoints() as endpoints, controller_process(endpoints, "pid"):
            costs[device] = measure(endpoints, device, iterations)
    median = float(np.median(costs[spin]))
    report(
        "telemetry and knobs per iteration, engine side (us, median)",
        median,
        f"<= {GOAL_US:.0f}",
        ok=median <= GOAL_US,
        seed=args.seed,
        p99_us=float(np.percentile(costs[spin], 99)),
        share_of_5_ms_step_percent=100 * median / (STEP_S * 1e6),
        median_with_cold_caches_us=float(np.median(costs[multiply])),
    )


if __name__ == "__main__":
    main()
