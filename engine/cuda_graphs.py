"""Steps of a few sizes captured as CUDA graphs: replaying one costs the host a launch instead of hundreds."""

import logging
import statistics
from collections.abc import Callable

import torch

from engine.packed_inputs import StepShape

logger = logging.getLogger(__name__)

_MIXED_TOKENS = (32, 64, 96, 128)  # more keep the device busy for longer than Python needs to launch kernels one by one
_WARM_UPS = 2  # kernels compile at their first run, and pick their way at the second
_BLAS_LIBRARIES = ("cublas", "cublaslt")  # the first is torch's default, used outside graphs
_TIMED_REPLAYS = 5
_LOG_EVERY = 10


def decode_sizes(max_requests: int) -> list[int]:
    """Batch sizes of decodes that get a graph, up to `max_requests` itself."""
    sizes = {1, 2, 4, *range(8, 257, 8), *range(288, max_requests, 32), max_requests}
    return sorted(size for size in sizes if size <= max_requests)


def graph_shapes(max_requests: int, max_budget_tokens: int, max_model_tokens: int, mixed: bool) -> list[StepShape]:
    """The steps worth a graph, largest first: those of one token a row, and small ones that hold prompt chunks, too."""
    shapes = [StepShape(n, n, n, n, 1, max_model_tokens) for n in decode_sizes(max_requests)]
    if mixed:
        for n_tokens in _MIXED_TOKENS:
            n_rows = min(max_requests, n_tokens)
            if n_tokens <= max_budget_tokens:
                shapes.append(StepShape(n_tokens, n_rows, n_rows, 0, n_tokens, max_model_tokens))
    return sorted(shapes, key=lambda shape: shape.n_tokens, reverse=True)


def smallest_fit(shapes: list[StepShape], n_tokens: int, n_rows: int) -> StepShape | None:
    """The cheapest of `shapes` that a step of this size can be padded to; one token a row takes a decode graph."""
    one_each = n_tokens == n_rows
    fits = [
        shape
        for shape in shapes
        if (shape.max_query_tokens == 1) == one_each and shape.n_tokens >= n_tokens and shape.n_rows >= n_rows
    ]
    return min(fits, key=lambda shape: shape.n_tokens, default=None)


class CudaGraphs:
    """Graphs of `shapes`, largest first, in one pool of memory: they run one at a time.

    `compute(shape)` computes a step of that shape from static inputs, prepared by `fill(shape)`, and returns its output
    [n, width], n at most `max_outputs`. `seconds` is a clock.
    """

    def __init__(
        self,
        shapes: list[StepShape],
        max_outputs: int,
        fill: Callable[[StepShape], None],
        compute: Callable[[StepShape], torch.Tensor],
        seconds: Callable[[], float],
    ) -> None:
        self.shapes = shapes
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._fits: dict[tuple[int, int], StepShape | None] = {}
        self._max_outputs = max_outputs
        self._output: torch.Tensor | None = None
        start_s = seconds()
        for done, shape in enumerate(shapes, 1):
            fill(shape)
            self._capture(shape, compute)
            if done % _LOG_EVERY == 0 or done == len(shapes):
                logger.info("captured %d of %d CUDA graphs in %.1f s", done, len(shapes), seconds() - start_s)

    def fit(self, n_tokens: int, n_rows: int) -> StepShape | None:
        """What a step of this size is padded to, if there is a graph for it."""
        size = n_tokens, n_rows
        if size not in self._fits:
            self._fits[size] = smallest_fit(self.shapes, n_tokens, n_rows)
        return self._fits[size]

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Enqueue the step; returns its output, which the next replay overwrites, padding included."""
        assert self._output is not None
        self._graphs[shape].replay()
        return self._output

    def _capture(self, shape: StepShape, compute: Callable[[StepShape], torch.Tensor]) -> None:
        """With each library, of which the faster stays: which has the better kernels differs from size to size."""
        captured = [self._capture_with(library, shape, compute) for library in _BLAS_LIBRARIES]
        torch.backends.cuda.preferred_blas_library(_BLAS_LIBRARIES[0])
        self._graphs[shape] = min(captured, key=_replay_ms)

    def _capture_with(
        self, library: str, shape: StepShape, compute: Callable[[StepShape], torch.Tensor]
    ) -> torch.cuda.CUDAGraph:
        torch.backends.cuda.preferred_blas_library(library)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                self._keep(compute(shape))
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: a thread of NCCL's looks at its events meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            self._keep(compute(shape))
        return graph

    def _keep(self, output: torch.Tensor) -> None:
        """Copied out of the pool: held there, each graph's output would take memory of its own."""
        if self._output is None:
            self._output = output.new_empty((self._max_outputs, output.shape[1]))
        self._output[: len(output)].copy_(output)


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """The median of a few."""
    times_ms = []
    for _ in range(_TIMED_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(float(begin.elapsed_time(end)))
    return statistics.median(times_ms)
