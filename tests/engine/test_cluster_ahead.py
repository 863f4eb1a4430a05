"""Keys are loaded ahead of their use, on real clusters: by hints, after a new epoch, where a node comes back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from steering import until
from whole_keys import create_whole_key

import engine
from balancer.history import CLASSES, GROUPS_MAX, Stored
from balancer.store import HistoryStore
from engine import Engine, LocalCluster, PolicyRule
from engine.client.config import load_identity
from engine.client.publications import Gate, Publisher
from engine.protocol.requests import NodeStatus
from engine.protocol.signed import SigningKey
from engine.protocol.table import RoutingTable, seal_table

RULES = [PolicyRule("*", "*", ["*"])]
SIZE = 5
CLIENTS = ("local", "other", "third")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = tmp_path_factory.mktemp("ahead") / "kq"
    with LocalCluster(nodes=SIZE, threshold=3, path=path, clients=CLIENTS, rules=RULES) as running:
        yield running


@pytest.fixture
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as connected:
        yield connected


@pytest.fixture(scope="module")
def other(cluster: LocalCluster) -> Iterator[Engine]:
    """Who changes things behind the first client's back."""
    with engine.connect(cluster.client_config_of("other")) as connected:
        yield connected


def of_caches(kq: Engine, field: str) -> dict[str, int]:
    """What the nodes count of their loaded keys."""
    found = {}
    for member in kq.status():
        if member.role == "node":
            assert isinstance(member.status, NodeStatus), member.error
            found[member.name] = next(getattr(each, field) for each in member.status.caches if each.cache == "keys")
    return found


def misses(kq: Engine) -> int:
    """How many uses, or loads, found a key not loaded, over all nodes."""
    return sum(of_caches(kq, "misses").values())


def use(kq: Engine, name: str, times: int = 20) -> None:
    for _ in range(times):
        kq.encrypt(name, b"x")


def use_much(kq: Engine, name: str) -> None:
    """The shortest way tells the router of its uses 20 ms later, when more come."""
    use(kq, name)
    time.sleep(0.03)
    use(kq, name, 2)


def a_popular_key(kq: Engine, name: str, *, everywhere: bool = True) -> None:
    """A key that this client uses much, loaded at every node or where the uses went."""
    create_whole_key(kq, name, "aes-256-gcm", threshold=3, shares=SIZE)
    use_much(kq, name)
    if everywhere:
        assert len(kq.prewarm(name)) == SIZE


def config_without(cluster: LocalCluster) -> Path:
    """A ``client.toml`` with the switch off."""
    plain = cluster.client_config
    config = plain.with_name("without.toml")
    config.write_text(plain.read_text(encoding="utf-8") + "\nprewarm = false\n", encoding="utf-8")
    return config


# --- another epoch, another key ---


def test_after_a_refresh_the_uses_are_warm_where_the_key_was_loaded(
    cluster: LocalCluster, kq: Engine, other: Engine
) -> None:
    """Also if it was not loaded any more, of which this client knew nothing."""
    a_popular_key(kq, "epoch/mine")
    assert other.flush("epoch/mine") == SIZE
    kq.refresh_key("epoch/mine")
    until(lambda: kq.prewarm_stats.loaded == SIZE, "the key is loaded again", lambda: str(kq.prewarm_stats))
    before = misses(kq)
    use(kq, "epoch/mine", 30)
    assert misses(kq) == before
    assert other.flush("epoch/mine") == SIZE


def test_a_refresh_that_another_client_made_is_noticed(kq: Engine, other: Engine) -> None:
    """By the first reply that tells of it."""
    a_popular_key(kq, "epoch/theirs")
    other.refresh_key("epoch/theirs")
    assert other.flush("epoch/theirs") == SIZE
    assert kq.prewarm_stats.sent == 0
    use(kq, "epoch/theirs", 1)
    until(lambda: kq.prewarm_stats.loaded == SIZE, "the key is loaded again", lambda: str(kq.prewarm_stats))
    assert other.flush("epoch/theirs") == SIZE


def test_another_key_of_the_name_is_loaded_where_the_one_before_was(kq: Engine, other: Engine) -> None:
    """It is made anew by somebody else; this client's first use finds that out."""
    a_popular_key(kq, "anew")
    other.destroy_key("anew")
    create_whole_key(other, "anew", "aes-256-gcm", threshold=3, shares=SIZE)
    use(kq, "anew", 1)
    until(lambda: kq.prewarm_stats.loaded == SIZE, "the key is loaded", lambda: str(kq.prewarm_stats))
    before = misses(kq)
    use(kq, "anew", 30)
    assert misses(kq) == before
    assert other.flush("anew") == SIZE


def test_a_key_that_is_hardly_used_is_not_loaded_ahead(kq: Engine, other: Engine) -> None:
    create_whole_key(kq, "rare", "aes-256-gcm", threshold=3, shares=SIZE)
    use(kq, "rare", 1)
    kq.prewarm("rare")
    other.flush("rare")
    kq.refresh_key("rare")
    assert kq._warmer is not None
    assert kq._warmer.ahead.wait_s() is None
    assert kq.prewarm_stats.sent == 0


def test_the_asynchronous_client_does_it_too(cluster: LocalCluster, other: Engine) -> None:
    async def course() -> int:
        async with engine.aio.connect(cluster.client_config) as client:
            await client.create_key("epoch/aio", "aes-256-gcm", threshold=3, shares=SIZE)
            for _ in range(5):
                await client.encrypt("epoch/aio", b"x")
            await client.prewarm("epoch/aio")
            await asyncio.to_thread(other.flush, "epoch/aio")
            await client.refresh_key("epoch/aio")
            await asyncio.to_thread(until, lambda: client.prewarm_stats.loaded == SIZE, "the key is loaded again")
            return await asyncio.to_thread(other.flush, "epoch/aio")

    assert asyncio.run(course()) == SIZE


def test_switched_off_nothing_is_sent(cluster: LocalCluster, other: Engine) -> None:
    with engine.connect(config_without(cluster)) as kq:
        a_popular_key(kq, "epoch/off")
        assert other.flush("epoch/off") == SIZE
        kq.refresh_key("epoch/off")
        assert "keyquorum-ahead" not in {thread.name for thread in threading.enumerate()}
        assert kq.prewarm_stats.sent == 0
        assert other.flush("epoch/off") == 0
        use(kq, "epoch/off")


def test_many_clients_at_once_load_a_key_once(cluster: LocalCluster, other: Engine) -> None:
    """Each of them asks each node; one gathering does for all that come while it goes on, the rest finds it loaded."""
    clients = [engine.connect(cluster.client_config_of(name)) for name in CLIENTS]
    try:
        create_whole_key(clients[0], "crowd", "aes-256-gcm", threshold=3, shares=SIZE)
        for each in clients:
            use_much(each, "crowd")
            each.prewarm("crowd")
        other.flush("crowd")
        before = misses(clients[0])
        clients[0].refresh_key("crowd")
        for each in clients[1:]:
            each.key_info("crowd")  # which tells of the new epoch
        sent = len(CLIENTS) * SIZE
        until(lambda: sum(each.prewarm_stats.loaded for each in clients) == sent, "all have asked everywhere")
        assert SIZE <= misses(clients[0]) - before <= sent
        assert other.flush("crowd") == SIZE
    finally:
        for each in clients:
            each.close()


# --- a node that comes back ---


def audited(cluster: LocalCluster, node: str) -> list[dict[str, Any]]:
    files = sorted((cluster.data_folder(node) / "audit").glob("audit-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_first_use_at_a_node_that_was_restarted_is_no_cold_one(tmp_path: Path) -> None:
    """Uses go on all the while; what comes to the node first is the loading, and then uses come."""
    with (
        LocalCluster(nodes=SIZE, threshold=3, path=tmp_path / "kq", rules=RULES) as local,
        engine.connect(local.client_config) as kq,
    ):
        a_popular_key(kq, "k")
        uses = of_caches(kq, "hits")
        victim = max(uses, key=lambda node: uses[node])
        boot = audited(local, victim)[-1]["boot"]

        def asked() -> list[str]:
            """What was answered of the key since the victim was started again."""
            since = [each for each in audited(local, victim) if each["boot"] != boot]
            return [each["verb"] for each in since if each["event"] == "reply" and each.get("key") == "k"]

        stop, errors = threading.Event(), list[Exception]()

        def work() -> None:
            while not stop.is_set():
                try:
                    use(kq, "k", 1)
                except Exception as error:  # told to the test
                    errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            local.kill(victim)
            assert victim not in kq.prewarm("k", timeout=2)  # so that this client knows, whatever it had to do there
            local.start_node(victim)
            until(lambda: "encrypt" in asked(), "it is used again", lambda: str(kq.prewarm_stats))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not errors
        assert asked()[:2] == ["prewarm", "encrypt"]


def test_a_restart_that_this_client_had_no_part_in_is_noticed(cluster: LocalCluster, kq: Engine, other: Engine) -> None:
    """It asks the node for nothing meanwhile; that it was started anew the node's publications tell."""
    a_popular_key(kq, "restarted")
    victim = kq.key_info("restarted").holders[0]
    heard = {each.member.name: each.newest for each in kq._follower._subscriptions.values()}[victim]
    until(lambda: heard is not None and heard.boot != b"", "the node is heard")
    cluster.kill(victim)
    cluster.start_node(victim)
    until(lambda: kq.prewarm_stats.loaded == 1, "it is loaded there again", lambda: str(kq.prewarm_stats))
    assert other.flush("restarted") == SIZE


# --- hints ---


class Pretender:
    """The cluster's balancer, played by this process with its keys: it publishes what it is told to."""

    def __init__(self, cluster: LocalCluster, table: RoutingTable) -> None:
        self._cluster = cluster.cluster
        self._table = table
        self.identity = load_identity(cluster.path / "balancer" / "identity.toml")
        self._context: zmq.Context[Any] = zmq.Context()
        self._gate = Gate(self._context, self._cluster)
        endpoint = self._cluster.members["balancer"].publish_endpoint
        self._publisher = Publisher(self._context, lambda: {endpoint: self.identity.transport}, queued=4)

    def close(self) -> None:
        self._publisher.close()
        self._gate.close()
        self._context.destroy(0)

    def table(self, **changes: Any) -> RoutingTable:
        """The next table: the real one of before with changes."""
        now_ms = time.time_ns() // 1_000_000
        self._table = msgspec.structs.replace(
            self._table, counter=self._table.counter + 1, issued_ms=now_ms, expires_ms=now_ms + 60_000, hints=[]
        )
        return msgspec.structs.replace(self._table, **changes)

    def move(self, group: int, nodes: Sequence[str]) -> None:
        """From now on the tables give the group these holders."""
        indexes = [self._table.nodes.index(node) for node in nodes]
        self._table = msgspec.structs.replace(self._table, groups=[(group, indexes)])

    def publish(self, sealed: bytes) -> None:
        self._publisher.look(self._cluster)
        self._publisher.publish(sealed)

    def put_in_force(self, kq: Engine, **changes: Any) -> RoutingTable:
        """Publish a table until the client has it, and another without hints: by then the first was looked at."""
        made = self.table(**changes)
        for each in (made, self.table()):
            sealed = seal_table(each, self.identity.signing)

            def there(sealed: bytes = sealed, order: tuple[int, int] = each.order) -> bool:
                self.publish(sealed)
                found = kq.routing_table
                return found is not None and found.order >= order

            until(there, "the table is in force")
        return made


@contextmanager
def pretending(cluster: LocalCluster, kq: Engine) -> Iterator[Pretender]:
    until(lambda: kq.routing_table is not None, "a table")
    cluster.kill_balancer()
    assert kq.routing_table is not None
    made = Pretender(cluster, kq.routing_table)
    try:
        yield made
    finally:
        made.close()
        cluster.start_balancer()


def hint(kq: Engine, name: str, nodes: Sequence[str]) -> tuple[int, list[int]]:
    table = kq.routing_table
    assert table is not None
    return kq.cluster.group_of(name), [table.nodes.index(node) for node in nodes]


def cold_nodes(kq: Engine, name: str) -> list[str]:
    return [node for node in kq.key_info(name).holders if not kq._calls.router.is_loaded(name, node)]


def idle(kq: Engine) -> bool:
    return kq._warmer is not None and kq._warmer.ahead.wait_s() is None


def test_a_hint_warms_a_second_holder_and_what_is_no_true_hint_does_not(
    cluster: LocalCluster, kq: Engine, other: Engine
) -> None:
    """Forged, expired and older tables; thousands of groups that do not exist; keys that this client does not use."""
    a_popular_key(kq, "hinted", everywhere=False)
    create_whole_key(kq, "unused", "aes-256-gcm", threshold=3, shares=SIZE)
    cold = cold_nodes(kq, "hinted")
    assert len(cold) == SIZE - 1
    with pretending(cluster, kq) as balancer:
        stranger = SigningKey("balancer", Ed25519PrivateKey.generate())
        lines = [hint(kq, "hinted", cold)]
        forged = seal_table(balancer.table(hints=lines), stranger)
        old = seal_table(
            balancer.table(hints=lines, expires_ms=time.time_ns() // 1_000_000 - 60_000), balancer.identity.signing
        )
        earlier = seal_table(balancer.table(hints=lines), balancer.identity.signing)
        balancer.put_in_force(kq)
        refused = kq.table_stats.refused
        for sealed in (forged, old, earlier):
            balancer.publish(sealed)
        until(lambda: kq.table_stats.refused >= refused + 3, "all are refused")
        balancer.put_in_force(kq, hints=[(group + 2_000_000, [0, 1]) for group in range(8_000)])
        balancer.put_in_force(kq, hints=[hint(kq, "unused", cold)])
        assert idle(kq)
        assert kq.prewarm_stats.sent == 0
        assert other.flush("hinted") == 1

        use_much(kq, "hinted")
        second = cold_nodes(kq, "hinted")[0]
        balancer.put_in_force(kq, hints=[hint(kq, "hinted", [second])])
        until(lambda: kq.prewarm_stats.loaded == 1, "the second holder has it", lambda: str(kq.prewarm_stats))
        assert kq._calls.router.is_loaded("hinted", second)
        # Again and again the same hint is one request.
        for _ in range(5):
            balancer.put_in_force(kq, hints=[hint(kq, "hinted", [second])])
        assert idle(kq)
        before = misses(kq)
        use(kq, "hinted", 30)
        assert misses(kq) == before
        assert kq.prewarm_stats.sent == 1
        assert other.flush("hinted") == 2


def test_a_client_without_a_right_sends_nothing(cluster: LocalCluster) -> None:
    """Not any more, that is: it has used the key, and the policy has changed since."""
    with engine.connect(cluster.client_config_of("third")) as third, engine.connect(cluster.client_config) as kq:
        create_whole_key(kq, "once/mine", "aes-256-gcm", threshold=3, shares=SIZE)
        use_much(third, "once/mine")
        first, second, *_ = cold_nodes(third, "once/mine")
        with pretending(cluster, third) as balancer:
            balancer.put_in_force(third, hints=[hint(third, "once/mine", [first])])
            until(lambda: third.prewarm_stats.loaded == 1, "with the right it is sent")
        serial = cluster.sign_manifest(rules=[PolicyRule("local", "*", ["*"]), PolicyRule("other", "*", ["*"])]).serial
        try:
            until(lambda: third.cluster.serial >= serial, "the client knows the policy")
            with pretending(cluster, third) as balancer:
                balancer.put_in_force(third, hints=[hint(third, "once/mine", [second])])
                assert idle(third)
                assert third.prewarm_stats == engine.PrewarmStats(sent=1, loaded=1, failed=0)
        finally:
            cluster.sign_manifest(rules=RULES)


def test_switched_off_a_hint_does_nothing(cluster: LocalCluster, other: Engine) -> None:
    with engine.connect(config_without(cluster)) as kq:
        a_popular_key(kq, "hinted/off", everywhere=False)
        with pretending(cluster, kq) as balancer:
            balancer.put_in_force(kq, hints=[hint(kq, "hinted/off", cold_nodes(kq, "hinted/off"))])
        assert kq.prewarm_stats.sent == 0
        assert other.flush("hinted/off") == 1


def test_closing_ends_what_is_under_way(cluster: LocalCluster) -> None:
    """A node that does not answer keeps nobody from closing."""
    with engine.connect(cluster.client_config) as kq:
        a_popular_key(kq, "closing", everywhere=False)
        stopped = cold_nodes(kq, "closing")[0]
        with pretending(cluster, kq) as balancer:
            cluster.pause(stopped)
            try:
                balancer.put_in_force(kq, hints=[hint(kq, "closing", [stopped])])
                until(lambda: kq.prewarm_stats.sent == 1, "it is under way")
                kq.close()
                assert kq.prewarm_stats == engine.PrewarmStats(sent=1, loaded=0, failed=1)
                assert not [thread for thread in threading.enumerate() if thread.name == "keyquorum-ahead"]
            finally:
                cluster.resume(stopped)


def test_a_table_that_gives_a_group_another_holder_has_its_keys_loaded_there(
    cluster: LocalCluster, kq: Engine, other: Engine
) -> None:
    """The key's manifest names it as a holder, and the table from now on among the group's."""
    create_whole_key(kq, "moved", "aes-256-gcm", threshold=3, shares=SIZE)
    use_much(kq, "moved")
    group, order = kq.cluster.group_of("moved"), list(kq.key_info("moved").holders)
    new = cold_nodes(kq, "moved")[-1]
    with pretending(cluster, kq) as balancer:
        balancer.move(group, [node for node in order if node != new])
        balancer.put_in_force(kq)
        assert idle(kq)
        assert kq.prewarm_stats.sent == 0
        balancer.move(group, [new, *(node for node in order if node != new)])
        balancer.put_in_force(kq)
        until(lambda: kq.prewarm_stats.loaded == 1, "it is loaded there", lambda: str(kq.prewarm_stats))
    assert kq._calls.router.is_loaded("moved", new)


# --- from the forecast to the node ---


def keep_a_rush(path: Path, request_class: str, group: int, per_s: float) -> None:
    """A history as a balancer leaves it that has seen, for an hour, such a load of one placement group."""
    column, now_s = CLASSES.index(request_class), time.time()
    pairs = np.array([column * GROUPS_MAX + group], dtype=np.int64)

    def stored(last: int, steps: int, step_s: float) -> Stored:
        counts = np.zeros((steps, len(CLASSES)))
        counts[:, column] = per_s * step_s
        return Stored(np.arange(last - steps + 1, last + 1), counts, pairs, counts[:, [column]])

    store = HistoryStore(path, tick_ms=1000, ticks=3600)
    store.save(stored(int(now_s), 600, 1.0), stored(int(now_s) // 60 - 1, 60, 60.0))
    store.close()


def test_a_forecast_burst_warms_further_holders(tmp_path: Path) -> None:
    """The balancer has counted for an hour that one group's load is several nodes' work; just now little of it comes.

    Its own forecast, program, hints and table; a client that uses the key a little has it loaded where it is hinted.
    """
    with (
        LocalCluster(nodes=SIZE, threshold=3, path=tmp_path / "kq", clients=CLIENTS, rules=RULES) as local,
        engine.connect(local.client_config) as kq,
        engine.connect(local.client_config_of("other")) as other,
    ):
        a_popular_key(kq, "k", everywhere=False)
        group = kq.cluster.group_of("k")
        until(lambda: kq.routing_table is not None, "a table")
        first = kq.routing_table
        assert first is not None
        assert first.hints == []
        local.kill_balancer()
        keep_a_rush(local.path / "balancer" / "data" / "history.db", "encrypt/aes-256-gcm", group, 200_000.0)
        local.start_balancer()
        loaded = SIZE - len(cold_nodes(kq, "k"))
        hinted = list[Any]()

        def told() -> bool:
            hinted[:] = kq.routing_table.hints if kq.routing_table is not None else ()
            return bool(hinted)

        until(told, "the table has a hint")
        ((which, nodes),) = hinted
        assert which == group
        assert len(nodes) > loaded
        names = {first.nodes[index] for index in nodes}
        is_loaded = kq._calls.router.is_loaded
        until(lambda: all(is_loaded("k", name) for name in names), "it is loaded there", lambda: str(kq.prewarm_stats))
        assert len(nodes) - loaded <= kq.prewarm_stats.sent <= len(nodes)
        assert kq.prewarm_stats.failed == 0
        before = misses(kq)
        use(kq, "k", 30)
        assert misses(kq) == before
        assert other.flush("k") >= len(nodes)
