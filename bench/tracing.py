"""Owns the stage clock: how much CPU time of an operation each function of the real code takes for itself.

It replaces functions of the running program by timed ones (their own time without that of other timed ones inside, less
what the timing costs, which is calibrated). CPU time, since on one core whoever is sent something may run at once, in
the middle of the sending. The slowest tenth of each function's calls is left out: those found the caches cold.

``python bench/tracing.py node.toml`` runs a node that way and prints its stages as JSON when it is stopped;
``stages.py`` does the client's side. A function that is gone is said, not guessed.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final

NODE: Final = (
    ("policy, limits, cache (by the plan)", "nodes.handlers:Handlers.begin_planned"),
    ("limits, cache, counts (by the lease)", "nodes.handlers:Handlers.lease_planned"),
    ("limits, cache, counts (by the lease)", "nodes.handlers:Handlers.settle_planned"),
    ("token", "nodes.handlers:bound()"),
    ("audit: chain and write", "nodes.audit:AuditLog.drain"),
    ("the ordinary way", "nodes.handlers:Handlers.handle"),
    ("loop", "nodes.workers:Mailbox.run"),
    ("loop", "engine.client.connections:Connections.look"),
)
CLIENT: Final = (
    ("route", "engine.protocol.routing:Router.begin_direct"),
    ("route", "engine.protocol.routing:Router.answered_direct"),
    ("route", "engine.protocol.routing:Router.learned_direct"),
    ("description", "engine.client.calls:Calls.peek"),
    ("verb, request, send, wait, receive (most of it in C)", "engine.client.client:Engine.encrypt"),
)
CHECKS: Final = (
    "policy, limits, cache (by the plan)",
    "limits, cache, counts (by the lease)",
    "audit: chain and write",
    "route",
)
"""What a grant of trust costs: policy (with the limits and the cache) and audit in the node, routing in the client."""
REST: Final = "the rest: socket, decode, encode, loop (in C)"
"""What a node's main thread took beside the stages that are timed."""


class StageClock:
    """Times functions of one thread; calls from other threads pass untimed."""

    def __init__(self) -> None:
        self._taken: list[tuple[str, array[float]]] = []
        self.gone: list[str] = []
        self._inside: list[float] = []
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []
        self._own_cost = self._cost_to_caller = 0.0

    def wrap(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The timed function."""
        clock, inside, thread, ident = time.thread_time_ns, self._inside, self._thread, threading.get_ident
        own_cost, cost_to_caller = self._own_cost, self._cost_to_caller
        taken: array[float] = array("d")
        self._taken.append((stage, taken))
        note = taken.append

        @functools.wraps(call, updated=())
        def timed(*positional: Any, **named: Any) -> Any:
            if ident() != thread:
                return call(*positional, **named)
            inside.append(0.0)
            begun = clock()
            try:
                return call(*positional, **named)
            finally:
                whole = clock() - begun
                note(whole - inside.pop() - own_cost)
                if inside:
                    inside[-1] += whole + cost_to_caller

        return timed

    def install(self, stages: Sequence[tuple[str, str]]) -> None:
        """Put the timed functions in place, after calibrating what a timed call costs itself and its caller.

        A place that ends in ``()`` is a function that makes functions, and those are timed.
        """
        self._calibrate()
        for stage, place in stages:
            module, _, path = place.removesuffix("()").partition(":")
            try:
                owner: Any = importlib.import_module(module)
                *parents, name = path.split(".")
                for parent in parents:
                    owner = getattr(owner, parent)
                before = owner.__dict__[name]
            except (ImportError, AttributeError, KeyError):
                self.gone.append(place)
                continue
            setattr(owner, name, self._maker(stage, before) if place.endswith("()") else self.wrap(stage, before))
            self._undo.append(functools.partial(setattr, owner, name, before))

    def _maker(self, stage: str, make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *positional, **named: self.wrap(stage, make(*positional, **named))

    def remove(self) -> None:
        """Put the functions back that were there."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def reset(self) -> None:
        """Forget what was counted."""
        for _, taken in self._taken:
            del taken[:]

    def _calibrate(self) -> None:
        """What timing a call costs within what is timed, and outside of it, to its caller."""
        count = 20_000

        def empty() -> None:
            return None

        def span(call: Callable[[], None]) -> int:
            begun = time.thread_time_ns()
            for _ in range(count):
                call()
            return time.thread_time_ns() - begun

        timed = self.wrap("calibration", empty)
        span(timed)
        self.reset()
        with_clock, without = min(span(timed) for _ in range(5)), min(span(empty) for _ in range(5))
        self._own_cost = _trimmed(self._taken[0][1])
        self._cost_to_caller = max(0.0, (with_clock - without) / count - self._own_cost)
        self._taken.clear()

    def report(self) -> dict[str, Any]:
        """Stage -> nanoseconds (all calls, at the mean of the quicker nine tenths), calls; and what was not there."""
        nanoseconds: dict[str, float] = {}
        calls: dict[str, int] = {}
        for stage, taken in self._taken:
            nanoseconds[stage] = nanoseconds.get(stage, 0.0) + _trimmed(taken) * len(taken)
            calls[stage] = calls.get(stage, 0) + len(taken)
        return {"nanoseconds": nanoseconds, "calls": calls, "gone": self.gone}


def _trimmed(taken: array[float]) -> float:
    """The mean of the quicker nine tenths."""
    ordered = sorted(taken)
    kept = ordered[: max(1, len(ordered) * 9 // 10)]
    return sum(kept) / len(kept) if kept else 0.0


def main() -> None:
    """Run a node with timed functions, and print its stages at the end."""
    from nodes.allocator import overwrite_freed

    overwrite_freed()
    from engine.client.config import configure_logging
    from nodes.config import load_node_config
    from nodes.server import Server

    configure_logging("error")
    clock = StageClock()
    clock.install(NODE)
    Server(load_node_config(sys.argv[1])).run()
    print(json.dumps(clock.report()), flush=True)


if __name__ == "__main__":
    main()
