"""Where the attacks are played: the connections, the throw-away keys, and the look whether the cluster is still well.

It makes keys under a prefix of its own and destroys them at the end, whatever happens. It judges no attack.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import zmq
from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from engine.attack.model import Options, Trial, Undecided
from engine.attack.target import PREFIX, Target
from engine.client.client import ClientSettings, Engine, connect
from engine.client.config import Identity
from engine.client.transport import Channel, raise_for_status
from engine.errors import (
    AccessDenied,
    DeadlineExceeded,
    EngineError,
    KeyNotFound,
    NodeUnavailable,
)
from engine.keys import RequestType
from engine.protocol.grant import issue_grant
from engine.protocol.manifest import KeyRecord, Member, open_key_manifest
from engine.protocol.requests import (
    HELLO,
    REPLY_CODECS,
    REQUEST_CODECS,
    Describe,
    Flush,
    Hello,
    KeyDescription,
    Operate,
    ServedLimits,
    Welcome,
)
from engine.protocol.wire import PROTOCOL_VERSION

__all__ = ["REFUSALS", "Answer", "Serving", "Stage", "answer_of", "judge", "now_ms"]

PATIENCE_S: Final = 20.0
"""How long an honest request may take, its retries included, before the cluster counts as harmed."""
WINDOW: Final = 48
GRANT_MS: Final = 10_000
REFUSALS: Final = frozenset(
    {"access-denied", "need-grant", "stale-key", "manifest-error", "protocol-error", "invalid-request"}
)
"""Codes that refuse a message for what it is, and not for the state of the cluster."""


def now_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: a code (``ok``, an error's, ``no-answer``, ``cut``, ``closed``), its text, an ok reply's body."""

    code: str
    text: str = ""
    body: bytes = field(default=b"", repr=False)
    loaded: bool = False

    @property
    def seen(self) -> str:
        """The code and the text, for the report; never a body."""
        return f"{self.code}: {self.text}" if self.text else self.code


@dataclass(frozen=True, slots=True)
class Serving:
    """A member's start and software, as its ``hello`` tells them."""

    boot: bytes
    software: str
    serial: int
    limits: ServedLimits


class Stage:
    """One run's connections and keys; a context manager that destroys what it made."""

    def __init__(self, target: Target, options: Options) -> None:
        self.target = target
        self.options = options
        self.cluster = target.cluster
        self.shuffle("")
        self.run_id = os.urandom(4).hex()
        self.context: zmq.Context[Any] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 65_535)
        self.first = connect(target.first)
        self.second = connect(target.second) if target.second else None
        self.serving: dict[str, Serving] = {}
        self.names: dict[str, str] = {}
        """The throw-away keys: a short word for each, and its full name."""
        self.leftovers: list[str] = []
        """Keys of this run that could not be destroyed."""
        self.earlier: tuple[str, ...] = ()
        """Keys of other runs, which were killed or still go on; they are left alone."""
        self._made: list[str] = []
        self._channels: dict[str, Channel] = {}
        self._records: dict[str, KeyRecord] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Destroy the keys, each within a bounded time, and close every connection."""
        for name in self._made:
            try:
                self.first.destroy_key(name, timeout=PATIENCE_S)
            except KeyNotFound:
                pass
            except (EngineError, ValueError):
                self.leftovers.append(name)
        self._made.clear()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self.first.close()
        if self.second is not None:
            self.second.close()
        self.context.destroy(linger=0)

    def shuffle(self, attack: str) -> None:
        """Begin the choices of an attack anew from the seed, so that they do not depend on those before it."""
        self.random = random.Random(f"{self.options.seed}/{attack}")  # noqa: S311 - chooses, and guards nothing

    # --- who and where ---

    @property
    def me(self) -> Identity:
        """The first client."""
        return self.target.first.identity

    @property
    def neighbour(self) -> ClientSettings:
        """The second client; only for attacks that need it."""
        if self.target.second is None:
            raise Undecided("no second client")
        return self.target.second

    @property
    def honest(self) -> Engine:
        """Who works honestly beside a flood: the second client, if there is one that may use the keys of a run."""
        name = f"{PREFIX}{self.run_id}/data"
        may = self.cluster.allows
        if self.second is not None and all(may(self.second.name, verb, name) for verb in ("encrypt", "decrypt")):
            return self.second
        return self.first

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return tuple(self.cluster.nodes)

    @property
    def servers(self) -> tuple[Member, ...]:
        """Nodes and balancers."""
        return self.target.servers

    def _channel(self, identity: Identity) -> Channel:
        if identity.name not in self._channels:
            members = {member.name: member for member in self.servers}
            self._channels[identity.name] = Channel(identity.transport, members, self.context)
        return self._channels[identity.name]

    # --- well-formed requests ---

    def ask(
        self,
        requests: Sequence[tuple[str, str, bytes]],
        identity: Identity | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> list[Answer]:
        """What came back for each (peer, verb, body), in their order."""
        channel = self._channel(identity or self.me)
        answers: list[Answer | None] = [None] * len(requests)
        flying: dict[int, int] = {}
        left = iter(enumerate(requests))
        exhausted = False
        while True:
            while len(flying) < WINDOW and not exhausted:
                following = next(left, None)
                if following is None:
                    exhausted = True
                    break
                index, (peer, verb, body) = following
                try:
                    flying[channel.start(peer, verb, body, timeout_s)] = index
                except EngineError as error:
                    answers[index] = _lost(error)
            if not flying:
                break
            for arrival in channel.poll(timeout_s):
                found = flying.pop(arrival.token, None)
                if found is not None:
                    answers[found] = _lost(arrival.error) if arrival.reply is None else answer_of(arrival.reply)
        return [each or Answer("no-answer") for each in answers]

    def ask_one(self, peer: str, verb: str, message: object, identity: Identity | None = None) -> Answer:
        """What came back for one message."""
        return self.ask([(peer, verb, REQUEST_CODECS[verb].encode(message))], identity)[0]

    # --- keys ---

    def make_keys(self, algorithms: Mapping[str, str]) -> None:
        """Make throw-away keys by short names; more of them may come later."""
        for word, algorithm in algorithms.items():
            self.make_key(word, algorithm)

    def make_key(self, word: str, algorithm: str) -> str:
        """One throw-away key: n of up to five nodes, t more than half of them."""
        name = f"{PREFIX}{self.run_id}/{word}"
        shares = min(5, len(self.nodes))
        self.will_make(name)
        self.first.create_key(name, algorithm, threshold=shares // 2 + 1, shares=shares, timeout=60.0)
        self.names[word] = name
        return name

    def will_make(self, name: str) -> None:
        """Destroy that key at the end: to be said before it is made, as one that is cut off may be there too."""
        self._made.append(name)

    def record(self, word: str) -> KeyRecord:
        """The verified manifest of a throw-away key as it is now; it is asked for once."""
        if word not in self._records:
            self._records[word] = open_key_manifest(self.described(word).manifest, self.cluster)
        return self._records[word]

    def forget(self, word: str) -> None:
        """Ask for the manifest again the next time: the key has changed."""
        self._records.pop(word, None)

    def described(self, word: str) -> KeyDescription:
        """What the first node that knows the key says of it."""
        for node in self.nodes:
            answer = self.ask_one(node, RequestType.DESCRIBE, Describe(self.names[word], 0))
            if answer.code == "ok":
                told: KeyDescription = REPLY_CODECS[RequestType.DESCRIBE].decode(answer.body)
                return told
        raise Undecided(f"no node describes {self.names[word]!r}")

    def holders(self, word: str) -> tuple[str, ...]:
        """The nodes that hold a share of the key, and combine it."""
        return tuple(holder.node for holder in self.record(word).manifest.holders)

    def grant(self, word: str, combiner: str, operation: str = "encrypt") -> bytes:
        """A fresh, honest grant of the first client."""
        key = self.me.signing
        return issue_grant(key, self.record(word), operation, combiner, now_ms(), GRANT_MS, os.urandom(16))

    def operate(self, word: str, data: bytes = b"honest", grant: bytes = b"", **fields: Any) -> Operate:
        """A use of the key; ``fields`` are those of ``Operate`` that differ."""
        values = {"associated_data": b"", "proof": b"", "digested": False, "key_id": b"", "key": self.names[word]}
        return Operate(data=data, grant=grant, **{**values, **fields})

    def flush(self, word: str) -> None:
        """Have every holder let the key go."""
        body = REQUEST_CODECS[RequestType.FLUSH].encode(Flush(self.names[word]))
        for node, answer in zip(
            self.holders(word),
            self.ask([(node, RequestType.FLUSH, body) for node in self.holders(word)]),
            strict=True,
        ):
            if answer.code != "ok":
                raise Undecided(f"{node} did not flush: {answer.seen}")

    # --- is the cluster well ---

    def hello(self) -> dict[str, Serving | str]:
        """What each server says of itself, or why it does not."""
        body = REQUEST_CODECS[HELLO].encode(Hello(PROTOCOL_VERSION, ""))
        answers = self.ask([(member.name, HELLO, body) for member in self.servers])
        found: dict[str, Serving | str] = {}
        for member, answer in zip(self.servers, answers, strict=True):
            if answer.code != "ok":
                found[member.name] = answer.seen
                continue
            told: Welcome = REPLY_CODECS[HELLO].decode(answer.body)
            found[member.name] = Serving(told.boot, told.software, told.cluster_serial, told.limits)
        return found

    def begin(self) -> None:
        """See that every server answers, make the keys and use them; ``NodeUnavailable`` if the cluster is not well."""
        found = self.hello()
        silent = {name: told for name, told in found.items() if isinstance(told, str)}
        if silent:
            raise NodeUnavailable("not healthy: " + "; ".join(f"{name}: {why}" for name, why in silent.items()))
        self.serving = {name: told for name, told in found.items() if isinstance(told, Serving)}
        self.earlier = tuple(key.name for key in self.first.list_keys(f"{PREFIX}*"))
        self.make_keys({"data": "aes-256-gcm", "other": "aes-256-gcm", "sign": "ecdsa-p256-sha256"})
        self.make_keys({"mac": "hmac-sha256", "cold": "aes-256-gcm"})
        harm = self.harm()
        if harm:
            raise NodeUnavailable(f"not healthy: {harm}")

    def harm(self) -> str:
        """What is wrong with the cluster now, as an honest client sees it; empty if all is well.

        Every server must answer and be the same start as at the beginning; every node must do honest work, with right
        results, which are checked here and not taken at its word. It may take ``PATIENCE_S`` to come to itself.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            found = self.hello()
            restarted = self._restarted(found)
            if restarted:
                return restarted
            told = self._harm(found)
            if not told or time.monotonic() > until:
                return told
            time.sleep(0.2)

    def _restarted(self, found: Mapping[str, Serving | str]) -> str:
        """Which server is another start than at the beginning: no patience mends that."""
        for name, told in found.items():
            if isinstance(told, Serving) and told.boot != self.serving[name].boot:
                return f"{name} was started anew meanwhile (its boot id changed): it crashed or was restarted"
        return ""

    def _harm(self, found: Mapping[str, Serving | str]) -> str:
        for name, told in found.items():
            if isinstance(told, str):
                return f"{name} does not answer hello ({told})"
        try:
            return self._wrong_results()
        except (EngineError, ValueError) as error:
            return f"honest work fails: {type(error).__name__}: {error}"

    def _wrong_results(self) -> str:
        message = os.urandom(32)
        sent = self.first.encrypt(self.names["data"], message, associated_data=b"a")
        for node in self.holders("data"):
            grant = self.grant("data", node, "decrypt")
            opened = self.ask_one(node, RequestType.DECRYPT, self.operate("data", sent, grant, associated_data=b"a"))
            if opened.code != "ok":
                return f"{node} does not decrypt ({opened.seen})"
            if REPLY_CODECS[RequestType.DECRYPT].decode(opened.body).data != message:
                return f"{node} decrypts to something else"
        signature = self.first.sign(self.names["sign"], message)
        if not self.verifies("sign", message, signature):
            return "a signature does not verify with the public key of the key's manifest"
        if self.first.mac(self.names["mac"], message) != self.first.mac(self.names["mac"], message):
            return "two MACs of one message differ"
        return ""

    def verifies(self, word: str, message: bytes, signature: bytes) -> bool:
        """Whether an ECDSA signature is right by the public key in the manifest, checked here."""
        public = serialization.load_der_public_key(self.record(word).manifest.public_key)
        if not isinstance(public, ec.EllipticCurvePublicKey):
            return False
        try:
            public.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except PycaInvalidSignature:
            return False
        return True

    def chosen(self, count: int, most: int) -> list[int]:
        """Positions 0..count-1, or ``most`` of them drawn by the seed."""
        return list(range(count)) if count <= most else sorted(self.random.sample(range(count), most))

    def memory(self) -> dict[str, int]:
        """The resident memory of the watched processes, in KiB."""
        found = {name: resident_kib(pid) for name, pid in self.target.pids.items()}
        return {name: kib for name, kib in found.items() if kib}


def answer_of(reply: Any) -> Answer:
    """A reply as an answer."""
    try:
        raise_for_status(reply)
    except EngineError as error:
        return Answer(error.code, str(error))
    except ValueError as error:
        return Answer("invalid-request", str(error))
    return Answer("ok", body=reply.body, loaded=reply.load.loaded)


def _lost(error: EngineError | None) -> Answer:
    if isinstance(error, DeadlineExceeded):
        return Answer("no-answer", str(error))
    if isinstance(error, AccessDenied):
        return Answer("closed", str(error))
    return Answer("cut", str(error))


def judge(
    trial: Trial,
    cases: Iterable[tuple[str, str]],
    answers: Iterable[Answer],
    held: Callable[[Answer], bool] | frozenset[str] = REFUSALS,
) -> list[Answer]:
    """Note each (what, at) with its answer; ``held`` says which are right, by default all that refuse."""
    found = list(answers)
    for (what, at), answer in zip(cases, found, strict=True):
        good = answer.code in held if isinstance(held, frozenset) else held(answer)
        trial.case(good, what, at, answer.seen)
    return found


def resident_kib(pid: int) -> int:
    """The resident memory of a process and its children; 0 for one that is gone."""
    total = 0
    for each in _family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{each}/status", encoding="ascii", errors="replace") as status:
            total += next((int(line.split()[1]) for line in status if line.startswith("VmRSS:")), 0)
    return total


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as stream:
                for child in stream.read().split():
                    yield from _family(int(child))
