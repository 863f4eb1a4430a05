"""The body of every verb, and the classification of a request. It knows the messages, not who answers them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct

from engine.keys import OPERATIONS, RequestType, request_class
from engine.protocol.settings import KeyState
from engine.protocol.wire import Aad, Blob, Codec, Data, Digest, Identifier, Name, Request, Text, UInt

__all__ = [
    "BACKUP_VERBS",
    "BALANCER_VERBS",
    "CLIENT_VERBS",
    "MANIFEST_VERBS",
    "NODE_VERBS",
    "REGISTRY_VERBS",
    "classify_request",
]

Envelope = Annotated[bytes, Meta(max_length=48 * 1024)]
SettingsEnvelope = Annotated[bytes, Meta(max_length=2048)]
MAX_MANIFEST_PIECE: Final = 32 * 1024
"""Most bytes of cluster manifests in one message."""
ManifestData = Annotated[bytes, Meta(max_length=MAX_MANIFEST_PIECE)]
KeyName = Name
MaybeName = Annotated[str, Meta(max_length=128)]
MaybeIdentifier = Annotated[bytes, Meta(max_length=16)]


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of the bodies: a MessagePack array of exactly the fields, in order."""


class Empty(Message, frozen=True):
    """``[]``."""


class Hello(Message, frozen=True):
    """``[version, software]``: what the sender speaks and is; sent first on a connection, with its first request."""

    version: UInt
    software: Annotated[str, Meta(max_length=32)]


class ServedLimits(Message, frozen=True):
    """What a member serves at most; more is answered ``overloaded``, or the connection is cut.

    ``message`` is in bytes; ``requests`` are those under way in all, ``member_requests`` and ``connection_requests``
    those of one member and over one of its connections; ``requests_per_s`` is a member's, for ever. ``connections``
    are those in all, ``member_connections`` one member's.
    """

    message: UInt
    requests: UInt
    member_requests: UInt
    connection_requests: UInt
    requests_per_s: UInt
    connections: UInt
    member_connections: UInt


class Welcome(Message, frozen=True):
    """The answer to ``hello``: who this is, which versions it takes, its manifest, and what it serves at most.

    ``boot`` is a random id of this start; ``cluster_digest`` the SHA-256 of the newest manifest's envelope.
    """

    version: UInt
    lowest: UInt
    highest: UInt
    software: Annotated[str, Meta(max_length=32)]
    name: Name
    boot: Identifier
    cluster_serial: UInt
    cluster_digest: Digest
    limits: ServedLimits


class Operate(Message, frozen=True):
    """A use of a key: ``[key, key_id, data, associated_data, proof, digested, grant]``.

    ``key_id`` is empty or the incarnation the client means. ``proof`` is the signature or MAC to be checked.
    ``digested`` says that ``data`` is already the digest the algorithm signs. ``grant`` is empty or an envelope.
    """

    key: KeyName
    key_id: MaybeIdentifier
    data: Data
    associated_data: Aad
    proof: Annotated[bytes, Meta(max_length=1024)]
    digested: bool
    grant: Annotated[bytes, Meta(max_length=2048)]


class Result(Message, frozen=True):
    """``[data]``: ciphertext, plaintext, signature or MAC; empty where the answer is yes."""

    data: Data


class ManifestFetch(Message, frozen=True):
    """``[after, offset]``: the manifests after a serial, from this byte of them on."""

    after: UInt
    offset: UInt


class ManifestPiece(Message, frozen=True):
    """``[serial, total, data]``: the newest serial, the bytes of all that was asked for, and a piece of them."""

    serial: UInt
    total: UInt
    data: ManifestData


class ManifestOffer(Message, frozen=True):
    """``[after, total, offset, data]``: a piece of the manifests after a serial; pieces come in order."""

    after: UInt
    total: UInt
    offset: UInt
    data: ManifestData


class ManifestTaken(Message, frozen=True):
    """``[serial]``: the newest serial that the member has now."""

    serial: UInt


class Create(Message, frozen=True):
    """Verbs ``generate``, ``import`` and ``rotate``: ``[order, material]``.

    ``material`` is empty or canonical (engine.keys).
    """

    order: Envelope
    material: Annotated[bytes, Meta(max_length=8192)]


class KeyDescription(Message, frozen=True):
    """``[manifest, certificate, warnings, settings]``: the signed truth about a key.

    Warnings are those of its placement; ``settings`` are the key's newest, or empty where nobody set any.
    """

    manifest: Envelope
    certificate: Envelope
    warnings: Annotated[list[Text], Meta(max_length=16)]
    settings: SettingsEnvelope


class Describe(Message, frozen=True):
    """``[key, version]``; 0 is the newest version."""

    key: KeyName
    version: UInt


class Destroy(Message, frozen=True):
    """Verbs ``destroy`` and ``share.destroy``: ``[order]``."""

    order: Envelope


class Destroyed(Message, frozen=True):
    """``[confirmed, pending]``: nodes that erased their share, and those that will when they come back."""

    confirmed: Annotated[list[Name], Meta(max_length=255)]
    pending: Annotated[list[Name], Meta(max_length=255)]


class Settings(Message, frozen=True):
    """Verb ``settings``, and to the registry: ``[order]``: a client's settings of a key."""

    order: SettingsEnvelope


class SettingsInForce(Message, frozen=True):
    """``[settings, confirmed, pending]``: the key's settings, countersigned by the registry.

    They are others than those that were sent if somebody's came before. ``confirmed`` are the nodes that keep them by
    now; ``pending`` will when they are back.
    """

    settings: SettingsEnvelope
    confirmed: Annotated[list[Name], Meta(max_length=255)]
    pending: Annotated[list[Name], Meta(max_length=255)]


class SettingsBooked(Message, frozen=True):
    """``[settings, holders]``: those in the registry's books, countersigned, and who holds a share of any version."""

    settings: SettingsEnvelope
    holders: Annotated[list[Name], Meta(max_length=255)]


class ShareSettings(Message, frozen=True):
    """Node to holder: ``[settings]``, countersigned by the registry: keep them, and let the key be used accordingly."""

    settings: SettingsEnvelope


class Refresh(Message, frozen=True):
    """``[order]``: the client's order to replace the shares of a key; the reply describes the new epoch."""

    order: Annotated[bytes, Meta(max_length=2048)]


class Reshare(Message, frozen=True):
    """``[order, grant]``: the client's order to share a key among other holders; the reply describes the new epoch.

    ``grant`` is for the node that the order has try the new epoch; empty if there is none.
    """

    order: Annotated[bytes, Meta(max_length=2048)]
    grant: Annotated[bytes, Meta(max_length=2048)]


MOVES_MAX: Final = 64
"""Most orders in one ``move``."""


class Move(Message, frozen=True):
    """Balancer to a holder of every key in it: ``[orders]``: move and renewal orders, each of another key."""

    orders: Annotated[list[Annotated[bytes, Meta(max_length=2048)]], Meta(min_length=1, max_length=MOVES_MAX)]


class MoveResult(Message, frozen=True):
    """What became of one order: the key's epoch now, or 0 with an error's code and text."""

    key_id: Identifier
    epoch: UInt
    code: Annotated[str, Meta(max_length=32)]
    text: Text


class MoveResults(Message, frozen=True):
    """``[results]``: one for each order, in their order."""

    results: Annotated[list[MoveResult], Meta(min_length=1, max_length=MOVES_MAX)]


class ListKeys(Message, frozen=True):
    """``[pattern, after, limit]``: names that match the shell glob, in order, after a name."""

    pattern: Annotated[str, Meta(min_length=1, max_length=128)]
    after: MaybeName
    limit: Annotated[int, Meta(ge=1, le=200)]


class KeyEntry(Message, frozen=True):
    """``[key, algorithm, version, threshold, shares, state, serial]``; ``serial`` is that of its settings, or 0."""

    key: KeyName
    algorithm: Annotated[str, Meta(max_length=64)]
    version: UInt
    threshold: UInt
    shares: UInt
    state: KeyState
    serial: UInt


class KeyList(Message, frozen=True):
    """``[entries, more]``."""

    entries: Annotated[list[KeyEntry], Meta(max_length=200)]
    more: bool


class Prewarm(Message, frozen=True):
    """``[key, key_id, grant]``: load the key now, so that its first use is not a cold one."""

    key: KeyName
    key_id: MaybeIdentifier
    grant: Annotated[bytes, Meta(max_length=2048)]


REWRAP_MAX: Final = 32
"""Most ciphertexts in one request."""


class Sealed(Message, frozen=True):
    """``[data, associated_data]``: a ciphertext, and what was authenticated with it."""

    data: Data
    associated_data: Aad


class Rewrap(Message, frozen=True):
    """Encrypt anew, with the newest version of a key, what an older one encrypted.

    ``[key, from_id, to_id, items, from_grant, to_grant]``: the ids of both versions, and grants for ``rewrap`` where
    they may not be loaded.
    """

    key: KeyName
    from_id: Identifier
    to_id: Identifier
    items: Annotated[list[Sealed], Meta(min_length=1, max_length=REWRAP_MAX)]
    from_grant: Annotated[bytes, Meta(max_length=2048)]
    to_grant: Annotated[bytes, Meta(max_length=2048)]


class RewrapResult(Message, frozen=True):
    """``[code, text, data]``: the ciphertext of the newest version, or the code and text of an error."""

    code: Annotated[str, Meta(max_length=32)]
    text: Text
    data: Data


class Rewrapped(Message, frozen=True):
    """``[results]``, in the order of the items."""

    results: Annotated[list[RewrapResult], Meta(max_length=REWRAP_MAX)]


class Flush(Message, frozen=True):
    """``[key]``: drop the key from the caches; empty for all."""

    key: MaybeName


class Flushed(Message, frozen=True):
    """``[dropped, shares]``: loaded keys and unsealed shares that were let go."""

    dropped: UInt
    shares: UInt


class CacheCount(Message, frozen=True):
    """One cache of a node: what it holds now, and counts since the node started, evictions by their reason."""

    cache: Annotated[str, Meta(max_length=32)]
    entries: UInt
    bytes: UInt
    hits: UInt
    misses: UInt
    ttl: UInt
    uses: UInt
    room: UInt
    changed: UInt
    flushed: UInt


class HolderLatency(Message, frozen=True):
    """``[node, samples, expected_us, p95_us, down]``: how quickly another holder gave its shares to this node."""

    node: Name
    samples: UInt
    expected_us: UInt
    p95_us: UInt
    down: bool


class ClassCount(Message, frozen=True):
    """``[request_class, requests, errors, busy_us]``, all counted since the node started."""

    request_class: Annotated[str, Meta(max_length=96)]
    requests: UInt
    errors: UInt
    busy_us: UInt


PAIRS_TOLD: Final = 1024
"""Most (class, placement group) counters in a node's statistics; those that moved most of late are told."""
HOT_KEYS_TOLD: Final = 64
"""Most keys in a node's statistics."""


class NodeStats(Message, frozen=True):
    """What a node tells a balancer: counters since ``boot`` (a random id of this start) and its state now.

    ``pairs`` are (index in ``classes``, placement group, requests). ``hot`` are the most used keys of the last whole
    window of ``hot_window_ms``, as (key, index in ``classes``, requests), estimates that are never too low.
    ``network_us`` is its clients' mean way to it and back over the network; 0 if not known.
    """

    boot: Identifier
    uptime_ms: UInt
    queue: UInt
    classes: Annotated[list[ClassCount], Meta(max_length=512)]
    pairs: Annotated[list[tuple[UInt, UInt, UInt]], Meta(max_length=PAIRS_TOLD)]
    caches: Annotated[list[CacheCount], Meta(max_length=16)]
    cluster_serial: UInt
    hot_window_ms: UInt
    hot: Annotated[list[tuple[KeyName, UInt, UInt]], Meta(max_length=HOT_KEYS_TOLD)]
    network_us: UInt


class TokenHealth(Message, frozen=True):
    """How a node's token is: ``[problem, check, renewals, made, canary_age_ms, fresh_age_ms]``.

    ``problem`` says why it serves nothing, and ``check`` why no fresh process can look at it; empty if all is well.
    ``made`` counts the objects made in it, ``renewals`` how often it was opened anew; the ages are since it was last
    found well, by the node itself and by a fresh process.
    """

    problem: Text
    check: Text
    renewals: UInt
    made: UInt
    canary_age_ms: UInt
    fresh_age_ms: UInt


class ServiceCount(Message, frozen=True):
    """How full a member is now, and counts since it started.

    ``refused`` are requests beyond a limit, ``garbage`` messages that were no requests, ``undeliverable`` replies that
    nobody took, ``cut`` connections beyond a limit.
    """

    under_way: UInt
    connections: UInt
    connections_max: UInt
    descriptors: UInt
    descriptors_max: UInt
    refused: UInt
    garbage: UInt
    undeliverable: UInt
    cut: UInt


class HostHealth(Message, frozen=True):
    """A member's host: ``[time_ms, disk_bytes, disk_free_bytes, files_free]``.

    The machine's clock as the answer was written, in milliseconds since the Unix epoch, and the file system of the
    member's data: its size, what of it the member may still write, and how many files. All 0 if not known.
    """

    time_ms: UInt
    disk_bytes: UInt
    disk_free_bytes: UInt
    files_free: UInt


CLIENTS_TOLD: Final = 128
"""Most clients in a member's status; those that came last are told."""


class ClientSeen(Message, frozen=True):
    """A client that said ``hello`` since a member started: ``[client, software, protocol, connections, ago_ms]``.

    ``protocol`` is the newest version that it speaks, ``connections`` how many it has there now, ``ago_ms`` how long
    ago it said so last, in milliseconds.
    """

    client: Name
    software: Annotated[str, Meta(max_length=32)]
    protocol: UInt
    connections: UInt
    ago_ms: UInt


class NodeStatus(Message, frozen=True):
    """What a node tells an operator.

    ``audit`` says why it serves nothing, ``store`` why it serves loaded keys alone, empty if it does; ``alarms`` are
    contradictions in audit logs, also in its own; ``clock`` is empty, or what is wrong with the machine's clock.
    ``protocol`` is the newest version that it speaks.
    """

    ADDED: ClassVar[dict[str, int]] = {"protocol": 2, "clients": 2}

    node: Name
    software: Annotated[str, Meta(max_length=32)]
    cluster_serial: UInt
    uptime_ms: UInt
    shares: UInt
    loaded: UInt
    caches: Annotated[list[CacheCount], Meta(max_length=16)]
    holders: Annotated[list[HolderLatency], Meta(max_length=256)]
    queue: UInt
    token: Text
    algorithms: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=64)]
    missing: Annotated[list[Text], Meta(max_length=64)]
    audit: Text
    store: Text
    alarms: Annotated[list[Text], Meta(max_length=32)]
    clock: Text
    health: TokenHealth
    service: ServiceCount
    host: HostHealth
    protocol: UInt = 1
    clients: Annotated[list[ClientSeen], Meta(max_length=CLIENTS_TOLD)] = []


STAGES: Final = ("parse", "policy", "cache", "wait", "gather", "token", "work", "audit", "reply", "total")
"""The stages of a request in their order, of which each has those that it went through.

``parse`` from the frame to the request, and ``cache`` the look-up of the loaded key, on the ordinary way alone;
``policy`` admission, policy and what is known of the key; ``wait`` until a worker had time; ``gather`` until a cold key
was loaded; ``token`` the operation in the token; ``work`` what a worker did for any other request; ``audit`` the
records, and until they are on the disk where the reply has to wait for that; ``reply`` until the socket took it;
``total`` all but ``parse``.
"""


class StageLatency(Message, frozen=True):
    """``[stage, count, p50_ns, p90_ns, p99_ns, p999_ns, max_ns]`` since the node started, in nanoseconds."""

    stage: Annotated[str, Meta(min_length=1, max_length=32)]
    count: UInt
    p50_ns: UInt
    p90_ns: UInt
    p99_ns: UInt
    p999_ns: UInt
    max_ns: UInt


class ClassLatency(Message, frozen=True):
    """``[request_class, errors, stages]``: a request class, or a verb that has none; requests not answered with ok.

    ``stages`` are those of its requests in their order, the last ``total``, which all of them have.
    """

    request_class: Annotated[str, Meta(min_length=1, max_length=96)]
    errors: UInt
    stages: Annotated[list[StageLatency], Meta(max_length=16)]


class NodeLatency(Message, frozen=True):
    """``[node, uptime_ms, classes]``: where the time of a node's requests went since it started."""

    node: Name
    uptime_ms: UInt
    classes: Annotated[list[ClassLatency], Meta(max_length=128)]


class SharePrepare(Message, frozen=True):
    """Dealer to holder: ``[manifest, x, y, salt, aborts]``; ``aborts`` are notices on earlier attempts."""

    manifest: Envelope
    x: Annotated[int, Meta(ge=1, le=255)]
    y: Annotated[bytes, Meta(min_length=33, max_length=8192)]
    salt: Annotated[bytes, Meta(min_length=32, max_length=32)]
    aborts: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(max_length=16)]


class Prepared(Message, frozen=True):
    """``[receipt]``."""

    receipt: Annotated[bytes, Meta(max_length=1024)]


class ShareCommit(Message, frozen=True):
    """``[key_id, certificate]``: the certificate makes the prepared share valid."""

    key_id: Identifier
    certificate: Envelope


class ShareRelease(Message, frozen=True):
    """Combiner to holder: ``[key_id, grant, certificate]``.

    The certificate lets a holder that missed the commit settle it at once; empty where the combiner knows none.
    """

    key_id: Identifier
    grant: Annotated[bytes, Meta(max_length=2048)]
    certificate: Envelope


class ReleasedShare(Message, frozen=True):
    """``[x, y, salt]``, inside CURVE only."""

    x: Annotated[int, Meta(ge=1, le=255)]
    y: Annotated[bytes, Meta(min_length=33, max_length=8192)]
    salt: Annotated[bytes, Meta(min_length=32, max_length=32)]


class AuditNotice(Message, frozen=True):
    """Node to node: ``[head]``: the newest signed head of the sender's audit log."""

    head: Annotated[bytes, Meta(max_length=1024)]


Statement = Annotated[bytes, Meta(max_length=4096)]
Part = Annotated[bytes, Meta(max_length=8192)]


class ShareDeal(Message, frozen=True):
    """Coordinator to holder: ``[order, attempt, manifest_hash, certificate]``: deal zero, in a reshare the own share.

    ``manifest_hash`` is of the epoch that is replaced, and the certificate that epoch's: a holder that missed its
    commit settles it first.
    """

    order: Annotated[bytes, Meta(max_length=2048)]
    attempt: Annotated[int, Meta(ge=1, le=2**31)]
    manifest_hash: Digest
    certificate: Envelope


class Dealt(Message, frozen=True):
    """``[statement, parts]``: the signed deal and its parts, each encrypted to its holder, in the order of these."""

    statement: Statement
    parts: Annotated[list[Part], Meta(min_length=1, max_length=64)]


class ShareRefresh(Message, frozen=True):
    """Coordinator to holder: ``[order, attempt, deals, parts]``: what would the new share be?

    ``deals`` are the statements of exactly t dealers in the manifest's order, ``parts`` what each dealt this holder.
    """

    order: Annotated[bytes, Meta(max_length=2048)]
    attempt: Annotated[int, Meta(ge=1, le=2**31)]
    deals: Annotated[list[Statement], Meta(min_length=1, max_length=64)]
    parts: Annotated[list[Part], Meta(min_length=1, max_length=64)]


class Refreshed(Message, frozen=True):
    """``[statement]``: the holder's signed commitment to its new share, and its values of the linear check."""

    statement: Statement


class ShareRenew(Message, frozen=True):
    """Coordinator to holder: ``[manifest, deals, parts, statements, aborts]``: store the share of the new epoch.

    ``statements`` are those of all holders in the manifest's order; ``aborts`` are notices on earlier attempts.
    Without ``deals`` it is on what the holder made its last statement on.
    """

    manifest: Envelope
    deals: Annotated[list[Statement], Meta(max_length=64)]
    parts: Annotated[list[Part], Meta(max_length=64)]
    statements: Annotated[list[Statement], Meta(min_length=1, max_length=64)]
    aborts: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(max_length=16)]


class ShareReshare(Message, frozen=True):
    """Coordinator to new holder: ``[before, certificate, order, attempt, deals, parts]``: what would its share be?

    ``before`` is the manifest of the epoch that is replaced, with its certificate; ``deals`` are the statements of all
    dealers in its order, ``parts`` what each dealt this holder.
    """

    before: Envelope
    certificate: Envelope
    order: Annotated[bytes, Meta(max_length=2048)]
    attempt: Annotated[int, Meta(ge=1, le=2**31)]
    deals: Annotated[list[Statement], Meta(min_length=1, max_length=64)]
    parts: Annotated[list[Part], Meta(min_length=1, max_length=64)]


class ShareAccept(Message, frozen=True):
    """Coordinator to new holder: ``[before, certificate, manifest, deals, parts, statements, aborts]``: store it.

    ``statements`` are those of all new holders in the manifest's order; ``aborts`` are notices on earlier attempts.
    Without ``deals`` it is on what the holder made its last statement on.
    """

    before: Envelope
    certificate: Envelope
    manifest: Envelope
    deals: Annotated[list[Statement], Meta(max_length=64)]
    parts: Annotated[list[Part], Meta(max_length=64)]
    statements: Annotated[list[Statement], Meta(min_length=1, max_length=64)]
    aborts: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(max_length=16)]


class ShareTrial(Message, frozen=True):
    """Coordinator to the node that the reshare order names: ``[key_id, manifest_hash, grant]``: combine that epoch."""

    key_id: Identifier
    manifest_hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    grant: Annotated[bytes, Meta(max_length=2048)]


class ShareLeave(Message, frozen=True):
    """Coordinator to a holder of before: ``[manifest, certificate]``: others hold the key now, erase the share."""

    manifest: Envelope
    certificate: Envelope


class Change(Message, frozen=True):
    """Coordinator to registry: ``[order, manifest, certificate]``: a refresh or reshare order, and the epoch before."""

    order: Annotated[bytes, Meta(max_length=2048)]
    manifest: Envelope
    certificate: Envelope


class Reserve(Message, frozen=True):
    """Dealer to registry: ``[order, manifest, certificate]``; the last two are of the version before, or empty."""

    order: Envelope
    manifest: Envelope
    certificate: Envelope


class Reserved(Message, frozen=True):
    """``[attempt, holders, aborts, manifest, certificate]``.

    What the order asks for and is there already (the key, or a later epoch than the one to be replaced) comes back as
    manifest and certificate, with attempt 0.
    """

    attempt: UInt
    holders: Annotated[list[Name], Meta(max_length=64)]
    aborts: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(max_length=16)]
    manifest: Envelope
    certificate: Envelope


class Commit(Message, frozen=True):
    """Dealer to registry: ``[manifest, receipts]``."""

    manifest: Envelope
    receipts: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(min_length=1, max_length=64)]


class Committed(Message, frozen=True):
    """``[certificate]``."""

    certificate: Envelope


class Sync(Message, frozen=True):
    """Node to registry: ``[after]``: what changed of this node's keys after a change number (0: everything)."""

    after: UInt


class SyncEntry(Message, frozen=True):
    """``[key_id, state, manifest, certificate, document, settings]``.

    State ``committed`` (document empty) or ``destroyed`` (document is the client's destroy order, or the settings by
    which its time came). ``settings`` are the key's newest that are booked, or empty.
    """

    key_id: Identifier
    state: Annotated[str, Meta(max_length=16)]
    manifest: Envelope
    certificate: Envelope
    document: Envelope
    settings: SettingsEnvelope


class SyncPage(Message, frozen=True):
    """``[entries, more, last, fencing_epoch]``: ``last`` is where the next page begins.

    Change numbers are those of one ``fencing_epoch``: after a new one, a node asks from 0 again.
    """

    entries: Annotated[list[SyncEntry], Meta(max_length=256)]
    more: bool
    last: UInt
    fencing_epoch: UInt


RECALLED: Final = 1024
"""Most keys in one question of what became of them."""


class ShareRecall(Message, frozen=True):
    """Node to node: ``[keys]``: what has become of these keys, as (key_id, epoch, serial)?

    Sent by a node that was away; the epoch is the last that it knows to be committed, the serial that of the key's
    settings, 0 if it knows of none.
    """

    keys: Annotated[list[tuple[Identifier, UInt, UInt]], Meta(min_length=1, max_length=RECALLED)]


class Recalled(Message, frozen=True):
    """``[done, entries]``: what is known of the first ``done`` of the keys that is later, as the registry tells it."""

    done: Annotated[int, Meta(ge=1, le=RECALLED)]
    entries: Annotated[list[SyncEntry], Meta(max_length=256)]


ArchivePart = Annotated[bytes, Meta(max_length=62 * 1024)]


class ShareExport(Message, frozen=True):
    """Client to holder: ``[order, run, part]``: a part of the archive of its shares, which the operators ordered.

    Part 0 is the head, and begins a new archive; its ``run`` is empty. The others come in their order.
    """

    order: Annotated[bytes, Meta(max_length=24 * 1024)]
    run: MaybeIdentifier
    part: UInt


class ExportedPart(Message, frozen=True):
    """``[run, data, last]``: head, page or end of an archive (``engine.protocol.backup``)."""

    run: Identifier
    data: ArchivePart
    last: bool


class ShareRestore(Message, frozen=True):
    """Client to node: ``[run, part, data, contributions]``: a part of an archive that it is to restore.

    Part 0 is the head, with the contributions of enough operators; its ``run`` is empty.
    """

    run: MaybeIdentifier
    part: UInt
    data: ArchivePart
    contributions: Annotated[list[Annotated[bytes, Meta(max_length=1024)]], Meta(max_length=32)]


class RestoredShare(Message, frozen=True):
    """What became of one archived key: ``[key_id, outcome, text, receipt]``.

    ``restored``: its share is stored and checked, which the receipt says; ``present``: it was there; ``noted``: its
    documents are kept, there was no share; ``destroyed``: it is, and stays so; ``refused``: the text says why.
    """

    key_id: Identifier
    outcome: Literal["restored", "present", "noted", "destroyed", "refused"]
    text: Text
    receipt: Annotated[bytes, Meta(max_length=1024)]


class RestoredPart(Message, frozen=True):
    """``[run, results]``: the results are of the keys in a page, in their order."""

    run: Identifier
    results: Annotated[list[RestoredShare], Meta(max_length=1024)]


class Lacking(Message, frozen=True):
    """Node to registry: ``[keys]``: of these keys, as (key_id, epoch), it is a holder, and has no share any more."""

    keys: Annotated[list[tuple[Identifier, UInt]], Meta(min_length=1, max_length=RECALLED)]


class Quota(Message, frozen=True):
    """Combiner to registry: ``[key_id, nonce]``: more uses of a key whose uses are limited. A repeat gets the same."""

    key_id: Identifier
    nonce: Identifier


class QuotaGranted(Message, frozen=True):
    """``[uses]``; 0 says that there are no more."""

    uses: UInt


class Outcome(Message, frozen=True):
    """``[key_id, attempt]``: holder to registry: what became of a prepared share? Dealer to registry: abort it."""

    key_id: Identifier
    attempt: UInt


class Abort(Message, frozen=True):
    """Dealer to holder: ``[notice]``: delete the prepared share of an attempt that the registry gave up."""

    notice: Annotated[bytes, Meta(max_length=1024)]


class OutcomeReply(Message, frozen=True):
    """``[state, document]``: ``pending``, ``committed`` (the certificate) or ``aborted`` (the notice)."""

    state: Annotated[str, Meta(max_length=16)]
    document: Envelope


class ForecastAccuracy(Message, frozen=True):
    """How good a balancer's forecast of a class was of late, in 1/1000, for the next tick and for the tenth.

    ``error`` is the mean absolute error over that of saying each time what was counted last (0 until something is
    known); ``coverage`` is how often the load stayed below what 90 % should; ``bias`` is the mean error over the load.
    """

    request_class: Annotated[str, Meta(max_length=96)]
    model: Annotated[str, Meta(max_length=16)]
    error: UInt
    error_tenth: UInt
    coverage: UInt
    coverage_tenth: UInt
    bias: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)]
    bias_tenth: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)]


class KeyMoves(Message, frozen=True):
    """``[why, waiting, under_way, done, failed]``: keys that are given new shares, by why that is.

    ``why`` is ``repair``, ``top-up``, ``drain``, ``plan`` or ``refresh``. Those under way wait too; ``done`` and
    ``failed`` are counted since the balancer started, a key that is tried again each time.
    """

    why: Annotated[str, Meta(min_length=1, max_length=16)]
    waiting: UInt
    under_way: UInt
    done: UInt
    failed: UInt


class BalancerStatus(Message, frozen=True):
    """What a balancer tells an operator.

    ``series`` are the external series that are left out, and why; ``placement`` is what the newest plan says;
    ``moving`` is what becomes of it, and of the keys of nodes that are lost or drained; ``protocol`` and ``clients`` as
    in ``NodeStatus``.
    """

    ADDED: ClassVar[dict[str, int]] = {"protocol": 2, "clients": 2}

    balancer: Name
    software: Annotated[str, Meta(max_length=32)]
    cluster_serial: UInt
    uptime_ms: UInt
    keys: UInt
    fencing_epoch: UInt
    table_counter: UInt
    ticks: UInt
    last_error: Text
    service: ServiceCount
    forecasts: Annotated[list[ForecastAccuracy], Meta(max_length=128)]
    series: Annotated[list[Text], Meta(max_length=16)]
    placement: Text
    host: HostHealth
    moves: Annotated[list[KeyMoves], Meta(max_length=16)]
    moving: Text
    protocol: UInt = 1
    clients: Annotated[list[ClientSeen], Meta(max_length=CLIENTS_TOLD)] = []


class ClassLoad(Message, frozen=True):
    """The load of a class that a balancer counted in its last tick, and what it forecasts: in 1/1000 requests a second.

    ``mean`` and ``p90`` are for the next tick, ``mean_tenth`` and ``p90_tenth`` for the tenth.
    """

    request_class: Annotated[str, Meta(max_length=96)]
    load: UInt
    mean: UInt
    p90: UInt
    mean_tenth: UInt
    p90_tenth: UInt


class PlacementMove(Message, frozen=True):
    """``[group, node, add]``: a node is to become (``add``), or cease to be, a holder of a placement group."""

    group: UInt
    node: Name
    add: bool


CLASSES_TOLD: Final = 128
"""Most classes in a balancer's plan; those with the most load are told."""
MOVES_TOLD: Final = 256
"""Most moves in a balancer's plan; the first are told."""


class BalancerPlan(Message, frozen=True):
    """``[balancer, tick_ms, classes, groups, moves]``: the load that a balancer expects, and what it would move for it.

    ``groups`` is how many placement groups are warm. The moves are those of the newest plan, in their order.
    """

    balancer: Name
    tick_ms: UInt
    classes: Annotated[list[ClassLoad], Meta(max_length=CLASSES_TOLD)]
    groups: UInt
    moves: Annotated[list[PlacementMove], Meta(max_length=MOVES_TOLD)]


HELD_TOLD: Final = 256
"""Most nodes in one answer to ``holdings``."""


class Holdings(Message, frozen=True):
    """Any member to a balancer: ``[after]``: what do the nodes hold, by the registry's books? Those after a name."""

    after: MaybeName


class Held(Message, frozen=True):
    """``[node, keys]``: how many keys a node holds a share of, or is to hold one of as soon as they are made."""

    node: Name
    keys: UInt


class HoldingsPage(Message, frozen=True):
    """``[entries, more]``: the nodes in order of their names, without those that hold nothing."""

    entries: Annotated[list[Held], Meta(max_length=HELD_TOLD)]
    more: bool


DEGRADED_TOLD: Final = 256
"""Most keys in one answer to ``degraded``."""


class Degraded(Message, frozen=True):
    """Any member to a balancer: ``[without, after]``: which keys lack a share, were a node lost too? After a key id.

    ``without`` names the node; empty: which lack one as it is.
    """

    without: MaybeName
    after: MaybeIdentifier


class DegradedKey(Message, frozen=True):
    """``[key_id, name, version, threshold, holders, missing]``: a key, and those of its holders that have no share.

    The name is empty for a client that may not list the key.
    """

    key_id: Identifier
    name: MaybeName
    version: UInt
    threshold: UInt
    holders: Annotated[list[Name], Meta(max_length=64)]
    missing: Annotated[list[Name], Meta(max_length=64)]


class DegradedPage(Message, frozen=True):
    """``[entries, after]``: in the order of key ids, and where to go on; empty: these were the last."""

    entries: Annotated[list[DegradedKey], Meta(max_length=DEGRADED_TOLD)]
    after: MaybeIdentifier


class Table(Message, frozen=True):
    """``[table]``: the signed routing table in force, or empty."""

    table: Blob


BUNDLE_MAX: Final = 32
"""Most requests in a bundle."""
BUNDLED: Final = 60 * 1024


class Bundle(Message, frozen=True):
    """``[verb, bodies]``: many requests of one verb, each about another key, that are carried out together."""

    verb: Annotated[str, Meta(max_length=32)]
    bodies: Annotated[list[Annotated[bytes, Meta(max_length=BUNDLED)]], Meta(min_length=1, max_length=BUNDLE_MAX)]


class BundleResult(Message, frozen=True):
    """``[good, body]``: the body of the ok reply, or of the error."""

    good: bool
    body: Annotated[bytes, Meta(max_length=BUNDLED)]


class BundleResults(Message, frozen=True):
    """``[results]``: of the first so many requests, in their order; the rest were not looked at."""

    results: Annotated[list[BundleResult], Meta(min_length=1, max_length=BUNDLE_MAX)]


HELLO: Final = "hello"
MANIFEST_FETCH: Final = "manifest.fetch"
MANIFEST_OFFER: Final = "manifest.offer"
SHARE_PREPARE: Final = "share.prepare"
SHARE_COMMIT: Final = "share.commit"
SHARE_ABORT: Final = "share.abort"
SHARE_RELEASE: Final = "share.release"
SHARE_DESTROY: Final = "share.destroy"
AUDIT_HEAD: Final = "audit.head"
SHARE_DEAL: Final = "share.deal"
SHARE_REFRESH: Final = "share.refresh"
SHARE_RENEW: Final = "share.renew"
SHARE_RESHARE: Final = "share.reshare"
SHARE_ACCEPT: Final = "share.accept"
SHARE_TRIAL: Final = "share.trial"
SHARE_LEAVE: Final = "share.leave"
SHARE_SETTINGS: Final = "share.settings"
SHARE_RECALL: Final = "share.recall"
SHARE_MANY: Final = "share.many"
SHARE_EXPORT: Final = "share.export"
SHARE_RESTORE: Final = "share.restore"
STATS: Final = "stats"
MOVE: Final = "move"
BOOKS: Final = "books"
LATENCY: Final = "latency"
REGISTRY_RESERVE: Final = "registry.reserve"
REGISTRY_CHANGE: Final = "registry.change"
REGISTRY_COMMIT: Final = "registry.commit"
REGISTRY_DESTROY: Final = "registry.destroy"
REGISTRY_SETTINGS: Final = "registry.settings"
REGISTRY_QUOTA: Final = "registry.quota"
REGISTRY_SYNC: Final = "registry.sync"
REGISTRY_OUTCOME: Final = "registry.outcome"
REGISTRY_ABORT: Final = "registry.abort"
REGISTRY_LACKING: Final = "registry.lacking"
REGISTRY_MANY: Final = "registry.many"
TABLE: Final = "table"
PLAN: Final = "plan"
HOLDINGS: Final = "holdings"
DEGRADED: Final = "degraded"

BODIES: Final[dict[str, tuple[type[Message], type[Message]]]] = {
    **dict.fromkeys(OPERATIONS, (Operate, Result)),
    RequestType.REWRAP: (Rewrap, Rewrapped),
    RequestType.GENERATE: (Create, KeyDescription),
    RequestType.IMPORT: (Create, KeyDescription),
    RequestType.ROTATE: (Create, KeyDescription),
    RequestType.DESTROY: (Destroy, Destroyed),
    RequestType.REFRESH: (Refresh, KeyDescription),
    RequestType.RESHARE: (Reshare, KeyDescription),
    RequestType.SETTINGS: (Settings, SettingsInForce),
    RequestType.DESCRIBE: (Describe, KeyDescription),
    RequestType.LIST: (ListKeys, KeyList),
    RequestType.PREWARM: (Prewarm, Empty),
    RequestType.FLUSH: (Flush, Flushed),
    RequestType.STATUS: (Empty, NodeStatus),
    HELLO: (Hello, Welcome),
    MANIFEST_FETCH: (ManifestFetch, ManifestPiece),
    MANIFEST_OFFER: (ManifestOffer, ManifestTaken),
    SHARE_PREPARE: (SharePrepare, Prepared),
    SHARE_COMMIT: (ShareCommit, Empty),
    SHARE_ABORT: (Abort, Empty),
    SHARE_RELEASE: (ShareRelease, ReleasedShare),
    SHARE_DESTROY: (Destroy, Empty),
    AUDIT_HEAD: (AuditNotice, Empty),
    SHARE_DEAL: (ShareDeal, Dealt),
    SHARE_REFRESH: (ShareRefresh, Refreshed),
    SHARE_RENEW: (ShareRenew, Prepared),
    SHARE_RESHARE: (ShareReshare, Refreshed),
    SHARE_ACCEPT: (ShareAccept, Prepared),
    SHARE_TRIAL: (ShareTrial, Prepared),
    SHARE_LEAVE: (ShareLeave, Empty),
    SHARE_SETTINGS: (ShareSettings, Empty),
    SHARE_RECALL: (ShareRecall, Recalled),
    SHARE_MANY: (Bundle, BundleResults),
    SHARE_EXPORT: (ShareExport, ExportedPart),
    SHARE_RESTORE: (ShareRestore, RestoredPart),
    STATS: (Empty, NodeStats),
    MOVE: (Move, MoveResults),
    BOOKS: (Sync, SyncPage),
    LATENCY: (Empty, NodeLatency),
    REGISTRY_RESERVE: (Reserve, Reserved),
    REGISTRY_CHANGE: (Change, Reserved),
    REGISTRY_COMMIT: (Commit, Committed),
    REGISTRY_DESTROY: (Destroy, Empty),
    REGISTRY_SETTINGS: (Settings, SettingsBooked),
    REGISTRY_QUOTA: (Quota, QuotaGranted),
    REGISTRY_SYNC: (Sync, SyncPage),
    REGISTRY_OUTCOME: (Outcome, OutcomeReply),
    REGISTRY_ABORT: (Outcome, OutcomeReply),
    REGISTRY_LACKING: (Lacking, Empty),
    REGISTRY_MANY: (Bundle, BundleResults),
    TABLE: (Empty, Table),
    PLAN: (Empty, BalancerPlan),
    HOLDINGS: (Holdings, HoldingsPage),
    DEGRADED: (Degraded, DegradedPage),
}
"""Verb -> (body of the request, body of an ok reply). A balancer answers ``status`` with ``BalancerStatus``."""

REQUEST_CODECS: Final[dict[str, Codec[Any]]] = {
    verb: Codec(request, f"body of {verb}") for verb, (request, _) in BODIES.items()
}
REPLY_CODECS: Final[dict[str, Codec[Any]]] = {
    verb: Codec(reply, f"reply to {verb}") for verb, (_, reply) in BODIES.items()
}
balancer_status_codec: Final = Codec(BalancerStatus, "reply to status")

CLIENT_VERBS: Final = frozenset(RequestType)
MANIFEST_VERBS: Final = frozenset({MANIFEST_FETCH, MANIFEST_OFFER})
BACKUP_VERBS: Final = frozenset({SHARE_EXPORT, SHARE_RESTORE})
"""Sent by a client, whose rights do not count: operators' signatures do."""
BALANCER_VERBS: Final = frozenset({STATS, MOVE, BOOKS})
NODE_VERBS: Final = frozenset(
    {
        SHARE_PREPARE,
        SHARE_COMMIT,
        SHARE_ABORT,
        SHARE_RELEASE,
        SHARE_DESTROY,
        SHARE_DEAL,
        SHARE_REFRESH,
        SHARE_RENEW,
        SHARE_RESHARE,
        SHARE_ACCEPT,
        SHARE_TRIAL,
        SHARE_LEAVE,
        SHARE_SETTINGS,
        SHARE_RECALL,
        SHARE_MANY,
        AUDIT_HEAD,
    }
)
REGISTRY_VERBS: Final = frozenset(
    {
        REGISTRY_RESERVE,
        REGISTRY_CHANGE,
        REGISTRY_COMMIT,
        REGISTRY_DESTROY,
        REGISTRY_SETTINGS,
        REGISTRY_QUOTA,
        REGISTRY_SYNC,
        REGISTRY_OUTCOME,
        REGISTRY_ABORT,
        REGISTRY_LACKING,
        REGISTRY_MANY,
    }
)
BUNDLED_SHARE_VERBS: Final = frozenset(
    {SHARE_DEAL, SHARE_REFRESH, SHARE_RENEW, SHARE_RESHARE, SHARE_ACCEPT, SHARE_COMMIT, SHARE_LEAVE}
)
BUNDLED_REGISTRY_VERBS: Final = frozenset({REGISTRY_CHANGE, REGISTRY_COMMIT})
"""The verbs that ``share.many`` and ``registry.many`` take many requests of."""


def classify_request(request: Request | str, algorithm_name: str) -> str:
    """The request class (type, algorithm) of a request, ``sign/ecdsa-p256-sha256``.

    Takes a request or its verb, and the algorithm of the key it names; ``ValueError`` for a verb that is no request
    type. This is step 2 of the request flow: the class, with the key's placement group, picks the row of the routing
    table.
    """
    verb = request if isinstance(request, str) else request.verb
    if verb not in CLIENT_VERBS:
        raise ValueError(f"{verb[:40]!r} is no request type; they are {', '.join(sorted(CLIENT_VERBS))}")
    return request_class(verb, algorithm_name)
