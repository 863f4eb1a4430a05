"""Every algorithm through the real cluster, each result checked by an independent implementation."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from whole_keys import create_whole_key

import engine
from engine import ALGORITHMS, Engine, RequestType

MESSAGE = b"a message that every algorithm gets" * 20
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
SIGNING = [name for name, algo in ALGORITHMS.items() if RequestType.SIGN in algo.operations]
AEAD = [name for name, algo in ALGORITHMS.items() if name.startswith("aes-")]
MACS = [name for name, algo in ALGORITHMS.items() if RequestType.MAC in algo.operations]


def verify_with_pyca(name: str, public: object, signature: bytes, message: bytes) -> None:
    """Raise unless pyca/cryptography accepts the signature under the algorithm."""
    if isinstance(public, ed25519.Ed25519PublicKey):
        public.verify(signature, message)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        public.verify(signature, message, ec.ECDSA(hashes.SHA384() if "p384" in name else hashes.SHA256()))
    else:
        assert isinstance(public, rsa.RSAPublicKey)
        public.verify(signature, message, PSS if "pss" in name else padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.parametrize("name", AEAD)
def test_aead_round_trip(kq: Engine, name: str) -> None:
    """What was encrypted decrypts with the same associated data alone."""
    kq.create_key(f"aead/{name}", name, threshold=3, shares=5)
    for plaintext in (b"", b"x", os.urandom(48 * 1024)):
        ciphertext = kq.encrypt(f"aead/{name}", plaintext, associated_data=b"tenant-7")
        assert kq.decrypt(f"aead/{name}", ciphertext, associated_data=b"tenant-7") == plaintext
        with pytest.raises(engine.InvalidTag):
            kq.decrypt(f"aead/{name}", ciphertext, associated_data=b"tenant-8")
        for position in (0, 3, 6, 7, 20, len(ciphertext) - 1):
            changed = bytearray(ciphertext)
            changed[position] ^= 1
            with pytest.raises(engine.InvalidTag):
                kq.decrypt(f"aead/{name}", bytes(changed), associated_data=b"tenant-7")
    assert kq.encrypt(f"aead/{name}", b"same") != kq.encrypt(f"aead/{name}", b"same")


@pytest.mark.parametrize("name", SIGNING)
def test_signatures_verify_elsewhere(kq: Engine, name: str) -> None:
    """A signature from the token is accepted by pyca/cryptography and by the token; no other signature is."""
    create_whole_key(kq, f"sign/{name}", name, threshold=3, shares=5)
    public = serialization.load_pem_public_key(kq.public_key(f"sign/{name}").encode())
    for message in (b"", MESSAGE, os.urandom(40_000)):
        signature = kq.sign(f"sign/{name}", message)
        verify_with_pyca(name, public, signature, message)
        kq.verify(f"sign/{name}", message, signature)
        with pytest.raises(engine.InvalidSignature):
            kq.verify(f"sign/{name}", message + b"!", signature)
        with pytest.raises(engine.InvalidSignature):
            kq.verify(f"sign/{name}", message, signature[:-1] + bytes([signature[-1] ^ 1]))


@pytest.mark.parametrize("name", MACS)
def test_mac_round_trip(kq: Engine, name: str) -> None:
    """A MAC is stable and is checked in full."""
    kq.create_key(f"mac/{name}", name, threshold=3, shares=5)
    tag = kq.mac(f"mac/{name}", MESSAGE)
    assert len(tag) == ALGORITHMS[name].bits // 8
    assert kq.mac(f"mac/{name}", MESSAGE) == tag
    kq.verify_mac(f"mac/{name}", MESSAGE, tag)
    for wrong in (tag[:-1], bytes([tag[0] ^ 1]) + tag[1:], b"\0"):
        with pytest.raises(engine.InvalidSignature):
            kq.verify_mac(f"mac/{name}", MESSAGE, wrong)


def test_what_the_token_lacks_is_refused_by_name(kq: Engine) -> None:
    """SoftHSM 2.6.1 has OAEP with SHA-1 only: the key's creation is refused, and the mechanism is named."""
    with pytest.raises(engine.UnsupportedAlgorithm, match=r"CKM_RSA_PKCS_OAEP with SHA-256"):
        kq.create_key("oaep", "rsa-2048-oaep-sha256")
    with pytest.raises(engine.KeyNotFound):
        kq.key_info("oaep")


def _pkcs8(private: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey, *, pem: bool) -> bytes:
    encoding = serialization.Encoding.PEM if pem else serialization.Encoding.DER
    return private.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


MAKERS: dict[str, Callable[[], ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey]] = {
    "ecdsa-p256-sha256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384-sha384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa-2048-pss-sha256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "rsa-2048-pkcs1-sha256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "rsa-3072-pss-sha256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=3072),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("pem", [True, False], ids=["pem", "der"])
def test_imported_private_keys_are_the_same_keys(kq: Engine, name: str, pem: bool) -> None:
    """An imported key signs what the original key's public half accepts, and is exported as that half."""
    private = MAKERS[name]()
    key = f"imported/{name}/{'pem' if pem else 'der'}"
    kq.import_key(key, name, key_material=_pkcs8(private, pem=pem), threshold=3, shares=5)
    verify_with_pyca(name, private.public_key(), kq.sign(key, MESSAGE), MESSAGE)
    exported = serialization.load_pem_public_key(kq.public_key(key).encode())
    assert exported == private.public_key()
    if isinstance(private, ed25519.Ed25519PrivateKey):
        assert kq.sign(key, MESSAGE) == private.sign(MESSAGE)  # deterministic: RFC 8032


@pytest.mark.parametrize("bits", [128, 256])
def test_imported_aes_keys_are_the_same_keys(kq: Engine, bits: int) -> None:
    """What the cluster encrypts with an imported key, the original key decrypts, by the documented layout."""
    raw = os.urandom(bits // 8)
    kq.import_key(f"imported/aes-{bits}", f"aes-{bits}-gcm", key_material=raw, threshold=3, shares=5)
    ciphertext = kq.encrypt(f"imported/aes-{bits}", MESSAGE, associated_data=b"aad")
    header, nonce, rest = ciphertext[:7], ciphertext[7:19], ciphertext[19:]
    assert header == b"KQ\x01\x00\x00\x00\x01"
    assert AESGCM(raw).decrypt(nonce, rest, header + b"aad") == MESSAGE
    made_outside = header + nonce + AESGCM(raw).encrypt(nonce, b"made outside", header)
    assert kq.decrypt(f"imported/aes-{bits}", made_outside) == b"made outside"


@pytest.mark.parametrize(("name", "length"), [("hmac-sha256", 16), ("hmac-sha256", 32), ("hmac-sha256", 64)])
def test_imported_hmac_keys_are_the_same_keys(kq: Engine, name: str, length: int) -> None:
    """HMAC with an imported key of any allowed length equals the standard library's."""
    raw = os.urandom(length)
    key = f"imported/{name}-{length}"
    kq.import_key(key, name, key_material=raw, threshold=3, shares=5)
    assert kq.mac(key, MESSAGE) == hmac.digest(raw, MESSAGE, hashlib.sha256)


def test_imported_sha512_hmac_key(kq: Engine) -> None:
    """The same with SHA-512 and a key as long as its block."""
    raw = os.urandom(128)
    kq.import_key("imported/hmac-512", "hmac-sha512", key_material=raw, threshold=2, shares=3)
    assert kq.mac("imported/hmac-512", MESSAGE) == hmac.digest(raw, MESSAGE, hashlib.sha512)
