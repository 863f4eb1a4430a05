"""Each named step of what changes a key, and each party to it that may die just then, on real processes.

One process stops at a failpoint, another one, or that, dies by SIGKILL, the first goes on, and the dead one comes back.
Then the key is whole: all have the same epoch, every holder puts the key together, and nothing is left of older shares.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from balancing_client import Mover
from steering import prefer

import engine
from engine import ClientSettings, Engine, LocalCluster
from engine.failpoints import POINTS, VARIABLE

R = TypeVar("R")
NODES = COORDINATOR, STAYING, LEAVING, COMING = "node1", "node2", "node3", "node4"
BALANCER = "balancer"
BEFORE, AFTER = (COORDINATOR, LEAVING, STAYING), (COORDINATOR, STAYING, COMING)
"""The holders that a key has, and those to which it goes; the first one coordinates."""
PATIENCE_S = 60.0
ORDER_S = 5.0
"""What the client gives an order in whose middle somebody dies; however that ends, the next one must do."""
USES_MAX = 60
DUE_S = 8.0
KIND = "aes-256-gcm"
WRONG = (engine.InvalidTag, engine.ShareCorrupt)
FINAL = (*WRONG, engine.KeyNotFound, engine.KeyExhausted)
STILL = {"migrate": {"enabled": False}}
"""The tests say when a key moves."""


@dataclass(frozen=True)
class Course:
    """A kind of order: which process passes which points in it, and who may die then.

    A point is told by its name, or several by a prefix that ends in a dot; the longest one counts, and with ``""`` none
    is passed. ``fails`` has points at which a process fails, so that the order does. ``play`` prepares, yields the
    order, and holds what is there afterwards against what must be.
    """

    play: Callable[[Matrix], Iterator[Callable[[Engine], object]]]
    points: Mapping[str, str]
    parties: tuple[str, ...] = (COORDINATOR, STAYING, LEAVING, COMING, BALANCER)
    fails: Mapping[str, str] = field(default_factory=dict)

    def process(self, point: str) -> str:
        """Who passes the point; nobody: an empty string."""
        fit = [each for each in self.points if each == point or (each.endswith(".") and point.startswith(each))]
        return self.points[max(fit, key=len)] if fit else ""


def state_of(pid: int) -> str:
    """A process's state, as the kernel tells it in one letter; T is stopped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    return ""


class Warden:
    """Watches the process that stops at a point: kills the victim at its first stop, and has it go on at each."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._watched, self._victim = "", ""
        self.killed = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def watch(self, process: str, victim: str) -> None:
        """From now on; without a victim the process is only made to go on."""
        with self._lock:
            self._watched, self._victim = process, victim
            self.killed.clear()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Whoever stops meanwhile is left alone."""
        with self._lock:
            yield

    def _watch(self) -> None:
        while not self._over.wait(0.003):
            with self._lock:
                pid = self._cluster.running().get(self._watched)
                if pid is None or state_of(pid) != "T":
                    continue
                victim, self._victim = self._victim, ""
                if victim:
                    self._cluster.kill(victim)
                    self.killed.set()
                if victim != self._watched:
                    os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()


class Matrix:
    """A cluster whose processes are stopped at points and killed, and what must be so afterwards."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.warden = Warden(cluster)
        self.cases = 0
        self._settings: dict[str, str] = {}
        self._number = 0
        self._books = cluster.path / "balancer" / "data"
        self._copy = cluster.path / "copy"

    # --- processes ---

    def start(self, process: str) -> None:
        """Start a process anew, with the failpoints of this course."""
        if self.cluster.running()[process] is not None:
            self.cluster.kill(process)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, self._settings.get(process, ""))
            self.cluster.start_node(process)

    @contextlib.contextmanager
    def armed(self, course: Course, point: str) -> Iterator[str]:
        """With a process that stops at the point, and others that fail where the course needs it; its name."""
        process = course.process(point)
        self._settings = {other: f"{each}=error" for other, each in course.fails.items()}
        self._settings[process] = "; ".join(filter(None, (self._settings.get(process), f"{point}=stop")))
        self.warden.watch(process, "")
        changed = list(self._settings)
        for each in changed:
            self.start(each)
        yield process
        self._settings = {}
        for each in changed:
            self.start(each)

    def client(self) -> Engine:
        """A client that knows of no failure, and so asks first who is first."""
        settings = engine.load_settings(self.cluster.client_config)
        return engine.connect(ClientSettings(settings.identity, settings.source, 10.0, settings.file, rotate=False))

    def close(self) -> None:
        """End what watches."""
        self.warden.end()

    # --- a case ---

    def point(self, course: Course, point: str, victims: Sequence[str] = ()) -> None:
        """Each party dies once while a process is at the point."""
        with self.armed(course, point) as process:
            for victim in victims or course.parties:
                what = f"{victim} dies while {process} is at {point}"
                try:
                    self._case(course, process, victim)
                except BaseException as error:
                    error.add_note(what)
                    raise
                self.cases += 1

    def _case(self, course: Course, process: str, victim: str) -> None:
        steps = course.play(self)
        order = next(steps)
        with self.client() as kq, ThreadPoolExecutor(1) as pool:
            self.warden.watch(process, victim)
            ordered = pool.submit(self._order, order, kq)
            killed = self.warden.killed.wait(PATIENCE_S)
            self.warden.watch(process, "")
            if killed:
                self.start(victim)
            ordered.result()
        assert killed, "it never is"
        assert next(steps, None) is None

    @staticmethod
    def _order(order: Callable[[Engine], object], kq: Engine) -> None:
        with contextlib.suppress(engine.EngineError):
            order(kq)

    # --- keys ---

    def again(self, call: Callable[[], R], final: tuple[type[Exception], ...] = FINAL) -> R:
        """Until it works; what tells of a lost or wrong key, or of one that is not to be used, is not borne."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except engine.EngineError as error:
                if isinstance(error, final) or time.monotonic() >= until:
                    raise
                time.sleep(0.05)

    def settled(self, told: Callable[[], R], wanted: R, what: str) -> None:
        """Wait until what is told is so."""
        until = time.monotonic() + PATIENCE_S
        while (found := told()) != wanted:
            assert time.monotonic() < until, (what, found, wanted)
            time.sleep(0.05)

    def new_key(self, kq: Engine, uses_max: int | None = None) -> str:
        """A key whose first dealer and holder is the coordinator, 2 of the 3 of before."""
        shown = self.cluster.cluster
        while True:
            self._number += 1
            name = f"matrix/{self._number}"
            holders = shown.group_holders(shown.group_of(name))[: len(BEFORE)]
            if holders[0] == COORDINATOR and {*holders} == {*BEFORE}:
                break
        self.again(lambda: kq.create_key(name, KIND, threshold=2, shares=3, uses_max=uses_max))
        return name

    def rows(self, name: str) -> dict[str, list[tuple[int, int, str]]]:
        """Node -> version, epoch and state of each share of the key on its disk."""
        return {node: [row[:3] for row in rows] for node in self.cluster.nodes if (rows := self._read(node, name))}

    def _read(self, node: str, name: str) -> list[tuple[int, int, str, bytes]]:
        path = self.cluster.data_folder(node) / "shares.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            query = (
                "SELECT version, epoch, state, sealed FROM keys WHERE name = ? AND length(sealed) > 0 ORDER BY version"
            )
            return store.execute(query, (name,)).fetchall()

    def sealed(self, name: str) -> list[bytes]:
        """A part of each share of the key, as it is on the disks."""
        return [row[3][40:72] for node in self.cluster.nodes for row in self._read(node, name)]

    def traces(self, parts: Sequence[bytes]) -> list[str]:
        """The files of stores that have one of the parts."""
        files = [file for node in self.cluster.nodes for file in self.cluster.data_folder(node).glob("shares.db*")]
        found = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                raw = file.read_bytes()
                found += [file.name for part in parts if part in raw]
        return found

    def whole(self, kq: Engine, name: str, versions: Mapping[int, int], old: Sequence[bytes]) -> None:
        """The holders of before, and nobody else, have one share of each version, of this epoch, and of older none.

        Each of them puts the key together; what was made before is read.
        """
        wanted = [(version, epoch, "committed") for version, epoch in versions.items()]
        self.settled(lambda: self.rows(name), dict.fromkeys(sorted(BEFORE), wanted), "the shares")
        self.settled(lambda: self.traces(old), [], "traces of older shares")
        self.combined(kq, name)

    def combined(self, kq: Engine, name: str) -> None:
        """Each holder of before puts the key together anew."""

        def loaded() -> set[str]:
            kq.flush(name)
            return {*kq.prewarm(name)}

        self.settled(lambda: self.again(loaded), {*BEFORE}, "who put the key together")

    # --- the registry ---

    def copy_books(self) -> None:
        """Keep the registry's disk as kill -9 would leave it."""
        shutil.rmtree(self._copy, ignore_errors=True)
        self._copy.mkdir()
        with self.warden.aside():
            self.cluster.pause(BALANCER)
            for file in self._books.glob("registry.db*"):
                shutil.copy(file, self._copy)
            self.cluster.resume(BALANCER)

    def put_back_books(self, after: float = 0.0) -> None:
        """Have the registry fall back to what was kept, and serve after that time."""
        self.cluster.kill(BALANCER)
        for file in self._books.glob("registry.db*"):
            file.unlink()
        for file in self._copy.iterdir():
            shutil.copy(file, self._books)
        self.settled(lambda: time.time() > after, True, "the time")
        self.start(BALANCER)


# --- the courses ---


class Moving:
    """Keys that go from those of before to others, and back again after each case."""

    def __init__(self, change: Callable[[Matrix, Engine, list[str]], object], keys: int = 1, fall_back: bool = False):
        self._change, self._keys, self._fall_back = change, keys, fall_back
        self._names: list[str] = []
        self._made: dict[str, bytes] = {}

    def __call__(self, matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
        """One change of all of them."""
        with matrix.client() as kq:
            for _ in range(self._keys - len(self._names)):
                name = matrix.new_key(kq)
                self._made[name] = kq.encrypt(name, name.encode())
                matrix.again(lambda: kq.reshare_key(name, holders=BEFORE, timeout=ORDER_S))  # noqa: B023
                self._names.append(name)
            if self._fall_back:
                matrix.copy_books()
                for name in self._names:
                    matrix.again(lambda: kq.refresh_key(name, timeout=ORDER_S))  # noqa: B023
                matrix.put_back_books()
        old = {name: matrix.sealed(name) for name in self._names}
        yield lambda kq: self._change(matrix, kq, self._names)
        with matrix.client() as kq:
            for name in self._names:
                self._check(matrix, kq, name)
                back = matrix.again(lambda: kq.reshare_key(name, 2, holders=BEFORE, timeout=ORDER_S))  # noqa: B023
                matrix.whole(kq, name, {1: back.epoch}, old[name])
                self._check(matrix, kq, name)

    def _check(self, matrix: Matrix, kq: Engine, name: str) -> None:
        matrix.again(lambda: kq.flush(name))
        assert matrix.again(lambda: kq.decrypt(name, self._made[name])) == name.encode()


def reshare(matrix: Matrix, kq: Engine, names: list[str]) -> None:
    """Other holders, by a client's order."""
    for name in names:
        kq.reshare_key(name, holders=AFTER, timeout=ORDER_S)


def reshare_with_trial(matrix: Matrix, kq: Engine, names: list[str]) -> None:
    """As few deal as make the key, and so it is tried by who comes, with the shares of all."""
    for name in names:
        kq.reshare_key(name, len(AFTER), holders=AFTER, without=[LEAVING], timeout=ORDER_S)


def refresh(matrix: Matrix, kq: Engine, names: list[str]) -> None:
    """Other shares at the same holders."""
    for name in names:
        kq.refresh_key(name, timeout=ORDER_S)


def move(matrix: Matrix, kq: Engine, names: list[str]) -> None:
    """Other holders, by orders of the balancer's, all in one request."""
    with Mover(matrix.cluster, kq) as mover:
        orders = [mover.order(mover.manifest(name), AFTER) for name in names]
        mover.move(COORDINATOR, orders, ORDER_S)


def rotated(matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
    """A new version; afterwards another one, and what each made is read."""
    with matrix.client() as kq:
        name = matrix.new_key(kq)
        made = [kq.encrypt(name, b"m")]
    yield lambda kq: kq.rotate_key(name, timeout=ORDER_S)
    with matrix.client() as kq:
        made.append(matrix.again(lambda: kq.encrypt(name, b"m")))
        newest = matrix.again(lambda: kq.rotate_key(name, timeout=ORDER_S)).version
        assert newest in (2, 3)
        made.append(matrix.again(lambda: kq.encrypt(name, b"m")))
        matrix.whole(kq, name, dict.fromkeys(range(1, newest + 1), 1), ())
        assert [each.version for each in kq.key_versions(name)] == list(range(newest, 0, -1))
        matrix.again(lambda: kq.flush())
        for each in made:
            assert matrix.again(lambda: kq.decrypt(name, each)) == b"m"  # noqa: B023


def disabled(matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
    """A key that is disabled; afterwards it is enabled everywhere."""
    with matrix.client() as kq:
        name = matrix.new_key(kq)
        made = kq.encrypt(name, b"m")
    yield lambda kq: kq.disable_key(name, timeout=ORDER_S)
    with matrix.client() as kq:
        matrix.again(lambda: kq.disable_key(name, timeout=ORDER_S))
        with pytest.raises(engine.KeyDisabled):
            kq.decrypt(name, made, timeout=PATIENCE_S)
        matrix.again(lambda: kq.enable_key(name, timeout=ORDER_S))
        matrix.whole(kq, name, {1: 1}, ())
        assert matrix.again(lambda: kq.decrypt(name, made)) == b"m"


def due(matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
    """A key whose time comes."""
    with matrix.client() as kq:
        name = matrix.new_key(kq)
        old = matrix.sealed(name)
    yield lambda kq: kq.destroy_key(name, after=0.2, timeout=ORDER_S)
    gone(matrix, name, old)


def revived(matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
    """A key that a registry destroys which fell back to before that was taken back; it learns that from the nodes."""
    with matrix.client() as kq:
        name = matrix.new_key(kq)
        made = kq.encrypt(name, b"m")
        due_s = kq.destroy_key(name, after=DUE_S).destroy_at
        matrix.copy_books()
        kq.restore_key(name)
    yield lambda kq: matrix.put_back_books(due_s)
    with matrix.client() as kq:
        matrix.again(lambda: kq.disable_key(name, timeout=ORDER_S), WRONG)  # the registry knows it again after a while
        matrix.again(lambda: kq.enable_key(name, timeout=ORDER_S))
        matrix.whole(kq, name, {1: 1}, ())
        assert matrix.again(lambda: kq.decrypt(name, made)) == b"m"


def destroyed(matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
    """A key that is destroyed at once."""
    with matrix.client() as kq:
        name = matrix.new_key(kq)
        old = matrix.sealed(name)
    yield lambda kq: kq.destroy_key(name, timeout=ORDER_S)
    with matrix.client() as kq, contextlib.suppress(engine.KeyNotFound):
        matrix.again(lambda: kq.destroy_key(name, timeout=ORDER_S))
    gone(matrix, name, old)


def gone(matrix: Matrix, name: str, old: Sequence[bytes]) -> None:
    """Nobody has a share of the key, nor a trace of one, and nobody knows it."""
    matrix.settled(lambda: matrix.rows(name), {}, "the shares of a key that was destroyed")
    matrix.settled(lambda: matrix.traces(old), [], "traces of them")
    with matrix.client() as kq, pytest.raises(engine.KeyNotFound):
        matrix.again(lambda: kq.encrypt(name, b"m"))


def limited(matrix: Matrix) -> Iterator[Callable[[Engine], object]]:
    """A key whose uses are limited: whoever dies, no more are made than there are."""
    made: list[bytes] = []
    with matrix.client() as kq:
        name = matrix.new_key(kq, USES_MAX)

    def use_up(kq: Engine) -> None:
        prefer(kq, STAYING)
        while len(made) <= USES_MAX:
            try:
                made.append(matrix.again(lambda: kq.encrypt(name, b"m")))
            except engine.KeyExhausted:
                return

    yield use_up
    with matrix.client() as kq:
        assert 1 <= len(made) <= USES_MAX
        matrix.whole(kq, name, {1: 1}, ())
        assert kq.decrypt_many(name, made) == [b"m"] * len(made)


HOLDERS = (COORDINATOR, STAYING, BALANCER)
COURSES = {
    "reshare": Course(
        Moving(reshare),
        {
            "dealer.reshare.": COORDINATOR,
            "dealer.reshare.tried": "",
            "holder.deal.": LEAVING,
            "holder.reshare.": COMING,
            "holder.accept.": COMING,
            "holder.prepare.": COMING,
            "holder.prepare.recorded": "",
            "holder.prepare.answered": "",
            "holder.commit.": COMING,
            "holder.leave.": LEAVING,
            "registry.change.": BALANCER,
            "registry.commit.": BALANCER,
        },
    ),
    "trial": Course(
        Moving(reshare_with_trial),
        {"dealer.reshare.tried": COORDINATOR, "holder.trial.": COMING, "holder.release.": STAYING},
    ),
    "abort": Course(
        Moving(reshare),
        {
            "dealer.abort.": COORDINATOR,
            "holder.abort.": STAYING,
            "holder.abort.deleted": "",
            "holder.abort.erased": "",
            "registry.abort.": BALANCER,
        },
        fails={COMING: "holder.prepare.signed"},
    ),
    "adopt": Course(Moving(reshare, fall_back=True), {"registry.adopt.": BALANCER}, parties=(COORDINATOR, BALANCER)),
    "refresh": Course(
        Moving(refresh),
        {"dealer.refresh.": COORDINATOR, "holder.refresh.": STAYING, "holder.renew.": STAYING},
        parties=HOLDERS,
    ),
    "move": Course(Moving(move, keys=2), {"dealer.move.": COORDINATOR, "holder.many.": COMING}),
    "rotation": Course(
        rotated,
        {
            "dealer.create.": COORDINATOR,
            "holder.prepare.recorded": STAYING,
            "holder.prepare.answered": STAYING,
            "registry.reserve.": BALANCER,
        },
        parties=HOLDERS,
    ),
    "settings": Course(
        disabled,
        {"dealer.settings.": COORDINATOR, "holder.settings.": STAYING, "registry.settings.": BALANCER},
        parties=HOLDERS,
    ),
    "due": Course(due, {"registry.due.": BALANCER}, parties=(STAYING, BALANCER)),
    "revive": Course(revived, {"registry.revive.": BALANCER}, parties=(STAYING, BALANCER)),
    "quota": Course(limited, {"combiner.quota.": STAYING, "registry.quota.": BALANCER}, parties=(STAYING, BALANCER)),
    "destruction": Course(
        destroyed,
        {"dealer.destroy.": COORDINATOR, "holder.destroy.": STAYING, "registry.destroy.": BALANCER},
        parties=HOLDERS,
    ),
}
ELSEWHERE = {
    "store.write.": "tests/engine/test_cluster_crashes.py",
    "combiner.gather.": "tests/engine/test_cluster_crashes.py",
    "combiner.operate.": "tests/engine/test_cluster_crashes.py",
    "registry.open.": "tests/engine/test_cluster_crashes.py",
    "holder.abort.deleted": "tests/nodes/test_crash_points.py",
    "holder.abort.erased": "tests/nodes/test_crash_points.py",
    "registry.expire.": "tests/nodes/test_crash_points.py",
    "registry.refuse.": "tests/nodes/test_crash_points.py",
    "rotate.": "tests/nodes/test_rotation.py",
    "holder.export.": "tests/engine/test_cluster_backup.py",
    "holder.restore.": "tests/engine/test_cluster_backup.py",
}
"""Points of what changes no key, or that are passed where no node is without its process; and who goes through them."""
SAMPLE = (
    ("reshare", "dealer.reshare.renewed", COMING),
    ("reshare", "holder.leave.checked", COORDINATOR),
    ("refresh", "dealer.refresh.stated", STAYING),
    ("settings", "dealer.settings.booked", STAYING),
)


@pytest.fixture
def matrix(tmp_path: Path) -> Iterator[Matrix]:
    many = len(NODES)
    with LocalCluster(many, 2, tmp_path / "kq", shares=3, domains=many, balancer=STILL) as cluster:
        made = Matrix(cluster)
        yield made
        made.close()


def points_of(course: Course) -> list[str]:
    """All points of a course."""
    return [point for point in POINTS if course.process(point)]


def test_every_point_has_a_case() -> None:
    """A point that nobody dies at is found here, and a case for a point that is none."""
    here = {point for course in COURSES.values() for point in points_of(course)}
    left = {point for point in POINTS if not point.startswith(tuple(ELSEWHERE))}
    assert here >= left, f"no case has {sorted(left - here)}"
    for prefix in (*ELSEWHERE, *(each for course in COURSES.values() for each in course.points)):
        assert any(point == prefix or (prefix.endswith(".") and point.startswith(prefix)) for point in POINTS), prefix


def test_somebody_dies_at_a_step(matrix: Matrix) -> None:
    """Some of all cases; ``make crash`` has each."""
    for course, point, victim in SAMPLE:
        matrix.point(COURSES[course], point, [victim])
    assert matrix.cases == len(SAMPLE)


@pytest.mark.long
@pytest.mark.parametrize("name", COURSES)
def test_each_party_dies_at_each_step(matrix: Matrix, name: str) -> None:
    begun = time.monotonic()
    course = COURSES[name]
    for point in points_of(course):
        matrix.point(course, point)
        sys.stdout.write(f"{name}: {point}, {matrix.cases} deaths\n")
        sys.stdout.flush()
    assert matrix.cases == len(points_of(course)) * len(course.parties)
    sys.stdout.write(
        f"\n{name}: {matrix.cases} deaths of a party at {len(points_of(course))} points in "
        f"{time.monotonic() - begun:.0f} s, 0 keys lost, 0 epochs mixed, 0 traces of older shares\n"
    )
