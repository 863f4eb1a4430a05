"""What a client knows of a node, and the choice by it: see ``engine.protocol.routing``."""

from collections import deque
from collections.abc import Callable
from typing import final

SNAPSHOT_MAX_AGE_S: float
"""After so long without an answer, own requests under way count in any case."""
RELEARN_S: float
"""What a node was measured to do with a class is forgotten so long after its last answer to one, and the way to it
counts half as much with each such time without any answer, or it might be avoided for ever. What it publishes is no
answer."""
DOWN_S: float
DOWN_MAX_S: float
"""How long a node that failed is tried last: doubled up to the maximum each time that it fails anew after that."""
CROWD_PART: float
"""A request keeps those waiting who come while the queue lasts: for each that waits, this part of its own service time
is charged. So the longer queues are, the more each class goes to the nodes that are quick with it, and the cluster does
most when it must (compare the workload-weighted routing of Xie, Yekkehkhany and Lu, INFOCOM 2016)."""

SLOW_START_S: float
SLOW_START_TIMES: float
"""A node that is back is so many times dearer at first, and less and less so until it counts in full: nobody knows yet
how it does, and all clients find its queue empty at the same moment (compare Envoy's slow start)."""

@final
class NodeState:
    """What one client knows of a node."""

    name: str
    outstanding: int
    sent_s: deque[float]
    """When the requests were sent that the newest snapshot does not know of."""
    seen_s: float
    excess: float
    """The newest snapshot's queue, beyond the mean of them."""
    mean_queue: float
    settle_s: float
    others: float
    """How many others a request does not wait for: the node's lanes but one."""
    lanes: float
    usual_us: float
    """The mean service of all classes, and by ``wait_us`` what one request more adds to the wait."""
    wait_us: float
    cost: float
    """A request's own service and what it costs others, per time of service."""
    round_trip_us: float
    service_us: dict[str, float]
    measured_s: dict[str, float]
    """When that was measured last."""
    way_s: float
    """When it answered last."""
    down_for_s: float
    down_until_s: float
    probing: bool
    slow_until_s: float
    """Until when it is in its slow start."""

    def __new__(cls, name: str) -> NodeState: ...
    def down(self, now_s: float) -> None:
        """It failed."""

    def up(self, now_s: float) -> None:
        """It answered, or a lost connection to it is there again."""

def score(
    state: NodeState,
    request_class: str,
    loaded: set[NodeState],
    cold_us: float,
    now_s: float,
    told_us: Callable[[NodeState, str], float],
) -> float:
    """Microseconds until a request that is sent now is answered, and what that costs others.

    ``told_us`` gives the service of a node that was not measured; ``cold_us`` is added where the key is not loaded.
    """

def best(
    states: tuple[NodeState, ...],
    request_class: str,
    loaded: set[NodeState],
    cold_us: float,
    now_s: float,
    told_us: Callable[[NodeState, str], float],
) -> NodeState | None:
    """The node of the least score; None if that is one that failed and is to be tried again, or none is up."""
