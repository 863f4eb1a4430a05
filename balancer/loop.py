"""The two loops of the process: the control loop in its own thread, and the service that answers members.

They share one immutable ``Standing``. The service never waits for the control loop; the control loop asks the registry
nothing but whether this balancer leads. One that stands by observes and publishes nothing, and sends the nodes to the
one that leads. What is decided is decided elsewhere, in pure functions; here are the clock and the sockets.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import structlog
import zmq

from balancer.bank import Bank, accuracy
from balancer.features import HORIZONS
from balancer.forecast import Forecast, ForecastState, predict_load
from balancer.groups import GroupPlaces, overlaid
from balancer.hints import plan_hints
from balancer.history import SLOW_MS, History, HistorySnapshot
from balancer.issue import TableIssuer
from balancer.migrate import Kind, Progress
from balancer.mover import Heard, Mover, Whereabouts
from balancer.optimizer import RoutingSolver, optimize_assignment
from balancer.plan import TableStamp, assignment_problem, generate_routing_table, pair_load, reissue_table
from balancer.planner import Plan, Planner
from balancer.registry import Registry
from balancer.series import ExternalSeries
from balancer.store import HistoryStore
from balancer.strain import Strain
from balancer.view import View, Viewer, plan_message
from engine._version import __version__
from engine.client.admission import Admission, Clients, ServiceLimits, Turns, welcome
from engine.client.bundles import answer_bundle, answer_bundle_at_once, check_bundle
from engine.client.config import CurveSource, Identity
from engine.client.listener import Incoming, Listener
from engine.client.membership import Servers
from engine.client.process import host_health
from engine.client.publications import Publisher
from engine.client.spreading import Desk, pull
from engine.client.transport import Arrival, Channel, Moved, raise_for_status
from engine.errors import AccessDenied, EngineError, Overloaded, ProtocolError, RegistryUnavailable
from engine.keys import RequestType
from engine.protocol.manifest import ClusterSource, FollowsCluster
from engine.protocol.requests import (
    BUNDLED_REGISTRY_VERBS,
    DEGRADED,
    DEGRADED_TOLD,
    HELD_TOLD,
    HELLO,
    HOLDINGS,
    MANIFEST_FETCH,
    MANIFEST_OFFER,
    PLAN,
    REGISTRY_ABORT,
    REGISTRY_CHANGE,
    REGISTRY_COMMIT,
    REGISTRY_DESTROY,
    REGISTRY_LACKING,
    REGISTRY_MANY,
    REGISTRY_OUTCOME,
    REGISTRY_QUOTA,
    REGISTRY_RESERVE,
    REGISTRY_SETTINGS,
    REGISTRY_SYNC,
    REGISTRY_VERBS,
    REPLY_CODECS,
    REQUEST_CODECS,
    STATS,
    TABLE,
    BalancerPlan,
    BalancerStatus,
    Bundle,
    BundleResults,
    Change,
    Commit,
    Committed,
    Degraded,
    DegradedKey,
    DegradedPage,
    Destroy,
    Empty,
    ForecastAccuracy,
    Held,
    Hello,
    Holdings,
    HoldingsPage,
    KeyMoves,
    Lacking,
    ManifestFetch,
    ManifestOffer,
    ManifestPiece,
    ManifestTaken,
    NodeStats,
    Outcome,
    OutcomeReply,
    Quota,
    QuotaGranted,
    Reserve,
    Reserved,
    ServiceCount,
    Settings,
    SettingsBooked,
    Sync,
    SyncPage,
    Table,
    Welcome,
    balancer_status_codec,
)
from engine.protocol.table import TABLE_MAX, RoutingTable
from engine.protocol.wire import ErrorBody, Status, error_codec

__all__ = ["QUEUED_TABLES", "ControlLoop", "Service", "Standing", "Told", "Work", "decide"]

STATS_PART = 0.5
"""The part of a tick that the nodes have to answer in."""
STOP_S = 0.2
"""How long a stop may have to wait for an answer under way."""
SOLVER_PART = 0.3
"""The part of a tick that the solver may take."""
LIFETIME_TICKS = 10
LIFETIME_MS_MIN = 10_000
BURST = 256
"""How many requests are answered before the service looks at its other events."""
ERROR_MAX = 500
SAVE_S = 5.0
"""So often what was counted goes to the disk; a balancer that is killed loses no more."""
RESAVED_STEPS = 10
"""So many steps before those that are new are written again: late reports may have added to them."""
FORECASTS_TOLD = 128
SHAPE_S = 30.0
FEW_KEYS = 100
"""How often it is looked what shape the keys have; with fewer keys each second."""
CLOCK_SET_S = 30.0
"""Steps go by the clock again when it is so far from where it would be by the monotonic one: it was set."""
USUAL_SHAPE = (2, 3)
"""Threshold and shares that keys are taken to have while there are none."""
QUEUED_TABLES = 4
"""A subscriber that lags further behind loses tables: only the newest counts."""

log = structlog.get_logger()


def now_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the control loop stands: the table in force, the sealed whole one, ticks done, what is wrong now if any.

    ``view`` is what was known when that table was decided.
    """

    table: RoutingTable | None = None
    sealed: bytes = b""
    ticks: int = 0
    counter: int = 0
    last_error: str = ""
    learned: ForecastState = field(default_factory=ForecastState)
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What the ticks took: how many, seconds in all, failures, and when the last ended by the monotonic clock."""

    ticks: int = 0
    seconds: float = 0.0
    failures: int = 0
    ended_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Told:
    """What the service tells other threads once a second, seen at ``seen_s`` by the monotonic clock."""

    service: ServiceCount
    keys: int
    seen_s: float


def decide(
    snapshot: HistorySnapshot,
    stamp: TableStamp,
    time_limit_s: float,
    forecast: Forecast | None = None,
    *,
    solver: RoutingSolver | None = None,
    places: Mapping[int, Sequence[int]] | None = None,
    before: RoutingTable | None = None,
    moved: Sequence[tuple[int, Sequence[int]]] = (),
) -> RoutingTable:
    """One decision, a pure function of the snapshot: forecast (if none is given), assignment, hints, table.

    ``solver`` only makes it quicker; ``places`` are the nodes that hold the warm groups, and ``moved`` those of groups
    that are not where they would be; ``before`` is the table in force, whose hints stay for as long as they have some
    use.
    """
    forecast, places = forecast or predict_load(snapshot), places or {}
    problem = assignment_problem(snapshot, forecast, pair_load(snapshot, forecast, places))
    assignment = optimize_assignment(problem, time_limit_s=time_limit_s, solver=solver)
    hinted = before.hints if before is not None and tuple(before.nodes) == snapshot.nodes else ()
    hints = plan_hints(snapshot, forecast, problem, assignment, places, hinted)
    return generate_routing_table(snapshot, forecast, assignment, stamp, groups=moved, hints=hints)


class ControlLoop(FollowsCluster):
    """Observe, forecast, optimise, publish: once a tick, for ever, whatever fails."""

    def __init__(
        self,
        context: zmq.Context[Any],
        identity: Identity,
        own: CurveSource,
        cluster: ClusterSource,
        publisher: Publisher,
        *,
        term: Callable[[], int],
        tick_ms: int,
        history_ticks: int,
        series: ExternalSeries | None = None,
        store: HistoryStore | None = None,
        mover: Mover | None = None,
    ) -> None:
        self._context = context
        self._identity = identity
        self._own = own
        self._source = cluster
        self._publisher = publisher
        self._term = term
        self._led = 0
        self._tick_ms = tick_ms
        self._tick_s = tick_ms / 1000
        self._lifetime_ms = max(LIFETIME_MS_MIN, LIFETIME_TICKS * tick_ms)
        self._history_ticks = history_ticks
        self._history = History(tuple(cluster.cluster.nodes), tick_ms=tick_ms, ticks=history_ticks)
        self._series = series or ExternalSeries(())
        self._store = store
        self._mover = mover
        self._strain = Strain()
        self._heard_s: dict[str, float] = {}
        self._saved: tuple[int, int] | None = None
        self._learned: ForecastState | None = None
        self._heard: frozenset[str] = frozenset()
        self._ahead = ""
        self._tried_s: dict[str, float] = {}
        self._solver = RoutingSolver()
        self._issuer = TableIssuer(identity.signing)
        self._places = GroupPlaces()
        self._planner = Planner()
        self._viewer = Viewer()
        self.shape = USUAL_SHAPE
        """Threshold and shares of most keys."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control-loop", daemon=True)
        self.standing = Standing()
        self.work = Work(ended_s=time.monotonic())

    def start(self) -> None:
        """Begin; the publisher is the loop's until ``stop``."""
        self._thread.start()

    def stop(self) -> None:
        """End after the tick under way, and wait for that."""
        self._stop.set()
        self._thread.join()
        self._planner.stop()
        self._series.stop()
        if self._store is not None:
            self._store.close()

    @property
    def plan(self) -> Plan:
        """The newest plan for the placement groups."""
        return self._planner.plan

    @property
    def progress(self) -> Progress:
        """What the mover has under way, and what waits."""
        return Progress() if self._mover is None else self._mover.progress

    @property
    def tick_ms(self) -> int:
        """From one tick to the next."""
        return self._tick_ms

    @property
    def series_problems(self) -> dict[str, str]:
        """The external series that are left out now, and why."""
        return self._series.problems

    def _run(self) -> None:
        # Steps are numbered since the epoch, so that what was counted before a restart has its place; from here on by
        # the monotonic clock.
        first = now_ms() // self._tick_ms
        self._restore(first - 1)
        self._series.start()
        begun, tick = time.monotonic(), 0
        with Channel(self._own, Servers(self._source), self._context, watchful=True) as channel:
            channel.dial(self._cluster.nodes)
            while not self._stop.wait(max(0.0, begun + tick * self._tick_s - time.monotonic())):
                started, step = time.monotonic(), now_ms() // self._tick_ms
                if abs(step - first - tick) * self._tick_s > CLOCK_SET_S:
                    self._begin_anew(first + tick, step)
                    begun, first, tick = started, step, 0
                try:
                    self._tick(channel, first + tick)
                except Exception as error:  # the loop outlives every failure; the data path does not need this tick
                    self._failed("tick", error)
                now, work = time.monotonic(), self.work
                self.work = Work(work.ticks + 1, work.seconds + now - started, work.failures, now)
                # Ticks are numbered by the clock, so that a late one counts for those it missed.
                tick = max(tick + 1, int((time.monotonic() - begun) / self._tick_s))
        self._save(first + tick)

    def _tick(self, channel: Channel, tick: int) -> None:
        self._follow_members(channel)
        term = self._term()
        if term != self._led:
            self._change_term(term, tick)
        if not term:
            return
        reports = self._observe(channel)
        dropped = self._history.observe(tick, reports)
        if dropped:
            log.warning("statistics dropped", nodes=dropped, reason="they can't be true")
        before = self.standing
        now = now_ms()
        stamp = TableStamp(term, before.counter + 1, now, now + self._lifetime_ms, self._cluster.serial)
        try:
            snapshot = self._with_series(self._history.snapshot())
            forecast = predict_load(snapshot, self._learned)
            self._learned = forecast.state
            where = self._exchange(reports)
            warm = [group for _, group in snapshot.pairs]
            ruled = self._places.of(self._cluster, snapshot.nodes, warm, self.shape[1])
            held = {group: crowd.holders for group in ruled if (crowd := where.held.get(group)) is not None}
            places = overlaid(ruled, held, snapshot.nodes)
            limit_s = SOLVER_PART * self._tick_s
            moved = self._moved(where, places)
            table = decide(
                snapshot, stamp, limit_s, forecast, solver=self._solver, places=places, before=before.table, moved=moved
            )  # fmt: skip
            # A plan goes on from where groups are when those before it are carried out.
            planned = overlaid(places, where.targets, snapshot.nodes)
            self._planner.offer(snapshot, forecast, self._cluster, planned, self.shape, where.held)
            view: View | None = self._viewer.see(snapshot, forecast, places, table)
            error = ""
        except Exception as failure:  # whatever it is, the last good table stays
            error = self._failed("decision", failure)
            if before.table is None:
                return
            table, view = reissue_table(before.table, stamp), before.view
        if self._term() != term:
            return  # whoever leads by now has published a newer one
        issued = self._issuer.issue(table)
        if issued.remark:
            log.warning(issued.remark)
        learned = self._learned or ForecastState()
        self.standing = Standing(issued.table, issued.whole, before.ticks + 1, stamp.counter, error, learned, view)
        self._publisher.look(self._cluster)
        self._publisher.publish(issued.message)
        if self._saved is None or (tick - self._saved[0]) * self._tick_s >= SAVE_S:
            self._save(tick)

    def _change_term(self, term: int, tick: int) -> None:
        """This balancer begins to lead, or to stand by: what it knew of the load is of another time."""
        if self._led or self.standing.ticks:
            self._save(tick)
            self._history = History(self._history.nodes, tick_ms=self._tick_ms, ticks=self._history_ticks)
            self._learned = self._saved = None
            self._restore(tick - 1)
        self._led = term
        self.standing = Standing()

    def _exchange(self, reports: Mapping[str, NodeStats]) -> Whereabouts:
        """Tell the mover what was heard and planned; what it tells of where groups are."""
        if self._mover is None:
            return Whereabouts()
        strain = self._strain.observe(reports, calm=self._mover.calm)
        now_s = time.monotonic()
        heard_s = {node: self._heard_s.get(node, now_s) for node in self._cluster.nodes}
        self._heard_s = heard_s | dict.fromkeys(reports, now_s)
        silent_s = {node: now_s - at_s for node, at_s in self._heard_s.items() if node not in reports}
        self._mover.see(Heard(frozenset(reports), silent_s, strain), self._planner.plan)
        return self._mover.whereabouts

    def _moved(self, where: Whereabouts, places: Mapping[int, Sequence[int]]) -> list[tuple[int, Sequence[int]]]:
        """The warm groups that are not where the manifest's rule has them, once all of their keys are there.

        More holders than a client ordered are not by the rule either: who knows the key by its first ones is to hear of
        the others.
        """
        return [
            (group, nodes)
            for group, nodes in places.items()
            if (crowd := where.held.get(group)) is not None
            and group not in where.unsettled
            and (len(crowd.holders) != crowd.shares or self._places.moved(self._cluster, group, crowd.holders))
        ]

    def _with_series(self, snapshot: HistorySnapshot) -> HistorySnapshot:
        known = self._series.known(snapshot.tick, len(snapshot.counts), snapshot.tick_ms)
        if known is None:
            return snapshot
        slow = snapshot.slow
        of_slow = None if slow is None else self._series.known(slow.step, len(slow.counts), slow.step_ms)
        return replace(snapshot, known=known, slow_known=of_slow)

    def _begin_anew(self, tick: int, step: int) -> None:
        """Go on at another step than the one that was due, with what is known of the time before that."""
        log.warning("the clock was set", by_s=round((step - tick) * self._tick_s), then="the history goes by it")
        self._save(tick)
        self._history = History(self._history.nodes, tick_ms=self._tick_ms, ticks=self._history_ticks)
        self._learned = self._saved = None
        self._restore(step - 1)

    def _restore(self, tick: int) -> None:
        """Begin with what an earlier process counted; without it if anything is wrong with that."""
        if self._store is None:
            return
        try:
            fast, slow = self._store.load(tick, tick * self._tick_ms // SLOW_MS - 1)
            self._history.restore(tick, fast, slow)
            log.info("history read", ticks=len(fast.steps), minutes=len(slow.steps), pairs=len(fast.pairs))
        except Exception as error:
            self._failed("history", error)

    def _save(self, tick: int) -> None:
        if self._store is None:
            return
        minute = tick * self._tick_ms // SLOW_MS
        saved = self._saved or (tick - RESAVED_STEPS, minute - RESAVED_STEPS)
        self._store.save(*self._history.stored(saved[0] - RESAVED_STEPS, saved[1] - 1))
        self._saved = tick, minute

    def _follow_members(self, channel: Channel) -> None:
        """Take a manifest that a node has and this process not, and go on with the members of the newest."""
        ahead, self._ahead = self._ahead, ""
        if ahead:
            try:
                pull(channel, ahead, self._source)
            except EngineError as error:
                log.warning("no manifest", member=ahead, reason=str(error))
        nodes = tuple(self._cluster.nodes)
        if self._history.nodes != nodes:
            self._history.follow(nodes)
            channel.dial(nodes)
            self._heard &= set(nodes)

    def _failed(self, what: str, error: Exception) -> str:
        text = f"{what}: {type(error).__name__}: {error}"[:ERROR_MAX]
        log.error("control loop failed", what=what, exc_info=not isinstance(error, EngineError), error=text)
        self.standing = replace(self.standing, ticks=self.standing.ticks + 1, last_error=text)
        self.work = replace(self.work, failures=self.work.failures + 1)
        return text

    # --- observing ---

    def _observe(self, channel: Channel) -> dict[str, NodeStats]:
        """Ask every node, in parallel; those that do not answer in time are missing.

        Waiting for the connection of a node that is down costs time. So the nodes that answered last time are asked and
        heard first, and what is left of the time goes to the others, the longest untried first.
        """
        until = time.monotonic() + STATS_PART * self._tick_s
        reports: dict[str, NodeStats] = {}
        self._ask(channel, sorted(self._heard), until, reports)
        silent = sorted(set(self._cluster.nodes) - self._heard, key=lambda name: self._tried_s.get(name, 0.0))
        self._ask(channel, silent, until, reports)
        self._tell_changes(frozenset(reports))
        return reports

    def _ask(self, channel: Channel, nodes: Sequence[str], until: float, reports: dict[str, NodeStats]) -> None:
        body = REQUEST_CODECS[STATS].encode(Empty())
        waiting: set[int] = set()
        for node in nodes:
            left = until - time.monotonic()
            if left <= 0 or self._stop.is_set():
                break
            self._tried_s[node] = time.monotonic()
            try:
                waiting.add(channel.start(node, STATS, body, left))
            except EngineError as error:
                log.debug("no statistics", node=node, error=str(error))
            self._collect(channel.poll(0), waiting, reports)
        while waiting and (left := until - time.monotonic()) > 0 and not self._stop.is_set():
            self._collect(channel.poll(min(left, STOP_S)), waiting, reports)
        for token in waiting:
            channel.abandon(token)

    def _collect(self, arrivals: Sequence[Arrival], waiting: set[int], reports: dict[str, NodeStats]) -> None:
        for arrival in arrivals:
            waiting.discard(arrival.token)
            self._arrived(arrival, reports)

    def _arrived(self, arrival: Arrival, reports: dict[str, NodeStats]) -> None:
        try:
            if arrival.reply is None:
                raise arrival.error or ProtocolError("neither reply nor error")
            raise_for_status(arrival.reply)
            reports[arrival.peer] = told = REPLY_CODECS[STATS].decode(arrival.reply.body)
            if told.cluster_serial > self._cluster.serial:
                self._ahead = arrival.peer
        except (EngineError, ValueError) as error:
            log.debug("no statistics", node=arrival.peer, error=str(error))

    def _tell_changes(self, heard: frozenset[str]) -> None:
        for node in sorted(heard ^ self._heard):
            log.info("node answers" if node in heard else "node is silent", node=node)
        self._heard = heard


class Service(FollowsCluster):
    """Answers members: the registry's verbs to nodes, the other verbs to anybody. One thread runs it."""

    def __init__(
        self,
        listener: Listener,
        registry: Registry,
        cluster: ClusterSource,
        name: str,
        loop: ControlLoop,
        limits: ServiceLimits,
        data: Path,
        now_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._data = data
        self._listener = listener
        self._registry = registry
        self._source = cluster
        self._desk = Desk(cluster)
        self._known = cluster.cluster
        self._name = name
        self._loop = loop
        self._limits = limits
        self._admission = Admission(limits)
        self._turns: Turns[Incoming] = Turns(limits.requests, limits.requests)
        self._boot = os.urandom(16)
        self._now_ms = now_ms
        self._begun = time.monotonic()
        self._next_told_s = 0.0
        self._next_shape_s = 0.0
        self._keys = 0
        self.told: Told | None = None
        self._clients = Clients()
        self._verbs: dict[str, Callable[[str, Any], Any]] = {
            REGISTRY_RESERVE: self._reserve,
            REGISTRY_CHANGE: self._change,
            REGISTRY_COMMIT: self._commit,
            REGISTRY_DESTROY: self._destroy,
            REGISTRY_SETTINGS: self._settings,
            REGISTRY_QUOTA: self._quota,
            REGISTRY_SYNC: self._sync,
            REGISTRY_OUTCOME: self._outcome,
            REGISTRY_ABORT: self._abort,
            REGISTRY_LACKING: self._lacking,
            REGISTRY_MANY: self._many,
            HELLO: self._hello,
            TABLE: self._table,
            PLAN: self._plan,
            HOLDINGS: self._holdings,
            DEGRADED: self._degraded,
            MANIFEST_FETCH: self._manifest_fetch,
            MANIFEST_OFFER: self._manifest_offer,
            RequestType.STATUS: self._status,
        }

    @property
    def waiting(self) -> int:
        """Requests taken in and not yet answered."""
        return len(self._turns)

    @property
    def stands_by(self) -> bool:
        """Whether another balancer leads."""
        return not self._registry.term and bool(self._registry.leader)

    def answer_waiting(self) -> int:
        """Answer what has arrived, at most ``BURST`` requests, the members in turn; how many it was."""
        if self._known is not self._cluster:
            before, self._known = self._known, self._cluster
            self._note_serial()
            self._listener.members_changed(before, self._known)
        for done in range(BURST):
            self._take_in(BURST)
            if not self._turns:
                return done
            incoming = self._turns.take()
            self._answer(incoming)
            self._admission.end(incoming.member.name)
        return BURST

    def _note_serial(self) -> None:
        """Have the registry never be served under an older manifest; who begins to lead notes it too."""
        if not self._registry.term:
            return
        try:
            self._registry.note_cluster_serial(self._known.serial)
        except EngineError as error:
            log.warning("the manifest's serial is not noted", serial=self._known.serial, reason=str(error))

    def _take_in(self, most: int) -> None:
        for _ in range(most):
            incoming = self._listener.receive()
            if incoming is None:
                return
            try:
                self._admission.begin(incoming.member.name, time.monotonic())
                self._turns.put(incoming.member.name, incoming)
            except Overloaded as error:
                self._listener.fail(incoming, error)

    def look(self) -> None:
        """Look after the connections, and tell now and then how many requests were refused."""
        self._listener.look()
        now = time.monotonic()
        if now >= self._next_told_s:
            self._next_told_s = now + 1.0
            if self._registry.term:
                self._destroy_due()
                self._look_at_keys(now)
            self.told = Told(self._listener.counts(self._admission), self._keys, now)
            for each in self._admission.refusals():
                log.warning("requests refused", member=each.member, count=each.count, reason=each.reason)

    def _destroy_due(self) -> None:
        try:
            done = self._registry.destroy_due(self._now_ms())
        except EngineError as error:
            log.warning("keys whose time has come are not destroyed", reason=str(error))
            return
        if done:
            log.info("keys destroyed, as their time had come", keys=done)

    def _look_at_keys(self, now_s: float) -> None:
        if now_s < self._next_shape_s:
            return
        self._next_shape_s = now_s + SHAPE_S
        try:
            self._keys = self._registry.count()
            self._loop.shape = self._registry.usual_shape() or self._loop.shape
        except EngineError as error:
            log.warning("the keys' shape is not known", reason=str(error))
        if self._keys < FEW_KEYS:  # the next one may be of another shape than all of them
            self._next_shape_s = now_s

    def _answer(self, incoming: Incoming) -> None:
        verb, member = incoming.request.verb, incoming.member
        try:
            body = self._handle(incoming)
        except Moved as error:
            names = error_codec.encode(ErrorBody(error.code, str(error), list(error.names)))
            self._listener.reply(incoming, Status.MOVED, names)
        except (EngineError, ValueError) as error:
            log.info("request refused", verb=verb, member=member.name, reason=str(error))
            self._listener.fail(incoming, error)
        except Exception:  # every request is answered; the caller learns nothing of a fault in here
            log.error("request failed", verb=verb, member=member.name, exc_info=True)
            self._listener.fail(incoming, EngineError("internal error; the balancer's log says more"))
        else:
            log.debug("request answered", verb=verb, member=member.name)
            self._listener.reply(incoming, Status.OK, body)

    def _handle(self, incoming: Incoming) -> bytes:
        verb, member = incoming.request.verb, incoming.member
        handler = self._verbs.get(verb)
        if handler is None:
            raise ProtocolError(f"a balancer does not answer {verb!r}")
        if verb in REGISTRY_VERBS and member.role != "node":
            raise AccessDenied(f"{member.name!r} is a {member.role}; {verb} is for nodes")
        may_see = member.role != "client" or self._cluster.allows_any_key(member.name, RequestType.STATUS)
        if verb in (PLAN, HOLDINGS, DEGRADED, RequestType.STATUS) and not may_see:
            raise AccessDenied(f"{member.name!r} may not see the {verb}: no rule of the policy gives it `status`")
        if verb in (*REGISTRY_VERBS, HOLDINGS, DEGRADED) and not self._registry.term:
            self._send_on()
        message = REQUEST_CODECS[verb].decode(incoming.request.body)
        if verb == HELLO:
            self._clients.heard(member, message, time.monotonic())
        reply = handler(member.name, message)
        codec = balancer_status_codec if verb == RequestType.STATUS else REPLY_CODECS[verb]
        return codec.encode(reply, self._listener.versions.reply_to(incoming.request.version))

    def _send_on(self) -> NoReturn:
        """Say who leads, while this balancer does not."""
        leader = self._registry.leader
        if leader and leader != self._name:
            raise Moved((leader,))
        raise RegistryUnavailable(f"no balancer leads{': ' * bool(self._registry.problem)}{self._registry.problem}")

    def _reserve(self, member: str, body: Reserve) -> Reserved:
        return self._registry.reserve(body.order, member, self._now_ms(), body.manifest, body.certificate)

    def _change(self, member: str, body: Change) -> Reserved:
        return self._registry.change(body.order, body.manifest, body.certificate, member, self._now_ms())

    def _commit(self, member: str, body: Commit) -> Committed:
        return Committed(self._registry.commit(body.manifest, body.receipts, self._now_ms()))

    def _many(self, member: str, body: Bundle) -> BundleResults:
        check_bundle(body, BUNDLED_REGISTRY_VERBS)
        with self._registry.together():
            if body.verb == REGISTRY_COMMIT:
                return answer_bundle_at_once(body, self._commit_all)
            return answer_bundle(body, lambda message: self._verbs[body.verb](member, message))

    def _commit_all(self, commits: Sequence[Commit]) -> list[Committed | EngineError | ValueError]:
        made = self._registry.commit_all([(each.manifest, each.receipts) for each in commits], self._now_ms())
        return [Committed(each) if isinstance(each, bytes) else each for each in made]

    def _destroy(self, member: str, body: Destroy) -> Empty:
        self._registry.destroy(body.order, self._now_ms())
        return Empty()

    def _settings(self, member: str, body: Settings) -> SettingsBooked:
        booked = self._registry.settings(body.order, self._now_ms())
        return SettingsBooked(booked, self._registry.holders_of(booked))

    def _quota(self, member: str, body: Quota) -> QuotaGranted:
        return QuotaGranted(self._registry.quota(body.key_id, body.nonce, member))

    def _sync(self, member: str, body: Sync) -> SyncPage:
        return self._registry.sync(member, body.after)

    def _outcome(self, member: str, body: Outcome) -> OutcomeReply:
        return self._registry.outcome(body.key_id, body.attempt, self._now_ms())

    def _abort(self, member: str, body: Outcome) -> OutcomeReply:
        return self._registry.abort(body.key_id, body.attempt, member)

    def _lacking(self, member: str, body: Lacking) -> Empty:
        self._registry.lacking(member, body.keys)
        return Empty()

    def _hello(self, member: str, body: Hello) -> Welcome:
        return welcome(body, self._name, self._boot, self._cluster, self._limits)

    def _manifest_fetch(self, member: str, body: ManifestFetch) -> ManifestPiece:
        return self._desk.fetch(body)

    def _manifest_offer(self, member: str, body: ManifestOffer) -> ManifestTaken:
        return self._desk.offer(member, body)

    def _table(self, member: str, body: Empty) -> Table:
        """The newest whole table; empty too where it is longer than a message: then it comes by subscription alone."""
        sealed = self._loop.standing.sealed
        return Table(sealed if len(sealed) <= TABLE_MAX else b"")

    def _plan(self, member: str, body: Empty) -> BalancerPlan:
        return plan_message(self._name, self._loop.tick_ms, self._loop.standing.view, self._loop.plan)

    def _holdings(self, member: str, body: Holdings) -> HoldingsPage:
        told = sorted(each for each in self._registry.holdings(self._now_ms()).items() if each[0] > body.after)
        return HoldingsPage([Held(*each) for each in told[:HELD_TOLD]], len(told) > HELD_TOLD)

    def _degraded(self, member: str, body: Degraded) -> DegradedPage:
        nodes = self._cluster.nodes.keys() - {body.without}
        found, after = self._registry.places(
            lambda places: places.degraded(nodes, self._now_ms(), body.after, DEGRADED_TOLD)
        )
        named = self._cluster.members[member].role != "client"
        return DegradedPage(
            [
                DegradedKey(
                    each.key_id,
                    each.name if named or self._cluster.allows(member, RequestType.LIST, each.name) else "",
                    each.version,
                    each.crowd.threshold,
                    list(each.crowd.holders),
                    list(each.missing),
                )
                for each in found
            ],
            after,
        )

    def _status(self, member: str, body: Empty) -> BalancerStatus:
        standing, progress = self._loop.standing, self._loop.progress
        leads = bool(self._registry.term)
        moving = progress.text if leads else f"stands by: {self._registry.leader or 'nobody'} leads"
        return BalancerStatus(
            balancer=self._name,
            software=__version__,
            cluster_serial=self._cluster.serial,
            uptime_ms=int((time.monotonic() - self._begun) * 1000),
            keys=self._registry.count() if leads else 0,
            fencing_epoch=self._registry.fencing_epoch,
            table_counter=standing.counter,
            ticks=standing.ticks,
            last_error=standing.last_error or self._registry.problem[:ERROR_MAX],
            service=self._listener.counts(self._admission),
            forecasts=_accuracies(standing.learned.classes),
            series=[f"{name}: {problem}" for name, problem in self._loop.series_problems.items()],
            placement=self._loop.plan.text[:ERROR_MAX],
            host=host_health(self._data),
            moves=_moves(progress),
            moving=moving[:ERROR_MAX],
            protocol=self._listener.versions.highest,
            clients=self._clients.seen(self._cluster, self._listener.connections.count_of, time.monotonic()),
        )


def _moves(progress: Progress) -> list[KeyMoves]:
    counts = progress.waiting, progress.under_way, progress.done, progress.failed
    return [KeyMoves(kind.word, *(each.get(kind, 0) for each in counts)) for kind in Kind]


def _accuracies(bank: Bank) -> list[ForecastAccuracy]:
    told = accuracy(bank)
    last = HORIZONS - 1

    def permille(value: float, least: int = 0) -> int:
        return 0 if math.isnan(value) else round(max(least, min(1_000_000, 1000 * value)))

    return [
        ForecastAccuracy(
            str(name),
            told.models[row],
            permille(told.mase[row, 0]),
            permille(told.mase[row, last]),
            permille(told.coverage[row, 0]),
            permille(told.coverage[row, last]),
            permille(told.bias[row, 0], -1_000_000),
            permille(told.bias[row, last], -1_000_000),
        )
        for row, name in enumerate(told.series[:FORECASTS_TOLD])
    ]
