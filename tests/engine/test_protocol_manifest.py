"""The chain of cluster manifests, identity cards, and the documents of a key: who may say what, and in which order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.cli.chains import view_chain
from engine.errors import AccessDenied, EngineError, ManifestError, ProtocolError
from engine.protocol import manifest as module
from engine.protocol.manifest import (
    CLOCK_SKEW_MS,
    MAX_HOLDERS,
    ORDER_LIFETIME_MAX_MS,
    AbortNotice,
    Cluster,
    CommitCertificate,
    CreateOrder,
    DestroyOrder,
    Holder,
    KeyManifest,
    KeyRecord,
    Member,
    PolicyRule,
    Receipt,
    aborts,
    certificates,
    chain_pin,
    check_share_counts,
    countersign_chain,
    create_orders,
    decode_card,
    destroy_orders,
    encode_card,
    issue_cluster_manifest,
    key_manifests,
    open_abort,
    open_certificate,
    open_chain,
    open_create_order,
    open_destroy_order,
    open_key_manifest,
    open_receipt,
    read_key_manifest,
    receipts,
    receipts_needed,
)
from engine.protocol.signed import SigningKey, read_unverified, sign_envelope

NOW = 1_800_000_000_000
NODES = ("n1", "n2", "n3", "n4")
ROLES = {"op1": "operator", "op2": "operator", "op3": "operator", "alice": "client", "bob": "client", "bal": "balancer"}
RULES = (PolicyRule("alice", "*", ["*"]),)


def signing(name: str) -> SigningKey:
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"m" + name.encode()).digest()))


def member(name: str, role: str = "", **changes: Any) -> Member:
    role = role or ROLES.get(name, "node")
    fields: dict[str, Any] = {
        "name": name,
        "role": role,
        "sign_public": signing(name).public,
        "curve_public": bytes(32) if role == "operator" else hashlib.sha256(b"c" + name.encode()).digest(),
        "endpoint": "tcp://127.0.0.1:1" if role in ("node", "balancer") else "",
        "location": f"site/room/rack/{name}" if role == "node" else "",
    }
    return Member(**{**fields, **changes})


ALL = [member(name) for name in (*ROLES, *NODES)]
OPERATORS = [signing("op1"), signing("op2"), signing("op3")]


def issue(
    *operators: str,
    members: Sequence[Member] = ALL,
    rules: Sequence[PolicyRule] = RULES,
    chain: bytes = b"",
    **options: Any,
) -> bytes:
    return issue_cluster_manifest(
        name=options.pop("name", "test"),
        members=members,
        rules=rules,
        operators=[signing(name) for name in operators],
        chain=chain,
        **{"quorum": 2, **options},
    )


FIRST = issue("op1", "op2")
PIN = chain_pin(FIRST)
CLUSTER = open_chain(FIRST, PIN)


def envelopes(chain: bytes) -> list[bytes]:
    return list(module._chains.decode(chain).envelopes)


def chained(*raw: bytes) -> bytes:
    return module._chains.encode(module._Chain(list(raw)))


def refused(chain: bytes, match: str, pin: bytes = PIN) -> None:
    with pytest.raises(ManifestError, match=match):
        open_chain(chain, pin)


# --- the chain ---


def test_the_first_manifest_says_who_is_who() -> None:
    assert (CLUSTER.name, CLUSTER.serial, CLUSTER.pin, CLUSTER.quorum) == ("test", 1, PIN, 2)
    assert CLUSTER.digest == PIN
    assert [each.name for each in CLUSTER.of_role("node")] == list(NODES)
    assert set(CLUSTER.nodes) == set(NODES)
    assert CLUSTER.by_curve[CLUSTER.members["alice"].curve_z85].name == "alice"
    assert "op1" not in {each.name for each in CLUSTER.by_curve.values()}
    assert set(CLUSTER.sign_key("client", "balancer")) == {"alice", "bob", "bal"}


def test_a_later_manifest_follows_the_first() -> None:
    more = [*ALL, member("n5")]
    chain = issue("op2", "op3", members=more, chain=FIRST)
    cluster = open_chain(chain, PIN)
    assert (cluster.serial, cluster.pin, set(cluster.nodes)) == (2, PIN, {*NODES, "n5"})
    third = open_chain(issue("op1", "op2", members=more[:-2], chain=chain), PIN)
    assert (third.serial, set(third.nodes)) == (3, {"n1", "n2", "n3"})


def test_a_wrong_pin_is_refused() -> None:
    for pin in (bytes(32), b"", PIN[:-1], PIN[:-1] + bytes([PIN[-1] ^ 1])):
        refused(FIRST, "pinned is", pin)
    other = issue("op1", "op2", rules=[])
    refused(other, "pinned is")


def test_too_few_operators_are_refused() -> None:
    one = issue("op1")
    refused(one, "1 of 2 signatures", chain_pin(one))
    refused(issue("op1", chain=FIRST), "1 of 2 signatures")
    open_chain(countersign_chain(issue("op1", chain=FIRST), signing("op3")), PIN)


@pytest.mark.parametrize("name", ["alice", "n1", "bal", "mallory"])
def test_only_operators_sign(name: str) -> None:
    refused(issue("op1", name, chain=FIRST), f"'{name}' may not sign this")
    refused(issue("op1", "op2", name, chain=FIRST), f"'{name}' may not sign this")


def test_new_operators_can_not_appoint_themselves() -> None:
    theirs = [member(f"evil{i}", "operator") for i in range(2)]
    taken = [each for each in ALL if each.role != "operator"] + theirs
    refused(issue("evil0", "evil1", members=taken, chain=FIRST), "'evil0' may not sign this")
    refused(issue("op1", "evil1", members=[*ALL, *theirs], chain=FIRST), "'evil1' may not sign this")
    # Appointed by the old ones, the new ones sign from the next manifest on, and the old ones no more.
    handed = issue("op1", "op2", members=taken, chain=FIRST)
    open_chain(handed, PIN)
    open_chain(issue("evil0", "evil1", members=taken, chain=handed), PIN)
    refused(issue("op1", "op2", members=taken, chain=handed), "'op1' may not sign this")


def test_a_quorum_is_lowered_by_the_old_quorum_alone() -> None:
    refused(issue("op1", quorum=1, chain=FIRST), "1 of 2 signatures")
    lowered = issue("op1", "op2", quorum=1, chain=FIRST)
    open_chain(issue("op3", quorum=1, chain=lowered), PIN)


def test_a_gap_in_the_serials_is_refused() -> None:
    second = issue("op1", "op2", rules=[], chain=FIRST)
    third = issue("op1", "op2", chain=second)
    one, two, three = envelopes(third)
    open_chain(chained(one, two, three), PIN)
    refused(chained(one, three), "serial 3 does not follow 1")
    refused(chained(one, two, two), "serial 2 does not follow 2")
    refused(chained(one, three, two), "does not follow")
    refused(chained(one, one), "does not follow")
    refused(chained(two, three), "pinned is")


def test_a_wrong_predecessor_is_refused() -> None:
    fork = envelopes(issue("op1", "op2", rules=[], chain=FIRST))[1]
    other = envelopes(issue("op1", "op3", chain=chained(envelopes(FIRST)[0], fork)))[2]
    second = envelopes(issue("op1", "op2", chain=FIRST))[1]
    assert read_unverified(second).serial + 1 == read_unverified(other).serial
    refused(chained(envelopes(FIRST)[0], second, other), "serial 3 does not follow 2")


def test_a_first_manifest_with_a_predecessor_or_another_serial_is_refused() -> None:
    second = envelopes(issue("op1", "op2", chain=FIRST))[1]
    refused(chained(second), "must have serial 1 and no predecessor", read_unverified(second).digest)


@pytest.mark.parametrize(("field", "value"), [("cluster", "other"), ("groups", 512)])
def test_name_and_groups_never_change(field: str, value: Any) -> None:
    """Signed by everyone it takes, past the issuing function, which refuses it too."""
    last = read_unverified(envelopes(FIRST)[0])
    changed = msgspec.structs.replace(module._manifests.decode(last.payload), previous=last.digest, **{field: value})
    raw = sign_envelope("cluster", 2, module._manifests.encode(changed), *OPERATORS)
    refused(chained(envelopes(FIRST)[0], raw), "can't change")
    options = {"name": value} if field == "cluster" else {"groups": value}
    with pytest.raises(ManifestError, match="fixed at"):
        issue("op1", "op2", chain=FIRST, **options)


def test_every_changed_byte_of_a_chain_is_refused() -> None:
    small = [each for each in ALL if each.name in ("op1", "n1")]
    chain = issue("op1", members=small, quorum=1, rules=[])
    pin = chain_pin(chain)
    chain = issue("op1", members=small, quorum=1, rules=[], chain=chain)
    open_chain(chain, pin)
    for position in range(len(chain)):
        wrong = bytearray(chain)
        wrong[position] ^= 1 << position % 8
        with pytest.raises((ManifestError, ProtocolError)):
            open_chain(bytes(wrong), pin)
    for wrong_chain in (b"", b"\x90", b"\x91\x90", chain + b"\0", chain[:-1], os.urandom(99)):
        with pytest.raises((ManifestError, ProtocolError)):
            open_chain(wrong_chain, pin)


@pytest.mark.parametrize(
    ("members", "quorum", "match"),
    [
        ([*ALL, member("n1")], 2, "name 'n1' appears twice"),
        ([*ALL, member("n5", sign_public=signing("n1").public)], 2, "a key of 'n5' belongs to another member"),
        ([*ALL, member("n5", curve_public=member("n1").curve_public)], 2, "a key of 'n5' belongs to another member"),
        ([*ALL, member("op4", "operator", sign_public=signing("op1").public)], 2, "a key of 'op4' belongs"),
        ([*ALL, member("n5", endpoint="")], 2, "'n5' needs an endpoint"),
        ([*ALL, member("n5", endpoint="ipc:///tmp/x")], 2, "'n5' needs an endpoint"),
        ([*ALL, member("b2", "balancer", endpoint="")], 2, "'b2' needs an endpoint"),
        ([*ALL, member("n5", location="")], 2, "location '' of 'n5' has an empty part"),
        ([*ALL, member("n5", location="site//rack")], 2, "of 'n5' has an empty part"),
        (ALL, 4, "a quorum of 4 among 3 operators"),
        ([each for each in ALL if each.role != "operator"], 1, "a quorum of 1 among 0 operators"),
    ],
)
def test_members_that_contradict_each_other_are_refused(members: list[Member], quorum: int, match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        issue("op1", "op2", members=members, quorum=quorum)
    last = read_unverified(envelopes(FIRST)[0])
    wrong = msgspec.structs.replace(
        module._manifests.decode(last.payload), previous=last.digest, members=members, quorum=quorum
    )
    raw = sign_envelope("cluster", 2, module._manifests.encode(wrong), *OPERATORS)
    refused(chained(envelopes(FIRST)[0], raw), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cluster": "other"}, "can't change"),
        ({"groups": 512}, "can't change"),
        ({"rules": [PolicyRule("*", "*", ["sing"])]}, "unknown operation 'sing'"),
        ({"members": [*ALL, member("n1")]}, "name 'n1' appears twice"),
        ({"retiring": [module.Retiring("nobody", bytes(32))]}, "or is no member"),
    ],
)
def test_an_operator_is_shown_nothing_to_sign_that_nobody_would_take(changes: dict[str, Any], match: str) -> None:
    """With one signature of two on it, which is as far as it comes before a second operator sees it."""
    last = read_unverified(envelopes(FIRST)[0])
    manifest = msgspec.structs.replace(module._manifests.decode(last.payload), previous=last.digest)
    good = sign_envelope("cluster", 2, module._manifests.encode(manifest), OPERATORS[0])
    assert not view_chain(chained(envelopes(FIRST)[0], good), PIN).complete
    wrong = module._manifests.encode(msgspec.structs.replace(manifest, **changes))
    with pytest.raises(ManifestError, match=match):
        view_chain(chained(envelopes(FIRST)[0], sign_envelope("cluster", 2, wrong, OPERATORS[0])), PIN)


def test_a_rule_with_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ManifestError, match="unknown operation 'sing'; known are"):
        issue("op1", "op2", rules=[PolicyRule("*", "*", ["sing"])])


# --- the policy ---


def with_rules(*rules: PolicyRule) -> Cluster:
    chain = issue("op1", "op2", rules=rules)
    return open_chain(chain, chain_pin(chain))


@pytest.mark.parametrize(
    ("rule", "asked", "answer"),
    [
        (("alice", "*", ["sign"]), ("alice", "sign", "k"), True),
        (("alice", "*", ["*"]), ("alice", "destroy", "a/b"), True),
        (("*", "k", ["sign"]), ("anyone", "sign", "k"), True),
        (("a?ice", "team/*", ["sign"]), ("alice", "sign", "team/x/y"), True),
        (("alice", "*", ["sign"]), ("alice", "verify", "k"), False),
        (("alice", "*", ["sign"]), ("alicex", "sign", "k"), False),
        (("alice", "*", ["sign"]), ("Alice", "sign", "k"), False),
        (("alice", "k", ["sign"]), ("alice", "sign", "k2"), False),
        (("alice", "k", ["sign"]), ("alice", "sign", "k\n"), False),
        (("alice", "k.", ["sign"]), ("alice", "sign", "kx"), False),
        (("alice", "[!k]*", ["sign"]), ("alice", "sign", "key"), False),
        (("alice", "*", ["sign"]), ("alice", "*", "k"), False),
    ],
)
def test_what_a_rule_allows(rule: tuple[str, str, list[str]], asked: tuple[str, str, str], answer: bool) -> None:
    assert with_rules(PolicyRule(*rule)).allows(*asked) is answer
    assert not with_rules().allows(*asked)


@pytest.mark.parametrize("pattern", ["?", "?*", "[*]", "**", "a*", "k"])
def test_a_right_to_every_key_is_a_rule_for_the_star_alone(pattern: str) -> None:
    assert with_rules(PolicyRule("a*", "*", ["flush"])).allows_every_key("alice", "flush")
    assert not with_rules(PolicyRule("a*", "*", ["flush"])).allows_every_key("alice", "sign")
    assert not with_rules(PolicyRule("a*", "*", ["flush"])).allows_every_key("bob", "flush")
    assert not with_rules(PolicyRule("alice", pattern, ["*"])).allows_every_key("alice", "flush")


def test_a_right_to_some_key_is_a_right_to_any() -> None:
    cluster = with_rules(PolicyRule("a*", "x", ["list"]))
    assert cluster.allows_any_key("alice", "list")
    assert not cluster.allows_any_key("alice", "sign")
    assert not cluster.allows_any_key("bob", "list")


# --- cards ---


def test_a_card_proves_its_own_key() -> None:
    told = member("n1")
    assert decode_card(encode_card(told, signing("n1"))) == told
    for forged in (
        encode_card(told, signing("n2")),
        encode_card(told, SigningKey("n1", signing("n2")._private)),
        encode_card(member("n1", sign_public=signing("n2").public), signing("n1")),
        encode_card(member("n2"), signing("n1")),
        encode_card(told, signing("n1"))[:-1],
        sign_envelope("grant", 1, module._cards.encode(told), signing("n1")),
    ):
        with pytest.raises((ManifestError, ProtocolError)):
            decode_card(forged)


# --- orders ---


def order(client: str | SigningKey = "alice", **changes: Any) -> bytes:
    fields = {
        "key_id": bytes(16),
        "name": "k",
        "algorithm": "aes-256-gcm",
        "threshold": 2,
        "shares": 3,
        "operation": "generate",
        "expires_ms": NOW + 60_000,
        **changes,
    }
    key = signing(client) if isinstance(client, str) else client
    return sign_envelope("order.create", NOW, create_orders.encode(CreateOrder(**fields)), key)


def test_a_create_order_is_its_clients() -> None:
    opened, signed = open_create_order(order(), CLUSTER, NOW)
    assert (opened.name, opened.threshold, signed.issuer) == ("k", 2, "alice")


@pytest.mark.parametrize(
    ("raw", "error", "match"),
    [
        (order("bob"), AccessDenied, "'bob' may not generate the key 'k'"),
        (order("n1"), ManifestError, "'n1' may not sign this"),
        (order("bal"), ManifestError, "may not sign this"),
        (order("op1"), ManifestError, "may not sign this"),
        (order("mallory"), ManifestError, "may not sign this"),
        (order(SigningKey("alice", signing("bob")._private)), ManifestError, "is wrong"),
        (order(algorithm="des"), ManifestError, "unknown algorithm 'des'"),
        (order(threshold=4), ManifestError, "threshold 4 of 3 shares"),
        (order(threshold=0), ProtocolError, "create order"),
        (order(shares=65), ProtocolError, "create order"),
        (order(operation="destroy"), ProtocolError, "create order"),
        (order(expires_ms=NOW - CLOCK_SKEW_MS - 1), ManifestError, "expired"),
        (order(expires_ms=NOW + ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS + 1), ManifestError, "the limit is"),
    ],
)
def test_a_bad_create_order_is_refused(raw: bytes, error: type[EngineError], match: str) -> None:
    with pytest.raises(error, match=match):
        open_create_order(raw, CLUSTER, NOW)


def test_neither_time_nor_a_later_policy_undoes_a_key_that_exists() -> None:
    without = with_rules()
    assert open_create_order(order(), without, None)[0].name == "k"
    with pytest.raises(AccessDenied):
        open_create_order(order(), without, NOW)
    with pytest.raises(ManifestError):
        open_create_order(order(), CLUSTER, NOW + 10**9)
    for raw in (order("n1"), order("mallory"), order(algorithm="des"), order(threshold=4)):
        with pytest.raises(ManifestError):
            open_create_order(raw, CLUSTER, None)


def test_a_destroy_order_is_its_clients_and_in_time() -> None:
    def destroy(client: str, expires_ms: int = NOW + 1) -> bytes:
        raw = destroy_orders.encode(DestroyOrder(bytes(16), "k", expires_ms))
        return sign_envelope("order.destroy", NOW, raw, signing(client))

    assert open_destroy_order(destroy("alice"), CLUSTER, NOW)[0].name == "k"
    assert open_destroy_order(destroy("alice", 1), CLUSTER, None)[0].name == "k"
    for raw, error in (
        (destroy("bob"), AccessDenied),
        (destroy("n1"), ManifestError),
        (destroy("bal"), ManifestError),
        (destroy("alice", NOW - CLOCK_SKEW_MS - 1), ManifestError),
        (destroy("alice", NOW + ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS + 1), ManifestError),
        (order(), ManifestError),
    ):
        with pytest.raises(error):
            open_destroy_order(raw, CLUSTER, NOW)
    with pytest.raises(AccessDenied):
        open_destroy_order(destroy("bob"), CLUSTER, None)


# --- a key's manifest against its order ---

HOLDERS = [Holder(name, x, bytes([x]) * 32) for x, name in enumerate(NODES[:3], start=1)]


def key(dealer: str | SigningKey = "n1", raw_order: bytes = b"", **changes: Any) -> bytes:
    fields = {
        "key_id": bytes(16),
        "name": "k",
        "version": 1,
        "epoch": 1,
        "attempt": 1,
        "algorithm": "aes-256-gcm",
        "threshold": 2,
        "holders": HOLDERS,
        "public_key": b"",
        "check_value": bytes(32),
        "order": raw_order or order(),
        "previous": b"",
        **changes,
    }
    signer = signing(dealer) if isinstance(dealer, str) else dealer
    return sign_envelope("key", NOW, key_manifests.encode(KeyManifest(**fields)), signer)


RECORD = open_key_manifest(key(), CLUSTER)


def test_a_key_manifest_is_true_to_its_order() -> None:
    assert (RECORD.dealer, RECORD.manifest.shares, RECORD.digest) == ("n1", 3, read_unverified(key()).digest)
    assert RECORD.manifest.context == bytes(16) + b"\0\0\0\1" + b"\0\0\0\1"
    assert RECORD.manifest.holder("n2") == HOLDERS[1]
    assert RECORD.manifest.holder("n4") is None
    assert read_key_manifest(RECORD.raw) == RECORD


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (key(name="other"), "differs from the client's order"),
        (key(key_id=b"\1" * 16), "differs from the client's order"),
        (key(threshold=1), "differs from the client's order"),
        (key(algorithm="aes-128-gcm"), "differs from the client's order"),
        (key(holders=HOLDERS[:2]), "differs from the client's order"),
        (key(version=2), "differs from the client's order"),
        (key(epoch=2), "epoch 2 names no predecessor"),
        (key(previous=bytes(32)), "the first one has no predecessor and no change"),
        (key(change=b"order"), "the first one has no predecessor and no change"),
        (key(holders=[*HOLDERS[:2], Holder("n1", 3, bytes(32))]), "a node holds two shares"),
        (key(holders=[*HOLDERS[:2], Holder("n3", 1, bytes(32))]), "two shares have the same x"),
        (key(holders=[*HOLDERS[:2], Holder("alice", 3, bytes(32))]), "'alice' is no node"),
        (key(holders=[*HOLDERS[:2], Holder("gone", 3, bytes(32))]), "'gone' is no node"),
        (key(public_key=b"x"), "public key missing or out of place"),
        (
            key(raw_order=order(algorithm="ed25519"), algorithm="ed25519"),
            "public key missing or out of place",
        ),
        (key("alice"), "'alice' may not sign this"),
        (key("bal"), "'bal' may not sign this"),
        (key(SigningKey("n1", signing("n2")._private)), "is wrong"),
        (key(raw_order=order("n1")), "'n1' may not sign this"),
    ],
)
def test_a_key_manifest_that_is_not_is_refused(raw: bytes, match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        open_key_manifest(raw, CLUSTER, NOW)
    if "is no node" not in match:
        with pytest.raises(ManifestError, match=match):
            open_key_manifest(raw, CLUSTER)


def test_the_orders_time_and_policy_count_when_a_share_is_first_stored() -> None:
    open_key_manifest(key(), CLUSTER, NOW)
    open_key_manifest(key(), CLUSTER)
    with pytest.raises(ManifestError, match="expired"):
        open_key_manifest(key(), CLUSTER, NOW + 10**8)
    with pytest.raises(AccessDenied):
        open_key_manifest(key(raw_order=order("bob")), CLUSTER, NOW)


def test_a_key_outlives_the_membership_of_who_made_it_but_none_of_them_makes_another() -> None:
    left = [each for each in ALL if each.name not in ("alice", "n1", "bal")] + [member("bal2", "balancer")]
    chain = issue("op1", "op2", members=left, rules=[], chain=FIRST)
    later = open_chain(chain, PIN)
    assert not {"alice", "n1", "bal"} & set(later.members)
    record = open_key_manifest(RECORD.raw, later)
    assert record == RECORD
    assert set(open_certificate(certificate(GOOD), record, later)) == set(NODES[:3])
    for raw in (RECORD.raw, key("n2")):
        with pytest.raises(ManifestError, match="may not sign this"):
            open_key_manifest(raw, later, NOW)
    with pytest.raises(ManifestError, match="'alice' may not sign this"):
        open_create_order(order(), later, NOW)
    with pytest.raises(ManifestError, match="'bal' may not sign this"):
        open_abort(sign_envelope("abort", NOW, aborts.encode(AbortNotice(bytes(16), 1)), signing("bal")), later)


def test_a_name_given_to_another_key_does_not_make_the_old_one_sign_now() -> None:
    renamed = [each for each in ALL if each.name != "n1"] + [
        member("n1", sign_public=signing("new n1").public, curve_public=bytes([7]) * 32)
    ]
    later = open_chain(issue("op1", "op2", members=renamed, chain=FIRST), PIN)
    assert open_key_manifest(RECORD.raw, later) == RECORD
    with pytest.raises(ManifestError, match="signature of 'n1' is wrong"):
        open_key_manifest(RECORD.raw, later, NOW)


# --- receipts, certificates, aborts ---


def receipt(node: str, signer: str | SigningKey = "", record: KeyRecord = RECORD, **changes: Any) -> bytes:
    holder = record.manifest.holder(node)
    fields = {"key_id": bytes(16), "manifest_hash": record.digest, "x": holder.x if holder else 9, **changes}
    told = signer or node
    return sign_envelope(
        "receipt", NOW, receipts.encode(Receipt(**fields)), signing(told) if isinstance(told, str) else told
    )


def certificate(given: Sequence[bytes], signer: str = "bal", **changes: Any) -> bytes:
    fields = {"key_id": bytes(16), "manifest_hash": RECORD.digest, "receipts": list(given), **changes}
    return sign_envelope("certificate", NOW, certificates.encode(CommitCertificate(**fields)), signing(signer))


GOOD = [receipt(name) for name in NODES[:3]]


def test_a_receipt_is_its_holders_for_its_x() -> None:
    assert open_receipt(GOOD[0], RECORD, CLUSTER) == "n1"
    other = open_key_manifest(key(attempt=2), CLUSTER)
    for wrong in (
        receipt("n1", "n2"),
        receipt("n4"),
        receipt("n1", x=2),
        receipt("n1", manifest_hash=bytes(32)),
        receipt("n1", key_id=b"\1" * 16),
        receipt("n1", record=other),
        receipt("n1", "alice"),
        receipt("n1", SigningKey("n1", signing("n2")._private)),
        RECORD.raw,
    ):
        with pytest.raises(ManifestError):
            open_receipt(wrong, RECORD, CLUSTER)


def test_a_certificate_needs_t_plus_one_different_receipts() -> None:
    assert set(open_certificate(certificate(GOOD), RECORD, CLUSTER)) == set(NODES[:3])
    for given in (GOOD[:1], GOOD[:2], [*GOOD[:2], GOOD[1]], [GOOD[0]] * 64):
        with pytest.raises(ManifestError, match="3 are needed"):
            open_certificate(certificate(given), RECORD, CLUSTER)
    for wrong in (
        certificate([*GOOD, receipt("n4")]),
        certificate([*GOOD[:2], receipt("n3", "n2")]),
        certificate(GOOD, "n1"),
        certificate(GOOD, "alice"),
        certificate(GOOD, key_id=b"\1" * 16),
        certificate(GOOD, manifest_hash=bytes(32)),
    ):
        with pytest.raises(ManifestError):
            open_certificate(wrong, RECORD, CLUSTER)


@pytest.mark.parametrize(
    ("threshold", "shares", "needed"), [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 3, 3), (3, 5, 4), (5, 5, 5), (3, 64, 4)]
)
def test_how_many_receipts_are_needed(threshold: int, shares: int, needed: int) -> None:
    assert receipts_needed(threshold, shares) == needed


def test_an_abort_is_a_balancers() -> None:
    def abort(signer: str) -> bytes:
        return sign_envelope("abort", NOW, aborts.encode(AbortNotice(bytes(16), 3)), signing(signer))

    assert open_abort(abort("bal"), CLUSTER) == AbortNotice(bytes(16), 3)
    for signer in ("n1", "alice", "op1", "mallory"):
        with pytest.raises(ManifestError, match="may not sign this"):
            open_abort(abort(signer), CLUSTER)


@pytest.mark.parametrize(("threshold", "shares"), [(0, 3), (-1, 3), (4, 3), (1, 0), (1, MAX_HOLDERS + 1)])
def test_counts_no_cluster_can_hold_are_refused(threshold: int, shares: int) -> None:
    with pytest.raises(ValueError, match=str(shares)):
        check_share_counts(threshold, shares)
    check_share_counts(1, 1)
    check_share_counts(MAX_HOLDERS, MAX_HOLDERS)


# --- placement groups ---


def test_groups_are_the_same_on_every_member_and_name_nodes_once() -> None:
    again = open_chain(FIRST, PIN)
    for number in range(0, CLUSTER.groups, 37):
        holders = CLUSTER.group_holders(number)
        assert holders == again.group_holders(number)
        assert sorted(holders) == sorted(NODES)
    assert 0 <= CLUSTER.group_of("orders") < CLUSTER.groups
    assert {CLUSTER.group_holders(number)[0] for number in range(200)} == set(NODES)


def test_a_node_that_is_draining_is_in_no_group_and_a_node_still() -> None:
    chain = issue("op1", "op2", chain=FIRST, draining=["n2"])
    cluster = open_chain(chain, PIN)
    assert cluster.draining == {"n2"}
    assert set(cluster.nodes) == set(NODES) == {place.name for place in cluster.locations}
    for number in range(0, cluster.groups, 37):
        left = [name for name in CLUSTER.group_holders(number) if name != "n2"]
        assert list(cluster.group_holders(number)) == left
        assert list(cluster.first_holders(number, 2)) == left[:2]
    assert view_chain(chain, PIN).draining == ("n2",)


def test_a_node_goes_on_draining_until_it_is_said_otherwise_or_it_left() -> None:
    chain = issue("op1", "op2", chain=FIRST, draining=["n3", "n2"])
    kept = issue("op1", "op2", chain=chain)
    assert open_chain(kept, PIN).draining == {"n2", "n3"}
    assert open_chain(issue("op1", "op2", chain=kept, draining=()), PIN).draining == set()
    without = [each for each in ALL if each.name != "n3"]
    assert open_chain(issue("op1", "op2", chain=kept, members=without), PIN).draining == {"n2"}


@pytest.mark.parametrize(
    ("draining", "match"),
    [
        (["n9"], "'n9' can't be draining, it is no node"),
        (["alice"], "'alice' can't be draining, it is no node"),
        (["n1", "n1"], "a node is draining twice"),
    ],
)
def test_what_is_no_node_can_not_drain(draining: list[str], match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        issue("op1", "op2", chain=FIRST, draining=draining)
    fields = msgspec.structs.asdict(module._manifests.decode(read_unverified(envelopes(FIRST)[0]).payload))
    told = module._manifests.encode(module._ClusterManifest(**{**fields, "previous": PIN, "draining": draining}))
    raw = sign_envelope("cluster", 2, told, signing("op1"), signing("op2"))
    refused(chained(*envelopes(FIRST), raw), match)


def test_a_manifest_of_before_nodes_could_drain_is_one_still() -> None:
    """It ends with the field before; one that leaves out more, or other than what is empty, is none."""
    told = module._manifests.decode(read_unverified(envelopes(FIRST)[0]).payload)
    fields = msgspec.structs.astuple(told)
    older = sign_envelope("cluster", 1, msgspec.msgpack.encode(fields[:-1]), signing("op1"), signing("op2"))
    pin = read_unverified(older).digest
    cluster = open_chain(chained(older), pin)
    assert (cluster.draining, cluster.retiring, set(cluster.nodes)) == (frozenset(), {}, set(NODES))
    later = open_chain(issue("op1", "op2", chain=chained(older), draining=["n1"]), pin)
    assert (later.serial, later.draining) == (2, {"n1"})
    shorter = sign_envelope("cluster", 1, msgspec.msgpack.encode(fields[:-2]), signing("op1"), signing("op2"))
    with pytest.raises(ProtocolError, match="of at least length 8"):
        open_chain(chained(shorter), read_unverified(shorter).digest)
    longer = sign_envelope("cluster", 1, msgspec.msgpack.encode((*fields, 0)), signing("op1"), signing("op2"))
    with pytest.raises(ProtocolError, match="at most length 9"):
        open_chain(chained(longer), read_unverified(longer).digest)


def test_a_cluster_can_not_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        CLUSTER.serial = 9  # type: ignore[misc]
    with pytest.raises(TypeError):
        CLUSTER.members["x"] = ALL[0]  # type: ignore[index]
    assert isinstance(CLUSTER, Cluster)
