"""The receiving end of a node's socket over CURVE: what is served by a plan, what is handed over, and how it waits."""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import zmq
from ports import free_port

from engine.client._histogram import Histograms
from engine.client._router import Connection, Router
from engine.client.config import Identity, create_identity
from engine.client.listener import Incoming, Listener
from engine.client.transport import connect_options
from engine.errors import AccessDenied, AuditUnavailable, DeadlineExceeded, InvalidTag
from engine.protocol.audit import use_lines
from engine.protocol.manifest import PolicyRule, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, STAGES, Operate
from engine.protocol.wire import MAX_DATA, PROTOCOL_VERSION, Request, Status, reply_codec, request_codec
from nodes._fastpath import REQUESTS, FastPath, Plan
from nodes._usebuffer import UseBuffer
from nodes.workers import Mailbox, Worker

KEY_ID = bytes(range(16))
LINES = use_lines(node="n1", boot="boot", member="app", verb="encrypt", key="orders")


class Hands:
    """In place of ``Handlers``: it lets plans be followed as long as ``willing``, and notes what comes."""

    def __init__(self) -> None:
        self.number = 0
        self.willing = self.holds = True
        self.uses, self.lease_s, self.leases = 64, 60.0, 0
        self.settled: list[tuple[int, int, int]] = []
        self.handled: list[Incoming] = []
        self.failed: list[tuple[int, Exception]] = []
        self.lost = 0
        self.broke: list[Exception] = []
        self.refusal: Exception | None = None
        self.fault: Exception | None = None
        self.under_way = 0
        self.ended: list[int] = []

    def handle(self, incoming: Incoming) -> None:
        self.handled.append(incoming)

    def lease_planned(self, plan: Plan, connection: Connection, now_s: float) -> tuple[int, float] | None:
        if not self.willing:
            return None
        if self.fault is not None:
            raise self.fault
        assert connection.user
        assert abs(now_s - time.monotonic()) < 5
        self.leases += 1
        return self.uses, now_s + self.lease_s

    def settle_planned(self, plan: Plan, leased: int, used: int, failed: int, busy_us: int) -> None:
        self.settled.append((leased, used, failed))
        assert busy_us >= used - failed

    def begin_planned(self, plan: Plan) -> int:
        self.number += self.holds
        return 7 if self.holds else -1

    def check_plan(self, plan: Plan) -> None:
        if self.refusal is not None:
            raise self.refusal

    def begin_aside(self, plan: Plan) -> bool:
        self.under_way += self.holds
        return self.holds

    def end_aside(self, plan: Plan, number: int, elapsed_us: int, busy_us: int) -> int:
        assert elapsed_us >= busy_us > 0
        self.under_way -= 1
        self.ended.append(number)
        return 7

    def fail_aside(
        self,
        plan: Plan,
        version: int,
        request: int,
        number: int,
        connection: Connection,
        started_s: float,
        error: Exception,
    ) -> None:
        self.under_way -= 1
        self.failed.append((request, error))

    def overdue(self) -> NoReturn:
        raise DeadlineExceeded("too late")

    def plan_broke(self, error: Exception) -> None:
        self.broke.append(error)

    def fail_planned(
        self, plan: Plan, version: int, number: int, connection: Connection, started_s: float, error: Exception
    ) -> None:
        self.failed.append((number, error))

    def lose(self) -> None:
        self.lost += 1


class Place:
    """A listener with its fast path, and a client's socket to it."""

    def __init__(self, folder: Path) -> None:
        operator = create_identity(folder / "op.toml", "op", "operator", passphrase="p")
        node: Identity = create_identity(folder / "n1.toml", "n1", "node")
        self.client = create_identity(folder / "app.toml", "app", "client")
        chain = issue_cluster_manifest(
            name="test",
            members=[
                operator.member(),
                node.member(endpoint=f"tcp://127.0.0.1:{free_port()}", location="a/b"),
                self.client.member(),
            ],
            rules=[PolicyRule("app", "*", ["*"])],
            operators=[operator.signing],
        )
        self.cluster = open_chain(chain, chain_pin(chain))
        member = self.cluster.members["n1"]
        self.context: zmq.Context[Any] = zmq.Context()
        self.listener = Listener(node.transport, member.endpoint, self.cluster)
        self.hands = Hands()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.fast = FastPath(self.listener.router, self.bell, lowest=1, highest=2)
        self.uses = UseBuffer(str(folder / "uses"), lambda: 1, lambda: None, lambda: None)
        self.drained = 0
        self.fast.serve(self.listener.open, self.hands.lose, self.hands, self.uses, self.drain)
        self.fast.cluster = self.cluster
        self.reconnect()

    def drain(self) -> None:
        """As the audit log does, but nobody keeps the lines."""
        self.drained += self.uses.count
        _, _, count, end = self.uses.chained(1, bytes(32))
        self.uses.take(count, end, 0)

    @property
    def recorded(self) -> list[int]:
        """The numbers of the uses that wait to be chained."""
        return [json.loads(b"{" + body)["request"] for body in self.uses.waiting()[::2]]

    def reconnect(self) -> None:
        """The client goes on by another connection."""
        if hasattr(self, "socket"):
            self.socket.close(0)
        self.socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        connect_options(self.socket, self.client.transport, self.cluster.members["n1"])
        self.socket.connect(self.cluster.members["n1"].endpoint)

    def close(self) -> None:
        self.socket.close(0)
        self.listener.close()
        self.context.destroy(0)
        os.close(self.bell)

    def plan(self, **changes: Any) -> Plan:
        values: dict[str, Any] = {
            "member": "app", "verb": "encrypt", "name": "orders", "cluster": self.cluster, "entry": None,
            "loaded": None, "cached_as": None, "count": None, "group": 1, "request_class": "encrypt/aes-256-gcm",
            "key_id": KEY_ID, "use": lambda data, associated, proof: b"<" + data + b"|" + associated + proof + b">",
            "digested": False, "associated": True, "proves": False, "newest": True, "most": MAX_DATA, "lines": LINES,
        }  # fmt: skip
        plan = Plan(**(values | changes))
        for key_id in (KEY_ID, b""):
            self.fast.remember(self.client.member().curve_z85, key_id, plan)
        return plan

    def send(self, number: int, verb: str = "encrypt", extensions: dict[str, bytes] | None = None, **body: Any) -> None:
        values: dict[str, Any] = {
            "key": "orders", "key_id": KEY_ID, "data": b"data", "associated_data": b"", "proof": b"",
            "digested": False, "grant": b"",
        }  # fmt: skip
        message = REQUEST_CODECS[verb].encode(Operate(**(values | body)))
        self.socket.send(request_codec.encode(Request(PROTOCOL_VERSION, number, verb, 1000, message, extensions or {})))

    def take(self, count: int = 1) -> None:
        """Take in so many messages."""
        until_s = time.monotonic() + 20
        while count > 0 and time.monotonic() < until_s:
            self.fast.wait(100)
            count -= self.fast.take_in(count)
        assert count == 0

    def answer(self) -> tuple[int, bytes]:
        """The id and the data of the next reply, which has to be good."""
        assert self.socket.poll(10_000)
        reply = reply_codec.decode(self.socket.recv())
        assert (reply.status, reply.load.queue, reply.load.loaded) == (Status.OK, 7, True)
        return reply.id, REPLY_CODECS["encrypt"].decode(reply.body).data


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def test_a_request_that_fits_is_served_recorded_and_answered(place: Place) -> None:
    place.plan()
    for number, data in enumerate((b"", b"data", bytes(MAX_DATA)), 1):
        place.send(number, data=data, associated_data=b"aad")
        place.take()
        assert place.answer() == (number, b"<" + data + b"|aad>")
    place.send(4, key_id=b"")
    place.take()
    assert place.answer() == (4, b"<data|>")
    assert place.recorded == [1, 2, 3, 4]
    assert (place.fast.served, place.hands.handled) == (4, [])
    place.fast.settle()
    assert place.hands.settled == [(64, 4, 0)]


def test_where_the_time_of_a_use_goes_is_noted_once_it_is_answered(place: Place) -> None:
    times = Histograms(len(STAGES))

    def use(data: bytes, associated: bytes, proof: bytes) -> bytes:
        if data == b"bad":
            raise InvalidTag("changed")
        return data

    place.plan(times=times, use=use)
    place.send(1)
    place.send(2, data=b"bad")  # which is the ordinary way's to note
    place.take(2)
    assert place.answer()[0] == 1
    stages = ("policy", "token", "audit", "reply", "total")
    assert {name: times.count(number) for number, name in enumerate(STAGES)} == {
        name: int(name in stages) for name in STAGES
    }
    parts = [times.sum_s(number) for number, name in enumerate(STAGES) if name != "total"]
    assert sum(parts) == pytest.approx(times.sum_s(STAGES.index("total")))


@pytest.mark.parametrize(
    "request_",
    [
        {"verb": "decrypt"},
        {"key": "others"},
        {"key_id": bytes(16)},
        {"digested": True},
        {"proof": b"proof"},
        {"grant": b"grant"},
        {"extensions": {"x": b"y"}},
        {"data": bytes(MAX_DATA + 1)},
    ],
    ids=lambda request_: next(iter(request_)),
)
def test_what_fits_no_plan_goes_the_ordinary_way_as_it_came(place: Place, request_: dict[str, Any]) -> None:
    place.plan()
    place.send(9, **request_)
    place.take()
    (incoming,) = place.hands.handled
    assert (incoming.member.name, incoming.request.id) == ("app", 9)
    assert incoming.connection is not None
    assert incoming.connection.member == "app"
    if "extensions" not in request_:
        body = REQUEST_CODECS[incoming.request.verb].decode(incoming.request.body)
        for name, value in request_.items():
            assert name == "verb" or getattr(body, name) == value
    assert place.fast.served == 0


def test_a_plan_that_may_not_be_followed_or_is_forgotten_is_not(place: Place) -> None:
    place.plan()
    place.hands.willing = False
    place.send(1)
    place.take()
    place.hands.willing = True
    assert place.fast.plans == 2
    place.fast.forget()
    assert place.fast.plans == 0
    place.send(2)
    place.take()
    assert [each.request.id for each in place.hands.handled] == [1, 2]


def test_a_lease_ends_with_its_uses_its_time_and_its_connection(place: Place) -> None:
    place.plan()
    place.hands.uses = 2
    for number in range(1, 6):
        place.send(number)
        place.take()
    assert place.hands.settled == [(2, 2, 0), (2, 2, 0)]
    place.hands.lease_s = 0.0
    place.fast.settle()
    for number in range(6, 8):
        place.send(number)
        place.take()
    assert place.hands.settled[2:] == [(2, 1, 0), (2, 1, 0)]
    place.hands.lease_s = 60.0
    place.fast.settle()
    place.send(8)
    place.take()
    place.hands.settled.clear()
    place.reconnect()
    place.send(9)
    place.take()
    assert place.hands.settled == [(2, 1, 0)]
    assert place.hands.leases == 7
    assert place.fast.served == 9


def test_nobody_else_is_served_beside_a_lease(place: Place) -> None:
    """Whoever goes the ordinary way finds all counted, and the rest given back."""
    place.plan()
    place.send(1)
    place.send(2, key="others")
    place.take(2)
    assert place.hands.settled == [(64, 1, 0)]
    place.send(3)
    place.take()
    place.fast.forget()
    assert place.hands.settled[1:] == [(64, 1, 0)]


def test_a_plan_that_does_not_hold_any_more_serves_nothing(place: Place) -> None:
    place.plan()
    place.send(1)
    place.take()
    place.hands.holds = False
    place.send(2)
    place.take()
    assert [each.request.id for each in place.hands.handled] == [2]
    assert place.hands.settled == [(64, 1, 0)]


def test_one_members_plan_serves_no_other(place: Place) -> None:
    plan = place.plan()
    place.fast.forget()
    place.fast.remember("0" * 40, KEY_ID, plan)
    place.send(1)
    place.take()
    assert [each.request.id for each in place.hands.handled] == [1]


def test_a_use_that_fails_is_told_and_the_next_is_served(place: Place) -> None:
    def use(data: bytes, associated: bytes, proof: bytes) -> bytes:
        if data == b"bad":
            raise InvalidTag("changed")
        return data

    place.plan(use=use)
    place.send(1, data=b"bad")
    place.send(2, data=b"good")
    place.take(2)
    ((number, error),) = place.hands.failed
    assert (number, str(error)) == (1, "changed")
    place.fast.settle()
    assert place.hands.settled == [(64, 2, 1)]
    assert place.answer() == (2, b"good")


def test_a_use_that_may_not_be_answered_any_more_brings_no_result(place: Place) -> None:
    """Where it can't be recorded, or its member was removed meanwhile: the error is answered in its place."""

    def use(data: bytes, associated: bytes, proof: bytes) -> bytes:
        place.fast.cluster = object()
        return data

    place.plan(use=use)
    place.hands.refusal = AccessDenied("no member any more")
    place.send(1)
    place.take()
    place.fast.cluster = place.cluster
    place.plan()
    place.uses.refusal = lambda: AuditUnavailable("the disk is full")
    place.send(2)
    place.take()
    assert [(number, type(error)) for number, error in place.hands.failed] == [
        (1, AccessDenied),
        (2, AuditUnavailable),
    ]
    assert place.recorded == []
    assert not place.socket.poll(100)


def test_no_plan_is_followed_under_another_manifest_than_its_own(place: Place) -> None:
    place.plan()
    place.fast.cluster = object()
    place.send(1)
    place.take()
    assert [each.request.id for each in place.hands.handled] == [1]


def test_uses_that_wait_to_be_chained_are_bounded(place: Place) -> None:
    place.plan()
    for number in range(100):
        place.send(number)
        place.take()
        place.fast.wait(0)
        assert place.uses.count < 32
    assert place.drained + place.uses.count == 100


def test_slow_uses_are_made_by_a_worker_and_answered_by_the_loop(place: Place) -> None:
    loop, threads = threading.get_ident(), set()

    def use(data: bytes, associated: bytes, proof: bytes) -> bytes:
        threads.add(threading.get_ident())
        if data == b"bad":
            raise InvalidTag("changed")
        time.sleep(0.0001)
        return data + associated

    mailbox = Mailbox()
    worker: Worker[None] = Worker("slow", mailbox, lambda: None, lambda state: None)
    try:
        place.plan(use=use, worker=worker)
        for number, data in enumerate((b"one", b"bad", bytes(MAX_DATA)), 1):
            place.send(number, data=data, associated_data=b"+")
            place.take()
            assert select.select([mailbox], [], [], 20)[0]
            assert place.hands.under_way == 1
            mailbox.run()
        assert place.hands.under_way == 0
        assert threads
        assert loop not in threads
        assert [place.answer() for _ in range(2)] == [(1, b"one+"), (3, bytes(MAX_DATA) + b"+")]
        assert [(number, str(error)) for number, error in place.hands.failed] == [(2, "changed")]
        assert place.hands.ended == [1, 3]
        place.fast.settle()
        assert place.hands.settled == [(64, 3, 3)], "the lease counted what is counted when it is done"
    finally:
        worker.finish()
        worker.join(20)
        mailbox.close()


def test_a_plan_that_breaks_costs_nothing_but_itself(place: Place) -> None:
    place.plan()
    place.hands.fault = KeyError("gone")
    place.send(1)
    place.take()
    assert [each.request.id for each in place.hands.handled] == [1]
    assert place.hands.broke == [place.hands.fault]


def test_garbage_is_handed_over(place: Place) -> None:
    place.plan()
    for frames in ([b""], [b"\x96"], [os.urandom(60)], [b"two", b"frames"]):
        place.socket.send_multipart(frames)
    place.send(5)
    place.take(5)
    assert place.listener.refused == 4
    replies = [reply_codec.decode(place.socket.recv()) for _ in range(5) if place.socket.poll(5_000)]
    assert [reply.status for reply in replies] == [Status.ERROR] * 4 + [Status.OK]


def test_a_reply_that_its_client_does_not_take_is_lost_and_told(place: Place) -> None:
    place.plan(use=lambda data, associated, proof: bytes(40_000))
    for number in range(1, 4_000):
        place.send(number)
        place.take()
        if place.hands.lost:
            break
    assert place.hands.lost == 1


def test_it_waits_for_requests_and_descriptors(place: Place) -> None:
    place.send(1)
    place.take()
    assert place.fast.take_in(1) == 0
    assert place.fast.wait(0) == 0
    os.eventfd_write(place.bell, 1)
    assert place.fast.wait(1_000) == 2
    place.fast.paused = True
    place.send(2)
    assert place.fast.wait(0) == 2
    place.fast.unwatch(place.bell)
    assert select.select([place.listener.router.fileno()], [], [], 10)[0]  # it is there
    assert place.fast.wait(0) == 0
    place.fast.paused = False
    assert place.fast.wait(1_000) == REQUESTS
    place.take()


def test_a_request_ends_the_wait_of_an_idle_node(place: Place) -> None:
    """Whether it spins or sleeps: none of many requests, sent while it waits, is slept over."""
    place.plan()
    place.send(0)
    place.take()
    place.answer()

    def send() -> None:
        for number in range(1, 301):
            place.send(number)
            place.answer()
            if number % 10 == 0:
                time.sleep(0.002)

    client = threading.Thread(target=send)
    client.start()
    begun_s = time.monotonic()
    while place.fast.served < 301 and time.monotonic() < begun_s + 60:
        place.fast.wait(30_000)
        place.fast.take_in(10)
    client.join(60)
    assert place.fast.served == 301
    assert time.monotonic() - begun_s < 25, "a request was noticed by the end of a wait only"


def test_there_is_a_bound_on_the_descriptors_beside_it() -> None:
    router = Router(lambda user: False, limit=1_000, replies_max=1)
    bells = [os.eventfd(0) for _ in range(17)]
    try:
        with pytest.raises(ValueError, match="more than 16 descriptors"):
            FastPath(router, *bells, lowest=1, highest=2)
    finally:
        router.close()
        for each in bells:
            os.close(each)
