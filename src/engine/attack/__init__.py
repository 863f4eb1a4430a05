"""Attacks on a running cluster of one's own, with a report for an auditor. It attacks by the network alone.

It knows the cluster as a member does: by a client's configuration. Every attack has a control, the same message in its
honest form, so that what is refused is refused for the right reason and a dead cluster passes nothing.
"""

from engine.attack.model import Attack, Case, Options, Result, Verdict
from engine.attack.report import Report, digest_of
from engine.attack.suite import ATTACKS, attack_cluster, choose
from engine.attack.target import Target, load_target

__all__ = [
    "ATTACKS",
    "Attack",
    "Case",
    "Options",
    "Report",
    "Result",
    "Target",
    "Verdict",
    "attack_cluster",
    "choose",
    "digest_of",
    "load_target",
]
