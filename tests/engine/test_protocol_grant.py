"""The grant: one combiner, one key, one epoch, a short time, and only what its client may do."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import AccessDenied, EngineError, ManifestError, ProtocolError, StaleKey
from engine.keys import OPERATIONS
from engine.protocol.grant import GRANT_LIFETIME_MAX_MS, check_grant, issue_grant
from engine.protocol.manifest import (
    CLOCK_SKEW_MS,
    Holder,
    KeyManifest,
    KeyRecord,
    Member,
    PolicyRule,
    chain_pin,
    issue_cluster_manifest,
    open_chain,
)
from engine.protocol.signed import SigningKey, sign_envelope

NOW = 1_800_000_000_000
NONCE = bytes(range(16))


def signing(name: str) -> SigningKey:
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"g" + name.encode()).digest()))


def member(name: str, role: Any) -> Member:
    curve = bytes(32) if role == "operator" else hashlib.sha256(name.encode()).digest()
    endpoint = "" if role in ("operator", "client") else "tcp://127.0.0.1:1"
    return Member(name, role, signing(name).public, curve, endpoint, "", f"site/{name}" if role == "node" else "")


ROLES = {
    "op": "operator",
    "alice": "client",
    "bob": "client",
    "bal": "balancer",
    "n1": "node",
    "n2": "node",
    "n3": "node",
}
CHAIN = issue_cluster_manifest(
    name="test",
    members=[member(name, role) for name, role in ROLES.items()],
    rules=[PolicyRule("alice", "k", ["encrypt", "decrypt"]), PolicyRule("bob", "other", ["*"])],
    operators=[signing("op")],
)
CLUSTER = open_chain(CHAIN, chain_pin(CHAIN))
HOLDERS = [Holder("n1", 1, bytes(32)), Holder("n2", 2, bytes(32))]
MANIFEST = KeyManifest(b"k" * 16, "k", 3, 7, 1, "aes-256-gcm", 2, HOLDERS, b"", bytes(32), b"", b"")
RECORD = KeyRecord(MANIFEST, bytes(32), "n1", b"")


def grant(client: str | SigningKey = "alice", kind: str = "grant", **changes: Any) -> bytes:
    fields = {
        "key_id": b"k" * 16,
        "version": 3,
        "epoch": 7,
        "operations": ["encrypt"],
        "combiner": "n1",
        "not_before_ms": NOW,
        "expires_ms": NOW + 10_000,
        "nonce": NONCE,
        **changes,
    }
    key = signing(client) if isinstance(client, str) else client
    return sign_envelope(kind, NOW, msgspec.msgpack.encode(list(fields.values())), key)


def check(raw: bytes, combiner: str = "n1", record: KeyRecord = RECORD, now: int = NOW) -> None:
    check_grant(raw, record, combiner, CLUSTER, now)


def test_what_is_issued_is_good() -> None:
    raw = issue_grant(signing("alice"), RECORD, "encrypt", "n1", NOW, 10_000, NONCE)
    told, signed = check_grant(raw, RECORD, "n1", CLUSTER, NOW)
    assert (told.key_id, told.version, told.epoch, told.operations) == (b"k" * 16, 3, 7, ["encrypt"])
    assert (told.combiner, told.expires_ms - told.not_before_ms, told.nonce) == ("n1", 10_000, NONCE)
    assert signed.issuer == "alice"
    assert raw == grant()


@pytest.mark.parametrize("lifetime_ms", [0, -1, GRANT_LIFETIME_MAX_MS + 1])
def test_no_grant_is_issued_for_too_long_or_no_time(lifetime_ms: int) -> None:
    with pytest.raises(ValueError, match=str(lifetime_ms)):
        issue_grant(signing("alice"), RECORD, "encrypt", "n1", NOW, lifetime_ms, NONCE)
    for good in (1, GRANT_LIFETIME_MAX_MS):
        check(issue_grant(signing("alice"), RECORD, "encrypt", "n1", NOW, good, NONCE))


@pytest.mark.parametrize(
    ("raw", "error", "match"),
    [
        (grant("bob"), AccessDenied, "'bob' may not encrypt with the key 'k'"),
        (grant("n1"), ManifestError, "'n1' may not sign this"),
        (grant("bal"), ManifestError, "'bal' may not sign this"),
        (grant("op"), ManifestError, "'op' may not sign this"),
        (grant("stranger"), ManifestError, "'stranger' may not sign this"),
        (grant(SigningKey("alice", signing("bob")._private)), ManifestError, "is wrong"),
        (grant(kind="order.create"), ManifestError, "came where a 'grant' was expected"),
        (grant(key_id=b"x" * 16), StaleKey, "for another key"),
        (grant(version=2), StaleKey, "version 2 epoch 7"),
        (grant(version=4), StaleKey, "version 4 epoch 7"),
        (grant(epoch=6), StaleKey, "version 3 epoch 6"),
        (grant(epoch=8), StaleKey, "version 3 epoch 8"),
        (grant(combiner="n2"), AccessDenied, "is for the combiner 'n2', 'n1' asks"),
        (grant(operations=["sign"]), AccessDenied, "may not sign"),
        (grant(operations=["encrypt", "sign"]), AccessDenied, "may not sign"),
        (grant(operations=["*"]), AccessDenied, "may not"),
        (grant(operations=["generate"]), AccessDenied, "may not generate"),
        (grant(operations=[]), ProtocolError, "grant"),
        (grant(operations=["encrypt"] * 9), ProtocolError, "grant"),
        (grant(nonce=bytes(15)), ProtocolError, "grant"),
        (grant(more=1), ProtocolError, "grant"),
        (grant(expires_ms=NOW + GRANT_LIFETIME_MAX_MS + 1), ManifestError, "at most 30000"),
        (b"", ProtocolError, "signed envelope"),
    ],
)
def test_a_grant_that_says_anything_else_is_refused(raw: bytes, error: type[EngineError], match: str) -> None:
    with pytest.raises(error, match=match):
        check(raw)


def test_a_combiner_that_holds_no_share_is_not_eligible() -> None:
    with pytest.raises(AccessDenied, match="'n3' is no eligible combiner"):
        check(grant(combiner="n3"), "n3")
    for name in ("alice", "bal", "stranger"):
        with pytest.raises(AccessDenied, match="no eligible combiner"):
            check(grant(combiner=name), name)


def test_the_key_must_be_the_one_the_policy_names() -> None:
    other = replace(RECORD, manifest=msgspec.structs.replace(MANIFEST, name="other"))
    with pytest.raises(AccessDenied, match="'alice' may not encrypt with the key 'other'"):
        check(grant(), record=other)
    check(grant("bob"), record=other)


@given(st.integers(-100_000, 100_000), st.integers(-100_000, 100_000), st.integers(-100_000, 100_000))
@settings(deadline=None, max_examples=400)
def test_time_against_an_oracle(begins: int, ends: int, now: int) -> None:
    raw = grant(not_before_ms=NOW + begins, expires_ms=NOW + ends)
    good = ends - begins <= GRANT_LIFETIME_MAX_MS and begins - CLOCK_SKEW_MS <= now <= ends + CLOCK_SKEW_MS
    if good:
        check(raw, now=NOW + now)
        return
    with pytest.raises(ManifestError):
        check(raw, now=NOW + now)


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_only_what_the_policy_names_is_granted(operation: str) -> None:
    if operation in ("encrypt", "decrypt"):
        check(grant(operations=[operation]))
        return
    with pytest.raises(AccessDenied):
        check(grant(operations=[operation]))


def test_every_changed_byte_of_a_grant_is_refused() -> None:
    raw = grant()
    for position in range(len(raw)):
        wrong = bytearray(raw)
        wrong[position] ^= 1 << position % 8
        with pytest.raises((ManifestError, ProtocolError, StaleKey, AccessDenied)):
            check(bytes(wrong))
