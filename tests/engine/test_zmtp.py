"""ZMTP with CURVE as it is spoken here: to itself, to libzmq in both roles, and to those who break its rules."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import zmq
import zmq.utils.z85
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port

from engine.client._zmtp import Peer


def pair() -> tuple[bytes, bytes]:
    public, secret = zmq.curve_keypair()
    return zmq.utils.z85.decode(public), zmq.utils.z85.decode(secret)


SERVER, CLIENT = pair(), pair()


def ends(server_public: bytes = SERVER[0]) -> tuple[Peer, Peer]:
    server = Peer(own_public=SERVER[0], own_secret=SERVER[1])
    return server, Peer(own_public=CLIENT[0], own_secret=CLIENT[1], server_public=server_public)


def shake(server: Peer, client: Peer, welcome: bool = True) -> None:
    """Carry bytes to and fro until nothing is said any more."""
    for _ in range(10):
        client.feed(server.take())
        server.feed(client.take())
        if server.judged:
            server.judge(welcome)


def test_two_ends_agree_and_messages_arrive_as_they_were() -> None:
    server, client = ends()
    shake(server, client)
    assert server.open
    assert client.open
    assert server.peer_public == CLIENT[0]
    for size in (0, 1, 221, 222, 223, 65_536):
        content = os.urandom(size)
        client.send(content)
        assert server.feed(client.take()) == [(0, content)]
        server.send(content, 2)
        server.send(b"", 1)
        assert client.feed(server.take()) == [(2, content), (1, b"")]


def test_bytes_may_come_one_by_one() -> None:
    server, client = ends()
    for _ in range(8):
        for end, other in ((client, server), (server, client)):
            for byte in other.take():
                end.feed(bytes([byte]))
            if end.judged:
                end.judge(True)
    client.send(b"hello")
    assert [frame for byte in client.take() for frame in server.feed(bytes([byte]))] == [(0, b"hello")]


def test_a_refused_key_is_told_so() -> None:
    server, client = ends()
    shake(server, client, welcome=False)
    assert server.ended
    assert client.ended
    assert client.refused


def test_another_servers_key_ends_the_connection() -> None:
    server, client = ends(server_public=pair()[0])
    shake(server, client)
    assert server.ended
    assert not client.open


def messages() -> tuple[Peer, Peer, list[bytes]]:
    server, client = ends()
    shake(server, client)
    frames = []
    for number in range(3):
        client.send(b"message %d" % number)
        frames.append(client.take())
    return server, client, frames


def test_a_message_is_taken_once_and_in_order() -> None:
    server, _, frames = messages()
    server.feed(frames[0])
    server.feed(frames[0])
    assert server.ended
    server, _, frames = messages()
    assert server.feed(frames[1]) == [(0, b"message 1")]
    assert server.feed(frames[0]) == []
    assert server.ended


def test_a_side_does_not_take_its_own_messages_for_the_others() -> None:
    server, _, _ = messages()
    server.send(b"x")
    assert server.feed(server.take()) == []
    assert server.ended


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_is_changed_on_the_way_nobody_is_let_in_by_it_or_told_it(data: st.DataObject) -> None:
    """One changed byte anywhere: the connection ends, waits for ever, or nothing of it was authenticated anyway."""
    server, client = ends()
    turn = data.draw(st.integers(0, 5))
    received: list[tuple[int, bytes]] = []
    for step in range(6):
        end, other = (client, server) if step % 2 == 0 else (server, client)
        came = bytearray(other.take())
        if step == turn and came:
            at = data.draw(st.integers(0, len(came) - 1))
            came[at] ^= data.draw(st.integers(1, 255))
        received += end.feed(bytes(came))
        if end.judged:
            assert end.peer_public == CLIENT[0]
            end.judge(True)
        if client.open and step == 4:
            client.send(b"secret")
    if received:
        assert received == [(0, b"secret")]


@given(st.binary(max_size=400), st.booleans())
@settings(max_examples=150, deadline=None)
def test_garbage_never_opens_anything(garbage: bytes, is_open: bool) -> None:
    server, client = ends()
    if is_open:
        shake(server, client)
    assert server.feed(garbage) == []
    assert client.feed(garbage) == []
    assert is_open or not (server.open or server.judged or client.open)


def test_a_frame_beyond_the_limit_ends_the_connection_before_it_came() -> None:
    server, client = ends()
    shake(server, client)
    client.send(bytes(65_600))
    assert server.feed(client.take()[:9]) == []
    assert server.ended


# --- libzmq ---


def exchange(peer: Peer, stream: socket.socket, done: Any) -> list[tuple[int, bytes]]:
    frames: list[tuple[int, bytes]] = []
    stream.settimeout(5)
    while not done(frames):
        out = peer.take()
        if out:
            stream.sendall(out)
        if peer.judged:
            peer.judge(True)
            continue
        if done(frames):
            break
        came = stream.recv(65_536)
        if not came:
            break
        frames += peer.feed(came)
    return frames


def test_libzmqs_client_talks_to_our_server() -> None:
    context: zmq.Context[Any] = zmq.Context()
    listening = socket.create_server(("127.0.0.1", 0))
    dealer = context.socket(zmq.DEALER)
    dealer.curve_publickey, dealer.curve_secretkey = map(zmq.utils.z85.encode, CLIENT)
    dealer.curve_serverkey = zmq.utils.z85.encode(SERVER[0])
    dealer.heartbeat_ivl = 50
    dealer.connect(f"tcp://127.0.0.1:{listening.getsockname()[1]}")
    dealer.send(b"small")
    dealer.send_multipart([b"two", b"frames"])
    dealer.send(bytes(60_000))
    server = Peer(own_public=SERVER[0], own_secret=SERVER[1])
    stream, _ = listening.accept()
    with stream, listening:
        frames = exchange(server, stream, lambda frames: sum(not flags & 2 for flags, _ in frames) == 4)
        assert server.peer_public == CLIENT[0]
        assert [each for each in frames if not each[0] & 2] == [
            (0, b"small"), (1, b"two"), (0, b"frames"), (0, bytes(60_000))
        ]  # fmt: skip
        for size in (0, 5, 60_000):
            server.send(bytes(size))
        stream.sendall(server.take())
        assert [len(dealer.recv()) for _ in range(3)] == [0, 5, 60_000]
        pings = exchange(server, stream, lambda frames: any(flags & 2 for flags, _ in frames))
        assert any(content.startswith(b"\x04PING") for flags, content in pings if flags & 2)
    context.destroy(0)


def test_libzmqs_client_is_told_that_its_key_is_refused() -> None:
    context: zmq.Context[Any] = zmq.Context()
    listening = socket.create_server(("127.0.0.1", 0))
    dealer = context.socket(zmq.DEALER)
    dealer.curve_publickey, dealer.curve_secretkey = map(zmq.utils.z85.encode, CLIENT)
    dealer.curve_serverkey = zmq.utils.z85.encode(SERVER[0])
    events = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    dealer.connect(f"tcp://127.0.0.1:{listening.getsockname()[1]}")
    server = Peer(own_public=SERVER[0], own_secret=SERVER[1])
    stream, _ = listening.accept()
    with stream, listening:
        stream.settimeout(5)
        while not server.judged:
            stream.sendall(server.take())
            server.feed(stream.recv(4096))
        server.judge(False)
        stream.sendall(server.take())
        assert events.poll(5_000)
    dealer.disable_monitor()
    context.destroy(0)


def test_our_client_talks_to_libzmqs_router() -> None:
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.curve_server = True
    router.curve_publickey, router.curve_secretkey = map(zmq.utils.z85.encode, SERVER)
    port = free_port()
    router.bind(f"tcp://127.0.0.1:{port}")
    client = Peer(own_public=CLIENT[0], own_secret=CLIENT[1], server_public=SERVER[0])
    with socket.create_connection(("127.0.0.1", port)) as stream:
        exchange(client, stream, lambda frames: client.open)
        client.send(b"ask")
        client.send(bytes(60_000))
        stream.sendall(client.take())
        route, first = router.recv_multipart()
        assert (first, router.recv_multipart()[1]) == (b"ask", bytes(60_000))
        router.send_multipart([route, b"answer"])
        router.send_multipart([route, bytes(60_000)])
        assert exchange(client, stream, lambda frames: len(frames) == 2) == [(0, b"answer"), (0, bytes(60_000))]
    context.destroy(0)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"a key of {size} bytes"):
        Peer(own_public=bytes(size), own_secret=bytes(32))
