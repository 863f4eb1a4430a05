"""A second decoder of every message, made from its type alone: msgpack-python reads the tree, own code checks it.

``reference`` says whether a codec must take some bytes. ``sample`` makes valid values of a type. So each message that
is added to the code has a target without a line here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgpack
from msgspec import NODEFAULT, inspect

Check = Callable[[Any], bool]

MARK: Final = b"KQ-PLANTED-SECRET-"
"""What stands in every field of bytes of a sample: no error may show it."""
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_INSIDE: Final = _ALPHABET + "._:/@+-"


def check_of(kind: inspect.Type) -> Check:
    """Whether a tree of lists, str, bytes, int and bool is a value of the type."""
    match kind:
        case inspect.IntType():
            assert kind.gt is kind.lt is kind.multiple_of is None
            low, high = kind.ge, kind.le
            return lambda v: type(v) is int and (low is None or v >= low) and (high is None or v <= high)
        case inspect.BoolType():
            return lambda v: type(v) is bool
        case inspect.StrType():
            low, high = kind.min_length or 0, kind.max_length
            found = re.compile(kind.pattern).search if kind.pattern else None
            return lambda v: (
                type(v) is str
                and low <= len(v)
                and (high is None or len(v) <= high)
                and (found is None or found(v) is not None)
            )
        case inspect.BytesType():
            low, high = kind.min_length or 0, kind.max_length
            return lambda v: type(v) is bytes and low <= len(v) and (high is None or len(v) <= high)
        case inspect.LiteralType():
            known = kind.values
            return lambda v: type(v) in (str, int) and v in known
        case inspect.ListType():
            low, high, item = kind.min_length or 0, kind.max_length, check_of(kind.item_type)
            return lambda v: (
                type(v) is list and low <= len(v) and (high is None or len(v) <= high) and all(map(item, v))
            )
        case inspect.TupleType():
            items = tuple(map(check_of, kind.item_types))
            return lambda v: (
                type(v) is list and len(v) == len(items) and all(c(e) for c, e in zip(items, v, strict=True))
            )
        case inspect.DictType():
            low, high = kind.min_length or 0, kind.max_length
            key, value = check_of(kind.key_type), check_of(kind.value_type)
            return lambda v: (
                type(v) is dict
                and low <= len(v)
                and (high is None or len(v) <= high)
                and all(map(key, v))
                and all(map(value, v.values()))
            )
        case inspect.StructType():
            assert kind.array_like
            assert kind.forbid_unknown_fields, f"{kind.cls.__name__} takes unknown fields"
            fields = tuple(check_of(each.type) for each in kind.fields)
            count = len(fields)
            return lambda v: type(v) is list and len(v) == count and all(c(e) for c, e in zip(fields, v, strict=True))
        case _:
            raise TypeError(f"a message has a field of the type {kind}, which this file has no rule for")


def tree_of(data: bytes) -> Any:
    """The tree in canonical MessagePack; ValueError if it is none."""
    try:
        tree = msgpack.unpackb(data, raw=False, strict_map_key=False)
        canonical = msgpack.packb(tree, use_bin_type=True) == data
    except Exception as error:  # whatever that library raises for what it can't read
        raise ValueError(f"no MessagePack: {type(error).__name__}") from None
    if not canonical:
        raise ValueError("not canonical")
    return tree


class Reference:
    """Whether bytes are a message of a type, by this file's own rules."""

    def __init__(self, kind: type, limit: int) -> None:
        self.limit = limit
        known = inspect.type_info(kind)
        self._check = check_of(known)
        # The fields at a message's end that have a default may be missing.
        self._defaults = [_default(each) for each in known.fields] if isinstance(known, inspect.StructType) else []

    def tree(self, data: bytes) -> Any:
        """The message's tree, or None if it must be refused."""
        if len(data) > self.limit:
            return None
        try:
            tree = tree_of(data)
        except ValueError:
            return None
        if type(tree) is list and None not in (missing := self._defaults[len(tree) :]):
            tree = [*tree, *missing]
        return tree if self._check(tree) else None


def _default(field: inspect.Field) -> Any:
    """What a field is where it is missing; None if it can't be."""
    made = field.default_factory
    return made() if callable(made) else None if field.default is NODEFAULT else field.default


# --- samples ---


def sample(r: Random, kind: inspect.Type, size: str) -> Any:
    """A valid tree of the type; ``size`` is "least", "some" or "much"."""
    match kind:
        case inspect.IntType():
            low, high = kind.ge or 0, kind.le if kind.le is not None else 2**63 - 1
            return {"least": low, "much": high}.get(size, r.randint(low, min(high, low + 1000)))
        case inspect.BoolType():
            return size == "much"
        case inspect.StrType():
            return _text(r, kind, size)
        case inspect.BytesType():
            length = _length(r, kind.min_length or 0, kind.max_length, size, 48)
            return (MARK * (length // len(MARK) + 1))[:length]
        case inspect.LiteralType():
            return r.choice(kind.values)
        case inspect.ListType():
            count = _length(r, kind.min_length or 0, kind.max_length, size, 3)
            return [sample(r, kind.item_type, "some" if size == "much" else size) for _ in range(count)]
        case inspect.TupleType():
            return [sample(r, each, size) for each in kind.item_types]
        case inspect.DictType():
            count = _length(r, kind.min_length or 0, kind.max_length, size, 2)
            made = [(sample(r, kind.key_type, "some"), sample(r, kind.value_type, "some")) for _ in range(count)]
            return dict(made)
        case inspect.StructType():
            return [sample(r, each.type, size) for each in kind.fields]
        case _:
            raise TypeError(f"a message has a field of the type {kind}, which this file has no rule for")


def _length(r: Random, low: int, high: int | None, size: str, usual: int) -> int:
    if size == "least":
        return low
    most = high if high is not None else max(low, usual)
    return max(low, min(most, usual if size == "some" else 3 * usual))


def _text(r: Random, kind: inspect.StrType, size: str) -> str:
    low, high = kind.min_length or 0, kind.max_length or 64
    length = {"least": low, "much": min(high, 160)}.get(size, max(low, min(high, 8)))
    text = "".join(r.choice(_ALPHABET if at in (0, length - 1) else _INSIDE) for at in range(length))
    if kind.pattern and re.search(kind.pattern, text) is None:
        raise TypeError(f"no sample of {length} letters has the pattern {kind.pattern!r}")
    return text


def samples(kind: type, limit: int, seed: str) -> list[bytes]:
    """Encoded valid values of a message type, the least first."""
    r = Random(seed)
    info = inspect.type_info(kind)
    made = [msgpack.packb(sample(r, info, size), use_bin_type=True) for size in ("least", "some", "some", "much")]
    return [each for each in dict.fromkeys(made) if len(each) <= limit]
