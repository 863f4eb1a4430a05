"""How a newer cluster manifest goes from member to member: in pieces, asked for or brought. It trusts nobody.

A manifest proves itself (``membership``), so any member may bring it. Both ways carry only the manifests that come
after those that the other side has; a chain can be longer than one message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from engine._version import __version__
from engine.client.membership import Membership
from engine.client.speech import spoken
from engine.client.transport import Channel, ask
from engine.errors import EngineError, ManifestError, Overloaded
from engine.protocol.manifest import ClusterSource, chain_after
from engine.protocol.requests import (
    HELLO,
    MANIFEST_FETCH,
    MANIFEST_OFFER,
    MAX_MANIFEST_PIECE,
    Hello,
    ManifestFetch,
    ManifestOffer,
    ManifestPiece,
    ManifestTaken,
    Welcome,
)

__all__ = ["Desk", "Gossip", "pull", "push", "serial_at"]

MAX_LATER_BYTES: Final = 8 * 1024 * 1024
"""Most bytes of manifests that are taken at a time; a member that is further behind takes them by its file."""
MAX_PENDING: Final = 8
PENDING_S: Final = 10.0
"""An offer that is not complete after this is forgotten."""
TIMEOUT_S: Final = 2.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Pending:
    """An offer of one member that is not complete yet."""

    after: int
    total: int
    since_s: float
    data: bytearray = field(default_factory=bytearray)


class Desk:
    """The serving side of ``manifest.fetch`` and ``manifest.offer``; safe for several threads.

    A process that goes by a manifest that can't change (``source`` is no ``Membership``) refuses offers.
    """

    def __init__(self, source: ClusterSource, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._lock = threading.Lock()

    def fetch(self, body: ManifestFetch) -> ManifestPiece:
        """A piece of the manifests after ``body.after``; none where there are none."""
        cluster = self._source.cluster
        later = self._source.after(body.after) if isinstance(self._source, Membership) else b""
        return ManifestPiece(cluster.serial, len(later), later[body.offset : body.offset + MAX_MANIFEST_PIECE])

    def offer(self, member: str, body: ManifestOffer) -> ManifestTaken:
        """Take in a piece; with the last one the manifests are taken, or ``ManifestError`` says why not."""
        source = self._source
        if not isinstance(source, Membership):
            raise ManifestError("the cluster manifest of this process can't change")
        if body.after > source.cluster.serial:
            raise ManifestError(f"the manifests from {source.cluster.serial + 1} on are needed, not after {body.after}")
        later = self._collected(member, body)
        if later is not None and later != source.after(body.after):
            source.offer_after(body.after, later)
        return ManifestTaken(source.cluster.serial)

    def _collected(self, member: str, body: ManifestOffer) -> bytes | None:
        """The whole of an offer, if this piece was its last."""
        now = self._clock()
        with self._lock:
            for name in [name for name, each in self._pending.items() if now - each.since_s > PENDING_S]:
                del self._pending[name]
            if body.offset == 0:
                if body.total > MAX_LATER_BYTES:
                    raise ManifestError(f"{body.total} bytes of manifests, the limit is {MAX_LATER_BYTES}")
                if member not in self._pending and len(self._pending) >= MAX_PENDING:
                    raise Overloaded(f"{MAX_PENDING} members are bringing a manifest already")
                self._pending[member] = _Pending(body.after, body.total, now)
            pending = self._pending.get(member)
            if pending is None or (pending.after, pending.total) != (body.after, body.total):
                raise ManifestError("a piece of an offer that was not begun, or took too long")
            if body.offset != len(pending.data) or not body.data or body.offset + len(body.data) > body.total:
                del self._pending[member]
                raise ManifestError(f"a piece of {len(body.data)} bytes at {body.offset} does not fit to the offer")
            pending.data += body.data
            if len(pending.data) < pending.total:
                return None
            del self._pending[member]
            return bytes(pending.data)


def serial_at(channel: Channel, peer: str, timeout_s: float = TIMEOUT_S) -> int:
    """The serial of the manifest that a member goes by, by its own word."""
    told: Welcome = ask(channel, peer, HELLO, Hello(spoken().highest, __version__), timeout_s)
    return told.cluster_serial


def pull(channel: Channel, peer: str, source: ClusterSource, timeout_s: float = TIMEOUT_S) -> bool:
    """Have ``peer`` give the manifests that are missing here, and take them; whether any was taken.

    ``EngineError`` where it does not answer, or what it gives is refused.
    """
    if not isinstance(source, Membership):
        return False
    after, data = source.cluster.serial, bytearray()
    while True:
        piece: ManifestPiece = ask(channel, peer, MANIFEST_FETCH, ManifestFetch(after, len(data)), timeout_s)
        if piece.total > MAX_LATER_BYTES:
            raise ManifestError(f"{peer}: {piece.total} bytes of manifests, the limit is {MAX_LATER_BYTES}")
        data += piece.data
        if len(data) >= piece.total or not piece.data:
            break
    if not data:
        return False
    return source.offer_after(after, bytes(data))


def push(channel: Channel, peer: str, chain: bytes, serial: int, timeout_s: float = TIMEOUT_S) -> int:
    """Bring a chain, whose newest manifest has this serial, to a member; the serial that the member has then.

    ``EngineError`` where it does not answer, or refuses it.
    """
    has = serial_at(channel, peer, timeout_s)
    # One that has this serial is shown it too: it may be another one of the same serial.
    after = max(0, min(has, serial - 1))
    later = chain_after(chain, after)
    taken = ManifestTaken(has)
    for offset in range(0, len(later), MAX_MANIFEST_PIECE):
        piece = later[offset : offset + MAX_MANIFEST_PIECE]
        taken = ask(channel, peer, MANIFEST_OFFER, ManifestOffer(after, len(later), offset, piece), timeout_s)
    return taken.serial


class Gossip:
    """Looks now and then whether others have a newer manifest, and takes it. One thread uses it."""

    def __init__(self, source: ClusterSource, own: str) -> None:
        self._source = source
        self._own = own
        self._turn = 0

    def look(self, channel: Channel) -> None:
        """Ask every balancer, and one node after the other; who does not answer is passed over."""
        cluster = self._source.cluster
        nodes = [name for name in cluster.nodes if name != self._own]
        asked = [member.name for member in cluster.of_role("balancer") if member.name != self._own]
        if nodes:
            self._turn += 1
            asked.append(nodes[self._turn % len(nodes)])
        for name in asked:
            try:
                if serial_at(channel, name) > self._source.cluster.serial:
                    pull(channel, name, self._source)
            except EngineError as error:
                log.debug("no manifest", member=name, reason=str(error))
