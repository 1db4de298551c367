"""What a step-time model is fitted to: sums of features over stretches of iterations, for a choice of shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from envs.iterations import FloatArray, IntArray

SIZE_TOKENS = 16  # of `Regime.size_tokens`: engines cut budgets to tiles of so many
UNSIZED = ("decode_context_tokens", "prefill_attention_tokens2")  # attention: its kernels have tiles of their own


class Shape(NamedTuple):
    """What is chosen by held-out error."""

    stiffness: float
    fill_tokens: float = 0.0
    padded_sizes: tuple[float, ...] = ()
    tile_tokens: int = 1
    size_factors: tuple[float, ...] = ()

    def factors(self, tokens: FloatArray) -> FloatArray:
        """Of each row, what its size makes of its time but for attention."""
        size = np.ceil(tokens / SIZE_TOKENS).astype(np.int64) - 1
        return np.array((*self.size_factors, 1.0))[np.minimum(size, len(self.size_factors))]

    def padded(self, tokens: FloatArray) -> FloatArray:
        tiled = np.ceil(tokens / self.tile_tokens) * self.tile_tokens
        if not self.padded_sizes:
            return tiled
        sizes = np.array(self.padded_sizes)
        index = np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)
        return np.where(tokens <= sizes[-1], sizes[index], tiled)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The stretches of one regime with a known time, and the rows of that regime in them.

    `quantities` maps a curve's name to float64 [rows], and `knots` to where its slope may change; `first_row` is int64
    [stretches]. `seconds` is what the regime's rows of a stretch take together, `around_s` what its other rows take.
    `keys` is how many a chunk sees, [rows], None of decode-only rows.
    """

    quantities: Mapping[str, FloatArray]
    knots: Mapping[str, tuple[float, ...]]
    first_row: IntArray
    seconds: FloatArray
    around_s: FloatArray
    rows: IntArray
    fold: IntArray
    keys: FloatArray | None = None

    def features(self, shape: Shape) -> FloatArray:
        """Sums over each stretch: 1, then what of each quantity lies between two knots; [stretches, coefficients]."""
        factors = shape.factors(self.quantities["tokens"])
        columns = [factors]
        for name, knots in self.knots.items():
            x = shape.padded(self.quantities[name]) if name == "tokens" else self.quantities[name]
            if self.keys is not None and name == "prefill_attention_tokens2":
                x = np.maximum(x, shape.fill_tokens * self.keys)
            edges = (0.0, *knots, np.inf)
            factor = 1.0 if name in UNSIZED else factors
            columns += [np.clip(x - low, 0.0, high - low) * factor for low, high in pairwise(edges)]
        return np.add.reduceat(np.stack(columns, axis=1), self.first_row, axis=0)

    def penalty(self, shape: Shape) -> FloatArray:
        """Their products with the coefficients are to be small: changes of slope, in relative time at the last knot."""
        rows, at, width = [], 1, 1 + sum(len(knots) + 1 for knots in self.knots.values())
        scale = shape.stiffness * np.sqrt(self.rows.sum()) / np.median((self.seconds + self.around_s) / self.rows)
        for knots in self.knots.values():
            for i in range(len(knots)):
                row = np.zeros(width)
                row[at + i], row[at + i + 1] = scale * knots[-1], -scale * knots[-1]
                rows.append(row)
            at += len(knots) + 1
        return np.array(rows).reshape(-1, width)
