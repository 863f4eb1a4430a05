"""Caches and gathering on the real cluster: slow holders are passed over, liars named, uses run out, flushes count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import LocalCluster, NeedGrant
from engine.client.config import load_identity, write_toml
from engine.client.transport import Channel, ask
from engine.errors import EngineError
from engine.protocol.grant import issue_grant
from engine.protocol.manifest import read_key_manifest
from engine.protocol.requests import Describe, Empty, Flush, NodeStatus, Operate

LIAR = """
import sys
from nodes.holder import ShareHolder
from engine.sharing import Share
honest = ShareHolder.own_share
def lie(self, lane, entry):
    share, salt = honest(self, lane, entry)
    return Share(share.x, bytes([share.y[0] ^ 1]) + share.y[1:]), salt
ShareHolder.own_share = lie
from nodes.command import run
sys.argv[1:1] = ["--config"]
sys.exit(run())
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Five nodes, 3-of-5, with one key; each test puts back what it damaged."""
    path = tmp_path_factory.mktemp("caches")
    with LocalCluster(nodes=5, threshold=3, path=path) as running:
        with engine.connect(running.client_config) as kq:
            kq.create_key("data", "aes-256-gcm", threshold=3, shares=5)
        yield running


class Client:
    """The client ``local``, which says itself whom it asks."""

    def __init__(self, cluster: LocalCluster) -> None:
        identity = load_identity(cluster.path / "clients" / "local" / "identity.toml")
        self.signing = identity.signing
        self.channel = Channel(identity.transport, cluster.cluster.nodes)

    def record(self) -> Any:
        return read_key_manifest(ask(self.channel, "node1", "describe", Describe("data", 0), 10).manifest)

    def encrypt(self, node: str, *, grant: bool = True) -> bytes:
        permit = b""
        if grant:
            now_ms = time.time_ns() // 1_000_000
            permit = issue_grant(self.signing, self.record(), "encrypt", node, now_ms, 10_000, os.urandom(16))
        return bytes(
            ask(self.channel, node, "encrypt", Operate("data", b"", b"text", b"", b"", False, permit), 10).data
        )

    def cold(self, node: str) -> bytes:
        ask(self.channel, node, "flush", Flush("data"), 10)
        return self.encrypt(node)

    def status(self, node: str) -> NodeStatus:
        told = ask(self.channel, node, "status", Empty(), 10)
        assert isinstance(told, NodeStatus)
        return told

    def caches(self, node: str) -> dict[str, Any]:
        return {each.cache: each for each in self.status(node).caches}

    def asked(self, node: str) -> dict[str, int]:
        """Holder -> releases that the node remembers."""
        return {each.node: each.samples for each in self.status(node).holders}


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    made = Client(cluster)
    yield made
    made.channel.close()


def test_a_stopped_holder_is_hedged_over_and_then_avoided(cluster: LocalCluster, client: Client) -> None:
    """SIGSTOP: the connection stands and nobody answers. Each request is served; soon the holder is asked no more."""
    cluster.restart("node1")
    for _ in range(5):
        client.cold("node1")
    before = client.asked("node1")
    victim = max(before, key=lambda name: before[name])
    assert before[victim] >= 4  # it is one of those that the combiner prefers
    cluster.pause(victim)
    try:
        for _ in range(20):
            assert client.cold("node1")
        told = {each.node: each for each in client.status("node1").holders}
    finally:
        cluster.resume(victim)
    late = told[victim].samples - before[victim]
    assert 1 <= late <= 10  # it was tried, and then others took its place
    others = [each for name, each in told.items() if name != victim]
    assert sum(each.samples - before.get(each.node, 0) for each in others) >= 40


def test_a_lying_holder_is_named_and_replaced(cluster: LocalCluster, client: Client) -> None:
    """A real node that changes one bit of what it releases. A combiner that has just started asks it first."""
    cluster.stop_node("node2")
    folder = cluster.path / "nodes" / "node2"
    with (folder / "liar.log").open("wb") as log:
        liar = subprocess.Popen([sys.executable, "-c", LIAR, str(folder / "node.toml")], stdout=log, stderr=log)
    try:
        _await(client, "node2", liar)
        cluster.restart("node1")
        before = len(cluster.log_file("node1").read_text(encoding="utf-8"))
        told = ""
        for _ in range(20):  # until its connection to the liar is there
            assert client.cold("node1")
            told = cluster.log_file("node1").read_text(encoding="utf-8")[before:]
            if "corrupt share" in told:
                break
        assert "corrupt share" in told
        assert all("node2" in line for line in told.splitlines() if "corrupt share" in line)
    finally:
        liar.terminate()
        liar.wait(20)
        cluster.start_node("node2")


def _await(client: Client, node: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            client.status(node)
            return
        except EngineError:
            assert process.poll() is None
            assert time.monotonic() < until, f"{node} does not answer"
            time.sleep(0.1)


def test_when_its_uses_are_over_a_key_needs_a_grant_again(cluster: LocalCluster, client: Client) -> None:
    """A combiner that may use a loaded key three times asks for a grant then; the library sends it by itself."""
    config = cluster.path / "nodes" / "node1" / "node.toml"
    usual = tomllib.loads(config.read_text(encoding="utf-8"))
    write_toml(config, {**usual, "cache": {"max_uses": 3, "max_shares": 0}})
    try:
        cluster.restart("node1")
        client.encrypt("node1")
        for _ in range(2):
            client.encrypt("node1", grant=False)
        with pytest.raises(NeedGrant, match="not loaded on node1"):
            client.encrypt("node1", grant=False)
        assert client.caches("node1")["keys"].uses == 1
        with engine.connect(cluster.client_config) as kq:
            for _ in range(20):
                assert kq.decrypt("data", kq.encrypt("data", b"x")) == b"x"
        for _ in range(4):
            client.encrypt("node1")
        assert client.caches("node1")["keys"].uses >= 2
        assert client.caches("node1")["shares"].entries == client.caches("node1")["shares"].hits == 0
    finally:
        write_toml(config, usual)
        cluster.restart("node1")


def test_shares_are_unsealed_once_and_a_flush_forgets_them(cluster: LocalCluster, client: Client) -> None:
    """Releases after the first find the share; a flush of the key takes keys and shares; status and CLI tell it."""
    node = "node1"
    client.cold(node)
    for _ in range(6):
        for combiner in ("node3", "node4"):
            client.cold(combiner)
    told = {name: client.caches(name) for name in cluster.nodes}
    assert sum(each["shares"].hits for each in told.values()) >= 1
    assert told[node]["shares"].entries == 1
    assert told[node]["shares"].bytes == 128  # salt, key and blinding in pieces of 64 bytes
    assert told[node]["keys"].entries == client.status(node).loaded == 1
    assert told[node]["signatures"].entries >= 1
    flushed = ask(client.channel, node, "flush", Flush("data"), 10)
    assert (flushed.dropped, flushed.shares) == (1, 1)
    after = client.caches(node)
    assert [after[name].entries for name in ("keys", "shares", "signatures")] == [0, 0, 0]
    assert after["shares"].flushed >= 1
    shown = _status(cluster, "-o", "json")
    (of_node,) = [each["status"] for each in json.loads(shown)["members"] if each["name"] == node]
    assert {each["cache"] for each in of_node["caches"]} == {"keys", "shares", "signatures"}
    assert of_node["holders"]
    text = _status(cluster, "--verbose")
    assert "CACHE" in text
    assert "EXPECTED" in text


def _status(cluster: LocalCluster, *options: str) -> str:
    command = [str(Path(sys.executable).parent / "keyquorum"), "status", "--config", str(cluster.client_config)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_refresh_drops_cached_shares_and_leaves_loaded_keys(cluster: LocalCluster, client: Client) -> None:
    """Each holder lets the share of the old epoch go at once; the key, which is the same, stays in the tokens."""
    with engine.connect(cluster.client_config) as kq:
        kq.create_key("fresh", "aes-256-gcm", threshold=3, shares=5)
        ciphertext = kq.encrypt("fresh", b"x")
        loaded = kq.prewarm("fresh")
        before = {name: client.caches(name) for name in loaded}
        kq.refresh_key("fresh")
        for name in loaded:
            after = client.caches(name)
            assert after["shares"].changed > before[name]["shares"].changed
            assert after["keys"].changed == before[name]["keys"].changed
            assert after["keys"].entries == before[name]["keys"].entries >= 1
        kq.flush("fresh")
        assert kq.decrypt("fresh", ciphertext) == b"x"
