"""Bugs that are planted into real node processes, one by KEYQUORUM_PLANTED; Python imports this at its start.

The matrix must notice each (``controls.py``); the product never sees this folder.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from dataclasses import replace
from typing import Any


def store_in_memory() -> None:
    """The store acknowledges everything and writes nothing."""
    from nodes import store

    real = store.sqlite3.connect

    def connect(path: Any, **options: Any) -> sqlite3.Connection:
        kept = real(":memory:", **options)
        with real(path) as file:
            file.backup(kept)
        return kept

    class Module:
        def __getattr__(self, name: str) -> Any:
            return connect if name == "connect" else getattr(sqlite3, name)

    store.sqlite3 = Module()


def other_mac() -> None:
    """A MAC is made of other data than was asked."""
    from nodes.token import Lane

    real = Lane.use

    def use(self: Any, key: Any, verb: str, *rest: Any, **more: Any) -> Any:
        made = real(self, key, verb, *rest, **more)
        if verb != "mac":
            return made
        return lambda data, associated_data=b"", proof=b"": made(data + b"!", associated_data, proof)

    Lane.use = use


def destroys_nothing() -> None:
    """A destruction is acknowledged, and the share is kept and used on."""
    from nodes.handlers import Handlers
    from nodes.store import ShareStore

    ShareStore.destroy = lambda self, row, order, now_ms: row
    Handlers.key_changed = lambda self, entry: None


def other_share() -> None:
    """A holder gives out the share of another key."""
    from nodes.holder import ShareHolder

    real = ShareHolder.release

    def release(self: Any, lane: Any, body: Any, sender: Any) -> Any:
        given = real(self, lane, body, sender)
        kept = getattr(self, "_planted", given)
        self._planted = given
        return (
            replace(given, y=kept.y)
            if hasattr(given, "__dataclass_fields__")
            else type(given)(given.x, kept.y, given.salt)
        )

    ShareHolder.release = release


PLANTED = {each.__name__: each for each in (store_in_memory, other_mac, destroys_nothing, other_share)}

if (name := os.environ.get("KEYQUORUM_PLANTED", "")) and "nodes" in sys.orig_argv:
    PLANTED[name]()
