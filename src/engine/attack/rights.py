"""Attacks on authorisation: verbs of other roles, keys of others, operations without a rule, names that trick."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from engine.attack.model import Attack, NotRun, Trial
from engine.attack.stage import REFUSALS, Answer, Stage, judge, now_ms
from engine.attack.target import PREFIX
from engine.keys import OPERATIONS, USES, RequestType
from engine.protocol.backup import ExportOrder, add_order_signature, issue_export_order, sign_recovery_card
from engine.protocol.manifest import AbortNotice, CreateOrder, DestroyOrder, RefreshOrder, ReshareOrder
from engine.protocol.requests import (
    AUDIT_HEAD,
    BALANCER_VERBS,
    HELLO,
    MOVE,
    NODE_VERBS,
    REGISTRY_COMMIT,
    REGISTRY_VERBS,
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ABORT,
    SHARE_COMMIT,
    SHARE_DESTROY,
    SHARE_EXPORT,
    SHARE_PREPARE,
    SHARE_RELEASE,
    SHARE_RESTORE,
    STATS,
    Abort,
    AuditNotice,
    Commit,
    Create,
    Describe,
    Destroy,
    Empty,
    Flush,
    Hello,
    ListKeys,
    Move,
    Operate,
    Outcome,
    Prewarm,
    Refresh,
    Reserve,
    Reshare,
    Rewrap,
    Sealed,
    Settings,
    ShareCommit,
    ShareExport,
    SharePrepare,
    ShareRelease,
    ShareRestore,
    Sync,
)
from engine.protocol.settings import SettingsOrder, issue_settings
from engine.protocol.signed import SigningKey, sign_envelope

__all__ = ["ATTACKS"]

pack = msgspec.msgpack.encode
DENIED: Final = frozenset({"access-denied"})


def _signed(stage: Stage, kind: str, message: object) -> bytes:
    return sign_envelope(kind, now_ms(), pack(message), stage.me.signing)


def _node_messages(stage: Stage) -> dict[str, object]:
    """A well-formed body for each verb that only nodes may send, as good as a client can make it."""
    described = stage.described("data")
    key_id = stage.record("data").manifest.key_id
    # Expired, so that not even a node which takes the verb from a client erases a share on it.
    destroy = _signed(stage, "order.destroy", DestroyOrder(key_id, stage.names["data"], now_ms() - 60_000))
    grant = stage.grant("data", stage.holders("data")[0])
    return {
        SHARE_PREPARE: SharePrepare(described.manifest, 1, bytes(64), bytes(32), []),
        SHARE_COMMIT: ShareCommit(key_id, described.certificate),
        SHARE_ABORT: Abort(_signed(stage, "abort", AbortNotice(key_id, 1))),
        SHARE_RELEASE: ShareRelease(key_id, grant, described.certificate),
        SHARE_DESTROY: Destroy(destroy),
        AUDIT_HEAD: AuditNotice(_signed(stage, "audit.head", [b"x"])),
        STATS: Empty(),
        MOVE: Move([_signed(stage, "order.move", [b"x"])]),
    }


def node_verbs(stage: Stage, trial: Trial) -> None:
    messages = _node_messages(stage)
    requests, cases = [], []
    for node in stage.nodes:
        answer = stage.ask_one(node, RequestType.STATUS, Empty())
        trial.control(answer.code == "ok", f"a verb that the client may use, status, at {node}", answer.seen)
        for verb in sorted({*NODE_VERBS, *BALANCER_VERBS}):
            bodies = [pack(messages[verb])] if verb in messages else []
            for body in (*bodies, b"\x90", b""):
                requests.append((node, verb, body))
                cases.append((f"{verb}, {'well formed' if body in bodies else 'empty'}", node))
    judge(trial, cases, stage.ask(requests), DENIED)
    for node in stage.nodes:
        registry = [(node, verb, b"\x90") for verb in sorted(REGISTRY_VERBS)]
        judge(trial, [(verb, node) for _, verb, _ in registry], stage.ask(registry), frozenset({"protocol-error"}))


def registry_verbs(stage: Stage, trial: Trial) -> None:
    described = stage.described("data")
    manifest = stage.record("data").manifest
    order = CreateOrder(os.urandom(16), f"{PREFIX}x", "aes-256-gcm", 1, 1, "generate", now_ms() + 60_000)
    messages: dict[str, object] = {
        "registry.reserve": Reserve(_signed(stage, "order.create", order), b"", b""),
        REGISTRY_COMMIT: Commit(described.manifest, [b"x"]),
        "registry.destroy": Destroy(
            _signed(stage, "order.destroy", DestroyOrder(manifest.key_id, manifest.name, now_ms() - 60_000))
        ),
        "registry.sync": Sync(0),
        "registry.outcome": Outcome(manifest.key_id, 1),
        "registry.abort": Outcome(manifest.key_id, manifest.attempt),
    }
    for balancer in stage.cluster.of_role("balancer"):
        answer = stage.ask_one(balancer.name, HELLO, Hello(1, ""))
        trial.control(answer.code == "ok", f"a verb that the client may use, hello, at {balancer.name}", answer.seen)
        verbs = sorted(REGISTRY_VERBS)
        requests = [(balancer.name, verb, pack(messages.get(verb, []))) for verb in verbs]
        judge(trial, [(verb, balancer.name) for verb in verbs], stage.ask(requests), DENIED)
        others = sorted({*OPERATIONS, RequestType.GENERATE, RequestType.DESTROY, *NODE_VERBS, *BALANCER_VERBS})
        requests = [(balancer.name, verb, b"\x90") for verb in others]
        found = stage.ask(requests)
        judge(trial, [(f"{verb} at a balancer", balancer.name) for verb in others], found, REFUSALS)


def _uses(stage: Stage, verb: str, key: str, combiner: str) -> bytes:
    """A body of the verb for a key by name, with whatever the sender can sign."""
    message: Any
    if verb in OPERATIONS:
        message = Operate(key, b"", b"x" * 40, b"", b"p", False, b"")
    elif verb == RequestType.DESCRIBE:
        message = Describe(key, 0)
    elif verb == RequestType.PREWARM:
        message = Prewarm(key, b"", b"")
    elif verb == RequestType.REWRAP:
        message = Rewrap(key, os.urandom(16), os.urandom(16), [Sealed(b"x" * 40, b"")], b"", b"")
    else:
        message = Flush(key)
    return REQUEST_CODECS[verb].encode(message)


def policy(stage: Stage, trial: Trial) -> None:
    """Each operation on each throw-away key that a client has no rule for, and on names beyond."""
    identities = [(stage.me, "the first client")]
    if stage.target.second is not None:
        identities.append((stage.neighbour.identity, "the second client"))
    foreign = ["payroll", "a", f"{PREFIX.rstrip('/')}", f"x{PREFIX}{stage.run_id}/data", "zz/top", "admin"]
    verbs = sorted({*USES, RequestType.PREWARM, RequestType.FLUSH, RequestType.DESCRIBE})
    for identity, who in identities:
        requests, cases = [], []
        for name in [*stage.names.values(), *foreign]:
            for verb in verbs:
                if _may(stage, identity.name, verb, name):
                    continue
                for node in stage.nodes:
                    requests.append((node, verb, _uses(stage, verb, name, node)))
                    cases.append((f"{who}: {verb} with {'a key' if name in stage.names.values() else name!r}", node))
        if not stage.cluster.allows_every_key(identity.name, RequestType.FLUSH):
            for node in stage.nodes:
                requests.append((node, RequestType.FLUSH, pack(Flush(""))))
                cases.append((f"{who}: flush of every key", node))
        judge(trial, cases, stage.ask(requests, identity), DENIED)
        orders, cases = _orders_without_right(stage, identity, who, foreign)
        judge(trial, cases, stage.ask(orders, identity), frozenset({"access-denied", "protocol-error"}))
    if not trial.tried:
        raise NotRun("the policy allows these clients everything; give a --second-client with fewer rights")
    answer = stage.ask_one(stage.holders("data")[0], RequestType.DESCRIBE, Describe(stage.names["data"], 0))
    trial.control(answer.code == "ok", "what a rule allows, describe of an own key, is served", answer.seen)


def _may(stage: Stage, client: str, verb: str, name: str) -> bool:
    every: tuple[str, ...] = (verb,)
    if verb == RequestType.DESCRIBE:
        changes = (
            RequestType.DESTROY,
            RequestType.REFRESH,
            RequestType.RESHARE,
            RequestType.ROTATE,
            RequestType.SETTINGS,
        )
        every = (verb, *USES, *changes)
    elif verb == RequestType.PREWARM:
        every = (verb, *OPERATIONS)
    return any(stage.cluster.allows(client, each, name) for each in every)


def _orders_without_right(
    stage: Stage, identity: Any, who: str, foreign: list[str]
) -> tuple[list[tuple[str, str, bytes]], list[tuple[str, str]]]:
    requests, cases = [], []
    expires = now_ms() + 60_000
    for name in [*foreign, stage.names["data"]]:
        key_id = stage.record("data").manifest.key_id
        if not stage.cluster.allows(identity.name, RequestType.GENERATE, name):
            order: object = CreateOrder(os.urandom(16), name, "aes-256-gcm", 1, 1, "generate", expires)
            raw = sign_envelope("order.create", now_ms(), pack(order), identity.signing)
            requests.append((stage.nodes[0], str(RequestType.GENERATE), pack(Create(raw, b""))))
            cases.append((f"{who}: a create order for {name!r}", stage.nodes[0]))
        if not stage.cluster.allows(identity.name, RequestType.DESTROY, name):
            raw = sign_envelope("order.destroy", now_ms(), pack(DestroyOrder(key_id, name, expires)), identity.signing)
            for node in stage.nodes:
                requests.append((node, str(RequestType.DESTROY), pack(Destroy(raw))))
                cases.append((f"{who}: a destroy order for {name!r}", node))
        if not stage.cluster.allows(identity.name, RequestType.SETTINGS, name):
            disabled = SettingsOrder(name, key_id, now_ms(), 0, False, 1, 0, expires)
            raw = issue_settings(disabled, identity.signing)
            requests.append((stage.nodes[0], str(RequestType.SETTINGS), pack(Settings(raw))))
            cases.append((f"{who}: settings that disable {name!r}", stage.nodes[0]))
    return requests, cases


def existence(stage: Stage, trial: Trial) -> None:
    """Whether an answer to who has no right tells if a key exists."""
    client = stage.neighbour.identity
    denied = [each for each in sorted(OPERATIONS) if not _may(stage, client.name, each, stage.names["sign"])]
    if not denied:
        raise NotRun(f"{client.name!r} may do everything with the keys of a run")
    there, absent = stage.names["sign"], f"{PREFIX}{stage.run_id}/gone"
    for node in stage.nodes:
        mine = stage.ask_one(node, RequestType.DESCRIBE, Describe(there, 0))
        if node in stage.holders("sign"):
            trial.control(mine.code == "ok", f"{node} knows the key", mine.seen)
        for verb in denied:
            told = [stage.ask([(node, verb, _uses(stage, verb, name, node))], client)[0] for name in (there, absent)]
            texts = [each.seen.replace(there, "?").replace(absent, "?") for each in told]
            trial.case(
                texts[0] == texts[1] and told[0].code == "access-denied",
                f"{verb} with a key that exists and with one that does not",
                node,
                texts[0] if texts[0] == texts[1] else f"{texts[0]} / {texts[1]}",
            )


NAMES: Final = {
    "a path upwards": "../../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a path out of the prefix": PREFIX + "../payroll",
    "a zero byte": PREFIX + "data\0",
    "a zero byte and more": PREFIX + "data\0.txt",
    "a line's end": PREFIX + "data\n",
    "a space before": " " + PREFIX,
    "a Cyrillic letter": "keyquorum-аttack/data",  # noqa: RUF001
    "full-width letters": "\uff4b\uff45\uff59/data",
    "a right-to-left mark": PREFIX + "\u202eatad",
    "a combining mark": PREFIX + "data\u0301",
    "a star": "*",
    "a star in it": PREFIX + "*",
    "a set": "[a-z]*",
    "a question mark": PREFIX + "????",
    "nothing": "",
    "129 characters": "a" * 129,
    "60,000 characters": "a" * 60_000,
    "SQL": "x'; DROP TABLE shares; --",
    "a format": "%s%n{0.__class__}",
    "an environment variable": "$HOME/${PATH}",
    "an escape sequence": "\x1b[2J",
}


def names(stage: Stage, trial: Trial) -> None:
    requests, cases = [], []
    for node in stage.nodes:
        known = node in stage.holders("data")
        if known:
            answer = stage.ask_one(node, RequestType.DESCRIBE, Describe(stage.names["data"], 0))
            trial.control(answer.code == "ok", f"describe of an own key at {node}", answer.seen)
        for what, name in NAMES.items():
            for verb, message in (
                (RequestType.DESCRIBE, pack([name])),
                (RequestType.ENCRYPT, pack([name, b"", b"x", b"", b"", False, b""])),
            ):
                requests.append((node, str(verb), message))
                cases.append((f"{verb} with a name of {what}", node))
    order = [
        (
            f"a create order with a name of {what}",
            pack([os.urandom(16), name, "aes-256-gcm", 1, 1, "generate", now_ms() + 60_000]),
        )
        for what, name in NAMES.items()
        if len(name) <= 1000 and name != NAMES["a path out of the prefix"]  # which is a name like any other
    ]
    for what, payload in order:
        raw = sign_envelope("order.create", now_ms(), payload, stage.me.signing)
        requests.append((stage.nodes[0], str(RequestType.GENERATE), pack(Create(raw, b""))))
        cases.append((what, stage.nodes[0]))
    allowed = frozenset({"protocol-error", "access-denied", "key-not-found", "moved", "manifest-error"})
    judge(trial, cases, stage.ask(requests), allowed)


def listing(stage: Stage, trial: Trial) -> None:
    identities = [stage.me] + ([stage.neighbour.identity] if stage.target.second is not None else [])
    patterns = ("*", "?*", "[!\0]*", "*/*", "**", "[a-z]*", "*[!x]", "p*", "*payroll*")
    told = stage.first.list_keys(f"{PREFIX}{stage.run_id}/*")
    trial.control(
        len(told) == len(stage.names), "the keys of this run are listed to who may see them", f"{len(told)} keys"
    )
    for identity in identities:
        for node in stage.nodes:
            for pattern in patterns:
                after, leaked, listed = "", [], 0
                for _ in range(20):
                    answer = stage.ask_one(node, RequestType.LIST, ListKeys(pattern, after, 200), identity)
                    if answer.code != "ok":
                        break
                    page = REPLY_CODECS[RequestType.LIST].decode(answer.body)
                    listed += len(page.entries)
                    allows = stage.cluster.allows
                    leaked += [e.key for e in page.entries if not allows(identity.name, RequestType.LIST, e.key)]
                    if not page.more or not page.entries:
                        break
                    after = page.entries[-1].key
                seen = f"{len(leaked)} names without a right to them" if leaked else f"{answer.code}: {listed} names"
                trial.case(not leaked, f"{identity.name} lists {pattern!r}", node, seen)


def unsigned_orders(stage: Stage, trial: Trial) -> None:
    """Orders that another client signed, or that were signed for something else."""
    identity = stage.neighbour.identity
    manifest = stage.record("data").manifest
    expires = now_ms() + 60_000
    mine = _signed(stage, "order.destroy", DestroyOrder(manifest.key_id, manifest.name, expires))
    theirs = sign_envelope(
        "order.destroy", now_ms(), pack(DestroyOrder(manifest.key_id, manifest.name, expires)), identity.signing
    )
    create = _signed(
        stage,
        "order.create",
        CreateOrder(os.urandom(16), f"{PREFIX}{stage.run_id}/stolen", "aes-256-gcm", 1, 1, "generate", expires),
    )
    about = manifest.key_id, manifest.name, manifest.epoch
    fresh = _signed(stage, "order.refresh", RefreshOrder(*about, os.urandom(16), expires))
    moved = _signed(stage, "order.reshare", ReshareOrder(*about, 1, [stage.nodes[0]], [], os.urandom(16), expires))
    placed = _signed(stage, "order.move", ReshareOrder(*about, 1, [stage.nodes[0]], [], os.urandom(16), expires, 1))
    renewed = _signed(stage, "order.renew", RefreshOrder(*about, os.urandom(16), expires, 1))
    disabled = SettingsOrder(manifest.name, manifest.lineage, now_ms(), 0, False, 1, 0, expires)
    settings = issue_settings(disabled, stage.me.signing)
    tries: list[tuple[str, str, object, bool]] = [
        ("the first client's settings, sent by the second", RequestType.SETTINGS, Settings(settings), True),
        ("settings as a destroy order", RequestType.DESTROY, Destroy(settings), False),
        ("a destroy order as settings", RequestType.SETTINGS, Settings(mine), False),
        ("the first client's destroy order, sent by the second", RequestType.DESTROY, Destroy(mine), True),
        ("the second client's destroy order, sent by the first", RequestType.DESTROY, Destroy(theirs), False),
        ("the first client's create order, sent by the second", RequestType.GENERATE, Create(create, b""), True),
        ("a create order as an import", RequestType.IMPORT, Create(create, bytes(32)), False),
        ("a create order as a destroy order", RequestType.DESTROY, Destroy(create), False),
        ("a create order as a refresh order", RequestType.REFRESH, Refresh(create), False),
        ("a destroy order as a refresh order", RequestType.REFRESH, Refresh(mine), False),
        ("a refresh order as a reshare order", RequestType.RESHARE, Reshare(fresh, b""), False),
        ("a reshare order as a refresh order", RequestType.REFRESH, Refresh(moved), False),
        ("the first client's reshare order, sent by the second", RequestType.RESHARE, Reshare(moved, b""), True),
        ("a client's move order as a reshare order", RequestType.RESHARE, Reshare(placed, b""), False),
        ("a client's renewal order as a refresh order", RequestType.REFRESH, Refresh(renewed), False),
    ]
    held = REFUSALS
    for node in stage.nodes:
        answer: Answer
        for what, verb, message, by_second in tries:
            answer = stage.ask_one(node, verb, message, identity if by_second else None)
            trial.case(answer.code in held, what, node, answer.seen)
    answer = stage.ask_one(stage.holders("data")[0], RequestType.DESCRIBE, Describe(manifest.name, 0))
    trial.control(answer.code == "ok", "the key is there all the same", answer.seen)


def backups(stage: Stage, trial: Trial) -> None:
    """Archives of all shares by an order that the operators did not sign."""
    mine = stage.me.signing
    operators = stage.cluster.of_role("operator")
    forged = [SigningKey(each.name, Ed25519PrivateKey.generate()) for each in operators]
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def order(first: SigningKey, *others: SigningKey, cards: Sequence[bytes]) -> bytes:
        told = ExportOrder(os.urandom(16), stage.cluster.pin, 1, list(cards), stage.me.name, now_ms() + 60_000)
        raw = issue_export_order(told, first, now_ms())
        for each in others:
            raw = add_order_signature(raw, each)
        return raw

    own_card = sign_recovery_card(mine.name, public, mine)
    forged_cards = [sign_recovery_card(each.name, public, each) for each in forged]
    tries = {
        "an order of the client's, to itself": order(mine, cards=[own_card]),
        "an order of the client's, to operators": order(mine, cards=forged_cards),
        "a forged order of all operators": order(*forged, cards=forged_cards),
        "a forged order, to the client": order(*forged, cards=[own_card]),
        "an order to destroy": _signed(stage, "order.destroy", DestroyOrder(os.urandom(16), "x", now_ms() + 60_000)),
        "no order": b"",
    }
    restores = {
        "a restore of nothing": ShareRestore(b"", 0, b"", []),
        "a restore of an order": ShareRestore(b"", 0, tries["a forged order of all operators"], []),
        "a later part of a restore": ShareRestore(os.urandom(16), 1, b"x", []),
    }
    for node in stage.nodes:
        answer = stage.ask_one(node, RequestType.STATUS, Empty())
        trial.control(answer.code == "ok", f"a verb that the client may use, status, at {node}", answer.seen)
        for what, raw in tries.items():
            answer = stage.ask_one(node, SHARE_EXPORT, ShareExport(raw, b"", 0))
            trial.case(answer.code in REFUSALS, what, node, answer.seen)
        for what, message in restores.items():
            answer = stage.ask_one(node, SHARE_RESTORE, message)
            trial.case(answer.code in REFUSALS, what, node, answer.seen)


_THREAT = "docs/security.md, Who has a client's key"
ATTACKS: Final = (
    Attack(
        "rights.node-verbs",
        "Verbs that only nodes and balancers send",
        "shares, or a say in how they are kept",
        "access-denied for each at each node",
        f"{_THREAT}; docs/protocol.md, Verbs; CWE-862",
        node_verbs,
    ),
    Attack(
        "rights.registry-verbs",
        "The registry's verbs from a client",
        "to reserve, commit, abort or destroy without a node",
        "access-denied for each",
        f"{_THREAT}; docs/protocol.md, Verbs; CWE-862",
        registry_verbs,
    ),
    Attack(
        "rights.policy",
        "Operations and keys without a rule",
        "to use the keys of others",
        "access-denied at each node",
        f"{_THREAT}; docs/protocol.md, Policy; CWE-863",
        policy,
    ),
    Attack(
        "rights.existence",
        "Does a refusal tell whether a key exists",
        "names of keys of others",
        "the same answer for a key that exists and one that does not",
        "docs/security.md, policy; CWE-204",
        existence,
        needs=frozenset({"second"}),
    ),
    Attack(
        "rights.names",
        "Names with odd characters",
        "to reach a file, another key, or a terminal by a name",
        "each is refused, or no key has it",
        f"{_THREAT}; CWE-22, CWE-89, CWE-1007",
        names,
    ),
    Attack(
        "rights.listing",
        "Lists of keys",
        "names of keys that one has no right to see",
        "no name without the right to list it",
        f"{_THREAT}; CWE-200",
        listing,
    ),
    Attack(
        "rights.orders-of-others",
        "Orders of another client, and for another purpose",
        "to make, destroy or refresh in another's name",
        "each is refused at each node, and the key stays",
        f"{_THREAT}; CWE-345",
        unsigned_orders,
        needs=frozenset({"second"}),
    ),
    Attack(
        "rights.backups",
        "Backups without the operators' order",
        "the shares of all keys",
        "each is refused at each node",
        f"{_THREAT}; docs/protocol.md, Backups; CWE-862",
        backups,
    ),
)
