"""What a node tells of itself when all is well, for the tests of those who read it."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.protocol.requests import HostHealth, NodeStatus, ServiceCount, TokenHealth

WELL = NodeStatus(
    node="n1",
    software="1",
    cluster_serial=1,
    uptime_ms=1,
    shares=0,
    loaded=0,
    caches=[],
    holders=[],
    queue=0,
    token="token",
    algorithms=[],
    missing=[],
    audit="",
    store="",
    alarms=[],
    clock="",
    health=TokenHealth("", "", 0, 0, 0, 0),
    service=ServiceCount(*[0] * 9),
    host=HostHealth(0, 0, 0, 0),
)


def node_status(**changes: Any) -> NodeStatus:
    """The status of a node that is well, but for these fields."""
    return msgspec.structs.replace(WELL, **changes)
