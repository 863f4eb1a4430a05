"""A drill of a restore: all archives of a backup into fresh stores under a throw-away token, and every key used once.

``python -m nodes drill`` runs it, for ``keyquorum backup drill``. It opens no socket. The archives come in by the code
by which a node restores its own; the keys are then combined, and loaded into the token, as a combiner does. The
token's PIN is in this process alone, so whatever is left of its folder opens nothing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from engine.client.backup import BackedUpKey, archive_path, contributions_by_run, read_parts, verify_backup
from engine.errors import EngineError, ShareCorrupt
from engine.keys import Algorithm, RequestType
from engine.protocol.manifest import Cluster, Member
from engine.protocol.requests import ShareRestore
from engine.protocol.signed import SigningKey
from engine.sharing import Share, check_value, reconstruct_into, unblind
from nodes.archive import Restorer
from nodes.catalogue import Catalogue, Entry
from nodes.clock import TrustedClock
from nodes.config import PinSource, TokenConfig
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.operations import bound
from nodes.store import ShareStore
from nodes.token import Lane, LoadedKey, Token, initialize_token

__all__ = ["DrillInput", "Shown", "drill"]

PIN_VARIABLE: Final = "KEYQUORUM_DRILL_PIN"
LABEL: Final = "keyquorum-drill"
PLAIN: Final = b"keyquorum drill"

Told = Callable[[str, int], None]
"""Called with a node, and how many of its keys were looked at."""


class DrillInput(Struct, frozen=True, forbid_unknown_fields=True):
    """What the drill is told beside its arguments: the throw-away X25519 key, and the contributions sealed to it."""

    secret: bytes
    contributions: list[bytes]


@dataclass(frozen=True, slots=True)
class Shown:
    """What became of one version of a key: its shares that were combined, and what it did then.

    ``problem`` says what is wrong with it, or with a share of it. A key that was destroyed has neither.
    """

    name: str
    version: int
    algorithm: str
    shares: int
    shown: str
    problem: str


class _Stand:
    """One node's store, in which its archive is restored."""

    def __init__(self, node: str, folder: Path, cluster: Cluster, token: Token, secret: bytes) -> None:
        self.lane = token.lane()
        self.store = ShareStore(folder / "store.sqlite", node, self.lane)
        self.catalogue = Catalogue([])
        ledger = GrantLedger(self.store, TrustedClock())
        signing = SigningKey(node, Ed25519PrivateKey.generate())
        self.holder = ShareHolder(cluster, signing, self.store, self.catalogue, token.algorithms, ledger)
        self.restorer = Restorer(cluster, lambda: (secret,), self.holder, ledger.clock.now_ms, time.monotonic)

    def close(self) -> None:
        """Let its shares go."""
        self.holder.shares.clear("flushed")
        self.store.close()


def drill(
    backup: Path, pin: bytes, work: Path, module: Path, secret: bytes, contributions: Sequence[bytes], told: Told
) -> Iterator[Shown]:
    """What each key of the backup shows, after all archives were restored; ``EngineError`` where one can't be.

    ``secret`` is the X25519 key that the ``contributions`` are sealed to, ``work`` an empty folder.
    """
    report = verify_backup(backup, pin)
    if report.problems:
        raise ShareCorrupt(f"the backup is not whole: {'; '.join(report.problems)}"[:1000])
    os.environ[PIN_VARIABLE] = secrets.token_hex(32)
    try:
        config = TokenConfig(module, LABEL, PinSource("env", PIN_VARIABLE))
        initialize_token(config, work)
        token = Token(config, work)
    finally:
        del os.environ[PIN_VARIABLE]
    given = contributions_by_run(contributions)
    with ExitStack() as opened:
        stands: dict[str, _Stand] = {}
        refused: dict[bytes, list[str]] = {}
        for number, (node, archive) in enumerate(report.archives.items()):
            folder = work / f"node{number}"
            folder.mkdir(mode=0o700)
            stands[node] = stand = _Stand(node, folder, report.cluster, token, secret)
            opened.callback(stand.close)
            courier = Member(archive.order.courier, "client", bytes(32), bytes(32))
            path, pieces = archive_path(backup, node), given.get(archive.head.run, [])
            for key_id, text in _restore(stand, path, pieces, courier, told).items():
                refused.setdefault(key_id, []).append(text)
        for key_id, key in report.keys.items():
            yield _use(key_id, key, stands, refused.get(key_id, []))


def _restore(stand: _Stand, path: Path, contributions: list[bytes], courier: Member, told: Told) -> dict[bytes, str]:
    """One archive, as the verb share.restore brings it; the keys of it that were refused, and why."""
    parts = read_parts(path)
    begun, _ = stand.restorer.restore(stand.lane, ShareRestore(b"", 0, next(parts), contributions), courier)
    refused: dict[bytes, str] = {}
    done = 0
    for number, part in enumerate(parts, 1):
        reply, _ = stand.restorer.restore(stand.lane, ShareRestore(begun.run, number, part, []), courier)
        refused |= {result.key_id: result.text for result in reply.results if result.outcome == "refused"}
        done += len(reply.results)
        told(stand.holder.pen.name, done)
    return refused


def _use(key_id: bytes, key: BackedUpKey, stands: Mapping[str, _Stand], refused: Sequence[str]) -> Shown:
    """Combine a key of all its restored shares, compare it with its check value, and use it in the token."""
    if key.destroyed:
        return Shown(key.name, key.version, key.algorithm, 0, "", "")
    shares: list[Share] = []
    problems, shown = list(refused), ""
    try:
        last = None
        for node in key.nodes:
            entry = stands[node].catalogue.by_id(key_id)
            if entry is not None and entry.record.digest == key.digest and entry.row.sealed:
                shares.append(stands[node].holder.own_share(stands[node].lane, entry)[0])
                last = stands[node], entry
        if last is None or len(shares) < key.threshold:
            problems.append(f"{len(shares)} shares of it, {key.threshold} are needed")
        else:
            shown = _combined(*last, shares)
    except (EngineError, ValueError) as error:
        problems.append(str(error))
    finally:
        for stand in stands.values():
            stand.holder.shares.clear("flushed")
    return Shown(key.name, key.version, key.algorithm, len(shares), shown, "; ".join(problems))


def _combined(stand: _Stand, entry: Entry, shares: Sequence[Share]) -> str:
    manifest = entry.manifest
    with reconstruct_into(shares, threshold=manifest.threshold) as secret:
        if check_value(secret, manifest.key_context) != manifest.check_value:
            raise ShareCorrupt(f"the shares of {manifest.name!r} give another key than its check value tells", [])
        with unblind(secret) as material:
            loaded = stand.lane.load(entry.algorithm, material, manifest.public_key)
    try:
        return _works(stand.lane, entry.algorithm, loaded, manifest.version)
    finally:
        loaded.destroy()


def _works(lane: Lane, algo: Algorithm, loaded: LoadedKey, version: int) -> str:
    """What the loaded key did; an ``EngineError`` if it did not."""

    def use(verb: RequestType, data: bytes, proof: bytes = b"") -> bytes:
        return bound(lane, loaded, verb.value, version, digested=False)(data, b"", proof)

    if RequestType.ENCRYPT in algo.operations:
        if use(RequestType.DECRYPT, use(RequestType.ENCRYPT, PLAIN)) != PLAIN:
            raise ShareCorrupt("it decrypts to something else", [])
        return "decrypts what it encrypted"
    if RequestType.MAC in algo.operations:
        use(RequestType.VERIFY_MAC, PLAIN, use(RequestType.MAC, PLAIN))
        return "verifies its own MAC"
    use(RequestType.VERIFY, PLAIN, use(RequestType.SIGN, PLAIN))
    return "signs, and its public key verifies"
