"""The node's process: opens token, store and socket, runs the loop, and ends cleanly. It knows no verb."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import replace
from typing import Any, Final

import structlog
import zmq

from engine._version import __version__
from engine.client.config import Identity, load_identity, sync_folder
from engine.client.connections import LOOK_EVERY_S
from engine.client.listener import Listener
from engine.client.membership import Membership, OwnCurve, Servers, open_membership
from engine.client.process import host_health, leave_out_of_collection, lock_folder, raise_file_limit
from engine.client.transport import Channel
from engine.errors import ConfigError
from engine.failpoints import armed
from engine.notify import Notifier
from engine.protocol.manifest import Cluster
from engine.protocol.signed import remember_signatures
from nodes._fastpath import FastPath
from nodes.announcer import Announcer
from nodes.audit import AuditLog, AuditNames
from nodes.cache import CacheLimits
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.config import NodeConfig
from nodes.deal import Conversation, Talker
from nodes.handlers import Handlers
from nodes.holder import ShareHolder
from nodes.keeper import Keeper
from nodes.ledger import GrantLedger
from nodes.limits import GenerationLimit
from nodes.orders import BalancerOrders
from nodes.quotas import Quotas
from nodes.refresh import Coordinator
from nodes.remember import SignatureCache
from nodes.renewer import Renewer
from nodes.returning import Returning
from nodes.rotation import STORE_NAME, settle
from nodes.selftest import run_self_tests
from nodes.sharers import Mark, hold, leave_mark, list_marks, misplaced, owner_of, tell_owner
from nodes.shares import ShareCache
from nodes.store import ShareStore
from nodes.supervisor import Beat
from nodes.token import CallWatch, Lane, Token
from nodes.tracing import NO_SPANS, FileTracer, Tracer
from nodes.trial import Trial
from nodes.witness import Witness
from nodes.workers import Jobs, Mailbox, Worker

__all__ = ["Server", "find_sharers", "load_membership"]

TICK_S: Final = 1.0
DRAIN_S: Final = 5.0
"""How long a stopping node goes on for the requests under way."""
SETTLE_AFTER_MS: Final = 30_000
"""A share prepared longer ago than this is asked about at the registry."""
MAX_CREATIONS_WAITING: Final = 64
MAX_MOVES_WAITING: Final = 64
ZERO_COPY_RECV: Final = 10
"""libzmq's option of that name (zmq.h), which pyzmq names only in draft builds."""
BATCH: Final = 256
"""Requests taken in before the mailbox is looked at again."""
MAIL, ENDING = 2, 4
"""What ``FastPath.run`` tells of the descriptors that it was given: the mailbox, the lifeline."""

log = structlog.get_logger()


def _context() -> zmq.Context[Any]:
    """A context whose sockets copy each message out of the receive buffer before it is deciphered.

    Else libzmq deciphers messages in that buffer, which keeps the last one, a share maybe, until another arrives.
    """
    context: zmq.Context[Any] = zmq.Context()
    context.set(ZERO_COPY_RECV, 0)
    return context


def _within_locked_memory(limits: CacheLimits) -> CacheLimits:
    """The limits of a cache in locked memory, at most a quarter of what may be locked: requests need the rest."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if allowed == resource.RLIM_INFINITY or allowed // 4 >= limits.max_bytes:
        return limits
    log.info("less room for unsealed shares", wanted_bytes=limits.max_bytes, allowed_bytes=allowed // 4)
    return replace(limits, max_bytes=allowed // 4)


def load_membership(config: NodeConfig) -> tuple[Identity, Membership]:
    """Who this node is, and the membership of a cluster whose manifest names it with these very keys."""
    identity = load_identity(config.identity)
    if identity.role != "node":
        raise ConfigError(f"{config.identity}: the identity of a {identity.role}, not of a node")
    membership = open_membership(config.manifest, config.manifest_pin)
    if not identity.is_in(membership.cluster):
        raise ConfigError(
            f"the cluster manifest (serial {membership.cluster.serial}) has no node {identity.name!r} with these keys"
        )
    return identity, membership


def find_sharers(config: NodeConfig, own: Mark, cluster: Cluster) -> list[Mark]:
    """The nodes whose token this one uses, or that use its; ``ConfigError`` if they lie in another failure domain."""
    home = config.token.shared_with
    found = list_marks(config.data) if home is None else [owner_of(home)]
    if problem := misplaced(cluster, own, found):
        raise ConfigError(problem)
    return found


class Server:
    """A node ready to run. Making it opens everything and runs the self tests; ``EngineError`` says what failed."""

    def __init__(self, config: NodeConfig, lifeline: int | None = None, beat: Beat | None = None) -> None:
        identity, cluster = load_membership(config)
        raise_file_limit()
        self._tracer: Tracer = FileTracer(config.trace_file, identity.name) if config.trace_file else NO_SPANS
        self._membership = cluster
        self._own = OwnCurve(identity, cluster, config.identity)
        self._bind = config.bind
        self._lifeline = lifeline
        self._beat = beat
        self._notifier = Notifier()  # tells nothing where a supervisor does, which has taken the address
        watch = CallWatch()
        if beat is not None:
            beat.oldest = watch.oldest_s
        self._stopping_s = 0.0
        config.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._data_lock = lock_folder(config.data)
        self._mark = Mark.of(identity, config.path)
        self._sharers = find_sharers(config, self._mark, cluster.cluster)
        self._token_lock = self._join_token(config)
        settle(config.token, config.data)
        token = Token(config.token, config.data, watch)
        lane = token.lane()
        run_self_tests(lane)
        log.info("self tests passed", token=token.description, missing=sorted(token.missing))
        self._store = ShareStore(config.data / STORE_NAME, identity.name, lane)
        self._store.note_cluster_serial(cluster.cluster.serial)
        catalogue = Catalogue(self._store.rows(), self._store.settings())
        clock = TrustedClock(self._store.clock_mark().mark_ms)
        ledger = GrantLedger(self._store, clock, config.limits)
        ledger.flush()
        sync_folder(config.data)  # the names of the store and its files, if they are new
        self._mailbox = Mailbox()
        boot = os.urandom(16)
        self._audit = AuditLog(
            config.data / "audit",
            identity.signing,
            boot=boot.hex()[:8],
            post=self._mailbox.post,
            now_ms=clock.now_ms,
            detail=f"version {__version__}, cluster manifest {cluster.cluster.serial} {cluster.cluster.digest.hex()}",
            segment_bytes=config.audit_segment_bytes,
            head_every_s=config.audit_head_every_s,
        )
        names = AuditNames(self._store, lane) if config.audit_key_names == "hmac" else None
        self._context = _context()
        signatures = SignatureCache(config.signature_cache, time.monotonic)
        remember_signatures(signatures)
        shares = ShareCache(_within_locked_memory(config.share_cache), time.monotonic)
        holder = ShareHolder(cluster, identity.signing, self._store, catalogue, token.algorithms, ledger, shares)
        conversation = Conversation(
            cluster,
            identity.signing,
            dict(token.missing),
            config.acknowledge,
            holder.own_secret,
            clock.now_ms,
            with_room=shares.with_room,
        )
        orders = BalancerOrders(cluster, self._store, time.monotonic, config.changes_per_s, config.limits.burst_s)
        renewer = Renewer(cluster, self._own.secrets, catalogue, holder, orders, clock.now_ms)
        coordinator = Coordinator(
            cluster, identity.signing, catalogue, conversation, orders, clock.now_ms, time.monotonic
        )
        peers = Servers(cluster)

        def make_talker() -> Talker:
            channel = Channel(self._own, peers, self._context, watchful=True)
            channel.dial(peers)
            return Talker(channel, token.lane())

        self._local: Worker[Lane] = Worker("local", self._mailbox, token.lane, lambda state: None)
        jobs = Jobs()
        self._talkers = [
            Worker(f"talker-{i}", self._mailbox, make_talker, Talker.close, jobs, Talker.drop_late)
            for i in range(config.workers)
        ]
        self._slow: Worker[Lane] = Worker("slow", self._mailbox, token.lane, lambda state: None)
        # One creation at a time, and few that wait: making keys must not keep the node from using them.
        self._dealer: Worker[Talker] = Worker(
            "dealer", self._mailbox, make_talker, Talker.close, Jobs(MAX_CREATIONS_WAITING), Talker.drop_late
        )
        self._mover: Worker[Talker] = Worker(
            "mover", self._mailbox, make_talker, Talker.close, Jobs(MAX_MOVES_WAITING), Talker.drop_late
        )
        self._keeper = Keeper(
            token,
            config.care,
            [sys.executable, "-P", "-m", "nodes", "check-token", "--same-kek", "--config", str(config.path)],
            renewed=lambda: self._mailbox.post(self._handlers.token_renewed),
        )
        # Late, so that nobody who is let in has to wait for the rest.
        first, *others = self._own.served(config.bind)
        self.endpoint = first.endpoint
        self._listener = Listener(first.pair, first.endpoint, cluster, config.service_limits)
        if others:
            self._listener.serve({each.endpoint: each.pair for each in (first, *others)})
        sources = [self._mailbox.fileno(), *([] if lifeline is None else [lifeline])]
        versions = self._listener.versions
        self._fast = FastPath(self._listener.router, *sources, lowest=versions.lowest, highest=versions.highest)
        self._handlers = Handlers(
            node=identity.name,
            boot=boot,
            cluster=cluster,
            token=token,
            lane=lane,
            catalogue=catalogue,
            holder=holder,
            renewer=renewer,
            conversation=conversation,
            coordinator=coordinator,
            trial=Trial(cluster, identity.name, holder, conversation, clock.now_ms),
            orders=orders,
            audit=self._audit,
            audit_strict=config.audit_mode == "strict",
            audit_name=names,
            witness=Witness(identity.name, cluster, self._audit.kept),
            local=self._local,
            slow=self._slow,
            talkers=self._talkers[0],
            dealer=self._dealer,
            mover=self._mover,
            replier=self._listener,
            cache_limits=config.key_cache,
            signatures=signatures,
            quotas=Quotas(self._store),
            ledger=ledger,
            limits=self._listener.limits,
            generation=GenerationLimit(config.generate_part, time.monotonic()),
            counts=self._listener.counts,
            network_us=self._listener.network_us,
            health=self._keeper,
            host=lambda: host_health(config.data),
            known=self._listener.connections.known,
            connected=self._listener.connections.count_of,
            fast=None if armed() else self._fast,
            tracer=self._tracer,
            returning=Returning(cluster, identity.name, holds=bool(catalogue.known())),
            curve_secrets=self._own.secrets,
        )
        self._fast.serve(self._listener.open, self._listener.lost, self._handlers, self._audit.uses, self._audit.drain)
        catalogue.watch(lambda entry: self._mailbox.post(lambda: self._handlers.key_changed(entry)))
        conversation.outdated = lambda: self._mailbox.post(self._handlers.look_again)
        self._metrics = None
        if config.metrics is not None:
            from nodes.metrics import BOUNDS_S, MetricsServer  # which few nodes need, and takes a while

            self._metrics = MetricsServer(
                config.metrics,
                lambda take: self._mailbox.post(lambda: take(self._handlers.snapshot(BOUNDS_S))),
            )
        self._announcer = Announcer(cluster, boot, lambda: self._own.published(config.publish_bind), self._told)
        cluster.subscribe(self._taken)
        self._fast.cluster = cluster.cluster

    def _join_token(self, config: NodeConfig) -> int | None:
        """Say who uses the token; of one that is another node's, the descriptor that keeps it from being changed."""
        home = config.token.shared_with
        if home is None:
            tell_owner(config.data, self._mark)
            return None
        held = hold(home)
        leave_mark(home, self._mark)
        return held

    def _told(self) -> tuple[int, bool]:
        """What is published. It is read beside the loop, and needs no more than to be nearly true."""
        return self._handlers.pending, self._handlers.serves and not self._stopping_s

    def _taken(self, before: Cluster, now: Cluster) -> None:
        """By the thread that brought the manifest: no use is answered by the one of before from here on."""
        self._fast.cluster = now
        self._announcer.wake()
        self._mailbox.post(lambda: self._manifest_taken(before, now))

    def _manifest_taken(self, before: Cluster, now: Cluster) -> None:
        """By the loop: who may do what is asked of the manifest each time, so only what was kept is looked after."""
        self._store.note_cluster_serial(now.serial)
        self._handlers.token_alarm = misplaced(now, self._mark, self._sharers)
        if self._handlers.token_alarm:
            log.error("a shared token crosses failure domains", reason=self._handlers.token_alarm)
        served = self._own.served(self._bind)
        if served:
            self._listener.serve({each.endpoint: each.pair for each in served})
        self._listener.members_changed(before, now)
        self._handlers.members_changed(before, now)

    def stop(self) -> None:
        """Begin to stop: no new requests, those under way get up to 5 s. Safe in a signal handler."""
        self._mailbox.post(self._begin_stop)

    def _begin_stop(self) -> None:
        if not self._stopping_s:
            self._stopping_s = time.monotonic() + DRAIN_S
            self._notifier.stopping()
            log.info("stopping", under_way=self._handlers.pending)

    def run(self) -> None:
        """Serve until stopped; then drain and close everything."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        signal.signal(signal.SIGHUP, lambda *_: self._mailbox.post(self._look))
        self._keeper.start()
        self._announcer.start()
        leave_out_of_collection()
        log.info("serving", endpoint=self.endpoint)
        self._notifier.ready("serving")
        try:
            self._loop()
        finally:
            self._close()
        log.info("stopped")

    def _loop(self) -> None:
        next_tick_s = next_look_s = 0.0
        fast = self._fast
        while True:
            now = time.monotonic()
            if self._beat is not None:
                self._beat.looped_s, self._beat.serves = now, True
            self._notifier.alive()
            if self._stopping_s and (not self._handlers.pending or now >= self._stopping_s):
                return
            if now >= next_tick_s:
                self._look()
                self._handlers.tick(SETTLE_AFTER_MS)
                next_tick_s = now + TICK_S
            ready = fast.run(max(0, int(min(next_tick_s - now, LOOK_EVERY_S) * 1000)), BATCH)
            if now >= next_look_s:
                next_look_s = now + LOOK_EVERY_S
                self._listener.look()
            if ready & ENDING and self._lifeline is not None:
                fast.unwatch(self._lifeline)
                self._begin_stop()
            if ready & MAIL:
                self._mailbox.run()
            fast.paused = bool(self._stopping_s)

    def _look(self) -> None:
        """Take a newer manifest that was put into its file; leave the endpoints that the one in force left out."""
        self._membership.look()
        self._listener.settle()

    def _end(self, *workers: Worker[Any]) -> None:
        for worker in workers:
            worker.finish()
        for worker in workers:
            worker.join(DRAIN_S)
        self._mailbox.run()

    def _close(self) -> None:
        if self._beat is not None:
            self._beat.looped_s = 0.0
        self._announcer.close(DRAIN_S)
        self._keeper.stop(DRAIN_S)
        if self._metrics is not None:
            self._metrics.close()
        self._handlers.close()
        self._end(self._local, self._slow, self._mover, *self._talkers)
        self._audit.stop(DRAIN_S)
        self._handlers.farewell()
        self._end(self._dealer)
        self._listener.close()
        self._tracer.close()
        self._audit.close()
        self._store.close()
        self._context.destroy(linger=100)
        self._mailbox.close()
