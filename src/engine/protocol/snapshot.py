"""A node's publication of its own queue, and which of them a client believes. Time is an argument; no socket.

It says what rides on every reply too (``wire.Load``), for those that ask the node nothing just now.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Final

from msgspec import Meta, Struct

from engine.protocol._nodestate import SNAPSHOT_MAX_AGE_S
from engine.protocol.wire import LOWEST_VERSION, PROTOCOL_VERSION, Codec, Identifier, UInt

__all__ = ["SNAPSHOT_BYTES", "Newest", "Snapshot", "Telling", "snapshot_codec"]

SNAPSHOT_BYTES: Final = 64
"""Longest snapshot in bytes."""
PUBLISH_EVERY_S: Final = 0.05
"""How often a node looks at its queue, and tells it if it changed."""
REPEAT_EVERY_S: Final = SNAPSHOT_MAX_AGE_S / 2
"""How often it tells a queue that did not change: one that is late or lost lets no router take the queue as unknown."""
MESSAGES_PER_S: Final = 5_000
"""What a node sends to all subscribers together at most (some 13 us each), by doing so less often to over 250."""
BOOTS_KEPT: Final = 8


class Snapshot(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a node publishes: ``[version, boot, number, queue, serving]``.

    ``boot`` is that of ``hello``, ``number`` grows with each publication since then. ``queue`` counts requests under
    way; ``serving`` is false where new ones are refused: the token has failed, or the node is about to stop. It goes
    to all alike, so it is written in the oldest version that is spoken.
    """

    version: Annotated[int, Meta(ge=LOWEST_VERSION, le=PROTOCOL_VERSION)]
    boot: Identifier
    number: UInt
    queue: UInt
    serving: bool


snapshot_codec = Codec(Snapshot, "snapshot", SNAPSHOT_BYTES)


class Telling:
    """When a node publishes, and what: used by one thread."""

    def __init__(self, boot: bytes) -> None:
        self._boot = boot
        self._number = 0
        self._told: tuple[int, bool] | None = None
        self._told_s = float("-inf")

    def due(self, queue: int, serving: bool, now_s: float) -> bytes | None:
        """The next publication, or None where there is nothing to tell yet."""
        told = queue, serving
        if told == self._told and now_s - self._told_s < REPEAT_EVERY_S - PUBLISH_EVERY_S / 2:  # the nearest look to it
            return None
        self._told, self._told_s = told, now_s
        self._number += 1
        return snapshot_codec.encode(Snapshot(LOWEST_VERSION, self._boot, self._number, queue, serving))

    def renew(self) -> None:
        """Tell what there is at the next time: somebody is new."""
        self._told = None

    @staticmethod
    def interval_s(subscribers: int) -> float:
        """How long to wait before the queue is looked at again."""
        return max(PUBLISH_EVERY_S, subscribers / MESSAGES_PER_S)


class Newest:
    """Of one node's publications, which are newer than those before. A boot that another one followed is over."""

    def __init__(self) -> None:
        self._boot = b""
        self._number = 0
        self._over: deque[bytes] = deque(maxlen=BOOTS_KEPT)

    @property
    def boot(self) -> bytes:
        """That of the newest; empty before the first."""
        return self._boot

    def takes(self, snapshot: Snapshot) -> bool:
        """Whether it is newer than all that were taken; then it is the newest."""
        if snapshot.boot != self._boot:
            if snapshot.boot in self._over:
                return False
            self._over.append(self._boot)
            self._boot, self._number = snapshot.boot, -1
        if snapshot.number <= self._number:
            return False
        self._number = snapshot.number
        return True
