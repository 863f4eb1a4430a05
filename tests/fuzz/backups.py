"""Targets of a backup: recovery cards and keys, export orders, archives, contributions, and the file of parts.

The shares in the archives carry the mark, and the archive key too: no error may show either.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any, Final
from unittest import mock

import msgpack
import tomli_w
from documents import _change_list, change_document, keys_of, verified
from formats import _written
from mutate import change_blob, change_text
from schema import MARK
from targets import Target, require
from world import NOW_MS, material, opened, the_world

import engine.protocol.backup as backup
from engine._fastshamir import interpolate
from engine.client import recovery
from engine.client.backup import MAGIC, read_parts
from engine.client.recovery import load_recovery, read_recovery_card
from engine.errors import ConfigError, EngineError, ManifestError
from engine.protocol.backup import (
    Archive,
    ArchivedKey,
    ArchiveEnd,
    ArchiveHead,
    ArchiveReader,
    ExportOrder,
    Piece,
    check_combined,
    check_quorum,
    contribute,
    decrypt_share,
    encrypt_share,
    issue_export_order,
    open_contribution,
    open_export_order,
    open_recovery_card,
    piece_context,
    piece_seal_context,
    sign_recovery_card,
)
from engine.protocol.refresh import Opener, Sealer
from engine.protocol.wire import MAX_MESSAGE
from engine.sharing import SecretBuffer, Share, commitment

OPERATORS: Final = ("op", "op2", "op3")
DAY_MS: Final = 86_400_000
SKEW_MS: Final = 5_000
NODE: Final = "node1"
_PEM: Final = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIGjMF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBCfsxpIdPnWxe83wnOI
2zObAgIIADAMBggqhkiG9w0CCQUAMB0GCWCGSAFlAwQBKgQQPt7cKTQqG0vNtN/d
MItLDgRAxMn/yVuSG/qW05mrgpfG2RbarJ4C7s8daO3rx3Ex2d8ECQqs0akrWCmn
2RI6MC7sBDWcQFhvkDZJdygR84lNhg==
-----END ENCRYPTED PRIVATE KEY-----
"""
"""The recovery key of ``op``, under the password ``fuzz``: PKCS#8 salts its passwords, so it is kept."""


def _opener(name: str) -> Opener:
    return Opener(hashlib.sha256(b"recovery " + name.encode()).digest())


@cache
def _cards() -> list[bytes]:
    return [sign_recovery_card(name, _opener(name).public, the_world().keys[name]) for name in OPERATORS]


@cache
def _order() -> bytes:
    world = the_world()
    order = ExportOrder(material("export", 16), world.cluster.pin, 2, _cards(), "alice", NOW_MS + DAY_MS)
    return backup.add_order_signature(issue_export_order(order, world.keys["op"], NOW_MS), world.keys["op2"])


@cache
def _key() -> bytes:
    return (MARK * 4)[:32]


@cache
def _archive() -> tuple[Archive, bytes, list[bytes]]:
    """An archive of two pages: its head, and its pages and end."""
    world, run = the_world(), material("run", 16)
    order, _ = open_export_order(_order(), world.cluster, NOW_MS)
    sealer, pieces = Sealer(material("sealer", 32)), []
    values = interpolate([16, 17], [_key(), material("coefficient", 32)], [17, 18, 19])
    for x, (name, y) in enumerate(zip(OPERATORS, values, strict=True), 1):
        salt = material(f"salt {name}", 32)
        sealed = sealer.seal(_opener(name).public, salt + y, piece_seal_context(run, NODE, name))
        pieces.append(Piece(name, x, commitment(salt, piece_context(run, NODE), Share(x, y)), sealed))
    head = ArchiveHead(_order(), run, NODE, world.cluster.serial, NOW_MS, 2, pieces)
    archive, raw = Archive.begin(head, order, world.keys[NODE])
    parts, previous = [], archive.digest
    for number, dealt in enumerate((world.first, world.pair), 1):
        share, salt = dealt.shares[NODE], dealt.salts[NODE]
        with SecretBuffer.copy_of(bytearray(_key())) as key, SecretBuffer.copy_of(bytearray(salt + share.y)) as plain:
            sealed = encrypt_share(key, archive, dealt.record, share.x, plain, number)
        told = (dealt.record.raw, world.certificate(dealt.record), b"", b"", sealed, "")
        archived = ArchivedKey(dealt.manifest.key_id, "committed", *told)
        page, previous = archive.sign_page(number, previous, [archived], world.keys[NODE])
        parts.append(page)
    parts.append(archive.sign_end(ArchiveEnd(run, 2, 2, 2, previous), world.keys[NODE]))
    return archive, raw, parts


@cache
def _contributions() -> list[bytes]:
    """Those of two operators, sealed to the node."""
    archive, world = _archive()[0], the_world()
    public = world.curve(NODE).public_key().public_bytes_raw()
    made = []
    for name in OPERATORS[:2]:
        plain = backup.open_piece(archive, name, _opener(name))
        sealer = Sealer(material(f"contribution {name}", 32))
        made.append(contribute(archive, plain, world.keys[name], public, NOW_MS + DAY_MS, sealer, NOW_MS))
    return made


def _in_time(what: str, expires_ms: int) -> None:
    require(expires_ms + SKEW_MS >= NOW_MS, f"{what}: an expired one is accepted")
    require(expires_ms <= NOW_MS + 31 * DAY_MS + SKEW_MS, f"{what}: one of a far future is accepted")


def _good_card(raw: bytes) -> str:
    issuer, _, tree = verified(raw, "recovery", keys_of("operator"), backup.recovery_cards)
    require(tree[0] == issuer, "recovery card: of another than its issuer")
    return issuer


def _take_card(raw: bytes) -> str:
    card = open_recovery_card(raw, the_world().cluster)
    require(card.name == _good_card(raw), "recovery card: another name")
    return card.name


def _good_order(raw: bytes, now: bool) -> list[Any]:
    threshold = the_world().cluster.quorum if now else 1
    _, _, tree = verified(raw, "order.export", keys_of("operator"), backup.export_orders, threshold)
    _, pin, k, recipients, _, expires_ms = tree
    require(pin == the_world().pin, "export order: of another cluster")
    names = [_good_card(each) for each in recipients]
    require(len(set(names)) == len(names), "export order: one recipient twice")
    require(k <= len(names), "export order: more are needed than there are")
    if now:
        require(k >= the_world().cluster.quorum, "export order: fewer than the quorum can open it")
        _in_time("export order", expires_ms)
    return tree


def _take_order(raw: bytes) -> str:
    cluster = the_world().cluster
    try:
        order, cards = open_export_order(raw, cluster, NOW_MS)
        now = True
    except EngineError:
        order, cards = open_export_order(raw, cluster, None)
        now = False
    tree = _good_order(raw, now)
    if now:
        check_quorum(raw, cluster)
    require((order.threshold, len(cards)) == (tree[2], len(tree[3])), "export order: changed")
    return f"{order.threshold} of {len(cards)}, {'good' if now else 'over'}"


def _take_head(raw: bytes) -> str:
    archive = Archive.open(raw, the_world().cluster)
    issuer, _, tree = verified(raw, "backup.head", keys_of("node"), backup.archive_heads)
    order, _, node, _, _, _, pieces = tree
    require(node == issuer == archive.node, "archive head: of another node")
    cards = _good_order(order, False)[3]
    told = [(name, x) for name, x, _, _ in pieces]
    require(told == [(_good_card(card), x) for x, card in enumerate(cards, 1)], "archive head: other pieces")
    return f"{len(pieces)} pieces"


def _listed(raw: bytes, what: str) -> list[bytes]:
    """The strings of bytes in a list."""
    try:
        found = msgpack.unpackb(raw, raw=False)
    except Exception:  # whatever that library raises: then it is no list
        raise ManifestError(f"no list of {what}") from None
    if not isinstance(found, list) or not all(isinstance(each, bytes) for each in found):
        raise ManifestError(f"no list of {what}")
    return found


def _take_parts(raw: bytes) -> str:
    """A list of parts after the head, as they are read, against a count of their own."""
    parts = _listed(raw, "parts")
    archive, head, _ = _archive()
    reader = ArchiveReader(head, the_world().cluster)
    previous, keys, shares, whole = archive.digest, 0, 0, False
    for number, part in enumerate(parts, 1):
        found = reader.part(part)
        if reader.ended:
            issuer, _, end = verified(part, "backup.end", keys_of("node"), backup.archive_ends)
            told = (issuer, *end)
            require(told == (NODE, archive.head.run, number - 1, keys, shares, previous), "an end of something else")
            require(not whole, "a part after the end is accepted")
            whole = True
            continue
        issuer, _, page = verified(part, "backup.page", keys_of("node"), backup.archive_pages)
        run, index, before, listed = page
        require((issuer, run, index, before) == (NODE, archive.head.run, number, previous), "a page out of place")
        require(len(listed) == len(found), "a page of other keys")
        previous = hashlib.sha256(opened(part)[1]).digest()  # type: ignore[index]
        keys, shares = keys + len(listed), shares + sum(bool(each[6]) for each in listed)
        for each in found:
            _take_share(archive, each)
    return f"{'whole' if whole else 'cut off'}, of {len(parts)} parts"


def _take_share(archive: Archive, key: ArchivedKey) -> None:
    """A share that decrypts is one that was dealt."""
    world = the_world()
    try:
        record = backup.key_record(key, world.cluster)
        mine = record.manifest.holder(NODE)
        if not key.sealed or mine is None:
            return
        with SecretBuffer.copy_of(bytearray(_key())) as secret:
            share, _ = decrypt_share(secret, archive, record, mine.x, key.sealed)
    except (EngineError, ValueError):
        return
    dealt = next(each for each in (world.first, world.pair) if each.record.digest == record.digest)
    require(share == dealt.shares[NODE], "an archived share that was never dealt is accepted")


def _take_contributions(raw: bytes) -> str:
    """A list of contributions: what is accepted gives the archive key, and nothing else."""
    raws = _listed(raw, "contributions")
    world, archive = the_world(), _archive()[0]
    mine = Opener(world.curve(NODE).private_bytes_raw())
    with check_combined(archive, raws, world.cluster, NOW_MS, {mine.public: mine}.get) as key:
        require(key == SecretBuffer.copy_of(bytearray(_key())), "contributions give another archive key")
    for each in raws:
        issuer, _, tree = verified(each, "backup.piece", keys_of("operator"), backup.contributions)
        require(tree[:3] == [archive.head.run, archive.digest, NODE], "a contribution to another archive")
        require(tree[4] == 1 + OPERATORS.index(issuer), "a contribution of another's piece")
        _in_time("contribution", tree[6])
        require(open_contribution(each, archive, world.cluster, NOW_MS)[0].operator == issuer, "of another operator")
    return f"{len({opened(each)[0][2] for each in raws})} operators"  # type: ignore[index]


def _file() -> list[bytes]:
    _, head, parts = _archive()
    return [MAGIC + b"".join(len(each).to_bytes(4, "big") + each for each in (head, *parts)), MAGIC]


def _take_file(data: bytes) -> str:
    count, size = 0, len(MAGIC)
    for part in read_parts(_written("archive", data)):
        require(1 <= len(part) <= MAX_MESSAGE, "a part beyond the limit")
        require(data[size + 4 : size + 4 + len(part)] == part, "a part that is not the file's")
        count, size = count + 1, size + 4 + len(part)
    require(size == len(data), "something of the file is not read")
    return f"{count} parts"


def _card_text() -> list[bytes]:
    return [recovery.CARD_PREFIX.encode() + base64.b64encode(each) + b"\n" for each in _cards()[:2]]


def _take_card_text(data: bytes) -> str:
    found = read_recovery_card(_written("recovery", data))
    require(found == base64.b64decode(data.strip()[len(recovery.CARD_PREFIX) :]), "another card than the file's")
    return "accepted"


def _recovery_toml() -> list[bytes]:
    return [tomli_w.dumps({"version": 1, "name": "op", "recovery_key": _PEM, "kdf_salt": "00" * 16}).encode()]


def _take_recovery(data: bytes) -> str:
    with mock.patch.object(recovery, "stretched", lambda passphrase, salt: passphrase.encode()):
        opener = load_recovery(_written("recovery.toml", data), "op", "fuzz")
    require(len(opener.public) == 32, "no key")  # which one, PKCS#8 does not authenticate
    require(base64.b64encode(opener.public).decode() not in repr(opener), "a key in a repr")
    return "accepted"


def backup_targets() -> list[Target]:
    """All of them."""
    base = "engine.protocol.backup."
    secrets = (MARK, _PEM.splitlines()[2][16:40].encode())

    def target(
        name: str,
        samples: Callable[[], Sequence[bytes]],
        decode: Callable[[bytes], str],
        change: Callable[[Random, bytes, bytes], bytes],
        errors: tuple[type[BaseException], ...],
        weight: float,
        *covers: str,
    ) -> Target:
        return Target(name, samples, decode, change, errors, weight, covers=covers, secrets=secrets)

    documents, config = (EngineError,), (ConfigError,)
    pages = lambda: [msgpack.packb(_archive()[2][:2]), msgpack.packb(_archive()[2][:1])]  # noqa: E731
    whole = lambda: [msgpack.packb(_archive()[2])]  # noqa: E731
    pieces = lambda: [msgpack.packb(_contributions()), msgpack.packb(_contributions()[::-1])]  # noqa: E731
    return [
        target("document/recovery", _cards, _take_card, change_document, documents, 1, base + "open_recovery_card"),
        target(
            "document/order.export",
            lambda: [_order()],
            _take_order,
            change_document,
            documents,
            1,
            base + "open_export_order",
            base + "check_quorum",
        ),
        target(
            "document/backup.head",
            lambda: [_archive()[1]],
            _take_head,
            change_document,
            documents,
            0.5,
            base + "Archive.open",
        ),
        target(
            "document/backup.page",
            pages,
            _take_parts,
            _change_list,
            documents,
            0.5,
            base + "ArchiveReader.page",
            base + "ArchiveReader.part",
        ),
        target(
            "document/backup.end", whole, _take_parts, _change_list, documents, 0.5, base + "ArchiveReader.read_end"
        ),
        target(
            "document/backup.piece",
            pieces,
            _take_contributions,
            _change_list,
            documents,
            0.5,
            base + "open_contribution",
            base + "check_combined",
        ),
        target(
            "file/backup",
            _file,
            _take_file,
            change_blob,
            (ManifestError,),
            0.5,
            "engine.client.backup.read_parts",
        ),
        target(
            "text/recovery-card",
            _card_text,
            _take_card_text,
            change_text,
            config,
            0.3,
            "engine.client.recovery.read_recovery_card",
        ),
        target(
            "text/recovery.toml",
            _recovery_toml,
            _take_recovery,
            change_text,
            config,
            0.2,
            "engine.client.recovery.load_recovery",
        ),
    ]
