import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from envs.iterations import COMPOSITION, LONGEST_STRETCH, Iterations, load_iterations, stretches
from envs.step_mean import mean_step_s
from envs.step_time import VERSION, Curve, Description, Range, Regime, StepTimeModel
from envs.step_time_error import errors, predict
from envs.step_time_fit import GRAPH_SIZES, LEAST_STRETCHES, fit

FORMULA = StepTimeModel.from_formula((4.71e-3, 7.3e-6, 35e-9), (1.27e-3, 20.9e-6, 45.5e-9, 1.045e-9, 0.28e-3))
TRUTH = StepTimeModel.from_formula((4.71e-3, 7.3e-6, 35e-9), (5e-3, 18e-6, 45.5e-9, 1.045e-9, 0.28e-3))


def described(decode_only: Regime, mixed: Regime, floor: bool = False) -> StepTimeModel:
    return StepTimeModel(Description(VERSION, floor, decode_only, mixed))


def recording(
    truth: StepTimeModel, random: Generator, n: int = 1500, *, noise: float = 0.0, late: float = 0.0, run: int = 0
) -> Iterations:
    """Bursts of prompt chunks among decodes, timed by `truth`.

    `late` is the share of a launch with prompt tokens by which the stamp of the iteration before it is late.
    """
    decodes = np.maximum(random.integers(-2, 3, n).cumsum() % 97, 1).astype(float)
    burst = np.repeat(random.random(n // 5 + 1) < 0.4, random.integers(1, 10, n // 5 + 1))[:n]
    burst = np.resize(burst, n)
    prefill = np.where(burst, random.integers(1, 2049, n), 0).astype(float)
    context = random.integers(0, 4000, n) * (random.random(n) < 0.5)
    chosen = {
        "decode_tokens": decodes,
        "decode_context_tokens": decodes * random.integers(500, 1500, n),
        "prefill_requests": np.where(burst, random.integers(1, 4, n), 0).astype(float),
        "prefill_tokens": prefill,
        "prefill_attention_tokens2": prefill * (context + prefill / 2),
    }
    known = Iterations(seconds=np.ones(n), **chosen)
    seconds = predict(truth, known) * np.exp(noise * random.standard_normal(n) - noise**2 / 2)
    delay_s = np.r_[np.where(burst[1:], late * seconds[1:], 0.0), 0.0]  # of each stamp
    return Iterations(seconds=seconds + np.diff(delay_s, prepend=0.0), **chosen, run=np.full(n, run))


def test_the_formula_gives_what_it_says() -> None:
    assert FORMULA.mean_s(90, 100_000, 0, 0, 0) == pytest.approx(4.71e-3 + 90 * 7.3e-6 + 100_000 * 35e-9)
    expected_s = 1.27e-3 + 990 * 20.9e-6 + 100_000 * 45.5e-9 + 2 * 0.28e-3 + 3e6 * 1.045e-9
    assert FORMULA.mean_s(90, 100_000, 2, 900, 3e6) == pytest.approx(expected_s)
    assert FORMULA.covers(10**6, 10**9, 0, 0, 0)
    assert FORMULA.quantile_s(0.99, 1, 10, 0, 0, 0) == pytest.approx(FORMULA.mean_s(1, 10, 0, 0, 0))


def test_compiled_code_takes_whole_numbers_too() -> None:
    @numba.njit  # type: ignore[untyped-decorator]
    def inside(coefficients: object) -> float:
        return mean_step_s(coefficients, 90, 100_000, 2, 900, 3e6)  # type: ignore[arg-type]

    assert inside(FORMULA.coefficients) == FORMULA.mean_s(90, 100_000, 2, 900, 3e6)


def test_curves_bend_where_they_say() -> None:
    bent = Curve((0.0, 100.0, 200.0), (1e-5, 0.0, 3e-5))
    model = described(Regime(0.001, decode_context_tokens=bent), Regime(0.002, prefill_attention_tokens2=bent))
    for x, more_s in ((0, 0.0), (50, 5e-4), (100, 1e-3), (150, 1e-3), (200, 1e-3), (300, 4e-3), (10_000, 0.295)):
        assert model.mean_s(1, x, 0, 0, 0) == pytest.approx(0.001 + more_s)
        assert model.mean_s(1, 7, 1, 1, x) == pytest.approx(0.002 + more_s)


def test_tokens_are_padded_to_sizes_and_above_them_to_tiles() -> None:
    line = Curve(slopes_s=(1e-3,))
    stairs = Regime(0.0, line, padded_sizes=(1.0, 2.0, 8.0), tile_tokens=16)
    model = described(stairs, stairs)
    for tokens, padded in ((1, 1), (2, 2), (3, 8), (8, 8), (9, 16), (16, 16), (17, 32)):
        assert model.mean_s(tokens, 0, 0, 0, 0) == pytest.approx(padded * 1e-3)
        if tokens > 1:
            assert model.mean_s(tokens - 1, 0, 1, 1, 0) == pytest.approx(padded * 1e-3)


def test_a_mixed_iteration_takes_no_less_than_its_decodes_alone() -> None:
    decode_only, mixed = Regime(0.005, Curve(slopes_s=(1e-5,))), Regime(0.001, Curve(slopes_s=(2e-5,)))
    assert described(decode_only, mixed, floor=True).mean_s(10, 0, 1, 16, 0) == pytest.approx(0.0051)
    assert described(decode_only, mixed, floor=False).mean_s(10, 0, 1, 16, 0) == pytest.approx(0.00152)
    assert described(decode_only, mixed, floor=True).mean_s(10, 0, 1, 990, 0) == pytest.approx(0.021)


def test_a_short_chunk_takes_as_long_as_the_tokens_that_would_fill_the_device() -> None:
    regime = Regime(0.001, prefill_attention_tokens2=Curve(slopes_s=(1e-9,)), fill_tokens=400.0)
    model = described(Regime(0.0), regime)

    def chunks_s(requests: int, chunk: int, context: int) -> float:
        return model.mean_s(0, 0, requests, requests * chunk, requests * chunk * (context + chunk / 2))

    assert chunks_s(1, 16, 30_000) == pytest.approx(0.001 + 1e-9 * 400 * 30_016)
    assert chunks_s(4, 16, 30_000) == pytest.approx(chunks_s(1, 16, 30_000)), "side by side"
    assert chunks_s(1, 1000, 30_000) == pytest.approx(0.001 + 1e-9 * 1000 * 30_500)


@settings(deadline=None)
@given(*[st.integers(1, 8), st.integers(1, 8192), st.integers(0, 10**5), st.floats(0, 4096)], st.integers(0, 2))
def test_the_mean_never_falls_when_chunks_their_prefixes_or_their_number_grow(
    requests: int, chunk: int, context: int, fill: float, grown: int
) -> None:
    regime = Regime(0.001, prefill_attention_tokens2=Curve((0.0, 1e6), (1e-9, 1e-10)), fill_tokens=fill)
    model = described(Regime(0.0), regime)
    larger = (requests + (grown == 0), chunk + (grown == 1), context + (grown == 2))
    seconds = [model.mean_s(0, 0, n, n * c, n * c * (L + c / 2)) for n, c, L in ((requests, chunk, context), larger)]
    assert seconds[1] >= seconds[0] * (1 - 1e-12)


slopes = st.floats(0, 1e-3)
curves = st.lists(st.tuples(st.floats(1, 1e6), slopes), max_size=4, unique_by=lambda pair: pair[0]).flatmap(
    lambda pairs: slopes.map(
        lambda first: Curve((0.0, *(k for k, _ in sorted(pairs))), (first, *(s for _, s in sorted(pairs))))
    )
)
sizes = st.sampled_from([(), (1.0, 2.0, 4.0, 8.0), GRAPH_SIZES])
tiles = st.sampled_from([1, 16, 128])
decode_only_regimes = st.builds(
    Regime, st.floats(0, 0.1), tokens=curves, decode_context_tokens=curves, padded_sizes=sizes, tile_tokens=tiles
)
mixed_regimes = st.builds(Regime, st.floats(0, 0.1), curves, curves, curves, curves, curves, sizes, tiles)
counts = st.integers(0, 10_000)
batches = st.tuples(counts, st.integers(0, 10**7), st.integers(0, 100), counts, st.floats(0, 1e9))


@settings(deadline=None)
@given(decode_only_regimes, mixed_regimes, st.booleans(), batches, st.integers(0, 4), st.integers(1, 10_000))
def test_the_mean_is_above_zero_and_never_falls_within_a_regime(
    decode_only: Regime, mixed: Regime, floor: bool, batch: tuple[float, ...], argument: int, more: int
) -> None:
    model = described(decode_only, mixed, floor)
    larger = tuple(x + more * (i == argument) for i, x in enumerate(batch))
    least_s = model.mean_s(*batch)
    assert least_s > 0
    if (batch[3] > 0) == (larger[3] > 0):
        assert model.mean_s(*larger) >= least_s


def test_noise_is_lognormal_of_mean_one() -> None:
    noisy = FORMULA.with_noise(0.04)
    assert noisy.residuals.shape == (2, 256)
    assert noisy.residuals.mean(axis=1) == pytest.approx(1)
    assert noisy.residuals.std(axis=1) == pytest.approx(0.04, rel=0.02)
    mean_s = FORMULA.mean_s(1, 10, 0, 0, 0)
    assert noisy.mean_s(1, 10, 0, 0, 0) == mean_s
    assert noisy.quantile_s(0.99, 1, 10, 0, 0, 0) == pytest.approx(mean_s * math.exp(0.04 * 2.326 - 0.0008), rel=2e-3)
    assert noisy.factor(0.5, mixed=True) == pytest.approx(math.exp(-0.0008), rel=1e-4)
    assert (noisy.with_noise(0).residuals == 1).all()
    assert not noisy.residuals.flags.writeable
    for sigma in (-0.1, math.nan):
        with pytest.raises(ValueError, match="sigma"):
            FORMULA.with_noise(sigma)
    with pytest.raises(ValueError, match=r"1\.5"):
        FORMULA.factor(1.5, mixed=False)


def test_a_stage_takes_its_share() -> None:
    for batch in ((3, 500, 0, 0, 0), (3, 500, 2, 800, 5e5)):
        assert FORMULA.scaled(0.25).mean_s(*batch) == pytest.approx(FORMULA.mean_s(*batch) / 4)


def test_a_lower_clock_makes_mixed_steps_longer_alone() -> None:
    alone, mixed = (3, 500, 0, 0, 0), (3, 500, 2, 800, 5e5)
    hot = FORMULA.at_speeds(1.02, 1.15)
    assert hot.mean_s(*alone) == pytest.approx(1.02 * FORMULA.mean_s(*alone))
    assert hot.mean_s(*mixed) == pytest.approx(1.15 * FORMULA.mean_s(*mixed))


def test_the_range_is_that_of_the_regime() -> None:
    alone = Range((1.0, 10.0), (1.0, 1000.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    beside = Range((0.0, 5.0), (0.0, 500.0), (1.0, 2.0), (16.0, 512.0), (1.0, 1e6))
    model = described(Regime(0.001, measured=alone), Regime(0.001, measured=beside))
    assert model.covers(10, 1000, 0, 0, 0)
    assert not model.covers(11, 1000, 0, 0, 0)
    assert not model.covers(10, 1001, 0, 0, 0)
    assert model.covers(5, 500, 2, 512, 1e6)
    assert not model.covers(6, 500, 2, 512, 1e6)
    assert not model.covers(5, 500, 2, 15, 1e6)
    assert not model.covers(5, 500, 3, 512, 1e6)


def test_a_model_is_kept_in_readable_json(tmp_path: Path) -> None:
    model = fit(recording(TRUTH, np.random.default_rng(3), noise=0.03), sources=["a test"])
    path = tmp_path / "model.json"
    model.save(path)
    again = StepTimeModel.load(path)
    assert again.description == model.description
    assert np.array_equal(again.coefficients, model.coefficients)
    kept = json.loads(path.read_text())
    assert kept["provenance"]["sources"] == ["a test"]
    assert kept["provenance"]["iterations"]["mixed"] + kept["provenance"]["iterations"]["decode_only"] == 1500
    assert 0 < kept["held_out"]["mixed"]["sums_median_error"] < 0.03
    assert len(path.read_text().splitlines()) < 150  # a list of numbers takes one line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 1, "residuals": [1.0] * 256}, "version 1"),
        ({"mixed": {"fixed_s": 1.0, "residuals": [1.0] * 255}}, "256"),
        ({"mixed": {"fixed_s": 1.0, "residuals": [1.1] * 256}}, "mean 1"),
        ({"colour": "red"}, "colour"),
        ({"mixed": {"fixed_s": -1.0}}, "fixed_s"),
        ({"mixed": {"fixed_s": 1.0, "tokens": {"starts": [0.0], "slopes_s": [-1.0]}}}, "none below 0"),
        ({"mixed": {"fixed_s": 1.0, "tokens": {"starts": [0.0, 5.0, 5.0], "slopes_s": [1, 1, 1]}}}, "ascending"),
        ({"decode_only": {"fixed_s": 1.0, "decodes": {"starts": [0.0], "slopes_s": [1.0]}}}, "decodes"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**json.loads(msgspec.json.encode(FORMULA.description)), **change}))
    with pytest.raises(ValueError, match=r"model\.json") as caught:
        StepTimeModel.load(path)
    assert named in str(caught.value)


def test_a_fit_finds_the_truth_and_its_noise() -> None:
    model = fit(recording(TRUTH, np.random.default_rng(1), noise=0.04))
    fresh = recording(TRUTH, np.random.default_rng(2))
    ratio = predict(model, fresh) / fresh.seconds
    assert np.abs(ratio - 1).max() < 0.03
    assert np.median(np.abs(ratio - 1)) < 0.006
    timed_apart = fit(replace(recording(TRUTH, np.random.default_rng(1), noise=0.04), intervals=False))
    for mixed in (False, True):
        assert timed_apart.residuals[int(mixed)].std() == pytest.approx(0.04, rel=0.1)
        assert timed_apart.factor(0.99, mixed) == pytest.approx(1.095, abs=0.02)


def test_quantiles_are_those_of_single_iterations_but_of_stretches_where_stamps_are_late() -> None:
    """Noise of 10 % on every row: known in full of rows timed apart, and of decode-only ones, whose stamps are good."""
    parts = [recording(TRUTH, np.random.default_rng(run), 6000, noise=0.1, late=0.6, run=run) for run in range(2)]
    model = fit(Iterations.concatenate(parts))
    alone, mixed = model.residuals.std(axis=1)
    assert alone == pytest.approx(0.1, rel=0.1)
    assert 0.03 < mixed < 0.1, "it averages out over a stretch"
    timed_apart = fit(replace(recording(TRUTH, np.random.default_rng(0), 6000, noise=0.1), intervals=False))
    fresh = recording(TRUTH, np.random.default_rng(7), 20_000, noise=0.1)
    ratio = fresh.seconds / predict(timed_apart, fresh)
    for regime in (False, True):
        beyond = np.mean(ratio[fresh.mixed == regime] > timed_apart.factor(0.99, regime))
        assert 0.005 < beyond < 0.02, "1 % is promised"


@pytest.mark.parametrize("intervals", [False, True])
def test_each_regime_has_its_own_noise(intervals: bool) -> None:
    random = np.random.default_rng(11)
    seen = recording(TRUTH, random, 4000)
    noise = random.lognormal(0.0, np.where(seen.mixed, 0.1, 0.02))
    model = fit(replace(seen, seconds=seen.seconds * noise, intervals=intervals))
    alone, mixed = model.residuals.std(axis=1)
    assert alone == pytest.approx(0.02, rel=0.15)
    assert 0.02 < mixed < 0.11 if intervals else mixed == pytest.approx(0.1, rel=0.25)
    batch = (3.0, 1000.0, 0.0, 0.0, 0.0)
    assert model.quantile_s(0.99, *batch) == model.factor(0.99, mixed=False) * model.mean_s(*batch)
    batch = (3.0, 1000.0, 1.0, 100.0, 5000.0)
    assert model.quantile_s(0.99, *batch) == model.factor(0.99, mixed=True) * model.mean_s(*batch)
    taken = model.description.provenance["residuals"]["mixed"]
    assert LEAST_STRETCHES <= taken["stretches"] <= taken["iterations"]


def test_a_short_run_beside_a_long_one_does_not_spoil_the_held_out_error() -> None:
    long = recording(TRUTH, np.random.default_rng(0), noise=0.03)
    short = recording(TRUTH, np.random.default_rng(1), 40, noise=0.03, run=1)
    alone, both = (fit(seen).description.held_out for seen in (long, Iterations.concatenate([long, short])))
    for regime in ("decode_only", "mixed"):
        assert both[regime]["sums_median_error"] == pytest.approx(alone[regime]["sums_median_error"], rel=0.2)


@pytest.mark.parametrize("second_slope_s", [0.2e-3, 1.4e-3])
def test_a_fit_bends_either_way_for_a_slow_processor(second_slope_s: float) -> None:
    """About 10 ms + 0.7 ms a token, cheaper or dearer from 512 tokens on."""
    tokens = Curve((0.0, 512.0), (0.7e-3, second_slope_s))
    truth = described(Regime(0.01, Curve(slopes_s=(1e-3,))), Regime(0.01, tokens))
    model = fit(replace(recording(truth, np.random.default_rng(4), noise=0.03), intervals=False))
    judged = errors(model, recording(truth, np.random.default_rng(5)))
    assert judged["mixed"]["median_error"] < 0.02
    assert judged["mixed"]["p90_error"] < 0.08
    assert judged["decode_only"]["median_error"] < 0.01


def test_late_stamps_and_idle_gaps_do_not_mislead() -> None:
    parts = [recording(TRUTH, np.random.default_rng(run), noise=0.03, late=0.6, run=run) for run in range(4)]
    spoilt = Iterations.concatenate(parts)
    spoilt.seconds[::97] = np.nan
    spoilt.seconds[50::501] *= 30  # a stall that nothing explains
    model = fit(spoilt)
    fresh = recording(TRUTH, np.random.default_rng(9))
    ratio = predict(model, fresh) / fresh.seconds
    for regime in (fresh.mixed, ~fresh.mixed):
        assert np.median(np.abs(ratio[regime] - 1)) < 0.015
        assert abs(ratio[regime].mean() - 1) < 0.015
    judged = errors(model, recording(TRUTH, np.random.default_rng(10), noise=0.03, late=0.6))
    assert judged["all"]["r2_sums"] > 0.99
    assert judged["all"]["r2"] < 0.9  # rows stay wrong by what was moved between them
    assert model.factor(0.99, mixed=True) < 1.2


def test_a_staircase_is_found_where_there_is_one_and_only_there() -> None:
    line = Curve(slopes_s=(40e-6,))
    stairs = described(
        Regime(0.002, Curve(slopes_s=(60e-6,)), padded_sizes=GRAPH_SIZES), Regime(0.002, line, tile_tokens=256)
    )
    found = fit(recording(stairs, np.random.default_rng(6), noise=0.01)).description
    assert found.decode_only.padded_sizes == GRAPH_SIZES
    assert found.mixed.tile_tokens == 256
    smooth = fit(recording(TRUTH, np.random.default_rng(6), noise=0.01)).description
    for regime in (smooth.decode_only, smooth.mixed):
        assert regime.padded_sizes == ()
        assert regime.tile_tokens == 1


def test_the_tokens_that_fill_the_device_are_found_where_there_are_any() -> None:
    mixed = msgspec.structs.replace(TRUTH.description.mixed, fill_tokens=384.0)
    truth = described(TRUTH.description.decode_only, mixed)
    seen, fresh = (recording(truth, np.random.default_rng(seed), 3000, noise=0.02) for seed in (1, 2))
    model = fit(replace(seen, intervals=False))
    assert 250 <= model.description.mixed.fill_tokens <= 520
    ratio = predict(model, fresh) / predict(truth, fresh)
    assert np.quantile(np.abs(ratio[fresh.mixed] - 1), 0.95) < 0.03
    assert fit(recording(TRUTH, np.random.default_rng(1), noise=0.02)).description.mixed.fill_tokens == 0


def test_a_fit_knows_its_range() -> None:
    seen = recording(TRUTH, np.random.default_rng(7))
    model = fit(seen)
    assert all(model.covers(*batch) for batch in zip(*(getattr(seen, name) for name in COMPOSITION), strict=True))
    assert not model.covers(1000, 10_000, 0, 0, 0)
    columns = np.stack([getattr(seen, name) for name in COMPOSITION], axis=1)
    batches = np.vstack([(1000.0, 10_000.0, 0.0, 0.0, 0.0), columns])
    assert model.covered(batches).tolist() == [False] + [True] * len(seen)
    assert FORMULA.covered(batches).all()
    assert errors(model, seen)["all"]["covered"] == 1


@pytest.mark.parametrize(("mixed", "named"), [(True, "decode-only"), (False, "mixed")])
def test_a_recording_without_a_regime_is_refused(mixed: bool, named: str) -> None:
    seen = recording(TRUTH, np.random.default_rng(8), n=200)
    with pytest.raises(ValueError, match=f"of {named} iterations.*record for longer"):
        fit(replace(seen.rows(seen.mixed == mixed), intervals=False))


def test_a_light_load_is_refused_with_the_way_round() -> None:
    seen = recording(TRUTH, np.random.default_rng(8), n=200)
    after_idling = np.where(seen.mixed, np.nan, seen.seconds)
    with pytest.raises(ValueError, match=f"{seen.mixed.sum()} more have no interval.*'device_s'"):
        fit(replace(seen, seconds=after_idling, intervals=False))


def rows(seconds: list[float], prefill: list[int], **more: object) -> Iterations:
    tokens = np.array(prefill, float)
    n = len(seconds)
    return Iterations(
        np.array(seconds), np.full(n, 2.0), np.full(n, 100.0), np.sign(tokens), tokens, tokens**2 / 2, **more
    )


def test_rows_are_joined_between_stamps_that_can_be_trusted() -> None:
    #                   decode, decode, [decode, mixed, mixed, decode], decode
    joined = stretches(rows([1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 8, 8, 0, 0]))
    assert joined.of_row.tolist() == [0, 1, 2, 2, 2, 2, 3]
    assert joined.seconds.tolist() == [1, 2, 18, 7]
    assert joined.rows.tolist() == [1, 1, 4, 1]
    assert joined.mixed.tolist() == [False, False, True, False]
    assert joined.sums(np.arange(7.0)).tolist() == [0, 1, 14, 6]


def test_an_unknown_time_takes_the_row_after_it_along() -> None:
    joined = stretches(rows([1, 2, math.nan, 4, 5], [0, 0, 0, 0, 0]))
    assert joined.of_row.tolist() == [0, 1, 2, 2, 3]
    assert np.isnan(joined.seconds).tolist() == [False, False, True, False]


def test_a_long_burst_is_cut_and_runs_are_kept_apart() -> None:
    n = 2 * LONGEST_STRETCH + 3
    assert stretches(rows([1.0] * n, [8] * n)).rows.tolist() == [LONGEST_STRETCH, LONGEST_STRETCH, 3]
    assert stretches(rows([1.0] * 4, [8] * 4, run=np.array([0, 0, 5, 5]))).rows.tolist() == [2, 2]
    assert stretches(rows([1.0] * 4, [8] * 4, intervals=False)).rows.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("seconds", 0.0, "seconds in row 1"),
        ("seconds", math.inf, "seconds in row 1"),
        ("decode_tokens", -1.0, "decode_tokens in row 1"),
        ("prefill_tokens", math.nan, "prefill_tokens in row 1"),
    ],
)
def test_impossible_rows_are_refused_by_number(column: str, value: float, named: str) -> None:
    good = rows([1.0, 1.0, 1.0], [0, 8, 0])
    with pytest.raises(ValueError, match=named):
        replace(good, **{column: np.where(np.arange(3) == 1, value, getattr(good, column))})
    with pytest.raises(ValueError, match="row 0 computed no token"):
        replace(good, decode_tokens=np.zeros(3))
    with pytest.raises(ValueError, match="3 rows"):
        replace(good, prefill_tokens=np.zeros(4))


CSV = """time_s,interval_s,decode_tokens,prefill_tokens,prefill_requests,decode_context_tokens,prefill_attention_tokens2
0.5,0.0317,3,0,0,60,0.0
0.9,0.4,0,16,1,0,128.0
1.0,0.1,0,16,1,0,384.0
1.1,0.1,1,8,2,16,30.5
"""


def test_a_csv_tells_idle_gaps_by_what_ran(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv.gz"
    path.write_bytes(gzip.compress(CSV.encode()))
    read = load_iterations(path)
    # The first row has no predecessor; at the second nothing had been running; the third goes on with a prompt.
    assert np.isnan(read.seconds).tolist() == [True, True, False, False]
    assert read.seconds[2:].tolist() == [0.1, 0.1]
    assert read.prefill_tokens.tolist() == [0, 16, 16, 8]
    assert read.prefill_attention_tokens2.tolist() == [0, 128, 384, 30.5]
    assert read.intervals


def test_a_table_of_our_own_journal_is_read_with_either_time(tmp_path: Path) -> None:
    composed = [
        dict.fromkeys(COMPOSITION, 1) | {"interval_s": interval_s, "device_s": 0.25, "engine_id": engine, "tbt_s": []}
        for interval_s, engine in ((0.5, "a"), (0.5, "a"), (None, "a"), (0.5, "b"), (0.5, "b"))
    ]
    path = tmp_path / "telemetry.parquet"
    pq.write_table(pa.Table.from_pylist(composed), path)
    read = load_iterations(path)
    assert np.isnan(read.seconds).tolist() == [True, False, True, True, False]
    assert read.runs.tolist() == [0, 0, 0, 1, 1]
    timed = load_iterations(path, "device_s")
    assert timed.seconds.tolist() == [0.25] * 5
    assert not timed.intervals
    both = Iterations.concatenate([read, read])
    assert both.runs.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="all with"):
        Iterations.concatenate([read, timed])
    with pytest.raises(ValueError, match=r"telemetry\.parquet: no column stage_s"):
        load_iterations(path, "stage_s")


def test_our_own_table_tells_idle_gaps_itself() -> None:
    """A prefill-heavy load: prompts follow on prompts, and nothing ever decodes."""
    whole = {"decode_tokens": 0, "decode_context_tokens": 0, "prefill_requests": 1, "prefill_tokens": 16}
    whole |= {"prefill_attention_tokens2": 128.0}
    told = [whole | {"iteration": i, "interval_s": t} for i, t in enumerate((None, 0.5, 0.5, None, 0.5), start=1)]
    read = Iterations.from_table(pa.Table.from_pylist(told))
    assert np.isnan(read.seconds).tolist() == [True, False, False, True, False]
    untold = pa.Table.from_pylist(told).drop_columns("iteration")
    assert np.isnan(Iterations.from_table(untold).seconds).all()


def test_two_completions_under_one_stamp_have_no_interval(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text(CSV.replace("1.0,0.1,", "1.0,0.0,"))
    assert np.isnan(load_iterations(path).seconds).tolist() == [True, True, True, False]
    path.write_text(CSV.replace("1.0,0.1,", "1.0,-0.1,"))
    with pytest.raises(ValueError, match=r"sweep\.csv: seconds in row 2 is -0\.1"):
        load_iterations(path)
    path.write_text(CSV.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"sweep\.csv: no iteration in it"):
        load_iterations(path)


def test_errors_are_relative_to_what_was_measured() -> None:
    model = described(Regime(1.0), Regime(2.0))
    judged = errors(model, rows([1.0, 2.0, 4.0, 2.5, math.nan], [0, 0, 8, 8, 0], intervals=False))
    assert judged["decode_only"]["count"] == 2
    assert judged["decode_only"]["median_error"] == pytest.approx(0.25)  # 0 and 1/2
    assert judged["decode_only"]["bias"] == pytest.approx(2 / 3 - 1)
    assert judged["mixed"]["mean_error"] == pytest.approx((0.5 + 0.2) / 2)
    assert judged["all"]["unknown_times"] == 1
    seconds, predicted = np.array([1, 2, 4, 2.5]), np.array([1, 1, 2, 2])
    r2 = 1 - ((seconds - predicted) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    assert judged["all"]["r2"] == judged["all"]["r2_sums"] == pytest.approx(r2)


def test_sums_forgive_a_late_stamp_and_rows_do_not() -> None:
    model = described(Regime(1.0), Regime(2.0))
    judged = errors(model, rows([1.0, 2.5, 0.5, 1.0, 1.0], [0, 0, 8, 0, 0]))
    assert judged["mixed"]["median_error"] == pytest.approx(3.0)
    assert judged["mixed"]["sums_median_error"] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="known time"):
        errors(model, rows([math.nan], [0]))


def test_a_formula_needs_all_its_coefficients() -> None:
    with pytest.raises(ValueError, match="2 decode-only and 5 mixed coefficients: give 3 and 5"):
        StepTimeModel.from_formula((1e-3, 1e-6), (1e-3, 1e-6, 0.0, 0.0, 0.0))


def test_laws_can_use_a_model_without_the_tools_that_fit_it() -> None:
    code = "import sys, envs.step_time; assert not {'scipy.optimize', 'pyarrow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def uneven(model: StepTimeModel, factors: tuple[float, ...]) -> StepTimeModel:
    mixed = msgspec.structs.replace(model.description.mixed, size_factors=factors)
    return described(model.description.decode_only, mixed)


def of_all_sizes(truth: StepTimeModel, noise: float = 0.0) -> Iterations:
    """Eight decodes and a chunk, every 16 tokens up to 2048, five times each."""
    tokens = np.repeat(np.arange(16.0, 2049.0, 16.0) - 8, 5)
    eight, one = np.full(len(tokens), 8.0), np.ones(len(tokens))
    known = Iterations(one, eight, 4000 * one, one, tokens, tokens**2 / 2, intervals=False)
    random = np.random.default_rng(0)
    return replace(known, seconds=predict(truth, known) * np.exp(noise * random.standard_normal(len(tokens))))


def test_single_sizes_take_more_or_less_but_for_attention() -> None:
    model = uneven(TRUTH, (1.0, 1.2, 0.9))
    attention_s = 100_000 * 45.5e-9 + 3e6 * 1.045e-9
    for tokens, factor in ((8, 1.0), (9, 1.2), (24, 1.2), (25, 0.9), (40, 0.9), (41, 1.0), (4000, 1.0)):
        others_s = TRUTH.mean_s(8, 100_000, 1, tokens, 3e6) - attention_s
        assert model.mean_s(8, 100_000, 1, tokens, 3e6) == pytest.approx(factor * others_s + attention_s)
        assert model.mean_s(tokens, 100_000, 0, 0, 0) == TRUTH.mean_s(tokens, 100_000, 0, 0, 0), "decode-only"
        assert model.bent({"tokens": 2.0}).mean_s(8, 0, 1, tokens, 0) > model.mean_s(8, 0, 1, tokens, 0)
    with pytest.raises(ValueError, match="above 0"):
        uneven(TRUTH, (1.0, 0.0))
    with pytest.raises(ValueError, match="mixed iterations alone"):
        described(Regime(0.0, size_factors=(1.0,)), Regime(0.0))


def test_a_fit_takes_what_sizes_cost_from_where_they_were_measured_if_it_holds_elsewhere() -> None:
    factors = tuple((1 + 0.08 * np.random.default_rng(3).standard_normal(128)).tolist())
    truth = uneven(TRUTH, factors)
    seen = replace(recording(truth, np.random.default_rng(1), 3000, noise=0.01), intervals=False)
    fresh = recording(truth, np.random.default_rng(2))
    model, smooth = fit(seen, sizes=of_all_sizes(truth, noise=0.01)), fit(seen)
    assert len(model.description.mixed.size_factors) == 128
    errors_of = {
        found: np.median(np.abs(predict(found, fresh) / fresh.seconds - 1)[fresh.mixed]) for found in (model, smooth)
    }
    assert errors_of[model] < 0.015
    assert errors_of[smooth] > 0.04
    assert model.residuals[1].std() < smooth.residuals[1].std() / 2, "it was no noise"
    even = replace(recording(TRUTH, np.random.default_rng(1), 3000, noise=0.01), intervals=False)
    assert fit(even, sizes=of_all_sizes(truth)).description.mixed.size_factors == (), "of another machine"
