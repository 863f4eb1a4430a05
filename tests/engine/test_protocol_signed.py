"""The envelope: any change of any byte, any wrong signer and any wrong kind is refused."""

from __future__ import annotations

import hashlib
import threading

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError, ManifestError, ProtocolError
from engine.protocol import signed as signed_module
from engine.protocol.signed import (
    DOMAIN,
    TOGETHER_MAX,
    Pen,
    SigningKey,
    add_signature,
    encode_body,
    read_unverified,
    remember_signatures,
    sign_bodies,
    sign_envelope,
    verify_envelope,
)

L = 2**252 + 27742317777372353535851937790883648493  # the order of Ed25519's group (RFC 8032, 5.1)


def signing(name: str) -> SigningKey:
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


ALICE, BOB, CAROL = signing("alice"), signing("bob"), signing("carol")
KEYS = {key.name: key.public for key in (ALICE, BOB, CAROL)}


def test_what_was_signed_is_what_is_read() -> None:
    raw = sign_envelope("order", 7, b"payload", ALICE, BOB)
    signed = verify_envelope(raw, "order", KEYS, threshold=2)
    assert (signed.kind, signed.issuer, signed.serial, signed.payload) == ("order", "alice", 7, b"payload")
    assert signed.signers == ("alice", "bob")
    assert signed.raw == raw
    body, _ = msgspec.msgpack.decode(raw)
    assert signed.digest == hashlib.sha256(body).digest()


def test_the_signature_is_plain_ed25519_over_label_and_body() -> None:
    body, signatures = msgspec.msgpack.decode(sign_envelope("order", 7, b"payload", ALICE))
    [[signer, value]] = signatures
    assert signer == "alice"
    Ed25519PublicKey.from_public_bytes(ALICE.public).verify(value, b"keyquorum/signed/1\0" + body)
    assert DOMAIN == b"keyquorum/signed/1\0"


@given(st.binary(max_size=60), st.integers(0, 2**63 - 1), st.integers(1, 3), st.data())
@settings(deadline=None, max_examples=30)
def test_every_single_byte_change_is_refused(payload: bytes, serial: int, signers: int, data: st.DataObject) -> None:
    raw = sign_envelope("order", serial, payload, *(ALICE, BOB, CAROL)[:signers])
    verify_envelope(raw, "order", KEYS, threshold=signers)
    flip = data.draw(st.integers(1, 255))
    for position in range(len(raw)):
        wrong = bytearray(raw)
        wrong[position] ^= flip
        with pytest.raises((ManifestError, ProtocolError)):
            verify_envelope(bytes(wrong), "order", KEYS, threshold=signers)


def test_every_value_of_every_byte_of_one_envelope_is_refused() -> None:
    raw = sign_envelope("order", 1, b"p", ALICE)
    for position in range(len(raw)):
        for value in range(256):
            if value == raw[position]:
                continue
            with pytest.raises((ManifestError, ProtocolError)):
                verify_envelope(raw[:position] + bytes([value]) + raw[position + 1 :], "order", KEYS)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes_raise_nothing_but_our_errors(data: bytes) -> None:
    with pytest.raises(EngineError):
        verify_envelope(data, "order", KEYS)
    with pytest.raises(EngineError):
        read_unverified(data)


@given(st.binary(min_size=1, max_size=9))
@settings(deadline=None)
def test_trailing_data_is_refused_outside_and_inside(extra: bytes) -> None:
    raw = sign_envelope("order", 1, b"p", ALICE)
    with pytest.raises(ProtocolError):
        verify_envelope(raw + extra, "order", KEYS)
    body, _ = msgspec.msgpack.decode(raw)
    inside = msgspec.msgpack.encode([body + extra, [["alice", ALICE.sign(body + extra)]]])
    with pytest.raises(ProtocolError):
        verify_envelope(inside, "order", KEYS)


def rebuilt(body: object, signatures: object) -> bytes:
    return msgspec.msgpack.encode([body, signatures])


def test_a_body_that_is_not_canonical_is_refused_though_it_is_signed() -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    assert body[:2] == b"\x95\x01"
    longer = b"\x95\xcc\x01" + body[2:]
    with pytest.raises(ProtocolError, match="not in canonical form"):
        verify_envelope(rebuilt(longer, [["alice", ALICE.sign(longer)]]), "order", KEYS)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_format_is_refused_though_it_is_signed(version: int) -> None:
    body = msgspec.msgpack.encode([version, "order", "alice", 1, b"p"])
    with pytest.raises(ProtocolError):
        verify_envelope(rebuilt(body, [["alice", ALICE.sign(body)]]), "order", KEYS)


def test_a_signature_without_the_label_is_refused() -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    bare = ALICE._private.sign(body)
    with pytest.raises(ManifestError, match="signature of 'alice' is wrong"):
        verify_envelope(rebuilt(body, [["alice", bare]]), "order", KEYS)


def test_another_kind_is_refused() -> None:
    raw = sign_envelope("grant", 1, b"p", ALICE)
    with pytest.raises(ManifestError, match="a signed 'grant' came where a 'order' was expected"):
        verify_envelope(raw, "order", KEYS)


def test_an_unknown_signer_refuses_the_whole_envelope() -> None:
    raw = sign_envelope("order", 1, b"p", ALICE, signing("mallory"))
    with pytest.raises(ManifestError, match="'mallory' may not sign this"):
        verify_envelope(raw, "order", KEYS)


def test_one_wrong_signature_among_enough_right_ones_refuses_it() -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    signatures = [["alice", ALICE.sign(body)], ["bob", BOB.sign(body)], ["carol", bytes(64)]]
    with pytest.raises(ManifestError, match="signature of 'carol' is wrong"):
        verify_envelope(rebuilt(body, signatures), "order", KEYS, threshold=2)


def test_too_few_signatures_are_refused() -> None:
    raw = sign_envelope("order", 1, b"p", ALICE, BOB)
    with pytest.raises(ManifestError, match="2 of 3 signatures needed"):
        verify_envelope(raw, "order", KEYS, threshold=3)


def test_one_signer_does_not_count_twice() -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    twice = [["alice", ALICE.sign(body)], ["alice", ALICE.sign(body)]]
    with pytest.raises(ProtocolError, match="a signer appears twice"):
        verify_envelope(rebuilt(body, twice), "order", KEYS, threshold=2)


def test_one_key_under_two_names_is_two_signers_only_if_the_table_says_so() -> None:
    """Whoever makes the table keeps a key from having two names; the manifest does (see its tests)."""
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    raw = rebuilt(body, [["alice", ALICE.sign(body)], ["bob", ALICE.sign(body)]])
    with pytest.raises(ManifestError, match="signature of 'bob' is wrong"):
        verify_envelope(raw, "order", KEYS, threshold=2)


def test_no_signature_at_all_is_refused() -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    with pytest.raises(ProtocolError):
        verify_envelope(rebuilt(body, []), "order", KEYS, threshold=0)


def test_the_issuer_must_have_signed_unless_told_otherwise() -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    raw = rebuilt(body, [["bob", BOB.sign(body)]])
    with pytest.raises(ManifestError, match="issuer 'alice' did not sign"):
        verify_envelope(raw, "order", KEYS)
    assert verify_envelope(raw, "order", KEYS, issuer_signs=False).issuer == "alice"


def test_another_s_of_the_same_signature_is_refused() -> None:
    """Ed25519 signatures are malleable unless S is below the group's order (RFC 8032, 5.1.7)."""
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    value = ALICE.sign(body)
    other = value[:32] + (int.from_bytes(value[32:], "little") + L).to_bytes(32, "little")
    with pytest.raises(ManifestError, match="wrong"):
        verify_envelope(rebuilt(body, [["alice", other]]), "order", KEYS)


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32])
def test_a_public_key_that_is_no_key_verifies_nothing(public: bytes) -> None:
    raw = sign_envelope("order", 1, b"p", ALICE)
    with pytest.raises(ManifestError):
        verify_envelope(raw, "order", {"alice": public})


def test_keys_may_come_from_a_function() -> None:
    raw = sign_envelope("order", 1, b"p", ALICE)
    assert verify_envelope(raw, "order", lambda name: KEYS.get(name)).issuer == "alice"
    with pytest.raises(ManifestError):
        verify_envelope(raw, "order", lambda name: None)


def test_a_signature_is_added_and_replaced() -> None:
    raw = sign_envelope("order", 1, b"p", ALICE)
    two = add_signature(raw, BOB)
    assert verify_envelope(two, "order", KEYS, threshold=2).signers == ("alice", "bob")
    assert add_signature(two, BOB) == two
    assert read_unverified(two).digest == read_unverified(raw).digest
    with pytest.raises(ProtocolError):
        add_signature(raw + b"\0", BOB)


def test_a_payload_of_one_kind_can_not_be_moved_into_another() -> None:
    """The kind is inside what is signed."""
    body, signatures = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    moved = body.replace(b"\xa5order", b"\xa5grant")
    assert moved != body
    with pytest.raises(ManifestError, match="wrong"):
        verify_envelope(rebuilt(moved, signatures), "grant", KEYS)


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "a\n"])
def test_a_signer_whose_name_is_none_is_refused(name: str) -> None:
    body, _ = msgspec.msgpack.decode(sign_envelope("order", 1, b"p", ALICE))
    with pytest.raises(ProtocolError):
        verify_envelope(rebuilt(body, [[name, ALICE.sign(body)]]), "order", {name: ALICE.public})


def test_a_key_does_not_show_itself() -> None:
    private = ALICE._private.private_bytes_raw()
    assert repr(ALICE) == "SigningKey('alice')"
    assert private.hex() not in repr(ALICE)


# --- many documents with one signature ---


def bodies(count: int) -> list[bytes]:
    return [encode_body("order", number, b"payload %d" % number, "alice") for number in range(count)]


@pytest.mark.parametrize("count", [*range(1, 18), 31, 32, 33, TOGETHER_MAX, TOGETHER_MAX + 1, 2 * TOGETHER_MAX + 3])
def test_documents_that_are_signed_together_stand_alone(count: int) -> None:
    made = sign_bodies(bodies(count), ALICE)
    assert len(made) == count
    for number, raw in enumerate(made):
        signed = verify_envelope(raw, "order", KEYS)
        assert (signed.serial, signed.payload) == (number, b"payload %d" % number)
        assert signed.digest == hashlib.sha256(bodies(count)[number]).digest()
    with pytest.raises(ManifestError, match="may not sign"):
        verify_envelope(made[0], "order", {"bob": BOB.public})
    with pytest.raises(ManifestError, match="is wrong"):
        verify_envelope(made[-1], "order", {"alice": BOB.public})


def test_the_signature_of_many_is_ed25519_over_the_root_of_a_tree() -> None:
    """As docs/protocol.md has it, in other words."""
    raws = bodies(3)

    def hashed(label: bytes, *parts: bytes) -> bytes:
        return hashlib.sha256(b"keyquorum/signed-" + label + b"/1\0" + b"".join(parts)).digest()

    leaves = [hashed(b"leaf", raw) for raw in raws]
    left, right = hashed(b"fork", *leaves[:2]), hashed(b"fork", leaves[2], bytes(32))
    root = hashed(b"fork", left, right)
    ways = [leaves[1] + right, leaves[0] + right, bytes(32) + left]
    for place, (raw, made) in enumerate(zip(raws, sign_bodies(raws, ALICE), strict=True)):
        body, [[signer, value]] = msgspec.msgpack.decode(made)
        assert (body, signer, value[64:]) == (raw, "alice", bytes([place]) + ways[place])
        Ed25519PublicKey.from_public_bytes(ALICE.public).verify(value[:64], b"keyquorum/signed-tree/1\0" + root)


@given(st.integers(2, 40), st.data())
@settings(deadline=None, max_examples=30)
def test_every_single_byte_change_of_one_of_many_is_refused(count: int, data: st.DataObject) -> None:
    raw = sign_bodies(bodies(count), ALICE)[data.draw(st.integers(0, count - 1))]
    verify_envelope(raw, "order", KEYS)
    flip = data.draw(st.integers(1, 255))
    for position in range(len(raw)):
        wrong = bytearray(raw)
        wrong[position] ^= flip
        with pytest.raises(EngineError):
            verify_envelope(bytes(wrong), "order", KEYS)


def test_a_way_that_leads_to_no_root_is_refused() -> None:
    """Another document, another place, a way that is cut, longer, or no whole number of hashes, and none at all."""
    raws = bodies(8)
    first, second = (msgspec.msgpack.decode(made) for made in sign_bodies(raws, ALICE)[:2])
    value = first[1][0][1]
    root = value[:64] + b"\0"
    for body, wrong in (
        (second[0], value),
        (first[0], second[1][0][1]),
        (first[0], value[:64] + b"\x08" + value[65:]),
        (first[0], value[:-32]),
        (first[0], value + bytes(32)),
        (first[0], value[:-1]),
        (first[0], root),
        (first[0], value[:64]),
    ):
        with pytest.raises(EngineError):
            verify_envelope(msgspec.msgpack.encode([body, [["alice", wrong]]]), "order", KEYS)


def test_no_part_of_a_tree_passes_for_another() -> None:
    """A fork is no leaf, a root no document, and a document's own signature none of a tree of which it is the root."""
    raws = bodies(4)
    [body, [[_, value]]] = msgspec.msgpack.decode(sign_bodies(raws, ALICE)[0])
    leaves = [hashlib.sha256(b"keyquorum/signed-leaf/1\0" + raw).digest() for raw in raws]
    fork = leaves[0] + leaves[1]
    plain = ALICE.sign(hashlib.sha256(b"keyquorum/signed-leaf/1\0" + body).digest())
    for told, wrong in ((fork, value[:64] + b"\0" + value[97:]), (body, plain + value[64:])):
        with pytest.raises(EngineError):
            verify_envelope(msgspec.msgpack.encode([told, [["alice", wrong]]]), "order", KEYS)


def test_one_check_is_enough_for_all_that_were_signed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature of many is checked once by who remembers, and each document's way each time."""
    made = sign_bodies(bodies(32), ALICE)
    checked: list[bytes] = []
    real = signed_module._verify
    monkeypatch.setattr(signed_module, "_verify", lambda *told: checked.append(told[1]) or real(*told))
    remember_signatures(signed_module.RecentSignatures())
    try:
        for raw in made:
            verify_envelope(raw, "order", KEYS)
        assert len(checked) == 1
        [body, [[_, value]]] = msgspec.msgpack.decode(made[3])
        wrong = msgspec.msgpack.encode([body, [["alice", value[:-1] + bytes([value[-1] ^ 1])]]])
        with pytest.raises(ManifestError, match="is wrong"):
            verify_envelope(wrong, "order", KEYS)
        # What is remembered of a tree's root says nothing of a document that is signed alone.
        alone = msgspec.msgpack.encode([body, [["alice", value[:64]]]])
        with pytest.raises(ManifestError, match="is wrong"):
            verify_envelope(alone, "order", KEYS)
    finally:
        remember_signatures(None)


def test_a_pen_signs_later_for_the_thread_that_says_so() -> None:
    pen = Pen(ALICE)
    with pen.later():
        body = sign_envelope("order", 7, b"payload", pen)
        elsewhere: list[bytes] = []
        thread = threading.Thread(target=lambda: elsewhere.append(sign_envelope("order", 7, b"payload", pen)))
        thread.start()
        thread.join()
    assert body == encode_body("order", 7, b"payload", "alice")
    assert elsewhere == [sign_envelope("order", 7, b"payload", pen)] == sign_bodies([body], pen)
    verify_envelope(elsewhere[0], "order", KEYS)
