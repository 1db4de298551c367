"""One request on its way through the engine, and the messages that bring it in and carry its tokens out.

The HTTP server and the engine are two processes; they exchange these structs over ZeroMQ, token ids only.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.protocol import Finished, StageTimes

IntArray = NDArray[np.int64]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off.

    `max_tokens` bounds the output. Generation also ends at a token of `stop_token_ids` (the server puts the model's
    end-of-sequence ids there unless the user asks to ignore them). Without a `seed` the engine draws one of its own.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k}; it must be from 0 to 2147483647")


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: a new request. The server has checked the ids and that prompt + max_tokens fit the model."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    arrival_ns: int | None = None  # when the server got it, by the host's monotonic clock; None: when the engine does


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: nobody waits for this request any more; its blocks are free before the next iteration."""

    request_id: str


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """Engine to server: one new token of one request, and why it ended if it did.

    `queue_s` (arrival to first scheduled) comes with the first token; `cached_tokens` of the prompt came from the
    prefix cache. When the engine gives a request up (ABORT), `error` says why and `token_id` is -1, no token.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    queue_s: float | None = None
    cached_tokens: int = 0
    error: str = ""


ToEngine = Submit | Abort
"""What the engine's request socket carries; MessagePack, one struct a message."""

FromEngine = list[TokenOutput]
"""What the engine's output socket carries: the tokens of one iteration in one message."""


class Request:
    """A request inside the engine: its tokens, and where it stands.

    `slot` is its row in the scheduler's arrays, which hold the numbers that the batching rule reads. `generation`
    counts up when the request is preempted, aborted or done: its rows in batches formed before count no more.
    """

    __slots__ = (
        "arrival_ns",
        "block_hashes",
        "cached_tokens",
        "first_scheduled_ns",
        "generation",
        "id",
        "last_token_ns",
        "n_prompt",
        "sampling",
        "seed",
        "slot",
        "token_ids",
    )

    def __init__(self, submit: Submit, slot: int, seed: int, arrival_ns: int) -> None:
        self.id = submit.request_id
        self.sampling = submit.sampling
        self.token_ids = list(submit.prompt_ids)  # prompt, then output
        self.n_prompt = len(submit.prompt_ids)
        self.seed = seed if submit.sampling.seed is None else submit.sampling.seed
        self.slot = slot
        self.arrival_ns = arrival_ns
        self.first_scheduled_ns: int | None = None
        self.last_token_ns = 0  # when its newest token was there; 0 until its first
        self.generation = 0
        self.cached_tokens = 0
        self.block_hashes: list[bytes] = []  # of full blocks, filled only with prefix caching

    @property
    def n_output(self) -> int:
        return len(self.token_ids) - self.n_prompt


@dataclass(slots=True)
class Batch:
    """One iteration's work, decided by the scheduler: row i computes `n_tokens[i]` tokens of `requests[i]`.

    `context[i]` tokens of it are in the KV cache once the batches launched before have run. Rows are decodes first
    (`n_decodes` of them), then prefill chunks; no request has two. A decode with `context[i] == len(token_ids)` when
    the batch is launched computes a token that is still in flight: the oldest batch in flight samples it.

    Arrays are int64 of length n; `samples` (bool) marks the rows that yield a token. `block_tables` is int32
    [n, most blocks of a row], row i holding the ids of the request's KV blocks in order (entries past its length are
    0). `generations` are the requests' own when the batch was formed, for the scheduler to compare. `work_since_ns` is
    since when, by the engine's clock, there has been work without a break: from then on an idle device has a bubble.
    """

    requests: list[Request]
    n_decodes: int
    slots: IntArray
    n_tokens: IntArray
    context: IntArray
    samples: NDArray[np.bool_]
    block_tables: NDArray[np.int32]
    generations: list[int] = field(default_factory=list)
    work_since_ns: int = 0


@dataclass(slots=True)
class StepOutput:
    """What an iteration gave: tokens for the clients, and what `Completion` reports of them."""

    tokens: list[TokenOutput] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    tbt_slots: list[int] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    ttft_slots: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """What a runner returns for a batch: one token for each row that samples, in row order.

    `device_s` is the device's own time for the batch (CUDA events; on a CPU the clock around the computation).
    """

    token_ids: list[int]
    device_s: float
    stages: tuple[StageTimes, ...]
