"""The native extensions; everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src" / "gf256").glob("*.c"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src" / "gf256").glob("*.h"))

# KEYQUORUM_SANITIZE=address,undefined builds both for the sanitizers (the tests then need LD_PRELOAD of libasan).
SANITIZE = os.environ.get("KEYQUORUM_SANITIZE", "")
# KEYQUORUM_OPTIMIZE=0 is for who looks at the package alone: it is built in a third of the time.
OPTIMIZE = f"-O{int(os.environ.get('KEYQUORUM_OPTIMIZE', '3'))}"
COMPILE = [OPTIMIZE, "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
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


def native(name: str, source: str, *headers: str) -> Extension:
    """An extension of one source, with headers of ``engine.protocol``."""
    return Extension(
        name,
        sources=[source],
        depends=[f"src/engine/protocol/{each}" for each in headers],
        include_dirs=["src/engine/protocol"],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )


fastwire = native("engine.protocol._fastwire", "src/engine/protocol/_fastwire.pyx", "fastwire.h")
fastlines = native("engine.protocol._fastlines", "src/engine/protocol/_fastlines.pyx")
nodestate = native("engine.protocol._nodestate", "src/engine/protocol/_nodestate.pyx")
zmtp = native("engine.client._zmtp", "src/engine/client/_zmtp.pyx", "zmtp.h")
router = native("engine.client._router", "src/engine/client/_router.pyx", "zmtp.h")
fastline = native("engine.client._fastline", "src/engine/client/_fastline.pyx", "fastwire.h", "zmtp.h")
fastpath = native("nodes._fastpath", "nodes/_fastpath.pyx", "fastwire.h", "zmtp.h")

usebuffer = native("nodes._usebuffer", "nodes/_usebuffer.pyx")
histogram = native("engine.client._histogram", "src/engine/client/_histogram.pyx")


class BuildExtensions(build_ext):
    """As many compilers at a time as there are processors."""

    def finalize_options(self) -> None:
        """Where no number is given."""
        super().finalize_options()
        self.parallel = self.parallel or len(os.sched_getaffinity(0))


# Without autotestdict the module has no __test__, which its .pyi would otherwise have to list.
DIRECTIVES = {"language_level": "3", "autotestdict": False}

setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=cythonize(
        [fastshamir, fasttoken, fastlines, fastwire, nodestate, histogram, zmtp, router, fastline, fastpath, usebuffer],
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
