"""What the control loop shows of itself: pure functions of what it knew."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest

from balancer import view as view_module
from balancer.forecast import ForecastState, predict_load
from balancer.history import History
from balancer.placement import Placement, Step
from balancer.planner import Plan
from balancer.view import TOTAL, TRACK_TICKS, PlanPage, View, Viewer, loads, plan_message, plan_page
from engine.protocol.requests import CLASSES_TOLD, MOVES_TOLD, PLAN, REPLY_CODECS, ClassCount, NodeStats, PlacementMove
from engine.protocol.table import RoutingTable, pack_service

NODES = ("node-0", "node-1", "node-2")
SIGN, SEAL = "sign/ed25519", "encrypt/aes-256-gcm"
SECRET = "very-private-key"
FIRST = 1_800_000_000
HEAD = PlanPage("bal", "prod", 3, "1.2", (FIRST + 50) * 1000, 1000, 50, "", {})
PAGE = Path(view_module.__file__).with_name("page")


def stats(node: int, tick: int) -> NodeStats:
    """A node that has served 10 signatures and 20 encryptions more each tick, the latter with keys of group 7 and 9."""
    classes = [ClassCount(SIGN, 10 * tick, 0, 2_000 * tick), ClassCount(SEAL, 20 * tick, 0, 1_000 * tick)]
    pairs = [(1, 7, 15 * tick), (1, 9, 5 * tick)]
    return NodeStats(bytes([node]) * 16, tick, node, classes, pairs, [], 1, 1000, [(SECRET, 1, 15)], 0)


def table(history: Any, prices: list[int], counter: int = 1) -> RoutingTable:
    classes = list(history.classes)
    return RoutingTable(
        1, counter, 1, 2, list(NODES), classes, pack_service([[100.0] * 3] * len(classes)), prices,
        [1000] * len(classes), [], [], [(0, 0)] * len(classes), 3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> tuple[View, RoutingTable]:
    """A view after 40 ticks, in the last ten of which node-2 was silent; its price is then what silence costs."""
    history, viewer, state = History(NODES, tick_ms=1000, ticks=100), Viewer(), ForecastState()
    for tick in range(40):
        up = NODES if tick < 30 else NODES[:2]
        history.observe(FIRST + tick, {name: stats(number, tick + 1) for number, name in enumerate(up)})
        snapshot = history.snapshot()
        forecast = predict_load(snapshot, state)
        state = forecast.state
        prices = [100 + tick, 200, 300 if tick < 31 else 1_000_000]
        made = table(snapshot, prices, tick + 1)
        view = viewer.see(snapshot, forecast, {7: [0, 1], 9: [1, 2], 800: [0, 2]}, made)
    return view, made


def plan_of(steps: tuple[Step, ...] = (Step(0, 2, True), Step(0, 0, False))) -> Plan:
    placed = Placement(((1, 2), (1, 2)), steps, np.array([0.1, 0.2, 0.3]), 1.5, 2.0, 0.1, 1.0)
    return Plan((7, 9), placed, "2 warm placement groups; 1 new holders would save 25%", NODES)


def page(seen: tuple[View, RoutingTable], plan: Plan | None = None) -> PlanPage:
    """The page as a reader of its JSON has it, who takes nothing that is not as it is declared."""
    told = msgspec.json.encode(plan_page(HEAD, seen[1], seen[0], plan or plan_of()))
    assert SECRET.encode() not in told
    return msgspec.json.decode(told, type=PlanPage, strict=True)


def test_load_and_forecast_are_told_tick_by_tick(seen: tuple[View, RoutingTable]) -> None:
    told = page(seen).history
    assert told is not None
    assert (told.first_ms, told.step_ms, told.ticks) == (FIRST * 1000, 1000, 40)
    sign, seal, whole = (told.series[name] for name in (SIGN, SEAL, TOTAL))
    assert (sign.load[5], seal.load[5], whole.load[5]) == (30.0, 60.0, 90.0)
    assert (sign.load[-1], seal.load[-1]) == (20.0, 40.0)
    moments = {moment.tick: moment for moment in seen[0].moments}
    for at in (10, 25, 39):  # what stands at a tick was said one tick before
        said = moments[FIRST + at - 1]
        assert sign.mean[at] == pytest.approx(said.mean[said.classes.index(SIGN)], rel=1e-3)
        assert sign.p90[at] == pytest.approx(said.p90[said.classes.index(SIGN)], rel=1e-3)
    assert whole.mean[20] == pytest.approx(sign.mean[20] + seal.mean[20], rel=1e-2)  # type: ignore[operator]
    assert (sign.mean[0], whole.mean[0]) == (None, None)  # nobody had said anything yet
    assert len(sign.outlook_mean) == len(sign.outlook_p90) == len(whole.outlook_mean) == 10


def test_prices_are_told_of_nodes_that_answered(seen: tuple[View, RoutingTable]) -> None:
    told = page(seen)
    assert told.history is not None
    assert told.history.prices["node-0"][12] == pytest.approx(0.112)
    assert told.history.prices["node-2"][12] == 0.3
    assert told.history.prices["node-2"][-1] is None
    assert [(each.name, each.up, each.price) for each in told.nodes] == [
        ("node-0", True, 0.139),
        ("node-1", True, 0.2),
        ("node-2", False, 1000.0),
    ]
    assert [each.utilisation for each in told.nodes] == [0.1, 0.2, 0.3]


def test_the_placement_is_told_with_its_plan(seen: tuple[View, RoutingTable]) -> None:
    told = page(seen).placement
    assert told is not None
    # Group 800 is not warm, so it is not told.
    assert [(each.group, each.holders, each.planned) for each in told.groups] == [
        (7, [0, 1], [1, 2]),
        (9, [1, 2], [1, 2]),
    ]
    assert told.groups[0].load > 2 * told.groups[1].load > 0
    assert told.steps == [(7, 2, True), (7, 0, False)]
    assert (told.cost, told.cost_today, told.text) == (1.5, 2.0, plan_of().text)


def test_classes_come_with_the_errors_of_their_forecasts(seen: tuple[View, RoutingTable]) -> None:
    told = page(seen).classes
    assert [each.name for each in told] == [SEAL, SIGN]
    assert (told[0].load, told[1].load) == (40.0, 20.0)
    assert all(each.error.mase is not None and 0 <= each.error.coverage <= 1 for each in told)  # type: ignore[operator]
    assert {each.model for each in told} <= {"ewma", "ridge"}
    assert (page(seen).table or pytest.fail("no table")).service_us[0] == pytest.approx([100.0] * 3, rel=0.04)


def test_before_the_first_table_there_is_only_what_is_known() -> None:
    told = json.loads(msgspec.json.encode(plan_page(HEAD, None, None, Plan())))
    assert (told["balancer"], told["table"], told["history"], told["placement"]) == ("bal", None, None, None)
    assert (told["nodes"], told["classes"]) == ([], [])


def test_a_plan_of_other_nodes_or_none_is_no_harm(seen: tuple[View, RoutingTable]) -> None:
    """The plan is half a minute old at times, and the cluster may have lost nodes since then, or got others."""
    steps = (Step(0, 2, True), Step(0, 1, False), Step(1, 3, True), Step(1, 2, False))
    placed = Placement(((3, 2), (1, 3)), steps, np.zeros(4), 1.0, 1.0, 0.0, 1.0)
    old = Plan((7, 9), placed, "old", ("gone", "node-1", "node-0", "node-2"))
    told = page(seen, old)
    assert told.placement is not None
    assert told.placement.steps == [(7, 0, True), (7, 1, False), (9, 2, True), (9, 0, False)]
    assert [each.planned for each in told.placement.groups] == [[2, 0], [1, 2]]
    assert told.nodes[0].utilisation is None
    lost = replace(old, nodes=("node-1", "node-2", "node-0", "gone"))
    told = page(seen, lost)
    assert told.placement is not None
    # All that is to be done for a group, or nothing.
    assert told.placement.steps == [(7, 0, True), (7, 2, False)]
    assert [each.planned for each in told.placement.groups] == [[], []]
    assert plan_message("bal", 1000, seen[0], lost).moves == [
        PlacementMove(7, "node-0", True),
        PlacementMove(7, "node-2", False),
    ]
    assert page(seen, Plan(text="no plan yet")).placement.cost is None  # type: ignore[union-attr]


def test_the_message_is_bounded_and_names_no_key(seen: tuple[View, RoutingTable]) -> None:
    told = plan_message("bal", 1000, seen[0], plan_of())
    assert [(each.request_class, each.load) for each in told.classes] == [(SEAL, 40_000), (SIGN, 20_000)]
    assert told.classes[0].mean > 0
    assert [(each.group, each.node, each.add) for each in told.moves] == [(7, "node-2", True), (7, "node-0", False)]
    assert told.groups == 2
    many = tuple(Step(number // 3 % 2, number % 3, number % 3 == 0) for number in range(10 * MOVES_TOLD))
    # Nobody is told a part of what is to be done for a group.
    assert len(plan_message("bal", 1000, seen[0], plan_of(many)).moves) == MOVES_TOLD - MOVES_TOLD % 3
    codec = REPLY_CODECS[PLAN]
    raw = codec.encode(told)
    assert codec.decode(raw) == told
    assert SECRET.encode() not in raw
    assert plan_message("bal", 1000, None, Plan()).classes == []
    assert len(view_module.loads(seen[0])) <= CLASSES_TOLD


def test_only_the_last_ticks_are_kept(seen: tuple[View, RoutingTable]) -> None:
    viewer = Viewer()
    for _ in range(TRACK_TICKS + 5):
        view = viewer.see(seen[0].snapshot, seen[0].forecast, seen[0].places, seen[1])
    assert len(view.moments) == TRACK_TICKS
    assert loads(view).tolist() == [40.0, 20.0] or loads(view).tolist() == [20.0, 40.0]


def fields(struct: Any) -> dict[str, set[str]]:
    """Every struct below a struct, by its name, with its fields."""
    found = {struct.__name__: set(struct.__struct_fields__)}

    def look(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            found.update(fields(kind))
        for each in get_args(kind):
            look(each)

    for kind in get_type_hints(struct).values():
        look(kind)
    return found


def test_the_pages_script_reads_only_what_is_told() -> None:
    """Every field that the script names is declared: it reads nothing that is not."""
    script = (PAGE / "status.js").read_text(encoding="utf-8")
    declared = fields(PlanPage)
    everywhere = set().union(*declared.values())
    owners = {
        "plan": "PlanPage",
        "table": "TablePart",
        "history": "HistoryPart",
        "series": "SeriesPart",
        "group": "GroupPart",
    }
    checked = 0
    for owner, name in re.findall(r"\b(plan|table|history|series|group)\.([a-z_0-9]+)\b", script):
        assert name in declared[owners[owner]] | {"map", "some"}, f"{owner}.{name}"
        checked += 1
    for name in re.findall(r"\beach\.([a-z_0-9]+)\b", script):
        assert name in everywhere | {"label", "value"}, f"each.{name}"
    assert checked > 15


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """No address of another place is in the page, its script and styles; uPlot is as it was published."""
    for name in ("status.html", "status.js", "status.css"):
        assert "//" not in re.sub(
            r"^\s*//.*$|(?<=\S) // .*$", "", (PAGE / name).read_text(encoding="utf-8"), flags=re.M
        )
    digests = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    for name, digest in digests.items():
        assert hashlib.sha256((PAGE / name).read_bytes()).hexdigest() == digest
    assert "MIT License" in (PAGE / "LICENSE.uPlot").read_text(encoding="utf-8")
