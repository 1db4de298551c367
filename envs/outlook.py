"""What a law can know of the iteration that its answer acts on, one dead time after the one that telemetry reports."""

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

from engine.protocol import MOST_PROMPTS, Telemetry


class Outlook(NamedTuple):
    """The state in which the next batch under our knobs is formed: who decodes, and which prompts are left to compute.

    Requests that end in between are not known beforehand, so the decodes are never too few. `prompts` are the first
    that are left, (remaining, context) each in tokens, in the order in which they are served; behind them wait
    `behind_requests` that telemetry does not list, of `behind_tokens` together.
    """

    decodes: int
    decode_context_tokens: int
    prompts: tuple[tuple[int, int], ...]
    behind_requests: int
    behind_tokens: int

    @property
    def n_prompts(self) -> int:
        return len(self.prompts) + self.behind_requests

    @property
    def prompt_tokens(self) -> int:
        """All that are left to compute."""
        return sum(remaining for remaining, _ in self.prompts) + self.behind_tokens

    @property
    def head_context_tokens(self) -> int:
        return self.prompts[0][1] if self.prompts else 0


def foresee(telemetry: Telemetry, under_way: Sequence[tuple[int, int]] = ()) -> Outlook:
    """The state one dead time after this launch, for the stall-free schedule.

    Decodes get one token in each iteration. `under_way` are (budget, chunk) of the iterations in between, the next one
    first, where the dead time is above 1; those missing are taken to be under the knobs now in force.

    In a pipeline a batch decodes only those of one turn: this one's are taken for the next one's.
    """
    batch, queue = telemetry.batch, telemetry.queue
    pairs = zip(queue.prompt_remaining_tokens, queue.prompt_context_tokens, strict=False)
    listed = [(remaining, start) for remaining, start in pairs if remaining > 0]
    begun = max(queue.running_requests - batch.decode_tokens, batch.prefill_requests)
    behind = max(begun + queue.waiting_requests - len(listed), 0) if len(listed) >= MOST_PROMPTS else 0
    waiting_listed = sum(remaining for remaining, _ in listed[begun:])
    behind_tokens = max(queue.waiting_prompt_tokens - waiting_listed, behind) if behind else 0
    state = _after(batch.prefill_chunk_tokens, batch.decode_tokens, batch.decode_context_tokens, listed)
    in_force = (telemetry.knobs.budget_tokens, telemetry.knobs.chunk_tokens)
    for i in range(telemetry.dead_time_iterations - 1):
        budget, chunk = under_way[i] if i < len(under_way) else in_force
        decodes, context, prompts = state
        state = _after(_served(prompts, budget - decodes, chunk), decodes, context, prompts)
    decodes, context, prompts = state
    return Outlook(decodes, context, tuple(prompts), behind, behind_tokens)


def _after(
    chunks: Iterable[int], decodes: int, context: int, prompts: list[tuple[int, int]]
) -> tuple[int, int, list[tuple[int, int]]]:
    """(decodes, their context, prompts) when a batch with these chunks of the first prompts has run."""
    context += decodes
    left = []
    n_served = 0
    for chunk, (remaining, start) in zip(chunks, prompts, strict=False):
        n_served += 1
        if chunk >= remaining:
            decodes, context = decodes + 1, context + start + remaining
        else:
            left.append((remaining - chunk, start + chunk))
    # Those just begun take their place: the least remaining is served first.
    return decodes, context, sorted(left, key=itemgetter(0)) + prompts[n_served:]


def _served(prompts: list[tuple[int, int]], tokens: int, chunk: int) -> list[int]:
    chunks = []
    for remaining, _ in prompts:
        part = min(remaining, chunk, tokens)
        if part <= 0:
            break
        chunks.append(part)
        tokens -= part
    return chunks
