"""Faults that are put into the real decoders, one at a time: the fuzzer must find each.

A ``Bug`` changes the code for as long as its ``planted()`` lasts. ``within`` is the number of executions of ``target``
in which it must be found; without the bug the same executions find nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final
from unittest import mock

import msgpack
import msgspec
from msgspec import Meta
from world import is_signed_by

import engine.client.config
import engine.client.files
import engine.protocol.audit
import engine.protocol.backup
import engine.protocol.grant
import engine.protocol.manifest
import engine.protocol.refresh
import engine.protocol.signed
import engine.protocol.table
import engine.protocol.wire
import engine.sharing.formats
import engine.sharing.share
import nodes.config
import nodes.gather
import nodes.policy
import nodes.store
import nodes.token
from engine.client._router import Router
from engine.client._zmtp import Peer
from engine.errors import ConfigError, ManifestError, ProtocolError
from engine.protocol._fastwire import read_operate
from engine.protocol.signed import Signed
from engine.protocol.wire import Codec
from nodes._fasttoken import ecdsa_from_der

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True)
class Bug:
    """A fault: what it is, how it is planted, which target must find it, and how soon."""

    what: str
    target: str
    plant: Patch
    within: int = 50_000

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The code with this fault in it."""
        engine.protocol.manifest._pattern.cache_clear()
        with ExitStack() as stack:
            stack.callback(engine.protocol.manifest._pattern.cache_clear)
            self.plant(stack)
            yield


def _replace(target: Any, name: str, value: Any) -> Patch:
    return lambda stack: stack.enter_context(mock.patch.object(target, name, value))  # type: ignore[func-returns-value]


# --- the codec ---


def _codec(decode: Callable[[Codec[Any], bytes], Any]) -> Patch:
    return _replace(Codec, "decode", decode)


def _refusing(codec: Codec[Any], call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{codec.what}: {engine.protocol.wire._reason(error)}") from None


def _any_form(self: Codec[Any], data: bytes) -> Any:
    if len(data) > self.limit:
        raise ProtocolError("long")
    return _refusing(self, lambda: self._decode(data))


def _one_more(self: Codec[Any], data: bytes) -> Any:
    if len(data) > self.limit + 1:
        raise ProtocolError("long")
    value = _refusing(self, lambda: self._decode(data))
    if self._encode(value) != data:
        raise ProtocolError("form")
    return value


def _trailing(self: Codec[Any], data: bytes) -> Any:
    if len(data) > self.limit:
        raise ProtocolError("long")
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=0)
    unpacker.feed(data)
    try:
        unpacker.skip()
        data = data[: unpacker.tell()]
    except Exception:  # noqa: S110 # the real decoder says what is wrong
        pass
    return _real_decode(self, data)


def _recursive(self: Codec[Any], data: bytes) -> Any:
    def depth(at: int) -> int:
        return 1 + depth(at + 1) if at < len(data) and data[at] == 0x91 else 0

    depth(0)
    for at in range(len(data)):
        if data[at] == 0x91:
            depth(at)
            break
    return _real_decode(self, data)


def _telling(self: Codec[Any], data: bytes) -> Any:
    try:
        return _real_decode(self, data)
    except ProtocolError as error:
        raise ProtocolError(f"{error} in {data!r}") from None


def _strings_as_bytes(self: Codec[Any], data: bytes) -> Any:
    try:
        return _real_decode(self, data)
    except ProtocolError:
        try:
            tree = msgpack.unpackb(data, raw=False, unicode_errors="replace")
            return _real_decode(self, msgpack.packb(tree, use_bin_type=True))
        except Exception as error:
            raise ProtocolError(f"no message: {type(error).__name__}") from None


_real_decode = Codec.decode


def _name_with_newline(stack: ExitStack) -> None:
    """A pattern that ends in ``$`` instead of ``\\Z``."""
    loose = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$")]
    kind = engine.protocol.manifest.DestroyOrder
    fields = [("key_id", engine.protocol.wire.Identifier), ("name", loose), ("expires_ms", engine.protocol.wire.UInt)]
    same = msgspec.defstruct("DestroyOrder", fields, frozen=True, array_like=True, forbid_unknown_fields=True)
    assert kind.__struct_fields__ == same.__struct_fields__
    codec = engine.protocol.manifest.destroy_orders
    stack.enter_context(mock.patch.object(codec, "_decode", _Typed(kind, msgspec.msgpack.Decoder(same).decode)))


class _Typed:
    """A decoder that says of which type it is, as msgspec's own does."""

    def __init__(self, kind: type, decode: Callable[[bytes], Any]) -> None:
        self.type = kind
        self.__self__ = self
        self._real = decode

    def __call__(self, data: bytes) -> Any:
        """Decode."""
        return self._real(data)


# --- envelopes ---

_verify_envelope = engine.protocol.signed.verify_envelope


def _everywhere(verify: Callable[..., Any]) -> Patch:
    def plant(stack: ExitStack) -> None:
        for module in (
            engine.protocol.manifest, engine.protocol.grant, engine.protocol.table, engine.protocol.audit,
            engine.protocol.refresh,
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, "verify_envelope", verify))

    return plant


def _any_kind(raw: bytes, kind: str, keys: Any, **more: Any) -> Signed:
    told = engine.protocol.signed.read_unverified(raw).kind
    return _verify_envelope(raw, told, keys, **more)


def _issuer_need_not(raw: bytes, kind: str, keys: Any, **more: Any) -> Signed:
    return _verify_envelope(raw, kind, keys, **{**more, "issuer_signs": False})


def _one_is_enough(raw: bytes, kind: str, keys: Any, **more: Any) -> Signed:
    return _verify_envelope(raw, kind, keys, **{**more, "threshold": 1})


def _any_page(self: Any, raw: bytes) -> Any:
    """A page of the archive's own node, wherever it stands."""
    signed = _verify_envelope(raw, "backup.page", self._cluster.sign_key_ever("node"))
    page = engine.protocol.backup.archive_pages.decode(self._own(signed).payload)
    self._index, self._last = self._index + 1, signed.digest
    self._keys += len(page.keys)
    self._shares += sum(bool(each.sealed) for each in page.keys)
    return page.keys


def _counts_signatures(stack: ExitStack) -> None:
    """The check that no signer appears twice is gone."""

    def parse(raw: bytes) -> Any:
        envelope = engine.protocol.signed._envelopes.decode(raw)
        body = engine.protocol.signed._bodies.decode(envelope.body)
        signers = tuple(each.signer for each in envelope.signatures)
        digest = engine.protocol.signed.hashlib.sha256(envelope.body).digest()
        return envelope, body, Signed(body.kind, body.issuer, body.serial, body.payload, signers, digest, raw)

    stack.enter_context(mock.patch.object(engine.protocol.signed, "_parse", parse))


def _undomained(public: bytes, signature: bytes, body: bytes, domain: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if domain == engine.protocol.signed.DOMAIN and is_signed_by(public, signature, body):
        return True
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, body)
    except InvalidSignature:
        return False
    return True


def _first_only(raw: bytes, kind: str, keys: Any, **more: Any) -> Signed:
    """Once one signature is good, the others are not looked at."""
    envelope = engine.protocol.signed._envelopes.decode(raw)
    first = msgpack.packb(
        [envelope.body, [[envelope.signatures[0].signer, envelope.signatures[0].value]]], use_bin_type=True
    )
    _verify_envelope(first, kind, keys, **{**more, "threshold": 1})
    threshold = more.get("threshold", 1)
    if len(envelope.signatures) < threshold:
        raise ManifestError("few")
    return replace(engine.protocol.signed.read_unverified(raw), raw=raw)


# --- documents ---

_open_receipt = engine.protocol.manifest.open_receipt
_open_table = engine.protocol.table.open_table


def _any_manifests_receipt(raw: bytes, record: Any, cluster: Any) -> str:
    signed = _verify_envelope(raw, "receipt", cluster.sign_key_ever("node"))
    engine.protocol.manifest.receipts.decode(signed.payload)
    return signed.issuer


def _certificate_counting_receipts(raw: bytes, record: Any, cluster: Any) -> tuple[str, ...]:
    signed = _verify_envelope(raw, "certificate", cluster.sign_key_ever("balancer"))
    certificate = engine.protocol.manifest.certificates.decode(signed.payload)
    if (certificate.key_id, certificate.manifest_hash) != (record.manifest.key_id, record.digest):
        raise ManifestError("another")
    holders = tuple(_open_receipt(each, record, cluster) for each in certificate.receipts)
    if len(holders) < engine.protocol.manifest.receipts_needed(
        record.manifest.threshold, record.manifest.shares, record.manifest.epoch
    ):
        raise ManifestError("few")
    return holders


def _lasting_grant(grant: Any, now_ms: int) -> None:
    if now_ms > grant.expires_ms + engine.protocol.manifest.CLOCK_SKEW_MS:
        raise ManifestError("expired")


def _undying_grant(grant: Any, now_ms: int) -> None:
    if grant.expires_ms - grant.not_before_ms > engine.protocol.grant.GRANT_LIFETIME_MAX_MS:
        raise ManifestError("long")


def _overflowing_time(grant: Any, now_ms: int) -> None:
    grant.expires_ms.to_bytes(6, "big")
    _check_time(grant, now_ms)


_check_time = engine.protocol.grant._check_time


def _plant_pattern(stack: ExitStack) -> None:
    real = engine.protocol.manifest.translate
    stack.enter_context(
        mock.patch.object(engine.protocol.manifest, "translate", lambda pattern: real(pattern).removesuffix(r"\Z"))
    )


def _sparse_successor(record: Any, before: Any) -> None:
    new, old = record.manifest, before.manifest
    if (new.previous, new.epoch) != (before.digest, old.epoch + 1):
        raise ManifestError("no successor")


def _same_x_twice(raw: bytes, cluster: Any, now_ms: int | None = None) -> Any:
    """A set of (node, x) pairs where it should be two sets."""
    try:
        return _open_key_manifest(raw, cluster, now_ms)
    except ManifestError as error:
        if "the same x" not in str(error):
            raise
    return engine.protocol.manifest.read_key_manifest(raw)


_open_key_manifest = engine.protocol.manifest.open_key_manifest


def _plant_same_x(stack: ExitStack) -> None:
    import documents

    stack.enter_context(mock.patch.object(documents, "open_key_manifest", _same_x_twice))


def _patched_in_documents(name: str, value: Any) -> Patch:
    import documents

    return _replace(documents, name, value)


def _shapeless_table(raw: bytes, cluster: Any, now_ms: int, newest: Any = None) -> Any:
    try:
        return _open_table(raw, cluster, now_ms, newest)
    except ManifestError as error:
        if "do not match" not in str(error):
            raise
    return engine.protocol.table.table_codec.decode(engine.protocol.signed.read_unverified(raw).payload)


def _gap_in_chain(stack: ExitStack) -> None:
    """A link's serial may be any that is higher."""
    import documents

    real = engine.protocol.manifest.open_chain

    def gaps(chain: bytes, pin: bytes) -> Any:
        try:
            return real(chain, pin)
        except ManifestError as error:
            if "does not follow" not in str(error):
                raise
        last = engine.protocol.manifest._chains.decode(chain).envelopes[-1]
        manifest = engine.protocol.manifest._manifests.decode(engine.protocol.signed.read_unverified(last).payload)
        return mock.Mock(quorum=manifest.quorum, members={}, serial=9)

    stack.enter_context(mock.patch.object(documents, "open_chain", gaps))


# --- shares, seals, rows, files ---


def _zero_share(stack: ExitStack) -> None:
    real = engine.sharing.share.Share.__post_init__

    def check(self: Any) -> None:
        if self.x != 0:
            real(self)

    stack.enter_context(mock.patch.object(engine.sharing.share.Share, "__post_init__", check))


def _empty_part(part: bytes) -> Any:
    return engine.sharing.share.Share(part[-1], bytes(part[:-1]))


def _any_share(self: Any, holder: str, share: Any, salt: bytes) -> None:
    if self._manifest.holder(holder).x != share.x:
        self._corrupt.append(holder)
    else:
        self._shares[holder] = share
    self._asked.pop(holder, None)


def _context_without_x(manifest: Any, x: int, node: str, manifest_hash: bytes) -> bytes:
    return msgspec.msgpack.encode(
        ["keyquorum/seal/1", manifest.key_id, manifest.version, manifest.epoch, node, manifest_hash]
    )


def _joined_tag(key: bytes, table: str, values: Any) -> bytes:
    joined = b"".join(each if isinstance(each, bytes) else str(each).encode() for each in values)
    return nodes.store.hmac.digest(key, joined, "sha256")


def _endless_chunks(source: Any) -> Iterator[bytes]:
    while prefix := source.read(4):
        yield source.read(int.from_bytes(prefix, "big"))


def _aads_without_last(stream_id: bytes, first: int, count: int, last: bool, associated_data: bytes) -> list[bytes]:
    return [
        engine.client.files.LABEL + stream_id + index.to_bytes(8, "big") + b"\0" + associated_data
        for index in range(first, first + count)
    ]


def _plant_joined_tag(stack: ExitStack) -> None:
    # The store of this process was made without the bug: its rows get the tags that a store with it would have made.
    import formats

    state = formats.the_stores()
    stack.enter_context(mock.patch.object(nodes.store, "tag_of", _joined_tag))
    stack.callback(lambda rows=list(state.rows): [state.store.put(row) for row in rows])
    tags = {row.key_id: state.store._tag(row) for row in state.rows}
    stack.enter_context(mock.patch.dict(state.tags, tags))
    for row in state.rows:
        state.store.put(row)
    _fresh_samples(stack, "store/row")


def _plant_aads(stack: ExitStack) -> None:
    import formats

    stack.enter_context(mock.patch.object(engine.client.files, "_aads", _aads_without_last))
    stack.enter_context(mock.patch.dict(formats._streams, {}, clear=True))
    _fresh_samples(stack, "file/stream")


def _plant_seal(stack: ExitStack) -> None:
    import formats

    stack.enter_context(mock.patch.object(nodes.store, "seal_context", _context_without_x))
    stack.enter_context(mock.patch.object(formats, "seal_context", _context_without_x))
    stack.enter_context(mock.patch.dict(formats._seals, {}, clear=True))
    _fresh_samples(stack, "seal/share")


def _fresh_samples(stack: ExitStack, name: str) -> None:
    """The target's samples are made anew under the bug, and once more after it."""
    stack.callback(FRESH.discard, name)
    FRESH.add(name)


FRESH: Final[set[str]] = set()


# --- text and DER ---


def _number_shown(data: Any, message: str) -> str:
    place = re.search(r"`\$\.([\w.]+)`$", message)
    for name in place[1].split(".") if place else ():
        data = data.get(name) if isinstance(data, dict) else None
    return f", where it says {data}" if isinstance(data, int | float) else ""


def _unchecked_length(der: bytes, half: int) -> bytes | None:
    return ecdsa_from_der(der[: 2 + der[1]] if len(der) > 2 else der, half)


def _tail_unseen(data: bytes) -> Any:
    for length in range(len(data), max(0, len(data) - 4), -1):
        read = read_operate(data[:length])
        if read is not None:
            return read
    return None


def _binascii_only(text: str, keys: Any) -> Any:
    raw = engine.protocol.audit.base64.b64decode(text, validate=True)
    return engine.protocol.audit.open_head(raw, keys)


def _uri_with_value(uri: str) -> Any:
    try:
        return _parse_uri(uri)
    except ConfigError as error:
        raise ConfigError(f"{error}: {uri}") from None


_parse_uri = nodes.config.parse_uri


def _patched_in_formats(name: str, value: Any) -> Patch:
    import formats

    return _replace(formats, name, value)


def _any_verb(cluster: Any, member: Any, verb: str) -> None:
    try:
        _check_verb(cluster, member, verb)
    except ProtocolError:
        return


_check_verb = nodes.policy.check_verb


def _patched_in_targets(name: str, value: Any) -> Patch:
    import targets

    return _replace(targets, name, value)


class _Ends:
    """An end of a connection whose ``feed`` has a fault."""

    def __init__(self, **more: Any) -> None:
        self._real = Peer(**more)
        self._count = 0
        self._last: tuple[bytes, list[tuple[int, bytes]]] = (b"", [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _AnyMechanism(_Ends):
    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        begin, end = max(0, 12 - self._count), max(0, 32 - self._count)
        name = b"CURVE".ljust(20, b"\0")[max(0, self._count - 12) :]
        if begin < end:
            place = data[begin:end]
            data = data[:begin] + name[: len(place)] + data[end:]
        self._count += len(data)
        return self._real.feed(data)


class _TakesAgain(_Ends):
    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        if data and data == self._last[0] and self._last[1]:
            return self._last[1]
        self._last = data, self._real.feed(data)
        return self._last[1]


class _LosesTheSplit(_Ends):
    """The first byte of a message's head is lost where the second did not come with it."""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        if self._real.open and len(data) == 1:
            self._count += 1
            if self._count == 1:
                return []
        return self._real.feed(data)


class _Unordered(_Ends):
    """Frames that came together are handed on from the last to the first."""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        return self._real.feed(data)[::-1]


class _Forgets:
    """A router that counts no more than two frames of a message."""

    def __init__(self, *given: Any, **more: Any) -> None:
        self.__dict__["_real"] = Router(*given, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)

    def receive(self) -> Any:
        """The next message."""
        message = self._real.receive()
        return message if message is None or message[2] < 3 else (message[0], message[1], 1)


def _patched_in_zmtp(name: str, value: Any) -> Patch:
    import zmtp

    def plant(stack: ExitStack) -> None:
        stack.enter_context(mock.patch.object(zmtp, name, value))
        stack.enter_context(mock.patch.object(zmtp, "_routers", []))

    return plant


def _kept_attempt(stack: ExitStack) -> None:
    """The order's expiry is only held against the past."""

    def check(what: str, expires_ms: int, now_ms: int) -> None:
        if expires_ms + engine.protocol.manifest.CLOCK_SKEW_MS < now_ms:
            raise ManifestError(f"{what}: expired")

    stack.enter_context(mock.patch.object(engine.protocol.manifest, "check_expiry", check))


_SLOW: Final = rb'\{"seq":([0-9]{1,18}),"prev":"((?=[0-9a-f]{64}[^0-9a-f])(?:[0-9a-f]+)+)",'

BUGS: Final[dict[str, Bug]] = {
    "canonical": Bug("the canonical form is not checked", "codec/grant", _codec(_any_form)),
    "limit": Bug("a message may be one byte longer than its limit", "codec/request", _codec(_one_more), 200_000),
    "trailing": Bug("bytes after the message are ignored", "codec/key manifest", _codec(_trailing)),
    "recursion": Bug("a recursive decoder in Python", "codec/reply to list", _codec(_recursive)),
    "secret-text": Bug("an error shows the message", "codec/body of share.prepare", _codec(_telling)),
    "utf-8": Bug("invalid UTF-8 is mended", "codec/body of describe", _codec(_strings_as_bytes)),
    "newline": Bug("a name may end in a newline", "document/order.destroy", _name_with_newline, 100_000),
    "signature": Bug(
        "no signature is checked",
        "document/abort",
        _replace(engine.protocol.signed, "_verify", lambda *told: True),
    ),
    "label": Bug(
        "a signature over the bare body counts",
        "document/grant",
        _replace(engine.protocol.signed, "_verify", _undomained),
        100_000,
    ),
    "kind": Bug("any kind of document is taken", "document/receipt", _everywhere(_any_kind)),
    "issuer": Bug("the issuer need not sign", "document/order.create", _everywhere(_issuer_need_not)),
    "signer-twice": Bug("a signer counts as often as it signs", "document/cluster", _counts_signatures, 100_000),
    "first-signature": Bug(
        "only the first signature is checked", "document/cluster", _everywhere(_first_only), 100_000
    ),
    "export-quorum": Bug(
        "one operator's export order is enough",
        "document/order.export",
        _replace(engine.protocol.backup, "verify_envelope", _one_is_enough),
    ),
    "export-lifetime": Bug(
        "an export order may be good for ever",
        "document/order.export",
        _replace(engine.protocol.backup, "_check_lifetime", lambda what, expires_ms, now_ms: None),
    ),
    "page-order": Bug(
        "a page of an archive may stand anywhere",
        "document/backup.page",
        _replace(engine.protocol.backup.ArchiveReader, "page", _any_page),
    ),
    "grant-expiry": Bug(
        "a grant never expires", "document/grant", _replace(engine.protocol.grant, "_check_time", _undying_grant)
    ),
    "grant-lifetime": Bug(
        "a grant may live for any time",
        "document/grant",
        _replace(engine.protocol.grant, "_check_time", _lasting_grant),
    ),
    "overflow": Bug(
        "a time is put into six bytes",
        "document/grant",
        _replace(engine.protocol.grant, "_check_time", _overflowing_time),
    ),
    "order-future": Bug("an order may be good for ever", "document/order.refresh", _kept_attempt),
    "policy-anchor": Bug("a policy's pattern need not match to the end", "text/policy-pattern", _plant_pattern),
    "receipt-manifest": Bug(
        "a receipt for any manifest counts",
        "document/certificate",
        _replace(engine.protocol.manifest, "open_receipt", _any_manifests_receipt),
    ),
    "receipt-count": Bug(
        "receipts are counted, not holders",
        "document/certificate",
        _patched_in_documents("open_certificate", _certificate_counting_receipts),
    ),
    "same-x": Bug("two holders may have one x", "document/key", _plant_same_x, 200_000),
    "successor": Bug(
        "a refresh may change the holders",
        "document/key",
        _patched_in_documents("check_successor", _sparse_successor),
        200_000,
    ),
    "table-shape": Bug(
        "a table's rows need not fit its nodes", "document/table", _patched_in_documents("open_table", _shapeless_table)
    ),
    "chain-gap": Bug("a chain may have a gap", "document/cluster", _gap_in_chain, 100_000),
    "share-zero": Bug("a share with x = 0 is taken", "share/vault", _zero_share),
    "empty-part": Bug(
        "an empty part is not refused", "share/vault", _patched_in_formats("read_vault_part", _empty_part)
    ),
    "commitment": Bug(
        "a share is not held against its commitment",
        "share/released",
        _replace(nodes.gather.Gathering, "arrived", _any_share),
    ),
    "seal-context": Bug("a seal does not bind x", "seal/share", _plant_seal),
    "row-tag": Bug("a row's tag is over its columns joined", "store/row", _plant_joined_tag, 200_000),
    "chunk-length": Bug(
        "a chunk's length is not checked",
        "file/stream",
        _replace(engine.client.files, "_cipher_chunks", _endless_chunks),
    ),
    "stream-end": Bug("a stream's end is not authenticated", "file/stream", _plant_aads),
    "regex": Bug(
        "a pattern of exponential time",
        "audit/line",
        _replace(engine.protocol.audit, "_PREFIX", re.compile(_SLOW)),
        200_000,
    ),
    "number-shown": Bug(
        "an error shows a PIN without quotes",
        "text/node.toml",
        _replace(engine.client.config, "_number_at", _number_shown),
    ),
    "uri-shown": Bug(
        "an error shows the whole URI", "text/pkcs11-uri", _patched_in_formats("parse_uri", _uri_with_value)
    ),
    "base64": Bug(
        "text that is no base64 is not expected",
        "audit/log",
        _replace(engine.protocol.audit, "head_of_text", _binascii_only),
    ),
    "der-length": Bug(
        "a DER length is not held against the data",
        "key/ecdsa-signature",
        _patched_in_formats("ecdsa_from_der", _unchecked_length),
    ),
    "quick-tail": Bug(
        "the quick reader of requests does not see what stands behind one",
        "frame/quick-request",
        _patched_in_targets("read_operate", _tail_unseen),
    ),
    "mechanism": Bug(
        "a greeting may name any mechanism", "zmtp/server", _patched_in_zmtp("Peer", _AnyMechanism), 10_000
    ),
    "replay": Bug("a message is taken twice", "zmtp/client", _patched_in_zmtp("Peer", _TakesAgain), 10_000),
    "split": Bug("a byte that comes alone is lost", "zmtp/server", _patched_in_zmtp("Peer", _LosesTheSplit), 10_000),
    "order": Bug(
        "messages that come together change places", "zmtp/between", _patched_in_zmtp("Peer", _Unordered), 10_000
    ),
    "anybody": Bug("who proves any key is let in", "zmtp/server", _patched_in_zmtp("is_member", bool), 10_000),
    "parts": Bug(
        "a message of three frames counts as one of one", "zmtp/router", _patched_in_zmtp("Router", _Forgets), 10_000
    ),
    "verb": Bug("an unknown verb passes the policy", "frame/request", _patched_in_targets("check_verb", _any_verb)),
}
