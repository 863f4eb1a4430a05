"""Faults that are put into the real code, one at a time: the simulation must notice each.

A ``Bug`` changes the code for as long as its ``planted()`` lasts. ``within`` is the number of seeds, counted from 0,
among which at least one must fail; those without the features that it ``needs`` can't notice it and are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from machine import FRESH_FILES, Connection, SimListener
from msgspec.structs import replace as with_fields

import balancer.registry
import engine.protocol.manifest
import nodes.deal
import nodes.gather
import nodes.handlers
import nodes.holder
import nodes.store
from balancer.registry import SqliteRegistry
from engine.errors import AccessDenied, StaleKey
from nodes.clock import TrustedClock
from nodes.deal import Conversation
from nodes.gather import Gathering
from nodes.handlers import Handlers
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.store import ClockMark, ShareStore

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True)
class Bug:
    """A fault: what it is, how it is planted, and how soon it must be noticed."""

    what: str
    plant: Patch
    within: int = 400
    needs: frozenset[str] = frozenset()
    first: int = 0
    """The seeds before it do not show this fault: that is known, and they are not run."""
    rare: bool = False
    """It takes minutes of seeds, and is planted in the long run alone."""

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The code with this fault in it."""
        with ExitStack() as stack:
            self.plant(stack)
            yield


def _replace(target: Any, name: str, value: Any) -> Patch:
    return lambda stack: stack.enter_context(mock.patch.object(target, name, value))


class _Anything:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


# --- grants ---

_check_grant = nodes.holder.check_grant


def _grant_with(change: Callable[[Any, Any, str, Any, int], tuple[Any, Any, str, Any, int]]) -> Patch:
    """The holder checks a grant after ``change`` of what it is checked against."""

    def check(raw: bytes, record: Any, combiner: str, cluster: Any, now_ms: int, *rest: Any, **more: Any) -> Any:
        return _check_grant(*change(raw, record, combiner, cluster, now_ms), *rest, **more)

    return _replace(nodes.holder, "check_grant", check)


def _told(raw: bytes) -> Any:
    return nodes.handlers.read_grant(raw)


class _Lenient:
    """A cluster whose policy allows everything."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def allows(self, *_: object) -> bool:
        return True


def _any_combiner(raw: bytes, record: Any, combiner: str, cluster: Any, now_ms: int) -> Any:
    return raw, record, _told(raw).combiner, cluster, now_ms


def _unsigned(stack: ExitStack) -> None:
    import engine.protocol.grant as grant_module
    from engine.protocol.signed import read_unverified

    def unverified(raw: bytes, kind: str, keys: Any, *, before: Any) -> Any:
        signed = read_unverified(raw)
        before(signed)
        return signed

    stack.enter_context(mock.patch.object(grant_module, "verify_envelope", unverified))


def _other_key(raw: bytes, record: Any, combiner: str, cluster: Any, now_ms: int) -> Any:
    return (
        raw,
        replace(record, manifest=with_fields(record.manifest, key_id=_told(raw).key_id)),
        combiner,
        cluster,
        now_ms,
    )


def _any_epoch(raw: bytes, record: Any, combiner: str, cluster: Any, now_ms: int) -> Any:
    told = _told(raw)
    manifest = with_fields(record.manifest, version=told.version, epoch=told.epoch)
    return raw, replace(record, manifest=manifest), combiner, cluster, now_ms


def _reusable(stack: ExitStack) -> None:
    real = GrantLedger._use

    def use(self: GrantLedger, grant: Any, signed: Any, answerable_s: float) -> None:
        self._used.pop((signed.issuer, grant.nonce), None)
        with suppress(AccessDenied):
            real(self, grant, signed, answerable_s)

    stack.enter_context(mock.patch.object(GrantLedger, "_use", use))
    stack.enter_context(mock.patch.object(ShareStore, "note_grants", _note_again))


_note_grants = ShareStore.note_grants
_used_grants = ShareStore.used_grants


def _forgets(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(ShareStore, "used_grants", return_value=[]))
    stack.enter_context(mock.patch.object(ShareStore, "note_grants", _note_again))


def _note_again(self: ShareStore, used: Any, mark_ms: int, forget_ms: int = 0) -> None:
    known = {(each.issuer, each.nonce) for each in _used_grants(self)}
    _note_grants(self, [each for each in used if (each.issuer, each.nonce) not in known], mark_ms, forget_ms)


# --- gathering ---


def _counts_twice(stack: ExitStack) -> None:
    arrived = Gathering.arrived

    def twice(self: Gathering, holder: str, share: Any, salt: bytes) -> None:
        arrived(self, holder, share, salt)
        if self._shares.get(holder) is share and holder in getattr(self, "asked_at", {}) and not self.complete:
            self._shares[f"{holder} again"] = share

    stack.enter_context(mock.patch.object(Gathering, "arrived", twice))


def _asks_all(stack: ExitStack) -> None:
    def to_ask(self: Gathering, now_s: float) -> list[str]:
        chosen, self._waiting = self._waiting, []
        self._asked.update(dict.fromkeys(chosen, now_s))
        return chosen

    stack.enter_context(mock.patch.object(Gathering, "to_ask", to_ask))


def _no_deadline(stack: ExitStack) -> None:
    drive = Conversation._drive

    def endless(
        self: Conversation, channel: Any, gathering: Any, entry: Any, grant: bytes, until_s: float, *more: Any
    ) -> Any:
        return drive(self, channel, gathering, entry, grant, until_s + 600, *more)

    stack.enter_context(mock.patch.object(Conversation, "_drive", endless))


def _blames_nobody(stack: ExitStack) -> None:
    arrived = Gathering.arrived

    def silent(self: Gathering, holder: str, share: Any, salt: bytes) -> None:
        arrived(self, holder, share, salt)
        self._corrupt.clear()

    stack.enter_context(mock.patch.object(Gathering, "arrived", silent))


# --- creation ---


def _early_acknowledgement(stack: ExitStack) -> None:
    """The registry signs the certificate, and writes it down a little later."""
    real = SqliteRegistry.commit

    def commit(self: SqliteRegistry, manifest: bytes, receipts: Any, now_ms: int) -> bytes:
        from machine import Crashed

        sim = self._store.file._disk._sim  # type: ignore[attr-defined]
        proc = sim.running
        record = balancer.registry.open_key_manifest(manifest, self._cluster)
        row = self._row(record.manifest.key_id)
        if record.manifest.epoch > 1 or row is None or row.manifest_hash == record.digest:
            return real(self, manifest, receipts, now_ms)
        self._check_reserved(record, row, now_ms)
        told = balancer.registry.CommitCertificate(record.manifest.key_id, record.digest, list(receipts))
        payload = balancer.registry.certificates.encode(told)

        def later() -> None:
            try:
                real(self, manifest, receipts, now_ms)
            except (Crashed, Exception):
                return

        sim.after(0.3, proc.inside(later))
        return balancer.registry.sign_envelope("certificate", 1, payload, self._signing)

    stack.enter_context(mock.patch.object(SqliteRegistry, "commit", commit))


def _few_receipts(stack: ExitStack) -> None:
    for module in (nodes.deal, engine.protocol.manifest):
        stack.enter_context(
            mock.patch.object(module, "receipts_needed", lambda threshold, shares, epoch=1: threshold - 1)
        )


def _forgets_order(stack: ExitStack) -> None:
    real = SqliteRegistry.reserve

    def reserve(self: SqliteRegistry, order: bytes, dealer: str, now_ms: int, *before: bytes) -> Any:
        wanted, _ = balancer.registry.open_create_order(order, self._cluster, None)
        row = self._row(wanted.key_id)
        if row is not None and row.state == 2:
            with self._transaction(*_step("reserve")):
                self._put(balancer.registry.replace(row, state=4))
        return real(self, order, dealer, now_ms, *before)

    stack.enter_context(mock.patch.object(SqliteRegistry, "reserve", reserve))


def _step(name: str) -> tuple[str, ...]:
    return (name,)


def _no_names(stack: ExitStack) -> None:
    """The registry lets two keys have one name, and so do the holders."""
    stack.enter_context(mock.patch.object(SqliteRegistry, "_free_name"))
    steps = tuple(
        tuple(each.replace("CREATE UNIQUE INDEX live_versions", "CREATE INDEX live_versions") for each in step)
        for step in balancer.registry._MIGRATIONS
    )
    stack.enter_context(mock.patch.object(balancer.registry, "_MIGRATIONS", steps))
    stack.enter_context(mock.patch.dict(FRESH_FILES, clear=True))
    stack.enter_context(mock.patch.object(ShareHolder, "_check_name"))


def _unsynced(stack: ExitStack) -> None:
    """The stores are opened without ``synchronous=FULL``."""
    real = Connection.execute

    def execute(self: Connection, sql: str, parameters: Any = ()) -> Any:
        return real(self, "PRAGMA synchronous=OFF" if sql == "PRAGMA synchronous=FULL" else sql, parameters)

    stack.enter_context(mock.patch.object(Connection, "execute", execute))


def _aborts_anything(stack: ExitStack) -> None:
    def abort(self: ShareHolder, raw: bytes) -> None:
        notice = nodes.holder.open_abort(raw, self._cluster)
        entry = self._catalogue.by_id(notice.key_id)
        if entry is not None and entry.row.attempt == notice.attempt:
            self._store.delete(entry.row)
            self._catalogue.remove(entry.row.key_id)

    stack.enter_context(mock.patch.object(ShareHolder, "abort", abort))


def _drops_prepared(stack: ExitStack) -> None:
    """A start forgets the shares that wait for their certificate."""
    rows = ShareStore.rows

    def committed(self: ShareStore) -> Any:
        import sys

        found = rows(self)
        if sys._getframe(1).f_code.co_name == "_open":
            for row in found:
                if row.state == "prepared":
                    self.delete(row)
            found = [row for row in found if row.state != "prepared"]
        return found

    stack.enter_context(mock.patch.object(ShareStore, "rows", committed))


def _receipt_first(stack: ExitStack) -> None:
    """A holder gives its receipt and stores the share a little later."""
    real = ShareStore.put

    def put(self: ShareStore, row: Any, *more: int) -> Any:
        if row.state != "prepared":
            return real(self, row, *more)
        sim = self._db._disk._sim  # type: ignore[attr-defined]
        sim.after(0.05, sim.running.inside(lambda: self.get(row.key_id) or real(self, row, *more)))
        return row

    stack.enter_context(mock.patch.object(ShareStore, "put", put))


def _trusts_certificates(stack: ExitStack) -> None:
    def opened(raw: bytes, record: Any, cluster: Any) -> tuple[str, ...]:
        return tuple(each.node for each in record.manifest.holders)

    stack.enter_context(mock.patch.object(nodes.holder, "open_certificate", opened))


def _keeps_old_epoch(stack: ExitStack) -> None:
    """A refresh leaves the share of the epoch before in the store."""
    stack.enter_context(mock.patch.object(ShareStore, "advance", lambda self, row: self.put(row)))


# --- the end of a key, and the rest ---


def _keeps_destroyed(stack: ExitStack) -> None:
    def destroy(self: ShareStore, row: Any, order: bytes, now_ms: int) -> Any:
        return self.put(replace(row, state="destroyed", document=order, changed_ms=now_ms))

    stack.enter_context(mock.patch.object(ShareStore, "destroy", destroy))


def _destroys_silently(stack: ExitStack) -> None:
    """A node that missed a destruction never carries it out."""
    real = ShareHolder.catch_up

    def catch_up(self: ShareHolder, item: Any) -> Any:
        return None if item.state == "destroyed" else real(self, item)

    stack.enter_context(mock.patch.object(ShareHolder, "catch_up", catch_up))


def _answers_twice(stack: ExitStack) -> None:
    real = SimListener.fail

    def fail(self: SimListener, incoming: Any, error: Exception, *load: Any) -> None:
        real(self, incoming, error, *load)
        if isinstance(error, StaleKey):
            real(self, incoming, error, *load)

    stack.enter_context(mock.patch.object(SimListener, "fail", fail))


def _swallows(stack: ExitStack) -> None:
    """A refusal is never answered."""
    real = Handlers._finish

    def finish(self: Handlers, call: Any, outcome: str, detail: str, reply: Any) -> None:
        real(self, call, outcome, detail, (lambda: None) if outcome == AccessDenied.code else reply)

    stack.enter_context(mock.patch.object(Handlers, "_finish", finish))


def _wrong_version_header(stack: ExitStack) -> None:
    """Two requests that wait for one gathering are served with each other's data."""
    real = nodes.handlers.bound
    last: list[Any] = []

    def bound(lane: Any, key: Any, verb: str, version: int, *, digested: bool) -> Any:
        use = real(lane, key, verb, version, digested=digested)

        def mixed(data: bytes, *more: bytes) -> bytes:
            last.append(data)
            del last[:-2]
            return use(last[0], *more)

        return mixed if verb == "mac" else use

    stack.enter_context(mock.patch.object(nodes.handlers, "bound", bound))


BUGS: dict[str, Bug] = {
    "commitment": Bug(
        "shares are not held against their commitments",
        _replace(nodes.gather, "commitment", lambda salt, context, share: _Anything()),
        needs=frozenset({"liar"}),
    ),
    "counted-twice": Bug("a gathering counts one holder twice", _counts_twice, needs=frozenset({"3 of 4"})),
    "asks-all": Bug("a gathering asks every holder at once", _asks_all),
    "no-deadline": Bug("a gathering does not keep its deadline", _no_deadline, 400),
    "blames-nobody": Bug("a wrong share is left out, its holder not named", _blames_nobody, needs=frozenset({"liar"})),
    "grant-expiry": Bug(
        "a holder does not look at a grant's expiry",
        _grant_with(
            lambda raw, record, combiner, cluster, now: (raw, record, combiner, cluster, _told(raw).not_before_ms)
        ),
        800,
        needs=frozenset({"thief", "long"}),
        first=650,
    ),
    "grant-combiner": Bug(
        "a grant's combiner is not held against the connection", _grant_with(_any_combiner), needs=frozenset({"thief"})
    ),
    "grant-policy": Bug(
        "a holder does not check the policy",
        _grant_with(lambda raw, record, combiner, cluster, now: (raw, record, combiner, _Lenient(cluster), now)),
        needs=frozenset({"thief"}),
    ),
    "grant-signature": Bug("a grant's signature is not checked", _unsigned, needs=frozenset({"thief"})),
    "grant-key": Bug(
        "a grant for one key opens another",
        _grant_with(_other_key),
        500,
        needs=frozenset({"thief", "two names"}),
        first=330,
    ),
    "grant-epoch": Bug("a grant for one epoch opens another", _grant_with(_any_epoch), 400, needs=frozenset({"thief"})),
    "grant-reused": Bug("a grant is good again and again", _reusable, needs=frozenset({"thief"})),
    "grants-forgotten": Bug("a restart forgets the used grants", _forgets, 600, needs=frozenset({"restart attack"})),
    "grants-unwritten": Bug(
        "used grants are not written down",
        _replace(GrantLedger, "flush", lambda self: None),
        600,
        needs=frozenset({"restart attack"}),
    ),
    "clock-back": Bug(
        "a clock that is set back revives a grant",
        _replace(TrustedClock, "now_ms", lambda self: self._wall_ms()),
        500,
        needs=frozenset({"clock attack"}),
        first=340,
    ),
    "clock-forgotten": Bug(
        "a restart forgets how late it was",
        _replace(ShareStore, "clock_mark", lambda self: ClockMark(0, 0)),
        500,
        needs=frozenset({"clock attack"}),
        first=340,
    ),
    "old-share-kept": Bug("a refresh keeps the share of the epoch before", _keeps_old_epoch),
    "moved-share-kept": Bug(
        "who is no holder any more keeps its share", _replace(ShareHolder, "_leave", lambda *given: None)
    ),
    "early-acknowledgement": Bug("a key is acknowledged before the registry's commit", _early_acknowledgement, 400),
    "few-receipts": Bug("a key is committed with the receipts of t-1 holders", _few_receipts, 400),
    "order-forgotten": Bug("a retry of an order makes another key", _forgets_order),
    "two-of-a-name": Bug("two keys may have one name", _no_names, needs=frozenset({"two creators"})),
    "unsynced": Bug("the stores are not synced at a commit", _unsynced),
    "abort-committed": Bug("an abort notice deletes a committed share", _aborts_anything),
    "prepared-dropped": Bug("prepared shares are dropped at a start", _drops_prepared, 500, first=250),
    "receipt-first": Bug("a receipt is given before the share is stored", _receipt_first, 600),
    "certificate": Bug(
        "a holder does not check the commit certificate", _trusts_certificates, needs=frozenset({"rogue"})
    ),
    "destroyed-kept": Bug("the share of a destroyed key stays in the store", _keeps_destroyed),
    "destruction-missed": Bug("a destruction that a node missed is never made up for", _destroys_silently, 400),
    "answered-twice": Bug("some refusals are sent twice", _answers_twice),
    "not-answered": Bug("some refusals are not sent", _swallows),
    "wrong-data": Bug("a request is answered with the result of another", _wrong_version_header),
}
