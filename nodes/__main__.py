"""``python -m nodes``: the allocator first, which takes a new beginning of the process; then the command."""

from __future__ import annotations

import sys

from nodes.allocator import overwrite_freed

if __name__ == "__main__":
    overwrite_freed()
    from nodes.command import run

    sys.exit(run())
