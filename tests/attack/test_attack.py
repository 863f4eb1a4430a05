"""The attacks against a real cluster that has no known weakness, and what the command refuses to attack."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from engine import LocalCluster, PolicyRule
from engine.attack import ATTACKS, Options, choose, digest_of, load_target
from engine.attack.target import PREFIX
from engine.cli.main import run
from engine.client.config import Identity, create_identity, write_private, write_toml
from engine.errors import AccessDenied, ConfigError
from engine.protocol.manifest import chain_pin, issue_cluster_manifest

COMMAND = Path(sys.executable).with_name("keyquorum")


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The command has the log go to the standard error of its time, which pytest closes."""
    yield
    structlog.reset_defaults()


def test_a_quick_run_holds_on_a_real_cluster(tmp_path: Path) -> None:
    place = tmp_path / "made" / "2026.01"
    command = [str(COMMAND), "attack", "--local", "--quick", "--seed", "7", "--report", str(place), "-o", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    told: dict[str, Any] = json.loads(place.with_name("2026.01.json").read_text(encoding="utf-8"))
    assert ended.returncode == 0, [(e["id"], e["reason"]) for e in told["attacks"] if e["verdict"] != "held"]
    assert told == json.loads(ended.stdout)
    assert told["digest"] == digest_of(told)
    assert told["options"]["seed"] == 7
    assert not told["leftover_keys"]
    verdicts = {each["id"]: each["verdict"] for each in told["attacks"]}
    assert verdicts == {each.id: "not run" if each.slow else "held" for each in ATTACKS}
    for each in told["attacks"]:
        assert each["verdict"] == "not run" or (each["controls"] and each["tried"] and not each["failures"]), each["id"]
    assert sum(each["tried"] for each in told["attacks"]) > 3_000
    text = place.with_name("2026.01.md").read_text(encoding="utf-8")
    assert told["digest"] in text
    assert all(each.id in text for each in ATTACKS)


def test_a_changed_report_has_another_digest() -> None:
    told: dict[str, Any] = {"attacks": [{"id": "x", "verdict": "FAILED"}], "cluster": "c"}
    told["digest"] = digest_of(told)
    assert digest_of(told) == told["digest"]
    told["attacks"][0]["verdict"] = "held"
    assert digest_of(told) != told["digest"]


def test_ids_are_unique_and_every_attack_says_what_it_is() -> None:
    assert len({each.id for each in ATTACKS}) == len(ATTACKS)
    for each in ATTACKS:
        assert all((each.title, each.wants, each.must, each.reference)), each.id
        assert "docs/" in each.reference, each.id


def test_choosing() -> None:
    assert not choose(Options())
    some = choose(Options(only=("grants", "data.m*")))
    assert {each.id for each in ATTACKS if each.id not in some} == {
        *(each.id for each in ATTACKS if each.group == "grants"),
        "data.macs",
    }
    assert "floods.handshakes" in choose(Options(skip=("floods",)))
    assert {each.id for each in ATTACKS if each.slow} == set(choose(Options(quick=True)))
    with pytest.raises(ValueError, match="no attack is called 'nothing'"):
        choose(Options(only=("nothing",)))


@pytest.mark.parametrize(("what", "value"), [("rate", 0), ("rate", 2_001), ("duration_s", 61.0), ("idle", 10_001)])
def test_counts_and_times_have_hard_limits(what: str, value: Any) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Options(**{what: value})


@pytest.mark.parametrize("arguments", [["--rate", "2001"], ["--duration", "61"], ["--idle", "10001"], ["--only", "x"]])
def test_the_command_refuses_what_is_too_much(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attack", "--local", *arguments]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attack", "--list", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in told] == [each.id for each in ATTACKS]


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return create_identity(tmp_path_factory.mktemp("operator") / "op.toml", "op", "operator", passphrase="p")


def member_of(folder: Path, endpoint: str, operator: Identity) -> Path:
    """The configuration of a client of a cluster whose node is at the endpoint; nothing runs."""
    node = create_identity(folder / "n1.toml", "n1", "node")
    client = create_identity(folder / "identity.toml", "app", "client")
    chain = issue_cluster_manifest(
        name="prod",
        members=[operator.member(), node.member(endpoint=endpoint, location="a/b"), client.member()],
        rules=[PolicyRule("app", "*", ["*"])],
        operators=[operator.signing],
    )
    write_private(folder / "cluster.manifest", chain)
    values = {"version": 1, "identity": "identity.toml", "manifest": "cluster.manifest"}
    write_toml(folder / "client.toml", {**values, "manifest_pin": chain_pin(chain).hex()})
    return folder / "client.toml"


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://192.0.2.7:7300", "tcp://node1.example:7300", "tcp://0.0.0.0:7300", "tcp://127.0.0.1.example.com:7300"],
)
def test_a_cluster_elsewhere_is_refused_without_its_typed_name(
    tmp_path: Path, endpoint: str, operator: Identity
) -> None:
    config = member_of(tmp_path, endpoint, operator)
    for given in ({}, {"allow_remote": True}, {"cluster": "prod"}):
        with pytest.raises(ConfigError, match=r"not on this machine's loopback alone.*--cluster prod"):
            load_target(config, **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the configuration is of the cluster 'prod'"):
        load_target(config, allow_remote=True, cluster="other")
    assert load_target(config, allow_remote=True, cluster="prod").cluster.name == "prod"


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:7300", "tcp://127.9.9.9:1", "tcp://localhost:7300", "tcp://[::1]:7"]
)
def test_loopback_needs_no_more(tmp_path: Path, endpoint: str, operator: Identity) -> None:
    assert load_target(member_of(tmp_path, endpoint, operator)).cluster.name == "prod"


def test_another_identity_is_refused_in_its_place(tmp_path: Path, operator: Identity) -> None:
    config = member_of(tmp_path, "tcp://127.0.0.1:7300", operator)
    with pytest.raises(ConfigError, match="must be another one"):
        load_target(config, second=config)
    with pytest.raises(ConfigError, match="no node's identity"):
        load_target(config, node_identities=[tmp_path / "identity.toml"])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match="another pin"):
        load_target(config, second=member_of(other, "tcp://127.0.0.1:7300", operator))


def test_a_client_without_the_right_is_refused(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AccessDenied, match=f"does not allow 'limited' to .*generate.* keys named {PREFIX}"):
        load_target(cluster.client_config_of("limited"))
    assert run(["attack", "--quick", "--config", str(cluster.client_config_of("nobody"))]) == 1
    assert "does not allow 'nobody'" in capsys.readouterr().err
