"""The socket on which routing tables go out, for members only (CURVE, ZAP). It knows no table's content.

A message is one frame, the signed envelope; a subscriber sets ZMQ_MAXMSGSIZE to 1 MiB and subscribes to everything. Who
was a member when it connected need not be one any more, so the socket is an XPUB, which tells who subscribes by which
connection: those of others are cut before the next table goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
import zmq

from engine.client.config import CurveIdentity
from engine.client.connections import end_connection, peer_of
from engine.client.listener import Bound, curve_server, user_id
from engine.errors import EngineError
from engine.protocol.manifest import Cluster

__all__ = ["Publisher"]

QUEUED_TABLES: Final = 4
"""A subscriber that lags further behind loses tables: only the newest counts."""
MAX_SUBSCRIPTIONS: Final = 100_000
"""Messages of subscribers that are taken in before a table goes out."""

log = structlog.get_logger()


class Publisher:
    """A bound XPUB socket; one thread uses it at a time. The context needs a ``Gate``, else nobody gets in.

    ``places`` says for each manifest at which endpoints to publish, and with which pair.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        identity: CurveIdentity,
        endpoint: str,
        places: Callable[[], Mapping[str, CurveIdentity]] | None = None,
    ) -> None:
        self._places = places or (lambda: {endpoint: identity})
        self._subscribers: dict[tuple[str, int], tuple[int, str]] = {}
        """The other end of a connection -> its descriptor here, and the CURVE key."""
        self._checked = 0
        self._lacking = ""
        self._socket: zmq.Socket[bytes] = context.socket(zmq.XPUB)
        try:
            curve_server(self._socket, identity)
            self._socket.xpub_verbose = 1
            self._socket.sndhwm = QUEUED_TABLES
            self._socket.linger = 0
            self._bound = Bound(self._socket)
            self._bound.follow({endpoint: identity})
        except (EngineError, zmq.ZMQError) as error:
            self._socket.close(0)
            raise error if isinstance(error, EngineError) else EngineError(f"can't bind {endpoint}: {error}") from None

    def publish(self, envelope: bytes, cluster: Cluster) -> None:
        """Send the table to every member that is connected; never waits."""
        self._take_in(cluster)
        self._socket.send(envelope, zmq.DONTWAIT)

    def _take_in(self, cluster: Cluster) -> None:
        """Note who subscribed, and cut those who are no members by this manifest."""
        for _ in range(MAX_SUBSCRIPTIONS):
            try:
                frame = self._socket.recv(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                break
            key = user_id(frame)
            if not key:  # libzmq's own word of a connection that ended, which came by none
                continue
            fd = int(frame.get(zmq.SRCFD))
            peer = peer_of(fd)
            if peer is not None:
                self._subscribers[peer] = fd, key
                self._checked = 0
        if self._checked == cluster.serial:
            return
        self._checked = cluster.serial
        try:
            self._bound.follow(self._places())
            self._lacking = ""
        except EngineError as error:
            self._checked = 0  # it is tried again with the next table
            if str(error) != self._lacking:
                self._lacking = str(error)
                log.error("not publishing where the manifest says; it is tried again", reason=self._lacking)
        for peer, (fd, key) in list(self._subscribers.items()):
            if peer_of(fd) != peer:
                del self._subscribers[peer]
            elif key not in cluster.by_curve:
                log.warning("subscriber cut", reason="its key is no member's any more", serial=cluster.serial)
                end_connection(fd, peer)
                del self._subscribers[peer]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
