"""A real cluster in one folder of one machine: its files, its ports and its processes. It knows no key and no share.

Nodes and balancer are started as ``python -m nodes`` and ``python -m balancer``, never imported; the nodes of a cluster
that ends with this process are forked from one that has imported them (``forkserver``). The folder's layout::

    cluster.manifest  cluster.toml       the signed chain; what reopening needs
    operator/                            the operator's identity, its key encrypted
    secrets/                             the passphrase and the tokens' PINs, outside every data folder
    nodes/<name>/                        node.toml identity.toml node.card data/
    balancer/                            balancer.toml identity.toml data/
    clients/<name>/                      client.toml identity.toml
    run/                                 <name>.log, <name>.pid
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import IO, Annotated, Any, Literal

import zmq
from msgspec import Meta, Struct

from engine.client import fleet
from engine.client.calls import DegradedKey
from engine.client.client import connect
from engine.client.config import (
    Identity,
    create_identity,
    load_cluster,
    load_config,
    load_identity,
    write_card,
    write_private,
    write_toml,
)
from engine.client.forkserver import fork_node
from engine.client.membership import OwnCurve, Servers
from engine.client.process import lock_folder
from engine.client.spreading import serial_at
from engine.client.transport import Channel
from engine.errors import ClusterError, ConfigError, EngineError
from engine.keys import RequestType
from engine.protocol.manifest import (
    Cluster,
    Member,
    PolicyRule,
    Retiring,
    chain_pin,
    check_share_counts,
    issue_cluster_manifest,
)
from engine.protocol.requests import REQUEST_CODECS, Empty
from engine.protocol.wire import Name

__all__ = ["LocalCluster"]

PORTS = range(20_000, 32_000)
"""Outside Linux's ephemeral range (32768..60999), so that no client's connection takes a stopped node's port."""
PORT_TRIES = 500
TELL_AFTER_S = 5.0
"""How long a process may take to answer before the user is told what is waited for."""
CREATE_TRIES = 3
MAX_NODES = 64
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 8.0
KILL_TIMEOUT_S = 5.0
PROBE_S = 0.5
MANIFEST_TIMEOUT_S = 10.0
LOCK_NAME = "lock"
LOG_TAIL = 2_000
BALANCER = "balancer"
MAX_BALANCERS = 9
OPERATOR = "operator"
PORT_TAKEN = ("can't bind", "ddress already in use")

Event = Callable[[str], None]


class _ClusterFile(Struct, frozen=True, forbid_unknown_fields=True):
    """``cluster.toml``."""

    version: Annotated[int, Meta(ge=1, le=1)]
    name: Name
    nodes: Annotated[list[Name], Meta(min_length=1, max_length=MAX_NODES)]
    clients: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    threshold: Annotated[int, Meta(ge=1, le=MAX_NODES)]
    shares: Annotated[int, Meta(ge=1, le=MAX_NODES)]
    manifest_pin: str


class _TokenPart(Struct, frozen=True):
    """Of ``[token]`` in a ``node.toml``: the data folder of the node whose token this one uses, or nothing."""

    shared_with: str = ""


class _NodeFile(Struct, frozen=True):
    """What is looked at in a ``node.toml``."""

    token: _TokenPart


@dataclass(frozen=True, slots=True)
class _Stamp:
    """A process beyond doubt: its id and when it began, in clock ticks since boot (proc(5), field 22)."""

    pid: int
    began: int

    @classmethod
    def of(cls, pid: int) -> _Stamp | None:
        """The stamp of a live process; None for one that is gone or only waits to be reaped."""
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields else None


def _stat(pid: int) -> list[str]:
    """What the kernel tells of a live process, from its state on (proc(5), field 3); empty for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _group(leader: int) -> dict[int, int]:
    """The live processes of a process group: id -> parent's id."""
    found = {}
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            fields = _stat(int(each.name))
            if fields and int(fields[2]) == leader:
                found[int(each.name)] = int(fields[1])
    return found


class _Process:
    """One member of the cluster: its command, its log and its pid file. It is only ever signalled by its stamp.

    A node is a process group: its supervisor, which leads it and whose id is ``pid``, and the child that serves.
    """

    def __init__(
        self, name: str, module: Literal["nodes", "balancer"], config: Path, run: Path, *, supervised: bool = False
    ) -> None:
        self.name = name
        self.module = module
        self.supervised = supervised
        self.config = config
        self.log = run / f"{name}.log"
        self._pid_file = run / f"{name}.pid"
        self._child: subprocess.Popen[bytes] | None = None
        self._stamp: _Stamp | None = None
        self._log_start = 0

    def attach(self) -> None:
        """Take over a process that an earlier one of us started, if it still runs."""
        try:
            boot, pid, began = self._pid_file.read_text(encoding="ascii").split()
            told = _Stamp(int(pid), int(began))
        except (OSError, ValueError):
            return
        if boot == _boot_id() and _Stamp.of(told.pid) == told:
            self._stamp = told

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        if self._child is not None:
            return self._child.poll() is None
        return self._stamp is not None and _Stamp.of(self._stamp.pid) == self._stamp

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._stamp.pid if self._stamp is not None and self.running else None

    @property
    def serving(self) -> int | None:
        """The id of the process that serves, while there is one."""
        pid = self.pid
        if pid is None or not self.supervised:
            return pid
        children = [child for child, parent in _group(pid).items() if parent == pid]
        return children[0] if children else None

    def start(self, lifeline: int | None) -> None:
        """Start it; ``lifeline`` is the end of a pipe by which it notices that we are gone."""
        arguments = ["--config", str(self.config)]
        if self.module == "nodes" and not self.supervised:
            arguments.append("--unsupervised")
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with _private_log(self.log) as log:
            pid = self._forked(arguments, log.fileno(), lifeline) or self._spawned(arguments, log, lifeline)
        self._stamp = _Stamp.of(pid)
        if self._stamp is not None:
            line = f"{_boot_id()} {self._stamp.pid} {self._stamp.began}\n"
            write_private(self._pid_file, line.encode("ascii"))

    def _forked(self, arguments: Sequence[str], log: int, lifeline: int | None) -> int:
        """The process id of a node that ends with this process; 0 of another one, or where it can't be forked.

        One without a supervisor is a child of this process, which is told how it ends.
        """
        if self.module != "nodes" or not self.supervised or lifeline is None:
            return 0
        try:
            return fork_node(arguments, log, lifeline)
        except OSError:
            return 0

    def _spawned(self, arguments: Sequence[str], log: IO[bytes], lifeline: int | None) -> int:
        # -P: the working folder may hold a folder `nodes` of its own.
        command = [sys.executable, "-P", "-m", self.module, *arguments]
        kept: tuple[int, ...] = ()
        if lifeline is not None:
            command += ["--lifeline", str(lifeline)]
            kept = (lifeline,)
        # A session of its own: Ctrl-C in the terminal reaches us, and we stop it in order.
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=kept, start_new_session=True
        )
        return self._child.pid

    def signal(self, number: int, *, group: bool = False) -> None:
        """Signal the process, or all of its group, and never another one that got its id."""
        if self._stamp is None:
            return
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self._stamp.pid)
            try:
                # The descriptor keeps the id from being reused, so this check holds for the signal.
                if _Stamp.of(self._stamp.pid) != self._stamp:
                    return
                if group:
                    os.killpg(self._stamp.pid, number)
                else:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within the time, with all of its group."""
        end = time.monotonic() + timeout_s
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(max(0.0, timeout_s))
        elif self._stamp is not None:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(self._stamp.pid)
                try:
                    if self.running:
                        select.select([descriptor], [], [], max(0.0, timeout_s))
                finally:
                    os.close(descriptor)
        if self.running:
            return False
        while self._stamp is not None and _group(self._stamp.pid):
            # A supervisor's child ends with it, but not in the same instant.
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        self._child, self._stamp = None, None
        self._pid_file.unlink(missing_ok=True)
        return True

    def tail(self) -> str:
        """The end of what it logged since its last start."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(self._log_start, self.log.stat().st_size - LOG_TAIL))
                return stream.read().decode("utf-8", errors="replace").strip()
        except OSError:
            return "(no log)"


def _goes_by(channel: Channel, name: str, serial: int) -> bool:
    try:
        return serial_at(channel, name, PROBE_S) >= serial
    except EngineError:
        return False


class LocalCluster:
    """A real cluster on loopback: node processes with SoftHSM tokens, and a balancer, over CURVE.

    ``path`` is its folder; a cluster that is already there is started again, from its disks. Without a path the folder
    is a temporary one, removed at the end. ``threshold`` and ``shares`` are what its users should give to
    ``create_key``; ``domains`` is over how many sites the nodes are spread. ``clients`` are names of identities to
    make, ``rules`` the policy (by default the first client may do everything, and the others nothing). Of
    ``nodes_per_token`` nodes one after the other the first one owns a token that the others share, all on one host.
    ``balancer`` has further settings for ``balancer.toml``, such as ``{"migrate": {"repair_after_s": 30}}``. Of several
    ``balancers`` one leads; they share a registry in PostgreSQL: ``balancer={"registry": {"postgresql": ...}}``.

    Nodes whose process crashes or whose token hangs are restarted, unless ``supervised`` is off.

    As a context manager it always ends its processes. They also end when this process dies, unless ``detached``: then
    they go on, and ``LocalCluster.open(path).stop()`` ends them later, from any process.
    """

    def __init__(
        self,
        nodes: int = 5,
        threshold: int = 3,
        path: str | os.PathLike[str] | None = None,
        *,
        shares: int | None = None,
        domains: int = 3,
        nodes_per_token: int = 1,
        clients: Sequence[str] = ("local",),
        rules: Sequence[PolicyRule] | None = None,
        balancer: Mapping[str, object] | None = None,
        balancers: int = 1,
        detached: bool = False,
        supervised: bool = True,
        start_timeout_s: float = START_TIMEOUT_S,
        on_event: Event | None = None,
    ) -> None:
        count = nodes if shares is None else shares
        _check_size(nodes, threshold, count, domains, clients)
        if not 1 <= balancers <= MAX_BALANCERS:
            raise ValueError(f"{balancers} balancers; 1 to {MAX_BALANCERS} are allowed")
        if not 1 <= nodes_per_token <= MAX_NODES:
            raise ValueError(f"{nodes_per_token} nodes per token; 1 to {MAX_NODES} are allowed")
        self._temporary = path is None
        self.path = Path(tempfile.mkdtemp(prefix="keyquorum-") if path is None else path).resolve()
        self._set_up(detached, start_timeout_s, on_event, supervised)
        try:
            self._check_free(_folder(self.path))
            with self._alone():
                plan = _Plan(
                    nodes, threshold, count, domains, nodes_per_token, tuple(clients), rules, balancer or {}, balancers
                )
                self._create_and_start(plan, shares)
        except BaseException:
            # What was started has been ended; what ran before us is not ours to end.
            self._release()
            raise

    @staticmethod
    def _check_free(folder: Path) -> None:
        """Refuse a folder that is somebody else's."""
        names = sorted(each.name for each in folder.iterdir() if each.name != LOCK_NAME)
        if names and "cluster.toml" not in names:
            told = ", ".join(names)[:200]
            raise ConfigError(
                f"{folder} is not empty and holds no cluster ({told}); take another folder, or remove it if an earlier "
                "start was cut off in it"
            )

    def _create_and_start(self, plan: _Plan, shares: int | None) -> None:
        existing = (self.path / "cluster.toml").exists()
        for attempt in range(1, CREATE_TRIES + 1):
            if not existing:
                self._create(plan)
            self._load()
            self._check_same(plan.nodes, plan.threshold, shares)
            try:
                self._start()
                break
            except ClusterError as error:
                taken = any(text in str(error) for text in PORT_TAKEN)
                if existing or attempt == CREATE_TRIES or not taken:
                    raise
                self._tell("a port was taken meanwhile; making the cluster again")
                _remove_parts(self.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Make and start in this folder alone: a second ``up`` at the same time is refused."""
        descriptor = lock_folder(self.path)
        try:
            for process in self._processes.values():
                if not process.running:
                    process.attach()  # another one may have started it meanwhile
            yield
        finally:
            os.close(descriptor)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        detached: bool = True,
        start_timeout_s: float = START_TIMEOUT_S,
        on_event: Event | None = None,
    ) -> LocalCluster:
        """The cluster in a folder, as it is: nothing is started; what runs is found by its pid file."""
        self = cls.__new__(cls)
        self._temporary = False
        self.path = Path(path).resolve()
        self._set_up(detached, start_timeout_s, on_event)
        if not (self.path / "cluster.toml").exists():
            raise ConfigError(f"{self.path} holds no cluster (it has no cluster.toml)")
        self._load()
        return self

    def _set_up(self, detached: bool, start_timeout_s: float, on_event: Event | None, supervised: bool = True) -> None:
        self._detached = detached
        self._supervised = supervised
        self._start_timeout_s = start_timeout_s
        self._tell: Event = on_event or (lambda text: None)
        self._lifeline: tuple[int, int] | None = None
        self._processes: dict[str, _Process] = {}

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LocalCluster({str(self.path)!r}, nodes={len(self._file.nodes)})"

    # --- what it is ---

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return tuple(self._file.nodes)

    @property
    def balancers(self) -> tuple[str, ...]:
        """The names of the balancers."""
        return tuple(each.parent.name for each in sorted(self.path.glob(f"{BALANCER}*/balancer.toml")))

    @property
    def clients(self) -> tuple[str, ...]:
        """The names of the clients; the first is the default one."""
        return tuple(self._file.clients)

    @property
    def threshold(self) -> int:
        """t, for the keys its users make."""
        return self._file.threshold

    @property
    def shares(self) -> int:
        """n, for the keys its users make."""
        return self._file.shares

    @property
    def client_config(self) -> Path:
        """The default client's ``client.toml``, as ``connect`` takes it."""
        return self.client_config_of(self.clients[0])

    @property
    def cluster(self) -> Cluster:
        """The verified cluster manifest."""
        return load_cluster(self.path / "cluster.manifest", self._file.manifest_pin)

    def client_config_of(self, name: str) -> Path:
        """A client's ``client.toml``."""
        if name not in self.clients:
            raise ValueError(f"no client {name!r}; there are {', '.join(self.clients)}")
        return self.path / "clients" / name / "client.toml"

    def data_folder(self, node: str) -> Path:
        """A node's data folder."""
        return self.path / "nodes" / self._named(node).name / "data"

    def log_file(self, name: str) -> Path:
        """The log of a node or of the balancer."""
        return self._named(name).log

    def running(self) -> dict[str, int | None]:
        """The process ids by name, the balancer included; None where none runs. A node's is that of its supervisor."""
        return {name: process.pid for name, process in self._processes.items()}

    def serving(self) -> dict[str, int | None]:
        """The ids of the processes that serve, by name: a node's is its supervisor's child, and changes with it."""
        return {name: process.serving for name, process in self._processes.items()}

    def pause(self, name: str) -> None:
        """Stop a member's processes where they are (SIGSTOP): its connections stand, and nobody answers."""
        self._named(name).signal(signal.SIGSTOP, group=True)

    def resume(self, name: str) -> None:
        """Let a paused member go on."""
        self._named(name).signal(signal.SIGCONT, group=True)

    # --- its processes ---

    def start(self) -> None:
        """Start what does not run, all at once, and wait until every process answers."""
        with self._alone():
            self._start()

    def _start(self) -> None:
        idle = [process for process in self._processes.values() if not process.running]
        if len(idle) < len(self._processes) and not self._detached:
            busy = ", ".join(process.name for process in self._processes.values() if process.running)
            raise ClusterError(f"{self.path}: it runs already ({busy})")
        self._launch(idle)

    def stop(self) -> None:
        """End every process: SIGTERM, at most 8 s to drain, then SIGKILL."""
        self._end(self._processes.values())

    def close(self) -> None:
        """Stop, and remove the folder if it is a temporary one."""
        self.stop()
        self._release()

    def _release(self) -> None:
        if self._lifeline is not None:
            for descriptor in self._lifeline:
                os.close(descriptor)
            self._lifeline = None
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)

    def kill(self, node: str) -> None:
        """End a process by SIGKILL, as a power cut would."""
        process = self._named(node)
        if not process.running:
            raise ClusterError(f"{node} does not run")
        process.signal(signal.SIGKILL, group=True)
        if not process.wait(KILL_TIMEOUT_S):
            raise ClusterError(f"{node} did not die within {KILL_TIMEOUT_S:g} s of SIGKILL")

    def start_node(self, node: str) -> None:
        """Start a node (or the balancer) that does not run, and wait until it answers."""
        process = self._named(node)
        with self._alone():
            if process.running:
                raise ClusterError(f"{node} runs already")
            self._launch([process])

    def stop_node(self, node: str) -> None:
        """End one process in order."""
        self._end([self._named(node)])

    def restart(self, node: str) -> None:
        """Stop a process in order, and start it again."""
        self.stop_node(node)
        self.start_node(node)

    def kill_balancer(self) -> None:
        """End the balancer by SIGKILL."""
        self.kill(BALANCER)

    def start_balancer(self) -> None:
        """Start the balancer again."""
        self.start_node(BALANCER)

    def _named(self, name: str) -> _Process:
        process = self._processes.get(name)
        if process is None:
            raise ValueError(f"no process {name!r}; there are {', '.join(self._processes)}")
        return process

    def _launch(self, processes: Sequence[_Process]) -> None:
        if not self._detached and self._lifeline is None:
            self._lifeline = os.pipe()
        lifeline = self._lifeline[0] if self._lifeline is not None else None
        until = time.monotonic() + self._start_timeout_s
        try:
            for process in processes:
                process.start(lifeline)
            self._await_answers(processes, until)
        except BaseException:
            self._end(processes)
            raise

    def _await_answers(self, processes: Sequence[_Process], until: float) -> None:
        cluster = self.cluster
        members = {process.name: cluster.members[process.name] for process in processes}
        identity = load_identity(self.client_config.parent / "identity.toml")
        context: zmq.Context[Any] = zmq.Context()
        try:
            with Channel(identity.transport, members, context) as channel:
                for process in processes:
                    tell_s = time.monotonic() + TELL_AFTER_S
                    while not _answers(channel, process.name):
                        if time.monotonic() > tell_s:
                            tell_s = until
                            left_s = max(0.0, until - time.monotonic())
                            self._tell(f"{process.name} does not answer yet; it has {left_s:.0f} s more")
                        # Any of them may have failed meanwhile, not only the one that is asked.
                        self._check_alive(processes)
                        if time.monotonic() > until:
                            raise ClusterError(
                                f"{process.name} did not answer within {self._start_timeout_s:g} s; "
                                f"its log ends:\n{process.tail()}"
                            )
                    # The answer may be another process's, on the same port.
                    self._check_alive(processes)
                    self._tell(f"{process.name} serves at {members[process.name].endpoint}")
        finally:
            context.destroy(linger=0)

    @staticmethod
    def _check_alive(processes: Iterable[_Process]) -> None:
        for process in processes:
            if not process.running:
                raise ClusterError(f"{process.name} could not start; its log ends:\n{process.tail()}")

    def _end(self, processes: Iterable[_Process]) -> None:
        live = [process for process in processes if process.running]
        for process in live:
            process.signal(signal.SIGTERM)
        until = time.monotonic() + STOP_TIMEOUT_S
        stubborn = [process for process in live if not process.wait(until - time.monotonic())]
        for process in stubborn:
            self._tell(f"{process.name} did not stop within {STOP_TIMEOUT_S:g} s; it is killed")
            process.signal(signal.SIGKILL, group=True)
        for process in stubborn:
            process.wait(KILL_TIMEOUT_S)

    # --- its files ---

    def add_client(self, name: str, rules: Sequence[PolicyRule] = ()) -> Path:
        """Make one more client, with rules that are added to the policy; its ``client.toml``.

        The operator signs a new cluster manifest, which the members that run take at once.
        """
        cluster = self.cluster
        if name in cluster.members:
            raise ValueError(f"the name {name!r} is a member's already")
        folder = _folder(self.path / "clients" / name)
        identity = create_identity(folder / "identity.toml", name, "client")
        _write_client(folder, self._file.manifest_pin)
        clients = [*self.clients, name]
        self._write_file(self._file.name, list(self.nodes), clients, self.threshold, self.shares)
        self._file: _ClusterFile = load_config(self.path / "cluster.toml", _ClusterFile)
        self.sign_manifest([*cluster.members.values(), identity.member()], [*cluster.rules, *rules])
        return self.client_config_of(name)

    def add_node(self, name: str = "", *, location: str = "") -> str:
        """Make one more node with a token of its own, have it signed and start it; its name.

        By default its name is one that none ever had, and it stands on a host of its own at the site with the fewest.
        """
        with self._alone():
            card = self._make_node(name, location)
            fleet.add(self, card)
            self._start_new(card.name)
        return card.name

    def drain_node(self, node: str, *, timeout_s: float | None = 0.0) -> None:
        """Have a node be given no more keys, and those that it holds moved away.

        It is waited for that for ``timeout_s`` (None: for ever), and then ``ClusterError`` raised; 0 does not wait.
        """
        fleet.drain(self, node)
        if timeout_s != 0.0:
            fleet.wait_empty(self, node, timeout_s)

    def undrain_node(self, node: str) -> None:
        """Have a node be given keys again."""
        fleet.undrain(self, node)

    def remove_node(self, node: str, *, lost: bool = False, give_up_keys: bool = False) -> None:
        """Take a node that was emptied out of the cluster and end it; with ``lost`` any node. Its folder stays.

        ``ClusterError`` while it holds shares, unless it is ``lost``: then the others make them anew, and it is refused
        only if keys would be lost with it that are not given up.
        """
        self._check_token_unused(node)
        with self._alone():
            fleet.remove(self, node, lost=lost, give_up_keys=give_up_keys)
            self._end_removed(node)

    def replace_node(self, node: str, *, lost: bool = False, timeout_s: float | None = None) -> str:
        """Put a new node in a node's place, empty that and remove it; with ``lost`` it is out at once. The new name.

        The shares of a lost one are made anew after this has returned; ``fleet.wait_empty`` waits for that.
        """
        name = self.begin_replacing(node, lost=lost)
        if not lost:
            fleet.wait_empty(self, node, timeout_s)
            self.remove_node(node)
        return name

    def begin_replacing(self, node: str, *, lost: bool = False, give_up_keys: bool = False) -> str:
        """The same without waiting: a node that is not lost is left to be emptied, and then to be removed."""
        self._check_token_unused(node)
        with self._alone():
            card = self._make_node("", self._place_of(node))
            fleet.replace(self, node, card, lost=lost, give_up_keys=give_up_keys)
            self._start_new(card.name)
            if lost:
                self._end_removed(node)
        return card.name

    def sign_nodes(self, members: Sequence[Member], draining: Collection[str]) -> Cluster:
        """As ``sign_manifest``, of nodes that come, go or are to be emptied (``fleet.Fleet``)."""
        return self.sign_manifest(members, retiring=list(self.cluster.retiring.values()), draining=sorted(draining))

    def degraded(self, without: str) -> Sequence[DegradedKey]:
        """The keys that would lack a share without a node, by the registry's books."""
        with connect(self.client_config) as client:
            return client.degraded_keys(without)

    def left_on(self, node: str) -> fleet.Left:
        """How much a node holds, by the registry's books and by its own word."""
        with self._asking() as (channel, taken):
            return fleet.left_on(channel, taken, node)

    def keys_by_node(self) -> dict[str, int]:
        """How many keys each node holds a share of, by the registry's books; nodes without any are missing."""
        with self._asking() as (channel, taken):
            return fleet.keys_by_node(channel, taken)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[tuple[Channel, Cluster]]:
        """A channel to the members as the default client."""
        taken = self.cluster
        identity = load_identity(self.client_config.parent / "identity.toml")
        with zmq.Context() as context, Channel(OwnCurve(identity, taken), Servers(taken), context) as channel:
            yield channel, taken

    def _make_node(self, name: str, location: str) -> Member:
        """The files, the token and the card of one more node, which no manifest names yet."""
        cluster = self.cluster
        if len(self.nodes) >= MAX_NODES:
            raise ValueError(f"{len(self.nodes) + 1} nodes; a local cluster has 1 to {MAX_NODES}")
        name = name or _fresh_name(cluster)
        if name in cluster.members or name in self._processes:
            raise ValueError(f"the name {name!r} is a member's already")
        folder = self.path / "nodes" / name
        if folder.exists() and (name, "node") in cluster.past:
            raise ValueError(f"{folder} is of a node {name!r} that was removed; take another name")
        # Of an earlier try that was cut off: no manifest ever had it.
        shutil.rmtree(folder, ignore_errors=True)
        (self.path / "secrets" / f"{name}.pin").unlink(missing_ok=True)
        identity = create_identity(_folder(folder) / "identity.toml", name, "node")
        taken = {int(told.rpartition(":")[2]) for each in cluster.servers.values() for told in _endpoints(each)}
        with contextlib.ExitStack() as held:
            port, publish_port = _free_port(held, taken), _free_port(held, taken)
            card = identity.member(
                endpoint=_loopback(port),
                publish_endpoint=_loopback(publish_port),
                location=location or _fresh_location(cluster),
            )
            write_card(folder / "node.card", card, identity.signing)
            self._write_node(name, cluster.pin.hex(), name)
            self._init_tokens([name])
        return card

    def _start_new(self, name: str) -> None:
        """Start a node that was signed just now; it belongs to the cluster from here on."""
        self._write_file(self._file.name, [*self.nodes, name], list(self.clients), self.threshold, self.shares)
        self._file = load_config(self.path / "cluster.toml", _ClusterFile)
        self._processes[name] = process = self._node_process(name)
        if self._processes[BALANCER].running or any(each.running for each in self._processes.values()):
            self._launch([process])

    def _end_removed(self, name: str) -> None:
        self._end([self._named(name)])
        left = [each for each in self.nodes if each != name]
        self._write_file(self._file.name, left, list(self.clients), self.threshold, self.shares)
        self._file = load_config(self.path / "cluster.toml", _ClusterFile)
        del self._processes[name]

    def _place_of(self, node: str) -> str:
        if node not in self.cluster.nodes:
            raise ValueError(f"{node!r} is no node of the cluster; there are {', '.join(self.cluster.nodes)}")
        return self.cluster.nodes[node].location

    def _check_token_unused(self, node: str) -> None:
        """Refuse to take away a node whose token others use."""
        for other in self.nodes:
            file = self.path / "nodes" / other / "node.toml"
            if other != node and load_config(file, _NodeFile).token.shared_with == f"../{node}/data":
                raise ValueError(f"{other} uses the token of {node}; remove {other} first")

    def sign_manifest(
        self,
        members: Sequence[Member] | None = None,
        rules: Sequence[PolicyRule] | None = None,
        retiring: Sequence[Retiring] = (),
        draining: Sequence[str] | None = None,
    ) -> Cluster:
        """Have the operator sign a further manifest with these members and rules (as they are, where None is given).

        ``retiring`` are the CURVE keys of before of members that change theirs (``engine.client.config.rotate_curve``),
        ``draining`` the nodes that are to be emptied (those that are already, where None is given).

        It is put into the members' file, and taken by each that runs within a second or so: this waits until all have
        it, and raises ``ClusterError`` if one has not within 10 s.
        """
        cluster = self.cluster
        operator = load_identity(self.path / "operator" / "identity.toml", self._passphrase())
        manifest = self.path / "cluster.manifest"
        chain = issue_cluster_manifest(
            name=cluster.name,
            members=list(cluster.members.values()) if members is None else list(members),
            rules=list(cluster.rules) if rules is None else list(rules),
            operators=[operator.signing],
            quorum=cluster.quorum,
            groups=cluster.groups,
            domain_level=cluster.domain_level,
            chain=manifest.read_bytes(),
            retiring=retiring,
            draining=draining,
        )
        write_private(manifest, chain)
        taken = self.cluster
        self._await_manifest(taken)
        return taken

    def _await_manifest(self, taken: Cluster) -> None:
        """Wait until every member that runs says by ``hello`` that it goes by this manifest."""
        running = [process for process in self._processes.values() if process.running]
        asker = next((name for name in self.clients if name in taken.members), None)
        if asker is None:
            return
        identity = load_identity(self.path / "clients" / asker / "identity.toml")
        waiting = [process.name for process in running if process.name in taken.servers]
        until_s = time.monotonic() + MANIFEST_TIMEOUT_S
        own = OwnCurve(identity, taken)
        with zmq.Context() as context, Channel(own, Servers(taken), context) as channel:
            while waiting and time.monotonic() < until_s:
                waiting = [name for name in waiting if not _goes_by(channel, name, taken.serial)]
                if waiting:
                    time.sleep(PROBE_S / 10)
        if waiting:
            raise ClusterError(f"the manifest with serial {taken.serial} was not taken by {', '.join(waiting)}")

    def _passphrase(self) -> str:
        return (self.path / "secrets" / "operator.passphrase").read_text(encoding="ascii").strip()

    def _write_file(self, name: str, nodes: list[str], clients: list[str], threshold: int, shares: int) -> None:
        values = {
            "version": 1,
            "name": name,
            "nodes": nodes,
            "clients": clients,
            "threshold": threshold,
            "shares": shares,
            "manifest_pin": chain_pin((self.path / "cluster.manifest").read_bytes()).hex(),
        }
        write_toml(self.path / "cluster.toml", values)

    def _load(self) -> None:
        self._file = load_config(self.path / "cluster.toml", _ClusterFile)
        run = _folder(self.path / "run")
        self._processes = {name: self._node_process(name) for name in self._file.nodes}
        for name in self.balancers:
            self._processes[name] = _Process(name, "balancer", self.path / name / "balancer.toml", run)
        for process in self._processes.values():
            process.attach()

    def _node_process(self, name: str) -> _Process:
        config, run = self.path / "nodes" / name / "node.toml", self.path / "run"
        return _Process(name, "nodes", config, run, supervised=self._supervised)

    def _check_same(self, nodes: int, threshold: int, shares: int | None) -> None:
        told, held = (nodes, threshold), (len(self.nodes), self.threshold)
        if told != held or shares not in (None, self.shares):
            raise ValueError(
                f"{self.path} holds a cluster of {held[0]} nodes, threshold {held[1]} of {self.shares}; "
                f"asked for were {nodes} nodes, threshold {threshold}{f' of {shares}' if shares else ''}"
            )

    def _create(self, plan: _Plan) -> None:
        """Make every identity, token and file; ``cluster.toml`` comes last and says that all is there."""
        self.path.chmod(0o700)
        self._tell(f"making a cluster of {plan.nodes} nodes in {self.path}")
        try:
            self._make_parts(plan)
        except BaseException:  # Ctrl-C too: half a cluster would be in the way of the next try
            _remove_parts(self.path)
            raise

    def _make_parts(self, plan: _Plan) -> None:
        with contextlib.ExitStack() as held:
            ports = [_free_port(held) for _ in range(2 * (plan.nodes + plan.balancers))]
            names = [f"node{number}" for number in range(1, plan.nodes + 1)]
            pin = self._write_manifest(plan, names, ports)
            for number, name in enumerate(names):
                self._write_node(name, pin, names[number - number % plan.nodes_per_token])
            values = {"identity": "identity.toml", "manifest": "../cluster.manifest", "manifest_pin": pin}
            for name in _balancer_names(plan.balancers):
                write_toml(
                    self.path / name / "balancer.toml", {"version": 1, **values, "data": "data", **plan.balancer}
                )
            write_toml(self.path / "operator" / "operator.toml", {"version": 1, **values})
            self._init_tokens(names)
        self._write_file("local", names, list(plan.clients), plan.threshold, plan.shares)

    def _write_manifest(self, plan: _Plan, names: Sequence[str], ports: Sequence[int]) -> str:
        """Make the identities, and sign the manifest of them; its pin in hex."""
        passphrase = secrets.token_urlsafe(24)
        write_private(_folder(self.path / "secrets") / "operator.passphrase", passphrase.encode() + b"\n")
        operator = create_identity(
            _folder(self.path / "operator") / "identity.toml", OPERATOR, "operator", passphrase=passphrase
        )
        members = [operator.member()]
        for number, name in enumerate(names):
            identity = create_identity(_folder(self.path / "nodes" / name) / "identity.toml", name, "node")
            host = number // plan.nodes_per_token
            location = f"site{host % plan.domains + 1}/room1/rack{host // plan.domains + 1}/host{host + 1}"
            endpoint, publish = _loopback(ports[number]), _loopback(ports[plan.nodes + number])
            members.append(identity.member(endpoint=endpoint, publish_endpoint=publish, location=location))
            write_card(self.path / "nodes" / name / "node.card", members[-1], identity.signing)
        for number, name in enumerate(_balancer_names(plan.balancers)):
            members.append(self._balancer_member(name, *ports[2 * (plan.nodes + number) :][:2]))
        for name in plan.clients:
            identity = create_identity(_folder(self.path / "clients" / name) / "identity.toml", name, "client")
            members.append(identity.member())
        rules = plan.rules if plan.rules is not None else [PolicyRule(plan.clients[0], "*", ["*"])]
        chain = issue_cluster_manifest(
            name="local", members=members, rules=rules, operators=[operator.signing], domain_level=1
        )
        write_private(self.path / "cluster.manifest", chain)
        pin = chain_pin(chain).hex()
        for name in plan.clients:
            _write_client(self.path / "clients" / name, pin)
        return pin

    def _balancer_member(self, name: str, port: int, publish_port: int) -> Member:
        identity: Identity = create_identity(_folder(self.path / name) / "identity.toml", name, "balancer")
        return identity.member(endpoint=_loopback(port), publish_endpoint=_loopback(publish_port))

    def _write_node(self, name: str, pin: str, owner: str) -> None:
        """Write a node's configuration; ``owner`` is the node whose token it uses, itself maybe."""
        # Fresh processes cost CPU time, and here all nodes share one machine.
        token = {"label": owner, "pin": f"file:../../secrets/{owner}.pin", "fresh_canary_every_s": 300.0}
        if owner != name:
            token["shared_with"] = f"../{owner}/data"
        write_toml(
            self.path / "nodes" / name / "node.toml",
            {
                "version": 1,
                "identity": "identity.toml",
                "manifest": "../../cluster.manifest",
                "manifest_pin": pin,
                "data": "data",
                "token": token,
            },
        )

    def _init_tokens(self, names: Sequence[str]) -> None:
        """Have every node make its token, its PIN and its KEK, all at once."""
        self._tell("making the tokens")
        path = _folder(self.path / "run") / "init.log"
        command = [sys.executable, "-P", "-m", "nodes", "init", "--unchecked"]
        for name in names:
            command += ["--config", str(self.path / "nodes" / name / "node.toml")]
        with _private_log(path) as log:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            code = child.wait(self._start_timeout_s)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"the tokens were not made within {self._start_timeout_s:g} s") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if code:
            tail = path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
            raise ClusterError(f"the tokens could not be made (exit code {code}):\n{tail}")


@dataclass(frozen=True, slots=True)
class _Plan:
    nodes: int
    threshold: int
    shares: int
    domains: int
    nodes_per_token: int
    clients: tuple[str, ...]
    rules: Sequence[PolicyRule] | None
    balancer: Mapping[str, object]
    balancers: int


def _balancer_names(balancers: int) -> list[str]:
    return [BALANCER, *(f"{BALANCER}{number}" for number in range(2, balancers + 1))]


def _check_size(nodes: int, threshold: int, shares: int, domains: int, clients: Sequence[str]) -> None:
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(f"{nodes} nodes; a local cluster has 1 to {MAX_NODES}")
    check_share_counts(threshold, shares)
    if shares > nodes:
        raise ValueError(f"{shares} shares; the cluster has {nodes} nodes, and each holds one share of a key at most")
    if not 1 <= domains <= MAX_NODES:
        raise ValueError(f"{domains} domains; 1 to {MAX_NODES} are allowed")
    if isinstance(clients, str) or not clients or len(set(clients)) != len(clients):
        raise ValueError("clients must be a list of one name or more, each once")


def _answers(channel: Channel, name: str) -> bool:
    """Whether a member answers at all; a refusal is an answer too."""
    try:
        channel.call(name, RequestType.STATUS, REQUEST_CODECS[RequestType.STATUS].encode(Empty()), PROBE_S)
    except EngineError:
        time.sleep(0.02)
        return False
    return True


def _folder(path: Path) -> Path:
    """The folder, made with mode 0700 like each one above it that is missing."""
    for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    return path


def _remove_parts(path: Path) -> None:
    folders = [path / name for name in ("nodes", "clients", "operator", "secrets", "run")]
    for folder in (*folders, *path.glob(f"{BALANCER}*")):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("cluster.manifest", "cluster.toml"):
        (path / name).unlink(missing_ok=True)


def _write_client(folder: Path, pin: str) -> None:
    write_toml(
        folder / "client.toml",
        {"version": 1, "identity": "identity.toml", "manifest": "../../cluster.manifest", "manifest_pin": pin},
    )


def _private_log(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def _loopback(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def _endpoints(member: Member) -> list[str]:
    return [each for each in (member.endpoint, member.publish_endpoint) if each]


def _fresh_name(cluster: Cluster) -> str:
    """A name that no member of any manifest had: what a node signed once is known by its name for ever."""
    known = {name for name, _ in cluster.past}
    number = len(cluster.nodes) + 1
    while f"node{number}" in known:
        number += 1
    return f"node{number}"


def _fresh_location(cluster: Cluster) -> str:
    """A host of its own in a rack of its own, at the site with the fewest nodes."""
    places = [place.path for place in cluster.locations]
    sites = Counter(path[0] for path in places)
    site = min(sites, key=lambda each: (sites[each], each))
    numbers = (part.lstrip(ascii_letters) for path in places for part in path[1:])
    rack = 1 + max((int(each) for each in numbers if each.isdecimal()), default=0)
    return f"{site}/room1/rack{rack}/host{rack}"


def _free_port(held: contextlib.ExitStack, taken: Collection[int] = ()) -> int:
    """A free port, which stays bound as long as ``held`` is open, so that no one else takes it meanwhile.

    None of those ``taken``, whose processes may not run now.
    """
    for _ in range(PORT_TRIES):
        port = random.choice(PORTS)  # noqa: S311 - any will do
        if port in taken:
            continue
        bound = socket.socket()
        try:
            bound.bind(("127.0.0.1", port))
        except OSError:
            bound.close()
            continue
        held.callback(bound.close)
        return port
    raise ClusterError(f"no free port found in {PORTS.start}..{PORTS.stop - 1} after {PORT_TRIES} tries")


def _boot_id() -> str:
    """This boot of the machine: a pid file of an earlier boot says nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
