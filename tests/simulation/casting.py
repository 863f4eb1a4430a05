"""The members of the simulated cluster and the token in memory. What is signed is really signed.

Keys of members are the same in every process and seed. Key material, nonces of ciphertexts, salts and shares come from
the system's random generator, as in production: their lengths are constant, so nothing is decided by them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import cryptography.exceptions
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import engine.protocol.signed as signed_module
from engine.errors import InvalidSignature, InvalidTag, TokenError
from engine.keys import ALGORITHMS, Algorithm, KeyKind
from engine.protocol.manifest import Cluster, Member, PolicyRule, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.requests import TokenHealth
from engine.protocol.signed import SigningKey
from engine.sharing import SecretBuffer
from nodes.token import LoadedKey

NODES = ("n1", "n2", "n3", "n4")
WIDE_NODES = (*NODES, "n5", "n6")
BALANCER = "bal"
ROLES = {
    "op": "operator",
    "alice": "client",
    "bob": "client",
    "carol": "client",
    "dave": "client",
    BALANCER: "balancer",
}
RULES = (
    PolicyRule("alice", "*", ["*"]),
    PolicyRule("dave", "*", ["*"]),
    PolicyRule("carol", "*", ["encrypt", "decrypt", "mac", "verify-mac", "sign", "verify"]),
    PolicyRule("bob", "other/*", ["*"]),
)
ALGORITHMS_USED = ("aes-256-gcm", "hmac-sha256", "ed25519")
_verify, _parse = signed_module._verify, signed_module._parse


def signing(name: str) -> SigningKey:
    seed = hashlib.sha256(b"simulation " + name.encode()).digest()
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(seed))


def curve_secret(name: str) -> bytes:
    return hashlib.sha256(b"simulation curve " + name.encode()).digest()


def _member(name: str, key: SigningKey) -> Member:
    role: Any = ROLES.get(name, "node")
    secret = X25519PrivateKey.from_private_bytes(curve_secret(name))
    curve = bytes(32) if role == "operator" else secret.public_key().public_bytes_raw()
    endpoint = "tcp://127.0.0.1:1" if role in ("node", "balancer") else ""
    location = f"site{(int(name[1:]) - 1) % len(NODES) + 1}/room/rack/{name}" if role == "node" else ""
    return Member(name, role, key.public, curve, endpoint, "", location)


KEYS = {name: signing(name) for name in (*ROLES, *WIDE_NODES)}
MEMBERS = {name: _member(name, key) for name, key in KEYS.items()}
CURVE = {name: member.curve_z85 for name, member in MEMBERS.items()}


def _cluster(nodes: Sequence[str]) -> Cluster:
    members = [MEMBERS[name] for name in (*ROLES, *nodes)]
    chain = issue_cluster_manifest(name="sim", members=members, rules=RULES, operators=[KEYS["op"]], groups=16)
    return open_chain(chain, chain_pin(chain))


CLUSTER = _cluster(NODES)
WIDE_CLUSTER = _cluster(WIDE_NODES)
"""With more nodes, so that a key has somewhere to go; the last two stand at the sites of the first two."""


@lru_cache(maxsize=4096)
def verifies_once(public: bytes, signature: bytes, told: bytes, domain: bytes) -> bool:
    """The real check of a signature, done once for each (key, signature, bytes): it is a pure function and dear."""
    return _verify(public, signature, told, domain)


@lru_cache(maxsize=4096)
def parses_once(raw: bytes) -> Any:
    """The real parser of envelopes, once for each: it is a pure function too."""
    return _parse(raw)


class Material:
    """A key object of the token in memory."""

    def __init__(self, algo: Algorithm, material: bytes) -> None:
        self.algorithm = algo
        self._cipher = AESGCM(material) if algo.kind is KeyKind.AES else None
        self._private: Any = None
        if algo.kind is KeyKind.ED25519:
            self._private = Ed25519PrivateKey.from_private_bytes(material)
        self._bytes = material
        self.gone = False

    def destroy(self) -> None:
        self.gone = True

    def check(self) -> None:
        if self.gone:
            raise TokenError("the object was destroyed")


class SimLane:
    """What ``nodes.token.Lane`` is to its user, with real AES-GCM, HMAC and Ed25519 by pyca/cryptography."""

    generation = 1

    def __init__(self, kek: bytes) -> None:
        self._kek = AESGCM(kek)

    def destroy(self, key: LoadedKey) -> None:
        key.handles.destroy()

    def seal(self, plaintext: bytes, associated_data: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._kek.encrypt(nonce, plaintext, associated_data)

    def unseal(self, sealed: bytes, associated_data: bytes) -> bytes:
        try:
            return self._kek.decrypt(sealed[:12], sealed[12:], associated_data)
        except (cryptography.exceptions.InvalidTag, ValueError):
            raise InvalidTag("a sealed blob does not open under this token's KEK") from None

    def unseal_secret(self, sealed: bytes, associated_data: bytes) -> SecretBuffer:
        return SecretBuffer.copy_of(self.unseal(sealed, associated_data))

    def check_kek(self) -> None:
        """It is always well."""

    def random(self, length: int) -> bytes:
        return os.urandom(length)

    def load(self, algo: Algorithm, material: Any, public_key: bytes = b"") -> LoadedKey:
        if algo.name not in ALGORITHMS_USED or (
            algo.bits and algo.kind is KeyKind.AES and len(material) * 8 != algo.bits
        ):
            raise TokenError(f"what was combined is no key of {algo.name}")
        with memoryview(material) as view:
            return LoadedKey(algo, Material(algo, bytes(view)), self, self.generation)  # type: ignore[arg-type]

    def use(
        self, key: LoadedKey, verb: str, header: bytes, hashed: Callable[[bytes], Any] | None, unlike: str
    ) -> Callable[[bytes, bytes, bytes], bytes]:
        def done(data: bytes, associated_data: bytes, proof: bytes) -> bytes:
            data = data if hashed is None else hashed(data).digest()
            if verb == "encrypt":
                return self.encrypt(key, data, associated_data, header)
            if verb == "decrypt":
                if not data.startswith(header):
                    raise InvalidTag(unlike)
                return self.decrypt(key, data, associated_data, header)
            if verb in ("sign", "mac"):
                return self.sign(key, data) if verb == "sign" else self.mac(key, data)
            check = self.verify if verb == "verify" else self.verify_mac
            check(key, data, proof)
            return b""

        return done

    def encrypt(self, key: LoadedKey, plaintext: bytes, associated_data: bytes, header: bytes = b"") -> bytes:
        key.handles.check()
        nonce = os.urandom(12)
        return header + nonce + key.handles._cipher.encrypt(nonce, plaintext, header + associated_data)

    def decrypt(self, key: LoadedKey, ciphertext: bytes, associated_data: bytes, header: bytes = b"") -> bytes:
        key.handles.check()
        sealed = ciphertext[len(header) :]
        try:
            return key.handles._cipher.decrypt(sealed[:12], sealed[12:], header + associated_data)
        except (cryptography.exceptions.InvalidTag, ValueError):
            raise InvalidTag("the ciphertext, its associated data or its key does not fit") from None

    def sign(self, key: LoadedKey, data: bytes) -> bytes:
        key.handles.check()
        return key.handles._private.sign(data)

    def verify(self, key: LoadedKey, data: bytes, signature: bytes) -> None:
        key.handles.check()
        try:
            key.handles._private.public_key().verify(signature, data)
        except cryptography.exceptions.InvalidSignature:
            raise InvalidSignature("the signature does not belong to the message") from None

    def mac(self, key: LoadedKey, data: bytes) -> bytes:
        key.handles.check()
        return hmac.digest(key.handles._bytes, data, "sha256")

    def verify_mac(self, key: LoadedKey, data: bytes, tag: bytes) -> None:
        if not hmac.compare_digest(self.mac(key, data), tag):
            raise InvalidSignature("the MAC does not belong to the message")


class SimHealth:
    """The keeper of a token that is always well."""

    problem = ""

    def told(self) -> TokenHealth:
        return TokenHealth("", "", 0, 0, 0, 0)


class SimToken:
    """What the handlers ask of ``nodes.token.Token``."""

    description = "simulated token"
    missing: ClassVar[dict[str, str]] = {name: "not simulated" for name in ALGORITHMS if name not in ALGORITHMS_USED}
    algorithms = ALGORITHMS_USED
