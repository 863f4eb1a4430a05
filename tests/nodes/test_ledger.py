"""The clock that never goes back, the buckets, and the ledger of used grants over a real store."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import AccessDenied, Overloaded, StoreUnavailable
from engine.protocol.grant import Grant
from engine.protocol.manifest import CLOCK_SKEW_MS
from engine.protocol.signed import Signed, read_unverified
from nodes import ledger as ledger_module
from nodes.clock import TrustedClock
from nodes.ledger import MARK_EVERY_MS, PRUNE_EVERY_MS, RETRY_WINDOW_MS, GrantLedger
from nodes.limits import GenerationLimit, TokenBucket
from nodes.store import ShareStore, StoreCorrupt
from nodes.token import Lane

NOW = 1_800_000_000_000


class Hands:
    """A wall clock and a steady clock that the test moves."""

    def __init__(self, mark_ms: int = 0) -> None:
        self.wall_ms, self.steady_ms = NOW, 1_000
        self.clock = self.made(mark_ms)

    def made(self, mark_ms: int) -> TrustedClock:
        return TrustedClock(mark_ms, wall_ms=lambda: self.wall_ms, steady_ms=lambda: self.steady_ms)

    def pass_ms(self, ms: int) -> None:
        self.wall_ms += ms
        self.steady_ms += ms


# --- the clock ---


def test_the_clock_is_the_machines_while_that_goes_on() -> None:
    hands = Hands()
    for step in (0, 1, 5_000, 86_400_000):
        hands.pass_ms(step)
        assert hands.clock.now_ms() == hands.wall_ms
        assert hands.clock.complaint() == ""


def test_a_clock_set_back_goes_on_by_the_steady_one_and_says_so() -> None:
    hands = Hands()
    assert hands.clock.now_ms() == NOW
    hands.wall_ms -= 3_600_000
    hands.pass_ms(2_000)
    assert hands.clock.now_ms() == NOW + 2_000
    told = hands.clock.complaint()
    assert "2027-01-15T07:00:02Z" in told
    assert "2027-01-15T08:00:02Z" in told
    hands.wall_ms = NOW + 2_000 - CLOCK_SKEW_MS
    assert hands.clock.complaint() == ""
    hands.wall_ms = NOW + 10_000
    assert hands.clock.now_ms() == NOW + 10_000


def test_a_mark_outlives_a_clock_that_was_set_back() -> None:
    hands = Hands(mark_ms=NOW + 60_000)
    assert hands.clock.now_ms() == NOW + 60_000
    hands.pass_ms(1_000)
    assert hands.clock.now_ms() == NOW + 61_000
    assert "2027-01-15T08:01:01Z" in hands.clock.complaint()
    hands.wall_ms = NOW + 70_000
    assert (hands.clock.now_ms(), hands.clock.complaint()) == (NOW + 70_000, "")


def test_the_real_clocks_are_told_from_each_other() -> None:
    clock = TrustedClock(10**15)
    first = clock.now_ms()
    assert 10**15 <= first <= clock.now_ms()
    assert "33658-" in clock.complaint() or "ms" in clock.complaint()


@given(st.lists(st.tuples(st.integers(-(10**9), 10**9), st.integers(0, 10**6), st.booleans()), max_size=40))
@settings(deadline=None)
def test_whatever_the_machines_clock_does_time_never_goes_back(steps: list[tuple[int, int, bool]]) -> None:
    """Also over restarts, as far as the mark was kept; and no steady time is ever lost while the process lives."""
    hands = Hands()
    seen = hands.clock.now_ms()
    for jump, passed, restart in steps:
        hands.wall_ms += jump + passed
        hands.steady_ms += passed
        if restart:
            hands.clock = hands.made(seen)
        else:
            assert hands.clock.now_ms() >= seen + passed
        now = hands.clock.now_ms()
        assert now >= max(seen, hands.wall_ms)
        seen = now


# --- the buckets ---


def test_making_keys_has_its_part_of_the_time_for_ever() -> None:
    """A quarter, with a second's worth at once; one long one is paid for before the next, and no pause is saved up."""
    limit = GenerationLimit(0.25, 0.0)
    for _ in range(2):
        limit.begin("ed25519", 0.0)
        limit.ended("ed25519", 0.5)
    with pytest.raises(Overloaded, match=r"limits.generate_part = 0.25"):
        limit.begin("ed25519", 0.0)
    limit.begin("ed25519", 0.1)
    limit.ended("ed25519", 2.0)
    with pytest.raises(Overloaded):
        limit.begin("ed25519", 7.9)
    made_s, now_s = 0.0, 100.0
    while now_s < 1_100.0:
        try:
            limit.begin("ed25519", now_s)
        except Overloaded:
            now_s += 0.01
        else:
            limit.ended("ed25519", 0.1)
            made_s, now_s = made_s + 0.1, now_s + 0.1
    assert made_s == pytest.approx(250.0, rel=0.01)


def test_keys_that_wait_to_be_made_count_as_what_their_like_took() -> None:
    """So of a flood a few are taken, and none waits behind what the limit does not let through."""
    limit = GenerationLimit(0.25, 0.0)
    limit.begin("rsa-4096-pss-sha256", 0.0)
    limit.ended("rsa-4096-pss-sha256", 0.4)
    for _ in range(2):
        limit.begin("rsa-4096-pss-sha256", 0.0)
    with pytest.raises(Overloaded):
        limit.begin("rsa-4096-pss-sha256", 0.0)
    for _ in range(2):  # given up before they were begun
        limit.ended("rsa-4096-pss-sha256", 0.0)
    limit.begin("rsa-4096-pss-sha256", 0.0)


@given(
    st.floats(0.5, 1000),
    st.floats(0.1, 20),
    st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_a_bucket_never_gives_more_than_its_rate_and_burst(per_s: float, burst_s: float, waits: list[float]) -> None:
    bucket, now, taken = TokenBucket(per_s, burst_s, 0.0), 0.0, 0
    for wait in waits:
        now += wait
        while bucket.holds_one(now) and taken < 100_000:
            bucket.take()
            taken += 1
        assert taken <= max(1.0, per_s * burst_s) + per_s * now + 1e-3
        assert bucket.holds_one(now - 1) is False, "an earlier time gives nothing"


# --- the ledger ---


class Book:
    """A ledger of node1 with a store, and a client's grants."""

    def __init__(self, path: Path, lane: Lane, world: Any) -> None:
        self.path, self.lane, self.world = path, lane, world
        self.hands = Hands()
        self.monotonic_s = 100.0
        self.dealt = world.deal()
        self.open()

    def open(self) -> None:
        self.store = ShareStore(self.path, "node1", self.lane)
        clock = self.hands.made(self.store.clock_mark().mark_ms)
        self.ledger = GrantLedger(self.store, clock, monotonic_s=lambda: self.monotonic_s)

    def restart(self) -> None:
        self.store.close()
        self.open()

    def grant(self, begins: int = 0) -> tuple[Grant, Signed]:
        begins = begins or self.hands.wall_ms
        raw = self.world.grant(self.dealt, "node2", not_before_ms=begins, expires_ms=begins + 10_000)
        signed = read_unverified(raw)
        last = signed.payload[-16:]
        return Grant(self.dealt.key_id, 1, 1, ["encrypt"], "node2", begins, begins + 10_000, last), signed


@pytest.fixture
def book(tmp_path: Path, lane: Lane, world: Any) -> Iterator[Book]:
    made = Book(tmp_path / "shares.db", lane, world)
    yield made
    made.store.close()


def test_a_release_is_durable_when_it_returns_and_a_spending_after_a_flush(book: Book) -> None:
    released, spent, lost = book.grant(), book.grant(), book.grant()
    book.ledger.release(*released)
    assert len(book.store.used_grants()) == 1
    book.ledger.spend(*spent)
    assert book.ledger.due()
    book.ledger.flush()
    assert not book.ledger.due()
    book.ledger.spend(*lost)
    book.restart()
    for each in (released, spent):
        with pytest.raises(AccessDenied, match="was used already"):
            book.ledger.release(*each)
    book.ledger.release(*lost)


def test_only_a_release_may_be_repeated_and_only_for_a_while(book: Book) -> None:
    released, spent = book.grant(), book.grant()
    book.ledger.release(*released)
    book.ledger.release(*released)
    book.ledger.spend(*spent)
    for _ in range(2):
        with pytest.raises(AccessDenied):
            book.ledger.spend(*spent)
    with pytest.raises(AccessDenied):
        book.ledger.release(*spent)
    book.monotonic_s += RETRY_WINDOW_MS / 1000
    with pytest.raises(AccessDenied):
        book.ledger.release(*released)


def test_what_expired_is_forgotten_and_not_earlier(book: Book) -> None:
    old = book.grant()
    book.ledger.release(*old)
    book.hands.pass_ms(10_000 + CLOCK_SKEW_MS)
    book.ledger.release(*book.grant())
    assert len(book.ledger) == len(book.store.used_grants()) == 2, "it is still good within the clocks' difference"
    with pytest.raises(AccessDenied):
        book.ledger.spend(*old)
    book.hands.pass_ms(PRUNE_EVERY_MS)
    book.ledger.flush()
    assert len(book.ledger) == len(book.store.used_grants()) == 1
    assert book.store.clock_mark().mark_ms > old[0].expires_ms + CLOCK_SKEW_MS, "its expiry refuses it from now on"


def test_the_mark_is_written_now_and_then_and_never_goes_back(book: Book) -> None:
    book.ledger.flush()
    assert book.store.clock_mark().mark_ms == NOW
    book.hands.pass_ms(MARK_EVERY_MS - 1)
    assert not book.ledger.due()
    book.hands.pass_ms(1)
    assert book.ledger.due()
    book.ledger.flush()
    marked = book.store.clock_mark().mark_ms
    assert marked == NOW + MARK_EVERY_MS
    book.hands.wall_ms -= 10_000_000
    book.restart()
    book.ledger.release(*book.grant(book.ledger.clock.now_ms()))
    assert book.store.clock_mark().mark_ms >= marked
    book.store.note_grants([], NOW - 5)
    assert book.store.clock_mark().mark_ms >= marked
    assert MARK_EVERY_MS < CLOCK_SKEW_MS


def test_a_reset_clock_takes_no_grant_from_before(book: Book) -> None:
    book.hands.wall_ms += 10**10
    book.ledger.flush()
    book.hands.wall_ms -= 10**10
    book.restart()
    assert book.ledger.clock.complaint()
    before = book.grant()
    book.store.reset_clock(book.hands.wall_ms, book.hands.wall_ms + CLOCK_SKEW_MS)
    book.restart()
    assert book.ledger.clock.complaint() == ""
    for use in (book.ledger.release, book.ledger.spend):
        with pytest.raises(AccessDenied, match="before this node's clock was reset"):
            use(*before)
    book.hands.pass_ms(CLOCK_SKEW_MS)
    book.ledger.release(*book.grant())


def test_a_full_memory_refuses_instead_of_forgetting(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_REMEMBERED", 3)
    used = [book.grant() for _ in range(3)]
    for each in used:
        book.ledger.spend(*each)
    with pytest.raises(Overloaded, match="3 grants"):
        book.ledger.spend(*book.grant())
    with pytest.raises(AccessDenied):
        book.ledger.spend(*used[0])


def test_one_client_does_not_fill_the_room_of_others(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_OF_CLIENT", 3)
    for _ in range(3):
        book.ledger.spend(*book.grant())
    for restart in (False, True):
        if restart:
            book.ledger.flush()
            book.restart()
        with pytest.raises(Overloaded, match="3 grants of 'alice'"):
            book.ledger.spend(*book.grant())
        other, signed = book.grant()
        book.ledger.spend(other, dataclasses.replace(signed, issuer="bob"))
    book.hands.pass_ms(10_001 + CLOCK_SKEW_MS)
    book.ledger.flush()
    book.ledger.spend(*book.grant())


def test_a_grant_that_is_forgotten_while_its_request_waits_is_not_taken_for_new(book: Book) -> None:
    """Between the check of its expiry and its use another thread may forget that it was used."""
    old = book.grant()
    book.ledger.release(*old)
    book.hands.pass_ms(10_001 + CLOCK_SKEW_MS)
    book.ledger.flush()
    assert len(book.ledger) == 0
    for use in (book.ledger.release, book.ledger.spend):
        with pytest.raises(AccessDenied, match="expired"):
            use(*old)


def test_a_write_that_fails_is_made_up_for_and_lets_nothing_through(book: Book) -> None:
    grant = book.grant()
    book.store._db.execute("PRAGMA max_page_count = 1")

    def fill() -> None:
        for _ in range(10_000):
            book.ledger.release(*book.grant())

    with pytest.raises(StoreUnavailable, match="can't be written"):
        fill()  # until nothing more fits
    written = len(book.store.used_grants())
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            book.ledger.release(*grant)
    assert len(book.store.used_grants()) == written
    book.store._db.execute("PRAGMA max_page_count = 1000000")
    book.ledger.release(*grant)
    assert len(book.store.used_grants()) == written + 2, "that of the first that did not fit too"


def test_of_many_at_once_with_one_grant_one_gets_it(book: Book) -> None:
    for _ in range(20):
        grant = book.grant()
        outcomes: list[str] = []
        begin = threading.Barrier(4)

        def race(grant: Any = grant, outcomes: list[str] = outcomes, begin: threading.Barrier = begin) -> None:
            begin.wait(10)
            try:
                book.ledger.spend(*grant)
                book.ledger.flush()
                outcomes.append("ok")
            except AccessDenied:
                outcomes.append("refused")

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(outcomes) == ["ok", "refused", "refused", "refused"]
    assert len(book.store.used_grants()) == 20


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE grants SET expires_ms = expires_ms - 100000",
        "UPDATE grants SET issuer = 'bob'",
        "UPDATE grants SET nonce = x'00'",
        "UPDATE grants SET digest = zeroblob(32)",
        "UPDATE clock SET mark_ms = mark_ms - 1",
        "UPDATE clock SET floor_ms = 1",
        "UPDATE clock SET mark_ms = 'x'",
        "UPDATE clock SET tag = zeroblob(32)",
        "UPDATE grants SET tag = (SELECT tag FROM clock)",
    ],
)
def test_a_changed_row_keeps_the_node_from_starting(book: Book, change: str) -> None:
    book.ledger.release(*book.grant())
    book.store.close()
    with sqlite3.connect(book.path) as db:
        db.execute(change)
    db.close()
    with pytest.raises(StoreCorrupt, match="not authentic"):
        book.open()
