"""A model in shards against the whole: ranks are threads, stages hand over hidden states."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CHECKPOINTS, VOCABULARY, write_checkpoint
from computer import CPU, Computer, Sequences

from engine.model_config import PACER_26M, ModelConfig, read_model_config
from engine.shapes import kv_bytes_per_token, shape
from engine.shard import Shard
from engine.step_input import StepInput
from engine.weights import Weights, dummy_weights, load_safetensors

Load = Callable[[Shard], tuple[ModelConfig, Weights]]
GRIDS = [(2, 1), (1, 2), (1, 3), (2, 2)]


class Meeting:
    """Where the threads of a tensor group exchange their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list[torch.Tensor] = [torch.empty(0)] * size


@dataclass
class Member:
    """The Collectives of one thread."""

    meeting: Meeting
    rank: int

    def all_reduce(self, x: torch.Tensor) -> None:
        parts = self._exchange(x.clone())
        x.copy_(torch.stack(parts).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.brought[self.rank] = x
        self.meeting.barrier.wait()
        parts = list(self.meeting.brought)
        self.meeting.barrier.wait()
        return parts


class Grid:
    """tp_size x pp_size shards of one model."""

    def __init__(self, load: Load, tp_size: int = 1, pp_size: int = 1) -> None:
        self.tp_size = tp_size
        self.stages = []
        for stage in range(pp_size):
            meeting = Meeting(tp_size)
            shards = [Shard(rank, tp_size, stage, pp_size) for rank in range(tp_size)]
            self.stages.append([Computer(*load(shard), shard, Member(meeting, shard.tp_rank)) for shard in shards])

    def forward(self, step: StepInput) -> torch.Tensor:
        hidden: torch.Tensor | None = None
        with ThreadPoolExecutor(self.tp_size) as threads:
            for stage in self.stages:
                given = [None if hidden is None else hidden.clone() for _ in stage]
                outputs = list(threads.map(lambda computer, x: computer.forward(step, x), stage, given))
                assert all(torch.equal(output, outputs[0]) for output in outputs)
                hidden = outputs[0]
        assert hidden is not None
        return hidden


def logits_of(grid: Grid) -> torch.Tensor:
    """Two prompts, the second in two chunks, the rest of it beside a decode of the first."""
    random = np.random.default_rng(7)
    first, second = random.integers(0, VOCABULARY, 31).tolist(), random.integers(0, VOCABULARY, 50).tolist()
    cached = Sequences()
    begun = grid.forward(cached.step([(0, first, 0, 31), (1, second, 0, 20)]))
    first.append(int(begun.argmax()))
    ended = grid.forward(cached.step([(0, first, 31, 1), (1, second, 20, 30)], n_decodes=1))
    return torch.cat((begun, ended))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shards_give_the_logits_of_the_whole(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path)
    model = read_model_config(tmp_path)

    def load(shard: Shard) -> tuple[ModelConfig, Weights]:
        return model, load_safetensors(tmp_path, model, torch.float64, CPU, shard)

    whole = logits_of(Grid(load))
    assert whole.shape == (3, VOCABULARY)
    for tp_size, pp_size in GRIDS:
        torch.testing.assert_close(logits_of(Grid(load, tp_size, pp_size)), whole, rtol=0, atol=1e-9)


def test_dummy_weights_and_an_uneven_vocabulary_are_the_same_in_shards() -> None:
    model = replace(PACER_26M, vocab_size=VOCABULARY + 1)

    def load(shard: Shard) -> tuple[ModelConfig, Weights]:
        return model, dummy_weights(model, torch.float64, 3, CPU, shard)

    whole = logits_of(Grid(load))
    assert whole.shape == (3, VOCABULARY + 1)
    for tp_size, pp_size in [(2, 1), (2, 4)]:
        torch.testing.assert_close(logits_of(Grid(load, tp_size, pp_size)), whole, rtol=0, atol=1e-9)


def test_the_last_ranks_take_what_is_left_of_the_vocabulary() -> None:
    assert [Shard(rank, 4).vocabulary(10) for rank in range(4)] == [range(3), range(3, 6), range(6, 9), range(9, 10)]
    assert [Shard(rank, 4).vocabulary(5) for rank in range(4)] == [range(2), range(2, 4), range(4, 5), range(5, 5)]


def test_earlier_stages_take_the_remaining_layers() -> None:
    assert [Shard(0, 1, stage, 3).layers(8) for stage in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert [Shard(0, 1, stage, 2).layers(60) for stage in range(2)] == [range(30), range(30, 60)]


def test_a_rank_keeps_its_share_of_the_weights_and_of_the_kv_cache() -> None:
    whole = dummy_weights(PACER_26M, torch.bfloat16, 0)
    shards = [
        dummy_weights(PACER_26M, torch.bfloat16, 0, CPU, Shard(tp, 2, pp, 2)) for tp in range(2) for pp in range(2)
    ]
    sizes = [sum(tensor.numel() for tensor in shard.values()) for shard in shards]
    norms = sum(tensor.numel() for name, tensor in whole.items() if "norm" in name)
    assert sum(sizes) == sum(tensor.numel() for tensor in whole.values()) + norms
    yi = shape("yi-34b")
    assert kv_bytes_per_token(yi, 2) == 2 * 60 * 8 * 128 * 2
    assert kv_bytes_per_token(yi, 2, Shard(1, 2, 1, 2)) == kv_bytes_per_token(yi, 2) // 4
    assert kv_bytes_per_token(shape("falcon-7b"), 2, Shard(0, 1)) == 2 * 32 * 64 * 2


@pytest.mark.parametrize(
    ("name", "shard", "message"),
    [
        ("falcon-7b", Shard(0, 2), r"71 attention heads cannot be shared evenly by 2 .* use 1"),
        ("mistral-7b", Shard(0, 16), r"8 key-value heads .* by 16 .* use 1, 2, 4, 8"),
        ("qwen2.5-7b", Shard(0, 1, 28, 29), r"28 layers cannot fill 29 pipeline stages"),
    ],
)
def test_ranks_that_cannot_share_a_model_are_refused(name: str, shard: Shard, message: str) -> None:
    tiny = replace(shape(name), vocab_size=16, hidden_size=8, intermediate_size=16)
    with pytest.raises(ValueError, match=message):
        dummy_weights(tiny, torch.float32, 0, CPU, shard)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="tp_rank 2 is not one of tp_size 2"):
        Shard(2, 2)
