"""A real token, a signed cluster in memory, and real node processes, for the tests of the nodes.

One pytest process has one SoftHSM token: the library's state belongs to the process. Tests that need another token
start another process.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from ports import free_port

from engine.client.config import CurveIdentity, Identity, create_identity, write_toml
from engine.client.transport import Channel, ask
from engine.errors import NodeUnavailable
from engine.keys import ALGORITHMS, generate_material, public_key_der
from engine.protocol.grant import Grant, issue_grant
from engine.protocol.manifest import (
    AbortNotice,
    Cluster,
    CommitCertificate,
    CreateOrder,
    DestroyOrder,
    Holder,
    KeyManifest,
    KeyRecord,
    Member,
    PolicyRule,
    Receipt,
    RefreshOrder,
    ReshareOrder,
    aborts,
    certificates,
    chain_pin,
    create_orders,
    destroy_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    open_key_manifest,
    receipts,
    refresh_orders,
    reshare_orders,
)
from engine.protocol.requests import Empty, Operate, ShareCommit, SharePrepare, ShareRelease
from engine.protocol.signed import SigningKey, sign_envelope
from engine.protocol.wire import Codec
from engine.sharing import Share, blind, check_value, commitment, generate_shares, new_salt
from nodes.config import MODULE_PATHS, PinSource, TokenConfig
from nodes.token import Lane, Token, initialize_token

NODES = tuple(f"node{i}" for i in range(1, 6))
ROLES = {"op": "operator", "alice": "client", "bob": "client", "carol": "client", "balancer": "balancer"}
RULES = (
    PolicyRule("alice", "*", ["*"]),
    PolicyRule("carol", "shared/*", ["encrypt", "generate"]),
    PolicyRule("carol", "?", ["flush"]),
)
HOUR_MS = 3_600_000


def _signing(name: str) -> SigningKey:
    seed = hashlib.sha256(b"tests/nodes " + name.encode()).digest()
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(seed))


@dataclass(slots=True)
class Dealt:
    """A key that was dealt: its signed manifest, and what each holder is offered."""

    record: KeyRecord
    key: bytes
    order: bytes
    offers: dict[str, SharePrepare]

    @property
    def key_id(self) -> bytes:
        return self.record.manifest.key_id

    @property
    def manifest(self) -> KeyManifest:
        return self.record.manifest


class World:
    """The signed documents of a cluster: operator, clients alice (all rights), bob (none), carol (some), 5 nodes.

    ``stranger`` signs as nobody's member. ``now_ms`` is a clock that the tests set.
    """

    def __init__(
        self, keys: Mapping[str, SigningKey] | None = None, members: Sequence[Member] = (), now_ms: int = 0
    ) -> None:
        self.keys = dict(keys or {name: _signing(name) for name in (*ROLES, *NODES)})
        self.stranger = _signing("stranger")
        self.now_ms = now_ms or 1_800_000_000_000
        self.members = list(members) or [self._member(name) for name in self.keys]
        self.chain = issue_cluster_manifest(name="test", members=self.members, rules=RULES, operators=[self.keys["op"]])
        self.cluster: Cluster = open_chain(self.chain, chain_pin(self.chain))

    def _member(self, name: str) -> Member:
        role = ROLES.get(name, "node")
        curve = bytes(32) if role == "operator" else self.curve_key(name).public_key().public_bytes_raw()
        endpoint = "tcp://127.0.0.1:1" if role in ("node", "balancer") else ""
        location = f"site{int(name[-1]) % 3}/room/rack/{name}" if role == "node" else ""
        return Member(name, role, self.keys[name].public, curve, endpoint, "", location)  # type: ignore[arg-type]

    @staticmethod
    def curve_key(name: str) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(hashlib.sha256(b"curve " + name.encode()).digest())

    def clock(self) -> int:
        return self.now_ms

    def signed(self, codec: Codec[Any], kind: str, body: object, signer: str | SigningKey) -> bytes:
        key = self.keys[signer] if isinstance(signer, str) else signer
        return sign_envelope(kind, self.now_ms, codec.encode(body), key)

    def order(
        self,
        name: str,
        algorithm: str,
        threshold: int,
        shares: int,
        *,
        key_id: bytes = b"",
        client: str | SigningKey = "alice",
        expires_in_ms: int = 60_000,
        operation: str = "generate",
    ) -> bytes:
        order = CreateOrder(
            key_id or os.urandom(16),
            name,
            algorithm,
            threshold,
            shares,
            operation,  # type: ignore[arg-type]
            self.now_ms + expires_in_ms,
        )
        return self.signed(create_orders, "order.create", order, client)

    def deal(
        self,
        name: str = "orders",
        algorithm: str = "aes-256-gcm",
        holders: Sequence[str] = NODES[:3],
        threshold: int = 2,
        *,
        dealer: str | SigningKey = "node1",
        key: bytes = b"",
        order: bytes = b"",
        key_id: bytes = b"",
        attempt: int = 1,
        aborts: Sequence[bytes] = (),
        check: bool = True,
        manifest: Mapping[str, Any] | None = None,
    ) -> Dealt:
        """Deal a key. ``manifest`` replaces fields of the manifest; ``check`` opens it as every member would."""
        algo = ALGORITHMS[algorithm]
        key = key or generate_material(algo)
        key_id = key_id or os.urandom(16)
        order = order or self.order(name, algorithm, threshold, len(holders), key_id=key_id)
        context = key_id + (1).to_bytes(4, "big") + (1).to_bytes(4, "big")
        secret = blind(key)
        shares = generate_shares(secret, threshold=threshold, shares=len(holders))
        salts = [new_salt() for _ in holders]
        fields: dict[str, Any] = {
            "key_id": key_id,
            "name": name,
            "version": 1,
            "epoch": 1,
            "attempt": attempt,
            "algorithm": algorithm,
            "threshold": threshold,
            "holders": [
                Holder(node, share.x, commitment(salt, context, share))
                for node, share, salt in zip(holders, shares, salts, strict=True)
            ],
            "public_key": public_key_der(algo, key),
            "check_value": check_value(secret, context[:-4]),
            "order": order,
            "previous": b"",
        }
        raw = self.signed(key_manifests, "key", KeyManifest(**{**fields, **(manifest or {})}), dealer)
        record = open_key_manifest(raw, self.cluster) if check else KeyRecord(KeyManifest(**fields), bytes(32), "", raw)
        offers = {
            node: SharePrepare(raw, share.x, share.y, salt, list(aborts))
            for node, share, salt in zip(holders, shares, salts, strict=True)
        }
        return Dealt(record, key, order, offers)

    def receipt(self, dealt: Dealt, node: str, *, signer: str | SigningKey = "", **changes: Any) -> bytes:
        holder = dealt.manifest.holder(node)
        fields = {
            "key_id": dealt.key_id,
            "manifest_hash": dealt.record.digest,
            "x": holder.x if holder else 1,
            **changes,
        }
        return self.signed(receipts, "receipt", Receipt(**fields), signer or node)

    def certificate(
        self,
        dealt: Dealt,
        nodes: Sequence[str] = (),
        *,
        given: Sequence[bytes] = (),
        signer: str | SigningKey = "balancer",
        **changes: Any,
    ) -> bytes:
        told = list(given) or [
            self.receipt(dealt, node) for node in nodes or [holder.node for holder in dealt.manifest.holders]
        ]
        fields = {"key_id": dealt.key_id, "manifest_hash": dealt.record.digest, "receipts": told, **changes}
        return self.signed(certificates, "certificate", CommitCertificate(**fields), signer)

    def abort(self, key_id: bytes, attempt: int = 1, signer: str | SigningKey = "balancer") -> bytes:
        return self.signed(aborts, "abort", AbortNotice(key_id, attempt), signer)

    def destroy_order(
        self, key_id: bytes, name: str, *, client: str | SigningKey = "alice", expires_in_ms: int = 60_000
    ) -> bytes:
        order = DestroyOrder(key_id, name, self.now_ms + expires_in_ms)
        return self.signed(destroy_orders, "order.destroy", order, client)

    def refresh_order(self, record: KeyRecord, *, client: str | SigningKey = "alice", **changes: Any) -> bytes:
        order = RefreshOrder(**self._change(record, changes))
        return self.signed(refresh_orders, "order.refresh", order, client)

    def reshare_order(self, record: KeyRecord, *, client: str | SigningKey = "alice", **changes: Any) -> bytes:
        manifest = record.manifest
        same = {"threshold": manifest.threshold, "holders": [each.node for each in manifest.holders], "without": []}
        order = ReshareOrder(**self._change(record, same | changes))
        return self.signed(reshare_orders, "order.reshare", order, client)

    def move_order(self, record: KeyRecord, *, balancer: str | SigningKey = "balancer", **changes: Any) -> bytes:
        """A balancer's order, as it signs it; ``kind`` among the changes is another kind."""
        manifest = record.manifest
        same = {"threshold": manifest.threshold, "holders": [each.node for each in manifest.holders], "without": []}
        kind = changes.pop("kind", "order.move")
        order = ReshareOrder(**self._change(record, same | {"fencing": 1} | changes))
        return self.signed(reshare_orders, kind, order, balancer)

    def renew_order(self, record: KeyRecord, *, balancer: str | SigningKey = "balancer", **changes: Any) -> bytes:
        order = RefreshOrder(**self._change(record, {"fencing": 1} | changes))
        return self.signed(refresh_orders, "order.renew", order, balancer)

    def _change(self, record: KeyRecord, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What orders to change a key have in common; ``expires_in_ms`` among the changes is from now."""
        manifest, more = record.manifest, dict(changes)
        return {
            "key_id": manifest.key_id,
            "name": manifest.name,
            "from_epoch": manifest.epoch,
            "nonce": os.urandom(16),
            "expires_ms": self.now_ms + more.pop("expires_in_ms", 60_000),
            **more,
        }

    def grant(
        self,
        dealt: Dealt,
        combiner: str,
        operation: str = "encrypt",
        *,
        client: str | SigningKey = "alice",
        **changes: Any,
    ) -> bytes:
        """A grant; ``changes`` replace its fields."""
        key = self.keys[client] if isinstance(client, str) else client
        if not changes:
            return issue_grant(key, dealt.record, operation, combiner, self.now_ms, 10_000, os.urandom(16))
        fields = {
            "key_id": dealt.key_id,
            "version": 1,
            "epoch": 1,
            "operations": [operation],
            "combiner": combiner,
            "not_before_ms": self.now_ms,
            "expires_ms": self.now_ms + 10_000,
            "nonce": os.urandom(16),
            **changes,
        }
        return self.signed(Codec(Grant, "grant"), "grant", Grant(**fields), key)


@pytest.fixture
def world() -> World:
    return World()


# --- the token ---


@pytest.fixture(scope="session")
def token_config(tmp_path_factory: pytest.TempPathFactory) -> TokenConfig:
    folder = tmp_path_factory.mktemp("token")
    module = next(Path(path) for path in MODULE_PATHS if Path(path).is_file())
    return TokenConfig(module, "test", PinSource("file", str(folder / "pin")))


@pytest.fixture(scope="session")
def token_data(token_config: TokenConfig) -> Path:
    """The data folder of the one token of this process."""
    data = Path(token_config.pin.place).parent / "data"
    with _environment_kept():
        initialize_token(token_config, data)
    return data


@pytest.fixture(scope="module")
def token(token_config: TokenConfig, token_data: Path) -> Token:
    """The token, opened anew: other users of PKCS#11 in this process (the benchmarks) end the sessions of before."""
    with _environment_kept():
        return Token(token_config, token_data)


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = os.environ.get("SOFTHSM2_CONF")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("SOFTHSM2_CONF", None)
        else:
            os.environ["SOFTHSM2_CONF"] = before


@pytest.fixture(scope="module")
def shared_lane(token: Token) -> Lane:
    return token.lane()


@pytest.fixture
def lane(shared_lane: Lane) -> Lane:
    """A lane of the process's token; a test leaves no key loaded in it."""
    return shared_lane


# --- processes ---


def until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Poll for a true value, bounded; the bound only ends a test that would fail anyway."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout_s} s")
        time.sleep(0.02)
    return value


@dataclass
class NodeProcess:
    """One node's process, its folder and its log."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    lifeline: int
    log_path: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def end(self, signal_number: int = 15) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(20)


@dataclass
class ClusterFolder:
    """The files of a cluster, its members' identities, and the node processes started from it."""

    root: Path
    world: World
    identities: dict[str, Identity]
    pin: str
    running: list[NodeProcess] = field(default_factory=list)
    _counter: Iterator[int] = field(default_factory=itertools.count)

    def config(self, name: str) -> Path:
        return self.root / name / "node.toml"

    def init(self, name: str) -> subprocess.CompletedProcess[str]:
        return self.command("init", "--config", str(self.config(name)))

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nodes", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.root,
            env={**os.environ, **environment},
            check=False,
        )

    def spawn(self, name: str, *, supervised: bool = False, open_files: int = 0, **environment: str) -> NodeProcess:
        """Start a node without waiting for it; ``pid`` is then that of the process that serves, or its supervisor's.

        ``open_files`` is its limit on descriptors, 0 for the usual one.
        """
        reader, writer = os.pipe()
        folder = self.root / name
        log_path = folder / f"log.{len(self.running)}"
        try:
            with log_path.open("wb") as log:
                process = subprocess.Popen(
                    [
                        *(["prlimit", f"--nofile={open_files}:{open_files}"] if open_files else []),
                        *(sys.executable, "-m", "nodes", "--config", str(self.config(name)), "--lifeline", str(reader)),
                        *([] if supervised else ["--unsupervised"]),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[reader],
                    cwd=self.root,
                    env={**os.environ, **environment},
                )
        finally:
            os.close(reader)
        node = NodeProcess(name, folder, process, writer, log_path)
        self.running.append(node)
        return node

    def start(self, name: str, *, supervised: bool = False, open_files: int = 0) -> NodeProcess:
        """Start a node and wait until it answers."""
        node = self.spawn(name, supervised=supervised, open_files=open_files)

        def answers() -> bool:
            if node.process.poll() is not None:
                raise AssertionError(f"{name} ended with {node.process.returncode}: {node.log}")
            with self.channel("alice") as channel:
                try:
                    return bool(ask(channel, name, "status", Empty(), 2))
                except NodeUnavailable:
                    return False

        until(answers, f"{name} answers")
        return node

    def channel(self, member: str, context: zmq.Context[Any] | None = None) -> Channel:
        """A channel of that member to all nodes."""
        return Channel(self.identities[member].transport, self.world.cluster.nodes, context)

    def close(self) -> None:
        """End every process that was started, by its own handle."""
        for node in self.running:
            os.close(node.lifeline)
            if node.process.poll() is None:
                node.process.kill()
            node.process.wait(20)

    # --- a key without a registry: the test plays the dealer, an absent node, and the balancer ---

    def make_key(
        self, node: str, algorithm: str = "aes-256-gcm", name: str = "", *, key: bytes = b"", dealer: str = "node5"
    ) -> Dealt:
        """A 1-of-1 key on a running node."""
        self.world.now_ms = time.time_ns() // 1_000_000
        name = name or f"key{next(self._counter)}"
        dealt = self.world.deal(name, algorithm, [node], 1, dealer=dealer, key=key)
        with self.channel(dealer) as channel:
            receipt = ask(channel, node, "share.prepare", dealt.offers[node], 10).receipt
            certificate = self.world.certificate(dealt, given=[receipt])
            ask(channel, node, "share.commit", ShareCommit(dealt.key_id, certificate), 10)
        return dealt

    def operate(
        self,
        node: str,
        dealt: Dealt,
        verb: str,
        data: bytes = b"",
        aad: bytes = b"",
        proof: bytes = b"",
        *,
        client: str = "alice",
        grant: bool = True,
        timeout_s: float = 10,
    ) -> bytes:
        """Use a key; with a fresh grant unless told otherwise."""
        self.world.now_ms = time.time_ns() // 1_000_000
        permit = self.world.grant(dealt, node, verb, client=client) if grant else b""
        body = Operate(dealt.manifest.name, dealt.key_id, data, aad, proof, False, permit)
        with self.channel(client) as channel:
            return bytes(ask(channel, node, verb, body, timeout_s).data)

    def release(self, node: str, dealt: Dealt, combiner: str, grant: bytes) -> Any:
        with self.channel(combiner) as channel:
            return ask(channel, node, "share.release", ShareRelease(dealt.key_id, grant, b""), 10)


def build_cluster(root: Path) -> ClusterFolder:
    """Identities, CURVE keys, manifest and configurations of a cluster, all in ``root``."""
    identities: dict[str, Identity] = {}
    members: list[Member] = []
    for name in (*ROLES, *NODES):
        folder = root / name
        folder.mkdir(mode=0o700)
        role = ROLES.get(name, "node")
        passphrase = "operator's" if role == "operator" else ""
        identities[name] = create_identity(folder / "identity.toml", name, role, passphrase)  # type: ignore[arg-type]
        members.append(
            identities[name].member(
                endpoint=f"tcp://127.0.0.1:{free_port()}" if role in ("node", "balancer") else "",
                location=f"site{int(name[-1]) % 3}/room/rack/{name}" if role == "node" else "",
            )
        )
    world = World({name: identity.signing for name, identity in identities.items()}, members)
    (root / "cluster.manifest").write_bytes(world.chain)
    pin = chain_pin(world.chain).hex()
    for name in NODES:
        write_toml(
            root / name / "node.toml",
            {
                "version": 1,
                "identity": "identity.toml",
                "manifest": "../cluster.manifest",
                "manifest_pin": pin,
                "data": "data",
                "token": {"label": name, "pin": f"file:../pin.{name}"},
            },
        )
    return ClusterFolder(root, world, identities, pin)


@pytest.fixture
def cluster_folder(tmp_path: Path) -> Iterator[ClusterFolder]:
    """The files of a new cluster; no token made, no process started."""
    folder = build_cluster(tmp_path)
    try:
        yield folder
    finally:
        folder.close()


@pytest.fixture(scope="session")
def new_cluster_folder() -> Callable[[Path], ClusterFolder]:
    """Makes them for tests that share one; who asks for it closes it."""
    return build_cluster


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterFolder]:
    """A cluster whose node1 runs for the whole session. The test plays every other member."""
    folder = build_cluster(tmp_path_factory.mktemp("live"))
    try:
        made = folder.init("node1")
        assert made.returncode == 0, made.stderr
        folder.start("node1")
        yield folder
    finally:
        folder.close()


@pytest.fixture(scope="session")
def foreign_identity() -> CurveIdentity:
    """A CURVE pair that is no member's."""
    public, secret = zmq.curve_keypair()
    return CurveIdentity("stranger", public, secret)


def naive_shares(dealt: Dealt) -> dict[str, tuple[Share, bytes]]:
    """Holder -> its share and salt."""
    return {node: (Share(offer.x, offer.y), offer.salt) for node, offer in dealt.offers.items()}


@pytest.fixture
def shares_of() -> Callable[[Dealt], dict[str, tuple[Share, bytes]]]:
    return naive_shares


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a process of its own (a token of its own); its arguments are strings."""

    def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def occurrences() -> Callable[[int, bytes], int]:
    """How often some bytes stand in the memory of a process."""

    def find(pid: int, needle: bytes) -> int:
        """How often it stands in the memory of a process."""
        found = 0
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                begin, end = (int(each, 16) for each in line.split()[0].split("-"))
                if line.split()[1].startswith("rw") and "[vvar" not in line:
                    try:
                        found += os.pread(memory.fileno(), end - begin, begin).count(needle)
                    except OSError:
                        continue  # a guard page or a device
        return found

    return find
