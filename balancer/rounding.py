"""From the fractions of the placement program to whole holders on nodes, and to the steps that lead there.

Every change is weighed by the true cost (``Standing.cost``), so that nothing is moved that does not pay for its charge.
It knows no solver, socket or clock.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from balancer.placement import BoolArray, Placement, PlacementModel, Step, marginal, waiting
from balancer.program import FloatArray, Solution

__all__ = ["plan_moves"]

IntArray = NDArray[np.int64]

WHOLE = 1e-6
"""What is nearer to a whole number than this is one."""
PLAN_GAIN = 0.01
"""A plan that nothing forces must save this part of the whole cost beside its charges: noise moves nothing."""
REMARKS_MAX = 8
TARGETS_OF_CELL = 4
TARGETS_MAX = 256
"""To how many nodes a single holder may move on."""


def plan_moves(model: PlacementModel, solution: Solution | None) -> Placement:
    """Round, repair and improve; ``solution`` is None where the program had nothing to decide."""
    desk = _Desk(model)
    if solution is not None:
        desk.follow(*model.read(solution))
    desk.keep_apart()
    desk.improve()
    desk.keep_apart()
    if not desk.needed:
        desk = _Desk(model.afresh())
    return desk.placement(solution)


class _Desk:
    """The plan as it is made: who holds what, what was added and dropped, and what of the budget is left."""

    def __init__(self, model: PlacementModel) -> None:
        self._model = model
        self._problem = problem = model.problem
        self._standing = model.standing
        self._capacity = problem.capacity
        self._before = [tuple(row) for row in self._standing.alive]
        self._left = problem.budget
        self._deferred = 0
        self._tight = 0
        self._apart = False

    @property
    def needed(self) -> bool:
        """Whether something forces the plan, or it is worth its moves."""
        model = self._model
        if self._apart or bool(model.forced.any()):
            return True
        return model.cost_today - self._standing.cost() - self._charged() >= PLAN_GAIN * model.cost_today

    def _charged(self) -> float:
        new = (
            (group, set(row) - set(before))
            for group, (row, before) in enumerate(zip(self._standing.alive, self._before, strict=True))
        )
        return sum(len(nodes) * float(self._model.charge[group]) for group, nodes in new)

    # --- what a change costs ---

    def _share(self, group: int, nodes: IntArray) -> tuple[FloatArray, FloatArray]:
        """Work of one holder of the group at the nodes, and its cost without waiting."""
        standing, problem = self._standing, self._problem
        work = standing.per_holder[group] @ standing.service_s[:, nodes]
        return work, work * (1 + problem.price[nodes]) + standing.rate[group] * problem.network_us[nodes] * 1e-6

    def _cost_of_adding(self, group: int, nodes: IntArray) -> FloatArray:
        work, direct = self._share(group, nodes)
        now, capacity = self._standing.work[nodes], self._capacity[nodes]
        return np.asarray(direct + waiting(now + work, capacity) - waiting(now, capacity))

    def _saved_by_dropping(self, groups: list[int], node: int) -> FloatArray:
        """What each of the groups alone would save at the node that holds it."""
        standing, problem = self._standing, self._problem
        work = standing.per_holder[groups] @ standing.service_s[:, node]
        direct = work * (1 + problem.price[node]) + standing.rate[groups] * problem.network_us[node] * 1e-6
        now, capacity = standing.work[node], self._capacity[node]
        less = waiting(np.append(np.maximum(now - work, 0.0), now), capacity)
        return np.asarray(direct + less[-1] - less[:-1])

    def _saved(self, group: int, node: int) -> float:
        return float(self._saved_by_dropping([group], node)[0])

    # --- changes ---

    def _add(self, group: int, node: int) -> None:
        self._left -= node not in self._before[group]
        self._standing.alive[group].append(node)
        self._moved(group, node, 1)
        self._standing.hosted[node].add(group)

    def _drop(self, group: int, node: int) -> None:
        self._left += node not in self._before[group]
        self._standing.alive[group].remove(node)
        self._moved(group, node, -1)
        self._standing.hosted[node].discard(group)

    def _moved(self, group: int, node: int, sign: int) -> None:
        standing = self._standing
        standing.in_domain[group, self._problem.domain[node]] += sign
        standing.work[node] += sign * float(standing.per_holder[group] @ standing.service_s[:, node])

    def _charge(self, group: int, node: int) -> float:
        """What the plan's charges grow by when the node becomes a holder: nothing for one that is one today."""
        return 0.0 if node in self._before[group] else float(self._model.charge[group])

    def _free(self, group: int) -> BoolArray:
        """Which nodes may take a share: up, none yet, domain not full."""
        standing = self._standing
        free: BoolArray = self._problem.up & (standing.in_domain[group] < standing.limit[group])[self._problem.domain]
        free[standing.alive[group]] = False
        return free

    def _close(self, group: int, nodes: IntArray, without: int = -1) -> IntArray:
        """How close each of the nodes is to a holder of the group: the narrowest place that they share counts most."""
        others = [node for node in self._standing.alive[group] if node != without]
        close = np.zeros(len(nodes), dtype=np.int64)
        for weight, level in enumerate(reversed(self._problem.near)):
            close += (level[nodes][:, None] == level[others]).any(axis=1).astype(np.int64) << weight
        return close

    # --- following the program ---

    def follow(self, wanted: FloatArray, held: IntArray) -> None:
        """Round each group's fractions and give the changes their nodes; those in danger first, then the hottest."""
        active = self._model.active
        changed = np.flatnonzero((np.abs(wanted - held) > WHOLE).any(axis=1) | self._model.forced[active])
        rate = (self._standing.per_holder[active] @ self._standing.service_s.mean(axis=1)) if len(active) else active
        alive = np.array([len(self._before[group]) for group in active])
        margin = np.where(self._model.forced[active], alive - self._problem.threshold[active], np.iinfo(np.int32).max)
        for row in sorted(changed.tolist(), key=lambda row: (margin[row], -rate[row])):
            group = int(active[row])
            self._follow(group, self._rounded(group, wanted[row], held[row]) - held[row])

    def _rounded(self, group: int, wanted: FloatArray, held: IntArray) -> IntArray:
        """Whole numbers of holders by cell, the largest remainders rounded up as far as the domains allow."""
        cells, limit = self._model.cells, int(self._standing.limit[group])
        whole = np.floor(wanted + WHOLE).astype(np.int64)
        missing = int(self._problem.wanted[group]) - int(whole.sum())
        rest = wanted - whole
        in_domain = np.bincount(cells.domain, whole, minlength=int(cells.domain.max()) + 1)
        for cell in np.lexsort((-held, -rest)).tolist():
            if missing <= 0 or rest[cell] <= WHOLE:
                break
            if whole[cell] < cells.size[cell] and in_domain[cells.domain[cell]] < limit:
                whole[cell] += 1
                in_domain[cells.domain[cell]] += 1
                missing -= 1
        return whole

    def _follow(self, group: int, change: IntArray) -> None:
        cells, alive, problem = self._model.cells, self._standing.alive[group], self._problem
        forced = bool(self._model.forced[group])
        dropped, added, balance = [], [], 0.0
        for cell in np.repeat(np.arange(len(change)), np.maximum(-change, 0)).tolist():
            here = [node for node in alive if cells.of[node] == cell]
            node = max(here, key=lambda node: self._saved(group, node))
            balance += self._saved(group, node) + self._charge(group, node)
            self._drop(group, node)
            dropped.append(node)
        for cell in np.repeat(np.arange(len(change)), np.maximum(change, 0)).tolist():
            if self._left <= 0:
                break
            place = self._choose(group, cell)
            if place is None:
                continue
            balance -= float(self._cost_of_adding(group, np.array([place]))[0]) + self._charge(group, place)
            self._add(group, place)
            added.append(place)
        if forced:
            self._complete(group, dropped)
            return
        if len(alive) != int(problem.wanted[group]) or balance <= 0 or self._crowded(group, dropped):
            for node in added:
                self._drop(group, node)
            for node in dropped:
                self._add(group, node)
            self._deferred += balance > 0

    def _crowded(self, group: int, dropped: list[int]) -> bool:
        """Whether a change that nobody needs would put holders closer together than they were."""
        after = list(self._standing.alive[group])
        return any(
            len(set(level[after].tolist())) < len(set(level[list(self._before[group])].tolist()))
            for level in self._problem.near
        )

    def _choose(self, group: int, cell: int) -> int | None:
        """The node of the cell's domain for a new holder: apart from the others first, of the cell next, then cheap."""
        cells = self._model.cells
        nodes = np.flatnonzero(self._free(group) & (self._problem.domain == cells.domain[cell]))
        if not nodes.size:
            return None
        cost = self._cost_of_adding(group, nodes)
        return int(nodes[np.lexsort((cost, cells.of[nodes] != cell, self._close(group, nodes)))[0]])

    def _complete(self, group: int, dropped: list[int]) -> None:
        """Bring a group that had to change to its number of holders, inside its domains' limits, as far as it goes."""
        alive, wanted = self._standing.alive[group], int(self._problem.wanted[group])
        limit, domain = int(self._standing.limit[group]), self._problem.domain
        for node in dropped:  # one that is needed after all costs nothing
            if len(alive) < wanted and sum(domain[each] == domain[node] for each in alive) < limit:
                self._add(group, node)
        while len(alive) < wanted and self._left > 0:
            nodes = np.flatnonzero(self._free(group))
            if not nodes.size:
                break
            cost = self._cost_of_adding(group, nodes)
            self._add(group, int(nodes[np.lexsort((cost, self._close(group, nodes)))[0]]))
        if len(alive) < wanted:
            # Fewer holders in all is worse than too many in one domain, and nobody is dropped for nothing.
            for node in dropped:
                if len(alive) < wanted and node not in alive:
                    self._add(group, node)
        while len(alive) > wanted:
            self._drop(group, max(alive, key=lambda node: self._saved(group, node)))

    # --- apart ---

    def keep_apart(self) -> None:
        """Take one of two holders of a group off a host or rack where its failure domain has a place without one."""
        for level in self._problem.near:
            for group in self._together(level):
                self._spread(group, level)

    def _together(self, level: NDArray[np.int32]) -> list[int]:
        """The groups with two holders in one place of this level."""
        rows = self._standing.alive
        groups = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        places = level[np.array([node for row in rows for node in row], dtype=np.int64)]
        order = np.lexsort((places, groups))
        same = (np.diff(groups[order]) == 0) & (np.diff(places[order]) == 0)
        found = np.unique(groups[order][1:][same])
        return [int(group) for group in found if self._model.movable[group]]

    def _spread(self, group: int, level: NDArray[np.int32]) -> None:
        domain, alive = self._problem.domain, self._standing.alive[group]
        for _ in range(len(alive)):
            places = level[alive].tolist()
            moves = []
            for node in alive:
                if places.count(level[node]) < 2:
                    continue
                apart = self._problem.up & (domain == domain[node]) & ~np.isin(level, level[alive])
                nodes = np.flatnonzero(apart)
                if nodes.size:
                    cost = self._cost_of_adding(group, nodes)
                    best = int(np.argmin(cost))
                    price = cost[best] - self._saved(group, node)
                    # One that is new already moves for nothing.
                    moves.append((node in self._before[group], price, node, int(nodes[best])))
            if not moves:
                return
            new, _, node, place = min(moves)
            if new and self._left <= 0:
                self._tight += 1
                return
            self._drop(group, node)
            self._add(group, place)
            self._apart = True

    # --- improving ---

    def improve(self) -> None:
        """Move single holders off the dearest nodes while that saves more than it is charged."""
        active = np.zeros(len(self._before), dtype=bool)
        active[self._model.active] = True
        _, nodes, gain = self._model.gains()
        open_to = np.zeros(len(self._capacity), dtype=bool)
        open_to[nodes[gain > 0]] = True
        targets = self._targets()
        for _ in range(4 * self._problem.budget + len(self._capacity)):
            if self._left <= 0:
                return
            price = np.where(open_to, marginal(self._standing.work, self._capacity), -1.0)
            node = int(np.argmax(price))
            if price[node] < 0:
                return
            groups = [group for group in sorted(self._standing.hosted[node]) if active[group]]
            best = self._best_move(node, groups, targets)
            if best is None:
                open_to[node] = False
                continue
            group, place = best
            self._drop(group, node)
            self._add(group, place)
            targets = self._targets()

    def _targets(self) -> IntArray:
        """The idlest nodes of each cell, of many cells the cheapest."""
        cells, standing = self._model.cells, self._standing
        used = standing.work / self._capacity
        order = np.lexsort((used, cells.of))
        order = order[cells.of[order] >= 0]
        rank = np.arange(len(order)) - np.searchsorted(cells.of[order], cells.of[order])
        kept = order[rank < TARGETS_OF_CELL]
        return np.asarray(kept[np.argsort(used[kept], kind="stable")[:TARGETS_MAX]])

    def _best_move(self, node: int, groups: list[int], targets: IntArray) -> tuple[int, int] | None:
        if not groups:
            return None
        standing, problem, domain = self._standing, self._problem, self._problem.domain
        new = np.array([node not in self._before[group] for group in groups])
        saved = self._saved_by_dropping(groups, node) + np.where(new, self._model.charge[groups], 0.0)
        work = standing.per_holder[groups] @ standing.service_s[:, targets]
        cost = work * (1 + problem.price[targets]) + np.outer(standing.rate[groups], problem.network_us[targets] * 1e-6)
        now, capacity = standing.work[targets], self._capacity[targets]
        cost += waiting(now + work, capacity) - waiting(now, capacity)
        count = standing.in_domain[groups][:, domain[targets]] - (domain[targets] == domain[node])
        cost[count >= standing.limit[groups][:, None]] = np.inf
        cost += self._model.charge[groups][:, None]
        at = np.full(len(self._capacity), -1)
        at[targets] = np.arange(len(targets))
        for row, group in enumerate(groups):
            old = at[list(self._before[group])]
            cost[row, old[old >= 0]] -= self._model.charge[group]
            now_at = at[standing.alive[group]]
            cost[row, now_at[now_at >= 0]] = np.inf
        best, found = WHOLE, None
        for row in np.argsort(cost.min(axis=1) - saved, kind="stable").tolist():
            if saved[row] - cost[row].min() <= best:
                break
            group = groups[row]
            close = self._close(group, np.append(targets, node), without=node)
            costs = np.where(close[:-1] <= close[-1], cost[row], np.inf)
            column = int(np.argmin(costs))
            if saved[row] - costs[column] > best:
                best, found = float(saved[row] - costs[column]), (group, int(targets[column]))
        return found

    # --- the plan ---

    def placement(self, solution: Solution | None) -> Placement:
        """What was decided."""
        problem, standing, model = self._problem, self._standing, self._model
        holders = []
        urgent: list[tuple[int, float, list[Step]]] = []
        others: list[tuple[int, float, list[Step]]] = []
        for group, before in enumerate(self._before):
            now = standing.alive[group]
            dead = standing.dead[group]
            kept = [node for node in before if node in now]
            new = [node for node in now if node not in before]
            short = len(now) < int(problem.wanted[group])
            # Of holders that are down none is given up before there are enough others.
            gone = [node for node in before if node not in now] + ([] if short else dead)
            held = kept + new + (dead if short else [])
            holders.append(tuple(held))
            steps = [Step(group, node, True) for node in new] + [Step(group, node, False) for node in gone]
            if steps:
                saved = sum(self._saved(group, node) for node in new)
                margin = len(before) - int(problem.threshold[group])
                (urgent if model.forced[group] else others).append((margin, -saved, steps))
        order = sorted(urgent, key=lambda each: each[:2]) + sorted(others, key=lambda each: each[1])
        cost = standing.cost()
        bound = model.direct_today + (solution.objective if solution else model.cost_today - model.direct_today)
        return Placement(
            holders=tuple(holders),
            steps=tuple(step for *_, steps in order for step in steps),
            utilisation=np.where(problem.up, standing.work / problem.capacity, 0.0),
            cost=cost,
            cost_today=model.cost_today,
            charged=self._charged(),
            bound=bound,
            remarks=self._remarks(),
        )

    def _remarks(self) -> tuple[str, ...]:
        problem, standing = self._problem, self._standing
        found = []
        stuck = np.flatnonzero(~self._model.movable)
        if stuck.size:
            found.append(f"{stuck.size} groups have fewer holders up than their threshold and cannot be moved")
        short = sum(len(row) < wanted for row, wanted in zip(standing.alive, problem.wanted.tolist(), strict=True))
        if short - stuck.size > 0:
            found.append(f"{short - stuck.size} groups lack holders and wait for the move budget of {problem.budget}")
        if self._deferred or self._tight:
            found.append(f"{self._deferred + self._tight} groups wait for the move budget of {problem.budget}")
        up = problem.up
        if up.any() and standing.work[up].sum() > problem.capacity[up].sum():
            found.append(
                f"the load needs {standing.work[up].sum():.1f} s of work per second, "
                f"the nodes that are up do {problem.capacity[up].sum():.1f}"
            )
        return tuple(found[:REMARKS_MAX])
