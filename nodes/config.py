"""The node's configuration file and where its PIN comes from. It opens no token and no socket."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import unquote

from msgspec import Meta, Struct

from engine.client.admission import LimitsTable, ServiceLimits
from engine.client.config import SecretSource, load_config, resolve, secret_source
from engine.client.httpconfig import HttpConfig, HttpTable, http_config
from engine.errors import ConfigError
from nodes.cache import CacheLimits
from nodes.limits import CHANGES_PER_S, GENERATE_PART, Limits

__all__ = ["NodeConfig", "PinSource", "TokenCare", "TokenConfig", "load_node_config"]

MODULE_PATHS = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)
URI_ATTRIBUTES = frozenset(
    {"token", "manufacturer", "serial", "model", "library-manufacturer", "library-version", "library-description"}
    | {"object", "type", "id", "slot-manufacturer", "slot-description", "slot-id"}
    | {"pin-source", "pin-value", "module-name", "module-path"}
)
"""The attributes of a PKCS#11 URI (RFC 7512, 2.3)."""
MAX_LABEL_BYTES = 32
"""PKCS#11 v2.40, 3.2: a label is 32 bytes, not characters."""


class _Token(Struct, frozen=True, forbid_unknown_fields=True):
    label: Annotated[str, Meta(min_length=1, max_length=MAX_LABEL_BYTES)] = ""
    pin: str = ""
    module: str = ""
    uri: str = ""
    shared_with: str = ""
    canary_every_s: Annotated[float, Meta(ge=0.1, le=3_600)] = 5.0
    fresh_canary_every_s: Annotated[float, Meta(ge=0.5, le=86_400)] = 60.0
    recycle_loads: Annotated[int, Meta(ge=0, le=10_000_000)] = 10_000
    hang_after_s: Annotated[float, Meta(ge=1, le=3_600)] = 10.0


class _Cache(Struct, frozen=True, forbid_unknown_fields=True):
    ttl_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    max_keys: Annotated[int, Meta(ge=1, le=100_000)] = 1024
    max_uses: Annotated[int, Meta(ge=1, le=2**32)] = 1_000_000
    max_bytes: Annotated[int, Meta(ge=16 * 1024, le=2**30)] = 4 * 1024 * 1024
    share_ttl_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    max_shares: Annotated[int, Meta(ge=0, le=100_000)] = 1024
    share_max_uses: Annotated[int, Meta(ge=1, le=2**32)] = 10_000
    share_max_bytes: Annotated[int, Meta(ge=0, le=2**30)] = 512 * 1024
    signature_ttl_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    max_signatures: Annotated[int, Meta(ge=0, le=1_000_000)] = 4096


class _Create(Struct, frozen=True, forbid_unknown_fields=True):
    acknowledge: Literal["up", "quorum", "all"] = "up"


class _Audit(Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["group", "strict"] = "group"
    key_names: Literal["plain", "hmac"] = "plain"
    head_every_s: Annotated[float, Meta(ge=0.1, le=3600)] = 10.0
    segment_mib: Annotated[int, Meta(ge=1, le=65_536)] = 256


_Rate = Annotated[float, Meta(gt=0, le=1_000_000)]


_LIMITS = Limits()


class _Limits(LimitsTable, frozen=True, forbid_unknown_fields=True, kw_only=True):
    client_per_s: _Rate = _LIMITS.client_per_s
    combiner_per_s: _Rate = _LIMITS.combiner_per_s
    total_per_s: _Rate = _LIMITS.total_per_s
    changes_per_s: _Rate = CHANGES_PER_S
    generate_part: Annotated[float, Meta(ge=0.01, le=1)] = GENERATE_PART

    def releases(self) -> Limits:
        return Limits(self.client_per_s, self.combiner_per_s, self.total_per_s, self.burst_s)


class _Trace(Struct, frozen=True, forbid_unknown_fields=True):
    file: str = ""


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=1)]
    identity: str
    manifest: str
    manifest_pin: str
    data: str
    token: _Token
    bind: str = ""
    publish_bind: str = ""
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    cache: _Cache = _Cache()
    create: _Create = _Create()
    audit: _Audit = _Audit()
    limits: _Limits = _Limits()
    metrics: HttpTable = HttpTable()
    trace: _Trace = _Trace()


class PinSource(SecretSource):
    """Where the PIN is."""

    __slots__ = ()
    what: ClassVar[str] = "PIN"


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """Which token to use: the PKCS#11 module's path, the token's label and the PIN's place.

    ``shared_with`` is the data folder of the node that owns the token; None for a token of one's own.
    """

    module: Path
    label: str
    pin: PinSource
    shared_with: Path | None = None

    @property
    def is_softhsm(self) -> bool:
        """Whether the module is SoftHSM, whose token folder the node keeps itself."""
        return "softhsm" in self.module.name


@dataclass(frozen=True, slots=True)
class TokenCare:
    """How the token is looked after: seconds between canaries in the process and from fresh ones, objects that are made
    in it until it is renewed (0: never), and for how long a call may go on until the supervisor ends the process.
    """

    canary_every_s: float = 5.0
    fresh_canary_every_s: float = 60.0
    recycle_loads: int = 10_000
    hang_after_s: float = 10.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What ``node.toml`` says, with paths resolved against its folder."""

    path: Path
    identity: Path
    manifest: Path
    manifest_pin: str
    data: Path
    bind: str
    publish_bind: str
    workers: int
    token: TokenConfig
    care: TokenCare
    key_cache: CacheLimits
    share_cache: CacheLimits
    signature_cache: CacheLimits
    acknowledge: Literal["up", "quorum", "all"]
    audit_mode: Literal["group", "strict"]
    audit_key_names: Literal["plain", "hmac"]
    audit_head_every_s: float
    audit_segment_bytes: int
    limits: Limits
    changes_per_s: float
    generate_part: float
    service_limits: ServiceLimits
    metrics: HttpConfig | None
    trace_file: Path | None


def load_node_config(path: str | os.PathLike[str]) -> NodeConfig:
    """The configuration of a node; ``ConfigError`` names the file, the key and the limit."""
    file = load_config(path, _File)
    return NodeConfig(
        path=Path(path).resolve(),
        identity=resolve(path, file.identity),
        manifest=resolve(path, file.manifest),
        manifest_pin=file.manifest_pin,
        data=resolve(path, file.data),
        bind=file.bind,
        publish_bind=file.publish_bind,
        workers=file.workers,
        token=_token(path, file),
        care=TokenCare(
            file.token.canary_every_s,
            file.token.fresh_canary_every_s,
            file.token.recycle_loads,
            file.token.hang_after_s,
        ),
        key_cache=CacheLimits(file.cache.ttl_s, file.cache.max_keys, file.cache.max_uses, file.cache.max_bytes),
        share_cache=CacheLimits(
            file.cache.share_ttl_s, file.cache.max_shares, file.cache.share_max_uses, file.cache.share_max_bytes
        ),
        signature_cache=CacheLimits(file.cache.signature_ttl_s, file.cache.max_signatures),
        acknowledge=file.create.acknowledge,
        audit_mode=file.audit.mode,
        audit_key_names=file.audit.key_names,
        audit_head_every_s=file.audit.head_every_s,
        audit_segment_bytes=file.audit.segment_mib * 1024 * 1024,
        limits=file.limits.releases(),
        changes_per_s=file.limits.changes_per_s,
        generate_part=file.limits.generate_part,
        service_limits=file.limits.service(),
        metrics=http_config(path, "metrics", file.metrics),
        trace_file=resolve(path, file.trace.file) if file.trace.file else None,
    )


def _token(path: str | os.PathLike[str], file: _File) -> TokenConfig:
    told = {"label": file.token.label, "pin": file.token.pin, "module": file.token.module}
    if file.token.uri:
        for key, value in parse_uri(file.token.uri).items():
            if told[key]:
                raise ConfigError(f"{path}: token.{key} is told twice, in token.uri too")
            told[key] = value
    if not told["label"]:
        raise ConfigError(f"{path}: token.label is missing")
    if len(told["label"].encode()) > MAX_LABEL_BYTES:
        raise ConfigError(f"{path}: token.label has {len(told['label'].encode())} bytes, at most {MAX_LABEL_BYTES}")
    if not told["pin"]:
        raise ConfigError(f"{path}: token.pin is missing: file:PATH, env:NAME or credential:NAME")
    shared_with = resolve(path, file.token.shared_with) if file.token.shared_with else None
    if shared_with is not None and shared_with == resolve(path, file.data):
        raise ConfigError(f"{path}: token.shared_with names this node's own data folder {shared_with}")
    return TokenConfig(token_module(told["module"]), told["label"], _pin_source(path, told["pin"]), shared_with)


def _pin_source(path: str | os.PathLike[str], text: str) -> PinSource:
    return secret_source(path, "token.pin", text, PinSource)


def token_module(text: str) -> Path:
    """The PKCS#11 module of this path; SoftHSM, where it is installed, if none is told."""
    if text:
        module = Path(text)
        try:
            there = module.is_file()
        except OSError:  # a name that is too long, say
            there = False
        if not there:
            raise ConfigError(f"the PKCS#11 module {text[:200]} is not there")
        return module
    for candidate in MODULE_PATHS:
        if Path(candidate).is_file():
            return Path(candidate)
    raise ConfigError(f"no SoftHSM found (looked at {', '.join(MODULE_PATHS)}); install softhsm2 or set token.module")


def parse_uri(uri: str) -> Mapping[str, str]:
    """Label, module and PIN source of a PKCS#11 URI (RFC 7512): ``token``, ``module-path`` and ``pin-source``.

    ``pin-value`` is refused: a PIN does not belong into a configuration file.
    """
    scheme, _, rest = uri.partition(":")
    if scheme != "pkcs11":
        raise ConfigError("token.uri must begin with pkcs11:")
    path, _, query = rest.partition("?")
    parts = [part for part in (*path.split(";"), *query.split("&")) if part]
    known = {"token": "label", "pin-source": "pin", "module-path": "module"}
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name == "pin-value":
            raise ConfigError("token.uri: pin-value is refused; use pin-source")
        if name not in known or not equals:
            # What is no attribute of RFC 7512 may be a PIN in the wrong place, and is not shown.
            what = repr(name) if name in URI_ATTRIBUTES and equals else "a part that is no attribute"
            raise ConfigError(f"token.uri: {what} is not understood; known are {', '.join(known)}")
        if known[name] in found:
            raise ConfigError(f"token.uri: {name!r} is told twice")
        found[known[name]] = unquote(value)
    return found
