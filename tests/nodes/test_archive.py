"""Archives at one node, with a real token and store: what is in them, what is refused, and how they come back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ManifestError, ShareCorrupt, StaleKey
from engine.protocol.backup import (
    PAGE_BYTES,
    ArchivedKey,
    ArchiveReader,
    ExportOrder,
    contribute,
    issue_export_order,
    key_record,
    open_piece,
    sign_recovery_card,
)
from engine.protocol.manifest import open_receipt
from engine.protocol.refresh import Opener, Sealer
from engine.protocol.requests import (
    Destroy,
    RestoredShare,
    ShareCommit,
    ShareExport,
    SharePrepare,
    ShareRestore,
)
from nodes import archive as archives
from nodes.archive import IDLE_S, KEYS_A_PAGE, Exporter, Restorer
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.quotas import Quotas
from nodes.store import ShareStore
from nodes.token import Lane, Token

ME, DEALER, CLIENT = "node2", "node1", "alice"


class Scene:
    """The holder node2: its exporter and restorer; a fresh one of that name is ``fresh``."""

    def __init__(self, world: Any, folder: Path, lane: Lane, algorithms: tuple[str, ...]) -> None:
        self.world, self.folder, self.lane, self.algorithms = world, folder, lane, algorithms
        self.recovery = Opener(os.urandom(32))
        self.card = sign_recovery_card("op", self.recovery.public, world.keys["op"])
        self.monotonic_s = 0.0
        self.stores: list[ShareStore] = []
        self.paused = 0
        self.open("shares.db")

    def open(self, name: str) -> None:
        self.store = ShareStore(self.folder / name, ME, self.lane)
        self.stores.append(self.store)
        self.catalogue = Catalogue(self.store.rows(), self.store.settings())
        clock = TrustedClock(wall_ms=self.world.clock, steady_ms=lambda: 0)
        ledger, cluster = GrantLedger(self.store, clock), self.world.cluster
        self.holder = ShareHolder(cluster, self.world.keys[ME], self.store, self.catalogue, self.algorithms, ledger)
        self.exporter = Exporter(cluster, self.holder, self.catalogue, self.world.clock, lambda: self.monotonic_s)
        secret = self.world.curve_key(ME).private_bytes_raw()
        self.restorer = Restorer(
            cluster, lambda: (secret,), self.holder, self.world.clock, lambda: self.monotonic_s, self._pause
        )

    def _pause(self) -> None:
        self.paused += 1

    def fresh(self) -> None:
        """The same node with an empty store."""
        self.open(f"fresh{len(self.stores)}.db")

    def committed(self, name: str, algorithm: str = "aes-256-gcm", **more: Any) -> Any:
        dealt = self.world.deal(name, algorithm, **more)
        offer = dealt.offers[ME]
        body = SharePrepare(offer.manifest, offer.x, offer.y, offer.salt, [])
        self.holder.prepare(self.lane, body, self.world.cluster.members[DEALER])
        self.holder.commit(ShareCommit(dealt.key_id, self.world.certificate(dealt)))
        return dealt

    def order(self, **changes: Any) -> bytes:
        told: dict[str, Any] = {
            "export_id": bytes(16),
            "cluster": self.world.cluster.pin,
            "threshold": 1,
            "recipients": [self.card],
            "courier": CLIENT,
            "expires_ms": self.world.now_ms + 60_000,
        }
        return issue_export_order(ExportOrder(**(told | changes)), self.world.keys["op"], self.world.now_ms)

    def ask(self, order: bytes, run: bytes, part: int, client: str = CLIENT) -> Any:
        told, names = self.exporter.export(self.lane, ShareExport(order, run, part), self.world.cluster.members[client])
        self.names = names
        return told

    def export(self, change: Callable[[int], None] = lambda part: None) -> list[bytes]:
        """All parts of an archive; ``change`` is called before each is asked for."""
        order = self.order()
        told = self.ask(order, b"", 0)
        parts = [told.data]
        while not told.last:
            change(len(parts))
            told = self.ask(order, told.run, len(parts))
            parts.append(told.data)
        return parts

    def contribution(self, head: bytes) -> bytes:
        archive = ArchiveReader(head, self.world.cluster).archive
        public = self.world.cluster.members[ME].curve_public
        plain, expires_ms = open_piece(archive, "op", self.recovery), self.world.now_ms + 60_000
        key, sealer = self.world.keys["op"], Sealer(os.urandom(32))
        return contribute(archive, plain, key, public, expires_ms, sealer, self.world.now_ms)

    def send(self, run: bytes, part: int, data: bytes, given: list[bytes]) -> Any:
        member = self.world.cluster.members[CLIENT]
        return self.restorer.restore(self.lane, ShareRestore(run, part, data, given), member)[0]

    def restore(self, parts: list[bytes]) -> list[RestoredShare]:
        begun = self.send(b"", 0, parts[0], [self.contribution(parts[0])])
        results = []
        for number, part in enumerate(parts[1:], 1):
            results += self.send(begun.run, number, part, []).results
        return results

    def keys(self, parts: list[bytes]) -> list[ArchivedKey]:
        reader = ArchiveReader(parts[0], self.world.cluster)
        found = [key for part in parts[1:] for key in reader.part(part)]
        assert reader.ended
        return found


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path, lane, token.algorithms)
    yield made
    for store in made.stores:
        store.close()


def outcomes(results: list[RestoredShare]) -> list[str]:
    return [each.outcome for each in results]


def test_what_is_exported_comes_back(scene: Scene) -> None:
    """Of all kinds of keys, with receipts that say so, into an empty store; the shares are the same."""
    dealt = [scene.committed(name, name) for name in ("aes-256-gcm", "hmac-sha256", "ed25519", "ecdsa-p256-sha256")]
    parts = scene.export()
    scene.fresh()
    results = scene.restore(parts)
    assert outcomes(results) == ["restored"] * len(dealt)
    assert scene.paused == 1, "before the page was stored, and not for the end"
    for each, result in zip(dealt, results, strict=True):
        assert open_receipt(result.receipt, each.record, scene.world.cluster) == ME
        share, salt = scene.holder.own_share(scene.lane, scene.catalogue.committed(each.key_id))
        assert (share.x, share.y, salt) == (each.offers[ME].x, each.offers[ME].y, each.offers[ME].salt)
    again = scene.restore(parts)
    assert outcomes(again) == ["present"] * len(dealt)
    assert all(each.receipt for each in again)


def test_an_empty_node_has_an_empty_archive(scene: Scene) -> None:
    parts = scene.export()
    assert len(parts) == 2
    assert scene.keys(parts) == []
    assert scene.restore(parts) == []


def test_many_keys_take_many_pages(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each within a message; what changes meanwhile is as it is when its page is made, and nothing is left out."""
    monkeypatch.setattr(archives, "KEYS_A_PAGE", 4)
    dealt = [scene.committed(f"key{number}") for number in range(10)]

    def destroy(part: int) -> None:
        if part == 2:
            order = scene.world.destroy_order(dealt[-1].key_id, "key9")
            scene.holder.destroy(Destroy(order))
            scene.committed("late")

    parts = scene.export(destroy)
    keys = scene.keys(parts)
    assert [key.key_id for key in keys] == [each.key_id for each in dealt]
    assert [key.state for key in keys] == ["committed"] * 9 + ["destroyed"]
    assert [bool(key.sealed) for key in keys] == [True] * 9 + [False]
    assert len({key.sealed[:12] for key in keys if key.sealed}) == 9, "each nonce once"
    assert KEYS_A_PAGE * 100 < PAGE_BYTES


def test_a_reply_that_was_lost_is_given_again(scene: Scene) -> None:
    dealt = scene.committed("orders")
    order = scene.order()
    begun = scene.ask(order, b"", 0)
    assert scene.names == ()
    first = scene.ask(order, begun.run, 1)
    assert scene.names == ["orders"]
    assert scene.ask(order, begun.run, 1) == first
    assert scene.names == ["orders"], "it is recorded again, for it leaves again"
    end = scene.ask(order, begun.run, 2)
    assert end.last
    assert scene.ask(order, begun.run, 2) == end
    scene.fresh()
    opened = scene.send(b"", 0, begun.data, [scene.contribution(begun.data)])
    one = scene.send(opened.run, 1, first.data, [])
    assert scene.send(opened.run, 1, first.data, []) == one
    assert [each.key_id for each in one.results] == [dealt.key_id]


def test_a_token_that_fails_leaves_no_key_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is asked for again, and is whole then."""
    dealt = [scene.committed(f"key{number}") for number in range(3)]
    order = scene.order()
    begun = scene.ask(order, b"", 0)
    genuine, calls = scene.holder.own_plain, []

    def failing(lane: Lane, entry: Any) -> Any:
        calls.append(entry)
        if len(calls) == 2:
            raise OSError("no locked memory")
        return genuine(lane, entry)

    monkeypatch.setattr(scene.holder, "own_plain", failing)
    with pytest.raises(OSError, match="locked"):
        scene.ask(order, begun.run, 1)
    page = scene.ask(order, begun.run, 1)
    keys = scene.keys([begun.data, page.data, scene.ask(order, begun.run, 2).data])
    assert [key.key_id for key in keys] == [each.key_id for each in dealt]
    assert [int.from_bytes(key.sealed[:12], "big") for key in keys] == [2, 3, 4], "no nonce was used twice"


def test_an_archive_that_nobody_asks_for_is_given_up(scene: Scene) -> None:
    scene.committed("orders")
    order = scene.order()
    begun = scene.ask(order, b"", 0)
    scene.monotonic_s = IDLE_S
    scene.exporter.expire()
    scene.ask(order, begun.run, 1)
    scene.monotonic_s = 2 * IDLE_S + 1
    scene.exporter.expire()
    with pytest.raises(StaleKey, match="it took too long"):
        scene.ask(order, begun.run, 2)
    begun = scene.ask(order, b"", 0)
    opened = scene.send(b"", 0, begun.data, [scene.contribution(begun.data)])
    scene.monotonic_s = 4 * IDLE_S
    scene.restorer.expire()
    with pytest.raises(StaleKey, match="it took too long"):
        scene.send(opened.run, 1, b"", [])


def test_the_loop_waits_for_no_page(scene: Scene) -> None:
    """Its look at what is over comes again; a token may be slow."""
    scene.committed("orders")
    order = scene.order()
    begun = scene.ask(order, b"", 0)
    scene.send(b"", 0, begun.data, [scene.contribution(begun.data)])
    scene.monotonic_s = 2 * IDLE_S
    for each in (scene.exporter, scene.restorer):
        with each._lock:
            each.expire()
    assert scene.exporter._export is not None
    assert scene.restorer._restore is not None
    for each in (scene.exporter, scene.restorer):
        each.expire()
    assert scene.exporter._export is None
    assert scene.restorer._restore is None


def test_what_is_refused_ends_nobodys_restore(scene: Scene) -> None:
    """Anybody may send a part 0; one without enough contributions changes nothing."""
    scene.committed("orders")
    parts = scene.export()
    scene.fresh()
    begun = scene.send(b"", 0, parts[0], [scene.contribution(parts[0])])
    with pytest.raises(ManifestError, match="takes contributions of 1 operators, there are 0"):
        scene.send(b"", 0, parts[0], [])
    assert outcomes(scene.send(begun.run, 1, parts[1], []).results) == ["restored"]


def test_an_order_ends_while_its_archive_is_made(scene: Scene) -> None:
    scene.committed("orders")
    order = scene.order()
    begun = scene.ask(order, b"", 0)
    scene.world.now_ms += 120_000
    with pytest.raises(ManifestError, match="export order: expired"):
        scene.ask(order, begun.run, 1)


@pytest.mark.parametrize("how", ["sealed for another", "not the committed one"])
def test_a_share_that_is_not_good_is_told_and_does_not_stop_the_rest(scene: Scene, how: str) -> None:
    bad, good = scene.committed("bad"), scene.committed("good")
    entry = scene.catalogue.committed(bad.key_id)
    other = scene.catalogue.committed(good.key_id)
    if how == "sealed for another":
        scene.catalogue.put(scene.store.put(replace(entry.row, sealed=other.row.sealed)))
    else:
        from nodes.store import seal_context, seal_share

        share, salt = scene.holder.own_share(scene.lane, entry)
        wrong = replace(share, y=bytes([share.y[0] ^ 1]) + share.y[1:])
        context = seal_context(entry.manifest, share.x, ME, entry.record.digest)
        scene.catalogue.put(scene.store.put(replace(entry.row, sealed=seal_share(scene.lane, wrong, salt, context))))
    keys = scene.keys(scene.export())
    assert ("does not open" if how == "sealed for another" else "does not match its commitment") in keys[0].problem
    assert [bool(key.sealed) for key in keys] == [False, True]


def test_a_live_key_is_not_replaced(scene: Scene) -> None:
    """Neither by another key of its name, nor by another epoch, nor is a destroyed one brought back."""
    first, second, third = (scene.committed(name) for name in ("orders", "gone", "same"))
    parts = scene.export()
    scene.fresh()
    other = scene.committed("orders")
    scene.restore(parts)
    destroyed = scene.world.destroy_order(second.key_id, "gone")
    scene.holder.destroy(Destroy(destroyed))
    results = {result.key_id: result for result in scene.restore(parts)}
    assert results[first.key_id].outcome == "refused"
    assert "exists with another id" in results[first.key_id].text
    assert results[second.key_id].outcome == "destroyed"
    assert "was destroyed on node2" in results[second.key_id].text
    assert results[third.key_id].outcome == "present"
    assert scene.catalogue.by_name("orders").row.key_id == other.key_id  # type: ignore[union-attr]


def test_an_archive_of_a_destroyed_key_brings_its_tombstone(scene: Scene) -> None:
    gone, live = scene.committed("gone"), scene.committed("live")
    scene.holder.destroy(Destroy(scene.world.destroy_order(gone.key_id, "gone")))
    parts = scene.export()
    scene.fresh()
    scene.world.now_ms += 3_600_000
    assert outcomes(scene.restore(parts)) == ["destroyed", "restored"]
    row = scene.store.get(gone.key_id)
    assert row is not None
    assert (row.state, row.sealed) == ("destroyed", b"")
    assert scene.catalogue.by_name("live").row.key_id == live.key_id  # type: ignore[union-attr]


def test_a_share_that_was_missing_is_filled_in(scene: Scene) -> None:
    """A node that knows from the registry that it holds a key, and has no share, takes the one of the same epoch."""
    dealt = scene.committed("orders")
    parts = scene.export()
    scene.fresh()
    scene.holder._adopt(dealt.record, scene.world.certificate(dealt))
    assert scene.catalogue.lacking()
    assert outcomes(scene.restore(parts)) == ["restored"]
    assert not scene.catalogue.lacking()


def test_no_use_of_a_limited_key_is_given_out_again(scene: Scene) -> None:
    """A holder of a first epoch has a part of its uses without asking; one that was restored has none."""
    dealt = scene.committed("orders")
    entry = scene.catalogue.committed(dealt.key_id)
    before = Quotas(scene.store)
    before.note(entry)
    assert before.take(entry, 1) == 1
    parts = scene.export()
    scene.fresh()
    scene.restore(parts)
    after, entry = Quotas(scene.store), scene.catalogue.committed(dealt.key_id)
    assert after.note(entry), "more is to be asked for"
    assert after.take(entry, 1) == 0
    assert scene.store.quota(dealt.key_id) == (0, 0)


def test_the_keys_that_a_part_has_are_those_that_are_certified(scene: Scene) -> None:
    """What a node signs is not believed: each document is held against what it rests on."""
    dealt = scene.committed("orders")
    key = scene.keys(scene.export())[0]
    assert key_record(key, scene.world.cluster).digest == dealt.record.digest
    other = scene.world.deal("other")
    for changed in (
        replace_key(key, certificate=b""),
        replace_key(key, certificate=scene.world.certificate(other)),
        replace_key(key, manifest=other.record.raw),
        replace_key(key, key_id=bytes(16)),
    ):
        with pytest.raises(Exception, match=r"certificate|envelope|manifest of another"):
            key_record(changed, scene.world.cluster)


def replace_key(key: ArchivedKey, **changes: Any) -> ArchivedKey:
    from msgspec.structs import replace as replaced

    return replaced(key, **changes)


def test_a_piece_that_an_operator_made_up_is_named(scene: Scene) -> None:
    scene.committed("orders")
    head = scene.export()[0]
    archive = ArchiveReader(head, scene.world.cluster).archive
    plain = bytearray(open_piece(archive, "op", scene.recovery))
    plain[-1] ^= 1
    public, key = scene.world.cluster.members[ME].curve_public, scene.world.keys["op"]
    expires_ms, sealer = scene.world.now_ms + 60_000, Sealer(os.urandom(32))
    given = contribute(archive, bytes(plain), key, public, expires_ms, sealer, scene.world.now_ms)
    with pytest.raises(ShareCorrupt, match="the piece of 'op' is not the one that 'node2' committed to"):
        scene.send(b"", 0, head, [given])
