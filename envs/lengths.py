"""How long requests are: samplers of (prompt, output) pairs, each chosen by a short spec (`LENGTHS_HELP`)."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from envs.presets import PRESETS
from envs.trace_readers import READERS, read_named
from envs.workload import FloatArray, IntArray, Lengths, Workload, require_positive

Sampler = Callable[[Generator, FloatArray], FloatArray]
"""From arrivals in seconds, [n], to token counts, [2, n]: prompts and outputs, NaN where a draw is beyond the MAX."""

LENGTHS_HELP = (
    "fixed:PROMPT,OUTPUT | uniform:LOW-HIGH,LOW-HIGH | lognormal:MEDIAN/SIGMA/MAX,MEDIAN/SIGMA/MAX | "
    + " | ".join(PRESETS)
    + " | "
    + " | ".join(f"{name}:PATH" + "[,tokenizer=FOLDER]" * (name == "sharegpt") for name in READERS)
    + " | mix:SHARE*LENGTHS+SHARE*LENGTHS | "
    "alternate:SECONDS*LENGTHS+SECONDS*LENGTHS | scaled:FACTOR[/CAP],FACTOR[/CAP]:LENGTHS (tokens)"
)
HOPELESS_DRAWS = 10_000


class Scaling(NamedTuple):
    """Factors on prompt and output lengths, and the most tokens that each may then have."""

    factors: tuple[float, float]
    caps: tuple[float, float]

    def of(self, pairs: FloatArray) -> FloatArray:
        """Scaled pairs [2, n], rounded, at least 1 token and at most the cap; NaN stays."""
        factors, caps = np.array(self.factors)[:, None], np.array(self.caps)[:, None]
        scaled: FloatArray = np.clip(np.rint(pairs * factors), 1, caps)
        return scaled


def length_sampler(spec: str) -> Sampler:
    """What a lengths spec (`LENGTHS_HELP`) draws from. Raises ValueError with the spec and the remedy."""
    kind, colon, options = spec.partition(":")
    if not colon and kind in PRESETS:
        return lambda rng, arrival_s: PRESETS[kind].sample(rng, len(arrival_s))
    if kind in READERS:
        pool = read_named(kind, options)
        pairs = np.stack([pool.prompt_tokens, pool.output_tokens]).astype(np.float64)
        return lambda rng, arrival_s: pairs[:, rng.integers(len(pool), size=len(arrival_s))]
    if kind == "scaled":
        scaling, inner = _scaling(spec)
        unscaled = length_sampler(inner)
        return lambda rng, arrival_s: scaling.of(unscaled(rng, arrival_s))
    if kind in ("mix", "alternate"):
        with _naming(spec):
            weights, specs = _weighted(options)
            choose = _by_share(weights) if kind == "mix" else _by_time(weights)
        return _chosen([length_sampler(part) for part in specs], choose)
    with _naming(spec):
        if kind not in ("fixed", "uniform", "lognormal"):
            raise ValueError(f"unknown kind {kind!r}")
        prompt, output = (_distribution(kind, side) for side in _two(options))
    return lambda rng, arrival_s: np.stack([prompt(rng, len(arrival_s)), output(rng, len(arrival_s))])


def recorded(spec: str) -> Workload | Lengths:
    """The rows of the file that a lengths spec names, its lengths scaled if it says so.

    Raises ValueError if the spec names no file.
    """
    kind, _, options = spec.partition(":")
    if kind == "scaled":
        scaling, inner = _scaling(spec)
        trace = recorded(inner)
        pairs = scaling.of(np.stack([trace.prompt_tokens, trace.output_tokens]).astype(np.float64))
        prompts, outputs = pairs.astype(np.int64)
        if isinstance(trace, Lengths):
            return Lengths(prompts, outputs, trace.dropped_requests)
        return Workload(trace.arrival_s, prompts, outputs, dropped_requests=trace.dropped_requests)
    if kind not in READERS or not options:
        raise ValueError(
            f"lengths {spec!r} is not a trace file: write one of {', '.join(READERS)} and :PATH, or a preset alone"
        )
    return read_named(kind, options)


def draw_lengths(
    sampler: Sampler, arrival_s: FloatArray, rng: Generator, max_model_tokens: int | None = None
) -> tuple[Lengths, int]:
    """One pair for each arrival, prompt + output at most `max_model_tokens`, and how many draws were rejected.

    Raises ValueError if `HOPELESS_DRAWS` in a row are too long.
    """
    limit = np.inf if max_model_tokens is None else max_model_tokens
    pairs = np.empty((2, len(arrival_s)))
    open_rows = np.arange(len(arrival_s))
    rejected = in_a_row = 0
    while open_rows.size:
        pairs[:, open_rows] = drawn = sampler(rng, arrival_s[open_rows])
        fits = drawn.sum(axis=0) <= limit
        rejected += int((~fits).sum())
        in_a_row = 0 if fits.any() else in_a_row + len(fits)
        if in_a_row >= HOPELESS_DRAWS:
            raise ValueError(f"no draw of {in_a_row} is within max_model_tokens {max_model_tokens} and the spec's MAX")
        open_rows = open_rows[~fits]
    return Lengths(*pairs.astype(np.int64)), rejected


@contextmanager
def _naming(spec: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"lengths {spec!r}: {error}; write {LENGTHS_HELP}") from error


def _weighted(options: str) -> tuple[FloatArray, list[str]]:
    """The parts of WEIGHT*SPEC+WEIGHT*SPEC. A plus sign within a path is none: no weight follows it."""
    parts = [part.partition("*") for part in re.split(r"\+(?=[0-9.]+\*)", options)]
    weights = np.array([float(weight) for weight, _, _ in parts])
    for weight in weights:
        require_positive("a part's weight", weight)
    for _, _, spec in parts:
        if spec.startswith(("mix:", "alternate:")):
            raise ValueError(f"{spec!r} within another mix cannot be told apart; name the parts in one list")
    return weights, [spec for _, _, spec in parts]


def _by_share(shares: FloatArray) -> Callable[[Generator, FloatArray], IntArray]:
    if abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"the shares add up to {shares.sum():g}; make them add up to 1")
    return lambda rng, arrival_s: rng.choice(len(shares), size=len(arrival_s), p=shares / shares.sum())


def _by_time(seconds: FloatArray) -> Callable[[Generator, FloatArray], IntArray]:
    ends_s = np.cumsum(seconds)
    return lambda rng, arrival_s: np.searchsorted(ends_s, arrival_s % ends_s[-1], side="right")


def _chosen(samplers: Sequence[Sampler], choose: Callable[[Generator, FloatArray], IntArray]) -> Sampler:
    def sample(rng: Generator, arrival_s: FloatArray) -> FloatArray:
        chosen = choose(rng, arrival_s)
        pairs = np.empty((2, len(arrival_s)))
        for index, sampler in enumerate(samplers):
            rows = chosen == index
            pairs[:, rows] = sampler(rng, arrival_s[rows])
        return pairs

    return sample


def _scaling(spec: str) -> tuple[Scaling, str]:
    options, _, inner = spec.removeprefix("scaled:").partition(":")
    with _naming(spec):
        sides = [side.partition("/") for side in _two(options)]
        factors = [float(factor) for factor, _, _ in sides]
        caps = [float(cap) if slash else np.inf for _, slash, cap in sides]
        for factor, cap in zip(factors, caps, strict=True):
            require_positive("a length factor", factor)
            if not cap >= 1:
                raise ValueError(f"a length cap is {cap:g}; it must be at least 1 token")
    return Scaling((factors[0], factors[1]), (np.floor(caps[0]), np.floor(caps[1]))), inner


def _two(options: str) -> tuple[str, str]:
    first, comma, second = options.partition(",")
    if not comma or "," in second:
        raise ValueError(f"{options!r} where one entry for prompts and one for outputs belong")
    return first, second


def _distribution(kind: str, text: str) -> Callable[[Generator, int], FloatArray]:
    """One side of a lengths spec: n token counts, NaN where one is beyond the spec's MAX."""
    if kind == "lognormal":
        median, sigma, most = text.split("/")
        return _lognormal(float(median), float(sigma), int(most))
    low, high = (int(text), int(text)) if kind == "fixed" else map(int, text.split("-"))
    if not 1 <= low <= high:
        raise ValueError(f"{text!r} is not a number of tokens, or a rising range of them, from 1 on")
    return lambda rng, n: rng.integers(low, high, n, endpoint=True).astype(np.float64)


def _lognormal(median: float, sigma: float, most: int) -> Callable[[Generator, int], FloatArray]:
    require_positive("median", median)
    require_positive("sigma", sigma)

    def sample(rng: Generator, n: int) -> FloatArray:
        tokens = np.maximum(np.rint(rng.lognormal(np.log(median), sigma, n)), 1)
        return np.where(tokens <= most, tokens, np.nan)

    return sample
