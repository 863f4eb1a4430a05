"""A host with a systemd of its own: process 1 of a process namespace, which sees other mounts than everybody else.

Units are run as they would be on a machine, their sandboxes too; the network is that of whoever starts it. It needs
root, and ends with the ``with`` block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USER, UID = "keyquorum", 65_000
UNIT_FOLDER = "/etc/systemd/system"
_UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--ipc", "--uts", "--kill-child", "--mount-proc")
_BOOT = f"""
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir /opt/keyquorum
mount --bind "$2" /opt/keyquorum
# Made over the mounts of above, so that nothing of it is left on the machine.
for name in lib etc; do
    place=/etc
    [ $name = lib ] && place=/var/lib
    mount -t overlay -o "lowerdir=$place,upperdir=$1/over/$name,workdir=$1/over/$name.work" overlay $place
    mkdir -p $place/keyquorum
    mount --bind "$1/$name" $place/keyquorum
done
mount --bind "$1/units" {UNIT_FOLDER}
for name in passwd group; do mount --bind "$1/$name" "/etc/$name"; done
# As a machine's: systemd mounts the credentials of a service beside and has them come in.
mount --make-rshared /
export container=keyquorum SYSTEMD_LOG_TARGET=console
exec /lib/systemd/systemd --system --unit=host.target
"""


def lacking() -> str:
    """What of such a host this machine or this user can't have; empty if all is there."""
    if os.geteuid() != 0:
        return "a systemd of one's own needs root"
    if not Path("/lib/systemd/systemd").exists() or not shutil.which("unshare"):
        return "systemd or util-linux is not installed"
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, timeout=60, check=False)
    return tried.stderr.strip()


class SystemdHost:
    """``lib`` is the host's /var/lib/keyquorum, ``etc`` its /etc/keyquorum; ``give`` hands a tree to the user there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owner = UID if _for_all(ROOT) and _for_all(Path(sys.executable)) else 0
        self.lib, self.etc, self.units = folder / "lib", folder / "etc", folder / "units"
        for each in (self.lib, self.etc, self.units, *(folder / "over" / name for name in _OVER)):
            each.mkdir(parents=True)
        for name in ("passwd", "group"):
            line = f"{USER}:x:{UID}:{UID}::/nonexistent:/usr/sbin/nologin" if name == "passwd" else f"{USER}:x:{UID}:"
            text = (Path("/etc") / name).read_text(encoding="utf-8")
            (folder / name).write_text(f"{text.rstrip()}\n{line}\n", encoding="utf-8")
        (self.units / "host.target").write_text("[Unit]\nDefaultDependencies=no\n", encoding="utf-8")
        self._log = folder / "systemd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._first = 0

    def install(self, unit: Path, *lines: str) -> None:
        """Put a unit there as it is, beside what lets it run from a checkout and without the rest of a system.

        ``lines`` are further ones of its section [Service].
        """
        shutil.copy(unit, self.units)
        extra = self.units / f"{unit.name}.d"
        extra.mkdir()
        here = "" if self._owner else f"User=root\nBindReadOnlyPaths={ROOT} {sys.base_prefix}\n"
        text = f"[Unit]\nDefaultDependencies=no\n[Service]\nStandardError=append:{self._log}\n{here}"
        (extra / "test.conf").write_text(text + "\n".join(lines), encoding="utf-8")

    def give(self, tree: Path) -> None:
        """Make the service's user the owner of all in a folder."""
        for folder, _, names in os.walk(tree):
            for path in (Path(folder), *(Path(folder) / name for name in names)):
                os.chown(path, self._owner, self._owner, follow_symlinks=False)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command on the host, as root."""
        enter = ("nsenter", "--target", str(self._first), "--mount", "--pid", "--ipc", "--uts")
        return subprocess.run([*enter, *command], capture_output=True, text=True, timeout=120, check=False)

    def systemctl(self, *arguments: str) -> str:
        """What systemctl prints; ``AssertionError`` with all that is known if it fails."""
        done = self.run("systemctl", "--no-pager", *arguments)
        if done.returncode != 0:
            told = self.run("systemctl", "--no-pager", "--full", "status", arguments[-1]).stdout
            raise AssertionError(f"{arguments}: {done.stdout}{done.stderr}{told}{self.log()}")
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def log(self) -> str:
        """What systemd and its services wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-20_000:]

    @contextlib.contextmanager
    def running(self) -> Iterator[SystemdHost]:
        """The host from its boot to its end."""
        command = [*_UNSHARE, "bash", "-c", _BOOT, "host", str(self._folder), sys.prefix]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            self._wait()
            yield self
        finally:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        assert self._process is not None
        until_s = time.monotonic() + 60
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while time.monotonic() < until_s and self._process.poll() is None:
            found = children.read_text().split()
            if found:
                self._first = int(found[0])
                if self.run("systemctl", "is-active", "host.target").stdout.strip() == "active":
                    return
            time.sleep(0.1)
        raise AssertionError(f"the host does not come up: {self.log()}")


_OVER = ("lib", "lib.work", "etc", "etc.work")


def _for_all(path: Path) -> bool:
    """Whether every user gets there, also with no homes in sight."""
    real = path.resolve()
    if any(str(each.resolve()).startswith(("/root", "/home")) for each in (path.absolute(), real)):
        return False
    return all(each.stat().st_mode & 0o005 == 0o005 for each in (real, *real.parents) if each.is_dir())
