"""The request channel against a real listener over CURVE: refusals, breaks, garbage and bounds."""

from __future__ import annotations

import contextlib
import os
import socket as socket_module
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
import zmq.utils.z85
from msgspec.structs import replace
from ports import free_port

from engine.client._fastline import BROKEN, DONE, LATE, NOT_SENT, OTHER, Line, Shortcuts
from engine.client._histogram import Histograms
from engine.client._zmtp import Peer
from engine.client.admission import ServiceLimits, welcome
from engine.client.calls import Await, Calls, Exchange
from engine.client.client import drive
from engine.client.config import CurveIdentity, Identity, create_identity
from engine.client.listener import IDLE, Incoming, Listener, error_body
from engine.client.speech import spoken
from engine.client.transport import Arrival, Channel, ask, connect_options, open_line, raise_for_status, watch
from engine.errors import AccessDenied, DeadlineExceeded, KeyNotFound, NodeUnavailable, Overloaded, ProtocolError
from engine.keys import KeyKind
from engine.protocol.manifest import Cluster, Member, PolicyRule, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.requests import HELLO, REPLY_CODECS, REQUEST_CODECS, Flush, Flushed, Hello, Result, Welcome
from engine.protocol.wire import (
    MAX_MESSAGE,
    PROTOCOL_VERSION,
    ErrorBody,
    Load,
    Reply,
    Request,
    Status,
    Versions,
    error_codec,
    reply_codec,
    request_codec,
)

FLUSH = REQUEST_CODECS["flush"].encode(Flush(""))
Handler = Callable[[Listener, Incoming], None]


def answer(listener: Listener, incoming: Incoming) -> None:
    """A node that flushed as many keys as the client's name has letters."""
    listener.reply(incoming, Status.OK, REPLY_CODECS["flush"].encode(Flushed(len(incoming.member.name), 0)))


class Node:
    """A listener in a thread, with a handler for what comes."""

    def __init__(
        self, identity: Identity, cluster: Cluster, handler: Handler = answer, versions: Versions | None = None
    ) -> None:
        self.versions = versions or spoken()
        self.heard: list[int] = []
        self.member = cluster.members[identity.name]
        self.identity, self.cluster, self.handler = identity, cluster, handler
        self.served = 0
        self.greeted = 0
        self.refused = 0
        self.greet: Handler = self.welcome
        self.start()

    def welcome(self, listener: Listener, incoming: Incoming) -> None:
        try:
            hello = REQUEST_CODECS[HELLO].decode(incoming.request.body)
            told = welcome(hello, self.member.name, bytes(16), self.cluster, ServiceLimits(), self.versions)
        except ProtocolError as error:
            listener.fail(incoming, error)
            return
        listener.reply(incoming, Status.OK, REPLY_CODECS[HELLO].encode(told))

    def start(self) -> None:
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        listener = Listener(self.identity.transport, self.member.endpoint, self.cluster, versions=self.versions)
        self._ready.set()
        while not self._stop.is_set():
            listener.router.poll(10)
            while (incoming := listener.receive()) is not None:
                if incoming.request.verb == HELLO:
                    self.greeted += 1
                    self.greet(listener, incoming)
                    continue
                self.served += 1
                self.heard.append(incoming.request.version)
                self.handler(listener, incoming)
            self.refused = listener.refused
        listener.close()


def free_endpoint() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


class World:
    """One node, one client, and a stranger whom no manifest names."""

    def __init__(self, folder: Path) -> None:
        operator = create_identity(folder / "op.toml", "op", "operator", passphrase="p")
        self.node = create_identity(folder / "n1.toml", "n1", "node")
        self.client = create_identity(folder / "app.toml", "app", "client")
        self.stranger = create_identity(folder / "stranger.toml", "stranger", "client")
        member = self.node.member(endpoint=free_endpoint(), location="a/b")
        chain = issue_cluster_manifest(
            name="test",
            members=[operator.member(), member, self.client.member()],
            rules=[PolicyRule("app", "*", ["*"])],
            operators=[operator.signing],
        )
        self.cluster = open_chain(chain, chain_pin(chain))
        self.members = self.cluster.nodes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def node(world: World) -> Iterator[Node]:
    node = Node(world.node, world.cluster)
    yield node
    node.stop()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def channel(world: World, context: zmq.Context[Any]) -> Iterator[Channel]:
    with Channel(world.client.transport, world.members, context) as channel:
        yield channel


def test_a_request_is_answered_and_its_sender_known(node: Node, channel: Channel) -> None:
    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3


def test_hello_goes_first_on_a_connection_and_is_kept(node: Node, world: World, channel: Channel) -> None:
    assert channel.welcome("n1") is None
    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
    told = channel.welcome("n1")
    assert told is not None
    assert (told.name, told.cluster_serial, told.cluster_digest) == ("n1", 1, world.cluster.digest)
    assert told.limits == ServiceLimits().served()
    for _ in range(3):
        ask(channel, "n1", "flush", Flush(""), 5.0)
    assert (node.greeted, node.served) == (1, 4)
    node.stop()
    node.start()
    until = time.monotonic() + 10
    while node.greeted < 2:
        assert time.monotonic() < until
        with suppress(NodeUnavailable):  # the connection that is gone may not have been missed yet
            ask(channel, "n1", "flush", Flush(""), 5.0)
    assert node.greeted == 2


def test_a_version_that_does_not_fit_is_told_with_both(node: Node, world: World, channel: Channel) -> None:
    """The server is of another age: its range does not hold this side's version."""

    def far(listener: Listener, incoming: Incoming) -> None:
        body = REPLY_CODECS[HELLO].encode(
            Welcome(9, 8, 10, "9.1", "n1", bytes(16), 1, bytes(32), ServiceLimits().served())
        )
        reply = Reply(9, incoming.request.id, Status.OK, body, IDLE, {})
        listener.router.send(incoming.connection, reply_codec.encode(reply))

    node.greet = far
    node.handler = lambda listener, incoming: None
    told = r"n1 \(keyquorum 9.1\) speaks protocol version 8 to 9; this side \(.*\) speaks 1 to 2"
    for _ in range(2):
        with pytest.raises(ProtocolError, match=told):
            channel.call("n1", "flush", FLUSH, 60.0)
    assert node.served <= 1  # the second was not even sent


def test_a_member_is_spoken_to_in_the_version_it_has_now(node: Node, world: World, context: zmq.Context[Any]) -> None:
    """It is upgraded and rolled back: each connection learns anew, and what is sent before is taken by either."""
    flushed = 0
    with Channel(world.client.transport, world.members, context, versions=Versions(2, 3)) as channel:
        for highest in (2, 3, 2):
            node.stop()
            node.versions, node.heard = Versions(highest - 1, highest), []
            node.start()
            deadline = time.monotonic() + 20
            while len(node.heard) < 3:
                assert time.monotonic() < deadline
                with suppress(NodeUnavailable):  # the connection that is gone may not have been missed yet
                    reply = channel.call("n1", "flush", FLUSH, 5.0)
                    raise_for_status(reply)
                    assert reply.version == highest
                    flushed += 1
            assert set(node.heard[1:]) == {highest}
            assert node.heard[0] == 3  # before it was known
    assert flushed == 9


def test_who_is_held_to_a_version_speaks_it_with_all(node: Node, world: World, context: zmq.Context[Any]) -> None:
    with Channel(world.client.transport, world.members, context, versions=Versions(1, 1)) as channel:
        for _ in range(2):
            assert channel.call("n1", "flush", FLUSH, 5.0).version == 1
    assert node.heard == [1, 1]


def test_releases_that_are_too_far_apart_part(world: World, context: zmq.Context[Any]) -> None:
    """1 to 2 and 3 to 4 have nothing in common: both are told, and nothing is served."""
    node = Node(world.node, world.cluster, versions=Versions(3, 4))
    try:
        with (
            Channel(world.client.transport, world.members, context, versions=Versions(1, 2)) as channel,
            pytest.raises(ProtocolError, match="protocol version 2; this side speaks 3 to 4 and takes 3 to 5"),
        ):
            channel.call("n1", "flush", FLUSH, 5.0)
        assert node.heard == []
    finally:
        node.stop()


@pytest.mark.parametrize("highest", [1, 2])
def test_a_line_speaks_what_its_node_does(world: World, highest: int) -> None:
    node = Node(world.node, world.cluster, use, Versions(1, highest))
    try:
        line = open_line(world.client.transport, world.members["n1"])
        assert line is not None
        assert line.version == highest
        assert operate(line) == DONE
        assert node.heard == [highest]
        line.version = 3 - highest  # an answer in another version than was asked in is for the ordinary reader
        assert operate(line, 2) == (OTHER if highest == 1 else DONE)
        line.close()
    finally:
        node.stop()


def test_a_hello_of_a_far_version_is_refused_with_both(node: Node, world: World, context: zmq.Context[Any]) -> None:
    with raw_socket(context, world.client.transport, world.members["n1"]) as socket:
        socket.send(request_codec.encode(Request(9, 5, HELLO, 1000, REQUEST_CODECS[HELLO].encode(Hello(9, "9")), {})))
        assert socket.poll(10_000)
        reply = reply_codec.decode(socket.recv())
        assert reply.id == 5
        with pytest.raises(ProtocolError, match="protocol version 9; this side speaks 1 to 2 and takes 1 to 3"):
            raise_for_status(reply)


def test_a_server_that_is_too_busy_for_hello_still_serves(node: Node, channel: Channel) -> None:
    node.greet = lambda listener, incoming: listener.fail(incoming, Overloaded("no"))
    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
    assert channel.welcome("n1") is None


def test_many_requests_are_under_way_at_once(node: Node, channel: Channel) -> None:
    tokens = {channel.start("n1", "flush", FLUSH, 10.0) for _ in range(100)}
    ended: set[int] = set()
    while len(ended) < 100:
        ended |= {arrival.token for arrival in channel.poll(10.0) if arrival.reply is not None}
    assert ended == tokens


def test_an_unknown_key_is_denied_without_waiting_for_the_deadline(
    node: Node, world: World, context: zmq.Context[Any]
) -> None:
    with Channel(world.stranger.transport, world.members, context) as channel:
        for _ in range(2):
            with pytest.raises(AccessDenied, match="refuses the key of 'stranger'"):
                channel.call("n1", "flush", FLUSH, 60.0)
    assert node.served == 0


def test_another_server_under_the_nodes_address_gets_nothing(world: World, context: zmq.Context[Any]) -> None:
    public, secret = zmq.curve_keypair()
    with context.socket(zmq.ROUTER) as impostor:
        impostor.curve_server = True
        impostor.curve_publickey, impostor.curve_secretkey = public, secret
        impostor.bind(world.members["n1"].endpoint)
        with Channel(world.client.transport, world.members, context) as channel, pytest.raises(NodeUnavailable):
            channel.call("n1", "flush", FLUSH, 1.0)
        assert not impostor.poll(50)


def test_no_listener_at_all_is_unavailable(channel: Channel) -> None:
    for _ in range(2):
        with pytest.raises(NodeUnavailable, match="can't be reached"):
            channel.call("n1", "flush", FLUSH, 60.0)
    with pytest.raises(NodeUnavailable, match="no member"):
        channel.call("n9", "flush", FLUSH, 60.0)


def test_a_listener_that_goes_away_ends_the_request_at_once(world: World, channel: Channel) -> None:
    arrived = threading.Event()
    node = Node(world.node, world.cluster, lambda listener, incoming: arrived.set())
    channel.start("n1", "flush", FLUSH, 600.0)
    assert arrived.wait(10)
    node.stop()
    ended = channel.poll(60.0)
    assert [type(arrival.error) for arrival in ended] == [NodeUnavailable]


def test_a_peer_that_has_gone_keeps_no_request_waiting(
    world: World, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the first one after that nor a later one waits for libzmq's next try: there is none to wait for."""
    monkeypatch.setattr("engine.client.transport.CONNECT_TIMEOUT_S", 600.0)
    monkeypatch.setattr("engine.client.transport.REDIAL_TIMEOUT_S", 600.0)
    node = Node(world.node, world.cluster)
    assert ask(channel, "n1", "flush", Flush(""), 600.0).dropped == 3
    node.stop()
    failed: list[Exception] = []

    def knock() -> None:
        for _ in range(3):
            try:
                channel.call("n1", "flush", FLUSH, 600.0)
            except NodeUnavailable as error:
                failed.append(error)
            channel.poll(0.05)

    beside = threading.Thread(target=knock, daemon=True)
    beside.start()
    beside.join(60)
    assert len(failed) == 3, "a request waits for a peer that is not there"
    node.start()
    assert ask(channel, "n1", "flush", Flush(""), 60.0).dropped == 3
    node.stop()


def test_a_restart_while_idle_does_not_fail_the_next_request(world: World, channel: Channel) -> None:
    """The old disconnection is still unread then."""
    node = Node(world.node, world.cluster)
    try:
        assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
        until = time.monotonic() + 10
        node.stop()
        while channel._connections["n1"].socket.poll(0, zmq.POLLOUT):  # libzmq has not noticed it yet
            assert time.monotonic() < until
            time.sleep(0.01)
        node.start()
        while not channel._connections["n1"].socket.poll(10, zmq.POLLOUT):
            assert time.monotonic() < until
        assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
    finally:
        node.stop()


def test_replies_that_come_together_are_all_taken(world: World, context: zmq.Context[Any]) -> None:
    """A call that asks two nodes at once waits for each of them, also when both answer at the same instant."""
    kept: list[Incoming] = []
    ended: list[Any] = []

    def both(listener: Listener, incoming: Incoming) -> None:
        kept.append(incoming)
        if len(kept) == 2:
            for each in kept:
                answer(listener, each)

    class Slow(Channel):
        def poll(self, timeout_s: float) -> list[Arrival]:
            time.sleep(0.3)
            return super().poll(timeout_s)

    def call() -> Any:
        assert (yield Exchange("n1", "flush", FLUSH, 20.0, 0.01)) is None
        first = yield Exchange("n1", "flush", FLUSH, 20.0, 20.0)
        second = yield Await()
        return [first, second]

    node = Node(world.node, world.cluster, both)
    try:
        with Slow(world.client.transport, world.members, context) as channel:
            beside = threading.Thread(target=lambda: ended.extend(drive(channel, call())), daemon=True)
            beside.start()
            beside.join(60)
            assert len(ended) == 2, "the second reply was lost, and the call waits for it for ever"
    finally:
        node.stop()


@pytest.mark.parametrize("garbage", [b"x" * 64, b"\xff" + bytes(8) + b"\x7f\x03" + bytes(200)])
def test_a_garbled_handshake_parts_nobody_for_good(world: World, context: zmq.Context[Any], garbage: bytes) -> None:
    """libzmq gives up a connection whose handshake was garbled; the channel dials again, with another socket."""
    address = world.members["n1"].endpoint.removeprefix("tcp://").rsplit(":", 1)
    with Channel(world.client.transport, world.members, context) as channel:
        with socket_module.create_server((address[0], int(address[1]))) as liar:
            liar.settimeout(10)
            channel.dial(["n1"])
            accepted, _ = liar.accept()
            with accepted:
                accepted.sendall(garbage)
                assert channel._connections["n1"].monitor.poll(10_000)
        node = Node(world.node, world.cluster)
        until = time.monotonic() + 30
        try:
            while True:
                try:
                    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
                    break
                except NodeUnavailable:
                    assert time.monotonic() < until, "the connection was given up for good"
                    time.sleep(0.05)
        finally:
            node.stop()


def test_silence_ends_at_the_deadline_and_a_late_reply_is_dropped(world: World, channel: Channel) -> None:
    kept: list[Incoming] = []

    def late(listener: Listener, incoming: Incoming) -> None:
        if not kept:
            kept.append(incoming)
            return
        answer(listener, kept[0])
        answer(listener, incoming)

    node = Node(world.node, world.cluster, late)
    with pytest.raises(DeadlineExceeded, match="no reply to flush within 200 ms"):
        channel.call("n1", "flush", FLUSH, 0.2)
    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
    node.stop()


def test_errors_come_back_by_their_code(world: World, channel: Channel) -> None:
    errors: list[Exception] = [KeyNotFound("no such"), ValueError("odd"), RuntimeError("secret detail")]
    node = Node(world.node, world.cluster, lambda listener, incoming: listener.fail(incoming, errors.pop(0)))
    with pytest.raises(KeyNotFound, match="no such"):
        ask(channel, "n1", "flush", Flush(""), 5.0)
    with pytest.raises(ValueError, match="odd"):
        ask(channel, "n1", "flush", Flush(""), 5.0)
    with pytest.raises(Exception, match="internal error") as caught:
        ask(channel, "n1", "flush", Flush(""), 5.0)
    assert "secret" not in str(caught.value)
    node.stop()


def test_moved_names_the_nodes(world: World, channel: Channel) -> None:
    body = error_codec.encode(ErrorBody("moved", "elsewhere", ["n7", "n8"]))
    node = Node(world.node, world.cluster, lambda listener, incoming: listener.reply(incoming, Status.MOVED, body))
    with pytest.raises(Exception, match="moved to n7, n8") as caught:
        raise_for_status(channel.call("n1", "flush", FLUSH, 5.0))
    assert caught.value.names == ("n7", "n8")
    node.stop()


@pytest.mark.parametrize("garbage", [[b""], [b"\xc1"], [os.urandom(200)], [b"a", b"b"], [b"\x96\x01"]])
def test_a_garbled_reply_ends_the_request(world: World, channel: Channel, garbage: list[bytes]) -> None:
    def garble(listener: Listener, incoming: Incoming) -> None:
        for frame in garbage:
            listener.router.send(incoming.connection, frame, more=frame is not garbage[-1])

    node = Node(world.node, world.cluster, garble)
    with pytest.raises(ProtocolError, match="n1"):
        channel.call("n1", "flush", FLUSH, 60.0)
    node.stop()


def raw_socket(context: zmq.Context[Any], identity: CurveIdentity, peer: Member) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    connect_options(socket, identity, peer)
    socket.connect(peer.endpoint)
    return socket


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"x" * 1000], [b"a", b"b", b"c"]])
def test_a_garbled_request_is_answered_and_others_are_served(
    node: Node, world: World, context: zmq.Context[Any], channel: Channel, frames: list[bytes]
) -> None:
    with raw_socket(context, world.client.transport, world.members["n1"]) as socket:
        socket.send_multipart(frames)
        assert socket.poll(10_000)
        assert b"protocol-error" in socket.recv()
    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
    assert node.served == 1


def test_an_oversized_message_cuts_its_connection_and_no_other(
    node: Node, world: World, context: zmq.Context[Any], channel: Channel
) -> None:
    with raw_socket(context, world.client.transport, world.members["n1"]) as socket:
        reader = watch(context, socket, zmq.EVENT_DISCONNECTED)
        socket.send(bytes(MAX_MESSAGE + 1000))
        assert reader.poll(10_000)
        reader.close(0)
    assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
    with pytest.raises(ValueError, match="limit"):
        channel.start("n1", "flush", bytes(MAX_MESSAGE), 5.0)


def test_a_request_of_a_far_version_is_refused(node: Node, world: World, context: zmq.Context[Any]) -> None:
    with raw_socket(context, world.client.transport, world.members["n1"]) as socket:
        socket.send(request_codec.encode(Request(7, 1, "flush", 1000, FLUSH, {})))
        assert socket.poll(10_000)
        assert b"protocol version 7" in socket.recv()


def test_a_plain_connection_gets_nowhere(node: Node, world: World, context: zmq.Context[Any]) -> None:
    with context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.sndtimeo = 1000
        socket.connect(world.members["n1"].endpoint)
        with contextlib.suppress(zmq.Again):  # libzmq may have given the connection up before
            socket.send(request_codec.encode(Request(1, 1, "flush", 1000, FLUSH, {})))
        assert not socket.poll(300)
    assert node.served == 0


def test_unread_events_never_stop_the_other_sockets(context: zmq.Context[Any], node: Node, world: World) -> None:
    """libzmq's I/O thread waits for a full event queue, and with it every socket of the context."""
    with context.socket(zmq.DEALER) as lonely, context.socket(zmq.PAIR) as control:
        lonely.linger = control.linger = 0
        lonely.reconnect_ivl = lonely.reconnect_ivl_max = 1
        reader = watch(context, lonely, zmq.EVENT_ALL)
        lonely.connect(free_endpoint())
        # Some thousand events a second come: three seconds fill the 2,000 that a bounded queue has.
        time.sleep(3)
        with Channel(world.client.transport, world.members, context) as channel:
            assert ask(channel, "n1", "flush", Flush(""), 10.0).dropped == 3
        count = 0
        while reader.poll(0):
            reader.recv_multipart()
            count += 1
        assert count > 2_000
        reader.close(0)


def test_who_was_dialled_before_it_served_is_reached_as_soon_as_it_does(
    world: World, context: zmq.Context[Any]
) -> None:
    """libzmq may be waiting for its next try then."""
    for ahead_s in (0.55, 0.6, 0.65, 0.8, 0.85):
        with Channel(world.client.transport, world.members, context) as channel:
            channel.dial(["n1"])
            time.sleep(ahead_s)  # its tries are 200 ms apart by now
            node = Node(world.node, world.cluster)
            try:
                assert ask(channel, "n1", "flush", Flush(""), 5.0).dropped == 3
            finally:
                node.stop()


# --- lines ---


def use(listener: Listener, incoming: Incoming) -> None:
    """A node whose MAC of something is that thing backwards; anything else it does as ``answer``."""
    if incoming.request.verb != "mac":
        answer(listener, incoming)
        return
    asked = REQUEST_CODECS["mac"].decode(incoming.request.body)
    assert (asked.key, asked.key_id, asked.grant) == ("orders", bytes(16), b"")
    listener.reply(incoming, Status.OK, REPLY_CODECS["mac"].encode(Result(asked.data[::-1])), Load(3, 40, True))


@pytest.fixture
def line(world: World, node: Node) -> Iterator[Line]:
    """A line to a node that does ``use``."""
    node.handler = use
    made = open_line(world.client.transport, world.members["n1"])
    assert made is not None
    yield made
    made.close()


def operate(line: Line, number: int = 1, data: bytes = b"data", patience_s: float = 5.0) -> int:
    return line.operate(number, b"mac", b"orders", bytes(16), data, b"", b"", False, 5_000, patience_s)


def test_a_line_brings_results_and_snapshots(line: Line) -> None:
    assert line.open
    for number, length in enumerate((0, 1, 200, 300, 40_000), 1):
        data = os.urandom(length)
        assert operate(line, number, data) == DONE
        assert (line.data, line.queue, line.service_us, line.loaded) == (data[::-1], 3, 40, True)
        assert 0 < line.elapsed_s < 5


def test_no_line_goes_to_who_does_not_prove_its_key_or_refuses_this_one(world: World, node: Node) -> None:
    member = world.members["n1"]
    assert open_line(world.stranger.transport, member) is None
    assert open_line(world.client.transport, replace(member, curve_public=bytes(range(32)))) is None
    assert open_line(world.client.transport, replace(member, endpoint=free_endpoint())) is None
    with socket_module.create_server(("127.0.0.1", 0)) as silent:
        silent_member = replace(member, endpoint=f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        assert open_line(world.client.transport, silent_member) is None


def test_another_answer_is_handed_over(node: Node, line: Line) -> None:
    node.handler = lambda listener, incoming: listener.fail(incoming, KeyNotFound("no such key"))
    assert operate(line, 7) == OTHER
    reply = Calls.direct_reply(line.frame or b"", 7)
    assert reply is not None
    with pytest.raises(KeyNotFound, match="no such key"):
        raise_for_status(reply)


def test_a_late_answer_is_none_to_the_next(node: Node, line: Line) -> None:
    held: list[Incoming] = []
    node.handler = lambda listener, incoming: held.append(incoming)
    assert operate(line, 1, b"first", patience_s=0.05) == LATE

    def both(listener: Listener, incoming: Incoming) -> None:
        use(listener, held.pop())
        use(listener, incoming)

    node.handler = both
    assert operate(line, 2, b"second") == DONE
    assert line.data == b"dnoces"


def test_a_node_that_dies_ends_a_use_before_the_patience(node: Node, line: Line) -> None:
    arrived = threading.Event()
    node.handler = lambda listener, incoming: arrived.set()

    def stop() -> None:
        assert arrived.wait(10)
        node.stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    begun_s = time.monotonic()
    assert operate(line, patience_s=60.0) == BROKEN
    stopper.join()
    assert time.monotonic() - begun_s < 30
    assert not line.open
    assert operate(line, 2) == NOT_SENT
    node.start()


def test_a_line_that_was_cut_meanwhile_is_noticed_before_anything_is_sent(node: Node, line: Line) -> None:
    assert operate(line) == DONE
    served = node.served
    node.stop()
    time.sleep(0.01)  # a line that was used within the last millisecond is not looked at
    try:
        assert operate(line, 2) == NOT_SENT
        assert node.served == served
    finally:
        node.start()


def test_a_line_may_be_ended_by_another_thread(node: Node, line: Line) -> None:
    arrived = threading.Event()
    node.handler = lambda listener, incoming: arrived.set()
    thread = threading.Thread(target=lambda: arrived.wait(10) and line.interrupt())
    thread.start()
    assert operate(line, patience_s=60.0) == BROKEN
    thread.join()


def test_garbage_ends_no_use(node: Node, line: Line) -> None:
    """What is no answer to it is passed over; a good one is taken after it."""

    def lie(listener: Listener, incoming: Incoming) -> None:
        for junk in (b"", b"\x96", os.urandom(50)):
            listener.router.send(incoming.connection, junk)
        listener.router.send(incoming.connection, b"two", more=True)
        listener.router.send(incoming.connection, b"frames")
        use(listener, replace_request(incoming, incoming.request.id + 1))
        use(listener, incoming)

    node.handler = lie
    code = operate(line)
    passed = 0
    while code == OTHER:
        assert Calls.direct_reply(line.frame or b"", 1) is None
        passed += 1
        code = line.resume()
    assert (code, line.data, passed) == (DONE, b"atad", 4)


@contextmanager
def rogue(world: World, serve: Callable[[Peer, socket_module.socket], None]) -> Iterator[Line]:
    """A line to somebody with the node's key, too busy for ``hello``, who does ``serve`` after a good handshake."""
    busy = Overloaded("no")
    server = world.node.transport
    listening = socket_module.create_server(("127.0.0.1", 0))
    member = replace(world.members["n1"], endpoint=f"tcp://127.0.0.1:{listening.getsockname()[1]}")

    def run() -> None:
        stream, _ = listening.accept()
        decode = zmq.utils.z85.decode
        peer = Peer(own_public=decode(server.public), own_secret=decode(server.secret))
        with stream:
            while not peer.open:
                stream.sendall(peer.take())
                peer.feed(stream.recv(4096))
                if peer.judged:
                    peer.judge(True)
            stream.sendall(peer.take())
            while not (frames := peer.feed(stream.recv(4096))):
                pass
            hello = request_codec.decode(frames[0][1])
            peer.send(reply_codec.encode(Reply(PROTOCOL_VERSION, hello.id, Status.ERROR, error_body(busy), IDLE, {})))
            stream.sendall(peer.take())
            with suppress(ConnectionError):
                serve(peer, stream)

    thread = threading.Thread(target=run)
    thread.start()
    line = open_line(world.client.transport, member)
    assert line is not None
    yield line
    line.close()
    thread.join()
    listening.close()


def test_bytes_that_break_a_rule_end_the_line(world: World) -> None:
    """After a good handshake somebody sends what is no frame, or one that was not made for this place."""

    def serve(peer: Peer, stream: socket_module.socket) -> None:
        peer.feed(stream.recv(4096))
        stream.sendall(b"\xff" * 100)
        stream.recv(4096)

    with rogue(world, serve) as line:
        assert operate(line) == BROKEN


def result_frame(peer: Peer, number: int) -> bytes:
    body = REPLY_CODECS["mac"].encode(Result(b"made"))
    peer.send(reply_codec.encode(Reply(PROTOCOL_VERSION, number, Status.OK, body, Load(0, 1, True), {})))
    return peer.take()


@pytest.mark.parametrize("flags", [0, 2])
def test_a_node_that_sends_without_end_keeps_nobody_longer_than_its_patience(world: World, flags: int) -> None:
    """Answers to what nobody asked, or commands; where the line spins, too, which it does now and then."""
    quick = 63

    def serve(peer: Peer, stream: socket_module.socket) -> None:
        for number in range(1, quick + 1):
            while not peer.feed(stream.recv(4096)):
                pass
            stream.sendall(result_frame(peer, number))
        while not peer.feed(stream.recv(4096)):
            pass
        body = REPLY_CODECS["mac"].encode(Result(bytes(40_000)))
        other = reply_codec.encode(Reply(PROTOCOL_VERSION, 5_000, Status.OK, body, Load(0, 1, True), {}))
        for _ in range(400):
            peer.send(other, flags)
        stream.sendall(peer.take() + result_frame(peer, quick + 1))

    with rogue(world, serve) as line:
        for number in range(1, quick + 1):
            assert operate(line, number) == DONE
        assert operate(line, quick + 1, patience_s=0.003) == LATE


def test_an_error_in_opening_a_line_is_told_as_it_is(world: World) -> None:
    record = SimpleNamespace(manifest=SimpleNamespace(key_id=bytes(16)))
    algorithm = SimpleNamespace(operations={"mac"}, prehashed=False, kind=KeyKind.HMAC)
    known = SimpleNamespace(
        algorithm=algorithm,
        record=record,
        request_class=lambda verb: verb,
        holders=("n1",),
        info=SimpleNamespace(name="orders"),
        version=1,
    )
    dropped: list[str] = []
    router = SimpleNamespace(
        changes=0,
        begin_direct=lambda *_: ("n1", 1.0, SimpleNamespace(outstanding=1)),
        dropped=dropped.append,
    )
    calls = SimpleNamespace(router=router, peek=lambda _: known, times_of=lambda _: Histograms())
    identity = SimpleNamespace(current=world.client.transport)

    def fail(own: CurveIdentity, member: Member) -> Line | None:
        raise ValueError("no address")

    ways: Any = (calls, SimpleNamespace(cluster=world.cluster), identity, world.members, fail)
    shortcuts = Shortcuts(*ways, most=1, max_ciphertext=100)
    lost: Any = {}
    for _ in range(100):
        with pytest.raises(ValueError, match="no address"):
            shortcuts.use("mac", "orders", b"data", b"", b"", None, 1.0, lost)
    assert dropped == ["n1"] * 100


def replace_request(incoming: Incoming, number: int) -> Incoming:
    return Incoming(incoming.member, msgspec.structs.replace(incoming.request, id=number), incoming.connection)


def test_a_use_that_is_too_long_is_told(line: Line) -> None:
    with pytest.raises(ValueError, match="a request of more than 65536 bytes"):
        operate(line, data=bytes(70_000))
    assert operate(line) == DONE


def test_a_channel_without_connections_sleeps(context: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the time when it begins to wait and when it has waited; a loop looked thousands of times."""
    looks: list[float] = []
    real = Channel._expire
    monkeypatch.setattr(Channel, "_expire", lambda channel, now: looks.append(now) or real(channel, now))
    with Channel(world.client.transport, world.members, context) as channel:
        assert channel.poll(0.5) == []
    assert len(looks) < 10
