"""Keyquorum: cryptographic keys as t-of-n Shamir shares over a cluster of PKCS#11 tokens. Everything public is here.

All but the errors is imported when it is first asked for (PEP 562): nodes, balancers and a node's small supervisor
import this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine._version import __version__
from engine.errors import (
    AccessDenied,
    AuditUnavailable,
    ClusterError,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyDisabled,
    KeyExhausted,
    KeyExists,
    KeyNotFound,
    KeyPending,
    ManifestError,
    NeedGrant,
    NodeUnavailable,
    OlderVersion,
    Overloaded,
    ProtocolError,
    QuorumUnavailable,
    RegistryUnavailable,
    ShareCorrupt,
    StaleKey,
    StoreUnavailable,
    TokenError,
    UnsupportedAlgorithm,
    VersionRetired,
)

if TYPE_CHECKING:
    from engine import aio
    from engine.client.ahead import PrewarmStats
    from engine.client.calls import DegradedKey, Destroyed, KeyInfo, KeySettings, KeySummary, LatencyStats, MemberStatus
    from engine.client.client import ClientSettings, Engine, connect, load_settings
    from engine.client.files import decrypt_stream, encrypt_stream, rewrap_stream, sign_stream, verify_stream
    from engine.client.follower import TableStats
    from engine.client.local import LocalCluster
    from engine.client.tracing import trace_context
    from engine.keys import ALGORITHMS, Algorithm, RequestType
    from engine.protocol.manifest import PolicyRule
    from engine.protocol.requests import classify_request
    from engine.sharing import Share, distribute_shares, generate_shares, reconstruct_key

__all__ = [
    "ALGORITHMS",
    "AccessDenied",
    "Algorithm",
    "AuditUnavailable",
    "ClientSettings",
    "ClusterError",
    "ConfigError",
    "DeadlineExceeded",
    "DegradedKey",
    "Destroyed",
    "Engine",
    "EngineError",
    "InvalidSignature",
    "InvalidTag",
    "KeyDisabled",
    "KeyExhausted",
    "KeyExists",
    "KeyInfo",
    "KeyNotFound",
    "KeyPending",
    "KeySettings",
    "KeySummary",
    "LatencyStats",
    "LocalCluster",
    "ManifestError",
    "MemberStatus",
    "NeedGrant",
    "NodeUnavailable",
    "OlderVersion",
    "Overloaded",
    "PolicyRule",
    "PrewarmStats",
    "ProtocolError",
    "QuorumUnavailable",
    "RegistryUnavailable",
    "RequestType",
    "Share",
    "ShareCorrupt",
    "StaleKey",
    "StoreUnavailable",
    "TableStats",
    "TokenError",
    "UnsupportedAlgorithm",
    "VersionRetired",
    "__version__",
    "aio",
    "classify_request",
    "connect",
    "decrypt_stream",
    "distribute_shares",
    "encrypt_stream",
    "generate_shares",
    "load_settings",
    "reconstruct_key",
    "rewrap_stream",
    "sign_stream",
    "trace_context",
    "verify_stream",
]

_HOMES = {
    "engine.client.ahead": ("PrewarmStats",),
    "engine.client.calls": (
        "DegradedKey",
        "Destroyed",
        "KeyInfo",
        "KeySettings",
        "KeySummary",
        "LatencyStats",
        "MemberStatus",
    ),
    "engine.client.client": ("ClientSettings", "Engine", "connect", "load_settings"),
    "engine.client.files": ("decrypt_stream", "encrypt_stream", "rewrap_stream", "sign_stream", "verify_stream"),
    "engine.client.follower": ("TableStats",),
    "engine.client.local": ("LocalCluster",),
    "engine.client.tracing": ("trace_context",),
    "engine.keys": ("ALGORITHMS", "Algorithm", "RequestType"),
    "engine.protocol.manifest": ("PolicyRule",),
    "engine.protocol.requests": ("classify_request",),
    "engine.sharing": ("Share", "distribute_shares", "generate_shares", "reconstruct_key"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "aio":
        return import_module("engine.aio")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
