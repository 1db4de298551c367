"""Sizes of steps: what kernels are launched with, and what a step is padded to where CUDA graphs are captured."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from engine.step_input import StepInput

# More keep the device busy for longer than Python needs to launch kernels one by one: on a slow host it takes 14 ms for
# the 32 layers of a 7B model, as long as 512 tokens keep an H200 busy.
_MIXED_TOKENS = range(32, 513, 32)
_SLOWER = 1.05  # times a larger step; less may be noise


@dataclass(frozen=True, slots=True)
class StepShape:
    """What kernels are launched with: of a step as it is, or upper bounds that it is padded to."""

    n_tokens: int
    n_rows: int
    n_sampled: int
    n_decodes: int
    max_query_tokens: int
    max_context_tokens: int

    @staticmethod
    def of(step: StepInput) -> "StepShape":
        return StepShape(
            n_tokens=len(step.token_ids),
            n_rows=len(step.n_tokens),
            n_sampled=len(step.sampled_rows),
            n_decodes=step.n_decodes,
            max_query_tokens=int(step.n_tokens.max()),
            max_context_tokens=int((step.context + step.n_tokens).max()),
        )


class PaddedSizes:
    """Which of `shapes` a step is padded to; one that fits none is computed as it is."""

    def __init__(self, shapes: Sequence[StepShape]) -> None:
        self.shapes = shapes
        self._fits: dict[tuple[int, int], StepShape | None] = {}

    def fit(self, n_tokens: int, n_rows: int) -> StepShape | None:
        """The cheapest shape that holds a step of this size; one token a row takes a shape of decodes."""
        size = n_tokens, n_rows
        if size not in self._fits:
            self._fits[size] = _smallest_fit(self.shapes, n_tokens, n_rows)
        return self._fits[size]

    def drop(self, shapes: Collection[StepShape]) -> None:
        """Pad steps to the others."""
        self.shapes = [shape for shape in self.shapes if shape not in shapes]
        self._fits.clear()

    def padding_tokens(self, n_tokens: int, n_rows: int) -> int:
        """How many tokens a step of this size computes in vain."""
        shape = self.fit(n_tokens, n_rows)
        return shape.n_tokens - n_tokens if shape else 0


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


def product_sizes(most_tokens: int) -> list[int]:
    """Numbers of tokens among which each kernel for matrix products has its own, ascending.

    Their tiles are multiples of 8 tokens: up to some hundred, tokens pick one of each, then the choice is coarser. What
    is no multiple of 8 has kernels of its own, so that beside each such size the one before it counts.
    """
    whole = {*range(8, 1025, 8), *range(1024, 2049, 16), *range(2048, 4097, 32), *range(4096, most_tokens, 256)}
    sizes = {*range(1, 513), *whole, *(size - 1 for size in whole), most_tokens}
    return sorted(size for size in sizes if size <= most_tokens)


def slower_than_larger(times_ms: Mapping[StepShape, float]) -> set[StepShape]:
    """Shapes that a larger one of their kind does better than: libraries have poor kernels for some sizes.

    On an H200 a step of 448 tokens took 14.8 ms, one of 480 took 10.2.
    """
    return {
        shape
        for shape, ms in times_ms.items()
        if any(
            ms > _SLOWER * larger_ms
            for larger, larger_ms in times_ms.items()
            if _is_mixed(larger) == _is_mixed(shape) and larger.n_tokens > shape.n_tokens
        )
    }


def _is_mixed(shape: StepShape) -> bool:
    return shape.max_query_tokens > 1


def _smallest_fit(shapes: Sequence[StepShape], n_tokens: int, n_rows: int) -> StepShape | None:
    one_each = n_tokens == n_rows
    fits = [
        shape
        for shape in shapes
        if _is_mixed(shape) != one_each and shape.n_tokens >= n_tokens and shape.n_rows >= n_rows
    ]
    return min(fits, key=lambda shape: shape.n_tokens, default=None)
