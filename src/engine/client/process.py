"""What every server process does for itself first: no core dumps, private files, enough descriptors; and its host."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import resource
import time
from pathlib import Path

from engine.errors import ClusterError, EngineError
from engine.protocol.requests import HostHealth

__all__ = ["harden_process", "host_health", "leave_out_of_collection", "lock_folder", "raise_file_limit"]

PR_SET_DUMPABLE = 4
WANTED_FILES = 65_536
NEEDED_FILES = 256
YOUNG_OBJECTS = 20_000
"""So many more containers than were freed make Python's collector look for cycles among them; its default is 700."""


def harden_process() -> None:
    """No core dump and no ptrace by others of the same user; private files by default."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise EngineError(f"prctl(PR_SET_DUMPABLE) failed: {os.strerror(ctypes.get_errno())}")
    os.umask(0o077)


def leave_out_of_collection() -> None:
    """Have the garbage collector leave out all that there is now, and look more rarely for what a server makes later.

    To be called when all is imported and about to serve; until then the collector may be off. A search through all
    modules stops a process for some 30 ms, and a request leaves hardly any cycles.
    """
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
    gc.enable()


def raise_file_limit() -> None:
    """Ask for as many descriptors as the hard limit gives: out of them, libzmq spins and serves nobody.

    ``EngineError`` where there are too few for a server at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < NEEDED_FILES and soft < NEEDED_FILES:
        raise EngineError(f"the limit on open files (ulimit -n) is {wanted}; at least {NEEDED_FILES} are needed")


def host_health(data: Path) -> HostHealth:
    """The machine's clock now, and the file system of a folder."""
    time_ms = time.time_ns() // 1_000_000
    try:
        found = os.statvfs(data)
    except OSError:
        return HostHealth(time_ms, 0, 0, 0)
    return HostHealth(time_ms, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, found.f_favail)


def lock_folder(path: Path, *, shared: bool = False) -> int:
    """Have the folder to oneself until the returned descriptor is closed, or the process ends.

    With ``shared`` others may have it too that ask for it so. ``ClusterError`` if another process has it. The
    descriptor is not inherited.
    """
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ClusterError(f"{path} is in use by another process") from None
    return descriptor
