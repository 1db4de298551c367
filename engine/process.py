"""The engine's process: sockets around the core, and nothing else that could hold up a step."""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import NoReturn

import msgspec
import zmq

from engine.config import EngineConfig, ModelSource
from engine.core import EngineCore, Runner
from engine.link import CurveKeys, Endpoints, EngineLink, MemoryLink
from engine.protocol import MALFORMED
from engine.request import Abort, FinishReason, SamplingParams, Submit, ToEngine, TokenOutput
from engine.scheduler import Scheduler
from engine.tuned import Tuned

logger = logging.getLogger(__name__)

STOP_S = 10.0  # from SIGTERM to an end by force
LONGEST_HEARTBEAT_S = 10.0  # who listens takes an engine that says nothing for longer than a few of these for dead


class RequestGate:
    """The engine's sockets to the HTTP server: requests in, tokens out, neither ever waited for by a step."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoints: Endpoints, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._requests = context.socket(zmq.PULL)
        self._outputs = context.socket(zmq.PUSH)
        self._outputs.sndhwm = 0  # tokens of a slow server wait in memory, not in the step
        for socket, address in ((self._requests, endpoints.requests), (self._outputs, endpoints.outputs)):
            socket.linger = 0
            socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._requests, zmq.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()

    def wake_on(self, file_descriptor: int) -> None:
        """Make `wait` return when this becomes readable, too."""
        self._poller.register(file_descriptor, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to receive, or to wake up for."""
        self._poller.poll(int(timeout_s * 1000))

    def receive(self, scheduler: Scheduler, clock: Callable[[], int]) -> None:
        """Hand over what has arrived, without waiting."""
        while True:
            try:
                message = self._decoder.decode(self._requests.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except MALFORMED as error:
                logger.warning("ignored a message on the request socket: %s", error)
                continue
            if isinstance(message, Abort):
                scheduler.abort(message)
                continue
            try:
                self._check_ids(message)
                scheduler.submit(message, clock())
            except ValueError as error:
                logger.warning("refused: %s", error)
                reason = f"the engine refused the request: {error}"
                self.send([TokenOutput(message.request_id, -1, FinishReason.ABORT, error=reason)])

    def _check_ids(self, submit: Submit) -> None:
        strangers = [token for token in submit.prompt_ids if not 0 <= token < self._vocab_size]
        if strangers:
            raise ValueError(f"request {submit.request_id!r}: token {strangers[0]} is not among {self._vocab_size}")

    def send(self, tokens: list[TokenOutput]) -> None:
        # Without a server to take them, tokens have no reader: its requests died with it.
        with contextlib.suppress(zmq.Again):
            self._outputs.send(self._encoder.encode(tokens), zmq.NOBLOCK)


def run_loop(core: EngineCore, gate: RequestGate, clock: Callable[[], int], heartbeat_s: float) -> None:
    """Serve until SIGTERM."""
    stopping = []
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    gate.wake_on(woken)
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    while not stopping:
        gate.receive(core.scheduler, clock)
        if core.scheduler.has_work:
            core.step()
        else:
            core.idle()
            gate.wait(heartbeat_s)


def idle_heartbeat_s(config: EngineConfig) -> float:
    """How often an idle engine speaks: several times within the knobs' time to live."""
    return min(config.knobs_ttl_s / 4, LONGEST_HEARTBEAT_S)


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Handler of a signal that ends the process while it starts: what has been opened is closed on the way out."""
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt that
    raise SystemExit(128 + number)  # as shells say it


def main(
    config: EngineConfig,
    source: ModelSource,
    places: list[Endpoints],
    keys: CurveKeys | None,
    ready: Connection,
    clock: Callable[[], int],
    tuned: Tuned | None = None,
) -> None:
    """Entry point of the process. Sends "" on `ready` when it serves, or the reason why it cannot.

    `places` are where a controller can find it, the first one (ipc) with the HTTP server's sockets. It does not serve
    if it is not the engine that `tuned` is for.
    SIGTERM ends the process in order at any time, and so does the end of its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process in order
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    with contextlib.ExitStack() as opened:
        try:
            # Imported here: the parent, the HTTP server, imports this module to start it and needs no model code.
            from engine.loader import engine_facts, load_runner  # noqa: PLC0415

            opened.callback(places[0].claim().close)
            runner, config = load_runner(source, config, clock)
            opened.callback(runner.close)
            if tuned is not None:
                tuned.check(engine_facts(source, config, runner.attention_name), config)
            _warm_up(config, runner, clock)
            engine_id = f"{config.name}-{clock():x}"  # the clock has moved on since any earlier start
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            link = EngineLink(context, places, engine_id, config.bounds, keys)
            opened.callback(link.close)
            gate = RequestGate(context, places[0], runner.vocab_size)
        except (ValueError, OSError, RuntimeError, zmq.ZMQError) as error:  # RuntimeError: torch, out of memory
            ready.send(str(error))
            return
        gc.freeze()  # a collection that walks through all that was loaded would hold up a step
        core = EngineCore(engine_id, config, Scheduler(config), runner, link, clock, gate.send)
        ready.send("")
        run_loop(core, gate, clock, idle_heartbeat_s(config))


def _end_with_parent() -> None:
    """Once the parent is gone, stop this process as it would have: by SIGTERM, and by force if that is not heard."""
    parent, main_thread = multiprocessing.parent_process(), threading.main_thread()
    assert parent is not None, "the engine is started by the HTTP server's process"
    assert main_thread.ident is not None, "it has been started"
    wait([parent.sentinel])
    signal.pthread_kill(main_thread.ident, signal.SIGTERM)  # it handles signals, so that is the one to wake
    threading.Event().wait(STOP_S)
    os._exit(1)


def _warm_up(config: EngineConfig, runner: Runner, clock: Callable[[], int]) -> None:
    """Compile and allocate before the first request, by serving one of our own outside the telemetry.

    Raises RuntimeError when not even that can be served.
    """

    def check(tokens: list[TokenOutput]) -> None:
        if tokens[-1].error:
            raise RuntimeError(f"the first request of our own has failed: {tokens[-1].error}")

    core = EngineCore("warm-up", config, Scheduler(config), runner, MemoryLink(), clock, check)
    prompt_tokens = min(64, config.max_model_tokens - 1)
    max_tokens = min(3, config.max_model_tokens - prompt_tokens)
    core.scheduler.submit(Submit("warm-up", [0] * prompt_tokens, SamplingParams(max_tokens)), clock())
    while core.scheduler.has_work:
        core.step()
