"""A second copy of the file that SoftHSM empties at each login, for a process that is killed before it is written.

SoftHSM 2.6.1 keeps a token's label and PIN-wrapped key in ``token.object``. A login truncates that file and then writes
it; killed in between, a node would have a token that nobody can open any more, and no share. The copy lies beside the
token folder with the same rights and says no more than the file itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import structlog

from engine.client.config import sync_folder, write_private

__all__ = ["KEPT", "secure_token_files"]

KEPT: Final = "tokens.kept"
NAME: Final = "token.object"

log = structlog.get_logger()


def secure_token_files(home: Path) -> None:
    """Put back what a killed login left empty, and keep a copy of the rest; while no process logs in there.

    Where the disk does not let it, that is told in the log, and the login goes on with what there is.
    """
    try:
        _secure(home)
    except OSError as error:
        log.warning("no copy of the token's file", data=str(home), reason=error.strerror)


def _secure(home: Path) -> None:
    for file in sorted((home / "tokens").glob(f"*/{NAME}")):
        kept = home / KEPT / file.parent.name / NAME
        found = file.read_bytes()
        if found:
            if not kept.is_file() or kept.read_bytes() != found:
                kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_private(kept, found)
                sync_folder(home)
        elif kept.is_file():
            write_private(file, kept.read_bytes())
            log.warning("the token's file was empty and was put back", file=str(file), reason="a login was cut off")
