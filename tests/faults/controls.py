"""Planted bugs: the matrix is worth nothing if its verdict over these is anything but FAILED."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faults_processes
from course import ONE_NODE, Fault, Row, Run, Session, by_name, carry_out

import engine

PLANTED = Path(__file__).parent / "planted"
PATIENCE_S = 2.0
"""What a bug has lost does not come back by waiting."""


@dataclass(frozen=True, slots=True)
class Control:
    """A bug, the fault it is tried with, and the kind of finding that must come."""

    name: str
    what: str
    finding: str
    fault: Fault
    bug: str = ""
    """The bug in every node, of ``planted/sitecustomize.py``; the cluster is of no use afterwards."""
    client: Callable[[Any], Any] = lambda kq: kq


class Wrapped:
    """An engine with something put between."""

    def __init__(self, kq: engine.Engine) -> None:
        self._kq = kq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kq, name)


class WrongPlaintext(Wrapped):
    """Now and then it gives a plaintext with a flipped bit."""

    count = 0

    def decrypt(self, name: str, ciphertext: bytes, **options: Any) -> bytes:
        got = self._kq.decrypt(name, ciphertext, **options)
        self.count += 1
        return bytes([got[0] ^ 1, *got[1:]]) if self.count % 5 == 0 and got else got


class WrongSignature(Wrapped):
    """Now and then it gives the signature of something else."""

    count = 0

    def sign(self, name: str, message: bytes, **options: Any) -> bytes:
        self.count += 1
        return self._kq.sign(name, message + b"?" if self.count % 4 == 0 else message, **options)


class Forgetful(Wrapped):
    """It says that a key was made when it was not."""

    made = 0

    def create_key(self, name: str, algorithm: str, **options: Any) -> Any:
        self.made += 1
        if self.made % 2:
            return self._kq.create_key(name, algorithm, **options)
        other = self._kq.create_key(f"{name}-elsewhere", algorithm, **options)
        return replace(other, name=name)


class GivesUp(Wrapped):
    """It tells its caller of the first node that does not answer, instead of asking another one."""

    def encrypt(self, name: str, plaintext: bytes, **options: Any) -> bytes:
        if any(member.error is not None for member in self._kq.status(timeout=0.5)):
            raise engine.NodeUnavailable("the first node that was asked does not answer")
        return self._kq.encrypt(name, plaintext, **options)


def _stays_away(run: Run) -> None:
    """A node dies and can't be started again: somebody broke its configuration."""
    victim = run.node()
    run.cluster.kill(victim)
    config = run.cluster.config_file(victim)
    config.write_text(config.read_text() + "\n[broken\n")
    time.sleep(0.3)


_FAULTS = by_name(faults_processes.FAULTS)
AWAY = Fault("stays-away", "controls", "a node never comes back", ONE_NODE, _stays_away, recover_s=3.0)
CONTROLS = [
    Control(
        "wrong-plaintext", "a client is given a wrong plaintext", "wrong", _FAULTS["kill-node"], client=WrongPlaintext
    ),
    Control(
        "wrong-signature",
        "a client is given another message's signature",
        "wrong",
        _FAULTS["kill-node"],
        client=WrongSignature,
    ),
    Control(
        "lost-key",
        "a creation is acknowledged and the key is not there",
        "lost",
        _FAULTS["kill-node"],
        client=Forgetful,
    ),
    Control("gives-up", "a client does not go on to another node", "error", _FAULTS["kill-node"], client=GivesUp),
    Control("other-mac", "every node makes the MAC of other data", "wrong", _FAULTS["kill-node"], bug="other_mac"),
    Control(
        "store-in-memory",
        "every node acknowledges and writes nothing",
        "lost",
        _FAULTS["kill-everything"],
        bug="store_in_memory",
    ),
    Control(
        "destroys-nothing",
        "every node acknowledges a destruction and keeps the key",
        "undead",
        _FAULTS["kill-node"],
        bug="destroys_nothing",
    ),
    Control("stays-away", "a node never comes back", "sick", AWAY),
]


def plant(session: Session, bug: str) -> None:
    """Start every node again with a bug in it, now and for the rest of the cluster's life."""
    cluster = session.cluster
    session.undo.later(cluster.everywhere({"PYTHONPATH": str(PLANTED), "KEYQUORUM_PLANTED": bug}).close)
    cluster.stop()
    cluster.start()
    with engine.connect(session.cluster.client_config) as kq:
        session.cluster.await_whole(kq)


def try_control(control: Control, session: Session, seed: int = 1) -> Row:
    """Run the fault with the bug in; the row's verdict is ``noticed`` or ``UNNOTICED``."""
    if control.bug:
        plant(session, control.bug)
    row = carry_out(control.fault, seed, session, control.client, PATIENCE_S, clear=False)
    row.fault, row.group = control.name, "controls"
    row.expected = f"FAILED by a finding of the kind {control.finding!r}"
    noticed = row.verdict == "FAILED" and any(found.startswith(f"{control.finding}:") for found in row.findings)
    row.verdict = "noticed" if noticed else "UNNOTICED"
    row.findings = sorted(row.findings, key=lambda found: not found.startswith(f"{control.finding}:"))[:3]
    row.sick = row.sick or bool(control.bug)
    return row
