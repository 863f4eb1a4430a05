"""The table of algorithms and request types, and the canonical form of key material. It knows no token and no socket.

Canonical key material (what is blinded, split and shared): the raw key for AES and HMAC, the big-endian scalar of
the curve's length for ECDSA, the 32-byte seed for Ed25519 (RFC 8032), and PKCS#1 DER (RFC 8017, A.1.2) for RSA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from cryptography.exceptions import UnsupportedAlgorithm as PycaUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

__all__ = [
    "ALGORITHMS",
    "POLICY_OPERATIONS",
    "Algorithm",
    "KeyKind",
    "PrivateKey",
    "RequestType",
    "algorithm",
    "check_material",
    "generate_material",
    "load_private_key",
    "normalize_material",
    "public_key_der",
    "public_key_pem",
    "request_class",
]

MAX_HMAC_KEY = 128
"""Longest HMAC key in bytes, the block size of SHA-512: longer keys would be hashed first (RFC 2104, section 3)."""
MIN_HMAC_KEY = 16
GCM_USES_MAX = 2**31


class RequestType(StrEnum):
    """What a request asks for; also the vocabulary of the policy."""

    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    SIGN = "sign"
    VERIFY = "verify"
    MAC = "mac"
    VERIFY_MAC = "verify-mac"
    GENERATE = "generate"
    IMPORT = "import"
    DESTROY = "destroy"
    REFRESH = "refresh"
    RESHARE = "reshare"
    SETTINGS = "settings"
    ROTATE = "rotate"
    REWRAP = "rewrap"
    DESCRIBE = "describe"
    LIST = "list"
    PREWARM = "prewarm"
    FLUSH = "flush"
    STATUS = "status"


OPERATIONS = frozenset(
    {
        RequestType.ENCRYPT,
        RequestType.DECRYPT,
        RequestType.SIGN,
        RequestType.VERIFY,
        RequestType.MAC,
        RequestType.VERIFY_MAC,
    }
)
"""The request types that use a loaded key."""
USES = OPERATIONS | {RequestType.REWRAP}
"""What a grant may be for: a rewrapping decrypts with one version of a key and encrypts with another."""
PRODUCING = frozenset({RequestType.ENCRYPT, RequestType.SIGN, RequestType.MAC})
"""Those that make something new, for which the newest version of a key alone is taken."""


POLICY_OPERATIONS = frozenset({*map(str, RequestType), "grow"})
"""The vocabulary of the policy: the request types, and what a balancer may be allowed beyond its orders."""


class KeyKind(StrEnum):
    """How the material of an algorithm looks."""

    AES = "aes"
    HMAC = "hmac"
    EC = "ec"
    ED25519 = "ed25519"
    RSA = "rsa"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table.

    ``bits`` is the key size (for HMAC the size of a generated key); ``hash_name`` the digest that is signed, or empty
    where the whole message is the token's input; ``prior_us`` a first guess of the token's service time in
    microseconds.
    """

    name: str
    kind: KeyKind
    bits: int
    hash_name: str
    operations: frozenset[RequestType]
    prior_us: int

    @property
    def uses_max(self) -> int:
        """How often one version may make something new by default; 0 for no limit.

        AES-GCM with random nonces is safe for 2^32 encryptions (NIST SP 800-38D, 8.3); this is half of that.
        """
        return GCM_USES_MAX if self.kind is KeyKind.AES else 0

    @property
    def asymmetric(self) -> bool:
        """Whether there is a public key."""
        return self.kind in (KeyKind.EC, KeyKind.ED25519, KeyKind.RSA)

    @property
    def prehashed(self) -> bool:
        """Whether a message is hashed before it goes to the token, so that the client may send the digest."""
        return self.hash_name != "" and RequestType.SIGN in self.operations


_AEAD = frozenset({RequestType.ENCRYPT, RequestType.DECRYPT})
_MAC = frozenset({RequestType.MAC, RequestType.VERIFY_MAC})
_SIGN = frozenset({RequestType.SIGN, RequestType.VERIFY})

_ROWS = (
    Algorithm("aes-128-gcm", KeyKind.AES, 128, "", _AEAD, 11),
    Algorithm("aes-256-gcm", KeyKind.AES, 256, "", _AEAD, 11),
    Algorithm("hmac-sha256", KeyKind.HMAC, 256, "sha256", _MAC, 10),
    Algorithm("hmac-sha512", KeyKind.HMAC, 512, "sha512", _MAC, 11),
    Algorithm("ecdsa-p256-sha256", KeyKind.EC, 256, "sha256", _SIGN, 40),
    Algorithm("ecdsa-p384-sha384", KeyKind.EC, 384, "sha384", _SIGN, 400),
    Algorithm("ed25519", KeyKind.ED25519, 256, "", _SIGN, 130),
    Algorithm("rsa-2048-pss-sha256", KeyKind.RSA, 2048, "sha256", _SIGN, 500),
    Algorithm("rsa-3072-pss-sha256", KeyKind.RSA, 3072, "sha256", _SIGN, 1500),
    Algorithm("rsa-4096-pss-sha256", KeyKind.RSA, 4096, "sha256", _SIGN, 3500),
    Algorithm("rsa-2048-pkcs1-sha256", KeyKind.RSA, 2048, "sha256", _SIGN, 500),
    Algorithm("rsa-2048-oaep-sha256", KeyKind.RSA, 2048, "sha256", _AEAD, 500),
)
ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType({row.name: row for row in _ROWS})


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name; ``ValueError`` names the known ones."""
    found = ALGORITHMS.get(name)
    if found is None:
        raise ValueError(f"unknown algorithm {name[:80]!r}; known are {', '.join(ALGORITHMS)}")
    return found


def request_class(request_type: str, algorithm_name: str) -> str:
    """The request class (type, algorithm) as one label, ``sign/ed25519``."""
    return f"{request_type}/{algorithm_name}"


PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

_CURVES: Mapping[int, ec.EllipticCurve] = {256: ec.SECP256R1(), 384: ec.SECP384R1()}


def generate_material(algo: Algorithm, random_bytes: bytes = b"") -> bytes:
    """Fresh canonical key material.

    ``random_bytes`` (at least the key's length, from a token's generator) is mixed into symmetric keys by XOR with the
    operating system's; asymmetric keys come from pyca/cryptography.
    """
    if algo.kind in (KeyKind.AES, KeyKind.HMAC):
        length = algo.bits // 8
        local = os.urandom(length)
        if not random_bytes:
            return local
        if len(random_bytes) < length:
            raise ValueError(f"the token gave {len(random_bytes)} random bytes, {length} are needed")
        return bytes(a ^ b for a, b in zip(local, random_bytes, strict=False))
    private: PrivateKey
    if algo.kind is KeyKind.EC:
        private = ec.generate_private_key(_CURVES[algo.bits])
    elif algo.kind is KeyKind.ED25519:
        private = ed25519.Ed25519PrivateKey.generate()
    else:
        private = rsa.generate_private_key(public_exponent=65537, key_size=algo.bits)
    return _canonical(algo, private)


def _canonical(algo: Algorithm, private: PrivateKey) -> bytes:
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.private_numbers().private_value.to_bytes(algo.bits // 8, "big")
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.private_bytes_raw()
    return private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def load_private_key(algo: Algorithm, material: bytes | bytearray) -> PrivateKey:
    """The pyca/cryptography key of canonical material. ``ValueError`` if it is none of this algorithm."""
    if algo.kind is KeyKind.EC:
        size = algo.bits // 8
        if len(material) != size:
            raise ValueError(f"{algo.name}: the private scalar has {len(material)} bytes, {size} are needed")
        return ec.derive_private_key(int.from_bytes(material, "big"), _CURVES[algo.bits])
    if algo.kind is KeyKind.ED25519:
        return ed25519.Ed25519PrivateKey.from_private_bytes(material)
    if algo.kind is KeyKind.RSA:
        # The primes were tested when the key was made or imported, and its hash is checked whenever it is combined.
        loaded = serialization.load_der_private_key(bytes(material), None, unsafe_skip_rsa_key_validation=True)
        if not isinstance(loaded, rsa.RSAPrivateKey):
            raise ValueError(f"{algo.name}: the material is no RSA key")
        return loaded
    raise ValueError(f"{algo.name} has no private key")


def normalize_material(algo: Algorithm, key_material: bytes | bytearray) -> bytes:
    """Canonical material from what a user imports.

    Raw bytes for AES and HMAC; unencrypted PKCS#8 (RFC 5958), DER or PEM, for the others. ``ValueError`` says what is
    wrong and never shows the material.
    """
    if not isinstance(key_material, bytes | bytearray):
        raise TypeError(f"key material must be bytes, not {type(key_material).__name__}")
    data = bytes(key_material)
    return _checked(algo, _load_pkcs8(algo, data)) if algo.asymmetric else _checked_raw(algo, data)


def check_material(algo: Algorithm, material: bytes) -> bytes:
    """The canonical material itself, if it is that, else ``ValueError``: how what comes over the wire is checked."""
    if not algo.asymmetric:
        return _checked_raw(algo, material)
    try:
        if algo.kind is KeyKind.RSA:
            again = _checked(algo, serialization.load_der_private_key(material, None))
        else:
            again = _checked(algo, load_private_key(algo, material))
    except (ValueError, TypeError, PycaUnsupported):
        again = b""  # the cause may quote the input
    if again != material:
        raise ValueError(f"{algo.name}: the {len(material)} bytes are no canonical key material")
    return again


def _checked_raw(algo: Algorithm, data: bytes) -> bytes:
    shortest, longest = (MIN_HMAC_KEY, MAX_HMAC_KEY) if algo.kind is KeyKind.HMAC else (algo.bits // 8,) * 2
    if not shortest <= len(data) <= longest:
        allowed = f"{shortest} to {longest} are allowed" if shortest < longest else f"{longest} are needed"
        raise ValueError(f"{algo.name}: the key has {len(data)} bytes, {allowed}")
    return data


def _checked(algo: Algorithm, private: object) -> bytes:
    """The canonical material of a private key that is one of this algorithm."""
    if algo.kind is KeyKind.EC:
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name != _CURVES[algo.bits].name:
            raise ValueError(f"{algo.name}: the material is no private key on {_CURVES[algo.bits].name}")
        return _canonical(algo, private)
    if algo.kind is KeyKind.ED25519:
        if not isinstance(private, ed25519.Ed25519PrivateKey):
            raise ValueError(f"{algo.name}: the material is no Ed25519 private key")
        return _canonical(algo, private)
    if not isinstance(private, rsa.RSAPrivateKey):
        raise ValueError(f"{algo.name}: the material is no RSA private key")
    if private.key_size != algo.bits:
        raise ValueError(f"{algo.name}: the RSA key has {private.key_size} bits, {algo.bits} are needed")
    if private.public_key().public_numbers().e != 65537:
        raise ValueError(f"{algo.name}: the public exponent must be 65537")
    return _canonical(algo, private)


def _load_pkcs8(algo: Algorithm, data: bytes) -> object:
    load = (
        serialization.load_pem_private_key if data.lstrip().startswith(b"-----") else serialization.load_der_private_key
    )
    try:
        return load(data, None)
    except (ValueError, TypeError, PycaUnsupported):
        # The cause may quote the input, so it is not chained.
        raise ValueError(
            f"{algo.name}: the {len(data)} bytes are no unencrypted PKCS#8 private key in DER or PEM"
        ) from None


def public_key_der(algo: Algorithm, material: bytes | bytearray) -> bytes:
    """The SubjectPublicKeyInfo (RFC 5280, 4.1.2.7) in DER; empty for a symmetric algorithm."""
    if not algo.asymmetric:
        return b""
    return (
        load_private_key(algo, material)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def public_key_pem(der: bytes) -> str:
    """SubjectPublicKeyInfo DER as PEM (RFC 7468); ``ValueError`` if it is none."""
    try:
        public = serialization.load_der_public_key(der)
    except (ValueError, PycaUnsupported):
        raise ValueError(f"the {len(der)} bytes are no SubjectPublicKeyInfo of a known kind") from None
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode(
        "ascii"
    )
