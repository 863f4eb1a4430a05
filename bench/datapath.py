"""Owns the targets of the data path and measures each beside its peer; `make bench-datapath`.

All contenders are alive together in one run and take turns: blocks of 100 operations, the order reversed each round,
and a ratio is the median of the ratios round by round. F is the operation straight on a SoftHSM token through
python-pkcs11 (a session key) plus an echo over a bare CURVE socket (256 bytes there, 128 back), in the same rotation.
The cluster is a real one (3-of-5) with policy, audit, CURVE and limits at their defaults. The exit code is 0 whatever
the figures say.

It writes ``build/bench/datapath.json``, a list of rows; ``met`` and ``stretch_met`` are null where nothing is promised
for a placement. ``foreign`` and ``steal`` are percent of the machine's CPU that others used meanwhile; a row with more
than ``NOISY`` of both together says nothing, and is marked so.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table
from rig import (
    DATA,
    DIGEST,
    HERE,
    CClient,
    MissingPeer,
    Noise,
    NoiseMeter,
    Pair,
    Rig,
    machine,
    median_ratio,
    medians,
    percentile,
    pss_kib,
    rotate,
)

from engine import ALGORITHMS, EngineError
from engine.client.config import load_identity
from engine.client.transport import Channel, ask
from engine.keys import RequestType
from engine.protocol.audit import REPLY, Record
from engine.protocol.requests import Empty
from engine.protocol.signed import SigningKey
from engine.sharing import SecretBuffer
from nodes.audit import AuditLog

OUTPUT: Final = HERE.parent / "build" / "bench" / "datapath.json"
NOISY: Final = 10.0
REFERENCE_GCM_US: Final = 10.0
"""What an AES-GCM of 1 KiB straight on the token is taken to be where a target is told beside it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised of a row; ``least`` where more is better."""

    must: float
    stretch: float
    least: bool = False

    def met(self, value: float, bound: float) -> bool:
        """Whether the value keeps the bound."""
        return value >= bound if self.least else value <= bound


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table and one object of the file."""

    name: str
    placement: str
    value: float
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    target: float | None
    stretch: float | None
    met: bool | None
    stretch_met: bool | None
    foreign: float
    steal: float


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    rounds: int
    block: int
    seconds: float
    """Of each of the throughputs, in each round."""
    batch: int
    """Operations of one pipelined block."""
    cold: int
    """Cold operations."""
    memory: int
    """Warm operations whose growth of memory is told."""
    restarts: int
    open_seconds: float
    """Of one open-loop run, of which there are as many as ``open_rounds`` of each kind."""
    open_rounds: int
    stages: int


FULL: Final = Scale(30, 100, 0.5, 640, 100, 1_000_000, 5, 4.0, 4, 8_000)
QUICK: Final = Scale(2, 20, 0.2, 64, 4, 2_000, 1, 0.4, 1, 300)


class Book:
    """The rows so far; ``wanted`` says which to keep."""

    def __init__(self, only: str, told: Callable[[str], None]) -> None:
        self.rows: list[Row] = []
        self._only = only
        self._tell = told

    def wants(self, *names: str) -> bool:
        """Whether one of these rows is to be measured."""
        return any(self._only in name for name in names)

    def add(
        self,
        name: str,
        placement: str,
        noise: Noise,
        *,
        value: float,
        unit: str,
        peer: str = "",
        peer_value: float | None = None,
        ratio: float | None = None,
        target: Target | None = None,
        judged: float | None = None,
    ) -> None:
        """Take in a row; what a target is held against is ``judged``, or the ratio where there is one, or the value."""
        if not self.wants(name):
            return
        held = judged if judged is not None else value if ratio is None else ratio
        row = Row(
            name,
            Rig.PLACEMENTS[placement],
            round(value, 3),
            unit,
            peer,
            None if peer_value is None else round(peer_value, 3),
            None if ratio is None else round(ratio, 4),
            target and target.must,
            target and target.stretch,
            target and target.met(held, target.must),
            target and target.met(held, target.stretch),
            round(noise.foreign, 1),
            round(noise.steal, 1),
        )
        self.rows.append(row)
        told = f"{row.value:g} {unit}" + (f", {row.ratio:g} of {peer}" if ratio is not None else "")
        self._tell(f"{name} ({row.placement}): {told}")


# --- the groups of rows -----------------------------------------------------------------------------------------------


def _warm(rig: Rig, scale: Scale, placement: str, book: Book) -> None:
    """One operation at a time: medians, and tails beside the bare echo's."""
    names = ("warm sign / F", "warm GCM 1 KiB / F", "warm sign / p11-kit", "tail sign", "tail GCM 1 KiB")
    in_c = {"sign": "warm sign, client in C / F", "gcm": "warm GCM 1 KiB, client in C / F"}
    if not book.wants(*names, *in_c.values()):
        return
    contenders: dict[str, Callable[[], object] | CClient] = {
        "straight sign": rig.straight.sign,
        "straight gcm": rig.straight.gcm,
        "echo": rig.echo.exchange,
        "sign": lambda: rig.kq.sign("sign", digest=DIGEST),
        "gcm": lambda: rig.kq.encrypt("gcm", DATA),
    }
    if rig.p11_uses is not None:
        contenders["p11-kit sign"] = rig.p11_uses.sign
    with rig.c_clients(scale.block) as clients, rig.placed(placement, clients=clients.values()):
        contenders |= {f"{what} in C": client for what, client in clients.items()}
        meter = NoiseMeter()
        found = rotate(contenders, scale.rounds, scale.block)
        noise = meter.noise()
    echo = medians(found, "echo")
    targets = {
        ("sign", "one"): Target(1.05, 0.95),
        ("gcm", "one"): Target(1.05, 0.95),
        ("sign", "two"): Target(0.85, 0.75),
        ("gcm", "two"): Target(0.70, 0.60),
    }
    rows = {"sign": names[0], "gcm": names[1], "sign in C": in_c["sign"], "gcm in C": in_c["gcm"]}
    for what, name in rows.items():
        own = medians(found, what)
        floor = [a + b for a, b in zip(medians(found, f"straight {what.split()[0]}"), echo, strict=True)]
        book.add(
            name,
            placement,
            noise,
            value=statistics.median(own),
            unit="us",
            peer="F: straight + bare echo",
            peer_value=statistics.median(floor),
            ratio=median_ratio(own, floor),
            target=targets.get((what, placement)),
        )
    if "p11-kit sign" in found:
        own, peer = medians(found, "sign"), medians(found, "p11-kit sign")
        book.add(
            names[2],
            placement,
            noise,
            value=statistics.median(own),
            unit="us",
            peer="p11-kit remoting",
            peer_value=statistics.median(peer),
            ratio=median_ratio(own, peer),
            target={"two": Target(0.65, 0.50), "free": Target(1.0, 0.9)}.get(placement),
        )
    for what, name in (("sign", names[3]), ("gcm", names[4])):
        tails = {}
        for each in (what, "echo"):
            taken = [us for block in found[each] for us in block]
            tails[each] = percentile(taken, 0.99) / statistics.median(taken)
        book.add(
            name,
            placement,
            noise,
            value=tails[what],
            unit="p99/p50",
            peer="the bare echo's p99/p50",
            peer_value=tails["echo"],
            ratio=tails[what] / tails["echo"],
            target=Target(1.2, 1.0),
        )


def _pipelined(rig: Rig, scale: Scale, placement: str, book: Book) -> None:
    """64 requests under way, beside as many operations one after the other on the token."""
    names = {"sign": "64 outstanding, sign / straight", "gcm": "64 outstanding, GCM 1 KiB / straight"}
    if not book.wants(*names.values()):
        return
    batch = scale.batch

    def repeat(act: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(batch):
                act()

        return run

    contenders: dict[str, Callable[[], object]] = {
        "straight sign": repeat(rig.straight.sign),
        "straight gcm": repeat(rig.straight.gcm),
        "sign": lambda: rig.kq.sign_many("sign", [DATA] * batch),
        "gcm": lambda: rig.kq.encrypt_many("gcm", [DATA] * batch),
    }
    with rig.placed(placement):
        meter = NoiseMeter()
        found = rotate(contenders, max(2, scale.rounds * 2 // 3), 1)
        noise = meter.noise()
    for what, target in (("sign", Target(0.60, 0.75, least=True)), ("gcm", Target(0.50, 0.70, least=True))):
        own, raw = medians(found, what), medians(found, f"straight {what}")
        book.add(
            names[what],
            placement,
            noise,
            value=batch / statistics.median(own) * 1e6,
            unit="1/s",
            peer="straight, python-pkcs11",
            peer_value=batch / statistics.median(raw) * 1e6,
            ratio=median_ratio(raw, own),
            target=target if placement != "one" else None,
        )


def _clients(rig: Rig, scale: Scale, placement: str, book: Book) -> None:
    """Eight client processes, each with one request under way, beside the same eight over p11-kit."""
    names = {"sign": "8 clients, ECDSA / p11-kit", "rsa": "8 clients, RSA-2048 / p11-kit"}
    if not book.wants(*names.values()) or rig.p11 is None:
        return
    crew = rig.crew
    found: dict[str, list[float]] = {}
    with rig.placed(placement, crew=True):
        meter = NoiseMeter()
        order = ["sign", "p11-sign", "rsa", "p11-rsa"]
        for number in range(max(2, scale.rounds // 4)):
            for what in order if number % 2 else reversed(order):
                found.setdefault(what, []).append(crew.rate(what=what, seconds=scale.seconds))
        noise = meter.noise()
    for what, target in (("sign", Target(1.5, 2.0, least=True)), ("rsa", Target(1.05, 1.2, least=True))):
        own, peer = found[what], found[f"p11-{what}"]
        book.add(
            names[what],
            placement,
            noise,
            value=statistics.median(own),
            unit="1/s",
            peer="p11-kit remoting",
            peer_value=statistics.median(peer),
            ratio=median_ratio(own, peer),
            target=target if placement == "free" else None,
        )


def _loading(rig: Rig, scale: Scale, placement: str, book: Book) -> None:
    """A session key out of locked memory into the token, one use, and out again."""
    name = "import + use + destroy of an AES key"
    if not book.wants(name):
        return
    algorithm = ALGORITHMS["aes-256-gcm"]
    with SecretBuffer.copy_of(os.urandom(32)) as material:

        def load_use_destroy() -> None:
            key = rig.lane.load(algorithm, material)
            rig.lane.encrypt(key, DATA, b"")
            key.destroy()

        with rig.placed(placement):
            meter = NoiseMeter()
            contenders: dict[str, Callable[[], object]] = {"load": load_use_destroy, "gcm": rig.straight.gcm}
            found = rotate(contenders, scale.rounds, scale.block)
            noise = meter.noise()
    own, raw = medians(found, "load"), medians(found, "gcm")
    ratio = median_ratio(own, raw)
    book.add(
        name,
        placement,
        noise,
        value=ratio * REFERENCE_GCM_US,
        unit="us beside a GCM of 10 us",
        peer="straight GCM 1 KiB, us",
        peer_value=statistics.median(raw),
        ratio=ratio,
        target=Target(35.0, 25.0),
        judged=ratio * REFERENCE_GCM_US,
    )


def _cold(rig: Rig, scale: Scale, placement: str, book: Book) -> None:
    """The first use of a key: grant, gathering, combining, loading, signing; beside a warm one and a durable record."""
    name = "cold sign 3-of-5 / (warm + durable append)"
    if not book.wants(name):
        return
    folder = rig.folder / f"audit-{placement}"
    log = AuditLog(
        folder,
        SigningKey("bench", Ed25519PrivateKey.generate()),
        boot="00000000",
        post=lambda call: call(),
        now_ms=lambda: time.time_ns() // 1_000_000,
    )
    record = Record(1, "bench", "00000000", 1, REPLY, member="bench", verb="sign", key="sign", outcome="ok")
    sign = lambda: rig.kq.sign("sign", digest=DIGEST)  # noqa: E731
    taken: dict[str, list[float]] = {"cold": [], "warm": [], "append": []}

    def timed(what: str, act: Callable[[], object]) -> None:
        begun = time.perf_counter_ns()
        act()
        taken[what].append((time.perf_counter_ns() - begun) / 1000)

    try:
        with rig.placed(placement, [sign]):
            meter = NoiseMeter()
            for number in range(scale.cold + 2):
                rig.kq.flush("sign")
                timed("cold", sign)
                for what, act in (("warm", sign), ("append", lambda: log.write(record, durable=True))):
                    for _ in range(3):
                        timed(what, act)
                if number == 1:
                    for each in taken.values():
                        each.clear()
            noise = meter.noise()
    finally:
        log.close()
    middle = {what: statistics.median(each) for what, each in taken.items()}
    floor = middle["warm"] + middle["append"]
    book.add(
        name,
        placement,
        noise,
        value=middle["cold"],
        unit="us",
        peer=f"warm {middle['warm']:.0f} + append {middle['append']:.0f}",
        peer_value=floor,
        ratio=middle["cold"] / floor,
        target=Target(5.0, 3.0),
    )


RSA_SHARE: Final = 0.10
LOAD_SHARE: Final = 0.40
OPEN_THREADS: Final = 4


def _mixed(rig: Rig, scale: Scale, placement: str, book: Book) -> None:
    """GCM beside RSA in an open loop at 40 % of the mix's capacity in a closed one, and GCM alone at its same rate."""
    name = "GCM p99, with RSA / alone"
    if not book.wants(name):
        return
    crew = rig.crew
    arguments = {"seconds": scale.open_seconds, "threads": OPEN_THREADS}
    ratios: list[float] = []
    p99s: dict[str, list[float]] = {"mixed": [], "alone": []}
    with rig.placed(placement, crew=True):
        meter = NoiseMeter()
        capacity = max(
            crew.rate(what="mix", seconds=scale.open_seconds / 2, rsa_share=RSA_SHARE, threads=threads)
            for threads in (1, 2)
        )
        rate = LOAD_SHARE * capacity / len(crew)
        runs = {"mixed": (rate, RSA_SHARE), "alone": (rate * (1 - RSA_SHARE), 0.0)}
        for number in range(scale.open_rounds):
            for what in runs if number % 2 else reversed(list(runs)):
                each, share = runs[what]
                said = crew.order("open", rate=each, rsa_share=share, seed=number, **arguments)
                p99s[what].append(percentile([us for one in said for us in one["gcm"]] or [0.0], 0.99))
            ratios.append(p99s["mixed"][-1] / max(1e-9, p99s["alone"][-1]))
        noise = meter.noise()
    book.add(
        name,
        placement,
        noise,
        value=statistics.median(p99s["mixed"]),
        unit="us",
        peer=f"alone, at 40 % of {capacity:.0f}/s",
        peer_value=statistics.median(p99s["alone"]),
        ratio=statistics.median(ratios),
        target=Target(2.0, 1.5),
    )


def _memory(rig: Rig, scale: Scale, book: Book) -> None:
    """What warm operations leave behind in the nodes that serve and in the clients."""
    names = {"node": "memory, worst node", "client": "memory, worst client"}
    if not book.wants(*names.values()):
        return
    crew, clients = rig.crew, 2
    warm_up, each = max(500, scale.memory // 20 // clients), scale.memory // clients
    meter = NoiseMeter()
    crew.order("bulk", only=clients, operations=warm_up)
    pids = {"node": list(rig.serving_pids().values()), "client": crew.pids[:clients]}
    before = {kind: [pss_kib(pid) for pid in group] for kind, group in pids.items()}
    crew.order("bulk", only=clients, operations=each)
    for kind, group in pids.items():
        now = [pss_kib(pid) for pid in group]
        grown = max(after - then for after, then in zip(now, before[kind], strict=True)) / 1024
        book.add(
            names[kind],
            "free",
            meter.noise(),
            value=grown,
            unit=f"MB more after {each * clients:,} GCM",
            peer="after the warm-up, MB",
            peer_value=max(before[kind]) / 1024,
            target=Target(10.0, 1.0) if each * clients >= FULL.memory else None,
        )


def _restart(rig: Rig, scale: Scale, book: Book) -> None:
    """From a node's bind to its first reply, for a client that was connected before the node went away."""
    name = "restarted node's first reply"
    if not book.wants(name):
        return
    cluster = rig.cluster
    node = cluster.nodes[-1]
    members = cluster.cluster.members
    identity = load_identity(cluster.client_config.parent / "identity.toml")
    port = int(members[node].endpoint.rpartition(":")[2])
    taken = []
    meter = NoiseMeter()
    with Channel(identity.transport, members) as channel:
        for _ in range(scale.restarts):
            ask(channel, node, RequestType.STATUS, Empty(), 5.0)
            cluster.kill(node)
            _await_listening(port, wanted=False)  # the kernel takes the dead process apart
            starter = threading.Thread(target=cluster.start_node, args=(node,))
            starter.start()
            _await_listening(port, wanted=True)
            until = time.monotonic() + 60
            bound = time.perf_counter_ns()
            while True:
                try:
                    ask(channel, node, RequestType.STATUS, Empty(), 2.0)
                    break
                except EngineError:
                    if time.monotonic() > until:
                        raise
            taken.append((time.perf_counter_ns() - bound) / 1e6)
            starter.join()
    book.add(
        name,
        "free",
        meter.noise(),
        value=statistics.median(taken),
        unit="ms",
        peer="worst of all",
        peer_value=max(taken),
        target=Target(20.0, 5.0),
    )


def _await_listening(port: int, *, wanted: bool) -> None:
    """Look until somebody, or nobody, listens on the port; the kernel's table has no event to wait for."""
    until = time.monotonic() + 60
    while _listens(port) is not wanted:
        if time.monotonic() > until:
            raise RuntimeError(f"port {port}: listening is still {not wanted} after a minute")
        time.sleep(0.0002)


def _listens(port: int) -> bool:
    """Whether something listens on the port, by the kernel's table (a connection would disturb)."""
    wanted = f":{port:04X} "
    with open("/proc/net/tcp", encoding="ascii") as stream:
        return any(wanted in line and line.split()[3] == "0A" for line in stream)


def _checks(rig: Rig, scale: Scale, book: Book) -> None:
    """Policy, audit and routing within a warm GCM, on one core, by the stage clock."""
    name = "policy + audit + routing in a warm GCM"
    if not book.wants(name):
        return
    from stages import measure

    meter = NoiseMeter()
    found = measure(rig, scale.stages)
    for place in found.gone:
        click.echo(f"NOT MEASURED, since it is not there: {place}")
    book.add(
        name,
        "one",
        meter.noise(),
        value=100 * found.checks_us / found.round_trip_us,
        unit="% of the round trip",
        peer=f"round trip; the checks {found.checks_us:.0f} us",
        peer_value=found.round_trip_us,
        target=Target(10.0, 5.0),
    )


SHARING: Final = "one token"
"""How the names of rows begin that have a cluster of their own, and are measured only when they are asked for."""


def _sharing(scale: Scale, book: Book) -> None:
    """Eight client processes at one node, and at two nodes on one token: what a second process is worth."""
    names = {"sign": "ECDSA", "rsa": "RSA-2048", "gcm": "AES-GCM 1 KiB"}
    with Pair() as pair:
        for what, name in names.items():
            one, both = (what + suffix for suffix in pair.SUFFIXES.values())
            for each in (one, both):
                pair.crew.rate(what=each, seconds=4 * scale.seconds)
            found: dict[str, list[float]] = {one: [], both: []}
            spread: list[float] = []
            meter = NoiseMeter()
            for number in range(max(2, scale.rounds // 2)):
                for each in (one, both) if number % 2 else (both, one):
                    before = pair.hits()
                    found[each].append(pair.crew.rate(what=each, seconds=scale.seconds))
                    if each == both:
                        served = [count - before[node] for node, count in pair.hits().items()]
                        spread.append(min(served) / max(1, sum(served)))
            book.add(
                f"{SHARING}, 8 clients at 2 nodes / at 1: {name}",
                "free",
                meter.noise(),
                value=statistics.median(found[both]),
                unit="1/s",
                peer=f"1 node; of 2 the lesser served {statistics.median(spread):.0%}",
                peer_value=statistics.median(found[one]),
                ratio=median_ratio(found[both], found[one]),
            )


PLACED: Final = (_warm, _pipelined, _clients, _loading, _cold, _mixed)
UNPLACED: Final = (_memory, _restart, _checks)


# --- the command ------------------------------------------------------------------------------------------------------


def run(rig: Rig, scale: Scale, placements: Iterable[str], book: Book) -> None:
    """Measure what is wanted, one group after the other."""
    for placement in placements:
        for group in PLACED:
            group(rig, scale, placement, book)
    for last in UNPLACED:
        last(rig, scale, book)


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(title="the data path beside its peers (medians; ratios are medians of the ratios of paired rounds)")
    for column in ("what", "placement", "value", "peer", "ratio", "must", "stretch", "", "foreign/steal %"):
        table.add_column(column, justify="left" if column in ("what", "placement", "") else "right")
    for row in rows:
        verdict = "" if row.met is None else "[green]met[/green]" if row.met else "[red]missed[/red]"
        if row.stretch_met:
            verdict = "[bold green]stretch[/bold green]"
        if row.foreign + row.steal > NOISY:
            verdict = f"[dim]noisy[/dim] {verdict}"
        table.add_row(
            row.name,
            row.placement,
            f"{row.value:,.4g} {row.unit}",
            "-" if row.peer_value is None else f"{row.peer_value:,.4g} ({row.peer})",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            "-" if row.target is None else f"{row.target:g}",
            "-" if row.stretch is None else f"{row.stretch:g}",
            verdict,
            f"{row.foreign:.0f}/{row.steal:.0f}",
        )
    Console(width=190).print(table)


def _overlaid(scale: Scale, rounds: int | None, memory: int | None) -> Scale:
    values = asdict(scale)
    if rounds is not None:
        values["rounds"] = rounds
    if memory is not None:
        values["memory"] = memory
    return Scale(**values)


@click.command()
@click.option(
    "--only", default="", metavar="TEXT", help=f"Rows whose name holds this text; {SHARING!r} has some more measured."
)
@click.option("--rounds", type=click.IntRange(1, 1000), help="Rounds of each rotation (30; 2 with --quick).")
@click.option(
    "--memory-ops", type=click.IntRange(1000, 10_000_000), help="Operations of the row on memory (1,000,000)."
)
@click.option("--quick", is_flag=True, help="A smoke run of a minute: few operations, figures that mean little.")
@click.option(
    "--placement",
    "placements",
    multiple=True,
    type=click.Choice(list(Rig.PLACEMENTS)),
    help="Only this one; repeatable.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=OUTPUT, help="Where the rows go.")
def main(
    only: str, rounds: int | None, memory_ops: int | None, quick: bool, placements: tuple[str, ...], output: Path
) -> None:
    """Measure the data path beside its peers."""
    begun = time.monotonic()
    scale = _overlaid(QUICK if quick else FULL, rounds, memory_ops)
    book = Book(only, lambda text: click.echo(f"[{time.monotonic() - begun:4.0f} s] {text}"))
    click.echo(f"machine: {json.dumps(machine())}")
    try:
        if only.startswith(SHARING):
            _sharing(scale, book)
        else:
            with Rig() as rig:
                run(rig, scale, placements or tuple(Rig.PLACEMENTS), book)
    except MissingPeer as missing:
        raise click.ClickException(str(missing)) from None
    if not book.rows:
        raise click.ClickException(f"no row's name holds {only!r}")
    show(book.rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([asdict(row) for row in book.rows], indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(book.rows)} rows in {output}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
