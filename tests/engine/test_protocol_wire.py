"""Strict decoding: each message has one encoding, and every other sequence of bytes is refused."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec import inspect as spec
from statuses import WELL

from engine.errors import ProtocolError
from engine.protocol import manifest, requests
from engine.protocol.requests import BODIES, CLIENT_VERBS, NODE_VERBS, REGISTRY_VERBS, REPLY_CODECS, REQUEST_CODECS
from engine.protocol.wire import (
    LOWEST_VERSION,
    MAX_DATA,
    MAX_MESSAGE,
    PROTOCOL_VERSION,
    Codec,
    ErrorBody,
    Load,
    Reply,
    Request,
    Versions,
    error_codec,
    reply_codec,
    request_codec,
)

relaxed = settings(deadline=None, max_examples=40)
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}", fullmatch=True)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """A strategy for everything that a message type allows, from the type itself."""
    if isinstance(kind, spec.BoolType):
        return st.booleans()
    if isinstance(kind, spec.IntType):
        return st.integers(0 if kind.ge is None else kind.ge, 2**63 - 1 if kind.le is None else kind.le)
    if isinstance(kind, spec.BytesType):
        most = min(200, kind.max_length if kind.max_length is not None else 200)
        return st.binary(min_size=min(kind.min_length or 0, most), max_size=max(most, kind.min_length or 0))
    if isinstance(kind, spec.StrType):
        if kind.pattern:
            return NAME
        return st.text(min_size=kind.min_length or 0, max_size=min(20, kind.max_length or 20))
    if isinstance(kind, spec.LiteralType):
        return st.sampled_from(list(kind.values))
    if isinstance(kind, spec.ListType):
        least = kind.min_length or 0
        return st.lists(values(kind.item_type), min_size=least, max_size=max(least, 3))
    if isinstance(kind, spec.TupleType):
        return st.tuples(*map(values, kind.item_types))
    if isinstance(kind, spec.DictType):
        return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=kind.max_length or 3)
    if isinstance(kind, spec.StructType):
        return st.builds(kind.cls, *(values(each.type) for each in kind.fields))
    raise AssertionError(f"no strategy for {kind}")


def messages(kind: type[Struct]) -> st.SearchStrategy[Any]:
    return values(spec.type_info(kind))


CODECS = {
    "request": (Request, request_codec),
    "reply": (Reply, reply_codec),
    "error": (ErrorBody, error_codec),
    **{f"body of {verb}": (kinds[0], REQUEST_CODECS[verb]) for verb, kinds in BODIES.items()},
    **{f"reply to {verb}": (kinds[1], REPLY_CODECS[verb]) for verb, kinds in BODIES.items()},
    "balancer's status": (requests.BalancerStatus, requests.balancer_status_codec),
}


@pytest.mark.parametrize("what", sorted(CODECS))
def test_every_message_comes_back_as_it_was(what: str) -> None:
    kind, codec = CODECS[what]

    @given(messages(kind))
    @relaxed
    def there_and_back(message: Any) -> None:
        data = codec.encode(message)
        assert codec.decode(data) == message
        assert codec.encode(codec.decode(data)) == data

    there_and_back()


@pytest.mark.parametrize("what", sorted(CODECS))
def test_trailing_data_a_cut_and_an_extra_field_are_refused(what: str) -> None:
    kind, codec = CODECS[what]

    @given(messages(kind), st.binary(min_size=1, max_size=5))
    @relaxed
    def broken(message: Any, extra: bytes) -> None:
        data = codec.encode(message)
        with pytest.raises(ProtocolError):
            codec.decode(data + extra)
        for length in range(0, len(data), max(1, len(data) // 20)):
            with pytest.raises(ProtocolError):
                codec.decode(data[:length])
        fields = msgspec.msgpack.decode(data)
        required = len(fields) - len(getattr(kind, "ADDED", {}))
        for wrong in ([*fields, None], [*fields, 0], fields[: required - 1] if fields else {}):
            with pytest.raises(ProtocolError):
                codec.decode(msgspec.msgpack.encode(wrong))

    broken()


@pytest.mark.parametrize("what", sorted(CODECS))
def test_a_changed_byte_is_refused_or_is_the_encoding_of_another_message(what: str) -> None:
    kind, codec = CODECS[what]

    @given(messages(kind), st.data())
    @relaxed
    def changed(message: Any, data: Any) -> None:
        good = codec.encode(message)
        position = data.draw(st.integers(0, len(good) - 1))
        flip = data.draw(st.integers(1, 255))
        wrong = good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :]
        try:
            found = codec.decode(wrong)
        except ProtocolError:
            return
        assert codec.encode(found) == wrong
        assert found != message

    changed()


@given(st.binary(max_size=400))
@settings(deadline=None, max_examples=300)
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    for kind, codec in (CODECS["request"], CODECS["reply"], CODECS["body of encrypt"], CODECS["body of share.prepare"]):
        try:
            found = codec.decode(data)
        except ProtocolError:
            continue
        assert isinstance(found, kind)


# --- canonical form, one rule at a time ---


def longer(value: int) -> list[bytes]:
    """The encodings of a small non-negative integer that are not the shortest."""
    return [
        b"\xcc" + value.to_bytes(1, "big"),
        b"\xcd" + value.to_bytes(2, "big"),
        b"\xce" + value.to_bytes(4, "big"),
        b"\xcf" + value.to_bytes(8, "big"),
        b"\xd0" + value.to_bytes(1, "big"),
        b"\xd1" + value.to_bytes(2, "big"),
        b"\xd2" + value.to_bytes(4, "big"),
        b"\xd3" + value.to_bytes(8, "big"),
    ]


@pytest.mark.parametrize("encoding", range(8))
@pytest.mark.parametrize("value", [0, 1, 127])
def test_an_integer_longer_than_need_be_is_refused(value: int, encoding: int) -> None:
    codec = REQUEST_CODECS["registry.sync"]
    assert codec.decode(b"\x91" + bytes([value])).after == value
    with pytest.raises(ProtocolError, match="not in canonical form"):
        codec.decode(b"\x91" + longer(value)[encoding])


@pytest.mark.parametrize(
    "data",
    [
        b"\xdc\x00\x02\xa1k\x00",  # array16
        b"\xdd\x00\x00\x00\x02\xa1k\x00",  # array32
        b"\x92\xd9\x01k\x00",  # str8
        b"\x92\xda\x00\x01k\x00",  # str16
        b"\x92\xdb\x00\x00\x00\x01k\x00",  # str32
    ],
)
def test_a_header_longer_than_need_be_is_refused(data: bytes) -> None:
    codec = REQUEST_CODECS["describe"]
    assert codec.decode(b"\x92\xa1k\x00").key == "k"
    with pytest.raises(ProtocolError, match="not in canonical form"):
        codec.decode(data)


@pytest.mark.parametrize("data", [b"\x91\xc5\x00\x01x", b"\x91\xc6\x00\x00\x00\x01x"])
def test_a_byte_string_with_a_longer_header_is_refused(data: bytes) -> None:
    codec = REPLY_CODECS["encrypt"]
    assert codec.decode(b"\x91\xc4\x01x").data == b"x"
    with pytest.raises(ProtocolError, match="not in canonical form"):
        codec.decode(data)


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"])
def test_invalid_utf8_is_refused_without_showing_it(text: bytes) -> None:
    data = b"\x93" + bytes([0xA0 + len(text)]) + text + b"\xa0\x90"
    with pytest.raises(ProtocolError) as caught:
        error_codec.decode(data)
    assert caught.value.__cause__ is None
    assert "\\x" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\x92\xa1k"[:2],
        b"\x92\xc0\x00",
        b"\x92\xc3\x00",
        b"\x92\xca\x00\x00\x00\x00\x00",  # a float
        b"\x92\xc4\x01k\x00",  # bytes for text
        b"\x92\xd4\x01k\x00",  # an extension type
        b"\x92\xc1\x00",  # the byte that means nothing
        b"\x81\xa3key\xa1k",  # a map for an array
        b"\xa1k",
        b"",
    ],
)
def test_another_type_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        REQUEST_CODECS["describe"].decode(data)


def test_a_repeated_extension_is_refused() -> None:
    good = request_codec.encode(Request(1, 1, "v", 1, b"", {"a": b"", "b": b""}))
    twice = good.replace(b"\xa1b\xc4\x00", b"\xa1a\xc4\x00")
    assert twice != good
    with pytest.raises(ProtocolError, match="not in canonical form"):
        request_codec.decode(twice)


def test_numbers_out_of_range_are_refused() -> None:
    for value in (-1, 2**63, 2**64 - 1):
        with pytest.raises(ProtocolError):
            request_codec.decode(msgspec.msgpack.encode([1, value, "v", 1, b"", {}]))
    for status in (3, 255):
        with pytest.raises(ProtocolError):
            reply_codec.decode(msgspec.msgpack.encode([1, 1, status, b"", [0, 0, False], {}]))


# --- limits ---


@pytest.mark.parametrize("length", [0, 1, MAX_DATA, MAX_DATA + 128])
def test_data_within_the_limit_passes(length: int) -> None:
    body = requests.Operate("k", b"", bytes(length), b"", b"", False, b"")
    assert REQUEST_CODECS["encrypt"].decode(REQUEST_CODECS["encrypt"].encode(body)) == body


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", bytes(MAX_DATA + 129)),
        ("associated_data", bytes(4097)),
        ("proof", bytes(1025)),
        ("grant", bytes(2049)),
        ("key_id", bytes(17)),
        ("key", ""),
        ("key", "k" * 129),
    ],
)
def test_a_field_beyond_its_limit_is_refused(field: str, value: object) -> None:
    body = requests.Operate("k", b"", b"", b"", b"", False, b"")
    with pytest.raises(ProtocolError):
        REQUEST_CODECS["encrypt"].decode(msgspec.msgpack.encode(msgspec.structs.replace(body, **{field: value})))


@pytest.mark.parametrize(
    "name", ["orders\n", "\norders", "or ders", "../x", "-x", ".x", "ü", "a\0b", "a\u202eb", "a*", "a\\b", "a;b", ""]
)
def test_a_name_outside_its_alphabet_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        REQUEST_CODECS["describe"].decode(msgspec.msgpack.encode([name, 0]))


@pytest.mark.parametrize("name", ["a", "0", "a.b_c:d/e@f+g-h", "A" * 128])
def test_a_name_of_its_alphabet_passes(name: str) -> None:
    assert REQUEST_CODECS["describe"].decode(msgspec.msgpack.encode([name, 0])).key == name


def test_a_message_beyond_the_limit_is_neither_sent_nor_read() -> None:
    long = Request(1, 1, "v", 1, bytes(MAX_MESSAGE), {})
    with pytest.raises(ValueError, match=f"the limit is {MAX_MESSAGE}"):
        request_codec.encode(long)
    with pytest.raises(ProtocolError, match=f"the limit is {MAX_MESSAGE}"):
        request_codec.decode(msgspec.msgpack.encode(long))


@pytest.mark.parametrize(
    "data", [b"\x91" * 60_000, b"\x81" * 60_000, b"\xdd\xff\xff\xff\xff", b"\x93\xdf\xff\xff\xff\xff"]
)
def test_deep_or_huge_headers_are_refused(data: bytes) -> None:
    for _, codec in CODECS.values():
        with pytest.raises(ProtocolError):
            codec.decode(data[: codec.limit])


def test_every_field_of_every_message_has_a_bound() -> None:
    """A limit on everything: text, bytes, lists and maps without a length do not occur."""

    def unbounded(kind: Any, path: str) -> list[str]:
        if isinstance(kind, spec.StructType):
            return [each for field in kind.fields for each in unbounded(field.type, f"{path}.{field.name}")]
        found = []
        if isinstance(kind, spec.BytesType | spec.StrType | spec.ListType | spec.DictType) and kind.max_length is None:
            found.append(path)
        if isinstance(kind, spec.IntType) and (kind.ge is None or kind.le is None):
            found.append(path)
        inner = [getattr(kind, name, None) for name in ("item_type", "key_type", "value_type")]
        inner += list(getattr(kind, "item_types", ()))
        return found + [each for part in inner if part is not None for each in unbounded(part, path + "[]")]

    lacking = [each for what, (kind, _) in CODECS.items() for each in unbounded(spec.type_info(kind), what)]
    assert lacking == []


def test_a_field_is_optional_only_where_an_older_version_has_it_not() -> None:
    """Those of a newer version stand at the end, have a default, and came in a version that is still spoken beside."""
    newer = 0
    for kind, _ in CODECS.values():
        added: dict[str, int] = getattr(kind, "ADDED", {})
        fields = spec.type_info(kind).fields  # type: ignore[attr-defined]
        assert [each.name for each in fields if not each.required] == list(added)
        assert list(added) == [each.name for each in fields][len(fields) - len(added) :]
        assert list(added.values()) == sorted(added.values())
        assert all(LOWEST_VERSION < each <= PROTOCOL_VERSION for each in added.values()), f"{kind}: all know it by now"
        newer += len(added)
    assert newer


BALANCER = requests.BalancerStatus("bal", "1", 1, 1, 0, 0, 0, 0, "", WELL.service, [], [], "", WELL.host, [], "")


@pytest.mark.parametrize("told", [WELL, BALANCER])
def test_an_older_version_is_written_without_what_a_newer_one_added(told: Any) -> None:
    """Who knows version 1 alone refuses longer arrays, so it is given none; this software reads both."""
    kind: Any = type(told)
    fields = [(each.name, each.type) for each in msgspec.structs.fields(kind) if each.name not in kind.ADDED]
    old = msgspec.defstruct("Old", fields, array_like=True, forbid_unknown_fields=True)
    codec, reader = Codec(kind, "status"), Codec(old, "status")
    full = msgspec.structs.replace(told, protocol=2, clients=[requests.ClientSeen("app", "1", 2, 1, 5)])
    older, newer = codec.encode(full, 1), codec.encode(full)
    assert reader.encode(reader.decode(older)) == older
    assert codec.decode(older) == msgspec.structs.replace(full, protocol=1, clients=[])
    assert codec.decode(newer) == full
    assert codec.encode(full, 9) == codec.encode(full, 2) == newer
    with pytest.raises(ProtocolError):
        reader.decode(newer)


# --- versions and verbs ---


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_versions_and_the_next_one_are_taken(version: int) -> None:
    Versions(1, 2).check(version)


@pytest.mark.parametrize("version", [0, 4, 255, 2**63 - 1])
def test_another_version_is_refused(version: int) -> None:
    with pytest.raises(ProtocolError, match=f"protocol version {version}; this side speaks 1 to 2 and takes 1 to 3"):
        Versions(1, 2).check(version)


@pytest.mark.parametrize(
    ("own", "peer", "spoken"),
    [
        ((1, 2), (1, 2), 2),
        ((1, 2), (1, 1), 1),
        ((1, 1), (1, 2), 1),
        ((1, 2), (2, 3), 2),
        ((2, 3), (1, 2), 2),
        ((2, 2), (2, 3), 2),
        ((1, 2), (3, 4), 0),
        ((3, 4), (1, 2), 0),
        ((1, 1), (2, 3), 0),
    ],
)
def test_the_newest_version_that_both_speak_is_spoken(own: tuple[int, int], peer: tuple[int, int], spoken: int) -> None:
    """Of neighbouring releases there always is one, and what either sends before it knows is taken by the other."""
    this, that = Versions(*own), Versions(*peer)
    assert this.common(that.lowest, that.highest) == that.common(this.lowest, this.highest) == spoken
    if spoken:
        assert that.takes(this.highest)
        assert this.takes(that.reply_to(this.highest))


def test_a_verb_has_one_audience() -> None:
    groups = (
        CLIENT_VERBS,
        NODE_VERBS,
        REGISTRY_VERBS,
        requests.MANIFEST_VERBS,
        {requests.HELLO},
        requests.BALANCER_VERBS,
        requests.BACKUP_VERBS,
        {requests.LATENCY, requests.TABLE, requests.PLAN, requests.HOLDINGS, requests.DEGRADED},
    )
    for one, other in itertools.combinations(groups, 2):
        assert not set(one) & set(other)
    assert set().union(*groups) == set(BODIES)


def test_a_codec_says_what_it_decodes_and_never_the_bytes() -> None:
    codec = Codec(requests.SharePrepare, "body of share.prepare")
    secret = b"\xa5SECRETSHARE" * 4
    good = requests.SharePrepare(b"", 1, secret, bytes(32), [])
    data = codec.encode(good)
    wrong = (data[:-1], data + b"x", data.replace(b"\x95", b"\x96", 1), data.replace(b"\x01", b"\x00", 1))
    for each in wrong:
        with pytest.raises(ProtocolError, match=r"^body of share\.prepare: ") as caught:
            codec.decode(each)
        assert "SECRET" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_a_request_is_classified_by_its_verb_and_algorithm() -> None:
    request = Request(1, 1, "sign", 1, b"", {})
    assert requests.classify_request(request, "ed25519") == "sign/ed25519"
    assert requests.classify_request("encrypt", "aes-256-gcm") == "encrypt/aes-256-gcm"
    for verb in ("share.release", "stats", "nonsense"):
        with pytest.raises(ValueError, match="is no request type"):
            requests.classify_request(verb, "ed25519")


def test_the_load_on_a_reply_is_bounded() -> None:
    reply = Reply(1, 1, 0, b"", Load(0, 0, False), {})
    data = reply_codec.encode(reply)
    assert reply_codec.decode(data) == reply
    with pytest.raises(ProtocolError):
        reply_codec.decode(msgspec.msgpack.encode([1, 1, 0, b"", [-1, 0, False], {}]))


def test_an_error_quotes_no_value_of_the_message() -> None:
    """Not even a long one where one of a few words is expected: errors go into logs and replies."""
    member = msgspec.msgpack.encode(["n", "role" * 500, bytes(32), bytes(32), "", "", ""])
    with pytest.raises(ProtocolError, match=r"^identity card: Invalid enum value - at `\$\[1\]`$"):
        manifest._cards.decode(member)
