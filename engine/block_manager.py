"""Paged KV accounting: which blocks belong to which request, and which hold a prefix that can be used again.

No tensors here: a block is a number. With prefix caching every full block is known by a hash of all tokens up to its
end, so equal prefixes share blocks; a block that nobody holds keeps its content until it is needed, oldest first out.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockManager:
    """Blocks 0 to `n_blocks` - 1 of `block_tokens` tokens each; `tables[slot]` lists a request's blocks in order."""

    def __init__(self, n_blocks: int, block_tokens: int, max_blocks_per_request: int, prefix_caching: bool) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.prefix_caching = prefix_caching
        self.tables: NDArray[np.int32] = np.zeros((0, max_blocks_per_request), np.int32)
        self.held: NDArray[np.int64] = np.zeros(0, np.int64)
        self._holders = np.zeros(n_blocks, np.int64)  # requests that hold the block
        self._free = OrderedDict.fromkeys(range(n_blocks))  # least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Held share of all blocks, 0 to 1."""
        return 1.0 - len(self._free) / self.n_blocks

    def grow(self, n_slots: int) -> None:
        """Make room for slots up to `n_slots` - 1."""
        more = n_slots - len(self.held)
        self.tables = np.concatenate([self.tables, np.zeros((more, self.tables.shape[1]), np.int32)])
        self.held = np.concatenate([self.held, np.zeros(more, np.int64)])

    def share(self, slot: int, blocks: Sequence[int]) -> None:
        """Give an empty slot blocks found by `find_prefix`; called for all newcomers before any `extend`."""
        assert self.held[slot] == 0, "a slot shares a prefix only when it holds nothing"
        for i, block in enumerate(blocks):
            self._free.pop(block, None)
            self._holders[block] += 1
            self.tables[slot, i] = block
        self.held[slot] = len(blocks)

    def extend(self, slot: int, n_tokens: int) -> None:
        """Take free blocks until the slot can hold `n_tokens`; the batching rule has made sure that they exist."""
        held = int(self.held[slot])
        need = -(-n_tokens // self.block_tokens)
        for i in range(held, need):
            block, _ = self._free.popitem(last=False)
            old_hash = self._hash_of.pop(block, None)
            if old_hash is not None:
                del self._block_of[old_hash]
            self._holders[block] = 1
            self.tables[slot, i] = block
        self.held[slot] = max(held, need)

    def release(self, slot: int) -> None:
        """Let go of all blocks of the slot, last block first, so that prefixes stay cached longest."""
        for block in self.tables[slot, : self.held[slot]][::-1].tolist():
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
        self.tables[slot, : self.held[slot]] = 0
        self.held[slot] = 0

    def freeable(self, slot: int) -> int:
        """How many blocks `release(slot)` would free."""
        return int(np.count_nonzero(self._holders[self.tables[slot, : self.held[slot]]] == 1))

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest cached prefix of a chain of block hashes."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def in_use(self, blocks: Sequence[int]) -> int:
        return sum(self._holders[block] > 0 for block in blocks)

    def remember(self, slot: int, index: int, block_hash: bytes) -> None:
        """Block `index` of the slot is full and computed: later requests may share it."""
        block = int(self.tables[slot, index])
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def check(self) -> None:
        """Raise AssertionError if a block is leaked, free and held at once, or held by an unexpected number."""
        holders = np.zeros(self.n_blocks, np.int64)
        for slot in np.flatnonzero(self.held):
            table = self.tables[slot, : self.held[slot]]
            assert len(np.unique(table)) == len(table), f"slot {slot} holds a block twice: {table}"
            holders[table] += 1
        assert np.array_equal(holders, self._holders), "holder counts differ from the tables"
        assert set(np.flatnonzero(holders == 0).tolist()) == set(self._free), "free list differs from the tables"
        if not self.prefix_caching:
            assert holders.max(initial=0) <= 1, "a block is shared without prefix caching"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash maps disagree"


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], block_tokens: int) -> None:
    """Append the chained hashes of the full blocks of `token_ids` that `hashes` does not cover yet."""
    for start in range(len(hashes) * block_tokens, len(token_ids) - block_tokens + 1, block_tokens):
        content = np.asarray(token_ids[start : start + block_tokens], np.int64).tobytes()
        previous = hashes[-1] if hashes else b""
        hashes.append(hashlib.blake2b(previous + content, digest_size=16).digest())
