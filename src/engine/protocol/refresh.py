"""The documents of a refresh or reshare: what each dealer is bound to, and what each holder says of its new share.

It seals, signs and checks; it opens no socket, reads no clock and draws no randomness. docs/protocol.md has the
argument.

A *deal* is one holder's sharing of zero for all, or in a reshare its sharing of its share for the new holders
(``engine.protocol.reshare``); a *part* is what it deals one of them. Everything is bound to the *terms*: the epoch that
is replaced, the attempt and the client's order.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from cryptography.exceptions import InvalidTag as PycaInvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta, Struct

from engine.errors import ManifestError, ShareCorrupt
from engine.protocol.manifest import (
    MAX_HOLDERS,
    Cluster,
    Holder,
    KeyRecord,
    RefreshOrder,
    ReshareOrder,
    check_dealers,
    read_change_order,
)
from engine.protocol.signed import Signed, SigningKey, read_unverified, sign_envelope, verify_envelope
from engine.protocol.wire import MAX_MESSAGE, Codec, Digest, Identifier
from engine.sharing import (
    FINGERPRINT_BYTES,
    SALT_BYTES,
    Share,
    commitment,
    fingerprint,
    refresh_share,
    zero_sharing_faults,
)

__all__ = [
    "BadDeal",
    "Deal",
    "NewShare",
    "Opener",
    "PartStatement",
    "Sealer",
    "Terms",
    "check_complete",
    "check_parts",
    "check_size",
    "deal_parts",
    "deals_digest",
    "new_share",
    "open_deals",
    "open_part_statement",
    "open_parts",
    "sign_part_statement",
    "unlike_deal",
    "weights",
]

EXCHANGES_KEPT: Final = 64
PART_OVERHEAD: Final = FINGERPRINT_BYTES + SALT_BYTES + 32 + 16
"""Bytes of a sealed part beyond the share's own: mask, salt, the ephemeral key, the tag."""
STATEMENT_BYTES: Final = 840
"""No statement is longer than this, but for its lists: envelope, two names of 128 characters, digests."""
_MARGIN: Final = 4096

_PART_LABEL = b"keyquorum/refresh-part/1\0"
_COMMITMENT_LABEL = b"keyquorum/refresh-commitment/1\0"
_WEIGHTS_LABEL = b"keyquorum/refresh-weights/1\0"
_DEALS_LABEL = b"keyquorum/refresh-deals/1\0"
_SALT_LABEL = b"keyquorum/refresh-salt/1\0"

Fingerprint = Annotated[bytes, Meta(min_length=16, max_length=16)]


class RefreshDeal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A dealer's signed word on what it dealt: ``[key_id, version, epoch, attempt, order, previous, commitments]``."""

    key_id: Identifier
    version: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    epoch: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    attempt: Annotated[int, Meta(ge=1, le=2**31)]
    order: Digest
    previous: Digest
    commitments: Annotated[list[Digest], Meta(min_length=1, max_length=MAX_HOLDERS)]


class RefreshPart(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A holder's signed word on its new share: ``[key_id, version, epoch, attempt, deals, x, commitment, values]``.

    The values are one for each deal, and in a reshare one more for each deal beyond the old threshold.
    """

    key_id: Identifier
    version: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    epoch: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    attempt: Annotated[int, Meta(ge=1, le=2**31)]
    deals: Digest
    x: Annotated[int, Meta(ge=1, le=255)]
    commitment: Digest
    values: Annotated[list[Fingerprint], Meta(min_length=1, max_length=MAX_HOLDERS)]


refresh_deals = Codec(RefreshDeal, "refresh deal", 4096)
refresh_parts = Codec(RefreshPart, "refresh part", 4096)


class BadDeal(ShareCorrupt):
    """A deal that can't be used; ``holders`` begins with its dealer."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a change is about: the committed epoch before it, the registry's attempt, the order and its digest."""

    before: KeyRecord
    attempt: int
    order: bytes
    change: RefreshOrder | ReshareOrder

    @classmethod
    def of(cls, before: KeyRecord, attempt: int, raw_order: bytes) -> Terms:
        """The terms of an order that was opened before."""
        return cls(before, attempt, read_unverified(raw_order).digest, read_change_order(raw_order))

    @property
    def holders(self) -> list[Holder]:
        """Who gets a share of the new epoch, in its manifest's order; after a reshare without commitments."""
        if isinstance(self.change, ReshareOrder):
            return [Holder(node, x, bytes(32)) for x, node in enumerate(self.change.holders, 1)]
        return self.before.manifest.holders

    @property
    def dealers(self) -> list[Holder]:
        """The holders of the old epoch that deal, in its manifest's order."""
        if isinstance(self.change, ReshareOrder):
            return [each for each in self.before.manifest.holders if each.node not in self.change.without]
        return self.before.manifest.holders

    def holder(self, node: str) -> Holder | None:
        """The node's own entry among ``holders``."""
        return next((holder for holder in self.holders if holder.node == node), None)

    @property
    def epoch(self) -> int:
        """The new epoch."""
        return self.before.manifest.epoch + 1

    @property
    def context(self) -> bytes:
        """What the commitments to the new shares hash: id, version, new epoch."""
        return self.before.manifest.key_context + self.epoch.to_bytes(4, "big")

    def part_context(self, dealer: Holder, holder: Holder) -> bytes:
        """The identity of one part, so that none passes for another."""
        return b"".join(
            (
                _PART_LABEL,
                self.context,
                self.attempt.to_bytes(4, "big"),
                self.order,
                self.before.digest,
                bytes([dealer.x, holder.x]),
            )
        )

    def told(self) -> tuple[bytes, int, int, int]:
        """The first fields of every statement."""
        manifest = self.before.manifest
        return manifest.key_id, manifest.version, self.epoch, self.attempt


@dataclass(frozen=True, slots=True)
class Deal:
    """A verified statement of a dealer."""

    dealer: Holder
    digest: bytes
    commitments: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NewShare:
    """A holder's share of the new epoch, its salt, and its values of the linear check, one for each deal."""

    share: Share
    salt: bytes
    values: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"NewShare(x={self.share.x})"


@dataclass(frozen=True, slots=True)
class PartStatement:
    """A verified statement of a holder."""

    holder: Holder
    commitment: bytes
    values: tuple[bytes, ...]


def check_size(record: KeyRecord, length: int) -> None:
    """Refuse a refresh whose messages would not fit, before anything is begun; ``length`` is the share's at most."""
    manifest = record.manifest
    shares, threshold = manifest.shares, manifest.threshold
    part = length + PART_OVERHEAD + 3
    deal = STATEMENT_BYTES + 34 * shares
    statement = STATEMENT_BYTES + 18 * threshold
    deals = deal + shares * part
    renew = len(record.raw) + threshold * (deal + part) + shares * statement
    longest = max(deals, renew) + _MARGIN
    if longest > MAX_MESSAGE:
        raise ValueError(
            f"{manifest.name!r} can't be refreshed: {threshold}-of-{shares} with shares of {length} bytes takes "
            f"messages of {longest} bytes, the limit is {MAX_MESSAGE}"
        )


# --- the dealer's side ---


def deal_parts(
    terms: Terms,
    key: SigningKey,
    cluster: Cluster,
    updates: Sequence[Share],
    serial: int,
    random_bytes: bytes,
    sealer: Sealer,
) -> tuple[bytes, list[bytes]]:
    """Deal a sharing of zero (``deal_zero``) or of the own share (``deal_sub_shares``): the statement and sealed parts.

    ``updates`` are of the share and the mask, in the new manifest's order. ``random_bytes`` are 32 for each holder: its
    contribution to the salt.
    """
    manifest = terms.before.manifest
    dealer = next((each for each in terms.dealers if each.node == key.name), None)
    if dealer is None:
        raise ManifestError(f"{key.name!r} is no holder of {manifest.name!r} that deals")
    if len(random_bytes) != SALT_BYTES * len(terms.holders):
        raise ValueError(f"{len(random_bytes)} random bytes for {len(terms.holders)} holders; 32 each are needed")
    commitments, parts = [], []
    for place, (holder, update) in enumerate(zip(terms.holders, updates, strict=True)):
        node = cluster.nodes.get(holder.node)
        if node is None:
            raise ManifestError(f"the holder {holder.node!r} of {manifest.name!r} is no node of the cluster")
        plain = update.y + random_bytes[SALT_BYTES * place : SALT_BYTES * (place + 1)]
        context = terms.part_context(dealer, holder)
        commitments.append(_part_commitment(context, plain))
        parts.append(sealer.seal(node.curve_public, plain, context))
    payload = refresh_deals.encode(RefreshDeal(*terms.told(), terms.order, terms.before.digest, commitments))
    return sign_envelope("refresh.deal", serial, payload, key), parts


class Sealer:
    """Encrypts parts to X25519 public keys: ephemeral key, HKDF-SHA256 over the part's context, AES-256-GCM.

    The key is used once, so the nonce is zero. One ephemeral key does for many parts, each of another context: a dealer
    exchanges it once with each holder, and a holder once with each dealer. ``random_bytes`` are 32.
    """

    def __init__(self, random_bytes: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(random_bytes)
        self._sent = self._private.public_key().public_bytes_raw()
        self._shared: dict[bytes, bytes] = {}
        self._used: set[bytes] = set()

    def __repr__(self) -> str:
        return f"Sealer({len(self._used)})"

    def seal(self, public: bytes, plain: bytes, context: bytes) -> bytes:
        """The sealed part; ``ValueError`` for a context that was sealed for before, whose key would be used twice."""
        if context in self._used:
            raise ValueError("a part of this context was sealed before; its key is good for one")
        self._used.add(context)
        shared = self._shared.get(public)
        if shared is None:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
            self._shared[public] = shared
        return self._sent + AESGCM(_part_key(shared, self._sent, public, context)).encrypt(bytes(12), plain, None)


class Opener:
    """A holder's X25519 key, with what it exchanged of late: a dealer sends one ephemeral key with many parts."""

    def __init__(self, secret: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(secret)
        self._public = self._private.public_key().public_bytes_raw()
        self._shared: dict[bytes, bytes] = {}

    def __repr__(self) -> str:
        return f"Opener({len(self._shared)})"

    @property
    def public(self) -> bytes:
        """Its public key, 32 bytes."""
        return self._public

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """The plain part; ``InvalidTag`` of pyca/cryptography, or ``ValueError``, if it does not open."""
        sent = sealed[:32]
        shared = self._shared.get(sent)
        if shared is None:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(sent))
            while len(self._shared) >= EXCHANGES_KEPT:
                del self._shared[next(iter(self._shared))]
            self._shared[sent] = shared
        return AESGCM(_part_key(shared, sent, self._public, context)).decrypt(bytes(12), sealed[32:], None)


def _part_key(shared: bytes, sent: bytes, public: bytes, context: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, context + sent + public).derive(shared)


def _part_commitment(context: bytes, plain: bytes) -> bytes:
    return hashlib.sha256(_COMMITMENT_LABEL + context + plain).digest()


# --- the holder's side ---


def open_deals(terms: Terms, raws: Sequence[bytes], cluster: Cluster) -> list[Deal]:
    """The deals, if they are as many as must be, each by another dealer, in the manifest's order, and of these terms.

    A refresh takes exactly t: so at least one dealer is honest, as long as fewer than t collude. A reshare takes those
    of all its dealers: t + 1 at least, or t if its order has the new epoch tried.
    """
    manifest = terms.before.manifest
    dealers = terms.dealers
    needed = manifest.threshold if isinstance(terms.change, RefreshOrder) else len(dealers)
    if len(raws) != needed:
        raise ManifestError(f"{len(raws)} deals for {manifest.name!r}; exactly {needed} are needed")
    if isinstance(terms.change, ReshareOrder):
        check_dealers(terms.change, manifest)
    deals = [open_deal(terms, raw, cluster) for raw in raws]
    places = [dealers.index(deal.dealer) for deal in deals]
    if places != sorted(set(places)):
        raise ManifestError(f"the deals for {manifest.name!r} are not in the manifest's order, one of each dealer")
    return deals


def open_deal(terms: Terms, raw: bytes, cluster: Cluster) -> Deal:
    """One deal, its signature and its terms checked."""
    signed = verify_envelope(raw, "refresh.deal", cluster.sign_key("node"))
    statement = refresh_deals.decode(signed.payload)
    dealer = _entry(terms, signed, terms.dealers)
    told = (statement.key_id, statement.version, statement.epoch, statement.attempt)
    if (told, statement.order, statement.previous) != (terms.told(), terms.order, terms.before.digest):
        raise ManifestError(f"the deal of {signed.issuer!r} is of another refresh than attempt {terms.attempt}")
    if len(statement.commitments) != len(terms.holders):
        raise ManifestError(f"the deal of {signed.issuer!r} has {len(statement.commitments)} parts")
    return Deal(dealer, signed.digest, tuple(statement.commitments))


def _entry(terms: Terms, signed: Signed, among: Sequence[Holder]) -> Holder:
    holder = next((each for each in among if each.node == signed.issuer), None)
    if holder is None:
        raise ManifestError(f"{signed.issuer!r} is no holder of {terms.before.manifest.name!r}")
    return holder


def new_share(
    terms: Terms, deals: Sequence[Deal], parts: Sequence[bytes], old: Share, node: str, opener: Opener
) -> NewShare:
    """What a holder's share becomes by what was dealt to it; ``BadDeal`` names the dealer of a part that is wrong."""
    manifest = terms.before.manifest
    mine = manifest.holder(node)
    if mine is None or mine.x != old.x:
        raise ManifestError(f"{node!r} holds no share of {manifest.name!r} with x = {old.x}")
    updates, values = [], []
    opened = open_parts(terms, deals, parts, node, opener)
    for deal, update in zip(deals, opened.shares, strict=True):
        if len(update.y) != len(old.y) + FINGERPRINT_BYTES:
            raise BadDeal(f"{deal.dealer.node} dealt {node} {len(update.y)} bytes", [deal.dealer.node])
        values.append(fingerprint(update, weights(deal, len(old.y))).y)
        updates.append(Share(mine.x, update.y[: len(old.y)]))
    return NewShare(refresh_share(old, updates), opened.salt, tuple(values))


@dataclass(frozen=True, slots=True)
class OpenedParts:
    """What was dealt one holder, mask and all, in the order of the deals, and the salt of its new share."""

    shares: tuple[Share, ...]
    salt: bytes

    def __repr__(self) -> str:
        return f"OpenedParts({len(self.shares)})"


def open_parts(terms: Terms, deals: Sequence[Deal], parts: Sequence[bytes], node: str, opener: Opener) -> OpenedParts:
    """The parts dealt to ``node``, each decrypted and held against its dealer's commitment; else ``BadDeal``."""
    manifest = terms.before.manifest
    mine = terms.holder(node)
    if mine is None:
        raise ManifestError(f"{node!r} is not to hold a share of {manifest.name!r}")
    if len(parts) != len(deals):
        raise ManifestError(f"{len(parts)} parts of {len(deals)} deals for {manifest.name!r}")
    place = terms.holders.index(mine)
    shares, salts = [], hashlib.sha256(_SALT_LABEL + terms.context + bytes([mine.x]))
    for deal, sealed in zip(deals, parts, strict=True):
        plain = _open_part(opener, sealed, terms.part_context(deal.dealer, mine), deal, place)
        if len(plain) <= FINGERPRINT_BYTES + SALT_BYTES:
            raise BadDeal(f"{deal.dealer.node} dealt {node} {len(plain)} bytes", [deal.dealer.node])
        shares.append(Share(mine.x, plain[:-SALT_BYTES]))
        salts.update(plain[-SALT_BYTES:])
    return OpenedParts(tuple(shares), salts.digest())


def _open_part(opener: Opener, sealed: bytes, context: bytes, deal: Deal, place: int) -> bytes:
    """A part decrypted and held against its dealer's commitment."""
    try:
        plain = opener.open(sealed, context)
    except (PycaInvalidTag, ValueError):
        raise BadDeal(f"a part that {deal.dealer.node} dealt does not open", [deal.dealer.node]) from None
    if not hmac.compare_digest(_part_commitment(context, plain), deal.commitments[place]):
        raise BadDeal(f"a part that {deal.dealer.node} dealt is not the one it committed to", [deal.dealer.node])
    return plain


def weights(deal: Deal, length: int) -> list[bytes]:
    """The public weights of a deal's linear check: a function of the dealer's own statement alone.

    If they depended on what else a coordinator puts together, it could have one deal answered under many weights, and
    the answers would show the update.
    """
    stream = hashlib.shake_256(_WEIGHTS_LABEL + deal.digest).digest(FINGERPRINT_BYTES * length)
    return [stream[row * length : (row + 1) * length] for row in range(FINGERPRINT_BYTES)]


def deals_digest(deals: Sequence[Deal]) -> bytes:
    """The hash of all deals: which ones a statement is on."""
    return hashlib.sha256(_DEALS_LABEL + b"".join(deal.digest for deal in deals)).digest()


def sign_part_statement(terms: Terms, deals: Sequence[Deal], new: NewShare, key: SigningKey, serial: int) -> bytes:
    """The holder's statement on its new share."""
    told = commitment(new.salt, terms.context, new.share)
    statement = RefreshPart(*terms.told(), deals_digest(deals), new.share.x, told, list(new.values))
    return sign_envelope("refresh.part", serial, refresh_parts.encode(statement), key)


def open_part_statement(terms: Terms, deals: Sequence[Deal], raw: bytes, cluster: Cluster) -> PartStatement:
    """A holder's statement, its signature, terms and deals checked."""
    signed = verify_envelope(raw, "refresh.part", cluster.sign_key("node"))
    statement = refresh_parts.decode(signed.payload)
    holder = _entry(terms, signed, terms.holders)
    told = (statement.key_id, statement.version, statement.epoch, statement.attempt)
    if (told, statement.deals) != (terms.told(), deals_digest(deals)):
        raise ManifestError(f"the statement of {signed.issuer!r} is of another refresh than attempt {terms.attempt}")
    count = len(deals) + (len(deals) - terms.before.manifest.threshold)
    if statement.x != holder.x or len(statement.values) != count:
        raise ManifestError(f"the statement of {signed.issuer!r} is not for its share, or not on all deals")
    return PartStatement(holder, statement.commitment, tuple(statement.values))


def check_parts(terms: Terms, deals: Sequence[Deal], statements: Sequence[PartStatement]) -> None:
    """The linear check: every deal shares zero, with the degree of the key's sharing, to all holders.

    ``BadDeal`` names the dealer, and the holders whose values do not fit the others': one of the two lies.
    """
    manifest = terms.before.manifest
    check_complete(terms, statements)
    for place, deal in enumerate(deals):
        values = [Share(each.holder.x, each.values[place]) for each in statements]
        faults = zero_sharing_faults(values, threshold=manifest.threshold)
        if faults == ():
            continue
        dealer = deal.dealer.node
        if faults is None:
            raise unlike_deal(
                dealer, f"dealt for {manifest.name!r} does not share zero as it must", statements, manifest.threshold
            )
        liars = [each.holder.node for each in statements if each.holder.x in faults]
        raise BadDeal(
            f"what {dealer} dealt for {manifest.name!r} does not fit what {', '.join(liars)} tells of it",
            [dealer, *liars],
        )


def unlike_deal(dealer: str, what: str, statements: Sequence[PartStatement], threshold: int) -> BadDeal:
    """Values of a deal that are no sharing: its dealer is named, and all holders where a lie of one looks the same.

    That is so while they are fewer than two more than the threshold.
    """
    holders = [each.holder.node for each in statements] if len(statements) < threshold + 2 else []
    told = ", or a holder tells it wrong" if holders else ""
    return BadDeal(f"what {dealer} {what}{told}", [dealer, *holders])


def check_complete(terms: Terms, statements: Sequence[PartStatement]) -> None:
    """Refuse statements that are not one of each new holder, in order."""
    if [each.holder for each in statements] != terms.holders:
        raise ManifestError(
            f"the statements on the new shares of {terms.before.manifest.name!r} are not one of each holder, in order"
        )
