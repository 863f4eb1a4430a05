"""Backups of real clusters: made by the operators' order, and restored where a node, or the whole cluster, was lost."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from reborn import reborn, replace_node, sign_again
from whole_keys import create_whole_key

import engine
from engine import LocalCluster
from engine.cli.main import run
from engine.client import backup as backups
from engine.client.client import load_settings
from engine.client.config import Identity, create_identity, load_identity, write_private, write_toml
from engine.client.membership import Servers
from engine.client.recovery import create_recovery, load_recovery, read_recovery_card
from engine.client.transport import Channel, ask
from engine.errors import (
    AccessDenied,
    ConfigError,
    EngineError,
    KeyExhausted,
    KeyNotFound,
    ManifestError,
    ProtocolError,
    StaleKey,
)
from engine.failpoints import POINTS, VARIABLE
from engine.protocol.backup import (
    ORDER_LIFETIME_MAX_MS,
    ArchiveEnd,
    ExportOrder,
    add_order_signature,
    check_combined,
    decrypt_share,
    encrypt_share,
    issue_export_order,
    key_record,
    sign_recovery_card,
)
from engine.protocol.manifest import Cluster, Member, issue_cluster_manifest
from engine.protocol.refresh import Opener
from engine.protocol.requests import SHARE_EXPORT, SHARE_RESTORE, ShareExport, ShareRestore
from engine.protocol.signed import SigningKey, sign_envelope
from engine.sharing import SecretBuffer

PASSPHRASE = "correct horse battery staple"
NODES, THRESHOLD, SHARES = 4, 2, 3
NAMES = ("operator", "bob", "carol")
STILL = {"migrate": {"enabled": False}}
KEYS = {"aes": "aes-256-gcm", "ec": "ecdsa-p256-sha256", "hooks": "hmac-sha256", "rsa": "rsa-2048-pss-sha256"}


@dataclass
class Story:
    """A cluster with three operators, two of whom must sign, and what was done with its keys before its end."""

    cluster: LocalCluster
    root: Path
    folders: dict[str, Path]
    secrets: dict[str, str]
    nodes: dict[str, SigningKey]
    operators: dict[str, Identity]
    backup: Path
    made: dict[str, bytes] = field(default_factory=dict)
    openers: dict[str, Opener] = field(default_factory=dict)

    @property
    def signers(self) -> list[SigningKey]:
        return [self.operators[name].signing for name in NAMES[1:]]

    def cards(self) -> list[bytes]:
        return [read_recovery_card(self.folders[name] / f"{name}.recovery") for name in NAMES]

    def order(self, *signers: str, key: SigningKey | None = None, **changes: Any) -> bytes:
        """An export order, good but for what is changed."""
        told: dict[str, Any] = {
            "export_id": bytes(16),
            "cluster": self.cluster.cluster.pin,
            "threshold": 2,
            "recipients": self.cards(),
            "courier": "local",
            "expires_ms": backups_now() + 600_000,
        }
        first, *others = [self.operators[name].signing for name in signers or NAMES[:2]]
        raw = issue_export_order(ExportOrder(**(told | changes)), key or first, backups_now())
        for other in others:
            raw = add_order_signature(raw, other)
        return raw

    def opener(self, name: str) -> Opener:
        if name not in self.openers:  # its passphrase takes half a second
            self.openers[name] = load_recovery(self.folders[name] / "recovery.toml", name, self.secrets[name])
        return self.openers[name]

    def contributions(self, cluster: Cluster, *names: str, **changes: Any) -> list[Path]:
        """Files of the contributions of these operators to a restore into a cluster."""
        files = []
        for name in names:
            now = backups_now()
            made, problems = backups.open_archives(
                self.backup, self.operators[name], self.opener(name), cluster, now + 600_000, now, **changes
            )
            assert not problems
            files.append(self.root / f"{name}.pieces")
            backups.write_contributions(files[-1], made.values())
        return files


def backups_now() -> int:
    return time.time_ns() // 1_000_000


def command(*arguments: str | Path) -> int:
    return run([str(each) for each in arguments])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("backup")
    cluster = LocalCluster(NODES, THRESHOLD, root / "kq", shares=SHARES, clients=("local", "plain"), balancer=STILL)
    try:
        yield a_story(cluster, root)
    finally:
        if cluster.path.exists():
            cluster.close()


def a_story(cluster: LocalCluster, root: Path) -> Story:
    secret = (cluster.path / "secrets" / "operator.passphrase").read_text(encoding="ascii").strip()
    operators = {"operator": load_identity(cluster.path / "operator" / "identity.toml", secret)}
    folders = {name: root / name for name in NAMES}
    secrets = {"operator": secret, "bob": PASSPHRASE, "carol": f"{PASSPHRASE}!"}
    for name, folder in folders.items():
        folder.mkdir(mode=0o700)
        if name == "operator":
            shutil.copy(cluster.path / "operator" / "identity.toml", folder)
        else:
            operators[name] = create_identity(folder / "identity.toml", name, "operator", secrets[name])
        create_recovery(folder / "recovery.toml", folder / f"{name}.recovery", operators[name], secrets[name])
        pin = cluster.cluster.pin.hex()
        told = {"version": 1, "identity": "identity.toml", "manifest": "cluster.manifest", "manifest_pin": pin}
        write_toml(folder / "operator.toml", told)
        write_private(folder / "passphrase", secrets[name].encode())
    members = [*cluster.cluster.members.values(), operators["bob"].member(), operators["carol"].member()]
    sign_again(cluster, members, quorum=2)
    for folder in folders.values():
        shutil.copy(cluster.path / "cluster.manifest", folder)
    nodes = {name: load_identity(cluster.path / "nodes" / name / "identity.toml").signing for name in cluster.nodes}
    story = Story(cluster, root, folders, secrets, nodes, operators, root / "backup")
    cluster._await_manifest(cluster.cluster)
    with engine.connect(cluster.client_config) as kq:
        for name, algorithm in {**KEYS, "gone": "aes-256-gcm", "later": "aes-256-gcm", "used": "aes-256-gcm"}.items():
            create_whole_key(kq, name, algorithm, threshold=THRESHOLD, shares=SHARES)
        kq.rotate_key("aes")
        kq.refresh_key("ec")
        story.made = {
            "aes": kq.encrypt("aes", b"kept for years"),
            "ec": kq.sign("ec", b"message"),
            "hooks": kq.mac("hooks", b"message"),
            "rsa": kq.sign("rsa", b"message"),
            "later": kq.encrypt("later", b"too long"),
            "used": kq.encrypt("used", b"once"),
        }
        kq.destroy_key("gone")
    order = root / "export.order"
    order.write_bytes(story.order())
    assert command("backup", "create", "--config", cluster.client_config, "--order", order, "--out", story.backup) == 0
    return story


@pytest.fixture(scope="module")
def channel(story: Story) -> Iterator[Channel]:
    """To the nodes, as the client that may do everything with every key."""
    settings = load_settings(story.cluster.client_config)
    with zmq.Context() as context, Channel(settings.own_curve(), Servers(settings.source), context) as opened:
        yield opened


# --- nothing leaves without the operators' order ---

WRONG_ORDERS: dict[str, tuple[Callable[[Story], bytes], type[EngineError], str]] = {
    "none": (lambda story: b"", ProtocolError, "signed envelope"),
    "of one operator": (lambda story: story.order("bob"), ManifestError, "1 of 2 signatures needed"),
    "expired": (lambda story: story.order(expires_ms=backups_now() - 60_000), ManifestError, "expired"),
    "good for years": (
        lambda story: story.order(expires_ms=backups_now() + ORDER_LIFETIME_MAX_MS + 60_000),
        ManifestError,
        f"the limit is {ORDER_LIFETIME_MAX_MS}",
    ),
    "of another cluster": (
        lambda story: story.order(cluster=bytes(32)),
        ManifestError,
        "of the cluster with the pin 00",
    ),
    "for another client": (lambda story: story.order(courier="plain"), AccessDenied, "names 'plain' to bring it"),
    "for fewer than the quorum": (lambda story: story.order(threshold=1), ManifestError, "the quorum is 2"),
    "for more than there are": (lambda story: story.order(threshold=4), ManifestError, "threshold 4 of 3"),
    "for one operator twice": (
        lambda story: story.order(recipients=[story.cards()[0]] * 2),
        ManifestError,
        "is in it twice",
    ),
    "for a recovery key that its operator did not sign": (
        lambda story: story.order(recipients=[*story.cards()[:2], _foreign_card("carol")]),
        ManifestError,
        "the signature of 'carol' is wrong",
    ),
    "for a stranger": (
        lambda story: story.order(recipients=[*story.cards()[:2], _foreign_card("mallory")]),
        ManifestError,
        "'mallory' may not sign this",
    ),
    "signed by a client": (
        lambda story: add_order_signature(
            story.order("bob"), load_settings(story.cluster.client_config).identity.signing
        ),
        ManifestError,
        "'local' may not sign this",
    ),
    "with a forged signature": (
        lambda story: add_order_signature(story.order("bob"), SigningKey("carol", Ed25519PrivateKey.generate())),
        ManifestError,
        "the signature of 'carol' is wrong",
    ),
}


def _foreign_card(name: str) -> bytes:
    return sign_recovery_card(name, bytes(range(32)), SigningKey(name, Ed25519PrivateKey.generate()))


@pytest.mark.parametrize("what", WRONG_ORDERS)
def test_no_client_gets_an_archive_without_the_operators_order(story: Story, channel: Channel, what: str) -> None:
    """Not even the client that may do everything with every key."""
    make, kind, text = WRONG_ORDERS[what]
    for node in story.cluster.nodes:
        with pytest.raises(kind, match=text):
            ask(channel, node, SHARE_EXPORT, ShareExport(make(story), b"", 0), 10)


def test_parts_come_in_their_order_to_the_client_that_began(story: Story, channel: Channel) -> None:
    order = story.order()
    begun = ask(channel, "node1", SHARE_EXPORT, ShareExport(order, b"", 0), 10)
    assert ask(channel, "node1", SHARE_EXPORT, ShareExport(order, begun.run, 0), 10).run != begun.run
    with pytest.raises(StaleKey, match="no such archive"):
        ask(channel, "node1", SHARE_EXPORT, ShareExport(order, begun.run, 1), 10)
    begun = ask(channel, "node1", SHARE_EXPORT, ShareExport(order, b"", 0), 10)
    with pytest.raises(StaleKey, match="at part 0, asked for is 2"):
        ask(channel, "node1", SHARE_EXPORT, ShareExport(order, begun.run, 2), 10)
    first = ask(channel, "node1", SHARE_EXPORT, ShareExport(order, begun.run, 1), 10)
    assert ask(channel, "node1", SHARE_EXPORT, ShareExport(order, begun.run, 1), 10) == first, "told again"


# --- what is in it ---


def test_a_backup_verifies_and_says_what_is_in_it(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    pin = story.cluster.cluster.pin.hex()
    assert command("backup", "verify", story.backup, "--pin", pin, "--keys", "-o", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["threshold"], told["recipients"]) == (2, list(NAMES))
    assert [each["node"] for each in told["nodes"]] == list(story.cluster.nodes)
    assert (told["missing"], told["problems"], told["short"]) == ({}, [], [])
    keys = {(each["name"], each["version"]): each for each in told["every_key"]}
    assert {name for name, _ in keys} == {*KEYS, "gone", "later", "used"}
    assert ("aes", 2) in keys
    assert keys["gone", 1]["destroyed"]
    assert not keys["ec", 1]["destroyed"]
    assert (keys["ec", 1]["epoch"], len(keys["ec", 1]["nodes"])) == (2, SHARES)
    for path in (story.backup, *story.backup.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0


def test_the_operators_commands_make_an_order(story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recovery keys, an order, and a second signature on it; then it is as good as any."""
    folders, words, order = {}, [], tmp_path / "export.order"
    for name in NAMES:
        folders[name] = shutil.copytree(story.folders[name], tmp_path / name)
        for path in (folders[name] / "recovery.toml", folders[name] / f"{name}.recovery"):
            path.unlink()
        passphrase = ("--passphrase-file", folders[name] / "passphrase")
        assert command("backup", "key", folders[name], *passphrase) == 0
        assert (folders[name] / "recovery.toml").stat().st_mode & 0o777 == 0o600
        words += ["--recovery", folders[name] / f"{name}.recovery"]
    assert command("backup", "key", folders["bob"], "--passphrase-file", folders["bob"] / "passphrase") == 1
    assert "a recovery key is never overwritten" in capsys.readouterr().err
    sign: list[str | Path] = ["--operator", folders["bob"], "--passphrase-file", folders["bob"] / "passphrase"]
    last: list[str | Path] = ["--operator", folders["carol"], "--passphrase-file", folders["carol"] / "passphrase"]
    make = ["backup", "order", *words, "--client", "local", "--out", order]
    assert command(*make, *sign, "--threshold", "1") == 1
    assert "the quorum is 2" in capsys.readouterr().err
    assert command(*make, *sign, "--valid", "32d") == 1
    assert command("backup", "order", *words, "--client", "node1", *sign, "--out", order) == 1
    assert "'node1' is no client" in capsys.readouterr().err
    assert command(*make, *sign, "--valid", "2h") == 0
    assert "1 more signatures" in capsys.readouterr().err
    config = ("--config", story.cluster.client_config)
    assert command("backup", "create", *config, "--order", order, "--out", tmp_path / "made") == 1
    assert "1 of 2 signatures needed" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert command("backup", "countersign", *last, order) == 1, "nobody looked at it"
    assert command("backup", "countersign", *last, order, "--yes") == 0
    capsys.readouterr()
    assert command("backup", "create", *config, "--order", order, "--out", tmp_path / "made", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["recipients"] == list(NAMES)
    assert command("backup", "open", tmp_path / "made", *sign) == 0
    assert (tmp_path / "made" / "contributions" / "bob").stat().st_mode & 0o777 == 0o600
    # A recovery key of before opens nothing of what was encrypted to the new one.
    shutil.copy(story.folders["carol"] / "recovery.toml", folders["carol"])
    assert command("backup", "open", tmp_path / "made", *last) == 1
    assert "does not open with this recovery key" in capsys.readouterr().err


def test_no_share_is_in_any_file(story: Story) -> None:
    """The shares that enough operators can open are in no file of the backup, and in no log of a node."""
    public = Opener(bytes(range(1, 33)))
    target = story.cluster.cluster
    files = story.contributions(target, "operator", "carol", public=public.public)
    given = backups.contributions_of(files)
    secrets = []
    for node in story.cluster.nodes:
        archive, pages = backups.read_archive(backups.archive_path(story.backup, node), target)
        opened = {public.public: public}.get
        with check_combined(archive, given[archive.head.run], target, backups_now(), opened) as key:
            with memoryview(key) as view:
                secrets.append(bytes(view))
            for keys in pages:
                for each in keys:
                    record = key_record(each, target)
                    mine = record.manifest.holder(node)
                    if each.sealed and mine is not None:
                        share, salt = decrypt_share(key, archive, record, mine.x, each.sealed)
                        secrets += [share.y[:32], share.y[-32:], salt]
    assert len(secrets) > 3 * (SHARES * (len(KEYS) + 3))
    looked = [*story.backup.rglob("*"), *story.cluster.path.rglob("*"), *files]
    data = b"\0".join(each.read_bytes() for each in looked if each.is_file())
    assert not [each for each in secrets if each in data or each.hex().encode() in data]


def test_the_audit_logs_say_what_left_by_whose_order(story: Story) -> None:
    for node in story.cluster.nodes:
        folder = story.cluster.data_folder(node) / "audit"
        text = "".join(each.read_text(encoding="utf-8") for each in sorted(folder.glob("audit-*.jsonl")))
        lines = [json.loads(line) for line in text.splitlines()]
        steps = [each for each in lines if each["event"] == "step" and each.get("verb") == SHARE_EXPORT]
        assert steps, node
        assert {each["member"] for each in steps} == {"local"}
        told = [each for each in lines if each["event"] == "reply" and each.get("verb") == SHARE_EXPORT]
        assert any("of operator, bob" in each.get("detail", "") for each in told if each["outcome"] == "ok")


# --- what is changed is noticed, and named ---


def changed(story: Story, tmp_path: Path, change: Callable[[Path], None]) -> list[str]:
    """What verifying says of a copy of the backup that was changed."""
    folder = tmp_path / "changed"
    shutil.copytree(story.backup, folder)
    change(folder)
    try:
        return backups.verify_backup(folder, story.cluster.cluster.pin).problems
    except EngineError as error:
        return [str(error)]


def _parts(path: Path) -> list[bytes]:
    return list(backups.read_parts(path))


def _rewrite(path: Path, parts: list[bytes]) -> None:
    path.unlink()
    with backups._writing_parts(path) as write:
        for part in parts:
            write(part)


def _swap(folder: Path) -> None:
    one, two = (backups.archive_path(folder, node) for node in ("node1", "node2"))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def _other_page(folder: Path) -> None:
    one, two = (backups.archive_path(folder, node) for node in ("node1", "node2"))
    parts = _parts(one)
    _rewrite(one, [parts[0], _parts(two)[1], *parts[2:]])


def _flip(folder: Path, place: int) -> None:
    path = backups.archive_path(folder, "node1")
    parts = _parts(path)
    page = bytearray(parts[place])
    page[len(page) // 2] ^= 1
    parts[place] = bytes(page)
    _rewrite(path, parts)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in the head": (lambda folder: _flip(folder, 0), "node1.archive: "),
    "a flipped bit in a page": (lambda folder: _flip(folder, 1), "node1.archive: "),
    "a flipped bit in the end": (lambda folder: _flip(folder, -1), "node1.archive: "),
    "another node's archive": (_swap, "the archive of 'node2', not of 'node1'"),
    "another node's page": (_other_page, "a part of it is signed by 'node2'"),
    "a page left out": (
        lambda folder: _rewrite(
            backups.archive_path(folder, "node1"),
            [each for n, each in enumerate(_parts(backups.archive_path(folder, "node1"))) if n != 1],
        ),
        "0 pages with 0 keys were read, its end tells of 1",
    ),
    "a page twice": (
        lambda folder: _rewrite(
            backups.archive_path(folder, "node1"),
            [(p := _parts(backups.archive_path(folder, "node1")))[0], p[1], *p[1:]],
        ),
        "a page 1 that is not its page 2",
    ),
    "the end left out": (
        lambda folder: _rewrite(
            backups.archive_path(folder, "node1"), _parts(backups.archive_path(folder, "node1"))[:-1]
        ),
        "its end is missing",
    ),
    "cut off": (
        lambda folder: backups.archive_path(folder, "node1").write_bytes(
            backups.archive_path(folder, "node1").read_bytes()[:-7]
        ),
        "node1.archive: cut off",
    ),
    "something after the end": (
        lambda folder: _rewrite(
            backups.archive_path(folder, "node1"), [*(p := _parts(backups.archive_path(folder, "node1"))), p[-1]]
        ),
        "something comes after its end",
    ),
    "no archive at all": (
        lambda folder: backups.archive_path(folder, "node1").write_bytes(b"KQSTREAM"),
        "no file of a backup",
    ),
    "an order of one operator": (
        lambda folder: (folder / "order").write_bytes((folder.parent / "weak").read_bytes()),
        "1 of 2 signatures needed",
    ),
    "another order": (
        lambda folder: (folder / "order").write_bytes((folder.parent / "other").read_bytes()),
        "made by another order",
    ),
    "another cluster's manifest": (
        lambda folder: (folder / "cluster.manifest").write_bytes((folder.parent / "manifest").read_bytes()),
        "the first one has hash",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_is_named(story: Story, tmp_path: Path, what: str) -> None:
    change, text = CHANGES[what]
    (tmp_path / "weak").write_bytes(story.order("bob"))
    (tmp_path / "other").write_bytes(story.order(export_id=bytes(range(16))))
    operator = SigningKey("operator", Ed25519PrivateKey.generate())
    (tmp_path / "manifest").write_bytes(
        issue_cluster_manifest(
            name="other",
            members=[Member("operator", "operator", operator.public, bytes(32))],
            rules=[],
            operators=[operator],
        )
    )
    problems = changed(story, tmp_path, change)
    assert text in "\n".join(problems), problems


def test_a_backup_without_a_node_says_which_keys_it_lacks(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(story.backup, folder)
    for node in ("node1", "node2", "node3"):
        backups.archive_path(folder, node).unlink()
    report = backups.verify_backup(folder)
    assert sorted(report.missing) == ["node1", "node2", "node3"]
    left = [key for key in report.keys.values() if not key.destroyed]
    assert left
    assert report.short == left, "one share of each, two are needed"
    assert command("backup", "verify", folder) == 2


def test_a_node_that_dies_while_it_gives_an_archive_is_named(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step; the backup is made without it, and says so."""
    cluster, settings = story.cluster, load_settings(story.cluster.client_config)
    monkeypatch.setattr(backups, "PART_TIMEOUT_S", 2.0)
    monkeypatch.setattr(backups, "TRIES", 1)
    for point in EXPORT_POINTS:
        cluster.stop_node("node3")
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, f"{point}=kill@{1 if point.endswith(('begun', 'made')) else 2}")
            cluster.start_node("node3")
        report = backups.create_backup(settings, story.order(), tmp_path / point, backups_now())
        assert set(report.missing) == {"node3"}, point
        assert not report.short
        assert not backups.archive_path(tmp_path / point, "node3").exists()
        assert not backups.verify_backup(tmp_path / point).problems
    cluster.restart("node3")
    again = backups.create_backup(settings, story.order(), tmp_path / "again", backups_now())
    assert not again.missing
    with pytest.raises(ConfigError, match="never overwritten"):
        backups.create_backup(settings, story.order(), tmp_path / "again", backups_now())


# --- the drill ---


def drill(story: Story, backup: Path, *names: str) -> int:
    words: list[str | Path] = []
    for name in names:
        words += ["--operator", story.folders[name], "--passphrase-file", story.folders[name] / "passphrase"]
    return command("backup", "drill", backup, *words, "-o", "json")


def test_a_drill_shows_that_every_key_can_be_restored(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    """By two operators, under a throw-away token of which nothing is left."""
    memory = Path("/dev/shm")  # noqa: S108 - where the command works
    before = set(memory.iterdir())
    assert drill(story, story.backup, "bob", "carol") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["bad"], told["destroyed"], told["good"]) == (0, 1, len(KEYS) + 3)
    shown = {(each["name"], each["version"]): each for each in told["keys"]}
    assert {each["shares"] for each in shown.values()} == {SHARES, 0}
    assert shown["aes", 1]["shown"] == shown["aes", 2]["shown"] == "decrypts what it encrypted"
    assert shown["ec", 1]["shown"] == shown["rsa", 1]["shown"] == "signs, and its public key verifies"
    assert shown["hooks", 1]["shown"] == "verifies its own MAC"
    assert not shown["gone", 1]["shown"]
    left = [each for each in set(memory.iterdir()) - before if each.name.startswith("keyquorum-drill")]
    assert not left


def test_a_drill_by_too_few_operators_opens_nothing(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    assert drill(story, story.backup, "bob") == 2
    assert "takes contributions of 2 operators, there are 1" in capsys.readouterr().err


def plant(story: Story, target: Path, node: str, name: str) -> Path:
    """A copy of the backup in which a node, by its own hand, put a wrong share of a key; every signature is good."""
    shutil.copytree(story.backup, target)
    cluster, now = backups.open_folder(story.backup)[1], backups_now()
    mine = Opener(bytes(range(1, 33)))
    given = [
        backups.open_archives(
            story.backup, story.operators[each], story.opener(each), cluster, now + 60_000, now, mine.public
        )[0][node]
        for each in ("bob", "carol")
    ]
    path = backups.archive_path(story.backup, node)
    archive, pages = backups.read_archive(path, cluster)
    signing = story.nodes[node]
    parts, previous, keys, shares = [_parts(path)[0]], archive.digest, 0, 0
    with check_combined(archive, given, cluster, now, {mine.public: mine}.get) as key:
        for number, page in enumerate(pages, 1):
            changed = []
            for each in page:
                record = key_record(each, cluster)
                holder = record.manifest.holder(node)
                if record.manifest.name == name and each.sealed and holder is not None:
                    share, salt = decrypt_share(key, archive, record, holder.x, each.sealed)
                    wrong = salt + bytes([share.y[0] ^ 1]) + share.y[1:]
                    with SecretBuffer.copy_of(bytearray(wrong)) as plain:
                        sealed = encrypt_share(key, archive, record, holder.x, plain, 1_000_000 + number)
                    each = replace(each, sealed=sealed)
                changed.append(each)
            raw, previous = archive.sign_page(number, previous, changed, signing)
            parts.append(raw)
            keys, shares = keys + len(page), shares + sum(bool(each.sealed) for each in page)
        end = ArchiveEnd(archive.head.run, len(parts) - 1, keys, shares, previous)
    _rewrite(backups.archive_path(target, node), [*parts, archive.sign_end(end, signing)])
    return target


def test_a_drill_names_the_node_with_a_wrong_share(
    story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can see it without the operators; the drill can."""
    holder = backups.verify_backup(story.backup).keys
    node = next(each.nodes[0] for each in holder.values() if each.name == "hooks")
    folder = plant(story, tmp_path / "planted", node, "hooks")
    assert not backups.verify_backup(folder).problems
    assert drill(story, folder, "bob", "carol") == 2
    bad = [each for each in json.loads(capsys.readouterr().out)["keys"] if each["problem"]]
    assert [each["name"] for each in bad] == ["hooks"]
    assert bad[0]["problem"] == f"the archived share of {node} of 'hooks' does not match its commitment"
    assert (bad[0]["shares"], bad[0]["shown"]) == (SHARES - 1, "verifies its own MAC"), "the others suffice"


# --- one node of a cluster that lives is lost ---


def test_a_lost_node_comes_back_and_what_was_destroyed_since_stays_so(story: Story) -> None:
    """Its own archive alone is given back to it. A key that was destroyed after the backup, it hears of and lets go."""
    cluster = story.cluster
    with engine.connect(cluster.client_config) as kq:
        holders = kq.key_info("later").holders
        kq.destroy_key("later")
        for name in KEYS:
            assert kq.key_info(name)
    node = holders[0]
    replace_node(cluster, node, story.signers)
    files = story.contributions(cluster.cluster, "bob", "carol")
    settings = load_settings(cluster.client_config)
    done = backups.restore_backup(settings, story.backup, files)
    assert not done.failed
    assert not done.refused
    assert set(done.counts(node)) <= {"restored", "destroyed", "noted"}
    assert done.counts(node)["restored"] > 1
    for other in set(cluster.nodes) - {node}:
        assert set(done.counts(other)) <= {"present", "destroyed"}
        assert done.counts(other).get("present", 0) > 1
    for other in set(cluster.nodes) - {node}:
        if other not in holders[:1]:
            cluster.stop_node(other)
            break
    try:
        with engine.connect(cluster.client_config) as kq:
            assert kq.decrypt("aes", story.made["aes"]) == b"kept for years"
            kq.verify("ec", b"message", story.made["ec"])
            with pytest.raises(KeyNotFound):
                kq.decrypt("later", story.made["later"])
    finally:
        cluster.start_node(other)


# --- the whole cluster is lost ---


@pytest.fixture(scope="module")
def fresh(story: Story) -> Iterator[LocalCluster]:
    """The cluster after its end: new nodes, a new balancer, and not a key."""
    cluster = reborn(story.cluster, story.root / "fresh", story.signers)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.close()


def test_fewer_operators_than_it_takes_restore_nothing(story: Story, fresh: LocalCluster) -> None:
    settings = load_settings(fresh.client_config)
    (one,) = story.contributions(fresh.cluster, "bob")
    for files in ([], [one], [one, one]):
        done = backups.restore_backup(settings, story.backup, files)
        assert set(done.failed) == set(fresh.nodes)
        assert all("takes contributions of 2 operators" in each for each in done.failed.values())
    with engine.connect(fresh.client_config) as kq:
        assert not kq.list_keys()


def test_what_is_not_for_this_node_or_archive_is_refused(story: Story, fresh: LocalCluster) -> None:
    settings = load_settings(fresh.client_config)
    one, two = story.contributions(fresh.cluster, "bob", "carol")
    given = backups.contributions_of([one, two])
    heads = {node: _parts(backups.archive_path(story.backup, node))[0] for node in fresh.nodes}
    archives = {
        node: backups.read_archive(backups.archive_path(story.backup, node), fresh.cluster)[0] for node in heads
    }
    ours = {node: given[archive.head.run] for node, archive in archives.items()}
    now = backups_now()
    expired, _ = backups.open_archives(
        story.backup, story.operators["carol"], story.opener("carol"), fresh.cluster, now - 60_000, now
    )
    elsewhere, _ = backups.open_archives(
        story.backup,
        story.operators["carol"],
        story.opener("carol"),
        fresh.cluster,
        now + 60_000,
        now,
        bytes(range(32)),
    )
    forged = sign_envelope("backup.piece", 1, b"\x90", SigningKey("carol", Ed25519PrivateKey.generate()))
    tries: dict[str, tuple[bytes, list[bytes], type[EngineError], str]] = {
        "another node's archive": (heads["node2"], ours["node2"], AccessDenied, "restores none but its own"),
        "another archive's contributions": (heads["node1"], ours["node2"], ManifestError, "is for another archive"),
        "an expired one": (heads["node1"], [ours["node1"][0], expired["node1"]], ManifestError, "'carol': expired"),
        "for another key": (
            heads["node1"],
            [ours["node1"][0], elsewhere["node1"]],
            ManifestError,
            "another node's key",
        ),
        "a forged one": (
            heads["node1"],
            [ours["node1"][0], forged],
            ManifestError,
            "the signature of 'carol' is wrong",
        ),
    }
    with zmq.Context() as context, Channel(settings.own_curve(), Servers(settings.source), context) as channel:
        for what, (head, contributions, kind, text) in tries.items():
            with pytest.raises(kind, match=text):
                ask(channel, "node1", SHARE_RESTORE, ShareRestore(b"", 0, head, contributions), 10)
            assert what
        begun = ask(channel, "node1", SHARE_RESTORE, ShareRestore(b"", 0, heads["node1"], ours["node1"]), 10)
        page = _parts(backups.archive_path(story.backup, "node2"))[1]
        with pytest.raises(ManifestError, match="a part of it is signed by 'node2'"):
            ask(channel, "node1", SHARE_RESTORE, ShareRestore(begun.run, 1, page, []), 10)
        with pytest.raises(StaleKey, match="at part 0, sent is 2"):
            ask(channel, "node1", SHARE_RESTORE, ShareRestore(begun.run, 2, page, []), 10)
    with engine.connect(fresh.client_config) as kq:
        assert not kq.list_keys()


RESTORE_POINTS = [point for point in POINTS if point.startswith("holder.restore.")]
EXPORT_POINTS = [point for point in POINTS if point.startswith("holder.export.")]


def test_a_node_that_dies_while_it_is_restored_goes_on(
    story: Story, fresh: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step; what was stored is there, and what was not comes with the next try."""
    settings = load_settings(fresh.client_config)
    files = story.contributions(fresh.cluster, "bob", "carol")
    monkeypatch.setattr(backups, "PART_TIMEOUT_S", 2.0)
    monkeypatch.setattr(backups, "TRIES", 1)
    for point in RESTORE_POINTS:
        fresh.stop_node("node2")
        with monkeypatch.context() as patch:
            # Part 0 is answered; the next one is not.
            patch.setenv(VARIABLE, f"{point}=kill@{1 if point.endswith('taken') else 2}")
            fresh.start_node("node2")
        done = backups.restore_backup(settings, story.backup, files)
        assert set(done.failed) == {"node2"}, point
        assert not done.refused
    fresh.restart("node2")
    done = backups.restore_backup(settings, story.backup, files)
    assert not done.failed
    assert not done.refused
    assert set(done.counts("node2")) <= {"present", "destroyed"}, "it was stored at the first point already"


def test_a_cluster_that_was_lost_wholly_is_restored(
    story: Story, fresh: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """By two of three operators, each by a file of their own; then the registry is made of what the nodes have."""
    told: list[str | Path] = []
    for name in ("operator", "carol"):
        out, folder = story.root / f"{name}.contribution", story.folders[name]
        words = ["--operator", folder, "--passphrase-file", folder / "passphrase", "--out", out]
        manifest = fresh.path / "cluster.manifest"
        assert command("backup", "open", story.backup, *words, "--manifest", manifest, "-o", "json") == 0
        assert json.loads(capsys.readouterr().out)["nodes"] == list(fresh.nodes)
        told += ["--contribution", out]
    assert command("backup", "restore", story.backup, "--config", fresh.client_config, *told, "-o", "json") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["failed"], done["refused"], done["short"]) == ({}, [], [])
    total = sum(each["restored"] + each["present"] for each in done["nodes"].values())
    assert total == SHARES * (len(KEYS) + 3), "each share of each key that was not destroyed"
    fresh.stop_node("balancer")
    config = fresh.path / "balancer" / "balancer.toml"
    assert command("registry", "rebuild", config, "--backup", story.backup, "--without", "node4", "-o", "json") == 0
    assert "more than before" in capsys.readouterr().out
    fresh.start_node("balancer")
    client = fresh.client_config
    client.write_text(client.read_text(encoding="utf-8") + "rotate = false\n", encoding="utf-8")
    with engine.connect(client) as kq:
        assert kq.decrypt("aes", story.made["aes"]) == b"kept for years"
        kq.verify("ec", b"message", story.made["ec"])
        kq.verify("ec", b"anew", kq.sign("ec", b"anew"))
        kq.verify_mac("hooks", b"message", story.made["hooks"])
        kq.verify("rsa", b"message", story.made["rsa"])
        assert {each.name for each in kq.list_keys()} == {*KEYS, "later", "used"}
        with pytest.raises(KeyNotFound):
            kq.key_info("gone")
        # No use of a limited key is made twice: what was given out before, nobody knows.
        assert kq.decrypt("used", story.made["used"]) == b"once"
        with pytest.raises(KeyExhausted):
            kq.encrypt("used", b"once more")
        kq.rotate_key("used")
        assert kq.decrypt("used", kq.encrypt("used", b"once more")) == b"once more"
        kq.refresh_key("ec")
        kq.create_key("new", "aes-256-gcm", threshold=THRESHOLD, shares=SHARES)
    # A share that a node made wrong is named, and not taken.
    node = next(each.nodes[0] for each in backups.verify_backup(story.backup).keys.values() if each.name == "hooks")
    planted = plant(story, story.root / "planted", node, "hooks")
    assert command("backup", "restore", planted, "--config", client, *told, "-o", "json") == 2
    wrong = json.loads(capsys.readouterr().out)["refused"]
    assert any(f"the archived share of {node} of 'hooks' does not match its commitment" in each for each in wrong)
    # Again: nothing is replaced.
    assert command("backup", "restore", story.backup, "--config", client, *told, "-o", "json") == 2
    again = json.loads(capsys.readouterr().out)
    assert not any(each["restored"] for each in again["nodes"].values())
    assert any("epoch 3 of 'ec'" in each for each in again["refused"])
