"""The placement of groups: which nodes hold which, and the moves from today's. It knows no solver, socket or clock.

A placement group p has R_p holders, each of which serves about load_p / R_p of it. Minimise, over the whole cluster,
the requests in service, on their way and waiting, plus a charge for each new holder (hysteresis). Constraints: R_p
holders; in each failure domain at most z_p of them, so that no domain has the threshold and losing one leaves it; at
most ``budget`` new holders in one plan. Nodes of one domain that are alike form a cell, in which the program counts
holders; it starts from today's: a_pk holders are added in cell k and d_pk dropped, so that an unchanged load solves
itself. Waiting is that of ``balancer.routing``. What the program leaves fractional is rounded, then each change gets
its node: apart from the group's other holders first (host, rack), the idlest next (longest processing time first,
Graham 1969). Last, single holders move on while that pays for its charge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from balancer.program import FloatArray, IndexArray, Program, Solution
from balancer.routing import BREAKPOINTS, segments

__all__ = [
    "Infeasible",
    "Placement",
    "PlacementModel",
    "PlacementProblem",
    "Standing",
    "Step",
    "domain_limit",
    "explain",
    "holders_wanted",
    "marginal",
    "waiting",
]

BoolArray = NDArray[np.bool_]

FULL = 0.7
"""A group gets another holder when its holders would be busier with it alone than this."""
HALF = 0.5
"""It loses one when those that stay would be less busy than this."""
MOVE_PART = 0.25
"""A new holder must save this part of what the old one's share costs, and"""
MOVE_FLOOR = 2e-4
"""this part of what the whole cluster's load costs: noise moves nothing."""
MISSING = 2.0
"""A holder that is missing, or too many in a domain, costs this times all the load (and more near the threshold)."""
CELL_NODES = 16
"""In a cluster of so many nodes each one is its own cell."""
CELL_STEP = 0.25
"""Nodes are alike whose service times differ by less than about this part."""
COLUMNS_MAX = 200_000
CANDIDATES = 16
"""With more columns than that each group has so many cells to choose from."""


class Infeasible(ValueError):
    """No placement keeps the constraints; the text names the one that cannot be kept."""


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """What is to be placed.

    ``load`` (groups, classes) in requests per second and ``service_us`` (classes, nodes); ``capacity`` and
    ``background`` (nodes,) in seconds of work per second; ``network_us`` (nodes,) the clients' mean way there and back;
    ``price`` (nodes,) what a second of a node's work is charged beside the waiting, in seconds; ``up`` (nodes,).
    ``domain`` (nodes,) numbers the failure domains, and ``near`` has such numbers for narrower places, the narrowest
    first (host, rack). ``threshold`` and ``wanted`` (groups,) are t and R; ``today`` (groups, holders) has node
    indexes, filled up with -1. ``budget`` is how many new holders one plan may have.
    """

    load: FloatArray
    service_us: FloatArray
    capacity: FloatArray
    background: FloatArray
    network_us: FloatArray
    price: FloatArray
    up: BoolArray
    domain: IndexArray
    near: Sequence[IndexArray]
    threshold: IndexArray
    wanted: IndexArray
    today: IndexArray
    budget: int

    def __post_init__(self) -> None:
        """Refuse shapes that do not match and values that cannot be; ``ValueError`` names them."""
        groups, classes = self.load.shape
        nodes = len(self.up)
        shaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
            ("service_us", self.service_us.shape, (classes, nodes)),
            ("today", self.today.shape[:1], (groups,)),
            *((f"near[{level}]", each.shape, (nodes,)) for level, each in enumerate(self.near)),
            *((name, getattr(self, name).shape, (groups,)) for name in ("threshold", "wanted")),
            *(
                (name, getattr(self, name).shape, (nodes,))
                for name in ("capacity", "background", "network_us", "price", "domain")
            ),
        ]
        for name, shape, needed in shaped:
            if shape != needed:
                raise ValueError(f"{name} has shape {shape}, {needed} is needed")
        for name in ("load", "service_us", "capacity", "background", "network_us", "price"):
            values = getattr(self, name)
            if not np.all(np.isfinite(values)) or np.any(values < 0):
                raise ValueError(f"{name} has a value that is negative or not finite")
        if np.any(self.capacity <= 0):
            raise ValueError("capacity has a value that is not above 0")
        if self.today.size and not -1 <= self.today.min() <= self.today.max() < nodes:
            raise ValueError(f"today has a node outside 0..{nodes - 1}")
        today = np.sort(self.today, axis=1)
        if np.any((today[:, 1:] == today[:, :-1]) & (today[:, 1:] >= 0)):
            raise ValueError("today has a group that a node holds twice")
        if np.any(self.threshold < 1) or np.any(self.wanted < self.threshold):
            raise ValueError("a group has a threshold below 1 or above the holders it is to have")
        if self.budget < 0:
            raise ValueError(f"a budget of {self.budget} moves is below 0")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan: a node becomes (``add``) or ceases to be a holder of a group."""

    group: int
    node: int
    add: bool


@dataclass(frozen=True, slots=True)
class Placement:
    """The plan.

    ``holders`` by group, those that stay in their order, then new ones. ``steps`` lead from today's there: a group's
    new holders come before any is dropped, groups in danger first; one group's steps are one reshare, in which the old
    epoch stays whole until the new one is. ``utilisation`` (nodes,) is the expected one. ``cost`` and ``cost_today``
    are in requests in the system, ``bound`` is what no placement within the budget costs less than, with its charges
    (where each node is its own cell). ``charged`` is what the new holders were charged beside ``cost``, and ``remarks``
    are plain sentences on what is left to be wished for.
    """

    holders: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    utilisation: FloatArray
    cost: float
    cost_today: float
    charged: float
    bound: float
    remarks: tuple[str, ...] = field(default=())


def domain_limit(threshold: int, holders: int) -> int:
    """How many holders one failure domain may have: fewer than t, and without them t are left.

    With a threshold of 1 each holder has the key anyway, and only the second counts.
    """
    return min(threshold - 1, holders - threshold) if threshold > 1 else holders - threshold


def explain(problem: PlacementProblem) -> str:
    """Why no placement can keep the constraints, in one sentence; empty if one can."""
    up = int(problem.up.sum())
    sizes = np.bincount(problem.domain[problem.up]) if up else np.zeros(0, dtype=np.int64)
    domains = int((sizes > 0).sum())
    kinds = sorted({(int(t), int(r)) for t, r in zip(problem.threshold, problem.wanted, strict=True)})
    for threshold, holders in kinds:
        if holders > up:
            return f"{up} nodes are up, but {threshold}-of-{holders} needs {holders} holders"
        limit = domain_limit(threshold, holders)
        if int(np.minimum(sizes, max(limit, 0)).sum()) >= holders:
            continue
        whole = f"{domains} failure domain{'s' * (domains != 1)} with {up} nodes up"
        if limit < 1:
            return f"{threshold}-of-{holders} cannot lose any failure domain and keep its threshold"
        if limit == threshold - 1:
            return f"{whole} cannot keep {threshold}-of-{holders} below the threshold"
        return f"{whole} cannot lose one and keep the threshold of {threshold}-of-{holders}"
    return ""


def holders_wanted(
    load: FloatArray,
    service_us: FloatArray,
    capacity: FloatArray,
    up: BoolArray,
    domain: IndexArray,
    threshold: IndexArray,
    shares: IndexArray,
    today: IndexArray,
) -> IndexArray:
    """R_p: the n of the group's keys, and more where the load is too much for so many nodes of the middle speed.

    At most as many as the failure domains allow. Between ``HALF`` and ``FULL`` the number stays as it is today.
    """
    wanted = shares.astype(np.int32)
    if not up.any():
        return wanted
    work = load @ np.median(service_us[:, up] / capacity[up], axis=1) * 1e-6
    present = np.maximum((today >= 0).sum(axis=1), shares)
    least = np.maximum(np.ceil(work / FULL), shares)
    most = np.maximum(np.ceil(work / HALF), shares)
    wanted = np.clip(present, least, most).astype(np.int32)
    sizes = np.bincount(domain[up])
    for group in np.flatnonzero(wanted > shares):
        limit = threshold[group] - 1 if threshold[group] > 1 else len(up)
        room = int(np.minimum(sizes, limit).sum())
        wanted[group] = max(int(shares[group]), min(int(wanted[group]), room))
    return np.asarray(wanted)


@cache
def _heights() -> FloatArray:
    widths, slopes = segments()
    return np.concatenate([[0.0], np.cumsum(widths[:-1] * slopes[:-1])])


def waiting(work: FloatArray, capacity: FloatArray) -> FloatArray:
    """Requests that wait at nodes with so much work, as the program counts them."""
    _, slopes = segments()
    used = work / capacity
    beyond = np.maximum(used - BREAKPOINTS[-1], 0.0) * slopes[-1]
    return np.asarray(capacity * (np.interp(used, BREAKPOINTS, _heights()) + beyond))


def marginal(work: FloatArray, capacity: FloatArray) -> FloatArray:
    """What one more second of work per second adds to ``waiting``."""
    _, slopes = segments()
    return np.asarray(slopes[np.clip(np.searchsorted(BREAKPOINTS, work / capacity, side="right") - 1, 0, None)])


class Standing:
    """Holders by group and work by node; ``balancer.rounding`` makes the moves.

    ``alive`` are a group's holders that are up, ``dead`` the others; ``per_holder`` (groups, classes) is the load of
    one.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.per_holder = problem.load / problem.wanted[:, None]
        self.rate = self.per_holder.sum(axis=1)
        rows = [[int(node) for node in row if node >= 0] for row in problem.today]
        self.alive = [[node for node in row if problem.up[node]] for row in rows]
        self.dead = [[node for node in row if not problem.up[node]] for row in rows]
        self.limit = np.array(
            [domain_limit(int(t), int(r)) for t, r in zip(problem.threshold, problem.wanted, strict=True)],
            dtype=np.int64,
        )
        self.service_s = problem.service_us * 1e-6
        self.work = problem.background.astype(np.float64).copy()
        self.hosted: list[set[int]] = [set() for _ in range(len(problem.up))]
        for group, row in enumerate(self.alive):
            for node in row:
                self.hosted[node].add(group)
        groups, nodes, work, _ = self.shares()
        np.add.at(self.work, nodes, work)
        self.in_domain = np.zeros((len(rows), int(problem.domain.max(initial=0)) + 1), dtype=np.int64)
        np.add.at(self.in_domain, (groups, problem.domain[nodes]), 1)

    def shares(self) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray, FloatArray]:
        """Each holder that is up: its group, its node, its work, and its cost without waiting."""
        problem = self.problem
        groups = np.repeat(np.arange(len(self.alive)), [len(row) for row in self.alive])
        nodes = np.array([node for row in self.alive for node in row], dtype=np.int64)
        work = np.einsum("ec,ce->e", self.per_holder[groups], self.service_s[:, nodes])
        return (
            groups,
            nodes,
            work,
            work * (1 + problem.price[nodes]) + self.rate[groups] * problem.network_us[nodes] * 1e-6,
        )

    def cost(self) -> float:
        """Requests in the system: in service, on their way and waiting."""
        return float(self.shares()[3].sum() + waiting(self.work, self.problem.capacity).sum())


@dataclass(frozen=True, slots=True)
class _Cells:
    """Nodes of one domain that are alike: ``of`` (nodes,), -1 for a node that is down; then by cell."""

    of: NDArray[np.int64]
    domain: NDArray[np.int64]
    size: NDArray[np.int64]
    capacity: FloatArray
    service_s: FloatArray
    network_s: FloatArray
    price: FloatArray


def _cells(problem: PlacementProblem) -> _Cells:
    up = np.flatnonzero(problem.up)
    if len(problem.up) <= CELL_NODES:
        label = np.arange(len(up))
    else:
        usual = np.median(problem.service_us[:, up], axis=1, keepdims=True)
        speed = np.log1p(CELL_STEP)
        shape = [
            problem.domain[up][None, :],
            np.rint(np.log(np.maximum(problem.service_us[:, up] / np.maximum(usual, 1e-9), 1e-9)) / speed),
            np.rint(np.log(problem.capacity[up] / np.median(problem.capacity[up])) / speed)[None, :],
            np.rint(problem.network_us[up] / 100.0)[None, :],
            np.rint(problem.price[up] * 10.0)[None, :],
        ]
        label = np.unique(np.concatenate(shape), axis=1, return_inverse=True)[1].ravel()
    of = np.full(len(problem.up), -1, dtype=np.int64)
    of[up] = label
    count = int(label.max()) + 1 if len(label) else 0
    size = np.bincount(label, minlength=count)
    domain = np.zeros(count, dtype=np.int64)
    domain[label] = problem.domain[up]

    def mean(values: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(label, values[up], minlength=count) / size)

    return _Cells(
        of,
        domain,
        size,
        mean(problem.capacity) * size,
        np.stack([mean(row) for row in problem.service_us]) * 1e-6 if len(problem.service_us) else np.zeros((0, count)),
        mean(problem.network_us) * 1e-6,
        mean(problem.price),
    )


class PlacementModel:
    """The program of one plan: what it starts from, its columns, and what they mean."""

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.standing = standing = Standing(problem)
        self.cells = cells = _cells(problem)
        groups, nodes, work, direct = standing.shares()
        self.cost_today = float(direct.sum() + waiting(standing.work, problem.capacity).sum())
        self.direct_today = float(direct.sum())
        price = marginal(standing.work, problem.capacity)
        count = np.bincount(groups, minlength=len(standing.alive))
        mean = np.bincount(groups, direct + work * price[nodes], minlength=len(count)) / np.maximum(count, 1)
        self.charge = MOVE_PART * mean + MOVE_FLOOR * self.cost_today
        """What a new holder of the group is charged."""
        held = np.zeros((len(count), len(cells.size)), dtype=np.int64)
        np.add.at(held, (groups, cells.of[nodes]), 1)
        in_domain = standing.in_domain
        # With fewer holders up than the threshold nothing of the group can be moved.
        self.movable = count >= problem.threshold
        crowded = (in_domain > standing.limit[:, None]).any(axis=1)
        self.forced = self.movable & ((count != problem.wanted) | crowded)
        self.active = np.flatnonzero(self.movable & (self.forced | self.may_gain()))
        self._held, self._in_domain, self._count = held[self.active], in_domain[self.active], count[self.active]

    def afresh(self) -> PlacementModel:
        """The model with today's holders, as if nothing had been moved."""
        self.standing = Standing(self.problem)
        return self

    def may_gain(self) -> BoolArray:
        """Which groups might save more by a move than it is charged, by the prices where things stand now."""
        worth = np.zeros(len(self.charge), dtype=bool)
        groups, _, gain = self.gains()
        worth[groups[gain > 0]] = True
        return worth

    def gains(self) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
        """For each holder its group, its node, and at most how much another node would save beyond the charge."""
        cells, standing, problem = self.cells, self.standing, self.problem
        groups, nodes, work, direct = standing.shares()
        price = marginal(standing.work, problem.capacity)
        least = np.full(len(cells.size), np.inf)
        up = np.flatnonzero(problem.up)
        np.minimum.at(least, cells.of[up], price[up])
        # Nodes of one cell are alike only to a step, so the best of them may be so much better than the mean.
        service = cells.service_s * (1.0 + cells.price + least) / (1.0 + CELL_STEP)
        best = (standing.per_holder @ service + np.outer(standing.rate, cells.network_s)).min(axis=1, initial=np.inf)
        return groups, nodes, direct + work * price[nodes] - best[groups] - self.charge[groups]

    def program(self) -> Program:
        """Columns: a_pk and d_pk, holders missing, holders too many in a domain, work by cell and segment."""
        problem, cells, active, standing = self.problem, self.cells, self.active, self.standing
        rows, kinds = len(active), len(cells.size)
        widths, slopes = segments()
        work = standing.per_holder[active] @ cells.service_s
        way = np.outer(standing.rate[active], cells.network_s)
        cost = work * (1.0 + cells.price) + way
        limit = standing.limit[active]
        room = np.minimum(cells.size - self._held, limit[:, None])
        domains = self._in_domain.shape[1]
        several = np.bincount(cells.domain, minlength=domains) > 1
        # In a domain of one cell the bound of its column says it all, unless there are too many already.
        over = self._in_domain > limit[:, None]
        in_row = several[None, :] | over
        alone = ~in_row[:, cells.domain]
        left = np.maximum(limit[:, None] - self._in_domain, 0)[:, cells.domain]
        room = np.where(alone, np.minimum(room, left), room)
        candidate = (room > 0) & self._cheap(cost, work)
        self._adds = add = np.nonzero(candidate)
        self._drops = drop = np.nonzero(self._held > 0)
        self._short = np.arange(rows)
        self._over = over_at = np.nonzero(over)
        number = np.full(in_row.shape, -1, dtype=np.int64)
        number[in_row] = np.arange(int(in_row.sum()))
        domain_rows = int(in_row.sum())
        cell_row, budget_row = rows + domain_rows, rows + domain_rows + kinds
        dear = MISSING * (self.cost_today + 1.0)
        danger = np.where(self._count <= problem.threshold[active], 10.0, 1.0)
        # Each column has its entries in the rows of its group, its domain (if that has one), its cell, and the budget.
        place = np.stack([add[0], rows + number[add[0], cells.domain[add[1]]], cell_row + add[1]], axis=1)
        add_rows = np.concatenate([place, np.full((len(add[0]), 1), budget_row)], axis=1)
        add_values = np.stack([np.ones(len(add[0]))] * 2 + [work[add], np.ones(len(add[0]))], axis=1)
        drop_rows = np.stack([drop[0], rows + number[drop[0], cells.domain[drop[1]]], cell_row + drop[1]], axis=1)
        drop_values = -np.stack([np.ones(len(drop[0]))] * 2 + [work[drop]], axis=1)
        has_add, has_drop = np.ones(add_rows.shape, bool), np.ones(drop_rows.shape, bool)
        has_add[:, 1] = number[add[0], cells.domain[add[1]]] >= 0
        has_drop[:, 1] = number[drop[0], cells.domain[drop[1]]] >= 0
        segment_count = kinds * len(widths)
        counts = [has_add.sum(axis=1), has_drop.sum(axis=1), np.ones(rows + len(over_at[0]) + segment_count, np.int64)]
        indexes = [
            add_rows[has_add],
            drop_rows[has_drop],
            self._short,
            rows + number[over_at],
            np.repeat(cell_row + np.arange(kinds), len(widths)),
        ]
        values = [
            add_values[has_add],
            drop_values[has_drop],
            np.ones(rows),
            -np.ones(len(over_at[0])),
            -np.ones(segment_count),
        ]
        charge = self.charge[active]
        used = np.bincount(cells.of[problem.up], standing.work[problem.up], minlength=kinds)
        wanted = (problem.wanted[active] - self._count).astype(np.float64)
        free = (limit[:, None] - self._in_domain)[in_row].astype(np.float64)
        upper = [
            room[add].astype(np.float64),
            self._held[drop].astype(np.float64),
            np.full(rows + len(over_at[0]), np.inf),
            np.outer(cells.capacity, widths).ravel(),
        ]
        columns = len(add[0]) + len(drop[0]) + rows + len(over_at[0]) + segment_count
        return Program(
            cost=np.concatenate(
                [
                    cost[add] + charge[add[0]],
                    -cost[drop],
                    dear * danger,
                    np.full(len(over_at[0]), dear),
                    np.tile(slopes, kinds),
                ]
            ),
            lower=np.zeros(columns),
            upper=np.concatenate(upper),
            row_lower=np.concatenate([wanted, np.full(domain_rows, -np.inf), -used, [-np.inf]]),
            row_upper=np.concatenate([wanted, free, -used, [float(problem.budget)]]),
            starts=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32),
            indexes=np.concatenate(indexes).astype(np.int32),
            values=np.concatenate(values),
        )

    def _cheap(self, cost: FloatArray, work: FloatArray) -> BoolArray:
        """The cells that each group may choose from: all, or in a large model the cheapest of a random part."""
        if cost.size <= COLUMNS_MAX:
            return np.ones(cost.shape, dtype=bool)
        up, kinds = self.problem.up, len(self.cells.size)
        used = np.bincount(self.cells.of[up], self.standing.work[up], minlength=kinds).astype(np.float64)
        price = marginal(used, self.cells.capacity)
        score = (cost + work * price) * np.random.default_rng(0).uniform(1.0, 2.0, cost.shape)
        kept = np.zeros(cost.shape, dtype=bool)
        best = np.argpartition(score, CANDIDATES - 1, axis=1)[:, :CANDIDATES]
        np.put_along_axis(kept, best, True, axis=1)
        return kept

    def read(self, solution: Solution) -> tuple[FloatArray, NDArray[np.int64]]:
        """Holders by active group and cell as the program wants them, fractions and all, and those of today."""
        wanted = self._held.astype(np.float64)
        adds, drops = len(self._adds[0]), len(self._drops[0])
        wanted[self._adds] += solution.columns[:adds]
        wanted[self._drops] -= solution.columns[adds : adds + drops]
        return wanted, self._held
