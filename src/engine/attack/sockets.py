"""The attackers' sockets: bytes over TCP, CURVE connections with any keys and frames, and a relay that records.

They send what they are told and say what came back. Everything ends within a time that is given.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.client.config import CurveIdentity
from engine.client.transport import FRAME_MAX, HANDSHAKE_MS, watch
from engine.protocol.manifest import Member

__all__ = [
    "CURVE_GREETING",
    "CURVE_HELLO_BYTES",
    "Decoy",
    "Keys",
    "Line",
    "Recorder",
    "Script",
    "address_of",
    "converse",
    "greeting",
    "told",
]

CURVE_HELLO_BYTES: Final = 202
"""A CURVE HELLO command with its frame's two bytes (ZeroMQ RFC 26)."""
READ_MAX: Final = 256 * 1024
CONNECT_S: Final = 1.0
UNHEARD_MAX: Final = 10
"""Connections that may come to nothing before the rest of a conversation is given up."""
EVENTS: Final = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


def address_of(endpoint: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port``."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def greeting(mechanism: bytes, major: int = 3, minor: int = 1, as_server: int = 0) -> bytes:
    """A ZMTP greeting (ZeroMQ RFC 23 and 37): 64 bytes."""
    return (
        b"\xff"
        + bytes(8)
        + b"\x7f"
        + bytes([major, minor])
        + mechanism.ljust(20, b"\0")
        + bytes([as_server])
        + bytes(31)
    )


CURVE_GREETING: Final = greeting(b"CURVE")


# --- bytes over TCP ---


@dataclass(slots=True)
class Script:
    """What one TCP connection sends: pieces, each after a pause in seconds; and what came of it."""

    what: str
    endpoint: str
    pieces: Sequence[tuple[float, bytes]]
    received: bytes = b""
    closed: bool = False
    seconds: float = 0.0
    connected: bool = False
    at: str = ""


def told(received: bytes) -> list[str]:
    """What a server's bytes are: the ZMTP commands and messages after its greeting."""
    if len(received) < 12:
        return []
    found: list[str] = []
    rest = received[64:]
    while rest:
        flags = rest[0]
        long = flags & 2
        head = 9 if long else 2
        if len(rest) < head:
            break
        size = int.from_bytes(rest[1:head], "big")
        body, rest = rest[head : head + size], rest[head + size :]
        if flags & 4 and body:
            name = body[1 : 1 + body[0]]
            found.append(name.decode("ascii", "replace"))
        else:
            found.append("message")
    return found


def converse(scripts: Sequence[Script], limit_s: float, at_once: int = 256) -> None:
    """Play the scripts side by side, until each connection was closed by the other side or ``limit_s`` has passed."""
    waiting = list(scripts)
    playing: dict[socket.socket, _Player] = {}
    unheard = 0
    with selectors.DefaultSelector() as selector:
        while waiting or playing:
            while waiting and len(playing) < at_once:
                player = _Player(waiting.pop(0), time.monotonic() + limit_s)
                if not player.open():
                    unheard += 1
                    if unheard == UNHEARD_MAX:
                        waiting.clear()  # nobody accepts any more, and each try costs its time
                else:
                    playing[player.socket] = player
                    selector.register(player.socket, selectors.EVENT_READ)
            for key, _ in selector.select(0.02):
                playing[key.fileobj].read()  # type: ignore[index]
            now = time.monotonic()
            for each, player in list(playing.items()):
                player.write(now)
                if player.over(now):
                    selector.unregister(each)
                    del playing[each]
                    each.close()


class _Player:
    def __init__(self, script: Script, until: float) -> None:
        self.script = script
        self.until = until
        self.begun = time.monotonic()
        self.next_s = self.begun
        self.left = list(script.pieces)
        self.pending = b""
        self.socket = socket.socket(socket.AF_INET6 if ":" in address_of(script.endpoint)[0] else socket.AF_INET)

    def open(self) -> bool:
        try:
            self.socket.settimeout(CONNECT_S)
            self.socket.connect(address_of(self.script.endpoint))
        except OSError:
            self.socket.close()
            return False
        self.socket.setblocking(False)
        self.script.connected = True
        self.begun = time.monotonic()
        self.next_s = self.begun + (self.left[0][0] if self.left else 0.0)
        return True

    def write(self, now: float) -> None:
        while not self.script.closed and (self.pending or (self.left and now >= self.next_s)):
            if not self.pending:
                self.pending = self.left.pop(0)[1]
                self.next_s = now + (self.left[0][0] if self.left else 0.0)
            try:
                sent = self.socket.send(self.pending)
            except BlockingIOError:
                return
            except OSError:
                self._closed()
                return
            self.pending = self.pending[sent:]

    def read(self) -> None:
        try:
            data = self.socket.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(self.script.received) > READ_MAX:
            self._closed()
        self.script.received += data

    def _closed(self) -> None:
        if not self.script.closed:
            self.script.closed = True
            self.script.seconds = time.monotonic() - self.begun

    def over(self, now: float) -> bool:
        if self.script.closed:
            return True
        if now < self.until:
            return False
        self.script.seconds = now - self.begun
        return True


class Recorder:
    """A relay on loopback before one member: it passes one connection on and keeps what each side sent."""

    def __init__(self, endpoint: str) -> None:
        self.sent = b""
        self.answered = b""
        self._target = address_of(endpoint)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self._listener.settimeout(10.0)
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attack-recorder", daemon=True)
        self._thread.start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(12.0)
        self._listener.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._listener.accept()
            with near, socket.create_connection(self._target, 5.0) as far, selectors.DefaultSelector() as selector:
                selector.register(near, selectors.EVENT_READ)
                selector.register(far, selectors.EVENT_READ)
                while not self._stop.is_set():
                    for key, _ in selector.select(0.1):
                        data = key.fileobj.recv(65_536)  # type: ignore[union-attr]
                        if not data:
                            return
                        if key.fileobj is near:
                            self.sent += data
                            far.sendall(data)
                        else:
                            self.answered += data
                            near.sendall(data)


# --- ZeroMQ with any keys ---


@dataclass(frozen=True, slots=True)
class Keys:
    """What a CURVE client shows; empty for none."""

    public: bytes
    secret: bytes
    server: bytes

    @classmethod
    def of(cls, identity: CurveIdentity, member: Member) -> Keys:
        """The honest ones."""
        return cls(identity.public, identity.secret, member.curve_z85.encode())

    @classmethod
    def stranger(cls, member: Member) -> Keys:
        """Fresh keys that no manifest names."""
        public, secret = zmq.curve_keypair()
        return cls(public, secret, member.curve_z85.encode())


@dataclass(slots=True)
class Line:
    """One connection of one socket with any mechanism, and the events on it."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    events: list[int] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        context: zmq.Context[Any],
        endpoint: str,
        keys: Keys | None,
        *,
        kind: int = zmq.DEALER,
        prepare: Callable[[zmq.Socket[bytes]], None] = lambda socket: None,
    ) -> Line:
        """Begin to connect; with no keys there is no CURVE."""
        made: zmq.Socket[bytes] = context.socket(kind)
        made.linger = 0
        made.handshake_ivl = HANDSHAKE_MS * 2
        made.reconnect_ivl = 1_000
        if kind in (zmq.DEALER, zmq.REQ, zmq.PUSH):
            made.immediate = 1
        made.maxmsgsize = FRAME_MAX * 32
        if keys is not None:
            made.curve_publickey, made.curve_secretkey, made.curve_serverkey = keys.public, keys.secret, keys.server
        if kind == zmq.SUB:
            made.subscribe(b"")
        prepare(made)
        monitor = watch(context, made, EVENTS)
        made.connect(endpoint)
        return cls(made, monitor)

    def close(self) -> None:
        """Close both sockets."""
        with contextlib.suppress(zmq.ZMQError):
            self.socket.monitor(None, 0)
        self.monitor.close(0)
        self.socket.close(0)

    def look(self, wait_s: float = 0.0) -> None:
        """Take in what has happened to the connection."""
        while self.monitor.poll(int(wait_s * 1000)):
            self.events.append(int(parse_monitor_message(self.monitor.recv_multipart())["event"]))
            wait_s = 0.0

    @property
    def state(self) -> str:
        """How the handshake has ended: ``up``, ``refused``, ``failed``, ``cut`` or ``silent`` as yet."""
        for event in self.events:
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return "up"
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return "refused"
            if event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                return "failed"
        return "cut" if zmq.EVENT_DISCONNECTED in self.events else "silent"

    @property
    def cut(self) -> bool:
        """Whether an established connection was closed by the other side."""
        return zmq.EVENT_DISCONNECTED in self.events

    def settle(self, limit_s: float) -> str:
        """The state once it is one, or after ``limit_s`` seconds."""
        until = time.monotonic() + limit_s
        while self.state == "silent" and (left := until - time.monotonic()) > 0:
            self.look(min(left, 0.2))
        return self.state

    def send(self, *frames: bytes) -> bool:
        """Send a message; whether it could be handed over."""
        try:
            self.socket.send_multipart(list(frames), zmq.DONTWAIT)
        except zmq.ZMQError:
            return False
        return True

    def receive(self, limit_s: float) -> list[bytes] | None:
        """The next message; None when the time is over or the connection was cut."""
        until = time.monotonic() + limit_s
        while (left := until - time.monotonic()) > 0:
            if self.socket.poll(int(min(left, 0.1) * 1000)):
                return self.socket.recv_multipart()
            self.look()
            if self.cut:
                return None
        return None


class Decoy:
    """A ROUTER of our own on loopback that answers each message with its last frame: the control of attack tools."""

    def __init__(self, context: zmq.Context[Any], secret: bytes = b"") -> None:
        self.received = 0
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        if secret:
            self._socket.curve_server = True
            self._socket.curve_secretkey = secret
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attack-decoy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Decoy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._socket.close(0)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(20):
                frames = self._socket.recv_multipart()
                self.received += 1
                with contextlib.suppress(zmq.ZMQError):
                    self._socket.send_multipart([frames[0], frames[-1]], zmq.DONTWAIT)
