"""Replay of a workload against any OpenAI endpoint, open loop: every request is sent at its arrival time.

Streams `/v1/completions` and records when each request was sent and when each of its tokens came. All times are
seconds of the event loop's clock from the start of the replay.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import aiohttp
import msgspec
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from envs.trace import Workload

Progress = Callable[[int, int], None]
"""Called with (requests that ended, requests in the workload) whenever one ends."""

PromptKind = Literal["ids", "text"]

# Common words, each a single token in most vocabularies when a space stands before it.
_WORDS = ["the", "of", "and", "to", "in", "that", "for", "was", "on", "are", "with", "they", "at", "from"]


@dataclass(slots=True)
class RequestRecord:
    """What one request that was sent has shown so far.

    `token_times_s` has one entry per streamed chunk with `choices` (a server may put several tokens in a chunk);
    `output_tokens` counts tokens by the endpoint's usage numbers, else by chunks. A request is "unfinished" if it was
    still running when the replay ended; "failed" comes with the `error`.
    """

    scheduled_s: float
    sent_s: float
    prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    status: Literal["completed", "failed", "unfinished"] = "unfinished"
    error: str = ""

    @property
    def lateness_s(self) -> float:
        """How long after its arrival time the client sent the request."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float:
        """Sending to first token. Only defined once there is a token."""
        return self.token_times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """Sending to last token so far. Only defined once there is a token."""
        return self.token_times_s[-1] - self.sent_s

    @property
    def itl_s(self) -> NDArray[np.float64]:
        """Gaps between chunks, shape [chunks - 1]."""
        return np.diff(np.array(self.token_times_s))

    @property
    def tbt_s(self) -> NDArray[np.float64]:
        """Gaps between tokens, shape [tokens - 1]: tokens that came in one chunk have a gap of 0 between them."""
        in_one_chunk = max(0, self.output_tokens - len(self.token_times_s))
        return np.concatenate((self.itl_s, np.zeros(in_one_chunk)))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A replay's records in order of sending. If interrupted, fewer than `planned_requests` may have been sent.

    `duration_s` runs from the start to the end of the last request, or to the moment the rest was cancelled.
    """

    model: str
    records: list[RequestRecord]
    duration_s: float
    planned_requests: int
    rejected_requests: int
    interrupted: bool


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class StreamReader:
    """Turns the bytes of one server-sent event stream into a record: token times, usage, and how it ended."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._rest = b""
        self._done = False

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes bytes that came at `now_s`. Raises ValueError on an error event, MsgspecError on a broken one."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):  # all else is a comment, a blank line or a field of no use here
                self._take(line[5:].strip(), now_s)

    def close(self, now_s: float) -> None:
        """The stream ended at `now_s`. Raises ValueError if it was cut off or brought no token."""
        self.feed(b"\n", now_s)  # the last line may lack its end
        if not self._done:
            raise ValueError("the stream ended without [DONE]")
        if not self._record.token_times_s:
            raise ValueError("the stream brought no token")
        self._record.output_tokens = self._record.output_tokens or len(self._record.token_times_s)

    def _take(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self._done = True
            return
        chunk = _decode_chunk(payload)
        if chunk.error:
            raise ValueError(f"error in the stream: {chunk.error}")
        if chunk.choices:
            self._record.token_times_s.append(now_s)
        if chunk.usage is not None:
            self._record.output_tokens = chunk.usage.completion_tokens
            self._record.prompt_tokens = chunk.usage.prompt_tokens or self._record.prompt_tokens


async def replay(
    workload: Workload,
    base_url: str,
    rng: Generator,
    model: str | None = None,
    prompts: PromptKind = "ids",
    token_ids: tuple[int, int] = (10, 250),
    grace_s: float = 60.0,
    api_key: str | None = None,
    progress: Progress | None = None,
) -> LoadResult:
    """Sends every request of the workload at its arrival time and waits until all have ended.

    Prompts are random token ids from `token_ids` (low included, high not; the default is valid in every byte-level
    vocabulary), so that lengths are exact; "text" sends as many random words instead, for endpoints that refuse ids:
    lengths are then approximate, and the records hold the endpoint's own count. Requests still running `grace_s` after
    the last arrival are cancelled and stay "unfinished". Cancelling this call (Ctrl-C under asyncio.run) ends the
    replay early and returns what was measured, marked `interrupted`. Without `model`, the first of /v1/models is used.
    Raises ValueError on a bad argument, ConnectionError if the endpoint does not answer.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url is {base_url!r}; it must start with http:// or https://")
    if not 0 <= token_ids[0] < token_ids[1]:
        raise ValueError(f"token_ids is {token_ids}; it must be (low, high) with 0 <= low < high")
    if not grace_s > 0:
        raise ValueError(f"grace_s is {grace_s}; it must be positive")
    api = base_url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=headers
    ) as session:
        served = await _served_model(session, api)
        name = model or served
        if name is None:
            raise ValueError(f"{api}/models names no model: give one by name")

        make_body = partial(_completion_body, name, rng, prompts, token_ids)
        run = _Replay(session, f"{api}/completions", workload, make_body, progress)
        duration_s, interrupted = await run.run(grace_s)
        return LoadResult(name, run.records, duration_s, len(workload), workload.rejected_requests, interrupted)


async def _served_model(session: aiohttp.ClientSession, api: str) -> str | None:
    """The first model that /v1/models names, None if it names none."""
    try:
        async with session.get(f"{api}/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
            body = await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionError(
            f"no answer from {api}/models ({error}): is the server up, and the address right?"
        ) from error
    try:
        return msgspec.json.decode(body, type=_Models).data[0].id
    except (msgspec.MsgspecError, IndexError):
        return None


def _completion_body(
    model: str, rng: Generator, prompts: PromptKind, token_ids: tuple[int, int], prompt_tokens: int, output_tokens: int
) -> bytes:
    prompt: list[int] | str
    if prompts == "ids":
        prompt = rng.integers(*token_ids, size=prompt_tokens).tolist()
    else:
        prompt = " ".join(rng.choice(_WORDS, size=prompt_tokens))
    return msgspec.json.encode(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


class _Replay:
    """One run: a driver that launches the requests on time, and a task for each of them."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        workload: Workload,
        make_body: Callable[[int, int], bytes],
        progress: Progress | None,
    ) -> None:
        self.records: list[RequestRecord] = []
        self._session = session
        self._url = url
        self._workload = workload
        self._make_body = make_body
        self._progress = progress
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = 0
        self._clock = asyncio.get_running_loop().time
        self._start_s = self._clock()

    async def run(self, grace_s: float) -> tuple[float, bool]:
        """Returns (duration in seconds, whether it was interrupted)."""
        interrupted = False
        try:
            await self._launch_all()
            await asyncio.wait(self._tasks, timeout=grace_s)
        except asyncio.CancelledError:
            # The cancellation ends the measurement, not the caller, who gets what there is.
            interrupted = True
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        duration_s = self._now_s()
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return duration_s, interrupted

    async def _launch_all(self) -> None:
        w = self._workload
        rows = zip(w.arrival_s.tolist(), w.prompt_tokens.tolist(), w.output_tokens.tolist(), strict=True)
        for arrival_s, prompt_tokens, output_tokens in rows:
            body = self._make_body(prompt_tokens, output_tokens)  # before the wait: it takes time
            await asyncio.sleep(max(0.0, arrival_s - self._now_s()))
            self._tasks.append(asyncio.create_task(self._request(arrival_s, prompt_tokens, body)))

    async def _request(self, arrival_s: float, prompt_tokens: int, body: bytes) -> None:
        record = RequestRecord(arrival_s, self._now_s(), prompt_tokens)
        self.records.append(record)
        try:
            async with self._session.post(self._url, data=body) as response:
                if response.status != 200:
                    raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
                reader = StreamReader(record)
                async for data in response.content.iter_any():
                    reader.feed(data, self._now_s())
                reader.close(self._now_s())
            record.status = "completed"
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, ValueError) as error:
            record.status = "failed"
            record.error = str(error) or type(error).__name__
        self._ended += 1
        if self._progress is not None:
            self._progress(self._ended, len(self._workload))

    def _now_s(self) -> float:
        return self._clock() - self._start_s
