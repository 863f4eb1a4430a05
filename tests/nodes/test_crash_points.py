"""Thousands of crashes in one process: the real dealer, holders, registry and their SQLite files, without sockets.

A crash is what kill -9 leaves: at a failpoint the files of the member are copied as they are, all of it in memory
is left behind, and it goes on from the copy. Shares are sealed by the process's token. ``test_cluster_crashes`` kills
real processes.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balancer.loop import Service
from balancer.registry import SqliteRegistry
from engine import failpoints
from engine.client.admission import ServiceLimits
from engine.client.transport import Arrival
from engine.errors import EngineError, KeyNotFound, NodeUnavailable
from engine.keys import ALGORITHMS
from engine.protocol.manifest import open_key_manifest
from engine.protocol.requests import (
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ABORT,
    SHARE_COMMIT,
    SHARE_DESTROY,
    SHARE_PREPARE,
    Empty,
)
from engine.protocol.wire import LOWEST_VERSION, PROTOCOL_VERSION, Load, Reply, Status, Versions
from engine.sharing import check_value, reconstruct_key, unblind
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.deal import Conversation, Cursor, Talker
from nodes.handlers import Handlers
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.store import ShareStore
from nodes.token import Lane

NODES = tuple(f"node{number}" for number in range(1, 6))
THRESHOLD = 3
BALANCER = "balancer"
SETTLED_MS = 3_600_000
POINTS = [
    point
    for point in failpoints.POINTS
    if point.startswith(("dealer.", "holder.", "registry.", "store."))
    and not point.endswith((".recorded", ".answered"))
    and not point.startswith(
        ("holder.release.", "holder.deal.", "holder.renew.", "holder.leave.", "registry.change.", "registry.adopt.")
    )
    and not point.startswith(("registry.due.", "registry.revive."))
    and not any(
        part in point
        for part in (".refresh.", ".reshare.", ".settings.", ".trial.", ".quota.", ".export.", ".restore.")
    )
]
"""Points that are passed without a node's process around them, in the making and destroying of keys.

Those of what happens to a key in between are passed on a real cluster.
"""


class Crash(BaseException):
    """A member is dead; nothing catches this but the scene."""

    def __init__(self, member: Member) -> None:
        self.member = member


class Member:
    """A node's durable state or the registry's, in a folder of its own; ``open`` is a start from the disk."""

    def __init__(self, scene: Scene, name: str) -> None:
        self.scene, self.name, self.generation = scene, name, 0
        self.folder = scene.path / name / "0"
        self.folder.mkdir(parents=True)
        self.left: list[Path] = []
        self.store: Any = None
        self.alive = False

    def open(self) -> None:
        world = self.scene.world
        if self.name == BALANCER:
            self.store = SqliteRegistry(self.folder / "registry.db", world.cluster, world.keys[BALANCER], world.now_ms)
            spoken: Any = SimpleNamespace(versions=Versions(LOWEST_VERSION, PROTOCOL_VERSION))
            self.service = Service(
                spoken,
                self.store,
                world.cluster,
                BALANCER,
                None,  # type: ignore[arg-type]
                ServiceLimits(),
                self.folder,
                world.clock,
            )
        else:
            self.store = ShareStore(self.folder / "shares.db", self.name, self.scene.lane)
            self.catalogue = Catalogue(self.store.rows())
            clock = TrustedClock(self.store.clock_mark().mark_ms, wall_ms=world.clock, steady_ms=lambda: 0)
            self.holder = ShareHolder(
                world.cluster,
                world.keys[self.name],
                self.store,
                self.catalogue,
                list(ALGORITHMS),
                GrantLedger(self.store, clock),
            )
            self.conversation = Conversation(
                world.cluster, world.keys[self.name], {}, "quorum", self.holder.own_secret, world.clock
            )
            self.cursor = Cursor()
        self.alive = True

    def crash(self) -> None:
        """Leave the process behind, with the files as they are at this instant for the next start."""
        self.generation += 1
        to = self.folder.with_name(str(self.generation))
        to.mkdir()
        for each in self.folder.iterdir():
            if not each.name.endswith("-shm"):  # made anew by whoever opens the file first
                shutil.copy(each, to)
        self.left.append(self.folder)
        self.folder = to
        self.alive = False

    def bury(self) -> None:
        """Close what was left behind, which changes nothing of the copy."""
        self.close()
        for folder in self.left:
            shutil.rmtree(folder)
        self.left.clear()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None

    def answer(self, verb: str, body: bytes, sender: str) -> bytes:
        member = self.scene.world.cluster.members[sender]
        if self.name == BALANCER:
            request = SimpleNamespace(
                member=member, request=SimpleNamespace(verb=verb, body=body, version=PROTOCOL_VERSION)
            )
            return self.service._handle(request)  # type: ignore[arg-type]
        told: Any = REQUEST_CODECS[verb].decode(body)
        reply: Any = Empty()
        if verb == SHARE_PREPARE:
            reply = self.holder.prepare(self.scene.lane, told, member)
        elif verb == SHARE_COMMIT:
            reply = self.holder.commit(told)
        elif verb == SHARE_ABORT:
            self.holder.abort(told.notice)
        else:
            assert verb == SHARE_DESTROY
            self.holder.destroy(told)
        return REPLY_CODECS[verb].encode(reply)


class Wires:
    """A dealer's channel: every request is answered at once, or its receiver is dead."""

    def __init__(self, scene: Scene, sender: str) -> None:
        self.scene, self.sender = scene, sender
        self.arrivals: list[Arrival] = []
        self.tokens = itertools.count(1)

    def call(self, peer: str, verb: str, body: bytes, timeout_s: float) -> Reply:
        return Reply(
            PROTOCOL_VERSION, 1, Status.OK, self.scene.deliver(peer, verb, body, self.sender), Load(0, 0, False), {}
        )

    def start(self, peer: str, verb: str, body: bytes, timeout_s: float, extensions: Any = None) -> int:
        token = next(self.tokens)
        try:
            self.arrivals.append(Arrival(token, peer, verb, self.call(peer, verb, body, timeout_s), None, 1.0))
        except EngineError as error:
            self.arrivals.append(Arrival(token, peer, verb, None, error, 1.0))
        return token

    def poll(self, timeout_s: float) -> list[Arrival]:
        arrived, self.arrivals = self.arrivals, []
        self.scene.rng.shuffle(arrived)
        return arrived

    def abandon(self, token: int) -> None:
        pass

    def close(self) -> None:
        pass


class Scene:
    """Five holders that can all deal, and a registry; the book of what was acknowledged."""

    def __init__(self, world: Any, lane: Lane, path: Path, seed: int) -> None:
        self.world, self.lane, self.path = world, lane, path
        self.rng = random.Random(seed)
        self.members = {name: Member(self, name) for name in (*NODES, BALANCER)}
        self.stack: list[Member] = []
        self.crashes: dict[str, int] = {}
        self.orders: dict[str, tuple[bytes, bytes]] = {}
        self.kept: dict[str, bytes] = {}
        self.destroyed: set[str] = set()
        self.numbers = itertools.count(1)
        for member in self.members.values():
            member.open()

    # --- crashing ---

    def arm(self, point: str, passing: int) -> None:
        counter = itertools.count(1)

        def die() -> None:
            if next(counter) == passing and self.stack:
                self.crashes[point] = self.crashes.get(point, 0) + 1
                self.stack[-1].crash()
                raise Crash(self.stack[-1])

        failpoints.arm({point: die})

    def running(self, member: Member, work: Callable[[], Any]) -> Any:
        """Have a member do something; ``NodeUnavailable`` if it is dead or dies of it."""
        if not member.alive and self.rng.random() < 0.3:
            raise NodeUnavailable(f"{member.name} is down")
        self.stack.append(member)
        try:
            if not member.alive:
                member.open()
            return work()
        except Crash as crash:
            if crash.member is member:
                member.bury()
            if crash.member is not member or member in self.stack[:-1]:
                raise  # it was the caller's own process too
            raise NodeUnavailable(f"{member.name} died") from None
        finally:
            self.stack.pop()

    def deliver(self, peer: str, verb: str, body: bytes, sender: str) -> bytes:
        member = self.members[peer]
        answer: bytes = self.running(member, lambda: member.answer(verb, body, sender))
        return answer

    def talker(self, node: str) -> Talker:
        return Talker(Wires(self, node), self.lane)  # type: ignore[arg-type]

    def crash_everything(self) -> None:
        for member in self.members.values():
            if member.alive:
                member.crash()
                member.bury()
                self.crashes["everything"] = self.crashes.get("everything", 0) + 1

    # --- what clients ask ---

    def import_order(self) -> str:
        name = f"k/{next(self.numbers)}"
        material = os.urandom(32)
        order = self.world.order(name, "hmac-sha256", THRESHOLD, len(NODES), operation="import")
        self.orders[name] = (order, material)
        return name

    def create(self, name: str, dealer: str) -> bool:
        """Send the order to a dealer; whether it was acknowledged, and then with the same key as ever."""
        order, material = self.orders[name]
        node = self.members[dealer]
        try:
            made = self.running(
                node, lambda: node.conversation.create(self.talker(dealer), order, material, time.monotonic() + 5)
            )
        except KeyNotFound:
            assert name in self.destroyed
            return False
        except (EngineError, Crash):
            return False
        assert name not in self.destroyed
        assert self.kept.setdefault(name, made.manifest) == made.manifest, "a retry gave another key"
        return True

    def destroy(self, name: str, dealer: str) -> bool:
        order = self.world.destroy_order(self.record(name).manifest.key_id, name)
        node = self.members[dealer]

        def work() -> Any:
            entry = node.catalogue.by_id(self.record(name).manifest.key_id)
            if entry is None:
                raise NodeUnavailable(f"{dealer} does not know {name}")
            return node.conversation.destroy(self.talker(dealer), order, [entry], time.monotonic() + 5)

        self.destroyed.add(name)  # asked for: it may be gone from now on
        try:
            self.running(node, work)
        except (EngineError, Crash):
            return False
        return True

    def record(self, name: str) -> Any:
        return open_key_manifest(self.kept[name], self.world.cluster)

    def catch_up(self, name: str) -> None:
        """What a node does every few seconds: read the registry's books, ask about old prepared shares, take it in."""
        node = self.members[name]

        def work() -> None:
            talker = self.talker(name)
            books, node.cursor = node.conversation.registry_books(talker, node.cursor)
            stale = node.catalogue.prepared()
            outcomes = [(entry, node.conversation.outcome(talker, entry)) for entry in stale]
            loop: Any = SimpleNamespace(
                _holder=node.holder,
                _catalogue=node.catalogue,
                _record_change=lambda key_id, before: None,
                _orders=SimpleNamespace(heard=lambda balancer, epoch: None),
            )
            _, well = Handlers._take_in(loop, books, node.cursor, outcomes)
            node.cursor = node.cursor if well else Cursor()

        try:
            self.running(node, work)
        except (EngineError, Crash):
            return

    # --- lives ---

    def step(self, point: str, passing: int) -> None:
        """One creation and more with a crash in it, the client asking again as clients do."""
        rng = self.rng
        name = self.import_order()
        if ".abort." in point or rng.random() < 0.1:
            self.fail_a_creation(name, point, passing)
        self.arm(point, passing)
        for _ in range(rng.randint(1, 6)):
            if self.create(name, rng.choice(NODES)) and rng.random() < 0.7:
                break
        if point.startswith(("registry.expire.", "registry.refuse.")):
            self.leave_an_orphan(forget=point.startswith("registry.refuse."))
            self.arm(point, passing)
        if len(self.kept) - len(self.destroyed) > 3 or ".destroy." in point:
            alive = sorted(set(self.kept) - self.destroyed)
            for gone in alive[:1]:
                for _ in range(rng.randint(1, 4)):
                    if self.destroy(gone, rng.choice(NODES)):
                        break
        if rng.random() < 0.3 or "registry." in point:
            for node in rng.sample(NODES, 2):
                self.catch_up(node)
        if rng.random() < 0.05 or point.startswith("registry.open."):
            failpoints.arm({})
            self.crash_everything()
            self.arm(point, passing)
            for node in NODES:
                self.catch_up(node)
        failpoints.arm({})

    def fail_a_creation(self, name: str, point: str, passing: int) -> None:
        """A creation that the dealer gives up: the third holder's answer is an error."""
        failures = itertools.count(1)

        def fail() -> None:
            if next(failures) in (2, 3):
                raise EngineError("the receipt is lost")

        self.arm(point, passing)
        armed = dict(failpoints._armed)
        if point != "holder.prepare.signed":
            failpoints.arm({**armed, "holder.prepare.signed": fail})
        self.create(name, self.rng.choice(NODES))

    def leave_an_orphan(self, *, forget: bool) -> None:
        """A dealer that dies after the shares are prepared, and an order that expires; or a registry that forgot it."""
        before = self.members[BALANCER]
        if not before.alive:
            before.open()
        kept = self.path / "registry.before"
        before.crash()  # a copy, to fall back to
        before.bury()
        shutil.copytree(before.folder, kept)
        before.open()
        self.arm("dealer.create.prepared", 1)
        self.create(self.import_order(), self.rng.choice(NODES))
        failpoints.arm({})
        if forget:
            before.close()
            shutil.rmtree(before.folder)
            shutil.copytree(kept, before.folder)
            before.open()
        shutil.rmtree(kept)
        self.world.now_ms += 120_000

    def settle(self) -> None:
        """Everybody is up, all orders ran out, everybody caught up."""
        failpoints.arm({})
        for member in self.members.values():
            if not member.alive:
                member.open()
        self.world.now_ms += SETTLED_MS
        for _ in range(2):
            for node in NODES:
                self.catch_up(node)

    def check(self) -> None:
        """No acknowledged key lost, no wrong one; what was not acknowledged is whole or absent; names are free."""
        self.settle()
        rows = {name: {row.name: row for row in self.members[name].store.rows()} for name in NODES}
        assert not [row for held in rows.values() for row in held.values() if row.state == "prepared"]
        for name, (_, material) in self.orders.items():
            holding = [node for node in NODES if name in rows[node] and rows[node][name].sealed]
            booked = any(name in held and held[name].state == "committed" for held in rows.values())
            if name in self.kept and name not in self.destroyed:
                assert booked, f"{name} was acknowledged and is lost"
            if not booked:
                assert not holding, f"{name} is neither there nor gone"
                continue
            assert len(holding) >= THRESHOLD + 1, f"{name} has {len(holding)} shares"
            record = self.members[holding[0]].catalogue.by_name(name).record  # type: ignore[union-attr]
            assert self.kept.get(name, record.raw) == record.raw
            shares = [self.share(node, name) for node in holding]
            for some in itertools.combinations(shares, THRESHOLD):
                secret = reconstruct_key(some)
                assert check_value(secret, record.manifest.key_context) == record.manifest.check_value
                assert bytes(unblind(secret)) == material
        free = [name for name in self.orders if not any(name in held for held in rows.values())]
        for name in free[:2]:
            material = os.urandom(32)
            order = self.world.order(name, "hmac-sha256", THRESHOLD, len(NODES), operation="import")
            self.orders[name] = (order, material)
            assert self.create(name, "node1"), f"the name {name} is not free"

    def share(self, node: str, name: str) -> Any:
        member = self.members[node]
        entry = member.catalogue.by_name(name)
        assert entry is not None
        return member.holder.own_share(self.lane, entry)[0]

    def close(self) -> None:
        failpoints.arm({})
        for member in self.members.values():
            if member.alive:
                member.close()


@pytest.fixture
def scenes(world: Any, lane: Lane) -> Iterator[Callable[[int], Scene]]:
    """Made in memory where that can be: what kill -9 leaves is in the kernel's, a disk would only be slower."""
    made: list[Scene] = []
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own in it
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:

        def make(seed: int) -> Scene:
            made.append(Scene(world, lane, Path(folder) / str(len(made)), seed))
            return made[-1]

        yield make
        for scene in made:
            scene.close()


def test_every_point(scenes: Callable[[int], Scene]) -> None:
    """A crash at each point in turn, at its first and its second passing, without a key lost or wrong."""
    scene = scenes(1)
    for passing, point in itertools.product((1, 2), POINTS):
        scene.step(point, passing)
    for _ in range(10):  # whoever is asked may have been down just then
        for point in set(POINTS) - set(scene.crashes):
            scene.step(point, 1)
    scene.check()
    never = set(POINTS) - set(scene.crashes)
    assert not never, f"nothing passed {sorted(never)}"


def test_a_registry_from_an_older_copy_takes_nothing_away(scenes: Callable[[int], Scene]) -> None:
    """Keys made since stay with their holders; what was only prepared goes, and its attempt never commits."""
    scene = scenes(2)
    first, second, third = scene.import_order(), scene.import_order(), scene.import_order()
    assert scene.create(first, "node1")
    registry = scene.members[BALANCER]
    older = scene.path / "older"
    registry.close()
    shutil.copytree(registry.folder, older)
    registry.open()
    assert scene.create(second, "node1")
    scene.arm("dealer.create.prepared", 1)
    assert not scene.create(third, "node2")
    assert scene.crashes == {"dealer.create.prepared": 1}
    failpoints.arm({})
    registry.close()
    registry.folder = older
    registry.open()
    scene.check()
    for node in NODES:
        held = {row.name: row.state for row in scene.members[node].store.rows()}
        assert held[first] == held[second] == "committed"
    assert third in scene.kept  # its name was free, and check made another key of it


@pytest.mark.long
def test_two_thousand_random_crashes(scenes: Callable[[int], Scene]) -> None:
    """At least 2,000 crashes in at most KEYQUORUM_CRASH_S (600) seconds; each seed is checked whole."""
    until = time.monotonic() + float(os.environ.get("KEYQUORUM_CRASH_S", "600"))
    crashes: dict[str, int] = {}
    kept = 0
    for seed in itertools.count(1):
        scene = scenes(seed)
        for _ in range(20):
            scene.step(scene.rng.choice(POINTS), scene.rng.randint(1, 6))
        try:
            scene.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        for point, count in scene.crashes.items():
            crashes[point] = crashes.get(point, 0) + count
        kept += len(scene.kept)
        scene.close()
        for member in scene.members.values():
            member.alive = False
        shutil.rmtree(scene.path)
        if sum(crashes.values()) >= 2_000 or time.monotonic() > until:
            break
    sys.stdout.write(
        f"\nin one process: {sum(crashes.values())} crashes at {len(crashes)} points over {seed} seeds, "
        f"{kept} acknowledged keys, 0 lost, 0 wrong\n"
    )
    assert sum(crashes.values()) >= 2_000, "too slow a machine for 2,000 crashes in the time given"
