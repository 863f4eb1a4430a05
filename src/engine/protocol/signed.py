"""The one envelope for everything that is signed, its one signer and its one verifier. It knows no message kinds.

An envelope is the canonical MessagePack array ``[body, [[signer, signature], ...]]``; ``body`` is the bytes of the
array ``[format, kind, issuer, serial, payload]``. A signature is Ed25519 (RFC 8032) over the label
``b"keyquorum/signed/1\\0"`` and the body, exactly the bytes that were received: nothing is ever re-encoded before it is
checked. Or it is over the root of a tree that has the body among its leaves, with the way from there: so one signature
is good for many documents that were made together, each of which still stands alone.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Protocol

from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta, Struct

from engine.errors import ManifestError, ProtocolError
from engine.protocol.wire import Blob, Codec, Name, UInt

__all__ = [
    "Pen",
    "RecentSignatures",
    "Signed",
    "SigningKey",
    "add_signature",
    "encode_body",
    "read_unverified",
    "remember_signatures",
    "sign_bodies",
    "sign_envelope",
    "verify_envelope",
]

FORMAT = 1
DOMAIN = b"keyquorum/signed/1\0"
TREE_DOMAIN = b"keyquorum/signed-tree/1\0"
LEAF_DOMAIN = b"keyquorum/signed-leaf/1\0"
FORK_DOMAIN = b"keyquorum/signed-fork/1\0"
MAX_ENVELOPE = 1024 * 1024
"""Longest envelope in bytes; those inside messages are bounded by the message."""

REMEMBERED: Final = 2048
REMEMBERED_MAX: Final = 4096
"""So many envelopes of at most so many bytes need not be taken apart again."""

SIGNATURE_BYTES: Final = 64
DEEPEST: Final = 6
TOGETHER_MAX: Final = 1 << DEEPEST
"""So many documents have one signature in common at most."""
VALUE_BYTES: Final = SIGNATURE_BYTES + 1 + 32 * DEEPEST
"""The longest signature: with the way from a leaf of the deepest tree."""


class _Signature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    signer: Name
    value: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=VALUE_BYTES)]


class _Envelope(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    body: Annotated[bytes, Meta(max_length=MAX_ENVELOPE)]
    signatures: Annotated[list[_Signature], Meta(min_length=1, max_length=64)]


class _Body(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    format: Annotated[int, Meta(ge=FORMAT, le=FORMAT)]
    kind: Annotated[str, Meta(min_length=1, max_length=32)]
    issuer: Name
    serial: UInt
    payload: Annotated[bytes, Meta(max_length=MAX_ENVELOPE)]


_envelopes = Codec(_Envelope, "signed envelope", MAX_ENVELOPE)
_bodies = Codec(_Body, "signed body", MAX_ENVELOPE)


class SigningKey:
    """An Ed25519 private key with the name under which it signs. Its repr shows the name alone."""

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self.name = name
        self._private = private
        self._public = private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r})"

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""
        return self._public

    def sign(self, data: bytes, domain: bytes = DOMAIN) -> bytes:
        """The 64-byte signature over the domain label and ``data``."""
        return self._private.sign(domain + data)


@dataclass(frozen=True, slots=True)
class Signed:
    """What an envelope says, and who signed it.

    ``digest`` is the SHA-256 of the body: the hash by which chains and certificates name the document. ``raw`` is the
    envelope as received.
    """

    kind: str
    issuer: str
    serial: int
    payload: bytes
    signers: tuple[str, ...]
    digest: bytes
    raw: bytes


class Pen(SigningKey):
    """A key with which one thread at a time may have many documents signed together.

    In its ``later`` block, ``sign_envelope`` gives the body alone in the place of the envelope; ``sign_bodies`` makes
    the envelopes afterwards. Other threads sign as ever.
    """

    def __init__(self, key: SigningKey) -> None:
        super().__init__(key.name, key._private)
        self._waits = 0

    @property
    def waits(self) -> bool:
        """Whether this thread signs later."""
        return self._waits == threading.get_ident()

    @contextmanager
    def later(self) -> Iterator[None]:
        """What this thread makes in here is signed afterwards."""
        self._waits = threading.get_ident()
        try:
            yield
        finally:
            self._waits = 0


def encode_body(kind: str, serial: int, payload: bytes | Blob, issuer: str) -> bytes:
    """The body of an envelope, for ``sign_bodies``."""
    return _bodies.encode(_Body(FORMAT, kind, issuer, serial, payload))


def sign_bodies(bodies: Sequence[bytes], key: SigningKey) -> list[bytes]:
    """The envelopes of these bodies, in order: one signature for all of them, or for each ``TOGETHER_MAX``."""
    made: list[bytes] = []
    for at in range(0, len(bodies), TOGETHER_MAX):
        raws = bodies[at : at + TOGETHER_MAX]
        values = [key.sign(raws[0])] if len(raws) == 1 else _sign_tree(raws, key)
        made += [
            _envelopes.encode(_Envelope(raw, [_Signature(key.name, value)]))
            for raw, value in zip(raws, values, strict=True)
        ]
    return made


def _sign_tree(raws: Sequence[bytes], key: SigningKey) -> list[bytes]:
    """A signature for each of these bodies: that of the root, the leaf's place, and the hashes beside the way there."""
    level = [hashlib.sha256(LEAF_DOMAIN + raw).digest() for raw in raws]
    ways: list[list[bytes]] = [[] for _ in raws]
    depth = 0
    while len(level) > 1:
        level += [bytes(32)] * (len(level) % 2)
        for place, way in enumerate(ways):
            way.append(level[place >> depth ^ 1])
        level = [hashlib.sha256(FORK_DOMAIN + level[at] + level[at + 1]).digest() for at in range(0, len(level), 2)]
        depth += 1
    signature = key.sign(level[0], TREE_DOMAIN)
    memory = _memory
    if memory is not None:
        memory.learn(_digest(key.public, signature, level[0], TREE_DOMAIN))
    return [signature + bytes([place]) + b"".join(way) for place, way in enumerate(ways)]


def _root(value: bytes, body: bytes) -> bytes | None:
    """The root of the tree in which the signature says that the body is a leaf; None if it says so of no tree."""
    depth, odd = divmod(len(value) - SIGNATURE_BYTES - 1, 32)
    place = value[SIGNATURE_BYTES]
    if odd or not depth or place >> depth:
        return None
    found = hashlib.sha256(LEAF_DOMAIN + body).digest()
    for at in range(SIGNATURE_BYTES + 1, len(value), 32):
        beside = value[at : at + 32]
        found = hashlib.sha256(FORK_DOMAIN + (beside + found if place & 1 else found + beside)).digest()
        place >>= 1
    return found


def sign_envelope(kind: str, serial: int, payload: bytes | Blob, key: SigningKey, *others: SigningKey) -> bytes:
    """The envelope of ``payload``, issued by ``key`` and signed by it and the ``others``; of a ``Pen``, see there."""
    body = encode_body(kind, serial, payload, key.name)
    if isinstance(key, Pen) and key.waits:
        return body
    signatures = [_Signature(each.name, each.sign(body)) for each in (key, *others)]
    memory = _memory
    if memory is not None:  # it comes back, in certificates and from those who were asked
        for each, made in zip((key, *others), signatures, strict=True):
            memory.learn(_digest(each.public, made.value, body, DOMAIN))
    return _envelopes.encode(_Envelope(body, signatures))


def add_signature(raw: bytes, key: SigningKey) -> bytes:
    """The same envelope with one more signer; an earlier signature of the same signer is replaced."""
    envelope = _envelopes.decode(raw)
    kept = [each for each in envelope.signatures if each.signer != key.name]
    return _envelopes.encode(_Envelope(envelope.body, [*kept, _Signature(key.name, key.sign(envelope.body))]))


def _parse(raw: bytes) -> tuple[_Envelope, _Body, Signed]:
    """The parts of an envelope. Short ones are remembered: the documents of a key come again with every step."""
    return _remembered(raw) if type(raw) is bytes and len(raw) <= REMEMBERED_MAX else _taken_apart(raw)


def _taken_apart(raw: bytes) -> tuple[_Envelope, _Body, Signed]:
    envelope = _envelopes.decode(raw)
    body = _bodies.decode(envelope.body)
    signers = tuple(each.signer for each in envelope.signatures)
    if len(set(signers)) != len(signers):
        raise ProtocolError("signed envelope: a signer appears twice")
    digest = hashlib.sha256(envelope.body).digest()
    return envelope, body, Signed(body.kind, body.issuer, body.serial, body.payload, signers, digest, raw)


_remembered = lru_cache(maxsize=REMEMBERED)(_taken_apart)


def read_unverified(raw: bytes) -> Signed:
    """The content without any check of signatures: for display, and to learn which keys will be needed."""
    return _parse(raw)[2]


def verify_envelope(
    raw: bytes,
    kind: str,
    keys: Mapping[str, bytes] | Mapping[str, tuple[bytes, ...]] | Callable[[str], bytes | None],
    *,
    threshold: int = 1,
    issuer_signs: bool = True,
    before: Callable[[Signed], None] | None = None,
) -> Signed:
    """The content of an envelope of that kind, after every signature on it was checked.

    ``keys`` gives the 32-byte public key of a signer (or all that it ever had, any of which will do), and None for a
    name that may not sign this kind. At least
    ``threshold`` known signers must have signed, the issuer among them unless ``issuer_signs`` is false. A signature
    that does not verify refuses the whole envelope; ``ManifestError`` and ``ProtocolError`` say why. ``before`` may
    refuse the content, not verified yet, for less than the price of a signature.
    """
    envelope, body, signed = _parse(raw)
    if body.kind != kind:
        raise ManifestError(f"a signed {body.kind!r} came where a {kind!r} was expected")
    if before is not None:
        before(signed)
    lookup = keys.get if isinstance(keys, Mapping) else keys
    good = 0
    for signature in envelope.signatures:
        public = lookup(signature.signer)
        if public is None:
            raise ManifestError(f"{kind}: {signature.signer!r} may not sign this")
        if not _signed_by(public, signature.value, envelope.body):
            raise ManifestError(f"{kind}: the signature of {signature.signer!r} is wrong")
        good += 1
    if good < threshold:
        raise ManifestError(f"{kind}: {good} of {threshold} signatures needed")
    if issuer_signs and body.issuer not in signed.signers:
        raise ManifestError(f"{kind}: the issuer {body.issuer!r} did not sign it")
    return signed


class SignatureMemory(Protocol):
    """Where good signatures are remembered, by a digest of key, signature and signed bytes; for several threads."""

    def knows(self, digest: bytes) -> bool:
        """Whether it was learned and not forgotten."""

    def learn(self, digest: bytes) -> None:
        """Remember it for a while."""


class RecentSignatures:
    """The last so many good signatures, for a process that is asked little else: the balancer."""

    def __init__(self, most: int = 8192) -> None:
        self._most = most
        self._known: dict[bytes, None] = {}
        self._lock = threading.Lock()

    def knows(self, digest: bytes) -> bool:
        """Whether it is one of them."""
        return digest in self._known

    def learn(self, digest: bytes) -> None:
        """Remember it in the place of the oldest."""
        with self._lock:
            self._known[digest] = None
            if len(self._known) > self._most:
                del self._known[next(iter(self._known))]


_memory: SignatureMemory | None = None


def remember_signatures(memory: SignatureMemory | None) -> None:
    """Have this process verify no signature that ``memory`` knows; None (so it is at first) verifies each one.

    That a key signed some bytes stays true, so no answer changes by it; who may sign is looked up each time.
    """
    global _memory
    _memory = memory


def _signed_by(public: bytes | tuple[bytes, ...], signature: bytes, body: bytes) -> bool:
    """Whether it is a signature by this key, or by any of these."""
    if isinstance(public, bytes):
        return _verifies(public, signature, body)
    return any(_verifies(each, signature, body) for each in public)


def _verifies(public: bytes, value: bytes, body: bytes) -> bool:
    if len(value) == SIGNATURE_BYTES:
        signature, told, domain = value, body, DOMAIN
    else:
        root = _root(value, body)
        if root is None:
            return False
        signature, told, domain = value[:SIGNATURE_BYTES], root, TREE_DOMAIN
    memory = _memory
    if memory is None:
        return _verify(public, signature, told, domain)
    digest = _digest(public, signature, told, domain)
    if memory.knows(digest):
        return True
    good = _verify(public, signature, told, domain)
    if good:
        memory.learn(digest)
    return good


@lru_cache(maxsize=REMEMBERED)
def _digest(public: bytes, signature: bytes, told: bytes, domain: bytes) -> bytes:
    """The name of a signature in the memory: no domain begins another, and the next two have fixed lengths."""
    return hashlib.sha256(domain + public + signature + told).digest()


_public_key = lru_cache(maxsize=1024)(Ed25519PublicKey.from_public_bytes)


def _verify(public: bytes, signature: bytes, told: bytes, domain: bytes) -> bool:
    try:
        _public_key(public).verify(signature, domain + told)
    except PycaInvalidSignature:
        return False
    return True
