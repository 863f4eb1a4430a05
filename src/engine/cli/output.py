"""How the command reads, prints and writes: shared options, files that appear whole or not at all, progress.

It knows no key and no cluster. What is data goes to the standard output, everything else to the standard error.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from engine.client.config import LOG_LEVEL_VARIABLE, LOG_LEVELS, configure_logging
from engine.errors import ConfigError

__all__ = [
    "Settings",
    "byte_progress",
    "client_config",
    "common_options",
    "count_progress",
    "decode_bytes",
    "emit",
    "encode_bytes",
    "note",
    "one_line",
    "printable",
    "reading",
    "spinner",
    "start_logging",
    "table",
    "writing",
]

F = TypeVar("F", bound=Callable[..., Any])

CONFIG_VARIABLE: Final = "KEYQUORUM_CONFIG"
DEFAULT_CONFIGS: Final = (Path("client.toml"), Path("keyquorum-cluster/clients/local/client.toml"))
LINE_EVERY_S: Final = 2.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control and bidirectional characters: text of another host must not steer this terminal."""


@dataclass(slots=True)
class Settings:
    """What the shared options say. An option given twice, before and after the command's name, counts the last time."""

    config: str = ""
    timeout_s: float | None = None
    json: bool = False
    log_level: str = ""


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is None:
        return
    settings = context.find_object(Settings)
    if settings is None:
        settings = context.obj = Settings()
    if parameter.name == "output":
        settings.json = value == "json"
    elif parameter.name == "timeout":
        settings.timeout_s = value
    else:
        setattr(settings, str(parameter.name), value)


def common_options(*, connects: bool = False) -> Callable[[F], F]:
    """The options ``-o`` and ``--log-level``, and with ``connects`` also ``--config`` and ``--timeout``."""

    def add(command: F) -> F:
        kept: dict[str, Any] = {"expose_value": False, "callback": _keep, "is_eager": True}
        decorators = [
            click.option("-o", "--output", type=click.Choice(("text", "json")), help="How data is printed.", **kept),
            click.option("--log-level", type=click.Choice(LOG_LEVELS), help="Beats KEYQUORUM_LOG_LEVEL.", **kept),
        ]
        if connects:
            decorators[:0] = [
                click.option(
                    "--config",
                    metavar="FILE",
                    help="The client's configuration; else KEYQUORUM_CONFIG, ./client.toml or ./keyquorum-cluster.",
                    **kept,
                ),
                click.option(
                    "--timeout",
                    type=click.FloatRange(0.001, 600),
                    metavar="SECONDS",
                    help="Deadline of each request.",
                    **kept,
                ),
            ]
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def start_logging(settings: Settings) -> None:
    """Log from warnings upwards, unless the option or KEYQUORUM_LOG_LEVEL says otherwise."""
    configure_logging(settings.log_level or ("" if os.environ.get(LOG_LEVEL_VARIABLE) else "warning"))


def client_config(settings: Settings) -> Path:
    """The client's configuration file: the option, the environment, ./client.toml, or the local cluster's."""
    told = settings.config or os.environ.get(CONFIG_VARIABLE, "")
    if told:
        return Path(told)
    found = next((path for path in DEFAULT_CONFIGS if path.exists()), None)
    if found is None:
        raise ConfigError(
            f"no client configuration: --config or {CONFIG_VARIABLE} names one, and `keyquorum up` makes one "
            f"(looked at {', '.join(map(str, DEFAULT_CONFIGS))})"
        )
    return found


# --- printing -------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return _CONTROL.sub("?", text)


def one_line(text: str) -> str:
    """The same on one line, for a cell or a field that another host has filled."""
    return printable(" ".join(text.split()))


def note(text: str) -> None:
    """A line for the person, on the standard error."""
    click.echo(printable(text), err=True)


def emit(settings: Settings, value: Any, text: str | None = None) -> None:
    """Print a result: ``value`` as JSON, or ``text`` (by default the value's items, one a line)."""
    if settings.json:
        click.echo(json.dumps(value, default=_plain, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))
        return
    if text is None:
        text = _items(value) if isinstance(value, Mapping) else str(value)
    if text:
        click.echo(printable(text))


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _items(value: Mapping[str, Any]) -> str:
    shown = {
        name.replace("_", " "): one_line(_cell(each)) for name, each in value.items() if each not in ("", (), [], None)
    }
    width = max(map(len, shown), default=0)
    return "\n".join(f"{name:<{width}}  {each}" for name, each in shown.items())


def _cell(value: Any) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value)
    return ", ".join(map(str, value))


def table(settings: Settings, columns: Sequence[str], rows: Sequence[Sequence[Any]], value: Any) -> None:
    """Print rows under headings: ``value`` as JSON, a table on a terminal, aligned columns otherwise."""
    if settings.json:
        emit(settings, value)
        return
    cells = [[one_line(_cell(each)) for each in row] for row in rows]
    if sys.stdout.isatty():
        shown = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in cells:
            shown.add_row(*row)
        Console(markup=False, highlight=False).print(shown)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        click.echo("  ".join(each.ljust(width) for each, width in zip(line, widths, strict=True)).rstrip())


def spinner(settings: Settings, text: str) -> AbstractContextManager[Any]:
    """Something that turns while work goes on; nothing where no person looks."""
    if settings.json or not sys.stderr.isatty():
        return nullcontext()
    return Console(stderr=True).status(printable(text))


@contextmanager
def byte_progress(settings: Settings, what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A function that takes the count of bytes done so far and draws a bar; None where no person looks."""
    if settings.json or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(what), total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def count_progress(settings: Settings, what: str) -> Iterator[Callable[[int], None]]:
    """A function that takes how many are left and draws a bar; where no person looks, it prints a line now and then."""
    if settings.json or not sys.stderr.isatty():
        told = _Lines(what)
        yield (lambda left: None) if settings.json else told.left
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} keys"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(what), total=0)
        most = 0

        def draw(left: int) -> None:
            nonlocal most
            most = max(most, left)
            progress.update(task, total=most, completed=most - left)

        yield draw


class _Lines:
    """The same as lines, none within ``LINE_EVERY_S`` of the one before, and none that says the same."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._left = -1
        self._next_s = 0.0

    def left(self, left: int) -> None:
        """Tell how many are left."""
        now = time.monotonic()
        if left != self._left and now >= self._next_s:
            self._left, self._next_s = left, now + LINE_EVERY_S
            note(f"{self._what}: {left} keys left")


# --- bytes in and out -----------------------------------------------------------------------------------------------


def encode_bytes(data: bytes, encoding: str) -> bytes:
    """The bytes as they are, or as one line of base64 or hex."""
    if encoding == "base64":
        return base64.b64encode(data) + b"\n"
    return data.hex().encode() + b"\n" if encoding == "hex" else data


def decode_bytes(data: bytes, encoding: str, what: str) -> bytes:
    """The reverse; ``ValueError`` names ``what`` and never shows the bytes."""
    if encoding == "raw":
        return data
    packed = b"".join(data.split())
    try:
        return base64.b64decode(packed, validate=True) if encoding == "base64" else binascii.unhexlify(packed)
    except binascii.Error:
        raise ValueError(f"{what}: no valid {encoding}") from None


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """The file, or the standard input for ``-``."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with Path(path).open("rb") as stream:
        yield stream


@contextmanager
def writing(path: str, *, force: bool = False, private: bool = False, text: bool = False) -> Iterator[BinaryIO]:
    """A stream to the file, which appears under its name only if the block ends without an error.

    ``-`` is the standard output; binary data to a terminal is refused unless ``force`` is given or ``text`` says
    that it is none. A ``private`` file has mode 0600. What is no regular file (a pipe, a device) is written to
    directly.
    """
    if path == "-":
        if sys.stdout.isatty() and not (text or force):
            raise ValueError("binary data would go to the terminal; name a file with --out, or insist with --force")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path).resolve()
    if target.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        with target.open("wb") as stream:
            yield stream
        return
    with _replacing(target, 0o600 if private else 0o666 & ~_umask()) as stream:
        yield stream


@contextmanager
def _replacing(target: Path, mode: int) -> Iterator[BinaryIO]:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        Path(name).replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
