"""Faults of the balancer: it has the right keys and tells lies, or begins again from nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

from course import NO_BALANCER, Fault, Run
from harness import BALANCER
from liar import Liar, garbage, lies, stale_books, stranger, table

from engine.protocol.table import RoutingTable

CLASSES_MAX = 512


def _in_place(run: Run, **told: object) -> Liar:
    """Stop the balancer and put a liar in its place, until the end of the run."""
    run.cluster.stop_node(BALANCER)
    liar = Liar(run.cluster, run.rng, **told)  # type: ignore[arg-type]
    run.undo.later(liar.close)
    return liar


def _genuine(run: Run) -> RoutingTable:
    """The table in force, from which lies begin."""
    run.eventually("a routing table is in force", lambda: run.kq.routing_table is not None)
    found = run.kq.routing_table
    if found is None:
        raise RuntimeError("no routing table came")
    return found


def forged_tables(run: Run) -> None:
    """Tables that nobody may take: of another key, garbage, expired, or older than the one in force."""
    genuine = _genuine(run)
    numbers = itertools.count(1)
    nodes, classes = list(genuine.nodes), list(genuine.classes)
    liar_key = stranger()
    installed = run.workload.kq.table_stats.installed

    def forge() -> bytes:
        epoch, counter = genuine.fencing_epoch + 1, next(numbers)
        kind = run.rng.randrange(4)
        if kind == 0:
            return table(liar_key, nodes, classes, order=(epoch, counter))
        if kind == 1:
            return run.rng.randbytes(run.rng.randint(1, 2_000))
        if kind == 2:
            return table(liar.identity.signing, nodes, classes, order=(epoch, counter), lifetime_ms=-3_600_000)
        return table(liar.identity.signing, nodes, classes, order=(0, 0))

    liar = _in_place(run)
    liar._tables = forge
    run.hold(1.2, 2.0)
    run.note(f"{liar.published} tables")
    stats = run.workload.kq.table_stats
    run.expect("forged tables reach the client", stats.refused > 0)
    run.expect("no forged table is taken", stats.installed <= installed + 1)


def absurd_tables(run: Run) -> None:
    """Well signed tables that send everybody to one node, or nobody anywhere, or by impossible numbers."""
    genuine = _genuine(run)
    numbers = itertools.count(1)
    nodes, classes = list(genuine.nodes), list(genuine.classes)
    one = run.rng.randrange(len(nodes))
    most = 2**63 - 1

    def forge() -> bytes:
        order = genuine.fencing_epoch + 1, next(numbers)
        key = liar.identity.signing
        kind = run.rng.randrange(7)
        if kind == 5:
            everywhere = list(range(len(nodes)))
            return table(key, nodes, classes, order=order, hints=[(group, everywhere) for group in range(2_000)])
        if kind == 6:
            return table(key, nodes, classes, order=order, cap=run.rng.choice((0, 1, most)))
        if kind == 0:
            return table(key, nodes, classes, order=order, price=lambda column: 0 if column == one else 10**9)
        if kind == 1:
            return table(key, nodes, classes, order=order, service_us=lambda row, column: 0)
        if kind == 2:
            return table(
                key, nodes, classes, order=order, service_us=lambda row, column: most, price=lambda column: most
            )
        if kind == 3:
            return table(key, ["nowhere", "elsewhere"], classes, order=order)
        return table(key, nodes, classes, order=order, groups=[(group, [one]) for group in range(64)])

    liar = _in_place(run)
    liar._tables = forge
    run.hold(1.2, 2.0)
    run.note(f"{liar.published} tables")


def lying_registry(run: Run) -> None:
    """It has aborted what is committed, knows of destructions that nobody ordered, and certifies garbage."""
    key_ids = [bytes.fromhex(run.kq.key_info(key.name).key_id) for key in run.workload.living()]
    liar = _in_place(run)
    for verb, how in lies(liar, key_ids).items():
        liar.answer(verb, how)
    run.hold(1.5, 2.5)
    run.note(f"{sum(liar.asked.values())} questions")
    run.expect("nodes ask it", sum(liar.asked.values()) > 0)


def old_books(run: Run) -> None:
    """It knows of no key, in an epoch far ahead or long past."""
    liar = _in_place(run)
    for verb, how in stale_books(run.rng.choice((0, 1, 2**31))).items():
        liar.answer(verb, how)
    run.hold(1.5, 2.5)


def garbled_registry(run: Run) -> None:
    """It answers with random bytes."""
    liar = _in_place(run)
    for verb, how in garbage(run.rng).items():
        liar.answer(verb, how)
    run.hold(1.5, 2.5)
    run.expect("nodes ask it", sum(liar.asked.values()) > 0)


def restarts(run: Run) -> None:
    """The balancer is stopped and started again and again: each time another fencing epoch."""
    for _ in range(3):
        run.cluster.stop_node(BALANCER)
        run.cluster.start_node(BALANCER)
        time.sleep(run.rng.uniform(0.0, 0.4))


LIES = replace(NO_BALANCER, create=frozenset({"*"}), destroy=frozenset({"*"}), refresh=frozenset({"*"}))
Act = Callable[[Run], None]
FAULTS = [
    Fault(
        "forged-tables",
        "balancer",
        "routing tables of another key, garbage, expired, old",
        NO_BALANCER,
        forged_tables,
        tells="clients refuse them",
        quick=True,
    ),
    Fault(
        "absurd-tables",
        "balancer",
        "signed routing tables with absurd contents",
        NO_BALANCER,
        absurd_tables,
    ),
    Fault("lying-registry", "balancer", "a registry that aborts and destroys what is committed", LIES, lying_registry),
    Fault("old-books", "balancer", "a registry that knows no key", LIES, old_books),
    Fault("garbled-registry", "balancer", "a registry that answers with random bytes", LIES, garbled_registry),
    Fault("balancer-restarts", "balancer", "the balancer is started again three times", NO_BALANCER, restarts),
]
