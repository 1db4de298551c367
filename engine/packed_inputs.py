"""A step's numbers in one buffer: written on the host, copied to the device in one piece, read there through views.

Every array has a fixed place, sized for the largest step, so that CUDA graphs find it there again.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.device_inputs import DeviceInputs
from engine.sampler import Draws
from engine.step_input import Int32, StepInput
from engine.step_shapes import StepShape

HostArrays = dict[str, NDArray[Any]]
DeviceArrays = dict[str, torch.Tensor]

_WORD_BYTES = 4
_ALIGNED_WORDS = 4  # kernels may load 16 bytes at once


class InputLayout:
    """Where each array lies in a buffer of `words` int32, for steps of up to `max_tokens` tokens in `max_rows` rows."""

    def __init__(self, max_tokens: int, max_rows: int, max_blocks: int, block_tokens: int) -> None:
        self.max_rows, self.max_blocks, self.block_tokens = max_rows, max_blocks, block_tokens
        arrays = [
            ("kv_slots", torch.int64, max_tokens),
            ("token_ids", torch.int32, max_tokens),
            ("positions", torch.int32, max_tokens),
            ("sampled", torch.int64, max_rows),
            ("query_starts", torch.int32, max_rows + 1),
            ("context_ends", torch.int32, max_rows),
            ("rows", torch.int64, max_rows),
            ("uniform", torch.float64, max_rows),
            ("temperature", torch.float64, max_rows),
            ("top_p", torch.float64, max_rows),
            ("top_k", torch.int32, max_rows),
            ("block_tables", torch.int32, max_rows * max_blocks),  # last: a step copies the rows that it has
        ]
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        start = 0
        for name, dtype, length in arrays:
            end = start + length * dtype.itemsize // _WORD_BYTES
            self._places[name] = (start, end, dtype)
            start = -(-end // _ALIGNED_WORDS) * _ALIGNED_WORDS
        self.words = start

    def views(self, buffer: torch.Tensor) -> DeviceArrays:
        """The arrays inside `buffer` [words] int32, whole."""
        arrays = {name: buffer[start:end].view(dtype) for name, (start, end, dtype) in self._places.items()}
        arrays["block_tables"] = arrays["block_tables"].view(self.max_rows, self.max_blocks)
        return arrays

    def host_arrays(self, buffer: torch.Tensor) -> HostArrays:
        """The same of a buffer in host memory, for `pack`."""
        return {name: view.numpy() for name, view in self.views(buffer).items()}

    def used_words(self, n_rows: int) -> int:
        """How much of a buffer a step of that many rows uses, from its start."""
        return self._places["block_tables"][0] + n_rows * self.max_blocks

    def pack(self, step: StepInput, shape: StepShape, arrays: HostArrays) -> None:
        """Write `step`, padded to `shape`."""
        n_tokens, n_rows, n_sampled = len(step.token_ids), len(step.n_tokens), len(step.sampled_rows)
        positions = step.positions
        starts = arrays["query_starts"]
        starts[0] = 0
        np.cumsum(step.n_tokens, dtype=np.int32, out=starts[1 : n_rows + 1])
        arrays["token_ids"][:n_tokens] = step.token_ids
        arrays["positions"][:n_tokens] = positions
        arrays["kv_slots"][:n_tokens] = self._kv_slots(step, positions)
        np.add(step.context, step.n_tokens, out=arrays["context_ends"][:n_rows])
        np.subtract(starts[step.sampled_rows + 1], 1, out=arrays["sampled"][:n_sampled])
        arrays["block_tables"][:n_rows, : step.block_tables.shape[1]] = step.block_tables
        if step.drawn is not None:
            n_drawn = len(step.drawn.rows)
            for name in ("rows", "uniform", "temperature", "top_p", "top_k"):
                arrays[name][:n_drawn] = getattr(step.drawn, name)
        for name in ("token_ids", "positions"):
            arrays[name][n_tokens : shape.n_tokens] = 0
        arrays["kv_slots"][n_tokens : shape.n_tokens] = -1
        arrays["context_ends"][n_rows : shape.n_rows] = 0
        arrays["sampled"][n_sampled : shape.n_sampled] = 0
        if n_rows < shape.n_rows:
            # Rows of padding have one token each in a graph of decodes, none in any other.
            more = np.arange(1, shape.n_rows - n_rows + 1) if shape.max_query_tokens == 1 else 0
            starts[n_rows + 1 : shape.n_rows + 1] = n_tokens + more

    def inputs(self, arrays: DeviceArrays, shape: StepShape) -> DeviceInputs:
        """What `pack` wrote, as the model reads it."""
        return DeviceInputs(
            token_ids=arrays["token_ids"][: shape.n_tokens],
            positions=arrays["positions"][: shape.n_tokens],
            kv_slots=arrays["kv_slots"][: shape.n_tokens],
            query_starts=arrays["query_starts"][: shape.n_rows + 1],
            context_ends=arrays["context_ends"][: shape.n_rows],
            block_tables=arrays["block_tables"][: shape.n_rows],
            sampled=arrays["sampled"][: shape.n_sampled],
            n_decodes=shape.n_decodes,
            max_query_tokens=shape.max_query_tokens,
            max_context_tokens=shape.max_context_tokens,
        )

    def draws(self, arrays: DeviceArrays, step: StepInput) -> Draws | None:
        """What `pack` wrote, as the sampler reads it."""
        if step.drawn is None:
            return None
        n = len(step.drawn.rows)
        return Draws(
            rows=arrays["rows"][:n],
            uniform=arrays["uniform"][:n],
            temperature=arrays["temperature"][:n],
            top_k=arrays["top_k"][:n],
            top_p=arrays["top_p"][:n],
            n_unfiltered=step.drawn.n_unfiltered,
        )

    def _kv_slots(self, step: StepInput, positions: Int32) -> Int32:
        rows = np.repeat(np.arange(len(step.n_tokens)), step.n_tokens)
        columns, offsets = np.divmod(positions, np.int32(self.block_tokens))
        slots: Int32 = step.block_tables[rows, columns] * np.int32(self.block_tokens) + offsets
        return slots


class DeviceBuffer:
    """The numbers of the step that the device works on."""

    def __init__(self, layout: InputLayout, device: torch.device) -> None:
        self.words = torch.zeros(layout.words, dtype=torch.int32, device=device)
        self.views = layout.views(self.words)


class HostBuffer:
    """A step's numbers on their way to the device, or on a CPU in their place; and its tokens on their way back."""

    def __init__(self, layout: InputLayout, max_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.words = torch.zeros(layout.words, dtype=torch.int32, pin_memory=pinned)
        self.arrays = layout.host_arrays(self.words)
        self.views = layout.views(self.words)
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned)
