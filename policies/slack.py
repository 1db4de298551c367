"""Slack: how long each request's next token may still take, where what was gained on one may be spent on another."""

from collections import deque
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.protocol import Completion, Telemetry

Kind = Literal["tpot", "deadline"]

RECENT = 64  # completions: far more than any pipeline has in flight


class Slacks:
    """When the next token of every request is due, from telemetry alone.

    Output token k (the first is 0) of a request is due, after its arrival, at

        tpot        TTFT + k * bound
        deadline    max(TTFT, bound on TTFT) + k * bound      (QoServe's accumulated slack, arXiv 2503.22562)

    which is how `Slo` judges a deadline; and a request whose last token is on time has kept its tpot. One whose first
    token came before telemetry was heard starts without slack. Raises ValueError for bounds that are not positive
    numbers of seconds (no bound on TTFT: 0), or another kind.
    """

    def __init__(self, kind: Kind, bound_s: float, ttft_slo_s: float = 0.0) -> None:
        if kind not in ("tpot", "deadline"):
            raise ValueError(f"slack is of kind 'tpot' or 'deadline', not {kind!r}: other promises have none")
        if not 0.0 < bound_s < np.inf:
            raise ValueError(f"bound_s is {bound_s}; it must be a positive number of seconds")
        if not 0.0 <= ttft_slo_s < np.inf:
            raise ValueError(f"ttft_slo_s is {ttft_slo_s}; it must be a number of seconds, 0 without a bound on TTFT")
        self._bound_s = bound_s
        self._ttft_slo_s = ttft_slo_s if kind == "deadline" else 0.0
        self._due_s = np.full(256, np.inf)  # of each slot's next token, on the engine's clock; infinite where unknown
        self._served: deque[NDArray[np.int64]] = deque(maxlen=RECENT)  # the slots of the last completions with tokens

    def update(self, telemetry: Telemetry) -> None:
        """Book what has completed. Give it every message of the engine once, in order."""
        for completion in telemetry.completed:
            self._book(completion)

    def least_s(self, at_ns: int, completions: int) -> float:
        """Seconds left at `at_ns`, negative if overdue, until the earliest next token is due; infinite without any.

        Of the requests that got a token in the last `completions` that gave any; the others do not decode: they were
        preempted, or given up by their clients. The next token is the one after all that have been reported: each
        iteration in flight that gives one leaves `bound_s` more to the one after it. A prompt that ends in flight is
        not among them: once its first token is there, its next is due `bound_s` later, or more if the first was early.
        """
        recent = list(self._served)[-completions:]
        return min((float(self._due_s[slots].min()) for slots in recent), default=np.inf) - at_ns * 1e-9

    def _book(self, completion: Completion) -> None:
        firsts, now_s, bound_s = completion.ttft_slots, completion.completed_ns * 1e-9, self._bound_s
        slots = np.array(completion.tbt_slots + firsts, np.int64)
        if not slots.size:
            return
        largest = int(slots.max())
        if largest >= self._due_s.size:
            self._due_s = np.concatenate((self._due_s, np.full(largest + 1, np.inf)))
        due_s = self._due_s[slots]
        due_s[due_s == np.inf] = now_s
        self._due_s[slots] = due_s + bound_s
        for slot, ttft_s in zip(firsts, completion.ttft_s, strict=False):
            self._due_s[slot] = now_s + max(self._ttft_slo_s - ttft_s, 0.0) + bound_s
        for finished in completion.finished:
            self._due_s[finished.slot] = np.inf
        self._served.append(slots)
