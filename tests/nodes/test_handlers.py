"""The loop's decisions without sockets or threads: who waits for a gathering, who is answered, what is let go."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pkcs11 import Attribute

from engine.client.admission import Admission, ServiceLimits
from engine.client.listener import IDLE, Incoming
from engine.errors import (
    AccessDenied,
    AuditUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidTag,
    KeyNotFound,
    NeedGrant,
    Overloaded,
    QuorumUnavailable,
    TokenError,
)
from engine.protocol.audit import AuditHead, sign_head
from engine.protocol.requests import (
    REPLY_CODECS,
    REQUEST_CODECS,
    AuditNotice,
    Describe,
    Destroy,
    Empty,
    Flush,
    HostHealth,
    Operate,
    Prewarm,
    ServiceCount,
    SyncEntry,
    TokenHealth,
)
from engine.protocol.wire import PROTOCOL_VERSION, Load, Request, Status
from engine.sharing import SecretBuffer, blind
from nodes._fastpath import Plan
from nodes.cache import CacheLimits
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.deal import Cursor, Gathered
from nodes.handlers import Handlers
from nodes.health import TokenFault
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.limits import GenerationLimit, Limits
from nodes.orders import BalancerOrders
from nodes.peers import Peers
from nodes.quotas import Quotas
from nodes.remember import SignatureCache
from nodes.store import Row, ShareStore
from nodes.token import Lane, LoadedKey, Token
from nodes.witness import Witness

ME = "node1"


class FakeWorker:
    """A queue that runs when the test says so; ``full`` makes it refuse."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.jobs: list[tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = []
        self.full = False

    @property
    def waiting(self) -> int:
        return len(self.jobs)

    def submit(self, work: Callable[[Any], Any], done: Callable[[Any, Any], None], member: str = "") -> None:
        if self.full:
            raise Overloaded("full")
        self.jobs.append((work, done))

    def run(self) -> int:
        """Run what waits, and what comes of it."""
        count = 0
        while self.jobs:
            work, done = self.jobs.pop(0)
            count += 1
            try:
                result = work(self.state)
            except Exception as error:
                done(None, error)
            else:
                done(result, None)
        return count


class FakeAudit:
    """Records in memory; a reply that waits for the disk goes out when the test calls ``sync``."""

    problem = broken = ""
    head = None

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.recorded: list[tuple[Any, int, int]] = []
        self.uses = SimpleNamespace(record=self._record)
        self.waiting: list[Callable[[AuditUnavailable | None], None]] = []
        self.held = False

    def write(self, record: Any) -> int:
        if self.problem:
            raise AuditUnavailable(self.problem)
        self.records.append(record)
        return len(self.records)

    def _record(self, lines: Any, request: int, elapsed_us: int) -> None:
        if self.problem:
            raise AuditUnavailable(self.problem)
        self.recorded.append((lines, request, elapsed_us))

    def when_durable(self, seq: int, then: Callable[[AuditUnavailable | None], None]) -> None:
        self.waiting.append(then)
        if not self.held:
            self.sync()

    def sync(self, failure: AuditUnavailable | None = None) -> None:
        waiting, self.waiting = self.waiting, []
        for then in waiting:
            then(failure)


class Scene:
    """Handlers of node1 with one committed key, a scripted gathering and recorded answers."""

    def __init__(
        self, world: Any, lane: Lane, store: ShareStore, algorithm: str = "aes-256-gcm", max_uses: int = 1000
    ) -> None:
        self.world, self.lane = world, lane
        self.dealt = world.deal("orders", algorithm)
        manifest = self.dealt.manifest
        row = Row(
            manifest.key_id, 1, 1, 1, "orders", "committed", self.dealt.record.digest, self.dealt.record.raw,
            world.certificate(self.dealt), b"", b"sealed", world.now_ms,
        )  # fmt: skip
        self.catalogue = Catalogue([store.put(row)])
        self.quotas = Quotas(store)
        self.quotas.note(self.catalogue.committed(manifest.key_id))  # as after its first use
        self.local, self.talkers = FakeWorker(lane), FakeWorker(None)
        self.answers: dict[int, tuple[str, Any, Load]] = {}
        self.audit = FakeAudit()
        self.records = self.audit.records
        self.gatherings: list[tuple[bytes, float]] = []
        self.secrets: list[SecretBuffer] = []
        self.failure: EngineError | None = None
        self.extensions: Any = None
        self.clock_s = 0.0
        self.signatures = SignatureCache(CacheLimits(300.0, 16), time.monotonic)
        self._number = 0
        self.plans: dict[str, Plan] = {}
        self.connection: Any = SimpleNamespace(member="alice")
        clock = TrustedClock(wall_ms=world.clock, steady_ms=lambda: 0)
        self.ledger = GrantLedger(store, clock, Limits())
        self.health = SimpleNamespace(problem="", told=lambda: TokenHealth("", "", 0, 0, 0, 0))
        holder = ShareHolder(world.cluster, world.keys[ME], store, self.catalogue, (algorithm,), self.ledger)
        self.handlers = Handlers(
            node=ME,
            boot=bytes(16),
            cluster=world.cluster,
            token=SimpleNamespace(missing={}, algorithms=(algorithm,), description="token"),  # type: ignore[arg-type]
            lane=lane,
            catalogue=self.catalogue,
            holder=holder,
            renewer=None,  # type: ignore[arg-type]
            conversation=SimpleNamespace(gather=self._gather, peers=Peers()),  # type: ignore[arg-type]
            coordinator=None,  # type: ignore[arg-type]
            trial=None,  # type: ignore[arg-type]
            orders=BalancerOrders(world.cluster, store, time.monotonic),
            audit=self.audit,  # type: ignore[arg-type]
            audit_strict=False,
            audit_name=None,
            witness=Witness(ME, world.cluster),
            local=self.local,  # type: ignore[arg-type]
            slow=self.local,  # type: ignore[arg-type]
            talkers=self.talkers,  # type: ignore[arg-type]
            dealer=self.talkers,  # type: ignore[arg-type]
            mover=self.talkers,  # type: ignore[arg-type]
            replier=self,
            cache_limits=CacheLimits(300.0, 4, max_uses),
            signatures=self.signatures,
            quotas=self.quotas,
            ledger=self.ledger,
            limits=ServiceLimits(),
            health=self.health,
            host=lambda: HostHealth(0, 0, 0, 0),
            counts=lambda admission: ServiceCount(admission.under_way, 0, 0, 0, 0, admission.refused, 0, 0, 0),
            network_us=lambda: 0,
            generation=GenerationLimit(1.0, 0.0),
            known=lambda connection, member: connection.member == member,
            fast=SimpleNamespace(  # type: ignore[arg-type]
                remember=lambda user, key_id, plan: self.plans.update({user + plan.verb: plan}), forget=self.plans.clear
            ),
        )

    def _gather(
        self,
        talker: None,
        entry: Any,
        grant: bytes,
        deadline_s: float,
        extensions: Any,
        meanwhile: Callable[[], None],
    ) -> Gathered:
        self.gatherings.append((grant, deadline_s))
        meanwhile()
        self.extensions = extensions
        if self.failure is not None:
            raise self.failure
        if time.monotonic() >= deadline_s:
            raise QuorumUnavailable("no answer in time")
        self.secrets.append(blind(self.dealt.key))
        return Gathered(self.secrets[-1], ())

    # --- the replier ---

    def reply(self, incoming: Incoming, status: int, body: bytes, load: Load = IDLE) -> None:
        assert incoming.request.id not in self.answers, "answered twice"
        code = {Status.OK: "ok", Status.MOVED: "moved"}[status]  # type: ignore[index]
        self.answers[incoming.request.id] = (code, body, load)

    def fail(self, incoming: Incoming, error: Exception, load: Load = IDLE) -> None:
        assert incoming.request.id not in self.answers, "answered twice"
        self.answers[incoming.request.id] = (type(error).__name__, error, load)

    # --- requests ---

    def send(
        self, verb: str, message: Any, *, client: str = "alice", timeout_ms: int = 60_000, extensions: Any = None
    ) -> int:
        self._number += 1
        body = REQUEST_CODECS[verb].encode(message)
        request = Request(PROTOCOL_VERSION, self._number, verb, timeout_ms, body, extensions or {})
        self.handlers.handle(Incoming(self.world.cluster.members[client], request, self.connection))
        return self._number

    def encrypt(
        self, *, grant: bool = True, verb: str = "encrypt", timeout_ms: int = 60_000, extensions: Any = None
    ) -> int:
        permit = self.world.grant(self.dealt, ME, verb) if grant else b""
        message = Operate("orders", b"", b"data", b"", b"", False, permit)
        return self.send(verb, message, timeout_ms=timeout_ms, extensions=extensions)

    def outcome(self, number: int) -> str:
        return self.answers[number][0] if number in self.answers else "waits"

    def objects(self) -> int:
        """Session objects in the lane's token."""
        return len(list(self.lane._session.get_objects({Attribute.TOKEN: False})))


@pytest.fixture
def store(tmp_path: Any, lane: Lane) -> Any:
    opened = ShareStore(tmp_path / "shares.db", ME, lane)
    yield opened
    opened.close()


@pytest.fixture
def scene(world: Any, lane: Lane, store: ShareStore) -> Any:
    made = Scene(world, lane, store)
    yield made
    made.handlers.close()
    made.local.full = False
    made.local.run()
    made.handlers.tick(10**12)
    made.local.run()


@pytest.fixture
def slow(world: Any, lane: Lane, store: ShareStore) -> Any:
    made = Scene(world, lane, store, "ecdsa-p384-sha384")
    yield made
    made.handlers.close()
    made.local.full = False
    made.local.run()
    made.handlers.tick(10**12)
    made.local.run()


def test_many_requests_wait_for_one_gathering(scene: Scene) -> None:
    numbers = [scene.encrypt() for _ in range(5)]
    assert [scene.outcome(number) for number in numbers] == ["waits"] * 5
    assert scene.talkers.run() == 1
    assert [scene.outcome(number) for number in numbers] == ["ok"] * 5
    assert len(scene.gatherings) == 1
    assert scene.outcome(scene.encrypt(grant=False)) == "ok"
    assert scene.handlers.pending == 0


def test_a_use_that_is_not_made_is_not_counted(scene: Scene) -> None:
    entry = scene.catalogue.committed(scene.dealt.manifest.key_id)
    left = scene.quotas.take(entry, 2**20)
    scene.quotas.give(entry, left)
    scene.failure = QuorumUnavailable("1 of 2", ["node2"])
    failed = scene.encrypt()
    assert scene.talkers.run() == 1
    assert scene.outcome(failed) == "QuorumUnavailable"
    assert scene.outcome(scene.encrypt(grant=False)) == "NeedGrant"
    scene.failure = None
    used = scene.encrypt()
    assert scene.talkers.run() == 1
    assert scene.outcome(used) == "ok"
    assert scene.quotas.take(entry, 2**20) == left - 1


def test_a_cold_key_has_most_of_a_short_deadline(scene: Scene) -> None:
    """Of a long one all but 50 ms, of a short one three quarters: so it may be loaded, and be warm the next time."""
    for timeout_ms, part_s in ((60_000, 59.95), (40, 0.03)):
        begun_s = scene.handlers._clock()
        scene.encrypt(timeout_ms=timeout_ms)
        scene.talkers.run()
        assert scene.gatherings[-1][1] - begun_s == pytest.approx(part_s, abs=0.005)
        scene.send("flush", Flush("orders"))


def stages(scene: Scene, request_class: str) -> dict[str, int]:
    """How often each stage of a class was noted, as the verb tells it."""
    number = scene.send("latency", Empty())
    code, body, _ = scene.answers[number]
    assert code == "ok"
    told = REPLY_CODECS["latency"].decode(body)
    found = {each.request_class: each for each in told.classes}
    return {each.stage: each.count for each in found[request_class].stages} if request_class in found else {}


def test_the_stages_of_every_request_are_noted(scene: Scene) -> None:
    """A cold use, a warm one and one that is refused; each with the stages that it had."""
    scene.encrypt()
    assert stages(scene, "encrypt/aes-256-gcm") == {}  # it waits
    scene.talkers.run()
    scene.encrypt(grant=False)
    scene.send("flush", Flush("orders"))
    scene.encrypt(grant=False)
    assert stages(scene, "encrypt/aes-256-gcm") == {
        "policy": 3, "cache": 3, "gather": 1, "token": 2, "audit": 3, "reply": 3, "total": 3,
    }  # fmt: skip
    assert stages(scene, "flush") == {"policy": 1, "audit": 1, "reply": 1, "total": 1}
    assert scene.handlers.snapshot([1.0]).errors["encrypt/aes-256-gcm"] == 1


def test_a_slow_use_waits_and_another_job_works(slow: Scene) -> None:
    slow.encrypt(verb="sign")
    slow.talkers.run()
    slow.local.run()
    told = stages(slow, "sign/ecdsa-p384-sha384")
    assert told == dict.fromkeys(("policy", "cache", "wait", "gather", "token", "audit", "reply", "total"), 1)


def test_requests_that_are_none_of_its_verbs_are_noted_together(scene: Scene) -> None:
    """So nobody can make the node keep more histograms than it has verbs and algorithms."""
    for verb in ("nonsense", "no.such", "x" * 32):
        request = Request(PROTOCOL_VERSION, len(scene.answers) + 1000, verb, 1000, b"\x90", {})
        scene.handlers.handle(Incoming(scene.world.cluster.members["alice"], request, scene.connection))
    assert stages(scene, "other")["total"] == 3


def test_the_gathering_carries_the_trace_of_its_request_on(scene: Scene) -> None:
    """A malformed one is ignored, and the request served all the same."""
    good = {"traceparent": b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    for extensions, carried in ((good, good), ({"traceparent": b"00-4BF9"}, None), ({"x": b"y"}, None), ({}, None)):
        number = scene.encrypt(extensions=extensions)
        scene.talkers.run()
        assert scene.outcome(number) == "ok"
        assert scene.extensions == carried
        scene.send("flush", Flush("orders"))


def test_the_secret_is_wiped_when_it_is_loaded_or_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.encrypt()
    scene.talkers.run()
    assert [secret.closed for secret in scene.secrets] == [True]
    scene.send("flush", Flush("orders"))

    def refuse(*_: object) -> None:
        raise TokenError("full")

    monkeypatch.setattr(Lane, "load", refuse)
    number = scene.encrypt()
    scene.talkers.run()
    assert scene.outcome(number) == "TokenError"
    assert [secret.closed for secret in scene.secrets] == [True, True]


def test_the_secret_of_a_slow_key_is_wiped_when_the_worker_is_full(slow: Scene) -> None:
    number = slow.encrypt(verb="sign")
    slow.local.full = True
    slow.talkers.run()
    assert slow.outcome(number) == "Overloaded"
    assert [secret.closed for secret in slow.secrets] == [True]


def test_each_request_needs_a_grant_of_its_own_while_the_key_is_cold(scene: Scene) -> None:
    first, second = scene.encrypt(), scene.encrypt(grant=False)
    assert scene.outcome(second) == "NeedGrant"
    wrong = scene.world.grant(scene.dealt, ME, "decrypt")
    third = scene.send("encrypt", Operate("orders", b"", b"data", b"", b"", False, wrong))
    assert isinstance(scene.answers[third][1], NeedGrant)
    scene.talkers.run()
    assert scene.outcome(first) == "ok"


def test_a_failed_gathering_is_told_to_all_who_waited_and_can_be_tried_again(scene: Scene) -> None:
    scene.failure = QuorumUnavailable("1 of 2", ["node2"])
    numbers = [scene.encrypt() for _ in range(3)]
    scene.talkers.run()
    assert [scene.outcome(number) for number in numbers] == ["QuorumUnavailable"] * 3
    scene.failure = None
    again = scene.encrypt()
    scene.talkers.run()
    assert scene.outcome(again) == "ok"


def test_the_short_deadline_of_one_client_is_not_the_others(scene: Scene) -> None:
    hurried = scene.encrypt(timeout_ms=1)
    patient = [scene.encrypt(), scene.encrypt(timeout_ms=30_000)]
    time.sleep(0.01)  # the hurried one's deadline passes while the gathering waits
    scene.talkers.run()
    assert scene.outcome(hurried) in ("QuorumUnavailable", "DeadlineExceeded")
    assert [scene.outcome(number) for number in patient] == ["ok", "ok"]
    assert len(scene.gatherings) == 2
    assert scene.gatherings[1][0] != scene.gatherings[0][0]  # under a patient one's own grant
    assert scene.handlers.pending == 0


def test_a_gathering_is_not_repeated_for_requests_that_are_all_over(scene: Scene) -> None:
    numbers = [scene.encrypt(timeout_ms=1) for _ in range(3)]
    time.sleep(0.01)
    scene.talkers.run()
    assert {scene.outcome(number) for number in numbers} <= {"QuorumUnavailable", "DeadlineExceeded"}
    assert len(scene.gatherings) == 1


def test_full_talkers_are_overloaded_and_leave_nothing_behind(scene: Scene) -> None:
    scene.talkers.full = True
    assert scene.outcome(scene.encrypt()) == "Overloaded"
    scene.talkers.full = False
    number = scene.encrypt()
    scene.talkers.run()
    assert scene.outcome(number) == "ok"


def test_a_key_that_was_destroyed_meanwhile_is_not_used(scene: Scene) -> None:
    before = scene.objects()
    number = scene.encrypt()
    destroyed = scene.send(
        "share.destroy", Destroy(scene.world.destroy_order(scene.dealt.key_id, "orders")), client="node2"
    )
    scene.local.run()
    assert scene.outcome(destroyed) == "ok"
    scene.talkers.run()
    assert isinstance(scene.answers[number][1], KeyNotFound)
    assert scene.objects() == before


def test_a_destroyed_or_flushed_key_leaves_the_token(scene: Scene) -> None:
    before = scene.objects()
    for _ in range(2):
        scene.encrypt()
        scene.talkers.run()
        assert scene.objects() == before + 1
        assert REPLY_CODECS["flush"].decode(scene.answers[scene.send("flush", Flush("orders"))][1]).dropped == 1
        assert scene.objects() == before
    scene.encrypt()
    scene.talkers.run()
    scene.send("share.destroy", Destroy(scene.world.destroy_order(scene.dealt.key_id, "orders")), client="node2")
    scene.local.run()
    assert scene.objects() == before


def test_a_slow_key_lives_and_ends_on_the_local_worker(slow: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = slow.objects()
    number = slow.encrypt(verb="sign")
    slow.talkers.run()
    assert slow.outcome(number) == "waits"
    slow.local.run()
    assert slow.outcome(number) == "ok"
    assert slow.objects() == before + 2
    slow.send("flush", Flush(""))
    assert slow.objects() == before + 2
    slow.local.run()
    assert slow.objects() == before


def test_a_slow_key_does_not_outlive_its_time_because_the_worker_is_busy(slow: Scene) -> None:
    before = slow.objects()
    slow.encrypt(verb="sign")
    slow.talkers.run()
    slow.local.run()
    slow.local.full = True
    slow.send("flush", Flush(""))
    slow.local.full = False
    slow.handlers.tick(10**12)
    slow.local.run()
    assert slow.objects() == before


def test_a_request_whose_deadline_passed_in_the_queue_is_not_begun(
    slow: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.encrypt(verb="sign")
    slow.talkers.run()
    slow.local.run()
    signed: list[LoadedKey] = []
    monkeypatch.setattr(Lane, "sign", lambda self, key, data: signed.append(key))
    number = slow.encrypt(verb="sign", grant=False, timeout_ms=1)
    time.sleep(0.01)
    slow.local.run()
    assert isinstance(slow.answers[number][1], DeadlineExceeded)
    assert signed == []


def test_prewarming_loads_and_answers(scene: Scene) -> None:
    grant = scene.world.grant(scene.dealt, ME, "encrypt")
    number = scene.send("prewarm", Prewarm("orders", b"", grant))
    scene.talkers.run()
    assert scene.outcome(number) == "ok"
    assert scene.answers[number][2].loaded
    assert scene.outcome(scene.encrypt(grant=False)) == "ok"


def test_many_who_prewarm_a_key_cost_one_gathering(scene: Scene) -> None:
    """Those that come while it goes on wait for it; who comes later needs no grant, and spends none."""
    grants = [scene.world.grant(scene.dealt, ME, "encrypt") for _ in range(4)]
    numbers = [scene.send("prewarm", Prewarm("orders", b"", grant)) for grant in grants]
    scene.talkers.run()
    assert [scene.outcome(number) for number in numbers] == ["ok"] * 4
    assert len(scene.gatherings) == 1
    spent = len(scene.ledger)
    for grant in (b"", grants[0], scene.world.grant(scene.dealt, ME, "encrypt")):
        number = scene.send("prewarm", Prewarm("orders", b"", grant))
        assert scene.outcome(number) == "ok"  # at once
    assert len(scene.ledger) == spent == 4
    assert len(scene.gatherings) == 1


def test_a_key_is_used_only_so_often_and_then_gathered_again(world: Any, lane: Lane, store: ShareStore) -> None:
    scene = Scene(world, lane, store, max_uses=2)
    before = scene.objects()
    numbers = [scene.encrypt() for _ in range(5)]
    assert scene.talkers.run() == 3
    assert [scene.outcome(number) for number in numbers] == ["ok"] * 5
    assert len({grant for grant, _ in scene.gatherings}) == 3  # each under a grant of those who still waited
    last = scene.encrypt(grant=False)
    assert scene.outcome(last) == "ok"
    assert not scene.answers[last][2].loaded  # so the client attaches a grant next time
    assert scene.outcome(scene.encrypt(grant=False)) == "NeedGrant"
    assert scene.objects() == before
    assert scene.handlers.pending == 0
    (keys, _, _) = status_of(scene).caches
    assert (keys.cache, keys.entries, keys.hits, keys.misses, keys.uses) == ("keys", 0, 1, 6, 3)


def status_of(scene: Scene) -> Any:
    return REPLY_CODECS["status"].decode(scene.answers[scene.send("status", Empty())][1])


def test_a_flush_is_counted_and_forgets_signatures(scene: Scene) -> None:
    scene.encrypt()
    scene.talkers.run()
    scene.signatures.learn(b"digest")
    flushed = REPLY_CODECS["flush"].decode(scene.answers[scene.send("flush", Flush("orders"))][1])
    assert (flushed.dropped, flushed.shares) == (1, 0)
    told = {each.cache: each for each in status_of(scene).caches}
    assert {name: each.entries for name, each in told.items()} == {"keys": 0, "shares": 0, "signatures": 0}
    assert (told["keys"].flushed, told["signatures"].flushed) == (1, 1)
    number = scene.send("stats", Empty(), client="balancer")
    assert REPLY_CODECS["stats"].decode(scene.answers[number][1]).caches == list(told.values())


def test_a_new_epoch_leaves_a_loaded_key_and_a_new_version_or_the_end_does_not(scene: Scene) -> None:
    before = scene.objects()
    entry = scene.catalogue.by_id(scene.dealt.key_id)
    assert entry is not None
    for changes, left in (({"epoch": 2}, 1), ({"version": 2}, 0), ({"state": "destroyed", "sealed": b""}, 0)):
        scene.encrypt()
        scene.talkers.run()
        scene.handlers.key_changed(dataclasses.replace(entry, row=dataclasses.replace(entry.row, **changes)))
        assert scene.objects() == before + left
        scene.send("flush", Flush(""))


def test_a_grant_of_a_newer_epoch_makes_the_node_look_at_the_books_at_once(scene: Scene) -> None:
    scene.clock_s = 100.0
    scene.handlers.tick(30_000)
    scene.talkers.jobs.clear()
    for epoch, looked in ((2, 1), (0, 0)):
        scene.handlers._catching_up = False
        scene.handlers._looked_s -= 10.0
        grant = scene.world.grant(scene.dealt, ME, "encrypt", epoch=epoch)
        number = scene.send("encrypt", Operate("orders", b"", b"data", b"", b"", False, grant))
        assert scene.outcome(number) == "StaleKey"
        assert len(scene.talkers.jobs) == looked  # the dealer's queue is the talkers' here
        scene.talkers.jobs.clear()


def test_many_outdated_requests_are_one_look_at_the_books(scene: Scene) -> None:
    for _ in range(5):
        scene.handlers._catching_up = False
        scene.send("encrypt", Operate("orders", bytes(16), b"data", b"", b"", False, b""))
    assert len(scene.talkers.jobs) == 1


def limited(scene: Scene, **limits: Any) -> None:
    scene.handlers._admission = Admission(ServiceLimits(**limits))


@pytest.mark.parametrize("bound", ["requests", "member_requests"])
def test_too_many_requests_are_overloaded_and_told_once(scene: Scene, bound: str) -> None:
    limited(scene, **{bound: 3})
    numbers = [scene.encrypt() for _ in range(5)]
    assert [scene.outcome(number) for number in numbers] == ["waits"] * 3 + ["Overloaded"] * 2
    scene.talkers.run()
    assert scene.handlers.pending == 0
    scene.handlers.tick(30_000)
    scene.handlers.tick(30_000)
    refused = [each for each in scene.records if each.event == "refused"]
    assert [(each.member, each.outcome) for each in refused] == [("alice", "overloaded")]
    assert refused[0].detail.startswith(f"2 requests: limits.{bound} = 3 are under way")
    assert len([each for each in scene.records if each.event == "request"]) == 3


def test_a_member_has_its_rate_and_its_burst(scene: Scene) -> None:
    limited(scene, requests_per_s=2.0, burst_s=2.0)
    scene.handlers._clock = lambda: scene.clock_s
    outcomes = [scene.outcome(scene.encrypt()) for _ in range(6)]
    assert outcomes == ["waits"] * 4 + ["Overloaded"] * 2
    scene.clock_s += 0.5
    assert [scene.outcome(scene.encrypt()) for _ in range(2)] == ["waits", "Overloaded"]


def test_an_unforeseen_error_is_told_without_details_and_recorded(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("nodes.handlers.log", SimpleNamespace(error=lambda *_, **__: None))
    scene.encrypt()
    scene.talkers.run()
    monkeypatch.setattr(Lane, "use", fail)
    number = scene.encrypt(grant=False)
    assert scene.outcome(number) == "RuntimeError"  # the listener makes "internal error" of it
    last = scene.records[-1]
    assert (last.event, last.outcome, last.detail) == ("reply", "error", "RuntimeError")


def test_every_request_and_every_reply_has_its_record(scene: Scene) -> None:
    scene.encrypt()
    scene.encrypt(grant=False)
    scene.send("flush", Flush("no-such-key"))
    scene.talkers.run()
    events = [(record.event, record.request) for record in scene.records]
    assert sorted(events) == sorted([("request", n) for n in (1, 2, 3)] + [("reply", n) for n in (1, 2, 3)])
    assert all(record.member == "alice" for record in scene.records)


# --- the audit record before the answer ---


def test_in_strict_mode_a_reply_waits_for_the_disk(scene: Scene) -> None:
    scene.encrypt()
    scene.talkers.run()
    scene.handlers._audit_strict = True
    scene.audit.held = True
    numbers = [scene.encrypt(grant=False) for _ in range(3)]
    assert [scene.outcome(number) for number in numbers] == ["waits"] * 3
    assert scene.handlers.pending == 3
    scene.audit.sync()
    assert [scene.outcome(number) for number in numbers] == ["ok"] * 3
    assert scene.handlers.pending == 0
    number = scene.encrypt(grant=False)
    scene.audit.sync(AuditUnavailable("the disk is gone"))
    assert scene.outcome(number) == "AuditUnavailable"


def test_what_destroys_waits_for_the_disk_in_every_mode(scene: Scene) -> None:
    scene.audit.held = True
    assert scene.outcome(scene.encrypt(grant=False)) == "NeedGrant"
    order = scene.world.destroy_order(scene.dealt.key_id, "orders")
    number = scene.send("share.destroy", Destroy(order), client="node2")
    scene.local.run()
    assert scene.outcome(number) == "waits"
    scene.audit.sync()
    assert scene.outcome(number) == "ok"


def test_a_head_is_confirmed_once_its_record_is_on_the_disk(scene: Scene) -> None:
    """Its node does not tell it again, so a power cut or a full disk here must not lose what was confirmed."""

    def told() -> int:
        head = AuditHead("node2", bytes(32), 9, b"h" * 32, 1)
        return scene.send("audit.head", AuditNotice(sign_head(head, scene.world.keys["node2"])), client="node2")

    scene.audit.held = True
    number = told()
    assert scene.outcome(number) == "waits"
    scene.audit.sync(AuditUnavailable("the disk is gone"))
    assert scene.outcome(number) == "AuditUnavailable"
    number = told()
    assert scene.outcome(number) == "waits"
    scene.audit.sync()
    assert scene.outcome(number) == "ok"
    assert [record.event for record in scene.records].count("peer-head") == 2
    assert scene.outcome(told()) == "ok"
    assert [record.event for record in scene.records].count("peer-head") == 2
    assert scene.handlers.pending == 0


def test_what_the_registry_s_word_changes_has_a_record(scene: Scene) -> None:
    """A share can end without a request; not without a record, nor while none can be written."""
    manifest = scene.dealt.record.raw
    order = scene.world.destroy_order(scene.dealt.key_id, "orders")
    kept = SyncEntry(scene.dealt.key_id, "committed", manifest, scene.world.certificate(scene.dealt), b"", b"")
    gone = SyncEntry(scene.dealt.key_id, "destroyed", manifest, kept.certificate, order, b"")
    for problem, item, events in (("", kept, []), ("disk full", gone, []), ("", gone, ["books"]), ("", gone, [])):
        scene.audit.problem = problem
        before = len(scene.records)
        scene.handlers._caught_up(scene.handlers._returning, ([item], Cursor(1, 1), [], []), None)
        scene.local.run()
        assert [record.event for record in scene.records[before:]] == events
    told = scene.records[-1]
    assert (told.key, told.outcome, told.detail, told.request) == ("orders", "destroyed", "epoch 1", 0)
    assert scene.catalogue.by_name("orders") is None


def test_without_a_record_nothing_is_answered_but_the_status(scene: Scene) -> None:
    scene.encrypt()
    scene.talkers.run()
    scene.audit.problem = "No space left on device"
    before = len(scene.records)
    assert scene.outcome(scene.encrypt(grant=False)) == "AuditUnavailable"
    assert scene.outcome(scene.encrypt(verb="decrypt")) == "AuditUnavailable"
    assert scene.outcome(scene.send("stats", Empty(), client="balancer")) == "AuditUnavailable"
    number = scene.send("status", Empty())
    assert scene.outcome(number) == "ok"
    assert REPLY_CODECS["status"].decode(scene.answers[number][1]).audit == "No space left on device"
    assert len(scene.records) == before
    assert scene.handlers.pending == 0
    scene.audit.problem = ""
    assert scene.outcome(scene.encrypt(grant=False)) == "ok"


def test_a_result_whose_record_fails_is_not_given(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.encrypt()
    scene.talkers.run()
    written = scene.audit.write

    def full_after_the_request(record: Any) -> int:
        if record.event == "reply":
            raise AuditUnavailable("full")
        return written(record)

    monkeypatch.setattr(scene.audit, "write", full_after_the_request)
    assert scene.outcome(scene.encrypt(grant=False)) == "AuditUnavailable"
    assert scene.handlers.pending == 0


def test_a_hidden_name_is_in_no_record(scene: Scene) -> None:
    scene.handlers._audit_name = lambda name: name.encode().hex()
    scene.encrypt(grant=False)
    scene.encrypt()
    scene.talkers.run()
    assert scene.outcome(scene.send("encrypt", Operate("nothing", b"", b"", b"", b"", False, b""))) != "ok"
    assert {record.key for record in scene.records} == {"", b"orders".hex(), b"nothing".hex()}
    assert not [record for record in scene.records if "orders" in str(record) or "nothing" in str(record)]


# --- the token's health ---


def test_without_its_token_a_node_answers_what_needs_none(scene: Scene) -> None:
    scene.encrypt()
    scene.talkers.run()
    scene.health.problem = "the token is gone: CKR_DEVICE_REMOVED"
    for number in (scene.encrypt(), scene.encrypt(grant=False)):
        assert isinstance(scene.answers[number][1], TokenError)
        assert "the token is gone" in str(scene.answers[number][1])
    assert scene.outcome(scene.send("describe", Describe("orders", 0))) == "ok"
    assert scene.outcome(scene.send("status", Empty())) == "ok"
    assert scene.handlers.pending == 0
    scene.health.problem = ""
    assert scene.outcome(scene.encrypt(grant=False)) == "ok"


def test_a_key_that_a_renewal_took_is_gathered_again(scene: Scene, token: Token) -> None:
    scene.encrypt()
    scene.talkers.run()
    token.renew()
    assert scene.outcome(scene.encrypt(grant=False)) == "NeedGrant"
    number = scene.encrypt()
    assert scene.talkers.run() == 1
    assert scene.outcome(number) == "ok"
    assert len(scene.gatherings) == 2


def test_a_queued_job_whose_key_a_renewal_took_asks_for_a_grant(slow: Scene, token: Token) -> None:
    slow.encrypt(verb="sign")
    slow.talkers.run()
    slow.local.run()
    queued = slow.encrypt(verb="sign", grant=False)
    token.renew()
    slow.handlers.token_renewed()
    slow.local.run()
    assert slow.outcome(queued) == "NeedGrant"
    again = slow.encrypt(verb="sign")
    slow.talkers.run()
    slow.local.run()
    assert slow.outcome(again) == "ok"
    assert len(slow.handlers._cache) == 1


@pytest.mark.parametrize("algorithm", ["aes-256-gcm", "ecdsa-p384-sha384"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_full_token_gets_room_once(
    world: Any, lane: Lane, store: ShareStore, monkeypatch: pytest.MonkeyPatch, algorithm: str, times: int
) -> None:
    scene = Scene(world, lane, store, algorithm)
    verb = "encrypt" if "aes" in algorithm else "sign"
    scene.encrypt(verb=verb)
    scene.talkers.run()
    scene.local.run()
    kept = list(scene.handlers._cache._entries.values())
    scene.handlers._cache._entries = type(scene.handlers._cache._entries)({(bytes(16), 1): kept[0]})
    load, failures = Lane.load, [TokenFault("full", 0x31)] * times

    def full(*arguments: Any) -> LoadedKey:
        if failures:
            raise failures.pop()
        return load(*arguments)

    monkeypatch.setattr(Lane, "load", full)
    number = scene.encrypt(verb=verb)
    scene.talkers.run()
    scene.local.run()
    assert scene.outcome(number) == ("ok" if times == 1 else "TokenFault")
    assert [secret.closed for secret in scene.secrets] == [True, True]
    assert len(scene.handlers._cache) == (1 if times == 1 else 0)
    scene.handlers.close()
    scene.local.run()
    assert scene.objects() == 0


# --- plans ---


def planned(scene: Scene) -> Plan:
    """The plan that alice's second use of the key left."""
    scene.encrypt()
    scene.talkers.run()
    scene.encrypt(grant=False)
    (plan,) = scene.plans.values()
    return plan


def use_planned(scene: Scene, plan: Plan, spoil: Callable[[Scene], object] = lambda scene: None) -> bool:
    """Use the plan as the fast path does: lease, begin, end, settle; ``spoil`` happens within the lease."""
    handlers = scene.handlers
    lease = handlers.lease_planned(plan, scene.connection, time.monotonic())
    if lease is None:
        return False
    leased, until_s = lease
    assert 1 <= leased <= 64
    assert until_s <= time.monotonic() + 0.01
    spoil(scene)
    used = handlers.begin_planned(plan) >= 0
    handlers.settle_planned(plan, leased, used, 0, 5 * used)
    return used


def test_a_use_by_a_plan_is_counted_as_any_other(scene: Scene) -> None:
    plan = planned(scene)
    assert set(scene.plans) == {scene.world.cluster.members["alice"].curve_z85 + "encrypt"}
    before, number = dataclasses.replace(plan.count), scene.handlers.number
    hits = scene.handlers._cache.statistics().hits
    assert use_planned(scene, plan)
    assert scene.handlers.number == number + 1
    assert plan.count == dataclasses.replace(before, requests=before.requests + 1, busy_us=before.busy_us + 5)
    assert scene.handlers._cache.statistics().hits == hits + 1
    assert scene.handlers.pending == 0


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda scene: setattr(scene.health, "problem", "the token hangs"),
        lambda scene: scene.catalogue.put(scene.catalogue.by_id(scene.dealt.key_id).row),  # type: ignore[union-attr]
        lambda scene: setattr(scene.lane, "generation", scene.lane.generation + 1),
    ],
    ids=["health", "catalogue", "token"],
)
def test_a_plan_is_not_followed_once_anything_changed(
    scene: Scene, spoil: Callable[[Scene], object], leased: bool
) -> None:
    """Be it before uses were leased or after it."""
    plan = planned(scene)
    under_way, generation = scene.handlers.pending, scene.lane.generation
    uses = scene.handlers._cache.statistics().hits
    try:
        if leased:
            assert not use_planned(scene, plan, spoil)
        else:
            spoil(scene)
            assert not use_planned(scene, plan)
        assert scene.handlers.pending == under_way
        assert scene.handlers._cache.statistics().hits == uses
    finally:
        scene.lane.generation = generation


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scene: setattr(scene.connection, "member", "bob"),
        lambda scene: setattr(scene.handlers._admission, "under_way", ServiceLimits().requests),
        lambda scene: scene.handlers._cache.clear("flushed"),
        lambda scene: scene.handlers._admission.take("alice", 10**6, time.monotonic() + 1e9),
    ],
    ids=["connection", "overload", "cache", "rate"],
)
def test_nothing_is_leased_that_is_not_there(scene: Scene, spoil: Callable[[Scene], object]) -> None:
    plan = planned(scene)
    limits = scene.handlers._admission._buckets["alice"]
    for _ in range(60):
        spoil(scene)
    level, uses = limits._level, scene.handlers._cache.statistics().hits
    assert scene.handlers.lease_planned(plan, scene.connection, time.monotonic()) is None
    assert limits._level == pytest.approx(level, abs=1)
    assert scene.handlers._cache.statistics().hits == uses


def test_a_plan_spends_the_keys_uses(world: Any, lane: Lane, store: ShareStore) -> None:
    scene = Scene(world, lane, store, max_uses=4)
    plan = planned(scene)  # two of them
    assert [use_planned(scene, plan) for _ in range(4)] == [True, True, False, False]
    assert scene.handlers._cache.statistics().hits == 3
    scene.handlers.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda scene: scene.send("flush", Flush("orders")),
        lambda scene: scene.handlers.token_renewed(),
        lambda scene: scene.handlers.members_changed(scene.world.cluster, scene.world.cluster),
        lambda scene: scene.handlers.close(),
    ],
    ids=["flush", "renewal", "manifest", "close"],
)
def test_plans_are_forgotten_with_what_they_go_by(scene: Scene, change: Callable[[Scene], object]) -> None:
    planned(scene)
    change(scene)
    assert not scene.plans


def test_a_use_with_a_grant_or_of_the_slow_lane_leaves_no_plan(scene: Scene, slow: Scene) -> None:
    scene.encrypt()
    scene.talkers.run()
    assert not scene.plans
    for _ in range(2):
        slow.encrypt(verb="sign")
        slow.talkers.run()
        slow.local.run()
    assert not slow.plans


def test_a_failed_use_by_a_plan_is_recorded_and_answered(scene: Scene) -> None:
    plan = planned(scene)
    count = len(scene.records)
    assert scene.handlers.begin_planned(plan) == 0
    scene.handlers.fail_planned(plan, 2, 99, scene.connection, time.monotonic(), InvalidTag("changed"))
    assert scene.outcome(99) == "InvalidTag"
    assert [(each.event, each.member, each.outcome) for each in scene.records[count:]] == [
        ("request", "alice", ""),
        ("reply", "alice", "invalid-tag"),
    ]
    assert (plan.count.errors, scene.handlers.pending) == (1, 0)


def test_a_member_that_is_removed_during_its_use_gets_no_result(scene: Scene) -> None:
    """Another thread may take a newer manifest while the token works: nobody is answered by the one of before."""
    plan, world = planned(scene), scene.world
    assert scene.handlers.begin_planned(plan) == 0
    without = SimpleNamespace(
        by_curve={curve: each for curve, each in world.cluster.by_curve.items() if each.name != "alice"},
        members={name: each for name, each in world.cluster.members.items() if name != "alice"},
        group_of=world.cluster.group_of,
    )
    scene.handlers._source = SimpleNamespace(cluster=without)  # type: ignore[assignment]
    with pytest.raises(AccessDenied, match="'alice' is no member any more") as refused:
        scene.handlers.check_plan(plan)
    scene.handlers.fail_planned(plan, 2, 99, scene.connection, time.monotonic(), refused.value)
    assert scene.outcome(99) == "AccessDenied"
    assert not scene.audit.recorded
    assert [each.outcome for each in scene.records[-2:]] == ["", "access-denied"]
    assert scene.handlers.pending == 0


def test_a_use_that_a_worker_made_is_counted_when_it_is_done(scene: Scene) -> None:
    plan = planned(scene)
    before = dataclasses.replace(plan.count)
    assert scene.handlers.begin_aside(plan)
    assert scene.handlers.pending == 1
    assert scene.handlers.end_aside(plan, 5, 900, 800) == 0
    assert scene.audit.recorded == [(plan.lines, 5, 900)]
    assert plan.count == dataclasses.replace(before, requests=before.requests + 1, busy_us=before.busy_us + 800)


def test_no_more_uses_wait_for_a_worker_than_a_member_may_have_under_way(scene: Scene) -> None:
    plan = planned(scene)
    most = scene.handlers._admission._limits.member_requests
    assert [scene.handlers.begin_aside(plan) for _ in range(most + 1)] == [True] * most + [False]


def test_a_use_of_a_worker_that_cannot_be_recorded_is_not_counted_as_good(scene: Scene) -> None:
    plan = planned(scene)
    before = plan.count.requests, plan.count.errors
    assert scene.handlers.begin_aside(plan)
    scene.audit.problem = "the disk is full"
    with pytest.raises(AuditUnavailable) as failure:
        scene.handlers.end_aside(plan, 5, 900, 800)
    scene.handlers.fail_aside(plan, 2, 98, 5, scene.connection, time.monotonic(), failure.value)
    assert scene.outcome(98) == "AuditUnavailable"
    assert (plan.count.requests, plan.count.errors) == (before[0] + 1, before[1] + 1)
    assert scene.handlers.pending == 0
