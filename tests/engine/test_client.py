"""The blocking and the asynchronous engine against nodes played in a thread, over real CURVE sockets."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from ports import free_port

import engine
from engine.client.admission import ServiceLimits, welcome
from engine.client.client import ClientSettings, Engine
from engine.client.config import create_identity, write_private, write_toml
from engine.client.listener import Listener
from engine.client.membership import Membership
from engine.client.publications import Gate, curve_server
from engine.client.spreading import Desk
from engine.errors import (
    AccessDenied,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidTag,
    KeyNotFound,
    NodeUnavailable,
    Overloaded,
)
from engine.protocol.manifest import (
    Cluster,
    ClusterSource,
    CommitCertificate,
    CreateOrder,
    Holder,
    KeyManifest,
    PolicyRule,
    Receipt,
    certificates,
    chain_pin,
    create_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    open_key_manifest,
    receipts,
)
from engine.protocol.requests import (
    HELLO,
    MANIFEST_FETCH,
    REPLY_CODECS,
    REQUEST_CODECS,
    TABLE,
    Flushed,
    KeyDescription,
    KeyEntry,
    KeyList,
    Result,
    Table,
)
from engine.protocol.signed import SigningKey, sign_envelope
from engine.protocol.table import RoutingTable, pack_service, seal_delta, seal_table, table_delta
from engine.protocol.wire import Load, Status

NODES = ("n1", "n2", "n3")


HEAD = b"KQ\x01\x00\x00\x00\x01"
"""What a ciphertext of AES-GCM begins with: the format and the version of the key."""


class World:
    """Identities of three nodes, a balancer and two clients, of which only one is in the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        operator = create_identity(folder / "op.toml", "op", "operator", passphrase="p")
        roles: list[tuple[str, Any]] = [*((name, "node") for name in NODES), ("bal", "balancer")]
        self.identities = {name: create_identity(folder / f"{name}.toml", name, role) for name, role in roles}
        self.app = create_identity(folder / "app.toml", "app", "client")
        self.stranger = create_identity(folder / "stranger.toml", "stranger", "client")
        members = [operator.member(), self.app.member()]
        for number, (name, identity) in enumerate(self.identities.items()):
            publish = free_endpoint() if name == "bal" else ""
            location = "" if name == "bal" else f"site{number}/host"
            members.append(identity.member(endpoint=free_endpoint(), publish_endpoint=publish, location=location))
        rules = [PolicyRule("app", "*", ["*"])]
        issue = partial(issue_cluster_manifest, name="test", members=members, rules=rules, operators=[operator.signing])
        self.chain = issue()
        self.longer = issue(chain=self.chain)
        write_private(folder / "cluster.manifest", self.chain)
        self.pin = chain_pin(self.chain)
        self.cluster: Cluster = open_chain(self.chain, self.pin)
        self.described = self._describe()

    def settings(self, timeout_s: float = 5.0) -> ClientSettings:
        return ClientSettings(self.app, self.cluster, timeout_s)

    def _describe(self) -> bytes:
        order = CreateOrder(bytes(16), "k", "aes-256-gcm", 2, 3, "generate", 2**50)
        raw_order = sign_envelope("order.create", 1, create_orders.encode(order), self.app.signing)
        holders = [Holder(name, x, bytes([x]) * 32) for x, name in enumerate(NODES, 1)]
        manifest = KeyManifest(bytes(16), "k", 1, 1, 1, "aes-256-gcm", 2, holders, b"", bytes(32), raw_order, b"")
        raw = sign_envelope("key", 1, key_manifests.encode(manifest), self.identities["n1"].signing)
        record = open_key_manifest(raw, self.cluster)
        signed = [
            sign_envelope("receipt", 1, receipts.encode(Receipt(bytes(16), record.digest, x)), identity.signing)
            for x, identity in enumerate((self.identities[name] for name in NODES), 1)
        ]
        body = certificates.encode(CommitCertificate(bytes(16), record.digest, signed))
        certificate = sign_envelope("certificate", 1, body, self.identities["bal"].signing)
        return REPLY_CODECS["describe"].encode(KeyDescription(raw, certificate, [], b""))

    def table(self, counter: int, **changes: Any) -> RoutingTable:
        now_ms = time.time_ns() // 1_000_000
        nodes = list(NODES)
        table = RoutingTable(
            1,
            counter,
            now_ms,
            now_ms + 60_000,
            nodes,
            ["encrypt/aes-256-gcm"],
            pack_service([[9] * 3]),
            [0] * 3,
            [1000],
            [],
            [],
            [(0, 0)],
        )
        return RoutingTable(**{field: changes.get(field, getattr(table, field)) for field in table.__struct_fields__})


def free_endpoint() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


class Nodes:
    """Every node in one thread. Encryption puts the header and ``ct:`` in front; ``silent`` nodes never answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.source: ClusterSource = world.cluster
        self.silent: set[str] = set()
        self.served: list[tuple[str, str]] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._out: list[bytes] = []
        self.whole = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def publish(self, raw: bytes) -> None:
        self._out.append(raw)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        cluster = self.world.cluster
        gate = Gate(context, cluster)
        listeners = {}
        poller = zmq.Poller()

        def listen(name: str) -> None:
            identity = self.world.identities[name].transport
            listeners[name] = Listener(identity, cluster.members[name].endpoint, cluster)
            poller.register(listeners[name].router.fileno(), zmq.POLLIN)

        for name in NODES:
            listen(name)
        publisher = context.socket(zmq.PUB)
        curve_server(publisher, self.world.identities["bal"].transport)
        publisher.bind(cluster.members["bal"].publish_endpoint)
        self._ready.set()
        while not self._stop.is_set():
            poller.poll(5)
            if self.whole and "bal" not in listeners:
                listen("bal")
            while self._out:
                publisher.send(self._out.pop(0))
            for name, listener in listeners.items():
                while (incoming := listener.receive()) is not None:
                    if name not in self.silent:
                        self._answer(name, listener, incoming)
        for socket in (*listeners.values(), publisher):
            socket.close()
        gate.close()
        context.destroy(linger=0)

    def _answer(self, name: str, listener: Listener, incoming: Any) -> None:
        verb = incoming.request.verb
        self.served.append((name, verb))
        body = REQUEST_CODECS[verb].decode(incoming.request.body)
        load = Load(0, 5, True)
        if verb == HELLO:
            told = welcome(body, name, bytes(16), self.source.cluster, ServiceLimits())
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(told))
        elif verb == MANIFEST_FETCH:
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(Desk(self.source).fetch(body)))
        elif verb == "describe":
            if body.key != "k":
                listener.fail(incoming, KeyNotFound("no"))
            else:
                listener.reply(incoming, Status.OK, self.world.described)
        elif verb == "encrypt":
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(Result(HEAD + b"ct:" + body.data)), load)
        elif verb == "decrypt" and not body.data.startswith(HEAD + b"ct:"):
            listener.fail(incoming, InvalidTag("tag"), load)
        elif verb == "decrypt":
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(Result(body.data[len(HEAD) + 3 :])), load)
        elif verb == TABLE:
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(Table(self.whole)))
        elif verb == "flush":
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(Flushed(2, 0)))
        elif verb == "list":
            page = KeyList(
                [
                    KeyEntry("k", "aes-256-gcm", 1, 2, 3, "enabled", 0),
                    KeyEntry(f"of-{name}", "ed25519", 1, 2, 3, "enabled", 0),
                ],
                False,
            )
            listener.reply(incoming, Status.OK, REPLY_CODECS[verb].encode(page))
        else:
            listener.fail(incoming, AccessDenied(f"not {verb}"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def nodes(world: World) -> Iterator[Nodes]:
    nodes = Nodes(world)
    yield nodes
    nodes.stop()


@pytest.fixture
def kq(world: World) -> Iterator[Engine]:
    with engine.connect(world.settings()) as kq:
        yield kq


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "it did not come about in 10 s"
        time.sleep(0.01)


class TestEngine:
    def test_the_verbs_reach_the_nodes(self, nodes: Nodes, kq: Engine) -> None:
        ciphertext = kq.encrypt("k", bytearray(b"data"), associated_data=memoryview(b"aad"))
        assert ciphertext == HEAD + b"ct:data"
        assert kq.decrypt("k", ciphertext) == b"data"
        assert kq.flush() == 6
        assert [each.name for each in kq.list_keys()] == ["k", "of-n1", "of-n2", "of-n3"]
        assert kq.key_info("k").threshold == 2
        with pytest.raises(KeyNotFound):
            kq.encrypt("unknown", b"")
        with pytest.raises(AccessDenied, match="prewarm"):
            kq.prewarm("k")

    def test_threads_share_it(self, nodes: Nodes, kq: Engine) -> None:
        with ThreadPoolExecutor(12) as pool:
            items = [b"%d" % number for number in range(600)]
            assert list(pool.map(lambda item: kq.encrypt("k", item), items)) == [HEAD + b"ct:" + item for item in items]

    def test_more_threads_than_channels_wait_their_turn(self, nodes: Nodes, world: World) -> None:
        with engine.connect(world.settings(), max_channels=1) as kq, ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(lambda number: kq.encrypt("k", b"%d" % number), range(100)))) == 100

    def test_a_channel_that_never_comes_free_is_overload(self, nodes: Nodes, world: World) -> None:
        nodes.silent |= set(NODES)
        with engine.connect(world.settings(), max_channels=1) as kq, ThreadPoolExecutor(1) as pool:
            busy = pool.submit(kq.encrypt, "k", b"", timeout=1.0)
            wait_for(lambda: kq._channels._out == 1)
            with pytest.raises(Overloaded, match="1 channels"):
                kq.encrypt("k", b"", timeout=0.05)
            with pytest.raises(DeadlineExceeded):
                busy.result()

    def test_a_silent_node_is_passed_over(self, nodes: Nodes, kq: Engine) -> None:
        kq.encrypt("k", b"")
        nodes.silent.add(next(name for name, verb in nodes.served if verb == "encrypt"))
        assert kq.encrypt("k", b"x", timeout=3.0) == HEAD + b"ct:x"

    def test_without_nodes_it_ends_with_the_deadline(self, kq: Engine) -> None:
        with pytest.raises(NodeUnavailable, match=r"n\d.*n\d.*n\d"):
            kq.encrypt("k", b"", timeout=0.5)

    def test_a_loaded_key_is_used_by_the_shortest_way(
        self, nodes: Nodes, kq: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(5):
            kq.encrypt("k", b"")
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_run", None)  # the ordinary way
            for number in range(10):
                assert kq.encrypt("k", b"%d" % number) == HEAD + b"ct:%d" % number
                assert kq.decrypt("k", HEAD + b"ct:%d" % number) == b"%d" % number
            nodes.served.clear()
            with pytest.raises(InvalidTag):
                kq.decrypt("k", HEAD + b"bad")
        assert len([each for each in nodes.served if each[1] == "decrypt"]) == 1  # what is final is not asked twice
        assert all(not state.outstanding for state in kq._calls.router._nodes.values())

    def test_a_traced_call_does_not_take_the_shortest_way(
        self, nodes: Nodes, kq: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which carries no extension."""
        for _ in range(3):
            kq.encrypt("k", b"")
        real = kq._shortcuts
        monkeypatch.setattr(kq, "_shortcuts", SimpleNamespace(forked=False))
        with pytest.raises(AttributeError, match="use"):
            kq.encrypt("k", b"x")
        with engine.trace_context("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"):
            assert kq.encrypt("k", b"x") == HEAD + b"ct:x"
            assert kq.encrypt_many("k", [b"x", b"y"]) == [HEAD + b"ct:x", HEAD + b"ct:y"]
        monkeypatch.setattr(kq, "_shortcuts", real)

    def test_threads_use_the_shortest_way_side_by_side(self, nodes: Nodes, kq: Engine) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for count in range(100):
                    data = b"%d-%d" % (number, count)
                    assert kq.encrypt("k", data) == HEAD + b"ct:" + data
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert all(not state.outstanding for state in kq._calls.router._nodes.values())

    def test_what_was_learned_by_the_shortest_way_is_told_to_the_router(self, nodes: Nodes, kq: Engine) -> None:
        for _ in range(5):
            kq.encrypt("k", b"")
        router = kq._calls.router
        told: list[str] = []
        genuine = router.learned_direct
        router.learned_direct = lambda node, *rest: (told.append(node), genuine(node, *rest))  # type: ignore[method-assign, assignment, func-returns-value]
        end_s = time.monotonic() + 20
        while not told and time.monotonic() < end_s:
            kq.encrypt("k", b"")
        assert told

    def test_a_deadline_shorter_than_the_patience_names_the_silent_node(self, nodes: Nodes, kq: Engine) -> None:
        for _ in range(3):
            kq.encrypt("k", b"")
        nodes.silent |= set(NODES)
        with pytest.raises(DeadlineExceeded, match=r"n\d: no reply within \d+ ms"):
            kq.encrypt("k", b"", timeout=0.05)
        assert all(not state.outstanding for state in kq._calls.router._nodes.values())

    def test_an_interrupted_use_is_not_counted_as_under_way(
        self, nodes: Nodes, kq: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also while the exception is kept, as an interactive session keeps it."""
        for _ in range(3):
            kq.encrypt("k", b"")

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        kq._shortcuts.reap(float("inf"))
        with monkeypatch.context() as patch:
            patch.setattr(kq._shortcuts, "open_line", interrupted)
            with pytest.raises(KeyboardInterrupt) as kept:
                kq.encrypt("k", b"")
        assert kept.value is not None
        assert all(not state.outstanding for state in kq._calls.router._nodes.values())
        assert kq.encrypt("k", b"x") == HEAD + b"ct:x"

    def test_a_kind_of_bytes_is_bytes(self, nodes: Nodes, kq: Engine) -> None:
        class Tagged(bytes):
            pass

        for _ in range(3):
            assert kq.encrypt("k", Tagged(b"data"), associated_data=Tagged(b"aad")) == HEAD + b"ct:data"

    def test_a_stranger_is_denied(self, nodes: Nodes, world: World) -> None:
        with engine.connect(replace(world.settings(), identity=world.stranger)) as kq:
            with pytest.raises(AccessDenied, match="every node refuses"):
                kq.encrypt("k", b"", timeout=60.0)
            with pytest.raises(AccessDenied):
                kq.flush()

    def test_status_tells_of_the_dead_too(self, nodes: Nodes, kq: Engine) -> None:
        told = {each.name: each for each in kq.status()}
        assert list(told) == ["n1", "n2", "n3", "bal"]
        assert isinstance(told["n1"].error, AccessDenied)
        assert (told["bal"].role, type(told["bal"].error)) == ("balancer", NodeUnavailable)

    def test_it_says_who_it_is_and_nothing_secret(self, kq: Engine, world: World) -> None:
        assert (kq.name, kq.cluster.name) == ("app", "test")
        assert world.app.transport.secret.decode() not in repr(kq) + repr(kq._settings)


class TestBatches:
    def test_results_are_in_order(self, nodes: Nodes, kq: Engine) -> None:
        items = [b"%d" % number for number in range(500)]
        sealed = kq.encrypt_many("k", items, associated_data=[b"a"] * 500)
        assert sealed == [HEAD + b"ct:" + item for item in items]
        assert kq.decrypt_many("k", sealed) == items
        assert kq.encrypt_many("k", []) == []
        assert sum(verb == "describe" for _, verb in nodes.served) == 1

    def test_a_batch_takes_the_shortest_way_as_far_as_that_goes(
        self, nodes: Nodes, kq: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(3):
            kq.encrypt("k", b"")
        items: list[Any] = [b"%d" % number for number in range(3_000)]
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_many_ordinarily", lambda self, name, call, done, left, *_: (left == []) or 1 / 0)
            sealed = kq.encrypt_many("k", items)
            assert sealed == [HEAD + b"ct:" + item for item in items]
            assert kq.decrypt_many("k", sealed) == items
            nodes.served.clear()
            done = kq.decrypt_many(
                "k", [HEAD + b"ct:a", HEAD + b"bad", *[HEAD + b"ct:b"] * 300], return_exceptions=True
            )
            assert [type(each) for each in done[:3]] == [bytes, InvalidTag, bytes]
            assert len(nodes.served) == 302  # what is final is not asked twice
            nodes.served.clear()
            with pytest.raises(InvalidTag):
                kq.decrypt_many("k", [HEAD + b"ct:a", HEAD + b"bad", *[HEAD + b"ct:b"] * 3_000])
            assert len(nodes.served) < 200  # none is begun once one has failed
        items[7] = "text"
        done = kq.encrypt_many("k", items, return_exceptions=True)
        assert [at for at, each in enumerate(done) if isinstance(each, Exception)] == [7]
        assert all(not state.outstanding for state in kq._calls.router._nodes.values())

    def test_a_batch_goes_on_at_other_nodes(self, nodes: Nodes, kq: Engine) -> None:
        for _ in range(3):
            kq.encrypt("k", b"")
        first = next(name for name, verb in reversed(nodes.served) if verb == "encrypt")
        nodes.silent.add(first)
        assert kq.encrypt_many("k", [b"x"] * 200, timeout=20.0) == [HEAD + b"ct:x"] * 200

    def test_the_first_error_is_raised_when_nothing_is_under_way(self, nodes: Nodes, kq: Engine) -> None:
        with pytest.raises(InvalidTag):
            kq.decrypt_many("k", [HEAD + b"ct:a", HEAD + b"bad", *[HEAD + b"ct:b"] * 200])
        assert sum(verb == "decrypt" for _, verb in nodes.served) < 200
        assert kq.decrypt("k", HEAD + b"ct:fine") == b"fine"

    def test_exceptions_can_take_the_place_of_results(self, nodes: Nodes, kq: Engine) -> None:
        done = kq.decrypt_many(
            "k", [HEAD + b"ct:a", HEAD + b"bad", HEAD + b"ct:b", bytes(60_000)], return_exceptions=True
        )
        assert done[0] == b"a"
        assert done[2] == b"b"
        assert (type(done[1]), type(done[3])) == (InvalidTag, ValueError)

    def test_errors_in_a_batch_tell_the_router_nothing_wrong(self, nodes: Nodes, kq: Engine) -> None:
        """They are answered late where many are on the way: that says nothing of the way."""
        for _ in range(3):
            kq.encrypt("k", b"")
        kq.decrypt_many("k", [HEAD + b"ct:a"] * 64)
        told: list[float] = []
        genuine = kq._calls.learn
        kq._calls.learn = lambda *given: (told.append(kq._calls.clock() - given[3]), genuine(*given))  # type: ignore[method-assign, assignment, func-returns-value]
        before = {name: state.round_trip_us for name, state in kq._calls.router._nodes.items()}
        done = kq.decrypt_many("k", [HEAD + b"ct:a"] * 900 + [HEAD + b"bad"] * 100, return_exceptions=True)
        assert sum(isinstance(each, InvalidTag) for each in done) == 100
        assert len(told) == 100
        ways_us = {name: state.round_trip_us for name, state in kq._calls.router._nodes.items()}
        assert all(us == pytest.approx(before[name], rel=0.5) for name, us in ways_us.items())
        assert all(not state.outstanding for state in kq._calls.router._nodes.values())

    def test_a_batch_survives_a_silent_node(self, nodes: Nodes, kq: Engine) -> None:
        nodes.silent.add("n2")
        assert len(kq.encrypt_many("k", [b"x"] * 200, timeout=5.0)) == 200

    def test_mistakes_are_told(self, kq: Engine) -> None:
        with pytest.raises(TypeError, match="a list is needed"):
            kq.encrypt_many("k", b"bytes")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="1 values of associated_data for 2 items"):
            kq.encrypt_many("k", [b"a", b"b"], associated_data=[b"x"])


class TestClosing:
    def test_it_leaves_no_thread_and_refuses_use(self, nodes: Nodes, world: World) -> None:
        before = set(threading.enumerate())
        kq = engine.connect(world.settings())
        kq.encrypt("k", b"")
        kq.close()
        kq.close()
        assert set(threading.enumerate()) == before
        with pytest.raises(EngineError, match="closed"):
            kq.encrypt("k", b"")

    def test_a_call_under_way_ends(self, nodes: Nodes, world: World) -> None:
        nodes.silent |= set(NODES)
        kq = engine.connect(world.settings())
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(kq.encrypt, "k", b"", timeout=600.0)
            wait_for(lambda: kq._channels._out == 1)
            time.sleep(0.05)
            kq.close()
            with pytest.raises(EngineError, match="closed"):
                busy.result(30)
        assert kq._context.closed

    def test_a_forked_child_is_told_to_connect_again(self, nodes: Nodes, kq: Engine) -> None:
        kq.encrypt("k", b"")
        pid = os.fork()
        if not pid:
            code = 1
            try:
                kq.encrypt("k", b"")
            except EngineError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert kq.encrypt("k", b"x") == HEAD + b"ct:x"

    def test_idle_channels_are_closed_in_time(self, nodes: Nodes, kq: Engine) -> None:
        kq.encrypt("k", b"")
        assert len(kq._channels._idle) == 1
        kq._channels.reap(0.0)
        assert kq._channels._idle == []
        assert kq.encrypt("k", b"x") == HEAD + b"ct:x"


class TestTables:
    def follow(self, nodes: Nodes, kq: Engine, world: World) -> None:
        """Publish tables until the first one arrives."""
        first = seal_table(world.table(5), world.identities["bal"].signing)

        def heard() -> bool:
            nodes.publish(first)
            time.sleep(0.02)
            return kq.routing_table is not None

        wait_for(heard)
        time.sleep(0.1)

    def test_a_newer_table_replaces_an_older_one_and_nothing_else_does(
        self, nodes: Nodes, kq: Engine, world: World
    ) -> None:
        self.follow(nodes, kq, world)
        signing = world.identities["bal"].signing
        assert kq.table_stats.installed == 1
        refused = kq.table_stats.refused
        bad = {
            "in force": seal_table(world.table(4), signing),
            "may not sign": seal_table(world.table(9), world.identities["n1"].signing),
            "expired": seal_table(world.table(9, expires_ms=1_000), signing),
            "do not match": seal_table(world.table(9, price=[1]), signing),
            "is wrong": seal_table(world.table(9), SigningKey("bal", world.identities["n1"].signing._private)),
            "(0, 9): (1, 5) is in force": seal_table(world.table(9, fencing_epoch=0), signing),
            "envelope": b"garbage",
        }
        for number, (reason, raw) in enumerate(bad.items(), 1):
            nodes.publish(raw)
            wait_for(lambda number=number: kq.table_stats.refused == refused + number)
            assert reason in kq.table_stats.last_refusal
        nodes.publish(seal_table(world.table(6), signing))
        wait_for(lambda: kq.table_stats.installed == 2)
        table = kq.routing_table
        assert table is not None
        assert table.order == (1, 6)
        assert kq.encrypt("k", b"x") == HEAD + b"ct:x"

    def test_differences_are_followed_and_a_missing_base_is_asked_for(
        self, nodes: Nodes, kq: Engine, world: World
    ) -> None:
        self.follow(nodes, kq, world)
        signing = world.identities["bal"].signing
        first = kq.routing_table
        assert first is not None
        delta = table_delta(first, world.table(6, price=[7, 8, 9]))
        assert delta is not None
        nodes.publish(seal_delta(delta, signing))
        wait_for(lambda: kq.routing_table is not None and kq.routing_table.price == [7, 8, 9])
        unheard = world.table(7)
        delta = table_delta(unheard, world.table(8, price=[1, 1, 1]))
        assert delta is not None
        refused = kq.table_stats.refused
        nodes.whole = seal_table(unheard, signing)
        nodes.publish(seal_delta(delta, signing))
        wait_for(lambda: kq.routing_table is not None and kq.routing_table.counter == 7)
        nodes.publish(seal_delta(delta, signing))
        wait_for(lambda: kq.routing_table is not None and kq.routing_table.price == [1, 1, 1])
        assert kq.table_stats.refused == refused


class TestManifests:
    @pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
    def test_a_newer_one_that_a_node_spoke_of_is_taken_at_the_end_at_the_latest(
        self, nodes: Nodes, world: World, kind: str
    ) -> None:
        nodes.source = Membership(open_chain(world.longer, world.pin), world.longer)
        source = Membership(world.cluster, world.chain)
        settings = replace(world.settings(), source=source)

        async def use() -> None:
            async with engine.aio.connect(settings) as kq:
                assert await kq.encrypt("k", b"x") == HEAD + b"ct:x"

        if kind == "asynchronous":
            asyncio.run(use())
        else:
            with engine.connect(settings) as kq:
                assert kq.encrypt("k", b"x") == HEAD + b"ct:x"
        assert (source.cluster.serial, source.cluster.digest) == (2, nodes.source.cluster.digest)


class TestConfiguration:
    def write(self, world: World, **changes: Any) -> Path:
        values = {
            "version": 1,
            "identity": "app.toml",
            "manifest": "cluster.manifest",
            "manifest_pin": world.pin.hex(),
            "timeout_s": 2.5,
        }
        path = world.folder / "client.toml"
        write_toml(path, values | changes)
        return path

    def test_connect_takes_a_path(self, nodes: Nodes, world: World) -> None:
        with engine.connect(str(self.write(world))) as kq:
            assert kq.encrypt("k", b"x") == HEAD + b"ct:x"
            assert kq._wait_s(None) == 2.5

    def test_a_wrong_pin_or_role_is_refused(self, world: World) -> None:
        with pytest.raises(EngineError, match="pinned"):
            engine.connect(self.write(world, manifest_pin="00" * 32))
        with pytest.raises(ConfigError, match="a client's is needed"):
            engine.connect(self.write(world, identity="n1.toml"))


class TestAsync:
    def run(self, world: World, work: Any, **changes: Any) -> Any:
        async def main() -> Any:
            async with engine.aio.connect(replace(world.settings(), **changes)) as kq:
                return await work(kq)

        return asyncio.run(main())

    def test_many_tasks_share_one_connection_to_each_node(self, nodes: Nodes, world: World) -> None:
        async def work(kq: engine.aio.AsyncEngine) -> None:
            sealed = await asyncio.gather(*(kq.encrypt("k", b"%d" % number) for number in range(300)))
            assert sealed == [HEAD + b"ct:%d" % number for number in range(300)]
            assert await kq.decrypt_many("k", sealed) == [b"%d" % number for number in range(300)]
            assert await kq.flush() == 6
            assert len(await kq.list_keys()) == 4
            assert [each.name for each in await kq.status()] == ["n1", "n2", "n3", "bal"]
            assert (await kq.key_info("k")).shares == 3
            assert len(kq._links) <= 4

        self.run(world, work)

    def test_more_tasks_than_may_be_under_way_wait_for_their_turn(self, nodes: Nodes, world: World) -> None:
        """The most at a time are under way, also at the first moment; who has no turn in time is told so."""

        async def work(kq: engine.aio.AsyncEngine) -> None:
            most = 0

            async def look() -> None:
                nonlocal most
                while True:
                    await asyncio.sleep(0)
                    most = max(most, sum(len(link._pending) for link in kq._links.values()))

            looking = asyncio.create_task(look())
            done = await asyncio.gather(*(kq.encrypt("k", b"%d" % number, timeout=60.0) for number in range(1_000)))
            looking.cancel()
            assert done == [HEAD + b"ct:%d" % number for number in range(1_000)]
            assert 1 < most <= 128
            nodes.silent |= set(NODES)
            late = await asyncio.gather(
                *(kq.encrypt("k", b"", timeout=2.0) for _ in range(128)),
                kq.encrypt("k", b"", timeout=0.5),
                return_exceptions=True,
            )
            assert all(isinstance(each, EngineError) for each in late)
            assert isinstance(late[-1], DeadlineExceeded)
            assert "not begun within 500 ms: 128 uses" in str(late[-1])

        self.run(world, work)

    def test_closing_while_the_first_calls_begin_ends_them_and_leaves_nothing(self, nodes: Nodes, world: World) -> None:
        problems: list[Any] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            async with engine.aio.connect(world.settings()) as kq:
                begun = [asyncio.create_task(kq.encrypt("k", b"")) for _ in range(50)]
                await asyncio.sleep(0)
            for each in await asyncio.gather(*begun, return_exceptions=True):
                assert isinstance(each, EngineError), each
                assert "closed" in str(each)
            assert not kq._links

        asyncio.run(main())
        assert not problems

    def test_a_silent_node_is_passed_over(self, nodes: Nodes, world: World) -> None:
        async def work(kq: engine.aio.AsyncEngine) -> None:
            await kq.encrypt("k", b"")
            nodes.silent.add(next(name for name, verb in nodes.served if verb == "encrypt"))
            assert await kq.encrypt("k", b"x", timeout=3.0) == HEAD + b"ct:x"

        self.run(world, work)

    def test_a_node_that_goes_away_ends_the_wait(self, world: World) -> None:
        nodes = Nodes(world)
        nodes.silent |= set(NODES)

        async def work(kq: engine.aio.AsyncEngine) -> None:
            busy = asyncio.create_task(kq.encrypt("k", b"", timeout=5.0))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(nodes.stop)
            with pytest.raises(EngineError):
                await busy

        self.run(world, work)

    def test_a_stranger_is_denied(self, nodes: Nodes, world: World) -> None:
        async def work(kq: engine.aio.AsyncEngine) -> None:
            for _ in range(2):
                with pytest.raises(AccessDenied, match="every node refuses"):
                    await kq.encrypt("k", b"", timeout=60.0)

        self.run(world, work, identity=world.stranger)

    def test_errors_in_batches(self, nodes: Nodes, world: World) -> None:
        async def work(kq: engine.aio.AsyncEngine) -> None:
            with pytest.raises(InvalidTag):
                await kq.decrypt_many("k", [HEAD + b"ct:a", HEAD + b"bad"])
            done = await kq.decrypt_many("k", [HEAD + b"ct:a", HEAD + b"bad", bytes(60_000)], return_exceptions=True)
            assert (done[0], type(done[1]), type(done[2])) == (b"a", InvalidTag, ValueError)

        self.run(world, work)

    def test_a_cancelled_call_leaves_the_engine_whole(self, nodes: Nodes, world: World) -> None:
        async def work(kq: engine.aio.AsyncEngine) -> None:
            nodes.silent |= set(NODES)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await kq.encrypt("k", b"")
            nodes.silent.clear()
            assert await kq.encrypt("k", b"x") == HEAD + b"ct:x"
            assert not any(link._pending for link in kq._links.values())

        self.run(world, work)

    def test_closing_ends_what_is_under_way_and_leaves_no_thread(self, nodes: Nodes, world: World) -> None:
        nodes.silent |= set(NODES)
        before = set(threading.enumerate())

        async def main() -> None:
            kq = engine.aio.connect(world.settings())
            busy = asyncio.create_task(kq.encrypt("k", b"", timeout=600.0))
            await asyncio.sleep(0.1)
            await kq.close()
            with pytest.raises(EngineError, match="closed"):
                await busy
            with pytest.raises(EngineError, match="closed"):
                await kq.encrypt("k", b"")

        asyncio.run(main())
        assert set(threading.enumerate()) <= before

    def test_closing_in_a_forked_child_leaves_the_parents_as_it_is(self, nodes: Nodes, world: World) -> None:
        async def work(kq: engine.aio.AsyncEngine) -> None:
            await kq.encrypt("k", b"")
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    asyncio.run(kq.close())
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert any(link._up for link in kq._links.values())
            await asyncio.to_thread(nodes.stop)
            async with asyncio.timeout(10):  # the loop is still told of what comes
                while any(link._up for link in kq._links.values()):
                    await asyncio.sleep(0.01)

        self.run(world, work)
