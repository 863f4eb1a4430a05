"""Shares, seals, grants, signed documents and frames, changed in every way that can be thought of: none is accepted.

Each test changes valid things some ten thousand times in the suite and a million times in all under ``make assurance``.
What is changed is accepted as it was, before and after (so that a refusal means something), and every kind of change
must have happened.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest.mock import MagicMock

import cryptography.exceptions
import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine.errors import EngineError, InvalidTag, ShareCorrupt
from engine.protocol.grant import check_grant
from engine.protocol.manifest import (
    open_abort,
    open_certificate,
    open_create_order,
    open_destroy_order,
    open_key_manifest,
    open_receipt,
)
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, SHARE_RELEASE, ReleasedShare, ShareRelease
from engine.protocol.wire import PROTOCOL_VERSION, Load, Reply, Request, reply_codec, request_codec
from engine.sharing import SecretBuffer, Share, commitment
from nodes.gather import Gathering
from nodes.store import seal_context, seal_share, unseal_share
from nodes.token import Lane

SEED = 4
BYTE_KINDS = ("bit", "bits", "byte", "cut", "longer", "shorter inside", "doubled", "zeros")
long = pytest.mark.long
HOLDERS = ("node1", "node2", "node3", "node4", "node5")
_pack, _unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


@dataclass
class Tally:
    """What was changed, by kind. ``take`` refuses a change that changes nothing."""

    kinds: Counter[str]

    @property
    def total(self) -> int:
        return self.kinds.total()

    def check(self, expected: int, kinds: Sequence[str]) -> None:
        assert self.total >= expected
        assert not [kind for kind in kinds if not self.kinds[kind]], self.kinds


def changed_bytes(r: Random, data: bytes, kind: str) -> bytes:
    """``data`` changed in one of ``BYTE_KINDS``."""
    out = bytearray(data)
    at = r.randrange(len(out))
    if kind == "bit":
        out[at] ^= 1 << r.randrange(8)
    elif kind == "bits":
        for _ in range(r.randrange(2, 9)):
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    elif kind == "byte":
        out[at] = r.choice((0x00, 0xFF, 0x7F, 0x80, r.randrange(256)))
    elif kind == "cut":
        del out[at:]
    elif kind == "longer":
        out += r.randbytes(r.randrange(1, 40))
    elif kind == "shorter inside":
        del out[at : at + r.randrange(1, 9)]
    elif kind == "doubled":
        out += bytes(out)
    elif kind == "zeros":
        end = min(len(out), at + r.randrange(1, 33))
        out[at:end] = bytes(end - at)
    return bytes(out)


Item = tuple[int, bytes, bytes]
"""x, value and salt of a share."""


def _refused(call: Callable[[], Any]) -> bool:
    """Whether it is refused, by one of the project's own errors; whatever else is raised fails the test."""
    try:
        call()
    except EngineError:
        return True
    return False


# --- shares ---


def share_kinds() -> tuple[str, ...]:
    return (
        *(f"value {kind}" for kind in BYTE_KINDS),
        *(f"salt {kind}" for kind in ("bit", "bits", "byte", "zeros")),
        "x",
        "another holder's",
        "another holder's value",
        "another holder's salt",
        "another key's",
        "another epoch",
        "another version",
        "salt and value swapped",
    )


def _changed_share(
    r: Random,
    kind: str,
    mine: tuple[int, bytes, bytes],
    other: tuple[int, bytes, bytes],
    foreign: tuple[int, bytes, bytes],
) -> tuple[int, bytes, bytes]:
    x, y, salt = mine
    what, _, how = kind.partition(" ")
    if what == "value":
        return x, changed_bytes(r, y, how), salt
    if what == "salt" and how in BYTE_KINDS:
        return x, y, changed_bytes(r, salt, how)
    if kind == "x":
        return r.randrange(1, 256), y, salt
    if kind == "another holder's":
        return other[0], other[1], other[2]
    if kind == "another holder's value":
        return x, other[1], salt
    if kind == "another holder's salt":
        return x, y, other[2]
    if kind == "another key's":
        return foreign
    if kind == "salt and value swapped":
        return x, salt + y[32:], y[:32]
    return mine  # another epoch or version: the context changes


def shares_against_commitments(world: Any, count: int) -> Tally:
    """A commitment binds x, value, salt, key, version and epoch."""
    r = Random(SEED)
    one, two = world.deal(holders=HOLDERS, threshold=3), world.deal("other", holders=HOLDERS, threshold=3)
    tally = Tally(Counter())
    context = one.manifest.context
    places = {holder.node: holder for holder in one.manifest.holders}
    items = {name: (each.x, each.y, each.salt) for name, each in one.offers.items()}
    foreign = {name: (each.x, each.y, each.salt) for name, each in two.offers.items()}

    def good(x: int, y: bytes, salt: bytes, of: bytes, node: str) -> bool:
        return bool(y) and x == places[node].x and commitment(salt, of, Share(x, y)) == places[node].commitment

    assert all(good(*items[name], context, name) for name in HOLDERS)
    kinds = share_kinds()
    while tally.total < count:
        kind = kinds[tally.total % len(kinds)] if tally.total < len(kinds) * 4 else r.choice(kinds)
        name, neighbour = r.sample(HOLDERS, 2)
        changed = _changed_share(r, kind, items[name], items[neighbour], foreign[name])
        of = context
        if kind in ("another epoch", "another version"):
            place = -1 if kind == "another epoch" else -5
            of = bytearray(context)  # type: ignore[assignment]
            of[place] ^= r.randrange(1, 256)  # type: ignore[index]
            of = bytes(of)
        if changed == items[name] and of == context:
            continue
        assert not good(*changed, of, name), (kind, changed)
        tally.kinds[kind] += 1
    assert all(good(*items[name], context, name) for name in HOLDERS)
    tally.check(count, kinds)
    return tally


def shares_through_a_gathering(world: Any, count: int) -> Tally:
    """A gathering names the one whose share was changed, asks another in its place, and has the right key."""
    r = Random(SEED + 1)
    one, two = world.deal(holders=HOLDERS, threshold=3), world.deal("other", holders=HOLDERS, threshold=3)
    tally = Tally(Counter())
    items = {name: (each.x, each.y, each.salt) for name, each in one.offers.items()}
    foreign = {name: (each.x, each.y, each.salt) for name, each in two.offers.items()}
    kinds = tuple(kind for kind in share_kinds() if kind not in ("another epoch", "another version"))
    while tally.total < count:
        kind = kinds[tally.total % len(kinds)] if tally.total < len(kinds) * 4 else r.choice(kinds)
        liar, neighbour = r.sample(HOLDERS, 2)
        changed = _changed_share(r, kind, items[liar], items[neighbour], foreign[liar])
        if changed == items[liar] or not changed[1]:
            continue
        order = [liar, *r.sample([name for name in HOLDERS if name != liar], 4)]
        gathering = Gathering(one.manifest, order)
        asked = gathering.to_ask(0.0)
        assert asked[0] == liar
        x, y, salt = changed
        gathering.arrived(liar, Share(x, y), salt)
        assert gathering.corrupt == (liar,), kind
        assert not gathering.shares
        replaced = gathering.to_ask(0.0)
        assert len(replaced) == 1
        for name in (*asked[1:], *replaced):
            x, y, salt = items[name]
            gathering.arrived(name, Share(x, y), salt)  # the control: the others' are taken
        assert gathering.complete
        assert gathering.corrupt == (liar,)
        if tally.total % 50 == 0:
            with gathering.solve() as secret:
                assert bytes(secret)[: len(one.key)] == one.key
        tally.kinds[kind] += 1
    tally.check(count, kinds)
    return tally


# --- seals ---


class PycaLane:
    """A KEK outside of a token, for the great number; the same AES-GCM, by pyca/cryptography."""

    def __init__(self) -> None:
        self._kek = AESGCM(os.urandom(32))

    def seal(self, plaintext: bytes, associated_data: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._kek.encrypt(nonce, plaintext, associated_data)

    def unseal_secret(self, sealed: bytes, associated_data: bytes) -> SecretBuffer:
        try:
            return SecretBuffer.copy_of(self._kek.decrypt(sealed[:12], sealed[12:], associated_data))
        except (cryptography.exceptions.InvalidTag, ValueError):
            raise InvalidTag("it does not open") from None


SEAL_KINDS = (
    *BYTE_KINDS,
    "another holder's",
    "another key's",
    "nonce of another",
    "tag of another",
    "context: node",
    "context: x",
    "context: manifest",
    "context: key",
    "context: bytes",
    "another KEK",
)


def seals(world: Any, lane: Any, count: int) -> Tally:
    """A sealed share opens at its own node, for its own key, x and manifest, under its own KEK alone."""
    r = Random(SEED + 2)
    one, two = world.deal(holders=HOLDERS, threshold=3), world.deal("other", holders=HOLDERS, threshold=3)
    tally = Tally(Counter())

    def context(dealt: Any, name: str, x: int, digest: bytes = b"") -> bytes:
        return seal_context(dealt.manifest, x, name, digest or dealt.record.digest)

    def sealed(dealt: Any, name: str, by: Any = lane) -> bytes:
        offer = dealt.offers[name]
        return seal_share(by, Share(offer.x, offer.y), offer.salt, context(dealt, name, offer.x))

    blobs = {name: sealed(one, name) for name in HOLDERS}
    foreign = {name: sealed(two, name) for name in HOLDERS}
    stolen = {name: sealed(one, name, PycaLane()) for name in HOLDERS}

    def opens_as_it_is() -> None:
        for name in HOLDERS:
            offer = one.offers[name]
            given = unseal_share(lane, blobs[name], offer.x, context(one, name, offer.x))
            assert given == (Share(offer.x, offer.y), offer.salt)

    opens_as_it_is()
    while tally.total < count:
        kind = SEAL_KINDS[tally.total % len(SEAL_KINDS)] if tally.total < 80 else r.choice(SEAL_KINDS)
        name, other = r.sample(HOLDERS, 2)
        x = one.offers[name].x
        blob, of = blobs[name], context(one, name, x)
        if kind in BYTE_KINDS:
            blob = changed_bytes(r, blob, kind)
        elif kind == "another holder's":
            blob = blobs[other]
        elif kind == "another key's":
            blob = foreign[name]
        elif kind == "nonce of another":
            blob = blobs[other][:12] + blob[12:]
        elif kind == "tag of another":
            blob = blob[:-16] + blobs[other][-16:]
        elif kind == "another KEK":
            blob = stolen[name]
        elif kind == "context: node":
            of = context(one, other, x)
        elif kind == "context: x":
            of = context(one, name, (x + r.randrange(1, 255)) % 256)
        elif kind == "context: manifest":
            of = context(one, name, x, r.randbytes(32))
        elif kind == "context: key":
            of = context(two, name, x)
        else:
            of = changed_bytes(r, of, r.choice(BYTE_KINDS))
        if (blob, of) == (blobs[name], context(one, name, x)):
            continue
        assert _refused(lambda blob=blob, of=of, x=x: unseal_share(lane, blob, x, of)), kind
        tally.kinds[kind] += 1
    opens_as_it_is()
    tally.check(count, SEAL_KINDS)
    return tally


# --- signed documents ---

DOCUMENT_KINDS = (
    *BYTE_KINDS,
    "signature of another",
    "signature bytes",
    "signer",
    "unsigned",
    "signed twice",
    "body of another",
    "field of another",
    "payload field of another",
    "payload bytes",
    "kind",
    "type",
    "payload type",
    "another document",
)


def _confused(r: Random, value: Any) -> Any:
    """The same thing as another type."""
    ways: list[Any] = [None, True, -1, 2**63, 1.5, [], {}, [value], str(value)[:60], b"\x00", {"a": value}]
    return r.choice([way for way in ways if type(way) is not type(value)])


def _changed_document(r: Random, kind: str, raw: bytes, other: bytes) -> bytes:
    """A signed document changed inside, the signature as it was."""
    if kind in BYTE_KINDS:
        return changed_bytes(r, raw, kind)
    if kind == "another document":
        return other
    body, signatures = _unpack(raw)
    other_body, other_signatures = _unpack(other)
    if kind == "signature of another":
        signatures[0][1] = other_signatures[0][1]
    elif kind == "signature bytes":
        signatures[0][1] = changed_bytes(r, signatures[0][1], r.choice(("bit", "bits", "zeros")))
    elif kind == "signer":
        signatures[0][0] = r.choice(("bob", "carol", "node2", "node5", "op", "nobody", ""))
    elif kind == "unsigned":
        signatures = []
    elif kind == "signed twice":
        signatures = signatures * 2
    elif kind == "body of another":
        body = other_body
    else:
        fields, theirs = _unpack(body), _unpack(other_body)
        at = r.randrange(len(fields))
        if kind == "field of another":
            fields[at] = theirs[at]
        elif kind == "kind":
            fields[1] = r.choice(
                ("grant", "receipt", "certificate", "abort", "key", "order.create", "order.destroy", "x")
            )
        elif kind == "type":
            fields[at] = _confused(r, fields[at])
        else:
            payload, their_payload = _unpack(fields[4]), _unpack(theirs[4])
            at = r.randrange(min(len(payload), len(their_payload)))
            if kind == "payload field of another":
                payload[at] = their_payload[at]
            elif kind == "payload type":
                payload[at] = _confused(r, payload[at])
            fields[4] = _pack(payload)
            if kind == "payload bytes":
                fields[4] = changed_bytes(r, fields[4], r.choice(BYTE_KINDS))
        body = _pack(fields)
    return _pack([body, signatures])


def _documents(cases: Sequence[tuple[bytes, bytes, Callable[[bytes], Any]]], count: int, seed: int) -> Tally:
    """Each case is a document, another of the same kind, and what opens the first and not the second."""
    r = Random(seed)
    tally = Tally(Counter())
    for raw, _, accept in cases:
        accept(raw)
    while tally.total < count:
        kind = DOCUMENT_KINDS[tally.total % len(DOCUMENT_KINDS)] if tally.total < 100 else r.choice(DOCUMENT_KINDS)
        raw, other, accept = r.choice(cases)
        changed = _changed_document(r, kind, raw, other)
        if changed == raw:
            continue
        assert _refused(lambda accept=accept, changed=changed: accept(changed)), (kind, changed.hex())
        tally.kinds[kind] += 1
    for raw, _, accept in cases:
        accept(raw)
    tally.check(count, DOCUMENT_KINDS)
    return tally


def grants(world: Any, count: int) -> Tally:
    """A grant is good for its key, combiner, operations and time, by its client's signature over all of it."""
    one, two = world.deal(holders=HOLDERS), world.deal("other", holders=HOLDERS)
    cases = []
    for combiner, operation in (("node1", "encrypt"), ("node2", "decrypt"), ("node3", "encrypt")):
        raw = world.grant(one, combiner, operation)
        other = world.grant(
            two, "node4", "mac", client="bob", expires_ms=world.now_ms + 9_000, not_before_ms=world.now_ms
        )
        cases.append(
            (raw, other, lambda each, at=combiner: check_grant(each, one.record, at, world.cluster, world.now_ms))
        )
    return _documents(cases, count, SEED + 3)


def other_documents(world: Any, count: int) -> Tally:
    """Orders, manifests, receipts, certificates, abort notices."""
    one, two = world.deal(holders=HOLDERS), world.deal("other", holders=HOLDERS)
    cluster, now_ms = world.cluster, world.now_ms

    def same(opened: Any, expected: Any) -> None:
        if opened != expected:  # valid, but another's: the caller compares
            raise ShareCorrupt("another document")

    def receipt(raw: bytes) -> None:
        same(open_receipt(raw, one.record, cluster), "node1")

    def manifest(raw: bytes) -> None:
        same(open_key_manifest(raw, cluster, now_ms).manifest.key_id, one.key_id)

    def order(raw: bytes) -> None:
        same(open_create_order(raw, cluster, now_ms)[0].key_id, one.key_id)

    def end(raw: bytes) -> None:
        same(open_destroy_order(raw, cluster, now_ms)[0].key_id, one.key_id)

    def abort(raw: bytes) -> None:
        same(open_abort(raw, cluster).key_id, one.key_id)

    return _documents(
        [
            (world.receipt(one, "node1"), world.receipt(two, "node2"), receipt),
            (world.certificate(one), world.certificate(two), lambda raw: open_certificate(raw, one.record, cluster)),
            (one.record.raw, two.record.raw, manifest),
            (one.order, two.order, order),
            (world.destroy_order(one.key_id, "orders"), world.destroy_order(two.key_id, "other"), end),
            (world.abort(one.key_id, 1), world.abort(two.key_id, 2), abort),
        ],
        count,
        SEED + 4,
    )


# --- frames ---

FRAME_KINDS = (*BYTE_KINDS, "field type", "body type", "body field of another")


def _changed_frame(r: Random, kind: str, raw: bytes, other: bytes, body_at: int) -> bytes:
    if kind in BYTE_KINDS:
        return changed_bytes(r, raw, kind)
    fields, theirs = _unpack(raw), _unpack(other)
    if kind == "field type":
        at = r.randrange(len(fields))
        fields[at] = _confused(r, fields[at])
        return _pack(fields)
    body, their_body = _unpack(fields[body_at]), _unpack(theirs[body_at])
    at = r.randrange(len(body))
    body[at] = _confused(r, body[at]) if kind == "body type" else their_body[at]
    fields[body_at] = _pack(body)
    return _pack(fields)


def frames(world: Any, count: int) -> Tally:
    """Requests for a share and the replies, as bytes on a connection whose CURVE did not notice the change.

    What is left of them is refused, or says the same: another request id or timeout changes nothing that was granted.
    """
    r = Random(SEED + 5)
    one, two = world.deal(holders=HOLDERS), world.deal("other", holders=HOLDERS)
    tally = Tally(Counter())
    certificate = world.certificate(one)

    def request(dealt: Any) -> bytes:
        body = ShareRelease(dealt.key_id, world.grant(dealt, "node1"), certificate)
        encoded = REQUEST_CODECS[SHARE_RELEASE].encode(body)
        return request_codec.encode(Request(PROTOCOL_VERSION, 7, SHARE_RELEASE, 500, encoded, {}))

    def reply(dealt: Any, name: str) -> bytes:
        offer = dealt.offers[name]
        encoded = REPLY_CODECS[SHARE_RELEASE].encode(ReleasedShare(offer.x, offer.y, offer.salt))
        return reply_codec.encode(Reply(PROTOCOL_VERSION, 7, 0, encoded, Load(0, 1, False), {}))

    def released(raw: bytes) -> None:
        asked = request_codec.decode(raw)
        if asked.verb != SHARE_RELEASE:
            raise ShareCorrupt("another verb")
        body = REQUEST_CODECS[SHARE_RELEASE].decode(asked.body)
        if body.key_id != one.key_id:
            raise ShareCorrupt("another key")
        if body.certificate != certificate:
            open_certificate(body.certificate, one.record, world.cluster)
        check_grant(body.grant, one.record, "node1", world.cluster, world.now_ms)

    def arrived(raw: bytes) -> None:
        told = reply_codec.decode(raw)
        if told.status:
            raise ShareCorrupt("no share")
        body = REPLY_CODECS[SHARE_RELEASE].decode(told.body)
        gathering = Gathering(one.manifest, ["node2"])
        gathering.to_ask(0.0)
        gathering.arrived("node2", Share(body.x, body.y), body.salt)
        if gathering.corrupt:
            assert gathering.corrupt == ("node2",)
            raise ShareCorrupt("it is named", gathering.corrupt)

    def told(codec: Any, bodies: Any, raw: bytes) -> Any:
        """What was granted or given: the body, and for a request its verb."""
        frame = codec.decode(raw)
        return bodies[SHARE_RELEASE].decode(frame.body), getattr(frame, "verb", "")

    cases = [
        (request(one), request(two), released, 4, request_codec, REQUEST_CODECS),
        (reply(one, "node2"), reply(two, "node3"), arrived, 3, reply_codec, REPLY_CODECS),
    ]
    said_the_same = 0
    for raw, _, accept, *_ in cases:
        accept(raw)
    while tally.total < count:
        kind = FRAME_KINDS[tally.total % len(FRAME_KINDS)] if tally.total < 80 else r.choice(FRAME_KINDS)
        raw, other, accept, body_at, codec, bodies = r.choice(cases)
        changed = _changed_frame(r, kind, raw, other, body_at)
        if changed == raw:
            continue
        if not _refused(lambda accept=accept, changed=changed: accept(changed)):
            assert told(codec, bodies, changed) == told(codec, bodies, raw), (kind, changed.hex())
            said_the_same += 1
            continue
        tally.kinds[kind] += 1
    assert said_the_same < count
    for raw, _, accept, *_ in cases:
        accept(raw)
    tally.check(count, FRAME_KINDS)
    return tally


# --- the tests ---

SUITE = {
    shares_against_commitments: 50_000,
    shares_through_a_gathering: 15_000,
    grants: 12_000,
    other_documents: 5_000,
    frames: 8_000,
}


@pytest.mark.parametrize("what", SUITE, ids=lambda what: what.__name__)
def test_no_changed_thing_is_accepted(what: Callable[[Any, int], Tally], world: Any) -> None:
    what(world, SUITE[what])


def test_no_changed_seal_is_opened(world: Any) -> None:
    seals(world, PycaLane(), 10_000)


def test_no_changed_seal_is_opened_by_the_token(world: Any, lane: Lane) -> None:
    seals(world, lane, 500)


def test_a_check_that_is_missing_is_noticed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without_signatures:
        without_signatures.setattr("engine.protocol.signed._verify", lambda *told: True)
        with pytest.raises(AssertionError):
            grants(world, 500)
    with monkeypatch.context() as without_commitments:
        anything = MagicMock(__eq__=lambda *_: True, __ne__=lambda *_: False)
        without_commitments.setattr("nodes.gather.commitment", lambda *_: anything)
        with pytest.raises(AssertionError):
            shares_through_a_gathering(world, 500)


@long
def test_of_a_million_changed_things_none_is_accepted(world: Any, lane: Lane) -> None:
    total: Counter[str] = Counter()
    for what, count in SUITE.items():
        total[what.__name__] = what(world, 10 * count).total
    total["seals"] = seals(world, PycaLane(), 110_000).total
    total["seals of the token"] = seals(world, lane, 10_000).total
    assert total.total() >= 1_000_000, total
