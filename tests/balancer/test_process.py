"""The process itself: `python -m balancer` on loopback over CURVE, with real keys, nodes that count and clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tomli_w
import zmq
from chromium import Chromium, find_chromium
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from balancer import loop as loop_module
from balancer.config import load_settings
from balancer.forecast import Forecast, predict_load
from balancer.history import CLASSES, Stored
from balancer.loop import ControlLoop
from balancer.optimizer import SolverError
from balancer.store import HistoryStore
from balancer.view import PlanPage
from engine.client.config import CurveIdentity, Identity, create_identity, load_cluster
from engine.client.listener import Listener
from engine.client.publications import Gate, Publisher
from engine.client.transport import Channel, ask, connect_options, raise_for_status
from engine.errors import (
    AccessDenied,
    ConfigError,
    EngineError,
    KeyExists,
    ManifestError,
    NodeUnavailable,
    Overloaded,
    ProtocolError,
)
from engine.protocol.manifest import (
    CreateOrder,
    Holder,
    KeyManifest,
    PolicyRule,
    Receipt,
    chain_pin,
    create_orders,
    issue_cluster_manifest,
    key_manifests,
    open_abort,
    open_certificate,
    open_key_manifest,
    receipts,
)
from engine.protocol.requests import (
    HELLO,
    PLAN,
    REGISTRY_COMMIT,
    REGISTRY_OUTCOME,
    REGISTRY_RESERVE,
    REGISTRY_SYNC,
    REPLY_CODECS,
    STATS,
    TABLE,
    BalancerStatus,
    ClassCount,
    Commit,
    Empty,
    Hello,
    NodeStats,
    Outcome,
    Reserve,
    Sync,
    balancer_status_codec,
)
from engine.protocol.signed import read_unverified, sign_envelope
from engine.protocol.table import RoutingTable, open_table
from engine.protocol.wire import Status

PATIENCE_S = 30.0
SIGN = "sign/ed25519"
SECRET = "very-private-key-name"


def until(condition: Callable[[], Any]) -> Any:
    """The first true value of the condition, polled with a bound."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_S} s")


class Site:
    """A cluster on disk: one balancer, three nodes, a client, and a stranger whom the manifest does not know."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.who = {
            name: create_identity(folder / f"{name}.toml", name, role, "pass" if role == "operator" else "")
            for name, role in [
                ("op", "operator"),
                ("balancer", "balancer"),
                ("alice", "client"),
                ("stranger", "client"),
                ("guest", "client"),
                *((f"node-{i}", "node") for i in range(3)),
            ]
        }
        members = []
        for name, identity in self.who.items():
            endpoints: dict[str, str] = {}
            if identity.role in ("node", "balancer"):
                endpoints["endpoint"] = f"tcp://127.0.0.1:{free_port()}"
            if identity.role == "balancer":
                endpoints["publish_endpoint"] = f"tcp://127.0.0.1:{free_port()}"
            if identity.role == "node":
                endpoints["location"] = f"site-{name}/room/rack/host"
            if name != "stranger":
                members.append(identity.member(**endpoints))
        chain = issue_cluster_manifest(
            name="kq", members=members, rules=[PolicyRule("alice", "*", ["*"])], operators=[self.who["op"].signing]
        )
        (folder / "cluster.kqm").write_bytes(chain)
        self.pin = chain_pin(chain).hex()
        self.cluster = load_cluster(folder / "cluster.kqm", self.pin)
        self.balancer = self.cluster.members["balancer"]
        self.config = self.write_config()

    def write_config(self, name: str = "balancer-config.toml", **changes: Any) -> Path:
        values = {
            "version": 1,
            "identity": "balancer.toml",
            "manifest": "cluster.kqm",
            "manifest_pin": self.pin,
            "data": "data",
            "tick_ms": 100,
            "history_ticks": 100,
        } | changes
        path = self.folder / name
        path.write_text(tomli_w.dumps(values))
        return path

    def curve(self, name: str) -> CurveIdentity:
        return self.who[name].transport

    def order(self, name: str, key_id: bytes) -> bytes:
        order = CreateOrder(key_id, name, "aes-256-gcm", 2, 3, "generate", int(time.time() * 1000) + 60_000)
        return sign_envelope("order.create", 1, create_orders.encode(order), self.who["alice"].signing)

    def manifest(self, order: bytes, attempt: int, holders: list[str]) -> tuple[bytes, list[bytes]]:
        wanted = create_orders.decode(read_unverified(order).payload)
        listed = [Holder(node, x, bytes(32)) for x, node in enumerate(holders, 1)]
        payload = key_manifests.encode(
            KeyManifest(
                wanted.key_id, wanted.name, 1, 1, attempt, wanted.algorithm, 2, listed, b"", bytes(32), order, b""
            )
        )
        raw = sign_envelope("key", 1, payload, self.who["node-0"].signing)
        digest = read_unverified(raw).digest
        return raw, [
            sign_envelope(
                "receipt", 1, receipts.encode(Receipt(wanted.key_id, digest, each.x)), self.who[each.node].signing
            )
            for each in listed
        ]


class CountingNode:
    """A node's listener that answers ``stats``: each time it has served 50 more signatures of 200 us.

    With a group, all of them were by a key of that placement group, which is named.
    """

    def __init__(self, site: Site, name: str, group: int | None = None) -> None:
        self._group = group
        endpoint = site.cluster.members[name].endpoint
        self._listener = Listener(site.curve(name), endpoint, site.cluster)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        boot, served = os.urandom(16), 0
        while not self._stop.is_set():
            if not self._listener.router.poll(20):
                continue
            while (incoming := self._listener.receive()) is not None:
                if incoming.request.verb == HELLO:
                    self._listener.fail(incoming, ProtocolError("no time for that"))
                    continue
                assert incoming.request.verb == STATS
                served += 50
                classes = [ClassCount(SIGN, served, 0, served * 200)]
                pairs, hot = ([], []) if self._group is None else ([(0, self._group, served)], [(SECRET, 0, served)])
                stats = NodeStats(boot, served, 0, classes, pairs, [], 1, 1000, hot, 0)
                self._listener.reply(incoming, Status.OK, REPLY_CODECS[STATS].encode(stats))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@contextmanager
def running(site: Site, config: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A balancer process that answers; it is gone afterwards, whatever happened."""
    reader, writer = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, writer)
        with (site.folder / "balancer.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "balancer", "--config", str(config or site.config), "--lifeline", str(reader)],
                cwd=site.folder,
                stderr=log,
                pass_fds=[reader],
                env=os.environ | {"KEYQUORUM_LOG_LEVEL": "debug"},
            )
        os.close(reader)
        process.lifeline = os.dup(writer)  # type: ignore[attr-defined]
        stack.callback(os.close, process.lifeline)  # type: ignore[attr-defined]
        stack.callback(process.wait)
        stack.callback(process.kill)
        with connected(site, "alice") as channel:
            until(lambda: process.poll() is not None or answers(channel))
        assert process.poll() is None, (site.folder / "balancer.log").read_text()
        yield process


@contextmanager
def connected(site: Site, name: str) -> Iterator[Channel]:
    context: zmq.Context[Any] = zmq.Context()
    try:
        with Channel(site.curve(name), {"balancer": site.balancer}, context) as channel:
            yield channel
    finally:
        context.destroy(0)


def answers(channel: Channel) -> bool:
    try:
        channel.call("balancer", "status", b"\x90", 1.0)
    except NodeUnavailable:
        return False
    return True


def status(channel: Channel) -> BalancerStatus:
    reply = channel.call("balancer", "status", b"\x90", PATIENCE_S)
    raise_for_status(reply)
    return balancer_status_codec.decode(reply.body)


def call(channel: Channel, verb: str, message: object) -> Any:
    return ask(channel, "balancer", verb, message, PATIENCE_S)


@contextmanager
def subscribed(site: Site, name: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[Any] = zmq.Context()
    try:
        subscriber: zmq.Socket[bytes] = context.socket(zmq.SUB)
        connect_options(subscriber, site.curve(name), site.balancer)
        subscriber.maxmsgsize = 1024 * 1024
        subscriber.subscribe(b"")
        subscriber.connect(site.balancer.publish_endpoint)
        yield subscriber
    finally:
        context.destroy(0)


def next_table(site: Site, subscriber: zmq.Socket[bytes], newest: RoutingTable | None) -> RoutingTable:
    assert subscriber.poll(int(PATIENCE_S * 1000)), "no table was published"
    return open_table(subscriber.recv(), site.cluster, int(time.time() * 1000), newest)


def test_tables_are_published_from_the_nodes_counts(site: Site) -> None:
    """Members get signed tables with rising counters; the nodes' load and service times are in them."""
    with ExitStack() as stack:
        for name in ("node-0", "node-1"):
            stack.callback(CountingNode(site, name).close)
        stack.enter_context(running(site))
        subscriber = stack.enter_context(subscribed(site, "alice"))
        table = None

        def loaded() -> RoutingTable | None:
            nonlocal table
            table = next_table(site, subscriber, table)
            measured = bool(table.classes) and min(table.service_us(0, 0), table.service_us(0, 1)) > 185
            return table if measured and table.forecast[0][0] > 0 else None

        table = until(loaded)
        row = table.classes.index(SIGN)
        prices = dict(zip(table.nodes, table.price, strict=True))
        assert prices["node-2"] > 100_000 > prices["node-0"]  # nobody is there
        assert [table.service_us(row, node) for node in (0, 1)] == pytest.approx([200, 200], rel=0.1)
        assert table.nodes[:2] == ["node-0", "node-1"]
        channel = stack.enter_context(connected(site, "alice"))
        asked = open_table(call(channel, TABLE, Empty()).table, site.cluster, int(time.time() * 1000))
        assert asked.order >= table.order
        told = status(channel)
        assert (told.balancer, told.last_error, told.cluster_serial) == ("balancer", "", 1)
        assert told.table_counter >= asked.counter
        assert told.ticks >= told.table_counter


def test_a_key_is_registered_and_survives_a_restart(site: Site) -> None:
    """Reserve and commit over CURVE; after SIGTERM (exit 0) and a restart the key is there, the fencing epoch grew."""
    with ExitStack() as stack:
        process = stack.enter_context(running(site))
        channel = stack.enter_context(connected(site, "node-0"))
        order = site.order("orders", b"k" * 16)
        reserved = call(channel, REGISTRY_RESERVE, Reserve(order, b"", b""))
        assert call(channel, REGISTRY_OUTCOME, Outcome(b"k" * 16, 1)).state == "pending"
        manifest, given = site.manifest(order, reserved.attempt, reserved.holders)
        certificate = call(channel, REGISTRY_COMMIT, Commit(manifest, given)).certificate
        assert len(open_certificate(certificate, open_key_manifest(manifest, site.cluster), site.cluster)) == 3
        with pytest.raises(KeyExists, match="'orders' is taken"):
            call(channel, REGISTRY_RESERVE, Reserve(site.order("orders", b"l" * 16), b"", b""))
        before = status(channel)
        subscriber = stack.enter_context(subscribed(site, "alice"))
        table = next_table(site, subscriber, None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        stack.enter_context(running(site))
        after = status(stack.enter_context(connected(site, "alice")))
        assert (before.keys, after.keys, after.fencing_epoch) == (1, 1, before.fencing_epoch + 1)
        again = call(stack.enter_context(connected(site, "node-2")), REGISTRY_SYNC, Sync(0)).entries
        assert [(each.state, each.manifest, each.certificate) for each in again] == [
            ("committed", manifest, certificate)
        ]
        # Tables of the old start that were still queued come first, then the new start's, all newer than before.
        newest = table
        while newest.fencing_epoch == table.fencing_epoch:
            newest = next_table(site, subscriber, newest)
        assert newest.order > table.order


def test_hello_tells_who_the_balancer_is(site: Site) -> None:
    with running(site), connected(site, "alice") as channel:
        call(channel, TABLE, Empty())
        told = channel.welcome("balancer")
        assert told is not None
        assert (told.name, told.cluster_serial, told.cluster_digest) == ("balancer", 1, site.cluster.digest)
        assert call(channel, HELLO, Hello(1, "0")) == told


def test_a_flood_of_one_member_is_bounded_and_others_have_their_turn(site: Site) -> None:
    """One client sends far more than its rate; it is told so, and another's requests are answered meanwhile."""
    text = site.config.read_text(encoding="utf-8")
    site.config.write_text(text + "\n[limits]\nrequests_per_s = 50.0\nburst_s = 2.0\n", encoding="utf-8")
    with running(site), connected(site, "alice") as greedy, connected(site, "node-0") as modest:
        tokens = {greedy.start("balancer", TABLE, b"\x90", PATIENCE_S) for _ in range(600)}
        for _ in range(20):
            call(modest, TABLE, Empty())
        told: Counter[str] = Counter()
        while sum(told.values()) < len(tokens):
            for arrival in greedy.poll(PATIENCE_S):
                assert arrival.reply is not None, arrival.error
                try:
                    raise_for_status(arrival.reply)
                except Overloaded as error:
                    told["refused" if "limits.requests_per_s = 50" in str(error) else str(error)] += 1
                else:
                    told["served"] += 1
        assert told["refused"] > 100
        assert told["served"] >= 50
        counts = status(modest).service
        assert counts.refused == told["refused"]
        assert counts.undeliverable == 0
        until(lambda: '"count": ' in (site.folder / "balancer.log").read_text())


def test_every_request_is_answered(site: Site) -> None:
    """Clients may not use the registry; unknown verbs, malformed bodies and a caller's mistakes have their error."""
    with running(site), connected(site, "alice") as client, connected(site, "node-1") as node:
        with pytest.raises(AccessDenied, match="'alice' is a client"):
            call(client, REGISTRY_SYNC, Sync(0))
        for channel, verb, body, kind, text in (
            (client, "no-such-verb", b"\x90", ProtocolError, "does not answer 'no-such-verb'"),
            (client, STATS, b"\x90", ProtocolError, "does not answer 'stats'"),
            (node, REGISTRY_SYNC, b"garbage", ProtocolError, "body of registry.sync"),
            (node, REGISTRY_SYNC, b"\x90", ProtocolError, "body of registry.sync"),
            (node, REGISTRY_RESERVE, b"\x93\xc4\x03abc\xc4\x00\xc4\x00", ProtocolError, "signed envelope"),
        ):
            reply = channel.call("balancer", verb, body, PATIENCE_S)
            with pytest.raises(kind, match=text):
                raise_for_status(reply)
        with pytest.raises(ValueError, match="attempt 0"):
            call(node, REGISTRY_OUTCOME, Outcome(b"x" * 16, 0))
        notice = call(node, REGISTRY_OUTCOME, Outcome(b"x" * 16, 5))
        assert (notice.state, open_abort(notice.document, site.cluster).attempt) == ("aborted", 5)
        assert status(client).keys == 0


def test_a_client_without_a_rule_sees_nothing_of_the_cluster(site: Site) -> None:
    """It may get tables, by which requests go; the number of keys and the plan are for those who have `status`."""
    with running(site), connected(site, "guest") as guest, connected(site, "alice") as client:
        assert call(guest, TABLE, Empty())
        for verb in (PLAN, "status"):
            with pytest.raises(AccessDenied, match=f"'guest' may not see the {verb}"):
                raise_for_status(guest.call("balancer", verb, b"\x90", PATIENCE_S))
        assert status(client).keys == 0


def test_strangers_get_nothing(site: Site) -> None:
    """A key that is in no manifest gets no answer and no table, while members get theirs."""
    with running(site), subscribed(site, "stranger") as stranger, subscribed(site, "alice") as alice:
        with connected(site, "stranger") as channel, pytest.raises((AccessDenied, NodeUnavailable)):
            channel.call("balancer", "status", b"\x90", 2.0)
        table = None
        for _ in range(5):
            table = next_table(site, alice, table)
        assert not stranger.poll(0)


@pytest.mark.parametrize("way", ["SIGINT", "lifeline"])
def test_it_stops_cleanly(site: Site, way: str) -> None:
    """SIGINT, and the end of the lifeline, stop it with exit code 0; its log has no error."""
    reader, writer = os.pipe()
    with (site.folder / "stop.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "balancer", "--config", str(site.config), "--lifeline", str(reader)],
            cwd=site.folder,
            stderr=log,
            pass_fds=[reader],
        )
    os.close(reader)
    try:
        with connected(site, "alice") as channel:
            until(lambda: process.poll() is not None or answers(channel))
        if way == "SIGINT":
            process.send_signal(signal.SIGINT)
        else:
            os.close(writer)
            writer = -1
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        if writer >= 0:
            os.close(writer)
    text = (site.folder / "stop.log").read_text()
    assert '"event": "stopped"' in text
    assert '"level": "error"' not in text


def check_config(config: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "balancer", "--config", str(config), "--check-config"],
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_check_config(site: Site) -> None:
    """A good configuration is 0 and changes nothing; a mistake is 1, in one sentence without a traceback."""
    code, out, err = check_config(site.config)
    assert (code, err) == (0, "")
    assert "ok, balancer of kq" in out
    assert not (site.folder / "data").exists()
    code, out, err = check_config(site.write_config("wrong.toml", colour="red"))
    assert (code, out) == (1, "")
    assert "wrong.toml" in err
    assert "colour" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version"),
        ({"tick_ms": 1}, r">= 50.*tick_ms"),
        ({"history_ticks": 10**6}, r"<= 7200.*history_ticks"),
        ({"bind": "udp://127.0.0.1:1"}, "bind"),
        ({"manifest_pin": "00" * 32}, "pinned"),
        ({"manifest_pin": "00"}, "64 hex digits"),
        ({"identity": "alice.toml"}, "'alice' is no balancer"),
        ({"identity": "missing.toml"}, "missing.toml"),
        ({"data": "open"}, "it must be 0700"),
        ({"data": "cluster.kqm"}, "no folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_in_the_configuration_are_named(site: Site, changes: dict[str, Any], named: str) -> None:
    """Each names its file, key or value, and the limit."""
    (site.folder / "open").mkdir()
    (site.folder / "open").chmod(0o755)
    with pytest.raises((ConfigError, ManifestError), match=named):
        load_settings(site.write_config("wrong.toml", **changes))


def test_keys_must_be_the_manifests(site: Site) -> None:
    """An identity of the right name with other keys is refused."""
    (site.folder / "other").mkdir()
    create_identity(site.folder / "other" / "balancer.toml", "balancer", "balancer")
    with pytest.raises(ConfigError, match="are not those in the manifest"):
        load_settings(site.write_config(identity="other/balancer.toml"))


def test_a_second_balancer_on_the_same_data_does_not_start(site: Site) -> None:
    """The registry's file is one process's; the other one says so and ends with 1."""
    with running(site):
        other = site.write_config(
            "other.toml", bind=f"tcp://127.0.0.1:{free_port()}", publish_bind=f"tcp://127.0.0.1:{free_port()}"
        )
        done = subprocess.run(
            [sys.executable, "-m", "balancer", "--config", str(other)],
            cwd=site.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 1
        assert "in use by another process" in done.stderr


@contextmanager
def control_loop(site: Site, **more: Any) -> Iterator[ControlLoop]:
    identity: Identity = site.who["balancer"]
    context: zmq.Context[Any] = zmq.Context()
    gate = Gate(context, site.cluster)
    publisher = Publisher(context, lambda: {site.balancer.publish_endpoint: identity.transport}, queued=4)
    loop = ControlLoop(
        context,
        identity,
        identity.transport,
        site.cluster,
        publisher,
        **{"term": lambda: 1, "tick_ms": 50, "history_ticks": 300} | more,
    )
    loop.start()
    try:
        yield loop
    finally:
        loop.stop()
        publisher.close()
        gate.close()
        context.destroy(0)


def test_the_last_good_table_stays_when_the_solver_fails(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing decision is told in ``last_error``; the table in force is issued anew until decisions come again."""
    decide = loop_module.decide
    with control_loop(site) as loop:
        until(lambda: loop.standing.table)

        def failing(*_: object, **__: object) -> RoutingTable:
            raise SolverError("routing program: Time limit reached")

        monkeypatch.setattr(loop_module, "decide", failing)
        failed = until(lambda: loop.standing.last_error and loop.standing)
        assert "SolverError: routing program" in failed.last_error
        later = until(lambda: loop.standing.counter >= failed.counter + 3 and loop.standing)
        assert later.last_error
        assert (later.table.nodes, later.table.service) == (failed.table.nodes, failed.table.service)
        assert later.table.price == failed.table.price
        opened = open_table(later.sealed, site.cluster, int(time.time() * 1000), failed.table)
        assert opened.expires_ms >= failed.table.expires_ms
        monkeypatch.setattr(loop_module, "decide", decide)
        until(lambda: not loop.standing.last_error)


def test_the_history_follows_a_clock_that_is_set(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two hours back and forth again: steps are those of the clock, and what was known of that time is there again."""
    real = loop_module.now_ms
    off_ms = [0]
    monkeypatch.setattr(loop_module, "now_ms", lambda: real() + off_ms[0])
    store = HistoryStore(tmp_path / "history.db", tick_ms=50, ticks=300)

    def follows() -> Any:
        """The newest step, if it is the clock's."""
        view = loop.standing.view
        step = view.snapshot.tick if view is not None else 0
        return abs(step * 50 - loop_module.now_ms()) < 10_000 and loop.standing

    with control_loop(site, store=store) as loop:
        before = until(lambda: (standing := follows()) and standing.ticks > 5 and standing)
        known = len(before.view.snapshot.counts)
        for off_ms[0] in (-7_200_000, 0):
            again = until(follows)
            assert not again.last_error
        assert until(lambda: len(loop.standing.view.snapshot.counts) >= known)
        assert loop.standing.counter > before.counter


def test_subscribers_that_go_keep_no_table_from_the_others(site: Site) -> None:
    """What libzmq itself says of a connection that ended carries no key and no descriptor."""
    context: zmq.Context[Any] = zmq.Context()
    gate = Gate(context, site.cluster)
    own = site.who["balancer"].transport
    publisher = Publisher(context, lambda: {site.balancer.publish_endpoint: own}, queued=4)

    def comes(subscriber: zmq.Socket[bytes]) -> bool:
        publisher.look(site.cluster)
        publisher.publish(b"table")
        return bool(subscriber.poll(20) and subscriber.recv())

    def subscribe(subscriber: zmq.Socket[bytes], *topics: bytes) -> None:
        connect_options(subscriber, site.curve("alice"), site.balancer)
        for topic in (b"table", *topics):
            subscriber.subscribe(topic)
        subscriber.connect(site.balancer.publish_endpoint)
        until(lambda: comes(subscriber))

    try:
        with context.socket(zmq.SUB) as staying:
            subscribe(staying)
            with context.socket(zmq.SUB) as leaving:
                subscribe(leaving, *(b"%d" % number for number in range(15)))
                assert len(publisher) == 2
            until(lambda: comes(staying) and len(publisher) == 1)
            for _ in range(20):
                until(lambda: comes(staying))
    finally:
        publisher.close()
        gate.close()
        context.destroy(0)


def test_without_a_good_table_none_is_published(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop whose very first decisions fail goes on, and publishes nothing that was never decided."""

    def broken(*_: object, **__: object) -> RoutingTable:
        raise ZeroDivisionError("a mistake in the program")

    monkeypatch.setattr(loop_module, "decide", broken)
    with control_loop(site) as loop:
        standing = until(lambda: loop.standing.ticks >= 3 and loop.standing)
        assert (standing.table, standing.sealed, standing.counter) == (None, b"", 0)
        assert "ZeroDivisionError" in standing.last_error


def test_a_taken_port_is_said(site: Site) -> None:
    """An endpoint in use ends the start with 2 and one sentence."""
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        config = site.write_config("taken.toml", bind=f"tcp://127.0.0.1:{port}")
        done = subprocess.run(
            [sys.executable, "-m", "balancer", "--config", str(config)],
            cwd=site.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.returncode == 2
    assert f"can't bind tcp://127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_of_the_tree_travel() -> None:
    """The solver's error is one of the project's tree, with a code of it."""
    assert issubclass(SolverError, EngineError)
    assert SolverError.code == "error"


# --- what an earlier process counted ---


def keep_wave(path: Path, tick_ms: int, ticks: int) -> int:
    """A history file as an earlier balancer leaves it: a wave of 20 ticks up to now; the last tick in it."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    last = int(time.time() * 1000) // tick_ms
    steps = np.arange(last - ticks + 1, last + 1)
    counts = np.zeros((ticks, len(CLASSES)))
    counts[:, CLASSES.index(SIGN)] = np.round(100 + 80 * np.sin(2 * np.pi * steps / 20))
    nothing = np.zeros((0, 0))
    none = np.zeros(0, dtype=np.int64)
    store = HistoryStore(path, tick_ms=tick_ms, ticks=ticks)
    store.save(Stored(steps, counts, none, np.zeros((ticks, 0))), Stored(none, counts[:0], none, nothing))
    store.close()
    return last


def test_a_restarted_loop_forecasts_with_a_ridge_on_its_first_tick(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first table of all comes from a forecast that was learnt before the restart."""
    path = site.folder / "history.db"
    keep_wave(path, 50, 300)
    told: list[Forecast] = []

    def noting(*arguments: Any) -> Forecast:
        told.append(predict_load(*arguments))
        return told[-1]

    monkeypatch.setattr(loop_module, "predict_load", noting)
    with control_loop(site, store=HistoryStore(path, tick_ms=50, ticks=300)) as loop:
        standing = until(lambda: loop.standing.table and loop.standing)
    assert (told[0].classes, told[0].models) == ((SIGN,), ("ridge",))
    assert 10 < told[0].mean[0] * 0.05 < 200
    assert standing.table.classes == [SIGN]


def test_a_restarted_balancer_says_how_it_forecasts_and_goes_on_writing(site: Site) -> None:
    """The process reads what was counted, tells of it in its status, and keeps what it counts itself."""
    # A start on a busy machine may take a hundred ticks, of which nothing is known.
    config = site.write_config(history_ticks=1200)
    last = keep_wave(site.folder / "data" / "history.db", 100, 1200)
    with running(site, config) as process, connected(site, "alice") as channel:
        told = until(lambda: (found := status(channel)).forecasts and found)
        assert [(each.request_class, each.model) for each in told.forecasts] == [(SIGN, "ridge")]
        node = CountingNode(site, "node-0")
        try:
            until(lambda: "node answers" in (site.folder / "balancer.log").read_text())
            told = status(channel)
            until(lambda: status(channel).ticks > told.ticks + 1)
        finally:
            node.close()
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    kept = HistoryStore(site.folder / "data" / "history.db", tick_ms=100, ticks=1200)
    fast, _ = kept.load(int(time.time() * 10), 0)
    assert fast.steps[-1] > last


def test_a_damaged_history_keeps_no_balancer_from_starting(site: Site) -> None:
    """It begins anew, says so once, and decides."""
    (site.folder / "data").mkdir(mode=0o700)
    (site.folder / "data" / "history.db").write_bytes(b"no database" * 1000)
    with running(site), connected(site, "alice") as channel:
        until(lambda: status(channel).ticks >= 2)
        assert status(channel).last_error == ""
    assert (site.folder / "balancer.log").read_text().count("history not read") == 1


def test_a_series_that_is_out_is_told_and_stops_nothing(site: Site) -> None:
    """A service that is not there is in the status; the loop ticks on."""
    series = [{"name": "queue", "kind": "http", "url": f"http://127.0.0.1:{free_port()}/", "every_s": 0.1}]
    with running(site, site.write_config(series=series)), connected(site, "alice") as channel:
        told = until(lambda: (found := status(channel)).series and found)
        assert told.series[0].startswith("queue: ConnectionRefusedError")
        until(lambda: status(channel).ticks > told.ticks + 3)
        assert status(channel).last_error == ""


# --- over HTTP ---


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of an answer."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        assert SECRET not in text
        return answer.status, text


def samples(port: int) -> dict[tuple[str, ...], float]:
    """(name, label values...) -> value, as Prometheus' own parser reads it."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(get(port, "/metrics")[1])
        for sample in family.samples
    }


def test_a_balancer_is_ready_with_its_first_table(site: Site) -> None:
    """Before that it is healthy and says that it is not ready. A tick of a minute waits half of it for a mute node."""
    port = free_port()
    config = site.write_config(tick_ms=60_000, http={"bind": f"127.0.0.1:{port}"})
    place = int(site.cluster.members["node-0"].endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", place)), running(site, config):
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (503, "no routing table was published yet\n")
        told = samples(port)
        assert told[("keyquorum_balancer_ready",)] == 0
        assert ("keyquorum_balancer_table_expiry_timestamp_seconds",) not in told
        page = msgspec.json.decode(get(port, "/v1/plan")[1], type=PlanPage)
        assert (page.balancer, page.table, page.ticks) == ("balancer", None, 0)


def test_what_the_loop_does_is_told_over_http(site: Site) -> None:
    """Metrics, plan and page of a balancer at work; no answer has the name of a key."""
    port = free_port()
    with ExitStack() as stack:
        for name in ("node-0", "node-1"):
            stack.callback(CountingNode(site, name, group=7).close)
        stack.enter_context(running(site, site.write_config(http={"bind": f"127.0.0.1:{port}"})))
        until(lambda: get(port, "/readyz")[0] == 200)
        until(lambda: samples(port).get(("keyquorum_balancer_load_per_second", SIGN), 0) > 0)
        judged = ("keyquorum_balancer_forecast_coverage_ratio", SIGN, "1")
        told = until(lambda: judged in (found := samples(port)) and found)
        assert 0 <= told[judged] <= 1
        assert [told["keyquorum_balancer_node_up", f"node-{each}"] for each in range(3)] == [1, 1, 0]
        assert told["keyquorum_balancer_node_price", "node-2"] == 1000
        assert told["keyquorum_balancer_forecast_per_second", SIGN, "1"] > 0
        assert told[("keyquorum_balancer_ready",)] == 1
        assert told[("keyquorum_balancer_failing",)] == 0
        assert told[("keyquorum_balancer_table_expiry_timestamp_seconds",)] > time.time()
        assert told[("keyquorum_balancer_tick_duration_seconds_count",)] > 1
        page = until(
            lambda: (
                (found := msgspec.json.decode(get(port, "/v1/plan")[1], type=PlanPage)).placement
                and found.placement.groups
                and found
            )
        )
        assert [each.group for each in page.placement.groups] == [7]
        assert len(page.placement.groups[0].holders) == 3  # as keys usually have
        assert page.table.counter <= samples(port)[("keyquorum_balancer_table_counter",)]
        assert [each.name for each in page.classes] == [SIGN]
        channel = stack.enter_context(connected(site, "alice"))
        asked = call(channel, PLAN, Empty())
        assert [each.request_class for each in asked.classes] == [SIGN]
        assert (asked.balancer, asked.tick_ms, asked.groups) == ("balancer", 100, 1)
        until(lambda: samples(port)[("keyquorum_balancer_connections",)] >= 1)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (apt-get install chromium-headless-shell)")
def test_the_page_draws_it_in_a_browser_that_reaches_no_other_place(site: Site, tmp_path: Path) -> None:
    """Charts, tables and matrix, by Chromium, again and again; nothing is asked for elsewhere, and nothing fails."""
    port = free_port()
    with ExitStack() as stack:
        for name in ("node-0", "node-1"):
            stack.callback(CountingNode(site, name, group=7).close)
        stack.enter_context(running(site, site.write_config(http={"bind": f"127.0.0.1:{port}"})))
        until(lambda: samples(port).get(("keyquorum_balancer_load_per_second", SIGN), 0) > 0)
        browser = stack.enter_context(Chromium(find_chromium() or "", tmp_path))
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.until("Number(document.body?.dataset.frames || 0) >= 2")
        assert browser.complaints == []
        assert all(url.startswith(f"http://127.0.0.1:{port}/") for url in browser.asked)
        assert browser.value("document.getElementById('state').className") == ""
        assert "tick" in browser.value("document.getElementById('state').textContent")
        assert browser.value("document.querySelectorAll('canvas').length") == 2
        rows = "[...document.querySelectorAll('#{} tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
        (row,) = browser.value(rows.format("classes"))
        assert row[0] == SIGN
        assert float(row[1]) > 0
        states = [["node-0", "up"], ["node-1", "up"], ["node-2", "silent"]]
        # On a busy machine one may be late for a tick.
        until(lambda: [row[:2] for row in browser.value(rows.format("nodes"))] == states)
        kinds = browser.value("[...document.querySelectorAll('#matrix tbody tr td .cell')].map(each => each.className)")
        assert sorted(kinds).count("cell held") == 3
        # Something is drawn in both charts: the load's line, and the prices'.
        drawn = (
            "[...document.querySelectorAll('canvas')].map(c => c.getContext('2d').getImageData(0, 0, c.width, c.height)"
            ".data.filter((value, k) => k % 4 === 3 && value > 0).length)"
        )
        assert all(count > 500 for count in browser.value(drawn))
        browser.value(
            "(() => { const s = document.getElementById('class'); s.value = 'sign/ed25519';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        frames = browser.value("Number(document.body.dataset.frames)")
        browser.until(f"Number(document.body.dataset.frames) > {frames}")
        assert browser.value("document.getElementById('class').value") == SIGN
        assert browser.complaints == []


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"bind": "0.0.0.0:9465"}, "http.bind '0.0.0.0:9465' is no loopback address.*http.token are missing"),
        ({"bind": "127.0.0.1:9465", "token": "file:nowhere"}, "nowhere: No such file"),
        ({"bind": "127.0.0.1:9465", "allow": True}, "unknown field `allow`"),
    ],
)
def test_http_that_may_not_be_served_keeps_it_from_starting(site: Site, told: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_settings(site.write_config(http=told))
