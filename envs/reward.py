"""What an iteration is worth: a request that keeps its SLO to the full earns 2, so the sum over a run follows goodput.

A request's prompt is worth 1, spread over its tokens. Each earns its part when it is computed, times what is left of
the promised TTFT then, as a share: 1 on arrival, 0 from the TTFT on. So progress pays at once, and sooner pays more.
A request of one token has no gaps, and earns no more.

Its gaps are worth 1, spread over them too. A gap within the TBT SLO earns its part p; a late one costs p / (1 - q) more
than it earns, q being the quantile of the SLO. So the gaps of a request earn something exactly while no more of them
are late than q allows: the constraint "P99 of TBT within the SLO" with a price, in the form of Lagrange (Altman,
Constrained Markov Decision Processes, 1999). A law learns of every breach at once.

Where an episode is cut off, each request that has arrived and not finished costs 1: it is a miss, as in goodput. What
is computed before the first action is nobody's merit, and not in the sum.
"""

from typing import NamedTuple

import numpy as np

from engine.compiled import compiled
from envs.features import Promise
from envs.state import IntArray, State


class Earned(NamedTuple):
    """One iteration's reward, and of the iterations that completed before it was formed: what they gave."""

    reward: float
    tbts: int
    late_tbts: int
    first_tokens: int
    finished_requests: int


NOTHING = Earned(0.0, 0, 0, 0, 0)


def plus(a: Earned, b: Earned) -> Earned:
    """The sum of two iterations."""
    return Earned(
        a.reward + b.reward,
        a.tbts + b.tbts,
        a.late_tbts + b.late_tbts,
        a.first_tokens + b.first_tokens,
        a.finished_requests + b.finished_requests,
    )


@compiled
def earned(state: State, credited: IntArray, promise: Promise, launched: bool) -> Earned:
    """Of the iteration that was launched last (or not: nothing to run), and of the completions it found.

    `credited`, int64 [requests], holds the prompt tokens of each that have earned their part; it is kept up here. What
    a preempted prompt computes again earns nothing.
    """
    s, report, requests = state.scalars[0], state.report, state.requests
    late_costs = 1.0 / promise.late_share
    total, late = 0.0, 0
    for i in range(s.n_gaps):
        part = 1.0 / (requests.output_tokens[report.gap_slots[i]] - 1)
        total += part
        if report.gap_s[i] > promise.tbt_s:
            total -= part * late_costs
            late += 1
    if launched:
        ring = (s.oldest + s.in_flight - 1) % len(state.flight.samples)
        completed_s = state.flight.completed_s[ring]
        for row in range(s.decodes, s.rows):
            slot = state.plan.slots[row]
            prompt = requests.prompt_tokens[slot]
            computed = min(state.arrays.context[slot], prompt)
            if computed > credited[slot]:
                left = 1.0 - (completed_s - requests.arrival_s[slot]) / promise.ttft_s
                total += (computed - credited[slot]) / prompt * max(left, 0.0)
                credited[slot] = computed
    return Earned(total, s.n_gaps, late, s.n_firsts, s.n_finished)


def unfinished_requests(state: State, until_s: float) -> int:
    """How many arrived before the cut at `until_s` and have not ended."""
    s = state.scalars[0]
    arrived = min(int(s["arrived"]), int(np.searchsorted(state.requests.arrival_s, until_s)))
    return arrived - int(s["finished"])
