"""Uses of keys that are recorded and not yet in the audit log's chain.

A use is recorded before its reply leaves, by writing the bodies of its two lines into memory that is shared with a
file: whoever kills the process does not take them away. They are chained, hashed and written many at a time
(``AuditLog``), and what a killed process left here is chained by the next start. Beside the bodies stands the number of
the chain's last line then, or of one before it: what got into the log before the crash is behind that one.
"""

from collections.abc import Callable
from typing import final

from engine.protocol._fastlines import UseLines

@final
class UseBuffer:
    """The file at ``path``, 512 KiB; one process at a time, safe for several threads of Python's.

    ``stir`` is called when something waits that did not before, ``drain`` when there is no room: it is to chain and
    ``take`` what waits. ``OSError`` where the disk has no room for the file.
    """

    refusal: Callable[[], Exception] | None
    """Makes the error by which every use is refused at present."""
    count: int
    """Uses that wait."""
    damaged: bool
    """Whether the file made no sense, and is empty now."""
    def __new__(
        cls, path: str, now_ms: Callable[[], int], stir: Callable[[], None], drain: Callable[[], None]
    ) -> UseBuffer: ...
    @property
    def base(self) -> int:
        """The number of the chain's last line at the last ``take``: no use that waits is in a line up to it."""

    def record(self, lines: UseLines, request: int, elapsed_us: int) -> None:
        """Note a use that went well, at the time of now; ``elapsed_us`` of 0 is left out."""

    def waiting(self) -> list[bytes]:
        """The bodies of the lines of all that wait, in order."""

    def chained(self, seq: int, previous: bytes) -> tuple[bytes, bytes, int, int]:
        """The lines of all that wait from ``seq`` on, each with its newline; the hash of the last; how many uses these
        are, and where they end, for ``take``.

        ValueError if ``previous``, the hash of the line before, has not 32 bytes.
        """

    def take(self, count: int, end: int, seq: int) -> None:
        """So many uses, up to ``end``, are in the chain now, whose last line is ``seq``."""
