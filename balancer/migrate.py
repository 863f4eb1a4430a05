"""What is to be done with which key next: plans carried out, nodes drained, lost shares made anew, epochs renewed.

It knows no socket and no clock, and orders nothing itself: ``balancer.mover`` does. Nothing is remembered of what is to
be done: it follows, each time anew, from where the keys are (``balancer.places``) and where they are to be. So what is
done is not done again, and a balancer that was killed goes on where it was. No step endangers a key: a reshare keeps
the old epoch whole until all new holders have theirs, and new holders stand no worse over the failure domains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from balancer.places import Crowd, KeyPlace
from engine.protocol.manifest import MAX_HOLDERS, Cluster
from engine.sharing import placement_risk

__all__ = [
    "Batch",
    "Change",
    "Fetch",
    "Kind",
    "MigrateSettings",
    "Migration",
    "Order",
    "Pace",
    "Progress",
    "Result",
    "Situation",
    "change_of",
]

WAIT_S = 5.0
WAIT_MAX_S = 600.0
"""A key that could not be changed waits for so long, twice as long each time, at most."""
SHUNNED_S = 30.0
"""For so long a holder that did not answer is asked to carry orders out only where there is no other."""
FAILED_MAX = 100_000
"""Most keys that are known to have failed; the longest known is forgotten first, and so tried sooner."""
PAGE = 256
LOOKED_MAX = 2_048
"""Most keys that are looked at for one batch: those that wait are passed over."""
SUFFERS = 2.0
RECOVERS = 1.5
"""Requests that take so many times as long as usual: fewer keys at a time; and no more than that: more again."""
SLOWER, QUICKER = 0.5, 1.25
PACE_MIN = 1.0
"""However much the service suffers, so many keys a second are changed: who waits for ever loses keys in the end."""
BATCH_S = 1.0
"""A batch has no more keys than the pace allows in so long, so that a lower pace shows at once."""
REASON_MAX = 200
REASONS_TOLD = 8


class Kind(IntEnum):
    """Why a key is changed, the most urgent first."""

    REPAIR = 1
    TOP_UP = 2
    DRAIN = 3
    PLAN = 4
    REFRESH = 5

    @property
    def word(self) -> str:
        """As it is told."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class MigrateSettings:
    """How quickly, and when. ``keys_per_s`` and ``under_way`` (batches) bound the work; a batch has at most ``batch``.

    A node that is silent for ``repair_after_s`` is lost; an epoch is renewed after ``refresh_every_s`` (0: never).
    """

    enabled: bool = True
    keys_per_s: float = 300.0
    batch: int = 64
    under_way: int = 2
    repair_after_s: float = 300.0
    refresh_every_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that is known at one moment.

    ``targets`` are where groups are to be, the most urgent first. ``up`` are the nodes that answer, ``silent_s`` since
    when the others do not. ``strain`` is how many times as long as usual requests take.
    """

    now_s: float
    cluster: Cluster
    crowds: Mapping[Crowd, int]
    targets: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    up: frozenset[str] = frozenset()
    silent_s: Mapping[str, float] = field(default_factory=dict)
    strain: float = 1.0
    lacking: int = 0
    old: int = 0

    def lost(self, after_s: float) -> frozenset[str]:
        """The nodes whose shares are given up, for they are silent for too long.

        None, while half of the nodes or more are silent: then it is this process that is cut off.
        """
        silent = [node for node in self.cluster.nodes if node not in self.up]
        if 2 * len(silent) >= len(self.cluster.nodes):
            return frozenset()
        return frozenset(node for node in silent if self.silent_s.get(node, 0.0) >= after_s)


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done with each key of a crowd: the new holders in order, and those that are to deal nothing.

    Where ``obstacle`` is not empty, it can't be done now, and it says why.
    """

    kind: Kind
    holders: tuple[str, ...]
    without: tuple[str, ...] = ()
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """One key's change."""

    key: KeyPlace
    change: Change


@dataclass(frozen=True, slots=True)
class Batch:
    """Orders of one kind that one holder of all these keys is to carry out."""

    number: int
    coordinator: str
    orders: tuple[Order, ...]

    @property
    def kind(self) -> Kind:
        """Of all its orders."""
        return self.orders[0].change.kind


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one key: its new epoch, or 0 and why not."""

    key_id: bytes
    epoch: int
    reason: str = ""


Source = Crowd | Kind
"""Where keys are had from: a crowd, or those that lack a share, or those that are old."""
Fetch = Callable[[Source, KeyPlace | None, int], Sequence[KeyPlace]]
"""Keys of a source, in an order that stays: those after one, so many at most."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is under way and what waits, by ``Kind``; ``stuck`` are obstacles and failures, with how many keys."""

    waiting: Mapping[Kind, int] = field(default_factory=dict)
    under_way: Mapping[Kind, int] = field(default_factory=dict)
    done: Mapping[Kind, int] = field(default_factory=dict)
    failed: Mapping[Kind, int] = field(default_factory=dict)
    keys_per_s: float = 0.0
    strain: float = 1.0
    stuck: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        """In one sentence."""
        parts = []
        for kind in Kind:
            waits, goes = self.waiting.get(kind, 0), self.under_way.get(kind, 0)
            if waits or goes:
                parts.append(f"{kind.word}: {waits} keys" + (f", {goes} under way" if goes else ""))
        parts += [f"{count} keys: {reason}" for reason, count in self.stuck]
        return "; ".join(parts) or "every key is where it is to be"


# --- where a crowd is to be ---


def change_of(crowd: Crowd, now: Situation, lost: frozenset[str]) -> Change | None:
    """What is to be done with the keys of a crowd, by where they are; None if they may stay as they are.

    Those of its holders that may, stay; a target's nodes come first, then holders of today, then the group's others in
    the order of the manifest, as the failure domains allow.
    """
    gone = [node for node in crowd.holders if node in lost or node not in now.cluster.nodes]
    left = [node for node in crowd.holders if node in now.cluster.draining and node not in gone]
    target = now.targets.get(crowd.group, ())
    kind = Kind.REPAIR if gone else Kind.DRAIN if left else Kind.PLAN
    count = crowd.shares
    if crowd.grows:
        count = max(crowd.shares, min(len(target or crowd.holders), MAX_HOLDERS))
    if kind is Kind.PLAN and len(crowd.holders) == count and set(crowd.holders).issuperset(target[:count]):
        return None
    wanted = dict.fromkeys((*target, *crowd.holders, *now.cluster.group_holders(crowd.group)))
    found: Change | None = None
    # More holders than n are as many as the failure domains allow.
    for number in range(count, crowd.shares - 1, -1):
        holders = _chosen(crowd, now, lost, wanted, number)
        if set(holders) == set(crowd.holders):
            return None
        left_out = [node for node in crowd.holders if node in gone or not (node in now.up or node in holders)]
        change = Change(kind, holders, tuple(left_out))
        found = replace(change, obstacle=_obstacle(crowd, now, change, number))
        if not found.obstacle:
            break
    return found


def _chosen(crowd: Crowd, now: Situation, lost: frozenset[str], wanted: Iterable[str], count: int) -> tuple[str, ...]:
    """The first of these nodes that can hold a share, and that leave no failure domain with too many of them."""
    level = now.cluster.domain_level
    domain = {node.name: node.path[:level] for node in now.cluster.locations}
    limit = min(crowd.threshold - 1, count - crowd.threshold) if crowd.threshold > 1 else count - 1
    able = [node for node in wanted if node in domain and node not in lost and node not in now.cluster.draining]
    held: Counter[tuple[str, ...]] = Counter()
    chosen: list[str] = []
    for node in able:
        if len(chosen) < count and held[domain[node]] < limit:
            chosen.append(node)
            held[domain[node]] += 1
    # Where the domains are too few for that, the emptiest ones; whether that is good enough is looked at afterwards.
    for node in sorted((each for each in able if each not in chosen), key=lambda each: held[domain[each]]):
        if len(chosen) == count:
            break
        chosen.append(node)
        held[domain[node]] += 1
    return tuple(node for node in able if node in chosen)


def _obstacle(crowd: Crowd, now: Situation, change: Change, count: int) -> str:
    if len(change.holders) < count:
        return f"{len(change.holders)} nodes can hold a share, {count} are needed"
    silent = sorted(node for node in {*change.holders, *_dealers(crowd, change)} if node not in now.up)
    if silent:
        return f"{', '.join(silent)} does not answer"
    if len(_dealers(crowd, change)) < crowd.threshold:
        return f"fewer than {crowd.threshold} holders are left"
    places, level = now.cluster.locations, now.cluster.domain_level
    there = [node for node in crowd.holders if node in now.cluster.nodes]
    risk = placement_risk(places, there, crowd.threshold, domain_level=level)
    return placement_risk(places, change.holders, crowd.threshold, domain_level=level).worse_than(risk)


def _dealers(crowd: Crowd, change: Change) -> list[str]:
    return [node for node in crowd.holders if node not in change.without]


# --- how many at a time ---


class Pace:
    """How many keys a second may be changed now: fewer while the service suffers, more again when it does not."""

    def __init__(self, most: float) -> None:
        self.most = self.keys_per_s = most
        self._tokens = 0.0
        self._since_s: float | None = None

    def look(self, now_s: float, *, most: float) -> None:
        """Let time pass: what may be changed since then is added, ``most`` at most."""
        if self._since_s is not None:
            self._tokens = min(most, self._tokens + max(0.0, now_s - self._since_s) * self.keys_per_s)
        self._since_s = now_s

    def strained(self, strain: float) -> None:
        """Take in how much the service suffers; once for each time that it is measured."""
        if strain > SUFFERS:
            self.keys_per_s = max(min(PACE_MIN, self.most), self.keys_per_s * SLOWER)
        elif strain <= RECOVERS:
            self.keys_per_s = min(self.most, self.keys_per_s * QUICKER)

    @property
    def room(self) -> int:
        """How many keys may be changed now."""
        return int(self._tokens)

    def take(self, keys: int) -> None:
        """So many are."""
        self._tokens -= keys


@dataclass(frozen=True, slots=True)
class _Failure:
    times: int
    until_s: float
    reason: str
    kind: Kind


def _all(source: Source, fetch: Fetch, after: KeyPlace | None) -> Iterator[KeyPlace]:
    """A source's keys after one, page by page."""
    while True:
        page = fetch(source, after, PAGE)
        yield from page
        if len(page) < PAGE:
            return
        after = page[-1]


@dataclass(slots=True)
class _Picked:
    """A batch that is being put together."""

    size: int
    kind: Kind = Kind.REPAIR
    coordinator: str = ""
    orders: list[Order] = field(default_factory=list)
    looked: int = 0

    @property
    def full(self) -> bool:
        """Whether no more is to be looked at."""
        return len(self.orders) >= self.size or self.looked >= LOOKED_MAX

    def take(self, order: Order, coordinators: Sequence[str]) -> bool:
        """Add an order, if the batch's coordinator can carry it out; the first order chooses it."""
        if not self.orders and coordinators:
            self.coordinator = coordinators[0]
        if self.coordinator not in coordinators:
            return False
        self.orders.append(order)
        return True


class Migration:
    """Decides on batch after batch; it keeps what is under way, what failed and until when that waits.

    One thread uses it. ``look`` with each new situation, ``next_batch`` until there is none, ``ended`` with results.
    """

    def __init__(self, settings: MigrateSettings) -> None:
        self._settings = settings
        self.pace = Pace(settings.keys_per_s)
        self._batches: dict[int, Batch] = {}
        self._busy: set[bytes] = set()
        self._failed: dict[bytes, _Failure] = {}
        self._idle: dict[Source, float] = {}
        self._cursor: dict[Source, KeyPlace | None] = {}
        self._shunned: dict[str, float] = {}
        self._changes: dict[Crowd, Change | None] = {}
        self._frame: object = None
        self._lost: frozenset[str] = frozenset()
        self._done: Counter[Kind] = Counter()
        self._failures: Counter[Kind] = Counter()
        self._numbers = 0
        self._now = Situation(0.0, None, {})  # type: ignore[arg-type]

    # --- what is known ---

    def look(self, now: Situation) -> None:
        """Take in the newest situation."""
        self._now = now
        self._lost = now.lost(self._settings.repair_after_s)
        frame = (
            now.cluster.serial,
            now.cluster.draining,
            now.up,
            self._lost,
            tuple(now.targets.items()),
        )
        if frame != self._frame:
            self._frame, self._changes = frame, {}
        self.pace.look(now.now_s, most=self._settings.batch * self._settings.under_way)

    def _change(self, crowd: Crowd) -> Change | None:
        if crowd not in self._changes:
            self._changes[crowd] = change_of(crowd, self._now, self._lost)
        return self._changes[crowd]

    def unsettled(self) -> frozenset[int]:
        """The groups of which a key is on its way, or is to go."""
        return frozenset(crowd.group for crowd in self._now.crowds if self._change(crowd) is not None)

    # --- what is next ---

    def next_batch(self, fetch: Fetch) -> Batch | None:
        """The most urgent orders that may be given now; they count as given."""
        size = min(self._settings.batch, self.pace.room, max(1, int(self.pace.keys_per_s * BATCH_S)))
        if not self._settings.enabled or size < 1 or len(self._batches) >= self._settings.under_way:
            return None
        picked = _Picked(size)
        for source, kind in self._sources():
            if picked.full or (picked.orders and kind is not picked.kind):
                break
            if self._idle.get(source, 0.0) <= self._now.now_s and self._has(source, picked.coordinator):
                picked.kind = kind
                self._pick(source, fetch, picked)
        if not picked.orders:
            return None
        self._numbers += 1
        batch = Batch(self._numbers, picked.coordinator, tuple(picked.orders))
        self._batches[batch.number] = batch
        self._busy.update(order.key.key_id for order in batch.orders)
        self.pace.take(len(batch.orders))
        return batch

    def _sources(self) -> Iterable[tuple[Source, Kind]]:
        """Where orders are to be found, the most urgent first, and those that are alike side by side."""
        place = {group: at for at, group in enumerate(self._now.targets)}

        def rank(found: tuple[Crowd, Change]) -> tuple[Any, ...]:
            crowd, change = found
            spare = len(_dealers(crowd, change)) - crowd.threshold if change.kind is Kind.REPAIR else 0
            at = place.get(crowd.group, len(place)) if change.kind is Kind.PLAN else 0
            return change.kind, spare, at, crowd.holders, change.holders, crowd.group

        able = [
            (crowd, change)
            for crowd in self._now.crowds
            if (change := self._change(crowd)) is not None and not change.obstacle
        ]
        moves: list[tuple[Source, Kind]] = [(crowd, change.kind) for crowd, change in sorted(able, key=rank)]
        if self._now.lacking:
            at = next((at for at, (_, kind) in enumerate(moves) if kind > Kind.TOP_UP), len(moves))
            moves.insert(at, (Kind.TOP_UP, Kind.TOP_UP))
        if self._now.old:
            moves.append((Kind.REFRESH, Kind.REFRESH))
        return moves

    def _has(self, source: Source, coordinator: str) -> bool:
        """Whether a source may have orders for the batch's coordinator; none is chosen yet while it is empty."""
        if not coordinator or not isinstance(source, Crowd):
            return True
        change = self._change(source)
        return change is not None and coordinator in _dealers(source, change)

    def _pick(self, source: Source, fetch: Fetch, picked: _Picked) -> None:
        """Add a source's keys that may be ordered now; go on where the last batch ended, for those may all fail."""
        until_s, passed = self._now.now_s + WAIT_S, False
        first = after = self._cursor.pop(source, None)
        for key in _all(source, fetch, first):
            after = key
            picked.looked += 1
            failure = self._failed.get(key.key_id)
            if failure is not None and failure.until_s > self._now.now_s:
                until_s = min(until_s, failure.until_s)
            elif key.key_id not in self._busy and (change := self._order(source, key)) is not None:
                passed |= not picked.take(Order(key, change), self._coordinators(key, change))
            if picked.full:
                self._cursor[source] = after
                return
        if first is None and not passed:
            # All its keys were looked at: there is no more until one of them ends or has waited.
            self._idle[source] = until_s

    def _order(self, source: Source, key: KeyPlace) -> Change | None:
        """What is to be done with one key; None if that is not possible now, or not by this source."""
        crowd = key.crowd
        change = self._change(crowd)
        if isinstance(source, Crowd):
            if change is None or change.obstacle:
                return None
            without = tuple(node for node in crowd.holders if node in change.without or node in key.missing)
            if len(crowd.holders) - len(without) < crowd.threshold:
                return None
            return replace(change, without=without)
        if change is not None or not self._now.up.issuperset(crowd.holders):
            return None
        if source is Kind.TOP_UP:
            return Change(Kind.TOP_UP, crowd.holders, key.missing)
        return None if key.missing else Change(Kind.REFRESH, crowd.holders)

    def _coordinators(self, key: KeyPlace, change: Change) -> list[str]:
        """The holders that can carry the order out, those with the least to do first; those that failed last."""
        loads = Counter(batch.coordinator for batch in self._batches.values())
        now_s = self._now.now_s
        able = [node for node in key.crowd.holders if node in self._now.up and node not in change.without]
        return sorted(able, key=lambda node: (self._shunned.get(node, 0.0) > now_s, loads[node]))

    # --- what became of it ---

    def ended(self, number: int, results: Sequence[Result], failure: str = "") -> None:
        """A batch is over: its results, or why there are none; a key without a result failed too."""
        batch = self._batches.pop(number)
        known = {each.key_id: each for each in results}
        if failure:
            self._shunned[batch.coordinator] = self._now.now_s + SHUNNED_S
        else:
            self._shunned.pop(batch.coordinator, None)
        for order in batch.orders:
            key_id = order.key.key_id
            self._busy.discard(key_id)
            result = known.get(key_id) or Result(key_id, 0, failure or "no result was told")
            if result.epoch > order.key.epoch:
                self._done[batch.kind] += 1
                self._failed.pop(key_id, None)
            else:
                self._note_failure(key_id, batch.kind, result.reason)
            self._idle.pop(order.key.crowd, None)
        self._idle.pop(batch.kind, None)

    def _note_failure(self, key_id: bytes, kind: Kind, reason: str) -> None:
        self._failures[kind] += 1
        before = self._failed.pop(key_id, None)
        lately = before is not None and before.until_s + WAIT_MAX_S > self._now.now_s
        times = before.times + 1 if before is not None and lately else 1
        wait_s = min(WAIT_MAX_S, WAIT_S * 2.0 ** min(times - 1, 16))
        self._failed[key_id] = _Failure(times, self._now.now_s + wait_s, reason[:REASON_MAX], kind)
        if len(self._failed) > FAILED_MAX:
            del self._failed[next(iter(self._failed))]

    # --- what is told ---

    @property
    def under_way(self) -> tuple[Batch, ...]:
        """The batches that were given and have not ended."""
        return tuple(self._batches.values())

    def progress(self) -> Progress:
        """What is under way and what waits, now."""
        waiting: Counter[Kind] = Counter()
        stuck: Counter[str] = Counter()
        for crowd, keys in self._now.crowds.items():
            change = self._change(crowd)
            if change is not None:
                waiting[change.kind] += keys
                if change.obstacle:
                    stuck[f"{change.kind.word}: {change.obstacle}"] += keys
        waiting[Kind.TOP_UP], waiting[Kind.REFRESH] = self._now.lacking, self._now.old
        for failure in self._failed.values():
            if failure.until_s > self._now.now_s:
                stuck[f"{failure.kind.word}: {failure.reason}"] += 1
        goes: Counter[Kind] = Counter()
        for batch in self._batches.values():
            goes[batch.kind] += len(batch.orders)
        return Progress(
            dict(waiting),
            dict(goes),
            dict(self._done),
            dict(self._failures),
            self.pace.keys_per_s,
            self._now.strain,
            tuple(stuck.most_common(REASONS_TOLD)),
        )
