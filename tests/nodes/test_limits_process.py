"""Bounds of a real node: what one member does beyond them is refused, and others are served."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from engine.client.transport import Channel, ask, raise_for_status
from engine.errors import EngineError, KeyNotFound, Overloaded
from engine.protocol.requests import REQUEST_CODECS, Describe, Empty, NodeStatus, ServiceCount
from nodes.config import load_node_config

NODE = "node1"
FILES = 320
LIMIT = "'carol': more requests than limits.requests_per_s = 100 allows"
RATE = "requests_per_s = 100.0\nburst_s = 2.0"


@pytest.fixture
def node(cluster_folder: Any) -> Any:
    """A node with few descriptors and a low rate for each member."""
    made = cluster_folder.init(NODE)
    assert made.returncode == 0, made.stderr
    config = cluster_folder.config(NODE)
    config.write_text(config.read_text(encoding="utf-8") + f"\n[limits]\n{RATE}\n", encoding="utf-8")
    return cluster_folder.start(NODE, open_files=FILES)


def status(cluster_folder: Any, member: str = "alice") -> NodeStatus:
    with cluster_folder.channel(member) as channel:
        answer: NodeStatus = ask(channel, NODE, "status", Empty(), 20)
    return answer


def outcomes(channel: Channel, count: int) -> Counter[str]:
    """What becomes of so many requests sent at once."""
    body = REQUEST_CODECS["describe"].encode(Describe("nothing", 0))
    waiting = {channel.start(NODE, "describe", body, 60.0) for _ in range(count)}
    told: Counter[str] = Counter()
    while waiting:
        for arrival in channel.poll(60.0):
            waiting.discard(arrival.token)
            assert arrival.reply is not None, arrival.error
            try:
                raise_for_status(arrival.reply)
            except Overloaded as error:
                told["refused" if LIMIT in str(error) else str(error)] += 1
            except Exception as error:
                told[type(error).__name__] += 1
    return told


def test_a_flood_is_refused_told_in_one_line_and_hurts_nobody_else(
    node: Any, cluster_folder: Any, until: Callable[..., Any]
) -> None:
    with cluster_folder.channel("carol") as greedy, cluster_folder.channel("alice") as modest:
        told = outcomes(greedy, 900)
        assert told["refused"] > 300
        with pytest.raises(KeyNotFound):
            ask(modest, NODE, "describe", Describe("nothing", 0), 20)
    service = status(cluster_folder).service
    assert (service.refused, service.undeliverable) == (told["refused"], 0)
    path = node.folder / "data" / "audit" / "audit-000001.jsonl"

    def recorded() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [each for each in lines if each["event"] == "refused"]

    def all_told() -> bool:
        return sum(int(each["detail"].split()[0]) for each in recorded()) == told["refused"]

    until(all_told, "every refused request is counted in the audit log")
    assert len(recorded()) < 60
    assert {(each["member"], each["outcome"]) for each in recorded()} == {("carol", "overloaded")}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    begun = [each for each in lines if each["event"] == "request" and each["member"] == "carol"]
    assert len(begun) == 900 - told["refused"]


def test_a_node_with_few_descriptors_outlives_more_connections_than_it_has(
    node: Any, cluster_folder: Any, until: Callable[..., Any]
) -> None:
    before = status(cluster_folder).service
    assert before.descriptors_max == FILES
    assert 8 < before.connections_max < FILES
    host, port = cluster_folder.world.cluster.nodes[NODE].endpoint.removeprefix("tcp://").rsplit(":", 1)

    def service() -> ServiceCount | None:
        try:
            return status(cluster_folder).service
        except EngineError:  # nobody gets in for a moment, while the strangers' connections are cut
            return None

    with ExitStack() as stack:
        for _ in range(3 * FILES):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex((host, int(port)))
        until(lambda: "many connections" in node.log, "the node notices them")

        beside = until(service, "a member is served beside the strangers")
        assert beside.descriptors <= FILES

    def gone() -> bool:
        now = service()
        return now is not None and now.connections < before.connections_max

    until(gone, "they are gone")
    assert node.process.poll() is None


def test_a_node_without_enough_descriptors_says_so(cluster_folder: Any) -> None:
    made = cluster_folder.init(NODE)
    assert made.returncode == 0, made.stderr
    node = cluster_folder.spawn(NODE, open_files=100)
    assert node.process.wait(60) == 2
    assert "the limit on open files (ulimit -n) is 100; at least 256 are needed" in node.log


def test_the_limits_of_the_configuration_are_those_that_hello_tells(node: Any, cluster_folder: Any) -> None:
    limits = load_node_config(cluster_folder.config(NODE)).service_limits
    assert limits.requests_per_s == 100.0
    with cluster_folder.channel("alice") as channel:
        ask(channel, NODE, "status", Empty(), 20)
        told = channel.welcome(NODE)
    assert told is not None
    assert (told.limits.requests_per_s, told.limits.member_requests) == (100, limits.member_requests)
    assert 0 < told.limits.connections < FILES
