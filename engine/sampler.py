"""The next token of each row: greedy, or drawn at a temperature from the top k and the top p.

A draw depends on the request's seed, the output position and the logits, and on nothing else: not on what shares the
batch, not on preemption. One uniform number comes from the Philox generator keyed with the seed at the counter of the
position, and picks from the cumulative distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.request import SamplingParams

_PHILOX_KEYS = 1 << 128


@dataclass(slots=True)
class SamplingPlan:
    """The rows of a batch that draw at random; the others are greedy.

    `rows` index the logits; `filtered` says which of `rows` have a top k or top p. All are [drawn rows], float64 but
    for the integer `rows` and `top_k` (0: no limit) and the bool `filtered`.
    """

    rows: torch.Tensor
    uniform: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    filtered: torch.Tensor


def plan_sampling(
    params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]
) -> SamplingPlan | None:
    """`positions` are the output positions (0 is a request's first token); None when every row is greedy."""
    rows = [row for row, sampling in enumerate(params) if sampling.temperature > 0]
    if not rows:
        return None
    drawn = [params[row] for row in rows]
    top_k = torch.tensor([sampling.top_k for sampling in drawn])
    top_p = torch.tensor([sampling.top_p for sampling in drawn], dtype=torch.float64)
    return SamplingPlan(
        rows=torch.tensor(rows),
        uniform=torch.tensor([uniform(seeds[row], positions[row]) for row in rows], dtype=torch.float64),
        temperature=torch.tensor([sampling.temperature for sampling in drawn], dtype=torch.float64),
        top_k=top_k,
        top_p=top_p,
        filtered=(top_k > 0) | (top_p < 1),
    )


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides output token `position` of a request with this seed, any integer."""
    bits = int(np.random.Philox(key=seed % _PHILOX_KEYS, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def sample(logits: torch.Tensor, plan: SamplingPlan | None) -> list[int]:
    """One token id per row of `logits` [rows, vocab]."""
    tokens = logits.argmax(dim=-1)
    if plan is not None:
        chosen = logits.index_select(0, plan.rows).double()
        # The maximum goes to 0 first: a minute temperature then leads to greedy, not to an overflow.
        scaled = (chosen - chosen.amax(dim=-1, keepdim=True)) / plan.temperature[:, None]
        # A model that overflows gives NaN: any token then, rather than an end of the engine.
        scaled = scaled.nan_to_num(nan=0.0, neginf=-torch.inf)
        drawn = torch.empty_like(plan.rows)
        free = ~plan.filtered
        drawn[free] = _draw(scaled[free].softmax(dim=-1), plan.uniform[free])
        if plan.filtered.any():
            drawn[plan.filtered] = _draw_filtered(scaled[plan.filtered], plan)
        tokens[plan.rows] = drawn
    ids: list[int] = tokens.tolist()
    return ids


def _draw_filtered(scaled: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """Top k first, then top p of what is left, as in transformers; the likeliest token always stays."""
    top_k, top_p = plan.top_k[plan.filtered, None], plan.top_p[plan.filtered, None]
    # Stable, so that equal logits fall in the order of their ids, whatever the batch.
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1])
    ranked = ranked.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf)
    probabilities = ranked.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (rank > 0), 0.0)
    return ids.gather(-1, _draw(probabilities, plan.uniform[plan.filtered])[:, None])[:, 0]


def _draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at `uniform` [rows]; `probabilities` [rows, n] need not sum to 1."""
    cumulative = probabilities.cumsum(dim=-1)
    # A uniform number is at most 1 - 2**-53, so that the target stays below the total, rounding included.
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
