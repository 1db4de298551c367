"""The wire: what passes, and what changes nothing but a counter."""

import math
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.auth

from engine.link import ControllerLink, CurveKeys, Endpoints, EngineLink
from engine.protocol import (
    VERSION,
    BatchComposition,
    Bounds,
    Completion,
    Finished,
    InForce,
    Knobs,
    QueueState,
    Rejected,
    StageTimes,
    Telemetry,
    decode_knobs,
    decode_telemetry,
    encode,
)

BOUNDS = Bounds(16, 2048, 16, 64, 65_536)
KNOBS = {
    "version": VERSION,
    "engine_id": "e",
    "sequence": 1,
    "iteration": 7,
    "budget_tokens": 256,
    "chunk_tokens": 128,
    "reason": "test",
}
BAD_KNOBS = {
    "nan": ("garbage", KNOBS | {"budget_tokens": math.nan}),
    "fraction": ("garbage", KNOBS | {"budget_tokens": 100.5}),
    "text": ("garbage", KNOBS | {"chunk_tokens": "128"}),
    "missing field": ("garbage", {k: v for k, v in KNOBS.items() if k != "chunk_tokens"}),
    "unknown field": ("garbage", KNOBS | {"temperature": 1}),
    "other version": ("version", KNOBS | {"version": VERSION + 1, "new_field": 1}),
    "other engine": ("engine", KNOBS | {"engine_id": "f"}),
    "budget too small": ("bounds", KNOBS | {"budget_tokens": 15}),
    "budget too large": ("bounds", KNOBS | {"budget_tokens": 2049}),
    "sequence without end": ("bounds", KNOBS | {"sequence": 2**64 - 1}),
    "negative iteration": ("bounds", KNOBS | {"iteration": -1}),
    "chunk negative": ("bounds", KNOBS | {"chunk_tokens": -1}),
}


def full_telemetry() -> Telemetry:
    return Telemetry(
        version=VERSION,
        engine_id="e",
        iteration=7,
        scheduled_ns=123,
        schedule="stall-free",
        dead_time_iterations=1,
        knobs=InForce(256, 128, 1, 6, "controller"),
        bounds=BOUNDS,
        batch=BatchComposition(2, 300, 1, 64, (64,), (32,), 64 * (32 + 32.0), 0),
        queue=QueueState(3, 1, 500, 0.25, (100, 500), (96, 0)),
        kv_usage=0.5,
        preemptions=2,
        rejected_knobs=3,
        completed=(
            Completion(
                iteration=6,
                scheduled_ns=100,
                completed_ns=120,
                device_s=1e-8,
                tbt_s=(0.01, 0.02),
                tbt_slots=(4, 0),
                ttft_s=(0.5,),
                ttft_slots=(3,),
                finished=(Finished(slot=0, arrival_ns=7, prompt_tokens=100, output_tokens=9),),
                stages=(StageTimes(0.01, 0.0, 1),),
            ),
        ),
    )


def test_the_head_is_the_first_prompt_to_compute_or_nothing() -> None:
    queue = full_telemetry().queue
    assert (queue.head_remaining_tokens, queue.head_context_tokens) == (100, 96)
    assert (QueueState().head_remaining_tokens, QueueState().head_context_tokens) == (0, 0)


def test_messages_come_back_as_they_went() -> None:
    telemetry = full_telemetry()
    assert decode_telemetry(encode(telemetry)) == telemetry
    knobs = Knobs(**KNOBS)  # type: ignore[arg-type]
    assert decode_knobs(encode(knobs), "e", BOUNDS) == knobs


@pytest.mark.parametrize("name", BAD_KNOBS)
def test_bad_knobs_are_rejected_by_kind(name: str) -> None:
    kind, message = BAD_KNOBS[name]
    with pytest.raises(Rejected) as caught:
        decode_knobs(msgspec.msgpack.encode(message), "e", BOUNDS)
    assert caught.value.kind == kind


BAD_UTF8 = b"\x82\xa7version" + bytes([VERSION]) + b"\xa1\xff\x01"
NESTED = b"\x91" * 200_000


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", BAD_UTF8, NESTED, b"\x00" * 100, b"not msgpack at all", bytes(range(256)) * 50]
)
def test_garbage_bytes_are_rejected(data: bytes) -> None:
    with pytest.raises(Rejected):
        decode_knobs(data, "e", BOUNDS)
    with pytest.raises(Rejected):
        decode_telemetry(data)


class Wire:
    """Both ends over real sockets, and a raw socket for what no honest controller sends."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.endpoints = endpoints
        self.engine = EngineLink(self.context, [endpoints], "e", BOUNDS)
        self.controller = ControllerLink(self.context, [endpoints])
        self.raw = self.context.socket(zmq.PUSH)
        self.raw.connect(endpoints.knobs)

    def handshake(self) -> None:
        """Publish until the controller hears: a subscription takes a moment to reach the publisher."""
        for _ in range(200):
            self.engine.publish(full_telemetry())
            if list(self.controller.receive(0.05)):
                return
        raise TimeoutError("the controller hears nothing")

    def poll(self) -> Knobs | None:
        self.engine._knobs.poll(5000)
        return self.engine.poll()

    def close(self) -> None:
        self.engine.close()
        self.controller.close()
        self.context.destroy(linger=0)


@pytest.fixture
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    wire = Wire(Endpoints.ipc(tmp_path_factory.mktemp("s"), "e"))
    yield wire
    wire.close()


def test_the_newest_knobs_win_and_old_ones_are_refused(wire: Wire) -> None:
    wire.handshake()
    first = Knobs(**KNOBS)  # type: ignore[arg-type]
    wire.raw.send(encode(first))
    wire.raw.send(encode(msgspec.structs.replace(first, sequence=3, budget_tokens=512)))
    wire.raw.send(encode(msgspec.structs.replace(first, sequence=2, budget_tokens=64)))
    newest = None
    while wire.engine.rejected == 0:
        newest = wire.poll() or newest
    assert newest is not None
    assert (newest.sequence, newest.budget_tokens) == (3, 512)
    assert wire.engine.rejections == {"order": 1}


def test_bad_messages_on_the_socket_change_nothing_but_counters(wire: Wire) -> None:
    wire.handshake()
    expected: dict[str, int] = {}
    for kind, message in BAD_KNOBS.values():
        wire.raw.send(msgspec.msgpack.encode(message))
        expected[kind] = expected.get(kind, 0) + 1
    for garbage in (b"\xff\xfe garbage", BAD_UTF8, NESTED):
        wire.raw.send(garbage)
        expected["garbage"] += 1
    while wire.engine.rejected < len(BAD_KNOBS) + 3:
        assert wire.poll() is None
    assert wire.engine.rejections == expected
    assert wire.engine.poll() is None


def test_a_flood_does_not_hold_up_the_engine(wire: Wire) -> None:
    wire.handshake()
    for _ in range(2000):
        wire.raw.send(b"flood")
    polls = 0
    while wire.engine.rejected < 2000:
        before = wire.engine.rejected
        wire.poll()
        polls += 1
        assert wire.engine.rejected - before <= 256
    assert polls >= 2000 // 256


def tcp_endpoints() -> Endpoints:
    """Two free loopback ports; nothing else listens on them between here and the bind."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(server.getsockname()[1])
    return Endpoints(*(f"tcp://127.0.0.1:{port}" for port in ports))


def make_keys(folder: Path) -> dict[str, Path]:
    for name in ("engine", "controller", "stranger"):
        zmq.auth.create_certificates(folder, name)
    return {p.name: p for p in folder.iterdir()}


def test_tcp_without_keys_is_refused() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(ValueError, match="CURVE"):
        EngineLink(context, [tcp_endpoints()], "e", BOUNDS)
    with pytest.raises(ValueError, match="CURVE"):
        ControllerLink(context, [tcp_endpoints()])
    context.destroy(linger=0)


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    with pytest.raises(ValueError, match="secret"):
        CurveKeys.load(keys["engine.key"], keys["controller.key"])
    with pytest.raises(ValueError, match="nowhere"):
        CurveKeys.load(tmp_path / "nowhere", keys["controller.key"])


def test_tcp_with_keys_serves_the_one_peer_and_no_other(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    endpoints = tcp_endpoints()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    own = CurveKeys.load(keys["engine.key_secret"], keys["controller.key"])
    engine = EngineLink(context, [endpoints], "e", BOUNDS, own)
    friend = ControllerLink(context, [endpoints], CurveKeys.load(keys["controller.key_secret"], keys["engine.key"]))
    stranger = ControllerLink(context, [endpoints], CurveKeys.load(keys["stranger.key_secret"], keys["engine.key"]))
    heard = []
    for _ in range(200):
        engine.publish(full_telemetry())
        heard += list(friend.receive(0.05))
        if heard:
            break
    assert heard[0] == full_telemetry()
    assert friend.send(Knobs(**KNOBS))  # type: ignore[arg-type]
    engine._knobs.poll(5000)
    assert engine.poll() is not None
    assert list(stranger.receive(0.2)) == []
    for end in (engine, friend, stranger):
        end.close()
    context.destroy(linger=0)


def test_a_name_in_use_is_refused_and_free_again_afterwards(tmp_path_factory: pytest.TempPathFactory) -> None:
    endpoints = Endpoints.ipc(tmp_path_factory.mktemp("s"), "e")
    with endpoints.claim(), pytest.raises(ValueError, match="another --name"):
        endpoints.claim()
    endpoints.claim().close()


def test_a_socket_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="chmod 700"):
        Endpoints.ipc(tmp_path / "open", "e")
    with pytest.raises(ValueError, match="too long"):
        Endpoints.ipc(tmp_path / ("x" * 90), "e")
