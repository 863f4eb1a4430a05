"""A client in a process of its own, of whichever release its environment names: it uses keys until it is to end.

As a script: ``upgrade_user.py CLIENT.TOML PREFIX``. It writes a line once it has used every key, goes on until its
stdin ends, and then tells as JSON what it did. It needs nothing but the package ``engine``, of any release.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import engine
import engine.aio

DEADLINE_S = 5.0
STARTED_S = 60.0
KINDS = {"seal": "aes-256-gcm", "sign": "ecdsa-p256-sha256", "mac": "hmac-sha256"}
MOST_ERRORS = 20
PAUSE_S = 0.01
"""Between uses: the processes that are to come up in the meantime need processors too."""


class UpgradeUser:
    """Starts such a client; it is killed at the latest on leaving the context."""

    def __init__(self, config: Path, prefix: str, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-P", str(Path(__file__)), str(config), prefix]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert self._process.stdout is not None
        self.file = self._process.stdout.readline().strip()
        """Where the ``engine`` is that it uses; empty if it ended before it had used every key."""

    def __enter__(self) -> UpgradeUser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def finish(self) -> dict[str, Any]:
        """End it in order: how often it did what, the errors it saw, and what came out wrong."""
        told, _ = self._process.communicate(timeout=STARTED_S)
        assert self._process.returncode == 0
        found: dict[str, Any] = json.loads(told)
        return found


class _Work:
    def __init__(self, config: str, prefix: str) -> None:
        self.config, self.prefix = config, prefix
        self.over = threading.Event()
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def did(self, what: str, right: bool) -> None:
        with self._lock:
            self.done[what] += 1
            if not right:
                self.failed(what, "a wrong result")

    def failed(self, what: str, error: object) -> None:
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(f"{what}: {type(error).__name__}: {error}")

    def use(self, kq: engine.Engine, number: int) -> None:
        """Each verb once; a cold key now and then."""
        seal, sign, mac = (self.prefix + kind for kind in KINDS)
        data = f"{number}".encode()
        sealed = kq.encrypt(seal, data, timeout=DEADLINE_S)
        self.did("decrypt", kq.decrypt(seal, sealed, timeout=DEADLINE_S) == data)
        signature = kq.sign(sign, data, timeout=DEADLINE_S)
        kq.verify(sign, data, signature, timeout=DEADLINE_S)
        self.did("sign", True)
        kq.verify_mac(mac, data, kq.mac(mac, data, timeout=DEADLINE_S), timeout=DEADLINE_S)
        self.did("mac", True)
        if number % 50 == 0:
            kq.encrypt_many(seal, [data] * 20, timeout=DEADLINE_S)
            self.did("many", True)

    def blocking(self) -> None:
        with engine.connect(self.config) as kq:
            number = 0
            while not self.over.is_set():
                number += 1
                try:
                    self.use(kq, number)
                except engine.EngineError as error:
                    self.failed("use", error)
                if number % 40 == 0:
                    self.ask(kq)
                self.over.wait(PAUSE_S)

    def ask(self, kq: engine.Engine) -> None:
        """Every member's status: one may be away, but none may be misunderstood."""
        for member in kq.status(timeout=DEADLINE_S):
            self.did(f"status of {'nothing' if member.status is None else type(member.status).__name__}", True)
            if isinstance(member.error, engine.ProtocolError):
                self.failed("status", member.error)

    def concurrent(self) -> None:
        asyncio.run(self._concurrent())

    async def _concurrent(self) -> None:
        seal = f"{self.prefix}seal"
        async with engine.aio.connect(self.config) as kq:
            while not self.over.is_set():
                try:
                    sealed = await kq.encrypt(seal, b"x", timeout=DEADLINE_S)
                    self.did("asynchronous", await kq.decrypt(seal, sealed, timeout=DEADLINE_S) == b"x")
                except engine.EngineError as error:
                    self.failed("asynchronous use", error)
                await asyncio.sleep(PAUSE_S)


def _main(config: str, prefix: str) -> None:
    work = _Work(config, prefix)
    ways: tuple[Callable[[], None], ...] = (work.blocking, work.blocking, work.concurrent)
    threads = [threading.Thread(target=way, daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    until = time.monotonic() + STARTED_S
    while not all(work.done[what] for what in ("decrypt", "sign", "mac", "asynchronous")):
        if time.monotonic() > until:
            raise SystemExit(f"it did not begin: {work.errors}")
        time.sleep(0.01)
    sys.stdout.write(f"{engine.__file__}\n")
    sys.stdout.flush()
    sys.stdin.read()
    work.over.set()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps({"done": work.done, "errors": work.errors}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
