"""Owns how the assurance programs are built, and that a proof left out is seen; docs/shamir.md has the proofs."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "gf256"
FLAGS = ["-O3", "-std=c11", "-g", "-D_DEFAULT_SOURCE", f"-I{SOURCES}", f"-I{HERE}"]
EXTENSION = [*shlex.split(sysconfig.get_config_var("CFLAGS") or ""), "-fPIC", "-fvisibility=hidden", *FLAGS]
EXTENSION += ["-fno-stack-protector"]  # it reads back a number from behind the arrays, whose bounds no code tells
"""As setup.py compiles the package itself, but for that."""
EMULATED = ["-include", "emulated_vectors.h", "-maes", "-mssse3", "-O1", "-fno-inline"]
"""Optimized, it would take minutes: each vector is an array, and the loops are unrolled."""
VECTORS = ("gf256_gfni512.c", "gf256_gfni256.c", "gf256_aes.c", "gf256_draw512.c")
"""What uses instructions that valgrind does not know."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name each proof that this machine could not make."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not os.environ.get("KEYQUORUM_ASSURANCE") or not skipped:
        return
    terminalreporter.section("NOT PROVEN on this machine", yellow=True)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {reason.removeprefix('Skipped: ')}")


def needs(tool: str, package: str) -> str:
    """The path of a tool; without it the test is skipped, and says what would help."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is missing: apt-get install {package}")
    return found


def command(*words: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; another exit status than the one expected fails the test with its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=1800)
    if status is not None:
        assert done.returncode == status, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


Patch = tuple[str, str, str]
"""The name of a source, a piece of its text, and what is planted in its place."""


class Native:
    """The native core's sources and the programs of this folder that are built with them."""

    sources = SOURCES
    flags = FLAGS
    extension = EXTENSION
    command = staticmethod(command)
    needs = staticmethod(needs)

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._made: dict[tuple[str, bool, Patch | None], Path] = {}

    def build(self, name: str, *, emulated: bool = False, patch: Patch | None = None) -> Path:
        """Compile a program, once; ``emulated`` is without the instructions that valgrind does not know."""
        made = (name, emulated, patch)
        if made not in self._made:
            objects = [self._object(source, emulated, patch) for source in sorted(SOURCES.glob("*.c"))]
            define = ["-DEMULATED"] if emulated else []
            target = self._folder(name) / name
            command("cc", *FLAGS, *define, "-o", target, HERE / f"{name}.c", *objects, "-lm", "-lpthread")
            self._made[made] = target
        return self._made[made]

    def _object(self, source: Path, emulated: bool, patch: Patch | None) -> Path:
        """One source, compiled once as it is and once for each patch of it."""
        emulated = emulated and source.name in VECTORS
        patch = patch if patch is not None and source.name == patch[0] else None
        made = (source.name, emulated, patch)
        if made not in self._made:
            folder = self._folder(source.stem)
            if patch is not None:
                text = source.read_text(encoding="utf-8")
                assert patch[1] in text, f"{source.name} has changed; plant this elsewhere: {patch[2]}"
                source = folder / source.name
                source.write_text(text.replace(patch[1], patch[2]), encoding="utf-8")
            self._made[made] = folder / f"{source.stem}.o"
            extra = EMULATED if emulated else []
            command("cc", *FLAGS, *extra, "-c", "-o", self._made[made], source)
        return self._made[made]

    def build_for(self, compiler: str, name: str, extra: Sequence[str] = ()) -> Path:
        """Compile a program with another compiler."""
        target = self._folder(name) / name
        command(compiler, *FLAGS, *extra, "-o", target, HERE / f"{name}.c", *sorted(SOURCES.glob("*.c")))
        return target


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """See the class; without a compiler a test is skipped."""
    needs("cc", "gcc libc6-dev")
    return Native(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def valgrind() -> str:
    """The path of valgrind; without it a test is skipped."""
    found = needs("valgrind", "valgrind")
    if not Path("/usr/include/valgrind/memcheck.h").exists():
        pytest.skip("valgrind's headers are missing: apt-get install valgrind")
    return found


@pytest.fixture(scope="session")
def x86() -> None:
    """For kernels of x86-64."""
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 CPU")
