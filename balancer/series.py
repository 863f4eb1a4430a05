"""External series that enter the forecast: calendars of known events, CSV files, JSON from a service of this machine.

Each source has a thread of its own and hands over an immutable step function; whoever asks for values waits for
nothing. A source that is missing, broken, slow or says what is no number is left out with one warning, and is back by
itself when it is well again.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import math
import re
import socket
import stat
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import structlog
from msgspec import Meta, Struct
from numpy.typing import NDArray

from balancer.features import HORIZONS, REGRESSORS_MAX, Known
from engine.errors import ConfigError

__all__ = [
    "ExternalSeries",
    "SeriesError",
    "SeriesTable",
    "Source",
    "check_series",
    "read_events",
    "read_reply",
    "read_values",
]

FloatArray = NDArray[np.float64]

VALUE_MAX = 1e12
BYTES_MAX = 1 << 20
REPLY_MAX = 64 * 1024
EVENTS_MAX = 10_000
REPEATS_MAX = 10_000
SAMPLES_MAX = 20_000
JUMP = 1000.0
JUMP_SAMPLES = 10
"""A value so many times all that were seen, of at least so many, is not believed."""
STALE_PARTS = 5
"""A service's value counts for so many of its intervals."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVENT_FIELDS = frozenset({"start", "end", "value", "every_s"})
DURATION = re.compile(r"\+?P(?:(\d+)W)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?")
FAR_S = 14 * 86_400.0
"""Events that come again are written out so far into the past and the future."""

log = structlog.get_logger()


class SeriesTable(Struct, frozen=True, forbid_unknown_fields=True):
    """``[[series]]`` of ``balancer.toml``.

    ``calendar`` reads a ``.toml`` (``[[event]]``: ``start``, ``end``, ``value``, ``every_s``), ``.csv`` (the same four,
    in this order) or ``.ics`` file; its future is known. ``csv`` reads ``time,value``: a value holds until the next.
    ``http`` asks a service on loopback for JSON: a number, or an object with one in ``field``; its last value is
    carried on.
    """

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    kind: Literal["calendar", "csv", "http"]
    file: Annotated[str, Meta(max_length=4096)] = ""
    url: Annotated[str, Meta(max_length=1024)] = ""
    field: Annotated[str, Meta(max_length=64)] = "value"
    every_s: Annotated[float, Meta(ge=0.05, le=3600)] = 10.0
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 2.0


class SeriesError(Exception):
    """A source says nothing that can be used."""


@dataclass(frozen=True, slots=True)
class Points:
    """A step function: ``values[i]`` holds from ``times[i]`` (s since the epoch, in order); before the first is NaN."""

    times: FloatArray
    values: FloatArray
    until: float = math.inf
    """Nothing is known from then on."""

    def at(self, when: FloatArray) -> FloatArray:
        """The values at these times."""
        index = np.searchsorted(self.times, when, side="right") - 1
        told = np.where(index >= 0, self.values[np.maximum(index, 0)], np.nan) if self.times.size else when * np.nan
        return np.where(when < self.until, told, np.nan)


def check_series(tables: Sequence[SeriesTable], where: str) -> None:
    """Refuse what no source can be made of; ``ConfigError`` names it."""
    if len(tables) > REGRESSORS_MAX:
        raise ConfigError(f"{where}: {len(tables)} series, at most {REGRESSORS_MAX} enter the forecast")
    if len({each.name for each in tables}) < len(tables):
        raise ConfigError(f"{where}: two series of one name")
    for each in tables:
        if each.kind == "http":
            parts = urlsplit(each.url)
            if parts.scheme != "http" or parts.hostname not in LOOPBACK or each.file:
                raise ConfigError(f"{where}: series {each.name!r} needs an url such as http://127.0.0.1:8080/load")
        elif not each.file or each.url:
            raise ConfigError(f"{where}: series {each.name!r} needs a file")
        elif each.kind == "calendar" and Path(each.file).suffix not in (".toml", ".csv", ".ics"):
            raise ConfigError(f"{where}: series {each.name!r}: a calendar is a .toml, .csv or .ics file")


class Source:
    """One series and the thread that keeps it."""

    def __init__(self, table: SeriesTable, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.name = table.name
        self._table = table
        self._path = path
        self._clock = clock
        self._points: Points | None = None
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES_MAX)
        self._read_as: tuple[int, int, int] | None = None
        self._problem: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"series-{table.name}", daemon=True)

    @property
    def points(self) -> Points | None:
        """What is known now; None while the source is out."""
        return self._points

    @property
    def problem(self) -> str:
        """Why it is out, or empty."""
        return self._problem or ""

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End; a reading under way is not waited for."""
        self._stop.set()

    def look(self) -> None:
        """Read once; what goes wrong is told once and leaves the source out."""
        try:
            self._points = self._read()
        except (SeriesError, OSError, ValueError, http.client.HTTPException, RecursionError) as error:
            self._points = None
            self._read_as = None
            reason = f"{type(error).__name__}: {error}"[:200]
            if self._problem is None:
                log.warning("series left out", series=self.name, reason=reason)
            self._problem = reason
            return
        if self._problem is not None:
            log.info("series is back", series=self.name)
            self._problem = None

    def _run(self) -> None:
        while not self._stop.is_set():
            self.look()
            self._stop.wait(self._table.every_s)

    def _read(self) -> Points:
        if self._table.kind == "http":
            value = _ask(self._table)
            usual = max((abs(each) for _, each in self._samples), default=0.0)
            if len(self._samples) >= JUMP_SAMPLES and usual and abs(value) > JUMP * usual:
                raise SeriesError(f"{value:g} after at most {usual:g}")
            now_s = self._clock()
            self._samples.append((now_s, value))
            times, values = np.array(self._samples, dtype=np.float64).T
            order = np.argsort(times, kind="stable")
            return Points(times[order], values[order], now_s + STALE_PARTS * self._table.every_s + HORIZONS * 60.0)
        state = self._path.stat()
        # Events that come again are written out anew each hour.
        version = state.st_mtime_ns, state.st_size, int(self._clock() // 3600)
        if self._points is None or version != self._read_as:
            if not stat.S_ISREG(state.st_mode):
                raise SeriesError(f"{self._path} is no file")
            if state.st_size > BYTES_MAX:
                raise SeriesError(f"{state.st_size} bytes, at most {BYTES_MAX} are read")
            text = self._path.read_text(encoding="utf-8-sig")
            if self._table.kind == "csv":
                points = read_values(text)
            else:
                points = read_events(text, self._path.suffix, self._clock())
            self._read_as = version
            return points
        return self._points


class ExternalSeries:
    """All sources of a balancer, and their values by step."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)

    def start(self) -> None:
        """Begin to read all of them."""
        for source in self._sources:
            source.start()

    def stop(self) -> None:
        """End."""
        for source in self._sources:
            source.stop()

    @property
    def problems(self) -> dict[str, str]:
        """The sources that are out, and why."""
        return {source.name: source.problem for source in self._sources if source.problem}

    def known(self, step: int, steps: int, step_ms: int) -> Known | None:
        """The series in so many steps up to and with ``step``, and in those that come; None if there is none at all.

        A step's value is that at its middle. Gaps hold the value before.
        """
        if not self._sources or not steps:
            return None
        when = np.asarray(
            (np.arange(step - steps + 1, step + 1 + HORIZONS) + 0.5) * (step_ms / 1000.0), dtype=np.float64
        )
        values = np.zeros((len(when), REGRESSORS_MAX))
        told = False
        for column, source in enumerate(self._sources[:REGRESSORS_MAX]):
            points = source.points
            if points is not None:
                values[:, column] = _held(points.at(when))
                told = True
        return Known(values[:steps], values[steps:]) if told else None


def _held(values: FloatArray) -> FloatArray:
    known = np.isfinite(values)
    if not known.any():
        return np.zeros_like(values)
    index = np.maximum.accumulate(np.where(known, np.arange(len(values)), -1))
    return np.where(index >= 0, values[np.maximum(index, 0)], values[np.argmax(known)])


def read_values(text: str) -> Points:
    """``time,value`` lines, the time in seconds since the epoch or in ISO 8601 (UTC if it does not say)."""
    rows = _lines(text, "time")
    times = [_moment(row[0]) for row in rows]
    values = [_number(row[1] if len(row) > 1 else "") for row in rows]
    order = np.argsort(np.array(times), kind="stable")
    return Points(np.array(times, dtype=np.float64)[order], np.array(values, dtype=np.float64)[order])


def read_events(text: str, suffix: str, now_s: float) -> Points:
    """The events of a calendar as the sum of the values of those under way; ``SeriesError`` says what is wrong."""
    events = {".toml": _toml_events, ".csv": _csv_events, ".ics": _ics_events}[suffix](text)
    if len(events) > EVENTS_MAX:
        raise SeriesError(f"{len(events)} events, at most {EVENTS_MAX} are read")
    changes: list[tuple[float, float]] = [(now_s - 10 * 365 * 86_400.0, 0.0)]
    for start, end, value, every in events:
        if end <= start:
            raise SeriesError(f"an event that ends at {end:g}, not after its start at {start:g}")
        first = start
        if every:
            if every < 1 or 2 * FAR_S / every > REPEATS_MAX:
                raise SeriesError(f"an event that comes again after {every:g} s")
            first += max(0, math.ceil((now_s - FAR_S - start) / every)) * every
        while True:
            changes += [(first, value), (first + end - start, -value)]
            first += every
            if not every or first > now_s + FAR_S:
                break
        if len(changes) > 4 * EVENTS_MAX:
            raise SeriesError(f"more than {2 * EVENTS_MAX} events with those that come again")
    changes.sort()
    times = np.array([when for when, _ in changes])
    return Points(times, np.round(np.cumsum([change for _, change in changes]), 9))


def _toml_events(text: str) -> list[tuple[float, float, float, float]]:
    document = tomllib.loads(text)
    listed = document.get("event", [])
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise SeriesError("no [[event]]")
    strange = sorted(set(document) - {"event"} | set().union(*listed) - EVENT_FIELDS)
    if strange:
        raise SeriesError(f"unknown: {', '.join(strange)[:80]}; an [[event]] has {', '.join(sorted(EVENT_FIELDS))}")
    return [
        (
            _moment(each.get("start", "")),
            _moment(each.get("end", "")),
            _number(each.get("value", 1)),
            _number(each.get("every_s", 0)),
        )
        for each in listed
    ]


def _csv_events(text: str) -> list[tuple[float, float, float, float]]:
    events = []
    for row in _lines(text, "start"):
        if len(row) < 2:
            raise SeriesError(f"a line of {len(row)} cells, start,end[,value[,every_s]] are needed")
        value, every = [*row[2:4], *("1", "0")[len(row[2:4]) :]]
        events.append((_moment(row[0]), _moment(row[1]), _number(value), _number(every)))
    return events


def _ics_events(text: str) -> list[tuple[float, float, float, float]]:
    """VEVENTs by DTSTART and DTEND or DURATION (RFC 5545), but those that are cancelled.

    Times of a TZID are in that zone, those without any in UTC; rules for coming again are not read.
    """
    events: list[tuple[float, float, float, float]] = []
    entry: dict[str, str] | None = None
    zones: dict[str, str] = {}
    if not text.lstrip().upper().startswith("BEGIN:VCALENDAR"):
        raise SeriesError("no VCALENDAR")
    for line in text.replace("\r\n ", "").replace("\n ", "").splitlines():
        name, _, value = line.partition(":")
        name, _, more = name.partition(";")
        name = name.upper()
        if (name, value.upper()) == ("BEGIN", "VEVENT"):
            entry, zones = {}, {}
        elif (name, value.upper()) == ("END", "VEVENT") and entry is not None:
            if "RRULE" in entry:
                raise SeriesError("RRULE is not read; a .toml calendar has every_s")
            start = _moment(entry.get("DTSTART", ""), zones.get("DTSTART", ""))
            if "DTEND" in entry:
                end = _moment(entry["DTEND"], zones.get("DTEND", ""))
            else:
                end = start + (_duration(entry["DURATION"]) if "DURATION" in entry else 86_400.0)
            if entry.get("STATUS", "").upper() != "CANCELLED":
                events.append((start, end, 1.0, 0.0))
            entry = None
        elif entry is not None:
            entry[name] = value
            told = [each[5:] for each in more.split(";") if each.upper().startswith("TZID=")]
            zones[name] = told[0].strip('"') if told else ""
    return events


def _duration(text: str) -> float:
    """Seconds of a DURATION (RFC 5545, 3.3.6)."""
    found = DURATION.fullmatch(text.strip().upper())
    if found is None or not any(found.groups()):
        raise SeriesError(f"{text[:40]!r} is no duration")
    weeks, days, hours, minutes, seconds = (float(each or 0) for each in found.groups())
    return (((weeks * 7 + days) * 24 + hours) * 60 + minutes) * 60 + seconds


def _lines(text: str, head: str) -> list[list[str]]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row and not row[0].startswith("#")]
    if not rows:
        raise SeriesError("no line in it")
    return rows[1:] if rows and rows[0][0].strip().lower() in (head, "timestamp") else rows


def _moment(value: object, zone: str = "") -> float:
    """Seconds since the epoch; a time that does not say its zone is of this one, or UTC."""
    if isinstance(value, datetime):
        told = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value)
    else:
        text = str(value).strip()
        try:
            return _number(text) if not (len(text) == 8 and text.isdigit()) else _day(text, _zone(zone))
        except SeriesError:
            pass
        try:
            told = datetime.fromisoformat(text)
        except ValueError:
            raise SeriesError(f"{text[:40]!r} is no time") from None
    return (told if told.tzinfo else told.replace(tzinfo=_zone(zone))).timestamp()


def _day(text: str, zone: tzinfo) -> float:
    return datetime.strptime(text, "%Y%m%d").replace(tzinfo=zone).timestamp()


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name) if name else UTC
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise SeriesError(f"no zone {name[:40]!r} is known here") from None


def _number(value: object) -> float:
    try:
        told = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        told = math.nan
    if not abs(told) <= VALUE_MAX:
        raise SeriesError(f"{str(value)[:40]!r} is no number within {VALUE_MAX:g}")
    return told


def _ask(table: SeriesTable) -> float:
    """One question to a service; it has ``timeout_s`` in all."""
    parts = urlsplit(table.url)
    until = time.monotonic() + table.timeout_s
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=table.timeout_s)
    cut: threading.Timer | None = None
    try:
        connection.connect()
        # A time-out of the socket begins anew with each byte, so the whole question has one of its own.
        cut = threading.Timer(max(0.0, until - time.monotonic()), _cut, (connection.sock,))
        cut.daemon = True
        cut.start()
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "application/json"})
        reply = connection.getresponse()
        if reply.status != http.client.OK:
            raise SeriesError(f"status {reply.status}")
        body = b""
        while len(body) <= REPLY_MAX and (piece := reply.read1(4096)):
            body += piece
        if time.monotonic() > until:
            raise TimeoutError
    except (OSError, ValueError, http.client.HTTPException):
        if time.monotonic() > until:
            raise SeriesError(f"no whole answer within {table.timeout_s:g} s") from None
        raise
    finally:
        if cut is not None:
            cut.cancel()
        connection.close()
    if len(body) > REPLY_MAX:
        raise SeriesError(f"more than {REPLY_MAX} bytes")
    return read_reply(body, table.field)


def _cut(held: socket.socket) -> None:
    """End a connection from another thread: who reads finds its end."""
    with contextlib.suppress(OSError):
        held.shutdown(socket.SHUT_RDWR)


def read_reply(body: bytes, field: str) -> float:
    """The number in a service's JSON, or in this field of it; ``ValueError`` or ``SeriesError`` if there is none."""
    told: Any = json.loads(body)
    return _number(told.get(field) if isinstance(told, dict) else told)
