"""The manifest that a process goes by: what it takes, what it refuses, and that it is durable first. No process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.client.membership import Membership, Servers, open_membership
from engine.client.spreading import MAX_PENDING, PENDING_S, Desk
from engine.errors import ConfigError, ManifestError, Overloaded
from engine.protocol.manifest import (
    Cluster,
    Member,
    PolicyRule,
    chain_after,
    chain_pin,
    countersign_chain,
    issue_cluster_manifest,
    open_chain,
)
from engine.protocol.requests import MAX_MANIFEST_PIECE, ManifestFetch, ManifestOffer
from engine.protocol.signed import SigningKey


def key_of(name: str) -> SigningKey:
    """A key that is the same in each run."""
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"\0")))


ALICE, MALLORY = key_of("alice"), key_of("mallory")


def member(name: str, role: str = "node", port: int = 1) -> Member:
    curve = bytes(32) if role == "operator" else name.encode().rjust(32, b"c")
    endpoint = f"tcp://127.0.0.1:{port}" if role in ("node", "balancer") else ""
    return Member(name, role, key_of(name).public, curve, endpoint, "", f"site/{name}" if role == "node" else "")


OPERATOR = member("alice", "operator")
NODES = [member(f"node{number}", port=number) for number in range(1, 4)]


def issue(chain: bytes, members: Sequence[Member], *, keys: Sequence[SigningKey] = (ALICE,), rules: int = 1) -> bytes:
    policy = [PolicyRule("*", f"k{number}", ["*"]) for number in range(rules)]
    return issue_cluster_manifest(
        name="prod", members=[OPERATOR, *members], rules=policy, operators=keys, groups=16, chain=chain
    )


FIRST = issue(b"", NODES[:1])
SECOND = issue(FIRST, NODES[:2])
THIRD = issue(SECOND, NODES)
OTHER_SECOND = issue(FIRST, NODES[2:])
PIN = chain_pin(FIRST)


def membership_of(chain: bytes, file: Path | None = None) -> Membership:
    return Membership(open_chain(chain, PIN), chain, file)


def test_a_newer_chain_is_taken_and_told() -> None:
    """The next manifests are in force at once, and whoever subscribed hears of both."""
    members = membership_of(FIRST)
    heard: list[tuple[int, int]] = []
    members.subscribe(lambda before, now: heard.append((before.serial, now.serial)))
    assert list(Servers(members)) == ["node1"]
    assert members.offer_chain(THIRD)
    assert members.cluster.serial == 3
    assert list(Servers(members)) == ["node1", "node2", "node3"]
    assert heard == [(1, 3)]
    assert members.after(1) == chain_after(THIRD, 1)
    assert members.after(3) == b""


@pytest.mark.parametrize("chain", [FIRST, SECOND, THIRD])
def test_what_is_known_changes_nothing(chain: bytes) -> None:
    """An older part of the chain, or the same, is not taken, and is no error."""
    members = membership_of(THIRD)
    assert not members.offer_chain(chain)
    assert (members.cluster.serial, members.problem) == (3, "")


def test_two_manifests_of_one_serial_are_an_alarm() -> None:
    """The operators' keys signed both: the one in force stays, and the problem is told."""
    members = membership_of(SECOND)
    for other in (OTHER_SECOND, issue(OTHER_SECOND, NODES[1:])):
        with pytest.raises(ManifestError, match="two manifests with serial 2"):
            members.offer_chain(other)
        assert members.cluster.serial == 2
        assert set(members.cluster.nodes) == {"node1", "node2"}
        assert "two manifests" in members.problem


BOB = key_of("bob")


def issue_with_bob(chain: bytes) -> bytes:
    """Signed by Alice alone, where Bob is an operator too."""
    return issue(chain, [member("bob", "operator"), *NODES])


@given(st.lists(st.booleans(), min_size=2, max_size=5), st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_it_does_not_matter_who_else_signed(signed_too: list[bool], known: int) -> None:
    """A manifest with one operator's signature more or less is the same: no alarm, and the next follow."""
    own = other = b""
    for number, too in enumerate(signed_too):
        other = issue_with_bob(other)
        if number == known:
            own = other if too else countersign_chain(other, BOB)
        if too:
            other = countersign_chain(other, BOB)
    own = own or other
    members, behind = (Membership(open_chain(own, chain_pin(own)), own) for _ in range(2))
    serial = members.cluster.serial
    assert members.offer_chain(other) == (len(signed_too) > serial)
    assert (members.cluster.serial, members.problem) == (len(signed_too), "")
    assert not members.offer_chain(own)
    if len(signed_too) > serial:  # what it has now is good for others, too
        assert behind.offer_after(serial, members.after(serial))
    assert behind.cluster.digest == members.cluster.digest


def test_a_file_with_a_further_signature_is_no_problem(tmp_path: Path) -> None:
    """An operator may countersign what is in force; the copy in the file stays as it was put there."""
    file = tmp_path / "cluster.manifest"
    chain = issue_with_bob(b"")
    file.write_bytes(chain)
    members = open_membership(file, chain_pin(chain).hex())
    signed_too = countersign_chain(chain, BOB)
    file.write_bytes(signed_too)
    assert not members.look()
    assert (members.problem, file.read_bytes()) == ("", signed_too)
    file.write_bytes(issue_with_bob(signed_too))
    assert members.look()
    assert (members.cluster.serial, members.problem) == (2, "")


def test_subscribers_hear_of_manifests_in_order() -> None:
    """Two threads bring one each: nobody hears of the later one first."""
    members = membership_of(FIRST)
    heard: list[int] = []
    inside, go_on = threading.Event(), threading.Event()

    def hear(before: Cluster, now: Cluster) -> None:
        if now.serial == 2:
            inside.set()
            assert go_on.wait(20)
        heard.append(now.serial)

    members.subscribe(hear)
    threads = [threading.Thread(target=members.offer_chain, args=(chain,)) for chain in (SECOND, THIRD)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    go_on.set()
    for thread in threads:
        thread.join()
    assert heard == [2, 3]


def test_a_forged_manifest_is_no_alarm() -> None:
    """Who has no operator's key can neither change the manifest nor raise the alarm."""
    members = membership_of(SECOND)
    foreign = issue_cluster_manifest(
        name="prod", members=[member("mallory", "operator"), *NODES], rules=[], operators=[MALLORY], groups=16
    )
    forged = issue(SECOND, NODES, keys=[MALLORY])
    for chain in (foreign, forged, issue(FIRST, NODES, keys=[MALLORY]), THIRD[:-1], THIRD + b"\0", b"", b"\x91\x90"):
        with pytest.raises((ManifestError, Exception)) as caught:
            members.offer_chain(chain)
        assert type(caught.value).__name__ in ("ManifestError", "ProtocolError")
    assert (members.cluster.serial, members.problem) == (2, "")


def test_it_is_durable_before_it_is_in_force(tmp_path: Path) -> None:
    """What can't be written is not taken; what is in force stands in the file."""
    file = tmp_path / "cluster.manifest"
    file.write_bytes(FIRST)
    members = open_membership(file, PIN.hex())
    seen: list[bytes] = []
    members.guard(lambda cluster: seen.append(file.read_bytes()))
    assert members.offer_chain(SECOND)
    assert seen == [FIRST]
    assert file.read_bytes() == SECOND
    members.guard(_refuse)
    with pytest.raises(ConfigError, match="not this one"):
        members.offer_chain(THIRD)
    assert (members.cluster.serial, file.read_bytes()) == (2, SECOND)


def _refuse(cluster: Cluster) -> None:
    raise ConfigError("not this one")


def test_the_file_is_followed(tmp_path: Path) -> None:
    """A newer one is taken; an older one, a foreign one and rubbish are told of and left alone."""
    file = tmp_path / "cluster.manifest"
    file.write_bytes(FIRST)
    members = open_membership(file, PIN.hex())
    assert not members.look()
    file.write_bytes(SECOND)
    assert members.look()
    assert not members.look()
    for content, reason in ((FIRST, "older than serial 2"), (OTHER_SECOND, "two manifests"), (b"rubbish", "manifest")):
        file.write_bytes(content)
        assert not members.look()
        assert reason in members.problem
        assert members.cluster.serial == 2
    file.unlink()
    assert not members.look()
    file.write_bytes(THIRD)
    assert members.look()
    assert (members.cluster.serial, members.problem) == (3, "")


def offer_all(desk: Desk, name: str, after: int, later: bytes, size: int) -> int:
    serial = 0
    for offset in range(0, len(later), size):
        piece = later[offset : offset + size]
        serial = desk.offer(name, ManifestOffer(after, len(later), offset, piece)).serial
    return serial


@given(st.integers(1, 700), st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_pieces_of_any_size_make_the_whole(size: int, after: int) -> None:
    """An offer in pieces, of what the receiver lacks or has in part, is taken; what is fetched is the same."""
    members = membership_of(SECOND)
    assert offer_all(Desk(members), "node1", after, chain_after(THIRD, after), size) == 3
    assert members.cluster.serial == 3
    piece = Desk(members).fetch(ManifestFetch(1, 0))
    assert (piece.serial, piece.total, piece.data) == (3, len(chain_after(THIRD, 1)), chain_after(THIRD, 1))
    assert Desk(members).fetch(ManifestFetch(1, piece.total)).data == b""
    assert Desk(members).fetch(ManifestFetch(3, 0)).total == 0


def test_a_long_chain_takes_several_pieces() -> None:
    """More than one message's worth is fetched piece by piece."""
    chain = issue(FIRST, NODES, rules=4_000)
    members = membership_of(chain)
    desk, data = Desk(members), b""
    while True:
        piece = desk.fetch(ManifestFetch(1, len(data)))
        assert len(piece.data) <= MAX_MANIFEST_PIECE
        if not piece.data:
            break
        data += piece.data
    assert data == chain_after(chain, 1)
    assert len(data) > MAX_MANIFEST_PIECE


def test_offers_are_bounded() -> None:
    """Pieces that do not fit, too much, too many at once and manifests too far ahead are refused without a trace."""
    now = [0.0]
    members = membership_of(FIRST)
    desk = Desk(members, lambda: now[0])
    later = chain_after(SECOND, 1)
    with pytest.raises(ManifestError, match="limit is 8388608"):
        desk.offer("a", ManifestOffer(1, 2**40, 0, b"x"))
    with pytest.raises(ManifestError, match="from 2 on are needed"):
        desk.offer("a", ManifestOffer(2, 10, 0, b"x"))
    with pytest.raises(ManifestError, match="not begun"):
        desk.offer("a", ManifestOffer(1, len(later), 5, later[5:]))
    desk.offer("a", ManifestOffer(1, len(later), 0, later[:5]))
    with pytest.raises(ManifestError, match="does not fit"):
        desk.offer("a", ManifestOffer(1, len(later), 6, later[6:]))
    for number in range(MAX_PENDING):
        desk.offer(f"m{number}", ManifestOffer(1, len(later), 0, later[:5]))
    with pytest.raises(Overloaded, match="already"):
        desk.offer("b", ManifestOffer(1, len(later), 0, later[:5]))
    now[0] = PENDING_S + 1
    desk.offer("b", ManifestOffer(1, len(later), 0, later[:5]))
    with pytest.raises(ManifestError, match="not begun, or took too long"):
        desk.offer("m0", ManifestOffer(1, len(later), 5, later[5:]))
    assert members.cluster.serial == 1
    assert desk.offer("b", ManifestOffer(1, len(later), 5, later[5:])).serial == 2


def test_a_process_with_a_fixed_manifest_takes_none() -> None:
    """Where the manifest can't change, an offer is refused by name."""
    cluster = open_chain(FIRST, PIN)
    with pytest.raises(ManifestError, match="can't change"):
        Desk(cluster).offer("a", ManifestOffer(1, 1, 0, b"x"))
    assert Desk(cluster).fetch(ManifestFetch(0, 0)).total == 0
