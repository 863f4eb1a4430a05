"""The shortest way through a node: a request for a use of a loaded key, from the socket to its reply, in one C loop.

The ordinary way (``Handlers``) serves a member's first use of a key and leaves a ``Plan`` of how it went: who, which
key, which verb, and that all checks passed. As long as nothing changes that the checks went by, such requests are
served by their plan: each is still admitted, counted, audited and checked against the key's limits. What has no plan,
or does not fit to it, goes the ordinary way as it came.
"""

from collections.abc import Callable
from typing import Any, Final, final

from engine.client._histogram import Histograms
from engine.client._router import Connection, Router
from engine.protocol._fastlines import UseLines
from nodes._usebuffer import UseBuffer

REQUESTS: Final[int]

@final
class Plan:
    """How one member's uses of one key with one verb are served.

    One with ``newest`` holds as long as there is no newer version of the key. ``use`` is a ``Use`` of the token, or
    what is called like one; ``lines`` are its records (``UseBuffer.record``); ``times`` takes in how long its stages
    take (``engine.protocol.requests.STAGES``). ``worker`` makes uses that are too slow for the loop.
    """

    member: str
    verb: str
    name: str
    cluster: Any
    entry: Any
    loaded: Any
    cached_as: Any
    count: Any
    group: int
    request_class: str
    key_id: bytes
    newest: bool
    lines: UseLines
    worker: Any
    def __new__(
        cls,
        *,
        member: str,
        verb: str,
        name: str,
        cluster: Any,
        entry: Any,
        loaded: Any,
        cached_as: Any,
        count: Any,
        group: int,
        request_class: str,
        key_id: bytes,
        use: Callable[[bytes, bytes, bytes], bytes],
        digested: bool,
        associated: bool,
        proves: bool,
        newest: bool,
        most: int,
        lines: UseLines,
        times: Histograms | None = None,
        worker: Any = None,
    ) -> Plan: ...

@final
class Aside:
    """A use that a worker makes (it calls this), and that the loop answers (it calls ``done``)."""

    def __call__(self, state: Any) -> Any:
        """The result, on the worker's thread."""

    def done(self, answer: Any, error: Exception | None) -> None:
        """Answer and count it, on the loop's thread."""

@final
class FastPath:
    """The receiving end of a router, for the thread that owns it; ``lowest`` and ``highest`` as of ``Versions``."""

    paused: bool
    """Whether requests are left where they are."""
    served: int
    """Requests that were served by a plan."""
    def __new__(cls, router: Router, *descriptors: int, lowest: int, highest: int) -> FastPath: ...
    cluster: Any
    """The manifest in force; whoever takes a newer one has to set it."""
    def serve(
        self,
        opened: Callable[[Connection, bytes, int], Any],
        lost: Callable[[], None],
        handlers: Any,
        uses: UseBuffer,
        drain: Callable[[], None],
    ) -> None:
        """Who opens and takes what has no plan, is told of a reply that its client does not take, and admits and counts
        a use; where it is recorded, and what chains those that wait there, after their replies have left."""

    def remember(self, user_id: str, key_id: bytes, plan: Plan) -> None:
        """Serve such requests, from the connections of that CURVE key (Z85), by the plan from now on.

        They name the key by its name and this id, or none where it is empty.
        """

    def forget(self) -> None:
        """Something changed: every plan has to be made anew."""

    def settle(self) -> None:
        """Tell what was done of the uses that were admitted in advance, and give back the rest."""

    @property
    def plans(self) -> int:
        """How many plans there are."""

    @property
    def spins(self) -> bool:
        """Whether waits spin at present."""

    def wait(self, timeout_ms: int) -> int:
        """Wait until there is something to do; what, as the sum of ``REQUESTS``, and 2, 4 ... for the descriptors."""

    def unwatch(self, descriptor: int) -> None:
        """Wait for that descriptor no more."""

    def run(self, timeout_ms: int, limit: int) -> int:
        """Take in, up to so many messages at a time, and wait, until there is something else to do or the time is over;
        what, as ``wait`` says."""

    def take_in(self, limit: int) -> int:
        """Take in at most so many messages, and serve or hand over each; how many there were."""
