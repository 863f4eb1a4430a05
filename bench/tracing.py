"""Owns the stage clock: how much CPU time of an operation each function of the real code takes for itself.

It replaces functions of the running program by timed ones (their own time without that of other timed ones inside, less
what the timing costs, which is calibrated). ``python bench/tracing.py node.toml`` runs a node that way and prints its
stages as JSON when it is stopped; ``stages.py`` does the client's side. A function that is gone is said, not guessed.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

NODE: Final = (
    ("wait", "zmq:Poller.poll"),
    ("receive", "engine.client.listener:Listener.receive"),
    ("who sent it (User-Id)", "engine.client.listener:_user_id"),
    ("decode", "engine.protocol.wire:Codec.decode"),
    ("policy", "nodes.handlers:check_verb"),
    ("policy", "nodes.handlers:check_key"),
    ("audit: the record", "nodes.handlers:Handlers._record"),
    ("audit: chain and write", "nodes.audit:AuditLog.write"),
    ("cache", "nodes.cache:Cache.get"),
    ("cache", "nodes.cache:Cache.contains"),
    ("token", "nodes.token:Lane.encrypt"),
    ("operation around the token", "nodes.handlers:operate"),
    ("operation around the token", "nodes.handlers:check_operation"),
    ("classify", "nodes.handlers:classify_request"),
    ("encode", "engine.protocol.wire:Codec.encode"),
    ("send", "engine.client.listener:Listener._send"),
    ("handlers", "nodes.handlers:Handlers.handle"),
    ("loop", "nodes.workers:Mailbox.run"),
    ("loop", "nodes.server:Server._take_in"),
)
CLIENT: Final = (
    ("wait", "zmq:Poller.poll"),
    ("classify", "engine.client.calls:classify_request"),
    ("route", "engine.protocol.routing:Router.rank"),
    ("route", "engine.protocol.routing:Router.sent"),
    ("route", "engine.protocol.routing:Router.answered"),
    ("route", "engine.protocol.routing:Router.is_loaded"),
    ("description", "engine.client.calls:_Descriptions.get"),
    ("encode", "engine.protocol.wire:Codec.encode"),
    ("decode", "engine.protocol.wire:Codec.decode"),
    ("connection's state (monitor)", "engine.client.transport:Channel._connected"),
    ("send", "engine.client.transport:Channel.start"),
    ("receive", "engine.client.transport:Channel._readable"),
    ("deadlines and polling", "engine.client.transport:Channel.poll"),
    ("deadlines and polling", "engine.client.transport:Channel._expire"),
    ("pool of channels", "engine.client.client:_Channels.take"),
    ("pool of channels", "engine.client.client:_Channels.give"),
    ("verb (generators, trail)", "engine.client.client:Engine.encrypt"),
)
CHECKS: Final = ("policy", "audit: the record", "audit: chain and write", "route")
"""What a grant of trust costs: policy and audit in the node, routing in the client."""


class StageClock:
    """Times functions of one thread by its CPU time, so that waiting and other processes don't count."""

    def __init__(self) -> None:
        self.nanoseconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.gone: list[str] = []
        self._inside: list[int] = []
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []
        self._own_cost = self._cost_to_caller = 0.0

    def wrap(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The timed function."""
        clock, inside, thread, ident = time.thread_time_ns, self._inside, self._thread, threading.get_ident
        spent, calls = self.nanoseconds, self.calls
        own_cost, cost_to_caller = self._own_cost, self._cost_to_caller
        spent.setdefault(stage, 0.0)
        calls.setdefault(stage, 0)

        @functools.wraps(call)
        def timed(*positional: Any, **named: Any) -> Any:
            if ident() != thread:
                return call(*positional, **named)
            inside.append(0)
            begun = clock()
            try:
                return call(*positional, **named)
            finally:
                whole = clock() - begun
                spent[stage] += whole - inside.pop() - own_cost
                calls[stage] += 1
                if inside:
                    inside[-1] += whole + cost_to_caller

        return timed

    def install(self, stages: Sequence[tuple[str, str]]) -> None:
        """Put the timed functions in place, after calibrating what a timed call costs itself and its caller."""
        self._calibrate()
        for stage, place in stages:
            module, _, path = place.partition(":")
            try:
                owner: Any = importlib.import_module(module)
                *parents, name = path.split(".")
                for parent in parents:
                    owner = getattr(owner, parent)
                before = owner.__dict__[name]
            except (ImportError, AttributeError, KeyError):
                self.gone.append(place)
                continue
            setattr(owner, name, self.wrap(stage, before))
            self._undo.append(functools.partial(setattr, owner, name, before))

    def remove(self) -> None:
        """Put the functions back that were there."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def reset(self) -> None:
        """Forget what was counted."""
        for stage in self.nanoseconds:
            self.nanoseconds[stage], self.calls[stage] = 0.0, 0

    def _calibrate(self) -> None:
        count = 20_000
        inner = self.wrap("calibration", lambda: None)

        def many() -> None:
            for _ in range(count):
                inner()

        def bare() -> None:
            for _ in range(count):
                empty()

        def empty() -> None:
            return None

        clock = time.thread_time_ns
        many()
        self.nanoseconds["calibration"] = 0.0
        begun = clock()
        many()
        timed = clock() - begun
        begun = clock()
        bare()
        plain = clock() - begun
        self._own_cost = self.nanoseconds.pop("calibration") / count
        self._cost_to_caller = max(0.0, (timed - plain) / count - self._own_cost)
        self.calls.pop("calibration")

    def report(self) -> dict[str, Any]:
        """Stage -> nanoseconds and calls, and the functions that were not there to be timed."""
        return {"nanoseconds": dict(self.nanoseconds), "calls": dict(self.calls), "gone": self.gone}


def main() -> None:
    """Run a node with timed functions, and print its stages at the end."""
    from nodes.allocator import overwrite_freed

    overwrite_freed()
    from engine.client.config import configure_logging
    from nodes.config import load_node_config
    from nodes.server import Server

    configure_logging("error")
    server = Server(load_node_config(sys.argv[1]))
    clock = StageClock()
    clock.install(NODE)
    server.run()
    print(json.dumps(clock.report()), flush=True)


if __name__ == "__main__":
    main()
