"""Every error that the project raises on purpose, as one tree, and their names on the wire.

It knows nothing of sockets, tokens or files. A caller's own mistake (a wrong type, a value out of range) is a
``ValueError`` or ``TypeError``, never an ``EngineError``.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AccessDenied",
    "AuditUnavailable",
    "ClusterError",
    "ConfigError",
    "DeadlineExceeded",
    "EngineError",
    "InvalidSignature",
    "InvalidTag",
    "KeyDisabled",
    "KeyExhausted",
    "KeyExists",
    "KeyNotFound",
    "KeyPending",
    "ManifestError",
    "NeedGrant",
    "NodeUnavailable",
    "OlderVersion",
    "Overloaded",
    "ProtocolError",
    "QuorumUnavailable",
    "RegistryUnavailable",
    "ShareCorrupt",
    "StaleKey",
    "StoreUnavailable",
    "TokenError",
    "UnsupportedAlgorithm",
    "VersionRetired",
    "error_from_code",
]


class EngineError(Exception):
    """The root of the tree. ``code`` is the error's name on the wire (docs/protocol.md)."""

    code = "error"


class KeyNotFound(EngineError):
    """No key has this name, or it was destroyed."""

    code = "key-not-found"


class KeyPending(EngineError):
    """The node has a share of a key of this name that is being made, and has not heard yet whether it was.

    Or it has just started, and has not heard yet what became of its keys while it was away.
    The client asks again within its deadline.
    """

    code = "key-pending"


class KeyDisabled(EngineError):
    """The key is disabled, or is to be destroyed: it is there, and refused until a client orders otherwise."""

    code = "key-disabled"


class VersionRetired(EngineError):
    """The version of the key is below the least that its settings let be used."""

    code = "version-retired"


class KeyExhausted(EngineError):
    """A version of a key was used as often as it may be; a rotation makes the next one."""

    code = "key-exhausted"


class KeyExists(EngineError):
    """The name is taken by another key."""

    code = "key-exists"


class StaleKey(EngineError):
    """The request names an older incarnation, version or epoch of the key than the node holds."""

    code = "stale-key"


class OlderVersion(EngineError):
    """The proof or ciphertext does not fit this version of the key, which is not the newest one: others may fit.

    The client tries them; its caller is told what comes of that.
    """

    code = "older-version"


class AccessDenied(EngineError):
    """The policy of the cluster does not allow it, or the peer's key is not a member's."""

    code = "access-denied"


class InvalidSignature(EngineError):
    """A signature or MAC does not belong to the message."""

    code = "invalid-signature"


class InvalidTag(EngineError):
    """A ciphertext, its associated data or its header was changed, or belongs to another key."""

    code = "invalid-tag"


class UnsupportedAlgorithm(EngineError):
    """The token offers no mechanism (or not its parameter) for the algorithm."""

    code = "unsupported-algorithm"


class QuorumUnavailable(EngineError):
    """Fewer than t shares could be had. ``missing`` names the holders that did not give theirs."""

    code = "quorum-unavailable"

    def __init__(self, message: str, missing: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ShareCorrupt(EngineError):
    """A share does not match its commitment. ``holders`` names the nodes that gave such shares."""

    code = "share-corrupt"

    def __init__(self, message: str, holders: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.holders = tuple(holders)


class DeadlineExceeded(EngineError):
    """The operation did not end within its deadline."""

    code = "deadline-exceeded"


class NodeUnavailable(EngineError):
    """A node, or every eligible node, could not be reached."""

    code = "node-unavailable"


class RegistryUnavailable(EngineError):
    """Creation and destruction need the registry (a service of the balancer), which did not answer."""

    code = "registry-unavailable"


class Overloaded(EngineError):
    """A queue bound was reached; the request was not begun."""

    code = "overloaded"


class NeedGrant(EngineError):
    """The combiner has not loaded the key and the request carried no grant to gather its shares."""

    code = "need-grant"


class ProtocolError(EngineError):
    """A message that breaks the rules of docs/protocol.md."""

    code = "protocol-error"


class ManifestError(EngineError):
    """A signed document is forged, out of order, or not signed by enough of the right members."""

    code = "manifest-error"


class TokenError(EngineError):
    """The PKCS#11 token refused or failed an operation, or a self test."""

    code = "token-error"


class AuditUnavailable(EngineError):
    """The node can't write its audit log, so it serves nothing until it can again."""

    code = "audit-unavailable"


class StoreUnavailable(EngineError):
    """The node can't write its store, most often because the disk is full; what was asked was not done."""

    code = "store-unavailable"


class ConfigError(EngineError):
    """A configuration or identity file is missing, malformed or has an unknown key."""

    code = "config-error"


class ClusterError(EngineError):
    """A local cluster could not be made, started or stopped."""

    code = "cluster-error"


_BY_CODE: dict[str, type[EngineError]] = {
    value.code: value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, EngineError)
}


def error_from_code(code: str, message: str, names: Iterable[str] = ()) -> Exception:
    """The error of a wire code; ``names`` are the nodes it speaks of. An unknown code is a plain ``EngineError``."""
    if code == "invalid-request":
        return ValueError(message)
    kind = _BY_CODE.get(code)
    if kind is QuorumUnavailable:
        return QuorumUnavailable(message, names)
    if kind is ShareCorrupt:
        return ShareCorrupt(message, names)
    if kind is None:
        return EngineError(f"{code}: {message}")
    return kind(message)
