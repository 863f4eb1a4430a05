"""What clients asked and were told, and the judgement of it. It opens no socket: a history may come from anywhere.

The judge needs no copy of the cluster's code: ciphertexts are held against what was encrypted, signatures are verified
with pyca/cryptography, and the MACs of imported keys are computed by ``hmac``.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_public_key

UNFINISHED = "unfinished"
"""The outcome of what was begun and never came back: its client was killed."""
DATA = ("encrypt", "decrypt", "sign", "verify", "mac", "verify-mac")
ADMIN = ("create", "import", "destroy", "refresh", "reshare")
FALSE_ALARMS = ("invalid-tag", "invalid-signature", "share-corrupt")
"""Errors that would say that good data are bad: to a client, as wrong as a wrong result."""


@dataclass(frozen=True, slots=True)
class Event:
    """One call: what was sent and what came. ``error`` is empty or the code of the error; times are monotonic seconds.

    ``sent`` is the plaintext of an encryption, the ciphertext of a decryption, the message of a signature or a MAC, the
    material of an import. ``proof`` is what was verified. ``got`` is the result; of a creation the public key, if any.
    """

    verb: str
    key: str
    begun_s: float
    ended_s: float
    error: str = ""
    message: str = ""
    sent: bytes = b""
    proof: bytes = b""
    got: bytes = b""
    after: bool = False
    """Whether it belongs to the check after healing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be: ``lost wrong undead half error slow untold crash sick`` are the kinds."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(slots=True)
class Key:
    """A key as its clients know it; ``made`` once its creation was acknowledged."""

    name: str
    algorithm: str
    material: bytes = b""
    public_key: bytes = b""
    made: bool = False
    doomed_s: float | None = None
    destroyed_s: float | None = None
    ciphertexts: list[tuple[bytes, bytes]] = field(default_factory=list)
    signatures: list[tuple[bytes, bytes]] = field(default_factory=list)
    macs: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether it was acknowledged and nobody has begun to destroy it."""
        return self.made and self.doomed_s is None


class History:
    """All events of a run, in the order of their ends; several threads write it."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._lock = threading.Lock()
        self.events: list[Event] = list(events)

    def add(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)

    def since(self, mark: int) -> list[Event]:
        with self._lock:
            return self.events[mark:]

    def __len__(self) -> int:
        return len(self.events)


def verifies(public_key: bytes, algorithm: str, message: bytes, signature: bytes) -> bool:
    """Whether pyca/cryptography takes the signature."""
    loaded = load_pem_public_key(public_key)
    try:
        if isinstance(loaded, ec.EllipticCurvePublicKey):
            digest = hashes.SHA384() if "p384" in algorithm else hashes.SHA256()
            loaded.verify(signature, message, ec.ECDSA(digest))
        elif isinstance(loaded, ed25519.Ed25519PublicKey):
            loaded.verify(signature, message)
        else:
            raise TypeError(f"no rule for signatures of {algorithm}")
    except InvalidSignature:
        return False
    return True


def judge(events: Iterable[Event], keys: Mapping[str, Key], *, checked: bool = True) -> list[Finding]:
    """Everything in a history that must not be, whatever the fault was: wrong results, lost and undead keys.

    Where the check after healing did not come to its end (``checked``), nothing is known of any key.
    """
    listed = list(events)
    unknown = Finding("lost", "the check was not carried out, so every key counts as lost")
    return [*_wrong(listed, keys), *(_lost(listed, keys) if checked else [unknown])]


def _wrong(events: list[Event], keys: Mapping[str, Key]) -> list[Finding]:
    found: list[Finding] = []
    plaintexts: dict[tuple[str, bytes], bytes] = {}
    macs: dict[tuple[str, bytes], bytes] = {}
    public: dict[str, bytes] = {name: key.public_key for name, key in keys.items() if key.public_key}
    for event in events:
        if event.verb == "encrypt" and not event.error:
            plaintexts[event.key, event.got] = event.sent

    def wrong(event: Event, text: str) -> None:
        found.append(Finding("wrong", f"{event.verb} with {event.key}: {text}"))

    for event in events:
        key = keys.get(event.key)
        if event.error:
            if event.error in FALSE_ALARMS and event.verb != "verify-forged":
                wrong(event, f"{event.error} for good data ({event.message})")
        elif event.verb == "decrypt":
            if event.got != plaintexts.get((event.key, event.sent)):
                wrong(event, "another plaintext than was encrypted")
        elif event.verb == "mac":
            if macs.setdefault((event.key, event.sent), event.got) != event.got:
                wrong(event, "two MACs of one message")
            if key is not None and key.material and hmac.digest(key.material, event.sent, hashlib.sha256) != event.got:
                wrong(event, "not the MAC that the imported key gives")
        elif event.verb == "sign":
            if key is not None and not verifies(public.get(event.key, b""), key.algorithm, event.sent, event.got):
                wrong(event, "pyca/cryptography refuses the signature")
        elif event.verb == "verify-forged":
            wrong(event, "a forged signature was found good")
        elif event.verb == "public-key" and public.setdefault(event.key, event.got) != event.got:
            wrong(event, "another public key than at first")
    return found


def _lost(events: list[Event], keys: Mapping[str, Key]) -> list[Finding]:
    """What the check after healing says of each key: acknowledged ones work, destroyed ones don't, others are whole."""
    found: list[Finding] = []
    checked: dict[str, list[Event]] = {}
    for event in events:
        if event.after and event.verb != "verify-forged":
            checked.setdefault(event.key, []).append(event)
    for name, key in keys.items():
        seen = checked.get(name, [])
        worked = [event.verb for event in seen if not event.error]
        failed = [f"{event.verb}: {event.error} ({event.message[:160]})" for event in seen if event.error]
        absent = bool(failed) and all(event.error == "key-not-found" for event in seen)
        if key.destroyed_s is not None:
            if worked:
                found.append(Finding("undead", f"{name} was destroyed and still does {worked[0]}"))
            elif not absent:
                found.append(Finding("undead", f"{name} was destroyed; it is not said to be gone: {failed[:2]}"))
        elif key.doomed_s is not None:
            continue  # its destruction was not acknowledged: it may be here or gone
        elif key.made:
            if not seen:
                found.append(Finding("lost", f"{name} was acknowledged and not looked at"))
            elif failed:
                found.append(Finding("lost", f"{name} was acknowledged; {failed[0]}"))
        elif worked and failed:
            found.append(Finding("half", f"{name} was not acknowledged and is neither whole nor absent: {failed[0]}"))
        elif failed and not absent:
            found.append(Finding("half", f"{name} was not acknowledged and is not said to be absent: {failed[0]}"))
    return found


def group_of(verb: str) -> str:
    """What an expectation calls a verb: ``data``, or the verb itself. A reshare fails as a refresh does."""
    return "data" if verb in DATA else {"import": "create", "reshare": "refresh"}.get(verb, verb)


def errors_of(events: Iterable[Event], keys: Mapping[str, Key]) -> list[Event]:
    """The errors that clients saw outside of the check. Uses of a key that is being destroyed may fail in any way."""
    found = []
    for event in events:
        if not event.error or event.after or event.error == UNFINISHED or event.verb == "verify-forged":
            continue
        key = keys.get(event.key)
        doomed_s = key.doomed_s if key is not None else None
        gone = event.verb in DATA and doomed_s is not None and doomed_s <= event.ended_s
        if not gone and event.verb in (*DATA, *ADMIN):
            found.append(event)
    return found


def count_errors(errors: Iterable[Event]) -> Counter[tuple[str, str]]:
    """(group, code) -> how often."""
    return Counter((group_of(event.verb), event.error) for event in errors)


def longest_gap(events: Iterable[Event], begun_s: float, ended_s: float) -> float:
    """The longest time in seconds without any success of a use of a key."""
    ends = sorted(event.ended_s for event in events if not event.error and event.verb in DATA and not event.after)
    marks = [begun_s, *(each for each in ends if begun_s < each < ended_s), ended_s]
    return max((late - early for early, late in pairwise(marks)), default=0.0)
