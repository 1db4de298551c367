"""Microbatches of equal time: the token budget that fills each up to one length, by the step-time model of a stage.

A pipeline stage idles whenever the microbatch before it on the other stage takes longer than its own. A static budget
makes microbatches of equal tokens, whose times differ by what their prompts have behind them.
"""

from collections import deque

from engine.protocol import Bounds, Telemetry
from envs.step_time import StepTimeModel
from policies.outlook import Outlook


class StaticBudget:
    """The same budget for every microbatch."""

    def __init__(self, tokens: int) -> None:
        self.name = f"static {tokens}"
        self._tokens = tokens

    def budget(self, telemetry: Telemetry) -> int:
        return self._tokens


class EqualTime:
    """The largest budget whose microbatch takes no longer than `target_s` on the slowest stage, on the mean.

        B = max { whole tiles b : time(decodes, their context, b - decodes prompt tokens) <= target }

    for the microbatch after the one that telemetry reports. Its decodes are taken to be those that had the same turn.
    """

    def __init__(self, step_time: StepTimeModel, target_s: float, stages: int, name: str) -> None:
        self.name = name
        self.target_s = target_s
        self._step_time = step_time
        self._turns: deque[tuple[int, int]] = deque(maxlen=stages)

    def budget(self, telemetry: Telemetry) -> int:
        batch = telemetry.batch
        self._turns.append((batch.decode_tokens, batch.decode_context_tokens + batch.decode_tokens))
        outlook = next_prompts(telemetry, *self._turns[0])
        return self._largest(outlook, telemetry.bounds)

    def _largest(self, outlook: Outlook, bounds: Bounds) -> int:
        fits, beyond = 0, bounds.max_budget_tokens // bounds.tile_tokens + 1  # tiles; the answer is in [fits, beyond)
        while beyond - fits > 1:
            tiles = (fits + beyond) // 2
            if self._seconds(tiles * bounds.tile_tokens, outlook) <= self.target_s:
                fits = tiles
            else:
                beyond = tiles
        return max(fits * bounds.tile_tokens, bounds.min_budget_tokens)

    def _seconds(self, budget: int, outlook: Outlook) -> float:
        tokens = max(budget - outlook.decodes, 0)
        requests, attention = outlook.prefill(tokens)
        return self._step_time.mean_s(outlook.decodes, outlook.decode_context_tokens, requests, tokens, attention)


def next_prompts(telemetry: Telemetry, decodes: int, decode_context_tokens: int) -> Outlook:
    """What is left to compute once the reported microbatch is under way, for a next one with these decodes."""
    batch, queue = telemetry.batch, telemetry.queue
    remaining, context = queue.head_remaining_tokens, queue.head_context_tokens
    if batch.prefill_context_tokens[:1] == (context,):  # told as of before this microbatch
        remaining, context = remaining - batch.prefill_chunk_tokens[0], context + batch.prefill_chunk_tokens[0]
    waiting, waiting_tokens = queue.waiting_requests, queue.waiting_prompt_tokens
    if remaining <= 0 and waiting:
        remaining, context = waiting_tokens // waiting, 0
        waiting, waiting_tokens = waiting - 1, waiting_tokens - remaining
    return Outlook(
        decodes, decode_context_tokens, waiting + (remaining > 0), max(remaining, 0), context, waiting, waiting_tokens
    )
