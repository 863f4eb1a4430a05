"""Attacks with documents, on the code that members run: routing tables, cluster manifests, keys' manifests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.attack.model import Attack, NotRun, Trial
from engine.attack.stage import Answer, Stage, now_ms
from engine.errors import EngineError
from engine.protocol.manifest import CLOCK_SKEW_MS, open_certificate, open_chain, open_key_manifest
from engine.protocol.requests import REPLY_CODECS, TABLE, Empty
from engine.protocol.routing import Router
from engine.protocol.signed import SigningKey, read_unverified, sign_envelope
from engine.protocol.table import open_table, table_codec

__all__ = ["ATTACKS"]

pack = msgspec.msgpack.encode
unpack = msgspec.msgpack.decode
TABLE_WAIT_S: Final = 15.0


def _refused(trial: Trial, what: str, at: str, call: Callable[[], object]) -> None:
    try:
        call()
    except EngineError as error:
        trial.case(True, what, at, f"{error.code}: {error}")
    except ValueError as error:
        trial.case(True, what, at, f"invalid: {error}")
    else:
        trial.case(False, what, at, "taken")


def _flipped(stage: Stage, raw: bytes, most: int) -> dict[str, bytes]:
    found = {}
    for position in stage.chosen(len(raw), most):
        changed = bytearray(raw)
        changed[position] ^= 1 << stage.random.randrange(8)
        found[f"with a bit changed at byte {position}"] = bytes(changed)
    for end in stage.chosen(len(raw), most // 3):
        found[f"cut to {end} bytes"] = raw[:end]
    return found


def tables(stage: Stage, trial: Trial) -> None:
    balancers = stage.cluster.of_role("balancer")
    if not balancers:
        raise NotRun("the cluster has no balancer")
    name = balancers[0].name
    raw = b""
    until = time.monotonic() + TABLE_WAIT_S
    while not raw and time.monotonic() < until:
        answer: Answer = stage.ask_one(name, TABLE, Empty())
        trial.control(answer.code == "ok", f"{name} tells its routing table", answer.seen)
        raw = REPLY_CODECS[TABLE].decode(answer.body).table
        time.sleep(0.0 if raw else 0.3)
    if not raw:
        raise NotRun(f"{name} has no routing table yet, or one that is too long for a message")
    table = open_table(raw, stage.cluster, now_ms())
    router = Router(stage.cluster)
    trial.control(router.install(table), "the table in force is taken by a fresh client's router")
    where = "a client's router"
    cluster = stage.cluster
    _refused(trial, "the same table again", where, lambda: open_table(raw, cluster, now_ms(), router.table))
    trial.case(not router.install(table), "the same table again, past the check", where, "not installed")
    older = msgspec.structs.replace(table, counter=table.counter - 1)
    trial.case(not router.install(older), "an older table, past the check", where, "not installed")
    late = table.expires_ms + CLOCK_SKEW_MS + 1_000
    _refused(trial, "the table after its expiry", where, lambda: open_table(raw, cluster, late))
    payload = table_codec.encode(msgspec.structs.replace(table, counter=table.counter + 1_000))
    stranger = Ed25519PrivateKey.generate()
    for what, key in {
        "a later table signed by a client": stage.me.signing,
        "a later table signed by a stranger in the balancer's name": SigningKey(name, stranger),
        "a later table signed by a stranger": SigningKey("stranger", stranger),
    }.items():
        forged = sign_envelope("table", table.counter + 1_000, payload, key)
        _refused(trial, what, where, lambda forged=forged: open_table(forged, cluster, now_ms()))  # type: ignore[misc]
    envelope = unpack(raw)
    body = unpack(envelope[0])
    body[4] = payload
    for what, each in {
        "a later table under this one's signature": pack([pack(body), envelope[1]]),
        "without a signature": pack([envelope[0], []]),
        **_flipped(stage, raw, 40 if stage.options.quick else 300),
    }.items():
        _refused(trial, what, where, lambda each=each: open_table(each, cluster, now_ms()))  # type: ignore[misc]


def chains(stage: Stage, trial: Trial) -> None:
    chain, pin = stage.target.chain, stage.cluster.pin
    trial.control(
        open_chain(chain, pin).serial == stage.cluster.serial, "the cluster's own manifest opens under its pin"
    )
    where = "a member's start"
    envelopes = unpack(chain)[0]
    newest = read_unverified(envelopes[-1])
    stranger = Ed25519PrivateKey.generate()
    operator = stage.cluster.of_role("operator")[0].name
    payload = unpack(newest.payload)
    payload[1] = newest.digest
    payload[4] = [*payload[4], [stage.me.name, "*", ["*"]]]

    def with_next(key: SigningKey, serial: int = newest.serial + 1) -> bytes:
        return pack([[*envelopes, sign_envelope("cluster", serial, pack(payload), key)]])

    body = unpack(unpack(envelopes[-1])[0])
    body[4] = pack(payload)
    tries = {
        "a successor signed by a client": with_next(stage.me.signing),
        "a successor signed by a stranger in the operator's name": with_next(SigningKey(operator, stranger)),
        "a successor with the same serial": with_next(SigningKey(operator, stranger), newest.serial),
        "the newest one twice": pack([[*envelopes, envelopes[-1]]]),
        "the newest with more rights, under its old signature": pack(
            [[*envelopes[:-1], pack([pack(body), unpack(envelopes[-1])[1]])]]
        ),
        "no manifest": pack([[]]),
        "a byte more": chain + b"\0",
        **_flipped(stage, chain, 40 if stage.options.quick else 300),
    }
    for what, each in tries.items():
        _refused(trial, what, where, lambda each=each: open_chain(each, pin))  # type: ignore[misc]
    _refused(trial, "the manifest under another pin", where, lambda: open_chain(chain, os.urandom(32)))
    if len(envelopes) > 1:
        # A chain that is cut is an older cluster. What has seen the newer one refuses it: docs/security.md says where.
        trial.note("the chain has predecessors; that members refuse an older one is checked at their start, not here")


def keys(stage: Stage, trial: Trial) -> None:
    described = stage.described("data")
    record = open_key_manifest(described.manifest, stage.cluster)
    holders = open_certificate(described.certificate, record, stage.cluster)
    trial.control(len(holders) > 0, "a key's own manifest and certificate are taken by a client")
    where = "a client, as told by a node"
    other = stage.described("other")
    most = 30 if stage.options.quick else 300
    for what, raw in _flipped(stage, described.manifest, most).items():
        _refused(trial, f"the manifest {what}", where, lambda raw=raw: open_key_manifest(raw, stage.cluster))  # type: ignore[misc]
    tries = {
        "of another key": other.certificate,
        "signed by a client": sign_envelope(
            "certificate", 1, read_unverified(described.certificate).payload, stage.me.signing
        ),
        **_flipped(stage, described.certificate, most),
    }
    for what, raw in tries.items():
        _refused(
            trial,
            f"the certificate {what}",
            where,
            lambda raw=raw: open_certificate(raw, record, stage.cluster),  # type: ignore[misc]
        )
    payload = pack(msgspec.structs.replace(record.manifest, threshold=1))
    for what, key in {
        "with t = 1, signed by a client": stage.me.signing,
        "with t = 1, signed by a stranger in the dealer's name": SigningKey(
            record.dealer, Ed25519PrivateKey.generate()
        ),
        **{f"with t = 1, signed by {name}": each.signing for name, each in stage.target.nodes.items()},
    }.items():
        raw = sign_envelope("key", now_ms(), payload, key)
        _refused(trial, f"a manifest {what}", where, lambda raw=raw: open_key_manifest(raw, stage.cluster))  # type: ignore[misc]


_UNIT: Final = "played on the code that clients and members run, with the cluster's real documents"
ATTACKS: Final = (
    Attack(
        "documents.tables",
        "Forged, changed, older and expired routing tables",
        "to steer clients",
        f"each is refused ({_UNIT})",
        "docs/security.md, advice, not orders; CWE-345, CWE-294",
        tables,
    ),
    Attack(
        "documents.cluster-manifests",
        "Forged and changed cluster manifests",
        "to become a member, or to write the policy",
        f"each is refused ({_UNIT})",
        "docs/security.md, pinned membership; CWE-345",
        chains,
    ),
    Attack(
        "documents.key-manifests",
        "Forged and changed manifests and certificates of keys",
        "to have a client use another key, other holders, or a smaller t",
        f"each is refused ({_UNIT})",
        "docs/security.md, no key without a client's word; CWE-345",
        keys,
    ),
)
