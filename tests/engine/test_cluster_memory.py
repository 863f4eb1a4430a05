"""No whole key in the memory of a combiner that has just loaded it; the dealers that imported it are the control."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

import engine
from engine import LocalCluster
from engine.keys import ALGORITHMS, generate_material, load_private_key

NAMES = ("aes-256-gcm", "hmac-sha512", "ecdsa-p256-sha256", "ed25519", "rsa-2048-pss-sha256")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: a node's memory can be read by root alone")


def occurrences(pid: int, needle: bytes) -> int:
    """How often it stands in the writable memory of a process."""
    found = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
            place, access = line.split()[:2]
            begin, end = (int(each, 16) for each in place.split("-"))
            if access.startswith("rw"):
                try:
                    found += os.pread(memory.fileno(), end - begin, begin).count(needle)
                except OSError:
                    continue  # a device's memory
    return found


def imported(name: str) -> tuple[bytes, bytes]:
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


@needs_root
def test_a_combiner_keeps_no_copy_of_a_key_that_it_loaded(own_cluster: LocalCluster) -> None:
    """Gathered, combined, loaded into the token: afterwards no memory of any node has the key in plain."""
    needles = {}
    with engine.connect(own_cluster.client_config) as kq:
        for name in NAMES:
            material, needles[name] = imported(name)
            kq.import_key(name, name, material)
    dealers = [pid for node, pid in own_cluster.running().items() if pid and node in own_cluster.nodes]
    traces = {name: sum(occurrences(pid, needle) for pid in dealers) for name, needle in needles.items()}
    assert any(traces.values()), "the search finds nothing where imported keys pass through bytes"
    for node in own_cluster.nodes:
        own_cluster.restart(node)
    with engine.connect(own_cluster.client_config) as kq:
        for name in NAMES:
            assert len(kq.prewarm(name, timeout=20)) >= 2
        for node in own_cluster.nodes:
            pid = own_cluster.running()[node]
            assert pid is not None
            assert occurrences(pid, b"rsa-2048-pss-sha256") > 0
            assert {name: occurrences(pid, needle) for name, needle in needles.items()} == dict.fromkeys(NAMES, 0)
