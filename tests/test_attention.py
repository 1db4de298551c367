"""Every backend gives the attention of the definition, whatever the batch, the blocks and the windows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import (
    CPU,
    KERNEL_DEVICES,
    Shape,
    inputs_of,
    plain_attention,
    random_cache,
    random_q,
    relative_error,
    step_of,
)

from engine.attention.backend import AttentionBackend, KvCache, allocate_kv_cache
from engine.attention.choice import BACKENDS, attention_report, choose_attention, default_block_tokens, make_attention
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig
from engine.device_inputs import DeviceInputs
from engine.model_config import PACER_26M, ModelConfig
from engine.shard import Shard
from engine.step_input import StepInput

MIXED = [(0, 1), (5, 1), (300, 1), (16, 1), (31, 1), (0, 130), (200, 70), (15, 17), (47, 1)]
N_DECODES = 5
LONG_DECODES = [(int(n), 1) for n in np.random.default_rng(0).integers(1, 600, 13)]
GPU = torch.device("cuda")


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(heads=7, kv_heads=1, head_dim=80), Shape(heads=4, kv_heads=4, page_tokens=4)], ids=str
)
def test_sdpa_computes_mixed_batches(shape: Shape, scattered: bool, window: int | None) -> None:
    cache = random_cache(shape, 4800 // shape.page_tokens, torch.float64, CPU, 1)
    for rows, n_decodes in ((MIXED, N_DECODES), (LONG_DECODES, len(LONG_DECODES)), (MIXED[N_DECODES:], 0)):
        step = step_of(rows, n_decodes, shape.page_tokens, len(cache[0]), scattered)
        q = random_q(shape, int(step.n_tokens.sum()), torch.float64, CPU, 2)
        batch = SdpaAttention(cache, [window], 640).prepare(step, inputs_of(step, shape.page_tokens, CPU))
        torch.testing.assert_close(batch.attend(0, q), plain_attention(q, cache[0], step, window))


def test_each_layer_sees_its_own_window_and_cache() -> None:
    shape = Shape(layers=3)
    windows = [None, 9, None]
    cache = random_cache(shape, 100, torch.float64, CPU, 3)
    cache[2] = cache[2].flip(0)
    step = step_of(MIXED, N_DECODES, shape.page_tokens, 100, True)
    batch = SdpaAttention(cache, windows, 640).prepare(step, inputs_of(step, shape.page_tokens, CPU))
    q = random_q(shape, int(step.n_tokens.sum()), torch.float64, CPU, 4)
    for layer, window in enumerate(windows):
        torch.testing.assert_close(batch.attend(layer, q), plain_attention(q, cache[layer], step, window))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("wanted_items", [1, 9, 40])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=4, kv_heads=2, head_dim=64, page_tokens=128),
        Shape(heads=7, kv_heads=1, head_dim=80, page_tokens=16),
        Shape(heads=2, kv_heads=2, head_dim=256, page_tokens=64),
    ],
    ids=str,
)
def test_decodes_split_among_programs(device: str, shape: Shape, wanted_items: int, window: int | None) -> None:
    from engine.attention.split_decode import SplitDecode  # noqa: PLC0415 (a skipped run has no triton)

    # Decodes, a chunk between them that is left alone, and a padded row; the chunk's queries lie between, too.
    rows = [(0, 1), (1000, 1), (10, 3), (64, 1), (411, 1)]
    step = step_of(rows, 0, shape.page_tokens, 2000 // shape.page_tokens, True)
    cache = random_cache(shape, 2000 // shape.page_tokens, torch.float32, torch.device(device), 5)
    inputs = inputs_of(step, shape.page_tokens, torch.device(device))
    q = random_q(shape, 8, torch.float32, torch.device(device), 6)
    ends = torch.nn.functional.pad(inputs.context_ends, (0, 1))
    ends[2] = -1
    tables = torch.nn.functional.pad(inputs.block_tables, (0, 0, 0, 1))
    split = SplitDecode(cache, [window], shape.heads)
    split.wanted_items = wanted_items
    plan = split.plan(inputs.query_starts, ends, tables)
    items = int(plan.row_items[window or 0][0])
    assert 5 <= items <= 5 + wanted_items
    assert wanted_items == 1 or window is not None or items > 5
    out = torch.full_like(q, torch.nan)
    split.attend(plan, 0, q, out)
    one_query = [0, 1, 5, 6]
    expected = plain_attention(q[:7], cache[0], step, window)[one_query]
    assert relative_error(out[one_query].flatten(1), expected) < 2e-3
    assert out[2:5].isnan().all()
    assert not out[7].any(), "a padded row gives zeros"


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_decodes_are_split_beside_chunks_that_would_end_long_before_them(device: str) -> None:
    from engine.attention.flash4 import decodes_outlast  # noqa: PLC0415 (a skipped run has no triton)

    def outlast(rows: list[tuple[int, int]], n_decodes: int, reach: int | None = None) -> bool:
        step = step_of(rows, n_decodes, 128, sum(n for row in rows for n in row) // 128 + len(rows), False)
        return decodes_outlast(step, reach, group=4, programs=132 / 8)

    assert outlast([(32_000, 1), (1000, 1), (0, 480)], 2)
    assert not outlast([(32_000, 1), (1000, 1), (0, 480)], 2, reach=128)
    assert not outlast([(1000, 1)] * 32 + [(0, 480)], 32)
    assert not outlast([(32_000, 1), (32_000, 1000)], 1)
    assert not outlast([(0, 480)], 0)


def test_the_cache_holds_the_ranks_share() -> None:
    shard = Shard(tp_rank=1, tp_size=2, pp_rank=1, pp_size=3)
    cache = allocate_kv_cache(PACER_26M, 5, 4, torch.bfloat16, CPU, shard)
    assert [tuple(layer.shape) for layer in cache] == [(5, 2, 4, 1, 64)] * 3
    assert not any(layer.any() for layer in cache)


def test_a_cpu_has_sdpa_and_says_why_not_the_others() -> None:
    report = attention_report(CPU)
    assert [name for name, _, _ in report] == list(BACKENDS)
    assert report[-1] == ("sdpa", True, torch.__version__)
    assert all(not usable and reason == "needs a CUDA device, not cpu" for _, usable, reason in report[:-1])
    assert choose_attention("auto", PACER_26M, torch.bfloat16, 16, CPU) == "sdpa"
    assert default_block_tokens("auto", PACER_26M, torch.float32, CPU) == 16
    cache = allocate_kv_cache(PACER_26M, 200, 16, torch.float32, CPU, Shard())
    made = make_attention("auto", PACER_26M, cache, EngineConfig(), CPU, Shard())
    assert (made.name, made.captures, made.block_tokens) == ("sdpa", False, 16)


def test_a_backend_that_cannot_be_had_is_refused_with_the_remedy() -> None:
    for name in BACKENDS[:-1]:
        with pytest.raises(ValueError, match=f"{name}: needs a CUDA device, not cpu; use --attention auto"):
            choose_attention(name, PACER_26M, torch.bfloat16, 256, CPU)
    with pytest.raises(ValueError, match=r"'fast' is not one of auto, flash-attn-4, .*: use --attention auto"):
        choose_attention("fast", PACER_26M, torch.bfloat16, 16, CPU)


# From here on: every backend of the machine on its GPU, in bfloat16, against SDPA in float32.

GPU_SHAPES = [
    Shape(32, 8, 128),
    Shape(28, 4, 128),
    Shape(12, 12, 64),
    Shape(71, 1, 64),
    Shape(8, 4, 256),
    Shape(8, 8, 96),
]
GPU_BATCHES = {
    "one decode": ([(700, 1)], 1),
    "one long decode": ([(33_000, 1)], 1),
    "decodes": (LONG_DECODES, len(LONG_DECODES)),
    "many decodes": ([(int(n), 1) for n in np.random.default_rng(1).integers(1, 900, 140)], 140),
    "prefill": ([(0, 700)], 0),
    "mixed": (MIXED, N_DECODES),
    "long decode beside a chunk": ([(20_000, 1), (90, 1), (0, 128)], 2),
    "chunk behind 33k tokens": ([*LONG_DECODES[:8], (33_000, 512)], 8),
}


def model_of(shape: Shape, windows: list[int | None]) -> ModelConfig:
    return replace(
        PACER_26M,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=len(windows),
        sliding_windows=tuple(windows),
    )


def backend_on_gpu(name: str, shape: Shape, windows: list[int | None], tokens: int) -> tuple[AttentionBackend, KvCache]:
    """The backend over a random cache with room for `tokens`, and the cache. Skips what the machine has not."""
    model = model_of(shape, windows)
    try:
        page_tokens = default_block_tokens(name, model, torch.bfloat16, GPU)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    shape = replace(shape, page_tokens=page_tokens, layers=len(windows))
    cache = random_cache(shape, tokens // page_tokens, torch.bfloat16, GPU, 7)
    return make_attention(name, model, cache, EngineConfig(max_model_tokens=34_000), GPU, Shard()), cache


def exact(cache: KvCache, windows: list[int | None], step: StepInput, q: torch.Tensor) -> list[torch.Tensor]:
    page_tokens = cache[0].shape[2]
    backend = SdpaAttention([layer.float() for layer in cache], windows, 34_000)
    batch = backend.prepare(step, inputs_of(step, page_tokens, GPU))
    return [batch.attend(layer, q.float()) for layer in range(len(windows))]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", GPU_BATCHES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_gpu_backend_agrees_with_sdpa(name: str, shape: Shape, batch: str) -> None:
    rows, n_decodes = GPU_BATCHES[batch]
    windows = [None, 333]
    backend, cache = backend_on_gpu(name, shape, windows, 120_000)
    page_tokens = cache[0].shape[2]
    step = step_of(rows, n_decodes, page_tokens, len(cache[0]), True)
    q = random_q(shape, int(step.n_tokens.sum()), torch.bfloat16, GPU, 8)
    prepared = backend.prepare(step, inputs_of(step, page_tokens, GPU))
    for layer, expected in enumerate(exact(cache, windows, step, q)):
        assert relative_error(prepared.attend(layer, q), expected) < 1e-2


def static_inputs(rows: int, tokens: int, n_decodes: int, width: int) -> DeviceInputs:
    def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=GPU)

    starts = torch.arange(rows + 1, dtype=torch.int32, device=GPU) if n_decodes else zeros(rows + 1)
    return DeviceInputs(
        token_ids=zeros(tokens),
        positions=zeros(tokens),
        kv_slots=zeros(tokens, dtype=torch.int64).fill_(-1),
        query_starts=starts,
        context_ends=zeros(rows),
        block_tables=zeros(rows, width),
        sampled=zeros(0, dtype=torch.int64),
        n_decodes=n_decodes,
        max_query_tokens=1 if n_decodes else tokens,
        max_context_tokens=2400,
    )


def fill(static: DeviceInputs, step: StepInput, page_tokens: int) -> None:
    """What a runner does before it replays a graph: the step's numbers, and padding behind them."""
    inputs = inputs_of(step, page_tokens, GPU)
    rows = len(step.n_tokens)
    static.context_ends.zero_()
    static.block_tables.zero_()
    static.context_ends[:rows] = inputs.context_ends
    static.block_tables[:rows, : inputs.block_tables.shape[1]] = inputs.block_tables
    if not static.decodes_only:
        static.query_starts.fill_(int(inputs.query_starts[-1]))
        static.query_starts[: rows + 1] = inputs.query_starts


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 128], ids="{} rows".format)
@pytest.mark.parametrize("kind", ["decodes", "mixed"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_backend_serves_any_lengths(name: str, kind: str, rows: int) -> None:
    shape, windows = Shape(32, 8, 128), [None, 333]
    backend, cache = backend_on_gpu(name, shape, windows, 300_000)
    if not backend.captures:
        pytest.skip(f"{name} does not run inside CUDA graphs")
    page_tokens = cache[0].shape[2]
    tokens = rows if kind == "decodes" else 256
    static = static_inputs(rows, tokens, rows if kind == "decodes" else 0, 2400 // page_tokens + 1)
    q = random_q(shape, tokens, torch.bfloat16, GPU, 9)

    def run() -> list[torch.Tensor]:
        batch = backend.capture(static)
        return [batch.attend(layer, q) for layer in range(len(windows))]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    for seed, used in enumerate((rows, max(1, rows - 3), 1)):
        lengths = np.random.default_rng(seed).integers(1, 1900, used)
        batch = [(int(n), 1) for n in lengths]
        if kind == "mixed":
            batch = [*batch[:-1], (int(lengths[-1]), 256 - len(batch) - 10 * seed)]
        step = step_of(batch, used if kind == "decodes" else used - 1, page_tokens, len(cache[0]), True)
        fill(static, step, page_tokens)
        graph.replay()
        n = int(step.n_tokens.sum())
        for out, expected in zip(outs, exact(cache, windows, step, q[:n]), strict=True):
            assert relative_error(out[:n], expected) < 1e-2
