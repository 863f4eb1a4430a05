"""A TCP proxy before every member, which can spoil each link between two processes by itself. It reads no message.

Who connects is told by the kernel: the connection's inode (sock_diag(7)) is among the descriptors of one of the known
processes. So one manifest serves all, and ``node2 -> node1`` can be cut while ``client -> node1`` goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

CHUNK = 64 * 1024
QUEUE = 64
"""Chunks on their way in one direction of one connection; then the sender waits, as TCP has it."""
CALL_S = 60.0
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
INODE_AT = 16 + 4 + 48 + 16
"""Where the inode is in an answer: behind the header, the states, the ports and addresses, and four counts."""
POLL_S = 0.02
FAMILIES_S = 2.0
UNKNOWN = "?"
CLIENT = "client"
TO, FROM = "to", "from"
"""From the connecting side to the listening one, and back."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a link does to its bytes. Lost packets are sent again by TCP, so what is dropped comes once it is healed.

    ``drop`` has the directions in which nothing passes; ``delay_s`` and at most ``jitter_s`` more are added to each
    chunk; ``bytes_per_s`` is a trickle (0: none); ``corrupt`` is the probability that a chunk has a flipped bit.
    ``refuse`` resets new connections.
    """

    drop: frozenset[str] = frozenset()
    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: int = 0
    corrupt: float = 0.0
    refuse: bool = False


CLEAR = Rule()
CUT = Rule(drop=frozenset({TO, FROM}))


@dataclass(eq=False, slots=True)
class _Link:
    """One connection through the proxy."""

    source: str
    target: str
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    half_open: bool = False


@dataclass(eq=False, slots=True)
class _Gate:
    """The port of a member, and where the member really listens."""

    target: str
    port: int
    to_port: int
    bound: socket.socket
    down: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Network:
    """The proxies of a cluster, in a thread of their own; ``start`` before use, ``close`` at the end."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._rules: list[tuple[str, str, Rule]] = []
        self._changed = asyncio.Event()
        self._links: set[_Link] = set()
        self._gates: list[_Gate] = []
        self._diag = _Diag()
        self._families: tuple[float, dict[str, list[int]]] = (0.0, {})
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.StreamWriter] = set()
        """Both sides of every connection, so that none can be collected before it is ended."""
        self.processes: Callable[[], Mapping[str, Iterable[int]]] = dict
        """The processes of each member: name -> ids."""
        self.seen: set[tuple[str, str]] = set()
        """Every link that was ever used."""
        self.spoiled = 0
        """Chunks that a rule delayed, held or changed, and connections that were reset or refused."""
        self._thread.start()

    # --- called by the harness ---

    def listen(self, target: str, port: int, to_port: int) -> None:
        """Take connections for a member at one port and pass them on to another."""
        self._call(self._listen(target, port, to_port))

    def forget(self) -> None:
        """Take no connections any more."""
        self._call(self._forget())

    def spoil(self, source: str, target: str, rule: Rule) -> None:
        """Have a rule for the links from ``source`` to ``target`` (shell globs); a later rule goes before."""
        self._call(self._set((source, target, rule)))

    def heal(self) -> None:
        """Forget all rules; half-open connections are broken."""
        self._call(self._set(None))

    def reset(self, source: str = "*", target: str = "*") -> int:
        """Break connections by a TCP reset; how many."""
        return self._call(self._reset(source, target))

    def half_open(self, source: str, target: str) -> int:
        """Break the far side of connections alone: the near side sees a peer that says nothing any more."""
        return self._call(self._half_open(source, target))

    def close(self) -> None:
        """End all connections and the thread."""
        if not self._thread.is_alive():
            return
        self.forget()
        self.reset()
        self._call(self._settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()
        self._diag.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(CALL_S)

    # --- inside the thread ---

    async def _listen(self, target: str, port: int, to_port: int) -> None:
        gate = _Gate(target, port, to_port, _bound(port))
        gate.task = asyncio.ensure_future(self._keep(gate))
        self._gates.append(gate)

    async def _keep(self, gate: _Gate) -> None:
        """Listen while the member does: a connection to a member that is down must be refused, as it would be.

        The port is bound meanwhile, which refuses too: it must not become another's.
        """
        while True:
            while not await _listens(gate.to_port):
                await asyncio.sleep(POLL_S)
            gate.down.clear()
            gate.bound.setblocking(False)
            gate.bound.listen(1024)
            self._loop.add_reader(gate.bound, self._accept, gate)
            await gate.down.wait()
            self._leave(gate)
            gate.bound = _bound(gate.port)

    async def _forget(self) -> None:
        gates, self._gates = self._gates, []
        for gate in gates:
            if gate.task is not None:
                gate.task.cancel()
                await asyncio.gather(gate.task, return_exceptions=True)
            self._leave(gate)

    async def _settle(self) -> None:
        """End every task, and let the loop close what they had open."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in list(self._held):
            self._end(writer)
        await asyncio.sleep(0.05)

    async def _set(self, rule: tuple[str, str, Rule] | None) -> None:
        if rule is None:
            self._rules.clear()
            for link in [each for each in self._links if each.half_open]:
                _abort(link.near)
        else:
            self._rules.insert(0, rule)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _reset(self, source: str, target: str) -> int:
        chosen = self._chosen(source, target)
        for link in chosen:
            _abort(link.near)
            _abort(link.far)
        self.spoiled += len(chosen)
        return len(chosen)

    async def _half_open(self, source: str, target: str) -> int:
        chosen = self._chosen(source, target)
        for link in chosen:
            link.half_open = True
            _abort(link.far)
        self.spoiled += len(chosen)
        return len(chosen)

    def _chosen(self, source: str, target: str) -> list[_Link]:
        return [each for each in self._links if fnmatchcase(each.source, source) and fnmatchcase(each.target, target)]

    def _rule(self, source: str, target: str) -> Rule:
        for of, to, rule in self._rules:
            if fnmatchcase(source, of) and fnmatchcase(target, to):
                return rule
        return CLEAR

    def _leave(self, gate: _Gate) -> None:
        self._loop.remove_reader(gate.bound)
        gate.bound.close()

    def _accept(self, gate: _Gate) -> None:
        """Serve the connections that came. Each ends with its task, also one that is cancelled before its first step.

        asyncio's own server loses those that come as it is closed.
        """
        with contextlib.suppress(OSError):
            while True:
                near, _ = gate.bound.accept()
                task = asyncio.ensure_future(self._serve(gate, near))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(partial(_close, near))

    def _end(self, writer: asyncio.StreamWriter) -> None:
        _abort(writer)
        self._held.discard(writer)

    async def _serve(self, gate: _Gate, near: socket.socket) -> None:
        near.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=near)
        self._held.add(writer)
        try:
            await self._serve_near(gate, reader, writer)
        finally:
            self._end(writer)

    async def _serve_near(self, gate: _Gate, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", gate.to_port)
        except OSError:
            gate.down.set()
            return
        self._held.add(far_writer)
        try:
            await self._join(gate.target, reader, writer, far_reader, far_writer)
        finally:
            self._end(far_writer)

    async def _join(
        self,
        target: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Pass on both ways until one side ends."""
        source = self._who(writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1])
        self.seen.add((source, target))
        if self._rule(source, target).refuse:
            self.spoiled += 1
            return
        for each in (writer, far_writer):
            with contextlib.suppress(OSError):  # it may have gone by now
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(source, target, writer, far_writer)
        self._links.add(link)
        ways = [
            asyncio.ensure_future(self._pass(link, reader, far_writer, TO)),
            asyncio.ensure_future(self._pass(link, far_reader, writer, FROM)),
        ]
        self._tasks.update(ways)
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            while link.half_open and not ways[0].done():
                await asyncio.wait(ways[:1])
        finally:
            self._links.discard(link)
            _abort(writer)  # both before anything that may be cancelled
            _abort(far_writer)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._tasks.difference_update(ways)

    async def _pass(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """Pass bytes on in one direction, each chunk when its time has come."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE)
        sender = asyncio.ensure_future(self._send(link, queue, writer, way))
        self._tasks.add(sender)
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(CHUNK):
                    rule = self._rule(link.source, link.target)
                    wait_s = rule.delay_s + rule.jitter_s * self._rng.random()
                    await queue.put((self._loop.time() + wait_s, data))
            # The end is no chunk: what is under way is lost with the connection, as a reset has it.
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            self._tasks.discard(sender)

    async def _send(
        self, link: _Link, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: str
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = await queue.get()
                early_s = due_s - self._loop.time()
                if early_s > 0:
                    self.spoiled += 1
                    await asyncio.sleep(early_s)
                while way in (rule := self._rule(link.source, link.target)).drop:
                    self.spoiled += 1
                    await self._changed.wait()
                if link.half_open:
                    continue
                if rule.corrupt and self._rng.random() < rule.corrupt:
                    self.spoiled += 1
                    data = flipped(data, self._rng)
                if rule.bytes_per_s:
                    self.spoiled += 1
                    await self._trickle(writer, data, rule.bytes_per_s)
                else:
                    writer.write(data)
                    await writer.drain()

    async def _trickle(self, writer: asyncio.StreamWriter, data: bytes, bytes_per_s: int) -> None:
        step = max(1, bytes_per_s // 50)
        changed = self._changed
        for begin in range(0, len(data), step):
            writer.write(data[begin : begin + step])
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), step / bytes_per_s)
                writer.write(data[begin + step :])  # healed meanwhile
                await writer.drain()
                return

    def _who(self, port: int, to_port: int) -> str:
        """The member whose process has the connection from ``port``; ``?`` if none of those known has it."""
        inode = self._diag.inode(port, to_port)
        if inode:
            for fresh in (False, True):
                for name, pids in self._known(fresh).items():
                    if any(_has(pid, inode) for pid in pids):
                        return name
                if _has(os.getpid(), inode):
                    return CLIENT
        return UNKNOWN

    def _known(self, fresh: bool) -> dict[str, list[int]]:
        """The members' processes, looked up again after a while or where the last look did not help."""
        now = self._loop.time()
        if fresh or now - self._families[0] > FAMILIES_S:
            self._families = now, {name: list(pids) for name, pids in self.processes().items()}
        return self._families[1]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The data with one bit flipped."""
    changed = bytearray(data)
    place = rng.randrange(len(changed))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
    except OSError:
        made.close()
        raise
    return made


async def _listens(port: int) -> bool:
    with socket.socket() as asking:
        asking.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(asking, ("127.0.0.1", port))
        except OSError:
            return False
        return True


def _close(near: socket.socket, _: object) -> None:
    near.close()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close at once, by a reset."""
    made = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class _Diag:
    """Asks the kernel for one connection's inode (sock_diag(7)): /proc/net/tcp takes longer the more there are."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def inode(self, port: int, to_port: int) -> int:
        """The inode of the loopback connection between two ports, seen from the first one; 0 if it is gone."""
        if self._socket is None:
            # Made in the thread that asks: it belongs to that thread's network.
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
            self._socket.settimeout(1.0)
        loopback = socket.inet_aton("127.0.0.1") + bytes(12)
        wanted = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 2**32 - 1)
        wanted += struct.pack("!HH", port, to_port) + loopback + loopback + struct.pack("=III", 0, 2**32 - 1, 2**32 - 1)
        self._socket.send(struct.pack("=IHHII", 16 + len(wanted), SOCK_DIAG_BY_FAMILY, 1, 1, 0) + wanted)
        reply = self._socket.recv(4096)
        (kind,) = struct.unpack_from("=H", reply, 4)
        found: int = struct.unpack_from("=I", reply, INODE_AT)[0] if kind == SOCK_DIAG_BY_FAMILY else 0
        return found

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _has(pid: int, inode: int) -> bool:
    """Whether a process has the socket among its descriptors."""
    wanted = f"socket:[{inode}]"
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == wanted:
                    return True
    return False
