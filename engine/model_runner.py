"""Runs batches through a rank's part of the model, on a CPU or on a CUDA device."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch

from engine.attention.backend import AttentionBackend, BatchAttention, KvCache, allocate_kv_cache
from engine.attention.choice import make_attention
from engine.config import EngineConfig
from engine.cuda_graphs import CudaGraphs
from engine.device_inputs import DeviceInputs
from engine.execution import CpuExecution, CudaExecution, Execution, Resumed, timing_event, within_memory
from engine.model import Transformer
from engine.model_config import ModelConfig
from engine.ops import choose_ops
from engine.packed_inputs import DeviceBuffer, HostBuffer, InputLayout
from engine.protocol import StageTimes
from engine.request import Batch, StepResult
from engine.sampler import Draws, draw, sample
from engine.shard import SINGLE, WHOLE, Collectives, Shard
from engine.step_input import StepInput, even_step, step_input
from engine.step_shapes import StepShape, graph_shapes
from engine.weights import Weights

_CPU = torch.device("cpu")
_S_PER_NS = 1e-9


def check_sizes(model: ModelConfig, config: EngineConfig, threads: int) -> None:
    """Raises ValueError for what no runner of `model` can do."""
    if config.max_model_tokens > model.max_position_embeddings:
        raise ValueError(
            f"max_model_tokens {config.max_model_tokens} is beyond the model's max_position_embeddings "
            f"{model.max_position_embeddings}: lower it"
        )
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")


class ModelRunner:
    """A shard of a model, with a KV cache once it is allocated.

    `weights` (see engine.weights) fix the dtype of everything, and are emptied; they lie on `device`. `threads` is how
    many this process computes with, `clock` gives monotonic nanoseconds. A `config` with `kv_blocks` is allocated at
    once. Raises ValueError when `config` allows longer sequences than the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        config: EngineConfig,
        *,
        threads: int,
        clock: Callable[[], int],
        device: torch.device = _CPU,
        attention: str = "auto",
        shard: Shard = WHOLE,
        collectives: Collectives = SINGLE,
    ) -> None:
        check_sizes(model, config, threads)
        torch.set_num_threads(threads)
        self.model, self.config, self.device, self.shard = model, config, device, shard
        self.clock = clock
        self.vocab_size = model.vocab_size
        self.transformer = Transformer(model, weights, config.max_model_tokens, choose_ops(device), shard, collectives)
        self.graphs: CudaGraphs | None = None
        self._attention = attention
        self._in_flight: deque[Batch] = deque()  # oldest first
        self._last: Execution | None = None
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._work_since_ns: int | None = None  # of the step enqueued last
        if config.kv_blocks > 0:
            self.allocate(config.kv_blocks)

    @property
    def attention_name(self) -> str:
        return self.backend.name

    def allocate(self, kv_blocks: int) -> None:
        """Take the KV cache and all buffers, once more if need be; graphs over the former ones are let go."""
        config, device = self.config, self.device
        self.graphs = None
        self.kv_cache: KvCache = allocate_kv_cache(
            self.model, kv_blocks, config.block_tokens, self.transformer.dtype, device, self.shard
        )
        self.backend: AttentionBackend = make_attention(
            self._attention, self.model, self.kv_cache, config, device, self.shard
        )
        self._layout = InputLayout(
            config.max_budget_tokens, config.max_requests, config.max_blocks_per_request, config.block_tokens
        )
        # The last step's tokens stay here, for a step that is launched before the host has seen them.
        self._sampled = torch.zeros(config.max_requests, dtype=torch.int32, device=device)
        # One more than can be in flight: a buffer is written again when the step that it was for has been taken.
        self._host = cycle([HostBuffer(self._layout, config.max_requests, device) for _ in range(config.depth + 1)])
        self._static = None if device.type == "cpu" else DeviceBuffer(self._layout, device)

    @property
    def sampled(self) -> torch.Tensor:
        """int32 [max_requests]: the tokens of the step computed last; the first of several stages receives its next
        step's into it.
        """
        return self._sampled

    def graph_shapes(self, mixed: bool) -> list[StepShape]:
        """The steps to capture, largest first: of decodes, and small mixed ones if asked; none where none can be."""
        if self.device.type != "cuda" or not self.backend.captures:
            return []
        config = self.config
        return graph_shapes(config.max_requests, config.max_budget_tokens, config.max_model_tokens, mixed)

    @torch.inference_mode()
    def capture(self, shapes: list[StepShape]) -> None:
        """From now on compute steps that fit one of the shapes by replaying its CUDA graph."""
        self.graphs = None
        if not shapes:
            return
        size = shapes[0].n_tokens, self.model.hidden_size
        self._hidden = torch.zeros(size, dtype=self.transformer.dtype, device=self.device)
        outputs = self.config.max_requests if self.shard.is_last else shapes[0].n_tokens
        self.graphs = CudaGraphs(shapes, outputs, self._fill, self._compute_static, lambda: self.clock() * _S_PER_NS)

    def launch(self, batch: Batch) -> "Pending":
        """Start computing: a CUDA device has all of it then, a CPU begins when the result is asked for.

        Raises OutOfDeviceMemory; the batch is then as if it had never been launched.
        """
        step = step_input(batch, self._in_flight)
        execution = within_memory(lambda: self.execute(step), repeatable=False) if self.device.type == "cuda" else None
        self._in_flight.append(batch)
        padding_tokens = self.graphs.padding_tokens(len(step.token_ids), len(step.n_tokens)) if self.graphs else 0
        return Pending(self, step, execution, len(self._in_flight), padding_tokens)

    @torch.inference_mode()
    def execute(self, step: StepInput, hidden: torch.Tensor | None = None) -> Execution:
        """Compute the step (CPU), or enqueue it on the current stream without waiting (CUDA).

        `hidden` [tokens, hidden_size] comes from the stage before, and is overwritten. At most `config.depth` steps may
        be in flight. Raises OutOfDeviceMemory.
        """
        packed = self._pack(step, eager=False)
        n_sampled = len(step.sampled_rows) if self.shard.is_last else 0
        if self.device.type == "cpu":
            begin_ns = self.clock()
            out = self._compute(packed, hidden)
            tokens: list[int] = self._sampled[:n_sampled].tolist()
            begin_s, end_s = begin_ns * _S_PER_NS, self.clock() * _S_PER_NS
            return CpuExecution(out, tokens, step.work_since_ns * _S_PER_NS, begin_s, end_s)
        resumed = self._resume(step.work_since_ns) if step.work_since_ns != self._work_since_ns else None
        begin, end = timing_event(), timing_event()
        begin.record()
        out = self._compute(packed, hidden)
        on_host = packed.host.tokens[:n_sampled]
        on_host.copy_(self._sampled[:n_sampled], non_blocking=True)
        end.record()
        self._work_since_ns = step.work_since_ns
        return CudaExecution(out, on_host, resumed, begin, end)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [rows that sample, vocab], without sampling and without graphs; writes the KV cache like `launch`."""
        work = self._load(self._pack(step_input(batch, ()), eager=True))
        assert work.attention is not None
        return self.transformer.forward(work.inputs, work.attention)

    def take(self, execution: Execution, in_flight: int) -> StepResult:
        """Wait for a step; `in_flight` were when it was launched, itself included."""
        tokens = execution.tokens()
        bubble_s = execution.bubble_s(self._last)
        self._last = execution
        self._in_flight.popleft()
        busy_s = execution.busy_s
        return StepResult(tokens, busy_s, (StageTimes(busy_s, bubble_s, in_flight),))

    def close(self) -> None:
        """Nothing to end: all is in this process."""

    def _resume(self, work_since_ns: int) -> Resumed:
        """On a stream of its own: what a stage waits for must not hold the event up."""
        event, now_ns = timing_event(), self.clock()
        event.record(self._aside)
        return Resumed(event, (now_ns - work_since_ns) * _S_PER_NS)

    def _pack(self, step: StepInput, eager: bool) -> "_Packed":
        graph = self.graphs.fit(len(step.token_ids), len(step.n_tokens)) if self.graphs and not eager else None
        host = next(self._host)
        self._layout.pack(step, graph or StepShape.of(step), host.arrays)
        return _Packed(step, host, graph)

    def _load(self, packed: "_Packed") -> "_Work":
        """Bring a step to the device, and plan its attention where no graph has that."""
        step, host, graph = packed.step, packed.host, packed.graph
        shape = graph or StepShape.of(step)
        arrays = host.views
        if self._static is not None:
            used = self._layout.used_words(shape.n_rows)
            self._static.words[:used].copy_(host.words[:used], non_blocking=True)
            arrays = self._static.views
        inputs = self._layout.inputs(arrays, shape)
        attention = self.backend.prepare(step, inputs) if graph is None else None
        return _Work(inputs, self._layout.draws(arrays, step), attention)

    def _compute(self, packed: "_Packed", hidden: torch.Tensor | None) -> torch.Tensor | None:
        """What the next stage needs; from the last one nothing, its tokens are in `_sampled`."""
        step, work = packed.step, self._load(packed)
        if packed.graph is not None:
            return self._replay(packed.graph, len(step.token_ids), work.draws, hidden)
        inputs, attention = work.inputs, work.attention
        assert attention is not None
        if step.has_unknown:
            inputs.token_ids = _known(inputs.token_ids, self._sampled)

        def forward() -> torch.Tensor:
            out = self.transformer.forward(inputs, attention, hidden)
            return sample(out, work.draws) if self.shard.is_last else out

        # A stage's input is overwritten, and the other ranks would not take part in a second attempt.
        out = within_memory(forward, repeatable=hidden is None and self.shard.tp_size == 1)
        if not self.shard.is_last:
            return out
        self._sampled[: len(out)].copy_(out)
        return None

    def _replay(
        self, graph: StepShape, n_tokens: int, draws: Draws | None, hidden: torch.Tensor | None
    ) -> torch.Tensor | None:
        assert self.graphs is not None
        if hidden is not None:
            self._hidden[:n_tokens].copy_(hidden)
        out = self.graphs.replay(graph)
        if not self.shard.is_last:
            return out[:n_tokens]
        if draws is not None:
            drawn = within_memory(lambda: draw(out, draws), repeatable=True)
            self._sampled.index_copy_(0, draws.rows, drawn.int())
        return None

    def _compute_static(self, shape: StepShape) -> torch.Tensor:
        """What a graph captures: all is greedy, rows that draw are drawn after it from the logits that it leaves."""
        assert self._static is not None
        inputs = self._layout.inputs(self._static.views, shape)
        attention = self.backend.capture(inputs)
        inputs.token_ids = _known(inputs.token_ids, self._sampled)
        hidden = None if self.shard.is_first else self._hidden[: shape.n_tokens]
        out = self.transformer.forward(inputs, attention, hidden)
        if self.shard.is_last:
            self._sampled[: len(out)].copy_(out.argmax(dim=-1))
        return out

    def _fill(self, shape: StepShape) -> None:
        assert self._static is not None
        host = next(self._host)
        self._layout.pack(even_step(shape.n_tokens, shape.n_rows, self.config.block_tokens), shape, host.arrays)
        self._static.words.copy_(host.words)


@dataclass(slots=True)
class Pending:
    """A launched batch. Results must be taken in the order of the launches, once each."""

    runner: ModelRunner
    step: StepInput
    execution: Execution | None
    in_flight: int
    padding_tokens: int

    def result(self) -> StepResult:
        """Wait for the batch: the tokens of the rows that sample, and the device's time."""
        execution = self.execution or self.runner.execute(self.step)
        return self.runner.take(execution, self.in_flight)


@dataclass(slots=True)
class _Packed:
    """A step in host memory, for one of the graphs or for none."""

    step: StepInput
    host: HostBuffer
    graph: StepShape | None


@dataclass(slots=True)
class _Work:
    """A step on the device; one without `attention` is for a graph, which has its own."""

    inputs: DeviceInputs
    draws: Draws | None
    attention: BatchAttention | None


def _known(token_ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Token ids [tokens], with -1 - j replaced by the token of sampled row j."""
    places = token_ids.bitwise_not().clamp_(min=0)
    return torch.where(token_ids < 0, sampled.index_select(0, places), token_ids)
