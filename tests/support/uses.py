"""One use of a loaded key, as a node makes it."""

from __future__ import annotations

from engine.protocol.requests import Operate
from nodes.operations import bound
from nodes.token import Lane, LoadedKey

__all__ = ["operate"]


def operate(lane: Lane, key: LoadedKey, verb: str, body: Operate, version: int) -> bytes:
    """Do it in the token. The result is empty where the answer is yes."""
    return bound(lane, key, verb, version, digested=body.digested)(body.data, body.associated_data, body.proof)
