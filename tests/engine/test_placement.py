"""Owns the proof that the placement of shares is as safe as the topology allows, against brute force."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from hashlib import sha256
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sharing import (
    Distribution,
    NodeLocation,
    Share,
    check_placement,
    distribute_shares,
    generate_shares,
    order_holders,
    placement_group,
)

# Machines differ: no test here times anything.
relaxed = settings(deadline=None)


def cluster(*locations: str) -> list[NodeLocation]:
    return [NodeLocation(f"n{place}", location) for place, location in enumerate(locations)]


@st.composite
def topologies(draw: st.DrawFn) -> list[NodeLocation]:
    """1..8 nodes on hosts of their own, in up to 3 sites with up to 2 rooms with up to 3 racks."""
    places = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=8))
    return cluster(*(f"s{site}/room{room}/rack{rack}/h{host}" for host, (site, room, rack) in enumerate(places)))


def spread(places: Sequence[tuple[str, ...]], domain_level: int) -> tuple[list[int], int]:
    """What is to be least: shares by failure domain, the fullest first; then pairs of shares in one rack."""
    domains = sorted(Counter(path[:domain_level] for path in places).values(), reverse=True)
    pairs = sum(count * (count - 1) // 2 for count in Counter(path[:3] for path in places).values())
    return domains, pairs


def best_spread(nodes: Sequence[NodeLocation], count: int, domain_level: int) -> tuple[list[int], int]:
    return min(spread([node.path for node in some], domain_level) for some in combinations(nodes, count))


# The order of the holders.


@relaxed
@given(topologies(), st.binary(max_size=4), st.integers(1, 2))
def test_every_prefix_is_as_spread_as_brute_force_can(
    nodes: list[NodeLocation], seed: bytes, domain_level: int
) -> None:
    paths = {node.name: node.path for node in nodes}
    order = order_holders(nodes, seed, domain_level=domain_level)
    assert sorted(order) == sorted(paths)
    for count in range(1, len(order) + 1):
        reached = spread([paths[name] for name in order[:count]], domain_level)
        assert reached == best_spread(nodes, count, domain_level)


@relaxed
@given(topologies(), st.binary(max_size=4), st.randoms(use_true_random=False), st.integers(0, 9))
def test_the_order_depends_on_nothing_but_seed_and_nodes(
    nodes: list[NodeLocation], seed: bytes, random: object, count: int
) -> None:
    order = order_holders(nodes, seed)
    assert order_holders(nodes, seed, count=count) == order[:count]
    random.shuffle(nodes)  # type: ignore[attr-defined]
    assert order_holders(nodes, seed) == order


def test_a_known_order() -> None:
    """Pinned: nodes of different versions must agree on the holders."""
    nodes = cluster("a/1/1/1", "a/1/1/2", "b/1/1/1", "b/1/2/1", "c/1/1/1")
    assert order_holders(nodes, b"group-0") == ("n4", "n2", "n0", "n3", "n1")
    assert order_holders([], b"") == ()


def test_seeds_spread_the_load_over_equal_nodes() -> None:
    """1,000 seeds, 5 equal nodes: each is the first about 200 times (sigma 13; the seeds are fixed)."""
    nodes = cluster("a/1", "b/1", "c/1", "d/1", "e/1")
    firsts = Counter(order_holders(nodes, b"%d" % seed, count=1)[0] for seed in range(1000))
    assert all(150 < firsts[node.name] < 250 for node in nodes)


def test_a_node_that_leaves_moves_little() -> None:
    """Rendezvous hashing: without the last node the others keep their order."""
    nodes = cluster("a/1", "b/1", "c/1", "d/1", "e/1")
    for seed in range(50):
        order = order_holders(nodes, b"%d" % seed)
        assert order_holders(nodes[:-1], b"%d" % seed) == tuple(name for name in order if name != "n4")


def test_a_rack_of_its_own_comes_before_a_room_of_its_own() -> None:
    """Four shares in a site: room 1 has one rack only, so it gets one share, though it has four hosts."""
    nodes = cluster(*(f"s/room1/rack1/h{host}" for host in range(4)), *(f"s/room2/rack{rack}/h" for rack in range(3)))
    for seed in range(20):
        chosen = order_holders(nodes, b"%d" % seed, count=4)
        assert sum(name in {"n0", "n1", "n2", "n3"} for name in chosen) == 1
        rooms = {nodes[int(name[1:])].path[1] for name in chosen[:2]}
        assert rooms == {"room1", "room2"}


def test_two_nodes_of_one_host_come_last() -> None:
    nodes = cluster("s/r/k/h1", "s/r/k/h1", "s/r/k/h2", "s/r/k/h3")
    for seed in range(20):
        last = order_holders(nodes, b"%d" % seed)[-1]
        assert last in {"n0", "n1"}


def test_paths_of_different_depth() -> None:
    """A path that ends early may be anywhere below: next to a node that is below it, it counts as the same host."""
    nodes = cluster("a", "b/room", "b/room/rack/h1", "b/room/rack/h2")
    for seed in range(20):
        order = order_holders(nodes, b"%d" % seed)
        assert "n0" in order[:2]
        first_of_b = next(name for name in order if name != "n0")
        assert order[3] == "n1" or first_of_b == "n1"


# What is missing.


@relaxed
@given(topologies(), st.integers(1, 2), st.data())
def test_warnings_come_exactly_where_the_topology_is_at_fault(
    nodes: list[NodeLocation], domain_level: int, data: st.DataObject
) -> None:
    """The placement is free of warnings if and only if some placement is safe."""
    count = data.draw(st.integers(1, len(nodes)))
    threshold = data.draw(st.integers(1, count))
    shares = generate_shares(b"k", threshold=threshold, shares=count)
    given_out = distribute_shares(shares, nodes, threshold=threshold, domain_level=domain_level)
    fullest = best_spread(nodes, count, domain_level)[0][0]
    assert (given_out.warnings == ()) == (fullest < threshold <= count - fullest)


@relaxed
@given(topologies(), st.data())
def test_each_domain_is_judged_rightly(nodes: list[NodeLocation], data: st.DataObject) -> None:
    """Any holders, not only good ones: a domain is named exactly when it holds t or its loss leaves fewer."""
    holders = data.draw(st.lists(st.sampled_from([node.name for node in nodes]), min_size=1, unique=True))
    threshold = data.draw(st.integers(1, len(holders)))
    warnings = check_placement(nodes, holders, threshold)
    sites = Counter(node.path[0] for node in nodes if node.name in holders)
    for site in ("s0", "s1", "s2"):
        alone = [warning for warning in warnings if warning.startswith(f"failure domain '{site}' holds")]
        lost = [warning for warning in warnings if warning.startswith(f"losing failure domain '{site}' takes")]
        assert len(alone) == (sites[site] >= threshold)
        assert len(lost) == (sites[site] > 0 and len(holders) - sites[site] < threshold)


def test_the_warnings_name_the_domain_the_counts_and_the_limit() -> None:
    nodes = cluster("a/r/k/1", "a/r/k/2", "a/r/k/3", "b/r/k/1", "b/r/k/2")
    assert check_placement(nodes, ["n0", "n1", "n2", "n3", "n4"], 3) == (
        "failure domain 'a' holds 3 of 5 shares, but must hold fewer than the threshold 3: "
        "it could reconstruct the key alone",
        "losing failure domain 'a' takes 3 of 5 shares and leaves 2, but the threshold is 3",
    )


def test_neighbours_in_one_rack_are_told_while_others_are_free() -> None:
    nodes = cluster("a/r/k1/1", "a/r/k1/2", "a/r/k2/3", "b/r/k1/1", "b/r/k2/2")
    assert check_placement(nodes, ["n0", "n1", "n3", "n4"], 2)[-1] == (
        "rack 'a/r/k1' holds 2 of 4 shares, but 1 would do: 'n2' of the same failure domain stands apart and holds none"
    )
    assert not any("rack" in warning for warning in check_placement(nodes, ["n0", "n2", "n3", "n4"], 2))
    # With the free rack taken as well, nothing better is left, and nothing is said.
    assert not any("rack" in warning for warning in check_placement(nodes, ["n0", "n1", "n2", "n3"], 2))


def test_two_shares_on_one_host_are_told() -> None:
    nodes = cluster("a/r/k1/1", "a/r/k1/1", "a/r/k1/2")
    warnings = check_placement(nodes, ["n0", "n1"], 2)
    assert any(warning.startswith("host 'a/r/k1/1' holds 2 of 2 shares, but 1 would do: 'n2'") for warning in warnings)


# Giving out.


def test_three_of_five_over_three_domains() -> None:
    """The demo's cluster: 2, 2 and 1 in three sites survive the loss of any of them."""
    nodes = cluster("a/r/k/1", "a/r/k/2", "b/r/k/1", "b/r/k/2", "c/r/k/1")
    shares = generate_shares(b"key", threshold=3, shares=5)
    given_out = distribute_shares(shares, nodes, threshold=3, seed=b"group-1")
    assert list(given_out.assignment.values()) == shares
    assert tuple(given_out.assignment) == order_holders(nodes, b"group-1")
    assert given_out.warnings == ()
    with pytest.raises(TypeError):
        given_out.assignment["n0"] = shares[0]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        given_out.warnings = ("no",)  # type: ignore[misc]
    assert isinstance(given_out, Distribution)
    assert "key" not in repr(given_out)


def test_one_domain_alone_is_told() -> None:
    nodes = cluster("a/1", "a/2", "a/3")
    warnings = distribute_shares(generate_shares(b"k", threshold=2, shares=3), nodes, threshold=2).warnings
    assert len(warnings) == 2
    assert all("'a'" in warning for warning in warnings)


def test_the_domain_level_is_a_choice() -> None:
    """The same nodes are one domain as sites and three as rooms."""
    nodes = cluster("a/1", "a/2", "a/3")
    shares = generate_shares(b"k", threshold=2, shares=3)
    assert distribute_shares(shares, nodes, threshold=2, domain_level=2).warnings == ()


def test_every_refusal_names_the_value_and_the_limit() -> None:
    nodes = cluster("a/1", "b/1")
    two, three = (generate_shares(b"k", threshold=1, shares=count) for count in (2, 3))
    with pytest.raises(ValueError, match=r"the cluster has 2 nodes, but 3 shares need 3"):
        distribute_shares(three, nodes, threshold=2)
    with pytest.raises(ValueError, match=r"the threshold is 3, but must be in 1\.\.2"):
        distribute_shares(two, nodes, threshold=3)
    with pytest.raises(ValueError, match=r"the threshold is 0, but must be in 1\.\.2"):
        distribute_shares(two, nodes, threshold=0)
    with pytest.raises(ValueError, match=r"the threshold is 1, but must be in 1\.\.0"):
        distribute_shares([], nodes, threshold=1)
    with pytest.raises(ValueError, match=r"2 shares have the index x = 5"):
        distribute_shares([Share(5, b"a"), Share(5, b"b")], nodes, threshold=1)
    with pytest.raises(ValueError, match=r"the node name 'n0' is given twice"):
        distribute_shares(two, [*nodes, nodes[0]], threshold=1)
    with pytest.raises(ValueError, match=r"the node name 'n1' is given twice"):
        order_holders([*nodes, NodeLocation("n1", "c")], b"")
    with pytest.raises(ValueError, match=r"the domain level is 0, but must be at least 1"):
        order_holders(nodes, b"", domain_level=0)
    with pytest.raises(ValueError, match=r"the domain level is -1, but must be at least 1"):
        check_placement(nodes, ["n0"], 1, domain_level=-1)
    with pytest.raises(ValueError, match=r"the holder 'n7' is none of the 2 nodes"):
        check_placement(nodes, ["n0", "n7"], 1)
    with pytest.raises(ValueError, match=r"the holder 'n0' is given 2 times"):
        check_placement(nodes, ["n0", "n0"], 1)
    with pytest.raises(ValueError, match=r"the threshold is 2, but must be in 1\.\.1"):
        check_placement(nodes, ["n0"], 2)


@pytest.mark.parametrize("location", ["", "/a", "a/", "a//b"])
def test_a_location_has_no_empty_part(location: str) -> None:
    with pytest.raises(ValueError, match=r"of node 'n' has an empty part"):
        NodeLocation("n", location)


def test_a_node_has_a_name() -> None:
    with pytest.raises(ValueError, match="name is empty"):
        NodeLocation("", "a")


# Placement groups.


@relaxed
@given(st.text(), st.integers(1, 5000))
def test_the_group_is_the_hash_of_the_name(name: str, groups: int) -> None:
    digest = sha256(b"keyquorum/placement-group/1\0" + name.encode()).digest()
    assert placement_group(name, groups) == int.from_bytes(digest, "big") % groups


def test_the_groups_fill_evenly() -> None:
    """10,240 names in 1,024 groups, 10 each: the fullest of a fair hash stays below 30."""
    groups = Counter(placement_group(f"key-{number}", 1024) for number in range(10_240))
    assert max(groups.values()) < 30
    assert len(groups) > 1000
    with pytest.raises(ValueError, match="the number of placement groups is 0, but must be at least 1"):
        placement_group("key", 0)
