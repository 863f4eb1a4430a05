"""The example client in C (examples/c), which was written from docs/protocol.md alone, against the product.

It is built with every warning an error, once as a user builds it and once under the sanitizers, and works on a real
cluster: what it makes Python takes, and the other way round. A node that lies is not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from balancing_client import Mover
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from sampled import some

from engine import Engine, LocalCluster, PolicyRule, connect
from engine.client.config import Identity, create_identity, rotate_curve, write_private, write_toml
from engine.errors import InvalidSignature, InvalidTag
from engine.protocol.grant import check_grant
from engine.protocol.manifest import (
    CommitCertificate,
    CreateOrder,
    Holder,
    KeyManifest,
    KeyRecord,
    Member,
    Receipt,
    Retiring,
    certificates,
    chain_pin,
    create_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    open_key_manifest,
    receipts,
)
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, Empty, Hello, KeyDescription, Operate, Result
from engine.protocol.signed import SigningKey, encode_body, read_unverified, sign_bodies, sign_envelope
from engine.protocol.wire import ErrorBody, Load, Reply, Request, Status, error_codec, reply_codec, request_codec

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "examples" / "c"
SECONDS = 30
"""After which a run of the client has hung, since its own deadlines are shorter."""


@dataclass(frozen=True)
class Ended:
    """How a run of the client ended."""

    code: int
    out: bytes
    err: str


@dataclass(frozen=True)
class CClient:
    """The built client with a configuration."""

    program: Path
    config: Path | None = None

    def __call__(self, *arguments: str | Path, data: bytes = b"", **environment: str) -> Ended:
        place = {} if self.config is None else {"KEYQUORUM_CONFIG": str(self.config)}
        done = subprocess.run(
            [str(self.program), *map(str, arguments)],
            input=data,
            env={"PATH": os.environ["PATH"], **place, **environment},
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        told = done.stderr.decode("ascii")
        assert done.returncode in (0, 1, 2), told
        return Ended(done.returncode, done.stdout, told)

    def good(self, *arguments: str | Path, data: bytes = b"") -> bytes:
        """What it prints, where it must end well."""
        ended = self(*arguments, data=data)
        assert ended.code == 0, ended.err
        return ended.out

    def error(self, *arguments: str | Path, data: bytes = b"") -> tuple[int, str]:
        """Exit code and error code, where it must fail; nothing but the one line may be told."""
        ended = self(*arguments, data=data)
        match = re.fullmatch(r"kq-client: ([a-z-]+): [^\n]+\n", ended.err)
        assert match is not None, ended.err
        assert ended.out == b""
        return ended.code, match[1]


@pytest.fixture(
    scope="module", params=some(["address,undefined", ""]), ids=lambda each: "sanitized" if each else "plain"
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client, built by its own Makefile, which makes every warning an error."""
    folder = tmp_path_factory.mktemp("c")
    command = ["make", "-C", str(SOURCES), f"OUT={folder}", f"SANITIZE={request.param}", "CC=gcc"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for flag in ("-Wall", "-Wextra", "-Werror"):
        assert flag in built.stdout.split()
    return folder / "kq-client"


@pytest.fixture
def c(program: Path, cluster: LocalCluster) -> CClient:
    """The client with the identity that may do everything."""
    return CClient(program, cluster.client_config)


@pytest.fixture
def key(kq: Engine) -> Callable[..., str]:
    """Makes a key, 3-of-5 or as told, and gives its name."""

    def make(algorithm: str, name: str = "", threshold: int = 3, shares: int = 5) -> str:
        name = name or f"c/{secrets.token_hex(4)}"
        kq.create_key(name, algorithm, threshold=threshold, shares=shares, timeout=60)
        return name

    return make


# --- on a real cluster ---


def test_what_one_encrypts_the_other_decrypts(c: CClient, kq: Engine, key: Callable[..., str], tmp_path: Path) -> None:
    """AES-GCM with and without associated data, from nothing to the longest plaintext, both ways."""
    name = key("aes-256-gcm")
    aad = tmp_path / "aad"
    aad.write_bytes(b"tenant-7")
    for size in (0, 1, 1000, 49152):
        plain = random.Random(size).randbytes(size)
        assert kq.decrypt(name, c.good("encrypt", name, data=plain)) == plain
        assert c.good("decrypt", name, data=kq.encrypt(name, plain)) == plain
        bound = c.good("encrypt", name, "--aad", "tenant-7", data=plain)
        assert kq.decrypt(name, bound, associated_data=b"tenant-7") == plain
        bound = kq.encrypt(name, plain, associated_data=b"tenant-7")
        assert c.good("decrypt", name, "--aad-file", aad, data=bound) == plain


@pytest.mark.parametrize("algorithm", ["ed25519", "ecdsa-p256-sha256"])
def test_signatures_verify_without_the_cluster(
    c: CClient, kq: Engine, key: Callable[..., str], tmp_path: Path, algorithm: str
) -> None:
    """What C signs verifies with the public key alone, and C verifies what Python signs; a changed message does not."""
    name = key(algorithm)
    message = b"4 crates of oranges"
    signature = tmp_path / "signature"
    assert c.good("sign", name, "--out", signature, data=message) == b""
    assert signature.stat().st_mode & 0o777 == 0o600
    public: Any = load_pem_public_key(kq.public_key(name).encode())
    if algorithm == "ed25519":
        public.verify(signature.read_bytes(), message)
    else:
        public.verify(signature.read_bytes(), message, ECDSA(SHA256()))
        digest = hashlib.sha256(message).digest()
        kq.verify(name, message, c.good("sign", name, "--digested", data=digest))
    signature.write_bytes(kq.sign(name, message))
    assert c.good("verify", name, "--signature", signature, data=message) == b""
    assert c.error("verify", name, "--signature", signature, data=message + b"!") == (1, "invalid-signature")
    with pytest.raises(InvalidSignature):
        kq.verify(name, message, c.good("sign", name, data=b"another"))


def test_macs_verify_both_ways(c: CClient, kq: Engine, key: Callable[..., str], tmp_path: Path) -> None:
    """Likewise with HMAC."""
    name = key("hmac-sha256")
    tag = tmp_path / "tag"
    tag.write_bytes(c.good("mac", name, data=b"body"))
    assert tag.read_bytes() == kq.mac(name, b"body")
    assert c.good("verify-mac", name, "--mac", tag, data=b"body") == b""
    assert c.error("verify-mac", name, "--mac", tag, data=b"another") == (1, "invalid-signature")
    tag.write_bytes(b"")
    assert c.error("verify-mac", name, "--mac", tag, data=b"body")[0] == 1


def test_a_cold_key_works_with_a_grant_made_in_c(c: CClient, kq: Engine, key: Callable[..., str]) -> None:
    """The node asks for a grant once; afterwards the key is loaded there, and none is signed any more."""
    name = key("aes-256-gcm")
    kq.flush(name)
    cold = c("encrypt", name, "--verbose", data=b"4 crates")
    assert kq.decrypt(name, cold.out) == b"4 crates"
    assert cold.err.count("a grant is needed") == cold.err.count("asked again with a grant") == 1
    warm = c("encrypt", name, "--verbose", data=b"4 crates")
    assert (warm.code, warm.err.count("grant")) == (0, 0)
    assert kq.decrypt(name, warm.out) == b"4 crates"


def test_a_moved_reply_is_followed(c: CClient, kq: Engine, cluster: LocalCluster, key: Callable[..., str]) -> None:
    """A node without the key is asked first, another one is next in order: the client goes where the first one says."""
    found, strangers = cluster.cluster, set(cluster.nodes[:2])
    names = (f"c/{secrets.token_hex(4)}" for _ in range(10_000))
    name = next(each for each in names if not strangers & set(found.group_holders(found.group_of(each))[:3]))
    key("aes-256-gcm", name, threshold=2, shares=3)
    for stranger in strangers:
        ended = c("encrypt", name, "--node", stranger, "--verbose", data=b"4 crates")
        assert kq.decrypt(name, ended.out) == b"4 crates"
        asked = [line.split(": ")[1:3] for line in ended.err.splitlines()]
        assert asked[0] == [stranger, f"'{name}' is not on this node; ask those named"]
        assert asked[1] == [found.group_holders(found.group_of(name))[0], "describes the key"]
        assert not any(node in strangers for node, _ in asked[1:])


def test_refusals_have_the_codes_of_the_page(
    c: CClient, program: Path, cluster: LocalCluster, kq: Engine, key: Callable[..., str]
) -> None:
    """Wrong tag, wrong associated data, unknown key, denied access, an operation that the key has not."""
    name = key("aes-256-gcm")
    sealed = kq.encrypt(name, b"4 crates", associated_data=b"tenant-7")
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    assert c.error("decrypt", name, "--aad", "tenant-7", data=changed) == (1, "invalid-tag")
    assert c.error("decrypt", name, "--aad", "tenant-8", data=sealed) == (1, "invalid-tag")
    assert c.error("encrypt", "c/nobody-has-it", data=b"x") == (1, "key-not-found")
    assert c.error("encrypt", "c/has a space", data=b"x") == (1, "invalid-request")
    assert c.error("sign", name, data=b"x")[0] == 1
    limited = CClient(program, cluster.client_config_of("limited"))
    assert limited.error("encrypt", name, data=b"x") == (1, "access-denied")
    mine = key("aes-256-gcm", f"app/{secrets.token_hex(4)}")
    assert kq.decrypt(mine, limited.good("encrypt", mine, data=b"x")) == b"x"
    with pytest.raises(InvalidTag):
        kq.decrypt(mine, sealed)


def test_wrong_arguments_give_usage(c: CClient, tmp_path: Path) -> None:
    """Each is told in one line with a hint at --help, before anything is opened."""
    for arguments in (
        (),
        ("encrypt",),
        ("encrypt", "a", "b", "c"),
        ("destroy", "a"),
        ("encrypt", "a", "--nothing"),
        ("encrypt", "a", "--timeout"),
        ("encrypt", "a", "--timeout", "0"),
        ("encrypt", "a", "--timeout", "nan"),
        ("encrypt", "a", "--timeout", "601"),
        ("encrypt", "a", "--aad", "x", "--aad-file", "y"),
        ("encrypt", "a", "--mac", "x"),
        ("verify", "a"),
        ("latency", "verify", "a", "1"),
        ("latency", "sign", "a", "0"),
        ("latency", "sign", "a", "9" * 30),
        ("latency", "sign", "a"),
    ):
        ended = CClient(c.program)(*arguments)
        assert (ended.code, ended.out) == (1, b"")
        assert re.fullmatch(r"kq-client: usage: [^\n]+\ntry: kq-client --help\n", ended.err), arguments
    told = CClient(c.program)("--help")
    assert told.code == 0
    assert told.out.startswith(b"usage: kq-client [OPTIONS] OPERATION KEY [FILE]\n")
    assert c.error("encrypt", "a", tmp_path / "nothing") == (1, "file")
    assert c.error("encrypt", "a", data=bytes(49153)) == (1, "file")
    assert c.error("encrypt", "a", "--node", "nobody", data=b"x") == (1, "config-error")
    assert c.error("encrypt", "a", "--config", tmp_path / "nothing.toml") == (1, "file")


def test_latency_prints_what_operations_take(c: CClient, key: Callable[..., str]) -> None:
    """The median and the 99th percentile; or, for the benchmark, all times for each line that comes in."""
    name = key("ed25519")
    told = re.fullmatch(
        rb"sign, 50 operations one after the other: p50 (\d+\.\d) us, p99 (\d+\.\d) us\n",
        c.good("latency", "sign", name, "50"),
    )
    assert told is not None
    assert 0 < float(told[1]) <= float(told[2])
    lines = c.good("latency", "sign", name, "7", "--rounds", "--size", "32", data=b"\n\n\n").splitlines()
    assert [len(list(map(float, line.split()))) for line in lines] == [7, 7, 7]


def test_it_trusts_what_its_files_say_and_nothing_else(program: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    """A wrong pin, a changed or a foreign manifest, a readable identity: refused before anything is sent."""
    folder = cluster.client_config.parent
    identity = (folder / "identity.toml").read_text()
    config = cluster.client_config.read_text()
    chain = (folder / re.search(r'^manifest = "(.*)"$', config, flags=re.MULTILINE)[1]).read_bytes()  # type: ignore[index]
    pin = re.search(r'^manifest_pin = "(.*)"$', config, flags=re.MULTILINE)[1]  # type: ignore[index]

    def told(
        *, identity: str = identity, chain: bytes = chain, pin: str = pin, mode: int = 0o600, version: int = 1
    ) -> tuple[int, str]:
        (tmp_path / "identity.toml").write_text(identity)
        (tmp_path / "identity.toml").chmod(mode)
        (tmp_path / "cluster.manifest").write_bytes(chain)
        values = {"identity": "identity.toml", "manifest": "cluster.manifest", "manifest_pin": pin}
        write_toml(tmp_path / "client.toml", {"version": version, **values})
        return CClient(program, tmp_path / "client.toml").error("encrypt", "c/none", data=b"x")

    assert told() == (1, "key-not-found")  # all is well with the copy
    assert told(pin="0" * 64) == (1, "manifest-error")
    assert told(pin=pin[:-1]) == (1, "config-error")
    assert told(mode=0o644) == (1, "config-error")
    assert told(version=2) == (1, "config-error")
    assert told(identity=identity.replace('"client"', '"node"')) == (1, "config-error")
    assert told(identity=re.sub(r"^signing_key.*$", "", identity, flags=re.MULTILINE)) == (1, "config-error")
    assert told(identity=re.sub(r"\\nMC4CAQAw", r"\\nMC4CAQAx", identity)) == (1, "config-error")
    other = create_identity(tmp_path / "other.toml", "local", "client")
    assert other.name == "local"
    assert told(identity=(tmp_path / "other.toml").read_text()) == (1, "config-error")
    assert told(chain=chain[:-1])[1] == "protocol-error"
    assert told(chain=chain + b"\0")[1] == "protocol-error"
    for place in random.Random(6).sample(range(len(chain)), 30):
        changed = chain[:place] + bytes([chain[place] ^ 1 << place % 8]) + chain[place + 1 :]
        assert told(chain=changed)[1] in ("manifest-error", "protocol-error"), place


def change_curve_key(cluster: LocalCluster, c: CClient) -> None:
    """Give its client a new CURVE key: it works while no manifest has the new one, while both are good, and after."""
    assert c.config is not None
    before = cluster.cluster.members["later"]
    identity = rotate_curve(c.config.with_name("identity.toml"))
    assert identity.curve is not None
    after = msgspec.structs.replace(before, curve_public=identity.curve.raw_public)
    members = [after if each.name == "later" else each for each in cluster.cluster.members.values()]
    c.good("encrypt", "orders", data=b"x")
    cluster.sign_manifest(members, retiring=[Retiring("later", before.curve_public, "", "")])
    c.good("encrypt", "orders", data=b"x")
    cluster.sign_manifest(members)
    c.good("encrypt", "orders", data=b"x")


def use_a_key_whose_maker_left(cluster: LocalCluster, c: CClient) -> None:
    """The order in its manifest is signed by nobody who is a member now."""
    with connect(cluster.add_client("gone", [PolicyRule("gone", "*", ["generate"])])) as gone:
        gone.create_key("legacy", "aes-256-gcm", threshold=2, shares=5)
    cluster.sign_manifest([each for name, each in cluster.cluster.members.items() if name != "gone"])
    c.good("encrypt", "legacy", data=b"x")


def test_it_goes_on_where_nodes_die_and_the_cluster_changes(program: Path, own_cluster: LocalCluster) -> None:
    """A dead holder is passed over; a second manifest, new epochs and holders are believed; the deadline is kept."""
    with connect(own_cluster.client_config) as kq:
        kq.create_key("orders", "aes-256-gcm", threshold=2, shares=5)
        kq.refresh_key("orders", timeout=60)
        assert kq.key_info("orders").epoch == 2
        kq.flush("orders")
        later = CClient(program, own_cluster.add_client("later", [PolicyRule("later", "*", ["encrypt", "decrypt"])]))
        sealed = later.good("encrypt", "orders", data=b"4 crates")
        assert kq.decrypt("orders", sealed) == b"4 crates"
        kq.reshare_key("orders", 3, holders=own_cluster.nodes[:4], timeout=60)
        kq.flush("orders")
        assert later.good("decrypt", "orders", data=sealed) == b"4 crates"
        kq.refresh_key("orders", timeout=60)  # after which the reshare order is an earlier one
        kq.flush("orders")
        assert later.good("decrypt", "orders", data=sealed) == b"4 crates"
        with Mover(own_cluster, kq) as mover:
            others = [*own_cluster.nodes[1:4], own_cluster.nodes[0]]
            (moved,) = mover.move(others[0], [mover.order(mover.manifest("orders"), others)])
            kq.flush("orders")
            assert (moved.code, later.good("decrypt", "orders", data=sealed)) == ("", b"4 crates")
            (renewed,) = mover.move(others[0], [mover.renewal(mover.manifest("orders"))])  # the move is an earlier one
            kq.flush("orders")
            assert (renewed.code, later.good("decrypt", "orders", data=sealed)) == ("", b"4 crates")
    change_curve_key(own_cluster, later)
    use_a_key_whose_maker_left(own_cluster, CClient(program, own_cluster.client_config))
    dead, *others = own_cluster.nodes
    own_cluster.kill(dead)
    ended = later("decrypt", "orders", "--node", dead, "--verbose", data=sealed)
    assert (ended.code, ended.out) == (0, b"4 crates")
    assert f"{dead}: no connection" in ended.err
    for node in others:
        own_cluster.kill(node)
    began = time.monotonic()
    assert later.error("decrypt", "orders", "--timeout", "2", data=sealed) == (2, "node-unavailable")
    assert time.monotonic() - began < 5


# --- against a node that lies ---


@dataclass
class FakeNode:
    """A cluster of one node that is this process: every byte that it says is the test's choice."""

    folder: Path
    seen: list[Request] = field(default_factory=list)
    answers: list[Callable[[Request], bytes | None]] = field(default_factory=list)
    """What it says to the requests after `hello`, in order; None says nothing."""

    def __post_init__(self) -> None:
        self.client: Identity = create_identity(self.folder / "identity.toml", "shop", "client")
        self.keys = {name: SigningKey(name, Ed25519PrivateKey.generate()) for name in ("op", "node-1", "bal")}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        public, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.linger = 0
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        curve = zmq.utils.z85.decode(public)
        here = f"tcp://127.0.0.1:{port}"
        members = [
            Member("op", "operator", self.keys["op"].public, bytes(32), "", "", ""),
            self.client.member(),
            Member("node-1", "node", self.keys["node-1"].public, curve, here, "", "site/rack"),
            Member("bal", "balancer", self.keys["bal"].public, bytes([7]) * 32, here, here, ""),
        ]
        rules = [PolicyRule("shop", "*", ["*"])]
        chain = issue_cluster_manifest(name="fake", members=members, rules=rules, operators=[self.keys["op"]])
        self.cluster = open_chain(chain, chain_pin(chain))
        write_private(self.folder / "cluster.manifest", chain)
        files = {"identity": "identity.toml", "manifest": "cluster.manifest", "manifest_pin": chain_pin(chain).hex()}
        write_toml(self.folder / "client.toml", {"version": 1, **files, "timeout_s": 2.0})
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            if not self._socket.poll(20):
                continue
            route, frame = self._socket.recv_multipart()
            request = request_codec.decode(frame)
            if request.verb == "hello":
                assert isinstance(REQUEST_CODECS["hello"].decode(request.body), Hello)
                continue
            self.seen.append(request)
            reply = self.answers.pop(0)(request) if self.answers else None
            if reply is not None:
                self._socket.send_multipart([route, reply])
        self._socket.close()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._context.term()

    @contextlib.contextmanager
    def another_key(self) -> Iterator[None]:
        """Have a server with another CURVE key in this one's place."""
        self._ended.set()
        self._thread.join()
        with self._context.socket(zmq.ROUTER) as socket:
            socket.curve_secretkey = zmq.curve_keypair()[1]
            socket.curve_server = True
            socket.linger = 0
            end_s = time.monotonic() + 10
            while True:
                try:
                    socket.bind(self.cluster.nodes["node-1"].endpoint)
                    break
                except zmq.ZMQError:  # libzmq closes this one's socket a moment later
                    assert time.monotonic() < end_s
                    time.sleep(0.01)
            yield
            assert not socket.poll(0)

    def description(self, name: str = "orders", shares: int = 1, **changes: Any) -> tuple[KeyDescription, KeyRecord]:
        """A description of a 1-of-n key with one receipt; `changes` are made to the manifest that the node signs."""
        order = CreateOrder(bytes(range(16)), name, "aes-256-gcm", 1, shares, "generate", 1)
        told = {
            "key_id": order.key_id,
            "name": order.name,
            "version": 1,
            "epoch": 1,
            "attempt": 1,
            "algorithm": order.algorithm,
            "threshold": 1,
            "holders": [Holder(f"node-{x}", x, bytes(32)) for x in range(1, shares + 1)],
            "public_key": b"",
            "check_value": bytes(32),
            "order": sign_envelope("order.create", 1, create_orders.encode(order), self.client.signing),
            "previous": b"",
        }
        manifest = KeyManifest(**(told | changes))
        body = encode_body("key", 1, key_manifests.encode(manifest), "node-1")
        raw = sign_bodies([body, encode_body("key", 2, b"", "node-1")] * 3, self.keys["node-1"])[2]
        record = KeyRecord(manifest, read_unverified(raw).digest, "node-1", raw)
        return KeyDescription(raw, certify(self, record.digest, manifest.key_id), [], b""), record


def certify(fake: FakeNode, digest: bytes, key_id: bytes = bytes(range(16))) -> bytes:
    """A certificate of a manifest with the receipt of node-1."""
    receipt = sign_envelope("receipt", 1, receipts.encode(Receipt(key_id, digest, 1)), fake.keys["node-1"])
    certificate = certificates.encode(CommitCertificate(key_id, digest, [receipt]))
    return sign_envelope("certificate", 1, certificate, fake.keys["bal"])


def order_of(record: KeyRecord) -> CreateOrder:
    """The client's order in a manifest."""
    return create_orders.decode(read_unverified(record.manifest.order).payload)


def reply(identifier: int, status: int, body: bytes, version: int = 1) -> bytes:
    return reply_codec.encode(Reply(version, identifier, status, body, Load(0, 0, False), {}))


def ok(body: Any, verb: str) -> Callable[[Request], bytes]:
    return lambda request: reply(request.id, Status.OK, REPLY_CODECS[verb].encode(body))


def error(code: str, names: tuple[str, ...] = (), status: int = Status.ERROR) -> Callable[[Request], bytes]:
    body = error_codec.encode(ErrorBody(code, f"\x1b[31mthis is {code}\nä", list(names)))
    return lambda request: reply(request.id, status, body)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeNode]:
    node = FakeNode(tmp_path)
    yield node
    node.close()


@pytest.fixture
def faked(program: Path, fake: FakeNode) -> CClient:
    return CClient(program, fake.folder / "client.toml")


def test_each_request_is_what_the_page_says(faked: CClient, fake: FakeNode) -> None:
    """Canonical requests; no grant before one is asked for; then one that the check of a holder takes."""
    described, record = fake.description()
    assert open_key_manifest(described.manifest, fake.cluster).digest == record.digest
    fake.answers = [ok(described, "describe"), error("need-grant"), ok(Result(b"sealed"), "encrypt")]
    assert faked.good("encrypt", "orders", "--aad", "tenant-7", data=b"4 crates") == b"sealed"
    assert [request.verb for request in fake.seen] == ["describe", "encrypt", "encrypt"]
    assert all(0 < request.timeout_ms <= 2000 for request in fake.seen)
    assert len({request.id for request in fake.seen}) == 3
    first, second = (REQUEST_CODECS["encrypt"].decode(request.body) for request in fake.seen[1:])
    assert first == Operate("orders", record.manifest.key_id, b"4 crates", b"tenant-7", b"", False, b"")
    assert second.grant != b""
    grant, signed = check_grant(second.grant, record, "node-1", fake.cluster, time.time_ns() // 1_000_000)
    assert (grant.operations, grant.combiner, signed.issuer) == (["encrypt"], "node-1", "shop")
    assert grant.expires_ms - grant.not_before_ms == 10_000
    assert grant.nonce != bytes(16)


def test_an_untrue_description_is_refused_and_no_data_follow(faked: CClient, fake: FakeNode) -> None:
    """Another key's manifest, a holder, an id or a threshold that the client's order does not have, a changed bit."""
    other = fake.description("vault")[0]
    good, record = fake.description()
    stranger = SigningKey("shop", Ed25519PrivateKey.generate())
    forged = sign_envelope("order.create", 1, create_orders.encode(order_of(record)), stranger)
    payload = msgspec.msgpack.encode([1, "key", "node-2", 1, key_manifests.encode(record.manifest)])
    unissued = msgspec.msgpack.encode([payload, [["node-1", fake.keys["node-1"].sign(payload)]]])
    lies = [
        other,
        KeyDescription(good.manifest, other.certificate, [], b""),
        KeyDescription(good.certificate, good.certificate, [], b""),
        KeyDescription(good.manifest, b"", [], b""),
        KeyDescription(unissued, certify(fake, read_unverified(unissued).digest), [], b""),
        fake.description(shares=2)[0],
        fake.description(public_key=b"x")[0],
        fake.description(key_id=bytes(16))[0],
        fake.description(threshold=2)[0],
        fake.description(algorithm="aes-128-gcm")[0],
        fake.description(holders=[Holder("node-1", 1, bytes(32)), Holder("node-2", 2, bytes(32))])[0],
        fake.description(epoch=2, previous=bytes(32))[0],
        fake.description(epoch=2, previous=bytes(32), change=record.manifest.order)[0],
        fake.description(order=forged)[0],
    ]
    [[_, value]] = msgspec.msgpack.decode(good.manifest)[1]
    for wrong in (value[:64], value[:65], value[:-32], value + bytes(32), value[:64] + b"\x0a" + value[65:]):
        bent = msgspec.msgpack.encode([msgspec.msgpack.decode(good.manifest)[0], [["node-1", wrong]]])
        lies.append(KeyDescription(bent, good.certificate, [], b""))
    for place in random.Random(7).sample(range(len(good.manifest)), 15):
        changed = bytearray(good.manifest)
        changed[place] ^= 1 << place % 8
        lies.append(KeyDescription(bytes(changed), good.certificate, [], b""))
    for place in random.Random(8).sample(range(len(good.certificate)), 15):
        changed = bytearray(good.certificate)
        changed[place] ^= 1 << place % 8
        lies.append(KeyDescription(good.manifest, bytes(changed), [], b""))
    for lie in lies:
        fake.answers = [ok(lie, "describe")]
        assert faked.error("encrypt", "orders", data=b"secret")[1] in ("manifest-error", "protocol-error")
    assert {request.verb for request in fake.seen} == {"describe"}


def test_what_is_no_reply_ends_the_connection(faked: CClient, fake: FakeNode) -> None:
    """Not canonical, cut off, too long a way from any message, or an answer to id 0: protocol-error, and no crash."""
    described, _ = fake.description()
    good = ok(described, "describe")

    def longer(request: Request) -> bytes:
        told = good(request)
        assert told[2] == request.id < 128
        return told[:2] + b"\xcc" + told[2:]

    rubbish: list[Callable[[Request], bytes]] = [
        longer,
        lambda request: good(request)[:-1],
        lambda request: good(request) + b"\xc0",
        lambda request: b"",
        lambda request: b"\xdd\xff\xff\xff\xff",
        lambda request: b"\x96\x01\xdf\x7f\xff\xff\xff" + bytes(60),
        lambda request: b"\x96" * 60,
        lambda request: reply(0, Status.ERROR, error_codec.encode(ErrorBody("protocol-error", "", []))),
        lambda request: reply(request.id, Status.OK, REPLY_CODECS["describe"].encode(described), version=3),
        lambda request: reply(request.id, Status.ERROR, b"\x90"),
        ok(Empty(), "prewarm"),
    ]
    for each in rubbish:
        fake.answers = [each]
        assert faked.error("encrypt", "orders", data=b"x") == (2, "protocol-error")
    chance = random.Random(9)
    for _ in range(15):
        noise = chance.randbytes(chance.randrange(1, 200))
        fake.answers = [lambda request, noise=noise: noise]  # type: ignore[misc]
        assert faked.error("encrypt", "orders", data=b"x") == (2, "protocol-error")


def test_a_server_with_another_key_gets_nothing(faked: CClient, fake: FakeNode) -> None:
    """The handshake fails as the page says, and no request leaves the client."""
    with fake.another_key():
        assert faked.error("encrypt", "orders", data=b"x") == (2, "node-unavailable")
    assert fake.seen == []


def test_errors_are_told_safely_and_silence_ends_in_time(faked: CClient, fake: FakeNode) -> None:
    """An unknown code is `error`, no control character reaches the terminal, and no answer is the deadline's end."""
    described, _ = fake.description()
    for code, told, exit_code in (
        ("not-a-code", "error", 2),
        ("invalid-tag", "invalid-tag", 1),
        ("overloaded", "overloaded", 2),
    ):
        fake.answers = [ok(described, "describe"), error(code)]
        ended = faked("decrypt", "orders", data=b"x")
        assert (ended.code, ended.err) == (exit_code, f"kq-client: {told}: ?[31mthis is {code}???\n")
    fake.answers = [error("moved", ("node-1", "node-9"), Status.MOVED)]
    assert faked.error("decrypt", "orders", data=b"x") == (1, "key-not-found")
    # Asked again after stale-key, described anew, and then no more.
    fake.seen.clear()
    fake.answers = [ok(described, "describe"), error("stale-key"), ok(described, "describe"), error("stale-key")]
    assert faked.error("decrypt", "orders", data=b"x") == (2, "stale-key")
    assert [request.verb for request in fake.seen] == ["describe", "decrypt"] * 2
    # A key that may have been made is asked for until it is known, or the time is up.
    fake.seen.clear()
    fake.answers = [error("key-pending"), error("key-pending"), ok(described, "describe"), ok(Result(b"x"), "decrypt")]
    assert faked.good("decrypt", "orders", data=b"x") == b"x"
    assert [request.verb for request in fake.seen] == ["describe"] * 3 + ["decrypt"]
    fake.answers = [error("key-pending")] * 200
    assert faked.error("decrypt", "orders", "--timeout", "0.3", data=b"x") == (2, "key-pending")
    began = time.monotonic()
    fake.answers = [ok(described, "describe")]
    assert faked.error("decrypt", "orders", "--timeout", "0.7", data=b"x") == (2, "deadline-exceeded")
    assert 0.6 < time.monotonic() - began < 5
