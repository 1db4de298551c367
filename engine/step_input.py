"""One iteration's work in plain arrays: what the scheduler decided, in the form that every rank computes it from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.philox import uniforms
from engine.request import Batch, Request

Int32 = NDArray[np.int32]


class OutOfDeviceMemory(RuntimeError):
    """A step needs more memory than the device has free, also after letting go of what was kept for later."""


@dataclass(slots=True)
class DrawnRows:
    """The rows that draw their token at random; the others are greedy.

    `rows` index the sampled rows of the step. `uniform` in [0, 1) decides the token: it depends on the request's seed
    and the output position alone. `top_k` 0 and `top_p` 1 switch those filters off: the first `n_unfiltered` rows have
    neither, the others at least one.
    """

    rows: Int32
    uniform: NDArray[np.float64]
    temperature: NDArray[np.float64]
    top_k: Int32
    top_p: NDArray[np.float64]
    n_unfiltered: int


@dataclass(slots=True)
class StepInput:
    """A batch without its requests. Arrays have one entry a row, decodes (`n_decodes`) first, unless said otherwise.

    `token_ids` [tokens] holds -1 - j where the token is still on the device: the one that sampled row j yields of the
    step launched `in_flight` steps before this one, the oldest on its way. `block_tables` is [rows, widest row's
    blocks]; entries past a row's length are 0. `sampled_rows` are the rows that yield a token. `work_since_ns` is the
    batch's. At least one row.
    """

    n_decodes: int
    n_tokens: Int32
    context: Int32
    token_ids: Int32
    block_tables: Int32
    sampled_rows: Int32
    drawn: DrawnRows | None
    in_flight: int = 0
    work_since_ns: int = 0

    @property
    def has_unknown(self) -> bool:
        """Whether any token is still on the device; only decodes have such."""
        return bool((self.token_ids[: self.n_decodes] < 0).any())

    @property
    def positions(self) -> Int32:
        """[tokens]: each token's index in its request."""
        ends = np.cumsum(self.n_tokens, dtype=np.int32)
        first = ends - self.n_tokens
        positions: Int32 = np.arange(ends[-1], dtype=np.int32) + np.repeat(self.context - first, self.n_tokens)
        return positions


def step_input(batch: Batch, in_flight: Sequence[Batch]) -> StepInput:
    """`in_flight`, oldest first: the oldest yields the tokens that the decodes of `batch` do not know yet."""
    contexts, n_tokens = batch.context.tolist(), batch.n_tokens.tolist()
    n = batch.n_decodes
    # Plain lists: for tens of rows they are several times cheaper than array operations.
    token_ids = _newest_tokens(batch.requests[:n], contexts[:n], in_flight)
    for request, context, tokens in zip(batch.requests[n:], contexts[n:], n_tokens[n:], strict=True):
        token_ids += request.token_ids[context : context + tokens]
    sampled = np.flatnonzero(batch.samples)
    return StepInput(
        n_decodes=n,
        n_tokens=batch.n_tokens.astype(np.int32),
        context=batch.context.astype(np.int32),
        token_ids=np.array(token_ids, np.int32),
        block_tables=batch.block_tables,
        sampled_rows=sampled.astype(np.int32),
        drawn=_drawn_rows(batch, sampled.tolist()),
        in_flight=len(in_flight),
        work_since_ns=batch.work_since_ns,
    )


def even_step(n_tokens: int, n_rows: int, block_tokens: int) -> StepInput:
    """Work of a given size that means nothing, for warming up and for measuring: fresh rows, all in block 0.

    Every row draws its token under both filters, which takes the most memory.
    """
    ends = np.arange(1, n_rows + 1) * n_tokens // n_rows
    row_tokens = np.diff(ends, prepend=0).astype(np.int32)
    rows, ones = np.arange(n_rows, dtype=np.int32), np.ones(n_rows)
    width = -(-int(row_tokens.max()) // block_tokens)
    return StepInput(
        n_decodes=0,
        n_tokens=row_tokens,
        context=np.zeros(n_rows, np.int32),
        token_ids=np.zeros(n_tokens, np.int32),
        block_tables=np.zeros((n_rows, width), np.int32),
        sampled_rows=rows,
        drawn=DrawnRows(rows, 0.5 * ones, ones, np.ones(n_rows, np.int32), 0.5 * ones, 0),
    )


def _newest_tokens(decodes: list[Request], contexts: list[int], in_flight: Sequence[Batch]) -> list[int]:
    """One token a decode: the first that is not in the KV cache."""
    places: dict[Request, int] | None = None
    tokens = []
    for request, context in zip(decodes, contexts, strict=True):
        known = request.token_ids
        if context < len(known):
            tokens.append(known[context])
            continue
        if places is None:
            assert in_flight, "a token is unknown, yet nothing is in flight"
            oldest = in_flight[0]
            sampled = np.flatnonzero(oldest.samples).tolist()
            places = {oldest.requests[row]: place for place, row in enumerate(sampled)}
        tokens.append(-1 - places[request])
    return tokens


def _drawn_rows(batch: Batch, sampled: list[int]) -> DrawnRows | None:
    free: list[tuple[int, int]] = []
    filtered: list[tuple[int, int]] = []
    for place, row in enumerate(sampled):
        params = batch.requests[row].sampling
        if params.temperature > 0:
            (filtered if params.top_k > 0 or params.top_p < 1 else free).append((place, row))
    drawn = free + filtered
    if not drawn:
        return None
    rows = [row for _, row in drawn]
    requests = [batch.requests[row] for row in rows]
    # Counted from the batch, not from the request: recomputing after a preemption then draws the same number.
    known = (batch.context + batch.n_tokens)[rows].tolist()
    return DrawnRows(
        rows=np.array([place for place, _ in drawn], np.int32),
        uniform=uniforms([r.seed for r in requests], [n - r.n_prompt for n, r in zip(known, requests, strict=True)]),
        temperature=np.array([r.sampling.temperature for r in requests]),
        top_k=np.array([r.sampling.top_k for r in requests], np.int32),
        top_p=np.array([r.sampling.top_p for r in requests]),
        n_unfiltered=len(free),
    )
