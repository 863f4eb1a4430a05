"""A client's thread that listens to what members publish: routing tables of balancers, snapshots of nodes.

It verifies what comes, gives it to the router, and takes newer cluster manifests that somebody spoke of. Each member
has a socket of its own, so that CURVE's key says who published.
"""

from __future__ import annotations

import random
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
import zmq

from engine.client.membership import Membership, OwnCurve, Servers
from engine.client.spreading import pull
from engine.client.transport import Channel, ask, connect_options
from engine.errors import EngineError, ManifestError, ProtocolError
from engine.protocol.manifest import Cluster, ClusterSource, FollowsCluster, Member
from engine.protocol.requests import TABLE, Empty, Welcome
from engine.protocol.routing import Router
from engine.protocol.signed import MAX_ENVELOPE
from engine.protocol.snapshot import Newest, snapshot_codec
from engine.protocol.table import TableBaseMissing, TableReader

__all__ = ["Follower", "TableStats"]

TABLE_QUEUE: Final = 4
WAIT_S: Final = 10.0
"""How long to wait for a publication, at most."""
CHORES_EVERY_S: Final = 1.0
GATHER_S: Final = 0.02
"""A pause after snapshots, so that those of many nodes cost one waking: they are good for ten times as long."""
MOST_NODES: Final = 256
PART_OF_FILES: Final = 16
"""Nodes that are listened to, drawn by chance where there are more: a connection has two descriptors. Of the others
the client knows what their replies say."""
HANDSHAKE_BYTES: Final = 1_024
"""ZMQ_MAXMSGSIZE where snapshots come: it holds for the messages of CURVE's handshake too, which are longer."""
NODE_RECONNECT_MS: Final = 250
NODE_RECONNECT_MAX_MS: Final = 2_000
"""A node that can't be reached, or does not let this client in, is not knocked at as often as where an answer waits."""
PULL_EVERY_S: Final = 1.0
PULL_FROM: Final = 3
PULL_TIMEOUT_S: Final = 1.0
"""A newer cluster manifest is asked of so many members, drawn by chance, so often at most."""
QUIET_MAX_S: Final = 90.0
QUIET_NODE_S: Final = 10.0
"""A subscription that brings nothing for so long is made anew: libzmq may have given the connection up for good
(``engine.client.transport.REOPEN_S``). For a balancer's it is longer than the longest tick."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TableStats:
    """Routing tables put in force, and publications that were forged, malformed, old or expired."""

    installed: int
    refused: int
    last_refusal: str


@dataclass(slots=True)
class _Subscription:
    """``newest`` is for a node's snapshots; None where tables come."""

    member: Member
    heard_s: float
    newest: Newest | None


class Follower(FollowsCluster):
    """The thread; it ends when its context is terminated. ``chore`` is called every 10 s at the least.

    ``news`` is called when a table was put in force, or a node is back that lost popular keys.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        source: ClusterSource,
        own: OwnCurve,
        router: Router,
        chore: Callable[[], None] = lambda: None,
        news: Callable[[], None] = lambda: None,
    ) -> None:
        self._context = context
        self._source = source
        self._router = router
        self._chore = chore
        self._news = news
        self._installed = 0
        self._refused = 0
        self._last_refusal = ""
        self._reader = TableReader()
        self._next_fetch_s = 0.0
        self._own = own
        self._told_serial = 0
        self._next_pull_s = 0.0
        self._heard_s = time.monotonic()
        self._subscriptions: dict[zmq.Socket[bytes], _Subscription] = {}
        self._poller = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name="keyquorum-tables", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> TableStats:
        """What came so far."""
        return TableStats(self._installed, self._refused, self._last_refusal)

    def end(self, timeout_s: float) -> None:
        """Take the manifest that somebody spoke of, terminate the context, and wait so long for the thread to end."""
        with suppress(zmq.ZMQError):
            self._look_for_manifest()
        _end_context(self._context, timeout_s)
        self._thread.join(timeout_s)

    def heard_of(self, welcome: Welcome) -> None:
        """A member said by which manifest it goes."""
        self._told_serial = max(self._told_serial, welcome.cluster_serial)

    # --- the thread ---

    def _run(self) -> None:
        cluster: Cluster | None = None
        own, next_chores_s = self._own.current, 0.0
        try:
            while True:
                if self._cluster is not cluster or self._own.current is not own:
                    rekeyed = self._own.current.public != own.public
                    cluster, own = self._cluster, self._own.current
                    self._follow(cluster, rekeyed)
                tables, snapshots = self._take()
                now = time.monotonic()
                if tables or now >= next_chores_s:
                    self._look_for_manifest()
                if tables or now >= next_chores_s or self._router.returned:
                    self._news()
                if now >= next_chores_s:
                    next_chores_s = now + CHORES_EVERY_S
                    self._renew_quiet(now)
                    self._chore()
                if snapshots:
                    time.sleep(GATHER_S)
        except zmq.ContextTerminated:
            pass
        except zmq.ZMQError as error:
            if not self._context.closed:
                log.warning("publications are not followed", reason=str(error))
        finally:
            for socket in self._subscriptions:
                socket.close(0)

    def _follow(self, cluster: Cluster, rekeyed: bool) -> None:
        """Have a subscription at each balancer and node of the manifest that publishes, and at nobody else."""
        wanted = {each.name: each for each in (*cluster.of_role("balancer"), *cluster.nodes.values())}
        for socket, each in list(self._subscriptions.items()):
            if rekeyed or wanted.get(each.member.name) != each.member:
                self._leave(socket)
        known = {each.member.name for each in self._subscriptions.values()}
        room = _most_nodes() - sum(each.newest is not None for each in self._subscriptions.values())
        missing = [each for each in wanted.values() if each.publish_endpoint and each.name not in known]
        random.shuffle(missing)
        for member in missing:
            if member.role == "balancer":
                self._subscribe(member, None)
            elif room > 0:
                room -= 1
                self._subscribe(member, Newest())

    def _subscribe(self, member: Member, newest: Newest | None) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        self._subscriptions[socket] = _Subscription(member, time.monotonic(), newest)
        connect_options(socket, self._own.current, member)
        if newest is None:
            socket.rcvhwm = TABLE_QUEUE
            socket.maxmsgsize = MAX_ENVELOPE + 64
            # A balancer that vanished without a word is noticed, and dialled again.
            socket.heartbeat_ivl = 2_000
            socket.heartbeat_timeout = 6_000
        else:
            socket.conflate = True  # the last one alone counts
            socket.maxmsgsize = HANDSHAKE_BYTES
            socket.reconnect_ivl = NODE_RECONNECT_MS
            socket.reconnect_ivl_max = NODE_RECONNECT_MAX_MS
        socket.subscribe(b"")
        socket.connect(member.publish_endpoint)
        self._poller.register(socket, zmq.POLLIN)

    def _leave(self, socket: zmq.Socket[bytes]) -> None:
        del self._subscriptions[socket]
        self._poller.unregister(socket)
        socket.close(0)

    def _renew_quiet(self, now: float) -> None:
        for socket, each in list(self._subscriptions.items()):
            if now - each.heard_s > (QUIET_MAX_S if each.newest is None else QUIET_NODE_S):
                self._leave(socket)
                self._subscribe(each.member, each.newest)  # what was heard before stays old

    def _take(self) -> tuple[int, int]:
        """Wait for publications; how many tables and snapshots came."""
        if not self._subscriptions:  # the poller would not hear of the context's end
            with self._context.socket(zmq.PAIR) as socket:
                socket.linger = 0
                socket.poll(int(WAIT_S * 1000))
            return 0, 0
        tables = snapshots = 0
        for socket, _ in self._poller.poll(int(WAIT_S * 1000)):
            each = self._subscriptions[socket]
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                continue
            each.heard_s = time.monotonic()
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"a publication of {len(frames)} frames, not 1")
                if each.newest is None:
                    tables += 1
                    self._table(frames[0], each.member.name)
                else:
                    snapshots += 1
                    self._snapshot(each.member.name, each.newest, frames[0], each.heard_s)
            except (ManifestError, ProtocolError) as error:
                self._refused += 1
                self._last_refusal = str(error)
        return tables, snapshots

    def _table(self, raw: bytes, balancer: str) -> None:
        now_ms = time.time_ns() // 1_000_000
        try:
            table = self._reader.read(raw, self._cluster, now_ms, self._router.table)
        except TableBaseMissing:
            self._fetch(balancer)
            return
        self._heard_s = time.monotonic()
        self._told_serial = max(self._told_serial, table.cluster_serial)
        self._installed += self._router.install(table)

    def _fetch(self, balancer: str) -> None:
        """Ask for the whole table that differences go by, at most once a while: one is published now and then too."""
        now = time.monotonic()
        if now < self._next_fetch_s:
            return
        self._next_fetch_s = now + PULL_EVERY_S
        with Channel(self._own, Servers(self._source), self._context) as channel:
            try:
                sealed: bytes = ask(channel, balancer, TABLE, Empty(), PULL_TIMEOUT_S).table
            except EngineError as error:
                if structlog.is_configured():  # a program that embeds the client did not ask for it
                    log.debug("no routing table", balancer=balancer, reason=str(error))
                return
        if sealed:
            self._table(sealed, balancer)

    def _snapshot(self, node: str, newest: Newest, raw: bytes, now_s: float) -> None:
        snapshot, boot = snapshot_codec.decode(raw), newest.boot
        if not newest.takes(snapshot):
            raise ProtocolError(f"{node}: snapshot {snapshot.number} is not newer than the one before")
        if boot and boot != snapshot.boot:
            self._router.restarted(node, now_s)
        self._router.heard(node, snapshot.queue, now_s, serving=snapshot.serving)

    def _look_for_manifest(self) -> None:
        """Take a newer manifest: that of the file, or one that a member spoke of and some member has."""
        source = self._source
        if not isinstance(source, Membership):
            return
        source.look()
        now = time.monotonic()
        silent = now - self._heard_s > WAIT_S  # with no table nobody says that there is a newer one
        if now < self._next_pull_s or (self._told_serial <= source.cluster.serial and not silent):
            return
        self._heard_s = now if silent else self._heard_s
        self._next_pull_s = time.monotonic() + PULL_EVERY_S
        names = list(source.cluster.servers)
        random.shuffle(names)
        with Channel(self._own, Servers(source), self._context) as channel:
            for name in names[:PULL_FROM]:
                try:
                    if pull(channel, name, source, PULL_TIMEOUT_S):
                        return
                except EngineError as error:
                    if structlog.is_configured():
                        log.debug("no manifest", member=name, reason=str(error))


def _end_context(context: zmq.Context[Any], timeout_s: float) -> None:
    """Terminate a context: every call that blocks in it ends, and its owner closes its sockets.

    Termination waits for those, so it runs beside; a thread that keeps a socket for longer than ``timeout_s`` only
    keeps that helper, which is a daemon, waiting.
    """
    helper = threading.Thread(target=context.term, name="keyquorum-close", daemon=True)
    helper.start()
    helper.join(timeout_s)


def _most_nodes() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_NODES if soft == resource.RLIM_INFINITY else min(MOST_NODES, soft // PART_OF_FILES)
