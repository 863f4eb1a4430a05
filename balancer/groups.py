"""Which nodes hold the warm placement groups: by the rule of the manifest, or where the keys are.

The rule is worked out little by little. It knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.protocol.manifest import Cluster

__all__ = ["GroupPlaces", "overlaid"]

WORK = 4_000
"""New groups times nodes in one call: a group of 1000 nodes takes some 15 ms."""


class GroupPlaces:
    """Keeps what it worked out until the cluster or the number of shares changes. One thread uses it."""

    def __init__(self) -> None:
        self._of: tuple[int, int, tuple[str, ...]] | None = None
        self._places: dict[int, tuple[int, ...]] = {}
        self._moved: dict[tuple[int, frozenset[str]], bool] = {}

    def of(
        self, cluster: Cluster, nodes: Sequence[str], groups: Iterable[int], shares: int
    ) -> Mapping[int, Sequence[int]]:
        """The first ``shares`` holders by group, as indexes of ``nodes``; groups whose turn has not come are missing.

        A group with a holder that is none of the nodes is missing too.
        """
        asked = (cluster.serial, shares, tuple(nodes))
        if self._of != asked:
            self._of, self._places, self._moved = asked, {}, {}
        left = max(1, WORK // max(1, len(nodes)))
        at: dict[str, int] = {}
        for group in groups:
            if group in self._places:
                continue
            if not left:
                break
            left -= 1
            at = at or {name: index for index, name in enumerate(nodes)}
            holders = cluster.first_holders(group, shares)
            if all(name in at for name in holders):
                self._places[group] = tuple(at[name] for name in holders)
        return self._places

    def moved(self, cluster: Cluster, group: int, holders: Sequence[str]) -> bool:
        """Whether these holders of a group are others than the rule's; for groups that ``of`` has worked out."""
        known = (group, frozenset(holders))
        if known not in self._moved:
            self._moved[known] = frozenset(cluster.first_holders(group, len(holders))) != known[1]
        return self._moved[known]


def overlaid(
    places: Mapping[int, Sequence[int]], held: Mapping[int, Sequence[str]], nodes: Sequence[str]
) -> dict[int, Sequence[int]]:
    """The places with those groups elsewhere that these nodes hold; a holder that is none of ``nodes`` is left out."""
    at = {name: index for index, name in enumerate(nodes)}
    return {
        group: tuple(at[name] for name in held[group] if name in at) if group in held else known
        for group, known in places.items()
    }
