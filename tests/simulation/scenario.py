"""One seed: a cluster, clients, faults and a malicious part; the real code of nodes, registry and clients in it.

``run_seed`` runs it and raises ``Violated`` with the seed, the last events and the command that runs it again.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import structlog
from casting import (
    BALANCER,
    CLUSTER,
    CURVE,
    KEYS,
    MEMBERS,
    NODES,
    WIDE_NODES,
    SimHealth,
    SimLane,
    SimToken,
    curve_secret,
    parses_once,
    verifies_once,
)
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from machine import FRESH_FILES, SQLITE, Crashed, Disk, Network, Sim, SimChannel, SimListener, SimWorker, Violated

import balancer.database
import engine.protocol.signed
import nodes.deal
import nodes.store
from balancer.loop import Service, Standing
from balancer.registry import SqliteRegistry
from engine import failpoints
from engine.client.admission import ServiceLimits
from engine.client.calls import Calls, Exchange, Pause
from engine.errors import (
    AuditUnavailable,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyExists,
    ShareCorrupt,
)
from engine.protocol.grant import Grant, is_trial
from engine.protocol.manifest import (
    CLOCK_SKEW_MS,
    AbortNotice,
    Cluster,
    CommitCertificate,
    Receipt,
    aborts,
    certificates,
    open_certificate,
    read_key_manifest,
    receipts,
    reshare_orders,
)
from engine.protocol.requests import (
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ABORT,
    SHARE_COMMIT,
    SHARE_RELEASE,
    Abort,
    HostHealth,
    Operate,
    ServiceCount,
    ShareCommit,
    ShareRelease,
)
from engine.protocol.routing import Router
from engine.protocol.signed import read_unverified, sign_envelope
from engine.protocol.wire import Codec
from nodes.cache import CacheLimits
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.deal import Conversation, Talker
from nodes.gather import Gathering
from nodes.handlers import Handlers
from nodes.holder import ShareHolder
from nodes.ledger import MARK_EVERY_MS, RETRY_WINDOW_MS, GrantLedger
from nodes.limits import GenerationLimit
from nodes.orders import BalancerOrders
from nodes.peers import HEDGE_MIN_S
from nodes.quotas import Quotas
from nodes.refresh import Coordinator
from nodes.remember import SignatureCache
from nodes.renewer import Renewer
from nodes.shares import ShareCache
from nodes.store import ShareStore
from nodes.trial import Trial
from nodes.witness import Witness

BASE_MS = 1_800_000_000_000
CHAOS_S = {"short": 3.0, "long": 6.5}
"""The time in which things go wrong, of a short and of a long course; then everything is healed."""
THIEF_S = 1.5
"""For how long after that a thief goes on."""
SHORT_PART = 0.65
"""How many of the seeds are short."""
HEAL_S = 12.0
"""How long the cluster gets to catch up before it is checked."""
ORPHAN_S = 75.0
LATE_S = 0.02
MARK_S = (MARK_EVERY_MS + 1500) / 1000
"""By then a node has written down how late it is: the mark is looked at once a second."""
KEKS = {name: os.urandom(32) for name in WIDE_NODES}
DESTROYED = 3
"""The registry's number of that state."""
FOLDER = Path(__file__).parent.relative_to(Path(__file__).parents[2])
_grants = Codec(Grant, "grant", 2048)


@dataclass
class Acknowledged:
    """A key that a client was told exists."""

    name: str
    algorithm: str
    key_id: str
    check_value: bytes
    public_key: str
    order: bytes
    stored: tuple[str, ...]
    ciphertexts: list[tuple[bytes, bytes]] = field(default_factory=list)
    macs: dict[bytes, bytes] = field(default_factory=dict)
    epoch: int = 1
    destroying: bool = False
    destroyed: bool = False


class Proc:
    """A process: it lives, dies with all that is in its memory, and starts again from its disk."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.sim = world.sim
        self.name = name
        self.disk = Disk(world.sim, name)
        self.disk.on_crash = self.crash
        self.boot = 0
        self.crashes = 0
        self.up = False
        self.skew_ms = 0

    def now_ms(self) -> int:
        """The machine's wall clock."""
        return BASE_MS + int(self.sim.now * 1000) + self.skew_ms

    def steady_ms(self) -> int:
        """The machine's clock that nobody can set."""
        return int(self.sim.now * 1000)

    def clock(self) -> float:
        return self.sim.now

    def alive(self) -> Callable[[], bool]:
        """Whether this very start still runs."""
        boot = self.boot
        return lambda: self.up and self.boot == boot

    def inside(self, do: Callable[[], Any]) -> Callable[[], None]:
        """``do`` as the process's own action, if this start still runs."""
        alive = self.alive()

        def action() -> None:
            if alive():
                before, self.sim.running = self.sim.running, self
                try:
                    do()
                except Crashed:
                    pass
                finally:
                    self.sim.running = before

        return action

    def crash(self) -> None:
        if not self.up:
            return
        self.up = False
        self.crashes += 1
        self.sim.tell(f"{self.name} dies")
        self.world.net.gone(self.name)
        self.disk.power_cut()

    def start(self) -> None:
        if self.up:
            return
        self.boot += 1
        self.up = True
        self.sim.tell(f"{self.name} starts")

        def opened() -> None:
            try:
                self._open()
            except (EngineError, sqlite3.Error) as error:
                if not self.disk.full:
                    raise
                self.sim.tell(f"{self.name} does not start: {type(error).__name__}")
                self.crash()
                self.sim.after(0.5, self.start)

        self.inside(opened)()

    def _open(self) -> None:
        raise NotImplementedError


class SimAudit:
    """Stands in for the audit log: a record is durable a little after it was written, and the disk can be full."""

    head = None
    broken = ""

    def __init__(self, proc: Proc) -> None:
        self._proc = proc
        self._number = 0

    @property
    def problem(self) -> str:
        return "no space left on device" if self._proc.disk.full else ""

    def write(self, record: Any) -> int:
        self._check()
        self._number += 1
        return self._number

    def when_durable(self, number: int, then: Callable[[AuditUnavailable | None], None]) -> None:
        def durable() -> None:
            try:
                self._check()
            except AuditUnavailable as failure:
                then(failure)
            else:
                then(None)

        self._proc.sim.after(0.0005 + self._proc.sim.random.random() * 0.002, self._proc.inside(durable))

    def _check(self) -> None:
        if self.problem:
            raise AuditUnavailable(f"{self._proc.name}: the audit log can't be written: {self.problem}")


class WatchedHolder(ShareHolder):
    """The real holder; what it releases is held against what may be released."""

    world: World

    def own_share(self, lane: Any, entry: Any) -> Any:
        self._opened_last = entry
        return super().own_share(lane, entry)

    def release(self, lane: Any, body: Any, sender: Any) -> Any:
        reply = super().release(lane, body, sender)
        self.world.released(self._node, body, sender, self._opened_last)
        if self._node == self.world.liar:
            flipped = bytearray(reply.y)
            flipped[self.world.sim.random.randrange(len(flipped))] ^= 1 << self.world.sim.random.randrange(8)
            return type(reply)(reply.x, bytes(flipped), reply.salt)
        return reply


class WatchedGathering(Gathering):
    """The real gathering; whom it asks is held against what it may ask, and whom it blames against who lies."""

    world: World

    def __init__(self, *given: Any, **more: Any) -> None:
        self.asked_at: dict[str, float] = {}
        self.ended: set[str] = set()
        super().__init__(*given, **more)
        self._had = len(self.shares)

    def to_ask(self, now_s: float) -> list[str]:
        chosen = super().to_ask(now_s)
        late = sum(now_s - since >= HEDGE_MIN_S for who, since in self.asked_at.items() if who not in self.ended)
        for holder in chosen:
            if holder in self.asked_at:
                raise Violated(f"a gathering asks {holder} twice")
            self.asked_at[holder] = now_s
        fruitless = len(self.ended) - (len(self.shares) - self._had)
        if chosen and not self._tried and len(self.asked_at) > self._manifest.threshold - self._had + fruitless + late:
            raise Violated(f"a gathering asks {list(self.asked_at)}; {fruitless} gave nothing, {late} are late")
        return chosen

    def arrived(self, holder: str, share: Any, salt: bytes) -> None:
        if holder in self.asked_at:
            self.ended.add(holder)
        super().arrived(holder, share, salt)
        if holder == self.world.liar and holder in self.asked_at and holder not in self.corrupt:
            raise Violated(f"{holder} lied and is not named; {self.corrupt} are")

    def failed(self, holder: str, why: str, **more: Any) -> None:
        self.ended.add(holder)
        super().failed(holder, why, **more)


class WatchedConversation(Conversation):
    """The real conversation; what a gathering ends with is held against what its holders sent."""

    world: World

    def gather(self, talker: Any, entry: Any, *rest: Any, **more: Any) -> Any:
        begun = self._clock()
        if entry.row.state == "prepared":  # a trial: what is wrong in it is somebody else's doing
            self.world.trials += 1
            return super().gather(talker, entry, *rest, **more)
        self.world.gathers_by(self._node, rest[0])
        try:
            gathered = super().gather(talker, entry, *rest, **more)
        except ShareCorrupt as error:
            if set(error.holders) != {self.world.liar}:
                raise Violated(
                    f"{self._node} blames {error.holders}; {self.world.liar or 'nobody'} lies: {error}"
                ) from None
            raise
        except EngineError:
            raise
        except Exception as error:
            raise Violated(f"{self._node}: gathering {entry.row.name!r} failed: {error!r}") from error
        if not set(gathered.corrupt) <= {self.world.liar}:
            raise Violated(f"{self._node} names {gathered.corrupt} as liars; {self.world.liar or 'nobody'} lies")
        self.world.gathers += 1
        self.world.check_deadline(self._node, begun, rest)
        return gathered


class Node(Proc):
    """One node, from its disk."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self._newest_ms = 0
        self._looked: list[tuple[float, int]] = []
        self.listener: SimListener
        self.handlers: Handlers

    def _open(self) -> None:
        world, sim, alive = self.world, self.sim, self.alive()
        lane: Any = SimLane(KEKS[self.name])
        token: Any = SimToken()
        path: Any = self.disk.path("shares.db")
        store = ShareStore(path, self.name, lane)
        store.note_cluster_serial(world.cluster.serial)
        self.catalogue = Catalogue(store.rows())
        self.store = store
        self.listener = SimListener(world.net, self.name, world.cluster)
        shares = ShareCache(CacheLimits(2.0, 16), self.clock)
        self.trusted = TrustedClock(store.clock_mark().mark_ms, wall_ms=self.now_ms, steady_ms=self.steady_ms)
        ledger = GrantLedger(store, self.trusted, monotonic_s=self.clock)
        ledger.flush()
        now_ms = self.trusted.now_ms
        holder = WatchedHolder(world.cluster, KEYS[self.name], store, self.catalogue, token.algorithms, ledger, shares)
        holder.world = world
        conversation = WatchedConversation(
            world.cluster,
            KEYS[self.name],
            token.missing,
            "up",
            holder.own_secret,
            now_ms,
            clock=self.clock,
            with_room=shares.with_room,
        )
        conversation.world = world
        orders = BalancerOrders(world.cluster, store, self.clock)
        secrets = [curve_secret(self.name)]
        renewer = world.make_renewer(world.cluster, lambda: secrets, self.catalogue, holder, orders, now_ms)
        coordinator = world.make_coordinator(
            world.cluster, KEYS[self.name], self.catalogue, conversation, orders, now_ms, self.clock
        )

        def talker() -> Talker:
            channel: Any = SimChannel(world.net, self.name, CURVE[self.name])
            return Talker(channel, lane)

        def worker(state: Any, limit: int = 1_000, threads: int = 0) -> Any:
            return SimWorker(sim, alive, state, limit, threads, self.inside)

        replier: Any = self.listener
        audit: Any = SimAudit(self)
        self.handlers = Handlers(
            node=self.name,
            boot=sim.random.randbytes(16),
            cluster=world.cluster,
            token=token,
            lane=lane,
            catalogue=self.catalogue,
            holder=holder,
            conversation=conversation,
            audit=audit,
            audit_strict=world.audit_strict,
            audit_name=None,
            witness=Witness(self.name, world.cluster, ()),
            local=worker(lane),
            slow=worker(lane),
            talkers=worker([talker(), talker()], threads=2),
            dealer=worker(talker(), limit=64, threads=1),
            mover=worker(talker(), limit=64, threads=1),
            replier=replier,
            cache_limits=CacheLimits(3.0, 8, max_uses=6),
            signatures=SignatureCache(CacheLimits(60.0, 1000), self.clock),
            quotas=Quotas(store),
            renewer=renewer,
            coordinator=coordinator,
            trial=Trial(world.cluster, self.name, holder, conversation, now_ms),
            orders=orders,
            ledger=ledger,
            limits=ServiceLimits(),
            health=SimHealth(),
            host=lambda: HostHealth(0, 0, 0, 0),
            counts=lambda admission: ServiceCount(admission.under_way, 0, 0, 0, 0, admission.refused, 0, 0, 0),
            network_us=lambda: 0,
            generation=GenerationLimit(1.0, 0.0),
            clock=self.clock,
        )
        self.catalogue.watch(lambda entry: self._soon(lambda: self.handlers.key_changed(entry)))
        conversation.outdated = lambda: self._soon(self.handlers.look_again)
        world.net.listeners[self.name] = (self.listener, self.inside(self._take_in))
        self._tick(self.inside(self._ticks))

    def _soon(self, do: Callable[[], None]) -> None:
        """What the real server does by its mailbox."""
        self.sim.after(0.00001, self.inside(do))

    def read_since(self, since_s: float) -> bool:
        """Whether it has begun to read the registry's books since then, is done, and has nothing under way."""
        handlers = self.handlers
        return handlers._looked_s >= since_s and not handlers._catching_up and not handlers.pending

    def look_at_clock(self) -> None:
        """Note what the machine's clock says as the node reads it."""
        self._looked.append((self.sim.now, self.now_ms()))

    def latest_ms(self) -> int:
        """The latest time that this start has seen, or that an earlier one saw long enough before it died."""
        return max([self._newest_ms, *(each for _, each in self._looked)])

    def crash(self) -> None:
        long_ago = self.sim.now - MARK_S
        self._newest_ms = max([self._newest_ms, *(each for when, each in self._looked if when < long_ago)])
        self._looked.clear()
        super().crash()

    def rows(self) -> list[Any]:
        """What is in its store, also while the node is down."""
        found: list[Any] = self.store.rows()
        return found

    def _take_in(self) -> None:
        while (incoming := self.listener.receive()) is not None:
            self.world.seen(self.name, incoming)
            self.handlers.handle(incoming)

    def _tick(self, again: Callable[[], None]) -> None:
        self._again = again
        self.sim.after(self.sim.random.random(), again)

    def _ticks(self) -> None:
        self.handlers.tick(3_000)
        self.sim.after(1.0, self._again)


class Registry(Proc):
    """The balancer's service with its registry."""

    def _open(self) -> None:
        path: Any = self.disk.path("registry.db")
        world, cluster = self.world, self.world.cluster
        self.listener = SimListener(world.net, self.name, cluster)
        self.registry = world.make_registry(path, cluster, KEYS[self.name], self.now_ms())
        loop: Any = mock.NonCallableMock(standing=Standing())
        self.service = Service(
            self.listener, self.registry, cluster, self.name, loop, ServiceLimits(), Path(), self.now_ms
        )
        world.net.listeners[self.name] = (self.listener, self.inside(self.service.answer_waiting))


class Client:
    """A client: the real ``Calls``, one channel, one call after the other. Its clock is right."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.sim = world.sim
        self.name = name
        channel: Any = SimChannel(world.net, f"client-{name}", CURVE[name])
        self.channel = channel
        channel.arrived = self._arrived
        router = Router(world.cluster)
        self.calls = Calls(
            world.cluster,
            KEYS[name],
            router,
            clock=lambda: self.sim.now,
            now_ms=lambda: BASE_MS + int(self.sim.now * 1000),
            random_bytes=self.sim.random.randbytes,
        )
        self._waiting: dict[int, Callable[[Any], None]] = {}
        self.sent: list[Exchange] = []
        self.busy = 0

    def _arrived(self, arrival: Any) -> None:
        resume = self._waiting.pop(arrival.token, None)
        if resume is not None:
            resume(arrival)

    def call(
        self, what: str, make: Callable[[], Any], timeout_s: float, done: Callable[[Any, Exception | None], None]
    ) -> None:
        """Run one call; ``done(result, error)``. It must end by its deadline."""
        until_s = self.sim.now + timeout_s
        self.busy += 1

        def ended(result: Any, error: Exception | None) -> None:
            self.busy -= 1
            told = type(error).__name__ if error else "ok"
            self.sim.tell(f"{self.name}: {what}: {told}")
            if self.sim.now > until_s + LATE_S:
                raise Violated(f"{self.name}: {what} ended {self.sim.now - until_s:.3f} s after its deadline")
            if error is not None and not isinstance(error, EngineError | ValueError):
                raise Violated(f"{self.name}: {what} failed with {error!r}") from error
            done(result, error)

        def step(send: Any, throw: Exception | None) -> None:
            try:
                wanted = generator.throw(throw) if throw is not None else generator.send(send)
            except StopIteration as end:
                ended(end.value, None)
                return
            except (EngineError, ValueError, TypeError) as error:
                ended(None, error)
                return
            if isinstance(wanted, Pause):
                self.sim.after(wanted.seconds, lambda: step(None, None))
                return
            self.sent.append(wanted)
            try:
                token = self.channel.start(wanted.peer, wanted.verb, wanted.body, wanted.timeout_s)
            except EngineError as error:
                failure = error
                self.sim.after(0.0005, lambda: step(None, failure))
                return
            self._waiting[token] = lambda arrival: (
                step(arrival.reply, None) if arrival.reply is not None else step(None, arrival.error)
            )

        try:
            generator = make()
        except (EngineError, ValueError) as error:
            ended(None, error)
            return
        step(None, None)


Script = Generator[Any, Any, None]


class World:
    """Everything of one seed."""

    cluster: Cluster = CLUSTER
    node_names: tuple[str, ...] = NODES
    make_renewer: type[Renewer] = Renewer
    make_coordinator: type[Coordinator] = Coordinator
    make_registry: type[SqliteRegistry] = SqliteRegistry

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sim = Sim(seed)
        self.net = Network(self.sim)

        self.gathers = 0
        self.releases = 0
        self.refusals = 0
        self.acknowledged: dict[str, list[Acknowledged]] = {}
        self.grants_seen: list[tuple[str, bytes, bytes]] = []
        self.used: dict[tuple[str, str, bytes], tuple[bytes, int, float]] = {}
        self.on_release: Callable[[str, Any, Any], None] = lambda holder, body, sender: None
        self.gathered: set[tuple[str, bytes]] = set()
        self.refreshes = self.reshares = self.trials = 0
        self.checked = 0
        self.healed = False
        self.nodes = {name: Node(self, name) for name in self.node_names}
        self.registry = Registry(self, BALANCER)
        self.procs: dict[str, Proc] = {**self.nodes, BALANCER: self.registry}
        self._clients = itertools.count()
        self.scripts = 0
        WatchedGathering.world = self
        self._cast(self.sim.random)

    def _cast(self, r: Random) -> None:
        """Draw what kind of course this is, and who is in it."""
        self.threshold, self.shares = r.choice(((2, 3), (2, 3), (2, 4), (3, 4)))
        self.length = "short" if r.random() < SHORT_PART else "long"
        self.chaos_s = CHAOS_S[self.length]
        self.audit_strict = r.random() < 0.3
        self.evil = r.choice(("", "", "liar", "thief", "thief", "rogue"))
        self.evil_node = r.choice(self.node_names)
        self.liar = self.evil_node if self.evil == "liar" else ""
        self.thief = self.evil_node if self.evil == "thief" else ""
        self.names = ("k",) if self.length == "short" else r.choice((("k",), ("k", "l")))
        drawn = {
            "two names": len(self.names) > 1,
            "two creators": r.random() < 0.25,
            "restart attack": r.random() < 0.2 and self.evil == "thief",
            "clock attack": r.random() < 0.4 and self.evil == "thief" and self.length == "long",
        }
        self.features = [self.length, f"{self.threshold} of {self.shares}", self.evil or "all honest"]
        self.features += [name for name, there in drawn.items() if there]

    def spare(self) -> str:
        """A node that may be down while all keys must be of use; empty if there is none."""
        return self.sim.random.choice(self.node_names)

    # --- what is observed ---

    def seen(self, node: str, incoming: Any) -> None:
        """A request reached a node; the thief keeps the grants that come by it."""
        if incoming.request.verb == SHARE_RELEASE:
            self.nodes[node].look_at_clock()
        if node != self.thief:
            return
        request = incoming.request
        if request.verb == SHARE_RELEASE:
            body = REQUEST_CODECS[SHARE_RELEASE].decode(request.body)
            self.grants_seen.append((node, body.key_id, body.grant))
        elif incoming.member.role == "client" and request.verb in (
            "encrypt",
            "decrypt",
            "mac",
            "sign",
            "verify",
            "verify-mac",
        ):
            operate: Operate = REQUEST_CODECS[request.verb].decode(request.body)
            if operate.grant:
                self.grants_seen.append((node, operate.key_id, operate.grant))

    def released(self, holder: str, body: Any, sender: Any, entry: Any) -> None:
        """A holder gave its share away: was it right to?"""
        self.releases += 1
        signed = read_unverified(body.grant)
        grant = _grants.decode(signed.payload)
        proc = self.nodes[holder]
        manifest = entry.manifest
        name = manifest.name
        why = ""
        if MEMBERS.get(signed.issuer) is None or MEMBERS[signed.issuer].role != "client":
            why = f"its issuer {signed.issuer} is no client"
        elif not verifies_once(MEMBERS[signed.issuer].sign_public, *_signature(body.grant)):
            why = "its signature is wrong"
        elif any(not self.cluster.allows(signed.issuer, each, name) for each in grant.operations):
            why = f"{signed.issuer} may not {grant.operations} with {name!r}"
        elif grant.key_id != manifest.key_id or (grant.version, grant.epoch) != (manifest.version, manifest.epoch):
            why = "it is for another key, version or epoch"
        elif grant.combiner != sender.name:
            why = f"it names {grant.combiner}, {sender.name} asks"
        elif sender.name not in {each.node for each in manifest.holders}:
            why = f"{sender.name} is no eligible combiner"
        elif max(proc.trusted.now_ms(), proc.latest_ms()) > grant.expires_ms + CLOCK_SKEW_MS:
            why = "it has expired, by the latest time that the holder has seen"
        elif is_trial(body.grant):
            why = self._bad_trial(signed.issuer, sender.name, entry)
        elif entry.row.state != "committed" and not self._certified(body.certificate, entry):
            why = f"the share is {entry.row.state}"
        why = why or self._used_before(holder, proc, signed, grant.nonce)
        self.on_release(holder, body, sender)
        if why:
            raise Violated(
                f"{holder} released its share of {name!r} to {sender.name} for a grant that is no good: {why}"
            )

    def _bad_trial(self, issuer: str, combiner: str, entry: Any) -> str:
        """Why a prepared share is not for this trial; empty if it is."""
        ordered = read_unverified(entry.manifest.change)
        order = reshare_orders.decode(ordered.payload)
        if (ordered.issuer, order.trial) != (issuer, combiner):
            return f"{ordered.issuer} has {order.trial or 'nobody'} try it"
        if entry.row.state != "prepared" or entry.row.document:
            return f"the share is {entry.row.state}"
        return ""

    def _certified(self, certificate: bytes, entry: Any) -> bool:
        """Whether it is of that very epoch: who has pledged not to follow it keeps both shares, and each can be had."""
        try:
            open_certificate(certificate, entry.record, self.cluster)
        except EngineError:
            return False
        return True

    def _used_before(self, holder: str, proc: Proc, signed: Any, nonce: bytes) -> str:
        """A grant is good once at a holder; within two seconds the same process may answer the same grant again."""
        first = self.used.setdefault((holder, signed.issuer, nonce), (signed.digest, proc.boot, self.sim.now))
        digest, boot, since_s = first
        if digest != signed.digest:
            return "another grant with its nonce was used"
        if proc.boot != boot:
            return "it was used before the holder's restart"
        return "it was used" if self.sim.now > since_s + RETRY_WINDOW_MS / 1000 + 0.001 else ""

    def gathers_by(self, node: str, grant: bytes) -> None:
        """A combiner begins to gather by a grant: once."""
        digest = read_unverified(grant).digest
        if (node, digest) in self.gathered:
            raise Violated(f"{node} gathers by a grant that it has gathered by before")
        self.gathered.add((node, digest))

    def check_deadline(self, node: str, begun: float, rest: tuple[Any, ...]) -> None:
        """A gathering keeps its deadline."""
        deadline_s = rest[1]
        if isinstance(deadline_s, float) and self.sim.now > deadline_s + LATE_S:
            raise Violated(f"{node}: a gathering ended {self.sim.now - deadline_s:.3f} s after its deadline")

    def step_clock(self, proc: Proc, step_ms: int) -> None:
        """Someone sets a process's wall clock."""
        self.sim.tell(f"the clock of {proc.name} steps by {step_ms} ms")
        proc.skew_ms += step_ms

    # --- scripts ---

    def play(self, name: str, make_script: Callable[[Client], Script]) -> None:
        """Run a client's script: it yields (what, make, timeout) and is sent (result, error), or seconds to wait."""
        self.scripts += 1
        client = Client(self, name)
        script = make_script(client)

        def step(value: Any) -> None:
            try:
                wanted = script.send(value)
            except StopIteration:
                self.scripts -= 1
                return
            if isinstance(wanted, int | float):
                self.sim.after(float(wanted), lambda: step(None))
                return
            what, make, timeout_s = wanted
            client.call(what, make, timeout_s, lambda result, error: step((result, error)))

        self.sim.after(0.0, lambda: step(None))

    def acknowledge(self, name: str, algorithm: str, description: Any, order: bytes) -> Acknowledged:
        """A client was told that its key exists."""
        record = description.record
        known = self.acknowledged.setdefault(name, [])
        info = description.info
        for each in known:
            if each.key_id == info.key_id:
                if each.check_value != record.manifest.check_value:
                    raise Violated(f"a retry of the order of {name!r} gave another key")
                return each
        alive = [each for each in known if not each.destroying]
        if alive:
            raise Violated(f"two keys have the name {name!r}: {alive[0].key_id} and {info.key_id}")
        needed = min(self.shares, self.threshold + 1)
        if len(info.stored) < needed:
            raise Violated(f"{name!r} was acknowledged with the receipts of {info.stored}; {needed} are needed")
        made = Acknowledged(
            name, algorithm, info.key_id, record.manifest.check_value, info.public_key, order, info.stored
        )
        known.append(made)
        return made

    def checked_use(self, key: Acknowledged, verb: str, client: Client, timeout_s: float) -> Script:
        """Use a key once and hold the result against what is known of it; returns whether it worked."""
        name, r = key.name, self.sim.random
        if verb == "encrypt":
            plain = r.randbytes(r.choice((1, 16, 40)))
            result, error = yield (
                f"encrypt {name}",
                lambda: client.calls.encrypt(name, plain, b"a", timeout_s),
                timeout_s,
            )
            if error is None:
                key.ciphertexts.append((plain, result))
        elif verb == "decrypt":
            if not key.ciphertexts:
                return (yield from self.checked_use(key, "encrypt", client, timeout_s))
            plain, sealed = r.choice(key.ciphertexts)
            result, error = yield (
                f"decrypt {name}",
                lambda: client.calls.decrypt(name, sealed, b"a", timeout_s),
                timeout_s,
            )
            if error is None and result != plain:
                raise Violated(f"decrypt with {name!r} gave another plaintext")
            if isinstance(error, InvalidTag) and self._same_key(key):
                raise Violated(f"a ciphertext of {name!r} does not open any more")
        elif verb == "mac":
            message = bytes([r.randrange(3)])
            result, error = yield f"mac {name}", lambda: client.calls.mac(name, message, timeout_s), timeout_s
            if error is None and key.macs.setdefault(message, result) != result and self._same_key(key):
                raise Violated(f"two MACs of one message with {name!r} differ")
        else:
            message = r.randbytes(8)
            result, error = yield f"sign {name}", lambda: client.calls.sign(name, message, None, timeout_s), timeout_s
            if error is None and self._same_key(key):
                try:
                    load_pem_public_key(key.public_key.encode()).verify(result, message)  # type: ignore[union-attr, call-arg, arg-type]
                except Exception:
                    raise Violated(f"a signature with {name!r} does not verify") from None
        if isinstance(error, InvalidSignature):
            raise Violated(f"{verb} with {name!r}: {error}")
        return error

    def _same_key(self, key: Acknowledged) -> bool:
        """Whether the name can only be this key's."""
        return not key.destroying and len(self.acknowledged[key.name]) == 1


def _signature(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """The signature of a document that one member has signed, what it is over, and the label of that."""
    envelope = engine.protocol.signed._envelopes.decode(raw)
    value, body = envelope.signatures[0].value, envelope.body
    if len(value) == 64:
        return value, body, engine.protocol.signed.DOMAIN
    return value[:64], engine.protocol.signed._root(value, body) or b"", engine.protocol.signed.TREE_DOMAIN


USES = {"aes-256-gcm": ("encrypt", "decrypt"), "hmac-sha256": ("mac",), "ed25519": ("sign",)}


# --- what clients do ---


def owner(world: World, client: Client, name: str, *, destroys: bool) -> Script:
    """Creates a key, retries until it knows, uses it, perhaps repeats its order, perhaps destroys it."""
    r = world.sim.random
    yield r.random() * 0.3
    algorithm = r.choice(tuple(USES))
    key: Acknowledged | None = None
    for _ in range(3):
        before = len(client.sent)
        timeout_s = r.choice((1.0, 4.0))
        _, error = yield (
            f"create {name}",
            partial(client.calls.create_key, name, algorithm, world.threshold, world.shares, timeout_s),
            timeout_s,
        )
        orders = [each for each in client.sent[before:] if each.verb == "generate"]
        if error is None:
            description = client.calls._descriptions.get(name)
            key = world.acknowledge(name, algorithm, description, orders[-1].body)
        elif orders and not isinstance(error, KeyExists):
            key = yield from repeat_order(world, client, name, algorithm, orders[-1].body)
        if key is not None or isinstance(error, KeyExists):
            break
        yield r.random()
    if key is None:
        return
    for _ in range(r.randrange(1, 2 if world.length == "short" else 5)):
        yield r.random() * (0.6 if world.length == "short" else 1.5)
        yield from world.checked_use(key, r.choice(USES[algorithm]), client, r.choice((0.3, 1.0, 2.0)))
        if r.random() < 0.25:
            yield from repeat_order(world, client, name, algorithm, key.order)
        change = r.random()
        if change < 0.15:
            yield from refresh(world, client, key)
        elif change < 0.3:
            yield from reshare(world, client, key)
    if destroys:
        yield r.random()
        key.destroying = True
        _, error = yield f"destroy {name}", lambda: client.calls.destroy_key(name, 3.0), 3.0
        key.destroyed = error is None


def refresh(world: World, client: Client, key: Acknowledged) -> Script:
    """Replace the shares of a key."""
    made, error = yield f"refresh {key.name}", partial(client.calls.refresh_key, key.name, 2.0), 2.0
    if error is None:
        world.refreshes += 1
        if made.epoch < 2 or made.key_id != key.key_id:
            raise Violated(f"a refresh of {key.name!r} gave epoch {made.epoch} of {made.key_id}")
        key.epoch = max(key.epoch, made.epoch)


def reshare(world: World, client: Client, key: Acknowledged) -> Script:
    """Share a key among other nodes, as many as before."""
    holders = world.sim.random.sample(world.node_names, world.shares)
    call = partial(client.calls.reshare_key, key.name, world.threshold, None, holders, (), 2.0)
    made, error = yield f"reshare {key.name} to {','.join(holders)}", call, 2.0
    if error is None:
        world.reshares += 1
        if made.epoch < 2 or made.key_id != key.key_id or list(made.holders) != holders:
            raise Violated(f"a reshare of {key.name!r} gave epoch {made.epoch} of {made.key_id} at {made.holders}")
        key.epoch = max(key.epoch, made.epoch)


def repeat_order(world: World, client: Client, name: str, algorithm: str, body: bytes) -> Script:
    """Send the very same order again, to some node: it must give the same key, or none."""
    node = world.sim.random.choice(world.node_names)

    def again() -> Generator[Any, Any, Any]:
        reply = yield Exchange(node, "generate", body, 2.0)
        from engine.client.transport import raise_for_status

        raise_for_status(reply)
        return client.calls._opened(name, REPLY_CODECS["generate"].decode(reply.body))

    result, error = yield f"repeat the order of {name} at {node}", again, 2.0
    if error is not None:
        return None
    return world.acknowledge(name, algorithm, result, body)


def user(world: World, client: Client, name: str) -> Script:
    """Uses a key that another made, and tries what it may not do."""
    r = world.sim.random
    yield 0.2 + r.random()
    for _ in range(r.randrange(1, 3 if world.length == "short" else 5)):
        yield r.random() * (0.6 if world.length == "short" else 1.2)
        keys = world.acknowledged.get(name)
        if not keys:
            continue
        key = keys[-1]
        yield from world.checked_use(key, r.choice(USES[key.algorithm]), client, r.choice((0.3, 1.0)))
        if r.random() < 0.1:
            _, error = yield f"destroy {name}", partial(client.calls.destroy_key, name, 1.0), 1.0
            if error is None:
                raise Violated(f"{client.name} destroyed {name!r}")


def stranger(world: World, client: Client, name: str) -> Script:
    """A client without any right to the key."""
    r = world.sim.random
    for _ in range(2):
        yield 0.5 + r.random() * 2
        _, error = yield f"encrypt {name}", partial(client.calls.encrypt, name, b"x", b"", 0.5), 0.5
        if error is None:
            raise Violated(f"{client.name} encrypted with {name!r}")


# --- what attackers do ---


def thief(world: World, name: str) -> None:
    """A node that is taken over: it asks for shares with every grant it can lay hands on, with its own key."""
    sim, r = world.sim, world.sim.random
    channel = SimChannel(world.net, f"thief-{name}", CURVE[name])
    channel.arrived = lambda arrival: None

    def act() -> None:
        known = [key for keys in world.acknowledged.values() for key in keys]
        grant, key_id = b"", b""
        ways = ["forged", "bob", "node"]
        if world.grants_seen:
            ways += ["seen"] * 4 + ["swapped"] * 2 * (len(known) > 1)
        way = r.choice(ways)
        if way == "seen":
            _, key_id, grant = r.choice(world.grants_seen)
        elif known:
            key = r.choice(known)
            key_id = bytes.fromhex(key.key_id)
            if way == "swapped":
                key_id = r.choice([bytes.fromhex(each.key_id) for each in known])
                grant = r.choice(world.grants_seen)[2]
            else:
                issuer = {"forged": _impostor("alice"), "bob": KEYS["bob"], "node": KEYS[name]}[way]
                payload = _grants.encode(
                    Grant(key_id, 1, 1, ["encrypt"], name, _now(world), _now(world) + 10_000, r.randbytes(16))
                )
                grant = sign_envelope("grant", _now(world), payload, issuer)
        if grant:
            body = REQUEST_CODECS[SHARE_RELEASE].encode(ShareRelease(key_id, grant, b""))
            for holder in r.sample(world.node_names, 2):
                if holder != name:
                    _try(channel, holder, SHARE_RELEASE, body)
        if sim.now < world.chaos_s + THIEF_S:
            sim.after(r.random() * 0.9, act)

    sim.after(0.5 + r.random(), act)


def restart_attack(world: World, name: str) -> None:
    """The thief's helper kills a holder that has just released its share to it, and it asks again by the same grant."""
    channel = SimChannel(world.net, f"thief-{name}", CURVE[name])
    channel.arrived = lambda arrival: None
    left = [3]

    def again(holder: str, body: Any, sender: Any) -> None:
        if sender.name != name or world.healed or not left[0]:
            return
        left[0] -= 1
        raw = REQUEST_CODECS[SHARE_RELEASE].encode(body)
        world.sim.after(0.01, world.nodes[holder].crash)
        world.sim.after(0.2, world.nodes[holder].start)
        world.sim.after(0.3, lambda: _try(channel, holder, SHARE_RELEASE, raw))

    world.on_release = again


def clock_attack(world: World, victim: Proc) -> None:
    """The thief's helper sets a holder's clock far ahead, long enough to be believed, kills it and sets it back."""
    begun_s = 0.8 + world.sim.random.random() * 0.3

    def end() -> None:
        victim.crash()
        world.step_clock(victim, -60_000)
        world.sim.after(0.1, victim.start)

    world.sim.at(begun_s, lambda: world.step_clock(victim, 60_000))
    world.sim.at(begun_s + MARK_S + 0.6, end)


def rogue_registry(world: World, name: str) -> None:
    """A balancer's key in the hands of a node: forged certificates and abort notices for keys that exist."""
    sim, r = world.sim, world.sim.random
    channel = SimChannel(world.net, f"rogue-{name}", CURVE[name])
    channel.arrived = lambda arrival: None

    def act() -> None:
        node = world.nodes[r.choice(world.node_names)]
        rows = [(node.name, row) for row in node.rows()] if node.up else []
        if rows:
            holder, row = r.choice(rows)
            if r.random() < 0.5:
                notice = sign_envelope("abort", 1, aborts.encode(AbortNotice(row.key_id, row.attempt)), KEYS[BALANCER])
                if row.state == "committed":  # a prepared one is the registry's to abort
                    _try(channel, holder, SHARE_ABORT, REQUEST_CODECS[SHARE_ABORT].encode(Abort(notice)))
            else:
                record = read_key_manifest(row.manifest)
                mine = record.manifest.holder(name)
                given = []
                if mine is not None:
                    told = receipts.encode(Receipt(row.key_id, row.manifest_hash, mine.x))
                    given = [sign_envelope("receipt", _now(world), told, KEYS[name])]
                payload = certificates.encode(
                    CommitCertificate(
                        row.key_id, row.manifest_hash, given * 3 or [sign_envelope("receipt", 1, b"x", KEYS[name])]
                    )
                )
                forged = sign_envelope("certificate", 1, payload, KEYS[BALANCER])
                _try(
                    channel, holder, SHARE_COMMIT, REQUEST_CODECS[SHARE_COMMIT].encode(ShareCommit(row.key_id, forged))
                )
        if not world.healed:
            sim.after(r.random() * 0.8, act)

    sim.after(0.1 + r.random() * 0.3, act)


def _impostor(name: str) -> Any:
    from casting import signing

    from engine.protocol.signed import SigningKey

    return SigningKey(name, signing("impostor")._private)


def _now(world: World) -> int:
    return BASE_MS + int(world.sim.now * 1000)


def _try(channel: SimChannel, peer: str, verb: str, body: bytes) -> None:
    try:
        channel.start(peer, verb, body, 1.0)
    except EngineError:
        return


# --- what goes wrong by itself ---

POINTS = sorted(
    name for name in failpoints.POINTS if name.split(".")[0] in ("dealer", "holder", "store", "combiner", "registry")
)


KINDS = ("point", "point", "point", "die", "commit", "break", "cut", "loss", "double", "slow", "step", "full")


def faults(
    world: World,
    points: Sequence[str] = POINTS,
    kinds: Sequence[str] = KINDS,
    counts: Sequence[int] = (0, 1, 1, 2, 3),
) -> dict[str, Callable[[], None]]:
    """Draw the faults of this seed; the failpoints to be armed."""
    sim, r, net = world.sim, world.sim.random, world.net
    armed: dict[str, Callable[[], None]] = {}

    def restart(proc: Proc) -> None:
        if not world.healed:
            sim.after(0.1 + r.random() * 2.5, proc.start)

    def die(proc: Proc) -> None:
        if proc.up and not world.healed:
            proc.crash()
            restart(proc)

    for proc in world.procs.values():

        def on_crash(proc: Proc = proc) -> None:
            die(proc)

        proc.disk.on_crash = on_crash
    for _ in range(r.choice(counts)):
        proc = r.choice(list(world.procs.values()))
        peer = r.choice(list(world.procs.values()))
        kind = r.choice(kinds)
        when = r.random() * world.chaos_s * 0.7
        world.features.append(kind)
        if kind == "point":
            point = r.choice(points)
            armed[point] = _dying(world, die, r.choice((1, 1, 1, 2, 3, 5)), point)
        elif kind == "die":
            sim.at(when, lambda proc=proc: die(proc))
        elif kind == "commit":
            proc.disk.crash_in = r.randrange(2, 14)
            proc.disk.crash_after_commit = r.random() < 0.5
        elif kind == "break":
            for _ in range(3):
                sim.at(r.random() * world.chaos_s, lambda proc=proc, peer=peer: net.break_between(proc.name, peer.name))
        elif kind == "cut":
            pair = (proc.name, peer.name)
            sim.at(when, lambda pair=pair: net.cut.add(pair))
            sim.at(when + r.random() * 3, lambda pair=pair: net.cut.discard(pair))
        elif kind == "loss":
            net.loss = r.choice((0.01, 0.05))
        elif kind == "double":
            net.double = 0.1
        elif kind == "slow":
            net.slow = r.choice((0.05, 0.2))
        elif kind == "step":
            step = r.choice((-600_000, -20_000, -4_000, 3_000, 60_000))
            sim.at(when, lambda proc=proc, step=step: world.step_clock(proc, step))
            back_s = min(when + 1 + r.random() * 5, world.chaos_s - 0.01)
            sim.at(back_s, lambda proc=proc, step=step: world.step_clock(proc, -step))
            if r.random() < 0.4:
                sim.at(back_s, lambda proc=proc: die(proc))
        elif kind == "full":
            sim.at(when, lambda proc=proc: setattr(proc.disk, "full", True))
            sim.at(when + r.random() * 2, lambda proc=proc: setattr(proc.disk, "full", False))
    return armed


def _dying(world: World, die: Callable[[Proc], None], passing: int, point: str) -> Callable[[], None]:
    counter = itertools.count(1)

    def action() -> None:
        proc = world.sim.running
        if proc is not None and proc.up and next(counter) == passing:
            world.sim.tell(f"{proc.name} at {point}")
            die(proc)
            raise Crashed

    return action


# --- one seed ---


@dataclass(frozen=True)
class Report:
    """What a seed did."""

    seed: int
    trace: str
    counts: Counter[str]
    features: tuple[str, ...]


@contextmanager
def simulated(make: Callable[[int], World] = World) -> Generator[None, None, None]:
    """Have the modules under simulation use simulated disks, and check each signature once."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=False)
    with ExitStack() as stack:
        for module in (nodes.store, balancer.database):
            stack.enter_context(mock.patch.object(module, "sqlite3", SQLITE))
        stack.enter_context(mock.patch.object(nodes.deal, "Gathering", WatchedGathering))
        stack.enter_context(mock.patch.object(engine.protocol.signed, "_verify", verifies_once))
        stack.enter_context(mock.patch.object(engine.protocol.signed, "_parse", parses_once))
        stack.enter_context(mock.patch.dict(FRESH_FILES, _fresh_files(make), clear=True))
        yield


def _fresh_files(make: Callable[[int], World]) -> dict[tuple[str, str], bytes]:
    """The files of a cluster that was just started."""
    world = make(0)
    for proc in world.procs.values():
        proc.start()
    files = {
        (proc.name, name): raw.serialize() for proc in world.procs.values() for name, raw in proc.disk.files.items()
    }
    for proc in world.procs.values():
        proc.disk.close()
    return files


def run_seed(seed: int, how: str = "") -> Report:
    """Run one seed inside ``simulated()``; ``Violated`` tells what went wrong, and how to see it again.

    ``how`` are further arguments of the command for that.
    """
    world = World(seed)
    played(world, lambda: _run(world), how)
    counts = Counter(
        events=world.sim.steps,
        keys=sum(len(each) for each in world.acknowledged.values()),
        gathers=world.gathers,
        checked=world.checked,
        releases=world.releases,
        refreshes=world.refreshes,
        reshares=world.reshares,
    )
    return Report(seed, world.sim.trace, counts, tuple(world.features))


def played(world: World, course: Callable[[], None], how: str) -> None:
    """Run the course of a world to its end, and clean up; ``Violated`` tells all that is needed to see it again."""
    try:
        course()
    except (Exception, Violated) as error:
        last = "\n".join(list(world.sim.recent)[-40:])
        told = str(error) if isinstance(error, Violated) else repr(error)
        raise Violated(
            f"seed {world.seed}: {told}\nscenario: {', '.join(world.features)}\nlast events:\n{last}\n"
            f"again: .venv/bin/python {FOLDER}/run.py --seed {world.seed}{how}"
        ) from error
    finally:
        failpoints.arm({})
        world.sim.end()
        for proc in world.procs.values():
            proc.disk.close()


def _run(world: World) -> None:
    sim, r, node = world.sim, world.sim.random, world.evil_node
    for proc in world.procs.values():
        proc.skew_ms = r.randrange(-1500, 1500)
        proc.start()
    failpoints.arm(faults(world))
    for name in world.names:
        world.play("alice", lambda client, name=name: owner(world, client, name, destroys=r.random() < 0.3))
    if "two creators" in world.features:
        world.play("dave", lambda client: owner(world, client, "k", destroys=False))
    world.play("carol", lambda client: user(world, client, "k"))
    if r.random() < 0.3:
        world.play("bob", lambda client: stranger(world, client, "k"))
    if world.evil == "thief":
        thief(world, node)
    if "restart attack" in world.features:
        restart_attack(world, node)
    if "clock attack" in world.features:
        clock_attack(world, world.nodes[r.choice([each for each in world.node_names if each != node])])
    if world.evil == "rogue":
        rogue_registry(world, node)
    sim.run(world.chaos_s)
    heal_and_check(world)


def heal_and_check(world: World, before_books: Callable[[], None] | None = None) -> None:
    """End what goes wrong, let all come to rest, and look at books, stores and use of every key."""
    sim = world.sim
    heal(world)
    if before_books is not None:
        before_books()
        _settle(world)
    if any(row.state == "prepared" and not _given_up(row) for node in world.nodes.values() for row in node.rows()):
        sim.skip(ORPHAN_S)  # until the order of an attempt whose dealer died has run out
        _settle(world)
    if world.scripts:
        raise Violated(f"{world.scripts} scripts did not end")
    _check_books(world)
    _check_use(world)


def heal(world: World) -> None:
    """Everything that was broken works again, every process is up, and all has come to rest."""
    world.healed = True
    failpoints.arm({})
    world.sim.tell("healed")
    world.net.cut.clear()
    world.net.loss = world.net.double = world.net.slow = 0.0
    for proc in world.procs.values():
        proc.disk.full = False
        proc.disk.crash_in = -1
        proc.skew_ms = max(-1500, min(1500, proc.skew_ms))
        proc.start()
    _settle(world)


def _settle(world: World) -> None:
    """Let time pass until every node has read the registry's books anew and all is quiet, at most HEAL_S."""
    sim = world.sim
    since_s, until_s = sim.now + 0.3, sim.now + HEAL_S

    def quiet() -> bool:
        return not world.scripts and all(node.read_since(since_s) for node in world.nodes.values())

    sim.run(sim.now + THIEF_S + 1.5)
    while sim.now < until_s and not quiet():
        sim.run(sim.now + 0.25)
    sim.run(sim.now + 0.5)


def _check_books(world: World) -> None:
    """What stands in the stores and the registry, once all is quiet."""
    books = world.registry.registry
    stored = {node.name: [row for row in node.rows() if not _given_up(row)] for node in world.nodes.values()}
    for node in world.nodes.values():
        unanswered = node.listener.router.unanswered()
        if unanswered or node.handlers.pending:
            raise Violated(f"{node.name} never answered {unanswered}; {node.handlers.pending} requests are under way")
        for row in stored[node.name]:
            if row.state == "prepared":
                raise Violated(f"{node.name} still has a prepared share of {row.name!r}, attempt {row.attempt}")
            if row.state == "committed":
                _check_certificate(node.name, row)
            if row.state == "destroyed" and row.sealed:
                raise Violated(f"{node.name} kept the share of the destroyed key {row.name!r}")
    for keys in world.acknowledged.values():
        for key in keys:
            _check_key(books._row(bytes.fromhex(key.key_id)), key, stored)


def _given_up(row: Any) -> bool:
    """Whether it is the share of an aborted refresh or reshare, which stays with the notice on it until the next."""
    if row.state != "prepared" or row.epoch == 1 or not row.document:
        return False
    notice = aborts.decode(read_unverified(row.document).payload)
    return (notice.key_id, notice.attempt) == (row.key_id, row.attempt)


def _check_key(booked: Any, key: Acknowledged, stored: dict[str, list[Any]]) -> None:
    """One acknowledged key in the books and in the stores."""
    name, key_id = key.name, bytes.fromhex(key.key_id)
    manifest = read_key_manifest(booked.manifest).manifest if booked is not None and booked.manifest else None
    if manifest is None or manifest.check_value != key.check_value or manifest.epoch < key.epoch:
        raise Violated(f"the registry has lost the acknowledged key {name!r}, or its epoch {key.epoch}")
    rows = {holder: [row for row in its if row.key_id == key_id] for holder, its in stored.items()}
    if key.destroyed or booked.state == DESTROYED:
        if not key.destroying:
            raise Violated(f"the key {name!r} was destroyed and nobody ordered it")
        # Who left before is not told by the dealer: it has no share, and learns it from the books within seconds.
        kept = [holder for holder, its in rows.items() if any(row.state != "destroyed" or row.sealed for row in its)]
        kept = [holder for holder in kept if [(row.state, row.sealed) for row in rows[holder]] != [("moved", b"")]]
        if booked.state != DESTROYED or kept:
            raise Violated(f"the destroyed key {name!r} is still at {kept}, in the books as {booked.state}")
        key.destroyed = True
        return
    left = {
        holder
        for holder, its in rows.items()
        if [(row.state, row.sealed) for row in its] == [("moved", b"")] and its[0].epoch <= manifest.epoch
    }
    rows = {holder: its for holder, its in rows.items() if holder not in left}
    states = {holder: [(row.epoch, row.state, bool(row.sealed)) for row in its] for holder, its in rows.items() if its}
    need = key.stored if manifest.epoch == 1 else [each.node for each in manifest.holders]
    current = {
        holder
        for holder, its in rows.items()
        if len(its) == 1 and (its[0].state, its[0].manifest_hash) == ("committed", booked.manifest_hash)
    }
    lost = [each for each in need if each not in current or not rows[each][0].sealed]
    lost += [each for each in left if manifest.holder(each) is not None]
    if lost or len(current) < len(states):
        raise Violated(
            f"{name!r}: {lost} gave receipts for epoch {manifest.epoch} and have no share of it, or others differ; "
            f"the rows are {states}"
        )


def _check_certificate(node: str, row: Any) -> None:
    """A committed row's certificate holds receipts of t+1 holders, of this very manifest."""
    record = read_key_manifest(row.manifest)
    told = certificates.decode(read_unverified(row.certificate).payload)
    signers = set()
    for raw in told.receipts:
        signed = read_unverified(raw)
        try:
            receipt = receipts.decode(signed.payload)
        except EngineError:
            continue
        mine = record.manifest.holder(signed.issuer)
        good = verifies_once(MEMBERS[signed.issuer].sign_public, *_signature(raw))
        if good and mine is not None and (receipt.manifest_hash, receipt.x) == (row.manifest_hash, mine.x):
            signers.add(signed.issuer)
    shares, first = record.manifest.shares, record.manifest.epoch == 1
    needed = min(shares, record.manifest.threshold + 1) if first else shares
    if told.manifest_hash != row.manifest_hash or len(signers) < needed:
        raise Violated(f"{node} took {row.name!r} for committed with receipts of {sorted(signers)}")


def _check_use(world: World) -> None:
    """Each acknowledged key still does what it did, with only t honest holders up; a destroyed one does nothing."""
    ahead = [node.name for node in world.nodes.values() if node.trusted.now_ms() > node.now_ms() + CLOCK_SKEW_MS]
    if len(ahead) + bool(world.liar) > 1:
        return  # such a node refuses every grant, as expired, until its clock is reset
    down = ""
    if not world.liar and not ahead:
        down = world.spare()
        if down:
            world.nodes[down].crash()

    def check(client: Client) -> Script:
        for name, keys in world.acknowledged.items():
            for key in keys:
                if key.destroyed:
                    if all(each.destroyed for each in keys):
                        result, error = yield f"use {name}", partial(client.calls.key_info, name, 4.0), 4.0
                        # An order of that name which nobody was answered may have been carried out since: another key.
                        if error is None and result.key_id in {each.key_id for each in keys}:
                            raise Violated(f"the destroyed key {name!r} is still described: {result}")
                    continue
                uses = {*USES[key.algorithm]} - (set() if key.ciphertexts else {"decrypt"})
                for verb in sorted(uses):
                    error = yield from world.checked_use(key, verb, client, 6.0)
                    if error is not None:
                        raise Violated(
                            f"the acknowledged key {name!r} is of no use ({down or 'nobody'} is down): {error}"
                        )
                world.checked += 1

    world.play("alice", check)
    world.sim.run(world.sim.now + 60.0, done=lambda: not world.scripts)
    if world.scripts:
        raise Violated("the last checks did not end")
