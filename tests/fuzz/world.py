"""A cluster whose keys, documents and times are the same in every run, and signatures that cost little.

The harness signs every document that it changed. Most signatures are ``quick``: a keyed hash that the patched
``signed._verify`` takes for one. Each sixteenth is a real Ed25519 signature, and all that is not quick is verified as
the code does it. Everything around the signature is the code's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace
from schema import MARK

import engine.protocol.signed
from engine._fastshamir import interpolate
from engine.keys import ALGORITHMS, public_key_der
from engine.protocol.grant import Grant
from engine.protocol.manifest import (
    AbortNotice,
    CommitCertificate,
    CreateOrder,
    DestroyOrder,
    Holder,
    KeyManifest,
    KeyRecord,
    Member,
    PolicyRule,
    Receipt,
    RefreshOrder,
    ReshareOrder,
    Retiring,
    aborts,
    certificates,
    chain_pin,
    countersign_chain,
    create_orders,
    destroy_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    open_key_manifest,
    receipts,
    refresh_orders,
    reshare_orders,
)
from engine.protocol.settings import SettingsOrder, book_settings, settings_orders
from engine.protocol.signed import DOMAIN, SigningKey, sign_envelope
from engine.protocol.wire import Codec
from engine.sharing import Share, check_value, commitment

NOW_MS: Final = 1_800_000_000_000
NODES: Final = ("node1", "node2", "node3", "node4", "node5")
HOLDERS: Final = NODES[:3]
ROLES: Final = {"op": "operator", "op2": "operator", "op3": "operator", "alice": "client", "bob": "client",
                "carol": "client", "balancer": "balancer"} | dict.fromkeys(NODES, "node")  # fmt: skip
RULES: Final = (
    PolicyRule("alice", "*", ["*"]),
    PolicyRule("carol", "shared/*", ["encrypt", "generate", "refresh", "reshare"]),
    PolicyRule("bo?", "b[ao]x", ["destroy", "import"]),
)
QUICK: Final = b"quick\0\0\0"
LABEL: Final = b"keyquorum/signed/1\0"
TREE_LABEL: Final = b"keyquorum/signed-tree/1\0"


def private_key(name: str) -> Ed25519PrivateKey:
    """The signing key of a name, the same always."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"tests/fuzz " + name.encode()).digest())


def quick_signature(public: bytes, body: bytes) -> bytes:
    """What stands for a signature in most executions."""
    return QUICK + hashlib.blake2b(body, digest_size=56, key=public).digest()


_real_verify = engine.protocol.signed._verify


def _verify(public: bytes, signature: bytes, told: bytes, domain: bytes) -> bool:
    if signature.startswith(QUICK):
        return signature == quick_signature(public, told if domain == DOMAIN else domain + told)
    return _real_verify(public, signature, told, domain)


@contextmanager
def quick_signatures() -> Iterator[None]:
    """The code takes quick signatures too."""
    with mock.patch.object(engine.protocol.signed, "_verify", _verify):
        yield


def is_signed_by(public: bytes, signature: bytes, body: bytes) -> bool:
    """Whether it is a signature, by nothing but pyca/cryptography; the label is this file's."""
    told: bytes | None = body
    label = LABEL
    if len(signature) > 64:
        told, label, signature = root_of(signature, body), TREE_LABEL, signature[:64]
    if told is None:
        return False
    if signature.startswith(QUICK):
        return signature == quick_signature(public, told if label == LABEL else label + told)
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, label + told)
    except InvalidSignature:
        return False
    return True


def root_of(signature: bytes, body: bytes) -> bytes | None:
    """The root to which the way behind a signature leads from a body; None if it leads nowhere."""
    place, way = signature[64], signature[65:]
    if len(way) not in range(32, 193, 32) or place >= 2 ** (len(way) // 32):
        return None
    found = hashlib.sha256(b"keyquorum/signed-leaf/1\0" + body).digest()
    while way:
        beside, way = way[:32], way[32:]
        pair = found + beside if place % 2 == 0 else beside + found
        found, place = hashlib.sha256(b"keyquorum/signed-fork/1\0" + pair).digest(), place // 2
    return found


def material(label: str, size: int) -> bytes:
    """Bytes that look random and are the same always."""
    return hashlib.shake_256(b"tests/fuzz " + label.encode()).digest(size)


@dataclass(frozen=True)
class Dealt:
    """A key of the world: its manifest, and each holder's share and salt."""

    record: KeyRecord
    secret: bytes
    shares: Mapping[str, Share]
    salts: Mapping[str, bytes]

    @property
    def manifest(self) -> KeyManifest:
        """What the record says."""
        return self.record.manifest


class World:
    """Members, two manifests of the cluster, keys with all their documents."""

    def __init__(self) -> None:
        names = (*ROLES, "stranger")
        self.keys = {name: SigningKey(name, private_key(name)) for name in names}
        self.public = {name: key.public for name, key in self.keys.items()}
        members = [self._member(name) for name in ROLES]
        operators = [self.keys["op"], self.keys["op2"]]
        first = issue_cluster_manifest(name="test", members=members, rules=RULES, operators=operators, quorum=2)
        self.first_chain = first
        self.chain = issue_cluster_manifest(
            name="test",
            members=members,
            rules=RULES,
            operators=operators,
            quorum=2,
            chain=first,
            retiring=[
                Retiring("node1", material("old curve", 32), "tcp://127.0.0.1:3"),
                Retiring("alice", material("old alice", 32)),
            ],
            draining=[NODES[3]],
        )
        self.chain = countersign_chain(self.chain, self.keys["op3"])
        self.pin = chain_pin(self.chain)
        self.cluster = open_chain(self.chain, self.pin)
        self.first = self.deal("orders", "aes-256-gcm", threshold=2)
        self.pair = self.deal("tls", "ed25519", threshold=2, client="alice")
        self.shared = self.deal("shared/box", "aes-128-gcm", threshold=2, client="carol")
        self.second = self._refreshed(self.first)
        self.moved = self._moved(self.first)
        self.after = self._after(self.moved)
        self.placed = self._placed(self.first)

    def curve(self, name: str) -> X25519PrivateKey:
        """A member's CURVE key."""
        return X25519PrivateKey.from_private_bytes(hashlib.sha256(b"curve " + name.encode()).digest())

    def _member(self, name: str) -> Member:
        role = ROLES[name]
        curve = bytes(32) if role == "operator" else self.curve(name).public_key().public_bytes_raw()
        served = role in ("node", "balancer")
        location = f"site{int(name[-1]) % 3}/room/rack/{name}" if role == "node" else ""
        return Member(
            name, role, self.public[name], curve, "tcp://127.0.0.1:1" if served else "",
            "tcp://127.0.0.1:2" if role == "balancer" else "", location,
        )  # type: ignore[arg-type]  # fmt: skip

    def signed(self, codec: Codec[Any], kind: str, body: object, signer: str, serial: int = NOW_MS) -> bytes:
        """A document, really signed."""
        return sign_envelope(kind, serial, codec.encode(body), self.keys[signer])

    def create_order(self, name: str, algorithm: str, threshold: int, client: str = "alice") -> bytes:
        """An order to create a key."""
        order = CreateOrder(material(name, 16), name, algorithm, threshold, len(HOLDERS), "generate", NOW_MS + 60_000)
        return self.signed(create_orders, "order.create", order, client)

    def deal(self, name: str, algorithm: str, threshold: int, client: str = "alice") -> Dealt:
        """A key, dealt without any randomness; its secret and its shares carry the mark."""
        key = (MARK + material(f"key {name}", 32))[: ALGORITHMS[algorithm].bits // 8]
        secret = key + material(f"blind {name}", 32)
        xs, length = list(range(1, len(HOLDERS) + 1)), len(secret)
        points = {0: secret} | {
            x: (MARK * 8)[:length] if x == 1 else material(f"{name} {x}", length) for x in xs[: threshold - 1]
        }
        shift = 16  # no index may be 0, and in this field f(x + 16) interpolates as f does
        values = interpolate([x ^ shift for x in points], list(points.values()), [x ^ shift for x in xs])
        shares = {node: Share(x, y) for node, x, y in zip(HOLDERS, xs, values, strict=True)}
        salts = {node: material(f"salt {name} {node}", 32) for node in HOLDERS}
        key_id = material(name, 16)
        context = key_id + (1).to_bytes(4, "big")
        holders = [
            Holder(node, share.x, commitment(salts[node], context + (1).to_bytes(4, "big"), share))
            for node, share in shares.items()
        ]
        public = public_key_der(ALGORITHMS[algorithm], key)
        order = self.create_order(name, algorithm, threshold, client)
        manifest = KeyManifest(
            key_id, name, 1, 1, 1, algorithm, threshold, holders, public, check_value(secret, context), order, b""
        )
        raw = self.signed(key_manifests, "key", manifest, "node1")
        return Dealt(open_key_manifest(raw, self.cluster, NOW_MS), secret, shares, salts)

    def refresh_order(self, dealt: Dealt, client: str = "alice") -> bytes:
        """An order to refresh a key."""
        told = dealt.manifest
        order = RefreshOrder(told.key_id, told.name, told.epoch, material(f"nonce {told.name}", 16), NOW_MS + 60_000)
        return self.signed(refresh_orders, "order.refresh", order, client)

    def _refreshed(self, dealt: Dealt) -> KeyRecord:
        """The manifest of a second epoch."""
        old = dealt.manifest
        holders = [Holder(each.node, each.x, material(f"second {each.node}", 32)) for each in old.holders]
        manifest = KeyManifest(
            old.key_id, old.name, 1, 2, 2, old.algorithm, old.threshold, holders, old.public_key, old.check_value,
            old.order, dealt.record.digest, self.refresh_order(dealt),
        )  # fmt: skip
        return open_key_manifest(self.signed(key_manifests, "key", manifest, "node2"), self.cluster, NOW_MS)

    def reshare_order(self, dealt: Dealt, client: str = "alice") -> bytes:
        """An order to share a key of three holders among two others."""
        told, nonce = dealt.manifest, material(f"move {dealt.manifest.name}", 16)
        holders = [HOLDERS[1], NODES[-1]]
        order = ReshareOrder(
            told.key_id, told.name, told.epoch, 2, holders, [HOLDERS[0]], nonce, NOW_MS + 60_000, trial=NODES[-1]
        )
        return self.signed(reshare_orders, "order.reshare", order, client)

    def settings(self, dealt: Dealt, client: str = "alice", *, booked: bool = True) -> bytes:
        """Settings by which a key is to be destroyed, or where they are not booked, by which it is disabled."""
        told = dealt.manifest
        order = SettingsOrder(
            told.name, told.key_id, NOW_MS, NOW_MS - 9, not booked, 1, NOW_MS + 99 if booked else 0, NOW_MS + 60_000
        )
        raw = self.signed(settings_orders, "order.settings", order, client)
        return book_settings(raw, self.keys["balancer"]) if booked else raw

    def renew_order(self, dealt: Dealt) -> bytes:
        """A balancer's order to refresh a key."""
        told = dealt.manifest
        nonce = material(f"renew {told.name}", 16)
        order = RefreshOrder(told.key_id, told.name, told.epoch, nonce, NOW_MS + 60_000, 7)
        return self.signed(refresh_orders, "order.renew", order, "balancer")

    def move_order(self, dealt: Dealt) -> bytes:
        """A balancer's order to put one share of a key elsewhere."""
        told, nonce = dealt.manifest, material(f"place {dealt.manifest.name}", 16)
        holders = [*HOLDERS[1:], NODES[3]]
        order = ReshareOrder(told.key_id, told.name, told.epoch, 2, holders, [], nonce, NOW_MS + 60_000, 7)
        return self.signed(reshare_orders, "order.move", order, "balancer")

    def _placed(self, dealt: Dealt) -> KeyRecord:
        """The manifest of a refresh after a move."""
        old = dealt.manifest
        names = [*HOLDERS[1:], NODES[3]]
        holders = [Holder(node, x, material(f"placed {node}", 32)) for x, node in enumerate(names, 1)]
        order = RefreshOrder(old.key_id, old.name, 2, material("placed", 16), NOW_MS + 60_000, 7)
        manifest = replace(
            old, epoch=3, attempt=3, holders=holders, previous=dealt.record.digest, placing=self.move_order(dealt),
            change=self.signed(refresh_orders, "order.renew", order, "balancer"),
        )  # fmt: skip
        return open_key_manifest(self.signed(key_manifests, "key", manifest, "node2"), self.cluster, NOW_MS)

    def _moved(self, dealt: Dealt) -> KeyRecord:
        """Another manifest of a second epoch: after a reshare."""
        old = dealt.manifest
        holders = [Holder(node, x, material(f"moved {node}", 32)) for x, node in enumerate((HOLDERS[1], NODES[-1]), 1)]
        manifest = KeyManifest(
            old.key_id, old.name, 1, 2, 2, old.algorithm, 2, holders, old.public_key, old.check_value,
            old.order, dealt.record.digest, self.reshare_order(dealt),
        )  # fmt: skip
        return open_key_manifest(self.signed(key_manifests, "key", manifest, "node2"), self.cluster, NOW_MS)

    def _after(self, before: KeyRecord) -> KeyRecord:
        """The manifest of a refresh after that."""
        old = before.manifest
        order = RefreshOrder(old.key_id, old.name, 2, material("after", 16), NOW_MS + 60_000)
        manifest = replace(
            old, epoch=3, attempt=3, previous=before.digest, sharing=old.change,
            change=self.signed(refresh_orders, "order.refresh", order, "alice"),
        )  # fmt: skip
        return open_key_manifest(self.signed(key_manifests, "key", manifest, "node2"), self.cluster, NOW_MS)

    def receipt(self, record: KeyRecord, node: str) -> bytes:
        """A holder's receipt."""
        holder = record.manifest.holder(node)
        assert holder is not None
        return self.signed(receipts, "receipt", Receipt(record.manifest.key_id, record.digest, holder.x), node)

    def certificate(self, record: KeyRecord) -> bytes:
        """The certificate of an epoch."""
        told = [self.receipt(record, node) for node in HOLDERS]
        body = CommitCertificate(record.manifest.key_id, record.digest, told)
        return self.signed(certificates, "certificate", body, "balancer")

    def abort(self, attempt: int = 1) -> bytes:
        """An abort notice."""
        return self.signed(aborts, "abort", AbortNotice(self.first.manifest.key_id, attempt), "balancer")

    def destroy_order(self, dealt: Dealt) -> bytes:
        """An order to destroy a key."""
        order = DestroyOrder(dealt.manifest.key_id, dealt.manifest.name, NOW_MS + 60_000)
        return self.signed(destroy_orders, "order.destroy", order, "alice")

    def grant(self, dealt: Dealt, combiner: str, operation: str = "encrypt", client: str = "alice") -> bytes:
        """A grant."""
        told = dealt.manifest
        grant = Grant(
            told.key_id, told.version, told.epoch, [operation], combiner, NOW_MS, NOW_MS + 10_000,
            material(f"grant {combiner}", 16),
        )  # fmt: skip
        return self.signed(Codec(Grant, "grant", 2048), "grant", grant, client)


_world: list[World] = []


def the_world() -> World:
    """The one of this process."""
    if not _world:
        _world.append(World())
    return _world[0]


# --- envelopes by hand, so that they can be wrong too ---

_LABELS: Final = (b"", b"keyquorum/signed/2\0", b"keyquorum/signed/1", b"keyquorum/commitment/1\0")


def signature(signer: str, body: bytes, how: str) -> bytes:
    """A signature: ``quick``, ``real``, of a ``tree``, ``undomained`` (over the body alone) or under another label."""
    key = private_key(signer) if signer in the_world().keys else private_key("stranger")
    if how == "quick":
        public = the_world().public.get(signer) or the_world().public["stranger"]
        return quick_signature(public, body)
    if how == "tree":
        drawn = hashlib.sha256(body).digest()
        depth = 1 + drawn[0] % 6
        way = bytes([drawn[1] % 2**depth]) + hashlib.shake_256(drawn).digest(32 * depth)
        public = the_world().public.get(signer) or the_world().public["stranger"]
        return quick_signature(public, TREE_LABEL + (root_of(bytes(64) + way, body) or b"")) + way
    if how == "real":
        return key.sign(DOMAIN + body)
    return key.sign(_LABELS[0 if how == "undomained" else int(how)] + body)


def opened(raw: bytes) -> tuple[list[Any], bytes, list[Any]] | None:
    """Fields of the body, the body, and the signatures of an envelope, or None if it is none."""
    try:
        body, signatures = msgpack.unpackb(raw, raw=False)
        fields = msgpack.unpackb(body, raw=False)
        if (
            isinstance(fields, list)
            and len(fields) == 5
            and isinstance(fields[4], bytes)
            and isinstance(signatures, list)
        ):
            return fields, body, signatures
    except Exception:  # whatever that library raises: then it is no envelope
        return None
    return None


def rsa_key() -> rsa.RSAPrivateKey:
    """A fixed RSA-2048 key."""
    p, q = _prime("p"), _prime("q")
    p, q = max(p, q), min(p, q)
    d = pow(65537, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPrivateNumbers(
        p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(65537, p * q)
    )
    return numbers.private_key()


_NEXT_PRIME: Final = {"p": 1508, "q": 20}
"""How far the next prime is from the number that the label gives."""


def _prime(label: str) -> int:
    return (int.from_bytes(material(f"prime {label}", 128), "big") | (3 << 1022) | 1) + _NEXT_PRIME[label]


def ec_key(bits: int) -> ec.EllipticCurvePrivateKey:
    """A fixed key on P-256 or P-384."""
    curve = {256: ec.SECP256R1(), 384: ec.SECP384R1()}[bits]
    return ec.derive_private_key(int.from_bytes(material(f"ec {bits}", bits // 8 - 1), "big"), curve)
