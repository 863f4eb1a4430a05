"""Publishes how busy the node is, by a thread of its own: the loop is only looked at, and never waits for it.

The thread sleeps while nobody subscribes. With subscribers it looks twenty times a second at two numbers, and sends
some 40 bytes if they changed; libzmq, which enciphers them for each subscriber, does that in another thread, without
the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
import zmq

from engine.client.config import CurveIdentity
from engine.client.publications import Gate, Publisher
from engine.errors import EngineError
from engine.protocol.manifest import ClusterSource
from engine.protocol.snapshot import Telling

__all__ = ["Announcer"]

QUEUED: Final = 2
"""A subscriber that lags further behind loses snapshots: only the newest counts."""
LOOK_S: Final = 0.25
"""How often is looked who is connected, while nobody subscribes."""
RETRY_S: Final = 1.0
"""How soon an endpoint that could not be had is tried again: the node serves without."""

log = structlog.get_logger()


class Announcer:
    """The publication of a node. ``tell`` gives its queue, and whether it serves; it is called by this thread.

    ``places`` are the endpoints by the newest manifest, each with its pair: with none there is no socket.
    """

    def __init__(
        self,
        source: ClusterSource,
        boot: bytes,
        places: Callable[[], Mapping[str, CurveIdentity]],
        tell: Callable[[], tuple[int, bool]],
    ) -> None:
        self._source = source
        self._places = places
        self._tell = tell
        self._telling = Telling(boot)
        self._stopping = False
        self._lacking = ""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.published = 0
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Have it look at the manifest, and who is connected, now; from any thread."""
        os.eventfd_write(self._wake, 1)

    def close(self, timeout_s: float) -> None:
        """End the thread, which closes its sockets."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _run(self) -> None:
        while not self._stopping:
            if not self._places():
                self._sleep(None)
                continue
            try:
                self._publish()
            except (EngineError, zmq.ZMQError) as error:
                if str(error) != self._lacking:
                    self._lacking = str(error)
                    log.error("not publishing the node's queue; it is tried again", reason=self._lacking)
                self._sleep(RETRY_S)

    def _sleep(self, seconds: float | None) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        poller.poll(None if seconds is None else int(seconds * 1000))
        self._awake()

    def _awake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _publish(self) -> None:
        """Publish until the node ends or the manifest has no place for it any more."""
        context: zmq.Context[Any] = zmq.Context()
        gate = Gate(context, self._source)
        publisher: Publisher | None = None
        try:
            publisher = Publisher(context, self._places, queued=QUEUED)
            if self._lacking:
                self._lacking = ""
                log.info("publishing the node's queue")
            self._serve(publisher)
        finally:
            if publisher is not None:
                publisher.close()
            gate.close()
            context.destroy(0)

    def _serve(self, publisher: Publisher) -> None:
        woken, anything = select.poll(), zmq.Poller()
        woken.register(self._wake, select.POLLIN)
        anything.register(self._wake, zmq.POLLIN)
        anything.register(publisher.socket, zmq.POLLIN)
        cluster, next_look_s = self._source.cluster, 0.0
        while not self._stopping:
            now = time.monotonic()
            if self._source.cluster is not cluster:
                cluster, next_look_s = self._source.cluster, now
                if not self._places():
                    return
            if now >= next_look_s:
                next_look_s = now + LOOK_S
                if publisher.look(cluster):
                    self._telling.renew()
            if len(publisher):
                said = self._telling.due(*self._tell(), now)
                if said is not None:
                    publisher.publish(said)
                    self.published += 1
                # libzmq takes in subscribers by itself; a look at them each time would cost twice as much.
                ready = woken.poll(int(Telling.interval_s(len(publisher)) * 1000))
            else:
                ready, next_look_s = anything.poll(int(LOOK_S * 1000)), 0.0
            if any(each == self._wake for each, _ in ready):
                self._awake()
