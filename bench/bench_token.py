"""Owns the figures of the token's native path, operation by operation, beside python-pkcs11 on the same token.

The floor of each is the same operation straight through python-pkcs11 on a session key in the same process, so a ratio
below 1 is what the native path saves; a life is loading a key, one use and destroying it. Every result is checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.mechanisms import GCMParams
from pkcs11.util.ec import decode_ec_private_key, decode_ec_public_key
from pkcs11.util.rsa import decode_rsa_private_key, decode_rsa_public_key
from pytest_benchmark.fixture import BenchmarkFixture

from engine.keys import ALGORITHMS, KeyKind, generate_material, load_private_key, public_key_der
from engine.sharing import SecretBuffer
from nodes._fasttoken import Key, Module, Session, ecdsa_from_der
from nodes.config import MODULE_PATHS, PinSource, TokenConfig
from nodes.token import Lane, LoadedKey, Token, initialize_token

SIZES = [pytest.param(size, id=name) for size, name in ((32, "32B"), (1024, "1KiB"), (48 * 1024, "48KiB"))]
AES, EC, MAC, RSA = "aes-256-gcm", "ecdsa-p256-sha256", "hmac-sha256", "rsa-2048-pss-sha256"
SIGNING = (MAC, EC, "ed25519", RSA)
LIVES = (AES, EC, RSA)
MESSAGE = os.urandom(1024)
DIGEST = hashlib.sha256(MESSAGE).digest()
MATERIAL = {name: generate_material(ALGORITHMS[name]) for name in (AES, *SIGNING)}
PUBLIC = {name: public_key_der(ALGORITHMS[name], each) for name, each in MATERIAL.items()}
HOW: dict[str, dict[str, Any]] = {
    MAC: {"mechanism": Mechanism.SHA256_HMAC},
    EC: {"mechanism": Mechanism.ECDSA},
    "ed25519": {"mechanism": Mechanism.EDDSA},
    RSA: {"mechanism": Mechanism.RSA_PKCS_PSS, "mechanism_param": (Mechanism.SHA256, MGF.SHA256, 32)},
}


class Desk:
    """A token of this process, and each key in it, loaded both ways into one session."""

    def __init__(self, folder: Path) -> None:
        module = next(Path(path) for path in MODULE_PATHS if Path(path).is_file())
        config = TokenConfig(module, "bench", PinSource("file", str(folder / "pin")))
        initialize_token(config, folder / "data")
        token = Token(config, folder / "data", probe=False)
        self.lane: Lane = token.lane()
        self.straight = token._token.open()
        self.fast = Session(Module(str(module)), self.straight.handle)
        self.keys = {name: self.fast.load(name, each, PUBLIC[name]) for name, each in MATERIAL.items()}
        self.objects = {name: self.create(name) for name in MATERIAL}
        self.loaded: LoadedKey = self.lane.load(ALGORITHMS[AES], MATERIAL[AES])

    def create(self, name: str) -> list[Any]:
        """The objects of a key, made by python-pkcs11: the private one first."""
        return [self.straight.create_object({**each, Attribute.TOKEN: False}) for each in _templates(name)]


def _templates(name: str) -> list[dict[Attribute, Any]]:
    algo, material = ALGORITHMS[name], MATERIAL[name]
    if algo.kind is KeyKind.AES:
        uses = {Attribute.ENCRYPT: True, Attribute.DECRYPT: True}
        secret = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: material}
        return [secret | uses]
    if algo.kind is KeyKind.HMAC:
        uses = {Attribute.SIGN: True, Attribute.VERIFY: True}
        secret = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.GENERIC_SECRET}
        return [secret | uses | {Attribute.VALUE: material}]
    private = load_private_key(algo, material)
    if algo.kind is KeyKind.RSA:
        spki = private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)
        return [dict(decode_rsa_private_key(material)), dict(decode_rsa_public_key(spki))]
    if algo.kind is KeyKind.EC:
        der = private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        return [dict(decode_ec_private_key(der)), dict(decode_ec_public_key(PUBLIC[name]))]
    common = {Attribute.KEY_TYPE: KeyType.EC_EDWARDS, Attribute.EC_PARAMS: b"\x13\x0cedwards25519"}
    return [
        {**common, Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.SIGN: True, Attribute.VALUE: material},
        {
            **common,
            Attribute.CLASS: ObjectClass.PUBLIC_KEY,
            Attribute.VERIFY: True,
            Attribute.EC_POINT: b"\x04\x20" + PUBLIC[name][-32:],
        },
    ]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One for all: a module's state belongs to the process."""
    return Desk(tmp_path_factory.mktemp("token"))


def _floor(benchmark: BenchmarkFixture, name: str, argument: str) -> None:
    benchmark.extra_info["floor"] = [f"{Path(__file__).name}::{name}[{argument}]"]


def _label(size: int) -> str:
    return {32: "32B", 1024: "1KiB"}.get(size, "48KiB")


def _sealing(key: Any, plain: bytes) -> Callable[[], bytes]:
    """AES-GCM by python-pkcs11 with a random nonce."""

    def seal() -> bytes:
        nonce = os.urandom(12)
        return nonce + bytes(
            key.encrypt(plain, mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(nonce, b"context", 128))
        )

    return seal


def _data(name: str) -> bytes:
    return DIGEST if ALGORITHMS[name].prehashed else MESSAGE


# --- AES-GCM ---


@pytest.mark.parametrize("size", SIZES)
def test_floor_encrypt(benchmark: BenchmarkFixture, desk: Desk, size: int) -> None:
    """By python-pkcs11."""
    plain = os.urandom(size)
    assert desk.fast.decrypt(desk.keys[AES], benchmark(_sealing(desk.objects[AES][0], plain)), b"context") == plain


@pytest.mark.parametrize("size", SIZES)
def test_encrypt(benchmark: BenchmarkFixture, desk: Desk, size: int) -> None:
    """Into fresh bytes."""
    plain = os.urandom(size)
    _floor(benchmark, "test_floor_encrypt", _label(size))
    sealed = benchmark(desk.fast.encrypt, desk.keys[AES], plain, b"context")
    assert desk.fast.decrypt(desk.keys[AES], sealed, b"context") == plain


@pytest.mark.parametrize("size", SIZES)
def test_encrypt_into(benchmark: BenchmarkFixture, desk: Desk, size: int) -> None:
    """Into a buffer that is there, with a header."""
    plain, out = os.urandom(size), bytearray(size + 64)
    _floor(benchmark, "test_floor_encrypt", _label(size))
    length = benchmark(desk.fast.encrypt_into, desk.keys[AES], plain, b"context", b"header", out)
    assert desk.fast.decrypt(desk.keys[AES], out[:length], b"context", b"header") == plain


@pytest.mark.parametrize("size", SIZES)
def test_encrypt_in_a_lane(benchmark: BenchmarkFixture, desk: Desk, size: int) -> None:
    """As a node's loop does it: with the lane's lock, its clock for the supervisor, and the check of the generation."""
    plain = os.urandom(size)
    _floor(benchmark, "test_floor_encrypt", _label(size))
    sealed = benchmark(desk.lane.encrypt, desk.loaded, plain, b"context", b"header")
    assert desk.lane.decrypt(desk.loaded, sealed, b"context", b"header") == plain


@pytest.mark.parametrize("size", SIZES)
def test_floor_decrypt(benchmark: BenchmarkFixture, desk: Desk, size: int) -> None:
    """By python-pkcs11."""
    plain = os.urandom(size)
    sealed, key = desk.fast.encrypt(desk.keys[AES], plain), desk.objects[AES][0]

    def open_() -> bytes:
        parameters = GCMParams(sealed[:12], b"", 128)
        return bytes(key.decrypt(sealed[12:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

    assert benchmark(open_) == plain


@pytest.mark.parametrize("size", SIZES)
def test_decrypt(benchmark: BenchmarkFixture, desk: Desk, size: int) -> None:
    """Into fresh bytes."""
    plain = os.urandom(size)
    _floor(benchmark, "test_floor_decrypt", _label(size))
    assert benchmark(desk.fast.decrypt, desk.keys[AES], desk.fast.encrypt(desk.keys[AES], plain)) == plain


# --- MACs and signatures ---


@pytest.mark.parametrize("name", SIGNING)
def test_floor_sign(benchmark: BenchmarkFixture, desk: Desk, name: str) -> None:
    """By python-pkcs11; an ECDSA signature stays as the token gives it."""
    private, public = desk.objects[name][0], desk.objects[name][-1]
    proof = bytes(benchmark(lambda: private.sign(_data(name), **HOW[name])))
    assert public.verify(_data(name), proof, **HOW[name])


@pytest.mark.parametrize("name", SIGNING)
def test_sign(benchmark: BenchmarkFixture, desk: Desk, name: str) -> None:
    """With the DER of an ECDSA signature."""
    _floor(benchmark, "test_floor_sign", name)
    assert desk.fast.verify(desk.keys[name], _data(name), benchmark(desk.fast.sign, desk.keys[name], _data(name)))


@pytest.mark.parametrize("name", SIGNING)
def test_floor_verify(benchmark: BenchmarkFixture, desk: Desk, name: str) -> None:
    """By python-pkcs11."""
    proof = desk.fast.sign(desk.keys[name], _data(name))
    raw = (ecdsa_from_der(proof, 32) if name == EC else proof) or b""
    assert benchmark(lambda: desk.objects[name][-1].verify(_data(name), raw, **HOW[name]))


@pytest.mark.parametrize("name", SIGNING)
def test_verify(benchmark: BenchmarkFixture, desk: Desk, name: str) -> None:
    """A MAC is compared here."""
    _floor(benchmark, "test_floor_verify", name)
    proof = desk.fast.sign(desk.keys[name], _data(name))
    assert benchmark(desk.fast.verify, desk.keys[name], _data(name), proof)


# --- lives of keys ---


@pytest.mark.parametrize("name", LIVES)
def test_floor_life(benchmark: BenchmarkFixture, desk: Desk, name: str) -> None:
    """By python-pkcs11, with the attributes that it gives by itself."""

    def live() -> bytes:
        made = desk.create(name)
        used = _sealing(made[0], MESSAGE)() if name == AES else bytes(made[0].sign(DIGEST, **HOW[name]))
        for each in made:
            each.destroy()
        return used

    used = benchmark.pedantic(live, rounds=500, warmup_rounds=10)
    if name == AES:
        assert desk.fast.decrypt(desk.keys[name], used, b"context") == MESSAGE
    else:
        assert desk.objects[name][1].verify(DIGEST, used, **HOW[name])


@pytest.mark.parametrize("name", LIVES)
def test_life(benchmark: BenchmarkFixture, desk: Desk, name: str) -> None:
    """Out of locked memory, every use named."""
    _floor(benchmark, "test_floor_life", name)
    fast = desk.fast

    def use(key: Key) -> bytes:
        return fast.encrypt(key, MESSAGE) if name == AES else fast.sign(key, DIGEST)

    with SecretBuffer.copy_of(MATERIAL[name]) as material:

        def live() -> bytes:
            key = fast.load(name, material, PUBLIC[name])
            used = use(key)
            fast.destroy(key)
            return used

        used = benchmark.pedantic(live, rounds=500, warmup_rounds=10)
    if name == AES:
        assert fast.decrypt(desk.keys[name], used) == MESSAGE
    else:
        assert fast.verify(desk.keys[name], DIGEST, used)
