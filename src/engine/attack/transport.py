"""Attacks on the connections themselves: who gets in, with which bytes, and what an open port can be made to hold."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import zmq

from engine.attack.model import Attack, NotRun, Trial
from engine.attack.sockets import (
    CURVE_GREETING,
    CURVE_HELLO_BYTES,
    Decoy,
    Keys,
    Line,
    Recorder,
    Script,
    converse,
    greeting,
    told,
)
from engine.attack.stage import Stage
from engine.client.config import CurveIdentity
from engine.client.process import raise_file_limit
from engine.client.transport import HANDSHAKE_MS, Channel
from engine.errors import EngineError
from engine.protocol.manifest import Member
from engine.protocol.requests import HELLO, REQUEST_CODECS, STATS, Empty, Hello
from engine.protocol.wire import MAX_MESSAGE, PROTOCOL_VERSION, Request, error_codec, reply_codec, request_codec

__all__ = ["ATTACKS", "hello_frame", "honest_hello"]

SETTLE_S: Final = 6.0
"""How long a handshake may take before it counts as refused in silence: three times what a server gives it."""
CLOSE_S: Final = HANDSHAKE_MS / 1000 + 6.0
"""How long a server may keep a connection without a handshake: its own limit and what a busy machine adds."""
CONTROL_S: Final = 15.0
REPLY_S: Final = 1.0


def hello_frame(number: int = 1) -> bytes:
    """An honest ``hello``, which every member answers to every member."""
    body = REQUEST_CODECS[HELLO].encode(Hello(PROTOCOL_VERSION, ""))
    return request_codec.encode(Request(PROTOCOL_VERSION, number, HELLO, 5_000, body, {}))


def honest_hello(stage: Stage, member: Member) -> bool:
    """Whether a fresh connection with the first client's keys is let in and answered."""
    line = Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member))
    try:
        return line.settle(CONTROL_S) == "up" and line.send(hello_frame()) and bool(line.receive(CONTROL_S))
    finally:
        line.close()


def _control(stage: Stage, trial: Trial, members: Sequence[Member]) -> None:
    for member in members:
        trial.control(honest_hello(stage, member), f"the client's own keys are let in at {member.name} and answered")


def _ports(stage: Stage) -> list[tuple[str, str, Member]]:
    """Every open port: what it is, its endpoint, and its member, with the key that is served there."""
    found = [(member.name, member.endpoint, member) for member in stage.servers]
    found += [(f"{m.name} (publish)", m.publish_endpoint, m) for m in stage.servers if m.publish_endpoint]
    for each in stage.cluster.retiring.values():
        member = msgspec.structs.replace(stage.cluster.members[each.name], curve_public=each.curve_public)
        if each.endpoint and each.endpoint != member.endpoint:
            found.append((f"{each.name} (retiring)", each.endpoint, member))
        if each.publish_endpoint and each.publish_endpoint != member.publish_endpoint:
            found.append((f"{each.name} (publish, retiring)", each.publish_endpoint, member))
    return found


@contextmanager
def _lines(made: Sequence[Line]) -> Iterator[Sequence[Line]]:
    try:
        yield made
    finally:
        for line in made:
            line.close()


def _knock(stage: Stage, trial: Trial, what: str, keys_of: Sequence[tuple[str, str, Keys | None, int]]) -> None:
    """Knock at every (name, endpoint, keys, socket type) at once: none may get through the handshake or a reply."""
    made = [Line.open(stage.context, endpoint, keys, kind=kind) for _, endpoint, keys, kind in keys_of]
    with _lines(made) as lines:
        until = time.monotonic() + SETTLE_S
        for line in lines:
            line.settle(max(0.05, until - time.monotonic()))
            if line.state == "up" and line.socket.type == zmq.DEALER:
                line.send(hello_frame())
        for (name, _, _, _), line in zip(keys_of, lines, strict=True):
            state = line.state
            if state == "up":
                answered = line.socket.type == zmq.DEALER and line.receive(REPLY_S) is not None
                state = "let in and answered" if answered else "let in: the handshake succeeded, without an answer"
            trial.case(state in ("refused", "failed", "cut", "silent"), what, name, state)


# --- who gets in ---


def no_mechanism(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    with Decoy(stage.context) as decoy:
        line = Line.open(stage.context, decoy.endpoint, None)
        with _lines([line]):
            good = line.settle(CONTROL_S) == "up" and line.send(b"x") and line.receive(CONTROL_S) == [b"x"]
    trial.control(bool(good), "the same socket without keys is served by a ROUTER of our own without CURVE")
    ports = _ports(stage)
    _knock(stage, trial, "the NULL mechanism", [(n, e, None, zmq.DEALER) for n, e, _ in ports])
    _knock(stage, trial, "a subscriber with the NULL mechanism", [(n, e, None, zmq.SUB) for n, e, _ in ports])

    def plain(socket: zmq.Socket[bytes]) -> None:
        socket.plain_username, socket.plain_password = b"admin", b"admin"

    made = [Line.open(stage.context, endpoint, None, prepare=plain) for _, endpoint, _ in ports]
    with _lines(made) as lines:
        until = time.monotonic() + SETTLE_S
        for (name, _, _), line in zip(ports, lines, strict=True):
            state = line.settle(max(0.05, until - time.monotonic()))
            trial.case(state != "up", "the PLAIN mechanism", name, state)


def strangers(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    balancers = [member for member in stage.servers if member.publish_endpoint]
    keys = {member.name: Keys.of(stage.me.transport, member) for member in balancers}
    made = [Line.open(stage.context, m.publish_endpoint, keys[m.name], kind=zmq.SUB) for m in balancers]
    with _lines(made) as lines:
        for member, line in zip(balancers, lines, strict=True):
            trial.control(
                line.settle(CONTROL_S) == "up", f"the client's own keys are let in at {member.name} (publish)"
            )
    ports = _ports(stage)
    for what in ("a fresh key that no manifest names", "another one"):
        knocks = [(n, e, Keys.stranger(m), zmq.SUB if "publish" in n else zmq.DEALER) for n, e, m in ports]
        _knock(stage, trial, what, knocks)
    # Who may be known: the manifest is no secret, so every member's public key is.
    for known in list(stage.cluster.members.values()):
        if known.role == "operator" or known.name == stage.me.name:
            continue
        stolen = [
            (n, e, Keys(known.curve_z85.encode(), zmq.curve_keypair()[1], m.curve_z85.encode()), zmq.DEALER)
            for n, e, m in ports
        ]
        _knock(stage, trial, f"the public key of the {known.role} {known.name} without its secret", stolen)
        if stage.options.quick and known.role == "balancer":
            break


def wrong_server(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    knocks = []
    for name, endpoint, _ in _ports(stage):
        own = stage.me.transport
        knocks.append((name, endpoint, Keys(own.public, own.secret, zmq.curve_keypair()[0]), zmq.DEALER))
    _knock(stage, trial, "the client's keys, for another server key", knocks)
    # And the other way round: a client of ours must not talk to a server without the pinned key's secret.
    public, secret = zmq.curve_keypair()
    with Decoy(stage.context, secret) as decoy:
        honest = Member("decoy", "node", bytes(32), zmq.utils.z85.decode(public), decoy.endpoint)
        own = stage.me.transport
        line = Line.open(stage.context, decoy.endpoint, Keys.of(own, honest))
        with _lines([line]):
            good = line.settle(CONTROL_S) == "up" and line.send(b"x") and line.receive(CONTROL_S) == [b"x"]
        trial.control(bool(good), "a server of our own is talked to by who knows its key")
        before = decoy.received
        for node in stage.cluster.nodes.values():
            moved = Member(node.name, "node", node.sign_public, node.curve_public, decoy.endpoint)
            with Channel(CurveIdentity(own.name, own.public, own.secret), {node.name: moved}, stage.context) as channel:
                try:
                    channel.call(node.name, HELLO, REQUEST_CODECS[HELLO].encode(Hello(1, "")), 1.0)
                    seen = "answered"
                except EngineError as error:
                    seen = f"{error.code}: {error}"
            what = "an impostor at a node's address, without its secret key"
            trial.case(seen != "answered" and decoy.received == before, what, node.name, seen)


def wrong_types(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    kinds = {"PUSH": zmq.PUSH, "PUB": zmq.PUB, "SUB": zmq.SUB, "PULL": zmq.PULL, "PAIR": zmq.PAIR, "REP": zmq.REP}
    for name, kind in kinds.items():
        knocks = [(m.name, m.endpoint, Keys.of(stage.me.transport, m), kind) for m in stage.servers]
        _knock(stage, trial, f"a {name} socket with the client's keys", knocks)
    for member in stage.servers:
        line = Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member), kind=zmq.REQ)
        with _lines([line]):
            line.settle(SETTLE_S)
            line.send(hello_frame())
            # A REQ socket drops what has no empty frame before it, so nothing may come.
            answer = line.receive(0.3)
        trial.case(
            answer is None,
            "a REQ socket, which sends an empty frame first",
            member.name,
            "no answer" if answer is None else "answered",
        )


# --- which bytes ---


def raw_bytes(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    message = hello_frame()
    frame = bytes([0, len(message)]) + message
    ready = b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
    null = greeting(b"NULL") + ready + frame
    old = b"\x01\x00" + bytes([len(message) + 1, 0]) + message
    v2 = b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + frame
    with Decoy(stage.context) as decoy:
        probes = [Script("", decoy.endpoint, _in_steps([(0.0, each)])) for each in (null, old, v2)]
        converse(probes, 1.0)
        until = time.monotonic() + CONTROL_S
        while (count := decoy.received) < len(probes) and time.monotonic() < until:
            time.sleep(0.05)
    trial.control(
        count == len(probes), "the same bytes reach a ROUTER of our own without CURVE", f"{count} of {len(probes)} did"
    )
    noise = stage.random.randbytes
    pieces: dict[str, list[tuple[float, bytes]]] = {
        "nothing at all (half open)": [],
        "a ZMTP 3.1 session with the NULL mechanism and a request": [(0.0, null)],
        "a ZMTP 1.0 session and a request (downgrade)": [(0.0, old)],
        "a ZMTP 2.0 session and a request (downgrade)": [(0.0, v2)],
        "ZMTP 3.0 with CURVE, then an unencrypted request": [(0.0, greeting(b"CURVE", 3, 0) + frame)],
        "ZMTP 3.1 with CURVE, then READY at once": [(0.0, CURVE_GREETING + ready + frame)],
        "CURVE spelled small": [(0.0, greeting(b"curve") + frame)],
        "a mechanism that is none": [(0.0, greeting(b"\xff" * 20) + frame)],
        "a server's greeting": [(0.0, greeting(b"CURVE", as_server=1) + frame)],
        "ZMTP 9.9": [(0.0, greeting(b"CURVE", 9, 9) + frame)],
        "HTTP": [(0.0, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")],
        "a TLS ClientHello": [(0.0, bytes.fromhex("160301020001000 1fc0303".replace(" ", "")) + noise(400))],
        "64 random bytes": [(0.0, noise(64))],
        "100 KiB of random bytes": [(0.0, noise(100 * 1024))],
        "a greeting and a command of 2^63 bytes": [(0.0, CURVE_GREETING + b"\x06\x7f" + b"\xff" * 7 + noise(4096))],
        "a greeting and a HELLO of zeros": [(0.0, CURVE_GREETING + _hello_of(bytes(194)))],
        "a greeting and a random HELLO": [(0.0, CURVE_GREETING + _hello_of(noise(194)))],
        "one byte each 0.3 s (slow loris)": [(0.3, bytes([each])) for each in CURVE_GREETING + _hello_of(bytes(194))],
    }
    _play(stage, trial, pieces)


def _hello_of(rest: bytes) -> bytes:
    return b"\x04\xc8\x05HELLO" + rest


def _in_steps(pieces: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """The same bytes with a pause after the greeting: a server that gets all at once closes before it looks at them."""
    found: list[tuple[float, bytes]] = []
    for pause, data in pieces:
        if data.startswith(b"\xff") and len(data) > len(CURVE_GREETING):
            found += [(pause, data[: len(CURVE_GREETING)]), (0.05, data[len(CURVE_GREETING) :])]
        else:
            found.append((pause, data))
    return found


def _play(stage: Stage, trial: Trial, pieces: dict[str, list[tuple[float, bytes]]], *, welcome: bool = False) -> None:
    """Each script at each port, side by side: closed in time, and no step of the handshake beyond what is allowed."""
    allowed = {"WELCOME", "ERROR"} if welcome else {"ERROR"}
    scripts = [
        Script(what, endpoint, _in_steps(each), at=name)
        for name, endpoint, _ in _ports(stage)
        for what, each in pieces.items()
    ]
    converse(scripts, CLOSE_S)
    for script in scripts:
        commands = told(script.received)
        seen = "closed" if script.closed else "STILL OPEN" if script.connected else "not connected"
        seen += f" after {', '.join(commands)}" if commands else ""
        seen += f": {script.seconds:.1f} s"
        trial.case(script.connected and script.closed and set(commands) <= allowed, script.what, script.at, seen)
    trial.figures["longest kept without a handshake, s"] = round(max(each.seconds for each in scripts), 2)


def replayed_handshakes(stage: Stage, trial: Trial) -> None:
    pieces: dict[str, list[tuple[float, bytes]]] = {}
    noise = stage.random
    for member in stage.servers[:1] if stage.options.quick else stage.servers:
        with Recorder(member.endpoint) as recorder:
            line = Line.open(stage.context, recorder.endpoint, Keys.of(stage.me.transport, member))
            with _lines([line]):
                good = line.settle(CONTROL_S) == "up" and line.send(hello_frame()) and line.receive(CONTROL_S)
                sent, answered = recorder.sent, recorder.answered
        trial.control(bool(good), f"the session that is recorded, a hello to {member.name}, is answered")
        trial.control(
            told(answered)[:2] == ["WELCOME", "READY"],
            "the recorder sees the server's WELCOME and READY",
            str(told(answered)[:3]),
        )
        whole = len(sent)
        hello_end = 64 + CURVE_HELLO_BYTES
        pieces |= {
            f"the whole session with {member.name}": [(0.0, sent)],
            f"the whole session with {member.name}, step by step": [
                (0.0, sent[:64]),
                (0.1, sent[64:hello_end]),
                (0.2, sent[hello_end:]),
            ],
            f"its HELLO, then the {whole - hello_end} bytes after it twice": [(0.0, sent + sent[hello_end:])],
        }
        for end in (10, 11, 12, 32, 63, 64, 65, 66, 100, hello_end - 1, hello_end, hello_end + 1, hello_end + 120):
            pieces[f"the first {end} bytes of a handshake with {member.name}"] = [(0.0, sent[:end])]
        for _ in range(4 if stage.options.quick else 16):
            position = noise.randrange(64 + 8, hello_end)
            changed = bytearray(sent[:hello_end])
            changed[position] ^= 1 << noise.randrange(8)
            pieces[f"its HELLO with a bit changed at {position}"] = [(0.0, bytes(changed))]
    _play(stage, trial, pieces, welcome=True)


def oversized(stage: Stage, trial: Trial) -> None:
    for member in stage.servers:
        line = Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member))
        with _lines([line]):
            line.settle(CONTROL_S)
            line.send(bytes(MAX_MESSAGE))
            answer = line.receive(CONTROL_S)
        trial.control(bool(answer) and not line.cut, f"{member.name} answers a frame of {MAX_MESSAGE} bytes")
    sizes = (
        (MAX_MESSAGE + 65, MAX_MESSAGE + 4096, 1 << 20)
        if stage.options.quick
        else (
            MAX_MESSAGE + 65,
            MAX_MESSAGE + 4096,
            1 << 20,
            16 << 20,
        )
    )
    for size in sizes:
        lines = [Line.open(stage.context, m.endpoint, Keys.of(stage.me.transport, m)) for m in stage.servers]
        with _lines(lines):
            for line in lines:
                line.settle(CONTROL_S)
                line.send(bytes(size))
            for member, line in zip(stage.servers, lines, strict=True):
                answer = line.receive(SETTLE_S)
                line.look()
                seen = "cut" if line.cut and answer is None else "answered" if answer else "kept, without an answer"
                trial.case(seen == "cut", f"a frame of {size} bytes", member.name, seen)


def many_frames(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    honest = hello_frame()
    messages = {
        "two frames, the request first": [honest, b""],
        "two frames, the request last": [b"", honest],
        "the request twice": [honest, honest],
        "ten empty frames": [b""] * 10,
        "1,000 small frames": [b"x"] * 1_000,
        "100 frames of 4 KiB": [bytes(4096)] * 100,
    }
    for what, frames in messages.items():
        lines = [Line.open(stage.context, m.endpoint, Keys.of(stage.me.transport, m)) for m in stage.servers]
        with _lines(lines):
            for line in lines:
                line.settle(CONTROL_S)
                line.send(*frames)
            for member, line in zip(stage.servers, lines, strict=True):
                answer = line.receive(REPLY_S * 5)
                held, seen = answer is None, "cut" if line.cut else "no answer"
                if answer is not None:
                    reply = reply_codec.decode(answer[-1])
                    held, seen = reply.status == 1, "an error reply" if reply.status == 1 else "ok"
                trial.case(held, what, member.name, seen)


def names_prove_nothing(stage: Stage, trial: Trial) -> None:
    """A routing id, or metadata, that claims to be somebody else."""
    _control(stage, trial, stage.servers)
    body = REQUEST_CODECS[STATS].encode(Empty())
    frame = request_codec.encode(Request(PROTOCOL_VERSION, 9, STATS, 5_000, body, {}))
    claims = [each for each in stage.cluster.members.values() if each.role in ("node", "balancer")]
    for claimed in claims[:2] + claims[-1:]:
        for how, value in (("routing id", claimed.name.encode()), ("routing id", claimed.curve_z85.encode())):

            def prepare(socket: zmq.Socket[bytes], value: bytes = value) -> None:
                socket.routing_id = value
                socket.setsockopt(zmq.METADATA, b"X-User-Id:" + value)

            for member in stage.cluster.nodes.values():
                line = Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member), prepare=prepare)
                with _lines([line]):
                    line.settle(CONTROL_S)
                    line.send(frame)
                    answer = line.receive(REPLY_S * 5)
                seen = "no answer" if answer is None else _error_code(answer[-1])
                what = f"a balancer's request under the {how} of {claimed.name}"
                trial.case(seen in ("access-denied", "no answer"), what, member.name, seen)


def _error_code(data: bytes) -> str:
    reply = reply_codec.decode(data)
    return "ok" if reply.status == 0 else error_codec.decode(reply.body).code


# --- what a port can be made to hold ---


def half_open(stage: Stage, trial: Trial) -> None:
    _control(stage, trial, stage.servers)
    wanted = min(stage.options.idle, 200) if stage.options.quick else stage.options.idle
    raise_file_limit()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(0, soft - len(os.listdir("/proc/self/fd")) - 256)
    count = min(wanted, room)
    if count < wanted:
        trial.note(f"{count} connections instead of {wanted}: this process may open {soft} files")
    if not count:
        raise NotRun("no file descriptors are left for connections")
    before = stage.memory()
    for member in stage.cluster.nodes.values() if not stage.options.quick else list(stage.cluster.nodes.values())[:1]:
        scripts = [
            Script("half open", member.endpoint, [(0.0, CURVE_GREETING)] if each % 2 else []) for each in range(count)
        ]
        converse(scripts, CLOSE_S + count / 500, at_once=count)
        up = [each for each in scripts if each.connected]
        closed = sum(each.closed for each in up)
        longest = max((each.seconds for each in up), default=0.0)
        seen = f"{closed} of {len(up)} closed: the last after {longest:.1f} s"
        trial.case(bool(up) and closed == len(up), f"{count} connections without a handshake", member.name, seen)
        # A refusal by a limit on connections is a defence too; a control right after shows that members still get in.
        served = honest_hello(stage, member)
        trial.case(served, "a member connects right after", member.name, "answered" if served else "not answered")
        trial.figures[f"half-open connections at {member.name}"] = len(up)
    _note_memory(stage, trial, before)


def _note_memory(stage: Stage, trial: Trial, before: dict[str, int]) -> None:
    after = stage.memory()
    if after:
        grown = max(after.get(name, 0) - before.get(name, 0) for name in after)
        trial.figures["memory grown by, MiB"] = round(grown / 1024, 1)


def idle_members(stage: Stage, trial: Trial) -> None:
    """As many connections as one client's key gets, each used once and then left alone."""
    _control(stage, trial, stage.servers)
    before = stage.memory()
    node = stage.cluster.nodes[stage.nodes[0]]
    limit = stage.serving[node.name].limits.member_connections
    count = min(stage.options.idle, 40 if stage.options.quick else limit + 16)
    keys = Keys.of(stage.me.transport, node)
    lines = [Line.open(stage.context, node.endpoint, keys) for _ in range(count)]
    with _lines(lines):
        until = time.monotonic() + CONTROL_S
        for line in lines:
            line.settle(max(0.02, until - time.monotonic()))
            line.send(hello_frame())
        told = [_error_code(answer[-1]) for line in lines if (answer := line.receive(2.0)) is not None]
        until = time.monotonic() + CONTROL_S
        while (kept := sum(line.state == "up" and not line.cut for line in lines)) > limit and time.monotonic() < until:
            for line in lines:
                line.look(0.01)
        trial.figures |= {"idle connections of one client kept": kept, "told overloaded": told.count("overloaded")}
        what = f"{count} idle connections with one client's key, of which it may have {limit}"
        trial.case(kept <= limit, what, node.name, f"{kept} kept")
        if stage.target.second is not None or count < limit:
            other = Keys.of((stage.target.second or stage.target.first).identity.transport, node)
            line = Line.open(stage.context, node.endpoint, other)
            with _lines([line]):
                served = line.settle(CONTROL_S) == "up" and line.send(hello_frame()) and line.receive(CONTROL_S)
            seen = "answered" if served else "not served"
            trial.case(bool(served), "another client connects meanwhile", node.name, seen)
    _note_memory(stage, trial, before)


_THREAT = "docs/security.md, Who has the network"
ATTACKS: Final = (
    Attack(
        "transport.no-mechanism",
        "Connections without CURVE",
        "to send requests, or to read routing tables, without any key",
        "the NULL and PLAIN mechanisms get nowhere at any port",
        f"{_THREAT}; ZeroMQ RFC 23, 26; CWE-306",
        no_mechanism,
    ),
    Attack(
        "transport.strangers",
        "Keys that are no member's",
        "to be let in with a key of one's own, or by knowing a member's public key",
        "the handshake is refused at every port, the publish port included",
        f"{_THREAT}; ZeroMQ RFC 26, 27; CWE-287",
        strangers,
    ),
    Attack(
        "transport.wrong-server",
        "Wrong server keys and an impostor at a node's address",
        "to stand between clients and nodes",
        "no handshake for another server key; clients do not talk to who lacks the pinned key's secret",
        f"{_THREAT}; CWE-295, CWE-300",
        wrong_server,
    ),
    Attack(
        "transport.raw-bytes",
        "Downgrades, garbage and slow bytes on open ports",
        "an older or weaker protocol, a crash, or a connection that is kept for nothing",
        f"no step of a handshake, and the connection closed within {CLOSE_S:g} s",
        f"{_THREAT}; ZeroMQ RFC 13, 23, 37; CWE-757, CWE-400",
        raw_bytes,
    ),
    Attack(
        "transport.replayed-handshakes",
        "Recorded, cut and changed handshakes",
        "to repeat a member's session, or to get further with parts of it",
        "never a READY: a WELCOME at most, then the connection is closed",
        f"{_THREAT}; ZeroMQ RFC 26; CWE-294",
        replayed_handshakes,
    ),
    Attack(
        "transport.wrong-types",
        "Socket types that do not belong there",
        "to make a server's socket misbehave",
        "no handshake, or no answer",
        f"{_THREAT}; ZeroMQ RFC 28",
        wrong_types,
    ),
    Attack(
        "transport.oversized",
        "Frames beyond the limit",
        "to have a node keep large messages in memory",
        f"the connection is cut at more than {MAX_MESSAGE} bytes",
        f"{_THREAT}; CWE-770",
        oversized,
    ),
    Attack(
        "transport.many-frames",
        "Messages of many frames",
        "to have frames read that were not checked",
        "an error reply, or the connection is cut",
        f"{_THREAT}; CWE-20",
        many_frames,
    ),
    Attack(
        "transport.borrowed-names",
        "Names of others as routing id and metadata",
        "to be taken for a node or a balancer",
        "the request is judged by the connection's key: access-denied",
        "docs/security.md, no sender by hearsay; CWE-290",
        names_prove_nothing,
    ),
    Attack(
        "transport.half-open",
        "Many connections without a handshake",
        "to use up descriptors and memory with no key at all",
        f"all are closed within {CLOSE_S:g} s, and members get in right after",
        f"{_THREAT}; CWE-400, CWE-770",
        half_open,
    ),
    Attack(
        "transport.idle-members",
        "Many idle connections of one member",
        "to keep others out with one client's key",
        "no more are kept than hello tells, and another client is served",
        "docs/security.md, Who has a client's key; CWE-770",
        idle_members,
    ),
)
