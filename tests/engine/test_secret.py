"""Owns the proof that a secret buffer is locked, fenced, never dumped, wiped, and refused after its end.

What can't be seen from inside (a fault, a core dump, the memory at exit) is looked at in a process of its own.
"""

from __future__ import annotations

import copy
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine._fastshamir import combine, split
from engine.sharing import SecretBuffer, secret_memory, take, wipe

PAGE = os.sysconf("SC_PAGESIZE")
relaxed = settings(deadline=None)


def address_of(buffer: object) -> int:
    """Where the bytes lie."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # type: ignore[arg-type]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own; never raises for its exit code."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def mapping(address: int, pid: int | str = "self") -> tuple[list[str], list[dict[str, str]]]:
    """(the range before, its own and the one after, as lines of smaps; the fields of its own range)."""
    ranges: list[tuple[int, int, str, dict[str, str]]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line):
            ranges.append((int(found[1], 16), int(found[2], 16), found[3], {}))
        elif ranges:
            name, _, value = line.partition(":")
            ranges[-1][3][name] = value.strip()
    place = next(i for i, (begin, end, _, _) in enumerate(ranges) if begin <= address < end)
    around = ranges[place - 1 : place + 2]
    assert around[0][1] == around[1][0], "nothing is mapped right before"
    assert around[1][1] == around[2][0], "nothing is mapped right after"
    return [each[2] for each in around], [each[3] for each in around]


# A buffer like any other.


@relaxed
@given(st.binary(min_size=1, max_size=20_000))
def test_it_holds_bytes(data: bytes) -> None:
    with SecretBuffer(len(data)) as buffer:
        assert bytes(buffer) == bytes(len(data))
        with memoryview(buffer) as view:
            assert (view.format, view.readonly, view.c_contiguous, view.shape) == ("B", False, True, (len(data),))
            view[:] = data
        assert len(buffer) == len(data)
        assert buffer == data
        assert bytes(buffer) == data
        buffer.wipe()
        assert bytes(buffer) == bytes(len(data))
    with SecretBuffer.copy_of(data) as copied:
        assert copied == data


@relaxed
@given(st.binary(min_size=1, max_size=200), st.data())
def test_split_and_combine_take_and_give_it(secret: bytes, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, 5))
    with SecretBuffer.copy_of(secret) as source, SecretBuffer(len(secret)) as sink:
        ys = split(source, threshold, 5)
        with SecretBuffer.copy_of(ys[0]) as locked:
            combine(range(1, threshold + 1), [locked, *ys[1:threshold]], out=sink)
        assert sink == secret


def test_random_buffers_are_random() -> None:
    buffers = [SecretBuffer.random(16) for _ in range(100)]
    assert len({bytes(buffer) for buffer in buffers}) == 100
    assert len(SecretBuffer.random(20_001)) == 20_001


@relaxed
@given(st.binary(min_size=1, max_size=100), st.binary(max_size=100))
def test_comparison_is_by_contents(one: bytes, other: bytes) -> None:
    with SecretBuffer.copy_of(one) as buffer:
        assert (buffer == other) is (one == other)
        assert (other == buffer) is (one == other)
        assert buffer == bytearray(one)
        assert buffer == SecretBuffer.copy_of(one)
        assert buffer != "text"
        for place in range(len(one)):
            near = bytearray(one)
            near[place] ^= 1
            assert buffer != near


@relaxed
@given(st.binary(min_size=1, max_size=100), st.data())
def test_adding(one: bytes, data: st.DataObject) -> None:
    other = data.draw(st.binary(max_size=len(one)))
    with SecretBuffer.copy_of(one) as buffer:
        buffer.add(other)
        assert bytes(buffer) == bytes(a ^ b for a, b in zip(one, other.ljust(len(one), b"\0"), strict=True))


def test_taking_wipes_the_source() -> None:
    source = bytearray(b"a secret")
    assert take(source) == b"a secret"
    assert source == bytes(8)
    with pytest.raises(ValueError, match="the length is 0"):
        take(bytearray())


def test_it_shows_and_gives_away_nothing() -> None:
    buffer = SecretBuffer.copy_of(b"top secret")
    assert repr(buffer) == str(buffer) == "SecretBuffer(10 bytes)"
    for attempt in (copy.copy, copy.deepcopy, lambda it: it.__reduce_ex__(5), lambda it: it.__reduce__(), hash):
        with pytest.raises(TypeError) as caught:
            attempt(buffer)
        assert "top" not in str(caught.value)
    with pytest.raises(TypeError):
        type("Sub", (SecretBuffer,), {})
    assert not hasattr(buffer, "__dict__")


LENGTHS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: SecretBuffer(0), ValueError, r"the length is 0, but must be in 1\.\."),
    (lambda: SecretBuffer(-1), ValueError, r"the length is -1, but must be in 1\.\."),
    (lambda: SecretBuffer(1 << 64), ValueError, r"the length is 18446744073709551616, but must be in 1\.\."),
    (lambda: SecretBuffer.random(0), ValueError, r"the length is 0, but must be in 1\.\."),
    (lambda: SecretBuffer.copy_of(b""), ValueError, r"the length is 0, but must be in 1\.\."),
    (lambda: SecretBuffer("1"), TypeError, "the length must be an int, not str"),  # type: ignore[arg-type]
    (lambda: SecretBuffer(True), TypeError, "the length must be an int, not bool"),
    (lambda: SecretBuffer.copy_of("text"), TypeError, "must be a C-contiguous bytes-like object, not str"),  # type: ignore[arg-type]
    (lambda: SecretBuffer(2).add(b"abc"), ValueError, "3 bytes can't be added to 2"),
    (lambda: (lambda it: it.add(it))(SecretBuffer(2)), ValueError, "overlaps the secret buffer"),
]


@pytest.mark.parametrize(("call", "kind", "text"), LENGTHS)
def test_refusals(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


USES: list[Callable[[SecretBuffer], object]] = [
    memoryview,
    bytes,
    lambda buffer: buffer.wipe(),
    lambda buffer: buffer.add(b""),
    lambda buffer: buffer == b"x",
    lambda buffer: buffer.__enter__(),
    lambda buffer: SecretBuffer.copy_of(buffer),
    lambda buffer: split(buffer, 1, 1),
    lambda buffer: combine([1], [b"12345678"], out=buffer),
    lambda buffer: wipe(buffer),
]


@pytest.mark.parametrize("use", USES)
def test_every_use_after_the_end_is_refused(use: Callable[[SecretBuffer], object]) -> None:
    buffer = SecretBuffer(8)
    assert not buffer.closed
    with buffer:
        pass
    assert buffer.closed
    buffer.close()  # again: harmless
    with pytest.raises(ValueError, match="the secret buffer is closed"):
        use(buffer)
    assert repr(buffer) == "SecretBuffer(8 bytes, closed)"


# The memory.


def test_memory_is_zero_after_the_end_and_given_out_again() -> None:
    """The bytes are gone at once; the place is the next buffer's."""
    buffer = SecretBuffer.copy_of(b"\xa5" * 48)
    where = address_of(buffer)
    assert ctypes.string_at(where, 48) == b"\xa5" * 48
    buffer.close()
    assert ctypes.string_at(where, 48) == bytes(48)
    again = [SecretBuffer(48) for _ in range(2)]
    assert where in map(address_of, again)


def test_memory_is_zero_when_a_buffer_is_forgotten() -> None:
    buffer = SecretBuffer.copy_of(b"\x5a" * 100)
    where = address_of(buffer)
    del buffer
    assert ctypes.string_at(where, 100) == bytes(100)


def test_a_view_outlives_the_end_and_shows_zeros() -> None:
    """Its place is given to no one while the view is there."""
    buffer = SecretBuffer.copy_of(b"\x77" * 64)
    view = memoryview(buffer)
    where = address_of(view)
    buffer.close()
    assert bytes(view) == bytes(64)
    others = [SecretBuffer.copy_of(b"\x99" * 64) for _ in range(20)]
    assert where not in map(address_of, others)
    assert bytes(view) == bytes(64)
    view.release()
    assert where in [address_of(each) for each in [SecretBuffer(64) for _ in range(600)]]


@relaxed
@given(st.lists(st.tuples(st.integers(1, 9000), st.booleans()), max_size=60))
def test_buffers_never_share_a_byte(steps: list[tuple[int, bool]]) -> None:
    """Each keeps its own pattern, however they come and go; what was used is given back."""
    _, before = secret_memory()
    held: list[tuple[SecretBuffer, bytes]] = []
    for number, (length, forget) in enumerate(steps):
        if forget and held:
            buffer, pattern = held.pop(length % len(held))
            assert buffer == pattern
            buffer.close()
        else:
            pattern = bytes([number + 1]) * length
            buffer = SecretBuffer(length)
            assert buffer == bytes(length)
            memoryview(buffer)[:] = pattern
            held.append((buffer, pattern))
    for buffer, pattern in held:
        assert buffer == pattern
        assert address_of(buffer) % 64 == 0
    assert secret_memory()[1] - before == sum((len(pattern) + 63) // 64 * 64 for _, pattern in held)
    for buffer, _ in held:
        buffer.close()
    assert secret_memory()[1] == before


def test_threads_never_get_the_same_memory() -> None:
    wrong: list[int] = []

    def work(mark: int) -> None:
        for round_ in range(300):
            pattern = bytes([mark]) * (1 + (round_ * 37 + mark) % 700)
            with SecretBuffer.copy_of(pattern) as buffer:
                if buffer != pattern:
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("length", [32, 8192, 8193, 100_000])
def test_pages_are_locked_fenced_not_dumped_and_wiped_on_fork(length: int) -> None:
    """What the kernel says of them: VmFlags lo, dd and wf, all of it locked, and no access on either side."""
    buffer = SecretBuffer(length)
    access, fields = mapping(address_of(buffer))
    assert access == ["---p", "rw-p", "---p"]
    own = fields[1]
    assert {"lo", "dd", "wf"} <= set(own["VmFlags"].split())
    assert own["Locked"] == own["Size"] == own["Rss"]
    assert own["Swap"] == "0 kB"


def test_locked_memory_is_counted_and_given_back() -> None:
    """A large buffer's pages go with it; small ones share 32 KiB."""
    result = run("""
import re
from engine.sharing import SecretBuffer, secret_memory
def locked():
    return int(re.search(r"VmLck:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = locked()
small = [SecretBuffer(64) for _ in range(512)]
assert secret_memory() == (32768, 32768), secret_memory()
assert locked() - before == 32768
one_more = SecretBuffer(1)
assert locked() - before == 65536
large = SecretBuffer(50_000)
assert secret_memory()[0] == 65536 + 53248
assert locked() - before == 65536 + 53248
large.close()
assert locked() - before == 65536
""")
    assert result.returncode == 0, result.stderr


TOUCH = """
import ctypes, sys
from engine.sharing import SecretBuffer
length, offset = int(sys.argv[1]), int(sys.argv[2])
buffer = SecretBuffer(length)
where = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
ctypes.string_at(where, length)
print("inside", flush=True)
if len(sys.argv) > 3:
    ctypes.memset(where + offset, 1, 1)
else:
    ctypes.string_at(where + offset, 1)
print("outside", flush=True)
"""


@pytest.mark.parametrize("write", [(), ("write",)])
@pytest.mark.parametrize(
    ("length", "offset", "faults"),
    [
        (32, 31, False),
        (32, -1, True),  # the first piece of a region: right behind the page before
        (32, 32 * 1024, True),  # the page after the region
        (16_384, 16_383, False),
        (16_384, 16_384, True),  # a large one ends at its last byte
        (16_384, -PAGE, True),
    ],
)
def test_guard_pages_fault(length: int, offset: int, faults: bool, write: tuple[str, ...]) -> None:
    """Reading or writing beyond the pages ends the process by SIGSEGV, and not by luck."""
    result = run(TOUCH, length, offset, *write)
    assert result.returncode == (-signal.SIGSEGV if faults else 0), result.stderr
    assert result.stdout.split() == ["inside"] + ["outside"] * (not faults)


def test_a_forked_child_has_nothing_of_it() -> None:
    """A view made before shows zeros, the buffer itself is refused, and the child's own buffers are locked again."""
    result = run("""
import os, re
from engine.sharing import SecretBuffer, secret_memory
buffer = SecretBuffer.copy_of(b"\\xee" * 64)
view = memoryview(buffer)
child = os.fork()
if child == 0:
    code = 1
    try:
        assert bytes(view) == bytes(64), "the child sees it"
        try:
            memoryview(buffer)
        except ValueError as error:
            assert "forked from" in str(error)
        else:
            raise AssertionError("the child may use it")
        assert secret_memory() == (0, 0)
        own = SecretBuffer.copy_of(b"\\x11" * 64)
        assert secret_memory() == (32768, 64)
        assert re.search(r"VmLck:\\s+32 kB", open("/proc/self/status").read())
        view.release(); buffer.close(); del buffer
        assert own == b"\\x11" * 64 and secret_memory() == (32768, 64)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if secret_memory() == (0, 0) and len(SecretBuffer.random(9)) == 9 else 3)
        code = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert buffer == b"\\xee" * 64
""")
    assert result.returncode == 0, result.stderr


def test_forks_beside_busy_threads_do_not_hang() -> None:
    """The arena's lock is never left held in a child."""
    result = run("""
import os, threading, warnings
warnings.simplefilter("ignore")
from engine.sharing import SecretBuffer
ending = threading.Event()
def busy():
    while not ending.is_set():
        SecretBuffer(100).close()
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        os._exit(0 if SecretBuffer.random(8) != bytes(8) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
ending.set()
for thread in threads: thread.join()
""")
    assert result.returncode == 0, result.stderr


HOLD = """
import ctypes, os, sys
from engine.sharing import SecretBuffer
secret = SecretBuffer.random(32)
plain = bytearray(32)
with open("/dev/urandom", "rb", buffering=0) as source:
    source.readinto(plain)
for each in (secret, plain):
    print(ctypes.addressof(ctypes.c_char.from_buffer(each)), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(shutil.which("gcore") is None, reason="gcore (gdb) makes the core dump")
def test_it_is_in_no_core_dump(tmp_path: Path) -> None:
    """An ordinary buffer of the same process is."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        places = [int(process.stdout.readline()) for _ in range(2)]
        with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
            secret, plain = (os.pread(memory.fileno(), 32, place) for place in places)
        dumped = subprocess.run(
            ["gcore", "-o", str(tmp_path / "core"), str(process.pid)], capture_output=True, text=True, check=False
        )
        process.communicate(b"\n")
    core = (tmp_path / f"core.{process.pid}").read_bytes() if dumped.returncode == 0 else b""
    if not core:
        pytest.skip(f"gcore can't attach here: {dumped.stderr[-200:]}")
    assert plain in core
    assert secret not in core


TRACED = """
import ctypes, sys
from engine.sharing import SecretBuffer
ctypes.CDLL(None).ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
kept = [SecretBuffer.copy_of(bytes([0xA5]) * length) for length in (32, 20_000)]
for each in kept:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))  # a reference that nobody ever gives back
plain = bytearray(bytes([0xA5]) * 32)
print(*(ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (*kept, plain)), flush=True)
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(3)
"""
PTRACE_CONT, PTRACE_DETACH, PTRACE_SETOPTIONS = 7, 17, 0x4200
PTRACE_O_TRACEEXIT, PTRACE_EVENT_EXIT = 0x40, 6


def test_it_is_wiped_when_the_process_ends() -> None:
    """Buffers that nobody closed are zero at the moment of _exit, as a tracer sees it."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    process = subprocess.Popen([sys.executable, "-c", TRACED], stdout=subprocess.PIPE)
    pid = process.pid
    try:
        assert process.stdout is not None
        places = [int(word) for word in process.stdout.readline().split()]
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            pytest.skip("tracing a child is not allowed here")
        assert ptrace(PTRACE_SETOPTIONS, pid, None, PTRACE_O_TRACEEXIT) == 0
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            assert [os.pread(memory.fileno(), 32, place) for place in places] == [b"\xa5" * 32] * 3
            assert ptrace(PTRACE_CONT, pid, None, None) == 0
            _, status = os.waitpid(pid, 0)
            assert status >> 8 == signal.SIGTRAP | PTRACE_EVENT_EXIT << 8, f"stopped by {status:#x}, not at its exit"
            at_exit = [os.pread(memory.fileno(), 32, place) for place in places[:2]]
    finally:
        # A stopped process that is killed stays as it is until its tracer lets it go.
        ptrace(PTRACE_DETACH, pid, None, None)
        process.kill()
        process.communicate(timeout=20)
    assert at_exit == [bytes(32)] * 2


def test_without_the_right_to_lock_there_is_no_buffer() -> None:
    """It fails closed, says how to raise the limit, and leaves no mapping behind."""
    result = run("""
import os, resource, sys
from engine.sharing import SecretBuffer, generate_shares, reconstruct_key, secret_memory
resource.setrlimit(resource.RLIMIT_MEMLOCK, (40_000, 40_000))
if os.geteuid() == 0:
    os.setuid(65534)  # without CAP_IPC_LOCK
first = SecretBuffer(32)
def kept():
    # Guard pages, which these buffers alone map without a file, and how much is locked.
    guards = sum(line.split()[1:] == ["---p", "00000000", "00:00", "0"] for line in open("/proc/self/maps"))
    return guards, [line for line in open("/proc/self/status") if line.startswith("VmLck")]
before = kept()
assert before[0] > 0
for length in (8193, 20_000):
    try:
        SecretBuffer(length)
    except OSError as error:
        text = str(error)
    else:
        sys.exit("it was given memory that is not locked")
    assert f"no locked memory for {length} bytes" in text, text
    assert "mlock failed" in text and "may lock 40000 bytes" in text and "LimitMEMLOCK=" in text, text
assert secret_memory() == (32768, 64)
assert kept() == before
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
second = SecretBuffer(32)  # from the region that is locked already
assert reconstruct_key(generate_shares(b"needs none", threshold=2, shares=2)) == b"needs none"
""")
    assert result.returncode == 0, result.stderr


def test_the_arena_fits_the_smallest_usual_limit() -> None:
    """64 KiB, Linux's default before 5.16: room for 512 keys of 64 bytes and a second region."""
    result = run("""
import os, resource
from engine.sharing import SecretBuffer
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.geteuid() == 0:
    os.setuid(65534)
held = [SecretBuffer(64) for _ in range(1024)]
""")
    assert result.returncode == 0, result.stderr


def test_this_machine_gives_a_process_room() -> None:
    """The limit here is at least what the arena starts with."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert soft in (resource.RLIM_INFINITY, -1) or soft >= 32 * 1024
