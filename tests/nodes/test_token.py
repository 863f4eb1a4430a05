"""The token's lane against pyca/cryptography as the independent implementation, and what a token must refuse."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import Attribute

from engine.errors import ConfigError, EngineError, InvalidSignature, InvalidTag, TokenError
from engine.keys import ALGORITHMS, Algorithm, KeyKind, PrivateKey, generate_material, load_private_key, public_key_der
from engine.sharing import SecretBuffer, secret_memory
from nodes.config import PinSource, TokenConfig
from nodes.token import KEK_LABEL, Lane, LoadedKey, Token, _one_kek, initialize_token, is_slow

AES = ("aes-128-gcm", "aes-256-gcm")
HMAC = ("hmac-sha256", "hmac-sha512")
SIGNING = (
    "ecdsa-p256-sha256",
    "ecdsa-p384-sha384",
    "ed25519",
    "rsa-2048-pss-sha256",
    "rsa-3072-pss-sha256",
    "rsa-4096-pss-sha256",
    "rsa-2048-pkcs1-sha256",
)
OAEP = "rsa-2048-oaep-sha256"
SIZES = (0, 1, 15, 16, 17, 1024, 48 * 1024)
MESSAGE = b"a message of some length"


@contextmanager
def loaded(lane: Lane, algo: Algorithm, material: bytes) -> Iterator[LoadedKey]:
    key = lane.load(algo, material)
    try:
        yield key
    finally:
        key.destroy()


def objects(lane: Lane, key: LoadedKey) -> list[Any]:
    """python-pkcs11's objects of a loaded key, the private one first."""
    found = {each.handle: each for each in lane._session.get_objects({Attribute.TOKEN: False})}
    return [found[each] for each in (key.handles.private, key.handles.public) if each]


def digest(algo: Algorithm, message: bytes) -> bytes:
    return hashlib.new(algo.hash_name, message).digest() if algo.hash_name else message


def pyca_sign(algo: Algorithm, private: PrivateKey, message: bytes) -> bytes:
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(message)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(message, ec.ECDSA(hashes.SHA256() if algo.bits == 256 else hashes.SHA384()))
    return private.sign(message, rsa_padding(algo), hashes.SHA256())


def pyca_verify(algo: Algorithm, private: PrivateKey, message: bytes, signature: bytes) -> None:
    if isinstance(private, ed25519.Ed25519PrivateKey):
        private.public_key().verify(signature, message)
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        hash_algorithm = hashes.SHA256() if algo.bits == 256 else hashes.SHA384()
        private.public_key().verify(signature, message, ec.ECDSA(hash_algorithm))
    else:
        private.public_key().verify(signature, message, rsa_padding(algo), hashes.SHA256())


def rsa_padding(algo: Algorithm) -> Any:
    if "pkcs1" in algo.name:
        return padding.PKCS1v15()
    return padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32)


# --- AES-GCM ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", AES)
def test_gcm_agrees_with_pyca_both_ways(lane: Lane, name: str, size: int) -> None:
    algo = ALGORITHMS[name]
    key, plaintext, nonce = os.urandom(algo.bits // 8), os.urandom(size), os.urandom(12)
    with loaded(lane, algo, key) as handle:
        ours = lane.encrypt(handle, plaintext, b"aad")
        assert AESGCM(key).decrypt(ours[:12], ours[12:], b"aad") == plaintext
        theirs = nonce + AESGCM(key).encrypt(nonce, plaintext, b"aad")
        assert lane.decrypt(handle, theirs, b"aad") == plaintext


def test_gcm_without_associated_data_is_gcm_with_none_of_it(lane: Lane) -> None:
    key = os.urandom(32)
    with loaded(lane, ALGORITHMS["aes-256-gcm"], key) as handle:
        sealed = lane.encrypt(handle, b"x", b"")
        assert AESGCM(key).decrypt(sealed[:12], sealed[12:], None) == b"x"


def test_each_encryption_has_a_nonce_of_its_own(lane: Lane) -> None:
    with loaded(lane, ALGORITHMS["aes-256-gcm"], os.urandom(32)) as handle:
        nonces = {lane.encrypt(handle, b"x", b"")[:12] for _ in range(256)}
    assert len(nonces) == 256


def test_each_changed_byte_of_a_ciphertext_is_an_invalid_tag(lane: Lane) -> None:
    with loaded(lane, ALGORITHMS["aes-256-gcm"], os.urandom(32)) as handle:
        sealed = lane.encrypt(handle, b"sixteen bytes!!!", b"aad")
        for position in range(len(sealed)):
            changed = bytearray(sealed)
            changed[position] ^= 1 << position % 8
            with pytest.raises(InvalidTag):
                lane.decrypt(handle, bytes(changed), b"aad")
        with pytest.raises(InvalidTag):
            lane.decrypt(handle, sealed, b"aae")
        for length in range(len(sealed)):
            with pytest.raises(InvalidTag):
                lane.decrypt(handle, sealed[:length], b"aad")
        assert lane.decrypt(handle, sealed, b"aad") == b"sixteen bytes!!!"


def test_a_key_that_is_gone_is_a_token_fault_not_a_wrong_tag(lane: Lane) -> None:
    handle = lane.load(ALGORITHMS["aes-256-gcm"], os.urandom(32))
    sealed = lane.encrypt(handle, b"x", b"")
    handle.destroy()
    with pytest.raises(TokenError):
        lane.decrypt(handle, sealed, b"")
    with pytest.raises(TokenError):
        lane.encrypt(handle, b"x", b"")
    handle.destroy()  # twice is harmless


def test_a_wrong_tag_of_a_key_that_works_is_no_fault(lane: Lane) -> None:
    sealed = lane.seal(b"share", b"context")
    with loaded(lane, ALGORITHMS["aes-256-gcm"], os.urandom(32)) as handle:
        wrong = bytes(len(lane.encrypt(handle, b"x", b"")))
        with pytest.raises(InvalidTag):
            lane.decrypt(handle, wrong, b"")
        with pytest.raises(InvalidTag):
            lane.unseal(bytes(len(sealed)), b"context")


# --- HMAC ---


@pytest.mark.parametrize("length", [16, 31, 32, 63, 64, 65, 127, 128])
@pytest.mark.parametrize("name", HMAC)
def test_hmac_is_pythons_hmac_for_short_and_long_keys(lane: Lane, name: str, length: int) -> None:
    algo, key = ALGORITHMS[name], os.urandom(length)
    with loaded(lane, algo, key) as handle:
        for size in (0, 1, 1024, 48 * 1024):
            data = os.urandom(size)
            expected = hmac.digest(key, data, algo.hash_name)
            assert lane.mac(handle, data) == expected
            lane.verify_mac(handle, data, expected)


@pytest.mark.parametrize("name", HMAC)
def test_a_wrong_mac_of_any_length_is_refused(lane: Lane, name: str) -> None:
    with loaded(lane, ALGORITHMS[name], os.urandom(32)) as handle:
        tag = lane.mac(handle, MESSAGE)
        flipped = bytes([tag[0] ^ 1]) + tag[1:]
        for wrong in (b"", b"\0", tag[:16], tag[:-1], tag + b"\0", flipped, bytes(1024)):
            with pytest.raises(InvalidSignature):
                lane.verify_mac(handle, MESSAGE, wrong)
        with pytest.raises(InvalidSignature):
            lane.verify_mac(handle, MESSAGE + b"\0", tag)


# --- signatures ---


@pytest.mark.parametrize("name", SIGNING)
def test_what_the_token_signs_pyca_verifies_and_the_other_way(lane: Lane, name: str) -> None:
    algo = ALGORITHMS[name]
    material = generate_material(algo)
    private = load_private_key(algo, material)
    with loaded(lane, algo, material) as handle:
        for message in (b"", MESSAGE):
            pyca_verify(algo, private, message, lane.sign(handle, digest(algo, message)))
            lane.verify(handle, digest(algo, message), pyca_sign(algo, private, message))
        signature = lane.sign(handle, digest(algo, MESSAGE))
        with pytest.raises(PycaInvalidSignature):
            pyca_verify(algo, private, b"another", signature)


@pytest.mark.parametrize("name", SIGNING)
def test_a_wrong_signature_of_any_shape_is_refused(lane: Lane, name: str) -> None:
    algo = ALGORITHMS[name]
    with loaded(lane, algo, generate_material(algo)) as handle:
        data = digest(algo, MESSAGE)
        good = lane.sign(handle, data)
        flipped = good[:-1] + bytes([good[-1] ^ 1])
        for wrong in (b"", b"\0", good[:-1], good + b"\0", flipped, bytes(len(good)), b"\xff" * len(good), bytes(1024)):
            with pytest.raises(InvalidSignature):
                lane.verify(handle, data, wrong)
        with pytest.raises(InvalidSignature):
            lane.verify(handle, digest(algo, b"another"), good)
        lane.verify(handle, data, good)


@pytest.mark.parametrize(
    "signature",
    [utils.encode_dss_signature(r, s) for r, s in ((0, 0), (0, 1), (1, 0), (1 << 256, 1), (1, 1 << 300))]
    + [bytes.fromhex("30060201ff020101"), bytes.fromhex("30060201010201ff")],
)
def test_an_ecdsa_signature_out_of_range_is_refused(lane: Lane, signature: bytes) -> None:
    algo = ALGORITHMS["ecdsa-p256-sha256"]
    with loaded(lane, algo, generate_material(algo)) as handle, pytest.raises(InvalidSignature):
        lane.verify(handle, digest(algo, MESSAGE), signature)


@pytest.mark.parametrize("name", [name for name in SIGNING if ALGORITHMS[name].hash_name])
def test_a_digest_of_the_wrong_length_is_the_callers_mistake(lane: Lane, name: str) -> None:
    algo = ALGORITHMS[name]
    with loaded(lane, algo, generate_material(algo)) as handle:
        for wrong in (b"", bytes(20), bytes(len(digest(algo, b"")) + 1)):
            with pytest.raises(ValueError, match="signs a digest of"):
                lane.sign(handle, wrong)
            with pytest.raises(ValueError, match="signs a digest of"):
                lane.verify(handle, wrong, b"x")


# --- what the objects let anyone do ---


def private_value(algo: Algorithm) -> Attribute:
    return Attribute.PRIVATE_EXPONENT if algo.kind is KeyKind.RSA else Attribute.VALUE


@pytest.mark.parametrize("name", [*AES, *HMAC, *SIGNING])
def test_a_loaded_key_gives_its_value_to_nobody(lane: Lane, name: str) -> None:
    algo = ALGORITHMS[name]
    with loaded(lane, algo, generate_material(algo)) as handle:
        private = objects(lane, handle)[0]
        with pytest.raises(pkcs11.exceptions.AttributeSensitive):
            private[private_value(algo)]
        assert private[Attribute.SENSITIVE] is True
        assert private[Attribute.EXTRACTABLE] is False
        assert private[Attribute.TOKEN] is False
        assert private[Attribute.PRIVATE] is True
        for change in ({Attribute.SENSITIVE: False}, {Attribute.EXTRACTABLE: True}):
            for attribute, value in change.items():
                with pytest.raises(pkcs11.PKCS11Error):
                    private[attribute] = value


USES = {
    KeyKind.AES: {Attribute.ENCRYPT, Attribute.DECRYPT},
    KeyKind.HMAC: {Attribute.SIGN, Attribute.VERIFY},
    KeyKind.EC: {Attribute.SIGN},
    KeyKind.ED25519: {Attribute.SIGN},
    KeyKind.RSA: {Attribute.SIGN},
}
SECRET_USES = (
    Attribute.ENCRYPT,
    Attribute.DECRYPT,
    Attribute.SIGN,
    Attribute.VERIFY,
    Attribute.WRAP,
    Attribute.UNWRAP,
    Attribute.DERIVE,
)
PRIVATE_USES = (Attribute.DECRYPT, Attribute.SIGN, Attribute.SIGN_RECOVER, Attribute.UNWRAP, Attribute.DERIVE)
PUBLIC_USES = (Attribute.ENCRYPT, Attribute.VERIFY, Attribute.VERIFY_RECOVER, Attribute.WRAP, Attribute.DERIVE)


@pytest.mark.parametrize("name", [*AES, *HMAC, *SIGNING])
def test_a_loaded_key_is_for_its_algorithms_operations_alone(lane: Lane, name: str) -> None:
    algo = ALGORITHMS[name]
    with loaded(lane, algo, generate_material(algo)) as handle:
        private, *public = objects(lane, handle)
        uses = PRIVATE_USES if public else SECRET_USES
        assert {use for use in uses if private[use]} == USES[algo.kind]
        for each in public:
            assert {use for use in PUBLIC_USES if each[use]} == {Attribute.VERIFY}


def test_the_kek_encrypts_and_decrypts_only_and_never_leaves(lane: Lane) -> None:
    kek = _one_kek(lane._session)
    assert {use for use in SECRET_USES if kek[use]} == {Attribute.ENCRYPT, Attribute.DECRYPT}
    for attribute in (Attribute.SENSITIVE, Attribute.ALWAYS_SENSITIVE, Attribute.NEVER_EXTRACTABLE, Attribute.LOCAL):
        assert kek[attribute] is True
    assert kek[Attribute.EXTRACTABLE] is False
    assert kek[Attribute.VALUE_LEN] == 32
    with pytest.raises(pkcs11.exceptions.AttributeSensitive):
        kek[Attribute.VALUE]
    for attribute, value in ((Attribute.SENSITIVE, False), (Attribute.EXTRACTABLE, True), (Attribute.WRAP, True)):
        with pytest.raises(pkcs11.PKCS11Error):
            kek[attribute] = value


def test_no_key_wraps_the_kek_or_another_key(lane: Lane) -> None:
    with loaded(lane, ALGORITHMS["aes-256-gcm"], os.urandom(32)) as handle:
        kek, (private,) = _one_kek(lane._session), objects(lane, handle)
        for wrapping, wrapped in ((private, kek), (kek, private)):
            assert wrapping[Attribute.WRAP] is False
            # python-pkcs11 gives the method to keys that may wrap alone.
            with pytest.raises((pkcs11.PKCS11Error, AttributeError)):
                wrapping.wrap_key(wrapped)


def test_no_lane_of_a_node_can_destroy_or_change_the_kek(lane: Lane) -> None:
    with pytest.raises(pkcs11.exceptions.SessionReadOnly):
        _one_kek(lane._session).destroy()
    lane.check_kek()


def test_a_destroyed_key_leaves_no_object_behind(lane: Lane) -> None:
    def count() -> int:
        return len(list(lane._session.get_objects({Attribute.TOKEN: False})))

    before = count()
    for name in (*AES, *HMAC, "ecdsa-p256-sha256", "ed25519"):
        algo = ALGORITHMS[name]
        with loaded(lane, algo, generate_material(algo)):
            assert count() > before
    assert count() == before


@pytest.mark.parametrize("length", [0, 1, 15, 16, 24, 31, 33])
def test_an_aes_key_of_the_wrong_length_is_not_loaded(lane: Lane, length: int) -> None:
    with pytest.raises(TokenError, match=f"no key of aes-256-gcm: {length} bytes, 32 are needed"):
        lane.load(ALGORITHMS["aes-256-gcm"], os.urandom(length))


@pytest.mark.parametrize("name", SIGNING)
def test_material_of_another_algorithm_is_a_token_error_that_does_not_show_it(lane: Lane, name: str) -> None:
    for material in (b"", b"\xa5" * 31, b"\xa5" * 33, bytes(ALGORITHMS[name].bits // 8), b"\xff" * 48):
        if name == "ed25519" and len(material) == 32:
            continue  # any 32 bytes are a seed
        with pytest.raises(TokenError) as caught:
            lane.load(ALGORITHMS[name], material)
        assert "a5a5" not in str(caught.value)
        assert "\\xa5" not in str(caught.value)


# --- secrets go in and out without a copy ---


@pytest.mark.parametrize("given_public", [True, False])
@pytest.mark.parametrize("name", [*AES, *HMAC, *SIGNING])
def test_a_key_is_loaded_from_locked_memory(lane: Lane, name: str, given_public: bool) -> None:
    """The token reads it in place, and can use it after the buffer is gone; the buffer itself is left as it was."""
    algo = ALGORITHMS[name]
    material = generate_material(algo)
    public = public_key_der(algo, material) if given_public else b""
    with SecretBuffer.copy_of(material + b"blinding") as secret:
        handle = lane.load(algo, memoryview(secret)[: -len(b"blinding")], public)
        assert secret == material + b"blinding"
    assert secret.closed
    with loaded(lane, algo, material) as other:
        if algo.kind is KeyKind.AES:
            assert lane.decrypt(other, lane.encrypt(handle, MESSAGE, b"a"), b"a") == MESSAGE
        elif algo.kind is KeyKind.HMAC:
            assert lane.mac(handle, MESSAGE) == lane.mac(other, MESSAGE)
        else:
            lane.verify(other, digest(algo, MESSAGE), lane.sign(handle, digest(algo, MESSAGE)))
            lane.verify(handle, digest(algo, MESSAGE), lane.sign(other, digest(algo, MESSAGE)))
    handle.destroy()


@pytest.mark.parametrize("name", ["ecdsa-p256-sha256", "ed25519"])
def test_a_public_key_of_another_kind_is_refused(lane: Lane, name: str) -> None:
    algo, other = ALGORITHMS[name], ALGORITHMS["ecdsa-p384-sha384"]
    wrong = public_key_der(other, generate_material(other))
    unknown = wrong.replace(
        b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01", b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x7f"
    )  # an algorithm's number
    for public in (wrong, b"\x30\x00", unknown):
        with pytest.raises(TokenError, match=f"no key of {name}"):
            lane.load(algo, generate_material(algo), public)


def test_a_damaged_rsa_key_is_refused(lane: Lane) -> None:
    """Every shortening and each changed tag or length of the outer parts; the error shows no number of it."""
    algo = ALGORITHMS["rsa-2048-pss-sha256"]
    der = generate_material(algo)
    damaged = [der[:cut] for cut in (1, 2, 3, 4, 5, 8, 300, len(der) - 1)] + [der + b"\0"]
    damaged += [der[:place] + bytes([der[place] ^ 0x81]) + der[place + 1 :] for place in (0, 1, 3, 4, 5, 6, 7, 8, 9)]
    damaged.append(generate_material(ALGORITHMS["rsa-3072-pss-sha256"]))
    for each in damaged:
        with pytest.raises(TokenError, match="no key of rsa-2048-pss-sha256: it"):
            lane.load(algo, each)


def test_a_refusal_of_the_token_keeps_no_view_of_the_key(token: Token) -> None:
    """On a session that is closed; the error is held, and the memory is given back all the same."""
    lane = token.lane()
    lane._session.close()
    _, before = secret_memory()
    secret = SecretBuffer.random(32)
    with pytest.raises(TokenError, match="refused a key of aes-256-gcm: C_CreateObject returned CKR_") as _:
        lane.load(ALGORITHMS["aes-256-gcm"], secret)
    secret.close()
    assert secret_memory()[1] == before


@pytest.mark.parametrize("size", [1, 33, 8192])
def test_what_was_sealed_is_unsealed_into_locked_memory(lane: Lane, size: int) -> None:
    plain = os.urandom(size)
    with lane.unseal_secret(lane.seal(plain, b"context"), b"context") as secret:
        assert secret == plain


def test_a_changed_blob_is_not_unsealed_into_locked_memory(lane: Lane) -> None:
    sealed = lane.seal(b"share", b"context")
    _, before = secret_memory()
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1 << position % 8
        with pytest.raises(InvalidTag):
            lane.unseal_secret(bytes(changed), b"context")
    for length in range(len(sealed)):
        with pytest.raises(InvalidTag):
            lane.unseal_secret(sealed[:length], b"context")
    with pytest.raises(InvalidTag):
        lane.unseal_secret(lane.seal(b"", b"context"), b"context")
    assert secret_memory()[1] == before


def test_a_session_that_is_gone_is_a_token_fault_when_unsealing(lane: Lane, token: Token) -> None:
    other = token.lane()
    sealed = lane.seal(b"share", b"")
    other._session.close()
    with pytest.raises(TokenError, match="KEK does not answer: C_DecryptInit returned CKR_"):
        other.unseal_secret(sealed, b"")


LOAD_AND_WAIT = """
import os, sys
from pathlib import Path
from engine.keys import ALGORITHMS
from engine.sharing import SecretBuffer
from nodes.config import PinSource, TokenConfig
from nodes.token import Token, initialize_token
module, folder, name, public, length, copy = sys.argv[1:]
config = TokenConfig(Path(module), "scan", PinSource("file", folder + "/pin"))
initialize_token(config, Path(folder) / "data")
lane = Token(config, Path(folder) / "data").lane()
secret = SecretBuffer(int(length))
print("ready", flush=True)
assert os.readv(0, [secret]) == int(length)
kept = bytes(secret) if copy == "copy" else b""
loaded = lane.load(ALGORITHMS[name], secret, bytes.fromhex(public))
secret.close()
print("loaded", flush=True)
os.read(0, 1)
"""


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["aes-256-gcm", "hmac-sha512", "ecdsa-p256-sha256", "ed25519", "rsa-2048-pss-sha256"])
def test_loading_leaves_no_copy_in_the_process(
    token_config: TokenConfig, tmp_path: Path, occurrences: Callable[[int, bytes], int], name: str, copied: bool
) -> None:
    """The whole memory of another process is searched; with one ``bytes`` of the key kept, the search finds that one.

    For RSA it looks for a prime: the whole encoding is nobody's secret form.
    """
    algo = ALGORITHMS[name]
    material = generate_material(algo)
    needle = material
    if algo.kind is KeyKind.RSA:
        private = load_private_key(algo, material)
        needle = private.private_numbers().p.to_bytes(128, "big")  # type: ignore[union-attr]
    arguments = (token_config.module, tmp_path, name, public_key_der(algo, material).hex(), len(material))
    with subprocess.Popen(
        [sys.executable, "-c", LOAD_AND_WAIT, *map(str, arguments), "copy" if copied else "none"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(material)
            assert process.stdout.readline() == b"loaded\n"
            assert occurrences(process.pid, needle) == (1 if copied else 0)
        finally:
            process.kill()


# --- sealing ---


@pytest.mark.parametrize("size", [0, 1, 33, 8192])
def test_what_was_sealed_is_unsealed(lane: Lane, size: int) -> None:
    plain = os.urandom(size)
    assert lane.unseal(lane.seal(plain, b"context"), b"context") == plain


def test_a_changed_blob_or_context_is_not_unsealed(lane: Lane) -> None:
    sealed = lane.seal(b"share", b"context")
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1 << position % 8
        with pytest.raises(InvalidTag):
            lane.unseal(bytes(changed), b"context")
    for length in range(len(sealed)):
        with pytest.raises(InvalidTag):
            lane.unseal(sealed[:length], b"context")
    for context in (b"", b"contexT", b"context\0"):
        with pytest.raises(InvalidTag):
            lane.unseal(sealed, context)


def test_a_seal_hides_its_content_and_never_repeats(lane: Lane) -> None:
    first, second = lane.seal(b"share" * 20, b""), lane.seal(b"share" * 20, b"")
    assert first != second
    assert b"share" not in first


def test_the_tokens_random_bytes_have_the_length_asked_for(lane: Lane) -> None:
    drawn = [lane.random(32) for _ in range(64)]
    assert {len(each) for each in drawn} == {32}
    assert len(set(drawn)) == 64


# --- threads ---


def test_two_threads_with_a_lane_each_work_side_by_side(token: Token) -> None:
    errors: list[BaseException] = []

    def work(lane: Lane, name: str) -> None:
        try:
            algo = ALGORITHMS[name]
            for _ in range(15):
                with loaded(lane, algo, generate_material(algo)) as handle:
                    for i in range(20):
                        data = bytes([i]) * 100
                        if name.endswith("gcm"):
                            assert lane.decrypt(handle, lane.encrypt(handle, data, b""), b"") == data
                        else:
                            lane.verify(handle, digest(algo, data), lane.sign(handle, digest(algo, data)))
                        assert lane.unseal(lane.seal(data, b"c"), b"c") == data
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(token.lane(), name)) for name in ("aes-256-gcm", "ecdsa-p256-sha256")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


# --- what the token can't do ---


def test_what_softhsm_lacks_is_found_by_trying_and_named(token: Token) -> None:
    assert set(token.algorithms) | set(token.missing) == set(ALGORITHMS)
    assert not set(token.algorithms) & set(token.missing)
    assert OAEP in token.missing
    assert token.missing[OAEP].startswith("CKM_RSA_PKCS_OAEP with SHA-256")
    assert set(token.algorithms) == {*AES, *HMAC, *SIGNING}


@pytest.mark.parametrize("failure", [InvalidSignature("wrong"), InvalidTag("wrong"), TokenError("sick")])
def test_a_probe_that_fails_in_whatever_way_makes_the_algorithm_missing(
    token: Token, monkeypatch: pytest.MonkeyPatch, failure: EngineError
) -> None:
    def verify(*_: object) -> None:
        raise failure

    monkeypatch.setattr(Lane, "verify", verify)
    assert set(token._probe(token.lane())) == {*SIGNING, OAEP}


def test_an_oaep_operation_on_softhsm_is_refused(lane: Lane) -> None:
    algo = ALGORITHMS[OAEP]
    with loaded(lane, algo, generate_material(algo)) as handle, pytest.raises(TokenError):
        lane.encrypt(handle, b"x", b"")


def test_the_slow_algorithms_are_the_ones_beyond_the_limit() -> None:
    assert {name for name, algo in ALGORITHMS.items() if is_slow(algo)} == {
        "ecdsa-p384-sha384",
        "rsa-2048-pss-sha256",
        "rsa-3072-pss-sha256",
        "rsa-4096-pss-sha256",
        "rsa-2048-pkcs1-sha256",
        OAEP,
    }


# --- making a token ---


def test_the_pin_is_private_random_and_strong_enough(token: Token, token_config: TokenConfig) -> None:
    path = Path(token_config.pin.place)
    pin = token_config.pin.read()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"[0-9a-f]{40}", pin)  # 160 bits
    assert path.parent.joinpath("data").is_dir()
    assert not path.is_relative_to(path.parent / "data")
    for file in (path.parent / "data").rglob("*"):
        assert not file.is_file() or pin.encode() not in file.read_bytes()


def test_the_tokens_folder_is_private(token: Token, token_config: TokenConfig) -> None:
    data = Path(token_config.pin.place).parent / "data"
    assert stat.S_IMODE((data / "tokens").stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "softhsm2.conf").stat().st_mode) == 0o600


def test_init_never_overwrites_a_pin_file(token_config: TokenConfig, tmp_path: Path) -> None:
    pin = tmp_path / "pin"
    pin.write_text("precious")
    with pytest.raises(ConfigError, match="exists already; it is never overwritten"):
        initialize_token(replace(token_config, pin=PinSource("file", str(pin))), tmp_path / "data")
    assert pin.read_text() == "precious"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("place", ["data/pin", "data/deeper/pin"])
def test_init_refuses_a_pin_file_inside_the_data_folder(token_config: TokenConfig, tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match="lies in the data folder"):
        initialize_token(replace(token_config, pin=PinSource("file", str(tmp_path / place))), tmp_path / "data")
    assert not (tmp_path / place).exists()


def test_init_refuses_a_token_that_exists_and_leaves_no_pin_file(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    pin = cluster_folder.root / "pin.node1"
    first = pin.read_text()
    pin.unlink()
    again = cluster_folder.init("node1")
    assert again.returncode == 2
    assert "a token 'node1' exists already" in again.stderr
    assert "Traceback" not in again.stderr
    assert not pin.exists()
    pin.write_text(first)
    pin.chmod(0o600)
    assert cluster_folder.command("check-token", "--config", str(cluster_folder.config("node1"))).returncode == 0


def test_one_init_makes_the_tokens_of_several_nodes_and_names_those_it_could_not_make(cluster_folder: Any) -> None:
    one, two = (["--config", str(cluster_folder.config(name))] for name in ("node1", "node2"))
    assert cluster_folder.init("node1").returncode == 0
    pin = (cluster_folder.root / "pin.node1").read_text()
    (cluster_folder.root / "pin.node1").unlink()
    both = cluster_folder.command("init", *one, *two)
    assert both.returncode == 2
    assert "a token 'node1' exists already" in both.stderr
    assert f"1 of 2 tokens were not made: those of {one[1]}\n" in both.stderr
    assert "Traceback" not in both.stderr
    (cluster_folder.root / "pin.node1").write_text(pin)
    (cluster_folder.root / "pin.node1").chmod(0o600)
    for config in (one, two):
        assert cluster_folder.command("check-token", *config).returncode == 0


@pytest.mark.parametrize("wrong", ["0" * 40, "1234", "f" * 255])
def test_a_wrong_pin_is_told_without_the_pin(cluster_folder: Any, wrong: str) -> None:
    assert cluster_folder.init("node1").returncode == 0
    pin = cluster_folder.root / "pin.node1"
    right = pin.read_text().strip()
    pin.write_text(wrong)
    ended = cluster_folder.command("check-token", "--config", str(cluster_folder.config("node1")))
    assert ended.returncode == 3
    assert "login to the token 'node1' failed" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert wrong not in ended.stderr + ended.stdout
    assert right not in ended.stderr + ended.stdout


def test_check_token_lists_what_the_token_can_and_what_it_lacks(cluster_folder: Any) -> None:
    made = cluster_folder.init("node1")
    assert made.returncode == 0
    pin = (cluster_folder.root / "pin.node1").read_text().strip()
    assert pin not in made.stdout + made.stderr
    listed = cluster_folder.command("check-token", "--config", str(cluster_folder.config("node1")))
    assert listed.returncode == 0
    lines = listed.stdout.splitlines()
    assert set(lines[:-1]) == set(ALGORITHMS) - {OAEP}
    assert lines[-1].startswith(f"{OAEP}: missing CKM_RSA_PKCS_OAEP with SHA-256")


TWO_KEKS = """
import sys
from pathlib import Path
from pkcs11 import Attribute, MechanismFlag, KeyType
from nodes.config import load_node_config
from nodes.token import KEK_LABEL, Token
config = load_node_config(sys.argv[1])
token = Token(config.token, config.data)
session = token._token.open(rw=True)
if sys.argv[2] == "two":
    session.generate_key(KeyType.AES, 256, label=KEK_LABEL, store=True,
                         capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT)
else:
    next(iter(session.get_objects({Attribute.LABEL: KEK_LABEL}))).destroy()
"""


@pytest.mark.parametrize(("change", "count"), [("none", 0), ("two", 2)])
def test_a_token_without_exactly_one_kek_is_refused(
    cluster_folder: Any, run_python: Callable[..., Any], change: str, count: int
) -> None:
    assert cluster_folder.init("node1").returncode == 0
    changed = run_python(TWO_KEKS, cluster_folder.config("node1"), change)
    assert changed.returncode == 0, changed.stderr
    ended = cluster_folder.command("check-token", "--config", str(cluster_folder.config("node1")))
    assert ended.returncode == 2
    assert f"the token has {count} keys {KEK_LABEL!r}, exactly 1 is needed" in ended.stderr
