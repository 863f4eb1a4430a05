"""The log never stops who writes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from engine.client.config import configure_logging

PROGRAM = """
import threading, structlog
from engine.client.config import configure_logging
configure_logging("info")
log = structlog.get_logger()
worker = threading.Thread(target=lambda: (log.warning("lost"), print("the thread went on")))
worker.start()
worker.join()
log.error("lost too", exc_info=True)
print("on", flush=True)
"""


def test_a_log_that_nobody_reads_any_more_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert ended.stdout == "the thread went on\non\n"


def test_a_line_goes_to_where_stderr_is_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with first.open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        configure_logging("info")
        log = structlog.get_logger()
        log.info("one")
    with second.open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        log.info("two")
    assert ("one" in first.read_text(), "two" in second.read_text()) == (True, True)
