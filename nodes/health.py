"""What a token's return codes mean for the node, and what is to be done: no I/O, no clock, no PKCS#11.

A code belongs to a ``Kind``. ``decide`` takes the state, what happened and the time (s, monotonic), and gives the next
state; ``wants_renewal`` says whether the token is to be opened anew now. ``nodes/keeper.py`` does what is decided.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final, Literal

from engine.errors import TokenError

__all__ = [
    "CANARY_FAILURES_MAX",
    "CKR_PIN_INCORRECT",
    "EXIT_PIN",
    "EXIT_TOKEN",
    "CanaryFailed",
    "CanaryGood",
    "Event",
    "Kind",
    "NotRenewed",
    "OperationFailed",
    "Renewed",
    "State",
    "TokenFault",
    "classify",
    "decide",
    "wants_renewal",
]

CKR_PIN_INCORRECT: Final = 0xA0
CANARY_FAILURES_MAX: Final = 3
"""So many canaries in a row that fail for no clear reason mean that the device is gone."""
EXIT_TOKEN: Final = 2
"""How a command ends for a token that is gone, fails, or has another KEK."""
EXIT_PIN: Final = 3
"""The same for a PIN that the token did not take. A node that ended so must not be started again by itself."""
RENEW_BACKOFF_S: Final = 0.2
RENEW_BACKOFF_MAX_S: Final = 10.0
CALM_S: Final = 30.0
"""A token that was well for so long is renewed at once again when its session is lost."""


class Kind(enum.Enum):
    """What a return code is about."""

    SESSION = "session"
    """Session, login, handles or the module's own state are lost: open the token anew."""
    DEVICE = "device"
    """The token is not there: serve nothing, and try from time to time."""
    PIN = "pin"
    """The PIN is wrong, locked or expired: never try it again, as tries are what locks tokens."""
    MEMORY = "memory"
    """The token or the process is out of memory: fewer loaded keys may help."""
    UNCLEAR = "unclear"
    """The data may be wrong (SoftHSM says CKR_GENERAL_ERROR for a wrong tag) or the token sick: ask the canary."""
    OTHER = "other"
    """A refusal of this one call: nothing about the token."""


_KINDS: Final = {
    Kind.SESSION: (
        0x60,  # CKR_KEY_HANDLE_INVALID
        0x82,  # CKR_OBJECT_HANDLE_INVALID
        0x90,  # CKR_OPERATION_ACTIVE: an operation that never ended keeps the session from every other one
        0x91,  # CKR_OPERATION_NOT_INITIALIZED
        0xB0,  # CKR_SESSION_CLOSED
        0xB3,  # CKR_SESSION_HANDLE_INVALID
        0x101,  # CKR_USER_NOT_LOGGED_IN
        0x190,  # CKR_CRYPTOKI_NOT_INITIALIZED
    ),
    Kind.DEVICE: (
        0x03,  # CKR_SLOT_ID_INVALID
        0x32,  # CKR_DEVICE_REMOVED
        0xE0,  # CKR_TOKEN_NOT_PRESENT
        0xE1,  # CKR_TOKEN_NOT_RECOGNIZED
    ),
    Kind.PIN: (
        0xA0,  # CKR_PIN_INCORRECT
        0xA1,  # CKR_PIN_INVALID
        0xA2,  # CKR_PIN_LEN_RANGE
        0xA3,  # CKR_PIN_EXPIRED
        0xA4,  # CKR_PIN_LOCKED
        0x102,  # CKR_USER_PIN_NOT_INITIALIZED
    ),
    Kind.MEMORY: (
        0x02,  # CKR_HOST_MEMORY
        0x31,  # CKR_DEVICE_MEMORY
    ),
    Kind.UNCLEAR: (
        0x05,  # CKR_GENERAL_ERROR
        0x06,  # CKR_FUNCTION_FAILED
        0x20,  # CKR_DATA_INVALID
        0x21,  # CKR_DATA_LEN_RANGE
        0x30,  # CKR_DEVICE_ERROR
        0x40,  # CKR_ENCRYPTED_DATA_INVALID
        0x41,  # CKR_ENCRYPTED_DATA_LEN_RANGE
        0x42,  # CKR_AEAD_DECRYPT_FAILED (v3.0)
    ),
}
_KIND_OF: Final = {code: kind for kind, codes in _KINDS.items() for code in codes}


def classify(code: int) -> Kind:
    """The kind of a CKR code that is not CKR_OK."""
    return _KIND_OF.get(code, Kind.OTHER)


class TokenFault(TokenError):
    """The module returned ``ckr`` (0 where there is no code: the token is not open, or has another KEK)."""

    def __init__(self, message: str, ckr: int = 0) -> None:
        super().__init__(message)
        self.ckr = ckr

    @property
    def kind(self) -> Kind:
        """What it is about."""
        return classify(self.ckr)


Mode = Literal["serving", "lost", "gone", "stopped"]


@dataclass(frozen=True, slots=True)
class State:
    """``serving``; ``lost``: to be opened anew soon; ``gone``: not there, tried with back-off; ``stopped``: for good.

    ``reason`` is empty while it serves. ``tries`` counts renewals since the token was last well for a while.
    """

    mode: Mode = "serving"
    reason: str = ""
    tries: int = 0
    next_try_s: float = 0.0
    renewed_s: float = float("-inf")
    canary_failures: int = 0


@dataclass(frozen=True, slots=True)
class OperationFailed:
    """Some call returned ``code``."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class CanaryGood:
    """What was sealed was unsealed."""


@dataclass(frozen=True, slots=True)
class CanaryFailed:
    """The canary failed with ``code``; from a fresh process (``fresh``) that is the token's truth, not a session's."""

    code: int
    reason: str
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Renewed:
    """The token was opened anew and has the same KEK."""


@dataclass(frozen=True, slots=True)
class NotRenewed:
    """Opening it anew failed with ``code``."""

    code: int
    reason: str


Event = OperationFailed | CanaryGood | CanaryFailed | Renewed | NotRenewed


def decide(state: State, event: Event, now_s: float) -> State:
    """The state after the event. From ``stopped`` nothing leads away but a new process."""
    if state.mode == "stopped":
        return state
    if not isinstance(event, CanaryGood | Renewed) and classify(event.code) is Kind.PIN:
        return replace(state, mode="stopped", reason=f"{event.reason}; the PIN is not tried again")
    match event:
        case CanaryGood():
            calm = state.mode == "serving" and now_s - state.renewed_s >= CALM_S
            return replace(state, canary_failures=0, tries=0 if calm else state.tries)
        case Renewed():
            return State(tries=state.tries + 1, renewed_s=now_s)
        case NotRenewed():
            tries = state.tries + 1
            return replace(state, mode="gone", reason=event.reason, tries=tries, next_try_s=now_s + _backoff_s(tries))
        case OperationFailed():
            return _failed(state, classify(event.code), event.reason, now_s)
        case CanaryFailed():
            kind = classify(event.code)
            if event.fresh:
                return _failed(state, Kind.DEVICE, event.reason, now_s)
            if kind in (Kind.SESSION, Kind.DEVICE):
                return _failed(state, kind, event.reason, now_s)
            failures = state.canary_failures + 1
            state = replace(state, canary_failures=failures)
            return _failed(state, Kind.DEVICE, event.reason, now_s) if failures >= CANARY_FAILURES_MAX else state


def _failed(state: State, kind: Kind, reason: str, now_s: float) -> State:
    if kind not in (Kind.SESSION, Kind.DEVICE) or state.mode != "serving":
        return state
    next_try_s = max(now_s, state.renewed_s + (_backoff_s(state.tries) if state.tries else 0.0))
    return replace(state, mode="lost" if kind is Kind.SESSION else "gone", reason=reason, next_try_s=next_try_s)


def _backoff_s(tries: int) -> float:
    return min(RENEW_BACKOFF_MAX_S, RENEW_BACKOFF_S * 2.0 ** min(tries - 1, 10))


def wants_renewal(state: State, now_s: float) -> bool:
    """Whether the token is to be opened anew now."""
    return state.mode in ("lost", "gone") and now_s >= state.next_try_s
