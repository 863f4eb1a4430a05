"""Owns the proof that no kernel and no generator decides anything on a secret: by valgrind, in machine code, by time.

Every check has controls that leak; where one of them is not found out, the check proves nothing.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sampled import some

from engine._fastshamir import available_generators, available_kernels

VALGRIND = ("--quiet", "--error-exitcode=9")
NATIVE = [name for name in available_kernels() if not name.startswith("gfni")]
STREAMS = [name for name in available_generators() if "vaes" not in name]
long = pytest.mark.long


# valgrind 3.19 knows neither AVX-512 nor GFNI nor VAES; their very sources run there with emulated instructions.


def memcheck(native: Any, valgrind: str, *what: str, emulated: bool = False, **options: Any) -> str:
    program = native.build("ctgrind", emulated=emulated, patch=options.pop("patch", None))
    found: str = native.command(valgrind, *VALGRIND, program, *what, **options).stderr
    return found


@long
@pytest.mark.parametrize("kernel", NATIVE)
def test_memcheck_finds_no_decision_on_secret_rows(native: Any, valgrind: str, kernel: str) -> None:
    memcheck(native, valgrind, "kernel", kernel)


@pytest.mark.parametrize(("generator", "kernel"), some(itertools.product(STREAMS, NATIVE)))
def test_memcheck_finds_no_decision_in_a_whole_split(native: Any, valgrind: str, kernel: str, generator: str) -> None:
    """From the secret seed through generator, products and sums to the secret again."""
    memcheck(native, valgrind, "split", kernel, generator)


@pytest.mark.parametrize("generator", STREAMS)
def test_memcheck_finds_no_decision_on_a_seed(native: Any, valgrind: str, generator: str) -> None:
    memcheck(native, valgrind, "stream", generator)


@pytest.mark.parametrize("what", ["sums", "memory"])
def test_memcheck_finds_no_decision_in_what_is_done_on_shares(native: Any, valgrind: str, what: str) -> None:
    """Refresh, recovery and error correction use row_sum and row_dot; SecretBuffer compares and wipes."""
    memcheck(native, valgrind, what)


@long
@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("kernel", ["gfni512", "gfni256"])
def test_memcheck_finds_no_decision_in_the_emulated_kernels(native: Any, valgrind: str, kernel: str) -> None:
    """The very source of the GFNI kernels, which also computes the right products this way."""
    memcheck(native, valgrind, "kernel", kernel, emulated=True)


@long
@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("generator", ["aes256ctr-vaes512", "aes256ctr-vaes256"])
def test_memcheck_finds_no_decision_in_the_emulated_generators(native: Any, valgrind: str, generator: str) -> None:
    """The streams are also those of AES-NI."""
    memcheck(native, valgrind, "stream", generator, emulated=True)


@long
@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(
    ("kernel", "generator"),
    [("gfni512", "aes256ctr-vaes512"), ("gfni512", "aes256ctr-vaes256"), ("gfni256", "aes256ctr-vaes256")],
)
def test_memcheck_finds_no_decision_in_an_emulated_split(
    native: Any, valgrind: str, kernel: str, generator: str
) -> None:
    """The first pair goes through the loop that draws and multiplies at once."""
    memcheck(native, valgrind, "split", kernel, generator, emulated=True)


def test_memcheck_finds_the_kernel_that_leaks(native: Any, valgrind: str) -> None:
    found = memcheck(native, valgrind, "kernel", "table", status=9)
    assert "Use of uninitialised value" in found
    assert "table_run" in found


def test_memcheck_finds_the_comparison_that_leaks(native: Any, valgrind: str) -> None:
    assert "Conditional jump" in memcheck(native, valgrind, "leaks", status=9)


PLANTED = {
    "the draw": (
        "gf256_draw512.c",
        "_mm512_storeu_si512(to[d] + at, drawn[d][lane]);",
        '{ _mm512_storeu_si512(to[d] + at, drawn[d][lane]); if (to[d][at] == 7) __asm__ volatile("nop"); }',
    ),
    "the VAES generator": (
        "gf256_aes.c",
        "STORE((void *)(out + sizeof(VECTOR) * lane), block[lane]);",
        "STORE((void *)(out + sizeof(VECTOR) * lane), block[lane]), out[0] == 7 ? stream->block++ : 0;",
    ),
}


@long
@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("place", PLANTED)
def test_memcheck_finds_a_branch_planted_in(native: Any, valgrind: str, place: str) -> None:
    """So the emulated programs do run these lines, and a decision on their secrets does not stay hidden."""
    generator = "aes256ctr-vaes512" if place == "the draw" else "aes256ctr-vaes256"
    what = ("split", "gfni512", generator)
    found = memcheck(native, valgrind, *what, emulated=True, status=9, patch=PLANTED[place])
    assert "Conditional jump" in found
    assert PLANTED[place][0] in found


# In machine code: all paths of each function, with spills, by machine_code.py.


@pytest.fixture(scope="module")
def code() -> ModuleType:
    """machine_code.py, which lies beside the tests and in no package."""
    spec = importlib.util.spec_from_file_location("machine_code", Path(__file__).with_name("machine_code.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def flow(native: Any, code: ModuleType, source: Path, folder: Path) -> Any:
    """Compile a source as the package is compiled, and see where its secrets go."""
    native.needs("objdump", "binutils")
    target = folder / f"{source.stem}.o"
    native.command("cc", *native.extension, "-c", "-o", target, source)
    return code.analyse(target)


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("name", ["gfni512", "gfni256", "avx2", "aes", "draw512"])
def test_machine_code_decides_nothing_on_secrets(native: Any, code: ModuleType, name: str, tmp_path: Path) -> None:
    """And no secret leaves the vector registers, but that the generators copy the last bytes of a row."""
    found = flow(native, code, native.sources / f"gf256_{name}.c", tmp_path)
    wanted = {"avx2": "vpshufb", "aes": "vaesenc", "draw512": "vaesenc"}.get(name, "vgf2p8affineqb")
    assert found.mnemonics[wanted] > 20
    assert found.decisions == set()
    left = {line for line in found.leavings if name != "aes" or not re.search(r": mov(zbl|zwl)? .*\(.*\),%", line)}
    assert left == set()


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(("name", "stores"), [("aes", 1), ("draw512", 0)])
def test_round_keys_are_not_spilled(native: Any, code: ModuleType, name: str, stores: int, tmp_path: Path) -> None:
    """Of secret vectors only a last block goes to the stack, in each function once, and it is wiped there."""
    found = flow(native, code, native.sources / f"gf256_{name}.c", tmp_path)
    spills = [line.partition("+")[0] for line in found.spills]
    assert all(spills.count(function) <= stores for function in spills), found.spills


HEAD = """
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
__attribute__((target("avx2,avx512f,avx512bw"))) void gf256_run_planted(const void *list, unsigned rows, unsigned count,
    const uint8_t *const *inputs, uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    static uint8_t kept[32];
    __m256i row = _mm256_loadu_si256((const void *)inputs[0]);
    volatile uint64_t spilled[4];
    volatile __m256i other;
    uint64_t word = 0;
    (void)rows; (void)count; (void)bypass; (void)kept; (void)spilled; (void)word; (void)list; (void)other;
"""
LEAKS = {
    "a byte spilled to the stack and read back": (
        "_mm256_storeu_si256((void *)spilled, row); outputs[0][offset] = (uint8_t)(spilled[1] * 3 + 1);",
        "leavings",
        r"mov .*\(%r[sb]p\),%r",
    ),
    "a spill on one path only, before that of a pointer": (
        "if (count) _mm256_storeu_si256((void *)spilled, row); else spilled[1] = length;"
        '__asm__ volatile("vmovq %0, %%xmm9\\n\\tvmovq %%xmm9, %0" : "+r"(offset));'
        "outputs[0][0] = (uint8_t)spilled[1];",
        "leavings",
        r"mov.*\(%r[sb]p\),%",
    ),
    "a move back from a register that a loop has changed": (
        '__asm__ volatile("vmovq %1, %%xmm9\\n\\t1: vmovq %%xmm9, %0\\n\\tvmovdqu (%2), %%ymm9\\n\\t'
        'dec %k1\\n\\tjne 1b" : "=&r"(word), "+r"(length) : "r"(inputs[0]));'
        "outputs[0][0] = (uint8_t)word;",
        "leavings",
        r"vmovq +%xmm9,%r",
    ),
    "bits of all bytes in a general register": (
        "outputs[0][offset] = (uint8_t)_mm256_movemask_epi8(row);",
        "leavings",
        "movmskb",
    ),
    "a comparison into a mask": (
        "word = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(inputs[0]), _mm512_setzero_si512());"
        "outputs[0][offset] = (uint8_t)word;",
        "leavings",
        r"vp(cmpeqb|testnmb)",
    ),
    "a branch on a byte": ("if (inputs[0][offset]) memset(outputs[0], 0, length);", "decisions", "branch: j"),
    "a branch on the sum of all bytes": (
        "for (; offset < length; offset++) word += inputs[0][offset]; if (word > 1000) outputs[0][0] = 1;",
        "decisions",
        "branch: j",
    ),
    "a table looked up": (
        "for (; offset < length; offset++) outputs[0][offset] = ((const uint8_t *)list)[inputs[0][offset]];",
        "decisions",
        "address: movz",
    ),
    "a gather": (
        "row = _mm256_i32gather_epi32(list, row, 4); _mm256_storeu_si256((void *)outputs[0], row);",
        "decisions",
        "address: vpgather",
    ),
    "a copy in static memory": (
        "_mm256_storeu_si256((void *)kept, row); outputs[0][offset] = kept[offset];",
        "decisions",
        "into public memory",
    ),
    "a length": ("memcpy(outputs[0], inputs[1], inputs[0][0] * length);", "decisions", "call: "),
}


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("leak", LEAKS)
def test_the_analysis_finds(native: Any, code: ModuleType, leak: str, tmp_path: Path) -> None:
    body, kind, text = LEAKS[leak]
    (tmp_path / "planted.c").write_text(f"{HEAD}{body}\n}}\n", encoding="utf-8")
    found = flow(native, code, tmp_path / "planted.c", tmp_path)
    assert any(re.search(text, line) for line in getattr(found, kind)), found


@pytest.mark.usefixtures("x86")
def test_the_analysis_lets_pointers_pass(native: Any, code: ModuleType, tmp_path: Path) -> None:
    """A copy of a row is no decision; a pointer may lie in a vector register, as gcc's spills do."""
    body = (
        '__asm__ volatile("vmovq %0, %%xmm9\\n\\tvmovq %%xmm9, %0" : "+r"(inputs));'
        "memcpy(outputs[0] + offset, inputs[1] + offset, length - offset); outputs[1][3] = inputs[2][5];"
    )
    (tmp_path / "planted.c").write_text(f"{HEAD}{body}\n}}\n", encoding="utf-8")
    found = flow(native, code, tmp_path / "planted.c", tmp_path)
    assert (found.decisions, found.leavings) == (set(), set())


@pytest.mark.usefixtures("x86")
def test_the_analysis_refuses_what_it_does_not_know(native: Any, code: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "planted.c").write_text(f'{HEAD}__asm__ volatile("cpuid" ::: "eax", "ebx", "ecx", "edx");}}\n')
    with pytest.raises(code.Unknown, match="cpuid"):
        flow(native, code, tmp_path / "planted.c", tmp_path)


# By time (dudect). The bounds leave room for a noisy machine; a leak of a table is far beyond them.


def largest_t(native: Any, kernel: str) -> float:
    """The best of three runs: a real leak shows in each."""
    return min(float(native.command(native.build("dudect"), kernel).stdout) for _ in range(3))


@long
@pytest.mark.parametrize("kernel", available_kernels())
def test_random_and_fixed_rows_take_the_same_time(native: Any, kernel: str) -> None:
    assert largest_t(native, kernel) < 4.5


@long
def test_the_time_of_the_kernel_that_leaks_tells(native: Any) -> None:
    assert largest_t(native, "table") > 8
