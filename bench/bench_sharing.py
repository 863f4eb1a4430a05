"""Owns the figures of split and combine by size, (t, n) and kernel; it knows nothing of nodes and tokens.

``make bench PYTEST_ARGS="-k bench_sharing --benchmark-save=before"`` keeps a run on this machine; the same with
``--benchmark-compare --benchmark-compare-fail=median:20%`` holds a later one against the newest that was kept. Results
are checked; the kernel is saved with each. Times are of this machine alone; across machines (``make bench-compare``)
only their ratios to the floor measured in the same run say something.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine._fastshamir import available_kernels, combine, combine_many, split, split_many, use_kernel

NAMES = {32: "32B", 4096: "4KiB", 1 << 20: "1MiB"}
SIZES = [pytest.param(size, id=name) for size, name in NAMES.items()]
MANY = 1000
"""Keys of 32 bytes in one call."""
SHARINGS = [pytest.param((2, 3), id="2of3"), pytest.param((3, 5), id="3of5"), pytest.param((10, 16), id="10of16")]


@pytest.fixture(params=available_kernels())
def kernel(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[str]:
    """Each kernel of this machine, written into the saved results."""
    name: str = use_kernel(request.param)
    benchmark.extra_info["kernel"] = name
    yield name
    use_kernel()


@pytest.mark.parametrize("count", [pytest.param(n, id=f"x{n}") for n in (1, 2, 9)])
@pytest.mark.parametrize("size", SIZES)
def test_floor_random(benchmark: BenchmarkFixture, size: int, count: int) -> None:
    """The floor of a split: the random bytes of its coefficients, from the system."""
    assert len(benchmark(os.urandom, size * count)) == size * count


@pytest.mark.parametrize("size", SIZES)
def test_floor_copy(benchmark: BenchmarkFixture, size: int) -> None:
    """The floor of a combine: one fresh copy of the secret."""
    data = bytearray(os.urandom(size))
    assert benchmark(bytes, data) == data


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernel")
def test_split(benchmark: BenchmarkFixture, size: int, sharing: tuple[int, int]) -> None:
    """Split into fresh ``bytes``, the random coefficients included."""
    threshold, shares = sharing
    secret = os.urandom(size)
    benchmark.group = f"split {threshold}-of-{shares} {size} B"
    benchmark.extra_info["floor"] = [f"bench_sharing.py::test_floor_random[{NAMES[size]}-x{threshold - 1}]"]
    ys = benchmark(split, secret, threshold, shares)
    assert [len(y) for y in ys] == [size] * shares
    assert combine(range(shares - threshold + 1, shares + 1), ys[shares - threshold :]) == secret


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernel")
def test_split_into(benchmark: BenchmarkFixture, size: int, sharing: tuple[int, int]) -> None:
    """The same into a buffer that is there already: no allocation, and no fresh pages."""
    threshold, shares = sharing
    secret, out = os.urandom(size), bytearray(shares * size)
    benchmark.group = f"split {threshold}-of-{shares} {size} B"
    benchmark.extra_info["floor"] = [f"bench_sharing.py::test_floor_random[{NAMES[size]}-x{threshold - 1}]"]
    assert benchmark(split, secret, threshold, shares, out=out) is None
    ys = [memoryview(out)[j * size : (j + 1) * size] for j in range(shares - threshold, shares)]
    assert combine(range(shares - threshold + 1, shares + 1), ys) == secret


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("into", ["bytes", "out"])
@pytest.mark.usefixtures("kernel")
def test_split_many(benchmark: BenchmarkFixture, into: str, sharing: tuple[int, int]) -> None:
    """A thousand keys in one call; its time is also told for each key."""
    threshold, shares = sharing
    secrets, out = [os.urandom(32) for _ in range(MANY)], bytearray(shares * MANY * 32)
    benchmark.group = f"split_many {threshold}-of-{shares} {MANY} x 32 B"
    benchmark.extra_info["floor"] = ["bench_sharing.py::test_floor_random[32B-x1]"]
    benchmark.extra_info["operations"] = MANY
    ys = benchmark(split_many, secrets, threshold, shares, out=out if into == "out" else None)
    rows = ys or [bytes(out[j * MANY * 32 : (j + 1) * MANY * 32]) for j in range(shares)]
    assert combine_many(range(1, threshold + 1), rows[:threshold], MANY) == secrets


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("into", ["bytes", "out"])
@pytest.mark.usefixtures("kernel")
def test_combine_many(benchmark: BenchmarkFixture, into: str, sharing: tuple[int, int]) -> None:
    """The way back."""
    threshold, shares = sharing
    secrets, out = [os.urandom(32) for _ in range(MANY)], bytearray(MANY * 32)
    xs = list(range(shares - threshold + 1, shares + 1))
    ys = split_many(secrets, threshold, shares)[-threshold:]
    benchmark.group = f"combine_many {threshold} {MANY} x 32 B"
    benchmark.extra_info["floor"] = ["bench_sharing.py::test_floor_copy[32B]"]
    benchmark.extra_info["operations"] = MANY
    found = benchmark(combine_many, xs, ys, MANY, out=out if into == "out" else None)
    assert (found or [bytes(out[i * 32 : (i + 1) * 32]) for i in range(MANY)]) == secrets


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("into", ["bytes", "out"])
@pytest.mark.usefixtures("kernel")
def test_combine(benchmark: BenchmarkFixture, size: int, sharing: tuple[int, int], into: str) -> None:
    """Combine t shares, into fresh ``bytes`` or into a buffer that is there already."""
    threshold, shares = sharing
    secret = os.urandom(size)
    # The last t shares: the first three have the scalars 1, 1, 1 at 0, which no other three of the same key have.
    xs = list(range(shares - threshold + 1, shares + 1))
    ys = split(secret, threshold, shares)[-threshold:]
    benchmark.group = f"combine {threshold} {size} B"
    benchmark.extra_info["floor"] = [f"bench_sharing.py::test_floor_copy[{NAMES[size]}]"]
    if into == "out":
        out = bytearray(size)
        assert benchmark(combine, xs, ys, out=out) is None
        assert out == secret
    else:
        assert benchmark(combine, xs, ys) == secret
