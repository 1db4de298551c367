"""What was promised: a latency SLO and how a request, or a set of tokens, is judged against it.

Words: TTFT is the time to a request's first output token; TBT the gap between two output tokens of a request (ITL
elsewhere); TPOT a request's mean TBT after the first token; E2EL the time to its last token; a deadline is when each
single token is due, so that a request may spend later what it gained before. Goodput is the requests per second that
met their SLO, so a request that failed or did not finish is a miss: that is for the caller to count.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_QUANTILE = 0.99
RESOLUTION_S = 1e-9  # of the clocks that times come from: a token so little past its deadline is on time
_WORDS = {"tbt": "tbt_s", "ttft": "ttft_s", "tpot": "tpot_s", "deadline": "deadline_s", "e2el": "e2el_s"}
_FIELDS = _WORDS | {"itl": "tbt_s"}
_REMEDY = (
    'write pairs such as "tbt:100 ttft:2000" in milliseconds; words: tbt (or itl), ttft, tpot, deadline, e2el, quantile'
)


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in seconds; None leaves that part unpromised. A request must keep every bound that is set.

    `tbt_s` bounds the `quantile` (0 to 1) of a request's gaps, numpy's linear percentile; `tpot_s` their mean. With
    `deadline_s` each token is due at a time of its own (`late`), and at most 1 - quantile of them may miss it.
    Raises ValueError if a bound is not a positive number, if none is set, or if the quantile is outside (0, 1].
    """

    tbt_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    e2el_s: float | None = None
    quantile: float = DEFAULT_QUANTILE

    def __post_init__(self) -> None:
        bounds = {name: getattr(self, name) for name in _WORDS.values()}
        for name, bound in bounds.items():
            if bound is not None and not (isfinite(bound) and bound > 0):
                raise ValueError(f"SLO {name} is {bound}; it must be a positive number of seconds, or None")
        if all(bound is None for bound in bounds.values()):
            raise ValueError(f"an SLO with no bound promises nothing: set one of {', '.join(bounds)}")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"SLO quantile is {self.quantile}; it must be above 0 and at most 1, such as 0.99")

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """The SLO written as in `vllm bench serve --goodput`: "tbt:100 ttft:2000" (milliseconds), any order.

        "quantile:0.95" replaces the default 0.99. Raises ValueError naming the pair that cannot be read.
        """
        values: dict[str, float] = {}
        for pair in text.split():
            word, _, number = pair.partition(":")
            name = "quantile" if word == "quantile" else _FIELDS.get(word)
            if name is None:
                raise ValueError(f"SLO {pair!r}: unknown word {word!r}; {_REMEDY}")
            if name in values:
                raise ValueError(f"SLO {pair!r}: {word} is given twice; keep one")
            try:
                values[name] = float(number) if name == "quantile" else float(number) / 1e3
            except ValueError:
                raise ValueError(f"SLO {pair!r}: {number!r} is not a number; {_REMEDY}") from None
        return cls(**values)

    def __str__(self) -> str:
        """The text that `parse` reads back; milliseconds to 12 digits."""
        bounds = {word: getattr(self, name) for word, name in _WORDS.items()}
        words = [f"{word}:{bound * 1e3:.12g}" for word, bound in bounds.items() if bound is not None]
        if self.quantile != DEFAULT_QUANTILE:
            words.append(f"quantile:{self.quantile:.12g}")
        return " ".join(words)

    @property
    def pace_s(self) -> float | None:
        """The gap between tokens that keeps tbt, tpot and deadline, as far as set, if no gap is longer; else None.

        It is what a law can aim at that knows gaps alone. For tpot and deadline it asks more than was promised.
        """
        return min((s for s in (self.tbt_s, self.tpot_s, self.deadline_s) if s is not None), default=None)

    @property
    def late_share(self) -> float:
        """Largest share of a request's tokens, 0 to 1, that may be late: 1 - quantile without its rounding error."""
        return round(1.0 - self.quantile, 12)

    def late(self, k: Any, since_arrival_s: Any, ttft_s: Any) -> Any:
        """Whether output token `k` (the first is 0), that came so long after the arrival, came past its deadline.

        It is due max(TTFT, bound on TTFT) + k * deadline after the arrival (QoServe's accumulated slack, arXiv
        2503.22562): a first token before its bound lends its time to all that follow, one after it takes none from
        them. Without a bound on TTFT the first token's time is where they are counted from. All numbers or arrays of
        one shape. Raises ValueError if the SLO has no deadline.
        """
        if self.deadline_s is None:
            raise ValueError(f"SLO {str(self)!r} has no deadline for tokens: add deadline:MILLISECONDS to it")
        due_s = np.maximum(ttft_s, self.ttft_s or 0.0) + k * self.deadline_s
        return since_arrival_s > due_s + RESOLUTION_S

    def late_tokens(self, ttft_s: float, tbt_s: NDArray[np.float64]) -> int:
        """How many tokens of a request with these gaps, shape [output tokens - 1], came past their deadline."""
        since_arrival_s = ttft_s + np.cumsum(tbt_s)  # a first token is never late
        return int(np.count_nonzero(self.late(np.arange(1, tbt_s.size + 1), since_arrival_s, ttft_s)))

    def met(self, ttft_s: float, tbt_s: NDArray[np.float64], e2el_s: float) -> bool:
        """Whether a finished request kept the SLO. `tbt_s` holds its gaps in order, shape [output tokens - 1].

        A request of one token has no gap, and so keeps any bound on gaps.
        """
        if self.ttft_s is not None and ttft_s > self.ttft_s:
            return False
        if self.e2el_s is not None and e2el_s > self.e2el_s:
            return False
        if tbt_s.size == 0:
            return True
        if self.tpot_s is not None and tbt_s.mean() > self.tpot_s:
            return False
        if self.deadline_s is not None and self.late_tokens(ttft_s, tbt_s) / (tbt_s.size + 1) > self.late_share:
            return False
        return self.tbt_s is None or within(tbt_s, self.tbt_s, self.quantile)

    def share_of_tokens(self, tbt_s: NDArray[np.float64]) -> float:
        """Share, 0 to 1, of the gaps of any number of requests (shape [gaps]) that are within the bound on TBT.

        Without gaps it is 1. Raises ValueError if the SLO has no bound on TBT.
        """
        if self.tbt_s is None:
            raise ValueError(f"SLO {str(self)!r} has no bound on TBT: add tbt:MILLISECONDS to it")
        return float(np.mean(tbt_s <= self.tbt_s)) if tbt_s.size else 1.0


def spared(n: Any, quantile: float) -> Any:
    """Of n values, how many may lie above a bound that numpy's linear `quantile` of them keeps; number or array."""
    return n - 1 - np.floor((n - 1) * quantile)


def within(values: NDArray[np.float64], bound: float, quantile: float) -> bool:
    """np.quantile(values, quantile) <= bound, told by counting wherever that is enough; True without values."""
    above = int(np.count_nonzero(values > bound))
    more = int(spared(values.size, quantile)) - above
    return above == 0 or more > 0 or (more == 0 and bool(np.quantile(values, quantile) <= bound))
