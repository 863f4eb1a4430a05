"""Owns the native core's figures beside its rivals', with the targets that it holds itself to; `make bench-shamir`.

Every figure is a ratio of two operations that are timed in turns in one process, on the same rows and the same random
stream; the medians over the rounds are printed and written to ``build/bench/shamir.json``. The rivals are fetched and
built under ``build/bench/shamir`` and are never part of the package: Intel ISA-L 2.32 from the sources in the sdist of
``isal`` on PyPI (with Debian's nasm), ISA-L 2.30 and libgfshare from Debian, PyCryptodome from PyPI.

It knows nothing of nodes and tokens. The exit code is 0 whatever the figures say; a rival that is missing is an error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from engine import _fastshamir as core

HERE = Path(__file__).parent
SOURCES = HERE.parent / "src" / "gf256"
OUTPUT = HERE.parent / "build" / "bench"
PLACE = OUTPUT / "shamir"
KIB, MIB = 1024, 1 << 20
ISAL_DEBIAN = "libisal.so.2"
GFSHARE_DEBIAN = "libgfshare.so.2"


# --- the rivals ------------------------------------------------------------------------------------------------------


def run(*words: str | Path, cwd: Path | None = None) -> None:
    """A command whose output is shown only when it fails."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def build_isal() -> Path:
    """ISA-L 2.32 as a shared library, from the sources that the Python package ``isal`` carries."""
    library = PLACE / "libisal-2.32.so"
    if library.exists():
        return library
    if shutil.which("nasm") is None:
        raise click.ClickException("ISA-L 2.32 can't be built without nasm; Debian's package is nasm")
    PLACE.mkdir(parents=True, exist_ok=True)
    fetch = ("pip", "download", "--quiet", "--no-deps", "--no-binary", "isal", "isal==1.9.1", "--dest", str(PLACE))
    run(sys.executable, "-m", *fetch)
    with tarfile.open(PLACE / "isal-1.9.1.tar.gz") as archive:
        archive.extractall(PLACE, filter="data")
    folder = PLACE / "isal-1.9.1" / "src" / "isal" / "isa-l"
    version = (folder / "make.inc").read_text(encoding="utf-8")
    if "version ?= 2.32" not in version:
        raise click.ClickException("the sdist of isal 1.9.1 holds another version of ISA-L than 2.32")
    run("make", "-f", "Makefile.unx", "units=erasure_code", "lib", cwd=folder)
    run("cc", "-shared", "-o", library, *sorted((folder / "bin").glob("*.o")))
    return library


def build_harness() -> Path:
    """The native core and the timing loop, with the flags that the extension is built with."""
    library = PLACE / "harness.so"
    PLACE.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(SOURCES.glob("*.c")), HERE / "shamir_rivals.c"]
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    run(*compiler, "-O3", "-std=c11", "-fPIC", "-shared", "-I", SOURCES, "-o", library, *sources)
    return library


class Work(ctypes.Structure):
    """``work`` of shamir_rivals.c."""

    _fields_ = (
        ("operation", ctypes.c_int),
        ("kernel", ctypes.c_void_p),
        ("field", ctypes.c_void_p),
        ("input_count", ctypes.c_uint),
        ("output_count", ctypes.c_uint),
        ("length", ctypes.c_size_t),
        ("xs", ctypes.c_uint8 * 256),
        ("targets", ctypes.c_uint8 * 256),
        ("inputs", ctypes.c_void_p * 256),
        ("outputs", ctypes.c_void_p * 256),
        ("encode", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("set", ctypes.c_void_p),
        ("share", ctypes.c_void_p),
        ("give", ctypes.c_void_p),
        ("extract", ctypes.c_void_p),
    )


INTERPOLATE, SPLIT, ISAL, COPY, GFSHARE_SPLIT, GFSHARE_COMBINE = range(6)


def address(library: ctypes.CDLL, name: str) -> int:
    """Where a function of a rival lies."""
    found = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert found is not None
    return found


class Rivals:
    """The loaded libraries."""

    def __init__(self) -> None:
        self.harness = ctypes.CDLL(str(build_harness()))
        self.harness.rivals_time.restype = ctypes.c_int64
        self.harness.rivals_time.argtypes = (ctypes.POINTER(Work), ctypes.c_uint)
        self.harness.rivals_kernel.restype = ctypes.c_void_p
        self.harness.rivals_field.restype = ctypes.c_void_p
        self.harness.rivals_work_bytes.restype = ctypes.c_size_t
        assert self.harness.rivals_work_bytes() == ctypes.sizeof(Work)
        self.harness.rivals_init()
        self.isal_232 = ctypes.CDLL(str(build_isal()), mode=os.RTLD_LOCAL)
        try:
            self.isal_230 = ctypes.CDLL(ISAL_DEBIAN, mode=os.RTLD_LOCAL)
            self.gfshare = ctypes.CDLL(GFSHARE_DEBIAN, mode=os.RTLD_LOCAL)
        except OSError as error:
            raise click.ClickException(f"{error}; Debian's packages are libisal2 and libgfshare2") from None
        ctypes.c_void_p.in_dll(self.gfshare, "gfshare_fill_rand").value = address(self.harness, "rivals_no_random")
        for name in ("gfshare_ctx_init_enc", "gfshare_ctx_init_dec"):
            getattr(self.gfshare, name).restype = ctypes.c_void_p

    def take(self, work: Work, kernel: str, poly: int = 0x11B) -> Work:
        """Make an operation one of ours, by the name of the kernel."""
        work.kernel = self.harness.rivals_kernel(kernel.encode())
        work.field = self.harness.rivals_field(poly)
        if not work.kernel:
            raise click.ClickException(f"this machine has no kernel {kernel}")
        return work


class Rows:
    """Rows of one length that all operations of a comparison share: random inputs, and outputs that are warm."""

    def __init__(self, inputs: int, outputs: int, length: int, beside: int = 0) -> None:
        self.length = length
        rng = np.random.default_rng(1)
        self.inputs = [self.aligned(length, beside) for _ in range(inputs)]
        self.outputs = [self.aligned(length, beside) for _ in range(outputs)]
        for row in self.inputs:
            row[:] = rng.integers(0, 256, length, np.uint8)

    @staticmethod
    def aligned(length: int, beside: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A row of zeros that starts `beside` bytes behind a cache line's start."""
        room = np.zeros(length + 64 + beside, np.uint8)
        start = -room.ctypes.data % 64 + beside
        return room[start : start + length]

    def work(self, operation: int, inputs: int, outputs: int) -> Work:
        """The first rows of each kind, for an operation whose other fields the caller fills in."""
        made = Work(operation=operation, input_count=inputs, output_count=outputs, length=self.length)
        for j in range(inputs):
            made.inputs[j] = self.inputs[j].ctypes.data
        for j in range(outputs):
            made.outputs[j] = self.outputs[j].ctypes.data
        return made


def ours_split(rivals: Rivals, rows: Rows, threshold: int, shares: int, kernel: str, poly: int = 0x11B) -> Work:
    """The shares behind the random ones from the secret and the random stream, which is the first t - 1 shares."""
    made = rows.work(INTERPOLATE, threshold, shares - threshold + 1)
    made.xs[:threshold] = range(threshold)
    made.targets[: shares - threshold + 1] = range(threshold, shares + 1)
    return rivals.take(made, kernel, poly)


def ours_combine(rivals: Rivals, rows: Rows, threshold: int, kernel: str, poly: int = 0x11B) -> Work:
    """The secret from the shares at t indices that are no special case (1, 2, 3 would need no multiplication)."""
    made = rows.work(INTERPOLATE, threshold, 1)
    made.xs[:threshold] = range(3, threshold + 3)
    return rivals.take(made, kernel, poly)


def isal(library: ctypes.CDLL, rows: Rows, matrix: list[list[int]], entry: str = "ec_encode_data") -> Work:
    """Outputs = matrix * inputs by ISA-L; its tables are made outside the measurement."""
    made = rows.work(ISAL, len(matrix[0]), len(matrix))
    flat = bytes(scalar for row in matrix for scalar in row)
    tables = ctypes.create_string_buffer(32 * len(flat) + 64)
    init = library.ec_init_tables if entry == "ec_encode_data" else library.ec_init_tables_base
    init(len(matrix[0]), len(matrix), flat, tables)
    made.encode, made.tables = address(library, entry), ctypes.addressof(tables)
    made.kept = tables
    return made


def times(a: int, b: int, polynomial: int) -> int:
    """A product in the field, for matrices and checks alone."""
    product = 0
    for bit in range(8):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(14, 7, -1):
        product ^= (polynomial << (bit - 8)) * (product >> bit & 1)
    return product


def vandermonde(threshold: int, shares: int, polynomial: int = 0x11D) -> list[list[int]]:
    """What a split multiplies (secret, coefficients) with, at x = 1..shares."""
    matrix = []
    for x in range(1, shares + 1):
        row = [1]
        while len(row) < threshold:
            row.append(times(row[-1], x, polynomial))
        matrix.append(row)
    return matrix


def lagrange(xs: list[int], target: int, polynomial: int) -> list[int]:
    """What a combine multiplies the shares with."""
    row = []
    for x in xs:
        scalar = 1
        for m in xs:
            if m != x:
                inverse = next(e for e in range(1, 256) if times(x ^ m, e, polynomial) == 1)
                scalar = times(times(scalar, target ^ m, polynomial), inverse, polynomial)
        row.append(scalar)
    return row


def gfshare_split(rivals: Rivals, rows: Rows, threshold: int, shares: int) -> Work:
    """libgfshare's encoder, whose generator of randomness is switched off."""
    made = rows.work(GFSHARE_SPLIT, 1, shares)
    numbers = bytes(range(1, shares + 1))
    made.context = rivals.gfshare.gfshare_ctx_init_enc(numbers, shares, threshold, rows.length)
    made.set = address(rivals.gfshare, "gfshare_ctx_enc_setsecret")
    made.share = address(rivals.gfshare, "gfshare_ctx_enc_getshare")
    return made


def gfshare_combine(rivals: Rivals, rows: Rows, threshold: int) -> Work:
    """libgfshare's decoder."""
    made = rows.work(GFSHARE_COMBINE, threshold, 1)
    made.context = rivals.gfshare.gfshare_ctx_init_dec(bytes(range(3, threshold + 3)), threshold, rows.length)
    made.give = address(rivals.gfshare, "gfshare_ctx_dec_giveshare")
    made.extract = address(rivals.gfshare, "gfshare_ctx_dec_extract")
    return made


# --- measuring -------------------------------------------------------------------------------------------------------

Timer = Callable[[int], float]
"""Nanoseconds that so many repetitions take."""


def native(rivals: Rivals, work: Work) -> Timer:
    """A timer of an operation of shamir_rivals.c."""

    def timed(repetitions: int) -> float:
        spent: int = rivals.harness.rivals_time(work, repetitions)
        assert spent >= 0
        return spent

    return timed


def python(call: Callable[[], object]) -> Timer:
    """A timer of a call from Python; the loop around it is part of both ends."""

    def timed(repetitions: int) -> float:
        counter = range(repetitions)
        start = time.perf_counter_ns()
        for _ in counter:
            call()
        return time.perf_counter_ns() - start

    return timed


def measure(ends: list[Timer], rounds: int, budget_ns: float) -> list[list[float]]:
    """Nanoseconds a repetition of each end in each round; the ends take turns, first one and then the other ahead."""
    repetitions = []
    for end in ends:
        end(1)
        repetitions.append(max(1, int(budget_ns / max(end(1), end(1), 1))))
    gc.disable()
    try:
        found: list[list[float]] = [[] for _ in ends]
        for number in range(rounds):
            order = range(len(ends)) if number % 2 else reversed(range(len(ends)))
            for i in order:
                found[i].append(ends[i](repetitions[i]) / repetitions[i])
        return found
    finally:
        gc.enable()


@dataclass(frozen=True)
class Row:
    """One line of the table; ``value`` is ours, in ``unit``, and ``ratio`` is what the target speaks of."""

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float
    ratio: float
    target: str
    met: bool | None

    @classmethod
    def speed(cls, name: str, peer: str, spent: list[list[float]], length: int, at_least: float | None) -> Row:
        """How many times as fast as the peer, by the bytes of the secret."""
        ours, theirs = (statistics.median(each) for each in spent)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(*spent, strict=True))
        met = None if at_least is None else ratio >= at_least
        target = "-" if at_least is None else f">= {at_least:g}x"
        return cls(name, length / ours, "GB/s", peer, length / theirs, ratio, target, met)

    @classmethod
    def cost(cls, name: str, peer: str, spent: list[list[float]], at_most: float) -> Row:
        """How many times the peer's time."""
        ours, theirs = (statistics.median(each) for each in spent)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(*spent, strict=True))
        return cls(name, ours, "ns", peer, theirs, ratio, f"<= {at_most:g}x", ratio <= at_most)


# --- what is compared ------------------------------------------------------------------------------------------------


def check_against_isal(rivals: Rivals) -> None:
    """Our 0x11D and ISA-L compute the same, so both ends do the same work."""
    rows = Rows(10, 1, 5000)
    xs = list(range(3, 13))
    ours, theirs = ours_combine(rivals, rows, 10, core.kernel_name(), 0x11D), None
    native(rivals, ours)(1)
    result = rows.outputs[0].copy()
    for library in (rivals.isal_232, rivals.isal_230):
        theirs = isal(library, rows, [lagrange(xs, 0, 0x11D)])
        rows.outputs[0][:] = 0
        native(rivals, theirs)(1)
        assert (rows.outputs[0] == result).all()


def native_rows(rivals: Rivals, quick: bool) -> Iterator[Row]:
    """C against C: the random stream is ready in memory, and whole rows are processed."""
    best = core.available_kernels()[0]
    rounds, large_rounds = (11, 3) if quick else (101, 15)

    def compare(ours: Work, theirs: Work, large: bool = False) -> list[list[float]]:
        ends = [native(rivals, ours), native(rivals, theirs)]
        return measure(ends, large_rounds if large else rounds, 1 if large else 300_000)

    rows = Rows(16, 16, 4 * KIB)
    split_3_5 = ours_split(rivals, rows, 3, 5, best)
    for library, name, target in ((rivals.isal_232, "ISA-L 2.32", 2.0), (rivals.isal_230, "ISA-L 2.30", 5.0)):
        spent = compare(split_3_5, isal(library, rows, vandermonde(3, 5)))
        yield Row.speed("split 3-of-5, 4 KiB", name, spent, rows.length, target)
    spent = compare(ours_combine(rivals, rows, 3, best), isal(rivals.isal_232, rows, [lagrange([3, 4, 5], 0, 0x11D)]))
    yield Row.speed("combine of 3, 4 KiB", "ISA-L 2.32", spent, rows.length, 1.6)
    spent = compare(ours_split(rivals, rows, 10, 16, best), isal(rivals.isal_232, rows, vandermonde(10, 16)))
    yield Row.speed("split 10-of-16, 4 KiB", "ISA-L 2.32", spent, rows.length, 2.7)
    ten = lagrange(list(range(3, 13)), 0, 0x11D)
    spent = compare(ours_combine(rivals, rows, 10, best), isal(rivals.isal_232, rows, [ten]))
    yield Row.speed("combine of 10, 4 KiB", "ISA-L 2.32", spent, rows.length, None)
    if "avx2" in core.available_kernels():
        theirs = isal(rivals.isal_232, rows, vandermonde(3, 5), "ec_encode_data_avx2")
        spent = compare(ours_split(rivals, rows, 3, 5, "avx2"), theirs)
        yield Row.speed("avx2: split 3-of-5, 4 KiB", "ISA-L 2.32, its AVX2", spent, rows.length, 1.7)
    spent = compare(ours_split(rivals, rows, 3, 5, "portable"), gfshare_split(rivals, rows, 3, 5))
    yield Row.speed("portable: split 3-of-5, 4 KiB", "libgfshare", spent, rows.length, 6.0)
    spent = compare(ours_combine(rivals, rows, 3, "portable"), gfshare_combine(rivals, rows, 3))
    yield Row.speed("portable: combine of 3, 4 KiB", "libgfshare", spent, rows.length, None)

    rows = Rows(10, 5, 64 * MIB)
    for count, target in ((3, 1.3), (10, 1.0)):
        matrix = [lagrange(list(range(3, count + 3)), 0, 0x11D)]
        spent = compare(ours_combine(rivals, rows, count, best), isal(rivals.isal_232, rows, matrix), large=True)
        yield Row.speed(f"combine of {count}, 64 MiB", "ISA-L 2.32", spent, rows.length, target)
    spent = compare(ours_split(rivals, rows, 3, 5, best), isal(rivals.isal_232, rows, vandermonde(3, 5)), large=True)
    yield Row.speed("split 3-of-5, 64 MiB", "ISA-L 2.32", spent, rows.length, None)

    rows = Rows(1, 5, MIB)
    whole = rivals.take(rows.work(SPLIT, 1, 5), best)
    whole.input_count = 3
    whole.targets[:5] = range(1, 6)
    spent = measure([native(rivals, whole), native(rivals, rows.work(COPY, 1, 5))], rounds, 2_000_000)
    yield Row.cost("whole split 3-of-5, 1 MiB", "5 memcpys into warm buffers", spent, 1.0)


BARE = """
# cython: language_level=3, autotestdict=False
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

def one(bytes given):
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(given), len(given))

def five(bytes given):
    cdef char *start = PyBytes_AS_STRING(given)
    cdef Py_ssize_t length = len(given)
    return [PyBytes_FromStringAndSize(start, length) for _ in range(5)]
"""


def bare_calls() -> Any:
    """A module of two functions that only make bytes objects: the floor of any extension written in Cython."""
    import importlib.util

    folder = PLACE / "bare"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bare.pyx").write_text(BARE, encoding="utf-8")
    library = folder / f"bare{sysconfig.get_config_var('EXT_SUFFIX')}"
    run(sys.executable, "-m", "cython", "-3", folder / "bare.pyx")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    include = sysconfig.get_path("include")
    run(*compiler, "-O3", "-fPIC", "-shared", "-I", include, "-o", library, folder / "bare.c")
    spec = importlib.util.spec_from_file_location("bare", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_rows(quick: bool) -> Iterator[Row]:
    """From Python, randomness included."""
    rounds = 11 if quick else 101
    bare = bare_calls()
    secret = os.urandom(32)
    core.use_kernel()

    def floor_split() -> list[bytes]:
        os.urandom(32)
        five: list[bytes] = bare.five(secret)
        return five

    ends = [python(lambda: core.split(secret, 3, 5)), python(floor_split)]
    yield Row.cost("split 3-of-5, 32 B", "os.urandom(32) + 5 bytes objects", measure(ends, rounds, 2e6), 1.15)
    shares = core.split(secret, 3, 5)
    xs, ys = [2, 4, 5], [shares[1], shares[3], shares[4]]
    assert core.combine(xs, ys) == secret
    ends = [python(lambda: core.combine(xs, ys)), python(lambda: bare.one(secret))]
    yield Row.cost("combine of 3, 32 B", "a bare call, bytes in and out", measure(ends, rounds, 2e6), 1.4)

    many = np.frombuffer(os.urandom(32_000), np.uint8).reshape(1000, 32)
    out = np.empty((5, 1000, 32), np.uint8)
    batch = [secret] * 1000
    ends = [python(lambda: core.split_many(many, 3, 5, out=out)), python(lambda: core.split_many(batch, 3, 5))]
    spent = [statistics.median(each) / 1000 for each in measure(ends, rounds, 2e6)]
    for name, each in zip(("array, out=", "list of bytes"), spent, strict=True):
        yield Row(f"split_many 1000 x 32 B ({name})", each, "ns", "-", 0.0, each, "<= 150 ns", each <= 150)
    yield from pycryptodome_rows(3 if quick else 15)

    large = bytearray(os.urandom(MIB))
    room = np.zeros((5, MIB), np.uint8)

    def copies() -> None:
        for row in room:
            row[:] = source

    source = np.frombuffer(large, np.uint8)
    ends = [python(lambda: core.split(large, 3, 5, out=room)), python(copies)]
    yield Row.cost("split 3-of-5, 1 MiB, out=", "5 memcpys (numpy)", measure(ends, rounds, 2e6), 1.0)


def pycryptodome_rows(rounds: int) -> Iterator[Row]:
    """PyCryptodome shares 16 bytes at a time; 32 bytes are two sharings."""
    try:
        from Crypto.Protocol.SecretSharing import Shamir
    except ImportError:
        raise click.ClickException("PyCryptodome is missing: pip install pycryptodome") from None
    secret = os.urandom(32)
    halves = [secret[:16], secret[16:]]
    theirs = [Shamir.split(3, 5, half)[:3] for half in halves]
    ours = core.split(secret, 3, 5)[:3]
    ends = [python(lambda: core.split(secret, 3, 5)), python(lambda: [Shamir.split(3, 5, half) for half in halves])]
    spent = measure(ends, rounds, 1e6)
    yield Row.speed("split 3-of-5, 32 B", "PyCryptodome", spent, 32, 150)
    ends = [python(lambda: core.combine((1, 2, 3), ours)), python(lambda: [Shamir.combine(each) for each in theirs])]
    yield Row.speed("combine of 3, 32 B", "PyCryptodome", measure(ends, rounds, 1e6), 32, 15_000)


def show(found: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title="the Shamir core beside its rivals: medians of paired rounds")
    for column in ("what", "ours", "rival", "its", "unit", "ratio", "target", "met"):
        table.add_column(column, justify="left" if column in ("what", "rival") else "right")
    for row in found:
        met = "" if row.met is None else "yes" if row.met else "[red]NO[/red]"
        numbers = (f"{row.value:.4g}", row.peer, f"{row.peer_value:.4g}", row.unit, f"{row.ratio:.2f}")
        table.add_row(row.name, *numbers, row.target, met)
    Console(width=150).print(table)


@click.command()
@click.option("--quick", is_flag=True, help="Few rounds: to see that everything works.")
def main(quick: bool) -> None:
    """Measure the native core beside its rivals; writes build/bench/shamir.json."""
    rivals = Rivals()
    check_against_isal(rivals)
    found = [*native_rows(rivals, quick), *python_rows(quick)]
    show(found)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report = json.dumps([vars(row) for row in found], indent=1)
    (OUTPUT / "shamir.json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
