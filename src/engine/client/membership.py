"""The cluster manifest that a process goes by: a newer one is taken while it runs. It opens a file, never a socket.

A manifest proves itself, so it does not matter who brought it: the operator by the file, or any other member. It is
taken only if it follows the one in force, and it is durable before it is in force.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import zmq.utils.z85

from engine.client.config import CurveIdentity, Identity, load_identity, write_private
from engine.errors import ConfigError, EngineError, ManifestError, ProtocolError
from engine.protocol.manifest import (
    Cluster,
    ClusterSource,
    Member,
    chain_after,
    chain_serial,
    follow_chain,
    join_chains,
    open_chain,
    split_chain,
)

__all__ = ["Membership", "OwnCurve", "Served", "Servers", "open_membership"]

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
        """Have ``taken`` called for each manifest that is put in force, in their order, by the thread that brought it.

        No other is taken until it returns, so it must be quick and must not offer one itself.
        """
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
            if not taken and chain_serial(chain) < self._cluster.serial:
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
            if structlog.is_configured():
                log.debug("cluster manifest kept in memory", file=str(file), reason=os.strerror(error.errno or 0))

    def _tell(self, before: Cluster, now: Cluster) -> None:
        if self._durable:  # a server; a client's program may not expect lines of ours
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


class OwnCurve:
    """This member's CURVE pair as the newest manifest knows it; it changes while the process runs.

    While both are known everybody takes the one of before, which those that are behind know too. The identity is read
    again from its file where the manifest has a key that was not in it at the start.
    """

    def __init__(self, identity: Identity, source: ClusterSource, file: Path | None = None) -> None:
        self._source = source
        self._file = file
        self._lock = threading.Lock()
        self._identity = identity
        self._seen: Cluster | None = None
        self._current = identity.transport

    @property
    def identity(self) -> Identity:
        """The identity with the pairs that the newest manifest speaks of, as far as they are here."""
        self._look()
        return self._identity

    @property
    def current(self) -> CurveIdentity:
        """The pair for connections that are opened now."""
        if self._seen is not self._source.cluster:
            self._look()
        return self._current

    def instead(self, pair: CurveIdentity) -> CurveIdentity | None:
        """The pair to try where this one is refused: the other side's manifest may be older or newer than this one."""
        return next((each for each in self.identity.pairs if each.public != pair.public), None)

    def secrets(self) -> tuple[bytes, ...]:
        """The secret keys, 32 bytes each, of all pairs."""
        return tuple(zmq.utils.z85.decode(pair.secret) for pair in self.identity.pairs)

    def served(self, bind: str = "", publish_bind: str = "") -> tuple[Served, ...]:
        """Where to listen, and with which pair: the newest endpoint, and the retiring one if it is another.

        ``bind`` and ``publish_bind`` take the place of the newest endpoint's addresses.
        """
        identity, cluster = self.identity, self._source.cluster
        member, retiring = cluster.members.get(identity.name), cluster.retiring.get(identity.name)
        if member is None:
            return ()
        places = [(member.curve_public, bind or member.endpoint, publish_bind or member.publish_endpoint)]
        if retiring is not None and retiring.endpoint != member.endpoint:
            places.append((retiring.curve_public, retiring.endpoint, retiring.publish_endpoint))
        found = ((identity.pair_of(public), endpoint, publish) for public, endpoint, publish in places)
        return tuple(Served(pair, endpoint, publish) for pair, endpoint, publish in found if pair is not None)

    def published(self, publish_bind: str = "") -> dict[str, CurveIdentity]:
        """Where to publish, and with which pair; the newest one's where two have one endpoint."""
        found: dict[str, CurveIdentity] = {}
        for each in self.served(publish_bind=publish_bind):
            if each.publish:
                found.setdefault(each.publish, each.pair)
        return found

    def _look(self) -> None:
        with self._lock:
            cluster = self._source.cluster
            if self._seen is cluster:
                return
            member, retiring = cluster.members.get(self._identity.name), cluster.retiring.get(self._identity.name)
            if member is not None and self._identity.pair_of(member.curve_public) is None and self._file is not None:
                self._identity = self._read_again(self._identity, member.curve_public)
            told = [each.curve_public for each in (retiring, member) if each is not None]
            chosen = next((pair for public in told if (pair := self._identity.pair_of(public)) is not None), None)
            self._current = chosen or self._current
            self._seen = cluster

    def _read_again(self, before: Identity, wanted: bytes) -> Identity:
        try:
            now = load_identity(self._file or "")
        except ConfigError as error:
            log.error("identity not read again", reason=str(error))
            return before
        if now.signing.public != before.signing.public or now.pair_of(wanted) is None:
            log.error("the manifest has a CURVE key for this member that its identity file has not", name=before.name)
            return before
        return now


@dataclass(frozen=True, slots=True)
class Served:
    """Where a member listens, and with which CURVE pair; ``publish`` is empty where nothing is published."""

    pair: CurveIdentity
    endpoint: str
    publish: str
