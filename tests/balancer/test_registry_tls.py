"""How a balancer's connection to its database is configured, and that one over TCP is by TLS, to the right server."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from certificates import Authority
from ports import free_port
from postgres_server import CARD_USER, PostgresServer, postgres_server
from registry_places import leading
from steering import until

import engine
from balancer.postgres import PostgresRegistry, check_connection_string
from engine import LocalCluster
from engine.errors import ConfigError, RegistryUnavailable

PASSWORD = "a-password-of-the-database"
NAME = "db.example.org"
"""Whose certificate the server has; its address is another matter."""


# --- the connection string ---


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ("host=db password=x sslmode=verify-full", "a password in it"),
        ("host=db sslpassword=x sslmode=verify-full", "a password in it"),
        ("host=db.example.org dbname=k", "another machine, which needs sslmode=verify-full"),
        ("host=/run/postgresql,db.example.org sslmode=require", "db.example.org is another machine"),
        ("host=localhost hostaddr=10.0.0.5", "10.0.0.5 is another machine"),
        ("host=127.0.0.1,10.0.0.5 sslmode=prefer", "10.0.0.5 is another machine"),
        ("service=elsewhere", "`service`"),
        ("nonsense", "missing"),
        ("hots=x", "hots"),
    ],
)
def test_connection_strings_that_are_refused(told: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_connection_string(told, "balancer.toml: [registry] postgresql")


@pytest.mark.parametrize(
    "told",
    [
        "host=/run/postgresql dbname=keyquorum",
        "host=127.0.0.1 dbname=keyquorum",
        "host=127.0.0.2,localhost,::1 dbname=keyquorum",
        "postgresql://keyquorum@db1,db2/keyquorum?sslmode=verify-full",
        "host=db1 sslmode=verify-full sslrootcert=system",
    ],
)
def test_connection_strings_that_are_taken(told: str) -> None:
    assert check_connection_string(told, "x") == told


def test_a_server_that_the_environment_names_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq goes to it where the string names none."""
    monkeypatch.setenv("PGHOST", "db.example.org")
    with pytest.raises(ConfigError, match=r"db\.example\.org is another machine"):
        check_connection_string("dbname=k", "x")
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    assert check_connection_string("dbname=k", "x")
    assert check_connection_string("dbname=k host=/run/postgresql sslmode=disable", "x")


@pytest.mark.parametrize("told", ["host=db password=hidden words", "postgresql://k:hidden%zz@db/k"])
def test_what_is_no_connection_string_is_not_quoted_where_a_password_may_be_in_it(told: str) -> None:
    with pytest.raises(ConfigError, match="no connection string") as caught:
        check_connection_string(told, "x")
    assert not any(part in str(caught.value) for part in ("hidden", "words", "zz"))


def test_files_that_are_named_are_looked_at(tmp_path: Path) -> None:
    """A password file that others may read is refused: libpq would go without it, and say nothing of it."""
    for key in ("sslrootcert", "sslcert", "sslkey", "passfile"):
        with pytest.raises(ConfigError, match=f"{key}: /nowhere/it: No such file"):
            check_connection_string(f"host=db sslmode=verify-full {key}=/nowhere/it", "x")
    passfile = tmp_path / "pgpass"
    passfile.touch(mode=0o644)
    with pytest.raises(ConfigError, match=r"passfile: .*: mode 0644 lets others at it; it must be 0600"):
        check_connection_string(f"host=127.0.0.1 passfile={passfile}", "x")
    passfile.chmod(0o600)
    assert check_connection_string(f"host=127.0.0.1 passfile={passfile}", "x")


# --- TLS to a real server ---


@dataclass(frozen=True, slots=True)
class Tls:
    """A server with a certificate, and what a client has: the right authority and a wrong one, a password, a card."""

    server: PostgresServer
    port: int
    authority: Path
    stranger: Path
    passfile: Path
    card: tuple[Path, Path]

    def conninfo(self, **changes: object) -> str:
        """A connection string over TCP, as a balancer on another machine has one."""
        told = {
            "host": NAME, "hostaddr": "127.0.0.1", "port": self.port, "dbname": "postgres", "user": "keyquorum",
            "sslmode": "verify-full", "sslrootcert": self.authority, "passfile": self.passfile,
        } | changes  # fmt: skip
        return " ".join(f"{key}={value}" for key, value in told.items() if value is not None)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(folder / "ours", "authority"), Authority(folder / "theirs", "stranger")
    port = free_port()
    passfile = folder / "pgpass"
    passfile.touch(mode=0o600)
    passfile.write_text(f"*:*:*:keyquorum:{PASSWORD}\n")
    with postgres_server() as server:
        server.execute(f"ALTER USER keyquorum PASSWORD '{PASSWORD}'")
        server.execute(f"CREATE USER {CARD_USER} SUPERUSER")
        server.stop()
        server.listen(port, *ours.issue("server", [NAME]), ours.file)
        server.start()
        yield Tls(server, port, ours.file, theirs.file, passfile, ours.issue(CARD_USER))


@contextlib.contextmanager
def opened(world: Any, conninfo: str) -> Iterator[PostgresRegistry]:
    told = check_connection_string(conninfo, "x")
    registry = PostgresRegistry(told, world.cluster, world.keys["balancer"], lambda: world.now_ms)
    registry.start()
    try:
        yield registry
    finally:
        registry.close()


def problem_of(world: Any, conninfo: str) -> str:
    """Why a registry can't lead."""
    with opened(world, conninfo) as registry:
        until(lambda: bool(registry.problem), "it says why it does not lead")
        assert not registry.term
        return registry.problem


def connections(server: PostgresServer) -> list[tuple[bool, str, str]]:
    """Whether each of the registries' connections is encrypted, by which version, and whose card it has."""
    return server.execute(
        "SELECT ssl, coalesce(version, ''), coalesce(client_dn, '') FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
        "WHERE application_name = 'keyquorum'"
    )


def test_a_registry_over_tls(world: Any, tls: Tls) -> None:
    """All of its connections are encrypted: the one that looks after the lease, and those that read and write."""
    with opened(world, tls.conninfo()) as registry:
        world.commit(leading(registry), world.order("k"))
        found = connections(tls.server)
        assert len(found) >= 2
        assert {encrypted for encrypted, _, _ in found} == {True}
        assert {version for _, version, _ in found} <= {"TLSv1.2", "TLSv1.3"}


def test_a_registry_by_a_client_certificate(world: Any, tls: Tls) -> None:
    """In the place of a password; without it nobody is let in under that name."""
    certificate, key = tls.card
    card = {"user": CARD_USER, "passfile": None}
    with opened(world, tls.conninfo(**card, sslcert=certificate, sslkey=key)) as registry:
        assert leading(registry).count() >= 0
        assert {subject for _, _, subject in connections(tls.server)} == {f"/CN={CARD_USER}"}
    assert "valid client certificate" in problem_of(world, tls.conninfo(**card, sslcert=None, sslkey=None))


def test_a_server_of_another_authority_or_name_is_refused(world: Any, tls: Tls) -> None:
    wrong = problem_of(world, tls.conninfo(sslrootcert=tls.stranger))
    assert wrong.startswith("the database can't be reached: ")
    assert "certificate verify failed" in wrong
    named = problem_of(world, tls.conninfo(host="127.0.0.1", hostaddr=None))
    assert f'server certificate for "{NAME}"' in named
    assert 'does not match host name "127.0.0.1"' in named
    assert not connections(tls.server)


def test_a_server_without_tls_is_refused(world: Any) -> None:
    """Though it would take the password in the clear, as it does from one that asks for no more."""
    port = free_port()
    with postgres_server() as server:
        server.execute(f"ALTER USER keyquorum PASSWORD '{PASSWORD}'")
        server.stop()
        server.listen(port)
        server.start()
        plain = f"hostaddr=127.0.0.1 port={port} dbname=postgres user=keyquorum"
        psycopg.connect(f"{plain} password={PASSWORD}").close()
        told = problem_of(world, f"{plain} host={NAME} sslmode=verify-full sslrootcert=system")
        assert "server does not support SSL, but SSL was required" in told


def test_no_password_is_in_the_command_lines_and_logs_of_a_cluster(tls: Tls, tmp_path: Path) -> None:
    """Of a real one whose balancer keeps its registry there; nor where the database refuses the password."""
    tls.server.execute("CREATE DATABASE own")
    registry = {"registry": {"postgresql": tls.conninfo(dbname="own")}, "tick_ms": 200}
    with LocalCluster(nodes=2, threshold=2, shares=2, path=tmp_path / "kq", balancer=registry) as local:
        with engine.connect(local.client_config) as kq:
            until(lambda: _made(kq), "a key is made once the balancer leads")
        assert all(encrypted for encrypted, _, _ in connections(tls.server))
        balancer = local.running()["balancer"]
        command = Path(f"/proc/{balancer}/cmdline").read_bytes()
        tls.server.execute("ALTER USER keyquorum PASSWORD 'another-one'")
        try:
            tls.server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keyquorum'"
            )
            log = local.log_file("balancer")
            until(lambda: "password authentication failed" in log.read_text(), "it says that it is not let in")
        finally:
            tls.server.execute(f"ALTER USER keyquorum PASSWORD '{PASSWORD}'")
        told = command + b"".join(each.read_bytes() for each in local.path.rglob("*.log"))
    assert b"balancer.toml" in command
    assert PASSWORD.encode() not in told


def _made(kq: engine.Engine) -> bool:
    try:
        kq.create_key("k", "aes-256-gcm", threshold=2, shares=2, timeout=30)
    except RegistryUnavailable:
        return False
    return True


# --- the server of these tests ---

_HOLD = """
import sys, time
from postgres_server import postgres_server
with postgres_server() as server:
    print(server.process.pid, server.folder, flush=True)
    time.sleep(600)
"""


def test_the_server_ends_with_whoever_started_it() -> None:
    """Also one that is killed, and so ends nothing by itself."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    holder = subprocess.Popen([sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    try:
        pid, folder = holder.stdout.readline().split()
        assert "postgres" in Path(f"/proc/{pid}/cmdline").read_text()
    finally:
        holder.kill()
        holder.communicate()
    until(lambda: not _runs(int(pid)), "the server has ended")
    shutil.rmtree(folder)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
