"""Named places where a test has a process die, fail or wait: off unless ``KEYQUORUM_FAILPOINTS`` is set.

The variable holds ``name=action`` pairs, parted by semicolons::

    KEYQUORUM_FAILPOINTS="dealer.create.reserved=kill; holder.commit.written=kill@3; registry.commit.before=delay:200"

``kill`` ends the process by SIGKILL, ``stop`` stops it until SIGCONT, so that others can be ended just then, ``error``
raises ``EngineError``, ``delay:MS`` waits. ``@N`` means at the N-th passing alone; without it, at each one. It knows no
more of the process than that.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import structlog

from engine.errors import ConfigError, EngineError

__all__ = ["POINTS", "VARIABLE", "arm", "arm_from_environment", "armed", "failpoint"]

VARIABLE: Final = "KEYQUORUM_FAILPOINTS"
MAX_DELAY_MS: Final = 60_000
MAX_PASSING: Final = 1_000_000

POINTS: Final[Mapping[str, str]] = {
    "dealer.create.reserved": "the registry reserved the name; nothing is dealt",
    "dealer.create.dealt": "the shares are made, none is sent",
    "dealer.create.prepared-one": "one more receipt came",
    "dealer.create.prepared": "all receipts that are waited for came; the registry is not told",
    "dealer.create.committed": "the registry committed; no holder is told",
    "dealer.create.announced": "the holders were told of the commit",
    "dealer.create.recorded": "the audit record is durable; the client has no reply",
    "dealer.create.answered": "the reply was handed to the socket",
    "dealer.abort.before": "the creation failed; the registry is not told",
    "dealer.abort.booked": "the registry aborted; no holder is told",
    "dealer.abort.told": "the holders were told of the abort",
    "dealer.destroy.before": "the order is checked; the registry is not told",
    "dealer.destroy.booked": "the registry has the tombstone; no holder is told",
    "dealer.destroy.told": "the holders were told to destroy",
    "dealer.destroy.recorded": "the audit record is durable; the client has no reply",
    "dealer.destroy.answered": "the reply was handed to the socket",
    "dealer.settings.before": "the settings are checked; the registry is not told",
    "dealer.settings.booked": "the registry has them; no holder is told",
    "dealer.settings.told": "the holders were told the settings",
    "dealer.settings.recorded": "the audit record is durable; the client has no reply",
    "dealer.settings.answered": "the reply was handed to the socket",
    "dealer.refresh.reserved": "the registry gave an attempt; no holder is told",
    "dealer.refresh.dealt": "all holders dealt; nobody keeps anything",
    "dealer.refresh.stated": "all holders told what their new shares would be, and follow no earlier attempt",
    "dealer.refresh.renewed": "all holders stored their new shares beside the old; the registry is not told",
    "dealer.refresh.committed": "the registry committed the new epoch; no holder is told",
    "dealer.refresh.announced": "the holders were told of the commit",
    "dealer.refresh.recorded": "the audit record is durable; the client has no reply",
    "dealer.refresh.answered": "the reply was handed to the socket",
    "dealer.reshare.reserved": "the registry gave an attempt; no holder is told",
    "dealer.reshare.dealt": "all dealers shared their share; nobody keeps anything",
    "dealer.reshare.stated": "all new holders told what their shares would be, and follow no earlier attempt",
    "dealer.reshare.renewed": "all new holders stored their shares; the registry is not told",
    "dealer.reshare.tried": "the trial that the order asks for gave the key; the registry is not told",
    "dealer.reshare.committed": "the registry committed the new epoch; no holder is told",
    "dealer.reshare.announced": "the new holders were told of the commit; those that leave were not",
    "dealer.reshare.dismissed": "those that leave were told to erase their share",
    "dealer.reshare.recorded": "the audit record is durable; the client has no reply",
    "dealer.reshare.answered": "the reply was handed to the socket",
    "dealer.move.recorded": "the audit record of a balancer's orders is durable; the balancer has no reply",
    "dealer.move.answered": "the reply was handed to the socket",
    "holder.deal.dealt": "the sharing is made; nobody has it",
    "holder.deal.answered": "the reply was handed to the socket",
    "holder.many.recorded": "the audit records of a bundle of steps are durable; the coordinator has no reply",
    "holder.many.answered": "the replies to a bundle were handed to the socket",
    "holder.refresh.pledged": "no earlier attempt is followed any more; nothing is signed yet",
    "holder.refresh.stated": "the statement is signed; nobody has it",
    "holder.refresh.answered": "the reply was handed to the socket",
    "holder.renew.recorded": "the audit record is durable; the coordinator has no reply",
    "holder.renew.answered": "the receipt was handed to the socket",
    "holder.reshare.pledged": "no earlier attempt is followed any more; nothing is signed yet",
    "holder.reshare.stated": "the statement is signed; nobody has it",
    "holder.reshare.answered": "the reply was handed to the socket",
    "holder.accept.recorded": "the audit record is durable; the coordinator has no reply",
    "holder.accept.answered": "the receipt was handed to the socket",
    "holder.trial.passed": "the prepared epoch was combined and is the key; nothing is signed",
    "holder.trial.recorded": "the audit record is durable; the coordinator has no reply",
    "holder.trial.answered": "the receipt was handed to the socket",
    "holder.leave.checked": "the certificate is good; nothing is erased",
    "holder.leave.written": "the share is out of the store; the log may still have it",
    "holder.leave.recorded": "the audit record is durable; the coordinator has no reply",
    "holder.leave.answered": "the reply was handed to the socket",
    "holder.prepare.checked": "the offer is good; nothing is written",
    "holder.prepare.sealed": "the share is sealed; nothing is written",
    "holder.prepare.written": "the share is durable in the store; it is not read back",
    "holder.prepare.read-back": "the stored share was unsealed and compared; there is no receipt",
    "holder.prepare.signed": "the receipt is signed",
    "holder.prepare.recorded": "the audit record is durable; the dealer has no reply",
    "holder.prepare.answered": "the receipt was handed to the socket",
    "holder.commit.checked": "the certificate is good; nothing is written",
    "holder.commit.written": "the commit is durable",
    "holder.commit.recorded": "the audit record is durable; the dealer has no reply",
    "holder.commit.answered": "the reply was handed to the socket",
    "holder.abort.checked": "the notice is good; nothing is deleted",
    "holder.abort.deleted": "the row is deleted; the log still has it",
    "holder.abort.erased": "the log is truncated",
    "holder.abort.recorded": "the audit record is durable; the dealer has no reply",
    "holder.abort.answered": "the reply was handed to the socket",
    "holder.destroy.checked": "the order is good; nothing is erased",
    "holder.destroy.written": "the share is out of the store; the log still has it",
    "holder.destroy.erased": "the log is truncated",
    "holder.destroy.recorded": "the audit record is durable; the dealer has no reply",
    "holder.destroy.answered": "the reply was handed to the socket",
    "holder.settings.checked": "the settings are good and newer; nothing is written",
    "holder.settings.written": "the settings are durable; this process does not go by them yet",
    "holder.settings.recorded": "the audit record is durable; the dealer has no reply",
    "holder.settings.answered": "the reply was handed to the socket",
    "holder.release.checked": "the grant is good; the share is sealed",
    "holder.release.spent": "that the grant was used is durable; the share is sealed",
    "holder.release.unsealed": "the share is open",
    "holder.release.recorded": "the audit record is durable; the combiner has no reply",
    "holder.release.answered": "the share was handed to the socket",
    "holder.export.begun": "the archive's key is made and split; nothing is told",
    "holder.export.made": "a page of an archive is made; nobody has it",
    "holder.export.recorded": "the audit record is durable; the client has no reply",
    "holder.export.answered": "a part of an archive was handed to the socket",
    "holder.restore.taken": "the shares of a page are durable in the store; the client has no reply",
    "holder.restore.recorded": "the audit record is durable; the client has no reply",
    "holder.restore.answered": "the receipts were handed to the socket",
    "store.write.begun": "a transaction of the node's store is open, nothing is changed",
    "store.write.changed": "a transaction of the node's store has made its changes, before COMMIT",
    "store.write.durable": "a transaction of the node's store is durable; nobody knows it",
    "combiner.gather.begun": "a cold key's holders are about to be asked",
    "combiner.gather.gathered": "the shares are combined",
    "combiner.gather.loaded": "the key is a session object of the token; nobody has used it",
    "combiner.operate.answered": "the reply of an operation was handed to the socket",
    "combiner.quota.before": "the registry is about to be asked for more uses of a key",
    "combiner.quota.granted": "the registry has granted more uses of a key; this node has not noted them",
    "registry.open.before": "the registry's file is open; its fencing epoch is not raised",
    "registry.open.changed": "the new fencing epoch is written, before COMMIT",
    "registry.open.durable": "the new fencing epoch is durable; nothing is served",
    "registry.reserve.before": "the order is checked; no transaction is open",
    "registry.reserve.changed": "the reservation is written, before COMMIT",
    "registry.reserve.durable": "the reservation is durable; the dealer has no reply",
    "registry.change.before": "the refresh or reshare order is checked; no transaction is open",
    "registry.change.changed": "the attempt is written, before COMMIT",
    "registry.change.durable": "the attempt is durable; the coordinator has no reply",
    "registry.adopt.before": "an epoch that is not in the books is proved by its certificate; no transaction is open",
    "registry.adopt.changed": "that epoch is written, before COMMIT",
    "registry.adopt.durable": "that epoch is durable",
    "registry.commit.before": "manifest and receipts are checked; no transaction is open",
    "registry.commit.changed": "the commit is written, before COMMIT",
    "registry.commit.durable": "the commit is durable; the dealer has no reply",
    "registry.abort.before": "the abort is checked; no transaction is open",
    "registry.abort.changed": "the abort is written, before COMMIT",
    "registry.abort.durable": "the abort is durable; the dealer has no notice",
    "registry.expire.before": "an expired reservation is asked about; no transaction is open",
    "registry.expire.changed": "its abort is written, before COMMIT",
    "registry.expire.durable": "its abort is durable; the holder has no notice",
    "registry.refuse.before": "an attempt is asked about that is not in the books; no transaction is open",
    "registry.refuse.changed": "that it never will be is written, before COMMIT",
    "registry.refuse.durable": "that it never will be is durable; the holder has no notice",
    "registry.destroy.before": "the order is checked; no transaction is open",
    "registry.destroy.changed": "the tombstone is written, before COMMIT",
    "registry.destroy.durable": "the tombstone is durable; the dealer has no reply",
    "registry.settings.before": "the settings are checked; no transaction is open",
    "registry.settings.changed": "the settings are written, before COMMIT",
    "registry.settings.durable": "the settings are durable; the dealer has no reply",
    "registry.quota.before": "a holder may ask for more uses of a key; no transaction is open",
    "registry.quota.changed": "what it is granted is written, before COMMIT",
    "registry.quota.durable": "what it is granted is durable; it has no reply",
    "registry.due.before": "the time of a key has come; no transaction is open",
    "registry.due.changed": "its tombstone is written, before COMMIT",
    "registry.due.durable": "its tombstone is durable; no holder knows it",
    "registry.revive.before": "a key was destroyed by settings that others had replaced; no transaction is open",
    "registry.revive.changed": "that it lives is written, before COMMIT",
    "registry.revive.durable": "that it lives is durable",
    "rotate.begun": "the old token is copied into the draft",
    "rotate.token-made": "the draft has a fresh token beside the old one, and the PIN file a fresh one beside it",
    "rotate.sealed": "the draft's store is sealed by the fresh KEK; nothing of it is synced",
    "rotate.durable": "the draft has the fresh token alone and is on the disk",
    "rotate.verified": "a fresh process opened everything in the draft",
    "rotate.changed": "the draft counts; nothing is in its place yet",
    "rotate.pin-changed": "the fresh PIN is in its place",
    "rotate.token-changed": "the fresh token is in its place",
    "rotate.store-changed": "the fresh store is in its place; the old things are not erased",
    "rotate.erased": "the old things are erased",
}
"""Every name, and what is so when it is passed. The crash tests go through all of them."""

_PAIR: Final = re.compile(r"\s*([a-z0-9.-]+)\s*=\s*(kill|stop|error|delay:([0-9]{1,5}))(?:@([0-9]{1,7}))?\s*", re.ASCII)
_armed: dict[str, Callable[[], None]] = {}

log = structlog.get_logger()


def failpoint(name: str) -> None:
    """Do what is set for this place; by default nothing."""
    action = _armed.get(name)
    if action is not None:
        action()


def armed() -> bool:
    """Whether anything is set."""
    return bool(_armed)


def arm_from_environment() -> None:
    """Set what ``KEYQUORUM_FAILPOINTS`` says, once, at a process's start; ``ConfigError`` names a bad part."""
    text = os.environ.get(VARIABLE, "")
    if text:
        arm({})
        _armed.update(parse(text))
        log.warning("failpoints are set: this process will fail on purpose", failpoints=text)


def arm(actions: Mapping[str, Callable[[], None]]) -> None:
    """Set exactly these actions; an unknown name is a ``ConfigError``. With none, all are off."""
    for name in actions:
        _check_name(name)
    _armed.clear()
    _armed.update(actions)


def parse(text: str) -> dict[str, Callable[[], None]]:
    """The actions of a list of ``name=action`` pairs."""
    found: dict[str, Callable[[], None]] = {}
    for part in text.split(";"):
        if not part.strip():
            continue
        match = _PAIR.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"{VARIABLE}: {part.strip()[:80]!r} is not name=kill, stop, error or delay:MS, with @N or not"
            )
        name, action, delay, passing = match.groups()
        _check_name(name)
        if name in found:
            raise ConfigError(f"{VARIABLE}: {name!r} is set twice")
        if delay is not None and int(delay) > MAX_DELAY_MS:
            raise ConfigError(f"{VARIABLE}: {name!r} waits {delay} ms, at most {MAX_DELAY_MS}")
        if passing is not None and not 1 <= int(passing) <= MAX_PASSING:
            raise ConfigError(f"{VARIABLE}: {name!r} has @{passing}, not in 1..{MAX_PASSING}")
        found[name] = _at(int(passing or 0), _action(name, action, int(delay or 0)))
    return found


def _check_name(name: str) -> None:
    if name not in POINTS:
        raise ConfigError(f"{VARIABLE}: no failpoint is called {name[:80]!r}")


def _action(name: str, action: str, delay_ms: int) -> Callable[[], None]:
    if action in ("kill", "stop"):
        number = signal.SIGKILL if action == "kill" else signal.SIGSTOP
        return lambda: os.kill(os.getpid(), number)
    if action == "error":
        return lambda: _fail(name)
    return lambda: time.sleep(delay_ms / 1000)


def _fail(name: str) -> None:
    raise EngineError(f"the failpoint {name} is set to fail")


def _at(passing: int, action: Callable[[], None]) -> Callable[[], None]:
    """The action at the given passing alone, counted over all threads; 0: at each."""
    if not passing:
        return action
    counter: Iterator[int] = itertools.count(1)

    def counted() -> None:
        if next(counter) == passing:
            action()

    return counted
