"""Targets for everything that is signed: what is accepted must be what independent rules allow.

A document is changed inside and signed again, by the right member more often than not, so that the checks behind the
signature are reached; or signed by another, twice, under another label, or not at all. The rules here are written anew
from docs/protocol.md and use none of the code that they judge but the algorithms' table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from random import Random
from typing import Any, Final

import msgpack
import msgspec
from mutate import change_message, head, spans
from schema import Reference
from targets import Target, kind_of, require
from world import (
    HOLDERS,
    NODES,
    NOW_MS,
    ROLES,
    RULES,
    Dealt,
    is_signed_by,
    material,
    opened,
    signature,
    the_world,
)

import engine.protocol.audit
import engine.protocol.grant
import engine.protocol.manifest as documents
import engine.protocol.refresh as refresh
import engine.protocol.signed as envelopes
import engine.protocol.table as tables
from balancer.registry import ROW, open_seal
from engine._fastshamir import interpolate
from engine.cli.chains import view_chain
from engine.client.membership import Membership
from engine.errors import EngineError, ManifestError, ProtocolError
from engine.keys import ALGORITHMS, OPERATIONS, RequestType
from engine.protocol.audit import AuditHead, open_head, sign_head
from engine.protocol.grant import check_grant, read_grant
from engine.protocol.manifest import (
    chain_after,
    chain_pin,
    check_successor,
    countersign_chain,
    decode_card,
    encode_card,
    open_abort,
    open_certificate,
    open_chain,
    open_create_order,
    open_destroy_order,
    open_key_manifest,
    open_move_order,
    open_receipt,
    open_refresh_order,
    open_renew_order,
    open_reshare_order,
    read_certificate,
    read_key_manifest,
)
from engine.protocol.refresh import Terms, check_parts, deal_parts, new_share, open_deals, open_part_statement
from engine.protocol.routing import Router
from engine.protocol.settings import open_settings, read_settings, settings_orders, state_of
from engine.protocol.signed import add_signature, read_unverified, sign_envelope
from engine.protocol.table import (
    RoutingTable,
    TableReader,
    open_table,
    pack_service,
    seal_delta,
    seal_table,
    table_delta,
)
from engine.protocol.wire import Load
from engine.sharing import Share
from nodes.witness import Witness

SKEW_MS: Final = 5_000
QUARTER_MS: Final = 15 * 60_000
NAMES: Final = (*ROLES, "stranger", "nobody")
_KINDS: Final = (
    "grant", "receipt", "certificate", "abort", "key", "order.create", "order.destroy", "order.refresh",
    "order.reshare", "order.renew", "order.move", "order.settings", "cluster", "card", "table", "table.delta",
    "audit.head", "registry.row", "refresh.deal", "refresh.part", "x", "",
)  # fmt: skip


# --- changing a document ---


def sign_again(r: Random, body: bytes, signatures: Sequence[Any]) -> bytes:
    """The envelope of a changed body, signed again in one of many ways."""
    rnd = r.random
    names = [each[0] for each in signatures if isinstance(each, list) and len(each) == 2 and isinstance(each[0], str)]
    names = names or ["op"]
    which = rnd()
    how = "real" if which < 0.06 else "tree" if which < 0.16 else "quick"
    kind = rnd()
    if kind < 0.74:
        signed = [[name, signature(name, body, how)] for name in names]
    elif kind < 0.79:
        signed = list(signatures)
    elif kind < 0.83:
        names[int(rnd() * len(names))] = NAMES[int(rnd() * len(NAMES))]
        signed = [[name, signature(name, body, how)] for name in names]
    elif kind < 0.86:
        signed = [[name, signature(NAMES[int(rnd() * len(NAMES))], body, how)] for name in names]
    elif kind < 0.89:
        signed = [[name, signature(name, body, how)] for name in (*names, names[0])]
        signed = signed[1:] if rnd() < 0.5 else [signed[0], signed[0]]
    elif kind < 0.92:
        signed = [[name, signature(name, body, how)] for name in names[1:]]
    elif kind < 0.95:
        names.insert(int(rnd() * 2), NAMES[int(rnd() * len(NAMES))])
        signed = [[name, signature(name, body, how)] for name in names]
    elif kind < 0.975:
        label = ("undomained", "1", "2", "3")[int(rnd() * 4)]
        signed = [[name, signature(name, body, label)] for name in names]
    else:
        last = (bytes(64), b"", b"\xff" * 64, bytes(63), None)[int(rnd() * 5)]
        signed = [*([name, signature(name, body, how)] for name in names[1:]), [names[0], last]]
    return msgpack.packb([body, signed], use_bin_type=True)


def _change_inside(r: Random, payload: bytes, donor: bytes) -> bytes:
    """The payload changed; sometimes a document that is embedded in it, which is signed again too."""
    if r.random() < 0.35:
        inside = [each for each in spans(payload) if each.kind == "bin" and each.end - each.head > 120]
        if inside:
            span = inside[int(r.random() * len(inside))]
            old = payload[span.head : span.end]
            new = change_document(r, old, old)
            return payload[: span.start] + head("bin", len(new)) + new + payload[span.end :]
    return change_message(r, payload, donor)


def change_document(r: Random, raw: bytes, donor: bytes) -> bytes:
    """A signed document changed in its payload, its fields, its envelope or its signatures."""
    rnd = r.random
    found = opened(raw)
    if found is None or rnd() < 0.07:
        return change_message(r, raw, donor)
    fields, body, signatures = found
    kind = rnd()
    if kind < 0.66:
        theirs = opened(donor)
        fields[4] = _change_inside(r, fields[4], theirs[0][4] if theirs else fields[4])
    elif kind < 0.72:
        place = int(rnd() * 4)
        fields[place] = (
            (0, 2, 1)[int(rnd() * 3)],
            _KINDS[int(rnd() * len(_KINDS))],
            NAMES[int(rnd() * len(NAMES))],
            (0, 1, 2, 3, 4, NOW_MS, 2**63 - 1)[int(rnd() * 7)],
        )[place]
    elif kind < 0.78:
        theirs = opened(donor)
        if theirs:
            place = int(rnd() * 5)
            fields[place] = theirs[0][place]
    try:
        changed = msgpack.packb(fields, use_bin_type=True)
    except (TypeError, ValueError, OverflowError):
        changed = body
    if rnd() < 0.05:
        changed = change_message(r, changed, body)
    return sign_again(r, changed, signatures)


# --- independent rules ---

_references: dict[str, Reference] = {}


def reference(codec: Any) -> Reference:
    """The reference decoder of a codec."""
    found = _references.get(codec.what)
    if found is None:
        found = _references[codec.what] = Reference(kind_of(codec), codec.limit)
    return found


def codec_fields(codec: Any) -> tuple[str, ...]:
    """The names of a message's fields, in order."""
    return kind_of(codec).__struct_fields__  # type: ignore[attr-defined, no-any-return]


def keys_of(*roles: str) -> dict[str, bytes]:
    """The public keys of the members of these roles."""
    return {name: the_world().public[name] for name, role in ROLES.items() if role in roles}


def verified(
    raw: bytes, kind: str, keys: Mapping[str, bytes], codec: Any, threshold: int = 1, issuer_signs: bool = True
) -> tuple[str, int, list[Any]]:
    """Issuer, serial and payload of a document that was accepted, if it may be."""
    issuer, serial, payload = good_envelope(raw, kind, keys, threshold, issuer_signs)
    tree = reference(codec).tree(payload)
    require(tree is not None, f"{kind}: a payload that breaks its rules is accepted")
    return issuer, serial, tree


def good_envelope(
    raw: bytes, kind: str, keys: Mapping[str, bytes], threshold: int = 1, issuer_signs: bool = True
) -> tuple[str, int, bytes]:
    """The same with the payload's bytes."""
    envelope = reference(envelopes._envelopes).tree(raw)
    require(envelope is not None, f"{kind}: an envelope that breaks its rules is accepted")
    body, signatures = envelope
    fields = reference(envelopes._bodies).tree(body)
    require(fields is not None, f"{kind}: a body that breaks its rules is accepted")
    _, its_kind, issuer, serial, payload = fields
    require(its_kind == kind, f"{kind}: a document of the kind {its_kind!r} is accepted")
    names = [name for name, _ in signatures]
    require(len(set(names)) == len(names), f"{kind}: a signer counts twice")
    for name, value in signatures:
        require(name in keys, f"{kind}: {name!r} may not sign this, and does")
        require(is_signed_by(keys[name], value, body), f"{kind}: a wrong signature of {name!r} is accepted")
    require(len(names) >= threshold, f"{kind}: {len(names)} signers are enough, {threshold} are needed")
    require(not issuer_signs or issuer in names, f"{kind}: its issuer did not sign")
    return issuer, serial, payload


def allowed(identity: str, operation: str, name: str) -> bool:
    """Whether the world's policy allows it."""
    return any(
        fnmatchcase(identity, rule.identity)
        and fnmatchcase(name, rule.keys)
        and ("*" in rule.operations or operation in rule.operations)
        for rule in RULES
    )


def in_time(what: str, expires_ms: int) -> None:
    """An order that is carried out is neither old nor of a far future."""
    require(expires_ms + SKEW_MS >= NOW_MS, f"{what}: an expired one is accepted")
    require(expires_ms <= NOW_MS + QUARTER_MS + SKEW_MS, f"{what}: one of a far future is accepted")


def _create_order(raw: bytes, now: bool) -> list[Any]:
    issuer, _, tree = verified(raw, "order.create", keys_of("client"), documents.create_orders)
    _, name, algorithm, threshold, shares, operation, expires_ms = tree[:7]
    require(algorithm in ALGORITHMS, "create order: an unknown algorithm is accepted")
    require(threshold <= shares, "create order: a threshold above the number of shares is accepted")
    version, lineage = tree[7] if len(tree) > 7 else 1, tree[8] if len(tree) > 8 else b""
    later = operation == "rotate"
    require(later == (version > 1) and len(lineage) == 16 * later, "create order: a version out of place is accepted")
    if now:
        in_time("create order", expires_ms)
        require(allowed(issuer, operation, name), f"{issuer} may not {operation} {name!r}")
    return tree


def _other_order(raw: bytes, now: bool, kind: str, codec: Any, operation: str) -> list[Any]:
    """An order of a client's, which needs a rule, or without an operation of a balancer's."""
    issuer, _, tree = verified(raw, kind, keys_of("client" if operation else "balancer"), codec)
    fields = codec_fields(codec)
    if now:
        in_time(kind, tree[fields.index("expires_ms")])
    if "fencing" in fields:
        fencing = dict(zip(fields, tree, strict=False)).get("fencing", 0)
        require((fencing > 0) == (not operation), f"{kind}: the fencing epoch {fencing} is accepted")
    if operation:
        require(allowed(issuer, operation, tree[1]), f"{issuer} may not {operation} {tree[1]!r}")
    return tree


def _refresh_order(raw: bytes, now: bool) -> list[Any]:
    return _other_order(raw, now, "order.refresh", documents.refresh_orders, "refresh")


def _renew_order(raw: bytes, now: bool) -> list[Any]:
    return _other_order(raw, now, "order.renew", documents.refresh_orders, "")


def _move_order(raw: bytes, now: bool) -> list[Any]:
    return _reshare_order(raw, now, "order.move", "")


def _reshare_order(raw: bytes, now: bool, kind: str = "order.reshare", operation: str = "reshare") -> list[Any]:
    tree = _other_order(raw, now, kind, documents.reshare_orders, operation)
    _, _, _, threshold, holders, without = tree[:6]
    require(threshold <= len(holders), "reshare order: a threshold above the number of shares is accepted")
    require(len(set(holders)) == len(holders), "reshare order: a node twice")
    require(len(set(without)) == len(without), "reshare order: a node twice is given up")
    require(not now or all(node in NODES for node in holders), "reshare order: a holder is no node")
    trial = tree[9] if len(tree) > 9 else ""
    require(not trial or (operation and trial in holders), f"{kind}: {trial!r} is to try it")
    return tree


def _settings_order(raw: bytes, now: bool) -> list[Any]:
    """A client's settings, which a balancer may have signed too."""
    found = opened(raw)
    require(found is not None, "key settings: what is no envelope is accepted")
    issuer, names = found[0][2], [name for name, _ in found[2]]
    require(ROLES.get(issuer) == "client", f"key settings: {issuer!r}, no client, issues some")
    strangers = [name for name in names if name != issuer and ROLES.get(name) != "balancer"]
    require(not strangers, f"key settings: signed by {strangers}")
    issuer, _, tree = verified(raw, "order.settings", keys_of("client", "balancer"), settings_orders)
    name, _, serial, previous, _, _, destroy_at_ms, expires_ms = tree
    require(previous < serial <= expires_ms, "key settings: a serial out of order is accepted")
    require(destroy_at_ms <= expires_ms + 366 * 86_400_000, "key settings: a destruction of a far future is accepted")
    if now:
        in_time("key settings", expires_ms)
    for operation in ("settings", *(("destroy",) if destroy_at_ms else ())):
        require(allowed(issuer, operation, name), f"{issuer} may not {operation} {name!r}")
    return tree


def _take_settings(raw: bytes) -> str:
    cluster = the_world().cluster
    try:
        settings, now = open_settings(raw, cluster, NOW_MS), True
    except EngineError:
        settings, now = open_settings(raw, cluster, None), False
    tree = _settings_order(raw, now)
    require(settings.booked == (len(opened(raw)[2]) > 1), "key settings: booked without a balancer")
    require([getattr(settings.order, name) for name in codec_fields(settings_orders)] == tree, "key settings: changed")
    require(settings.digest == hashlib.sha256(opened(raw)[1]).digest(), "key settings: another digest")
    state = "destroying" if tree[6] else "enabled" if tree[4] else "disabled"
    require(read_settings(raw) == settings and state_of(settings) == state, "key settings: read otherwise")
    return f"{state}, {'booked' if settings.booked else 'not booked'}"


# --- the targets of a key's documents ---


def _orders(kind: str, opener: Callable[..., Any], rule: Callable[[bytes, bool], list[Any]]) -> Callable[[bytes], str]:
    def decode(raw: bytes) -> str:
        try:
            order, signed = opener(raw, the_world().cluster, NOW_MS)
        except EngineError:
            opener(raw, the_world().cluster, None)
            rule(raw, False)
            return "of a key that exists"
        tree = rule(raw, True)
        require(order.name == tree[1] and signed.digest == hashlib.sha256(opened(raw)[1]).digest(), f"{kind}: changed")
        opener(raw, the_world().cluster, None)
        return "to be carried out"

    return decode


def _take_manifest(raw: bytes) -> str:
    world = the_world()
    now: int | None = NOW_MS
    try:
        record = open_key_manifest(raw, world.cluster, NOW_MS)
    except EngineError:
        now = None
        record = open_key_manifest(raw, world.cluster)
    _, _, tree = verified(raw, "key", keys_of("node"), documents.key_manifests)
    key_id, name, version, epoch, attempt, algorithm, threshold, holders, public, _, order, previous, change = tree[:13]
    sharing, placing = [*tree[13:], b"", b""][:2]
    told = _create_order(order, now is not None and epoch == 1)
    require([key_id, name, algorithm] == told[:3], "key manifest: not what was ordered")
    kind = read_unverified(change).kind if change else ""
    resharing = change if kind == "order.reshare" else sharing
    moving = change if kind == "order.move" else placing
    require(not (kind == "order.reshare" and (sharing or placing)), "key manifest: two reshare orders")
    require(not (kind == "order.move" and placing), "key manifest: two move orders")
    count, since = told[4], 0
    if resharing:
        shape = _reshare_order(resharing, False)
        require(shape[2] < epoch, "key manifest: a reshare order of later on")
        require([key_id, name, threshold] == [*shape[:2], shape[3]], "another shape")
        count, since = len(shape[4]), shape[2]
    else:
        require(threshold == told[3], "key manifest: not the threshold that was ordered")
    if moving:
        shape = _move_order(moving, False)
        require(since < shape[2] < epoch, "key manifest: a move order of later on, or of before the reshare")
        require([key_id, name, threshold] == [*shape[:2], shape[3]], "another shape after a move")
        issuer, grown = read_unverified(moving).issuer, len(holders) > count
        named = any("grow" in rule.operations and allowed(issuer, "grow", name) for rule in RULES)
        require(not grown or named, "key manifest: it grew without a rule")
        count = len(holders) if grown else count
    require(len(holders) == count, "key manifest: not as many holders as were ordered")
    if resharing or moving:
        require([node for node, _, _ in holders] == shape[4], "key manifest: not the holders that were ordered")
        require([x for _, x, _ in holders] == list(range(1, len(holders) + 1)), "key manifest: other indices")
    require(version == (told[7] if len(told) > 7 else 1) and attempt >= 1, "key manifest: version or attempt")
    require(len({node for node, _, _ in holders}) == len(holders), "key manifest: a node holds two shares")
    require(len({x for _, x, _ in holders}) == len(holders), "key manifest: two shares of one x")
    require(bool(public) == ALGORITHMS[algorithm].asymmetric, "key manifest: public key")
    if now is not None:
        require(all(node in NODES for node, _, _ in holders), "key manifest: a holder is no node")
    if epoch == 1:
        require(previous == change == sharing == placing == b"", "key manifest: the first one has a predecessor")
    else:
        require(len(previous) == 32, "key manifest: no predecessor")
        order = _CHANGES.get(kind, _refresh_order)(change, now is not None)
        require([key_id, name, epoch - 1] == order[:3], "key manifest: not the change that was ordered")
    require(read_key_manifest(raw).manifest == record.manifest, "key manifest: read twice, two manifests")
    try:
        check_successor(record, world.first.record)
    except ManifestError:
        return f"epoch {min(epoch, 3)}" + ("" if now is not None else ", old")
    old = world.first.manifest
    require(
        (previous, epoch, attempt > old.attempt) == (world.first.record.digest, 2, True), "a successor that is none"
    )
    require(tree[9] == old.check_value and public == old.public_key, "a new epoch changes more than it may")
    if kind == "order.move":
        require(threshold == old.threshold and not sharing, "a move changes more than it may")
    elif kind != "order.reshare":
        same = [(node, x) for node, x, _ in holders] == [(each.node, each.x) for each in old.holders]
        kept = threshold == old.threshold and not sharing and not placing
        require(same and kept, "a refresh changes more than it may")
    return "successor" + ("" if now is not None else ", old")


_CHANGES: Final = {"order.reshare": _reshare_order, "order.move": _move_order, "order.renew": _renew_order}


def _receipt(raw: bytes, manifest: Any, digest: bytes) -> str:
    issuer, _, tree = verified(raw, "receipt", keys_of("node"), documents.receipts)
    key_id, told, x = tree[:3]
    require((key_id, told) == (manifest.key_id, digest), "a receipt for another manifest")
    require((issuer, x) in {(each.node, each.x) for each in manifest.holders}, "a receipt for another's share")
    return issuer


def _take_receipt(raw: bytes) -> str:
    world = the_world()
    holder = open_receipt(raw, world.first.record, world.cluster)
    require(_receipt(raw, world.first.manifest, world.first.record.digest) == holder, "whose receipt?")
    return f"of {holder}"


def _take_certificate(raw: bytes) -> str:
    world = the_world()
    named = read_certificate(raw)
    record = world.second if named == world.second.digest else world.first.record
    holders = open_certificate(raw, record, world.cluster)
    _, _, tree = verified(raw, "certificate", keys_of("balancer"), documents.certificates)
    key_id, told, inside = tree[:3]
    require((key_id, told) == (record.manifest.key_id, record.digest), "a certificate for another manifest")
    found = {_receipt(each, record.manifest, record.digest) for each in inside}
    needed = 3  # of 2-of-3: t + 1 for the first epoch, all for the second
    require(found == set(holders) and len(found) >= needed, f"{len(found)} holders' receipts are enough")
    return f"epoch {record.manifest.epoch}"


def _take_abort(raw: bytes) -> str:
    open_abort(raw, the_world().cluster)
    verified(raw, "abort", keys_of("balancer"), documents.aborts)
    return "accepted"


def _take_grant(raw: bytes) -> str:
    world = the_world()
    record = world.first.record
    try:
        grant, signed = check_grant(raw, record, "node1", world.cluster, NOW_MS)
    except ProtocolError:
        raise
    except EngineError:
        read_grant(raw)
        raise
    issuer, _, tree = verified(raw, "grant", keys_of("client"), engine.protocol.grant._grants)
    key_id, version, epoch, operations, combiner, begins_ms, expires_ms, nonce = tree[:8]
    told = record.manifest
    require((key_id, version, epoch) == (told.key_id, told.version, told.epoch), "a grant for another key")
    require(combiner == "node1", "a grant for another combiner")
    require(expires_ms - begins_ms <= 30_000, "a grant that lives too long")
    require(begins_ms <= NOW_MS + SKEW_MS, "a grant that has not begun")
    require(expires_ms + SKEW_MS >= NOW_MS, "a grant that expired")
    for each in operations:
        require(each in OPERATIONS and allowed(issuer, each, told.name), f"{issuer} may not {each}")
    require(grant.nonce == nonce and signed.issuer == issuer, "another grant")
    return "accepted"


# --- the targets of the cluster's documents ---


def _take_card(raw: bytes) -> str:
    member = decode_card(raw)
    fields = opened(raw)
    require(fields is not None, "card: no envelope")
    tree = reference(documents._cards).tree(fields[0][4])  # type: ignore[index]
    require(tree is not None, "card: breaks its rules")
    issuer, _, _ = verified(raw, "card", {tree[0]: tree[2]}, documents._cards)
    require(issuer == member.name == tree[0] and member.sign_public == tree[2], "card: of another")
    return member.role


def _envelope_list(chain: bytes) -> list[bytes] | None:
    try:
        (found,) = msgpack.unpackb(chain, raw=False)
        return found if isinstance(found, list) and found and all(isinstance(each, bytes) for each in found) else None
    except Exception:  # whatever that library raises: then it is no chain
        return None


def change_chain(r: Random, chain: bytes, donor: bytes) -> bytes:
    """A chain changed in one link, those behind it fitted to it more often than not."""
    links = _envelope_list(chain)
    if links is None or r.random() < 0.1:
        return change_message(r, chain, donor)
    kind = r.random()
    place = int(r.random() * len(links))
    if kind < 0.08:
        links = links[place:] if r.random() < 0.5 else links[: place + 1]
    elif kind < 0.14:
        links.insert(place, links[int(r.random() * len(links))])
    elif kind < 0.18:
        theirs = _envelope_list(donor) or links
        links[place] = theirs[int(r.random() * len(theirs))]
    else:
        links[place] = change_document(r, links[place], links[int(r.random() * len(links))])
        if r.random() < 0.7:
            _link_again(r, links, place)
    return msgpack.packb([links], use_bin_type=True)


def _link_again(r: Random, links: list[bytes], place: int) -> None:
    for behind in range(place + 1, len(links)):
        before, found = opened(links[behind - 1]), opened(links[behind])
        if before is None or found is None:
            return
        fields, _, signatures = found
        try:
            payload = msgpack.unpackb(fields[4], raw=False)
            payload[1] = hashlib.sha256(before[1]).digest()
            fields[3] = before[0][3] + 1
            fields[4] = msgpack.packb(payload, use_bin_type=True)
            body = msgpack.packb(fields, use_bin_type=True)
            signed = [[name, signature(name, body, "quick")] for name, _ in signatures]
        except Exception:  # not a manifest any more: whatever that library raises
            return
        links[behind] = msgpack.packb([body, signed], use_bin_type=True)


def _retiring_rules(retiring: list[Any], members: list[Any], owned: list[bytes]) -> None:
    """A key that retires is of a member with CURVE, one of each, in nobody's use."""
    roles = {each[0]: each for each in members}
    require(all(each[0] in roles and roles[each[0]][1] != "operator" for each in retiring), "chain: whose key retires?")
    require(len({each[0] for each in retiring}) == len(retiring), "chain: two keys of a member retire")
    keys = [*owned, *(each[1] for each in retiring)]
    require(len(set(keys)) == len(keys), "chain: a key that retires is in use")
    require(all(not roles[each[0]][4] or each[2].startswith("tcp://") for each in retiring), "chain: endpoint")


def _chain_rules(chain: bytes, pin: bytes, complete: bool = True) -> list[Any]:
    """The newest manifest of a chain, if the chain may be accepted."""
    tree = reference(documents._chains).tree(chain)
    require(tree is not None, "chain: breaks its rules")
    (links,) = tree  # type: ignore[misc]
    before: tuple[int, bytes, list[Any]] | None = None
    manifest: list[Any] = []
    for number, raw in enumerate(links):
        fields = opened(raw)
        require(fields is not None, "chain: a link is no envelope")
        inside = reference(documents._manifests).tree(fields[0][4])  # type: ignore[index]
        require(inside is not None, "chain: a manifest breaks its rules")
        trusted = inside if before is None else before[2]
        operators = {each[0]: each[2] for each in trusted[3] if each[1] == "operator"}  # type: ignore[index]
        needed = trusted[2] if complete or number < len(links) - 1 else 1  # type: ignore[index]
        _, serial, manifest = verified(raw, "cluster", operators, documents._manifests, needed)
        digest = hashlib.sha256(fields[1]).digest()  # type: ignore[index]
        name, previous, quorum, members, rules, groups = manifest[:6]
        if before is None:
            require((serial, previous, digest) == (1, b"", pin), "chain: another first manifest than the pinned one")
        else:
            require((serial, previous) == (before[0] + 1, before[1]), "chain: a link does not follow")
            require((name, groups) == (before[2][0], before[2][5]), "chain: name or groups changed")
        require(len({each[0] for each in members}) == len(members), "chain: a name twice")
        owned = [key for each in members for key in ({each[2]} if each[1] == "operator" else {each[2], each[3]})]
        require(len(set(owned)) == len(owned), "chain: a key twice")
        require(1 <= quorum <= sum(each[1] == "operator" for each in members), "chain: quorum")
        for each in members:
            require(each[1] not in ("node", "balancer") or each[4].startswith("tcp://"), "chain: endpoint")
            require(each[1] != "node" or all(each[6].split("/")), "chain: location")
        require(all(each in {"*", *RequestType} for rule in rules for each in rule[2]), "chain: an unknown operation")
        _retiring_rules(manifest[codec_fields(documents._manifests).index("retiring")], members, owned)
        draining = manifest[codec_fields(documents._manifests).index("draining")]
        require(len(set(draining)) == len(draining), "chain: a node is draining twice")
        require(set(draining) <= {each[0] for each in members if each[1] == "node"}, "chain: what is no node drains")
        before = serial, digest, manifest
    return manifest


def _take_chain(raw: bytes) -> str:
    world = the_world()
    chain_pin(raw)
    try:
        cluster = open_chain(raw, world.pin)
    except EngineError:
        view = view_chain(raw, world.pin)  # for people: the newest may lack signatures, nothing else
        require(not view.complete, "view_chain calls complete what open_chain refuses")
        _chain_rules(raw, world.pin, complete=False)
        return "to be signed"
    manifest = _chain_rules(raw, world.pin)
    view = view_chain(raw, world.pin)
    require(
        view.complete and view.serial == cluster.serial and list(view.members) == list(cluster.members.values()), "view"
    )
    require(
        [cluster.name, cluster.quorum, cluster.groups] == [manifest[0], manifest[2], manifest[5]], "another cluster"
    )
    more = countersign_chain(raw, world.keys["op3"])
    _ = cluster.by_curve, cluster.locations, cluster.nodes
    if len(cluster.nodes) <= 8:
        holders = cluster.group_holders(cluster.group_of("orders"))
        require(
            sorted(holders) == sorted(set(cluster.nodes) - cluster.draining), "the holders of a group are not the nodes"
        )
    return f"serial {min(cluster.serial, 4)}" if len(more) else ""


def _take_offer(raw: bytes) -> str:
    """Manifests that another member brings to a process that goes by the first one."""
    world = the_world()
    state = Membership(open_chain(world.first_chain, world.pin), world.first_chain, durable=False)
    told: EngineError | None = None
    for offer in (state.offer_chain, lambda later: state.offer_after(1, later)):
        before = state.cluster
        try:
            taken = offer(raw)
        except EngineError as error:
            told, taken = error, False
        require(taken or state.cluster is before, "a manifest that was refused is in force")
        if taken:
            _chain_rules(state._chain, world.pin)
            require(state.cluster.serial > before.serial, "an older manifest is in force")
            return f"serial {min(state.cluster.serial, 4)}"
    if told is not None:
        raise told
    return "known"


def _whole_table() -> RoutingTable:
    classes = ["encrypt/aes-256-gcm", "sign/ed25519"]
    service = pack_service([[10, 20, 30, 40, 50], [100, 200, 0, 400, 500]])
    return RoutingTable(
        3, 7, NOW_MS, NOW_MS + 10_000, list(NODES), classes, service, [1, 2, 3, 4, 5], [1000, 250],
        [(1, [0, 1, 2]), (1023, [4, 3])], [(1, [4])], [(1000, 2000), (0, 0)],
    )  # fmt: skip


def _table() -> bytes:
    return seal_table(_whole_table(), the_world().keys["balancer"])


def _delta() -> bytes:
    base = _whole_table()
    later = msgspec.structs.replace(
        base, counter=8, service=pack_service([[90, 20, 30, 0, 50], [100] * 5]), price=[0] * 5, groups=[(1, [2])]
    )
    delta = table_delta(base, later)
    require(delta is not None, "no difference where one is wanted")
    return seal_delta(delta, the_world().keys["balancer"])


def _take_table(raw: bytes) -> str:
    world = the_world()
    newest = RoutingTable(2, 9, NOW_MS, NOW_MS, [], [], b"", [], [], [], [], [])
    table = open_table(raw, world.cluster, NOW_MS, newest)
    _, _, tree = verified(raw, "table", keys_of("balancer"), tables.table_codec)
    epoch, counter, _, expires_ms, names, classes, service, prices, caps, groups, hints, forecast = tree[:12]
    require((epoch, counter) > (2, 9), "a table that is older than the one in force")
    require(NOW_MS - SKEW_MS <= expires_ms <= NOW_MS + 3_600_000 + SKEW_MS, "a table that expired, or never does")
    require(len(service) == len(names) * len(classes) and len(prices) == len(names), "table: shape")
    require(len(caps) == len(classes) == len(forecast), "table: shape")
    lines = [*groups, *hints]
    require(all(index < len(names) for _, indexes in lines for index in indexes), "table: a group names no node")
    return _use_table(table, world)


def _take_delta(raw: bytes) -> str:
    world, reader, base = the_world(), TableReader(), _whole_table()
    reader.read(_table(), world.cluster, NOW_MS)
    table = reader.read(raw, world.cluster, NOW_MS, base)
    if read_unverified(raw).kind == "table":
        return _take_table(raw)
    _, _, tree = verified(raw, "table.delta", keys_of("balancer"), tables.delta_codec)
    epoch, counter, _, expires_ms, number, service, prices, groups, hints, forecast = tree[:10]
    require(epoch == 3 and number == 7 and counter > 7, "a difference to another table")
    require(NOW_MS - SKEW_MS <= expires_ms <= NOW_MS + 3_600_000 + SKEW_MS, "a table that expired, or never does")
    require(len(prices) == 5 and len(forecast) == 2, "table: shape")
    require(all(index < 5 for _, indexes in [*groups, *hints] for index in indexes), "table: a group names no node")
    expected = list(base.service)
    for row, column, code in service:
        require(row < 2 and column < 5, "table: a service time of no node or class")
        expected[5 * row + column] = code
    require(list(table.service) == expected and table.price == prices, "a difference is not what it says")
    return _use_table(table, world)


def _use_table(table: RoutingTable, world: Any) -> str:
    names, classes = table.nodes, table.classes
    router = Router(world.cluster)
    router.install(table)
    for key in ("orders", "tls"):
        require(all(each in NODES for each in router.holders(key)), "a holder that is no node")
        for each in (*classes[:3], "encrypt/aes-256-gcm"):
            ranked = router.rank(each, key, NODES, 1.0)
            require(sorted(ranked) == sorted(NODES), "the ranking lost a node")
    router.answered("node1", "orders", "encrypt/aes-256-gcm", Load(2**63 - 1, 2**63 - 1, True), 10.0, 1.0)
    require(len(router.rank("encrypt/aes-256-gcm", "orders", NODES, 1.1)) == len(NODES), "the ranking lost a node")
    return f"{min(len(names), 8)} nodes"


def _head(seq: int = 5) -> bytes:
    head = AuditHead("node2", material("log", 32), seq, material(f"line {seq}", 32), NOW_MS)
    return sign_head(head, the_world().keys["node2"])


def _take_head(raw: bytes) -> str:
    world = the_world()
    head = open_head(raw, world.cluster.sign_key_ever("node"))
    issuer, _, tree = verified(raw, "audit.head", keys_of("node"), engine.protocol.audit._heads)
    node, _, seq = tree[:3]
    require(issuer == node == head.node and seq >= 1, "a head of another's log, or of no line")
    witness = Witness("node1", world.cluster)
    sender = world.cluster.members["node2"]
    witness.hear(_head(), sender, 0.0)
    heard = witness.hear(raw, sender, 1.0)
    require(node == "node2", "a head that another node's connection brought is taken")
    return "known" if heard is None else heard.event


def _take_seal(raw: bytes) -> str:
    world = the_world()
    payload = open_seal(raw, world.cluster)
    require(payload == good_envelope(raw, ROW, keys_of("balancer"))[2], "a seal of a row is of another one")
    return "accepted"


# --- the refresh ---


class _Refresh:
    """A refresh of the world's first key, each step as it must be."""

    def __init__(self) -> None:
        self.world = world = the_world()
        self.order = world.refresh_order(world.first)
        self.terms = Terms.of(world.first.record, 2, self.order)
        self.length = len(world.first.secret)
        self.dealt: dict[str, tuple[bytes, list[bytes]]] = {}
        for node in HOLDERS:
            values = interpolate(
                [16, 17],
                [bytes(self.length + 16), material(f"zero {node}", self.length + 16)],
                [1 ^ 16, 2 ^ 16, 3 ^ 16],
            )
            updates = [Share(x, y) for x, y in zip((1, 2, 3), values, strict=True)]
            drawn = material(f"drawn {node}", 32 * 3)
            sealer = refresh.Sealer(material(f"ephemeral {node}", 32))
            self.dealt[node] = deal_parts(self.terms, world.keys[node], world.cluster, updates, 1, drawn, sealer)
        self.deals = open_deals(self.terms, [self.dealt[node][0] for node in HOLDERS[:2]], world.cluster)
        self.new = {
            node: new_share(
                self.terms, self.deals, self.parts(place), world.first.shares[node], node,
                refresh.Opener(world.curve(node).private_bytes_raw()),
            )
            for place, node in enumerate(HOLDERS)
        }  # fmt: skip
        self.statements = [
            refresh.sign_part_statement(self.terms, self.deals, self.new[node], world.keys[node], 1) for node in HOLDERS
        ]

    def parts(self, place: int) -> list[bytes]:
        """What the first two dealt to a holder."""
        return [self.dealt[node][1][place] for node in HOLDERS[:2]]


_refreshes: list[_Refresh] = []


def the_refresh() -> _Refresh:
    """The one of this process."""
    if not _refreshes:
        _refreshes.append(_Refresh())
    return _refreshes[0]


def _change_list(r: Random, data: bytes, donor: bytes) -> bytes:
    """A list of documents changed: one of them, or the list."""
    try:
        items, theirs = msgpack.unpackb(data, raw=False), msgpack.unpackb(donor, raw=False)
        place = int(r.random() * len(items))
        kind = r.random()
        if kind < 0.75:
            items[place] = change_document(r, items[place], theirs[int(r.random() * len(theirs))])
        elif kind < 0.85:
            r.shuffle(items)
        elif kind < 0.92:
            items.insert(place, items[int(r.random() * len(items))])
        else:
            del items[place]
        return msgpack.packb(items, use_bin_type=True)
    except Exception:  # not a list of documents any more: whatever that library raises
        return msgpack.packb([change_document(r, data, donor)], use_bin_type=True)


def _listed(data: bytes) -> list[bytes]:
    """The input of a target that takes several documents; what is no list of bytes is no input of it."""
    try:
        items = msgpack.unpackb(data, raw=False)
    except Exception:  # whatever that library raises
        items = None
    if not isinstance(items, list) or not all(isinstance(each, bytes) for each in items) or len(items) > 64:
        raise ProtocolError("the harness's own list")
    return items


def _deal_rules(raw: bytes) -> str:
    state = the_refresh()
    issuer, _, tree = verified(raw, "refresh.deal", keys_of("node"), refresh.refresh_deals)
    key_id, version, epoch, attempt, order, previous, commitments = tree[:7]
    told = state.world.first
    require((key_id, version, epoch, attempt) == (told.manifest.key_id, 1, 2, 2), "a deal of another refresh")
    require((order, previous) == (state.terms.order, told.record.digest), "a deal of another order or epoch")
    require(issuer in HOLDERS and len(commitments) == 3, "a deal of no holder, or not for all")
    return issuer


def _take_deals(data: bytes) -> str:
    state = the_refresh()
    raws = _listed(data)
    deals = open_deals(state.terms, raws, state.world.cluster)
    issuers = [_deal_rules(raw) for raw in raws]
    require(len(issuers) == 2 and issuers == sorted(set(issuers)), "deals that are not of t holders in order")
    require([each.dealer.node for each in deals] == issuers, "another dealer")
    return "+".join(issuers)


def _take_statements(data: bytes) -> str:
    state = the_refresh()
    raws = _listed(data)
    told = [open_part_statement(state.terms, state.deals, raw, state.world.cluster) for raw in raws]
    trees = []
    for raw in raws:
        issuer, _, tree = verified(raw, "refresh.part", keys_of("node"), refresh.refresh_parts)
        require(tree[:4] == [state.world.first.manifest.key_id, 1, 2, 2], "a statement on another refresh")
        digests = b"".join(each.digest for each in state.deals)
        require(tree[4] == hashlib.sha256(b"keyquorum/refresh-deals/1\0" + digests).digest(), "on other deals")
        require(issuer in HOLDERS and tree[5] == HOLDERS.index(issuer) + 1 and len(tree[7]) == 2, "not for its share")
        trees.append(tree)
    check_parts(state.terms, state.deals, told)
    require([each.holder.node for each in told] == list(HOLDERS), "not a statement of each holder in order")
    for place in range(2):
        values = [tree[7][place] for tree in trees]
        at_zero = interpolate([1, 2], values[:2], [0, 3])
        require(at_zero == [bytes(16), values[2]], "a deal that does not share zero passes")
    return "accepted"


def _change_part(r: Random, data: bytes, donor: bytes) -> bytes:
    """A sealed part changed, or what is in it, sealed again."""
    if r.random() < 0.5:
        return change_message(r, data, donor)
    state = the_refresh()
    dealer, node = HOLDERS[0], HOLDERS[1]
    plain = bytearray(material(f"drawn {dealer}", 32 * 3)[:32] + bytes(state.length + 16))
    for _ in range(1 + int(r.random() * 3)):
        plain[int(r.random() * len(plain))] = int(r.random() * 256)
    del plain[int(r.random() * 2 * len(plain)) :]
    manifest = state.world.first.manifest
    context = state.terms.part_context(manifest.holders[int(r.random() * 3)], manifest.holders[int(r.random() * 3)])
    public = state.world.curve(node).public_key().public_bytes_raw()
    sealed = refresh.Sealer(material(f"ephemeral {r.random()}", 32)).seal(public, bytes(plain), context)
    return msgpack.packb([sealed, state.parts(1)[1]], use_bin_type=True)


def _take_part(data: bytes) -> str:
    state = the_refresh()
    parts = _listed(data)
    node = HOLDERS[1]
    made = new_share(
        state.terms,
        state.deals,
        parts,
        state.world.first.shares[node],
        node,
        refresh.Opener(state.world.curve(node).private_bytes_raw()),
    )
    require(made == state.new[node], "other parts than the dealers' make another share")
    return "accepted"


# --- envelopes without a kind ---


def _take_envelope(raw: bytes) -> str:
    """What is read without a check, and one more signature put on it."""
    told = read_unverified(raw)
    require(reference(envelopes._envelopes).tree(raw) is not None, "an envelope that breaks its rules is read")
    again = add_signature(raw, the_world().keys["op3"])
    more = read_unverified(again)
    require(more.digest == told.digest and "op3" in more.signers, "another signature changes the document")
    return f"{min(len(told.signers), 5)} signers"


def _all_samples() -> list[bytes]:
    return [*_key_documents(), the_world().grant(the_world().first, "node1"), _table(), _head()]


def _key_documents() -> list[bytes]:
    world = the_world()
    dealt: list[Dealt] = [world.first, world.pair, world.shared]
    return [
        *(each.manifest.order for each in dealt),
        *(world.destroy_order(each) for each in dealt),
        *(world.refresh_order(each, "carol" if each is world.shared else "alice") for each in dealt),
        *(each.record.raw for each in dealt),
        *(world.reshare_order(each, "carol" if each is world.shared else "alice") for each in dealt),
        *(world.renew_order(each) for each in dealt),
        *(world.move_order(each) for each in dealt),
        *(world.settings(each, booked=each is not world.pair) for each in dealt),
        world.second.raw,
        world.moved.raw,
        world.placed.raw,
        world.after.raw,
        *(world.receipt(world.first.record, node) for node in HOLDERS),
        world.certificate(world.first.record),
        world.certificate(world.second),
        world.abort(),
    ]


def _of(kind: str) -> list[bytes]:
    return [raw for raw in _key_documents() if read_unverified(raw).kind == kind]


def document_targets() -> list[Target]:
    """A target for each kind of signed document."""
    world = the_world

    def target(
        name: str, samples: Callable[[], Sequence[bytes]], decode: Any, weight: float, *covers: str, **more: Any
    ) -> Target:
        more = {"change": change_document, "errors": (EngineError,), **more}
        return Target(f"document/{name}", samples, decode, weight=weight / 2, covers=covers, **more)

    manifest, base = "engine.protocol.manifest.", "engine.protocol."
    create = _orders("create order", open_create_order, _create_order)
    destroy = _orders(
        "destroy order", open_destroy_order,
        lambda raw, now: _other_order(raw, now, "order.destroy", documents.destroy_orders, "destroy"),
    )  # fmt: skip
    change = _orders("refresh order", open_refresh_order, _refresh_order)
    renew = _orders("renewal order", open_renew_order, _renew_order)
    reshare = _orders("reshare order", open_reshare_order, _reshare_order)
    move = _orders("move order", open_move_order, _move_order)
    return [
        target(
            "envelope",
            _all_samples,
            _take_envelope,
            2,
            base + "signed.read_unverified",
            base + "signed.add_signature",
            base + "signed._parse",
            base + "signed.verify_envelope",
            base + "signed._verify",
        ),
        target("order.create", lambda: _of("order.create"), create, 4, manifest + "open_create_order"),
        target("order.destroy", lambda: _of("order.destroy"), destroy, 2, manifest + "open_destroy_order"),
        target("order.refresh", lambda: _of("order.refresh"), change, 2, manifest + "_open_refresh"),
        target("order.reshare", lambda: _of("order.reshare"), reshare, 2, manifest + "_open_reshare"),
        target("order.settings", lambda: _of("order.settings"), _take_settings, 2, base + "settings.open_settings"),
        target("order.renew", lambda: _of("order.renew"), renew, 2, manifest + "_open_renew"),
        target("order.move", lambda: _of("order.move"), move, 2, manifest + "_open_move"),
        target(
            "key",
            lambda: _of("key"),
            _take_manifest,
            4,
            manifest + "open_key_manifest",
            manifest + "_checked_manifest",
            manifest + "_check_today",
            manifest + "check_successor",
            manifest + "read_key_manifest",
            manifest + "_check_epoch",
        ),
        target("receipt", lambda: _of("receipt"), _take_receipt, 3, manifest + "open_receipt"),
        target(
            "certificate",
            lambda: _of("certificate"),
            _take_certificate,
            3,
            manifest + "open_certificate",
            manifest + "read_certificate",
        ),
        target("abort", lambda: _of("abort"), _take_abort, 2, manifest + "open_abort"),
        target(
            "grant",
            lambda: (
                [world().grant(world().first, "node1", each) for each in ("encrypt", "decrypt")]
                + [world().grant(world().pair, "node2", "sign")]
            ),
            _take_grant,
            6,
            base + "grant._check_grant",
            base + "grant.read_grant",
        ),
        target(
            "card",
            lambda: [encode_card(each, world().keys[each.name]) for each in world().cluster.members.values()],
            _take_card,
            2,
            manifest + "decode_card",
        ),
        target(
            "cluster",
            lambda: [world().chain, world().first_chain],
            _take_chain,
            1,
            manifest + "open_chain",
            manifest + "chain_pin",
            manifest + "countersign_chain",
            "engine.cli.chains.view_chain",
            "engine.cli.chains._view",
            manifest + "issue_cluster_manifest",
            change=change_chain,
            cpu_s=1.0,
        ),
        target(
            "cluster/offer",
            lambda: [world().chain, world().first_chain, chain_after(world().chain, 1)],
            _take_offer,
            1,
            manifest + "_first_manifest",
            manifest + "_follow",
            manifest + "follow_chain",
            manifest + "split_chain",
            "engine.client.membership.open_membership",
            change=change_chain,
            cpu_s=1.0,
        ),
        target("table", lambda: [_table()], _take_table, 1, base + "table.open_table"),
        target("table.delta", lambda: [_delta(), _table()], _take_delta, 1, base + "table.TableReader.read"),
        target(
            "audit.head",
            lambda: [_head(), _head(6)],
            _take_head,
            2,
            base + "audit.open_head",
            "nodes.witness.Witness.hear",
        ),
        target(
            "registry.row",
            lambda: [sign_envelope(ROW, 1, material("row", 16), the_world().keys["balancer"])],
            _take_seal,
            1,
            "balancer.registry.open_seal",
        ),
        target(
            "refresh.deal",
            lambda: [
                msgpack.packb([the_refresh().dealt[a][0], the_refresh().dealt[b][0]])
                for a, b in (("node1", "node2"), ("node1", "node3"))
            ],
            _take_deals,
            2,
            base + "refresh.open_deals",
            base + "refresh.open_deal",
            change=_change_list,
        ),
        target(
            "refresh.part",
            lambda: [msgpack.packb(the_refresh().statements)],
            _take_statements,
            2,
            base + "refresh.open_part_statement",
            base + "refresh.check_parts",
            change=_change_list,
        ),
        target(
            "refresh.sealed-part",
            lambda: [msgpack.packb(the_refresh().parts(1)), msgpack.packb(the_refresh().parts(0))],
            _take_part,
            0.5,
            base + "refresh.new_share",
            base + "refresh.open_parts",
            base + "refresh._open_part",
            base + "refresh.Sealer.__init__",
            base + "refresh.Sealer.seal",
            base + "refresh.Opener.__init__",
            base + "refresh.Opener.open",
            change=_change_part,
        ),
    ]
