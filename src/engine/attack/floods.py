"""Floods at a fixed rate, with an honest client beside them whose every answer is checked. Bounded in count and time.

Attackers and the honest client share this process, so the honest client's figures are the worst that a cluster gives
it; what is judged is that it is served, rightly, and that the nodes stay up and within their memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import zmq

from engine.attack.grants import make_grant
from engine.attack.model import Attack, NotRun, Trial
from engine.attack.sockets import CURVE_HELLO_BYTES, Keys, Line, Recorder, Script, address_of, converse, told
from engine.attack.stage import Stage, answer_of
from engine.attack.transport import hello_frame
from engine.client.client import Engine
from engine.errors import EngineError
from engine.keys import RequestType
from engine.protocol.requests import REQUEST_CODECS, Describe
from engine.protocol.wire import MAX_DATA, PROTOCOL_VERSION, Request, reply_codec, request_codec

__all__ = ["ATTACKS", "Beside", "work_beside"]

MEMORY_MAX_MIB: Final = 256
"""By how much a process may grow under one flood."""
HONEST_S: Final = 15.0
"""Deadline of an honest operation under a flood, its client's own retries included."""
DRAIN_S: Final = 5.0
REQUEST_MS: Final = 5_000
BURST_MAX: Final = 3_000
BURST_S: Final = 20.0

Frame = Callable[[int, str], bytes]
"""The flood's n-th request to a node."""


@dataclass(slots=True)
class Beside:
    """What an honest client did beside a flood; latencies in ms."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: int = 0
    ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def take(self, other: Beside) -> None:
        """Be what another thread has measured."""
        self.done, self.failed, self.wrong = other.done, other.failed, other.wrong
        self.ms, self.seconds = other.ms, other.seconds

    @property
    def per_s(self) -> float:
        """Operations a second."""
        return self.done / self.seconds if self.seconds else 0.0

    def at(self, part: float) -> float:
        """A percentile of the latencies in ms; 0 without any."""
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0

    def told(self) -> str:
        """For the report."""
        failed = f", {len(self.failed)} failed ({self.failed[0]})" if self.failed else ""
        wrong = f", {self.wrong} WRONG" if self.wrong else ""
        return (
            f"{self.done} operations, {self.per_s:.0f}/s, p50 {self.at(0.5):.1f} ms, p99 {self.at(0.99):.1f} ms"
            f"{failed}{wrong}"
        )


def work_beside(engine: Engine, name: str, seconds: float) -> Beside:
    """Encrypt and decrypt by turns for so long, one operation at a time, and check each result."""
    found = Beside()
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        message = os.urandom(64)
        try:
            started = time.perf_counter()
            sealed = engine.encrypt(name, message, timeout=HONEST_S)
            middle = time.perf_counter()
            opened = engine.decrypt(name, sealed, timeout=HONEST_S)
            ended = time.perf_counter()
        except EngineError as error:
            found.failed.append(f"{type(error).__name__}: {error}"[:160])
            continue
        found.ms += [(middle - started) * 1e3, (ended - middle) * 1e3]
        found.done += 2
        found.wrong += opened != message
    found.seconds = time.monotonic() - begun
    return found


def _baseline(stage: Stage, trial: Trial) -> Beside:
    """The honest client alone, for a moment: the control of every flood."""
    name = stage.names["data"]
    for word in ("data",):
        stage.honest.encrypt(stage.names[word], b"x", timeout=HONEST_S)
    alone = work_beside(stage.honest, name, min(1.0, stage.options.duration_s / 2))
    trial.control(
        alone.done > 0 and not alone.failed and not alone.wrong,
        f"{stage.honest.name} works alone, every result right",
        alone.told(),
    )
    trial.figures |= _figures("alone", alone)
    return alone


def _figures(what: str, told: Beside) -> dict[str, float | int | str]:
    return {
        f"{what}: honest operations/s": round(told.per_s),
        f"{what}: p50, ms": round(told.at(0.5), 1),
        f"{what}: p99, ms": round(told.at(0.99), 1),
    }


def _judge(stage: Stage, trial: Trial, before: dict[str, int], beside: Beside) -> None:
    good = beside.done > 0 and not beside.failed and not beside.wrong
    trial.case(
        good,
        "an honest client's work beside the flood",
        stage.honest.name,
        ("served: " if good else "") + beside.told(),
    )
    trial.figures |= _figures("beside the flood", beside)
    after = stage.memory()
    for name, kib in after.items():
        grown = (kib - before.get(name, kib)) / 1024
        if grown > MEMORY_MAX_MIB:
            trial.case(False, f"memory within {MEMORY_MAX_MIB} MiB", name, f"grown by {grown:.0f} MiB")
    if after:
        trial.figures["memory grown by at most, MiB"] = round(
            max((kib - before.get(name, kib)) / 1024 for name, kib in after.items()), 1
        )
    else:
        trial.note("memory was not watched: no process ids were given")


class _Flood:
    """Requests at a fixed rate over one connection to each of some nodes, and the count of what came back."""

    def __init__(self, stage: Stage, nodes: tuple[str, ...], frame: Frame, rate: float, *, reads: bool = True) -> None:
        self._stage = stage
        self._nodes = nodes
        self._frame = frame
        self._rate = rate
        self._reads = reads
        self._stop = threading.Event()
        self.sent = self.held_back = 0
        self.codes: Counter[str] = Counter()
        self.fault = ""
        self._thread = threading.Thread(target=self._run, name="attack-flood", daemon=True)

    def __enter__(self) -> _Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DRAIN_S * 4)

    def _run(self) -> None:
        try:
            self._flood()
        except (EngineError, zmq.ZMQError, ValueError) as error:
            self.fault = f"{type(error).__name__}: {error}"

    def _flood(self) -> None:
        stage = self._stage
        context: zmq.Context[Any] = zmq.Context()
        lines: list[tuple[str, Line]] = []
        try:
            for node in self._nodes:
                member = stage.cluster.nodes[node]
                own = Keys.of(stage.me.transport, member)
                lines.append(
                    (node, Line.open(context, member.endpoint, own, prepare=_small if not self._reads else _as_is))
                )
            for _, line in lines:
                line.settle(10.0)
            begun, number = time.monotonic(), 0
            while not self._stop.is_set():
                due = int((time.monotonic() - begun) * self._rate)
                while number < due and not self._stop.is_set():
                    number += 1
                    node, line = lines[number % len(lines)]
                    if line.send(self._frame(number, node)):
                        self.sent += 1
                    else:
                        self.held_back += 1
                self._read(lines)
                time.sleep(0.002)
            until = time.monotonic() + DRAIN_S
            while self._reads and sum(self.codes.values()) < self.sent and time.monotonic() < until:
                self._read(lines)
                time.sleep(0.005)
        finally:
            for _, line in lines:
                line.close()
            context.destroy(linger=0)

    def _read(self, lines: list[tuple[str, Line]]) -> None:
        if not self._reads:
            return
        for _, line in lines:
            with suppress(zmq.Again):
                for _ in range(200):
                    frames = line.socket.recv_multipart(zmq.DONTWAIT)
                    self.codes[answer_of(reply_codec.decode(frames[-1])).code] += 1


def _small(socket: zmq.Socket[bytes]) -> None:
    socket.rcvhwm = 1
    socket.rcvbuf = 4096


def _as_is(socket: zmq.Socket[bytes]) -> None:
    """Leave the socket alone."""


def _play(
    stage: Stage,
    trial: Trial,
    frame: Frame,
    allowed: frozenset[str],
    *,
    rate: float | None = None,
    reads: bool = True,
) -> None:
    _baseline(stage, trial)
    before = stage.memory()
    flood = _Flood(stage, stage.holders("data"), frame, rate or stage.options.rate, reads=reads)
    with flood:
        beside = work_beside(stage.honest, stage.names["data"], stage.options.duration_s)
    told = {"requests sent": flood.sent, "held back by our own socket": flood.held_back}
    trial.figures |= told | {f"answered {code}": count for code, count in sorted(flood.codes.items())}
    seen = ", ".join(f"{code} {count}" for code, count in flood.codes.most_common()) or "nothing was read"
    held = set(flood.codes) <= allowed and flood.sent > 0 and not flood.fault
    trial.case(
        held,
        "the flood's own answers",
        "the nodes",
        f"{'answered' if held else 'other than expected'}: {flood.fault or seen}",
    )
    missing = flood.sent - sum(flood.codes.values())
    if reads and missing:
        trial.note(f"{missing} of {flood.sent} requests had no answer within {DRAIN_S:g} s after the flood")
    _judge(stage, trial, before, beside)


def _request(number: int, verb: str, body: bytes) -> bytes:
    return request_codec.encode(Request(PROTOCOL_VERSION, number, verb, REQUEST_MS, body, {}))


def valid_requests(stage: Stage, trial: Trial) -> None:
    body = REQUEST_CODECS["encrypt"].encode(stage.operate("data", bytes(256)))
    _load(stage, "data")
    allowed = frozenset({"ok", "overloaded", "need-grant", "deadline-exceeded"})
    _play(stage, trial, lambda number, node: _request(number, "encrypt", body), allowed)


def _load(stage: Stage, word: str) -> None:
    for node in stage.holders(word):
        stage.ask_one(node, "encrypt", stage.operate(word, b"x", stage.grant(word, node)))


def bad_ciphertexts(stage: Stage, trial: Trial) -> None:
    good = stage.first.encrypt(stage.names["data"], bytes(256))
    bad = good[:-1] + bytes([good[-1] ^ 1])
    body = REQUEST_CODECS["decrypt"].encode(stage.operate("data", bad))
    _load(stage, "data")
    allowed = frozenset({"invalid-tag", "overloaded", "need-grant", "deadline-exceeded"})
    _play(stage, trial, lambda number, node: _request(number, "decrypt", body), allowed)


def gatherings(stage: Stage, trial: Trial) -> None:
    """A fresh grant each time for a key that is flushed again and again: shares are gathered all the time."""
    flush = REQUEST_CODECS["flush"].encode([stage.names["cold"]])

    def frame(number: int, node: str) -> bytes:
        if number % 3 == 0:
            return _request(number, "flush", flush)
        message = stage.operate("cold", b"x", make_grant(stage, "cold", node))
        return _request(number, "encrypt", REQUEST_CODECS["encrypt"].encode(message))

    allowed = frozenset({"ok", "overloaded", "deadline-exceeded", "quorum-unavailable"})
    stage.record("cold")
    _play(stage, trial, frame, allowed, rate=stage.options.rate / 4)


def unknown_keys(stage: Stage, trial: Trial) -> None:
    prefix = stage.names["data"]

    def frame(number: int, node: str) -> bytes:
        return _request(
            number, RequestType.DESCRIBE, REQUEST_CODECS["describe"].encode(Describe(f"{prefix}-{number}", 0))
        )

    allowed = frozenset({"key-not-found", "moved", "overloaded", "deadline-exceeded"})
    _play(stage, trial, frame, allowed)


def big_messages(stage: Stage, trial: Trial) -> None:
    body = REQUEST_CODECS["encrypt"].encode(stage.operate("data", bytes(MAX_DATA), associated_data=bytes(4096)))
    _load(stage, "data")
    allowed = frozenset({"ok", "overloaded", "need-grant", "deadline-exceeded"})
    _play(stage, trial, lambda number, node: _request(number, "encrypt", body), allowed, rate=stage.options.rate / 4)


def never_reads(stage: Stage, trial: Trial) -> None:
    """A client that sends, and never takes an answer in."""
    body = REQUEST_CODECS["encrypt"].encode(stage.operate("data", bytes(16_384)))
    _load(stage, "data")
    _play(stage, trial, lambda number, node: _request(number, "encrypt", body), frozenset(), reads=False)


def handshakes(stage: Stage, trial: Trial) -> None:
    """Connections that get as far as one can without a key: the server answers each HELLO with a WELCOME."""
    node = stage.cluster.nodes[stage.holders("data")[0]]
    with Recorder(node.endpoint) as recorder:
        line = Line.open(stage.context, recorder.endpoint, Keys.of(stage.me.transport, node))
        try:
            good = line.settle(10.0) == "up" and line.send(hello_frame()) and line.receive(10.0)
        finally:
            line.close()
        sent = recorder.sent[: 64 + CURVE_HELLO_BYTES]
    trial.control(bool(good), "the handshake whose HELLO is sent again and again was good")
    _baseline(stage, trial)
    before = stage.memory()
    stop = threading.Event()
    counts: Counter[str] = Counter()
    rate = stage.options.rate / 2

    def flood() -> None:
        begun = time.monotonic()
        while not stop.is_set():
            due = int((time.monotonic() - begun) * rate) - counts["opened"]
            if due > 0:
                pieces = [(0.0, sent[:64]), (0.02, sent[64:])]
                scripts = [Script("", node.endpoint, pieces) for _ in range(min(due, 64))]
                converse(scripts, 0.2)  # each is dropped after that, and others come
                counts["opened"] += len(scripts)
                counts["refused"] += sum(not each.connected for each in scripts)
                counts["welcomed"] += sum("WELCOME" in told(each.received) for each in scripts)
            time.sleep(0.005)

    thread = threading.Thread(target=flood, name="attack-handshakes", daemon=True)
    thread.start()
    try:
        beside = work_beside(stage.honest, stage.names["data"], stage.options.duration_s)
    finally:
        stop.set()
        thread.join(10.0)
    if not counts["opened"]:
        raise NotRun(f"no connection to {address_of(node.endpoint)} could be opened")
    trial.figures |= {
        "handshakes begun": counts["opened"],
        "that got a WELCOME": counts["welcomed"],
        "not accepted": counts["refused"],
    }
    _judge(stage, trial, before, beside)


def beyond_limits(stage: Stage, trial: Trial) -> None:
    """More requests under way than one member may have: slow signatures, all at once."""
    stage.make_key("slow", "rsa-2048-pss-sha256")
    node = stage.holders("slow")[0]
    limits = stage.serving[node].limits
    count = limits.member_requests + 500
    if count > BURST_MAX:
        raise NotRun(f"one member may have {limits.member_requests} requests under way, which is too many to be filled")
    signed = stage.ask_one(
        node, "sign", stage.operate("slow", b"x", make_grant(stage, "slow", node, operations=["sign"]))
    )
    trial.control(signed.code == "ok", f"one signature is made by {node}", signed.seen)
    name = stage.names["data"]
    _baseline(stage, trial)
    before = stage.memory()
    member = stage.cluster.nodes[node]
    body = REQUEST_CODECS["sign"].encode(stage.operate("slow", b"x"))
    each = max(1, limits.connection_requests)
    keys = Keys.of(stage.me.transport, member)
    lines = [Line.open(stage.context, member.endpoint, keys) for _ in range(-(-count // each))]
    codes: Counter[str] = Counter()
    beside = Beside()
    honest = threading.Thread(
        target=lambda: beside.take(work_beside(stage.honest, name, stage.options.duration_s)), daemon=True
    )
    try:
        for line in lines:
            line.settle(10.0)
        honest.start()
        sent = sum(lines[number // each].send(_request(number + 1, "sign", body)) for number in range(count))
        until = time.monotonic() + BURST_S
        while sum(codes.values()) < sent and time.monotonic() < until:
            for line in lines:
                with suppress(zmq.Again):
                    while True:
                        frames = line.socket.recv_multipart(zmq.DONTWAIT)
                        codes[answer_of(reply_codec.decode(frames[-1])).code] += 1
            time.sleep(0.002)
    finally:
        honest.join(stage.options.duration_s + 2 * HONEST_S)
        for line in lines:
            line.close()
    trial.figures |= {"requests at once": sent} | {f"answered {code}": n for code, n in sorted(codes.items())}
    answered = sum(codes.values())
    seen = ", ".join(f"{code} {n}" for code, n in codes.most_common())
    allowed = {"ok", "overloaded", "deadline-exceeded"}
    trial.case(answered == sent, "each request is answered", node, f"{answered} of {sent}")
    trial.case(set(codes) <= allowed, "served, or refused for the limit", node, f"answers: {seen}")
    if not codes["overloaded"]:
        trial.note(f"the node was quicker than the requests came: {limits.member_requests} were never under way")
    _judge(stage, trial, before, beside)


_THREAT = "docs/security.md, Who has a client's key"
ATTACKS: Final = (
    Attack(
        "floods.handshakes",
        "Handshakes at a fixed rate, without a key",
        "to have nodes do nothing but arithmetic for strangers",
        "an honest client is served, with right results",
        "docs/security.md, Who has the network; CWE-400",
        handshakes,
    ),
    Attack(
        "floods.valid-requests",
        "Valid requests at a fixed rate from one client",
        "to take all of the cluster's time",
        "an honest client is served beside it; what is too much is answered overloaded",
        f"{_THREAT}; CWE-770",
        valid_requests,
    ),
    Attack(
        "floods.beyond-limits",
        "More requests under way than one client may have",
        "to fill a node's queues",
        "each is served or answered overloaded, and an honest client is served beside it",
        "docs/security.md, nobody crowds out others; CWE-770",
        beyond_limits,
        slow=True,
    ),
    Attack(
        "floods.bad-ciphertexts",
        "Wrong ciphertexts at a fixed rate",
        "to have the token taken for broken",
        "invalid-tag for each, and the nodes stay in service",
        f"{_THREAT}; CWE-400",
        bad_ciphertexts,
    ),
    Attack(
        "floods.gatherings",
        "Cold requests with fresh grants at a fixed rate",
        "to have shares move all the time",
        "an honest client is served; what is too much is answered overloaded",
        f"{_THREAT}; docs/security.md, shares leave slowly; CWE-770",
        gatherings,
        slow=True,
    ),
    Attack(
        "floods.unknown-keys",
        "Requests for keys that do not exist",
        "to fill what a node remembers",
        "key-not-found or moved, and the memory stays as it is",
        f"{_THREAT}; CWE-400",
        unknown_keys,
        slow=True,
    ),
    Attack(
        "floods.big-messages",
        "The largest messages at a fixed rate",
        "to fill memory and queues",
        "an honest client is served, and the memory stays bounded",
        f"{_THREAT}; CWE-770",
        big_messages,
        slow=True,
    ),
    Attack(
        "floods.never-reads",
        "A client that never takes an answer in",
        "to have a node keep answers for it",
        "an honest client is served, and the memory stays bounded",
        f"{_THREAT}; CWE-770",
        never_reads,
    ),
)
