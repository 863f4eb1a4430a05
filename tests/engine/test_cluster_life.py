"""The life of a key on the real cluster: creation, idempotency, policy, listing, destruction."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import Engine, LocalCluster
from engine.client.config import ClientConfig, create_identity, load_config, load_identity, write_toml
from engine.client.transport import Channel, ask
from engine.protocol.manifest import CreateOrder, DestroyOrder, create_orders, destroy_orders, open_key_manifest
from engine.protocol.requests import Create, Destroy
from engine.protocol.signed import sign_envelope
from engine.sharing import check_placement


def _order(cluster: LocalCluster, name: str, **changes: object) -> tuple[bytes, CreateOrder]:
    signing = load_identity(cluster.client_config.parent / "identity.toml").signing
    now_ms = time.time_ns() // 1_000_000
    values = {
        "key_id": os.urandom(16),
        "name": name,
        "algorithm": "aes-256-gcm",
        "threshold": 3,
        "shares": 5,
        "operation": "generate",
        "expires_ms": now_ms + 60_000,
    }
    order = CreateOrder(**(values | changes))  # type: ignore[arg-type]
    return sign_envelope("order.create", now_ms, create_orders.encode(order), signing), order


def _channel(cluster: LocalCluster) -> Channel:
    identity = load_identity(cluster.client_config.parent / "identity.toml")
    return Channel(identity.transport, {m.name: m for m in cluster.cluster.members.values() if m.endpoint})


def test_shares_are_placed_apart(kq: Engine, cluster: LocalCluster) -> None:
    """Each share is on a node of its own, no failure domain holds t, and losing any one domain leaves t."""
    for number in range(20):
        info = kq.create_key(f"placed/{number}", "hmac-sha256", threshold=3, shares=5)
        assert sorted(info.holders) == sorted(cluster.nodes)
        assert check_placement(cluster.cluster.locations, info.holders, 3) == ()
    smaller = kq.create_key("placed/2-of-3", "hmac-sha256", threshold=2, shares=3)
    domains = [cluster.cluster.nodes[node].location.split("/")[0] for node in smaller.holders]
    assert len(set(domains)) == 3


def test_a_placement_that_cannot_be_safe_is_told(kq: Engine) -> None:
    """2-of-5 over three domains leaves two shares in one domain: the key is made, with a warning that says so."""
    info = kq.create_key("unsafe", "hmac-sha256", threshold=2, shares=5)
    assert any("site" in warning and "2" in warning for warning in info.warnings)


def test_the_same_order_makes_one_key(cluster: LocalCluster) -> None:
    """The order's key id is its idempotency id: sent again, to another dealer, it gives the same key back."""
    raw, order = _order(cluster, "idempotent")
    with _channel(cluster) as channel:
        first = ask(channel, "node1", "generate", Create(raw, b""), 15)
        again = ask(channel, "node2", "generate", Create(raw, b""), 15)
    assert first.manifest == again.manifest
    assert first.certificate == again.certificate
    assert open_key_manifest(first.manifest, cluster.cluster).manifest.key_id == order.key_id


def test_the_same_order_at_two_dealers_at_once_makes_one_key(cluster: LocalCluster, kq: Engine) -> None:
    """Two dealers race with one order: at most one attempt is committed, and the key works everywhere."""
    for number in range(5):
        raw, _ = _order(cluster, f"raced/{number}")
        results: list[object] = []

        def deal(node: str, raw: bytes = raw, results: list[object] = results) -> None:
            with _channel(cluster) as channel:
                try:
                    results.append(ask(channel, node, "generate", Create(raw, b""), 15).manifest)
                except engine.EngineError as error:
                    results.append(error)

        threads = [threading.Thread(target=deal, args=(node,)) for node in ("node1", "node2")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made = {each for each in results if isinstance(each, bytes)}
        with _channel(cluster) as channel:
            final = ask(channel, "node3", "generate", Create(raw, b""), 15).manifest
        assert made <= {final}
        ciphertext = kq.encrypt(f"raced/{number}", b"x")
        kq.flush(f"raced/{number}")
        assert kq.decrypt(f"raced/{number}", ciphertext) == b"x"


def test_one_name_two_clients(cluster: LocalCluster) -> None:
    """Different orders for one name at once: exactly one key comes to be."""
    outcomes: list[object] = []

    def create() -> None:
        with engine.connect(cluster.client_config) as mine:
            try:
                outcomes.append(mine.create_key("contested", "aes-128-gcm", threshold=3, shares=5).key_id)
            except engine.KeyExists as error:
                outcomes.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4
    assert sum(isinstance(each, str) for each in outcomes) == 1


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"threshold": 6}, ValueError, "6.*5"),
        ({"threshold": 0}, ValueError, "0"),
        ({"shares": 6}, ValueError, "6.*5"),
        ({"shares": 300, "threshold": 2}, ValueError, "300.*64"),
        ({"threshold": "3"}, TypeError, "int"),
        ({"algorithm": "aes-512-gcm"}, ValueError, "aes-512-gcm.*aes-256-gcm"),
        ({"name": ""}, ValueError, "1 to 128"),
        ({"name": "x" * 129}, ValueError, "129.*128"),
        ({"name": "a b"}, ValueError, "letters, digits"),
    ],
)
def test_bad_orders_are_refused_by_name(
    kq: Engine, changes: dict[str, object], kind: type[Exception], text: str
) -> None:
    """A mistake in a creation is a ValueError or TypeError that names the value and the limit."""
    arguments = {"name": "bad", "algorithm": "aes-256-gcm", "threshold": 3, "shares": 5} | changes
    with pytest.raises(kind, match=text):
        kq.create_key(arguments.pop("name"), arguments.pop("algorithm"), **arguments)  # type: ignore[arg-type]
    with pytest.raises(engine.KeyNotFound):
        kq.key_info("bad")


@pytest.mark.parametrize(
    ("algorithm", "material"),
    [
        ("aes-256-gcm", b"k" * 31),
        ("aes-128-gcm", b"k" * 32),
        ("hmac-sha256", b"k" * 15),
        ("hmac-sha256", b"k" * 129),
        ("ed25519", b"kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk"),
        ("rsa-2048-pss-sha256", b"-----BEGIN PRIVATE KEY-----\nkkkk\n-----END PRIVATE KEY-----\n"),
    ],
)
def test_bad_material_is_refused_without_showing_it(kq: Engine, algorithm: str, material: bytes) -> None:
    """An import that can't be is a ValueError with sizes, never with bytes."""
    with pytest.raises(ValueError, match=algorithm) as caught:
        kq.import_key("bad-import", algorithm, key_material=material)
    assert "kkkk" not in str(caught.value)


def test_limits_are_named(kq: Engine) -> None:
    """Data beyond a request's limit is a ValueError that names both."""
    kq.create_key("limits", "aes-256-gcm", threshold=3, shares=5)
    kq.create_key("limits-mac", "hmac-sha256", threshold=3, shares=5)
    kq.create_key("limits-sign", "ecdsa-p256-sha256", threshold=3, shares=5)
    with pytest.raises(ValueError, match=r"49153.*49152"):
        kq.encrypt("limits", bytes(48 * 1024 + 1))
    with pytest.raises(ValueError, match=r"49153.*49152"):
        kq.mac("limits-mac", bytes(48 * 1024 + 1))
    with pytest.raises(ValueError, match=r"4097.*4096"):
        kq.encrypt("limits", b"", associated_data=bytes(4097))
    signature = kq.sign("limits-sign", bytes(1_000_000))  # hashed by the client: no limit
    kq.verify("limits-sign", bytes(1_000_000), signature)
    with pytest.raises(ValueError, match="not mac"):
        kq.mac("limits", b"x")
    with pytest.raises(TypeError):
        kq.encrypt("limits", "text")  # type: ignore[arg-type]


def test_policy_is_enforced(cluster: LocalCluster, kq: Engine) -> None:
    """What no rule allows is denied, at every node, and names who and what."""
    kq.create_key("app/data", "aes-256-gcm", threshold=3, shares=5)
    kq.create_key("app/sign/x", "ed25519", threshold=3, shares=5)
    kq.create_key("other", "aes-256-gcm", threshold=3, shares=5)
    signature = kq.sign("app/sign/x", b"m")
    with engine.connect(cluster.client_config_of("limited")) as limited:
        assert limited.decrypt("app/data", limited.encrypt("app/data", b"mine")) == b"mine"
        limited.verify("app/sign/x", b"m", signature)
        for call in (
            lambda: limited.sign("app/sign/x", b"m"),
            lambda: limited.encrypt("other", b"x"),
            lambda: limited.decrypt("other", kq.encrypt("other", b"x")),
            lambda: limited.create_key("app/new", "aes-256-gcm", threshold=3, shares=5),
            lambda: limited.import_key("app/new", "aes-256-gcm", key_material=bytes(32)),
            lambda: limited.destroy_key("app/data"),
            lambda: limited.flush(),
            lambda: limited.prewarm("other"),
            lambda: limited.key_info("other"),
        ):
            with pytest.raises(engine.AccessDenied, match="limited"):
                call()
    with engine.connect(cluster.client_config_of("nobody")) as nobody, pytest.raises(engine.AccessDenied):
        nobody.encrypt("app/data", b"x")
    with pytest.raises(engine.KeyNotFound):
        kq.key_info("app/new")


def test_lists_show_what_the_policy_lets_see(cluster: LocalCluster, kq: Engine) -> None:
    """Listing takes a pattern, pages through everything, and is itself a right."""
    for number in range(12):
        kq.create_key(f"listed/{number:02}", "hmac-sha256", threshold=2, shares=3)
    names = [entry.name for entry in kq.list_keys("listed/*")]
    assert names == [f"listed/{number:02}" for number in range(12)]
    assert kq.list_keys("listed/nothing*") == ()
    with engine.connect(cluster.client_config_of("auditor")) as auditor:
        assert [entry.name for entry in auditor.list_keys("listed/*")] == names
    with engine.connect(cluster.client_config_of("nobody")) as nobody:
        assert nobody.list_keys("*") == ()


def test_a_key_that_is_not_there(kq: Engine) -> None:
    """An unknown name is KeyNotFound, whatever is asked of it."""
    for call in (kq.key_info, kq.public_key, kq.destroy_key, lambda name: kq.encrypt(name, b"x")):
        with pytest.raises(engine.KeyNotFound, match="missing"):
            call("missing")


def test_destroyed_is_destroyed(kq: Engine) -> None:
    """After destroy_key nothing decrypts, loaded or not, and the name can be taken by a new key."""
    kq.create_key("mortal", "aes-256-gcm", threshold=3, shares=5)
    ciphertext = kq.encrypt("mortal", b"x")
    gone = kq.destroy_key("mortal")
    assert sorted(gone.confirmed) == ["node1", "node2", "node3", "node4", "node5"]
    assert gone.pending == ()
    with pytest.raises(engine.KeyNotFound):
        kq.decrypt("mortal", ciphertext)
    kq.create_key("mortal", "aes-256-gcm", threshold=3, shares=5)
    with pytest.raises(engine.InvalidTag):
        kq.decrypt("mortal", ciphertext)


def test_nodes_read_the_registrys_books_by_themselves(cluster: LocalCluster, kq: Engine) -> None:
    """A destruction that no node was told of, only the registry, is carried out by every holder within seconds."""
    kq.create_key("booked", "aes-256-gcm", threshold=3, shares=5)
    ciphertext = kq.encrypt("booked", b"x")
    signing = load_identity(cluster.client_config.parent / "identity.toml").signing
    now_ms = time.time_ns() // 1_000_000
    order = DestroyOrder(bytes.fromhex(kq.key_info("booked").key_id), "booked", now_ms + 60_000)
    raw = sign_envelope("order.destroy", now_ms, destroy_orders.encode(order), signing)
    node = load_identity(cluster.path / "nodes" / "node1" / "identity.toml")
    balancers = {member.name: member for member in cluster.cluster.of_role("balancer")}
    with Channel(node.transport, balancers) as channel:
        ask(channel, next(iter(balancers)), "registry.destroy", Destroy(raw), 5)
    until = time.monotonic() + 15
    while True:
        try:
            kq.decrypt("booked", ciphertext)
        except engine.KeyNotFound:
            break
        except engine.QuorumUnavailable:
            pass  # some holders know already
        assert time.monotonic() < until, "the nodes never learned of the destruction"
        time.sleep(0.2)


def test_a_recreated_key_is_noticed_by_other_clients(cluster: LocalCluster, kq: Engine) -> None:
    """A client with an old description learns the new one by itself."""
    kq.create_key("reborn", "aes-256-gcm", threshold=3, shares=5)
    with engine.connect(cluster.client_config) as other:
        other.encrypt("reborn", b"x")
        kq.destroy_key("reborn")
        kq.create_key("reborn", "hmac-sha256", threshold=3, shares=5)
        assert len(other.mac("reborn", b"x")) == 32


def test_a_stranger_gets_in_nowhere(cluster: LocalCluster, tmp_path: Path) -> None:
    """A client whose key is not in the manifest is refused by every node, and told so at once."""
    create_identity(tmp_path / "identity.toml", "local", "client")  # a member's name, but keys of its own
    known = load_config(cluster.client_config, ClientConfig)
    manifest = (cluster.client_config.parent / known.manifest).resolve()
    values = {"version": 1, "identity": "identity.toml", "manifest": str(manifest), "manifest_pin": known.manifest_pin}
    write_toml(tmp_path / "client.toml", values)
    with pytest.raises(engine.EngineError) as caught:  # noqa: SIM117 # connect may refuse already
        with engine.connect(tmp_path / "client.toml") as stranger:
            stranger.encrypt("app/data", b"x")
    assert isinstance(caught.value, engine.AccessDenied | engine.ConfigError)


def test_many_threads_one_engine(kq: Engine) -> None:
    """An Engine serves several threads at once, and every result is the right one."""
    kq.create_key("threads", "aes-256-gcm", threshold=3, shares=5)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(50):
                text = f"{number}/{turn}".encode()
                assert kq.decrypt("threads", kq.encrypt("threads", text)) == text
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_batches_keep_their_order(kq: Engine) -> None:
    """The pipelined verbs give one result per input, in order, and one bad input is told."""
    kq.create_key("batch", "aes-256-gcm", threshold=3, shares=5)
    texts = [f"text {number}".encode() for number in range(500)]
    ciphertexts = kq.encrypt_many("batch", texts)
    assert kq.decrypt_many("batch", ciphertexts) == texts
    spoiled = [*ciphertexts[:3], b"garbage", *ciphertexts[4:6]]
    outcomes = kq.decrypt_many("batch", spoiled, return_exceptions=True)
    assert [each for each in outcomes if isinstance(each, bytes)] == [*texts[:3], *texts[4:6]]
    assert isinstance(outcomes[3], engine.InvalidTag)
    with pytest.raises(engine.InvalidTag):
        kq.decrypt_many("batch", spoiled)


@pytest.fixture(params=["blocking", "asynchronous"])
def call(request: pytest.FixtureRequest, cluster: LocalCluster) -> Iterator[Callable[..., Any]]:
    """Calls a verb of an engine of its own, by the verb's name."""
    if request.param == "blocking":
        with engine.connect(cluster.client_config) as blocking:
            yield lambda verb, *args, **options: getattr(blocking, verb)(*args, **options)
        return

    async def connected() -> engine.aio.AsyncEngine:
        return engine.aio.connect(cluster.client_config)

    with asyncio.Runner() as runner:
        kq = runner.run(connected())
        try:
            yield lambda verb, *args, **options: runner.run(getattr(kq, verb)(*args, **options))
        finally:
            runner.run(kq.close())


def _cold(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, the key dropped from the nodes' caches before."""

    def flushed(verb: str, name: str, *args: Any, **options: Any) -> Any:
        call("flush", name)
        return call(verb, name, *args, **options)

    return flushed


@pytest.mark.parametrize("algorithm", ["ecdsa-p256-sha256", "ed25519"])
def test_batches_of_signatures_are_verified_in_their_order(
    kq: Engine, call: Callable[..., Any], algorithm: str
) -> None:
    """A None for each right one, whether the key is loaded or not; a wrong one is told in its place, or raised."""
    name = f"batch/{algorithm}"
    if not kq.list_keys(name):
        kq.create_key(name, algorithm, threshold=3, shares=5)
    messages = [f"message {number}".encode() for number in range(100)]
    pairs = list(zip(messages, call("sign_many", name, messages), strict=True))
    spoiled = list(pairs)
    spoiled[3] = (messages[3], pairs[4][1])
    spoiled[70] = (messages[70], bytes(1025))  # which no message holds
    for use in (call, _cold(call)):
        assert use("verify_many", name, pairs) == [None] * 100
        outcomes = use("verify_many", name, spoiled, return_exceptions=True)
        wrong = {at: type(each) for at, each in enumerate(outcomes) if each is not None}
        assert wrong == {3: engine.InvalidSignature, 70: engine.InvalidSignature}
        with pytest.raises(engine.InvalidSignature):
            use("verify_many", name, spoiled)
    assert call("verify_many", name, []) == []


def test_batches_of_macs_keep_their_order(kq: Engine, call: Callable[..., Any]) -> None:
    """They are those of single calls, whether the key is loaded or not; one that can't be is told in its place."""
    name = "batch/mac"
    if not kq.list_keys(name):
        kq.create_key(name, "hmac-sha256", threshold=3, shares=5)
    messages = [f"message {number}".encode() for number in range(100)]
    macs = [kq.mac(name, message) for message in messages]
    spoiled = [*messages[:5], bytes(48 * 1024 + 1), *messages[5:]]
    for use in (call, _cold(call)):
        assert use("mac_many", name, messages) == macs
        outcomes = use("mac_many", name, spoiled, return_exceptions=True)
        assert isinstance(outcomes.pop(5), ValueError)
        assert outcomes == macs
        with pytest.raises(ValueError, match=r"49153.*49152"):
            use("mac_many", name, spoiled)
        use("verify_mac", name, messages[7], macs[7])
        with pytest.raises(engine.InvalidSignature):
            use("verify_mac", name, messages[7], macs[8])


def test_a_batch_of_proofs_goes_the_shortest_way(kq: Engine) -> None:
    """A right one is empty there, and not None, which would have it asked again the ordinary way."""
    kq.create_key("batch/proofs", "ed25519", threshold=3, shares=5)
    kq.create_key("batch/proofs-mac", "hmac-sha256", threshold=3, shares=5)
    made = {
        "verify": ("batch/proofs", kq.sign("batch/proofs", b"m")),
        "verify-mac": ("batch/proofs-mac", kq.mac("batch/proofs-mac", b"m")),
    }
    for verb, (name, proof) in made.items():
        uses = [(b"m", b"", proof), (b"other", b"", proof)] * 20
        until_s = time.monotonic() + 20
        # None too where the node is not warm yet, or has no connection to spare.
        while None in (done := kq._shortcuts.use_many(verb, name, uses, 5.0, stop=False)):
            assert time.monotonic() < until_s, f"{done.count(None)} of {len(uses)} would take the ordinary way"
            kq.sign(name, b"m") if verb == "verify" else kq.mac(name, b"m")
        assert done[::2] == [b""] * 20
        assert [type(each) for each in done[1::2]] == [engine.InvalidSignature] * 20


def test_the_same_verbs_as_coroutines(cluster: LocalCluster) -> None:
    """engine.aio serves many calls at once over one connection to each node."""

    async def work() -> None:
        async with engine.aio.connect(cluster.client_config) as kq:
            await kq.create_key("aio", "aes-256-gcm", threshold=3, shares=5)
            await kq.create_key("aio-sign", "ed25519", threshold=3, shares=5)
            ciphertexts = await asyncio.gather(*(kq.encrypt("aio", bytes([n])) for n in range(100)))
            plain = await asyncio.gather(*(kq.decrypt("aio", each) for each in ciphertexts))
            assert plain == [bytes([n]) for n in range(100)]
            signature = await kq.sign("aio-sign", b"m")
            await kq.verify("aio-sign", b"m", signature)
            with pytest.raises(engine.InvalidSignature):
                await kq.verify("aio-sign", b"other", signature)
            with pytest.raises(engine.KeyNotFound):
                await kq.encrypt("aio-missing", b"")

    asyncio.run(work())
