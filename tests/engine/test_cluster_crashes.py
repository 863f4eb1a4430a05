"""Real processes die by SIGKILL at every named step, are started again, and nothing that was acknowledged is lost.

One cluster serves many points: only the process that died is started again, with the next point set. Its three nodes
keep 2-of-3 keys, so that a creation needs every node, the one that dies too.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from sampled import some

import engine
from engine import Engine, LocalCluster
from engine.client.config import load_identity
from engine.client.transport import Channel, ask
from engine.failpoints import POINTS, VARIABLE
from engine.protocol.manifest import CreateOrder, create_orders, open_key_manifest, read_key_manifest
from engine.protocol.requests import Create, Operate
from engine.protocol.signed import sign_envelope

R = TypeVar("R")
VICTIM = "node1"
BALANCER = "balancer"
PATIENCE_S = 60.0
"""How long a call goes on while the process that died comes back; nothing waits so long on purpose."""
ORDER_MS = 14 * 60_000
KEPT = 8
"""Keys beyond this many are destroyed."""
ROUNDS = 4
"""Lives of a key within which a point must have been passed."""
ELSEWHERE = (
    "rotate.",
    "registry.expire.",
    "registry.refuse.",
    "registry.adopt.",
    "dealer.move.",
    "holder.many.",
    "combiner.quota.",
    "dealer.settings.",
    "holder.settings.",
    "holder.export.",
    "holder.restore.",
    "registry.quota.",
    "registry.settings.",
    "registry.due.",
    "registry.revive.",
)
"""Points that no life of a key here passes: tests/engine/test_cluster_matrix.py, tests/nodes/test_rotation.py and
test_crash_points.py go through them."""
REFRESH = (".refresh.", "holder.deal.", "holder.renew.", "registry.change.")
TRIAL = ("dealer.reshare.tried", "holder.trial.")
RESHARE = (".reshare.", "holder.accept.", "holder.leave.", *TRIAL)


def _helped(point: str) -> str:
    """What else has to be set so that the point is passed: an abort needs a creation that fails."""
    if ".abort." in point:
        return f"holder.prepare.signed=error@1; {point}=kill"
    if point.startswith("store.write."):
        return f"{point}=kill@8"  # the first ones are passed while the node starts
    return f"{point}=kill"


@dataclass(slots=True)
class _Kept:
    """An acknowledged key, and what was made with it."""

    key_id: bytes
    raw_order: bytes
    manifest: bytes
    threshold: int
    expires_ms: int
    ciphertext: bytes = b""


@dataclass(slots=True)
class Crashes:
    """A running cluster whose processes die at points, and the book of what it acknowledged."""

    cluster: LocalCluster
    kq: Engine
    rng: random.Random
    kept: dict[str, _Kept] = field(default_factory=dict)
    destroyed: list[str] = field(default_factory=list)
    deaths: int = 0
    retried: int = 0
    threshold: int = 2
    destroying: bool = False
    refreshing: bool = False
    resharing: bool = False
    trying: bool = False
    _number: int = 0

    # --- one life of a key, each call repeated until it is acknowledged ---

    def life(self) -> None:
        """Create, use cold and warm, destroy another one."""
        name = self._name()
        self.create(name)
        kept = self.kept[name]
        kept.ciphertext = self._again(lambda: self.kq.encrypt(name, name.encode(), timeout=PATIENCE_S))
        self._again(lambda: self.kq.flush(name))
        self._again(lambda: self.kq.prewarm(name))
        for _ in range(6):
            assert self._again(lambda: self.kq.decrypt(name, kept.ciphertext, timeout=PATIENCE_S)) == name.encode()
        self._use_at_victim(name, kept)
        if self.refreshing:
            self._again(lambda: self.kq.refresh_key(name, timeout=PATIENCE_S))
            assert self._again(lambda: self.kq.decrypt(name, kept.ciphertext, timeout=PATIENCE_S)) == name.encode()
        if self.resharing:
            self._move(name)
            assert self._again(lambda: self.kq.decrypt(name, kept.ciphertext, timeout=PATIENCE_S)) == name.encode()
        if self.destroying or len(self.kept) > KEPT:
            self.destroy(self.rng.choice(list(self.kept)))

    def _move(self, name: str) -> None:
        """From the victim to the others, and back to all; or so that each time as few deal as make the key.

        Then the new epoch is tried: first by one of the others, the victim coordinating, then by the victim.
        """
        others = [node for node in self.cluster.nodes if node != VICTIM]
        without = others[1:] if self.trying else []
        for threshold, holders in ((1, others), (self.kept[name].threshold, [VICTIM, *others])):
            move = partial(self.kq.reshare_key, name, threshold, holders=holders, without=without, timeout=PATIENCE_S)
            self._again(move)

    def _use_at_victim(self, name: str, kept: _Kept) -> None:
        """One operation by the node that may be meant to die of it; it has the key loaded, so no grant is needed."""
        identity = load_identity(self.cluster.client_config.parent / "identity.toml")
        with (
            Channel(identity.transport, {VICTIM: self.cluster.cluster.nodes[VICTIM]}) as channel,
            contextlib.suppress(engine.NodeUnavailable, engine.DeadlineExceeded, engine.NeedGrant, engine.KeyNotFound),
        ):
            body = Operate(name, kept.key_id, kept.ciphertext, b"", b"", False, b"")
            assert ask(channel, VICTIM, "decrypt", body, 5.0).data == name.encode()

    def _name(self) -> str:
        """A name whose first dealer and holder is the victim."""
        shown = self.cluster.cluster
        while True:
            self._number += 1
            name = f"crash/{self._number}"
            if shown.group_holders(shown.group_of(name))[0] == VICTIM:
                return name

    def create(self, name: str) -> None:
        """Send one order until a dealer acknowledges it, and once more afterwards: the same key each time."""
        identity = load_identity(self.cluster.client_config.parent / "identity.toml")
        now_ms = time.time_ns() // 1_000_000
        order = CreateOrder(
            os.urandom(16), name, "aes-256-gcm", self.threshold, 3, "generate", now_ms + int(PATIENCE_S * 1000)
        )
        raw = sign_envelope("order.create", now_ms, create_orders.encode(order), identity.signing)
        members = {member.name: member for member in self.cluster.cluster.nodes.values()}
        until = time.monotonic() + PATIENCE_S
        made: list[bytes] = []
        dealers = [VICTIM, *(each for each in self.cluster.nodes if each != VICTIM)]
        while len(made) < 2:
            for dealer in dealers:
                with Channel(identity.transport, members) as channel:
                    try:
                        made.append(ask(channel, dealer, "generate", Create(raw, b""), 10.0).manifest)
                        break
                    except engine.EngineError as error:
                        self._bear(error, until)
            dealers.reverse()
        record = open_key_manifest(made[0], self.cluster.cluster)
        assert made[0] == made[1]
        assert record.manifest.key_id == order.key_id
        self.kept[name] = _Kept(order.key_id, raw, made[0], self.threshold, order.expires_ms)

    def destroy(self, name: str) -> None:
        """Destroy a key; an unanswered destruction may have been carried out."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.kq.destroy_key(name, timeout=PATIENCE_S)
                break
            except engine.KeyNotFound:
                break
            except engine.EngineError as error:
                self._bear(error, until)
        del self.kept[name]
        self.destroyed.append(name)

    def _again(self, call: Callable[[], R]) -> R:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except engine.EngineError as error:
                self._bear(error, until)

    def _bear(self, error: engine.EngineError, until: float) -> None:
        """Take an error for the crash's; a wrong result, or one that does not end, never is."""
        if time.monotonic() >= until or isinstance(
            error, engine.InvalidTag | engine.InvalidSignature | engine.ShareCorrupt | engine.KeyNotFound
        ):
            raise error
        self.retried += 1
        time.sleep(0.02)

    # --- dying ---

    def arm(self, process: str, setting: str) -> None:
        """Start a process that does not run, with failpoints set; it may die before it serves."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = setting
        try:
            self.cluster.start_node(process)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before

    def fill(self) -> None:
        """Start everything that does not run, without failpoints."""
        for process, pid in self.cluster.running().items():
            if pid is None:
                self.cluster.start_node(process)

    def pass_point(self, process: str, setting: str) -> None:
        """Have the process die as set, in the middle of lives of keys, and come back."""
        # Of 2-of-3 keys a combiner asks one other holder, of its choice; of 3-of-3 keys every one.
        self.threshold = 3 if "holder.release." in setting else 2
        self.destroying = ".destroy." in setting
        self.refreshing = any(part in setting for part in REFRESH)
        self.resharing = any(part in setting for part in RESHARE)
        self.trying = any(part in setting for part in TRIAL)
        if self.cluster.running()[process] is not None:
            self.cluster.kill(process)
        with contextlib.suppress(engine.ClusterError):  # it may die while it starts
            self.arm(process, setting)
        for _ in range(ROUNDS):
            with ThreadPoolExecutor(1) as pool:
                living = pool.submit(self.life)
                died = self.restart_the_dead(living)
                living.result()
            if died:
                return
        raise AssertionError(f"{setting}: {process} never passed it")

    def restart_the_dead(self, living: Future[None]) -> bool:
        died = False
        while True:
            over = living.done()
            dead = [process for process, pid in self.cluster.running().items() if pid is None]
            for process in dead:
                self.deaths += 1
                died = True
                self.cluster.start_node(process)
            if over and not dead:
                return died
            time.sleep(0.005)

    # --- what must be so in the end ---

    def check(self) -> None:
        """Every acknowledged key works cold without any one node; the same order gives the same key; no orphan."""
        self.fill()
        identity = load_identity(self.cluster.client_config.parent / "identity.toml")
        members = {member.name: member for member in self.cluster.cluster.nodes.values()}
        for name, kept in self.kept.items():
            if kept.expires_ms < time.time() * 1000:
                continue  # an order is refused once it has run out
            with Channel(identity.transport, members) as channel:
                for node in self.cluster.nodes:
                    again = ask(channel, node, "generate", Create(kept.raw_order, b""), 15.0)
                    told, first = (read_key_manifest(raw).manifest for raw in (again.manifest, kept.manifest))
                    assert (told.key_id, told.check_value) == (first.key_id, first.check_value), name
        for absent in ("", *self.cluster.nodes):
            if absent:
                self.cluster.kill(absent)
            self._again(self.kq.flush)
            for name, kept in self.kept.items():
                if kept.threshold == 2 or not absent:
                    assert self._again(lambda: self.kq.decrypt(name, kept.ciphertext)) == name.encode()  # noqa: B023
            self.fill()
        assert sorted(each.name for each in self._again(lambda: self.kq.list_keys("crash/*"))) == sorted(self.kept)
        self._check_stores()

    def _check_stores(self) -> None:
        """Once settled no store has a prepared share, nor a share of a destroyed key.

        The share of a refresh that was aborted stays, with the notice on it, until the next refresh.
        """
        until = time.monotonic() + PATIENCE_S
        while left := {node: found for node in self.cluster.nodes if (found := self._unsettled(node))}:
            assert time.monotonic() < until, left
            time.sleep(0.2)

    def _unsettled(self, node: str) -> list[tuple[str, str]]:
        path = self.cluster.data_folder(node) / "shares.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            rows = store.execute(
                "SELECT name, state, length(sealed) FROM keys WHERE state != 'prepared' OR document = x''"
            ).fetchall()
        return [
            (name, state)
            for name, state, sealed in rows
            if state == "prepared" or (name in self.destroyed and (state != "destroyed" or sealed))
        ]


@pytest.fixture
def crashes(tmp_path: Path) -> Iterator[Crashes]:
    with (
        LocalCluster(nodes=3, threshold=2, path=tmp_path / "kq") as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        yield Crashes(cluster, kq, random.Random(4))


def _report(what: str, crashes: Crashes, begun: float) -> None:
    sys.stdout.write(
        f"\n{what}: {crashes.deaths} deaths of real processes in {time.monotonic() - begun:.0f} s, "
        f"{len(crashes.kept)} keys kept and {len(crashes.destroyed)} destroyed, {crashes.retried} retries, "
        "0 acknowledged keys lost, 0 wrong results\n"
    )


def _go_through(crashes: Crashes, process: str, points: Iterable[str]) -> None:
    begun = time.monotonic()
    for point in points:
        if ".abort." in point and process == BALANCER:
            crashes.cluster.kill(VICTIM)
            crashes.arm(VICTIM, "holder.prepare.signed=error@1")
        crashes.pass_point(process, _helped(point))
    crashes.check()
    _report(process, crashes, begun)


NODE_POINTS = [point for point in POINTS if not point.startswith(("registry.", *ELSEWHERE))]
REGISTRY_POINTS = [point for point in POINTS if point.startswith("registry.") and not point.startswith(ELSEWHERE)]
SAMPLE = [
    point
    for point in NODE_POINTS
    if (point.endswith((".recorded", ".answered")) or point.startswith(("combiner.", "holder.release.", "store.")))
    and not any(part in point for part in (*REFRESH, *RESHARE, *ELSEWHERE))
]
"""What tests/nodes/test_crash_points.py can't pass: it calls holders, dealer and registry without their processes.

Members also die in tests/engine/test_cluster_refresh.py and test_cluster_reshare.py.
"""


def test_a_node_dies_at_its_points(crashes: Crashes) -> None:
    """Dealer, holder and combiner are killed around their replies; what was acknowledged stays, retries agree."""
    _go_through(crashes, VICTIM, some(SAMPLE))


def test_the_registry_dies_around_a_commit(crashes: Crashes) -> None:
    """The balancer is killed right after the two instants at which a key comes to be and ceases."""
    _go_through(crashes, BALANCER, ["registry.commit.durable", "registry.destroy.durable"])


@pytest.mark.long
def test_a_node_dies_at_every_point(crashes: Crashes) -> None:
    """Every named point of a node's process."""
    _go_through(crashes, VICTIM, NODE_POINTS)


@pytest.mark.long
def test_the_registry_dies_at_every_point(crashes: Crashes) -> None:
    """As for the nodes; a balancer takes seconds to start."""
    _go_through(crashes, BALANCER, REGISTRY_POINTS)


@pytest.mark.long
def test_random_crashes(crashes: Crashes) -> None:
    """Random points, passings and victims, and kill -9 of everything at once, for KEYQUORUM_CRASH_S seconds (600)."""
    begun = time.monotonic()
    until = begun + float(os.environ.get("KEYQUORUM_CRASH_S", "600"))
    rng = crashes.rng
    crashes.refreshing = crashes.resharing = True
    while time.monotonic() < until:
        settings = {
            node: f"{rng.choice(NODE_POINTS)}=kill@{rng.randint(1, 12)}"
            for node in rng.sample(crashes.cluster.nodes, rng.randint(1, len(crashes.cluster.nodes)))
        }
        for node, setting in settings.items():
            if crashes.cluster.running()[node] is not None:
                crashes.cluster.kill(node)
                crashes.deaths += 1
            with contextlib.suppress(engine.ClusterError):
                crashes.arm(node, setting)
        with ThreadPoolExecutor(1) as pool:
            living = pool.submit(crashes.life)
            while not living.done() and rng.random() < 0.1:
                time.sleep(rng.random() * 0.2)
                for process, pid in crashes.cluster.running().items():
                    if pid is not None:
                        crashes.cluster.kill(process)  # counted where it is started again
            crashes.restart_the_dead(living)
            living.result()
    crashes.check()
    _report("random", crashes, begun)
