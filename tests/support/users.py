"""Users of a key who must notice nothing of what is done with it meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import engine
from engine import Engine, LocalCluster

__all__ = ["users_of"]


@contextlib.contextmanager
def users_of(cluster: LocalCluster, kq: Engine, name: str, timeout_s: float) -> Iterator[None]:
    """Warm and cold uses beside the block, from two clients: not one error, not one wrong result."""
    before = kq.encrypt(name, b"from before")
    over = threading.Event()

    def use(client: Engine) -> int:
        for number in count():
            if over.is_set():
                return number
            if number % 3 == 0:
                client.flush(name)
            assert client.decrypt(name, before, timeout=timeout_s) == b"from before"
            assert client.decrypt(name, client.encrypt(name, b"x", timeout=timeout_s), timeout=timeout_s) == b"x"
        return 0

    with engine.connect(cluster.client_config) as other, ThreadPoolExecutor(2) as pool:
        users = [pool.submit(use, client) for client in (kq, other)]
        try:
            yield
        finally:
            over.set()
        assert all(user.result() > 10 for user in users)
