"""What a target is, and those that the registries of the code give: every codec, requests and replies as they arrive.

A target decodes bytes as the code does and holds what came out against rules of its own. ``decode`` returns a word for
what was accepted; a refusal is an exception of ``errors``; anything else that is raised is a finding.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import msgpack
import msgspec
from mutate import change_message, resized
from schema import MARK, Reference, samples, tree_of
from world import HOLDERS, the_world

import balancer
import engine
import nodes
from engine.client.transport import Moved, raise_for_status
from engine.errors import EngineError, ProtocolError
from engine.protocol import requests, wire
from engine.protocol._fastwire import read_operate, read_result
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, Operate, ReleasedShare, Result, ShareRelease
from engine.protocol.wire import LOWEST_VERSION, PROTOCOL_VERSION, Codec, ErrorBody, Load, Reply, Request, Versions
from nodes.policy import check_key, check_verb

TEXT_MAX: Final = 1_500
"""No error text is longer."""


class Finding(Exception):
    """Something that must not be."""


Change = Callable[[Random, bytes, bytes], bytes]


@dataclass
class Target:
    """One way in. ``weight`` is its part of all executions; ``covers`` are the functions that it reaches.

    ``cpu_s`` bounds one execution; ``errors`` are the refusals that its interface declares.
    """

    name: str
    samples: Callable[[], Sequence[bytes]]
    decode: Callable[[bytes], str]
    change: Change = change_message
    errors: tuple[type[BaseException], ...] = (ProtocolError,)
    weight: float = 1.0
    cpu_s: float = 0.25
    covers: tuple[str, ...] = ()
    secrets: tuple[bytes, ...] = (MARK,)
    text_max: int = TEXT_MAX
    made: list[bytes] = field(default_factory=list)

    def seeds(self) -> list[bytes]:
        """The valid samples, made once."""
        if not self.made:
            self.made = list(self.samples())
        return self.made


def require(condition: object, text: str) -> None:
    """A rule of a target."""
    if not condition:
        raise Finding(text)


# --- every codec of the code ---


def modules() -> list[Any]:
    """Every module of the three packages that can be imported without starting anything."""
    found = []
    for package in (engine, nodes, balancer):
        for each in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not each.name.endswith(("__main__", "_fastshamir")):
                found.append(importlib.import_module(each.name))
    return found


def codecs() -> dict[str, Codec[Any]]:
    """Every ``Codec`` that a module has under a name or in a table, by what it decodes."""
    found: dict[str, Codec[Any]] = {}
    for module in modules():
        for value in list(vars(module).values()):
            given = (
                value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
            )
            for each in given:
                if isinstance(each, Codec):
                    name = each.what
                    if found.setdefault(name, each) is not each:
                        name = f"{each.what} ({kind_of(each).__name__})"
                    require(found.setdefault(name, each) is each, f"two codecs are called {name!r}")
    return found


def kind_of(codec: Codec[Any]) -> type:
    """The message type of a codec."""
    return codec._decode.__self__.type  # type: ignore[attr-defined, no-any-return]


def codec_targets() -> list[Target]:
    """A target for each codec. Those of one message type share its part of the executions."""
    every = codecs()
    same: dict[type, int] = {}
    for codec in every.values():
        same[kind_of(codec)] = same.get(kind_of(codec), 0) + 1
    return [codec_target(codec, 1.0 / same[kind_of(codec)], name) for name, codec in every.items()]


def codec_target(codec: Codec[Any], weight: float, name: str = "") -> Target:
    """A codec against the reference: it takes exactly what that takes, and gives it back."""
    kind = kind_of(codec)
    limit = codec.limit
    reference = Reference(kind, limit)

    def decode(data: bytes) -> str:
        try:
            value = codec.decode(data)
        except ProtocolError:
            if reference.tree(data) is not None:
                raise Finding(f"{codec.what}: a valid message is refused") from None
            raise
        tree = reference.tree(data)
        require(tree is not None, f"{codec.what}: what breaks its rules is accepted")
        again = codec.encode(value)
        shortened = again != data and len(tree_of(data)) < len(tree) and tree_of(again) == tree
        require(again == data or shortened, f"{codec.what}: what was decoded encodes to other bytes")
        same = msgspec.to_builtins(value, builtin_types=(bytes,)) == tree or tree_of_value(value) == tree
        require(same, f"{codec.what}: two decoders read different values")
        return "accepted"

    def change(r: Random, data: bytes, donor: bytes) -> bytes:
        if r.random() < 0.003:
            return resized(r, data, limit + r.choice((-1, 0, 1, 1, 2)))
        return change_message(r, data, donor)

    if max(map(len, samples(kind, limit, codec.what))) > 1_000:
        weight /= 4  # a message of many elements is slow to make and to check

    return Target(
        f"codec/{name or codec.what}", lambda: samples(kind, limit, codec.what), decode, change, weight=weight,
        covers=("engine.protocol.wire.Codec.decode",),
    )  # fmt: skip


def tree_of_value(value: Any) -> Any:
    """A decoded message as lists, to be compared with the tree."""
    if isinstance(value, msgspec.Struct):
        return [tree_of_value(getattr(value, name)) for name in value.__struct_fields__]
    if isinstance(value, list | tuple):
        return [tree_of_value(each) for each in value]
    return value


# --- requests and replies as a node and a client take them ---


def _request_samples() -> list[bytes]:
    made = []
    for number, (verb, codec) in enumerate(sorted(REQUEST_CODECS.items())):
        for body in samples(kind_of(codec), 8_192, f"request {verb}")[:2]:
            made.append(wire.request_codec.encode(Request(PROTOCOL_VERSION, number, verb, 1_000, body, {})))
    made.append(wire.request_codec.encode(Request(PROTOCOL_VERSION, 1, "no.such", 1, b"\x90", {"x": b"y"})))
    return made


SPOKEN: Final = Versions(LOWEST_VERSION, PROTOCOL_VERSION)
_SENDERS: Final = ("alice", "bob", "node1", "balancer", "op")


def _change_frame(body_at: int) -> Change:
    """Change the frame, or the body in it, which is put back with its right length."""

    def change(r: Random, data: bytes, donor: bytes) -> bytes:
        if r.random() < 0.45:
            return change_message(r, data, donor)
        try:
            fields, theirs = msgpack.unpackb(data, raw=False), msgpack.unpackb(donor, raw=False)
            fields[body_at] = change_message(r, fields[body_at], theirs[body_at])
            return msgpack.packb(fields, use_bin_type=True)
        except Exception:  # not a frame any more: whatever that library raises
            return change_message(r, data, donor)

    return change


def _take_request(data: bytes) -> str:
    """Decode, check the version, ask the policy for each kind of member, decode the body: a node's first steps."""
    request = wire.request_codec.decode(data)
    SPOKEN.check(request.version)
    require(1 <= request.version <= PROTOCOL_VERSION + 1, "a version that is not spoken is served")
    world = the_world()
    member = world.cluster.members[_SENDERS[len(data) % len(_SENDERS)]]
    check_verb(world.cluster, member, request.verb)
    codec = REQUEST_CODECS.get(request.verb)
    require(codec is not None, f"the policy lets the unknown verb {request.verb!r} pass")
    assert codec is not None
    if request.verb in requests.NODE_VERBS:
        require(member.role == "node", f"a {member.role} may send {request.verb}")
    if request.verb == requests.STATS:
        require(member.role == "balancer", f"a {member.role} may send {request.verb}")
    body = codec.decode(request.body)
    name = getattr(body, "key", "")
    if name:
        check_key(world.cluster, member, request.verb, name)
        if member.name == "bob" and request.verb not in ("describe", "prewarm"):
            require(len(name) == 3 and name[0] == "b" and name[2] == "x", f"bob may {request.verb} {name!r}")
    return f"{request.verb} of a {member.role}"


def _reply_samples() -> list[bytes]:
    made = []
    for number, (verb, codec) in enumerate(sorted(REPLY_CODECS.items())):
        for body in samples(kind_of(codec), 8_192, f"reply {verb}")[:1]:
            made.append(wire.reply_codec.encode(Reply(PROTOCOL_VERSION, number, 0, body, Load(1, 2, True), {})))
    for status, code in (
        (1, "key-not-found"),
        (1, "quorum-unavailable"),
        (1, "invalid-request"),
        (1, "?"),
        (2, "moved"),
    ):
        body = wire.error_codec.encode(ErrorBody(code, "why it failed", ["node1", "node2"]))
        made.append(wire.reply_codec.encode(Reply(PROTOCOL_VERSION, 7, status, body, Load(0, 0, False), {})))
    return made


class _Refused(Exception):
    """An error reply was understood."""


def _take_reply(data: bytes) -> str:
    """Decode, check the version, raise the error it carries, else decode the body of the verb it answers."""
    reply = wire.reply_codec.decode(data)
    SPOKEN.check(reply.version)
    try:
        raise_for_status(reply)
    except ProtocolError:
        raise
    except Moved as moved:
        require(all(1 <= len(each) <= 128 for each in moved.names), "a moved reply names what is no name")
        return "moved"
    except (EngineError, ValueError) as error:
        require(reply.status == 1, "an ok reply raises an error")
        require(len(str(error)) <= 1024 + 64 + 2, "the text of an error reply has no bound")
        return f"error {type(error).__name__}"
    verbs = sorted(REPLY_CODECS)
    verb = verbs[reply.id % len(verbs)]
    REPLY_CODECS[verb].decode(reply.body)
    return f"reply to {verb}"


# --- the same frames as fastwire.h reads them, which may leave any to the codecs, but may not read another meaning ---


def _operate_samples() -> list[bytes]:
    made = []
    for number, (key, data) in enumerate((("orders", b""), ("a" * 40, bytes(300)), ("k", bytes(range(200))))):
        body = REQUEST_CODECS["sign"].encode(Operate(key, bytes(16 * (number % 2)), data, b"aad", b"p" * 70, True, b""))
        made.append(
            wire.request_codec.encode(Request(PROTOCOL_VERSION, 300**number, "sign", 5 * 300**number, body, {}))
        )
    return made


def _take_operate(data: bytes) -> str:
    read = read_operate(data)
    if read is None:
        raise ProtocolError("left to the codecs")
    try:
        request = wire.request_codec.decode(data)
        body = REQUEST_CODECS["sign"].decode(request.body)
    except ProtocolError as error:
        # A plan is looked up by verb and name byte by byte, so that no name passes that was not checked before.
        require("$[0]" in str(error) or "$[2]" in str(error) or "UTF-8" in str(error), f"it is refused: {error}")
        return "a name that no plan has"
    told = (
        request.version,
        request.id,
        request.verb.encode(),
        request.timeout_ms,
        body.key.encode(),
        body.key_id,
        body.data,
    )
    require((*told, body.associated_data, body.proof, body.digested) == read, "another request")
    require(not request.extensions and not body.grant, "more than it reads")
    return "read"


def _result_samples() -> list[bytes]:
    made = []
    for number, data in enumerate((b"", bytes(300), bytes(range(200)))):
        body = REPLY_CODECS["sign"].encode(Result(data))
        load = Load(number, 300**number, bool(number % 2))
        made.append(wire.reply_codec.encode(Reply(PROTOCOL_VERSION, 300**number, 0, body, load, {})))
    return made


def _take_result(data: bytes) -> str:
    read = read_result(data)
    if read is None:
        raise ProtocolError("left to the codecs")
    reply = wire.reply_codec.decode(data)
    body = REPLY_CODECS["sign"].decode(reply.body)
    told = reply.version, reply.id, body.data, reply.load.queue, reply.load.service_us, reply.load.loaded
    require(told == read, "another reply")
    require((reply.status, reply.extensions) == (0, {}), "more than it reads")
    return "read"


# --- a share on its way from holder to combiner ---


def _release_samples() -> list[bytes]:
    world = the_world()
    dealt = world.first
    made = [
        REPLY_CODECS[requests.SHARE_RELEASE].encode(
            ReleasedShare(dealt.shares[node].x, dealt.shares[node].y, dealt.salts[node])
        )
        for node in HOLDERS
    ]
    request = ShareRelease(dealt.manifest.key_id, world.grant(dealt, "node1"), world.certificate(dealt.record))
    return [*made, REQUEST_CODECS[requests.SHARE_RELEASE].encode(request)]


def _take_share(data: bytes) -> str:
    """A released share in a gathering: it counts only if it is the holder's own."""
    from engine.sharing import Share
    from nodes.gather import Gathering

    told = REPLY_CODECS[requests.SHARE_RELEASE].decode(data)
    dealt = the_world().first
    gathering = Gathering(dealt.manifest, list(HOLDERS))
    gathering.to_ask(0.0)
    gathering.arrived("node2", Share(told.x, told.y), told.salt)
    own = dealt.shares["node2"]
    same = (told.x, told.y, told.salt) == (own.x, own.y, dealt.salts["node2"])
    require(bool(gathering.shares) == same, "a share that is not the holder's counts, or its own does not")
    require(gathering.corrupt == (() if same else ("node2",)), "who gave a wrong share is not named, or wrongly")
    if not same:
        raise ProtocolError("a wrong share")
    gathering.arrived("node1", dealt.shares["node1"], dealt.salts["node1"])
    with gathering.solve() as secret:
        require(bytes(secret) == dealt.secret, "the shares give another secret")
    return "the holder's own"


def frame_targets() -> list[Target]:
    """Requests, replies and released shares as they come from a socket."""
    return [
        Target(
            "frame/request", _request_samples, _take_request, _change_frame(4), (EngineError,), 12,
            covers=("nodes.policy.check_verb", "engine.protocol.wire.Versions.check"),
        ),
        Target(
            "frame/reply", _reply_samples, _take_reply, _change_frame(3), (ProtocolError,), 12,
            covers=("engine.client.transport.raise_for_status", "engine.errors.error_from_code"),
        ),
        Target(
            "frame/quick-request", _operate_samples, _take_operate, _change_frame(4), weight=6,
            covers=("engine.protocol._fastwire.read_operate",),
        ),
        Target(
            "frame/quick-reply", _result_samples, _take_result, _change_frame(3), weight=6,
            covers=("engine.protocol._fastwire.read_result",),
        ),
        Target(
            "share/released", _release_samples, _take_share, errors=(EngineError,), weight=6,
            covers=("nodes.gather.Gathering.arrived",),
        ),
    ]  # fmt: skip


def by_name(targets: Iterable[Target]) -> dict[str, Target]:
    """Targets by their names, each once."""
    found: dict[str, Target] = {}
    for each in targets:
        require(each.name not in found, f"two targets are called {each.name!r}")
        found[each.name] = each
    return found
