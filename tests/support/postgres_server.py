"""A real PostgreSQL server of a test's own, from Debian's package: its own folder and socket, on loopback alone.

It ends with the thread that started it, whatever that dies of.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

__all__ = ["CARD_USER", "PostgresServer", "postgres_server"]

USER = "keyquorum"
START_S = 30.0
CARD_USER = "card"
"""Who is let in over TLS by a client's certificate of that name, and by no password."""


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name))
    if not found:
        raise FileNotFoundError("no PostgreSQL server; `.ci/setup test` installs Debian's")
    return found[-1]


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: then its processes are another user's."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise LookupError("no user to run PostgreSQL as")


class PostgresServer:
    """The server; ``start`` and ``stop`` as often as a test likes. fsync is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._owner = _unprivileged()
        self._further: list[str] = []
        self._port = 5432
        self.process: subprocess.Popen[bytes] | None = None
        self._own(folder)

    def _own(self, path: Path) -> None:
        if self._owner:
            os.chown(path, self._owner["user"], self._owner["group"])

    def make(self) -> None:
        """Make its cluster of databases."""
        self.run("initdb", "-D", str(self.data), "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        subprocess.run(
            [str(_programs() / program), *arguments], check=True, capture_output=True, cwd=self.folder, **self._owner
        )

    def listen(
        self, port: int, certificate: Path | None = None, key: Path | None = None, clients: Path | None = None
    ) -> None:
        """From its next start on, serve TCP on 127.0.0.1 too, by password: in the clear, and by TLS with a certificate.

        ``clients`` is the authority whose certificates let ``CARD_USER`` in.
        """
        self._port = port
        self._further = ["listen_addresses=127.0.0.1", f"port={port}"]
        rules = ["local all all trust"]
        if certificate is not None:
            self._further.append("ssl=on")
            for name, source in (("ssl_cert_file", certificate), ("ssl_key_file", key), ("ssl_ca_file", clients)):
                if source is not None:
                    file = self.folder / name
                    file.touch(mode=0o600)
                    file.write_bytes(source.read_bytes())
                    self._own(file)
                    self._further.append(f"{name}={file}")
            rules.append(f"hostssl all {CARD_USER} 127.0.0.1/32 cert")
        rules.append("host all all 127.0.0.1/32 scram-sha-256")
        (self.data / "pg_hba.conf").write_text("\n".join(rules) + "\n")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        told = [
            "listen_addresses=", f"unix_socket_directories={self.folder}", "fsync=on", "shared_buffers=16MB",
            "max_connections=80", "autovacuum=off", "wal_level=replica", *self._further,
        ]  # fmt: skip
        options = [part for each in told for part in ("-c", each)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "QUIT", str(_programs() / "postgres"), "-D", str(self.data), *options],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, **self._owner,
            )  # fmt: skip
        until = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.conninfo).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise AssertionError((self.folder / "log").read_text(errors="replace")[-2000:]) from None
                time.sleep(0.02)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it: fast, or by SIGQUIT as in a crash, from which it recovers by its log."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def follow(self, primary: PostgresServer) -> None:
        """Have it be a standby server of another one, as that is now."""
        self.run("pg_basebackup", "-h", str(primary.folder), "-U", USER, "-D", str(self.data), "-R", "-c", "fast", "-N")

    def promote(self) -> None:
        """Have it be one that is written, and no standby any more."""
        self.run("pg_ctl", "promote", "-D", str(self.data), "-w")

    @property
    def conninfo(self) -> str:
        """How to connect to it."""
        return f"host={self.folder} port={self._port} dbname=postgres user={USER}"

    def execute(self, statement: str, *values: object) -> list[Any]:
        """What the last of some statements gives, by a connection of its own."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)  # type: ignore[call-overload]
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def postgres_server(*, standby_of: PostgresServer | None = None) -> Iterator[PostgresServer]:
    """A server that runs; its folder and processes are gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kq-pg-"))
    server = PostgresServer(folder)
    try:
        if standby_of is None:
            server.make()
        else:
            server.follow(standby_of)
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
