"""The HTTP server's end of the engine's sockets: requests out, tokens in, each to whoever waits for it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from engine.link import Endpoints
from engine.metrics import Metrics
from engine.protocol import Rejected, decode_telemetry
from engine.request import Abort, FinishReason, FromEngine, SamplingParams, Submit, ToEngine, TokenOutput

logger = logging.getLogger(__name__)


class GenerationFailed(RuntimeError):
    """The engine will not finish these requests; the message says why."""


class ClientGone(Exception):
    """Nobody waits for these requests any more; they have been aborted."""


class Generation:
    """The requests of one HTTP call, numbered from 0; iterate for their tokens.

    Each item is a list of all `(number, TokenOutput)` that have arrived since the last, never empty. Iteration ends
    when every request has; it raises GenerationFailed when the engine fails, ClientGone after `close`.
    """

    def __init__(self, client: "EngineClient", request_ids: Sequence[str]) -> None:
        self._client = client
        self._request_ids = request_ids
        self._n_open = len(request_ids)
        self._arrived: list[tuple[int, TokenOutput]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> list[tuple[int, TokenOutput]]:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self._n_open == 0:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        return arrived

    def stop(self, number: int) -> None:
        """End one request early as complete (its text has reached a stop string)."""
        if self._client.end(self._request_ids[number], FinishReason.STOP):
            self._n_open -= 1

    def close(self) -> None:
        """Abort what has not ended. May be called again, and after the end."""
        for request_id in self._request_ids:
            self._client.end(request_id, FinishReason.ABORT)
        self.fail(ClientGone())

    def deliver(self, number: int, output: TokenOutput) -> None:
        self._arrived.append((number, output))
        if output.finish_reason is not None:
            self._n_open -= 1
        self._wake()

    def fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True)
class _Open:
    """A request that has not ended. Times are nanoseconds of the client's clock."""

    generation: Generation
    number: int
    prompt_tokens: int
    arrival_ns: int
    first_ns: int = 0
    last_ns: int = 0
    output_tokens: int = 0


class EngineClient:
    """Speaks to one engine process. All methods belong to one event loop; none of them waits for the engine.

    `clock` gives monotonic nanoseconds, `new_id` an id that it never gives again.
    """

    def __init__(
        self, endpoints: Endpoints, metrics: Metrics, clock: Callable[[], int], new_id: Callable[[], str]
    ) -> None:
        self._endpoints = endpoints
        self._metrics = metrics
        self._clock = clock
        self._new_id = new_id
        self._open: dict[str, _Open] = {}
        self._failure: str | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._readers: list[asyncio.Task[None]] = []

    @property
    def failure(self) -> str | None:
        """Why the engine serves no more; None while it does."""
        return self._failure

    def start(self) -> None:
        """Connect and begin to read, on the running event loop. The engine may come later: ZeroMQ connects then."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        awaitable = zmq.asyncio.Context(self._context)
        self._requests = self._context.socket(zmq.PUSH)
        self._requests.sndhwm = 0  # sending must never wait; what is queued is bounded by the open connections
        outputs, telemetry = awaitable.socket(zmq.PULL), awaitable.socket(zmq.SUB)
        outputs.rcvhwm = 0
        telemetry.subscribe(b"")
        self._sockets = [self._requests, outputs, telemetry]
        addresses = (self._endpoints.requests, self._endpoints.outputs, self._endpoints.telemetry)
        for socket, address in zip(self._sockets, addresses, strict=True):
            socket.linger = 0
            socket.reconnect_ivl = 50
            socket.reconnect_ivl_max = 500
            socket.connect(address)
        for reader in (self._read_outputs(outputs), self._read_telemetry(telemetry)):
            task = asyncio.create_task(reader)
            task.add_done_callback(self._reader_ended)
            self._readers.append(task)

    async def stop(self) -> None:
        """Fail what is open, and close the sockets."""
        self.fail("the server is shutting down")
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for socket in self._sockets:
            socket.close()
        self._context.term()

    def submit(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> Generation:
        """Send the requests (prompt ids, sampling) of one HTTP call. Raises GenerationFailed if the engine is dead."""
        if self._failure is not None:
            raise GenerationFailed(self._failure)
        request_ids = [self._new_id() for _ in requests]
        generation = Generation(self, request_ids)
        now_ns = self._clock()
        for number, (request_id, (prompt_ids, sampling)) in enumerate(zip(request_ids, requests, strict=True)):
            self._open[request_id] = _Open(generation, number, len(prompt_ids), now_ns)
            self._send(Submit(request_id, prompt_ids, sampling, now_ns))
        return generation

    def end(self, request_id: str, reason: FinishReason) -> bool:
        """Abort a request in the engine, for this reason; False if it has ended already."""
        request = self._open.pop(request_id, None)
        if request is None:
            return False
        self._send(Abort(request_id))
        self._count_end(request, reason, self._clock())
        return True

    def fail(self, reason: str) -> None:
        """The engine is dead: every open request fails now, every later one at once."""
        if self._failure is not None:
            return
        self._failure = reason
        opened, self._open = self._open, {}
        for request in opened.values():
            self._metrics.aborted()
            request.generation.fail(GenerationFailed(reason))

    def _send(self, message: ToEngine) -> None:
        self._requests.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def _read_outputs(self, socket: zmq.asyncio.Socket) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            data = await socket.recv()
            now_ns = self._clock()
            for output in decoder.decode(data):
                request = self._open.get(output.request_id)
                if request is not None:  # else it ended here while the token was on its way
                    self._deliver(request, output, now_ns)

    def _deliver(self, request: _Open, output: TokenOutput, now_ns: int) -> None:
        if output.finish_reason is FinishReason.ABORT:  # carries no token
            del self._open[output.request_id]
            self._metrics.aborted()
            request.generation.fail(GenerationFailed(output.error))
            return
        request.output_tokens += 1
        if request.output_tokens == 1:
            request.first_ns = now_ns
            ttft_s = (now_ns - request.arrival_ns) * 1e-9
            self._metrics.first_token(request.prompt_tokens, output.cached_tokens, ttft_s, output.queue_s)
        else:
            self._metrics.next_token((now_ns - request.last_ns) * 1e-9)
        request.last_ns = now_ns
        if output.finish_reason is not None:
            del self._open[output.request_id]
            self._count_end(request, output.finish_reason, now_ns)
        request.generation.deliver(request.number, output)

    def _count_end(self, request: _Open, reason: FinishReason, now_ns: int) -> None:
        if reason is FinishReason.ABORT:
            self._metrics.aborted()
            return
        decode_s = (request.last_ns - request.first_ns) * 1e-9
        self._metrics.completed(reason, (now_ns - request.arrival_ns) * 1e-9, decode_s, request.output_tokens)

    async def _read_telemetry(self, socket: zmq.asyncio.Socket) -> None:
        rejected = 0
        while True:
            data = await socket.recv()
            try:
                self._metrics.observe_telemetry(decode_telemetry(data))
            except Rejected as error:
                rejected += 1
                if rejected & (rejected - 1) == 0:  # powers of two only: the log must not fill the disk
                    logger.warning("rejected telemetry (%d so far): %s", rejected, error)

    def _reader_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a reader of the engine's sockets stopped", exc_info=error)
            self.fail(f"the connection to the engine broke: {error}")
