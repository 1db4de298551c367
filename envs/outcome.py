"""What a simulated run gave: every request's times, exactly, and the statistics that are asked of them."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from envs.slo import Slo, spared
from envs.trace import Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One row a request, in order of arrival; times are float64 seconds from the start, NaN where it did not happen.

    `token_times_s` holds the times of all output tokens, request after request: those of request i begin at
    `first_token_row[i]`, and `produced[i]` of them happened. `duration_s` runs from the first arrival to the last
    token, or to where the run was cut. `stage_bubble_s` is time that a stage stood idle while there was work, float64
    [stages]. `log` has one row an iteration if it was kept, columns `LOG_COLUMNS`.
    """

    workload: Workload
    first_scheduled_s: FloatArray
    produced: IntArray
    first_token_row: IntArray
    token_times_s: FloatArray
    duration_s: float
    iterations: int
    preemptions: int
    stage_busy_s: FloatArray
    stage_bubble_s: FloatArray
    log: FloatArray

    @property
    def finished(self) -> BoolArray:
        return np.equal(self.produced, self.workload.output_tokens)

    @property
    def scheduling_delay_s(self) -> FloatArray:
        """Arrival to first scheduled."""
        return self.first_scheduled_s - self.workload.arrival_s

    @property
    def ttft_s(self) -> FloatArray:
        """Arrival to first token."""
        return self.token_times_s[self.first_token_row] - self.workload.arrival_s

    @property
    def e2el_s(self) -> FloatArray:
        """Arrival to last token, of finished requests."""
        last = self.token_times_s[self.first_token_row + self.workload.output_tokens - 1]
        return np.where(self.finished, last, np.nan) - self.workload.arrival_s

    @property
    def tpot_s(self) -> FloatArray:
        """Mean gap of a finished request; NaN for one of a single token."""
        gaps = self.workload.output_tokens - 1
        first = self.token_times_s[self.first_token_row]
        last = self.token_times_s[self.first_token_row + gaps]
        return np.where(self.finished & (gaps > 0), (last - first) / np.maximum(gaps, 1), np.nan)

    @property
    def tbt_s(self) -> FloatArray:
        """Every gap between two tokens of a request, in no particular order."""
        gaps = np.diff(self.token_times_s)
        within = np.ones(len(gaps), np.bool_)
        within[self.first_token_row[1:] - 1] = False
        return gaps[within & ~np.isnan(gaps)]

    def tokens_in_slo(self, tbt_slo_s: float) -> float:
        """Share of the gaps, 0 to 1, that are within the bound; 1 without any."""
        gaps = self.tbt_s
        return float(np.mean(gaps <= tbt_slo_s)) if len(gaps) else 1.0

    def late(self, slo: Slo) -> BoolArray:
        """Which tokens came past their deadline, in the order of `token_times_s`. ValueError without a deadline."""
        n = self.workload.output_tokens
        k = np.arange(len(self.token_times_s)) - np.repeat(self.first_token_row, n)
        since_arrival_s = self.token_times_s - np.repeat(self.workload.arrival_s, n)
        late: BoolArray = slo.late(k, since_arrival_s, np.repeat(self.ttft_s, n))
        return late

    def late_shares(self, slo: Slo) -> FloatArray:
        """Of the tokens that each request asked for, the share that came past their deadline."""
        late = np.add.reduceat(self.late(slo), self.first_token_row, dtype=np.int64)
        return np.asarray(late / self.workload.output_tokens)

    def tokens_on_time(self, slo: Slo) -> float:
        """Share of the tokens that came, 0 to 1, that kept their deadline; 1 without any."""
        return 1.0 - float(self.late(slo).sum()) / max(int(self.produced.sum()), 1)

    def at_best(self, now_s: float) -> "Outcome":
        """The best that this run, cut off at `now_s`, could still become: all that has not happened happens now."""
        return replace(
            self,
            first_scheduled_s=np.where(np.isnan(self.first_scheduled_s), now_s, self.first_scheduled_s),
            produced=self.workload.output_tokens,
            token_times_s=np.where(np.isnan(self.token_times_s), now_s, self.token_times_s),
        )

    def met(self, slo: Slo) -> BoolArray:
        """Which requests kept the SLO, as `Slo.met` judges each; one that did not finish has missed it."""
        n_gaps = self.workload.output_tokens - 1
        tbt_s = np.inf if slo.tbt_s is None else slo.tbt_s
        late_before = np.concatenate(([0], np.cumsum(np.diff(self.token_times_s) > tbt_s)))
        late = late_before[self.first_token_row + n_gaps] - late_before[self.first_token_row]
        kept: BoolArray = self.finished & (late <= spared(n_gaps, slo.quantile))
        for bound_s, values_s in ((slo.ttft_s, self.ttft_s), (slo.tpot_s, self.tpot_s), (slo.e2el_s, self.e2el_s)):
            if bound_s is not None:
                kept &= ~(values_s > bound_s)
        if slo.deadline_s is not None:
            kept &= self.late_shares(slo) <= slo.late_share
        for i in np.flatnonzero(kept & (late > 0)):  # late ones, but perhaps few enough
            first = self.first_token_row[i]
            gaps_s = np.diff(self.token_times_s[first : first + n_gaps[i] + 1])
            kept[i] = np.quantile(gaps_s, slo.quantile) <= tbt_s
        return kept

    def goodput(self, slo: Slo) -> float:
        """Requests per second that met the SLO."""
        return float(self.met(slo).sum()) / self.duration_s

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return float(self.produced.sum()) / self.duration_s
