"""Owns what a measurement of the data path stands on: a real cluster, peers, pinning, rotation, the machine's noise.

Peers are the same operation straight on a SoftHSM token through python-pkcs11 (session keys), an echo over a bare CURVE
socket, and p11-kit's remoting over a unix socket. It knows no target; ``datapath`` and ``soak`` do. All that it starts
it ends. Times are in microseconds unless a name says otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import pkcs11
import zmq
from pkcs11 import Attribute, KeyType, Mechanism
from pkcs11.mechanisms import GCMParams
from pkcs11.util.ec import encode_named_curve_parameters

import engine
from engine import Engine, LocalCluster, PolicyRule
from engine.protocol.requests import NodeStatus
from nodes.config import PinSource, TokenConfig, load_node_config
from nodes.token import Lane, Token, initialize_token

HERE: Final = Path(__file__).resolve().parent
KEYS: Final = {
    "gcm": "aes-256-gcm",
    "sign": "ecdsa-p256-sha256",
    "rsa": "rsa-2048-pkcs1-sha256",
    "mac": "hmac-sha256",
}
"""The keys of the cluster, 3-of-5 each, by the name of what is done with them."""
DATA: Final = bytes(range(256)) * 4
DIGEST: Final = hashlib.sha256(DATA).digest()
DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420") + DIGEST
CLIENTS: Final = 8
P11_CLIENT: Final = ("/usr/lib/{}-linux-gnu/pkcs11/p11-kit-client.so", "/usr/lib64/pkcs11/p11-kit-client.so")
TICKS: Final = os.sysconf("SC_CLK_TCK")
START_S: Final = 30.0

T = TypeVar("T")


class MissingPeer(Exception):
    """A peer that this machine lacks, and the Debian packages that have it."""


# --- the machine ------------------------------------------------------------------------------------------------------


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/pid/stat behind the command's name; None for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def family(root: int) -> list[int]:
    """A process and all that descend from it, the oldest first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def pin(pids: Iterable[int], cpus: Iterable[int]) -> None:
    """Let processes, with all their threads and descendants, run on these CPUs alone."""
    allowed = set(cpus)
    for member in {each for pid in pids for each in family(pid)}:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{member}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task), allowed)


def pss_kib(pid: int) -> int:
    """Memory of a process, shared pages by their share; RSS where that may not be read."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        )
    except OSError:
        return 0


def descriptors(pid: int) -> int:
    """How many file descriptors a process has open; 0 for one that is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def thread_times(pid: int) -> dict[str, float]:
    """CPU time of a process in microseconds, of its main thread, of libzmq's and of its other ones."""
    found = dict.fromkeys(("main", "libzmq", "others"), 0.0)
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{pid}/task/{task}")
            name = (folder / "comm").read_text(encoding="ascii", errors="replace")
            kind = "main" if int(task) == pid else "libzmq" if name.startswith("ZMQ") else "others"
            found[kind] += int((folder / "schedstat").read_text(encoding="ascii").split()[0]) / 1000
    return found


@dataclass(frozen=True, slots=True)
class Noise:
    """Percent of the machine's CPU time that others used, and that the hypervisor took."""

    foreign: float
    steal: float


class NoiseMeter:
    """Counts from its making on what the machine did that was not ours."""

    def __init__(self) -> None:
        self._begun = self._read()

    @staticmethod
    def _read() -> tuple[int, int, int, int]:
        """Ticks: all, busy, stolen, ours (of us and of all that descend from us, ended ones too)."""
        with open("/proc/stat", encoding="ascii") as stream:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, stream.readline().split()[1:9])
        busy = user + nice + system + irq + softirq
        ours = 0
        for pid in family(os.getpid()):
            if (fields := _stat(pid)) is not None:
                ours += sum(map(int, fields[11:15]))
        return busy + idle + iowait + steal, busy, steal, ours

    def noise(self) -> Noise:
        """What it was so far."""
        every, busy, steal, ours = (now - then for now, then in zip(self._read(), self._begun, strict=True))
        return Noise(100 * max(0, busy - ours) / max(1, every), 100 * steal / max(1, every))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = "unknown"
    with contextlib.suppress(OSError, StopIteration):
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        model = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "libzmq": zmq.zmq_version(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
    }


# --- rotation ---------------------------------------------------------------------------------------------------------


Rounds = dict[str, list[list[float]]]
"""Contender -> rounds -> what each operation of that round's block took."""


def rotate(contenders: Mapping[str, Callable[[], object] | CClient], rounds: int, block: int) -> Rounds:
    """Blocks of each contender in turn, the order reversed each round; a first block of each is thrown away.

    The client in C times its own operations, as many as it was started for.
    """
    names = list(contenders)
    found: Rounds = {name: [] for name in names}
    clock = time.perf_counter_ns
    for number in range(-1, rounds):
        gc.collect()
        for name in names if number % 2 else reversed(names):
            act = contenders[name]
            if isinstance(act, CClient):
                taken = act.block()
            else:
                taken = []
                for _ in range(block):
                    begun = clock()
                    act()
                    taken.append((clock() - begun) / 1000)
            if number >= 0:
                found[name].append(taken)
    return found


def medians(measured: Rounds, name: str) -> list[float]:
    """The median of each round."""
    return [statistics.median(each) for each in measured[name]]


def median_ratio(tops: Sequence[float], bottoms: Sequence[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(top / bottom for top, bottom in zip(tops, bottoms, strict=True))


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which ``share`` of them are, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# --- many at a time ---------------------------------------------------------------------------------------------------


def in_threads(run: Callable[[int], None], count: int) -> None:
    """Run in so many threads, this one among them, and raise the first failure of any."""
    failures: list[Exception] = []

    def guarded(index: int) -> None:
        try:
            run(index)
        except Exception as error:
            failures.append(error)

    gc.collect()
    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(1, count)]
    for thread in threads:
        thread.start()
    guarded(0)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def open_loop(due: Iterable[tuple[float, T]], act: Callable[[float, T], None], threads: int) -> None:
    """Do each at its monotonic time, in order, or as soon after that as one of the threads is free."""
    order = iter(due)
    lock = threading.Lock()

    def run(_: int) -> None:
        while True:
            with lock:
                each = next(order, None)
            if each is None:
                return
            ahead = each[0] - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            act(*each)

    in_threads(run, threads)


# --- the peers --------------------------------------------------------------------------------------------------------


def _new_token(folder: Path, label: str, module: Path) -> TokenConfig:
    config = TokenConfig(module, label, PinSource("file", str(folder / "pin")))
    (folder / "data").mkdir(parents=True)
    initialize_token(config, folder / "data")
    return config


class Uses:
    """The operations of a PKCS#11 session on session keys, through python-pkcs11, as a program without us does them."""

    def __init__(self, session: Any) -> None:
        self._session = session
        curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        self._ec = session.create_domain_parameters(KeyType.EC, curve, local=True).generate_keypair(store=False)
        self._rsa = session.generate_keypair(KeyType.RSA, 2048, store=False)
        self._aes: Any = None

    def sign(self) -> bytes:
        """ECDSA P-256 of a digest."""
        return bytes(self._ec[1].sign(DIGEST, mechanism=Mechanism.ECDSA))

    def rsa(self) -> bytes:
        """RSA-2048, PKCS#1 v1.5 with SHA-256, of a digest."""
        return bytes(self._rsa[1].sign(DIGEST_INFO, mechanism=Mechanism.RSA_PKCS))

    def gcm(self) -> bytes:
        """AES-256-GCM of 1 KiB with a random nonce, as a node does it."""
        if self._aes is None:
            self._aes = self._session.generate_key(KeyType.AES, 256, store=False)
        nonce = os.urandom(12)
        return nonce + bytes(
            self._aes.encrypt(DATA, mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(nonce, b"", 128))
        )

    def check(self) -> None:
        """Whether signatures verify: a peer that does less work than ours is none."""
        assert self._ec[0].verify(DIGEST, self.sign(), mechanism=Mechanism.ECDSA)
        assert self._rsa[0].verify(DIGEST_INFO, self.rsa(), mechanism=Mechanism.RSA_PKCS)


class Echo:
    """An echo over a bare CURVE socket to another process: 256 bytes there, 128 back."""

    SERVER: Final = """
import sys, threading, zmq
context = zmq.Context()
socket = context.socket(zmq.ROUTER)
public, secret = zmq.curve_keypair()
socket.curve_server, socket.curve_secretkey, socket.curve_publickey = True, secret, public
port = socket.bind_to_random_port("tcp://127.0.0.1")
print(port, public.decode(), flush=True)
def end():
    sys.stdin.read()
    context.term()
threading.Thread(target=end, daemon=True).start()
reply = bytes(int(sys.argv[1]))
try:
    while True:
        route, _ = socket.recv_multipart()
        socket.send_multipart([route, reply])
except zmq.ContextTerminated:
    socket.close(0)
"""

    def __init__(self, request_bytes: int = 256, reply_bytes: int = 128) -> None:
        self._request = bytes(request_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SERVER, str(reply_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        port, server_key = self._process.stdout.readline().split()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_serverkey = server_key.encode()
        self._socket.rcvtimeo = 10_000
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self.exchange()

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def exchange(self) -> bytes:
        """One round trip."""
        self._socket.send(self._request)
        return self._socket.recv()

    def close(self) -> None:
        """End the server."""
        self._context.destroy(linger=0)
        end_process(self._process)


class P11Kit:
    """A p11-kit server that lends a token of its own over a unix socket; each connection gets a process there."""

    def __init__(self, folder: Path, module: Path) -> None:
        if shutil.which("p11-kit") is None:
            raise MissingPeer("p11-kit is not installed; Debian's packages are p11-kit and p11-kit-modules")
        self.client_module = _p11_client()
        config = _new_token(folder, "peer", module)
        self.pin_file = Path(config.pin.place)
        # A unix socket's path has room for 107 bytes, which a folder for temporary files may need by itself.
        self._place = tempfile.TemporaryDirectory(prefix="keyquorum-", dir="/tmp")
        self.socket = Path(self._place.name) / "socket"
        environment = {**os.environ, "SOFTHSM2_CONF": str(folder / "data" / "softhsm2.conf")}
        command = ["p11-kit", "server", "--foreground", "--provider", str(module), "--name", str(self.socket)]
        self._process = subprocess.Popen(
            [*command, "pkcs11:token=peer"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + START_S
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise MissingPeer("p11-kit server did not start")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def close(self) -> None:
        """End the server, after our own connection and those of clients that have gone."""
        pkcs11.unload(self.client_module)
        until = time.monotonic() + 2
        while len(family(self.pid)) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        end_process(self._process)
        self._place.cleanup()


def _p11_client() -> str:
    for pattern in P11_CLIENT:
        path = pattern.format(os.uname().machine)
        if Path(path).exists():
            return path
    raise MissingPeer("p11-kit-client.so is not installed; Debian's package is p11-kit-modules")


def p11_uses(module: str, socket: str, pin_file: str) -> Uses:
    """A client's session over p11-kit's remoting, with keys of its own."""
    os.environ["P11_KIT_SERVER_ADDRESS"] = f"unix:path={socket}"
    until = time.monotonic() + START_S
    # When many connect at once its server shows some of them no token at all, or opens no session for them.
    while True:
        token = next(iter(pkcs11.lib(module).get_tokens()), None)
        problem = "shows no token"
        if token is not None:
            try:
                return Uses(token.open(user_pin=Path(pin_file).read_text(encoding="ascii").strip()))
            except pkcs11.exceptions.PKCS11Error as error:
                problem = f"opens no session: {type(error).__name__}"
        if time.monotonic() > until:
            raise MissingPeer(f"p11-kit's server {problem}")
        pkcs11.unload(module)
        time.sleep(0.05)


def end_process(process: subprocess.Popen[Any]) -> None:
    """End a process of ours: its input first, then SIGTERM, then SIGKILL."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    if process.stdin is None:
        process.terminate()
    for end in (process.terminate, process.kill, lambda: None):
        try:
            process.wait(5)
            break
        except subprocess.TimeoutExpired:
            end()
    if process.stdout is not None:
        process.stdout.close()


class CClient:
    """The example client in C at one operation with one key: it does and times a block of them for each line."""

    def __init__(self, program: Path, config: Path, operation: str, key: str, block: int, *options: str) -> None:
        self._process = subprocess.Popen(
            [str(program), "--config", str(config), "latency", operation, key, str(block), "--rounds", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def build(folder: Path) -> Path:
        """The program, out of examples/c."""
        command = ["make", "-C", str(HERE.parent / "examples" / "c"), f"OUT={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MissingPeer(f"examples/c can't be built (its Makefile names Debian's packages):\n{done.stderr}")
        return folder / "kq-client"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def block(self) -> list[float]:
        """What each operation of a block took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client in C ended (exit code {self._process.wait()})")
        return [float(each) for each in line.split()]

    def close(self) -> None:
        """End it."""
        end_process(self._process)


class Crew:
    """Client processes that wait for orders (``worker.py``), each with an identity of its own."""

    def __init__(self, cluster: LocalCluster, names: Sequence[str], p11: P11Kit | None) -> None:
        peer = [p11.client_module, str(p11.socket), str(p11.pin_file)] if p11 is not None else []
        self._workers = [
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(cluster.client_config_of(name)), *peer],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in names
        ]

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return [worker.pid for worker in self._workers]

    def order(self, do: str, *, only: int | None = None, **arguments: Any) -> list[dict[str, Any]]:
        """Have all (or the first ``only``) do something at the same time, and wait for what they say."""
        chosen = self._workers[:only]
        start = time.monotonic() + 0.05
        for number, worker in enumerate(chosen):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps({"do": do, "start": start, "number": number, **arguments}) + "\n")
            worker.stdin.flush()
        said = []
        for worker in chosen:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"a client process ended during {do!r} (exit code {worker.wait()})")
            said.append(json.loads(line))
        return said

    def rate(self, **arguments: Any) -> float:
        """Operations a second of all together, in a closed loop."""
        return sum(each["operations"] / each["seconds"] for each in self.order("closed", **arguments))

    def close(self) -> None:
        """End them."""
        for worker in self._workers:
            end_process(worker)


class Pair:
    """Two nodes on one token, keys that one or both of them serve, and eight client processes."""

    SUFFIXES: Final = {1: "-one", 2: "-both"}
    """How many nodes serve a key -> what follows its name."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise

    def _set_up(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="keyquorum-bench-")))
        names = [f"client{number}" for number in range(CLIENTS)]
        rules = [PolicyRule(name, "*", ["*"]) for name in names]
        self.cluster: LocalCluster = self._stack.enter_context(
            LocalCluster(nodes=2, threshold=1, path=folder / "kq", nodes_per_token=2, clients=names, rules=rules)
        )
        self.kq: Engine = self._stack.enter_context(engine.connect(self.cluster.client_config))
        # Holders alone combine, so a key's holders are the nodes that serve it. A warm use needs no share.
        for shares, suffix in self.SUFFIXES.items():
            for name in ("gcm", "sign", "rsa"):
                self.kq.create_key(name + suffix, KEYS[name], threshold=1, shares=shares, timeout=60)
        self.crew = Crew(self.cluster, names, None)
        self._stack.callback(self.crew.close)
        for suffix in self.SUFFIXES.values():
            self.crew.order("add_keys", suffix=suffix)

    def hits(self) -> dict[str, int]:
        """How often each node found a loaded key."""
        return {
            member.name: sum(each.hits for each in member.status.caches if each.cache == "keys")
            for member in self.kq.status()
            if isinstance(member.status, NodeStatus)
        }

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


# --- all of it --------------------------------------------------------------------------------------------------------


class Rig:
    """A cluster of five nodes with its keys, one client in this process, and the peers, alive together."""

    PLACEMENTS: Final = {"one": "one core", "two": "two cores", "free": "unpinned"}

    def __init__(self, *, with_p11: bool = True) -> None:
        self._stack = contextlib.ExitStack()
        self.cpus = sorted(os.sched_getaffinity(0))
        """The CPUs there are to run on."""
        self._crew: Crew | None = None
        try:
            self._set_up(with_p11)
        except BaseException:
            self.close()
            raise

    def _set_up(self, with_p11: bool) -> None:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="keyquorum-bench-")))
        names = ["bench", *(f"client{number}" for number in range(CLIENTS))]
        rules = [PolicyRule(name, "*", ["*"]) for name in names]
        self.cluster: LocalCluster = self._stack.enter_context(
            LocalCluster(nodes=5, threshold=3, path=self.folder / "kq", clients=names, rules=rules)
        )
        self.kq: Engine = self._stack.enter_context(engine.connect(self.cluster.client_config))
        for name, algorithm in KEYS.items():
            self.kq.create_key(name, algorithm, threshold=3, shares=5, timeout=60)
        module = load_node_config(self.cluster.path / "nodes" / self.cluster.nodes[0] / "node.toml").token.module
        self.p11: P11Kit | None = None
        self.p11_uses: Uses | None = None
        if with_p11:
            self.p11 = P11Kit(self.folder / "p11", module)
            self._stack.callback(self.p11.close)
            self.p11_uses = p11_uses(self.p11.client_module, str(self.p11.socket), str(self.p11.pin_file))
            self.p11_uses.check()
        # The last token that is made in this process: making one begins SoftHSM anew, and ends all sessions.
        config = _new_token(self.folder / "token", "bench", module)
        self.token = Token(config, self.folder / "token" / "data")
        self.lane: Lane = self.token.lane()
        session = pkcs11.lib(str(module)).get_token(token_label="bench").open()  # noqa: S106 - a label
        self.straight = Uses(session)
        self.straight.check()
        self.echo = Echo()
        self._stack.callback(self.echo.close)
        self._check_ours()

    def _check_ours(self) -> None:
        """One use of each key, verified: so that what is measured is right, and loaded."""
        self.kq.verify("sign", None, self.kq.sign("sign", digest=DIGEST), digest=DIGEST)
        self.kq.verify("rsa", None, self.kq.sign("rsa", digest=DIGEST), digest=DIGEST)
        assert self.kq.decrypt("gcm", self.kq.encrypt("gcm", DATA)) == DATA

    @contextlib.contextmanager
    def c_clients(self, block: int) -> Iterator[dict[str, CClient]]:
        """Clients in C at what the warm rows measure, by the name of the key."""
        program = CClient.build(self.folder / "c")
        with contextlib.ExitStack() as stack:
            made = {}
            uses = {"sign": ("sign", "--digested", "--size", "32"), "gcm": ("encrypt", "--size", str(len(DATA)))}
            for key, (operation, *options) in uses.items():
                made[key] = CClient(program, self.cluster.client_config, operation, key, block, *options)
                stack.callback(made[key].close)
            yield made

    @property
    def crew(self) -> Crew:
        """Eight client processes, started when first asked for."""
        if self._crew is None:
            self._crew = Crew(self.cluster, self.cluster.clients[1:], self.p11)
            self._stack.callback(self._crew.close)
            self._crew.order("warm")
        return self._crew

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- who runs where ---

    def node_pids(self) -> dict[str, int]:
        """The processes of the nodes by name."""
        return {
            name: pid for name, pid in self.cluster.running().items() if pid is not None and name in self.cluster.nodes
        }

    def serving_pids(self) -> dict[str, int]:
        """The processes of the nodes that serve, below their supervisors."""
        serving = self.cluster.serving()
        return {name: pid for name in self.cluster.nodes if (pid := serving[name]) is not None}

    def combiners(self, acts: Iterable[Callable[[], object]]) -> list[str]:
        """The nodes that serve these operations now, by the hits of their caches of loaded keys."""
        before = self._hits()
        for act in acts:
            for _ in range(8):
                act()
        after = self._hits()
        # Holders that only answer a question of ours have no hits on loaded keys.
        return [name for name in after if after[name] - before.get(name, 0) >= 8]

    def _hits(self) -> dict[str, int]:
        found = {}
        for member in self.kq.status():
            caches = getattr(member.status, "caches", None) or []
            found[member.name] = sum(each.hits for each in caches if each.cache == "keys")
        return found

    @contextlib.contextmanager
    def placed(
        self,
        placement: str,
        acts: Iterable[Callable[[], object]] = (),
        *,
        crew: bool = False,
        clients: Iterable[CClient] = (),
    ) -> Iterator[None]:
        """Clients and nodes on one core, on two, or where the scheduler puts them.

        The servers of the echo and of p11-kit are where the nodes are. With ``acts`` only the nodes that serve these
        are, and the others have what is left; without, all are, so that it is the same whichever of them serves. With
        ``crew`` the clients are the crew's; ``clients`` in C are where ours are.
        """
        first, second = self.cpus[0], self.cpus[1] if len(self.cpus) > 1 else self.cpus[0]
        rest = set(self.cpus[2:]) or ({second} if placement == "one" else set(self.cpus))
        client, server = {"one": ({first}, {first}), "two": ({first}, {second})}.get(placement, (set(self.cpus),) * 2)
        members = {name: pid for name, pid in self.cluster.running().items() if pid is not None}
        serving = self.combiners(acts) if acts else self.cluster.nodes
        servers = [pid for name, pid in self.node_pids().items() if name in serving]
        peers = [self.echo.pid, *([self.p11.pid] if self.p11 else [])]
        try:
            if placement != "free":
                pin(members.values(), rest)
                pin([*servers, *peers], server)
                pin([*(self.crew.pids if crew else []), *(each.pid for each in clients)], client)
                for task in os.listdir("/proc/self/task"):
                    os.sched_setaffinity(int(task), client)
            yield
        finally:
            pin([os.getpid()], self.cpus)
