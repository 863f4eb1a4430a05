"""``keyquorum top``: rates of counters, what a frame says, and the command on the real cluster."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from rich.console import Console
from statuses import node_status

import engine
from engine import Engine, LocalCluster
from engine.cli.main import run
from engine.cli.top import Frame, Meter, Picture, frame_json, make_frame
from engine.client.calls import MemberStatus
from engine.errors import AccessDenied, NodeUnavailable
from engine.protocol.requests import (
    BalancerPlan,
    BalancerStatus,
    CacheCount,
    ClassLatency,
    ClassLoad,
    ForecastAccuracy,
    HostHealth,
    KeyMoves,
    NodeLatency,
    PlacementMove,
    ServiceCount,
    StageLatency,
)
from engine.protocol.table import RoutingTable, pack_service

SIGN, SEAL = "sign/ed25519", "encrypt/aes-256-gcm"
SERVICE = ServiceCount(*[0] * 9)
NOW = datetime(2027, 1, 1, 12, 0, 30, tzinfo=UTC)
WAIT_S = 60.0


def node(name: str, uptime_ms: int, signs: int, errors: int = 0, hits: int = 0, misses: int = 0) -> MemberStatus:
    caches = [CacheCount("keys", 1, 1, hits, misses, 0, 0, 0, 0, 0)]
    status = node_status(node=name, uptime_ms=uptime_ms, shares=5, loaded=4, caches=caches, queue=3)
    stages = [StageLatency("total", signs, 0, 0, 0, 0, 0)]
    classes = [ClassLatency(SIGN, errors, stages), ClassLatency("describe", 0, stages)]
    return MemberStatus(name, "node", "", "", status, None, NodeLatency(name, uptime_ms, classes))


def balancer(*, failing: str = "") -> MemberStatus:
    accuracy = ForecastAccuracy(SIGN, "ridge", 700, 900, 910, 890, 10, -10)
    status = BalancerStatus(
        "bal",
        "1",
        1,
        9_000,
        7,
        2,
        40,
        41,
        failing,
        SERVICE,
        [accuracy],
        [],
        "24 warm placement groups; 1 new holder",
        moves=[KeyMoves("drain", 40, 12, 7, 1)],
        moving="drain: 40 keys, 12 under way",
        host=HostHealth(0, 0, 0, 0),
    )
    load = [ClassLoad(SIGN, 1, 40_000, 50_000, 60_000, 70_000), ClassLoad(SEAL, 0, 9_000, 9_500, 8_000, 8_500)]
    plan = BalancerPlan("bal", 1000, load, 24, [PlacementMove(7, "node2", True), PlacementMove(7, "node1", False)])
    return MemberStatus("bal", "balancer", "", "", status, None, None, plan)


AWAY = MemberStatus("bal", "balancer", "", "", None, NodeUnavailable("bal: no connection"))
TABLE = RoutingTable(
    2, 40, int(NOW.timestamp() * 1000) - 500, 2**50, ["node1", "node2"], [SIGN], pack_service([[100.0, 100.0]]),
    [1_500, 20], [1000], [], [], [(41_000, 52_000)],
)  # fmt: skip


def frame(meter: Meter, *members: MemberStatus, at_s: float = 12.0, table: RoutingTable | None = TABLE) -> Frame:
    return make_frame(members, table, meter, cluster="prod", serial=3, now_s=at_s, now=NOW, over_s=2.0)


def text_of(told: Frame, width: int = 120) -> str:
    console = Console(width=width, markup=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(Picture().draw(told))
    return captured.get()


def begun(*members: MemberStatus) -> Meter:
    """A meter that looked at 10 s."""
    meter = Meter()
    meter.rates(members, 10.0)
    return meter


def test_rates_are_of_what_was_counted_since() -> None:
    meter = begun(node("node1", 5_000, 100, 2, 10, 10), node("node2", 5_000, 0))
    told = frame(meter, node("node1", 7_000, 160, 6, 19, 11), node("node2", 7_000, 20), balancer())
    assert [(row.name, row.per_s, row.errors_per_s) for row in told.classes] == [(SIGN, 40.0, 2.0), (SEAL, 0.0, 0.0)]
    first, second = told.nodes
    assert (first.per_s, first.key_hits, first.share_hits, first.queue, first.price) == (30.0, 0.9, None, 3, 1.5)
    assert (second.per_s, second.key_hits, second.price) == (10.0, None, 0.02)
    assert (told.classes[0].forecast_per_s, told.classes[0].p90_per_s, told.classes[0].mase) == (40.0, 50.0, 0.7)
    assert told.classes[0].tenth_per_s == 60.0


def test_a_node_that_was_started_anew_has_counted_since_then() -> None:
    told = frame(begun(node("node1", 50_000, 1_000)), node("node1", 500, 10))
    assert told.classes[0].per_s == 20.0
    assert frame(Meter(), node("node1", 500, 10)).nodes[0].per_s is None  # seen for the first time


def test_a_node_that_is_silent_is_not_counted_before_it_was_heard_again() -> None:
    silent = MemberStatus("node1", "node", "", "", None, NodeUnavailable("no"))
    meter = begun(node("node1", 1_000, 10))
    told = frame(meter, silent, at_s=11.0)
    assert (told.nodes[0].state, told.nodes[0].per_s, told.answers) == ("node-unavailable", None, False)
    assert frame(meter, node("node1", 5_000, 90), at_s=12.0).nodes[0].per_s is None
    assert frame(meter, node("node1", 6_000, 100), at_s=13.0).nodes[0].per_s == 10.0


def test_a_frame_says_all_of_it() -> None:
    meter = begun(node("node1", 5_000, 0))
    text = text_of(frame(meter, node("node1", 7_000, 100), balancer()))
    assert "prod  manifest 3  12:00:30  1 of 1 nodes up  50.0 requests/s" in text
    assert "bal: up, tick 41; routing table 2:40, 0 s old" in text
    assert [line.split()[:6] for line in text.splitlines() if line.startswith(SIGN)] == [
        [SIGN, "50.0", "40.0", "50.0", "60.0", "0.70"]
    ]
    assert "placement: 24 warm placement groups; 1 new holder" in text
    assert "node2 is to hold group 7" in text
    assert "node1 is to drop group 7" in text
    assert "goes by an earlier decision: no solver" in text_of(frame(meter, balancer(failing="no solver")))


def test_without_a_balancer_the_nodes_are_shown_and_the_last_table() -> None:
    told = frame(begun(node("node1", 5_000, 0)), node("node1", 7_000, 100), AWAY)
    assert (told.has_balancer, told.answers) == (False, True)
    assert (told.classes[0].per_s, told.classes[0].forecast_per_s, told.classes[0].tenth_per_s) == (50.0, 41.0, None)
    assert "bal: away (node-unavailable); clients go on without it" in text_of(told)
    nothing = frame(Meter(), node("node1", 7_000, 100), AWAY, table=None)
    assert "no routing table" in text_of(nothing)
    assert frame_json(nothing)["table"] is None


def test_what_others_say_steers_no_terminal() -> None:
    text = text_of(frame(Meter(), balancer(failing="\x1b[2Jgone\nand more")))
    assert "\x1b" not in text
    assert "?[2Jgone and more" in text


# --- on the real cluster ---


@pytest.fixture
def used(kq: Engine) -> Iterator[Engine]:
    """A client whose key is loaded somewhere."""
    kq.create_key("top/key", "aes-256-gcm", threshold=3, shares=5)
    yield kq
    kq.destroy_key("top/key")


def test_one_frame_of_the_cluster(
    cluster: LocalCluster, used: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done between two looks is in it; each node has a price, and nothing has a key's name."""
    monkeypatch.delenv("KEYQUORUM_CONFIG", raising=False)
    used.encrypt("top/key", b"data")
    asked = used.status

    def busy(*arguments: object, **more: object) -> tuple[MemberStatus, ...]:
        found = asked(*arguments, **more)  # type: ignore[arg-type]
        for _ in range(20):
            used.encrypt("top/key", b"data")
        return found

    monkeypatch.setattr(Engine, "status", lambda self, *words, **more: busy(*words, **more))
    try:
        assert run(["--config", str(cluster.client_config), "-o", "json", "top", "--once", "--every", "0.2"]) == 0
    finally:
        structlog.reset_defaults()
    out = capsys.readouterr().out
    told = json.loads(out)
    assert "top/key" not in out
    (row,) = [each for each in told["classes"] if each["name"] == SEAL]
    assert row["per_s"] * told["over_s"] == pytest.approx(20, abs=0.5)
    assert row["errors_per_s"] == 0
    assert [each["state"] for each in told["nodes"]] == ["up"] * 5
    assert all(each["price"] is not None and each["loaded"] >= 0 for each in told["nodes"])
    assert told["balancer_up"]
    assert told["balancers"][0]["ticks"] > 0


def test_the_plan_is_told_to_whom_the_policy_lets(cluster: LocalCluster) -> None:
    """A balancer tells it who has `status` on some key, and nobody else."""
    for client, allowed in [("auditor", True), ("limited", False), ("nobody", False)]:
        with engine.connect(cluster.path / "clients" / client / "client.toml") as kq:
            (told,) = [each for each in kq.status(plan=True) if each.role == "balancer"]
        assert (told.plan is not None) is allowed, client
        assert isinstance(told.error, AccessDenied) is not allowed


def test_it_draws_on_a_terminal_until_it_is_interrupted(cluster: LocalCluster, tmp_path: Path) -> None:
    """Frame after frame on the other screen; Ctrl-C brings back the terminal as it was, and is no failure."""
    mine, its = pty.openpty()
    # Where the tests run in the background of a shell it is ignored, and would be in the command.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = str(Path(sys.executable).with_name("keyquorum"))
    process = subprocess.Popen(
        [command, "--config", str(cluster.client_config), "top", "--every", "0.2"],
        cwd=tmp_path,
        stdin=its,
        stdout=its,
        stderr=its,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    os.close(its)
    seen = b""
    try:
        end = time.monotonic() + WAIT_S
        while seen.count(b"QUEUE") < 3 and time.monotonic() < end:
            if select.select([mine], [], [], 1.0)[0]:
                seen += os.read(mine, 65536)
        assert seen.count(b"QUEUE") >= 3, seen.decode(errors="replace")
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the other end is closed
            while select.select([mine], [], [], WAIT_S)[0]:
                seen += os.read(mine, 65536)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)
    text = seen.decode(errors="replace")
    assert "\x1b[?1049h" in text
    assert text.rindex("\x1b[?1049l") > text.rindex("\x1b[?1049h")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert "Traceback" not in text
