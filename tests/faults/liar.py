"""A balancer in wrong hands: it has the real one's keys and port, and answers as it likes. It runs in a thread."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from harness import BALANCER, FaultCluster

from engine.client.config import load_identity
from engine.client.listener import Incoming, Listener
from engine.client.publications import Gate, curve_server
from engine.errors import EngineError, KeyNotFound, RegistryUnavailable
from engine.protocol.manifest import AbortNotice, aborts
from engine.protocol.requests import (
    REGISTRY_ABORT,
    REGISTRY_CHANGE,
    REGISTRY_COMMIT,
    REGISTRY_DESTROY,
    REGISTRY_OUTCOME,
    REGISTRY_RESERVE,
    REGISTRY_SYNC,
    REPLY_CODECS,
    REQUEST_CODECS,
    TABLE,
    Committed,
    Empty,
    OutcomeReply,
    Reserved,
    SyncEntry,
    SyncPage,
    Table,
)
from engine.protocol.signed import SigningKey, sign_envelope
from engine.protocol.table import RoutingTable, pack_service, seal_table
from engine.protocol.wire import Status

TICK_S = 0.1
Answer = Callable[[Incoming, Any], Any]


class Liar:
    """Serves at the balancer's endpoints until closed. ``answers`` are by verb; what has none is refused."""

    def __init__(
        self,
        cluster: FaultCluster,
        rng: random.Random,
        answers: Mapping[str, Answer] | None = None,
        tables: Callable[[], bytes] | None = None,
    ) -> None:
        self.rng = rng
        self.identity = load_identity(cluster.path / "balancer" / "identity.toml")
        self.cluster = cluster.cluster
        self.asked: Counter[str] = Counter()
        self.published = 0
        self._answers = dict(answers or {})
        self._tables = tables
        self._member = self.cluster.members[BALANCER]
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="liar", daemon=True)
        self._thread.start()
        if not self._ready.wait(10) or self._failure is not None:
            raise RuntimeError(f"the lying balancer does not serve: {self._failure}")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def answer(self, verb: str, how: Answer) -> None:
        self._answers[verb] = how

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        try:
            gate = Gate(context, self.cluster)
            listener = Listener(self.identity.transport, self._member.endpoint, self.cluster)
            publisher: zmq.Socket[bytes] = context.socket(zmq.PUB)
            curve_server(publisher, self.identity.transport)
            publisher.bind(self._member.publish_endpoint)
        except Exception as error:  # told by the constructor
            self._failure = error
            self._ready.set()
            context.destroy(linger=0)
            return
        self._ready.set()
        next_s = 0.0
        while not self._stop.is_set():
            listener.router.poll(20)
            while (incoming := listener.receive()) is not None:
                self._reply(listener, incoming)
            if self._tables is not None and time.monotonic() >= next_s:
                publisher.send(self._tables())
                self.published += 1
                next_s = time.monotonic() + TICK_S
        publisher.close(0)
        listener.close()
        gate.close()
        context.destroy(linger=0)

    def _reply(self, listener: Listener, incoming: Incoming) -> None:
        verb = incoming.request.verb
        self.asked[verb] += 1
        how = self._answers.get(verb)
        try:
            if verb == TABLE and self._tables is not None:
                told: Any = Table(self._tables())
            elif how is None:
                raise RegistryUnavailable("no")
            else:
                told = how(incoming, REQUEST_CODECS[verb].decode(incoming.request.body))
            body = told if isinstance(told, bytes) else REPLY_CODECS[verb].encode(told)
        except (EngineError, ValueError) as error:
            listener.fail(incoming, error)
        else:
            listener.reply(incoming, Status.OK, body)

    # --- lies ---

    def notice(self, key_id: bytes, attempt: int) -> bytes:
        """A signed word that an attempt was aborted."""
        return sign_envelope("abort", 1, aborts.encode(AbortNotice(key_id, attempt)), self.identity.signing)


def table(
    liar_key: SigningKey,
    nodes: list[str],
    classes: list[str],
    *,
    order: tuple[int, int],
    lifetime_ms: int = 10_000,
    service_us: Callable[[int, int], int] = lambda row, column: 100,
    price: Callable[[int], int] = lambda column: 0,
    groups: list[tuple[int, list[int]]] | None = None,
    hints: list[tuple[int, list[int]]] | None = None,
    cap: int = 1000,
) -> bytes:
    """A routing table with such values, signed."""
    now_ms = time.time_ns() // 1_000_000
    rows, columns = range(len(classes)), range(len(nodes))
    made = RoutingTable(
        fencing_epoch=order[0],
        counter=order[1],
        issued_ms=now_ms,
        expires_ms=max(0, now_ms + lifetime_ms),
        nodes=nodes,
        classes=classes,
        service=pack_service([[service_us(row, column) for column in columns] for row in rows]),
        price=[price(column) for column in columns],
        caps=[cap for _ in rows],
        groups=groups or [],
        hints=hints or [],
        forecast=[(0, 0) for _ in rows],
    )
    return seal_table(made, liar_key)


def stranger() -> SigningKey:
    """A signing key under the balancer's name that no manifest has."""
    return SigningKey(BALANCER, Ed25519PrivateKey.generate())


def lies(liar: Liar, key_ids: list[bytes]) -> dict[str, Answer]:
    """Answers of a registry that says whatever does harm: aborts of committed keys, forged certificates and orders."""
    rng = liar.rng

    def outcome(incoming: Incoming, body: Any) -> OutcomeReply:
        del incoming
        return OutcomeReply("aborted", liar.notice(body.key_id, body.attempt))

    def sync(incoming: Incoming, body: Any) -> SyncPage:
        del incoming, body
        entries = []
        for key_id in rng.sample(key_ids, min(8, len(key_ids))):
            state = rng.choice(("destroyed", "committed"))
            entries.append(SyncEntry(key_id, state, rng.randbytes(50), rng.randbytes(50), rng.randbytes(50), b""))
        return SyncPage(entries, False, rng.randrange(2**31), rng.randrange(2**31))

    def reserve(incoming: Incoming, body: Any) -> Reserved:
        del incoming, body
        notices = [liar.notice(key_id, 1) for key_id in rng.sample(key_ids, min(4, len(key_ids)))]
        return Reserved(rng.randrange(1, 1000), ["node1", "node1", "node2"], notices, b"", b"")

    def commit(incoming: Incoming, body: Any) -> Committed:
        del incoming, body
        return Committed(sign_envelope("certificate", 1, rng.randbytes(60), liar.identity.signing))

    def destroyed(incoming: Incoming, body: Any) -> Empty:
        del incoming, body
        raise KeyNotFound("no such key")

    return {
        REGISTRY_OUTCOME: outcome,
        REGISTRY_ABORT: outcome,
        REGISTRY_SYNC: sync,
        REGISTRY_RESERVE: reserve,
        REGISTRY_CHANGE: reserve,
        REGISTRY_COMMIT: commit,
        REGISTRY_DESTROY: destroyed,
    }


def stale_books(fencing_epoch: int) -> dict[str, Answer]:
    """A registry that knows nothing, in an epoch of its choice."""

    def sync(incoming: Incoming, body: Any) -> SyncPage:
        del incoming, body
        return SyncPage([], False, 0, fencing_epoch)

    return {REGISTRY_SYNC: sync}


def garbage(rng: random.Random) -> dict[str, Answer]:
    """Answers that are no messages at all."""

    def say(incoming: Incoming, body: Any) -> bytes:
        del incoming, body
        return rng.randbytes(rng.randint(0, 300))

    verbs = (
        REGISTRY_OUTCOME,
        REGISTRY_ABORT,
        REGISTRY_SYNC,
        REGISTRY_RESERVE,
        REGISTRY_CHANGE,
        REGISTRY_COMMIT,
        REGISTRY_DESTROY,
    )
    return dict.fromkeys(verbs, say)
