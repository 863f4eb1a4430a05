"""Weaknesses that a test plants into the processes of a real cluster, to see that the attacks find them.

Python imports this module at its start where its folder is in PYTHONPATH. KEYQUORUM_PLANTED names the weaknesses of
each member, as JSON: {"node1": ["gate", ...]}. Only processes that serve are changed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def gate() -> None:
    """Let every key in."""
    from engine.client import listener, publications

    publications._MembersOnly.callback = lambda self, domain, key: True  # type: ignore[method-assign]
    listener.Listener._admits = lambda self, user: True  # type: ignore[method-assign]


def size() -> None:
    """Take messages of any length."""
    from engine.client import listener, publications

    listener.FRAME_MAX = publications.FRAME_MAX = 1 << 26


def handshake() -> None:
    """Wait for handshakes for ever."""
    from engine.client import listener, publications

    listener.HANDSHAKE_MS = publications.HANDSHAKE_MS = 0


def verbs() -> None:
    """Take every verb from everybody."""
    from nodes import handlers

    handlers.check_verb = lambda cluster, member, verb: None


def policy() -> None:
    """Let every client do everything with every key."""
    from nodes import handlers

    handlers.check_key = lambda cluster, member, verb, key_name: None


def listing() -> None:
    """Show all names to everybody."""
    from engine.protocol.manifest import Cluster

    genuine = Cluster.allows
    Cluster.allows = lambda self, who, verb, name: verb == "list" or genuine(self, who, verb, name)  # type: ignore


def existence() -> None:
    """Look for the key before the policy is asked."""
    from engine.errors import KeyNotFound
    from nodes.handlers import Handlers

    genuine = Handlers._entry

    def entry(self: Any, call: Any, name: str, key_id: bytes = b"") -> Any:
        if self._catalogue.by_name(name) is None:
            raise KeyNotFound(f"no key {name!r}")
        return genuine(self, call, name, key_id)

    Handlers._entry = entry  # type: ignore[method-assign]


def signatures() -> None:
    """Find every signature right."""
    from engine.protocol import signed

    signed._verify = lambda *told: True


def times() -> None:
    """Look at no grant's times."""
    from engine.protocol import grant

    grant._check_time = lambda grant, now_ms: None


def combiner() -> None:
    """Take grants for every combiner."""
    from engine.protocol import grant

    genuine = grant._check_fit

    def fit(given: Any, record: Any, combiner: str) -> None:
        genuine(grant.Grant(*[combiner if f == "combiner" else getattr(given, f) for f in given.__struct_fields__]),
                record, combiner)  # fmt: skip

    grant._check_fit = fit


def ledger() -> None:
    """Remember no used grant."""
    from nodes.ledger import GrantLedger

    GrantLedger.release = lambda self, grant, signed: None  # type: ignore[method-assign]
    GrantLedger.spend = lambda self, grant, signed: None  # type: ignore[method-assign]


def release() -> None:
    """Give the share to whoever asks for it."""
    from engine.errors import StaleKey
    from engine.protocol.requests import ReleasedShare
    from nodes.holder import ShareHolder

    def give(self: Any, lane: Any, body: Any, sender: Any) -> ReleasedShare:
        entry = self._catalogue.by_id(body.key_id)
        if entry is None:
            raise StaleKey("no such key")
        share, salt = self.own_share(lane, entry)
        return ReleasedShare(share.x, share.y, salt)

    ShareHolder.release = give  # type: ignore[method-assign]


def export() -> None:
    """Take an export order of whoever signed it."""
    from engine.protocol import backup
    from engine.protocol.signed import read_unverified
    from nodes import archive

    def opened(raw: bytes, cluster: Any, now_ms: Any) -> Any:
        order, _ = backup.read_export_order(raw)
        return order, [backup.recovery_cards.decode(read_unverified(each).payload) for each in order.recipients]

    archive.open_export_order = opened


def _uses(verb: str, change: Callable[[Any, Any, Any], Callable[..., bytes]]) -> None:
    """Have the uses of keys with one verb be others: ``change`` is given lane, key and the genuine use."""
    from nodes.token import Lane

    genuine = Lane.use

    def use(self: Any, key: Any, of: str, *rest: Any) -> Any:
        made = genuine(self, key, of, *rest)
        return change(self, key, made) if of == verb else made

    Lane.use = use  # type: ignore[method-assign, assignment]


def short_macs() -> None:
    """Find every beginning of a right MAC right."""

    def change(lane: Any, key: Any, genuine: Any) -> Callable[..., bytes]:
        def verify(data: bytes, associated_data: bytes = b"", tag: bytes = b"") -> bytes:
            if tag and lane.mac(key, data).startswith(tag):
                return b""
            result: bytes = genuine(data, associated_data, tag)
            return result

        return verify

    _uses("verify-mac", change)


def oracle() -> None:
    """Tell wrong ciphertexts apart."""
    from engine.errors import InvalidTag

    def change(lane: Any, key: Any, genuine: Any) -> Callable[..., bytes]:
        def decrypt(data: bytes, associated_data: bytes = b"", proof: bytes = b"") -> bytes:
            try:
                result: bytes = genuine(data, associated_data, proof)
            except InvalidTag as error:
                raise InvalidTag(f"{error} ({zlib.crc32(data) % 5})") from None
            return result

        return decrypt

    _uses("decrypt", change)


def nonces() -> None:
    """Use one nonce for everything that is the same."""
    made: dict[tuple[Any, ...], bytes] = {}

    def change(lane: Any, key: Any, genuine: Any) -> Callable[..., bytes]:
        def encrypt(*given: bytes) -> bytes:
            again = (id(key), *given)
            if again not in made:
                made[again] = genuine(*given)
            return made[again]

        return encrypt

    _uses("encrypt", change)


def canonical() -> None:
    """Take every encoding of a message."""
    from engine.errors import ProtocolError
    from engine.protocol import wire

    def decode(self: Any, data: bytes) -> Any:
        try:
            return self._decode(data)
        except Exception as error:
            raise ProtocolError(f"{self.what}: {error}") from None

    wire.Codec.decode = decode  # type: ignore[method-assign]


def crash() -> None:
    """Die of one byte."""
    from engine.client import listener

    genuine = listener.request_codec

    class Fragile:
        def __getattr__(self, name: str) -> Any:
            return getattr(genuine, name)

        def decode(self, data: bytes) -> Any:
            if data == b"\xc1":
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine.decode(data)

    listener.request_codec = Fragile()  # type: ignore[assignment]


PLANTED: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (gate, size, handshake, verbs, policy, listing, existence, signatures, times, combiner, ledger)
} | {each.__name__: each for each in (release, export, short_macs, oracle, nonces, canonical, crash)}


def _member() -> str:
    """Whose serving process this is; empty for any other."""
    arguments = sys.orig_argv
    serves = any(each.startswith("--supervised") for each in arguments) or "balancer" in arguments
    if not serves or "--config" not in arguments:
        return ""
    return Path(arguments[arguments.index("--config") + 1]).parent.name


_named = json.loads(os.environ.get("KEYQUORUM_PLANTED", "{}")).get(_member(), [])
for _name in _named:
    PLANTED[_name]()
