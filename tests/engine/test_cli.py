"""The command line as far as it needs no cluster: help, mistakes, exit codes, files, and the founding of a cluster."""

import base64
import errno
import json
import os
import pty
import re
import select
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from statuses import node_status

from engine import __version__, errors
from engine.cli import keyops, local, output
from engine.cli.main import cli, run
from engine.cli.output import Settings, reading, writing
from engine.client.calls import MemberStatus
from engine.client.client import load_settings
from engine.client.config import create_identity, load_cluster, load_identity, read_card, write_toml
from engine.protocol.requests import TokenHealth

PASSPHRASE = "correct horse battery"
POLICY = """\
version = 1
[[rule]]
identity = "shop"
keys = "*"
operations = ["*"]
"""


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The standard output as JSON."""
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def keyquorum(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Command]:
    """Run the command in this process, in an empty folder, with no configuration in the environment."""
    for name in list(os.environ):
        if name.startswith("KEYQUORUM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("KEYQUORUM_OPERATOR_PASSPHRASE", PASSPHRASE)
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> Result:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    yield call
    # The command has set up logging to a standard error that is gone after this test.
    structlog.reset_defaults()


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and group."""
    yield above
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield (*above, name)


def test_every_command_explains_itself(keyquorum: Command) -> None:
    """Each command has a help text with a sentence of its own, and exits with 0."""
    found = list(commands(cli))
    assert {("up",), ("key", "destroy"), ("cluster", "join"), ("init", "node"), ("verify-mac",)} <= set(found)
    for words in found:
        told = keyquorum(*words, "--help")
        assert told.code == 0
        assert told.out.startswith(f"Usage: keyquorum {' '.join(words)}".rstrip())
        assert re.search(r"^\n  [A-Z][^\n]{15,}$", told.out, re.MULTILINE), words


def test_version_is_the_packages(keyquorum: Command) -> None:
    """``--version`` prints one line."""
    told = keyquorum("--version")
    assert (told.code, told.out) == (0, f"keyquorum, version {__version__}\n")


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["key", "frobnicate"],
        ["key", "create", "orders"],
        ["key", "create", "orders", "rot13"],
        ["key", "create", "orders", "aes-256-gcm", "--threshold", "many"],
        ["key", "list", "--frobnicate"],
        ["key", "list", "--timeout", "-1"],
        ["key", "list", "--log-level", "loud"],
        ["key", "destroy", "orders"],
        ["verify", "tls", "-"],
        ["verify", "tls", "-", "--signature", "-"],
        ["encrypt", "orders", "missing.txt"],
        ["encrypt", "orders", "--aad", "a", "--aad-file", "b"],
        ["sign", "tls", ".", "--config", "missing.toml"],
        ["--config", "missing.toml", "status"],
        ["key", "list"],
        ["down", "nowhere"],
        ["init", "node", "n", "--name", "n"],
        ["init", "node", "n", "--name", "n", "--location", "a/b", "--endpoint", "10.0.0.1:7300"],
        ["init", "client", "c", "--name", "no spaces"],
        ["cluster", "show", "missing.manifest"],
        ["cluster", "join", "nowhere", "x"],
        ["cluster", "sign", "--operator", "nowhere"],
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(keyquorum: Command, words: list[str]) -> None:
    """A mistake is told in one line on the standard error, or as one JSON object; there is never a traceback."""
    told = keyquorum(*words)
    if words[0] != "down":  # that no cluster is there is the cluster's error
        assert told.code == 1
    assert told.out == ""
    assert re.fullmatch(r"keyquorum: [^\n]+\n", told.err)
    told = keyquorum(*words, "-o", "json")
    assert told.out == ""
    answer = json.loads(told.err)
    assert set(answer) >= {"error", "message", "exit_code"}
    assert answer["exit_code"] == told.code


def test_groups_without_a_command_show_their_help(keyquorum: Command) -> None:
    """``keyquorum`` and ``keyquorum key`` alone are mistakes that explain."""
    for words in ([], ["key"], ["init"], ["cluster"]):
        told = keyquorum(*words)
        assert told.code == 1
        assert "Usage: keyquorum" in told.err


REFUSED = (
    errors.AccessDenied,
    errors.ConfigError,
    errors.InvalidSignature,
    errors.InvalidTag,
    errors.KeyDisabled,
    errors.KeyExists,
    errors.KeyNotFound,
    errors.ManifestError,
    errors.UnsupportedAlgorithm,
    errors.VersionRetired,
)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "error_from_code"])
def test_each_error_has_its_exit_code(keyquorum: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """1 for the user's mistake or a failed check, 2 where the cluster could not."""
    kind = getattr(errors, name)

    def fail(*_: object) -> None:
        raise kind("the\x1b[2Jreason")

    monkeypatch.setattr(keyops, "connect", fail)
    told = keyquorum("key", "list", "--config", "client.toml")
    assert told.code == (1 if kind in REFUSED else 2)
    assert told.err == "keyquorum: the?[2Jreason\n"
    answer = json.loads(keyquorum("key", "list", "--config", "client.toml", "-o", "json").err)
    assert answer == {"error": kind.code, "message": "the?[2Jreason", "exit_code": told.code}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("wrong"), 1),
        (TypeError("wrong"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
        (RuntimeError("a defect"), 2),
    ],
)
def test_other_errors_have_their_exit_code(
    keyquorum: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """Ctrl-C is 130 and a closed pipe 1, both without a word; a defect of ours is 2."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(keyops, "connect", fail)
    told = keyquorum("key", "list", "--config", "client.toml")
    assert told.code == code
    lines = told.err.strip().splitlines()
    assert len(lines) == (0 if isinstance(error, KeyboardInterrupt | BrokenPipeError) else 1)


def test_missing_holders_are_named_in_json(keyquorum: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script learns from ``names`` which nodes did not give their share."""

    def fail(*_: object) -> None:
        raise errors.QuorumUnavailable("2 of 3 shares", ["node4", "node5"])

    monkeypatch.setattr(keyops, "connect", fail)
    told = keyquorum("flush", "--config", "client.toml", "-o", "json")
    assert json.loads(told.err)["names"] == ["node4", "node5"]


@pytest.mark.parametrize(
    ("reasons", "state", "trouble"),
    [
        ({}, "up", []),
        ({"audit": "full"}, "not ready", ["serves nothing: the audit log can't be written: full"]),
        ({"store": "full"}, "not ready", ["serves only the keys that are loaded: full"]),
        ({"health": TokenHealth("it is gone", "", 0, 0, 0, 0)}, "not ready", ["serves no key: it is gone"]),
    ],
)
def test_status_says_why_a_node_is_not_ready(reasons: dict[str, Any], state: str, trouble: list[str]) -> None:
    member = MemberStatus("n1", "node", "tcp://127.0.0.1:1", "", node_status(**reasons), None)
    assert local.state_of(member) == state
    assert local._member_json(member, ())["ready"] is (not reasons)
    assert local.troubles_of(member) == trouble


def test_configuration_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option, the environment, ./client.toml, the local cluster's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEYQUORUM_CONFIG", raising=False)
    with pytest.raises(errors.ConfigError, match="no client configuration"):
        output.client_config(Settings())
    local = tmp_path / "keyquorum-cluster/clients/local/client.toml"
    local.parent.mkdir(parents=True)
    local.touch()
    assert output.client_config(Settings()).resolve() == local
    (tmp_path / "client.toml").touch()
    assert output.client_config(Settings()) == Path("client.toml")
    monkeypatch.setenv("KEYQUORUM_CONFIG", "other.toml")
    assert output.client_config(Settings()) == Path("other.toml")
    assert output.client_config(Settings(config="mine.toml")) == Path("mine.toml")


# --- files ----------------------------------------------------------------------------------------------------------


def test_output_appears_only_on_success(tmp_path: Path) -> None:
    """An error leaves neither the file nor a part of it, and an older file as it was."""
    target = tmp_path / "out"

    def fail() -> None:
        with writing(str(target)) as sink:
            sink.write(b"half")
            raise errors.InvalidTag("changed")

    with pytest.raises(errors.InvalidTag):
        fail()
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"older")
    with pytest.raises(errors.InvalidTag):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
    with writing(str(target)) as sink:
        sink.write(b"newer")
        assert target.read_bytes() == b"older"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"newer"]


def test_private_output_has_mode_0600(tmp_path: Path) -> None:
    """Decrypted files are for their owner; the others follow the umask."""
    before = os.umask(0o022)
    try:
        for name, private in (("secret", True), ("public", False)):
            with writing(str(tmp_path / name), private=private) as sink:
                sink.write(b"x")
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "secret"), mode_of(tmp_path / "public")) == (0o600, 0o644)


def test_output_goes_through_a_link_and_to_a_device(tmp_path: Path) -> None:
    """A link stays a link, and a device stays a device: neither is replaced by a file."""
    (tmp_path / "real").write_bytes(b"older")
    (tmp_path / "link").symlink_to("real")
    with writing(str(tmp_path / "link")) as sink:
        sink.write(b"newer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"newer"
    with writing(os.devnull) as sink:
        sink.write(b"gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(ValueError, match="is a folder"), writing(str(tmp_path)):
        pass


def test_binary_to_a_terminal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is text, or the user insists."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="terminal"), writing("-"):
        pass
    for options in ({"force": True}, {"text": True}):
        with writing("-", **options) as sink:
            sink.write(b"x")


def test_input_is_a_file_or_the_standard_input(tmp_path: Path) -> None:
    """A missing file is an error of its own."""
    (tmp_path / "in").write_bytes(b"data")
    with reading(str(tmp_path / "in")) as source:
        assert source.read() == b"data"
    with pytest.raises(FileNotFoundError), reading(str(tmp_path / "none")):
        pass


@pytest.mark.parametrize("encoding", ["raw", "base64", "hex"])
def test_encodings_round_trip(encoding: str) -> None:
    """Signatures and MACs come back from each encoding; what is none is refused without showing it."""
    data = bytes(range(64))
    assert output.decode_bytes(output.encode_bytes(data, encoding), encoding, "tag") == data
    if encoding != "raw":
        with pytest.raises(ValueError, match=f"^tag: no valid {encoding}$"):
            output.decode_bytes(b"secret!", encoding, "tag")


# --- members and clusters -------------------------------------------------------------------------------------------


class Hosts:
    """The folders of several hosts; only public files go from one to another."""

    def __init__(self, root: Path, keyquorum: Command) -> None:
        self.root = root
        self.keyquorum = keyquorum

    def make(self, role: str, name: str, *options: str | Path) -> Path:
        """Make a member on a host of its own; its folder."""
        folder = self.root / f"host-{name}" / name
        told = self.keyquorum("init", role, folder, "--name", name, *options)
        assert told.code == 0, told.err
        return folder

    def founders(self, *, tokens: bool = False) -> dict[str, Path]:
        """An operator, three nodes (with tokens or without), a balancer and a client."""
        made = {"alice": self.make("operator", "alice"), "shop": self.make("client", "shop")}
        for number in range(1, 4):
            place = ("--endpoint", f"tcp://10.0.0.{number}:7300", "--location", f"site{number}/room/rack/host")
            made[f"node{number}"] = self.make("node", f"node{number}", *place, "--token" if tokens else "--no-token")
        ends = ("--endpoint", "tcp://10.0.0.9:7400", "--publish-endpoint", "tcp://10.0.0.9:7401")
        made["bal"] = self.make("balancer", "bal", *ends)
        return made

    def cards(self, *folders: Path) -> list[str]:
        """Options that name the cards of the members."""
        return [f"--card={next(folder.glob('*.card'))}" for folder in folders]

    def sign(self, operator: Path, *options: str | Path, out: str = "cluster.manifest") -> Result:
        """Sign a manifest into the root folder."""
        return self.keyquorum(
            "cluster", "sign", "--operator", operator, *options, "--out", self.root / out, "-o", "json"
        )


@pytest.fixture
def hosts(tmp_path: Path, keyquorum: Command) -> Hosts:
    """Hosts with nothing on them yet."""
    return Hosts(tmp_path, keyquorum)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy that lets the client shop do everything."""
    (tmp_path / "policy.toml").write_text(POLICY)
    return tmp_path / "policy.toml"


def test_a_cluster_is_founded_over_several_folders(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """Cards in, a signed manifest out, and every member's configuration then loads with the pin."""
    made = hosts.founders(tokens=True)
    signed = hosts.sign(made["alice"], "--name", "prod", "--policy", policy, *hosts.cards(*made.values()))
    assert signed.code == 0
    assert signed.json["complete"]
    pin = signed.json["pin"]
    for name, folder in made.items():
        told = keyquorum("cluster", "join", folder, hosts.root / "cluster.manifest", "--pin", pin)
        assert told.code == 0, told.err
        assert f"{name} now trusts this cluster" in told.out
        assert pin in told.out
        cluster = load_cluster(folder / "cluster.manifest", pin)
        assert set(cluster.members) == set(made)
    assert load_settings(made["shop"] / "client.toml").cluster.name == "prod"
    for module, config in (("nodes", made["node1"] / "node.toml"), ("balancer", made["bal"] / "balancer.toml")):
        words = [sys.executable, "-P", "-m", module, "--config", str(config), "--check-config"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_an_identity_is_private_and_made_once(hosts: Hosts, keyquorum: Command) -> None:
    """Folder 0700, keys 0600, an operator's key encrypted; a second init is refused and changes nothing."""
    folder = hosts.make("operator", "alice")
    assert mode_of(folder) == 0o700
    assert mode_of(folder / "identity.toml") == 0o600
    text = (folder / "identity.toml").read_text()
    assert "ENCRYPTED PRIVATE KEY" in text
    told = keyquorum("init", "operator", folder, "--name", "alice")
    assert (told.code, "never overwritten" in told.err) == (1, True)
    assert (folder / "identity.toml").read_text() == text
    assert load_identity(folder / "identity.toml", PASSPHRASE).name == "alice"


def _unknown_curve() -> str:
    der = ec.derive_private_key(5, ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    changed = der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03017f"))
    return f"-----BEGIN PRIVATE KEY-----\n{base64.b64encode(changed).decode()}\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("signing_key", _unknown_curve(), "the signing key is malformed"),
        ("signing_key", "", "the signing key is malformed"),
        ("role", "MARK" * 5_000, r"identity\.toml: Invalid enum value - at `\$\.role`$"),
        ("role", "MARK", r"identity\.toml: Invalid enum value - at `\$\.role`$"),
    ],
)
def test_an_identity_file_that_is_damaged_is_told_in_a_few_words(
    tmp_path: Path, key: str, value: str, match: str
) -> None:
    path = tmp_path / "identity.toml"
    create_identity(path, "alice", "client")
    values = tomllib.loads(path.read_text())
    write_toml(path, {**values, key: value})
    with pytest.raises(errors.ConfigError, match=match) as caught:
        load_identity(path)
    assert len(str(caught.value)) < 1_000


def test_audit_show_prints_a_record_whose_unknown_fields_can_not_be_printed(keyquorum: Command, tmp_path: Path) -> None:
    """Who changed a log shall not keep its reader from the records behind that place."""
    good = b'{"seq":1,"prev":"' + b"0" * 64 + b'","time_ms":1,"node":"n","boot":"b","request":0,"event":"start"'
    odd = [
        b"}",
        b',"x":"\xff"}',
        b',"x\xff":1}',
        b',"x":' + b"[" * 900 + b"]" * 900 + b"}",
    ]
    (tmp_path / "audit-000001.jsonl").write_bytes(b"".join(good + each + b"\n" for each in odd))
    told = keyquorum("audit", "show", tmp_path / "audit-000001.jsonl", "-o", "json")
    assert told.code == 0
    assert [json.loads(line)["event"] for line in told.out.splitlines()] == ["start"] * len(odd)


def test_init_prints_no_secret(keyquorum: Command, tmp_path: Path) -> None:
    """What is printed is public: the card's data, no key of the identity file."""
    told = keyquorum("init", "client", tmp_path / "shop", "--name", "shop", "-o", "json", "--log-level", "debug")
    assert read_card(Path(told.json["card"])).name == "shop"
    values = re.findall(
        r'curve_secret = "(.+)"|^([A-Za-z0-9+/=]{20,})$', (tmp_path / "shop/identity.toml").read_text(), re.M
    )
    secrets = [value for pair in values for value in pair if value]
    assert secrets
    for secret in secrets:
        assert secret not in told.out + told.err
        assert secret not in (tmp_path / "shop/shop.card").read_text()


def test_the_passphrase_comes_from_a_private_file_or_the_environment(
    keyquorum: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never from the arguments; a short one is refused, and a file that others may read too."""
    monkeypatch.delenv("KEYQUORUM_OPERATOR_PASSPHRASE")
    told = keyquorum("init", "operator", tmp_path / "a", "--name", "a")
    assert (told.code, "needs a passphrase" in told.err) == (1, True)
    secret = tmp_path / "passphrase"
    secret.write_text("short\n")
    secret.chmod(0o600)
    told = keyquorum("init", "operator", tmp_path / "a", "--name", "a", "--passphrase-file", secret)
    assert (told.code, "at least 8" in told.err) == (1, True)
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o644)
    told = keyquorum("init", "operator", tmp_path / "a", "--name", "a", "--passphrase-file", secret)
    assert (told.code, "0600" in told.err) == (1, True)
    assert not (tmp_path / "a").exists()
    secret.chmod(0o600)
    assert keyquorum("init", "operator", tmp_path / "a", "--name", "a", "--passphrase-file", secret).code == 0
    monkeypatch.setenv("KEYQUORUM_OPERATOR_PASSPHRASE", "another one")
    told = keyquorum("cluster", "sign", "--operator", tmp_path / "a", "--name", "prod")
    assert (told.code, "passphrase is wrong" in told.err) == (1, True)


def test_an_identity_that_others_can_read_is_refused(hosts: Hosts, keyquorum: Command) -> None:
    """Signing and joining look at the mode of the identity file first."""
    alice = hosts.make("operator", "alice")
    assert hosts.sign(alice, "--name", "prod").code == 0
    (alice / "identity.toml").chmod(0o640)
    told = hosts.sign(alice)
    assert (told.code, "0640" in told.err) == (1, True)
    told = keyquorum("cluster", "join", alice, hosts.root / "cluster.manifest")
    assert (told.code, "0640" in told.err) == (1, True)


def test_a_tampered_card_is_refused(hosts: Hosts, keyquorum: Command) -> None:
    """Whatever byte of a card is changed, it is not taken."""
    alice, shop = hosts.make("operator", "alice"), hosts.make("client", "shop")
    card = shop / "shop.card"
    whole = card.read_text()
    for position in range(0, len(whole) - 1, 7):
        changed = whole[:position] + ("A" if whole[position] != "A" else "B") + whole[position + 1 :]
        card.write_text(changed)
        told = hosts.sign(alice, "--name", "prod", *hosts.cards(shop))
        assert told.code == 1, position
        assert keyquorum("cluster", "show", card).code == 1
    assert not (hosts.root / "cluster.manifest").exists()


def test_a_wrong_pin_is_refused(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """A member joins only the cluster whose hash its owner gives, and changes nothing otherwise."""
    made = hosts.founders()
    pin = hosts.sign(made["alice"], "--name", "prod", "--policy", policy, *hosts.cards(*made.values())).json["pin"]
    before = (made["shop"] / "client.toml").read_text()
    manifest = hosts.root / "cluster.manifest"
    for wrong in ("00" * 32, pin[:-2], "xyz", pin[:-1] + ("0" if pin[-1] != "0" else "1")):
        told = keyquorum("cluster", "join", made["shop"], manifest, "--pin", wrong)
        assert told.code == 1
    assert keyquorum("cluster", "join", made["shop"], manifest).code == 1
    assert (made["shop"] / "client.toml").read_text() == before
    assert not (made["shop"] / "cluster.manifest").exists()


def test_a_tampered_manifest_is_refused(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """Whatever byte of a manifest is changed, no member takes it under the pin."""
    made = hosts.founders()
    pin = hosts.sign(made["alice"], "--name", "prod", "--policy", policy, *hosts.cards(*made.values())).json["pin"]
    whole = (hosts.root / "cluster.manifest").read_bytes()
    bad = hosts.root / "bad.manifest"
    for position in range(0, len(whole), 41):
        bad.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert keyquorum("cluster", "join", made["shop"], bad, "--pin", pin).code == 1, position
    bad.write_bytes(whole[:-1])
    assert keyquorum("cluster", "join", made["shop"], bad, "--pin", pin).code == 1
    assert not (made["shop"] / "cluster.manifest").exists()


def test_a_stranger_can_not_join(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """A member joins only if the manifest lists its own keys under its name."""
    made = hosts.founders()
    pin = hosts.sign(made["alice"], "--name", "prod", "--policy", policy, *hosts.cards(*made.values())).json["pin"]
    told = keyquorum("cluster", "join", hosts.make("client", "eve"), hosts.root / "cluster.manifest", "--pin", pin)
    assert (told.code, "no member" in told.err) == (1, True)
    shutil.rmtree(made["shop"])
    twin = hosts.make("client", "shop")
    told = keyquorum("cluster", "join", twin, hosts.root / "cluster.manifest", "--pin", pin)
    assert (told.code, "other keys" in told.err) == (1, True)


def test_manifests_follow_each_other(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """A later manifest adds and removes members under the old pin; an older one is never taken again."""
    made = hosts.founders()
    first = hosts.sign(
        made["alice"], "--name", "prod", "--policy", policy, *hosts.cards(*made.values()), out="first.manifest"
    )
    pin = first.json["pin"]
    assert keyquorum("cluster", "join", made["shop"], hosts.root / "first.manifest", "--pin", pin).code == 0
    guest = hosts.make("client", "guest")
    second = hosts.sign(made["alice"], *hosts.cards(guest), "--remove", "node3", out="second.manifest")
    assert (second.json["serial"], second.json["pin"]) == (2, pin)
    names = [member["name"] for member in second.json["members"]]
    assert "guest" in names
    assert "node3" not in names
    assert second.json["rules"] == first.json["rules"]
    told = keyquorum("cluster", "join", made["shop"], hosts.root / "second.manifest")
    assert told.code == 0, told.err
    told = keyquorum("cluster", "join", made["shop"], hosts.root / "first.manifest")
    assert (told.code, "serial 1" in told.err) == (1, True)
    told = hosts.sign(made["alice"], "--previous", hosts.root / "first.manifest", out="third.manifest")
    assert (told.code, "signed 2 already" in told.err) == (1, True)
    told = hosts.sign(made["alice"], "--remove", "nobody", out="third.manifest")
    assert (told.code, "no member" in told.err) == (1, True)
    assert not (hosts.root / "third.manifest").exists()


def test_a_member_belongs_to_one_cluster(hosts: Hosts, keyquorum: Command) -> None:
    """Neither a member nor an operator changes its cluster by a later command."""
    alice, shop, mallory = (
        hosts.make("operator", "alice"),
        hosts.make("client", "shop"),
        hosts.make("operator", "mallory"),
    )
    pin = hosts.sign(alice, "--name", "prod", *hosts.cards(shop)).json["pin"]
    assert keyquorum("cluster", "join", shop, hosts.root / "cluster.manifest", "--pin", pin).code == 0
    other = hosts.sign(mallory, "--name", "prod", *hosts.cards(shop), out="other.manifest").json["pin"]
    for options in ([], ["--pin", other]):
        assert keyquorum("cluster", "join", shop, hosts.root / "other.manifest", *options).code == 1
    told = hosts.sign(alice, "--name", "staging", out="third.manifest")
    assert (told.code, "belongs to the cluster 'prod'" in told.err) == (1, True)
    assert load_settings(shop / "client.toml").cluster.pin.hex() == pin


def test_a_quorum_of_operators_signs(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """With a quorum of two a manifest counts only once another operator has countersigned it."""
    alice, bob, shop = hosts.make("operator", "alice"), hosts.make("operator", "bob"), hosts.make("client", "shop")
    signed = hosts.sign(
        alice, "--name", "prod", "--policy", policy, "--quorum", "2", *hosts.cards(bob, shop), out="cluster.manifest"
    )
    assert (signed.code, signed.json["complete"], signed.json["signatures_needed"]) == (0, False, 2)
    pin, manifest = signed.json["pin"], hosts.root / "cluster.manifest"
    told = keyquorum("cluster", "join", shop, manifest, "--pin", pin)
    assert (told.code, "1 of 2" in told.err) == (1, True)
    assert keyquorum("cluster", "countersign", "--operator", bob, manifest).code == 1  # nobody to ask
    mallory = hosts.make("operator", "mallory")
    assert keyquorum("cluster", "countersign", "--operator", mallory, manifest, "--yes").code == 1
    told = keyquorum("cluster", "countersign", "--operator", bob, manifest, "--yes", "--pin", "00" * 32)
    assert told.code == 1
    told = keyquorum("cluster", "countersign", "--operator", bob, manifest, "--yes", "--pin", pin, "-o", "json")
    assert (told.code, told.json["complete"], told.json["signed_by"]) == (0, True, ["alice", "bob"])
    for folder in (shop, alice):
        assert keyquorum("cluster", "join", folder, manifest, "--pin", pin).code == 0
    second = hosts.sign(alice, "--remove", "shop", out="second.manifest")
    assert (second.json["serial"], second.json["complete"]) == (2, False)
    told = keyquorum("cluster", "countersign", "--operator", bob, hosts.root / "second.manifest", "--yes", "-o", "json")
    assert told.json["complete"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("version = 2", "version"),
        ('version = 1\nrules = "all"', "rules"),
        ('version = 1\n[[rule]]\nidentity = "shop"\nkeys = "*"', "operations"),
        ('version = 1\n[[rule]]\nidentity = "shop"\nkeys = "*"\noperations = ["fly"]', "fly"),
        ("version = ", "TOML"),
    ],
)
def test_a_wrong_policy_is_refused(hosts: Hosts, tmp_path: Path, text: str, reason: str) -> None:
    """The message names what is wrong, and nothing is signed."""
    alice = hosts.make("operator", "alice")
    (tmp_path / "bad.toml").write_text(text)
    told = hosts.sign(alice, "--name", "prod", "--policy", tmp_path / "bad.toml")
    assert (told.code, reason in told.err) == (1, True)
    assert not (tmp_path / "cluster.manifest").exists()


def test_without_a_policy_everything_is_denied_and_said(hosts: Hosts) -> None:
    """The default is the safe one."""
    told = hosts.sign(hosts.make("operator", "alice"), "--name", "prod")
    assert (told.code, told.json["rules"]) == (0, [])
    assert "every client is denied everything" in told.err


def test_cards_of_one_name_or_a_members_place_are_refused(hosts: Hosts) -> None:
    """Two cards of one name, and the card of a client under a node's name, can't slip in."""
    made = hosts.founders()
    assert hosts.sign(made["alice"], "--name", "prod", *hosts.cards(made["node1"], made["node1"])).code == 1
    assert hosts.sign(made["alice"], "--name", "prod", *hosts.cards(made["node1"])).code == 0
    shutil.rmtree(made["node1"])
    told = hosts.sign(made["alice"], *hosts.cards(hosts.make("client", "node1")), out="second.manifest")
    assert (told.code, "is a node; its card says client" in told.err) == (1, True)


def test_show_prints_members_and_rules(hosts: Hosts, policy: Path, keyquorum: Command) -> None:
    """For a person as a table with fingerprints, for a script as JSON."""
    made = hosts.founders()
    signed = hosts.sign(made["alice"], "--name", "prod", "--policy", policy, *hosts.cards(*made.values()))
    told = keyquorum("cluster", "show", hosts.root / "cluster.manifest")
    for text in ("prod", signed.json["pin"], "alice (1 of 1 needed)", "site2/room/rack/host", "shop"):
        assert text in told.out
    shown = keyquorum("cluster", "show", hosts.root / "cluster.manifest", "-o", "json")
    assert shown.json == signed.json
    card = keyquorum("cluster", "show", made["node1"] / "node1.card", "-o", "json").json
    assert card in shown.json["members"]
    assert card["fingerprint"] in told.out


def test_init_node_makes_its_token(keyquorum: Command, tmp_path: Path) -> None:
    """The token is a real one; its PIN is private, lies outside the folder and is printed nowhere."""
    place = ("--endpoint", "tcp://127.0.0.1:7300", "--location", "a/b/c/d")
    inside = keyquorum("init", "node", tmp_path / "n1", "--name", "n1", *place, "--pin-file", tmp_path / "n1/pin")
    assert (inside.code, "keep it elsewhere" in inside.err) == (1, True)
    assert not (tmp_path / "n1").exists()
    told = keyquorum("init", "node", tmp_path / "n1", "--name", "n1", *place, "--token")
    assert told.code == 0, told.err
    pin = tmp_path / "n1.pin"
    assert mode_of(pin) == 0o600
    assert len(pin.read_text().strip()) >= 40
    assert pin.read_text().strip() not in told.out + told.err
    assert list((tmp_path / "n1/data").rglob("*.object"))
    again = keyquorum("init", "node", tmp_path / "n2", "--name", "n1", *place, "--token")
    assert (again.code, "never overwritten" in again.err) == (1, True)


# --- as a process ---------------------------------------------------------------------------------------------------


def test_the_installed_command_ends_with_its_exit_code(tmp_path: Path) -> None:
    """``keyquorum`` as a script of its own: version, mistake, and a closed pipe without a word."""
    script = Path(sys.executable).with_name("keyquorum")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True, "timeout": 60, "check": False}
    done = subprocess.run([script, "--version"], capture_output=True, **options)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([script, "key", "list"], capture_output=True, **options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([script, "key", "create", "--help"], stdout=writer, stderr=subprocess.PIPE, **options)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def typed(words: list[str | Path], answers: list[bytes], cwd: Path) -> tuple[int, str]:
    """Run the installed command on a terminal, type each answer at a prompt; its exit code and all it showed."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")}
    script = Path(sys.executable).with_name("keyquorum")
    process = subprocess.Popen(
        [script, *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environment, start_new_session=True
    )
    os.close(theirs)
    shown = b""
    try:
        # The last prompt's end is ": "; at the end of the process a read fails on Linux.
        while select.select([ours], [], [], 60.0)[0]:
            try:
                shown += os.read(ours, 4096)
            except OSError:
                break
            if answers and shown.endswith(b": "):
                os.write(ours, answers.pop(0))
        return process.wait(60.0), shown.decode()
    finally:
        process.kill()
        process.wait(60.0)
        os.close(ours)


def test_a_passphrase_is_asked_for_twice_and_not_shown(tmp_path: Path) -> None:
    """On a terminal; two that differ are asked for again."""
    answers = [b"one passphrase\n", b"another one\n", b"one passphrase\n", b"one passphrase\n"]
    code, shown = typed(["init", "operator", "alice", "--name", "alice"], answers, tmp_path)
    assert code == 0
    assert "passphrase: " in shown
    assert "one passphrase" not in shown
    assert load_identity(tmp_path / "alice/identity.toml", "one passphrase").role == "operator"


def test_what_cannot_be_undone_is_asked_for(tmp_path: Path) -> None:
    """Anything but yes leaves it undone: exit code 1, before a connection is made."""
    words: list[str | Path] = ["key", "destroy", "orders", "--config", "none.toml"]
    code, shown = typed(words, [b"n\n"], tmp_path)
    assert (code, "Destroy orders for good?" in shown) == (1, True)
    assert "nothing was done" in shown
    code, shown = typed(words, [b"y\n"], tmp_path)
    assert (code, "none.toml: No such file" in shown) == (1, True)


# --- documentation --------------------------------------------------------------------------------------------------


def documented() -> list[tuple[str, str]]:
    """Every line of code in the documents that calls the command, with the document's name."""
    root = Path(__file__).parents[2]
    found = []
    for document in [*root.glob("*.md"), *root.glob("docs/*.md")]:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
        for block in (text for language, text in blocks if language in ("", "sh", "bash", "console")):
            for line in re.split(r"\n|&&|\|", block.replace("\\\n", " ")):
                if (command := line.strip().removeprefix("$ ")).startswith("keyquorum "):
                    found.append((document.name, command))
    return found


@pytest.mark.parametrize(("document", "line"), documented())
def test_documented_commands_are_understood(document: str, line: str, tmp_path: Path) -> None:
    """Each command line in the documents parses: its command, options and number of arguments exist."""
    words = shlex.split(re.split(r"\s[<>]", line)[0], comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, obj=Settings())
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command = found
    try:
        command.make_context(command.name, words, parent=context)
    except click.BadParameter as error:
        if "does not exist" not in error.message:  # the folders it speaks of are not here
            raise
