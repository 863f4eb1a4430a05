"""Rotation of the KEK: a fresh token folder with a fresh PIN, all sealed anew, and one instant of change.

The node is stopped (the caller has the data folder's lock). What is new is made aside and checked from a fresh process;
then the folder it lies in is renamed, and that is the change: before it the new is thrown away, after it the old is.
``settle`` does either, at every start, so a crash at any step leaves a node that starts. It opens no socket::

    data/rotation.new/     being made; thrown away by settle
    data/rotation/         it counts; settle puts its parts in the old ones' places
    .<pin file>.new        the fresh PIN beside the old one
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from engine.client.config import sync_file, sync_folder, write_private
from engine.errors import ConfigError
from engine.failpoints import failpoint
from nodes.config import PinSource, TokenConfig
from nodes.reseal import check_store, reseal_store
from nodes.token import Token, open_beside_fresh, sync_tokens
from nodes.tokenfile import KEPT

__all__ = ["STORE_NAME", "check_draft", "is_pending", "rotate", "settle"]

STORE_NAME: Final = "shares.db"
DRAFT: Final = "rotation.new"
VALID: Final = "rotation"

log = structlog.get_logger()


def rotate(
    config: TokenConfig,
    data: Path,
    node: str,
    new_pin: PinSource | None,
    verify: Callable[[], None],
    progress: Callable[[int, int], None],
) -> None:
    """Give the node a fresh KEK and PIN. The caller has the data folder's lock, and no other node uses the token.

    ``new_pin`` is where the operator put the fresh PIN; None makes a random one, in the file of the old. ``verify`` has
    a fresh process call ``check_draft``, and raises what is wrong; ``progress`` is told (sealed anew, of all).
    """
    if config.shared_with is not None:
        raise ConfigError(
            f"the token of {node!r} is that of the node with the data folder {config.shared_with}: a node that shares "
            "a token can't change its KEK"
        )
    if not config.is_softhsm:
        raise ConfigError(
            f"{config.module} is not SoftHSM: its token is no folder that can be made afresh. Put a node with "
            "another token in this one's place"
        )
    if config.pin.kind != "file" and (new_pin is None or new_pin == config.pin):
        raise ConfigError(f"the PIN comes from {config.pin}: the fresh one must come from an environment variable")
    settle(config, data)
    if new_pin is not None and new_pin.read() == config.pin.read():
        raise ConfigError(f"the PIN in {new_pin} is the one in use: a rotation needs a fresh one")
    draft, tokens = data / DRAFT, data / "tokens"
    draft.mkdir(mode=0o700)
    sync_folder(data)
    shutil.copytree(tokens, draft / "tokens")  # SoftHSM opens one folder at a time, so the old token is in both
    failpoint("rotate.begun")
    beside = _beside(config.pin, "new")
    if new_pin is not None and beside is not None:
        write_private(beside, new_pin.read().encode() + b"\n")
    fresh = new_pin or PinSource("file", str(beside))
    old_lane, new_lane = open_beside_fresh(config, fresh, draft)
    failpoint("rotate.token-made")
    reseal_store(data / STORE_NAME, draft / STORE_NAME, node, old_lane, new_lane, progress)
    failpoint("rotate.sealed")
    for name in os.listdir(tokens):
        _erase(draft / "tokens" / name)
    sync_file(draft / STORE_NAME)
    sync_tokens(draft)
    failpoint("rotate.durable")
    verify()
    failpoint("rotate.verified")
    draft.rename(data / VALID)
    sync_folder(data)
    failpoint("rotate.changed")
    settle(config, data)
    log.info("the KEK was rotated", node=node)


def check_draft(config: TokenConfig, data: Path, node: str, new_pin: PinSource | None) -> int:
    """Open everything in what ``rotate`` made, as a node would, by a process that did not make it; how many rows."""
    pin = new_pin
    if (beside := _beside(config.pin, "new")) is not None:
        pin = PinSource("file", str(beside))
    lane = Token(replace(config, pin=pin or config.pin), data / DRAFT).lane()
    lane.check_kek()
    return check_store(data / DRAFT / STORE_NAME, node, lane)


def settle(config: TokenConfig, data: Path) -> None:
    """End a rotation that was cut off: carry it through if it counts, else throw it away. The caller has the lock."""
    if not config.is_softhsm or config.shared_with is not None:
        return
    fresh_pin, old_pin = _beside(config.pin, "new"), _beside(config.pin, "old")
    valid = data / VALID
    if valid.exists():
        log.info("carrying a rotation of the KEK through", data=str(data))
        _change_pin(config.pin, fresh_pin, old_pin)
        failpoint("rotate.pin-changed")
        _swap(valid / "tokens", data / "tokens", valid / "tokens.old")
        _erase(data / KEPT)
        failpoint("rotate.token-changed")
        for suffix in ("-wal", "-shm"):
            if (valid / STORE_NAME).exists():
                _erase(data / f"{STORE_NAME}{suffix}")
        _swap(valid / STORE_NAME, data / STORE_NAME, valid / f"{STORE_NAME}.old")
        failpoint("rotate.store-changed")
    else:
        _erase(fresh_pin)
    _erase(old_pin)
    for folder in (data / DRAFT, valid):
        if folder.exists():
            _erase(folder)
            sync_folder(data)
    failpoint("rotate.erased")


def is_pending(data: Path) -> bool:
    """Whether a rotation is being made in this data folder, or was cut off and is yet to be ended."""
    return any((data / name).exists() for name in (DRAFT, VALID))


def _beside(pin: PinSource, suffix: str) -> Path | None:
    """Where the fresh or the old PIN lies while two exist; None if the PIN is in no file."""
    if pin.kind != "file":
        return None
    path = Path(pin.place)
    return path.with_name(f".{path.name}.{suffix}")


def _change_pin(pin: PinSource, fresh: Path | None, old: Path | None) -> None:
    if fresh is None or old is None or not fresh.exists():
        return
    path = Path(pin.place)
    if path.exists() and not old.exists():
        os.link(path, old)  # kept for being overwritten, which a rename alone would not do
    fresh.replace(path)
    sync_folder(path.parent)


def _swap(new: Path, place: Path, old: Path) -> None:
    """Put ``new`` in its place and what was there aside; may be begun again after a crash at any step."""
    if not new.exists():
        return
    if place.exists():
        if old.exists():
            _erase(place)  # whoever looked meanwhile made it, empty
        else:
            place.rename(old)
            sync_folder(place.parent)
            sync_folder(old.parent)
    new.rename(place)
    sync_folder(place.parent)
    sync_folder(new.parent)


def _erase(path: Path | None) -> None:
    """Overwrite and remove a file, or all in a folder. What file systems and disks keep of it is beyond reach."""
    if path is None or not path.exists():
        return
    for each in _files(path):
        with each.open("r+b") as stream:
            stream.write(bytes(each.stat().st_size))
            stream.flush()
            os.fsync(stream.fileno())
        each.unlink()
    if path.is_dir():
        shutil.rmtree(path)
    sync_folder(path.parent)


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder) / name
