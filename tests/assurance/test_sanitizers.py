"""Owns the run of the native modules' whole suites on a build with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CORE = ("test_fastshamir*.py", "test_secret.py", "test_sharing*.py", "test_interop.py")
"""The tests of all that calls the core, error correction and renewal too."""
TOKEN = "test_fasttoken.py"
KERNELS_PART = (
    "test_pages_are_locked_fenced_not_dumped_and_wiped_on_fork",
    "test_locked_memory_is_counted_and_given_back",
    "test_a_forked_child_has_nothing_of_it",
    "test_without_the_right_to_lock_there_is_no_buffer",
    "test_it_is_in_no_core_dump",
    "test_a_plaintext_stays_nowhere_but_where_it_was_asked_for",
    "test_a_hundred_thousand_operations_keep_neither_memory_nor_references",
)
"""What ASan takes away: its mlock(2) does nothing, it keeps what was freed, and it reserves terabytes of memory, which
nobody can dump or search."""


@pytest.mark.long
def test_the_native_suites_under_the_sanitizers(native: Any, tmp_path: Path) -> None:
    """Every kernel, batch, buffer and error path; the first finding ends the run."""
    libraries = [
        native.command("cc", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "ubsan", "stdc++")
    ]
    if not all(Path(each).is_absolute() for each in libraries):
        pytest.skip("needs the compiler's sanitizer libraries")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for room in ("nodes", "balancer"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "KEYQUORUM_SANITIZE": "address,undefined"}
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, timeout=1800, capture_output=True)
    environment |= {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",  # guard pages fault as they should
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "src", tmp_path, ROOT / "tests" / "shim"))),
    }
    folder = ROOT / "tests" / "engine"
    tests = [str(test) for pattern in CORE for test in sorted(folder.glob(pattern))]
    assert len(tests) > len(CORE)
    tests.append(str(ROOT / "tests" / "nodes" / TOKEN))
    for name in ("engine._fastshamir", "nodes._fasttoken"):
        check = f"import {name} as native, sys; sys.exit(not native.__file__.startswith(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", check, str(tmp_path)], env=environment, check=True, timeout=60)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--override-ini=addopts=", *tests]
    run += ["--import-mode=importlib", "--rootdir", str(tmp_path)]
    run += ["-k", " and ".join(f"not {name}" for name in KERNELS_PART)]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stderr
