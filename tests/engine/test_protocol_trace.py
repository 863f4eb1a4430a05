"""W3C trace context: what is read, what is refused, and what is passed on."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.trace import TraceContext, carried, read_traceparent, trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"

MALFORMED = [
    "",
    GOOD[:-1],
    GOOD + " ",
    " " + GOOD,
    GOOD + "\n",
    GOOD + "-",
    GOOD + "-more",
    GOOD.upper(),
    GOOD.replace("-", "_"),
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-1",
    f"0-{TRACE}-{SPAN}-01",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE[:-1]}g-{SPAN}-01",
    f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    f"00-{TRACE}{SPAN}-01",
    f"cc-{TRACE}-{SPAN}-01more",
    f"cc-{TRACE}-{SPAN}-01-\x00",
    f"cc-{TRACE}-{SPAN}-01-" + "x" * 600,
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_one_is_refused_and_as_an_extension_ignored(text: str) -> None:
    with pytest.raises(ValueError, match="traceparent") as caught:
        read_traceparent(text)
    assert len(str(caught.value)) < 400
    assert trace_of({"traceparent": text.encode()}) is None


@pytest.mark.parametrize("value", [b"\xff" * 55, GOOD.encode("utf-16"), b"\x00" * 55])
def test_an_extension_that_is_no_text_is_ignored(value: bytes) -> None:
    assert trace_of({"traceparent": value}) is None


@pytest.mark.parametrize("value", [None, 7, GOOD.encode()])
def test_only_text_is_one(value: object) -> None:
    with pytest.raises(TypeError, match="must be str"):
        read_traceparent(value)  # type: ignore[arg-type]


def test_it_is_taken_apart_and_put_together() -> None:
    told = read_traceparent(GOOD)
    assert told == TraceContext(TRACE, SPAN, 1)
    assert str(told) == GOOD
    assert trace_of(carried(told)) == told
    assert trace_of({}) is None
    assert trace_of({"other": GOOD.encode()}) is None


def test_a_later_version_is_read_as_far_as_it_is_known_and_passed_on_as_version_00() -> None:
    assert str(read_traceparent(f"cc-{TRACE}-{SPAN}-01-what.the-future-holds")) == GOOD
    assert str(read_traceparent(f"01-{TRACE}-{SPAN}-01")) == GOOD


def test_unknown_flags_are_passed_on_as_zero() -> None:
    for flags in range(256):
        assert read_traceparent(f"00-{TRACE}-{SPAN}-{flags:02x}").flags == flags & 0x03


@given(
    st.text(max_size=70)
    | st.from_regex(re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"), fullmatch=True)
)
def test_whatever_is_accepted_reads_the_same_again(text: str) -> None:
    try:
        told = read_traceparent(text)
    except ValueError:
        return
    assert read_traceparent(str(told)) == told
    assert text[3:52] == str(told)[3:52]
