"""One run of one fault: what is allowed, what it may use, and the course from a whole cluster to a verdict."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import BALANCER, THRESHOLD, FaultCluster, Sick, Undo, counted
from history import Event, Finding, Key, count_errors, errors_of, group_of, judge, longest_gap
from proxy import Network
from workload import PATIENCE_S, Workload, unique_prefix

import engine
from engine.client.config import load_identity

BEFORE_S = 0.15
AFTER_S = 0.15
SHARES_SEEN = 3
"""Keys of which every t of the shares are tried after each run."""
ANY = "*"


@dataclass(frozen=True, slots=True)
class Allowed:
    """The errors that clients may see, by what they do: codes, or ``*`` for any. No wrong result ever is."""

    data: frozenset[str] = frozenset()
    create: frozenset[str] = frozenset()
    destroy: frozenset[str] = frozenset()
    refresh: frozenset[str] = frozenset()
    gap_s: float = 5.0
    """The longest time without any success of a use of a key; infinite where nothing need succeed."""

    def takes(self, group: str, code: str) -> bool:
        codes: frozenset[str] = getattr(self, group)
        return ANY in codes or code in codes

    def __str__(self) -> str:
        parts = []
        for group in ("data", "create", "destroy", "refresh"):
            codes = getattr(self, group)
            if codes:
                parts.append(f"{group}: {'any error' if ANY in codes else ' or '.join(sorted(codes))}")
        return "; ".join(["no errors" if not parts else "no errors but " + "; ".join(parts)])


def allowed(
    *,
    data: Iterable[str] = (),
    create: Iterable[str] = (),
    destroy: Iterable[str] = (),
    refresh: Iterable[str] = (),
    gap_s: float = 5.0,
) -> Allowed:
    return Allowed(frozenset(data), frozenset(create), frozenset(destroy), frozenset(refresh), gap_s)


LATE = ("deadline-exceeded", "node-unavailable")
NONE = allowed()
SHORT = ("quorum-unavailable", *LATE)
ONE_NODE = allowed(refresh=("quorum-unavailable", "stale-key", *LATE))
"""With one node faulty everything goes on but refreshes, which need all holders."""
TWO_NODES = allowed(create=SHORT, refresh=("stale-key", *SHORT))
"""With two of five faulty no t + 1 holders are left to make a key safe; what is there goes on."""
NO_REGISTRY = ("registry-unavailable", "deadline-exceeded", "quorum-unavailable")
NO_BALANCER = allowed(create=NO_REGISTRY, destroy=NO_REGISTRY, refresh=NO_REGISTRY)
NOTHING = allowed(data=(ANY,), create=(ANY,), destroy=(ANY,), refresh=(ANY,), gap_s=float("inf"))
"""Everything may fail, loudly."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the matrix."""

    name: str
    group: str
    what: str
    allowed: Allowed
    act: Callable[[Run], None]
    tells: str = ""
    """What the product must say of it, in words; the code checks it by ``Run.expect``."""
    session: str = "plain"
    """``plain``, ``proxied`` (every link through a proxy) or ``namespace`` (a network of its own)."""
    needs: tuple[str, ...] = ()
    recover_s: float = 30.0
    least_shares: int = THRESHOLD + 1
    fresh: bool = False
    """Whether the cluster is thrown away afterwards."""
    quick: bool = False
    """Whether it belongs to the short list of ``make test``."""

    @property
    def expected(self) -> str:
        parts = [str(self.allowed), f"whole within {self.recover_s:g} s"]
        return "; ".join([*parts, self.tells] if self.tells else parts)


@dataclass(slots=True)
class Session:
    """A cluster that many runs share, and the keys that outlive them."""

    kind: str
    cluster: FaultCluster
    network: Network | None
    elders: list[Key] = field(default_factory=list)
    serial: int = 0
    undo: Undo = field(default_factory=Undo)


@dataclass(slots=True)
class Row:
    """What came of one run."""

    fault: str
    group: str
    seed: int
    expected: str
    seen: str = ""
    verdict: str = ""
    seconds: float = 0.0
    recovered_s: float = 0.0
    gap_s: float = 0.0
    operations: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    lost: int = 0
    wrong: int = 0
    findings: list[str] = field(default_factory=list)
    sick: bool = False


class Run:
    """What a fault may use: the cluster, seeded choices, and a list of what must be undone."""

    def __init__(self, fault: Fault, seed: int, session: Session, workload: Workload, kq: engine.Engine) -> None:
        self.fault = fault
        self.seed = seed
        self.session = session
        self.cluster = session.cluster
        self.workload = workload
        self.kq = kq
        self.rng = random.Random(f"{fault.name}/{seed}")
        self.undo = Undo()
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.checked = False
        self._logs = {name: self.cluster.log_size(name) for name in (*self.cluster.nodes, BALANCER)}

    @property
    def network(self) -> Network:
        if self.session.network is None:
            raise RuntimeError(f"{self.fault.name} needs a session with proxies")
        return self.session.network

    def node(self) -> str:
        """The victim, and a note of it."""
        (victim,) = self.nodes(1)
        return victim

    def nodes(self, count: int) -> list[str]:
        chosen = self.rng.sample(list(self.cluster.nodes), count)
        self.note(" ".join(chosen))
        return chosen

    def note(self, text: str) -> None:
        self.notes.append(text)

    def hold(self, low_s: float = 0.8, high_s: float = 2.0) -> None:
        """Let the clients meet the fault for a while."""
        time.sleep(self.rng.uniform(low_s, high_s))

    def expect(self, what: str, holds: bool) -> None:
        """Something that the product must do or tell."""
        if not holds:
            self.findings.append(Finding("untold", what))

    def eventually(self, what: str, holds: Callable[[], bool], seconds: float = 10.0) -> bool:
        """Expect something within a bound."""
        until = time.monotonic() + seconds
        while True:
            try:
                if holds():
                    return True
            except engine.EngineError:
                pass
            if time.monotonic() >= until:
                self.expect(f"{what} (waited {seconds:g} s)", False)
                return False
            time.sleep(0.05)

    def log(self, name: str) -> str:
        """What a member logged in this run."""
        return self.cluster.log_since(name, self._logs[name])

    def logged(self, name: str, text: str, seconds: float = 5.0) -> None:
        """Expect a word in a member's log."""
        self.eventually(f"{name}'s log says {text!r}", lambda: text in self.log(name), seconds)

    def status(self, node: str) -> Any:
        """A node's word about itself; ``EngineError`` if there is none."""
        for member in self.kq.status(timeout=2.0):
            if member.name == node:
                if member.error is not None:
                    raise member.error
                return member.status
        raise ValueError(f"no member {node!r}")

    def refused_start(self, node: str, *words: str) -> bool:
        """Start a node whose store is damaged: True if it refused, and then it must have said why."""
        try:
            self.cluster.start_node(node)
        except engine.ClusterError as error:
            self.note("refused to start")
            self.expect(
                f"{node} says why it does not start: {str(error)[-200:]}", any(word in str(error) for word in words)
            )
            return True
        self.note("started")
        return False


def carry_out(
    fault: Fault,
    seed: int,
    session: Session,
    client: Callable[[Any], Any] = lambda kq: kq,
    patience_s: float = PATIENCE_S,
    clear: bool = True,
) -> Row:
    """One run. If the cluster can't be made whole afterwards, the row is ``sick`` too: the session is of no more use.

    ``client`` may put something between the clients and the engine; ``patience_s`` is how long the check may wait for a
    key to be there, or gone. Without ``clear`` the run's keys stay.
    """
    row = Row(fault.name, fault.group, seed, fault.expected)
    begun_s = time.monotonic()
    with engine.connect(session.cluster.client_config) as kq:
        elders = [_copied(key) for key in session.elders]
        workload = Workload(client(kq), seed, unique_prefix(fault.name, seed), elders, patience_s=patience_s)
        run = Run(fault, seed, session, workload, kq)
        try:
            _course(run, row)
            if clear:
                workload.clear()
        except Exception as error:  # whatever it is: the row failed, and the matrix goes on
            told = "" if isinstance(error, Sick | engine.EngineError) else f"{type(error).__name__}: "
            run.findings.append(Finding("sick", f"{told}{error}"))
        _judge(run, row)
    row.sick = any(finding.kind == "sick" for finding in run.findings)
    row.seconds = round(time.monotonic() - begun_s, 2)
    return row


def _copied(key: Key) -> Key:
    twin = copy(key)
    twin.ciphertexts, twin.signatures, twin.macs = list(key.ciphertexts), list(key.signatures), list(key.macs)
    return twin


def _course(run: Run, row: Row) -> None:
    fault, workload, cluster = run.fault, run.workload, run.cluster
    rng = random.Random(run.seed)  # not the fault's: its choices depend on its seed alone
    workload.prepare(rng)
    workload.start()
    time.sleep(BEFORE_S)
    hit_s = time.monotonic()
    try:
        fault.act(run)
    except Exception as error:  # a fault that can't be played is a failed row, never a passed one
        where = traceback.extract_tb(error.__traceback__)[-1]
        run.findings.append(
            Finding("sick", f"the fault: {type(error).__name__}: {str(error)[:300]} ({where.name}:{where.lineno})")
        )
    finally:
        healed_s = time.monotonic()
        run.findings += [Finding("sick", f"undoing it: {text}") for text in run.undo.now()]
        if run.session.network is not None:
            run.session.network.heal()
        run.findings += [Finding("sick", text) for text in _started(cluster)]
    try:
        cluster.await_whole(run.kq, fault.recover_s)
        row.recovered_s = round(time.monotonic() - healed_s, 2)
        time.sleep(AFTER_S)
    finally:
        if not workload.stop():
            run.findings.append(Finding("slow", "a client did not come back from a call"))
        row.gap_s = round(longest_gap(workload.history.events, hit_s, workload.used_until_s), 2)
    workload.check(rng)
    run.checked = True
    _check_shares(run, rng)


def _started(cluster: FaultCluster) -> list[str]:
    try:
        cluster.start_missing()
    except engine.EngineError as error:
        return [f"starting again: {str(error)[:400]}"]
    return []


def _check_shares(run: Run, rng: random.Random) -> None:
    identity = load_identity(run.cluster.client_config.parent / "identity.toml")
    alive = [key for key in run.workload.keys.values() if key.alive]
    for key in rng.sample(alive, min(SHARES_SEEN, len(alive))):
        least = run.fault.least_shares
        until = time.monotonic() + run.workload.patience_s
        while problem := run.cluster.check_shares(identity, key.name, least):
            if time.monotonic() > until or "another key" in problem:
                run.findings.append(Finding("lost", f"shares: {problem}"))
                break
            time.sleep(0.2)


def _judge(run: Run, row: Row) -> None:
    events, keys = run.workload.history.events, run.workload.keys
    findings = [*run.findings, *judge(events, keys, checked=run.checked)]
    findings += [Finding("crash", text) for text in dict.fromkeys(run.workload.crashes)]
    failed = errors_of(events, keys)
    errors = count_errors(failed)
    findings += unexpected(failed, run.fault.allowed)
    if row.gap_s > run.fault.allowed.gap_s:
        findings.append(Finding("slow", f"no use of a key succeeded for {row.gap_s:.1f} s"))
    row.operations = sum(not event.after for event in events)
    row.errors = {f"{group} {code}": number for (group, code), number in sorted(errors.items())}
    row.acknowledged = sum(key.made for key in keys.values())
    row.lost = sum(finding.kind in ("lost", "half", "undead") for finding in findings)
    row.wrong = sum(finding.kind == "wrong" for finding in findings)
    row.findings = [str(finding) for finding in findings]
    row.verdict = "FAILED" if findings else "survived"
    row.seen = "; ".join(
        [
            *run.notes,
            f"errors: {counted(errors)}",
            f"{row.acknowledged} keys acknowledged, {row.lost} lost, {row.wrong} wrong results",
            f"longest gap {row.gap_s:.1f} s",
            f"whole after {row.recovered_s:.1f} s",
        ]
    )


def unexpected(errors: Iterable[Event], expectation: Allowed) -> list[Finding]:
    """The errors that the row does not allow, with an example of each."""
    refused: dict[tuple[str, str], list[Event]] = {}
    for event in errors:
        if not expectation.takes(group_of(event.verb), event.error):
            refused.setdefault((group_of(event.verb), event.error), []).append(event)
    return [
        Finding("error", f"{len(events)} times {group}: {code} (such as {events[0].key}: {events[0].message[:400]})")
        for (group, code), events in sorted(refused.items())
    ]


def make_session(kind: str, path: Path, seed: int = 0, nodes: int = 5) -> Session:
    """A fresh cluster of a kind, with keys that must outlive everything."""
    network = Network(seed) if kind in ("proxied", "namespace") else None
    try:
        cluster = FaultCluster(path, network, nodes=nodes)
    except BaseException:
        if network is not None:
            network.close()
        raise
    session = Session(kind, cluster, network)
    try:
        with engine.connect(cluster.client_config) as kq:
            cluster.await_whole(kq)
            elders = Workload(kq, seed, "elder")
            rng = random.Random(seed)
            for algorithm in ("aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256"):
                key = elders.make(algorithm, rng)
                for _ in range(3):
                    elders.use(key, rng)
                session.elders.append(key)
    except BaseException:
        close_session(session)
        raise
    return session


def close_session(session: Session) -> None:
    """End the cluster and its proxies."""
    try:
        session.cluster.close()
    finally:
        session.undo.now()
        if session.network is not None:
            session.network.close()


def by_name(faults: Iterable[Fault]) -> Mapping[str, Fault]:
    return {fault.name: fault for fault in faults}
