"""A second copy of the file that SoftHSM empties at each login, for a process that is killed before it is written.

SoftHSM 2.6.1 keeps a token's label and PIN-wrapped key in ``token.object``. A login truncates that file and then writes
it; killed in between, a node would have a token that nobody can open any more, and no share. The copy lies beside the
token folder with the same rights and says no more than the file itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from engine.client.config import sync_folder, write_private

__all__ = ["KEPT", "keep_token_files", "restore_token_files"]

KEPT: Final = "tokens.kept"
NAME: Final = "token.object"

log = structlog.get_logger()


def restore_token_files(home: Path) -> None:
    """Put back what a killed login left empty; while no process logs in there."""
    with _told(home):
        for file, kept in _files(home):
            if not file.stat().st_size and kept.is_file():
                write_private(file, kept.read_bytes())
                log.warning("the token's file was empty and was put back", file=str(file), reason="a login was cut off")


def keep_token_files(home: Path) -> None:
    """Keep a copy, after a login went well; while no other process logs in there."""
    with _told(home):
        for file, kept in _files(home):
            found = file.read_bytes()
            if found and not (kept.is_file() and kept.read_bytes() == found):
                kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_private(kept, found)
                sync_folder(home)


def _files(home: Path) -> list[tuple[Path, Path]]:
    """Each token's file, and where its copy is."""
    found = sorted((home / "tokens").glob(f"*/{NAME}"))
    return [(file, home / KEPT / file.parent.name / NAME) for file in found]


@contextlib.contextmanager
def _told(home: Path) -> Iterator[None]:
    """Where the disk does not let it, that is told in the log, and the login goes on with what there is."""
    try:
        yield
    except OSError as error:
        log.warning("no copy of the token's file", data=str(home), reason=error.strerror)
