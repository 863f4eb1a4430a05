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


@pytest.mark.long
@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(("kernel", "length"), CASES)
def test_no_kernel_needs_more_instructions(
    native: Any, valgrind: str, tmp_path: Path, kernel: str, length: int
) -> None:
    """3-of-5, a combine of 3 and 10-of-16 together, within 3% of what was saved for this compiler."""
    if kernel not in available_kernels():
        pytest.skip(f"this machine has no {kernel}")
    out = f"--callgrind-out-file={tmp_path / 'out'}"
    program = native.build("counts")
    done = native.command(valgrind, "--tool=callgrind", out, "--toggle-collect=counted", program, kernel, str(length))
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr
    count = int(found[1])
    compiler = native.command("cc", "--version").stdout.splitlines()[0]
    saved: dict[str, dict[str, int]] = json.loads(BASELINE.read_text(encoding="utf-8"))
    name = f"{kernel} {length}"
    if os.environ.get("KEYQUORUM_SAVE_COUNTS"):
        saved.setdefault(compiler, {})[name] = count
        BASELINE.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    elif compiler not in saved:
        pytest.skip(f"no counts are saved for {compiler}")
    assert count <= saved[compiler][name] * TOLERANCE
