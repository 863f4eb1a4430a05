"""The asynchronous client: the verbs of ``Engine`` as coroutines, multiplexed over one connection to each member.

It drives the same calls as the blocking client; here is only how exchanges meet the event loop. One engine belongs to
one loop and is used from its thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, overload

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine.client.ahead import PrewarmStats
from engine.client.calls import (
    CREATE_TIMEOUT_S,
    Call,
    DegradedKey,
    Destroyed,
    Ended,
    Exchange,
    KeyInfo,
    KeySettings,
    KeySummary,
    LatencyStats,
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
from engine.client.client import (
    MAX_BATCH,
    REWRAP_WINDOW,
    WINDOW,
    ClientSettings,
    as_settings,
    end_threads,
    look_of,
    make_calls,
    make_warmer,
    pair_items,
    prewarm_stats_of,
    spread_results,
)
from engine.client.config import CurveIdentity
from engine.client.follower import Follower, TableStats
from engine.client.membership import Servers
from engine.client.transport import (
    CONNECT_TIMEOUT_S,
    EVENTS,
    FRAME_MAX,
    REDIAL_TIMEOUT_S,
    REOPEN_S,
    Greeting,
    check_zmq_version,
    connect_options,
    request_frame,
    watch,
)
from engine.errors import AccessDenied, DeadlineExceeded, EngineError, NodeUnavailable, Overloaded, ProtocolError
from engine.protocol.manifest import Cluster, Member
from engine.protocol.requests import Welcome
from engine.protocol.table import RoutingTable
from engine.protocol.wire import Reply

__all__ = ["AsyncEngine", "connect"]

MAX_UNDER_WAY = 1_000
"""Most requests under way at one member; more are refused as ``Overloaded``, so that memory stays bounded."""
MAX_USES = 128
"""Most uses of keys under way at a time; what is beyond waits for its turn. More would make none faster."""

T = TypeVar("T")


class _Link:
    """The connection to one member, on the loop."""

    def __init__(
        self,
        context: zmq.Context[Any],
        identity: CurveIdentity,
        member: Member,
        loop: asyncio.AbstractEventLoop,
        came_up: Callable[[str], None],
        said: Callable[[Welcome], None],
    ) -> None:
        self._came_up = came_up
        self._name = member.name
        self._member = member
        self.own = self.current = identity
        self._client = identity.name
        self._loop = loop
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count(1)
        self._opened_s = self._down_s = loop.time()
        self._up = False
        self._greeting = Greeting(member.name, said)
        self.refused = False
        self._changed: list[asyncio.Future[None]] = []
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        connect_options(self._socket, identity, member)
        self._socket.immediate = 1
        self._socket.maxmsgsize = FRAME_MAX
        self._monitor = watch(context, self._socket, EVENTS)
        for socket in (self._socket, self._monitor):
            loop.add_reader(int(socket.get(zmq.FD)), self._drain)
        self._socket.connect(member.endpoint)
        self._drain()

    def close(self, error: EngineError) -> None:
        """Close the sockets; what is under way ends with ``error``."""
        for socket in (self._socket, self._monitor):
            self._loop.remove_reader(int(socket.get(zmq.FD)))
        self._socket.monitor(None, 0)
        self._monitor.close(0)
        self._socket.close(0)
        self._fail(error)
        self._wake()

    def leads_to(self, member: Member | None, own: CurveIdentity) -> bool:
        """Whether this is the connection to the member, made when this pair was wanted, as in the manifest."""
        known = self._member
        return self.current.public == own.public and (
            member is known
            or (member is not None and (member.endpoint, member.curve_public) == (known.endpoint, known.curve_public))
        )

    @property
    def given_up(self) -> bool:
        """Whether it has been down for so long that libzmq may have given it up, and nobody waits for it."""
        waited_for = self._up or self._pending or self._changed
        return not waited_for and self._loop.time() - self._down_s > REOPEN_S

    async def request(self, step: Exchange) -> Reply:
        """The reply to one request; raises ``EngineError`` where none comes."""
        verb, timeout_s = step.verb, step.timeout_s
        until_s = self._loop.time() + timeout_s
        if not self._up:
            await self._connected(timeout_s)
        if self._greeting.refusal is not None:
            raise self._greeting.refusal
        welcome = self._greeting.welcome
        most = min(MAX_UNDER_WAY, welcome.limits.connection_requests) if welcome else MAX_UNDER_WAY
        if len(self._pending) >= most:
            raise Overloaded(f"{most} requests are under way at {self._name}")
        number = next(self._ids)
        data = request_frame(self._greeting.version, number, verb, step.body, timeout_s, step.extensions)
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._pending[number] = future
        try:
            self._send(data)
            async with asyncio.timeout_at(until_s):
                return await future
        except TimeoutError:
            waited_ms = round(timeout_s * 1000)
            raise DeadlineExceeded(f"{self._name}: no reply to {verb} within {waited_ms} ms") from None
        finally:
            self._pending.pop(number, None)

    def _send(self, data: bytes) -> None:
        try:
            if self._greeting.due:
                self._socket.send(self._greeting.frame(next(self._ids)), zmq.DONTWAIT)
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            self._greeting.lost()
            raise NodeUnavailable(f"{self._name}: the connection is down or its send queue is full") from None
        # Sending may swallow the edge of the descriptor, so what has come meanwhile is looked for.
        self._loop.call_soon(self._drain)

    async def _connected(self, timeout_s: float) -> None:
        dialling_s = self._loop.time() - self._opened_s
        until_s = self._loop.time() + min(timeout_s, max(REDIAL_TIMEOUT_S, CONNECT_TIMEOUT_S - dialling_s))
        while not self._up and not self.refused and not self._socket.closed:
            changed: asyncio.Future[None] = self._loop.create_future()
            self._changed.append(changed)
            try:
                async with asyncio.timeout_at(until_s):
                    await changed
            except TimeoutError:
                break
        if self.refused:
            raise AccessDenied(f"{self._name} refuses the key of {self._client!r}: it is no member's in its manifest")
        if self._socket.closed or not self._up:
            raise NodeUnavailable(f"{self._name} can't be reached")

    def _drain(self) -> None:
        """Take in every event and reply there is; the descriptors tell only of changes."""
        if self._socket.closed:
            return
        while True:
            try:
                self._event(parse_monitor_message(self._monitor.recv_multipart(zmq.DONTWAIT))["event"])
            except zmq.Again:
                break
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            self._received(frames)

    def _event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._up, self.refused = True, False
            self._came_up(self._name)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._up, self.refused = False, True
        elif event == zmq.EVENT_DISCONNECTED:
            if self._up:
                self._down_s = self._loop.time()
            self._up = False
            self._greeting.lost()
            self._fail(NodeUnavailable(f"{self._name}: the connection broke"))
        self._wake()

    def _received(self, frames: list[bytes]) -> None:
        try:
            reply = self._greeting.reply_in(frames)
        except ProtocolError as error:
            self._fail(ProtocolError(f"{self._name}: {error}"))
            return
        if reply is None:
            return
        future = self._pending.get(reply.id)
        if future is not None and not future.done():
            future.set_result(reply)

    def _fail(self, error: EngineError) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)

    def _wake(self) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            if not future.done():
                future.set_result(None)


def connect(config: str | os.PathLike[str] | ClientSettings) -> AsyncEngine:
    """An asynchronous client of the cluster that ``config`` names (the path of a ``client.toml``, or settings).

    Called on a running event loop: ``async with engine.aio.connect("client.toml") as kq: ...``. The first connection is
    opened by the first call.
    """
    return AsyncEngine(as_settings(config), asyncio.get_running_loop())


class AsyncEngine:
    """A client of a cluster on an event loop; an asynchronous context manager. ``connect`` makes one.

    Any number of tasks may call its verbs at once: 128 uses of keys are under way at a time, and the others wait for
    their turn, within their timeouts. The verbs are those of ``Engine``, with the same arguments and errors.
    """

    def __init__(self, settings: ClientSettings, loop: asyncio.AbstractEventLoop) -> None:
        check_zmq_version()
        self._settings = settings
        self._timeout_s = check_timeout(settings.timeout_s)
        self._loop = loop
        self._calls = make_calls(settings)
        self._context: zmq.Context[Any] = zmq.Context()
        self._pid = os.getpid()
        self._open = True
        self._members = Servers(settings.source)
        self._own = settings.own_curve()
        self._links: dict[str, _Link] = {}
        self._room = asyncio.Semaphore(MAX_USES)
        self._warmer = make_warmer(settings, self._calls, self._context)
        self._follower = Follower(
            self._context, settings.source, settings.own_curve(), self._calls.router, news=look_of(self._warmer)
        )

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncEngine(client={self._settings.identity.name!r}, cluster={self._settings.cluster.name!r})"

    async def close(self) -> None:
        """Close the connections; calls under way end with an ``EngineError``."""
        if not self._open:
            return
        self._open = False
        if os.getpid() != self._pid:
            return  # the sockets are the parent's, and its loop must not lose sight of them
        for link in self._links.values():
            link.close(EngineError("the engine is closed"))
        self._links.clear()
        # It asks members, and joins threads; that must not hold the loop.
        await asyncio.to_thread(end_threads, self._follower, self._warmer)

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
        """As ``Engine.prewarm_stats``."""
        return prewarm_stats_of(self._warmer)

    @property
    def latency_stats(self) -> dict[str, LatencyStats]:
        """As ``Engine.latency_stats``."""
        return self._calls.round_trips()

    # --- uses of a key ---

    async def encrypt(
        self, name: str, plaintext: bytes, *, associated_data: bytes = b"", timeout: float | None = None
    ) -> bytes:
        """Encrypt at most 48 KiB; ``associated_data`` is authenticated too."""
        return await self._use(lambda wait_s: self._calls.encrypt(name, plaintext, associated_data, wait_s), timeout)

    async def decrypt(
        self,
        name: str,
        ciphertext: bytes,
        *,
        associated_data: bytes = b"",
        version: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """The plaintext, or ``InvalidTag`` if ciphertext or associated data were changed."""
        number = as_version(version)
        return await self._use(
            lambda wait_s: self._calls.decrypt(name, ciphertext, associated_data, wait_s, version=number), timeout
        )

    async def sign(
        self, name: str, message: bytes | None = None, *, digest: bytes | None = None, timeout: float | None = None
    ) -> bytes:
        """Sign a message, or its digest where the algorithm hashes first."""
        return await self._use(lambda wait_s: self._calls.sign(name, message, digest, wait_s), timeout)

    async def verify(
        self,
        name: str,
        message: bytes | None,
        signature: bytes,
        *,
        digest: bytes | None = None,
        version: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Raise ``InvalidSignature`` unless the signature is the key's for the message (None with ``digest``)."""
        number = as_version(version)
        await self._use(
            lambda wait_s: self._calls.verify(name, message, signature, digest, wait_s, version=number), timeout
        )

    async def mac(self, name: str, message: bytes, *, timeout: float | None = None) -> bytes:
        """The MAC of at most 48 KiB."""
        return await self._use(lambda wait_s: self._calls.mac(name, message, wait_s), timeout)

    async def verify_mac(
        self, name: str, message: bytes, tag: bytes, *, version: int | None = None, timeout: float | None = None
    ) -> None:
        """Raise ``InvalidSignature`` unless ``tag`` is the message's MAC."""
        number = as_version(version)
        await self._use(lambda wait_s: self._calls.verify_mac(name, message, tag, wait_s, version=number), timeout)

    # --- batches ---

    async def encrypt_many(
        self,
        name: str,
        plaintexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = b"",
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Encrypt a list, up to 64 under way at once; errors as in ``Engine.encrypt_many``."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(plaintexts, associated_data)
        return await self._many(
            name, pairs, lambda pair: self._calls.encrypt(name, pair[0], pair[1], wait_s), wait_s, return_exceptions
        )

    async def decrypt_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = b"",
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Decrypt a list, as ``encrypt_many`` encrypts one."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(ciphertexts, associated_data)
        return await self._many(
            name, pairs, lambda pair: self._calls.decrypt(name, pair[0], pair[1], wait_s), wait_s, return_exceptions
        )

    async def sign_many(
        self, name: str, messages: Sequence[bytes], *, timeout: float | None = None, return_exceptions: bool = False
    ) -> list[Any]:
        """Sign a list of messages; the rest as in ``encrypt_many``."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(messages, b"")
        return await self._many(
            name, pairs, lambda pair: self._calls.sign(name, pair[0], None, wait_s), wait_s, return_exceptions
        )

    async def verify_many(
        self,
        name: str,
        pairs: Sequence[tuple[bytes, bytes]],
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Exception | None]:
        """Verify a list of (message, signature); a None for each that is right."""
        wait_s = self._wait_s(timeout)
        done = await self._many(
            name,
            list(pairs),
            lambda pair: self._calls.verify(name, pair[0], pair[1], None, wait_s),
            wait_s,
            return_exceptions,
        )
        return [each if isinstance(each, Exception) else None for each in done]

    async def mac_many(
        self, name: str, messages: Sequence[bytes], *, timeout: float | None = None, return_exceptions: bool = False
    ) -> list[Any]:
        """The MACs of a list of messages; the rest as in ``encrypt_many``."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(messages, b"")
        return await self._many(
            name, pairs, lambda pair: self._calls.mac(name, pair[0], wait_s), wait_s, return_exceptions
        )

    # --- what older versions encrypted ---

    async def rewrap(
        self, name: str, ciphertext: bytes, *, associated_data: bytes = b"", timeout: float | None = None
    ) -> bytes:
        """What was encrypted, encrypted by the newest version of the key; as ``Engine.rewrap``."""
        done: list[bytes] = await self.rewrap_many(name, [ciphertext], associated_data=associated_data, timeout=timeout)
        return done[0]

    async def rewrap_many(
        self,
        name: str,
        ciphertexts: Sequence[bytes],
        *,
        associated_data: bytes | Sequence[bytes] = b"",
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Rewrap a list, as ``Engine.rewrap_many``."""
        wait_s = self._wait_s(timeout)
        pairs = pair_items(ciphertexts, associated_data)
        if len(pairs) > MAX_BATCH:
            raise ValueError(f"a batch of {len(pairs)}; the limit is {MAX_BATCH}")
        items = [(as_bytes("ciphertext", data), as_bytes("associated_data", aad)) for data, aad in pairs]
        batches = rewrap_batches(items)
        done: list[Any] = [None] * len(batches)
        queue = iter(enumerate(batches))

        async def worker() -> None:
            for index, batch in queue:
                some = [items[at] for at in batch]
                done[index] = await _outcome(lambda some=some: self._run(self._calls.rewrap(name, some, wait_s)))  # type: ignore[misc]

        async with asyncio.TaskGroup() as group:
            for _ in range(min(REWRAP_WINDOW, len(batches))):
                group.create_task(worker())
        return spread_results(len(items), batches, done, return_exceptions=return_exceptions)

    # --- keys ---

    async def create_key(
        self,
        name: str,
        algorithm: str,
        threshold: int | None = None,
        shares: int | None = None,
        *,
        uses_max: int | None = None,
        timeout: float | None = None,
    ) -> KeyInfo:
        """Generate a key inside the cluster, split t-of-n; ``uses_max`` as in ``Engine.create_key``."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return await self._run(self._calls.create_key(name, algorithm, threshold, shares, wait_s, uses_max))

    async def import_key(
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
        return await self._run(self._calls.import_key(name, algorithm, key_material, threshold, shares, wait_s))

    async def rotate_key(self, name: str, *, timeout: float | None = None) -> KeyInfo:
        """Make the next version of a key: from now on it is what encrypts, signs and makes MACs under that name."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return await self._run(self._calls.rotate_key(name, wait_s))

    @overload
    async def destroy_key(self, name: str, *, after: None = None, timeout: float | None = None) -> Destroyed: ...

    @overload
    async def destroy_key(self, name: str, *, after: float, timeout: float | None = None) -> KeySettings: ...

    async def destroy_key(
        self, name: str, *, after: float | None = None, timeout: float | None = None
    ) -> Destroyed | KeySettings:
        """Destroy a key for good; with ``after`` in so many seconds, until which ``restore_key`` takes it back."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        if after is not None:
            return await self._run(self._calls.destroy_later(name, after, wait_s))
        return await self._run(self._calls.destroy_key(name, wait_s))

    async def restore_key(self, name: str, *, timeout: float | None = None) -> KeySettings:
        """Take back ``destroy_key(after=...)`` before the time has come."""
        return await self._run(self._calls.restore_key(name, self._wait_s(timeout, CREATE_TIMEOUT_S)))

    async def disable_key(self, name: str, *, timeout: float | None = None) -> KeySettings:
        """Have every node refuse every use of a key with ``KeyDisabled`` until it is enabled again."""
        return await self._run(self._calls.disable_key(name, self._wait_s(timeout, CREATE_TIMEOUT_S)))

    async def enable_key(self, name: str, *, timeout: float | None = None) -> KeySettings:
        """Let a disabled key be used again."""
        return await self._run(self._calls.enable_key(name, self._wait_s(timeout, CREATE_TIMEOUT_S)))

    async def set_min_version(self, name: str, version: int, *, timeout: float | None = None) -> KeySettings:
        """Have every node refuse uses of the versions of a key below this one with ``VersionRetired``."""
        return await self._run(self._calls.set_min_version(name, version, self._wait_s(timeout, CREATE_TIMEOUT_S)))

    async def refresh_key(self, name: str, *, timeout: float | None = None) -> KeyInfo:
        """Replace all shares of a key, and keep the key: a new epoch, whose shares don't fit to any from before."""
        return await self._run(self._calls.refresh_key(name, self._wait_s(timeout, CREATE_TIMEOUT_S)))

    async def reshare_key(
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
        """Share a key among other holders, of whom ``threshold`` will suffice, and keep the key: a new epoch."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        number = as_version(version)
        return await self._run(self._calls.reshare_key(name, threshold, shares, holders, without, wait_s, number))

    async def degraded_keys(self, without: str = "", *, timeout: float | None = None) -> tuple[DegradedKey, ...]:
        """The versions of keys that lack a share, by name; with ``without`` as it would be if that node were lost."""
        return await self._run(self._calls.degraded_keys(without, self._wait_s(timeout, CREATE_TIMEOUT_S)))

    async def repair_key(self, key: DegradedKey, *, timeout: float | None = None) -> KeyInfo:
        """Have the missing shares of a key made anew, also where no more than its threshold are left: a new epoch."""
        wait_s = self._wait_s(timeout, CREATE_TIMEOUT_S)
        return await self._run(self._calls.repair_key(key.name, wait_s, key.version, key.missing))

    async def key_info(self, name: str, *, version: int | None = None, timeout: float | None = None) -> KeyInfo:
        """What the signed manifest and certificate say about a key, asked afresh: of the newest version, or another."""
        return await self._run(self._calls.key_info(name, self._wait_s(timeout), as_version(version)))

    async def key_versions(self, name: str, *, timeout: float | None = None) -> tuple[KeyInfo, ...]:
        """The versions of a key, asked afresh, the newest first and at most 100."""
        return await self._run(self._calls.key_versions(name, self._wait_s(timeout)))

    async def public_key(self, name: str, *, version: int | None = None, timeout: float | None = None) -> str:
        """The public key, SubjectPublicKeyInfo in PEM; ``ValueError`` for a symmetric key."""
        return await self._run(self._calls.public_key(name, self._wait_s(timeout), as_version(version)))

    async def list_keys(self, pattern: str = "*", *, timeout: float | None = None) -> tuple[KeySummary, ...]:
        """The keys whose names match a shell glob, by name: the union of what the nodes that answer hold."""
        wait_s = self._wait_s(timeout)
        return merge_lists(answered_by_any(await self._ask_all(lambda n: self._calls.list_at(n, pattern, wait_s))))

    async def flush(self, name: str = "", *, timeout: float | None = None) -> int:
        """Drop one key (or all) from the caches of the nodes that answer; how many were dropped."""
        wait_s = self._wait_s(timeout)
        outcomes = await self._ask_all(lambda node: self._calls.flush_at(node, name, wait_s))
        self._calls.router.forget_loaded(name)
        return sum(answered_by_any(outcomes))

    async def prewarm(self, name: str, *, timeout: float | None = None) -> tuple[str, ...]:
        """Have the key's combiners load it before its first use; those that did. It raises where none could."""
        wait_s = self._wait_s(timeout)
        known = await self._run(self._calls.describe(name, wait_s))
        return succeeded(
            (await self._ask_all(lambda n: self._calls.prewarm_at(n, name, wait_s), known.holders)).values()
        )

    async def status(
        self, *, latency: bool = False, plan: bool = False, timeout: float | None = None
    ) -> tuple[MemberStatus, ...]:
        """Every node's and balancer's status, or the error in its place.

        With ``latency`` nodes say where their time went too, with ``plan`` balancers what load they expect and what
        they would move for it.
        """
        wait_s = self._wait_s(timeout)
        members = (*self.cluster.of_role("node"), *self.cluster.of_role("balancer"))
        calls = [self._calls.status_at(member, wait_s, latency=latency, plan=plan) for member in members]
        return tuple(await asyncio.gather(*map(self._run, calls)))

    # --- running ---

    def _wait_s(self, timeout: float | None, default_s: float = 0.0) -> float:
        return max(default_s, self._timeout_s) if timeout is None else check_timeout(timeout)

    async def _use(self, make: Callable[[float], Call[T]], timeout: float | None) -> T:
        """Run a use of a key, with what is left of its time once it is its turn."""
        wait_s = self._wait_s(timeout)
        begun_s = self._loop.time()
        self._check_open()
        try:
            async with asyncio.timeout(wait_s if self._room.locked() else None):
                await self._room.acquire()
        except TimeoutError:
            raise DeadlineExceeded(
                f"not begun within {round(wait_s * 1000)} ms: {MAX_USES} uses of keys are under way, and others waited"
            ) from None
        try:
            return await self._run(make(max(1e-3, wait_s - (self._loop.time() - begun_s))))
        finally:
            self._room.release()

    async def _run(self, call: Call[T]) -> T:
        under_way: dict[asyncio.Task[Reply], str] = {}
        try:
            self._check_open()
            step = next(call)
            while True:
                # Outside the inner try: a closed engine ends the call, it is no node that failed.
                self._check_open()
                if isinstance(step, Pause):
                    _give_up(under_way)
                    await asyncio.sleep(step.seconds)
                    step = call.send(None)
                    continue
                newest, patience_s = None, None
                if isinstance(step, Exchange):
                    if step.alone:
                        _give_up(under_way)
                    newest, patience_s = self._loop.create_task(self._exchange(step)), step.patience_s
                    under_way[newest] = step.peer
                ended, _ = await asyncio.wait(under_way, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                step = call.send(None) if not ended else _resume(call, ended.pop(), newest, under_way)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            # A cancelled task leaves its call unfinished; closing it tells the router.
            _give_up(under_way)
            call.close()

    def _check_open(self) -> None:
        if not self._open:
            raise EngineError("the engine is closed")
        if os.getpid() != self._pid:
            raise EngineError("the process was forked after connect(); connect again in the child")
        if asyncio.get_running_loop() is not self._loop:
            raise EngineError("the engine belongs to another event loop")

    async def _exchange(self, step: Exchange) -> Reply:
        link, member = self._links.get(step.peer), self._members.get(step.peer)
        if link is not None and (link.given_up or not link.leads_to(member, self._own.current)):
            del self._links[step.peer]
            link.close(NodeUnavailable(f"{step.peer} can't be reached"))
            link = None
        if link is None:
            link = self._dial(step.peer, self._own.current)
        try:
            return await link.request(step)
        except AccessDenied as error:
            # Closed, since libzmq would knock again every few milliseconds for ever.
            if self._links.get(step.peer) is not link:
                raise
            del self._links[step.peer]
            link.close(error)
            other = self._own.instead(link.own)
            if other is None or link.own is not link.current:
                raise
            return await self._dial(step.peer, other).request(step)

    def _dial(self, peer: str, pair: CurveIdentity) -> _Link:
        self._check_open()  # a task of a call may begin after the end
        member = self._members.get(peer)
        if member is None:
            raise NodeUnavailable(f"{peer!r} is no member with an endpoint")
        link = _Link(self._context, pair, member, self._loop, self._came_up, self._follower.heard_of)
        link.current = self._own.current
        self._links[peer] = link
        return link

    def _came_up(self, peer: str) -> None:
        self._calls.router.came_up(peer, self._calls.clock())

    async def _many(
        self,
        name: str,
        items: Sequence[T],
        make: Callable[[T], Call[bytes]],
        timeout_s: float,
        return_exceptions: bool,
    ) -> list[Any]:
        if not items:
            return []
        if len(items) > MAX_BATCH:
            raise ValueError(f"a batch of {len(items)}; the limit is {MAX_BATCH}")
        await self._run(self._calls.describe(name, timeout_s))
        done: list[Any] = [None] * len(items)
        queue = iter(enumerate(items))
        failed = False

        async def worker() -> None:
            nonlocal failed
            for index, item in queue:
                if failed and not return_exceptions:
                    return
                done[index] = await _outcome(lambda item=item: self._run(make(item)))  # type: ignore[misc]
                failed = failed or isinstance(done[index], Exception)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(WINDOW, len(items))):
                group.create_task(worker())
        if not return_exceptions:
            for each in done:
                if isinstance(each, Exception):
                    raise each
        return done

    async def _ask_all(self, make: Callable[[str], Call[T]], nodes: Sequence[str] = ()) -> Mapping[str, T | Exception]:
        nodes = nodes or list(self.cluster.nodes)
        calls = [make(node) for node in nodes]
        done = await asyncio.gather(*(_outcome(lambda call=call: self._run(call)) for call in calls))  # type: ignore[misc]
        return dict(zip(nodes, done, strict=True))


def _give_up(under_way: dict[asyncio.Task[Reply], str]) -> None:
    for task in under_way:
        if task.done() and not task.cancelled():
            task.exception()  # else asyncio complains that nobody looked
        task.cancel()
    under_way.clear()


def _resume(
    call: Call[Any],
    ended: asyncio.Task[Reply],
    newest: asyncio.Task[Reply] | None,
    under_way: dict[asyncio.Task[Reply], str],
) -> Step:
    """Resume a call with one exchange's end; an error that is none of a member's or of the transport's is raised."""
    peer = under_way.pop(ended)
    error = ended.exception()
    if error is not None and not isinstance(error, EngineError):
        raise error
    if ended is not newest:
        return call.send(Ended(peer, None if error else ended.result(), error))
    return call.throw(error) if error else call.send(ended.result())


async def _outcome(begin: Callable[[], Awaitable[T]]) -> T | Exception:
    """What it comes to: the result, or the error as a value."""
    try:
        return await begin()
    except (EngineError, ValueError, TypeError) as error:
        return error
