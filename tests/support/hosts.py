"""Hosts on one machine: a network namespace with an address and a folder for each, on one network that the test made.

Each namespace is held by a sleeping process that dies with this one, and ends with it, its interfaces too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = 16
BRIDGE = "net0"


def lacking() -> str:
    """What of it this machine or this user does not have; empty if it is all there."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    for program in ("ip", "nsenter", "setpriv", "unshare"):
        if not shutil.which(program):
            return f"{program} is not installed"
    with _namespace() as sleeper:
        for words in (
            ("link", "add", BRIDGE, "type", "bridge"),
            ("link", "add", "veth0", "type", "veth", "peer", "name", "veth1"),
        ):
            tried = subprocess.run(inside(sleeper.pid, "ip", *words), capture_output=True, text=True, check=False)
            if tried.returncode:
                return f"ip {' '.join(words)}: {tried.stderr.strip()}"
    return ""


def inside(pid: int, *words: str) -> list[str]:
    """A command in the network of a process."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net", *words]


@contextmanager
def _namespace() -> Iterator[subprocess.Popen[bytes]]:
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo there; exec sleep infinity"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as sleeper:
        assert sleeper.stdout is not None
        try:
            assert sleeper.stdout.readline() == b"there\n", "there are no network namespaces"
            yield sleeper
        finally:
            sleeper.kill()


class Host:
    """One of them: ``name`` is its folder's, too."""

    def __init__(self, name: str, pid: int, folder: Path) -> None:
        self.name = name
        self._pid = pid
        self.folder = folder

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that does this on the host."""
        return inside(self._pid, *words)

    def run(self, words: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> str:
        """Have a command done on the host, in its folder; what it prints. It must end well."""
        done = subprocess.run(
            self.command(words),
            cwd=self.folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, (self.name, words, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout


class Network:
    """A switch, and the hosts on it."""

    def __init__(self, switch: int) -> None:
        self._switch = switch
        self.hosts: dict[str, Host] = {}

    def plug(self, host: Host, address: str, place: int) -> None:
        """Give a host its address and a cable to the switch."""
        end = f"host{place}"
        for words in (
            ("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(host._pid)),
            ("link", "set", end, "master", BRIDGE, "up"),
        ):
            subprocess.run(inside(self._switch, "ip", *words), check=True)
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{address}/{PREFIX}", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            subprocess.run(host.command(["ip", *words]), check=True)
        self.hosts[host.name] = host

    def cut(self, name: str, *, healed: bool = False) -> None:
        """Pull a host's cable out, or put it back."""
        words = ["ip", "link", "set", "eth0", "up" if healed else "down"]
        subprocess.run(self.hosts[name].command(words), check=True)


@contextmanager
def network(addresses: Mapping[str, str], folder: Path) -> Iterator[Network]:
    """A network with these hosts, by their addresses; each has an empty folder in ``folder``."""
    with _namespace() as switch:
        subprocess.run(inside(switch.pid, "ip", "link", "add", BRIDGE, "type", "bridge"), check=True)
        subprocess.run(inside(switch.pid, "ip", "link", "set", BRIDGE, "up"), check=True)
        made = Network(switch.pid)
        with _all(len(addresses)) as sleepers:
            for place, ((name, address), sleeper) in enumerate(zip(addresses.items(), sleepers, strict=True)):
                own = folder / name
                own.mkdir(parents=True)
                made.plug(Host(name, sleeper.pid, own), address, place)
            yield made


@contextmanager
def _all(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    if not count:
        yield []
        return
    with _namespace() as first, _all(count - 1) as others:
        yield [first, *others]
