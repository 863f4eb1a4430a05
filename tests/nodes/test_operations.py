"""What a request may ask of an algorithm, and the header that binds a ciphertext to its format and version."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from uses import operate

from engine.errors import InvalidSignature, InvalidTag
from engine.keys import ALGORITHMS, OPERATIONS, generate_material
from engine.protocol.ciphertext import HEADER_BYTES
from engine.protocol.requests import Operate
from engine.protocol.wire import MAX_DATA
from nodes.operations import check_operation
from nodes.token import Lane


def body(data: bytes = b"data", aad: bytes = b"", proof: bytes = b"", *, digested: bool = False) -> Operate:
    return Operate("k", b"", data, aad, proof, digested, b"")


@pytest.mark.parametrize("verb", sorted(OPERATIONS))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_does_its_own_operations_alone(name: str, verb: str) -> None:
    algo = ALGORITHMS[name]
    if verb in algo.operations:
        check_operation(algo, verb, body())
        return
    with pytest.raises(ValueError, match=f"{verb} is no operation of {name}; it has "):
        check_operation(algo, verb, body())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_aes_gcm_takes_associated_data(name: str) -> None:
    algo = ALGORITHMS[name]
    for verb in algo.operations:
        if name.startswith("aes-"):
            check_operation(algo, verb, body(aad=b"tenant"))
            continue
        with pytest.raises(ValueError, match=f"{name} takes no associated data"):
            check_operation(algo, verb, body(aad=b"tenant"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_digest_is_taken_where_the_token_signs_one(name: str) -> None:
    algo = ALGORITHMS[name]
    for verb in algo.operations:
        if algo.prehashed:
            check_operation(algo, verb, body(digested=True))
            continue
        with pytest.raises(ValueError, match="takes the message, not a digest"):
            check_operation(algo, verb, body(digested=True))


def test_data_beyond_the_limit_is_refused_except_a_ciphertexts_own_overhead() -> None:
    aes = ALGORITHMS["aes-256-gcm"]
    check_operation(aes, "encrypt", body(bytes(MAX_DATA)))
    with pytest.raises(ValueError, match=f"{MAX_DATA + 1} bytes of data, the limit"):
        check_operation(aes, "encrypt", body(bytes(MAX_DATA + 1)))
    check_operation(aes, "decrypt", body(bytes(MAX_DATA + HEADER_BYTES + 28)))
    oaep = ALGORITHMS["rsa-2048-oaep-sha256"]
    check_operation(oaep, "encrypt", body(bytes(190)))
    with pytest.raises(ValueError, match="191 bytes of data, rsa-2048-oaep-sha256 takes 190"):
        check_operation(oaep, "encrypt", body(bytes(191)))


@pytest.mark.parametrize("version", [1, 2, 2**32 - 1])
def test_a_ciphertext_is_bound_to_format_and_version(lane: Lane, version: int) -> None:
    material = os.urandom(32)
    key = lane.load(ALGORITHMS["aes-256-gcm"], material)
    try:
        sealed = operate(lane, key, "encrypt", body(b"plain", b"aad"), version)
        header = b"KQ\x01" + version.to_bytes(4, "big")
        assert sealed[:HEADER_BYTES] == header
        assert AESGCM(material).decrypt(sealed[7:19], sealed[19:], header + b"aad") == b"plain"
        assert operate(lane, key, "decrypt", body(sealed, b"aad"), version) == b"plain"
        with pytest.raises(InvalidTag, match="header of format 1"):
            operate(lane, key, "decrypt", body(sealed, b"aad"), version - 1)
        forged = b"KQ\x01" + (version - 1).to_bytes(4, "big") + sealed[7:]
        with pytest.raises(InvalidTag):
            operate(lane, key, "decrypt", body(forged, b"aad"), version - 1)
        # What moves from the header into the associated data is another header.
        with pytest.raises(InvalidTag):
            operate(lane, key, "decrypt", body(sealed[7:], header + b"aad"), version)
    finally:
        key.destroy()


@pytest.mark.parametrize("name", ["ecdsa-p256-sha256", "ecdsa-p384-sha384", "rsa-2048-pss-sha256"])
def test_message_and_digest_sign_alike(lane: Lane, name: str) -> None:
    algo = ALGORITHMS[name]
    key = lane.load(algo, generate_material(algo))
    digest = hashlib.new(algo.hash_name, b"data").digest()
    try:
        by_message = operate(lane, key, "sign", body(), 1)
        by_digest = operate(lane, key, "sign", body(digest, digested=True), 1)
        for proof in (by_message, by_digest):
            assert operate(lane, key, "verify", body(proof=proof), 1) == b""
            assert operate(lane, key, "verify", body(digest, proof=proof, digested=True), 1) == b""
        with pytest.raises(InvalidSignature):
            operate(lane, key, "verify", body(digest, proof=by_digest), 1)
        with pytest.raises(ValueError, match="signs a digest of"):
            operate(lane, key, "sign", body(digest[:-1], digested=True), 1)
    finally:
        key.destroy()


@pytest.mark.parametrize("name", ["hmac-sha256", "hmac-sha512", "ed25519"])
def test_what_takes_the_message_takes_it_whole(lane: Lane, name: str) -> None:
    algo: Any = ALGORITHMS[name]
    key = lane.load(algo, generate_material(algo))
    make, check = ("mac", "verify-mac") if name.startswith("hmac") else ("sign", "verify")
    try:
        for data in (b"", b"x", bytes(MAX_DATA)):
            proof = operate(lane, key, make, body(data), 1)
            assert operate(lane, key, check, body(data, proof=proof), 1) == b""
            with pytest.raises(InvalidSignature):
                operate(lane, key, check, body(data + b"x", proof=proof), 1)
            with pytest.raises(InvalidSignature):
                operate(lane, key, check, body(data), 1)
    finally:
        key.destroy()
