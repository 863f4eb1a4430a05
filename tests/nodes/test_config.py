"""The configuration: every mistake is told with the file, the key and the limit, and the PIN never stands in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from engine.client.config import create_identity
from engine.client.httpconfig import HttpConfig
from engine.errors import ConfigError
from nodes.cache import CacheLimits
from nodes.config import MODULE_PATHS, PinSource, load_node_config, parse_uri
from nodes.limits import Limits

GOOD: dict[str, Any] = {
    "version": 1,
    "identity": "identity.toml",
    "manifest": "../cluster.manifest",
    "manifest_pin": "00" * 32,
    "data": "data",
    "token": {"label": "node1", "pin": "file:../pin"},
}


def written(folder: Path, **changes: Any) -> Path:
    """A configuration with keys changed; None takes one away."""
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = folder / "node.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def test_a_good_file_is_read_and_its_paths_are_its_folders(tmp_path: Path) -> None:
    config = load_node_config(written(tmp_path))
    assert config.path == tmp_path / "node.toml"
    assert config.identity == tmp_path / "identity.toml"
    assert config.manifest == tmp_path.parent / "cluster.manifest"
    assert config.data == tmp_path / "data"
    assert (config.workers, config.acknowledge) == (2, "up")
    assert config.key_cache == CacheLimits(300.0, 1024, 1_000_000, 4 * 1024 * 1024)
    assert config.share_cache == CacheLimits(60.0, 1024, 10_000, 512 * 1024)
    assert config.signature_cache == CacheLimits(300.0, 4096)
    assert config.limits == Limits() == Limits(200.0, 400.0, 800.0, 10.0)
    assert config.token.pin == PinSource("file", str(tmp_path.parent / "pin"))
    assert config.token.is_softhsm
    assert str(config.token.module) in MODULE_PATHS


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vesrion": 1}, "unknown field `vesrion`"),
        ({"version": None}, "version"),
        ({"version": 2}, "version"),
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"identity": None}, "identity"),
        ({"identity": 7}, "identity"),
        ({"manifest": None}, "manifest"),
        ({"manifest_pin": None}, "manifest_pin"),
        ({"data": None}, "data"),
        ({"token": None}, "token"),
        ({"token": "node1"}, "token"),
        ({"token": {"label": "n", "pin": "file:p", "pni": "x"}}, "unknown field `pni`"),
        ({"token": {"label": "n"}}, "token.pin is missing"),
        ({"token": {"pin": "file:p"}}, "token.label is missing"),
        ({"token": {"label": "n" * 33, "pin": "file:p"}}, "label"),
        ({"token": {"label": "\u00fc" * 17, "pin": "file:p"}}, "label"),
        ({"token": {"label": "n", "pin": "file:p", "module": "/nowhere/x.so"}}, "/nowhere/x.so is not there"),
        ({"token": {"label": "n", "pin": "1234:"}}, "token.pin must be file:PATH, env:NAME or credential:NAME"),
        ({"token": {"label": "n", "pin": "env:1BAD"}}, "file:PATH, env:NAME or credential:NAME"),
        ({"token": {"label": "n", "pin": "env:"}}, "file:PATH, env:NAME or credential:NAME"),
        ({"token": {"label": "n", "pin": "file:"}}, "file:PATH, env:NAME or credential:NAME"),
        ({"workers": 0}, "workers"),
        ({"workers": 65}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"cache": {"ttl_s": 0}}, "ttl_s"),
        ({"cache": {"ttl_s": 86_401}}, "<= 86400.0 .*ttl_s`, where it says 86401"),
        ({"cache": {"max_keys": 0}}, "max_keys"),
        ({"cache": {"max_uses": 0}}, "`int` >= 1 .*max_uses"),
        ({"cache": {"max_bytes": 16_383}}, "`int` >= 16384 .*max_bytes`, where it says 16383"),
        ({"cache": {"share_ttl_s": 0}}, "share_ttl_s"),
        ({"cache": {"max_shares": -1}}, "max_shares"),
        ({"cache": {"share_max_uses": 0}}, "share_max_uses"),
        ({"cache": {"share_max_bytes": 2**30 + 1}}, "share_max_bytes"),
        ({"cache": {"signature_ttl_s": "5"}}, "signature_ttl_s"),
        ({"cache": {"max_signatures": 1_000_001}}, "`int` <= 1000000 .*max_signatures"),
        ({"cache": {"size": 1}}, "unknown field `size`"),
        ({"create": {"acknowledge": "none"}}, "acknowledge"),
        ({"limits": {"client_per_s": 0}}, "client_per_s"),
        ({"limits": {"combiner_per_s": -1.0}}, "combiner_per_s"),
        ({"limits": {"total_per_s": 1e7}}, "total_per_s"),
        ({"limits": {"burst_s": 0}}, "burst_s"),
        ({"limits": {"generate_part": 0}}, "generate_part"),
        ({"limits": {"changes_per_s": 0}}, "changes_per_s"),
        ({"limits": {"generate_part": 1.5}}, "generate_part"),
        ({"limits": {"requests_per_s": 0}}, "requests_per_s"),
        ({"limits": {"requests": 0}}, "requests"),
        ({"limits": {"connections": -1}}, "connections"),
        ({"limits": {"connections": 1}}, "connections = 1; at least 64, or 0"),
        ({"limits": {"clients_per_s": 1}}, "unknown field `clients_per_s`"),
        ({"metrics": {"bind": "9464"}}, "metrics.bind '9464' must be an IP address and a port"),
        ({"metrics": {"bind": "localhost:9464"}}, "must be an IP address and a port"),
        ({"metrics": {"bind": "127.0.0.1:0"}}, "must be an IP address and a port"),
        ({"metrics": {"bind": "127.0.0.1:65536"}}, "must be an IP address and a port"),
        ({"metrics": {"bind": "127.0.0.1:+80"}}, "must be an IP address and a port"),
        ({"metrics": {"bind": "::1:9464"}}, "must be an IP address and a port"),
        ({"metrics": {"bind": "[127.0.0.1]:9464"}}, "must be an IP address and a port"),
        ({"metrics": {"bind": "0.0.0.0:9464"}}, "is no loopback address.*metrics.token are missing"),
        ({"metrics": {"bind": "[::]:9464"}}, "is no loopback address"),
        ({"metrics": {"bind": "192.0.2.1:9464", "token": "env:T"}}, "is no loopback address"),
        ({"metrics": {"bind": "127.0.0.1:9464", "path": "/"}}, "unknown field `path`"),
        ({"trace": {"file": 1}}, "file"),
        ({"trace": {"endpoint": "x"}}, "unknown field `endpoint`"),
    ],
)
def test_each_mistake_is_told_with_its_place(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError, match=match) as caught:
        load_node_config(path)
    if "nowhere" not in match:
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("told", "host", "port"),
    [
        ({"bind": "127.0.0.1:9464"}, "127.0.0.1", 9464),
        ({"bind": "127.8.8.8:1"}, "127.8.8.8", 1),
        ({"bind": "[::1]:65535"}, "::1", 65535),
    ],
)
def test_metrics_are_served_where_the_file_says(tmp_path: Path, told: dict[str, Any], host: str, port: int) -> None:
    config = load_node_config(written(tmp_path, metrics=told)).metrics
    assert config == HttpConfig(host, port)
    assert str(config) == told["bind"]


def test_metrics_and_traces_are_off_unless_the_file_says_so(tmp_path: Path) -> None:
    config = load_node_config(written(tmp_path))
    assert (config.metrics, config.trace_file) == (None, None)
    told = load_node_config(written(tmp_path, metrics={"bind": ""}, trace={"file": "trace.jsonl"}))
    assert (told.metrics, told.trace_file) == (None, tmp_path / "trace.jsonl")


@pytest.mark.parametrize(
    "token",
    [
        {"label": "n", "pin": 47110815},
        {"label": 47110815, "pin": "file:p"},
        {"label": "n", "pin": "47110815:"},
        {"label": "n", "pin": "file:47110815\0"},
        {"uri": "pkcs11:token=t?47110815"},
        {"uri": "pkcs11:47110815"},
        {"uri": "pkcs11:47110815="},
    ],
)
def test_a_pin_in_the_wrong_place_is_not_shown(tmp_path: Path, token: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_node_config(written(tmp_path, token=token))
    assert "47110815" not in str(caught.value)


@pytest.mark.parametrize("key", ["identity", "manifest", "data"])
def test_a_path_that_is_too_long_is_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="a path in it is too long"):
        load_node_config(written(tmp_path, **{key: "a" * 300}))


def test_a_module_with_a_name_that_is_too_long_is_told_in_a_few_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there") as caught:
        load_node_config(written(tmp_path, token={"label": "n", "pin": "file:p", "module": "/x" + "a" * 5_000}))
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("key", ["identity", "manifest", "data"])
def test_a_path_that_is_none_is_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="a path in it is none"):
        load_node_config(written(tmp_path, **{key: "a\0b"}))


@pytest.mark.parametrize(
    "content",
    [b"a = " + b"[" * 3_000, b"a = " + b"{a=" * 3_000, b"a = " + b"9" * 5_000, b"[" + b"a." * 3_000 + b"a]\n" * 2],
)
def test_a_file_made_to_break_the_parser_is_no_toml_in_a_few_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_node_config(path)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("content", [b"version = ", b"\xff\xfe", b"[token\n", b"version = 1\nversion = 1\n"])
def test_a_file_that_is_no_toml_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no valid TOML"):
        load_node_config(path)


def test_a_file_that_is_not_there_or_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_node_config(tmp_path / "nothing.toml")
    (tmp_path / "long.toml").write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(ConfigError, match="longer than"):
        load_node_config(tmp_path / "long.toml")


# --- the PIN's sources ---


def a_pin(folder: Path, content: bytes, mode: int = 0o600) -> PinSource:
    path = folder / "pin"
    path.write_bytes(content)
    path.chmod(mode)
    return PinSource("file", str(path))


@pytest.mark.parametrize("content", [b"abcd", b"abcd\n", b"  abcd \r\n"])
def test_a_pin_comes_from_a_private_file(tmp_path: Path, content: bytes) -> None:
    assert a_pin(tmp_path, content).read() == "abcd"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_pin_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"mode {mode:04o} lets others at it") as caught:
        a_pin(tmp_path, b"secret-pin", mode).read()
    assert "secret-pin" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"s" * 256, b"\xff\xfesecret", "\u00fc".encode() * 128])
def test_a_pin_file_without_a_usable_pin_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"no PIN of 1\.\.255 bytes there") as caught:
        a_pin(tmp_path, content).read()
    assert "secret" not in str(caught.value)
    assert "sss" not in str(caught.value)


def test_a_pin_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        PinSource("file", str(tmp_path / "pin")).read()


def test_a_pin_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, token={"label": "n", "pin": "env:KQ_TEST_PIN"})
    source = load_node_config(path).token.pin
    assert source == PinSource("env", "KQ_TEST_PIN")
    assert str(source) == "env:KQ_TEST_PIN"
    monkeypatch.setenv("KQ_TEST_PIN", "abcd")
    assert source.read() == "abcd"
    monkeypatch.delenv("KQ_TEST_PIN")
    with pytest.raises(ConfigError, match="env:KQ_TEST_PIN: no PIN"):
        source.read()
    monkeypatch.setitem(os.environ, "KQ_TEST_PIN", "\udcff")
    with pytest.raises(ConfigError, match="env:KQ_TEST_PIN: no PIN"):
        source.read()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("file:pin", "pin"),
        ("file:./pin", "pin"),
        ("pin", "pin"),
        ("file:a b", "a b"),
        ("file:100%25", "100%25"),  # escapes belong to URIs
    ],
)
def test_a_pin_files_path_is_relative_to_the_configuration(tmp_path: Path, text: str, place: str) -> None:
    source = load_node_config(written(tmp_path, token={"label": "n", "pin": text})).token.pin
    assert source == PinSource("file", str(tmp_path / place))


@pytest.mark.parametrize("text", ["file:/etc/kq/pin", "file:///etc/kq/pin", "/etc/kq/pin"])
def test_a_pin_files_path_may_be_absolute(tmp_path: Path, text: str) -> None:
    source = load_node_config(written(tmp_path, token={"label": "n", "pin": text})).token.pin
    assert source == PinSource("file", "/etc/kq/pin")


# --- RFC 7512 ---


def test_a_uri_names_token_module_and_pin_source(tmp_path: Path) -> None:
    module = next(path for path in MODULE_PATHS if Path(path).is_file())
    uri = f"pkcs11:token=My%20token?pin-source=file:/etc/kq/pin&module-path={module}"
    config = load_node_config(written(tmp_path, token={"uri": uri}))
    assert config.token.label == "My token"
    assert config.token.pin == PinSource("file", "/etc/kq/pin")
    assert str(config.token.module) == module
    assert parse_uri("pkcs11:token=t?pin-source=%2Fpin") == {"label": "t", "pin": "/pin"}


def test_the_owner_of_a_shared_token_is_found_from_the_files_folder(tmp_path: Path) -> None:
    token = {"label": "node1", "pin": "file:../pin", "shared_with": "../node1/data"}
    config = load_node_config(written(tmp_path, token=token))
    assert config.token.shared_with == tmp_path.parent / "node1" / "data"
    assert load_node_config(written(tmp_path)).token.shared_with is None
    with pytest.raises(ConfigError, match=r"token\.shared_with names this node's own data folder"):
        load_node_config(written(tmp_path, token=token | {"shared_with": "./data/"}))


def test_a_uris_escapes_are_resolved_once(tmp_path: Path) -> None:
    uri = "pkcs11:token=t?pin-source=file:/etc/a%2520b"
    config = load_node_config(written(tmp_path, token={"uri": uri}))
    assert config.token.pin == PinSource("file", "/etc/a%20b")


@pytest.mark.parametrize(
    "uri",
    ["pkcs11:token=t?pin-value=1234", "pkcs11:token=t;pin-value=1234", "pkcs11:token=t?pin-source=p&pin-value=1234"],
)
def test_a_pin_in_the_uri_is_refused_and_not_shown(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="pin-value is refused; use pin-source") as caught:
        load_node_config(written(tmp_path, token={"uri": uri}))
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("token=t?pin-source=p", "must begin with pkcs11:"),
        ("pkcs12:token=t", "must begin with pkcs11:"),
        ("pkcs11:slot-id=3?pin-source=p", "'slot-id' is not understood"),
        ("pkcs11:token?pin-source=p", "a part that is no attribute is not understood"),
        ("pkcs11:?pin-source=p", "token.label is missing"),
        ("pkcs11:token=t", "token.pin is missing"),
        ("pkcs11:token=a;token=b?pin-source=p", "token.uri: 'token' is told twice"),
        ("pkcs11:token=t?pin-source=p&pin-source=q", "token.uri: 'pin-source' is told twice"),
        (f"pkcs11:token={'n' * 33}?pin-source=p", "label"),
    ],
)
def test_a_uri_that_can_not_be_understood_is_refused(tmp_path: Path, uri: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_node_config(written(tmp_path, token={"uri": uri}))


@pytest.mark.parametrize("key", ["label", "pin", "module"])
def test_what_is_told_twice_is_refused(tmp_path: Path, key: str) -> None:
    uri = f"pkcs11:token=t?pin-source=p&module-path={MODULE_PATHS[0]}"
    with pytest.raises(ConfigError, match=f"token.{key} is told twice"):
        load_node_config(written(tmp_path, token={"uri": uri, key: "x"}))


# --- the command ---


def checked(cluster_folder: Any, code: int) -> str:
    ended = cluster_folder.command("--config", str(cluster_folder.config("node1")), "--check-config")
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return str(ended.stdout + ended.stderr)


@pytest.fixture
def with_pin(cluster_folder: Any) -> Any:
    pin = cluster_folder.root / "pin.node1"
    pin.write_text("some-secret-pin")
    pin.chmod(0o600)
    return cluster_folder


def test_check_config_says_who_and_where_and_makes_nothing(with_pin: Any) -> None:
    told = checked(with_pin, 0)
    assert "good; node 'node1' of cluster 'test', serial 1" in told
    assert "some-secret-pin" not in told
    assert not (with_pin.root / "node1" / "data").exists()


def test_check_config_refuses_what_the_node_would(with_pin: Any) -> None:
    config = with_pin.config("node1")
    good = config.read_text()
    config.write_text(good + "\n[extra]\n")
    assert "unknown field `extra`" in checked(with_pin, 1)
    config.write_text(good.replace(with_pin.pin, "00" * 32))
    assert "pinned is" in checked(with_pin, 1)
    config.write_text(good.replace(with_pin.pin, "00"))
    assert "must be 64 hex digits" in checked(with_pin, 1)
    config.write_text(good)
    identity = with_pin.root / "node1" / "identity.toml"
    identity.chmod(0o644)
    assert "lets others at it" in checked(with_pin, 1)
    identity.chmod(0o600)
    pin = with_pin.root / "pin.node1"
    pin.chmod(0o644)
    assert "lets others at it" in checked(with_pin, 1)
    pin.unlink()
    assert "No such file" in checked(with_pin, 1)


@pytest.mark.parametrize(("whose", "match"), [("alice", "the identity of a client"), ("node2", "")])
def test_check_config_refuses_the_identity_of_no_node(with_pin: Any, whose: str, match: str) -> None:
    shutil.copy(with_pin.root / whose / "identity.toml", with_pin.root / "node1" / "identity.toml")
    told = checked(with_pin, 1 if match else 0)
    assert (match or "good; node 'node2'") in told


def test_check_config_refuses_a_node_that_the_manifest_does_not_name(with_pin: Any) -> None:
    (with_pin.root / "node1" / "identity.toml").unlink()
    create_identity(with_pin.root / "node1" / "identity.toml", "node9", "node")
    assert "has no node 'node9' with these keys" in checked(with_pin, 1)


def test_a_command_without_a_configuration_is_the_users_mistake(cluster_folder: Any) -> None:
    ended = cluster_folder.command()
    assert ended.returncode == 1
    assert "--config is needed" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("pin", ["1234", "short-pin", "a" * 31])
def test_init_refuses_a_guessable_pin_from_the_environment(cluster_folder: Any, pin: str) -> None:
    """SoftHSM's derivation is weak, so the PIN itself carries the strength."""
    config = cluster_folder.config("node1")
    config.write_text(config.read_text().replace("file:../pin.node1", "env:KQ_TEST_PIN"))
    ended = cluster_folder.command("init", "--config", str(config), KQ_TEST_PIN=pin)
    assert ended.returncode == 1
    assert "at least 32 characters" in ended.stderr
    assert pin not in ended.stderr
    good = cluster_folder.command("init", "--config", str(config), KQ_TEST_PIN="0123456789abcdef" * 2)
    assert good.returncode == 0, good.stderr
