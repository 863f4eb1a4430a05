"""Transcripts of the calls: scripted nodes, an injected clock, and the exact exchanges that follow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from statuses import node_status

from engine.client import calls as calls_module
from engine.client.calls import Await, Calls, Ended, Exchange, KeySummary, answered_by_any, merge_lists
from engine.client.tracing import trace_context
from engine.errors import (
    AccessDenied,
    DeadlineExceeded,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyExists,
    KeyNotFound,
    KeyPending,
    ManifestError,
    NeedGrant,
    NodeUnavailable,
    Overloaded,
    ProtocolError,
    QuorumUnavailable,
    RegistryUnavailable,
    StaleKey,
    TokenError,
)
from engine.keys import algorithm
from engine.protocol.grant import check_grant
from engine.protocol.manifest import (
    Cluster,
    CommitCertificate,
    CreateOrder,
    Holder,
    KeyManifest,
    Member,
    PolicyRule,
    Receipt,
    RefreshOrder,
    certificates,
    chain_pin,
    create_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    open_create_order,
    open_key_manifest,
    receipts,
    refresh_orders,
)
from engine.protocol.requests import (
    REPLY_CODECS,
    REQUEST_CODECS,
    Destroyed,
    Flushed,
    KeyDescription,
    KeyEntry,
    KeyList,
    NodeLatency,
    Result,
)
from engine.protocol.routing import Router
from engine.protocol.signed import SigningKey, sign_envelope
from engine.protocol.wire import ErrorBody, Load, Reply, Status, error_codec

NODES = ("n1", "n2", "n3", "n4", "n5")
NOW_MS = 1_800_000_000_000
LOADED = Load(0, 10, True)
IDLE = Load(0, 0, False)


@dataclass
class World:
    """A cluster of keys alone: signs what nodes, balancer and client would sign."""

    keys: dict[str, SigningKey]
    cluster: Cluster

    def describe(self, name: str = "k", algo: str = "aes-256-gcm", key_id: bytes = b"i" * 16) -> KeyDescription:
        """A valid description of a 3-of-5 key."""
        order = CreateOrder(key_id, name, algo, 3, 5, "generate", NOW_MS + 60_000)
        return self.deal(sign_envelope("order.create", 1, create_orders.encode(order), self.keys["app"]))

    def deal(self, raw_order: bytes, dealer: str = "n1", refresh: bytes = b"") -> KeyDescription:
        """What a dealer makes of an order."""
        order, _ = open_create_order(raw_order, self.cluster, None)
        public = b"\x30" + bytes(50) if algorithm(order.algorithm).asymmetric else b""
        holders = [Holder(node, x, hashlib.sha256(bytes([x])).digest()) for x, node in enumerate(NODES, 1)]
        manifest = KeyManifest(
            order.key_id, order.name, 1, 1, 1, order.algorithm, 3, holders, public, bytes(32), raw_order, b""
        )
        if refresh:
            manifest = replace(manifest, epoch=2, attempt=2, previous=bytes(32), change=refresh)
        raw = sign_envelope("key", 1, key_manifests.encode(manifest), self.keys[dealer])
        record = open_key_manifest(raw, self.cluster)
        signed = [
            sign_envelope("receipt", 1, receipts.encode(Receipt(order.key_id, record.digest, x)), self.keys[node])
            for x, node in enumerate(NODES, 1)
        ]
        certificate = certificates.encode(CommitCertificate(order.key_id, record.digest, signed))
        return KeyDescription(raw, sign_envelope("certificate", 1, certificate, self.keys["bal"]), [], b"")


@pytest.fixture(scope="module")
def world() -> World:
    names = [*NODES, "bal", "app", "op"]
    keys = {name: SigningKey(name, Ed25519PrivateKey.generate()) for name in names}
    members = [Member("op", "operator", keys["op"].public, bytes(32))]
    for number, name in enumerate(NODES):
        place = f"site{number % 3}/room/rack/h{number}"
        members.append(Member(name, "node", keys[name].public, os.urandom(32), f"tcp://h:{number + 1}", "", place))
    members.append(Member("bal", "balancer", keys["bal"].public, os.urandom(32), "tcp://h:9", "tcp://h:10"))
    members.append(Member("app", "client", keys["app"].public, os.urandom(32)))
    rules = [PolicyRule("app", "*", ["*"])]
    chain = issue_cluster_manifest(name="test", members=members, rules=rules, operators=[keys["op"]])
    return World(keys, open_chain(chain, chain_pin(chain)))


@pytest.fixture(autouse=True)
def _no_pem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public keys of this world are no real ones."""
    monkeypatch.setattr(calls_module, "public_key_pem", lambda der: "PEM")


Answer = Any
"""A body for an ok reply, an exception for an error reply, ``Lost`` for none, or a list of these to be used in turn."""


@dataclass
class Lost:
    """No reply: the transport's error, after so many seconds."""

    error: EngineError
    after_s: float | None = None


@dataclass
class Play:
    """Scripted nodes. ``answers`` maps (node, verb) or verb to an answer; ``seen`` is the transcript."""

    world: World
    answers: dict[Any, Answer]
    now_s: float = 100.0
    seen: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    extensions: list[Any] = field(default_factory=list)
    load: Load = LOADED
    cost_s: float = 0.001

    def __post_init__(self) -> None:
        self.router = Router(self.world.cluster)
        self.calls = Calls(
            self.world.cluster,
            self.world.keys["app"],
            self.router,
            clock=lambda: self.now_s,
            now_ms=lambda: NOW_MS,
            random_bytes=lambda n: bytes(n),
        )

    def run(self, call: Any) -> Any:
        """Drive a call to its end; pauses only move the clock."""
        try:
            step = next(call)
            while True:
                if not isinstance(step, Exchange):
                    self.seen.append(("", "pause"))
                    self.now_s += step.seconds
                    step = call.send(None)
                    continue
                reply = self._reply(step)
                step = call.throw(reply) if isinstance(reply, EngineError) else call.send(reply)
        except StopIteration as stop:
            return stop.value

    def _reply(self, step: Exchange) -> Reply | EngineError:
        self.seen.append((step.peer, step.verb))
        body = REQUEST_CODECS[step.verb].decode(step.body)
        self.bodies.append(body)
        self.extensions.append(step.extensions)
        answer = self.answers.get((step.peer, step.verb), self.answers.get(step.verb))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer) and not isinstance(answer, type):
            answer = answer(step.peer, body)
        if isinstance(answer, Lost):
            self.now_s += step.timeout_s if answer.after_s is None else answer.after_s
            return answer.error
        self.now_s += self.cost_s
        if isinstance(answer, Exception):
            code = answer.code if isinstance(answer, EngineError) else "invalid-request"
            names = list(getattr(answer, "missing", ()) or getattr(answer, "names", ()))
            status = Status.MOVED if code == "moved" else Status.ERROR
            return Reply(1, 1, status, error_codec.encode(ErrorBody(code, str(answer), names)), IDLE, {})
        return Reply(1, 1, Status.OK, REPLY_CODECS[step.verb].encode(answer), self.load, {})

    def verbs(self, verb: str) -> list[str]:
        """The nodes that were asked this, in order."""
        return [peer for peer, each in self.seen if each == verb]


def encrypt(play: Play, timeout_s: float = 5.0) -> Any:
    return play.run(play.calls.encrypt("k", b"data", b"", timeout_s))


def dead() -> Lost:
    return Lost(NodeUnavailable("down"), 0.0)


@pytest.fixture
def play(world: World) -> Play:
    return Play(world, {"describe": world.describe(), "encrypt": Result(b"ct")})


class TestUse:
    def test_first_use_describes_and_sends_a_grant_then_neither(self, play: Play, world: World) -> None:
        assert encrypt(play) == b"ct"
        node = play.seen[1][0]
        assert [verb for _, verb in play.seen] == ["describe", "encrypt"]
        record = open_key_manifest(world.describe().manifest, world.cluster)
        grant, signed = check_grant(play.bodies[1].grant, record, node, world.cluster, NOW_MS)
        assert (signed.issuer, grant.operations, grant.expires_ms - grant.not_before_ms <= 10_000) == (
            "app",
            ["encrypt"],
            True,
        )
        assert encrypt(play) == b"ct"
        assert play.seen[2:] == [(node, "encrypt")]
        assert play.bodies[2].grant == b""
        assert play.bodies[2].key_id == b"i" * 16

    def test_a_combiner_that_lost_the_key_gets_a_grant(self, play: Play) -> None:
        encrypt(play)
        node = play.seen[1][0]
        play.answers["encrypt"] = [NeedGrant("gone"), Result(b"again")]
        assert encrypt(play) == b"again"
        assert play.seen[2:] == [(node, "encrypt"), (node, "encrypt")]
        assert [bool(body.grant) for body in play.bodies[2:]] == [False, True]

    def test_need_grant_in_spite_of_a_grant_goes_on_to_the_next_node(self, play: Play) -> None:
        play.answers["encrypt"] = [NeedGrant("no"), Result(b"ct")]
        assert encrypt(play) == b"ct"
        first, second = play.verbs("encrypt")
        assert first != second

    def test_a_dead_combiner_is_passed_over_and_then_tried_last(self, play: Play) -> None:
        encrypt(play)
        node = play.seen[1][0]
        play.answers[node, "encrypt"] = dead()
        encrypt(play)
        assert play.verbs("encrypt")[1] == node
        other = play.verbs("encrypt")[2]
        assert other != node
        encrypt(play)
        assert play.verbs("encrypt")[3] == other

    def test_a_silent_combiner_leaves_time_for_the_others(self, play: Play) -> None:
        encrypt(play)
        node = play.seen[1][0]
        play.answers[node, "encrypt"] = Lost(DeadlineExceeded("silent"))
        began_s = play.now_s
        encrypt(play)
        assert play.now_s - began_s < 2.5

    @pytest.mark.parametrize("error", [Overloaded("full"), TokenError("token"), NodeUnavailable("x"), EngineError("?")])
    def test_a_node_in_trouble_is_passed_over(self, play: Play, error: EngineError) -> None:
        play.answers["encrypt"] = [error, Result(b"ct")]
        assert encrypt(play) == b"ct"
        first, second = play.verbs("encrypt")
        assert first != second

    @pytest.mark.parametrize(
        "error", [InvalidTag("tag"), AccessDenied("policy"), ValueError("size"), InvalidSignature("no")]
    )
    def test_what_every_node_would_say_is_final(self, play: Play, error: Exception) -> None:
        play.answers["encrypt"] = error
        with pytest.raises(type(error), match=str(error)):
            encrypt(play)
        assert len(play.verbs("encrypt")) == 1

    def test_moved_is_followed(self, play: Play) -> None:
        encrypt(play)
        node = play.seen[1][0]
        target = next(name for name in NODES if name != node)
        moved = calls_module.Moved(("stranger", target))
        play.answers[node, "encrypt"] = moved
        encrypt(play)
        assert play.verbs("encrypt")[1:] == [node, target]

    def test_nodes_that_move_a_request_in_a_circle_end_it(self, play: Play) -> None:
        play.answers["encrypt"] = lambda peer, body: calls_module.Moved(NODES)
        with pytest.raises(EngineError):
            encrypt(play, 1.0)
        rounds = play.seen.count(("", "pause")) + 1
        assert len(play.verbs("encrypt")) == 5 * rounds


class TestTrace:
    TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    def test_every_request_of_a_call_carries_its_trace_and_no_others(self, play: Play) -> None:
        """Also those after a failure; what a call belongs to is settled when it is made, not when it runs."""
        play.answers["encrypt"] = [Overloaded("full"), Result(b"ct")]
        with trace_context(self.TRACEPARENT):
            traced = play.calls.encrypt("k", b"data", b"", 5.0)
        assert play.run(traced) == b"ct"
        assert [verb for _, verb in play.seen] == ["describe", "encrypt", "encrypt"]
        assert play.extensions == [{"traceparent": self.TRACEPARENT.encode()}] * 3
        encrypt(play)
        assert play.extensions[3:] == [None]

    def test_a_traced_call_that_is_given_up_tells_the_router(self, play: Play) -> None:
        encrypt(play)
        with trace_context(self.TRACEPARENT):
            call = play.calls.encrypt("k", b"data", b"", 5.0)
        node = next(call).peer
        assert play.router._nodes[node].outstanding == 1
        call.close()
        assert play.router._nodes[node].outstanding == 0

    def test_contexts_nest(self, play: Play) -> None:
        other = self.TRACEPARENT.replace("4bf9", "0123")
        with trace_context(self.TRACEPARENT):
            with trace_context(other):
                play.run(play.calls.key_info("k", 5.0))
            play.run(play.calls.key_info("k", 5.0))
        play.run(play.calls.key_info("k", 5.0))
        assert [each and each["traceparent"].decode() for each in play.extensions] == [other, self.TRACEPARENT, None]


class TestLatency:
    def test_round_trips_are_kept_by_class_and_described_as_they_were(self, play: Play) -> None:
        for play.cost_s in (0.001, 0.002, 0.040):
            encrypt(play)
        play.answers["encrypt"] = InvalidTag("no")
        with pytest.raises(InvalidTag):
            encrypt(play)
        (found,) = play.calls.round_trips().items()
        assert (found[0], found[1].count) == ("encrypt/aes-256-gcm", 4)
        assert found[1].max_s == pytest.approx(0.040)
        assert found[1].p50_s == pytest.approx(0.002, rel=0.03)

    def test_a_node_that_does_not_know_the_verb_tells_its_status_all_the_same(self, play: Play, world: World) -> None:
        play.answers["status"] = node_status()
        for answer, told in (
            (ProtocolError("unknown verb"), None),
            (NodeLatency("n1", 1, []), NodeLatency("n1", 1, [])),
        ):
            play.answers["latency"] = answer
            status = play.run(play.calls.status_at(world.cluster.members["n1"], 5.0, latency=True))
            assert (status.error, status.latency) == (None, told)
            assert status.status.node == "n1"


class TestPublicKey:
    def test_a_dealers_public_key_that_is_none_is_no_mistake_of_the_caller(
        self, play: Play, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()  # the fixture's own keys are not looked at
        play.answers["describe"] = world.describe(algo="ed25519")
        with pytest.raises(ManifestError, match="public key of 'k'"):
            play.run(play.calls.key_info("k", 1.0))


class TestStale:
    def test_a_stale_description_is_asked_for_once_more(self, play: Play, world: World) -> None:
        encrypt(play)
        newer = world.describe(key_id=b"j" * 16)
        play.answers["describe"] = newer
        play.answers["encrypt"] = lambda peer, body: Result(b"new") if body.key_id == b"j" * 16 else StaleKey("old")
        assert encrypt(play) == b"new"
        assert [verb for _, verb in play.seen[2:]] == ["encrypt", "describe", "encrypt"]

    def test_a_node_that_still_tells_the_old_description_is_not_believed(self, play: Play, world: World) -> None:
        encrypt(play)
        first = play.verbs("describe")[0]
        play.answers[first, "describe"] = world.describe()
        play.answers["describe"] = world.describe(key_id=b"j" * 16)
        play.answers["encrypt"] = lambda peer, body: Result(b"new") if body.key_id == b"j" * 16 else StaleKey("old")
        assert encrypt(play) == b"new"
        assert len(play.verbs("describe")) == 3

    def test_stale_for_ever_is_told_at_the_deadline(self, play: Play) -> None:
        play.answers["encrypt"] = StaleKey("old")
        with pytest.raises(StaleKey):
            encrypt(play, 1.0)
        assert play.now_s <= 101.01

    def test_a_holder_that_missed_the_creation_is_passed_over(self, play: Play) -> None:
        encrypt(play)
        node = play.seen[1][0]
        play.answers[node, "encrypt"] = KeyNotFound("unknown here")
        assert encrypt(play) == b"ct"

    def test_a_destroyed_key_is_not_found(self, play: Play) -> None:
        encrypt(play)
        play.answers["encrypt"] = KeyNotFound("gone")
        play.answers["describe"] = KeyNotFound("gone")
        with pytest.raises(KeyNotFound):
            encrypt(play)
        assert ("", "pause") not in play.seen


class TestShortage:
    def test_all_combiners_are_asked_and_what_they_miss_is_merged(self, play: Play) -> None:
        play.answers["encrypt"] = [QuorumUnavailable("2 of 3", ["n1", "n2"]), QuorumUnavailable("1 of 3", ["n2", "n3"])]
        with pytest.raises(QuorumUnavailable, match="2 of 3; 1 of 3") as caught:
            encrypt(play)
        assert caught.value.missing == ("n1", "n2", "n3")
        assert len(play.verbs("encrypt")) == 5

    def test_a_second_combiner_may_have_it(self, play: Play) -> None:
        play.answers["encrypt"] = [QuorumUnavailable("2 of 3", ["n1"]), Result(b"ct")]
        assert encrypt(play) == b"ct"

    def test_one_shortage_and_the_rest_dead_is_a_shortage_at_once(self, play: Play) -> None:
        shortage = [QuorumUnavailable("2 of 3", ["n1"]), dead()]
        play.answers["encrypt"] = shortage
        with pytest.raises(QuorumUnavailable):
            encrypt(play)
        assert ("", "pause") not in play.seen


class TestDeadline:
    def test_all_silent_ends_at_the_deadline_and_names_them(self, play: Play) -> None:
        encrypt(play)
        play.answers["encrypt"] = Lost(DeadlineExceeded("silent"))
        began_s = play.now_s
        with pytest.raises(DeadlineExceeded) as caught:
            encrypt(play, 2.0)
        assert play.now_s - began_s <= 2.001
        assert sum(node in str(caught.value) for node in NODES) >= 4

    def test_all_down_is_retried_until_the_deadline(self, play: Play) -> None:
        encrypt(play)
        play.answers["encrypt"] = dead()
        with pytest.raises(NodeUnavailable):
            encrypt(play, 2.0)
        assert 2 <= play.seen.count(("", "pause")) <= 20
        assert play.now_s <= 102.1

    @pytest.mark.parametrize("answer", [dead(), QuorumUnavailable("1 of 3", ["n1"])])
    def test_in_a_moment_nobody_can_tell_what_is_missing(self, play: Play, answer: Any) -> None:
        """With too little time for a cold key it is the deadline that was missed; with enough, what is missing."""
        encrypt(play)
        play.answers["encrypt"] = answer
        with pytest.raises(DeadlineExceeded, match="not done in the time given"):
            encrypt(play, 0.05)
        with pytest.raises((NodeUnavailable, QuorumUnavailable)):
            encrypt(play, 0.5)

    def test_nodes_that_come_back_within_the_deadline_serve(self, play: Play) -> None:
        encrypt(play)
        play.answers["encrypt"] = [dead()] * 12 + [Result(b"back")]
        assert encrypt(play) == b"back"

    def test_a_client_refused_by_all_learns_it_at_once(self, play: Play) -> None:
        play.answers["describe"] = Lost(AccessDenied("refuses the key"), 0.0)
        with pytest.raises(AccessDenied, match="every node"):
            encrypt(play)
        assert play.seen == [(peer, "describe") for peer, _ in play.seen]
        assert len(play.seen) == 5

    def test_one_refusal_is_passed_over(self, play: Play) -> None:
        play.answers["encrypt"] = [Lost(AccessDenied("refuses the key"), 0.0), Result(b"ct")]
        assert encrypt(play) == b"ct"

    @pytest.mark.parametrize("timeout", [0, -1, 601, float("nan")])
    def test_the_timeout_has_limits(self, play: Play, timeout: float) -> None:
        with pytest.raises(ValueError, match="at most 600"):
            play.calls.encrypt("k", b"", b"", timeout)


class TestDescribe:
    def test_a_key_nobody_knows_is_not_found(self, play: Play) -> None:
        play.answers["describe"] = KeyNotFound("no")
        with pytest.raises(KeyNotFound, match=r"no node that answers knows the key 'k'$"):
            encrypt(play)
        assert sorted(play.verbs("describe")) == sorted(NODES)

    def test_who_could_not_be_asked_is_named(self, play: Play) -> None:
        play.answers["describe"] = KeyNotFound("no")
        play.answers["n3", "describe"] = dead()
        with pytest.raises(KeyNotFound, match="could not be asked: n3"):
            encrypt(play)

    def test_a_key_that_may_have_been_made_is_asked_for_again(self, play: Play, world: World) -> None:
        play.answers["describe"] = KeyNotFound("no")
        play.answers["n3", "describe"] = [KeyPending("not known yet"), KeyPending("not known yet"), world.describe()]
        assert encrypt(play) == b"ct"
        assert play.verbs("describe").count("n3") == 3

    def test_a_key_of_which_nobody_hears_whether_it_was_made_is_pending(self, play: Play) -> None:
        play.answers["describe"] = KeyNotFound("no")
        play.answers["n3", "describe"] = KeyPending("not known yet")
        with pytest.raises(KeyPending, match="n3: not known yet"):
            encrypt(play)

    def test_a_combiner_that_has_not_heard_of_the_commit_is_passed_over(self, play: Play) -> None:
        encrypt(play)
        play.answers[play.seen[1][0], "encrypt"] = KeyPending("not known yet")
        assert encrypt(play) == b"ct"

    def test_a_forged_description_is_passed_over(self, play: Play, world: World) -> None:
        good = world.describe()
        first = play.router.holders("k")[0]
        play.answers[first, "describe"] = KeyDescription(good.manifest, world.describe("other").certificate, [], b"")
        assert encrypt(play) == b"ct"
        assert len(play.verbs("describe")) == 2

    def test_the_description_of_another_key_is_passed_over(self, play: Play, world: World) -> None:
        first = play.router.holders("k")[0]
        play.answers[first, "describe"] = world.describe("other")
        assert encrypt(play) == b"ct"

    def test_key_info_says_what_is_signed(self, play: Play) -> None:
        info = play.run(play.calls.key_info("k", 5.0))
        assert (info.name, info.algorithm, info.threshold, info.shares, info.version, info.epoch) == (
            "k",
            "aes-256-gcm",
            3,
            5,
            1,
            1,
        )
        assert (info.holders, info.key_id, info.dealer) == (NODES, (b"i" * 16).hex(), "n1")

    def test_a_node_that_is_behind_does_not_lead_back(self, play: Play, world: World) -> None:
        """Whoever still tells of the epoch before, by delay or malice, is passed over once a later one was seen."""
        order = CreateOrder(b"i" * 16, "k", "aes-256-gcm", 3, 5, "generate", NOW_MS + 60_000)
        raw = sign_envelope("order.create", 1, create_orders.encode(order), world.keys["app"])
        change = RefreshOrder(b"i" * 16, "k", 1, bytes(16), NOW_MS + 60_000)
        new = world.deal(
            raw, refresh=sign_envelope("order.refresh", 1, refresh_orders.encode(change), world.keys["app"])
        )
        record = open_key_manifest(new.manifest, world.cluster)
        play.answers["describe"] = new
        assert encrypt(play) == b"ct"
        behind, *others = play.router.holders("k")
        play.load = IDLE
        play.router.forget_loaded("k")
        for answers in ({behind: world.deal(raw)}, dict.fromkeys((behind, *others), world.deal(raw))):
            play.answers |= {(node, "describe"): answer for node, answer in answers.items()}
            play.answers["encrypt"] = [StaleKey("another epoch"), Result(b"ct")]
            assert encrypt(play) == b"ct"
            node = play.verbs("encrypt")[-1]
            grant, _ = check_grant(play.bodies[-1].grant, record, node, world.cluster, NOW_MS)
            assert grant.epoch == 2

    def test_a_symmetric_key_has_no_public_key(self, play: Play, world: World) -> None:
        with pytest.raises(ValueError, match="symmetric"):
            play.run(play.calls.public_key("k", 5.0))
        play.answers["describe"] = world.describe("tls", "ed25519")
        assert play.run(play.calls.public_key("tls", 5.0)) == "PEM"

    @pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 129, "new\nline", "end\n"])
    def test_a_bad_name_is_refused_here(self, play: Play, name: str) -> None:
        with pytest.raises(ValueError, match="a name has 1 to 128"):
            play.run(play.calls.encrypt(name, b"", b"", 5.0))
        assert play.seen == []

    def test_descriptions_kept_are_bounded(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls_module, "MAX_DESCRIPTIONS", 2)
        play = Play(world, {"describe": lambda peer, body: world.describe(body.key), "encrypt": Result(b"ct")})
        for name in ("a", "b", "c", "c", "b", "a"):
            play.run(play.calls.encrypt(name, b"", b"", 5.0))
        asked = [body.key for (_, verb), body in zip(play.seen, play.bodies, strict=True) if verb == "describe"]
        assert asked == ["a", "b", "c", "a"]


class TestShapes:
    def test_messages_are_hashed_here(self, world: World) -> None:
        play = Play(world, {"describe": world.describe("k", "ecdsa-p384-sha384"), "sign": Result(b"sig")})
        assert play.run(play.calls.sign("k", b"m" * 100_000, None, 5.0)) == b"sig"
        assert (play.bodies[1].data, play.bodies[1].digested) == (hashlib.sha384(b"m" * 100_000).digest(), True)
        digest = hashlib.sha384(b"x").digest()
        play.run(play.calls.sign("k", None, digest, 5.0))
        assert play.bodies[2].data == digest
        with pytest.raises(ValueError, match="digest of 32 bytes; ecdsa-p384-sha384 signs 48"):
            play.run(play.calls.sign("k", None, bytes(32), 5.0))
        with pytest.raises(TypeError, match="either"):
            play.calls.sign("k", b"m", digest, 5.0)

    def test_ed25519_takes_whole_messages_of_bounded_length(self, world: World) -> None:
        play = Play(world, {"describe": world.describe("k", "ed25519"), "sign": Result(b"sig")})
        play.run(play.calls.sign("k", b"m", None, 5.0))
        assert (play.bodies[1].data, play.bodies[1].digested) == (b"m", False)
        with pytest.raises(ValueError, match=r"49153 bytes.*at most 49152"):
            play.run(play.calls.sign("k", bytes(49_153), None, 5.0))
        with pytest.raises(ValueError, match="not a digest"):
            play.run(play.calls.sign("k", None, bytes(32), 5.0))

    def test_limits_are_named(self, play: Play) -> None:
        with pytest.raises(ValueError, match="49153 bytes; the limit is 49152, encrypt_stream"):
            play.calls.encrypt("k", bytes(49_153), b"", 5.0)
        with pytest.raises(ValueError, match="decrypt_stream"):
            play.calls.decrypt("k", bytes(60_000), b"", 5.0)
        with pytest.raises(ValueError, match="4097 bytes; the limit is 4096"):
            play.calls.encrypt("k", b"", bytes(4097), 5.0)

    def test_an_operation_the_algorithm_lacks_is_refused_here(self, play: Play) -> None:
        with pytest.raises(ValueError, match="can decrypt, encrypt, not sign"):
            play.run(play.calls.sign("k", b"m", None, 5.0))
        assert play.verbs("sign") == []

    @pytest.mark.parametrize("value", ["text", None, 7, [1]])
    def test_only_bytes_are_bytes(self, play: Play, value: Any) -> None:
        for begin in (
            lambda: play.calls.encrypt("k", value, b"", 5.0),
            lambda: play.calls.encrypt("k", b"", value, 5.0),
            lambda: play.calls.mac("k", value, 5.0),
            lambda: play.calls.verify("k", b"m", value, None, 5.0),
        ):
            with pytest.raises(TypeError, match="must be bytes"):
                begin()

    @pytest.mark.parametrize("proof", [b"", bytes(1025)])
    def test_a_proof_of_impossible_length_is_invalid(self, play: Play, proof: bytes) -> None:
        with pytest.raises(InvalidSignature):
            play.calls.verify("k", b"m", proof, None, 5.0)


def dealing(world: World) -> Callable[[str, Any], KeyDescription]:
    return lambda peer, body: world.deal(body.order, peer)


class TestCreate:
    def test_the_answer_is_verified_and_kept(self, world: World) -> None:
        play = Play(world, {"generate": dealing(world), "encrypt": Result(b"ct")})
        info = play.run(play.calls.create_key("k", "aes-256-gcm", None, None, 15.0))
        assert (info.threshold, info.shares, info.key_id) == (3, 5, bytes(16).hex())
        assert encrypt(play) == b"ct"
        assert play.verbs("describe") == []

    def test_the_same_order_goes_to_the_next_dealer(self, world: World) -> None:
        play = Play(world, {"generate": dealing(world)})
        first, second = play.router.holders("k")[:2]
        play.answers[first, "generate"] = Lost(DeadlineExceeded("silent"))
        play.run(play.calls.create_key("k", "aes-256-gcm", 3, 5, 15.0))
        assert play.verbs("generate") == [first, second]
        assert play.bodies[0].order == play.bodies[1].order
        order, signed = open_create_order(play.bodies[0].order, world.cluster, NOW_MS)
        assert (signed.serial, order.expires_ms) == (NOW_MS, NOW_MS + 75_000)

    def test_a_key_of_a_dealer_that_was_not_asked_is_refused(self, world: World) -> None:
        """With the balancer's key, a node could take the order from another's hands and deal a key that it knows."""
        play = Play(world, {})
        first, second, *_, last = play.router.holders("k")
        play.answers["generate"] = lambda peer, body: world.deal(body.order, last)
        with pytest.raises(ManifestError, match=f"{last!r} dealt the key, which was never asked to"):
            play.run(play.calls.create_key("k", "aes-256-gcm", 3, 5, 15.0))
        assert play.verbs("generate") == [first]
        # The first dealer may have died with its work done; the second then tells of it.
        play.answers[first, "generate"] = Lost(DeadlineExceeded("silent"))
        play.answers[second, "generate"] = lambda peer, body: world.deal(body.order, first)
        assert play.run(play.calls.create_key("k", "aes-256-gcm", 3, 5, 15.0)).dealer == first

    @pytest.mark.parametrize("error", [KeyExists("taken"), AccessDenied("policy"), ValueError("odd")])
    def test_final_refusals(self, world: World, error: Exception) -> None:
        play = Play(world, {"generate": error})
        with pytest.raises(type(error)):
            play.run(play.calls.create_key("k", "aes-256-gcm", 3, 5, 15.0))
        assert len(play.seen) == 1

    @pytest.mark.parametrize("error", [RegistryUnavailable("away"), QuorumUnavailable("few", ["n1"])])
    def test_a_missing_registry_is_asked_for_by_two_dealers(self, world: World, error: EngineError) -> None:
        play = Play(world, {"generate": error})
        with pytest.raises(type(error)):
            play.run(play.calls.create_key("k", "aes-256-gcm", 3, 5, 15.0))
        assert len(play.seen) == 2

    def test_another_key_in_the_answer_is_refused(self, world: World) -> None:
        play = Play(world, {"generate": world.describe()})
        with pytest.raises(EngineError, match="another key"):
            play.run(play.calls.create_key("k", "aes-256-gcm", 3, 5, 15.0))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("k", "aes-512", 3, 5), "unknown algorithm 'aes-512'"),
            (("k", "ed25519", 6, 5), "threshold 6 must lie in 1..5"),
            (("k", "ed25519", 0, 5), "threshold 0"),
            (("k", "ed25519", 3, 6), "6 shares; the cluster has 5 nodes"),
            (("k\n", "ed25519", 3, 5), "a name has"),
        ],
    )
    def test_a_callers_mistakes_are_refused_here(self, play: Play, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            play.calls.create_key(*arguments, 15.0)

    def test_import_is_normalised_before_anything_is_sent(self, world: World) -> None:
        play = Play(world, {"import": dealing(world)})
        with pytest.raises(ValueError, match="16 are needed"):
            play.calls.import_key("k", "aes-128-gcm", bytes(15), 3, 5, 15.0)
        info = play.run(play.calls.import_key("k", "aes-128-gcm", bytes(range(16)), 3, 5, 15.0))
        assert (info.algorithm, play.bodies[0].material) == ("aes-128-gcm", bytes(range(16)))

    def test_destroy_tells_who_did_and_forgets_the_key(self, play: Play) -> None:
        encrypt(play)
        play.answers["destroy"] = Destroyed(["n1", "n2", "n3", "n4"], ["n5"])
        done = play.run(play.calls.destroy_key("k", 15.0))
        assert (done.confirmed, done.pending) == (("n1", "n2", "n3", "n4"), ("n5",))
        play.answers["describe"] = KeyNotFound("gone")
        with pytest.raises(KeyNotFound):
            encrypt(play)


class TestQuestions:
    def test_listing_turns_pages(self, play: Play) -> None:
        def page(peer: str, body: Any) -> KeyList:
            names = [name for name in ("a", "b", "c") if name > body.after][:2]
            return KeyList([KeyEntry(name, "ed25519", 1, 3, 5, "enabled", 0) for name in names], names[-1] != "c")

        play.answers["list"] = page
        assert [each.name for each in play.run(play.calls.list_at("n1", "*", 5.0))] == ["a", "b", "c"]

    def test_a_node_that_turns_the_same_page_for_ever_is_left(self, play: Play) -> None:
        play.answers["list"] = KeyList([KeyEntry("a", "ed25519", 1, 3, 5, "enabled", 0)], True)
        assert len(play.run(play.calls.list_at("n1", "*", 5.0))) == 2

    def test_lists_are_merged_by_name_and_newest_version(self) -> None:
        old, new, other = (KeySummary(*row) for row in (("b", "x", 1, 1, 1), ("b", "x", 2, 1, 1), ("a", "x", 1, 1, 1)))
        assert merge_lists([[old, other], [new], [old]]) == (other, new)

    def test_some_answers_are_enough_and_a_refusal_counts_alone(self) -> None:
        assert answered_by_any({"a": 1, "b": NodeUnavailable("x"), "c": AccessDenied("y")}) == [1]
        with pytest.raises(AccessDenied):
            answered_by_any({"a": NodeUnavailable("x"), "b": AccessDenied("y")})
        with pytest.raises(NodeUnavailable, match="no node answered"):
            answered_by_any({"a": NodeUnavailable("x")})
        with pytest.raises(ValueError, match="odd"):
            answered_by_any({"a": 1, "b": ValueError("odd")})

    def test_status_gives_the_error_in_its_place(self, play: Play, world: World) -> None:
        play.answers["status"] = node_status()
        member = world.cluster.nodes["n1"]
        good = play.run(play.calls.status_at(member, 5.0))
        assert (good.name, good.role, good.error, good.status.token) == ("n1", "node", None, "token")
        play.answers["status"] = dead()
        bad = play.run(play.calls.status_at(member, 5.0))
        assert bad.status is None
        assert isinstance(bad.error, NodeUnavailable)

    def test_flush_counts(self, play: Play) -> None:
        play.answers["flush"] = Flushed(3, 0)
        assert play.run(play.calls.flush_at("n1", "", 5.0)) == 3

    def test_prewarm_gives_a_grant_and_the_use_then_needs_none(self, play: Play) -> None:
        play.answers["prewarm"] = REPLY_CODECS["prewarm"].decode(b"\x90")
        assert play.run(play.calls.prewarm_at("n4", "k", 5.0)) == "n4"
        assert play.bodies[-1].grant
        encrypt(play)
        assert play.seen[-1] == ("n4", "encrypt")
        assert play.bodies[-1].grant == b""


class TestWarmAt:
    """A key is loaded beside everything else: nobody's use, so the router is told nothing of how it went."""

    @pytest.fixture(autouse=True)
    def _known(self, play: Play) -> None:
        play.answers["prewarm"] = REPLY_CODECS["prewarm"].decode(b"\x90")
        encrypt(play)
        play.seen.clear()
        play.bodies.clear()

    def warm(self, play: Play, node: str = "n4", name: str = "k") -> bool:
        return bool(play.run(play.calls.warm_at(node, name, 5.0)))

    def test_it_is_one_request_with_a_grant(self, play: Play, world: World) -> None:
        assert self.warm(play)
        assert play.seen == [("n4", "prewarm")]
        record = open_key_manifest(world.describe().manifest, world.cluster)
        grant, _ = check_grant(play.bodies[0].grant, record, "n4", world.cluster, NOW_MS)
        assert grant.operations == ["decrypt"]
        assert not play.router.is_loaded("k", "n4")

    def test_of_a_key_that_nothing_is_known_of_nothing_is_asked(self, play: Play) -> None:
        assert not self.warm(play, name="other")
        assert play.seen == []

    @pytest.mark.parametrize("answer", [dead(), Overloaded("full"), QuorumUnavailable("few", ["n1"])])
    def test_a_failure_is_no_word_about_the_node(self, play: Play, answer: Answer) -> None:
        order = play.router.rank("encrypt/aes-256-gcm", "k", NODES, play.now_s)
        play.answers["n4", "prewarm"] = answer
        assert not self.warm(play)
        assert play.seen == [("n4", "prewarm")]
        assert play.router.rank("encrypt/aes-256-gcm", "k", NODES, play.now_s) == order

    def test_a_new_epoch_is_learnt_and_asked_for(self, play: Play, world: World) -> None:
        order = CreateOrder(b"i" * 16, "k", "aes-256-gcm", 3, 5, "generate", NOW_MS + 60_000)
        raw = sign_envelope("order.create", 1, create_orders.encode(order), world.keys["app"])
        change = RefreshOrder(b"i" * 16, "k", 1, bytes(16), NOW_MS + 60_000)
        refresh = sign_envelope("order.refresh", 1, refresh_orders.encode(change), world.keys["app"])
        told: list[int] = []
        play.calls.on_description = lambda name, known: told.append(known.info.epoch)
        play.answers["describe"] = world.deal(raw, refresh=refresh)
        play.answers["prewarm"] = [StaleKey("another epoch"), play.answers["prewarm"]]
        assert self.warm(play)
        assert play.seen == [("n4", "prewarm"), ("n4", "describe"), ("n4", "prewarm")]
        assert told == [2]
        assert play.calls.peek("k").info.epoch == 2  # type: ignore[union-attr]
        assert play.bodies[0].grant != play.bodies[2].grant

    def test_where_nothing_newer_is_known_it_ends(self, play: Play) -> None:
        play.answers["prewarm"] = StaleKey("another epoch")
        assert not self.warm(play)
        assert play.seen == [("n4", "prewarm"), ("n4", "describe")]

    @pytest.mark.parametrize(
        "answer", [dead(), KeyNotFound("none"), KeyDescription(b"no manifest", b"no certificate", [], b""), None]
    )
    def test_a_node_that_is_no_holder_is_asked_what_it_knows(self, play: Play, answer: Answer) -> None:
        """And it may say what it likes."""
        if answer is not None:
            play.answers["describe"] = answer
        assert not self.warm(play, node="n9")
        assert play.seen == [("n9", "describe")]


def test_an_abandoned_call_leaves_nothing_under_way(play: Play) -> None:
    """A call that is closed at its exchange is told to the router like a failure."""
    encrypt(play)
    node = play.seen[1][0]
    call: Iterator[Any] = play.calls.encrypt("k", b"", b"", 5.0)
    assert next(call).peer == node
    call.close()  # type: ignore[attr-defined]
    encrypt(play)
    assert play.verbs("encrypt")[-1] != node


# --- another node is asked beside one that is late ---


class Late:
    """Steps a call by hand: what it asks for, and what it is told."""

    def __init__(self, play: Play, call: Any) -> None:
        self.play, self.call = play, call
        self.step: Any = next(call)
        self.result: Any = None

    def tell(self, answer: Any, after_s: float = 0.0) -> None:
        self.play.now_s += after_s
        try:
            self.step = self.call.throw(answer) if isinstance(answer, EngineError) else self.call.send(answer)
        except StopIteration as stop:
            self.step, self.result = None, stop.value


def ok(data: bytes = b"ct") -> Reply:
    return Reply(1, 1, Status.OK, REPLY_CODECS["encrypt"].encode(Result(data)), LOADED, {})


def at_first_node(world: World) -> Late:
    """A call whose description is known, and that has just asked its first node."""
    play = Play(world, {"describe": world.describe()})
    play.run(play.calls.describe("k", 5.0))
    return Late(play, play.calls.encrypt("k", b"data", b"", 5.0))


def test_a_late_node_is_joined_by_the_next_and_the_first_answer_counts(world: World) -> None:
    late = at_first_node(world)
    first = late.step
    assert 0 < first.patience_s < 1 < first.timeout_s
    late.tell(None, first.patience_s)
    second = late.step
    assert second.peer != first.peer
    assert second.patience_s > first.patience_s
    late.tell(Ended(first.peer, ok(b"slow"), None), 0.1)
    assert late.result == b"slow"
    # It answered after all, so it is no less likely than others from now on.
    assert late.play.router.order((first.peer, second.peer), late.play.now_s) == (first.peer, second.peer)


def test_who_is_late_is_tried_last_by_other_calls_at_once(world: World) -> None:
    late = at_first_node(world)
    first = late.step
    late.tell(None, first.patience_s)
    assert late.play.router.rank("encrypt/aes-256-gcm", "k", NODES, late.play.now_s)[-1] == first.peer
    late.tell(ok(b"quick"))
    assert late.result == b"quick"
    assert late.play.router._nodes[first.peer].outstanding == 0


def test_when_all_are_late_the_call_waits_for_any_of_them(world: World) -> None:
    late = at_first_node(world)
    asked = []
    while isinstance(late.step, Exchange):
        asked.append(late.step.peer)
        late.tell(None, 0.1)
    assert sorted(asked) == sorted(NODES)
    assert late.step == Await()
    late.tell(Ended(asked[0], None, NodeUnavailable("the connection broke")))
    assert late.step == Await()
    late.tell(Ended(asked[3], ok(), None))
    assert late.result == b"ct"
    assert all(late.play.router._nodes[node].outstanding == 0 for node in NODES)


def test_a_round_is_told_of_nothing_that_an_earlier_one_had_under_way(world: World) -> None:
    """The first exchange of each round is fresh; those that follow while others are late are not."""
    play = Play(world, {"describe": world.describe()})
    late = Late(play, play.calls.encrypt("k", b"data", b"", 5.0))
    assert late.step.verb == "describe"
    assert late.step.alone
    late.tell(None, 1.0)
    assert late.step.verb == "describe"
    assert not late.step.alone
    late.tell(Reply(1, 1, Status.OK, REPLY_CODECS["describe"].encode(world.describe()), IDLE, {}))
    assert late.step.verb == "encrypt"
    assert late.step.alone  # or the first node's late description would be taken for its ciphertext


def test_a_shortage_of_shares_is_believed_once_all_were_asked(world: World) -> None:
    """Two nodes that are parted from three have too few shares; those three have enough."""
    few = NODES[:2]
    told = ErrorBody("quorum-unavailable", "2 of the 3 shares needed were had", list(NODES[2:]))
    late = at_first_node(world)
    asked = []
    while late.step is not None:
        asked.append(late.step.peer)
        short = late.step.peer in few
        late.tell(Reply(1, 1, Status.ERROR, error_codec.encode(told), IDLE, {}) if short else ok())
    assert late.result == b"ct"


def test_a_late_refusal_is_as_good_as_any(world: World) -> None:
    late = at_first_node(world)
    first = late.step.peer
    late.tell(None, 0.3)
    body = error_codec.encode(ErrorBody("access-denied", "no", []))
    with pytest.raises(AccessDenied):
        late.tell(Ended(first, Reply(1, 1, Status.ERROR, body, IDLE, {}), None))


def test_a_node_that_failed_is_probed_by_one_call_with_little_patience(world: World) -> None:
    play = Play(world, {})
    router = play.router
    for name in NODES[1:]:
        router.sent(name, play.now_s)
        router.failed(name, play.now_s)
    first = NODES[0]
    router.sent(first, play.now_s)
    router.failed(first, play.now_s - 2.0)
    assert router.order((first,), play.now_s) == (first,)  # which makes this call the probe
    assert router.patience_s(first, "", False) == pytest.approx(0.05)
    router.sent(first, play.now_s)
    router.failed(first, play.now_s)
    assert router.order(NODES, play.now_s + 1.5)[-1] == first  # twice as long as the others
    router.came_up(first, 0.0)
    assert router.order(NODES, play.now_s)[0] == first
