"""What the README shows works as written: the Python example, and the demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(tmp_path: Path) -> None:
    """The example of the README runs from an empty folder and prints what it promises."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    ended = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "b'4 crates of oranges'" in ended.stdout
    assert "BEGIN PUBLIC KEY" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def _demo(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("keyquorum")), "demo", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=180, check=False
    )


def _processes_of(path: Path) -> list[str]:
    """The command lines of running processes that name the path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(path) in line:
                found.append(line)
    return found


def test_the_demo_shows_everything_and_cleans_up(tmp_path: Path) -> None:
    """`keyquorum demo` ends with 0 after every step, and leaves neither file nor process."""
    place = tmp_path / "demo"
    ended = _demo("--path", str(place), cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    text = " ".join(ended.stdout.split())
    for shown in (
        "5 node processes in 3 failure domains",
        "3 keys made, each split 3-of-5",
        "LICENSE (11358 bytes) encrypted, decrypted, signed, MAC'd",
        "Verified OK",
        "node1 and node2 killed (SIGKILL): the same operations succeed",
        "node3 killed too: keys that are loaded are still served",
        "QuorumUnavailable:",
        "missing node1, node2, node3",
        "node1, node2, node3 restarted: every share is there",
        "warm p99",
        "forecast per second and service times in force",
    ):
        assert shown in text, f"{shown!r} is missing in: {text}"
    assert not place.exists()
    assert _processes_of(tmp_path) == []


def test_a_deviation_is_exit_code_1(tmp_path: Path) -> None:
    """An openssl that does not verify the signature is a deviation; the demo says so and still cleans up."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "openssl").write_text("#!/bin/sh\necho 'Verification failure'\nexit 1\n", encoding="utf-8")
    (fake / "openssl").chmod(0o755)
    place = tmp_path / "demo"
    ended = _demo("--path", str(place), cwd=tmp_path, PATH=f"{fake}:{os.environ['PATH']}")
    assert ended.returncode == 1
    assert "openssl says: Verification failure" in " ".join(ended.stdout.split())
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not place.exists()
    assert _processes_of(place) == []
