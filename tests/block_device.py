"""A device for tests that keeps what batches write, block by block, so that it shows who overwrites whom.

It runs batches one after another, each when its result is taken, as late as a device can. A request's next token is a
function of all its tokens so far, as it finds them in the blocks of its table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.request import Batch, Request, StepResult

VOCABULARY = 97


def next_token(tokens: Sequence[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % VOCABULARY


def continuation(prompt: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int] = ()) -> list[int]:
    """What a request must get."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_token_ids:
            break
    return tokens[len(prompt) :]


@dataclass
class BlockDevice:
    """A runner; `batches` are all that were launched, `ran` is how many of them have run."""

    n_blocks: int
    block_tokens: int
    batches: list[Batch] = field(default_factory=list)
    ran: int = 0

    def __post_init__(self) -> None:
        self.cache = np.full((self.n_blocks, self.block_tokens), -1)
        self.sampled: list[dict[Request, int]] = []  # by each batch that has run

    def launch(self, batch: Batch) -> "LaunchedBatch":
        assert batch.requests
        self.batches.append(batch)
        rows = zip(batch.requests, batch.context.tolist(), batch.n_tokens.tolist(), strict=True)
        known = [request.token_ids[start : start + n] for request, start, n in rows]
        return LaunchedBatch(self, batch, len(self.batches) - 1, known, self.ran)

    def run(self, batch: Batch, known: list[list[int]], oldest: int) -> list[int]:
        """`known` are the inputs of each row that the host knew at the launch; a decode's may come from the device, by
        the batch that was the `oldest` in flight then.
        """
        ends = []
        for row, request in enumerate(batch.requests):
            tokens = known[row] or [self.sampled[oldest][request]]
            assert len(tokens) == batch.n_tokens[row] and (known[row] or row < batch.n_decodes)
            for position, token in enumerate(tokens, int(batch.context[row])):
                block = batch.block_tables[row, position // self.block_tokens]
                self.cache[block, position % self.block_tokens] = token
            ends.append(int(batch.context[row]) + len(tokens))
        sampled: dict[Request, int] = {}
        self.sampled.append(sampled)
        for row in np.flatnonzero(batch.samples).tolist():  # all is written before any of it is read
            tokens = self.cache[batch.block_tables[row]].ravel()[: ends[row]].tolist()
            sampled[batch.requests[row]] = next_token(tokens)
        return list(sampled.values())


@dataclass
class LaunchedBatch:
    device: BlockDevice
    batch: Batch
    number: int
    known: list[list[int]]
    oldest: int
    padding_tokens: int = 0

    def result(self) -> StepResult:
        assert self.number == self.device.ran, "results are taken in the order of the launches, once each"
        self.device.ran += 1
        return StepResult(self.device.run(self.batch, self.known, self.oldest), 0.0, ())
