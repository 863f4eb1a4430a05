"""The settings of a key: whether it may be used, from which version on, and when it is to be destroyed.

A client signs them, the registry countersigns what it has booked, and every node keeps and enforces the newest ones for
itself. Times are arguments, in milliseconds since the Unix epoch; it reads no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from engine.errors import AccessDenied, KeyDisabled, ManifestError, VersionRetired
from engine.keys import RequestType
from engine.protocol.manifest import Cluster, check_expiry
from engine.protocol.signed import SigningKey, add_signature, read_unverified, sign_envelope, verify_envelope
from engine.protocol.wire import Codec, Identifier, Name, UInt

__all__ = [
    "DESTROY_DELAY_MAX_MS",
    "KeyState",
    "SettingsOrder",
    "SettingsRecord",
    "book_settings",
    "check_usable",
    "is_settings",
    "issue_settings",
    "open_settings",
    "read_settings",
    "state_of",
]

DESTROY_DELAY_MAX_MS: Final = 366 * 24 * 3_600_000
"""How far ahead a destruction can be ordered."""
MAX_SETTINGS: Final = 2048
"""Longest envelope of settings in bytes."""
_SETTINGS_KIND = "order.settings"

KeyState = Literal["enabled", "disabled", "destroying"]


class SettingsOrder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A client's signed settings of a key, in all its versions; the later ones count.

    ``lineage`` is the ``key_id`` of version 1. ``serial`` is the client's time in milliseconds, but at least one more
    than ``previous``, the serial of those that these were made from (0: there were none).
    ``destroy_at_ms`` is 0 where no destruction is ordered.
    """

    name: Name
    lineage: Identifier
    serial: UInt
    previous: UInt
    enabled: bool
    min_version: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    destroy_at_ms: UInt
    expires_ms: UInt


settings_orders: Final = Codec(SettingsOrder, "key settings", 1024)


@dataclass(frozen=True, slots=True)
class SettingsRecord:
    """Settings whose signatures were checked, or that come from an authenticated store.

    ``booked``: a balancer of the cluster has signed them too, so they were in time and nobody else's came before.
    """

    order: SettingsOrder
    digest: bytes
    issuer: str
    booked: bool
    raw: bytes

    @property
    def serial(self) -> int:
        """Which are later."""
        return self.order.serial

    @property
    def told(self) -> str:
        """For logs and audit records."""
        order = self.order
        until = f" at {order.destroy_at_ms} ms" if order.destroy_at_ms else ""
        return f"settings {order.serial}: {state_of(self)}{until}, versions from {order.min_version}"


def issue_settings(order: SettingsOrder, key: SigningKey) -> bytes:
    """The envelope of a client's settings."""
    return sign_envelope(_SETTINGS_KIND, order.serial, settings_orders.encode(order), key)


def book_settings(raw: bytes, key: SigningKey) -> bytes:
    """The same envelope, countersigned by the registry's balancer."""
    return add_signature(raw, key)


def is_settings(raw: bytes) -> bool:
    """Whether a signed document is of this kind."""
    return read_unverified(raw).kind == _SETTINGS_KIND


def read_settings(raw: bytes) -> SettingsRecord:
    """Settings without any check: for what was checked before and comes from an authenticated store."""
    signed = read_unverified(raw)
    booked = any(signer != signed.issuer for signer in signed.signers)
    return SettingsRecord(settings_orders.decode(signed.payload), signed.digest, signed.issuer, booked, raw)


def open_settings(raw: bytes, cluster: Cluster, now_ms: int | None) -> SettingsRecord:
    """Settings with all signatures checked: the client's and, where they are booked, a balancer's.

    Where they are given, ``now_ms`` says when: then expiry and today's policy count. It is None for those that are
    booked: neither time nor a later manifest undoes them, but some manifest of the chain must have allowed them. The
    client needs ``settings`` on the key, and ``destroy`` too while a destruction is ordered.
    """
    signed = verify_envelope(raw, _SETTINGS_KIND, _signers(raw, cluster, now_ms))
    order = settings_orders.decode(signed.payload)
    _check_content(order)
    if now_ms is not None:
        check_expiry("key settings", order.expires_ms, now_ms)
    needed = (RequestType.SETTINGS, *((RequestType.DESTROY,) if order.destroy_at_ms else ()))
    allowed = cluster.allowed_ever if now_ms is None else cluster.allows
    for operation in needed:
        if not allowed(signed.issuer, operation, order.name):
            raise AccessDenied(
                f"{signed.issuer!r} may not set this of the key {order.name!r}: it takes {' and '.join(needed)}"
            )
    return SettingsRecord(order, signed.digest, signed.issuer, len(signed.signers) > 1, raw)


def _signers(raw: bytes, cluster: Cluster, now_ms: int | None) -> Mapping[str, tuple[bytes, ...]]:
    """Who may sign: the issuer as a client, and balancers."""
    issuer = read_unverified(raw).issuer
    found = dict(cluster.sign_key_ever("balancer"))
    found.pop(issuer, None)
    if now_ms is None:
        own = cluster.sign_key_ever("client").get(issuer)
    else:
        today = cluster.sign_key("client").get(issuer)
        own = None if today is None else (today,)
    if own is not None:
        found[issuer] = own
    return found


def _check_content(order: SettingsOrder) -> None:
    if not order.previous < order.serial <= order.expires_ms:
        raise ManifestError(
            f"key settings of {order.name!r}: serial {order.serial} is not above {order.previous} "
            f"and at most {order.expires_ms}, when they expire"
        )
    if order.destroy_at_ms > order.expires_ms + DESTROY_DELAY_MAX_MS:
        raise ManifestError(
            f"key settings of {order.name!r}: a destruction {order.destroy_at_ms - order.expires_ms} ms after "
            f"they expire; the limit is {DESTROY_DELAY_MAX_MS}"
        )


def state_of(settings: SettingsRecord | None) -> KeyState:
    """What settings, or none, make of a key."""
    if settings is None:
        return "enabled"
    if settings.order.destroy_at_ms:
        return "destroying"
    return "enabled" if settings.order.enabled else "disabled"


def check_usable(name: str, version: int, settings: SettingsRecord | None) -> None:
    """Refuse any use of a key that is disabled or to be destroyed, or of a version below the least."""
    if settings is None:
        return
    order = settings.order
    if order.destroy_at_ms:
        raise KeyDisabled(f"the key {name!r} is to be destroyed, and refused until it is restored")
    if not order.enabled:
        raise KeyDisabled(f"the key {name!r} is disabled")
    if version < order.min_version:
        raise VersionRetired(
            f"version {version} of the key {name!r} is retired: versions from {order.min_version} on may be used"
        )
