"""Real nodes against real attackers: t-1 nodes and the balancer taken over, captured requests, and every combination.

The attacker has the identity files of two of five nodes (keys are 3-of-5) and of the balancer, and speaks to the others
with hand-made messages. A control at the end of the first test shows that its harness does get shares with an honest
client's fresh grant, so that no other test passes because nothing would ever come.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from whole_keys import create_whole_key

import engine
from engine import LocalCluster, PolicyRule
from engine.client.config import Identity, load_identity
from engine.client.transport import Channel, raise_for_status
from engine.errors import EngineError, NodeUnavailable
from engine.keys import ALGORITHMS, OPERATIONS, RequestType
from engine.protocol.grant import issue_grant
from engine.protocol.manifest import KeyRecord, open_key_manifest
from engine.protocol.requests import (
    BACKUP_VERBS,
    CLIENT_VERBS,
    NODE_VERBS,
    REGISTRY_VERBS,
    REPLY_CODECS,
    REQUEST_CODECS,
    STATS,
    Abort,
    Commit,
    Create,
    Describe,
    Destroy,
    Empty,
    Flush,
    Operate,
    Prewarm,
    Reserve,
    ShareCommit,
    SharePrepare,
    ShareRelease,
)
from engine.protocol.wire import Reply
from nodes.ledger import RETRY_WINDOW_MS

STOLEN = ("node1", "node2")
HONEST = ("node3", "node4", "node5")
BALANCER = "balancer"
RULES = (
    PolicyRule("local", "*", ["*"]),
    PolicyRule("reader", "app/*", ["decrypt", "verify"]),
    PolicyRule("signer", "app/sign*", ["sign", "describe"]),
    PolicyRule("warmer", "*", ["prewarm", "flush"]),
)
CLIENTS = ("local", "reader", "signer", "warmer", "nobody")
KEYS = {
    "app/data": "aes-256-gcm",
    "app/sign": "ecdsa-p256-sha256",
    "app/sign/ed": "ed25519",
    "mac": "hmac-sha256",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Five nodes, 3-of-5, with four keys."""
    path = tmp_path_factory.mktemp("attacked")
    with LocalCluster(nodes=5, threshold=3, path=path, clients=CLIENTS, rules=RULES) as running:
        with engine.connect(running.client_config) as kq:
            for name, algorithm in KEYS.items():
                create_whole_key(kq, name, algorithm, threshold=3, shares=5)
        yield running


def identity(cluster: LocalCluster, name: str) -> Identity:
    place = "balancer" if name == BALANCER else f"{'nodes' if name.startswith('node') else 'clients'}/{name}"
    return load_identity(cluster.path / place / "identity.toml")


@pytest.fixture
def words(cluster: LocalCluster, world: Any) -> Any:
    """What signs documents: with the keys of whoever was robbed, and of the honest client for genuine ones."""
    made = object.__new__(type(world))
    names = (*STOLEN, BALANCER, *CLIENTS)
    made.keys = {name: identity(cluster, name).signing for name in names}
    made.stranger = world.stranger
    made.cluster = cluster.cluster
    made.now_ms = time.time_ns() // 1_000_000
    return made


class Line:
    """One member's connections, which keep all that came in; requests go out pipelined."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        members = {each.name: each for each in cluster.cluster.members.values() if each.endpoint}
        self.channel = Channel(identity(cluster, name).transport, members, self.context)
        self.received: list[bytes] = []

    def close(self) -> None:
        self.channel.close()
        self.context.destroy(linger=0)

    def _start(self, peer: str, verb: str, body: bytes) -> int:
        """Send, and dial again for a while where the peer was started again."""
        end = time.monotonic() + 20
        while True:
            try:
                return self.channel.start(peer, verb, body, 30.0)
            except NodeUnavailable:
                if time.monotonic() > end:
                    raise

    def ask(self, requests: Sequence[tuple[str, str, bytes]], window: int = 128) -> list[tuple[str, Any]]:
        """The outcomes of (peer, verb, body) in their order: a code and the message or the ok reply's body."""
        outcomes: list[tuple[str, Any] | None] = [None] * len(requests)
        under_way: dict[int, int] = {}
        left = iter(enumerate(requests))
        done = 0
        while done < len(requests):
            while len(under_way) < window and (following := next(left, None)) is not None:
                index, (peer, verb, body) = following
                under_way[self._start(peer, verb, body)] = index
            for arrival in self.channel.poll(1.0):
                index = under_way.pop(arrival.token)
                assert arrival.reply is not None, f"{requests[index][:2]}: {arrival.error}"
                self.received.append(arrival.reply.body)
                outcomes[index] = outcome(arrival.reply)
                done += 1
        return [each for each in outcomes if each is not None]


def outcome(reply: Reply) -> tuple[str, Any]:
    try:
        raise_for_status(reply)
    except EngineError as error:
        return error.code, str(error)
    except ValueError as error:
        return "invalid-request", str(error)
    return "ok", reply.body


@pytest.fixture
def line(cluster: LocalCluster) -> Iterator[Callable[[str], Line]]:
    made: dict[str, Line] = {}

    def get(name: str) -> Line:
        if name not in made:
            made[name] = Line(cluster, name)
        return made[name]

    yield get
    for each in made.values():
        each.close()


def encoded(verb: str, message: Any) -> bytes:
    return REQUEST_CODECS[verb].encode(message)


def described(line: Line, cluster: LocalCluster, name: str, node: str = "node3") -> tuple[KeyRecord, bytes]:
    """The genuine manifest and certificate, as any node may have them."""
    ((code, body),) = line.ask([(node, "describe", encoded("describe", Describe(name, 0)))])
    assert code == "ok"
    told = REPLY_CODECS["describe"].decode(body)
    return open_key_manifest(told.manifest, cluster.cluster), told.certificate


def releases(cluster: LocalCluster) -> list[tuple[str, str, str]]:
    """Every release in the nodes' audit logs: (holder, combiner, detail with the grant's digest)."""
    found = []
    for node in cluster.nodes:
        for path in sorted((cluster.data_folder(node) / "audit").glob("*.jsonl")):
            for text in path.read_bytes().splitlines():
                record = msgspec.json.decode(text)
                if record.get("verb") == "share.release" and record.get("outcome") == "ok":
                    found.append((node, record["member"], record["detail"]))
    return found


def still_serves(cluster: LocalCluster) -> None:
    with engine.connect(cluster.client_config) as kq:
        kq.flush()
        assert kq.decrypt("app/data", kq.encrypt("app/data", b"honest")) == b"honest"
        kq.verify("app/sign", b"m", kq.sign("app/sign", b"m"))
        kq.verify_mac("mac", b"m", kq.mac("mac", b"m"))


# --- t-1 nodes and the balancer ---


def bad_grants(words: Any, dealt: Any, other: Any, me: str) -> dict[str, bytes]:
    """Every grant that is forged, old, or not for this; the genuine ones are signed by the honest client's own key."""
    now = words.now_ms
    good = words.grant(dealt, me, client="local")
    accomplice = STOLEN[me == STOLEN[0]]
    cases = {
        "none": b"",
        "garbage": os.urandom(300),
        "signed by itself": words.grant(dealt, me, client=me),
        "signed by its accomplice": words.grant(dealt, me, client=accomplice),
        "signed by the balancer": words.grant(dealt, me, client=BALANCER),
        "forged": words.grant(dealt, me, client=type(words.stranger)("local", words.keys[me]._private)),
        "of a stranger": words.grant(dealt, me, client=words.stranger),
        "of a client without rights": words.grant(dealt, me, client="nobody"),
        "of a client with other rights": words.grant(dealt, me, "encrypt", client="reader"),
        "with an operation that is none": words.grant(dealt, me, "destroy", client="local"),
        "expired": words.grant(dealt, me, client="local", not_before_ms=now - 60_000, expires_ms=now - 40_000),
        "not yet good": words.grant(dealt, me, client="local", not_before_ms=now + 60_000, expires_ms=now + 70_000),
        "of too long a life": words.grant(dealt, me, client="local", expires_ms=now + 31_000),
        "for another combiner": words.grant(dealt, accomplice, client="local"),
        "for an honest combiner": words.grant(dealt, "node4", client="local"),
        "for another key": words.grant(other, me, client="local"),
        "for an older epoch": words.grant(dealt, me, client="local", epoch=0),
        "for a newer epoch": words.grant(dealt, me, client="local", epoch=2),
        "for another version": words.grant(dealt, me, client="local", version=2),
        "another document": dealt.order,
    }
    for position in range(0, len(good), 7):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        cases[f"changed at {position}"] = bytes(changed)
    return cases


def attacks(words: Any, me: str, target: str, keys: dict[str, Any], certificates: dict[str, bytes]) -> dict[str, Any]:
    """What one robbed node can send to one honest one: name -> (verb, message)."""
    dealt, other = keys["app/data"], keys["mac"]
    accomplice = STOLEN[me == STOLEN[0]]
    genuine = certificates["app/data"]
    found: dict[str, Any] = {
        f"release, grant {what}": ("share.release", ShareRelease(dealt.key_id, grant, genuine))
        for what, grant in bad_grants(words, dealt, other, me).items()
    }
    found["release of an unknown key"] = (
        "share.release",
        ShareRelease(bytes(16), words.grant(dealt, me, client="local"), b""),
    )

    # Keys that the robbed deal themselves, on orders that nobody gave, or that were for something else.
    holders = cluster_names()
    fresh = {"name": "forged", "algorithm": "aes-256-gcm", "holders": holders, "threshold": 3}
    key_id = os.urandom(16)
    for signer in (me, BALANCER, "nobody", "reader"):
        order = words.order("forged", "aes-256-gcm", 3, 5, key_id=key_id, client=signer)
        made = words.deal(**fresh, dealer=me, order=order, key_id=key_id, check=False)
        found[f"prepare on an order by {signer}"] = ("share.prepare", made.offers[target])
    abort = words.abort(dealt.key_id, signer=BALANCER)
    again = words.deal(
        "app/data", holders=holders, threshold=3, dealer=me, order=dealt.order, key_id=dealt.key_id, attempt=2,
        aborts=[abort], check=False,
    )  # fmt: skip
    found["prepare of a key that is there, by its own order"] = ("share.prepare", again.offers[target])
    down = words.deal(
        "app/data", holders=holders, threshold=3, dealer=me, order=dealt.order, key_id=dealt.key_id, attempt=2,
        check=False, manifest={"threshold": 1},
    )  # fmt: skip
    found["prepare with a smaller t than ordered"] = ("share.prepare", down.offers[target])
    later = words.deal(
        "app/data", holders=holders, threshold=3, dealer=me, order=dealt.order, key_id=dealt.key_id, check=False,
        manifest={"epoch": 2, "previous": dealt.record.digest},
    )  # fmt: skip
    found["prepare of a later epoch"] = ("share.prepare", later.offers[target])
    offer = again.offers[target]
    found["prepare with the genuine manifest of another dealer"] = (
        "share.prepare",
        SharePrepare(dealt.record.raw, offer.x, offer.y, offer.salt, [abort]),
    )
    for what, certificate in {
        "t-1 receipts": words.certificate(again, STOLEN, signer=BALANCER),
        "one receipt many times": words.certificate(again, given=[words.receipt(again, me)] * 5, signer=BALANCER),
        "receipts signed for others": words.certificate(
            again, given=[words.receipt(again, node, signer=me) for node in holders], signer=BALANCER
        ),
        "no balancer's signature": words.certificate(again, STOLEN, signer=accomplice),
    }.items():
        unknown = os.urandom(16)
        found[f"commit of nothing with {what}"] = ("share.commit", ShareCommit(unknown, certificate))
    for signer in (me, BALANCER, "nobody", "reader"):
        order = words.destroy_order(dealt.key_id, "app/data", client=signer)
        found[f"destroy by {signer}"] = ("share.destroy", Destroy(order))
    found["destroy by an order for another key"] = (
        "share.destroy",
        Destroy(words.destroy_order(dealt.key_id, "mac", client="local")),
    )
    found["destroy by an expired order"] = (
        "share.destroy",
        Destroy(words.destroy_order(dealt.key_id, "app/data", client="local", expires_in_ms=-6_000)),
    )
    for signer in (me, accomplice):
        found[f"abort signed by {signer}"] = ("share.abort", Abort(words.abort(dealt.key_id, signer=signer)))
    for verb in sorted(REGISTRY_VERBS):
        found[f"{verb} at a node"] = (verb, bytes([0x90]))
    use = Operate("app/data", b"", b"x", b"", b"", False, words.grant(dealt, target, client="local"))
    for verb in sorted(OPERATIONS):
        found[f"{verb} as a node, with a client's grant"] = (verb, use)
    grant = words.grant(dealt, target, client="local")
    found["prewarm as a node"] = ("prewarm", Prewarm("app/data", b"", grant))
    order = words.order("made", "aes-256-gcm", 3, 5, client="local")
    found["generate as a node"] = ("generate", Create(order, b""))
    found["import as a node"] = ("import", Create(order, bytes(32)))
    found["destroy as a node"] = (
        "destroy",
        Destroy(words.destroy_order(dealt.key_id, "app/data", client="local")),
    )
    found["flush as a node"] = ("flush", Flush(""))
    found["stats as a node"] = (STATS, Empty())
    for verb in sorted((NODE_VERBS | CLIENT_VERBS | BACKUP_VERBS) - {"status", STATS}):
        found[f"{verb} with garbage"] = (verb, os.urandom(60))
        found[f"{verb} with nothing"] = (verb, b"")
    return found


def cluster_names() -> tuple[str, ...]:
    return (*STOLEN, *HONEST)


def test_t_minus_one_nodes_with_the_balancers_key_get_no_share(
    cluster: LocalCluster, words: Any, world: Any, line: Callable[[str], Line]
) -> None:
    made = world.deal()
    keys: dict[str, Any] = {}
    certificates: dict[str, bytes] = {}
    for name in KEYS:
        record, certificates[name] = described(line(STOLEN[0]), cluster, name)
        keys[name] = type(made)(record, b"", record.manifest.order, {})
    before = releases(cluster)
    sent = 0
    for me in STOLEN:
        names, requests = [], []
        for target in HONEST:
            for what, (verb, message) in attacks(words, me, target, keys, certificates).items():
                names.append(f"{me} to {target}: {what}")
                body = message if isinstance(message, bytes) else encoded(verb, message)
                requests.append((target, verb, body))
        for name, (code, told) in zip(names, line(me).ask(requests), strict=True):
            assert code not in ("ok", "error"), f"{name}: {code} {told!r}"
            assert told, name
        sent += len(requests)
    # With the balancer's own key: no verb of a node or client but those that tell nothing.
    verbs = sorted((NODE_VERBS | CLIENT_VERBS | BACKUP_VERBS) - {"status"})
    genuine = ShareRelease(keys["app/data"].key_id, words.grant(keys["app/data"], BALANCER, client="local"), b"")
    requests = [(target, verb, b"\x90") for target in HONEST for verb in verbs]
    requests += [(target, "share.release", encoded("share.release", genuine)) for target in HONEST]
    for (_, verb, _), (code, told) in zip(requests, line(BALANCER).ask(requests), strict=True):
        assert code == "access-denied", f"the balancer, {verb}: {code} {told!r}"
    # And the registry takes no order and no certificate from them that a client or the holders did not sign.
    forged = words.order("forged", "aes-256-gcm", 3, 5, client=STOLEN[0])
    destroy = words.destroy_order(keys["mac"].key_id, "mac", client=STOLEN[0])
    tries: list[tuple[str, Any]] = [
        ("registry.reserve", Reserve(forged, b"", b"")),
        ("registry.commit", Commit(keys["mac"].record.raw, [])),
        ("registry.destroy", Destroy(destroy)),
    ]
    asked = [(BALANCER, verb, encoded(verb, message)) for verb, message in tries]
    for (verb, _), (code, told) in zip(tries, line(STOLEN[0]).ask(asked), strict=True):
        assert code not in ("ok", "error"), f"{verb}: {code} {told!r}"
    assert sent + len(requests) > 400
    assert releases(cluster) == before, "a share left"

    a_forged_commit_is_not_taken(cluster, words, line)
    still_serves(cluster)

    # The control: with a client's own fresh grant the same harness gets every share, and none of them came before.
    earlier = b"".join(each for name in (*STOLEN, BALANCER) for each in line(name).received)
    for name, dealt in keys.items():
        for me in STOLEN:
            grant = words.grant(dealt, me, sorted(ALGORITHMS[KEYS[name]].operations)[0], client="local")
            body = encoded("share.release", ShareRelease(dealt.key_id, grant, b""))
            for code, told in line(me).ask([(target, "share.release", body) for target in HONEST]):
                assert code == "ok", told
                share = REPLY_CODECS["share.release"].decode(told)
                assert share.y not in earlier
                assert share.salt not in earlier


def a_forged_commit_is_not_taken(cluster: LocalCluster, words: Any, line: Callable[[str], Line]) -> None:
    """A key that the robbed may deal, as a client ordered it from them, is not valid by their word and the balancer's.

    They deal it to one honest holder alone, whose receipt they get: t receipts, one fewer than a commit needs.
    """
    dealer, target = STOLEN[0], HONEST[0]
    key_id = os.urandom(16)
    order = words.order("trap", "aes-256-gcm", 3, 5, key_id=key_id, client="local")
    made = words.deal("trap", holders=cluster_names(), threshold=3, dealer=dealer, order=order, key_id=key_id)
    prepare = (target, "share.prepare", encoded("share.prepare", made.offers[target]))
    ((code, told),) = line(dealer).ask([prepare])
    assert code == "ok", told
    receipt = REPLY_CODECS["share.prepare"].decode(told).receipt
    given = [*(words.receipt(made, node) for node in STOLEN), receipt]
    forged = [
        words.certificate(made, given=given, signer=BALANCER),
        words.certificate(made, given=[*given, receipt], signer=BALANCER),
        words.certificate(made, given=[*given, words.receipt(made, "node4", signer=dealer)], signer=BALANCER),
        words.certificate(made, given=[*given, words.receipt(made, "node4", signer=BALANCER)], signer=BALANCER),
    ]
    grant = words.grant(made, dealer, client="local")
    requests = [(target, "share.commit", encoded("share.commit", ShareCommit(key_id, each))) for each in forged]
    requests += [
        (target, "share.release", encoded("share.release", ShareRelease(key_id, grant, each)))
        for each in (*forged, b"")
    ]
    for (_, verb, _), (code, told) in zip(requests, line(dealer).ask(requests), strict=True):
        assert code in ("manifest-error", "stale-key"), f"{verb}: {code} {told!r}"


def test_a_stolen_balancers_abort_of_a_committed_key_changes_nothing(
    cluster: LocalCluster, words: Any, line: Callable[[str], Line]
) -> None:
    """It is answered, as the notice on an attempt that is over would be; every share stays, also over a restart."""
    record, certificate = described(line(STOLEN[0]), cluster, "app/data")
    before = {node: status(cluster, node).shares for node in HONEST}
    for attempt in (1, 2, 2**31 - 1):
        notice = words.abort(record.manifest.key_id, attempt, signer=BALANCER)
        for me in STOLEN:
            asked = [(node, "share.abort", encoded("share.abort", Abort(notice))) for node in HONEST]
            assert [code for code, _ in line(me).ask(asked)] == ["ok"] * len(HONEST)
    cluster.restart(HONEST[0])
    for node in HONEST:
        assert status(cluster, node).shares == before[node]
        assert described(line(STOLEN[0]), cluster, "app/data", node)[0].digest == record.digest
    now_ms = time.time_ns() // 1_000_000
    grant = issue_grant(words.keys["local"], record, "encrypt", STOLEN[0], now_ms, 30_000, os.urandom(16))
    body = encoded("share.release", ShareRelease(record.manifest.key_id, grant, certificate))
    for code, told in line(STOLEN[0]).ask([(node, "share.release", body) for node in HONEST]):
        assert code == "ok", told
    still_serves(cluster)


# --- replays ---


def test_no_captured_request_releases_a_share_again(
    cluster: LocalCluster, words: Any, line: Callable[[str], Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every frame that an honest client sent, and what combiners made of it, again: from whom it came, and from others.

    At every node, also after the holders were started again, and with a clock that was set back by an hour.
    """
    captured: list[tuple[str, str, bytes]] = []
    start = Channel.start

    def recording(self: Channel, peer: str, verb: str, body: bytes, timeout_s: float, *more: Any) -> int:
        captured.append((peer, verb, body))
        return start(self, peer, verb, body, timeout_s, *more)

    with monkeypatch.context() as patched, engine.connect(cluster.client_config) as kq:
        patched.setattr(Channel, "start", recording)
        for _ in range(3):
            kq.flush()
            kq.decrypt("app/data", kq.encrypt("app/data", b"x"))
            kq.verify("app/sign", b"m", kq.sign("app/sign", b"m"))
            kq.verify_mac("mac", b"m", kq.mac("mac", b"m"))
            for name in KEYS:
                kq.prewarm(name)
    uses = [each for each in captured if each[1] in OPERATIONS or each[1] == "prewarm"]
    with_grant = [each for each in uses if REQUEST_CODECS[each[1]].decode(each[2]).grant]
    granted = [(peer, REQUEST_CODECS[verb].decode(body)) for peer, verb, body in with_grant]
    assert len(granted) >= 6
    nonces = {told.grant for _, told in granted}
    assert len(nonces) == len(granted), "each attempt has a grant of its own"
    spend(granted, cluster, line)
    time.sleep(RETRY_WINDOW_MS / 1000)
    before = releases(cluster)
    digests = {detail for _, _, detail in before}

    def replay(nodes: Sequence[str]) -> list[str]:
        """All of it at these nodes, with every cache empty; the reasons that the same combiners were told."""
        with engine.connect(cluster.client_config) as kq:
            kq.flush()
        for sender in ("local", "reader", "nobody"):
            requests = [(node, verb, body) for node in nodes for _, verb, body in uses]
            for (node, verb, _), (code, told) in zip(requests, line(sender).ask(requests), strict=True):
                assert code not in ("ok", "error"), f"{sender} to {node}, {verb}: {told!r}"
        reasons = []
        again = [(combiner, verb, body) for combiner, verb, body in with_grant if combiner in nodes]
        for code, told in line("local").ask(again):
            assert code not in ("ok", "error", "quorum-unavailable"), f"gathered again: {told}"
            reasons.append(told)
        for sender in cluster.nodes:
            asked = [(node, combiner, use) for node in nodes for combiner, use in granted]
            requests = [(node, "share.release", released_by(use)) for node, _, use in asked]
            for (node, combiner, _), (code, told) in zip(asked, line(sender).ask(requests), strict=True):
                assert code not in ("ok", "error"), f"{sender} to {node}: {told!r}"
                if sender == combiner != node:
                    reasons.append(told)
        return reasons

    def gained() -> list[tuple[str, str, str]]:
        now = Counter(each for each in releases(cluster) if each[2] in digests)
        return sorted((now - Counter(before)).elements())

    reasons = replay(cluster.nodes)
    assert len(reasons) == 5 * len(granted), "by its combiner, and by each other node"
    assert all("was used already" in each for each in reasons), "it was not their age that refused them"
    assert not gained()
    kept = spend_anew(cluster, words, line)
    for node in HONEST:
        cluster.restart(node)
    for sender, request in kept:
        ((code, told),) = line(sender).ask([request])
        assert (code, "was used already" in told) == ("access-denied", True), told
    replay(HONEST)
    assert not gained()
    cluster.stop_node("node3")
    with stepped(cluster, "node3", -3_600_000):
        for sender, request in kept:
            if request[0] == "node3":
                ((code, told),) = line(sender).ask([request])
                assert (code, "was used already" in told) == ("access-denied", True), told
        replay(("node3",))
        assert "the machine's clock says" in status(cluster, "node3").clock
    cluster.start_node("node3")
    assert not gained()
    still_serves(cluster)


def released_by(use: Any) -> bytes:
    """What the combiner that got this use asks the holders."""
    return encoded("share.release", ShareRelease(use.key_id, use.grant, b""))


def spend(granted: list[tuple[str, Any]], cluster: LocalCluster, line: Callable[[str], Line]) -> None:
    """Use the captured grants up where they were not: at combiners that had the key, and at holders not asked."""
    with engine.connect(cluster.client_config) as kq:
        for combiner, use in granted:
            kq.flush()
            warm = (combiner, "prewarm", encoded("prewarm", Prewarm(use.key, use.key_id, use.grant)))
            ((code, told),) = line("local").ask([warm])
            assert code in ("ok", "need-grant"), told
            others = [(node, "share.release", released_by(use)) for node in cluster.nodes if node != combiner]
            for code, told in line(combiner).ask(others):
                assert code == "ok" or "was used already" in told


def spend_anew(
    cluster: LocalCluster, words: Any, line: Callable[[str], Line]
) -> list[tuple[str, tuple[str, str, bytes]]]:
    """Releases under grants that last as long as one may: (combiner, request), each used once."""
    record, _ = described(line(STOLEN[0]), cluster, "app/data")
    kept = []
    for combiner in STOLEN:
        now_ms = time.time_ns() // 1_000_000
        grant = issue_grant(words.keys["local"], record, "encrypt", combiner, now_ms, 30_000, os.urandom(16))
        for node in HONEST:
            request = (node, "share.release", encoded("share.release", release_of(record, grant)))
            assert line(combiner).ask([request])[0][0] == "ok"
            kept.append((combiner, request))
    return kept


class stepped:  # noqa: N801 - used as a function is
    """A node's own process with a wall clock that is off, as long as the block runs."""

    def __init__(self, cluster: LocalCluster, node: str, by_ms: int) -> None:
        self.cluster, self.node, self.by_ms = cluster, node, by_ms

    def __enter__(self) -> None:
        script = (
            "import sys, time\n"
            "right, by_ns = time.time_ns, int(sys.argv.pop(1)) * 1_000_000\n"
            "time.time_ns = lambda: right() + by_ns\n"
            "from nodes.command import run\n"
            "sys.exit(run())\n"
        )
        config = self.cluster.path / "nodes" / self.node / "node.toml"
        log = (self.cluster.path / "run" / f"{self.node}-stepped.log").open("wb")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", script, str(self.by_ms), "--config", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._await()
        except BaseException:
            self.__exit__()
            raise

    def _await(self) -> None:
        end = time.monotonic() + 60
        while not status(self.cluster, self.node):
            assert self.process.poll() is None, Path(self.cluster.path / "run" / f"{self.node}-stepped.log").read_text()
            assert time.monotonic() < end, "it does not answer"
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


def status(cluster: LocalCluster, node: str) -> Any:
    """The node's own status; None while it does not answer."""
    with engine.connect(cluster.client_config) as kq:
        return next(each.status for each in kq.status() if each.name == node)


# --- client x key x operation x node ---


def may(client: str, operation: str, key: str) -> bool:
    """What the policy says, read by another reader than the nodes'."""
    return any(
        fnmatchcase(client, rule.identity)
        and fnmatchcase(key, rule.keys)
        and ("*" in rule.operations or operation in rule.operations)
        for rule in RULES
    )


def expected(client: str, verb: str, key: str, node: str) -> set[str]:
    implied = {
        RequestType.DESCRIBE: {"describe", "destroy", *OPERATIONS},
        RequestType.PREWARM: {"prewarm", *OPERATIONS},
    }.get(RequestType(verb), {verb})
    if not any(may(client, each, key) for each in implied):
        return {"access-denied"}
    if key not in KEYS:
        return {"key-not-found", "moved"}
    if verb in OPERATIONS and verb not in ALGORITHMS[KEYS[key]].operations:
        return {"invalid-request"}
    if verb == RequestType.PREWARM and not any(may(client, each, key) for each in OPERATIONS):
        return {"access-denied", "ok"}  # it can sign no grant that counts; a key that is loaded needs none
    if verb in ("decrypt",):
        return {"invalid-tag"}
    if verb in ("verify", "verify-mac"):
        return {"invalid-signature"}
    return {"ok"}


def test_every_client_key_operation_and_node_is_as_the_policy_says(
    cluster: LocalCluster, words: Any, line: Callable[[str], Line], world: Any
) -> None:
    made = world.deal()
    dealt = {}
    for name in KEYS:
        record, _ = described(line(STOLEN[0]), cluster, name)
        dealt[name] = type(made)(record, b"", b"", {})
    names = [*KEYS, "app/none", "none"]
    verbs = [*sorted(OPERATIONS), "describe", "prewarm", "flush"]
    told: dict[tuple[str, str, str, str], tuple[str, Any]] = {}
    with engine.connect(cluster.client_config) as kq:
        kq.flush()  # so that the first use of each needs its grant
    for client in CLIENTS:
        cases, requests = [], []
        for node in cluster.nodes:
            for key in names:
                for verb in verbs:
                    words.now_ms = time.time_ns() // 1_000_000
                    able = [each for each in sorted(OPERATIONS) if may(client, each, key)]
                    operation = verb if verb in OPERATIONS else (able or ["encrypt"])[0]
                    grant = words.grant(dealt[key], node, operation, client=client) if key in KEYS else b""
                    message: Any = Operate(key, b"", b"data", b"", b"proof" if "verify" in verb else b"", False, grant)
                    message = {
                        "describe": Describe(key, 0),
                        "prewarm": Prewarm(key, b"", grant),
                        "flush": Flush(key),
                    }.get(verb, message)
                    cases.append((client, verb, key, node))
                    requests.append((node, verb, encoded(verb, message)))
        told.update(zip(cases, line(client).ask(requests), strict=True))
    wrong = {case: got for case, got in told.items() if got[0] not in expected(*case)}
    assert not wrong, list(wrong.items())[:10]
    assert len(told) == len(CLIENTS) * len(names) * len(verbs) * len(cluster.nodes) >= 1_300
    # Who has no right can't tell a key that is there from one that is not, by any node's words.
    for (client, verb, key, node), (code, text) in told.items():
        if code == "access-denied" and key == "app/data":
            absent = told[client, verb, "app/none", node]
            if absent[0] == "access-denied" and verb != "prewarm":
                assert absent[1] == text.replace("app/data", "app/none")


# --- a clock that was ahead ---


def test_a_clock_that_was_ahead_stops_one_node_until_an_operator_resets_it(
    cluster: LocalCluster, words: Any, line: Callable[[str], Line]
) -> None:
    record, _ = described(line(STOLEN[0]), cluster, "app/data")
    node, me = "node5", STOLEN[0]

    def ask() -> tuple[str, Any]:
        words.now_ms = time.time_ns() // 1_000_000
        grant = issue(words, record, me)
        ((code, told),) = line(me).ask([(node, "share.release", encoded("share.release", release_of(record, grant)))])
        return code, told

    assert ask()[0] == "ok"
    cluster.stop_node(node)
    with stepped(cluster, node, 366 * 86_400_000):
        code, told = ask()
        assert (code, "expired" in told) == ("manifest-error", True)
    cluster.start_node(node)
    code, told = ask()
    assert (code, "expired" in told) == ("manifest-error", True)
    complaint = status(cluster, node).clock
    years = [time.gmtime().tm_year, time.gmtime(time.time() + 366 * 86_400).tm_year]
    assert all(f"{year}-" in complaint for year in years), complaint
    assert "clock behind" in cluster.log_file(node).read_text()
    still_serves(cluster)
    old = issue(words, record, me)
    command = [
        sys.executable,
        "-m",
        "nodes",
        "reset-clock",
        "--config",
        str(cluster.path / "nodes" / node / "node.toml"),
    ]
    running = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert running.returncode != 0
    assert "in use" in running.stderr
    cluster.stop_node(node)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    cluster.start_node(node)
    assert status(cluster, node).clock == ""
    body = encoded("share.release", release_of(record, old))
    ((code, told),) = line(me).ask([(node, "share.release", body)])
    assert (code, "before this node's clock was reset" in told) == ("access-denied", True)


def issue(words: Any, record: KeyRecord, combiner: str) -> bytes:
    now_ms = time.time_ns() // 1_000_000
    return issue_grant(words.keys["local"], record, "encrypt", combiner, now_ms, 10_000, os.urandom(16))


def release_of(record: KeyRecord, grant: bytes) -> ShareRelease:
    return ShareRelease(record.manifest.key_id, grant, b"")
