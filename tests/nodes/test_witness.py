"""What a node makes of the others' audit heads: which it takes, which contradict, whom it tells of its own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from engine.errors import AccessDenied, EngineError, ManifestError, Overloaded
from engine.protocol.audit import AuditHead, Record, sign_head
from nodes.witness import BURST, BURST_S, Witness

LOG = bytes(32)


class Scene:
    def __init__(self, world: Any) -> None:
        self.world = world
        self.witness = Witness("node1", world.cluster)
        self.now_s = 0.0

    def head(self, seq: int, *, node: str = "node2", log: bytes = LOG, digest: bytes = b"", signer: str = "") -> bytes:
        head = AuditHead(node, log, seq, digest or seq.to_bytes(32, "big"), 1)
        return sign_head(head, self.world.keys[signer or node])

    def hear(self, raw: bytes, sender: str = "node2") -> Any:
        self.now_s += BURST_S
        heard = self.witness.hear(raw, self.world.cluster.members[sender], self.now_s)
        if heard is not None:
            self.witness.wrote(heard)
        return heard


@pytest.fixture
def scene(world: Any) -> Scene:
    return Scene(world)


def test_a_growing_log_is_written_down_once_for_each_head(scene: Scene) -> None:
    assert [scene.hear(scene.head(seq)).event for seq in (5, 9, 200)] == ["peer-head"] * 3
    assert scene.hear(scene.head(200)) is None
    assert scene.witness.alarms == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seq": 8}, "fell back from record 9 to 8"),
        ({"seq": 9, "digest": b"x" * 32}, "has two records 9"),
        ({"seq": 10, "log": b"n" * 32}, "began a new audit log at record 10"),
    ],
)
def test_a_contradiction_is_told_and_the_new_branch_is_followed(
    scene: Scene, changes: dict[str, Any], told: str
) -> None:
    scene.hear(scene.head(9))
    heard = scene.hear(scene.head(**changes))
    assert heard.event == "peer-fork"
    assert told in heard.detail
    assert told in scene.witness.alarms["node2"]
    later = scene.head(20, log=changes.get("log", LOG))
    assert scene.hear(later).event == "peer-head"
    assert told in scene.witness.alarms["node2"]


def test_a_head_that_was_not_written_down_is_not_known(scene: Scene, world: Any) -> None:
    """It is recorded when it is told again; and what it contradicts is seen all the same."""
    member = world.cluster.members["node2"]
    for _ in range(2):
        assert scene.witness.hear(scene.head(9), member, 0.0).event == "peer-head"
    assert scene.witness.hear(scene.head(4), member, 0.0).event == "peer-fork"


def test_what_was_known_before_a_restart_counts(scene: Scene, world: Any) -> None:
    heard = scene.hear(scene.head(9))
    record = Record(1, "node1", "boot", 0, heard.event, "node2", head=heard.text)
    damaged = Record(1, "node1", "boot", 0, "peer-head", "node3", head="!")
    scene.witness = Witness("node1", world.cluster, [record, damaged])
    assert scene.hear(scene.head(4)).event == "peer-fork"


def test_a_head_is_taken_from_its_own_node_alone(scene: Scene) -> None:
    bad = [
        (scene.head(5, signer="node3"), "node2"),  # signed by another
        (scene.head(5), "node3"),  # brought by another
        (scene.head(5, node="node3"), "node2"),
        (scene.head(0), "node2"),
        (scene.head(5)[:-1], "node2"),
        (os.urandom(100), "node2"),
    ]
    for raw, sender in bad:
        with pytest.raises((ManifestError, AccessDenied, EngineError)):
            scene.hear(raw, sender)
    assert scene.hear(scene.head(5)).event == "peer-head"


def test_a_node_can_tell_only_so_many(scene: Scene, world: Any) -> None:
    member = world.cluster.members["node2"]
    for seq in range(1, BURST + 1):
        scene.witness.hear(scene.head(seq), member, 100.0)
    with pytest.raises(Overloaded):
        scene.witness.hear(scene.head(50), member, 100.0)
    assert scene.witness.hear(scene.head(50), member, 100.0 + BURST_S) is not None


def test_all_others_are_told_until_they_confirm(scene: Scene) -> None:
    others = {"node2", "node3", "node4", "node5"}
    assert set(scene.witness.to_tell(1)) == others
    scene.witness.told(["node2", "node5"], 7)
    assert set(scene.witness.to_tell(7)) == others - {"node2", "node5"}
    assert set(scene.witness.to_tell(8)) == others
