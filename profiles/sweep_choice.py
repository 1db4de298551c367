"""Which batch a sweep times next: the one whose time is known least for what it costs to know.

A linear model of the features f of a batch (those of `envs.step_time_fit`: piecewise linear in tokens, context and W)
that is fitted by relative errors knows the time t of a batch with a relative variance proportional to its leverage

    x' (sum x x' over what was measured)^-1 x,      x = f / t,

so the batch of the greatest leverage is the one whose time, relative to itself, is the least certain (this is the
greedy step of a D-optimal design: Fedorov, Theory of Optimal Experiments, 1972). Extremes come first: batches grow, in
as many quantities at once as there are, up to the largest. What they take is not known before, so each is at most
`GROWTH` times as large as those measured before it.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import nnls

from envs.iterations import BoolArray, FloatArray
from profiles.sweep_points import Point

RIDGE = 1e-6
KNOTS = 4
LEAST_MEASURED = 4
GROWTH = 8.0
COST = 0.5  # exponent of a batch's time: 0 asks for certainty at any price, 1 for the most in a second


class Choice:
    """Gives one candidate after the other, and learns from the time that each took."""

    def __init__(self, points: Sequence[Point]) -> None:
        """Raises ValueError if there is none. What is expected to take longer than `longest_s` is never asked for."""
        if not points:
            raise ValueError("too small an engine for any batch: raise its KV blocks, its budget or its model length")
        self.longest_s = np.inf
        self._points = list(points)
        values = np.array([point.features for point in points], np.float64)
        self._regimes = [
            _Regime(np.flatnonzero(chosen), values[chosen])
            for chosen in (values[:, 3] == 0, values[:, 3] > 0)
            if chosen.any()
        ]
        self._index = {point: i for i, point in enumerate(points)}

    def next(self) -> Point | None:
        """None once all were measured. Each regime gets a quarter at least, and an early end leaves enough of both."""
        scores = [regime.scores(self.longest_s) for regime in self._regimes]
        counts = np.array([regime.measured.sum() for regime in self._regimes])
        open_ = [i for i, of_regime in enumerate(scores) if of_regime.max() >= 0]
        if not open_:
            return None
        behind = [i for i in open_ if counts[i] <= counts.sum() / 4]
        best = max(behind or open_, key=lambda i: float(scores[i].max()))
        return self._points[int(self._regimes[best].rows[int(scores[best].argmax())])]

    def learn(self, point: Point, seconds: float) -> None:
        row = self._index[point]
        for regime in self._regimes:
            if row in regime.rows:
                regime.learn(int(np.searchsorted(regime.rows, row)), seconds)


class _Regime:
    """Decode-only or mixed batches, which are fitted apart. `rows` are their places among all candidates."""

    def __init__(self, rows: "np.typing.NDArray[np.int64]", values: FloatArray) -> None:
        self.rows = rows
        self.measured: BoolArray = np.zeros(len(rows), np.bool_)
        self._values = values
        self._reach = np.array([x[x > 0].min() if x.any() else 1.0 for x in values.T])
        self._features = _features(values)
        self._seconds: FloatArray = np.zeros(len(rows))

    def learn(self, index: int, seconds: float) -> None:
        self.measured[index] = True
        self._seconds[index] = seconds
        self._reach = np.maximum(self._reach, self._values[index])

    def scores(self, longest_s: float) -> FloatArray:
        """By growth, then by leverage and cost, of what is not measured and not too long; -1 for others. [rows]"""
        expected_s = self._expected_s()
        x = self._features / expected_s[:, None]
        known = x[self.measured]
        information = known.T @ known + RIDGE * np.median((x * x).sum(axis=1)) * np.eye(x.shape[1])
        leverage = np.einsum("ij,ji->i", x, np.linalg.solve(information, x.T))
        wanted = ~self.measured & (expected_s <= longest_s)
        factor = np.maximum(self._values / self._reach, 1.0)
        near = wanted & (factor <= GROWTH).all(axis=1)
        growth = np.where(near, np.log(factor).sum(axis=1), 0.0)
        if growth.max() > np.log(GROWTH) / 2:
            return np.where(near, growth, -1.0)
        return np.where(near if near.any() else wanted, leverage / expected_s**COST, -1.0)

    def _expected_s(self) -> FloatArray:
        """Non-negative least squares on what was measured, never below the least of it; the same for all at first."""
        seconds = self._seconds[self.measured]
        if len(seconds) < LEAST_MEASURED:
            return np.full(len(self.rows), seconds.min(initial=1e-3))
        coefficients = nnls(self._features[self.measured] / seconds[:, None], np.ones(len(seconds)))[0]
        expected_s: FloatArray = np.maximum(self._features @ coefficients, seconds.min())
        return expected_s


def _features(values: FloatArray) -> FloatArray:
    """1, then what of each quantity lies between two knots, as a share of the most there is; [rows, features]."""
    columns = [np.ones(len(values))]
    for i, x in enumerate(values.T):
        bent = i in (0, 2, 4)  # tokens, context, W
        positive = x[x > 0]
        knots = np.geomspace(positive.min(), positive.max(), KNOTS + 2)[1:-1] if bent and positive.size else ()
        edges = (0.0, *knots, np.inf)
        columns += [np.clip(x - low, 0.0, high - low) for low, high in pairwise(edges)]
    matrix = np.stack(columns, axis=1)
    most = matrix.max(axis=0)
    scaled: FloatArray = matrix[:, most > 0] / most[most > 0]
    return scaled
