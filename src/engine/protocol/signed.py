"""The one envelope for everything that is signed, its one signer and its one verifier. It knows no message kinds.

An envelope is the canonical MessagePack array ``[body, [[signer, signature], ...]]``; ``body`` is the bytes of the
array ``[format, kind, issuer, serial, payload]``. A signature is Ed25519 (RFC 8032) over the label
``b"keyquorum/signed/1\\0"`` and the body, exactly the bytes that were received: nothing is ever re-encoded before it is
checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta, Struct

from engine.errors import ManifestError, ProtocolError
from engine.protocol.wire import Blob, Codec, Name, UInt

__all__ = [
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

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r})"

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""
        return self._private.public_key().public_bytes_raw()

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
    return _envelopes.encode(_Envelope(body, [_Signature(each.name, each.sign(body)) for each in (key, *others)]))


def add_signature(raw: bytes, key: SigningKey) -> bytes:
    """The same envelope with one more signer; an earlier signature of the same signer is replaced."""
    envelope = _envelopes.decode(raw)
    kept = [each for each in envelope.signatures if each.signer != key.name]
    return _envelopes.encode(_Envelope(envelope.body, [*kept, _Signature(key.name, key.sign(envelope.body))]))


def _parse(raw: bytes) -> tuple[_Envelope, _Body, Signed]:
    envelope = _envelopes.decode(raw)
    body = _bodies.decode(envelope.body)
    signers = tuple(each.signer for each in envelope.signatures)
    if len(set(signers)) != len(signers):
        raise ProtocolError("signed envelope: a signer appears twice")
    digest = hashlib.sha256(envelope.body).digest()
    return envelope, body, Signed(body.kind, body.issuer, body.serial, body.payload, signers, digest, raw)


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
        candidates = (public,) if isinstance(public, bytes) else public
        if not any(_verifies(each, signature.value, envelope.body) for each in candidates):
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


_memory: SignatureMemory | None = None


def remember_signatures(memory: SignatureMemory | None) -> None:
    """Have this process verify no signature that ``memory`` knows; None (so it is at first) verifies each one.

    That a key signed some bytes stays true, so no answer changes by it; who may sign is looked up each time.
    """
    global _memory
    _memory = memory


def _verifies(public: bytes, signature: bytes, body: bytes) -> bool:
    memory = _memory
    if memory is None:
        return _verify(public, signature, body)
    digest = hashlib.sha256(public + signature + body).digest()  # the first two have fixed lengths
    if memory.knows(digest):
        return True
    good = _verify(public, signature, body)
    if good:
        memory.learn(digest)
    return good


def _verify(public: bytes, signature: bytes, body: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, DOMAIN + body)
    except PycaInvalidSignature:
        return False
    return True
