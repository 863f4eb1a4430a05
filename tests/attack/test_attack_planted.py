"""The attacks find weaknesses: each is planted into one node of a real cluster, and must be found at that node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine import LocalCluster, PolicyRule, connect
from engine.attack import ATTACKS, Attack, Options, Report, Result, Target, Verdict, attack_cluster, load_target
from engine.attack.model import Trial
from engine.attack.stage import Stage
from engine.attack.suite import _play
from engine.attack.target import PREFIX
from engine.client.config import load_identity
from engine.errors import NodeUnavailable

PLANTED = Path(__file__).parent / "planted"
WEAK = {
    "node1": ["gate", "verbs", "times", "canonical"],
    "node2": ["size", "ledger", "short_macs", "listing"],
    "node3": ["handshake", "policy", "nonces"],
    "node4": ["signatures", "oracle", "combiner"],
    "node5": ["release", "existence", "crash", "export"],
}
FOUND = {
    "gate": "transport.strangers",
    "size": "transport.oversized",
    "handshake": "transport.raw-bytes",
    "verbs": "rights.node-verbs",
    "policy": "rights.policy",
    "listing": "rights.listing",
    "existence": "rights.existence",
    "signatures": "grants.forged",
    "times": "grants.out-of-time",
    "combiner": "grants.misfit",
    "ledger": "grants.replayed",
    "release": "shares.without-right",
    "short_macs": "data.macs",
    "oracle": "data.ciphertexts",
    "nonces": "data.nonces",
    "canonical": "frames.malformed",
    "crash": "frames.malformed",
    "export": "rights.backups",
}
"""Which attack finds which weakness."""
ALSO = {
    "ledger": {"node4"},
    "policy": {"node5"},
    "release": {"node4"},
    "existence": {"node3"},
    "export": {"node4"},
    # Two ciphertexts of node3, with its one nonce, may be the same: then each node opens a mixture of them.
    "oracle": set(WEAK),
}
"""Nodes at which the same attack may find the weakness of another."""
RULES = (
    PolicyRule("local", "*", ["*"]),
    PolicyRule("attacker", PREFIX + "*", ["*"]),
    PolicyRule("neighbour", PREFIX + "*", ["encrypt", "decrypt"]),
)


@dataclass
class Weak:
    """A running cluster with weaknesses, as the attacks know it."""

    cluster: LocalCluster
    target: Target


def _not_forked(*_: object) -> int:
    raise OSError("nodes are not forked here")


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weak]:
    path = tmp_path_factory.mktemp("weak")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PLANTED))
        patch.setenv("KEYQUORUM_PLANTED", json.dumps(WEAK))
        # Started anew, each imports what is planted into it.
        patch.setattr("engine.client.local.fork_node", _not_forked)
        clients = ("local", "attacker", "neighbour")
        with LocalCluster(5, 3, path, clients=clients, rules=RULES, start_timeout_s=180.0) as running:
            with connect(running.client_config) as kq:
                kq.create_key("payroll", "aes-256-gcm", threshold=3, shares=5)
            target = load_target(
                running.client_config_of("attacker"),
                second=running.client_config_of("neighbour"),
                node_identities=[path / "nodes" / name / "identity.toml" for name in ("node1", "node3")],
                pids={name: pid for name, pid in running.serving().items() if pid},
            )
            yield Weak(running, target)


@pytest.fixture(scope="module")
def report(weak: Weak) -> Report:
    """One run of all attacks that find something, but for those by which a node dies."""
    only = tuple(sorted({*FOUND.values()} - {"frames.malformed"}))
    return attack_cluster(weak.target, Options(quick=True, only=only, duration_s=0.5))


def result_of(report: Report, attack: str) -> Result:
    return next(result for result in report.results if result.attack.id == attack)


@pytest.mark.parametrize(
    ("node", "weakness"),
    [(node, each) for node, all_ in WEAK.items() for each in all_ if each not in ("crash", "canonical")],
)
def test_a_weakness_is_found_where_it_is(report: Report, node: str, weakness: str) -> None:
    found = result_of(report, FOUND[weakness])
    assert found.verdict is Verdict.FAILED, found.reason
    at = {case.at.removesuffix(" (publish)") for case in found.trial.failures}
    assert node in at, found.trial.failures[:5]
    assert at <= {node} | ALSO.get(weakness, set()), found.trial.failures
    assert found.trial.controls


def test_an_oracle_is_told_from_the_rest(report: Report) -> None:
    failures = result_of(report, FOUND["oracle"]).trial.failures
    assert {case.at for case in failures if "no oracle" in case.what} == {"node4"}


def test_a_crash_and_a_lax_decoder_are_found(weak: Weak) -> None:
    told = attack_cluster(weak.target, Options(quick=True, only=("frames.malformed", "data.macs")))
    found = result_of(told, "frames.malformed")
    assert found.verdict is Verdict.FAILED
    assert any(case.at == "node1" and "bytes" in case.what for case in found.trial.failures), "the lax decoder"
    assert any(case.at == "node5" for case in found.trial.failures) or "node5" in found.reason, found.reason
    assert "node5 was started anew" in found.reason
    # What comes after a crash is not called held.
    assert result_of(told, "data.macs").verdict is Verdict.UNDECIDED


def test_every_attack_that_is_left_out_says_why(report: Report) -> None:
    left_out = [result for result in report.results if result.verdict is Verdict.NOT_RUN]
    assert len(left_out) + len({*FOUND.values()}) - 1 == len(ATTACKS)
    assert {result.reason for result in left_out} == {"not chosen (--only)"}


def test_the_report_names_what_failed_and_holds_no_secret(weak: Weak, report: Report) -> None:
    texts = [report.to_markdown(), json.dumps(report.to_json())]
    assert all("FAILED" in text and "node4" in text for text in texts)
    for path in weak.cluster.path.rglob("identity.toml"):
        if path.parent.name == "operator":
            continue
        secret = load_identity(path).transport.secret.decode()
        key = "".join(path.read_text(encoding="utf-8").split("PRIVATE KEY-----")[1:2]).replace("\\n", "").strip("-\n ")
        assert len(secret) == 40
        for text in texts:
            assert secret not in text
            assert not key or key[:40] not in text


def nothing(stage: Stage, trial: Trial) -> None:
    """An attack that tries nothing."""


def no_control(stage: Stage, trial: Trial) -> None:
    """An attack without a control."""
    trial.case(True, "a refusal", "somewhere", "access-denied")


def bad_control(stage: Stage, trial: Trial) -> None:
    """An attack whose control fails."""
    trial.control(False, "the honest form", "no-answer")
    trial.case(True, "a refusal", "somewhere", "access-denied")


@pytest.mark.parametrize("run", [nothing, no_control, bad_control])
def test_nothing_is_held_without_a_control_that_worked(weak: Weak, run: object) -> None:
    with Stage(weak.target, Options(quick=True)) as stage:
        stage.begin()
        result = _play(Attack("x.y", "", "", "", "", run), stage)  # type: ignore[arg-type]
    assert result.verdict is Verdict.UNDECIDED


def test_an_interrupted_run_destroys_its_keys(weak: Weak) -> None:
    seen: list[str] = []

    def interrupt(result: Result) -> None:
        with connect(weak.cluster.client_config) as kq:
            seen.extend(key.name for key in kq.list_keys(f"{PREFIX}*"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack_cluster(weak.target, Options(quick=True, only=("data.macs",)), interrupt)
    assert len(seen) >= 5
    with connect(weak.cluster.client_config) as kq:
        assert not kq.list_keys(f"{PREFIX}*")
        assert [key.name for key in kq.list_keys("*")] == ["payroll"]


def test_a_cluster_that_is_not_well_is_not_attacked(weak: Weak) -> None:
    weak.cluster.stop_node("node2")
    try:
        with pytest.raises(NodeUnavailable, match=r"not healthy.*node2"):
            attack_cluster(weak.target, Options(quick=True, only=("data",)))
    finally:
        weak.cluster.start_node("node2")
