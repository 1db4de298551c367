"""flash-attn 4 (CuTe DSL, Hopper and later) on the paged cache, and beside it a kernel of our own for decodes.

Its Hopper kernel cannot split the keys of a row: one program works through all of them, for each KV head. Batches of
decodes, and decodes that would outlast the rest of their batch, are therefore split by engine.attention.split_decode.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention.backend import BLOCK_TOKENS, KvCache
from engine.attention.split_decode import SplitDecode, SplitPlan, multiprocessors
from engine.device_inputs import DeviceInputs
from engine.step_input import StepInput

_QUERY_TILE = 128


@dataclass(slots=True)
class _Rows:
    """Rows given to flash-attn: where their queries start, how many count (None: all), what they see, their pages."""

    query_starts: torch.Tensor
    queries: torch.Tensor | None
    context_ends: torch.Tensor
    tables: torch.Tensor


class FlashAttention4:
    """One varlen call for a whole batch, unless its decodes are better split."""

    name = "flash-attn-4"
    captures = True
    block_tokens = BLOCK_TOKENS["flash-attn-4"]

    def __init__(self, cache: KvCache, windows: list[int | None], heads: int) -> None:
        self.cache = cache
        self.keys = [layer[:, 0] for layer in cache]
        self.values = [layer[:, 1] for layer in cache]
        self.windows = windows
        self.kv_heads = cache[0].shape[3]
        self.group = heads // self.kv_heads
        self.reach = None if None in windows else max(window for window in windows if window is not None)
        self.forward = _Forward()
        self.split = SplitDecode(cache, windows, heads)
        self.sms = multiprocessors(cache[0].device)
        self.aside = torch.cuda.Stream(cache[0].device)  # type: ignore[no-untyped-call]

    def prepare(self, step: StepInput, inputs: DeviceInputs) -> "_Batch4":
        programs = self.sms / self.kv_heads
        if inputs.decodes_only or decodes_outlast(step, self.reach, self.group, programs):
            return self.capture(inputs)
        return _Batch4(self, None, _Rows(inputs.query_starts, None, inputs.context_ends, inputs.block_tables))

    def capture(self, inputs: DeviceInputs) -> "_Batch4":
        """Rows of one query are split: a graph cannot know how long they will be."""
        starts, ends, tables = inputs.query_starts, inputs.context_ends, inputs.block_tables
        if inputs.decodes_only:
            return _Batch4(self, self.split.plan(starts, ends, tables), None)
        queries = starts.diff()
        one = queries == 1
        plan = self.split.plan(starts, torch.where(one, ends, -1), tables)
        return _Batch4(self, plan, _Rows(starts, torch.where(one, 0, queries), ends, tables))


def decodes_outlast(step: StepInput, reach: int | None, group: int, programs: float) -> bool:
    """Whether the longest decode, unsplit, would run for longer than its batch's work shared by all programs.

    `reach` is the widest sliding window, `group` the query heads of a KV head, `programs` how many run at a time for
    each KV head. Work is counted in tiles of queries times keys.
    """
    n = step.n_decodes
    ends = (step.context + step.n_tokens).astype(np.int64)
    seen = ends if reach is None else np.minimum(ends, reach + step.n_tokens)
    tiles = -(-step.n_tokens * group // _QUERY_TILE)
    # A chunk's tiles see its prefix, and half of the chunk on average.
    work = int((tiles * (seen - step.n_tokens // 2)).sum())
    return n > 0 and int(seen[:n].max()) * programs > work


@dataclass(slots=True)
class _Batch4:
    """`plan` has the rows that are split, `rest` those that go to flash-attn: no query is in both."""

    backend: FlashAttention4
    plan: SplitPlan | None
    rest: _Rows | None

    @property
    def cache(self) -> KvCache:
        return self.backend.cache

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        backend = self.backend
        out = torch.empty_like(q)
        if self.rest is None:
            assert self.plan is not None
            backend.split.attend(self.plan, layer, q, out)
            return out.flatten(1)
        if self.plan is None:
            backend.forward(q, backend.keys[layer], backend.values[layer], out, self.rest, backend.windows[layer])
            return out.flatten(1)
        # Side by side: the one is bound by memory, the other leaves multiprocessors idle at its end.
        stream = torch.cuda.current_stream()
        backend.aside.wait_stream(stream)
        with torch.cuda.stream(backend.aside):
            backend.split.attend(self.plan, layer, q, out)
        backend.forward(q, backend.keys[layer], backend.values[layer], out, self.rest, backend.windows[layer])
        stream.wait_stream(backend.aside)
        return out.flatten(1)


class _Forward:
    """flash_attn.cute's forward pass, whose choice of a kernel takes the host longer than small batches take the GPU.

    The first call of each kind goes through it, and notes the compiled kernel that it launches and with what; later
    ones launch that, with their own tensors. Where the arguments are not those of the version that this was written for
    nothing is noted, and every call goes through.
    """

    # Places of the arguments that change from call to call.
    _QUERY, _KEYS, _VALUES, _OUT, _STARTS, _QUERIES, _ENDS, _TABLES, _WINDOW, _BLOCK_SUMS = (
        0,
        1,
        2,
        3,
        6,
        8,
        9,
        10,
        11,
        16,
    )
    _N_ARGUMENTS = 18

    def __init__(self) -> None:
        from flash_attn.cute.interface import _flash_attn_fwd  # noqa: PLC0415 (one of two packages of this name)

        # Not flash_attn_varlen_func: that is an autograd function, which takes time of its own.
        self.through: Any = _flash_attn_fwd
        self.noted: dict[tuple[bool, bool], tuple[Callable[..., None], list[Any]]] = {}

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        rows: _Rows,
        window: int | None,
    ) -> None:
        kind = rows.queries is None, window is None
        if kind not in self.noted or len(rows.context_ends) > 256:  # above, sums over the rows come in
            launch = self._go_through(q, keys, values, out, rows, window)
            if launch is not None:
                self.noted[kind] = launch
            return
        kernel, arguments = self.noted[kind]
        arguments = arguments.copy()
        arguments[self._QUERY], arguments[self._KEYS], arguments[self._VALUES] = q, keys, values
        arguments[self._OUT], arguments[self._STARTS], arguments[self._QUERIES] = out, rows.query_starts, rows.queries
        arguments[self._ENDS], arguments[self._TABLES] = rows.context_ends, rows.tables
        arguments[self._WINDOW] = None if window is None else window - 1
        kernel(*arguments)

    def _go_through(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        rows: _Rows,
        window: int | None,
    ) -> tuple[Callable[..., None], list[Any]] | None:
        """Returns what was launched, where that can be launched again with other tensors."""
        cache = self.through.compile_cache
        spy = self.through.compile_cache = _Spy(cache)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler warns of an argument that it then takes
                self.through(
                    q,
                    keys,
                    values,
                    cu_seqlens_q=rows.query_starts,
                    seqused_q=rows.queries,
                    seqused_k=rows.context_ends,
                    page_table=rows.tables,
                    softmax_scale=1 / math.sqrt(q.shape[2]),
                    causal=True,
                    window_size_left=None if window is None else window - 1,
                    num_splits=1,
                    out=out,
                )
        finally:
            self.through.compile_cache = cache
        kernel, arguments = spy.launched
        expected = {self._STARTS: rows.query_starts, self._QUERIES: rows.queries, self._ENDS: rows.context_ends}
        expected |= {self._TABLES: rows.tables, self._BLOCK_SUMS: None}
        if len(arguments) != self._N_ARGUMENTS or any(arguments[i] is not value for i, value in expected.items()):
            return None
        for place in (self._QUERY, self._KEYS, self._VALUES, self._OUT, *expected):
            arguments[place] = None  # keep no tensor alive
        return kernel, arguments


class _Spy:
    """A cache of compiled kernels that remembers the last launch of one."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.launched: tuple[Callable[..., None], list[Any]]

    def __contains__(self, key: Any) -> bool:
        return key in self.cache

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self.cache[key] = kernel

    def __getitem__(self, key: Any) -> Callable[..., None]:
        kernel = self.cache[key]

        def launch(*arguments: Any) -> None:
            self.launched = kernel, list(arguments)
            kernel(*arguments)

        return launch
