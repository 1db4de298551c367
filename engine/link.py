"""The sockets of the wire: telemetry PUB, knobs PUSH/PULL, and where they are.

The engine binds, the controller connects, and ZeroMQ reconnects by itself, so that either may start first, die and
come back. ipc in a directory of mode 0700 by default; tcp only with CURVE keys.
"""

import fcntl
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from engine.protocol import Bounds, Knobs, Rejected, Telemetry, decode_knobs, decode_telemetry, encode

logger = logging.getLogger(__name__)

MAX_IPC_PATH = 100  # the kernel's limit for a socket path is 107 bytes
MAX_KNOBS_A_STEP = 256  # a flood of messages must not hold up an iteration
ZAP_DOMAIN = "pacer"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """ZeroMQ addresses of one engine: two for its controller, two (local only) for its HTTP server."""

    telemetry: str
    knobs: str
    requests: str = ""
    outputs: str = ""

    @classmethod
    def ipc(cls, directory: Path, name: str) -> "Endpoints":
        """Sockets of the engine `name` in `directory`, which is made with mode 0700.

        Raises ValueError if the path is too long for a socket, or if others could get into the directory.
        """
        make_private(directory)
        base = f"{directory}/{name}"
        if len(base) > MAX_IPC_PATH - len(".telemetry"):
            raise ValueError(f"socket path {base!r} is too long for the kernel: choose a shorter --socket-dir")
        return cls(*(f"ipc://{base}.{socket}" for socket in ("telemetry", "knobs", "requests", "outputs")))

    def claim(self) -> IO[bytes]:
        """Take the name for as long as the returned file is open: binding would take over a living engine's sockets.

        Raises ValueError if another engine has it.
        """
        path = Path(self.telemetry.removeprefix("ipc://")).with_suffix(".lock")
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"an engine named {path.stem!r} runs in {path.parent}: choose another --name") from None
        return file


def make_private(directory: Path) -> None:
    """Make a directory of mode 0700. Raises ValueError if it exists and others could get into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{directory} is open to other users: chmod 700 it, or choose another with --socket-dir")


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """CURVE certificates: this side's own pair and the other side's public key, as `zmq.auth` writes them."""

    public: bytes
    secret: bytes
    peer_public: bytes

    @classmethod
    def load(cls, own_secret_file: Path, peer_public_file: Path) -> "CurveKeys":
        """Raises ValueError naming the file that holds no usable key."""
        try:
            public, secret = zmq.auth.load_certificate(own_secret_file)
            peer_public, _ = zmq.auth.load_certificate(peer_public_file)
        except OSError as error:
            raise ValueError(f"CURVE key: {error}") from error
        if secret is None:
            raise ValueError(f"{own_secret_file} holds no secret key: give the .key_secret file")
        return cls(public, secret, peer_public)


class Link(Protocol):
    """What an engine core needs of the wire; sockets for a live engine, memory for a simulated one."""

    rejected: int  # messages that changed nothing, since start

    def publish(self, telemetry: Telemetry) -> None: ...

    def poll(self) -> Knobs | None: ...

    def forget(self) -> None: ...


class EngineLink:
    """The engine's end: binds both sockets, never waits for anyone."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        places: list[Endpoints],
        engine_id: str,
        bounds: Bounds,
        keys: CurveKeys | None = None,
    ) -> None:
        """Bind at every one of `places`. Raises ValueError for tcp without keys."""
        self.rejected = 0
        self.rejections: Counter[str] = Counter()  # by kind
        self._engine_id = engine_id
        self._bounds = bounds
        self._sequence = 0
        self._published_iteration = 0
        self._doorkeeper = _admit_only(context, keys.peer_public) if keys else None
        self._telemetry = context.socket(zmq.PUB)
        self._knobs = context.socket(zmq.PULL)
        # CURVE holds for what is bound after it is set, so tcp comes last and ipc stays plain.
        for place in sorted(places, key=lambda place: place.telemetry.startswith("tcp://")):
            for socket, address in ((self._telemetry, place.telemetry), (self._knobs, place.knobs)):
                _secure(socket, address, keys, server=True)
                socket.linger = 0
                _open(socket.bind, address)

    def publish(self, telemetry: Telemetry) -> None:
        """Send and forget: a subscriber that cannot follow loses messages, the engine loses no time."""
        self._published_iteration = telemetry.iteration
        self._telemetry.send(encode(telemetry), zmq.NOBLOCK, copy=True)

    def poll(self) -> Knobs | None:
        """The newest valid knobs since the last call, or None. What is invalid is counted, logged and ignored."""
        newest = None
        for _ in range(MAX_KNOBS_A_STEP):
            try:
                newest = self._accept(self._knobs.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            except Rejected as error:
                self._reject(error)
            # What answers the newest telemetry is the newest answer: looking for more would cost as much again.
            if newest is not None and newest.iteration >= self._published_iteration:
                break
        return newest

    def forget(self) -> None:
        """Take any sequence number again: whoever counted so far is gone."""
        self._sequence = 0

    def _accept(self, data: bytes) -> Knobs:
        knobs = decode_knobs(data, self._engine_id, self._bounds)
        if knobs.sequence <= self._sequence:
            raise Rejected("order", f"knobs number {knobs.sequence} after number {self._sequence}")
        self._sequence = knobs.sequence
        return knobs

    def _reject(self, error: Rejected) -> None:
        self.rejected += 1
        self.rejections[error.kind] += 1
        # Powers of two only: a misbehaving peer must not fill the disk.
        count = self.rejections[error.kind]
        if count & (count - 1) == 0:
            logger.warning("rejected knobs (%s, %d so far): %s", error.kind, count, error)

    def close(self) -> None:
        self._telemetry.close()
        self._knobs.close()
        if self._doorkeeper is not None:
            self._doorkeeper.stop()


class ControllerLink:
    """The controller's end: connects to any number of engines, answers each on its own socket."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        engines: list[Endpoints],
        keys: CurveKeys | None = None,
    ) -> None:
        self.rejected = 0
        self._poller = zmq.Poller()
        self._knobs: dict[zmq.Socket[bytes], zmq.Socket[bytes]] = {}
        self._route: dict[str, zmq.Socket[bytes]] = {}
        for endpoints in engines:
            telemetry, knobs = context.socket(zmq.SUB), context.socket(zmq.PUSH)
            telemetry.subscribe(b"")
            # Nothing is queued for an engine that is away: it would answer for iterations long gone.
            knobs.immediate = True
            for socket, address in ((telemetry, endpoints.telemetry), (knobs, endpoints.knobs)):
                _secure(socket, address, keys, server=False)
                socket.linger = 0
                socket.reconnect_ivl = 50
                socket.reconnect_ivl_max = 500
                _open(socket.connect, address)
            self._poller.register(telemetry, zmq.POLLIN)
            self._knobs[telemetry] = knobs

    def receive(self, timeout_s: float) -> Iterator[Telemetry]:
        """Telemetry that has arrived, oldest first; waits up to `timeout_s` for the first.

        One by one, and looking for the next only then: an answer must not wait for that.
        """
        for socket, _ in self._poller.poll(int(timeout_s * 1000)):
            more = True
            while more:
                try:
                    telemetry = decode_telemetry(socket.recv(zmq.NOBLOCK))
                except Rejected as error:
                    self.rejected += 1
                    if self.rejected & (self.rejected - 1) == 0:
                        logger.warning("rejected telemetry (%d so far): %s", self.rejected, error)
                else:
                    self._route[telemetry.engine_id] = self._knobs[socket]
                    yield telemetry
                more = bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def send(self, knobs: Knobs) -> bool:
        """Send without waiting; False if the engine is away or does not read."""
        try:
            self._route[knobs.engine_id].send(encode(knobs), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        for telemetry, knobs in self._knobs.items():
            telemetry.close()
            knobs.close()


def _open(bind_or_connect: Callable[[str], object], address: str) -> None:
    try:
        bind_or_connect(address)
    except zmq.ZMQError as error:
        raise ValueError(f"cannot use the address {address!r}: {error}") from error


def _admit_only(context: "zmq.Context[zmq.Socket[bytes]]", public_key: bytes) -> ThreadAuthenticator:
    """Without an authenticator CURVE encrypts, but lets in anyone who knows the engine's public key."""

    class OnePeer:
        def callback(self, domain: str, key: bytes) -> bool:
            return key == public_key

    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(ZAP_DOMAIN, OnePeer())
    return authenticator


def _secure(socket: "zmq.Socket[bytes]", address: str, keys: CurveKeys | None, *, server: bool) -> None:
    if not address.startswith("tcp://"):
        return
    if keys is None:
        raise ValueError(f"{address} is open to the network: give CURVE keys (--curve-key, --curve-peer), or use ipc")
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    if server:
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN.encode()
    else:
        socket.curve_serverkey = keys.peer_public


class MemoryLink:
    """A link without sockets: what is published lands in `published`, what is put in `inbox` is polled once."""

    def __init__(self) -> None:
        self.rejected = 0
        self.published: list[Telemetry] = []
        self.inbox: Knobs | None = None

    def publish(self, telemetry: Telemetry) -> None:
        self.published.append(telemetry)

    def poll(self) -> Knobs | None:
        newest, self.inbox = self.inbox, None
        return newest

    def forget(self) -> None:
        pass
