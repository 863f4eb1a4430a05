"""``keyquorum doctor``: on a real cluster that is well and then is not, and the limits of each thing it looks at."""

from __future__ import annotations

import json
import shutil
import stat
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from statuses import node_status

import engine
from engine import LocalCluster
from engine.cli import doctor
from engine.cli.doctor import Finding, look_at_folder, look_at_member
from engine.cli.main import run
from engine.client.calls import MemberStatus
from engine.errors import ConfigError, NodeUnavailable
from engine.protocol.requests import ClientSeen, HostHealth, NodeStatus, ServiceCount, TokenHealth

GIB = 1 << 30


def healthy() -> MemberStatus:
    service = ServiceCount(0, 1, 100, 10, 1000, 0, 0, 0, 0)
    status = node_status(node="node1", service=service, host=HostHealth(1, 100 * GIB, 50 * GIB, 10**6))
    return MemberStatus("node1", "node", "tcp://127.0.0.1:1", "site1", status, None, ahead_ms=0, within_ms=1)


def changed(**fields: object) -> MemberStatus:
    """A healthy node but for these fields of its status."""
    member = healthy()
    assert isinstance(member.status, NodeStatus)
    return MemberStatus(
        member.name, member.role, "", "", replace(member.status, **fields), None, ahead_ms=0, within_ms=1
    )


def found(member: MemberStatus, what: str) -> Finding:
    return next(each for each in look_at_member(member) if each.what == what)


def test_nothing_is_wrong_with_a_healthy_node() -> None:
    assert {each.state for each in look_at_member(healthy())} == {"ok"}


@pytest.mark.parametrize(
    ("ahead_ms", "within_ms", "state"),
    [(0, 5, "ok"), (900, 5, "ok"), (-1_500, 5, "warning"), (6_000, 5, "wrong"), (-6_000, 5, "wrong"),
     (6_000, 1_500, "warning"), (6_000, 5_500, "ok"), (None, 0, "warning")],
)  # fmt: skip
def test_clocks(ahead_ms: int | None, within_ms: int, state: str) -> None:
    """An answer that took long says little of the clock."""
    told = healthy()
    member = MemberStatus("node1", "node", "", "", told.status, None, ahead_ms=ahead_ms, within_ms=within_ms)
    assert found(member, "clock").state == state


@pytest.mark.parametrize(
    ("free", "of", "files", "state"),
    [(50, 100, 10**6, "ok"), (5, 100, 10**6, "warning"), (0, 100, 10**6, "wrong"), (100, 100, 10, "wrong"),
     (20, 10_000, 10**6, "warning"), (50, 100, 0, "ok")],
)  # fmt: skip
def test_disks(free: int, of: int, files: int, state: str) -> None:
    assert found(changed(host=HostHealth(1, of * GIB, free * GIB, files)), "disk").state == state


def test_what_is_nearly_used_up_and_what_the_member_complains_of() -> None:
    full = ServiceCount(0, 90, 100, 900, 1000, 0, 0, 0, 0)
    assert found(changed(service=full), "descriptors").state == "warning"
    assert found(changed(service=full), "connections").state == "warning"
    sick = changed(health=TokenHealth("the token is gone", "", 0, 0, 0, 0))
    assert "the token is gone" in found(sick, "trouble").text
    away = MemberStatus("node1", "node", "tcp://10.0.0.1:1", "", None, NodeUnavailable("node1: no connection"))
    assert [each.state for each in look_at_member(away)] == ["wrong"]


def releases(*members: MemberStatus) -> dict[str, Finding]:
    """What is found of the releases of a cluster that has these members."""
    return {each.what: each for each in doctor._releases("kq", members)}


def test_releases_that_differ_are_told_with_who_runs_them() -> None:
    """Of members, of what an operator holds to the protocol before, and of clients that are still connected."""
    new, held = (changed(node=name, protocol=protocol) for name, protocol in (("node1", 2), ("node2", 1)))
    other = MemberStatus("node2", "node", "", "", held.status, None, ahead_ms=0, within_ms=1)
    assert {each.state for each in releases(new, new).values()} == {"ok"}
    mixed = releases(new, other)
    assert (mixed["versions"].state, mixed["protocol"].state) == ("ok", "warning")
    assert mixed["protocol"].text == "1: node2; 2: node1"
    assert "KEYQUORUM_PROTOCOL" in mixed["protocol"].advice
    old = MemberStatus("node2", "node", "", "", replace(node_status(), software="0"), None)
    assert releases(changed(software="1"), old)["versions"].text == "0: node2; 1: node1"
    here, gone = ClientSeen("app", "0", 1, 3, 10), ClientSeen("job", "0", 1, 0, 10)
    found = releases(changed(protocol=2, clients=[here, gone, ClientSeen("web", "1", 2, 1, 10)]))["clients"]
    assert (found.state, found.text) == ("warning", "speak an older protocol: app (0, 1)")
    assert releases(changed(protocol=2, clients=[gone]))["clients"].state == "ok"


def test_a_cluster_that_is_well_and_then_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def examine(*words: str) -> tuple[int, dict[tuple[str, str], Finding]]:
        capsys.readouterr()
        code = run(["doctor", "--config", str(local.client_config), "-o", "json", *words])
        told = [Finding(**each) for each in json.loads(capsys.readouterr().out)["findings"]]
        return code, {(each.where, each.what): each for each in told}

    with LocalCluster(nodes=3, threshold=2, path=tmp_path / "kq") as local:
        home = local.path / "nodes" / "node1"
        code, told = examine("--folder", str(home))
        assert code == 0, [each for each in told.values() if each.state == "wrong"]
        names = {*(f"node{number}" for number in (1, 2, 3)), "balancer"}
        assert all(told[name, what].state == "ok" for name in names for what in ("answer", "clock"))
        assert all(told[name, "disk"].text for name in names)
        assert told[str(home), "configuration"].state == told[str(home), "files"].state == "ok"
        assert told[str(home), "PIN"].state == "warning"
        # Another machine's clock: this process's own, as seen by the members.
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda real=time.time_ns: real() - 60_000_000_000)
            code, told = examine()
        assert code == 2
        assert "ahead of" in told["node2", "clock"].text
        assert told["node2", "clock"].state == "wrong"
        local.stop_node("node3")
        (home / "identity.toml").chmod(0o644)
        code, told = examine("--folder", str(home))
        assert code == 2
        assert told["node3", "answer"].state == "wrong"
        assert told[str(home), "files"].state == told[str(home), "configuration"].state == "wrong"
        assert "identity.toml" in told[str(home), "files"].text
        assert stat.S_IMODE((home / "identity.toml").stat().st_mode) == 0o644  # it changes nothing
        code = run(["doctor", "--config", str(local.client_config)])
        told_text = capsys.readouterr()
        assert code == 2
        assert "node3" in told_text.out
        assert "see its log" in told_text.err
        with engine.connect(local.client_config) as kq:
            assert next(each for each in kq.status() if each.name == "node1").ahead_ms is not None


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no member's folder"):
        look_at_folder(tmp_path)
    (tmp_path / "node.toml").write_text("odd = 1\n", encoding="utf-8")
    (told,) = [each for each in look_at_folder(tmp_path) if each.what == "configuration"]
    assert told.state == "wrong"
    assert "odd" in told.text
    assert run(["doctor", "--host-only", "--folder", str(tmp_path)]) == 2
    assert "odd" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
    assert run(["doctor", "--host-only", "--folder", str(tmp_path)]) == 1


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOCKED_LEAST", 1 << 60)
    monkeypatch.setattr(doctor, "_lines", lambda path: ["Filename Type", "/dev/sda3 partition 1 0 -2"])
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (1 << 20, 1 << 20))
    told = {each.what: each.state for each in doctor.look_at_host()}
    assert told["swap"] == "warning"
    assert told["locked memory"] == "wrong"
