"""The PKCS#11 token: its one KEK, loaded keys as session objects, and the operations on them.

Nothing else in the node touches PKCS#11. It knows no policy, no store and no socket. A ``Lane`` is one session used by
one thread; objects belong to the lane that made them. The session that logged in stays open until the token is renewed:
closing it would log the whole process out (PKCS#11 v2.40, 5.6).

Renewing (``Token.renew``) finalises and initialises the module in place, while no lane makes a call, and opens each
lane's session again. It brings a lost session or login back, and the memory that SoftHSM keeps of each object that was
ever made. Loaded keys end with it: handles are given out again, so each key knows the generation that it belongs to.

python-pkcs11 keeps slots, tokens, sessions and login. Keys and data go through ``nodes._fasttoken``, which calls the
same module's functions on memory that can be wiped: python-pkcs11 takes and gives ``bytes``, and copies them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import pkcs11
from cryptography.exceptions import UnsupportedAlgorithm as PycaUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.exceptions import PKCS11Error

from engine.client.config import sync_file, sync_folder, write_private
from engine.errors import ConfigError, EngineError, InvalidTag, NeedGrant, TokenError
from engine.keys import ALGORITHMS, Algorithm, KeyKind, RequestType, generate_material, public_key_der
from engine.sharing import SecretBuffer
from nodes._fasttoken import CallError, Guard, Key, Module, Session, Use
from nodes.config import PinSource, TokenConfig
from nodes.health import Kind, TokenFault, classify
from nodes.tokenfile import keep_token_files, restore_token_files

__all__ = [
    "CallWatch",
    "Lane",
    "LoadedKey",
    "Token",
    "TokenBusy",
    "Use",
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
TURN_WAIT_S: Final = 2.0
"""How long opening the token waits for other processes that open it. Then it goes on: one of them may be stopped."""
TURN_LOOK_S: Final = 0.005
"""How often it looks meanwhile: a lock of a file can't be waited for with a limit."""
QUIET_WAIT_S: Final = 5.0
"""How long a renewal waits for the calls in progress."""
WITNESS: Final = b"keyquorum-witness"
"""What is sealed under the KEK at the start, so that another KEK is noticed later."""
SLOW_US: Final = 300
"""An operation expected to take longer runs beside the loop that serves the quick ones."""

_SILENT_KEK: Final = "the token's KEK does not answer"
_FAILED: Final = "the token failed an operation"
_CURVE_NAMES: Final = {256: "secp256r1", 384: "secp384r1"}
PUBLIC_KEYS_MAX: Final = 1024
"""Public keys of which it is remembered that they are points of their curve."""
CKR_CRYPTOKI_NOT_INITIALIZED: Final = 0x190

R = TypeVar("R")


def is_slow(algo: Algorithm) -> bool:
    """Whether the algorithm's operations belong beside the quick loop."""
    return algo.prior_us > SLOW_US


@contextmanager
def _in_turn(config: TokenConfig, data: Path) -> Iterator[None]:
    """Begin SoftHSM and log in while no other process does with the same token folder.

    At each login SoftHSM 2.6.1 empties the token's file, unlocks it and only then writes it again. Who begins or logs
    in meanwhile finds no token, or a CKR_GENERAL_ERROR. What is open already is not disturbed. What a killed login left
    empty is put back.
    """
    if not config.is_softhsm:
        yield
        return
    home = config.shared_with or data
    if config.shared_with is None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not (home / "tokens").is_dir():
        raise TokenError(f"{home} holds no token to share; has `python -m nodes init` run for the node that owns it?")
    try:
        descriptor = os.open(home / "tokens.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TokenError(f"{home}: {error.strerror}") from None
    try:
        end_s = time.monotonic() + TURN_WAIT_S
        while not _flock(descriptor) and time.monotonic() < end_s:
            time.sleep(TURN_LOOK_S)
        restore_token_files(home)
        yield
        keep_token_files(home)  # nobody but who got in knows that they are whole
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _softhsm_environment(config: TokenConfig, data: Path) -> None:
    """Point SoftHSM at the node's token folder, or its owner's; must happen before the module is loaded."""
    if not config.is_softhsm:
        return
    tokens = (config.shared_with or data) / "tokens"
    if config.shared_with is None:
        tokens.mkdir(mode=0o700, parents=True, exist_ok=True)
    conf = data / "softhsm2.conf"
    text = f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
    if not conf.exists() or conf.read_text(encoding="utf-8") != text:
        write_private(conf, text.encode())
    os.environ["SOFTHSM2_CONF"] = str(conf)


def _load(config: TokenConfig, data: Path) -> tuple[Any, Module]:
    """The module, initialised for several threads: python-pkcs11's library of it, and its functions.

    python-pkcs11 calls C_Initialize(NULL), after which two threads crash SoftHSM; so it is finalised and initialised
    again with CKF_OS_LOCKING_OK before any session is opened.
    """
    _softhsm_environment(config, data)
    try:
        library = pkcs11.lib(str(config.module))
        module = Module(str(config.module))
    except (PKCS11Error, OSError, RuntimeError, CallError) as error:
        raise TokenError(f"the PKCS#11 module {config.module} can't be loaded: {describe(error)}") from None
    _initialize_again(config, module)
    return library, module


def _initialize_again(config: TokenConfig, module: Module) -> None:
    """C_Finalize and C_Initialize: every session and session object of the process ends."""
    try:
        try:
            module.finalize()
        except CallError as error:
            if error.code != CKR_CRYPTOKI_NOT_INITIALIZED:
                raise
        module.initialize()
    except CallError as error:
        raise TokenFault(f"{config.module}: {error}", error.code) from None


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


def code_of(error: PKCS11Error | CallError) -> int:
    """The CKR code of an error; 0 where it can't be told."""
    if isinstance(error, CallError):
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
    if isinstance(error, CallError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def initialize_token(config: TokenConfig, data: Path) -> None:
    """Make the token, its random PIN and the KEK, durably.

    The PIN goes to the configured file, which must not exist yet and must lie outside ``data`` (an ``env:`` source must
    already hold one of at least 32 characters). The KEK is an AES-256 key that encrypts and decrypts only, sensitive
    and never extractable.
    SoftHSM never syncs its files, so they are synced here. A token that is another node's is not made.
    """
    if config.shared_with is not None:
        raise ConfigError(f"the token {config.label!r} is that of the node with the data folder {config.shared_with}")
    _check_pin_place(config, data)
    with _in_turn(config, data):
        library, module = _load(config, data)
        if any(token.label == config.label for token in library.get_tokens()):
            raise TokenError(f"a token {config.label!r} exists already in {data}")
        _make_token(library, module, config.label, _new_pin(config))
        module.finalize()  # so that this process can make another token, with another module too
    sync_tokens(data)


def open_beside_fresh(config: TokenConfig, fresh_pin: PinSource, data: Path) -> tuple[Lane, Lane]:
    """Make a second token of the same label in ``data``, with a KEK and PIN of its own: lanes of the old and the new.

    Both live as long as the process. The fresh PIN comes and goes as in ``initialize_token``.
    """
    fresh = replace(config, pin=fresh_pin)
    _check_pin_place(fresh, data)
    library, module = _load(config, data)
    old, pin = _find(library, config.label), _new_pin(fresh)
    new = _make_token(library, module, config.label, pin)
    sync_tokens(data)
    try:
        lanes = [Lane(token.open(user_pin=secret), module) for token, secret in ((old, config.pin.read()), (new, pin))]
    except PKCS11Error as error:
        raise TokenError(f"login to the token {config.label!r} failed: {describe(error)}") from None
    return lanes[0], lanes[1]


def _make_token(library: Any, module: Module, label: str, pin: str) -> Any:
    so_pin = secrets.token_hex(PIN_BYTES)
    slot = _free_slot(library, label)
    known = {token.serial for token in library.get_tokens()}
    try:
        module.init_token(slot.slot_id, so_pin, label)
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
    except (PKCS11Error, CallError) as error:
        raise TokenError(f"the token {label!r} can't be set up: {describe(error)}") from None
    return token


def sync_tokens(data: Path) -> None:
    """Make SoftHSM's token folder durable, and the names that lead to it from above the data folder."""
    for folder, _, files in os.walk(data / "tokens"):
        for name in files:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))
    sync_folder(data)
    sync_folder(data.parent)


def _check_pin_place(config: TokenConfig, data: Path) -> None:
    if config.pin.kind != "file":
        if len(config.pin.read()) < PIN_CHARACTERS_MIN:
            raise ConfigError(f"{config.pin}: a new token's PIN needs at least {PIN_CHARACTERS_MIN} characters")
        return
    path = Path(config.pin.place)
    if path.is_relative_to(data):
        raise ConfigError(f"the PIN file {path} lies in the data folder {data}; keep it elsewhere")
    if path.exists():
        raise ConfigError(f"the PIN file {path} exists already; it is never overwritten")


def _new_pin(config: TokenConfig) -> str:
    if config.pin.kind != "file":
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


class CallWatch:
    """Since when calls of the token are in progress, over all threads: what a supervisor needs to notice a hang."""

    def __init__(self) -> None:
        self._guards: list[Guard] = []
        self.renewal_s = 0.0
        """When the last renewal began."""

    def guard(self) -> Guard:
        """A guard whose calls are watched."""
        made = Guard(self)
        self._guards.append(made)
        return made

    def patience_s(self) -> float:
        """How long a call may wait for others of its lane, that is for a renewal."""
        return max(0.0, self.renewal_s + RENEWAL_PATIENCE_S - time.monotonic())

    def oldest_s(self) -> float:
        """When the oldest call in progress began (monotonic); 0 if there is none. From any thread."""
        return min((since_s for each in self._guards if (since_s := each.since_s)), default=0.0)


@dataclass(slots=True)
class LoadedKey:
    """A key as session objects of one lane; non-extractable. Use it from the lane's thread alone."""

    algorithm: Algorithm
    handles: Key
    lane: Lane
    generation: int

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

    def __init__(self, session: Any, module: Module, guard: Guard | None = None, generation: int = 1) -> None:
        self._module = module
        self._guard = guard or CallWatch().guard()
        self.report: Callable[[TokenFault, int], None] = _no_report
        self._made = 0
        self._begin(session, generation)

    def take(self, session: Any, generation: int) -> None:
        """Go on with another session. By who has the guard."""
        self._made += self._fast.made
        self._begin(session, generation)

    def _begin(self, session: Any, generation: int) -> None:
        self._session = session  # python-pkcs11 closes what nobody has
        self._fast = Session(self._module, session.handle)
        self._kek = self._fast.adopt("aes-256-gcm", _one_kek(session).handle)
        self.generation = generation

    @property
    def made(self) -> int:
        """Objects that were made in this lane; SoftHSM keeps some memory of each until the token is renewed."""
        return self._made + self._fast.made

    def _fault(self, what: str, error: CallError) -> TokenFault:
        """The error to raise, after it was reported."""
        fault = TokenFault(f"{what}: {describe(error)}", code_of(error))
        if fault.kind is not Kind.OTHER:
            self.report(fault, self.generation)
        return fault

    # --- the KEK ---

    def seal(self, plaintext: bytes, associated_data: bytes) -> bytes:
        """AES-256-GCM under the KEK (NIST SP 800-38D): a random 96-bit nonce, the ciphertext and its 16-byte tag."""
        with self._guard:
            try:
                return self._fast.encrypt(self._kek, plaintext, associated_data)
            except CallError as error:
                raise self._fault(_SILENT_KEK, error) from None

    def unseal(self, sealed: bytes, associated_data: bytes) -> bytes:
        """What was sealed; ``InvalidTag`` if blob or associated data changed, ``TokenError`` if the token failed."""
        return self._opened(lambda: self._fast.decrypt(self._kek, sealed, associated_data))

    def unseal_secret(self, sealed: bytes, associated_data: bytes) -> SecretBuffer:
        """As ``unseal``, into locked memory, which the caller closes. What is sealed has one byte at least."""
        if len(sealed) <= NONCE_BYTES + TAG_BYTES:
            raise InvalidTag(f"a sealed blob of {len(sealed)} bytes is too short")
        # Room for ciphertext and tag, which is what SoftHSM asks for, so that nothing is put down elsewhere.
        with SecretBuffer(len(sealed) - NONCE_BYTES) as room:
            length = self._opened(lambda: self._fast.decrypt_into(self._kek, sealed, associated_data, b"", room))
            with memoryview(room)[:length] as plain:
                return SecretBuffer.copy_of(plain)

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
            except CallError as error:
                if classify(error.code) is not Kind.UNCLEAR:
                    raise self._fault(sick, error) from None
            if not last:
                canary()
        raise InvalidTag(wrong)

    def reseal(self, sealed: bytes, associated_data: bytes, new: Lane) -> bytes:
        """What this lane's KEK sealed, sealed by that of ``new``; in between it is in locked memory alone."""
        with self.unseal_secret(sealed, associated_data) as plain, new._guard:
            try:
                return new._fast.encrypt(new._kek, plain, associated_data)
            except CallError as error:
                raise TokenError(f"the fresh token's KEK does not answer: {error}") from None

    def check_kek(self) -> None:
        """Seal and unseal a canary; ``TokenError`` if that fails."""
        with self._guard:
            self._canary()

    def _canary(self) -> None:
        self._comes_back(self._kek, _SILENT_KEK, "the KEK")

    def _comes_back(self, key: Key, sick: str, what: str) -> None:
        """``TokenFault`` unless a key opens a canary that it encrypts."""
        canary = os.urandom(16)
        try:
            good = self._fast.decrypt(key, self._fast.encrypt(key, canary)) == canary
        except CallError as error:
            raise self._fault(sick, error) from None
        if not good:
            raise TokenFault(f"{what}'s canary came back changed")

    def random(self, length: int) -> bytes:
        """``length`` bytes from the token's generator (C_GenerateRandom)."""
        with self._guard:
            try:
                return self._fast.random(length)
            except CallError as error:
                raise self._fault("the token's random generator failed", error) from None

    # --- loaded keys ---

    def load(
        self, algo: Algorithm, material: bytes | bytearray | memoryview | SecretBuffer, public_key: bytes = b""
    ) -> LoadedKey:
        """Put canonical key material (``engine.keys``) into the token by C_CreateObject, as session objects.

        The token reads it from where it is. No part of it becomes an object of Python. ``public_key`` is the
        SubjectPublicKeyInfo that belongs to it; without one, that of an EC or Ed25519 key is worked out by
        pyca/cryptography, which does leave copies behind.

        ``TokenError`` if the token refuses it or it is none of this algorithm (SoftHSM takes AES keys of any length).
        """
        try:
            if algo.kind in (KeyKind.EC, KeyKind.ED25519):
                with memoryview(material) as view:
                    public_key = public_key or public_key_der(algo, bytes(view))
                _check_point(public_key)
            with self._guard:
                return LoadedKey(algo, self._fast.load(algo.name, material, public_key), self, self.generation)
        except CallError as error:
            raise self._fault(f"the token refused a key of {algo.name}", error) from None
        except ValueError as error:
            raise TokenError(f"what was combined is no key of {algo.name}: {error}") from None

    def try_rsa(self, algo: Algorithm, material: bytearray) -> LoadedKey:
        """As ``load``, with a throw-away RSA key of PROBE_RSA_BITS."""
        try:
            with self._guard:
                made = self._fast.load(algo.name, material, rsa_bits=PROBE_RSA_BITS)
                return LoadedKey(algo, made, self, self.generation)
        except CallError as error:
            raise self._fault(f"the token refused a key of {algo.name}", error) from None

    def destroy(self, key: LoadedKey) -> None:
        """Remove a key's objects; see ``LoadedKey.destroy``."""
        try:
            with self._guard:
                if key.generation == self.generation:
                    self._fast.destroy(key.handles)
        except CallError:
            return  # it is gone already, or the token is sick, which the next use tells
        except TokenError:
            return  # the token is not open, or is being opened anew: the objects end with its sessions

    # --- operations ---

    def use(
        self,
        key: LoadedKey,
        verb: str,
        header: bytes = b"",
        hashed: Callable[[bytes], Any] | None = None,
        unlike: str = "the ciphertext does not begin with its header",
    ) -> Use:
        """What does such uses of a key: called with data, associated data and proof, it gives the result.

        AES-GCM encrypts to header || nonce || ciphertext || tag, the header authenticated too; RSA-OAEP knows none.
        ``InvalidTag`` (for another header with the text ``unlike``) if anything of that was changed. ECDSA signatures
        are DER (RFC 3279, 2.2.3). ``InvalidSignature`` unless a signature, or a full-length MAC (HMAC, RFC 2104),
        belongs to the data; a good one gives the empty result. ``hashed`` (of hashlib) hashes the data first.
        """
        return Use(self, key, self._guard, self._fast, verb, header, hashed, unlike)

    def check(self, key: LoadedKey) -> None:
        """Under the guard: a handle of before the renewal may be another key's by now."""
        if key.lane is not self or key.generation != self.generation:
            raise NeedGrant("the key left the token, which was opened anew; a grant is needed to gather it again")

    def failed(self, error: CallError) -> None:
        """Under the guard: raise what a use that failed comes to, after it was reported."""
        raise self._fault(_FAILED, error) from None

    def decrypt_after(
        self, error: CallError, key: LoadedKey, ciphertext: bytes, associated_data: bytes, header: bytes
    ) -> bytes:
        """Under the guard: the plaintext after all, or what the failure of a first try comes to."""
        failures = [error]

        def decrypt() -> bytes:
            if failures:
                raise failures.pop()
            return self._fast.decrypt(key.handles, ciphertext, associated_data, header)

        return self._decrypted(
            decrypt,
            lambda: self._comes_back(key.handles, _FAILED, "a loaded key"),
            _FAILED,
            "the ciphertext, its associated data or its key does not fit",
        )

    def encrypt(self, key: LoadedKey, plaintext: bytes, associated_data: bytes, header: bytes = b"") -> bytes:
        """One ``use``."""
        return self.use(key, "encrypt", header)(plaintext, associated_data)

    def decrypt(self, key: LoadedKey, ciphertext: bytes, associated_data: bytes, header: bytes = b"") -> bytes:
        """One ``use``."""
        return self.use(key, "decrypt", header)(ciphertext, associated_data)

    def sign(self, key: LoadedKey, data: bytes) -> bytes:
        """One ``use``."""
        return self.use(key, "sign")(data)

    def verify(self, key: LoadedKey, data: bytes, signature: bytes) -> None:
        """One ``use``."""
        self.use(key, "verify")(data, b"", signature)

    mac = sign
    verify_mac = verify


def _one_kek(session: Any) -> Any:
    found = list(
        session.get_objects(
            {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: KEK_LABEL, Attribute.TOKEN: True}
        )
    )
    if len(found) != 1:
        raise TokenError(f"the token has {len(found)} keys {KEK_LABEL!r}, exactly 1 is needed")
    return found[0]


@functools.lru_cache(maxsize=PUBLIC_KEYS_MAX)
def _check_point(public_key: bytes) -> None:
    """``ValueError`` unless a SubjectPublicKeyInfo holds a point of its curve, which tokens may take for granted."""
    try:
        serialization.load_der_public_key(public_key)
    except PycaUnsupported:
        raise ValueError("its public key is of an unknown kind") from None


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
        self._guards: list[Guard] = []
        self._renewing = self.watch.guard()
        with _in_turn(config, data), self._renewing:
            library, self._module = _load(config, data)
            self._library = library
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
        with _in_turn(self._config, self._data), self._renewing, self._all_quiet():
            self.generation += 1
            for guard in self._guards:
                guard.closed = "the token could not be opened anew"
            try:
                _softhsm_environment(self._config, self._data)
                _initialize_again(self._config, self._module)
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
        held: list[Guard] = []
        self.watch.renewal_s = time.monotonic()
        end_s = self.watch.renewal_s + QUIET_WAIT_S
        try:
            for guard in self._guards:
                if not guard.acquire(end_s - time.monotonic()):
                    raise TokenBusy(f"a call of the token has not ended within {QUIET_WAIT_S:g} s")
                held.append(guard)
            yield
        finally:
            for guard in held:
                guard.release()

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


@functools.cache
def _probe_rsa() -> bytes:
    """One throw-away key for all RSA algorithms: making it takes as long as all else that is tried."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=PROBE_RSA_BITS)
    return private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def try_algorithm(lane: Lane, algo: Algorithm) -> None:
    """Use the algorithm once, there and back, with a throw-away key."""
    if algo.kind is KeyKind.RSA:
        key = lane.try_rsa(algo, bytearray(_probe_rsa()))
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
