"""A rehearsal, so that a law is ready when the first engine speaks."""

import contextlib

from engine.protocol import VERSION, BatchComposition, Bounds, Completion, InForce, QueueState, Telemetry
from policies.catalogue import Law

BOUNDS = Bounds(min_budget_tokens=16, max_budget_tokens=2048, tile_tokens=16, max_requests=64, kv_tokens=65536)
MS = 1_000_000


def rehearse(law: Law) -> None:
    """Let a law of its own making decide three times on made-up telemetry.

    What laws compile at their first decision takes seconds on a machine where it never ran, and the engines would fall
    back to their own knobs so long. Whether it decides well, or at all, is Guard's matter.
    """
    with contextlib.suppress(Exception):
        rehearsing = law.make(_telemetry(1))
        for iteration in range(1, 4):
            rehearsing.decide(_telemetry(iteration))


def _telemetry(iteration: int) -> Telemetry:
    begun_ns = 10 * MS * iteration
    before = Completion(
        *(iteration - 1, begun_ns - 10 * MS, begun_ns, 0.01),
        *((0.01, 0.01), (0, 1), (), (), (), ()),
    )
    return Telemetry(
        version=VERSION,
        engine_id="rehearsal",
        iteration=iteration,
        scheduled_ns=begun_ns,
        schedule="stall-free",
        dead_time_iterations=1,
        knobs=InForce(512, 512, 0, 0, "fallback"),
        bounds=BOUNDS,
        batch=BatchComposition(2, 200, 1, 100, (100,), (0,), 5000.0),
        queue=QueueState(3, 1, 500, 0.01, (100, 500), (0, 0)),
        kv_usage=0.1,
        preemptions=0,
        rejected_knobs=0,
        completed=(before,) if iteration > 1 else (),
    )
