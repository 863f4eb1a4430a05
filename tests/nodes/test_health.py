"""The decisions about a token's health: what each return code is, and what follows, for every course of events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.health import (
    CANARY_FAILURES_MAX,
    RENEW_BACKOFF_MAX_S,
    CanaryFailed,
    CanaryGood,
    Event,
    Kind,
    NotRenewed,
    OperationFailed,
    Renewed,
    State,
    TokenFault,
    classify,
    decide,
    wants_renewal,
)
from pkcs11_shim import CKR

SESSION = (
    CKR.KEY_HANDLE_INVALID,
    CKR.OBJECT_HANDLE_INVALID,
    CKR.OPERATION_ACTIVE,
    CKR.OPERATION_NOT_INITIALIZED,
    CKR.SESSION_CLOSED,
    CKR.SESSION_HANDLE_INVALID,
    CKR.USER_NOT_LOGGED_IN,
    CKR.CRYPTOKI_NOT_INITIALIZED,
)
DEVICE = (CKR.DEVICE_REMOVED, CKR.TOKEN_NOT_PRESENT, CKR.TOKEN_NOT_RECOGNIZED, CKR.SLOT_ID_INVALID)
PIN = (CKR.PIN_INCORRECT, CKR.PIN_LOCKED, CKR.PIN_EXPIRED)
MEMORY = (CKR.HOST_MEMORY, CKR.DEVICE_MEMORY)
UNCLEAR = (
    CKR.GENERAL_ERROR,
    CKR.FUNCTION_FAILED,
    CKR.DEVICE_ERROR,
    CKR.DATA_INVALID,
    CKR.ENCRYPTED_DATA_INVALID,
    CKR.ENCRYPTED_DATA_LEN_RANGE,
)
WELL = State()


def after(*events: Event, state: State = WELL, now_s: float = 100.0) -> State:
    for event in events:
        state = decide(state, event, now_s)
    return state


@pytest.mark.parametrize(
    ("kind", "codes"),
    [
        (Kind.SESSION, SESSION),
        (Kind.DEVICE, DEVICE),
        (Kind.PIN, PIN),
        (Kind.MEMORY, MEMORY),
        (Kind.UNCLEAR, UNCLEAR),
        (Kind.OTHER, (CKR.ARGUMENTS_BAD, CKR.SIGNATURE_INVALID, CKR.SESSION_COUNT, 0x70, 0x80000001, 0)),
    ],
)
def test_every_code_is_of_its_kind(kind: Kind, codes: tuple[int, ...]) -> None:
    assert {classify(code) for code in codes} == {kind}
    assert {TokenFault("failed", code).kind for code in codes} == {kind}


@pytest.mark.parametrize("code", SESSION)
def test_a_lost_session_is_renewed_at_once(code: int) -> None:
    state = after(OperationFailed(code, "lost"))
    assert (state.mode, state.reason) == ("lost", "lost")
    assert wants_renewal(state, 100.0)
    assert after(Renewed(), state=state).mode == "serving"


@pytest.mark.parametrize("code", DEVICE)
def test_a_device_that_is_gone_is_tried_until_it_is_back(code: int) -> None:
    state = after(OperationFailed(code, "gone"))
    assert state.mode == "gone"
    assert wants_renewal(state, 100.0)
    waits = []
    now_s = 100.0
    for _ in range(30):
        state = decide(state, NotRenewed(code, "still gone"), now_s)
        assert state.mode == "gone"
        assert not wants_renewal(state, now_s)
        waits.append(round(state.next_try_s - now_s, 6))
        now_s = state.next_try_s
        assert wants_renewal(state, now_s)
    assert all(one <= other for one, other in pairwise(waits))
    assert waits[-1] == RENEW_BACKOFF_MAX_S
    assert decide(state, Renewed(), now_s).mode == "serving"


@pytest.mark.parametrize("code", PIN)
@pytest.mark.parametrize("kind", [OperationFailed, CanaryFailed, NotRenewed])
def test_a_refused_pin_is_never_tried_again(code: int, kind: type[OperationFailed | CanaryFailed | NotRenewed]) -> None:
    for before in (WELL, after(OperationFailed(CKR.SESSION_CLOSED, "lost")), after(NotRenewed(0, "gone"))):
        stopped = decide(before, kind(code, "refused"), 100.0)
        assert stopped.mode == "stopped"
        assert stopped.reason == "refused; the PIN is not tried again"
        for event in (Renewed(), CanaryGood(), NotRenewed(0, "x"), OperationFailed(CKR.SESSION_CLOSED, "x")):
            stopped = decide(stopped, event, 200.0)
            assert stopped.mode == "stopped"
            assert not wants_renewal(stopped, 10**9)


@pytest.mark.parametrize("code", [*UNCLEAR, *MEMORY, CKR.ARGUMENTS_BAD])
def test_what_says_nothing_about_the_token_changes_nothing(code: int) -> None:
    """However often an operation fails so: a client must not be able to take a node out of service."""
    assert after(*[OperationFailed(code, "odd")] * 1_000) == WELL


def test_canaries_that_fail_for_no_clear_reason_count_in_a_row() -> None:
    odd = CanaryFailed(CKR.DEVICE_ERROR, "odd")
    assert after(*[odd] * (CANARY_FAILURES_MAX - 1)).mode == "serving"
    assert after(*[odd] * (CANARY_FAILURES_MAX - 1), CanaryGood(), *[odd] * (CANARY_FAILURES_MAX - 1)).mode == "serving"
    assert after(*[odd] * CANARY_FAILURES_MAX).mode == "gone"


def test_a_canary_that_fails_for_a_clear_reason_counts_at_once() -> None:
    assert after(CanaryFailed(CKR.SESSION_CLOSED, "lost")).mode == "lost"
    assert after(CanaryFailed(CKR.DEVICE_REMOVED, "gone")).mode == "gone"


def test_a_fresh_process_is_believed_at_once() -> None:
    state = after(CanaryFailed(0, "another KEK", fresh=True))
    assert (state.mode, state.reason) == ("gone", "another KEK")
    assert wants_renewal(state, 100.0)


def test_a_session_that_is_lost_again_and_again_is_renewed_ever_less_often() -> None:
    state, now_s, renewals = WELL, 0.0, 0
    while now_s < 60.0:
        state = decide(state, OperationFailed(CKR.SESSION_CLOSED, "lost"), now_s)
        if wants_renewal(state, now_s):
            state = decide(state, Renewed(), now_s)
            renewals += 1
        now_s += 0.01
    assert renewals <= 6_000 / 100
    # Long after, the first loss is mended at once again.
    state = decide(decide(state, Renewed(), now_s), CanaryGood(), now_s + 3_600)
    lost = decide(state, OperationFailed(CKR.SESSION_CLOSED, "lost"), now_s + 3_601)
    assert wants_renewal(lost, now_s + 3_601)


EVENTS = st.one_of(
    st.builds(OperationFailed, st.sampled_from(list(CKR)), st.just("failed")),
    st.builds(CanaryFailed, st.sampled_from(list(CKR)), st.just("failed"), st.booleans()),
    st.builds(NotRenewed, st.sampled_from(list(CKR)), st.just("failed")),
    st.just(CanaryGood()),
    st.just(Renewed()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 100)), max_size=40))
def test_whatever_happens(course: list[tuple[Event, float]]) -> None:
    """It says why when it does not serve, comes back unless the PIN was refused, and never tries more than it may."""
    state, now_s, refused = State(), 0.0, False
    for event, later_s in course:
        now_s += later_s
        state = decide(state, event, now_s)
        refused |= not isinstance(event, CanaryGood | Renewed) and classify(event.code) is Kind.PIN
        assert (state.mode == "stopped") == refused
        assert (state.mode == "serving") == (state.reason == "")
        assert wants_renewal(state, now_s + RENEW_BACKOFF_MAX_S) == (state.mode in ("lost", "gone"))
