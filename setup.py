"""The native extensions; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src" / "gf256").glob("*.c"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src" / "gf256").glob("*.h"))

# KEYQUORUM_SANITIZE=address,undefined builds both for the sanitizers (the tests then need LD_PRELOAD of libasan).
SANITIZE = os.environ.get("KEYQUORUM_SANITIZE", "")
COMPILE = ["-O3", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
LINK: list[str] = []
if SANITIZE:
    COMPILE += [f"-fsanitize={SANITIZE}", "-g", "-fno-omit-frame-pointer"]
    LINK += [f"-fsanitize={SANITIZE}"]

fastshamir = Extension(
    "engine._fastshamir",
    sources=["src/_fastshamir.pyx", *KERNELS],
    depends=HEADERS,
    include_dirs=["src/gf256"],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
)

fasttoken = Extension(
    "nodes._fasttoken",
    sources=["nodes/_fasttoken.pyx"],
    extra_compile_args=COMPILE,
    extra_link_args=[*LINK, "-ldl"],
)


def on_the_wire(name: str, source: str) -> Extension:
    """An extension that reads and writes frames by ``fastwire.h``."""
    return Extension(
        name,
        sources=[source],
        depends=["src/engine/protocol/fastwire.h"],
        include_dirs=["src/engine/protocol"],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )


fastwire = on_the_wire("engine.protocol._fastwire", "src/engine/protocol/_fastwire.pyx")
fastline = on_the_wire("engine.client._fastline", "src/engine/client/_fastline.pyx")
fastpath = on_the_wire("nodes._fastpath", "nodes/_fastpath.pyx")

histogram = Extension(
    "engine.client._histogram",
    sources=["src/engine/client/_histogram.pyx"],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
)

# Without autotestdict the module has no __test__, which its .pyi would otherwise have to list.
DIRECTIVES = {"language_level": "3", "autotestdict": False}

setup(
    ext_modules=cythonize(
        [fastshamir, fasttoken, fastwire, fastline, fastpath, histogram],
        include_path=["src"],
        build_dir="build/cython",
        compiler_directives=DIRECTIVES,
    ),
    packages=[
        *(f"engine{name and '.' + name}" for name in ["", *find_packages("src/engine")]),
        *(f"nodes{name and '.' + name}" for name in ["", *find_packages("nodes")]),
        *(f"balancer{name and '.' + name}" for name in ["", *find_packages("balancer")]),
    ],
)
