"""Power cuts: what a disk had at the instant of an acknowledgement holds every acknowledged key.

The data lie on an ext4 file system in a file. A copy of that file is what the disk had: what was written and not synced
is in the kernel's memory alone. Copies are mounted and started as they are. Mounting needs root.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine
from engine import LocalCluster
from engine.failpoints import POINTS, VARIABLE
from nodes.store import Row, ShareStore
from nodes.token import Lane

SIZE_MB = 96
NODE = "node1"
TOKEN = """
import sys
from pathlib import Path
from nodes import token
from nodes.config import MODULE_PATHS, PinSource, TokenConfig
module = next(Path(each) for each in MODULE_PATHS if Path(each).is_file())
if sys.argv[2] == "careless":
    token.sync_tokens = token.keep_token_files = lambda data: None  # syncing one file may write others too
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
config = TokenConfig(module, "t", PinSource("file", str(folder / "pin")))
if sys.argv[2] == "open":
    token.Token(config, folder / "data").lane().check_kek()
else:
    token.initialize_token(config, folder / "data")
"""


def _run(*command: str | Path) -> None:
    subprocess.run([str(each) for each in command], check=True, capture_output=True, text=True, timeout=60)


@dataclass(slots=True)
class Disk:
    """A file system in ``image``, mounted at ``path``; another image may be mounted there in its place."""

    image: Path
    path: Path
    mounted: bool = False

    def make(self) -> None:
        with self.image.open("wb") as stream:
            stream.truncate(SIZE_MB << 20)
        _run("mkfs.ext4", "-q", "-F", self.image)
        self.path.mkdir()
        self.mount(self.image)

    def mount(self, image: Path) -> None:
        # The journal is written at a sync or after 300 s, not by chance while the test runs.
        _run("mount", "-o", "loop,commit=300", image, self.path)
        self.mounted = True

    def unmount(self) -> None:
        if self.mounted:
            _run("umount", self.path)
            self.mounted = False

    def copy(self, name: str) -> Path:
        """What the disk had at this instant."""
        kept = self.image.with_name(name)
        _run("cp", "--sparse=always", self.image, kept)
        return kept


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk.img", tmp_path / "disk")
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("POWER CUTS WERE NOT TESTED: mounting a file system needs root and mkfs.ext4")
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"POWER CUTS WERE NOT TESTED: no loop file system can be mounted here ({error.stderr.strip()})")
        yield made
    finally:
        made.unmount()


def _row(number: int) -> Row:
    return Row(bytes([number]) * 16, 1, 1, 1, f"k{number}", "prepared", b"h", b"m", b"", b"", os.urandom(100), 1)


def test_a_store_that_syncs_keeps_and_one_that_does_not_loses(disk: Disk, lane: Lane) -> None:
    """The node's store has every acknowledged row in the copy; the same store without syncs does not."""
    stores = {name: ShareStore(disk.path / f"{name}.db", NODE, lane) for name in ("careful", "careless")}
    os.sync()  # both files are there; what is tested is the rows
    stores["careless"]._db.execute("PRAGMA synchronous=OFF")
    images = []
    for number in range(1, 6):
        stores["careless"].put(_row(number))
        stores["careful"].put(_row(number))
        images.append(disk.copy(f"after-{number}.img"))
    for store in stores.values():
        store.close()
    disk.unmount()
    for number, image in enumerate(images, 1):
        disk.mount(image)
        kept = {}
        for name in stores:
            with contextlib.closing(ShareStore(disk.path / f"{name}.db", NODE, lane)) as store:
                kept[name] = [row.name for row in store.rows()]
        disk.unmount()
        assert kept["careful"] == [f"k{each}" for each in range(1, number + 1)]
        assert not kept["careless"], "the method did not notice a store that does not sync"


def test_a_new_token_is_on_the_disk(disk: Disk) -> None:
    """init returns when the token folder survives a power cut; without its syncs it would not."""
    for kind in ("careful", "careless"):
        _run(sys.executable, "-P", "-c", TOKEN, disk.path / kind, kind)
        image = disk.copy(f"{kind}.img")
        disk.unmount()
        disk.mount(image)
        opened = subprocess.run(
            [sys.executable, "-P", "-c", TOKEN, disk.path / kind, "open"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        disk.unmount()
        assert (opened.returncode == 0) == (kind == "careful"), opened.stderr
        disk.mount(disk.image)


@contextlib.contextmanager
def _held(cluster: LocalCluster) -> Iterator[None]:
    """No process of the cluster goes on while this lasts."""
    pids = [pid for pid in cluster.running().values() if pid is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _cut_after_each(disk: Disk, keys: int, cut_at: Callable[[int], bool]) -> int:
    """Make and destroy keys; copy the disk at acknowledgements; start from each copy. How many copies were started."""
    images: list[tuple[Path, dict[str, bytes], list[str]]] = []
    made: dict[str, bytes] = {}
    gone: list[str] = []
    with (
        LocalCluster(nodes=3, threshold=2, path=disk.path / "kq") as cluster,
        engine.connect(cluster.client_config) as kq,
    ):

        def cut() -> None:
            with _held(cluster):
                images.append((disk.copy(f"cut-{len(images)}.img"), dict(made), list(gone)))

        for number in range(keys):
            name = f"cut/{number}"
            material = os.urandom(32)
            kq.import_key(name, "hmac-sha256", key_material=material, threshold=2, shares=3)
            made[name] = material
            if cut_at(number):
                cut()
        kq.destroy_key("cut/0")
        del made["cut/0"]
        gone.append("cut/0")
        cut()
    disk.unmount()
    for image, kept, destroyed in images:
        disk.mount(image)
        with (
            LocalCluster(nodes=3, threshold=2, path=disk.path / "kq") as again,
            engine.connect(again.client_config) as kq,
        ):
            assert sorted(each.name for each in kq.list_keys()) == sorted(kept)
            for name, material in kept.items():
                assert kq.mac(name, b"m", timeout=30) == hmac.digest(material, b"m", "sha256")
            for name in destroyed:
                with pytest.raises(engine.KeyNotFound):
                    kq.mac(name, b"m")
                kq.create_key(name, "hmac-sha256", threshold=2, shares=3)  # the name is free, the old key is gone
        disk.unmount()
    return len(images)


def test_an_acknowledged_key_survives_a_power_cut_of_everything(disk: Disk) -> None:
    """All nodes and the registry on one disk, cut at the instant of the last creation and of a destruction."""
    assert _cut_after_each(disk, 4, lambda number: number == 3) == 2


@pytest.mark.long
def test_power_cuts_at_every_acknowledgement(disk: Disk) -> None:
    """As above, at each of 20 acknowledgements."""
    assert _cut_after_each(disk, 20, lambda number: True) == 21


@pytest.mark.long
def test_a_power_cut_at_every_step_of_a_rotation(disk: Disk) -> None:
    """The disk as it was when the rotation died at each step: the node starts from it, with all its keys."""
    with (
        LocalCluster(nodes=1, threshold=1, path=disk.path / "kq") as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        kq.create_key("k", "aes-256-gcm", threshold=1, shares=1)
        ciphertext = kq.encrypt("k", b"x")
    os.sync()
    disk.unmount()
    start = disk.copy("start.img")
    for point in [each for each in POINTS if each.startswith("rotate.")]:
        shutil.copy(start, disk.image)
        disk.mount(disk.image)
        config = disk.path / "kq" / "nodes" / NODE / "node.toml"
        died = subprocess.run(
            [sys.executable, "-P", "-m", "nodes", "rotate-kek", "--config", str(config)],
            env={**os.environ, VARIABLE: f"{point}=kill@{2 if point == 'rotate.erased' else 1}"},
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert died.returncode == -9
        image = disk.copy("rotated.img")
        disk.unmount()
        disk.mount(image)
        with (
            LocalCluster(nodes=1, threshold=1, path=disk.path / "kq") as again,
            engine.connect(again.client_config) as kq,
        ):
            assert kq.decrypt("k", ciphertext, timeout=30) == b"x", point
        disk.unmount()
