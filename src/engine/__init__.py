"""Keyquorum: cryptographic keys as t-of-n Shamir shares over a cluster of PKCS#11 tokens. Everything public is here."""

from engine import aio
from engine._version import __version__
from engine.client.calls import Destroyed, KeyInfo, KeySummary, MemberStatus
from engine.client.client import ClientSettings, Engine, TableStats, connect, load_settings
from engine.client.files import decrypt_stream, encrypt_stream, sign_stream, verify_stream
from engine.client.local import LocalCluster
from engine.errors import (
    AccessDenied,
    AuditUnavailable,
    ClusterError,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyExists,
    KeyNotFound,
    ManifestError,
    NeedGrant,
    NodeUnavailable,
    Overloaded,
    ProtocolError,
    QuorumUnavailable,
    RegistryUnavailable,
    ShareCorrupt,
    StaleKey,
    StoreUnavailable,
    TokenError,
    UnsupportedAlgorithm,
)
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
    "Destroyed",
    "Engine",
    "EngineError",
    "InvalidSignature",
    "InvalidTag",
    "KeyExists",
    "KeyInfo",
    "KeyNotFound",
    "KeySummary",
    "LocalCluster",
    "ManifestError",
    "MemberStatus",
    "NeedGrant",
    "NodeUnavailable",
    "Overloaded",
    "PolicyRule",
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
    "sign_stream",
    "verify_stream",
]
