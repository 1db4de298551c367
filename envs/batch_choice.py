"""The knobs whose batch takes as long as it may: how large the budget, and how it is shared out among prompts.

Compiled, because a law asks for dozens of batches in each iteration.
"""

from typing import NamedTuple

import numpy as np

from engine.compiled import compiled
from envs.machine_speed import N_PARTS, N_SIZES, Speed, as_run
from envs.outlook import Outlook
from envs.step_mean import FloatArray, sized_tokens

SHARES = 4.0  # a chunk is no smaller than the budget over that: with 8, long prompts wait for too long
CROWDED = 0.9  # of the KV cache: no more prompts are begun side by side
WORTH = 1.3  # times the gain of the whole budget, before prompts share it
LEAST_SIZE, MOST_SIZE = 0.5, 1.25  # of the largest budget found, among which a better size is looked for
SIZE_WORTH = 1.01  # times the tokens a second of the largest: a measured factor may be off by as much
COMPANY = 10.0  # requests that feel an iteration's lost time: those that wait, and arrive before the queue is empty
AS_PROFILED = np.ones(N_PARTS), np.zeros(N_SIZES)


class Choice(NamedTuple):
    """Knobs in tokens, and the mean seconds of the batch that they make of what is known to wait."""

    budget_tokens: int
    chunk_tokens: int
    step_s: float


class BatchChooser:
    """Finds the knobs for an outlook.

    The budget is the largest whose batch would take `limit_s` if prompts came to fill it; or, where the model tells of
    sizes that are served better than others and what waits fills the batch, one of at least `LEAST_SIZE` of it that
    computes more prompt tokens a second, unless microbatches are to be `even`. It is shared out evenly among
    the first one, two or four prompts, by the chunk; the shares that gain most per second are taken:

        gain = sum over the batch's prompts of (tokens computed / tokens left)

    That is how many prompts a second would end if batches went on so, and prefers those that are nearest to their end,
    as the least mean wait does (Schrage, Operations Research 16(3), 1968). Each prompt in a batch costs time of its
    own; what sharing loses by that is multiplied by the `COMPANY` that waits for it.
    """

    def __init__(self, coefficients: FloatArray, tile_tokens: int, max_budget_tokens: int) -> None:
        self._coefficients = coefficients
        self._tile = tile_tokens
        self._most_tiles = max_budget_tokens // tile_tokens

    def step_s(self, outlook: Outlook, budget_tokens: int, speed: Speed) -> float:
        """Mean seconds of the batch that this budget makes of what is known to wait, the chunk being the budget."""
        return float(_step_s((self._coefficients, speed), *_known(outlook), float(budget_tokens)))

    def choose(self, outlook: Outlook, limit_s: float, speed: Speed, *, share: bool, even: bool = False) -> Choice:
        """Budget 0 if no batch fits. `share` allows small chunks; `even` keeps to the limit, whatever sizes are served
        better, and lets prompts share only what they fill: of a pipeline's microbatches one that ends early waits for
        the others.
        """
        machine, (decodes, prompts) = (self._coefficients, speed), _known(outlook)
        sizes = self._tile, self._most_tiles
        return Choice(*choose(machine, decodes, prompts, limit_s, *sizes, SHARES if share else 1.0, WORTH, even, even))


# Plain tuples, which numba takes from Python microseconds faster than named ones.
Machine = tuple[FloatArray, Speed]
"""What a batch's time is told by: the packed model, and how the machine runs."""
Decodes = tuple[float, float]
"""How many, and their context in tokens."""
Prompts = tuple[FloatArray, FloatArray, float, float]
"""In the order in which they are served: tokens left of those known, and their context; how many more wait behind them,
and the tokens that each of those is taken to have.
"""


def _known(outlook: Outlook) -> tuple[Decodes, Prompts]:
    remaining, context = np.ascontiguousarray(outlook.prompts.T)  # of one layout, or numba compiles for several
    behind = float(outlook.behind_requests)
    each = outlook.behind_tokens / behind if behind else 0.0
    return (float(outlook.decodes), float(outlook.decode_context_tokens)), (remaining, context, behind, each)


@compiled
def _seconds(machine: Machine, decodes: Decodes, requests: float, tokens: float, attention: float) -> float:
    return float(as_run(machine[0], machine[1], decodes[0], decodes[1], requests, tokens, attention))


@compiled
def _load(prompts: Prompts, tokens: float, chunk: float) -> tuple[float, float, float, float]:
    """(requests, tokens, W, gain) of a batch of at most `tokens` prompt tokens, at most `chunk` of each prompt."""
    remaining, context, behind, each = prompts
    requests = attention = gain = 0.0
    left = tokens
    for i in range(len(remaining)):
        if left <= 0.0:
            break
        part = min(remaining[i], chunk, left)
        requests += 1.0
        attention += part * (context[i] + 0.5 * part)
        gain += part / remaining[i]
        left -= part
    if left > 0.0 and behind > 0.0:
        part = min(each, chunk, left)
        n = min(np.ceil(left / part), behind)
        rest = min(left, n * part)
        requests += n
        attention += 0.5 * rest * part
        gain += rest / each
        left -= rest
    return requests, tokens - left, attention, gain


@compiled
def _step_s(machine: Machine, decodes: Decodes, prompts: Prompts, budget: float) -> float:
    tokens = max(budget - decodes[0], 0.0)
    requests, computed, attention, _ = _load(prompts, tokens, tokens)
    return _seconds(machine, decodes, requests, computed, attention)


@compiled
def _filled_s(machine: Machine, decodes: Decodes, prompts: Prompts, tokens: float, chunk: float) -> float:
    """Mean seconds of a batch of `tokens` prompt tokens, should newcomers fill what the known prompts leave."""
    requests, computed, attention, _ = _load(prompts, tokens, chunk)
    if computed < tokens:
        part = min(chunk, tokens - computed)
        requests += np.ceil((tokens - computed) / part)
        attention += 0.5 * (tokens - computed) * part
    return _seconds(machine, decodes, requests, tokens, attention)


@compiled
def _largest_budget(
    machine: Machine,
    decodes: Decodes,
    prompts: Prompts,
    limit_s: float,
    tile: int,
    most_tiles: int,
    shares: float,
) -> int:
    """The most whole tiles whose batch takes `limit_s` at most, or none (0), should newcomers fill what is left.

    Where sizes have factors of their own a smaller budget may take longer, and be where the search ends.
    """
    fits, beyond, probe = 0, most_tiles + 1, most_tiles  # often everything fits
    while beyond - fits > 1:
        tokens = max(probe * tile - decodes[0], 0.0)
        if _filled_s(machine, decodes, prompts, tokens, _chunk(tokens, shares, tile)) <= limit_s:
            fits = probe
        else:
            beyond = probe
        probe = (fits + beyond) // 2
    return fits * tile


@compiled
def _best_size(
    machine: Machine,
    decodes: Decodes,
    prompts: Prompts,
    limit_s: float,
    tile: int,
    most_tiles: int,
    shares: float,
    largest: int,
) -> int:
    """The budget that computes most prompt tokens a second, attention counting the same for each, where the model tells
    of single sizes and the known prompts fill the batch; `largest` elsewhere, and where it is about as good.
    """
    whole, sized = largest - decodes[0], sized_tokens(machine[0])
    if LEAST_SIZE * largest >= sized or whole <= 0.0:
        return largest
    requests, computed, attention, _ = _load(prompts, whole, _chunk(whole, shares, tile))
    if computed < whole:
        return largest
    best, fastest = largest, SIZE_WORTH * whole / _seconds(machine, decodes, requests, whole, attention)
    top = min(int(MOST_SIZE * largest), int(sized), most_tiles * tile) // tile * tile
    for budget in range(max(top, largest), int(max(LEAST_SIZE * largest, decodes[0])), -tile):
        tokens = budget - decodes[0]
        share = tokens / whole
        rate = tokens / _seconds(machine, decodes, max(share * requests, 1.0), tokens, share * attention)
        if rate > fastest and (
            budget <= largest or _filled_s(machine, decodes, prompts, tokens, _chunk(tokens, shares, tile)) <= limit_s
        ):
            best, fastest = budget, rate
    return best


@compiled
def _chunk(tokens: float, shares: float, tile: int) -> float:
    """Of each prompt at most, in a batch of so many prompt tokens."""
    return tokens if shares == 1.0 else float(max(np.floor(tokens / shares / tile), 1.0) * tile)


@compiled
def choose(
    machine: Machine,
    decodes: Decodes,
    prompts: Prompts,
    limit_s: float,
    tile: int,
    most_tiles: int,
    most_shares: float,
    worth: float,
    even: bool,
    filled: bool,
) -> tuple[int, int, float]:
    """A `Choice`, as `BatchChooser` says; shares that gain `worth` times as much per second as fewer do are taken.

    Both halves of what `BatchChooser` calls even: to keep to the limit, and to share only what is `filled`.
    """
    best_budget, best_chunk, best_s, best = 0, 0, 0.0, 0.0
    shares = 1.0
    while shares <= most_shares:
        budget = _largest_budget(machine, decodes, prompts, limit_s, tile, most_tiles, shares)
        if not even:
            budget = _best_size(machine, decodes, prompts, limit_s, tile, most_tiles, shares, budget)
        while True:
            tokens = max(budget - decodes[0], 0.0)
            chunk = float(budget) if shares == 1.0 else _chunk(tokens, shares, tile)
            requests, computed, attention, gain = _load(prompts, tokens, chunk)
            seconds = _seconds(machine, decodes, requests, computed, attention)
            # A batch that the known prompts do not fill may be of a size that takes longer.
            if seconds <= limit_s or tokens <= 0.0 or sized_tokens(machine[0]) == 0.0:
                break
            budget -= tile
        if filled and shares > 1.0 and computed < tokens - shares * tile:  # which chunks of whole tiles may leave over
            break
        # Without sharing the same tokens are of as many prompts as it takes to find them.
        whole = _load(prompts, computed, computed)[0]
        whole_s = _seconds(machine, decodes, max(whole, 1.0), computed, attention)
        value = gain / max(seconds, 1e-9) / (1.0 + COMPANY * shares * max(seconds / max(whole_s, 1e-9) - 1.0, 0.0))
        if shares == 1.0 or value > worth * best:
            best_budget, best_chunk, best_s, best = budget, int(chunk), seconds, value
        if tokens <= 0.0 or len(prompts[0]) + prompts[2] < 2.0:
            break
        shares *= 2.0
    return best_budget, best_chunk, best_s
