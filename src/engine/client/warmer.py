"""The thread that has keys loaded ahead, over a channel of its own: no caller waits for it. ``ahead`` decides what.

It begins when there is first something to do, and ends when its context is terminated, or is told to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog
import zmq

from engine.client.ahead import Ahead, Warm
from engine.client.calls import Call, Calls
from engine.client.transport import Channel
from engine.errors import EngineError

__all__ = ["Warmer"]

TIMEOUT_S: Final = 5.0
IDLE_S: Final = 5.0
"""A channel that had nothing to do for so long is closed."""

log = structlog.get_logger()


class Warmer:
    """``open_channel`` makes a channel, and ``drive_many`` runs calls over it: their results, and errors as values."""

    def __init__(
        self,
        ahead: Ahead,
        calls: Calls,
        open_channel: Callable[[], Channel],
        drive_many: Callable[[Channel, Iterable[Call[Any]]], list[Any]],
    ) -> None:
        self.ahead = ahead
        self._calls = calls
        self._open_channel = open_channel
        self._drive_many = drive_many
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        ahead.woken = self._wake

    def end(self) -> None:
        """Begin nothing more. What is under way ends with the context."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait so long for the thread to end."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _wake(self) -> None:
        with self._changed:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="keyquorum-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        channel: Channel | None = None
        try:
            while self._wait(None if channel is None else IDLE_S):
                warms = self.ahead.begin()
                if warms:
                    channel = channel or self._open_channel()
                    self._do(channel, warms)
                elif channel is not None and self.ahead.wait_s() is None:
                    channel.close()
                    channel = None
        except Exception as error:  # the client goes on without it
            if not self._closed:
                log.error("keys are not loaded ahead any more", exc_info=not isinstance(error, zmq.ZMQError))
        finally:
            self.ahead.stop()
            if channel is not None:
                channel.close()

    def _wait(self, most_s: float | None) -> bool:
        """Wait until there is something to do, or for so long; whether to go on."""
        with self._changed:
            wait_s = self.ahead.wait_s()
            if wait_s is None:
                wait_s = most_s
            if not self._closed and wait_s != 0.0:
                self._changed.wait(wait_s)
            return not self._closed

    def _do(self, channel: Channel, warms: list[Warm]) -> None:
        done: list[Any] = []
        try:
            calls = [self._calls.warm_at(warm.node, warm.name, TIMEOUT_S) for warm in warms]
            done = self._drive_many(channel, calls)
        finally:
            for at, warm in enumerate(warms):
                loaded = at < len(done) and done[at] is True
                self.ahead.ended(warm, loaded=loaded)
        for warm, outcome in zip(warms, done, strict=True):
            if isinstance(outcome, EngineError) and structlog.is_configured():
                log.debug("not loaded ahead", node=warm.node, reason=type(outcome).__name__)
