"""Clients beside a fault: threads that make, use, refresh and destroy keys and write it down, and the check after.

It uses the public API alone, so that the engine under it can be a wrong one.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from history import Event, History, Key

import engine

ALGORITHMS = ("aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256", "ed25519")
DATA_THREADS = 2
PAUSE_S = 0.004
"""Between two operations of a thread: the point is faults, not load."""
TIMEOUT_S = 5.0
CREATE_TIMEOUT_S = 15.0
JOIN_S = 40.0
SLICES = 0.15
"""Between two things that the thread does which makes, refreshes and destroys keys."""
KEPT = 12
"""Live keys beyond this many are destroyed rather than made."""
PROOFS = 6
"""Ciphertexts, signatures and MACs kept of each key, for the check."""
PATIENCE_S = 20.0
"""How long the check goes on asking for a key before it counts as lost, or a destroyed one for undead."""


class Workload:
    """Keys under ``prefix`` and the clients that use them. ``keys`` may have some that were made before."""

    def __init__(
        self,
        kq: engine.Engine,
        seed: int,
        prefix: str,
        keys: Iterable[Key] = (),
        history: History | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.kq = kq
        self.prefix = prefix
        self.keys: dict[str, Key] = {key.name: key for key in keys}
        self.history = history if history is not None else History()
        self._seed = seed
        self.patience_s = patience_s
        self._number = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.crashes: list[str] = []
        """Exceptions that no caller may ever see."""
        self._threads: list[threading.Thread] = []
        self.used_until_s = 0.0
        for key in self.keys.values():
            self._know(key)

    def _know(self, key: Key) -> None:
        """Write down what is known of a key that was made before."""
        now_s = time.monotonic()
        told = [Event("public-key", key.name, now_s, now_s, got=key.public_key)]
        told += [Event("encrypt", key.name, now_s, now_s, sent=sent, got=got) for sent, got in key.ciphertexts]
        told += [Event("mac", key.name, now_s, now_s, sent=sent, got=got) for sent, got in key.macs]
        for event in told:
            self.history.add(event)

    # --- calls, each written down ---

    def call(
        self,
        verb: str,
        key: str,
        action: Callable[[], Any],
        *,
        sent: bytes = b"",
        proof: bytes = b"",
        after: bool = False,
    ) -> Any:
        """What the action gives, or None after an error; either is an event."""
        begun_s, got, error, message = time.monotonic(), None, "", ""
        try:
            got = action()
        except engine.EngineError as failure:
            error, message = failure.code, str(failure)
        except ValueError as failure:  # ours to avoid: so it is never expected
            error, message = "invalid-request", str(failure)
        told = got if isinstance(got, bytes) else got.encode() if isinstance(got, str) else b""
        self.history.add(Event(verb, key, begun_s, time.monotonic(), error, message, sent, proof, told, after))
        return None if error else (got if got is not None else True)

    def make(self, algorithm: str, rng: random.Random, *, timeout_s: float = CREATE_TIMEOUT_S) -> Key:
        """Create a key, or import one whose MACs can then be computed elsewhere."""
        with self._lock:
            self._number += 1
            name = f"{self.prefix}/{self._number}"
            imported = algorithm.startswith("hmac") and rng.random() < 0.7
            key = Key(name, algorithm, rng.randbytes(32) if imported else b"")
            self.keys[name] = key

        def create() -> str:
            if imported:
                made = self.kq.import_key(
                    name, algorithm, key_material=key.material, threshold=3, shares=5, timeout=timeout_s
                )
            else:
                made = self.kq.create_key(name, algorithm, threshold=3, shares=5, timeout=timeout_s)
            return made.public_key

        told = self.call("import" if imported else "create", name, create, sent=key.material)
        if told is not None:
            key.public_key = told.encode() if isinstance(told, str) else b""
            key.made = True
        return key

    def destroy(self, key: Key) -> None:
        key.doomed_s = time.monotonic()
        if self.call("destroy", key.name, lambda: self.kq.destroy_key(key.name, timeout=CREATE_TIMEOUT_S) and None):
            key.destroyed_s = time.monotonic()

    def refresh(self, key: Key) -> None:
        self.call("refresh", key.name, lambda: self.kq.refresh_key(key.name, timeout=CREATE_TIMEOUT_S) and None)

    def reshare(self, key: Key, rng: random.Random) -> None:
        """Give it to four of the five nodes, and then to all of them again."""
        nodes = list(self.kq.cluster.nodes)
        for holders in (rng.sample(nodes, 4), nodes):

            def move(holders: list[str] = holders) -> None:
                self.kq.reshare_key(key.name, holders=holders, timeout=CREATE_TIMEOUT_S)

            self.call("reshare", key.name, move)

    def use(self, key: Key, rng: random.Random, *, after: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        """One use of a key of any kind that it can, on fresh data or on what it made before."""
        name, kq = key.name, self.kq
        if key.algorithm.startswith("aes"):
            if key.ciphertexts and rng.random() < 0.5:
                _, ciphertext = rng.choice(key.ciphertexts)
                self.call(
                    "decrypt",
                    name,
                    lambda: kq.decrypt(name, ciphertext, timeout=timeout_s),
                    sent=ciphertext,
                    after=after,
                )
            else:
                plaintext = rng.randbytes(rng.choice((1, 16, 200)))
                got = self.call(
                    "encrypt", name, lambda: kq.encrypt(name, plaintext, timeout=timeout_s), sent=plaintext, after=after
                )
                _keep(key.ciphertexts, plaintext, got, rng)
        elif key.algorithm.startswith("hmac"):
            if key.macs and rng.random() < 0.3:
                message, tag = rng.choice(key.macs)
                self.call(
                    "verify-mac",
                    name,
                    lambda: kq.verify_mac(name, message, tag, timeout=timeout_s),
                    sent=message,
                    proof=tag,
                    after=after,
                )
            else:
                message = rng.choice(key.macs)[0] if key.macs and rng.random() < 0.5 else rng.randbytes(16)
                got = self.call(
                    "mac", name, lambda: kq.mac(name, message, timeout=timeout_s), sent=message, after=after
                )
                _keep(key.macs, message, got, rng)
        elif key.signatures and rng.random() < 0.4:
            message, signature = rng.choice(key.signatures)
            forged = rng.random() < 0.3
            self.call(
                "verify-forged" if forged else "verify",
                name,
                lambda: kq.verify(name, message + b"!" if forged else message, signature, timeout=timeout_s),
                sent=message,
                proof=signature,
                after=after,
            )
        else:
            message = rng.randbytes(24)
            got = self.call("sign", name, lambda: kq.sign(name, message, timeout=timeout_s), sent=message, after=after)
            _keep(key.signatures, message, got, rng)

    # --- the threads ---

    def prepare(self, rng: random.Random) -> None:
        """A key of each algorithm with something made by it, and one destroyed."""
        for algorithm in ALGORITHMS:
            key = self.make(algorithm, rng)
            for _ in range(2):
                self.use(key, rng)
        self.destroy(self.make("aes-256-gcm", rng))

    def start(self) -> None:
        """Let the clients begin."""
        works = [*([self._use_keys] * DATA_THREADS), self._keep_keys]
        for number, work in enumerate(works):
            rng = random.Random(self._seed * 101 + number)
            thread = threading.Thread(
                target=self._until_stopped, args=(work, rng), name=f"client-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def stop(self) -> bool:
        """End the clients; whether all of them ended in time. ``used_until_s`` is when the last use of a key ended."""
        self._stop.set()
        until = time.monotonic() + JOIN_S
        for number, thread in enumerate(self._threads):
            thread.join(max(0.0, until - time.monotonic()))
            if number < DATA_THREADS:
                self.used_until_s = time.monotonic()
        return not any(thread.is_alive() for thread in self._threads)

    def _until_stopped(self, work: Callable[[random.Random], None], rng: random.Random) -> None:
        while not self._stop.is_set():
            try:
                work(rng)
            except Exception as error:  # no error of the product's: a client fell over
                self.crashes.append(f"{type(error).__name__}: {error}")
            self._stop.wait(PAUSE_S)

    def living(self, own: bool = False) -> list[Key]:
        with self._lock:
            return [key for key in self.keys.values() if key.alive and (not own or key.name.startswith(self.prefix))]

    def _use_keys(self, rng: random.Random) -> None:
        alive = self.living()
        if not alive:
            return
        key = rng.choice(alive)
        if rng.random() < 0.08:
            self.call("flush", key.name, lambda: self.kq.flush(key.name, timeout=0.5))
        self.use(key, rng)

    def _keep_keys(self, rng: random.Random) -> None:
        own = self.living(own=True)
        choice = rng.random()
        if len(own) > KEPT or (choice < 0.2 and len(own) > len(ALGORITHMS)):
            self.destroy(rng.choice(own))
        elif choice < 0.4 and own:
            self.refresh(rng.choice(own))
        else:
            self.make(rng.choice(ALGORITHMS), rng)
        self._stop.wait(SLICES)

    # --- the check after healing ---

    def check(self, rng: random.Random) -> None:
        """Use every key cold: all that was made by it is still right, the destroyed ones are gone."""
        self.patiently(lambda: self.kq.flush(timeout=2.0))
        until = time.monotonic() + self.patience_s
        for key in list(self.keys.values()):
            self._check_key(key, rng, until)

    def _check_key(self, key: Key, rng: random.Random, until: float) -> None:
        """Once more from the start while the outcome is not the final one: nodes may be learning of it."""
        while True:
            mark = len(self.history)
            self._look(key, rng)
            seen = self.history.since(mark)
            gone = all(event.error == "key-not-found" for event in seen)
            whole = not any(event.error for event in seen)
            done = (
                gone if key.destroyed_s is not None else whole if key.made and key.doomed_s is None else gone or whole
            )
            wrong = any(event.error in ("invalid-tag", "invalid-signature") for event in seen)
            if done or wrong or time.monotonic() >= until:
                return
            with self.history._lock:
                del self.history.events[mark:]
            time.sleep(0.1)

    def _look(self, key: Key, rng: random.Random) -> None:
        name, kq = key.name, self.kq

        def public() -> bytes:
            return kq.key_info(name, timeout=TIMEOUT_S).public_key.encode()

        if self.call("public-key", name, public, after=True) is None:
            return
        for plaintext, ciphertext in key.ciphertexts:
            del plaintext
            self.call("decrypt", name, lambda c=ciphertext: kq.decrypt(name, c), sent=ciphertext, after=True)
        for message, tag in key.macs:
            self.call("mac", name, lambda m=message: kq.mac(name, m), sent=message, after=True)
            self.call(
                "verify-mac",
                name,
                lambda m=message, t=tag: kq.verify_mac(name, m, t),
                sent=message,
                proof=tag,
                after=True,
            )
        for message, signature in key.signatures[:2]:
            self.call(
                "verify",
                name,
                lambda m=message, s=signature: kq.verify(name, m, s),
                sent=message,
                proof=signature,
                after=True,
            )
        self.use(key, rng, after=True)

    def patiently(self, action: Callable[[], Any]) -> Any:
        """The action's result, asked for again while it fails."""
        until = time.monotonic() + self.patience_s
        while True:
            try:
                return action()
            except engine.EngineError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.1)

    def clear(self) -> None:
        """Destroy what this workload made, so that the next one begins with few keys."""
        for key in self.living(own=True):
            self.patiently(lambda name=key.name: _destroyed(self.kq, name))


def _destroyed(kq: engine.Engine, name: str) -> None:
    try:
        kq.destroy_key(name)
    except engine.KeyNotFound:
        return


def _keep(kept: list[tuple[bytes, bytes]], sent: bytes, got: object, rng: random.Random) -> None:
    """Remember what was made, up to a bound; then it takes the place of an older one."""
    if not isinstance(got, bytes):
        return
    if len(kept) < PROOFS:
        kept.append((sent, got))
    else:
        kept[rng.randrange(PROOFS)] = (sent, got)


def unique_prefix(name: str, seed: int) -> str:
    """A prefix that no other run on the same cluster has."""
    return f"{name}/{seed}/{os.urandom(3).hex()}"
