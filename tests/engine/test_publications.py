"""Snapshots that nodes publish: which a client believes and what it does with them; the sockets."""

from __future__ import annotations

import os
import socket as sockets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port
from zmq.utils.monitor import parse_monitor_message

from engine.client import follower as following
from engine.client import publications
from engine.client.config import CurveIdentity, create_identity
from engine.client.follower import Follower
from engine.client.membership import OwnCurve
from engine.client.publications import Gate, Publisher
from engine.client.transport import connect_options, watch
from engine.errors import ProtocolError
from engine.protocol._nodestate import DOWN_S, SNAPSHOT_MAX_AGE_S
from engine.protocol.manifest import Cluster, Member, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.routing import Router
from engine.protocol.snapshot import PUBLISH_EVERY_S, SNAPSHOT_BYTES, Newest, Snapshot, Telling, snapshot_codec
from engine.protocol.wire import PROTOCOL_VERSION, Load
from nodes.announcer import Announcer

BOOT, OTHER = bytes(16), bytes([1] * 16)
PATIENCE_S = 20.0


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


# --- what is told, and believed ---


def snapshot(number: int, boot: bytes = BOOT, queue: int = 0) -> Snapshot:
    return Snapshot(PROTOCOL_VERSION, boot, number, queue, True)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.booleans(), st.binary(min_size=16, max_size=16))
def test_every_snapshot_fits(number: int, queue: int, serving: bool, boot: bytes) -> None:
    sent = Snapshot(PROTOCOL_VERSION, boot, number, queue, serving)
    raw = snapshot_codec.encode(sent)
    assert len(raw) <= SNAPSHOT_BYTES
    assert snapshot_codec.decode(raw) == sent


def test_another_version_is_refused() -> None:
    raw = snapshot_codec.encode(msgspec.structs.replace(snapshot(1), version=PROTOCOL_VERSION + 1))
    with pytest.raises(ProtocolError):
        snapshot_codec.decode(raw)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_what_was_taken_is_never_taken_again(told: list[tuple[int, int]]) -> None:
    """Within a boot the numbers that are taken grow, and a boot that another one followed is over."""
    newest, taken = Newest(), []
    for boot, number in told:
        if newest.takes(snapshot(number, bytes([boot] * 16))):
            taken.append((boot, number))
    boots = [boot for at, (boot, _) in enumerate(taken) if at == 0 or taken[at - 1][0] != boot]
    assert len(boots) == len(set(boots))
    for boot in boots:
        numbers = [number for each, number in taken if each == boot]
        assert numbers == sorted(set(numbers))


def test_a_queue_is_told_when_it_changes_and_before_it_is_too_old() -> None:
    telling, told = Telling(BOOT), []
    for tick in range(40):
        raw = telling.due(3 if 10 <= tick < 12 else 0, tick != 30, tick * PUBLISH_EVERY_S)
        if raw is not None:
            told.append((tick, snapshot_codec.decode(raw)))
    changes = {10: 3, 12: 0}
    assert {tick: each.queue for tick, each in told if tick in changes} == changes
    assert [each.serving for tick, each in told if tick in (29, 30, 31)][-2:] == [False, True]
    gaps = [later - tick for (tick, _), (later, _) in pairwise(told)]
    assert max(gaps) * PUBLISH_EVERY_S <= SNAPSHOT_MAX_AGE_S / 2 + 1e-9
    assert max(gaps) > 1, "what does not change is told less often"
    assert [each.number for _, each in told] == list(range(1, len(told) + 1))


def test_many_subscribers_are_told_less_often() -> None:
    assert Telling.interval_s(1) == PUBLISH_EVERY_S
    assert 1_000 / Telling.interval_s(1_000) == pytest.approx(5_000)


# --- the router ---


def a_router(cluster: Cluster) -> Router:
    return Router(cluster)


def queue_at(router: Router, node: str = "node1") -> float:
    """What the router takes the node's queue to be."""
    state = router._state(node)
    return round(state.excess + state.mean_queue, 6)


def test_the_younger_of_reply_and_publication_counts(world: World) -> None:
    router = a_router(world.cluster)
    router.heard("node1", 7, 1.0)
    assert queue_at(router) == 7
    router.answered("node1", "k", "encrypt/aes-256-gcm", Load(2, 10, True), 100.0, 1.5)
    router.heard("node1", 9, 1.4)
    assert queue_at(router) == 2
    router.heard("node1", 9, 1.6)
    assert queue_at(router) == 9


def test_a_busy_node_is_avoided(world: World) -> None:
    router, names = a_router(world.cluster), ["node1", "node2"]
    router.heard("node1", 500, 1.0)
    assert {router.rank("encrypt/aes-256-gcm", "k", names, 1.1)[0] for _ in range(20)} == {"node2"}


def test_a_node_that_publishes_and_answers_nothing_stays_down(world: World) -> None:
    router, names = a_router(world.cluster), ["node1", "node2"]
    router.sent("node1", 1.0)
    router.failed("node1", 1.0)
    router.heard("node1", 0, 1.1)
    assert router.rank("encrypt/aes-256-gcm", "k", names, 1.1) == ("node2", "node1")
    assert router._nodes["node1"].down_for_s == DOWN_S
    router.came_up("node1", 1.1)
    router.heard("node1", 0, 1.2)
    assert not router._nodes["node1"].down_for_s


def test_a_node_that_says_it_does_not_serve_is_tried_last_as_long_as_it_says_so(world: World) -> None:
    router, names = a_router(world.cluster), ["node1", "node2"]
    for tick in range(60):
        now = 1.0 + tick * PUBLISH_EVERY_S
        router.heard("node1", 0, now, serving=False)
        assert router.rank("encrypt/aes-256-gcm", "k", names, now + 0.01) == ("node2", "node1")
    assert router._nodes["node1"].down_for_s == DOWN_S
    assert "node1" in {router.rank("encrypt/aes-256-gcm", "k", names, now + 2 * DOWN_S)[0] for _ in range(20)}


# --- sockets ---


class World:
    """Two nodes and two clients, of whom one leaves in a later manifest."""

    def __init__(self, folder: Path) -> None:
        self.operator = create_identity(folder / "op.toml", "op", "operator", passphrase="p")
        self.who = {
            name: create_identity(folder / f"{name}.toml", name, role)
            for name, role in (("node1", "node"), ("node2", "node"), ("app", "client"), ("leaver", "client"))
        }
        self.stranger = create_identity(folder / "s.toml", "s", "client").transport
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.members = [self.operator.member()]
        for name, identity in self.who.items():
            place = {"endpoint": f"tcp://127.0.0.1:{free_port()}", "location": f"a/{name}"} if "node" in name else {}
            publish = self.endpoint if name == "node1" else ""
            self.members.append(identity.member(publish_endpoint=publish, **place))
        self.chain = self._issue(self.members)
        self.cluster = open_chain(self.chain, chain_pin(self.chain))

    def _issue(self, members: list[Member], chain: bytes = b"") -> bytes:
        signing = [self.operator.signing]
        return issue_cluster_manifest(name="test", members=members, rules=[], operators=signing, chain=chain or None)

    def without_leaver(self) -> Cluster:
        later = self._issue([each for each in self.members if each.name != "leaver"], self.chain)
        return open_chain(later, chain_pin(self.chain))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class Site:
    """An announcer of node1 whose queue and manifest the test sets."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cluster = world.cluster
        self.told = (0, True)
        own = world.who["node1"].transport
        self.announcer = Announcer(self, BOOT, lambda: {world.endpoint: own}, lambda: self.told)
        self.announcer.start()

    def take(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.announcer.wake()


@pytest.fixture
def site(world: World) -> Iterator[Site]:
    before = threads()
    made = Site(world)
    yield made
    made.announcer.close(PATIENCE_S)
    until(lambda: threads() <= before)
    assert not made.announcer._thread.is_alive()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@contextmanager
def subscriber(world: World, identity: CurveIdentity) -> Iterator[tuple[zmq.Socket[bytes], Callable[[], int]]]:
    """A SUB socket of one's own, and what its monitor says next (0: nothing for 50 ms)."""
    node = world.cluster.members["node1"]
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        connect_options(socket, identity, node)
        socket.subscribe(b"")
        ends = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        with watch(context, socket, ends) as monitor:
            socket.connect(node.publish_endpoint)
            yield socket, lambda: parse_monitor_message(monitor.recv_multipart())["event"] if monitor.poll(50) else 0
            socket.monitor(None, 0)


def test_what_changes_is_published_and_nothing_where_nobody_listens(site: Site, world: World) -> None:
    time.sleep(3 * PUBLISH_EVERY_S)
    assert site.announcer.published == 0
    with subscriber(world, world.who["app"].transport) as (socket, _):
        assert socket.poll(int(PATIENCE_S * 1000))
        first = snapshot_codec.decode(socket.recv())
        assert (first.boot, first.queue, first.serving) == (BOOT, 0, True)
        site.told = (4, True)
        until(lambda: snapshot_codec.decode(socket.recv()).queue == 4)
        site.told = (4, False)
        until(lambda: not snapshot_codec.decode(socket.recv()).serving)
    until(lambda: (before := site.announcer.published) == (time.sleep(0.3) or site.announcer.published) and before)


def test_a_stranger_gets_nothing(site: Site, world: World) -> None:
    with subscriber(world, world.stranger) as (socket, event):
        until(lambda: event() == zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        assert not socket.poll(100)
    assert site.announcer.published == 0


def test_a_removed_member_is_cut_and_the_others_go_on(site: Site, world: World) -> None:
    with (
        subscriber(world, world.who["app"].transport) as (staying, _),
        subscriber(world, world.who["leaver"].transport) as (leaving, event),
    ):
        assert staying.poll(int(PATIENCE_S * 1000))
        assert leaving.poll(int(PATIENCE_S * 1000))
        site.take(world.without_leaver())
        until(lambda: event() == zmq.EVENT_DISCONNECTED)
        until(lambda: event() == zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        while leaving.poll(0):
            leaving.recv()
        number = snapshot_codec.decode(staying.recv()).number
        until(lambda: snapshot_codec.decode(staying.recv()).number > number + 2)
        assert not leaving.poll(0)


def test_a_taken_port_keeps_the_node_from_nothing_and_is_tried_again(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr("nodes.announcer.RETRY_S", 0.05)
    with zmq.Context() as context, context.socket(zmq.PUB) as taken:
        taken.bind(world.endpoint)
        site = Site(world)
        try:
            until(lambda: "can't bind" in site.announcer._lacking)
            taken.close()
            until(lambda: not site.announcer._lacking)  # who connects to the other one is not heard again
            with subscriber(world, world.who["app"].transport) as (socket, _):
                assert socket.poll(int(PATIENCE_S * 1000))
        finally:
            site.announcer.close(PATIENCE_S)


@contextmanager
def a_publisher(world: World, most: int) -> Iterator[Publisher]:
    context: zmq.Context[Any] = zmq.Context()
    gate = Gate(context, world.cluster)
    made = Publisher(context, lambda: {world.endpoint: world.who["node1"].transport}, queued=2, most=most)
    try:
        yield made
    finally:
        made.close()
        gate.close()
        context.destroy(0)


def test_strangers_take_no_more_connections_than_there_may_be(world: World, monkeypatch: Any) -> None:
    """Where they are too many the endpoint is left for a while, and all of them with it; then it is there again."""
    monkeypatch.setattr(publications, "PAUSE_S", 0.1)
    port = int(world.endpoint.rpartition(":")[2])
    with a_publisher(world, most=5) as publisher:
        held = [sockets.create_connection(("127.0.0.1", port)) for _ in range(8)]
        until(lambda: publisher.look(world.cluster) or publisher.cut)
        for each in held:
            each.settimeout(PATIENCE_S)
            with each, suppress(ConnectionError):
                while each.recv(1_000):  # its greeting, and then the end
                    pass
        with subscriber(world, world.who["app"].transport) as (socket, _):
            until(lambda: publisher.look(world.cluster) or len(publisher))
            publisher.publish(b"x")
            assert socket.poll(int(PATIENCE_S * 1000))


def test_who_subscribes_without_end_is_cut(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(publications, "MESSAGES_OF_CONNECTION", 20)
    with a_publisher(world, most=5) as publisher, subscriber(world, world.who["app"].transport) as (socket, event):
        until(lambda: publisher.look(world.cluster))
        for number in range(30):
            socket.subscribe(b"%d" % number)
        until(lambda: (publisher.look(world.cluster), publisher.cut)[1])
        until(lambda: event() == zmq.EVENT_DISCONNECTED)


# --- the client's thread ---


@contextmanager
def following_node(world: World) -> Iterator[tuple[Follower, Router, Callable[..., None]]]:
    """A follower, its router, and a way to publish anything as node1, which others could not."""
    router = a_router(world.cluster)
    own = world.who["app"]
    with a_publisher(world, most=50) as publisher:
        made = Follower(zmq.Context(), world.cluster, OwnCurve(own, world.cluster), router)
        try:
            until(lambda: publisher.look(world.cluster) or len(publisher))
            yield made, router, publisher.publish
        finally:
            made.end(PATIENCE_S)
            assert not made._thread.is_alive()


def test_the_follower_gives_the_router_what_is_newer_and_counts_the_rest(world: World) -> None:
    with following_node(world) as (made, router, publish):
        publish(snapshot_codec.encode(snapshot(5, queue=6)))
        until(lambda: queue_at(router) == 6)
        refused = (b"", b"garbage", snapshot_codec.encode(snapshot(5, queue=9)), snapshot_codec.encode(snapshot(4)))
        for count, raw in enumerate(refused, 1):
            publish(raw)
            until(lambda count=count: made.stats.refused == count)
        assert "not newer" in made.stats.last_refusal
        assert queue_at(router) == 6
        router.answered("node1", "k", "sign/ed25519", Load(6, 100, True), 300.0, time.monotonic())
        publish(snapshot_codec.encode(snapshot(6, queue=1)))
        until(lambda: queue_at(router) == 1)
        assert router.is_loaded("k", "node1")
        publish(snapshot_codec.encode(snapshot(1, OTHER, queue=2)))
        until(lambda: queue_at(router) == 2)
        assert not router.is_loaded("k", "node1")  # it was started anew
        publish(snapshot_codec.encode(snapshot(7, BOOT, queue=9)))
        until(lambda: made.stats.refused == len(refused) + 1)
        assert queue_at(router) == 2


def test_a_subscription_that_brings_nothing_is_made_anew(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(following, "QUIET_NODE_S", 0.02)
    monkeypatch.setattr(following, "WAIT_S", 0.05)
    monkeypatch.setattr(following, "CHORES_EVERY_S", 0.01)
    with following_node(world) as (made, router, publish):
        first = set(made._subscriptions)
        until(lambda: made._subscriptions and not first & set(made._subscriptions))
        assert queue_at(router) == 0
        publish(b"")


def test_of_many_nodes_some_are_followed(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(following, "MOST_NODES", 0)
    router = a_router(world.cluster)
    made = Follower(zmq.Context(), world.cluster, OwnCurve(world.who["app"], world.cluster), router)
    time.sleep(0.05)
    assert not made._subscriptions
    made.end(PATIENCE_S)
