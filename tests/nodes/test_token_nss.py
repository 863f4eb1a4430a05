"""Another PKCS#11 module than SoftHSM: NSS's softokn, in a process of its own, for what it offers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engine.keys import ALGORITHMS
from pkcs11_shim import NSS_LABEL, nss_token

SCRIPT = """
import json, os, sys
from pathlib import Path
from engine.errors import EngineError, InvalidTag, NeedGrant
from engine.keys import ALGORITHMS, RequestType, generate_material
from nodes.config import PinSource, TokenConfig
from nodes.selftest import run_self_tests
from nodes.token import Token

config = TokenConfig(Path(sys.argv[1]), sys.argv[2], PinSource("file", sys.argv[3] + "/pin"))
data = Path(sys.argv[3]) / "data"
data.mkdir()
token = Token(config, data)
told = {"algorithms": token.algorithms, "missing": dict(token.missing), "description": token.description}
lane = token.lane()
sealed = lane.seal(b"share", b"context")
assert lane.unseal(sealed, b"context") == b"share"
for wrong in (sealed[:-1] + bytes([sealed[-1] ^ 1]), bytes(len(sealed))):
    try:
        lane.unseal(wrong, b"context")
        raise SystemExit("a changed blob was opened")
    except InvalidTag:
        pass
with lane.unseal_secret(sealed, b"context") as secret:
    assert secret == b"share"
lane.check_kek()
for name in token.algorithms:
    algo = ALGORITHMS[name]
    key = lane.load(algo, generate_material(algo))
    data_ = os.urandom(32) if algo.hash_name != "sha384" else os.urandom(48)
    for _ in range(3):
        if RequestType.ENCRYPT in algo.operations:
            ciphertext = lane.encrypt(key, data_, b"")
            assert lane.decrypt(key, ciphertext, b"") == data_
            try:
                lane.decrypt(key, ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]), b"")
                raise SystemExit("a changed ciphertext was opened")
            except InvalidTag:
                pass
        elif RequestType.MAC in algo.operations:
            lane.verify_mac(key, data_, lane.mac(key, data_))
        else:
            lane.verify(key, data_, lane.sign(key, data_))
    key.destroy()
key = lane.load(ALGORITHMS["aes-256-gcm"], os.urandom(32))
token.renew()
assert lane.unseal(sealed, b"context") == b"share"
try:
    lane.encrypt(key, b"x", b"")
    raise SystemExit("a key outlived the renewal")
except NeedGrant:
    pass
run_self_tests(lane)
print(json.dumps(told))
"""


def test_softokn_serves_what_it_offers(tmp_path: Path) -> None:
    with nss_token(tmp_path / "nss", tmp_path / "pin") as shim:
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(shim.library), NSS_LABEL, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert "NSS" in told["description"]
    assert {*told["algorithms"], *told["missing"]} == set(ALGORITHMS)
    offered = {"aes-128-gcm", "aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256", "rsa-2048-pss-sha256"}
    assert offered <= set(told["algorithms"])
    assert all(lacking.startswith("CKM_") for lacking in told["missing"].values())
