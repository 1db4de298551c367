"""The HTTP server's process: starts the engine's process, serves until a signal, ends both in order."""

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import uvicorn

from engine import process
from engine.config import EngineConfig, ModelSource
from engine.engine_client import EngineClient
from engine.link import CurveKeys, Endpoints
from engine.metrics import Metrics
from engine.openai_api import ServedModel
from engine.server import build_app, http_server
from engine.shapes import source_model
from engine.tokenizer import load_tokenizer, number_tokenizer
from engine.tuned import Tuned

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where time and ids come from: monotonic nanoseconds, Unix seconds, ids never given twice."""

    monotonic_ns: Callable[[], int]
    wall_s: Callable[[], float]
    new_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """One served model. `places` are the engine's sockets, the first one local; `keys` are for those on tcp.

    An engine that is not the one that `tuned` is for does not start.
    """

    config: EngineConfig
    source: ModelSource
    model_name: str
    host: str
    port: int
    places: list[Endpoints]
    keys: CurveKeys | None
    clocks: Clocks
    tuned: Tuned | None = None


def serve(options: ServeOptions) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status. Raises ValueError if the engine cannot start.

    A signal before all serves ends the engine, too, and raises KeyboardInterrupt or SystemExit.
    """
    signal.signal(signal.SIGTERM, process.leave)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"port {options.port} does not exist: choose one below 65536")
    model_config = source_model(options.source)
    shape = options.source.shape is not None
    tokenizer = number_tokenizer(model_config.vocab_size) if shape else load_tokenizer(options.source.folder)
    engine = _start_engine(options)
    try:
        clocks, config = options.clocks, options.config
        metrics = Metrics(options.model_name, config.name, config.prefix_caching)
        client = EngineClient(options.places[0], metrics, clocks.monotonic_ns, clocks.new_id)
        model = ServedModel(
            options.model_name,
            config.max_model_tokens,
            model_config.vocab_size,
            model_config.eos_token_ids,
            int(clocks.wall_s()),
        )
        app = build_app(client, tokenizer, model, metrics, clocks.wall_s, clocks.new_id)
        server = http_server(app, options.host, options.port)
        logger.info("serving %s at http://%s:%d, engine process %d", model.name, options.host, options.port, engine.pid)
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            return runner.run(_serve_http(server, client, engine))
    finally:
        stop_process(engine)


def _start_engine(options: ServeOptions) -> BaseProcess:
    # Spawned, not forked: the engine gets no copy of this process's threads, sockets and locks.
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    arguments = (
        options.config,
        options.source,
        options.places,
        options.keys,
        there,
        options.clocks.monotonic_ns,
        options.tuned,
    )
    engine = spawn.Process(target=process.main, args=arguments, name="engine")
    try:
        engine.start()
        there.close()
        if reason := _failure(engine, here):
            raise ValueError(reason)
    except BaseException:  # Ctrl-C and SIGTERM, too
        if engine.pid is not None:
            stop_process(engine)
        raise
    return engine


def _failure(engine: BaseProcess, ready: "Connection[str, str]") -> str:
    """Wait for the engine to serve; "", or why it does not."""
    try:
        return ready.recv()
    except EOFError:
        engine.join()
        return f"the engine process died with exit status {engine.exitcode} while starting"


async def _serve_http(server: uvicorn.Server, client: EngineClient, engine: BaseProcess) -> int:
    loop = asyncio.get_running_loop()
    status = 0

    def engine_died() -> None:
        nonlocal status
        status = 1
        loop.remove_reader(engine.sentinel)
        logger.error("the engine process died with exit status %s", engine.exitcode)
        client.fail("the engine process died")
        server.should_exit = True

    def parent_died() -> None:
        assert parent is not None
        loop.remove_reader(parent.sentinel)
        server.should_exit = True

    parent = multiprocessing.parent_process()
    loop.add_reader(engine.sentinel, engine_died)
    if parent is not None:
        loop.add_reader(parent.sentinel, parent_died)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn shuts down in order and then passes the signal on to this handler: all has been done.
        signal.signal(number, lambda *_: None)
    await server.serve()
    loop.remove_reader(engine.sentinel)
    return status


def stop_process(child: BaseProcess) -> None:
    """SIGTERM, then SIGKILL for one that does not listen."""
    child.terminate()
    child.join(process.STOP_S)
    if child.is_alive():
        logger.error("%s did not stop within %.0f s: killed", child.name, process.STOP_S)
        child.kill()
        child.join()
