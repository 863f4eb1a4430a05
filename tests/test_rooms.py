"""What import-linter can't see: the native sources, the one place of each dependency, and constructs nobody may use.

The contracts between the Python rooms are in pyproject.toml and run by ``make lint``. Each rule here is a function from
sources to findings, so that it can also be shown to find what it looks for.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("src/engine", "nodes", "balancer")
EVERYWHERE = (*PRODUCT, "bench", "tests", "examples")

Sources = dict[str, str]
"""Path below the root -> text."""

CONFINED = {
    "engine._fastshamir": ("src/engine/sharing/",),
    "nodes._fasttoken": ("nodes/token.py",),
    "pkcs11": ("nodes/token.py", "nodes/_fasttoken"),
    "sklearn": ("balancer/forecast.py",),
    "highspy": ("balancer/optimizer.py",),
}
"""Module -> the only places (prefixes of paths) of the product that may import it."""

NATIVE = (
    ("src/engine/protocol/", ("nodes", "balancer", "engine.client", "engine.cli", "engine.sharing", "zmq")),
    ("src/engine/client/", ("nodes", "balancer", "engine.cli", "engine.sharing")),
    ("src/", ("nodes", "balancer", "engine")),
    ("nodes/_fastpath", ("balancer", "engine.cli", "engine.sharing", "nodes")),
    ("nodes/_usebuffer", ("balancer", "engine.cli", "engine.sharing", "nodes")),
    ("nodes/", ("balancer", "engine.client", "engine.cli")),
)
"""Prefix of a native module's path -> what it must not import; the first that fits."""
NATIVE_NEIGHBOURS = {"nodes/_fastpath": ("nodes._fasttoken", "nodes._usebuffer")}
"""... and the modules of its room that it may, since it calls them in C."""

PURE = ("src/engine/sharing/", "src/engine/protocol/", "src/engine/keys.py", "src/engine/errors.py")
IMPURE_MODULES = ("asyncio", "datetime", "selectors", "socket", "ssl", "subprocess", "time", "zmq")
PURE_PARTS = ("zmq.utils.z85",)
"""Parts of those modules that open no socket and read no clock."""

UNSAFE_MODULES = ("cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "telnetlib")
UNSAFE_CALLS = ("eval", "exec", "recv_pyobj", "send_pyobj", "os.system", "os.popen", "subprocess.getoutput")


def read(folders: tuple[str, ...], *suffixes: str) -> Sources:
    """The sources below the folders, without what tools leave there."""
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for folder in folders
        for suffix in suffixes
        for path in sorted((ROOT / folder).rglob(f"*{suffix}"))
        if "__pycache__" not in path.parts
    }


def module_name(path: str) -> str:
    """The dotted name of a module, ``engine.client.aio`` for ``src/engine/client/aio.py``."""
    return path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(path: str, text: str) -> Iterator[str]:
    """Every name that a module imports, as far down as it is named; also by a constant of ``import_module``."""
    package = module_name(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            yield from (
                each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            )


def called(node: ast.Call) -> str:
    """What a call names, ``os.system``; empty for what is no plain name."""
    try:
        return ast.unparse(node.func)
    except (ValueError, RecursionError):
        return ""


def is_within(name: str, module: str) -> bool:
    """Whether a dotted name is the module or inside it."""
    return name == module or name.startswith(module + ".")


def confined_imports(sources: Sources) -> list[str]:
    """Imports of a confined module outside its place."""
    return [
        f"{path} imports {name}"
        for path, text in sources.items()
        for name in imported(path, text)
        for module, places in CONFINED.items()
        if is_within(name, module) and not path.startswith(places)
    ]


def impure_imports(sources: Sources) -> list[str]:
    """Imports of sockets and clocks where the design allows neither."""
    return [
        f"{path} imports {name}"
        for path, text in sources.items()
        if path.startswith(PURE)
        for name in imported(path, text)
        if any(is_within(name, module) for module in IMPURE_MODULES)
        and not any(is_within(name, part) for part in PURE_PARTS)
    ]


def facade_imports(sources: Sources) -> list[str]:
    """Imports of ``engine`` itself by a module below its command line: they would close a circle."""
    below = (*PURE, "src/engine/client/")
    modules = {module_name(path) for path in sources} | {"engine._fastshamir", "engine._version"}
    return [
        f"{path} imports {name}"
        for path, text in sources.items()
        if path.startswith(below)
        for name in imported(path, text)
        if is_within(name, "engine") and not any(is_within(name, each) for each in modules - {"engine"})
    ]


def unsafe_constructs(sources: Sources) -> list[str]:
    """Ways to run what came from outside: pickles, evaluated text, shell lines."""
    found = []
    for path, text in sources.items():
        found += [
            f"{path} imports {name}"
            for name in imported(path, text)
            if any(is_within(name, module) for module in UNSAFE_MODULES)
        ]
        for node in ast.walk(ast.parse(text, path)):
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            if any(name == unsafe or name.endswith(f".{unsafe}") for unsafe in UNSAFE_CALLS):
                found.append(f"{path}:{node.lineno} calls {name}")
            if any(keyword.arg == "shell" and not is_false(keyword.value) for keyword in node.keywords):
                found.append(f"{path}:{node.lineno} gives shell= to {name}")
    return found


def is_false(value: ast.expr) -> bool:
    """Whether an expression is the constant False."""
    return isinstance(value, ast.Constant) and value.value is False


def undocumented_modules(sources: Sources) -> list[str]:
    """Modules that do not begin with a docstring."""
    return [path for path, text in sources.items() if not (ast.get_docstring(ast.parse(text, path)) or "").strip()]


def outward_imports(sources: Sources) -> list[str]:
    """Imports of the benchmarks or tests by the product."""
    return [
        f"{path} imports {name}"
        for path, text in sources.items()
        for name in imported(path, text)
        if name.split(".")[0] in ("bench", "tests", "examples")
    ]


def native_imports(sources: Sources) -> list[str]:
    """Imports of a room by a native module that must not know it; the core may know none."""
    line = re.compile(r"^\s*(?:from\s+(\S+)\s+c?import|c?import\s+(.+))", re.MULTILINE)
    found = []
    for path, text in sources.items():
        forbidden = next(rooms for prefix, rooms in NATIVE if path.startswith(prefix))
        neighbours = NATIVE_NEIGHBOURS.get(path.partition(".")[0], ())
        for match in line.finditer(text):
            names = [match[1]] if match[1] else [part.split()[0] for part in match[2].split("#")[0].split(",")]
            names = [name for name in names if name not in neighbours]
            found += [f"{path} imports {name}" for name in names for room in forbidden if is_within(name, room)]
    return found


def versions_stated(sources: Sources) -> list[str]:
    """Where ``__version__`` is given a constant."""
    return [
        path
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text, path))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and any(isinstance(target, ast.Name) and target.id == "__version__" for target in node.targets)
    ]


def test_confined_modules_have_one_place() -> None:
    """The core, PKCS#11, scikit-learn and HiGHS are each imported where the design says, and nowhere else."""
    assert confined_imports(read(PRODUCT, ".py")) == []


def test_sharing_and_protocol_know_no_socket_and_no_clock() -> None:
    """The pure rooms take time and messages as arguments."""
    assert impure_imports(read(PRODUCT, ".py")) == []


def test_the_facade_is_for_others() -> None:
    """Below the command line the rooms import each other's modules, never ``engine``, which imports them all."""
    assert facade_imports(read(PRODUCT, ".py")) == []


def test_nothing_unsafe_is_called() -> None:
    """No pickle, no evaluated text and no shell line, in the tests and benchmarks neither."""
    assert unsafe_constructs(read(EVERYWHERE, ".py")) == []


def test_every_module_says_what_it_owns() -> None:
    """Each module begins with a docstring."""
    assert undocumented_modules(read(EVERYWHERE, ".py")) == []


def test_the_product_imports_no_tests() -> None:
    """Benchmarks, tests and examples look at the product, never the other way."""
    assert outward_imports(read(PRODUCT, ".py")) == []


def test_native_modules_stay_in_their_rooms() -> None:
    """The core imports no room, the codec only itself, the token path neither the balancer nor the client."""
    assert native_imports(read(("src", "nodes"), ".pyx", ".pxd")) == []


def test_the_version_is_stated_once() -> None:
    """One ``__version__``, which the package's metadata and every room read."""
    assert versions_stated(read(PRODUCT, ".py")) == ["src/engine/_version.py"]


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (confined_imports, "src/engine/client/calls.py", "from engine import _fastshamir"),
        (confined_imports, "src/engine/client/calls.py", "from .. import _fastshamir"),
        (confined_imports, "src/engine/__init__.py", "from ._fastshamir import split"),
        (confined_imports, "nodes/handlers.py", "from nodes import _fasttoken"),
        (confined_imports, "nodes/server.py", "import importlib\nimportlib.import_module('pkcs11.util')"),
        (confined_imports, "balancer/plan.py", "def f():\n    import sklearn.linear_model as linear"),
        (confined_imports, "balancer/plan.py", "import highspy"),
        (impure_imports, "src/engine/protocol/grant.py", "import time"),
        (impure_imports, "src/engine/sharing/dealer.py", "from zmq import green"),
        (facade_imports, "src/engine/sharing/dealer.py", "import engine"),
        (facade_imports, "src/engine/client/calls.py", "from engine import connect"),
        (unsafe_constructs, "bench/load.py", "from pickle import loads"),
        (unsafe_constructs, "nodes/server.py", "socket.recv_pyobj()"),
        (unsafe_constructs, "nodes/server.py", "subprocess.run(line, shell=True)"),
        (unsafe_constructs, "nodes/server.py", "eval(text)"),
        (undocumented_modules, "nodes/server.py", "import os"),
        (outward_imports, "nodes/server.py", "from tests.nodes import helpers"),
        (native_imports, "src/_fastshamir.pyx", "from engine.errors import EngineError"),
        (native_imports, "src/_fastshamir.pyx", "import os, nodes.token"),
        (native_imports, "nodes/_fasttoken.pyx", "from balancer cimport plan"),
        (native_imports, "nodes/_fastpath.pyx", "from nodes import handlers"),
        (native_imports, "nodes/_fasttoken.pyx", "from engine.client._router cimport Router"),
        (native_imports, "src/engine/protocol/_fastwire.pyx", "from engine.client._zmtp cimport sodium"),
        (versions_stated, "nodes/__init__.py", "__version__ = '1'"),
    ],
)
def test_rules_find_what_they_look_for(rule, path: str, text: str) -> None:
    """Each rule reports a source that breaks it."""
    assert len(rule({path: text})) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (confined_imports, "src/engine/sharing/dealer.py", "from engine import _fastshamir"),
        (confined_imports, "nodes/token.py", "import pkcs11"),
        (confined_imports, "nodes/token.py", "from nodes._fasttoken import Session"),
        (impure_imports, "src/engine/protocol/manifest.py", "import zmq.utils.z85"),
        (facade_imports, "src/engine/sharing/dealer.py", "from engine._fastshamir import split"),
        (facade_imports, "nodes/server.py", "import engine"),
        (unsafe_constructs, "nodes/server.py", "subprocess.run(words, shell=False)"),
        (native_imports, "src/_fastshamir.pyx", "from cpython.ref cimport Py_INCREF\nimport os"),
    ],
)
def test_rules_let_the_allowed_pass(rule, path: str, text: str) -> None:
    """Each rule has its exceptions."""
    assert rule({path: text}) == []
