"""Carries out what ``balancer.migrate`` decides: asks the registry where keys are, and holders to change them.

It has a thread and connections of its own, so that neither the control loop nor the registry's service waits for it.
What it shows others is immutable. It can order nothing that a holder does not check for itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import structlog
import zmq

from balancer.migrate import Batch, Kind, MigrateSettings, Migration, Order, Progress, Result, Situation, Source
from balancer.places import Crowd, KeyPlace, Places
from balancer.planner import Plan
from balancer.registry import Registry
from engine.client.config import CurveSource
from engine.client.membership import Servers
from engine.client.transport import Arrival, Channel, raise_for_status
from engine.errors import EngineError, ProtocolError
from engine.protocol.manifest import ClusterSource, FollowsCluster, RefreshOrder, ReshareOrder, sign_orders
from engine.protocol.requests import MOVE, REPLY_CODECS, REQUEST_CODECS, Move, MoveResults
from engine.protocol.signed import SigningKey

__all__ = ["Heard", "Mover", "Whereabouts"]

PAUSE_S = 0.1
"""How long results are waited for before it is looked again whether something is to be done."""
ROUND_S = 0.5
"""So often the registry is asked where keys are, and after each batch."""
COUNT_S = 5.0
OLD_COUNTED = 100_000
TIMEOUT_S = 60.0
"""How long a batch may take; what is not told by then may be done or not, and the registry's books say which."""
ORDER_MS = 90_000
CALM_S = 2.0
"""So long after the last batch its traces are gone from what the nodes tell."""
CRAWLS = 1 / 32
"""A pace this part of the usual one is no load: what requests take then is what they take."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Heard:
    """What the control loop heard of the nodes: who answers, since when others do not, how much the service suffers."""

    up: frozenset[str]
    silent_s: Mapping[str, float]
    strain: float


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where groups are: the crowd that has most of a group's keys, and where the group is to be if that is planned.

    ``unsettled`` are the groups of which a key is on its way, or is to go.
    """

    held: Mapping[int, Crowd] = field(default_factory=dict)
    targets: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    unsettled: frozenset[int] = frozenset()


class Mover(FollowsCluster):
    """The thread that has keys moved, repaired and refreshed."""

    def __init__(
        self,
        context: zmq.Context[Any],
        own: CurveSource,
        cluster: ClusterSource,
        registry: Registry,
        signing: SigningKey,
        settings: MigrateSettings,
        now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._own = own
        self._source = cluster
        self._registry = registry
        self._signing = signing
        self._settings = settings
        self._now_ms = now_ms
        self._clock = clock
        self._migration = Migration(settings)
        self._term = 0
        self._heard: Heard | None = None
        self._strained: Heard | None = None
        self._plan = self._adopted = Plan()
        self._sent: dict[int, Batch] = {}
        self._crowds: Mapping[Crowd, int] = {}
        self._targets: Mapping[int, tuple[str, ...]] = {}
        self._lacking = self._old = 0
        self._next_look_s = self._next_count_s = 0.0
        self._busy_s = -CALM_S
        self._problem = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self.progress = Progress()
        self.whereabouts = Whereabouts()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is under way goes on without it, or is given up by whoever carries it out."""
        self._stop.set()
        self._thread.join()

    # --- what others tell and ask ---

    def see(self, heard: Heard, plan: Plan) -> None:
        """Take in what the control loop knows; never waits."""
        self._heard, self._plan = heard, plan

    @property
    def calm(self) -> bool:
        """Whether what requests take now has nothing to do with keys that are moved."""
        pace = self._migration.pace
        return self._clock() - self._busy_s > CALM_S or pace.keys_per_s <= CRAWLS * pace.most

    # --- its thread ---

    def _run(self) -> None:
        with Channel(self._own, Servers(self._source), self._context, watchful=True) as channel:
            while not self._stop.is_set():
                try:
                    for arrival in channel.poll(PAUSE_S):
                        self._arrived(arrival)
                    self._round(channel)
                    self._problem = ""
                except Exception as error:  # whatever it is, keys stay where they are, and it is tried again
                    self._complain(error)
                    self._stop.wait(ROUND_S)

    def _complain(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text != self._problem:
            log.error("no keys are moved", reason=text, exc_info=not isinstance(error, EngineError))
        self._problem = text

    def _round(self, channel: Channel) -> None:
        heard, term = self._heard, self._registry.term
        if term != self._term:
            self._begin_anew(term)
        if heard is None or not term:
            return
        now_s = self._clock()
        if now_s >= self._next_look_s:
            self._look_at_keys(now_s)
        if heard is not self._strained:
            self._strained = heard
            self._migration.pace.strained(heard.strain)
        self._migration.look(self._situation(heard, now_s))
        self._adopt()
        while (batch := self._migration.next_batch(self._fetch)) is not None:
            self._send(channel, batch)
        if self._sent:
            self._busy_s = now_s
        self._tell()

    def _begin_anew(self, term: int) -> None:
        """This balancer begins to lead, or to stand by: what was under way is another's business by now."""
        if self._term:
            self._migration = Migration(self._settings)
            self._sent.clear()
            self._plan = self._adopted = Plan()
            self._heard = self._strained = None
        self._term = term
        self._next_look_s = self._next_count_s = 0.0
        self.progress, self.whereabouts = Progress(), Whereabouts()

    def _situation(self, heard: Heard, now_s: float) -> Situation:
        return Situation(
            now_s=now_s,
            cluster=self._cluster,
            crowds=self._crowds,
            targets=self._targets,
            up=heard.up,
            silent_s=heard.silent_s,
            strain=heard.strain,
            lacking=self._lacking,
            old=self._old,
        )

    def _look_at_keys(self, now_s: float) -> None:
        self._next_look_s = now_s + ROUND_S
        counted = now_s >= self._next_count_s

        def ask(places: Places) -> None:
            self._crowds, self._targets = places.crowds(), places.targets()
            self._lacking = places.count_lacking(self._now_ms())
            if counted:
                self._old = places.count_older(self._due_ms(), OLD_COUNTED) if self._settings.refresh_every_s else 0

        self._registry.places(ask)
        if counted:
            self._next_count_s = now_s + COUNT_S

    def _due_ms(self) -> int:
        return self._now_ms() - int(self._settings.refresh_every_s * 1000)

    def _fetch(self, source: Source, after: KeyPlace | None, most: int) -> Sequence[KeyPlace]:
        def ask(places: Places) -> list[KeyPlace]:
            if isinstance(source, Crowd):
                return places.of_crowd(source, after, most)
            if source is Kind.TOP_UP:
                return places.lacking(self._now_ms(), after, most)
            return places.older(self._due_ms(), after, most)

        return self._registry.places(ask)

    # --- plans ---

    def _adopt(self) -> None:
        """Note where the newest plan wants groups; those of which keys are still on their way stay with the last."""
        plan = self._plan
        if plan is self._adopted or plan.placement is None:
            return
        self._adopted = plan
        under_way = self._migration.unsettled()
        wanted = {group: nodes for group, nodes in plan.targets().items() if group not in under_way}
        if not self._settings.enabled or not wanted:
            return
        self._registry.set_targets(wanted)
        log.info("plan taken up", groups=len(wanted), left=len(plan.targets()) - len(wanted))
        self._next_look_s = 0.0

    # --- orders ---

    def _send(self, channel: Channel, batch: Batch) -> None:
        now_ms = self._now_ms()
        orders = sign_orders([self._order(each, now_ms) for each in batch.orders], self._signing, now_ms)
        log.info("keys are to be changed", why=batch.kind.word, keys=len(orders), coordinator=batch.coordinator)
        try:
            token = channel.start(batch.coordinator, MOVE, REQUEST_CODECS[MOVE].encode(Move(orders)), TIMEOUT_S)
        except EngineError as error:
            self._ended(batch, [], str(error))
        else:
            self._sent[token] = batch

    def _order(self, order: Order, now_ms: int) -> RefreshOrder | ReshareOrder:
        key, change = order.key, order.change
        expires_ms, fencing = now_ms + ORDER_MS, self._term
        if change.kind is Kind.REFRESH:
            return RefreshOrder(key.key_id, key.name, key.epoch, os.urandom(16), expires_ms, fencing)
        return ReshareOrder(
            key_id=key.key_id,
            name=key.name,
            from_epoch=key.epoch,
            threshold=key.crowd.threshold,
            holders=list(change.holders),
            without=list(change.without),
            nonce=os.urandom(16),
            expires_ms=expires_ms,
            fencing=fencing,
        )

    def _arrived(self, arrival: Arrival) -> None:
        batch = self._sent.pop(arrival.token, None)
        if batch is None:
            return
        try:
            if arrival.reply is None:
                raise arrival.error or ProtocolError("neither reply nor error")
            raise_for_status(arrival.reply)
            told: MoveResults = REPLY_CODECS[MOVE].decode(arrival.reply.body)
        except (EngineError, ValueError) as error:
            self._ended(batch, [], str(error))
        else:
            self._ended(batch, [Result(each.key_id, each.epoch, each.text) for each in told.results], "")

    def _ended(self, batch: Batch, results: Sequence[Result], failure: str) -> None:
        self._migration.ended(batch.number, results, failure)
        done = {each.key_id for each in results if each.epoch}
        for order in batch.orders:
            if order.key.key_id not in done:
                reason = failure or next((r.reason for r in results if r.key_id == order.key.key_id), "")
                log.warning(
                    "a key was not changed", why=batch.kind.word, key=order.key.name, epoch=order.key.epoch,
                    coordinator=batch.coordinator, reason=reason,
                )  # fmt: skip
        log.info(
            "keys were changed", why=batch.kind.word, keys=len(done), failed=len(batch.orders) - len(done),
            coordinator=batch.coordinator,
        )  # fmt: skip
        self._next_look_s = 0.0

    # --- what it tells ---

    def _tell(self) -> None:
        self.progress = self._migration.progress()
        most: dict[int, tuple[int, Crowd]] = {}
        for crowd, keys in self._crowds.items():
            if keys > most.get(crowd.group, (0, crowd))[0]:
                most[crowd.group] = keys, crowd
        self.whereabouts = Whereabouts(
            MappingProxyType({group: crowd for group, (_, crowd) in most.items()}),
            MappingProxyType(dict(self._targets)),
            self._migration.unsettled(),
        )
