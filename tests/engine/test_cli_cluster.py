"""The command line against real processes: a cluster set up over several folders, and one in a folder by ``up``.

Every command runs in a process of its own.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from forked_cli import run_command
from ports import free_ports

NODES = ("node1", "node2", "node3", "node4", "node5")
START_S = 60.0
STOP_S = 15.0
COMMAND_S = 120.0
PASSPHRASE = "correct horse battery"
POLICY = """\
version = 1
[[rule]]
identity = "shop"
keys = "*"
operations = ["*"]
[[rule]]
identity = "guest"
keys = "hooks"
operations = ["mac", "describe"]
"""


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        """The standard output as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The last line of the standard error as JSON."""
        return json.loads(self.err.strip().splitlines()[-1])


def keyquorum(*words: str | Path, cwd: Path, config: Path | None = None, stdin: bytes = b"") -> Result:
    """Run the command in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")}
    environment["KEYQUORUM_OPERATOR_PASSPHRASE"] = PASSPHRASE
    if config is not None:
        environment["KEYQUORUM_CONFIG"] = str(config)
    done = run_command(words, cwd, environment, stdin, COMMAND_S)
    return Result(done.returncode, done.stdout, done.stderr.decode())


class Processes:
    """Processes that a test started, each ended by its id whatever happens."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # The processes hold the reading end: they also end when this one is gone.
        self._lifeline = os.pipe()

    def start(self, name: str, module: str, config: Path) -> None:
        """Start ``python -m module --config config``, as its host's service manager would."""
        life = self._lifeline[0]
        words = [sys.executable, "-P", "-m", module, "--config", str(config), "--lifeline", str(life)]
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=config.parent, pass_fds=(life,)
            )

    def check(self) -> None:
        """Fail, with the end of its log, if one has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                text = (self._logs / f"{name}.log").read_text(errors="replace")[-3000:]
                raise AssertionError(f"{name} ended with {process.returncode}:\n{text}")

    def kill(self, name: str) -> None:
        """End one as a power cut would."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(STOP_S)

    def end(self) -> None:
        """End all, politely first."""
        for process in self._running.values():
            process.terminate()
        until = time.monotonic() + STOP_S
        for process in self._running.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)
        self._running.clear()
        for descriptor in self._lifeline:
            os.close(descriptor)


class Site:
    """The hosts of a cluster: a folder each, and nothing shared but what a command of the documentation copies."""

    def __init__(self, root: Path, processes: Processes) -> None:
        self.root = root
        self.processes = processes
        self.folders: dict[str, Path] = {}

    def run(self, *words: str | Path, client: str = "shop", stdin: bytes = b"") -> Result:
        """A command on a client's host, in its folder."""
        folder = self.folders[client]
        return keyquorum(*words, cwd=folder, config=folder / "client.toml", stdin=stdin)

    def found(self) -> None:
        """The steps of docs/deployment.md: init everywhere, cards to the operator, sign, manifest back, join."""
        ports = free_ports(2 * len(NODES) + 2)
        self.init("operator", "alice")
        for number, name in enumerate(NODES):
            place = f"site{number % 3 + 1}/room1/rack1/host{number + 1}"
            own = [f"tcp://127.0.0.1:{port}" for port in (ports[number], ports[len(NODES) + number])]
            where = ("--endpoint", own[0], "--publish-endpoint", own[1], "--location", place)
            self.init("node", name, *where, "--token")
        ends = [f"tcp://127.0.0.1:{port}" for port in ports[-2:]]
        self.init("balancer", "bal", "--endpoint", ends[0], "--publish-endpoint", ends[1])
        self.init("client", "shop")
        self.init("client", "guest")
        desk = self.root / "host-alice"
        (desk / "policy.toml").write_text(POLICY)
        for name, folder in self.folders.items():
            if name != "alice":
                shutil.copy(folder / f"{name}.card", desk)
        cards = [f"--card={name}.card" for name in self.folders if name != "alice"]
        words = ["--operator", "alice", "--name", "prod", "--policy", "policy.toml", "--domain-level", "1", *cards]
        signed = keyquorum("cluster", "sign", *words, "--out", "cluster.manifest", "-o", "json", cwd=desk)
        assert signed.code == 0, signed.err
        for name, folder in self.folders.items():
            host = folder.parent
            if name != "alice":
                shutil.copy(desk / "cluster.manifest", host)
                joined = keyquorum("cluster", "join", folder, "cluster.manifest", "--pin", signed.json["pin"], cwd=host)
                assert joined.code == 0, joined.err

    def init(self, role: str, name: str, *options: str) -> None:
        host = self.root / f"host-{name}"
        host.mkdir()
        told = keyquorum("init", role, name, "--name", name, *options, cwd=host)
        assert told.code == 0, told.err
        self.folders[name] = host / name

    def start(self, *names: str) -> None:
        """Start these processes and wait until each has answered a status request."""
        for name in names:
            module, file = ("balancer", "balancer.toml") if name == "bal" else ("nodes", "node.toml")
            self.processes.start(name, module, self.folders[name] / file)
        until = time.monotonic() + START_S
        while True:
            self.processes.check()
            told = self.run("status", "-o", "json", "--timeout", "2")
            up = {member["name"] for member in told.json["members"] if member["up"]}
            if set(names) <= up:
                return
            assert time.monotonic() < until, f"only {up} are up"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running cluster of five nodes and a balancer, each from its own folder."""
    root = tmp_path_factory.mktemp("hosts")
    logs = root / "logs"
    logs.mkdir()
    processes = Processes(logs)
    try:
        made = Site(root, processes)
        made.found()
        made.start(*NODES, "bal")
        for name, algorithm in (
            ("orders", "aes-256-gcm"),
            ("tls", "ecdsa-p256-sha256"),
            ("hooks", "hmac-sha256"),
            ("log", "ed25519"),
        ):
            told = made.run("key", "create", name, algorithm, "--threshold", "3", "--shares", "5", "-o", "json")
            assert told.code == 0, told.err
            assert (told.json["threshold"], told.json["shares"]) == (3, 5)
        yield made
    finally:
        processes.end()


def test_status_lists_every_member(site: Site) -> None:
    """Each node with its place, and the balancer."""
    told = site.run("status", "-o", "json").json
    assert told["cluster"] == "prod"
    assert {member["name"]: member["up"] for member in told["members"]} == dict.fromkeys([*NODES, "bal"], True)
    text = site.run("status").out.decode()
    assert all(name in text for name in (*NODES, "bal", "site2/room1/rack1/host2"))


@pytest.mark.parametrize("size", [0, 1, 48 * 1024, 48 * 1024 + 1, 1_000_003])
def test_files_round_trip(site: Site, tmp_path: Path, size: int) -> None:
    """Through files and through pipes, empty ones and ones of many chunks too."""
    plain = random.Random(size).randbytes(size)
    (tmp_path / "plain").write_bytes(plain)
    assert (
        site.run("encrypt", "orders", tmp_path / "plain", "--out", tmp_path / "sealed", "--aad", "tenant-7").code == 0
    )
    assert site.run("decrypt", "orders", tmp_path / "sealed", "--out", tmp_path / "back", "--aad", "tenant-7").code == 0
    assert (tmp_path / "back").read_bytes() == plain
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o600
    piped = site.run("encrypt", "orders", stdin=plain)
    assert (piped.code, piped.err) == (0, "")
    assert piped.out != (tmp_path / "sealed").read_bytes()
    assert site.run("decrypt", "orders", stdin=piped.out).out == plain


def test_a_changed_file_leaves_nothing(site: Site, tmp_path: Path) -> None:
    """Changed, cut off, or under other associated data: exit code 1, and no file, not even a part of one."""
    plain = random.Random(7).randbytes(150_000)
    sealed = site.run("encrypt", "orders", "--aad", "a", stdin=plain).out
    changed = bytearray(sealed)
    changed[-10] ^= 1
    cases = [(bytes(changed), "a"), (sealed[:-20], "a"), (sealed[: len(sealed) // 2], "a"), (sealed, "b"), (b"", "a")]
    for number, (data, associated) in enumerate(cases):
        told = site.run("decrypt", "orders", "--aad", associated, "--out", tmp_path / "out", "-o", "json", stdin=data)
        assert (told.code, told.out) == (1, b""), number
        assert told.error["error"] == "invalid-tag"
        assert list(tmp_path.iterdir()) == []


def test_openssl_verifies_a_signature(site: Site, tmp_path: Path) -> None:
    """With the exported public key, over a file larger than any message."""
    message = tmp_path / "message"
    message.write_bytes(random.Random(3).randbytes(2_000_000))
    assert site.run("sign", "tls", message, "--out", tmp_path / "sig").code == 0
    assert site.run("key", "public", "tls", "--out", tmp_path / "pem").code == 0
    words = ["openssl", "dgst", "-sha256", "-verify", tmp_path / "pem", "-signature", tmp_path / "sig", message]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "Verified OK")
    assert site.run("verify", "tls", message, "--signature", tmp_path / "sig").out == b"good signature\n"
    message.write_bytes(b"another")
    told = site.run("verify", "tls", message, "--signature", tmp_path / "sig", "-o", "json")
    assert (told.code, told.out, told.error["error"]) == (1, b"", "invalid-signature")


@pytest.mark.parametrize("name", ["tls", "log"])
@pytest.mark.parametrize("encoding", ["--raw", "--base64", "--hex"])
def test_signatures_in_every_encoding(site: Site, tmp_path: Path, name: str, encoding: str) -> None:
    """What ``sign`` writes, ``verify`` reads."""
    signature = site.run("sign", name, encoding, stdin=b"message")
    assert signature.code == 0
    (tmp_path / "sig").write_bytes(signature.out)
    assert site.run("verify", name, "--signature", tmp_path / "sig", encoding, stdin=b"message").code == 0
    assert site.run("verify", name, "--signature", tmp_path / "sig", encoding, stdin=b"massage").code == 1


def test_imported_key_gives_the_same_mac(site: Site, tmp_path: Path) -> None:
    """A raw key, imported as hex from a pipe; the independent computation agrees."""
    secret = os.urandom(32)
    told = site.run("key", "import", "legacy", "hmac-sha256", "-", "--hex", stdin=secret.hex().encode())
    assert told.code == 0, told.err
    expected = hmac.HMAC(secret, hashes.SHA256())
    expected.update(b"body")
    tag = site.run("mac", "legacy", stdin=b"body").out
    assert tag == expected.finalize()
    (tmp_path / "tag").write_bytes(tag)
    assert site.run("verify-mac", "legacy", "--mac", tmp_path / "tag", stdin=b"body").code == 0
    told = site.run("verify-mac", "legacy", "--mac", tmp_path / "tag", "-o", "json", stdin=b"bogy")
    assert (told.code, told.error["error"]) == (1, "invalid-signature")
    assert site.run("mac", "legacy", stdin=bytes(48 * 1024 + 1)).code == 1


def test_imported_pem_key_signs(site: Site, tmp_path: Path) -> None:
    """PKCS#8 from a file; the public key that comes back is the original's."""
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(pem)
    told = site.run("key", "import", "old-tls", "ecdsa-p256-sha256", tmp_path / "key.pem", "-o", "json")
    assert told.code == 0, told.err
    public = site.run("key", "public", "old-tls").out
    expected = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert public == expected
    private.public_key().verify(site.run("sign", "old-tls", stdin=b"m").out, b"m", ec.ECDSA(hashes.SHA256()))
    told = site.run("key", "import", "wrong", "ecdsa-p384-sha384", tmp_path / "key.pem", "-o", "json")
    assert (told.code, told.error["error"]) == (1, "invalid-request")


def test_keys_are_listed_shown_and_destroyed(site: Site) -> None:
    """``destroy`` is for good, and asks unless it is told not to."""
    assert site.run("key", "create", "tmp/one", "aes-128-gcm").code == 0
    assert site.run("key", "create", "tmp/two", "aes-128-gcm").code == 0
    listed = site.run("key", "list", "tmp/*", "-o", "json").json
    assert [each["name"] for each in listed] == ["tmp/one", "tmp/two"]
    assert b"tmp/one" in site.run("key", "list").out
    shown = site.run("key", "show", "tmp/one", "-o", "json").json
    assert (shown["algorithm"], shown["threshold"], len(shown["holders"])) == ("aes-128-gcm", 3, 5)
    again = site.run("key", "create", "tmp/one", "aes-128-gcm", "-o", "json")
    assert (again.code, again.error["error"]) == (1, "key-exists")
    assert site.run("key", "destroy", "tmp/one").code == 1
    done = site.run("key", "destroy", "tmp/one", "--yes", "-o", "json")
    assert (done.code, set(done.json["confirmed"]), done.json["pending"]) == (0, set(NODES), [])
    gone = site.run("key", "show", "tmp/one", "-o", "json")
    assert (gone.code, gone.error["error"]) == (1, "key-not-found")
    assert [each["name"] for each in site.run("key", "list", "tmp/*", "-o", "json").json] == ["tmp/two"]


def test_the_policy_is_enforced(site: Site) -> None:
    """A client does what the operator's rules allow it, and nothing else."""
    assert site.run("mac", "hooks", client="guest", stdin=b"m").code == 0
    for words in (
        ("encrypt", "orders"),
        ("sign", "tls"),
        ("key", "create", "mine", "aes-128-gcm"),
        ("key", "destroy", "hooks", "--yes"),
    ):
        told = site.run(*words, "-o", "json", client="guest", stdin=b"m")
        assert (told.code, told.out, told.error["error"]) == (1, b"", "access-denied"), words


def test_a_manifest_is_pushed_to_running_members(site: Site) -> None:
    """As docs/deployment.md has it: a client leaves, a node changes its CURVE key, and no process is started anew."""
    desk = site.root / "host-alice"
    serials = []

    def sign_and_push(*words: str) -> None:
        signed = keyquorum("cluster", "sign", "--operator", "alice", *words, "--out", "cluster.manifest", cwd=desk)
        assert signed.code == 0, signed.err
        pushed = site.run("cluster", "push", desk / "cluster.manifest", "-o", "json")
        assert pushed.code == 0, pushed.err
        assert set(pushed.json["taken"]) == {*NODES, "bal"}
        serials.append(pushed.json["serial"])

    node = site.folders["node1"]
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    card = keyquorum("cluster", "rekey", node, "--endpoint", endpoint, "--out", desk / "node1.card", cwd=node.parent)
    assert card.code == 0, card.err
    refused = keyquorum("cluster", "rekey", node, "-o", "json", cwd=node.parent)
    assert (refused.code, refused.error["error"]) == (1, "config-error")
    sign_and_push("--remove", "guest", "--card", "node1.card")
    assert site.run("mac", "hooks", "--timeout", "2", client="guest", stdin=b"m").code != 0
    assert site.run("sign", "tls", stdin=b"m").code == 0
    sign_and_push("--retire", "node1")
    assert serials[1] == serials[0] + 1
    assert keyquorum("cluster", "join", node, desk / "cluster.manifest", cwd=node.parent).code == 0
    assert "curve_retiring" not in (node / "identity.toml").read_text()
    told = site.run("status", "-o", "json").json
    rows = (
        {each["name"]: each for each in told["members"]}
        if isinstance(told, dict)
        else {each["name"]: each for each in told}
    )
    assert rows["node1"]["endpoint"] == endpoint
    again = keyquorum("cluster", "sign", "--operator", "alice", "--retire", "node1", "-o", "json", cwd=desk)
    assert (again.code, again.error["error"]) == (1, "manifest-error")


def test_nodes_that_die_and_come_back(site: Site, tmp_path: Path) -> None:
    """Two of five may be lost; with three lost a cold key fails by name; from their disks they serve again."""
    sealed = site.run("encrypt", "orders", stdin=b"before").out
    for name in ("node4", "node5"):
        site.processes.kill(name)
    assert site.run("flush").code == 0
    assert site.run("decrypt", "orders", stdin=sealed).out == b"before"
    site.processes.kill("node3")
    assert site.run("flush").code == 0
    told = site.run("decrypt", "orders", "--out", tmp_path / "out", "--timeout", "5", "-o", "json", stdin=sealed)
    assert (told.code, told.out, list(tmp_path.iterdir())) == (2, b"", [])
    assert told.error["error"] == "quorum-unavailable"
    assert set(told.error["names"]) == {"node3", "node4", "node5"}
    site.start("node3", "node4", "node5")
    assert site.run("decrypt", "orders", stdin=sealed).out == b"before"
    assert site.run("sign", "tls", stdin=b"m").code == 0


def test_nodes_come_and_go_by_the_operators_command(site: Site) -> None:
    """As docs/deployment.md has it: one is added, one emptied and removed, one is lost and replaced."""
    desk, shop = site.root / "host-alice", site.folders["shop"] / "client.toml"

    def node(*words: str, code: int = 0) -> Result:
        told = keyquorum("node", *words, "--operator", "alice", "-o", "json", cwd=desk, config=shop)
        assert told.code == code, told
        return told

    def make(name: str, location: str) -> str:
        ports = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
        where = ("--endpoint", ports[0], "--publish-endpoint", ports[1], "--location", location)
        site.init("node", name, *where, "--token")
        shutil.copy(site.folders[name] / f"{name}.card", desk)
        return f"{name}.card"

    def join(name: str) -> None:
        folder = site.folders[name]
        pin = keyquorum("cluster", "show", "cluster.manifest", "-o", "json", cwd=desk).json["pin"]
        joined = keyquorum("cluster", "join", folder, desk / "cluster.manifest", "--pin", pin, cwd=folder.parent)
        assert joined.code == 0, joined.err
        site.start(name)

    def members() -> dict[str, Any]:
        return {each["name"]: each for each in site.run("status", "-o", "json").json["members"]}

    def held() -> dict[str, Any]:
        return {each["node"]: each for each in node("list").json["nodes"]}

    sealed = site.run("encrypt", "orders", stdin=b"before").out
    added = node("add", "--card", make("node6", "site2/room1/rack1/host6"))
    assert added.json["node"] == "node6"
    assert "keyquorum cluster join DIR cluster.manifest --pin" in added.err
    join("node6")
    keys = held()["node2"]["keys"]
    assert keys >= 4
    assert held()["node6"] == {"node": "node6", "state": "member", "keys": 0}

    assert node("remove", "node2", code=2).error["message"].startswith("node2 is not draining")
    assert node("drain", "node2", "--no-wait").json["keys"] == keys
    assert [name for name, each in members().items() if each["draining"]] == ["node2"]
    assert f"holds shares of {keys} keys" in node("remove", "node2", code=2).error["message"]
    for key in site.run("key", "list", "-o", "json").json:
        places = site.run("key", "show", key["name"], "-o", "json").json["holders"]
        if "node2" in places:
            holders = [f"--holder={'node6' if each == 'node2' else each}" for each in places]
            moved = site.run("key", "reshare", key["name"], *holders)
            assert moved.code == 0, moved.err
    assert node("drain", "node2").json["keys"] == 0
    removed = node("remove", "node2")
    assert site.run("status", "-o", "json").json["serial"] == removed.json["serial"]
    site.processes.kill("node2")

    site.processes.kill("node3")
    card = make("node7", "site3/room1/rack1/host3")
    replaced = node("replace", "node3", "--card", card, "--lost", "--no-wait")
    assert (replaced.json["node"], replaced.json["replaced"]) == ("node7", "node3")
    join("node7")
    now = members()
    assert {name for name, each in now.items() if each["role"] == "node"} == {f"node{n}" for n in (1, 4, 5, 6, 7)}
    assert all(each["up"] for each in now.values())
    assert held()["node3"]["state"] == "gone"
    assert site.run("flush").code == 0
    assert site.run("decrypt", "orders", stdin=sealed).out == b"before"


def test_nodes_take_as_many_signatures_as_any_manifest(tmp_path: Path) -> None:
    """With a quorum of two, one operator's command leaves a manifest for the other, and brings it to nobody."""
    port = iter(free_ports(6))

    def run(*words: str, code: int = 0) -> Result:
        told = keyquorum(*words, "-o", "json", cwd=tmp_path, config=tmp_path / "shop" / "client.toml")
        assert told.code == code, told
        return told

    for role, name in (("operator", "alice"), ("operator", "bob"), ("client", "shop")):
        run("init", role, name, "--name", name)
    places = ("--location", "site1/room1/rack1/host1")
    for name in ("node1", "node2"):
        run("init", "node", name, "--name", name, "--endpoint", f"tcp://127.0.0.1:{next(port)}", *places)
    ends = [f"tcp://127.0.0.1:{next(port)}" for _ in range(2)]
    run("init", "balancer", "bal", "--name", "bal", "--endpoint", ends[0], "--publish-endpoint", ends[1])
    cards = [f"--card={name}/{name}.card" for name in ("bob", "node1", "node2", "bal", "shop")]
    first = ("--operator", "alice", "--name", "prod", "--quorum", "2", *cards)
    run("cluster", "sign", *first, "--out", "cluster.manifest")
    pin = run("cluster", "show", "cluster.manifest").json["pin"]
    run("cluster", "countersign", "--operator", "bob", "--yes", "cluster.manifest", "--pin", pin)
    for name in ("alice", "shop"):
        run("cluster", "join", name, "cluster.manifest", "--pin", pin)

    short = run("node", "drain", "node2", "--operator", "alice", "--no-wait", "--out", "next.manifest", code=2)
    assert "next.manifest has 1 of 2 signatures needed" in short.error["message"]
    told = run("cluster", "show", "next.manifest").json
    assert (told["draining"], told["complete"]) == (["node2"], False)
    assert run("cluster", "show", "alice/cluster.manifest").json["draining"] == []
    run("cluster", "countersign", "--operator", "bob", "--yes", "next.manifest")
    assert run("cluster", "show", "next.manifest").json["complete"]
    run("cluster", "join", "alice", "next.manifest")
    last = run("node", "drain", "node1", "--operator", "alice", "--no-wait", code=1)
    assert "without 'node1' there is no node that keys can be given to" in last.error["message"]


def test_up_and_down(tmp_path: Path) -> None:
    """A cluster in a folder goes on after the command, is found without options, and keeps its keys over a stop."""

    def run(*words: str, stdin: bytes = b"") -> Result:
        return keyquorum(*words, cwd=tmp_path, stdin=stdin)

    try:
        started = run("up", "--nodes", "3", "--threshold", "2", "-o", "json")
        assert started.code == 0, started.err
        assert (started.err, started.json["nodes"], started.json["threshold"]) == ("", 3, 2)
        pids = started.json["pids"]
        assert len([pid for pid in pids.values() if is_alive(pid)]) == 4
        created = run("key", "create", "k", "aes-256-gcm", "-o", "json")
        assert (created.json["threshold"], created.json["shares"]) == (2, 3)
        sealed = run("encrypt", "k", stdin=b"kept").out
        assert run("up", "-o", "json").json["pids"] == pids
        assert run("up", "--nodes", "4").code == 1
        assert run("status").code == 0
        stopped = run("down", "-o", "json")
        assert (stopped.code, len(stopped.json["stopped"])) == (0, 4)
        assert not any(is_alive(pid) for pid in pids.values())
        asleep = run("decrypt", "k", "--timeout", "1", "-o", "json", stdin=sealed)
        assert (asleep.code, asleep.out) == (2, b"")
        assert run("status", "--timeout", "1").code == 2
        assert run("up").code == 0
        assert run("decrypt", "k", stdin=sealed).out == b"kept"
    finally:
        run("down")
    assert run("down").code == 0


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
