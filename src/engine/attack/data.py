"""Attacks on data: ciphertexts, signatures and MACs that were changed, cut, exchanged; and what errors tell."""

from __future__ import annotations

import os
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from engine.attack.model import Attack, Trial
from engine.attack.stage import Answer, Stage, judge
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS

__all__ = ["ATTACKS"]

HEADER: Final = 8
"""Bytes of a ciphertext's header: format and version, which are no secret."""
TAG: Final = 16
TAG_WRONG: Final = frozenset({"invalid-tag"})
SIGNATURE_WRONG: Final = frozenset({"invalid-signature", "invalid-request", "protocol-error"})


def _ask(stage: Stage, node: str, verb: str, word: str, tries: dict[str, dict[str, bytes]]) -> list[Answer]:
    """Ask a node for each of the tries; the first has a grant, and the key is loaded by it."""
    loaded = stage.operate(word, b"\0" * 64, stage.grant(word, node, verb), proof=b"p")
    stage.ask_one(node, verb, loaded)
    requests = []
    for fields in tries.values():
        grant = stage.grant(word, node, verb)
        requests.append((node, verb, REQUEST_CODECS[verb].encode(stage.operate(word, grant=grant, **fields))))
    return stage.ask(requests)


def ciphertexts(stage: Stage, trial: Trial) -> None:
    texts: dict[str, set[str]] = {}
    for node in stage.holders("data"):
        plain, aad = os.urandom(16), b"tenant-7"
        good = stage.first.encrypt(stage.names["data"], plain, associated_data=aad)
        other = stage.first.encrypt(stage.names["other"], plain, associated_data=aad)
        second = stage.first.encrypt(stage.names["data"], plain, associated_data=aad)
        honest = _ask(stage, node, "decrypt", "data", {"": {"data": good, "associated_data": aad}})[0]
        right = honest.code == "ok" and REPLY_CODECS["decrypt"].decode(honest.body).data == plain
        trial.control(right, f"the ciphertext without a change is opened by {node}", honest.seen)
        tries: dict[str, dict[str, bytes]] = {}
        for position in range(len(good)):
            flipped = bytearray(good)
            flipped[position] ^= 1 << stage.random.randrange(8)
            tries[f"a bit changed at byte {position}"] = {"data": bytes(flipped), "associated_data": aad}
        for end in range(len(good)):
            tries[f"cut to {end} bytes"] = {"data": good[:end], "associated_data": aad}
        for what, data in {
            "a byte more": good + b"\0",
            "of another key": other,
            "the nonce of another": good[:HEADER] + second[HEADER : HEADER + 12] + good[HEADER + 12 :],
            "the tag of another": good[:-TAG] + second[-TAG:],
            "the body of another": good[: HEADER + 12] + second[HEADER + 12 : -TAG] + good[-TAG:],
            "a tag of zeros": good[:-TAG] + bytes(TAG),
            "another version": good[:4] + b"\0\0\0\2" + good[HEADER:],
            "version 0": good[:4] + bytes(4) + good[HEADER:],
            "another format": good[:2] + b"\2" + good[3:],
            "twice": good + good,
            "the longest": bytes(49_000),
        }.items():
            tries[what] = {"data": data, "associated_data": aad}
        for what, associated in {
            "without associated data": b"",
            "with other associated data": b"tenant-8",
            "with associated data that is longer": aad + b"\0",
            "with associated data that is shorter": aad[:-1],
        }.items():
            tries[what] = {"data": good, "associated_data": associated}
        answers = _ask(stage, node, "decrypt", "data", tries)
        judge(trial, [(what, node) for what in tries], answers, TAG_WRONG)
        body = [
            answer
            for (what, fields), answer in zip(tries.items(), answers, strict=True)
            if len(fields["data"]) >= HEADER + 12 + TAG and fields["data"][:HEADER] == good[:HEADER]
        ]
        texts[node] = {each.seen for each in body if each.code in TAG_WRONG}  # what was opened has failed already
        trial.figures[f"wrong tags told apart at {node}"] = len(texts[node]) - 1
        told = " / ".join(sorted(texts[node]))
        trial.case(
            len(texts[node]) == 1, "one text for all wrong tags (no oracle)", node, f"{len(texts[node])}: {told}"
        )


def signatures(stage: Stage, trial: Trial) -> None:
    message = os.urandom(40)
    for node in stage.holders("sign"):
        signature = stage.first.sign(stage.names["sign"], message)
        honest = _ask(stage, node, "verify", "sign", {"": {"data": message, "proof": signature}})[0]
        trial.control(honest.code == "ok", f"a right signature is found right by {node}", honest.seen)
        foreign = ec.generate_private_key(ec.SECP256R1()).sign(message, ec.ECDSA(hashes.SHA256()))
        tries = {
            "of another message": {"data": message + b"x", "proof": signature},
            "of no message": {"data": b"", "proof": signature},
            "of another key": {"data": message, "proof": foreign},
            "empty": {"data": message, "proof": b""},
            "zeros": {"data": message, "proof": bytes(70)},
            "r = 0, s = 0": {"data": message, "proof": bytes.fromhex("3006020100020100")},
            "r = 1, s = 1": {"data": message, "proof": bytes.fromhex("3006020101020101")},
            "a byte after its end": {"data": message, "proof": signature + b"\0"},
            "twice": {"data": message, "proof": signature + signature},
            "64 raw bytes": {"data": message, "proof": os.urandom(64)},
            "an RSA signature's length": {"data": message, "proof": os.urandom(256)},
            "1,024 bytes": {"data": message, "proof": os.urandom(1024)},
            "an endless DER": {"data": message, "proof": b"\x30\x84\xff\xff\xff\xff" + bytes(64)},
        }
        for position in range(len(signature)):
            flipped = bytearray(signature)
            flipped[position] ^= 1 << stage.random.randrange(8)
            tries[f"a bit changed at byte {position}"] = {"data": message, "proof": bytes(flipped)}
        for end in stage.chosen(len(signature), 20 if stage.options.quick else 80):
            tries[f"cut to {end} bytes"] = {"data": message, "proof": signature[:end]}
        judge(
            trial,
            [(f"a signature {w}", node) for w in tries],
            _ask(stage, node, "verify", "sign", tries),
            SIGNATURE_WRONG,
        )


def macs(stage: Stage, trial: Trial) -> None:
    message = os.urandom(40)
    tag = stage.first.mac(stage.names["mac"], message)
    for node in stage.holders("mac"):
        honest = _ask(stage, node, "verify-mac", "mac", {"": {"data": message, "proof": tag}})[0]
        trial.control(honest.code == "ok", f"a right MAC is found right by {node}", honest.seen)
        tries = {f"cut to {end} bytes": {"data": message, "proof": tag[:end]} for end in range(len(tag))}
        for position in range(len(tag)):
            flipped = bytearray(tag)
            flipped[position] ^= 1 << stage.random.randrange(8)
            tries[f"a bit changed at byte {position}"] = {"data": message, "proof": bytes(flipped)}
        tries["a byte more"] = {"data": message, "proof": tag + b"\0"}
        tries["of another message"] = {"data": message + b"x", "proof": tag}
        tries["zeros"] = {"data": message, "proof": bytes(len(tag))}
        tries["twice"] = {"data": message, "proof": tag + tag}
        answers = _ask(stage, node, "verify-mac", "mac", tries)
        judge(trial, [(f"a MAC {what}", node) for what in tries], answers, SIGNATURE_WRONG)
        texts = {each.seen for each in answers if each.code == "invalid-signature"}
        trial.case(len(texts) <= 1, "one text for all wrong MACs (no oracle)", node, f"{len(texts)} texts")


def nonces(stage: Stage, trial: Trial) -> None:
    """The same plaintext again and again: no nonce twice, over all nodes."""
    per_node = 40 if stage.options.quick else 400
    seen: set[bytes] = set()
    total = 0
    for node in stage.holders("data"):
        requests = [
            (
                node,
                "encrypt",
                REQUEST_CODECS["encrypt"].encode(stage.operate("data", b"same", stage.grant("data", node))),
            )
        ]
        trial.control(stage.ask(requests)[0].code == "ok", f"{node} encrypts")
        bare = REQUEST_CODECS["encrypt"].encode(stage.operate("data", b"same"))
        answers = stage.ask([(node, "encrypt", bare)] * per_node)
        found = [REPLY_CODECS["encrypt"].decode(each.body).data for each in answers if each.code == "ok"]
        fresh = {each[HEADER : HEADER + 12] for each in found}
        total += len(found)
        repeated = len(found) - len(fresh - seen)
        seen |= fresh
        trial.case(
            not repeated and bool(found),
            f"{per_node} encryptions of one plaintext",
            node,
            f"{repeated} nonces repeated of {len(found)}",
        )
    trial.figures["encryptions"] = total


_THREAT = "docs/security.md, How the defences work"
ATTACKS: Final = (
    Attack(
        "data.ciphertexts",
        "Ciphertexts changed at every byte, cut, exchanged",
        "to have something else decrypted, or to learn from the errors",
        "invalid-tag for each, with one text for all wrong tags; the time it takes is not judged",
        f"{_THREAT}; NIST SP 800-38D; CWE-353, CWE-209",
        ciphertexts,
    ),
    Attack(
        "data.signatures",
        "Signatures changed at every byte, cut, exchanged",
        "to have a wrong signature found right",
        "invalid-signature for each",
        f"{_THREAT}; FIPS 186-5; CWE-347",
        signatures,
    ),
    Attack(
        "data.macs",
        "MACs cut to every length, and changed at every byte",
        "to guess a short MAC, or to learn from the errors",
        "invalid-signature for each, with one text",
        f"{_THREAT}; RFC 2104; CWE-347, CWE-209",
        macs,
    ),
    Attack(
        "data.nonces",
        "Nonces of many encryptions of one plaintext",
        "two ciphertexts under one nonce, which open AES-GCM",
        "no nonce twice, over all nodes",
        "docs/security.md, About cryptography; NIST SP 800-38D; CWE-323",
        nonces,
    ),
)
