"""W3C trace context (https://www.w3.org/TR/trace-context/) in a request's extensions. It makes no spans and no ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["TRACEPARENT", "TraceContext", "carried", "read_traceparent", "trace_of"]

TRACEPARENT: Final = "traceparent"
"""The key of the extension; its value is the header's, in ASCII."""
KNOWN_FLAGS: Final = 0x03
"""``sampled`` and ``random-trace-id``; the others are reserved, and are passed on as zero."""
LENGTH: Final = 55
MAX_LENGTH: Final = 512
"""Of a later version of the header, which may have more after what is understood."""
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A place in a trace: both ids in lower-case hex, and the flags that are known."""

    trace_id: str
    span_id: str
    flags: int

    def __str__(self) -> str:
        """The value of a ``traceparent`` header, of version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags & KNOWN_FLAGS:02x}"


def read_traceparent(text: str) -> TraceContext:
    """The context in a header's value; ``ValueError`` says what is wrong with it.

    A later version than 00 is read as far as it is understood, as the W3C's rules say.
    """
    if not isinstance(text, str):
        raise TypeError(f"a traceparent must be str, not {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a traceparent of {len(text)} characters; one has {LENGTH}")
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(
            f"the traceparent {text[:80]!r} is not of the form version-traceid-parentid-flags in lower-case hex, "
            "of 2, 32, 16 and 2 digits"
        )
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff":
        raise ValueError("a traceparent of the version ff, which there is not")
    if version == "00" and more is not None:
        raise ValueError(f"a traceparent of version 00 has {LENGTH} characters, not {len(text)}")
    if not int(trace_id, 16) or not int(span_id, 16):
        raise ValueError("a traceparent whose trace id or parent id is zero")
    return TraceContext(trace_id, span_id, int(flags, 16) & KNOWN_FLAGS)


def trace_of(extensions: Mapping[str, bytes]) -> TraceContext | None:
    """The trace that a request carries; None without one, and for one that is malformed, which is ignored."""
    value = extensions.get(TRACEPARENT)
    if value is None:
        return None
    try:
        return read_traceparent(value.decode("ascii"))
    except ValueError:
        return None


def carried(trace: TraceContext) -> dict[str, bytes]:
    """The extension that carries it."""
    return {TRACEPARENT: str(trace).encode("ascii")}
