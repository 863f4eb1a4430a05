"""Owns the figures of the books of 50 nodes: registry, what a node knows of its keys, lists, plans and tables.

``bench/scale.py --only books`` runs it. Nodes are no processes here and have no tokens; what is measured is the real
code on real documents: orders, manifests and receipts are signed, the registry checks and commits them into its file,
and what the nodes know is made from what the registry has. Only the load that the balancer plans for is invented.
Times are processor time of this one process, so that others on the machine count for little.
"""

from __future__ import annotations

import gc
import hashlib
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import placement
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from figures import Row

from balancer.forecast import ForecastState, predict_load
from balancer.groups import GroupPlaces, overlaid
from balancer.history import History
from balancer.issue import TableIssuer
from balancer.loop import decide
from balancer.optimizer import PlacementSolver, RoutingSolver
from balancer.places import Crowd
from balancer.plan import TableStamp
from balancer.planner import placement_problem
from balancer.registry import SqliteRegistry
from engine.client.calls import KeySummary, merge_lists
from engine.protocol.manifest import (
    Cluster,
    CreateOrder,
    Holder,
    KeyManifest,
    Member,
    PolicyRule,
    Receipt,
    chain_pin,
    create_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    receipts,
)
from engine.protocol.requests import REPLY_CODECS, REQUEST_CODECS, KeyEntry, KeyList, ListKeys
from engine.protocol.signed import SigningKey, read_unverified, sign_envelope
from engine.protocol.table import TableReader
from nodes.catalogue import Catalogue
from nodes.store import Row as StoredRow

__all__ = ["NODES", "rows"]

NODES: Final = 50
SITES: Final = 5
THRESHOLD: Final = 2
SHARES: Final = 3
DEALER: Final = "node-0000"
GROUPS: Final = 1024
BUNDLE: Final = 64
"""Keys whose books are made durable together, as a node that makes many sends them."""
PAGE: Final = 200
NOW_MS: Final = 1_800_000_000_000
SEALED_BYTES: Final = 200
TICKS: Final = 24
TIMES: Final = 5
SOLVER_S: Final = 60.0

Teller = Callable[[str], None]


class Books:
    """A cluster's manifest with real keys of all members, and the registry of its balancer."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"node-{index:04d}" for index in range(NODES)]
        self.signing = {
            name: SigningKey(name, Ed25519PrivateKey.generate()) for name in ("op", "alice", "balancer", *self.names)
        }
        roles = {"op": "operator", "alice": "client", "balancer": "balancer"}
        members = [
            Member(
                name,
                roles.get(name, "node"),  # type: ignore[arg-type]
                key.public,
                bytes(32) if name == "op" else hashlib.sha256(name.encode()).digest(),
                "" if name in ("op", "alice") else "tcp://127.0.0.1:1",
                "",
                f"site{int(name[-4:]) % SITES}/room/rack/{name}" if name in self.names else "",
            )
            for name, key in self.signing.items()
        ]
        chain = issue_cluster_manifest(
            name="scale",
            members=members,
            rules=[PolicyRule("alice", "*", ["*"])],
            operators=[self.signing["op"]],
            groups=GROUPS,
        )
        self.cluster: Cluster = open_chain(chain, chain_pin(chain))
        self.path = folder / "registry.db"
        self.registry = self.open()

    def close(self) -> None:
        """Close the registry."""
        self.registry.close()

    def open(self) -> SqliteRegistry:
        """The registry, from its file."""
        return SqliteRegistry(self.path, self.cluster, self.signing["balancer"], NOW_MS)

    def commit(self, numbers: range) -> None:
        """Make these keys, as far as the books go."""
        for start in range(numbers.start, numbers.stop, BUNDLE):
            orders = [self._order(number) for number in range(start, min(start + BUNDLE, numbers.stop))]
            with self.registry.together():
                held = [self.registry.reserve(order, DEALER, NOW_MS) for order in orders]
            commits = [
                self._signed(order, each.attempt, each.holders) for order, each in zip(orders, held, strict=True)
            ]
            with self.registry.together():
                for made in self.registry.commit_all(commits, NOW_MS):
                    if isinstance(made, Exception):
                        raise made

    def _order(self, number: int) -> bytes:
        told = CreateOrder(
            hashlib.sha256(number.to_bytes(8, "big")).digest()[:16],
            f"scale/{number:07}",
            "aes-256-gcm",
            THRESHOLD,
            SHARES,
            "generate",
            NOW_MS + 60_000,
        )
        return sign_envelope("order.create", 1, create_orders.encode(told), self.signing["alice"])

    def _signed(self, order: bytes, attempt: int, nodes: Sequence[str]) -> tuple[bytes, list[bytes]]:
        """A manifest and all receipts."""
        told = create_orders.decode(read_unverified(order).payload)
        manifest = KeyManifest(
            key_id=told.key_id,
            name=told.name,
            version=1,
            epoch=1,
            attempt=attempt,
            algorithm=told.algorithm,
            threshold=told.threshold,
            holders=[
                Holder(node, x, hashlib.sha256(told.key_id + node.encode()).digest())
                for x, node in enumerate(nodes, 1)
            ],
            public_key=b"",
            check_value=bytes(32),
            order=order,
            previous=b"",
        )  # fmt: skip
        raw = sign_envelope("key", 1, key_manifests.encode(manifest), self.signing[DEALER])
        digest = read_unverified(raw).digest
        told_by = [
            sign_envelope("receipt", 1, receipts.encode(Receipt(told.key_id, digest, x)), self.signing[node])
            for x, node in enumerate(nodes, 1)
        ]
        return raw, told_by

    def stored(self, node: str) -> Iterator[StoredRow]:
        """What a node has of its keys, as the registry tells it, page by page; each document is a copy of its own."""
        after, more = 0, True
        while more:
            page = self.registry.sync(node, after)
            for entry in page.entries:
                raw = read_unverified(entry.manifest)
                told = key_manifests.decode(raw.payload)
                yield StoredRow(
                    told.key_id, 1, 1, told.attempt, told.name, "committed", raw.digest, entry.manifest,
                    entry.certificate, b"", os.urandom(SEALED_BYTES), NOW_MS,
                )  # fmt: skip
            after, more = page.last, page.more


def _cpu_ms(act: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun_s = time.process_time()
    act()
    return 1000 * (time.process_time() - begun_s)


def _median_ms(act: Callable[[], object], times: int = TIMES) -> float:
    return statistics.median(_cpu_ms(act) for _ in range(times))


def _share_bytes(books: Books, node: str) -> float:
    """What Python takes for a node's catalogue, for each key in it."""
    tracemalloc.start()
    try:
        catalogue = Catalogue(books.stored(node))
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / catalogue.share_count()
    finally:
        tracemalloc.stop()


# --- what grows with the keys ---


def _list(catalogues: Sequence[Catalogue]) -> int:
    """Every node's list page by page, coded and read as by a client, and merged; how many keys it has."""
    asks, answers = REQUEST_CODECS["list"], REPLY_CODECS["list"]

    def pages(catalogue: Catalogue) -> list[KeySummary]:
        found: list[KeySummary] = []
        after = ""
        while True:
            asked = asks.decode(asks.encode(ListKeys("*", after, PAGE)))
            entries: list[KeyEntry] = []
            for name in catalogue.names(asked.after):
                entry = catalogue.by_name(name)
                if entry is None:
                    continue
                if len(entries) == asked.limit:
                    break
                told = entry.manifest
                entries.append(KeyEntry(name, told.algorithm, told.version, told.threshold, told.shares, "enabled", 0))
            page = answers.decode(answers.encode(KeyList(entries, len(entries) == asked.limit)))
            found += [
                KeySummary(each.key, each.algorithm, each.version, each.threshold, each.shares) for each in page.entries
            ]
            if not page.more:
                return found
            after = page.entries[-1].key

    return len(merge_lists(map(pages, catalogues)))


def _look(books: Books, keys: int) -> Iterator[tuple[str, float, str]]:
    registry, node = books.registry, books.names[7]
    yield (
        "disk of the registry",
        sum(each.stat().st_size for each in books.path.parent.glob("registry.db*")) / 2**20,
        "MiB",
    )
    yield "keys are counted by node", _median_ms(lambda: registry.holdings(NOW_MS)), "ms"
    yield "keys are counted", _median_ms(registry.count), "ms"
    found: list[int] = []
    look = _median_ms(
        lambda: registry.places(lambda places: found.append(len(places.crowds()) + places.count_lacking(NOW_MS)))
    )
    yield "the mover looks where the keys are", look, "ms"
    yield "kinds and places of keys", float(found[-1]), "crowds"
    counts: list[int] = []
    pages = _cpu_ms(lambda: counts.append(sum(1 for _ in books.stored(node))))
    yield "a node reads all of its books", pages, "ms"
    yield "memory of a share on a node", _share_bytes(books, node), "bytes"
    catalogues = [Catalogue(books.stored(name)) for name in books.names]
    if sum(each.share_count() for each in catalogues) != keys * SHARES:
        raise RuntimeError("a share is missing")
    listed: list[int] = []
    yield (
        "all keys are listed, without any transport",
        _cpu_ms(lambda: listed.append(_list(catalogues))) / 1000,
        "s",
    )
    if listed != [keys]:
        raise RuntimeError(f"{listed[0]} keys are listed, of {keys}")
    longest = max(
        _cpu_ms(lambda at=at: _list_page(catalogues[7], at))
        for at in ("", f"scale/{keys // 2:07}")  # type: ignore[misc]
    )
    yield "a page of a node's list", longest, "ms"
    yield "a node looks for what waits", _median_ms(catalogues[7].prepared), "ms"
    registry.close()
    opened: list[SqliteRegistry] = []
    yield "the registry is opened", _cpu_ms(lambda: opened.append(books.open())), "ms"
    books.registry = opened[0]


def _list_page(catalogue: Catalogue, after: str) -> int:
    names = catalogue.names(after)
    return sum(1 for _, name in zip(range(PAGE), names, strict=False) if catalogue.by_name(name))


# --- plans and tables ---


def _held(books: Books) -> dict[int, Crowd]:
    """The crowd of most keys of each group."""
    best: dict[int, tuple[int, Crowd]] = {}
    for crowd, keys in books.registry.places(lambda places: places.crowds()).items():
        if keys > best.get(crowd.group, (0, crowd))[0]:
            best[crowd.group] = (keys, crowd)
    return {group: crowd for group, (_, crowd) in best.items()}


def _loop(books: Books) -> Iterator[tuple[str, float, str]]:
    """Ticks of the control loop and a plan for where the keys are; the load is the other bench's."""
    load = placement.Cluster(NODES, GROUPS)
    history, solver = History(load.names, tick_ms=1000, ticks=600), RoutingSolver()
    issuer, reader = TableIssuer(books.signing["balancer"]), TableReader()
    held, rule = _held(books), GroupPlaces()
    state: ForecastState | None = None
    ticks, reads, wholes, parts = [], [], [], []
    for tick in range(1, TICKS + 1):
        reports, begun_s = load.reports(), time.process_time()
        history.observe(tick, reports)
        snapshot = history.snapshot()
        forecast = predict_load(snapshot, state)
        state = forecast.state
        warm = [group for _, group in snapshot.pairs]
        places = overlaid(
            rule.of(books.cluster, snapshot.nodes, warm, SHARES),
            {group: crowd.holders for group, crowd in held.items()},
            snapshot.nodes,
        )
        stamp = TableStamp(1, tick, 1000 * tick, 1000 * tick + 10_000, 1)
        issued = issuer.issue(decide(snapshot, stamp, SOLVER_S, forecast, solver=solver, places=places))
        ticks.append(1000 * (time.process_time() - begun_s))
        reads.append(
            _cpu_ms(lambda raw=issued.message, now=1000 * tick: reader.read(raw, books.cluster, now))  # type: ignore[misc]
        )
        (wholes if issued.message == issued.whole else parts).append(len(issued.message))
    late = ticks[TICKS // 2 :]
    yield "tick of the balancer", statistics.median(late), "ms"
    yield "routing table, whole", float(max(wholes)), "bytes"
    if parts:
        yield "routing table, what has changed", statistics.median(parts), "bytes"
    yield "routing table, checked and read", statistics.median(reads), "ms"
    asked = placement_problem(snapshot, forecast, books.cluster, places, (THRESHOLD, SHARES), held)
    if asked is None:
        raise RuntimeError("no group is warm")
    yield "warm placement groups", float(len(asked[1])), "groups"
    yield "plan of where the groups go", _median_ms(lambda: PlacementSolver().solve(asked[0], SOLVER_S), 3), "ms"


# --- all of it ---


def rows(folder: Path, steps: Sequence[int], tell: Teller) -> list[Row]:
    """The rows of all steps, each beside the first step's."""
    books = Books(folder)
    first: dict[str, float] = {}
    result: list[Row] = []

    def add(keys: int, name: str, value: float, unit: str) -> None:
        peer = first.get(name)
        told = f"{NODES} nodes, {keys:,} keys: {name}"
        if peer is None:
            first[name] = value
            result.append(Row(told, value, unit))
        else:
            result.append(Row(told, value, unit, f"{steps[0]:,} keys", peer, value / peer if peer else None))
        tell(f"{told}: {value:,.4g} {unit}")

    with closing(books):
        made = 0
        for keys in steps:
            begun_s = time.process_time()
            books.commit(range(made, keys))
            add(
                keys, "a key's books, with all signatures", 1000 * (time.process_time() - begun_s) / (keys - made), "ms"
            )
            made = keys
            for found in (*_look(books, keys), *_loop(books)):
                add(keys, *found)
    return result
