"""The judge of the fault matrix against histories with planted mistakes, and a short list of faults on real processes.

``make faults`` runs all of them; see docs/faults.md.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

sys.path.insert(0, str(Path(__file__).parent))

from controls import CONTROLS, try_control
from course import NO_BALANCER, NOTHING, ONE_NODE, Fault, Session, carry_out, close_session, make_session, unexpected
from harness import ports_behind
from history import UNFINISHED, Event, Finding, Key, count_errors, errors_of, judge, longest_gap
from matrix import DOCS, FAULTS, SEEDS, chosen, main, report, table
from ports import free_ports
from proxy import CUT, Network, Rule, flipped

SIGNER = Ed25519PrivateKey.generate()
PEM = SIGNER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
MATERIAL = bytes(range(32))


def done(verb: str, key: str, *, after: bool = False, **fields: bytes) -> Event:
    return Event(verb, key, 1.0, 2.0, after=after, **fields)


def failed(verb: str, key: str, error: str, *, after: bool = False, ended_s: float = 2.0) -> Event:
    return Event(verb, key, 1.0, ended_s, error, "because", after=after)


def a_good_history() -> tuple[list[Event], dict[str, Key]]:
    """Three keys that work, one destroyed, one whose creation failed and one that nobody knows of."""
    keys = {
        "data": Key("data", "aes-256-gcm", made=True),
        "mac": Key("mac", "hmac-sha256", MATERIAL, made=True),
        "sign": Key("sign", "ed25519", public_key=PEM, made=True),
        "gone": Key("gone", "aes-256-gcm", made=True, doomed_s=1.5, destroyed_s=1.6),
        "refused": Key("refused", "aes-256-gcm"),
        "unknown": Key("unknown", "aes-256-gcm"),
    }
    tag = hmac.digest(MATERIAL, b"m", hashlib.sha256)
    events = [
        done("create", "data"),
        done("encrypt", "data", sent=b"plain", got=b"cipher"),
        done("decrypt", "data", sent=b"cipher", got=b"plain"),
        done("mac", "mac", sent=b"m", got=tag),
        done("sign", "sign", sent=b"m", got=SIGNER.sign(b"m")),
        failed("verify-forged", "sign", "invalid-signature"),
        failed("create", "refused", "registry-unavailable"),
        failed("create", "unknown", UNFINISHED),
        done("public-key", "data", after=True),
        done("decrypt", "data", after=True, sent=b"cipher", got=b"plain"),
        done("mac", "mac", after=True, sent=b"m", got=tag),
        done("public-key", "sign", after=True, got=PEM),
        failed("public-key", "gone", "key-not-found", after=True),
        failed("public-key", "refused", "key-not-found", after=True),
        done("encrypt", "unknown", after=True, sent=b"x", got=b"y"),
    ]
    return events, keys


def kinds(found: list[Finding]) -> list[str]:
    return [finding.kind for finding in found]


def test_a_good_history_has_no_findings() -> None:
    assert judge(*a_good_history()) == []


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        (done("decrypt", "data", sent=b"cipher", got=b"plaim"), "wrong"),
        (done("decrypt", "data", sent=b"never made", got=b"plain"), "wrong"),
        (done("mac", "mac", sent=b"m", got=bytes(32)), "wrong"),
        (done("mac", "mac", sent=b"n", got=bytes(32)), "wrong"),
        (done("sign", "sign", sent=b"n", got=SIGNER.sign(b"m")), "wrong"),
        (done("verify-forged", "sign", sent=b"m", proof=b"s"), "wrong"),
        (done("public-key", "sign", after=True, got=b"another"), "wrong"),
        (failed("decrypt", "data", "invalid-tag"), "wrong"),
        (failed("verify", "sign", "invalid-signature"), "wrong"),
        (failed("decrypt", "data", "share-corrupt"), "wrong"),
        (failed("decrypt", "data", "quorum-unavailable", after=True), "lost"),
        (failed("public-key", "data", "key-not-found", after=True), "lost"),
        (done("decrypt", "gone", after=True, sent=b"cipher", got=b"plain"), "undead"),
        (failed("public-key", "gone", "deadline-exceeded", after=True), "undead"),
        (failed("decrypt", "unknown", "quorum-unavailable", after=True), "half"),
        (failed("public-key", "refused", "quorum-unavailable", after=True), "half"),
    ],
)
def test_each_planted_event_is_found(planted: Event, kind: str) -> None:
    events, keys = a_good_history()
    assert kind in kinds(judge([*events, planted], keys))


def test_a_key_that_was_not_looked_at_counts_as_lost() -> None:
    events, keys = a_good_history()
    assert kinds(judge([event for event in events if event.key != "mac"], keys)) == ["lost"]
    assert "lost" in kinds(judge(events, keys, checked=False))


def test_errors_are_held_against_what_a_row_allows() -> None:
    """A use of a key that is being destroyed may fail, and the check after healing is no client."""
    events, keys = a_good_history()
    keys["gone"] = replace_key(keys["gone"])
    events += [
        failed("decrypt", "gone", "key-not-found", ended_s=1.6),
        failed("decrypt", "gone", "node-unavailable", ended_s=1.4),
        failed("refresh", "data", "quorum-unavailable"),
    ]
    errors = errors_of(events, keys)
    assert count_errors(errors) == {
        ("create", "registry-unavailable"): 1,
        ("data", "node-unavailable"): 1,
        ("refresh", "quorum-unavailable"): 1,
    }
    assert kinds(unexpected(errors, ONE_NODE)) == ["error", "error"]
    assert [str(each).split(" (")[0] for each in unexpected(errors, NO_BALANCER)] == [
        "error: 1 times data: node-unavailable"
    ]
    assert unexpected(errors, NOTHING) == []


def replace_key(key: Key) -> Key:
    return replace(key, doomed_s=1.5)


def test_the_longest_gap_is_between_successes() -> None:
    events = [replace(done("mac", "mac"), ended_s=second) for second in (1.0, 2.0, 5.5, 6.0)]
    assert longest_gap(events, 1.5, 7.0) == 3.5
    assert longest_gap([], 1.0, 9.0) == 8.0


def test_the_matrix_is_as_large_as_it_should_be() -> None:
    """At least 40 faults of all groups, each under one name."""
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 40
    assert {fault.group for fault in FAULTS} >= {
        "processes",
        "network",
        "storage",
        "clocks",
        "token",
        "load",
        "balancer",
    }
    assert SEEDS >= 5
    assert [fault.name for fault in chosen("kill-*,resets", "network", False)] == ["resets"]


def test_the_documentation_has_every_fault() -> None:
    """``matrix.py --docs`` writes the table of the last run."""
    told = DOCS.read_text()
    assert [name for name in FAULTS if f"\n| {name.name} |" not in told] == []


def test_what_is_not_run_is_never_passed() -> None:
    from course import Row

    fault = FAULTS[0]
    rows = [Row(fault.name, fault.group, 1, fault.expected, "not run: no root", "not run")]
    told = report(rows, [], 1.0)
    assert told["verdicts"] == {"not run": 1}
    assert "| not run: no root | not run |" in table(told)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "nonsense"], "no fault fits --only 'nonsense'"),
        (["--group", "foo"], "--group 'foo'"),
        (["--only", "kill-node", "--seeds", "-1"], "--seeds -1: at least 1"),
    ],
)
def test_what_fits_no_fault_is_refused(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


# --- the proxy ---


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(1)
    yield made
    made.close()


class Echo:
    """A server that gives everything back."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @staticmethod
    def _serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.socket.close()


def connected(port: int) -> socket.socket:
    """A connection, once the proxy has found its member."""
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def line(network: Network, echo: Echo) -> Iterator[socket.socket]:
    """A connection through the proxy, whose source is known: it is this process's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    network.listen("echo", port, echo.port)
    with connected(port) as made:
        made.sendall(b"hello")
        assert made.recv(100) == b"hello"
        yield made


def test_a_member_that_is_down_refuses_through_the_proxy_too(network: Network, echo: Echo, line: socket.socket) -> None:
    port = line.getpeername()[1]
    echo.socket.close()
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        except ConnectionRefusedError:
            break
        except ConnectionResetError:
            pass  # it was in the queue of the socket that closed
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_port_of_a_member_that_is_down_stays_its_own(network: Network, echo: Echo) -> None:
    echo.socket.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    network.listen("echo", port, echo.port)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    network.forget()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


def test_the_proxy_knows_who_connects(network: Network, line: socket.socket) -> None:
    assert network.seen == {("client", "echo")}


@pytest.mark.parametrize("rule", [CUT, Rule(drop=frozenset({"to"})), Rule(drop=frozenset({"from"}))])
def test_what_is_dropped_comes_once_the_link_is_healed(network: Network, line: socket.socket, rule: Rule) -> None:
    network.spoil("client", "echo", rule)
    line.sendall(b"late")
    line.settimeout(0.3)
    with pytest.raises(TimeoutError):
        line.recv(100)
    network.heal()
    line.settimeout(10)
    assert line.recv(100) == b"late"
    assert network.spoiled


def test_a_rule_is_for_its_link_alone(network: Network, line: socket.socket) -> None:
    network.spoil("node1", "echo", CUT)
    line.sendall(b"through")
    assert line.recv(100) == b"through"


def test_bytes_are_corrupted_and_connections_reset(network: Network, line: socket.socket) -> None:
    network.spoil("*", "*", Rule(corrupt=1.0))
    line.sendall(b"\x00" * 64)
    got = line.recv(100)
    assert got != b"\x00" * 64
    network.heal()
    assert network.reset("client", "echo") == 1
    with pytest.raises(ConnectionResetError):
        line.recv(100)


def test_a_half_open_connection_says_nothing_until_it_is_healed(network: Network, line: socket.socket) -> None:
    assert network.half_open("*", "echo") == 1
    line.sendall(b"x")
    line.settimeout(0.3)
    with pytest.raises(TimeoutError):
        line.recv(100)
    network.heal()
    line.settimeout(10)
    with pytest.raises(ConnectionResetError):
        line.recv(100)


def test_a_flipped_bit_is_one() -> None:
    rng = random.Random(1)
    for _ in range(50):
        changed = flipped(bytes(8), rng)
        assert sum(byte.bit_count() for byte in changed) == 1


def test_a_port_behind_a_proxy_is_no_members_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_ports(8)
    monkeypatch.setattr("engine.client.local.PORTS", ports)
    behind = ports_behind([f"tcp://127.0.0.1:{port}" for port in ports[:4]])
    assert list(behind) == ports[:4]
    assert set(behind.values()) == set(ports[4:])


# --- real processes ---


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """One cluster with proxies for the whole list."""
    made = make_session("proxied", tmp_path_factory.mktemp("faults") / "kq")
    yield made
    close_session(made)


QUICK = [fault for fault in FAULTS if fault.quick]


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.name)
def test_a_fault_is_survived(session: Session, fault: Fault) -> None:
    row = carry_out(fault, 1, session)
    assert row.verdict == "survived", row.findings
    assert row.operations
    assert (row.lost, row.wrong) == (0, 0)


@pytest.mark.parametrize("name", ["lost-key", pytest.param("store-in-memory", marks=pytest.mark.long)])
def test_a_planted_bug_is_noticed(session: Session, name: str) -> None:
    """A client that is told of a key which is not there; and last, nodes that write nothing."""
    (control,) = (each for each in CONTROLS if each.name == name)
    row = try_control(control, session)
    assert row.verdict == "noticed", row.seen
