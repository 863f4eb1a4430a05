"""A real node whose token plays sick: what it answers, what its status says, and how it comes back by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.client.transport import ask
from engine.errors import EngineError, InvalidTag, TokenError
from engine.protocol.requests import Describe, Empty, Flush, TokenHealth
from pkcs11_shim import CKR, Shim, Who

NODE = "node1"
FRESH_EVERY_S = 2.0
OTHER_KEK = """
import sys
from pathlib import Path
from nodes.config import PinSource, TokenConfig
from nodes.token import initialize_token
initialize_token(TokenConfig(Path(sys.argv[1]), sys.argv[2], PinSource("env", "PIN")), Path(sys.argv[3]))
"""


class Sick:
    """A running node on a shim, with one key."""

    def __init__(self, folder: Any, shim: Shim, until: Callable[..., Any]) -> None:
        self.folder, self.shim, self._until = folder, shim, until
        self.node = folder.start(NODE)
        self.dealt = folder.make_key(NODE)
        self.sealed = folder.operate(NODE, self.dealt, "encrypt", b"kept")

    @property
    def data(self) -> Path:
        path: Path = self.folder.root / NODE / "data"
        return path

    def health(self) -> TokenHealth:
        with self.folder.channel("alice") as channel:
            told: TokenHealth = ask(channel, NODE, "status", Empty(), 10).health
        return told

    def flush(self) -> None:
        with self.folder.channel("alice") as channel:
            ask(channel, NODE, "flush", Flush(""), 10)

    def works(self) -> bool:
        try:
            return bool(self.folder.operate(NODE, self.dealt, "decrypt", self.sealed) == b"kept")
        except EngineError:
            return False

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        self._until(condition, what, 60)

    def wait_for(self, text: str) -> str:
        """Until the status says that (empty: all is well); what it says."""
        told = self._until(lambda: (found := self.health().problem) and text in found and found, text, 60)
        return str(told)

    def wait_until_well(self) -> None:
        self._until(lambda: not self.health().problem, "the token is in service", 60)
        self._until(self.works, "it serves", 60)


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory, new_cluster_folder: Any, until: Any) -> Iterator[Sick]:
    """One for all tests: each leaves it well."""
    folder = new_cluster_folder(tmp_path_factory.mktemp("sick"))
    try:
        assert folder.init(NODE).returncode == 0
        path = folder.config(NODE)
        with Shim(folder.root / "shim") as shim:
            care = f"canary_every_s = 0.3\nfresh_canary_every_s = {FRESH_EVERY_S}"
            told = f'[token]\nmodule = "{shim.library}"\n{care}\n'
            path.write_text(path.read_text().replace("[token]\n", told))
            yield Sick(folder, shim, until)
    finally:
        folder.close()


@pytest.fixture(autouse=True)
def well(sick: Sick) -> Iterator[None]:
    sick.wait_until_well()
    yield
    sick.shim.clear()


@pytest.mark.parametrize(
    "code", [CKR.SESSION_HANDLE_INVALID, CKR.USER_NOT_LOGGED_IN, CKR.CRYPTOKI_NOT_INITIALIZED, CKR.KEY_HANDLE_INVALID]
)
def test_a_lost_session_or_login_is_opened_anew(sick: Sick, code: CKR) -> None:
    before = sick.health().renewals
    sick.shim.fail("C_EncryptInit", code, times=1, who=Who.FIRST)
    with pytest.raises(TokenError):
        sick.folder.operate(NODE, sick.dealt, "encrypt", b"x")
    sick.wait_until(lambda: sick.health().renewals > before, "it is renewed")
    sick.wait_until_well()
    assert "token renewed" in sick.node.log


def test_a_device_that_is_removed_takes_the_node_out_of_service_until_it_is_back(sick: Sick) -> None:
    sick.shim.fail_all(("C_EncryptInit", "C_OpenSession", "C_GetTokenInfo"), CKR.DEVICE_REMOVED)
    told = sick.wait_for("the token is gone")
    assert "DEVICE_REMOVED" in told or "DeviceRemoved" in told or "TokenNotPresent" in told or "0 tokens" in told
    for verb in ("encrypt", "decrypt"):
        with pytest.raises(TokenError, match="the token is gone"):
            sick.folder.operate(NODE, sick.dealt, verb, sick.sealed)
    with sick.folder.channel("alice") as channel:
        assert ask(channel, NODE, "describe", Describe(sick.dealt.manifest.name, 0), 10).manifest
    sick.shim.clear()
    sick.wait_until_well()
    assert "token out of service" in sick.node.log
    assert "token in service again" in sick.node.log


def test_a_canary_that_fails_without_a_reason_counts_when_it_goes_on(sick: Sick) -> None:
    sick.shim.fail("C_EncryptInit", CKR.DEVICE_ERROR, who=Who.OTHERS, times=1)
    time.sleep(1)
    assert sick.health().problem == ""
    sick.shim.fail("C_EncryptInit", CKR.DEVICE_ERROR, who=Who.OTHERS)
    sick.wait_for("the token is gone")
    sick.shim.clear()


def test_a_flood_of_wrong_ciphertexts_takes_nothing_out_of_service(sick: Sick) -> None:
    before = sick.health()
    wrong = sick.sealed[:-1] + bytes([sick.sealed[-1] ^ 1])
    for _ in range(100):
        with pytest.raises(InvalidTag):
            sick.folder.operate(NODE, sick.dealt, "decrypt", wrong)
    after = sick.health()
    assert (after.problem, after.renewals) == ("", before.renewals)
    assert sick.works()


def test_a_right_ciphertext_is_not_called_wrong_for_a_moments_fault(sick: Sick) -> None:
    sick.shim.fail("C_Decrypt", CKR.GENERAL_ERROR, times=1, who=Who.FIRST)
    assert sick.works()
    assert sick.shim.fired("C_Decrypt") > 0
    for code in (CKR.GENERAL_ERROR, CKR.DEVICE_ERROR):
        sick.shim.fail("C_Decrypt", code, who=Who.FIRST)
        with pytest.raises(TokenError):
            sick.folder.operate(NODE, sick.dealt, "decrypt", sick.sealed)
        sick.shim.clear()


def test_a_full_token_makes_room(sick: Sick) -> None:
    assert sick.works()
    other = sick.folder.make_key(NODE)
    sick.shim.fail("C_CreateObject", CKR.DEVICE_MEMORY, times=1)
    assert sick.folder.operate(NODE, other, "encrypt", b"x")
    assert sick.shim.fired("C_CreateObject") > 0
    assert "the token is full" in sick.node.log


def test_a_slow_token_is_no_sick_one(sick: Sick) -> None:
    for function in ("C_Encrypt", "C_Decrypt", "C_CreateObject"):
        sick.shim.delay(function, 0.2)
    sick.flush()
    assert sick.works()
    assert sick.health().problem == ""


def test_a_fresh_process_looks_at_the_token_once_in_its_time(sick: Sick) -> None:
    """It is not begun again at once, and what it finds is taken in: Python processes in a row cost a machine a lot."""
    begun_s, ages, looks = time.monotonic(), [sick.health().fresh_age_ms], 0
    while (took_s := time.monotonic() - begun_s) < 3 * FRESH_EVERY_S or (not looks and took_s < 60):
        ages.append(sick.health().fresh_age_ms)
        looks = sum(later < earlier for earlier, later in pairwise(ages))
        time.sleep(0.02)
    assert 1 <= looks <= took_s / FRESH_EVERY_S + 1
    assert "looking after the token failed" not in sick.node.log


def test_a_deleted_token_is_noticed_from_a_fresh_process_alone(sick: Sick) -> None:
    tokens, aside = sick.data / "tokens", sick.data / "aside"
    tokens.rename(aside)
    tokens.mkdir(mode=0o700)
    try:
        assert sick.works()  # by its open session SoftHSM serves what is no more
        assert "0 tokens" in sick.wait_for("the token is gone")
        assert not sick.works()
    finally:
        tokens.rmdir()
        aside.rename(tokens)
    sick.wait_until_well()


def test_a_token_with_another_kek_is_not_taken_for_the_old_one(sick: Sick) -> None:
    tokens, aside = sick.data / "tokens", sick.data / "aside"
    pin = (sick.folder.root / f"pin.{NODE}").read_text().strip()
    tokens.rename(aside)
    try:
        command = [sys.executable, "-c", OTHER_KEK, str(sick.shim.library), NODE, str(sick.data)]
        subprocess.run(command, env={**os.environ, "PIN": pin}, check=True, timeout=60)
        assert "another KEK" in sick.wait_for("another KEK")
        assert not sick.works()
        time.sleep(1)
        assert "the token is gone" in sick.health().problem
    finally:
        shutil.rmtree(tokens)
        aside.rename(tokens)
    sick.wait_until_well()


def test_a_refused_pin_is_never_tried_again(sick: Sick) -> None:
    """The last of this node: it must be started again by hand."""
    sick.shim.fail("C_Login", CKR.PIN_LOCKED)
    before = sick.shim.calls("C_Login")
    sick.shim.fail("C_EncryptInit", CKR.SESSION_CLOSED, times=1, who=Who.FIRST)
    with pytest.raises(TokenError):
        sick.folder.operate(NODE, sick.dealt, "encrypt", b"x")
    told = sick.wait_for("the token is stopped")
    assert "PinLocked" in told
    assert "the PIN is not tried again" in told
    tried = sick.shim.calls("C_Login")
    assert 1 <= tried - before <= 2  # the node, and a fresh process that looked at the same time
    time.sleep(3)
    assert sick.shim.calls("C_Login") == tried
    assert sick.node.process.poll() is None
    with pytest.raises(TokenError, match="not tried again"):
        sick.folder.operate(NODE, sick.dealt, "encrypt", b"x")
    sick.shim.clear()
    assert sick.node.end() == 0
    sick.node = sick.folder.start(NODE)
    assert sick.works()


def test_objects_that_were_made_have_it_renewed(new_cluster_folder: Any, tmp_path: Path, until: Any) -> None:
    folder = new_cluster_folder(tmp_path)
    try:
        assert folder.init(NODE).returncode == 0
        path = folder.config(NODE)
        path.write_text(path.read_text().replace("[token]\n", "[token]\nrecycle_loads = 5\n"))
        node = folder.start(NODE)
        dealt = [folder.make_key(NODE) for _ in range(8)]
        sealed = [folder.operate(NODE, each, "encrypt", b"kept") for each in dealt]
        until(lambda: "objects were made in it" in node.log, "it is renewed")
        for each, ciphertext in zip(dealt, sealed, strict=True):
            assert folder.operate(NODE, each, "decrypt", ciphertext) == b"kept"
        assert "out of service" not in node.log
    finally:
        folder.close()
