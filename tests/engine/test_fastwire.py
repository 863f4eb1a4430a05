"""The quick reader and writer of warm operations against the ordinary codecs, which are the reference."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ProtocolError
from engine.protocol import _fastwire as fast
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, Operate, Result
from engine.protocol.wire import Load, Reply, Request, reply_codec, request_codec

OPERATE = REQUEST_CODECS["encrypt"]
RESULT = REPLY_CODECS["encrypt"]
names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}\Z")
numbers = st.one_of(
    st.integers(0, 2**63 - 1),
    st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1]),
)
versions = st.integers(0, 127)
sizes = st.one_of(st.integers(0, 600), st.sampled_from([255, 256, 4096, 48 * 1024, 48 * 1024 + 128]))


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


operates = st.builds(
    Operate,
    key=names,
    key_id=st.sampled_from([b"", bytes(range(16))]),
    data=sizes.map(content),
    associated_data=st.integers(0, 4096).map(content),
    proof=st.integers(0, 1024).map(content),
    digested=st.booleans(),
    grant=st.just(b""),
)


def request_bytes(number: int, verb: str, timeout_ms: int, body: Operate, version: int = 1) -> bytes:
    return request_codec.encode(Request(version, number, verb, timeout_ms, OPERATE.encode(body), {}))


@given(versions, numbers, st.sampled_from(["encrypt", "verify-mac", "x" * 31]), st.integers(1, 600_000), operates)
@settings(deadline=None)
def test_requests_are_read_and_written_as_the_codecs_do(
    version: int, number: int, verb: str, timeout_ms: int, body: Operate
) -> None:
    """Both ways the same bytes and the same fields."""
    data = request_bytes(number, verb, timeout_ms, body, version)
    fields = (
        version,
        number,
        verb.encode(),
        timeout_ms,
        body.key.encode(),
        body.key_id,
        body.data,
        body.associated_data,
        body.proof,
        body.digested,
    )
    assert fast.read_operate(data) == fields
    assert fast.write_operate(*fields) == data


@given(versions, numbers, sizes.map(content), numbers, numbers, st.booleans())
@settings(deadline=None)
def test_results_are_read_and_written_as_the_codecs_do(
    version: int, number: int, data: bytes, queue: int, service_us: int, loaded: bool
) -> None:
    """Both ways the same bytes and the same fields."""
    body = RESULT.encode(Result(data))
    reply = reply_codec.encode(Reply(version, number, 0, body, Load(queue, service_us, loaded), {}))
    assert fast.read_result(reply) == (version, number, data, queue, service_us, loaded)
    assert fast.write_result(version, number, data, queue, service_us, loaded) == reply


def changed(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut, put in or appended."""
    kind, at = chance.randrange(5), chance.randrange(len(data))
    if kind == 0:
        return (
            data[:at]
            + bytes([chance.choice([0, 0x7F, 0x80, 0xC2, 0xC4, 0xCC, 0xFF, chance.randrange(256)])])
            + data[at + 1 :]
        )
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + chance.randbytes(chance.randrange(1, 4)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + 1 :]
    return data + chance.randbytes(1)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_read_that_the_codecs_refuse(seed: int) -> None:
    """Of 20,000 changed messages, what the quick reader takes the codecs take too, with the same meaning."""
    chance = random.Random(seed)
    taken = 0
    for _ in range(20_000):
        body = Operate(
            "k" * chance.randrange(1, 40), bytes(16), chance.randbytes(chance.randrange(300)), b"a", b"", False, b""
        )
        data = request_bytes(chance.choice([1, 200, 70_000, 2**40]), "encrypt", chance.choice([5, 5_000]), body)
        if chance.random() < 0.9:
            data = changed(data, chance)
        read = fast.read_operate(data)
        if read is None:
            continue
        taken += 1
        try:
            request = request_codec.decode(data)
            told = OPERATE.decode(request.body)
        except ProtocolError as error:
            # Patterns of names are left to the caller, who looks verb and name up among those that were checked.
            assert "$[0]" in str(error) or "UTF-8" in str(error), error  # noqa: PT017
            continue
        assert (request.version, request.id, request.verb.encode(), request.timeout_ms) == read[:4]
        assert not request.extensions
        fields = (told.key.encode(), told.key_id, told.data, told.associated_data, told.proof, told.digested)
        assert fields == read[4:]
        assert not told.grant
    assert taken > 2_000


@pytest.mark.parametrize("seed", range(4))
def test_no_result_is_read_that_the_codecs_refuse(seed: int) -> None:
    """The same for replies."""
    chance = random.Random(seed)
    taken = 0
    for _ in range(20_000):
        body = RESULT.encode(Result(chance.randbytes(chance.randrange(300))))
        data = reply_codec.encode(Reply(1, chance.choice([1, 200, 2**40]), 0, body, Load(3, 200, True), {}))
        if chance.random() < 0.9:
            data = changed(data, chance)
        read = fast.read_result(data)
        if read is None:
            continue
        taken += 1
        reply = reply_codec.decode(data)
        assert (reply.version, reply.id, reply.status, reply.extensions) == (*read[:2], 0, {})
        assert RESULT.decode(reply.body).data == read[2]
        assert (reply.load.queue, reply.load.service_us, reply.load.loaded) == read[3:]
    assert taken > 2_000


def test_what_is_not_warm_is_left_to_the_codecs() -> None:
    """A grant, an extension, a version that is no small integer, an error reply, a message over the limit."""
    body = Operate("k", b"", b"d", b"", b"", False, b"grant")
    assert fast.read_operate(request_bytes(1, "sign", 5, body)) is None
    plain = OPERATE.encode(Operate("k", b"", b"d", b"", b"", False, b""))
    assert fast.read_operate(request_codec.encode(Request(1, 1, "sign", 5, plain, {}))) is not None
    assert fast.read_operate(request_codec.encode(Request(1, 1, "sign", 5, plain, {"x": b""}))) is None
    assert fast.read_operate(request_codec.encode(Request(127, 1, "sign", 5, plain, {}))) is not None
    assert fast.read_operate(request_codec.encode(Request(128, 1, "sign", 5, plain, {}))) is None
    assert fast.read_result(reply_codec.encode(Reply(1, 1, 1, b"", Load(0, 0, False), {}))) is None
    for verb, key, key_id in ((b"v" * 32, b"k", b""), (b"sign", b"k" * 129, b""), (b"sign", b"k", bytes(17))):
        assert fast.write_operate(1, 1, verb, 5, key, key_id, b"d", b"", b"", False) is None
    assert fast.write_operate(1, 1, b"v" * 31, 5, b"k" * 128, bytes(16), b"d", b"", b"", False) is not None
    big = bytes(48 * 1024 + 128)
    assert fast.write_operate(1, 1, b"encrypt", 5, b"k", b"", big, bytes(16 * 1024), b"", False) is None
