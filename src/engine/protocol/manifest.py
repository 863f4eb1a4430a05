"""The signed documents of a cluster and of a key: members, policy, orders, key manifests, receipts, certificates.

It checks each document against the ones it rests on. It reads no file and no clock: times are arguments, in
milliseconds since the Unix epoch.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol, TypeVar

import zmq.utils.z85
from msgspec import Meta, Struct

from engine.errors import AccessDenied, ManifestError
from engine.keys import ALGORITHMS, POLICY_OPERATIONS, RequestType
from engine.protocol.signed import (
    MAX_ENVELOPE,
    Signed,
    SigningKey,
    add_signature,
    encode_body,
    read_unverified,
    sign_bodies,
    sign_envelope,
    verify_envelope,
)
from engine.protocol.wire import Codec, Digest, Identifier, Name, UInt
from engine.sharing import NodeLocation, order_holders, placement_group

__all__ = [
    "MAX_HOLDERS",
    "AbortNotice",
    "Cluster",
    "ClusterSource",
    "CommitCertificate",
    "CreateOrder",
    "DestroyOrder",
    "FollowsCluster",
    "Holder",
    "KeyManifest",
    "KeyRecord",
    "Member",
    "PolicyRule",
    "Receipt",
    "RefreshOrder",
    "ReshareOrder",
    "Retiring",
    "Role",
    "chain_after",
    "chain_serial",
    "check_dealers",
    "check_expiry",
    "check_share_counts",
    "check_successor",
    "decode_card",
    "encode_card",
    "first_quota",
    "follow_chain",
    "join_chains",
    "open_abort",
    "open_certificate",
    "open_chain",
    "open_change_order",
    "open_create_order",
    "open_destroy_order",
    "open_key_manifest",
    "open_move_order",
    "open_receipt",
    "open_receipts",
    "open_refresh_order",
    "open_renew_order",
    "open_renewing_order",
    "open_reshare_order",
    "open_sharing_order",
    "ordered_shape",
    "read_certificate",
    "read_change_order",
    "read_create_order",
    "read_key_manifest",
    "receipts_needed",
    "sign_order",
    "sign_orders",
    "split_chain",
    "trial_of",
]

MAX_HOLDERS = 64
"""Most shares of one key in a cluster, so that manifest and certificate fit one message. The core itself takes 255."""
MAX_MEMBERS = 4096
CLOCK_SKEW_MS = 5_000
"""How far two members' clocks may differ."""
ORDER_LIFETIME_MAX_MS = 15 * 60_000
MAX_VERSION = 2**32 - 1

Role = Literal["operator", "node", "client", "balancer"]
Public = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Member(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One member: ``[name, role, sign_public, curve_public, endpoint, publish_endpoint, location]``.

    An operator has no CURVE key (32 zero bytes), only nodes and balancers have endpoints, only nodes a location.
    """

    name: Name
    role: Role
    sign_public: Public
    curve_public: Public
    endpoint: Annotated[str, Meta(max_length=256)] = ""
    publish_endpoint: Annotated[str, Meta(max_length=256)] = ""
    location: Annotated[str, Meta(max_length=256)] = ""

    @property
    def curve_z85(self) -> str:
        """The CURVE public key as ZeroMQ writes it (40 characters of Z85), also the ``User-Id`` of its messages."""
        return zmq.utils.z85.encode(self.curve_public).decode("ascii")


class PolicyRule(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``[identity, keys, operations]``: client-name pattern, key-name pattern (shell globs), operations or ``*``.

    An operation is a request type, or ``grow``, which a balancer alone has use for and ``*`` does not include.
    """

    identity: Annotated[str, Meta(min_length=1, max_length=128)]
    keys: Annotated[str, Meta(min_length=1, max_length=128)]
    operations: Annotated[list[Annotated[str, Meta(min_length=1, max_length=32)]], Meta(min_length=1, max_length=32)]


class Retiring(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A CURVE key that a member changes: ``[name, curve_public, endpoint, publish_endpoint]`` of before.

    As a client the member is known by both keys, and as a server it serves the one at each of its two endpoints, so
    that who has not heard of the new key yet goes on.
    """

    name: Name
    curve_public: Public
    endpoint: Annotated[str, Meta(max_length=256)] = ""
    publish_endpoint: Annotated[str, Meta(max_length=256)] = ""

    @property
    def curve_z85(self) -> str:
        """The key as ZeroMQ writes it."""
        return zmq.utils.z85.encode(self.curve_public).decode("ascii")


class _ClusterManifest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    cluster: Name
    previous: Annotated[bytes, Meta(max_length=32)]
    quorum: Annotated[int, Meta(ge=1, le=64)]
    members: Annotated[list[Member], Meta(min_length=1, max_length=MAX_MEMBERS)]
    rules: Annotated[list[PolicyRule], Meta(max_length=4096)]
    groups: Annotated[int, Meta(ge=1, le=65536)]
    domain_level: Annotated[int, Meta(ge=1, le=8)]
    retiring: Annotated[list[Retiring], Meta(max_length=MAX_MEMBERS)]
    draining: Annotated[list[Name], Meta(max_length=MAX_MEMBERS)] = []


class _Chain(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    envelopes: Annotated[list[Annotated[bytes, Meta(max_length=MAX_ENVELOPE)]], Meta(min_length=1, max_length=10_000)]


_manifests = Codec(_ClusterManifest, "cluster manifest", MAX_ENVELOPE)
_chains = Codec(_Chain, "cluster manifest file", 64 * MAX_ENVELOPE)
_cards = Codec(Member, "identity card", 4096)
_CARD_KIND = "card"
_CLUSTER_KIND = "cluster"
_REFRESH_KIND = "order.refresh"
_RENEW_KIND = "order.renew"
_RESHARE_KIND = "order.reshare"
_MOVE_KIND = "order.move"


def encode_card(member: Member, key: SigningKey) -> bytes:
    """The identity card of a member: its description signed by its own key, so that it proves to own that key."""
    return sign_envelope(_CARD_KIND, 1, _cards.encode(member), key)


def decode_card(raw: bytes) -> Member:
    """The member of a card, its own signature checked."""
    member = _cards.decode(read_unverified(raw).payload)
    signed = verify_envelope(raw, _CARD_KIND, {member.name: member.sign_public})
    if signed.issuer != member.name:
        raise ManifestError(f"card: issued by {signed.issuer!r} for {member.name!r}")
    return member


@dataclass(frozen=True)
class Cluster:
    """A verified cluster manifest: who is a member, what each may do, how placement groups map to nodes."""

    name: str
    serial: int
    digest: bytes
    pin: bytes
    quorum: int
    members: Mapping[str, Member]
    rules: tuple[PolicyRule, ...]
    groups: int
    domain_level: int
    past: Mapping[tuple[str, Role], tuple[bytes, ...]]
    """Every signing key that a member of a name and role had in any manifest of the chain, today's included."""
    past_rules: tuple[PolicyRule, ...]
    """Every rule of any manifest of the chain, today's included."""
    retiring: Mapping[str, Retiring] = field(default_factory=dict)
    """The members that change their CURVE key, and the one of before."""
    draining: frozenset[str] = frozenset()
    """The nodes that are to be emptied: they serve the keys that they hold, and are given no others."""

    @property
    def cluster(self) -> Cluster:
        """Itself: a cluster whose manifest does not change, where a ``ClusterSource`` is wanted."""
        return self

    def of_role(self, role: Role) -> tuple[Member, ...]:
        """The members of a role, in the manifest's order."""
        return tuple(member for member in self.members.values() if member.role == role)

    @cached_property
    def by_curve(self) -> Mapping[str, Member]:
        """Members by their Z85 CURVE key, and by the retiring one where they have one."""
        retiring = {each.curve_z85: self.members[each.name] for each in self.retiring.values()}
        return MappingProxyType(retiring | {m.curve_z85: m for m in self.members.values() if m.role != "operator"})

    @cached_property
    def nodes(self) -> Mapping[str, Member]:
        """The nodes by name."""
        return MappingProxyType({member.name: member for member in self.of_role("node")})

    @cached_property
    def servers(self) -> Mapping[str, Member]:
        """The nodes and balancers by name: who can be connected to."""
        return MappingProxyType({m.name: m for m in self.members.values() if m.role in ("node", "balancer")})

    @cached_property
    def locations(self) -> tuple[NodeLocation, ...]:
        """The nodes' places, as placement takes them."""
        return tuple(NodeLocation(node.name, node.location) for node in self.nodes.values())

    @cached_property
    def open_locations(self) -> tuple[NodeLocation, ...]:
        """The places of the nodes that shares may be given to: of all but those that are draining."""
        return tuple(place for place in self.locations if place.name not in self.draining)

    def sign_key(self, *roles: Role) -> Mapping[str, bytes]:
        """The Ed25519 public keys of the members of these roles, by name."""
        found = self._sign_keys.get(roles)
        if found is None:
            found = {m.name: m.sign_public for m in self.members.values() if m.role in roles}
            self._sign_keys[roles] = found
        return found

    def sign_key_ever(self, role: Role) -> Mapping[str, tuple[bytes, ...]]:
        """The same with all keys of past manifests: for documents that were made under them and still stand."""
        found = self._sign_keys_ever.get(role)
        if found is None:
            found = {name: keys for (name, its_role), keys in self.past.items() if its_role == role}
            self._sign_keys_ever[role] = found
        return found

    @cached_property
    def _sign_keys(self) -> dict[tuple[Role, ...], Mapping[str, bytes]]:
        return {}

    @cached_property
    def _sign_keys_ever(self) -> dict[Role, Mapping[str, tuple[bytes, ...]]]:
        return {}

    @cached_property
    def seen(self) -> Seen:
        """Documents of keys that were found good by this manifest, whatever the time is: they come again and again."""
        return Seen()

    def allows(self, identity: str, operation: str, key_name: str) -> bool:
        """Whether the policy lets a client do this to that key; what no rule allows is denied.

        Who may decrypt and encrypt may ``rewrap``, too.
        """
        if _allowed(self.rules, identity, operation, key_name):
            return True
        parts = (RequestType.DECRYPT, RequestType.ENCRYPT) if operation == RequestType.REWRAP else ()
        return bool(parts) and all(_allowed(self.rules, identity, each, key_name) for each in parts)

    def allowed_ever(self, identity: str, operation: str, key_name: str) -> bool:
        """Whether the policy of any manifest of the chain did."""
        return _allowed(self.past_rules, identity, operation, key_name)

    def allows_any_key(self, identity: str, operation: str) -> bool:
        """Whether the policy lets a client do this to at least one conceivable key."""
        return any(
            _matches(rule.identity, identity) and ("*" in rule.operations or operation in rule.operations)
            for rule in self.rules
        )

    def allows_every_key(self, identity: str, operation: str) -> bool:
        """Whether the policy lets a client do this to all keys: by a rule for ``*``, and no narrower one."""
        return any(
            rule.keys == "*"
            and _matches(rule.identity, identity)
            and ("*" in rule.operations or operation in rule.operations)
            for rule in self.rules
        )

    def may_grow(self, balancer: str, key_name: str, *, ever: bool = False) -> bool:
        """Whether a balancer may give a key more holders than its client ordered; ``ever``: by any past manifest."""
        return any(
            "grow" in rule.operations and _matches(rule.identity, balancer) and _matches(rule.keys, key_name)
            for rule in (self.past_rules if ever else self.rules)
        )

    def group_of(self, key_name: str) -> int:
        """The placement group of a key."""
        return placement_group(key_name, self.groups)

    def group_holders(self, group: int) -> tuple[str, ...]:
        """The nodes of a placement group in order, best spread first; a key of n shares uses the first n.

        Nodes that are draining are in no group.
        """
        holders = self._holders.get(group)
        if holders is None:
            seed = self.name.encode() + group.to_bytes(4, "big")
            holders = order_holders(self.open_locations, seed, domain_level=self.domain_level, count=MAX_HOLDERS)
            self._holders[group] = holders
        return holders

    def first_holders(self, group: int, count: int) -> tuple[str, ...]:
        """The first of ``group_holders``, without working out the others, which takes long in a large cluster."""
        known = self._holders.get(group)
        seed = self.name.encode() + group.to_bytes(4, "big")
        return (known or order_holders(self.open_locations, seed, domain_level=self.domain_level, count=count))[:count]

    @cached_property
    def _holders(self) -> dict[int, tuple[str, ...]]:
        return {}


class Seen:
    """What some of the newest documents say, by their bytes; safe for several threads."""

    def __init__(self, most: int = 2048) -> None:
        self._most = most
        self._known: dict[tuple[bytes, ...], Any] = {}
        self._lock = threading.Lock()

    def get(self, *key: bytes) -> Any:
        """What was put in under this key, or None."""
        return self._known.get(key)

    def put(self, value: Any, *key: bytes) -> None:
        """Keep it in the place of the oldest."""
        with self._lock:
            self._known[key] = value
            if len(self._known) > self._most:
                del self._known[next(iter(self._known))]


class ClusterSource(Protocol):
    """Where the cluster's newest manifest is had from, anew for each decision: a process may take one any time."""

    @property
    def cluster(self) -> Cluster:
        """The newest one."""


class FollowsCluster:
    """Base of what decides by the newest manifest of its source, ``_source``."""

    _source: ClusterSource

    @property
    def _cluster(self) -> Cluster:
        return self._source.cluster


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _allowed(rules: Iterable[PolicyRule], identity: str, operation: str, key_name: str) -> bool:
    return any(
        _matches(rule.identity, identity)
        and _matches(rule.keys, key_name)
        and ("*" in rule.operations or operation in rule.operations)
        for rule in rules
    )


def _matches(pattern: str, name: str) -> bool:
    return pattern == "*" or _pattern(pattern).match(name) is not None


def _check_members(members: Sequence[Member], quorum: int) -> None:
    names: set[str] = set()
    keys: set[bytes] = set()
    for member in members:
        if member.name in names:
            raise ManifestError(f"cluster manifest: the name {member.name!r} appears twice")
        if member.role == "node" and not all(member.location.split("/")):
            raise ManifestError(
                f"cluster manifest: the location {member.location!r} of {member.name!r} has an empty part"
            )
        own = {member.sign_public} if member.role == "operator" else {member.sign_public, member.curve_public}
        if own & keys:
            raise ManifestError(f"cluster manifest: a key of {member.name!r} belongs to another member too")
        if member.role in ("node", "balancer") and not member.endpoint.startswith("tcp://"):
            raise ManifestError(f"cluster manifest: {member.name!r} needs an endpoint tcp://host:port")
        if member.role == "node" and not member.location:
            raise ManifestError(
                f"cluster manifest: the node {member.name!r} needs a location such as site/room/rack/host"
            )
        names.add(member.name)
        keys |= own
    operators = sum(member.role == "operator" for member in members)
    if not 1 <= quorum <= operators:
        raise ManifestError(f"cluster manifest: a quorum of {quorum} among {operators} operators")


def _check_retiring(retiring: Iterable[Retiring], members: Sequence[Member]) -> None:
    known = {member.name: member for member in members if member.role != "operator"}
    keys = {key for member in members for key in (member.sign_public, member.curve_public)}
    seen: set[str] = set()
    for each in retiring:
        member = known.get(each.name)
        if member is None or each.name in seen:
            raise ManifestError(f"cluster manifest: {each.name!r} has a retiring key twice, or is no member")
        if each.curve_public in keys:
            raise ManifestError(f"cluster manifest: the retiring key of {each.name!r} is in use")
        if member.endpoint and not each.endpoint.startswith("tcp://"):
            raise ManifestError(
                f"cluster manifest: the retiring key of {each.name!r} needs an endpoint tcp://host:port"
            )
        seen.add(each.name)
        keys.add(each.curve_public)


def _check_draining(draining: Sequence[str], members: Sequence[Member]) -> None:
    nodes = {member.name for member in members if member.role == "node"}
    for name in draining:
        if name not in nodes:
            raise ManifestError(f"cluster manifest: {name!r} can't be draining, it is no node of the cluster")
    if len(set(draining)) != len(draining):
        raise ManifestError("cluster manifest: a node is draining twice")


def _check_rules(rules: Iterable[PolicyRule]) -> None:
    known = {"*", *POLICY_OPERATIONS}
    for rule in rules:
        for operation in rule.operations:
            if operation not in known:
                raise ManifestError(
                    f"cluster manifest: unknown operation {operation!r}; known are {', '.join(sorted(known))}"
                )


def issue_cluster_manifest(
    *,
    name: str,
    members: Sequence[Member],
    rules: Sequence[PolicyRule],
    operators: Sequence[SigningKey],
    quorum: int = 1,
    groups: int = 1024,
    domain_level: int = 1,
    chain: bytes = b"",
    retiring: Sequence[Retiring] = (),
    draining: Sequence[str] | None = None,
) -> bytes:
    """The chain of manifests with a new one at its end, signed by ``operators``.

    ``chain`` is empty for the first manifest. Name and ``groups`` are fixed when the cluster is made. ``draining`` is
    None where the nodes that are go on to be, as long as they are members.
    """
    _check_members(members, quorum)
    _check_rules(rules)
    _check_retiring(retiring, members)
    envelopes = list(_chains.decode(chain).envelopes) if chain else []
    serial, previous = 1, b""
    if envelopes:
        last = read_unverified(envelopes[-1])
        before = _manifests.decode(last.payload)
        if (before.cluster, before.groups) != (name, groups):
            raise ManifestError(
                f"cluster manifest: name and groups are fixed at {before.cluster!r} and {before.groups}, "
                f"not {name!r} and {groups}"
            )
        serial, previous = last.serial + 1, last.digest
        if draining is None:
            nodes = {member.name for member in members if member.role == "node"}
            draining = [each for each in before.draining if each in nodes]
    emptied = sorted(draining or ())
    _check_draining(emptied, members)
    payload = _manifests.encode(
        _ClusterManifest(
            name, previous, quorum, list(members), list(rules), groups, domain_level, list(retiring), emptied
        )
    )
    envelopes.append(sign_envelope(_CLUSTER_KIND, serial, payload, *operators))
    return _chains.encode(_Chain(envelopes))


def countersign_chain(chain: bytes, key: SigningKey) -> bytes:
    """The chain with one more operator's signature on its newest manifest."""
    envelopes = list(_chains.decode(chain).envelopes)
    envelopes[-1] = add_signature(envelopes[-1], key)
    return _chains.encode(_Chain(envelopes))


def chain_pin(chain: bytes) -> bytes:
    """The hash of the first manifest, 32 bytes: what every member pins."""
    return read_unverified(_chains.decode(chain).envelopes[0]).digest


def open_chain(chain: bytes, pin: bytes) -> Cluster:
    """The newest manifest of a chain, after every link was checked back to the pinned first one.

    Each manifest has the next serial, names its predecessor's hash and is signed by the predecessor's quorum of the
    predecessor's operators (the first by its own).
    """
    first, *later = _chains.decode(chain).envelopes
    cluster = _first_manifest(first, pin)
    for raw in later:
        cluster = _follow(cluster, raw)
    return cluster


def chain_serial(chain: bytes) -> int:
    """The serial of the newest manifest of a verified chain."""
    return len(_chains.decode(chain).envelopes)


def chain_after(chain: bytes, serial: int) -> bytes:
    """The manifests of a verified chain that come after ``serial``, in the same form; empty if none do."""
    later = _chains.decode(chain).envelopes[serial:]
    return _chains.encode(_Chain(later)) if later else b""


def join_chains(chain: bytes, serial: int, later: bytes) -> bytes:
    """The first ``serial`` manifests of a chain and those in ``later`` as one chain, unchecked."""
    return _chains.encode(_Chain([*_chains.decode(chain).envelopes[:serial], *_chains.decode(later).envelopes]))


def follow_chain(cluster: Cluster, chain: bytes, later: bytes) -> tuple[Cluster, bytes]:
    """The cluster after the manifests in ``later``, which follow those of its verified ``chain``; and the whole chain.

    ``ManifestError`` if one does not follow. What is known is not checked again.
    """
    added = _chains.decode(later).envelopes
    for raw in added:
        cluster = _follow(cluster, raw)
    return cluster, _chains.encode(_Chain([*_chains.decode(chain).envelopes, *added]))


def split_chain(chain: bytes, known: bytes) -> tuple[int, bytes]:
    """How many manifests a chain has in common with a known one from the first on, and what comes after those.

    A manifest is the same whoever signed it: more operators may sign one that is in force, and anybody can leave out a
    signature that is not needed.
    """
    told, mine = _chains.decode(chain).envelopes, _chains.decode(known).envelopes
    common = 0
    for each, other in zip(told, mine, strict=False):
        if each != other and read_unverified(each).digest != read_unverified(other).digest:
            break
        common += 1
    rest = told[common:]
    return common, _chains.encode(_Chain(rest)) if rest else b""


def _first_manifest(raw: bytes, pin: bytes) -> Cluster:
    manifest = _manifests.decode(read_unverified(raw).payload)
    signed = verify_envelope(raw, _CLUSTER_KIND, _operators(manifest.members), threshold=manifest.quorum)
    if signed.digest != pin:
        raise ManifestError(f"cluster manifest: the first one has hash {signed.digest.hex()}, pinned is {pin.hex()}")
    if (signed.serial, manifest.previous) != (1, b""):
        raise ManifestError("cluster manifest: the first one must have serial 1 and no predecessor")
    return _as_cluster(signed, manifest, pin, {}, ())


def _follow(before: Cluster, raw: bytes) -> Cluster:
    """The cluster by the manifest in ``raw``, whose predecessor is that of ``before``."""
    signed = verify_envelope(raw, _CLUSTER_KIND, _operators(before.members.values()), threshold=before.quorum)
    manifest = _manifests.decode(signed.payload)
    if signed.serial != before.serial + 1 or manifest.previous != before.digest:
        raise ManifestError(f"cluster manifest: serial {signed.serial} does not follow {before.serial}")
    if (manifest.cluster, manifest.groups) != (before.name, before.groups):
        raise ManifestError("cluster manifest: the name and the number of groups can't change")
    return _as_cluster(signed, manifest, before.pin, before.past, before.past_rules)


def _operators(members: Iterable[Member]) -> Mapping[str, bytes]:
    return {member.name: member.sign_public for member in members if member.role == "operator"}


def check_content(manifest: _ClusterManifest) -> None:
    """Refuse a manifest whose parts contradict each other, whoever signed it."""
    _check_members(manifest.members, manifest.quorum)
    _check_rules(manifest.rules)
    _check_retiring(manifest.retiring, manifest.members)
    _check_draining(manifest.draining, manifest.members)


def _as_cluster(
    signed: Signed,
    manifest: _ClusterManifest,
    pin: bytes,
    past: Mapping[tuple[str, Role], tuple[bytes, ...]],
    past_rules: tuple[PolicyRule, ...],
) -> Cluster:
    check_content(manifest)
    keys = dict(past)
    for member in manifest.members:
        known = keys.get((member.name, member.role), ())
        keys[member.name, member.role] = tuple(dict.fromkeys((*known, member.sign_public)))
    return Cluster(
        name=manifest.cluster,
        serial=signed.serial,
        digest=signed.digest,
        pin=pin,
        quorum=manifest.quorum,
        members=MappingProxyType({member.name: member for member in manifest.members}),
        rules=tuple(manifest.rules),
        groups=manifest.groups,
        domain_level=manifest.domain_level,
        past=MappingProxyType(keys),
        past_rules=(*past_rules, *manifest.rules),
        retiring=MappingProxyType({each.name: each for each in manifest.retiring}),
        draining=frozenset(manifest.draining),
    )


# --- documents of a key ---------------------------------------------------------------------------------------------


def check_share_counts(threshold: int, shares: int) -> None:
    """Refuse a t-of-n that a cluster can't hold; the messages name the value and the limit."""
    if not 1 <= threshold <= shares:
        raise ValueError(f"threshold {threshold} must lie in 1..{shares}, the number of shares")
    if shares > MAX_HOLDERS:
        raise ValueError(f"{shares} shares; a key in a cluster has at most {MAX_HOLDERS}")


def receipts_needed(threshold: int, shares: int, epoch: int = 1) -> int:
    """How many holders must have stored their share before an epoch is acknowledged.

    In the first t+1, or n if that is less; in later ones all n, since the shares of the epoch before are erased then.
    """
    return min(shares, threshold + 1) if epoch == 1 else shares


class CreateOrder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A client's signed order to create a key; its ``key_id`` is the request's idempotency id too.

    ``rotate`` makes a later ``version`` of the key whose version 1 has the id ``lineage``, which is empty otherwise.
    ``uses_max`` is how often this version may encrypt, sign and make MACs, by all nodes together; 0 is left to the
    algorithm.
    """

    key_id: Identifier
    name: Name
    algorithm: Annotated[str, Meta(max_length=64)]
    threshold: Annotated[int, Meta(ge=1, le=MAX_HOLDERS)]
    shares: Annotated[int, Meta(ge=1, le=MAX_HOLDERS)]
    operation: Literal["generate", "import", "rotate"]
    expires_ms: UInt
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)] = 1
    lineage: Annotated[bytes, Meta(max_length=16)] = b""
    uses_max: UInt = 0


class DestroyOrder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A client's signed order to destroy a key for good, all versions: ``key_id`` is that of version 1."""

    key_id: Identifier
    name: Name
    expires_ms: UInt


class RefreshOrder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A signed order to replace the shares of one epoch of a key: ``from_epoch`` shall not be the last.

    A client's has ``fencing`` 0, a balancer's (kind ``order.renew``) that of its registry.
    """

    key_id: Identifier
    name: Name
    from_epoch: Annotated[int, Meta(ge=1, le=2**32 - 2)]
    nonce: Identifier
    expires_ms: UInt
    fencing: UInt = 0


class ReshareOrder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A signed order to share a key anew: among these holders, any ``threshold`` of whom will suffice.

    All holders of ``from_epoch`` deal, but those in ``without``, which are given up. A client's has ``fencing`` 0. A
    balancer's (kind ``order.move``) has that of its registry, and changes who holds the key, and nothing else. Where as
    few deal as make the key, ``trial`` names the new holder that combines the new epoch, by the client's grant, before
    it is committed; no balancer can order that.
    """

    key_id: Identifier
    name: Name
    from_epoch: Annotated[int, Meta(ge=1, le=2**32 - 2)]
    threshold: Annotated[int, Meta(ge=1, le=MAX_HOLDERS)]
    holders: Annotated[list[Name], Meta(min_length=1, max_length=MAX_HOLDERS)]
    without: Annotated[list[Name], Meta(max_length=MAX_HOLDERS)]
    nonce: Identifier
    expires_ms: UInt
    fencing: UInt = 0
    trial: Annotated[str, Meta(max_length=128)] = ""


class Holder(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where one share is: ``[node, x, commitment]``."""

    node: Name
    x: Annotated[int, Meta(ge=1, le=255)]
    commitment: Digest


class KeyManifest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The manifest of a key, signed by the dealer of its epoch.

    ``order`` is the client's create order in every epoch. Those after the first name their predecessor's hash in
    ``previous`` and embed the order that they rest on in ``change``; both are empty in the first. ``sharing`` is the
    client's last reshare order before ``change``, which t, n and the holders rest on unless ``change`` is one.
    ``placing`` is the balancer's last move order between the two, which the holders rest on unless ``change`` is one.
    """

    key_id: Identifier
    name: Name
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]
    epoch: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    attempt: Annotated[int, Meta(ge=1, le=2**31)]
    algorithm: Annotated[str, Meta(max_length=64)]
    threshold: Annotated[int, Meta(ge=1, le=MAX_HOLDERS)]
    holders: Annotated[list[Holder], Meta(min_length=1, max_length=MAX_HOLDERS)]
    public_key: Annotated[bytes, Meta(max_length=1024)]
    check_value: Digest
    order: Annotated[bytes, Meta(max_length=2048)]
    previous: Annotated[bytes, Meta(max_length=32)]
    change: Annotated[bytes, Meta(max_length=2048)] = b""
    sharing: Annotated[bytes, Meta(max_length=2048)] = b""
    placing: Annotated[bytes, Meta(max_length=2048)] = b""

    @property
    def resharing(self) -> bytes:
        """The client's last reshare order; empty while t and n are those of the creation."""
        return self.change if self.change and _kind(self.change) == _RESHARE_KIND else self.sharing

    @property
    def moving(self) -> bytes:
        """The balancer's last move order since the client's last word on the holders; empty if there is none."""
        kind = _kind(self.change) if self.change else ""
        return self.change if kind == _MOVE_KIND else b"" if kind == _RESHARE_KIND else self.placing

    @property
    def lineage(self) -> bytes:
        """The ``key_id`` of version 1, which all versions of a key have in common."""
        return self.key_id if self.version == 1 else read_create_order(self.order).lineage

    @property
    def shares(self) -> int:
        """n, the number of shares."""
        return len(self.holders)

    @property
    def uses_max(self) -> int:
        """How often this version may encrypt, sign and make MACs, by all nodes together; 0 for no limit."""
        return read_create_order(self.order).uses_max or ALGORITHMS[self.algorithm].uses_max

    @property
    def ordered_shares(self) -> int:
        """The number of shares that a client ordered last: a balancer may have been let add some."""
        if self.resharing:
            return len(reshare_orders.decode(read_unverified(self.resharing).payload).holders)
        return read_create_order(self.order).shares

    @property
    def context(self) -> bytes:
        """The sharing's identity as commitments hash it: id, version, epoch."""
        return self.key_context + self.epoch.to_bytes(4, "big")

    @property
    def key_context(self) -> bytes:
        """The key's identity as its check value hashes it: id and version, the same in every epoch."""
        return self.key_id + self.version.to_bytes(4, "big")

    def holder(self, node: str) -> Holder | None:
        """The node's own entry."""
        return next((holder for holder in self.holders if holder.node == node), None)


class Receipt(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A holder's signed word that its share is stored, re-read and checked: ``[key_id, manifest_hash, x, tried]``.

    ``tried``: it has also combined the epoch from t shares and got the key, as the reshare order has it do.
    """

    key_id: Identifier
    manifest_hash: Digest
    x: Annotated[int, Meta(ge=1, le=255)]
    tried: bool = False


class CommitCertificate(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What makes an epoch the valid one: ``[key_id, manifest_hash, receipts]``, signed by the registry's balancer."""

    key_id: Identifier
    manifest_hash: Digest
    receipts: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(min_length=1, max_length=MAX_HOLDERS)]


class AbortNotice(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The registry's signed word that an attempt will never commit: ``[key_id, attempt]``."""

    key_id: Identifier
    attempt: Annotated[int, Meta(ge=1, le=2**31)]


create_orders = Codec(CreateOrder, "create order", 2048)
destroy_orders = Codec(DestroyOrder, "destroy order", 2048)
refresh_orders = Codec(RefreshOrder, "refresh order", 2048)
reshare_orders = Codec(ReshareOrder, "reshare order", 2048)
_ORDERS = {
    _REFRESH_KIND: "refresh order",
    _RENEW_KIND: "renewal order",
    _RESHARE_KIND: "reshare order",
    _MOVE_KIND: "move order",
}
_CHANGES = {_REFRESH_KIND: "refresh", _RENEW_KIND: "refresh", _RESHARE_KIND: "reshare", _MOVE_KIND: "move"}
_OF: dict[str, Role] = {
    _REFRESH_KIND: "client",
    _RENEW_KIND: "balancer",
    _RESHARE_KIND: "client",
    _MOVE_KIND: "balancer",
}
_FENCINGS = {"client": "none", "balancer": "one above 0"}
key_manifests = Codec(KeyManifest, "key manifest")
receipts = Codec(Receipt, "receipt", 1024)
certificates = Codec(CommitCertificate, "commit certificate")
aborts = Codec(AbortNotice, "abort notice", 1024)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A verified key manifest with its hash, its dealer and its envelope."""

    manifest: KeyManifest
    digest: bytes
    dealer: str
    raw: bytes


def check_expiry(what: str, expires_ms: int, now_ms: int) -> None:
    """Refuse an order that has expired, or that would live too long."""
    if expires_ms + CLOCK_SKEW_MS < now_ms:
        raise ManifestError(f"{what}: expired {now_ms - expires_ms} ms ago")
    if expires_ms > now_ms + ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS:
        raise ManifestError(f"{what}: expires in {expires_ms - now_ms} ms, the limit is {ORDER_LIFETIME_MAX_MS}")


def open_create_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[CreateOrder, Signed]:
    """A create order with its client's signature checked; where it is carried out, its expiry and the policy too.

    ``now_ms`` is None for the order of a key that exists: neither time nor a later policy or manifest undoes it.
    """
    clients = cluster.sign_key_ever("client") if now_ms is None else cluster.sign_key("client")
    signed = verify_envelope(raw, "order.create", clients)
    order = create_orders.decode(signed.payload)
    if order.algorithm not in ALGORITHMS:
        raise ManifestError(f"create order: unknown algorithm {order.algorithm!r}")
    if order.threshold > order.shares:
        raise ManifestError(f"create order: threshold {order.threshold} of {order.shares} shares")
    most = ALGORITHMS[order.algorithm].uses_max
    if 0 < most < order.uses_max:
        raise ManifestError(f"create order: {order.uses_max} uses, {order.algorithm} is good for {most}")
    later = order.operation == "rotate"
    if later != (order.version > 1) or len(order.lineage) != (16 if later else 0):
        raise ManifestError(
            f"create order: {order.operation} can't make version {order.version} "
            f"of a lineage of {len(order.lineage)} bytes"
        )
    if now_ms is None:
        return order, signed
    check_expiry("create order", order.expires_ms, now_ms)
    if not cluster.allows(signed.issuer, order.operation, order.name):
        raise AccessDenied(f"{signed.issuer!r} may not {order.operation} the key {order.name!r}")
    return order, signed


def read_create_order(raw: bytes) -> CreateOrder:
    """A create order without any check: of a manifest that was checked before."""
    return create_orders.decode(read_unverified(raw).payload)


def first_quota(manifest: KeyManifest) -> int:
    """The uses that each holder of the first epoch has without asking: half of all, in equal parts."""
    return manifest.uses_max // (2 * read_create_order(manifest.order).shares)


def open_destroy_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[DestroyOrder, Signed]:
    """A destroy order with its client's signature checked; where it is given, its expiry and the policy too.

    ``now_ms`` is None for an order that the registry has booked: neither time nor a later manifest undoes that, but
    some manifest of the chain must have allowed it.
    """
    clients = cluster.sign_key_ever("client") if now_ms is None else cluster.sign_key("client")
    signed = verify_envelope(raw, "order.destroy", clients)
    order = destroy_orders.decode(signed.payload)
    if now_ms is not None:
        check_expiry("destroy order", order.expires_ms, now_ms)
    rules = cluster.past_rules if now_ms is None else cluster.rules
    if not _allowed(rules, signed.issuer, RequestType.DESTROY, order.name):
        raise AccessDenied(f"{signed.issuer!r} may not destroy the key {order.name!r}")
    return order, signed


def open_refresh_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[RefreshOrder, Signed]:
    """A refresh order with its client's signature checked; where it is carried out, its expiry and the policy too.

    ``now_ms`` is None for the order of an epoch that exists: neither time nor a later manifest undoes it, but some
    manifest of the chain must have allowed it.
    """
    return _once(_open_refresh, _REFRESH_KIND, raw, cluster, now_ms)


def _open_refresh(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[RefreshOrder, Signed]:
    signed = verify_envelope(raw, _REFRESH_KIND, _signers(cluster, "client", now_ms))
    order = _read_order(signed, refresh_orders)
    _check_client(signed, order.name, RequestType.REFRESH, cluster, now_ms)
    return order, signed


def open_renew_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[RefreshOrder, Signed]:
    """A balancer's refresh order; ``now_ms`` as for a client's. It needs no rule, as it changes nothing of the key."""
    return _once(_open_renew, _RENEW_KIND, raw, cluster, now_ms)


def _open_renew(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[RefreshOrder, Signed]:
    signed = verify_envelope(raw, _RENEW_KIND, _signers(cluster, "balancer", now_ms))
    return _read_order(signed, refresh_orders), signed


def open_reshare_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[ReshareOrder, Signed]:
    """A reshare order; ``now_ms`` as for a refresh order. Where it is carried out, its holders are nodes."""
    return _once(_open_reshare, _RESHARE_KIND, raw, cluster, now_ms)


def _open_reshare(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[ReshareOrder, Signed]:
    signed = verify_envelope(raw, _RESHARE_KIND, _signers(cluster, "client", now_ms))
    order = _read_order(signed, reshare_orders)
    _check_holders(order, "reshare order", cluster, now_ms)
    _check_client(signed, order.name, RequestType.RESHARE, cluster, now_ms)
    return order, signed


def open_move_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[ReshareOrder, Signed]:
    """A balancer's reshare order; ``now_ms`` as for a client's. It needs no rule, but may not change t.

    That, n, and where the holders are, is held against the client's orders and the epoch before, by
    ``open_key_manifest`` and ``engine.protocol.moves``.
    """
    return _once(_open_move, _MOVE_KIND, raw, cluster, now_ms)


def _open_move(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[ReshareOrder, Signed]:
    signed = verify_envelope(raw, _MOVE_KIND, _signers(cluster, "balancer", now_ms))
    order = _read_order(signed, reshare_orders)
    _check_holders(order, "move order", cluster, now_ms)
    return order, signed


def _signers(cluster: Cluster, role: Role, now_ms: int | None) -> Mapping[str, bytes] | Mapping[str, tuple[bytes, ...]]:
    return cluster.sign_key_ever(role) if now_ms is None else cluster.sign_key(role)


C = TypeVar("C", RefreshOrder, ReshareOrder)


def _once(
    opened: Callable[[bytes, Cluster, int | None], tuple[C, Signed]],
    kind: str,
    raw: bytes,
    cluster: Cluster,
    now_ms: int | None,
) -> tuple[C, Signed]:
    """An order that may have been found good by this manifest before: then but for its expiry it is good still."""
    key = (kind.encode(), b"ever" if now_ms is None else b"today", raw)
    found: tuple[C, Signed] | None = cluster.seen.get(*key)
    if found is None:
        found = opened(raw, cluster, now_ms)
        cluster.seen.put(found, *key)
    if now_ms is not None:
        check_expiry(_ORDERS[kind], found[0].expires_ms, now_ms)
    return found


def _read_order(signed: Signed, codec: Codec[C]) -> C:
    """A verified order to change a key, its fencing epoch checked."""
    what, role = _ORDERS[signed.kind], _OF[signed.kind]
    order = codec.decode(signed.payload)
    if (order.fencing > 0) != (role == "balancer"):
        raise ManifestError(f"{what}: it has the fencing epoch {order.fencing}; a {role}'s has {_FENCINGS[role]}")
    return order


def _check_holders(order: ReshareOrder, kind: str, cluster: Cluster, now_ms: int | None) -> None:
    if order.threshold > len(order.holders):
        raise ManifestError(f"{kind}: threshold {order.threshold} of {len(order.holders)} shares")
    for what, names in (("holder", order.holders), ("node to do without", order.without)):
        if len(set(names)) != len(names):
            raise ManifestError(f"{kind}: it names a {what} twice")
    if order.trial and order.fencing:
        raise ManifestError(f"{kind}: it names {order.trial!r} for a trial, which a client alone can order")
    if order.trial and order.trial not in order.holders:
        raise ManifestError(f"{kind}: {order.trial!r} is to try the new epoch, but holds no share of it")
    if now_ms is not None:
        for node in order.holders:
            if node not in cluster.nodes:
                raise ManifestError(f"{kind}: the holder {node!r} is no node of the cluster")


def _check_client(signed: Signed, key_name: str, operation: RequestType, cluster: Cluster, now_ms: int | None) -> None:
    rules = cluster.past_rules if now_ms is None else cluster.rules
    if not _allowed(rules, signed.issuer, operation, key_name):
        raise AccessDenied(f"{signed.issuer!r} may not {operation} the key {key_name!r}")


def open_change_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[RefreshOrder | ReshareOrder, Signed]:
    """The order of a later epoch, of any kind, opened as that kind is."""
    return (open_sharing_order if _is_sharing(raw) else open_renewing_order)(raw, cluster, now_ms)


def open_sharing_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[ReshareOrder, Signed]:
    """A client's reshare order or a balancer's move order."""
    return (open_move_order if _kind(raw) == _MOVE_KIND else open_reshare_order)(raw, cluster, now_ms)


def open_renewing_order(raw: bytes, cluster: Cluster, now_ms: int | None) -> tuple[RefreshOrder, Signed]:
    """A refresh order of a client's or a balancer's."""
    return (open_renew_order if _kind(raw) == _RENEW_KIND else open_refresh_order)(raw, cluster, now_ms)


@lru_cache(maxsize=1024)
def read_change_order(raw: bytes) -> RefreshOrder | ReshareOrder:
    """The order of a later epoch without any check."""
    return (reshare_orders if _is_sharing(raw) else refresh_orders).decode(read_unverified(raw).payload)


def sign_order(order: RefreshOrder | ReshareOrder, key: SigningKey, now_ms: int) -> bytes:
    """A balancer's order, signed."""
    return sign_orders([order], key, now_ms)[0]


def sign_orders(orders: Sequence[RefreshOrder | ReshareOrder], key: SigningKey, now_ms: int) -> list[bytes]:
    """A balancer's orders, signed together."""
    return sign_bodies([_order_body(each, key.name, now_ms) for each in orders], key)


def _order_body(order: RefreshOrder | ReshareOrder, balancer: str, now_ms: int) -> bytes:
    if isinstance(order, ReshareOrder):
        return encode_body(_MOVE_KIND, now_ms, reshare_orders.encode(order), balancer)
    return encode_body(_RENEW_KIND, now_ms, refresh_orders.encode(order), balancer)


def _is_sharing(raw: bytes) -> bool:
    return _kind(raw) in (_RESHARE_KIND, _MOVE_KIND)


def _kind(raw: bytes) -> str:
    return read_unverified(raw).kind


def open_key_manifest(raw: bytes, cluster: Cluster, now_ms: int | None = None) -> KeyRecord:
    """A key's manifest: signed by a node, and true to the client's orders in it.

    When the share is first stored, ``now_ms`` is given: dealer, client and holders must then be members, and the order
    that is carried out is held against time and policy. Later, the members of past manifests count too. A later
    manifest is held against its predecessor by ``check_successor``, where that is at hand.
    """
    record: KeyRecord | None = cluster.seen.get(b"key", raw)
    if record is None:
        record = _checked_manifest(raw, cluster)
        cluster.seen.put(record, b"key", raw)
    if now_ms is not None:
        _check_today(record, cluster, now_ms)
    return record


def _check_today(record: KeyRecord, cluster: Cluster, now_ms: int) -> None:
    """What goes beyond a good manifest where its share is first stored."""
    verify_envelope(record.raw, "key", cluster.sign_key("node"))
    manifest = record.manifest
    if manifest.epoch == 1:
        open_create_order(manifest.order, cluster, now_ms)
    else:
        open_change_order(manifest.change, cluster, now_ms)
    for holder in manifest.holders:
        if holder.node not in cluster.nodes:
            raise ManifestError(
                f"key manifest of {manifest.name!r}: the holder {holder.node!r} is no node of the cluster"
            )


def _checked_manifest(raw: bytes, cluster: Cluster) -> KeyRecord:
    signed = verify_envelope(raw, "key", cluster.sign_key_ever("node"))
    manifest = key_manifests.decode(signed.payload)
    order, _ = open_create_order(manifest.order, cluster, None)
    told = (manifest.key_id, manifest.name, manifest.version, manifest.algorithm)
    if told != (order.key_id, order.name, order.version, order.algorithm):
        raise ManifestError(f"key manifest of {manifest.name!r}: it differs from the client's order")
    _check_epoch(manifest, cluster)
    _check_sharing(manifest, order, cluster)
    if len({holder.node for holder in manifest.holders}) != manifest.shares:
        raise ManifestError(f"key manifest of {manifest.name!r}: a node holds two shares")
    if len({holder.x for holder in manifest.holders}) != manifest.shares:
        raise ManifestError(f"key manifest of {manifest.name!r}: two shares have the same x")
    if bool(manifest.public_key) != ALGORITHMS[order.algorithm].asymmetric:
        raise ManifestError(f"key manifest of {manifest.name!r}: public key missing or out of place")
    return KeyRecord(manifest, signed.digest, signed.issuer, raw)


def _check_epoch(manifest: KeyManifest, cluster: Cluster) -> None:
    if manifest.epoch == 1:
        if manifest.previous or manifest.change or manifest.sharing or manifest.placing:
            raise ManifestError(f"key manifest of {manifest.name!r}: the first one has no predecessor and no change")
        return
    if len(manifest.previous) != 32:
        raise ManifestError(f"key manifest of {manifest.name!r}: epoch {manifest.epoch} names no predecessor")
    change, signed = open_change_order(manifest.change, cluster, None)
    if (change.key_id, change.name, change.from_epoch + 1) != (manifest.key_id, manifest.name, manifest.epoch):
        raise ManifestError(
            f"key manifest of {manifest.name!r}: it differs from the {_OF[signed.kind]}'s {_ORDERS[signed.kind]}"
        )


def _check_sharing(manifest: KeyManifest, create: CreateOrder, cluster: Cluster) -> None:
    """t and n are those of the client's last order; the holders too, or those of a balancer's move after it."""
    threshold, shares, since = create.threshold, create.shares, 0
    if manifest.sharing and manifest.resharing != manifest.sharing:
        raise ManifestError(f"key manifest of {manifest.name!r}: it rests on two reshare orders")
    if manifest.placing and manifest.moving != manifest.placing:
        raise ManifestError(f"key manifest of {manifest.name!r}: it rests on two orders of its holders")
    if manifest.resharing:
        order, _ = open_reshare_order(manifest.resharing, cluster, None)
        threshold, shares, since = order.threshold, len(order.holders), order.from_epoch
        _check_shape(manifest, order, "client's reshare order", holders=not manifest.moving)
    if manifest.moving:
        order, signed = open_move_order(manifest.moving, cluster, None)
        _check_shape(manifest, order, "balancer's move order", holders=True)
        if order.from_epoch <= since:
            raise ManifestError(f"key manifest of {manifest.name!r}: its move order is older than its reshare order")
        grows = manifest.shares > shares and cluster.may_grow(signed.issuer, manifest.name, ever=True)
        shares = manifest.shares if grows else shares
    if (manifest.threshold, manifest.shares) != (threshold, shares):
        raise ManifestError(f"key manifest of {manifest.name!r}: it differs from the client's order")


def _check_shape(manifest: KeyManifest, order: ReshareOrder, what: str, *, holders: bool) -> None:
    """Whether the manifest is by an order of this or an earlier epoch; ``holders``: also who holds it, as 1 to n."""
    told = (order.key_id, order.name, order.threshold)
    named = [each.node for each in manifest.holders]
    if (
        told != (manifest.key_id, manifest.name, manifest.threshold)
        or order.from_epoch >= manifest.epoch
        or (holders and order.holders != named)
    ):
        raise ManifestError(f"key manifest of {manifest.name!r}: it differs from the {what}")
    if holders and [each.x for each in manifest.holders] != list(range(1, manifest.shares + 1)):
        raise ManifestError(f"key manifest of {manifest.name!r}: the indices after a reshare are not 1 to n")


def ordered_shape(manifest: KeyManifest) -> tuple[int, int]:
    """t and n as the client ordered them last, of a manifest that was checked."""
    if manifest.resharing:
        order = reshare_orders.decode(read_unverified(manifest.resharing).payload)
        return order.threshold, len(order.holders)
    created = create_orders.decode(read_unverified(manifest.order).payload)
    return created.threshold, created.shares


def check_successor(record: KeyRecord, before: KeyRecord) -> None:
    """Refuse a manifest that does not follow ``before`` as a refresh, a reshare or a move does.

    It has the next epoch, a later attempt and names the predecessor's hash. All but the commitments is the same, but
    after a reshare t and the holders, and after a move the holders, which ``open_key_manifest`` holds against the
    orders.
    """
    new, old = record.manifest, before.manifest
    if (new.previous, new.epoch) != (before.digest, old.epoch + 1):
        raise ManifestError(
            f"key manifest of {new.name!r}: epoch {new.epoch} does not follow the epoch {old.epoch} that is committed"
        )
    if new.attempt <= old.attempt:
        raise ManifestError(f"key manifest of {new.name!r}: attempt {new.attempt} does not follow {old.attempt}")
    for what in ("key_id", "name", "version", "algorithm", "public_key", "check_value", "order"):
        if getattr(new, what) != getattr(old, what):
            raise ManifestError(f"key manifest of {new.name!r}: a new epoch can't change {what}")
    kind = _kind(new.change)
    if _is_sharing(new.change):
        check_dealers(reshare_orders.decode(read_unverified(new.change).payload), old)
    if kind == _RESHARE_KIND:
        return
    if (new.threshold, new.sharing) != (old.threshold, old.resharing):
        raise ManifestError(f"key manifest of {new.name!r}: a {_CHANGES[kind]} can't change threshold")
    if kind == _MOVE_KIND:
        return
    if new.placing != old.moving:
        raise ManifestError(f"key manifest of {new.name!r}: a refresh can't change the order of its holders")
    if [(each.node, each.x) for each in new.holders] != [(each.node, each.x) for each in old.holders]:
        raise ManifestError(f"key manifest of {new.name!r}: a refresh can't change the holders")


def check_dealers(order: ReshareOrder, before: KeyManifest) -> None:
    """Refuse a reshare of the epoch ``before`` by too few dealers.

    What t dealers deal is always a sharing, and only one more shows whether it is of the key. t suffice where the order
    has the new epoch tried.
    """
    dealers = sum(each.node not in order.without for each in before.holders)
    needed = before.threshold if order.trial else before.threshold + 1
    if dealers < needed:
        why = "and a trial" if order.trial else "one more than the threshold shows a false one"
        raise ManifestError(f"{dealers} deals for {order.name!r} are too few: it takes {needed}, {why}")


@lru_cache(maxsize=1024)
def read_key_manifest(raw: bytes) -> KeyRecord:
    """A key manifest without its checks: for one that was checked before and comes from an authenticated store."""
    signed = read_unverified(raw)
    return KeyRecord(key_manifests.decode(signed.payload), signed.digest, signed.issuer, raw)


def open_receipt(raw: bytes, record: KeyRecord, cluster: Cluster) -> str:
    """The holder's name, if the receipt is its own and for this manifest."""
    signed = verify_envelope(raw, "receipt", cluster.sign_key_ever("node"))
    receipt = receipts.decode(signed.payload)
    holder = record.manifest.holder(signed.issuer)
    if holder is None or (receipt.key_id, receipt.manifest_hash, receipt.x) != (
        record.manifest.key_id,
        record.digest,
        holder.x,
    ):
        raise ManifestError(f"receipt of {signed.issuer!r}: not for this manifest of {record.manifest.name!r}")
    return signed.issuer


def open_receipts(raws: Sequence[bytes], record: KeyRecord, cluster: Cluster) -> dict[str, bytes]:
    """Holder -> its receipt, if they are enough to make the manifest valid; all are checked.

    They are those of at least t+1 holders (n if fewer) for a first epoch, and of all n for a later one: each holder
    erases its share of the epoch before on their word. A reshare order that names a node for a trial wants that it
    passed, too.
    """
    manifest = record.manifest
    found = {open_receipt(raw, record, cluster): raw for raw in raws}
    needed = receipts_needed(manifest.threshold, manifest.shares, manifest.epoch)
    if len(found) < needed:
        raise ManifestError(f"{manifest.name!r} has {len(found)} receipts, {needed} are needed")
    trial = trial_of(manifest)
    if trial and not (trial in found and receipts.decode(read_unverified(found[trial]).payload).tried):
        raise ManifestError(f"epoch {manifest.epoch} of {manifest.name!r} was not tried by {trial!r} as it must be")
    return found


def trial_of(manifest: KeyManifest) -> str:
    """The holder that must have combined this epoch before it was valid; empty if none."""
    if not manifest.change or not _is_sharing(manifest.change):
        return ""
    return reshare_orders.decode(read_unverified(manifest.change).payload).trial


def read_certificate(raw: bytes) -> bytes:
    """The hash of the manifest that a certificate speaks of, unchecked: to learn which one it is."""
    return certificates.decode(read_unverified(raw).payload).manifest_hash


def open_certificate(raw: bytes, record: KeyRecord, cluster: Cluster) -> tuple[str, ...]:
    """The holders whose receipts make the manifest valid, all checked as ``open_receipts`` does."""
    known: tuple[str, ...] | None = cluster.seen.get(b"certificate", raw, record.digest)
    if known is not None:
        return known
    signed = verify_envelope(raw, "certificate", cluster.sign_key_ever("balancer"))
    certificate = certificates.decode(signed.payload)
    if (certificate.key_id, certificate.manifest_hash) != (record.manifest.key_id, record.digest):
        raise ManifestError(f"commit certificate: not for this manifest of {record.manifest.name!r}")
    holders = tuple(open_receipts(certificate.receipts, record, cluster))
    cluster.seen.put(holders, b"certificate", raw, record.digest)
    return holders


def open_abort(raw: bytes, cluster: Cluster) -> AbortNotice:
    """An abort notice, signed by a balancer."""
    return aborts.decode(verify_envelope(raw, "abort", cluster.sign_key("balancer")).payload)
