"""The benchmarks' programs run on a real cluster, say what they were asked for, and leave no process behind.

What they measure here means nothing: the machine is busy with the other tests.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"

ROWS = {
    "warm sign / F",
    "warm GCM 1 KiB / F",
    "warm sign, client in C / F",
    "warm GCM 1 KiB, client in C / F",
    "warm sign / p11-kit",
    "tail sign",
    "tail GCM 1 KiB",
    "64 outstanding, sign / straight",
    "64 outstanding, GCM 1 KiB / straight",
    "8 clients, ECDSA / p11-kit",
    "8 clients, RSA-2048 / p11-kit",
    "import + use + destroy of an AES key",
    "cold sign 3-of-5 / (warm + durable append)",
    "GCM p99, with RSA / alone",
    "memory, worst node",
    "memory, worst client",
    "restarted node's first reply",
    "policy + audit + routing in a warm GCM",
}


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that a program wrote, each with the fields that all have."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        assert {"name", "value", "unit", "peer", "peer_value", "ratio", "target", "met"} <= set(row)
    return rows


def programs_of(folder: str) -> list[str]:
    """Commands of processes that still have to do with a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if folder in command:
                found.append(command)
    return found


@pytest.fixture
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_compare_under_test", BENCH / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_harness_measures_every_row_beside_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpinned, with few operations; each row is there, and those that have a peer say what it took."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output = tmp_path / "rows.json"
    done = run("datapath.py", "--quick", "--placement", "free", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(output)
    assert {row["name"] for row in rows} == ROWS
    assert all(row["value"] > 0 or row["name"].startswith("memory") for row in rows), rows
    compared = [row for row in rows if " / " in row["name"]]
    assert all(row["peer_value"] > 0 and row["ratio"] > 0 for row in compared)
    assert "NOT MEASURED" not in done.stdout, done.stdout
    assert programs_of(str(tmp_path)) == []


@pytest.mark.long
def test_two_nodes_on_one_token_are_measured_beside_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a cluster of their own, and are measured when they are asked for alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output = tmp_path / "rows.json"
    done = run("datapath.py", "--quick", "--only", "one token", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(output)
    assert [row["name"].partition(": ")[2] for row in rows] == ["ECDSA", "RSA-2048", "AES-GCM 1 KiB"]
    assert all(row["peer_value"] > 0 and row["ratio"] > 0 and row["met"] is None for row in rows)
    assert programs_of(str(tmp_path)) == []


@pytest.mark.long
def test_routing_is_measured_on_a_real_cluster_and_in_the_simulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each target has its row, nothing was lost on the cluster, and what is compared has a peer."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output = tmp_path / "rows.json"
    done = run("routing.py", "--quick", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in rows_of(output)}
    for name, must, stretch in (
        ("routing decision, 5 combiners", 3, 1.5),
        ("routing decision, 24 combiners", 5, 3),
        ("one token slowed 5x: p99 / round robin", 0.3, 0.2),
        ("one token slowed 5x: p99 / two choices, own", 0.8, 0.6),
        ("node killed: until p99 is within 1.5x of the settled one", 1, 0.5),
        ("first requests after an epoch change: mean, prewarmed / not", 0.5, 0.3),
        ("first requests after an epoch change: mean, by the client itself / not", 0.5, 0.3),
    ):
        assert (rows[name]["target"], rows[name]["stretch"]) == (must, stretch)
    told = [row for row in rows.values() if row["peer"] == "simulated"]
    policies = 3 + 2 + 3 + 1
    assert [row["target"] for row in told].count(1.15) == [row["target"] for row in told].count(1.3) == policies
    assert all(0 < row["value"] < math.inf and row["peer_value"] > 0 and row["ratio"] >= 1 for row in told)
    assert sum("in another order" in name for name in rows) == 3
    assert [row["value"] for name, row in rows.items() if "without an answer" in name] == [0] * 4
    assert programs_of(str(tmp_path)) == []


@pytest.mark.long
def test_a_soak_loses_nothing_while_nodes_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make soak`, for a minute: results checked, nodes killed and restarted, memory and descriptors flat."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output = tmp_path / "rows.json"
    arguments = ("--seconds", "45", "--kill-every", "8", "--deadline", "15", "--output", output)
    done = run("soak.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    values = {row["name"].partition(":")[0]: row["value"] for row in rows_of(output)}
    assert values["wrong results"] == values["lost operations"] == 0
    assert values["operations"] > 0
    assert values["nodes killed and restarted"] > 0
    assert programs_of(str(tmp_path)) == []


@pytest.mark.long
def test_scale_is_measured_step_by_step_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run makes the keys that are missing, on the nodes of the first; every figure is there at each step."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output, kept = tmp_path / "rows.json", tmp_path / "kept"
    for keys in (20, 45):
        done = run("scale.py", "--keys", str(keys), "--path", kept, "--output", output)
        assert done.returncode == 0, done.stdout + done.stderr
    named: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows_of(output):
        nodes, _, rest = row["name"].partition(", ")
        keys_told, _, what = rest.partition(": ")
        named.setdefault((nodes, keys_told), {})[what] = row["value"]
    steps = {told: values for told, values in named.items() if told[1]}
    assert set(steps) == {("15 nodes", "20 keys"), ("15 nodes", "45 keys"), ("50 nodes", "45 keys")}
    assert all(value > 0 for values in steps.values() for value in values.values() if value is not None)
    again = {"the cluster is started again", "processor time of the cluster from its start until it is idle"}
    assert set(steps["15 nodes", "20 keys"]) == set(steps["15 nodes", "45 keys"]) | again
    assert programs_of(str(tmp_path)) == []


def test_a_regression_is_what_goes_beyond_the_noise_of_two_equal_runs(compare: ModuleType) -> None:
    """The better of both runs counts, and a benchmark that jumps by itself is given more room, up to a limit."""

    def ran(**ratios: float) -> dict[str, dict[str, float]]:
        return {name: {"value": ratio, "floor": 1.0, "ratio": ratio} for name, ratio in ratios.items()}

    quiet = {f"quiet{number}": 1.0 for number in range(20)}
    first = ran(**quiet, steady=1.5, jumpy=1.5, wild=9.0, new=3.0)
    second = ran(**quiet, steady=1.52, jumpy=2.0, wild=2.1, new=3.0)
    baseline = {**quiet, "steady": 1.0, "jumpy": 1.0, "wild": 1.0}
    met = {row["name"]: row["met"] for row in compare.rows(compare.merge(first, second), baseline)}
    assert not met["steady"]
    assert met["jumpy"]
    assert not met["wild"]
    assert met["new"]
    assert all(met[name] for name in quiet)
