"""``keyquorum demo``: the main job before the reader's eyes, on a real local cluster. Any deviation is exit code 1."""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.client.client import Engine, connect
from engine.client.local import LocalCluster
from engine.errors import EngineError, QuorumUnavailable
from engine.keys import RequestType
from engine.sharing import check_placement

__all__ = ["demo"]

NODES: Final = 5
DOMAINS: Final = 3
THRESHOLD: Final = 3
WARM_ROUNDS: Final = 200
COLD_ROUNDS: Final = 10
STEPS: Final = 11
DEADLINE_S: Final = 5.0
SECRET_KEY, SIGNING_KEY, MAC_KEY = "orders", "tls", "hooks"
TABLE_WAIT_S: Final = 10.0
TABLES_WAITED_FOR: Final = 4
"""The first tables know next to nothing of the load."""

T = TypeVar("T")


class Deviation(EngineError):
    """The demo saw something else than it must."""

    code = "deviation"


def expect(condition: bool, text: str) -> None:
    """Go on only if the condition holds."""
    if not condition:
        raise Deviation(text)


@dataclass(slots=True)
class _Results:
    """What the operations gave, to be held against what they give later."""

    ciphertext: bytes = b""
    signature: bytes = b""
    tag: bytes = b""
    operations: int = 0
    warm_us: dict[str, list[float]] = field(default_factory=dict)
    cold_us: dict[str, list[float]] = field(default_factory=dict)


class _Demo:
    """One run of the demo: its cluster, its client and what it has seen."""

    def __init__(self, console: Console, progress: Progress, document: bytes, scratch: Path) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task("starting", total=STEPS)
        self._document = document
        self._scratch = scratch
        self.results = _Results()

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._progress.update(self._task, description=text)

    def done(self, text: str) -> None:
        """End a step with what it showed."""
        self._progress.advance(self._task)
        self._console.print(f"[green]✓[/green] {text}", highlight=False)

    def _count(self, call: Callable[[], T]) -> T:
        self.results.operations += 1
        return call()

    # --- the steps ---

    def create(self, kq: Engine, cluster: LocalCluster) -> None:
        """Keys are made, split 3-of-5 and placed apart."""
        self.step("making keys")
        for name, algorithm in (
            (SECRET_KEY, "aes-256-gcm"),
            (SIGNING_KEY, "ecdsa-p256-sha256"),
            (MAC_KEY, "hmac-sha256"),
        ):
            self.results.operations += 1
            info = kq.create_key(name, algorithm, threshold=THRESHOLD, shares=NODES)
            expect(set(info.stored) == set(cluster.nodes), f"{name}: stored on {info.stored} alone")
            members = cluster.cluster
            told = check_placement(members.locations, info.holders, THRESHOLD, domain_level=members.domain_level)
            expect(not told, f"{name}: {told[0] if told else ''}")
        self.done(f"3 keys made, each split {THRESHOLD}-of-{NODES}; no failure domain holds {THRESHOLD} shares")
        self._console.print(_placement(kq, cluster))

    def operate(self, kq: Engine, document: str) -> None:
        """Encrypt, decrypt, sign and MAC a real file."""
        self.step("using the keys")
        results = self.results
        results.ciphertext = self._count(lambda: kq.encrypt(SECRET_KEY, self._document, associated_data=b"LICENSE"))
        expect(self._document[:32] not in results.ciphertext, "the ciphertext holds plaintext")
        results.signature = self._count(lambda: kq.sign(SIGNING_KEY, self._document))
        results.tag = self._count(lambda: kq.mac(MAC_KEY, self._document))
        self.check(kq)
        self.done(f"{document} ({len(self._document)} bytes) encrypted, decrypted, signed, MAC'd and checked")

    def check(self, kq: Engine) -> None:
        """What was made before still decrypts and verifies, and new results are right too."""
        results = self.results
        plain = self._count(lambda: kq.decrypt(SECRET_KEY, results.ciphertext, associated_data=b"LICENSE"))
        expect(plain == self._document, "decryption gave another document")
        self._count(lambda: kq.verify(SIGNING_KEY, self._document, results.signature))
        self._count(lambda: kq.verify_mac(MAC_KEY, self._document, results.tag))
        expect(self._count(lambda: kq.mac(MAC_KEY, self._document)) == results.tag, "the MAC is another one")
        fresh = self._count(lambda: kq.sign(SIGNING_KEY, self._document))
        self._count(lambda: kq.verify(SIGNING_KEY, self._document, fresh))
        again = self._count(lambda: kq.encrypt(SECRET_KEY, self._document))
        expect(self._count(lambda: kq.decrypt(SECRET_KEY, again)) == self._document, "a fresh ciphertext is wrong")

    def openssl(self, kq: Engine) -> None:
        """The signature is verified by OpenSSL's command with the exported public key."""
        self.step("verifying with openssl")
        files = {"key.pem": kq.public_key(SIGNING_KEY).encode(), "sig.der": self.results.signature}
        files["document"] = self._document
        for name, data in files.items():
            (self._scratch / name).write_bytes(data)
        command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "sig.der", "document"]
        ended = subprocess.run(command, cwd=self._scratch, capture_output=True, text=True, timeout=20, check=False)
        told = (ended.stdout + ended.stderr).strip()
        expect(ended.returncode == 0 and "Verified OK" in told, f"openssl says: {told}")
        self.done(f"openssl, given the exported public key, says: {told}")

    def measure(self, kq: Engine) -> None:
        """Latencies of cold and of warm operations."""
        self.step("measuring")
        results = self.results
        operations: dict[str, tuple[str, Callable[[], object]]] = {
            "encrypt 1 KiB": (SECRET_KEY, lambda: kq.encrypt(SECRET_KEY, self._document[:1024])),
            "decrypt 11 KiB": (
                SECRET_KEY,
                lambda: kq.decrypt(SECRET_KEY, results.ciphertext, associated_data=b"LICENSE"),
            ),
            "sign": (SIGNING_KEY, lambda: kq.sign(SIGNING_KEY, self._document)),
            "mac 1 KiB": (MAC_KEY, lambda: kq.mac(MAC_KEY, self._document[:1024])),
        }
        for label, (name, call) in operations.items():
            results.cold_us[label] = []
            for _ in range(COLD_ROUNDS):
                kq.flush(name)
                results.cold_us[label].append(self._timed(call))
            results.warm_us[label] = [self._timed(call) for _ in range(WARM_ROUNDS)]
        self.done(f"measured {len(operations)} operations, {COLD_ROUNDS} times cold and {WARM_ROUNDS} times warm each")

    def _timed(self, call: Callable[[], object]) -> float:
        begun = time.perf_counter_ns()
        self._count(call)
        return (time.perf_counter_ns() - begun) / 1000

    def routing(self, kq: Engine) -> Table:
        """The signed routing table that the client uses, with the forecast that made it."""
        self.step("waiting for the balancer's forecast")
        until = time.monotonic() + TABLE_WAIT_S
        wanted = f"{RequestType.SIGN}/ecdsa-p256-sha256"
        while (table := kq.routing_table) is None or wanted not in table.classes or table.counter < TABLES_WAITED_FOR:
            expect(time.monotonic() < until, f"no routing table with {wanted} came within {TABLE_WAIT_S:.0f} s")
            self._count(lambda: kq.sign(SIGNING_KEY, self._document))
        self.done(f"the client follows the balancer's signed routing table no. {table.counter}")
        return _routing(table)

    def lose_two(self, kq: Engine, cluster: LocalCluster) -> list[str]:
        """Two nodes die; nothing is noticed but a moment."""
        self.step("killing two nodes")
        dead = list(cluster.nodes[:2])
        for node in dead:
            cluster.kill(node)
        begun = time.monotonic()
        self.check(kq)
        kq.flush()
        self.check(kq)
        self.done(
            f"{' and '.join(dead)} killed (SIGKILL): the same operations succeed, warm and cold "
            f"({time.monotonic() - begun:.2f} s for all)"
        )
        return dead

    def lose_third(self, kq: Engine, cluster: LocalCluster, dead: list[str]) -> list[str]:
        """A third dies: loaded keys are still served; after a flush, fewer than t shares are left."""
        self.step("killing a third node")
        for name in (SECRET_KEY, SIGNING_KEY, MAC_KEY):
            expect(len(kq.prewarm(name)) == NODES - len(dead), f"{name}: not every node that lives could load it")
        third = cluster.nodes[2]
        cluster.kill(third)
        self.check(kq)
        self.done(f"{third} killed too: keys that are loaded are still served")
        kq.flush()
        begun = time.monotonic()
        try:
            kq.decrypt(SECRET_KEY, self.results.ciphertext, associated_data=b"LICENSE", timeout=DEADLINE_S)
        except QuorumUnavailable as error:
            waited = time.monotonic() - begun
            expect(waited <= DEADLINE_S, f"the error came after {waited:.1f} s, the deadline is {DEADLINE_S:.0f} s")
            expect({*dead, third} <= set(error.missing), f"the error names {error.missing}, not all that are dead")
            self.done(f"caches flushed: refused after {waited:.2f} s, missing {', '.join(sorted(error.missing))}")
            self._console.print(f"  [dim]QuorumUnavailable: {error}[/dim]", highlight=False)
        else:
            raise Deviation(f"a key was combined with {NODES - 3} of {THRESHOLD} shares")
        return [*dead, third]

    def come_back(self, kq: Engine, cluster: LocalCluster, dead: list[str]) -> None:
        """The nodes come back from their disks; nothing is lost."""
        self.step("restarting the nodes from their disks")
        for node in dead:
            cluster.start_node(node)
        self.check(kq)
        for member in kq.status():
            expect(member.error is None, f"{member.name}: {member.error}")
            shares = getattr(member.status, "shares", 3)
            expect(shares == 3, f"{member.name} holds {shares} shares, 3 were stored")
        self.done(f"{', '.join(dead)} restarted: every share is there, everything works, nothing was lost")


def _placement(kq: Engine, cluster: LocalCluster) -> Table:
    info = kq.key_info(SECRET_KEY)
    table = Table(title=f"where the shares of {SECRET_KEY!r} are", title_justify="left", title_style="bold")
    for column in ("failure domain", "node", "location"):
        table.add_column(column)
    for node in sorted(info.holders, key=lambda name: cluster.cluster.nodes[name].location):
        location = cluster.cluster.nodes[node].location
        table.add_row("/".join(location.split("/")[: cluster.cluster.domain_level]), node, location)
    return table


def _routing(routes: Any) -> Table:
    table = Table(title="forecast per second and service times in force", title_justify="left", title_style="bold")
    table.add_column("request class", overflow="fold")
    table.add_column("per s (P90)", justify="right", no_wrap=True)
    for node in routes.nodes:
        table.add_column(node, justify="right")
    for row, (name, (mean, high)) in enumerate(zip(routes.classes, routes.forecast, strict=True)):
        if not name.startswith(("generate/", "import/")):
            times = (f"{routes.service_us(row, column):.0f} µs" for column in range(len(routes.nodes)))
            table.add_row(name, f"{mean / 1000:.1f} ({high / 1000:.1f})", *times)
    table.add_row("[dim]node price[/dim]", "", *(f"[dim]{price / 1000:.2f}[/dim]" for price in routes.price))
    return table


def _summary(results: _Results) -> Table:
    table = Table(title="summary", title_justify="left", title_style="bold")
    for column in ("operation", "cold p50", "cold p99", "warm p50", "warm p99"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for label, warm in results.warm_us.items():
        cold = results.cold_us[label]
        row = [statistics.median(cold), _p99(cold), statistics.median(warm), _p99(warm)]
        table.add_row(label, *(f"{value / 1000:.2f} ms" for value in row))
    return table


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def _license() -> tuple[str, bytes]:
    """The project's LICENSE, from the installed package's metadata."""
    for path in importlib.metadata.files("keyquorum") or ():
        if path.name == "LICENSE":
            return "LICENSE", Path(str(path.locate())).read_bytes()
    raise Deviation("the installed package has no LICENSE file; name one with --file")


def _run(console: Console, stack: ExitStack, path: Path | None, source: Path | None) -> None:
    label, document = (source.name, source.read_bytes()) if source else _license()
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keyquorum-demo-")))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not console.is_terminal))
    show = _Demo(console, progress, document, scratch)
    show.step(f"starting {NODES} nodes with a SoftHSM token each, and the balancer")
    begun = time.monotonic()
    cluster = LocalCluster(nodes=NODES, threshold=THRESHOLD, domains=DOMAINS, path=path, on_event=show.step)
    stack.enter_context(cluster)
    show.done(
        f"cluster up: {NODES} node processes in {DOMAINS} failure domains, a SoftHSM token each, and the balancer, "
        f"over CURVE on 127.0.0.1 ({time.monotonic() - begun:.1f} s)"
    )
    kq = stack.enter_context(connect(cluster.client_config))
    show.create(kq, cluster)
    show.operate(kq, label)
    show.openssl(kq)
    show.measure(kq)
    routes = show.routing(kq)
    dead = show.lose_two(kq, cluster)
    dead = show.lose_third(kq, cluster, dead)
    show.come_back(kq, cluster, dead)
    progress.stop()
    console.print(_summary(show.results))
    console.print(routes)
    seconds = time.monotonic() - begun
    console.print(f"{show.results.operations} operations in {seconds:.1f} s; nothing was lost.")


@click.command()
@click.option("--keep", is_flag=True, help="Keep the cluster's files (its processes end all the same).")
@click.option("--path", type=click.Path(path_type=Path), help="Folder for the cluster; a new temporary one by default.")
@click.option("--file", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File to use.")
def demo(keep: bool, path: Path | None, source: Path | None) -> None:
    """Start a real local cluster and show the main job on it.

    Five nodes with a SoftHSM token each and the balancer are started on 127.0.0.1; keys are made, used, lost and found
    again. Exit code 0 if everything went as it must, else 1. Everything is cleaned up, the files unless --keep.
    """
    console = Console()
    if shutil.which("openssl") is None:
        raise click.ClickException("the openssl command is needed to verify the signature; install openssl")
    if keep and path is None:
        path = Path(tempfile.mkdtemp(prefix="keyquorum-demo-"))
    if path is not None and path.exists() and any(path.iterdir()):
        raise click.ClickException(f"{path} is not empty; the demo wants a folder of its own")
    try:
        with ExitStack() as stack:
            _run(console, stack, path, source)
    except EngineError as error:
        console.print(f"[red]✗ {type(error).__name__}:[/red] {error}", highlight=False)
        raise click.exceptions.Exit(1) from None
    finally:
        if path is not None and not keep:
            shutil.rmtree(path, ignore_errors=True)
    if path is not None and keep:
        console.print(f"The cluster's files are in {path}.")
