"""Pages over HTTP, by real sockets: who is answered, over what, and what a client can't do to the server."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ports import free_port

from engine.client import web
from engine.client.httpconfig import HttpConfig, HttpTable, TokenSource, http_config
from engine.client.web import REQUEST_BYTES, Answer, Page, WebServer, check_http, text_answer
from engine.errors import ConfigError, EngineError

TOKEN = "correct-horse-battery-staple"
WAIT_S = 20.0


def certificate(folder: Path, name: str = "here") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "http.crt", folder / "http.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.touch(mode=0o600)
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


def token(folder: Path, text: str = TOKEN) -> TokenSource:
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(text + "\n")
    return TokenSource("file", str(path))


Serve = Callable[..., HttpConfig]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server of one page; where it is."""
    made: list[WebServer] = []

    def start(page: Page = lambda _: text_answer("here"), **more: Any) -> HttpConfig:
        config = HttpConfig("127.0.0.1", free_port(), **more)
        made.append(WebServer(config, "http", {"/page": page}))
        return config

    yield start
    for each in made:
        each.close()


def ask(
    config: HttpConfig, path: str = "/page", method: str = "GET", **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of an answer."""
    if config.certificate is None:
        connection = HTTPConnection(config.host, config.port, timeout=WAIT_S)
    else:
        trust = ssl.create_default_context(cafile=str(config.certificate))
        connection = HTTPSConnection(config.host, config.port, timeout=WAIT_S, context=trust)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.headers)
    finally:
        connection.close()


def basic(user: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()


# --- the configuration ---


@pytest.mark.parametrize("section", ["http", "metrics"])
@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"bind": "9465"}, "bind '9465' must be an IP address and a port"),
        ({"bind": "localhost:9465"}, "must be an IP address and a port"),
        ({"bind": "0.0.0.0:9465"}, "is no loopback address.*certificate, .*key, .*token are missing"),
        ({"bind": "[::]:9465", "token": "env:T"}, r"certificate, \w+.key are missing"),
        ({"bind": "192.0.2.1:9465", "certificate": "c", "key": "k"}, r"TLS and a token: \w+.token is missing"),
        ({"bind": "127.0.0.1:9465", "certificate": "c"}, "go together"),
        ({"bind": "127.0.0.1:9465", "token": TOKEN + ":x"}, "token must be file:PATH, env:NAME or credential:NAME"),
    ],
)
def test_what_may_not_be_served_is_refused(section: str, told: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as refused:
        http_config("/etc/kq/here.toml", section, HttpTable(**told))
    assert f"{section}." in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_other_addresses_are_served_with_tls_and_a_token(tmp_path: Path) -> None:
    told = HttpTable("0.0.0.0:9465", "http.crt", "http.key", "file:token")
    config = http_config(tmp_path / "here.toml", "http", told)
    assert config == HttpConfig(
        "0.0.0.0",  # noqa: S104
        9465,
        tmp_path / "http.crt",
        tmp_path / "http.key",
        TokenSource("file", str(tmp_path / "token")),
    )
    assert config.url == "https://0.0.0.0:9465/"
    assert http_config(tmp_path / "here.toml", "http", HttpTable()) is None


def test_token_certificate_and_key_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is told by the file's name, and no token by its text."""
    pem, key = certificate(tmp_path)

    def check(match: str, **more: Any) -> None:
        with pytest.raises(ConfigError, match=match) as refused:
            check_http(HttpConfig("127.0.0.1", 1, **more))
        assert "short" not in str(refused.value)

    check_http(HttpConfig("127.0.0.1", 1, pem, key, token(tmp_path)))
    check("at least 16 characters", token=token(tmp_path, "short-token"))
    check("without spaces", token=token(tmp_path, "short but with some spaces"))
    monkeypatch.setenv("KQ_TOKEN", "")
    check("env:KQ_TOKEN: no token", token=TokenSource("env", "KQ_TOKEN"))
    check("No such file", token=TokenSource("file", str(tmp_path / "nowhere")))
    check("nowhere.*no certificate and its key: No such file", certificate=tmp_path / "nowhere", key=key)
    check("no certificate and its key", certificate=key, key=key)
    key.chmod(0o644)
    check("mode 0644 lets others at it", certificate=pem, key=key)


# --- who is answered ---


def test_pages_are_answered_and_nothing_else(serve: Serve) -> None:
    config = serve()
    status, text, headers = ask(config)
    assert (status, text) == (200, "here\n")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Server"] == "keyquorum"
    assert ask(config, "/page?a=b")[0] == 200
    assert ask(config, "/")[:2] == (404, "there is no such page; there are /page\n")
    assert ask(config, method="POST")[0] == 405


def test_a_name_of_elsewhere_is_not_answered_where_no_token_is_asked_for(serve: Serve, tmp_path: Path) -> None:
    """A page in a browser can have its own name lead to 127.0.0.1, and would read what it says."""
    config = serve()
    for host, status in [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:5", 200), ("evil.example", 421), ("[", 421)]:
        assert ask(config, Host=host)[0] == status, host
    guarded = serve(token=token(tmp_path))
    assert ask(guarded, Host="metrics.example", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_only_who_shows_the_token_is_answered(serve: Serve, tmp_path: Path) -> None:
    asked: list[str] = []

    def page(accept: str) -> Answer:
        asked.append(accept)
        return text_answer("here")

    with structlog.testing.capture_logs() as logged:
        config = serve(page, token=token(tmp_path))
        wrong = [
            "",
            "Bearer",
            f"Bearer {TOKEN[:-1]}",
            f"Bearer {TOKEN}x",
            f"Digest {TOKEN}",
            TOKEN,
            "Basic !",
            basic(TOKEN, ""),
        ]
        for shown in wrong:
            status, text, headers = ask(config, Authorization=shown)
            assert (status, text) == (401, "a token is needed\n"), shown
            assert headers["WWW-Authenticate"].startswith("Basic realm=")
        assert ask(config, "/nowhere")[0] == 401
        assert not asked
        for shown in (f"Bearer {TOKEN}", f"bearer  {TOKEN} ", basic("prometheus", TOKEN), basic("", TOKEN)):
            assert ask(config, Authorization=shown)[0] == 200, shown
    refused = [each for each in logged if each["event"] == "http refused"]
    assert len(refused) == 1  # one in ten seconds
    assert TOKEN not in str(logged)


def test_tls_is_spoken_and_plain_http_is_not(serve: Serve, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path)
    config = serve(certificate=pem, key=key, token=token(tmp_path))
    assert ask(config, Authorization=f"Bearer {TOKEN}")[:2] == (200, "here\n")
    plain = HttpConfig(config.host, config.port)
    with pytest.raises((HTTPException, OSError)):
        ask(plain)


def test_a_renewed_certificate_is_taken_and_a_broken_one_is_not(serve: Serve, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path, "first")

    def shown() -> str:
        told = ssl.get_server_certificate((config.host, config.port), timeout=WAIT_S)
        return x509.load_pem_x509_certificate(told.encode()).subject.rfc4514_string()

    config = serve(certificate=pem, key=key)
    assert shown() == "CN=first"
    certificate(tmp_path, "second")
    os.utime(pem, ns=(1, 1))  # as if the clock had not moved on between the two
    assert shown() == "CN=second"
    pem.write_text("no certificate")
    assert shown() == "CN=second"


# --- bounds ---


def test_too_long_a_request_is_refused(serve: Serve) -> None:
    config = serve()
    for data in (
        b"GET /" + b"a" * 2 * REQUEST_BYTES + b" HTTP/1.1\r\n\r\n",
        b"GET /page HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (each, b"v" * 900) for each in range(90)) + b"\r\n",
    ):
        with socket.create_connection((config.host, config.port), WAIT_S) as connection:
            connection.sendall(data[:REQUEST_BYTES])
            assert b" 431 " in connection.recv(4096).split(b"\r\n")[0]
    assert ask(config)[0] == 200


def test_who_sends_slowly_is_cut_in_all(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A byte now and then keeps no thread: the time is that of the whole request. So it is for TLS."""
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.3)
    pem, key = certificate(tmp_path)
    for config in (serve(), serve(certificate=pem, key=key)):
        with socket.create_connection((config.host, config.port), WAIT_S) as connection:
            connection.settimeout(0.02)
            end = time.monotonic() + WAIT_S
            while time.monotonic() < end:
                try:
                    connection.sendall(b"G" if config.certificate is None else b"\x16")
                    if connection.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("it was served for ever")


def test_too_many_clients_are_cut_and_later_ones_are_served(serve: Serve) -> None:
    config = serve()
    held = [socket.create_connection((config.host, config.port)) for _ in range(web.CLIENTS)]
    with socket.create_connection((config.host, config.port)) as surplus:
        surplus.settimeout(WAIT_S)
        assert surplus.recv(1) == b""
    for each in held:
        each.close()
    for _ in range(200):  # until their ends were noticed
        try:
            assert ask(config)[0] == 200
            break
        except (OSError, HTTPException):
            threading.Event().wait(0.05)
    else:
        pytest.fail("nobody is served any more")


def test_a_page_that_fails_tells_the_log_alone(serve: Serve) -> None:
    def page(_: str) -> Answer:
        raise RuntimeError("a secret of the inside")

    with structlog.testing.capture_logs() as logged:
        status, text, _ = ask(serve(page))
    assert (status, text) == (500, "internal error; the log says more\n")
    assert [each["path"] for each in logged if each["event"] == "page failed"] == ["/page"]


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = HttpConfig("127.0.0.1", other.getsockname()[1])
        with pytest.raises(EngineError, match=r"http\.bind: can't listen at 127\.0\.0\.1:\d+: Address already in use"):
            WebServer(config, "http", {})
