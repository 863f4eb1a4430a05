"""Many requests of one verb at once: asked of holders or the registry in bundles, or alone where there is but one.

What a holder's replies to a bundle sign has one signature in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from msgspec.structs import replace

from engine.client.bundles import open_results, split_bodies
from engine.client.transport import Channel
from engine.errors import EngineError
from engine.protocol.requests import (
    REGISTRY_MANY,
    REQUEST_CODECS,
    SHARE_MANY,
    Bundle,
    BundleResults,
    Dealt,
    Prepared,
    Refreshed,
)
from engine.protocol.signed import SigningKey, sign_bodies

__all__ = ["Asker", "ask_many", "ask_registry_many", "sign_replies"]

SIGNED: Final[dict[type, str]] = {Dealt: "statement", Refreshed: "statement", Prepared: "receipt"}
"""The field of a reply that its holder signs."""


class Asker(Protocol):
    """What a conversation offers for it."""

    def ask_all(
        self, channel: Channel, verb: str, bodies: dict[str, bytes], deadline_s: float, enough: None
    ) -> Iterator[tuple[str, Any]]:
        """Ask several members at once."""

    def ask_registry(self, channel: Channel, verb: str, message: object, deadline_s: float) -> Any:
        """Ask the registry."""


def ask_many(
    asker: Asker, channel: Channel, verb: str, asked: Sequence[tuple[str, object]], deadline_s: float
) -> list[Any]:
    """What each (member, message) came to, in their order: the reply or an ``EngineError``. All are asked at once."""
    codec = REQUEST_CODECS[verb]
    left: dict[str, list[int]] = {}
    for at, (name, _) in enumerate(asked):
        left.setdefault(name, []).append(at)
    bodies = [codec.encode(message) for _, message in asked]
    found: list[Any] = [None] * len(asked)
    while left:
        alone = {name: places[0] for name, places in left.items() if len(places) == 1}
        for name, reply in asker.ask_all(channel, verb, {n: bodies[at] for n, at in alone.items()}, deadline_s, None):
            found[alone[name]] = reply
        bundles = {
            name: Bundle(verb, list(next(split_bodies([bodies[at] for at in places]))))
            for name, places in left.items()
            if name not in alone
        }
        packed = {name: REQUEST_CODECS[SHARE_MANY].encode(bundle) for name, bundle in bundles.items()}
        rest: dict[str, list[int]] = {}
        for name, reply in asker.ask_all(channel, SHARE_MANY, packed, deadline_s, None) if packed else ():
            told = reply if isinstance(reply, EngineError) else open_results(verb, reply)
            done = _noted(found, left[name], told)
            if done < len(left[name]):
                rest[name] = left[name][done:]
        left = rest
    return found


def _noted(found: list[Any], places: Sequence[int], told: EngineError | list[Any]) -> int:
    """Note what came of the first requests of a member, or of all where none was heard; how many those are."""
    if isinstance(told, EngineError):
        for at in places:
            found[at] = told
        return len(places)
    for at, reply in zip(places, told, strict=False):
        found[at] = reply
    return min(len(places), len(told))


def ask_registry_many(
    asker: Asker, channel: Channel, verb: str, messages: Sequence[object], deadline_s: float
) -> list[Any]:
    """The same of the registry."""
    bodies = [REQUEST_CODECS[verb].encode(message) for message in messages]
    found: list[Any] = []
    while len(found) < len(bodies):
        some = next(split_bodies(bodies[len(found) :]))
        try:
            if len(bodies) == 1:
                return [asker.ask_registry(channel, verb, messages[0], deadline_s)]
            told: BundleResults = asker.ask_registry(channel, REGISTRY_MANY, Bundle(verb, list(some)), deadline_s)
        except EngineError as error:
            return found + [error] * (len(bodies) - len(found))
        found += open_results(verb, told)[: len(some)]
    return found


def sign_replies(replies: Sequence[Any], key: SigningKey) -> list[Any]:
    """Replies of one kind with envelopes in the place of the bodies that are to be signed; others as they are."""
    field = SIGNED.get(type(replies[0])) if replies else None
    if field is None:
        return list(replies)
    signed = sign_bodies([getattr(each, field) for each in replies], key)
    return [replace(each, **{field: raw}) for each, raw in zip(replies, signed, strict=True)]
