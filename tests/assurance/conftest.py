"""Owns how the assurance programs are built; see docs/shamir.md for what they show."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "gf256"
FLAGS = ["-O3", "-std=c11", "-g", f"-I{SOURCES}", f"-I{HERE}"]


def command(*words: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; another exit status than the one expected fails the test with its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=600)
    if status is not None:
        assert done.returncode == status, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


class Native:
    """The native core's sources and the programs of this folder that are built with them."""

    sources = SOURCES
    flags = FLAGS
    command = staticmethod(command)

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._made: dict[tuple[str, bool], Path] = {}

    def build(self, name: str, *, emulated: bool = False) -> Path:
        """Compile a program, once; ``emulated`` kernels are plain C, which valgrind can run."""
        if (name, emulated) not in self._made:
            target = self._folder(name) / name
            define = ["-DGF256_EMULATE_GFNI"] if emulated else []
            command("cc", *FLAGS, *define, "-o", target, HERE / f"{name}.c", *sorted(SOURCES.glob("*.c")), "-lm")
            self._made[name, emulated] = target
        return self._made[name, emulated]


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """See the class; without a compiler a test is skipped."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return Native(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def valgrind() -> str:
    """The path of valgrind; without it a test is skipped."""
    found = shutil.which("valgrind")
    if found is None or not Path("/usr/include/valgrind/memcheck.h").exists():
        pytest.skip("needs valgrind and its headers")
    return found


@pytest.fixture(scope="session")
def x86() -> None:
    """For kernels of x86-64."""
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 CPU")
