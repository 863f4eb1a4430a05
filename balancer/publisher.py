"""The PUB socket on which routing tables go out, for members only (CURVE, ZAP). It knows no table's content.

A message is one frame, the signed envelope; a subscriber sets ZMQ_MAXMSGSIZE to 1 MiB and subscribes to everything.
"""

from __future__ import annotations

from typing import Any

import zmq

from engine.client.config import CurveIdentity
from engine.client.listener import curve_server
from engine.errors import EngineError

__all__ = ["Publisher"]

QUEUED_TABLES = 4
"""A subscriber that lags further behind loses tables: only the newest counts."""


class Publisher:
    """A bound PUB socket; one thread uses it at a time. The context needs a ``Gate``, else nobody gets in."""

    def __init__(self, context: zmq.Context[Any], identity: CurveIdentity, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PUB)
        try:
            curve_server(self._socket, identity)
            self._socket.sndhwm = QUEUED_TABLES
            self._socket.linger = 0
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise EngineError(f"can't bind {endpoint}: {error}") from None

    def publish(self, envelope: bytes) -> None:
        """Send the table to every subscriber that is connected; never waits."""
        self._socket.send(envelope, zmq.DONTWAIT)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
