"""Many requests of one verb in one message: how they are packed, answered and opened. It owns no socket.

One transaction, one audit record and one message for many keys is what lets a plan move thousands of them. Each request
is answered as if it had come alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Final

from engine.client.listener import error_body
from engine.errors import EngineError, ManifestError, ProtocolError, error_from_code
from engine.protocol.requests import BUNDLE_MAX, REPLY_CODECS, REQUEST_CODECS, Bundle, BundleResult, BundleResults
from engine.protocol.wire import error_codec

__all__ = ["answer_bundle", "answer_bundle_at_once", "check_bundle", "open_results", "split_bodies"]

ROOM: Final = 56 * 1024
"""Most bytes of bodies in a bundle, and in its results; one alone may have more."""
ROOM_TO_SIGN: Final = 512
"""Bytes by which what is signed for all of a bundle may be longer than what a request alone makes."""


def split_bodies(bodies: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The bodies in order, as many at a time as a bundle holds."""
    begin = size = 0
    for at, body in enumerate(bodies):
        if at > begin and (at - begin == BUNDLE_MAX or size + len(body) > ROOM):
            yield bodies[begin:at]
            begin, size = at, 0
        size += len(body)
    if begin < len(bodies):
        yield bodies[begin:]


def check_bundle(bundle: Bundle, allowed: Container[str]) -> None:
    """Refuse a bundle of another verb than these."""
    if bundle.verb not in allowed:
        raise ProtocolError(f"requests of {bundle.verb!r} are not taken in a bundle")


def answer_bundle(
    bundle: Bundle,
    handle: Callable[[Any], object],
    enough: Callable[[], bool] = lambda: False,
    finish: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
) -> BundleResults:
    """The results of the requests, one after the other, until there is no room for more or ``enough()``.

    ``finish`` makes the replies of what the requests that went well came to, for all of them at once. An error that
    nobody foresaw is raised: then the whole bundle failed.
    """
    requests, replies = REQUEST_CODECS[bundle.verb], REPLY_CODECS[bundle.verb]
    made: list[Any] = []
    size = 0
    for body in bundle.bodies:
        try:
            one: Any = handle(requests.decode(body))
            size += len(replies.encode(one)) + (ROOM_TO_SIGN if finish is not None else 0)
        except (EngineError, ValueError) as error:
            one = BundleResult(False, error_body(error))
            size += len(one.body)
        if made and size > ROOM:  # it is asked for again, and each request may be repeated
            break
        made.append(one)
        if enough():
            break
    good = [each for each in made if not isinstance(each, BundleResult)]
    finished = iter(finish(good) if finish is not None else good)
    return BundleResults(
        [
            each if isinstance(each, BundleResult) else BundleResult(True, replies.encode(next(finished)))
            for each in made
        ]
    )


def answer_bundle_at_once(
    bundle: Bundle, handle: Callable[[Sequence[Any]], Sequence[object | EngineError | ValueError]]
) -> BundleResults:
    """The same where all requests that can be read are handled in one, each coming to a reply or an error.

    Those whose results have no room are handled in vain: it is for requests that come to the same again.
    """
    requests, replies = REQUEST_CODECS[bundle.verb], REPLY_CODECS[bundle.verb]
    read: list[Any] = []
    for body in bundle.bodies:
        try:
            read.append(requests.decode(body))
        except EngineError as error:
            read.append(error)
    made = iter(handle([each for each in read if not isinstance(each, EngineError)]))
    results: list[BundleResult] = []
    size = 0
    for each in read:
        came = each if isinstance(each, EngineError) else next(made)
        if isinstance(came, EngineError | ValueError):
            result = BundleResult(False, error_body(came))
        else:
            result = BundleResult(True, replies.encode(came))
        size += len(result.body)
        if results and size > ROOM:
            break
        results.append(result)
    return BundleResults(results)


def open_results(verb: str, told: BundleResults) -> list[Any]:
    """Reply or error of each."""
    return [_opened(verb, each) for each in told.results]


def _opened(verb: str, result: BundleResult) -> Any:
    try:
        if result.good:
            return REPLY_CODECS[verb].decode(result.body)
        told = error_codec.decode(result.body)
    except EngineError as error:
        return error
    made = error_from_code(told.code, told.message, told.names)
    return made if isinstance(made, EngineError) else ManifestError(str(made))
