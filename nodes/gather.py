"""Gathering the shares of one key: whom to ask, when to hedge, when it is done. No socket, no clock.

A state machine: ``to_ask`` says whom to ask now; ``arrived`` and ``failed`` tell it what happened; it is over when
``complete`` or ``hopeless``. Invariants: a holder is asked at most once; a share counts only if it matches its
commitment in the manifest; ``complete`` means exactly the threshold of distinct shares is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import QuorumUnavailable, ShareCorrupt
from engine.protocol.manifest import KeyManifest
from engine.sharing import Share, commitment

__all__ = ["HEDGE_S", "Gathering"]

HEDGE_S = 0.05
"""A holder that has not answered for this long gets company by the next one."""


class Gathering:
    """One gathering; ``holders`` are the nodes to ask, best first; ``own`` is this node's share if it has one."""

    def __init__(
        self, manifest: KeyManifest, holders: Sequence[str], own: tuple[str, Share, bytes] | None = None
    ) -> None:
        self._manifest = manifest
        told = {own[0]} if own is not None else set()
        self._waiting = [
            name for name in dict.fromkeys(holders) if manifest.holder(name) is not None and name not in told
        ]
        self._asked: dict[str, float] = {}
        self._shares: dict[str, Share] = {}
        self._corrupt: list[str] = []
        self._problems: dict[str, str] = {}
        if own is not None:
            node, share, salt = own
            self.arrived(node, share, salt)

    @property
    def complete(self) -> bool:
        """Whether the threshold is reached."""
        return len(self._shares) >= self._manifest.threshold

    @property
    def hopeless(self) -> bool:
        """Whether the threshold can't be reached any more."""
        return len(self._shares) + len(self._asked) + len(self._waiting) < self._manifest.threshold

    @property
    def shares(self) -> list[Share]:
        """The good shares, at most the threshold of them."""
        return list(self._shares.values())[: self._manifest.threshold]

    @property
    def corrupt(self) -> tuple[str, ...]:
        """Holders whose share did not match its commitment."""
        return tuple(self._corrupt)

    @property
    def problems(self) -> Mapping[str, str]:
        """Holder -> why it gave no good share."""
        return dict(self._problems)

    def to_ask(self, now_s: float) -> list[str]:
        """The holders to ask now: as many as are lacking, and one more for each that is late."""
        late = sum(now_s - since >= HEDGE_S for since in self._asked.values())
        lacking = self._manifest.threshold - len(self._shares) - (len(self._asked) - late)
        chosen = self._waiting[: max(0, lacking)]
        self._waiting = self._waiting[len(chosen) :]
        for name in chosen:
            self._asked[name] = now_s
        return chosen

    def wake_s(self, now_s: float) -> float:
        """Seconds until the next holder would be late."""
        coming = [since + HEDGE_S - now_s for since in self._asked.values()]
        return min((wait for wait in coming if wait > 0), default=HEDGE_S)

    def arrived(self, holder: str, share: Share, salt: bytes) -> None:
        """A share came; it is checked against the commitment of that holder in the manifest."""
        self._asked.pop(holder, None)
        entry = self._manifest.holder(holder)
        if entry is None or share.x != entry.x or commitment(salt, self._manifest.context, share) != entry.commitment:
            self._corrupt.append(holder)
            self._problems[holder] = "its share does not match its commitment"
            return
        if not self.complete:
            self._shares[holder] = share

    def failed(self, holder: str, why: str) -> None:
        """A holder gave no share."""
        if self._asked.pop(holder, None) is not None:
            self._problems[holder] = why

    def give_up(self) -> None:
        """The deadline came: the ones still asked count as silent."""
        for holder in list(self._asked):
            self.failed(holder, "no answer in time")

    def error(self) -> QuorumUnavailable | ShareCorrupt:
        """What to tell the client when the threshold was not reached."""
        have, need = len(self._shares), self._manifest.threshold
        details = (
            "; ".join(why if why.startswith(holder) else f"{holder}: {why}" for holder, why in self._problems.items())
            or "no holder is left"
        )
        text = f"{self._manifest.name!r}: {have} of the {need} shares needed were had ({details})"
        silent = [holder for holder in self._problems if holder not in self._corrupt]
        if self._corrupt and not silent:
            return ShareCorrupt(text, self._corrupt)
        return QuorumUnavailable(text, self._problems)
