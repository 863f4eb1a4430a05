"""A registry that several balancers share: one leads, by a lease; who does not lead writes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from postgres_server import PostgresServer, postgres_server
from registry_places import Place, ServerPlace, leading
from steering import until

from balancer.mark import Mark
from balancer.postgres import PostgresRegistry
from engine.errors import ConfigError, RegistryUnavailable
from engine.protocol.manifest import open_certificate, open_key_manifest


@pytest.fixture
def shared(postgres: PostgresServer) -> Iterator[ServerPlace]:
    with contextlib.closing(ServerPlace(postgres)) as made:
        yield made


class Balancers:
    """Balancers of one cluster on one database; ``open`` has another come."""

    def __init__(self, world: Any, place: ServerPlace) -> None:
        self.world, self.place = world, place
        self.opened: list[PostgresRegistry] = []
        self.dead: list[PostgresRegistry] = []

    def open(self, mark: Mark | None = None) -> PostgresRegistry:
        registry = PostgresRegistry(
            self.place.conninfo, self.world.cluster, self.world.keys["balancer"], lambda: self.world.now_ms, mark
        )
        self.opened.append(registry)
        registry.start()
        return registry

    def die(self, registry: PostgresRegistry) -> None:
        """Have it do nothing any more about its lease, and yet believe that it has it."""
        held, registry._held = registry._held, 0  # so that it is not given back
        registry._stop.set()
        registry._stopped.send(b"x")
        registry._thread.join()
        registry._held, registry._until_s = held, time.monotonic() + 3600
        self.dead.append(registry)

    def close(self) -> None:
        for registry in self.dead:
            registry._stop.clear()
        for registry in self.opened:
            registry.close()


@pytest.fixture
def balancers(world: Any, shared: ServerPlace) -> Iterator[Balancers]:
    made = Balancers(world, shared)
    yield made
    made.close()


def test_one_leads_and_the_next_takes_over(world: Any, balancers: Balancers) -> None:
    """At once where the leader says good-bye; the books go on, under the next fencing epoch."""
    first = leading(balancers.open())
    second = balancers.open()
    manifest = world.commit(first, world.order("k"))
    assert second.term == 0
    with pytest.raises(RegistryUnavailable, match="another balancer leads"):
        second.reserve(world.order("other"), "node-0", world.now_ms)
    first.close()
    leading(second)
    assert (first.term, second.fencing_epoch) == (0, 2)
    assert second.commit(manifest, [], world.now_ms)


def test_a_leader_that_is_cut_off_writes_nothing(world: Any, balancers: Balancers) -> None:
    """It believes that it leads; each of its writes is refused, in the transaction itself, and nothing of it stays."""
    stopped = leading(balancers.open())
    pending = world.order("pending")
    reserved = stopped.reserve(pending, "node-0", world.now_ms)
    balancers.die(stopped)
    assert stopped.term == 1
    leader = leading(balancers.open())
    assert leader.fencing_epoch == 2
    manifest = world.manifest(pending, reserved.attempt, reserved.holders)
    for write in (
        lambda: stopped.reserve(world.order("late"), "node-0", world.now_ms),
        lambda: stopped.commit(manifest, world.receipts(manifest), world.now_ms),
        lambda: stopped.set_targets({1: ["node-0"]}),
        lambda: stopped.together().__enter__(),
    ):
        with pytest.raises(RegistryUnavailable, match="the fencing epoch 1 is over"):
            write()
    assert leader.count() == 0
    assert leader.places(lambda places: places.targets()) == {}
    leader.commit(manifest, world.receipts(manifest), world.now_ms)
    world.commit(leader, world.order("late"))
    assert leader.count() == 2


def test_a_leader_that_falls_silent_within_a_transaction_loses_it(world: Any, balancers: Balancers) -> None:
    """The server ends the transaction, so that it keeps nobody from leading; what was in it never was."""
    stopped = leading(balancers.open())
    led = []

    def fall_silent() -> None:
        with stopped.together():
            stopped.reserve(world.order("half"), "node-0", world.now_ms)
            balancers.die(stopped)
            led.append(leading(balancers.open()))

    with pytest.raises(RegistryUnavailable):
        fall_silent()
    (leader,) = led
    assert leader.holdings(world.now_ms) == {}
    world.commit(leader, world.order("half"))


def test_a_connection_that_breaks_within_a_transaction_undoes_it(world: Any, balancers: Balancers) -> None:
    """And the same request again is carried out."""
    registry = leading(balancers.open())
    order = world.order("k")

    def lose_it() -> None:
        with registry.together():
            registry.reserve(order, "node-0", world.now_ms)
            balancers.place.server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            )

    with pytest.raises(RegistryUnavailable):
        lose_it()
    assert registry.holdings(world.now_ms) == {}
    manifest = world.commit(registry, order)
    assert registry.commit(manifest, [], world.now_ms)


def test_a_commit_whose_answer_is_lost_is_made_once(
    world: Any, balancers: Balancers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was made nobody knows; the next request finds out, and the same one again gets what was made."""
    registry = leading(balancers.open())
    order = world.order("k")
    reserved = registry.reserve(order, "node-0", world.now_ms)
    manifest = world.manifest(order, reserved.attempt, reserved.holders)
    store = registry._store
    commit = store.commit

    def lost() -> None:
        connection = store._transaction
        assert connection is not None
        commit()
        connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(store, "commit", lost)
    with pytest.raises(RegistryUnavailable, match="closed the connection"):
        registry.commit(manifest, world.receipts(manifest), world.now_ms)
    monkeypatch.undo()
    with pytest.raises(RegistryUnavailable, match="an earlier change was made after all; please try again"):
        registry.reserve(world.order("other"), "node-0", world.now_ms)
    certificate = registry.commit(manifest, world.receipts(manifest), world.now_ms)
    record = open_key_manifest(manifest, world.cluster)
    assert open_certificate(certificate, record, world.cluster)
    assert (registry.count(), len(registry.sync(reserved.holders[0], 0).entries)) == (1, 1)


def test_writers_at_once_make_one_history(world: Any, balancers: Balancers) -> None:
    """Of a leader's threads, and those of one that lost its lease: each change has a number, none is passed over."""
    stopped = leading(balancers.open())
    balancers.die(stopped)
    leader = leading(balancers.open())
    refused = []

    def make(number: int) -> None:
        world.commit(leader, world.order(f"k{number}", shares=6))
        try:
            stopped.reserve(world.order(f"x{number}"), "node-0", world.now_ms)
        except RegistryUnavailable:
            refused.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(16)))
    assert len(refused) == 16
    assert leader.count() == len(leader.sync("node-0", 0).entries) == 16
    numbers = [number for (number,) in balancers.place.execute("SELECT changed FROM shares WHERE node = 'node-0'")]
    assert sorted(numbers) == list(range(1, 17))


def test_what_was_answered_outlives_a_crash_of_the_server(world: Any, own_server: PostgresServer) -> None:
    """Meanwhile nobody leads; then the same balancer goes on."""
    made = Balancers(world, ServerPlace(own_server))
    try:
        registry = leading(made.open())
        manifest = world.commit(registry, world.order("k"))
        own_server.stop(signal.SIGQUIT)
        with pytest.raises(RegistryUnavailable):
            registry.reserve(world.order("late"), "node-0", world.now_ms)
        until(lambda: not registry.term, "it knows that it does not lead any more")
        assert "can't be reached" in registry.problem
        own_server.start()
        leading(registry)
        assert registry.commit(manifest, [], world.now_ms)
        world.commit(registry, world.order("late"))
        assert registry.count() == 2
    finally:
        made.close()


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def test_what_was_answered_is_at_the_synchronous_standby(world: Any, own_server: PostgresServer) -> None:
    """Without one nothing is answered; the one that is promoted has it all, and the same balancer goes on there."""
    with postgres_server(standby_of=own_server) as standby:
        own_server.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        own_server.execute("SELECT pg_reload_conf()")
        until(lambda: own_server.execute("SELECT sync_state FROM pg_stat_replication") == [("sync",)], "it follows")
        both = f"host={own_server.folder},{standby.folder} dbname=postgres user=keyquorum"
        registry = PostgresRegistry(both, world.cluster, world.keys["balancer"], lambda: world.now_ms)
        registry.start()
        try:
            leading(registry)
            manifest = world.commit(registry, world.order("k"))
            certificate = registry.commit(manifest, [], world.now_ms)
            standby.stop()
            order = world.order("unknown")
            with pytest.raises(RegistryUnavailable, match="did not answer"):
                registry.reserve(order, "node-0", world.now_ms)
            own_server.stop(signal.SIGQUIT)
            standby.start()
            standby.promote()
            until(lambda: _commits(registry, manifest, world) == certificate, "the balancer leads there")
            assert registry.reserve(order, "node-0", world.now_ms).attempt == 1
        finally:
            registry.close()


def _commits(registry: PostgresRegistry, manifest: bytes, world: Any) -> bytes:
    try:
        return leading(registry).commit(manifest, [], world.now_ms)
    except RegistryUnavailable:
        return b""


# --- who can write the database ---


def _plain(*fields: object) -> bytes:
    """What seals a row where nobody else can write."""
    return hashlib.blake2b(msgspec.msgpack.encode(fields), digest_size=16).digest()


def test_who_writes_the_database_cannot_sign_a_row(world: Any, shared: ServerPlace) -> None:
    """Neither with the hash that seals a row in a file, nor with another row's signature."""
    registry = world.open(shared)
    manifests = [world.commit(registry, world.order(name)) for name in ("a", "b")]
    ids = [open_key_manifest(each, world.cluster).manifest.key_id for each in manifests]
    registry.close()
    columns = [name for (name,) in shared.execute(
        "SELECT column_name::text FROM information_schema.columns WHERE table_schema = current_schema "
        "AND table_name = 'keys' ORDER BY ordinal_position"
    )]  # fmt: skip
    assert columns[-1] == "hash"
    row = shared.execute("SELECT * FROM keys ORDER BY name")[0]
    shared.server.execute(
        f"UPDATE {shared.schema}.keys SET state = 3, hash = %s WHERE name = 'a'",  # noqa: S608
        _plain(*row[:2], 3, *row[3:-1]),
    )
    shared.server.execute(
        f"UPDATE {shared.schema}.keys SET hash = (SELECT hash FROM {shared.schema}.counters LIMIT 1) WHERE name = 'b'"  # noqa: S608
    )
    with contextlib.closing(world.open(shared)) as again:
        for key_id in ids:
            with pytest.raises(RegistryUnavailable, match="is damaged"):
                again.outcome(key_id, 1, world.now_ms)


def test_no_secret_is_in_a_row(world: Any, shared: ServerPlace) -> None:
    """Documents and names alone; the balancer's signing key is not there."""
    with contextlib.closing(world.open(shared)) as registry:
        world.commit(registry, world.order("a"))
    private = world.keys["balancer"]._private.private_bytes_raw().hex()
    tables = shared.execute("SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema")
    rows = [row for (table,) in tables for (row,) in shared.execute(f"SELECT to_json(t)::text FROM {table} t")]  # noqa: S608
    assert len(rows) > 8
    assert not any(private in row for row in rows)


# --- a registry that fell back ---


def test_a_registry_that_fell_back_is_refused(world: Any, place: Place, tmp_path: Path) -> None:
    """By the mark that the balancer keeps beside it; one that goes on is not, and who wants the older one says so."""

    def opened() -> Any:
        return place.open(world.cluster, world.keys["balancer"], world.now_ms, Mark(tmp_path / "mark"))

    opened().close()
    saved = place.save()
    registry = opened()
    world.commit(registry, world.order("k"))
    registry.close()
    again = opened()
    assert again.count() == 1
    again.close()
    place.put_back(saved)
    with pytest.raises((ConfigError, AssertionError), match="fell back to revision"):
        opened()
    Mark(tmp_path / "mark").put(0, 0)
    with contextlib.closing(opened()) as older:
        assert older.count() == 0


def test_a_database_that_is_exchanged_under_a_leader_is_noticed(world: Any, balancers: Balancers) -> None:
    """Between two of its transactions; it writes nothing into the older one."""
    registry = leading(balancers.open())
    world.commit(registry, world.order("k"))
    saved = balancers.place.execute("SELECT value, hash FROM counters WHERE id = 4")[0]
    world.commit(registry, world.order("l"))
    balancers.place.server.execute(
        f"UPDATE {balancers.place.schema}.counters SET value = %s, hash = %s WHERE id = 4",  # noqa: S608
        *saved,
    )
    for name in ("m", "n"):
        with pytest.raises(RegistryUnavailable, match="fell back from revision"):
            registry.reserve(world.order(name), "node-0", world.now_ms)


def test_a_damaged_mark_is_told(tmp_path: Path) -> None:
    (tmp_path / "mark").write_bytes(b"{")
    with pytest.raises(ConfigError, match="mark"):
        Mark(tmp_path / "mark")
