"""Faults of processes: they are killed, stopped and started again at bad moments."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from client_process import ClientProcess
from course import LATE, NO_BALANCER, NOTHING, ONE_NODE, SHORT, TWO_NODES, Fault, Run, allowed
from harness import BALANCER
from history import Key

import engine

MINUTE_S = 60.0


def kill_node(run: Run) -> None:
    victim = run.node()
    run.cluster.kill(victim)
    run.hold()
    run.cluster.start_node(victim)


def kill_two_nodes(run: Run) -> None:
    victims = run.nodes(2)
    for victim in victims:
        run.cluster.kill(victim)
    run.hold()
    for victim in victims:
        run.cluster.start_node(victim)


def kill_dealer(run: Run) -> None:
    """Kill the node that deals, at a random instant of creations that it was asked for first."""
    victim = run.node()
    shown = run.cluster.cluster
    for _ in range(2):
        made = threading.Thread(target=_make_at, args=(run, victim, shown), daemon=True)
        made.start()
        time.sleep(run.rng.uniform(0.0, 0.06))
        run.cluster.kill(victim)
        made.join(30)
        run.expect("a creation comes to an end", not made.is_alive())
        run.cluster.start_node(victim)


def _make_at(run: Run, victim: str, shown: object) -> None:
    """Two keys whose first holder, which is their dealer, is the victim."""
    del shown
    cluster = run.cluster.cluster
    for _ in range(2):
        while True:
            with run.workload._lock:
                name = f"{run.workload.prefix}/{run.workload._number + 1}"
                if cluster.group_holders(cluster.group_of(name))[0] == victim:
                    break
                run.workload._number += 1
        run.workload.make("aes-256-gcm", run.rng)


def kill_balancer(run: Run) -> None:
    run.cluster.kill(BALANCER)
    run.hold()
    run.cluster.start_node(BALANCER)


def kill_client(run: Run) -> None:
    """A client process dies in the middle of its calls: what it had been told holds, and others go on."""
    with ClientProcess(run.cluster.client_config_of("other"), f"{run.workload.prefix}/killed", run.seed) as client:
        client.await_events(8)
        time.sleep(run.rng.uniform(0.0, 0.3))
        client.kill()
        client.take_over(run.workload)
    run.hold(0.2, 0.5)


def stop_node(run: Run) -> None:
    victim = run.node()
    _stopped(run, [victim])


def stop_two_nodes(run: Run) -> None:
    _stopped(run, run.nodes(2))


def stop_balancer(run: Run) -> None:
    _stopped(run, [BALANCER])


def balancer_away(run: Run) -> None:
    """For a minute: the last table is long past its time then, and the data path goes on by it."""
    _stopped(run, [BALANCER], MINUTE_S)


def _stopped(run: Run, names: list[str], seconds: float = 0.0) -> None:
    """Stop processes (SIGSTOP): their connections stay open, and nobody answers. For so long at the least."""
    for name in names:
        pids = run.cluster.families()[name]
        run.undo.later(lambda name=name: run.cluster.signal_all(name, signal.SIGCONT))
        for _ in pids:
            run.cluster.signal_all(name, signal.SIGSTOP)
    run.hold(seconds + 1.0, seconds + 2.5)


def kill_everything(run: Run) -> None:
    names = [*run.cluster.nodes, BALANCER]
    run.rng.shuffle(names)
    for name in names:
        run.cluster.kill(name)
    run.hold(0.1, 0.4)
    run.cluster.start_missing()


def kill_during_refresh(run: Run) -> None:
    """Kill a node at a random instant of a refresh, as coordinator or as holder."""
    _kill_during(run, "a refresh", run.workload.refresh)


def kill_during_reshare(run: Run) -> None:
    """Kill a node at a random instant of a reshare, as coordinator, as holder that stays, or that comes or goes."""
    _kill_during(run, "a reshare", lambda key: run.workload.reshare(key, run.rng))


def _kill_during(run: Run, what: str, change: Callable[[Key], None]) -> None:
    victim = run.node()
    for _ in range(2):
        key = run.rng.choice(run.workload.living(own=True))
        beside = threading.Thread(target=change, args=(key,), daemon=True)
        beside.start()
        time.sleep(run.rng.uniform(0.0, 0.09))
        run.cluster.kill(victim)
        beside.join(60)
        run.expect(f"{what} comes to an end", not beside.is_alive())
        run.cluster.start_node(victim)


def rolling_restarts(run: Run) -> None:
    """Every node in turn is stopped in order and started again, each once the one before serves."""
    names = list(run.cluster.nodes)
    run.rng.shuffle(names)
    for name in names:
        run.cluster.stop_node(name)
        run.cluster.start_node(name)
        run.eventually(f"{name} answers", lambda name=name: run.status(name) is not None)


def flapping_node(run: Run) -> None:
    """One node is killed and started again and again, each time before it has settled."""
    victim = run.node()
    for _ in range(4):
        run.cluster.kill(victim)
        with contextlib.suppress(engine.ClusterError):
            run.cluster.start_node(victim)
        time.sleep(run.rng.uniform(0.0, 0.2))


DEALT = replace(ONE_NODE, create=frozenset(SHORT))
FAULTS = [
    Fault("kill-node", "processes", "SIGKILL of one node, started again", ONE_NODE, kill_node),
    Fault("kill-two-nodes", "processes", "SIGKILL of two nodes of five", TWO_NODES, kill_two_nodes),
    Fault("kill-dealer", "processes", "SIGKILL of the node that is making a key", ONE_NODE, kill_dealer),
    Fault("kill-balancer", "processes", "SIGKILL of the balancer", NO_BALANCER, kill_balancer),
    Fault("kill-client", "processes", "SIGKILL of a client in its calls", allowed(), kill_client),
    Fault("stop-node", "processes", "SIGSTOP of one node, SIGCONT", ONE_NODE, stop_node, quick=True),
    Fault("stop-two-nodes", "processes", "SIGSTOP of two nodes of five", TWO_NODES, stop_two_nodes),
    Fault("stop-balancer", "processes", "SIGSTOP of the balancer", NO_BALANCER, stop_balancer),
    Fault("balancer-away", "processes", "SIGSTOP of the balancer for a minute", NO_BALANCER, balancer_away),
    Fault("kill-everything", "processes", "SIGKILL of all members at once", NOTHING, kill_everything),
    Fault(
        "kill-in-refresh", "processes", "SIGKILL of a node while shares are refreshed", ONE_NODE, kill_during_refresh
    ),
    Fault("kill-in-reshare", "processes", "SIGKILL of a node while keys are moved", ONE_NODE, kill_during_reshare),
    Fault("rolling-restarts", "processes", "each node is stopped and started in turn", ONE_NODE, rolling_restarts),
    Fault("flapping-node", "processes", "one node is killed and started in a loop", ONE_NODE, flapping_node),
]
__all__ = ["DEALT", "FAULTS", "LATE"]
