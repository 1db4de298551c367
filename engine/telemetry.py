"""Composes telemetry: what a batch is made of, and the measurements of the iterations that have ended."""

from collections import deque
from collections.abc import Callable

from engine.config import EngineConfig
from engine.link import Link
from engine.protocol import VERSION, BatchComposition, Completion, InForce, Telemetry
from engine.request import Batch, StepOutput, StepResult
from engine.scheduler import Scheduler

DEAD_TIME_ITERATIONS = 1
"""A decision about iteration N is in force in N+1, however many are in flight: once they are as many as there may be,
N+1 is formed when the oldest of them has ended, an iteration after the launch of N."""


class Reporter:
    """Publishes one message per iteration, and one when the engine goes idle."""

    def __init__(
        self, engine_id: str, config: EngineConfig, scheduler: Scheduler, link: Link, clock: Callable[[], int]
    ) -> None:
        self.iteration = 0
        self._engine_id = engine_id
        self._config = config
        self._bounds = config.bounds
        self._scheduler = scheduler
        self._link = link
        self._clock = clock
        self._in_flight: deque[tuple[int, int]] = deque()  # iteration, when it was scheduled
        self._completed: list[Completion] = []

    def launched(self, batch: Batch, knobs: InForce, padding_tokens: int, scheduled_ns: int) -> None:
        """Report iteration N while the device works on it, so that the answer is there when N+1 is formed."""
        self.iteration += 1
        self._in_flight.append((self.iteration, scheduled_ns))
        self._publish(batch, compose(batch, padding_tokens), knobs, scheduled_ns)

    def completed(self, result: StepResult, output: StepOutput, completed_ns: int) -> None:
        """Keep the measurements of the oldest iteration in flight for the next message."""
        iteration, scheduled_ns = self._in_flight.popleft()
        self._completed.append(
            Completion(
                iteration,
                scheduled_ns,
                completed_ns,
                result.device_s,
                tuple(output.tbt_s),
                tuple(output.tbt_slots),
                tuple(output.ttft_s),
                tuple(output.ttft_slots),
                tuple(output.finished),
                result.stages,
            )
        )

    def idle(self, knobs: InForce) -> None:
        """Report an empty batch: the last measurements get out, and a controller keeps in touch."""
        self._publish(None, BatchComposition(), knobs, self._clock())

    def _publish(self, batch: Batch | None, composition: BatchComposition, knobs: InForce, scheduled_ns: int) -> None:
        telemetry = Telemetry(
            version=VERSION,
            engine_id=self._engine_id,
            iteration=self.iteration,
            scheduled_ns=scheduled_ns,
            schedule=self._config.schedule,
            dead_time_iterations=DEAD_TIME_ITERATIONS,
            knobs=knobs,
            bounds=self._bounds,
            batch=composition,
            queue=self._scheduler.queue_state(batch, scheduled_ns),
            kv_usage=self._scheduler.blocks.usage,
            preemptions=self._scheduler.preemptions,
            rejected_knobs=self._link.rejected,
            completed=tuple(self._completed),
        )
        self._completed.clear()
        self._link.publish(telemetry)


def compose(batch: Batch, padding_tokens: int = 0) -> BatchComposition:
    """The composition of a batch as the wire tells it."""
    # Plain lists: for tens of rows they are several times cheaper than array operations.
    all_contexts: list[int] = batch.context.tolist()
    chunks: list[int] = batch.n_tokens[batch.n_decodes :].tolist()
    contexts = all_contexts[batch.n_decodes :]
    return BatchComposition(
        decode_tokens=batch.n_decodes,
        decode_context_tokens=sum(all_contexts[: batch.n_decodes]),
        prefill_requests=len(chunks),
        prefill_tokens=sum(chunks),
        prefill_chunk_tokens=tuple(chunks),
        prefill_context_tokens=tuple(contexts),
        prefill_attention_tokens2=sum(c * (context + 0.5 * c) for c, context in zip(chunks, contexts, strict=True)),
        padding_tokens=padding_tokens,
    )
