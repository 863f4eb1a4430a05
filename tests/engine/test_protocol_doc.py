"""Holds docs/protocol.md against the code, so that the page can't grow old: fields, verbs, codes, numbers, examples."""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec import inspect
from uses import operate

from engine import errors
from engine.client import config
from engine.client.files import encrypt_stream
from engine.client.transport import Moved, raise_for_status
from engine.errors import EngineError, ManifestError, NeedGrant, ProtocolError, error_from_code
from engine.keys import ALGORITHMS, OPERATIONS, POLICY_OPERATIONS, RequestType
from engine.protocol import audit, backup, grant, manifest, refresh, requests, settings, signed, snapshot, wire
from engine.protocol import table as tables_of_routing
from engine.protocol.grant import Grant, check_grant, issue_grant
from engine.protocol.manifest import (
    Cluster,
    Holder,
    KeyManifest,
    KeyRecord,
    Member,
    PolicyRule,
    Role,
    chain_pin,
    issue_cluster_manifest,
    open_chain,
)
from engine.protocol.requests import (
    BACKUP_VERBS,
    BALANCER_VERBS,
    BODIES,
    CLIENT_VERBS,
    DEGRADED,
    HELLO,
    HOLDINGS,
    LATENCY,
    MANIFEST_VERBS,
    NODE_VERBS,
    PLAN,
    REGISTRY_VERBS,
    REPLY_CODECS,
    REQUEST_CODECS,
    TABLE,
    BalancerStatus,
    Operate,
)
from engine.protocol.signed import SigningKey, read_unverified, verify_envelope
from engine.protocol.wire import Load, Status, reply_codec, request_codec
from engine.sharing import Share, check_value, commitment, placement_group
from nodes.policy import check_verb

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")

SEED = bytes(range(32))
KEY_ID = bytes.fromhex("6f1d2c3b4a59687786958493a2b1c0df")
CONTEXT = KEY_ID + (1).to_bytes(4, "big") + (1).to_bytes(4, "big")
NONCE = bytes(range(16))
NOW_MS = 1_800_000_000_000


# --- reading the page ---


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, its head first."""
    found: list[list[list[str]]] = []
    before = ""
    for line in prose(text).splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not before.startswith("|"):
                found.append([cells])
            elif not set("".join(cells)) <= set("-"):
                found[-1].append(cells)
        before = line
    return found


def table(*head: str) -> list[list[str]]:
    """The rows of the only table whose head begins so."""
    (one,) = [each for each in tables(TEXT) if each[0][: len(head)] == list(head)]
    return one[1:]


def bare(cell: str) -> str:
    """A cell without its backticks."""
    return cell.strip("`")


def described_messages() -> dict[str, list[tuple[str, str]]]:
    """Message -> (field, type) in order, from each table under a line that begins with the message's name in bold."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in prose(TEXT).splitlines():
        if match := re.match(r"\*\*`(\w+)`\*\*", line):
            name = match[1]
            assert name not in found, f"{name} is described twice"
            found[name] = []
        elif name and found[name] and not line.startswith("|"):
            name = ""
        elif name and (row := re.match(r"\| `(\w+)` \| `(.+?)` \| \S.* \|$", line)):
            found[name].append((row[1], row[2]))
    return found


def example(name: str) -> bytes:
    """The bytes of a hex example."""
    (block,) = re.findall(rf"^```hex {name}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return bytes.fromhex("".join(line.partition(";")[0] for line in block.splitlines()))


# --- the messages ---


def structs() -> dict[str, type[msgspec.Struct]]:
    """Every message that the code defines, by its name without an underscore."""
    return {
        value.__name__.lstrip("_"): value
        for module in (
            wire,
            signed,
            requests,
            manifest,
            grant,
            refresh,
            settings,
            tables_of_routing,
            snapshot,
            audit,
            backup,
        )
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == module.__name__
        and value not in (requests.Message, audit.Record)
    }


def notation(kind: inspect.Type) -> str:
    """A field's type as the page writes it."""
    match kind:
        case inspect.IntType(ge=0, le=high) if high == 2**63 - 1:
            return "uint"
        case inspect.IntType(ge=None, le=None):
            return "int"
        case inspect.IntType():
            return f"int {kind.ge}..{kind.le}"
        case inspect.BoolType():
            return "bool"
        case inspect.StrType() if kind.pattern:
            return "name"
        case inspect.StrType():
            return f"text {kind.min_length or 0}..{kind.max_length}"
        case inspect.BytesType() if kind.min_length == kind.max_length:
            return f"bytes {kind.min_length}"
        case inspect.BytesType():
            return f"bytes {kind.min_length or 0}..{kind.max_length}"
        case inspect.ListType(max_length=None):
            return f"[{notation(kind.item_type)}]"
        case inspect.ListType():
            return f"[{notation(kind.item_type)}] {kind.min_length or 0}..{kind.max_length}"
        case inspect.TupleType():
            return f"({', '.join(map(notation, kind.item_types))})"
        case inspect.DictType():
            pair = f"{notation(kind.key_type)}: {notation(kind.value_type)}"
            return f"{{{pair}}} {kind.min_length or 0}..{kind.max_length}"
        case inspect.LiteralType():
            return " or ".join(f'"{value}"' for value in kind.values)
        case inspect.StructType():
            return kind.cls.__name__.lstrip("_")
    raise AssertionError(f"no notation for {kind}")


@pytest.mark.parametrize("name", structs())
def test_every_field_is_described_in_order_with_its_limits(name: str) -> None:
    """The table of a message lists exactly its fields, in the array's order, with their types and limits."""
    info = inspect.type_info(structs()[name])
    assert isinstance(info, inspect.StructType)
    told = described_messages()
    assert name in told, f"docs/protocol.md has no line that begins with **`{name}`**"
    assert told[name] == [(field.name, notation(field.type)) for field in info.fields]


def test_no_message_is_described_that_does_not_exist() -> None:
    """A message that was removed from the code is removed from the page too."""
    assert set(described_messages()) <= set(structs())


def test_messages_are_closed_arrays() -> None:
    """The page says that a message is an array of exactly its fields."""
    for kind in structs().values():
        assert kind.__struct_config__.array_like
        assert kind.__struct_config__.forbid_unknown_fields


# --- verbs, roles, codes, numbers ---


def signing(name: str) -> SigningKey:
    """A fixed signing key; the client ``shop`` has the one of the page's example."""
    seed = SEED if name == "shop" else hashlib.sha256(name.encode()).digest()
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(seed))


def member(name: str, role: Role) -> Member:
    curve = bytes(32) if role == "operator" else hashlib.sha256(b"curve " + name.encode()).digest()
    endpoint = "tcp://127.0.0.1:1" if role in ("node", "balancer") else ""
    return Member(name, role, signing(name).public, curve, endpoint, "", f"site/{name}" if role == "node" else "")


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """One member of each role and a second node; the client may do everything."""
    members = [
        member("op", "operator"),
        member("shop", "client"),
        member("bal", "balancer"),
        member("node-1", "node"),
        member("node-2", "node"),
    ]
    rules = [PolicyRule("shop", "*", ["*"])]
    chain = issue_cluster_manifest(name="example", members=members, rules=rules, operators=[signing("op")])
    return open_chain(chain, chain_pin(chain))


def verb_tables() -> tuple[list[list[str]], list[list[str]]]:
    """The rows of the verbs asked of a node, and of those asked of a balancer."""
    of_node, of_balancer = (
        each[1:] for each in tables(TEXT) if each[0][:4] == ["verb", "sent by", "request", "ok reply"]
    )
    return of_node, of_balancer


def test_every_verb_is_listed_with_its_bodies() -> None:
    """Each verb stands with the bodies that the code gives it, and no other verb does."""
    of_node, of_balancer = verb_tables()
    told = {bare(row[0]): (bare(row[2]), bare(row[3])) for row in (*of_balancer, *of_node)}
    assert told == {str(verb): (body.__name__, reply.__name__) for verb, (body, reply) in BODIES.items()}
    assert {bare(row[0]) for row in of_node} == {
        *map(str, CLIENT_VERBS),
        *NODE_VERBS,
        *MANIFEST_VERBS,
        *BALANCER_VERBS,
        *BACKUP_VERBS,
        HELLO,
        LATENCY,
    }
    assert {bare(row[0]) for row in of_balancer} == {
        *REGISTRY_VERBS,
        *MANIFEST_VERBS,
        HELLO,
        TABLE,
        PLAN,
        HOLDINGS,
        DEGRADED,
        "status",
    }
    assert {bare(row[3]) for row in of_balancer if bare(row[0]) == "status"} == {BalancerStatus.__name__}


def test_who_may_send_a_verb_to_a_node(cluster: Cluster) -> None:
    """The roles in the table are those that a node lets through."""
    for row in verb_tables()[0]:
        allowed = []
        for sender in ("bal", "node-1", "shop"):
            try:
                check_verb(cluster, cluster.members[sender], bare(row[0]))
            except EngineError:
                continue
            allowed.append(cluster.members[sender].role)
        assert row[1].split(", ") == sorted(allowed), row[0]


def test_who_may_send_a_verb_to_a_balancer() -> None:
    """The registry is for nodes; the rest is for every member."""
    for row in verb_tables()[1]:
        assert row[1] == ("node" if bare(row[0]) in REGISTRY_VERBS else "any member"), row[0]


def test_every_error_code_is_listed() -> None:
    """The codes are those of engine.errors, with moved and invalid-request, and become the named Python errors."""
    told = {bare(row[0]): bare(row[1]) for row in table("code", "Python")}
    kinds = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert set(told) == {*(kind.code for kind in kinds), "invalid-request", "moved"}
    for code, python in told.items():
        if code != "moved":
            assert type(error_from_code(code, "")).__name__ == python


def test_every_algorithm_is_listed_with_its_operations() -> None:
    """The table of algorithms is that of engine.keys."""
    told = {bare(row[0]): {bare(each) for each in row[1].split(", ")} for row in table("algorithm", "operations")}
    assert told == {name: set(map(str, algo.operations)) for name, algo in ALGORITHMS.items()}


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("*", "a/b", True),
        ("a*c", "a/b/c", True),
        ("a?", "a", False),
        ("[a-f0-9]", "7", True),
        ("[!a-f0-9]", "7", False),
        ("A", "a", False),
        ("a[", "a[", True),
        ("a\\b", "ab", False),
        ("[[:digit:]]", "7", False),
    ],
)
def test_patterns_of_the_policy_match_as_told(pattern: str, name: str, fits: bool) -> None:
    """Each thing that the page says of a pattern; names like ``a[`` are there for the rule's sake alone."""
    assert manifest._matches(pattern, name) is fits


def test_every_operation_of_the_policy_is_named() -> None:
    """The vocabulary of the policy is told in full, and so are the operations of a grant."""
    section = TEXT.partition("### Policy")[2].partition("\n### ")[0]
    assert set(re.findall(r"`([a-z-]+)`", section)) == POLICY_OPERATIONS
    (row,) = [line for line in TEXT.splitlines() if line.startswith("| `operations` | `[text 0..32] 1..8`")]
    assert set(re.findall(r"`([a-z-]+)`", row)) - {"operations"} == set(map(str, OPERATIONS))


def test_the_files_of_a_client_are_those_of_the_code(tmp_path: Path) -> None:
    """The keys of client.toml and identity.toml with their types in order, and the form of the signing key."""
    names = {inspect.IntType: "integer", inspect.FloatType: "number", inspect.BoolType: "boolean"}
    told = [[(bare(row[0]), row[1]) for row in each[1:]] for each in tables(TEXT) if each[0][:2] == ["key", "TOML"]]
    for rows, kind in zip(told, (config.ClientConfig, config._IdentityFile), strict=True):
        fields = inspect.type_info(kind).fields  # type: ignore[attr-defined]
        found = [(field.name, names.get(type(field.type), "string")) for field in fields]
        assert rows == found
    (default,) = re.findall(r"^\| `timeout_s` .* at most 600; (\d+) if it is not there \|$", TEXT, flags=re.MULTILINE)
    assert config.ClientConfig(1, "", "", "").timeout_s == float(default)
    assert config.ClientConfig(1, "", "", "").prewarm
    key = config.create_identity(tmp_path / "identity.toml", "shop", "client").signing._private
    pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    assert pkcs8[:-32].hex(" ") in TEXT
    assert pkcs8[-32:] == key.private_bytes_raw()


def test_the_numbers_are_those_of_the_code() -> None:
    """Each limit is the value of the constant beside it."""
    for what, value, constant in table("limit", "value", "constant"):
        module, _, name = bare(constant).rpartition(".")
        assert getattr(importlib.import_module(module), name) == int(value), what


def test_status_codes_and_the_default_load() -> None:
    """The numbers of the statuses, and the load where there is none to tell."""
    assert (Status.OK, Status.ERROR, Status.MOVED) == (0, 1, 2)
    assert "0 ok, 1 error, 2 moved" in TEXT
    listener = importlib.import_module("engine.client.listener")
    assert Load(0, 0, False) == listener.IDLE


def sources() -> Iterator[str]:
    for folder in ("src/engine", "nodes", "balancer"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path.read_text(encoding="utf-8")


def test_every_kind_of_signed_document_is_listed() -> None:
    """Each kind that is signed anywhere stands in the table, beside a message that is described."""
    rows = table("kind", "document")
    used: set[str] = set()
    for source in sources():
        used |= set(re.findall(r"\bsign_envelope\(\s*\"([a-z.]+)\"", source))
        used |= set(re.findall(r"^_[A-Z]+_KIND = \"([a-z.]+)\"", source, flags=re.MULTILINE))
    assert {bare(row[0]) for row in rows} == used
    assert {bare(row[1]) for row in rows} <= set(structs())


def test_every_label_is_told() -> None:
    """Every label that a hash, a signature or a stream begins with is on the page."""
    labels: set[str] = set()
    for source in sources():
        labels |= set(re.findall(r"b\"(keyquorum/[a-z-]+/[0-9]+)\\0\"", source))
    assert len(labels) >= 6
    assert not {label for label in labels if f'"{label}"' not in TEXT}


# --- worked examples ---


def test_the_request() -> None:
    """The example decodes to what the page says it is."""
    request = request_codec.decode(example("request"))
    assert (request.version, request.id, request.verb, request.timeout_ms, request.extensions) == (
        wire.PROTOCOL_VERSION,
        7,
        "encrypt",
        5000,
        {},
    )
    assert REQUEST_CODECS[request.verb].decode(request.body) == Operate(
        "orders", KEY_ID, b"4 crates", b"tenant-7", b"", False, b""
    )


def test_a_request_that_is_not_canonical_is_refused() -> None:
    """The same request with its id as a longer integer, or with a byte after it, is refused."""
    good = example("request")
    assert good[2] == 7
    for bad in (good[:2] + b"\xcc\x07" + good[3:], good + b"\xc0", good[:-1], b"\x97" + good[1:] + b"\x00"):
        with pytest.raises(ProtocolError):
            request_codec.decode(bad)


def test_the_reply() -> None:
    """The reply carries the page's ciphertext and the state of the node."""
    reply = reply_codec.decode(example("reply"))
    assert (reply.id, reply.status, reply.load, reply.extensions) == (7, Status.OK, Load(2, 14, True), {})
    assert REPLY_CODECS["encrypt"].decode(reply.body).data == example("ciphertext")


def test_the_error_reply() -> None:
    """It becomes the error that the page names."""
    with pytest.raises(NeedGrant, match="'orders' is not loaded on node-2"):
        raise_for_status(reply_codec.decode(example("error-reply")))


def test_the_moved_reply() -> None:
    """It names the nodes to ask."""
    with pytest.raises(Moved) as caught:
        raise_for_status(reply_codec.decode(example("moved-reply")))
    assert caught.value.names == ("node-2", "node-4")


def record() -> KeyRecord:
    """A key held by both nodes, as the grant means it."""
    key = KeyManifest(
        key_id=KEY_ID,
        name="orders",
        version=1,
        epoch=1,
        attempt=1,
        algorithm="aes-256-gcm",
        threshold=2,
        holders=[Holder("node-1", 1, bytes(32)), Holder("node-2", 2, bytes(32))],
        public_key=b"",
        check_value=bytes(32),
        order=b"",
        previous=b"",
    )
    return KeyRecord(key, bytes(32), "node-1", b"")


def test_the_grant_is_signed_as_told() -> None:
    """The signature verifies over label and body by the bare primitive, and the payload is what the page says."""
    body, ((signer, signature),) = msgspec.msgpack.decode(example("grant"))
    public = Ed25519PrivateKey.from_private_bytes(SEED).public_key()
    assert public.public_bytes_raw() == example("grant-key")
    public.verify(signature, b"keyquorum/signed/1\0" + body)
    assert signer == "shop"
    document = verify_envelope(example("grant"), "grant", {"shop": example("grant-key")})
    assert document.digest == hashlib.sha256(body).digest()
    assert msgspec.msgpack.decode(document.payload, type=Grant) == Grant(
        KEY_ID, 1, 1, ["encrypt"], "node-2", NOW_MS, NOW_MS + 10_000, NONCE
    )


def test_the_grant_is_what_the_client_makes_and_a_holder_takes(cluster: Cluster) -> None:
    """Made again from the same seed it has the same bytes, and the check of a holder passes."""
    assert example("grant") == issue_grant(signing("shop"), record(), "encrypt", "node-2", NOW_MS, 10_000, NONCE)
    taken, document = check_grant(example("grant"), record(), "node-2", cluster, NOW_MS)
    assert (document.issuer, taken.combiner) == ("shop", "node-2")


def test_a_changed_grant_is_refused() -> None:
    """No byte of it can be changed unnoticed."""
    good = example("grant")
    for index in range(len(good)):
        bad = good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :]
        with pytest.raises((ManifestError, ProtocolError)):
            verify_envelope(bad, "grant", {"shop": example("grant-key")})
    assert read_unverified(good).kind == "grant"


class SoftLane:
    """AES-GCM as the token does it, with the page's key."""

    def use(self, key: object, verb: str, header: bytes, hashed: object, unlike: str) -> Callable[..., bytes]:
        def decrypt(ciphertext: bytes, associated_data: bytes, proof: bytes) -> bytes:
            assert ciphertext.startswith(header)
            nonce, rest = ciphertext[len(header) :][:12], ciphertext[len(header) + 12 :]
            return AESGCM(SEED).decrypt(nonce, rest, header + associated_data)

        assert (verb, hashed) == ("decrypt", None)
        return decrypt


def test_the_ciphertext() -> None:
    """It opens by the page's rule with the bare primitive, and through the node's own code."""
    data = example("ciphertext")
    assert AESGCM(SEED).decrypt(data[7:19], data[19:], data[:7] + b"tenant-7") == b"4 crates"
    assert len(data) == len(b"4 crates") + 35
    key: Any = SimpleNamespace(algorithm=ALGORITHMS["aes-256-gcm"])
    lane: Any = SoftLane()
    body = Operate("orders", b"", data, b"tenant-7", b"", False, b"")
    assert operate(lane, key, RequestType.DECRYPT, body, 1) == b"4 crates"


def test_the_commitment() -> None:
    """The input and the hash are those of the code."""
    salt, share = bytes(range(0x40, 0x60)), Share(3, bytes(range(0x80, 0xA1)))
    assert record().manifest.context == CONTEXT
    assert hashlib.sha256(example("commitment-input")).digest() == example("commitment")
    assert commitment(salt, CONTEXT, share) == example("commitment")


def test_the_check_value() -> None:
    """The input and the hash are those of the code."""
    secret = b"\x2a" + bytes(range(0xC0, 0xE0))
    assert hashlib.sha256(example("check-value-input")).digest() == example("check-value")
    assert check_value(secret, record().manifest.key_context) == example("check-value")


def test_the_placement_group() -> None:
    """The group of the example's name, by the page's rule and by the code."""
    group = int.from_bytes(hashlib.sha256(example("placement-group-input")).digest(), "big") % 1024
    assert group == placement_group("orders", 1024)
    assert f"the name `orders` is in group {group}" in TEXT


def told_order(cluster: Cluster, group: int) -> list[str]:
    """The order of a group's nodes, written down from the page alone."""
    seed = cluster.name.encode() + group.to_bytes(4, "big")
    places = {node.name: node.location.split("/") for node in cluster.nodes.values()}
    depth = max(map(len, places.values()))
    levels = [cluster.domain_level] + [n for n in range(depth, 0, -1) if n != cluster.domain_level]
    chosen: list[str] = []

    def cost(name: str) -> tuple[list[int], bytes]:
        own = places[name]
        near = [sum(places[each][: len(own[:n])] == own[:n] for each in chosen) for n in levels]
        label = b"keyquorum/holder-order/1\0"
        return near, hashlib.sha256(label + len(seed).to_bytes(4, "big") + seed + name.encode()).digest()

    while len(chosen) < len(places):
        chosen.append(min((name for name in places if name not in chosen), key=cost))
    return chosen


@pytest.mark.parametrize("level", [1, 2])
def test_the_order_of_a_groups_nodes(level: int) -> None:
    """The rule as the page tells it gives the order that the code gives."""
    paths = ("a/x/1", "a/x/2", "a/y/1", "b/x/1", "b/x", "c/z/1/q", "c/z/1/r")
    members = [member("op", "operator")]
    for index, path in enumerate(paths):
        members.append(msgspec.structs.replace(member(f"node-{index}", "node"), location=path))
    chain = issue_cluster_manifest(
        name="example", members=members, rules=[], operators=[signing("op")], groups=64, domain_level=level
    )
    found = open_chain(chain, chain_pin(chain))
    for group in range(64):
        assert told_order(found, group) == list(found.group_holders(group))


class RecordingEngine:
    """What a stream asks of an engine, with the associated data written down."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def key_info(self, name: str, timeout: float | None = None) -> object:
        return SimpleNamespace(algorithm="aes-256-gcm")

    def encrypt_many(
        self, name: str, plaintexts: Sequence[bytes], associated_data: Sequence[bytes], timeout: float | None
    ) -> list[bytes]:
        self.seen += associated_data
        return [b"c" * (len(each) + 35) for each in plaintexts]


def test_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container begins as the page says, and the chunk's associated data is the example."""
    monkeypatch.setattr("engine.client.files.os.urandom", lambda size: bytes(range(0x10, 0x10 + size)))
    engine: Any = RecordingEngine()
    sink = io.BytesIO()
    encrypt_stream(engine, "orders", io.BytesIO(b"4 crates"), sink, b"tenant-7")
    assert sink.getvalue() == example("stream-head") + (43).to_bytes(4, "big") + b"c" * 43
    assert engine.seen == [example("stream-associated-data")]


def test_every_example_is_checked() -> None:
    """No hex example stands on the page that no test here looks at."""
    here = Path(__file__).read_text(encoding="utf-8")
    names = re.findall(r"^```hex ([a-z-]+)$", TEXT, flags=re.MULTILINE)
    assert len(names) == len(set(names)) >= 3
    assert not [name for name in names if f'example("{name}")' not in here]


# --- both pages ---


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", ["protocol.md", "security.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Links inside the page meet a heading, and links to other files a file."""
    text = prose((ROOT / "docs" / name).read_text(encoding="utf-8"))
    anchors = {anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / "docs" / target.partition("#")[0]).exists(), target


def test_the_threat_model_names_what_exists() -> None:
    """Every file and constant that docs/security.md names for a defence is there."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:src|nodes|balancer)/[\w/.-]+\.(?:py|pyx|h|c))`", text))
    assert len(files) > 10
    assert not [each for each in files if not (ROOT / each).is_file()]
    for name in re.findall(r"`((?:engine|nodes|balancer)(?:\.\w+)+)`", text):
        module: ModuleType = importlib.import_module(name.rpartition(".")[0])
        assert hasattr(module, name.rpartition(".")[2]), name
