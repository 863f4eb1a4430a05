"""Attacks with grants and orders: forged, for something else, out of time, replayed, cut and changed."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.attack.model import Attack, NotRun, Trial
from engine.attack.stage import REFUSALS, Answer, Stage, judge, now_ms
from engine.attack.target import PREFIX
from engine.client.config import Identity
from engine.errors import EngineError
from engine.keys import RequestType
from engine.protocol.grant import GRANT_LIFETIME_MAX_MS, Grant
from engine.protocol.manifest import CLOCK_SKEW_MS, ORDER_LIFETIME_MAX_MS, CreateOrder, DestroyOrder, RefreshOrder
from engine.protocol.requests import (
    REPLY_CODECS,
    REQUEST_CODECS,
    Create,
    Describe,
    Destroy,
    Prewarm,
    Refresh,
)
from engine.protocol.signed import SigningKey, add_signature, sign_envelope

__all__ = ["ATTACKS", "forged_grants", "make_grant"]

pack = msgspec.msgpack.encode
unpack = msgspec.msgpack.decode
COLD: Final = "cold"


def make_grant(stage: Stage, word: str, combiner: str, signer: SigningKey | None = None, **changed: Any) -> bytes:
    """A grant whose fields are the honest ones but for those given."""
    manifest = stage.record(word).manifest
    now = now_ms()
    fields = {
        "key_id": manifest.key_id,
        "version": manifest.version,
        "epoch": manifest.epoch,
        "operations": ["encrypt"],
        "combiner": combiner,
        "not_before_ms": now,
        "expires_ms": now + 10_000,
        "nonce": os.urandom(16),
    }
    return sign_envelope("grant", now, pack(Grant(**{**fields, **changed})), signer or stage.me.signing)


def forged_grants(stage: Stage, word: str, combiner: str) -> dict[str, bytes]:
    """Grants without a right signature of a client that may use the key."""
    good = make_grant(stage, word, combiner)
    envelope = unpack(good)
    stranger = Ed25519PrivateKey.generate()
    me = stage.me.name
    found = {
        "garbage": os.urandom(200),
        "an empty envelope": b"\x90",
        "signed by a stranger in the client's name": make_grant(stage, word, combiner, SigningKey(me, stranger)),
        "signed by a stranger": make_grant(stage, word, combiner, SigningKey("stranger", stranger)),
        "with a signature of zeros": pack([envelope[0], [[me, bytes(64)]]]),
        "without a signature": pack([envelope[0], []]),
        "with the signature of another grant": pack([envelope[0], unpack(make_grant(stage, word, combiner))[1]]),
        "with one right and one wrong signature": pack([envelope[0], [*envelope[1], ["stranger", bytes(64)]]]),
        "signed twice": pack([envelope[0], [*envelope[1], *envelope[1]]]),
        "in a list of one more": pack([*envelope, []]),
        "with a byte more": good + b"\0",
        "of another kind": sign_envelope("order.create", now_ms(), unpack(envelope[0])[4], stage.me.signing),
    }
    for role in ("node", "balancer", "operator"):
        member = stage.cluster.of_role(role)[0]
        found[f"signed by a stranger in the name of the {role}"] = make_grant(
            stage, word, combiner, SigningKey(member.name, stranger)
        )
    body = unpack(envelope[0])
    body[2] = stage.nodes[0]
    found["issued in another's name"] = pack([pack(body), [[me, stage.me.signing.sign(pack(body))]]])
    return found


def _cold(stage: Stage, trial: Trial, node: str, grants: dict[str, bytes]) -> None:
    """A cold key, and a request with each grant: none may be served. The key stays cold, or it is a failure."""
    verb = str(RequestType.ENCRYPT)
    bare = stage.ask_one(node, verb, stage.operate(COLD, b"x"))
    if bare.code == "ok":  # it is loaded still: somebody used it
        stage.flush(COLD)
        bare = stage.ask_one(node, verb, stage.operate(COLD, b"x"))
    trial.control(bare.code == "need-grant", f"the key is cold at {node}: a grant is asked for", bare.seen)
    pending = list(grants.items())
    while pending:
        requests = [(node, verb, REQUEST_CODECS[verb].encode(stage.operate(COLD, b"x", g))) for _, g in pending]
        answers = stage.ask(requests)
        served = next((index for index, each in enumerate(answers) if each.code == "ok"), None)
        end = len(pending) if served is None else served + 1
        judge(trial, [(f"a grant {what}", node) for what, _ in pending[:end]], answers[:end])
        pending = pending[end:]
        if served is not None:
            stage.flush(COLD)  # what follows would be served from the loaded key
    done = stage.ask_one(node, RequestType.ENCRYPT, stage.operate(COLD, b"x", stage.grant(COLD, node)))
    trial.control(done.code == "ok", f"an honest grant is taken by {node}", done.seen)


def forged(stage: Stage, trial: Trial) -> None:
    stage.flush(COLD)
    for node in stage.holders(COLD):
        _cold(stage, trial, node, forged_grants(stage, COLD, node))
    stage.flush(COLD)


def changed(stage: Stage, trial: Trial) -> None:
    stage.flush(COLD)
    for node in stage.holders(COLD)[: 1 if stage.options.quick else 2]:
        good = make_grant(stage, COLD, node)
        cases: dict[str, bytes] = {}
        for position in stage.chosen(len(good), 40 if stage.options.quick else 400):
            flipped = bytearray(good)
            flipped[position] ^= 1 << stage.random.randrange(8)
            cases[f"with a bit changed at byte {position}"] = bytes(flipped)
        for end in stage.chosen(len(good), 15 if stage.options.quick else 100):
            cases[f"cut to {end} bytes"] = good[:end]
        cases.pop("cut to 0 bytes", None)
        _cold(stage, trial, node, cases)
    stage.flush(COLD)


def misfit(stage: Stage, trial: Trial) -> None:
    stage.flush(COLD)
    holders = stage.holders(COLD)
    manifest = stage.record(COLD).manifest
    for node in holders:
        others = [each for each in holders if each != node]
        grants = {
            "for another key": make_grant(stage, "data", node),
            "for a key that is none": make_grant(stage, COLD, node, key_id=os.urandom(16)),
            "for another version": make_grant(stage, COLD, node, version=manifest.version + 1),
            "for version 0": make_grant(stage, COLD, node, version=0),
            "for a later epoch": make_grant(stage, COLD, node, epoch=manifest.epoch + 1),
            "for an earlier epoch": make_grant(stage, COLD, node, epoch=manifest.epoch - 1),
            "for another operation": make_grant(stage, COLD, node, operations=["decrypt"]),
            "for an operation that is none": make_grant(stage, COLD, node, operations=["encrypt", "export"]),
            "for destroying": make_grant(stage, COLD, node, operations=["destroy"]),
            "for a combiner that is none": make_grant(stage, COLD, "nobody"),
            "for the balancer": make_grant(stage, COLD, stage.cluster.of_role("balancer")[0].name),
            **{f"for the combiner {other}": make_grant(stage, COLD, other) for other in others},
        }
        _cold(stage, trial, node, grants)
    stage.flush(COLD)


def out_of_time(stage: Stage, trial: Trial) -> None:
    stage.flush(COLD)
    skew = CLOCK_SKEW_MS + 2_000  # and a margin for a clock here that is a little off
    for node in stage.holders(COLD):
        now = now_ms()
        grants = {
            "that has expired": make_grant(stage, COLD, node, not_before_ms=now - 20_000, expires_ms=now - skew),
            "that expired a day ago": make_grant(
                stage, COLD, node, not_before_ms=now - 86_400_000, expires_ms=now - 86_390_000
            ),
            "from the future": make_grant(
                stage, COLD, node, not_before_ms=now + skew + 10_000, expires_ms=now + skew + 20_000
            ),
            "that lives too long": make_grant(stage, COLD, node, expires_ms=now + GRANT_LIFETIME_MAX_MS + 1_000),
            "that lives for ever": make_grant(stage, COLD, node, not_before_ms=0, expires_ms=2**63 - 1),
            "that ends before it begins": make_grant(stage, COLD, node, expires_ms=now - skew),
        }
        _cold(stage, trial, node, grants)
    stage.flush(COLD)


def replayed(stage: Stage, trial: Trial) -> None:
    holders = stage.holders(COLD)
    used: dict[str, bytes] = {}
    for node in holders:
        stage.flush(COLD)
        used[node] = make_grant(stage, COLD, node)
        done = stage.ask_one(node, RequestType.ENCRYPT, stage.operate(COLD, b"x", used[node]))
        trial.control(done.code == "ok", f"the grant is good the first time at {node}", done.seen)
    for round_number in (1, 2):
        stage.flush(COLD)
        for node, grant in used.items():
            again = stage.ask_one(node, RequestType.ENCRYPT, stage.operate(COLD, b"x", grant))
            what = f"the same grant after a flush, try {round_number}"
            trial.case(again.code in REFUSALS, what, node, again.seen)
            warm = stage.ask_one(node, RequestType.PREWARM, Prewarm(stage.names[COLD], b"", grant))
            trial.case(warm.code in REFUSALS, f"the same grant for prewarm, try {round_number}", node, warm.seen)
            for other in holders:
                if other != node:
                    seen = stage.ask_one(other, RequestType.ENCRYPT, stage.operate(COLD, b"x", grant))
                    trial.case(seen.code in REFUSALS, f"the grant of {node} at another combiner", other, seen.seen)
        if stage.options.quick:
            break
    # A nonce is one client's: another grant with it is a replay too.
    node = holders[0]
    nonce = os.urandom(16)
    for number in (1, 2):
        stage.flush(COLD)
        grant = make_grant(stage, COLD, node, nonce=nonce, expires_ms=now_ms() + 9_000 + number)
        answer = stage.ask_one(node, RequestType.ENCRYPT, stage.operate(COLD, b"x", grant))
        if number == 1:
            trial.control(answer.code == "ok", "a nonce is good the first time", answer.seen)
        else:
            trial.case(answer.code in REFUSALS, "another grant with a used nonce", node, answer.seen)
    stage.flush(COLD)


def of_others(stage: Stage, trial: Trial) -> None:
    neighbour: Identity = stage.neighbour.identity
    if not stage.cluster.allows(neighbour.name, RequestType.ENCRYPT, stage.names[COLD]):
        raise NotRun(
            f"{neighbour.name!r} may not encrypt with the keys of a run, so its right decides before the grant"
        )
    verb = str(RequestType.ENCRYPT)

    def tried(node: str, what: str, grant: bytes, sender: Identity) -> None:
        stage.flush(COLD)
        body = REQUEST_CODECS[verb].encode(stage.operate(COLD, b"x", grant))
        answer = stage.ask([(node, verb, body)], sender)[0]
        trial.case(answer.code in REFUSALS, what, node, answer.seen)

    for node in stage.holders(COLD):
        tried(node, "the first client's grant, sent by the second", make_grant(stage, COLD, node), neighbour)
        theirs = make_grant(stage, COLD, node, neighbour.signing)
        tried(node, "the second client's grant, sent by the first", theirs, stage.me)
        both = add_signature(make_grant(stage, COLD, node), neighbour.signing)
        tried(node, "a grant of the first, signed by both, sent by the second", both, neighbour)
        stage.flush(COLD)
        body = REQUEST_CODECS[verb].encode(stage.operate(COLD, b"x", make_grant(stage, COLD, node, neighbour.signing)))
        own = stage.ask([(node, verb, body)], neighbour)[0]
        trial.control(own.code == "ok", f"the second client's own grant is good at {node}", own.seen)
    stage.flush(COLD)


# --- orders ---


def _create(stage: Stage, order: CreateOrder, signer: SigningKey | None = None) -> bytes:
    return sign_envelope("order.create", now_ms(), pack(order), signer or stage.me.signing)


def create_orders(stage: Stage, trial: Trial) -> None:
    shares = min(5, len(stage.nodes))
    name = f"{PREFIX}{stage.run_id}/ordered"
    key_id = os.urandom(16)
    order = CreateOrder(key_id, name, "aes-256-gcm", shares // 2 + 1, shares, "generate", now_ms() + 60_000)
    raw = _create(stage, order)
    node = stage.nodes[0]
    stage.will_make(name)
    made = stage.ask([(node, "generate", pack(Create(raw, b"")))], timeout_s=60.0)[0]
    trial.control(made.code == "ok", "an honest create order makes a key", made.seen)
    stage.names["ordered"] = name

    def tried(what: str, changed: CreateOrder, verb: str = "generate", material: bytes = b"", **by: Any) -> Answer:
        body = pack(Create(_create(stage, changed, **by), material))
        answer = stage.ask([(node, verb, body)], timeout_s=60.0)[0]
        trial.case(answer.code in (REFUSALS | {"key-exists", "unsupported-algorithm"}), what, node, answer.seen)
        return answer

    replace = msgspec.structs.replace
    fresh = replace(order, key_id=os.urandom(16), name=f"{PREFIX}{stage.run_id}/never")
    now = now_ms()
    tried("another order for the same name", replace(order, key_id=os.urandom(16)))
    tried("expired", replace(fresh, expires_ms=now - CLOCK_SKEW_MS - 2_000))
    tried("good for too long", replace(fresh, expires_ms=now + ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS + 60_000))
    tried("a threshold of 0", replace(fresh, threshold=0))
    tried("a threshold above the shares", replace(fresh, threshold=shares + 1, shares=shares))
    tried("more shares than nodes", replace(fresh, shares=min(64, len(stage.nodes) + 1)))
    tried("65 shares", replace(fresh, shares=65))
    tried("an algorithm that is none", replace(fresh, algorithm="aes-256-ecb"))
    tried("no algorithm", replace(fresh, algorithm=""))
    tried("an order to generate as an import", fresh, "import", bytes(32))
    tried("an order to import as a generation", replace(fresh, operation="import"))
    tried("an import of a key of the wrong length", replace(fresh, operation="import"), "import", bytes(7))
    tried("a generation with key material", fresh, "generate", bytes(32))
    stranger = SigningKey(stage.me.name, Ed25519PrivateKey.generate())
    tried("signed by a stranger in the client's name", fresh, signer=stranger)
    changed = bytearray(_create(stage, fresh))
    for position in stage.chosen(len(changed), 12 if stage.options.quick else 60):
        flipped = bytearray(changed)
        flipped[position] ^= 1 << stage.random.randrange(8)
        answer = stage.ask([(node, "generate", pack(Create(bytes(flipped), b"")))], timeout_s=60.0)[0]
        trial.case(answer.code in REFUSALS, f"a bit changed at byte {position}", node, answer.seen)
    # The same id with other terms: at most the key as it was made comes back.
    for what, other in {
        "with t = 1": replace(order, threshold=1),
        "with another algorithm": replace(order, algorithm="hmac-sha256"),
        "with fewer shares": replace(order, shares=order.threshold),
    }.items():
        body = pack(Create(_create(stage, other), b""))
        answer = stage.ask([(node, "generate", body)], timeout_s=60.0)[0]
        held, seen = answer.code in (REFUSALS | {"key-exists"}), answer.seen
        if answer.code == "ok":
            told = REPLY_CODECS["describe"].decode(answer.body)
            held, seen = told.manifest == stage.record("ordered").raw, "the key as it was made came back"
        trial.case(held, f"an order with the id of a key that is there, {what}", node, seen)
    again = stage.ask([(node, "generate", pack(Create(raw, b"")))], timeout_s=60.0)[0]
    same = again.code == "ok" and REPLY_CODECS["generate"].decode(again.body).manifest == stage.record("ordered").raw
    trial.case(
        same or again.code in (REFUSALS | {"key-exists"}),
        "the same order again",
        node,
        "the same key" if same else again.seen,
    )


def destroy_orders(stage: Stage, trial: Trial) -> None:
    word = "doomed"
    shares = min(5, len(stage.nodes))
    name = f"{PREFIX}{stage.run_id}/{word}"
    order = CreateOrder(os.urandom(16), name, "aes-256-gcm", shares // 2 + 1, shares, "generate", now_ms() + 60_000)
    raw = _create(stage, order)
    stage.will_make(name)
    node = stage.nodes[0]
    made = stage.ask([(node, "generate", pack(Create(raw, b"")))], timeout_s=60.0)[0]
    trial.control(made.code == "ok", "an honest create order makes a key", made.seen)
    stage.names[word] = name
    now = now_ms()
    stranger = SigningKey(stage.me.name, Ed25519PrivateKey.generate())

    def signed(message: DestroyOrder, signer: SigningKey | None = None) -> bytes:
        return sign_envelope("order.destroy", now_ms(), pack(message), signer or stage.me.signing)

    data = stage.record("data").manifest
    tries = {
        "expired": signed(DestroyOrder(order.key_id, name, now - CLOCK_SKEW_MS - 2_000)),
        "good for too long": signed(
            DestroyOrder(order.key_id, name, now + ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS + 60_000)
        ),
        "for another key's id": signed(DestroyOrder(data.key_id, name, now + 60_000)),
        "for another key's name": signed(DestroyOrder(order.key_id, data.name, now + 60_000)),
        "signed by a stranger": signed(DestroyOrder(order.key_id, name, now + 60_000), stranger),
        "the create order": raw,
    }
    good = signed(DestroyOrder(order.key_id, name, now + 60_000))
    for position in stage.chosen(len(good), 12 if stage.options.quick else 60):
        flipped = bytearray(good)
        flipped[position] ^= 1 << stage.random.randrange(8)
        tries[f"a bit changed at byte {position}"] = bytes(flipped)
    holders = stage.holders(word)
    for at in holders:
        requests = [(at, "destroy", pack(Destroy(each))) for each in tries.values()]
        judge(trial, [(what, at) for what in tries], stage.ask(requests), REFUSALS | {"key-not-found"})
    there = stage.ask_one(holders[0], RequestType.DESCRIBE, Describe(name, 0))
    trial.control(there.code == "ok", "the key is there after all of that", there.seen)
    done = stage.ask([(holders[0], "destroy", pack(Destroy(good)))], timeout_s=60.0)[0]
    trial.control(done.code == "ok", "an honest destroy order is carried out", done.seen)
    gone = frozenset({"key-not-found", "stale-key", "moved"}) | REFUSALS | {"key-exists"}
    for at in holders:
        for what, verb, body in (
            ("the create order of a destroyed key", "generate", pack(Create(raw, b""))),
            (
                "a new order with the id of a destroyed key",
                "generate",
                pack(Create(_create(stage, msgspec.structs.replace(order, threshold=1)), b"")),
            ),
        ):
            answer = stage.ask([(at, verb, body)], timeout_s=60.0)[0]
            trial.case(answer.code in gone, what, at, answer.seen)
        use = stage.operate(word, b"x", make_grant(stage, word, at))
        answer = stage.ask_one(at, RequestType.ENCRYPT, use)
        trial.case(answer.code in gone, "a use of the destroyed key, with a fresh grant", at, answer.seen)
    del stage.names[word]


def refreshes(stage: Stage, trial: Trial) -> None:
    word = "aged"
    stage.make_key(word, "aes-256-gcm")
    before = stage.record(word).manifest
    holders = stage.holders(word)
    older = {node: make_grant(stage, word, node) for node in holders}
    nonce, expires = os.urandom(16), now_ms() + 120_000
    order = RefreshOrder(before.key_id, before.name, before.epoch, nonce, expires)
    replace = msgspec.structs.replace

    def signed(message: RefreshOrder, signer: SigningKey | None = None) -> bytes:
        return sign_envelope("order.refresh", now_ms(), pack(message), signer or stage.me.signing)

    stranger = SigningKey(stage.me.name, Ed25519PrivateKey.generate())
    tries = {
        "expired": signed(replace(order, expires_ms=now_ms() - CLOCK_SKEW_MS - 2_000)),
        "for another key's id": signed(replace(order, key_id=stage.record("data").manifest.key_id)),
        "from an epoch to come": signed(replace(order, from_epoch=before.epoch + 7)),
        "signed by a stranger": signed(order, stranger),
    }
    node = holders[0]
    for what, raw in tries.items():
        answer = stage.ask([(node, "refresh", pack(Refresh(raw)))], timeout_s=60.0)[0]
        trial.case(answer.code in REFUSALS | {"key-not-found"}, f"a refresh order {what}", node, answer.seen)
    good = signed(order)
    done = stage.ask([(node, "refresh", pack(Refresh(good)))], timeout_s=60.0)[0]
    trial.control(done.code == "ok", "an honest refresh order makes the next epoch", done.seen)
    stage.forget(word)
    epoch = stage.record(word).manifest.epoch
    trial.control(epoch == before.epoch + 1, f"the epoch is {before.epoch + 1} then", str(epoch))
    for at in holders:
        again = stage.ask([(at, "refresh", pack(Refresh(good)))], timeout_s=60.0)[0]
        held, seen = again.code in REFUSALS | {"overloaded"}, again.seen
        if again.code == "ok":
            told = REPLY_CODECS["refresh"].decode(again.body)
            held, seen = told.manifest == stage.record(word).raw, "the epoch that is there came back"
        trial.case(held, "the refresh order again", at, seen)
    stage.flush(word)
    _settled(stage, word)
    for at in holders:
        answer = stage.ask_one(at, RequestType.ENCRYPT, stage.operate(word, b"x", older[at]))
        trial.case(answer.code in REFUSALS, "a grant of the epoch before", at, answer.seen)
        fresh = stage.ask_one(at, RequestType.ENCRYPT, stage.operate(word, b"x", stage.grant(word, at)))
        trial.control(fresh.code == "ok", f"a grant of the new epoch is good at {at}", fresh.seen)
        stage.flush(word)


def _settled(stage: Stage, word: str) -> None:
    """Wait until every holder tells of the new epoch, which it learns of within seconds."""
    until = time.monotonic() + 15.0
    wanted = stage.record(word).raw
    while time.monotonic() < until:
        told = [
            stage.ask_one(node, RequestType.DESCRIBE, Describe(stage.names[word], 0)) for node in stage.holders(word)
        ]
        if all(each.code == "ok" and REPLY_CODECS["describe"].decode(each.body).manifest == wanted for each in told):
            return
        time.sleep(0.2)


def confused_algorithms(stage: Stage, trial: Trial) -> None:
    for word, verb in (("data", "encrypt"), ("sign", "sign"), ("mac", "mac")):
        node = stage.holders(word)[0]
        answer = stage.ask_one(node, verb, stage.operate(word, b"x", make_grant(stage, word, node, operations=[verb])))
        trial.control(answer.code == "ok", f"{verb} with the key that can {verb}", answer.seen)
    cases, requests = [], []
    for word, verbs in {
        "data": ("sign", "verify", "mac", "verify-mac"),
        "sign": ("encrypt", "decrypt", "mac", "verify-mac"),
        "mac": ("encrypt", "decrypt", "sign", "verify"),
    }.items():
        for node in stage.holders(word):
            for verb in verbs:
                for digested in (False, True):
                    grant = make_grant(stage, word, node, operations=[verb])
                    message = stage.operate(word, bytes(32), grant, digested=digested, proof=b"p")
                    requests.append((node, verb, REQUEST_CODECS[verb].encode(message)))
                    cases.append((f"{verb}{' of a digest' if digested else ''} with the key {word!r}", node))
    for word, verb, fields in (
        ("mac", "mac", {"digested": True}),
        ("data", "encrypt", {"digested": True}),
        ("mac", "mac", {"associated_data": b"a"}),
        ("sign", "sign", {"associated_data": b"a"}),
        ("sign", "sign", {"digested": True, "data": bytes(31)}),
        ("sign", "sign", {"digested": True, "data": bytes(33)}),
        ("sign", "sign", {"digested": True, "data": b""}),
    ):
        node = stage.holders(word)[0]
        values: dict[str, Any] = {"data": bytes(32), **fields}
        message = stage.operate(word, grant=make_grant(stage, word, node, operations=[verb]), **values)
        requests.append((node, verb, REQUEST_CODECS[verb].encode(message)))
        cases.append((f"{verb} with {', '.join(fields)} out of place", node))
    try:
        answers = stage.ask(requests)
    except EngineError as error:
        raise NotRun(str(error)) from error
    judge(trial, cases, answers, REFUSALS | {"unsupported-algorithm", "invalid-tag", "invalid-signature"})


_GRANTS = "docs/security.md, grants; docs/protocol.md, Grant"
_ORDERS = "docs/security.md, no key without a client's word; docs/protocol.md, Orders"
ATTACKS: Final = (
    Attack(
        "grants.forged",
        "Forged grants",
        "to have a node gather a key that no client asked it to use",
        "each is refused at each combiner, and the key stays cold",
        f"{_GRANTS}; CWE-347",
        forged,
    ),
    Attack(
        "grants.changed",
        "Grants with changed bits, and cut ones",
        "to bend a grant to another key, combiner or time",
        "each is refused",
        f"{_GRANTS}; CWE-347",
        changed,
    ),
    Attack(
        "grants.misfit",
        "Grants for another key, epoch, version, operation or combiner",
        "to use a right for what it was not given",
        "each is refused at each combiner",
        f"{_GRANTS}; CWE-863",
        misfit,
    ),
    Attack(
        "grants.out-of-time",
        "Expired, future and too long grants",
        "to keep a right for later",
        "each is refused at each combiner",
        f"{_GRANTS}; CWE-613",
        out_of_time,
    ),
    Attack(
        "grants.replayed",
        "Grants that were used",
        "to gather a key again, without its client",
        "refused at the same combiner and at every other, after a flush too",
        f"{_GRANTS}; CWE-294",
        replayed,
    ),
    Attack(
        "grants.of-others",
        "Grants of another client",
        "to use another's permission",
        "each is refused at each combiner",
        f"{_GRANTS}; CWE-345",
        of_others,
        needs=frozenset({"second"}),
    ),
    Attack(
        "orders.create",
        "Create orders that are forged, changed, expired or weak",
        "a key with fewer shares, or one in another's place",
        "each is refused; the same order again gives the same key",
        f"{_ORDERS}; CWE-345, CWE-326",
        create_orders,
    ),
    Attack(
        "orders.destroy",
        "Destroy orders, and what is destroyed",
        "to destroy another's key, or to bring one back",
        "each is refused, and what was destroyed stays so",
        f"{_ORDERS}; CWE-294, CWE-345",
        destroy_orders,
    ),
    Attack(
        "orders.refresh",
        "Refresh orders again, and grants of an older epoch",
        "to bring an older epoch back, or to wear a key out",
        "no second epoch for one order; grants of the epoch before are refused",
        f"{_ORDERS}; CWE-294, CWE-757",
        refreshes,
        slow=True,
    ),
    Attack(
        "orders.confused-algorithms",
        "Operations that a key's algorithm does not have",
        "to have one key's bytes used under another algorithm",
        "each is refused",
        "docs/protocol.md, Algorithms; CWE-327, CWE-843",
        confused_algorithms,
    ),
)
