"""Seeds in which keys move all the time: what is on every disk is held against the rules after every single commit.

It is the world of ``scenario`` with more nodes, and with shares that are refreshed and moved by two clients at once
while processes die, messages get lost, holders lie and the registry falls back to what it was. ``run.py --moves`` runs
it.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from random import Random
from typing import Any
from unittest import mock

from casting import BALANCER, CURVE, KEYS, WIDE_CLUSTER, WIDE_NODES, SimLane
from machine import SimChannel, Violated
from scenario import (
    KEKS,
    USES,
    Acknowledged,
    Client,
    Proc,
    Report,
    Script,
    World,
    faults,
    heal,
    heal_and_check,
    played,
    repeat_order,
    user,
)

import nodes.renewer
from balancer.registry import SqliteRegistry
from engine import failpoints
from engine.errors import EngineError, KeyExists, ManifestError, ShareCorrupt
from engine.protocol.manifest import (
    CommitCertificate,
    KeyManifest,
    KeyRecord,
    Receipt,
    RefreshOrder,
    ReshareOrder,
    certificates,
    create_orders,
    open_key_manifest,
    read_change_order,
    read_key_manifest,
    receipts,
    reshare_orders,
    sign_order,
)
from engine.protocol.refresh import NewShare
from engine.protocol.requests import (
    MOVE,
    REQUEST_CODECS,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_LEAVE,
    Move,
    ShareCommit,
    ShareDeal,
    ShareLeave,
)
from engine.protocol.signed import read_unverified, sign_envelope
from engine.sharing import Share, reconstruct_key
from nodes.refresh import Coordinator
from nodes.renewer import Renewer
from nodes.store import SALT_BYTES, seal_context

MOVING = (
    "dealer.refresh.",
    "dealer.reshare.",
    "dealer.abort.",
    "holder.deal.",
    "holder.re",
    "holder.accept.",
    "holder.leave.",
    "holder.prepare.",
    "holder.commit.",
    "store.write.",
    "registry.change.",
    "registry.adopt.",
    "registry.commit.",
    "registry.abort.",
)
POINTS = tuple(name for name in failpoints.POINTS if name.startswith(MOVING))
"""Where a process may die in these seeds."""
KINDS = ("point",) * 6 + ("die", "die", "commit", "commit", "break", "cut", "loss", "double", "slow", "full")
TWO_FACED_PART = 0.3
"""Of the seeds in which nobody is evil by that: the registry is, and has a node for an accomplice."""
EVIL = ("", "", "", "false share", "false degree", "false part", "false words", "fallback", "fallback", "rogue")
SHAPES = ((1, 2), (2, 2), (2, 3), (2, 3), (3, 3), (2, 4), (3, 4), (3, 5), (4, 6), (3, 6))
"""(t, n) of a new epoch; from those without a holder to spare, the next move takes a trial."""
CHAOS_S = 5.0
LIES = 4
LAST_TRIES = 12
KEPT_OLD = ("committed", "moved", "destroyed")


# --- what is on the disks ---


@dataclass(frozen=True)
class Kept:
    """A row of a node's store."""

    key_id: bytes
    epoch: int
    state: str
    digest: bytes
    manifest: bytes
    certified: bool
    sealed: bytes


class Disks:
    """What every disk holds of every key, looked at after each commit; and the rules that it must obey at any instant.

    A manifest is *certified* once a registry or a node has written down its certificate. Where the registry is
    two-faced, there may be several of an epoch, and the key must be had by one of all that ever were.
    """

    def __init__(self, world: MoveWorld) -> None:
        self._world = world
        self._rows: dict[str, list[Kept]] = {}
        self._booked: dict[bytes, tuple[int, bytes]] = {}
        self._certified: dict[bytes, dict[int, tuple[bytes, KeyManifest]]] = {}
        self._ever: dict[bytes, dict[bytes, KeyManifest]] = {}
        self._newest: dict[tuple[str, bytes], int] = {}
        self._secrets: dict[bytes, bytes] = {}
        self._ordered: dict[bytes, set[int]] = {}
        self._good: set[tuple[bytes, int, bytes]] = set()
        self.instants = 0
        self.on_new_epoch: Callable[[], None] = lambda: None

    def changed(self, proc: Proc) -> None:
        """A process has just made something durable."""
        if proc.name == BALANCER:
            self._read_books(proc)
        else:
            self._read_store(proc)
        self.instants += 1
        for key_id in self._certified:
            self._check(key_id)

    def fell_back(self, proc: Proc) -> None:
        """The registry's disk is an older one: a certificate that nobody else has is gone for good."""
        seen = {row.digest for rows in self._rows.values() for row in rows if row.certified}
        for epochs in self._certified.values():
            for epoch in [each for each, (digest, _) in epochs.items() if digest not in seen]:
                del epochs[epoch]
        self._read_books(proc)

    def _read_books(self, proc: Proc) -> None:
        file = proc.disk.files["registry.db"]
        for raw, digest in file.execute("SELECT manifest, manifest_hash FROM keys WHERE state IN (2, 3)").fetchall():
            self._certify(read_key_manifest(raw).manifest, digest)

    def _read_store(self, proc: Proc) -> None:
        query = "SELECT key_id, epoch, state, manifest_hash, manifest, certificate != x'', sealed FROM keys"
        rows = [Kept(*row) for row in proc.disk.files["shares.db"].execute(query).fetchall()]
        self._rows[proc.name] = rows
        for row in rows:
            if row.certified:
                self._certify(read_key_manifest(row.manifest).manifest, row.digest)
            if row.state not in KEPT_OLD:
                continue
            newest = self._newest.get((proc.name, row.key_id), 0)
            if row.epoch < newest:
                raise Violated(f"{proc.name} goes back from epoch {newest} to {row.epoch}")
            self._newest[proc.name, row.key_id] = row.epoch
        for row in rows:
            if row.sealed and row.epoch < self._newest.get((proc.name, row.key_id), 0):
                raise Violated(f"{proc.name} keeps its share of epoch {row.epoch} beside a later one")

    def _certify(self, manifest: KeyManifest, digest: bytes) -> None:
        if manifest.epoch > max(self._certified.get(manifest.key_id, {0: None})):
            self.on_new_epoch()
        self._ever.setdefault(manifest.key_id, {})[digest] = manifest
        known = self._certified.setdefault(manifest.key_id, {}).setdefault(manifest.epoch, (digest, manifest))
        if known[0] != digest and self._world.evil != "two-faced":
            raise Violated(f"two manifests of epoch {manifest.epoch} of {manifest.name!r} are certified")
        if manifest.change and manifest.epoch not in self._ordered.setdefault(manifest.key_id, set()):
            self._ordered[manifest.key_id].add(manifest.epoch)
            self._check_order(manifest)

    def _check_order(self, manifest: KeyManifest) -> None:
        """An epoch by a balancer's order has the client's t and n, and no site with t shares that had none before."""
        order = read_change_order(manifest.change)
        if not order.fencing:
            return
        self._world.moved += isinstance(order, ReshareOrder)
        self._world.renewed += not isinstance(order, ReshareOrder)
        client = create_orders.decode(read_unverified(manifest.order).payload)
        shape = client.threshold, client.shares
        if manifest.sharing:
            told = reshare_orders.decode(read_unverified(manifest.sharing).payload)
            shape = told.threshold, len(told.holders)
        if shape != (manifest.threshold, manifest.shares):
            raise Violated(f"a balancer made {manifest.threshold} of {manifest.shares} of {shape}, {manifest.name!r}")
        before = self._ever[manifest.key_id].get(manifest.previous)  # a two-faced registry makes several of an epoch
        if before is not None and _gathered(manifest) > max(_gathered(before), manifest.threshold - 1):
            raise Violated(f"a balancer put {_gathered(manifest)} shares of {manifest.name!r} at one site")

    def manifest(self, key_id: bytes) -> KeyManifest:
        """The newest certified manifest of a key."""
        return max(self._certified[key_id].items())[1][1]

    def booked(self, proc: Proc, key_id: bytes) -> KeyRecord | None:
        """The manifest of a key by the books of this registry."""
        query = "SELECT manifest FROM keys WHERE key_id = ? AND state = 2"
        found = proc.disk.files["registry.db"].execute(query, (key_id,)).fetchone()
        return read_key_manifest(found[0]) if found else None

    def lacking(self, key_id: bytes) -> tuple[str, ...]:
        """The holders that have no share of the newest epoch: they missed the creation."""
        _, (digest, manifest) = max(self._certified[key_id].items())
        having = {node for node, rows in self._rows.items() for row in rows if row.digest == digest and row.sealed}
        return tuple(each.node for each in manifest.holders if each.node not in having)

    def _check(self, key_id: bytes) -> None:
        """At least t shares of the committed epoch are there, and every share of it is of the one secret."""
        if key_id in self._world.destroying or not self._certified[key_id]:
            return
        if self._world.evil == "two-faced":
            self.check_had(key_id)
            return
        epoch, (digest, manifest) = max(self._certified[key_id].items())
        found = {}
        for node, rows in self._rows.items():
            for row in rows:
                if row.digest == digest and row.sealed:
                    found[node] = row
        if len(found) < manifest.threshold:
            raise Violated(
                f"{manifest.name!r}: {len(found)} shares of the committed epoch {epoch} are left, at {sorted(found)}; "
                f"{manifest.threshold} are needed"
            )
        new = {node: row for node, row in found.items() if (digest, epoch, row.sealed) not in self._good}
        if not new:
            return
        shares = {node: self._share(node, row, manifest) for node, row in found.items()}
        for node, row in new.items():
            others = [share for each, share in shares.items() if each != node][: manifest.threshold - 1]
            secret = bytes(reconstruct_key([shares[node], *others]))
            if self._secrets.setdefault(key_id, secret) != secret:
                raise Violated(f"{manifest.name!r}: with the share of {node} epoch {epoch} is another key")
            self._good.add((digest, epoch, row.sealed))

    def living(self) -> list[bytes]:
        """Those that were certified, and that nobody destroys."""
        return [key_id for key_id in self._ever if key_id not in self._world.destroying]

    def check_had(self, key_id: bytes) -> None:
        """Of some epoch that was certified there are t shares on the disks, and they are of the one secret."""
        told = {}
        for digest, manifest in self._ever[key_id].items():
            found = {
                node: row for node, rows in self._rows.items() for row in rows if row.digest == digest and row.sealed
            }
            told[manifest.epoch, manifest.attempt] = f"{len(found)} of {manifest.threshold}"
            if len(found) < manifest.threshold:
                continue
            some = [self._share(node, row, manifest) for node, row in found.items()][: manifest.threshold]
            secret = bytes(reconstruct_key(some))
            if self._secrets.setdefault(key_id, secret) != secret:
                raise Violated(f"{manifest.name!r}: epoch {manifest.epoch} is another key")
            return
        raise Violated(f"{manifest.name!r} is lost; shares that are left by (epoch, attempt): {told}")

    @staticmethod
    def _share(node: str, row: Kept, manifest: KeyManifest) -> Share:
        mine = manifest.holder(node)
        if mine is None:
            raise Violated(f"{node} has a share of epoch {row.epoch} and is no holder of it")
        plain = SimLane(KEKS[node]).unseal(row.sealed, seal_context(manifest, mine.x, node, row.digest))
        return Share(mine.x, plain[SALT_BYTES:])

    def check_end(self) -> None:
        """All is quiet: of each key there are the shares of one epoch, all of them, and any t give the secret."""
        for key_id, epochs in self._certified.items():
            if key_id in self._world.destroying or not epochs:
                continue
            epoch, (digest, manifest) = max(epochs.items())
            shares = []
            for node, rows in self._rows.items():
                for row in rows:
                    if row.key_id != key_id or not row.sealed or row.state == "prepared":
                        continue
                    if row.digest != digest:
                        raise Violated(f"{node} still has a share of epoch {row.epoch} of {manifest.name!r}")
                    shares.append(self._share(node, row, manifest))
            if epoch > 1 and len(shares) < manifest.shares:
                raise Violated(f"{manifest.name!r}: {len(shares)} of {manifest.shares} shares of epoch {epoch}")
            for some in combinations(shares, manifest.threshold):
                if bytes(reconstruct_key(some)) != self._secrets[key_id]:
                    raise Violated(f"{manifest.name!r}: the shares {[each.x for each in some]} give another key")


def _gathered(manifest: KeyManifest) -> int:
    """The most shares that are at one site."""
    sites = Counter(WIDE_CLUSTER.nodes[each.node].location.split("/")[0] for each in manifest.holders)
    return max(sites.values())


# --- who lies ---


class TwoFacedRegistry(SqliteRegistry):
    """The real registry; in some seeds it certifies an attempt and tells its coordinator that it does not.

    So the attempt is given up, everywhere and by signed notices; and while the next one replaces what it left, its
    certificate comes after all, by way of a node that is in league with the registry.
    """

    world: MoveWorld

    def commit(self, manifest: bytes, receipts: Any, now_ms: int) -> bytes:
        """Commit, or keep the certificate back."""
        world, record = self.world, read_key_manifest(manifest)
        told = record.manifest
        if world.evil != "two-faced" or not world.lies or told.epoch == 1 or world.sim.random.random() < 0.5:
            return super().commit(manifest, receipts, now_ms)
        row = self._row(told.key_id)
        if row is not None and row.manifest_hash == record.digest:
            return row.certificate
        self._check_next(open_key_manifest(manifest, self._cluster), row, now_ms)
        payload = certificates.encode(CommitCertificate(told.key_id, record.digest, list(receipts)))
        world.kept_back.append((told, manifest, sign_envelope("certificate", 1, payload, KEYS[BALANCER])))
        world.lied += 1
        raise ManifestError(f"the registry commits no attempt {told.attempt} of {told.name!r}")


class LyingRenewer(Renewer):
    """The real holder's side; in one node of some seeds it deals or tells something false."""

    world: MoveWorld

    @property
    def _lie(self) -> str:
        return self.world.evil if self.world.lies and self._node == self.world.evil_node else ""

    def deal(self, lane: Any, body: Any, sender: Any) -> Any:
        """Deal; perhaps of another share, on a polynomial of a higher degree, or another part than is committed to."""
        newest = max(self._holder._store.fencings().values(), default=0)
        dealt = self._deal(lane, body, sender)
        fencing = read_change_order(body.order).fencing
        if 0 < fencing < newest:
            raise Violated(f"{self._node} deals by an order of the fencing epoch {fencing}, and knows {newest}")
        return dealt

    def _deal(self, lane: Any, body: Any, sender: Any) -> Any:
        lie = self._lie
        if lie not in ("false share", "false degree", "false part"):
            return super().deal(lane, body, sender)
        self.world.lied += 1
        if lie == "false part":
            dealt = super().deal(lane, body, sender)
            parts = list(dealt.parts)
            place = self.world.sim.random.randrange(len(parts))
            parts[place] = parts[place][:-1] + bytes([parts[place][-1] ^ 1])
            return type(dealt)(dealt.statement, parts)
        sub, zero = nodes.renewer.deal_sub_shares, nodes.renewer.deal_zero

        def sub_shares(share: Share, *, threshold: int, xs: Any) -> list[Share]:
            if lie == "false share":
                return sub(Share(share.x, _flipped(share.y)), threshold=threshold, xs=xs)
            if threshold + 1 > len(xs):
                return _bent(sub(share, threshold=threshold, xs=xs))
            return sub(share, threshold=threshold + 1, xs=xs)

        def zeros(length: int, *, threshold: int, xs: Any) -> list[Share]:
            if lie == "false share":
                return sub(Share(255, _flipped(bytes(length))), threshold=threshold, xs=xs)
            return (
                zero(length, threshold=threshold + 1, xs=xs)
                if threshold < len(xs)
                else _bent(zero(length, threshold=threshold, xs=xs))
            )

        with (
            mock.patch.object(nodes.renewer, "deal_sub_shares", sub_shares),
            mock.patch.object(nodes.renewer, "deal_zero", zeros),
        ):
            return super().deal(lane, body, sender)

    def renew(self, lane: Any, body: Any, sender: Any) -> Any:
        """Store the new share; a certificate that was kept back may come meanwhile."""
        self.world.send_kept_back(self._node)
        return super().renew(lane, body, sender)

    def accept(self, lane: Any, body: Any, sender: Any) -> Any:
        """Store the new share; a certificate that was kept back may come meanwhile."""
        self.world.send_kept_back(self._node)
        return super().accept(lane, body, sender)

    def refresh(self, lane: Any, body: Any, sender: Any) -> Any:
        """Tell what the share becomes; perhaps with a wrong value."""
        with self._false_words():
            return super().refresh(lane, body, sender)

    def reshare(self, lane: Any, body: Any, sender: Any) -> Any:
        """Tell what the new share would be; perhaps with a wrong value."""
        with self._false_words():
            return super().reshare(lane, body, sender)

    @contextmanager
    def _false_words(self) -> Iterator[None]:
        if self._lie != "false words":
            yield
            return
        self.world.lied += 1
        real = nodes.renewer.sign_part_statement

        def sign(terms: Any, deals: Any, new: NewShare, *rest: Any) -> bytes:
            return real(terms, deals, replace(new, values=(_flipped(new.values[0]), *new.values[1:])), *rest)

        with mock.patch.object(nodes.renewer, "sign_part_statement", sign):
            yield


class WatchedCoordinator(Coordinator):
    """The real coordinator; whom it names is held against who lies."""

    world: MoveWorld

    def _carry_out(self, *given: Any) -> Any:
        """Carry out orders; a false word must be named with its speaker, and nobody where all are honest."""
        outcomes = super()._carry_out(*given)
        for error in outcomes:
            if not isinstance(error, ShareCorrupt):
                continue
            if not self.world.lied:
                raise Violated(f"{self._node} names {error.holders}, and nobody lied: {error}")
            if self.world.evil_node not in error.holders:
                raise Violated(f"{self.world.evil_node} lied, {error.holders} are named: {error}")
            self.world.named["all" if len(error.holders) > 2 else "liar"] += 1
        return outcomes


def _flipped(value: bytes) -> bytes:
    return bytes([value[0] ^ 1]) + value[1:]


def _bent(shares: list[Share]) -> list[Share]:
    """As many shares as the threshold lie on a polynomial whatever they are: then another constant is the only lie."""
    return [Share(shares[0].x, _flipped(shares[0].y)), *shares[1:]]


# --- the world ---


class MoveWorld(World):
    """Six nodes, two keys that move, and what is on the disks."""

    cluster = WIDE_CLUSTER
    node_names = WIDE_NODES
    make_renewer = LyingRenewer
    make_coordinator = WatchedCoordinator
    make_registry = TwoFacedRegistry

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        LyingRenewer.world = WatchedCoordinator.world = TwoFacedRegistry.world = self
        self.kept_back: list[tuple[KeyManifest, bytes, bytes]] = []
        """Manifests with the certificates that a two-faced registry made for them."""
        self.disks = Disks(self)
        self.lied = 0
        self.named: Counter[str] = Counter()
        self.destroying: set[bytes] = set()
        self.fallbacks = self.refused = 0
        self.moved = self.renewed = 0
        for proc in self.procs.values():
            proc.disk.on_commit = partial(self.disks.changed, proc)

    def _cast(self, r: Any) -> None:
        self.threshold, self.shares = r.choice(((2, 3), (2, 3), (2, 4), (3, 4), (3, 5)))
        self.length, self.chaos_s = "long", CHAOS_S
        self.audit_strict = r.random() < 0.3
        self.evil = r.choice(EVIL)
        if not self.evil and Random(self.seed).random() < TWO_FACED_PART:
            self.evil = "two-faced"
        self.evil_node = r.choice(self.node_names)
        self.liar = self.thief = ""
        self.names = r.choice((("k",), ("k", "l")))
        self.features = [f"{self.threshold} of {self.shares}", self.evil or "all honest"]
        self.features += ["two names"] * (len(self.names) > 1)
        if self.evil == "rogue" or r.random() < 0.6:
            self.features += ["planned"] + ["old leader"] * (r.random() < 0.5)

    @property
    def lies(self) -> bool:
        """Whether somebody lies now: a few times, as all is tried again and again until it no longer does."""
        return not self.healed and self.lied < LIES

    def send_kept_back(self, storing: str) -> None:
        """A node is about to store a share: others, those that leave too, are shown what was kept back."""
        if not self.kept_back or self.healed:
            return
        channel = SimChannel(self.net, f"two-faced-{self.evil_node}-{self.sim.steps}", CURVE[self.evil_node])
        channel.arrived = lambda arrival: None
        for manifest, raw, certificate in self.kept_back[-2:]:
            commit = REQUEST_CODECS[SHARE_COMMIT].encode(ShareCommit(manifest.key_id, certificate))
            leave = REQUEST_CODECS[SHARE_LEAVE].encode(ShareLeave(raw, certificate))
            for node in self.node_names:
                if node == storing or self.sim.random.random() < 0.3:
                    continue
                verb, body = (SHARE_LEAVE, leave) if manifest.holder(node) is None else (SHARE_COMMIT, commit)
                with suppress(EngineError):
                    channel.start(node, verb, body, 1.0)

    def spare(self) -> str:
        """A node that may be down while all keys must be of use."""
        needed = {
            node
            for epochs in self.disks._certified.values()
            for _, manifest in [max(epochs.items())[1]]
            if manifest.shares == manifest.threshold
            for node in [each.node for each in manifest.holders]
        }
        return self.sim.random.choice([each for each in self.node_names if each not in needed] or [""])


def keeper(world: MoveWorld, client: Client, name: str) -> Script:
    """Creates a key, and from then on moves and refreshes it."""
    r = world.sim.random
    key = yield from created(world, client, name)
    if key is None:
        return
    yield from changes(world, client, name, r.randrange(2, 6))
    if r.random() < 0.15 and world.evil != "fallback":
        world.destroying.add(bytes.fromhex(key.key_id))
        key.destroying = True
        _, error = yield f"destroy {name}", partial(client.calls.destroy_key, name, 3.0), 3.0
        key.destroyed = error is None


def created(world: MoveWorld, client: Client, name: str) -> Generator[Any, Any, Acknowledged | None]:
    """The key, once a client was told that it is there."""
    r = world.sim.random
    algorithm = r.choice(tuple(USES))
    for _ in range(4):
        before = len(client.sent)
        make = partial(client.calls.create_key, name, algorithm, world.threshold, world.shares, 3.0)
        _, error = yield f"create {name}", make, 3.0
        orders = [each for each in client.sent[before:] if each.verb == "generate"]
        if error is None:
            return world.acknowledge(name, algorithm, client.calls._descriptions.get(name), orders[-1].body)
        if orders and not isinstance(error, KeyExists):
            key: Acknowledged | None = yield from repeat_order(world, client, name, algorithm, orders[-1].body)
            if key is not None:
                return key
        yield r.random() * 0.5
    return None


def changes(world: MoveWorld, client: Client, name: str, count: int) -> Script:
    """Move or refresh a key so many times; each is tried again now and then, as people do."""
    r = world.sim.random
    for _ in range(count):
        yield r.random() * 0.5
        keys = world.acknowledged.get(name)
        if not keys or keys[-1].destroying:
            continue
        yield from (refresh if r.random() < 0.25 else move)(world, client, keys[-1])


def move(world: MoveWorld, client: Client, key: Acknowledged) -> Script:
    """Give a key other holders, and perhaps another t and n."""
    r = world.sim.random
    threshold, shares = r.choice(SHAPES)
    holders = r.sample(world.node_names, shares)
    known = world.disks.manifest(bytes.fromhex(key.key_id))
    spared = known.shares - known.threshold
    without = tuple(r.sample([each.node for each in known.holders], r.randint(0, spared)) if r.random() < 0.3 else ())
    call = partial(client.calls.reshare_key, key.name, threshold, None, holders, without, 2.0)
    made, error = yield f"move {key.name} to {threshold} of {','.join(holders)}", call, 2.0
    if error is None:
        world.reshares += 1
        if made.epoch < 2 or made.key_id != key.key_id or list(made.holders) != holders:
            raise Violated(f"a move of {key.name!r} gave epoch {made.epoch} of {made.key_id} at {made.holders}")
        key.epoch = max(key.epoch, made.epoch)
    else:
        world.refused += 1


def refresh(world: MoveWorld, client: Client, key: Acknowledged) -> Script:
    """Replace the shares of a key."""
    made, error = yield f"refresh {key.name}", partial(client.calls.refresh_key, key.name, 2.0), 2.0
    if error is None:
        world.refreshes += 1
        key.epoch = max(key.epoch, made.epoch)
    else:
        world.refused += 1


def planner(world: MoveWorld, stale: bool) -> None:
    """What the balancer orders: keys to move and to refresh, a few at a time; it goes on after it was started anew.

    ``stale``: orders of its earlier starts arrive again, as those of a leader that does not know that it is none; and
    a holder that follows that one has others deal by fresh ones, past the registry, which would refuse them.
    """
    sim, r, proc = world.sim, world.sim.random, world.registry
    channel = SimChannel(world.net, f"plan-{BALANCER}", CURVE[BALANCER])
    channel.arrived = lambda arrival: None
    sent: list[tuple[str, bytes]] = []

    def act() -> None:
        if proc.up:
            known = [
                record
                for keys in world.acknowledged.values()
                for each in keys
                if (record := world.disks.booked(proc, bytes.fromhex(each.key_id))) is not None
            ]
            orders = [ordered(record.manifest) for record in r.sample(known, r.randint(0, len(known)))]
            if orders:
                holder = r.choice(known[0].manifest.holders).node
                body = REQUEST_CODECS[MOVE].encode(Move(orders))
                sent.append((holder, body))
                ask(holder, body)
            if stale and known:
                have_dealt(r.choice(known))
        if stale and sent and r.random() < 0.5:
            ask(*r.choice(sent))
        if not world.healed:
            sim.after(0.1 + r.random() * 0.6, act)

    def terms(manifest: KeyManifest, fencing: int) -> dict[str, Any]:
        return {
            "key_id": manifest.key_id,
            "name": manifest.name,
            "from_epoch": manifest.epoch,
            "nonce": r.randbytes(16),
            "expires_ms": proc.now_ms() + 20_000,
            "fencing": fencing,
        }

    def have_dealt(record: KeyRecord) -> None:
        manifest = record.manifest
        if manifest.shares < 2 or proc.registry.fencing_epoch < 2:
            return
        follower, holder = r.sample([each.node for each in manifest.holders], 2)
        order = RefreshOrder(**terms(manifest, proc.registry.fencing_epoch - 1))
        raw = sign_order(order, KEYS[BALANCER], proc.now_ms())
        body = REQUEST_CODECS[SHARE_DEAL].encode(ShareDeal(raw, manifest.attempt + 1, record.digest, b""))
        by_follower = SimChannel(world.net, f"follows-{follower}-{sim.steps}", CURVE[follower])
        by_follower.arrived = lambda arrival: None
        with suppress(EngineError):
            by_follower.start(holder, SHARE_DEAL, body, 1.0)

    def ordered(manifest: KeyManifest) -> bytes:
        lost = 0.5 if world.evil == "rogue" else 0.1
        told = terms(manifest, proc.registry.fencing_epoch)
        if r.random() < 0.3:
            return sign_order(RefreshOrder(**told), KEYS[BALANCER], proc.now_ms())
        count = manifest.shares + (r.choice((-1, 1)) if r.random() < lost else 0)
        count = max(manifest.threshold, min(count, len(world.node_names)))
        threshold = max(1, manifest.threshold - 1) if r.random() < lost / 2 else manifest.threshold
        holders = r.sample(world.node_names, count)
        order = ReshareOrder(**told, threshold=threshold, holders=holders, without=[])
        return sign_order(order, KEYS[BALANCER], proc.now_ms())

    def ask(holder: str, body: bytes) -> None:
        with suppress(EngineError):
            channel.start(holder, MOVE, body, 2.0)

    sim.after(0.2 + r.random() * 0.3, act)


def fallback(world: MoveWorld) -> None:
    """The registry's disk is put back to what it was a while ago, once there are keys."""
    r, proc = world.sim.random, world.procs[BALANCER]
    copies: list[sqlite3.Connection] = []
    sudden = r.random() < 0.5
    """It falls back right after it has committed an epoch, whose certificate some may have and others not."""

    def copy() -> None:
        file = proc.disk.files["registry.db"]
        if len(world.acknowledged) < len(world.names) or file.in_transaction:
            world.sim.after(0.2, copy)
            return
        copies.append(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False))
        file.backup(copies[0])  # serialize() leaves out what is in the log
        if sudden:
            world.disks.on_new_epoch = lambda: world.sim.after(r.random() * 0.004, put_back)
        else:
            world.sim.after(0.2 + r.random() * 2, put_back)

    def put_back() -> None:
        world.disks.on_new_epoch = lambda: None
        if world.fallbacks:
            return
        if world.healed:
            copies[0].close()
            return
        world.sim.tell("the registry falls back")
        proc.crash()
        proc.disk.files["registry.db"].close()
        proc.disk.files["registry.db"] = copies[0]
        world.fallbacks += 1
        world.disks.fell_back(proc)
        world.sim.after(0.005 if sudden else 0.1 + r.random(), proc.start)

    world.sim.after(0.4 + r.random(), copy)


def rogue(world: MoveWorld, name: str) -> None:
    """A node with the balancer's key: it certifies what it has prepared, with its own receipts alone."""
    sim, r = world.sim, world.sim.random
    channel = SimChannel(world.net, f"rogue-{name}", CURVE[name])
    channel.arrived = lambda arrival: None

    def act() -> None:
        node = world.nodes[name]
        for row in node.rows() if node.up else ():
            if row.epoch > 1 and row.state == "prepared":
                attack(row)
        if not world.healed:
            sim.after(0.003 + r.random() * 0.02, act)

    def attack(row: Any) -> None:
        manifest = read_key_manifest(row.manifest).manifest
        mine = manifest.holder(name)
        if mine is None:
            return
        told = receipts.encode(Receipt(row.key_id, row.manifest_hash, mine.x))
        given = [sign_envelope("receipt", 1, told, KEYS[name])] * manifest.shares
        payload = certificates.encode(CommitCertificate(row.key_id, row.manifest_hash, given))
        forged = sign_envelope("certificate", 1, payload, KEYS[BALANCER])
        commit = REQUEST_CODECS[SHARE_COMMIT].encode(ShareCommit(row.key_id, forged))
        leave = REQUEST_CODECS[SHARE_LEAVE].encode(ShareLeave(row.manifest, forged))
        for each in r.sample(world.node_names, 2):
            verb, body = (SHARE_LEAVE, leave) if manifest.holder(each) is None else (SHARE_COMMIT, commit)
            with suppress(EngineError):
                channel.start(each, verb, body, 1.0)

    sim.after(0.3, act)


# --- one seed ---


def play(world: MoveWorld) -> None:
    """All of a seed."""
    sim, r = world.sim, world.sim.random
    for proc in world.procs.values():
        proc.skew_ms = r.randrange(-1500, 1500)
        proc.start()
    failpoints.arm(faults(world, POINTS, KINDS, (0, 1, 1, 2, 2, 3, 4)))
    for name in world.names:
        world.play("alice", partial(_with_name, keeper, world, name))
    if r.random() < 0.6:
        world.play("dave", lambda client: _later(0.4, changes(world, client, "k", 3)))
    world.play("carol", lambda client: user(world, client, "k"))
    if "planned" in world.features:
        planner(world, "old leader" in world.features)
    if world.evil == "fallback":
        fallback(world)
    if world.evil == "rogue":
        rogue(world, world.evil_node)
    sim.run(world.chaos_s)
    if world.evil == "two-faced":
        heal(world)
        for key_id in world.disks.living():
            world.disks.check_had(key_id)
        return
    heal_and_check(world, before_books=partial(_last_change, world) if world.fallbacks else None)
    world.disks.check_end()


def _with_name(script: Callable[..., Script], world: MoveWorld, name: str, client: Client) -> Script:
    return script(world, client, name)


def _later(seconds: float, script: Script) -> Script:
    yield seconds
    yield from script


def _last_change(world: MoveWorld) -> None:
    """A registry that fell back learns from the holders what it forgot, by the next change of each key."""

    def script(client: Client) -> Script:
        for keys in world.acknowledged.values():
            for key in [each for each in keys if not each.destroying]:
                for _ in range(LAST_TRIES):
                    without = world.disks.lacking(bytes.fromhex(key.key_id))
                    call = partial(client.calls.reshare_key, key.name, None, None, None, without, 4.0)
                    made, error = yield f"last change of {key.name}", call, 4.0
                    if error is None:
                        key.epoch = max(key.epoch, made.epoch)
                        break
                    yield 1.0
                else:
                    raise Violated(f"{key.name!r} can't be changed after the registry fell back: {error}")

    world.play("alice", script)
    world.sim.run(world.sim.now + 120.0, done=lambda: not world.scripts)


def run_seed(seed: int, how: str = "") -> Report:
    """Run one seed inside ``simulated(MoveWorld)``; ``Violated`` as of the other simulation."""
    world = MoveWorld(seed)
    played(world, lambda: play(world), f" --moves{how}")
    counts = Counter(
        events=world.sim.steps,
        instants=world.disks.instants,
        keys=sum(len(each) for each in world.acknowledged.values()),
        moves=world.reshares,
        refreshes=world.refreshes,
        ordered_moves=world.moved,
        ordered_refreshes=world.renewed,
        trials=world.trials,
        refused=world.refused,
        gathers=world.gathers,
        checked=world.checked,
        lies=world.lied,
        fallbacks=world.fallbacks,
        crashes=sum(proc.crashes for proc in world.procs.values()),
    )
    counts.update({f"named {who}": count for who, count in world.named.items()})
    return Report(world.seed, world.sim.trace, counts, tuple(world.features))
