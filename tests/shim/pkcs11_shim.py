"""A token that is slow, refuses, hangs or crashes when a test says so: builds and steers ``pkcs11_shim.c``.

Import it as ``pkcs11_shim`` (pytest's ``pythonpath`` has this folder). A node whose ``token.module`` is
``Shim.library`` uses the real module through it; faults are set while it runs, and the calls are counted::

    shim = Shim(tmp_path)                                # wraps SoftHSM
    shim.fail("C_Sign", CKR.DEVICE_REMOVED)              # from now on
    shim.fail("C_Sign", CKR.SESSION_HANDLE_INVALID, times=1, skip=2)   # the third call from now, once
    shim.hang("C_CreateObject"); shim.release("C_CreateObject")
    shim.delay("C_Encrypt", 0.2); shim.crash("C_Decrypt"); shim.clear(); shim.calls("C_Sign")

It knows no key. Each function has one fault at a time; what meets it is counted, also over several processes.
"""

from __future__ import annotations

import enum
import functools
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final

__all__ = ["CKR", "FOR_EVER", "FUNCTIONS", "NSS", "NSS_LABEL", "SOFTHSM", "Shim", "Who", "nss_parameters", "nss_token"]

SOURCE: Final = Path(__file__).with_suffix(".c")
FOR_EVER: Final = 2**64 - 1


def _library(name: str, *folders: str) -> Path:
    """Where the distribution put it; the first folder's place if it is nowhere."""
    places = [Path(folder) / name for folder in (*folders, *sorted(str(each) for each in Path("/usr/lib").glob("*/")))]
    return next((place for place in places if place.is_file()), places[0])


SOFTHSM: Final = _library("libsofthsm2.so", "/usr/lib/softhsm", "/usr/lib64/pkcs11", "/usr/local/lib/softhsm")
NSS: Final = _library("libsoftokn3.so", "/usr/lib")


class CKR(enum.IntEnum):
    """Return codes (PKCS#11 v2.40, 5.1) that tests like to give."""

    HOST_MEMORY = 0x02
    SLOT_ID_INVALID = 0x03
    GENERAL_ERROR = 0x05
    FUNCTION_FAILED = 0x06
    ARGUMENTS_BAD = 0x07
    DATA_INVALID = 0x20
    DEVICE_ERROR = 0x30
    DEVICE_MEMORY = 0x31
    DEVICE_REMOVED = 0x32
    ENCRYPTED_DATA_INVALID = 0x40
    ENCRYPTED_DATA_LEN_RANGE = 0x41
    KEY_HANDLE_INVALID = 0x60
    OBJECT_HANDLE_INVALID = 0x82
    OPERATION_ACTIVE = 0x90
    OPERATION_NOT_INITIALIZED = 0x91
    PIN_INCORRECT = 0xA0
    PIN_EXPIRED = 0xA3
    PIN_LOCKED = 0xA4
    SESSION_CLOSED = 0xB0
    SESSION_COUNT = 0xB1
    SESSION_HANDLE_INVALID = 0xB3
    SIGNATURE_INVALID = 0xC0
    TOKEN_NOT_PRESENT = 0xE0
    TOKEN_NOT_RECOGNIZED = 0xE1
    USER_ALREADY_LOGGED_IN = 0x100
    USER_NOT_LOGGED_IN = 0x101
    BUFFER_TOO_SMALL = 0x150
    CRYPTOKI_NOT_INITIALIZED = 0x190


class Who(enum.IntEnum):
    """Which threads a fault meets: a node's loop is its process's first thread."""

    ALL = 0
    FIRST = 1
    OTHERS = 2


_FIELDS: Final = ("calls", "running", "fired", "skip", "times", "delay_us", "hang", "number", "code", "who")
_WORD: Final = struct.Struct("=Q")
_SLOT_BYTES: Final = len(_FIELDS) * _WORD.size


def _functions() -> tuple[str, ...]:
    """The names in the source's order, which is that of the standard."""
    before, after = (
        re.findall(r"[FE]\((C_\w+)", part)
        for part in re.findall(
            r"#define FUNCTIONS_\w+\(F(?:, E)?\) \\\n((?:.*\\\n)*.*\n)",
            SOURCE.read_text(encoding="ascii"),
            flags=re.MULTILINE,
        )
    )
    return (*before, "C_GetFunctionList", *after)


FUNCTIONS: Final = _functions()


@functools.cache
def _built() -> Path:
    """The compiled source, built once a process."""
    folder = Path(tempfile.mkdtemp(prefix="keyquorum-shim-"))
    try:
        compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
        target = folder / "shim.so"
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
        built = subprocess.run(
            [*compiler, *flags, "-o", str(target), str(SOURCE), "-ldl"], capture_output=True, text=True, check=False
        )
        if built.returncode != 0:
            raise RuntimeError(f"the shim can't be built: {built.stderr}")
        kept = tempfile.NamedTemporaryFile(prefix="keyquorum-shim-", suffix=".so")  # noqa: SIM115 - as long as we live
        _kept.append(kept)
        shutil.copyfile(target, kept.name)
        return Path(kept.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_kept: list[object] = []


def nss_parameters(folder: Path | None = None) -> str:
    """What NSS's softokn wants in ``pReserved``: a database in the folder, or without one none at all."""
    if folder is None:
        return "configdir='' certPrefix='' keyPrefix='' secmod='' flags=noCertDB,noModDB,forceOpen"
    return f"configdir='sql:{folder}' certPrefix='' keyPrefix='' secmod='' flags=noModDB,forceOpen"


NSS_LABEL: Final = "NSS Certificate DB"
_PREPARE: Final = """
import sys
import pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag
module, label = sys.argv[1:]
pin = sys.stdin.read()
(fresh,) = (each for each in pkcs11.lib(module).get_tokens() if each.label == label)
with fresh.open(rw=True, so_pin="") as session:
    session.init_pin(pin)
with fresh.open(rw=True, user_pin=pin) as session:
    session.generate_key(
        KeyType.AES,
        256,
        label="keyquorum-kek",
        store=True,
        capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
        template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
    )
"""


def nss_token(folder: Path, pin_file: Path) -> Shim:
    """A shim on NSS's softokn with a database in the folder, a PIN in the file, and a KEK: ready for a node.

    Its tokens have fixed labels and no C_InitToken that gives one, so PIN and KEK are made here, as an operator would.
    """
    database = folder / "database"
    database.mkdir(parents=True)
    shim = Shim(folder / "shim", NSS, reserved=nss_parameters(database))
    pin = os.urandom(20).hex()
    pin_file.unlink(missing_ok=True)
    with os.fdopen(os.open(pin_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(pin)
    command = [sys.executable, "-c", _PREPARE, str(shim.library), NSS_LABEL]
    subprocess.run(command, input=pin, text=True, check=True, timeout=60)
    return shim


class Shim:
    """One shim library in a folder of its own, and the faults of its functions. Make one for each node."""

    def __init__(self, folder: Path, module: Path = SOFTHSM, *, reserved: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Nodes know SoftHSM by the name of the module.
        self.library = folder / f"shim-{module.name}"
        shutil.copyfile(_built(), self.library)
        settings = f"module={module}\n" + (f"reserved={reserved}\n" if reserved else "")
        self.library.with_name(self.library.name + ".settings").write_text(settings, encoding="utf-8")
        control = self.library.with_name(self.library.name + ".control")
        control.write_bytes(bytes(len(FUNCTIONS) * _SLOT_BYTES))
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def close(self) -> None:
        """End all faults and let go of the control file."""
        if not self._map.closed:
            self.clear()
            self._map.close()

    def __enter__(self) -> Shim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- faults ---

    def fail(
        self,
        function: str,
        code: int,
        *,
        times: int = FOR_EVER,
        skip: int = 0,
        who: Who = Who.ALL,
        delay_s: float = 0.0,
    ) -> None:
        """Have the function return ``code`` uncalled: ``times`` times, after ``skip`` calls that go through.

        C_Encrypt, C_Decrypt, C_Sign and C_Verify are called all the same, for that ends the session's operation, which
        every code but BUFFER_TOO_SMALL does.
        """
        self._set(function, code=code, times=times, skip=skip, who=who, delay_us=int(delay_s * 1e6))

    def fail_all(self, functions: Iterable[str], code: int) -> None:
        """Have all these functions return ``code`` from now on."""
        for each in functions:
            self.fail(each, code)

    def delay(self, function: str, seconds: float, *, times: int = FOR_EVER, skip: int = 0, who: Who = Who.ALL) -> None:
        """Have the function sleep before it is called."""
        self._set(function, delay_us=int(seconds * 1e6), times=times, skip=skip, who=who)

    def hang(self, function: str, *, times: int = 1, skip: int = 0, who: Who = Who.ALL) -> None:
        """Have the function not return until ``release``; the default is one call, so that a new process is spared."""
        self._set(function, hang=1, times=times, skip=skip, who=who)

    def crash(
        self,
        function: str,
        *,
        times: int = 1,
        skip: int = 0,
        who: Who = Who.ALL,
        number: int = signal.SIGSEGV,
    ) -> None:
        """Have the function end its process by a signal."""
        self._set(function, number=number, times=times, skip=skip, who=who)

    def release(self, function: str) -> None:
        """Let those go that hang in the function; the others' faults stay."""
        self._write(function, "hang", 0)

    def clear(self, *functions: str) -> None:
        """End the faults of these functions, or of all. What hangs goes on."""
        for each in functions or FUNCTIONS:
            self._write(each, "times", 0)
            for field in ("skip", "delay_us", "hang", "number", "code", "who"):
                self._write(each, field, 0)

    # --- what was counted ---

    def calls(self, function: str) -> int:
        """Calls so far."""
        return self._read(function, "calls")

    def running(self, function: str) -> int:
        """Calls that have not returned; those of a process that was killed in one stay counted."""
        return self._read(function, "running")

    def fired(self, function: str) -> int:
        """Calls that met a fault."""
        return self._read(function, "fired")

    def _set(self, function: str, **fields: int) -> None:
        self.clear(function)
        for field, value in fields.items():
            if field != "times":
                self._write(function, field, value)
        self._write(function, "times", fields["times"])  # the last: it arms the rest

    def _write(self, function: str, field: str, value: int) -> None:
        _WORD.pack_into(self._map, self._place(function, field), value)

    def _read(self, function: str, field: str) -> int:
        value: int = _WORD.unpack_from(self._map, self._place(function, field))[0]
        return value

    @staticmethod
    def _place(function: str, field: str) -> int:
        return FUNCTIONS.index(function) * _SLOT_BYTES + _FIELDS.index(field) * _WORD.size
