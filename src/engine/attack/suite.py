"""The list of attacks and one run of them: each with the look, before and after, whether the cluster is well."""

from __future__ import annotations

import fnmatch
import getpass
import platform
import socket
import time
from collections.abc import Callable
from typing import Final

import zmq

from engine._version import __version__
from engine.attack import data, documents, floods, frames, grants, membership, rights, shares, transport
from engine.attack.model import Attack, NotRun, Options, Result, Trial, Undecided, Verdict
from engine.attack.report import Report
from engine.attack.stage import Stage
from engine.attack.target import Target
from engine.errors import EngineError

__all__ = ["ATTACKS", "attack_cluster", "choose"]

ATTACKS: Final[tuple[Attack, ...]] = (
    *transport.ATTACKS,
    *frames.ATTACKS,
    *rights.ATTACKS,
    *grants.ATTACKS,
    *shares.ATTACKS,
    *data.ATTACKS,
    *documents.ATTACKS,
    *membership.ATTACKS,
    *floods.ATTACKS,
)


def choose(options: Options) -> dict[str, str]:
    """For each attack that is left out by the options, why; ``ValueError`` for a pattern that fits none."""
    for pattern in (*options.only, *options.skip):
        if not any(_fits(attack, pattern) for attack in ATTACKS):
            raise ValueError(f"no attack is called {pattern!r}; `keyquorum attack --list` shows them")
    left_out: dict[str, str] = {}
    for attack in ATTACKS:
        named = any(_fits(attack, pattern) for pattern in options.only)
        if options.only and not named:
            left_out[attack.id] = "not chosen (--only)"
        elif any(_fits(attack, pattern) for pattern in options.skip):
            left_out[attack.id] = "left out (--skip)"
        elif options.quick and attack.slow and not named:
            left_out[attack.id] = "left out of a quick run (--quick)"
    return left_out


def _fits(attack: Attack, pattern: str) -> bool:
    return pattern == attack.group or fnmatch.fnmatchcase(attack.id, pattern)


def attack_cluster(
    target: Target, options: Options, on_result: Callable[[Result], None] = lambda result: None
) -> Report:
    """Play the attacks. ``NodeUnavailable`` and others if the cluster is not well at the beginning.

    The throw-away keys are destroyed at the end, also when this is interrupted.
    """
    left_out = choose(options)
    started = time.time()
    stage = Stage(target, options)
    results: list[Result] = []
    members: dict[str, str] = {}
    try:
        stage.begin()
        members = {name: each.software for name, each in stage.serving.items()}
        for attack in ATTACKS:
            reason = left_out.get(attack.id, "") or _lacking(attack, target)
            if reason:
                result = Result(attack, Verdict.NOT_RUN, reason)
            elif harm := stage.harm():
                # What an earlier attack has broken is that one's failure; nothing can be shown on a broken cluster.
                result = Result(attack, Verdict.UNDECIDED, f"the cluster is not well: {harm}")
            else:
                result = _play(attack, stage)
            results.append(result)
            on_result(result)
    finally:
        stage.close()
    return Report(
        cluster=target.cluster.name,
        serial=target.cluster.serial,
        pin=target.cluster.pin.hex(),
        client=target.first.identity.name,
        second=target.second.identity.name if target.second else "",
        nodes=tuple(target.nodes),
        user=f"{_user()}@{socket.gethostname()}",
        software={
            "keyquorum": __version__,
            "libzmq": zmq.zmq_version(),
            "python": platform.python_version(),
            **{f"member {name}": version for name, version in members.items()},
        },
        started=started,
        ended=time.time(),
        options=options,
        results=tuple(results),
        leftovers=tuple(stage.leftovers),
        earlier=stage.earlier,
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _lacking(attack: Attack, target: Target) -> str:
    if "second" in attack.needs and target.second is None:
        return "needs a second client (--second-client)"
    if "node" in attack.needs and not target.nodes:
        return "needs the identity of a node (--node-identity)"
    return ""


def _play(attack: Attack, stage: Stage) -> Result:
    trial = Trial()
    stage.shuffle(attack.id)
    begun = time.monotonic()
    verdict, reason = Verdict.HELD, ""
    try:
        attack.run(stage, trial)
        if not trial.controls or not trial.tried:
            verdict, reason = Verdict.UNDECIDED, f"{trial.tried} cases and {len(trial.controls)} controls"
    except NotRun as lack:
        verdict, reason = Verdict.NOT_RUN, str(lack)
    except Undecided as control:
        verdict, reason = Verdict.UNDECIDED, str(control)
    except (EngineError, OSError, ValueError, zmq.ZMQError) as error:
        verdict, reason = Verdict.UNDECIDED, f"{type(error).__name__}: {error}"
    harm = stage.harm()
    if harm:
        verdict, reason = Verdict.FAILED, f"afterwards {harm}"
    elif trial.failures:
        verdict = Verdict.FAILED
        first = trial.failures[0]
        reason = f"{len(trial.failures)} of {trial.tried} cases; first: {first.what} at {first.at}: {first.seen}"
    return Result(attack, verdict, reason, time.monotonic() - begun, trial)
