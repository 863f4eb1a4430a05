"""``python -m nodes``: the supervisor of a node, or the allocator, which begins the process anew, and the command."""

from __future__ import annotations

import gc
import os
import sys

from nodes.allocator import overwrite_freed
from nodes.supervisor import FAILPOINTS, lifeline_of, supervise

if __name__ == "__main__":
    supervised, lifeline = lifeline_of(sys.argv[1:])
    # At a failpoint a node dies as in a power cut: nobody brings it back.
    if supervised and not os.environ.get(FAILPOINTS):
        sys.exit(supervise(sys.argv[1:], lifeline))
    overwrite_freed()
    gc.disable()  # all that is imported stays
    # structlog would import it for coloured tracebacks, which a node never prints: a sixth of the time until it serves.
    sys.modules["rich"] = None  # type: ignore[assignment]
    from nodes.command import run

    sys.exit(run())
