"""What a serving member takes on at once: the bounds, as they are configured and as ``hello`` tells them. No socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct

from engine._version import __version__
from engine.protocol.manifest import Cluster
from engine.protocol.requests import Hello, ServedLimits, Welcome
from engine.protocol.wire import HIGHEST_VERSION, LOWEST_VERSION, MAX_MESSAGE, PROTOCOL_VERSION, check_version

__all__ = ["LimitsTable", "ServiceLimits", "welcome"]


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Bounds of a serving member; the defaults are several times what one busy client needs.

    ``requests`` are those under way in all, ``member_requests`` one member's and ``connection_requests`` those that it
    may have unanswered on one connection and yet be sure of every reply. ``requests_per_s`` is what one member may
    send for ever, with ``burst_s`` seconds' worth at once. ``connections`` are those in all, where 0 means what the
    process's descriptors allow, and ``member_connections`` one member's.
    """

    requests: int = 10_000
    member_requests: int = 1_000
    connection_requests: int = 256
    requests_per_s: float = 10_000.0
    burst_s: float = 10.0
    connections: int = 0
    member_connections: int = 256

    def served(self) -> ServedLimits:
        """The same as ``hello`` tells them."""
        return ServedLimits(
            MAX_MESSAGE,
            self.requests,
            self.member_requests,
            self.connection_requests,
            int(self.requests_per_s),
            self.connections,
            self.member_connections,
        )


_DEFAULT = ServiceLimits()


class LimitsTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section ``[limits]`` of a serving member's configuration."""

    requests: Annotated[int, Meta(ge=1, le=1_000_000)] = _DEFAULT.requests
    member_requests: Annotated[int, Meta(ge=1, le=1_000_000)] = _DEFAULT.member_requests
    connection_requests: Annotated[int, Meta(ge=1, le=10_000)] = _DEFAULT.connection_requests
    requests_per_s: Annotated[float, Meta(gt=0, le=10_000_000)] = _DEFAULT.requests_per_s
    burst_s: Annotated[float, Meta(gt=0, le=3_600)] = _DEFAULT.burst_s
    connections: Annotated[int, Meta(ge=0, le=1_000_000)] = _DEFAULT.connections
    member_connections: Annotated[int, Meta(ge=1, le=1_000_000)] = _DEFAULT.member_connections

    def service(self) -> ServiceLimits:
        """The limits that it sets."""
        return ServiceLimits(
            self.requests,
            self.member_requests,
            self.connection_requests,
            self.requests_per_s,
            self.burst_s,
            self.connections,
            self.member_connections,
        )


def welcome(hello: Hello, name: str, boot: bytes, cluster: Cluster, limits: ServiceLimits) -> Welcome:
    """The answer to ``hello``; ``ProtocolError`` to one whose version is too far away."""
    check_version(hello.version)
    return Welcome(
        PROTOCOL_VERSION,
        LOWEST_VERSION,
        HIGHEST_VERSION,
        __version__,
        name,
        boot,
        cluster.serial,
        cluster.digest,
        limits.served(),
    )
