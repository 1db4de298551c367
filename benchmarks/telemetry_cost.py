"""What telemetry and knobs cost the engine in an iteration, with real sockets and a real controller process (pid).

Measured around exactly what the link adds to a step: `Actuator.read` (knobs that really arrived), `Reporter.launched`
(compose, encode, publish) and `Reporter.completed`; the empty measurement, taken in every iteration, is subtracted.
32 decodes and a prompt chunk are scheduled each time, the tokens of the iteration before are handed over to a server's
socket just before, as in `EngineCore.step`, and the answer is awaited in between, outside the measurement.

The figure is taken back to back. After a pause of 5 ms caches are cold and the processor that runs ZeroMQ's thread has
to be woken: that is measured too, and what a step costs that hands over no tokens and so wakes the thread by itself,
and the floor, a bare ZeroMQ send of as many bytes.
"""

import time

import numpy as np
import zmq
from numpy.typing import NDArray

from benchmarks.floor import WARM_UP, bare_echo, pause
from benchmarks.report import arguments, report
from benchmarks.sockets import controller_process, temporary_endpoints
from engine.actuator import Actuator
from engine.config import EngineConfig
from engine.link import Endpoints, EngineLink
from engine.process import RequestGate
from engine.protocol import StageTimes
from engine.request import SamplingParams, StepResult, Submit, TokenOutput
from engine.scheduler import Scheduler
from engine.telemetry import Reporter

GOAL_US = 30.0
STEP_S = 0.005
ANSWER_S = 0.05


class WatchedLink(EngineLink):
    """Tells when knobs are there, so that the loop can wait for them outside the measurement."""

    def wait(self) -> None:
        self._knobs.poll(round(ANSWER_S * 1000))


def measure(endpoints: Endpoints, pause_s: float, iterations: int, *, hand_over: bool = True) -> NDArray[np.float64]:
    """Microseconds of each iteration, shape [iterations]."""
    config = EngineConfig(kv_blocks=8192)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    scheduler = Scheduler(config)
    link = WatchedLink(context, [endpoints], "bench", config.bounds)
    actuator = Actuator(config, link)
    reporter = Reporter("bench", config, scheduler, link, time.monotonic_ns)
    gate, server = RequestGate(context, endpoints, vocab_size=2), context.socket(zmq.PULL)
    server.connect(endpoints.outputs)
    tokens = [TokenOutput(f"{i:032x}", 1) for i in range(32)]
    now = time.perf_counter_ns
    costs_us, answered = [], 0
    for i in range(WARM_UP + iterations):
        top_up(scheduler, i)
        t0 = now()
        t1 = now()  # what measuring itself takes
        knobs = actuator.read(t1)
        t2 = now()
        batch = scheduler.schedule(knobs.budget_tokens, knobs.chunk_tokens, t2)
        if hand_over:
            gate.send(tokens)
        t3 = now()
        reporter.launched(batch, knobs, 0, t2)
        t4 = now()
        link.wait()
        while hand_over and server.poll(0):
            server.recv()
        pause(pause_s)
        result = StepResult([1] * int(batch.samples.sum()), 0.08, (StageTimes(0.08, 0.0, 1),))
        output = scheduler.update(batch, result.token_ids, now())
        t5 = now()
        reporter.completed(result, output, t5)
        t6 = now()
        costs_us.append((t2 - t1 + t4 - t3 + t6 - t5 - 3 * (t1 - t0)) / 1e3)
        answered += knobs.iteration == reporter.iteration - 1
    link.close()
    context.destroy(linger=0)
    assert answered > 0.9 * iterations, "the controller did not answer: the figure would lack the knobs' cost"
    return np.array(costs_us[WARM_UP:])


def top_up(scheduler: Scheduler, i: int) -> None:
    """Keep 32 decodes and a queue of prompts."""
    while len(scheduler.waiting) < 4:
        scheduler.submit(Submit(f"prompt {i} {len(scheduler.waiting)}", [1] * 1500, SamplingParams(1)), 0)
    decodes = sum(r.id.startswith("decode") for r in (*scheduler.running, *scheduler.waiting))
    for row in range(32 - decodes):
        scheduler.submit(Submit(f"decode {i} {row}", [1] * 4, SamplingParams(max_tokens=2000)), 0)


def main() -> None:
    args = arguments(__doc__ or "")
    iterations = 500 if args.quick else 3000
    costs_us, floors_us = {}, {}
    for pause_s in (0.0, STEP_S):
        with temporary_endpoints() as endpoints, controller_process(endpoints, "pid"):
            costs_us[pause_s] = measure(endpoints, pause_s, iterations)
        floors_us[pause_s] = float(np.median(bare_echo(pause_s, iterations)[:, 0]))
    with temporary_endpoints() as endpoints, controller_process(endpoints, "pid"):
        alone_us = measure(endpoints, 0.0, iterations, hand_over=False)
    median, paused = (float(np.median(costs_us[pause_s])) for pause_s in (0.0, STEP_S))
    report(
        "telemetry and knobs per iteration, engine side (us, median)",
        median,
        f"<= {GOAL_US:.0f}",
        ok=median <= GOAL_US,
        seed=args.seed,
        p99_us=float(np.percentile(costs_us[0.0], 99)),
        share_of_5_ms_step_percent=100e-6 * median / STEP_S,
        without_tokens_us=float(np.median(alone_us)),
        bare_send_us=floors_us[0.0],
        after_5_ms_pause_us=paused,
        bare_send_after_5_ms_pause_us=floors_us[STEP_S],
    )


if __name__ == "__main__":
    main()
