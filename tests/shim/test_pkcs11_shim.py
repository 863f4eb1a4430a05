"""The shim itself: it changes nothing of what it forwards, and does what it is told, to other processes too."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkcs11_shim import CKR, FUNCTIONS, NSS, SOFTHSM, Shim, Who, nss_parameters

LOOP = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for line in sys.stdin:
    print(library.C_GetInfo(ctypes.create_string_buffer(256)), flush=True)
"""


def a_softhsm(folder: Path) -> Path:
    """A copy of the module: its state is no other test's of this process."""
    return Path(shutil.copy(SOFTHSM, folder))


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[Shim]:
    with Shim(tmp_path / "shim", a_softhsm(tmp_path)) as made:
        yield made


@pytest.fixture
def library(shim: Shim) -> ctypes.CDLL:
    return ctypes.CDLL(str(shim.library))


@pytest.fixture
def other(shim: Shim) -> Iterator[subprocess.Popen[str]]:
    """Another process, which calls C_GetInfo for each line and prints what that returned."""
    command = [sys.executable, "-c", LOOP, str(shim.library)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def asked(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def told(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def called(library: ctypes.CDLL) -> int:
    """C_GetInfo, which says CKR_CRYPTOKI_NOT_INITIALIZED here unless the shim says something else."""
    return int(library.C_GetInfo(ctypes.create_string_buffer(256)))


def test_it_has_every_function_of_the_standard() -> None:
    assert len(FUNCTIONS) == len(set(FUNCTIONS)) == 68
    # The places of some, as the standard's pkcs11f.h has them.
    assert [FUNCTIONS.index(name) for name in ("C_CreateObject", "C_EncryptInit", "C_Decrypt")] == [20, 29, 34]
    assert FUNCTIONS[-1] == "C_WaitForSlotEvent"


def test_each_function_is_exported_and_in_the_list_in_its_place(shim: Shim, library: ctypes.CDLL) -> None:
    table = ctypes.POINTER(ctypes.c_void_p)()
    assert library.C_GetFunctionList(ctypes.byref(table)) == 0
    for place, name in enumerate(FUNCTIONS):
        exported = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        assert table[place + 1] == exported, name  # the first word is the version


def test_what_is_forwarded_is_the_real_modules_answer(library: ctypes.CDLL) -> None:
    assert called(library) == CKR.CRYPTOKI_NOT_INITIALIZED
    assert library.C_Login(1, 1, None, 0) == CKR.CRYPTOKI_NOT_INITIALIZED


def test_a_failure_has_its_code_and_its_count(shim: Shim, library: ctypes.CDLL) -> None:
    normal = CKR.CRYPTOKI_NOT_INITIALIZED
    shim.fail("C_GetInfo", CKR.DEVICE_REMOVED, skip=2, times=3)
    removed = [CKR.DEVICE_REMOVED] * 3
    assert [called(library) for _ in range(7)] == [normal, normal, *removed, normal, normal]
    assert (shim.calls("C_GetInfo"), shim.fired("C_GetInfo"), shim.running("C_GetInfo")) == (7, 3, 0)
    shim.fail("C_GetInfo", CKR.GENERAL_ERROR)
    assert {called(library) for _ in range(100)} == {CKR.GENERAL_ERROR}
    shim.clear("C_GetInfo")
    assert called(library) == normal
    assert shim.calls("C_Login") == 0


def test_a_delay_comes_before_the_call(shim: Shim, library: ctypes.CDLL) -> None:
    shim.delay("C_GetInfo", 0.2, times=1)
    begun = time.monotonic()
    assert called(library) == CKR.CRYPTOKI_NOT_INITIALIZED
    assert time.monotonic() - begun >= 0.2


def test_a_hang_lasts_until_it_is_released(shim: Shim, other: subprocess.Popen[str]) -> None:
    shim.hang("C_GetInfo")
    asked(other)
    eventually(lambda: shim.running("C_GetInfo") == 1)
    assert shim.fired("C_GetInfo") == 1
    shim.release("C_GetInfo")
    assert told(other) == CKR.CRYPTOKI_NOT_INITIALIZED
    asked(other)  # only one call was to hang
    assert told(other) == CKR.CRYPTOKI_NOT_INITIALIZED


def test_a_fault_is_set_while_another_process_runs(shim: Shim, other: subprocess.Popen[str]) -> None:
    asked(other)
    assert told(other) == CKR.CRYPTOKI_NOT_INITIALIZED
    shim.fail("C_GetInfo", CKR.TOKEN_NOT_PRESENT)
    asked(other)
    assert told(other) == CKR.TOKEN_NOT_PRESENT
    shim.close()
    asked(other)
    assert told(other) == CKR.CRYPTOKI_NOT_INITIALIZED


def test_a_crash_is_the_processes_end(shim: Shim, other: subprocess.Popen[str]) -> None:
    shim.crash("C_GetInfo")
    asked(other)
    assert other.wait(30) == -signal.SIGSEGV


def test_a_fault_can_be_for_the_first_thread_or_the_others(shim: Shim, library: ctypes.CDLL) -> None:
    def in_a_thread() -> int:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(called(library)))
        thread.start()
        thread.join()
        return codes[0]

    # Under pytest-xdist the tests may run in a thread that is not the process's first one.
    first = threading.get_native_id() == threading.main_thread().native_id
    shim.fail("C_GetInfo", CKR.DEVICE_ERROR, who=Who.OTHERS)
    assert in_a_thread() == CKR.DEVICE_ERROR
    assert (called(library) == CKR.DEVICE_ERROR) is not first
    shim.fail("C_GetInfo", CKR.DEVICE_ERROR, who=Who.FIRST)
    assert in_a_thread() == CKR.CRYPTOKI_NOT_INITIALIZED
    assert (called(library) == CKR.DEVICE_ERROR) is first


def test_two_shims_have_faults_of_their_own(tmp_path: Path) -> None:
    module = a_softhsm(tmp_path)
    with Shim(tmp_path / "a", module) as one, Shim(tmp_path / "b", module) as two:
        first, second = ctypes.CDLL(str(one.library)), ctypes.CDLL(str(two.library))
        one.fail("C_GetInfo", CKR.DEVICE_ERROR)
        assert (called(first), called(second)) == (CKR.DEVICE_ERROR, CKR.CRYPTOKI_NOT_INITIALIZED)


def test_a_module_that_is_not_there_fails_and_says_why(tmp_path: Path) -> None:
    with Shim(tmp_path / "shim", tmp_path / "libnone.so") as shim:
        script = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).C_Initialize(None))"
        ran = subprocess.run(
            [sys.executable, "-c", script, str(shim.library)], capture_output=True, text=True, check=True
        )
    assert int(ran.stdout) == CKR.GENERAL_ERROR
    assert "libnone.so" in ran.stderr


def test_a_module_that_needs_parameters_gets_them(tmp_path: Path) -> None:
    """NSS's softokn refuses C_Initialize(NULL), which is what python-pkcs11 calls."""
    script = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).C_Initialize(None))"

    def initialized(shim: Shim) -> int:
        command = [sys.executable, "-c", script, str(shim.library)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    with Shim(tmp_path / "with", NSS, reserved=nss_parameters()) as shim:
        assert initialized(shim) == 0
    with Shim(tmp_path / "without", NSS) as shim:
        assert initialized(shim) == CKR.ARGUMENTS_BAD
