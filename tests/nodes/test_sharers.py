"""Nodes that share a token: who may change it, where they must lie, and what is said of one that can't be shared."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.client.config import write_toml
from engine.errors import ClusterError, ConfigError
from nodes.health import EXIT_PIN
from nodes.rotation import VALID
from nodes.sharers import Mark, alone, hold, leave_mark, list_marks, misplaced, owner_of, tell_owner

OWNER, SHARER, ELSEWHERE = "node1", "node4", "node2"
"""The first two lie in one site of the tests' cluster, the third in another."""


def mark(world: Any, node: str) -> Mark:
    return Mark(node, world.keys[node].public.hex(), f"/etc/{node}/node.toml")


@pytest.fixture
def owned(tmp_path: Path, world: Any) -> Path:
    """The data folder of a node that owns a token, as far as sharing goes."""
    tell_owner(tmp_path, mark(world, OWNER))
    return tmp_path


def test_who_shares_is_told_to_the_owner_and_kept(owned: Path, world: Any) -> None:
    assert owner_of(owned) == mark(world, OWNER)
    assert list_marks(owned) == []
    told = [mark(world, SHARER), Mark("a/../b", "00", "")]
    held = hold(owned)
    for each in (*told, *told):
        leave_mark(owned, each)
    os.close(held)
    assert sorted(list_marks(owned), key=lambda each: each.node) == sorted(told, key=lambda each: each.node)
    assert {path.parent for path in owned.rglob("*.toml")} == {owned, owned / "sharers"}


def test_a_token_that_others_share_can_not_be_changed(owned: Path, world: Any) -> None:
    with alone(owned):
        pass
    held = hold(owned)
    with pytest.raises(ClusterError, match="in use"), alone(owned):
        raise AssertionError
    for node in (SHARER, "node5"):
        leave_mark(owned, mark(world, node))
    os.close(held)
    with pytest.raises(ConfigError, match=r"is shared by 'node4', 'node5'.*remove its file in"), alone(owned):
        raise AssertionError
    for path in (owned / "sharers").glob("*.toml"):
        path.unlink()
    with alone(owned):
        pass


def test_nobody_begins_to_share_a_token_that_is_being_changed(owned: Path) -> None:
    with alone(owned), pytest.raises(ClusterError, match="in use"):
        hold(owned)
    (owned / VALID).mkdir()
    with pytest.raises(ClusterError, match="a rotation of the KEK of 'node1' was cut off"):
        hold(owned)
    (owned / VALID).rmdir()
    first, second = hold(owned), hold(owned)
    os.close(first)
    os.close(second)


def test_a_folder_without_a_token_has_none_to_share(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"has no token to share .*shared_with.*nodes init"):
            hold(folder)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff", b'node = "n"\nsigning = ""\nconfig = ""\nx = 1'])
def test_a_damaged_mark_is_named(owned: Path, text: bytes) -> None:
    path = owned / "sharers" / "x.toml"
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"sharers/x\.toml"), alone(owned):
        raise AssertionError


def test_nodes_of_one_token_lie_in_one_failure_domain(world: Any) -> None:
    own = mark(world, OWNER)
    assert misplaced(world.cluster, own, [mark(world, SHARER)]) == ""
    told = misplaced(world.cluster, own, [mark(world, SHARER), mark(world, ELSEWHERE)])
    assert "'node1' shares a token with 'node2'" in told
    assert "'site1' and 'site2'" in told
    # A node of that name with another key, or of no name in the manifest, is none of this cluster.
    strangers = [Mark(ELSEWHERE, mark(world, "node3").signing, ""), Mark("gone", "00", "")]
    assert misplaced(world.cluster, own, strangers) == ""
    assert misplaced(world.cluster, strangers[0], [own]) == ""


# --- on a real token ---


class Shared:
    """A cluster whose nodes are set up to use the token of the first."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.too_early = ""
        """What init said before the owner had a token."""
        for node in (SHARER, ELSEWHERE):
            self.change(node, label=OWNER, pin=f"file:../pin.{OWNER}", shared_with=f"../{OWNER}/data")

    def data(self, node: str) -> Path:
        return Path(self.folder.root / node / "data")

    def change(self, node: str, **token: str) -> None:
        path = self.folder.config(node)
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        told["token"] |= token
        write_toml(path, told)

    def run(self, node: str, *words: str, code: int = 0) -> str:
        done = self.folder.command(*words, "--config", str(self.folder.config(node)))
        assert done.returncode == code, (done.returncode, done.stderr)
        assert "Traceback" not in done.stderr
        return str(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, new_cluster_folder: Any) -> Iterator[Shared]:
    folder = new_cluster_folder(tmp_path_factory.mktemp("shared"))
    try:
        made = Shared(folder)
        made.too_early = made.run(SHARER, "init", code=1)
        made.run(OWNER, "init", "--unchecked")
        yield made
    finally:
        folder.close()


def test_init_of_a_sharer_tries_the_token_and_makes_none(shared: Shared) -> None:
    assert "has no token to share" in shared.too_early
    told = shared.run(SHARER, "init")
    assert "token 'node1' is that of 'node1'; its PIN is at" in told
    assert not (shared.data(SHARER) / "tokens").exists()
    assert list_marks(shared.data(OWNER)) == [], "it has sealed nothing yet"


def test_init_of_a_sharer_says_what_is_wrong(shared: Shared) -> None:
    root = shared.folder.root
    wrong = root / "pin.wrong"
    wrong.write_text("f" * 40)
    wrong.chmod(0o600)
    shared.change(SHARER, pin=f"file:{wrong}")
    told = shared.run(SHARER, "init", code=EXIT_PIN)
    assert "login to the token 'node1' failed" in told
    assert "f" * 40 not in told
    shared.change(SHARER, pin=f"file:../pin.{OWNER}", shared_with="../nowhere")
    assert "nowhere has no token to share" in shared.run(SHARER, "init", code=1)
    shared.change(SHARER, shared_with=f"../{OWNER}/data")
    tokens = shared.data(OWNER) / "tokens"
    tokens.rename(tokens.with_name("aside"))
    try:
        assert "holds no token to share" in shared.run(SHARER, "init", code=2)
        assert not tokens.exists()
    finally:
        tokens.with_name("aside").rename(tokens)


def test_a_sharer_in_another_failure_domain_does_not_start(shared: Shared) -> None:
    expected = "'node2' shares a token with 'node1', but the cluster manifest (serial 1)"
    assert expected in shared.run(ELSEWHERE, "--check-config", code=1)
    assert expected in shared.run(ELSEWHERE, "--unsupervised", code=1)
    assert list_marks(shared.data(OWNER)) == [], "the owner is not kept from its work by it"


def test_nobody_rotates_the_kek_of_a_token_that_is_shared(shared: Shared) -> None:
    told = shared.run(SHARER, "rotate-kek", code=1)
    assert "the token of 'node4' is that of the node with the data folder" in told
    identity = shared.folder.identities[SHARER]
    held = hold(shared.data(OWNER))
    leave_mark(shared.data(OWNER), Mark.of(identity, shared.folder.config(SHARER)))
    os.close(held)
    before = {path: path.read_bytes() for path in (shared.data(OWNER) / "tokens").rglob("*.object")}
    told = shared.run(OWNER, "rotate-kek", code=1)
    assert "is shared by 'node4', whose shares are sealed under the same KEK" in told
    assert {path: path.read_bytes() for path in before} == before
    assert not list(shared.data(OWNER).glob("rotation*"))


OPENER = """
import sys
from nodes.config import load_node_config
from nodes.token import Token
config = load_node_config(sys.argv[1])
token = Token(config.token, config.data, probe=False)
lane = token.lane()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    token.renew()
    lane.check_kek()
    assert lane.unseal(lane.seal(b"x", b"y"), b"y") == b"x"
"""


def test_processes_that_open_one_token_at_once_do_not_disturb_each_other(shared: Shared) -> None:
    """SoftHSM rewrites the token's file at each login, and has it empty in between."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, str(shared.folder.config(node)), "15"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (OWNER, SHARER, SHARER)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        ended = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            ended.append((process.communicate(timeout=120)[1], process.returncode))
        assert ended == [("", 0)] * 3
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(20)


def test_several_are_set_up_by_one_command_the_owner_first(cluster_folder: Any) -> None:
    shared = Shared(cluster_folder)
    configs = [str(shared.folder.config(node)) for node in (SHARER, OWNER)]
    done = cluster_folder.command("init", "--unchecked", "--config", configs[0], "--config", configs[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("token 'node1' made") < done.stdout.index("token 'node1' is that of 'node1'")
