"""Judge a step-time model on iterations that it was not fitted to."""

import numpy as np

from envs.iterations import COMPOSITION, FloatArray, Iterations, stretches
from envs.step_mean import mean_step_s
from envs.step_time import StepTimeModel


def predict(model: StepTimeModel, iterations: Iterations) -> FloatArray:
    """Mean seconds of every iteration, shape [rows]."""
    columns = (getattr(iterations, name) for name in COMPOSITION)
    return np.array([mean_step_s(model.coefficients, *row) for row in zip(*columns, strict=True)])


def errors(model: StepTimeModel, iterations: Iterations) -> dict[str, dict[str, float]]:
    """Held-out errors of the mean: under "decode_only" and "mixed" (where there are any), and R2 under "all".

    Every row with a known time is judged, wild ones included. `median_error`, `mean_error` and `p90_error` are of
    |predicted / measured - 1| row by row, `bias` is that of the total time. Names that begin with `sums_` say the same
    of the stretches between two trusted time stamps (`envs.iterations.stretches`, which looks at no time): a row whose
    stamp came late is judged together with the neighbour that the delay was taken from. `r2` is over rows, `r2_sums`
    over the stretches' seconds per iteration, each with the weight of its rows. `covered` is the share of rows within
    the model's range. Raises ValueError if no row has a known time.
    """
    known = np.isfinite(iterations.seconds)
    if not known.any():
        raise ValueError(f"none of {len(iterations)} iterations has a known time: give a recording with load")
    joined = stretches(iterations)
    predicted_s = predict(model, iterations)
    sums_s, sums_known = joined.sums(predicted_s), np.isfinite(joined.seconds)
    report = {}
    for name, is_mixed in (("decode_only", False), ("mixed", True)):
        rows, sums = known & (iterations.mixed == is_mixed), sums_known & (joined.mixed == is_mixed)
        if rows.any():
            report[name] = _figures("", predicted_s[rows], iterations.seconds[rows])
            report[name] |= _figures("sums_", sums_s[sums], joined.seconds[sums]) if sums.any() else {}
    ones = np.ones(int(known.sum()))
    weight = joined.rows[sums_known].astype(np.float64)
    batches = np.stack([getattr(iterations, name)[known] for name in COMPOSITION], axis=1)
    report["all"] = {
        "count": float(known.sum()),
        "unknown_times": float((~known).sum()),
        "covered": float(model.covered(batches).mean()),
        "r2": _r2(predicted_s[known], iterations.seconds[known], ones),
        "r2_sums": _r2(sums_s[sums_known] / weight, joined.seconds[sums_known] / weight, weight),
    }
    return report


def _figures(prefix: str, predicted_s: FloatArray, measured_s: FloatArray) -> dict[str, float]:
    error = np.abs(predicted_s / measured_s - 1)
    figures = {
        "count": len(error),
        "median_error": np.median(error),
        "mean_error": error.mean(),
        "p90_error": np.quantile(error, 0.9),
        "bias": predicted_s.sum() / measured_s.sum() - 1,
    }
    return {prefix + name: float(value) for name, value in figures.items()}


def _r2(predicted: FloatArray, measured: FloatArray, weight: FloatArray) -> float:
    if len(measured) == 0 or np.ptp(measured) == 0:
        return float("nan")
    around_mean = np.sum(weight * (measured - np.average(measured, weights=weight)) ** 2)
    return float(1 - np.sum(weight * (measured - predicted) ** 2) / around_mean)
