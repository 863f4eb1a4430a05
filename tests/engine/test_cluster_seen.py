"""Where the time goes, as a real cluster tells it: latencies by stage, metrics over HTTP, traces from end to end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ports import free_ports
from prometheus_client.parser import text_string_to_metric_families

import engine
from engine import Engine, LocalCluster
from engine.client.config import load_identity, write_toml
from engine.client.membership import Servers
from engine.client.transport import Channel, Moved, ask, raise_for_status
from engine.errors import EngineError, KeyNotFound
from engine.protocol.requests import REQUEST_CODECS, Empty, NodeLatency, Operate

KEY = "seen/very-private-name"
CLASS = "encrypt/aes-256-gcm"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
WAIT_S = 20.0
NODES = ("node1", "node2", "node3")


class Watched:
    """A cluster whose members serve metrics and whose nodes write traces, and a client of it."""

    def __init__(self, local: LocalCluster, ports: dict[str, int], kq: Engine) -> None:
        self.local, self.ports, self.kq = local, ports, kq

    def page(self, node: str) -> str:
        """What a node tells over HTTP."""
        with closing(HTTPConnection("127.0.0.1", self.ports[node], timeout=WAIT_S)) as connection:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read().decode()

    def metrics(self) -> dict[tuple[str, ...], float]:
        """(name, label values...) -> the sum over all nodes."""
        found: dict[tuple[str, ...], float] = {}
        for node in NODES:
            for family in text_string_to_metric_families(self.page(node)):
                for sample in family.samples:
                    place = (sample.name, *sample.labels.values())
                    found[place] = found.get(place, 0.0) + sample.value
        return found

    def trace_file(self, node: str) -> Path:
        return self.local.path / "nodes" / node / "trace.jsonl"

    def spans(self, wanted: Callable[[list[dict[str, Any]]], bool], trace_id: str) -> list[dict[str, Any]]:
        """The spans of a trace that the nodes wrote, once they are as wanted."""
        until_s = time.monotonic() + WAIT_S
        while True:
            found = []
            for node in NODES:
                lines = self.trace_file(node).read_text(encoding="utf-8").splitlines()
                found += [each for each in map(json.loads, lines) if each["context"]["trace_id"] == f"0x{trace_id}"]
            if wanted(found):
                return found
            assert time.monotonic() < until_s, found
            time.sleep(0.1)

    def written(self) -> dict[str, int]:
        """How many spans each node made before now; one is that of this question."""
        trace_id = os.urandom(16).hex()
        with engine.trace_context(f"00-{trace_id}-{'1' * 16}-01"):
            self.kq.status()
        self.spans(has(status=len(NODES)), trace_id)  # each node writes them in their order
        return {node: len(self.trace_file(node).read_text(encoding="utf-8").splitlines()) for node in NODES}

    def channel(self) -> Channel:
        identity = load_identity(self.local.client_config.parent / "identity.toml")
        return Channel(identity.transport, Servers(self.local.cluster))


def add_to(config: Path, more: dict[str, Any]) -> None:
    write_toml(config, {**tomllib.loads(config.read_text(encoding="utf-8")), **more})


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    ports = dict(zip((*NODES, "balancer"), free_ports(len(NODES) + 1), strict=True))
    with LocalCluster(nodes=3, threshold=2, path=tmp_path_factory.mktemp("seen"), clients=("shop",)) as local:
        local.stop()
        for node in NODES:
            told, metrics = {"trace": {"file": "trace.jsonl"}}, {"bind": f"127.0.0.1:{ports[node]}"}
            add_to(local.path / "nodes" / node / "node.toml", {**told, "metrics": metrics})
        add_to(local.path / "balancer" / "balancer.toml", {"http": {"bind": f"127.0.0.1:{ports['balancer']}"}})
        local.start()
        with engine.connect(local.client_config) as kq:
            kq.create_key(KEY, "aes-256-gcm", threshold=2, shares=3)
            yield Watched(local, ports, kq)


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    """What the client's own spans become."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def named(spans: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [each for each in spans if each["name"] in {f"keyquorum.{name}" for name in names}]


def has(**counts: int) -> Callable[[list[dict[str, Any]]], bool]:
    """Whether there are at least so many spans of each name."""
    return lambda spans: all(len(named(spans, name.replace("_", "."))) >= count for name, count in counts.items())


# --- latencies ---


def test_the_endpoint_counts_the_requests_that_were_made(watched: Watched) -> None:
    """Exactly: good uses by the short way and the ordinary one, refused ones, and those that the token did not take."""
    watched.kq.prewarm(KEY)
    before = watched.metrics()
    ended: list[str] = []

    def use(channel: Channel, node: str, verb: str, data: bytes, name: str = KEY) -> None:
        message = REQUEST_CODECS[verb].encode(Operate(name, b"", data, b"", b"", False, b""))
        try:
            raise_for_status(channel.call(node, verb, message, WAIT_S))
            ended.append(f"{verb} ok")
        except (EngineError, Moved) as error:
            ended.append(f"{verb} {error.code}")

    with watched.channel() as channel:
        for node in NODES:
            for _ in range(10):
                use(channel, node, "encrypt", b"data")
            for _ in range(3):
                use(channel, node, "decrypt", b"KQ\x01\x00\x00\x00\x01" + bytes(40))
            for _ in range(2):
                use(channel, node, "mac", b"data", "seen/no-such-key")
    after = watched.metrics()

    def more(*place: str) -> float:
        return after.get(place, 0.0) - before.get(place, 0.0)

    good, changed = ended.count("encrypt ok"), ended.count("decrypt invalid-tag")
    assert good >= 10
    assert changed >= 3
    assert more("keyquorum_requests_total", CLASS) == 30
    assert more("keyquorum_request_duration_seconds_count", CLASS) == 30
    assert more("keyquorum_request_duration_seconds_bucket", CLASS, "+Inf") == 30
    assert more("keyquorum_request_errors_total", CLASS) == 30 - good == ended.count("encrypt need-grant")
    assert more("keyquorum_stage_duration_seconds_count", CLASS, "policy") == 30
    assert more("keyquorum_stage_duration_seconds_count", CLASS, "token") == good
    assert more("keyquorum_stage_duration_seconds_count", CLASS, "reply") == 30
    assert more("keyquorum_requests_total", "decrypt/aes-256-gcm") == 9
    assert more("keyquorum_request_errors_total", "decrypt/aes-256-gcm") == 9
    assert more("keyquorum_stage_duration_seconds_count", "decrypt/aes-256-gcm", "token") == changed
    assert more("keyquorum_requests_total", "mac") == 6  # of no class, since there is no such key
    assert more("keyquorum_stage_duration_seconds_count", CLASS, "parse") < 30  # by the short way it is no stage
    assert after[("keyquorum_ready",)] == len(NODES)
    assert after[("keyquorum_loaded_keys",)] >= 1
    assert more("keyquorum_cache_hits_total", "keys") >= good


def test_no_name_of_a_key_or_a_member_is_told(watched: Watched) -> None:
    watched.kq.encrypt(KEY, b"data")
    for node in NODES:
        page = watched.page(node)
        for name in (*watched.local.cluster.members, "seen/", "very-private-name"):
            assert name not in page


def test_a_node_tells_percentiles_of_every_stage(watched: Watched) -> None:
    for _ in range(20):
        watched.kq.encrypt(KEY, b"data")
    told: dict[str, int] = {}  # over all nodes
    for member in watched.kq.status(latency=True):
        if member.role != "node":
            assert member.latency is None
            continue
        assert isinstance(member.latency, NodeLatency)
        assert (member.latency.node, member.error) == (member.name, None)
        for each in member.latency.classes:
            assert each.stages[-1].stage == "total"
            for stage in each.stages:
                assert 0 < stage.count <= each.stages[-1].count
                assert stage.p50_ns <= stage.p90_ns <= stage.p99_ns <= stage.p999_ns <= stage.max_ns
                place = f"{each.request_class} {stage.stage}"
                told[place] = told.get(place, 0) + stage.count
    for stage_name in ("policy", "token", "audit", "reply", "total"):
        assert told[f"{CLASS} {stage_name}"] >= 20
    assert {f"{CLASS} cache", "share.release work", "hello parse", "generate/aes-256-gcm wait"} <= set(told)
    assert all(member.latency is None for member in watched.kq.status())


def test_who_may_not_ask_for_the_status_may_not_ask_for_this(watched: Watched) -> None:
    with watched.channel() as channel:
        assert ask(channel, "node1", "latency", Empty(), WAIT_S).node == "node1"
    config = watched.local.add_client("nosy")
    with engine.connect(config) as nosy:
        assert {type(each.error).__name__ for each in nosy.status(latency=True) if each.role == "node"} == {
            "AccessDenied"
        }


def test_a_client_keeps_its_round_trips(watched: Watched) -> None:
    with engine.connect(watched.local.client_config) as kq:
        assert kq.latency_stats == {}
        for _ in range(10):
            kq.encrypt(KEY, b"data")
        kq.encrypt_many(KEY, [b"data"] * 10)
        found = kq.latency_stats[CLASS]
    assert found.count >= 20
    assert 0 < found.p50_s <= found.p90_s <= found.p99_s <= found.p999_s <= found.max_s
    assert 0 < found.mean_s <= found.max_s


def test_the_command_shows_it(watched: Watched) -> None:
    watched.kq.encrypt(KEY, b"data")
    command = [Path(sys.executable).with_name("keyquorum"), "status", "--config", watched.local.client_config]

    def run(*options: str) -> str:
        return subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=60).stdout

    text = run("--latency")
    assert "P99.9" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("NODE") and "TOKEN" in line]
    assert row == [
        "NODE",
        "CLASS",
        *(each.upper() for each in ("parse", "policy", "cache", "wait", "gather", "token", "work", "audit", "reply")),
    ]
    assert any(CLASS in line for line in text.splitlines())
    assert KEY not in text
    assert len(run("--latency", "-v").splitlines()) > len(text.splitlines())
    assert "P99.9" not in run()
    told = json.loads(run("--latency", "-o", "json"))["members"]
    stages = [
        stage
        for each in told
        if each["role"] == "node"
        for found in each["latency"]["classes"]
        for stage in found["stages"]
    ]
    assert {"stage", "count", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"} == set(stages[0])
    assert "latency" not in json.loads(run("-o", "json"))["members"][0]


# --- traces ---


def test_one_trace_goes_from_the_caller_through_client_and_combiner_to_the_holders(
    watched: Watched, exported: InMemorySpanExporter
) -> None:
    exported.clear()
    watched.kq.flush()
    tracer = trace.get_tracer("a program")
    with tracer.start_as_current_span("cold") as caller:
        watched.kq.encrypt(KEY, b"very private data")
    own = caller.get_span_context()
    client_spans = {each.name: each for each in exported.get_finished_spans()}
    assert set(client_spans) == {"cold", "keyquorum.encrypt"}
    client = client_spans["keyquorum.encrypt"]
    assert client.context.trace_id == own.trace_id
    assert client.parent is not None
    assert client.parent.span_id == own.span_id
    assert client.attributes is not None
    assert (client.attributes["keyquorum.class"], client.attributes["keyquorum.cold"]) == (CLASS, True)
    combiner = client.attributes["keyquorum.node"]
    assert combiner in NODES

    spans = watched.spans(has(encrypt=1, gather=1, token=1, share_release=1), f"{own.trace_id:032x}")
    (server,), (gather,), (token,) = (named(spans, name) for name in ("encrypt", "gather", "token"))
    assert server["parent_id"] == f"0x{client.context.span_id:016x}"
    assert server["resource"]["attributes"]["service.instance.id"] == combiner
    assert (server["attributes"]["keyquorum.class"], server["attributes"]["keyquorum.cold"]) == (CLASS, True)
    assert gather["parent_id"] == token["parent_id"] == server["context"]["span_id"]
    holders = named(spans, "share.release")
    assert {each["parent_id"] for each in holders} == {gather["context"]["span_id"]}
    assert combiner not in {each["resource"]["attributes"]["service.instance.id"] for each in holders}

    with tracer.start_as_current_span("warm") as caller:
        watched.kq.encrypt(KEY, b"very private data")
    warm = exported.get_finished_spans()[-2]
    assert (warm.name, warm.attributes and warm.attributes["keyquorum.cold"]) == ("keyquorum.encrypt", False)
    spans = watched.spans(has(encrypt=1, token=1), f"{caller.get_span_context().trace_id:032x}")
    assert not named(spans, "gather")
    for node in NODES:
        text = watched.trace_file(node).read_text(encoding="utf-8")
        for secret in (KEY, "very private", "shop"):
            assert secret not in text


def test_a_failed_call_says_so_in_its_span_and_names_no_key(watched: Watched, exported: InMemorySpanExporter) -> None:
    exported.clear()
    with trace.get_tracer("a program").start_as_current_span("caller"), pytest.raises(KeyNotFound):
        watched.kq.sign("seen/no-such-key", b"data")
    span = next(each for each in exported.get_finished_spans() if each.name == "keyquorum.sign")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "key-not-found"
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "no-such-key" not in span.to_json()


def test_without_a_trace_nothing_is_written_and_the_short_way_is_taken(
    watched: Watched, exported: InMemorySpanExporter
) -> None:
    watched.kq.encrypt(KEY, b"data")
    before = watched.written()
    parsed = watched.metrics().get(("keyquorum_stage_duration_seconds_count", CLASS, "parse"), 0.0)
    for _ in range(20):
        watched.kq.encrypt(KEY, b"data")
    assert watched.metrics()["keyquorum_stage_duration_seconds_count", CLASS, "parse"] - parsed < 20
    assert watched.written() == {node: count + 1 for node, count in before.items()}
    exported.clear()
    watched.kq.encrypt(KEY, b"data")
    assert exported.get_finished_spans() == ()


def test_a_traceparent_that_the_caller_gives_goes_along(watched: Watched) -> None:
    """With every verb, from threads and from tasks; outside the block there is none again."""
    watched.kq.encrypt(KEY, b"data")
    with engine.trace_context(TRACEPARENT):
        watched.kq.encrypt_many(KEY, [b"data"] * 3)
        watched.kq.key_info(KEY)
    watched.kq.encrypt(KEY, b"data")
    spans = watched.spans(has(encrypt=3, describe=1), TRACE)
    assert len(named(spans, "encrypt")) == 3

    other = TRACEPARENT.replace(TRACE, TRACE[::-1])

    async def encrypt() -> None:
        async with engine.aio.connect(watched.local.client_config) as kq:
            with engine.trace_context(other):
                await asyncio.gather(kq.encrypt(KEY, b"one"), kq.encrypt_many(KEY, [b"two", b"three"]))
            await kq.encrypt(KEY, b"four")

    asyncio.run(encrypt())
    assert len(named(watched.spans(has(encrypt=3), TRACE[::-1]), "encrypt")) == 3


@pytest.mark.parametrize(
    "text", ["", "00-4bf9", TRACEPARENT.upper(), TRACEPARENT + "-x", f"00-{'0' * 32}-{'1' * 16}-01"]
)
def test_a_malformed_traceparent_is_the_callers_mistake(text: str) -> None:
    with pytest.raises(ValueError, match="traceparent"), engine.trace_context(text):
        pytest.fail("it was taken")


def test_a_node_ignores_a_malformed_traceparent_and_answers(watched: Watched) -> None:
    before = watched.written()
    body = REQUEST_CODECS["status"].encode(Empty())
    with watched.channel() as channel:
        for value in (b"", b"\xff\x00", TRACEPARENT.upper().encode(), TRACEPARENT.encode() + b"-x", b"x" * 4096):
            token = channel.start("node1", "status", body, WAIT_S, {"traceparent": value})
            (arrival,) = [each for each in channel.poll(WAIT_S) if each.token == token]
            assert arrival.reply is not None
            raise_for_status(arrival.reply)
    assert watched.written() == {node: count + 1 for node, count in before.items()}


def test_without_opentelemetry_the_context_is_carried_all_the_same(watched: Watched) -> None:
    """A program that never imported it: the client makes no span, and the node's has the caller's for its parent."""
    program = (
        "import sys, engine\n"
        "with engine.connect(sys.argv[1]) as kq, engine.trace_context(sys.argv[3]):\n"
        "    kq.encrypt(sys.argv[2], b'data')\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    trace_id = "a" * 32
    words = [str(watched.local.client_config), KEY, f"00-{trace_id}-{'b' * 16}-01"]
    subprocess.run([sys.executable, "-c", program, *words], check=True, timeout=60)
    spans = watched.spans(has(encrypt=1), trace_id)
    assert {each["parent_id"] for each in named(spans, "encrypt")} == {f"0x{'b' * 16}"}


# --- alerts ---

ALERT = re.compile(r"^      - alert: (\w+)\n(.*?)(?=^      - alert: |^  - name: |\Z)", re.MULTILINE | re.DOTALL)


def test_the_example_alerts_are_of_metrics_that_there_are(watched: Watched) -> None:
    """Each metric and label in a rule is one that nodes or balancer tell; each alert is in the runbook."""
    watched.kq.encrypt(KEY, b"data")
    until_s = time.monotonic() + WAIT_S
    while "keyquorum_balancer_forecast_coverage_ratio{" not in (page := watched.page("balancer")):
        assert time.monotonic() < until_s, page  # until something was forecast, and came
        time.sleep(0.2)
    assert KEY not in page
    parsed = [
        sample
        for text in (page, watched.page("node1"))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    labels: dict[str, set[str]] = {}
    for sample in parsed:
        labels.setdefault(sample.name, set()).update(sample.labels)
    docs = Path(__file__).parents[2] / "docs"
    alerts = dict(ALERT.findall((docs / "alerts.yml").read_text(encoding="utf-8")))
    assert len(alerts) > 15
    for alert, text in alerts.items():
        expression = text.partition("expr:")[2].partition("labels:")[0]
        named = {each for each in re.findall(r"\b[a-z]\w*_\w+\b", expression) if each.startswith("keyquorum_")}
        assert named or "up{" in expression, alert
        assert named <= labels.keys(), f"{alert}: {named - labels.keys()}"
        for name, matchers in re.findall(r"\b(keyquorum_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", matchers)) <= labels[name], f"{alert}: {name}"
        assert not re.search(r"\bsecret|private", text)
    runbook = set(re.findall(r"^### (\w+)$", (docs / "operating.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert alerts.keys() <= runbook
    assert {each for each in runbook if each.startswith("Keyquorum")} == alerts.keys()


# --- configuration ---


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"metrics": {"bind": "0.0.0.0:9464"}}, "is no loopback address"),
        ({"trace": {"file": "/no/such/folder/trace.jsonl"}}, "can't be written"),
    ],
)
def test_a_node_that_may_not_or_cannot_does_not_start(
    watched: Watched, tmp_path: Path, told: dict[str, Any], match: str
) -> None:
    config = watched.local.path / "nodes" / "node1" / "node.toml"
    usual = tomllib.loads(config.read_text(encoding="utf-8"))
    broken = config.with_name("broken.toml")
    write_toml(broken, {**usual, **told, "data": str(tmp_path)})
    command = [sys.executable, "-P", "-m", "nodes", "--unsupervised", "--config", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert match in done.stderr
