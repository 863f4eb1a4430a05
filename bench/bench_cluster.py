"""Owns the figures of the main job: sign and encrypt through a local cluster, warm and cold, beside the bare token.

Run with ``make bench``, or ``pytest bench/bench_cluster.py --benchmark-enable``. Policy, audit, CURVE and TTLs are at
their defaults. The floor of a cluster operation is the same operation straight on a token (python-pkcs11, session key),
measured in the same run. An echo over a bare CURVE socket stands beside it for the eye: it jumps between two speeds
with the cores that the scheduler gives it, so no ratio rests on it. Times are of this machine alone; ratios are not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rig import Echo

import engine
from engine import ALGORITHMS, Engine, LocalCluster
from nodes.config import PinSource, TokenConfig, load_node_config
from nodes.token import Lane, LoadedKey, Token, initialize_token

DATA = os.urandom(1024)
DIGEST = hashlib.sha256(DATA).digest()
NAMES = {"sign": "ecdsa-p256-sha256", "encrypt": "aes-256-gcm", "mac": "hmac-sha256"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Five nodes, 3-of-5."""
    with LocalCluster(nodes=5, threshold=3, path=tmp_path_factory.mktemp("bench")) as running:
        yield running


@pytest.fixture(scope="module")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    """A client with one key of each kind."""
    with engine.connect(cluster.client_config) as connected:
        for name, algorithm in NAMES.items():
            connected.create_key(name, algorithm, threshold=3, shares=5)
        yield connected


@pytest.fixture(scope="module")
def lane(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Lane:
    """A token of this process's own, like the nodes'."""
    folder = tmp_path_factory.mktemp("token")
    module = load_node_config(cluster.path / "nodes" / "node1" / "node.toml").token.module
    config = TokenConfig(module, "bench", PinSource("file", str(folder / "pin")))
    (folder / "data").mkdir()
    initialize_token(config, folder / "data")
    return Token(config, folder / "data").lane()


@pytest.fixture(scope="module")
def token_keys(lane: Lane) -> dict[str, LoadedKey]:
    """One session key of each kind in that token."""
    return {name: lane.load(ALGORITHMS[algorithm], os.urandom(32)) for name, algorithm in NAMES.items()}


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    """An echo process behind a CURVE socket."""
    made = Echo()
    yield made
    made.close()


def _floors(benchmark: BenchmarkFixture, *names: str) -> None:
    benchmark.extra_info["floor"] = [f"{Path(__file__).name}::{name}" for name in names]


def test_floor_echo(benchmark: BenchmarkFixture, echo: Echo) -> None:
    """256 bytes there, 128 back, over a bare CURVE socket to another process."""
    assert len(benchmark(echo.exchange)) == 128


def test_floor_token_sign(benchmark: BenchmarkFixture, lane: Lane, token_keys: dict[str, LoadedKey]) -> None:
    """ECDSA P-256 straight on the token."""
    lane.verify(token_keys["sign"], DIGEST, benchmark(lane.sign, token_keys["sign"], DIGEST))


def test_floor_token_encrypt(benchmark: BenchmarkFixture, lane: Lane, token_keys: dict[str, LoadedKey]) -> None:
    """AES-256-GCM of 1 KiB straight on the token."""
    sealed = benchmark(lane.encrypt, token_keys["encrypt"], DATA, b"")
    assert lane.decrypt(token_keys["encrypt"], sealed, b"") == DATA


def test_floor_token_mac(benchmark: BenchmarkFixture, lane: Lane, token_keys: dict[str, LoadedKey]) -> None:
    """HMAC-SHA256 of 1 KiB straight on the token."""
    assert benchmark(lane.mac, token_keys["mac"], DATA) == lane.mac(token_keys["mac"], DATA)


def test_sign_warm(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """ECDSA P-256 through the cluster, the key loaded."""
    _floors(benchmark, "test_floor_token_sign")
    kq.verify("sign", DATA, benchmark(kq.sign, "sign", DATA))


def test_encrypt_warm(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """AES-256-GCM of 1 KiB through the cluster, the key loaded."""
    _floors(benchmark, "test_floor_token_encrypt")
    assert kq.decrypt("encrypt", benchmark(kq.encrypt, "encrypt", DATA)) == DATA


def test_mac_warm(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """HMAC-SHA256 of 1 KiB through the cluster, the key loaded."""
    _floors(benchmark, "test_floor_token_mac")
    kq.verify_mac("mac", DATA, benchmark(kq.mac, "mac", DATA))


def test_sign_cold(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """The same with the key in no token: grant, gather, combine, load, sign."""
    _floors(benchmark, "test_floor_token_sign")
    signature = benchmark.pedantic(
        kq.sign, args=("sign", DATA), setup=lambda: kq.flush("sign") and None, rounds=200, warmup_rounds=5
    )
    kq.verify("sign", DATA, signature)


def test_encrypt_cold(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """The same for AES-256-GCM."""
    _floors(benchmark, "test_floor_token_encrypt")
    ciphertext = benchmark.pedantic(
        kq.encrypt, args=("encrypt", DATA), setup=lambda: kq.flush("encrypt") and None, rounds=200, warmup_rounds=5
    )
    assert kq.decrypt("encrypt", ciphertext) == DATA


def test_encrypt_pipelined(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """1,000 encryptions of 1 KiB with 64 under way; beside 1,000 straight on the token."""
    benchmark.extra_info["operations"] = 1000
    _floors(benchmark, "test_floor_token_encrypt")
    ciphertexts = benchmark.pedantic(kq.encrypt_many, args=("encrypt", [DATA] * 1000), rounds=10, warmup_rounds=1)
    assert kq.decrypt_many("encrypt", ciphertexts[:5]) == [DATA] * 5


def test_create(benchmark: BenchmarkFixture, kq: Engine) -> None:
    """A new AES key: generated, split, stored durably on five nodes, committed."""
    numbers = iter(range(1_000_000))
    benchmark.pedantic(
        lambda: kq.create_key(f"made/{next(numbers)}", "aes-256-gcm", threshold=3, shares=5),
        rounds=50,
        warmup_rounds=2,
    )
    assert len(kq.list_keys("made/*")) >= 1
