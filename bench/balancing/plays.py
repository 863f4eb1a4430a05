"""The scenarios that are played, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle, islice
from types import MappingProxyType

from balancing.scenarios import Crowd, Death, Flush, Hot, NodeSpec, Scenario, Site, Traffic

__all__ = ["APART", "COMP", "PLAYS", "REL", "back", "calm", "death", "flush", "hour", "shift", "steady", "surprise"]

RSA = ("sign/rsa-2048-pss-sha256", "decrypt/rsa-2048-oaep-sha256")
EC = ("sign/ecdsa-p256-sha256", "sign/ecdsa-p384-sha384", "sign/ed25519")
ZONES = ("a", "b", "c")

REL = Site(
    tuple(
        NodeSpec(f"n{at}", ZONES[at % 3], speed, workers=4) for at, speed in enumerate((2, 2, 1, 1, 1, 0.5, 0.5, 0.5))
    )
)
"""Eight nodes that differ in speed."""
COMP = Site(
    tuple(
        NodeSpec(f"n{at}", ZONES[at % 3], 0.4, dict.fromkeys(RSA if at < 3 else EC if at < 6 else (), 4.0), workers=4)
        for at in range(8)
    )
)
"""Eight nodes of which three are quick with RSA, three with elliptic curves, and two with nothing."""
APART = Site(tuple(NodeSpec(f"n{at}", f"z{at}", workers=4) for at in range(8)))
"""Eight equal nodes, each a failure domain of its own, so that a hot group may have more than three holders."""
NEVER_AGAIN_S = 1e6
EIGHT = Crowd(ZONES + ZONES + ("a", "b"))


def steady(layout: str, seconds: int) -> Scenario:
    """The load of the trace, second by second."""
    return Scenario(f"steady, {layout}", {"rel": REL, "comp": COMP}[layout], EIGHT, Traffic(), seconds)


def death(seconds: int) -> Scenario:
    """A fast node dies while the load is the trace's mean, 0.85 s before the balancer's next tick."""
    return replace(
        steady("rel", seconds),
        name="node death",
        deaths=(Death(0, seconds // 2 + 0.15),),
        traffic=Traffic(load=0.55, constant=True),
    )


def back(seconds: int) -> Scenario:
    """A fast node comes back with nothing loaded, and is found idle by 64 clients at the same moment."""
    at_s = seconds / 2
    return replace(
        steady("rel", seconds),
        name="node back",
        crowd=Crowd(tuple(islice(cycle(ZONES), 64))),
        deaths=(Death(0, at_s - 2.0, at_s),),
        traffic=Traffic(load=0.75, constant=True),
    )


def shift(seconds: int) -> Scenario:
    """Three tenants whose jobs run in every minute: a group is hot for 14 s, then another one.

    Three holders are too few for a hot one, so it needs more in time.
    """
    return replace(
        steady("rel", seconds),
        name="hot-group shift",
        site=APART,
        crowd=Crowd(APART.zones),
        hot=tuple(Hot(rank, 0.7, 12.0 + 16.0 * rank, 10.0, 60.0, 2.0) for rank in range(3)),
        traffic=Traffic(load=0.6, constant=True, token_factor=8 * 6.8),
        warmup_s=10.0,
    )


def surprise(seconds: int) -> Scenario:
    """A group gets hot as never before, and stays it for half of the time."""
    return replace(
        shift(seconds), name="unforeseen shift", hot=(Hot(0, 0.7, seconds * 0.3, seconds * 0.5, NEVER_AGAIN_S, 2.0),)
    )


def calm(shifting: Scenario) -> Scenario:
    """The same, but its groups get no hotter than they are."""
    return replace(
        shifting, name=f"{shifting.name}, calm", hot=tuple(replace(each, share=0.0) for each in shifting.hot)
    )


def flush(seconds: int) -> Scenario:
    """A new epoch: no key is loaded anywhere any more."""
    return replace(
        steady("rel", seconds),
        name="new epoch",
        flushes=(Flush(seconds // 2),),
        traffic=Traffic(load=0.5, constant=True),
    )


def hour(seconds: int) -> Scenario:
    """The trace as it is, request by request, on tokens that are so slow that it keeps them busy."""
    slow = replace(REL, near_s=0.000_2, far_s=0.001)
    return replace(
        steady("rel", seconds),
        name="an hour on slow tokens",
        site=slow,
        traffic=Traffic(load=0.6, token_factor=620.0),
        tick_s=5.0,
        warmup_s=30.0,
    )


PLAYS: Mapping[str, Callable[[], Scenario]] = MappingProxyType(
    {
        "rel": lambda: steady("rel", 10),
        "comp": lambda: steady("comp", 10),
        "shift": lambda: shift(60),
        "surprise": lambda: surprise(60),
        "death": lambda: death(10),
        "back": lambda: back(12),
        "flush": lambda: flush(10),
        "hour": lambda: hour(600),
    }
)
