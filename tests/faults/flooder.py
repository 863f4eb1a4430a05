"""A client that means no good, a process of its own: ``flooder.py KIND CLIENT.TOML RATE [ENDPOINT...]``.

Kinds: ``requests`` and ``ciphertexts`` by the client's key at a fixed rate a second; ``handshakes`` that lead nowhere,
at a fixed rate; ``idle`` opens as many connections as the rate says and keeps them. It writes what it reached and ends
by itself after a minute.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from typing import Any

import zmq

import engine
from engine.client.client import load_settings
from engine.client.transport import connect_options

LAST_S = 60.0
BATCH = 64
KEY = "elder/1"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE"


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def requests(config: str, rate: int, bad: bool) -> None:
    """Batches at a fixed rate; ciphertexts of a bad one are garbage of the right form."""
    rng = random.Random(rate)
    with engine.connect(config) as kq:
        good = kq.encrypt(KEY, b"flood")
        begun, sent, refused = time.monotonic(), 0, 0
        while (now := time.monotonic()) < begun + LAST_S:
            if sent > (now - begun) * rate:
                time.sleep(0.002)
                continue
            if bad:
                items = [good[:-16] + rng.randbytes(16) for _ in range(BATCH)]
                done = kq.decrypt_many(KEY, items, return_exceptions=True)
                refused += sum(isinstance(each, Exception) for each in done)
            else:
                done = kq.encrypt_many(KEY, [b"x" * 64] * BATCH, return_exceptions=True)
                refused += sum(isinstance(each, Exception) for each in done)
            sent += BATCH
            tell(f"{sent} {refused}")


def handshakes(endpoints: list[str], rate: int) -> None:
    """Connections that begin a handshake and go on with garbage, or with nothing."""
    rng = random.Random(rate)
    held: list[socket.socket] = []
    begun, sent = time.monotonic(), 0
    while (now := time.monotonic()) < begun + LAST_S:
        if sent > (now - begun) * rate:
            time.sleep(0.002)
            continue
        host, _, port = rng.choice(endpoints).removeprefix("tcp://").rpartition(":")
        made = socket.socket()
        made.setblocking(False)
        try:
            made.connect_ex((host, int(port)))
            made.setblocking(True)
            made.settimeout(0.5)
            made.send(GREETING[: rng.randint(1, len(GREETING))] if rng.random() < 0.5 else rng.randbytes(100))
        except OSError:
            made.close()
        else:
            held.append(made)
        if len(held) > 500:
            held.pop(0).close()
        sent += 1
        if sent % 100 == 0:
            tell(f"{sent} 0")


def idle(config: str, count: int, endpoints: list[str]) -> None:
    """So many connections by one client's key, which then say nothing."""
    settings = load_settings(config)
    by_endpoint = {member.endpoint: member for member in settings.cluster.members.values() if member.endpoint}
    context: zmq.Context[Any] = zmq.Context()
    sockets = []
    for endpoint in endpoints:
        # A ROUTER connects any number of times to one place; a DEALER would not.
        made: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        connect_options(made, settings.identity.transport, by_endpoint[endpoint])
        sockets.append(made)
    for number in range(count):
        sockets[number % len(sockets)].connect(endpoints[number % len(endpoints)])
        if number % 100 == 99:
            tell(f"{number + 1} 0")
            time.sleep(0.02)
    tell(f"{count} 0")
    time.sleep(LAST_S)


def main(arguments: list[str]) -> None:
    """Flood."""
    kind, config, rate, *endpoints = arguments
    if kind in ("requests", "ciphertexts"):
        requests(config, int(rate), kind == "ciphertexts")
    elif kind == "handshakes":
        handshakes(endpoints, int(rate))
    else:
        idle(config, int(rate), endpoints)


if __name__ == "__main__":
    main(sys.argv[1:])
