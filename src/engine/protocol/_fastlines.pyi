from typing import Any, final

__pyx_capi__: dict[str, Any]

@final
class UseLines:
    """The two lines of a use of a key that goes well, with all in them that is the same at each use of its kind.

    They are written without ``seq`` and ``prev``: the chain comes later, in ``nodes._usebuffer``.

    ``source`` is JSON from ``"node":`` up to ``"request":``; ``event`` and ``outcome`` are what follows the number in
    the first line and in the second, the latter without its elapsed time and the bracket that closes it.
    """

    most: int
    """Bytes of both bodies, at most."""
    def __new__(cls, *, source: bytes, event: bytes, outcome: bytes) -> UseLines: ...
    def written(self, time_ms: int, request: int, elapsed_us: int) -> tuple[bytes, bytes]:
        """The bodies of both lines: what follows a line's number and the hash of the line before it."""
