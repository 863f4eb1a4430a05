"""Faults of tokens: the shim before each node's token is slow, refuses or hangs, or the token's own files are gone."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from course import ONE_NODE, Fault, Run

import engine
from pkcs11_shim import CKR, Shim

USES = (
    "C_EncryptInit",
    "C_Encrypt",
    "C_DecryptInit",
    "C_Decrypt",
    "C_SignInit",
    "C_Sign",
    "C_VerifyInit",
    "C_Verify",
    "C_CreateObject",
)
ALL = (*USES, "C_OpenSession", "C_Login", "C_GetTokenInfo", "C_GetSessionInfo", "C_FindObjectsInit", "C_GenerateRandom")
WELL_S = 15.0
"""How long a node may take to be well again by itself; then it is started again, and the row says so."""


def _shim(run_: Run, victim: str) -> Shim:
    shim = run_.cluster.shims[victim]

    def undo() -> None:
        for name in ALL:
            shim.release(name)
        shim.clear()

    run_.undo.later(undo)
    return shim


def _serves(run_: Run, victim: str) -> bool:
    """Whether the node combines a key by its own token: the gathered share, the load and a use."""
    key = run_.session.elders[0]
    run_.kq.flush(key.name, timeout=1.0)
    return victim in run_.kq.prewarm(key.name, timeout=2.0)


def _well_again(run_: Run, victim: str) -> None:
    """The fault is over: the node must come back by itself, or be started again, which the row tells."""
    shim = run_.cluster.shims[victim]
    for name in ALL:
        shim.release(name)
    shim.clear()
    begun = time.monotonic()
    while time.monotonic() < begun + WELL_S:
        with contextlib.suppress(engine.EngineError):
            if _serves(run_, victim):
                run_.note(f"serves again after {time.monotonic() - begun:.1f} s")
                return
        time.sleep(0.1)
    run_.note("started again")
    if run_.cluster.running()[victim] is not None:
        run_.cluster.kill(victim)
    run_.cluster.start_node(victim)
    run_.eventually(f"{victim} serves after a new start", lambda: _serves(run_, victim), WELL_S)


def _met(run_: Run, shim: Shim, *functions: str) -> None:
    run_.expect("the fault was met", any(shim.fired(name) for name in functions))


def _with(run_: Run, set_fault: Callable[[Shim], tuple[str, ...]]) -> str:
    victim = run_.node()
    shim = _shim(run_, victim)
    before = {name: shim.fired(name) for name in ALL}
    functions = set_fault(shim)
    run_.note(" ".join(functions) if len(functions) < 4 else f"{len(functions)} functions")
    run_.hold(1.5, 2.5)
    run_.expect("the fault was met", any(shim.fired(name) > before[name] for name in functions))
    _well_again(run_, victim)
    return victim


def hung(run_: Run) -> None:
    """One call never returns."""

    def hang(shim: Shim) -> tuple[str, ...]:
        function = run_.rng.choice(("C_Encrypt", "C_Sign", "C_CreateObject", "C_Decrypt"))
        shim.hang(function)
        return (function,)

    _with(run_, hang)


def slow(run_: Run) -> None:
    def delay(shim: Shim) -> tuple[str, ...]:
        seconds = run_.rng.uniform(0.02, 0.6)
        run_.note(f"{seconds * 1000:.0f} ms")
        for function in USES:
            shim.delay(function, seconds)
        return USES

    _with(run_, delay)


def session_lost(run_: Run) -> None:
    _with(run_, lambda shim: _fail_some(run_, shim, run_.rng.choice((CKR.SESSION_HANDLE_INVALID, CKR.SESSION_CLOSED))))


def login_lost(run_: Run) -> None:
    _with(run_, lambda shim: _fail_some(run_, shim, CKR.USER_NOT_LOGGED_IN))


def general_error(run_: Run) -> None:
    """Calls fail now and then for no clear reason."""

    def fail(shim: Shim) -> tuple[str, ...]:
        functions = tuple(run_.rng.sample(USES, 3))
        for function in functions:
            shim.fail(function, CKR.GENERAL_ERROR, times=run_.rng.randint(1, 5), skip=run_.rng.randint(0, 3))
        return functions

    _with(run_, fail)


def memory_error(run_: Run) -> None:
    _with(run_, lambda shim: _fail_some(run_, shim, run_.rng.choice((CKR.DEVICE_MEMORY, CKR.HOST_MEMORY))))


def _fail_some(run_: Run, shim: Shim, code: int) -> tuple[str, ...]:
    """The code from every function that needs what was lost, a few times."""
    for function in USES:
        shim.fail(function, code, times=run_.rng.randint(1, 3))
    return USES


def removed(run_: Run) -> None:
    """The device is gone for everything, and comes back."""

    def remove(shim: Shim) -> tuple[str, ...]:
        code = run_.rng.choice((CKR.DEVICE_REMOVED, CKR.TOKEN_NOT_PRESENT, CKR.DEVICE_ERROR))
        shim.fail_all(ALL, code)
        return ALL

    _with(run_, remove)


def crashed(run_: Run) -> None:
    """The module brings its process down."""
    victim = run_.node()
    shim = _shim(run_, victim)
    shim.crash(run_.rng.choice(("C_Encrypt", "C_Sign", "C_CreateObject")))
    run_.hold(1.2, 2.0)
    _well_again(run_, victim)


def pin_locked(run_: Run) -> None:
    """The token's PIN is locked when the node logs in: it must say so and not try for ever, which locks tokens."""
    victim = run_.node()
    shim = _shim(run_, victim)
    run_.cluster.stop_node(victim)
    before = shim.calls("C_Login")
    shim.fail("C_Login", CKR.PIN_LOCKED)
    refused = run_.refused_start(victim, "PIN", "Pin", "pin")
    run_.expect("a node whose PIN is locked does not start", refused)
    run_.hold(0.8, 1.5)
    tries = shim.calls("C_Login") - before
    run_.note(f"{tries} logins")
    run_.expect(f"few tries of a locked PIN ({tries})", tries <= 3)
    shim.clear()


def _tokens(run_: Run, victim: str) -> tuple[Path, Path]:
    """The token's folder, and a copy of it that is put back at the end."""
    cluster = run_.cluster
    tokens = cluster.data_folder(victim) / "tokens"
    kept = cluster.path / f"{victim}.tokens"
    shutil.copytree(tokens, kept)

    def undo() -> None:
        if cluster.running()[victim] is not None:
            cluster.kill(victim)
        shutil.rmtree(tokens, ignore_errors=True)
        kept.rename(tokens)

    run_.undo.later(undo)
    return tokens, kept


def deleted(run_: Run) -> None:
    """The token's files are deleted under a running node; SoftHSM goes on with what it has in memory."""
    victim = run_.node()
    tokens, _ = _tokens(run_, victim)
    shutil.rmtree(tokens)
    run_.hold(1.2, 2.0)
    if run_.cluster.running()[victim] is not None:
        run_.cluster.kill(victim)
    run_.expect("a node whose token is gone does not start", run_.refused_start(victim, "token", "Token"))
    run_.hold(0.3, 0.6)


def initialised_anew(run_: Run) -> None:
    """Somebody makes a new token of the same name and PIN: the KEK is gone, and the node must not serve by another."""
    victim = run_.node()
    cluster = run_.cluster
    tokens, _ = _tokens(run_, victim)
    shutil.rmtree(tokens)
    tokens.mkdir(mode=0o700, exist_ok=True)  # the node may have made it anew
    conf = next(cluster.data_folder(victim).glob("softhsm2*.conf"))
    told = tomllib.loads(cluster.config_file(victim).read_text())["token"]
    pin = (cluster.path / "secrets" / f"{victim}.pin").read_text().strip()
    command = [
        "softhsm2-util",
        "--init-token",
        "--free",
        "--label",
        told["label"],
        "--so-pin",
        secrets.token_hex(8),
        "--pin",
        pin,
    ]
    subprocess.run(command, env={**os.environ, "SOFTHSM2_CONF": str(conf)}, check=True, capture_output=True, timeout=30)
    run_.hold(1.0, 1.8)
    if cluster.running()[victim] is not None:
        cluster.kill(victim)
    run_.expect("a node with another token does not start", run_.refused_start(victim, "KEK", "token", "Token", "key"))
    run_.hold(0.3, 0.6)


TOKEN = replace(ONE_NODE, create=frozenset({"token-error"}))
BACK = "the node serves again by itself"
FAULTS = [
    Fault(
        "token-deleted",
        "token",
        "the token's files are deleted",
        ONE_NODE,
        deleted,
        tells="the node does not start again without it",
    ),
    Fault(
        "token-new",
        "token",
        "a new token takes the place of the token",
        ONE_NODE,
        initialised_anew,
        tells="the node does not start with it",
    ),
    Fault("token-hung", "token", "a call of the token never returns", ONE_NODE, hung, tells=BACK),
    Fault("token-slow", "token", "each call takes 20 to 600 ms", ONE_NODE, slow, tells=BACK),
    Fault("token-session", "token", "sessions are lost", ONE_NODE, session_lost, tells=BACK),
    Fault("token-login", "token", "the login is lost", ONE_NODE, login_lost, tells=BACK),
    Fault(
        "token-pin",
        "token",
        "the PIN is locked",
        ONE_NODE,
        pin_locked,
        tells="the node does not start, says why, and tries 3 times at most",
    ),
    Fault("token-error", "token", "CKR_GENERAL_ERROR now and then", ONE_NODE, general_error, tells=BACK),
    Fault("token-memory", "token", "the token is out of memory", ONE_NODE, memory_error, tells=BACK),
    Fault("token-removed", "token", "the device is removed and comes back", ONE_NODE, removed, tells=BACK),
    Fault(
        "token-crash",
        "token",
        "the module ends its process",
        ONE_NODE,
        crashed,
        tells="serves again, or after a new start",
    ),
]
__all__ = ["FAULTS", "TOKEN"]
