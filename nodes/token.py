"""The PKCS#11 token: its one KEK, loaded keys as session objects, and the operations on them.

Nothing else in the node touches PKCS#11. It knows no policy, no store and no socket. A ``Lane`` is one session used by
one thread; objects belong to the lane that made them. The session that logged in stays open until the token is renewed:
closing it would log the whole process out (PKCS#11 v2.40, 5.6).

Renewing (``Token.renew``) finalises and initialises the module in place, while no lane makes a call, and opens each
lane's session again. It brings a lost session or login back, and the memory that SoftHSM keeps of each object that was
ever made. Loaded keys end with it: handles are given out again, so each key knows the generation that it belongs to.

python-pkcs11 takes and gives ``bytes``, which can't be wiped, and copies them into memory that it does not wipe. So
where whole keys go in and shares come out the module's own functions are called, on locked memory (``_Module``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import pkcs11
from cryptography.exceptions import UnsupportedAlgorithm as PycaUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, _pkcs11
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import MGF, GCMParams
from pkcs11.util.ec import encode_named_curve_parameters

from engine.client.config import sync_folder, write_private
from engine.errors import ConfigError, EngineError, InvalidSignature, InvalidTag, NeedGrant, TokenError
from engine.keys import ALGORITHMS, Algorithm, KeyKind, RequestType, generate_material, public_key_der
from engine.sharing import SecretBuffer
from nodes.config import PinSource, TokenConfig
from nodes.health import Kind, TokenFault, classify

__all__ = [
    "CallWatch",
    "Lane",
    "LoadedKey",
    "Token",
    "TokenBusy",
    "initialize_token",
    "is_slow",
    "open_beside_fresh",
    "sync_tokens",
]

KEK_LABEL: Final = "keyquorum-kek"
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
PIN_BYTES: Final = 20
"""160 random bits: SoftHSM's derivation is weak, so the PIN itself must carry the strength."""
PIN_CHARACTERS_MIN: Final = 32
"""Of a PIN that comes from elsewhere: 128 bits if it is random and in hex."""
RENEWAL_PATIENCE_S: Final = 0.25
"""How long a call waits for a renewal; then it fails, so that a token that is slow to open does not stop the loop."""
QUIET_WAIT_S: Final = 5.0
"""How long a renewal waits for the calls in progress."""
WITNESS: Final = b"keyquorum-witness"
"""What is sealed under the KEK at the start, so that another KEK is noticed later."""
SLOW_US: Final = 300
"""An operation expected to take longer runs beside the loop that serves the quick ones."""

_SILENT_KEK: Final = "the token's KEK does not answer"
_FAILED: Final = "the token failed an operation"
_EDWARDS25519: Final = b"\x13\x0cedwards25519"  # PrintableString, PKCS#11 v3.0, 2.3.10
_SHA256_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, 9.2, note 1
_CURVE_NAMES: Final = {256: "secp256r1", 384: "secp384r1"}
_PSS: Final = (Mechanism.SHA256, MGF.SHA256, 32)
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


class _CkAttribute(ctypes.Structure):
    """CK_ATTRIBUTE (PKCS#11 v2.40, 3.4)."""

    _fields_ = (("type", ctypes.c_ulong), ("value", ctypes.c_void_p), ("length", ctypes.c_ulong))


class _CkMechanism(ctypes.Structure):
    """CK_MECHANISM (PKCS#11 v2.40, 3.5)."""

    _fields_ = (("mechanism", ctypes.c_ulong), ("parameter", ctypes.c_void_p), ("length", ctypes.c_ulong))


class _CkGcmParams(ctypes.Structure):
    """CK_GCM_PARAMS (PKCS#11 v2.40 mechanisms, 2.11.3)."""

    _fields_ = (
        ("iv", ctypes.c_void_p),
        ("iv_bytes", ctypes.c_ulong),
        ("iv_bits", ctypes.c_ulong),
        ("associated_data", ctypes.c_void_p),
        ("associated_bytes", ctypes.c_ulong),
        ("tag_bits", ctypes.c_ulong),
    )


class _CkFunctionList(ctypes.Structure):
    """The beginning of CK_FUNCTION_LIST (PKCS#11 v2.40, 3.6): pointers in the order of the standard's pkcs11f.h."""

    _fields_ = (("version", ctypes.c_ubyte * 2), ("functions", ctypes.c_void_p * 35))


CKF_OS_LOCKING_OK: Final = 2
CKM_AES_GCM: Final = 0x1087
CKR_OK: Final = 0
CKR_CRYPTOKI_NOT_INITIALIZED: Final = 0x190

R = TypeVar("R")
AttributeValue = bool | int | bytes | memoryview


class _ModuleError(Exception):
    """A function of the module did not return CKR_OK."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} returned 0x{code:08x}")
        self.code = code


class _Module:
    """The functions of the PKCS#11 module that secrets go through, on memory that the caller owns and wipes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        unsigned, pointer = ctypes.c_ulong, ctypes.c_void_p
        table = ctypes.POINTER(_CkFunctionList)()
        code = library.C_GetFunctionList(ctypes.byref(table))  # the one function that a module has to export
        if code != CKR_OK:
            raise TokenError(f"C_GetFunctionList returned 0x{code:08x}")
        self._functions = {
            name: ctypes.CFUNCTYPE(unsigned, *arguments)(table.contents.functions[place])
            for name, place, arguments in (
                ("C_CreateObject", 20, (unsigned, pointer, unsigned, pointer)),
                ("C_EncryptInit", 29, (unsigned, pointer, unsigned)),
                ("C_Encrypt", 30, (unsigned, pointer, unsigned, pointer, pointer)),
                ("C_DecryptInit", 33, (unsigned, pointer, unsigned)),
                ("C_Decrypt", 34, (unsigned, ctypes.c_char_p, unsigned, pointer, pointer)),
            )
        }

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)  # without the interpreter's lock
        if code != CKR_OK:
            raise _ModuleError(name, code)

    def create_object(self, session: int, template: Mapping[Attribute, AttributeValue]) -> int:
        """C_CreateObject: the new object's handle. A memoryview (writable) is passed in place, never copied."""
        values = [_c_value(value) for value in template.values()]
        attributes = (_CkAttribute * len(values))(
            *(
                _CkAttribute(kind, ctypes.addressof(value), ctypes.sizeof(value))
                for kind, value in zip(template, values, strict=True)
            )
        )
        handle = ctypes.c_ulong()
        try:
            self._call("C_CreateObject", session, attributes, len(values), ctypes.byref(handle))
        finally:
            values.clear()  # an error's traceback must not keep a view of a secret open
        return handle.value

    def encrypt_gcm(
        self, session: int, key: int, nonce: bytes, associated_data: bytes, plain: SecretBuffer | bytes
    ) -> bytes:
        """AES-GCM by C_EncryptInit and C_Encrypt: the ciphertext and its tag. Locked memory is read where it is.

        In one call, since NSS tells too little room when it is asked for the length first.
        """
        mechanism, kept = _gcm_mechanism(nonce, associated_data)
        room = ctypes.create_string_buffer(len(plain) + TAG_BYTES)
        length = ctypes.c_ulong(len(room))
        self._call("C_EncryptInit", session, ctypes.byref(mechanism), key)
        source = plain if isinstance(plain, bytes) else _c_value(memoryview(plain))
        try:
            place = source if isinstance(source, bytes) else ctypes.addressof(source)
            self._call("C_Encrypt", session, place, len(plain), room, ctypes.byref(length))
        finally:
            del source
        del kept
        return room.raw[: length.value]

    def decrypt_gcm(self, session: int, key: int, nonce: bytes, associated_data: bytes, data: bytes) -> SecretBuffer:
        """AES-GCM by C_DecryptInit and C_Decrypt, into locked memory. ``data`` ends in the tag and has more than it."""
        mechanism, kept = _gcm_mechanism(nonce, associated_data)
        # SoftHSM asks for as much room as there is ciphertext with its tag.
        with SecretBuffer(len(data)) as room:
            length = ctypes.c_ulong(len(data))
            self._call("C_DecryptInit", session, ctypes.byref(mechanism), key)
            sink = _c_value(memoryview(room))
            try:
                self._call("C_Decrypt", session, data, len(data), ctypes.addressof(sink), ctypes.byref(length))
            finally:
                del sink
            del kept
            return SecretBuffer.copy_of(memoryview(room)[: length.value])


def _gcm_mechanism(nonce: bytes, associated_data: bytes) -> tuple[_CkMechanism, object]:
    """CKM_AES_GCM with a tag of 128 bits, and what must live as long as the call that uses it."""
    iv, associated = ctypes.create_string_buffer(nonce), ctypes.create_string_buffer(associated_data)
    parameters = _CkGcmParams(
        ctypes.addressof(iv), len(nonce), len(nonce) * 8, ctypes.addressof(associated), len(associated_data), 128
    )
    mechanism = _CkMechanism(CKM_AES_GCM, ctypes.addressof(parameters), ctypes.sizeof(parameters))
    return mechanism, (iv, associated, parameters)


def _c_value(value: AttributeValue) -> Any:
    """The C object of an attribute's value; that of a memoryview is the view's own memory."""
    if isinstance(value, memoryview):
        return (ctypes.c_char * len(value)).from_buffer(value)
    if isinstance(value, bool):
        return ctypes.c_ubyte(value)
    if isinstance(value, int):
        return ctypes.c_ulong(value)
    return (ctypes.c_char * len(value)).from_buffer_copy(value)


class _Made:
    """Stands in for python-pkcs11's wrapper of a handle that it did not make; see ``_wrapped``."""

    def __init__(self, session: Any, handle: int) -> None:
        self.session = session
        self._handle = handle

    def copy(self, attributes: object) -> int:
        """The handle, where a wrapper gives that of a copy."""
        return self._handle


def _wrapped(session: Any, handle: int) -> Any:
    """python-pkcs11's object of a handle that was made without it.

    It has no function for that, but ``Object.copy`` asks its wrapper for the handle of a copy and makes an object of
    that handle. (Searching for the object would do as well, but SoftHSM then goes through all of them.)
    """
    kind: Any = _pkcs11.Object  # type: ignore[attr-defined] # its stubs leave it out
    finder = kind.__new__(kind)
    finder.wrapper = _Made(session, handle)
    found = finder.copy({})
    if found.handle != handle:
        raise TokenError("python-pkcs11 made an object of another handle than it was given")
    return found


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
    _initialize_again(config, native)
    return library, native


def _initialize_again(config: TokenConfig, native: ctypes.CDLL) -> None:
    """C_Finalize and C_Initialize: every session and session object of the process ends."""
    arguments = _InitializeArgs(flags=CKF_OS_LOCKING_OK)
    for name, argument in (("C_Finalize", None), ("C_Initialize", ctypes.byref(arguments))):
        code = getattr(native, name)(argument)
        if code not in (CKR_OK, CKR_CRYPTOKI_NOT_INITIALIZED if name == "C_Finalize" else CKR_OK):
            raise TokenFault(f"{name} of {config.module} returned 0x{code:08x}", code)


_CODES: Final = {
    "HostMemory": 0x02,
    "SlotIDInvalid": 0x03,
    "GeneralError": 0x05,
    "FunctionFailed": 0x06,
    "DataInvalid": 0x20,
    "DataLenRange": 0x21,
    "DeviceError": 0x30,
    "DeviceMemory": 0x31,
    "DeviceRemoved": 0x32,
    "EncryptedDataInvalid": 0x40,
    "EncryptedDataLenRange": 0x41,
    "KeyHandleInvalid": 0x60,
    "ObjectHandleInvalid": 0x82,
    "OperationActive": 0x90,
    "OperationNotInitialized": 0x91,
    "PinIncorrect": 0xA0,
    "PinInvalid": 0xA1,
    "PinLenRange": 0xA2,
    "PinExpired": 0xA3,
    "PinLocked": 0xA4,
    "SessionClosed": 0xB0,
    "SessionHandleInvalid": 0xB3,
    "TokenNotPresent": 0xE0,
    "TokenNotRecognised": 0xE1,
    "UserNotLoggedIn": 0x101,
    "UserPinNotInitialized": 0x102,
}
"""python-pkcs11's errors, which keep no code, of the codes that ``nodes.health`` knows."""


def code_of(error: PKCS11Error | _ModuleError) -> int:
    """The CKR code of an error; 0 where it can't be told."""
    if isinstance(error, _ModuleError):
        return error.code
    found = _CODES.get(type(error).__name__)
    if found is not None:
        return found
    text = str(error)
    if "not initialized" in text:
        return CKR_CRYPTOKI_NOT_INITIALIZED
    number = re.search(r"0x([0-9a-f]+)", text)
    return int(number[1], 16) if number else 0


def describe(error: BaseException) -> str:
    """A PKCS#11 error as text: python-pkcs11 gives its name alone."""
    text = str(error)
    if isinstance(error, _ModuleError):
        return text
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
    _make_token(library, native, config.label, _new_pin(config))
    sync_tokens(data)


def open_beside_fresh(config: TokenConfig, fresh_pin: PinSource, data: Path) -> tuple[Lane, Lane]:
    """Make a second token of the same label in ``data``, with a KEK and PIN of its own: lanes of the old and the new.

    Both live as long as the process. The fresh PIN comes and goes as in ``initialize_token``.
    """
    fresh = replace(config, pin=fresh_pin)
    _check_pin_place(fresh, data)
    library, native = _load(config, data)
    old, pin = _find(library, config.label), _new_pin(fresh)
    new = _make_token(library, native, config.label, pin)
    sync_tokens(data)
    module = _Module(native)
    try:
        lanes = [Lane(token.open(user_pin=secret), module) for token, secret in ((old, config.pin.read()), (new, pin))]
    except PKCS11Error as error:
        raise TokenError(f"login to the token {config.label!r} failed: {describe(error)}") from None
    return lanes[0], lanes[1]


def _make_token(library: Any, native: ctypes.CDLL, label: str, pin: str) -> Any:
    so_pin = secrets.token_hex(PIN_BYTES)
    slot = _free_slot(library, label)
    known = {token.serial for token in library.get_tokens()}
    native.C_InitToken.argtypes = [ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    code = native.C_InitToken(slot.slot_id, so_pin.encode(), len(so_pin), label.encode().ljust(32))
    if code != 0:
        raise TokenError(f"C_InitToken of {label!r} returned 0x{code:08x}")
    try:
        (token,) = (each for each in library.get_tokens() if each.label == label and each.serial not in known)
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
        raise TokenError(f"the token {label!r} can't be set up: {describe(error)}") from None
    return token


def sync_tokens(data: Path) -> None:
    """Make SoftHSM's token folder durable, and the names that lead to it from above the data folder."""
    for folder, _, files in os.walk(data / "tokens"):
        for name in files:
            _sync_file(Path(folder) / name)
        sync_folder(Path(folder))
    sync_folder(data)
    sync_folder(data.parent)


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


@dataclass(slots=True, eq=False)
class _Guard:
    """Who makes calls of the token's module under it does so alone, and ``since_s`` says since when (0: no call)."""

    watch: CallWatch
    since_s: float = 0.0
    closed: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            patience_s = max(0.0, self.watch.renewal_s + RENEWAL_PATIENCE_S - time.monotonic())
            if not self.lock.acquire(timeout=patience_s):
                raise TokenError("the token is being opened anew")
        if self.closed:
            self.lock.release()
            raise TokenError(self.closed)
        self.since_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since_s = 0.0
        self.lock.release()


class CallWatch:
    """Since when calls of the token are in progress, over all threads: what a supervisor needs to notice a hang."""

    def __init__(self) -> None:
        self._guards: list[_Guard] = []
        self.renewal_s = 0.0
        """When the last renewal began."""

    def guard(self) -> _Guard:
        """A guard whose calls are watched."""
        made = _Guard(self)
        self._guards.append(made)
        return made

    def oldest_s(self) -> float:
        """When the oldest call in progress began (monotonic); 0 if there is none. From any thread."""
        return min((since_s for each in self._guards if (since_s := each.since_s)), default=0.0)


@dataclass(slots=True)
class LoadedKey:
    """A key as session objects of one lane; non-extractable. Use it from the lane's thread alone."""

    algorithm: Algorithm
    private: Any
    lane: Lane
    generation: int
    public: Any = None

    @property
    def lives(self) -> bool:
        """Whether the token was not renewed since it was loaded."""
        return self.generation == self.lane.generation

    def destroy(self) -> None:
        """Remove the objects from the token. One that is already gone is what was wanted."""
        self.lane.destroy(self)


def _no_report(fault: TokenFault, generation: int) -> None:
    """Where nobody looks after the token's health."""


class Lane:
    """One session of the token, for one thread.

    Every call is made under the lane's guard. What fails in a way that says something about the token is also handed
    to ``report``, with the generation in which it failed.
    """

    def __init__(self, session: Any, module: _Module, guard: _Guard | None = None, generation: int = 1) -> None:
        self._module = module
        self._guard = guard or CallWatch().guard()
        self.report: Callable[[TokenFault, int], None] = _no_report
        self.made = 0
        """Objects that were made in this lane; SoftHSM keeps some memory of each until the token is renewed."""
        self.take(session, generation)

    def take(self, session: Any, generation: int) -> None:
        """Go on with another session. By who has the guard, or before there is a second thread."""
        self._session = session
        self.generation = generation
        self._kek = _one_kek(session)

    def _fault(self, what: str, error: PKCS11Error | _ModuleError) -> TokenFault:
        """The error to raise, after it was reported."""
        fault = TokenFault(f"{what}: {describe(error)}", code_of(error))
        if fault.kind is not Kind.OTHER:
            self.report(fault, self.generation)
        return fault

    def _check(self, key: LoadedKey) -> None:
        """Under the guard: a handle of before the renewal may be another key's by now."""
        if key.lane is not self or key.generation != self.generation:
            raise NeedGrant("the key left the token, which was opened anew; a grant is needed to gather it again")

    # --- the KEK ---

    def seal(self, plaintext: bytes, associated_data: bytes) -> bytes:
        """AES-256-GCM under the KEK (NIST SP 800-38D): a random 96-bit nonce, the ciphertext and its 16-byte tag."""
        nonce = os.urandom(NONCE_BYTES)
        with self._guard:
            try:
                return nonce + self._encrypted(self._kek, plaintext, nonce, associated_data)
            except (PKCS11Error, _ModuleError) as error:
                raise self._fault(_SILENT_KEK, error) from None

    def unseal(self, sealed: bytes, associated_data: bytes) -> bytes:
        """What was sealed; ``InvalidTag`` if blob or associated data changed, ``TokenError`` if the token failed."""
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        if len(rest) < TAG_BYTES:
            raise InvalidTag(f"a sealed blob of {len(sealed)} bytes is too short")
        return self._opened(lambda: self._gcm(self._kek.decrypt, rest, nonce, associated_data))

    def unseal_secret(self, sealed: bytes, associated_data: bytes) -> SecretBuffer:
        """As ``unseal``, into locked memory, which the caller closes. What is sealed has one byte at least."""
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        if len(rest) <= TAG_BYTES:
            raise InvalidTag(f"a sealed blob of {len(sealed)} bytes is too short")
        return self._opened(
            lambda: self._module.decrypt_gcm(self._session.handle, self._kek.handle, nonce, associated_data, rest)
        )

    def _opened(self, decrypt: Callable[[], R]) -> R:
        """What was sealed under the KEK."""
        with self._guard:
            return self._decrypted(
                decrypt, self._canary, _SILENT_KEK, "a sealed blob does not open under this token's KEK"
            )

    def _decrypted(self, decrypt: Callable[[], R], canary: Callable[[], None], sick: str, wrong: str) -> R:
        """The plaintext. A wrong tag looks like a token's fault (SoftHSM says CKR_GENERAL_ERROR), and the other way.

        So where the code is unclear, the same key has to open something that it sealed itself, and then the ciphertext
        gets a second try: only what fails beside a key that works is a wrong ciphertext.
        """
        for last in (False, True):
            try:
                return decrypt()
            except (PKCS11Error, _ModuleError) as error:
                if classify(code_of(error)) is not Kind.UNCLEAR:
                    raise self._fault(sick, error) from None
            if not last:
                canary()
        raise InvalidTag(wrong)

    def reseal(self, sealed: bytes, associated_data: bytes, new: Lane) -> bytes:
        """What this lane's KEK sealed, sealed by that of ``new``; in between it is in locked memory alone."""
        nonce = os.urandom(NONCE_BYTES)
        with self.unseal_secret(sealed, associated_data) as plain, new._guard:
            try:
                return nonce + new._module.encrypt_gcm(
                    new._session.handle, new._kek.handle, nonce, associated_data, plain
                )
            except _ModuleError as error:
                raise TokenError(f"the fresh token's KEK does not answer: {error}") from None

    def check_kek(self) -> None:
        """Seal and unseal a canary; ``TokenError`` if that fails."""
        with self._guard:
            self._canary()

    def _canary(self) -> None:
        try:
            if not self._comes_back(self._kek):
                raise TokenFault("the KEK's canary came back changed")
        except (PKCS11Error, _ModuleError) as error:
            raise self._fault(_SILENT_KEK, error) from None

    def _comes_back(self, key: Any) -> bool:
        """Whether an AES key opens a canary that it encrypts."""
        canary, nonce = os.urandom(16), os.urandom(NONCE_BYTES)
        blob = self._encrypted(key, canary, nonce, b"canary")
        return self._gcm(key.decrypt, blob, nonce, b"canary") == canary

    def _encrypted(self, key: Any, data: bytes, nonce: bytes, associated_data: bytes) -> bytes:
        return self._module.encrypt_gcm(self._session.handle, key.handle, nonce, associated_data, data)

    @staticmethod
    def _gcm(call: Callable[..., bytes], data: bytes, nonce: bytes, associated_data: bytes) -> bytes:
        return call(data, mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(nonce, associated_data, 128))

    def random(self, length: int) -> bytes:
        """``length`` bytes from the token's generator (C_GenerateRandom)."""
        with self._guard:
            try:
                return bytes(self._session.generate_random(length * 8))
            except PKCS11Error as error:
                raise self._fault("the token's random generator failed", error) from None

    # --- loaded keys ---

    def load(
        self, algo: Algorithm, material: bytes | bytearray | memoryview | SecretBuffer, public_key: bytes = b""
    ) -> LoadedKey:
        """Put canonical key material (``engine.keys``) into the token by C_CreateObject, as session objects.

        The token reads it from where it is, if it is writable; ``bytes`` are copied into locked memory first. No part
        of it becomes an object of Python. ``public_key`` is the SubjectPublicKeyInfo that belongs to it; without one,
        that of an EC or Ed25519 key is worked out by pyca/cryptography, which does leave copies behind.

        ``TokenError`` if the token refuses it or it is none of this algorithm (SoftHSM takes AES keys of any length).
        """
        try:
            _check_length(algo, len(material))
            if isinstance(material, bytes):
                with SecretBuffer.copy_of(material) as copied, self._guard:
                    return self._load(algo, memoryview(copied), public_key)
            with memoryview(material) as view, self._guard:
                return self._load(algo, view, public_key)
        except (PKCS11Error, _ModuleError) as error:
            raise self._fault(f"the token refused a key of {algo.name}", error) from None
        except ValueError as error:
            raise TokenError(f"what was combined is no key of {algo.name}: {error}") from None

    def _load(self, algo: Algorithm, material: memoryview, public_key: bytes) -> LoadedKey:
        if algo.kind is KeyKind.AES:
            return self._secret(algo, KeyType.AES, material, (Attribute.ENCRYPT, Attribute.DECRYPT))
        if algo.kind is KeyKind.HMAC:
            # Zero padding to the block changes no MAC (RFC 2104, 2) and satisfies tokens that refuse short keys.
            with SecretBuffer(max(len(material), _HMAC_BLOCK[algo.hash_name])) as padded:
                padded.add(material)
                view = memoryview(padded)
                return self._secret(algo, KeyType.GENERIC_SECRET, view, (Attribute.SIGN, Attribute.VERIFY))
        if algo.kind is KeyKind.RSA:
            return self._pair(algo, *_rsa_attributes(material, algo.bits))
        return self._pair(algo, *_curve_attributes(algo, material, public_key or public_key_der(algo, bytes(material))))

    def try_rsa(self, algo: Algorithm, material: bytearray) -> LoadedKey:
        """As ``load``, with a throw-away RSA key of PROBE_RSA_BITS."""
        try:
            with self._guard:
                return self._pair(algo, *_rsa_attributes(memoryview(material), PROBE_RSA_BITS))
        except (PKCS11Error, _ModuleError) as error:
            raise self._fault(f"the token refused a key of {algo.name}", error) from None

    def destroy(self, key: LoadedKey) -> None:
        """Remove a key's objects; see ``LoadedKey.destroy``."""
        try:
            with self._guard:
                if key.generation == self.generation:
                    self._destroy(key)
        except TokenError:
            return  # the token is not open, or is being opened anew: the objects end with its sessions

    @staticmethod
    def _destroy(key: LoadedKey) -> None:
        for each in (key.private, key.public):
            if each is not None:
                try:
                    each.destroy()
                except PKCS11Error:
                    continue

    def _create(self, template: Mapping[Attribute, AttributeValue]) -> Any:
        self.made += 1
        return _wrapped(self._session, self._module.create_object(self._session.handle, template))

    def _secret(self, algo: Algorithm, kind: KeyType, value: memoryview, usage: Sequence[Attribute]) -> LoadedKey:
        return LoadedKey(
            algo,
            self._create(
                {
                    Attribute.CLASS: ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: kind,
                    Attribute.VALUE: value,
                    **_SESSION_SECRET,
                    **_NO_SECRET_USE,
                    **dict.fromkeys(usage, True),
                }
            ),
            self,
            self.generation,
        )

    def _pair(self, algo: Algorithm, kind: KeyType, secret: Parts, public: Parts) -> LoadedKey:
        encrypts = RequestType.ENCRYPT in algo.operations
        made = LoadedKey(
            algo,
            self._create(
                {
                    Attribute.CLASS: ObjectClass.PRIVATE_KEY,
                    Attribute.KEY_TYPE: kind,
                    **secret,
                    **_SESSION_SECRET,
                    **_NO_PRIVATE_USE,
                    (Attribute.DECRYPT if encrypts else Attribute.SIGN): True,
                }
            ),
            self,
            self.generation,
        )
        try:
            made.public = self._create(
                {
                    Attribute.CLASS: ObjectClass.PUBLIC_KEY,
                    Attribute.KEY_TYPE: kind,
                    **public,
                    Attribute.TOKEN: False,
                    **_NO_PUBLIC_USE,
                    (Attribute.ENCRYPT if encrypts else Attribute.VERIFY): True,
                }
            )
        except (PKCS11Error, _ModuleError):
            self._destroy(made)
            raise
        return made

    # --- operations ---

    def encrypt(self, key: LoadedKey, plaintext: bytes, associated_data: bytes) -> bytes:
        """AES-GCM: nonce || ciphertext || tag; RSA-OAEP (no associated data): the ciphertext."""
        if key.algorithm.kind is KeyKind.RSA:
            return self._run(key, key.public, plaintext, mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=_OAEP)
        nonce = os.urandom(NONCE_BYTES)
        with self._guard:
            self._check(key)
            try:
                return nonce + self._encrypted(key.private, plaintext, nonce, associated_data)
            except _ModuleError as error:
                raise self._fault(_FAILED, error) from None

    def decrypt(self, key: LoadedKey, ciphertext: bytes, associated_data: bytes) -> bytes:
        """The plaintext; ``InvalidTag`` if anything was changed."""
        is_rsa = key.algorithm.kind is KeyKind.RSA
        if not is_rsa and len(ciphertext) < NONCE_BYTES + TAG_BYTES:
            raise InvalidTag(f"a ciphertext of {len(ciphertext)} bytes is too short")

        def decrypt() -> bytes:
            if is_rsa:
                return bytes(key.private.decrypt(ciphertext, mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=_OAEP))
            nonce, rest = ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:]
            return bytes(self._gcm(key.private.decrypt, rest, nonce, associated_data))

        with self._guard:
            self._check(key)
            wrong = "the ciphertext, its associated data or its key does not fit"
            return self._decrypted(decrypt, lambda: self._key_canary(key), _FAILED, wrong)

    def _key_canary(self, key: LoadedKey) -> None:
        """Whether a loaded key opens what it encrypts itself."""
        try:
            if key.algorithm.kind is KeyKind.RSA:
                options = {"mechanism": Mechanism.RSA_PKCS_OAEP, "mechanism_param": _OAEP}
                good = key.private.decrypt(key.public.encrypt(b"canary", **options), **options) == b"canary"
            else:
                good = self._comes_back(key.private)
        except (PKCS11Error, _ModuleError) as error:
            raise self._fault(_FAILED, error) from None
        if not good:
            raise TokenFault("a loaded key's canary came back changed")

    def sign(self, key: LoadedKey, data: bytes) -> bytes:
        """Sign a digest (or, for Ed25519, a message); ECDSA signatures come as DER (RFC 3279, 2.2.3)."""
        mechanism, parameters, prepared = _signing(key.algorithm, data)
        raw = self._run(key, key.private, prepared, mechanism=mechanism, mechanism_param=parameters)
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
        self._verify(key, key.public, prepared, raw, mechanism=mechanism, mechanism_param=parameters)

    def mac(self, key: LoadedKey, data: bytes) -> bytes:
        """HMAC (RFC 2104) of the data."""
        return self._run(key, key.private, data, mechanism=_HMAC[key.algorithm.hash_name])

    def verify_mac(self, key: LoadedKey, data: bytes, tag: bytes) -> None:
        """``InvalidSignature`` unless the full-length tag belongs to the data."""
        self._verify(key, key.private, data, tag, mechanism=_HMAC[key.algorithm.hash_name])

    def _run(self, key: LoadedKey, part: Any, data: bytes, **options: Any) -> bytes:
        """Encrypt where the algorithm does, else sign."""
        with self._guard:
            self._check(key)
            try:
                call = part.encrypt if RequestType.ENCRYPT in key.algorithm.operations else part.sign
                return bytes(call(data, **options))
            except PKCS11Error as error:
                raise self._fault(_FAILED, error) from None

    def _verify(self, key: LoadedKey, part: Any, data: bytes, signature: bytes, **options: Any) -> None:
        with self._guard:
            self._check(key)
            try:
                good = bool(signature) and part.verify(data, signature, **options)
            except PKCS11Error as error:
                raise self._fault("the token failed a verification", error) from None
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


Parts = dict[Attribute, AttributeValue]


def _check_length(algo: Algorithm, length: int) -> None:
    needed = algo.bits // 8
    if algo.kind is KeyKind.RSA or (algo.kind is KeyKind.HMAC and length):
        return
    if length != needed:
        raise ValueError(f"{length} bytes, {needed} are needed")


def _curve_attributes(algo: Algorithm, material: memoryview, public_key: bytes) -> tuple[KeyType, Parts, Parts]:
    """Key type, secret and public attributes of an EC or Edwards key (PKCS#11 v2.40 mechanisms, 2.3.4)."""
    try:
        public = serialization.load_der_public_key(public_key)
    except PycaUnsupported:
        raise ValueError("its public key is of an unknown kind") from None
    if algo.kind is KeyKind.ED25519:
        if not isinstance(public, ed25519.Ed25519PublicKey):
            raise ValueError("its public key is none of Ed25519")
        kind, parameters, point = KeyType.EC_EDWARDS, _EDWARDS25519, public.public_bytes_raw()
    else:
        curve = _CURVE_NAMES[algo.bits]
        if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != curve:
            raise ValueError(f"its public key is none on {curve}")
        kind, parameters = KeyType.EC, encode_named_curve_parameters(curve)
        point = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    octets = b"\x04" + bytes([len(point)]) + point  # CKA_EC_POINT is a DER OCTET STRING; all are shorter than 128 bytes
    common: Parts = {Attribute.EC_PARAMS: parameters}
    return kind, {**common, Attribute.VALUE: material}, {**common, Attribute.EC_POINT: octets}


_RSA_PARTS: Final = (
    Attribute.MODULUS,
    Attribute.PUBLIC_EXPONENT,
    Attribute.PRIVATE_EXPONENT,
    Attribute.PRIME_1,
    Attribute.PRIME_2,
    Attribute.EXPONENT_1,
    Attribute.EXPONENT_2,
    Attribute.COEFFICIENT,
)
"""The order of the integers in an RSAPrivateKey, after its version."""


def _rsa_attributes(material: memoryview, bits: int) -> tuple[KeyType, Parts, Parts]:
    """Key type, secret and public attributes of a DER RSAPrivateKey (RFC 8017, A.1.2), as views of it.

    The primes were tested when the key was made or imported, and its hash is checked whenever it is combined.
    """
    body, rest = _der_value(material, 0x30)
    numbers: list[memoryview] = []
    while body and len(numbers) <= len(_RSA_PARTS):
        number, body = _der_value(body, 0x02)
        numbers.append(number[1:] if len(number) > 1 and number[0] == 0 else number)  # the sign's octet is no part
    if body or rest or len(numbers) != 1 + len(_RSA_PARTS) or bytes(numbers[0]) != b"\0" or not all(map(len, numbers)):
        raise ValueError("it is no DER RSAPrivateKey of two primes")
    secret: Parts = dict(zip(_RSA_PARTS, numbers[1:], strict=True))
    if len(numbers[1]) * 8 != bits or not numbers[1][0] & 0x80:
        raise ValueError(f"its modulus has not {bits} bits")
    return KeyType.RSA, secret, {kind: secret[kind] for kind in _RSA_PARTS[:2]}


def _der_value(data: memoryview, tag: int) -> tuple[memoryview, memoryview]:
    """The value of the first DER element (X.690, 8.1), which has this tag, and what follows it, as views."""
    length_bytes = data[1] & 0x7F if len(data) > 1 and data[1] & 0x80 else 0
    if len(data) < 2 + length_bytes or data[0] != tag or length_bytes > 2:
        raise ValueError("it is no DER RSAPrivateKey")
    length = int.from_bytes(data[2 : 2 + length_bytes], "big") if length_bytes else data[1]
    value = data[2 + length_bytes :]
    if length > len(value):
        raise ValueError("it is no DER RSAPrivateKey")
    return value[:length], value[length:]


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


class TokenBusy(TokenError):
    """A call of the token goes on, so it can't be renewed now."""


class Token:
    """The opened token. ``algorithms`` are those it can serve; ``missing`` says what it lacks for the others.

    With ``probe`` off nothing is tried and all algorithms count as served. Of a fault that says something about the
    token, ``report`` is told, by the thread that met it.
    """

    def __init__(self, config: TokenConfig, data: Path, watch: CallWatch | None = None, *, probe: bool = True) -> None:
        self._config = config
        self._data = data
        self.watch = watch or CallWatch()
        self.report: Callable[[TokenFault, int], None] = _no_report
        self.generation = 1
        self._lanes: list[Lane] = []
        self._guards: list[_Guard] = []
        self._renewing = self.watch.guard()
        with self._renewing:
            library, self._native = _load(config, data)
            self._library = library
            self._module = _Module(self._native)
            self._open()
        self.description = f"{library.manufacturer_id} {library.library_description}, token {config.label}".strip()
        with self._renewing:
            prober = Lane(self._login, self._module, self.watch.guard())
        self._witness = prober.seal(WITNESS, WITNESS)
        self.missing = self._probe(prober) if probe else {}
        self.algorithms = tuple(name for name in ALGORITHMS if name not in self.missing)

    def _open(self) -> None:
        """Find the token and log in. The PIN is read anew each time, and not kept."""
        self._token = _find(self._library, self._config.label)
        pin = self._config.pin.read()
        try:
            self._login = self._token.open(user_pin=pin)
        except PKCS11Error as error:
            raise TokenFault(
                f"login to the token {self._config.label!r} failed: {describe(error)}", code_of(error)
            ) from None
        finally:
            del pin

    def lane(self) -> Lane:
        """A new session for the calling thread; the login of the process covers it."""
        with self._renewing:
            guard = self.watch.guard()
            try:
                made = Lane(self._token.open(), self._module, guard, self.generation)
            except PKCS11Error as error:
                raise TokenError(f"the token gives no further session: {describe(error)}") from None
            made.report = self._tell
            self._lanes.append(made)
            self._guards.append(guard)
            return made

    def _tell(self, fault: TokenFault, generation: int) -> None:
        if generation == self.generation:  # else it was renewed since
            self.report(fault, generation)

    @property
    def made(self) -> int:
        """Objects that were made in it since the start."""
        return sum(each.made for each in self._lanes)

    @property
    def witness(self) -> bytes:
        """What this token's KEK sealed when the process began; see ``check_witness``."""
        return self._witness

    def check_witness(self, witness: bytes) -> None:
        """``TokenFault`` unless this token has the KEK that sealed it."""
        self._compare(Lane(self._login, self._module), witness)

    @staticmethod
    def _compare(lane: Lane, witness: bytes) -> None:
        try:
            if lane.unseal(witness, WITNESS) == WITNESS:
                return
        except InvalidTag:
            pass
        raise TokenFault("the token has another KEK than this node began with")

    def renew(self) -> None:
        """Open the token anew, while no lane makes a call: ``TokenError`` says what failed, and nothing works then.

        Every loaded key is gone after it. ``TokenBusy``: some call does not end, and nothing was begun.
        """
        with self._renewing, self._all_quiet():
            self.generation += 1
            for guard in self._guards:
                guard.closed = "the token could not be opened anew"
            try:
                _softhsm_environment(self._config, self._data)
                _initialize_again(self._config, self._native)
                self._open()
                self._compare(Lane(self._login, self._module), self._witness)
                for lane in self._lanes:
                    lane.take(self._token.open(), self.generation)
            except PKCS11Error as error:
                raise TokenFault(f"the token can't be opened anew: {describe(error)}", code_of(error)) from None
            for guard in self._guards:
                guard.closed = ""

    @contextmanager
    def _all_quiet(self) -> Iterator[None]:
        """Have every lane's guard, so that no call is in progress and none begins."""
        held: list[_Guard] = []
        self.watch.renewal_s = time.monotonic()
        end_s = self.watch.renewal_s + QUIET_WAIT_S
        try:
            for guard in self._guards:
                if not guard.lock.acquire(timeout=max(0.0, end_s - time.monotonic())):
                    raise TokenBusy(f"a call of the token has not ended within {QUIET_WAIT_S:g} s")
                held.append(guard)
            yield
        finally:
            for guard in held:
                guard.lock.release()

    def _probe(self, lane: Lane) -> Mapping[str, str]:
        """Algorithm -> what the token lacks for it, found by doing, with throw-away keys."""
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
    if algo.kind is KeyKind.RSA:
        private = rsa.generate_private_key(public_exponent=65537, key_size=PROBE_RSA_BITS)
        der = private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        key = lane.try_rsa(algo, bytearray(der))
    else:
        key = lane.load(algo, generate_material(algo))
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
