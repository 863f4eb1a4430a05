"""The PKCS#11 token: its one KEK, loaded keys as session objects, and the operations on them.

Nothing else in the node touches PKCS#11. It knows no policy, no store and no socket. A ``Lane`` is one session used by
one thread; objects belong to the lane that made them. The session that logged in stays open as long as the process:
closing it would log the whole process out (PKCS#11 v2.40, 5.6).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pkcs11
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.exceptions import (
    KeyHandleInvalid,
    ObjectHandleInvalid,
    PKCS11Error,
    SessionClosed,
    SessionHandleInvalid,
    UserNotLoggedIn,
)
from pkcs11.mechanisms import MGF, GCMParams
from pkcs11.util.ec import encode_named_curve_parameters

from engine.client.config import sync_folder, write_private
from engine.errors import ConfigError, EngineError, InvalidSignature, InvalidTag, TokenError
from engine.keys import ALGORITHMS, Algorithm, KeyKind, PrivateKey, RequestType, load_private_key
from nodes.config import TokenConfig

__all__ = ["Lane", "LoadedKey", "Token", "initialize_token", "is_slow"]

KEK_LABEL: Final = "keyquorum-kek"
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
PIN_BYTES: Final = 20
"""160 random bits: SoftHSM's derivation is weak, so the PIN itself must carry the strength."""
PIN_CHARACTERS_MIN: Final = 32
"""Of a PIN that comes from elsewhere: 128 bits if it is random and in hex."""
SLOW_US: Final = 300
"""An operation expected to take longer runs beside the loop that serves the quick ones."""

_EDWARDS25519: Final = b"\x13\x0cedwards25519"  # PrintableString, PKCS#11 v3.0, 2.3.10
_SHA256_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, 9.2, note 1
_CURVE_NAMES: Final = {256: "secp256r1", 384: "secp384r1"}
_PSS: Final = (Mechanism.SHA256, MGF.SHA256, 32)
_GONE: Final = (KeyHandleInvalid, ObjectHandleInvalid, SessionClosed, SessionHandleInvalid, UserNotLoggedIn)
"""What says that key, session or login are gone: never the answer to a wrong tag."""
_OAEP: Final = (Mechanism.SHA256, MGF.SHA256, None)
_HMAC: Final = {"sha256": Mechanism.SHA256_HMAC, "sha512": Mechanism.SHA512_HMAC}
_HMAC_BLOCK: Final = {"sha256": 64, "sha512": 128}
_SESSION_SECRET: Final = {
    Attribute.TOKEN: False,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
}
# A token's default for a use that is not named may be "yes" (SoftHSM's is), so every use is named.
_NO_SECRET_USE: Final = dict.fromkeys(
    (
        Attribute.ENCRYPT,
        Attribute.DECRYPT,
        Attribute.SIGN,
        Attribute.VERIFY,
        Attribute.WRAP,
        Attribute.UNWRAP,
        Attribute.DERIVE,
    ),
    False,
)
_NO_PRIVATE_USE: Final = dict.fromkeys(
    (Attribute.DECRYPT, Attribute.SIGN, Attribute.SIGN_RECOVER, Attribute.UNWRAP, Attribute.DERIVE), False
)
_NO_PUBLIC_USE: Final = dict.fromkeys(
    (Attribute.ENCRYPT, Attribute.VERIFY, Attribute.VERIFY_RECOVER, Attribute.WRAP, Attribute.DERIVE), False
)


def is_slow(algo: Algorithm) -> bool:
    """Whether the algorithm's operations belong beside the quick loop."""
    return algo.prior_us > SLOW_US


class _InitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS (PKCS#11 v2.40, 5.4)."""

    _fields_ = (
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


CKF_OS_LOCKING_OK: Final = 2


def _softhsm_environment(config: TokenConfig, data: Path) -> None:
    """Point SoftHSM at this node's own token folder; must happen before the module is loaded."""
    if not config.is_softhsm:
        return
    tokens = data / "tokens"
    tokens.mkdir(mode=0o700, parents=True, exist_ok=True)
    conf = data / "softhsm2.conf"
    text = f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
    if not conf.exists() or conf.read_text(encoding="utf-8") != text:
        write_private(conf, text.encode())
    os.environ["SOFTHSM2_CONF"] = str(conf)


def _load(config: TokenConfig, data: Path) -> tuple[Any, ctypes.CDLL]:
    """The module, initialised for several threads.

    python-pkcs11 calls C_Initialize(NULL), after which two threads crash SoftHSM; so it is finalised and initialised
    again with CKF_OS_LOCKING_OK before any session is opened.
    """
    _softhsm_environment(config, data)
    try:
        library = pkcs11.lib(str(config.module))
        native = ctypes.CDLL(str(config.module))
    except (PKCS11Error, OSError, RuntimeError) as error:
        raise TokenError(f"the PKCS#11 module {config.module} can't be loaded: {describe(error)}") from None
    arguments = _InitializeArgs(flags=CKF_OS_LOCKING_OK)
    for name, code in (
        ("C_Finalize", native.C_Finalize(None)),
        ("C_Initialize", native.C_Initialize(ctypes.byref(arguments))),
    ):
        if code != 0:
            raise TokenError(f"{name} of {config.module} returned 0x{code:08x}")
    return library, native


def describe(error: BaseException) -> str:
    """A PKCS#11 error as text: python-pkcs11 gives its name alone."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def initialize_token(config: TokenConfig, data: Path) -> None:
    """Make the token, its random PIN and the KEK, durably.

    The PIN goes to the configured file, which must not exist yet and must lie outside ``data`` (an ``env:`` source must
    already hold one of at least 32 characters). The KEK is an AES-256 key that encrypts and decrypts only, sensitive
    and never extractable.
    SoftHSM never syncs its files, so they are synced here.
    """
    _check_pin_place(config, data)
    library, native = _load(config, data)
    if any(token.label == config.label for token in library.get_tokens()):
        raise TokenError(f"a token {config.label!r} exists already in {data}")
    pin = _new_pin(config)
    so_pin = secrets.token_hex(PIN_BYTES)
    slot = _free_slot(library, config.label)
    label = config.label.encode().ljust(32)
    native.C_InitToken.argtypes = [ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    code = native.C_InitToken(slot.slot_id, so_pin.encode(), len(so_pin), label)
    if code != 0:
        raise TokenError(f"C_InitToken of {config.label!r} returned 0x{code:08x}")
    try:
        token = _find(library, config.label)
        with token.open(rw=True, so_pin=so_pin) as session:
            session.init_pin(pin)
        with token.open(rw=True, user_pin=pin) as session:
            session.generate_key(
                KeyType.AES,
                256,
                label=KEK_LABEL,
                store=True,
                capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
            )
    except PKCS11Error as error:
        raise TokenError(f"the token {config.label!r} can't be set up: {describe(error)}") from None
    for folder, _, files in os.walk(data / "tokens"):
        for name in files:
            _sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def _check_pin_place(config: TokenConfig, data: Path) -> None:
    if config.pin.kind == "env":
        if len(config.pin.read()) < PIN_CHARACTERS_MIN:
            raise ConfigError(f"{config.pin}: a new token's PIN needs at least {PIN_CHARACTERS_MIN} characters")
        return
    path = Path(config.pin.place)
    if path.is_relative_to(data):
        raise ConfigError(f"the PIN file {path} lies in the data folder {data}; keep it elsewhere")
    if path.exists():
        raise ConfigError(f"the PIN file {path} exists already; it is never overwritten")


def _new_pin(config: TokenConfig) -> str:
    if config.pin.kind == "env":
        return config.pin.read()
    path = Path(config.pin.place)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    pin = secrets.token_hex(PIN_BYTES)
    write_private(path, pin.encode() + b"\n")
    return pin


def _free_slot(library: Any, label: str) -> Any:
    for slot in library.get_slots(token_present=True):
        if not slot.get_token().flags & pkcs11.TokenFlag.TOKEN_INITIALIZED:
            return slot
    raise TokenError(f"no slot has room for a new token {label!r}")


def _find(library: Any, label: str) -> Any:
    found = [token for token in library.get_tokens() if token.label == label]
    if len(found) != 1:
        raise TokenError(
            f"{len(found)} tokens are called {label!r}, exactly 1 is needed; has `python -m nodes init` run?"
        )
    return found[0]


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class LoadedKey:
    """A key as session objects of one lane; non-extractable. Use it from the lane's thread alone."""

    algorithm: Algorithm
    private: Any
    public: Any = None

    def destroy(self) -> None:
        """Remove the objects from the token. A session object that is already gone is what was wanted."""
        for each in (self.private, self.public):
            if each is not None:
                try:
                    each.destroy()
                except PKCS11Error:
                    continue


class Lane:
    """One session of the token, for one thread."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._kek = _one_kek(session)

    # --- the KEK ---

    def seal(self, plaintext: bytes, associated_data: bytes) -> bytes:
        """AES-256-GCM under the KEK (NIST SP 800-38D): a random 96-bit nonce, the ciphertext and its 16-byte tag."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._gcm(self._kek.encrypt, plaintext, nonce, associated_data)

    def unseal(self, sealed: bytes, associated_data: bytes) -> bytes:
        """What was sealed; ``InvalidTag`` if blob or associated data changed, ``TokenError`` if the token failed."""
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        if len(rest) < TAG_BYTES:
            raise InvalidTag(f"a sealed blob of {len(sealed)} bytes is too short")
        try:
            return self._gcm(self._kek.decrypt, rest, nonce, associated_data)
        except _GONE as error:
            raise TokenError(f"the token's KEK does not answer: {describe(error)}") from None
        except PKCS11Error:
            # SoftHSM answers a wrong tag with CKR_GENERAL_ERROR: the canary tells it from a sick token.
            self.check_kek()
            raise InvalidTag("a sealed blob does not open under this token's KEK") from None

    def check_kek(self) -> None:
        """Seal and unseal a canary; ``TokenError`` if that fails."""
        canary, nonce = os.urandom(16), os.urandom(NONCE_BYTES)
        try:
            blob = self._gcm(self._kek.encrypt, canary, nonce, b"canary")
            if self._gcm(self._kek.decrypt, blob, nonce, b"canary") != canary:
                raise TokenError("the KEK's canary came back changed")
        except PKCS11Error as error:
            raise TokenError(f"the token's KEK does not answer: {describe(error)}") from None

    @staticmethod
    def _gcm(call: Callable[..., bytes], data: bytes, nonce: bytes, associated_data: bytes) -> bytes:
        return call(data, mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(nonce, associated_data, 128))

    def random(self, length: int) -> bytes:
        """``length`` bytes from the token's generator (C_GenerateRandom)."""
        try:
            return bytes(self._session.generate_random(length * 8))
        except PKCS11Error as error:
            raise TokenError(f"the token's random generator failed: {describe(error)}") from None

    # --- loaded keys ---

    def load(self, algo: Algorithm, material: bytes | bytearray) -> LoadedKey:
        """Put canonical key material (``engine.keys``) into the token by C_CreateObject, as session objects.

        ``TokenError`` if the token refuses it or it is none of this algorithm (SoftHSM takes AES keys of any length).
        """
        try:
            if algo.kind is KeyKind.AES:
                if len(material) != algo.bits // 8:
                    raise ValueError(f"{len(material)} bytes, {algo.bits // 8} are needed")
                usage = {Attribute.ENCRYPT: True, Attribute.DECRYPT: True}
                return LoadedKey(algo, self._secret(KeyType.AES, bytes(material), usage))
            if algo.kind is KeyKind.HMAC:
                # Zero padding to the block changes no MAC (RFC 2104, 2) and satisfies tokens that refuse short keys.
                padded = bytes(material).ljust(_HMAC_BLOCK[algo.hash_name], b"\0")
                usage = {Attribute.SIGN: True, Attribute.VERIFY: True}
                return LoadedKey(algo, self._secret(KeyType.GENERIC_SECRET, padded, usage))
            return self._pair(algo, load_private_key(algo, material))
        except PKCS11Error as error:
            raise TokenError(f"the token refused a key of {algo.name}: {describe(error)}") from None
        except ValueError as error:
            raise TokenError(f"what was combined is no key of {algo.name}: {error}") from None

    def _secret(self, kind: KeyType, value: bytes, usage: Mapping[Attribute, bool]) -> Any:
        return self._session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: kind,
                Attribute.VALUE: value,
                **_SESSION_SECRET,
                **_NO_SECRET_USE,
                **usage,
            }
        )

    def _pair(self, algo: Algorithm, private: PrivateKey) -> LoadedKey:
        kind, secret, public = _components(algo, private)
        encrypts = RequestType.ENCRYPT in algo.operations
        made = LoadedKey(
            algo,
            self._session.create_object(
                {
                    Attribute.CLASS: ObjectClass.PRIVATE_KEY,
                    Attribute.KEY_TYPE: kind,
                    **secret,
                    **_SESSION_SECRET,
                    **_NO_PRIVATE_USE,
                    (Attribute.DECRYPT if encrypts else Attribute.SIGN): True,
                }
            ),
        )
        try:
            made.public = self._session.create_object(
                {
                    Attribute.CLASS: ObjectClass.PUBLIC_KEY,
                    Attribute.KEY_TYPE: kind,
                    **public,
                    Attribute.TOKEN: False,
                    **_NO_PUBLIC_USE,
                    (Attribute.ENCRYPT if encrypts else Attribute.VERIFY): True,
                }
            )
        except PKCS11Error:
            made.destroy()
            raise
        return made

    # --- operations ---

    def encrypt(self, key: LoadedKey, plaintext: bytes, associated_data: bytes) -> bytes:
        """AES-GCM: nonce || ciphertext || tag; RSA-OAEP (no associated data): the ciphertext."""
        if key.algorithm.kind is KeyKind.RSA:
            return self._run(key.public.encrypt, plaintext, mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=_OAEP)
        nonce = os.urandom(NONCE_BYTES)
        parameters = GCMParams(nonce, associated_data, 128)
        return nonce + self._run(
            key.private.encrypt, plaintext, mechanism=Mechanism.AES_GCM, mechanism_param=parameters
        )

    def decrypt(self, key: LoadedKey, ciphertext: bytes, associated_data: bytes) -> bytes:
        """The plaintext; ``InvalidTag`` if anything was changed."""
        parameters: Any
        if key.algorithm.kind is KeyKind.RSA:
            data, mechanism, parameters = ciphertext, Mechanism.RSA_PKCS_OAEP, _OAEP
        else:
            if len(ciphertext) < NONCE_BYTES + TAG_BYTES:
                raise InvalidTag(f"a ciphertext of {len(ciphertext)} bytes is too short")
            data, mechanism = ciphertext[NONCE_BYTES:], Mechanism.AES_GCM
            parameters = GCMParams(ciphertext[:NONCE_BYTES], associated_data, 128)
        try:
            return bytes(key.private.decrypt(data, mechanism=mechanism, mechanism_param=parameters))
        except _GONE as error:
            raise TokenError(f"the token failed an operation: {describe(error)}") from None
        except PKCS11Error:
            self.check_kek()  # a wrong tag looks like a token fault: CKR_GENERAL_ERROR
            raise InvalidTag("the ciphertext, its associated data or its key does not fit") from None

    def sign(self, key: LoadedKey, data: bytes) -> bytes:
        """Sign a digest (or, for Ed25519, a message); ECDSA signatures come as DER (RFC 3279, 2.2.3)."""
        mechanism, parameters, prepared = _signing(key.algorithm, data)
        raw = self._run(key.private.sign, prepared, mechanism=mechanism, mechanism_param=parameters)
        if key.algorithm.kind is not KeyKind.EC:
            return raw
        half = len(raw) // 2
        return utils.encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))

    def verify(self, key: LoadedKey, data: bytes, signature: bytes) -> None:
        """``InvalidSignature`` unless the signature belongs to the digest (or message)."""
        mechanism, parameters, prepared = _signing(key.algorithm, data)
        raw = signature
        if key.algorithm.kind is KeyKind.EC:
            raw = _raw_ecdsa(signature, key.algorithm.bits // 8)
        self._verify(key.public, prepared, raw, mechanism=mechanism, mechanism_param=parameters)

    def mac(self, key: LoadedKey, data: bytes) -> bytes:
        """HMAC (RFC 2104) of the data."""
        return self._run(key.private.sign, data, mechanism=_HMAC[key.algorithm.hash_name])

    def verify_mac(self, key: LoadedKey, data: bytes, tag: bytes) -> None:
        """``InvalidSignature`` unless the full-length tag belongs to the data."""
        self._verify(key.private, data, tag, mechanism=_HMAC[key.algorithm.hash_name])

    @staticmethod
    def _run(call: Callable[..., bytes], data: bytes, **options: Any) -> bytes:
        try:
            return bytes(call(data, **options))
        except PKCS11Error as error:
            raise TokenError(f"the token failed an operation: {describe(error)}") from None

    @staticmethod
    def _verify(public: Any, data: bytes, signature: bytes, **options: Any) -> None:
        try:
            good = bool(signature) and public.verify(data, signature, **options)
        except PKCS11Error as error:
            raise TokenError(f"the token failed a verification: {describe(error)}") from None
        if not good:
            raise InvalidSignature("the signature or MAC does not belong to the message")


def _one_kek(session: Any) -> Any:
    found = list(
        session.get_objects(
            {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: KEK_LABEL, Attribute.TOKEN: True}
        )
    )
    if len(found) != 1:
        raise TokenError(f"the token has {len(found)} keys {KEK_LABEL!r}, exactly 1 is needed")
    return found[0]


def _components(algo: Algorithm, private: PrivateKey) -> tuple[KeyType, dict[Attribute, Any], dict[Attribute, Any]]:
    """Key type, secret attributes and public attributes of a key pair (PKCS#11 v2.40 mechanisms, 2.1.3, 2.3.4)."""
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = private.private_numbers()
        public = {
            Attribute.MODULUS: _big(numbers.public_numbers.n),
            Attribute.PUBLIC_EXPONENT: _big(numbers.public_numbers.e),
        }
        secret = {
            **public,
            Attribute.PRIVATE_EXPONENT: _big(numbers.d),
            Attribute.PRIME_1: _big(numbers.p),
            Attribute.PRIME_2: _big(numbers.q),
            Attribute.EXPONENT_1: _big(numbers.dmp1),
            Attribute.EXPONENT_2: _big(numbers.dmq1),
            Attribute.COEFFICIENT: _big(numbers.iqmp),
        }
        return KeyType.RSA, secret, public
    if isinstance(private, ed25519.Ed25519PrivateKey):
        point, parameters, value = private.public_key().public_bytes_raw(), _EDWARDS25519, private.private_bytes_raw()
        kind = KeyType.EC_EDWARDS
    else:
        kind, parameters = KeyType.EC, encode_named_curve_parameters(_CURVE_NAMES[algo.bits])
        value = private.private_numbers().private_value.to_bytes(algo.bits // 8, "big")
        point = private.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
    secret = {Attribute.EC_PARAMS: parameters, Attribute.VALUE: value}
    octets = b"\x04" + bytes([len(point)]) + point  # CKA_EC_POINT is a DER OCTET STRING; all are shorter than 128 bytes
    return kind, secret, {Attribute.EC_PARAMS: parameters, Attribute.EC_POINT: octets}


def _big(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _signing(algo: Algorithm, data: bytes) -> tuple[Mechanism, Any, bytes]:
    """Mechanism, parameter and input of a signature over a digest (Ed25519: over the message)."""
    if algo.kind is KeyKind.ED25519:
        return Mechanism.EDDSA, None, data
    size = hashlib.new(algo.hash_name).digest_size
    if len(data) != size:
        raise ValueError(f"{algo.name} signs a digest of {size} bytes, not of {len(data)}")
    if algo.kind is KeyKind.EC:
        return Mechanism.ECDSA, None, data
    if "-pss-" in algo.name:
        return Mechanism.RSA_PKCS_PSS, _PSS, data
    return Mechanism.RSA_PKCS, None, _SHA256_DIGEST_INFO + data


def _raw_ecdsa(signature: bytes, size: int) -> bytes:
    try:
        r, s = utils.decode_dss_signature(signature)
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    except (ValueError, OverflowError):
        raise InvalidSignature("the signature is no DER ECDSA signature of this curve") from None


class Token:
    """The opened token. ``algorithms`` are those it can serve; ``missing`` says what it lacks for the others."""

    def __init__(self, config: TokenConfig, data: Path) -> None:
        self._pin = config.pin.read()
        library, _ = _load(config, data)
        self._token = _find(library, config.label)
        try:
            self._login = self._token.open(user_pin=self._pin)
        except PKCS11Error as error:
            raise TokenError(f"login to the token {config.label!r} failed: {describe(error)}") from None
        finally:
            self._pin = ""
        self.description = f"{library.manufacturer_id} {library.library_description}, token {config.label}".strip()
        self.missing = self._probe()
        self.algorithms = tuple(name for name in ALGORITHMS if name not in self.missing)

    def lane(self) -> Lane:
        """A new session for the calling thread; the login of the process covers it."""
        try:
            return Lane(self._token.open())
        except PKCS11Error as error:
            raise TokenError(f"the token gives no further session: {describe(error)}") from None

    def _probe(self) -> Mapping[str, str]:
        """Algorithm -> what the token lacks for it, found by doing, with throw-away keys."""
        lane = Lane(self._login)
        missing: dict[str, str] = {}
        for algo in ALGORITHMS.values():
            lacking = self._size_problem(algo)
            if not lacking:
                try:
                    try_algorithm(lane, algo)
                except EngineError as error:  # a wrong answer (InvalidTag, InvalidSignature) is as good as none
                    lacking = f"{_MECHANISM_NAMES[algo.name]} ({error})"
                except PKCS11Error as error:
                    lacking = f"{_MECHANISM_NAMES[algo.name]} ({describe(error)})"
            if lacking:
                missing[algo.name] = lacking
        return missing

    def _size_problem(self, algo: Algorithm) -> str:
        if algo.kind is not KeyKind.RSA:
            return ""
        mechanism = {"pss": Mechanism.RSA_PKCS_PSS, "oaep": Mechanism.RSA_PKCS_OAEP}.get(
            algo.name.split("-")[2], Mechanism.RSA_PKCS
        )
        try:
            info = self._token.slot.get_mechanism_info(mechanism)
        except PKCS11Error:
            return f"the mechanism {_MECHANISM_NAMES[algo.name]}"
        if info.max_key_length and not info.min_key_length <= algo.bits <= info.max_key_length:
            return f"{_MECHANISM_NAMES[algo.name]} with {algo.bits} bits"
        return ""


_MECHANISM_NAMES: Final = {
    name: "CKM_RSA_PKCS_OAEP with SHA-256"
    if "oaep" in name
    else "CKM_RSA_PKCS_PSS with SHA-256"
    if "pss" in name
    else "CKM_RSA_PKCS"
    if "pkcs1" in name
    else "CKM_AES_GCM"
    if algo.kind is KeyKind.AES
    else f"CKM_{algo.hash_name.upper()}_HMAC"
    if algo.kind is KeyKind.HMAC
    else "CKM_EDDSA"
    if algo.kind is KeyKind.ED25519
    else f"CKM_ECDSA on {_CURVE_NAMES[algo.bits]}"
    for name, algo in ALGORITHMS.items()
}

PROBE_RSA_BITS: Final = 1024
"""Size of the throw-away RSA key that shows whether a parameter is accepted; the size itself is asked of the token."""


def try_algorithm(lane: Lane, algo: Algorithm) -> None:
    """Use the algorithm once, there and back, with a throw-away key."""
    private: PrivateKey | None = None
    if algo.kind is KeyKind.RSA:
        private = rsa.generate_private_key(public_exponent=65537, key_size=PROBE_RSA_BITS)
    elif algo.kind is KeyKind.EC:
        private = ec.generate_private_key(ec.SECP256R1() if algo.bits == 256 else ec.SECP384R1())
    elif algo.kind is KeyKind.ED25519:
        private = ed25519.Ed25519PrivateKey.generate()
    key = lane.load(algo, os.urandom(algo.bits // 8)) if private is None else lane._pair(algo, private)
    try:
        if RequestType.ENCRYPT in algo.operations:
            sealed = lane.encrypt(key, b"probe", b"")
            good = lane.decrypt(key, sealed, b"") == b"probe"
        elif RequestType.MAC in algo.operations:
            lane.verify_mac(key, b"probe", lane.mac(key, b"probe"))
            good = True
        else:
            data = hashlib.new(algo.hash_name, b"probe").digest() if algo.hash_name else b"probe"
            lane.verify(key, data, lane.sign(key, data))
            good = True
    finally:
        key.destroy()
    if not good:
        raise TokenError(f"{algo.name}: the token gave back other data")
