"""Faults of the network: each link of a process to another is spoiled by a proxy, or in a namespace by the kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from course import LATE, NO_BALANCER, NONE, ONE_NODE, SHORT, Fault, Run, allowed
from harness import BALANCER, run
from proxy import CLIENT, CUT, FROM, TO, Rule


def spoil_node(run_: Run, victim: str, rule: Rule) -> None:
    """Put a rule on every link of a node, those that it opens itself too."""
    run_.network.spoil("*", victim, rule)
    run_.network.spoil(victim, "*", rule)


def met(run_: Run, before: int) -> None:
    """The fault must have met traffic, or the row would show nothing."""
    run_.expect("the spoiled link carries traffic", run_.network.spoiled > before)


def drop_node(run_: Run) -> None:
    _spoiled(run_, run_.node(), CUT, CUT)


def deaf_node(run_: Run) -> None:
    """Nothing reaches the node; what it sends arrives."""
    _spoiled(run_, run_.node(), Rule(drop=frozenset({TO})), Rule(drop=frozenset({FROM})))


def mute_node(run_: Run) -> None:
    """What the node sends is lost; all reaches it."""
    _spoiled(run_, run_.node(), Rule(drop=frozenset({FROM})), Rule(drop=frozenset({TO})))


def _spoiled(run_: Run, victim: str, towards: Rule, away: Rule) -> None:
    before = run_.network.spoiled
    run_.network.spoil("*", victim, towards)
    run_.network.spoil(victim, "*", away)
    run_.hold(1.0, 2.2)
    run_.network.heal()
    met(run_, before)


def delay(run_: Run) -> None:
    """Every link of one node is slow."""
    victim, seconds = run_.node(), run_.rng.uniform(0.05, 1.0)
    run_.note(f"{seconds * 1000:.0f} ms")
    before = run_.network.spoiled
    spoil_node(run_, victim, Rule(delay_s=seconds))
    run_.hold(1.2, 2.2)
    run_.network.heal()
    met(run_, before)


def delay_all(run_: Run) -> None:
    """All links are slow, as over a wide network."""
    seconds = run_.rng.uniform(0.01, 0.06)
    run_.note(f"{seconds * 1000:.0f} ms")
    before = run_.network.spoiled
    run_.network.spoil("*", "*", Rule(delay_s=seconds))
    run_.hold(1.5, 2.5)
    run_.network.heal()
    met(run_, before)


def jitter(run_: Run) -> None:
    before = run_.network.spoiled
    run_.network.spoil("*", "*", Rule(delay_s=0.001, jitter_s=run_.rng.uniform(0.02, 0.12)))
    run_.hold(1.2, 2.2)
    run_.network.heal()
    met(run_, before)


def flapping_link(run_: Run) -> None:
    """One node's links are cut and healed again and again."""
    victim = run_.node()
    before = run_.network.spoiled
    for _ in range(run_.rng.randint(5, 10)):
        spoil_node(run_, victim, CUT)
        time.sleep(run_.rng.uniform(0.02, 0.3))
        run_.network.heal()
        time.sleep(run_.rng.uniform(0.02, 0.15))
    met(run_, before)


def resets(run_: Run) -> None:
    """Connections of all members are broken by TCP resets, at random instants."""
    before = run_.network.spoiled
    for _ in range(run_.rng.randint(8, 16)):
        run_.network.reset("*", run_.rng.choice([*run_.cluster.nodes, BALANCER]))
        time.sleep(run_.rng.uniform(0.0, 0.2))
    met(run_, before)


def refused(run_: Run) -> None:
    """A node's connections are broken and new ones refused."""
    victim = run_.node()
    before = run_.network.spoiled
    spoil_node(run_, victim, Rule(refuse=True))
    run_.network.reset("*", victim)
    run_.network.reset(victim, "*")
    run_.hold(0.8, 1.8)
    run_.network.heal()
    met(run_, before)


def corrupted(run_: Run) -> None:
    """Bits of what one node sends and gets are flipped."""
    victim = run_.node()
    before = run_.network.spoiled
    spoil_node(run_, victim, Rule(corrupt=run_.rng.uniform(0.05, 0.5)))
    run_.hold(1.2, 2.2)
    run_.network.heal()
    # What a wrong length made wait for more would wait for long: new connections begin afresh.
    run_.network.reset("*", victim)
    run_.network.reset(victim, "*")
    met(run_, before)


def corrupted_everywhere(run_: Run) -> None:
    """Bits are flipped now and then on every link."""
    before = run_.network.spoiled
    run_.network.spoil("*", "*", Rule(corrupt=run_.rng.uniform(0.005, 0.03)))
    run_.hold(1.2, 2.2)
    run_.network.heal()
    run_.network.reset()
    met(run_, before)


def half_open(run_: Run) -> None:
    """A node loses its connections, as by a sudden new start; their other ends don't hear of it."""
    victim = run_.node()
    before = run_.network.spoiled
    run_.network.half_open("*", victim)
    run_.hold(1.2, 2.4)
    run_.network.heal()
    met(run_, before)


def trickle(run_: Run) -> None:
    """One node's links carry some hundred bytes a second."""
    victim, rate = run_.node(), run_.rng.randint(200, 2_000)
    run_.note(f"{rate} B/s")
    before = run_.network.spoiled
    spoil_node(run_, victim, Rule(bytes_per_s=rate))
    run_.hold(1.2, 2.2)
    run_.network.heal()
    run_.network.reset("*", victim)
    met(run_, before)


def partition(run_: Run) -> None:
    """Two nodes are parted from three and the balancer; clients reach all of them."""
    few = run_.nodes(2)
    before = run_.network.spoiled
    for one in few:
        for other in [*(node for node in run_.cluster.nodes if node not in few), BALANCER]:
            run_.network.spoil(one, other, CUT)
            run_.network.spoil(other, one, CUT)
    run_.hold(1.5, 2.5)
    run_.network.heal()
    met(run_, before)


def nodes_parted(run_: Run) -> None:
    """No node reaches another: what is loaded is served, nothing else can be."""
    before = run_.network.spoiled
    for one in run_.cluster.nodes:
        for other in run_.cluster.nodes:
            if one != other:
                run_.network.spoil(one, other, CUT)
    run_.hold(1.0, 2.0)
    run_.network.heal()
    met(run_, before)


def balancer_cut_off(run_: Run) -> None:
    before = run_.network.spoiled
    for node in run_.cluster.nodes:
        run_.network.spoil(node, BALANCER, CUT)
        run_.network.spoil(BALANCER, node, CUT)
    run_.hold(1.2, 2.2)
    run_.network.heal()
    met(run_, before)


def client_cut_off(run_: Run) -> None:
    """Clients hear nothing of the balancer; they don't need to."""
    before = run_.network.spoiled
    run_.network.spoil(CLIENT, BALANCER, CUT)
    run_.hold(1.2, 2.2)
    run_.network.heal()
    met(run_, before)


def client_parted(run_: Run) -> None:
    """Clients reach two of the five nodes, which reach the others."""
    unreachable = run_.nodes(3)
    before = run_.network.spoiled
    for node in unreachable:
        run_.network.spoil(CLIENT, node, CUT)
    run_.hold(1.2, 2.2)
    run_.network.heal()
    met(run_, before)


# --- in a namespace ---


@contextlib.contextmanager
def _filtered(run_: Run, name: str, verdict: str) -> Iterator[None]:
    """An nftables rule for all packets of one member's port, in this thread's own network."""
    port = run_.cluster.port_of(name)
    run("nft", "add table inet keyquorum")
    try:
        run("nft", "add chain inet keyquorum input { type filter hook input priority 0 ; }")
        for side in ("dport", "sport"):
            run("nft", f"add rule inet keyquorum input tcp {side} {port} {verdict}")
        yield
        told = run("nft", "list table inet keyquorum")
        run_.expect(
            "the kernel dropped packets",
            any("packets 0 " not in each for each in told.splitlines() if "counter" in each),
        )
    finally:
        run("nft", "delete table inet keyquorum")


def packet_loss(run_: Run) -> None:
    """The kernel drops a part of one node's packets at random."""
    victim, part = run_.node(), run_.rng.randint(5, 40)
    run_.note(f"{part} %")
    with _filtered(run_, victim, f"numgen random mod 100 < {part} counter drop"):
        run_.hold(1.5, 2.5)


def packets_lost(run_: Run) -> None:
    """The kernel drops all packets of one node: no reset, no word."""
    victim = run_.node()
    with _filtered(run_, victim, "counter drop"):
        run_.hold(1.2, 2.2)


def rejected(run_: Run) -> None:
    """The kernel resets each connection to one node."""
    victim = run_.node()
    with _filtered(run_, victim, "counter reject with tcp reset"):
        run_.hold(1.2, 2.2)


def link_down(run_: Run) -> None:
    """The interface that carries everything goes down and comes back."""
    run_.undo.later(lambda: run("ip", "link", "set", "lo", "up"))
    run("ip", "link", "set", "lo", "down")
    run_.hold(0.6, 1.5)


LOSSY = allowed(
    data=SHORT, create=(*SHORT, "registry-unavailable"), destroy=("registry-unavailable", *LATE), refresh=("*",)
)
PARTED = allowed(
    data=SHORT,
    create=(*SHORT, "registry-unavailable"),
    destroy=("registry-unavailable", *LATE),
    refresh=("stale-key", "registry-unavailable", *SHORT),
    gap_s=float("inf"),
)
TWO_CUT = allowed(create=(*SHORT, "registry-unavailable"), destroy=("registry-unavailable", *LATE), refresh=("*",))
FAULTS = [
    Fault(
        "drop-node", "network", "all bytes of one node's links are held back", ONE_NODE, drop_node, session="proxied"
    ),
    Fault("deaf-node", "network", "nothing reaches one node (one way)", ONE_NODE, deaf_node, session="proxied"),
    Fault(
        "mute-node",
        "network",
        "nothing of one node arrives (one way)",
        ONE_NODE,
        mute_node,
        session="proxied",
        quick=True,
    ),
    Fault("delay-node", "network", "50 ms to 1 s more on each link of a node", ONE_NODE, delay, session="proxied"),
    Fault(
        "delay-all",
        "network",
        "10 to 60 ms more on every link",
        allowed(refresh=("deadline-exceeded",)),
        delay_all,
        session="proxied",
    ),
    Fault(
        "jitter",
        "network",
        "up to 20 to 120 ms more on every link, at random",
        allowed(refresh=("deadline-exceeded",)),
        jitter,
        session="proxied",
    ),
    Fault(
        "flapping-link",
        "network",
        "one node's links are cut and healed in a loop",
        ONE_NODE,
        flapping_link,
        session="proxied",
    ),
    Fault(
        "resets",
        "network",
        "TCP resets of all connections of random members",
        allowed(
            data=("quorum-unavailable",),
            create=("registry-unavailable", "quorum-unavailable"),
            destroy=("registry-unavailable",),
            refresh=("*",),
        ),
        resets,
        session="proxied",
    ),
    Fault("refused", "network", "one node's connections are broken and refused", ONE_NODE, refused, session="proxied"),
    Fault("corrupted-node", "network", "flipped bits on one node's links", ONE_NODE, corrupted, session="proxied"),
    Fault(
        "corrupted-links",
        "network",
        "flipped bits now and then on every link",
        LOSSY,
        corrupted_everywhere,
        session="proxied",
    ),
    Fault("half-open", "network", "one node's connections are half open", ONE_NODE, half_open, session="proxied"),
    Fault("trickle", "network", "200 to 2000 B/s on one node's links", ONE_NODE, trickle, session="proxied"),
    Fault(
        "partition",
        "network",
        "two nodes are parted from three and the balancer",
        TWO_CUT,
        partition,
        session="proxied",
    ),
    Fault("nodes-parted", "network", "no node reaches another", PARTED, nodes_parted, session="proxied"),
    Fault(
        "balancer-cut-off", "network", "no node reaches the balancer", NO_BALANCER, balancer_cut_off, session="proxied"
    ),
    Fault("client-cut-off", "network", "clients don't reach the balancer", NONE, client_cut_off, session="proxied"),
    Fault("client-parted", "network", "clients reach two of five nodes", NONE, client_parted, session="proxied"),
    Fault(
        "packet-loss",
        "network",
        "5 to 40 % of one node's packets are lost (nftables)",
        ONE_NODE,
        packet_loss,
        session="namespace",
        needs=("namespace", "nftables"),
    ),
    Fault(
        "packets-lost",
        "network",
        "all of one node's packets are lost (nftables)",
        ONE_NODE,
        packets_lost,
        session="namespace",
        needs=("namespace", "nftables"),
    ),
    Fault(
        "rejected",
        "network",
        "one node's packets are answered by resets (nftables)",
        ONE_NODE,
        rejected,
        session="namespace",
        needs=("namespace", "nftables"),
    ),
    Fault(
        "link-down",
        "network",
        "the network interface goes down for all",
        PARTED,
        link_down,
        session="namespace",
        needs=("namespace",),
    ),
]
