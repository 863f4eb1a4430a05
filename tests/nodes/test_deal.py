"""The combiner's gathering over a channel that lies, fails and is slow: one bad holder never spoils it."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace as replace_struct

from engine.client.listener import error_body
from engine.client.transport import Arrival
from engine.errors import (
    AccessDenied,
    EngineError,
    NodeUnavailable,
    QuorumUnavailable,
    ShareCorrupt,
    StaleKey,
    StoreUnavailable,
    TokenError,
)
from engine.protocol.manifest import key_manifests, read_key_manifest
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, ReleasedShare
from engine.protocol.wire import PROTOCOL_VERSION, Load, Reply, Status
from engine.sharing import SecretBuffer, Share, check_value, commitment, secret_memory, unblind
from nodes.cache import CacheLimits
from nodes.catalogue import Catalogue, Entry
from nodes.clock import TrustedClock
from nodes.deal import Conversation, Talker
from nodes.gather import Gathering
from nodes.holder import ShareHolder
from nodes.shares import ShareCache
from nodes.store import Row, seal_context, seal_share
from nodes.token import Lane

ME = "node1"
HOLDERS = ("node1", "node2", "node3", "node4", "node5")
Answer = Callable[[], Reply | EngineError | None]


class FakeChannel:
    """Answers at once with what the test scripted for each peer; ``None`` never answers."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.abandoned: list[int] = []
        self._tokens = itertools.count(1)
        self._ready: list[Arrival] = []

    def start(self, peer: str, verb: str, body: bytes, timeout_s: float, extensions: Any = None) -> int:
        self.asked.append(peer)
        token = next(self._tokens)
        told = self.answers[peer]()
        if isinstance(told, NodeUnavailable):
            raise told
        if isinstance(told, EngineError):
            self._ready.append(Arrival(token, peer, verb, None, told, 1.0))
        elif told is not None:
            self._ready.append(Arrival(token, peer, verb, told, None, 1.0))
        return token

    def poll(self, timeout_s: float) -> list[Arrival]:
        ready, self._ready = self._ready, []
        if not ready:
            time.sleep(min(timeout_s, 0.01))
        return ready

    def abandon(self, token: int) -> None:
        self.abandoned.append(token)


def ok(share: tuple[int, bytes, bytes]) -> Answer:
    body = REPLY_CODECS["share.release"].encode(ReleasedShare(*share))
    return lambda: Reply(PROTOCOL_VERSION, 1, Status.OK, body, Load(0, 0, False), {})


def refuses(error: Exception) -> Answer:
    return lambda: Reply(PROTOCOL_VERSION, 1, Status.ERROR, error_body(error), Load(0, 0, False), {})


def raw(status: int, body: bytes) -> Answer:
    return lambda: Reply(PROTOCOL_VERSION, 1, status, body, Load(0, 0, False), {})


class Scene:
    """node1 as the combiner of a 3-of-5 key, of which it holds a share."""

    def __init__(self, world: Any, lane: Lane) -> None:
        self.world, self.lane = world, lane
        self.dealt = world.deal("orders", holders=HOLDERS, threshold=3)
        offer, manifest = self.dealt.offers[ME], self.dealt.manifest
        self.context = seal_context(manifest, offer.x, ME, self.dealt.record.digest)
        share = Share(offer.x, offer.y)
        self.row = Row(
            key_id=manifest.key_id,
            version=1,
            epoch=1,
            attempt=1,
            name="orders",
            state="committed",
            manifest_hash=self.dealt.record.digest,
            manifest=self.dealt.record.raw,
            certificate=b"",
            document=b"",
            sealed=seal_share(lane, share, offer.salt, self.context),
            changed_ms=1,
        )
        nothing_kept = ShareCache(CacheLimits(1, 0), time.monotonic)
        ledger: Any = SimpleNamespace(clock=TrustedClock(wall_ms=world.clock))
        holder = ShareHolder(
            world.cluster,
            world.keys[ME],
            None,  # type: ignore[arg-type]
            Catalogue([]),
            (),
            ledger,
            nothing_kept,
        )
        self.conversation = Conversation(world.cluster, world.keys[ME], {}, "up", holder.own_secret, world.clock)

    def good(self, node: str) -> Answer:
        offer = self.dealt.offers[node]
        return ok((offer.x, offer.y, offer.salt))

    def answers(self, **changes: Answer) -> dict[str, Answer]:
        return {**{node: self.good(node) for node in HOLDERS}, **changes}

    def gather(
        self,
        channel: FakeChannel,
        *,
        row: Row | None = None,
        timeout_s: float = 5.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Any:
        entry = Catalogue([row or self.row]).by_id(self.dealt.key_id)
        assert isinstance(entry, Entry)
        talker = Talker(channel, self.lane)  # type: ignore[arg-type]
        return self.conversation.gather(talker, entry, b"grant", time.monotonic() + timeout_s, None, meanwhile)

    def is_key(self, gathered: Any) -> bool:
        assert check_value(gathered.secret, self.dealt.manifest.key_context) == self.dealt.manifest.check_value
        return bytes(unblind(gathered.secret)) == self.dealt.key


@pytest.fixture
def scene(world: Any, lane: Lane) -> Scene:
    return Scene(world, lane)


def test_two_others_and_its_own_share_give_the_key(scene: Scene) -> None:
    channel = FakeChannel(scene.answers())
    gathered = scene.gather(channel)
    assert scene.is_key(gathered)
    assert channel.asked == ["node2", "node3"]
    assert gathered.corrupt == ()
    assert scene.dealt.key.hex() not in repr(gathered)
    assert repr(scene.dealt.key)[2:-1] not in repr(gathered)


def test_the_node_writes_its_own_while_the_holders_are_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is combined before that is done, nor where it fails."""
    channel, told = FakeChannel(scene.answers()), list[str]()
    genuine = Gathering.solve

    def solve(self: Gathering) -> Any:
        told.append("combined")
        return genuine(self)

    monkeypatch.setattr(Gathering, "solve", solve)
    assert scene.is_key(scene.gather(channel, meanwhile=lambda: told.append(f"asked {','.join(channel.asked)}")))
    assert told == ["asked node2,node3", "combined"]

    def full() -> None:
        raise StoreUnavailable("the disk is full")

    told.clear()
    channel = FakeChannel(scene.answers())
    with pytest.raises(StoreUnavailable):
        scene.gather(channel, meanwhile=full)
    assert told == []
    assert len(channel.abandoned) == 2


def wrong_share(scene: Scene, node: str) -> Answer:
    offer = scene.dealt.offers[node]
    return ok((offer.x, bytes([offer.y[0] ^ 1]) + offer.y[1:], offer.salt))


BAD: dict[str, Callable[[Scene], Answer]] = {
    "a wrong share": lambda scene: wrong_share(scene, "node2"),
    "another's share": lambda scene: scene.good("node4"),
    "stale": lambda scene: refuses(StaleKey("no share")),
    "denied": lambda scene: refuses(AccessDenied("no")),
    "invalid-request": lambda scene: refuses(ValueError("no")),
    "internal error": lambda scene: refuses(RuntimeError("no")),
    "its own share corrupt": lambda scene: refuses(ShareCorrupt("no", ["node2"])),
    "moved": lambda scene: raw(Status.MOVED, error_body(StaleKey("x"))),
    "garbage in an ok": lambda scene: raw(Status.OK, b"\xc1garbage"),
    "garbage in an error": lambda scene: raw(Status.ERROR, b"\xc1garbage"),
    "unreachable": lambda scene: lambda: NodeUnavailable("down"),
    "broken off": lambda scene: lambda: EngineError("broke"),
    "silent": lambda scene: lambda: None,
}


@pytest.mark.parametrize("what", BAD)
def test_one_bad_holder_is_replaced_by_the_next(scene: Scene, what: str) -> None:
    channel = FakeChannel(scene.answers(node2=BAD[what](scene)))
    gathered = scene.gather(channel)
    assert scene.is_key(gathered)
    assert channel.asked == ["node2", "node3", "node4"]
    assert gathered.corrupt == (("node2",) if "share" in what and "own" not in what else ())


@pytest.mark.parametrize("what", [what for what in BAD if what not in ("silent", "stale")])
def test_bad_holders_beyond_repair_are_named(scene: Scene, what: str) -> None:
    bad = {node: BAD[what](scene) for node in ("node2", "node3", "node5")}
    if what == "another's share":
        bad = {"node2": scene.good("node3"), "node3": scene.good("node2"), "node5": scene.good("node2")}
    if what == "a wrong share":
        bad = {node: wrong_share(scene, node) for node in bad}
    with pytest.raises((QuorumUnavailable, ShareCorrupt), match="2 of the 3 shares needed") as caught:
        scene.gather(FakeChannel(scene.answers(**bad)))
    named = getattr(caught.value, "missing", ()) or getattr(caught.value, "holders", ())
    assert set(named) == {"node2", "node3", "node5"}
    assert isinstance(caught.value, ShareCorrupt) == (what in ("a wrong share", "another's share"))


def test_enough_holders_at_another_epoch_are_no_lack_of_shares(scene: Scene) -> None:
    """The client is told that the key has changed, so that it describes it again."""
    stale = {node: BAD["stale"](scene) for node in ("node2", "node3")}
    with pytest.raises(StaleKey, match="2 of the 3 shares needed"):
        scene.gather(FakeChannel(scene.answers(**stale, node5=BAD["unreachable"](scene))))
    with pytest.raises(QuorumUnavailable, match="1 of the 3 shares needed"):
        scene.gather(FakeChannel(scene.answers(**dict.fromkeys(HOLDERS[1:], BAD["unreachable"](scene)))))


def test_silence_ends_with_the_deadline_and_is_abandoned(scene: Scene) -> None:
    channel = FakeChannel(dict.fromkeys(HOLDERS, lambda: None))
    with pytest.raises(QuorumUnavailable, match="no answer in time") as caught:
        scene.gather(channel, timeout_s=0.4)
    assert set(caught.value.missing) == set(HOLDERS[1:])
    assert sorted(channel.abandoned) == [1, 2, 3, 4]


def test_an_own_share_that_does_not_open_is_left_out(scene: Scene) -> None:
    row = replace(scene.row, sealed=scene.lane.seal(b"x" * 100, b"another context"))
    channel = FakeChannel(scene.answers())
    assert scene.is_key(scene.gather(channel, row=row))
    assert channel.asked == ["node2", "node3", "node4"]


def test_an_own_share_that_does_not_match_is_left_out_and_named(scene: Scene) -> None:
    offer = scene.dealt.offers[ME]
    wrong = seal_share(scene.lane, Share(offer.x, bytes(len(offer.y))), offer.salt, scene.context)
    channel = FakeChannel(scene.answers())
    gathered = scene.gather(channel, row=replace(scene.row, sealed=wrong))
    assert scene.is_key(gathered)
    assert gathered.corrupt == (ME,)


def test_a_node_without_a_share_asks_t_others(scene: Scene) -> None:
    channel = FakeChannel(scene.answers())
    assert scene.is_key(scene.gather(channel, row=replace(scene.row, sealed=b"")))
    assert channel.asked == ["node2", "node3", "node4"]


def test_a_sick_token_is_no_corrupt_share(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def sick(self: Lane, sealed: bytes, context: bytes) -> bytes:
        raise TokenError("the token's KEK does not answer")

    monkeypatch.setattr(Lane, "unseal_secret", sick)
    with pytest.raises(TokenError, match="does not answer"):
        scene.gather(FakeChannel(scene.answers()))


def test_a_dealer_that_committed_to_other_shares_is_found_by_the_check_value(scene: Scene) -> None:
    wrong = scene.world.deal("orders", holders=HOLDERS, threshold=3, manifest={"check_value": bytes(32)})
    scene.dealt = wrong
    offer = wrong.offers[ME]
    context = seal_context(wrong.manifest, offer.x, ME, wrong.record.digest)
    sealed = seal_share(scene.lane, Share(offer.x, offer.y), offer.salt, context)
    row = replace(
        scene.row,
        key_id=wrong.key_id,
        manifest=wrong.record.raw,
        manifest_hash=wrong.record.digest,
        sealed=sealed,
    )
    with pytest.raises(ShareCorrupt, match="another key than the manifest's check value"):
        scene.gather(FakeChannel(scene.answers()), row=row)


@pytest.mark.parametrize("liar", ["node2", ME])
def test_a_holder_that_committed_to_a_wrong_share_is_named_and_the_key_is_served(scene: Scene, liar: str) -> None:
    """As after a refresh, where each holder's commitment is its own word."""
    dealt, context = scene.dealt, scene.dealt.manifest.context
    wrong = os.urandom(len(dealt.offers[liar].y))
    holders = [
        each
        if each.node != liar
        else replace_struct(each, commitment=commitment(dealt.offers[liar].salt, context, Share(each.x, wrong)))
        for each in dealt.manifest.holders
    ]
    manifest = replace_struct(dealt.manifest, holders=holders)
    record = read_key_manifest(scene.world.signed(key_manifests, "key", manifest, "node1"))
    offer = dealt.offers[ME]
    mine = Share(offer.x, wrong if liar == ME else offer.y)
    sealed = seal_share(scene.lane, mine, offer.salt, seal_context(manifest, offer.x, ME, record.digest))
    row = replace(scene.row, manifest=record.raw, manifest_hash=record.digest, sealed=sealed)
    changes = {} if liar == ME else {liar: ok((dealt.offers[liar].x, wrong, dealt.offers[liar].salt))}
    channel = FakeChannel(scene.answers(**changes))
    _, before = secret_memory()
    gathered = scene.gather(channel, row=row)
    assert scene.is_key(gathered)
    assert gathered.corrupt == (liar,)
    assert sorted(channel.asked) == list(HOLDERS[1:])
    gathered.secret.close()
    gc.collect()
    assert secret_memory()[1] <= before  # no share is left in locked memory


def test_latencies_are_learned_and_the_silent_are_asked_last(scene: Scene) -> None:
    channel = FakeChannel(scene.answers(node2=lambda: None, node4=lambda: NodeUnavailable("down")))
    assert scene.is_key(scene.gather(channel))
    assert channel.asked == ["node2", "node3", "node4", "node5"]
    told = scene.conversation.peers.latencies(time.monotonic())
    assert (told["node2"].samples, told["node3"].samples, told["node4"].down) == (1, 1, True)
    assert told["node2"].expected_s > told["node3"].expected_s
    channel.asked.clear()
    assert scene.is_key(scene.gather(channel))
    assert channel.asked == ["node3", "node5"]
    assert len(channel.abandoned) == 1


def test_a_holder_that_knows_another_epoch_makes_this_node_look_at_the_books(scene: Scene) -> None:
    looked: list[bool] = []
    scene.conversation.outdated = lambda: looked.append(True)
    scene.gather(FakeChannel(scene.answers(node2=refuses(StaleKey("held is epoch 2")))))
    assert looked == [True]


def test_a_gathering_makes_room_where_locked_memory_is_short(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def with_room(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except OSError:
            made.append(True)
            return make()

    def copy_of(data: Any) -> SecretBuffer:
        if not made:
            raise OSError("no locked memory")
        return SecretBuffer.copy_of(data)

    scene.conversation._with_room = with_room
    monkeypatch.setattr("nodes.deal.SecretBuffer", SimpleNamespace(copy_of=copy_of))
    assert scene.is_key(scene.gather(FakeChannel(scene.answers())))
    assert made == [True]


def test_what_is_sent_names_the_key_and_carries_grant_and_certificate(scene: Scene) -> None:
    sent: list[bytes] = []

    class Listening(FakeChannel):
        def start(self, peer: str, verb: str, body: bytes, timeout_s: float, extensions: Any = None) -> int:
            assert verb == "share.release"
            sent.append(body)
            return super().start(peer, verb, body, timeout_s)

    scene.gather(Listening(scene.answers()), row=replace(scene.row, certificate=b"certificate"))
    told = REQUEST_CODECS["share.release"].decode(sent[0])
    assert (told.key_id, told.grant, told.certificate) == (scene.dealt.key_id, b"grant", b"certificate")
