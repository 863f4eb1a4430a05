"""A node's part of its clients' traces: spans of requests that carry a W3C trace context, and passing it on.

Without ``[trace] file`` no span is made, and what came is passed on as it is. With it OpenTelemetry's SDK makes the
spans, which a thread of its own appends to the file, one JSON object a line. A span names the node, the verb, the
request class and how it ended: no key, no client, nothing of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from engine._version import __version__
from engine.errors import ConfigError, EngineError
from engine.protocol.trace import TraceContext, carried, trace_of

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context

__all__ = ["NO_SPANS", "FileTracer", "Span", "Tracer", "child_of"]

EVERY_MS: Final = 1_000
"""How often the finished spans are written."""
Attributes = Mapping[str, str | bool]


class Span(Protocol):
    """A request's, or a part's of it. Safe for several threads."""

    @property
    def extensions(self) -> Mapping[str, bytes]:
        """What a request carries that is made for it."""

    def child(self, name: str) -> Span:
        """Begin a part."""

    def end(self, outcome: str, attributes: Attributes | None = None) -> None:
        """It is over; ``outcome`` is ``ok``, ``moved`` or an error's code."""


class Tracer(Protocol):
    """Where spans come from."""

    def begin(self, verb: str, extensions: Mapping[str, bytes]) -> Span | None:
        """A request came: its span, or None if it carries no trace."""

    def close(self) -> None:
        """Write what is left."""


@contextmanager
def child_of(span: Span | None, name: str) -> Iterator[Mapping[str, bytes] | None]:
    """A part of a request, if that has a span; what requests carry that are made in it."""
    if span is None:
        yield None
        return
    child = span.child(name)
    outcome = "error"
    try:
        yield child.extensions
        outcome = "ok"
    except EngineError as error:
        outcome = error.code
        raise
    finally:
        child.end(outcome)


class _Passed:
    """No span: what came is passed on."""

    def __init__(self, context: TraceContext) -> None:
        self.extensions: Mapping[str, bytes] = carried(context)

    def child(self, name: str) -> Span:
        return self

    def end(self, outcome: str, attributes: Attributes | None = None) -> None:
        pass


class _NoSpans:
    """Passes on what came."""

    def begin(self, verb: str, extensions: Mapping[str, bytes]) -> Span | None:
        context = trace_of(extensions)
        return None if context is None else _Passed(context)

    def close(self) -> None:
        pass


NO_SPANS: Final[Tracer] = _NoSpans()


class FileTracer:
    """Spans that end up in a file (mode 0600), which is only ever appended to.

    ``ConfigError`` if OpenTelemetry's SDK is not installed, or the file can't be opened.
    """

    def __init__(self, path: Path, node: str) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
        except ImportError:
            raise ConfigError("trace.file needs the extra otel (opentelemetry-sdk), which is not installed") from None
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"trace.file: {path} can't be written: {error.strerror}") from None
        exporter = ConsoleSpanExporter(out=self._file, formatter=lambda span: span.to_json(indent=None) + "\n")
        names = {"service.name": "keyquorum-node", "service.instance.id": node, "service.version": __version__}
        self._provider = TracerProvider(ParentBased(ALWAYS_ON), Resource(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EVERY_MS))
        self._tracer = self._provider.get_tracer("keyquorum", __version__)

    def begin(self, verb: str, extensions: Mapping[str, bytes]) -> Span | None:
        """The server's span of a request, whose parent is the sender's."""
        from opentelemetry import trace

        context = trace_of(extensions)
        if context is None:
            return None
        told = trace.SpanContext(
            int(context.trace_id, 16), int(context.span_id, 16), True, trace.TraceFlags(context.flags)
        )
        parent = trace.set_span_in_context(trace.NonRecordingSpan(told))
        return _Recorded(self._tracer, f"keyquorum.{verb}", parent, trace.SpanKind.SERVER)

    def close(self) -> None:
        """Write what is left."""
        self._provider.shutdown()
        self._file.close()


class _Recorded:
    """A span of OpenTelemetry."""

    def __init__(self, tracer: trace.Tracer, name: str, parent: Context, kind: trace.SpanKind) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(name, context=parent, kind=kind)

    @property
    def extensions(self) -> Mapping[str, bytes]:
        own = self._span.get_span_context()
        return carried(TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", int(own.trace_flags)))

    def child(self, name: str) -> Span:
        from opentelemetry import trace

        parent = trace.set_span_in_context(self._span)
        return _Recorded(self._tracer, f"keyquorum.{name}", parent, trace.SpanKind.INTERNAL)

    def end(self, outcome: str, attributes: Attributes | None = None) -> None:
        from opentelemetry.trace import StatusCode

        for name, value in (attributes or {}).items():
            self._span.set_attribute(name, value)
        if outcome not in ("ok", "moved"):
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
