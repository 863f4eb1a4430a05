"""Gathering as transcripts, and against a naive oracle: never complete below t, nobody asked twice, liars named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import QuorumUnavailable, ShareCorrupt
from engine.protocol.manifest import Holder, KeyManifest
from engine.sharing import (
    SecretBuffer,
    SecretShare,
    Share,
    check_value,
    commitment,
    generate_shares,
    new_salt,
    reconstruct_key,
)
from nodes.gather import HEDGE_S, Gathering

NAMES = tuple(f"h{i}" for i in range(1, 9))
SECRET = bytes(range(40))
CONTEXT = bytes(16) + (1).to_bytes(4, "big") + (1).to_bytes(4, "big")
SHARES = {
    (t, n): [(share, new_salt()) for share in generate_shares(SECRET, threshold=t, shares=n)]
    for n in range(1, 7)
    for t in range(1, n + 1)
}


def manifest(threshold: int, shares: int) -> KeyManifest:
    holders = [
        Holder(name, share.x, commitment(salt, CONTEXT, share))
        for name, (share, salt) in zip(NAMES, SHARES[threshold, shares], strict=False)
    ]
    return KeyManifest(bytes(16), "k", 1, 1, 1, "aes-256-gcm", threshold, holders, b"", bytes(32), b"", b"")


def good(threshold: int, shares: int, name: str) -> tuple[Share, bytes]:
    return SHARES[threshold, shares][NAMES.index(name)]


def bad(threshold: int, shares: int, name: str, how: str = "y") -> tuple[Share, bytes]:
    share, salt = good(threshold, shares, name)
    if how == "y":
        return Share(share.x, bytes([share.y[0] ^ 1]) + share.y[1:]), salt
    if how == "salt":
        return share, bytes(32)
    if how == "x":
        return Share(share.x % 255 + 1, share.y), salt
    if how == "longer":
        return Share(share.x, share.y + b"\0"), salt
    return good(threshold, shares, NAMES[(NAMES.index(name) + 1) % shares])  # another holder's, good for that one


HOW = ("y", "salt", "x", "longer", "another's")


def start(threshold: int, shares: int, own: str = "") -> Gathering:
    told = None
    if own:
        told = (own, *good(threshold, shares, own))
    return Gathering(manifest(threshold, shares), [name for name in NAMES[:shares] if name != own], told)


# --- transcripts ---


def test_a_holder_asks_one_fewer_than_t_and_a_stranger_t() -> None:
    assert start(3, 5, own="h1").to_ask(0.0) == ["h2", "h3"]
    assert start(3, 5).to_ask(0.0) == ["h1", "h2", "h3"]


def test_with_threshold_one_a_holder_asks_nobody() -> None:
    gathering = start(1, 3, own="h2")
    assert gathering.complete
    assert gathering.to_ask(0.0) == []
    assert gathering.shares == [good(1, 3, "h2")[0]]


def test_nobody_else_is_asked_while_the_answers_may_come() -> None:
    gathering = start(2, 4)
    assert gathering.to_ask(0.0) == ["h1", "h2"]
    assert gathering.to_ask(HEDGE_S / 2) == []


def test_a_late_holder_gets_company_by_the_next_one() -> None:
    gathering = start(2, 5)
    assert gathering.to_ask(0.0) == ["h1", "h2"]
    gathering.arrived("h1", *good(2, 5, "h1"))
    assert gathering.to_ask(HEDGE_S) == ["h3"]
    assert gathering.to_ask(HEDGE_S) == []
    assert gathering.to_ask(2 * HEDGE_S) == ["h4"]
    assert not gathering.complete
    gathering.arrived("h2", *good(2, 5, "h2"))  # the late one comes first after all
    assert gathering.complete
    assert gathering.to_ask(3 * HEDGE_S) == []
    gathering.arrived("h4", *good(2, 5, "h4"))
    assert [share.x for share in gathering.shares] == [1, 2]


def test_each_of_several_late_holders_gets_company() -> None:
    gathering = start(3, 6)
    assert gathering.to_ask(0.0) == ["h1", "h2", "h3"]
    assert gathering.to_ask(HEDGE_S) == ["h4", "h5", "h6"]
    assert gathering.to_ask(5 * HEDGE_S) == []
    assert not gathering.hopeless


def test_a_refusal_is_replaced_at_once() -> None:
    gathering = start(2, 4)
    gathering.to_ask(0.0)
    gathering.failed("h1", "stale key")
    assert gathering.to_ask(0.0) == ["h3"]
    assert gathering.problems == {"h1": "stale key"}


@pytest.mark.parametrize("how", HOW)
def test_a_wrong_share_is_named_and_replaced(how: str) -> None:
    gathering = start(2, 3)
    gathering.to_ask(0.0)
    gathering.arrived("h1", *bad(2, 3, "h1", how))
    assert gathering.corrupt == ("h1",)
    assert gathering.to_ask(0.0) == ["h3"]
    gathering.arrived("h2", *good(2, 3, "h2"))
    gathering.arrived("h3", *good(2, 3, "h3"))
    assert gathering.complete
    assert reconstruct_key(gathering.shares) == SECRET


def test_a_wrong_share_of_its_own_is_named_and_replaced() -> None:
    gathering = Gathering(manifest(2, 3), ["h2", "h3"], ("h1", *bad(2, 3, "h1")))
    assert gathering.corrupt == ("h1",)
    assert gathering.to_ask(0.0) == ["h2", "h3"]


def test_liars_alone_are_share_corrupt_and_name_them() -> None:
    gathering = start(2, 2)
    gathering.to_ask(0.0)
    gathering.arrived("h1", *bad(2, 2, "h1"))
    assert gathering.hopeless
    gathering.arrived("h2", *good(2, 2, "h2"))
    error = gathering.error()
    assert isinstance(error, ShareCorrupt)
    assert error.holders == ("h1",)
    assert "1 of the 2 shares needed" in str(error)


def test_silence_is_quorum_unavailable_and_names_who_is_missing() -> None:
    gathering = start(3, 3, own="h1")
    gathering.to_ask(0.0)
    gathering.failed("h2", "can't be reached")
    assert gathering.hopeless
    gathering.give_up()
    error = gathering.error()
    assert isinstance(error, QuorumUnavailable)
    assert error.missing == ("h2", "h3")
    assert "h2: can't be reached; h3: no answer in time" in str(error)
    assert not gathering.complete


def test_a_liar_among_silent_ones_is_quorum_unavailable() -> None:
    gathering = start(2, 2)
    gathering.to_ask(0.0)
    gathering.arrived("h1", *bad(2, 2, "h1"))
    gathering.failed("h2", "down")
    assert isinstance(gathering.error(), QuorumUnavailable)
    assert gathering.corrupt == ("h1",)


def test_a_stranger_in_the_list_is_never_asked() -> None:
    gathering = Gathering(manifest(1, 2), ["stranger", "h2"])
    assert gathering.to_ask(0.0) == ["h2"]


def test_a_strangers_share_does_not_count() -> None:
    gathering = start(1, 2)
    gathering.arrived("stranger", *good(1, 2, "h1"))
    assert not gathering.complete
    assert gathering.corrupt == ("stranger",)


def test_a_holder_listed_twice_or_by_itself_is_asked_once() -> None:
    gathering = Gathering(manifest(3, 4), ["h2", "h2", "h1", "h3", "h4", "h3"], ("h1", *good(3, 4, "h1")))
    assert gathering.to_ask(0.0) == ["h2", "h3"]
    assert gathering.to_ask(HEDGE_S) == ["h4"]
    assert gathering.to_ask(9 * HEDGE_S) == []


def test_the_next_wake_is_when_the_next_holder_becomes_late() -> None:
    gathering = start(2, 4)
    assert gathering.wake_s(0.0) == HEDGE_S
    gathering.to_ask(0.0)
    assert gathering.wake_s(HEDGE_S / 4) == pytest.approx(HEDGE_S * 3 / 4)
    gathering.failed("h1", "down")
    gathering.to_ask(HEDGE_S / 2)
    # h2 is late now; h3 becomes it half a hedge later.
    assert gathering.wake_s(HEDGE_S) == pytest.approx(HEDGE_S / 2)


# --- shares that match their commitments and give another key ---


def committed(
    threshold: int, shares: int, liars: Sequence[str] = (), epoch: int = 1
) -> tuple[KeyManifest, dict[str, tuple[SecretShare, bytes]]]:
    """A manifest with a true check value, in which liars (as a refresh would let them) committed to a wrong share."""
    context = bytes(16) + (1).to_bytes(4, "big") + epoch.to_bytes(4, "big")
    given, holders = {}, []
    for name, dealt in zip(NAMES, generate_shares(SECRET, threshold=threshold, shares=shares), strict=False):
        value = os.urandom(len(SECRET)) if name in liars else dealt.y
        share, salt = SecretShare(dealt.x, SecretBuffer.copy_of(value)), new_salt()
        given[name] = (share, salt)
        holders.append(Holder(name, share.x, commitment(salt, context, share)))
    check = check_value(SECRET, context[:-4])
    return KeyManifest(bytes(16), "k", 1, epoch, 1, "aes-256-gcm", threshold, holders, b"", check, b"", b""), given


def run(gathering: Gathering, given: dict[str, tuple[SecretShare, bytes]], down: Sequence[str] = ()) -> bytes | None:
    """Answer everything at once; the secret, or None if it is hopeless."""
    while not gathering.hopeless:
        if gathering.complete:
            if (secret := gathering.solve()) is not None:
                with secret:
                    return bytes(secret)
            continue
        for name in gathering.to_ask(0.0):
            if name in down:
                gathering.failed(name, "down")
            else:
                gathering.arrived(name, *given[name])
    return None


@pytest.mark.parametrize("liars", [("h1",), ("h3",), ("h1", "h2"), ("h2", "h5")])
def test_those_who_committed_to_a_wrong_share_are_named_and_the_key_is_served(liars: tuple[str, ...]) -> None:
    told, given = committed(3, 5, liars)
    gathering = Gathering(told, NAMES[:5])
    assert run(gathering, given) == SECRET
    assert set(gathering.corrupt) <= set(liars)
    assert set(gathering.corrupt) >= set(liars) & {"h1", "h2", "h3"}  # those that were asked at first
    gathering.close()
    assert all(given[name][0].y.closed for name in gathering.corrupt)


def test_a_liars_own_share_is_found_too() -> None:
    told, given = committed(2, 3, ("h2",))
    gathering = Gathering(told, ["h1", "h3"], ("h2", *given["h2"]))
    assert run(gathering, given) == SECRET
    assert gathering.corrupt == ("h2",)


def test_in_doubt_everybody_left_is_asked_at_once() -> None:
    told, given = committed(2, 6, ("h1",))
    gathering = Gathering(told, NAMES[:6])
    for name in gathering.to_ask(0.0):
        gathering.arrived(name, *given[name])
    assert gathering.complete
    assert gathering.solve() is None
    assert not gathering.complete
    assert gathering.to_ask(0.0) == ["h3", "h4", "h5", "h6"]
    gathering.arrived("h5", *given["h5"])
    secret = gathering.solve()
    assert secret is not None
    assert bytes(secret) == SECRET
    assert gathering.corrupt == ("h1",)


def test_too_many_liars_are_share_corrupt() -> None:
    told, given = committed(3, 5, ("h1", "h2", "h4"))
    gathering = Gathering(told, NAMES[:5])
    assert run(gathering, given) is None
    error = gathering.error()
    assert isinstance(error, ShareCorrupt)
    assert set(error.holders) == set(NAMES[:5])
    assert "another key than the manifest's check value" in str(error)


def test_a_share_of_another_epoch_is_refused_by_its_commitment() -> None:
    _, old = committed(2, 4, epoch=1)
    told, new = committed(2, 4, epoch=2)
    gathering = Gathering(told, NAMES[:4])
    assert gathering.to_ask(0.0) == ["h1", "h2"]
    gathering.arrived("h1", *old["h1"])
    gathering.arrived("h2", *new["h2"])
    assert gathering.corrupt == ("h1",)
    assert old["h1"][0].y.closed
    assert not gathering.complete
    assert run(gathering, {**old, "h3": new["h3"]}) == SECRET


@given(st.integers(1, 6), st.data())
@settings(deadline=None, max_examples=60)
def test_any_t_right_holders_are_enough(shares: int, data: Any) -> None:
    threshold = data.draw(st.integers(1, shares))
    names = NAMES[:shares]
    liars = data.draw(st.lists(st.sampled_from(names), unique=True))
    down = data.draw(st.lists(st.sampled_from(names), unique=True))
    told, given = committed(threshold, shares, liars)
    right = [name for name in names if name not in liars and name not in down]
    gathering = Gathering(told, data.draw(st.permutations(names)))
    found = run(gathering, given, down)
    assert (found == SECRET) == (len(right) >= threshold)
    assert found in (SECRET, None)
    if found is not None:
        assert set(gathering.corrupt) <= set(liars)
    gathering.close()


def test_a_late_holder_is_told_with_its_own_patience() -> None:
    gathering = Gathering(manifest(2, 4), NAMES[:4], None, {"h1": 0.005, "h2": 0.2})
    assert gathering.to_ask(0.0) == ["h1", "h2"]
    assert gathering.wake_s(0.0) == pytest.approx(0.005)
    assert gathering.to_ask(0.005) == ["h3"]
    assert gathering.late(0.005) == {"h1": 0.005}
    assert gathering.to_ask(0.01) == []
    assert gathering.to_ask(0.2) == ["h4"]
    assert set(gathering.late(0.2)) == {"h1", "h2", "h3"}


# --- against an oracle ---

events = st.lists(
    st.tuples(st.sampled_from(["good", "fail", "tick", *HOW]), st.integers(0, 7), st.floats(0, 2 * HEDGE_S)),
    max_size=40,
)


@given(st.integers(1, 6), st.data(), events)
@settings(deadline=None, max_examples=300)
def test_whatever_happens_the_invariants_hold(shares: int, data: Any, happened: list[tuple[str, int, float]]) -> None:
    threshold = data.draw(st.integers(1, shares))
    own = data.draw(st.sampled_from(["", *NAMES[:shares]]))
    gathering = start(threshold, shares, own)
    asked: Counter[str] = Counter()
    under_way: dict[str, float] = {}
    # The oracle: which holders gave a good share, which a wrong one, and which none, in plain sets.
    right, wrong, silent = ({own} if own else set()), set(), set()
    now = 0.0
    for kind, number, step in happened:
        chosen = gathering.to_ask(now)
        for name in chosen:
            asked[name] += 1
            under_way[name] = now
        on_time = [name for name, since in under_way.items() if now - since < HEDGE_S]
        # No more are asked than are lacking, and as many as are, while there are any.
        assert not chosen or len(on_time) <= threshold - len(right)
        left = shares - len(asked) - bool(own)
        assert len(on_time) >= min(threshold - len(right), left)
        if kind == "tick" or not under_way:
            now += step
            continue
        name = sorted(under_way)[number % len(under_way)]
        del under_way[name]
        if kind == "good":
            gathering.arrived(name, *good(threshold, shares, name))
            right.add(name)
        elif kind == "fail" or (kind == "another's" and shares == 1):
            gathering.failed(name, "down")
            silent.add(name)
        else:
            gathering.arrived(name, *bad(threshold, shares, name, kind))
            wrong.add(name)
        assert gathering.complete == (len(right) >= threshold)
        possible = shares - len(wrong) - len(silent)
        assert gathering.hopeless == (possible < threshold and not gathering.complete)
        assert set(gathering.corrupt) == wrong
        assert set(gathering.problems) == wrong | silent
        assert len(gathering.shares) == min(len(right), threshold)
        assert {share.x for share in gathering.shares} <= {good(threshold, shares, each)[0].x for each in right}
        if gathering.complete:
            assert reconstruct_key(gathering.shares, threshold=threshold) == SECRET
    assert all(count == 1 for count in asked.values())
    assert own not in asked


@given(st.integers(1, 6), st.data())
@settings(deadline=None)
def test_as_long_as_t_holders_are_good_the_key_comes(shares: int, data: Any) -> None:
    threshold = data.draw(st.integers(1, shares))
    helpful = data.draw(st.lists(st.sampled_from(NAMES[:shares]), min_size=threshold, max_size=shares, unique=True))
    gathering, now = start(threshold, shares), 0.0
    for _ in range(10 * shares):
        if gathering.complete:
            break
        for name in gathering.to_ask(now):
            how = data.draw(st.sampled_from(["silent", "fail", *HOW]))
            if name in helpful:
                gathering.arrived(name, *good(threshold, shares, name))
            elif how == "fail" or (how == "another's" and shares == 1):
                gathering.failed(name, "down")
            elif how != "silent":
                gathering.arrived(name, *bad(threshold, shares, name, how))
        assert not gathering.hopeless
        now += HEDGE_S
    assert gathering.complete
    assert reconstruct_key(gathering.shares) == SECRET
