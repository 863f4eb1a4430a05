"""Owns the plot of docs/shamir.md: GB/s of a 3-of-5 split and a combine of 3 over the size of the secret, by kernel.

``python bench/plot_kernels.py`` measures and writes docs/shamir-kernels.svg; it needs the extra ``docs``. Randomness is
part of a split, and both write into buffers that are there already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("svg")
from matplotlib import pyplot as plt  # the backend is chosen first

from engine._fastshamir import available_kernels, combine, generator_name, split, use_kernel

TARGET = Path(__file__).parents[1] / "docs" / "shamir-kernels.svg"
SIZES = [1 << bits for bits in range(5, 27)]
ROUNDS = 15
BUDGET_NS = 2e6


def speed(call: Callable[[], object], size: int) -> float:
    """GB/s of the secret: the median over rounds of some milliseconds."""
    call()
    start = time.perf_counter_ns()
    call()
    repetitions = max(1, int(BUDGET_NS / (time.perf_counter_ns() - start)))
    spent = []
    for _ in range(ROUNDS if repetitions > 1 else 5):
        start = time.perf_counter_ns()
        for _ in range(repetitions):
            call()
        spent.append((time.perf_counter_ns() - start) / repetitions)
    return size / statistics.median(spent)


def main() -> None:
    """Measure all kernels and write the plot."""
    mpl.rcParams["svg.hashsalt"] = "keyquorum"  # the same figures give the same file
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    secrets = {size: np.random.default_rng(1).integers(0, 256, size, np.uint8) for size in SIZES}
    for kernel in available_kernels():
        use_kernel(kernel)
        splits, combines = [], []
        for size, secret in secrets.items():
            out, back = np.zeros((5, size), np.uint8), np.zeros(size, np.uint8)
            splits.append(speed(lambda secret=secret, out=out: split(secret, 3, 5, out=out), size))  # type: ignore[misc]
            rows = [out[1], out[3], out[4]]
            combines.append(speed(lambda rows=rows, back=back: combine([2, 4, 5], rows, out=back), size))  # type: ignore[misc]
            assert (back == secret).all()
        axes[0].plot(SIZES, splits, marker=".", label=f"{kernel} ({generator_name()})")
        axes[1].plot(SIZES, combines, marker=".", label=kernel)
    use_kernel()
    for axis, title in zip(axes, ("split 3-of-5, randomness included", "combine of 3"), strict=True):
        axis.set(title=title, xscale="log", yscale="log", xlabel="secret (bytes)")
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("GB/s of secret")
    figure.tight_layout()
    figure.savefig(TARGET, metadata={"Date": None})
    print(TARGET)


if __name__ == "__main__":
    main()
