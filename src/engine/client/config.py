"""Configuration, identity and manifest files, and the set-up of logging. It opens files, never sockets."""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import os
import re
import stat
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import msgspec
import structlog
import tomli_w
import zmq
from cryptography.exceptions import UnsupportedAlgorithm as PycaUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from msgspec import Meta, Struct

from engine.errors import ConfigError, ManifestError, ProtocolError
from engine.protocol.manifest import Cluster, Member, Role, decode_card, encode_card, open_chain
from engine.protocol.signed import SigningKey
from engine.protocol.wire import Name, without_value

__all__ = [
    "ClientConfig",
    "CurveIdentity",
    "CurveSource",
    "Identity",
    "SecretSource",
    "configure_logging",
    "create_identity",
    "forget_retiring",
    "load_cluster",
    "load_config",
    "load_identity",
    "read_card",
    "rotate_curve",
    "secret_source",
    "stretched",
    "write_card",
    "write_private",
    "write_toml",
]

CARD_PREFIX = "keyquorum-card-1 "
CARD_MAX = 64 * 1024
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL_VARIABLE = "KEYQUORUM_LOG_LEVEL"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_TEXT = 512
"""What another's error text is cut to: it may quote a key of the file."""

S = TypeVar("S", bound=Struct)


def load_config(path: str | os.PathLike[str], kind: type[S]) -> S:
    """The TOML file as a ``kind``; a ``ConfigError`` names the file, the key, the limit and a number that breaks it.

    Relative paths in the file are the caller's to resolve, against the file's folder (``resolve``).
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{file}: longer than {MAX_CONFIG_BYTES} bytes")
        with file.open("rb") as stream:
            data = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:  # also a number of too many digits, and what is no UTF-8
        raise ConfigError(f"{file}: no valid TOML: {str(error)[:MAX_TEXT]}") from None
    except RecursionError:
        raise ConfigError(f"{file}: no valid TOML: nested too deep") from None
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {without_value(str(error))[:MAX_TEXT]}{_number_at(data, str(error))}") from None


def _number_at(data: Any, message: str) -> str:
    """The number beyond a limit that a message of msgspec complains of, to be told too.

    Text may be a secret and is not told, nor is a number where text is expected: it may be a PIN without its quotes.
    """
    place = re.search(r"^Expected `(?:int|float)` [<>].*`\$\.([\w.]+)`$", message)
    for name in place[1].split(".") if place else ():
        data = data.get(name) if isinstance(data, dict) else None
    return f", where it says {str(data)[:40]}" if isinstance(data, int | float) else ""


def resolve(config_path: str | os.PathLike[str], value: str) -> Path:
    """A path of a configuration file, relative to the file's folder."""
    try:
        path = (Path(config_path).resolve().parent / value).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL character, a loop of symbolic links
        raise ConfigError(f"{config_path}: a path in it is none") from None
    try:
        path.stat()
    except OSError as error:  # whatever else keeps it from being read is told by who reads it
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{config_path}: a path in it is too long") from None
    return path


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600, durably; it replaces an older one whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    sync_file(path, os.O_DIRECTORY)


def sync_file(path: Path, flags: int = 0) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_toml(path: Path, values: dict[str, Any]) -> None:
    """Write a TOML file of mode 0600."""
    write_private(path, tomli_w.dumps(values).encode())


def check_private(path: Path) -> None:
    """Refuse a secret's file that others may read or write."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets others at it; it must be 0600")


@dataclass(frozen=True, slots=True)
class SecretSource:
    """Where a secret is: in a private file, an environment variable or a credential of systemd's (systemd.exec(5)).

    Never in the configuration itself.
    """

    kind: Literal["file", "env", "credential"]
    place: str

    what: ClassVar[str] = "secret"
    longest: ClassVar[int] = 255
    """In bytes."""

    def read(self) -> str:
        """The secret. ``ConfigError`` names the place, never the secret."""
        if self.kind == "env":
            data = os.fsencode(os.environ.get(self.place, ""))
        else:
            path = self._path()
            check_private(path)
            data = path.read_bytes().strip()
        try:
            secret = data.decode("utf-8")
        except UnicodeDecodeError:
            secret = ""
        if not secret or len(data) > self.longest:
            raise ConfigError(f"{self}: no {self.what} of 1..{self.longest} bytes there")
        return secret

    def _path(self) -> Path:
        if self.kind == "file":
            return Path(self.place)
        folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
        if not folder:
            raise ConfigError(f"{self}: there is no CREDENTIALS_DIRECTORY; LoadCredential= of a systemd unit makes one")
        return Path(folder) / self.place

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}"


Source = TypeVar("Source", bound=SecretSource)


def secret_source(path: str | os.PathLike[str], name: str, text: str, kind: type[Source]) -> Source:
    """The ``file:PATH``, ``env:NAME`` or ``credential:NAME`` that a configuration file tells by this name.

    ``ConfigError`` else.
    """
    scheme, colon, place = text.partition(":")
    if not colon:
        scheme, place = "file", text  # RFC 7512, 2.4: a pin-source may be a plain path
    if scheme == "file" and place:
        return kind("file", str(resolve(path, place.removeprefix("//"))))
    if scheme == "env" and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", place):
        return kind("env", place)
    if scheme == "credential" and re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", place):
        return kind("credential", place)
    # It may be the secret itself: it is not shown.
    raise ConfigError(f"{path}: {name} must be file:PATH, env:NAME or credential:NAME")


@dataclass(frozen=True, slots=True)
class CurveIdentity:
    """A CURVE key pair in Z85; the repr hides the secret."""

    name: str
    public: bytes
    secret: bytes

    @property
    def current(self) -> CurveIdentity:
        """Itself: a pair that does not change, where a ``CurveSource`` is wanted."""
        return self

    def instead(self, pair: CurveIdentity) -> CurveIdentity | None:
        """There is no other one."""
        return None

    @property
    def raw_public(self) -> bytes:
        """The public key, 32 bytes."""
        return zmq.utils.z85.decode(self.public)

    def __repr__(self) -> str:
        return f"CurveIdentity({self.name!r}, {self.public.decode()!r})"


class CurveSource(Protocol):
    """Where the CURVE pair for new connections is had from: a member may change it while it runs."""

    @property
    def current(self) -> CurveIdentity:
        """The pair to use now."""

    def instead(self, pair: CurveIdentity) -> CurveIdentity | None:
        """The pair to try where this one is refused: the other side's manifest may be another one. None without."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is: its name, role, CURVE pair (None for an operator) and signing key."""

    name: str
    role: Role
    curve: CurveIdentity | None
    signing: SigningKey
    retiring: CurveIdentity | None = None
    """The CURVE pair of before, while it changes."""

    @property
    def transport(self) -> CurveIdentity:
        """The CURVE pair; ``ConfigError`` for an operator, who has none."""
        if self.curve is None:
            raise ConfigError(f"the identity of {self.name!r} is an operator's and can't open a connection")
        return self.curve

    @property
    def pairs(self) -> tuple[CurveIdentity, ...]:
        """Its CURVE pairs, the newest first."""
        return tuple(pair for pair in (self.curve, self.retiring) if pair is not None)

    def pair_of(self, public: bytes) -> CurveIdentity | None:
        """Its pair with this public key of 32 bytes."""
        return next((pair for pair in self.pairs if pair.raw_public == public), None)

    def is_in(self, cluster: Cluster) -> bool:
        """Whether a manifest names it by its role and one of these very keys."""
        listed = cluster.members.get(self.name)
        if listed is None or (listed.role, listed.sign_public) != (self.role, self.signing.public):
            return False
        return not self.pairs or self.pair_of(listed.curve_public) is not None

    def member(self, *, endpoint: str = "", publish_endpoint: str = "", location: str = "") -> Member:
        """The public side, as an identity card and the cluster manifest tell it."""
        curve = zmq.utils.z85.decode(self.curve.public) if self.curve else bytes(32)
        return Member(self.name, self.role, self.signing.public, curve, endpoint, publish_endpoint, location)


class _IdentityFile(Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=1)]
    name: Name
    role: Role
    signing_key: str
    curve_secret: str = ""
    curve_retiring: str = ""
    kdf_salt: Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""


def create_identity(path: Path, name: str, role: Role, passphrase: str = "") -> Identity:
    """Make the keys of a new member and write them to a new file of mode 0600.

    An operator's signing key is encrypted under ``passphrase`` (scrypt, PKCS#8, PBES2), which must not be empty for
    that role.
    """
    if path.exists():
        raise ConfigError(f"{path}: exists already; an identity is never overwritten")
    if role == "operator" and not passphrase:
        raise ConfigError("an operator's key needs a passphrase")
    private = Ed25519PrivateKey.generate()
    salt = os.urandom(16) if passphrase else b""
    protection: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(stretched(passphrase, salt))
        if passphrase
        else serialization.NoEncryption()
    )
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    values: dict[str, Any] = {"version": 1, "name": name, "role": role, "signing_key": pem.decode("ascii")}
    if salt:
        values["kdf_salt"] = salt.hex()
    curve = None
    if role != "operator":
        public, secret = zmq.curve_keypair()
        curve = CurveIdentity(name, public, secret)
        values["curve_secret"] = secret.decode("ascii")
    try:
        msgspec.convert(values, _IdentityFile, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the name {name[:140]!r}: {error}") from None
    write_toml(path, values)
    return Identity(name, role, curve, SigningKey(name, private))


def stretched(passphrase: str, salt: bytes) -> bytes:
    """The passphrase through scrypt (RFC 7914; 128 MiB, OWASP's parameters): PKCS#8's own 2,048 rounds are too few."""
    return Scrypt(salt=salt, length=32, n=2**17, r=8, p=1).derive(passphrase.encode()).hex().encode()


def load_identity(path: str | os.PathLike[str], passphrase: str = "") -> Identity:
    """The identity in a file that only its owner may read."""
    file = Path(path)
    check_private(file)
    values = load_config(file, _IdentityFile)
    try:
        private = serialization.load_pem_private_key(
            values.signing_key.encode(),
            stretched(passphrase, bytes.fromhex(values.kdf_salt)) if passphrase and values.kdf_salt else None,
        )
    except (ValueError, TypeError, PycaUnsupported):
        # The cause may quote the key, so it is not chained.
        why = (
            "the passphrase is wrong or missing"
            if "ENCRYPTED" in values.signing_key
            else "the signing key is malformed"
        )
        raise ConfigError(f"{file}: {why}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{file}: the signing key is no Ed25519 key")
    curve = retiring = None
    if values.role != "operator":
        secret = values.curve_secret.encode()
        try:
            curve = CurveIdentity(values.name, zmq.curve_public(secret), secret)
            if values.curve_retiring:
                secret = values.curve_retiring.encode()
                retiring = CurveIdentity(values.name, zmq.curve_public(secret), secret)
        except (zmq.ZMQError, ValueError):
            raise ConfigError(f"{file}: the CURVE secret is malformed") from None
    return Identity(values.name, values.role, curve, SigningKey(values.name, private), retiring)


def rotate_curve(path: Path) -> Identity:
    """Make a fresh CURVE pair in an identity file, beside the one in use, which becomes the retiring one.

    ``ConfigError`` if an earlier change is not over: then the file still has a retiring pair (``forget_retiring``).
    """
    check_private(path)
    values = load_config(path, _IdentityFile)
    if values.role == "operator":
        raise ConfigError(f"{path}: an operator has no CURVE key")
    if values.curve_retiring:
        raise ConfigError(
            f"{path}: an earlier change of the CURVE key is not over; let the cluster retire the old key, then take "
            "that manifest with `keyquorum cluster join`"
        )
    _, secret = zmq.curve_keypair()
    _write_identity(path, values, secret.decode("ascii"), values.curve_secret)
    return load_identity(path)


def forget_retiring(path: Path) -> None:
    """Remove the retiring CURVE pair from an identity file, if there is one."""
    values = load_config(path, _IdentityFile)
    if values.curve_retiring:
        _write_identity(path, values, values.curve_secret, "")


def _write_identity(path: Path, values: _IdentityFile, curve_secret: str, curve_retiring: str) -> None:
    told = {
        **msgspec.structs.asdict(values),
        "curve_secret": curve_secret,
        "curve_retiring": curve_retiring,
    }
    write_toml(path, {name: value for name, value in told.items() if value != ""})


def write_card(path: Path, member: Member, key: SigningKey) -> None:
    """Write a member's public identity card, one line of text."""
    text = CARD_PREFIX + base64.b64encode(encode_card(member, key)).decode("ascii") + "\n"
    write_private(path, text.encode())
    path.chmod(0o644)


def read_card(path: Path) -> Member:
    """The member of an identity card, its signature checked."""
    raw = read_armored(path, CARD_PREFIX, "identity card", CARD_MAX)
    try:
        return decode_card(raw)
    except (ValueError, ManifestError, ProtocolError) as error:
        raise ConfigError(f"{path}: {error}") from None


def read_armored(path: Path, prefix: str, what: str, most: int) -> bytes:
    """What a card has in base64 behind its prefix, unchecked; no more than ``most`` characters are read."""
    try:
        with path.open("rb") as stream:
            text = stream.read(most).decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: no {what}") from None
    if not text.startswith(prefix):
        raise ConfigError(f"{path}: no {what} (it begins with {prefix.strip()!r})")
    try:
        return base64.b64decode(text[len(prefix) :], validate=True)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_cluster(manifest: str | os.PathLike[str], pin: str) -> Cluster:
    """The verified cluster of a manifest file; ``pin`` is the hex hash of the chain's first manifest."""
    file = Path(manifest)
    try:
        chain = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    try:
        pinned = bytes.fromhex(pin)
    except ValueError:
        pinned = b""
    if len(pinned) != 32:
        raise ConfigError(f"manifest_pin must be 64 hex digits, it has {len(pin)} characters")
    try:
        return open_chain(chain, pinned)
    except (ManifestError, ProtocolError) as error:
        raise ManifestError(f"{file}: {error}") from None


class ClientConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """``client.toml``: who the client is, which cluster it trusts, its default deadline, and whether it warms ahead."""

    version: Annotated[int, Meta(ge=1, le=1)]
    identity: str
    manifest: str
    manifest_pin: str
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 5.0
    prewarm: bool = True
    rotate: bool = True


class _StderrLogger(structlog.PrintLogger):
    """Writes where it can: who read the log may be gone, and that stops no thread."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def configure_logging(level: str = "") -> None:
    """Log to stderr: text on a terminal, else one JSON object a line. ``level`` beats KEYQUORUM_LOG_LEVEL."""
    chosen = (level or os.environ.get(LOG_LEVEL_VARIABLE, "") or "info").lower()
    if chosen not in LOG_LEVELS:
        raise ConfigError(f"log level {chosen!r}; known are {', '.join(LOG_LEVELS)}")
    terminal = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, chosen.upper())),
        logger_factory=lambda *_: _StderrLogger(sys.stderr),
    )
