"""Keys that lack a share, made whole by a client: no balancer can do it where no share is left to spare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from engine.cli.output import Settings, count_progress, note
from engine.client.calls import DegradedKey
from engine.client.client import Engine
from engine.errors import EngineError

__all__ = ["HOW", "repair_all"]

AT_ONCE: Final = 4
HOW: Final = "with `keyquorum key repair`, or by hand with `keyquorum key reshare`"


def repair_all(settings: Settings, client: Engine, keys: Sequence[DegradedKey]) -> list[DegradedKey]:
    """Have the missing shares of these keys made anew, with a bar; those of which that failed, after saying why."""

    def repaired(key: DegradedKey) -> str:
        if not key.name:
            return "a key that this client may not list lacks a share"
        try:
            client.repair_key(key, timeout=settings.timeout_s)
        except (EngineError, ValueError) as error:
            return f"{key.name} (version {key.version}) is not repaired: {error}"
        return ""

    def results() -> Iterator[tuple[DegradedKey, str]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from zip(keys, pool.map(repaired, keys), strict=True)

    failed = []
    with count_progress(settings, "making missing shares anew") as draw:
        draw(len(keys))
        for done, (key, problem) in enumerate(results(), 1):
            if problem:
                failed.append(key)
                note(problem)
            draw(len(keys) - done)
    return failed
