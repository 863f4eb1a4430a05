"""Keys that lack a share on a real cluster: told, made whole by a client, and not lost by giving up a node too many."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from installed_cli import command
from whole_keys import create_whole_key

import engine
from engine import DegradedKey, Engine, LocalCluster, PolicyRule
from engine.errors import AccessDenied, ClusterError, RegistryUnavailable

RULES = [PolicyRule("local", "*", ["*"]), PolicyRule("narrow", "open/*", ["*"]), PolicyRule("narrow", "*", ["status"])]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Four nodes and a balancer, which the tests take apart one after the other."""
    with LocalCluster(
        4, 2, tmp_path_factory.mktemp("degraded") / "kq", shares=3, clients=("local", "narrow"), rules=RULES
    ) as running:
        yield running


@pytest.fixture(scope="module")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as connected:
        yield connected


def by_key(found: tuple[DegradedKey, ...]) -> dict[tuple[str, int], DegradedKey]:
    return {(each.name, each.version): each for each in found}


def test_what_would_lack_a_share_without_a_node_is_told(cluster: LocalCluster, kq: Engine) -> None:
    """Every version of a key that has a share there, and no other; names only to who may list them."""
    assert kq.degraded_keys() == ()
    infos = [
        create_whole_key(kq, f"{part}/{number}", "aes-256-gcm", threshold=2, shares=3)
        for part in ("open", "closed")
        for number in range(4)
    ]
    infos += [kq.rotate_key("open/0")]
    lost = infos[0].holders[0]
    expected = {(each.name, each.version) for each in infos if lost in each.holders}
    told = by_key(kq.degraded_keys(lost))
    assert set(told) == expected
    for each in told.values():
        assert (each.threshold, each.missing, each.left) == (2, (lost,), 2)
    assert asyncio.run(_ahead(cluster, lost)) == tuple(told.values())
    with engine.connect(cluster.client_config_of("narrow")) as narrow:
        assert sorted(each.name for each in narrow.degraded_keys(lost)) == sorted(
            name if name.startswith("open/") else "" for name, _ in expected
        )
    with pytest.raises(ValueError, match="'nobody' is no node of the cluster"):
        kq.degraded_keys("nobody")
    shown = command("key", "degraded", "--without", lost, "--config", cluster.client_config, "-o", "json")
    assert {(each["name"], each["version"]) for each in json.loads(shown.stdout)} == expected
    assert command("key", "degraded", "--config", cluster.client_config, "-o", "json").stdout.strip() == "[]"


def test_mistakes_name_what_is_wrong(kq: Engine) -> None:
    info = kq.key_info("open/1")
    node = info.holders[0]
    with pytest.raises(ValueError, match="no holders are given; 'open/1' needs at least 2"):
        kq.reshare_key("open/1", holders=[])
    with pytest.raises(ValueError, match=f"but '{node}' stands twice"):
        kq.reshare_key("open/1", holders=[node, node])
    with pytest.raises(ValueError, match=r"after 34560000 s; .* at most 31622400 s, which is 366 days"):
        kq.destroy_key("open/1", after=400 * 86_400)
    assert kq.key_info("open/1") == info
    assert info.uses_max == 2**31


async def _ahead(cluster: LocalCluster, lost: str) -> tuple[DegradedKey, ...]:
    async with engine.aio.connect(cluster.client_config) as client:
        return await client.degraded_keys(lost)


def test_a_node_is_not_given_up_if_keys_are_lost_with_it(cluster: LocalCluster, kq: Engine) -> None:
    """It is refused and nothing is signed; also where nobody can tell."""
    info = create_whole_key(kq, "all/needed", "aes-256-gcm", threshold=3, shares=3)
    node, serial = info.holders[0], cluster.cluster.serial
    with pytest.raises(ClusterError, match=rf"1 keys .*without {node} \(all/needed\).*bring back another node"):
        cluster.remove_node(node, lost=True)
    told = command("node", "remove", node, "--lost", "--dir", cluster.path)
    assert (told.returncode, "all/needed" in told.stderr, "Traceback" in told.stderr) == (2, True, False)
    with pytest.raises(ClusterError, match="all/needed"):
        cluster.replace_node(node, lost=True)
    cluster.kill_balancer()
    try:
        with pytest.raises(RegistryUnavailable, match="which keys lack a share is not known"):
            kq.degraded_keys(timeout=1.0)
        with pytest.raises(ClusterError, match=f"whether keys would be lost with {node} is not known"):
            cluster.remove_node(node, lost=True)
    finally:
        cluster.start_balancer()
    assert (cluster.cluster.serial, node in cluster.nodes) == (serial, True)
    kq.destroy_key("all/needed")


def test_keys_with_just_their_threshold_left_are_made_whole(cluster: LocalCluster, kq: Engine) -> None:
    """All are 2-of-3, and so no balancer could: new shares are made and tried, and the keys stay what they were."""
    names = [each.name for each in kq.list_keys()]
    sealed = {name: kq.encrypt(name, name.encode()) for name in names}
    lost = kq.key_info(names[0]).holders[0]
    before = kq.degraded_keys(lost)
    cluster.kill(lost)
    cluster.remove_node(lost, lost=True)
    assert kq.degraded_keys() == before
    first, *others = before
    again = command("key", "repair", first.name, "nobody", "--config", cluster.client_config)
    assert (again.returncode, "'nobody'" in again.stderr) == (1, True)
    assert kq.degraded_keys() == before, "something was done although a name is wrong"
    one = command("key", "repair", first.name, "--config", cluster.client_config, "-o", "json")
    assert one.returncode == 0, one.stderr
    repaired = [{"name": each.name, "version": each.version, "repaired": True} for each in before if each == first]
    assert [each for each in json.loads(one.stdout) if each["version"] == first.version] == repaired
    rest = command("key", "repair", "--config", cluster.client_config)
    assert rest.returncode == 0, rest.stderr
    assert kq.degraded_keys() == ()
    after = {(each.name, each.version): each for name in names for each in kq.key_versions(name)}
    for key in before:
        info = after[key.name, key.version]
        assert sorted(info.holders) == sorted(cluster.nodes), "not at the nodes that there are"
        assert info.stored == info.holders
    for name in names:
        kq.flush(name)
        assert kq.decrypt(name, sealed[name]) == name.encode()
    assert others


def test_where_no_node_is_left_for_a_share_it_is_said(cluster: LocalCluster, kq: Engine) -> None:
    """Keys serve with the shares that are left, and a node that comes gets the others, by a client that may do it."""
    lost = cluster.nodes[0]
    cluster.kill(lost)
    cluster.remove_node(lost, lost=True)
    told = command("key", "repair", "open/1", "--config", cluster.client_config)
    assert told.returncode == 2
    assert f"there is none to take the place of '{lost}': add one" in told.stderr
    assert {(each.missing, each.left) for each in kq.degraded_keys()} == {((lost,), 2)}
    assert kq.decrypt("open/1", kq.encrypt("open/1", b"still")) == b"still"
    cluster.add_node()
    narrow = command("key", "repair", "--config", cluster.client_config_of("narrow"))
    assert narrow.returncode == 2
    assert "may not list" in narrow.stderr
    left = kq.degraded_keys()
    assert {each.name.split("/")[0] for each in left} == {"closed"}
    with engine.connect(cluster.client_config_of("narrow")) as client, pytest.raises(AccessDenied):
        client.repair_key(left[0])


def test_the_command_makes_them_whole_and_names_what_is_given_up(cluster: LocalCluster, kq: Engine) -> None:
    """A node that is lost is removed by one command; with --give-up-keys, what is lost is named and not waited for."""
    for key in kq.degraded_keys():
        kq.repair_key(key)
    doomed = create_whole_key(kq, "all/lost", "aes-256-gcm", threshold=3, shares=3)
    cluster.add_node()
    lost = doomed.holders[0]
    endangered = kq.degraded_keys(lost)
    assert {(each.left, each.threshold) for each in endangered} == {(2, 2), (2, 3)}
    cluster.kill(lost)
    told = command("node", "remove", lost, "--lost", "--give-up-keys", "--dir", cluster.path, "--timeout", "60")
    assert told.returncode == 0, told.stderr
    assert "all/lost (version 1) is lost: 2 of the 3 shares it needs are left" in told.stderr
    assert [each.name for each in kq.degraded_keys()] == ["all/lost"]
    assert kq.decrypt("open/0", kq.encrypt("open/0", b"whole")) == b"whole"
