"""What goes out for a table: the whole, or what differs from the last whole one. It knows no socket and no clock."""

from __future__ import annotations

from dataclasses import dataclass

from engine.protocol.signed import SigningKey
from engine.protocol.table import TABLE_MAX, RoutingTable, fit_table, seal_delta, seal_table, table_delta

__all__ = ["Issued", "TableIssuer"]

WHOLE_EVERY = 8
"""Every so many tables one goes out whole. It must be good for longer than that, for who joins later asks for it."""
ENVELOPE = 256
"""Bytes of an envelope around its payload, names and signature included."""


@dataclass(frozen=True, slots=True)
class Issued:
    """``message`` is what subscribers get, ``whole`` the sealed table that it goes by, ``remark`` what was left out."""

    table: RoutingTable
    message: bytes
    whole: bytes
    remark: str


class TableIssuer:
    """Seals one table after the other; it keeps the last whole one. One thread uses it."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self._base: RoutingTable | None = None
        self._sealed = b""
        self._since = 0

    def issue(self, table: RoutingTable) -> Issued:
        """The table, made to fit into a reply."""
        table, remark = fit_table(table, TABLE_MAX - ENVELOPE)
        self._since += 1
        delta = table_delta(self._base, table) if self._base is not None and self._since < WHOLE_EVERY else None
        if delta is not None:
            message = seal_delta(delta, self._key)
            if 2 * len(message) < len(self._sealed):
                return Issued(table, message, self._sealed, remark)
        self._base, self._sealed, self._since = table, seal_table(table, self._key), 0
        return Issued(table, self._sealed, self._sealed, remark)
