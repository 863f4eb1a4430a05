"""Which of many like cases are gone through: all where time is no matter, else every third one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def some(cases: Iterable[T]) -> list[T]:
    """All cases under KEYQUORUM_ASSURANCE (``make assurance``, ``make crash``), else every third from the first."""
    return list(cases)[:: 1 if os.environ.get("KEYQUORUM_ASSURANCE") else 3]
