"""The one envelope for everything that is signed, its one signer and its one verifier. It knows no message kinds.

An envelope is the canonical MessagePack array ``[body, [[signer, signature], ...]]``; ``body`` is the bytes of the
array ``[format, kind, issuer, serial, payload]``. A signature is Ed25519 (RFC 8032) over the label
``b"keyquorum/signed/1\\0"`` and the body, exactly the bytes that were received: nothing is ever re-encoded before it is
checked.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Protocol

from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta, Struct

from engine.errors import ManifestError, ProtocolError
from engine.protocol.wire import Blob, Codec, Name, UInt

__all__ = [
    "RecentSignatures",
    "Signed",
    "SigningKey",
    "add_signature",
    "read_unverified",
    "remember_signatures",
    "sign_envelope",
    "verify_envelope",
]

FORMAT = 1
DOMAIN = b"keyquorum/signed/1\0"
MAX_ENVELOPE = 1024 * 1024
"""Longest envelope in bytes; those inside messages are bounded by the message."""

REMEMBERED: Final = 1024
REMEMBERED_MAX: Final = 4096
"""So many envelopes of at most so many bytes need not be taken apart again."""


class _Signature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    signer: Name
    value: Annotated[bytes, Meta(min_length=64, max_length=64)]


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

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature over the domain label and ``data``."""
        return self._private.sign(DOMAIN + data)


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


def sign_envelope(kind: str, serial: int, payload: bytes | Blob, key: SigningKey, *others: SigningKey) -> bytes:
    """The envelope of ``payload``, issued by ``key`` and signed by it and the ``others``."""
    body = _bodies.encode(_Body(FORMAT, kind, key.name, serial, payload))
    signatures = [_Signature(each.name, each.sign(body)) for each in (key, *others)]
    memory = _memory
    if memory is not None:  # it comes back, in certificates and from those who were asked
        for each, made in zip((key, *others), signatures, strict=True):
            memory.learn(_digest(each.public, made.value, body))
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


def _verifies(public: bytes, signature: bytes, body: bytes) -> bool:
    memory = _memory
    if memory is None:
        return _verify(public, signature, body)
    digest = _digest(public, signature, body)
    if memory.knows(digest):
        return True
    good = _verify(public, signature, body)
    if good:
        memory.learn(digest)
    return good


@lru_cache(maxsize=REMEMBERED)
def _digest(public: bytes, signature: bytes, body: bytes) -> bytes:
    """The name of a signature in the memory; the first two have fixed lengths."""
    return hashlib.sha256(public + signature + body).digest()


def _verify(public: bytes, signature: bytes, body: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, DOMAIN + body)
    except PycaInvalidSignature:
        return False
    return True
