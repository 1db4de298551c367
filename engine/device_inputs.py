"""A batch on the device: the tensors that the kernels read, and the host numbers that they are launched with."""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class DeviceInputs:
    """Rows are the batch's requests, decodes (`n_decodes` of them) first; tokens lie row after row.

    `token_ids`, `positions` int32 [tokens]. `kv_slots` int64 [tokens]: block * block_tokens + offset of the place that
    the token's key and value take, -1 for padding. `query_starts` int32 [rows + 1]: row i has the tokens
    query_starts[i] to query_starts[i + 1]. `context_ends` int32 [rows]: tokens in the KV cache once the batch is
    computed. `block_tables` int32 [rows, width]: KV blocks in order, 0 past a row's length. `sampled` int64: tokens
    that yield logits. No row has more than `max_query_tokens` tokens, or more than `max_context_tokens` in the cache.

    In a CUDA graph the tensors are static and the host numbers upper bounds: a decode graph pads with rows of one
    token, slot -1 and context_ends 0, any other graph with rows of no tokens.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    query_starts: torch.Tensor
    context_ends: torch.Tensor
    block_tables: torch.Tensor
    sampled: torch.Tensor
    n_decodes: int
    max_query_tokens: int
    max_context_tokens: int

    @property
    def decodes_only(self) -> bool:
        """Whether every row is one token: the batch's attention can then skip `query_starts`."""
        return self.n_decodes == len(self.context_ends)
