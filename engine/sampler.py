"""The next token of each row: greedy, or drawn at a temperature from the top k and the top p.

A draw depends on the row's uniform number and its logits, and on nothing else: not on what shares the batch. The number
picks from the cumulative distribution. Nothing here waits for a device.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Draws:
    """The rows of a batch that draw at random (see engine.step_input.DrawnRows), on the logits' device.

    `rows` (int64) index the logits. All are [drawn rows], float64 but for the integer `rows` and `top_k` (0: no limit);
    the first `n_unfiltered` have neither a top k nor a top p.
    """

    rows: torch.Tensor
    uniform: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    n_unfiltered: int


def sample(logits: torch.Tensor, draws: Draws | None) -> torch.Tensor:
    """One token id (int64) per row of `logits` [rows, vocab]."""
    tokens = logits.argmax(dim=-1)
    if draws is not None:
        tokens.index_copy_(0, draws.rows, draw(logits, draws))
    return tokens


def draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """One token id (int64) per drawn row of `logits` [rows, vocab]."""
    scaled = logits.index_select(0, draws.rows).double()
    # The maximum goes to 0 first: a minute temperature then leads to greedy, not to an overflow.
    scaled = scaled.sub_(scaled.amax(dim=-1, keepdim=True)).div_(draws.temperature[:, None])
    # A model that overflows gives NaN: any token then, rather than an end of the engine.
    scaled.nan_to_num_(nan=0.0, neginf=-torch.inf)
    n = draws.n_unfiltered
    parts = []
    if n > 0:
        parts.append(_pick(scaled[:n].softmax(dim=-1), draws.uniform[:n]))
    if n < len(scaled):
        parts.append(_draw_filtered(scaled[n:], draws.uniform[n:], draws.top_k[n:, None], draws.top_p[n:, None]))
    return torch.cat(parts)


def _draw_filtered(
    scaled: torch.Tensor, uniform: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Top k first, then top p of what is left, as in transformers; the likeliest token always stays."""
    # Stable, so that equal logits fall in the order of their ids, whatever the batch.
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = ranked.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf)
    probabilities = ranked.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (rank > 0), 0.0)
    return ids.gather(-1, _pick(probabilities, uniform)[:, None])[:, 0]


def _pick(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at `uniform` [rows]; `probabilities` [rows, n] need not sum to 1."""
    cumulative = probabilities.cumsum(dim=-1)
    # A uniform number is at most 1 - 2**-53, so that the target stays below the total, rounding included.
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
