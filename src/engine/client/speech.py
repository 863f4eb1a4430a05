"""Which protocol versions this process speaks: all that its software knows, unless an operator holds it to fewer."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Final

from engine.errors import ConfigError
from engine.protocol.wire import LOWEST_VERSION, PROTOCOL_VERSION, Versions

__all__ = ["HOLD_VARIABLE", "spoken", "versions_held_to"]

HOLD_VARIABLE: Final = "KEYQUORUM_PROTOCOL"
"""The newest protocol version that a process may speak. Empty or not set: the newest one that it knows."""


def versions_held_to(told: str) -> Versions:
    """The versions that are spoken under a value of ``HOLD_VARIABLE``; ``ConfigError`` if it allows none."""
    if not told.strip():
        return Versions(LOWEST_VERSION, PROTOCOL_VERSION)
    if not told.strip().isascii() or not told.strip().isdecimal() or len(told) > 18:
        raise ConfigError(f"{HOLD_VARIABLE}: {told[:32]!r} is no protocol version")
    if not LOWEST_VERSION <= int(told) <= PROTOCOL_VERSION:
        raise ConfigError(f"{HOLD_VARIABLE}={told}: this software speaks {LOWEST_VERSION} to {PROTOCOL_VERSION}")
    return Versions(LOWEST_VERSION, int(told))


@lru_cache(maxsize=1)
def spoken() -> Versions:
    """What this process speaks, as its environment said when it was first asked; ``ConfigError`` as above."""
    return versions_held_to(os.environ.get(HOLD_VARIABLE, ""))
