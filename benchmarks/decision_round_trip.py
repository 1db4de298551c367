"""From publishing telemetry to holding the answer: a real controller process over real sockets, running pid.

The engine's end publishes telemetry of 32 decodes and a chunk, and polls until the knobs are there. The figure is
taken back to back. After a pause of 5 ms, a step's length, caches are cold and sleeping processors have to be woken at
every hop: that is measured too, and beside both the floor, the round trip of as many bytes through bare ZeroMQ.
"""

import time

import numpy as np
import zmq
from numpy.typing import NDArray

from benchmarks.floor import WARM_UP, bare_echo, pause
from benchmarks.report import arguments, report
from benchmarks.sockets import controller_process, temporary_endpoints
from engine.config import EngineConfig
from engine.link import EngineLink
from engine.protocol import VERSION, BatchComposition, Completion, InForce, QueueState, StageTimes, Telemetry

MEDIAN_GOAL_US, P99_GOAL_US = 150.0, 500.0
STEP_S = 0.005
ANSWER_NS = 50_000_000
MISSES = 200


def message(iteration: int, config: EngineConfig, random: np.random.Generator) -> Telemetry:
    tbt_s = tuple((0.08 * np.exp(0.04 * random.standard_normal(32))).tolist())
    now_ns = time.monotonic_ns()
    # Steps of 80 ms, as far as the law can see.
    ended_ns = iteration * 80_000_000
    done = Completion(
        iteration=iteration - 1,
        scheduled_ns=ended_ns - 80_000_000,
        completed_ns=ended_ns,
        device_s=0.08,
        tbt_s=tbt_s,
        tbt_slots=tuple(range(32)),
        ttft_s=(),
        ttft_slots=(),
        finished=(),
        stages=(StageTimes(0.08, 0.0, 1),),
    )
    return Telemetry(
        version=VERSION,
        engine_id="bench",
        iteration=iteration,
        scheduled_ns=now_ns,
        schedule="stall-free",
        dead_time_iterations=1,
        knobs=InForce(256, 256, iteration - 1, iteration - 1, "controller"),
        bounds=config.bounds,
        batch=BatchComposition(32, 12000, 1, 224, (224,), (512,), 139776.0, 0),
        queue=QueueState(33, 4, 6000, 0.2, (1000, *4 * (1500,)), (512, *4 * (0,))),
        kv_usage=0.4,
        preemptions=0,
        rejected_knobs=0,
        completed=(done,),
    )


def measure(pause_s: float, decisions: int, seed: int) -> NDArray[np.float64]:
    """Round trips in microseconds, shape [decisions]."""
    random, config = np.random.default_rng(seed), EngineConfig()
    times_us: list[float] = []
    iteration, missed = 1, 0
    with temporary_endpoints() as endpoints, controller_process(endpoints, "pid"):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = EngineLink(context, [endpoints], "bench", config.bounds)
        while len(times_us) < WARM_UP + decisions:
            iteration += 1
            telemetry = message(iteration, config, random)
            started = time.perf_counter_ns()
            link.publish(telemetry)
            knobs, waited_ns = None, 0
            while waited_ns < ANSWER_NS and (knobs is None or knobs.iteration != iteration):
                knobs = link.poll() or knobs
                waited_ns = time.perf_counter_ns() - started
            if knobs is not None:
                times_us.append(waited_ns / 1e3)
            else:  # until the controller has connected there is no answer
                missed += 1
                assert missed < MISSES, "the controller does not answer"
            pause(pause_s)
        link.close()
        context.destroy(linger=0)
    return np.array(times_us[WARM_UP:])


def main() -> None:
    args = arguments(__doc__ or "")
    decisions = 500 if args.quick else 3000
    times_us = {pause_s: measure(pause_s, decisions, args.seed) for pause_s in (0.0, STEP_S)}
    floors_us = {pause_s: bare_echo(pause_s, decisions)[:, 1] for pause_s in (0.0, STEP_S)}
    median, p99 = (float(np.percentile(times_us[0.0], q)) for q in (50, 99))
    report(
        "decision round trip through sockets, pid (us, median)",
        median,
        f"<= {MEDIAN_GOAL_US:.0f}, p99 <= {P99_GOAL_US:.0f}",
        ok=median <= MEDIAN_GOAL_US and p99 <= P99_GOAL_US,
        seed=args.seed,
        p99_us=p99,
        share_of_5_ms_step_percent=100e-6 * median / STEP_S,
        bare_zeromq_us=float(np.median(floors_us[0.0])),
        bare_zeromq_p99_us=float(np.percentile(floors_us[0.0], 99)),
        after_5_ms_pause_us=float(np.median(times_us[STEP_S])),
        after_5_ms_pause_p99_us=float(np.percentile(times_us[STEP_S], 99)),
        bare_zeromq_after_5_ms_pause_us=float(np.median(floors_us[STEP_S])),
        bare_zeromq_after_5_ms_pause_p99_us=float(np.percentile(floors_us[STEP_S], 99)),
    )


if __name__ == "__main__":
    main()
