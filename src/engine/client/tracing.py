"""Which trace a call belongs to, and its span: what the caller says, or the active span of OpenTelemetry.

OpenTelemetry is not imported for it: where the program has done so there may be an active span, else there is none.
A call without a trace pays for two look-ups.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from engine._version import __version__
from engine.errors import EngineError
from engine.protocol.trace import TraceContext, carried, read_traceparent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

__all__ = ["CallSpan", "Origin", "active_trace", "begin_span", "trace_context"]

_told: ContextVar[TraceContext | None] = ContextVar("keyquorum_trace", default=None)
_API: Final = "opentelemetry.trace"


@contextmanager
def trace_context(traceparent: str) -> Iterator[None]:
    """Calls in this block, in this thread or task, belong to the trace of a W3C ``traceparent``.

    It goes along to the nodes, and beats an active span of OpenTelemetry. ``ValueError`` if it is malformed.
    """
    token = _told.set(read_traceparent(traceparent))
    try:
        yield
    finally:
        _told.reset(token)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a call belongs to: the trace, and OpenTelemetry's context of its caller, where there is that."""

    trace: TraceContext
    context: Context | None


def active_trace() -> Origin | None:
    """What a call that is made now belongs to; None if to no trace."""
    told = _told.get()
    api: Any = sys.modules.get(_API)
    if api is None:
        return None if told is None else Origin(told, None)
    if told is None:
        span = api.get_current_span()
        trace = _of(span)
        return None if trace is None else Origin(trace, api.set_span_in_context(span))
    remote = api.SpanContext(
        int(told.trace_id, 16), int(told.span_id, 16), is_remote=True, trace_flags=api.TraceFlags(told.flags)
    )
    return Origin(told, api.set_span_in_context(api.NonRecordingSpan(remote)))


def _of(span: Span) -> TraceContext | None:
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags))


class CallSpan:
    """One call's place in its trace: a span of its own where OpenTelemetry is there, else its caller's.

    ``extensions`` are those of its requests.
    """

    __slots__ = ("_span", "extensions")

    def __init__(self, trace: TraceContext, span: Span | None) -> None:
        self._span = span
        self.extensions: Mapping[str, bytes] = carried((span and _of(span)) or trace)

    def asks(self, node: str, request_class: str, *, cold: bool) -> None:
        """Who is asked, for what, and whether with a grant; the last one is kept."""
        if self._span is not None:
            self._span.set_attribute("keyquorum.node", node)
            if request_class:
                self._span.set_attribute("keyquorum.class", request_class)
                self._span.set_attribute("keyquorum.cold", cold)

    def end(self, error: BaseException | None = None) -> None:
        """The call is over; of an error its code is told, as its text may name keys."""
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import StatusCode

            code = error.code if isinstance(error, EngineError) else type(error).__name__
            self._span.set_attribute("error.type", code)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def begin_span(verb: str, origin: Origin) -> CallSpan:
    """The span ``keyquorum.<verb>`` of a call."""
    api: Any = sys.modules.get(_API)
    if api is None or origin.context is None:
        return CallSpan(origin.trace, None)
    tracer = api.get_tracer("keyquorum", __version__)
    span = tracer.start_span(f"keyquorum.{verb}", context=origin.context, kind=api.SpanKind.CLIENT)
    return CallSpan(origin.trace, span)
