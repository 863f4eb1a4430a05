"""The registry in PostgreSQL, which several balancers share: one leads, by a lease on the server's time.

A row in the table ``lease`` names the leader, its fencing epoch, and until when. The leader prolongs it; once it is
over, another balancer takes it, under the next fencing epoch. Each transaction that writes looks first whether its
fencing epoch is still the one in that row, and holds the row as it is until it has ended: so what a leader that was cut
off, or stopped for a while, still wanted to write is refused, whatever it takes itself for. The server ends the
transaction of one that is silent in the middle of it.
"""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg import pq, waiting
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool, PoolTimeout

from balancer.database import Rows
from balancer.mark import Mark
from balancer.registry import SqlRegistry
from engine.errors import ConfigError, EngineError, RegistryUnavailable
from engine.protocol.manifest import ClusterSource
from engine.protocol.signed import SigningKey

__all__ = ["PostgresDatabase", "PostgresRegistry", "check_connection_string"]

LEASE_S = 2.0
"""So long a balancer leads after the server's last word to it."""
RENEW_S = 0.5
LOOK_S = 0.25
"""So often the leader prolongs its lease, and the others look after it; a notice of the server's comes sooner."""
SHY_S = 5.0
"""A balancer that could not begin to lead leaves it to others for so long."""
PATIENCE_S = 3.0
"""A server that does not answer for so long is given up, and what was asked of it with it."""
CONNECT_S = 1.0
"""How long a request waits for a connection."""
SILENT_MS = 1_000
"""The server ends a transaction whose balancer says nothing for so long."""
LOCK = 0x4B51_7265_6769
"""The advisory lock of the transactions that write: "KQregi"."""
OLDEST = 150_000
CHANNEL = "keyquorum_registry"
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
"""What of a connection string names a file."""
DEFAULTS = {
    "application_name": "keyquorum",
    "connect_timeout": "2",
    "target_session_attrs": "read-write",
    "tcp_user_timeout": "3000",
    "keepalives_idle": "5",
    "keepalives_interval": "1",
    "keepalives_count": "3",
}
"""What a connection string need not say."""

_BASE = (
    """CREATE TABLE IF NOT EXISTS lease (epoch BIGINT PRIMARY KEY, holder TEXT NOT NULL, boot BYTEA NOT NULL,
       until TIMESTAMPTZ NOT NULL, one BOOLEAN NOT NULL DEFAULT TRUE UNIQUE CHECK (one))""",
    "INSERT INTO lease VALUES (0, '', '', '-infinity') ON CONFLICT DO NOTHING",
    """CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL,
       one BOOLEAN NOT NULL DEFAULT TRUE UNIQUE CHECK (one))""",
    "INSERT INTO schema_version VALUES (0) ON CONFLICT DO NOTHING",
)

T = TypeVar("T")

logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # the registry tells what failed, once

log = structlog.get_logger()


def check_connection_string(told: str, what: str) -> str:
    """The same; ``ConfigError`` if it is none, holds a password, lets a server be anybody, or names a file in vain.

    What it does not say counts as libpq takes it, from the environment.
    """
    try:
        said = conninfo_to_dict(told)
    except psycopg.Error as error:
        # libpq's own words quote what it stumbled over.
        secret = "password" in told or "@" in told
        raise ConfigError(f"{what}: {'no connection string' if secret else str(error).strip()}") from None
    if said.get("password") or said.get("sslpassword"):
        raise ConfigError(f"{what}: a password in it; name a `passfile` (mode 0600) or a `sslkey`")
    if said.get("service"):
        raise ConfigError(f"{what}: a `service`, whose file may name any server; say `host` and the rest here")
    parts = {each.keyword.decode(): each.val.decode() for each in pq.Conninfo.get_defaults() if each.val} | said
    named = [each for key in ("host", "hostaddr") for each in str(parts.get(key) or "").split(",")]
    away = [each for each in named if each and not _is_here(each)]
    if away and parts.get("sslmode") not in ("verify-full", "verify-ca"):
        raise ConfigError(f"{what}: {away[0]} is another machine, which needs sslmode=verify-full")
    for key in FILES:
        if (file := str(said.get(key) or "")) and (key, file) != ("sslrootcert", "system"):
            _check_file(Path(file), f"{what}: {key}", key == "passfile")
    return told


def _is_here(host: str) -> bool:
    """Whether a server of that name is on this machine: a socket's folder, or a loopback address."""
    try:
        return host.startswith(("/", "@")) or host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_file(path: Path, what: str, own: bool) -> None:
    # libpq takes no notice of a password file that is missing or open to others, and then has no password.
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{what}: {path}: {error.strerror}") from None
    if own and mode & 0o077:
        raise ConfigError(f"{what}: {path}: mode {mode:04o} lets others at it; it must be 0600")


class _Connection(psycopg.Connection[Any]):
    """One that gives up a server that does not answer; it is closed then."""

    warned = ""
    """The last warning of the server's, if there was one since this was emptied."""

    def wait(self, gen: Any, interval: float = 0.0, timeout: float | None = None) -> Any:
        until_s = time.monotonic() + (PATIENCE_S if timeout is None else timeout)
        poll = select.poll()
        try:
            state = next(gen)
            while True:
                poll.register(self.fileno(), _EVENTS[state])
                found = poll.poll(max(0.0, until_s - time.monotonic()) * 1000)
                if not found:
                    self.close()
                    raise psycopg.OperationalError(f"the database did not answer within {PATIENCE_S:g} s")
                events = found[0][1]
                if events & select.POLLNVAL:
                    raise psycopg.OperationalError("the connection to the database is closed")
                failed = events & (select.POLLERR | select.POLLHUP)
                ready = (waiting.Ready.R if failed or events & select.POLLIN else 0) | (
                    waiting.Ready.W if events & select.POLLOUT else 0
                )
                state = gen.send(ready)
        except StopIteration as end:
            return end.value

    def prepare(self) -> None:
        """Have it be one for the registry."""
        self.add_notice_handler(self._take_notice)
        self.execute(f"SET idle_in_transaction_session_timeout = {SILENT_MS}")

    def _take_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self.warned = notice.message_primary or "a warning"


_EVENTS = {
    waiting.Wait.R: select.POLLIN,
    waiting.Wait.W: select.POLLOUT,
    waiting.Wait.RW: select.POLLIN | select.POLLOUT,
}


def _connect(conninfo: str) -> _Connection:
    connection = _Connection.connect(conninfo, autocommit=True)
    connection.prepare()
    return connection


@lru_cache(maxsize=256)
def _in_postgres(statement: str) -> str:
    """A statement of the registry's as PostgreSQL takes it."""
    if statement.startswith("CREATE TABLE"):
        statement = re.sub(r"\) STRICT(, WITHOUT ROWID)?$", ")", statement)
    if statement.startswith(("CREATE TABLE", "ALTER TABLE")):
        statement = re.sub(r"\bBLOB\b", "BYTEA", re.sub(r"\bINTEGER\b", "BIGINT", statement))
    return statement.replace("x''", "''::bytea").replace("?", "%s")


class PostgresDatabase:
    """The registry's tables, through connections that are made anew where one breaks."""

    failures: tuple[type[Exception], ...] = (psycopg.Error,)
    shared = True

    def __init__(self, conninfo: str) -> None:
        told = conninfo_to_dict(conninfo)
        self.conninfo = make_conninfo("", **{**DEFAULTS, **{key: str(each) for key, each in told.items()}})
        self.where = f"PostgreSQL {told.get('host', 'localhost')}/{told.get('dbname', '')}"
        self._transaction: _Connection | None = None
        self._pool: ConnectionPool[_Connection] = ConnectionPool(
            self.conninfo,
            connection_class=_Connection,
            kwargs={"autocommit": True},
            configure=_Connection.prepare,
            min_size=1,
            max_size=2,
            timeout=CONNECT_S,
            reconnect_timeout=CONNECT_S,  # who asks next has it tried anew: at once where the server is back
            open=True,
        )

    def version(self) -> int:
        """Of its schema; 0 where there is none."""
        return int(self.execute("SELECT version FROM schema_version").fetchone()[0])

    def set_version(self, version: int) -> None:
        """Note the version, in a transaction."""
        self.execute("UPDATE schema_version SET version = ?", (version,))

    def begin(self, term: int) -> None:
        """Begin a transaction that writes, if this fencing epoch is the lease's; it stays so until the end."""
        if not term or not self._retried(lambda: self._begin(term)):
            raise RegistryUnavailable(f"the fencing epoch {term} is over: another balancer leads")

    def _begin(self, term: int) -> bool:
        self.rollback()
        # No pipeline: after one the server does not end a transaction whose client falls silent.
        self._transaction = connection = self._pool.getconn()
        connection.execute("BEGIN")
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        # The epoch is the row's key: this lets the lease be prolonged, and not be taken.
        found = connection.execute("SELECT 1 FROM lease WHERE epoch = %s FOR KEY SHARE", (term,))
        return found.fetchone() is not None

    def _retried(self, ask: Callable[[], T]) -> T:
        """What has changed nothing yet is asked once more if its connection turns out to be broken."""
        try:
            return ask()
        except PoolTimeout:
            raise
        except psycopg.OperationalError:
            return ask()

    def commit(self) -> None:
        """Make the transaction durable: at a synchronous standby too, where the server has one."""
        connection = self._transaction
        if connection is None:
            raise psycopg.OperationalError("no transaction")
        connection.warned = ""
        told = connection.execute("COMMIT").statusmessage
        if told != "COMMIT":
            raise psycopg.OperationalError(f"the database answered {told} to COMMIT")
        if connection.warned:  # such as that nobody waits for the standby any more
            raise psycopg.OperationalError(f"whether the change is durable is not known: {connection.warned}")
        self._transaction = None
        self._pool.putconn(connection)

    def rollback(self) -> None:
        """Undo it, and let go of a connection that is not fit for more."""
        connection, self._transaction = self._transaction, None
        if connection is None:
            return
        try:
            if connection.info.transaction_status != pq.TransactionStatus.IDLE:
                connection.execute("ROLLBACK")
        except self.failures:
            connection.close()
        finally:
            self._pool.putconn(connection)

    @property
    def in_transaction(self) -> bool:
        """Whether there is one, failed or not."""
        connection = self._transaction
        return connection is not None and connection.info.transaction_status in (
            pq.TransactionStatus.INTRANS,
            pq.TransactionStatus.INERROR,
        )

    def execute(self, statement: str, values: Sequence[object] = ()) -> Rows:
        """Carry out a statement."""
        text: Any = _in_postgres(statement)
        if self._transaction is not None:
            return self._transaction.execute(text, values or None, binary=True)
        return self._retried(lambda: self._execute_alone(text, values))

    def _execute_alone(self, text: Any, values: Sequence[object]) -> Rows:
        with self._pool.connection() as connection:
            return connection.execute(text, values or None, binary=True)

    def executemany(self, statement: str, values: Sequence[Sequence[object]]) -> None:
        """The same statement for several rows, in a transaction."""
        for each in values:
            self.execute(statement, each)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class PostgresRegistry(SqlRegistry):
    """The registry of a balancer that leads, or stands by.

    ``start`` has it look after the lease, by a thread of its own. ``problem`` tells why it can't lead, such as that the
    database is another cluster's.
    """

    _store: PostgresDatabase

    def __init__(
        self,
        conninfo: str,
        cluster: ClusterSource,
        signing: SigningKey,
        now_ms: Callable[[], int],
        mark: Mark | None = None,
    ) -> None:
        super().__init__(PostgresDatabase(conninfo), cluster, signing, mark)
        self._now_ms = now_ms
        self._boot = os.urandom(16)
        self._held = 0
        """The fencing epoch of the own lease, or 0."""
        self._opened = 0
        """The one that it leads under, or led."""
        self._until_s = 0.0
        self._shy_until_s = 0.0
        self._told_leader = ""
        self._seen_revision = -1
        self.problem = ""
        """Why it can't lead, or hear of the leader."""
        self._stop = threading.Event()
        self._stopper, self._stopped = socket.socketpair()
        self._opener: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        """Begin to look after the lease."""
        self._thread.start()

    @property
    def term(self) -> int:
        """The fencing epoch while the lease is this balancer's for sure, by the own monotonic clock."""
        held = self._held
        return held if held and held == self._opened and time.monotonic() < self._until_s else 0

    @property
    def leader(self) -> str:
        """Who has the lease, as last heard."""
        return self._signing.name if self.term else self._told_leader

    def close(self) -> None:
        """Give the lease back, and close the connections."""
        if not self._stop.is_set():
            self._stop.set()
            self._stopped.send(b"x")
            if self._thread.is_alive():
                self._thread.join()
            if self._opener is not None:
                self._opener.join()
            super().close()
            self._stopper.close()
            self._stopped.close()

    # --- the lease, by its thread ---

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with _connect(self._store.conninfo) as connection:
                    self._prepare_base(connection)
                    connection.execute(f"LISTEN {CHANNEL}")
                    # Who leads must be durable, how long need not: an older time is over sooner.
                    connection.execute("SET synchronous_commit = off")
                    while not self._stop.is_set():
                        self._round(connection)
                        self._pause(connection)
                    if self._held:
                        self._release(connection)
            except self._store.failures as error:
                self._complain(f"the database can't be reached: {str(error).strip()}")
                self._stop.wait(LOOK_S)
            except Exception as error:  # the next round may do better, and without one nobody leads
                log.error("the lease is not looked after", reason=str(error), exc_info=True)
                self._stop.wait(LOOK_S)

    @staticmethod
    def _prepare_base(connection: _Connection) -> None:
        if connection.info.server_version < OLDEST:
            raise psycopg.NotSupportedError(f"PostgreSQL {connection.info.server_version // 10000}; 15 is the oldest")
        if connection.execute("SELECT to_regclass('schema_version')").fetchall() != [(None,)]:
            return  # without a wait for a transaction that is under way
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            for statement in _BASE:
                connection.execute(statement)

    def _pause(self, connection: _Connection) -> None:
        """Until the next round is due, or the server has news."""
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        poll.register(self._stopper.fileno(), select.POLLIN)
        poll.poll((RENEW_S if self._held else LOOK_S) * 1000)

    def _round(self, connection: _Connection) -> None:
        if self._held:
            self._renew(connection)
        if not self._held:
            self._look(connection)

    def _renew(self, connection: _Connection) -> None:
        asked_s = time.monotonic()
        told = connection.execute(
            "UPDATE lease SET until = clock_timestamp() + make_interval(secs => %s) "
            "WHERE epoch = %s AND holder = %s AND boot = %s",
            (LEASE_S, self._held, self._signing.name, self._boot),
        )
        if told.rowcount == 1:
            self._until_s = asked_s + LEASE_S
            return
        log.warning("the lease was taken", fencing_epoch=self._held)
        self._held = 0

    def _look(self, connection: _Connection) -> None:
        ((holder, epoch, holds),) = connection.execute(
            "SELECT holder, epoch, until >= clock_timestamp() FROM lease"
        ).fetchall()
        leader = holder if holds and holder != self._signing.name else ""
        if leader != self._told_leader:
            log.info("another balancer leads" if leader else "nobody leads", leader=leader, fencing_epoch=epoch)
            self._told_leader = leader
        if not self._sound(connection):
            return
        if self.problem.startswith("the database"):
            self.problem = ""
        if not holds and time.monotonic() >= self._shy_until_s:
            self._take(connection)

    def _sound(self, connection: _Connection) -> bool:
        """Whether the registry is no older than it was; what it is at now is noted."""
        told = self._counters(connection)
        revision, fencing_epoch = told.get(4, 0), told.get(1, 0)
        if self._mark is None or revision == self._seen_revision:
            return True
        try:
            self._mark.check(self._store.where, fencing_epoch, revision)
        except ConfigError as error:
            self._complain(str(error))
            return False
        self._mark.note(fencing_epoch, revision)
        self._seen_revision = revision
        return True

    def _counters(self, connection: _Connection) -> dict[int, int]:
        if connection.execute("SELECT to_regclass('counters')").fetchall() == [(None,)]:
            return {}
        found = connection.execute("SELECT id, value, hash FROM counters").fetchall()
        return {number: value for number, value, seal in found if self._is_sealed("counters", (number, value), seal)}

    def _take(self, connection: _Connection) -> None:
        asked_s = time.monotonic()
        with connection.transaction():
            connection.execute("SET LOCAL synchronous_commit TO DEFAULT")
            found = connection.execute("SELECT epoch FROM lease WHERE until < clock_timestamp() FOR UPDATE").fetchone()
            if found is None:
                return
            epoch = 1 + max(found[0], self._counters(connection).get(1, 0))
            connection.execute(
                "UPDATE lease SET epoch = %s, holder = %s, boot = %s, "
                "until = clock_timestamp() + make_interval(secs => %s)",
                (epoch, self._signing.name, self._boot, LEASE_S),
            )
            connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, str(epoch)))
        self._held, self._until_s, self._told_leader = epoch, asked_s + LEASE_S, ""
        # Beside: it may take longer than the lease lasts, which is prolonged meanwhile.
        self._opener = threading.Thread(target=self._begin_to_lead, args=(epoch,), name="lead", daemon=True)
        self._opener.start()

    def _begin_to_lead(self, epoch: int) -> None:
        try:
            self.lead(self._now_ms(), epoch)
        except Exception as error:  # whatever it is, another may do better
            self._complain(str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}")
            self._shy_until_s = time.monotonic() + SHY_S
            self._held = 0  # and is not prolonged
            return
        self._opened = epoch
        self.problem = ""
        log.info("leads", balancer=self._signing.name, fencing_epoch=epoch)

    def _release(self, connection: _Connection) -> None:
        held, self._held = self._held, 0
        connection.execute("UPDATE lease SET until = '-infinity' WHERE epoch = %s AND boot = %s", (held, self._boot))
        connection.execute("SELECT pg_notify(%s, '')", (CHANNEL,))

    def _complain(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            log.error("the registry can't be led here", reason=problem)
