"""Gathering the shares of one key: whom to ask, when to hedge, when it is done. No socket, no clock.

A state machine: ``to_ask`` says whom to ask now; ``arrived`` and ``failed`` tell it what happened; when it is
``complete``, ``solve`` combines. It is over when that gave the secret, or when it is ``hopeless``. Invariants: a holder
is asked at most once; a share counts only if it matches its commitment in the manifest, which binds it to the key's
version and epoch; at first ``complete`` means exactly the threshold of distinct shares is there. Shares that match and
still give another secret than the check value (their dealer, or in a refresh the holder itself, committed to a wrong
one) make it ask everybody who is left and look for those that belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import EngineError, KeyDisabled, QuorumUnavailable, ShareCorrupt, StaleKey, VersionRetired
from engine.protocol.manifest import KeyManifest
from engine.sharing import SecretBuffer, SecretShare, Share, check_value, commitment, find_consistent

__all__ = ["HEDGE_S", "Gathering"]

HEDGE_S = 0.05
"""A holder of which nothing else is known gets company by the next one when it has not answered for this long."""


class Gathering:
    """One gathering; ``holders`` are the nodes to ask, best first; ``own`` is this node's share if it has one.

    ``hedge_s`` says after how many seconds each holder is late. The shares given become the gathering's, which wipes
    those in locked memory when it is closed.
    """

    def __init__(
        self,
        manifest: KeyManifest,
        holders: Sequence[str],
        own: tuple[str, Share | SecretShare, bytes] | None = None,
        hedge_s: Mapping[str, float] | None = None,
    ) -> None:
        self._manifest = manifest
        told = {own[0]} if own is not None else set()
        self._waiting = [
            name for name in dict.fromkeys(holders) if manifest.holder(name) is not None and name not in told
        ]
        self._hedge_s = hedge_s or {}
        self._asked: dict[str, float] = {}
        self._shares: dict[str, Share | SecretShare] = {}
        self._needed = manifest.threshold
        self._tried = 0
        self._corrupt: list[str] = []
        self._problems: dict[str, str] = {}
        self._elsewhere: list[str] = []
        self._refused: list[KeyDisabled | VersionRetired] = []
        if own is not None:
            node, share, salt = own
            self.arrived(node, share, salt)

    def close(self) -> None:
        """Wipe the shares that lie in locked memory."""
        for share in self._shares.values():
            _close(share)

    @property
    def complete(self) -> bool:
        """Whether there are enough shares to combine: the threshold, or after a failure of ``solve`` one more."""
        return len(self._shares) >= self._needed

    @property
    def hopeless(self) -> bool:
        """Whether there can't be enough any more."""
        return len(self._shares) + len(self._asked) + len(self._waiting) < self._needed

    @property
    def shares(self) -> list[Share | SecretShare]:
        """The shares that match their commitments."""
        return list(self._shares.values())

    @property
    def corrupt(self) -> tuple[str, ...]:
        """Holders whose share was wrong."""
        return tuple(self._corrupt)

    @property
    def problems(self) -> Mapping[str, str]:
        """Holder -> why it gave no good share."""
        return dict(self._problems)

    def to_ask(self, now_s: float) -> list[str]:
        """The holders to ask now: as many as are lacking, and one more for each that is late; all when in doubt."""
        late = sum(now_s - since >= self._patience(name) for name, since in self._asked.items())
        lacking = self._needed - len(self._shares) - (len(self._asked) - late)
        chosen = self._waiting if self._tried else self._waiting[: max(0, lacking)]
        self._waiting = self._waiting[len(chosen) :]
        for name in chosen:
            self._asked[name] = now_s
        return chosen

    def wake_s(self, now_s: float) -> float:
        """Seconds until the next holder would be late."""
        coming = [since + self._patience(name) - now_s for name, since in self._asked.items()]
        return min((wait for wait in coming if wait > 0), default=HEDGE_S)

    def late(self, now_s: float) -> dict[str, float]:
        """Holder -> seconds that it has not answered, of those that are late."""
        return {name: now_s - since for name, since in self._asked.items() if now_s - since >= self._patience(name)}

    def _patience(self, holder: str) -> float:
        return self._hedge_s.get(holder, HEDGE_S)

    def arrived(self, holder: str, share: Share | SecretShare, salt: bytes) -> None:
        """A share came; it is checked against the commitment of that holder in the manifest."""
        self._asked.pop(holder, None)
        entry = self._manifest.holder(holder)
        if entry is None or share.x != entry.x or commitment(salt, self._manifest.context, share) != entry.commitment:
            self._corrupt.append(holder)
            self._problems[holder] = "its share does not match its commitment"
            _close(share)
        elif (self.complete and not self._tried) or holder in self._shares:
            _close(share)
        else:
            self._shares[holder] = share

    def failed(
        self,
        holder: str,
        why: str,
        *,
        elsewhere: bool = False,
        refused: KeyDisabled | VersionRetired | None = None,
    ) -> None:
        """A holder gave no share.

        ``elsewhere``: it knows another epoch of the key than was asked for; ``refused``: by the key's settings.
        """
        if self._asked.pop(holder, None) is not None:
            self._problems[holder] = why
            self._elsewhere += [holder] if elsewhere else []
            self._refused += [refused] if refused is not None else []

    def give_up(self) -> None:
        """The deadline came: the ones still asked count as silent."""
        for holder in list(self._asked):
            self.failed(holder, "no answer in time")

    def solve(self) -> SecretBuffer | None:
        """The secret in locked memory, or None: then more shares are needed. Those that do not fit to it are named.

        ``OSError`` when there is no locked memory.
        """
        manifest = self._manifest
        given = list(self._shares.values())
        found = find_consistent(
            given,
            threshold=manifest.threshold,
            is_right=lambda secret: check_value(secret, manifest.key_context) == manifest.check_value,
            tried=self._tried,
        )
        if found is None:
            self._tried = len(given)
            self._needed = len(given) + 1
            return None
        secret, wrong = found
        for holder, share in list(self._shares.items()):
            if share.x in wrong:
                self._corrupt.append(holder)
                self._problems[holder] = "its share does not fit to the others and the check value"
                _close(self._shares.pop(holder))
        return secret

    def error(self) -> EngineError:
        """What to tell the client when the secret was not found."""
        have, need = len(self._shares), self._manifest.threshold
        details = (
            "; ".join(why if why.startswith(holder) else f"{holder}: {why}" for holder, why in self._problems.items())
            or "no holder is left"
        )
        if self._tried:
            return ShareCorrupt(
                f"{self._manifest.name!r}: the shares of {', '.join(self._shares)} give another key than the "
                f"manifest's check value, and which of them are wrong can't be told ({details})",
                list(self._shares),
            )
        text = f"{self._manifest.name!r}: {have} of the {need} shares needed were had ({details})"
        if have + len(self._elsewhere) >= need:
            return StaleKey(text)  # enough are there, but at another epoch: the client describes the key again
        if self._refused and have + len(self._refused) >= need:
            return type(self._refused[0])(text)
        silent = [holder for holder in self._problems if holder not in self._corrupt]
        if self._corrupt and not silent:
            return ShareCorrupt(text, self._corrupt)
        return QuorumUnavailable(text, self._problems)


def _close(share: Share | SecretShare) -> None:
    if isinstance(share, SecretShare):
        share.close()
