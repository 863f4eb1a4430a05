"""A node's spans: which requests have one, what stands in the file, and what is passed on without one."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, QuorumUnavailable
from engine.protocol.trace import carried, read_traceparent, trace_of
from nodes.tracing import NO_SPANS, FileTracer, child_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CAME = carried(read_traceparent(f"00-{TRACE}-00f067aa0ba902b7-01"))
UNSAMPLED = carried(read_traceparent(f"00-{TRACE}-00f067aa0ba902b7-00"))
MALFORMED = {"traceparent": b"00-4BF9-x"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_without_a_file_what_came_is_passed_on() -> None:
    span = NO_SPANS.begin("encrypt", CAME)
    assert span is not None
    with child_of(span, "gather") as extensions:
        assert extensions == CAME
    span.end("ok", {"keyquorum.class": "x"})
    assert NO_SPANS.begin("encrypt", MALFORMED) is None
    assert NO_SPANS.begin("encrypt", {"other": b"x"}) is None
    NO_SPANS.close()


def test_a_part_of_what_has_no_span_has_none() -> None:
    with child_of(None, "gather") as extensions:
        assert extensions is None


def test_spans_of_one_trace_are_written_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    tracer = FileTracer(path, "n1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    span = tracer.begin("encrypt", CAME)
    assert span is not None
    with child_of(span, "gather") as extensions:
        assert extensions is not None
        passed = trace_of(extensions)
    with pytest.raises(QuorumUnavailable), child_of(span, "token"):
        raise QuorumUnavailable("the key 'orders'", ["n2"])
    span.end("quorum-unavailable", {"keyquorum.class": "encrypt/aes-256-gcm", "keyquorum.cold": True})
    assert tracer.begin("encrypt", MALFORMED) is None
    tracer.close()
    told = {each["name"]: each for each in lines(path)}
    assert set(told) == {"keyquorum.encrypt", "keyquorum.gather", "keyquorum.token"}
    server, gather, token = (told[f"keyquorum.{name}"] for name in ("encrypt", "gather", "token"))
    assert {each["context"]["trace_id"] for each in told.values()} == {f"0x{TRACE}"}
    assert server["parent_id"] == "0x00f067aa0ba902b7"
    assert (server["kind"], gather["kind"]) == ("SpanKind.SERVER", "SpanKind.INTERNAL")
    assert gather["parent_id"] == token["parent_id"] == server["context"]["span_id"]
    assert passed is not None
    assert f"0x{passed.span_id}" == gather["context"]["span_id"]
    assert server["attributes"]["keyquorum.class"] == "encrypt/aes-256-gcm"
    assert token["attributes"]["error.type"] == "quorum-unavailable"
    assert token["status"]["status_code"] == "ERROR"
    assert gather["status"]["status_code"] == "UNSET"
    assert server["resource"]["attributes"]["service.instance.id"] == "n1"
    assert "orders" not in path.read_text(encoding="utf-8")


def test_a_trace_that_is_not_sampled_is_passed_on_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    tracer = FileTracer(path, "n1")
    span = tracer.begin("encrypt", UNSAMPLED)
    assert span is not None
    with child_of(span, "gather") as extensions:
        assert extensions is not None
        passed = trace_of(extensions)
        assert passed is not None
        assert (passed.trace_id, passed.flags) == (TRACE, 0)
    span.end("ok")
    tracer.close()
    assert lines(path) == []


def test_without_the_extra_the_configuration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"trace\.file needs the extra otel"):
        FileTracer(tmp_path / "trace.jsonl", "n1")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace\.file: .* can't be written: Is a directory"):
        FileTracer(tmp_path, "n1")
