"""The entry of the keyquorum command: its groups, and the exit code and the one line that every error becomes.

The commands themselves are in the other modules of this room.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, Final

import click

from engine._version import __version__
from engine.cli.output import Settings, common_options, one_line
from engine.errors import (
    AccessDenied,
    ConfigError,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyDisabled,
    KeyExists,
    KeyNotFound,
    ManifestError,
    UnsupportedAlgorithm,
    VersionRetired,
)

__all__ = ["cli", "main", "run"]

DONE: Final = 0
REFUSED: Final = 1
"""The user's mistake, or a check that failed."""
FAILED: Final = 2
"""The cluster could not."""
INTERRUPTED: Final = 130

_REFUSALS = (
    AccessDenied,
    ConfigError,
    InvalidSignature,
    InvalidTag,
    KeyDisabled,
    KeyExists,
    KeyNotFound,
    ManifestError,
    UnsupportedAlgorithm,
    VersionRetired,
    ValueError,
    TypeError,
    OSError,
)


class _Sections(click.Group):
    """A group that lists its commands under headings, in the order in which one needs them.

    The module of a command is imported once the command is asked for: the others' cost half a second to start.
    """

    sections: Final = {
        "A local cluster": {"demo": "demo", "up": "local", "down": "local"},
        "What a cluster does": {"status": "local", "top": "top", "doctor": "doctor"},
        "A cluster over several hosts": {
            "init": "identity",
            "cluster": "cluster",
            "node": "node",
            "registry": "registry",
            "backup": "backup",
            "audit": "audit",
            "attack": "attack",
        },
        "Keys": {"key": "keyops", "flush": "keyops"},
        "Use of keys": dict.fromkeys(("encrypt", "decrypt", "rewrap", "sign", "verify", "mac", "verify-mac"), "keyops"),
    }
    """Command -> its module, by heading."""
    homes: Final = {name: module for names in sections.values() for name, module in names.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(self.homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; None if there is none."""
        if cmd_name not in self.homes:
            return None
        command: click.Command = getattr(
            import_module(f"engine.cli.{self.homes[cmd_name]}"), cmd_name.replace("-", "_")
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands section by section."""
        for heading, names in self.sections.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            rows = [(name, each.get_short_help_str(80)) for name, each in commands.items() if each is not None]
            with formatter.section(heading):
                formatter.write_dl(rows)


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="keyquorum")
@common_options(connects=True)
def cli() -> None:
    """Keep keys as t-of-n shares over a cluster of tokens, and use them.

    \b
    Examples:
      keyquorum up                                    a cluster of five nodes on this machine
      keyquorum key create orders aes-256-gcm
      keyquorum encrypt orders report.pdf --out report.kq
      keyquorum decrypt orders report.kq --out report.pdf

    Exit codes: 0 done, 1 your mistake or a failed check, 2 the cluster could not (3: `attack --help`).
    """


def main() -> None:
    """Run the command with the process's arguments and end the process with its exit code."""
    # So that a half-written file is removed when the command is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command; what it prints is on the standard streams, what it returns is the exit code."""
    settings = Settings(json=_asks_for_json(arguments))
    try:
        answer = cli.main(list(arguments), prog_name="keyquorum", obj=settings, standalone_mode=False)
    except click.exceptions.Abort as abort:
        interrupted = isinstance(abort.__cause__ or abort.__context__, KeyboardInterrupt)
        return INTERRUPTED if interrupted else _report(settings, "aborted", "nothing was done", REFUSED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return REFUSED
    except click.ClickException as error:
        return _report(settings, "usage", _usage(error), REFUSED)
    except EngineError as error:
        names = getattr(error, "missing", ()) or getattr(error, "holders", ())
        code = REFUSED if isinstance(error, _REFUSALS) else FAILED
        return _report(settings, error.code, str(error), code, names)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return _report(settings, "file", f"{where}{error.strerror or error}", REFUSED)
    except (ValueError, TypeError) as error:
        return _report(settings, "invalid-request", str(error), REFUSED)
    except Exception as error:
        # A defect of ours. The traceback is for those who asked for everything.
        if settings.log_level == "debug":
            raise
        told = f"internal error: {type(error).__name__}: {error} (--log-level debug shows where)"
        return _report(settings, "internal", told, FAILED)
    except SystemExit as stop:
        # click's answer to a closed pipe, and ours to SIGTERM.
        return stop.code if isinstance(stop.code, int) else REFUSED
    # click returns the code of ctx.exit() here, and None from a command that simply ended.
    return answer if isinstance(answer, int) else DONE


def _usage(error: click.ClickException) -> str:
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f" (see: {error.ctx.command_path} --help)"
    return f"{error.format_message()}{hint}"


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether ``-o json`` was asked for, also where the arguments are too wrong for click to tell."""
    pairs = [f"{first}={second}" for first, second in pairwise(arguments)]
    return any(each in ("-o=json", "--output=json", "-ojson") for each in [*arguments, *pairs])


def _report(settings: Settings, kind: str, message: str, code: int, names: Sequence[str] = ()) -> int:
    """One line on the standard error, or one JSON object."""
    message = one_line(message)
    if settings.json:
        told: dict[str, Any] = {"error": kind, "message": message, "exit_code": code}
        click.echo(json.dumps(told | ({"names": list(names)} if names else {}), ensure_ascii=False), err=True)
    else:
        click.echo(f"keyquorum: {message}", err=True)
    return code
