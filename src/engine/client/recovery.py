"""An operator's recovery key: the X25519 pair that opens its pieces of archives, in a file beside its identity.

It opens files, never sockets. The secret is encrypted under the operator's passphrase, as the identity's key is.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Annotated, Final

from cryptography.exceptions import UnsupportedAlgorithm as PycaUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec import Meta, Struct

from engine.client.config import (
    Identity,
    check_private,
    load_config,
    read_armored,
    stretched,
    write_private,
    write_toml,
)
from engine.errors import ConfigError
from engine.protocol.backup import sign_recovery_card
from engine.protocol.refresh import Opener
from engine.protocol.wire import Name

__all__ = ["RECOVERY_FILE", "create_recovery", "load_recovery", "read_recovery_card"]

RECOVERY_FILE: Final = "recovery.toml"
CARD_PREFIX: Final = "keyquorum-recovery-1 "
CARD_MAX: Final = 2048


class _RecoveryFile(Struct, frozen=True, forbid_unknown_fields=True):
    """``recovery.toml``."""

    version: Annotated[int, Meta(ge=1, le=1)]
    name: Name
    recovery_key: str
    kdf_salt: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


def create_recovery(path: Path, card: Path, identity: Identity, passphrase: str) -> bytes:
    """Make an operator's recovery key in a new file of mode 0600, and its public card; the public key."""
    if path.exists():
        raise ConfigError(f"{path}: exists already; a recovery key is never overwritten")
    if not passphrase:
        raise ConfigError("a recovery key needs a passphrase")
    private, salt = X25519PrivateKey.generate(), os.urandom(16)
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(stretched(passphrase, salt)),
    )
    write_toml(path, {"version": 1, "name": identity.name, "recovery_key": pem.decode("ascii"), "kdf_salt": salt.hex()})
    public = private.public_key().public_bytes_raw()
    signed = sign_recovery_card(identity.name, public, identity.signing)
    write_private(card, (CARD_PREFIX + base64.b64encode(signed).decode("ascii") + "\n").encode())
    card.chmod(0o644)
    return public


def load_recovery(path: Path, name: str, passphrase: str) -> Opener:
    """The recovery key of the operator of that name; ``ConfigError`` says what is wrong."""
    check_private(path)
    values = load_config(path, _RecoveryFile)
    if values.name != name:
        raise ConfigError(f"{path}: the recovery key is that of {values.name!r}, not of {name!r}")
    try:
        private = serialization.load_pem_private_key(
            values.recovery_key.encode(), stretched(passphrase, bytes.fromhex(values.kdf_salt))
        )
    except (ValueError, TypeError, PycaUnsupported):
        # The cause may quote the key, so it is not chained.
        raise ConfigError(f"{path}: the passphrase is wrong, or the recovery key malformed") from None
    if not isinstance(private, X25519PrivateKey):
        raise ConfigError(f"{path}: the recovery key is no X25519 key")
    return Opener(private.private_bytes_raw())


def read_recovery_card(path: Path) -> bytes:
    """The signed envelope in a recovery card, unchecked."""
    return read_armored(path, CARD_PREFIX, "recovery card", CARD_MAX)
