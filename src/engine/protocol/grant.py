"""The grant: a client's signed permission for one combiner to gather the shares of one key. No clock, no socket."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from msgspec import Meta, Struct

from engine.errors import AccessDenied, ManifestError, StaleKey
from engine.keys import USES, RequestType
from engine.protocol.manifest import (
    CLOCK_SKEW_MS,
    Cluster,
    KeyRecord,
    ReshareOrder,
    open_reshare_order,
    trial_of,
)
from engine.protocol.signed import Signed, SigningKey, read_unverified, sign_envelope, verify_envelope
from engine.protocol.wire import Codec, Identifier, Name, UInt

__all__ = [
    "GRANT_LIFETIME_MAX_MS",
    "Grant",
    "check_grant",
    "check_trial_grant",
    "is_trial",
    "issue_grant",
    "issue_trial_grant",
    "read_grant",
]

GRANT_LIFETIME_MAX_MS = 30_000
"""The longest time a grant may be good for."""


class Grant(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``[key_id, version, epoch, operations, combiner, not_before_ms, expires_ms, nonce]``."""

    key_id: Identifier
    version: UInt
    epoch: UInt
    operations: Annotated[list[Annotated[str, Meta(max_length=32)]], Meta(min_length=1, max_length=8)]
    combiner: Name
    not_before_ms: UInt
    expires_ms: UInt
    nonce: Identifier


_grants = Codec(Grant, "grant", 2048)


def issue_grant(
    key: SigningKey, record: KeyRecord, operation: str, combiner: str, now_ms: int, lifetime_ms: int, nonce: bytes
) -> bytes:
    """A grant for ``combiner`` to gather this key, signed by the client's ``key``."""
    if not 1 <= lifetime_ms <= GRANT_LIFETIME_MAX_MS:
        raise ValueError(f"a grant's lifetime of {lifetime_ms} ms is not in 1..{GRANT_LIFETIME_MAX_MS}")
    manifest = record.manifest
    payload = _grants.encode(
        Grant(
            key_id=manifest.key_id,
            version=manifest.version,
            epoch=manifest.epoch,
            operations=[operation],
            combiner=combiner,
            not_before_ms=now_ms,
            expires_ms=now_ms + lifetime_ms,
            nonce=nonce,
        )
    )
    return sign_envelope("grant", now_ms, payload, key)


def issue_trial_grant(
    key: SigningKey, order: ReshareOrder, version: int, now_ms: int, lifetime_ms: int, nonce: bytes
) -> bytes:
    """A grant for the node that a reshare order has try the new epoch: to gather its shares while they are prepared."""
    epoch = order.from_epoch + 1
    grant = Grant(order.key_id, version, epoch, [RequestType.RESHARE], order.trial, now_ms, now_ms + lifetime_ms, nonce)
    return sign_envelope("grant", now_ms, _grants.encode(grant), key)


def is_trial(raw: bytes) -> bool:
    """Whether it is a grant for the trial of a new epoch, unchecked."""
    signed = read_unverified(raw)
    return signed.kind == "grant" and _grants.decode(signed.payload).operations == [RequestType.RESHARE]


def read_grant(raw: bytes) -> Grant:
    """What a grant says, without any check: to learn that somebody speaks of another epoch."""
    return _grants.decode(read_unverified(raw).payload)


def check_trial_grant(
    raw: bytes, record: KeyRecord, combiner: str, cluster: Cluster, now_ms: int
) -> tuple[Grant, Signed]:
    """As ``check_grant``, of a grant for the trial of an epoch that is prepared, by the node that its order names.

    Both are of the same client.
    """
    grant, signed = _check_grant(raw, record, combiner, cluster, now_ms, (RequestType.RESHARE,))
    _, ordered = open_reshare_order(record.manifest.change, cluster, now_ms)
    if (combiner, signed.issuer) != (trial_of(record.manifest), ordered.issuer):
        raise AccessDenied(f"{ordered.issuer!r} did not order that {combiner!r} tries the key {record.manifest.name!r}")
    return grant, signed


def check_grant(raw: bytes, record: KeyRecord, combiner: str, cluster: Cluster, now_ms: int) -> tuple[Grant, Signed]:
    """The grant, if it lets ``combiner`` gather this key now.

    Checked, each by every holder for itself and the cheap first: the key's version and epoch, the combiner's name and
    that it is eligible (a holder of the key), the time with a skew of 5 s, the client's signature, and its right to
    every operation named. ``AccessDenied``, ``StaleKey`` or ``ManifestError`` says which failed. That the grant was not
    used before is not checked here.
    """
    return _check_grant(raw, record, combiner, cluster, now_ms, USES)


def _check_grant(
    raw: bytes, record: KeyRecord, combiner: str, cluster: Cluster, now_ms: int, allowed: Collection[str]
) -> tuple[Grant, Signed]:
    told: list[Grant] = []

    def cheap(unverified: Signed) -> None:
        told.append(_grants.decode(unverified.payload))
        _check_fit(told[0], record, combiner)
        _check_time(told[0], now_ms)

    signed = verify_envelope(raw, "grant", cluster.sign_key("client"), before=cheap)
    name = record.manifest.name
    for operation in told[0].operations:
        if operation not in allowed or not cluster.allows(signed.issuer, operation, name):
            raise AccessDenied(f"{signed.issuer!r} may not {operation} with the key {name!r}")
    return told[0], signed


def _check_fit(grant: Grant, record: KeyRecord, combiner: str) -> None:
    manifest = record.manifest
    if grant.key_id != manifest.key_id:
        raise StaleKey(f"the grant is for another key than {manifest.name!r}")
    if (grant.version, grant.epoch) != (manifest.version, manifest.epoch):
        raise StaleKey(
            f"the grant is for version {grant.version} epoch {grant.epoch} of {manifest.name!r}, "
            f"held are version {manifest.version} epoch {manifest.epoch}"
        )
    if grant.combiner != combiner:
        raise AccessDenied(f"the grant is for the combiner {grant.combiner!r}, {combiner!r} asks")
    if manifest.holder(combiner) is None:
        raise AccessDenied(f"{combiner!r} is no eligible combiner of {manifest.name!r}")


def _check_time(grant: Grant, now_ms: int) -> None:
    lifetime_ms = grant.expires_ms - grant.not_before_ms
    if lifetime_ms > GRANT_LIFETIME_MAX_MS:
        raise ManifestError(f"grant: it lives {lifetime_ms} ms, at most {GRANT_LIFETIME_MAX_MS}")
    if now_ms + CLOCK_SKEW_MS < grant.not_before_ms:
        raise ManifestError(f"grant: it begins in {grant.not_before_ms - now_ms} ms")
    if now_ms > grant.expires_ms + CLOCK_SKEW_MS:
        raise ManifestError(f"grant: it expired {now_ms - grant.expires_ms} ms ago")
