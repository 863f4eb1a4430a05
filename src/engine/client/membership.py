"""The cluster manifest that a process goes by: a newer one is taken while it runs. It opens a file, never a socket.

A manifest proves itself, so it does not matter who brought it: the operator by the file, or any other member. It is
taken only if it follows the one in force, and it is durable before it is in force.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import structlog

from engine.client.config import write_private
from engine.errors import ConfigError, EngineError, ManifestError, ProtocolError
from engine.protocol.manifest import (
    Cluster,
    ClusterSource,
    Member,
    chain_after,
    follow_chain,
    join_chains,
    open_chain,
    split_chain,
)

__all__ = ["Membership", "Servers", "open_membership"]

MAX_CHAIN_BYTES = 64 * 1024 * 1024
MAX_PROBLEM = 500

Taken = Callable[[Cluster, Cluster], None]
"""Called with the manifests of before and of now."""

log = structlog.get_logger()


def read_chain(file: Path) -> bytes:
    """The bytes of a manifest file; ``ConfigError`` if it can't be read."""
    try:
        size = file.stat().st_size
        if size > MAX_CHAIN_BYTES:
            raise ConfigError(f"{file}: {size} bytes, the limit is {MAX_CHAIN_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None


def open_membership(file: Path, pin: str, *, durable: bool = True) -> Membership:
    """The membership by the manifest in a file; ``pin`` is the hex hash of the chain's first one.

    With ``durable`` a newer manifest is written to the file before it is in force; without, it is kept in memory where
    the file can't be written.
    """
    try:
        pinned = bytes.fromhex(pin)
    except ValueError:
        pinned = b""
    if len(pinned) != 32:
        raise ConfigError(f"manifest_pin must be 64 hex digits, it has {len(pin)} characters")
    state = _state_of(file)
    chain = read_chain(file)
    try:
        cluster = open_chain(chain, pinned)
    except (ManifestError, ProtocolError) as error:
        raise ManifestError(f"{file}: {error}") from None
    return Membership(cluster, chain, file, durable=durable, state=state)


def _state_of(file: Path) -> tuple[int, int, int]:
    """What changes whenever the file is replaced or written."""
    told = file.stat() if file.exists() else None
    return (told.st_ino, told.st_mtime_ns, told.st_size) if told else (0, 0, 0)


class Membership:
    """The manifest in force, its chain and its file; safe for several threads.

    The invariant: ``cluster`` is only ever replaced by one whose manifest follows it. ``problem`` says what is wrong
    with a manifest that was offered, where the operators should know: their keys signed two of one serial.
    """

    def __init__(
        self,
        cluster: Cluster,
        chain: bytes,
        file: Path | None = None,
        *,
        durable: bool = True,
        state: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self._cluster = cluster
        self._chain = chain
        self._file = file
        self._durable = durable
        self._state = state
        self._lock = threading.Lock()
        self._subscribers: list[Taken] = []
        self._checks: list[Callable[[Cluster], None]] = []
        self.problem = ""

    @property
    def cluster(self) -> Cluster:
        """The newest manifest that was taken."""
        return self._cluster

    def subscribe(self, taken: Taken) -> None:
        """Have ``taken`` called for each manifest that is put in force, by the thread that brought it."""
        self._subscribers.append(taken)

    def guard(self, check: Callable[[Cluster], None]) -> None:
        """Have ``check`` called before a manifest is put in force; an ``EngineError`` of it keeps it out."""
        self._checks.append(check)

    def after(self, serial: int) -> bytes:
        """The manifests after ``serial`` for a member that is behind; empty if it is not."""
        return chain_after(self._chain, serial) if serial < self._cluster.serial else b""

    def offer_after(self, serial: int, later: bytes) -> bool:
        """As ``offer_chain``, of the manifests after ``serial``, which must not be beyond the one in force."""
        return self.offer_chain(join_chains(self._chain, serial, later))

    def offer_chain(self, chain: bytes) -> bool:
        """Take a whole chain if it is newer; False if it is the one in force or an older part of it.

        ``ManifestError`` if it is no chain of this cluster, or one that parted from the one in force.
        """
        with self._lock:
            before = self._cluster
            common, rest = split_chain(chain, self._chain)
            if common < before.serial:
                if not rest:
                    return False
                other = open_chain(chain, before.pin)
                self.problem = (
                    f"the operators signed two manifests with serial {common + 1}; this process goes by serial "
                    f"{before.serial} with hash {before.digest.hex()} and was given {other.serial} with hash "
                    f"{other.digest.hex()}"
                )[:MAX_PROBLEM]
                log.error("two cluster manifests", reason=self.problem)
                raise ManifestError(f"cluster manifest: {self.problem}")
            if not rest:
                return False
            cluster, whole = follow_chain(before, self._chain, rest)
            self._take(cluster, whole)
        self._tell(before, cluster)
        return True

    def look(self) -> bool:
        """Take what stands in the file, if that has changed; whether a newer manifest was taken.

        A file that holds anything else is left alone and told of in ``problem``.
        """
        if self._file is None:
            return False
        try:
            state = _state_of(self._file)
            if state == self._state:
                return False
            self._state = state
            chain = read_chain(self._file)
            taken = self.offer_chain(chain)
            if not taken and chain != self._chain:
                raise ManifestError(f"it is older than serial {self._cluster.serial}, which is in force")
        except (EngineError, OSError) as error:
            self.problem = f"{self._file}: {error}"[:MAX_PROBLEM]
            log.error("cluster manifest refused", file=str(self._file), reason=str(error))
            return False
        self.problem = ""
        return taken

    def _take(self, cluster: Cluster, chain: bytes) -> None:
        """Under the lock: write it, then put it in force."""
        for check in self._checks:
            check(cluster)
        if self._file is not None:
            self._write(self._file, chain)
        self._chain = chain
        self._cluster = cluster

    def _write(self, file: Path, chain: bytes) -> None:
        try:
            if not file.exists() or file.read_bytes() != chain:
                write_private(file, chain)
            self._state = _state_of(file)
        except OSError as error:
            if self._durable:
                raise ManifestError(f"the new cluster manifest can't be written to {file}: {error.strerror}") from None
            log.info("cluster manifest kept in memory", file=str(file), reason=os.strerror(error.errno or 0))

    def _tell(self, before: Cluster, now: Cluster) -> None:
        log.info("cluster manifest taken", serial=now.serial, hash=now.digest.hex(), before=before.serial)
        for taken in self._subscribers:
            taken(before, now)


class Servers(Mapping[str, Member]):
    """The members that can be connected to, by name, as they stand in the newest manifest at each look."""

    def __init__(self, source: ClusterSource) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Member:
        return self._source.cluster.servers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.cluster.servers)

    def __len__(self) -> int:
        return len(self._source.cluster.servers)
