"""Attacks on the protocol: frames that are malformed in every way, bodies out of place, times and ids that can't be."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import msgspec

from engine.attack.model import Attack, Trial
from engine.attack.sockets import Keys, Line
from engine.attack.stage import Answer, Stage, answer_of, judge
from engine.attack.transport import hello_frame
from engine.errors import ProtocolError
from engine.keys import RequestType
from engine.protocol.manifest import Member
from engine.protocol.requests import (
    BODIES,
    CLIENT_VERBS,
    HELLO,
    REPLY_CODECS,
    REQUEST_CODECS,
    Create,
    Describe,
    Destroy,
    Empty,
    Flush,
    Hello,
    ListKeys,
    Operate,
    Prewarm,
    Refresh,
    Reshare,
    Rewrap,
    Sealed,
    Settings,
)
from engine.protocol.wire import PROTOCOL_VERSION, Request, reply_codec, request_codec

__all__ = ["ATTACKS"]

REPLY_S: Final = 15.0
pack = msgspec.msgpack.encode


def _honest(stage: Stage, node: str, number: int = 7) -> bytes:
    """A request that is served: an encryption with a fresh grant."""
    body = REQUEST_CODECS[RequestType.ENCRYPT].encode(stage.operate("data", b"x", stage.grant("data", node)))
    return request_codec.encode(Request(PROTOCOL_VERSION, number, RequestType.ENCRYPT, 5_000, body, {}))


def _malformed(stage: Stage, base: bytes, body: bytes) -> dict[str, bytes]:
    """Frames that are no canonical request; the base is one."""
    noise = stage.random.randbytes
    verb = "encrypt"

    def array(*values: Any) -> bytes:
        return pack(list(values))

    deep = b"\x91" * 20_000 + b"\x90"
    cases = {
        "an empty frame": b"",
        "one zero byte": b"\0",
        "the byte that MessagePack never uses": b"\xc1",
        "nil": b"\xc0",
        "a number": b"\x05",
        "a text": pack("encrypt"),
        "an empty array": b"\x90",
        "an empty map": b"\x80",
        "a map of the fields": pack({"version": 1, "id": 7, "verb": verb}),
        "five elements": array(1, 7, verb, 5000, body),
        "seven elements": array(1, 7, verb, 5000, body, {}, 0),
        "a byte after the end": base + b"\0",
        "the request twice": base + base,
        "the version in two bytes": base[:1] + b"\xcc\x01" + base[2:],
        "the version in nine bytes": base[:1] + b"\xcf" + bytes(7) + b"\x01" + base[2:],
        "the id in two bytes": base[:2] + b"\xcc\x07" + base[3:],
        "the array's length in three bytes": b"\xdc\x00\x06" + base[1:],
        "the verb's length in two bytes": base[:3] + b"\xd9\x07" + base[4:],
        "the version as a float": array(1.0, 7, verb, 5000, body, {}),
        "the id as a text": array(1, "7", verb, 5000, body, {}),
        "the id nil": array(1, None, verb, 5000, body, {}),
        "the id -1": array(1, -1, verb, 5000, body, {}),
        "the id 2^63": array(1, 2**63, verb, 5000, body, {}),
        "the id 2^64 - 1": array(1, 2**64 - 1, verb, 5000, body, {}),
        "version 0": array(0, 7, verb, 5000, body, {}),
        f"version {PROTOCOL_VERSION + 2}": array(PROTOCOL_VERSION + 2, 7, verb, 5000, body, {}),
        "version 2^63 - 1": array(2**63 - 1, 7, verb, 5000, body, {}),
        "a time-out of 0": array(1, 7, verb, 0, body, {}),
        "a time-out of -5": array(1, 7, verb, -5, body, {}),
        "a time-out of 600,001 ms": array(1, 7, verb, 600_001, body, {}),
        "a time-out of 2^63 ms": array(1, 7, verb, 2**63, body, {}),
        "an empty verb": array(1, 7, "", 5000, body, {}),
        "a verb of 33 characters": array(1, 7, "e" * 33, 5000, body, {}),
        "a verb of 60,000 characters": array(1, 7, "e" * 60_000, 5000, body, {}),
        "an unknown verb": array(1, 7, "extract", 5000, body, {}),
        "the verb in capitals": array(1, 7, "ENCRYPT", 5000, body, {}),
        "the verb with a zero byte": array(1, 7, "encrypt\0", 5000, body, {}),
        "the verb with a space": array(1, 7, " encrypt", 5000, body, {}),
        "the verb with a Cyrillic letter": array(1, 7, "еncrypt", 5000, body, {}),  # noqa: RUF001
        "the verb with a soft hyphen": array(1, 7, "en\u00adcrypt", 5000, body, {}),
        "the verb as bytes": array(1, 7, b"encrypt", 5000, body, {}),
        "a verb that is no UTF-8": base.replace(b"\xa7encrypt", b"\xa7encryp\xff"),
        "a verb with half a surrogate": base.replace(b"\xa7encrypt", b"\xa7encr\xed\xa0\x80"),
        "the body as a text": array(1, 7, verb, 5000, "x" * 30, {}),
        "the body as an array": array(1, 7, verb, 5000, [1, 2], {}),
        "extensions as an array": array(1, 7, verb, 5000, body, []),
        "nine extensions": array(1, 7, verb, 5000, body, {f"e{i}": b"" for i in range(9)}),
        "an extension of 4,097 bytes": array(1, 7, verb, 5000, body, {"e": bytes(4097)}),
        "an extension named with 33 characters": array(1, 7, verb, 5000, body, {"e" * 33: b""}),
        "one extension twice": base[:-1] + b"\x82\xa1e\xc4\x00\xa1e\xc4\x00",
        "an extension type": base[:-1] + b"\xd4\x01\x00",
        "20,000 nested arrays": deep,
        "nested arrays in the extensions": base[:-1] + deep,
        "an array of 2^32 - 1 elements": b"\xdd" + b"\xff" * 4 + bytes(64),
        "a map of 2^32 - 1 entries": b"\xdf" + b"\xff" * 4 + bytes(64),
        "a text of 2^32 - 1 bytes": b"\x96\x01\x07\xdb" + b"\xff" * 4 + bytes(64),
        "a body of 2^32 - 1 bytes": b"\x96\x01\x07\xa7encrypt\xcd\x13\x88\xc6" + b"\xff" * 4 + bytes(64),
        "a body of 2^31 bytes": b"\x96\x01\x07\xa7encrypt\xcd\x13\x88\xc6\x80\0\0\0" + bytes(64),
    }
    for end in stage.chosen(len(base), 12 if stage.options.quick else 60):
        cases[f"the first {end} bytes"] = base[:end]
    for number in range(10 if stage.options.quick else 60):
        cases[f"random bytes {number + 1}"] = noise(1 + stage.random.randrange(400))
    return cases


def _frames_at(
    stage: Stage, member: Member, frames: dict[str, bytes], control: bytes
) -> tuple[dict[str, list[Answer]], Answer]:
    """Send each frame by itself; the answers that came before that of the next control, and the last control's.

    What is not understood is answered when it is read, so the answer to a ``hello`` after each frame tells that nothing
    else is to come for it.
    """
    line = Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member))
    found: dict[str, list[Answer]] = {}
    try:
        line.settle(REPLY_S)
        _served(line, control)  # whose key is loaded then: a frame that is taken for it is answered at once, too
        for mark, (what, frame) in enumerate(frames.items(), 1_000_000):
            line.send(frame)
            line.send(hello_frame(mark))
            found[what] = _until(line, mark)
        return found, _served(line, control)
    finally:
        line.close()


def _served(line: Line, control: bytes) -> Answer:
    """Send it; its answer."""
    line.send(control)
    until = time.monotonic() + REPLY_S
    while (left := until - time.monotonic()) > 0 and (got := line.receive(left)) is not None:
        reply = reply_codec.decode(got[-1])
        if reply.id == request_codec.decode(control).id:
            return answer_of(reply)
    return Answer("no-answer")


def _until(line: Line, mark: int) -> list[Answer]:
    """What is answered before the hello with the id ``mark``."""
    found: list[Answer] = []
    until = time.monotonic() + REPLY_S
    while (left := until - time.monotonic()) > 0 and (got := line.receive(left)) is not None:
        reply = reply_codec.decode(got[-1])
        if reply.id == mark:
            return found
        found.append(answer_of(reply))
    return [*found, Answer("cut" if line.cut else "no-answer", "not even to the hello after it")]


def malformed(stage: Stage, trial: Trial) -> None:
    for member in stage.servers:
        node = member.name
        is_node = member.role == "node" and node in stage.holders("data")
        combiner = node if is_node else stage.holders("data")[0]
        base = _honest(stage, combiner)
        body = request_codec.decode(base).body
        control = _honest(stage, combiner, 77) if is_node else hello_frame(77)
        frames = _malformed(stage, base, body)
        found, last = _frames_at(stage, member, frames, control)
        trial.control(last.code == "ok", f"the same request in its honest form is served by {node}", last.seen)
        for what, answers in found.items():
            seen = ", ".join(answer.seen for answer in answers) or "dropped"
            held = len(answers) <= 1 and all(each.code == "protocol-error" for each in answers)
            trial.case(held, what, node, seen)


def changed_bits(stage: Stage, trial: Trial) -> None:
    """Any answer is right for a request with a bit changed, since some changes mean nothing; a crash is not."""
    for member in stage.servers:
        node = member.name
        is_node = member.role == "node" and node in stage.holders("data")
        base = _honest(stage, node) if is_node else hello_frame()
        frames: dict[str, bytes] = {}
        for number in range(30 if stage.options.quick else 300):
            changed = bytearray(base)
            for _ in range(1 + number % 3):
                position = stage.random.randrange(len(changed))
                changed[position] ^= 1 << stage.random.randrange(8)
            frames[f"changed {number + 1}"] = bytes(changed)
        control = _honest(stage, node, 77) if is_node else hello_frame(77)
        found, last = _frames_at(stage, member, frames, control)
        trial.control(last.code == "ok", f"the request without a change is served by {node}", last.seen)
        for what, answers in found.items():
            seen = ", ".join(answer.seen for answer in answers) or "dropped, or answered later"
            trial.case(all(each.code not in ("error", "cut") for each in answers), what, node, seen)


def _samples(stage: Stage) -> dict[type[Any], object]:
    """A well-formed body of each kind that clients send."""
    name = stage.names["data"]
    key_id = stage.record("data").manifest.key_id
    return {
        Operate: Operate(name, b"", b"x", b"", b"", False, b""),
        Rewrap: Rewrap(name, key_id, key_id, [Sealed(b"x" * 40, b"")], b"", b""),
        Create: Create(b"", b""),
        Destroy: Destroy(b"x"),
        Refresh: Refresh(b"x" * 3),
        Reshare: Reshare(b"x" * 3, b""),
        Settings: Settings(b"x" * 3),
        Describe: Describe(name, 0),
        ListKeys: ListKeys("*", "", 10),
        Prewarm: Prewarm(name, b"", b""),
        Flush: Flush("no/such/key"),
        Empty: Empty(),
        Hello: Hello(1, "x"),
    }


def foreign_bodies(stage: Stage, trial: Trial) -> None:
    samples = _samples(stage)
    requests, cases = [], []
    for node in stage.nodes:
        trial.control(stage.ask_one(node, HELLO, Hello(1, "")).code == "ok", f"hello with its own body at {node}")
        for verb in sorted({*CLIENT_VERBS, HELLO}):
            own = BODIES[verb][0]
            for kind, message in samples.items():
                encoded = pack(message)
                if kind is own or _fits(verb, encoded):
                    continue
                requests.append((node, verb, encoded))
                cases.append((f"{verb} with the body of a {kind.__name__}", node))
            for what, body in (
                ("nothing", b""),
                ("a byte too many", pack(samples[own]) + b"\0"),
                ("noise", os.urandom(40)),
            ):
                requests.append((node, verb, body))
                cases.append((f"{verb} with {what} as its body", node))
    judge(trial, cases, stage.ask(requests), frozenset({"protocol-error"}))


def _fits(verb: str, body: bytes) -> bool:
    """Whether the bytes are a body of the verb all the same."""
    try:
        REQUEST_CODECS[verb].decode(body)
    except ProtocolError:
        return False
    return True


def versions(stage: Stage, trial: Trial) -> None:
    for member in stage.servers:
        frames: dict[str, bytes] = {}
        for version in (0, PROTOCOL_VERSION + 2, 1_000, 2**63 - 1):
            body = pack(Hello(version, "attack"))
            frames[f"hello that tells version {version}"] = request_codec.encode(Request(1, 5, HELLO, 5000, body, {}))
            frames[f"status under version {version}"] = request_codec.encode(
                Request(version, 6, RequestType.STATUS, 5000, pack(Empty()), {})
            )
        found, last = _frames_at(stage, member, frames, hello_frame(77))
        trial.control(last.code == "ok", f"hello with version {PROTOCOL_VERSION} at {member.name}", last.seen)
        for what, answers in found.items():
            seen = ", ".join(answer.seen for answer in answers) or "dropped"
            trial.case([each.code for each in answers] == ["protocol-error"], what, member.name, seen)


def repeated_ids(stage: Stage, trial: Trial) -> None:
    """The same request id on one connection and on two: each has its own answer."""
    for node in stage.holders("data"):
        member = stage.cluster.nodes[node]
        lines = [Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member)) for _ in range(2)]
        try:
            texts = [os.urandom(24) for _ in range(4)]
            sealed = [stage.first.encrypt(stage.names["data"], text) for text in texts]
            for line in lines:
                line.settle(REPLY_S)
            for number, each in enumerate(sealed):
                message = stage.operate("data", each, stage.grant("data", node, "decrypt"))
                body = REQUEST_CODECS[RequestType.DECRYPT].encode(message)
                lines[number % 2].send(request_codec.encode(Request(1, 7, RequestType.DECRYPT, 9000, body, {})))
            for number, line in enumerate(lines):
                got: set[bytes] = set()
                for _ in range(2):
                    frames = line.receive(REPLY_S)
                    if frames is None:
                        break
                    answer = answer_of(reply_codec.decode(frames[-1]))
                    if answer.code == "ok":
                        got.add(REPLY_CODECS[RequestType.DECRYPT].decode(answer.body).data)
                wanted = {texts[number], texts[number + 2]}
                seen = (
                    "its own two results"
                    if got == wanted
                    else f"{len(got & wanted)} of its own, {len(got - wanted)} of others"
                )
                trial.case(got == wanted, f"one id twice on each of two connections, the {number + 1}. one", node, seen)
                trial.case(line.receive(0.05) is None, "no answer more than requests", node, "none more")
        finally:
            for line in lines:
                line.close()
        answer = stage.ask_one(
            node, RequestType.DECRYPT, stage.operate("data", sealed[0], stage.grant("data", node, "decrypt"))
        )
        trial.control(answer.code == "ok", f"an honest decryption by {node}", answer.seen)


def short_times(stage: Stage, trial: Trial) -> None:
    """Requests whose time is over before they can be worked on."""
    stage.flush("cold")
    allowed = frozenset({"ok", "deadline-exceeded", "need-grant", "quorum-unavailable", "overloaded"})
    for node in stage.holders("cold"):
        member = stage.cluster.nodes[node]
        line = Line.open(stage.context, member.endpoint, Keys.of(stage.me.transport, member))
        try:
            line.settle(REPLY_S)
            count = 20
            for number in range(count):
                message = stage.operate("cold", b"x", stage.grant("cold", node))
                body = REQUEST_CODECS[RequestType.ENCRYPT].encode(message)
                line.send(request_codec.encode(Request(1, 100 + number, RequestType.ENCRYPT, 1, body, {})))
            answered: dict[int, Answer] = {}
            while len(answered) < count and (frames := line.receive(REPLY_S)) is not None:
                reply = reply_codec.decode(frames[-1])
                answered[reply.id] = answer_of(reply)
        finally:
            line.close()
        for number in range(count):
            answer = answered.get(100 + number, Answer("no-answer"))
            trial.case(answer.code in allowed, "a cold encryption with a time-out of 1 ms", node, answer.seen)
        done = stage.ask_one(node, RequestType.ENCRYPT, stage.operate("cold", b"x", stage.grant("cold", node)))
        trial.control(done.code == "ok", f"the same with enough time at {node}", done.seen)


_THREAT = "docs/security.md, bounded input; docs/protocol.md, Encoding"
ATTACKS: Final = (
    Attack(
        "frames.malformed",
        "Malformed frames of every kind",
        "to crash a node, or to have something read in two ways",
        "each is answered with protocol-error or dropped; the honest one is served on the same connection",
        f"{_THREAT}; CWE-20, CWE-502, CWE-674, CWE-789",
        malformed,
    ),
    Attack(
        "frames.changed-bits",
        "Requests with changed bits",
        "to find a change that a node does not survive",
        "an answer or none, but no internal error, no cut connection, and the same start of each node afterwards",
        f"{_THREAT}; CWE-20",
        changed_bits,
    ),
    Attack(
        "frames.foreign-bodies",
        "The body of one verb under another",
        "to have a message taken for what it is not",
        "protocol-error",
        f"{_THREAT}; CWE-843",
        foreign_bodies,
    ),
    Attack(
        "frames.versions",
        "Protocol versions that do not exist",
        "a downgrade to rules that are no longer kept, or an upgrade to none",
        "protocol-error",
        "docs/protocol.md, Versions and extensions; CWE-757",
        versions,
    ),
    Attack(
        "frames.repeated-ids",
        "Request ids that are used twice",
        "to get the answer to another's request",
        "each connection gets its own answers, one for each request",
        "docs/protocol.md, Requests and replies; CWE-488",
        repeated_ids,
    ),
    Attack(
        "frames.short-times",
        "Requests whose time is over",
        "to have work done that nobody waits for, without an answer",
        "each is answered, at most with its result",
        "docs/protocol.md, Requests and replies; CWE-400",
        short_times,
    ),
)
