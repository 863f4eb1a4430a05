"""ZMTP 3.1 with CURVE in memory: what connections speak, for tests and tools. libsodium does the arithmetic."""

from typing import Any, final

__pyx_capi__: dict[str, Any]

@final
class Peer:
    """One end of a connection: the client's with the ``server_public`` it expects, else the server's.

    Keys have 32 bytes (ValueError). ``limit`` bounds the body of a message's frame, CURVE's share of 33 bytes included.
    """

    limit: int
    def __new__(
        cls, *, own_public: bytes, own_secret: bytes, server_public: bytes | None = None, limit: int = 65600
    ) -> Peer: ...
    @property
    def judged(self) -> bool:
        """Whether the peer has proved its key, and waits for ``judge``."""

    @property
    def open(self) -> bool:
        """Whether messages go both ways."""

    @property
    def ended(self) -> bool:
        """Whether the connection is to be closed: the peer broke a rule, or was refused."""

    @property
    def refused(self) -> bool:
        """Whether the server does not take this key."""

    @property
    def peer_public(self) -> bytes:
        """The client's long-term key, once it is proved."""

    def judge(self, welcome: bool) -> None:
        """Let the peer in, or tell it that its key is refused; ValueError if nobody waits for that."""

    def take(self) -> bytes:
        """What is to be sent, once."""

    def send(self, content: bytes, flags: int = 0) -> None:
        """Have a frame of a message sent; flags: 1, more follow; 2, it is a command. ValueError if it is not open."""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take in what came: the frames of messages in it, as (flags, content)."""
