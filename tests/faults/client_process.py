"""A client in a process of its own, which can be killed or given another clock; what it was told comes as JSON lines.

As a script it is that client: ``client_process.py CLIENT.TOML PREFIX SEED``, until it is ended.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "shim"))

from history import UNFINISHED, Event, History, Key
from workload import ALGORITHMS, Workload

import engine

STARTED_S = 20.0
MAX_OPERATIONS = 100_000


class ClientProcess:
    """Starts such a client and reads what it tells; it is killed at the latest on leaving the context."""

    def __init__(self, config: Path, prefix: str, seed: int, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, str(Path(__file__)), str(config), prefix, str(seed)]
        self.events: list[Event] = []
        self.keys: dict[str, Key] = {}
        self._begun: dict[int, dict[str, Any]] = {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={**os.environ, **(environment or {})}
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        if "begun" in told:
            self._begun[told["begun"]] = told
        elif "ended" in told:
            self._begun.pop(told.pop("ended"), None)
            self.events.append(Event(**{name: _bytes(value) for name, value in told.items()}))
        elif "key" in told:
            fields = {name: _bytes(value) for name, value in told["key"].items()}
            for name in ("ciphertexts", "signatures", "macs"):
                fields[name] = [(_bytes(sent), _bytes(got)) for sent, got in told["key"][name]]
            self.keys[fields["name"]] = Key(**fields)

    def await_events(self, count: int) -> None:
        """Wait until it has done something."""
        until = time.monotonic() + STARTED_S
        while len(self.events) < count and self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, and read what it had written before."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)
        self._reader.join(10)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def take_over(self, workload: Workload) -> None:
        """Give its keys and its history to another workload, to be checked; it must be dead.

        What was begun and never answered is unfinished: a creation may have happened or not.
        """
        for told in self._begun.values():
            now_s = time.monotonic()
            workload.history.add(Event(told["verb"], told["name"], now_s, now_s, UNFINISHED))
            if told["verb"] in ("create", "import"):
                self.keys.setdefault(told["name"], Key(told["name"], told["algorithm"], _bytes(told["material"])))
            elif told["verb"] == "destroy" and told["name"] in self.keys:
                self.keys[told["name"]].doomed_s = now_s
        for event in self.events:
            workload.history.add(event)
        workload.keys.update(self.keys)


def _bytes(value: Any) -> Any:
    return base64.b64decode(value[4:]) if isinstance(value, str) and value.startswith("b64:") else value


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return "b64:" + base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_text(each) for each in value]
    return value


class _Told(Workload):
    """A workload that tells of each call before it is made and after it has ended, one JSON line each."""

    def tell(self, **told: Any) -> None:
        line = json.dumps({name: _text(value) for name, value in told.items()}) + "\n"
        os.write(1, line.encode())

    def call(self, verb: str, key: str, action: Callable[[], Any], **sent: Any) -> Any:
        number = len(self.history)
        known = self.keys[key]
        self.tell(begun=number, verb=verb, name=key, algorithm=known.algorithm, material=known.material)
        result = super().call(verb, key, action, **sent)
        self.tell(ended=number, **asdict(replace(self.history.events[-1])))
        return result

    def tell_key(self, key: Key) -> None:
        self.tell(key={name: _text(value) for name, value in asdict(key).items()})


def main(arguments: list[str]) -> None:
    """Be a client: make keys and use them, one call after the other, until killed."""
    config, prefix, seed = arguments
    rng = random.Random(int(seed))
    with engine.connect(config) as kq:
        workload = _Told(kq, int(seed), prefix, history=History())
        for number in range(MAX_OPERATIONS):
            alive = workload.living()
            if len(alive) < 6 and number % 3 == 0:
                key = workload.make(rng.choice(ALGORITHMS), rng, timeout_s=5.0)
            elif len(alive) >= 4 and rng.random() < 0.1:
                key = rng.choice(alive)
                workload.destroy(key)
            elif alive:
                key = rng.choice(alive)
                workload.use(key, rng, timeout_s=2.0)
            else:
                continue
            workload.tell_key(key)


if __name__ == "__main__":
    main(sys.argv[1:])
