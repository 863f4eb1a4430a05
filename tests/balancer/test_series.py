"""External series: files and a real HTTP server on loopback; whatever a source does, nobody waits for it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from balancer.features import HORIZONS
from balancer.series import ExternalSeries, SeriesError, SeriesTable, Source, check_series, read_events, read_values
from engine.errors import ConfigError

NOW_S = 1_800_000_000.0
PATIENCE_S = 20.0


def until(met: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (told := met()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return told


class Service:
    """An HTTP server that answers with ``body``, after ``delay_s``, piece by piece where ``drips``."""

    def __init__(self) -> None:
        self.body, self.status, self.delay_s, self.drips = b"1", 200, 0.0, False
        self.before: list[bytes] = []
        self.said = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(service.delay_s)
                for piece in service.before:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(0.05)
                service.said = True
                self.send_response(service.status)
                self.end_headers()
                for piece in (
                    [service.body[i : i + 1] for i in range(len(service.body))] if service.drips else [service.body]
                ):
                    self.wfile.write(piece)
                    self.wfile.flush()
                    if service.drips:
                        time.sleep(0.05)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that left is no error here
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/load?of=all"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    told = Service()
    yield told
    told.close()


def http(service: Service, **more: Any) -> Source:
    return Source(SeriesTable("queue", "http", url=service.url, **more), Path())


# --- files ---


def test_values_hold_until_the_next() -> None:
    """Times in seconds or ISO 8601, in any order, with or without a head; before the first nothing is known."""
    points = read_values("time,value\n200,5\n1970-01-01T00:01:40Z,3\n# a remark\n1970-01-01T00:05:00+00:00,7\n")
    assert points.at(np.array([100.0, 199.0, 200.0, 1e9])).tolist() == [3, 3, 5, 7]
    assert np.isnan(points.at(np.array([99.0]))).all()


@pytest.mark.parametrize("text", ["1,nan", "1,inf", "1,1e13", "soon,1", "1", "1,", "nan,1", "1,true"])
def test_values_that_are_none(text: str) -> None:
    """NaN, infinity, huge, missing, no time: the file is refused as a whole."""
    with pytest.raises(SeriesError):
        read_values(text)


CALENDARS = {
    ".toml": "[[event]]\nstart = 2027-01-15T08:00:00Z\nend = 2027-01-15T09:00:00Z\n",
    ".csv": "start,end,value\n2027-01-15T08:00:00,2027-01-15T09:00:00,1\n",
    ".ics": "BEGIN:VCALENDAR\r\nBEGIN:VEVENT\r\nSUMMARY:a\r\n  long one\r\nDTSTART;VALUE=DATE-TIME:20270115T080000Z\r\n"
    "DTEND:20270115T090000Z\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n",
}
EIGHT_S = 1_800_000_000.0  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize("suffix", CALENDARS)
def test_calendars_say_the_same(suffix: str) -> None:
    """One event from eight to nine, in each format."""
    points = read_events(CALENDARS[suffix], suffix, EIGHT_S - 7200)
    when = EIGHT_S + np.array([-1.0, 0.0, 3599.0, 3600.0])
    assert points.at(when).tolist() == [0, 1, 1, 0]


def test_events_add_up_and_come_again() -> None:
    """A daily event that began long ago is under way each day, in the future too; events at one time add up."""
    text = "[[event]]\nstart = 0\nend = 3600\nvalue = 2\nevery_s = 86400\n"
    text += "[[event]]\nstart = 1799971200\nend = 1799973000\n"
    points = read_events(text, ".toml", NOW_S)
    day = NOW_S // 86400 * 86400
    assert points.at(day + np.array([0.0, 1800.0, 3600.0, 86400.0, -86400.0])).tolist() == [3, 2, 0, 2, 2]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".toml", "event = 5"),
        (".toml", "[[event]]\nstart = 5\nend = 5"),
        (".toml", "[[event]]\nstart = 5\nend = 6\nevery_s = 0.01"),
        (".toml", "[[event]]\nend = 6"),
        (".toml", "[[events]]\nstart = 5\nend = 6"),
        (".toml", "[[event]]\nstart = 5\nend = 6\nevry_s = 60"),
        (".csv", "1"),
        (".csv", ""),
        (".ics", "BEGIN:VCALENDAR\nBEGIN:VEVENT\nDTSTART:20270115\nRRULE:FREQ=DAILY\nEND:VEVENT"),
        (".ics", "BEGIN:VCALENDAR\nBEGIN:VEVENT\nEND:VEVENT"),
        (".ics", "BEGIN:VCALENDAR\nBEGIN:VEVENT\nDTSTART;TZID=Mars/Base:20270115T080000\nEND:VEVENT"),
        (".ics", "BEGIN:VCALENDAR\nBEGIN:VEVENT\nDTSTART:20270115T080000\nDURATION:soon\nEND:VEVENT"),
        (".ics", "<html>not found</html>"),
    ],
)
def test_calendars_that_are_none(suffix: str, text: str) -> None:
    """What is no event is refused, not guessed."""
    with pytest.raises(SeriesError):
        read_events(text, suffix, NOW_S)


def test_a_calendars_zones_durations_and_what_was_cancelled() -> None:
    """RFC 5545: three in the morning in New York is eight in UTC; a cancelled event is none."""
    event = "BEGIN:VEVENT\n{}\nDURATION:{}\nEND:VEVENT\n"
    text = "BEGIN:VCALENDAR\n" + "".join(
        (
            event.format("DTSTART;TZID=America/New_York:20270115T030000", "PT1H"),
            event.format("DTSTART:20270115T080000Z", "P1DT30M"),
            event.format("STATUS:CANCELLED\nDTSTART:20270115T080000Z", "PT5H"),
        )
    )
    points = read_events(text, ".ics", EIGHT_S)
    when = EIGHT_S + np.array([-1.0, 0.0, 3599.0, 3600.0, 86_400.0 + 1799.0, 86_400.0 + 1800.0])
    assert points.at(when).tolist() == [0, 2, 2, 1, 1, 0]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "load.csv")
    source = Source(SeriesTable("load", "csv", file="load.csv"), tmp_path / "load.csv")
    source.look()
    assert "is no file" in source.problem


def test_a_file_comes_goes_and_changes(tmp_path: Path) -> None:
    """One warning while it is missing or broken, and it is back by itself."""
    path = tmp_path / "orders.csv"
    source = Source(SeriesTable("orders", "csv", file=str(path)), path, lambda: NOW_S)
    series = ExternalSeries([source])
    with structlog.testing.capture_logs() as told:
        source.look()
        source.look()
        assert series.known(100, 50, 1000) is None
        path.write_text("0,1\n90,4\n")
        source.look()
        known = series.known(100, 50, 1000)
        assert known is not None
        assert known.past.shape, known.ahead.shape == ((50, 4), (HORIZONS, 4))
        assert known.past[:, 0].tolist() == [1.0] * 39 + [4.0] * 11
        assert set(known.ahead[:, 0]) == {4.0}
        path.write_text("0,1\n90,none\n")
        source.look()
        assert "no number" in series.problems["orders"]
        path.write_text("0,2\n")
        source.look()
        assert series.problems == {}
    assert [each["event"] for each in told] == [
        "series left out",
        "series is back",
        "series left out",
        "series is back",
    ]


# --- a service ---


def test_a_service_is_asked_in_its_own_thread(service: Service) -> None:
    """Its last value is carried into the future; a stop does not wait for it."""
    service.body = b'{"length": 17.5}'
    source = http(service, field="length", every_s=0.05)
    series = ExternalSeries([source])
    series.start()
    until(lambda: source.points is not None)
    step = int(time.time())
    known = until(lambda: series.known(step + 1, 5, 1000))
    assert set(known.ahead[:, 0]) == {17.5}
    service.delay_s = 1.0
    begun = time.monotonic()
    series.known(step, 5, 1000)
    series.stop()
    assert time.monotonic() - begun < 0.9


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"NaN", 200),
        (b"Infinity", 200),
        (b"1e300", 200),
        (b"true", 200),
        (b"{}", 200),
        (b'"12', 200),
        (b"", 200),
        (b"[" * 60_000, 200),
        (b" " * 70_000, 200),
        (b"\xff", 200),
        (b"1", 500),
        (b"1", 302),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_service_that_says_no_number(service: Service, body: bytes, status: int) -> None:
    """It is left out, with one warning, and is back when it is well again."""
    source = http(service)
    service.body, service.status = body, status
    with structlog.testing.capture_logs() as told:
        source.look()
        source.look()
        assert source.points is None
        service.body, service.status = b"3", 200
        source.look()
    assert source.points is not None
    assert [each["event"] for each in told] == ["series left out", "series is back"]


def test_a_service_that_begins_to_lie(service: Service) -> None:
    """A value a thousand times all that were seen is not believed."""
    source = http(service)
    for value in range(1, 13):
        service.body = str(value).encode()
        source.look()
    service.body = b"50000"
    source.look()
    assert "after at most 12" in source.problem
    service.body = b"13"
    source.look()
    assert source.problem == ""


@pytest.mark.parametrize("drips", [False, True])
def test_a_slow_service_has_its_time_and_no_more(service: Service, drips: bool) -> None:
    """Whether it says nothing, or a byte now and then."""
    service.body, service.drips = b"1" * 10, drips
    service.delay_s = 0.0 if drips else 0.5
    source = http(service, timeout_s=0.15)
    source.look()
    assert source.points is None
    assert source.problem


@pytest.mark.parametrize("before", [b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 200, b"HTTP/1.1 100 Continue\r\n\r\n" * 40])
def test_a_service_that_drips_its_head_has_its_time_and_no_more(service: Service, before: bytes) -> None:
    """Ten seconds of it: each byte comes before a socket's own time-out is over."""
    step = 25 if before.endswith(b"\n") else 1
    service.before = [before[at : at + step] for at in range(0, len(before), step)]
    source = http(service, timeout_s=0.3)
    source.look()
    assert "no whole answer within 0.3 s" in source.problem
    assert not service.said, "it was not waited for to the end"


def test_a_service_that_is_not_there(service: Service) -> None:
    """A closed port is a source that is out."""
    source = Source(SeriesTable("queue", "http", url="http://127.0.0.1:1/"), Path())
    source.look()
    assert "refused" in source.problem


# --- the configuration ---


@pytest.mark.parametrize(
    "tables",
    [
        [SeriesTable("a", "http", url="http://10.0.0.1/")],
        [SeriesTable("a", "http", url="https://127.0.0.1/")],
        [SeriesTable("a", "http", file="x")],
        [SeriesTable("a", "csv")],
        [SeriesTable("a", "csv", file="x", url="http://127.0.0.1/")],
        [SeriesTable("a", "calendar", file="x.txt")],
        [SeriesTable("a", "csv", file="x"), SeriesTable("a", "csv", file="y")],
        [SeriesTable(f"a{i}", "csv", file="x") for i in range(5)],
    ],
)
def test_what_no_source_can_be_made_of(tables: list[SeriesTable]) -> None:
    """Another machine, no file, two of one name, too many: the configuration is refused."""
    with pytest.raises(ConfigError, match=r"balancer.toml"):
        check_series(tables, "balancer.toml")
