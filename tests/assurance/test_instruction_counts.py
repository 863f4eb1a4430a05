"""Owns the gate against slower kernels: callgrind's instruction counts, the same on every machine for one compiler.

``KEYQUORUM_SAVE_COUNTS=1 make assurance`` writes the counts of this compiler into instruction_counts.json.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from engine._fastshamir import available_kernels

BASELINE = Path(__file__).parent / "instruction_counts.json"
TOLERANCE = 1.03
CASES = [(kernel, length) for kernel in ("avx2", "portable") for length in (32, 4096)]
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("x86")]


def counted(native: Any, valgrind: str, folder: Path, kernel: str, length: int, **options: Any) -> int:
    """The instructions of 3-of-5, a combine of 3 and 10-of-16 together."""
    if kernel not in available_kernels():
        pytest.skip(f"this machine has no {kernel}")
    out = f"--callgrind-out-file={folder / 'out'}"
    program = native.build("counts", **options)
    done = native.command(valgrind, "--tool=callgrind", out, "--toggle-collect=counted", program, kernel, str(length))
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


def saved_counts(native: Any) -> dict[str, int]:
    """What was saved for this compiler; a count of another one says nothing, so then the test is skipped."""
    compiler = native.command("cc", "--version").stdout.splitlines()[0]
    saved: dict[str, dict[str, int]] = json.loads(BASELINE.read_text(encoding="utf-8"))
    if compiler not in saved:
        known = " and ".join(saved)
        pytest.skip(f"counts are saved for {known}, not for this {compiler}; KEYQUORUM_SAVE_COUNTS=1 saves them")
    return saved[compiler]


def within(count: int, saved: int) -> bool:
    """The gate: not more than 3% above what was saved."""
    return count <= saved * TOLERANCE


@pytest.mark.parametrize(("kernel", "length"), CASES)
def test_no_kernel_needs_more_instructions(
    native: Any, valgrind: str, tmp_path: Path, kernel: str, length: int
) -> None:
    count = counted(native, valgrind, tmp_path, kernel, length)
    if os.environ.get("KEYQUORUM_SAVE_COUNTS"):
        compiler = native.command("cc", "--version").stdout.splitlines()[0]
        saved = json.loads(BASELINE.read_text(encoding="utf-8"))
        saved.setdefault(compiler, {})[f"{kernel} {length}"] = count
        BASELINE.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    before = saved_counts(native)[f"{kernel} {length}"]
    assert within(count, before), f"{kernel} at {length} bytes: {count} instructions, saved are {before}"


WAIT = '__asm__ volatile("nop; nop; nop; nop");'
SLOWED = {
    "avx2": ("gf256_avx2.c", "__m256i value, int bypass)\n{\n", f"__m256i value, int bypass)\n{{\n    {WAIT}\n"),
    "portable": (
        "gf256_portable.c",
        "vector load(const uint8_t *from)\n{\n",
        f"vector load(const uint8_t *from)\n{{\n{WAIT}\n",
    ),
}


@pytest.mark.parametrize("kernel", SLOWED)
def test_the_gate_finds_a_slowed_loop(native: Any, valgrind: str, tmp_path: Path, kernel: str) -> None:
    """Four instructions more for each vector that is stored or loaded, planted in a copy of the source."""
    count = counted(native, valgrind, tmp_path, kernel, 4096, patch=SLOWED[kernel])
    assert not within(count, saved_counts(native)[f"{kernel} 4096"])
