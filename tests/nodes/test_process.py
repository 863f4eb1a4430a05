"""A real node over CURVE against strangers, garbage and members who overstep; it survives and says what it did."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engine.client.transport import Channel, ask, connect_options
from engine.errors import (
    AccessDenied,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyNotFound,
    KeyPending,
    ManifestError,
    NeedGrant,
    NodeUnavailable,
    ProtocolError,
    StaleKey,
)
from engine.protocol.manifest import PolicyRule, issue_cluster_manifest
from engine.protocol.requests import (
    BACKUP_VERBS,
    BALANCER_VERBS,
    BODIES,
    Abort,
    Create,
    Describe,
    Destroy,
    Empty,
    Flush,
    Hello,
    ListKeys,
    NodeStatus,
    Operate,
    Prewarm,
    ShareCommit,
    SharePrepare,
    ShareRelease,
)
from engine.protocol.signed import SigningKey
from engine.protocol.wire import MAX_DATA, MAX_MESSAGE, PROTOCOL_VERSION, Request, error_codec, reply_codec

NODE = "node1"
RULES = [PolicyRule("alice", "*", ["*"])]
STATUS_BODY = b"\x90"
CURVE_OVERHEAD = 33
"""What CURVE adds to a message on the wire (RFC 26, MESSAGE command); ZMQ_MAXMSGSIZE counts it too."""


def status(live: Any) -> NodeStatus:
    """The node's status; it answers, so it lives."""
    with live.channel("alice") as channel:
        answer: NodeStatus = ask(channel, NODE, "status", Empty(), 10)
    assert answer.node == NODE
    return answer


@pytest.fixture
def raw(live: Any) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER that is let in as alice and sends what the test likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        connect_options(dealer, live.identities["alice"].transport, live.world.cluster.nodes[NODE])
        dealer.rcvtimeo = dealer.sndtimeo = 10_000
        dealer.connect(live.world.cluster.nodes[NODE].endpoint)
        yield dealer


def test_hello_tells_who_the_node_is_and_is_not_recorded(live: Any, until: Callable[..., Any]) -> None:
    with live.channel("bob") as channel:  # whom no rule allows anything
        with pytest.raises(AccessDenied):
            ask(channel, NODE, "describe", Describe("nothing", 0), 10)
        told = channel.welcome(NODE)
    assert told is not None
    assert (told.name, told.version, told.cluster_serial) == (NODE, PROTOCOL_VERSION, 1)
    assert told.cluster_digest == live.world.cluster.digest
    assert told.limits.message == MAX_MESSAGE
    with live.channel("bob") as channel:
        with pytest.raises(ProtocolError, match="protocol version 9; this side speaks 1"):
            ask(channel, NODE, "hello", Hello(9, "9.0"), 10)
        again = ask(channel, NODE, "hello", Hello(PROTOCOL_VERSION, "0"), 10)
    assert again == told

    def recorded() -> list[str]:
        mine = [each for each in records(live) if (each.get("member"), each.get("verb")) == ("bob", "hello")]
        return [each["outcome"] for each in mine if each["event"] == "reply"]

    assert until(recorded, "the hello that failed is recorded") == ["protocol-error"]


def request(
    verb: str = "status", body: bytes = STATUS_BODY, *, version: int = PROTOCOL_VERSION, number: int = 1
) -> bytes:
    return msgspec.msgpack.encode(Request(version, number, verb, 5_000, body, {}))


def told(reply: bytes) -> tuple[int, str, str]:
    """(id, code, message) of an error reply."""
    answer = reply_codec.decode(reply)
    assert answer.status == 1
    error = error_codec.decode(answer.body)
    return answer.id, error.code, error.message


# --- who gets in ---


def test_a_member_gets_in_and_is_answered(live: Any) -> None:
    answer = status(live)
    assert answer.cluster_serial == live.world.cluster.serial
    assert "rsa-2048-oaep-sha256" not in answer.algorithms
    assert [each.split(":")[0] for each in answer.missing] == ["rsa-2048-oaep-sha256"]


def test_an_unknown_key_gets_in_nowhere(live: Any, foreign_identity: Any) -> None:
    with Channel(foreign_identity, live.world.cluster.nodes) as channel:
        for verb, body in (("status", Empty()), ("describe", Describe("orders", 0)), ("list", ListKeys("*", "", 1))):
            with pytest.raises(AccessDenied, match="refuses the key of 'stranger'"):
                ask(channel, NODE, verb, body, 10)
    status(live)


def test_a_connection_without_curve_gets_no_answer(live: Any, until: Callable[..., Any]) -> None:
    endpoint = live.world.cluster.nodes[NODE].endpoint
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(endpoint)
        dealer.send(request())
        assert monitor.poll(20_000), "the node neither let it in nor threw it out"
        event = zmq.utils.monitor.parse_monitor_message(monitor.recv_multipart())["event"]
        assert event == zmq.EVENT_DISCONNECTED
        assert dealer.poll(0) == 0
        dealer.disable_monitor()
        monitor.close(0)
    status(live)


def test_a_client_that_expects_another_server_key_does_not_speak(live: Any) -> None:
    other = live.world.cluster.nodes["node2"]
    wrong = msgspec.structs.replace(live.world.cluster.nodes[NODE], curve_public=other.curve_public)
    with (
        Channel(live.identities["alice"].transport, {NODE: wrong}) as channel,
        pytest.raises((NodeUnavailable, AccessDenied)),
    ):
        ask(channel, NODE, "status", Empty(), 2)
    status(live)


def test_plain_bytes_on_the_port_do_no_harm(live: Any) -> None:
    host, _, port = live.world.cluster.nodes[NODE].endpoint.removeprefix("tcp://").partition(":")
    for payload in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"\xff" + bytes(8) + b"\x7f", b""):
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(payload)
    status(live)


# --- garbage ---


def mangled() -> dict[str, bytes]:
    good = request()
    assert good[:4] == b"\x96\x02\x01\xa6"
    return {
        "random bytes": os.urandom(300),
        "empty": b"",
        "trailing data": good + b"\x00",
        "cut": good[:-1],
        "non-minimal version": b"\x96\xcc\x01" + good[2:],
        "non-minimal id": b"\x96\x01\xcd\x00\x01" + good[3:],
        "non-minimal array": b"\xdc\x00\x06" + good[1:],
        "one field more": b"\x97" + good[1:] + b"\x00",
        "one field fewer": b"\x95" + good[1:-1],
        "a map": b"\x86" + good[1:],
        "invalid UTF-8": b"\x96\x01\x01\xa1\xff\xcd\x13\x88\xc4\x01\x90\x80",
        "deep nesting": b"\x91" * 60_000,
        "a huge array": b"\xdd\xff\xff\xff\xff",
        "a huge string": b"\x96\x01\x01\xdb\xff\xff\xff\xff",
        "a negative id": b"\x96\x01\xff" + good[3:],
        "no timeout": msgspec.msgpack.encode(Request(1, 1, "status", 0, STATUS_BODY, {})),
        "a timeout of years": msgspec.msgpack.encode(Request(1, 1, "status", 600_001, STATUS_BODY, {})),
        "a long verb": msgspec.msgpack.encode(Request(1, 1, "v" * 33, 1, STATUS_BODY, {})),
        "nine extensions": msgspec.msgpack.encode(Request(1, 1, "status", 1, b"", {str(i): b"" for i in range(9)})),
        "an extension of the wrong type": msgspec.msgpack.encode([1, 1, "status", 1, b"", {"a": 1}]),
        "version 0": request(version=0),
        "version 4": request(version=4),
    }


@pytest.mark.parametrize("what", mangled())
def test_garbage_is_refused_and_the_next_request_is_served(raw: zmq.Socket[bytes], what: str) -> None:
    raw.send(mangled()[what])
    number = 1 if what.startswith("version") else 0  # a request of another version is still one that can be read
    assert told(raw.recv())[:2] == (number, "protocol-error")
    raw.send(request(number=7))
    answer = reply_codec.decode(raw.recv())
    assert (answer.id, answer.status) == (7, 0)


def test_a_neighbouring_version_is_served(raw: zmq.Socket[bytes]) -> None:
    raw.send(request(version=2))
    assert reply_codec.decode(raw.recv()).status == 0


@pytest.mark.parametrize("frames", [2, 3, 50])
def test_too_many_frames_are_refused(raw: zmq.Socket[bytes], frames: int) -> None:
    raw.send_multipart([request()] * frames)
    number, code, message = told(raw.recv())
    assert (number, code) == (0, "protocol-error")
    assert f"this one {frames}" in message
    raw.send(request())
    assert reply_codec.decode(raw.recv()).status == 0


def test_a_message_of_the_limit_is_read_and_a_longer_one_cuts_the_connection(live: Any, raw: zmq.Socket[bytes]) -> None:
    raw.send(bytes(MAX_MESSAGE))
    assert told(raw.recv())[1] == "protocol-error"
    monitor = raw.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    raw.send(bytes(MAX_MESSAGE + CURVE_OVERHEAD + 1))
    assert monitor.poll(20_000), "an oversized message was read"
    assert raw.poll(0) == 0
    raw.disable_monitor()
    monitor.close(0)
    status(live)


@pytest.mark.parametrize("verb", ["nonsense", "share.released", "registry.commit", "table", "Status", "\u00fc"])
def test_an_unknown_verb_is_refused(raw: zmq.Socket[bytes], verb: str) -> None:
    raw.send(request(verb))
    number, code, message = told(raw.recv())
    assert (number, code) == (1, "protocol-error")
    assert "unknown verb" in message


@pytest.mark.parametrize("verb", sorted(BODIES))
def test_no_verb_takes_a_malformed_body(live: Any, verb: str) -> None:
    if verb.startswith("registry.") or verb == "table":
        return
    of_node = verb.startswith(("share.", "audit.")) and verb not in BACKUP_VERBS
    sender = "node2" if of_node else "balancer" if verb in BALANCER_VERBS else "alice"
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        connect_options(dealer, live.identities[sender].transport, live.world.cluster.nodes[NODE])
        dealer.rcvtimeo = 10_000
        dealer.connect(live.world.cluster.nodes[NODE].endpoint)
        for body in (b"", b"\xc0", b"\x91\xc0", b"\x90\x00", b"\xdc\x00\x00", os.urandom(40), b"\x9f" + bytes(15)):
            dealer.send(request(verb, body))
            number, code, _ = told(dealer.recv())
            assert (number, code) == (1, "protocol-error")


# --- members who overstep ---


@pytest.mark.parametrize("verb", ["share.prepare", "share.commit", "share.release", "share.destroy", "stats"])
@pytest.mark.parametrize("sender", ["alice", "bob"])
def test_a_client_may_send_no_verb_of_a_node_or_balancer(live: Any, sender: str, verb: str) -> None:
    with live.channel(sender) as channel, pytest.raises(AccessDenied, match=f"a client, may not send '{verb}'"):
        ask(channel, NODE, verb, a_body(verb), 10)


@pytest.mark.parametrize(
    "verb", ["encrypt", "sign", "mac", "generate", "import", "destroy", "list", "flush", "prewarm", "stats"]
)
def test_a_node_may_send_no_verb_of_a_client(live: Any, verb: str) -> None:
    with live.channel("node2") as channel, pytest.raises(AccessDenied, match=f"a node, may not send '{verb}'"):
        ask(channel, NODE, verb, a_body(verb), 10)


@pytest.mark.parametrize("verb", ["encrypt", "generate", "share.release", "share.prepare", "describe", "flush"])
def test_a_balancer_may_ask_for_no_key_and_no_share(live: Any, verb: str) -> None:
    with live.channel("balancer") as channel, pytest.raises(AccessDenied, match=f"a balancer, may not send '{verb}'"):
        ask(channel, NODE, verb, a_body(verb), 10)
    with live.channel("balancer") as channel:
        assert ask(channel, NODE, "stats", Empty(), 10).uptime_ms >= 0


def a_body(verb: str) -> Any:
    """A well-formed body of the verb."""
    operate = Operate("orders", b"", b"", b"", b"", False, b"")
    return {
        "generate": Create(b"", b""),
        "import": Create(b"", b""),
        "destroy": Destroy(b""),
        "share.destroy": Destroy(b""),
        "share.commit": ShareCommit(bytes(16), b""),
        "share.release": ShareRelease(bytes(16), b"", b""),
        "describe": Describe("orders", 0),
        "flush": Flush(""),
        "list": ListKeys("*", "", 1),
        "prewarm": Prewarm("orders", b"", b""),
        "stats": Empty(),
        "share.prepare": SharePrepare(b"", 1, bytes(33), bytes(32), []),
    }.get(verb, operate)


def test_a_client_without_rights_learns_and_does_nothing(live: Any) -> None:
    dealt = live.make_key(NODE)
    live.operate(NODE, dealt, "encrypt", b"x")  # warm now
    for verb in ("encrypt", "decrypt"):
        with pytest.raises(AccessDenied, match=f"'bob' may not {verb}"):
            live.operate(NODE, dealt, verb, b"x", client="bob", grant=False)
    with live.channel("bob") as channel:
        for verb, body in (
            ("status", Empty()),
            ("describe", Describe(dealt.manifest.name, 0)),
            ("describe", Describe("no-such-key", 0)),
            ("flush", Flush("")),
            ("flush", Flush(dealt.manifest.name)),
            ("prewarm", Prewarm(dealt.manifest.name, b"", b"")),
        ):
            with pytest.raises(AccessDenied):
                ask(channel, NODE, verb, body, 10)
        assert ask(channel, NODE, "list", ListKeys("*", "", 200), 10).entries == []
        order = live.world.destroy_order(dealt.key_id, dealt.manifest.name, client="bob")
        with pytest.raises(AccessDenied):
            ask(channel, NODE, "destroy", Destroy(order), 10)
    assert live.operate(NODE, dealt, "encrypt", b"x", grant=False)


def test_a_client_can_not_ride_on_anothers_order_or_grant(live: Any) -> None:
    dealt = live.make_key(NODE, name="shared/ride")
    grant = live.world.grant(dealt, NODE, "encrypt")  # alice's
    body = Operate(dealt.manifest.name, b"", b"x", b"", b"", False, grant)
    with live.channel("carol") as channel:
        with pytest.raises(NeedGrant, match="the grant is 'alice''s, not 'carol''s"):
            ask(channel, NODE, "encrypt", body, 10)
        order = live.world.order("shared/new", "aes-256-gcm", 1, 1)
        with pytest.raises(ValueError, match="the order is 'alice''s"):
            ask(channel, NODE, "generate", Create(order, b""), 10)


def test_one_request_may_not_flush_all_on_a_rule_for_some(live: Any) -> None:
    with live.channel("carol") as channel, pytest.raises(AccessDenied):
        ask(channel, NODE, "flush", Flush(""), 10)


# --- operations end to end on the node ---


def test_a_cold_key_needs_a_grant_and_a_warm_one_none(live: Any) -> None:
    key = os.urandom(32)
    dealt = live.make_key(NODE, key=key)
    with pytest.raises(NeedGrant, match="is not loaded"):
        live.operate(NODE, dealt, "encrypt", b"x", grant=False)
    sealed = live.operate(NODE, dealt, "encrypt", b"plain", b"aad")
    assert live.operate(NODE, dealt, "decrypt", sealed, b"aad", grant=False) == b"plain"
    header, nonce, rest = sealed[:7], sealed[7:19], sealed[19:]
    assert AESGCM(key).decrypt(nonce, rest, header + b"aad") == b"plain"
    with live.channel("alice") as channel:
        assert ask(channel, NODE, "flush", Flush(dealt.manifest.name), 10).dropped == 1
    with pytest.raises(NeedGrant):
        live.operate(NODE, dealt, "encrypt", b"x", grant=False)


def test_every_changed_byte_of_a_ciphertext_with_its_header_is_refused(live: Any) -> None:
    dealt = live.make_key(NODE)
    sealed = live.operate(NODE, dealt, "encrypt", b"p", b"aad")
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(InvalidTag):
            live.operate(NODE, dealt, "decrypt", bytes(changed), b"aad", grant=False)
    for wrong in (b"", sealed[:7], sealed[:-1], sealed + b"\0"):
        with pytest.raises(InvalidTag):
            live.operate(NODE, dealt, "decrypt", wrong, b"aad", grant=False)
    with pytest.raises(InvalidTag):
        live.operate(NODE, dealt, "decrypt", sealed, b"", grant=False)


@pytest.mark.parametrize("algorithm", ["hmac-sha256", "ecdsa-p256-sha256", "ed25519", "rsa-2048-pkcs1-sha256"])
def test_associated_data_is_never_silently_ignored(live: Any, algorithm: str) -> None:
    verb = "mac" if algorithm.startswith("hmac") else "sign"
    dealt = live.make_key(NODE, algorithm)
    proof = live.operate(NODE, dealt, verb, b"message")
    with pytest.raises(ValueError, match=f"{algorithm} takes no associated data"):
        live.operate(NODE, dealt, verb, b"message", b"tenant-7")
    check = "verify-mac" if verb == "mac" else "verify"
    live.operate(NODE, dealt, check, b"message", proof=proof)
    with pytest.raises(ValueError, match="takes no associated data"):
        live.operate(NODE, dealt, check, b"message", b"tenant-7", proof)
    with pytest.raises(InvalidSignature):
        live.operate(NODE, dealt, check, b"massage", proof=proof)


def test_an_operation_the_algorithm_lacks_and_data_beyond_the_limit_are_refused(live: Any) -> None:
    dealt = live.make_key(NODE)
    with pytest.raises(ValueError, match="sign is no operation of aes-256-gcm"):
        live.operate(NODE, dealt, "sign", b"x")
    with pytest.raises(ValueError, match=f"the limit of one request is {MAX_DATA}"):
        live.operate(NODE, dealt, "encrypt", bytes(MAX_DATA + 1))
    sealed = live.operate(NODE, dealt, "encrypt", bytes(MAX_DATA))
    assert live.operate(NODE, dealt, "decrypt", sealed) == bytes(MAX_DATA)


def test_another_incarnation_of_the_key_is_stale(live: Any) -> None:
    dealt = live.make_key(NODE)
    body = Operate(dealt.manifest.name, bytes(16), b"", b"", b"", False, b"")
    with live.channel("alice") as channel, pytest.raises(StaleKey):
        ask(channel, NODE, "encrypt", body, 10)
    with live.channel("alice") as channel, pytest.raises(EngineError) as caught:
        ask(channel, NODE, "encrypt", Operate("no-such-key", b"", b"", b"", b"", False, b""), 10)
    assert caught.type is KeyNotFound or caught.value.code == "moved"  # type: ignore[attr-defined]


def test_a_key_that_waits_for_its_commit_is_pending_until_it_is_known(live: Any) -> None:
    live.world.now_ms = time.time_ns() // 1_000_000
    dealt = live.world.deal("waits", holders=(NODE, "node2"), threshold=2, dealer="node5")
    use = Operate("waits", dealt.key_id, b"", b"", b"", False, b"")
    with live.channel("node5") as dealer, live.channel("alice") as channel:
        with pytest.raises(EngineError) as unknown:
            ask(channel, NODE, "describe", Describe("waits", 0), 10)
        receipt = ask(dealer, NODE, "share.prepare", dealt.offers[NODE], 10).receipt
        for verb, body in (("describe", Describe("waits", 0)), ("encrypt", use)):
            with pytest.raises(KeyPending, match=f"'waits' was made is not known yet on {NODE}"):
                ask(channel, NODE, verb, body, 10)
        with live.channel("bob") as other, pytest.raises(AccessDenied):
            ask(other, NODE, "describe", Describe("waits", 0), 10)
        certificate = live.world.certificate(dealt, given=[receipt, live.world.receipt(dealt, "node2")])
        ask(dealer, NODE, "share.commit", ShareCommit(dealt.key_id, certificate), 10)
        assert ask(channel, NODE, "describe", Describe("waits", 0), 10).certificate == certificate
    assert unknown.value.code in ("key-not-found", "moved")


def test_an_aborted_key_is_pending_no_more(live: Any) -> None:
    live.world.now_ms = time.time_ns() // 1_000_000
    dealt = live.world.deal("given-up", holders=(NODE, "node2"), threshold=2, dealer="node5")
    with live.channel("node5") as dealer, live.channel("alice") as channel:
        ask(dealer, NODE, "share.prepare", dealt.offers[NODE], 10)
        ask(dealer, NODE, "share.abort", Abort(live.world.abort(dealt.key_id)), 10)
        with pytest.raises(EngineError) as unknown:
            ask(channel, NODE, "describe", Describe("given-up", 0), 10)
    assert unknown.value.code in ("key-not-found", "moved")


def test_a_share_leaves_the_node_for_the_connection_of_the_grants_combiner_alone(live: Any) -> None:
    live.world.now_ms = time.time_ns() // 1_000_000
    dealt = live.world.deal("released", holders=(NODE, "node2"), threshold=2, dealer="node5")
    with live.channel("node5") as channel:
        receipt = ask(channel, NODE, "share.prepare", dealt.offers[NODE], 10).receipt
        certificate = live.world.certificate(dealt, given=[receipt, live.world.receipt(dealt, "node2")])
        ask(channel, NODE, "share.commit", ShareCommit(dealt.key_id, certificate), 10)
    grant = live.world.grant(dealt, "node2")
    answer = live.release(NODE, dealt, "node2", grant)
    assert (answer.x, answer.y, answer.salt) == (
        dealt.offers[NODE].x,
        dealt.offers[NODE].y,
        dealt.offers[NODE].salt,
    )
    with pytest.raises(AccessDenied, match="is for the combiner 'node2', 'node3' asks"):
        live.release(NODE, dealt, "node3", grant)
    with pytest.raises(AccessDenied, match="'bob' may not"):
        live.release(NODE, dealt, "node2", live.world.grant(dealt, "node2", client="bob"))
    with pytest.raises(ManifestError):
        live.release(NODE, dealt, "node2", live.world.grant(dealt, "node2", client="node2"))
    with pytest.raises(ProtocolError):
        live.release(NODE, dealt, "node2", b"")


# --- what it leaves behind ---


def records(live: Any) -> list[dict[str, Any]]:
    path = live.root / NODE / "data" / "audit" / "audit-000001.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_has_one_request_and_one_reply_record(live: Any) -> None:
    dealt = live.make_key(NODE, name="audited")
    live.operate(NODE, dealt, "encrypt", b"x")
    with pytest.raises(AccessDenied):
        live.operate(NODE, dealt, "encrypt", b"x", client="bob", grant=False)
    found = records(live)
    asked = [each["request"] for each in found if each["event"] == "request"]
    answered = [each["request"] for each in found if each["event"] == "reply"]
    assert len(asked) == len(set(asked)) > 0
    assert sorted(asked) == sorted(answered)
    assert {each["event"] for each in found} >= {"segment", "start", "head", "request", "reply"}
    mine = [(each["member"], each["verb"], each["outcome"]) for each in found if each.get("key") == "audited"]
    assert ("alice", "encrypt", "ok") in mine
    assert ("bob", "encrypt", "access-denied") in mine


def test_neither_log_nor_audit_has_key_or_share_or_data(live: Any) -> None:
    key, plain = os.urandom(32), os.urandom(24).hex().encode()
    dealt = live.make_key(NODE, key=key)
    sealed = live.operate(NODE, dealt, "encrypt", plain, b"aad-" + plain)
    for verb, data, aad in (("decrypt", sealed, b"aad-" + plain), ("decrypt", plain, plain), ("sign", plain, b"")):
        try:
            live.operate(NODE, dealt, verb, data, aad, grant=False)
        except (EngineError, ValueError):
            continue
    data = live.root / NODE / "data"
    files = [live.running[0].log_path, data / "audit" / "audit-000001.jsonl", *data.glob("shares.db*")]
    pin = (live.root / f"pin.{NODE}").read_bytes().strip()
    offer = dealt.offers[NODE]
    secrets = {"key": key, "share": offer.y, "salt": offer.salt, "plaintext": plain, "pin": pin}
    for file in files:
        content = file.read_bytes()
        for name, secret in secrets.items():
            assert secret not in content, (name, file)
            assert secret.hex().encode() not in content, (name, file)
    # The control: the scan reads the right files.
    assert dealt.record.raw in b"".join(file.read_bytes() for file in data.glob("shares.db*"))
    assert dealt.manifest.name.encode() in (data / "audit" / "audit-000001.jsonl").read_bytes()


def test_the_log_has_no_traceback(live: Any) -> None:
    assert "Traceback" not in live.running[0].log
    assert '"level": "error"' not in live.running[0].log


# --- the process itself ---


def test_core_dumps_are_off_in_the_running_node(live: Any) -> None:
    limits = Path(f"/proc/{live.running[0].pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert line.split()[4:6] == ["0", "0"]


def test_the_command_makes_its_process_undumpable_before_it_reads_a_pin(cluster_folder: Any) -> None:
    """In a process of its own: main() runs as the command does, then the kernel is asked (PR_GET_DUMPABLE = 3)."""
    script = """
import ctypes, os, resource, sys
from nodes.config import PinSource
import nodes.command as command
libc = ctypes.CDLL(None)
assert libc.prctl(3, 0, 0, 0, 0) == 1
def read(self):
    print("dumpable", libc.prctl(3, 0, 0, 0, 0), "core", resource.getrlimit(resource.RLIMIT_CORE), "umask", os.umask(0))
    return "pin"
PinSource.read = read
sys.argv = ["nodes", "--config", sys.argv[1], "--check-config"]
sys.exit(command.run())
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(cluster_folder.config(NODE))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("dumpable 0 core (0, 0) umask 63\n")
    assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1  # the test's own process is none of the node's business


def test_the_files_of_a_node_are_its_owners_alone(live: Any) -> None:
    status(live)
    data = live.root / NODE / "data"
    found = [data, *data.rglob("*")]
    assert any(path.name == "shares.db" for path in found)
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_its_keys_come_back(cluster_folder: Any, how: int) -> None:
    assert cluster_folder.init(NODE).returncode == 0
    node = cluster_folder.start(NODE)
    dealt = cluster_folder.make_key(NODE)
    sealed = cluster_folder.operate(NODE, dealt, "encrypt", b"kept")
    node.process.send_signal(how)
    assert node.process.wait(5) == 0
    assert "Traceback" not in node.log
    assert '"stopped"' in node.log
    cluster_folder.start(NODE)
    assert cluster_folder.operate(NODE, dealt, "decrypt", sealed) == b"kept"


def test_the_end_of_the_lifeline_ends_it(cluster_folder: Any) -> None:
    assert cluster_folder.init(NODE).returncode == 0
    node = cluster_folder.start(NODE)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.dup2(spare, node.lifeline)  # closes the pipe's only writer; the number stays valid for the clean-up
    os.close(spare)
    assert node.process.wait(20) == 0


def test_a_kill_loses_nothing_that_was_acknowledged(cluster_folder: Any) -> None:
    assert cluster_folder.init(NODE).returncode == 0
    node = cluster_folder.start(NODE)
    dealt = [cluster_folder.make_key(NODE) for _ in range(5)]
    sealed = [cluster_folder.operate(NODE, each, "encrypt", b"kept") for each in dealt]
    node.process.kill()
    node.process.wait(20)
    cluster_folder.start(NODE)
    for each, ciphertext in zip(dealt, sealed, strict=True):
        assert cluster_folder.operate(NODE, each, "decrypt", ciphertext) == b"kept"


def test_no_older_and_no_forged_manifest_is_started_with(cluster_folder: Any) -> None:
    """What a thief can lay in a node's way: the manifest before, one of its own, another cluster's."""
    world, place = cluster_folder.world, cluster_folder.root / "cluster.manifest"
    first = world.chain

    def issued(chain: bytes, signer: Any = None, **changes: Any) -> bytes:
        told = {"name": "test", "members": world.members, "rules": RULES, "chain": chain, **changes}
        return issue_cluster_manifest(operators=[signer or world.keys["op"]], **told)

    second = issued(first)
    third = issued(second)
    stolen = sign_key_of(world.keys["node2"], "op")
    bad = {
        "serial 1; 'node1' has served under 2 already": first,
        "the signature of 'op' is wrong": issued(second, stolen, rules=[PolicyRule("*", "*", ["*"])]),
        "'node2' may not sign this": issued(second, world.keys["node2"]),
        "the first one has hash": issued(b"", groups=512),
        "serial 3 does not follow 1": joined(first, third),
        "does not follow 2": joined(second, issued(issued(first, rules=[]))),
        "cluster manifest file": second[:-1],
    }
    assert cluster_folder.init(NODE).returncode == 0
    place.write_bytes(second)
    node = cluster_folder.start(NODE)
    node.process.kill()
    node.process.wait(20)
    for reason, chain in bad.items():
        place.write_bytes(chain)
        refused = cluster_folder.spawn(NODE)
        assert refused.process.wait(60) != 0, reason
        assert reason in refused.log, refused.log
        assert '"serving"' not in refused.log
        assert "Traceback" not in refused.log
    place.write_bytes(third)
    cluster_folder.start(NODE)
    with cluster_folder.channel("alice") as channel:
        assert ask(channel, NODE, "status", Empty(), 10).cluster_serial == 3


def sign_key_of(key: SigningKey, name: str) -> SigningKey:
    """That key under another's name."""
    return SigningKey(name, key._private)


def joined(chain: bytes, other: bytes) -> bytes:
    """The chain with the last manifest of another one at its end."""
    (envelopes,), (others,) = msgspec.msgpack.decode(chain), msgspec.msgpack.decode(other)
    return msgspec.msgpack.encode([[*envelopes, others[-1]]])
