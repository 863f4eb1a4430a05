"""Whose turn it is and who is within the bounds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.client.admission import Admission, ServiceLimits, Turns
from engine.errors import Overloaded


def test_members_have_their_turn_and_order_within_one_is_kept() -> None:
    turns: Turns[str] = Turns(100, 100)
    for member, count in (("a", 4), ("b", 1), ("c", 2)):
        for number in range(count):
            turns.put(member, f"{member}{number}")
    assert [turns.take() for _ in range(len(turns))] == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]
    with pytest.raises(IndexError):
        turns.take()


@given(st.lists(st.one_of(st.sampled_from("abcd"), st.none()), max_size=200))
def test_nobody_waits_for_more_than_one_item_of_each_other(steps: list[str | None]) -> None:
    """Model: between two items of one member that waited all the time, each other member has at most one."""
    turns: Turns[str] = Turns(60, 20)
    waiting: list[str] = []
    taken: list[str] = []
    for member in steps:
        if member is None:
            if waiting:
                item = turns.take()
                taken.append(item)
                waiting.remove(item)
            continue
        try:
            turns.put(member, member)
        except Overloaded:
            assert waiting.count(member) >= 20 or len(waiting) >= 60
        else:
            waiting.append(member)
    rest = [turns.take() for _ in range(len(turns))]
    assert sorted(rest) == sorted(waiting)
    for one in set(rest):
        places = [index for index, member in enumerate(rest) if member == one]
        for before, after in itertools.pairwise(places):
            between = rest[before + 1 : after]
            assert len(between) == len(set(between))


def test_one_members_bound_is_not_anothers() -> None:
    admission = Admission(ServiceLimits(requests=5, member_requests=3))
    for _ in range(3):
        admission.begin("a", 0.0)
    with pytest.raises(Overloaded, match=r"'a': limits\.member_requests = 3 are under way"):
        admission.begin("a", 0.0)
    for _ in range(2):
        admission.begin("b", 0.0)
    with pytest.raises(Overloaded, match=r"limits\.requests = 5 are under way, of all members"):
        admission.begin("c", 0.0)
    admission.end("a")
    admission.begin("c", 0.0)
    assert (admission.under_way, admission.refused) == (5, 2)
    assert [(each.member, each.count) for each in admission.refusals()] == [("a", 1), ("c", 1)]
    assert admission.refusals() == []
