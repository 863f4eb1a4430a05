"""Owns the proof that no kernel and no generator decides anything on a secret: by valgrind, in machine code, by time.

Every check runs a kernel that leaks as its control; where the control is not found out, the check proves nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engine._fastshamir import available_generators, available_kernels

VALGRIND = ("--quiet", "--error-exitcode=9")
NATIVE = [name for name in available_kernels() if not name.startswith("gfni")]
STREAMS = [name for name in available_generators() if "vaes" not in name]


# valgrind 3.19 knows neither AVX-512 nor GFNI nor VAES; the GFNI kernels run there with emulated instructions.


@pytest.mark.parametrize("kernel", [pytest.param(name, marks=pytest.mark.long) for name in NATIVE])
def test_memcheck_finds_no_decision_on_secret_rows(native: Any, valgrind: str, kernel: str) -> None:
    native.command(valgrind, *VALGRIND, native.build("ctgrind"), kernel)


@pytest.mark.parametrize("kernel", NATIVE)
def test_memcheck_finds_no_decision_in_a_whole_split(native: Any, valgrind: str, kernel: str) -> None:
    """From the secret seed through generator, products and sums to the secret again."""
    native.command(valgrind, *VALGRIND, native.build("ctgrind"), "split", kernel)


@pytest.mark.parametrize("generator", STREAMS)
def test_memcheck_finds_no_decision_on_a_seed(native: Any, valgrind: str, generator: str) -> None:
    native.command(valgrind, *VALGRIND, native.build("ctgrind"), "stream", generator)


@pytest.mark.long
@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("kernel", ["gfni512", "gfni256"])
def test_memcheck_finds_no_decision_in_the_emulated_kernels(native: Any, valgrind: str, kernel: str) -> None:
    """The very source of the GFNI kernels, which also computes the right products this way."""
    native.command(valgrind, *VALGRIND, native.build("ctgrind", emulated=True), kernel)


def test_memcheck_finds_the_kernel_that_leaks(native: Any, valgrind: str) -> None:
    found = native.command(valgrind, *VALGRIND, native.build("ctgrind"), "table", status=9)
    assert "Use of uninitialised value" in found.stderr
    assert "table_run" in found.stderr


# In machine code: a secret can leave the vector registers by few instructions, and none of them is there.

LEAVING = re.compile(
    r"gather|scatter"  # addresses from vectors
    r"|pmovmskb|movmskp|pextr|extractps"  # bits or parts of vectors into general registers
    r"|v?mov[dq]\s+%[xyz]mm\d+,\s*%[re]"
    r"|ptest|pcmp|vpmov[bwdq]2m|kmov[bwdq]\s+%k\d,\s*%[re]|kortest|ktest"  # comparisons of vectors
    r"|comis|cvt"
)
CONTROL = """
#include <immintrin.h>
__attribute__((target("avx2"))) int leak(const void *row, const int *table)
{
    __m256i v = _mm256_loadu_si256(row);
    return _mm256_movemask_epi8(v) + _mm256_extract_epi32(_mm256_i32gather_epi32(table, v, 4), 3);
}
"""


def functions(native: Any, source: Path, folder: Path) -> list[list[str]]:
    """What the compiler makes of a source with the flags of the extension: the instructions of each function."""
    target = folder / f"{source.stem}.o"
    native.command("cc", *native.flags, "-fPIC", "-c", "-o", target, source)
    found: list[list[str]] = []
    for line in native.command("objdump", "-d", "--no-show-raw-insn", target).stdout.splitlines():
        if re.match(r"[0-9a-f]+ <", line):
            found.append([])
        elif re.match(r"\s+[0-9a-f]+:", line):
            found[-1].append(line.split(":", 1)[1].strip())
    return found


def last_write(function: list[str], position: int, register: str) -> str:
    """The instruction that wrote a vector register last before `position`, in the order of the code."""
    before = reversed(function[:position])
    return next((each for each in before if re.search(rf",%[xyz]mm{register}(\{{|$)", each)), "")


def leaks(function: list[str]) -> list[str]:
    """The instructions by which something leaves the vector registers, but for spills.

    gcc keeps pointers and counters in vector registers where it has some to spare. Such a move back is one whose
    register was last written, in the order of the code, by a move from a general register.
    """
    found = []
    for position, line in enumerate(function):
        spill = re.match(r"vmovq\s+%xmm(\d+),%r", line)
        if spill is not None and re.match(r"vmovq\s+%r", last_write(function, position, spill[1])):
            continue
        if LEAVING.search(line):
            found.append(line)
    return found


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("name", ["gfni512", "gfni256", "avx2", "aes", "draw512"])
def test_no_secret_leaves_the_vector_registers(native: Any, name: str, tmp_path: Path) -> None:
    """So no branch and no address can depend on one; the lengths, counts and pointers that steer are public."""
    found = functions(native, native.sources / f"gf256_{name}.c", tmp_path)
    wanted = {"avx2": "vpshufb", "aes": "vaesenc"}.get(name, "vgf2p8affineqb")
    assert any(line.startswith(wanted) for function in found for line in function)
    assert [line for function in found for line in leaks(function)] == []


@pytest.mark.usefixtures("x86")
def test_the_search_finds_the_instructions_that_leak(native: Any, tmp_path: Path) -> None:
    (tmp_path / "control.c").write_text(CONTROL)
    found = [line for function in functions(native, tmp_path / "control.c", tmp_path) for line in leaks(function)]
    assert any("gather" in line for line in found)
    assert any("movmskb" in line for line in found)


@pytest.mark.usefixtures("x86")
def test_round_keys_are_not_spilled(native: Any, tmp_path: Path) -> None:
    """No vector is stored to the stack but scalars, which are public, and a last block, which is wiped."""
    for name in ("aes", "draw512"):
        for function in functions(native, native.sources / f"gf256_{name}.c", tmp_path):
            stores = []
            for position, line in enumerate(function):
                store = re.match(r"v?mov[adu]\w+\s+%[xyz]mm(\d+),\S*\(%r[sb]p\)", line)
                if store is not None and not last_write(function, position, store[1]).startswith("vpbroadcastq"):
                    stores.append(line)
            assert len(stores) <= 1, stores


# By time (dudect). The bounds leave room for a noisy machine; a leak of a table is far beyond them.


def largest_t(native: Any, kernel: str) -> float:
    """The best of three runs: a real leak shows in each."""
    return min(float(native.command(native.build("dudect"), kernel).stdout) for _ in range(3))


@pytest.mark.long
@pytest.mark.parametrize("kernel", available_kernels())
def test_random_and_fixed_rows_take_the_same_time(native: Any, kernel: str) -> None:
    assert largest_t(native, kernel) < 4.5


@pytest.mark.long
def test_the_time_of_the_kernel_that_leaks_tells(native: Any) -> None:
    assert largest_t(native, "table") > 8
