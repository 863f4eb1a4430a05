"""The dealer's and combiner's conversations with other members: create, gather, destroy, catch up with the registry.

They run on workers beside the loop, each with a channel and a lane of its own, and may wait for peers. Nothing that a
peer waits for runs here, so two nodes can't wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog

from engine._version import __version__
from engine.client.speech import spoken
from engine.client.spreading import pull
from engine.client.transport import Arrival, Channel, KeyRefused, Moved, ask, raise_for_status
from engine.errors import (
    DeadlineExceeded,
    EngineError,
    KeyDisabled,
    ManifestError,
    NodeUnavailable,
    QuorumUnavailable,
    RegistryUnavailable,
    ShareCorrupt,
    StaleKey,
    UnsupportedAlgorithm,
    VersionRetired,
)
from engine.failpoints import failpoint
from engine.keys import algorithm, check_material, generate_material, public_key_der
from engine.protocol.manifest import (
    ClusterSource,
    CreateOrder,
    FollowsCluster,
    Holder,
    KeyManifest,
    KeyRecord,
    key_manifests,
    open_certificate,
    open_create_order,
    open_key_manifest,
    open_receipt,
    receipts_needed,
)
from engine.protocol.requests import (
    AUDIT_HEAD,
    HELLO,
    RECALLED,
    REGISTRY_ABORT,
    REGISTRY_COMMIT,
    REGISTRY_DESTROY,
    REGISTRY_LACKING,
    REGISTRY_MANY,
    REGISTRY_OUTCOME,
    REGISTRY_QUOTA,
    REGISTRY_RESERVE,
    REGISTRY_SETTINGS,
    REGISTRY_SYNC,
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ABORT,
    SHARE_COMMIT,
    SHARE_DESTROY,
    SHARE_LEAVE,
    SHARE_PREPARE,
    SHARE_RECALL,
    SHARE_RELEASE,
    SHARE_SETTINGS,
    Abort,
    AuditNotice,
    Commit,
    Destroy,
    Destroyed,
    Hello,
    KeyDescription,
    Lacking,
    Outcome,
    OutcomeReply,
    Quota,
    QuotaGranted,
    Reserve,
    Reserved,
    Settings,
    SettingsBooked,
    SettingsInForce,
    ShareCommit,
    ShareLeave,
    SharePrepare,
    ShareRecall,
    ShareRelease,
    ShareSettings,
    Sync,
    SyncEntry,
    SyncPage,
)
from engine.protocol.settings import SettingsRecord
from engine.protocol.signed import SigningKey, sign_envelope
from engine.sharing import (
    NodeLocation,
    SecretBuffer,
    SecretShare,
    Share,
    blind,
    check_placement,
    check_value,
    commitment,
    distribute_shares,
    fresh_secret,
    generate_shares,
    new_salt,
)
from nodes.catalogue import Entry
from nodes.gather import Gathering
from nodes.peers import Peers
from nodes.token import Lane

__all__ = ["COMMIT_WAIT_S", "Conversation", "Cursor", "Gathered", "Talker"]

GRACE_S: Final = 2.0
"""How long a dealer waits for the last holders once enough have confirmed."""
COMMIT_WAIT_S: Final = 1.0
"""How long a dealer waits for the holders to take in the certificate; they would learn it from the next grant too."""
SETTINGS_WAIT_S: Final = 2.0
"""How long holders get to take in settings; they learn them from the registry's books too."""
REGISTRY_TIMEOUT_S: Final = 2.0
REGISTRY_PATIENCE_S: Final = 1.0
TAKEOVER_PATIENCE_S: Final = 4.0
"""Where there are several balancers: another takes the registry over within 3 s."""
BUNDLE_PATIENCE: Final = 5
REDIAL_S: Final = 0.05
RECALL_S: Final = 2.0
"""Who does not tell within so long what it knows is asked again later."""
MAX_SYNC_PAGES: Final = 10_000

log = structlog.get_logger()


@dataclass(slots=True)
class Talker:
    """What one worker owns: a channel to the other members and a lane of the token."""

    channel: Channel
    lane: Lane

    def close(self) -> None:
        """Close the channel; the lane lives as long as the process."""
        self.channel.close()

    def drop_late(self) -> None:
        """Take in what came after its request was given up, such as a share, so that it does not wait in memory."""
        self.channel.poll(0)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far this node has read the registry's books: a change number of one fencing epoch, as a balancer told it."""

    fencing_epoch: int = 0
    last: int = 0
    balancer: str = ""


@dataclass(frozen=True, slots=True)
class Gathered:
    """A reconstructed secret (key || blinding), to be closed by whoever loads it, and the holders that lied."""

    secret: SecretBuffer
    corrupt: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Gathered({len(self.secret)} bytes)"


class Conversation(FollowsCluster):
    """How this node talks to the others; safe for several workers, each with its own ``Talker``."""

    def __init__(
        self,
        cluster: ClusterSource,
        signing: SigningKey,
        missing_algorithms: dict[str, str],
        acknowledge: Literal["up", "quorum", "all"],
        own_share: Callable[[Lane, Entry], tuple[Share | SecretShare, bytes]],
        now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        with_room: Callable[[Callable[[], Any]], Any] = lambda make: make(),
    ) -> None:
        self._source = cluster
        self._signing = signing
        self._node = signing.name
        self._missing = missing_algorithms
        self._acknowledge = acknowledge
        self._own_share = own_share
        self._now_ms = now_ms
        self._clock = clock
        self._with_room = with_room
        self._leader = ""
        """The balancer that answered last for the registry."""
        self.peers = Peers()
        self.outdated: Callable[[], None] = lambda: None
        """Called, by a worker, when a holder knows another epoch, version or settings of a key than this node."""

    # --- the combiner ---

    def gather(
        self,
        talker: Talker,
        entry: Entry,
        grant: bytes,
        deadline_s: float,
        extensions: Mapping[str, bytes] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Gathered:
        """Reconstruct the key from its holders under the client's grant, by the monotonic ``deadline_s``.

        ``extensions`` go along with what the holders are asked. ``meanwhile`` is called while they are at it; what it
        raises ends the gathering, and nothing is combined before it has returned.
        """
        failpoint("combiner.gather.begun")
        own = None
        if entry.row.sealed:
            try:
                own = (self._node, *self._own_share(talker.lane, entry))
            except ShareCorrupt as error:  # the others may still suffice
                log.error("corrupt share", key=entry.row.name, holder=self._node, reason=str(error))
        plan = self.peers.plan(self._others(entry), entry.manifest.threshold - (own is not None), self._clock())
        gathering = Gathering(entry.manifest, plan.holders, own, plan.hedge_s)
        try:
            secret = self._drive(talker.channel, gathering, entry, grant, deadline_s, extensions, meanwhile)
        finally:
            gathering.close()
        for holder in gathering.corrupt:
            log.error("corrupt share", key=entry.row.name, holder=holder, reason=gathering.problems[holder])
        if secret is None:
            raise gathering.error()
        failpoint("combiner.gather.gathered")
        return Gathered(secret, gathering.corrupt)

    def _others(self, entry: Entry) -> list[str]:
        """The other holders, beginning after this one, so that combiners that know no latencies ask different ones."""
        holders = [holder.node for holder in entry.manifest.holders]
        place = holders.index(self._node) if self._node in holders else -1
        return holders[place + 1 :] + holders[: max(place, 0)]

    def _drive(
        self,
        channel: Channel,
        gathering: Gathering,
        entry: Entry,
        grant: bytes,
        until_s: float,
        extensions: Mapping[str, bytes] | None,
        meanwhile: Callable[[], None],
    ) -> SecretBuffer | None:
        """Ask, listen and combine until there is the secret, or None: then there is none to be had in time."""
        body = REQUEST_CODECS[SHARE_RELEASE].encode(ShareRelease(entry.row.key_id, grant, entry.row.certificate))
        asked: dict[int, str] = {}

        def ask() -> None:
            """Ask those whose turn it is, if there is time."""
            now = self._clock()
            for holder in gathering.to_ask(now) if now < until_s else ():
                try:
                    asked[channel.start(holder, SHARE_RELEASE, body, until_s - now, extensions)] = holder
                except EngineError as error:
                    gathering.failed(holder, str(error))
                    self.peers.failed(holder, now)

        try:
            ask()
            meanwhile()
            return self._exchange(channel, gathering, until_s, asked, ask)
        finally:
            for token in asked:
                channel.abandon(token)
            now = self._clock()
            for holder, waited_s in gathering.late(now).items():
                self.peers.late(holder, waited_s, now)

    def _exchange(
        self,
        channel: Channel,
        gathering: Gathering,
        until_s: float,
        asked: dict[int, str],
        ask: Callable[[], None],
    ) -> SecretBuffer | None:
        while not gathering.hopeless:
            if gathering.complete:
                secret: SecretBuffer | None = self._with_room(gathering.solve)
                if secret is not None:
                    return secret
                continue
            now = self._clock()
            if now >= until_s:
                for holder, waited_s in gathering.late(now).items():
                    self.peers.late(holder, waited_s, now)
                gathering.give_up()
                break
            ask()
            if not asked:
                continue
            for arrival in channel.poll(min(gathering.wake_s(now), until_s - now)):
                holder = asked.pop(arrival.token, "")
                if holder:
                    self._arrived(gathering, holder, arrival)
        return None

    def _arrived(self, gathering: Gathering, holder: str, arrival: Arrival) -> None:
        now = self._clock()
        released = _decoded(SHARE_RELEASE, arrival)
        if not isinstance(released, EngineError):
            self.peers.answered(holder, arrival.elapsed_us / 1e6, now)
            secret = self._with_room(lambda: SecretBuffer.copy_of(released.y))
            gathering.arrived(holder, SecretShare(released.x, secret), released.salt)
            return
        refused = released if isinstance(released, KeyDisabled | VersionRetired) else None
        gathering.failed(holder, str(released), elsewhere=isinstance(released, StaleKey), refused=refused)
        if isinstance(released, NodeUnavailable | DeadlineExceeded):
            self.peers.failed(holder, now)
        elif isinstance(released, StaleKey | KeyDisabled | VersionRetired):
            self.outdated()

    # --- the dealer ---

    def create(
        self,
        talker: Talker,
        raw_order: bytes,
        material: bytes,
        deadline_s: float,
        earlier: Sequence[Entry] = (),
    ) -> KeyDescription:
        """Make or import a key, or a later version of one, as the client ordered, share it out and have it committed.

        Idempotent by the order: when it was carried out before, its result is returned. ``earlier`` are the versions
        that this node knows, the oldest first; the registry is told of the newest, and their holders of the new one.
        """
        order, _ = open_create_order(raw_order, self._cluster, self._now_ms())
        algo = algorithm(order.algorithm)
        if order.algorithm in self._missing:
            lacking = self._missing[order.algorithm]
            raise UnsupportedAlgorithm(
                f"{order.algorithm!r} can't be served: the token of {self._node!r} lacks {lacking}"
            )
        if order.operation == "import":
            check_material(algo, material)
        elif material:
            raise ValueError(f"a {order.operation} request carries no material")
        reserve = Reserve(raw_order, b"", b"")
        if earlier:
            reserve = Reserve(raw_order, earlier[-1].row.manifest, earlier[-1].row.certificate)
        reserved = self.ask_registry(talker.channel, REGISTRY_RESERVE, reserve, deadline_s)
        failpoint("dealer.create.reserved")
        if reserved.attempt == 0:
            return self.already(talker, reserved)
        warnings = self._check_holders(order, reserved.holders)
        secret, public_key = self._secret(talker.lane, order, material)
        with secret:
            record, offers = self._deal(order, raw_order, reserved, secret, public_key)
        try:
            failpoint("dealer.create.dealt")
            receipts = self._prepare(talker.channel, record, offers, deadline_s)
            failpoint("dealer.create.prepared")
            if earlier and earlier[-1].settings is not None:  # before the shares of those count who are new to the key
                self.spread_settings(talker.channel, earlier[-1].settings.raw, list(receipts), deadline_s)
            certificate: bytes = self.ask_registry(
                talker.channel, REGISTRY_COMMIT, Commit(record.raw, list(receipts.values())), deadline_s
            ).certificate
        except EngineError as error:
            names = [holder.node for holder in record.manifest.holders]
            attempt = Outcome(order.key_id, reserved.attempt)
            certificate = self.give_up(talker.channel, order.name, attempt, names, error)
            receipts = dict.fromkeys(open_certificate(certificate, record, self._cluster), b"")
        failpoint("dealer.create.committed")
        open_certificate(certificate, record, self._cluster)
        self.announce(talker.channel, record, certificate, list(receipts), deadline_s, earlier)
        failpoint("dealer.create.announced")
        absent = [holder.node for holder in record.manifest.holders if holder.node not in receipts]
        if absent:
            warnings = [*warnings, f"{', '.join(absent)} did not store a share; {len(receipts)} of {order.shares} did"]
        return KeyDescription(record.raw, certificate, warnings[:16], b"")

    @staticmethod
    def _secret(lane: Lane, order: CreateOrder, material: bytes) -> tuple[SecretBuffer, bytes]:
        """The secret to be shared, and its public key.

        A generated symmetric key is made in locked memory, with the token's random bytes mixed in, and is never
        ``bytes``. pyca/cryptography makes the others, and an imported one came in a message: those leave copies behind.
        """
        algo = algorithm(order.algorithm)
        if order.operation == "import":
            return blind(material), public_key_der(algo, material)
        if not algo.asymmetric:
            length = algo.bits // 8
            return fresh_secret(length, lane.random(length)), b""
        key = generate_material(algo)
        return blind(key), public_key_der(algo, key)

    def give_up(
        self, channel: Channel, name: str, attempt: Outcome, holders: Sequence[str], error: EngineError | ValueError
    ) -> bytes:
        """Have the registry abort this attempt, so that the next may begin, and raise the error that ended it.

        If only the registry's reply was lost, the key is there: then its certificate is returned.
        """
        failpoint("dealer.abort.before")
        until_s = self._clock() + REGISTRY_TIMEOUT_S
        try:
            told = self.ask_registry(channel, REGISTRY_ABORT, attempt, until_s)
        except EngineError as failure:
            log.warning("the attempt could not be aborted; its order will expire", key=name, reason=str(failure))
            raise error from None
        if told.state == "committed":
            return bytes(told.document)
        failpoint("dealer.abort.booked")
        body = REQUEST_CODECS[SHARE_ABORT].encode(Abort(told.document))
        for holder, reply in self.ask_all(channel, SHARE_ABORT, dict.fromkeys(holders, body), until_s, None):
            if isinstance(reply, EngineError):
                log.info("abort not taken in yet", key=name, holder=holder, reason=str(reply))
        failpoint("dealer.abort.told")
        raise error

    def already(self, talker: Talker, reserved: Reserved) -> KeyDescription:
        """What the order asks for was there before: announce it once more, and describe it."""
        record = open_key_manifest(reserved.manifest, self._cluster)
        holders = open_certificate(reserved.certificate, record, self._cluster)
        self.announce(talker.channel, record, reserved.certificate, holders, self._clock() + COMMIT_WAIT_S)
        return KeyDescription(reserved.manifest, reserved.certificate, [], b"")

    def _check_holders(self, order: CreateOrder, holders: Sequence[str]) -> list[str]:
        """The warnings of a placement; a registry that offers a worse one than the rule gives is not followed."""
        if (
            len(holders) != order.shares
            or len(set(holders)) != len(holders)
            or not set(holders) <= {place.name for place in self._cluster.open_locations}
        ):
            raise ManifestError(f"the registry names the holders {list(holders)} for {order.shares} shares")
        level, places = self._cluster.domain_level, self._cluster.open_locations
        own = self._cluster.group_holders(self._cluster.group_of(order.name))[: order.shares]
        offered = check_placement(places, holders, order.threshold, domain_level=level)
        best = check_placement(places, own, order.threshold, domain_level=level)
        if len(offered) > len(best):
            raise ManifestError(f"the registry's placement is worse than it need be: {offered[0]}")
        return list(offered)

    def _deal(
        self, order: CreateOrder, raw_order: bytes, reserved: Reserved, secret: SecretBuffer, public_key: bytes
    ) -> tuple[KeyRecord, dict[str, SharePrepare]]:
        """Split the secret, give each holder its share, and sign the manifest."""
        level = self._cluster.domain_level
        places = {node.name: node for node in self._cluster.locations}
        dealt = distribute_shares(
            generate_shares(secret, threshold=order.threshold, shares=order.shares),
            [NodeLocation(name, places[name].location) for name in reserved.holders],
            threshold=order.threshold,
            seed=order.key_id,
            domain_level=level,
        )
        # Epoch 1, as in KeyManifest.key_context and context.
        key_context = order.key_id + order.version.to_bytes(4, "big")
        context = key_context + (1).to_bytes(4, "big")
        salts = {name: new_salt() for name in dealt.assignment}
        manifest = KeyManifest(
            key_id=order.key_id,
            name=order.name,
            version=order.version,
            epoch=1,
            attempt=reserved.attempt,
            algorithm=order.algorithm,
            threshold=order.threshold,
            holders=[
                Holder(name, dealt.assignment[name].x, commitment(salts[name], context, dealt.assignment[name]))
                for name in reserved.holders
            ],
            public_key=public_key,
            check_value=check_value(secret, key_context),
            order=raw_order,
            previous=b"",
        )
        raw = sign_envelope("key", self._now_ms(), key_manifests.encode(manifest), self._signing)
        record = open_key_manifest(raw, self._cluster)
        offers = {
            name: SharePrepare(raw, share.x, share.y, salts[name], list(reserved.aborts))
            for name, share in dealt.assignment.items()
        }
        return record, offers

    def _prepare(
        self, channel: Channel, record: KeyRecord, offers: dict[str, SharePrepare], deadline_s: float
    ) -> dict[str, bytes]:
        """Send every holder its share; holder -> receipt, from all that are up and at least from t+1."""
        needed = receipts_needed(record.manifest.threshold, record.manifest.shares)
        needed = record.manifest.shares if self._acknowledge == "all" else needed
        receipts: dict[str, bytes] = {}
        problems: dict[str, EngineError] = {}
        bodies = {name: REQUEST_CODECS[SHARE_PREPARE].encode(offer) for name, offer in offers.items()}
        for holder, reply in self.ask_all(channel, SHARE_PREPARE, bodies, deadline_s, lambda: len(receipts) >= needed):
            try:
                if isinstance(reply, EngineError):
                    raise reply
                if open_receipt(reply.receipt, record, self._cluster) != holder:
                    raise ManifestError(f"{holder} sent the receipt of another")
                receipts[holder] = reply.receipt
                failpoint("dealer.create.prepared-one")
            except EngineError as error:
                problems[holder] = error
        if len(receipts) >= needed:
            return receipts
        for problem in problems.values():
            if not isinstance(problem, NodeUnavailable | DeadlineExceeded):
                raise problem
        told = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise QuorumUnavailable(
            f"{record.manifest.name!r}: {len(receipts)} of the {needed} holders needed stored their share ({told})",
            [name for name in offers if name not in receipts],
        )

    def announce(
        self,
        channel: Channel,
        record: KeyRecord,
        certificate: bytes,
        holders: Sequence[str],
        deadline_s: float,
        earlier: Sequence[Entry] = (),
    ) -> None:
        """Tell the holders that the key is committed, and those of ``earlier`` versions alone that others hold it.

        Who misses it learns it from a combiner or the registry.
        """
        body = REQUEST_CODECS[SHARE_COMMIT].encode(ShareCommit(record.manifest.key_id, certificate))
        until_s = min(deadline_s, self._clock() + COMMIT_WAIT_S)
        replies = self.ask_all(channel, SHARE_COMMIT, dict.fromkeys(holders, body), until_s, None)
        mine = {holder.node for holder in record.manifest.holders}
        others = {holder.node for entry in earlier for holder in entry.manifest.holders} - mine
        body = REQUEST_CODECS[SHARE_LEAVE].encode(ShareLeave(record.raw, certificate))
        told = self.ask_all(channel, SHARE_LEAVE, dict.fromkeys(sorted(others), body), until_s, None)
        for holder, reply in (*replies, *told):
            if isinstance(reply, EngineError):
                log.warning("commit not taken in yet", key=record.manifest.name, holder=holder, reason=str(reply))

    def ask_all(
        self,
        channel: Channel,
        verb: str,
        bodies: dict[str, bytes],
        deadline_s: float,
        enough: Callable[[], bool] | None,
    ) -> Iterator[tuple[str, Any]]:
        """Ask several members at once; yields (member, decoded reply or EngineError) as they come.

        Once ``enough()`` holds, the rest get ``GRACE_S`` more, or nothing more with acknowledge = "quorum".
        """
        asked: dict[int, str] = {}
        for name, body in bodies.items():
            try:
                asked[channel.start(name, verb, body, max(0.001, deadline_s - self._clock()))] = name
            except KeyRefused as error:  # of this node's key: nothing that the client whom it serves may not do
                yield name, NodeUnavailable(str(error))
            except EngineError as error:
                yield name, error
        until_s, hurried = deadline_s, False
        while asked and (left_s := until_s - self._clock()) > 0:
            for arrival in channel.poll(left_s):
                name = asked.pop(arrival.token, "")
                if name:
                    yield name, _decoded(verb, arrival)
            if enough is not None and not hurried and enough():
                hurried = True
                until_s = min(until_s, self._clock() + (0.0 if self._acknowledge == "quorum" else GRACE_S))
        for token, name in asked.items():
            channel.abandon(token)
            yield name, DeadlineExceeded(f"{name}: no reply to {verb} in time")

    # --- the registry ---

    def ask_registry(self, channel: Channel, verb: str, message: object, deadline_s: float) -> Any:
        """Ask the registry, at each balancer in turn; ``RegistryUnavailable`` if none answers.

        A balancer that has just started, or does not know this node's new key yet, is dialled again for a second before
        it counts as away; where there are several, until one of them leads.
        """
        return self._ask_registry(channel, verb, message, deadline_s)[1]

    def _ask_registry(self, channel: Channel, verb: str, message: object, deadline_s: float) -> tuple[str, Any]:
        """Who answered, and what."""
        problems: dict[str, str] = {}
        balancers = [each.name for each in self._cluster.of_role("balancer")]
        alone = len(balancers) == 1
        patient_until_s = min(deadline_s, self._clock() + (REGISTRY_PATIENCE_S if alone else TAKEOVER_PATIENCE_S))
        while True:
            untried = sorted(balancers, key=lambda name: name != self._leader)
            while untried:
                name = untried.pop(0)
                # A bundle is as much work as all that is in it, and no client waits for it.
                patience_s = REGISTRY_TIMEOUT_S * (BUNDLE_PATIENCE if verb == REGISTRY_MANY else 1)
                left_s = min(patience_s, deadline_s - self._clock())
                if left_s <= 0:
                    problems.setdefault(name, f"{name}: the deadline is over")
                    continue
                try:
                    told = ask(channel, name, verb, message, left_s)
                except Moved as moved:
                    problems[name] = f"{name}: {moved}"
                    leaders = [each for each in untried if each in moved.names]
                    untried = leaders + [each for each in untried if each not in leaders]
                except (NodeUnavailable, DeadlineExceeded, KeyRefused, RegistryUnavailable) as error:
                    if alone and isinstance(error, RegistryUnavailable):
                        raise
                    problems[name] = str(error)
                else:
                    self._leader = name
                    return name, told
            if not problems or self._clock() >= patient_until_s:
                break
            channel.poll(REDIAL_S)
        why = "; ".join(problems.values()) or "the cluster manifest names no balancer"
        raise RegistryUnavailable(f"this needs the registry, which does not answer ({why})")

    def destroy(self, talker: Talker, raw_order: bytes, entries: Sequence[Entry], deadline_s: float) -> Destroyed:
        """Have the registry and every holder of a version in ``entries`` carry out the client's destroy order."""
        failpoint("dealer.destroy.before")
        self.ask_registry(talker.channel, REGISTRY_DESTROY, Destroy(raw_order), deadline_s)
        failpoint("dealer.destroy.booked")
        body = REQUEST_CODECS[SHARE_DESTROY].encode(Destroy(raw_order))
        holders = list(dict.fromkeys(holder.node for entry in entries for holder in entry.manifest.holders))
        confirmed = []
        for holder, reply in self.ask_all(
            talker.channel, SHARE_DESTROY, dict.fromkeys(holders, body), deadline_s, None
        ):
            if isinstance(reply, EngineError):
                log.warning("destruction pending", key=entries[0].row.name, holder=holder, reason=str(reply))
            else:
                confirmed.append(holder)
        failpoint("dealer.destroy.told")
        return Destroyed(confirmed, [name for name in holders if name not in confirmed])

    def settle_settings(
        self, talker: Talker, settings: SettingsRecord, entries: Sequence[Entry], deadline_s: float
    ) -> SettingsInForce:
        """Have the registry book a client's settings and every holder of the key's versions keep them.

        Those that are in force then come back: others, if somebody's came before.
        """
        failpoint("dealer.settings.before")
        booked: SettingsBooked = self.ask_registry(
            talker.channel, REGISTRY_SETTINGS, Settings(settings.raw), deadline_s
        )
        failpoint("dealer.settings.booked")
        known = (holder.node for entry in entries for holder in entry.manifest.holders)
        # The registry knows the holders of versions too that this node has never held.
        holders = list(dict.fromkeys([*known, *booked.holders]))
        told = self.spread_settings(talker.channel, booked.settings, holders, deadline_s)
        failpoint("dealer.settings.told")
        confirmed = [name for name in holders if name in told]
        return SettingsInForce(booked.settings, confirmed, [name for name in holders if name not in told])

    def spread_settings(self, channel: Channel, booked: bytes, holders: Sequence[str], deadline_s: float) -> set[str]:
        """Tell holders the settings of a key; who keeps them now. The others learn them from the registry's books."""
        body = REQUEST_CODECS[SHARE_SETTINGS].encode(ShareSettings(booked))
        until_s = min(deadline_s, self._clock() + SETTINGS_WAIT_S)
        confirmed = set()
        for holder, reply in self.ask_all(channel, SHARE_SETTINGS, dict.fromkeys(holders, body), until_s, None):
            if isinstance(reply, EngineError):
                log.warning("settings not taken in yet", holder=holder, reason=str(reply))
            else:
                confirmed.add(holder)
        return confirmed

    def offer_settings(self, talker: Talker, booked: bytes) -> None:
        """Give a registry that fell back the settings that it lost."""
        try:
            self.ask_registry(talker.channel, REGISTRY_SETTINGS, Settings(booked), self._clock() + REGISTRY_TIMEOUT_S)
        except RegistryUnavailable:
            raise
        except EngineError as error:
            log.warning("the registry does not take settings that it lost", reason=str(error))

    def registry_books(self, talker: Talker, cursor: Cursor) -> tuple[list[SyncEntry], Cursor]:
        """What changed in the registry's books of this node's keys since ``cursor``, and the next cursor.

        Destroyed keys come first, since their names may be others' by now. After a restart of the registry everything
        is asked for again.
        """
        entries: list[SyncEntry] = []
        for _ in range(MAX_SYNC_PAGES):
            until_s = self._clock() + REGISTRY_TIMEOUT_S
            page: SyncPage
            balancer, page = self._ask_registry(talker.channel, REGISTRY_SYNC, Sync(cursor.last), until_s)
            if page.fencing_epoch != cursor.fencing_epoch and cursor.last:
                cursor, entries = Cursor(page.fencing_epoch, 0, balancer), []
                continue
            entries += page.entries
            cursor = Cursor(page.fencing_epoch, page.last, balancer)
            if not page.more or not page.entries:
                break
        return sorted(entries, key=lambda entry: entry.state != "destroyed"), cursor

    def recall(
        self, talker: Talker, names: Sequence[str], keys: Sequence[tuple[bytes, int, int]]
    ) -> tuple[list[str], list[SyncEntry]]:
        """Ask other nodes what has become of this node's keys; who told it of all, and what is later than here.

        First the newest manifest that one of them has is taken. Nothing else that they say is checked here.
        """
        self._meet(talker.channel, names)
        answered: list[str] = []
        told: dict[SyncEntry, None] = {}
        places = dict.fromkeys(names, 0)
        while places:
            answered += [name for name, place in places.items() if place >= len(keys)]
            asked = {name: list(keys[at : at + RECALLED]) for name, at in places.items() if at < len(keys)}
            bodies = {name: REQUEST_CODECS[SHARE_RECALL].encode(ShareRecall(page)) for name, page in asked.items()}
            before, places, until_s = places, {}, self._clock() + RECALL_S
            for name, reply in self.ask_all(talker.channel, SHARE_RECALL, bodies, until_s, None):
                if isinstance(reply, EngineError):
                    log.info("a node does not tell what it knows", member=name, reason=str(reply))
                    continue
                known = {key_id for key_id, *_ in asked[name]}
                told |= dict.fromkeys(each for each in reply.entries if each.key_id in known)
                places[name] = before[name] + reply.done
        return answered, list(told)

    def _meet(self, channel: Channel, names: Sequence[str]) -> None:
        """Take the newest cluster manifest that one of these has."""
        body = REQUEST_CODECS[HELLO].encode(Hello(spoken().highest, __version__))
        until_s = self._clock() + RECALL_S
        serials = {
            name: reply.cluster_serial
            for name, reply in self.ask_all(channel, HELLO, dict.fromkeys(names, body), until_s, None)
            if not isinstance(reply, EngineError)
        }
        for name in sorted(serials, key=lambda each: -serials[each]):
            if serials[name] <= self._cluster.serial:
                return
            try:
                pull(channel, name, self._source)
            except EngineError as error:
                log.warning("no manifest", member=name, reason=str(error))

    def report_lacking(self, talker: Talker, keys: Sequence[tuple[bytes, int]]) -> None:
        """Tell the registry of shares that this node is to hold and has not."""
        until_s = self._clock() + REGISTRY_TIMEOUT_S
        self.ask_registry(talker.channel, REGISTRY_LACKING, Lacking(list(keys)), until_s)

    def tell(self, talker: Talker, names: Sequence[str], head: bytes, timeout_s: float) -> list[str]:
        """Tell nodes the newest head of this node's audit log; who confirmed it. One that is away is asked again."""
        body = REQUEST_CODECS[AUDIT_HEAD].encode(AuditNotice(head))
        until_s = self._clock() + timeout_s
        replies = self.ask_all(talker.channel, AUDIT_HEAD, dict.fromkeys(names, body), until_s, None)
        return [name for name, reply in replies if not isinstance(reply, EngineError)]

    def quota(self, talker: Talker, entry: Entry, nonce: bytes, until_s: float) -> int:
        """More uses of a key whose uses are limited, from the registry; 0 if there are no more."""
        failpoint("combiner.quota.before")
        granted: QuotaGranted = self.ask_registry(
            talker.channel, REGISTRY_QUOTA, Quota(entry.row.key_id, nonce), until_s
        )
        failpoint("combiner.quota.granted")
        return granted.uses

    def outcome(self, talker: Talker, entry: Entry) -> OutcomeReply:
        """What became of a prepared share's key."""
        question = Outcome(entry.row.key_id, entry.row.attempt)
        reply: OutcomeReply = self.ask_registry(
            talker.channel, REGISTRY_OUTCOME, question, self._clock() + REGISTRY_TIMEOUT_S
        )
        return reply


def _decoded(verb: str, arrival: Any) -> Any:
    try:
        if arrival.reply is None:
            raise arrival.error or DeadlineExceeded("no reply")
        raise_for_status(arrival.reply)
        return REPLY_CODECS[verb].decode(arrival.reply.body)
    except EngineError as error:
        return error
    except ValueError as error:
        return ManifestError(str(error))
