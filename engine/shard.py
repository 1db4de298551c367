"""A process's part of a model: which slice of every matrix, which layers, and how the slices' results are joined."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `tp_rank` of the `tp_size` that share every layer, in stage `pp_rank` of a pipeline of `pp_size`.

    Raises ValueError for a rank that its size does not have.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        for what, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            if not 0 <= rank < size:
                raise ValueError(f"{what}_rank {rank} is not one of {what}_size {size}: ranks count from 0")

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage yields the logits."""
        return self.pp_rank == self.pp_size - 1

    def layers(self, n: int) -> range:
        """The stage's share of `n` layers; earlier stages take the remainder, since the last one has the head too.

        Raises ValueError when there are fewer layers than stages.
        """
        if n < self.pp_size:
            raise ValueError(f"{n} layers cannot fill {self.pp_size} pipeline stages: use at most {n}")
        least, remainder = divmod(n, self.pp_size)
        start = self.pp_rank * least + min(self.pp_rank, remainder)
        return range(start, start + least + (self.pp_rank < remainder))

    def heads(self, n: int) -> range:
        """The rank's share of `n` attention heads. Raises ValueError when they do not divide evenly."""
        return self.share(n, "attention heads")

    def kv_heads(self, n: int) -> range:
        """The rank's share of `n` key-value heads; a single one is kept by every rank.

        Raises ValueError when they do not divide evenly.
        """
        return range(1) if n == 1 else self.share(n, "key-value heads")

    def vocabulary(self, n: int) -> range:
        """The rank's token ids of `n`: equal shares, but the last ranks' are shorter where `n` does not divide."""
        width = self.vocabulary_width(n)
        return range(min(n, self.tp_rank * width), min(n, (self.tp_rank + 1) * width))

    def vocabulary_width(self, n: int) -> int:
        """How many logits every rank computes of `n`, those past the vocabulary's end included."""
        return -(-n // self.tp_size)

    def share(self, n: int, what: str) -> range:
        """The rank's equal share of `n` things. Raises ValueError naming `what` when they do not divide evenly."""
        width, rest = divmod(n, self.tp_size)
        if rest:
            divisors = ", ".join(str(size) for size in range(1, self.tp_size) if n % size == 0)
            raise ValueError(
                f"{n} {what} cannot be shared evenly by {self.tp_size} tensor-parallel ranks: use {divisors}"
            )
        return range(self.tp_rank * width, (self.tp_rank + 1) * width)


WHOLE = Shard()
"""The whole model in one process."""


class Collectives(Protocol):
    """What the ranks of one tensor group do together; every rank makes the same calls in the same order."""

    def all_reduce(self, x: "torch.Tensor") -> None:
        """x becomes the sum of the ranks' x, in place."""

    def all_gather(self, x: "torch.Tensor") -> "torch.Tensor":
        """The ranks' x, all of one shape, concatenated along the last dimension in the order of the ranks."""


class _Single:
    """A tensor group of one."""

    def all_reduce(self, x: "torch.Tensor") -> None:
        pass

    def all_gather(self, x: "torch.Tensor") -> "torch.Tensor":
        return x


SINGLE: Collectives = _Single()
