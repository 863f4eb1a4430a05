"""Bounds on connections and on what they keep in memory, with real sockets in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import zmq
from curve_client import CurveClient
from ports import free_port
from structlog.testing import capture_logs

from engine.client.admission import ServiceLimits
from engine.client.config import Identity, create_identity, load_identity
from engine.client.connections import connections_allowed
from engine.client.listener import LEAVE_S, Listener, listen
from engine.client.publications import end_connection, peer_of
from engine.client.transport import Channel, ask, connect_options, raise_for_status
from engine.errors import DeadlineExceeded, NodeUnavailable, Overloaded
from engine.protocol.manifest import PolicyRule, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.requests import HELLO, REQUEST_CODECS, Hello
from engine.protocol.wire import PROTOCOL_VERSION, Request, Status, reply_codec, request_codec

SERVER = """
import json, resource, structlog, sys, time
from pathlib import Path
from engine.client.admission import Admission, ServiceLimits, welcome
from engine.client.config import load_cluster, load_identity
from engine.client.listener import Listener
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
folder, pin, limits, files = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
identity, cluster = load_identity(folder / "n1.toml"), load_cluster(folder / "cluster.manifest", pin)
limits = ServiceLimits(**limits)
listener = Listener(identity.transport, cluster.members["n1"].endpoint, cluster, limits)
admission = Admission(limits)
listener.router.watch(sys.stdin.fileno(), 4)
print("ready", flush=True)
while True:
    if listener.router.poll(50) & 4:
        if not sys.stdin.readline():
            break
        counts = listener.counts(admission)
        resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        told = {"connections": counts.connections, "most": counts.connections_max, "cut": counts.cut}
        told |= {"undeliverable": counts.undeliverable, "resident": resident}
        print(json.dumps(told), flush=True)
    listener.look()
    for _ in range(256):
        incoming = listener.receive()
        if incoming is None:
            break
        if "never" in incoming.request.extensions:
            continue
        hello = REQUEST_CODECS["hello"].decode(incoming.request.body)
        told = welcome(hello, "n1", bytes(16), cluster, listener.limits)
        body = REPLY_CODECS["hello"].encode(told) + bytes(int(incoming.request.extensions.get("pad", b"0")))
        listener.reply(incoming, 0, body)
"""
FOLDER_CLIENTS = ("app", "other")


class Counts:
    """Asks the process for its counts."""

    def __init__(self, pid: int, commands: IO[str], output: IO[str]) -> None:
        self.pid, self._commands, self._output = pid, commands, output

    def __call__(self) -> dict[str, int]:
        self._commands.write("counts\n")
        self._commands.flush()
        told: dict[str, int] = json.loads(self._output.readline())
        return told


class Site:
    """A node's listener in a process, and its clients."""

    def __init__(self, folder: Path) -> None:
        operator = create_identity(folder / "op.toml", "op", "operator", passphrase="p")
        node = create_identity(folder / "n1.toml", "n1", "node")
        self.clients: dict[str, Identity] = {
            name: create_identity(folder / f"{name}.toml", name, "client") for name in FOLDER_CLIENTS
        }
        members = [
            operator.member(),
            node.member(endpoint=f"tcp://127.0.0.1:{free_port()}", location="a/b"),
            *(each.member() for each in self.clients.values()),
        ]
        chain = issue_cluster_manifest(
            name="test", members=members, rules=[PolicyRule("*", "*", ["*"])], operators=[operator.signing]
        )
        (folder / "cluster.manifest").write_bytes(chain)
        self.folder, self.pin = folder, chain_pin(chain).hex()
        self.cluster = open_chain(chain, chain_pin(chain))
        self.member = self.cluster.members["n1"]

    def channel(self, name: str = "other") -> Channel:
        return Channel(self.clients[name].transport, self.cluster.nodes)

    def served(self, name: str = "other") -> bool:
        """Whether somebody new is served."""
        with self.channel(name) as channel:
            try:
                return bool(ask(channel, "n1", HELLO, Hello(PROTOCOL_VERSION, "t"), 5.0).name == "n1")
            except NodeUnavailable:
                return False

    @contextmanager
    def serving(self, files: int = 1024, **limits: Any) -> Iterator[Counts]:
        """The process; what it gives tells its counts."""
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.folder), self.pin, json.dumps(limits), str(files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        output, commands = process.stdout, process.stdin

        try:
            assert output.readline() == "ready\n"
            yield Counts(process.pid, commands, output)
            assert process.poll() is None
        finally:
            process.kill()
            process.communicate(timeout=20)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


Dealers = Callable[..., zmq.Socket[bytes]]


@pytest.fixture
def dealer(site: Site) -> Iterator[Dealers]:
    """Makes connected sockets of a client."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make(name: str = "app") -> zmq.Socket[bytes]:
        one: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        made.append(one)
        connect_options(one, site.clients[name].transport, site.member)
        one.connect(site.member.endpoint)
        return one

    yield make
    for each in made:
        each.close(0)
    context.term()


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def hello(number: int, pad: int = 0) -> bytes:
    body = REQUEST_CODECS[HELLO].encode(Hello(PROTOCOL_VERSION, "t"))
    extensions = {"pad": str(pad).encode()} if pad else {}
    return request_codec.encode(Request(PROTOCOL_VERSION, number, HELLO, 5_000, body, extensions))


def test_strangers_without_end_leave_room_for_members(site: Site) -> None:
    """Far more connections than descriptors: those that never said anything go, and a member gets in."""
    with site.serving(files=300) as counts:
        most = counts()["most"]
        assert 16 < most < 250
        host, port = site.member.endpoint.removeprefix("tcp://").rsplit(":", 1)
        held: list[socket.socket] = []
        try:
            for _ in range(3 * most):
                held.append(socket.socket())
                held[-1].setblocking(False)
                held[-1].connect_ex((host, int(port)))
                time.sleep(0.001)
            until(lambda: counts()["cut"] > 0)
            assert until(site.served)
            assert counts()["connections"] <= 300
        finally:
            for each in held:
                each.close()
        until(lambda: counts()["connections"] < most)


def test_at_the_bound_no_connection_is_accepted_and_those_that_are_there_are_served(
    site: Site, dealer: Dealers
) -> None:
    with site.serving(connections=8) as counts:
        inside = [dealer() for _ in range(8)]
        for each in inside:
            each.send(hello(1))
            assert each.poll(10_000)
            each.recv()
        time.sleep(0.5)
        assert not site.served()
        for each in inside:
            each.send(hello(2))
            assert each.poll(10_000)
            each.recv()
        assert counts()["connections"] == 8
        for each in inside[:4]:
            each.close(0)
        assert until(site.served)


def test_a_members_connections_are_bounded_and_anothers_are_not_touched(site: Site, dealer: Dealers) -> None:
    with site.serving(member_connections=4) as counts:
        inside = [dealer() for _ in range(4)]
        for each in inside:
            each.send(hello(1))
            assert each.poll(10_000)
            each.recv()
        surplus = dealer()
        surplus.send(hello(1))
        assert surplus.poll(10_000)
        with pytest.raises(Overloaded, match=r"'app' has limits.member_connections = 4 already"):
            raise_for_status(reply_codec.decode(surplus.recv()))
        assert site.served("other")
        until(lambda: counts()["cut"] >= 1)
        for each in inside:
            each.send(hello(2))
            assert each.poll(10_000)


def took(client: CurveClient, frames: list[bytes]) -> bool:
    """Whether the server takes that many frames of one message."""
    try:
        for frame in frames:
            client.send(frame, more=True)
    except OSError:
        return False
    return True


def test_a_message_that_never_ends_is_cut_off_and_others_are_served(site: Site) -> None:
    """What came of it is not kept, so it takes no memory."""
    with site.serving() as counts:
        assert site.served()
        before = highest = counts()["resident"]
        frame = bytes(60_000)
        for _ in range(20):
            attacker = CurveClient(site.clients["app"].transport, site.member)
            assert not took(attacker, [frame] * 2_000)
            attacker.close()
            highest = max(highest, counts()["resident"])
        assert highest - before < 8_000_000
        assert site.served()
        until(lambda: counts()["connections"] <= 1)


def test_frames_that_do_not_end_keep_one_message_each(site: Site) -> None:
    """A member may leave every one of its connections in the middle of the longest frame."""
    with site.serving(files=1024, member_connections=200) as counts:
        before = counts()["resident"]
        attackers = [CurveClient(site.clients["app"].transport, site.member) for _ in range(100)]
        for each in attackers:
            each.socket.sendall(b"\x02" + (65_600).to_bytes(8, "big") + bytes(65_000))
        assert site.served()
        assert counts()["resident"] - before < 100 * 200_000
        for each in attackers:
            each.close()
        until(lambda: counts()["connections"] <= 1)


def test_who_does_not_read_loses_its_own_replies_and_pins_a_bounded_amount(site: Site, dealer: Dealers) -> None:
    with site.serving(connection_requests=16) as counts:
        deaf = dealer()
        deaf.rcvhwm = 1
        for number in range(1, 2_000):
            deaf.send(hello(number, 60_000))
            if number % 100 == 0 and counts()["undeliverable"]:
                break
            time.sleep(0.0005)
        until(lambda: counts()["undeliverable"] > 0)
        assert site.served()
        assert counts()["resident"] < 600_000_000


def test_who_reads_loses_no_reply_with_as_many_under_way_as_allowed(site: Site, dealer: Dealers) -> None:
    with site.serving(connection_requests=64) as counts:
        reader = dealer()
        sent = answered = 0
        while answered < 5_000:
            while sent < 5_000 and sent - answered < 64:
                sent += 1
                reader.send(hello(sent))
            assert reader.poll(10_000), (sent, answered)
            reader.recv()
            answered += 1
        assert counts()["undeliverable"] == 0


def test_a_stopped_member_is_noticed_by_who_is_watchful(site: Site) -> None:
    """By its silence while it owes a reply; a client waits for its own deadline."""
    with (
        site.serving() as counts,
        Channel(site.clients["other"].transport, site.cluster.nodes, watchful=True) as node_like,
        site.channel("app") as client,
    ):
        for each in (node_like, client):
            ask(each, "n1", HELLO, Hello(PROTOCOL_VERSION, "t"), 5.0)
        body = REQUEST_CODECS[HELLO].encode(Hello(PROTOCOL_VERSION, "t"))
        os.kill(counts.pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            with pytest.raises(NodeUnavailable, match="silent for 750 ms"):
                node_like.call("n1", HELLO, body, 60.0)
            assert time.monotonic() - begun < 20  # far from the deadline
            with pytest.raises(NodeUnavailable, match="can't be reached"):
                node_like.call("n1", HELLO, body, 60.0)
            with pytest.raises(DeadlineExceeded):
                client.call("n1", HELLO, body, 1.5)
            assert client._connections["n1"].up
        finally:
            os.kill(counts.pid, signal.SIGCONT)
        assert until(lambda: site.served("app"))
        assert until(lambda: node_like.call("n1", HELLO, body, 5.0).status == Status.OK)


def test_a_member_that_is_slow_and_lives_is_waited_for(site: Site) -> None:
    """It is asked for a sign of life again and again, and gives it, though it never answers the request."""
    with (
        site.serving(),
        Channel(site.clients["other"].transport, site.cluster.nodes, watchful=True) as node_like,
    ):
        ask(node_like, "n1", HELLO, Hello(PROTOCOL_VERSION, "t"), 5.0)
        before = next(node_like._tokens)
        body = REQUEST_CODECS[HELLO].encode(Hello(PROTOCOL_VERSION, "t"))
        node_like.start("n1", HELLO, body, 3.0, {"never": b""})
        [arrival] = node_like.poll(5.0)
        assert isinstance(arrival.error, DeadlineExceeded)
        assert node_like._connections["n1"].up
        assert next(node_like._tokens) - before >= 4


def test_an_idle_connection_says_nothing(site: Site) -> None:
    with (
        site.serving(),
        Channel(site.clients["other"].transport, site.cluster.nodes, watchful=True) as node_like,
    ):
        ask(node_like, "n1", HELLO, Hello(PROTOCOL_VERSION, "t"), 5.0)
        before = next(node_like._tokens)
        assert node_like.poll(1.0) == []
        assert next(node_like._tokens) == before + 1
        assert node_like._connections["n1"].socket.heartbeat_ivl == 0


def test_an_endpoint_that_is_left_out_is_served_a_moment_more(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """So whoever takes the manifest a moment later goes on; what takes its place or comes back is bound at once."""
    real, later_s = time.monotonic, 0.0
    monkeypatch.setattr("engine.client.listener.time.monotonic", lambda: real() + later_s)
    pair = load_identity(site.folder / "n1.toml").transport
    first, second = (free_port() for _ in range(2))

    def listening() -> list[bool]:
        found = []
        for port in (first, second):
            with socket.socket() as probe:
                found.append(probe.connect_ex(("127.0.0.1", port)) == 0)
        return found

    listener = Listener(pair, f"tcp://127.0.0.1:{first}", site.cluster)
    try:
        listener.serve({f"tcp://127.0.0.1:{second}": pair})
        assert listening() == [True, True]
        later_s += LEAVE_S / 10
        listener.serve({f"tcp://127.0.0.1:{second}": pair})  # a manifest after it gives no more time
        listener.settle()
        assert listening() == [True, True]
        later_s += LEAVE_S
        listener.settle()
        assert until(lambda: listening() == [False, True])
        listener.serve({f"tcp://127.0.0.1:{first}": pair})
        listener.serve({f"tcp://127.0.0.1:{second}": pair, f"tcp://127.0.0.1:{first}": pair})
        later_s += LEAVE_S
        listener.settle()
        assert listening() == [True, True]
    finally:
        listener.close()


def test_an_endpoint_that_cannot_be_had_is_tried_again_and_ends_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are served meanwhile, and those that are left are left."""
    real, later_s = time.monotonic, 0.0
    monkeypatch.setattr("engine.client.listener.time.monotonic", lambda: real() + later_s)
    pair = load_identity(site.folder / "n1.toml").transport
    first, third = (free_port() for _ in range(2))
    listener = Listener(pair, f"tcp://127.0.0.1:{first}", site.cluster)

    def listening(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            second = holder.getsockname()[1]
            with capture_logs() as told:
                listener.serve({f"tcp://127.0.0.1:{port}": pair for port in (second, third)})
            assert [each["reason"] for each in told] == [f"can't bind tcp://127.0.0.1:{second}: Address already in use"]
            assert listening(first)
            assert listening(third)
            later_s += LEAVE_S
            listener.settle()
            assert until(lambda: not listening(first))
        listener.settle()
        assert listening(second)
        assert listening(third)
    finally:
        listener.close()


def test_a_moved_endpoint_of_the_same_port_keeps_its_connections(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the address that was left are cut, whatever their port."""
    real, later_s = time.monotonic, 0.0
    monkeypatch.setattr("engine.client.listener.time.monotonic", lambda: real() + later_s)
    pair = load_identity(site.folder / "n1.toml").transport
    port = free_port()
    listener = Listener(pair, f"tcp://127.0.0.1:{port}", site.cluster)
    try:
        listener.serve({f"tcp://127.0.0.2:{port}": pair})
        old, new = (socket.create_connection((host, port), timeout=10) for host in ("127.0.0.1", "127.0.0.2"))
        with old, new:
            assert until(lambda: (listener.router.poll(10), len(listener.connections) == 2)[1])
            later_s += LEAVE_S
            listener.settle()
            assert len(listener.connections) == 1
            assert old.recv(1000)[:1] == b"\xff"
            assert old.recv(1000) == b""
    finally:
        listener.close()


def test_one_connection_too_many_spares_those_of_others(site: Site) -> None:
    """What is by the shortest way stays so for all other connections."""
    pair = load_identity(site.folder / "n1.toml").transport
    limits = ServiceLimits(member_connections=1)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with closing(Listener(pair, endpoint, site.cluster, limits)) as listener:
        port = int(endpoint.rpartition(":")[2])
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3)]
        try:
            assert until(lambda: (listener.router.poll(10), len(listener.connections) == 3)[1])
            good, surplus, other = listener.router.connections
            assert not listener.connections.heard(good, "app")
            assert listener.connections.heard(surplus, "app")
            assert not listener.connections.heard(other, "other")
            told = [listener.connections.known(*each) for each in ((good, "app"), (surplus, "app"), (other, "other"))]
            assert told == [True, False, True]
        finally:
            for each in clients:
                each.close()


def test_a_connection_whose_host_is_gone_is_noticed() -> None:
    """The kernel asks after an idle one, and gives up one that takes no reply."""
    listening = listen("tcp://127.0.0.1:*", 4)
    listening.setblocking(True)
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, every, times = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + every * times == 120
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_the_number_follows_from_the_descriptors() -> None:
    most, backlog = connections_allowed(0, used=50)
    assert most > 0
    assert backlog > 0
    assert connections_allowed(5, used=50)[0] == 5
    assert connections_allowed(10**9, used=50)[0] == most


def test_a_process_with_too_few_descriptors_says_so() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "from engine.client.process import raise_file_limit\nraise_file_limit()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "the limit on open files (ulimit -n) is 100; at least 256 are needed" in done.stderr


def test_a_descriptor_that_was_closed_meanwhile_is_nothing_to_look_at() -> None:
    """libzmq closes a publication's connections beside: a look at one in between must not end the process."""
    reader, writer = os.pipe()
    for fd in (reader, 1_000_000):  # a file of another kind took its number; or none did
        assert peer_of(fd) is None
        end_connection(fd, ("127.0.0.1", 1))
    os.close(reader)
    os.close(writer)
