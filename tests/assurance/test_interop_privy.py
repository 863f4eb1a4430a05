"""Owns the proof that privy's shamir-secret-sharing (npm) reads our Vault parts and the other way.

It needs node and npm, and fetches the package from npm's registry; parts of its making are in test_interop.py.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.sharing import generate_shares, reconstruct_key
from engine.sharing.formats import read_vault_part, write_vault_part

pytestmark = pytest.mark.long

PACKAGE = "shamir-secret-sharing@0.0.4"
PROGRAM = """
import { split, combine } from 'shamir-secret-sharing';
const hex = bytes => Buffer.from(bytes).toString('hex');
const raw = text => new Uint8Array(Buffer.from(text, 'hex'));
const [, , what, ...rest] = process.argv;
if (what === 'split') console.log((await split(raw(rest[0]), +rest[1], +rest[2])).map(hex).join('\\n'));
else console.log(hex(await combine(rest.map(raw))));
"""


@pytest.fixture(scope="module")
def privy(tmp_path_factory: pytest.TempPathFactory, native: Any) -> Path:
    """A folder with the package and the program that calls it."""
    native.needs("node", "nodejs")
    npm = native.needs("npm", "npm")
    folder = tmp_path_factory.mktemp("privy")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), PACKAGE]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"npm could not install {PACKAGE}: {done.stderr.strip()[-200:]}")
    (folder / "both.mjs").write_text(PROGRAM, encoding="utf-8")
    return folder


def run(folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        ["node", "both.mjs", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("threshold", "shares", "length"), [(2, 2, 1), (2, 3, 16), (3, 5, 32), (10, 16, 300), (5, 255, 7)]
)
def test_privys_parts_both_ways(privy: Path, threshold: int, shares: int, length: int) -> None:
    secret = random.Random(length).randbytes(length)
    theirs = [bytes.fromhex(part) for part in run(privy, "split", secret.hex(), str(shares), str(threshold))]
    assert reconstruct_key([read_vault_part(part) for part in theirs[-threshold:]], threshold=threshold) == secret
    ours = [write_vault_part(share).hex() for share in generate_shares(secret, threshold=threshold, shares=shares)]
    assert run(privy, "combine", *ours[-threshold:]) == [secret.hex()]
