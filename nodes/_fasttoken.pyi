"""The calls of a PKCS#11 module (v2.40) that data and keys go through; only ``nodes/token.py`` imports it.

python-pkcs11 keeps slots, tokens, sessions and login. The handles of its sessions and objects work here, as the same
module gives both the same functions.

All functions take any C-contiguous buffer, up to 1 MiB (beyond: ValueError), and read it in place; nobody may change it
meanwhile, as the interpreter's lock is given away. The variants with ``out`` write into a writable buffer that must
have room and lie apart from the inputs (else ValueError), and return how many bytes the result has.
"""

from collections.abc import Callable
from typing import Any, Final, NoReturn, final

from typing_extensions import Buffer

ALGORITHM_NAMES: Final[tuple[str, ...]]
"""What keys can be for, in the words of ``engine.keys``."""

class CallError(Exception):
    """A function of the module did not return CKR_OK (``code``), or gave something of a wrong length (``detail``)."""

    function: str
    code: int
    detail: str
    def __init__(self, function: str, code: int, detail: str = "") -> None: ...

@final
class Module:
    """The function list of the module at ``path``. OSError if it can't be loaded or is none of PKCS#11."""

    def __new__(cls, path: str, /) -> Module: ...
    def initialize(self) -> None:
        """C_Initialize with CKF_OS_LOCKING_OK: python-pkcs11's own is not for several threads."""

    def finalize(self) -> None:
        """C_Finalize: every session of the process ends."""

    def init_token(self, slot: int, so_pin: str, label: str, /) -> None:
        """C_InitToken. ValueError if the label has more than 32 bytes."""

@final
class Key:
    """Handles of a key's objects (0: there is none); from ``Session.load`` or ``Session.adopt``."""

    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def private(self) -> int: ...
    @property
    def public(self) -> int: ...
    @property
    def result_max(self) -> int:
        """Bytes of the longest signature, of a MAC, or of an RSA block; 0 for AES."""

@final
class Session:
    """A session of the module, by its handle, and the memory that its operations use.

    One thread at a time: RuntimeError if another one is in a call of it. ``CallError`` is what the module answers.
    """

    def __new__(cls, module: Module, handle: int, /) -> Session: ...
    @property
    def handle(self) -> int: ...
    @property
    def made(self) -> int:
        """Objects that were created."""

    def adopt(self, algorithm: str, private: int, public: int = 0, /) -> Key:
        """A key whose objects are there already; HMAC, AES and KEKs have the first handle only."""

    def load(self, algorithm: str, material: Buffer, public_key: Buffer = b"", /, *, rsa_bits: int = 0) -> Key:
        """Create session objects: sensitive, not extractable, for the algorithm's operations alone.

        ``material`` is canonical (``engine.keys``) and read from where it is; HMAC keys shorter than the block are
        filled up with zeros in locked memory. EC and Ed25519 need the ``public_key``, a SubjectPublicKeyInfo with an
        uncompressed point; that of RSA is in the material. ``rsa_bits`` stands in for the algorithm's size of modulus.

        ValueError says what is wrong with the material, and never shows it.
        """

    def destroy(self, key: Key, /) -> None:
        """C_DestroyObject of all that the key has; its handles are 0 after it. Nothing happens the second time."""

    def encrypt(self, key: Key, plaintext: Buffer, associated_data: Buffer = b"", header: Buffer = b"", /) -> bytes:
        """AES-GCM: header || nonce || ciphertext || tag, with header || associated data authenticated; or RSA-OAEP.

        The nonce has 96 random bits of getrandom(2), drawn for 21 operations at a time, with the time mixed in.
        OSError if that fails. RSA-OAEP (SHA-256) takes neither header nor associated data.
        """

    def encrypt_into(self, key: Key, plaintext: Buffer, associated_data: Buffer, header: Buffer, out: Buffer, /) -> int:
        """The same into ``out``."""

    def decrypt(self, key: Key, ciphertext: Buffer, associated_data: Buffer = b"", header: Buffer = b"", /) -> bytes:
        """The plaintext of what ``encrypt`` gave. InvalidTag if it is too short or does not begin with the header.

        A wrong tag is a CallError: only its code says whether it may have been that (SoftHSM: CKR_GENERAL_ERROR).
        """

    def decrypt_into(
        self, key: Key, ciphertext: Buffer, associated_data: Buffer, header: Buffer, out: Buffer, /
    ) -> int:
        """The same into ``out``, whose rest may be zeroed.

        It goes straight there if there is room for ciphertext and tag, which is what SoftHSM asks for.
        """

    def sign(self, key: Key, data: Buffer, /) -> bytes:
        """Signature of a digest (Ed25519: of a message) or MAC of a message. ECDSA's is DER (RFC 3279, 2.2.3).

        ValueError for a digest of another length than the algorithm's.
        """

    def sign_into(self, key: Key, data: Buffer, out: Buffer, /) -> int:
        """The same into ``out``, which has ``result_max`` bytes or more."""

    def verify(self, key: Key, data: Buffer, signature: Buffer, /) -> bool:
        """Whether the signature or MAC belongs to the data; errors as of ``sign``."""

    def random(self, length: int, /) -> bytes:
        """C_GenerateRandom."""

@final
class Guard:
    """Who makes calls of the module under it, as a context manager, does so alone.

    ``TokenError`` if it is not to be had within ``watch.patience_s()`` seconds, or is ``closed``, which says why.
    """

    closed: str
    def __new__(cls, watch: Any, /) -> Guard: ...
    @property
    def since_s(self) -> float:
        """Since when a call goes on (monotonic seconds); 0 if none does. From any thread."""

    def acquire(self, timeout_s: float) -> bool:
        """Have it, without a call; whether that came about in time."""

    def release(self) -> None:
        """Give back what ``acquire`` got."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

@final
class Use:
    """One kind of use of one loaded key; see ``nodes.token.Lane.use``, which alone makes them."""

    def __new__(
        cls,
        lane: Any,
        loaded: Any,
        guard: Guard,
        session: Session,
        verb: str,
        header: bytes,
        hashed: Callable[[bytes], Any] | None,
        unlike: str,
        /,
    ) -> Use: ...
    def __call__(self, data: Buffer, associated_data: Buffer = b"", proof: Buffer = b"", /) -> bytes:
        """The result in fresh bytes."""

    def then(self, following: Use | None, data: Buffer, associated_data: Buffer, /) -> bytes:
        """What ``following`` makes of this one's result, both with the same associated data; nothing without it.

        The result between the two is in memory that is wiped, and in no object.
        """

def ecdsa_to_der(raw: Buffer, /) -> bytes:
    """r || s (each up to 48 bytes) as an Ecdsa-Sig-Value."""

def ecdsa_from_der(der: Buffer, half: int, /) -> bytes | None:
    """r || s of ``half`` bytes each; None if it is not DER to the letter or a number is negative or does not fit."""

def rsa_from_der(der: Buffer, /) -> list[tuple[int, int]] | None:
    """Offset and length of the eight numbers of a two-prime RSAPrivateKey (RFC 8017, A.1.2) in its order; else None.

    Nothing is copied: they are secret.
    """
