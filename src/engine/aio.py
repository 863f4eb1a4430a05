"""``import engine.aio``: the asynchronous client, which lives in ``engine.client.aio``."""

from engine.client.aio import AsyncEngine, connect

__all__ = ["AsyncEngine", "connect"]
