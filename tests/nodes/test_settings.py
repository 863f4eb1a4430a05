"""The settings of a key at one holder: only newer ones, signed by client and registry, durable, and gone by at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AccessDenied, EngineError, KeyDisabled, ManifestError, ProtocolError, StaleKey, VersionRetired
from engine.protocol.requests import ShareCommit, SharePrepare, ShareRelease, ShareSettings, SyncEntry
from engine.protocol.settings import (
    DESTROY_DELAY_MAX_MS,
    SettingsOrder,
    book_settings,
    issue_settings,
    open_settings,
    read_settings,
    settings_orders,
    state_of,
)
from engine.protocol.signed import add_signature, sign_envelope
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.returning import recalled
from nodes.store import ShareStore, StoreCorrupt
from nodes.token import Lane, Token

ME, DEALER, OTHER = "node2", "node1", "node3"
HOUR_MS = 3_600_000


class Scene:
    """One holder, node2, with a committed key of name ``orders``."""

    def __init__(self, world: Any, path: Path, lane: Lane, algorithms: tuple[str, ...]) -> None:
        self.world, self.path, self.lane, self.algorithms = world, path, lane, algorithms
        self.open()
        self.dealt = self.committed("orders")

    def open(self) -> None:
        self.store = ShareStore(self.path, ME, self.lane)
        self.catalogue = Catalogue(self.store.rows(), self.store.settings())
        clock = TrustedClock(self.store.clock_mark().mark_ms, wall_ms=self.world.clock, steady_ms=lambda: 0)
        ledger = GrantLedger(self.store, clock)
        self.holder = ShareHolder(
            self.world.cluster, self.world.keys[ME], self.store, self.catalogue, self.algorithms, ledger
        )

    def restart(self) -> None:
        self.store.close()
        self.open()

    def committed(self, name: str) -> Any:
        dealt = self.world.deal(name)
        offer = dealt.offers[ME]
        body = SharePrepare(offer.manifest, offer.x, offer.y, offer.salt, [])
        self.holder.prepare(self.lane, body, self.world.cluster.members[DEALER])
        self.holder.commit(ShareCommit(dealt.key_id, self.world.certificate(dealt)))
        return dealt

    def order(self, serial: int = 1, **changes: Any) -> SettingsOrder:
        """Settings; ``serial`` counts from the world's time on."""
        fields = {
            "name": "orders",
            "lineage": self.dealt.key_id,
            "serial": self.world.now_ms + serial,
            "previous": 0,
            "enabled": False,
            "min_version": 1,
            "destroy_at_ms": 0,
            "expires_ms": self.world.now_ms + 60_000,
            **changes,
        }
        return SettingsOrder(**fields)

    def signed(self, serial: int = 1, *, client: str = "alice", booked: str = "balancer", **changes: Any) -> bytes:
        raw = issue_settings(self.order(serial, **changes), self.world.keys[client])
        return book_settings(raw, self.world.keys[booked]) if booked else raw

    def take(self, raw: bytes) -> Any:
        return self.holder.take_settings(ShareSettings(raw))

    def release(self) -> Any:
        grant = self.world.grant(self.dealt, OTHER)
        body = ShareRelease(self.dealt.key_id, grant, b"")
        return self.holder.release(self.lane, body, self.world.cluster.members[OTHER])

    def item(self, state: str = "committed", document: bytes = b"", settings: bytes = b"") -> SyncEntry:
        dealt = self.dealt
        return SyncEntry(dealt.key_id, state, dealt.record.raw, self.world.certificate(dealt), document, settings)

    @property
    def state(self) -> str:
        return state_of(self.catalogue.settings_of(self.dealt.key_id))

    @property
    def row(self) -> Any:
        return self.store.get(self.dealt.key_id)


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path / "shares.db", lane, token.algorithms)
    yield made
    made.store.close()


def test_a_disabled_key_s_share_is_kept_and_not_released(scene: Scene) -> None:
    """Also after a restart; enabled again, it is released as before, and no grant was used up."""
    assert scene.release()
    scene.take(scene.signed(1))
    with pytest.raises(KeyDisabled, match="'orders' is disabled"):
        scene.release()
    scene.restart()
    with pytest.raises(KeyDisabled):
        scene.release()
    assert scene.row.sealed
    assert scene.row.state == "committed"
    scene.take(scene.signed(2, enabled=True))
    assert scene.release()


def test_versions_below_the_least_are_refused(scene: Scene) -> None:
    scene.take(scene.signed(1, enabled=True, min_version=2))
    with pytest.raises(VersionRetired, match="version 1 of the key 'orders' is retired: versions from 2 on"):
        scene.release()
    scene.take(scene.signed(2, enabled=True, min_version=1))
    assert scene.release()


def test_unsealed_shares_leave_memory_when_the_key_is_disabled(scene: Scene) -> None:
    scene.release()
    assert scene.holder.shares.statistics().entries == 1
    scene.take(scene.signed(1))
    assert scene.holder.shares.statistics().entries == 0


def test_older_settings_change_nothing(scene: Scene) -> None:
    """Neither of a peer, nor of a registry that fell back, whose word is heard and which is offered the newer ones."""
    old, new = scene.signed(1, enabled=True), scene.signed(2)
    assert scene.take(new).raw == new
    assert scene.take(new).raw == new
    for _ in range(2):
        with pytest.raises(StaleKey, match="older than"):
            scene.take(old)
        scene.holder.catch_up(scene.item(settings=old))
        assert scene.holder.unbooked() == [new]
        scene.holder.catch_up(scene.item())
        assert scene.holder.unbooked() == [new]
        assert scene.holder.unbooked() == []
        assert scene.state == "disabled"
        scene.restart()
    scene.holder.catch_up(scene.item(settings=new))
    assert scene.holder.unbooked() == []


def test_of_two_with_one_serial_the_first_stays(scene: Scene) -> None:
    first = scene.signed(1)
    scene.take(first)
    assert scene.take(scene.signed(1, enabled=True)).raw == first
    assert scene.state == "disabled"


def test_settings_are_learnt_from_the_registry_s_books(scene: Scene) -> None:
    """Long after they expired, by a client who may no more, as long as it might once."""
    raw = scene.signed(1)
    scene.world.now_ms += 30 * 24 * HOUR_MS
    scene.holder.catch_up(scene.item(settings=raw))
    assert scene.state == "disabled"
    scene.restart()
    assert scene.state == "disabled"


def test_each_bad_document_is_refused(scene: Scene) -> None:
    world = scene.world
    late = world.now_ms + 60_000 + DESTROY_DELAY_MAX_MS
    good = scene.signed(1, booked="")
    payload = settings_orders.encode(scene.order(1))
    cases: list[tuple[bytes, type[EngineError], str]] = [
        (good, ManifestError, "not countersigned by the registry"),
        (scene.signed(1, booked="node1"), ManifestError, "'node1' may not sign"),
        (scene.signed(1, booked="carol"), ManifestError, "'carol' may not sign"),
        (add_signature(good, world.stranger), ManifestError, "'stranger' may not sign"),
        (scene.signed(1, client="bob"), AccessDenied, "it takes settings"),
        (scene.signed(1, client="carol"), AccessDenied, "it takes settings"),
        (scene.signed(1, client="node1"), ManifestError, "'node1' may not sign"),
        (sign_envelope("order.settings", 1, payload, world.keys["balancer"]), ManifestError, "may not sign"),
        (sign_envelope("order.destroy", 1, payload, world.keys["alice"]), ManifestError, "came where"),
        (scene.signed(1, name="others"), ManifestError, "name 'others', the key is 'orders'"),
        (scene.signed(1, lineage=bytes(16)), StaleKey, "knows no key"),
        (scene.signed(1, previous=world.now_ms + 1), ManifestError, "is not above"),
        (scene.signed(60_001), ManifestError, "when they expire"),
        (scene.signed(1, destroy_at_ms=late + 1), ManifestError, "the limit is 31622400000"),
        (sign_envelope("order.settings", 1, payload[:-1], world.keys["alice"]), ProtocolError, "key settings"),
    ]
    for raw, error, match in cases:
        with pytest.raises(error, match=match):
            scene.take(raw)
        assert scene.catalogue.settings_of(scene.dealt.key_id) is None
        assert scene.store.settings() == []
    other = scene.committed("shared/x")
    wrong = scene.signed(1, name="shared/x", lineage=other.key_id)
    with pytest.raises(ManifestError, match="are another key's"):
        scene.holder.catch_up(scene.item(settings=wrong))
    with pytest.raises(ManifestError, match="not countersigned"):
        scene.holder.catch_up(scene.item(settings=good))
    assert scene.store.settings() == []


def test_whoever_is_given_settings_to_carry_out_looks_at_time_and_policy(scene: Scene) -> None:
    """Of today: ``destroy`` is needed beside ``settings`` where a destruction is ordered."""
    world, cluster = scene.world, scene.world.cluster
    raw = scene.signed(1, booked="")
    assert not open_settings(raw, cluster, world.now_ms).booked
    with pytest.raises(ManifestError, match="expired"):
        open_settings(raw, cluster, world.now_ms + 66_000)
    with pytest.raises(ManifestError, match="expires in"):
        open_settings(scene.signed(1, booked="", expires_ms=world.now_ms + HOUR_MS), cluster, world.now_ms)
    with pytest.raises(AccessDenied, match="it takes settings and destroy"):
        open_settings(scene.signed(1, client="bob", destroy_at_ms=world.now_ms + 9), cluster, world.now_ms)


def test_a_key_s_time_comes_when_registry_and_clock_say_so(scene: Scene) -> None:
    """Before that, nothing the registry says has a share erased; afterwards nothing of it is left."""
    at_ms = scene.world.now_ms + HOUR_MS
    due = scene.signed(1, enabled=True, destroy_at_ms=at_ms)
    scene.take(due)
    with pytest.raises(KeyDisabled, match="is to be destroyed, and refused until it is restored"):
        scene.release()
    sealed = scene.row.sealed
    with pytest.raises(ManifestError, match="3600000 ms are left"):
        scene.holder.catch_up(scene.item("destroyed", due, due))
    scene.world.now_ms = at_ms
    for document in (scene.signed(1, enabled=True), scene.signed(1, destroy_at_ms=at_ms, booked="")):
        with pytest.raises(ManifestError, match=r"not to be destroyed yet|not its booked ones"):
            scene.holder.catch_up(scene.item("destroyed", document, due))
    assert scene.row.sealed
    assert scene.holder.catch_up(scene.item("destroyed", due, due)) == [scene.dealt.key_id]
    assert (scene.row.state, scene.row.sealed, scene.row.document) == ("destroyed", b"", due)
    scene.restart()
    assert scene.catalogue.by_name("orders") is None
    assert scene.holder.catch_up(scene.item("destroyed", due, due)) == []
    assert all(sealed[20:60] not in file.read_bytes() for file in scene.path.parent.iterdir())


def test_what_was_restored_is_not_destroyed_by_a_registry_that_fell_back(scene: Scene) -> None:
    at_ms = scene.world.now_ms + HOUR_MS
    due, restored = scene.signed(1, destroy_at_ms=at_ms), scene.signed(2, enabled=True)
    scene.take(due)
    scene.take(restored)
    scene.world.now_ms = at_ms + HOUR_MS
    for settings in (due, b""):
        with pytest.raises(ManifestError, match=r"which \d+ have replaced"):
            scene.holder.catch_up(scene.item("destroyed", due, settings))
        assert scene.holder.unbooked() == [restored]
    assert scene.row.sealed
    assert scene.release()


def test_another_key_s_settings_destroy_nothing(scene: Scene) -> None:
    other = scene.committed("shared/x")
    due = scene.signed(1, name="shared/x", lineage=other.key_id, destroy_at_ms=scene.world.now_ms + 2)
    scene.world.now_ms += HOUR_MS
    with pytest.raises(ManifestError, match="not its booked ones"):
        scene.holder.catch_up(scene.item("destroyed", due))
    assert scene.row.sealed


def test_a_new_holder_knows_them_before_its_share_counts(scene: Scene) -> None:
    """A share that is only prepared has its key's settings, and so has it when it is committed."""
    dealt = scene.dealt = scene.world.deal("coming")
    offer = dealt.offers[ME]
    body = SharePrepare(offer.manifest, offer.x, offer.y, offer.salt, [])
    scene.holder.prepare(scene.lane, body, scene.world.cluster.members[DEALER])
    scene.take(scene.signed(1, name="coming"))
    scene.holder.commit(ShareCommit(dealt.key_id, scene.world.certificate(dealt)))
    with pytest.raises(KeyDisabled):
        scene.release()


def test_every_change_of_settings_gives_the_key_another_entry(scene: Scene) -> None:
    """By which the shortest way sees, at each use, that its plan is not of today."""
    seen = [scene.catalogue.by_name("orders")]
    told: list[Any] = []
    scene.catalogue.watch(told.append)
    for serial in (1, 2, 3):
        scene.take(scene.signed(serial, enabled=serial != 2))
        seen.append(scene.catalogue.by_name("orders"))
        assert seen[-1] is scene.catalogue.by_id(scene.dealt.key_id)
        assert seen[-1] is told[-1]
    assert len(set(map(id, seen))) == 4
    scene.take(scene.signed(3))
    assert scene.catalogue.by_name("orders") is seen[-1]


def test_settings_that_were_changed_on_the_disk_stop_the_node(scene: Scene) -> None:
    scene.take(scene.signed(1))
    with scene.store._transaction():
        scene.store._db.execute("UPDATE settings SET document = ?", (scene.signed(1, enabled=True),))
    with pytest.raises(StoreCorrupt, match="not authentic"):
        scene.store.settings()


def test_the_documents_tell_what_they_say(scene: Scene) -> None:
    raw = scene.signed(1, destroy_at_ms=scene.world.now_ms + HOUR_MS, min_version=3)
    assert read_settings(raw).told == (
        f"settings {scene.world.now_ms + 1}: destroying at {scene.world.now_ms + HOUR_MS} ms, versions from 3"
    )
    assert read_settings(raw).booked
    assert not read_settings(scene.signed(1, booked="")).booked


def test_a_node_that_was_away_learns_settings_from_another(scene: Scene) -> None:
    """Those that are booked, and the destruction whose time has come; a node's older word changes nothing."""
    key_id, at_ms = scene.dealt.key_id, scene.world.now_ms + HOUR_MS
    disabled, due = scene.signed(1), scene.signed(2, destroy_at_ms=at_ms)
    with pytest.raises(ManifestError, match="not countersigned by the registry"):
        scene.holder.recall(scene.item(settings=scene.signed(1, booked="")))
    assert scene.state == "enabled"
    scene.take(disabled)
    [serial] = [known[2] for known in scene.catalogue.known()]
    assert recalled(scene.catalogue, [(key_id, 1, serial)]).entries == []
    [told] = recalled(scene.catalogue, [(key_id, 1, 0)]).entries
    assert (told.state, told.settings) == ("committed", disabled)
    assert scene.holder.recall(scene.item(settings=due)) == ([], None)
    assert scene.state == "destroying"
    assert scene.holder.recall(told) == ([], None)
    assert scene.state == "destroying", "an older word"
    with pytest.raises(ManifestError, match="ms are left"):
        scene.holder.recall(scene.item("destroyed", due, due))
    assert scene.row.sealed
    scene.world.now_ms = at_ms
    assert scene.holder.recall(scene.item("destroyed", due, due)) == ([key_id], None)
    assert scene.row.state == "destroyed"
