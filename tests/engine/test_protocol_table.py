"""Routing tables: whole ones and differences, sealed, opened, refused, and made to fit."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import CLUSTER, NOW, signing, table

from engine.errors import ManifestError, ProtocolError
from engine.protocol.manifest import CLOCK_SKEW_MS
from engine.protocol.routing import Router
from engine.protocol.signed import SigningKey, sign_envelope
from engine.protocol.table import (
    SERVICE_STEP,
    RoutingTable,
    TableBaseMissing,
    TableReader,
    fit_table,
    open_table,
    pack_service,
    seal_delta,
    seal_table,
    table_codec,
    table_delta,
)


def test_a_sealed_table_opens_as_it_was() -> None:
    assert open_table(seal_table(table(), signing("bal")), CLUSTER, NOW) == table()


@pytest.mark.parametrize("signer", ["alice", "n1", "op", "stranger"])
def test_a_table_of_no_balancer_is_refused(signer: str) -> None:
    with pytest.raises(ManifestError, match=f"'{signer}' may not sign this"):
        open_table(seal_table(table(), signing(signer)), CLUSTER, NOW)


def test_a_forged_or_changed_table_is_refused() -> None:
    forged = seal_table(table(), SigningKey("bal", signing("alice")._private))
    with pytest.raises(ManifestError, match="is wrong"):
        open_table(forged, CLUSTER, NOW)
    raw = seal_table(table(), signing("bal"))
    for position in range(len(raw)):
        wrong = bytearray(raw)
        wrong[position] ^= 1 << position % 8
        with pytest.raises((ManifestError, ProtocolError)):
            open_table(bytes(wrong), CLUSTER, NOW)
    with pytest.raises(ManifestError, match="came where a 'table' was expected"):
        open_table(sign_envelope("grant", 1, table_codec.encode(table()), signing("bal")), CLUSTER, NOW)


def test_an_expired_table_is_refused() -> None:
    raw = seal_table(table(), signing("bal"))
    open_table(raw, CLUSTER, NOW + 5_000 + CLOCK_SKEW_MS)
    with pytest.raises(ManifestError, match="expired"):
        open_table(raw, CLUSTER, NOW + 5_000 + CLOCK_SKEW_MS + 1)


@pytest.mark.parametrize(
    ("newest", "offered", "good"),
    [
        ((1, 5), (1, 6), True),
        ((1, 5), (2, 1), True),
        ((1, 5), (1, 5), False),
        ((1, 5), (1, 4), False),
        ((2, 1), (1, 900), False),
    ],
)
def test_only_a_newer_table_counts(newest: tuple[int, int], offered: tuple[int, int], good: bool) -> None:
    raw = seal_table(table(offered[1], offered[0]), signing("bal"))
    held = table(newest[1], newest[0])
    router = Router(CLUSTER)
    assert router.install(held)
    assert router.install(table(offered[1], offered[0])) is good
    assert router.table is not None
    assert router.table.order == max(newest, offered)
    if good:
        assert open_table(raw, CLUSTER, NOW, held).order == offered
        return
    with pytest.raises(ManifestError, match="is in force"):
        open_table(raw, CLUSTER, NOW, held)


@pytest.mark.parametrize(
    "changes",
    [
        {"service": b""},
        {"service": bytes(3)},
        {"service": bytes(8)},
        {"price": [0, 0, 0]},
        {"price": []},
        {"caps": []},
        {"lanes": [4]},
        {"caps": [1000, 1000]},
        {"classes": []},
        {"nodes": ["n1"]},
        {"forecast": []},
        {"forecast": [(0, 0), (0, 0)]},
        {"groups": [(1, [4])]},
        {"groups": [(1, [0]), (2, [0, 9])]},
        {"hints": [(1, [4])]},
    ],
)
def test_a_table_whose_parts_do_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="match"):
        open_table(seal_table(msgspec.structs.replace(table(), **changes), signing("bal")), CLUSTER, NOW)


def test_random_numbers_out_of_range_are_refused() -> None:
    for changes in ({"counter": -1}, {"price": [-1, 0, 0, 0]}, {"nodes": ["n 1", "n2", "n3", "n4"]}):
        payload = msgspec.msgpack.encode(msgspec.structs.replace(table(), **changes))
        with pytest.raises(ProtocolError):
            open_table(sign_envelope("table", 1, payload, signing("bal")), CLUSTER, NOW)


@given(st.lists(st.floats(1.0, 2.5e7), min_size=1, max_size=30))
def test_service_times_are_told_to_half_a_step(times: list[float]) -> None:
    made = table(nodes=[f"n{i}" for i in range(len(times))], service=times, price=[0] * len(times))
    for column, us in enumerate(times):
        assert us / SERVICE_STEP**0.51 <= made.service_us(0, column) <= us * SERVICE_STEP**0.51


def test_an_unknown_service_time_is_0_and_extremes_stay_in_their_byte() -> None:
    made = table(service=(0, -3, float("nan"), 1e-9))
    assert [made.service_us(0, column) for column in range(4)] == [0, 0, 0, 1]
    assert 2e7 < table(service=(1e30, float("inf"), 1, 1)[:1] * 4).service_us(0, 3) < 4e7


# --- differences ---


CLASSES = ["sign/ed25519", "mac/hmac-sha256"]


@st.composite
def tables(draw: st.DrawFn, counter: int) -> RoutingTable:
    """A table of two classes with anything in it."""
    nodes = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)
    lines = st.dictionaries(st.integers(0, 9), nodes, max_size=5).map(lambda each: list(each.items()))
    return table(
        counter,
        classes=CLASSES,
        service=pack_service([draw(st.lists(st.floats(0, 1e6), min_size=4, max_size=4)) for _ in CLASSES]),
        price=draw(st.lists(st.integers(0, 10**9), min_size=4, max_size=4)),
        caps=[1000, 250],
        groups=draw(lines),
        hints=draw(lines),
        forecast=[(counter, 9), (7, 8)],
    )


@given(tables(1), tables(2))
def test_a_difference_gives_the_table_back(base: RoutingTable, later: RoutingTable) -> None:
    reader, key = TableReader(), signing("bal")
    assert reader.read(seal_table(base, key), CLUSTER, NOW) == base
    delta = table_delta(base, later)
    assert delta is not None
    told = reader.read(seal_delta(delta, key), CLUSTER, NOW, base)
    assert dict(told.groups) == dict(later.groups)
    assert msgspec.structs.replace(told, groups=[], service=b"") == msgspec.structs.replace(
        later, groups=[], service=b""
    )
    for old, new, is_told in zip(base.service, later.service, told.service, strict=True):
        assert is_told == (old if abs(old - new) <= 1 and old and new else new)


def test_differences_go_by_the_whole_table_not_by_each_other() -> None:
    reader, key = TableReader(), signing("bal")
    base = table(1)
    reader.read(seal_table(base, key), CLUSTER, NOW)
    second = table_delta(base, table(2, groups=[(5, [1])]))
    third = table_delta(base, table(3, price=(1, 2, 3, 4)))
    assert second is not None
    assert third is not None
    lost = TableReader()
    lost.read(seal_table(base, key), CLUSTER, NOW)
    both = reader.read(seal_delta(second, key), CLUSTER, NOW, base)
    assert both.groups == [(5, [1])]
    assert reader.read(seal_delta(third, key), CLUSTER, NOW, both) == lost.read(seal_delta(third, key), CLUSTER, NOW)


def test_a_missing_base_is_asked_for_and_then_used() -> None:
    key, base = signing("bal"), table(4)
    delta = table_delta(base, table(6, price=(5, 0, 0, 0)))
    assert delta is not None
    raw = seal_delta(delta, key)
    reader = TableReader()
    with pytest.raises(TableBaseMissing, match="its base 4 is not here"):
        reader.read(raw, CLUSTER, NOW)
    other = table(5)
    reader.read(seal_table(other, key), CLUSTER, NOW)
    with pytest.raises(TableBaseMissing):
        reader.read(raw, CLUSTER, NOW, other)
    with pytest.raises(ManifestError, match="is in force"):
        reader.read(seal_table(base, key), CLUSTER, NOW, other)
    assert reader._base == other
    fresh = TableReader()
    # Here a table is in force that came as a difference, and the base is fetched after it.
    with pytest.raises(ManifestError, match="is in force"):
        fresh.read(seal_table(base, key), CLUSTER, NOW, other)
    assert fresh.read(raw, CLUSTER, NOW, other).price == [5, 0, 0, 0]
    another_epoch = msgspec.structs.replace(delta, fencing_epoch=2)
    with pytest.raises(TableBaseMissing):
        fresh.read(seal_delta(another_epoch, key), CLUSTER, NOW, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"service": [(1, 0, 9)]}, "does not match its base"),
        ({"service": [(0, 4, 9)]}, "does not match its base"),
        ({"price": [1]}, "do not match"),
        ({"groups": [(1, [4])]}, "do not match"),
        ({"hints": [(1, [9])]}, "do not match"),
        ({"forecast": []}, "do not match"),
        ({"expires_ms": NOW - 60_000}, "expired"),
        ({"expires_ms": NOW + 10**10}, "the limit is"),
        ({"counter": 3}, "is in force"),
    ],
)
def test_a_difference_that_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    reader, key, base = TableReader(), signing("bal"), table(3)
    reader.read(seal_table(base, key), CLUSTER, NOW)
    delta = table_delta(base, table(4))
    assert delta is not None
    assert reader.read(seal_delta(delta, key), CLUSTER, NOW, base).order == (1, 4)
    with pytest.raises(ManifestError, match=reason):
        reader.read(seal_delta(msgspec.structs.replace(delta, **changes), key), CLUSTER, NOW, base)


@pytest.mark.parametrize("signer", ["alice", "n1", "op", "stranger"])
def test_a_difference_of_no_balancer_is_refused(signer: str) -> None:
    reader, base = TableReader(), table(1)
    reader.read(seal_table(base, signing("bal")), CLUSTER, NOW)
    delta = table_delta(base, table(2))
    assert delta is not None
    with pytest.raises(ManifestError, match=f"'{signer}' may not sign this"):
        reader.read(seal_delta(delta, signing(signer)), CLUSTER, NOW, base)
    raw = seal_delta(delta, signing("bal"))
    for position in range(len(raw)):
        wrong = bytearray(raw)
        wrong[position] ^= 1 << position % 8
        with pytest.raises((ManifestError, ProtocolError)):
            reader.read(bytes(wrong), CLUSTER, NOW, base)


@pytest.mark.parametrize(
    "changes",
    [
        {"lanes": [1, 2, 1, 1]},
        {"nodes": ["n1", "n2", "n3", "n9"]},
        {"classes": ["mac/x"]},
        {"caps": [500]},
        {"fencing_epoch": 2},
    ],
)
def test_other_rows_or_columns_need_a_whole_table(changes: dict[str, Any]) -> None:
    assert table_delta(table(1), msgspec.structs.replace(table(2), **changes)) is None


# --- size ---


def test_what_is_too_long_loses_what_it_can_do_without() -> None:
    nodes = [f"node-{index}" for index in range(300)]
    made = table(
        nodes=nodes,
        classes=CLASSES,
        service=bytes(600),
        price=[5] * 300,
        caps=[1000, 1000],
        groups=[(group, [1, 2, 3]) for group in range(200)],
        hints=[(group, [1]) for group in range(50)],
        forecast=[(5, 6), (7, 8)],
    )
    size = len(table_codec.encode(made))
    assert fit_table(made, size) == (made, "")
    without, told = fit_table(made, size - 1)
    assert (without.hints, without.groups) == ([], made.groups)
    assert told == "the routing table is too long without: 50 hints"
    fewer, told = fit_table(made, size - 600)
    assert 0 < len(fewer.groups) < 200
    assert fewer.groups == made.groups[: len(fewer.groups)]
    assert f"{200 - len(fewer.groups)} of 200 placement groups" in told
    least, told = fit_table(made, len(table_codec.encode(msgspec.structs.replace(made, groups=[], hints=[]))) - 1)
    assert least.classes == ["mac/hmac-sha256"]  # of which there is more
    assert len(least.service) == 300
    assert "1 of 2 classes" in told
    assert open_table(seal_table(least, signing("bal")), CLUSTER, NOW) == least
    for room, step in itertools.product(range(0, size, 997), (0, 1)):
        small, _ = fit_table(made, room + step)
        open_table(seal_table(small, signing("bal")), CLUSTER, NOW)
        assert len(table_codec.encode(small)) <= max(room + step, len(table_codec.encode(least)))
