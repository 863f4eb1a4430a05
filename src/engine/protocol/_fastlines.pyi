from typing import final

@final
class UseLines:
    """The two lines of a use of a key that goes well, with all in them that is the same at each use of its kind.

    ``source`` is JSON from ``"node":`` up to ``"request":``; ``event`` and ``outcome`` are what follows the number in
    the first line and in the second, the latter without its elapsed time and the bracket that closes it.
    """

    def __new__(cls, *, source: bytes, event: bytes, outcome: bytes) -> UseLines: ...
    def chained(self, seq: int, previous: bytes, time_ms: int, request: int, elapsed_us: int) -> tuple[bytes, bytes]:
        """The lines ``seq`` and the next, each with its newline, and the hash of the second.

        ValueError if ``previous``, the hash of the line before, has not 32 bytes.
        """
