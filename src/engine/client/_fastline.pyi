"""The shortest way of a use of a key, at the client's end: asked of a node that has the key loaded, in one C call.

A line knows what a use looks like on the wire (``fastwire.h``, ``zmtp.h``) and nothing of keys, nodes or policies.
``Shortcuts`` has what is the same at each use of a key, and holds on to the router's choice of a node for 20 ms.
Whatever is not the plain answer is handed to the ordinary way, which goes on from there.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

from engine.client.calls import Lost
from engine.client.config import CurveIdentity, CurveSource
from engine.protocol.manifest import ClusterSource, Member

DONE: int
"""The reply came: ``data``, ``queue``, ``service_us`` and ``loaded`` are its."""
NOT_SENT: int
"""The connection is down; nothing was sent."""
LATE: int
"""No reply came in the time given. A later one is passed over."""
OTHER: int
"""``frame`` arrived, which is no plain result of this request: the channel looks at it, and ``resume`` goes on."""
BROKEN: int
"""The connection broke after it was sent."""

@final
class Line:
    """A connected TCP socket, which is the line's from now on; one thread at a time. ``limit`` bounds a frame.

    ``version`` is the protocol version that is spoken; an answer in another one ends in ``OTHER``.
    """

    data: bytes | None
    frame: bytes | None
    queue: int
    service_us: int
    loaded: bool
    elapsed_s: float
    version: int
    def __new__(cls, fd: int, *, limit: int, version: int) -> Line: ...
    def shake(self, own_public: bytes, own_secret: bytes, server_public: bytes, timeout_s: float) -> bool:
        """The CURVE handshake with raw keys; whether the peer proved its key and let this one in, in time.

        ValueError if a key has not 32 bytes.
        """

    def close(self) -> None: ...
    def interrupt(self) -> None:
        """End the connection under the thread that uses it, which is told that it broke."""

    @property
    def open(self) -> bool:
        """Whether uses can be asked for."""

    @property
    def spins(self) -> bool:
        """Whether requests spin at present."""

    def ask(self, content: bytes, patience_s: float) -> bytes | None:
        """Send a message and wait ``patience_s`` seconds for the next one that comes; where none does, it is closed.

        For what comes before any use: a request and its answer.
        """

    def operate(
        self,
        number: int,
        verb: bytes,
        key: bytes,
        key_id: bytes,
        data: bytes,
        associated_data: bytes,
        proof: bytes,
        digested: bool,
        timeout_ms: int,
        patience_s: float,
    ) -> int:
        """Send a use of a key under the id ``number`` and wait ``patience_s`` seconds for its result; one of the codes.

        ``timeout_ms`` is what the node is told. ``ValueError`` if it is longer than a message may be.
        """

    def resume(self) -> int:
        """Wait on for the request that ended in ``OTHER``."""

@final
class Shortcuts:
    """Safe for several threads; each use has a line of its own meanwhile, of ``most`` at the most.

    ``calls`` are the client's ``Calls``; ``open_line`` connects to a member, or gives None.
    """

    open_line: Callable[[CurveIdentity, Member], Line | None]
    def __new__(
        cls,
        calls: Any,
        source: ClusterSource,
        identity: CurveSource,
        members: Mapping[str, Member],
        open_line: Callable[[CurveIdentity, Member], Line | None],
        *,
        most: int,
        max_ciphertext: int,
    ) -> Shortcuts: ...
    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that it was made in."""

    def use(
        self,
        verb: str,
        name: object,
        data: object,
        associated_data: object,
        proof: object,
        digest: object,
        timeout_s: float,
        lost: Lost,
    ) -> bytes | None:
        """The result of a use, or None where the ordinary way has to be taken, which also says what is wrong.

        A node that was asked and did not answer is put into ``lost``, with the time that took. What is final, such as a
        wrong tag, is raised.
        """

    def use_many(
        self, verb: str, name: object, uses: list[tuple[Any, Any, Any]], timeout_s: float, stop: bool
    ) -> list[bytes | Exception | None]:
        """The results of many uses (data, associated data, proof), up to 64 of them under way at once.

        A final error takes the place of its result, and with ``stop`` none is begun after one. None stands for what has
        to take the ordinary way.
        """

    def reap(self, before_s: float) -> None:
        """Close the lines that were last used before that (monotonic seconds)."""

    def close(self) -> None:
        """Close every line; who uses one is told that it broke."""
