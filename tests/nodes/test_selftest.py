"""The self tests pass on a good token, name what is wrong, and keep a node with a bad one off its port."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import utils
from pkcs11 import Attribute

from engine.client.config import create_identity
from engine.errors import InvalidSignature, InvalidTag, TokenError
from nodes import selftest
from nodes.config import load_node_config
from nodes.selftest import run_self_tests
from nodes.token import Lane


def flipped(value: bytes, position: int = -1) -> bytes:
    changed = bytearray(value)
    changed[position] ^= 1
    return bytes(changed)


def test_a_good_token_passes(lane: Lane) -> None:
    run_self_tests(lane)


@pytest.mark.parametrize(
    ("constant", "value", "test"),
    [
        ("SHAMIR_SECRET", flipped(selftest.SHAMIR_SECRET), "Shamir core"),
        ("SHAMIR_SHARES", {**selftest.SHAMIR_SHARES, 7: flipped(selftest.SHAMIR_SHARES[7])}, "Shamir core"),
        ("GCM_KEY", flipped(selftest.GCM_KEY), "AES-GCM in the token"),
        ("GCM_AAD", flipped(selftest.GCM_AAD), "AES-GCM in the token"),
        ("GCM_PLAINTEXT", flipped(selftest.GCM_PLAINTEXT), "AES-GCM in the token"),
        ("GCM_SEALED", flipped(selftest.GCM_SEALED), "AES-GCM in the token"),
        ("GCM_SEALED", flipped(selftest.GCM_SEALED, 0), "AES-GCM in the token"),
        ("ECDSA_SCALAR", flipped(selftest.ECDSA_SCALAR), "ECDSA in the token"),
        ("ECDSA_MESSAGE", b"samplf", "ECDSA in the token"),
        ("ECDSA_SIGNATURE", utils.encode_dss_signature(1, 1), "ECDSA in the token"),
    ],
)
def test_each_changed_answer_fails_the_test_of_its_name(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, constant: str, value: object, test: str
) -> None:
    monkeypatch.setattr(selftest, constant, value)
    with pytest.raises(TokenError, match=f"self test failed: {test}: "):
        run_self_tests(lane)


def accept(*_: object) -> None:
    """Play a token that finds every signature good."""


@pytest.mark.parametrize(
    ("method", "wrong", "test"),
    [
        ("check_kek", lambda *_: (_ for _ in ()).throw(TokenError("no KEK")), "KEK: no KEK"),
        ("verify", accept, "ECDSA in the token: a wrong signature was accepted"),
        ("sign", lambda *_: utils.encode_dss_signature(1, 1), "ECDSA in the token: the token's signature is wrong"),
        ("decrypt", lambda *_: selftest.GCM_PLAINTEXT, "AES-GCM in the token: a wrong tag was accepted"),
        ("encrypt", lambda *_: bytes(80), "AES-GCM in the token"),
    ],
)
def test_a_token_that_lies_is_caught(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, method: str, wrong: Callable[..., Any], test: str
) -> None:
    monkeypatch.setattr(Lane, method, wrong)
    with pytest.raises(TokenError, match=f"self test failed: {test}"):
        run_self_tests(lane)


@pytest.mark.parametrize("error", [InvalidTag("x"), InvalidSignature("x")])
def test_the_tests_leave_no_key_in_the_token(lane: Lane, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    before = len(list(lane._session.get_objects({Attribute.TOKEN: False})))
    monkeypatch.setattr(Lane, "verify", fail)
    with pytest.raises(TokenError):
        run_self_tests(lane)
    assert len(list(lane._session.get_objects({Attribute.TOKEN: False}))) == before


# --- a node whose token is bad never binds its port ---

SHIM = r"""
/* A PKCS#11 module that is SoftHSM, but whose C_Decrypt changes the first byte of what it gives back. */
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

typedef unsigned long rv_t;
typedef rv_t (*decrypt_t)(unsigned long, unsigned char *, unsigned long, unsigned char *, unsigned long *);
typedef struct { unsigned char version[2]; void *functions[68]; } list_t;

static list_t changed;
static decrypt_t real_decrypt;

static rv_t wrong_decrypt(unsigned long session, unsigned char *in, unsigned long in_size,
                          unsigned char *out, unsigned long *out_size)
{
    rv_t code = real_decrypt(session, in, in_size, out, out_size);
    if (code == 0 && out != NULL && *out_size > 0)
        out[0] ^= 1;
    return code;
}

static void *softhsm(void)
{
    static void *library;
    if (library == NULL)
        library = dlopen(SOFTHSM, RTLD_NOW | RTLD_LOCAL);
    return library;
}

rv_t C_GetFunctionList(list_t **list)
{
    list_t *real;
    rv_t code = ((rv_t (*)(list_t **))dlsym(softhsm(), "C_GetFunctionList"))(&real);
    if (code != 0)
        return code;
    memcpy(&changed, real, sizeof changed);
    real_decrypt = (decrypt_t)changed.functions[34];
    changed.functions[34] = (void *)wrong_decrypt;
    *list = &changed;
    return 0;
}

rv_t C_Initialize(void *arguments)
{
    return ((rv_t (*)(void *))dlsym(softhsm(), "C_Initialize"))(arguments);
}

rv_t C_Finalize(void *reserved)
{
    return ((rv_t (*)(void *))dlsym(softhsm(), "C_Finalize"))(reserved);
}
"""


def lying_module(folder: Path, softhsm: Path) -> Path:
    """Build the shim; the compiler is there, since the package was built with it."""
    source, module = folder / "shim.c", folder / "lying-softhsm.so"
    source.write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-O1", f'-DSOFTHSM="{softhsm}"', "-o", str(module), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return module


def refused_before_binding(cluster_folder: Any, node: str, code: int = 2) -> str:
    """Start a node whose port the test holds itself; its log. Had it tried to bind, that is what it would tell."""
    host, _, port = cluster_folder.world.cluster.nodes[node].endpoint.removeprefix("tcp://").partition(":")
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may not be over yet
        holder.bind((host, int(port)))
        holder.listen()
        process = cluster_folder.spawn(node)
        assert process.process.wait(30) == code
    assert "Traceback" not in process.log
    assert "can't bind" not in process.log
    assert '"serving"' not in process.log
    return str(process.log)


def test_the_positive_control_a_good_node_would_bind(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    host, _, port = cluster_folder.world.cluster.nodes["node1"].endpoint.removeprefix("tcp://").partition(":")
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may not be over yet
        holder.bind((host, int(port)))
        holder.listen()
        process = cluster_folder.spawn("node1")
        assert process.process.wait(30) == 2
    assert "can't bind" in process.log


def test_a_node_whose_token_lies_does_not_serve(cluster_folder: Any, tmp_path: Path) -> None:
    assert cluster_folder.init("node1").returncode == 0
    path = cluster_folder.config("node1")
    module = lying_module(tmp_path, load_node_config(path).token.module)
    path.write_text(path.read_text().replace("[token]\n", f'[token]\nmodule = "{module}"\n'))
    assert load_node_config(path).token.module == module
    assert "self test failed: KEK: the KEK's canary came back changed" in refused_before_binding(
        cluster_folder, "node1"
    )


def test_a_node_whose_token_was_never_made_does_not_serve(cluster_folder: Any) -> None:
    (cluster_folder.root / "pin.node1").write_text("0" * 40)
    (cluster_folder.root / "pin.node1").chmod(0o600)
    assert "0 tokens are called 'node1'" in refused_before_binding(cluster_folder, "node1")


def test_a_node_without_its_kek_does_not_serve(cluster_folder: Any, run_python: Callable[..., Any]) -> None:
    assert cluster_folder.init("node1").returncode == 0
    destroy = """
import sys
from pkcs11 import Attribute
from nodes.config import load_node_config
from nodes.token import KEK_LABEL, Token
config = load_node_config(sys.argv[1])
session = Token(config.token, config.data)._token.open(rw=True)
next(iter(session.get_objects({Attribute.LABEL: KEK_LABEL}))).destroy()
"""
    assert run_python(destroy, cluster_folder.config("node1")).returncode == 0
    assert "the token has 0 keys 'keyquorum-kek'" in refused_before_binding(cluster_folder, "node1")


def test_a_node_with_another_tokens_kek_does_not_serve(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    cluster_folder.start("node1").end()
    data, pin = cluster_folder.root / "node1" / "data", cluster_folder.root / "pin.node1"
    shutil.rmtree(data / "tokens")
    pin.unlink()
    assert cluster_folder.init("node1").returncode == 0
    told = refused_before_binding(cluster_folder, "node1")
    assert "the store does not belong to the token of 'node1'" in told


def test_a_node_with_a_wrong_pin_does_not_serve(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    (cluster_folder.root / "pin.node1").write_text("0" * 40)
    assert "login to the token 'node1' failed: PinIncorrect" in refused_before_binding(cluster_folder, "node1", 3)


def test_a_node_with_a_damaged_store_does_not_serve(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    node = cluster_folder.start("node1")
    cluster_folder.make_key("node1")
    node.end()
    store = cluster_folder.root / "node1" / "data" / "shares.db"
    content = bytearray(store.read_bytes())
    position = content.index(b"aes-256-gcm")
    content[position] ^= 1
    store.write_bytes(content)
    assert "is not authentic" in refused_before_binding(cluster_folder, "node1")


def test_a_node_that_the_manifest_does_not_name_does_not_serve(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    (cluster_folder.root / "node1" / "identity.toml").unlink()
    create_identity(cluster_folder.root / "node1" / "identity.toml", "node1", "node")
    process = cluster_folder.spawn("node1")
    assert process.process.wait(30) == 1
    assert "has no node 'node1' with these keys" in process.log


def test_a_clients_identity_runs_no_node(cluster_folder: Any) -> None:
    assert cluster_folder.init("node1").returncode == 0
    shutil.copy(cluster_folder.root / "alice" / "identity.toml", cluster_folder.root / "node1" / "identity.toml")
    process = cluster_folder.spawn("node1")
    assert process.process.wait(30) == 1
    assert "the identity of a client, not of a node" in process.log
