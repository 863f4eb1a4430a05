"""Owns the proof that the kernels of CPUs that this machine has not are right: cross-compiled, under an emulator."""

from __future__ import annotations

from typing import Any

import pytest

from engine._fastshamir import available_kernels

pytestmark = pytest.mark.long


def test_neon_equals_the_slow_oracle(native: Any) -> None:
    """And portable on that CPU, and whole splits with ChaCha20."""
    compiler = native.needs("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    emulator = native.needs("qemu-aarch64", "qemu-user")
    program = native.build_for(compiler, "oracle", ["-static"])
    assert native.command(emulator, program, "neon", "portable").stdout.split() == ["neon", "portable"]


def test_the_same_program_passes_here(native: Any) -> None:
    kernels = available_kernels()
    assert native.command(native.build("oracle"), *kernels).stdout.split() == list(kernels)


@pytest.mark.usefixtures("x86")
def test_the_program_finds_a_wrong_kernel(native: Any) -> None:
    """One bit of the mask for the low halves of bytes is gone."""
    wrong = ("gf256_avx2.c", "_mm256_set1_epi8(15)", "_mm256_set1_epi8(7)")
    if "avx2" not in available_kernels():
        pytest.skip("this machine has no avx2")
    found = native.command(native.build("oracle", patch=wrong), "avx2", status=1)
    assert "avx2: a wrong product" in found.stderr
