"""The routing table, whole and as a difference to an earlier one, and who may sign it. No socket, no clock.

A whole table is the base of the differences that follow it until the next whole one. A reader without that base asks a
balancer for it by the verb ``table``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from engine.errors import ManifestError
from engine.protocol.manifest import CLOCK_SKEW_MS, Cluster
from engine.protocol.signed import SigningKey, read_unverified, sign_envelope, verify_envelope
from engine.protocol.wire import MAX_MESSAGE, Codec, Name, UInt

__all__ = [
    "RoutingTable",
    "TableBaseMissing",
    "TableDelta",
    "TableReader",
    "fit_table",
    "open_table",
    "pack_service",
    "seal_delta",
    "seal_table",
    "table_delta",
]

TABLE_LIFETIME_MAX_MS = 3_600_000
"""The longest time a routing table may be good for."""
TABLE_MAX = MAX_MESSAGE - 1024
"""A sealed table that is longer than this does not fit into a reply."""
SERVICE_STEP = 1.07
"""A service time is told as one byte: 0 is not known, c is this to the power of c - 1, in microseconds (to 29 s)."""
_SERVICE_US = (0.0, *(SERVICE_STEP**code for code in range(255)))
_LOG_STEP = math.log(SERVICE_STEP)

Nodes = list[UInt]
"""Indexes of nodes."""


class RoutingTable(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the balancer publishes, ordered by (fencing epoch, counter).

    ``service`` has one byte for each class and node, row by row (see ``service_us``). ``price`` is one node price a
    node, in 1/1000: how long the others wait for each second of its work. ``caps`` is the part of a node, in 1/1000,
    that each class may take there. ``groups`` lists only the placement groups whose holders differ from
    ``Cluster.group_holders``, and ``hints`` the nodes that are about to need a group's keys, both as (group, node
    indexes). ``forecast`` is one row a class: the mean and P90 of the next tick in 1/1000 requests per second.
    ``cluster_serial`` is that of the balancer's manifest. ``lanes`` is how many operations each node does at a time, or
    empty where that is one.
    """

    fencing_epoch: UInt
    counter: UInt
    issued_ms: UInt
    expires_ms: UInt
    nodes: Annotated[list[Name], Meta(max_length=4096)]
    classes: Annotated[list[Annotated[str, Meta(max_length=96)]], Meta(max_length=512)]
    service: Annotated[bytes, Meta(max_length=1024 * 1024)]
    price: list[UInt]
    caps: list[UInt]
    groups: list[tuple[UInt, Nodes]]
    hints: list[tuple[UInt, Nodes]]
    forecast: list[tuple[UInt, UInt]]
    cluster_serial: UInt = 0
    lanes: list[UInt] = []

    @property
    def order(self) -> tuple[int, int]:
        """What makes one table newer than another."""
        return self.fencing_epoch, self.counter

    def service_us(self, row: int, column: int) -> float:
        """The service time of a class at a node in microseconds; 0 where it is not known."""
        return _SERVICE_US[self.service[row * len(self.nodes) + column]]


class TableDelta(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A table as what differs from the whole table ``base`` (a counter of the same fencing epoch).

    ``service`` has (class, node, byte); a group of ``groups`` without nodes is again as the manifest has it. ``price``,
    ``hints`` and ``forecast`` are whole; nodes, classes, caps and lanes are those of the base.
    """

    fencing_epoch: UInt
    counter: UInt
    issued_ms: UInt
    expires_ms: UInt
    base: UInt
    service: list[tuple[UInt, UInt, Annotated[int, Meta(ge=0, le=255)]]]
    price: list[UInt]
    groups: list[tuple[UInt, Nodes]]
    hints: list[tuple[UInt, Nodes]]
    forecast: list[tuple[UInt, UInt]]
    cluster_serial: UInt


class TableBaseMissing(ManifestError):
    """A difference came whose base this reader has not."""


table_codec = Codec(RoutingTable, "routing table", 1024 * 1024)
delta_codec = Codec(TableDelta, "routing table's difference", 1024 * 1024)


def pack_service(rows: Sequence[Sequence[float]]) -> bytes:
    """Service times in microseconds, rows by class, as ``RoutingTable.service``; what is not above 0 is not known."""
    return bytes(
        0 if not us > 0 else min(254, max(0, round(math.log(us) / _LOG_STEP))) + 1 for row in rows for us in row
    )


def seal_table(table: RoutingTable, key: SigningKey) -> bytes:
    """The table as a signed envelope."""
    return sign_envelope("table", table.counter, table_codec.encode(table), key)


def seal_delta(delta: TableDelta, key: SigningKey) -> bytes:
    """The difference as a signed envelope."""
    return sign_envelope("table.delta", delta.counter, delta_codec.encode(delta), key)


def open_table(raw: bytes, cluster: Cluster, now_ms: int, newest: RoutingTable | None = None) -> RoutingTable:
    """A whole table signed by a balancer of the cluster.

    ``ManifestError`` if it is forged, malformed, expired or not newer than ``newest``.
    """
    table = table_codec.decode(verify_envelope(raw, "table", cluster.sign_key("balancer")).payload)
    _check_place(table, now_ms, newest)
    _check_shape(table)
    return table


class TableReader:
    """Opens tables, whole ones and differences; it keeps the base. One thread uses it."""

    def __init__(self) -> None:
        self._base: RoutingTable | None = None

    def read(self, raw: bytes, cluster: Cluster, now_ms: int, newest: RoutingTable | None = None) -> RoutingTable:
        """As ``open_table``, of differences too; ``TableBaseMissing`` if the whole table is to be asked for.

        A whole table that is older than the one in force is refused, and kept as the base of differences to come.
        """
        if read_unverified(raw).kind != "table.delta":
            table = open_table(raw, cluster, now_ms)
            if self._base is None or table.order > self._base.order:
                self._base = table
            _check_place(table, now_ms, newest)
            return table
        delta = delta_codec.decode(verify_envelope(raw, "table.delta", cluster.sign_key("balancer")).payload)
        _check_place(delta, now_ms, newest)
        base = self._base
        if base is None or base.order != (delta.fencing_epoch, delta.base):
            raise TableBaseMissing(
                f"routing table {(delta.fencing_epoch, delta.counter)}: its base {delta.base} is not here"
            )
        return _apply(base, delta)


def table_delta(base: RoutingTable, table: RoutingTable) -> TableDelta | None:
    """What is to be told to a reader that has the base; None where only the whole table will do.

    A service time that differs by one step is no difference: it would come and go.
    """
    for same in ("fencing_epoch", "nodes", "classes", "caps", "lanes"):
        if getattr(base, same) != getattr(table, same):
            return None
    columns = len(table.nodes)
    before, now = dict(base.groups), dict(table.groups)
    return TableDelta(
        fencing_epoch=table.fencing_epoch,
        counter=table.counter,
        issued_ms=table.issued_ms,
        expires_ms=table.expires_ms,
        base=base.counter,
        service=[
            (place // columns, place % columns, new)
            for place, (old, new) in enumerate(zip(base.service, table.service, strict=True))
            if abs(old - new) > 1 or (not old * new and old != new)
        ],
        price=table.price,
        groups=[
            *((group, nodes) for group, nodes in table.groups if before.get(group) != nodes),
            *((group, []) for group, _ in base.groups if group not in now),
        ],
        hints=table.hints,
        forecast=table.forecast,
        cluster_serial=table.cluster_serial,
    )


def fit_table(table: RoutingTable, room: int) -> tuple[RoutingTable, str]:
    """The table in at most ``room`` bytes, and what had to go: hints, then groups from the end, then idle classes.

    Without a group's line clients ask the computed holders and are told better (``moved``); without a class's they go
    by what they measured. Node names stay in any case, so a table of very long ones may still be longer.
    """
    dropped: list[str] = []
    size = len(table_codec.encode(table))
    if size > room and table.hints:
        dropped.append(f"{len(table.hints)} hints")
        table = msgspec.structs.replace(table, hints=[])
        size = len(table_codec.encode(table))
    if size > room and table.groups:
        lines = [len(msgspec.msgpack.encode(line)) for line in table.groups]
        kept = len(lines)
        while kept and size > room:
            kept -= 1
            size -= lines[kept]
        dropped.append(f"{len(lines) - kept} of {len(lines)} placement groups")
        table = msgspec.structs.replace(table, groups=table.groups[:kept])
        size = len(table_codec.encode(table))
    if size > room and table.classes:
        columns = max(1, len(table.nodes))
        order = sorted(range(len(table.classes)), key=lambda row: -table.forecast[row][0])
        kept = max(0, len(order) - -(-(size - room) // columns))
        rows = sorted(order[:kept])
        dropped.append(f"{len(order) - kept} of {len(order)} classes")
        table = msgspec.structs.replace(
            table,
            classes=[table.classes[row] for row in rows],
            service=b"".join(table.service[row * columns : (row + 1) * columns] for row in rows),
            caps=[table.caps[row] for row in rows],
            forecast=[table.forecast[row] for row in rows],
        )
    return table, f"the routing table is too long without: {', '.join(dropped)}" if dropped else ""


def _apply(base: RoutingTable, delta: TableDelta) -> RoutingTable:
    rows, columns = len(base.classes), len(base.nodes)
    service, groups = bytearray(base.service), dict(base.groups)
    for row, column, code in delta.service:
        if row >= rows or column >= columns:
            raise ManifestError(f"routing table {(delta.fencing_epoch, delta.counter)}: it does not match its base")
        service[row * columns + column] = code
    for group, nodes in delta.groups:
        if nodes:
            groups[group] = nodes
        else:
            groups.pop(group, None)
    table = msgspec.structs.replace(
        base,
        counter=delta.counter,
        issued_ms=delta.issued_ms,
        expires_ms=delta.expires_ms,
        service=bytes(service),
        price=delta.price,
        groups=list(groups.items()),
        hints=delta.hints,
        forecast=delta.forecast,
        cluster_serial=delta.cluster_serial,
    )
    _check_shape(table)
    return table


def _check_place(table: RoutingTable | TableDelta, now_ms: int, newest: RoutingTable | None) -> None:
    order = (table.fencing_epoch, table.counter)
    if table.expires_ms + CLOCK_SKEW_MS < now_ms:
        raise ManifestError(f"routing table {order}: expired {now_ms - table.expires_ms} ms ago")
    if table.expires_ms > now_ms + TABLE_LIFETIME_MAX_MS + CLOCK_SKEW_MS:
        raise ManifestError(
            f"routing table {order}: expires in {table.expires_ms - now_ms} ms, the limit is {TABLE_LIFETIME_MAX_MS}"
        )
    if newest is not None and order <= newest.order:
        raise ManifestError(f"routing table {order}: {newest.order} is in force")


def _check_shape(table: RoutingTable) -> None:
    rows, columns = len(table.classes), len(table.nodes)
    if len(table.service) != rows * columns or len(table.price) != columns:
        raise ManifestError(f"routing table {table.order}: its rows do not match {rows} classes and {columns} nodes")
    if table.lanes and len(table.lanes) != columns:
        raise ManifestError(f"routing table {table.order}: {len(table.lanes)} lanes do not match {columns} nodes")
    places = (max(indexes, default=0) for lines in (table.groups, table.hints) for _, indexes in lines)
    if len(table.forecast) != rows or len(table.caps) != rows or any(place >= columns for place in places):
        raise ManifestError(
            f"routing table {table.order}: caps, forecast, groups or hints do not match its classes and nodes"
        )
