"""The blocking client: a pool of channels, and the driver that runs calls over them.

What a verb does is in ``calls``; here is only how its exchanges reach the sockets, and which thread owns which channel.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import random
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, overload

import structlog
import zmq

from engine.client._fastline import Shortcuts
from engine.client.ahead import Ahead, PrewarmStats
from engine.client.calls import (
    CREATE_TIMEOUT_S,
    MAX_CIPHERTEXT,
    Await,
    Call,
    Calls,
    DegradedKey,
    Destroyed,
    Ended,
    Exchange,
    KeyInfo,
    KeySettings,
    KeySummary,
    LatencyStats,
    Lost,
    MemberStatus,
    Pause,
    Step,
    answered_by_any,
    as_bytes,
    as_version,
    check_timeout,
    merge_lists,
    rewrap_batches,
    succeeded,
)
from engine.client.config import ClientConfig, Identity, load_config, load_identity, resolve
from engine.client.follower import Follower, TableStats
from engine.client.membership import OwnCurve, Servers, open_membership
from engine.client.speech import spoken
from engine.client.tracing import active_trace
from engine.client.transport import Arrival, Channel, check_zmq_version, open_line
from engine.client.warmer import Warmer
from engine.errors import ConfigError, DeadlineExceeded, EngineError, Overloaded
from engine.keys import RequestType
from engine.protocol.manifest import Cluster, ClusterSource
from engine.protocol.routing import Router
from engine.protocol.table import RoutingTable

__all__ = ["ClientSettings", "Engine", "connect", "load_settings"]

WINDOW = 64
"""Most requests under way at once in one ``*_many`` call."""
MAX_BATCH = 1_000_000
REWRAP_WINDOW = 8
"""The same of one ``rewrap_many``, whose requests carry up to 32 ciphertexts each."""
MAX_CHANNELS = 32
LINES_OF_CHANNEL = 4
"""Connections for uses by the shortest way, over the number of channels."""
_ENCRYPT, _DECRYPT = RequestType.ENCRYPT.value, RequestType.DECRYPT.value
_SIGN, _VERIFY = RequestType.SIGN.value, RequestType.VERIFY.value
_MAC, _VERIFY_MAC = RequestType.MAC.value, RequestType.VERIFY_MAC.value
FILES_PER_CONNECTION = 4
"""Descriptors of a connection: the TCP socket, and the mailboxes of the socket and of its monitor's two ends."""
LONGEST_POLL_S = 60.0
IDLE_MAX_S = 60.0
"""An idle channel is closed after this, so that nobody keeps unread events for long."""
CLOSE_WAIT_S = 5.0

A = TypeVar("A")
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Who the client is, where its verified cluster manifest is had from, and its default deadline in seconds.

    With ``prewarm`` it has the keys that it uses loaded ahead. With ``rotate`` it rotates a key that was used as often
    as it may be, where the policy lets it.
    """

    identity: Identity
    source: ClusterSource
    timeout_s: float = 5.0

    file: Path | None = None
    """The identity's file, which is read again when its CURVE key changes."""
    prewarm: bool = True
    rotate: bool = True
    router: Callable[[ClusterSource], Router] = Router
    """What chooses the node for each request, by the newest manifest."""

    @property
    def cluster(self) -> Cluster:
        """The newest manifest."""
        return self.source.cluster

    def own_curve(self) -> OwnCurve:
        """The CURVE pair to connect with, as the newest manifest knows it."""
        return OwnCurve(self.identity, self.source, self.file)


def load_settings(path: str | os.PathLike[str]) -> ClientSettings:
    """The settings of a ``client.toml``, its identity loaded and its cluster manifest verified."""
    config = load_config(path, ClientConfig)
    identity = load_identity(resolve(path, config.identity))
    if identity.role != "client":
        raise ConfigError(f"{Path(path)}: the identity {identity.name!r} is a {identity.role}'s, a client's is needed")
    membership = open_membership(resolve(path, config.manifest), config.manifest_pin, durable=False)
    return ClientSettings(
        identity, membership, config.timeout_s, resolve(path, config.identity), config.prewarm, config.rotate
    )


def as_settings(config: str | os.PathLike[str] | ClientSettings) -> ClientSettings:
    """Settings as they are, or loaded from the path of a ``client.toml``."""
    return config if isinstance(config, ClientSettings) else load_settings(config)


def connect(config: str | os.PathLike[str] | ClientSettings, *, max_channels: int | None = None) -> Engine:
    """A client of the cluster that ``config`` names (the path of a ``client.toml``, or loaded settings).

    Connections are opened when first used. ``max_channels`` bounds how many threads talk at once; others wait.
    """
    return Engine(as_settings(config), max_channels=max_channels)


def make_calls(settings: ClientSettings) -> Calls:
    """The verbs of a client, with the real clocks and the operating system's randomness."""
    spoken()  # a wrong value is told before anything is connected
    return Calls(
        settings.source,
        settings.identity.signing,
        settings.router(settings.source),
        clock=time.monotonic,
        now_ms=lambda: time.time_ns() // 1_000_000,
        random_bytes=os.urandom,
        rotates=settings.rotate,
    )


def make_warmer(settings: ClientSettings, calls: Calls, context: zmq.Context[Any]) -> Warmer | None:
    """What has a client's keys loaded ahead; None where that is switched off."""
    if not settings.prewarm:
        return None
    identity, members = settings.own_curve(), Servers(settings.source)
    return Warmer(
        Ahead(calls, random.random),
        calls,
        lambda: Channel(identity, members, context),
        partial(drive_many, stop_at_error=False),
    )


def look_of(warmer: Warmer | None) -> Callable[[], None]:
    """What a follower calls when there is news."""
    return warmer.ahead.look if warmer is not None else lambda: None


def prewarm_stats_of(warmer: Warmer | None) -> PrewarmStats:
    """What a client had loaded ahead."""
    return warmer.ahead.stats if warmer is not None else PrewarmStats(0, 0, 0)


def end_threads(follower: Follower, warmer: Warmer | None) -> None:
    """End the threads of a client with their context."""
    if warmer is not None:
        warmer.end()
    follower.end(CLOSE_WAIT_S)
    if warmer is not None:
        warmer.join(CLOSE_WAIT_S)


# --- drivers ---


class _Flight:
    """What one call has under way on a channel: the newest exchange, and those that were late."""

    __slots__ = ("_channel", "call", "index", "newest", "peers", "until_s")

    def __init__(self, channel: Channel, call: Call[Any], index: int = 0) -> None:
        self._channel = channel
        self.call = call
        self.index = index
        self.newest = 0
        self.peers: dict[int, str] = {}
        self.until_s = math.inf
        """The monotonic time at which the call's patience with the newest is over."""

    def begin(self, step: Exchange | Await) -> None:
        """Do what the call asks for; ``EngineError`` where an exchange can't begin."""
        self.newest, self.until_s = 0, math.inf
        if isinstance(step, Await):
            return
        if step.alone:
            self.give_up()
        self.newest = self._channel.start(step.peer, step.verb, step.body, step.timeout_s, step.extensions)
        self.peers[self.newest] = step.peer
        if step.patience_s is not None:
            self.until_s = time.monotonic() + step.patience_s

    def late(self, _: object = None) -> Step:
        """Resume the call, whose patience is over."""
        self.newest, self.until_s = 0, math.inf
        return self.call.send(None)

    def ended(self, arrival: Arrival) -> Step:
        """Resume the call with what arrived."""
        peer = self.peers.pop(arrival.token)
        newest, self.until_s = arrival.token == self.newest, math.inf
        error = arrival.error
        if arrival.reply is None and error is None:
            error = DeadlineExceeded(f"{peer}: no reply")
        if not newest:
            return self.call.send(Ended(peer, arrival.reply, error))
        self.newest = 0
        if error is not None:
            return self.call.throw(error)
        return self.call.send(arrival.reply)

    def give_up(self) -> None:
        """Forget what is under way."""
        for token in self.peers:
            self._channel.abandon(token)
        self.peers.clear()


def drive(channel: Channel, call: Call[T]) -> T:
    """Run one call to its end over a channel that has nothing else under way."""
    try:
        step = next(call)
    except StopIteration as stop:
        done: T = stop.value
        return done
    except BaseException:
        call.close()  # which tells the router that its answer is no longer waited for
        raise
    return _drive_on(channel, call, step)


def _drive_on(channel: Channel, call: Call[T], step: Step) -> T:
    """Run a call on from the step that it waits for."""
    flight = _Flight(channel, call)
    arrived: deque[Arrival] = deque()
    try:
        while True:
            if isinstance(step, Pause):
                flight.give_up()
                time.sleep(step.seconds)
                step = call.send(None)
                continue
            try:
                flight.begin(step)
            except EngineError as error:
                step = call.throw(error)
                continue
            arrival = _first(channel, flight, arrived)
            step = flight.late() if arrival is None else flight.ended(arrival)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flight.give_up()
        call.close()


def _first(channel: Channel, flight: _Flight, arrived: deque[Arrival]) -> Arrival | None:
    """The first end of what the call has under way, or None when its patience is over.

    ``arrived`` keeps what came with an earlier one, at the same instant.
    """
    while True:
        while arrived:
            arrival = arrived.popleft()
            if arrival.token in flight.peers:
                return arrival
        wait_s = min(flight.until_s - time.monotonic(), LONGEST_POLL_S)
        if wait_s <= 0:
            return None
        arrived.extend(channel.poll(wait_s))


class _Pipeline:
    """Many calls over one channel, at most ``window`` of them under way."""

    def __init__(self, channel: Channel, window: int) -> None:
        self._channel = channel
        self._window = window
        self._flying: dict[int, _Flight] = {}
        self._alarms: list[tuple[float, int, int, _Flight]] = []
        """When a call's pause, or its patience with the exchange of that token, is over; token 0 is a pause."""
        self._numbers = itertools.count()
        self._busy = 0
        self.ended: dict[int, Any] = {}

    def run(self, calls: Iterator[Call[Any]], stop_at_error: bool) -> None:
        """Run them all; with ``stop_at_error`` no further one is begun once one has failed."""
        failed = exhausted = False
        begun = 0
        while True:
            while self._busy < self._window and not exhausted and not (failed and stop_at_error):
                try:
                    call = next(calls, None)
                except (TypeError, ValueError, EngineError) as error:
                    # Building a call checks its arguments; the failure is that item's.
                    self.ended[begun] = error
                    call, failed = None, True
                    begun += 1
                    continue
                if call is None:
                    exhausted = True
                    break
                self._busy += 1
                self._step(_Flight(self._channel, call, begun), call.send, None)
                failed = failed or isinstance(self.ended.get(begun), Exception)
                begun += 1
            if not self._busy:
                return
            failed = self._advance() or failed

    def _advance(self) -> bool:
        """Let what has ended or woken go on; whether a call failed."""
        before = len(self.ended)
        wait_s = LONGEST_POLL_S
        while self._alarms:
            at_s, _, token, flight = self._alarms[0]
            if token and (flight.newest != token or token not in self._flying):
                heapq.heappop(self._alarms)  # answered meanwhile
                continue
            wait_s = min(wait_s, max(0.0, at_s - time.monotonic()))
            break
        if self._flying:
            for arrival in self._channel.poll(wait_s):
                landed = self._flying.pop(arrival.token, None)
                if landed is not None:
                    self._step(landed, landed.ended, arrival)
        elif wait_s:
            time.sleep(wait_s)
        now_s = time.monotonic()
        while self._alarms and self._alarms[0][0] <= now_s:
            _, _, token, flight = heapq.heappop(self._alarms)
            if not token:
                self._step(flight, flight.call.send, None)
            elif flight.newest == token and token in self._flying:
                self._step(flight, flight.late, None)
        return any(isinstance(each, Exception) for each in list(self.ended.values())[before:])

    def _step(self, flight: _Flight, resume: Callable[[Any], Any], answer: Any) -> None:
        """Resume a call with what it waited for, until it waits again or ends. None begins it, or ends its pause."""
        try:
            step = resume(answer)
            while True:
                if isinstance(step, Pause):
                    self._give_up(flight)
                    self._wake(time.monotonic() + step.seconds, 0, flight)
                    return
                if isinstance(step, Exchange) and step.alone:
                    self._give_up(flight)
                try:
                    flight.begin(step)
                except EngineError as error:
                    step = flight.call.throw(error)
                    continue
                if flight.newest:
                    self._flying[flight.newest] = flight
                    self._wake(flight.until_s, flight.newest, flight)
                return
        except StopIteration as stop:
            self._end(flight, stop.value)
        except (EngineError, ValueError, TypeError) as error:
            self._end(flight, error)

    def _wake(self, at_s: float, token: int, flight: _Flight) -> None:
        if at_s < math.inf:
            heapq.heappush(self._alarms, (at_s, next(self._numbers), token, flight))

    def _give_up(self, flight: _Flight) -> None:
        for token in flight.peers:
            self._flying.pop(token, None)
        flight.give_up()

    def _end(self, flight: _Flight, result: Any) -> None:
        self._give_up(flight)
        self._busy -= 1
        self.ended[flight.index] = result


def drive_many(
    channel: Channel, calls: Iterable[Call[T]], *, window: int = WINDOW, stop_at_error: bool = True
) -> list[Any]:
    """Run calls over one channel, pipelined; results and exceptions in the calls' order.

    With ``stop_at_error`` the list may be short: no call is begun after a failure.
    """
    pipeline = _Pipeline(channel, window)
    pipeline.run(iter(calls), stop_at_error)
    return [pipeline.ended[index] for index in sorted(pipeline.ended)]


# --- the pool ---


class _Channels:
    """Channels, one for each thread that is calling; idle ones are reused last in, first out."""

    def __init__(self, make: Callable[[], Channel], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._idle: list[tuple[float, Channel]] = []
        self._out = self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, timeout_s: float) -> Channel:
        with self._changed:
            if self._out >= self._limit and not self._wait(timeout_s):
                raise Overloaded(f"all {self._limit} channels were in use for {timeout_s:g} s")
            if self._closed:
                raise _closed()
            self._out += 1
            if self._idle:
                return self._idle.pop()[1]
        try:
            return self._make()
        except BaseException:
            self._returned()
            raise

    def _wait(self, timeout_s: float) -> bool:
        """Whether there was room within the time; with the condition held."""
        self._waiting += 1
        try:
            return self._changed.wait_for(lambda: self._closed or self._out < self._limit, timeout_s)
        finally:
            self._waiting -= 1

    def give(self, channel: Channel, *, broken: bool = False) -> None:
        if not broken:
            with self._changed:
                if not self._closed:
                    self._idle.append((time.monotonic(), channel))
                    self._out -= 1
                    if self._waiting:
                        self._changed.notify_all()
                    return
        channel.close()
        self._returned()

    def _returned(self) -> None:
        with self._changed:
            self._out -= 1
            self._changed.notify_all()

    def reap(self, older_than_s: float) -> None:
        """Close the channels that have been idle for so long."""
        limit = time.monotonic() - older_than_s
        with self._changed:
            old = [channel for since, channel in self._idle if since <= limit]
            self._idle = [each for each in self._idle if each[0] > limit]
        for channel in old:
            channel.close()

    def close(self) -> None:
        """Give none out any more, and close the idle ones; those in use are closed when they come back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.reap(-1.0)


def _closed() -> EngineError:
    return EngineError("the engine is closed")


def _channel_limit(members: int) -> int:
    """As many channels as half of the process's file descriptors can connect to every member."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 65_536 if soft == resource.RLIM_INFINITY else soft
    return max(1, min(MAX_CHANNELS, files // 2 // (FILES_PER_CONNECTION * max(1, members))))


# --- the engine ---


class Engine:
    """A client of a cluster: thread-safe, and a context manager. ``connect`` makes one.

    Every verb takes ``timeout`` in seconds (by default the configuration's; 15 s for creation and destruction) and
    raises the errors of ``engine.errors``; a wrong argument is a ``ValueError`` or ``TypeError``.
    """

    def __init__(self, settings: ClientSettings, *, max_channels: int | None = None) -> None:
        check_zmq_version()
        self._settings = settings
        self._timeout_s = check_timeout(settings.timeout_s)
        self._calls = make_calls(settings)
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 65_535)
        self._lock = threading.Lock()
        self._open = True
        members = Servers(settings.source)
        identity = settings.own_curve()
        limit = max_channels or _channel_limit(len(members))
        calls = self._calls

        def came_up(peer: str) -> None:
            calls.router.came_up(peer, calls.clock())

        self._channels = _Channels(
            lambda: Channel(identity, members, self._context, came_up, self._follower.heard_of), limit
        )
        self._shortcuts = Shortcuts(
            self._calls,
            settings.source,
            identity,
            members,
            open_line,
            most=LINES_OF_CHANNEL * limit,
            max_ciphertext=MAX_CIPHERTEXT,
        )
        self._warmer = make_warmer(settings, self._calls, self._context)
        self._follower = Follower(
            self._context,
            settings.source,
            settings.own_curve(),
            self._calls.router,
            self._reap,
            look_of(self._warmer),
        )

    def _reap(self) -> None:
        self._channels.reap(IDLE_MAX_S)
        self._shortcuts.reap(time.monotonic() - IDLE_MAX_S)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine(client={self._settings.identity.name!r}, cluster={self._settings.cluster.name!r})"

    def close(self) -> None:
        """Close the connections and end the thread. Calls under way in other threads end with an ``EngineError``."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        if self._shortcuts.forked:
            return  # the sockets are the parent's
        self._shortcuts.close()
        self._channels.close()
        end_threads(self._follower, self._warmer)

    @property
    def cluster(self) -> Cluster:
        """The verified cluster manifest this client goes by."""
        return self._settings.cluster

    @property
    def name(self) -> str:
        """The client's own name in the cluster."""
        return self._settings.identity.name

    @property
    def routing_table(self) -> RoutingTable | None:
        """The routing table in force; None where no balancer was heard yet."""
        return self._calls.router.table

    @property
    def table_stats(self) -> TableStats:
        """How many routing tables were installed and refused."""
        return self._follower.stats

    @property
    def prewarm_stats(self) -> PrewarmStats:
        """How many keys were loaded ahead of their use."""
        return prewarm_stats_of(self._warmer)

    @property
    def latency_stats(self) -> dict[str, LatencyStats]:
        """How long the answers to this client's requests took, by request class, such as ``encrypt/aes-256-gcm``."""
        return self._calls.round_trips()

    # --- uses of a key ---

    def encrypt(
        self, name: str, plaintext: bytes, *, associated_data: bytes = b"", timeout: float | None = None
    ) -> bytes:
        """Encrypt at most 48 KiB (``encrypt_stream`` takes any length); ``associated_data`` is authenticated too."""
        wait_s = self._wait_s(timeout)
        lost = Lost()
        done = self._directly(_ENCRYPT, name, plaintext, associated_data, b"", None, wait_s, lost)
        if done is not None:
            return done
        return self._run(self._calls.encrypt(name, plaintext, associated_data, wait_s, lost=lost), wait_s)

    def decrypt(
        self,
        name: str,
        ciphertext: bytes,
        *,
        associated_data: bytes = b"",
        version: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """The plaintext, or ``InvalidTag`` if ciphertext or associated data were changed.

        A ciphertext of AES-GCM says by which ``version`` of the key it was made. One of RSA-OAEP does not: all are
        tried if it is not given, the newest first and at most 16.
        """
        wait_s = self._wait_s(timeout)
        lost = Lost()
        if version is None:
            done = self._directly(_DECRYPT, name, ciphertext, associated_data, b"", None, wait_s, lost)
            if done is not None:
                return done
        call = self._calls.decrypt(name, ciphertext, associated_data, wait_s, version=as_version(version), lost=lost)
        return self._run(call, wait_s)

    def sign(
        self, name: str, message: bytes | None = None, *, digest: bytes | None = None, timeout: float | None = None
    ) -> bytes:
        """Sign a message, or its digest where the algorithm hashes first; ECDSA signatures are DER."""
        wait_s = self._wait_s(timeout)
        lost = Lost()
        done = self._directly(_SIGN, name, message, b"", b"", digest, wait_s, lost)
        if done is not None:
            return done
        return self._run(self._calls.sign(name, message, digest, wait_s, lost=lost), wait_s)

    def verify(
        self,
        name: str,
        message: bytes | None,
        signature: bytes,
        *,
        digest: bytes | None = None,
        version: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Raise ``InvalidSignature`` unless the signature is the key's for the message (None with ``digest``).

        Without ``version`` all versions of the key are tried, the newest first and at most 16.
        """
        wait_s = self._wait_s(timeout)
        lost = Lost()
        if version is None and self._directly(_VERIFY, name, message, b"", signature, digest, wait_s, lost) is not None:
            return
        number = as_version(version)
        self._run(self._calls.verify(name, message, signature, digest, wait_s, version=number, lost=lost), wait_s)

    def mac(self, name: str, message: bytes, *, timeout: float | None = None) -> bytes:
        """The MAC of at most 48 KiB."""
        wait_s = self._wait_s(timeout)
        lost = Lost()
        done = self._directly(_MAC, name, message, b"", b"", None, wait_s, lost)
        if done is not None:
            return done
        return self._run(self._calls.mac(name, message, wait_s, lost=lost), wait_s)

    def verify_mac(
        self, name: str, message: bytes, tag: bytes, *, version: int | None = None, timeout: float | None = None
    ) -> None:
        """Raise ``InvalidSignature`` unless ``tag`` is the message's MAC; ``version`` as in ``verify``."""
        wait_s = self._wait_s(timeout)
        lost = Lost()
        if version is None and self._directly(_VERIFY_MAC, name, message, b"", tag, None, wait_s, lost) is not None:
            return
        number = as_version(version)
        self._run(self._calls.verify_mac(name, message, tag, wait_s, version=number, lost=lost), wait_s)

    # --- batches ---

    @overload
    def encrypt_many(
        self,
        name: str,
        plaintexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = ...,
        timeout: float | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[bytes]: ...

    @overload
    def encrypt_many(
        self,
        name: str,
        plaintexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = ...,
        timeout: float | None = ...,
        return_exceptions: bool,
    ) -> list[bytes | Exception]: ...

    def encrypt_many(
        self,
        name: str,
        plaintexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = b"",
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[bytes] | list[bytes | Exception]:
        """Encrypt a list, up to 64 requests under way at once; ``timeout`` is for each one.

        ``associated_data`` is one for all or a list. The first error is raised once nothing is under way any more; with
        ``return_exceptions`` errors take the place of their results.
        """
        wait_s = self._wait_s(timeout)
        pairs = pair_items(plaintexts, associated_data)
        uses = [(data, aad, b"") for data, aad in pairs]
        return self._run_many(
            _ENCRYPT, name, uses, lambda at: self._calls.encrypt(name, *pairs[at], wait_s), wait_s, return_exceptions
        )

    @overload
    def decrypt_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = ...,
        timeout: float | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[bytes]: ...

    @overload
    def decrypt_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = ...,
        timeout: float | None = ...,
        return_exceptions: bool,
    ) -> list[bytes | Exception]: ...

    def decrypt_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = b"",
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[bytes] | list[bytes | Exception]:
        """Decrypt a list, as ``encrypt_many`` encrypts one."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(ciphertexts, associated_data)
        uses = [(data, aad, b"") for data, aad in pairs]
        return self._run_many(
            _DECRYPT, name, uses, lambda at: self._calls.decrypt(name, *pairs[at], wait_s), wait_s, return_exceptions
        )

    @overload
    def sign_many(
        self,
        name: str,
        messages: Sequence[bytes],
        *,
        timeout: float | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[bytes]: ...

    @overload
    def sign_many(
        self, name: str, messages: Sequence[bytes], *, timeout: float | None = ..., return_exceptions: bool
    ) -> list[bytes | Exception]: ...

    def sign_many(
        self, name: str, messages: Sequence[bytes], *, timeout: float | None = None, return_exceptions: bool = False
    ) -> list[bytes] | list[bytes | Exception]:
        """Sign a list of messages; the rest as in ``encrypt_many``."""
        wait_s = self._wait_s(timeout)
        items = _listed(messages)
        uses = [(message, b"", b"") for message in items]
        return self._run_many(
            _SIGN, name, uses, lambda at: self._calls.sign(name, items[at], None, wait_s), wait_s, return_exceptions
        )

    def verify_many(
        self,
        name: str,
        pairs: Sequence[tuple[bytes, bytes]],
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Exception | None]:
        """Verify a list of (message, signature); a None for each that is right. The rest as in ``encrypt_many``."""
        wait_s = self._wait_s(timeout)
        items = _listed(pairs)
        uses = [(message, b"", signature) for message, signature in items]
        done = self._run_many(
            _VERIFY,
            name,
            uses,
            lambda at: self._calls.verify(name, *items[at], None, wait_s),
            wait_s,
            return_exceptions,
        )
        return [each if isinstance(each, Exception) else None for each in done]

    @overload
    def mac_many(
        self,
        name: str,
        messages: Sequence[bytes],
        *,
        timeout: float | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[bytes]: ...

    @overload
    def mac_many(
        self, name: str, messages: Sequence[bytes], *, timeout: float | None = ..., return_exceptions: bool
    ) -> list[bytes | Exception]: ...

    def mac_many(
        self, name: str, messages: Sequence[bytes], *, timeout: float | None = None, return_exceptions: bool = False
    ) -> list[bytes] | list[bytes | Exception]:
        """The MACs of a list of messages; the rest as in ``encrypt_many``."""
        wait_s = self._wait_s(timeout)
        items = _listed(messages)
        uses = [(message, b"", b"") for message in items]
        return self._run_many(
            _MAC, name, uses, lambda at: self._calls.mac(name, items[at], wait_s), wait_s, return_exceptions
        )

    # --- what older versions encrypted ---

    def rewrap(
        self, name: str, ciphertext: bytes, *, associated_data: bytes = b"", timeout: float | None = None
    ) -> bytes:
        """What was encrypted, encrypted by the newest version of the key: AES-GCM alone. No node shows the plaintext.

        A ciphertext of the newest version is checked and comes back as it is.
        """
        return self.rewrap_many(name, [ciphertext], associated_data=associated_data, timeout=timeout)[0]

    @overload
    def rewrap_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = ...,
        timeout: float | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[bytes]: ...

    @overload
    def rewrap_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = ...,
        timeout: float | None = ...,
        return_exceptions: bool,
    ) -> list[bytes | Exception]: ...

    def rewrap_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = b"",
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[bytes] | list[bytes | Exception]:
        """Rewrap a list, of any versions, up to 32 in a request; the rest as in ``encrypt_many``."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(ciphertexts, associated_data)
        if len(pairs) > MAX_BATCH:
            raise ValueError(f"a batch of {len(pairs)}; the limit is {MAX_BATCH}")
        items = [(as_bytes("ciphertext", data), as_bytes("associated_data", aad)) for data, aad in pairs]
        batches = rewrap_batches(items)
        calls = (self._calls.rewrap(name, [items[at] for at in batch], wait_s) for batch in batches)
        done = self._with_channel(partial(drive_many, window=REWRAP_WINDOW, stop_at_error=False), calls, wait_s)
        return spread_results(len(items), batches, done, return_exceptions=return_exceptions)

    # --- streams (see engine.client.files) ---

    def encrypt_stream(
        self,
        name: str,
        source: BinaryIO,
        sink: BinaryIO,
        *,
        associated_data: bytes = b"",
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Encrypt a file of any length; the bytes read. ``progress`` is told the bytes done so far."""
        from engine.client import files

        return files.encrypt_stream(self, name, source, sink, associated_data, progress, timeout=timeout)

    def decrypt_stream(
        self,
        name: str,
        source: BinaryIO,
        sink: BinaryIO,
        *,
        associated_data: bytes = b"",
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Decrypt what ``encrypt_stream`` wrote; ``InvalidTag`` leaves a part in the sink that must be thrown away."""
        from engine.client import files

        return files.decrypt_stream(self, name, source, sink, associated_data, progress, timeout=timeout)

    def rewrap_stream(
        self,
        name: str,
        source: BinaryIO,
        sink: BinaryIO,
        *,
        associated_data: bytes = b"",
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Have what ``encrypt_stream`` wrote encrypted by the newest version of the key; the bytes written."""
        from engine.client import files

        return files.rewrap_stream(self, name, source, sink, associated_data, progress, timeout=timeout)

    # --- keys ---

    def create_key(
        self,
        name: str,
        algorithm: str,
        threshold: int | None = None,
        shares: int | None = None,
        *,
        uses_max: int | None = None,
        timeout: float | None = None,
    ) -> KeyInfo:
        """Generate a key inside the cluster, split t-of-n (by default over at most 5 nodes, with a majority as t).

        ``uses_max`` is how often each version of it may encrypt, sign and make MACs, by all nodes together: by default
        2^31 times for AES-GCM, and any number for the others. ``KeyExhausted`` says that it was.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        call = self._calls.create_key(name, algorithm, threshold, shares, wait_s, uses_max)
        return self._run(call, wait_s)

    def import_key(
        self,
        name: str,
        algorithm: str,
        key_material: bytes,
        threshold: int | None = None,
        shares: int | None = None,
        *,
        timeout: float | None = None,
    ) -> KeyInfo:
        """Import raw bytes (AES, HMAC) or an unencrypted PKCS#8 key in DER or PEM (the others)."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        call = self._calls.import_key(name, algorithm, key_material, threshold, shares, wait_s)
        return self._run(call, wait_s)

    def rotate_key(self, name: str, *, timeout: float | None = None) -> KeyInfo:
        """Make the next version of a key: from now on it is what encrypts, signs and makes MACs under that name.

        Older versions go on decrypting and verifying what they made. If another client rotates it meanwhile, the
        version that this makes is the result.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.rotate_key(name, wait_s), wait_s)

    @overload
    def destroy_key(self, name: str, *, after: None = None, timeout: float | None = None) -> Destroyed: ...

    @overload
    def destroy_key(self, name: str, *, after: float, timeout: float | None = None) -> KeySettings: ...

    def destroy_key(
        self, name: str, *, after: float | None = None, timeout: float | None = None
    ) -> Destroyed | KeySettings:
        """Destroy a key for good, all its versions.

        With ``after`` that is done in so many seconds, at most 366 days; all uses are refused from now on, and until
        then ``restore_key`` takes it back.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        if after is not None:
            return self._run(self._calls.destroy_later(name, after, wait_s), wait_s)
        return self._run(self._calls.destroy_key(name, wait_s), wait_s)

    def restore_key(self, name: str, *, timeout: float | None = None) -> KeySettings:
        """Take back ``destroy_key(after=...)`` before the time has come; the key is then enabled or disabled as before.

        ``KeyNotFound`` if it has.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.restore_key(name, wait_s), wait_s)

    def disable_key(self, name: str, *, timeout: float | None = None) -> KeySettings:
        """Have every node refuse every use of a key with ``KeyDisabled`` until it is enabled again.

        It goes on being refreshed, reshared and listed. Nodes that could not be told are ``pending``: they learn it
        within seconds once they and the registry are up, and meanwhile get no shares from the others.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.disable_key(name, wait_s), wait_s)

    def enable_key(self, name: str, *, timeout: float | None = None) -> KeySettings:
        """Let a disabled key be used again."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.enable_key(name, wait_s), wait_s)

    def set_min_version(self, name: str, version: int, *, timeout: float | None = None) -> KeySettings:
        """Have every node refuse uses of the versions of a key below this one with ``VersionRetired``.

        It can be lowered again. ``ValueError`` for a version that the key does not have yet.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.set_min_version(name, version, wait_s), wait_s)

    def refresh_key(self, name: str, *, timeout: float | None = None) -> KeyInfo:
        """Replace all shares of a key, and keep the key: a new epoch, whose shares don't fit to any from before.

        All holders must be up; else ``QuorumUnavailable`` names those that are not, and nothing has changed.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.refresh_key(name, wait_s), wait_s)

    def reshare_key(
        self,
        name: str,
        threshold: int | None = None,
        shares: int | None = None,
        *,
        holders: Sequence[str] | None = None,
        without: Sequence[str] = (),
        version: int | None = None,
        timeout: float | None = None,
    ) -> KeyInfo:
        """Share a key among other holders, of whom ``threshold`` will suffice, and keep the key: a new epoch.

        What is not given stays as it is; with ``shares`` alone, the holders are the first of the key's placement group.
        All holders of before must be up, but those in ``without``, which are given up, and one more than the old
        threshold must remain: else it can't be seen that none of them cheats. Those that are no holders any more erase
        their share. ``QuorumUnavailable`` and ``ShareCorrupt`` name the holders, and nothing has changed.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        number = as_version(version)
        return self._run(self._calls.reshare_key(name, threshold, shares, holders, without, wait_s, number), wait_s)

    def degraded_keys(self, without: str = "", *, timeout: float | None = None) -> tuple[DegradedKey, ...]:
        """The versions of keys that lack a share, by name; with ``without`` as it would be if that node were lost.

        Asked of a balancer, whose books know what nodes miss. ``RegistryUnavailable``: none answers.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.degraded_keys(without, wait_s), wait_s)

    def repair_key(self, key: DegradedKey, *, timeout: float | None = None) -> KeyInfo:
        """Have the missing shares of a key made anew, also where no more than its threshold are left: a new epoch.

        By a reshare to the same holders; a node that is none any more is replaced by the next of the placement group.
        ``ValueError``: there is no node for that. ``QuorumUnavailable`` names holders that are down.
        """
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return self._run(self._calls.repair_key(key.name, wait_s, key.version, key.missing), wait_s)

    def key_info(self, name: str, *, version: int | None = None, timeout: float | None = None) -> KeyInfo:
        """What the signed manifest and certificate say about a key, asked afresh: of the newest version, or another."""
        wait_s = self._wait_s(timeout)
        return self._run(self._calls.key_info(name, wait_s, as_version(version)), wait_s)

    def key_versions(self, name: str, *, timeout: float | None = None) -> tuple[KeyInfo, ...]:
        """The versions of a key, asked afresh, the newest first and at most 100."""
        wait_s = self._wait_s(timeout)
        return self._run(self._calls.key_versions(name, wait_s), wait_s)

    def public_key(self, name: str, *, version: int | None = None, timeout: float | None = None) -> str:
        """The public key, SubjectPublicKeyInfo in PEM; ``ValueError`` for a symmetric key."""
        wait_s = self._wait_s(timeout)
        return self._run(self._calls.public_key(name, wait_s, as_version(version)), wait_s)

    def list_keys(self, pattern: str = "*", *, timeout: float | None = None) -> tuple[KeySummary, ...]:
        """The keys whose names match a shell glob, by name: the union of what the nodes that answer hold."""
        wait_s = self._wait_s(timeout)
        return merge_lists(
            answered_by_any(self._ask_all(lambda node: self._calls.list_at(node, pattern, wait_s), wait_s))
        )

    def flush(self, name: str = "", *, timeout: float | None = None) -> int:
        """Drop one key (or all) from the caches of the nodes that answer; how many were dropped."""
        wait_s = self._wait_s(timeout)
        outcomes = self._ask_all(lambda node: self._calls.flush_at(node, name, wait_s), wait_s)
        self._calls.router.forget_loaded(name)
        return sum(answered_by_any(outcomes))

    def prewarm(self, name: str, *, timeout: float | None = None) -> tuple[str, ...]:
        """Have the key's combiners load it before its first use; those that did. It raises where none could."""
        wait_s = self._wait_s(timeout)
        known = self._run(self._calls.describe(name, wait_s), wait_s)
        return succeeded(self._run_all((self._calls.prewarm_at(node, name, wait_s) for node in known.holders), wait_s))

    def status(
        self, *, latency: bool = False, plan: bool = False, timeout: float | None = None
    ) -> tuple[MemberStatus, ...]:
        """Every node's and balancer's status, or the error in its place.

        With ``latency`` nodes say where their time went too, with ``plan`` balancers what load they expect and what
        they would move for it.
        """
        wait_s = self._wait_s(timeout)
        members = (*self.cluster.of_role("node"), *self.cluster.of_role("balancer"))
        calls = (self._calls.status_at(member, wait_s, latency=latency, plan=plan) for member in members)
        done = self._run_all(calls, wait_s)
        return tuple(each for each in done if isinstance(each, MemberStatus))

    # --- running ---

    def _wait_s(self, timeout: float | None, default_s: float | None = None) -> float:
        if timeout is None:
            return max(default_s or 0.0, self._timeout_s)
        return check_timeout(timeout)

    def _check_usable(self) -> None:
        if not self._open:
            raise _closed()
        if self._shortcuts.forked:
            raise EngineError("the process was forked after connect(); connect again in the child")

    def _directly(
        self,
        verb: str,
        name: str,
        data: bytes | None,
        associated_data: bytes,
        proof: bytes,
        digest: bytes | None,
        timeout_s: float,
        lost: Lost,
    ) -> bytes | None:
        """The result of a use by the shortest way, or None where the ordinary one has to be taken."""
        self._check_usable()
        if active_trace() is not None:
            return None  # the shortest way carries no extension
        return self._shortcuts.use(verb, name, data, associated_data, proof, digest, timeout_s, lost)

    def _take(self, timeout_s: float) -> Channel:
        self._check_usable()
        return self._channels.take(timeout_s)

    def _run(self, call: Call[T], timeout_s: float) -> T:
        return self._with_channel(drive, call, timeout_s)

    def _with_channel(self, use: Callable[[Channel, A], T], argument: A, timeout_s: float) -> T:
        channel = self._take(timeout_s)
        clean = False
        try:
            result = use(channel, argument)
            clean = True
            return result
        except (EngineError, ValueError, TypeError):
            clean = True
            raise
        except zmq.ZMQError:
            if not self._open:
                raise _closed() from None
            raise
        finally:
            # After anything unexpected (a KeyboardInterrupt) requests may be under way: such a channel is not reused.
            self._channels.give(channel, broken=not clean)

    def _run_all(self, calls: Iterable[Call[T]], timeout_s: float) -> list[Any]:
        return self._with_channel(partial(drive_many, stop_at_error=False), calls, timeout_s)

    def _run_many(
        self,
        verb: str,
        name: str,
        uses: list[tuple[Any, Any, Any]],
        call: Callable[[int], Call[bytes]],
        timeout_s: float,
        return_exceptions: bool,
    ) -> list[Any]:
        """Many uses of a key: by the shortest way as far as that goes, and ``call`` makes the ordinary way's of one."""
        if len(uses) > MAX_BATCH:
            raise ValueError(f"a batch of {len(uses)}; the limit is {MAX_BATCH}")
        done: list[Any] = [None] * len(uses)
        left = self._many_directly(verb, name, uses, done, range(len(uses)), timeout_s, return_exceptions)
        if len(left) == len(uses) > 1:  # the key may be cold, or unknown: the first use changes that
            self._many_ordinarily(name, call, done, left[:1], timeout_s, return_exceptions)
            left = self._many_directly(verb, name, uses, done, left[1:], timeout_s, return_exceptions)
        self._many_ordinarily(name, call, done, left, timeout_s, return_exceptions)
        return done

    def _many_directly(
        self,
        verb: str,
        name: str,
        uses: list[tuple[Any, Any, Any]],
        done: list[Any],
        left: Sequence[int],
        timeout_s: float,
        return_exceptions: bool,
    ) -> Sequence[int]:
        """Do what the shortest way can; what is left then."""
        self._check_usable()
        if active_trace() is not None:
            return left
        results = self._shortcuts.use_many(verb, name, [uses[at] for at in left], timeout_s, not return_exceptions)
        for at, result in zip(left, results, strict=True):
            if isinstance(result, Exception) and not return_exceptions:
                raise result
            done[at] = result
        return [at for at, result in zip(left, results, strict=True) if result is None]

    def _many_ordinarily(
        self,
        name: str,
        call: Callable[[int], Call[bytes]],
        done: list[Any],
        left: Sequence[int],
        timeout_s: float,
        return_exceptions: bool,
    ) -> None:
        if not left:
            return

        def use(channel: Channel, calls: Iterable[Call[bytes]]) -> list[Any]:
            # One description first, so that not every call of the window asks for it.
            drive(channel, self._calls.describe(name, timeout_s))
            return drive_many(channel, calls, stop_at_error=not return_exceptions)

        # The list is short where an error has ended it.
        for at, result in zip(left, self._with_channel(use, map(call, left), timeout_s), strict=False):
            if isinstance(result, Exception) and not return_exceptions:
                raise result
            done[at] = result

    def _ask_all(self, make: Callable[[str], Call[T]], timeout_s: float) -> Mapping[str, T | Exception]:
        nodes = list(self.cluster.nodes)
        done = self._run_all([make(node) for node in nodes], timeout_s)
        return dict(zip(nodes, done, strict=True))


def spread_results(
    count: int, batches: Sequence[Sequence[int]], done: Sequence[Any], *, return_exceptions: bool
) -> list[Any]:
    """The results of batches at the places of their items; the first error raised, or in the place of each result."""
    results: list[Any] = [None] * count
    for batch, told in zip(batches, done, strict=True):
        for at, result in zip(batch, [told] * len(batch) if isinstance(told, Exception) else told, strict=True):
            results[at] = result
    for result in results:
        if isinstance(result, Exception) and not return_exceptions:
            raise result
    return results


def _listed(items: Sequence[T]) -> list[T]:
    if isinstance(items, bytes | bytearray | memoryview | str):
        raise TypeError(f"a list is needed, not {type(items).__name__}")
    return list(items)


def pair_items(items: Sequence[bytes], associated_data: bytes | Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Each item with its associated data: one for all, or a list of the same length."""
    listed = _listed(items)
    if isinstance(associated_data, bytes | bytearray | memoryview):
        return [(item, bytes(associated_data)) for item in listed]
    each = _listed(associated_data)
    if len(each) != len(listed):
        raise ValueError(f"{len(each)} values of associated_data for {len(listed)} items")
    return list(zip(listed, each, strict=True))
