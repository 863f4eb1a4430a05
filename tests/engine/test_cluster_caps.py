"""Making keys takes no more than its part of a node: what one node refuses, others make."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice

import pytest

import engine
from engine import LocalCluster
from engine.client.config import write_toml
from engine.errors import Overloaded
from engine.keys import RequestType

LOW = "node1"
KEYS = 6
RSA = "rsa-3072-pss-sha256"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, one of which has a hundredth of its time for making keys: 40 ms after a pause."""
    path = tmp_path_factory.mktemp("caps") / "kq"
    with LocalCluster(nodes=3, threshold=2, path=path) as running:
        running.stop_node(LOW)
        file = path / "nodes" / LOW / "node.toml"
        told = tomllib.loads(file.read_text(encoding="utf-8"))
        write_toml(file, told | {"limits": {"generate_part": 0.01}})
        running.start_node(LOW)
        yield running


def refused(local: LocalCluster) -> int:
    """How many creations the node has refused for its limit, by its audit log."""
    lines = (local.data_folder(LOW) / "audit" / "audit-000001.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [each for each in map(json.loads, lines) if each["event"] == "reply"]
    return sum((each["verb"], each["outcome"]) == (RequestType.GENERATE, Overloaded.code) for each in replies)


def test_other_nodes_make_what_one_may_not(local: LocalCluster) -> None:
    """Each time a client asks that knows nothing yet, so the first holder of the key's group is asked first."""
    cluster = local.cluster
    candidates = (f"caps/{number}" for number in count())
    first = (name for name in candidates if cluster.group_holders(cluster.group_of(name))[0] == LOW)
    names = list(islice(first, KEYS))
    dealers: Counter[str] = Counter()
    for name in names:
        with engine.connect(local.client_config) as kq:
            dealers[kq.create_key(name, RSA, threshold=2, shares=3).dealer] += 1
            kq.verify(name, b"m", kq.sign(name, b"m"))
    assert sum(dealers.values()) == KEYS
    assert 1 <= dealers[LOW] < KEYS - 1
    assert refused(local) >= KEYS - dealers[LOW]
