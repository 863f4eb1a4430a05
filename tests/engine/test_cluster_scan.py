"""What a cluster's life leaves in plain: on disks, on the wire, in logs, in the memory of its processes, in core files.

One cluster lives one life with known secrets (``_live``); each test looks at one place, each search has its control.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

import engine
from engine import LocalCluster, Share
from engine.client.config import write_toml
from engine.keys import ALGORITHMS, generate_material, load_private_key
from engine.protocol.requests import NodeStatus

SUDO = shutil.which("sudo")
IS_ROOT = os.geteuid() == 0
AS_ROOT = [] if IS_ROOT else [str(SUDO), "-n"]
CAN_CAPTURE = IS_ROOT or (
    SUDO is not None and subprocess.run([SUDO, "-n", "true"], capture_output=True, check=False).returncode == 0
)
CORE_LIMIT = resource.getrlimit(resource.RLIMIT_CORE)[1]
needs_capture = pytest.mark.skipif(
    not CAN_CAPTURE, reason="NOT RUN: reading the loopback needs root or password-less sudo"
)
needs_root = pytest.mark.skipif(not IS_ROOT, reason="NOT RUN: a node's memory can be read by root alone")

NAMES = ("aes-256-gcm", "hmac-sha512", "ecdsa-p256-sha256", "ed25519", "rsa-2048-pss-sha256")
DESTROYED = "destroyed"
OVERWRITE_VARIABLE = "KEYQUORUM_OVERWRITE_FREED"
THRESHOLD = 2
TTL_S = 4.0
TRIES = 5
EXPIRY_PATIENCE_S = 30.0
"""Less than the default TTLs, so that a node which does not go by the configured ones is noticed."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)
CLD_KILLED, CLD_DUMPED = 2, 3
RUN = 16
"""So many bytes of a secret in a row count as a find; a find in a row of 15 and more can't be missed."""
WORD = 8
TABLE_BITS = 22
PAGE = 4096
CHANGED = ("Anonymous", "Shared_Dirty", "Private_Dirty", "Swap")
"""Of a mapping's pages in smaps: those that are not as in its file."""

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
config, node = load_node_config(sys.argv[1]), sys.argv[2]
lane = Token(config.token, config.data).lane()
told = []
for copy in sys.argv[3:]:
    store = ShareStore(Path(copy) / "shares.db", node, lane)
    shares = {}
    for row in store.rows():
        if row.sealed:
            record = read_key_manifest(row.manifest)
            x = record.manifest.holder(node).x
            share, salt = unseal_share(lane, row.sealed, x, seal_context(record.manifest, x, node, record.digest))
            shares[row.name] = [x, share.y.hex(), salt.hex(), row.sealed.hex()]
    told.append({"row": store.secret(lane, "row").hex(), "shares": shares})
print(json.dumps(told))
"""


# --- searching ---


def _alike(one: bytes, other: bytes) -> int:
    """How many bytes they begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Patterns:
    """Secrets under names, to be found as they are, in hexadecimal, and in base64 at each alignment; all in one pass.

    Of a run of 15 bytes or more, wherever it lies, 8 lie at a multiple of 8: so only those words are looked up.
    """

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        self.secrets = dict(secrets)
        self._texts: list[tuple[str, bytes, int]] = []
        for name, secret in secrets.items():
            assert len(secret) >= RUN, name
            self._texts += [(name, secret, RUN)]
            self._texts += [(name, text.encode(), 2 * RUN) for text in (secret.hex(), secret.hex().upper())]
            for shift in range(3):
                text = base64.b64encode(bytes(shift) + secret)[4 if shift else 0 : -4]
                self._texts.append((name, text, min(len(text), RUN * 4 // 3 - 1)))
        self._places: dict[int, list[tuple[int, int]]] = {}
        for number, (_, text, _) in enumerate(self._texts):
            for place in range(len(text) - WORD + 1):
                word = int.from_bytes(text[place : place + WORD], sys.byteorder)
                self._places.setdefault(word, []).append((number, place))
        self._words = numpy.sort(numpy.fromiter(self._places, numpy.uint64, len(self._places)))
        self._table = numpy.zeros(1 << TABLE_BITS, numpy.bool_)
        self._table[self._hashed(self._words)] = True

    @staticmethod
    def _hashed(words: Any) -> Any:
        return (words * numpy.uint64(0x9E3779B97F4A7C15)) >> numpy.uint64(64 - TABLE_BITS)

    def count(self, data: bytes) -> Counter[str]:
        """Name -> how many runs of it there are."""
        words = numpy.frombuffer(data, numpy.uint64, len(data) // WORD)
        likely = numpy.flatnonzero(self._table[self._hashed(words)])
        places = numpy.searchsorted(self._words, words[likely])
        likely = likely[self._words[numpy.minimum(places, len(self._words) - 1)] == words[likely]]
        runs: set[tuple[str, int]] = set()
        for offset in likely:
            at = int(offset) * WORD
            for number, place in self._places[int(words[offset])]:
                name, text, enough = self._texts[number]
                before = _alike(data[max(0, at - place) : at][::-1], text[:place][::-1])
                after = _alike(data[at : at + len(text) - place], text[place:])
                if before + after >= enough:
                    runs.add((name, at - before))
        return Counter(name for name, _ in runs)

    def files(self, folders: Iterable[Path]) -> dict[Path, Counter[str]]:
        """File -> what was found in it, of all files below the folders."""
        found = {}
        for folder in folders:
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink() and (hits := self.count(path.read_bytes())):
                    found[path] = hits
        return found


def _image(pid: int) -> dict[str, bytes]:
    """The memory of a process but for unchanged contents of files and empty pages: "arena", "heap" and "rest".

    It has what a core dump has and what one leaves out: the arena of the SecretBuffers, known by its flags (locked, not
    dumped, wiped on fork; smaps in proc(5)).
    """
    image: dict[str, list[bytes]] = {"arena": [], "heap": [], "rest": []}
    text = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")
    heads = list(re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)$", text, flags=re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for head, text_end in zip(heads, ends, strict=True):
            told = text[head.end() : text_end]
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", told, flags=re.MULTILINE))
            if "r" not in head[3] or not any(int(sizes[name]) for name in CHANGED):
                continue
            flags = set(told.partition("VmFlags:")[2].split())
            kind = "arena" if flags >= {"lo", "dd", "wf"} else "heap" if head[4] == "[heap]" else "rest"
            begin, end = int(head[1], 16), int(head[2], 16)
            with contextlib.suppress(OSError):  # a device's memory
                pages = numpy.frombuffer(os.pread(memory.fileno(), end - begin, begin), numpy.uint64)
                pages = pages.reshape(-1, PAGE // WORD)
                image[kind].append(pages[pages.any(axis=1)].tobytes())
    return {kind: b"".join(parts) for kind, parts in image.items()}


def _in_memory(cluster: LocalCluster, patterns: Patterns) -> dict[str, dict[str, Counter[str]]]:
    """Process -> kind of memory -> what was found there, once more as "whole ..." where it is there from end to end."""
    """Process -> kind of memory -> what was found there."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for name, pid in cluster.running().items():
        assert pid is not None, f"{name} does not run"
        found[name] = {}
        for kind, data in _image(pid).items():
            hits = found[name][kind] = patterns.count(data)
            whole = [each for each in hits if patterns.secrets[each] in data]
            hits.update(f"whole {each}" for each in whole)
    return found


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

    def end(self) -> None:
        """End the sniffer, if it was not stopped."""
        if self._process.poll() is None:
            self._process.communicate(timeout=20)


def _send_in_plain(data: bytes) -> None:
    """The positive control: the secret over a plain TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            client.sendall(b"prefix" + data + b"suffix")
            assert peer.recv(65_536)


# --- the life ---


@dataclass
class Life:
    """What is left of a cluster that has ended by crashes, and what was seen while it lived."""

    home: Path
    scratch: Path
    nodes: tuple[str, ...]
    secrets: dict[str, bytes]
    """Keys, their blinding, shares, salts, PINs, and what nodes authenticate rows with; by "kind key ..."."""
    patterns: Patterns
    sealed: dict[str, dict[str, bytes]]
    """Before the refresh, before the rotation: which share -> its sealed blob."""
    seen: dict[str, dict[str, dict[str, Counter[str]]]] = field(default_factory=dict)
    """Moment -> process -> kind of memory -> what was found."""
    running: dict[Path, Counter[str]] = field(default_factory=dict)
    """What was found on disks while keys were loaded."""
    wire: bytes = b""
    control: bytes = b""
    """What was sent in plain."""
    ends: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Process -> the signal that ended it, and how it ended (si_code in sigaction(2))."""
    left: list[str] = field(default_factory=list)
    """What lay in the processes' working folder at the end."""


def _material(name: str) -> tuple[bytes, bytes]:
    """(what a user imports, what is looked for): the key itself, and of an RSA key a prime."""
    algo = ALGORITHMS[name]
    material = generate_material(algo)
    if not algo.asymmetric:
        return material, material
    private = load_private_key(algo, material)
    pkcs8 = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    if isinstance(private, rsa.RSAPrivateKey):
        return pkcs8, private.private_numbers().p.to_bytes(algo.bits // 16, "big")
    return pkcs8, material


def _use(kq: engine.Engine) -> None:
    """Every node gathers every key, and uses it."""
    for name in NAMES:
        assert len(kq.prewarm(name, timeout=30)) == 3
        if "gcm" in name:
            kq.decrypt(name, kq.encrypt(name, b"x" * 1000))
        elif "hmac" in name:
            kq.verify_mac(name, b"x", kq.mac(name, b"x"))
        else:
            kq.verify(name, b"x", kq.sign(name, b"x"))


def _cached(kq: engine.Engine) -> dict[str, int]:
    """Cache -> entries of all nodes."""
    told: Counter[str] = Counter()
    for member in kq.status():
        if isinstance(member.status, NodeStatus):
            told.update({each.cache: each.entries for each in member.status.caches})
    return told


def _refusals(kq: engine.Engine) -> bytes:
    """Requests that are refused, for what is then told in logs; the material that was in them."""
    wrong = os.urandom(47)
    for name in set(NAMES) - {"hmac-sha512"}:  # whose keys may have any such length
        with pytest.raises((ValueError, engine.EngineError)):
            kq.import_key(f"refused/{name}", name, key_material=wrong, threshold=THRESHOLD, shares=3)
    with pytest.raises(engine.InvalidTag):
        kq.decrypt(NAMES[0], b"KQ\x01\0\0\0\1" + bytes(40))
    return wrong


def _read_shares(cluster: LocalCluster, copies: Path, life: Life) -> None:
    """Take up what only nodes' tokens open, each read by a process of its own from two copies of the node's store."""
    readers = {}
    for node in cluster.nodes:
        command = [sys.executable, "-c", READ_SHARES, str(cluster.path / "nodes" / node / "node.toml"), node]
        command += [str(copies / epoch / node) for epoch in ("old", "new")]
        readers[node] = subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/")
    shares: dict[str, list[Share]] = {}
    for node, reader in readers.items():
        told, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        life.secrets[f"row {node}"] = bytes.fromhex(json.loads(told)[0]["row"])
        for epoch, store in zip(("old", "new"), json.loads(told), strict=True):
            for name, (x, y, salt, sealed) in store["shares"].items():
                share = Share(x, bytes.fromhex(y))
                life.secrets[f"share {name} {epoch} {node}"] = share.y
                life.secrets[f"salt {name} {epoch} {node}"] = bytes.fromhex(salt)
                life.sealed[epoch][f"{name} {node}"] = bytes.fromhex(sealed)
                shares.setdefault(f"{name} {epoch}", []).append(share)
    for name in (*NAMES, DESTROYED):
        secret = engine.reconstruct_key(shares[f"{name} old"][:THRESHOLD])
        assert name == DESTROYED or secret == engine.reconstruct_key(shares[f"{name} new"][1 : THRESHOLD + 1])
        life.secrets[f"blinding {name}"] = secret[-32:]
        if name == DESTROYED:
            life.secrets[f"key {name}"] = secret[:-32]
    for node in cluster.nodes:
        pin = (cluster.path / "secrets" / f"{node}.pin").read_bytes().strip()
        life.secrets[f"pin {node}"] = pin


def _copy_stores(cluster: LocalCluster, folder: Path) -> None:
    for node in cluster.nodes:
        (folder / node).mkdir(parents=True)
        for file in cluster.data_folder(node).glob("shares.db*"):
            shutil.copy(file, folder / node)


def _crash(cluster: LocalCluster, life: Life) -> None:
    """End every process by a signal whose default is a core dump."""
    for number, (name, pid) in zip(CRASHES, cluster.running().items(), strict=True):
        assert pid is not None
        os.kill(pid, number)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it stays to be reaped by the cluster
        assert ended is not None
        life.ends[name] = (ended.si_status, ended.si_code)


def _live(home: Path, scratch: Path, copies: Path) -> Life:
    """Import, use, refresh, destroy; restart, use, let go by time and by flush; crash; rotate a KEK.

    Before the restart, nodes do not overwrite what they free: that shows that there is something to be found.
    """
    life = Life(home, scratch, (), {}, Patterns({}), {"old": {}, "new": {}})
    with LocalCluster(nodes=3, threshold=THRESHOLD, path=home, supervised=False) as cluster:
        life.nodes = cluster.nodes
        with engine.connect(cluster.client_config) as kq:
            for name in NAMES:
                material, life.secrets[f"key {name}"] = _material(name)
                kq.import_key(name, name, key_material=material, threshold=THRESHOLD, shares=3)
            kq.create_key(DESTROYED, "aes-256-gcm", threshold=THRESHOLD, shares=3)
            if IS_ROOT:
                life.seen["dealt"] = _in_memory(cluster, Patterns(life.secrets))
            _use(kq)
            images = {name: _image(pid) for name, pid in cluster.running().items() if pid is not None and IS_ROOT}
            life.secrets["key refused"] = _refusals(kq)
            _copy_stores(cluster, copies / "old")
            for name in NAMES:
                kq.refresh_key(name, timeout=30)
            kq.destroy_key(DESTROYED)
        cluster.stop()
        _copy_stores(cluster, copies / "new")
        for node in cluster.nodes:
            config = home / "nodes" / node / "node.toml"
            cache = {"ttl_s": TTL_S, "share_ttl_s": TTL_S}
            write_toml(config, {**tomllib.loads(config.read_text(encoding="utf-8")), "cache": cache})
        _read_shares(cluster, copies, life)
        life.patterns = Patterns(life.secrets)
        life.seen["freed"] = {
            name: {kind: life.patterns.count(data) for kind, data in image.items()} for name, image in images.items()
        }
        images.clear()
        del os.environ[OVERWRITE_VARIABLE]  # set by the fixture, which takes it back
        cluster.start()
        with engine.connect(cluster.client_config) as kq:
            _remember(cluster, kq, life)
        _crash(cluster, life)
    return life


def _remember(cluster: LocalCluster, kq: engine.Engine, life: Life) -> None:
    """See what is in memory while keys are loaded, when their time is over, and after a flush."""
    for _ in range(TRIES):
        _use(kq)
        if IS_ROOT:
            life.seen["loaded"] = _in_memory(cluster, life.patterns)
        life.running = life.patterns.files([life.home, life.scratch])
        if _cached(kq)["shares"] == len(NAMES) * 3:
            break  # else their time was over before all was seen
        kq.flush()
    until = time.monotonic() + EXPIRY_PATIENCE_S
    while (left := _cached(kq))["keys"] or left["shares"]:
        assert time.monotonic() < until, left
        time.sleep(0.1)
    if IS_ROOT:
        life.seen["expired"] = _settled(cluster, life.patterns)
    _use(kq)
    kq.flush()
    if IS_ROOT:
        life.seen["flushed"] = _settled(cluster, life.patterns)


def _settled(cluster: LocalCluster, patterns: Patterns) -> dict[str, dict[str, Counter[str]]]:
    """What is in memory when late answers of holders have been dropped too, which nodes do when they are idle."""
    for _ in range(TRIES):
        seen = _in_memory(cluster, patterns)
        if not any(name.startswith("share") for kinds in seen.values() for hits in kinds.values() for name in hits):
            break
        time.sleep(1.0)
    return seen


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """One life, with debug logs, temporary files in ``scratch``, and cores allowed by who starts the processes."""
    base = tmp_path_factory.mktemp("scan")
    scratch, copies, working = base / "tmp", base / "copies", base / "working"
    scratch.mkdir()
    working.mkdir()
    capture = Capture(base / "packets") if CAN_CAPTURE else None
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ending:
        if capture is not None:
            ending.callback(capture.end)
        soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
        ending.callback(resource.setrlimit, resource.RLIMIT_CORE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        patch.setenv("TMPDIR", str(scratch))
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("KEYQUORUM_LOG_LEVEL", "debug")
        patch.setenv(OVERWRITE_VARIABLE, "0")
        patch.chdir(working)
        lived = _live(base / "kq", scratch, copies)
        lived.left = sorted(os.listdir(working))
        if capture is not None:
            lived.control = os.urandom(64)
            _send_in_plain(lived.control)
            lived.wire = capture.stop()
        yield lived


def _only(found: Mapping[Path, Counter[str]], *besides: Path) -> dict[Path, Counter[str]]:
    """What was found outside the folders where PINs belong."""
    return {path: hits for path, hits in found.items() if not any(path.is_relative_to(each) for each in besides)}


# --- the search itself ---


def test_the_search_finds_every_form_at_every_place() -> None:
    """At each offset, cut off at either end, as bytes, in hexadecimal and in base64; and finds nothing in noise."""
    secret, other = os.urandom(64), os.urandom(32)
    patterns = Patterns({"secret": secret, "other": other})
    for offset in range(WORD):
        before = os.urandom(offset)
        for part in (secret, secret[3:], secret[:RUN], secret[-RUN:], secret[20 : 20 + RUN]):
            assert patterns.count(before + part + os.urandom(9)) == {"secret": 1}, (offset, len(part))
        for text in (secret.hex(), secret.hex().upper(), other.hex() + secret.hex()):
            assert patterns.count(before + text.encode() + b"=" * 9)["secret"] == 1
        assert patterns.count(base64.b64encode(before + secret + b"after")) == {"secret": 1}
        assert patterns.count(before + secret + b"x" + secret[:40] + b"y" + other + bytes(7)) == {
            "secret": 2,
            "other": 1,
        }
    assert not patterns.count(os.urandom(10_000_000) + bytes(1_000_000))
    assert not patterns.count(secret[: RUN - 2] + bytes(16))
    assert not patterns.count(b"")


# --- the places ---


def test_no_disk_and_no_log_holds_a_secret(life: Life) -> None:
    """Stores, their logs, tokens, registry, audit logs, debug logs, temporary files; while it runs and at the end."""
    pins = life.home / "secrets"
    assert _only(life.running, pins) == {}
    found = life.patterns.files([life.home, life.scratch])
    assert _only(found, pins) == {}
    assert {path.name: dict(hits) for path, hits in found.items()} == {f"{n}.pin": {f"pin {n}": 1} for n in life.nodes}
    searched = {path.name for path in life.home.rglob("*") if path.is_file()}
    assert searched >= {"shares.db", "shares.db-wal", "registry.db", "softhsm2.conf", "balancer.log", "node1.log"}
    assert any(name.endswith(".object") for name in searched)
    assert b'"level": "debug"' in (life.home / "run" / "balancer.log").read_bytes()
    # The control: what is put there is found, in each form.
    for planted in ("key aes-256-gcm", "share ed25519 old node1", "blinding hmac-sha512", "pin node2", "key refused"):
        for form in (
            life.secrets[planted],
            life.secrets[planted].hex().encode(),
            base64.b64encode(life.secrets[planted]),
        ):
            path = life.home / "nodes" / "planted"
            path.write_bytes(b"before" + form + b"after")
            assert _only(life.patterns.files([life.home]), pins) == {path: Counter({planted: 1})}
            path.unlink()


@needs_capture
def test_the_loopback_carries_no_secret(life: Life) -> None:
    """Every packet of the whole life: imports, creation, gathering, refresh, use, destruction, refusals."""
    assert life.wire.count(b"CURVE") > 20
    assert len(life.wire) > 200_000
    assert life.patterns.count(life.wire) == {}
    assert Patterns({"control": life.control}).count(life.wire)["control"] >= 1


def test_erased_shares_are_gone_from_disks(life: Life) -> None:
    """Sealed shares of the old epoch and of a destroyed key; then, with a fresh KEK and PIN, those of before too."""
    copies = life.home.parent / "copies"
    old, new = Patterns(life.sealed["old"]), Patterns(life.sealed["new"])
    assert len(life.sealed["old"]) == 6 * 3
    assert len(life.sealed["new"]) == 5 * 3
    assert set().union(*old.files([copies / "old"]).values()) == set(life.sealed["old"]), "the control"
    assert old.files([life.home, life.scratch]) == {}
    node = life.nodes[0]
    data = life.home / "nodes" / node / "data"
    mine = {name for name in life.sealed["new"] if name.endswith(node)}
    assert set().union(*new.files([data]).values()) == mine, "the control"
    tokens = {path.name for path in (data / "tokens").iterdir()}
    command = [sys.executable, "-P", "-m", "nodes", "rotate-kek", "--config", str(data.parent / "node.toml")]
    subprocess.run(command, capture_output=True, check=True, cwd="/", timeout=60)
    assert tokens.isdisjoint(path.name for path in (data / "tokens").iterdir())
    assert new.files([data, life.home / "secrets"]) == {}
    found = life.patterns.files([life.home])
    assert {path.name for path in found} == {f"{n}.pin" for n in life.nodes[1:]}, (
        "the old PIN is gone, others are there"
    )


@needs_root
def test_no_memory_keeps_a_key_nor_a_share_after_its_time(life: Life) -> None:
    """A node's whole memory while keys are loaded, after their TTL, and after a flush; dealers are the control.

    SoftHSM keeps a loaded key, and the KEK, enciphered under a key that is in the same memory; that is not found here.
    The dealers did not overwrite what they freed.
    """
    own = {node: {f"share {name} new {node}" for name in NAMES} for node in life.nodes}
    dealt = set().union(*(kind for node in life.nodes for kind in life.seen["dealt"][node].values()))
    assert dealt & {f"whole key {name}" for name in NAMES}, (
        "the search finds no key where imported keys pass through bytes"
    )
    for node in life.nodes:
        left = life.seen["freed"][node]["heap"] + life.seen["freed"][node]["rest"]
        assert any(name.startswith("share") for name in left), "the search finds no share where freed memory stays"
    for moment in ("loaded", "expired", "flushed"):
        seen = life.seen[moment]
        assert all(not hits for hits in seen["balancer"].values()), (moment, seen["balancer"])
        for node in life.nodes:
            everywhere = sum(seen[node].values(), Counter())
            assert everywhere[f"row {node}"] >= 1, "the control: what rows are authenticated with is there at any time"
            traces = {
                name for name in everywhere if name.startswith(("key", "blinding", "whole key", "whole blinding"))
            }
            assert traces == set(), (moment, node, seen[node])
            assert {name for name in everywhere if " old " in name} == set(), moment
            locked = {name for name in seen[node]["arena"] if name.startswith("share")}
            assert locked == (own[node] if moment == "loaded" else set()), (moment, node)
            assert moment == "loaded" or not seen[node]["arena"]
            shares = {name for name in everywhere if name.startswith(("share", "whole share"))}
            assert moment == "loaded" or shares == set(), (moment, node, seen[node])


@pytest.mark.skipif(CORE_LIMIT == 0, reason="NOT RUN: core dumps are forbidden here, so there is no control")
def test_a_crash_leaves_no_core(life: Life, tmp_path: Path) -> None:
    """Every process was ended by a signal that dumps core, where that is allowed; a plain process is the control."""
    assert life.ends == {
        name: (number, CLD_KILLED) for name, number in zip((*life.nodes, "balancer"), CRASHES, strict=True)
    }
    assert life.left == []
    plain = "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(4)[1],) * 2);"
    process = subprocess.Popen([sys.executable, "-c", f"{plain} os.kill(os.getpid(), signal.SIGSEGV)"], cwd=tmp_path)
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.wait()
    assert ended is not None
    assert (ended.si_status, ended.si_code) == (signal.SIGSEGV, CLD_DUMPED)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text(encoding="ascii")
    assert os.listdir(tmp_path) or pattern.startswith(("|", "/")), "the control left no core"
