"""A node that is far away, by a network that really takes its time: the balancer learns of it from TCP's own clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from far_network import FAR, NEAR, far_network
from msgspec.structs import replace

import engine
from engine import LocalCluster
from engine.client.config import write_toml

DELAY_S = 0.01
WAIT_S = 60.0


def change(file: Path, **values: Any) -> None:
    write_toml(file, tomllib.loads(file.read_text(encoding="utf-8")) | values)


def far_cluster(path: Path) -> list[dict[str, Any]]:
    """What the balancer's page says of the nodes of a cluster, the third of which is far away."""
    with LocalCluster(nodes=3, threshold=2, path=path) as local:
        members = dict(local.cluster.members)
        port = int(members["node3"].endpoint.rpartition(":")[2])
        local.stop_node("node3")
        local.stop_node("balancer")
        change(path / "nodes" / "node3" / "node.toml", bind=f"tcp://{NEAR}:{port}")
        change(path / "balancer" / "balancer.toml", http={"bind": "127.0.0.1:8080"})  # nobody else is in this network
        members["node3"] = replace(members["node3"], endpoint=f"tcp://{FAR}:{port}")
        local.sign_manifest(list(members.values()))
        local.start_node("node3")
        local.start_balancer()
        with engine.connect(local.client_config) as kq:
            kq.create_key("k", "aes-256-gcm", threshold=2, shares=3)
            until_s = time.monotonic() + WAIT_S
            while True:
                kq.prewarm("k")
                with urlopen("http://127.0.0.1:8080/v1/plan", timeout=WAIT_S) as answer:
                    nodes: list[dict[str, Any]] = json.load(answer)["nodes"]
                if all(each["network_us"] for each in nodes) or time.monotonic() > until_s:
                    return nodes
                time.sleep(0.2)


def lacking() -> str:
    """What of such a network this machine or this user does not have; empty if it is all there."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    if not shutil.which("ip"):
        return "iproute2 is not installed"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, timeout=60, check=False)
    return tried.stderr.strip()


def test_the_balancer_learns_which_node_is_far(tmp_path: Path) -> None:
    if reason := lacking():
        pytest.skip(f"HOW FAR NODES ARE WAS NOT TESTED: {reason}")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "kq")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    network_us = {each["name"]: each["network_us"] for each in json.loads(done.stdout)}
    assert set(network_us) == {"node1", "node2", "node3"}
    assert network_us["node3"] >= 2 * DELAY_S * 1e6
    assert max(network_us["node1"], network_us["node2"]) < 2 * DELAY_S * 1e6 / 4


if __name__ == "__main__":
    with far_network(DELAY_S):
        json.dump(far_cluster(Path(sys.argv[1])), sys.stdout)
