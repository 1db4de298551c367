"""Steps of a few sizes captured as CUDA graphs: replaying one costs the host a launch instead of hundreds."""

import logging
import statistics
from collections.abc import Callable, Collection

import torch

from engine.step_shapes import PaddedSizes, StepShape

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # kernels compile at their first run, and pick their way at the second
_BLAS_LIBRARIES = ("cublas", "cublaslt")  # the first is torch's default, used outside graphs
_TIMED_REPLAYS = 5
_LOG_EVERY = 10


class CudaGraphs(PaddedSizes):
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
        super().__init__(shapes)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self.times_ms: dict[StepShape, float] = {}
        self._max_outputs = max_outputs
        self._output: torch.Tensor | None = None
        start_s = seconds()
        for done, shape in enumerate(shapes, 1):
            fill(shape)
            self._capture(shape, compute)
            if done % _LOG_EVERY == 0 or done == len(shapes):
                logger.info("captured %d of %d CUDA graphs in %.1f s", done, len(shapes), seconds() - start_s)

    def drop(self, shapes: Collection[StepShape]) -> None:
        super().drop(shapes)
        for shape in shapes:
            del self._graphs[shape], self.times_ms[shape]

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Enqueue the step; returns its output, which the next replay overwrites, padding included."""
        assert self._output is not None
        self._graphs[shape].replay()
        return self._output

    def _capture(self, shape: StepShape, compute: Callable[[StepShape], torch.Tensor]) -> None:
        """With each library, of which the faster stays: which has the better kernels differs from size to size."""
        captured = [self._capture_with(library, shape, compute) for library in _BLAS_LIBRARIES]
        torch.backends.cuda.preferred_blas_library(_BLAS_LIBRARIES[0])
        times_ms = [_replay_ms(graph) for graph in captured]
        self.times_ms[shape] = min(times_ms)
        self._graphs[shape] = captured[times_ms.index(min(times_ms))]

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
