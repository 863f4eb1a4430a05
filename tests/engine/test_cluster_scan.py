"""No key byte and no share byte in plain: not on any disk of the cluster, not on the wire. With positive controls."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import engine
from engine import LocalCluster

SUDO = shutil.which("sudo")
AS_ROOT = [] if os.geteuid() == 0 else [str(SUDO), "-n"]
CAN_CAPTURE = os.geteuid() == 0 or (
    SUDO is not None and subprocess.run([SUDO, "-n", "true"], capture_output=True, check=False).returncode == 0
)
needs_root = pytest.mark.skipif(
    not CAN_CAPTURE, reason="NOT RUN: reading the loopback needs root or password-less sudo"
)
WINDOW = 12
"""Any run of this many secret bytes counts as a find."""

SNIFFER = """
import select, socket, struct, sys
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))  # ETH_P_ALL
sniffer.setsockopt(socket.SOL_SOCKET, 33, 64 * 1024 * 1024)  # SO_RCVBUFFORCE
sniffer.bind(("lo", 0))
print("ready", file=sys.stderr, flush=True)
while True:
    ready, _, _ = select.select([sniffer, sys.stdin], [], [])
    if sniffer in ready:
        sys.stdout.buffer.write(sniffer.recv(70000))
    elif sys.stdin in ready:
        break
dropped = struct.unpack("II", sniffer.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
print("dropped", dropped, file=sys.stderr, flush=True)
"""

READ_SHARES = """
import json, sys
from pathlib import Path
from engine.protocol.manifest import read_key_manifest
from nodes.config import load_node_config
from nodes.store import ShareStore, seal_context, unseal_share
from nodes.token import Token
config = load_node_config(sys.argv[1])
token = Token(config.token, config.data)
lane = token.lane()
node = sys.argv[2]
for row in ShareStore(config.data / "shares.db", node, lane).rows():
    record = read_key_manifest(row.manifest)
    x = record.manifest.holder(node).x
    share, salt = unseal_share(lane, row.sealed, x, seal_context(record.manifest, x, node, record.digest))
    print(share.y.hex())
    print(salt.hex())
"""


def _needles(secret: bytes) -> list[bytes]:
    """Runs of the secret as it might lie about: raw, in hexadecimal, in base64 at each alignment."""
    found = []
    for start in range(0, max(1, len(secret) - WINDOW + 1), WINDOW):
        run = secret[start : start + WINDOW]
        found += [run, run.hex().encode(), run.hex().upper().encode()]
        for shift in range(3):
            found.append(base64.b64encode(b"\0" * shift + run)[4 if shift else 0 : -4])
    return [needle for needle in found if len(needle) >= WINDOW]


def _finds(haystack: bytes, needles: list[bytes]) -> bool:
    return any(needle in haystack for needle in needles)


def _scan_files(folders: list[Path], needles: list[bytes]) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and _finds(path.read_bytes(), needles)
    ]


class Capture:
    """Everything that passes the loopback interface, read by a process of its own (a packet socket needs root)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("wb") as sink:
            self._process = subprocess.Popen(
                [*AS_ROOT, sys.executable, "-c", SNIFFER], stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.PIPE
            )
        assert self._process.stderr is not None
        ready = self._process.stderr.readline()
        assert ready == b"ready\n", ready

    def stop(self) -> bytes:
        """All packets, in order of arrival; an empty standard input ends the sniffer."""
        _, told = self._process.communicate(timeout=20)
        assert told == b"dropped 0\n", told
        return self._path.read_bytes()


@contextmanager
def _capture(path: Path) -> Iterator[Capture]:
    capture = Capture(path)
    try:
        yield capture
    finally:
        if capture._process.poll() is None:
            capture._process.communicate(timeout=20)


def _send_in_plain(data: bytes) -> None:
    """The positive control: the secret over a plain TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            client.sendall(b"prefix" + data + b"suffix")
            assert peer.recv(65_536)


def _imported(kq: engine.Engine) -> list[bytes]:
    """Import one key of each kind and return their material."""
    aes, mac = os.urandom(32), os.urandom(64)
    edwards = ed25519.Ed25519PrivateKey.generate()
    curve = ec.generate_private_key(ec.SECP256R1())
    kq.import_key("scan/aes", "aes-256-gcm", key_material=aes, threshold=3, shares=5)
    kq.import_key("scan/mac", "hmac-sha256", key_material=mac, threshold=3, shares=5)
    for name, algorithm, private in (("ed", "ed25519", edwards), ("ec", "ecdsa-p256-sha256", curve)):
        pkcs8 = private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        kq.import_key(f"scan/{name}", algorithm, key_material=pkcs8, threshold=3, shares=5)
    scalar = curve.private_numbers().private_value.to_bytes(32, "big")
    return [aes, mac, edwards.private_bytes_raw(), scalar]


def _use_everything(kq: engine.Engine) -> None:
    for _ in range(2):
        for name in ("scan/aes", "scan/mac", "scan/ed", "scan/ec"):
            kq.prewarm(name)  # every node gathers: shares travel in all directions
        kq.decrypt("scan/aes", kq.encrypt("scan/aes", b"x" * 1000))
        kq.mac("scan/mac", b"x")
        kq.sign("scan/ed", b"x")
        kq.sign("scan/ec", b"x")
        kq.flush()
    with pytest.raises(engine.InvalidTag):
        kq.decrypt("scan/aes", b"KQ\x01\0\0\0\1" + bytes(40))


def _shares(cluster: LocalCluster) -> list[bytes]:
    """Every share value and salt, read from each node's store with its token by a process of its own."""
    found: list[bytes] = []
    for node in cluster.nodes:
        config = cluster.path / "nodes" / node / "node.toml"
        ended = subprocess.run(
            [sys.executable, "-c", READ_SHARES, str(config), node], capture_output=True, text=True, check=True, cwd="/"
        )
        found += [bytes.fromhex(line) for line in ended.stdout.split()]
    return found


def _exercise(home: Path) -> tuple[LocalCluster, list[bytes], list[Path]]:
    """A cluster's life with known keys: the stopped cluster, the keys, and the files that held a key while it ran."""
    with LocalCluster(nodes=5, threshold=3, path=home) as cluster, engine.connect(cluster.client_config) as kq:
        secrets = _imported(kq)
        _use_everything(kq)
        running = _scan_files([home], [needle for secret in secrets for needle in _needles(secret)])
    return cluster, secrets, running


def test_no_disk_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are imported, gathered and used; then every file of it, logs and temporary files too, is searched."""
    scratch, home = tmp_path / "tmp", tmp_path / "kq"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    cluster, secrets, running = _exercise(home)
    shares = _shares(cluster)
    assert len(shares) == 5 * 4 * 2
    assert running == []
    needles = [needle for secret in (*secrets, *shares) for needle in _needles(secret)]
    assert _scan_files([home, scratch], needles) == []
    # The positive control: the same scan over the same folders finds a key and a share that are put there.
    for number, planted in enumerate(
        (secrets[0], shares[0], secrets[3].hex().encode(), base64.b64encode(b"ab" + shares[2]))
    ):
        path = home / "nodes" / f"planted-{number}"
        path.write_bytes(b"before" + planted + b"after")
        assert _scan_files([home, scratch], needles) == [path]
        path.unlink()


@needs_root
def test_the_loopback_carries_no_secret(tmp_path: Path) -> None:
    """The same life of a cluster, with every packet on the loopback captured and searched."""
    with _capture(tmp_path / "packets") as capture:
        cluster, secrets, _ = _exercise(tmp_path / "kq")
        control = os.urandom(64)
        _send_in_plain(control)
        wire = capture.stop()
    assert len(wire) > 100_000
    assert _finds(wire, _needles(control)), "the positive control, sent in plain, was not found"
    shares = _shares(cluster)
    assert not _finds(wire, [needle for secret in (*secrets, *shares) for needle in _needles(secret)])
