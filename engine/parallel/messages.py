"""What the engine's process and its ranks say to each other: MessagePack, one struct a message."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from engine.config import EngineConfig
from engine.step_input import StepInput
from engine.step_shapes import StepShape

STOP = b""
"""To a rank, instead of a StepInput: the end, in order."""

REST = b"\0"
"""To a rank, instead of a StepInput: nothing is in flight."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From every rank: the model is loaded. `config` has the block size and number that all ranks agreed on.

    `shapes` are those that it has captured CUDA graphs of.
    """

    rank: int
    config: EngineConfig
    vocab_size: int
    attention_name: str
    shapes: tuple[StepShape, ...]


class Done(msgspec.Struct, frozen=True, tag=True):
    """From the first tensor rank of each stage: its oldest microbatch is done.

    `token_ids` come from the last stage only. Before it the stage idled for `bubble_s` while there was work.
    """

    stage: int
    token_ids: list[int]
    busy_s: float
    bubble_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """From any rank, as its last word."""

    rank: int
    reason: str


FromRank = Ready | Done | Failed


def _pack(array: object) -> object:
    if isinstance(array, np.ndarray):
        return array.dtype.str, array.shape, array.tobytes()
    raise NotImplementedError(f"{type(array)} has no place in a message")


def _unpack(kind: type, packed: Any) -> object:
    dtype, shape, raw = packed
    return np.frombuffer(bytearray(raw), dtype).reshape(shape)  # a bytearray: tensors want memory they may write to


encode: Callable[[StepInput | FromRank], bytes] = msgspec.msgpack.Encoder(enc_hook=_pack).encode
decode_step: Callable[[bytes], StepInput] = msgspec.msgpack.Decoder(StepInput, dec_hook=_unpack).decode
decode_from_rank: Callable[[bytes], FromRank] = msgspec.msgpack.Decoder(FromRank).decode
