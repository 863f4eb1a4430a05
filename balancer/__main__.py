"""``python -m balancer``: options, signals, and the order in which things start and stop. It decides nothing."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # all that is imported stays
    # structlog would import it for coloured tracebacks, which a balancer never prints: a sixth of its start.
    sys.modules["rich"] = None  # type: ignore[assignment]

import structlog
import zmq

from balancer.config import Settings, load_settings, prepare_data
from balancer.loop import QUEUED_TABLES, ControlLoop, Service, now_ms
from balancer.mark import Mark
from balancer.mover import Mover
from balancer.optimizer import take_greeting
from balancer.rebuild import rebuild
from balancer.registry import Registry, SqliteRegistry
from balancer.store import HistoryStore
from engine.client.config import LOG_LEVELS, configure_logging
from engine.client.connections import LOOK_EVERY_S
from engine.client.listener import Listener
from engine.client.membership import Membership, Served
from engine.client.process import harden_process, leave_out_of_collection, raise_file_limit
from engine.client.publications import Gate, Publisher
from engine.client.speech import spoken
from engine.errors import ConfigError, EngineError, ManifestError
from engine.failpoints import arm_from_environment
from engine.notify import Notifier
from engine.protocol.manifest import Cluster
from engine.protocol.signed import RecentSignatures, remember_signatures

DRAIN_S = 1.0
"""How long requests that already arrived are answered after a signal to stop."""
POLL_MS = int(LOOK_EVERY_S * 1000)

log = structlog.get_logger()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a balancer until SIGTERM, SIGINT or the lifeline's end. 0 done, 1 wrong configuration, 2 could not serve."""
    try:
        options = _options().parse_args(arguments)
    except SystemExit as stop:
        return 1 if stop.code else 0  # argparse would make a wrong option 2, which here means that it could not serve
    try:
        configure_logging(options.log_level)
        arm_from_environment()
        spoken()
        harden_process()
        settings = load_settings(options.config)
        if options.check_config:
            sys.stdout.write(f"{options.config}: ok, {settings.identity.name} of {settings.membership.cluster.name}\n")
            return 0
        if options.rebuild:
            rebuild(settings, options.without, options.backup)
            return 0
        _run(settings, options.lifeline)
    except (ConfigError, ManifestError) as error:
        sys.stderr.write(f"balancer: {error}\n")
        return 1
    except EngineError as error:
        sys.stderr.write(f"balancer: {error}\n")
        return 2
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m balancer", description="Keyquorum's registry and control loop.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the balancer's TOML configuration")
    parser.add_argument("--check-config", action="store_true", help="check the configuration and stop")
    parser.add_argument("--rebuild", action="store_true", help="take what the nodes keep into the registry, and stop")
    parser.add_argument("--without", action="append", default=[], metavar="NODE", help="do without a node in --rebuild")
    parser.add_argument("--backup", type=Path, metavar="FOLDER", help="in --rebuild, what is in a backup counts too")
    parser.add_argument("--log-level", default="", choices=("", *LOG_LEVELS), help="beats KEYQUORUM_LOG_LEVEL")
    parser.add_argument(
        "--lifeline", type=int, metavar="FD", help="stop when this inherited pipe's other end is closed"
    )
    return parser


def _run(settings: Settings, lifeline: int | None) -> None:
    """Start from the inside out, serve, and stop in the reverse order."""
    identity, membership = settings.identity, settings.membership
    _check_lifeline(lifeline)
    raise_file_limit()
    remember_signatures(RecentSignatures())
    take_greeting()
    with ExitStack() as stack:
        wake = _catch_signals(stack)
        registry = _open_registry(settings)
        stack.callback(registry.close)
        context: zmq.Context[Any] = zmq.Context()
        stack.callback(context.destroy, 100)
        gate = Gate(context, membership)
        stack.callback(gate.close)
        own = settings.own

        def served() -> tuple[Served, ...]:
            return own.served(settings.bind, settings.publish_bind)

        first = served()[0]
        publisher = Publisher(context, lambda: own.published(settings.publish_bind), queued=QUEUED_TABLES)
        stack.callback(publisher.close)
        listener = Listener(first.pair, first.endpoint, membership, settings.limits)
        stack.callback(listener.close)
        mover = Mover(context, settings.own, membership, registry, identity.signing, settings.migrate, now_ms)
        loop = ControlLoop(
            context,
            identity,
            settings.own,
            membership,
            publisher,
            term=lambda: registry.term,
            tick_ms=settings.tick_ms,
            history_ticks=settings.history_ticks,
            series=settings.sources(),
            store=HistoryStore(settings.data / "history.db", tick_ms=settings.tick_ms, ticks=settings.history_ticks),
            mover=mover,
        )
        mover.start()
        stack.callback(mover.stop)
        loop.start()
        stack.callback(loop.stop)
        log.info(
            "serving",
            balancer=identity.name,
            endpoint=first.endpoint,
            publish=first.publish,
            fencing_epoch=registry.term,
        )
        service = Service(listener, registry, membership, identity.name, loop, listener.limits, settings.data)
        if settings.http is not None:
            from balancer.pages import Pages, serve_pages  # which not every balancer needs, and takes a while

            stack.callback(serve_pages(settings.http, Pages(loop, service, membership, identity.name)).close)
        notifier = Notifier()
        notifier.ready("serving")
        leave_out_of_collection()
        _serve(service, listener, membership, served, wake, lifeline, notifier)
        log.info("stopped", balancer=identity.name)


def _open_registry(settings: Settings) -> Registry:
    """The file, which this balancer leads at once, or the database, where it waits for its turn."""
    path = prepare_data(settings)
    mark = Mark(path.with_name(f"{path.name}.mark"))
    if not settings.postgresql:
        return SqliteRegistry(path, settings.membership, settings.identity.signing, now_ms(), mark)
    from balancer.postgres import PostgresRegistry  # which not every balancer has

    shared = PostgresRegistry(settings.postgresql, settings.membership, settings.identity.signing, now_ms, mark)
    shared.start()
    return shared


def _check_lifeline(lifeline: int | None) -> None:
    try:
        if lifeline is not None:
            os.fstat(lifeline)
    except OSError as error:
        raise ConfigError(f"--lifeline {lifeline}: {error.strerror}") from None


def _catch_signals(stack: ExitStack) -> socket.socket:
    """A socket from which the numbers of SIGTERM, SIGINT and SIGHUP are read: a poll sees them, and misses none."""
    reader, writer = socket.socketpair()
    stack.callback(reader.close)
    stack.callback(writer.close)
    writer.setblocking(False)
    stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
    return reader


def _listen(listener: Listener, places: tuple[Served, ...]) -> None:
    """Listen where the newest manifest says; one that does not name this process changes nothing."""
    if places:
        listener.serve({each.endpoint: each.pair for each in places})


def _serve(
    service: Service,
    listener: Listener,
    membership: Membership,
    served: Callable[[], tuple[Served, ...]],
    wake: socket.socket,
    lifeline: int | None,
    notifier: Notifier,
) -> None:
    poller = zmq.Poller()
    poller.register(listener.router.fileno(), zmq.POLLIN)
    poller.register(wake.fileno(), zmq.POLLIN)
    if lifeline is not None:
        poller.register(lifeline, zmq.POLLIN)
    known: Cluster | None = None
    next_look_s = 0.0
    while True:
        events = dict(poller.poll(0 if service.waiting or listener.router.pending else POLL_MS))
        service.look()
        notifier.alive()
        if wake.fileno() in events:
            if set(wake.recv(64)) - {signal.SIGHUP}:
                break
            next_look_s = 0.0
        if time.monotonic() >= next_look_s:
            next_look_s = time.monotonic() + POLL_MS / 1000
            membership.look()
            listener.settle()
        if known is not membership.cluster:
            known = membership.cluster
            _listen(listener, served())
        if lifeline is not None and lifeline in events and not os.read(lifeline, 1):
            break
        service.answer_waiting()
    notifier.stopping()
    until = time.monotonic() + DRAIN_S
    while service.answer_waiting() and time.monotonic() < until:
        pass


if __name__ == "__main__":
    sys.exit(main())
