"""The serving end of connections that speak ZMTP 3.1 with CURVE (RFC 37, RFC 26), in the thread of its owner.

It presents itself as a ROUTER, to DEALERs, for messages of one frame. Who it is that sent a message is known by the
CURVE key that its connection has proved, and nothing else. What a peer can make it keep is bounded: one message that is
not whole, ``replies_max`` replies, no more connections than ``most``. Bytes that break a rule end their connection.
"""

from collections.abc import Callable
from typing import NoReturn, final

@final
class Connection:
    """One accepted connection."""

    member: str
    """Whose it is, once a request of it was heard; the owner's to set."""
    def __init__(self, *args: object) -> NoReturn: ...
    @property
    def fd(self) -> int: ...
    @property
    def place(self) -> int:
        """The number of the place where it came in."""

    @property
    def since_s(self) -> float:
        """When it was accepted (monotonic seconds)."""

    @property
    def user(self) -> str:
        """The CURVE key that it has proved, in Z85; empty before."""

    @property
    def open(self) -> bool: ...
    @property
    def proved(self) -> bool:
        """Whether the peer has proved a member's key."""

    @property
    def network_us(self) -> int:
        """The least time of late in microseconds that the network took to the peer and back (tcpi_min_rtt); 0 if not
        known."""

    @property
    def held(self) -> int:
        """Bytes that it has in memory: a message that is not whole, and replies that were not taken."""

@final
class Router:
    """``admit`` is asked about each CURVE key (Z85) that was proved; ``limit`` bounds frames, with CURVE's 33 bytes."""

    most: int
    """From so many connections on none is accepted, until ``accept``."""
    gone: Callable[[Connection], None] | None
    """Told each connection that ended."""
    def __new__(cls, admit: Callable[[str], bool], *, limit: int, replies_max: int) -> Router: ...
    def __len__(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def replies_max(self) -> int:
        """Replies that wait for a peer; more are lost."""

    @property
    def accepting(self) -> bool: ...
    @property
    def failed(self) -> int:
        """How often there was no descriptor for a connection; none is accepted then, until ``accept``."""

    @property
    def connections(self) -> list[Connection]:
        """Those that are open, in no order."""

    @property
    def pending(self) -> bool:
        """Whether something was taken in that ``receive`` has not looked at."""

    def fileno(self) -> int:
        """Readable while there is something to do (epoll(7)), beside what is ``pending``."""

    def listen(self, fd: int, number: int, public: bytes, secret: bytes) -> None:
        """Accept connections at a listening descriptor, the router's from now on, with a CURVE pair of raw keys.

        Its connections have the number of the place, which its owner chooses.

        ValueError if those have not 32 bytes each.
        """

    def leave(self, fd: int) -> None:
        """Close a listening descriptor. Connections that came in there stay."""

    def accept(self, wanted: bool) -> None:
        """Accept connections, or leave those that come in the kernel's queue."""

    def watch(self, fd: int, bit: int) -> None:
        """Have ``poll`` tell of another descriptor that is readable by that bit (2, 4, 8 ...)."""

    def unwatch(self, fd: int) -> None:
        """Tell of it no more."""

    def end(self, connection: Connection) -> None:
        """Close a connection."""

    def expire(self, before_s: float) -> int:
        """End the connections that came before that (monotonic) and have not proved a key yet; how many."""

    def poll(self, timeout_ms: int) -> int:
        """Wait until there is something to do, which is 1 for connections, and the bits of watched descriptors."""

    def receive(self) -> tuple[Connection, bytes, int] | None:
        """The next message, without waiting: its connection, its content, and how many frames it had.

        One of several frames has no content.
        """

    def send(self, connection: Connection, data: bytes, *, more: bool = False) -> bool:
        """Send a message, or one of its frames with ``more`` to come, which no client here takes.

        False if its peer went away, or does not take what waits for it.
        """

    def close(self) -> None:
        """End every connection and close every listening descriptor."""
