"""The documents of a backup: recovery cards, export orders, archives and the operators' contributions to a restore.

It seals, signs and checks; it opens no socket and no file, reads no clock and draws no randomness. An *archive* is what
one node gives away of its shares: a head, pages and an end, each signed by the node. The shares in it are encrypted
under an archive key, which is split among operators: each has a *piece* of it in the head, sealed to a recovery key.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from cryptography.exceptions import InvalidTag as PycaInvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Meta, Struct

from engine.errors import ManifestError, ProtocolError, ShareCorrupt
from engine.protocol.manifest import CLOCK_SKEW_MS, Cluster, KeyRecord, open_certificate, open_key_manifest
from engine.protocol.refresh import Opener, Sealer
from engine.protocol.signed import (
    Signed,
    SigningKey,
    add_signature,
    read_unverified,
    sign_envelope,
    verify_envelope,
)
from engine.protocol.wire import MAX_MESSAGE, Codec, Digest, Identifier, Name, Text, UInt
from engine.sharing import SALT_BYTES, SecretBuffer, Share, commitment, reconstruct_into

__all__ = [
    "ORDER_LIFETIME_MAX_MS",
    "PAGE_BYTES",
    "RECIPIENTS_MAX",
    "Archive",
    "ArchiveEnd",
    "ArchiveHead",
    "ArchiveReader",
    "ArchivedKey",
    "Contribution",
    "ExportOrder",
    "Piece",
    "add_order_signature",
    "check_combined",
    "check_quorum",
    "contribute",
    "decrypt_share",
    "encrypt_share",
    "issue_export_order",
    "key_record",
    "open_contribution",
    "open_export_order",
    "open_piece",
    "open_recovery_card",
    "piece_context",
    "piece_seal_context",
    "read_export_order",
    "sign_recovery_card",
]

RECIPIENTS_MAX: Final = 32
"""Most operators among whom an archive key is split."""
ORDER_LIFETIME_MAX_MS: Final = 31 * 24 * 3_600_000
"""How long an export order or a contribution is good at most: operators sign on machines without a network."""
ORDER_BYTES: Final = 24 * 1024
HEAD_BYTES: Final = 40 * 1024
PAGE_BYTES: Final = 40 * 1024
"""A page ends when it has so many bytes of documents and shares."""
PIECE_BYTES: Final = 32 + SALT_BYTES + 32 + 16
"""A sealed piece: ephemeral key, salt, value, tag."""
KEY_BYTES: Final = 32

_RECOVERY_KIND = "recovery"
_ORDER_KIND = "order.export"
_HEAD_KIND = "backup.head"
_PAGE_KIND = "backup.page"
_END_KIND = "backup.end"
_PIECE_KIND = "backup.piece"

_PIECE_LABEL = b"keyquorum/backup-piece/1\0"
_SEAL_LABEL = b"keyquorum/backup-seal/1\0"
_RESEAL_LABEL = b"keyquorum/backup-reseal/1\0"

RecoveryPublic = Annotated[bytes, Meta(min_length=32, max_length=32)]
SealedPiece = Annotated[bytes, Meta(min_length=PIECE_BYTES, max_length=PIECE_BYTES)]
Document = Annotated[bytes, Meta(max_length=48 * 1024)]


class RecoveryCard(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An operator's recovery key, X25519, signed by the operator: ``[name, public]``."""

    name: Name
    public: RecoveryPublic


class ExportOrder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The operators' order that every node give away its shares, encrypted, to be brought by one client.

    ``cluster`` is the pin. ``recipients`` are recovery cards: any ``threshold`` of these operators can open an archive.
    ``courier`` is the client.
    """

    export_id: Identifier
    cluster: Digest
    threshold: Annotated[int, Meta(ge=1, le=RECIPIENTS_MAX)]
    recipients: Annotated[list[Annotated[bytes, Meta(max_length=512)]], Meta(min_length=1, max_length=RECIPIENTS_MAX)]
    courier: Name
    expires_ms: UInt


class Piece(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One operator's piece of an archive key: ``[operator, x, commitment, sealed]``."""

    operator: Name
    x: Annotated[int, Meta(ge=1, le=RECIPIENTS_MAX)]
    commitment: Digest
    sealed: SealedPiece


class ArchiveHead(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an archive begins with: ``[order, run, node, serial, made_ms, keys, pieces]``.

    ``run`` is a random id of this archive, ``serial`` that of the node's cluster manifest, ``keys`` how many keys and
    versions the node knew.
    """

    order: Annotated[bytes, Meta(max_length=ORDER_BYTES)]
    run: Identifier
    node: Name
    serial: UInt
    made_ms: UInt
    keys: UInt
    pieces: Annotated[list[Piece], Meta(min_length=1, max_length=RECIPIENTS_MAX)]


class ArchivedKey(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a node knows of one version of a key: ``[key_id, state, manifest, certificate, document, settings, ...]``.

    ``document`` is what destroyed it. ``sealed`` is the node's share under the archive key; empty where it has none, or
    could not open it, which ``problem`` says then.
    """

    key_id: Identifier
    state: Literal["committed", "moved", "destroyed"]
    manifest: Document
    certificate: Document
    document: Document
    settings: Annotated[bytes, Meta(max_length=2048)]
    sealed: Annotated[bytes, Meta(max_length=9 * 1024)]
    problem: Text


class ArchivePage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``[run, index, previous, keys]``; ``previous`` is the hash of the page before, or of the head."""

    run: Identifier
    index: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    previous: Digest
    keys: Annotated[list[ArchivedKey], Meta(min_length=1, max_length=1024)]


class ArchiveEnd(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``[run, pages, keys, shares, last]``: what was in it; ``last`` is the hash of the last page, or of the head."""

    run: Identifier
    pages: UInt
    keys: UInt
    shares: UInt
    last: Digest


class Contribution(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An operator's piece of an archive key, sealed to the node that is to restore it, until a time.

    ``head`` is the hash of the archive's head, ``public`` the node's X25519 key.
    """

    run: Identifier
    head: Digest
    node: Name
    public: RecoveryPublic
    x: Annotated[int, Meta(ge=1, le=RECIPIENTS_MAX)]
    sealed: SealedPiece
    expires_ms: UInt


recovery_cards: Final = Codec(RecoveryCard, "recovery card", 256)
export_orders: Final = Codec(ExportOrder, "export order", ORDER_BYTES)
archive_heads: Final = Codec(ArchiveHead, "archive head", HEAD_BYTES)
archive_pages: Final = Codec(ArchivePage, "archive page", MAX_MESSAGE)
archive_ends: Final = Codec(ArchiveEnd, "archive end", 256)
contributions: Final = Codec(Contribution, "contribution", 512)


# --- the operators' side ---


def sign_recovery_card(name: str, public: bytes, key: SigningKey) -> bytes:
    """An operator's recovery card, signed by the key of its identity."""
    return sign_envelope(_RECOVERY_KIND, 1, recovery_cards.encode(RecoveryCard(name, public)), key)


def open_recovery_card(raw: bytes, cluster: Cluster, *, ever: bool = False) -> RecoveryCard:
    """A recovery card of one of today's operators; with ``ever`` of any that the cluster had."""
    keys = cluster.sign_key_ever("operator") if ever else cluster.sign_key("operator")
    signed = verify_envelope(raw, _RECOVERY_KIND, keys)
    card = recovery_cards.decode(signed.payload)
    if card.name != signed.issuer:
        raise ManifestError(f"recovery card: issued by {signed.issuer!r} for {card.name!r}")
    return card


def issue_export_order(order: ExportOrder, key: SigningKey, now_ms: int) -> bytes:
    """The order with its first operator's signature."""
    return sign_envelope(_ORDER_KIND, now_ms, export_orders.encode(order), key)


def add_order_signature(raw: bytes, key: SigningKey) -> bytes:
    """The order with one more operator's."""
    return add_signature(raw, key)


def read_export_order(raw: bytes) -> tuple[ExportOrder, Signed]:
    """An order without any check, to be shown or countersigned."""
    signed = read_unverified(raw)
    if signed.kind != _ORDER_KIND:
        raise ManifestError(f"a signed {signed.kind!r} came where an export order was expected")
    return export_orders.decode(signed.payload), signed


def open_export_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[ExportOrder, list[RecoveryCard]]:
    """The order and its recipients; ``ManifestError`` says what is wrong with it.

    Where it is carried out, at ``now_ms``, the quorum of today's operators must have signed it, and all recipients be
    among them. Without a time it is that of an archive that exists: then an operator that the cluster ever had does.
    """
    ever = now_ms is None
    order, _ = read_export_order(raw)
    if order.cluster != cluster.pin:
        raise ManifestError(
            f"export order: of the cluster with the pin {order.cluster.hex()}, this one is {cluster.pin.hex()}"
        )
    if now_ms is not None:
        _check_lifetime("export order", order.expires_ms, now_ms)
    keys = cluster.sign_key_ever("operator") if ever else cluster.sign_key("operator")
    verify_envelope(raw, _ORDER_KIND, keys, threshold=1 if ever else cluster.quorum)
    cards = [open_recovery_card(each, cluster, ever=ever) for each in order.recipients]
    if len({card.name for card in cards}) != len(cards) or len({card.public for card in cards}) != len(cards):
        raise ManifestError("export order: a recipient, or a recovery key, is in it twice")
    if order.threshold > len(cards):
        raise ManifestError(f"export order: threshold {order.threshold} of {len(cards)} recipients")
    if not ever and order.threshold < cluster.quorum:
        raise ManifestError(
            f"export order: {order.threshold} operators could open the archives, the quorum is {cluster.quorum}"
        )
    return order, cards


def check_quorum(raw: bytes, cluster: Cluster) -> None:
    """Refuse an order that the quorum of this manifest's operators has not signed, whatever the time is."""
    verify_envelope(raw, _ORDER_KIND, cluster.sign_key("operator"), threshold=cluster.quorum)


def _check_lifetime(what: str, expires_ms: int, now_ms: int) -> None:
    if expires_ms + CLOCK_SKEW_MS < now_ms:
        raise ManifestError(f"{what}: expired {now_ms - expires_ms} ms ago")
    if expires_ms > now_ms + ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS:
        raise ManifestError(f"{what}: expires in {expires_ms - now_ms} ms, the limit is {ORDER_LIFETIME_MAX_MS}")


# --- the pieces of an archive key ---


def piece_context(run: bytes, node: str) -> bytes:
    """What the commitments to the pieces of an archive key hash."""
    return _PIECE_LABEL + run + node.encode()


def piece_seal_context(run: bytes, node: str, operator: str) -> bytes:
    """The identity of a sealed piece in a head, so that none passes for another."""
    return _SEAL_LABEL + run + msgspec.msgpack.encode([node, operator])


def _reseal_context(head: bytes, node: str, operator: str, expires_ms: int) -> bytes:
    return _RESEAL_LABEL + head + msgspec.msgpack.encode([node, operator, expires_ms])


def _check_piece(plain: bytes, piece: Piece, run: bytes, node: str) -> Share:
    share = Share(piece.x, plain[SALT_BYTES:])
    told = commitment(plain[:SALT_BYTES], piece_context(run, node), share)
    if not hmac.compare_digest(told, piece.commitment):
        raise ShareCorrupt(
            f"the piece of {piece.operator!r} is not the one that {node!r} committed to", [piece.operator]
        )
    return share


def open_piece(archive: Archive, operator: str, opener: Opener) -> bytes:
    """Salt and value of an operator's piece; ``ManifestError`` if there is none for it, or another recovery key's."""
    piece = archive.piece(operator)
    if piece is None:
        raise ManifestError(f"the archive of {archive.node!r} has no piece for {operator!r}")
    try:
        plain = opener.open(piece.sealed, piece_seal_context(archive.head.run, archive.node, operator))
    except (PycaInvalidTag, ValueError):
        raise ManifestError(
            f"the piece of {operator!r} in the archive of {archive.node!r} does not open with this recovery key"
        ) from None
    _check_piece(plain, piece, archive.head.run, archive.node)
    return plain


def contribute(
    archive: Archive, plain: bytes, key: SigningKey, public: bytes, expires_ms: int, sealer: Sealer, now_ms: int
) -> bytes:
    """An operator's contribution: its opened piece, sealed to the X25519 key of the node that restores the archive."""
    piece = archive.piece(key.name)
    if piece is None:
        raise ManifestError(f"the archive of {archive.node!r} has no piece for {key.name!r}")
    sealed = sealer.seal(public, plain, _reseal_context(archive.digest, archive.node, key.name, expires_ms))
    body = Contribution(archive.head.run, archive.digest, archive.node, public, piece.x, sealed, expires_ms)
    return sign_envelope(_PIECE_KIND, now_ms, contributions.encode(body), key)


def open_contribution(raw: bytes, archive: Archive, cluster: Cluster, now_ms: int) -> tuple[Piece, Contribution]:
    """The piece of today's operator who signed it, and the contribution, if it is for this archive and still good."""
    signed = verify_envelope(raw, _PIECE_KIND, cluster.sign_key("operator"))
    body = contributions.decode(signed.payload)
    if (body.run, body.head, body.node) != (archive.head.run, archive.digest, archive.node):
        raise ManifestError(
            f"the contribution of {signed.issuer!r} is for another archive than this of {archive.node!r}"
        )
    piece = archive.piece(signed.issuer)
    if piece is None or piece.x != body.x:
        raise ManifestError(f"the archive of {archive.node!r} has no piece {body.x} for {signed.issuer!r}")
    _check_lifetime(f"the contribution of {signed.issuer!r}", body.expires_ms, now_ms)
    return piece, body


def check_combined(
    archive: Archive, raws: Sequence[bytes], cluster: Cluster, now_ms: int, opened: Callable[[bytes], Opener | None]
) -> SecretBuffer:
    """The archive key, out of the contributions of enough operators, in locked memory; the caller closes it.

    It takes as many as the order says. ``opened`` gives the opener of an X25519 public key, or None. ``ManifestError``
    tells of too few; a piece that is not the operator's own is named by ``ShareCorrupt``.
    """
    shares: dict[int, Share] = {}
    for raw in raws:
        piece, body = open_contribution(raw, archive, cluster, now_ms)
        operator = piece.operator
        opener = opened(body.public)
        if opener is None:
            raise ManifestError(
                f"the contribution of {operator!r} is for another node's key than that of {body.node!r}"
            )
        try:
            plain = opener.open(body.sealed, _reseal_context(archive.digest, body.node, operator, body.expires_ms))
        except (PycaInvalidTag, ValueError):
            raise ManifestError(f"the contribution of {operator!r} does not open") from None
        shares[body.x] = _check_piece(plain, piece, archive.head.run, archive.node)
    needed = archive.order.threshold
    if len(shares) < needed:
        raise ManifestError(
            f"the archive of {archive.node!r} takes contributions of {needed} operators, there are {len(shares)}"
        )
    return reconstruct_into(list(shares.values())[:needed], threshold=needed)


# --- shares in an archive ---


def _share_aad(archive: Archive, record: KeyRecord, x: int) -> bytes:
    manifest = record.manifest
    return msgspec.msgpack.encode(
        [
            "keyquorum/backup-share/1",
            archive.order.export_id,
            archive.head.run,
            archive.node,
            manifest.key_id,
            manifest.version,
            manifest.epoch,
            x,
            record.digest,
        ]
    )


def encrypt_share(
    key: SecretBuffer, archive: Archive, record: KeyRecord, x: int, plain: SecretBuffer, at: int
) -> bytes:
    """Salt and value of a share under the archive key: nonce, ciphertext and tag; ``at`` is another one each time."""
    nonce = at.to_bytes(12, "big")
    with memoryview(key) as secret, memoryview(plain) as view:
        return nonce + AESGCM(secret).encrypt(nonce, view, _share_aad(archive, record, x))


def decrypt_share(key: SecretBuffer, archive: Archive, record: KeyRecord, x: int, sealed: bytes) -> tuple[Share, bytes]:
    """The share and its salt; ``ShareCorrupt`` if it does not open, or is not the one that the manifest commits to."""
    manifest = record.manifest
    try:
        with memoryview(key) as secret:
            plain = AESGCM(secret).decrypt(sealed[:12], sealed[12:], _share_aad(archive, record, x))
    except (PycaInvalidTag, ValueError):
        raise ShareCorrupt(
            f"the archived share of {archive.node} of {manifest.name!r} does not open", [archive.node]
        ) from None
    mine = manifest.holder(archive.node)
    if len(plain) <= SALT_BYTES or mine is None or mine.x != x:
        raise ShareCorrupt(f"the archived share of {archive.node} of {manifest.name!r} is none of its", [archive.node])
    share, salt = Share(x, plain[SALT_BYTES:]), plain[:SALT_BYTES]
    if not hmac.compare_digest(commitment(salt, manifest.context, share), mine.commitment):
        raise ShareCorrupt(
            f"the archived share of {archive.node} of {manifest.name!r} does not match its commitment", [archive.node]
        )
    return share, salt


# --- the archive ---


@dataclass(frozen=True, slots=True)
class Archive:
    """A verified head of an archive: what it says, its hash, and the order that it rests on."""

    head: ArchiveHead
    digest: bytes
    order: ExportOrder

    @property
    def node(self) -> str:
        """Whose shares they are."""
        return self.head.node

    def piece(self, operator: str) -> Piece | None:
        """An operator's own piece."""
        return next((each for each in self.head.pieces if each.operator == operator), None)

    @classmethod
    def open(cls, raw: bytes, cluster: Cluster) -> Archive:
        """The archive of a head, signed by a node that the cluster has or had."""
        if len(raw) > HEAD_BYTES + 1024:
            raise ProtocolError(f"archive head: {len(raw)} bytes, the limit is {HEAD_BYTES + 1024}")
        order, _ = open_export_order(archive_heads.decode(read_unverified(raw).payload).order, cluster, None)
        signed = verify_envelope(raw, _HEAD_KIND, cluster.sign_key_ever("node"))
        head = archive_heads.decode(signed.payload)
        if head.node != signed.issuer:
            raise ManifestError(f"archive head: issued by {signed.issuer!r} for {head.node!r}")
        names = [open_recovery_card(each, cluster, ever=True).name for each in order.recipients]
        if [(each.operator, each.x) for each in head.pieces] != list(zip(names, range(1, len(names) + 1), strict=True)):
            raise ManifestError(f"archive of {head.node!r}: its pieces are not those of the order's recipients")
        return cls(head, signed.digest, order)

    @classmethod
    def begin(cls, head: ArchiveHead, order: ExportOrder, key: SigningKey) -> tuple[Archive, bytes]:
        """A new archive of this node's, and its signed head."""
        raw = sign_envelope(_HEAD_KIND, head.made_ms, archive_heads.encode(head), key)
        return cls(head, read_unverified(raw).digest, order), raw

    def sign_page(self, index: int, previous: bytes, keys: list[ArchivedKey], key: SigningKey) -> tuple[bytes, bytes]:
        """A signed page, and its hash; ``ValueError`` if it passes what a message takes."""
        payload = archive_pages.encode(ArchivePage(self.head.run, index, previous, keys))
        raw = sign_envelope(_PAGE_KIND, index, payload, key)
        return raw, read_unverified(raw).digest

    def sign_end(self, end: ArchiveEnd, key: SigningKey) -> bytes:
        """The signed end."""
        return sign_envelope(_END_KIND, end.pages + 1, archive_ends.encode(end), key)


class ArchiveReader:
    """Takes the parts of an archive in their order, each checked: signature, place, and in the end the count."""

    def __init__(self, head: bytes, cluster: Cluster) -> None:
        self._cluster = cluster
        self.archive = Archive.open(head, cluster)
        self._last = self.archive.digest
        self._index = self._keys = self._shares = 0
        self.ended = False

    def part(self, raw: bytes) -> list[ArchivedKey]:
        """The keys of the next page; none of the end, after which nothing may come."""
        if self.ended:
            raise ManifestError(f"archive of {self.archive.node!r}: something comes after its end")
        if read_unverified(raw).kind == _END_KIND:
            self.check_end(raw)
            return []
        return self.page(raw)

    def page(self, raw: bytes) -> list[ArchivedKey]:
        """The keys of the next page."""
        node = self.archive.node
        signed = self._own(verify_envelope(raw, _PAGE_KIND, self._cluster.sign_key_ever("node")))
        page = archive_pages.decode(signed.payload)
        if (page.run, page.index, page.previous) != (self.archive.head.run, self._index + 1, self._last):
            raise ManifestError(f"archive of {node!r}: a page {page.index} that is not its page {self._index + 1}")
        self._index, self._last = page.index, signed.digest
        self._keys += len(page.keys)
        self._shares += sum(bool(each.sealed) for each in page.keys)
        return page.keys

    def check_end(self, raw: bytes) -> ArchiveEnd:
        """The end, if it is that of what was read; it is over then."""
        end = self.read_end(raw)
        told = (end.pages, end.keys, end.shares, end.last)
        if told != (self._index, self._keys, self._shares, self._last):
            raise ManifestError(
                f"archive of {self.archive.node!r}: {self._index} pages with {self._keys} keys were read, "
                f"its end tells of {end.pages} with {end.keys}"
            )
        self.ended = True
        return end

    def read_end(self, raw: bytes) -> ArchiveEnd:
        """The end of this archive, which may not have been read yet."""
        signed = self._own(verify_envelope(raw, _END_KIND, self._cluster.sign_key_ever("node")))
        end = archive_ends.decode(signed.payload)
        if end.run != self.archive.head.run:
            raise ManifestError(f"archive of {self.archive.node!r}: its end is of another one")
        return end

    def _own(self, signed: Signed) -> Signed:
        if signed.issuer != self.archive.node:
            raise ManifestError(f"archive of {self.archive.node!r}: a part of it is signed by {signed.issuer!r}")
        return signed


def key_record(key: ArchivedKey, cluster: Cluster) -> KeyRecord:
    """The manifest of an archived key, certified but for a destroyed one; ``EngineError`` says what is wrong."""
    record = open_key_manifest(key.manifest, cluster)
    if record.manifest.key_id != key.key_id:
        raise ManifestError(f"the archived key {key.key_id.hex()} has the manifest of another one")
    if key.certificate or key.state != "destroyed":
        open_certificate(key.certificate, record, cluster)
    return record
