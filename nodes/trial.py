"""The trial of a new epoch: it is put together once, by the client's grant, before it may become the valid one.

Where as few holders dealt as make the key, nobody can see that what they dealt is the key: a false deal is as good a
sharing as a true one. So the new holder that the order names gathers t shares while they are prepared, and its receipt
says that they gave the key. It runs on a ``talkers`` worker and waits for peers.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import AccessDenied, ShareCorrupt, StaleKey
from engine.failpoints import failpoint
from engine.protocol.grant import check_trial_grant
from engine.protocol.manifest import ClusterSource, FollowsCluster, Member
from engine.protocol.requests import Prepared, ShareTrial
from nodes.deal import Conversation, Talker
from nodes.holder import ShareHolder

__all__ = ["Trial"]


class Trial(FollowsCluster):
    """The trials that one node is named for; safe for several workers."""

    def __init__(
        self,
        cluster: ClusterSource,
        node: str,
        holder: ShareHolder,
        conversation: Conversation,
        now_ms: Callable[[], int],
    ) -> None:
        self._source = cluster
        self._node = node
        self._holder = holder
        self._conversation = conversation
        self._now_ms = now_ms

    def run(self, talker: Talker, body: ShareTrial, sender: Member, deadline_s: float) -> Prepared:
        """Combine the prepared epoch; the receipt that says so. The key is wiped at once, and never in the token.

        ``ShareCorrupt``: it is another key; ``StaleKey``: that epoch is not prepared here; ``AccessDenied``: the grant
        is not for this.
        """
        entry = self._holder.coming(body.key_id)
        if entry is None or entry.record.digest != body.manifest_hash:
            raise StaleKey(f"{self._node} has not prepared this epoch of the key with id {body.key_id.hex()}")
        if entry.record.dealer != sender.name:
            raise AccessDenied(f"{sender.name!r} asks for the trial of what {entry.record.dealer!r} coordinates")
        check_trial_grant(body.grant, entry.record, self._node, self._cluster, self._now_ms())
        mine = entry.manifest.holder(self._node)
        if mine is None:
            raise StaleKey(f"{self._node} is no holder of the epoch that it is to try")
        gathered = self._conversation.gather(talker, entry, body.grant, deadline_s)
        gathered.secret.close()
        if self._node in gathered.corrupt:
            raise ShareCorrupt(f"{self._node}: its own share does not fit the others'", [self._node])
        failpoint("holder.trial.passed")
        return Prepared(self._holder.receipt(entry.record, mine.x, tried=True))
