"""How long an iteration takes, given what it computes: a mean, the noise around it, and the range it was measured in.

    decode-only   fixed + f(tokens) + g(context of the decodes)
    mixed         fixed + f(tokens) + decodes + g(context of the decodes) + prefill requests + h(W)

W is the sum of c (L + c/2) over the chunks c at context L: attention's work, and no less than `fill_tokens` (L + c).
For attention shares queries among multiprocessors, not the keys that they see: a chunk too short to fill the device
takes as long as one that does. Of a batch only sums are known, so its chunks count as alike.

f, g and h are piecewise linear and never fall: nor does the mean when chunks alike get longer, deeper or more, with one
exception. Tokens may be padded to CUDA graph sizes and GEMM tiles: then f is a staircase. The exception: matrix kernels
serve some numbers of tokens better than their neighbours; where that was measured, mixed iterations (all but attention)
take a factor more or less by their size, and can take less time for more tokens. An iteration's time is the mean times
a random factor of its regime, of mean 1. `envs.step_time_fit` fits it all.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from envs.step_mean import FloatArray, mean_step_s

BoolArray = NDArray[np.bool_]

CURVES = ("tokens", "decodes", "decode_context_tokens", "prefill_requests", "prefill_attention_tokens2")
PARTS = ("fixed_s", *CURVES)
DECODE_ONLY_CURVES = ("tokens", "decode_context_tokens")
N_RESIDUALS = 256
QUIET = (1.0,) * N_RESIDUALS
VERSION = 2


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds that a quantity adds: from `starts[i]` to the next start, `slopes_s[i]` for each unit."""

    starts: tuple[float, ...] = (0.0,)
    slopes_s: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        ascending = list(self.starts) == sorted(set(self.starts)) and self.starts[:1] == (0.0,)
        if not ascending or len(self.starts) != len(self.slopes_s) or not all(s >= 0 for s in self.slopes_s):
            raise ValueError(f"{self} is no curve: give ascending starts from 0 and as many slopes, none below 0")


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Least and most of each quantity of a regime's measured iterations."""

    decodes: tuple[float, float]
    decode_context_tokens: tuple[float, float]
    prefill_requests: tuple[float, float]
    prefill_tokens: tuple[float, float]
    prefill_attention_tokens2: tuple[float, float]


class Regime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode-only or mixed iterations: their mean step time, the sum of its parts, and the noise around it.

    `tokens` are decode and prefill tokens together, padded up to the next of `padded_sizes`, and above the largest of
    them to a multiple of `tile_tokens`. `fill_tokens` is 0 where attention shares out keys as well, or computes one
    query after the other. A mixed iteration of more than i, and at most i + 1, times `size_tokens` tokens takes
    `size_factors[i]` times what its curves say (but for attention), beyond the last factor just that. `measured` is
    None for a formula, which knows no range.
    `residuals` are 256 equally likely factors time / mean: ascending, of mean 1.
    """

    fixed_s: float
    tokens: Curve = Curve()
    decodes: Curve = Curve()
    decode_context_tokens: Curve = Curve()
    prefill_requests: Curve = Curve()
    prefill_attention_tokens2: Curve = Curve()
    padded_sizes: tuple[float, ...] = ()
    tile_tokens: int = 1
    fill_tokens: float = 0.0
    size_tokens: int = 16
    size_factors: tuple[float, ...] = ()
    measured: Range | None = None
    residuals: tuple[float, ...] = QUIET

    def __post_init__(self) -> None:
        ascending = list(self.padded_sizes) == sorted(self.padded_sizes)
        if not (self.fixed_s >= 0 and self.tile_tokens >= 1 and self.fill_tokens >= 0 and ascending):
            raise ValueError(
                f"fixed_s {self.fixed_s}, tile_tokens {self.tile_tokens}, fill_tokens {self.fill_tokens}, padded_sizes "
                f"{self.padded_sizes}: give times and tokens of at least 0, a tile of at least 1 and ascending sizes"
            )
        if not (self.size_tokens >= 1 and all(0 < factor < np.inf for factor in self.size_factors)):
            raise ValueError(
                f"size_tokens {self.size_tokens}, size_factors {self.size_factors}: give 1 or more, and factors above 0"
            )
        r = np.array(self.residuals)
        if r.shape != (N_RESIDUALS,) or not (r > 0).all() or (np.diff(r) < 0).any() or abs(r.mean() - 1) > 1e-6:
            raise ValueError(f"residuals must be {N_RESIDUALS} factors above 0, ascending, of mean 1: fit it again")

    def bent(self, factors: Mapping[str, float]) -> "Regime":
        """Each part's time times its factor; parts are `fixed_s` and CURVES, and those not named stay as they are."""
        changed: dict[str, Any] = {}
        for name, factor in factors.items():
            part = getattr(self, name)
            curved = isinstance(part, Curve)
            changed[name] = Curve(part.starts, tuple(s * factor for s in part.slopes_s)) if curved else part * factor
        return msgspec.structs.replace(self, **changed)


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a saved model holds, in words of the file. `held_out` and `provenance` tell how far to trust it.

    `mixed_at_least_decode_only`: a mixed iteration takes no less than its decodes would take alone.
    """

    version: int
    mixed_at_least_decode_only: bool
    decode_only: Regime
    mixed: Regime
    held_out: dict[str, dict[str, float]] = {}
    provenance: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for name in set(CURVES) - set(DECODE_ONLY_CURVES):
            if getattr(self.decode_only, name) != Curve():
                raise ValueError(f"a decode-only iteration has no {name} beside its tokens: leave that curve out")
        if self.decode_only.size_factors:
            raise ValueError("size_factors are of mixed iterations alone: leave them out of decode_only")


class _Versioned(msgspec.Struct):
    version: int


def _packed(d: Description) -> FloatArray:
    """Flat: whether mixed is at least decode-only, pieces of a curve, of each regime (fixed, tile, number of sizes),
    `fill_tokens`, `size_tokens`, number of size factors; then the curves, piece by piece (start, width, slope), all
    filled up to one length; then the sizes, and the size factors.
    """
    curves = [getattr(d.decode_only, name) for name in DECODE_ONLY_CURVES] + [getattr(d.mixed, name) for name in CURVES]
    table = np.zeros((len(curves), max(len(curve.starts) for curve in curves), 3))
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve.starts)] = np.stack(
            [curve.starts, np.diff(curve.starts, append=np.inf), curve.slopes_s], axis=1
        )
    head = [float(d.mixed_at_least_decode_only), table.shape[1]]
    for regime in (d.decode_only, d.mixed):
        head += [regime.fixed_s, regime.tile_tokens, len(regime.padded_sizes)]
    head += [d.mixed.fill_tokens, d.mixed.size_tokens, len(d.mixed.size_factors)]
    sizes = (d.decode_only.padded_sizes, d.mixed.padded_sizes, d.mixed.size_factors)
    return np.concatenate([head, table.ravel(), *sizes])


@dataclass(frozen=True, slots=True, eq=False)
class StepTimeModel:
    """Step time of one device, or of one pipeline stage if it was fitted to a stage's times.

    `coefficients` is flat float64, for `mean_step_s` alone. `residuals`, float64 of shape [2, 256], are equally likely
    factors time / mean of decode-only (row 0) and of mixed iterations (row 1): ascending, of mean 1. Arguments named
    as in `mean_s` are those of one batch, W in tokens^2.
    """

    description: Description
    coefficients: FloatArray = field(init=False)
    residuals: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        d = self.description
        object.__setattr__(self, "coefficients", _packed(d))
        object.__setattr__(self, "residuals", np.array((d.decode_only.residuals, d.mixed.residuals)))
        self.coefficients.flags.writeable = self.residuals.flags.writeable = False

    def mean_s(
        self,
        decodes: float,
        decode_context_tokens: float,
        prefill_requests: float,
        prefill_tokens: float,
        prefill_attention_tokens2: float,
    ) -> float:
        """Mean seconds of an iteration."""
        batch = (decodes, decode_context_tokens, prefill_requests, prefill_tokens, prefill_attention_tokens2)
        return mean_step_s(self.coefficients, *map(float, batch))

    def quantile_s(self, q: float, *batch: float) -> float:
        """Seconds that an iteration, its batch as of `mean_s`, stays within with probability `q`."""
        return self.factor(q, batch[3] > 0) * self.mean_s(*batch)

    def factor(self, q: float, mixed: bool) -> float:
        """The `q` quantile of a regime's time / mean, linear between residuals. ValueError unless 0 <= q <= 1."""
        if not 0 <= q <= 1:
            raise ValueError(f"quantile {q} is not between 0 and 1: give a probability such as 0.99")
        return float(np.quantile(self.residuals[int(mixed)], q, method="hazen"))

    def covers(self, *batch: float) -> bool:
        """Whether a batch (as of `mean_s`) lies where its regime was measured; beyond, the outermost lines go on."""
        return bool(self.covered(np.array([batch]))[0])

    def covered(self, batches: FloatArray) -> BoolArray:
        """`covers` for every row of `batches`, float64 [n, 5]; bool [n]."""
        inside, mixed = np.ones(len(batches), np.bool_), batches[:, 3] > 0
        for regime, rows in ((self.description.decode_only, ~mixed), (self.description.mixed, mixed)):
            if regime.measured is not None:
                low, high = np.array(msgspec.structs.astuple(regime.measured)).T
                inside[rows] = ((low <= batches[rows]) & (batches[rows] <= high)).all(axis=1)
        return inside

    def with_noise(self, sigma: float) -> "StepTimeModel":
        """With lognormal noise exp(sigma z - sigma^2/2) for the measured one, in both regimes; 0 is none."""
        if not sigma >= 0:
            raise ValueError(f"sigma is {sigma}; noise needs at least 0, such as 0.04 for 4 %")
        z = [NormalDist().inv_cdf((i + 0.5) / N_RESIDUALS) for i in range(N_RESIDUALS)]
        factors = np.exp(sigma * np.array(z))
        residuals = tuple((factors / factors.mean()).tolist())
        return self._with(lambda regime: msgspec.structs.replace(regime, residuals=residuals))

    def scaled(self, factor: float) -> "StepTimeModel":
        """All times times `factor`: a pipeline stage's share (1 / stages if layers are dealt evenly)."""
        return self.bent(dict.fromkeys(PARTS, factor))

    def at_speeds(self, decode_only: float, mixed: float) -> "StepTimeModel":
        """Each regime's times times its factor: a lower clock makes matrix products longer, reading weights hardly."""
        d, regimes = self.description, {"decode_only": decode_only, "mixed": mixed}
        bent = {name: getattr(d, name).bent(dict.fromkeys(PARTS, factor)) for name, factor in regimes.items()}
        return StepTimeModel(msgspec.structs.replace(d, **bent))

    def bent(self, factors: Mapping[str, float]) -> "StepTimeModel":
        """Another machine: the times of each of PARTS, in both regimes, times its factor; without one, as they are."""
        return self._with(lambda regime: regime.bent(factors))

    def _with(self, change: Callable[[Regime], Regime]) -> "StepTimeModel":
        d = self.description
        return StepTimeModel(msgspec.structs.replace(d, decode_only=change(d.decode_only), mixed=change(d.mixed)))

    def text(self) -> str:
        """JSON, a line for each list of numbers."""
        text = msgspec.json.format(msgspec.json.encode(self.description), indent=2).decode()
        return re.sub(r"\[[^][{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"

    def save(self, path: Path) -> None:
        path.write_text(self.text())

    @classmethod
    def load(cls, path: Path) -> "StepTimeModel":
        """Read what `save` wrote. Raises ValueError naming the file."""
        try:
            return cls.of(msgspec.json.decode(path.read_bytes()))
        except (ValueError, msgspec.MsgspecError) as error:
            raise ValueError(f"{path} holds no step-time model: {error}") from error

    @classmethod
    def of(cls, said: Any) -> "StepTimeModel":
        """The model that a description decoded from JSON tells. Raises ValueError, also for another version."""
        version = msgspec.convert(said, _Versioned).version
        if version != VERSION:
            raise ValueError(f"it is of version {version}, this Pacer reads {VERSION}: fit it again")
        return cls(msgspec.convert(said, Description))

    @classmethod
    def from_formula(cls, decode_only: Sequence[float], mixed: Sequence[float]) -> "StepTimeModel":
        """Straight lines, without noise and without a range.

        `decode_only` is (fixed, per decode, per context token), `mixed` (fixed, per token of any kind, per context
        token of the decodes, per unit of W, per prefill request), all in seconds and at least 0; ValueError otherwise.
        """
        if (len(decode_only), len(mixed)) != (3, 5):
            raise ValueError(f"{len(decode_only)} decode-only and {len(mixed)} mixed coefficients: give 3 and 5")
        fixed_s, decode_s, context_s = decode_only
        lines = [Curve(slopes_s=(slope_s,)) for slope_s in mixed[1:]]
        return cls(
            Description(
                VERSION,
                mixed_at_least_decode_only=False,
                decode_only=Regime(
                    fixed_s, Curve(slopes_s=(decode_s,)), decode_context_tokens=Curve(slopes_s=(context_s,))
                ),
                mixed=Regime(mixed[0], lines[0], Curve(), lines[1], lines[3], lines[2]),
            )
        )
