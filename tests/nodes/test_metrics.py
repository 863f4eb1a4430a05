"""The endpoint for Prometheus, in this process: what it answers, to whom, and what it never says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from typing import Any

import pytest
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families

from engine.client.httpconfig import HttpConfig
from engine.client.web import CLIENTS
from engine.errors import EngineError
from engine.protocol.requests import CacheCount, HolderLatency, HostHealth, NodeStatus, ServiceCount, TokenHealth
from nodes.handlers import Snapshot
from nodes.latency import Latencies
from nodes.metrics import BOUNDS_S, MetricsServer

STATUS = NodeStatus(
    "secret-node", "1.2", 3, 4_500, 5, 6,
    [CacheCount("keys", 1, 2, 3, 4, 5, 6, 7, 8, 9)], [HolderLatency("secret-peer", 1, 2, 3, False)],
    1, "secret token", [], [], "", "", ["alarm of secret-peer"], "",
    TokenHealth("", "", 11, 12, 13_000, 14_000), ServiceCount(21, 22, 23, 24, 25, 26, 27, 28, 29),
    HostHealth(0, 0, 0, 0),
)  # fmt: skip


def snapshot() -> Snapshot:
    latencies = Latencies()
    for milliseconds in (1, 2, 30):
        latencies.note("encrypt/aes-256-gcm", [-1.0] * 5 + [1e-4, -1.0, -1.0, -1.0, milliseconds / 1000], ok=True)
    latencies.note("describe", [-1.0] * 9 + [1e-3], ok=False)
    return Snapshot(STATUS, latencies.buckets(BOUNDS_S), latencies.errors, {"slow": 2})


Server = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Server]:
    """Makes a server whose loop is ``ask``; its URL."""
    made: list[MetricsServer] = []

    def server(ask: Callable[[Callable[[Snapshot], None]], None] = lambda take: take(snapshot())) -> str:
        config = HttpConfig("127.0.0.1", free_port())
        made.append(MetricsServer(config, ask))
        return f"{config.url}metrics"

    yield server
    for each in made:
        each.close()


def ask(url: str, method: str = "GET") -> tuple[int, str]:
    """The status of an answer, and its text."""
    place, _, path = url.removeprefix("http://").partition("/")
    with closing(HTTPConnection(place, timeout=20)) as connection:
        connection.request(method, f"/{path}")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """(name, label values...) -> value, as Prometheus' own parser reads it."""
    status, text = ask(url)
    assert status == 200
    assert "secret" not in text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_everything_that_is_counted_is_told(serve: Server) -> None:
    told = scrape(serve())
    gcm = "encrypt/aes-256-gcm"
    assert told["keyquorum_requests_total", gcm] == 3
    assert told["keyquorum_requests_total", "describe"] == 1
    assert (told["keyquorum_request_errors_total", gcm], told["keyquorum_request_errors_total", "describe"]) == (0, 1)
    assert told["keyquorum_request_duration_seconds_count", gcm] == 3
    assert told["keyquorum_request_duration_seconds_sum", gcm] == pytest.approx(0.033)
    below = [told["keyquorum_request_duration_seconds_bucket", gcm, each] for each in ("0.0005", "0.005", "+Inf")]
    assert below == [0, 2, 3]
    assert told["keyquorum_stage_duration_seconds_count", gcm, "token"] == 3
    assert ("keyquorum_stage_duration_seconds_count", gcm, "gather") not in told
    assert told["keyquorum_cache_hits_total", "keys"] == 3
    assert told["keyquorum_cache_evictions_total", "keys", "room"] == 7
    assert told["keyquorum_jobs_waiting", "slow"] == 2
    assert told[("keyquorum_uptime_seconds",)] == 4.5
    assert told[("keyquorum_ready",)] == 1
    assert told[("keyquorum_alarms",)] == 1
    assert told[("keyquorum_requests_under_way",)] == 21
    assert told[("keyquorum_connections",)] == 22
    assert told[("keyquorum_requests_refused_total",)] == 26
    assert told[("keyquorum_token_renewals_total",)] == 11
    assert told["keyquorum_build_info", "1.2"] == 1


def test_only_that_one_page_is_there(serve: Server) -> None:
    url = serve()
    assert ask(url)[0] == 200
    assert ask(url.replace("/metrics", "/"))[0] == 404
    assert ask(url, "POST")[0] == 405


def test_a_node_that_is_busy_says_so(serve: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.metrics.SNAPSHOT_TIMEOUT_S", 0.05)
    assert ask(serve(lambda take: None))[0] == 503


def test_too_many_clients_at_a_time_are_cut_and_later_ones_are_served(serve: Server) -> None:
    url = serve()
    host, port = url.removeprefix("http://").removesuffix("/metrics").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(CLIENTS)]
    try:
        with socket.create_connection((host, int(port))) as surplus:
            surplus.settimeout(20)
            assert surplus.recv(1) == b""
    finally:
        for each in held:
            each.close()
    for _ in range(100):  # until their ends were noticed
        try:
            scrape(url)
            break
        except (OSError, HTTPException):
            threading.Event().wait(0.05)
    else:
        pytest.fail("nobody is served any more")


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = HttpConfig("127.0.0.1", other.getsockname()[1])
        with pytest.raises(
            EngineError, match=r"metrics\.bind: can't listen at 127\.0\.0\.1:\d+: Address already in use"
        ):
            MetricsServer(config, lambda take: None)


def test_the_number_of_classes_is_bounded() -> None:
    latencies = Latencies()
    spent: list[Any] = [-1.0] * 9 + [1e-3]
    for number in range(300):
        latencies.note(f"class{number}", spent, ok=bool(number % 2))
    told = {each.request_class: each for each in latencies.told()}
    assert len(told) == 128
    assert told["other"].stages[-1].count == 300 - 127
    assert sum(each.errors for each in told.values()) == 150
    assert sum(latencies.errors.values()) == 150
