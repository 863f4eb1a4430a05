"""The command ``python -m nodes``, which runs a node, and ``init``, which makes its token."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec
import structlog

from engine._version import __version__
from engine.client.config import LOG_LEVELS, configure_logging, load_identity
from engine.client.process import harden_process, lock_folder
from engine.client.speech import spoken
from engine.errors import ConfigError, EngineError, TokenError
from engine.failpoints import arm_from_environment
from engine.protocol.manifest import CLOCK_SKEW_MS
from nodes import rotation
from nodes.audit import AuditNames
from nodes.clock import time_text
from nodes.config import NodeConfig, PinSource, load_node_config, token_module
from nodes.health import CKR_PIN_INCORRECT, EXIT_PIN, EXIT_TOKEN, Kind, TokenFault
from nodes.rotation import STORE_NAME, rotate
from nodes.server import Server, find_sharers, load_membership
from nodes.sharers import Mark, alone, hold, owner_of, tell_owner
from nodes.store import ShareStore
from nodes.supervisor import Beat
from nodes.token import Token, initialize_token

CHECK_TIMEOUT_S = 600
CHECK_ALARM_S = 60
MAX_WITNESS = 1_000
PROGRESS_ROWS = 1_000
MAX_DRILL = 64 * 1024 * 1024

log = structlog.get_logger()

_CONFIG = click.option(
    "--config", "config_path", required=True, type=click.Path(path_type=Path), help="The node's TOML configuration."
)
_LEVEL = click.option("--log-level", type=click.Choice(LOG_LEVELS), help="Overrides KEYQUORUM_LOG_LEVEL.")


@click.group(invoke_without_command=True)
@click.version_option(__version__, prog_name="python -m nodes")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="The node's TOML configuration.")
@click.option("--check-config", is_flag=True, help="Check the configuration, identity and manifest, then exit.")
@click.option("--lifeline", type=int, metavar="FD", help="Stop when this inherited pipe reaches its end.")
@click.option("--unsupervised", is_flag=True, help="Run the node without a parent that restarts it when it hangs.")
@click.option("--supervised", hidden=True)
@_LEVEL
@click.pass_context
def main(
    context: click.Context,
    config_path: Path | None,
    check_config: bool,
    lifeline: int | None,
    unsupervised: bool,
    supervised: str | None,
    log_level: str | None,
) -> None:
    """Run a Keyquorum node: one PKCS#11 token that holds shares and serves operations."""
    configure_logging(log_level or "")
    arm_from_environment()
    spoken()
    if context.invoked_subcommand is not None:
        gc.enable()
        return
    if config_path is None:
        raise click.UsageError("--config is needed (or the command init; see --help)")
    harden_process()
    config = load_node_config(config_path)
    if check_config:
        identity, membership = load_membership(config)
        config.token.pin.read()
        cluster = membership.cluster
        find_sharers(config, Mark.of(identity, config.path), cluster)
        click.echo(f"{config_path}: good; node {identity.name!r} of cluster {cluster.name!r}, serial {cluster.serial}")
        return
    Server(config, lifeline, Beat(supervised, config.care.hang_after_s) if supervised else None).run()


@main.command()
@click.option(
    "--config",
    "config_paths",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="The node's TOML configuration; once for each node, where several live on this machine.",
)
@click.option("--unchecked", is_flag=True, hidden=True)
@_LEVEL
def init(config_paths: tuple[Path, ...], unchecked: bool, log_level: str | None) -> None:
    """Make the node's token, its random PIN and its key-encryption key.

    The PIN is written to the file that the configuration names, with mode 0600, outside the data folder. For a node
    that shares another one's token (token.shared_with) nothing is made: the token, its PIN and its key are tried.
    """
    configure_logging(log_level or "")
    harden_process()
    failed = []
    for path in sorted(config_paths, key=_is_sharer):  # a token is made before others share it
        try:
            _init(path, unchecked)
        except EngineError as error:
            if len(config_paths) == 1:
                raise
            click.echo(f"error: {path}: {error}", err=True)
            failed.append(str(path))
    if failed:
        raise TokenError(f"{len(failed)} of {len(config_paths)} tokens were not made: those of {', '.join(failed)}")


def _is_sharer(config_path: Path) -> bool:
    try:
        return load_node_config(config_path).token.shared_with is not None
    except ConfigError:
        return False  # who makes its token tells what is wrong


def _init(config_path: Path, unchecked: bool) -> None:
    config = load_node_config(config_path)
    config.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if config.token.shared_with is not None:
        _try_shared(config, config.token.shared_with, unchecked)
        return
    identity = load_identity(config.identity) if config.identity.exists() else None
    initialize_token(config.token, config.data)
    if identity is not None:  # else the node says it when it starts
        tell_owner(config.data, Mark.of(identity, config.path))
    if not unchecked:  # by who starts the node at once, which sees the same
        _in_fresh_process([sys.executable, "-P", "-m", "nodes", "check-token", "--config", str(config_path)])
    click.echo(f"token {config.token.label!r} made; its PIN is at {config.token.pin}")


def _try_shared(config: NodeConfig, home: Path, unchecked: bool) -> None:
    owner, held = owner_of(home), hold(home)
    try:
        if not unchecked:
            _check_by_another(config.path)
    finally:
        os.close(held)
    click.echo(f"token {config.token.label!r} is that of {owner.node!r}; its PIN is at {config.token.pin}")


def _check_by_another(config_path: Path) -> None:
    """Have a process of its own try the token; fails as that does."""
    command = [sys.executable, "-P", "-m", "nodes", "check-token", "--config", str(config_path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    if checked.returncode == 0:
        return
    told = checked.stderr.strip().removeprefix("error: ")[-500:]
    if checked.returncode == EXIT_PIN:
        raise TokenFault(told, CKR_PIN_INCORRECT)
    raise ConfigError(told) if checked.returncode == 1 else TokenError(told)


_NEW_PIN = click.option(
    "--new-pin-env", metavar="NAME", help="Take the fresh PIN from this environment variable; by default it is random."
)


@main.command()
@_CONFIG
@_NEW_PIN
@_LEVEL
def rotate_kek(config_path: Path, new_pin_env: str | None, log_level: str | None) -> None:
    """Make a fresh token with a fresh PIN and key-encryption key, and seal the whole store anew under it.

    The node must be stopped, and no other node may share its token. The old token, PIN and store are erased at the end;
    cut off at any step, the node goes on with the old or the new ones. An old copy of the disk is of no use with the
    fresh PIN, nor a new one with the old.
    """
    configure_logging(log_level or "")
    arm_from_environment()
    spoken()
    harden_process()
    config = load_node_config(config_path)
    node = load_membership(config)[0].name
    held = lock_folder(config.data)
    try:
        command = [sys.executable, "-P", "-m", "nodes", "check-draft", "--config", str(config_path)]
        command += ["--new-pin-env", new_pin_env] if new_pin_env else []
        with alone(config.data):
            rotate(
                config.token, config.data, node, _new_pin(new_pin_env), lambda: _in_fresh_process(command), _progress
            )
    finally:
        os.close(held)
    click.echo(
        f"the KEK of {node!r} was rotated; its PIN is now {(new_pin_env and 'that of env:' + new_pin_env) or 'fresh'}"
    )


def _new_pin(variable: str | None) -> PinSource | None:
    return PinSource("env", variable) if variable else None


def _progress(done: int, total: int) -> None:
    if done == total or done % PROGRESS_ROWS == 0:
        click.echo(f"sealed anew: {done} of {total}", err=True)


def _in_fresh_process(command: list[str]) -> None:
    """A process of its own sees what is on the disk, not what this one's module remembers."""
    checked = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    if checked.returncode != 0:
        raise TokenError(f"the new token does not work: {checked.stderr.strip()[-500:]}")


@main.command(hidden=True)
@_CONFIG
@_NEW_PIN
def check_draft(config_path: Path, new_pin_env: str | None) -> None:
    """Open all that a rotation of the KEK has made so far."""
    configure_logging("error")
    harden_process()
    config = load_node_config(config_path)
    rows = rotation.check_draft(config.token, config.data, load_membership(config)[0].name, _new_pin(new_pin_env))
    click.echo(f"{rows} rows")


@main.command()
@_CONFIG
@click.option("--same-kek", is_flag=True, help="Only open what is on the standard input, as the node's own checks do.")
def check_token(config_path: Path, same_kek: bool) -> None:
    """Log in to the token, use its KEK and list the algorithms it can serve."""
    configure_logging("error")
    harden_process()
    if same_kek:
        os.nice(10)
        signal.alarm(CHECK_ALARM_S)  # nobody may be left to end a process whose token hangs
    config = load_node_config(config_path)
    token = Token(config.token, config.data, probe=not same_kek)
    if same_kek:
        token.check_witness(bytes.fromhex(sys.stdin.read(MAX_WITNESS)))
        return
    token.lane().check_kek()
    for name in token.algorithms:
        click.echo(name)
    for name, lacking in token.missing.items():
        click.echo(f"{name}: missing {lacking}")


@main.command(hidden=True)
@click.option("--backup", "folder", required=True, type=click.Path(path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--pin", required=True)
@click.option("--module", default="")
def drill(folder: Path, work: Path, pin: str, module: str) -> None:
    """Restore a backup under a throw-away token, and tell by a JSON line for each key what it shows.

    The key that the contributions are sealed to comes on the standard input, and they with it.
    """
    # It imports a client, which no node that serves needs: a third of its start.
    from nodes.drill import DrillInput
    from nodes.drill import drill as run_drill

    configure_logging("error")
    harden_process()
    told = msgspec.json.decode(sys.stdin.buffer.read(MAX_DRILL), type=DrillInput)

    def restored(node: str, done: int) -> None:
        _line({"node": node, "done": done})

    shown = run_drill(folder, bytes.fromhex(pin), work, token_module(module), told.secret, told.contributions, restored)
    for each in shown:
        _line(msgspec.to_builtins(each))


def _line(told: object) -> None:
    sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    sys.stdout.flush()


@main.command()
@_CONFIG
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def audit_name(config_path: Path, names: tuple[str, ...]) -> None:
    """Print what stands in the audit log for names of keys where `key_names = "hmac"` hides them."""
    configure_logging("error")
    harden_process()
    config = load_node_config(config_path)
    identity, _ = load_membership(config)
    lane = Token(config.token, config.data).lane()
    store = ShareStore(config.data / STORE_NAME, identity.name, lane)
    try:
        hidden = AuditNames(store, lane)
    finally:
        store.close()
    for name in names:
        click.echo(f"{hidden(name)}  {name}")


@main.command()
@_CONFIG
def reset_clock(config_path: Path) -> None:
    """Go by the machine's clock again after it was ahead once; the node must be stopped.

    Set the machine's clock right before. Grants made before now are refused, so that none that was used is good again.
    """
    configure_logging("error")
    harden_process()
    config = load_node_config(config_path)
    identity, _ = load_membership(config)
    lock_folder(config.data)
    store = ShareStore(config.data / STORE_NAME, identity.name, Token(config.token, config.data).lane())
    try:
        before_ms, now_ms = store.clock_mark().mark_ms, time.time_ns() // 1_000_000
        store.reset_clock(now_ms, now_ms + CLOCK_SKEW_MS)
    finally:
        store.close()
    click.echo(f"{identity.name}: the mark was {time_text(before_ms)}, now it is {time_text(now_ms)}")


def run() -> int:
    """The exit code: 0 done, 1 the user's mistake, 2 token or cluster could not, 3 the token did not take the PIN."""
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 1
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except EngineError as error:
        click.echo(f"error: {error}", err=True)
        if isinstance(error, TokenFault) and error.kind is Kind.PIN:
            return EXIT_PIN
        return 1 if error.code in ("config-error", "manifest-error") else EXIT_TOKEN
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    return 0
