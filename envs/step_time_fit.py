"""Fit a step-time model to measured iterations.

Decode-only and mixed iterations are fitted apart, each by non-negative least squares on piecewise-linear features:
relative errors, Huber's weights, so that a few wild rows do not matter, and a penalty on changes of slope. Rows whose
time stamps cannot be trusted one by one enter as sums (`envs.iterations.stretches`). How stiff the curves are,
whether tokens are padded to CUDA graph sizes or tiles, how many fill the device, and whether what was measured size by
size tells of other batches, is what predicts left-out runs best.
"""

import functools
import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import nnls

from envs.iterations import COMPOSITION, BoolArray, FloatArray, IntArray, Iterations, Stretches, stretches
from envs.step_mean import step_parts
from envs.step_time import N_RESIDUALS, VERSION, Curve, Description, Range, Regime, StepTimeModel
from envs.step_time_error import predict
from envs.step_time_features import SIZE_TOKENS, Part, Shape

# vLLM's capture sizes (vllm/config, cudagraph_capture_sizes).
GRAPH_SIZES = (1.0, 2.0, 4.0, *map(float, range(8, 256, 8)), *map(float, range(256, 513, 16)))
TILES = (16, 64, 128, 256)
FILLS = tuple(2.0**i for i in range(6, 13))  # and a quarter less or more than the best of them
STIFFNESS = (0.001, 0.01, 0.1, 1.0)
STANDARD_ERRORS = 2.0  # by which a staircase (a discontinuity to every law) or a fill must lower the held-out error
KNOTS = 2
FOLDS = 10
LEAST_STRETCHES = 20
HUBER = 1.345  # 95 % efficient if the noise is normal
ARTEFACT_DEVIATIONS = 6.0
REWEIGHTINGS = 40
LEAST_FACTOR = 0.1  # of the mean: no iteration takes less, whatever two stamps say


def fit(iterations: Iterations, sources: Sequence[str] = (), sizes: Iterations | None = None) -> StepTimeModel:
    """The step-time model of these iterations; `sources` are names kept as its provenance. `sizes` are mixed ones
    alike but for their size, all sizes up to some bound, timed one by one: they give `Regime.size_factors`.

    Held-out errors leave out whole runs, a tenth of them at a time, or a tenth of the time if there are under ten runs.
    A sum beyond six robust standard deviations, on either side, does not count in the mean. Of intervals it is taken
    for a stamp gone wrong and left out of the residuals, too; of device times these hold all. The residuals are those
    of single iterations, as far as sums tell (`_with_residuals`). Raises ValueError if a regime has too few iterations.
    """
    joined = stretches(iterations)
    held_out = {}
    nothing_s = np.zeros(len(joined.rows))
    decode_only, held_out["decode_only"] = _fit_regime(iterations, joined, nothing_s, None, mixed=False)
    draft = Description(VERSION, True, decode_only, Regime(0.0))
    alone_s = np.where(iterations.mixed, 0.0, predict(StepTimeModel(draft), iterations))
    mixed, held_out["mixed"] = _fit_regime(iterations, joined, joined.sums(alone_s), sizes, mixed=True)
    predicted_s = predict(StepTimeModel(Description(VERSION, True, decode_only, mixed)), iterations)
    decode_only, taken_alone = _with_residuals(decode_only, iterations, joined, predicted_s, mixed=False)
    mixed, taken_mixed = _with_residuals(mixed, iterations, joined, predicted_s, mixed=True)
    provenance = {
        "sources": list(sources),
        "iterations": {"decode_only": int((~iterations.mixed).sum()), "mixed": int(iterations.mixed.sum())},
        "residuals": {"decode_only": taken_alone, "mixed": taken_mixed},
        "seconds": "interval_s" if iterations.intervals else "device_s",
        "versions": {name: importlib.metadata.version(name) for name in ("pacer", "numpy", "scipy")},
    }
    return StepTimeModel(Description(VERSION, True, decode_only, mixed, held_out, provenance))


def _with_residuals(
    regime: Regime, iterations: Iterations, joined: Stretches, predicted_s: FloatArray, *, mixed: bool
) -> tuple[Regime, dict[str, int]]:
    """The regime with its noise, and how many stretches, with how many of its rows, that is of.

    What the other rows should take is subtracted. Where stamps cannot be trusted one by one, the noise of the rows of a
    stretch averages out, so the factors of long stretches are too small; those of short ones are too large, since their
    own stamps are late or early. On recorded runs of an asynchronous engine, all stretches together come nearest to the
    measured P99 of TBT. A recording with device times needs no such choice.
    """
    own = iterations.mixed == mixed
    rows = joined.sums(own.astype(np.float64)).astype(np.int64)
    total_s = joined.sums(predicted_s)
    chosen = (joined.mixed == mixed) & np.isfinite(joined.seconds)
    if iterations.intervals:
        chosen = _without_artefacts(joined.seconds / total_s, chosen)
    scale_s = joined.sums(np.where(own, predicted_s, 0.0))
    ratio = 1 + (joined.seconds - total_s)[chosen] / scale_s[chosen]
    factors = np.maximum(_quantiles(ratio, rows[chosen]), LEAST_FACTOR)
    residuals = tuple(np.round(factors / factors.mean(), 6).tolist())
    taken = {"stretches": int(chosen.sum()), "iterations": int(rows[chosen].sum())}
    return msgspec.structs.replace(regime, residuals=residuals), taken


def _fit_regime(
    iterations: Iterations, joined: Stretches, around_s: FloatArray, sizes: Iterations | None, *, mixed: bool
) -> tuple[Regime, dict[str, float]]:
    part = _part(iterations, joined, around_s, mixed=mixed)
    shape, predicted_s = _choose(part, TILES if mixed else (), sizes)
    known = iterations.rows(np.isfinite(iterations.seconds) & (iterations.mixed == mixed))
    limits = [(float(x.min()), float(x.max())) for x in (getattr(known, name) for name in COMPOSITION)]
    error = np.abs(predicted_s / (part.seconds + part.around_s) - 1)
    figures = {"median_error": np.median(error), "mean_error": error.mean(), "p90_error": np.quantile(error, 0.9)}
    return msgspec.structs.replace(_fitted(part, shape), measured=Range(*limits)), {
        "sums_count": float(len(error)),
        **{f"sums_{name}": round(float(x), 5) for name, x in figures.items()},
    }


def _fitted(part: Part, shape: Shape) -> Regime:
    features = part.features(shape)
    coefficients = _solve(part, features, shape, np.ones(len(part.rows), np.bool_))
    # Huber's fit is nearer to the median than to the mean: lift it to the mean, but not by what a stall took.
    ratio = (part.seconds + part.around_s) / (features @ coefficients + part.around_s)
    kept = _without_artefacts(ratio, np.isfinite(ratio))
    coefficients = coefficients * _quantiles(ratio[kept], part.rows[kept]).mean()
    curves: dict[str, Any] = {}
    at = 1
    for name, knots in part.knots.items():
        curves[name] = Curve((0.0, *knots), tuple(coefficients[at : at + len(knots) + 1].tolist()))
        at += len(knots) + 1
    return Regime(
        float(coefficients[0]),
        **curves,
        padded_sizes=shape.padded_sizes,
        tile_tokens=shape.tile_tokens,
        fill_tokens=shape.fill_tokens,
        size_tokens=SIZE_TOKENS,
        size_factors=shape.size_factors,
    )


def _size_factors(regime: Regime, sizes: Iterations) -> tuple[float, ...]:
    """What the median iteration of each size took over what the regime says, but for attention; else 1."""
    coefficients = StepTimeModel(Description(VERSION, False, Regime(0.0), regime)).coefficients
    batches = np.stack([getattr(sizes, name) for name in COMPOSITION], axis=1)
    _, others_s, *attention_s = np.array([step_parts(coefficients, *batch) for batch in batches]).T
    factors = (sizes.seconds - sum(attention_s)) / others_s
    size = np.ceil((sizes.decode_tokens + sizes.prefill_tokens) / SIZE_TOKENS).astype(np.int64) - 1
    medians = {k: float(np.median(factors[size == k])) for k in np.unique(size).tolist()}
    return tuple(round(max(medians.get(k, 1.0), LEAST_FACTOR), 4) for k in range(size.max() + 1))


def _part(iterations: Iterations, joined: Stretches, around_s: FloatArray, *, mixed: bool) -> Part:
    stretch = (joined.mixed == mixed) & np.isfinite(joined.seconds)
    row = stretch[joined.of_row] & (iterations.mixed == mixed)
    name = "mixed" if mixed else "decode-only"
    if stretch.sum() < LEAST_STRETCHES:
        untimed = int((np.isnan(iterations.seconds) & (iterations.mixed == mixed)).sum())
        more = f"; {untimed} more have no interval: load_iterations(PATH, 'device_s') reads the device's own times"
        raise ValueError(
            f"{stretch.sum()} stretches of {name} iterations; a fit needs {LEAST_STRETCHES}: record for longer, under "
            "a load that now and then has prompts waiting and now and then has none" + more * (untimed > 0)
        )
    chosen = iterations.rows(row)
    quantities = {"tokens": chosen.decode_tokens + chosen.prefill_tokens}
    bent, keys = ["tokens"], None
    if mixed:
        keys = chosen.prefill_attention_tokens2 / chosen.prefill_tokens
        keys += chosen.prefill_tokens / np.maximum(chosen.prefill_requests, 1) / 2
        quantities["decodes"] = chosen.decode_tokens
        quantities["prefill_requests"] = chosen.prefill_requests
        quantities["prefill_attention_tokens2"] = chosen.prefill_attention_tokens2
        bent.append("prefill_attention_tokens2")
    else:
        bent.append("decode_context_tokens")
    quantities["decode_context_tokens"] = chosen.decode_context_tokens
    knots = {name: _knots(x) if name in bent else () for name, x in quantities.items()}
    first_row = np.flatnonzero(np.diff(joined.of_row[row], prepend=-1))
    run = chosen.runs[first_row]
    numbers = np.unique(run, return_inverse=True)[1]
    fold = numbers % FOLDS if numbers.max() + 1 >= FOLDS else np.arange(len(run)) * FOLDS // len(run)
    seconds = joined.seconds[stretch] - around_s[stretch]
    return Part(quantities, knots, first_row, seconds, around_s[stretch], joined.rows[stretch], fold, keys)


def _knots(x: FloatArray) -> tuple[float, ...]:
    """Up to two, evenly apart on a logarithmic scale, from the 5th to the 99th percentile of what is above 0.

    Large batches are few, but most of the time goes to them.
    """
    low, high = np.quantile(x[x > 0], [0.05, 0.99]) if (x > 0).any() else (1.0, 1.0)
    knots = np.unique(np.round(np.geomspace(max(low, 1.0), max(high, 1.0), KNOTS + 2)[1:-1]))
    return tuple(knots.tolist()) if high > 2 * low else ()


def _choose(part: Part, tiles: Iterable[int], sizes: Iterations | None) -> tuple[Shape, FloatArray]:
    """The shape of least held-out error, and the seconds of each stretch predicted by a fit without its fold."""
    folds = [part.fold == fold for fold in np.unique(part.fold)]

    @functools.cache
    def held_out(shape: Shape) -> tuple[FloatArray, FloatArray]:
        features, predicted_s = part.features(shape), part.around_s.copy()
        for fold in folds:
            predicted_s[fold] += features[fold] @ _solve(part, features, shape, ~fold)
        error = np.abs(predicted_s / (part.seconds + part.around_s) - 1)
        return np.array([np.minimum(error[fold], 1.0).mean() for fold in folds]), predicted_s

    def better(plain: Shape, **choices: Iterable[Any]) -> Shape:
        best, least = plain, 0.0
        for shape in (plain._replace(**{name: choice}) for name, several in choices.items() for choice in several):
            change = held_out(shape)[0] - held_out(plain)[0]
            if change.mean() < min(least, -STANDARD_ERRORS * change.std(ddof=1) / np.sqrt(len(folds))):
                best, least = shape, float(change.mean())
        return best

    shape = Shape(STIFFNESS[1])
    if part.keys is not None:
        shape = better(shape, fill_tokens=FILLS)
        shape = better(shape, fill_tokens=(0.75 * shape.fill_tokens, 1.25 * shape.fill_tokens))
    shape = min((shape._replace(stiffness=s) for s in STIFFNESS), key=lambda shape: float(held_out(shape)[0].mean()))
    shape = better(shape, padded_sizes=(GRAPH_SIZES,), tile_tokens=tiles)
    if sizes is not None:
        shape = better(shape, size_factors=(_size_factors(_fitted(part, shape), sizes),))
    return shape, held_out(shape)[1]


def _solve(part: Part, features: FloatArray, shape: Shape, chosen: BoolArray) -> FloatArray:
    """Coefficients of the chosen stretches: iteratively reweighted, none below 0."""
    x, seconds, around_s, rows = features[chosen], part.seconds[chosen], part.around_s[chosen], part.rows[chosen]
    penalty = part.penalty(shape)
    expected_s, weight = seconds + around_s, np.ones(len(seconds))
    coefficients = np.zeros(x.shape[1])
    for _ in range(REWEIGHTINGS):
        scale = np.sqrt(weight * rows) / expected_s
        equations = np.vstack([x * scale[:, None], penalty])
        unit = np.linalg.norm(equations, axis=0)
        unit[unit == 0] = 1.0
        # The normal equations of a score of scaled unknowns: small, and NNLS takes their Cholesky factor as well.
        gram = (equations / unit).T @ (equations / unit) + 1e-12 * np.eye(len(unit))
        target = (equations / unit)[: len(seconds)].T @ (seconds * scale)
        factor = np.linalg.cholesky(gram)
        before, coefficients = coefficients, nnls(factor.T, np.linalg.solve(factor, target))[0] / unit
        if np.allclose(before, coefficients, rtol=1e-6, atol=0):
            break
        expected_s = np.maximum(x @ coefficients + around_s, 1e-9)
        error = (seconds + around_s) / expected_s - 1
        spread = max(1.4826 * float(np.median(np.abs(error))), 1e-4)
        weight = np.minimum(1.0, HUBER * spread / np.maximum(np.abs(error), 1e-9))
    return coefficients


def _without_artefacts(ratio: FloatArray, chosen: BoolArray) -> BoolArray:
    """Those of the chosen within six robust standard deviations of their median, on a logarithmic scale."""
    logarithm = np.log(np.where(chosen, ratio, 1.0))
    centre = np.median(logarithm[chosen])
    spread = max(1.4826 * float(np.median(np.abs(logarithm[chosen] - centre))), 1e-4)
    near: BoolArray = np.abs(logarithm - centre) <= ARTEFACT_DEVIATIONS * spread
    return chosen & near


def _quantiles(ratio: FloatArray, rows: IntArray) -> FloatArray:
    """Equally likely ratios, ascending, shape [256]; a ratio has the weight of its rows. The outermost 0.2 % on either
    side do not show, such as a first batch that waits for memory.
    """
    order = np.argsort(ratio)
    weight = rows[order] / rows.sum()
    below = np.cumsum(weight) - weight / 2
    return np.interp((np.arange(N_RESIDUALS) + 0.5) / N_RESIDUALS, below, ratio[order])
