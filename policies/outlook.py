"""What a law can know of the iteration that its answer acts on, one dead time after the one that telemetry reports."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from engine.protocol import Telemetry


class Outlook(NamedTuple):
    """The state in which the next batch under our knobs is formed: who decodes, and which prompts are left to compute.

    Requests that end in between are not known beforehand, so the decodes are never too few. The head is the prompt that
    is served first; `head_remaining_tokens` is None where telemetry does not tell. `waiting_*` are the prompts behind
    the head that have not begun.
    """

    decodes: int
    decode_context_tokens: int
    prompts: int  # all that are left to compute, begun or not
    head_remaining_tokens: int | None
    head_context_tokens: int
    waiting_requests: int
    waiting_tokens: int

    def prefill(self, tokens: int) -> tuple[int, float]:
        """(requests, W) if the next batch computes `tokens` prompt tokens: the head's, then those of mean waiting ones.

        W is `BatchComposition.prefill_attention_tokens2`. Beyond all that wait stands one newcomer.
        """
        context = self.head_context_tokens
        head = tokens if self.head_remaining_tokens is None else min(tokens, self.head_remaining_tokens)
        attention = head * (context + 0.5 * head)
        rest = tokens - head
        if rest == 0:
            return min(tokens, 1), attention
        each = self.waiting_tokens / self.waiting_requests if self.waiting_requests and self.waiting_tokens else rest
        return (head > 0) + math.ceil(rest / each), attention + 0.5 * rest * min(each, rest)


def foresee(telemetry: Telemetry) -> Outlook:
    """The state one dead time after this launch, for the stall-free schedule without a pipeline.

    Decodes get one token in each iteration. A prompt ends with a chunk that neither the chunk size nor the budget
    cut short. In a dead time above 1, the iterations in between are taken to be like this one.
    """
    batch, queue, steps = telemetry.batch, telemetry.queue, telemetry.dead_time_iterations
    decodes = batch.decode_tokens
    context = batch.decode_context_tokens + steps * decodes
    begun = max(queue.running_requests - decodes, batch.prefill_requests)
    going_on: list[tuple[int | None, int]] = []  # (remaining, context) of the prompts that this batch does not end
    for chunk, start, remaining in _chunks(telemetry):
        if remaining is not None and remaining <= steps * chunk:
            decodes, begun = decodes + 1, begun - 1
            context += start + remaining + steps - 1
        else:
            going_on.append((None if remaining is None else remaining - steps * chunk, start + steps * chunk))
    waiting, waiting_tokens = queue.waiting_requests, queue.waiting_prompt_tokens
    head: tuple[int | None, int]
    if going_on:
        head = going_on[0]
    elif begun > 0:  # it found no room in this batch
        head = (queue.head_remaining_tokens, queue.head_context_tokens) if batch.prefill_requests == 0 else (None, 0)
    elif waiting > 0:
        known = batch.prefill_requests == 0
        head = (queue.head_remaining_tokens, queue.head_context_tokens) if known else (waiting_tokens // waiting, 0)
        waiting, waiting_tokens = waiting - 1, max(waiting_tokens - (head[0] or 0), 0)
    else:
        head = (0, 0)
    return Outlook(decodes, context, max(begun, 0) + queue.waiting_requests, *head, waiting, waiting_tokens)


def _chunks(telemetry: Telemetry) -> Iterator[tuple[int, int, int | None]]:
    """(tokens, context, remaining) of each prompt in the batch, before it runs; None where telemetry does not tell.

    Telemetry tells it of the head. Another prompt ends here if neither the chunk size nor the budget cut it short.
    """
    batch, queue, knobs, tile = telemetry.batch, telemetry.queue, telemetry.knobs, telemetry.bounds.tile_tokens
    budget, cap = (n if n <= tile else n // tile * tile for n in (knobs.budget_tokens, knobs.chunk_tokens))
    spare = budget - batch.total_tokens
    last = len(batch.prefill_chunk_tokens) - 1
    for i, (chunk, context) in enumerate(zip(batch.prefill_chunk_tokens, batch.prefill_context_tokens, strict=False)):
        if i == 0 and context == queue.head_context_tokens:
            yield chunk, context, max(queue.head_remaining_tokens, chunk)
        else:
            yield chunk, context, chunk if chunk != cap and (i < last or spare > 0) else None
