"""The prompts that an engine has to compute, one by one, as telemetry tells of them."""

from collections.abc import Iterable
from itertools import islice
from operator import itemgetter

from engine.batching import RequestArrays
from engine.protocol import MOST_PROMPTS
from engine.request import Batch, Request


def prompts_to_compute(
    batch: Batch | None, prefilling: Iterable[Request], waiting: Iterable[Request], arrays: RequestArrays
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(remaining, context) of the first prompts, as of before `batch`, which serves the first of them.

    `prefilling` run and have prompt left, `waiting` do not run. A prompt ends with the last token that is known.
    """
    computed, cached = arrays.context.item, arrays.cached_tokens.item
    served = batch.requests[batch.n_decodes :] if batch else []
    starts = batch.context[batch.n_decodes :].tolist() if batch else []
    told = [(len(r.token_ids) - start, start) for r, start in zip(served, starts, strict=True)]
    others = {r.slot: len(r.token_ids) for r in prefilling}
    for r in served:
        others.pop(r.slot, None)
    told += sorted(((n - computed(slot), computed(slot)) for slot, n in others.items()), key=itemgetter(0))
    for r in islice(waiting, max(MOST_PROMPTS - len(told), 0)):
        told.append((len(r.token_ids) - cached(r.slot), cached(r.slot)))
    return tuple(n for n, _ in told[:MOST_PROMPTS]), tuple(start for _, start in told[:MOST_PROMPTS])
