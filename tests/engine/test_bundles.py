"""Many requests in one message: each is answered as if it had come alone, and no message grows too long."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.client.bundles import ROOM, answer_bundle, answer_bundle_at_once, check_bundle, open_results, split_bodies
from engine.errors import AccessDenied, EngineError, ManifestError, ProtocolError, QuorumUnavailable
from engine.protocol.requests import (
    BUNDLE_MAX,
    BUNDLED_REGISTRY_VERBS,
    BUNDLED_SHARE_VERBS,
    NODE_VERBS,
    REGISTRY_MANY,
    REGISTRY_VERBS,
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_MANY,
    Bundle,
    Dealt,
    Empty,
    ShareCommit,
    ShareDeal,
)
from engine.protocol.wire import MAX_MESSAGE


def commits(count: int) -> list[bytes]:
    codec = REQUEST_CODECS[SHARE_COMMIT]
    return [codec.encode(ShareCommit(number.to_bytes(16, "big"), b"")) for number in range(count)]


@given(st.lists(st.integers(0, 60 * 1024), max_size=80))
def test_all_bodies_are_sent_in_order_and_each_bundle_fits(lengths: list[int]) -> None:
    bodies = [bytes(length) for length in lengths]
    split = list(split_bodies(bodies))
    assert [body for some in split for body in some] == bodies
    for some in split:
        assert 1 <= len(some) <= BUNDLE_MAX
        assert len(some) == 1 or sum(map(len, some)) <= ROOM
        assert len(REQUEST_CODECS[SHARE_MANY].encode(Bundle("share.deal", list(some)))) < MAX_MESSAGE
    for some, following in itertools.pairwise(split):
        assert len(some) == BUNDLE_MAX or sum(map(len, some)) + len(following[0]) > ROOM


def test_what_fails_fails_alone() -> None:
    """Refusals, bad bodies and callers' mistakes stay where they belong, with their names; the rest is done."""
    seen = []

    def handle(message: ShareCommit) -> Empty:
        number = int.from_bytes(message.key_id, "big")
        seen.append(number)
        if number == 1:
            raise QuorumUnavailable("two are away", ["node1", "node2"])
        if number == 2:
            raise ValueError("too large")
        return Empty()

    bodies = [*commits(4), b"\x91"]
    made = answer_bundle(Bundle(SHARE_COMMIT, bodies), handle)
    wired = REPLY_CODECS[SHARE_MANY].decode(REPLY_CODECS[SHARE_MANY].encode(made))
    good, away, mistake, also, garbage = open_results(SHARE_COMMIT, wired)
    assert seen == [0, 1, 2, 3]
    assert (good, also) == (Empty(), Empty())
    assert isinstance(away, QuorumUnavailable)
    assert away.missing == ("node1", "node2")
    assert (type(mistake), str(mistake)) == (ManifestError, "too large")
    assert isinstance(garbage, ProtocolError)
    handled: list[ShareCommit] = []

    def at_once(messages: Sequence[ShareCommit]) -> list[object]:
        handled.extend(messages)
        return [Empty(), QuorumUnavailable("two are away", ["node1", "node2"]), ValueError("too large"), Empty()]

    told = answer_bundle_at_once(Bundle(SHARE_COMMIT, [b"\x91", *commits(4)]), at_once)
    assert [int.from_bytes(each.key_id, "big") for each in handled] == [0, 1, 2, 3]
    assert told.results == [made.results[4], *made.results[:4]]


def test_what_is_finished_together_takes_its_place() -> None:
    """Of those that went well, in their order; and room is left for what is made longer by it."""

    def handle(message: ShareDeal) -> Dealt:
        if message.order[0] % 2:
            raise QuorumUnavailable("away", ["node1"])
        return Dealt(b"body %d" % message.order[0], [b"x"])

    def finish(replies: Sequence[Dealt]) -> list[Dealt]:
        return [Dealt(b"signed " + each.statement, each.parts) for each in replies]

    told = answer_bundle(Bundle(SHARE_DEAL, deals(5)), handle, finish=finish)
    found = open_results(SHARE_DEAL, told)
    assert [each.statement for each in found[::2]] == [b"signed body 0", b"signed body 2", b"signed body 4"]
    assert all(isinstance(each, QuorumUnavailable) for each in found[1::2])


def deals(count: int) -> list[bytes]:
    codec = REQUEST_CODECS[SHARE_DEAL]
    return [codec.encode(ShareDeal(bytes([number]), 1, bytes(32), b"")) for number in range(count)]


def test_what_nobody_foresaw_ends_the_bundle() -> None:
    with pytest.raises(ZeroDivisionError):
        answer_bundle(Bundle(SHARE_COMMIT, commits(2)), lambda message: 1 // 0)


def test_replies_that_do_not_fit_are_left_for_the_next_bundle() -> None:
    """At least one is given each time, so that all are given in the end; also where the time is over."""
    deal = REQUEST_CODECS[SHARE_DEAL].encode(ShareDeal(b"", 1, bytes(32), b""))
    reply = Dealt(bytes(4_000), [bytes(8_000)] * 2)
    made = answer_bundle(Bundle(SHARE_DEAL, [deal] * 10), lambda message: reply)
    assert 1 < len(made.results) < 10
    assert len(REPLY_CODECS[SHARE_MANY].encode(made)) < MAX_MESSAGE
    assert open_results(SHARE_DEAL, made) == [reply] * len(made.results)
    assert len(answer_bundle(Bundle(SHARE_DEAL, [deal] * 10), lambda message: reply, lambda: True).results) == 1


def test_a_bundle_is_of_a_verb_that_may_be_bundled() -> None:
    """None is in a bundle that its role could not send alone, nor a bundle in a bundle."""
    assert BUNDLED_SHARE_VERBS < NODE_VERBS
    assert BUNDLED_REGISTRY_VERBS < REGISTRY_VERBS
    for verb in ("share.release", "share.prepare", "share.destroy", SHARE_MANY, REGISTRY_MANY, "encrypt", ""):
        with pytest.raises(ProtocolError, match="not taken in a bundle"):
            check_bundle(Bundle(verb, [b""]), BUNDLED_SHARE_VERBS)
    check_bundle(Bundle(SHARE_COMMIT, [b""]), BUNDLED_SHARE_VERBS)


def test_an_error_of_a_reply_is_an_error_of_the_engine() -> None:
    (found,) = open_results(SHARE_COMMIT, answer_bundle(Bundle(SHARE_COMMIT, commits(1)), lambda message: denied()))
    assert isinstance(found, AccessDenied)
    assert isinstance(found, EngineError)


def denied() -> None:
    raise AccessDenied("no")
