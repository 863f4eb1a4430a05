"""The heads of other nodes' audit logs: which were heard, which contradict each other, and who hears of ours.

A node cannot take back a head that others have written down. It opens no socket and reads no clock.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from engine.errors import AccessDenied, EngineError, Overloaded
from engine.protocol import audit as chain
from engine.protocol.audit import AuditHead, Record, head_of_text, open_head
from engine.protocol.manifest import ClusterSource, FollowsCluster, Member

__all__ = ["Heard", "Witness"]

MAX_WITNESSES: Final = 8
"""How many other nodes are told of a head: all if there are no more, else those that follow by name."""
BURST: Final = 10
BURST_S: Final = 10.0
"""A node may tell ``BURST`` heads in this time."""
MAX_ALARMS: Final = 16


@dataclass(frozen=True, slots=True)
class Heard:
    """What is to be recorded of a head: the event, its description, and the head itself in base64."""

    event: str
    detail: str
    text: str
    head: AuditHead


class Witness(FollowsCluster):
    """What ``node`` knows of the others' heads. ``known`` are the records of earlier starts, oldest first."""

    def __init__(self, node: str, cluster: ClusterSource, known: Iterable[Record] = ()) -> None:
        self._source = cluster
        self._node = node
        self._newest: dict[str, AuditHead] = {}
        self._written: dict[str, tuple[bytes, int, bytes]] = {}
        self._told: dict[str, int] = {}
        self._times: dict[str, list[float]] = {}
        self.alarms: dict[str, str] = {}
        for record in known:
            try:
                head = head_of_text(record.head, self._cluster.sign_key_ever("node"))
            except EngineError:
                continue
            self._newest[record.member], self._written[record.member] = head, _line(head)

    @property
    def audience(self) -> tuple[str, ...]:
        """Who is told of this node's heads."""
        names = sorted({self._node, *self._cluster.nodes})
        place = names.index(self._node)
        return tuple((names[place + 1 :] + names[:place])[:MAX_WITNESSES])

    def hear(self, raw: bytes, sender: Member, now_s: float) -> Heard | None:
        """What to record of a head that ``sender``'s connection brought, and then to tell ``wrote``.

        None if it is known already.
        """
        recent = [each for each in self._times.get(sender.name, ()) if now_s - each < BURST_S]
        if len(recent) >= BURST:
            raise Overloaded(f"{sender.name!r} told {BURST} audit heads within {BURST_S:g} s")
        self._times[sender.name] = [*recent, now_s]
        head = open_head(raw, {sender.name: sender.sign_public})
        if head.node != sender.name:
            raise AccessDenied(f"{sender.name!r} brings an audit head of {head.node!r}")
        before, text = self._newest.get(head.node), base64.b64encode(raw).decode()
        if self._written.get(head.node) == _line(head):
            return None
        self._newest[head.node] = head
        problem = "" if before is None else contradiction(before, head)
        if not problem:
            return Heard(chain.PEER_HEAD, f"record {head.seq}", text, head)
        if head.node in self.alarms or len(self.alarms) < MAX_ALARMS:
            self.alarms[head.node] = problem
        return Heard(chain.PEER_FORK, problem, text, head)

    def wrote(self, heard: Heard) -> None:
        """The record is on the disk: the head need not be recorded again."""
        self._written[heard.head.node] = _line(heard.head)

    def to_tell(self, seq: int) -> tuple[str, ...]:
        """Who has not confirmed our head of record ``seq`` yet."""
        return tuple(name for name in self.audience if self._told.get(name, 0) < seq)

    def told(self, names: Iterable[str], seq: int) -> None:
        """These have confirmed it."""
        for name in names:
            self._told[name] = max(seq, self._told.get(name, 0))


def _line(head: AuditHead) -> tuple[bytes, int, bytes]:
    """Which line of which log a head names."""
    return head.log_id, head.seq, head.hash


def contradiction(before: AuditHead, head: AuditHead) -> str:
    """Why both can't be of one log that only grows; empty if they can."""
    if head.log_id != before.log_id:
        return (
            f"{head.node!r} began a new audit log at record {head.seq}; of its earlier one record {before.seq} is known"
        )
    if head.seq < before.seq:
        return f"the audit log of {head.node!r} fell back from record {before.seq} to {head.seq}"
    if head.seq == before.seq and head.hash != before.hash:
        return f"the audit log of {head.node!r} has two records {head.seq}"
    return ""
