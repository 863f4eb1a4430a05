"""A CurveZMQ client (RFC 26) on a plain socket, for what libzmq's own never sends: messages without an end, and halves.

It speaks ZMTP 3.1 (RFC 37) as a DEALER. libsodium, which libzmq itself is built on, does the arithmetic.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import zmq
import zmq.utils.z85

from engine.client.config import CurveIdentity
from engine.protocol.manifest import Member

_LIBRARIES = sorted((Path(zmq.__file__).parents[1] / "pyzmq.libs").glob("libsodium*.so*"))
_sodium = ctypes.CDLL(str(_LIBRARIES[0]) if _LIBRARIES else "libsodium.so.23")


def _shared(public: bytes, secret: bytes) -> bytes:
    key = ctypes.create_string_buffer(32)
    if _sodium.crypto_box_beforenm(key, public, secret) != 0:
        raise ValueError("bad key")
    return key.raw


def _box(data: bytes, nonce: bytes, shared: bytes) -> bytes:
    out = ctypes.create_string_buffer(len(data) + 16)
    _sodium.crypto_box_easy_afternm(out, data, ctypes.c_ulonglong(len(data)), nonce, shared)
    return out.raw


def _unbox(data: bytes, nonce: bytes, shared: bytes) -> bytes:
    out = ctypes.create_string_buffer(len(data) - 16)
    if _sodium.crypto_box_open_easy_afternm(out, data, ctypes.c_ulonglong(len(data)), nonce, shared) != 0:
        raise ValueError("a box that does not open")
    return out.raw


def _frame(flags: int, body: bytes) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body


class CurveClient:
    """A connection that is authenticated once made; ``send`` encrypts a frame, with or without more to come."""

    def __init__(self, identity: CurveIdentity, peer: Member, timeout_s: float = 10.0) -> None:
        host, port = peer.endpoint.removeprefix("tcp://").rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout_s)
        self._count = 0
        secret, public = zmq.utils.z85.decode(identity.secret), zmq.utils.z85.decode(identity.public)
        server = zmq.utils.z85.decode(peer.curve_z85.encode())
        public_z85, secret_z85 = zmq.curve_keypair()
        own_public, own_secret = zmq.utils.z85.decode(public_z85), zmq.utils.z85.decode(secret_z85)

        self.socket.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32))
        self._exactly(64)
        nonce = self._nonce()
        signature = _box(bytes(64), b"CurveZMQHELLO---" + nonce, _shared(server, own_secret))
        self._command(b"\x05HELLO\x01\x00" + bytes(72) + own_public + nonce + signature)
        welcome = self._read_frame()
        opened = _unbox(welcome[24:], b"WELCOME-" + welcome[8:24], _shared(server, own_secret))
        server_public, cookie = opened[:32], opened[32:]
        vouch_nonce = os.urandom(16)
        vouch = _box(own_public + server, b"VOUCH---" + vouch_nonce, _shared(server_public, secret))
        metadata = b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER" + b"\x08Identity" + bytes(4)
        self._key = _shared(server_public, own_secret)
        nonce = self._nonce()
        sealed = _box(public + vouch_nonce + vouch + metadata, b"CurveZMQINITIATE" + nonce, self._key)
        self._command(b"\x08INITIATE" + cookie + nonce + sealed)
        if not self._read_frame().startswith(b"\x05READY"):
            raise ConnectionError("refused")

    def send(self, data: bytes, more: bool = False) -> None:
        """Send one frame of a message; ``OSError`` once the peer has cut the connection."""
        nonce = self._nonce()
        sealed = _box(bytes([more]) + data, b"CurveZMQMESSAGEC" + nonce, self._key)
        self.socket.sendall(_frame(0, b"\x07MESSAGE" + nonce + sealed))

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(8, "big")

    def _command(self, body: bytes) -> None:
        self.socket.sendall(_frame(4, body))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the peer closed the connection")
            data += part
        return data

    def _read_frame(self) -> bytes:
        flags = self._exactly(1)[0]
        size = int.from_bytes(self._exactly(8 if flags & 2 else 1), "big")
        return self._exactly(size)
