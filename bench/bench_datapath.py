"""Owns the figures of the data path's parts: coding, policy, cache, routing, audit, token, a round trip, a cold use.

Run with ``make bench``, or ``pytest bench/bench_datapath.py --benchmark-enable``. Parts are the real functions on the
objects of a real cluster. The floor of what is pure Python is a fixed piece of Python, that of a token operation the
same straight through python-pkcs11, that of a round trip the token and a bare echo on the same core. Whole operations
in other placements are in ``datapath.py``, creations and batches in ``bench_cluster.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pytest_benchmark.fixture import BenchmarkFixture
from rig import DATA, DIGEST, Rig

from engine import ALGORITHMS
from engine.keys import RequestType
from engine.protocol.audit import REPLY, Record
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, Operate, Result, classify_request
from engine.protocol.routing import Router
from engine.protocol.signed import SigningKey
from engine.protocol.wire import PROTOCOL_VERSION, Load, Reply, Request, Status, reply_codec, request_codec
from engine.sharing import SecretBuffer
from nodes.audit import AuditLog
from nodes.cache import Cache, CacheLimits
from nodes.policy import check_key, check_verb
from nodes.token import LoadedKey

VERB = RequestType.ENCRYPT
NAME = "gcm"
REQUEST_CLASS = classify_request(VERB, ALGORITHMS["aes-256-gcm"].name)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Five nodes, 3-of-5, a client, a token of this process and an echo."""
    with Rig(with_p11=False) as made:
        yield made


@pytest.fixture
def one_core(rig: Rig) -> Iterator[None]:
    """Client, nodes and echo on one core: elsewhere the echo has two speeds."""
    with rig.placed("one"):
        yield


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditLog]:
    """A log of this process's own."""
    log = AuditLog(
        tmp_path_factory.mktemp("audit"),
        SigningKey("bench", Ed25519PrivateKey.generate()),
        boot="00000000",
        post=lambda call: call(),
        now_ms=lambda: time.time_ns() // 1_000_000,
    )
    yield log
    log.close()


@pytest.fixture(scope="module")
def loaded(rig: Rig) -> dict[str, LoadedKey]:
    """Session keys in this process's token, loaded as a node loads them."""
    algorithms = {"gcm": "aes-256-gcm", "sign": "ecdsa-p256-sha256"}
    return {name: rig.lane.load(ALGORITHMS[each], os.urandom(32)) for name, each in algorithms.items()}


def _record(text: str = "ok") -> Record:
    return Record(1, "node1", "00000000", 1, REPLY, member="bench", verb=VERB, key=NAME, outcome=text, elapsed_us=50)


def _floors(benchmark: BenchmarkFixture, *names: str) -> None:
    benchmark.extra_info["floor"] = [f"{Path(__file__).name}::{name}" for name in names]


# --- floors ---


def test_floor_python(benchmark: BenchmarkFixture) -> None:
    """A fixed piece of Python: some attributes, dictionary look-ups, calls and a sort."""
    names = {f"node{number}": number for number in range(5)}

    def work() -> list[str]:
        return sorted(names, key=lambda name: -names[name])

    assert benchmark(work)[0] == "node4"


def test_floor_write(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """One positioned write of a record's length."""
    line = bytes(400)
    descriptor = os.open(tmp_path / "lines", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert benchmark(os.pwrite, descriptor, line, 0) == len(line)
    finally:
        os.close(descriptor)


def test_floor_durable_append(benchmark: BenchmarkFixture, audit_log: AuditLog) -> None:
    """A record of the audit log, on the disk."""
    record = _record()
    benchmark.pedantic(lambda: audit_log.write(record, durable=True), rounds=100, warmup_rounds=5)
    assert not audit_log.problem


def test_floor_straight_gcm(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """AES-256-GCM of 1 KiB straight through python-pkcs11."""
    assert len(benchmark(rig.straight.gcm)) == 12 + len(DATA) + 16


def test_floor_straight_sign(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """ECDSA P-256 straight through python-pkcs11."""
    assert len(benchmark(rig.straight.sign)) == 64


@pytest.mark.usefixtures("one_core")
def test_floor_echo_one_core(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """The bare echo, both ends on one core."""
    assert len(benchmark(rig.echo.exchange)) == 128


@pytest.mark.usefixtures("one_core")
def test_floor_warm_sign(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """A warm signature, all on one core."""
    rig.kq.verify("sign", None, benchmark(rig.kq.sign, "sign", digest=DIGEST), digest=DIGEST)


# --- parts ---


def test_encode(benchmark: BenchmarkFixture) -> None:
    """A request for AES-GCM of 1 KiB, message and envelope."""
    _floors(benchmark, "test_floor_python")
    message = Operate(NAME, bytes(16), DATA, b"", b"", False, b"")

    def encode() -> bytes:
        body = REQUEST_CODECS[VERB].encode(message)
        return request_codec.encode(Request(PROTOCOL_VERSION, 1, VERB, 5000, body, {}))

    assert len(benchmark(encode)) > len(DATA)


def test_decode(benchmark: BenchmarkFixture) -> None:
    """The reply to it, envelope and message."""
    _floors(benchmark, "test_floor_python")
    body = REPLY_CODECS[VERB].encode(Result(DATA))
    raw = reply_codec.encode(Reply(PROTOCOL_VERSION, 1, Status.OK, body, Load(0, 10, True), {}))
    assert benchmark(lambda: REPLY_CODECS[VERB].decode(reply_codec.decode(raw).body)).data == DATA


def test_policy(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """Whether this client may encrypt with this key, by the rules of the cluster manifest."""
    _floors(benchmark, "test_floor_python")
    cluster = rig.kq.cluster
    member = cluster.members[rig.cluster.clients[-1]]

    def check() -> bool:
        check_verb(cluster, member, VERB)
        check_key(cluster, member, VERB, NAME)
        return True

    assert benchmark(check)


def test_cache(benchmark: BenchmarkFixture) -> None:
    """A loaded key found among a thousand."""
    _floors(benchmark, "test_floor_python")
    cache: Cache[tuple[bytes, int], int] = Cache(CacheLimits(ttl_s=300.0, max_entries=1024))
    keys = [(number.to_bytes(16, "big"), 1) for number in range(1000)]
    for number, key in enumerate(keys):
        cache.put(key, number, 0.0)
    assert benchmark(cache.get, keys[500], 1.0) == 500


def test_route(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """The choice among five combiners, and what is learnt from the reply."""
    _floors(benchmark, "test_floor_python")
    router, holders = Router(rig.kq.cluster), rig.cluster.nodes
    load = Load(0, 10, True)

    def route() -> str:
        best = router.rank(REQUEST_CLASS, NAME, holders, 1.0)[0]
        router.is_loaded(NAME, best)
        router.sent(best, 1.0)
        router.answered(best, NAME, REQUEST_CLASS, load, 100.0, 1.0)
        return best

    assert benchmark(route) in holders


def test_audit_append(benchmark: BenchmarkFixture, audit_log: AuditLog) -> None:
    """A record made, chained and written; its sync is beside."""
    _floors(benchmark, "test_floor_write")
    assert benchmark(lambda: audit_log.write(_record())) > 0


def test_token_gcm(benchmark: BenchmarkFixture, rig: Rig, loaded: dict[str, LoadedKey]) -> None:
    """AES-GCM of 1 KiB as a node has the token do it."""
    _floors(benchmark, "test_floor_straight_gcm")
    assert rig.lane.decrypt(loaded["gcm"], benchmark(rig.lane.encrypt, loaded["gcm"], DATA, b""), b"") == DATA


def test_token_sign(benchmark: BenchmarkFixture, rig: Rig, loaded: dict[str, LoadedKey]) -> None:
    """ECDSA P-256, the signature's DER included."""
    _floors(benchmark, "test_floor_straight_sign")
    rig.lane.verify(loaded["sign"], DIGEST, benchmark(rig.lane.sign, loaded["sign"], DIGEST))


def test_token_load(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """An AES key out of locked memory into the token, and out of it again."""
    _floors(benchmark, "test_floor_straight_gcm")
    algorithm = ALGORITHMS["aes-256-gcm"]
    with SecretBuffer.copy_of(os.urandom(32)) as material:
        benchmark.pedantic(lambda: rig.lane.load(algorithm, material).destroy(), rounds=2000, warmup_rounds=20)
        key = rig.lane.load(algorithm, material)
    assert rig.lane.decrypt(key, rig.lane.encrypt(key, DATA, b""), b"") == DATA
    key.destroy()


# --- the whole ---


@pytest.mark.usefixtures("one_core")
def test_round_trip_gcm(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """A warm AES-GCM of 1 KiB, all on one core, beside F."""
    _floors(benchmark, "test_floor_straight_gcm", "test_floor_echo_one_core")
    assert rig.kq.decrypt(NAME, benchmark(rig.kq.encrypt, NAME, DATA)) == DATA


@pytest.mark.usefixtures("one_core")
def test_round_trip_sign(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """A warm ECDSA signature, all on one core, beside F."""
    _floors(benchmark, "test_floor_straight_sign", "test_floor_echo_one_core")
    rig.kq.verify("sign", None, benchmark(rig.kq.sign, "sign", digest=DIGEST), digest=DIGEST)


def test_cold_sign(benchmark: BenchmarkFixture, rig: Rig) -> None:
    """The key in no token: grant, gathering, combining, loading, signing; beside a warm one and a durable record."""
    _floors(benchmark, "test_floor_warm_sign", "test_floor_durable_append")
    signature = benchmark.pedantic(
        lambda: rig.kq.sign("sign", digest=DIGEST),
        setup=lambda: rig.kq.flush("sign") and None,
        rounds=100,
        warmup_rounds=3,
    )
    rig.kq.verify("sign", None, signature, digest=DIGEST)
