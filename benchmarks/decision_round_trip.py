"""From publishing telemetry to holding the answer: a real controller process over real sockets, running pid.

The engine's end publishes telemetry of 32 decodes and a chunk every few milliseconds, as an engine would, and then
polls as fast as it can until the knobs are there.
"""

import time

import msgspec
import numpy as np
import zmq

from benchmarks.report import arguments, report
from benchmarks.sockets import controller_process, temporary_endpoints
from engine.config import EngineConfig
from engine.link import EngineLink
from engine.protocol import VERSION, BatchComposition, Completion, InForce, QueueState, StageTimes, Telemetry

MEDIAN_GOAL_US, P99_GOAL_US = 150.0, 500.0
STEP_S = 0.005


def message(iteration: int, config: EngineConfig, random: np.random.Generator) -> Telemetry:
    tbt_s = tuple((0.08 * np.exp(0.04 * random.standard_normal(32))).tolist())
    done = Completion(iteration - 1, 0, 0, 0.08, tbt_s, (), (StageTimes(0.08, 0.0, 1),))
    return Telemetry(
        version=VERSION,
        engine_id="bench",
        iteration=iteration,
        scheduled_ns=time.monotonic_ns(),
        schedule="stall-free",
        dead_time_iterations=1,
        knobs=InForce(256, 256, iteration - 1, iteration - 1, "controller"),
        bounds=config.bounds,
        batch=BatchComposition(32, 12000, 1, 224, (224,), (512,), 139776.0, 0),
        queue=QueueState(33, 4, 6000, 0.2, 1000, 736),
        kv_usage=0.4,
        preemptions=0,
        rejected_knobs=0,
        completed=(done,),
    )


def measure(link: EngineLink, config: EngineConfig, decisions: int, seed: int) -> np.ndarray:
    """Round trips in microseconds, of `decisions` messages that were answered."""
    random = np.random.default_rng(seed)
    times_us: list[float] = []
    iteration = 1
    while len(times_us) < decisions:
        iteration += 1
        telemetry = message(iteration, config, random)
        started = time.perf_counter_ns()
        link.publish(msgspec.structs.replace(telemetry, scheduled_ns=time.monotonic_ns()))
        knobs, waited_ns = None, 0
        while waited_ns < 50_000_000 and (knobs is None or knobs.iteration != iteration):
            knobs = link.poll() or knobs
            waited_ns = time.perf_counter_ns() - started
        if knobs is not None and knobs.iteration == iteration:
            times_us.append(waited_ns / 1e3)
        time.sleep(STEP_S)  # the device at work: the controller has gone back to sleep when the next one comes
    return np.array(times_us)


def main() -> None:
    args = arguments(__doc__ or "")
    config = EngineConfig()
    with temporary_endpoints() as endpoints, controller_process(endpoints, "pid"):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = EngineLink(context, [endpoints], "bench", config.bounds)
        times_us = measure(link, config, 500 if args.quick else 3000, args.seed)[100:]
        link.close()
        context.destroy(linger=0)
    median, p99 = (float(np.percentile(times_us, q)) for q in (50, 99))
    report(
        "decision round trip through sockets, pid (us, median)",
        median,
        f"<= {MEDIAN_GOAL_US:.0f}, p99 <= {P99_GOAL_US:.0f}",
        ok=median <= MEDIAN_GOAL_US and p99 <= P99_GOAL_US,
        seed=args.seed,
        p99_us=p99,
        share_of_5_ms_step_percent=100 * median / (STEP_S * 1e6),
    )


if __name__ == "__main__":
    main()
