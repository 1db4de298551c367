"""Prometheus metrics: vLLM's names, so that its dashboards go on working, and Pacer's own beside them."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.protocol import Telemetry
from engine.request import FinishReason

LATENCY_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
# Finer than vLLM's below 100 ms: that is where a TBT promise is kept or broken.
TOKEN_GAP_S = (
    0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_TOKENS = tuple(float(2**power) for power in (0, *range(3, 15)))


class Metrics:
    """One served model's metrics in a registry of their own; every sample has labels `model_name` and `engine`.

    The HTTP server calls the request methods, the telemetry subscription `observe_telemetry`. The prefix cache's
    counters exist only with `prefix_caching`. Durations are seconds.
    """

    def __init__(self, model_name: str, engine_name: str, prefix_caching: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": engine_name}
        self._prefix_caching = prefix_caching
        self._engine_id = ""
        self._preemptions_seen = 0
        self._rejected_seen = 0
        self._make_request_metrics()
        self._make_engine_metrics()

    def first_token(self, prompt_tokens: int, cached_tokens: int, ttft_s: float, queue_s: float | None) -> None:
        """`queue_s` is None if the engine did not say how long the request waited."""
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc()
        self._ttft.observe(ttft_s)
        if queue_s is not None:
            self._queue_time.observe(queue_s)
        if self._prefix_caching:
            self._prefix_queries.inc(prompt_tokens)
            self._prefix_hits.inc(cached_tokens)

    def next_token(self, gap_s: float) -> None:
        self._generation_tokens.inc()
        self._token_gap.observe(gap_s)

    def completed(self, reason: FinishReason, e2e_s: float, decode_s: float, output_tokens: int) -> None:
        """`decode_s` lies between the first and the last of `output_tokens` tokens."""
        self._success[reason].inc()
        self._e2e.observe(e2e_s)
        if output_tokens > 1:
            self._tpot.observe(decode_s / (output_tokens - 1))

    def aborted(self) -> None:
        """A request ended without its whole output: its client left, or the engine did."""
        self._success[FinishReason.ABORT].inc()

    def observe_telemetry(self, telemetry: Telemetry) -> None:
        """Take over one iteration's message. Its counts since the engine's start become increments."""
        if telemetry.engine_id != self._engine_id:
            self._engine_id = telemetry.engine_id
            self._preemptions_seen = self._rejected_seen = 0
        self._running.set(telemetry.queue.running_requests)
        self._waiting.set(telemetry.queue.waiting_requests)
        self._waiting_prompt_tokens.set(telemetry.queue.waiting_prompt_tokens)
        self._kv_usage.set(telemetry.kv_usage)
        self._preemptions.inc(max(0, telemetry.preemptions - self._preemptions_seen))
        self._rejected_knobs.inc(max(0, telemetry.rejected_knobs - self._rejected_seen))
        self._preemptions_seen = telemetry.preemptions
        self._rejected_seen = telemetry.rejected_knobs
        self._token_budget.set(telemetry.knobs.budget_tokens)
        self._chunk_tokens.set(telemetry.knobs.chunk_tokens)
        for source, gauge in self._knobs_source.items():
            gauge.set(source == telemetry.knobs.source)
        if telemetry.batch.total_tokens:  # an idle engine reports empty batches, which are no iterations
            self._iteration_tokens.observe(telemetry.batch.total_tokens)
        for completion in telemetry.completed:
            self._step.observe(completion.device_s)

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self._registry)

    def _make_request_metrics(self) -> None:
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests with a first token.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Output tokens.")
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", LATENCY_S)
        self._token_gap = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two output tokens of a request.", TOKEN_GAP_S
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean gap after its first token.", TOKEN_GAP_S
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", REQUEST_S)
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "Arrival at the engine to first scheduled.", REQUEST_S
        )
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._success = {
            reason: success.labels(**self._labels, finished_reason=reason.value) for reason in FinishReason
        }
        if self._prefix_caching:
            self._prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.")
            self._prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")

    def _make_engine_metrics(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests not yet scheduled.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.")
        self._preemptions = self._counter("vllm:num_preemptions", "Requests put back for want of KV blocks.")
        self._iteration_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in an iteration.", STEP_TOKENS
        )
        self._token_budget = self._gauge("pacer:token_budget", "Token budget in force.")
        self._chunk_tokens = self._gauge("pacer:chunk_tokens", "Chunk size in force, tokens.")
        self._rejected_knobs = self._counter("pacer:rejected_knobs", "Knobs messages the engine rejected.")
        self._step = self._histogram("pacer:step_seconds", "Device time of an iteration.", TOKEN_GAP_S)
        self._waiting_prompt_tokens = self._gauge("pacer:waiting_prompt_tokens", "Prompt tokens not yet scheduled.")
        source = Gauge(
            "pacer:knobs_source",
            "1 for where the knobs in force come from.",
            [*self._labels, "source"],
            registry=self._registry,
        )
        self._knobs_source = {name: source.labels(**self._labels, source=name) for name in ("controller", "fallback")}

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, list(self._labels), buckets=buckets, registry=self._registry).labels(
            **self._labels
        )
