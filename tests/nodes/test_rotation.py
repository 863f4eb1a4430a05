"""Rotation of the KEK on a real node: before, after, and cut off by SIGKILL at every step."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from sampled import some

import engine
from engine import Engine, LocalCluster
from engine.failpoints import POINTS, VARIABLE
from nodes.config import PinSource, TokenConfig
from nodes.health import EXIT_PIN
from nodes.rotation import rotate

NODE = "node1"
KEYS = ("aes-256-gcm", "hmac-sha256", "ed25519")
OTHER_PIN = "0123456789abcdef0123456789abcdef"


@dataclass(slots=True)
class Place:
    """A cluster of one node that keeps whole keys, and what was made with them."""

    cluster: LocalCluster
    kq: Engine
    ciphertext: bytes = b""
    tag: bytes = b""
    signature: bytes = b""

    @property
    def folder(self) -> Path:
        return self.cluster.path / "nodes" / NODE

    @property
    def data(self) -> Path:
        return self.cluster.data_folder(NODE)

    @property
    def pin(self) -> Path:
        return self.cluster.path / "secrets" / f"{NODE}.pin"

    def run(
        self, command: str, *options: str, config: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        told = [sys.executable, "-P", "-m", "nodes", command, "--config", str(config or self.folder / "node.toml")]
        return subprocess.run(
            [*told, *options],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def check(self) -> None:
        """The node starts and serves every key; nothing of a rotation is left."""
        self.cluster.start_node(NODE)
        try:
            assert self.kq.decrypt(KEYS[0], self.ciphertext, timeout=30) == b"from before"
            self.kq.verify_mac(KEYS[1], b"m", self.tag, timeout=30)
            self.kq.verify(KEYS[2], b"m", self.kq.sign(KEYS[2], b"m", timeout=30))
            self.kq.verify(KEYS[2], b"m", self.signature)
        finally:
            self.cluster.stop_node(NODE)
        assert not list(self.data.glob("rotation*"))
        assert [each.name for each in self.pin.parent.iterdir() if NODE in each.name] == [f"{NODE}.pin"]
        assert len(list((self.data / "tokens").iterdir())) == 1

    def copy(self, to: Path) -> Path:
        """A copy of the node's disk: its folder without the PIN; its configuration, which names ``to``'s PIN file."""
        shutil.copytree(self.folder, to / "nodes" / NODE)
        shutil.copy(self.cluster.path / "cluster.manifest", to)
        (to / "secrets").mkdir()
        return to / "nodes" / NODE / "node.toml"

    def sealed(self) -> Mapping[str, bytes]:
        """Everything that the store seals."""
        with contextlib.closing(sqlite3.connect(self.data / "shares.db")) as store:
            found = dict(store.execute("SELECT name, sealed FROM keys").fetchall())
            return found | dict(store.execute("SELECT name, value FROM meta WHERE name GLOB 'sealed/*'").fetchall())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("rotation")
    with LocalCluster(nodes=1, threshold=1, path=path) as cluster, engine.connect(cluster.client_config) as kq:
        for name in KEYS:
            kq.create_key(name, name, threshold=1, shares=1)
        made = Place(cluster, kq, kq.encrypt(KEYS[0], b"from before"), kq.mac(KEYS[1], b"m"), kq.sign(KEYS[2], b"m"))
        cluster.stop_node(NODE)
        yield made


def test_everything_is_sealed_anew_and_old_disks_are_useless(place: Place, tmp_path: Path) -> None:
    """Keys work on; KEK, PIN and row key are others; an old disk does not open with the new PIN, nor the reverse."""
    old_pin, old_sealed = place.pin.read_bytes(), place.sealed()
    old_disk = place.copy(tmp_path / "old")
    done = place.run("rotate-kek")
    assert done.returncode == 0, done.stderr
    told = re.search(r"sealed anew: (\d+) of \1\n", done.stderr)
    assert told is not None
    assert int(told[1]) > len(KEYS), "what is remembered of grants and of time too"
    place.check()
    new_pin, new_sealed = place.pin.read_bytes(), place.sealed()
    assert new_pin != old_pin
    assert len(new_pin.strip()) == 40
    assert place.pin.stat().st_mode & 0o777 == 0o600
    assert old_sealed.keys() == new_sealed.keys()
    assert not set(old_sealed.values()) & set(new_sealed.values())
    tokens = {each.name for each in (place.data / "tokens").iterdir()}
    assert {each.name for each in (place.data / "tokens.kept").iterdir()} == tokens
    new_disk = place.copy(tmp_path / "new")
    for disk, right, wrong in ((old_disk, old_pin, new_pin), (new_disk, new_pin, old_pin)):
        pin = disk.parents[2] / "secrets" / f"{NODE}.pin"
        for each, code in ((wrong, EXIT_PIN), (right, 0)):  # the right one shows that the copy itself is whole
            pin.write_bytes(each)
            pin.chmod(0o600)
            opened = place.run("check-token", config=disk)
            assert opened.returncode == code, opened.stderr
            assert code == 0 or "login to the token" in opened.stderr
    # The old token with its own PIN, put back under the new store, opens nothing of it.
    shutil.rmtree(new_disk.parent / "data" / "tokens")
    shutil.copytree(old_disk.parent / "data" / "tokens", new_disk.parent / "data" / "tokens")
    pin = new_disk.parents[2] / "secrets" / f"{NODE}.pin"
    pin.write_bytes(old_pin)
    mixed = subprocess.run(
        [sys.executable, "-P", "-m", "nodes", "--config", str(new_disk)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert mixed.returncode == 2
    assert "does not belong to the token" in mixed.stderr


def test_a_token_whose_file_a_killed_login_left_empty_opens_again(place: Place) -> None:
    """SoftHSM truncates it and then writes it. Without the copy the node would have lost its KEK, and every share."""
    (file,) = (place.data / "tokens").glob("*/token.object")
    whole = file.read_bytes()
    (kept,) = place.data.glob("tokens.kept/*/token.object")
    assert kept.stat().st_mode & 0o777 == 0o600
    os.truncate(file, 0)
    copied = kept.read_bytes()
    kept.unlink()
    assert "0 tokens are called 'node1'" in place.run("check-token").stderr
    kept.write_bytes(copied)
    place.check()
    assert "was put back" in place.cluster.log_file(NODE).read_text(encoding="utf-8")
    assert len(file.read_bytes()) == len(copied) == len(whole)


def test_a_rotation_that_is_killed_at_any_step_leaves_a_node_that_works(place: Place) -> None:
    """After SIGKILL at each step the node starts by itself, with the old or the new KEK and PIN, and all its keys."""
    points = [point for point in POINTS if point.startswith("rotate.")]
    changed = points.index("rotate.changed")
    for number, point in some(enumerate(points)):
        before = place.pin.read_bytes()
        # The first passing of "erased" is when the rotation begins, and clears what an earlier one left.
        died = place.run("rotate-kek", **{VARIABLE: f"{point}=kill@{2 if point == 'rotate.erased' else 1}"})
        assert died.returncode == -9, (point, died.stderr)
        place.check()
        assert (place.pin.read_bytes() != before) == (number >= changed), point


def test_settling_is_killed_too(place: Place) -> None:
    """A node that dies again and again while it carries a rotation through, goes on where it was."""
    assert place.run("rotate-kek", **{VARIABLE: "rotate.changed=kill"}).returncode == -9
    for point in ("rotate.pin-changed", "rotate.token-changed", "rotate.store-changed"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, f"{point}=kill")
            with pytest.raises(engine.ClusterError, match="could not start"):
                place.cluster.start_node(NODE)
    place.check()


def test_a_pin_of_the_operators_own(place: Place) -> None:
    """The fresh PIN may come from the environment; a short one is refused and changes nothing."""
    before = place.pin.read_bytes()
    short = place.run("rotate-kek", "--new-pin-env", "FRESH", FRESH="short")
    assert short.returncode == 1
    assert "32 characters" in short.stderr
    assert place.pin.read_bytes() == before
    done = place.run("rotate-kek", "--new-pin-env", "FRESH", FRESH=OTHER_PIN)
    assert done.returncode == 0, done.stderr
    assert place.pin.read_text().strip() == OTHER_PIN
    same = place.run("rotate-kek", "--new-pin-env", "FRESH", FRESH=OTHER_PIN)
    assert same.returncode == 1
    assert "a rotation needs a fresh one" in same.stderr
    assert OTHER_PIN not in same.stderr
    place.check()


def test_a_pin_from_the_environment(place: Place, tmp_path: Path) -> None:
    """Where the PIN is in no file the fresh one must come from another variable, and counts from then on."""
    disk = place.copy(tmp_path / "env")
    text = disk.read_text().replace(f"file:../../secrets/{NODE}.pin", "env:OLD")
    disk.write_text(text)
    old = place.pin.read_text().strip()
    refused = place.run("rotate-kek", config=disk, OLD=old)
    assert refused.returncode == 1
    assert "env:OLD" in refused.stderr
    fresh = "f" * 40
    done = place.run("rotate-kek", "--new-pin-env", "NEW", config=disk, OLD=old, NEW=fresh)
    assert done.returncode == 0, done.stderr
    assert place.run("check-token", config=disk, OLD=old).returncode == EXIT_PIN
    assert place.run("check-token", config=disk, OLD=fresh).returncode == 0


def test_a_node_that_runs_is_left_alone(place: Place) -> None:
    """The data folder's lock keeps a rotation and a running node apart."""
    place.cluster.start_node(NODE)
    try:
        refused = place.run("rotate-kek")
        assert refused.returncode == 2
        assert "in use by another process" in refused.stderr
    finally:
        place.cluster.stop_node(NODE)
    place.check()


def test_a_table_that_nobody_declared_is_refused(place: Place, tmp_path: Path) -> None:
    """What may be sealed in an unknown way is not copied: the rotation says so, and changes nothing."""
    disk = place.copy(tmp_path / "strange")
    shutil.copy(place.pin, disk.parents[2] / "secrets")
    with contextlib.closing(sqlite3.connect(disk.parent / "data" / "shares.db")) as store:
        store.execute("CREATE TABLE strange (sealed BLOB, tag BLOB)")
    refused = place.run("rotate-kek", config=disk)
    assert refused.returncode == 2
    assert "strange" in refused.stderr
    assert place.run("check-token", config=disk).returncode == 0


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    """A module that is not SoftHSM keeps its token where no folder can be made afresh."""
    other = TokenConfig(Path("/usr/lib/other-pkcs11.so"), "label", PinSource("file", str(tmp_path / "pin")))
    with pytest.raises(engine.ConfigError, match=r"other-pkcs11\.so is not SoftHSM"):
        rotate(other, tmp_path, NODE, None, lambda: None, lambda done, total: None)
