"""The local cluster on real processes: its files, its ends, and what it says when something fails."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine import AccessDenied, ClusterError, ConfigError, LocalCluster, PolicyRule
from engine.client.local import _Stamp
from engine.protocol.manifest import chain_pin, open_chain

SOFTHSM = (
    "/usr/lib/softhsm",
    "/usr/lib/x86_64-linux-gnu/softhsm",
    "/usr/lib/aarch64-linux-gnu/softhsm",
    "/usr/lib64/pkcs11",
)
pytestmark = pytest.mark.skipif(
    not any(Path(folder, "libsofthsm2.so").exists() for folder in SOFTHSM), reason="SoftHSM 2 is not installed"
)


def gone(pid: int, within_s: float = 15.0) -> bool:
    """Whether a process ends within the time."""
    until = time.monotonic() + within_s
    while _Stamp.of(pid) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local") / "kq"


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[LocalCluster]:
    with LocalCluster(
        nodes=3,
        threshold=2,
        path=folder,
        clients=("local", "guest"),
        rules=[PolicyRule("local", "*", ["*"]), PolicyRule("guest", "pub-*", ["sign", "verify"])],
    ) as local:
        yield local


def test_it_serves_and_its_second_client_is_restricted(local: LocalCluster) -> None:
    with engine.connect(local.client_config) as kq, engine.connect(local.client_config_of("guest")) as guest:
        kq.create_key("pub-tls", "ecdsa-p256-sha256", local.threshold, local.shares)
        kq.create_key("own", "aes-256-gcm", local.threshold, local.shares)
        kq.verify("pub-tls", b"m", guest.sign("pub-tls", b"m"))
        with pytest.raises(AccessDenied):
            guest.encrypt("own", b"m")
        with pytest.raises(AccessDenied):
            guest.create_key("pub-mine", "aes-256-gcm", 2, 3)


def test_everything_is_private(local: LocalCluster, folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.name != "node.card":
            assert mode & 0o077 == 0, f"{path} has mode {mode:04o}"


def test_no_secret_is_in_the_command_lines(local: LocalCluster, folder: Path) -> None:
    secrets = [path.read_bytes().strip() for path in (folder / "secrets").iterdir()]
    assert len(secrets) == 4
    for pid in local.running().values():
        told = Path(f"/proc/{pid}/cmdline").read_bytes()
        with contextlib.suppress(PermissionError):  # a hardened process hides it from its own user; root sees it
            told += Path(f"/proc/{pid}/environ").read_bytes()
        assert b"--config" in told
        assert not any(secret in told for secret in secrets)


def test_ports_lie_outside_the_ephemeral_range(local: LocalCluster) -> None:
    for member in (*local.cluster.of_role("node"), *local.cluster.of_role("balancer")):
        assert 20_000 <= int(member.endpoint.rpartition(":")[2]) < 32_000


def test_no_site_holds_two_of_three_nodes(local: LocalCluster) -> None:
    sites = [member.location.partition("/")[0] for member in local.cluster.of_role("node")]
    assert len(set(sites)) == 3


def test_its_operator_signs_by_the_command_line(local: LocalCluster, folder: Path, tmp_path: Path) -> None:
    """What ``keyquorum up`` made is managed like any cluster. Its operator's own copy is the one that all read."""
    out, before = tmp_path / "next.manifest", local.cluster
    passphrase = folder / "secrets" / "operator.passphrase"
    program = "from engine.cli.main import main; main()"
    arguments = ["cluster", "sign", "--operator", folder / "operator", "--passphrase-file", passphrase, "--out", out]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    chain = open_chain(out.read_bytes(), chain_pin((folder / "cluster.manifest").read_bytes()))
    assert chain.serial == before.serial + 1
    assert (chain.members, local.cluster.serial) == (before.members, chain.serial)


def test_a_killed_node_is_told_and_comes_back(local: LocalCluster) -> None:
    with engine.connect(local.client_config) as kq:
        sealed = kq.encrypt("own", b"kept")
        local.kill("node2")
        assert local.running()["node2"] is None
        with pytest.raises(ClusterError, match="does not run"):
            local.kill("node2")
        assert kq.decrypt("own", sealed) == b"kept"
        local.start_node("node2")
        with pytest.raises(ClusterError, match="runs already"):
            local.start_node("node2")
        assert all(member.error is None for member in kq.status())


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def told_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")


def test_nodes_are_forked_from_one_process(local: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python -m nodes`` starts them: command line, environment and log; without that process it starts them."""
    first, second, third = local.nodes
    servers = {parent_of(pid) for name, pid in local.running().items() if pid and name in local.nodes}
    assert len(servers) == 1
    (server,) = servers
    assert "nodes.forkserver" in told_of(server)
    own = ["--config", str(local.path / "nodes" / first / "node.toml")]
    supervisor, child = local.running()[first], local.serving()[first]
    assert supervisor
    assert child
    assert told_of(supervisor)[3:6] == ["nodes", *own]
    assert told_of(child)[3:7] == ["nodes", told_of(child)[4], *own]
    assert told_of(child)[4].startswith(f"--supervised={supervisor}:")
    assert parent_of(child) == supervisor
    assert os.getsid(supervisor) == supervisor != os.getsid(0)
    (loaded,) = [line for line in Path(f"/proc/{child}/maps").read_text().splitlines() if "_fasttoken" in line][:1]
    assert loaded in Path(f"/proc/{server}/maps").read_text(), "it has imported the node itself"

    local.stop_node(second)
    monkeypatch.setenv("KEYQUORUM_LOG_LEVEL", "error")
    before = local.log_file(second).stat().st_size
    local.start_node(second)
    pid = local.running()[second]
    assert pid
    assert parent_of(pid) != server, "it would have what was imported in another environment"
    assert local.log_file(second).stat().st_size == before, "its log tells more than errors"
    assert gone(server), "it serves no purpose any more"

    os.kill(parent_of(pid), signal.SIGKILL)
    local.stop_node(third)
    local.start_node(third)
    pid = local.running()[third]
    assert pid
    assert parent_of(pid) == os.getpid()
    monkeypatch.delenv("KEYQUORUM_LOG_LEVEL")
    local.restart(second)
    with engine.connect(local.client_config) as kq:
        assert kq.decrypt("own", kq.encrypt("own", b"m")) == b"m"


def test_what_is_waited_for_is_told(local: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("engine.client.local.TELL_AFTER_S", 0.0)
    monkeypatch.setattr(local, "_tell", told.append)
    local.kill("node2")
    local.start_node("node2")
    assert [text.partition(";")[0] for text in told[:1]] == ["node2 does not answer yet"]
    assert len(told) == 2
    assert told[1].startswith("node2 serves at")


def test_a_second_start_in_the_same_folder_is_refused(local: LocalCluster, folder: Path) -> None:
    with pytest.raises(ClusterError, match="runs already"):
        LocalCluster(nodes=3, threshold=2, path=folder)
    assert all(local.running().values())


def test_another_process_finds_it_by_its_pid_files(local: LocalCluster, folder: Path) -> None:
    assert LocalCluster.open(folder).running() == local.running()


def test_another_shape_is_refused(local: LocalCluster, folder: Path) -> None:
    with pytest.raises(ValueError, match="holds a cluster of 3 nodes, threshold 2 of 3; asked for were 5 nodes"):
        LocalCluster(nodes=5, threshold=3, path=folder)


def test_unknown_names_are_told(local: LocalCluster) -> None:
    with pytest.raises(ValueError, match="no process 'node9'"):
        local.kill("node9")
    with pytest.raises(ValueError, match="no client 'nobody'"):
        local.client_config_of("nobody")


def test_a_client_can_join_later(local: LocalCluster) -> None:
    config = local.add_client("late", [PolicyRule("late", "own", ["encrypt", "decrypt"])])
    with engine.connect(config) as kq:
        assert kq.decrypt("own", kq.encrypt("own", b"m")) == b"m"
    assert local.clients == ("local", "guest", "late")


def test_it_reopens_from_its_disks_and_a_failing_node_shows_its_log(local: LocalCluster, folder: Path) -> None:
    """Last with this cluster: it is stopped."""
    with engine.connect(local.client_config) as kq:
        sealed = kq.encrypt("own", b"kept")
    pids = [pid for pid in local.running().values() if pid]
    local.close()
    assert all(gone(pid) for pid in pids)
    with LocalCluster(nodes=3, threshold=2, path=folder) as again, engine.connect(again.client_config) as kq:
        assert kq.decrypt("own", sealed) == b"kept"
    config = folder / "nodes" / "node3" / "node.toml"
    config.write_text(config.read_text() + "\nodd = 1\n")
    with pytest.raises(ClusterError, match=r"(?s)node3 could not start.*odd"):
        LocalCluster(nodes=3, threshold=2, path=folder)
    assert not any(LocalCluster.open(folder).running().values())


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and holds no cluster \(mine.txt\)"):
        LocalCluster(nodes=1, threshold=1, path=tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="holds no cluster"):
        LocalCluster.open(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 0}, "0 nodes"),
        ({"nodes": 65}, "65 nodes"),
        ({"nodes": 3, "threshold": 4}, r"threshold 4 must lie in 1\.\.3"),
        ({"nodes": 3, "threshold": 2, "shares": 4}, "4 shares; the cluster has 3 nodes"),
        ({"domains": 0}, "0 domains"),
        ({"clients": ()}, "clients"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalCluster(**values)


def test_it_dies_with_its_parent_unless_detached(tmp_path: Path) -> None:
    """One process makes two clusters of one node and is killed: the attached one ends, the detached one goes on."""
    script = (
        "import sys, time; from engine import LocalCluster\n"
        "a = LocalCluster(nodes=1, threshold=1, path=sys.argv[1] + '/a')\n"
        "b = LocalCluster(nodes=1, threshold=1, path=sys.argv[1] + '/b', detached=True)\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == "ready\n"
            attached = [pid for pid in LocalCluster.open(tmp_path / "a").running().values() if pid]
            attached += [parent_of(attached[0])]
            assert "nodes.forkserver" in told_of(attached[-1])
        finally:
            parent.send_signal(signal.SIGKILL)
    detached = LocalCluster.open(tmp_path / "b")
    try:
        assert len(attached) == 3
        assert all(gone(pid) for pid in attached)
        pids = detached.running()
        assert all(pids.values())
        with engine.connect(detached.client_config) as kq:
            kq.create_key("k", "hmac-sha256", 1, 1)
        detached.start()
        assert detached.running() == pids
    finally:
        detached.stop()
    assert not any(detached.running().values())


def test_a_stale_pid_file_names_nobody(tmp_path: Path) -> None:
    """A process that got the id of an old one is never taken for it."""
    stamp = _Stamp.of(os.getpid())
    assert stamp is not None
    assert _Stamp(stamp.pid, stamp.began + 1) != stamp
    assert _Stamp.of(2**22 + 1) is None


def test_a_temporary_cluster_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told: list[str] = []
    with LocalCluster(nodes=1, threshold=1, on_event=told.append) as local:
        pids = [pid for pid in local.running().values() if pid]
        assert stat.S_IMODE(local.path.stat().st_mode) == 0o700
    assert all(gone(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
    assert told[0].startswith("making a cluster of 1 nodes")


def test_two_starts_at_once_in_one_folder(tmp_path: Path) -> None:
    """Only one of them starts processes; the other is refused, and the first one's can still be ended."""
    path = tmp_path / "kq"
    LocalCluster(nodes=2, threshold=2, path=path, detached=True).stop()
    outcomes: list[object] = []
    handles = [LocalCluster.open(path) for _ in range(3)]

    def start(handle: LocalCluster) -> None:
        try:
            handle.start()
            outcomes.append("started")
        except ClusterError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = LocalCluster.open(path)
    try:
        assert "started" in outcomes
        assert all(each == "started" or "in use by another process" in str(each) for each in outcomes)
        assert all(pid is not None for pid in found.running().values())
    finally:
        found.stop()
        for handle in handles:
            handle.stop()
    assert not any(found.running().values())


def test_a_cut_off_creation_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the tokens are made: the next try makes the cluster in the same folder."""
    path = tmp_path / "kq"

    def cut(self: LocalCluster, names: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalCluster, "_init_tokens", cut)
        with pytest.raises(KeyboardInterrupt):
            LocalCluster(nodes=2, threshold=2, path=path)
    assert [each.name for each in path.iterdir()] == ["lock"]
    with LocalCluster(nodes=2, threshold=2, path=path) as local:
        assert all(local.running().values())
