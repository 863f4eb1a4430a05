"""Looks after the token's health on a thread of its own: canaries, renewals, and what the node says of it.

What is done when is decided in ``nodes/health.py``. It knows no key, no share and no request. A call of the token that
never returns hangs this thread too: that is for the supervisor to notice.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from engine.errors import EngineError
from engine.protocol.requests import TokenHealth
from nodes.config import TokenCare
from nodes.health import (
    CKR_PIN_INCORRECT,
    EXIT_PIN,
    EXIT_TOKEN,
    CanaryFailed,
    CanaryGood,
    Event,
    Kind,
    NotRenewed,
    OperationFailed,
    Renewed,
    State,
    TokenFault,
    decide,
    wants_renewal,
)
from nodes.token import Token, TokenBusy

__all__ = ["Keeper"]

LOOK_EVERY_S: Final = 1.0
CANARY_AGAIN_S: Final = 0.2
"""The least time between two canaries that unclear failures ask for."""
FRESH_TIMEOUT_S: Final = 30.0
MAX_FAULTS: Final = 256
"""Reports that wait; more say nothing new."""
MAX_REASON: Final = 400
RECYCLE_SPREAD: Final = 0.1
"""Nodes that load keys at one pace renew their tokens at different times: each at a number this much around it."""

log = structlog.get_logger()


class Keeper:
    """The health of one token. ``problem`` may be read, and ``report`` called, from any thread.

    ``fresh_command`` starts a process that gets the witness on its standard input, in hex. ``renewed`` is called
    by this thread after each renewal.
    """

    def __init__(
        self,
        token: Token,
        care: TokenCare,
        fresh_command: Sequence[str],
        *,
        renewed: Callable[[], None],
    ) -> None:
        self._token = token
        self._care = care
        self._lane = token.lane()
        self._fresh_command = list(fresh_command)
        self._renewed = renewed
        self._state = State()
        self.problem = ""
        """Why the token serves nothing; empty if it serves. Each request looks at it."""
        self._faults: deque[TokenFault] = deque(maxlen=MAX_FAULTS)
        self._wake = threading.Event()
        self._ending = False
        self._renewals = 0
        self._made_before = token.made
        self._recycle_at = self._next_recycling()
        self._canary_s = self._fresh_s = now = time.monotonic()
        self._next_canary_s = now + care.canary_every_s
        # Nodes that start together don't check together.
        self._next_fresh_s = now + random.uniform(0.5, 1.0) * care.fresh_canary_every_s  # noqa: S311 - no secret
        self._fresh: tuple[subprocess.Popen[bytes], float] | None = None
        self._fresh_problem = ""
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        token.report = self.report

    def start(self) -> None:
        """Begin; the token was opened a moment ago."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End after what is being done, within the time."""
        self._ending = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def report(self, fault: TokenFault, generation: int) -> None:
        """Some lane met a fault."""
        self._faults.append(fault)
        self._wake.set()

    def told(self) -> TokenHealth:
        """For ``status``."""
        now = time.monotonic()
        return TokenHealth(
            problem=self.problem,
            check=self._fresh_problem,
            renewals=self._renewals,
            made=self._token.made,
            canary_age_ms=int((now - self._canary_s) * 1000),
            fresh_age_ms=int((now - self._fresh_s) * 1000),
        )

    # --- the thread ---

    def _run(self) -> None:
        while not self._ending:
            try:
                wait_s = self._look(time.monotonic())
            except Exception as error:  # nobody else looks after the token
                log.error("looking after the token failed", kind=type(error).__name__, exc_info=error)
                wait_s = LOOK_EVERY_S
            self._wake.wait(wait_s)
            self._wake.clear()
        self._end_fresh()

    def _look(self, now: float) -> float:
        """Do what is due; how long it may wait then."""
        while self._faults:
            fault = self._faults.popleft()
            if fault.kind in (Kind.UNCLEAR, Kind.MEMORY):
                self._next_canary_s = min(self._next_canary_s, self._canary_s + CANARY_AGAIN_S)
            else:
                self._happened(OperationFailed(fault.ckr, str(fault)))
        self._look_at_fresh(now)
        if wants_renewal(self._state, now):
            self._renew("it failed")
        elif self._state.mode == "serving":
            if self._token.made - self._made_before >= self._recycle_at:
                self._renew("objects were made in it")
            elif now >= self._next_canary_s:
                self._canary()
        due = [self._next_canary_s, self._next_fresh_s] if self._state.mode == "serving" else [self._state.next_try_s]
        soonest = max(0.01, min(due) - time.monotonic()) if self._state.mode != "stopped" else LOOK_EVERY_S
        return min(soonest, 0.05 if self._fresh else LOOK_EVERY_S)

    def _happened(self, event: Event) -> None:
        before = self.problem
        self._state = state = decide(self._state, event, time.monotonic())
        self.problem = "" if state.mode == "serving" else f"the token is {state.mode}: {state.reason}"[:MAX_REASON]
        if self.problem != before:
            if self.problem:
                log.error("token out of service", mode=state.mode, reason=state.reason)
            else:
                log.info("token in service again")

    def _canary(self) -> None:
        try:
            self._lane.check_kek()
        except TokenFault as fault:
            self._faults.clear()  # this one's own report among them
            self._failed_canary(fault.ckr, str(fault))
        except EngineError as error:
            self._failed_canary(0, str(error))
        else:
            self._happened(CanaryGood())
        self._canary_s = time.monotonic()
        wait_s = self._care.canary_every_s if not self._state.canary_failures else min(1.0, self._care.canary_every_s)
        self._next_canary_s = self._canary_s + wait_s

    def _failed_canary(self, code: int, reason: str) -> None:
        log.warning("the token's canary failed", reason=reason)
        self._happened(CanaryFailed(code, reason))

    def _renew(self, why: str) -> None:
        begun = time.monotonic()
        try:
            self._token.renew()
        except TokenBusy as error:
            log.warning("the token could not be renewed", reason=str(error))
            if self._state.mode == "serving":
                self._recycle_at *= 1 + RECYCLE_SPREAD
            else:
                self._happened(NotRenewed(0, str(error)))
            return
        except TokenFault as fault:
            self._happened(NotRenewed(fault.ckr, str(fault)))
            return
        except EngineError as error:
            self._happened(NotRenewed(0, str(error)))
            return
        finally:
            self._faults.clear()  # of the sessions before
        ended = time.monotonic()
        self._renewals += 1
        self._made_before, self._recycle_at = self._token.made, self._next_recycling()
        self._canary_s, self._next_canary_s = ended, ended + self._care.canary_every_s
        log.info("token renewed", because=why, number=self._renewals, took_ms=round((ended - begun) * 1000, 1))
        if self._state.mode != "serving":
            self._happened(Renewed())
        self._renewed()

    def _next_recycling(self) -> float:
        if not self._care.recycle_loads:
            return float("inf")
        spread = random.uniform(1 - RECYCLE_SPREAD, 1 + RECYCLE_SPREAD)  # noqa: S311 - no secret
        return self._care.recycle_loads * spread

    # --- from a fresh process ---

    def _look_at_fresh(self, now: float) -> None:
        """A wiped token keeps serving the sessions that are open: only a new process sees what is there."""
        if self._fresh is None:
            if now >= self._next_fresh_s and self._state.mode == "serving":
                self._begin_fresh(now)
            return
        process, begun_s = self._fresh
        code = process.poll()
        if code is None and now - begun_s < FRESH_TIMEOUT_S:
            return
        text = self._end_fresh()
        if code == 0:
            self._fresh_s, self._fresh_problem = time.monotonic(), ""
        elif code in (EXIT_PIN, EXIT_TOKEN):
            reason = f"a fresh process can't use the token: {text}"
            log.warning("the token's canary failed", reason=reason)
            self._happened(CanaryFailed(CKR_PIN_INCORRECT if code == EXIT_PIN else 0, reason, fresh=True))
        else:
            self._not_looked("it did not end" if code is None else text or f"exit code {code}")

    def _begin_fresh(self, now: float) -> None:
        try:
            process = subprocess.Popen(
                self._fresh_command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,  # less than a pipe holds
                cwd="/",
            )
            if process.stdin is not None:
                with process.stdin:
                    process.stdin.write(self._token.witness.hex().encode())
                process.stdin = None  # or communicate() flushes a closed file
        except OSError as error:
            self._next_fresh_s = now + self._care.fresh_canary_every_s
            self._not_looked(str(error.strerror))
            return
        self._fresh = (process, now)

    def _not_looked(self, reason: str) -> None:
        self._fresh_problem = f"no fresh process can look at the token: {reason}"[:MAX_REASON]
        log.warning("the token could not be checked", reason=self._fresh_problem)

    def _end_fresh(self) -> str:
        """End the fresh process; what it complained of."""
        if self._fresh is None:
            return ""
        process, _ = self._fresh
        self._fresh = None
        self._next_fresh_s = time.monotonic() + self._care.fresh_canary_every_s  # whatever comes of it
        process.kill()
        told = process.communicate()[1]
        return told.decode("utf-8", errors="replace").strip()[-MAX_REASON:]
