"""The process that begins anew with an allocator which overwrites what is freed; real processes, real memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nodes.allocator import OVERWRITE_VARIABLE, overwriting_environment

OURS = "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165"
FREE_AND_LOOK = """
import ctypes, json, os, sys, warnings
began = os.getpid(), os.environ.get("BEGAN")
os.environ["BEGAN"] = str(os.getpid())
from nodes.allocator import overwrite_freed
overwrite_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
left = {}
for size in (32, 64, 100, 500, 1000, 5000, 60000):
    block, fence = libc.malloc(size), libc.malloc(16)
    ctypes.memset(block, 0x3C, size)
    libc.free(block)
    left[size] = ctypes.string_at(block, size).count(0x3C)
small = bytes([0x3C]) * 200
place = id(small) + bytes.__basicsize__ - 1
del small
left["bytes"] = ctypes.string_at(place, 150).count(0x3C)  # shorter, so that it is not made in the same place
print(json.dumps({"left": left, "pid": os.getpid(), "began": began, "argv": sys.argv[1:], "safe": sys.flags.safe_path,
    "filters": [str(each[0]) for each in warnings.filters[:1]], "pipe": os.read(int(sys.argv[1]), 9).decode()}))
"""


def looked(**environment: str) -> tuple[dict[str, Any], int]:
    """What the process told, and the process id that it was started with."""
    reader, writer = os.pipe()
    os.write(writer, b"lifeline")
    os.close(writer)
    clean = {name: value for name, value in os.environ.items() if name not in {OVERWRITE_VARIABLE, "PYTHONMALLOC"}}
    root = str(Path(__file__).parents[2])
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "error", "-c", FREE_AND_LOOK, str(reader), "two words", ""],
            stdout=subprocess.PIPE,
            pass_fds=[reader],
            env={**clean, "PYTHONPATH": root, **environment},
        )
    finally:
        os.close(reader)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(told), process.pid


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT RUN: only glibc overwrites what is freed")
def test_what_is_freed_is_overwritten_and_the_process_is_the_same() -> None:
    """At most 8 bytes at a block's end stay; without the settings nearly all of it does, which is the control."""
    told, pid = looked()
    assert max(told["left"].values()) <= 8, told["left"]
    assert told["pid"] == pid
    assert told["began"] == [pid, str(pid)], "it began anew once"
    assert told["argv"][1:] == ["two words", ""]
    assert told["pipe"] == "lifeline"
    assert told["safe"] is True
    assert told["filters"] == ["error"]
    told, pid = looked(**{OVERWRITE_VARIABLE: "0"})
    assert told["began"] == [pid, None]
    assert told["left"]["64"] >= 32
    assert told["left"]["1000"] >= 900
    assert told["left"]["bytes"] >= 100


def test_the_settings_of_the_user_stay() -> None:
    fresh = overwriting_environment({"A": "b"})
    assert fresh == {"A": "b", "PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": OURS, OVERWRITE_VARIABLE: "set"}
    assert overwriting_environment(fresh) is None
    assert overwriting_environment({OVERWRITE_VARIABLE: "0"}) is None
    own = {"PYTHONMALLOC": "malloc_debug", "GLIBC_TUNABLES": "glibc.malloc.perturb=7:glibc.rtld.nns=4"}
    told = overwriting_environment({**own, OVERWRITE_VARIABLE: "1"})
    assert told is not None
    assert told["PYTHONMALLOC"] == "malloc_debug"
    assert told["GLIBC_TUNABLES"] == own["GLIBC_TUNABLES"] + ":glibc.malloc.tcache_count=0"
