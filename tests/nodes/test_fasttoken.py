"""The native token path against python-pkcs11 on the same objects and pyca/cryptography, and what it must refuse."""

from __future__ import annotations

import gc
import hashlib
import hmac
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pkcs11
import pytest
from cryptography.hazmat.primitives.asymmetric import utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.mechanisms import GCMParams
from pkcs11.util.ec import encode_named_curve_parameters
from pkcs11.util.rsa import decode_rsa_private_key

import pkcs11_shim
from engine.errors import InvalidTag
from engine.keys import ALGORITHMS, Algorithm, KeyKind, RequestType, generate_material, public_key_der
from engine.sharing import SecretBuffer
from nodes._fasttoken import ALGORITHM_NAMES, CallError, Key, Module, Session, ecdsa_from_der, ecdsa_to_der
from nodes.config import TokenConfig
from nodes.token import Token
from pkcs11_shim import NSS

AES = ("aes-128-gcm", "aes-256-gcm")
HMAC = ("hmac-sha256", "hmac-sha512")
SIGNING = ("ecdsa-p256-sha256", "ecdsa-p384-sha384", "ed25519", "rsa-2048-pss-sha256", "rsa-2048-pkcs1-sha256")
LIMIT = 1 << 20
SHIM_FOLDER = os.pathsep.join([str(Path(pkcs11_shim.__file__).parent), os.environ.get("PYTHONPATH", "")])
SIZES = (0, 1, 15, 16, 17, 4095, 4096, 4097, 48 * 1024, LIMIT - 128)
QUICK = settings(max_examples=40, deadline=None)
MADE = {name: generate_material(ALGORITHMS[name]) for name in ALGORITHMS}
PUBLIC = {name: public_key_der(ALGORITHMS[name], material) for name, material in MADE.items()}


class Sides(NamedTuple):
    """One session of the token, as both ways in have it."""

    reference: Any
    fast: Session


@pytest.fixture(scope="module")
def module(token: Token, token_config: TokenConfig) -> Module:
    return Module(str(token_config.module))


@pytest.fixture(scope="module")
def sides(token: Token, module: Module) -> Sides:
    reference = token._token.open()
    return Sides(reference, Session(module, reference.handle))


@pytest.fixture(scope="module")
def fast(sides: Sides) -> Session:
    return sides.fast


@contextmanager
def loaded(fast: Session, name: str, material: Any = None) -> Iterator[Key]:
    key = fast.load(name, MADE[name] if material is None else material, PUBLIC[name])
    try:
        yield key
    finally:
        fast.destroy(key)


def found(reference: Any, handle: int) -> Any:
    """python-pkcs11's object of a handle."""
    return next(each for each in reference.get_objects({Attribute.TOKEN: False}) if each.handle == handle)


def to_sign(algo: Algorithm, message: bytes) -> bytes:
    return hashlib.new(algo.hash_name, message).digest() if algo.prehashed else message


def by_reference(algo: Algorithm, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """What python-pkcs11's sign and verify take."""
    if algo.kind is KeyKind.HMAC:
        return data, {"mechanism": {"sha256": Mechanism.SHA256_HMAC, "sha512": Mechanism.SHA512_HMAC}[algo.hash_name]}
    if algo.kind is KeyKind.EC:
        return data, {"mechanism": Mechanism.ECDSA}
    if algo.kind is KeyKind.ED25519:
        return data, {"mechanism": Mechanism.EDDSA}
    if "-pss-" in algo.name:
        return data, {
            "mechanism": Mechanism.RSA_PKCS_PSS,
            "mechanism_param": (Mechanism.SHA256, MGF.SHA256, 32),
        }
    info = bytes.fromhex("3031300d060960864801650304020105000420")
    return info + data, {"mechanism": Mechanism.RSA_PKCS}


# --- the table ---


def test_it_knows_the_algorithms_of_the_product() -> None:
    assert tuple(ALGORITHMS) == ALGORITHM_NAMES


# --- AES-GCM ---


@pytest.mark.parametrize("name", AES)
@QUICK
@given(
    plain=st.binary(max_size=200) | st.sampled_from(SIZES).map(bytes),
    aad=st.binary(max_size=64),
    header=st.binary(max_size=20),
)
def test_gcm_agrees_with_the_reference_both_ways(
    sides: Sides, name: str, plain: bytes, aad: bytes, header: bytes
) -> None:
    with loaded(sides.fast, name) as key:
        reference = found(sides.reference, key.private)
        sealed = sides.fast.encrypt(key, plain, aad, header)
        assert sealed.startswith(header)
        assert len(sealed) == len(header) + 12 + len(plain) + 16
        nonce, rest = sealed[len(header) :][:12], sealed[len(header) + 12 :]
        options = {"mechanism": Mechanism.AES_GCM, "mechanism_param": GCMParams(nonce, header + aad, 128)}
        assert reference.decrypt(rest, **options) == plain
        assert reference.encrypt(plain, **options) == rest
        assert AESGCM(MADE[name]).decrypt(nonce, rest, header + aad) == plain
        assert sides.fast.decrypt(key, sealed, aad, header) == plain
        assert sides.fast.decrypt(key, sealed[len(header) :], header + aad) == plain


@QUICK
@given(size=st.sampled_from(SIZES[:-1]), spare=st.sampled_from((0, 1, 27, 28, 29, 5000)), header=st.binary(max_size=9))
def test_the_callers_buffer_gets_the_same_as_fresh_bytes(fast: Session, size: int, spare: int, header: bytes) -> None:
    plain = os.urandom(size)
    with loaded(fast, "aes-256-gcm") as key:
        needed = len(header) + size + 28
        out = bytearray(b"\xaa" * (needed + spare))
        assert fast.encrypt_into(key, plain, b"aad", header, out) == needed
        assert fast.decrypt(key, out[:needed], b"aad", header) == plain
        assert out[needed:] == b"\xaa" * spare
        back = bytearray(b"\xaa" * (size + spare))
        assert fast.decrypt_into(key, memoryview(out)[:needed], b"aad", header, back) == size
        assert back[:size] == plain
        assert set(back[size:]) <= {0, 0xAA}


def test_an_empty_plaintext_has_a_tag_too(fast: Session) -> None:
    with loaded(fast, "aes-256-gcm") as key:
        for empty in (b"", bytearray(), memoryview(b"")):
            sealed = fast.encrypt(key, empty)
            assert len(sealed) == 28
            assert AESGCM(MADE["aes-256-gcm"]).decrypt(sealed[:12], sealed[12:], None) == b""
            assert fast.decrypt(key, sealed) == b""
            assert fast.decrypt_into(key, sealed, b"", b"", bytearray()) == 0


def test_each_changed_byte_is_refused_and_its_plaintext_stays_hidden(fast: Session) -> None:
    with loaded(fast, "aes-256-gcm") as key:
        sealed = fast.encrypt(key, b"sixteen bytes!!!", b"aad", b"head")
        for position in range(4, len(sealed)):
            changed = bytearray(sealed)
            changed[position] ^= 1 << position % 8
            out = bytearray(64)
            for call in (
                lambda: fast.decrypt(key, changed, b"aad", b"head"),  # noqa: B023 - called at once
                lambda: fast.decrypt_into(key, changed, b"aad", b"head", out),  # noqa: B023
            ):
                with pytest.raises(CallError) as caught:
                    call()
                assert (caught.value.function, caught.value.code) == ("C_Decrypt", 0x05)
            assert not any(out)
        for aad, header in ((b"aae", b"head"), (b"", b"head"), (b"daad", b"hea")):
            with pytest.raises((CallError, InvalidTag)):
                fast.decrypt(key, sealed, aad, header)
        for length in range(len(sealed)):
            with pytest.raises((CallError, InvalidTag)):
                fast.decrypt(key, sealed[:length], b"aad", b"head")
        with pytest.raises(InvalidTag, match="does not begin with its header"):
            fast.decrypt(key, sealed, b"aad", b"tail")
        assert fast.decrypt(key, sealed, b"aad", b"head") == b"sixteen bytes!!!"


def test_no_nonce_comes_twice_and_a_forked_child_draws_its_own(fast: Session) -> None:
    with loaded(fast, "aes-256-gcm") as key:
        nonces = [fast.encrypt(key, b"")[:12] for _ in range(500)]
        reader, writer = os.pipe()
        child = os.fork()  # only to see what it draws; nodes are spawned
        if child == 0:
            for _ in range(30):
                os.write(writer, fast.encrypt(key, b"")[:12])
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            theirs = pipe.read()
        os.waitpid(child, 0)
        nonces += [theirs[i : i + 12] for i in range(0, len(theirs), 12)]
        nonces += [fast.encrypt(key, b"")[:12] for _ in range(30)]
    assert len(theirs) == 360
    assert len(set(nonces)) == 560
    ones = sum(each.bit_count() for each in (int.from_bytes(nonce) for nonce in nonces))
    assert abs(ones - 560 * 48) < 8 * (560 * 96 / 4) ** 0.5, "they are not uniform (8 standard deviations)"


# --- MACs and signatures ---


@pytest.mark.parametrize("name", HMAC)
@QUICK
@given(key=st.binary(min_size=16, max_size=128), message=st.binary(max_size=300) | st.sampled_from(SIZES).map(bytes))
def test_hmac_agrees_with_python_for_keys_of_every_length(fast: Session, name: str, key: bytes, message: bytes) -> None:
    with loaded(fast, name, key) as handle:
        tag = fast.sign(handle, message)
        assert tag == hmac.digest(key, message, ALGORITHMS[name].hash_name)
        assert fast.verify(handle, message, tag)
        out = bytearray(len(tag) + 3)
        assert fast.sign_into(handle, message, out) == len(tag)
        assert out == tag + bytes(3)
        assert not fast.verify(handle, message + b"\0", tag)
        for wrong in (b"", tag[:-1], tag + b"\0", bytes(len(tag))):
            assert not fast.verify(handle, message, wrong)


@pytest.mark.parametrize("name", [*SIGNING, "rsa-3072-pss-sha256", "rsa-4096-pss-sha256"])
def test_signatures_agree_with_the_reference_both_ways(sides: Sides, name: str) -> None:
    algo, fast = ALGORITHMS[name], sides.fast
    with loaded(fast, name) as key:
        private, public = found(sides.reference, key.private), found(sides.reference, key.public)
        for message in (b"", b"message", os.urandom(5000)):
            data = to_sign(algo, message)
            prepared, options = by_reference(algo, data)
            ours, theirs = fast.sign(key, data), private.sign(prepared, **options)
            assert len(ours) <= key.result_max
            if algo.kind is KeyKind.EC:
                raw = ecdsa_from_der(ours, algo.bits // 8)
                assert raw is not None
                assert public.verify(prepared, raw, **options)
                theirs = ecdsa_to_der(theirs)
            else:
                assert public.verify(prepared, ours, **options)
            assert fast.verify(key, data, theirs)
            assert fast.verify(key, data, ours)
            out = bytearray(key.result_max)
            assert fast.verify(key, data, out[: fast.sign_into(key, data, out)])
            for wrong in (b"", b"\0", ours[:-1], ours + b"\0", ours[:-1] + bytes([ours[-1] ^ 1]), bytes(len(ours))):
                assert not fast.verify(key, data, wrong)
            assert not fast.verify(key, to_sign(algo, b"another"), ours)


@pytest.mark.parametrize("name", [*AES, *HMAC, *SIGNING])
def test_keys_made_by_the_reference_work_by_their_handles(sides: Sides, name: str) -> None:
    """And the attributes of a key that was loaded here are those that python-pkcs11 gives back."""
    algo, fast = ALGORITHMS[name], sides.fast
    made = [sides.reference.create_object(each) for each in templates(algo, MADE[name])]
    adopted = fast.adopt(name, *(each.handle for each in made))
    data = to_sign(algo, b"message") if algo.prehashed else b"message"
    with loaded(fast, name) as key:
        if algo.kind is KeyKind.AES:
            assert fast.decrypt(adopted, fast.encrypt(key, b"x", b"a"), b"a") == b"x"
            assert fast.decrypt(key, fast.encrypt(adopted, b"x", b"a"), b"a") == b"x"
        else:
            assert fast.verify(adopted, data, fast.sign(key, data))
            assert fast.verify(key, data, fast.sign(adopted, data))
        for handle, template in zip((key.private, key.public), templates(algo, MADE[name]), strict=False):
            mine = found(sides.reference, handle)
            for attribute, value in template.items():
                if attribute is Attribute.VALUE or (
                    template[Attribute.CLASS] is ObjectClass.PRIVATE_KEY and attribute in RSA_SECRETS
                ):
                    with pytest.raises(pkcs11.exceptions.AttributeSensitive):
                        mine[attribute]
                else:
                    assert mine[attribute] == value, attribute
    fast.destroy(adopted)


RSA_SECRETS = (
    Attribute.PRIVATE_EXPONENT,
    Attribute.PRIME_1,
    Attribute.PRIME_2,
    Attribute.EXPONENT_1,
    Attribute.EXPONENT_2,
    Attribute.COEFFICIENT,
)
SECRET_USES = ("ENCRYPT", "DECRYPT", "SIGN", "VERIFY", "WRAP", "UNWRAP", "DERIVE")
PRIVATE_USES = ("DECRYPT", "SIGN", "SIGN_RECOVER", "UNWRAP", "DERIVE")
PUBLIC_USES = ("ENCRYPT", "VERIFY", "VERIFY_RECOVER", "WRAP", "DERIVE")


def uses(names: tuple[str, ...], *allowed: str) -> dict[Attribute, bool]:
    return {Attribute[name]: name in allowed for name in names}


def templates(algo: Algorithm, material: bytes) -> list[dict[Attribute, Any]]:
    """What python-pkcs11 makes the same objects of."""
    secret = {
        Attribute.TOKEN: False,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
    }
    if algo.kind in (KeyKind.AES, KeyKind.HMAC):
        is_aes = algo.kind is KeyKind.AES
        padded = material if is_aes else material.ljust(128 if algo.hash_name == "sha512" else 64, b"\0")
        return [
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.AES if is_aes else KeyType.GENERIC_SECRET,
                Attribute.VALUE: padded,
                **secret,
                **uses(SECRET_USES, *(("ENCRYPT", "DECRYPT") if is_aes else ("SIGN", "VERIFY"))),
            }
        ]
    private: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, **secret}
    public: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.TOKEN: False}
    private |= uses(PRIVATE_USES, "SIGN")
    public |= uses(PUBLIC_USES, "VERIFY")
    if algo.kind is KeyKind.RSA:
        numbers = decode_rsa_private_key(material)
        wanted = (Attribute.MODULUS, Attribute.PUBLIC_EXPONENT, *RSA_SECRETS)
        private |= {Attribute.KEY_TYPE: KeyType.RSA, **{each: numbers[each] for each in wanted}}
        public |= {Attribute.KEY_TYPE: KeyType.RSA, **{each: numbers[each] for each in wanted[:2]}}
        return [private, public]
    der = public_key_der(algo, material)
    if algo.kind is KeyKind.EC:
        kind, parameters = KeyType.EC, encode_named_curve_parameters({256: "secp256r1", 384: "secp384r1"}[algo.bits])
    else:
        kind, parameters = KeyType.EC_EDWARDS, b"\x13\x0cedwards25519"
    point = der[-(algo.bits // 4 + 1) :] if algo.kind is KeyKind.EC else der[-32:]
    point = b"\x04" + bytes([len(point)]) + point
    private |= {Attribute.KEY_TYPE: kind, Attribute.EC_PARAMS: parameters, Attribute.VALUE: material}
    public |= {Attribute.KEY_TYPE: kind, Attribute.EC_PARAMS: parameters, Attribute.EC_POINT: point}
    return [private, public]


# --- DER ---


@QUICK
@given(half=st.sampled_from((1, 32, 48)), data=st.data())
def test_der_of_a_signature_is_pycas(half: int, data: st.DataObject) -> None:
    numbers = st.binary(min_size=half, max_size=half) | st.integers(0, 255).map(lambda low: low.to_bytes(half))
    r, s = data.draw(numbers), data.draw(numbers)
    der = ecdsa_to_der(r + s)
    assert der == utils.encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
    assert ecdsa_from_der(der, half) == r + s


@settings(max_examples=1000, deadline=None)
@given(
    der=st.binary(max_size=20)
    | st.tuples(
        st.integers(0, 1 << 264), st.integers(0, 1 << 264), st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)))
    ).map(lambda each: changed(utils.encode_dss_signature(each[0], each[1]), each[2][:3]))
)
def test_what_is_der_is_what_pyca_takes(der: bytes) -> None:
    expected = None
    try:
        r, s = utils.decode_dss_signature(der)
        expected = r.to_bytes(32) + s.to_bytes(32)
    except (ValueError, OverflowError):
        pass
    assert ecdsa_from_der(der, 32) == expected


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Some bytes replaced; a place behind the end cuts it off there."""
    for place, value in changes:
        data = data[:place] + bytes([value]) + data[place + 1 :] if place < len(data) else data[:value]
    return data


def test_der_refuses_sizes_that_it_has_no_room_for() -> None:
    for raw in (b"", b"\1", bytes(98)):
        with pytest.raises(ValueError, match="an even number up to 96"):
            ecdsa_to_der(raw)
    for half in (0, 49, 1 << 40):
        with pytest.raises(ValueError, match="possible"):
            ecdsa_from_der(b"", half)


# --- loading ---


def test_material_is_read_from_any_buffer_and_stays_as_it_was(fast: Session) -> None:
    for name in (*AES, *HMAC, *SIGNING):
        with SecretBuffer.copy_of(MADE[name]) as secret:
            for material in (secret, bytearray(MADE[name]), memoryview(MADE[name]), memoryview(secret).toreadonly()):
                with loaded(fast, name, material):
                    assert secret == MADE[name]
                del material


def test_a_truncated_or_changed_rsa_key_is_refused_or_loaded_and_never_more(fast: Session) -> None:
    material = MADE["rsa-2048-pss-sha256"]
    for length in (*range(40), *range(40, len(material), 37), len(material) - 1):
        with pytest.raises(ValueError, match=r"no DER RSAPrivateKey|has not 2048 bits"):
            fast.load("rsa-2048-pss-sha256", material[:length])
    with pytest.raises(ValueError, match="no DER RSAPrivateKey"):
        fast.load("rsa-2048-pss-sha256", material + b"\0")
    with pytest.raises(ValueError, match="has not 3072 bits"):
        fast.load("rsa-3072-pss-sha256", material)
    for place in range(300):
        for bit in (0, 7):
            data = bytearray(material)
            data[place] ^= 1 << bit
            try:
                fast.destroy(fast.load("rsa-2048-pss-sha256", data))
            except (ValueError, CallError):
                continue


@pytest.mark.parametrize("name", ["ecdsa-p256-sha256", "ecdsa-p384-sha384", "ed25519"])
def test_a_public_key_of_another_kind_is_refused(fast: Session, name: str) -> None:
    right = PUBLIC[name]
    others = [PUBLIC[each] for each in SIGNING if each != name and "rsa" not in each]
    compressed = right[:-65] + b"\2" + right[-64:-32]
    for wrong in (b"", right[:-1], right + b"\0", b"\x31" + right[1:], compressed, *others):
        with pytest.raises(ValueError, match=f"its public key is none of {name}"):
            fast.load(name, MADE[name], wrong)


def test_key_material_of_a_wrong_length_is_refused_without_it(fast: Session) -> None:
    for name in (*AES, "ecdsa-p256-sha256", "ecdsa-p384-sha384", "ed25519"):
        size = ALGORITHMS[name].bits // 8
        for length in (0, 1, size - 1, size + 1):
            with pytest.raises(ValueError, match=f"^{length} bytes, {size} are needed$"):
                fast.load(name, b"\xfe" * length, PUBLIC[name])
    for name in HMAC:
        with pytest.raises(ValueError, match="an empty key"):
            fast.load(name, b"")
    with pytest.raises(ValueError, match="unknown algorithm 'des'"):
        fast.load("des", b"12345678")


def test_objects_are_counted_and_destroyed_once(sides: Sides) -> None:
    def count() -> int:
        return len(list(sides.reference.get_objects({Attribute.TOKEN: False})))

    before, made = count(), sides.fast.made
    for name, objects in (("aes-256-gcm", 1), ("hmac-sha256", 1), ("ed25519", 2)):
        key = sides.fast.load(name, MADE[name], PUBLIC[name])
        assert count() == before + objects
        sides.fast.destroy(key)
        assert count() == before
        assert (key.private, key.public) == (0, 0)
        sides.fast.destroy(key)
    assert sides.fast.made == made + 4
    with pytest.raises(TypeError):
        Key()


# --- what is refused ---


def test_the_tokens_answer_is_told_with_its_code(fast: Session, module: Module) -> None:
    key = fast.load("aes-256-gcm", MADE["aes-256-gcm"])
    sealed = fast.encrypt(key, b"x")
    handle = key.private
    fast.destroy(key)
    for gone in (key, fast.adopt("aes-256-gcm", handle)):
        with pytest.raises(CallError, match=r"^C_EncryptInit returned CKR_\w+ \(0x000000(60|82)\)$"):
            fast.encrypt(gone, b"x")
        with pytest.raises(CallError, match=r"^C_DecryptInit returned"):
            fast.decrypt(gone, sealed)
    with pytest.raises(CallError) as caught:
        fast.destroy(fast.adopt("aes-256-gcm", handle))
    assert (caught.value.function, caught.value.code) == ("C_DestroyObject", 0x82)
    for name in ("hmac-sha256", "ed25519"):
        wrong = fast.adopt(name, handle, handle)
        with pytest.raises(CallError, match=r"^C_SignInit returned"):
            fast.sign(wrong, b"x")
        with pytest.raises(CallError, match=r"^C_(Verify|Sign)Init returned"):
            fast.verify(wrong, b"x", bytes(wrong.result_max))
    nowhere = Session(module, 987654321)
    for call in (
        lambda: nowhere.load("aes-256-gcm", bytes(32)),
        lambda: nowhere.random(1),
        lambda: nowhere.encrypt(nowhere.adopt("aes-256-gcm", 1), b""),
    ):
        with pytest.raises(CallError) as caught:
            call()
        assert caught.value.code == 0xB3
    assert str(CallError("C_Sign", 0x12345)) == "C_Sign returned 0x00012345"


def test_a_key_does_what_its_algorithm_does_and_nothing_else(fast: Session) -> None:
    for name, algo in ALGORITHMS.items():
        key = fast.adopt(name, 1, 1)
        if RequestType.ENCRYPT not in algo.operations:
            for call in (fast.encrypt, fast.decrypt):
                with pytest.raises(ValueError, match=f"{name} does not"):
                    call(key, bytes(64))
        elif algo.kind is KeyKind.RSA:
            for call in (fast.encrypt, fast.decrypt):
                for extra in ((b"a", b""), (b"", b"h")):
                    with pytest.raises(ValueError, match="takes no associated data and no header"):
                        call(key, b"x", *extra)
        if not algo.operations & {RequestType.SIGN, RequestType.MAC}:
            with pytest.raises(ValueError, match=f"{name} does not sign"):
                fast.sign(key, b"x")
            with pytest.raises(ValueError, match=f"{name} does not sign"):
                fast.verify(key, b"x", b"x")
        elif algo.prehashed:
            size = algo.bits // 8 if algo.kind is KeyKind.EC else 32
            for wrong in (b"", bytes(size - 1), bytes(size + 1), bytes(1024)):
                with pytest.raises(ValueError, match=f"{name} signs a digest of {size} bytes, not of {len(wrong)}"):
                    fast.sign(key, wrong)
                with pytest.raises(ValueError, match="signs a digest"):
                    fast.verify(key, wrong, b"x")


def test_buffers_that_can_not_be_used_are_refused(fast: Session) -> None:
    with loaded(fast, "aes-256-gcm") as key, loaded(fast, "ed25519") as signing:
        sealed = fast.encrypt(key, b"x" * 100)
        for wrong in ("text", None, 7, memoryview(bytes(64))[::2]):
            for call in (
                lambda: fast.encrypt(key, wrong),  # type: ignore[arg-type] # noqa: B023 - called at once
                lambda: fast.encrypt(key, b"", wrong),  # type: ignore[arg-type] # noqa: B023
                lambda: fast.decrypt(key, sealed, wrong),  # type: ignore[arg-type] # noqa: B023
                lambda: fast.sign(signing, wrong),  # type: ignore[arg-type] # noqa: B023
                lambda: fast.sign_into(signing, b"", wrong),  # type: ignore[arg-type] # noqa: B023
                lambda: fast.encrypt_into(key, b"", b"", b"", wrong),  # type: ignore[arg-type] # noqa: B023
                lambda: fast.decrypt_into(key, sealed, b"", b"", wrong),  # type: ignore[arg-type] # noqa: B023
                lambda: fast.load("aes-256-gcm", wrong),  # type: ignore[arg-type] # noqa: B023
            ):
                with pytest.raises((TypeError, BufferError)):
                    call()
        for call in (
            lambda: fast.encrypt_into(key, b"x", b"", b"", bytes(100)),
            lambda: fast.sign_into(signing, b"x", bytes(100)),
        ):
            with pytest.raises(BufferError):
                call()
        with pytest.raises(ValueError, match="room for 28 bytes, 29 are needed"):
            fast.encrypt_into(key, b"x", b"", b"", bytearray(28))
        with pytest.raises(ValueError, match="room for 99 bytes, 100 are needed"):
            fast.decrypt_into(key, sealed, b"", b"", bytearray(99))
        with pytest.raises(ValueError, match="room for 63 bytes, 64 are needed"):
            fast.sign_into(signing, b"x", bytearray(63))
        both = bytearray(400)
        both[:128] = sealed
        with pytest.raises(ValueError, match="overlaps an input"):
            fast.decrypt_into(key, memoryview(both)[:128], b"", b"", memoryview(both)[127:])
        with pytest.raises(ValueError, match="overlaps an input"):
            fast.encrypt_into(key, memoryview(both)[300:], b"", b"", memoryview(both)[:301])
        assert fast.decrypt_into(key, memoryview(both)[:128], b"", b"", memoryview(both)[128:]) == 100
        for call in (
            lambda: fast.encrypt(key, bytes(LIMIT + 1)),
            lambda: fast.encrypt(key, b"", bytes(LIMIT + 1)),
            lambda: fast.decrypt(key, bytes(LIMIT + 1)),
            lambda: fast.sign(signing, bytes(LIMIT + 1)),
            lambda: fast.verify(signing, b"", bytes(LIMIT + 1)),
            lambda: fast.load("hmac-sha256", bytes(LIMIT + 1)),
        ):
            with pytest.raises(ValueError, match=f"{LIMIT + 1} bytes of .*, the limit is {LIMIT}"):
                call()
        for count in (0, LIMIT + 1):
            with pytest.raises(ValueError, match="are possible"):
                fast.random(count)
        assert len(fast.random(33)) == 33
        assert fast.decrypt(key, sealed) == b"x" * 100


def test_what_is_no_module_is_refused(tmp_path: Path, module: Module) -> None:
    with pytest.raises(OSError, match="can't be loaded"):
        Module(str(tmp_path / "none.so"))
    with pytest.raises(OSError, match="no C_GetFunctionList"):
        Module("libm.so.6")
    with pytest.raises(ValueError, match="a label of 33 bytes, the limit is 32"):
        module.init_token(0, "1234", "x" * 33)


# --- threads and memory ---


def test_four_threads_in_sessions_of_their_own_get_right_results(token: Token, module: Module) -> None:
    errors: list[BaseException] = []

    def work(session: Session, seed: int) -> None:
        try:
            with loaded(session, "aes-256-gcm") as aes, loaded(session, "ecdsa-p256-sha256") as ecdsa:
                digest, out = hashlib.sha256(bytes([seed])).digest(), bytearray(4096)
                for i in range(150):
                    plain = bytes([seed, i % 256]) * (i + 1)
                    length = session.encrypt_into(aes, plain, b"a", b"h", out)
                    assert session.decrypt(aes, out[:length], b"a", b"h") == plain
                    assert session.verify(ecdsa, digest, session.sign(ecdsa, digest))
        except BaseException as error:
            errors.append(error)

    references = [token._token.open() for _ in range(4)]
    threads = [
        threading.Thread(target=work, args=(Session(module, each.handle), i)) for i, each in enumerate(references)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_hundred_thousand_operations_keep_neither_memory_nor_references(fast: Session) -> None:
    plain, aad, header, out, message = bytes(1000), b"a" * 30, b"h" * 7, bytearray(2048), bytes(500)
    with loaded(fast, "aes-256-gcm") as key, loaded(fast, "hmac-sha256") as mac:
        wrong = bytes(60)

        def work(rounds: int) -> None:
            for _ in range(rounds):
                sealed = fast.encrypt(key, plain, aad, header)
                fast.decrypt(key, sealed, aad, header)
                length = fast.encrypt_into(key, plain, aad, header, out)
                fast.decrypt_into(key, sealed, aad, header, memoryview(out)[length:])
                fast.verify(mac, message, fast.sign(mac, message))
                for call in (
                    lambda: fast.decrypt(key, wrong),
                    lambda: fast.decrypt(key, b""),
                    lambda: fast.encrypt_into(key, plain, aad, header, b""),
                    lambda: fast.encrypt(key, plain, "text"),  # type: ignore[arg-type]
                ):
                    with pytest.raises(Exception, match=r".+"):
                        call()

        given = (plain, aad, header, out, message, wrong, key, mac, fast)
        work(300)
        gc.collect()
        counts, blocks, resident = [sys.getrefcount(each) for each in given], sys.getallocatedblocks(), resident_bytes()
        work(1000)
        gc.collect()
        assert [sys.getrefcount(each) for each in given] == counts
        assert abs(sys.getallocatedblocks() - blocks) < 500
        for _ in range(16000):
            fast.decrypt(key, fast.encrypt(key, plain, aad, header), aad, header)
            length = fast.encrypt_into(key, plain, aad, header, out)
            fast.decrypt_into(key, memoryview(out)[:length], aad, header, bytearray(1000))
            fast.verify(mac, message, fast.sign(mac, message))
        assert [sys.getrefcount(each) for each in given] == counts
        assert resident_bytes() - resident < 2_000_000


DECRYPT_AND_WAIT = """
import os, sys
from pathlib import Path
from nodes._fasttoken import CallError, Module, Session
from nodes.config import PinSource, TokenConfig
from nodes.token import Token, initialize_token
module, folder, copy = sys.argv[1:]
config = TokenConfig(Path(module), "scan", PinSource("file", folder + "/pin"))
initialize_token(config, Path(folder) / "data")
token = Token(config, Path(folder) / "data")
reference = token._token.open()
fast = Session(Module(module), reference.handle)
print("ready", flush=True)
given = os.read(0, 4096)
key, sealed = fast.load("aes-256-gcm", given[:32]), given[32:]
out = bytearray(len(sealed))
for room in (len(sealed), len(sealed) - 28):
    assert fast.decrypt_into(key, sealed, b"", b"", memoryview(out)[:room]) == len(sealed) - 28
    out[:] = bytes(len(out))
    try:
        fast.decrypt_into(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"", b"", memoryview(out)[:room])
    except CallError:
        pass
kept = fast.decrypt(key, sealed) if copy == "copy" else b""
print("done", flush=True)
os.read(0, 1)
"""


@pytest.mark.parametrize("copied", [False, True])
def test_a_plaintext_stays_nowhere_but_where_it_was_asked_for(
    token_config: TokenConfig, tmp_path: Path, occurrences: Callable[[int, bytes], int], copied: bool
) -> None:
    key, needle, nonce = os.urandom(32), os.urandom(200), os.urandom(12)
    command = [sys.executable, "-c", DECRYPT_AND_WAIT, str(token_config.module), str(tmp_path)]
    with subprocess.Popen(
        [*command, "copy" if copied else "none"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(key + nonce + AESGCM(key).encrypt(nonce, needle, None))
            assert process.stdout.readline() == b"done\n"
            assert occurrences(process.pid, needle[:32]) == (1 if copied else 0)
        finally:
            process.kill()


# --- a token that SoftHSM can't play ---

FAULTS = """
import sys, threading, time
from pathlib import Path
import hashlib
import pkcs11
from engine.keys import ALGORITHMS, generate_material, public_key_der
from nodes._fasttoken import CallError, Module, Session
from nodes.config import PinSource, TokenConfig
from nodes.token import Token, initialize_token
from pkcs11_shim import CKR, Shim

folder = Path(sys.argv[1])
shim = Shim(folder / "shim")
config = TokenConfig(shim.library, "faults", PinSource("file", str(folder / "pin")))
initialize_token(config, folder / "data")
token = Token(config, folder / "data")
module = Module(str(shim.library))

def session():
    kept.append(token._token.open())
    return Session(module, kept[-1].handle)

kept = []
fast = session()
material = {name: generate_material(ALGORITHMS[name]) for name in ("aes-256-gcm", "ecdsa-p256-sha256")}
public = public_key_der(ALGORITHMS["ecdsa-p256-sha256"], material["ecdsa-p256-sha256"])
aes = fast.load("aes-256-gcm", material["aes-256-gcm"])
ecdsa = fast.load("ecdsa-p256-sha256", material["ecdsa-p256-sha256"], public)
digest = hashlib.sha256(b"x").digest()
TOO_SMALL = CKR.BUFFER_TOO_SMALL

# A token that wants more room than the result takes gets it.
for size in (0, 1, 5000):
    plain = bytes(range(256)) * 20
    plain = plain[:size]
    shim.fail("C_Encrypt", TOO_SMALL, times=1)
    sealed = fast.encrypt(aes, plain, b"a", b"h")
    assert shim.fired("C_Encrypt") > 0
    shim.fail("C_Decrypt", TOO_SMALL, times=1)
    assert fast.decrypt(aes, sealed, b"a", b"h") == plain
    shim.fail("C_Decrypt", TOO_SMALL, times=1)
    out = bytearray(len(sealed))
    assert fast.decrypt_into(aes, sealed, b"a", b"h", out) == size and out[:size] == plain
shim.fail("C_Sign", TOO_SMALL, times=1)
assert fast.verify(ecdsa, digest, fast.sign(ecdsa, digest))

# One that never has enough ends in its code; the operation may go on, so the session is lost.
broken = session()
shim.fail("C_Encrypt", TOO_SMALL, times=2)
try:
    broken.encrypt(aes, b"x")
    raise SystemExit("no error")
except CallError as error:
    assert (error.function, error.code) == ("C_Encrypt", TOO_SMALL)
try:
    broken.encrypt(aes, b"x")
    raise SystemExit("no error")
except CallError as error:
    assert (error.function, error.code) == ("C_EncryptInit", 0x90)

# Every code comes out as it went in, with the function that gave it.
for function, call in (
    ("C_EncryptInit", lambda: fast.encrypt(aes, b"x")),
    ("C_DecryptInit", lambda: fast.decrypt(aes, sealed)),
    ("C_SignInit", lambda: fast.sign(ecdsa, digest)),
    ("C_VerifyInit", lambda: fast.verify(ecdsa, digest, bytes.fromhex("3006020101020101"))),
    ("C_CreateObject", lambda: fast.load("aes-256-gcm", bytes(32))),
    ("C_GenerateRandom", lambda: fast.random(8)),
):
    for code in (*CKR, 0x80000001):
        shim.fail(function, code, times=1)
        try:
            call()
            raise SystemExit(f"{function} {code:x}: no error")
        except CallError as error:
            assert (error.function, error.code) == (function, code)
shim.clear()
call()

# A signature is wrong only when C_Verify says so.
shim.fail("C_Verify", CKR.DEVICE_ERROR, times=1)
other = session()
try:
    other.verify(ecdsa, digest, bytes.fromhex("3006020101020101"))
    raise SystemExit("no error")
except CallError as error:
    assert (error.function, error.code) == ("C_Verify", CKR.DEVICE_ERROR)

# Half a pair does not stay.
def count():
    return len(list(kept[0].get_objects({pkcs11.Attribute.TOKEN: False})))

before, made = count(), fast.made
shim.fail("C_CreateObject", CKR.DEVICE_MEMORY, times=1, skip=1)
try:
    fast.load("ecdsa-p256-sha256", material["ecdsa-p256-sha256"], public)
    raise SystemExit("no error")
except CallError as error:
    assert (error.function, error.code) == ("C_CreateObject", CKR.DEVICE_MEMORY)
assert count() == before and fast.made == made + 1

# While one thread is in the module, the interpreter runs on, and the session refuses a second one.
shim.hang("C_Sign")
done = []
thread = threading.Thread(target=lambda: done.append(fast.sign(ecdsa, digest)))
thread.start()
try:
    end = time.monotonic() + 30
    while not shim.running("C_Sign"):
        assert time.monotonic() < end
        time.sleep(0.01)
    for use in (lambda: fast.sign(ecdsa, digest), lambda: fast.encrypt(aes, b"x"), lambda: fast.destroy(aes)):
        try:
            use()
            raise SystemExit("no error")
        except RuntimeError as error:
            assert "in use by another thread" in str(error)
finally:
    shim.release("C_Sign")
    thread.join(30)
assert fast.verify(ecdsa, digest, done[0])
assert fast.decrypt(aes, sealed, b"a", b"h") == plain
shim.close()
print("right")
"""


def test_a_token_that_refuses_wants_room_or_hangs_is_told_as_it_is(
    tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    ended = run_python(FAULTS, tmp_path, PYTHONPATH=SHIM_FOLDER)
    assert (ended.returncode, ended.stdout) == (0, "right\n"), ended.stdout + ended.stderr


OTHER_TOKEN = """
import hashlib, sys
from pathlib import Path
import pkcs11
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from engine.keys import ALGORITHMS, KeyKind, generate_material, load_private_key, public_key_der
from nodes._fasttoken import CallError, Module, Session
from pkcs11_shim import NSS, Shim, nss_parameters

with Shim(Path(sys.argv[1]), NSS, reserved=nss_parameters()) as shim:
    library = pkcs11.lib(str(shim.library))
    session = next(iter(library.get_slots())).get_token().open()
    fast = Session(Module(str(shim.library)), session.handle)
    for name, algo in ALGORITHMS.items():
        material = generate_material(algo)
        try:
            key = fast.load(name, material, public_key_der(algo, material))
        except CallError as error:
            print(name, error)
            continue
        if algo.kind is KeyKind.AES:
            for size in (0, 1, 1000, 70000):
                plain = bytes(size)
                sealed = fast.encrypt(key, plain, b"a", b"h")
                assert AESGCM(material).decrypt(sealed[1:13], sealed[13:], b"ha") == plain
                assert fast.decrypt(key, sealed, b"a", b"h") == plain
        elif "oaep" in name:
            private = load_private_key(algo, material)
            oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
            for plain in (b"", b"x", bytes(190)):
                sealed = fast.encrypt(key, plain)
                assert private.decrypt(sealed, oaep) == plain
                theirs = private.public_key().encrypt(plain, oaep)
                assert fast.decrypt(key, theirs) == plain
                out = bytearray(300)
                assert fast.decrypt_into(key, theirs, b"", b"", out) == len(plain) and out[: len(plain)] == plain
                assert fast.encrypt_into(key, plain, b"", b"", out) == 256
                assert fast.decrypt(key, out[:256]) == plain
            try:
                fast.decrypt_into(key, theirs, b"", b"", bytearray(100))
                raise SystemExit("no error")
            except ValueError as error:
                assert "room for 100 bytes, 190 are needed" in str(error)
        else:
            data = hashlib.new(algo.hash_name, b"x").digest() if algo.prehashed else b"x"
            proof = fast.sign(key, data)
            assert fast.verify(key, data, proof)
            assert not fast.verify(key, data, proof[:-1] + bytes([proof[-1] ^ 1]))
        fast.destroy(key)
        print(name, "right")
"""


@pytest.mark.skipif(not NSS.is_file(), reason="needs NSS's softokn, libnss3 in Debian")
def test_another_tokens_module_gives_right_results_too(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    """Of NSS; it has OAEP with SHA-256, which SoftHSM has not."""
    ended = run_python(OTHER_TOKEN, tmp_path / "shim", PYTHONPATH=SHIM_FOLDER)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = dict(line.split(" ", 1) for line in ended.stdout.splitlines())
    assert set(told) == set(ALGORITHMS)
    assert {name for name, each in told.items() if each == "right"} >= {*AES, *HMAC, "rsa-2048-oaep-sha256"}
