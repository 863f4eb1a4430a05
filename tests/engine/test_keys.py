"""Key material: canonical for each algorithm, normalised from what users have, and never shown in an error."""

from __future__ import annotations

import os
import traceback
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.keys import (
    ALGORITHMS,
    MAX_HMAC_KEY,
    MIN_HMAC_KEY,
    OPERATIONS,
    KeyKind,
    RequestType,
    algorithm,
    generate_material,
    load_private_key,
    normalize_material,
    public_key_der,
    public_key_pem,
    request_class,
)

PKCS8 = serialization.PrivateFormat.PKCS8
NONE = serialization.NoEncryption()
ASYMMETRIC = [name for name, algo in ALGORITHMS.items() if algo.asymmetric]
SYMMETRIC = [name for name in ALGORITHMS if name not in ASYMMETRIC]
RSA_2048 = rsa.generate_private_key(public_exponent=65537, key_size=2048)
RSA_1024 = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 # must be refused
DSA = dsa.generate_private_key(1024)  # noqa: S505 # must be refused
RSA_3 = rsa.generate_private_key(public_exponent=3, key_size=2048)


def pkcs8(private: Any, encoding: str = "DER", protection: Any = NONE) -> bytes:
    return bytes(private.private_bytes(getattr(serialization.Encoding, encoding), PKCS8, protection))


def private_of(name: str) -> Any:
    algo = ALGORITHMS[name]
    if algo.kind is KeyKind.RSA:
        return RSA_2048 if algo.bits == 2048 else rsa.generate_private_key(public_exponent=65537, key_size=algo.bits)
    if algo.kind is KeyKind.ED25519:
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1() if algo.bits == 256 else ec.SECP384R1())


def spki(private: Any) -> bytes:
    return bytes(
        private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


# --- the table ---


def test_the_table_has_the_algorithms_that_were_promised() -> None:
    assert set(ALGORITHMS) == {
        "aes-128-gcm", "aes-256-gcm", "hmac-sha256", "hmac-sha512", "ecdsa-p256-sha256", "ecdsa-p384-sha384", "ed25519",
        "rsa-2048-pss-sha256", "rsa-3072-pss-sha256", "rsa-4096-pss-sha256", "rsa-2048-pkcs1-sha256",
        "rsa-2048-oaep-sha256",
    }  # fmt: skip
    for name, algo in ALGORITHMS.items():
        assert algo.name == name
        assert algo.operations < OPERATIONS
        assert len(algo.operations) == 2
        assert algo.prior_us > 0
        assert algorithm(name) is algo


def test_a_message_is_hashed_by_the_client_where_the_token_signs_digests() -> None:
    assert {name for name, algo in ALGORITHMS.items() if algo.prehashed} == {
        name for name in ASYMMETRIC if name not in ("ed25519", "rsa-2048-oaep-sha256")
    }


def test_an_unknown_algorithm_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'des'; known are aes-128-gcm, "):
        algorithm("des")
    with pytest.raises(ValueError, match="unknown algorithm") as caught:
        algorithm("x" * 10_000)
    assert len(str(caught.value)) < 500
    assert request_class("sign", "ed25519") == "sign/ed25519"
    assert frozenset(RequestType) > OPERATIONS


# --- fresh material ---


@pytest.mark.parametrize("name", SYMMETRIC)
def test_fresh_symmetric_keys_mix_the_tokens_randomness_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algo = ALGORITHMS[name]
    length = algo.bits // 8
    assert len({generate_material(algo) for _ in range(20)}) == 20
    monkeypatch.setattr(os, "urandom", lambda count: b"\x0f" * count)
    assert generate_material(algo) == b"\x0f" * length
    assert generate_material(algo, b"\xff" * length) == b"\xf0" * length
    assert generate_material(algo, b"\xff" * (length + 9)) == b"\xf0" * length
    with pytest.raises(ValueError, match=f"the token gave {length - 1} random bytes, {length} are needed"):
        generate_material(algo, bytes(length - 1))


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_fresh_asymmetric_keys_are_of_their_algorithm(name: str) -> None:
    algo = ALGORITHMS[name]
    material = generate_material(algo)
    private = load_private_key(algo, material)
    assert normalize_material(algo, pkcs8(private)) == material
    assert public_key_der(algo, material) == spki(private)
    if algo.kind is KeyKind.RSA:
        assert isinstance(private, rsa.RSAPrivateKey)
        assert private.key_size == algo.bits
        assert private.public_key().public_numbers().e == 65537
    else:
        assert len(material) == algo.bits // 8


# --- normalising ---


@pytest.mark.parametrize("encoding", ["DER", "PEM"])
@pytest.mark.parametrize("name", ASYMMETRIC)
def test_pkcs8_gives_the_same_key_as_the_original(name: str, encoding: str) -> None:
    algo, private = ALGORITHMS[name], private_of(name)
    for given_as in (bytes, bytearray):
        material = normalize_material(algo, given_as(pkcs8(private, encoding)))
        assert isinstance(material, bytes)
        loaded = load_private_key(algo, material)
        assert pkcs8(loaded) == pkcs8(private)
        assert public_key_der(algo, material) == spki(private)
    assert normalize_material(algo, b"\n\n" + pkcs8(private, "PEM")) == material


@given(st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_raw_aes_keys_stay_as_they_are(key: bytes) -> None:
    assert normalize_material(ALGORITHMS["aes-256-gcm"], key) == key
    assert normalize_material(ALGORITHMS["aes-128-gcm"], key[:16]) == key[:16]
    assert public_key_der(ALGORITHMS["aes-256-gcm"], key) == b""


@pytest.mark.parametrize("length", [MIN_HMAC_KEY, 17, 63, 64, 65, MAX_HMAC_KEY])
@pytest.mark.parametrize("name", ["hmac-sha256", "hmac-sha512"])
def test_hmac_keys_of_an_allowed_length_stay_as_they_are(name: str, length: int) -> None:
    key = os.urandom(length)
    assert normalize_material(ALGORITHMS[name], key) == key


def test_an_ec_scalar_with_leading_zeros_keeps_its_length() -> None:
    for name, curve, size in (("ecdsa-p256-sha256", ec.SECP256R1(), 32), ("ecdsa-p384-sha384", ec.SECP384R1(), 48)):
        private = ec.derive_private_key(7, curve)
        material = normalize_material(ALGORITHMS[name], pkcs8(private))
        assert material == (7).to_bytes(size, "big")
        assert public_key_der(ALGORITHMS[name], material) == spki(private)


MARK = b"\xa5\x5aTOPSECRET"


def wrong_inputs() -> list[tuple[str, bytes]]:
    """(algorithm, material that is none of it); what must not be shown carries a mark where it can."""
    found: list[tuple[str, bytes]] = []
    for name, algo in ALGORITHMS.items():
        found += [(name, b""), (name, MARK), (name, MARK * 400), (name, b"-----BEGIN PRIVATE KEY-----\n" + MARK)]
        if algo.kind is KeyKind.AES:
            size = algo.bits // 8
            found += [(name, (MARK * 9)[: size - 1]), (name, (MARK * 9)[: size + 1]), (name, MARK.hex().encode())]
        elif algo.kind is KeyKind.HMAC:
            found += [(name, (MARK * 99)[: MIN_HMAC_KEY - 1]), (name, (MARK * 99)[: MAX_HMAC_KEY + 1])]
        else:
            private = private_of(name) if algo.bits <= 2048 else RSA_2048
            good = pkcs8(private)
            found += [
                (name, good[:-1]),
                (name, good + b"\0"),
                (name, pkcs8(private, "DER", serialization.BestAvailableEncryption(b"passphrase"))),
                (name, pkcs8(private, "PEM", serialization.BestAvailableEncryption(b"passphrase"))),
                (name, spki(private)),
                (name, pkcs8(DSA)),
                (name, pkcs8(x25519.X25519PrivateKey.generate())),
                (name, pkcs8(ed448.Ed448PrivateKey.generate())),
                (name, pkcs8(ec.generate_private_key(ec.SECP521R1()))),
                (name, pkcs8(ec.generate_private_key(ec.SECP256K1()))),
                (name, pkcs8(RSA_1024)),
            ]
            others = {"ecdsa-p256-sha256": "ecdsa-p384-sha384", "ecdsa-p384-sha384": "ed25519", "ed25519": "aes"}
            other = others.get(name, "ed25519")
            found.append((name, pkcs8(RSA_2048 if other == "aes" else private_of(other))))
    found.append(("rsa-3072-pss-sha256", pkcs8(RSA_2048)))
    found.append(("rsa-2048-pss-sha256", pkcs8(RSA_3)))
    return [(name, each) for name, each in found if not fits(name, each)]


def fits(name: str, material: bytes) -> bool:
    """Whether a raw key has the right length by chance."""
    algo = ALGORITHMS[name]
    if algo.kind is KeyKind.AES:
        return len(material) == algo.bits // 8
    return algo.kind is KeyKind.HMAC and MIN_HMAC_KEY <= len(material) <= MAX_HMAC_KEY


@pytest.mark.parametrize("name", ALGORITHMS)
def test_wrong_material_is_a_value_error_that_names_the_algorithm_and_never_shows_it(name: str) -> None:
    cases = [material for each, material in wrong_inputs() if each == name]
    assert len(cases) >= 5
    for material in cases:
        with pytest.raises(ValueError, match=f"^{name}: ") as caught:
            normalize_material(ALGORITHMS[name], material)
        text = "".join(traceback.format_exception(caught.value))
        assert caught.value.__cause__ is None
        assert "TOPSECRET" not in str(caught.value)
        assert "a55a" not in str(caught.value).lower()
        if len(material) >= 16:
            for shown in (material.hex(), repr(material)[2:-1], str(int.from_bytes(material[:500], "big"))):
                assert shown not in text


@pytest.mark.parametrize("material", ["text", None, 7, [1, 2], memoryview(bytes(32))])
def test_material_that_is_no_bytes_is_a_type_error(material: Any) -> None:
    with pytest.raises(TypeError, match="key material must be bytes"):
        normalize_material(ALGORITHMS["aes-256-gcm"], material)


def test_an_rsa_key_whose_parts_do_not_fit_is_refused_at_the_import() -> None:
    numbers = RSA_2048.private_numbers()
    wrong = rsa.RSAPrivateNumbers(
        p=numbers.p,
        q=numbers.q,
        d=numbers.d + 2,
        dmp1=numbers.dmp1,
        dmq1=numbers.dmq1,
        iqmp=numbers.iqmp,
        public_numbers=numbers.public_numbers,
    ).private_key(unsafe_skip_rsa_key_validation=True)
    with pytest.raises(ValueError, match="rsa-2048-pss-sha256: "):
        normalize_material(ALGORITHMS["rsa-2048-pss-sha256"], pkcs8(wrong))


# --- canonical material ---


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_what_is_no_canonical_material_does_not_load(name: str) -> None:
    algo = ALGORITHMS[name]
    for material in (b"", MARK, MARK * 40, bytes(algo.bits // 8 + 1), b"\xff" * 48, bytes(48)):
        with pytest.raises(ValueError, match=r"\S") as caught:
            load_private_key(algo, material)
        assert "TOPSECRET" not in str(caught.value)
    with pytest.raises(ValueError, match="is no RSA key" if algo.kind is KeyKind.RSA else r"\S"):
        load_private_key(algo, pkcs8(ec.generate_private_key(ec.SECP256R1())))


@pytest.mark.parametrize("scalar", [0, 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551])
def test_an_ec_scalar_out_of_range_does_not_load(scalar: int) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        load_private_key(ALGORITHMS["ecdsa-p256-sha256"], scalar.to_bytes(32, "big"))


def test_a_symmetric_algorithm_has_no_private_key() -> None:
    for name in SYMMETRIC:
        with pytest.raises(ValueError, match="has no private key"):
            load_private_key(ALGORITHMS[name], bytes(32))


def test_a_public_key_comes_as_pem() -> None:
    pem = public_key_pem(spki(RSA_2048))
    assert pem.startswith("-----BEGIN PUBLIC KEY-----\n")
    assert serialization.load_pem_public_key(pem.encode()) == RSA_2048.public_key()


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"\x30\x00",
        spki(RSA_2048)[:-1],
        spki(RSA_2048).replace(b"\x2a\x86\x48\x86", b"\x2a\x86\x48\x87"),
        bytes(50),
    ],
)
def test_what_is_no_public_key_is_a_value_error(der: bytes) -> None:
    """Also one of a kind that pyca/cryptography does not know: a lying dealer's manifest may have it."""
    with pytest.raises(ValueError, match="are no SubjectPublicKeyInfo"):
        public_key_pem(der)
