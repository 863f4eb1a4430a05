"""A real cluster to be broken on purpose: its processes, proxies, shims and disks, and how it is made whole again.

What is changed on the machine (mounts, stopped processes, limits) is undone by ``Undo``, the newest first, also after
Ctrl-C. Only processes of this cluster are signalled, by their ids.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import zmq
from proxy import Network

import engine
from engine.client.config import load_cluster, load_identity, write_toml
from engine.client.local import _free_port
from engine.client.transport import Channel, ask
from engine.protocol.grant import issue_grant
from engine.protocol.manifest import open_key_manifest
from engine.protocol.requests import BalancerStatus, Describe, ShareRelease
from engine.sharing import Share, check_value, reconstruct_key
from shim_cluster import ShimCluster

BALANCER = "balancer"
NODES = 5
THRESHOLD = 3
START_S = 180.0
"""A busy machine is no fault."""
WHOLE_S = 30.0
"""How long a healed cluster may take until every member answers and is well."""
MOUNT_S = 30
CLONE_NEWNET = 0x40000000


def port_in(endpoint: str) -> int:
    """The port of a ``tcp://`` endpoint."""
    return int(endpoint.rpartition(":")[2])


def ports_behind(endpoints: Sequence[str]) -> dict[int, int]:
    """A free port for each endpoint's: where its member is to listen while a proxy has the endpoint's own.

    The endpoints' ports are bound meanwhile: nobody listens there yet, so that they would pass for free ones.
    """
    fronts = [port_in(endpoint) for endpoint in endpoints]
    with contextlib.ExitStack() as held:
        for port in fronts:
            held.enter_context(socket.socket()).bind(("127.0.0.1", port))
        return {port: _free_port(held) for port in fronts}


class Sick(Exception):
    """The cluster could not be made whole."""


class FaultCluster(ShimCluster):
    """Five nodes, 3-of-5, each with a shim before its token; with ``network`` all traffic goes through proxies."""

    def __init__(
        self, path: Path, network: Network | None = None, nodes: int = NODES, threshold: int = THRESHOLD
    ) -> None:
        self.network = network
        self.environments: dict[str, dict[str, str]] = {}
        super().__init__(
            nodes=nodes,
            threshold=threshold,
            path=path,
            clients=("local", "other"),
            rules=RULES,
            start_timeout_s=START_S,
        )

    def _make_parts(self, plan: Any) -> None:
        super()._make_parts(plan)
        if self.network is None:
            return
        self.network.forget()
        self.network.processes = self.families
        pin = tomllib.loads((self.path / "balancer" / "balancer.toml").read_text())["manifest_pin"]
        cluster = load_cluster(self.path / "cluster.manifest", pin)
        servers = [member for member in cluster.members.values() if member.role in ("node", "balancer")]
        behind = ports_behind([end for each in servers for end in (each.endpoint, each.publish_endpoint) if end])
        for member in servers:
            ends = {"bind": member.endpoint, "publish_bind": member.publish_endpoint}
            folder = self.path / ("balancer" if member.role == "balancer" else f"nodes/{member.name}")
            change_toml(
                folder / ("balancer.toml" if member.role == "balancer" else "node.toml"),
                **{name: f"tcp://127.0.0.1:{behind[port_in(end)]}" for name, end in ends.items() if end},
            )
            for port in (port_in(end) for end in ends.values() if end):
                self.network.listen(member.name, port, behind[port])

    def config_file(self, node: str) -> Path:
        return self.path / "nodes" / node / "node.toml"

    def port_of(self, name: str) -> int:
        """The port that a member really listens at."""
        file = self.path / "balancer/balancer.toml" if name == BALANCER else self.config_file(name)
        return port_in(tomllib.loads(file.read_text()).get("bind") or self.cluster.members[name].endpoint)

    def close(self) -> None:
        super().close()
        if self.network is not None:
            self.network.forget()

    # --- its processes ---

    def families(self) -> dict[str, list[int]]:
        """The processes of each member that runs: the one that was started, and those below it."""
        return {name: family(pid) for name, pid in self.running().items() if pid is not None}

    def signal_all(self, name: str, number: int) -> None:
        """Signal every process of a member, the lowest last."""
        for pid in self.families().get(name, []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def everywhere(self, values: Mapping[str, str]) -> contextlib.ExitStack:
        """Have all processes that are started from now on get these variables, until the stack is closed."""
        held = contextlib.ExitStack()
        held.enter_context(environment(values))
        return held

    def kill(self, node: str) -> None:
        """End a member by SIGKILL, whatever it has below it included."""
        below = self.families().get(node, [])[1:]
        super().kill(node)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 5
        while any(Path(f"/proc/{pid}/fd").exists() and living(pid) for pid in below) and time.monotonic() < until:
            time.sleep(0.01)

    def worker_of(self, node: str) -> int:
        """The process of a node that serves: the lowest one."""
        return self.families()[node][-1]

    def start_node(self, node: str) -> None:
        """Start a member, with the environment that was set for it."""
        with environment(self.environments.get(node, {})):
            super().start_node(node)

    def start_missing(self) -> None:
        """Start every member that does not run, all at once but for those with an environment of their own."""
        idle = [name for name, pid in self.running().items() if pid is None]
        plain = [name for name in idle if not self.environments.get(name)]
        if plain:
            with self._alone():
                self._launch([self._processes[name] for name in plain])
        for name in idle:
            if name not in plain:
                self.start_node(name)

    def log_since(self, name: str, mark: int) -> str:
        """What a member logged after so many bytes."""
        try:
            with self.log_file(name).open("rb") as stream:
                stream.seek(mark)
                return stream.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    def log_size(self, name: str) -> int:
        return self.log_file(name).stat().st_size if self.log_file(name).exists() else 0

    # --- how it is ---

    def ailments(self, kq: engine.Engine) -> list[str]:
        """What is wrong with it now: members that don't run, don't answer or are not well."""
        found = [f"{name} does not run" for name, pid in self.running().items() if pid is None]
        for member in kq.status(timeout=1.0):
            if member.error is not None:
                found.append(f"{member.name}: {member.error}")
                continue
            if isinstance(member.status, BalancerStatus):
                told = {"control loop": member.status.last_error}
            else:
                status = member.status
                told = {"audit": status.audit, "store": status.store, "clock": status.clock}
                told |= {"token": status.health.problem, "check of the token": status.health.check}
            found += [f"{member.name}: {what}: {text}" for what, text in told.items() if text]
        return found

    def await_whole(self, kq: engine.Engine, seconds: float = WHOLE_S) -> float:
        """Wait until every member is well and keys can be made; how many seconds that took."""
        begun = time.monotonic()
        while True:
            found = self.ailments(kq)
            if not found:
                name = f"whole/{os.urandom(6).hex()}"
                try:
                    kq.create_key(name, "aes-128-gcm", threshold=THRESHOLD, shares=NODES, timeout=5.0)
                    kq.destroy_key(name, timeout=5.0)
                    return time.monotonic() - begun
                except engine.EngineError as error:
                    found = [str(error)]
            if time.monotonic() - begun > seconds:
                raise Sick(f"not whole after {seconds:g} s: {'; '.join(found)[:600]}")
            time.sleep(0.05)

    # --- shares ---

    def shares_of(self, kq_identity: Any, name: str) -> tuple[Any, dict[str, Share], dict[str, str]]:
        """The key's manifest, the share of each holder that gives it, and why the others don't.

        Asked for as two of the nodes would, under grants of the client: only a holder's own word is not enough.
        """
        nodes = {member.name: member for member in self.cluster.nodes.values()}
        context: zmq.Context[Any] = zmq.Context()
        found: dict[str, Share] = {}
        failed: dict[str, str] = {}
        try:
            with Channel(kq_identity.transport, nodes, context) as channel:
                descriptions = []
                for node in nodes:
                    with contextlib.suppress(engine.EngineError):
                        told = ask(channel, node, "describe", Describe(name, 0), 3.0)
                        descriptions.append((open_key_manifest(told.manifest, self.cluster), told))
                if not descriptions:
                    raise Sick(f"no node describes {name}")
            # A node whose store went back tells of an earlier epoch.
            record, told = max(descriptions, key=lambda each: (each[0].manifest.version, each[0].manifest.epoch))
            holders = [holder.node for holder in record.manifest.holders]
            for me, asked in ((holders[0], holders[1:]), (holders[1], holders[:1])):
                identity = load_identity(self.path / "nodes" / me / "identity.toml")
                with Channel(identity.transport, nodes, context) as channel:
                    operation = sorted(engine.keys.ALGORITHMS[record.manifest.algorithm].operations)[0]
                    now_ms = time.time_ns() // 1_000_000
                    grant = issue_grant(kq_identity.signing, record, operation, me, now_ms, 10_000, os.urandom(16))
                    for holder in asked:
                        try:
                            body = ShareRelease(record.manifest.key_id, grant, told.certificate)
                            given = ask(channel, holder, "share.release", body, 5.0)
                        except engine.EngineError as error:
                            failed[holder] = f"{error.code}: {error}"
                        else:
                            found[holder] = Share(given.x, given.y)
        finally:
            context.destroy(linger=0)
        return record.manifest, found, failed

    def check_shares(self, kq_identity: Any, name: str, least: int = THRESHOLD) -> str:
        """Empty if every t of the holders' shares give the key and there are ``least`` of them; else what is wrong."""
        manifest, found, failed = self.shares_of(kq_identity, name)
        if len(found) < least:
            return f"{name}: {len(found)} shares of the {least} that there should be: {failed}"
        for chosen in combinations(found, manifest.threshold):
            secret = reconstruct_key([found[node] for node in chosen])
            if check_value(secret, manifest.key_context) != manifest.check_value:
                return f"{name}: the shares of {', '.join(chosen)} give another key"
        return ""


RULES = [engine.PolicyRule("local", "*", ["*"]), engine.PolicyRule("other", "*", ["*"])]


class Undo:
    """What is to be undone, the newest first; each once, and all of it whatever fails."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def later(self, step: Callable[[], Any]) -> None:
        self._steps.append(step)

    def now(self) -> list[str]:
        """Undo everything; what failed."""
        failed = []
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as error:  # the other steps must be done too
                failed.append(f"{type(error).__name__}: {error}")
        return failed


# --- processes ---


def family(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                with contextlib.suppress(OSError):
                    found += [int(child) for child in (task / "children").read_text().split()]
    return found


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """What processes started meanwhile have in their environment besides ours."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def change_toml(path: Path, **values: Any) -> None:
    """Change keys of a configuration file."""
    write_toml(path, tomllib.loads(path.read_text()) | values)


# --- disks ---


def run(*command: str | Path, timeout_s: float = MOUNT_S) -> str:
    """A system command; its error output is in the exception's text."""
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))[:200]}: {done.stderr.strip()[:300] or done.returncode}")
    return done.stdout


class Disk:
    """A small file system that takes the place of a folder while no process uses it, and gives its contents back.

    It has ``size_kib`` of room beside what is in the folder.
    """

    def __init__(self, folder: Path, kind: str, size_kib: int) -> None:
        size_kib += sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) // 1024 * 9 // 8
        self.folder = folder
        self.kind = kind
        self._aside = folder.with_name(f"{folder.name}.aside")
        self._image = folder.with_name(f"{folder.name}.img")
        folder.rename(self._aside)
        folder.mkdir(mode=0o700)
        try:
            if kind == "tmpfs":
                run("mount", "-t", "tmpfs", "-o", f"size={size_kib}k,mode=0700", "tmpfs", folder)
            else:
                with self._image.open("wb") as stream:
                    stream.truncate(size_kib * 1024)
                run("mkfs.ext4", "-q", "-F", "-m", "0", self._image)
                self.mount()
        except BaseException:
            folder.rmdir()
            self._aside.rename(folder)
            self._image.unlink(missing_ok=True)
            raise
        self._copy(self._aside, folder)
        run("sync", "-f", folder)

    def mount(self) -> None:
        """Mount the image (again)."""
        run("mount", "-o", "loop,errors=remount-ro", self._image, self.folder)
        self.folder.chmod(0o700)

    def unmount(self) -> None:
        """Unmount it; a process that was killed may take a moment to let go of it."""
        until_s = time.monotonic() + MOUNT_S
        while True:
            try:
                run("umount", self.folder)
            except OSError as error:
                if "busy" not in str(error) or time.monotonic() > until_s:
                    raise
                time.sleep(0.05)
            else:
                return

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        for each in source.iterdir():
            if each.is_dir():
                shutil.copytree(each, target / each.name, dirs_exist_ok=True)
            else:
                shutil.copy2(each, target / each.name)

    def free_kib(self) -> int:
        told = os.statvfs(self.folder)
        return told.f_bavail * told.f_frsize // 1024

    def fill(self, leave_kib: int) -> None:
        """Leave so much room."""
        filler = self.folder / "filler"
        with filler.open("ab") as stream, contextlib.suppress(OSError):
            while (room := self.free_kib() - leave_kib) > 0:
                stream.write(bytes(min(room, 256) * 1024))
                stream.flush()

    def empty(self) -> None:
        """Take the filling away."""
        (self.folder / "filler").unlink(missing_ok=True)

    def give_back(self) -> None:
        """Have the plain folder again, with what the file system holds; nobody may use it."""
        kept = self.folder.with_name(f"{self.folder.name}.kept")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(mode=0o700)
        (self.folder / "filler").unlink(missing_ok=True)
        self._copy(self.folder, kept)
        self.unmount()
        self.folder.rmdir()
        kept.rename(self.folder)
        shutil.rmtree(self._aside, ignore_errors=True)
        self._image.unlink(missing_ok=True)


# --- what the machine can do ---


def _can(*command: str) -> str:
    """Empty if the command works, else why not."""
    try:
        run(*command, timeout_s=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:160]
    return ""


def lacks(need: str) -> str:
    """Empty if the machine has what a fault needs, else the reason that is shown in its row."""
    root = os.geteuid() == 0
    if need == "tmpfs":
        if not root:
            return "mounting needs root"
        return _can("unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt")
    if need == "ext4":
        if not root or not shutil.which("mkfs.ext4"):
            return "mounting a loop file system needs root and mkfs.ext4"
        return _can("losetup", "-f")
    if need == "namespace":
        if not root or not shutil.which("ip"):
            return "network namespaces need root and iproute2"
        return _can("unshare", "-n", "ip", "link", "set", "lo", "up")
    if need == "nftables":
        if not shutil.which("nft"):
            return "nftables is not installed"
        return _can("unshare", "-n", "nft", "add table inet keyquorum")
    if need == "prlimit":
        return "" if root else "changing the limits of a running process needs root"
    raise ValueError(f"no need is called {need!r}")


# --- network namespaces ---


def own_network() -> None:
    """Give this thread, and what it starts, a network namespace of its own with a loopback interface."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    run("ip", "link", "set", "lo", "up")


def machine() -> dict[str, str]:
    """What this ran on."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpus": str(os.cpu_count()),
        "cpu": model,
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "libzmq": zmq.zmq_version(),
    }


def counted(kinds: Counter[tuple[str, str]]) -> str:
    """Errors by kind, in words."""
    return ", ".join(f"{number} {group} {code}" for (group, code), number in sorted(kinds.items())) or "none"
