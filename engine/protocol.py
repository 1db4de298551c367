"""The wire between an engine and its controller: what is measured, what may be set.

Telemetry goes out once per iteration, when batch N is launched: it describes batch N, and carries the measurements of
every iteration that completed since the message before. Knobs come back: absolute, whole, newest wins. Both are
msgspec structs in MessagePack, self-describing maps, so that any language can read them.

Structs are outside the garbage collector's care (`gc=False`): they hold no references back, and there are many.

Times are nanoseconds of the engine host's monotonic clock; durations are seconds (`_s`).
"""

import contextlib
from typing import Literal, TypeVar

import msgspec

VERSION = 3
MOST_PROMPTS = 16  # that telemetry tells of one by one
MAX_COUNT = 2**53  # sequences and iterations stay below, so that every language reads them exactly
MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding bytes from a socket may raise."""

M = TypeVar("M", "Knobs", "Telemetry")


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What is fixed at launch: what the knobs may be (buffers are sized by `max_budget_tokens`), seats, KV cache."""

    min_budget_tokens: int
    max_budget_tokens: int
    tile_tokens: int  # GEMM tile: knobs above one tile are cut down to whole tiles
    max_requests: int  # most that run at once
    kv_tokens: int  # room in the KV cache


class Knobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The controller's decision: absolute and whole, so a lost message costs one iteration and nothing more.

    `sequence` grows with every decision about an engine (a new controller goes on from the echo in telemetry);
    `iteration` is the one whose telemetry this answers. The chunk is the most prefill tokens one request gets.
    """

    version: int
    engine_id: str
    sequence: int
    iteration: int
    budget_tokens: int
    chunk_tokens: int
    reason: str = ""


class InForce(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The knobs an iteration ran under; `sequence` and `iteration` echo the decision, which acknowledges it.

    `source` is "fallback" (the engine's own static knobs, sequence and iteration of the last decision kept) when no
    decision arrived within the time to live.
    """

    budget_tokens: int
    chunk_tokens: int
    sequence: int
    iteration: int
    source: Literal["controller", "fallback"]


class BatchComposition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What one iteration computes.

    `prefill_attention_tokens2` is W = sum of c * (L + c/2) over the prefill chunks c at context L: the query-key pairs
    that the chunks attend to. `padding_tokens` are computed and thrown away (CUDA graph sizes).
    """

    decode_tokens: int = 0
    decode_context_tokens: int = 0
    prefill_requests: int = 0
    prefill_tokens: int = 0
    prefill_chunk_tokens: tuple[int, ...] = ()
    prefill_context_tokens: tuple[int, ...] = ()
    prefill_attention_tokens2: float = 0.0
    padding_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.decode_tokens + self.prefill_tokens

    @property
    def load(self) -> tuple[int, int, int, int, float]:
        """What its time depends on: decodes, their context, prompts, prompt tokens, W."""
        prompts = (self.prefill_requests, self.prefill_tokens, self.prefill_attention_tokens2)
        return self.decode_tokens, self.decode_context_tokens, *prompts


class QueueState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Who waits after the batch was formed.

    `prompt_remaining_tokens` and `prompt_context_tokens`, parallel, are of the first `MOST_PROMPTS` prompts that had
    tokens left to compute when the batch was formed, in the order in which they are served: the running ones, oldest
    first, then the waiting queue. What the batch computes of them is still counted as left. The context is in the KV
    cache by then, with all that was in flight; of a waiting one it is what the prefix cache holds of it, as last looked
    up. The head is the first of them. The oldest wait counts from the arrival of the head of the waiting queue, which
    may have run before it was preempted.
    """

    running_requests: int = 0
    waiting_requests: int = 0
    waiting_prompt_tokens: int = 0
    oldest_wait_s: float = 0.0
    prompt_remaining_tokens: tuple[int, ...] = ()
    prompt_context_tokens: tuple[int, ...] = ()

    @property
    def head_remaining_tokens(self) -> int:
        """0 if there is no prompt to compute."""
        return self.prompt_remaining_tokens[0] if self.prompt_remaining_tokens else 0

    @property
    def head_context_tokens(self) -> int:
        return self.prompt_context_tokens[0] if self.prompt_context_tokens else 0


class StageTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One pipeline stage in one iteration; a bubble is idle time while there is work."""

    busy_s: float
    bubble_s: float
    microbatches_in_flight: int


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A request that has its last token: when it came, and how long prompt and output were in the end."""

    slot: int
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int


class Completion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The measurements of an iteration that has ended.

    `tbt_s` has one entry for every output token that is not its request's first, `ttft_s` one for every first token,
    both in the order of the batch; `tbt_slots` and `ttft_slots`, parallel to them, say whose. A slot names a request
    from its first token, through preemptions, until the completion that has it among `finished` (a request of one
    token is there with its first). Then the number is used again. A request that its client gave up is never among
    `finished`: a first token in its slot is another request's.
    """

    iteration: int
    scheduled_ns: int
    completed_ns: int
    device_s: float
    tbt_s: tuple[float, ...]
    tbt_slots: tuple[int, ...]
    ttft_s: tuple[float, ...]
    ttft_slots: tuple[int, ...]
    finished: tuple[Finished, ...]
    stages: tuple[StageTimes, ...]


class Telemetry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One message per iteration, at launch; an idle engine repeats its last iteration number with an empty batch.

    `engine_id` is new at every start of an engine. `dead_time_iterations` is how many iterations pass between the one
    whose launch this reports and the first that the answer can act on. With k iterations in flight it is 1 as well: the
    engine forms an iteration when the oldest of k has ended, so the answer has an iteration's time to arrive, but for
    the k - 1 that follow one another at once when work begins. What `completed` tells is then k - 1 iterations older:
    iteration N is launched when N - k has ended. `preemptions` and `rejected_knobs` count since start. `kv_usage` is
    the used share of the KV blocks, 0 to 1.
    """

    version: int
    engine_id: str
    iteration: int
    scheduled_ns: int
    schedule: str
    dead_time_iterations: int
    knobs: InForce
    bounds: Bounds
    batch: BatchComposition
    queue: QueueState
    kv_usage: float
    preemptions: int
    rejected_knobs: int
    completed: tuple[Completion, ...] = ()


class Rejected(ValueError):
    """A message that must change nothing; `kind` is its counter: garbage, version, engine, bounds or order."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Versioned(msgspec.Struct):
    version: int


_encoder = msgspec.msgpack.Encoder()
_version_decoder = msgspec.msgpack.Decoder(_Versioned)
_knobs_decoder = msgspec.msgpack.Decoder(Knobs)
_telemetry_decoder = msgspec.msgpack.Decoder(Telemetry)


def encode(message: Knobs | Telemetry) -> bytes:
    return _encoder.encode(message)


def decode_telemetry(data: bytes) -> Telemetry:
    """Raises Rejected on garbage, unknown fields or another version."""
    return _decode(_telemetry_decoder, data)


def decode_knobs(data: bytes, engine_id: str, bounds: Bounds) -> Knobs:
    """Raises Rejected on garbage, NaN, unknown fields, another version, another engine or values out of bounds."""
    knobs = _decode(_knobs_decoder, data)
    if knobs.engine_id != engine_id:
        raise Rejected("engine", f"knobs for engine {knobs.engine_id!r} reached {engine_id!r}")
    low, high = bounds.min_budget_tokens, bounds.max_budget_tokens
    for name, value in (
        ("budget_tokens", knobs.budget_tokens),
        ("chunk_tokens", knobs.chunk_tokens),
    ):
        if not low <= value <= high:
            raise Rejected("bounds", f"{name} {value} is outside the launch bounds {low}..{high}")
    for name, value in (("sequence", knobs.sequence), ("iteration", knobs.iteration)):
        if not 0 <= value < MAX_COUNT:
            raise Rejected("bounds", f"{name} {value} is outside 0..{MAX_COUNT - 1}")
    return knobs


def _decode(decoder: "msgspec.msgpack.Decoder[M]", data: bytes) -> M:
    try:
        message = decoder.decode(data)
    except MALFORMED as error:
        _check_version(data)
        raise Rejected("garbage", f"not a message of this protocol: {error}") from error
    if message.version != VERSION:
        _check_version(data)
    return message


def _check_version(data: bytes) -> None:
    """Another version may have other fields, so that is asked first of what cannot be read."""
    with contextlib.suppress(*MALFORMED):
        version = _version_decoder.decode(data).version
        if version != VERSION:
            raise Rejected("version", f"protocol version {version}, this side speaks {VERSION}")
