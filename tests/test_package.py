"""The package as others install it: the sdist makes the wheel, and the wheel works where no checkout is near.

Nothing is fetched: the wheel is built without isolation and installed without its dependencies, which the fresh
environment borrows from the one that runs the tests.
"""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"src/engine": "engine", "nodes": "nodes", "balancer": "balancer"}
LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "dist",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
    "*.egg-info",
    "__pycache__",
    "*.so",
)
RUBBISH = (
    "src/_fastshamir.c",
    "src/engine/_fastshamir.cpython-39-x86_64-linux-gnu.so",
    "nodes/_fasttoken.c",
    "nodes/scratch.c",
    "build/lib/engine/removed.py",
    "src/engine/__pycache__/errors.cpython-311.pyc",
)
"""What earlier builds may have left in a checkout, and no archive may take along."""


def run(words: Sequence[str | Path], cwd: Path, **more: str) -> str:
    """The standard output of a command in a plain environment, away from the checkout; a failure shows both streams."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def packaged_sources() -> set[str]:
    """The names that the wheel must hold for the rooms: modules, stubs, type markers and the balancer's page."""
    names = set()
    for folder, package in ROOMS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi") or path.name == "py.typed" or path.parent.name == "page":
                names.add(f"{package}/{path.relative_to(ROOT / folder)}")
    return names


EXTENSIONS = (
    "engine/_fastshamir",
    "engine/client/_fastline",
    "engine/client/_histogram",
    "engine/client/_router",
    "engine/client/_zmtp",
    "engine/protocol/_fastlines",
    "engine/protocol/_fastwire",
    "engine/protocol/_nodestate",
    "nodes/_fastpath",
    "nodes/_fasttoken",
    "nodes/_usebuffer",
)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, made from a copy of the checkout with rubbish in it, and the wheel, made from the sdist."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in RUBBISH:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("rubbish\n")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy]
    run(build, folder, KEYQUORUM_OPTIMIZE="0")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fresh virtual environment with the wheel in it."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv], venv.parent)
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", archives[1]]
    run([sys.executable, "-m", "pip", "--python", venv / "bin" / "python", *install], venv.parent)
    # A folder named in a .pth file is searched, but its own .pth files (our editable install) are not read.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_wheel_holds_exactly_the_modules_and_extensions(archives: tuple[Path, Path]) -> None:
    """No C source, no test, no leftover of an earlier build; stubs and type markers are there."""
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    code = {name for name in names if ".dist-info/" not in name}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert code == packaged_sources() | {name + suffix for name in EXTENSIONS}
    assert {"engine/py.typed", "nodes/py.typed", *(f"{name}.pyi" for name in EXTENSIONS)} <= code
    metadata = {name.split(".dist-info/")[1] for name in names - code}
    assert metadata == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "licenses/LICENSE",
        "licenses/balancer/page/LICENSE.uPlot",
    }


def test_metadata_says_what_the_project_file_says(archives: tuple[Path, Path]) -> None:
    """Name, version, licence, Python versions and the mark that keeps it off the public index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == (ROOT / "src/engine/_version.py").read_text().split('"')[-2]
    assert metadata["License-Expression"] == project["license"] == "Apache-2.0 AND MIT"
    assert metadata["Requires-Python"] == project["requires-python"]
    assert "Private :: Do Not Upload" in metadata.get_all("Classifier", [])


def test_sdist_holds_what_builds_and_tests_need(archives: tuple[Path, Path]) -> None:
    """All sources, the licence and the tests; nothing generated and nothing compiled."""
    with tarfile.open(archives[0]) as sdist:
        names = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    wanted = {
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "src/_fastshamir.pyx",
        "nodes/_fasttoken.pyx",
        ".ci/run",
        ".ci/setup",
    }
    wanted |= {name for name in ("README.md", "CHANGELOG.md") if (ROOT / name).exists()}
    for pattern in (
        "src/gf256/*.[ch]",
        "src/engine/**/*.py*",
        "nodes/**/*.py",
        "balancer/**/*.py",
        "balancer/page/*",
        "tests/**/*.py",
    ):
        wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if "__pycache__" not in path.parts}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert not names & set(RUBBISH)
    assert not [name for name in names if name.startswith("build/")]


def test_installed_package_works_outside_the_checkout(installed: Path) -> None:
    """The three rooms come from the fresh environment, agree on the version, and the native core computes there."""
    program = """
import importlib.metadata, engine, nodes, balancer
from engine import _fastshamir
from nodes import _fasttoken
shares = engine.generate_shares(b"sixteen byte key", threshold=2, shares=3)
assert engine.reconstruct_key(shares[1:]) == b"sixteen byte key"
assert _fastshamir.kernel_name() in _fastshamir.available_kernels()
assert engine.__version__ == importlib.metadata.version("keyquorum")
print(*(module.__file__ for module in (engine, nodes, balancer, _fastshamir, _fasttoken)), sep="\\n")
"""
    files = run([installed / "bin" / "python", "-c", program], installed).split()
    assert len(files) == 5
    assert all(Path(file).is_relative_to(installed / "lib") for file in files)


def test_installed_commands_answer(installed: Path) -> None:
    """``keyquorum``, ``python -m nodes`` and ``python -m balancer`` start from the installed package."""
    version = run([installed / "bin" / "keyquorum", "--version"], installed)
    assert version.split()[-1] == (ROOT / "src/engine/_version.py").read_text().split('"')[-2]
    for room in ("nodes", "balancer"):
        assert "--config" in run([installed / "bin" / "python", "-m", room, "--help"], installed)
