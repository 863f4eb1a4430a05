"""Owns the figures of split and combine by size, (t, n) and kernel; it knows nothing of nodes and tokens.

Run with ``pytest bench/bench_sharing.py --benchmark-enable``. Results are checked; the kernel is saved with each.
Times are of this machine alone: compare them to the floor measured in the same run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine._fastshamir import available_kernels, combine, split, use_kernel

SIZES = [pytest.param(32, id="32B"), pytest.param(4096, id="4KiB"), pytest.param(1 << 20, id="1MiB")]
SHARINGS = [pytest.param((2, 3), id="2of3"), pytest.param((3, 5), id="3of5"), pytest.param((10, 16), id="10of16")]


@pytest.fixture(params=available_kernels())
def kernel(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[str]:
    """Each kernel of this machine, written into the saved results."""
    name: str = use_kernel(request.param)
    benchmark.extra_info["kernel"] = name
    yield name
    use_kernel()


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernel")
def test_split(benchmark: BenchmarkFixture, size: int, sharing: tuple[int, int]) -> None:
    """Split into fresh ``bytes``, the random coefficients included."""
    threshold, shares = sharing
    secret = os.urandom(size)
    benchmark.group = f"split {threshold}-of-{shares} {size} B"
    ys = benchmark(split, secret, threshold, shares)
    assert [len(y) for y in ys] == [size] * shares
    assert combine(range(shares - threshold + 1, shares + 1), ys[shares - threshold :]) == secret


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
    if into == "out":
        out = bytearray(size)
        assert benchmark(combine, xs, ys, out=out) is None
        assert out == secret
    else:
        assert benchmark(combine, xs, ys) == secret


@pytest.mark.parametrize("size", SIZES)
def test_floor_randomness(benchmark: BenchmarkFixture, size: int) -> None:
    """The floor of a 3-of-5 split: the two random rows and nothing else."""
    benchmark.group = f"split 3-of-5 {size} B"
    assert len(benchmark(os.urandom, 2 * size)) == 2 * size


@pytest.mark.parametrize("size", SIZES)
def test_floor_copy(benchmark: BenchmarkFixture, size: int) -> None:
    """The floor of a combine: one copy of the secret."""
    secret = bytearray(os.urandom(size))
    benchmark.group = f"combine 3 {size} B"
    assert benchmark(bytes, secret) == secret
