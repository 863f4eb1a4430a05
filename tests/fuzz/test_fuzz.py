"""The fuzzer of the decoders in short: corpus, a part of the targets, planted bugs, and that no decoder is left out.

``run.py`` beside this file does the work, in processes of its own; ``make fuzz`` is the long run. That a decoder is not
covered is found here: by the registries of codecs, the kinds of signed documents, and every call of a parser.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN = Path(__file__).parent / "run.py"
EXECUTIONS = 30_000
TIMEOUT_S = 600
"""It only ends a run that hangs."""
BUGS_MIN = 15
CORPUS_MAX = 1024 * 1024


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the report and the temporary files."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """``run.py`` to its end; its workers end with it."""
    more = {"PYTHONHASHSEED": "0", "KEYQUORUM_FUZZ_REPORT": str(folder), "KEYQUORUM_FUZZ_FOLDER": str(folder)}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(RUN), *arguments],
            cwd=ROOT,
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )

    return call


@pytest.fixture(scope="module")
def replayed(run: Run) -> dict[str, Any]:
    """Samples and corpus, each once."""
    done = run("--replay")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def report(run: Run, folder: Path) -> dict[str, Any]:
    """A short run of everything, with seeds that never change."""
    done = run("--executions", str(EXECUTIONS), "--seed", "0", "--trace", "0")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def test_samples_and_corpus_do_nothing_that_must_not_be(replayed: dict[str, Any]) -> None:
    assert replayed["failures"] == []
    assert replayed["executions"] > 1_000


def test_every_decoder_has_a_target(replayed: dict[str, Any]) -> None:
    """If this names something new: make a target for it (tests/fuzz/formats.py), or say in ELSEWHERE why not."""
    assert replayed["uncovered"] == []


def test_every_corpus_folder_is_a_targets(replayed: dict[str, Any]) -> None:
    """A target that is gone, or has another name, leaves its folder behind: rename or delete it."""
    assert replayed["strays"] == []
    files = [path for path in (Path(__file__).parent / "corpus").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < CORPUS_MAX


def test_a_short_run_finds_nothing(report: dict[str, Any]) -> None:
    assert report["failures"] == []
    assert report["problems"] == []
    assert report["executions"] >= EXECUTIONS
    # It is a proof of nothing if nothing happens: targets accept, and refuse in many ways.
    targets = report["targets"].values()
    assert sum(each["accepted"] > 0 for each in targets) > 0.9 * len(targets)
    assert sum(each["refusals"] for each in targets) > 1_500


def test_every_planted_bug_is_found(report: dict[str, Any]) -> None:
    """Each within its own number of executions; the code as it is passes the same ones."""
    bugs = report["bugs"]
    assert len(bugs) >= BUGS_MIN
    assert {name: each["what"] for name, each in bugs.items() if not each["found"]} == {}
    assert all(each["executions"] <= each["within"] for each in bugs.values())


def test_a_failure_is_found_again_by_its_iteration(run: Run) -> None:
    """The same input twice, and another with another seed."""
    one, two = (run("--target", "document/grant", "--seed", "3", "--iteration", "700") for _ in range(2))
    other = run("--target", "document/grant", "--seed", "4", "--iteration", "700")
    assert one.returncode == two.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert other.stdout.splitlines()[0] != one.stdout.splitlines()[0]


# --- the inventory itself ---


@pytest.fixture
def inventory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = set(sys.modules)
    import inventory

    yield inventory
    for name in set(sys.modules) - before:
        if not getattr(sys.modules[name], "__spec__", None) or not name.startswith(("engine", "nodes", "balancer")):
            path = getattr(sys.modules[name], "__file__", None)
            if path and Path(path).parent == Path(__file__).parent:
                del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(x):\n    return tomllib.loads(x)", "made.up.f parses (tomllib.loads)"),
        ("class A:\n    def f(self, x):\n        return base64.b64decode(x)", "made.up.A.f parses (base64.b64decode)"),
        ("def f(x):\n    return msgspec.msgpack.decode(x)", "made.up.f parses (msgspec.msgpack.decode)"),
        ("def f(x, k):\n    return verify_envelope(x, 'new.kind', k)", "the signed kind 'new.kind' has no target"),
        ("KIND = 'other'\ndef f(x, k):\n    sign_envelope(KIND, 1, x, k)", "the signed kind 'other' has no target"),
        ("def f(x, y, k):\n    return verify_envelope(x, y, k)", "the signed kind '? in verify_envelope(x, y, k)'"),
    ],
)
def test_a_decoder_that_nobody_covers_is_told(inventory: Any, source: str, told: str) -> None:
    found = inventory.uncovered([], {"made.up": ast.parse(source)})
    assert [each for each in found if each.startswith(told)]


def test_a_codec_without_a_target_is_told(inventory: Any) -> None:
    assert "the codec 'grant' has no target" in inventory.uncovered([], {})


def test_a_native_module_without_a_target_is_told(inventory: Any) -> None:
    found = inventory.uncovered_natives([], inventory.natives(inventory.PACKAGES))
    assert "the native module 'engine.client._zmtp' has no target" in found
    assert "the native module 'engine.client._router' has no target" in found
    assert "the native module 'engine.client._histogram' has no target" not in found
