"""Targets for what is neither message nor signed: files, text, shares, seals, rows, streams, logs, keys, the token.

Files are written to a temporary folder and read by the code's own functions. The KEK of most seals is a fixed AES key
in pyca/cryptography, which gives the same bytes in every run; the targets under ``token/`` use a real SoftHSM token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import cryptography.exceptions
import msgpack
import numpy as np
import tomli_w
import zmq.utils.z85
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from documents import _head
from mutate import change_blob, change_bytes, change_der, change_message, change_text
from schema import MARK
from targets import Target, kind_of, require
from uses import operate
from world import HOLDERS, NODES, NOW_MS, ec_key, is_signed_by, material, opened, private_key, rsa_key, the_world

import engine.client.files as files
from balancer.config import BalancerConfig
from balancer.history import History
from balancer.registry import SqliteRegistry, _Row
from balancer.series import SeriesError, read_events, read_reply, read_values
from engine import failpoints
from engine.cli.audit import _json_line
from engine.cli.audit import _text as _text_line
from engine.cli.cluster import _read_policy, pin_bytes
from engine.cli.output import decode_bytes
from engine.client.calls import check_name
from engine.client.config import CARD_PREFIX, ClientConfig, load_cluster, load_config, load_identity, read_card
from engine.client.files import decrypt_stream, encrypt_stream
from engine.errors import ConfigError, EngineError, InvalidSignature, InvalidTag, ProtocolError, ShareCorrupt
from engine.keys import ALGORITHMS, check_material, normalize_material, public_key_pem
from engine.protocol import audit as chain
from engine.protocol.manifest import _matches, encode_card
from engine.protocol.requests import REPLY_CODECS, STATS, Operate
from engine.protocol.trace import read_traceparent, trace_of
from engine.sharing import SecretBuffer, Share, reconstruct_key, zero_sharing_faults
from engine.sharing.formats import (
    gfshare_combine,
    gfshare_index,
    read_vault_part,
    slip39_interpolate,
    slip39_recover,
    write_vault_part,
)
from nodes._fasttoken import ecdsa_from_der, rsa_from_der
from nodes.audit import _check_tail, _kept_records, _log_id, _read_end
from nodes.config import MODULE_PATHS, PinSource, TokenConfig, _pin_source, load_node_config, parse_uri
from nodes.operations import check_operation
from nodes.store import Row, ShareStore, StoreCorrupt, seal_context, seal_share, unseal_share
from nodes.token import Lane, Token, initialize_token

PIN: Final = b"4711081547110815"
"""A PIN of digits only, as people choose them: no error may show it, not even where it was not quoted."""
FOLDER_VARIABLE: Final = "KEYQUORUM_FUZZ_FOLDER"
"""Where the temporary folder is made, if it is set: the tests have it below their own, which somebody clears away."""
_folders: list[tempfile.TemporaryDirectory[str]] = []


def folder() -> Path:
    """A folder of this process that goes away with it."""
    if not _folders:
        memory = Path("/dev/shm")  # noqa: S108 # a folder of random name is made in it
        given = os.environ.get(FOLDER_VARIABLE)
        where = given or (memory if memory.is_dir() else None)
        _folders.append(tempfile.TemporaryDirectory(prefix="keyquorum-fuzz-", dir=where))
    return Path(_folders[0].name)


def _written(name: str, data: bytes) -> Path:
    path = folder() / name
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return path


# --- shares as other tools write them, and the arithmetic on what others sent ---


def _take_vault(data: bytes) -> str:
    share = read_vault_part(data)
    require(1 <= share.x <= 255 and len(share.y) >= 1, "a part with x = 0, or without a value")
    require(write_vault_part(share) == data, "a part that is written otherwise than it was read")
    return "accepted"


def _take_index(data: bytes) -> str:
    name = data.decode("utf-8", "replace")
    index = gfshare_index(name)
    require(1 <= index <= 255 and name.endswith(f".{index:03}"), "an index that is not in the name")
    return "accepted"


def _points(data: bytes) -> list[tuple[int, bytes]]:
    """Pairs of an index and a value, the input of targets that combine."""
    try:
        pairs = msgpack.unpackb(data, raw=False)
        made = [(x, y) for x, y in pairs]
    except Exception:  # whatever that library raises for what it can't read
        made = [(None, None)]
    if not all(type(x) is int and isinstance(y, bytes) for x, y in made) or len(made) > 300:
        raise ProtocolError("the harness's own list")
    return made


_SLIP: Final = {0: bytes.fromhex("5ea1" * 8), 1: bytes.fromhex("0b0c" * 8)}


def _take_slip39(data: bytes) -> str:
    pairs = _points(data)
    points = dict(pairs)
    secret = slip39_recover(points, threshold=max(1, min(len(points), 16)))
    require(all(0 <= x < 16 or x in (254, 255) for x in points) or len(points) == 1, "an index that is none")
    if len(points) > 1:
        digest = slip39_interpolate(points, 254)
        told = hashlib.new("sha256")
        require(len(secret) == len(digest), "a secret of another length")
        import hmac

        told = hmac.new(digest[4:], secret, "sha256")
        require(told.digest()[:4] == digest[:4], "a digest that does not match")
    return f"of {len(points)}"


def _slip_samples() -> list[bytes]:
    import hmac

    secret, salt = material("slip39", 16), material("slip39 salt", 12)
    base = {0: material("slip39 0", 16), 254: hmac.new(salt, secret, "sha256").digest()[:4] + salt, 255: secret}
    points = {0: base[0], 1: slip39_interpolate(base, 1), 2: slip39_interpolate(base, 2)}
    require(slip39_recover(points, threshold=3) == secret, "the sample is wrong")
    return [msgpack.packb(list(points.items())), msgpack.packb([(3, secret)])]


def _take_combine(data: bytes) -> str:
    """What holders sent, combined as a combiner does: never anything but an answer or a refusal that names them."""
    pairs = _points(data)
    shares = [Share(x, y) for x, y in pairs]
    length = {len(each.y) for each in shares}
    threshold = max(1, min(2, len(shares)))
    found = zero_sharing_faults(shares, threshold=threshold)
    secret = reconstruct_key(shares, threshold=threshold)
    require(len({each.x for each in shares}) == len(shares), "an index counts twice")
    require(len(length) == 1 and len(secret) in length, "values of different lengths are combined")
    gfshare_combine(shares)
    return f"of {min(len(shares), 4)}, faults {'none' if found == () else 'some'}"


def _combine_samples() -> list[bytes]:
    world = the_world()
    told = [(each.x, each.y) for each in world.first.shares.values()]
    return [
        msgpack.packb(told),
        msgpack.packb(told[:2]),
        msgpack.packb([(1, bytes(16)), (2, bytes(16)), (255, bytes(16))]),
    ]


# --- seals and rows ---


class PycaLane:
    """A KEK outside of a token: a fixed key, the same AES-GCM, nonces that are a hash of what they seal."""

    def __init__(self) -> None:
        self._kek = AESGCM(material("kek", 32))

    def seal(self, plaintext: bytes, associated_data: bytes) -> bytes:
        """Nonce, ciphertext, tag."""
        nonce = hashlib.sha256(plaintext + associated_data).digest()[:12]
        return nonce + self._kek.encrypt(nonce, plaintext, associated_data)

    def unseal(self, sealed: bytes, associated_data: bytes) -> bytes:
        """The plaintext, else InvalidTag, as the token's lane does it."""
        if len(sealed) < 28:
            raise InvalidTag(f"a sealed blob of {len(sealed)} bytes is too short")
        try:
            return self._kek.decrypt(sealed[:12], sealed[12:], associated_data)
        except cryptography.exceptions.InvalidTag:
            raise InvalidTag("a sealed blob was changed, or belongs elsewhere") from None

    def unseal_secret(self, sealed: bytes, associated_data: bytes) -> SecretBuffer:
        """The same in locked memory."""
        return SecretBuffer.copy_of(self.unseal(sealed, associated_data))


LANE: Final[Any] = PycaLane()


def _seal_samples() -> list[bytes]:
    made = []
    for dealt, version, epoch in ((the_world().first, 1, 1), (the_world().pair, 1, 1)):
        for node in HOLDERS[:2]:
            holder = dealt.manifest.holder(node)
            assert holder is not None
            context = seal_context(dealt.manifest, holder.x, node, dealt.record.digest)
            sealed = seal_share(LANE, dealt.shares[node], dealt.salts[node], context)
            told = dealt.manifest
            fields = [sealed, holder.x, told.key_id, version, epoch, told.threshold, node, dealt.record.digest]
            made.append(msgpack.packb(fields))
    return made


def _take_seal(data: bytes) -> str:
    """A sealed share opens where it belongs alone: same key, version, epoch, x, t, node and manifest."""
    try:
        sealed, x, key_id, version, epoch, threshold, node, digest = msgpack.unpackb(data, raw=False)
        manifest = replace_manifest(key_id, version, epoch, threshold)
        good = isinstance(sealed, bytes) and type(x) is int and isinstance(node, str) and isinstance(digest, bytes)
    except Exception:  # not these fields: whatever that library raises
        good = False
    if not good:
        raise ProtocolError("the harness's own fields")
    try:
        context = seal_context(manifest, x, node, digest)
    except (TypeError, OverflowError, ValueError):  # a manifest has no such numbers
        raise ProtocolError("the harness's own fields") from None
    share, salt = unseal_share(LANE, sealed, x, context)
    known = _seals.get((sealed, x, key_id, version, epoch, threshold, node, digest))
    require(known is not None, "a seal opens elsewhere, or changed")
    require((share, salt) == known, "a seal gives another share")
    return "accepted"


_seals: dict[tuple[Any, ...], tuple[Share, bytes]] = {}


def replace_manifest(key_id: bytes, version: int, epoch: int, threshold: int) -> Any:
    """What ``seal_context`` asks a manifest for."""
    return SimpleNamespace(key_id=key_id, version=version, epoch=epoch, threshold=threshold, shares=len(HOLDERS))


def _seal_target_samples() -> list[bytes]:
    made = _seal_samples()
    for raw in made:
        fields = msgpack.unpackb(raw, raw=False)
        dealt = the_world().first if fields[2] == the_world().first.manifest.key_id else the_world().pair
        _seals[tuple(fields)] = dealt.shares[fields[6]], dealt.salts[fields[6]]
    return made


class _Stores:
    """A node's store and a registry on real SQLite files, with rows that are put back after each change."""

    def __init__(self) -> None:
        world = the_world()
        self.path = folder() / "shares.db"
        with mock.patch.object(os, "urandom", lambda size: material("row key", size)):
            self.store = ShareStore(self.path, "node1", LANE)
        self.store._db.execute("PRAGMA synchronous=OFF")
        dealt = world.first
        context = seal_context(dealt.manifest, 1, "node1", dealt.record.digest)
        sealed = seal_share(LANE, dealt.shares["node1"], dealt.salts["node1"], context)
        self.rows = [
            Row(dealt.manifest.key_id, 1, 1, 1, "orders", "committed", dealt.record.digest, dealt.record.raw[:60],
                b"certificate", b"", sealed, NOW_MS),
            Row(world.pair.manifest.key_id, 1, 1, 1, "tls", "prepared", world.pair.record.digest, b"manifest", b"", b"",
                sealed[::-1], NOW_MS),
        ]  # fmt: skip
        for row in self.rows:
            self.store.put(row)
        self.tags = {
            row.key_id: self.store._db.execute("SELECT tag FROM keys WHERE key_id = ?", (row.key_id,)).fetchone()[0]
            for row in self.rows
        }
        registry_path = folder() / "registry.db"
        self.registry = SqliteRegistry(registry_path, world.cluster, world.keys["balancer"], NOW_MS)
        self.registry._store.execute("PRAGMA synchronous=OFF")
        self.registry.reserve(world.first.manifest.order, "node1", NOW_MS)
        found = self.registry._store.execute("SELECT * FROM keys").fetchone()
        self.registry_row = tuple(found)


_stores: list[_Stores] = []


def the_stores() -> _Stores:
    """Those of this process."""
    if not _stores:
        _stores.append(_Stores())
    return _stores[0]


_ROW_FIELDS: Final = tuple(Row.__dataclass_fields__)
_COLUMN_VALUES: Final = (int, str, bytes)


def _columns(data: bytes, count: int) -> list[Any]:
    try:
        fields = msgpack.unpackb(data, raw=False)
    except Exception:  # whatever that library raises
        fields = None
    if not isinstance(fields, list) or len(fields) != count:
        raise ProtocolError("the harness's own columns")
    for each in fields:
        if each is not None and (
            not isinstance(each, (int, str, bytes, float)) or (type(each) is int and each >= 1 << 63)
        ):
            raise ProtocolError("the harness's own columns")
    return fields


@contextlib.contextmanager
def _only_row(database: sqlite3.Connection, columns: str, fields: Sequence[Any]) -> Iterator[None]:
    """The table of keys with this row alone, for the block."""
    database.execute("SAVEPOINT fuzz")
    try:
        try:
            database.execute("DELETE FROM keys")
            database.execute(f"INSERT INTO keys{columns} VALUES ({', '.join('?' * len(fields))})", fields)  # noqa: S608 # constants
        except (sqlite3.Error, UnicodeEncodeError, OverflowError):
            raise ProtocolError("no row of SQLite's") from None
        yield
    finally:
        database.execute("ROLLBACK TO fuzz")
        database.execute("RELEASE fuzz")


def _take_row(data: bytes) -> str:
    """The columns of a row as who has the file may set them: a row that is read is one that the node wrote."""
    state = the_stores()
    fields = _columns(data, len(_ROW_FIELDS) + 1)
    with _only_row(state.store._db, f" ({', '.join(_ROW_FIELDS)}, tag)", fields):
        (row,) = state.store.rows()
    require(row in state.rows, "a row that the node did not write is read")
    types = [type(getattr(row, name)) for name in _ROW_FIELDS]
    require(types == [type(getattr(state.rows[0], name)) for name in _ROW_FIELDS], "a column of another type")
    return row.state


def _row_samples() -> list[bytes]:
    state = the_stores()
    return [
        msgpack.packb([*(getattr(row, name) for name in _ROW_FIELDS), state.tags[row.key_id]], use_bin_type=True)
        for row in state.rows
    ]


def _take_registry_row(data: bytes) -> str:
    state = the_stores()
    fields = _columns(data, len(state.registry_row))
    with _only_row(state.registry._store.file, "", fields):
        row = state.registry._row(the_world().first.manifest.key_id)
    if row is None:
        raise ProtocolError("no row of this key")
    require(row == _Row(*state.registry_row[:-1]), "a row that the registry did not write is read")
    return "accepted"


def _take_database(data: bytes) -> str:
    """A store's whole file, damaged: what it gives are rows that the node wrote."""
    path = _written("damaged.db", data)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    store = ShareStore(path, "node1", LANE)
    try:
        rows = store.rows()
        store.used_grants()
        store.clock_mark()
        store.pledged(the_world().first.manifest.key_id)
    finally:
        store.close()
    require(all(row in the_stores().rows for row in rows), "a row that the node did not write is read")
    return f"{len(rows)} rows"


def _database_samples() -> list[bytes]:
    target = sqlite3.connect(folder() / "whole.db")
    the_stores().store._db.backup(target)
    target.close()
    return [(folder() / "whole.db").read_bytes()]


def _change_database(r: Random, data: bytes, donor: bytes) -> bytes:
    """Bits anywhere, and the header's fields more often than their part of the file."""
    at = int(r.random() * (100 if r.random() < 0.3 else len(data))) if data else 0
    data = data[:at] + change_bytes(r, data[at : at + 64]) + data[at + 64 :]
    return change_blob(r, data, donor) if r.random() < 0.2 else data


# --- configuration files ---


def _node_toml() -> list[bytes]:
    pin = "ab" * 32
    least = {
        "version": 1, "identity": "identity.toml", "manifest": "../cluster.manifest", "manifest_pin": pin,
        "data": "data", "token": {"label": "node1", "pin": "file:../pin.node1"},
    }  # fmt: skip
    module = next((path for path in MODULE_PATHS if Path(path).is_file()), "/usr/lib/softhsm/libsofthsm2.so")
    full = {
        **least, "bind": "tcp://127.0.0.1:7001", "workers": 3,
        "token": {
            "uri": f"pkcs11:token=my%20node;?module-path={module}&pin-source=file:/run/pin",
            "shared_with": "../node1/data",
        },
        "cache": {"ttl_s": 1.5, "max_keys": 3, "max_uses": 4, "max_bytes": 16384, "share_ttl_s": 2, "max_shares": 0},
        "create": {"acknowledge": "all"}, "audit": {"mode": "strict", "head_every_s": 0.1}, "limits": {"burst_s": 2.0},
    }  # fmt: skip
    digits = {**least, "token": {"label": "node1", "pin": int(PIN)}}
    return [tomli_w.dumps(each).encode() for each in (least, full, digits)]


def _take_node_toml(data: bytes) -> str:
    config = load_node_config(_written("node.toml", data))
    require(1 <= config.workers <= 64 and 0 < config.key_cache.ttl_s <= 86_400, "a number beyond its limits")
    require(1 <= len(config.token.label.encode()) <= 32 and config.token.pin.kind in ("file", "env"), "a token without")
    require(config.token.pin.kind == "file" or re.fullmatch(r"[A-Za-z_]\w*", config.token.pin.place, re.ASCII), "env")
    return f"{config.token.pin.kind} {config.acknowledge} {config.audit_mode}"


def _toml_target(kind: Any, name: str) -> Callable[[bytes], str]:
    def decode(data: bytes) -> str:
        load_config(_written(name, data), kind)
        return "accepted"

    return decode


def _balancer_toml() -> list[bytes]:
    told = {
        "version": 1,
        "identity": "i",
        "manifest": "m",
        "manifest_pin": "p",
        "data": "d",
        "bind": "tcp://h:1",
        "tick_ms": 50,
    }
    return [tomli_w.dumps(told).encode()]


def _client_toml() -> list[bytes]:
    told = {"version": 1, "identity": "i", "manifest": "m", "manifest_pin": "ab" * 32, "timeout_s": 2.5}
    return [tomli_w.dumps(told).encode()]


def _policy_toml() -> list[bytes]:
    rules = [
        {"identity": "alice", "keys": "*", "operations": ["*"]},
        {"identity": "b?", "keys": "app/*", "operations": ["sign"]},
    ]
    return [tomli_w.dumps({"version": 1, "rule": rules}).encode()]


def _take_policy(data: bytes) -> str:
    rules = _read_policy(str(_written("policy.toml", data)))
    for rule in rules:
        require(1 <= len(rule.identity) <= 128 and 1 <= len(rule.operations) <= 32, "a rule beyond its limits")
    return f"{min(len(rules), 4)} rules"


_CURVE_SECRET: Final = (MARK.decode() * 3)[:40]


def _identity_toml() -> list[bytes]:
    plain = serialization.NoEncryption()
    pem = (
        private_key("alice")
        .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        .decode()
    )
    secret = zmq.utils.z85.encode(material("curve", 32)).decode()
    other = ec_key(256).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain).decode()
    head = {"version": 1, "name": "alice"}
    return [
        tomli_w.dumps({**head, "role": "client", "signing_key": pem, "curve_secret": secret}).encode(),
        tomli_w.dumps(
            {**head, "role": "node", "signing_key": pem, "curve_secret": secret, "curve_retiring": secret}
        ).encode(),
        tomli_w.dumps({**head, "role": "operator", "signing_key": pem}).encode(),
        tomli_w.dumps({**head, "role": "node", "signing_key": other, "curve_secret": _CURVE_SECRET}).encode(),
    ]


def identity_secrets() -> tuple[bytes, ...]:
    """What of the identity files no error may show."""
    pem = private_key("alice").private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return MARK, pem.splitlines()[1][16:40], zmq.utils.z85.encode(material("curve", 32))[:16]


def _take_identity(data: bytes) -> str:
    identity = load_identity(_written("identity.toml", data))
    require(1 <= len(identity.name) <= 128 and "PRIVATE" not in repr(identity), "an identity without a name")
    require((identity.curve is None) == (identity.role == "operator"), "a CURVE key out of place")
    signature = identity.signing.sign(b"x")
    require(is_signed_by(identity.signing.public, signature, b"x"), "a signing key that does not sign")
    return identity.role


def _card_text() -> list[bytes]:
    world = the_world()
    cards = [encode_card(world.cluster.members[name], world.keys[name]) for name in ("alice", "node1", "op")]
    return [CARD_PREFIX.encode() + base64.b64encode(card) + b"\n" for card in cards]


def _take_card(data: bytes) -> str:
    member = read_card(_written("card", data))
    text = data.decode("ascii").strip()
    found = opened(base64.b64decode(text[len(CARD_PREFIX) :]))
    require(found is not None, "a card that is no envelope")
    fields, body, signatures = found  # type: ignore[misc]
    require(
        any(is_signed_by(member.sign_public, value, body) for name, value in signatures if name == member.name),
        "forged",
    )
    require(fields[2] == member.name, "a card of another")
    return member.role


def _take_pin(data: bytes) -> str:
    pin = PinSource("file", str(_written("pin", data))).read()
    require(1 <= len(pin.encode()) <= 255 and pin.encode() == data.strip(), "a PIN that is not the file's")
    return "accepted"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _take_uri(data: bytes) -> str:
    found = parse_uri(_text(data))
    require(set(found) <= {"label", "pin", "module"}, "an attribute that is unknown")
    return "+".join(sorted(found))


def _take_pin_source(data: bytes) -> str:
    source = _pin_source(folder() / "node.toml", _text(data))
    require(source.kind == "env" or os.path.isabs(source.place), "a PIN from a relative path")
    require(source.kind == "file" or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", source.place), "no name of a variable")
    return source.kind


def _take_traceparent(data: bytes) -> str:
    told = read_traceparent(_text(data))
    require(read_traceparent(str(told)) == told, "what is passed on is read otherwise")
    require(len(str(told)) == 55 and int(told.trace_id, 16) and int(told.span_id, 16), "an id that there is not")
    require(trace_of({"traceparent": data}) == told, "an extension is read otherwise")
    return "sampled" if told.flags & 1 else "not sampled"


def _take_failpoints(data: bytes) -> str:
    found = failpoints.parse(_text(data))
    require(set(found) <= set(failpoints.POINTS), "an unknown failpoint")
    return f"{min(len(found), 3)}"


def _take_pin_hex(data: bytes) -> str:
    require(len(pin_bytes(_text(data))) == 32, "a pin of another length")
    return "accepted"


def _take_pattern(data: bytes) -> str:
    """A policy's glob on a name: what the fnmatch of the library says, in bounded time."""
    pattern, _, name = _text(data).partition("\n")
    if not 1 <= len(pattern) <= 128 or len(name) > 128:
        raise ProtocolError("the harness's own limits")
    told = _matches(pattern, name)
    require(told == fnmatchcase(name, pattern), "a pattern matches what it must not, or does not what it must")
    return str(told)


def _take_cluster_file(data: bytes) -> str:
    world = the_world()
    cluster = load_cluster(_written("cluster.manifest", data), world.pin.hex())
    require(data in (world.chain, world.first_chain) or cluster.pin == world.pin, "another cluster")
    return f"serial {cluster.serial}"


# --- encrypted files ---

SMALL_CHUNK: Final = 64
"""Plaintext bytes of a chunk here, so that streams of several chunks are short."""


class _StreamEngine:
    """What the stream functions ask of an ``Engine``: AES-GCM under a fixed key. It notes what it was given."""

    def __init__(self) -> None:
        self._key = AESGCM(material("stream", 32))
        self.longest = 0

    def key_info(self, name: str, *, timeout: float | None = None) -> Any:
        """Of an AES key."""
        return SimpleNamespace(algorithm="aes-256-gcm")

    def encrypt_many(self, name: str, plaintexts: Any, *, associated_data: Any, timeout: Any = None) -> list[bytes]:
        """Each with its own associated data."""
        made = []
        for plaintext, aad in zip(plaintexts, associated_data, strict=True):
            nonce = hashlib.sha256(aad).digest()[:12]
            made.append(nonce + self._key.encrypt(nonce, plaintext, aad))
        return made

    def decrypt_many(self, name: str, ciphertexts: Any, *, associated_data: Any, timeout: Any = None) -> list[bytes]:
        """Each with its own associated data; InvalidTag."""
        self.longest = max(self.longest, *map(len, ciphertexts), 0)
        try:
            return [
                self._key.decrypt(each[:12], each[12:], aad) if len(each) >= 28 else _too_short()
                for each, aad in zip(ciphertexts, associated_data, strict=True)
            ]
        except cryptography.exceptions.InvalidTag:
            raise InvalidTag("wrong") from None


def _too_short() -> bytes:
    raise InvalidTag("too short")


def _stream_plain() -> list[bytes]:
    return [b"", b"one", MARK * 11, material("long", SMALL_CHUNK * 3), material("longer", SMALL_CHUNK * 17 + 5)]


_streams: dict[bytes, bytes] = {}


def _stream_samples() -> list[bytes]:
    with mock.patch.object(files, "CHUNK", SMALL_CHUNK):
        for number, plain in enumerate(_stream_plain()):
            sink = io.BytesIO()
            with mock.patch.object(os, "urandom", lambda size, number=number: material(f"stream {number}", size)):
                encrypt_stream(_StreamEngine(), "key", io.BytesIO(plain), sink, b"aad")  # type: ignore[arg-type]
            _streams[sink.getvalue()] = plain
    return list(_streams)


def _take_stream(data: bytes) -> str:
    sink, kq = io.BytesIO(), _StreamEngine()
    with mock.patch.object(files, "CHUNK", SMALL_CHUNK):
        done = decrypt_stream(kq, "key", io.BytesIO(data), sink, b"aad")  # type: ignore[arg-type]
    require(data in _streams, "a stream that was changed is decrypted")
    require(sink.getvalue() == _streams[data] and done == len(_streams[data]), "a stream gives other bytes")
    require(kq.longest <= SMALL_CHUNK + files.OVERHEAD_MAX, "a chunk beyond the limit is decrypted")
    return f"{min(len(_streams[data]) // SMALL_CHUNK, 4)} chunks"


def _change_stream(r: Random, data: bytes, donor: bytes) -> bytes:
    """Whole chunks moved, repeated, taken away or from another stream; else bytes."""
    if r.random() < 0.5 or len(data) < 30:
        return change_blob(r, data, donor)
    cut, theirs = _chunks(data), _chunks(donor)
    place = int(r.random() * len(cut))
    kind = int(r.random() * 6)
    if kind == 0:
        del cut[place]
    elif kind == 1:
        cut.insert(place, cut[int(r.random() * len(cut))])
    elif kind == 2:
        cut[place] = theirs[int(r.random() * len(theirs))]
    elif kind == 3:
        r.shuffle(cut)
    elif kind == 4:
        cut = cut[: place + 1]
    else:
        size = (0, 1, SMALL_CHUNK + 128, SMALL_CHUNK + 129, 0x7FFFFFFF, 0xFFFFFFFF)[int(r.random() * 6)]
        cut.append(size.to_bytes(4, "big") + bytes(min(size, 300)))
    return data[:25] + b"".join(cut)


def _chunks(data: bytes) -> list[bytes]:
    found, at = [], 25
    while at + 4 <= len(data) and len(found) < 100:
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        found.append(data[at:end])
        at = end
    return found or [b""]


# --- audit logs ---


def _log_lines() -> list[bytes]:
    log_id = material("log", 32)
    text = base64.b64encode(_head()).decode()
    records = [
        chain.Record(NOW_MS, "node1", "b", 0, chain.SEGMENT, log=log_id.hex()),
        chain.Record(NOW_MS, "node1", "b", 0, chain.START, detail="keyquorum"),
        chain.Record(NOW_MS, "node1", "b", 1, chain.REQUEST, "alice", "encrypt", "orders", detail=""),
        chain.Record(NOW_MS, "node1", "b", 1, chain.REPLY, "alice", "encrypt", "orders", "ok", elapsed_us=120),
        chain.Record(NOW_MS, "node1", "b", 0, chain.PEER_HEAD, "node2", detail="record 5", head=text),
        chain.Record(NOW_MS, "node1", "b", 0, chain.TORN, detail="cut 3 bytes"),
    ]
    lines, before = [], log_id
    for seq, record in enumerate(records, 1):
        lines.append(chain.chained_line(seq, before, record))
        before = chain.line_hash(lines[-1])
    return lines


def _take_line(data: bytes) -> str:
    link, record = chain.read_link(data), chain.read_record(data)
    if link is None or record is None:
        raise ProtocolError(f"no line: {link is None} {record is None}")
    require(0 <= link[0] < 10**18 and len(link[1]) == 32 and data.startswith(b'{"seq":'), "a link that is none")
    require(isinstance(record.node, str) and isinstance(record.time_ms, int), "a record of other types")
    again = chain.chained_line(link[0], link[1], record)
    require(chain.read_record(again) == record and chain.read_link(again) == link, "a record is written otherwise")
    return record.event[:12]


def _take_shown(data: bytes) -> str:
    """A line as ``keyquorum audit show`` prints it, which checks nothing: as text and as JSON."""
    record = chain.read_record(data)
    if record is None:
        raise ProtocolError("no record")
    require("\n" not in _text_line(record), "a record is printed on two lines")
    require(b"\n" not in _json_line(record, data).encode(), "a record is printed on two lines")
    return record.event[:12]


def _take_name(data: bytes) -> str:
    name = check_name(_text(data))
    good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*", name, re.ASCII) is not None
    require(good and 1 <= len(name) <= 128, "a name that breaks the rule")
    return "accepted"


def _take_encoded(data: bytes) -> str:
    encoding = "hex" if data[:1] == b"h" else "base64"
    found = decode_bytes(data[1:], encoding, "the signature")
    text = b"".join(data[1:].split()).rstrip(b"=")
    require(len(found) == (len(text) // 2 if encoding == "hex" else len(text) * 3 // 4), "other bytes than the text")
    return encoding


def _take_log(data: bytes) -> str:
    """A whole log: whatever was changed in it is found, but a cut at its end."""
    claims: list[Any] = []
    check = chain.ChainCheck(the_world().cluster.sign_key_ever("node"), claims.append)
    findings = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        findings += check.feed("log", number, line)
    require(len(check._missing) <= chain.MAX_GAPS, "gaps without a bound")
    _check_tail(data, folder() / "audit-000001.jsonl")
    good = _log_lines()
    if not findings and lines[:-1]:
        # With its last record nobody has chained to it yet; the records before it are as they were written.
        same = lines[:-1] if lines[:-1] == good[: len(lines) - 1] else lines[:-2]
        log_id = chain.read_link(lines[0])
        ours = log_id is not None and log_id[1] == material("log", 32)
        require(not ours or same == good[: len(same)], "a changed log has no finding")
        return f"good {len(same)}"
    if findings:
        require(all(len(each.text) < 66_000 for each in findings), "a finding without a bound")
        raise ProtocolError(f"found {findings[0].kind}")
    return "empty"


def _change_log(r: Random, data: bytes, donor: bytes) -> bytes:
    """A line changed, moved, repeated, removed; more often than not those behind it are chained again."""
    lines = data.split(b"\n")
    place = int(r.random() * len(lines))
    kind = int(r.random() * 6)
    if kind == 0:
        lines.insert(place, lines[int(r.random() * len(lines))])
    elif kind == 1 and len(lines) > 1:
        del lines[place]
    elif kind == 2:
        r.shuffle(lines)
    elif kind == 3:
        return change_blob(r, data, donor)
    else:
        lines[place] = change_text(r, lines[place], donor)
    return b"\n".join(lines)


def _take_segment(data: bytes) -> str:
    """A segment's file as a node opens it at its start."""
    path = _written("audit-000001.jsonl", data)
    end = _read_end(path)
    require(0 <= end.size <= len(data) and data[end.size : end.size + len(end.torn)] == end.torn, "another end")
    if not end.seq:
        return "empty"
    require(len(end.digest) == 32, "a hash that is none")
    log_id = _log_id(path)
    require(len(log_id) == 32, "a log's id that is none")
    kept = list(_kept_records(path, end.size))
    require(all(each.event in (chain.PEER_HEAD, chain.PEER_FORK) for each in kept), "a record that is not to be kept")
    return f"{'broken' if end.broken else 'whole'} {min(len(kept), 2)}"


# --- keys ---


def _materials() -> list[bytes]:
    der, pem = serialization.Encoding.DER, serialization.Encoding.PEM
    pkcs8, old, plain = (
        serialization.PrivateFormat.PKCS8,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    return [
        ec_key(256).private_bytes(der, pkcs8, plain),
        ec_key(384).private_bytes(pem, pkcs8, plain),
        private_key("alice").private_bytes(der, pkcs8, plain),
        private_key("alice").private_bytes(pem, pkcs8, plain),
        material("raw", 32),
        material("raw", 48),
        rsa_key().private_bytes(der, pkcs8, plain),
        rsa_key().private_bytes(der, old, plain),
    ]


_IMPORTED: Final = (
    "ecdsa-p256-sha256",
    "ecdsa-p384-sha384",
    "ed25519",
    "aes-256-gcm",
    "hmac-sha256",
    "rsa-2048-pss-sha256",
)


def _take_material(data: bytes) -> str:
    """What a user imports, and what comes over the wire as canonical, for each algorithm."""
    told = []
    problem: ValueError | None = None
    for name in _IMPORTED:
        algo = ALGORITHMS[name]
        try:
            canonical = normalize_material(algo, data)
        except ValueError as error:
            problem = error
        else:
            require(check_material(algo, canonical) == canonical, f"{name}: what was imported is not canonical")
            told.append(name)
        try:
            require(check_material(algo, data) == data, f"{name}: other material")
            told.append(f"{name} canonical")
        except ValueError as error:
            problem = error
    if not told and problem is not None:
        raise problem
    return "+".join(told)


def _take_public(data: bytes) -> str:
    pem = public_key_pem(data)
    again = serialization.load_pem_public_key(pem.encode())
    return type(again).__name__


def _publics() -> list[bytes]:
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return [key.public_key().public_bytes(*spki) for key in (ec_key(256), ec_key(384), private_key("alice"), rsa_key())]


def _take_rsa(data: bytes) -> str:
    """The DER of a combined RSA key, read by nodes/_fasttoken.pyx without a copy, and by pyca/cryptography."""
    places = rsa_from_der(data)
    if places is None:
        raise ValueError("no RSAPrivateKey")
    require(len(places) == 8, "other attributes")
    require(all(0 < at < at + length <= len(data) for at, length in places), "numbers that are none")
    numbers = [int.from_bytes(data[at : at + length], "big") for at, length in places]
    try:
        key = serialization.load_der_private_key(data, None, unsafe_skip_rsa_key_validation=True)
        found = key.private_numbers()  # type: ignore[union-attr]
    except (ValueError, TypeError, AttributeError, cryptography.exceptions.UnsupportedAlgorithm):
        return "read here alone"  # what pyca refuses of it (a negative number, say) the token is given as it is
    other = [
        found.public_numbers.n,
        found.public_numbers.e,
        found.d,
        found.p,
        found.q,
        found.dmp1,
        found.dmq1,
        found.iqmp,
    ]
    require(numbers == other, "two readers of one DER read different numbers")
    return "read by both"


def _rsa_der() -> list[bytes]:
    plain = serialization.NoEncryption()
    return [rsa_key().private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, plain)]


def _take_ecdsa(data: bytes) -> str:
    raw = ecdsa_from_der(data, 32)
    if raw is None:
        raise InvalidSignature("no DER signature")
    require(len(raw) == 64, "a signature of another length")
    r, s = utils.decode_dss_signature(data)
    require((r, s) == (int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")), "another signature")
    return "accepted"


def _ecdsa_signatures() -> list[bytes]:
    numbers = (
        (1, 2),
        (2**256 - 1, 2**255),
        (int.from_bytes(material("r", 32), "big"), int.from_bytes(material("s", 32), "big")),
    )
    return [utils.encode_dss_signature(r, s) for r, s in numbers]


# --- what a node tells the balancer ---


def _take_stats(data: bytes) -> str:
    stats = REPLY_CODECS[STATS].decode(data)
    history = History(NODES[:2], tick_ms=1_000, ticks=8)
    dropped = history.observe(1, {"node1": stats})
    dropped += history.observe(2, {"node1": stats, "node2": stats})
    snapshot = history.snapshot()
    require(not (snapshot.requests < 0).any() and not (snapshot.busy_us < 0).any(), "a count below zero")
    require(len(snapshot.nodes) == 2 and all(each >= 0 for each in snapshot.queue), "a queue below zero")
    return f"dropped {len(dropped)}"


def _stats_samples() -> list[bytes]:
    from schema import samples

    from engine.protocol.requests import ClassCount, NodeStats

    codec = REPLY_CODECS[STATS]
    counts = [ClassCount("encrypt/aes-256-gcm", 100, 1, 2000), ClassCount("sign/ed25519", 5, 0, 700)]
    mine = NodeStats(bytes(16), 60_000, 2, counts, [(0, 1, 60), (1, 7, 5)], [], 1, 10_000, [("orders", 0, 40)], 20)
    try:
        made = [codec.encode(mine)]
    except TypeError:
        made = []
    return [*made, *samples(kind_of(codec), codec.limit, "stats")[:3]]


# --- external series of a balancer ---


def _take_reply(data: bytes) -> str:
    value = read_reply(data, "length")
    require(abs(value) <= 1e12, "a number beyond the bound")
    return "a number"


def _take_events(suffix: str) -> Callable[[bytes], str]:
    def take(data: bytes) -> str:
        points = read_events(data.decode(), suffix, 1_800_000_000.0)
        require(bool((points.times[1:] >= points.times[:-1]).all()), "times out of order")
        require(bool(np.isfinite(points.values).all()), "a value that is none")
        return f"{len(points.times)} changes"

    return take


def _take_values(data: bytes) -> str:
    points = read_values(data.decode())
    require(bool((np.abs(points.values) <= 1e12).all()), "a number beyond the bound")
    return f"{len(points.times)} values"


_EVENTS: Final = {
    ".toml": b"[[event]]\nstart = 2027-01-15T08:00:00Z\nend = 2027-01-15T09:00:00Z\nvalue = 2\nevery_s = 86400\n",
    ".csv": b"start,end,value,every_s\n1800000000,1800003600,2,86400\n2027-01-15,2027-01-16\n",
    ".ics": b"BEGIN:VEVENT\r\nDTSTART:20270115T080000Z\r\nDTEND:20270115T090000Z\r\nEND:VEVENT\r\n",
}


# --- a real token ---


class _Tokens:
    """One SoftHSM token of this process, with fixed keys in it as session objects."""

    def __init__(self) -> None:
        module = next(Path(path) for path in MODULE_PATHS if Path(path).is_file())
        self.config = TokenConfig(module, "fuzz", PinSource("file", str(folder() / "token-pin")))
        initialize_token(self.config, folder() / "token-data")
        self.token = Token(self.config, folder() / "token-data")
        self.lane: Lane = self.token.lane()
        self.aes = self.lane.load(ALGORITHMS["aes-256-gcm"], material("token aes", 32))
        self.hmac = self.lane.load(ALGORITHMS["hmac-sha256"], material("token hmac", 32))
        self.ec = self.lane.load(
            ALGORITHMS["ecdsa-p256-sha256"], ec_key(256).private_numbers().private_value.to_bytes(32, "big")
        )
        self.digest = material("digest", 32)


_tokens: list[_Tokens] = []


def the_token() -> _Tokens:
    """The one of this process."""
    if not _tokens:
        _tokens.append(_Tokens())
    return _tokens[0]


def _ciphertext(plain: bytes, aad: bytes, version: int = 1) -> bytes:
    header = b"KQ\x01" + version.to_bytes(4, "big")
    nonce = hashlib.sha256(plain).digest()[:12]
    return header + nonce + AESGCM(material("token aes", 32)).encrypt(nonce, plain, header + aad)


_CIPHERTEXTS: Final = {_ciphertext(plain, b"aad"): plain for plain in (b"", MARK, bytes(600))}


def _take_ciphertext(data: bytes) -> str:
    state = the_token()
    body = Operate("orders", b"", data, b"aad", b"", False, b"")
    check_operation(state.aes.algorithm, "decrypt", body)
    plain = operate(state.lane, state.aes, "decrypt", body, 1)
    require(_CIPHERTEXTS.get(data) == plain, "a changed ciphertext is decrypted")
    return "accepted"


def _take_token_seal(data: bytes) -> str:
    """A sealed blob's bytes, put in for those that the token sealed: lengths and places are changed alike."""
    state = the_token()
    with state.lane.unseal_secret(data, b"context"):
        raise AssertionError("the token opens what it did not seal")


def _take_token_signature(data: bytes) -> str:
    state = the_token()
    state.lane.verify(state.ec, state.digest, data)
    ec_key(256).public_key().verify(data, state.digest, ec.ECDSA(utils.Prehashed(_sha256())))
    return "accepted"


def _sha256() -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def _token_signatures() -> list[bytes]:
    state = the_token()
    n = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    # Deterministic: r and s of a fixed nonce, by hand.
    key, k = ec_key(256).private_numbers().private_value, int.from_bytes(material("k", 31), "big")
    r = ec.derive_private_key(k, ec.SECP256R1()).public_key().public_numbers().x % n
    s = pow(k, -1, n) * (int.from_bytes(state.digest, "big") + r * key) % n
    return [utils.encode_dss_signature(r, s), utils.encode_dss_signature(r, n - s)]


def _take_token_key(data: bytes) -> str:
    """A combined key's bytes loaded into the token, as shares of a lying dealer would make them."""
    state = the_token()
    name, _, public = _take_fields(data)
    key = state.lane.load(ALGORITHMS[name], _, public)
    key.destroy()
    return name


def _take_fields(data: bytes) -> tuple[str, bytes, bytes]:
    try:
        name, secret, public = msgpack.unpackb(data, raw=False)
        good = name in ALGORITHMS and isinstance(secret, bytes) and isinstance(public, bytes) and bool(secret)
    except Exception:  # whatever that library raises
        good = False
    if not good:
        raise ProtocolError("the harness's own fields")
    return name, secret, public


def _token_keys() -> list[bytes]:
    publics = _publics()
    scalar = ec_key(256).private_numbers().private_value.to_bytes(32, "big")
    return [
        msgpack.packb(each, use_bin_type=True)
        for each in (
            ["ecdsa-p256-sha256", scalar, publics[0]],
            ["ed25519", private_key("alice").private_bytes_raw(), publics[2]],
            ["rsa-2048-pss-sha256", _rsa_der()[0], publics[3]],
            ["aes-128-gcm", bytes(16), b""],
            ["hmac-sha512", bytes(20), b""],
        )
    ]


def _change_token_key(r: Random, data: bytes, donor: bytes) -> bytes:
    """The key's DER or its public key's, or any field."""
    try:
        fields, theirs = msgpack.unpackb(data, raw=False), msgpack.unpackb(donor, raw=False)
        place = 1 + int(r.random() * 2)
        fields[place] = change_der(r, fields[place], theirs[place])
        return msgpack.packb(fields, use_bin_type=True)
    except Exception:  # not these fields any more: whatever that library raises
        return change_message(r, data, donor)


def format_targets() -> list[Target]:
    """All of them."""
    values = (ValueError,)
    config = (ConfigError,)
    made: list[Target] = []

    def target(
        name: str,
        samples: Callable[[], Sequence[bytes]],
        decode: Any,
        change: Any,
        errors: Any,
        weight: float,
        *covers: str,
        **more: Any,
    ) -> None:
        made.append(Target(name, samples, decode, change, errors, weight, covers=covers, **more))

    vault = lambda: [write_vault_part(each) for each in the_world().first.shares.values()]  # noqa: E731 # one line each
    names = lambda: [b"secret.042", b"secret.255", b"a.b/secret.001"]  # noqa: E731
    sharing = "engine.sharing.formats."
    target("share/vault", vault, _take_vault, change_blob, values, 2, sharing + "read_vault_part")
    target("share/gfshare-name", names, _take_index, change_text, values, 2, sharing + "gfshare_index")
    target(
        "share/slip39",
        _slip_samples,
        _take_slip39,
        change_message,
        (ValueError, ShareCorrupt, ProtocolError),
        1,
        sharing + "slip39_recover",
        sharing + "slip39_interpolate",
        sharing + "_slip39_digest",
    )
    target(
        "share/combine",
        _combine_samples,
        _take_combine,
        change_message,
        (ValueError, ShareCorrupt, ProtocolError),
        1,
        "engine.sharing.combiner.reconstruct_key",
        sharing + "gfshare_combine",
    )
    target(
        "seal/share",
        _seal_target_samples,
        _take_seal,
        change_message,
        (EngineError, ValueError),
        2,
        "nodes.store.unseal_share",
        "nodes.store.unseal_plain",
        "nodes.store.seal_context",
    )
    target(
        "store/row",
        _row_samples,
        _take_row,
        change_message,
        (StoreCorrupt, ProtocolError),
        0.5,
        "nodes.store.ShareStore._checked",
        "nodes.store.tag_of",
    )
    target(
        "store/file",
        _database_samples,
        _take_database,
        _change_database,
        (EngineError,),
        0.005,
        "nodes.store.ShareStore.__init__",
        "nodes.store.ShareStore.secret",
        cpu_s=2.0,
    )
    target(
        "registry/row",
        lambda: [msgpack.packb(the_stores().registry_row, use_bin_type=True)],
        _take_registry_row,
        change_message,
        (EngineError,),
        0.5,
        "balancer.registry.SqlRegistry._row",
        "balancer.registry._Row.text",
    )
    secret = {"secrets": (MARK, PIN)}
    target(
        "text/node.toml",
        _node_toml,
        _take_node_toml,
        change_text,
        config,
        0.25,
        "nodes.config.load_node_config",
        "nodes.config._token",
        "engine.client.config.load_config",
        "engine.client.config._number_at",
        **secret,
    )
    target(
        "text/balancer.toml",
        _balancer_toml,
        _toml_target(BalancerConfig, "balancer.toml"),
        change_text,
        config,
        0.1,
        "balancer.config.load_settings",
        **secret,
    )
    target(
        "text/client.toml", _client_toml, _toml_target(ClientConfig, "client.toml"), change_text, config, 0.1, **secret
    )
    target("text/policy.toml", _policy_toml, _take_policy, change_text, config, 0.1, "engine.cli.cluster._read_policy")
    target(
        "text/identity.toml",
        _identity_toml,
        _take_identity,
        change_text,
        config,
        0.15,
        "engine.client.config.load_identity",
        secrets=identity_secrets(),
    )
    target(
        "text/card",
        _card_text,
        _take_card,
        change_text,
        config,
        0.3,
        "engine.client.config.read_card",
        "engine.client.config.read_armored",
    )
    target(
        "text/pin",
        lambda: [PIN + b"\n", b"pin"],
        _take_pin,
        change_text,
        config,
        0.3,
        "nodes.config.PinSource.read",
        **secret,
    )
    uri = b"pkcs11:token=my%20node;?pin-source=file:/run/pin&module-path=/lib/x.so"
    uris = lambda: [uri, b"pkcs11:token=a?pin-value=" + PIN, b"pkcs11:token=a;pin-source=env:PIN"]  # noqa: E731
    target("text/pkcs11-uri", uris, _take_uri, change_text, config, 2, "nodes.config.parse_uri", **secret)
    places = lambda: [b"file:../pin", b"env:KQ_PIN", b"../pin", PIN + b":" + PIN, PIN]  # noqa: E731
    target("text/pin-source", places, _take_pin_source, change_text, config, 0.5, "nodes.config._pin_source", **secret)
    target(
        "text/traceparent",
        lambda: [b"00-" + b"4b" * 16 + b"-00f067aa0ba902b7-01", b"cc-" + b"4b" * 16 + b"-00f067aa0ba902b7-00-more"],
        _take_traceparent,
        change_text,
        values,
        1,
        "engine.protocol.trace.read_traceparent",
    )
    points = lambda: [b"dealer.create.reserved=kill; holder.commit.written=kill@3; registry.commit.before=delay:200"]  # noqa: E731
    target("text/failpoints", points, _take_failpoints, change_text, config, 0.5, "engine.failpoints.parse")
    target(
        "text/pin-hex",
        lambda: [the_world().pin.hex().encode()],
        _take_pin_hex,
        change_text,
        values,
        1,
        "engine.cli.cluster.pin_bytes",
    )
    globs = lambda: [b"app/*\napp/orders", b"b[ao]x\nbox", b"*a*a*a*b\naaaaaaaaaaaaaaaaaaaaaaaa", b"[!a-c]?*\ndef"]  # noqa: E731
    target(
        "text/policy-pattern",
        globs,
        _take_pattern,
        change_text,
        (ProtocolError,),
        0.5,
        "engine.protocol.manifest._matches",
    )
    target(
        "text/cluster-file",
        lambda: [the_world().chain],
        _take_cluster_file,
        change_message,
        (EngineError,),
        0.2,
        "engine.client.config.load_cluster",
        cpu_s=1.0,
    )
    target(
        "file/stream",
        _stream_samples,
        _take_stream,
        _change_stream,
        (InvalidTag,),
        1,
        "engine.client.files.decrypt_stream",
        "engine.client.files._cipher_chunks",
    )
    log = lambda: [b"\n".join(_log_lines()) + b"\n", b"\n".join(_log_lines()[:3]) + b"\n"]  # noqa: E731
    target(
        "audit/line",
        _log_lines,
        _take_line,
        change_text,
        (ProtocolError,),
        3,
        "engine.protocol.audit.read_link",
        "engine.protocol.audit.read_record",
    )
    target(
        "audit/show",
        _log_lines,
        _take_shown,
        change_text,
        (ProtocolError,),
        0.5,
        "engine.cli.audit._json_line",
        "engine.cli.audit._text",
    )
    target(
        "text/name",
        lambda: [b"app/orders", b"a" * 128],
        _take_name,
        change_text,
        values,
        0.5,
        "engine.client.calls.check_name",
    )
    target(
        "text/encoded",
        lambda: [b"h00ff", b"b" + base64.b64encode(MARK)],
        _take_encoded,
        change_text,
        values,
        0.5,
        "engine.cli.output.decode_bytes",
    )
    target(
        "audit/log",
        log,
        _take_log,
        _change_log,
        (ProtocolError,),
        1,
        "engine.protocol.audit.ChainCheck._content",
        "engine.protocol.audit.head_of_text",
        "nodes.audit._check_tail",
        cpu_s=1.0,
    )
    target(
        "audit/segment",
        log,
        _take_segment,
        _change_log,
        config,
        0.3,
        "nodes.audit._read_end",
        "nodes.audit._log_id",
        "nodes.audit._kept_records",
        "nodes.audit._torn_text",
    )
    target(
        "key/material",
        _materials,
        _take_material,
        change_der,
        values,
        0.03,
        "engine.keys.normalize_material",
        "engine.keys.check_material",
        "engine.keys._load_pkcs8",
        "engine.keys.load_private_key",
        cpu_s=3.0,
    )
    target("key/public", _publics, _take_public, change_der, values, 0.5, "engine.keys.public_key_pem")
    target(
        "key/rsa-der",
        _rsa_der,
        _take_rsa,
        change_der,
        values,
        1,
        "nodes._fasttoken.rsa_from_der",
    )
    target(
        "key/ecdsa-signature",
        _ecdsa_signatures,
        _take_ecdsa,
        change_der,
        (InvalidSignature,),
        2,
        "nodes._fasttoken.ecdsa_from_der",
    )
    target(
        "balancer/stats",
        _stats_samples,
        _take_stats,
        change_message,
        (ProtocolError,),
        0.3,
        "balancer.history.History.observe",
    )
    refusals = (SeriesError, ValueError, RecursionError)  # what Source.look takes for a source that is out
    target(
        "series/reply",
        lambda: [b"17.5", b'{"length": 3, "other": [1, null]}'],
        _take_reply,
        change_text,
        refusals,
        0.3,
        "balancer.series.read_reply",
    )
    for suffix, sample in _EVENTS.items():
        target(
            f"series/events{suffix}",
            lambda sample=sample: [sample],
            _take_events(suffix),
            change_text,
            refusals,
            0.3,
            "balancer.series._toml_events",
        )
    target(
        "series/values",
        lambda: [b"time,value\n1800000000,5\n2027-01-15T08:00:00Z,7.25\n"],
        _take_values,
        change_text,
        refusals,
        0.3,
        "balancer.series.read_values",
    )
    target(
        "token/ciphertext",
        lambda: list(_CIPHERTEXTS),
        _take_ciphertext,
        change_blob,
        (InvalidTag,),
        0.1,
        "nodes.token.Lane.decrypt",
        "nodes.operations.bound",
    )
    target(
        "token/seal",
        lambda: [material("sealed", 12 + 64 + 16)],
        _take_token_seal,
        change_blob,
        (InvalidTag,),
        0.05,
        "nodes.token.Lane.unseal_secret",
    )
    target(
        "token/signature",
        _token_signatures,
        _take_token_signature,
        change_der,
        (InvalidSignature,),
        0.05,
        "nodes.token.Lane.verify",
    )
    target(
        "token/key",
        _token_keys,
        _take_token_key,
        _change_token_key,
        (EngineError,),
        0.02,
        "nodes.token.Lane.load",
        "nodes.token._check_point",
        cpu_s=2.0,
    )
    return made
