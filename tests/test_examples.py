"""Every program under examples/ runs and says what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMISES = {
    "seal_records.py": ("200 records sealed and opened: True", "another tenant is refused"),
    "sign_async.py": ("100 signatures verified without the cluster",),
}


def test_every_example_is_tested() -> None:
    """No example without a promise, and the other way round."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_the_example_keeps_its_promise(name: str, tmp_path: Path) -> None:
    """It ends with 0 from any folder and prints what it says."""
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for promise in PROMISES[name]:
        assert promise in ended.stdout
