"""Attacks on membership while the cluster runs: forged manifests that are offered, and a client that was removed."""

from __future__ import annotations

import os
import time
from typing import Final

import msgspec
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.attack.model import Attack, NotRun, Trial
from engine.attack.sockets import Keys, Line
from engine.attack.stage import REFUSALS, Serving, Stage
from engine.attack.transport import hello_frame
from engine.protocol.requests import (
    MANIFEST_FETCH,
    MANIFEST_OFFER,
    MAX_MANIFEST_PIECE,
    REPLY_CODECS,
    REQUEST_CODECS,
    ManifestFetch,
    ManifestOffer,
)
from engine.protocol.signed import SigningKey, read_unverified, sign_envelope

__all__ = ["ATTACKS"]

pack = msgspec.msgpack.encode
unpack = msgspec.msgpack.decode
CUT_S: Final = 15.0
"""How long a member may take to cut off who was removed, on a busy machine; the manifest's own way included."""
PUBLISHED_S: Final = 2.5
"""Longer than a balancer takes from one routing table to the next."""


def _offers(stage: Stage) -> dict[str, tuple[int, bytes]]:
    """What: (the serial after which it comes, the manifests that are offered)."""
    envelopes = unpack(stage.target.chain)[0]
    newest = read_unverified(envelopes[-1])
    body = unpack(unpack(envelopes[-1])[0])
    payload = unpack(newest.payload)
    payload[1], payload[4] = newest.digest, [*payload[4], [stage.me.name, "*", ["*"]]]
    stranger = Ed25519PrivateKey.generate()
    operator = stage.cluster.of_role("operator")[0].name

    def signed(key: SigningKey, serial: int) -> bytes:
        return pack([[sign_envelope("cluster", serial, pack(payload), key)]])

    impostor = SigningKey(operator, stranger)
    body[3], body[4] = newest.serial + 1, pack(payload)
    good = signed(impostor, newest.serial + 1)
    found = {
        "a successor signed by the client": (newest.serial, signed(stage.me.signing, newest.serial + 1)),
        "a successor signed by a stranger in the operator's name": (newest.serial, good),
        "a successor with a serial left out": (newest.serial, signed(impostor, newest.serial + 2)),
        "another manifest of the serial in force": (newest.serial - 1, signed(impostor, newest.serial)),
        "more rights under the newest one's signature": (
            newest.serial,
            pack([[pack([pack(body), unpack(envelopes[-1])[1]])]]),
        ),
        "the newest one as its own successor": (newest.serial, pack([[envelopes[-1]]])),
        "one after a serial to come": (newest.serial + 5, good),
        "no manifest": (newest.serial, pack([[]])),
        "garbage": (newest.serial, os.urandom(500)),
    }
    for name, identity in stage.target.nodes.items():
        found[f"a successor signed by the node {name}"] = (newest.serial, signed(identity.signing, newest.serial + 1))
    return found


def offers(stage: Stage, trial: Trial) -> None:
    """Forged manifests, whole and in odd pieces: none is taken, and none is told of by hello."""
    serial = stage.cluster.serial
    offered = _offers(stage)
    for member in stage.servers:
        fetched = stage.ask_one(member.name, MANIFEST_FETCH, ManifestFetch(serial - 1, 0))
        good = fetched.code == "ok" and REPLY_CODECS[MANIFEST_FETCH].decode(fetched.body).serial == serial
        trial.control(good, f"{member.name} tells the manifest in force when it is asked", fetched.seen)
        piece = REPLY_CODECS[MANIFEST_FETCH].decode(fetched.body)
        if serial > 1 and 0 < piece.total == len(piece.data):
            # The same manifest again is honest, and changes nothing.
            again = stage.ask_one(member.name, MANIFEST_OFFER, ManifestOffer(serial - 1, piece.total, 0, piece.data))
            trial.control(again.code == "ok", f"{member.name} takes an offer of the manifest in force", again.seen)
        for what, (after, data) in offered.items():
            message = ManifestOffer(after, len(data), 0, data[:MAX_MANIFEST_PIECE])
            answer = stage.ask_one(member.name, MANIFEST_OFFER, message)
            trial.case(answer.code in REFUSALS, what, member.name, answer.seen)
        for what, message in {
            "an offer of 2^62 bytes": ManifestOffer(serial, 2**62, 0, bytes(100)),
            "an offer of 9 MiB": ManifestOffer(serial, 9 << 20, 0, bytes(100)),
            "a piece from the middle": ManifestOffer(serial, 1000, 500, bytes(100)),
            "an empty piece": ManifestOffer(serial, 1000, 0, b""),
            "more bytes than were told": ManifestOffer(serial, 10, 0, bytes(100)),
        }.items():
            answer = stage.ask_one(member.name, MANIFEST_OFFER, message)
            trial.case(answer.code in REFUSALS, what, member.name, answer.seen)
        _unfinished(stage, trial, member.name, serial)
    for name, told in stage.hello().items():
        kept = isinstance(told, Serving) and told.serial == serial
        trial.case(kept, "the serial in force afterwards", name, "unchanged" if kept else "changed")


def _unfinished(stage: Stage, trial: Trial, name: str, serial: int) -> None:
    """Offers that never end: what is kept of them is bounded, and the member goes on."""
    piece = REQUEST_CODECS[MANIFEST_OFFER].encode(ManifestOffer(serial, 8 << 20, 0, bytes(MAX_MANIFEST_PIECE)))
    answers = stage.ask([(name, MANIFEST_OFFER, piece)] * 20)
    held = all(answer.code in REFUSALS | {"ok", "overloaded"} for answer in answers)
    trial.case(held, "20 offers of 8 MiB that are begun and not ended", name, answers[-1].seen)


def revoked(stage: Stage, trial: Trial) -> None:
    """Connections of a client that is removed while they are open, a subscriber's included."""
    leaver = stage.target.leaver
    if leaver is None:
        raise NotRun("needs an operator who removes a client meanwhile (only with --local)")
    own = leaver.settings.identity.transport
    lines = [(m, Line.open(stage.context, m.endpoint, Keys.of(own, m))) for m in stage.servers]
    publishers = [m for m in stage.servers if m.publish_endpoint]
    listening = [(m, Line.open(stage.context, m.publish_endpoint, Keys.of(own, m), kind=zmq.SUB)) for m in publishers]
    try:
        for member, line in lines:
            good = line.settle(CUT_S) == "up" and line.send(hello_frame()) and line.receive(CUT_S)
            trial.control(bool(good), f"the client is served by {member.name} before it is removed")
        for member, line in listening:
            trial.control(bool(line.receive(CUT_S)), f"the client gets tables of {member.name} before it is removed")
        leaver.remove()
        until = time.monotonic() + CUT_S
        for member, line in lines:
            while not line.cut and time.monotonic() < until:
                line.look(0.1)
            line.send(hello_frame(2))
            answered = not line.cut and line.receive(1.0) is not None
            seen = "cut" if line.cut else "served still" if answered else "kept open, not served"
            trial.case(line.cut, "an open connection of a client that was removed", member.name, seen)
        for member, line in listening:
            while not line.cut and time.monotonic() < until:
                line.look(0.1)
            while line.socket.poll(0):
                line.socket.recv_multipart()
            got = line.socket.poll(int(PUBLISHED_S * 1000)) != 0
            seen = "tables come still" if got else "cut" if line.cut else "kept open, no table"
            trial.case(line.cut and not got, "an open subscription of it", member.name, seen)
        for member in stage.servers:
            line = Line.open(stage.context, member.endpoint, Keys.of(own, member))
            state = line.settle(5.0)
            line.close()
            trial.case(state != "up", "a new connection of it", member.name, state)
    finally:
        for _, line in (*lines, *listening):
            line.close()


ATTACKS: Final = (
    Attack(
        "members.offers",
        "Forged cluster manifests offered to running members",
        "to become a member, or to write the policy, without an operator",
        "each is refused by each member, and the serial in force stays",
        "docs/security.md, pinned membership; docs/protocol.md, Newer manifests; CWE-345, CWE-770",
        offers,
    ),
    Attack(
        "members.revoked",
        "A client that is removed while it is connected",
        "to go on with connections that are open already",
        f"each is cut within {CUT_S:g} s, subscriptions too, and no new one is let in",
        "docs/security.md, Who has a client's key; docs/protocol.md, Newer manifests; CWE-613",
        revoked,
    ),
)
