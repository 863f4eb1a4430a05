"""The installed ``keyquorum`` as a process of its own, without the tests' own settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end; what it printed, and its exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")}
    return subprocess.run(
        [Path(sys.executable).parent / "keyquorum", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
