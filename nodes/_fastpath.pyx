"""See _fastpath.pyi. What it can't do at once, by a plan, it gives to the ordinary way untouched."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from engine.client._histogram cimport Histograms
from engine.client._fastline cimport (
    KQ_YIELD_LONG_S,
    ZMQ_DONTWAIT,
    ZMQ_FD,
    ZMQ_SNDMORE,
    ZMQ_SRCFD,
    kq_message,
    kq_now_s,
    kq_spin_s,
    kq_spinner,
    kq_spins,
    kq_waited,
    readable,
    zmq_getsockopt,
    zmq_msg_close,
    zmq_msg_data,
    zmq_msg_get,
    zmq_msg_gets,
    zmq_msg_init,
    zmq_msg_more,
    zmq_msg_recv,
    zmq_msg_size,
    zmq_send,
)
from engine.protocol._fastwire cimport (
    KQ_OVERHEAD,
    bytes_of,
    kq_operate,
    kq_read_operate,
    kq_reserve,
    kq_result,
    kq_room,
    kq_write_result,
    span_of,
)
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy, strlen

cimport cython


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *items, unsigned long count, int timeout_ms)
    short POLLIN

cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    Z85_KEY = 40  # characters of a CURVE key, which ZAP gives as the User-Id
    WHERE_MAX = 256
    SOURCES = 8
    REQUESTS_ = 1
    EVENTS_ = 2

cdef enum:  # the places of these in engine.protocol.requests.STAGES
    POLICY = 1
    CACHE = 2
    TOKEN = 5
    AUDIT = 7
    REPLY = 8
    TOTAL = 9


cdef double GAP_MAX_S = 0.001  # who waits longer between two requests gains nothing by spinning

REQUESTS = REQUESTS_
EVENTS = EVENTS_


@cython.final
@cython.auto_pickle(False)
cdef class Plan:
    """How one member's uses of one key are served, as the ordinary way found it out; see _fastpath.pyi."""

    cdef readonly str member
    cdef readonly str verb
    cdef readonly str name
    cdef readonly object cluster
    cdef readonly object entry
    cdef readonly object loaded
    cdef readonly object cached_as
    cdef readonly object count
    cdef readonly int group
    cdef readonly str request_class
    cdef bytes key_id
    cdef object use
    cdef bint digested
    cdef bint associated
    cdef bint proves
    cdef size_t most
    cdef readonly object lines
    cdef Histograms times
    cdef double checked_s

    def __cinit__(self, *, str member, str verb, str name, cluster, entry, loaded, cached_as, count, int group,
                 str request_class, bytes key_id, use, bint digested, bint associated, bint proves, size_t most, lines,
                 Histograms times=None):
        self.member, self.verb, self.name = member, verb, name
        self.cluster, self.entry, self.loaded, self.cached_as = cluster, entry, loaded, cached_as
        self.count, self.group, self.request_class, self.key_id = count, group, request_class, key_id
        self.use, self.digested, self.associated, self.proves, self.most = use, digested, associated, proves, most
        self.lines, self.times = lines, times

    def checked(self):
        """The request was let in; what follows in ``begin_planned`` is the look-up of the loaded key."""
        self.checked_s = kq_now_s()

    cdef void took(self, double started_s, double begun_s, double ended_s, double recorded_s) noexcept:
        """Note how long each stage of a use took that has been answered just now."""
        cdef double now_s = kq_now_s(), checked_s = begun_s
        if self.times is None:
            return
        if self.checked_s >= started_s:
            checked_s = self.checked_s
            self.times.take(CACHE, begun_s - checked_s)
        self.times.take(POLICY, checked_s - started_s)
        self.times.take(TOKEN, ended_s - begun_s)
        self.times.take(AUDIT, recorded_s - ended_s)
        self.times.take(REPLY, now_s - recorded_s)
        self.times.take(TOTAL, now_s - started_s)

    cdef bint fits(self, kq_operate *request):
        """Whether the request is one that the ordinary way would not refuse."""
        return (
            (
                not request.key_id.length
                or request.key_id.length == <size_t>PyBytes_GET_SIZE(self.key_id)
                and memcmp(request.key_id.at, PyBytes_AS_STRING(self.key_id), request.key_id.length) == 0
            )
            and request.digested == self.digested
            and request.data.length <= self.most
            and (self.associated or not request.associated_data.length)
            and (self.proves == (request.proof.length > 0))
        )


@cython.final
@cython.auto_pickle(False)
cdef class FastPath:
    """The receiving end of a node's socket; see _fastpath.pyi."""

    cdef object _keep
    cdef void *_socket
    cdef void *_monitor
    cdef pollfd[SOURCES] _sources
    cdef int _count
    cdef object _opened
    cdef object _send_again
    cdef object _handlers
    cdef dict _plans
    cdef kq_room _room
    cdef kq_spinner _spinner
    cdef bint _busy  # whether the last wait brought a request: who is idle does not spin
    cdef int _descriptor
    cdef public bint paused
    cdef readonly uint64_t served

    def __cinit__(self, socket, monitor, *descriptors):
        cdef int descriptor = 0
        cdef size_t length
        self._keep = socket, monitor
        self._socket = <void *><size_t>socket.underlying
        self._monitor = <void *><size_t>monitor.underlying
        self._plans = {}
        for each in self._keep:
            length = sizeof(descriptor)
            if zmq_getsockopt(<void *><size_t>each.underlying, ZMQ_FD, &descriptor, &length) < 0:
                raise OSError("no descriptor of the socket")
            self._watch(descriptor)
        self._descriptor = self._sources[0].fd
        for each in descriptors:
            self._watch(each)

    def __dealloc__(self):
        free(self._room.at)

    cdef _watch(self, int descriptor):
        if self._count == SOURCES:
            raise ValueError("too many descriptors")
        self._sources[self._count].fd = descriptor
        self._sources[self._count].events = POLLIN
        self._count += 1

    def serve(self, opened, send_again, handlers):
        """Who takes what has no plan, and what a use with one needs."""
        self._opened, self._send_again, self._handlers = opened, send_again, handlers

    def remember(self, str user_id, Plan plan not None):
        """Serve such requests by the plan from now on."""
        if len(self._plans) >= 10_000:
            self._plans.clear()
        self._plans[user_id.encode() + plan.verb.encode() + b"\0" + plan.name.encode()] = plan

    def forget(self):
        """Something changed: every plan has to be made anew."""
        self._plans.clear()

    @property
    def plans(self):
        """How many plans there are."""
        return len(self._plans)

    # --- waiting ---

    def wait(self, int timeout_ms):
        """Wait until there is something to do; what, as the sum of ``REQUESTS``, ``EVENTS``, and 4, 8 ... for the
        descriptors.
        """
        return self._wait(timeout_ms)

    cdef int _wait(self, int timeout_ms) except -1:
        """Whether to spin before sleeping is decided by how soon after the last wait the next request came of late:
        spinning helps where a processor is free for it, and hurts where client and node share one.
        """
        cdef bint events, requests, rested = False
        cdef int i, found
        cdef double begun_s, now_s, before_s, spin_s = kq_spin_s(&self._spinner) if self._busy else 0
        cdef pollfd *sources = self._sources
        with nogil:
            begun_s = now_s = kq_now_s()
            requests = not self.paused and readable(self._socket)
            events = readable(self._monitor)
            while spin_s and not requests and not self.paused and timeout_ms:
                sched_yield()
                requests = readable(self._socket)
                before_s, now_s = now_s, kq_now_s()
                if now_s - begun_s >= spin_s or now_s - before_s >= KQ_YIELD_LONG_S:
                    break
            rested = not requests and not events
            for i in range(self._count):
                sources[i].revents = 0
            sources[0].fd = -1 if self.paused else self._descriptor
            if poll(sources, self._count, timeout_ms if rested else 0) < 0:
                for i in range(self._count):
                    sources[i].revents = 0
            requests = not self.paused and (requests or readable(self._socket))
            events = events or readable(self._monitor)
            if requests:
                now_s = kq_now_s() - begun_s
                if self._busy and now_s < GAP_MAX_S:
                    kq_waited(&self._spinner, now_s)
            self._busy = requests
        found = REQUESTS_ * requests + EVENTS_ * events
        for i in range(2, self._count):
            if sources[i].revents:
                found += 1 << i
        return found

    @property
    def spins(self):
        """Whether waits spin at present."""
        return kq_spins(&self._spinner)

    def unwatch(self, int descriptor):
        """Wait for it no more."""
        cdef int i
        for i in range(2, self._count):
            if self._sources[i].fd == descriptor:
                self._sources[i].fd = -1

    # --- serving ---

    def run(self, int timeout_ms, int limit):
        """Wait and take in, up to so many messages at a time, until there is something else to do or the time is over;
        what, as ``wait`` says."""
        cdef double until_s = kq_now_s() + timeout_ms * 1e-3, left_s = timeout_ms * 1e-3
        cdef int found
        while True:
            found = self._wait(<int>(left_s * 1000) + 1 if left_s > 0 else 0)
            if found & REQUESTS_:
                self.take_in(limit)
            left_s = until_s - kq_now_s()
            if found != REQUESTS_ or left_s <= 0:
                return found

    cpdef int take_in(self, int limit) except -1:
        """Take in at most so many messages, and serve or hand over each; how many there were."""
        cdef int taken = 0
        while taken < limit and self._take_one():
            taken += 1
        return taken

    cdef bint _take_one(self) except -1:
        cdef kq_message route, body
        cdef kq_operate request
        cdef const char *user
        cdef size_t user_length, length
        cdef char[WHERE_MAX] where
        cdef Plan plan
        cdef bint served = False
        cdef object frames
        zmq_msg_init(&route)
        if zmq_msg_recv(&route, self._socket, ZMQ_DONTWAIT) < 0:
            zmq_msg_close(&route)
            return False
        zmq_msg_init(&body)
        try:
            if not zmq_msg_more(&route) or zmq_msg_recv(&body, self._socket, ZMQ_DONTWAIT) < 0:
                return True  # no ROUTER gives such a message
            user = zmq_msg_gets(&body, b"User-Id")
            user_length = strlen(user) if user != NULL else 0
            if (
                user_length == Z85_KEY
                and self._plans
                and not zmq_msg_more(&body)
                and kq_read_operate(<const uint8_t *>zmq_msg_data(&body), zmq_msg_size(&body), &request)
            ):
                length = Z85_KEY + request.verb.length + 1 + request.key.length
                memcpy(where, user, Z85_KEY)
                memcpy(where + Z85_KEY, request.verb.at, request.verb.length)
                where[Z85_KEY + request.verb.length] = 0
                memcpy(where + Z85_KEY + request.verb.length + 1, request.key.at, request.key.length)
                found = self._plans.get(PyBytes_FromStringAndSize(where, length))
                if found is not None:
                    plan = found
                    if plan.fits(&request):
                        served = self._serve(plan, &request, &route, zmq_msg_get(&body, ZMQ_SRCFD), zmq_msg_size(&body))
            if not served:
                fd = zmq_msg_get(&body, ZMQ_SRCFD)
                text = user[:user_length].decode("ascii", "replace") if user_length else ""
                frames = [_content(&body)]
                while zmq_msg_more(&body):
                    if zmq_msg_recv(&body, self._socket, ZMQ_DONTWAIT) < 0:
                        break
                    frames.append(_content(&body))
                incoming = self._opened(_content(&route), frames, text, fd)
                if incoming is not None:
                    self._handlers.handle(incoming)
            return True
        finally:
            zmq_msg_close(&route)
            zmq_msg_close(&body)

    cdef bint _serve(self, Plan plan, kq_operate *request, kq_message *route, int fd, size_t size) except -1:
        cdef kq_result result
        cdef double started_s = kq_now_s(), begun_s, ended_s, recorded_s
        cdef size_t length
        cdef bytes answer
        cdef int sent
        handlers = self._handlers
        try:
            connection = handlers.begin_planned(plan, fd, size, started_s)
        except Exception as error:
            handlers.plan_broke(error)
            return False
        if connection is None:
            return False
        data, associated, proof = bytes_of(request.data), b"", b""
        if request.associated_data.length:
            associated = bytes_of(request.associated_data)
        if request.proof.length:
            proof = bytes_of(request.proof)
        begun_s = kq_now_s()
        try:
            answer = plan.use(data, associated, proof)
            ended_s = kq_now_s()
            result.service_us = <uint64_t>((ended_s - begun_s) * 1e6) or 1
            result.queue = handlers.end_planned(plan, result.service_us, <long>((ended_s - started_s) * 1e6))
            recorded_s = kq_now_s()
        except Exception as error:
            handlers.fail_planned(plan, _content(route), request.id, connection, started_s, error)
            return True
        result.id, result.loaded = request.id, True
        result.data = span_of(answer)
        if not kq_reserve(&self._room, KQ_OVERHEAD + result.data.length):
            raise MemoryError
        length = kq_write_result(self._room.at, &result)
        sent = self._send(route, length)
        if sent == 2:
            connection.replied(length)
        elif sent == 0:
            self._send_again(_content(route), PyBytes_FromStringAndSize(<const char *>self._room.at, length), connection)
        plan.took(started_s, begun_s, ended_s, recorded_s)
        self.served += 1
        return True

    cdef int _send(self, kq_message *route, size_t length):
        """How many of the two frames went out. The first is copied, since a refused one is needed again."""
        if zmq_send(self._socket, zmq_msg_data(route), zmq_msg_size(route), ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0:
            return 0
        return 1 + (zmq_send(self._socket, self._room.at, length, ZMQ_DONTWAIT) >= 0)


cdef bytes _content(kq_message *message):
    return PyBytes_FromStringAndSize(<const char *>zmq_msg_data(message), zmq_msg_size(message))
