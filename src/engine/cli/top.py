"""``keyquorum top``: what a cluster does now, drawn again and again.

The load is counted from two answers of the nodes, so it is there without a balancer; forecast and moves come from the
balancer, prices from the table in force.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.cli.local import state_of, troubles_of
from engine.cli.output import Settings, client_config, common_options, one_line, start_logging
from engine.client.calls import MemberStatus
from engine.client.client import Engine, connect
from engine.protocol.requests import BalancerStatus, NodeStatus
from engine.protocol.table import RoutingTable

__all__ = ["top"]

EVERY_S: Final = 1.0
TIMEOUT_S: Final = 2.0
"""A member that does not answer within this is shown as silent: the picture goes on."""
TABLE_WAIT_S: Final = 3.0
"""A table comes once a tick; the first frame waits for it a little."""
TREND: Final = 30
CLASSES_SHOWN: Final = 16
MOVES_SHOWN: Final = 6
SPARKS: Final = "▁▂▃▄▅▆▇█"
WIDTH: Final = 120
"""Of a frame that goes to no terminal."""
MILLI: Final = 1000


@dataclass(frozen=True, slots=True)
class ClassRow:
    """A request class in requests per second: what the nodes answered, and what the balancer expects (None: unknown).

    ``errors_per_s`` were not answered with ok; ``mase`` is the forecast's error of late, over that of saying the last
    count again.
    """

    name: str
    per_s: float
    errors_per_s: float
    forecast_per_s: float | None
    p90_per_s: float | None
    tenth_per_s: float | None
    mase: float | None


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node: its state, queue and price, requests per second, and the part of look-ups that its caches answered."""

    name: str
    state: str
    queue: int | None
    price: float | None
    per_s: float | None
    key_hits: float | None
    share_hits: float | None
    loaded: int | None
    shares: int | None


@dataclass(frozen=True, slots=True)
class BalancerRow:
    """A balancer: its state, the ticks it did, and what its newest plan for the placement groups says."""

    name: str
    state: str
    ticks: int | None
    groups: int | None
    plan: str
    moves: tuple[tuple[int, str, bool], ...]
    """(placement group, node, whether it is to hold it)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What is known at one time; ``table_age_s`` is None where no routing table was heard."""

    cluster: str
    serial: int
    at: datetime
    over_s: float
    classes: tuple[ClassRow, ...]
    nodes: tuple[NodeRow, ...]
    balancers: tuple[BalancerRow, ...]
    table_order: tuple[int, int] | None
    table_age_s: float | None
    troubles: tuple[str, ...]

    @property
    def answers(self) -> bool:
        """Whether any member does."""
        return any(node.loaded is not None for node in self.nodes) or self.has_balancer

    @property
    def has_balancer(self) -> bool:
        """Whether a balancer answers."""
        return any(each.ticks is not None for each in self.balancers)


@dataclass(slots=True)
class _Counted:
    """A node's counters: requests and errors by class, hits and misses by cache."""

    at_s: float
    uptime_ms: int
    requests: dict[str, tuple[int, int]] = field(default_factory=dict)
    caches: dict[str, tuple[int, int]] = field(default_factory=dict)


class Meter:
    """Makes rates of the nodes' counters, from one look to the next."""

    def __init__(self) -> None:
        self._before: dict[str, _Counted] = {}

    def rates(
        self, members: Sequence[MemberStatus], now_s: float
    ) -> tuple[dict[str, dict[str, tuple[float, float]]], dict[str, dict[str, float]]]:
        """By node: requests and errors per second by class, and the part of hits by cache. Without a look before, none.

        A node that was started anew has counted since then.
        """
        per_s: dict[str, dict[str, tuple[float, float]]] = {}
        hits: dict[str, dict[str, float]] = {}
        for member in members:
            if not isinstance(member.status, NodeStatus) or member.latency is None:
                self._before.pop(member.name, None)
                continue
            now = _counted(member, now_s)
            before = self._before.get(member.name)
            self._before[member.name] = now
            if before is None:
                continue
            base = before if now.uptime_ms >= before.uptime_ms else _Counted(now_s - now.uptime_ms / MILLI, 0)
            passed_s = max(1e-3, now.at_s - base.at_s)
            per_s[member.name] = {
                name: tuple(  # type: ignore[misc] # two in, two out
                    max(0, count - was) / passed_s
                    for count, was in zip(counts, base.requests.get(name, (0, 0)), strict=True)
                )
                for name, counts in now.requests.items()
            }
            hits[member.name] = {}
            for cache, (found, missed) in now.caches.items():
                was = base.caches.get(cache, (0, 0))
                more = found - was[0], missed - was[1]
                if sum(more) > 0:
                    hits[member.name][cache] = more[0] / sum(more)
        return per_s, hits


def _counted(member: MemberStatus, now_s: float) -> _Counted:
    assert isinstance(member.status, NodeStatus)  # noqa: S101 - for the type checker
    assert member.latency is not None  # noqa: S101
    counted = _Counted(now_s, member.status.uptime_ms)
    for each in member.latency.classes:
        total = next((stage.count for stage in each.stages if stage.stage == "total"), 0)
        if "/" in each.request_class:  # the other verbs are no load of keys
            counted.requests[each.request_class] = total, each.errors
    for cache in member.status.caches:
        counted.caches[cache.cache] = cache.hits, cache.misses
    return counted


def make_frame(
    members: Sequence[MemberStatus],
    table: RoutingTable | None,
    meter: Meter,
    *,
    cluster: str,
    serial: int,
    now_s: float,
    now: datetime,
    over_s: float,
) -> Frame:
    """What members and table tell; a pure function, but for what the meter remembers."""
    per_s, hits = meter.rates(members, now_s)
    prices = dict(zip(table.nodes, table.price, strict=True)) if table is not None else {}
    nodes = [_node(each, prices, per_s, hits) for each in members if each.role == "node"]
    balancers = [_balancer(each) for each in members if each.role == "balancer"]
    age_s = None if table is None else now.timestamp() - table.issued_ms / MILLI
    return Frame(
        cluster,
        serial,
        now,
        over_s,
        _classes(members, table, per_s),
        tuple(nodes),
        tuple(balancers),
        None if table is None else table.order,
        age_s,
        tuple(f"{each.name}: {text}" for each in members for text in troubles_of(each)),
    )


def _classes(
    members: Sequence[MemberStatus], table: RoutingTable | None, per_s: dict[str, dict[str, tuple[float, float]]]
) -> tuple[ClassRow, ...]:
    told = {each.request_class: each for member in members if member.plan for each in member.plan.classes}
    # The table in force is what is left of a balancer that is away.
    published = dict(zip(table.classes, table.forecast, strict=True)) if table is not None else {}
    errors = {
        each.request_class: each.error / MILLI
        for member in members
        if isinstance(member.status, BalancerStatus)
        for each in member.status.forecasts
        if each.error
    }
    sums: dict[str, tuple[float, float]] = {}
    for classes in per_s.values():
        for name, (requests, failed) in classes.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + requests, before[1] + failed
    rows = []
    for name in {*sums, *told, *published}:
        plan, row = told.get(name), published.get(name)
        mean, p90 = (plan.mean, plan.p90) if plan else row or (None, None)
        rows.append(
            ClassRow(
                name,
                *sums.get(name, (0.0, 0.0)),
                None if mean is None else mean / MILLI,
                None if p90 is None else p90 / MILLI,
                plan.mean_tenth / MILLI if plan else None,
                errors.get(name),
            )
        )
    rows.sort(key=lambda row: (-max(row.per_s, row.forecast_per_s or 0.0), row.name))
    return tuple(rows)


def _node(
    member: MemberStatus,
    prices: dict[str, int],
    per_s: dict[str, dict[str, tuple[float, float]]],
    hits: dict[str, dict[str, float]],
) -> NodeRow:
    price, found = prices.get(member.name), member.status
    told = per_s.get(member.name)
    return NodeRow(
        member.name,
        state_of(member),
        found.queue if isinstance(found, NodeStatus) else None,
        None if price is None else price / MILLI,
        None if told is None else sum(requests for requests, _ in told.values()),
        hits.get(member.name, {}).get("keys"),
        hits.get(member.name, {}).get("shares"),
        found.loaded if isinstance(found, NodeStatus) else None,
        found.shares if isinstance(found, NodeStatus) else None,
    )


def _balancer(member: MemberStatus) -> BalancerRow:
    status, plan = member.status, member.plan
    if not isinstance(status, BalancerStatus):
        return BalancerRow(member.name, state_of(member), None, None, "", ())
    state = f"goes by an earlier decision: {status.last_error}" if status.last_error else state_of(member)
    moves = tuple((move.group, move.node, move.add) for move in plan.moves) if plan else ()
    return BalancerRow(member.name, state, status.ticks, None if plan is None else plan.groups, status.placement, moves)


# --- drawing ---


class Picture:
    """Draws frames; it remembers the course of each class, and what was planned before."""

    def __init__(self) -> None:
        self._trends: dict[str, deque[float]] = {}

    def draw(self, frame: Frame) -> RenderableType:
        """One frame."""
        for row in frame.classes:
            self._trends.setdefault(row.name, deque(maxlen=TREND)).append(row.per_s)
        parts: list[RenderableType] = [self._head(frame), Text(), self._load(frame), Text(), self._nodes(frame), Text()]
        parts += self._placement(frame)
        parts += [Text(one_line(text), style="yellow") for text in frame.troubles]
        return Group(*parts)

    def _head(self, frame: Frame) -> RenderableType:
        up = sum(node.state == "up" for node in frame.nodes)
        whole = sum(row.per_s for row in frame.classes)
        line = Text.assemble(
            (one_line(frame.cluster), "bold"),
            f"  manifest {frame.serial}  {frame.at:%H:%M:%S}  {up} of {len(frame.nodes)} nodes up"
            f"  {_number(whole)} requests/s",
        )
        lines = [line]
        for each in frame.balancers:
            if each.ticks is None:
                lines.append(Text(f"{each.name}: away ({each.state}); clients go on without it", "bold red"))
            else:
                lines.append(Text(one_line(f"{each.name}: {each.state}, tick {each.ticks}")))
        if frame.table_order is not None and frame.table_age_s is not None:
            epoch, counter = frame.table_order
            lines[-1].append(f"; routing table {epoch}:{counter}, {max(0.0, frame.table_age_s):.0f} s old")
        else:
            lines[-1].append("; no routing table")
        return Group(*lines)

    def _load(self, frame: Frame) -> RenderableType:
        table = _grid("CLASS", "NOW /s", "NEXT", "P90", "TENTH", "MASE", "ERRORS /s", "COURSE")
        for row in frame.classes[:CLASSES_SHOWN]:
            table.add_row(
                one_line(row.name),
                _number(row.per_s),
                _number(row.forecast_per_s),
                _number(row.p90_per_s),
                _number(row.tenth_per_s),
                "-" if row.mase is None else f"{row.mase:.2f}",
                Text(_number(row.errors_per_s), "red" if row.errors_per_s else ""),
                _sparks(self._trends[row.name]),
            )
        if not frame.classes:
            table.add_row("no requests", *["-"] * 7)
        return table

    def _nodes(self, frame: Frame) -> RenderableType:
        table = _grid("NODE", "QUEUE", "PRICE", "REQUESTS /s", "KEY HITS", "SHARE HITS", "LOADED", "SHARES", "STATE")
        for row in frame.nodes:
            table.add_row(
                row.name,
                _count(row.queue),
                "-" if row.price is None or row.queue is None else f"{row.price:.3g}",
                _number(row.per_s),
                _part(row.key_hits),
                _part(row.share_hits),
                _count(row.loaded),
                _count(row.shares),
                Text(one_line(row.state), "" if row.state == "up" else "bold red"),
            )
        return table

    def _placement(self, frame: Frame) -> list[RenderableType]:
        lines: list[RenderableType] = []
        for each in frame.balancers:
            if each.ticks is None:
                continue
            lines.append(Text(one_line(f"placement: {each.plan}")))
            for group, node, add in each.moves[:MOVES_SHOWN]:
                what = ("is to hold", "green") if add else ("is to drop", "yellow")
                lines.append(Text.assemble("  ", (f"{node} {what[0]}", what[1]), f" group {group}"))
            if len(each.moves) > MOVES_SHOWN:
                lines.append(Text(f"  and {len(each.moves) - MOVES_SHOWN} more"))
        return lines


def _grid(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        right = number > 0 and name not in ("STATE", "COURSE")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _sparks(values: Sequence[float]) -> str:
    high = max(values, default=0.0)
    if high <= 0:
        return SPARKS[0] * len(values)
    return "".join(SPARKS[min(len(SPARKS) - 1, int(value / high * len(SPARKS)))] for value in values)


# --- as JSON ---


def frame_json(frame: Frame) -> dict[str, Any]:
    """The frame for programs."""
    return {
        "cluster": frame.cluster,
        "serial": frame.serial,
        "at": frame.at.isoformat(timespec="milliseconds"),
        "over_s": round(frame.over_s, 3),
        "balancer_up": frame.has_balancer,
        "table": None
        if frame.table_order is None
        else {
            "fencing_epoch": frame.table_order[0],
            "counter": frame.table_order[1],
            "age_s": round(frame.table_age_s or 0.0, 3),
        },
        "classes": [_plain(each) for each in frame.classes],
        "nodes": [_plain(each) for each in frame.nodes],
        "balancers": [
            _plain(each) | {"moves": [{"group": group, "node": node, "add": add} for group, node, add in each.moves]}
            for each in frame.balancers
        ],
        "troubles": list(frame.troubles),
    }


def _plain(row: ClassRow | NodeRow | BalancerRow) -> dict[str, Any]:
    told = {name: getattr(row, name) for name in row.__slots__}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in told.items()}


# --- the command ---


def _frames(kq: Engine, timeout_s: float, every_s: float) -> Iterator[Frame]:
    """A frame each so many seconds, for ever. The first comes after two looks, since rates need them."""
    meter = Meter()
    begun = looked = time.monotonic()
    meter.rates(kq.status(latency=True, timeout=timeout_s), begun)
    while kq.routing_table is None and time.monotonic() < begun + TABLE_WAIT_S:
        time.sleep(0.05)
    due = max(begun + every_s, time.monotonic())
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        members = kq.status(latency=True, plan=True, timeout=timeout_s)
        now_s = time.monotonic()
        yield make_frame(
            members,
            kq.routing_table,
            meter,
            cluster=kq.cluster.name,
            serial=kq.cluster.serial,
            now_s=now_s,
            now=datetime.now().astimezone(),
            over_s=now_s - looked,
        )
        looked, due = now_s, max(due + every_s, time.monotonic())


@click.command()
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=EVERY_S, metavar="SECONDS", help="From one to the next."
)
@common_options(connects=True)
@click.pass_context
def top(context: click.Context, once: bool, every: float) -> None:
    """Show live what the cluster does.

    Load and forecast by request class, queue, price and hit rates of the nodes, and the moves that are planned. The
    load is what the nodes answered since the frame before; NEXT, P90 and TENTH is what the balancer expects in its
    next tick and in the tenth. PRICE is how long the others wait for one second more of a node's work. Ctrl-C ends it.
    It needs `status` on some key. With -o json each frame is one line. With --once it exits with 2 if nobody answers.

    \b
    Examples:
      keyquorum top
      keyquorum top --once
      keyquorum top -o json --every 10
    """
    settings: Settings = context.obj
    start_logging(settings)
    with connect(client_config(settings)) as kq:
        frames = _frames(kq, settings.timeout_s or TIMEOUT_S, every)
        try:
            if once:
                frame = next(frames)
                _print(settings, Picture(), frame)
                if not frame.answers:
                    context.exit(2)
            elif settings.json or not sys.stdout.isatty():
                picture = Picture()
                for frame in frames:
                    _print(settings, picture, frame)
            else:
                _live(frames)
        except KeyboardInterrupt:
            if once:
                raise


def _print(settings: Settings, picture: Picture, frame: Frame) -> None:
    if settings.json:
        click.echo(json.dumps(frame_json(frame), ensure_ascii=False))
        sys.stdout.flush()
        return
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, markup=False, highlight=False).print(picture.draw(frame))


def _live(frames: Iterator[Frame]) -> None:
    """Draw over the whole terminal, which is as it was afterwards."""
    picture = Picture()
    console = Console(markup=False, highlight=False)
    with Live(Text("asking"), console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        for frame in frames:
            live.update(picture.draw(frame), refresh=True)
