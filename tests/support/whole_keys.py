"""Keys that every holder has a share of, for tests that count on each of them."""

from __future__ import annotations

from engine import Engine
from engine.client.calls import KeyInfo

TRIES = 5


def create_whole_key(kq: Engine, name: str, algorithm: str, threshold: int, shares: int) -> KeyInfo:
    """Make a key, anew where a holder was slow for a moment and was gone on without: machines of tests are busy."""
    for _ in range(TRIES):
        info = kq.create_key(name, algorithm, threshold=threshold, shares=shares)
        if len(info.stored) == shares:
            return info
        kq.destroy_key(name)
    raise AssertionError(f"a holder missed each of {TRIES} creations of {name!r}: {info.warnings}")
