"""Opening the token anew in place: what stays, what is gone, and that no call ever meets another key's handle."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine.errors import InvalidSignature, InvalidTag, NeedGrant, TokenError
from engine.keys import ALGORITHMS, generate_material, load_private_key
from nodes import token as token_module
from nodes.token import CallWatch, Lane, LoadedKey, Token, TokenBusy

AES = ALGORITHMS["aes-256-gcm"]
MIXED = ("aes-128-gcm", "aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256", "ed25519", "rsa-2048-pss-sha256")


def used(lane: Lane, key: LoadedKey, data: bytes) -> None:
    """One operation there and back, with a right result."""
    algo = key.algorithm
    if algo.name in ("aes-128-gcm", "aes-256-gcm"):
        assert lane.decrypt(key, lane.encrypt(key, data, b"a"), b"a") == data
    elif algo.name == "hmac-sha256":
        lane.verify_mac(key, data, lane.mac(key, data))
    else:
        lane.verify(key, data, lane.sign(key, data))


def test_the_kek_stays_and_loaded_keys_go(token: Token, lane: Lane) -> None:
    sealed = lane.seal(b"share", b"context")
    material = {name: generate_material(ALGORITHMS[name]) for name in MIXED}
    keys = [lane.load(ALGORITHMS[name], each) for name, each in material.items()]
    before = token.generation
    token.renew()
    assert token.generation == lane.generation == before + 1
    assert lane.unseal(sealed, b"context") == b"share"
    for key in keys:
        assert not key.lives
        with pytest.raises(NeedGrant):
            used(lane, key, bytes(32))
        key.destroy()
    again = [lane.load(ALGORITHMS[name], each) for name, each in material.items()]
    for key in again:
        assert key.lives
        used(lane, key, bytes(32))
        key.destroy()


def test_a_handle_that_is_given_out_again_is_not_used_or_destroyed_by_the_old_key(token: Token, lane: Lane) -> None:
    old = lane.load(AES, os.urandom(32))
    token.renew()
    fresh = [lane.load(AES, os.urandom(32)) for _ in range(64)]
    assert old.handles.private in [each.handles.private for each in fresh], "SoftHSM counts its handles from 1 again"
    with pytest.raises(NeedGrant):
        lane.encrypt(old, b"x", b"")
    old.destroy()
    for each in fresh:
        used(lane, each, b"data")
        each.destroy()


def test_a_key_of_another_lane_is_refused(token: Token, lane: Lane) -> None:
    other = token.lane()
    key = lane.load(AES, os.urandom(32))
    with pytest.raises(NeedGrant):
        other.encrypt(key, b"x", b"")
    key.destroy()


def test_a_lost_session_is_told_and_comes_back(token: Token) -> None:
    lane = token.lane()
    sealed = lane.seal(b"share", b"")
    lane._session.close()
    told: list[tuple[Any, int]] = []
    token.report = lambda fault, generation: told.append((fault.kind.value, generation))
    try:
        for call in (lambda: lane.unseal(sealed, b""), lambda: lane.unseal_secret(sealed, b""), lane.check_kek):
            with pytest.raises(TokenError, match="KEK does not answer"):
                call()
        assert told == [("session", token.generation)] * 3
        token.renew()
        assert lane.unseal(sealed, b"") == b"share"
    finally:
        token.report = token_module._no_report


def test_while_it_is_renewed_a_call_waits_a_little_and_then_fails(token: Token, lane: Lane) -> None:
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with token._renewing, token._all_quiet():
            held.set()
            end.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(30)
        for _ in range(3):
            with pytest.raises(TokenError, match="is being opened anew"):
                lane.seal(b"x", b"")
    finally:
        end.set()
        thread.join(30)
    assert lane.unseal(lane.seal(b"x", b""), b"") == b"x"


def test_a_call_that_does_not_end_keeps_it_from_being_renewed(
    token: Token, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_module, "QUIET_WAIT_S", 0.2)
    key, before = lane.load(AES, os.urandom(32)), token.generation
    begun, end = threading.Event(), threading.Event()

    def hang() -> None:
        with lane._guard:
            begun.set()
            end.wait(30)

    thread = threading.Thread(target=hang)
    thread.start()
    try:
        assert begun.wait(30)
        with pytest.raises(TokenBusy):
            token.renew()
        time.sleep(0.05)
        assert 0 < token.watch.oldest_s() <= time.monotonic() - 0.2
    finally:
        end.set()
        thread.join(30)
    assert token.watch.oldest_s() == 0
    assert token.generation == before
    used(lane, key, b"data")
    key.destroy()


def test_a_token_that_can_not_be_opened_serves_nothing_until_it_can(
    token: Token, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = lane.seal(b"share", b"")
    key = lane.load(AES, os.urandom(32))

    def refuse(*_: object) -> None:
        raise token_module.TokenFault("C_Initialize returned 0x00000032", 0x32)

    with monkeypatch.context() as patched:
        patched.setattr(token_module, "_initialize_again", refuse)
        with pytest.raises(TokenError, match="0x00000032"):
            token.renew()
    calls: list[Callable[[], Any]] = [
        lambda: lane.unseal(sealed, b""),
        lambda: lane.load(AES, os.urandom(32)),
        lambda: lane.encrypt(key, b"x", b""),
        lambda: lane.random(16),
        lane.check_kek,
    ]
    for call in calls:
        with pytest.raises(TokenError, match="could not be opened anew"):
            call()
    key.destroy()
    token.renew()
    assert lane.unseal(sealed, b"") == b"share"


def test_another_kek_is_noticed(token: Token, lane: Lane) -> None:
    token.check_witness(token.witness)
    foreign = bytes(12) + AESGCM(bytes(32)).encrypt(bytes(12), token_module.WITNESS, token_module.WITNESS)
    for witness in (foreign, lane.seal(b"another", token_module.WITNESS), b""):
        with pytest.raises(TokenError):
            token.check_witness(witness)
    kept, token._witness = token._witness, foreign
    try:
        with pytest.raises(TokenError, match="another KEK"):
            token.renew()
        with pytest.raises(TokenError, match="could not be opened anew"):
            lane.seal(b"x", b"")
    finally:
        token._witness = kept
        token.renew()
    lane.check_kek()


def test_the_watch_knows_the_oldest_of_many_calls() -> None:
    watch = CallWatch()
    one, other = watch.guard(), watch.guard()
    assert watch.oldest_s() == 0
    with one:
        begun = watch.oldest_s()
        assert 0 < begun <= time.monotonic()
        with other:
            assert watch.oldest_s() == begun
        assert watch.oldest_s() == begun
    with other:
        assert watch.oldest_s() >= begun
    assert watch.oldest_s() == 0


def test_threads_and_renewals_together_give_right_results_alone(token: Token) -> None:
    """Each on a lane of its own; what a renewal took away is loaded again."""
    counts: dict[str, list[int]] = {}
    errors: list[BaseException] = []
    ending = threading.Event()

    def work(number: int, lane: Lane) -> None:
        chance = random.Random(number)
        material = {name: generate_material(ALGORITHMS[name]) for name in MIXED}
        keys: dict[str, LoadedKey] = {}
        done, gone = counts.setdefault(str(number), [0, 0]), 0
        try:
            while not ending.is_set():
                name = chance.choice(MIXED)
                data = os.urandom(32)
                try:
                    if name not in keys:
                        keys[name] = lane.load(ALGORITHMS[name], material[name])
                    key = keys[name]
                    used(lane, key, data)
                    if name == "aes-256-gcm":
                        sealed = lane.encrypt(key, data, b"")
                        assert AESGCM(material[name]).decrypt(sealed[:12], sealed[12:], b"") == data
                        with pytest.raises(InvalidTag):
                            lane.decrypt(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"")
                    elif name == "ed25519":
                        load_private_key(key.algorithm, material[name]).public_key().verify(lane.sign(key, data), data)
                        with pytest.raises(InvalidSignature):
                            lane.verify(key, data, bytes(64))
                    assert lane.unseal(lane.seal(data, b"c"), b"c") == data
                    with lane.unseal_secret(lane.seal(data, b"c"), b"c") as secret:
                        assert secret == data
                    if chance.random() < 0.1:
                        keys.pop(name).destroy()
                except NeedGrant:
                    keys.pop(name, None)
                    gone += 1
                    continue
                except TokenError as error:
                    if "is being opened anew" not in str(error):
                        raise
                    continue
                done[0] += 1
            done[1] = gone
            for key in keys.values():
                key.destroy()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number, token.lane())) for number in range(5)]
    before = token.generation
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            time.sleep(0.03)
            token.renew()
    finally:
        ending.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert token.generation == before + 40
    assert all(done > 20 for done, _ in counts.values()), counts
    assert sum(gone for _, gone in counts.values()) > 0
