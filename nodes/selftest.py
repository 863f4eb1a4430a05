"""Known-answer self tests at start: the Shamir core, and AES-GCM and ECDSA through the token. No socket, no store."""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from engine.errors import EngineError, InvalidSignature, InvalidTag, TokenError
from engine.keys import ALGORITHMS, load_private_key
from engine.sharing import SecretBuffer, Share, reconstruct_key
from nodes.token import Lane

__all__ = ["run_self_tests"]

SHAMIR_SECRET: Final = bytes.fromhex("53ca01ff80")
SHAMIR_SHARES: Final = {
    1: bytes.fromhex("b76d4586d2"),
    7: bytes.fromhex("c892b7543c"),
    255: bytes.fromhex("a6b630daa9"),
}
"""The polynomial with coefficients 00a71f0e91 and e4005b77c3 at x = 1, 7 and 255, over 0x11B (worked out by hand)."""

GATHERED_BYTES_MAX: Final = 4096
"""More than the largest secret, an RSA-4096 key with its blinding: about 2.4 KiB."""

GCM_KEY: Final = bytes.fromhex("feffe9928665731c6d6a8f9467308308") * 2
GCM_AAD: Final = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
GCM_PLAINTEXT: Final = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
)
GCM_SEALED: Final = bytes.fromhex(
    "cafebabefacedbaddecaf888"
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
    "76fc6ece0f4e1768cddf8853bb2d551b"
)
"""Nonce, ciphertext and tag of test case 16 of "The Galois/Counter Mode of Operation" (McGrew and Viega, 2005)."""

ECDSA_SCALAR: Final = bytes.fromhex("c9afa9d845ba75166b5c215767b1d6934e50c3db36e89b127b8a622b120f6721")
ECDSA_MESSAGE: Final = b"sample"
ECDSA_SIGNATURE: Final = utils.encode_dss_signature(
    0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
    0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
)
"""RFC 6979, A.2.5: P-256 with SHA-256, message "sample"."""


def run_self_tests(lane: Lane) -> None:
    """Run them all; ``TokenError`` names the one that failed. A node whose self test fails must not serve."""
    for name, test in (
        ("locked memory", _locked_memory),
        ("Shamir core", _shamir),
        ("KEK", lane.check_kek),
        ("AES-GCM in the token", lambda: _gcm(lane)),
        ("ECDSA in the token", lambda: _ecdsa(lane)),
    ):
        try:
            test()
        except EngineError as error:
            raise TokenError(f"self test failed: {name}: {error}") from None


def _locked_memory() -> None:
    """A node that may not lock memory must fail at its start, not at its first cold key."""
    try:
        with SecretBuffer.random(GATHERED_BYTES_MAX) as one, SecretBuffer.copy_of(one) as other:
            if one != other or one == bytes(len(one)):
                raise TokenError("locked memory gives back other bytes")
    except OSError as error:
        raise TokenError(str(error.strerror)) from None


def _shamir() -> None:
    if reconstruct_key([Share(x, y) for x, y in SHAMIR_SHARES.items()], threshold=len(SHAMIR_SHARES)) != SHAMIR_SECRET:
        raise TokenError("the known shares give another secret")


def _gcm(lane: Lane) -> None:
    key = lane.load(ALGORITHMS["aes-256-gcm"], GCM_KEY)
    try:
        if lane.decrypt(key, GCM_SEALED, GCM_AAD) != GCM_PLAINTEXT:
            raise TokenError("the known ciphertext gives another plaintext")
        again = lane.encrypt(key, GCM_PLAINTEXT, GCM_AAD)
        if lane.decrypt(key, again, GCM_AAD) != GCM_PLAINTEXT:
            raise TokenError("what was encrypted does not decrypt")
        changed = GCM_SEALED[:-1] + bytes([GCM_SEALED[-1] ^ 1])
        try:
            lane.decrypt(key, changed, GCM_AAD)
        except InvalidTag:
            return
        raise TokenError("a wrong tag was accepted")
    finally:
        key.destroy()


def _ecdsa(lane: Lane) -> None:
    algo = ALGORITHMS["ecdsa-p256-sha256"]
    digest = hashlib.sha256(ECDSA_MESSAGE).digest()
    key = lane.load(algo, ECDSA_SCALAR)
    try:
        lane.verify(key, digest, ECDSA_SIGNATURE)
        signature = lane.sign(key, digest)
        private = load_private_key(algo, ECDSA_SCALAR)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise TokenError("the known key is no EC key")
        try:
            private.public_key().verify(signature, ECDSA_MESSAGE, ec.ECDSA(hashes.SHA256()))
        except PycaInvalidSignature:
            raise TokenError("the token's signature is wrong") from None
        try:
            lane.verify(key, hashlib.sha256(b"other").digest(), ECDSA_SIGNATURE)
        except InvalidSignature:
            return
        raise TokenError("a wrong signature was accepted")
    finally:
        key.destroy()
