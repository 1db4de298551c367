"""A running HTTP server for the tests, with the wire's other end in their hands.

The engine process has no part in it: the test itself holds the sockets, to bring about exact situations. What arrives
when, an engine that dies, a client that leaves, a stop string across two tokens.
"""

import asyncio
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import openai
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from engine.engine_client import EngineClient
from engine.link import Endpoints
from engine.metrics import Metrics
from engine.openai_api import ServedModel
from engine.request import Abort, FinishReason, Submit, ToEngine, TokenOutput
from engine.server import build_app, http_server
from engine.tokenizer import load_tokenizer

TIMEOUT_S = 10.0
MODEL = ServedModel("tiny", max_model_tokens=60_000, vocabulary=260, eos_token_ids=(257,), created_s=1_700_000_000)
TOKENIZER = load_tokenizer(None)
Message = TypeVar("Message", Submit, Abort)
LAST = FinishReason.LENGTH


class WireEnd:
    """The engine's sockets in the test's hands. `now_ns` is what the server's clock says."""

    def __init__(self, directory: Path) -> None:
        self.endpoints = Endpoints.ipc(directory / "s", "engine")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._outputs = self._context.socket(zmq.PUSH)
        self._telemetry = self._context.socket(zmq.XPUB)
        self._requests.bind(self.endpoints.requests)
        self._outputs.bind(self.endpoints.outputs)
        self._telemetry.bind(self.endpoints.telemetry)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self.now_ns = 0

    def receive(self, kind: type[Message]) -> Message:
        """The next message from the server, which must be of this kind."""
        assert self._requests.poll(int(TIMEOUT_S * 1000)), f"no {kind.__name__} came"
        message = self._decoder.decode(self._requests.recv())
        assert isinstance(message, kind), message
        return message

    def send(self, *outputs: TokenOutput) -> None:
        """One message, as the engine sends after an iteration."""
        self._outputs.send(msgspec.msgpack.encode(list(outputs)))

    def say(self, submit: Submit, data: bytes, reason: FinishReason | None = LAST) -> None:
        """A whole output, one token a message, the last with the reason to end."""
        for byte in data[:-1]:
            self.send(TokenOutput(submit.request_id, byte))
        self.send(TokenOutput(submit.request_id, data[-1], reason))

    def publish(self, data: bytes) -> None:
        self._telemetry.send(data)

    def wait_for_subscriber(self) -> None:
        assert self._telemetry.poll(int(TIMEOUT_S * 1000)), "nobody subscribed to the telemetry"
        self._telemetry.recv()

    def close(self) -> None:
        self._context.destroy(linger=0)


class Server:
    """The app under uvicorn on a loopback port, on an event loop in a thread of its own."""

    def __init__(self, engine: WireEnd) -> None:
        metrics = Metrics(MODEL.name, "0", prefix_caching=True)
        numbers, more_numbers = itertools.count(), itertools.count()
        self._client = EngineClient(engine.endpoints, metrics, lambda: engine.now_ns, lambda: f"r{next(numbers)}")
        app = build_app(
            self._client, TOKENIZER, MODEL, metrics, lambda: 1_800_000_000.5, lambda: str(next(more_numbers))
        )
        # Listening before uvicorn runs, the socket keeps early connections until it does.
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = http_server(app, "127.0.0.1", self.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(self._server.serve([self._socket]))

    def engine_died(self) -> None:
        """What the process supervisor does."""
        self._loop.call_soon_threadsafe(self._client.fail, "engine process ended with code -9")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self._loop.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
        connection = self.connect()
        connection.request("POST", path, body, {"content-type": content_type})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def metrics(self) -> dict[str, float]:
        """Samples by name; a label other than model_name and engine is appended as name{value}."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1].decode()):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0")
                suffix = "".join(f"{{{value}}}" for value in labels.values())
                found[sample.name + suffix] = sample.value
        return found


@pytest.fixture(name="engine")
def engine_fixture(tmp_path: Path) -> Iterator[WireEnd]:
    end = WireEnd(tmp_path)
    yield end
    end.close()


@pytest.fixture(name="server")
def server_fixture(engine: WireEnd) -> Iterator[Server]:
    running = Server(engine)
    yield running
    running.stop()


@pytest.fixture(name="client")
def client_fixture(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as client:
        yield client


@pytest.fixture(name="pool")
def pool_fixture() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def call(pool: ThreadPoolExecutor, create: Callable[..., Any], **parameters: Any) -> "Future[Any]":
    """The official client's call in a thread: the test answers as the engine meanwhile."""
    return pool.submit(create, model="tiny", **parameters)


def until(holds: Callable[[], bool]) -> None:
    """Ask again until it holds: what a socket carries is there some time after it was sent."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"


def raw_request(server: Server, body: dict[str, Any], receive_buffer_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(TIMEOUT_S)
    if receive_buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection
