"""Which budget keeps the promise on a running engine, found from its telemetry, window by window.

A window is some iterations under one candidate. All windows together tell the time of a mixed iteration as a line in
its tokens, times a random factor whose quantile is that of the iterations that spent their budget; where that product
meets the SLO is the edge, and the next candidate. A step never takes less time for more tokens, so that the largest
budget within the SLO is the one to have: it serves most requests, and prompts wait least. What was never measured is
never recommended: the best is a candidate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.protocol import Telemetry
from envs.slo import Slo
from policies.guard import BINDING, clamp, whole_tiles
from policies.policy import Decision, Iteration, IterationLog

FloatArray = NDArray[np.float64]

SPENT = 50  # iterations with a spent budget in a window
AT_THE_EDGE = 3 * SPENT  # of them near the edge, until it counts as known: a P99 of fewer is chance
NEAR = 0.15  # candidates so near to one another tell the same
PRECISION = 0.05  # an edge that moved by less has settled
MAX_RAISE = 2.0  # beyond what has been seen, the line is a guess
RETREAT = 0.85  # from an edge at which windows fail: an engine's time may run out before one near it holds
LATE_ENOUGH = 3  # iterations: so many late ones, and many times more than the SLO spares, settle it
MANY_TIMES = 10
PATIENCE_S = 60.0  # traffic that does not fill a window within that does not need so large a budget
FEW = 8


@dataclass
class Window:
    """The mixed iterations of one candidate that held up decodes: their tokens, the gaps they caused, and how many.

    `spent` marks those that used up the budget. `backlog_tokens` are prompt tokens waiting, first and last.
    """

    budget_tokens: int
    slo: Slo
    began_ns: int = 0
    now_ns: int = 0
    tokens: list[int] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    decodes: list[int] = field(default_factory=list)
    spent: list[bool] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    backlog_tokens: tuple[int, int] = (0, 0)
    iterations: int = 0

    @property
    def seconds(self) -> float:
        return (self.now_ns - self.began_ns) * 1e-9

    @property
    def n_spent(self) -> int:
        return sum(self.spent)

    @property
    def n_late(self) -> int:
        """Of all, also of those that did not spend the budget: a large one permits them."""
        bound_s = tbt_bound_s(self.slo)
        return sum(tbt_s > bound_s for tbt_s in self.tbt_s)

    @property
    def cut(self) -> bool:
        """Late beyond doubt: measuring on would hurt for nothing."""
        share = min(MANY_TIMES * (1 - self.slo.quantile), 0.5)
        return self.n_late >= LATE_ENOUGH and self.n_late > share * len(self.tbt_s)

    @property
    def failed(self) -> bool:
        """Cut, or over with the promise broken: at the edge, that may be chance."""
        return self.cut or (self.n_spent >= SPENT and self.quantile_s > tbt_bound_s(self.slo))

    @property
    def idle(self) -> bool:
        """Nothing is late, and no larger budget would be spent either: traffic does not need so much."""
        return self.n_spent < FEW and not self.n_late

    @property
    def ended(self) -> bool:
        return self.cut or self.n_spent >= SPENT or self.seconds >= PATIENCE_S

    def take(self, iteration: Iteration, telemetry: Telemetry) -> None:
        """An iteration that ran under this candidate."""
        due = telemetry.queue.waiting_prompt_tokens
        if self.iterations == 0:
            self.began_ns, self.backlog_tokens = telemetry.scheduled_ns, (due, due)
        self.iterations += 1
        self.now_ns, self.backlog_tokens = telemetry.scheduled_ns, (self.backlog_tokens[0], due)
        self.ttft_s += iteration.measured.ttft_s
        if iteration.tbt_s is None or iteration.batch.prefill_tokens == 0:
            return
        tokens = iteration.batch.total_tokens
        self.tokens.append(tokens)
        self.tbt_s.append(iteration.tbt_s)
        self.decodes.append(len(iteration.measured.tbt_s))
        self.spent.append(tokens >= BINDING * self.budget_tokens)

    @property
    def table(self) -> FloatArray:
        """A row for each iteration, float64 [n, 4]: tokens, seconds, decodes, whether it spent the budget."""
        columns = (self.tokens, self.tbt_s, self.decodes, self.spent)
        return np.array(columns, np.float64).T.reshape(-1, len(columns))

    @property
    def quantile_s(self) -> float:
        """The SLO's, of the gaps of all tokens in iterations that spent the budget; NaN without one."""
        _, tbt_s, decodes, _ = self._of_spent().T
        return _quantile(tbt_s, decodes, self.slo.quantile)

    @property
    def tokens_per_s(self) -> float:
        """Computed by iterations that spent the budget: what the engine does at most. NaN without one."""
        tokens, tbt_s, _, _ = self._of_spent().T
        return float(tokens.sum() / tbt_s.sum()) if tokens.size else float("nan")

    def _of_spent(self) -> FloatArray:
        table = self.table
        rows: FloatArray = table[table[:, 3] > 0]
        return rows


def edge_tokens(windows: list[Window], slo: Slo, around: float) -> float | None:
    """The batch, in tokens, whose time meets the SLO's bound on TBT at its quantile; None without iterations about it.

    From iterations of half to twice `around`, or the largest if none is. While they are all of about one size, time is
    taken for proportional to tokens: with the fixed cost of a step that errs towards the size that was seen. The
    quantile is that of the iterations which spent their budget, or of all while these are few.
    """
    table = np.concatenate([w.table for w in windows])
    if not table.size:
        return None
    around = min(around, table[:, 0].max())
    tokens, tbt_s, decodes, spent = table[(table[:, 0] >= around / 2) & (table[:, 0] <= 2 * around)].T
    if not tokens.size:
        return None
    used_up = spent > 0 if (spent > 0).sum() >= FEW else spent >= 0
    fixed_s, token_s = _line(tokens, tbt_s)
    factor = _quantile((tbt_s / (fixed_s + token_s * tokens))[used_up], decodes[used_up], slo.quantile)
    return max((tbt_bound_s(slo) / factor - fixed_s) / token_s, 0.0)


def tbt_bound_s(slo: Slo) -> float:
    """Raises ValueError without one."""
    if slo.tbt_s is None:
        raise ValueError(f"SLO {str(slo)!r} has no bound on TBT, which limits the budget: add tbt:MILLISECONDS")
    return slo.tbt_s


def _line(tokens: FloatArray, tbt_s: FloatArray) -> tuple[float, float]:
    """Least squares; both at least 0."""
    if np.ptp(tokens) > 0.25 * tokens.max():
        token_s, fixed_s = np.polyfit(tokens, tbt_s, 1)
        if token_s > 0 and fixed_s >= 0:
            return float(fixed_s), float(token_s)
    return 0.0, float(tbt_s.sum() / tokens.sum())


def _quantile(values: FloatArray, weights: FloatArray, q: float) -> float:
    """The least value that a share `q` of the weight does not exceed; NaN without values."""
    if not values.size:
        return float("nan")
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, q)), values.size - 1)])


class LiveTuner:
    """Answers an engine's telemetry with the candidate of the moment, and knows when it is done. Pure, like a law.

    `begun` is told each candidate, `ended` each window when it is over.
    """

    def __init__(
        self,
        first: Telemetry,
        slo: Slo,
        most_windows: int,
        begun: Callable[[int], None],
        ended: Callable[[Window], None],
    ) -> None:
        """Raises ValueError for a promise without a bound on TBT."""
        tbt_bound_s(slo)
        self._slo = slo
        self._bounds = first.bounds
        self._most_windows = most_windows
        self._begun = begun
        self._ended = ended
        self._log = IterationLog()
        self._windows: list[Window] = []
        self.done = False
        self.settled = False  # not settled, it is done with its windows, or no budget keeps the promise
        self.edge_tokens: float | None = None
        self.best_tokens: int | None = None
        self._window = self._begin(self._allowed(first.knobs.budget_tokens), first)

    @property
    def budget_tokens(self) -> int:
        """The candidate of the moment; once it is done the best, if there is one."""
        return self.best_tokens if self.done and self.best_tokens is not None else self._window.budget_tokens

    @property
    def hopeless(self) -> bool:
        """Whether not even the engine's least budget keeps the promise."""
        least = self._allowed(0)
        at_least = [w for w in self._windows if w.budget_tokens == least]
        known = any(w.cut for w in at_least) or sum(w.n_spent for w in at_least) >= AT_THE_EDGE
        return self.best_tokens is None and self.edge_tokens is not None and self.edge_tokens < least and known

    def end(self) -> None:
        """Begin no other window; answer with the best from now on."""
        self.done = True

    def decide(self, telemetry: Telemetry) -> Decision:
        for iteration in self._log.completed(telemetry):
            ours = iteration.knobs.source == "controller" and iteration.knobs.budget_tokens == self.budget_tokens
            if ours and not self.done:
                self._window.take(iteration, telemetry)
                if self._window.ended:
                    self._next(telemetry)
        return Decision(self.budget_tokens, self.budget_tokens, "tuned" if self.done else "tuning")

    def _begin(self, budget_tokens: int, telemetry: Telemetry) -> Window:
        self._begun(budget_tokens)
        return Window(budget_tokens, self._slo, telemetry.scheduled_ns, telemetry.scheduled_ns)

    def _next(self, telemetry: Telemetry) -> None:
        window = self._window
        self._windows.append(window)
        edge = edge_tokens(self._windows, self._slo, window.budget_tokens)
        self.edge_tokens = self.edge_tokens if edge is None else edge  # what was known before stays known
        self.best_tokens = self._best()
        budget = window.budget_tokens if self.edge_tokens is None else self._within_reach(self._safe(self.edge_tokens))
        best_is_near = self.best_tokens is not None and self._near(self.best_tokens, budget, PRECISION)
        self.settled = window.idle or (best_is_near and self._spent_near(budget) >= AT_THE_EDGE)
        self.done = self.settled or self.hopeless or len(self._windows) >= self._most_windows
        self._ended(window)
        if not self.done:
            self._window = self._begin(budget, telemetry)

    def _best(self) -> int | None:
        """The largest that was measured within the edge. Without any the least that kept the promise beyond it, for
        the edge is an estimate; None without that, too.
        """
        measured = [w for w in self._windows if w.tbt_s and not w.cut]
        edge = -np.inf if self.edge_tokens is None else self.edge_tokens
        within = [w.budget_tokens for w in measured if w.budget_tokens <= edge or w.idle]
        return max(within) if within else min(filter(self._kept, (w.budget_tokens for w in measured)), default=None)

    def _kept(self, budget_tokens: int) -> bool:
        """By all iterations that spent it, no fewer than a window's."""
        table = np.concatenate([w.table for w in self._windows if w.budget_tokens == budget_tokens])
        _, tbt_s, decodes, _ = table[table[:, 3] > 0].T
        return tbt_s.size >= SPENT and _quantile(tbt_s, decodes, self._slo.quantile) <= tbt_bound_s(self._slo)

    def _safe(self, edge: float) -> float:
        """Below it while nothing has held, the further the more failed: first one that holds, then the largest."""
        failed = sum(window.failed for window in self._windows)
        return edge if self.best_tokens is not None else edge * RETREAT ** max(failed - 1, 0)

    def _within_reach(self, edge: float) -> int:
        known = max((w.budget_tokens for w in self._windows if not w.cut), default=self._windows[-1].budget_tokens)
        return self._allowed(int(min(edge, MAX_RAISE * known)))

    def _allowed(self, budget_tokens: int) -> int:
        return whole_tiles(clamp(budget_tokens, self._bounds), self._bounds)

    def _near(self, a: int, b: int, share: float) -> bool:
        return abs(a - b) <= max(share * b, self._bounds.tile_tokens)

    def _spent_near(self, budget: int) -> int:
        return sum(w.n_spent for w in self._windows if self._near(w.budget_tokens, budget, NEAR))
