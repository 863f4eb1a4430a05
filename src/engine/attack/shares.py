"""Attacks with a node's own identity: a node that was taken over asks the others for shares. No share is kept."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import msgspec

from engine.attack.grants import forged_grants, make_grant
from engine.attack.model import Attack, Need, NotRun, Trial
from engine.attack.stage import REFUSALS, Answer, Stage, judge, now_ms
from engine.client.config import Identity
from engine.keys import OPERATIONS, RequestType
from engine.protocol.manifest import AbortNotice, DestroyOrder
from engine.protocol.requests import (
    AUDIT_HEAD,
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ABORT,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_DESTROY,
    SHARE_PREPARE,
    SHARE_RELEASE,
    STATS,
    Abort,
    AuditNotice,
    Describe,
    Destroy,
    Empty,
    ShareCommit,
    ShareDeal,
    SharePrepare,
    ShareRelease,
)
from engine.protocol.signed import sign_envelope

__all__ = ["ATTACKS"]

pack = msgspec.msgpack.encode
RETRY_S: Final = 2.5
"""Longer than a holder answers the same grant again, since its first answer may have been lost (2 s)."""
ASKED_MOST: Final = 8_000
RATE_FLOOR: Final = 800.0
"""A limit may only be called missing if the requests came faster than this: the default lets 400 a second in."""


def _stolen(stage: Stage) -> Identity:
    """The first of the given node identities that holds a share of the keys here."""
    for name, identity in stage.target.nodes.items():
        if name in stage.holders("data") and name in stage.holders("cold"):
            return identity
    raise NotRun("none of the given nodes holds a share of the keys of this run")


def _release(stage: Stage, thief: Identity, word: str, grants: dict[str, bytes]) -> list[tuple[str, str, Answer]]:
    """What each honest holder answers to a request for its share with each grant; the shares are not looked at."""
    key_id = stage.record(word).manifest.key_id
    others = [node for node in stage.holders(word) if node != thief.name]
    asked = [
        (what, node, REQUEST_CODECS[SHARE_RELEASE].encode(ShareRelease(key_id, grant, b"")))
        for node in others
        for what, grant in grants.items()
    ]
    answers = stage.ask([(node, SHARE_RELEASE, body) for _, node, body in asked], thief)
    return [(what, node, answer) for (what, node, _), answer in zip(asked, answers, strict=True)]


def without_right(stage: Stage, trial: Trial) -> None:
    thief = _stolen(stage)
    me = thief.name
    stage.flush("cold")
    honest = [node for node in stage.holders("cold") if node != me]
    manifest = stage.record("cold").manifest
    now = now_ms()
    grants = {f"a grant {what}": grant for what, grant in forged_grants(stage, "cold", me).items()} | {
        "no grant": b"",
        "a grant signed by the thief": make_grant(stage, "cold", me, thief.signing),
        "a grant for an honest combiner": make_grant(stage, "cold", honest[0]),
        "a grant for no combiner of the key": make_grant(stage, "cold", "nobody"),
        "a grant for another key": make_grant(stage, "data", me),
        "a grant for a later epoch": make_grant(stage, "cold", me, epoch=manifest.epoch + 1),
        "a grant for another version": make_grant(stage, "cold", me, version=2),
        "a grant for an operation that is none": make_grant(stage, "cold", me, operations=["export"]),
        "an expired grant": make_grant(stage, "cold", me, not_before_ms=now - 60_000, expires_ms=now - 30_000),
        "a grant from the future": make_grant(stage, "cold", me, not_before_ms=now + 60_000, expires_ms=now + 70_000),
        "a grant that lives too long": make_grant(stage, "cold", me, expires_ms=now + 60_000),
    }
    for name, identity in stage.target.nodes.items():
        if name != me:
            grants[f"a grant signed by its accomplice {name}"] = make_grant(stage, "cold", me, identity.signing)
            grants[f"a grant for its accomplice {name}"] = make_grant(stage, "cold", name)
    good = make_grant(stage, "cold", me)
    for position in stage.chosen(len(good), 20 if stage.options.quick else 300):
        flipped = bytearray(good)
        flipped[position] ^= 1 << stage.random.randrange(8)
        grants[f"a grant with a bit changed at byte {position}"] = bytes(flipped)
    for what, node, answer in _release(stage, thief, "cold", grants):
        trial.case(answer.code in REFUSALS | {"overloaded"}, what, node, answer.seen)
    unknown = ShareRelease(os.urandom(16), make_grant(stage, "cold", me), b"")
    for node in honest:
        answer = stage.ask_one(node, SHARE_RELEASE, unknown, thief)
        trial.case(answer.code in REFUSALS, "a key that is none", node, answer.seen)
    for _, node, answer in _release(stage, thief, "cold", {"": make_grant(stage, "cold", me)}):
        trial.control(
            answer.code == "ok", f"with a client's own fresh grant {node} gives its share to this node", answer.seen
        )


def replays(stage: Stage, trial: Trial) -> None:
    thief = _stolen(stage)
    grant = make_grant(stage, "cold", thief.name, expires_ms=now_ms() + 25_000)
    for _, node, answer in _release(stage, thief, "cold", {"": grant}):
        trial.control(answer.code == "ok", f"the grant is good the first time at {node}", answer.seen)
    time.sleep(RETRY_S)
    for _ in range(1 if stage.options.quick else 2):
        for _, node, answer in _release(stage, thief, "cold", {"": grant}):
            trial.case(answer.code in REFUSALS, f"the same grant after {RETRY_S:g} s", node, answer.seen)
    for name, accomplice in stage.target.nodes.items():
        if name == thief.name or name not in stage.holders("cold"):
            continue
        fresh = make_grant(stage, "cold", thief.name)
        for _, node, answer in _release(stage, accomplice, "cold", {"": fresh}):
            trial.case(answer.code in REFUSALS, f"a fresh grant for {thief.name}, by {name}", node, answer.seen)


def other_messages(stage: Stage, trial: Trial) -> None:
    """What else a node may send: shares to be stored, commits, aborts, destructions, heads; and what it may not."""
    thief = _stolen(stage)
    record = stage.record("data")
    manifest, described = record.manifest, stage.described("data")
    at = now_ms()

    def signed(kind: str, message: object) -> bytes:
        return sign_envelope(kind, at, pack(message), thief.signing)

    forged = msgspec.structs.replace(manifest, key_id=os.urandom(16), name="keyquorum-attack/forged")
    weaker = msgspec.structs.replace(manifest, threshold=1)
    later = msgspec.structs.replace(manifest, epoch=manifest.epoch + 1, previous=record.digest)
    order = DestroyOrder(manifest.key_id, manifest.name, at + 60_000)
    share: dict[str, Any] = {"y": bytes(64), "salt": bytes(32), "aborts": []}
    for node in stage.holders("data"):
        if node == thief.name:
            continue
        mine = manifest.holder(node)
        x = mine.x if mine else 1
        tries: list[tuple[str, str, object]] = [
            ("a share of a key that nobody ordered", SHARE_PREPARE, SharePrepare(signed("key", forged), x, **share)),
            ("a share with a smaller t than ordered", SHARE_PREPARE, SharePrepare(signed("key", weaker), x, **share)),
            ("a share of a later epoch", SHARE_PREPARE, SharePrepare(signed("key", later), x, **share)),
            ("a share under another dealer's manifest", SHARE_PREPARE, SharePrepare(described.manifest, x, **share)),
            ("a certificate of its own", SHARE_COMMIT, ShareCommit(manifest.key_id, signed("certificate", [b"x"]))),
            ("a commit of a key that is none", SHARE_COMMIT, ShareCommit(os.urandom(16), described.certificate)),
            (
                "an abort notice of its own",
                SHARE_ABORT,
                Abort(signed("abort", AbortNotice(manifest.key_id, manifest.attempt))),
            ),
            ("a destroy order of its own", SHARE_DESTROY, Destroy(signed("order.destroy", order))),
            ("a head that is none", AUDIT_HEAD, AuditNotice(signed("audit.head", [b"x"]))),
            (
                "a deal without a client's order",
                SHARE_DEAL,
                ShareDeal(signed("order.refresh", [b"x"]), 2, record.digest, b""),
            ),
            ("a balancer's request for statistics", STATS, Empty()),
        ]
        for what, verb, message in tries:
            answer = stage.ask([(node, verb, pack(message))], thief)[0]
            held, seen = answer.code in REFUSALS | {"key-exists", "share-corrupt"}, answer.seen
            if answer.code == "ok" and verb == SHARE_COMMIT:
                # A commit of a committed key is answered unread, as it changes nothing. That is what is looked at.
                now = stage.ask_one(node, RequestType.DESCRIBE, Describe(manifest.name, 0))
                held = now.code == "ok" and REPLY_CODECS[RequestType.DESCRIBE].decode(now.body) == described
                seen = "nothing changed" if held else "the key's documents changed"
            trial.case(held, what, node, seen)
        verbs = sorted({*OPERATIONS, RequestType.GENERATE, RequestType.DESTROY, RequestType.FLUSH, RequestType.LIST})
        answers = stage.ask([(node, str(verb), b"\x90") for verb in verbs], thief)
        judge(
            trial,
            [(f"{verb}, a client's verb, by a node", node) for verb in verbs],
            answers,
            frozenset({"access-denied"}),
        )
        status = stage.ask_one(node, RequestType.STATUS, Empty(), thief)
        trial.control(status.code == "ok", f"a verb that nodes may use, status, at {node}", status.seen)


def rate(stage: Stage, trial: Trial) -> None:
    """More requests for shares than a node answers: it says so, and what it refuses costs it little."""
    thief = _stolen(stage)
    node = next(each for each in stage.holders("cold") if each != thief.name)
    good = _release(stage, thief, "cold", {"": make_grant(stage, "cold", thief.name)})
    trial.control(all(each.code == "ok" for _, _, each in good), "an honest request for a share is answered")
    key_id = stage.record("cold").manifest.key_id
    body = REQUEST_CODECS[SHARE_RELEASE].encode(ShareRelease(key_id, make_grant(stage, "data", thief.name), b""))
    begun, asked, limited = time.monotonic(), 0, 0
    while asked < ASKED_MOST and not limited and time.monotonic() - begun < 30.0:
        answers = stage.ask([(node, SHARE_RELEASE, body)] * 400, thief)
        limited += sum(each.code == "overloaded" for each in answers)
        asked += len(answers)
        if any(each.code == "ok" for each in answers):
            trial.case(False, "a share for a grant of another key", node, "ok")
    per_s = asked / (time.monotonic() - begun)
    trial.figures |= {"requests for shares": asked, "a second": round(per_s), "answered overloaded": limited}
    if not limited and per_s < RATE_FLOOR:
        raise NotRun(f"only {per_s:.0f} requests a second could be sent from here, too few to meet a limit")
    seen = f"overloaded after {asked} requests" if limited else f"no limit within {asked} requests, {per_s:.0f}/s"
    trial.case(bool(limited), "requests for shares as fast as possible", node, seen)


_THREAT = "docs/security.md, Who has one running node"
NODE: Final[frozenset[Need]] = frozenset({"node"})
ATTACKS: Final = (
    Attack(
        "shares.without-right",
        "A taken-over node asks for shares",
        "t shares of a key that no client sent to it",
        "no holder gives one; with a client's fresh grant for this node each does (the control)",
        f"{_THREAT}; CWE-862, CWE-347",
        without_right,
        needs=NODE,
    ),
    Attack(
        "shares.replays",
        "A taken-over node uses a grant again, or another's",
        "to gather a key again and again with one permission",
        "each holder gives its share once for a grant, and to the combiner in it alone",
        f"{_THREAT}; CWE-294",
        replays,
        needs=NODE,
    ),
    Attack(
        "shares.other-messages",
        "A taken-over node sends everything else a node may send",
        "to plant, replace, abort or destroy shares, or to act as a client",
        "each is refused",
        f"{_THREAT}; CWE-345, CWE-862",
        other_messages,
        needs=NODE,
    ),
    Attack(
        "shares.rate",
        "A taken-over node asks faster than shares may leave",
        "to empty a holder before anybody looks",
        "overloaded, by the limit on what one node may ask",
        "docs/security.md, shares leave slowly; CWE-770",
        rate,
        needs=NODE,
        slow=True,
    ),
)
