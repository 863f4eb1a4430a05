"""A member's pages over HTTP, for operators and Prometheus: by threads of their own, that never touch what is a loop's.

Everything is bounded: connections, what a request may be, and how long it and its answer may take. Who asks shows a
token where the configuration names one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client.config import check_private
from engine.client.httpconfig import HttpConfig
from engine.errors import ConfigError, EngineError
from engine.protocol.requests import ServiceCount

__all__ = ["Answer", "Page", "WebServer", "check_http", "metrics_answer", "service_metrics", "text_answer"]

REQUEST_TIMEOUT_S: Final = 5.0
"""From the connection to its request's last byte, TLS included; and for the answer to be taken."""
REQUEST_BYTES: Final = 16 * 1024
"""Of a request line and its headers; a body is not read."""
CLIENTS: Final = 4
TOKEN_MIN: Final = 16
"""Characters of a token that cannot be guessed."""
TOLD_EVERY_S: Final = 10.0
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page answers; ``headers`` come beside the usual ones or instead of them."""

    body: bytes
    kind: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[str], Answer]
"""Answers a ``GET``, whose ``Accept`` header it is given. Several threads may be in it."""


def text_answer(text: str, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    """A line of plain text."""
    return Answer(f"{text}\n".encode(), "text/plain; charset=utf-8", status)


def metrics_answer(collector: Collector, accept: str) -> Answer:
    """What a collector tells, in the format that Prometheus asks for."""
    registry = CollectorRegistry()
    registry.register(collector)
    encode, kind = choose_encoder(accept)
    return Answer(encode(registry), kind)


def service_metrics(service: ServiceCount, prefix: str) -> Iterator[Metric]:
    """What every member's service counts; ``prefix`` begins the names."""
    for name, text, value in (
        ("requests_under_way", "Requests taken in and not yet answered.", service.under_way),
        ("connections", "Connections that are open.", service.connections),
        ("connections_max", "How many there may be.", service.connections_max),
        ("descriptors", "Descriptors that are in use.", service.descriptors),
        ("descriptors_max", "The limit on them.", service.descriptors_max),
    ):
        yield GaugeMetricFamily(f"{prefix}_{name}", text, value)
    for name, text, value in (
        ("requests_refused", "Requests beyond a limit.", service.refused),
        ("garbage_messages", "Messages that were no requests.", service.garbage),
        ("undeliverable_replies", "Replies that nobody took.", service.undeliverable),
        ("connections_cut", "Connections beyond a limit that were cut.", service.cut),
    ):
        yield CounterMetricFamily(f"{prefix}_{name}", text, value)


def check_http(config: HttpConfig) -> None:
    """Read token, certificate and key; ``ConfigError`` says what is wrong with them."""
    _Guard(config)
    if config.certificate is not None and config.key is not None:
        _Certificate(config.certificate, config.key)


class _Guard:
    """Who may ask: whoever shows the token, as a bearer or as the password of any user."""

    def __init__(self, config: HttpConfig) -> None:
        self._digest = b""
        if config.token is not None:
            token = config.token.read()
            if len(token) < TOKEN_MIN or not all("!" <= each <= "~" for each in token):
                raise ConfigError(
                    f"{config.token}: a token has at least {TOKEN_MIN} characters, of ASCII and without spaces"
                )
            self._digest = hashlib.sha256(token.encode()).digest()

    @property
    def asks(self) -> bool:
        """Whether a token is asked for."""
        return bool(self._digest)

    def lets(self, authorization: str) -> bool:
        """Whether the ``Authorization`` header shows the token; takes as long whatever it shows."""
        scheme, _, shown = authorization.strip().partition(" ")
        told = shown.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                told = base64.b64decode(told, validate=True).partition(b":")[2]
            except binascii.Error:
                told = b""
        elif scheme.lower() != "bearer":
            told = b""
        return hmac.compare_digest(hashlib.sha256(told).digest(), self._digest)


class _Certificate:
    """The context of TLS, made anew when the certificate's file changes: certificates are renewed while it runs."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._lock = threading.Lock()
        self._read_at = self._changed()
        self._context = self._made()

    def context(self) -> ssl.SSLContext:
        """The newest one; that of before where the new files are no good."""
        with self._lock:
            changed = self._changed()
            if changed != self._read_at:
                self._read_at = changed
                try:
                    self._context = self._made()
                    log.info("certificate read", file=str(self._files[0]))
                except ConfigError as error:
                    log.warning("certificate not read", reason=str(error), then="the one of before stays")
            return self._context

    def _changed(self) -> tuple[int, ...]:
        try:
            return tuple(file.stat().st_mtime_ns for file in self._files)
        except OSError:
            return ()

    def _made(self) -> ssl.SSLContext:
        certificate, key = self._files
        check_private(key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(certificate, key, password=lambda: b"")  # no question on a terminal
        except (OSError, ValueError) as error:  # SSLError is an OSError
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "no PEM"
            raise ConfigError(f"{certificate}, {key}: no certificate and its key: {reason}") from None
        return context


class _TooLong(Exception):
    pass


class _Reader(io.RawIOBase):
    """What a client sends: so many bytes at most, and until a time."""

    def __init__(self, connection: socket.socket, until_s: float) -> None:
        self._connection = connection
        self._until_s = until_s
        self._left = REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if not self._left:
            raise _TooLong
        self._connection.settimeout(left_s)
        count = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        return count


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection; it writes no log of it."""

    server: _Server
    error_message_format = "%(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        """Bound what is read and written."""
        super().setup()
        self.rfile = io.BufferedReader(_Reader(self.connection, time.monotonic() + REQUEST_TIMEOUT_S))

    def handle_one_request(self) -> None:
        """Answer, and close: no connection is kept."""
        self.close_connection = True
        try:
            self.raw_requestline = self.rfile.readline(REQUEST_BYTES)
            if not self.raw_requestline or not self.parse_request():
                return
            answer = self._answer()
        except _TooLong:
            self.requestline, self.request_version = "", self.protocol_version
            answer = text_answer(f"more than {REQUEST_BYTES} bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        self.connection.settimeout(REQUEST_TIMEOUT_S)
        self.send_response(answer.status)
        for name, value in {**HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _answer(self) -> Answer:
        if self.server.guard.asks:
            if not self.server.guard.lets(self.headers.get("Authorization", "")):
                self.server.refused(str(self.client_address[0]))
                asked = {"WWW-Authenticate": 'Basic realm="keyquorum", charset="UTF-8"'}
                return Answer(b"a token is needed\n", "text/plain", HTTPStatus.UNAUTHORIZED, asked)
        elif not _is_address(self.headers.get("Host", "localhost")):
            # A page of another site may have its name lead here (DNS rebinding); its browser tells that name.
            return text_answer("ask by an IP address, or as localhost", HTTPStatus.MISDIRECTED_REQUEST)
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            here = ", ".join(self.server.pages)
            return text_answer(f"there is no such page; there are {here}", HTTPStatus.NOT_FOUND)
        if self.command != "GET":
            return text_answer("only GET is answered", HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return page(self.headers.get("Accept", ""))
        except Exception:
            log.error("page failed", path=urlsplit(self.path).path, exc_info=True)
            return text_answer("internal error; the log says more", HTTPStatus.INTERNAL_SERVER_ERROR)

    def version_string(self) -> str:
        """What it says it is: no versions."""
        return "keyquorum"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Requests are not logged."""


def _is_address(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class _Server(ThreadingMixIn, TCPServer):
    """So many clients at a time; who comes beyond is cut."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, config: HttpConfig, pages: Mapping[str, Page], clients: int) -> None:
        self.address_family = config.family
        self.pages = pages
        self.guard = _Guard(config)
        self._certificate: _Certificate | None = None
        if config.certificate is not None and config.key is not None:
            self._certificate = _Certificate(config.certificate, config.key)
        self._room = threading.Semaphore(clients)
        self._next_told_s = 0.0
        super().__init__((config.host, config.port), _Handler)

    def refused(self, host: str) -> None:
        """Tell now and then that somebody has no token."""
        now = time.monotonic()
        if now >= self._next_told_s:
            self._next_told_s = now + TOLD_EVERY_S
            log.warning("http refused", host=host, reason="no token, or a wrong one")

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            if self._certificate is not None:
                request.settimeout(REQUEST_TIMEOUT_S)
                try:
                    request = self._certificate.context().wrap_socket(request, server_side=True)
                except OSError:  # no TLS, or too slow
                    self.shutdown_request(request)
                    return
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client went away, or was too slow


class WebServer:
    """Answers the pages until it is closed.

    ``ConfigError`` if token, certificate or key are not as they must be, ``EngineError`` if it can't listen. So many
    ``clients`` are served at a time. ``section`` is that of the configuration.
    """

    def __init__(self, config: HttpConfig, section: str, pages: Mapping[str, Page], clients: int = CLIENTS) -> None:
        try:
            self._server = _Server(config, pages, clients)
        except OSError as error:
            raise EngineError(f"{section}.bind: can't listen at {config}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()
        log.info("http", url=config.url)

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
