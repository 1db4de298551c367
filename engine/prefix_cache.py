"""The prefix cache in use: which full blocks a request can share, and which blocks a batch has filled."""

from collections.abc import Iterable

from engine.batching import RequestArrays
from engine.block_manager import BlockManager, extend_hashes
from engine.request import Batch, Request


def cached_blocks(request: Request, blocks: BlockManager) -> list[int]:
    """Those of its prefix, short of the last token: at least one must be computed to sample the next."""
    usable = (len(request.token_ids) - 1) // blocks.block_tokens
    return blocks.find_prefix(request.block_hashes[:usable])


def look_up(
    candidates: Iterable[Request], running: Iterable[Request], arrays: RequestArrays, blocks: BlockManager
) -> None:
    """Write what the cache saves the candidates, and what preempting the running ones would free, to `arrays`."""
    for request in candidates:
        extend_hashes(request.block_hashes, request.token_ids, blocks.block_tokens)
        cached = cached_blocks(request, blocks)
        arrays.cached_tokens[request.slot] = len(cached) * blocks.block_tokens
        in_use = blocks.in_use(cached)  # by others: sharing them costs no free block
        arrays.need_blocks[request.slot] = -(-len(request.token_ids) // blocks.block_tokens) - in_use
    for request in running:
        arrays.freeable_blocks[request.slot] = blocks.freeable(request.slot)


def remember(batch: Batch, blocks: BlockManager) -> None:
    """The blocks that a batch has filled; a batch that shares them is launched later, so it finds them filled."""
    block_tokens = blocks.block_tokens
    ends = (batch.context + batch.n_tokens).tolist()
    rows = zip(batch.requests, batch.generations, batch.context.tolist(), ends, strict=True)
    for request, generation, start, end in rows:
        if request.generation != generation or start // block_tokens == end // block_tokens:
            continue
        extend_hashes(request.block_hashes, request.token_ids, block_tokens)
        for index in range(start // block_tokens, end // block_tokens):
            blocks.remember(request.slot, index, request.block_hashes[index])
