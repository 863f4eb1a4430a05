"""Nodes with real stores that hold a key, their coordinator, and a carrier in the network's place that may lie."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from holder_node import HolderNode

from engine.client.bundles import answer_bundle
from engine.client.transport import Arrival
from engine.errors import EngineError, NodeUnavailable
from engine.protocol.manifest import CommitCertificate, KeyRecord, certificates, read_key_manifest
from engine.protocol.requests import (
    REGISTRY_CHANGE,
    REGISTRY_COMMIT,
    REGISTRY_MANY,
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ACCEPT,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_LEAVE,
    SHARE_MANY,
    SHARE_REFRESH,
    SHARE_RENEW,
    SHARE_RESHARE,
    SHARE_TRIAL,
    Committed,
    Reserved,
    ShareCommit,
)
from engine.protocol.wire import PROTOCOL_VERSION, Load, Reply, Status
from engine.sharing import check_value, reconstruct_key
from nodes.bundles import sign_replies
from nodes.deal import Conversation, Talker
from nodes.refresh import Coordinator
from nodes.token import Lane, Token
from nodes.trial import Trial

__all__ = ["COORDINATOR", "NODES", "Scene", "prepared", "silent"]

NODES = tuple(f"node{number}" for number in range(1, 6))
COORDINATOR = "node1"


class Scene:
    """Five nodes, three of which hold a key 2-of-3, and the network between them as the coordinator sees it."""

    def __init__(self, world: Any, path: Path, lane: Lane, token: Token) -> None:
        self.world, self.path, self.lane = world, path, lane
        self.algorithms = list(token.algorithms)
        self.dealt = world.deal(holders=NODES[:3], threshold=2)
        self.key_id = self.dealt.key_id
        self.nodes = {name: HolderNode(world, name, path, lane, self.algorithms, self.key_id) for name in NODES}
        self.certificate = world.certificate(self.dealt)
        for name in NODES[:3]:
            self.nodes[name].holder.prepare(lane, self.dealt.offers[name], self.member(COORDINATOR))
            self.nodes[name].holder.commit(ShareCommit(self.key_id, self.certificate))
        self.attempt = 1
        self.aborts: list[bytes] = []
        self.false: dict[tuple[str, str], Callable[[Any], Any]] = {}
        """(verb, node) -> what becomes of its reply, or an error in its place."""
        self.bodies: dict[tuple[str, str], Any] = {}
        """(verb, node) -> what it was last asked."""
        self.given_up: list[int] = []

    def close(self) -> None:
        for node in self.nodes.values():
            node.store.close()

    def member(self, name: str) -> Any:
        return self.world.cluster.members[name]

    def order(self, holders: Sequence[str], threshold: int = 2, **changes: Any) -> bytes:
        record = self.nodes[changes.pop("known_to", COORDINATOR)].entry.record
        raw: bytes = self.world.reshare_order(record, threshold=threshold, holders=list(holders), **changes)
        return raw

    def reshare(self, order: bytes, coordinator: str = COORDINATOR, grant: bytes = b"") -> KeyRecord:
        """Have a node carry the order out by the next attempt."""
        self.attempt += 1
        self.coordinator = coordinator
        talker: Any = type("Talker", (), {"channel": None})()
        self.described = self.coordinator_of(coordinator).change(talker, order, 10.0, grant)
        return read_key_manifest(self.described.manifest)

    def coordinator_of(self, name: str) -> Coordinator:
        """A node's coordinator, which talks to this."""
        node: Any = self.nodes[name]
        return Coordinator(
            self.world.cluster,
            self.world.keys[name],
            node.catalogue,
            self,  # type: ignore[arg-type]
            node.orders,
            self.world.clock,
            lambda: 0.0,
        )

    # --- what the coordinator talks to ---

    def ask_registry(self, channel: object, verb: str, message: Any, deadline_s: float) -> Any:
        if verb == REGISTRY_MANY:
            return answer_bundle(message, lambda one: self.ask_registry(channel, message.verb, one, deadline_s))
        if verb == REGISTRY_CHANGE:
            return Reserved(self.attempt, [], self.aborts, b"", b"")
        assert verb == REGISTRY_COMMIT
        record = read_key_manifest(message.manifest)
        body = CommitCertificate(record.manifest.key_id, record.digest, list(message.receipts))
        self.certificate = self.world.signed(certificates, "certificate", body, "balancer")
        return Committed(self.certificate)

    def ask_all(self, channel: object, verb: str, bodies: dict[str, bytes], *rest: object) -> Iterator[tuple[str, Any]]:
        for name, raw in bodies.items():
            body = self.bodies[verb, name] = REQUEST_CODECS[verb].decode(raw)
            try:
                if verb == SHARE_MANY:
                    yield name, self.many(name, body)
                else:
                    yield name, self.false.get((verb, name), lambda each: each)(self.step(verb, name, body))
            except EngineError as error:
                yield name, error

    def many(self, name: str, body: Any) -> Any:
        """What a node answers to a bundle."""
        holder = self.nodes[name].holder
        with holder.together():
            return answer_bundle(
                body,
                lambda one: self.step(body.verb, name, one),
                finish=lambda replies: sign_replies(replies, holder.pen),
            )

    def step(self, verb: str, name: str, body: Any, sender: str = "") -> Any:
        """What a node answers."""
        node = self.nodes[name]
        if verb == SHARE_LEAVE:
            return node.holder.leave(body)
        if verb == SHARE_COMMIT:
            return node.holder.commit(body)
        if verb == SHARE_TRIAL:
            return self.trial(name, body, sender or self.coordinator)
        renewer = node.renewer
        steps = {
            SHARE_DEAL: renewer.deal,
            SHARE_RESHARE: renewer.reshare,
            SHARE_ACCEPT: renewer.accept,
            SHARE_REFRESH: renewer.refresh,
            SHARE_RENEW: renewer.renew,
        }
        return steps[verb](self.lane, body, self.member(sender or self.coordinator))

    def trial(self, name: str, body: Any, sender: str) -> Any:
        """What a node answers that is to combine the new epoch: it asks the others on its own."""
        node = self.nodes[name]
        cluster, key, clock = self.world.cluster, self.world.keys[name], self.world.clock
        conversation = Conversation(cluster, key, {}, "up", node.holder.own_secret, clock)
        talker: Any = Talker(Wires(self, name), self.lane)  # type: ignore[arg-type]
        trial = Trial(cluster, name, node.holder, conversation, clock)
        return trial.run(talker, body, self.member(sender), time.monotonic() + 5.0)

    def give_up(self, channel: object, name: str, attempt: Any, holders: Any, error: Exception) -> bytes:
        self.given_up.append(attempt.attempt)
        self.aborts.append(self.world.abort(self.key_id, attempt.attempt))
        raise error

    # --- what is so ---

    def holds(self, names: Sequence[str], epoch: int) -> bool:
        """Whether exactly these have a valid share, of this epoch, and nobody any other."""
        return all(
            node.rows() == {epoch: ("committed", True)}
            if name in names
            else not any(sealed for _, sealed in node.rows().values())
            for name, node in self.nodes.items()
        )

    def is_key(self, names: Sequence[str]) -> bool:
        manifest = self.dealt.manifest
        threshold = self.nodes[names[0]].entry.manifest.threshold
        secret = reconstruct_key([self.nodes[name].share() for name in names], threshold=threshold)
        return bool(check_value(secret, manifest.key_context) == manifest.check_value)


class Wires:
    """A node's channel to the holders: each request is answered at once."""

    def __init__(self, scene: Scene, sender: str) -> None:
        self.scene, self.sender = scene, sender
        self.arrivals: list[Arrival] = []
        self.tokens = itertools.count(1)

    def start(self, peer: str, verb: str, body: bytes, timeout_s: float, extensions: Any = None) -> int:
        token = next(self.tokens)
        told, scene = REQUEST_CODECS[verb].decode(body), self.scene
        reply, error = None, None
        try:
            released = scene.nodes[peer].holder.release(scene.lane, told, scene.member(self.sender))
            released = scene.false.get((verb, peer), lambda each: each)(released)
            raw = REPLY_CODECS[verb].encode(released)
            reply = Reply(PROTOCOL_VERSION, token, Status.OK, raw, Load(0, 0, False), {})
        except EngineError as failure:
            error = failure
        self.arrivals.append(Arrival(token, peer, verb, reply, error, 1.0))
        return token

    def poll(self, timeout_s: float) -> list[Arrival]:
        arrived, self.arrivals = self.arrivals, []
        return arrived

    def abandon(self, token: int) -> None:
        pass


def silent(reply: Any) -> Any:
    raise NodeUnavailable("it is down")


def prepared(scene: Scene, holders: Sequence[str], threshold: int = 2) -> tuple[KeyRecord, bytes]:
    """All of these have prepared a share by an attempt of which nobody was told more; its record and certificate."""
    kept: list[Any] = []

    def commit(channel: object, verb: str, message: Any, deadline_s: float) -> Any:
        if verb == REGISTRY_COMMIT:
            kept.append(message)
            raise NodeUnavailable("the registry is down")
        return Scene.ask_registry(scene, channel, verb, message, deadline_s)

    scene.ask_registry = commit  # type: ignore[method-assign]
    with pytest.raises(NodeUnavailable):
        scene.reshare(scene.order(holders, threshold))
    del scene.ask_registry  # type: ignore[attr-defined]
    record = read_key_manifest(kept[0].manifest)
    body = CommitCertificate(scene.key_id, record.digest, list(kept[0].receipts))
    return record, scene.world.signed(certificates, "certificate", body, "balancer")
