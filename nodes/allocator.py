"""Have this process's allocator overwrite what is freed, so that shares in messages do not stay in memory.

Python ``bytes``, and what libzmq, msgspec and the token's module allocate, can't be wiped by those who use them. But
glibc fills each freed block with a byte (``glibc.malloc.perturb``), except those that its caches per thread take, which
must be off, and those of Python's own allocator for small objects, which must go through ``malloc``. All three are
settings that a process reads once, when it starts: so a process that lacks them replaces itself. Another C library
ignores what it does not know. It imports little, since its process begins anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

__all__ = ["OVERWRITE_VARIABLE", "overwrite_freed", "overwriting_environment"]

OVERWRITE_VARIABLE: Final = "KEYQUORUM_OVERWRITE_FREED"
"""``0``: leave freed memory as it is. ``set``: this process was started with the settings, or by one that was."""
TUNABLES: Final = {"glibc.malloc.tcache_count": "0", "glibc.malloc.perturb": "165"}


def overwriting_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to begin anew with; None if that was done, or is not wanted. What the user has set stays."""
    if environment.get(OVERWRITE_VARIABLE) in ("0", "set"):
        return None
    tunables = [each for each in environment.get("GLIBC_TUNABLES", "").split(":") if each]
    named = {each.partition("=")[0] for each in tunables}
    tunables += [f"{name}={value}" for name, value in TUNABLES.items() if name not in named]
    return {
        "PYTHONMALLOC": "malloc",
        **environment,
        "GLIBC_TUNABLES": ":".join(tunables),
        OVERWRITE_VARIABLE: "set",
    }


def overwrite_freed() -> None:
    """Replace this process by the same command with an allocator that overwrites, unless it is that already.

    Process id, working folder, inherited descriptors and Python's flags stay. To be called before anything is opened.
    """
    environment = overwriting_environment(os.environ)
    if environment is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - itself
