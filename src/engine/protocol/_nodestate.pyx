"""See _nodestate.pyi. A warm use asks for the best of the eligible nodes each time: tens of nanoseconds for each of them."""

from collections import deque

cimport cython

SNAPSHOT_MAX_AGE_S = 0.2
RELEARN_S = 10.0
DOWN_S = 1.0
DOWN_MAX_S = 4.0
CROWD_PART = 0.3
SLOW_START_S = 0.5
SLOW_START_TIMES = 3.0

cdef enum:
    SENT_MAX_ = 256  # those of before count no more

cdef double FAR = float("inf")
cdef double SNAPSHOT_MAX_AGE_ = SNAPSHOT_MAX_AGE_S
cdef double RELEARN_ = RELEARN_S
cdef double DOWN_ = DOWN_S
cdef double DOWN_MAX_ = DOWN_MAX_S
cdef double CROWD_ = CROWD_PART
cdef double SLOW_START_ = SLOW_START_S
cdef double SLOW_TIMES_ = SLOW_START_TIMES


@cython.final
@cython.auto_pickle(False)
cdef class NodeState:
    """What one client knows of a node; see _nodestate.pyi."""

    cdef public str name
    cdef public Py_ssize_t outstanding
    cdef public object sent_s
    cdef public double seen_s
    cdef public double excess
    cdef public double mean_queue
    cdef public double settle_s
    cdef public double others
    cdef public double lanes
    cdef public double usual_us
    cdef public double wait_us
    cdef public double cost
    cdef public double round_trip_us
    cdef public dict service_us
    cdef public dict measured_s
    cdef public double way_s
    cdef public double down_for_s
    cdef public double down_until_s
    cdef public bint probing
    cdef public double slow_until_s

    def __cinit__(self, str name not None):
        self.name = name
        self.sent_s = deque(maxlen=SENT_MAX_)
        self.seen_s = self.down_until_s = self.slow_until_s = self.way_s = -FAR
        self.settle_s = 0.001
        self.lanes = self.cost = 1.0
        self.round_trip_us = 300.0
        self.service_us, self.measured_s = {}, {}

    def down(self, double now_s):
        """It failed; of many requests that fail together one counts."""
        if self.probing or self.down_until_s <= now_s:
            self.probing = False
            self.down_for_s = min(max(DOWN_, 2 * self.down_for_s), DOWN_MAX_)
            self.down_until_s = now_s + self.down_for_s

    def up(self, double now_s):
        """It answered, or a lost connection to it is there again."""
        if self.down_for_s:
            self.slow_until_s = now_s + SLOW_START_
        self.down_for_s, self.down_until_s, self.probing = 0.0, -FAR, False


cdef double scored(
    NodeState state, str request_class, set loaded, double cold_us, double now_s, object told_us, double least
) except -1.0:
    """The score, or anything that is not below ``least`` where it would not be either."""
    cdef double age_s = now_s - state.seen_s, silent_s = now_s - state.way_s, way_us = state.round_trip_us
    measured = state.service_us.get(request_class)
    if measured is not None and now_s - <double>state.measured_s[request_class] > RELEARN_:
        measured = None
    if RELEARN_ < silent_s < FAR:
        way_us *= 0.5 ** (silent_s / RELEARN_ - 1.0)
    cdef double service_us = told_us(state, request_class) if measured is None else measured
    cdef double score = service_us * state.cost + way_us
    cdef double waiting, own_us, times = 1.0
    if state not in loaded:
        score += cold_us
    if state.slow_until_s > now_s:
        times += SLOW_TIMES_ * (state.slow_until_s - now_s) / SLOW_START_
        score *= times
    if score >= least:
        return score  # waiting only adds to it
    waiting = len(state.sent_s)
    if age_s <= RELEARN_:
        waiting += state.mean_queue + state.excess * state.settle_s / (state.settle_s + age_s)
    if age_s > SNAPSHOT_MAX_AGE_ and waiting < state.outstanding:
        waiting = state.outstanding
    waiting -= state.others
    if waiting > 0.0:
        own_us = service_us / state.lanes
        score += times * waiting * ((state.wait_us if state.wait_us else own_us) + CROWD_ * own_us)
    return score


def score(NodeState state not None, str request_class not None, set loaded not None, double cold_us, double now_s, told_us):
    """Microseconds until a request that is sent now is answered, and what that costs others."""
    return scored(state, request_class, loaded, cold_us, now_s, told_us, FAR)


def best(tuple states not None, str request_class not None, set loaded not None, double cold_us, double now_s, told_us):
    """The node of the least score; None if that is one that failed and is to be tried again, or none is up."""
    cdef NodeState state, found = None
    cdef double least = FAR, this
    for state in states:
        if state.down_until_s > now_s:
            continue
        this = scored(state, request_class, loaded, cold_us, now_s, told_us, least)
        if this < least:
            found, least = state, this
    return None if found is not None and found.down_for_s else found
