"""The serving end of connections by itself: real sockets, hostile and honest peers, and what it tells its owner."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
import zmq.utils.z85

from engine.client._router import Connection, Router
from engine.client._zmtp import Peer

LIMIT = 65_600
PING = b"\x04PING\x00\x00"
PONG = b"\x04PONG"
TURN = 8


def pair() -> tuple[bytes, bytes]:
    public, secret = zmq.curve_keypair()
    return zmq.utils.z85.decode(public), zmq.utils.z85.decode(secret)


SERVER, CLIENT, OTHER = pair(), pair(), pair()


class Client:
    """A member's end, which sends and reads when it is told to."""

    def __init__(
        self, port: int, own: tuple[bytes, bytes] = CLIENT, server: bytes = SERVER[0], buffer: int = 0
    ) -> None:
        self.peer = Peer(own_public=own[0], own_secret=own[1], server_public=server)
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.over = False
        self.frames: list[tuple[int, bytes]] = []

    def put(self, data: bytes | None = None) -> None:
        """Send these bytes, or what its end of the protocol has to say."""
        self.socket.setblocking(True)
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(self.peer.take() if data is None else data)
        self.socket.setblocking(False)

    def say(self, *contents: bytes, flags: int = 0) -> None:
        """Send messages, all at once."""
        self.put(self.made(*contents, flags=flags))

    def made(self, *contents: bytes, flags: int = 0) -> bytes:
        """The bytes of messages."""
        for each in contents:
            self.peer.send(each, flags)
        return self.peer.take()

    def hear(self) -> None:
        """Take in what is there."""
        try:
            came = self.socket.recv(1 << 20)
        except BlockingIOError:
            return
        except ConnectionError:
            came = b""
        self.over = not came
        self.frames += self.peer.feed(came)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close so that the other end is told by an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Site:
    """A router with one place, and its clients."""

    def __init__(self, admit: Callable[[str], bool] | None = None, **more: Any) -> None:
        self.members = {zmq.utils.z85.encode(each[0]).decode() for each in (CLIENT, OTHER)}
        self.gone: list[Connection] = []
        options = {"limit": LIMIT, "replies_max": 64} | more
        self.router = Router(admit or (lambda user: user in self.members), **options)
        self.router.gone = self.gone.append
        self.port = self.place()
        self.clients: list[Client] = []

    def place(self, keys: tuple[bytes, bytes] = SERVER) -> int:
        """Listen at one place more."""
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        port: int = listening.getsockname()[1]
        self.router.listen(listening.detach(), port, *keys)
        return port

    def stranger(self, port: int = 0, **more: Any) -> Client:
        """A client that has not said anything; its connection is accepted."""
        made = Client(port or self.port, **more)
        self.clients.append(made)
        self.until(lambda: self.found(made))
        return made

    def client(self, port: int = 0, **more: Any) -> Client:
        """A client whose handshake is over."""
        made = self.stranger(port, **more)
        self.until(lambda: made.peer.open, made)
        return made

    def found(self, client: Client) -> Connection | None:
        """The router's end of a client."""
        here = client.socket.getsockname()
        for each in self.router.connections:
            with socket.socket(fileno=os.dup(each.fd)) as same, contextlib.suppress(OSError):
                if same.getpeername() == here:
                    return each
        return None

    def connection(self, client: Client) -> Connection:
        found = self.found(client)
        assert found is not None
        return found

    def arrived(self, client: Client) -> None:
        """Wait until the kernel has what the client sent."""
        select.select([self.connection(client).fd], [], [], 20)

    def until(self, condition: Callable[[], Any], *clients: Client) -> list[tuple[Connection, bytes, int]]:
        """Go on until that holds, and give what was received meanwhile."""
        end, found = time.monotonic() + 20, []
        while not condition():
            assert time.monotonic() < end
            for each in clients:
                each.put()
            self.router.poll(1)
            while message := self.router.receive():
                found.append(message)
            for each in clients:
                each.hear()
        return found

    def take(self, count: int) -> list[bytes]:
        """The next messages."""
        return [data for _, data, _ in self.messages(count)]

    def messages(self, count: int) -> list[tuple[Connection, bytes, int]]:
        end, found = time.monotonic() + 20, []
        while len(found) < count:
            assert time.monotonic() < end
            message = self.router.receive()
            if message is not None:
                found.append(message)
            else:
                self.router.poll(1)
        return found

    def nothing(self) -> None:
        """There is nothing to be received, as far as it came."""
        for _ in range(5):
            assert self.router.receive() is None


@pytest.fixture
def site() -> Iterator[Site]:
    yield from sites()


def sites(**more: Any) -> Iterator[Site]:
    made = Site(**more)
    try:
        yield made
    finally:
        for each in made.clients:
            each.close()
        made.router.close()


@contextlib.contextmanager
def a_site(**more: Any) -> Iterator[Site]:
    yield from sites(**more)


# --- bytes become messages ---


def test_a_handshake_may_come_byte_by_byte(site: Site) -> None:
    client = site.stranger()
    while not client.peer.open:
        for byte in client.peer.take():
            client.put(bytes([byte]))
            assert site.router.receive() is None
        site.router.poll(1)
        assert site.router.receive() is None
        client.hear()
    client.say(b"hello")
    ((connection, data, parts),) = site.messages(1)
    assert (data, parts, connection.user) == (b"hello", 1, zmq.utils.z85.encode(CLIENT[0]).decode())
    assert connection.proved
    assert connection.place == site.port


def test_messages_may_be_split_at_every_byte(site: Site) -> None:
    client = site.client()
    contents = [b"", b"a" * 300, b"b"]
    length = sum(len(each) + (35 if len(each) < 223 else 42) for each in contents)
    for at in range(length + 1):
        data = client.made(*contents)
        assert len(data) == length
        client.put(data[:at])
        received = [message[1] for message in iter(site.router.receive, None)]
        client.put(data[at:])
        assert received + site.take(3 - len(received)) == contents
    site.nothing()
    assert site.connection(client).held == 0


def test_a_message_in_many_parts_and_one_of_the_greatest_length(site: Site) -> None:
    client = site.client()
    for content in (os.urandom(LIMIT - 33), os.urandom(40_000)):
        data = client.made(content, b"and another")
        for at in range(0, len(data), 1_777):
            client.put(data[at : at + 1_777])
            if at % 3 == 0 and at < len(data) - 4_000:
                assert site.router.receive() is None
        assert site.take(2) == [content, b"and another"]
    site.nothing()
    assert site.connection(client).held == 0


@pytest.mark.parametrize("count", [1, TURN - 1, TURN, TURN + 1, 2 * TURN, 2 * TURN + 1, 1_000])
def test_messages_in_one_segment_arrive_in_order(site: Site, count: int) -> None:
    client = site.client()
    contents = [b"%d" % number for number in range(count)]
    client.say(*contents)
    assert site.take(count) == contents
    site.nothing()
    assert not site.router.pending
    assert site.connection(client).held == 0


def test_frames_of_one_message_count_and_have_no_content(site: Site) -> None:
    client = site.client()
    client.put(client.made(b"first", b"second", flags=1) + client.made(b"third") + client.made(b"alone"))
    assert [(data, parts) for _, data, parts in site.messages(2)] == [(b"", 3), (b"alone", 1)]
    client.put(client.made(*[b"x"] * 70, flags=1))
    assert site.until(lambda: not len(site.router)) == []


def test_a_longer_frame_than_the_limit_ends_the_connection_by_its_head(site: Site) -> None:
    client = site.client()
    client.put(client.made(bytes(LIMIT - 32))[:9])
    assert site.until(lambda: not len(site.router)) == []


@pytest.mark.parametrize(
    "garbage", [b"\x00", b"\xff" * 9 + b"\x00", b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)]
)
def test_what_is_no_greeting_ends_the_connection(site: Site, garbage: bytes) -> None:
    client = site.stranger()
    client.put(garbage)
    site.until(lambda: not len(site.router))


def test_a_stranger_claims_no_memory(site: Site) -> None:
    """A command of a handshake is short, whatever its head says."""
    client = site.stranger()
    client.put(client.peer.take() + b"\x06" + (60_000).to_bytes(8, "big"))
    site.until(lambda: not len(site.router))
    client = site.stranger()
    client.put(client.peer.take() + b"\x06" + (2_000).to_bytes(8, "big") + bytes(1_000))
    site.arrived(client)
    site.nothing()
    assert site.connection(client).held < 4_096


@pytest.mark.parametrize("garbage", [b"\xff" * 50, b"\x05\x01x", b"\x00\x02ab", b"\x04\x05\x04PING"])
def test_a_member_that_breaks_a_rule_is_cut_and_what_came_before_is_taken(site: Site, garbage: bytes) -> None:
    client = site.client()
    client.put(client.made(b"before") + garbage + client.made(b"after"))
    assert site.take(1) == [b"before"]
    assert site.until(lambda: not len(site.router)) == []


def test_a_message_that_is_played_again_ends_the_connection(site: Site) -> None:
    client = site.client()
    data = client.made(b"once")
    client.put(data + data)
    assert [each[1] for each in site.until(lambda: not len(site.router))] == [b"once"]


# --- who has a turn ---


def test_a_modest_client_has_its_turn_beside_one_that_floods(site: Site) -> None:
    busy, modest = site.client(), site.client(own=OTHER)
    busy.say(*[b"busy"] * 1_000)
    assert site.take(1) == [b"busy"]  # so all of them are here
    modest.say(b"modest")
    site.arrived(modest)
    received = site.take(1_000)
    assert received.index(b"modest") <= 2 * TURN
    assert received.count(b"busy") == 999


def test_what_is_watched_is_told_beside_a_flood(site: Site) -> None:
    busy = site.client()
    reader, writer = os.pipe()
    site.router.watch(reader, 4)
    try:
        busy.say(*[b"busy"] * 1_000)
        assert site.take(1) == [b"busy"]
        assert site.router.poll(0) == 1
        os.write(writer, b"x")
        assert site.router.poll(0) == 1 | 4
        assert len(site.take(999)) == 999
        site.nothing()
        assert site.router.poll(0) == 4
    finally:
        site.router.unwatch(reader)
        os.close(reader)
        os.close(writer)


def test_connections_are_accepted_beside_a_flood(site: Site) -> None:
    busy = site.client()
    busy.say(*[b"busy"] * 1_000)
    assert site.take(1) == [b"busy"]
    new = Client(site.port)
    site.clients.append(new)
    select.select([site.router.fileno()], [], [], 20)
    before = 0
    while len(site.router) < 2:
        before += len(site.take(1))
    assert before <= 2 * TURN


def test_commands_take_turns_as_messages_do(site: Site) -> None:
    busy, modest = site.client(), site.client(own=OTHER)
    busy.put(busy.made(*[PING] * 200, flags=2) + busy.made(b"busy"))
    modest.say(b"modest")
    site.arrived(busy)
    site.arrived(modest)
    assert site.take(2) == [b"modest", b"busy"]


def test_many_busy_connections_all_have_their_messages_taken_in_order(site: Site) -> None:
    clients = [site.client(own=(CLIENT, OTHER)[number % 2]) for number in range(20)]
    for number in range(50):
        for client in clients:
            client.say(b"%d" % number)
    found: dict[int, list[bytes]] = {}
    for connection, data, _ in site.messages(20 * 50):
        found.setdefault(connection.fd, []).append(data)
    assert list(found.values()) == [[b"%d" % number for number in range(50)]] * 20


# --- replies ---


def test_replies_wait_for_a_reader_in_order_and_are_flushed() -> None:
    with a_site(replies_max=500) as site:
        client = site.client(buffer=4_096)
        client.say(b"ask")
        ((connection, _, _),) = site.messages(1)
        contents = [os.urandom(30_000) for _ in range(300)]
        assert all(site.router.send(connection, each) for each in contents)
        assert connection.held > 1_000_000
        site.until(lambda: len(client.frames) == 300, client)
        assert client.frames == [(0, each) for each in contents]
        assert connection.held == 0
        assert site.router.send(connection, b"last")
        site.until(lambda: len(client.frames) == 301, client)


def test_replies_beyond_the_bound_are_lost_and_no_others() -> None:
    with a_site(replies_max=3) as site:
        client = site.client(buffer=4_096)
        connection = site.connection(client)
        contents = [b"%d/" % number + bytes(60_000) for number in range(200)]
        sent = [each for each in contents if site.router.send(connection, each)]
        assert 3 < len(sent) < 200
        assert connection.held <= 3 * 60_100
        assert not site.router.send(connection, b"one more")
        site.until(lambda: len(client.frames) == len(sent), client)
        assert client.frames == [(0, each) for each in sent]
        assert site.router.send(connection, b"again")
        site.until(lambda: client.frames[-1] == (0, b"again"), client)


def test_who_does_not_read_keeps_nobody_elses_replies() -> None:
    with a_site(replies_max=2) as site:
        deaf, reader = site.client(buffer=4_096), site.client(own=OTHER)
        while site.router.send(site.connection(deaf), bytes(60_000)):
            pass
        for number in range(20):
            reader.say(b"%d" % number)
            ((connection, data, _),) = site.messages(1)
            assert site.router.send(connection, data)
        site.until(lambda: len(reader.frames) == 20, reader)


def test_a_ping_is_answered_with_its_context(site: Site) -> None:
    client = site.client()
    for context in (b"", b"x", bytes(16)):
        client.say(PING + context, flags=2)
        site.until(lambda: client.frames, client)
        assert client.frames.pop() == (2, PONG + context)
    for nothing in (PING + bytes(17), b"\x04PING\x00", b"\x04PONG", b"", b"\x09SUBSCRIBE", b"\x04ping\x00\x00"):
        client.say(nothing, flags=2)
    client.say(PING + b"last", flags=2)
    assert site.until(lambda: client.frames, client) == []
    assert client.frames == [(2, PONG + b"last")]


def test_pings_of_who_does_not_read_are_not_answered_beyond_the_bound() -> None:
    with a_site(replies_max=2) as site:
        client = site.client(buffer=4_096)
        connection = site.connection(client)
        while site.router.send(connection, bytes(60_000)):
            pass
        held = connection.held
        client.say(*[PING + bytes(16)] * 2_000, flags=2)
        client.say(b"behind")
        assert site.take(1) == [b"behind"]
        site.nothing()
        assert connection.held == held


# --- who gets in ---


def test_a_refused_key_is_told_so_and_its_connection_is_closed(site: Site) -> None:
    client = site.stranger(own=pair())
    site.until(lambda: client.over, client)
    assert client.peer.refused
    assert len(site.router) == 0
    assert [each.user for each in site.gone] == [""]


def test_libzmq_is_told_that_its_key_is_refused(site: Site) -> None:
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.curve_publickey, dealer.curve_secretkey = map(zmq.utils.z85.encode, pair())
    dealer.curve_serverkey = zmq.utils.z85.encode(SERVER[0])
    events = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    dealer.connect(f"tcp://127.0.0.1:{site.port}")
    site.until(lambda: events.poll(0))
    dealer.disable_monitor()
    context.destroy(0)


def test_handshakes_have_a_part_of_each_round_and_members_their_turn(site: Site) -> None:
    """A handshake costs more than a request: many of strangers must not keep members waiting."""
    member = site.client()
    strangers = [site.stranger() for _ in range(100)]
    site.until(lambda: len(site.router) == 101)
    for each in strangers:
        each.put()
        site.arrived(each)
    waiting = [site.connection(each).fd for each in strangers]
    unread = len(waiting)
    for number in range(3):
        member.say(b"%d" % number)
        site.arrived(member)
        site.router.poll(0)
        assert [data for _, data, _ in iter(site.router.receive, None)] == [b"%d" % number]
        before, unread = unread, len(select.select(waiting, [], [], 0)[0])
        assert 0 < before - unread <= 3 * 16  # receive looks again when it has nothing
    site.until(lambda: all(each.peer.open for each in strangers), *strangers)


def test_a_handshake_that_is_not_over_in_time_ends(site: Site) -> None:
    done, silent, half = site.client(), site.stranger(), site.stranger(own=OTHER)
    half.put()
    site.arrived(half)
    site.nothing()
    begun = max(each.since_s for each in site.router.connections)
    assert site.router.expire(min(each.since_s for each in site.router.connections)) == 0
    assert site.router.expire(begun + 1) == 2
    assert site.router.expire(begun + 1) == 0
    assert site.router.connections == [site.connection(done)]
    site.until(lambda: silent.over and half.over, silent, half)
    done.say(b"goes on")
    assert site.take(1) == [b"goes on"]


def test_at_most_none_is_accepted_until_told(site: Site) -> None:
    site.router.most = 2
    inside = [site.client(), site.client()]
    waiting = Client(site.port)
    site.clients.append(waiting)
    site.until(lambda: not site.router.accepting)
    assert len(site.router) == 2
    for each in inside:
        each.say(b"served")
    assert site.take(2) == [b"served"] * 2
    site.router.accept(True)  # which is of no use as long as it is full
    site.until(lambda: not site.router.accepting)
    inside[0].close()
    site.until(lambda: len(site.router) == 1)
    site.router.accept(True)
    site.until(lambda: waiting.peer.open, waiting)


def test_connections_wait_in_the_kernels_queue_while_none_is_accepted(site: Site) -> None:
    site.router.accept(False)
    site.router.accept(False)
    port = site.place()
    waiting = [Client(each) for each in (site.port, port)]
    site.clients += waiting
    assert site.router.poll(0) == 0
    site.router.accept(True)
    site.until(lambda: all(each.peer.open for each in waiting), *waiting)


FULL = """
import os, resource, socket, sys
import zmq
from engine.client._router import Router
from zmq.utils import z85
router = Router(lambda user: True, limit=1000, replies_max=1)
listening = socket.create_server(("127.0.0.1", 0))
listening.setblocking(False)
port = listening.getsockname()[1]
router.listen(listening.detach(), port, *map(z85.decode, zmq.curve_keypair()))
clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
soft = len(os.listdir("/proc/self/fd")) - 1 + 2
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
while router.accepting:
    router.poll(1000)
    router.receive()
assert (len(router), router.failed) == (2, 1), (len(router), router.failed)
assert router.poll(0) == 0  # and nothing is tried all the time
for each in clients[:2]:
    each.close()
while len(router):
    router.poll(1000)
    router.receive()
router.accept(True)
while len(router) < 3:
    router.poll(1000)
    router.receive()
assert (router.accepting, router.failed) == (True, 1)
print("done")
"""


def test_without_a_descriptor_none_is_accepted_and_nothing_is_lost() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n", done.stderr


def test_each_place_has_its_pair(site: Site) -> None:
    second = pair()
    port = site.place(second)
    for place, server in ((site.port, SERVER[0]), (port, second[0])):
        client = site.client(port=place, server=server)
        client.say(b"here")
        assert [each[0].place for each in site.messages(1)] == [place]
    wrong = site.stranger(port=port)
    site.until(lambda: wrong.over, wrong)
    assert not wrong.peer.open


def test_a_place_that_is_left_keeps_its_connections_and_gets_no_more(site: Site) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    port, fd = listening.getsockname()[1], listening.detach()
    site.router.listen(fd, port, *SERVER)
    client, half = site.client(port=port), site.stranger(port=port)
    site.router.leave(fd)
    site.router.leave(fd)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    client.say(b"still here")
    assert site.take(1) == [b"still here"]
    site.until(lambda: half.peer.open, half)  # its handshake is by the pair of a place that is gone


@pytest.mark.parametrize(("public", "secret"), [(bytes(31), bytes(32)), (bytes(32), b"")])
def test_a_pair_of_another_length_is_refused(site: Site, public: bytes, secret: bytes) -> None:
    with pytest.raises(ValueError, match=f"keys of {len(public)} and {len(secret)} bytes"):
        site.router.listen(0, 1, public, secret)


# --- ends, also in the middle of something ---


def test_a_connection_that_is_ended_while_its_message_is_handled_brings_no_more(site: Site) -> None:
    client = site.client()
    client.say(*[b"%d" % number for number in range(100)])
    ((connection, data, _),) = site.messages(1)
    assert data == b"0"
    site.router.end(connection)
    site.router.end(connection)
    assert site.gone == [connection]
    assert not connection.open
    assert not connection.proved
    assert not site.router.send(connection, b"too late")
    site.nothing()
    assert not site.router.pending
    site.until(lambda: client.over, client)


def test_another_connection_may_be_ended_while_a_message_is_handled(site: Site) -> None:
    """Its event may have been told already."""
    one, other = site.client(), site.client(own=OTHER)
    for each in (one, other):
        each.say(*[b"x"] * 3 * TURN)
        site.arrived(each)
    ((connection, _, _),) = site.messages(1)
    (ended,) = (each for each in site.router.connections if each is not connection)
    site.router.end(ended)
    del ended
    site.gone.clear()
    gc.collect()
    received = site.messages(3 * TURN - 1)
    assert {id(each[0]) for each in received} == {id(connection)}
    site.nothing()


def test_a_connection_that_waits_for_its_turn_may_be_ended(site: Site) -> None:
    one, other = site.client(), site.client(own=OTHER)
    for each in (one, other):
        each.say(*[b"x"] * 5 * TURN)
        site.arrived(each)
    site.messages(2 * TURN + 1)
    connection = site.connection(one)
    site.router.end(connection)
    received = site.messages(5 * TURN - 10)
    while message := site.router.receive():
        received.append(message)
    assert all(each[0] is not connection for each in received)


@pytest.mark.parametrize("long", [False, True])
def test_the_router_may_be_closed_while_a_message_is_handled(site: Site, long: bool) -> None:
    """``long``: it came in parts, and so lies in its connection's memory."""
    client = site.client()
    if long:
        data = client.made(*[bytes(1_000)] * 20)
        client.put(data[:500])
        site.arrived(client)
        site.nothing()
        client.put(data[500:])
    else:
        client.say(*[bytes(1_000)] * 20)
    assert site.take(1) == [bytes(1_000)]
    site.router.close()
    site.gone.clear()
    gc.collect()
    site.nothing()
    assert (len(site.router), site.router.pending) == (0, False)


def test_each_end_is_told_once(site: Site) -> None:
    clients = [site.client() for _ in range(4)]
    connections = [site.connection(each) for each in clients]
    clients[0].close()
    clients[1].reset()
    clients[2].put(b"\xff\xff")
    site.until(lambda: len(site.gone) == 3)
    assert set(site.gone) == set(connections[:3])
    site.router.close()
    site.router.close()
    assert site.gone[3:] == connections[3:]
    assert not any(each.open for each in connections)


def test_a_router_may_be_closed_by_who_is_told_of_an_end(site: Site) -> None:
    """When garbage was found in a message, or in a handshake, or its sender went away."""
    for garbage in (b"\xff" * 20, b""):
        other = Site()
        other.router.gone = lambda _, router=other.router: router.close()  # type: ignore[misc]
        clients = [other.client() for _ in range(3)]
        for each in clients:
            each.say(b"x", b"y")
        for each in clients:
            each.put(garbage) if garbage else each.close()
        other.until(lambda other=other: not len(other.router))  # type: ignore[misc]
        other.nothing()
        gc.collect()
        for each in clients:
            each.close()


@pytest.mark.parametrize("welcome", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_who_judges_a_key_may_end_its_connection(welcome: bool, close: bool) -> None:
    def admit(user: str) -> bool:
        if close:
            site.router.close()
        else:
            for each in site.router.connections:
                site.router.end(each)
        return welcome

    with a_site(admit=admit) as site:
        client = site.stranger()
        assert site.until(lambda: client.over, client) == []
        assert not client.peer.open
        assert len(site.router) == 0


def test_an_error_in_judging_lets_nobody_in() -> None:
    calls = []

    def admit(user: str) -> bool:
        calls.append(user)
        raise LookupError("no manifest")

    with a_site(admit=admit) as site:
        client = site.stranger()
        end = time.monotonic() + 20
        while not calls:
            assert time.monotonic() < end
            with contextlib.suppress(LookupError):
                site.until(lambda: calls, client)
        site.nothing()
        client.hear()
        assert not client.peer.open
        assert [each.proved for each in site.router.connections] == [False]
        assert site.router.expire(time.monotonic() + 1) == 1


def test_what_breaks_while_a_command_is_answered_brings_no_message(site: Site) -> None:
    """Who was told of the end would count the connection's member for ever, if a message came after it."""
    client = site.client()
    client.put(client.made(b"before") + client.made(*[PING] * 6, flags=2) + client.made(b"after"))
    assert site.take(1) == [b"before"]
    connection = site.connection(client)
    client.reset()
    poller = select.poll()
    poller.register(connection.fd, 0)  # POLLHUP is told anyway
    assert poller.poll(20_000)
    assert site.until(lambda: not len(site.router)) == []
    assert site.gone == [connection]


def test_a_half_message_goes_with_its_connection(site: Site) -> None:
    client = site.client()
    client.put(client.made(bytes(50_000))[:30_000])
    connection = site.connection(client)
    site.arrived(client)
    site.nothing()
    assert connection.held >= 50_000
    client.close()
    assert site.until(lambda: not connection.open) == []
    assert site.gone == [connection]


def test_replies_that_wait_go_with_their_connection(site: Site) -> None:
    client = site.client(buffer=4_096)
    connection = site.connection(client)
    while site.router.send(connection, bytes(60_000)):
        pass
    client.reset()
    site.until(lambda: not connection.open)
    assert not site.router.send(connection, b"x")


def test_a_router_that_is_forgotten_closes_its_connections() -> None:
    site = Site()
    client = site.client()
    site.router.gone = None
    site.router = None  # type: ignore[assignment]
    gc.collect()
    client.socket.setblocking(True)
    client.socket.settimeout(20)
    assert client.socket.recv(1) == b""
    client.close()


# --- the rest ---


def test_watched_descriptors_are_told_by_their_bits(site: Site) -> None:
    pipes = [os.pipe() for _ in range(2)]
    try:
        for bit, (reader, _) in zip((4, 8), pipes, strict=True):
            site.router.watch(reader, bit)
        assert site.router.poll(0) == 0
        os.write(pipes[1][1], b"x")
        assert site.router.poll(1_000) == 8
        os.write(pipes[0][1], b"x")
        assert site.router.poll(1_000) == 12
        site.router.unwatch(pipes[1][0])
        site.router.unwatch(pipes[1][0])
        assert site.router.poll(1_000) == 4
        client = site.client()
        client.say(b"x")
        site.arrived(client)
        assert site.router.poll(1_000) == 5
        assert site.take(1) == [b"x"]
        site.nothing()
        site.router.unwatch(pipes[0][0])
        assert site.router.poll(0) == 0
    finally:
        for each in pipes:
            os.close(each[0])
            os.close(each[1])


def test_there_is_a_bound_on_what_is_watched(site: Site) -> None:
    pipes = [os.pipe() for _ in range(17)]
    try:
        for number, (reader, _) in enumerate(pipes[:16]):
            site.router.watch(reader, 1 << number)
        with pytest.raises(ValueError, match="more than 16 descriptors"):
            site.router.watch(pipes[16][0], 2)
    finally:
        for each in pipes:
            site.router.unwatch(each[0])
            os.close(each[0])
            os.close(each[1])


def test_what_is_pending_is_told_where_the_descriptor_says_nothing(site: Site) -> None:
    client = site.client()
    client.say(*[b"x"] * 3 * TURN)
    assert not site.router.pending
    assert site.take(1) == [b"x"]
    assert not select.select([site.router.fileno()], [], [], 0)[0]
    assert site.router.pending
    assert site.router.poll(60_000) == 1
    assert len(site.take(3 * TURN - 1)) == 3 * TURN - 1
    site.nothing()
    assert not site.router.pending


def test_what_is_sent_to_nobody_or_is_no_message_is_refused(site: Site) -> None:
    client = site.stranger()
    connection = site.connection(client)
    assert not site.router.send(connection, b"before its key is proved")
    with pytest.raises(TypeError):
        site.router.send(None, b"x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        site.router.send(connection, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Connection()


def test_libzmqs_clients_are_served(site: Site) -> None:
    context: zmq.Context[Any] = zmq.Context()
    dealers = []
    for own in (CLIENT, OTHER, CLIENT):
        dealer = context.socket(zmq.DEALER)
        dealer.curve_publickey, dealer.curve_secretkey = map(zmq.utils.z85.encode, own)
        dealer.curve_serverkey = zmq.utils.z85.encode(SERVER[0])
        dealer.heartbeat_ivl = 20
        dealer.connect(f"tcp://127.0.0.1:{site.port}")
        dealers.append(dealer)
    contents = [b"", b"small", bytes(300), os.urandom(60_000)] * 5
    for content in contents:
        for dealer in dealers:
            dealer.send(content)
    for connection, data, parts in site.messages(len(dealers) * len(contents)):
        assert parts == 1
        assert site.router.send(connection, data)
    for dealer in dealers:
        answers: list[bytes] = []
        while len(answers) < len(contents):
            site.router.poll(1)
            site.nothing()
            if dealer.poll(1):
                answers.append(dealer.recv())
        assert answers == contents
    dealers[0].send_multipart([b"two", b"frames"])
    assert [each[2] for each in site.messages(1)] == [2]
    context.destroy(0)
