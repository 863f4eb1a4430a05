"""Where a member answers over HTTP: ``[metrics]`` of a node's configuration, ``[http]`` of a balancer's. No sockets."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from msgspec import Struct

from engine.client.config import SecretSource, resolve, secret_source
from engine.errors import ConfigError

__all__ = ["HttpConfig", "HttpTable", "TokenSource", "http_config"]


class HttpTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The section: where to listen, and as whom and to whom to answer. Nothing is served without ``bind``."""

    bind: str = ""
    certificate: str = ""
    key: str = ""
    token: str = ""


class TokenSource(SecretSource):
    """Where the token is that who asks has to show."""

    __slots__ = ()
    what: ClassVar[str] = "token"


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """A literal address and a port; the certificate (PEM, with its chain) and key of TLS; the token to be shown.

    Without a certificate it is plain HTTP, without a token anybody may ask: both on a loopback address alone.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    token: TokenSource | None = None

    @property
    def family(self) -> socket.AddressFamily:
        """Of the address."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def url(self) -> str:
        """Of the first page."""
        return f"{'https' if self.certificate else 'http'}://{self}/"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def http_config(path: str | os.PathLike[str], section: str, told: HttpTable) -> HttpConfig | None:
    """What the section of the file at ``path`` says; None if it has nothing served, ``ConfigError`` if it may not be.

    With another than a loopback address it must have TLS and a token: what is told there is nobody else's business.
    """
    if not told.bind:
        return None
    host, _, port = told.bind.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdecimal() else 0
    except ValueError:
        number = 0
    if not 0 < number < 65_536 or (":" in host) != (host.startswith("[") and host.endswith("]")):
        raise ConfigError(
            f"{path}: {section}.bind {told.bind[:80]!r} must be an IP address and a port, such as 127.0.0.1:9464 or "
            "[::1]:9464"
        )
    if bool(told.certificate) != bool(told.key):
        raise ConfigError(f"{path}: {section}.certificate and {section}.key go together: both or none")
    missing = [f"{section}.{name}" for name in ("certificate", "key", "token") if not getattr(told, name)]
    if not address.is_loopback and missing:
        raise ConfigError(
            f"{path}: {section}.bind {told.bind[:80]!r} is no loopback address, so that it needs TLS and a token: "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    return HttpConfig(
        str(address),
        number,
        resolve(path, told.certificate) if told.certificate else None,
        resolve(path, told.key) if told.key else None,
        secret_source(path, f"{section}.token", told.token, TokenSource) if told.token else None,
    )
