"""The upgrade drill: each process of a cluster is started anew under the next release, and no client sees an error.

Once with the release before as it was, built from the history of this repository, and once with processes of this
release that are held to the protocol version before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from upgrade_user import KINDS, UpgradeUser
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster
from engine.cli.doctor import look_at_cluster
from engine.client.speech import HOLD_VARIABLE, spoken
from engine.protocol.requests import BalancerStatus, NodeStatus
from engine.protocol.wire import PROTOCOL_VERSION

ROOT = Path(__file__).parents[2]
EARLIER = "d619464"
"""The newest commit that spoke protocol version 1 alone."""
BUILD_S = 500
MAKE = """
import sys
import balancer, engine, nodes
from engine import LocalCluster
print(balancer.__file__, engine.__file__, nodes.__file__)
LocalCluster(nodes=5, threshold=3, path=sys.argv[1], balancer={"migrate": {"enabled": False}}).close()
"""
BALANCER = "balancer"
SOUND_S = 30.0


@dataclass(frozen=True)
class Release:
    """What processes are started with, the folder of their code, and the newest version that they speak."""

    protocol: int
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = ROOT

    @contextmanager
    def starting(self) -> Iterator[None]:
        """What is started inside runs under this release."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield


NEW = Release(PROTOCOL_VERSION)
HELD = Release(1, {HOLD_VARIABLE: "1"})


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The release before, built in a folder of its own."""
    packed = subprocess.run(["git", "-C", ROOT, "archive", EARLIER], capture_output=True, check=False)
    if packed.returncode:
        pytest.skip(f"the commit {EARLIER} is not to be had here: {packed.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("earlier")
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, capture_output=True, check=True, timeout=BUILD_S)
    return Release(1, {"PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}"}, folder)


class Drill:
    """A cluster whose processes run under one release or another, and what is to be true of it all the time."""

    def __init__(self, cluster: LocalCluster, kq: Engine, first: Release) -> None:
        self.cluster, self.kq = cluster, kq
        self.under = dict.fromkeys((*cluster.nodes, BALANCER), first)
        self.made: dict[str, bytes] = {}

    def move(self, name: str, release: Release) -> None:
        """Start one process anew under a release; the cluster has to be sound before the next one."""
        with release.starting():
            self.cluster.restart(name)
        self.under[name] = release
        self.check()
        if name in (self.cluster.nodes[0], BALANCER):
            self.work(f"{name}-{len(self.made)}")

    def check(self) -> None:
        """Each process tells what it speaks, to who can ask, and the doctor warns as long as they differ."""
        until = time.monotonic() + SOUND_S
        while True:
            members = self.kq.status(timeout=5.0)
            # The connections to one that was restarted are still being dialled.
            if not any(isinstance(each.error, engine.NodeUnavailable) for each in members) or time.monotonic() > until:
                break
        for member in members:
            assert isinstance(member.status, NodeStatus | BalancerStatus), member.error
            assert member.status.protocol == self.under[member.name].protocol
            assert bool(member.status.clients) == (member.status.protocol > 1), "version 1 has no field to tell it in"
        (told,) = [each for each in look_at_cluster(self.kq.cluster, members) if each.what == "protocol"]
        mixed = len({release.protocol for release in self.under.values()}) > 1
        assert told.state == ("warning" if mixed else "ok")

    def work(self, name: str) -> None:
        """What nodes and balancer do together, whatever each of them runs: make, rotate, refresh, and use once."""
        create_whole_key(self.kq, name, "aes-256-gcm", threshold=3, shares=5)
        self.made[name] = self.kq.encrypt(name, name.encode())
        self.kq.rotate_key(name)
        self.refresh(name)
        self.use(name)

    def refresh(self, name: str) -> None:
        """A refresh needs every holder; one that has just come back may not have been found yet."""
        until = time.monotonic() + SOUND_S
        while True:
            try:
                self.kq.refresh_key(name)
                return
            except engine.QuorumUnavailable:
                if time.monotonic() > until:
                    raise

    def use(self, name: str) -> None:
        """Combine both versions of a key anew."""
        self.kq.flush(name)
        assert self.kq.decrypt(name, self.made[name]) == name.encode()
        assert self.kq.decrypt(name, self.kq.encrypt(name, b"now")) == b"now"


def make_by(old: Release, path: Path) -> None:
    """Have the code of a release make the cluster, and say where it lies."""
    with old.starting():
        made = subprocess.run([sys.executable, "-P", "-c", MAKE, path], check=True, timeout=120, capture_output=True)
    assert [Path(each).is_relative_to(old.folder) for each in made.stdout.decode().split()] == [True] * 3


def run(path: Path, old: Release) -> dict[str, int]:
    """The drill from a release to this one, with a node that is rolled back in between; what the clients did."""
    assert spoken().highest == PROTOCOL_VERSION  # it is read once: this process itself shall not be held
    if old.folder != ROOT:
        make_by(old, path)
    done: dict[str, int] = {}
    with old.starting():
        cluster = LocalCluster(nodes=5, threshold=3, path=path)
    with cluster, engine.connect(cluster.client_config) as kq:
        drill = Drill(cluster, kq, old)
        drill.check()
        used = {prefix + kind: algorithm for prefix in ("old/", "new/") for kind, algorithm in KINDS.items()}
        for name, algorithm in used.items():
            create_whole_key(kq, name, algorithm, threshold=3, shares=5)
        sealed = {name: kq.encrypt(name, b"from before") for name in ("old/seal", "new/seal")}
        drill.work("first")
        config = cluster.client_config
        with (
            UpgradeUser(config, "old/", old.environment) as before,
            UpgradeUser(config, "new/", NEW.environment) as after,
        ):
            assert Path(before.file).is_relative_to(old.folder)
            assert Path(after.file).is_relative_to(NEW.folder)
            first, *others = cluster.nodes
            for release in (NEW, old, NEW):
                drill.move(first, release)
            for name in (*others[:2], BALANCER, *others[2:]):
                drill.move(name, NEW)
            # The old client still speaks with a cluster that is all new; then it is started anew as well.
            told = [before.finish(), after.finish()]
        with UpgradeUser(config, "old/", NEW.environment) as upgraded:
            told.append(upgraded.finish())
        for each in told:
            assert each["errors"] == []
            for what, count in each["done"].items():
                done[what] = done.get(what, 0) + count
        for name, ciphertext in sealed.items():
            kq.flush(name)
            assert kq.decrypt(name, ciphertext) == b"from before"
        for name in drill.made:
            drill.use(name)
        assert {each.name for each in kq.list_keys()} == {*drill.made, *used}
    return done


def test_processes_held_to_the_version_before_are_upgraded_without_an_error(tmp_path: Path) -> None:
    done = run(tmp_path / "kq", HELD)
    assert min(done[what] for what in ("decrypt", "sign", "mac", "asynchronous", "status of NodeStatus")) >= 20


@pytest.mark.long
def test_the_release_before_is_upgraded_without_an_error(tmp_path: Path, earlier: Release) -> None:
    done = run(tmp_path / "kq", earlier)
    sys.stdout.write(f"a rolling upgrade from {EARLIER}, what clients did meanwhile: {done}\n")
    assert min(done[what] for what in ("decrypt", "sign", "mac", "asynchronous", "status of NodeStatus")) >= 20
