"""See _fastpath.pyi. What it can't do at once, by a plan, it gives to the ordinary way untouched."""

from cpython.unicode cimport PyUnicode_DATA
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from engine.client._histogram cimport Histograms
from engine.client._posix cimport (
    explicit_bzero,
    sched_yield,
)
from engine.client._router cimport Connection, Router
from engine.client._spin cimport (
    KQ_YIELD_LONG_S,
    kq_now_s,
    kq_spin_s,
    kq_spinner,
    kq_spins,
    kq_waited,
)
from engine.protocol._fastlines cimport UseLines
from engine.protocol._fastwire cimport (
    KQ_OVERHEAD,
    bytes_of,
    kq_operate,
    kq_read_operate,
    kq_reserve,
    kq_result,
    kq_result_head,
    kq_room,
    kq_write_result,
)
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy
from nodes._fasttoken cimport Use, span
from nodes._usebuffer cimport UseBuffer

cimport cython



cdef enum:
    Z85_KEY = 40  # characters of a CURVE key, which ZAP gives as the User-Id
    WHERE_MAX = 256
    REQUESTS_ = 1

cdef enum:  # the places of these in engine.protocol.requests.STAGES
    POLICY = 1
    WAIT = 3
    TOKEN = 5
    AUDIT = 7
    REPLY = 8
    TOTAL = 9


cdef enum:
    USES_MAX = 16  # so many are chained at a time: one takes as long as four that are in the caches

cdef double GAP_MAX_S = 0.001  # who waits longer between two requests gains nothing by spinning

REQUESTS = REQUESTS_


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
    cdef readonly bytes key_id
    cdef readonly bint newest
    cdef object use
    cdef readonly object worker
    cdef bint digested
    cdef bint associated
    cdef bint proves
    cdef size_t most
    cdef readonly UseLines lines
    # The lease in force: uses that were admitted and taken from the cache in advance, and what is to be told of them.
    cdef int leased
    cdef int used
    cdef int failed
    cdef double until_s
    cdef Connection connection
    cdef uint64_t busy_us
    cdef Histograms times

    def __cinit__(self, *, str member, str verb, str name, cluster, entry, loaded, cached_as, count, int group,
                 str request_class, bytes key_id, use, bint digested, bint associated, bint proves, bint newest, size_t most,
                 UseLines lines, Histograms times=None, worker=None):
        self.member, self.verb, self.name = member, verb, name
        self.cluster, self.entry, self.loaded, self.cached_as = cluster, entry, loaded, cached_as
        self.count, self.group, self.request_class, self.key_id = count, group, request_class, key_id
        self.use, self.digested, self.associated, self.proves, self.most = use, digested, associated, proves, most
        self.lines, self.times, self.worker, self.newest = lines, times, worker, newest

    cdef void took(self, double started_s, double begun_s, double ended_s, double recorded_s) noexcept:
        """Note how long each stage of a use took that has been answered just now."""
        cdef double now_s
        if self.times is None:
            return
        now_s = kq_now_s()
        self.times.take(POLICY, begun_s - started_s)
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

    cdef object result(self, kq_operate *request, kq_room *room, size_t head, size_t *length):
        """Do it: the result stands in the room behind its head, or it is given back where ``use`` is none in C."""
        cdef Use use
        cdef span data, associated, proof
        if not isinstance(self.use, Use):
            answer = self.use(bytes_of(request.data), bytes_of(request.associated_data), bytes_of(request.proof))
            length[0] = PyBytes_GET_SIZE(answer)
            return answer
        use = <Use>self.use
        data.start, data.length = request.data.at, request.data.length
        associated.start, associated.length = request.associated_data.at, request.associated_data.length
        proof.start, proof.length = request.proof.at, request.proof.length
        if not kq_reserve(room, KQ_OVERHEAD + head + use.most(data.length)):
            raise MemoryError
        length[0] = use.into(data, associated, proof, room.at + head)
        return None


@cython.final
@cython.auto_pickle(False)
cdef class Aside:
    """A use that a worker makes (it calls this), and that the loop answers (it calls ``done``)."""

    cdef FastPath path
    cdef Plan plan
    cdef Connection connection
    cdef bytes data
    cdef bytes associated
    cdef bytes proof
    cdef uint64_t id
    cdef uint8_t version
    cdef object number
    cdef double started_s
    cdef double submitted_s
    cdef double deadline_s
    cdef double begun_s
    cdef double ended_s

    def __call__(self, state):
        """The result, on the worker's thread."""
        self.begun_s = kq_now_s()
        if self.begun_s >= self.deadline_s:
            self.path._handlers.overdue()
        answer = self.plan.use(self.data, self.associated, self.proof)
        self.ended_s = kq_now_s()
        return answer

    def done(self, answer, error):
        """Record and answer it, on the loop's thread."""
        cdef Plan plan = self.plan
        cdef kq_result result
        cdef double recorded_s, now_s
        handlers = self.path._handlers
        if error is None:
            result.version, result.id, result.loaded = self.version, self.id, True
            result.service_us = <uint64_t>((self.ended_s - self.begun_s) * 1e6) or 1
            recorded_s = kq_now_s()
            try:
                result.queue = handlers.end_aside(plan, self.number, <long>((recorded_s - self.started_s) * 1e6),
                                                  result.service_us)
            except Exception as failure:
                error = failure
        if error is not None:
            handlers.fail_aside(plan, self.version, self.id, self.number, self.connection, self.started_s, error)
            return
        self.path._answer(self.connection, answer, &result)
        if plan.times is not None:
            now_s = kq_now_s()
            plan.times.take(POLICY, self.submitted_s - self.started_s)
            plan.times.take(WAIT, self.begun_s - self.submitted_s)
            plan.times.take(TOKEN, self.ended_s - self.begun_s)
            plan.times.take(AUDIT, now_s - recorded_s)
            plan.times.take(TOTAL, now_s - self.started_s)


@cython.final
@cython.auto_pickle(False)
cdef class FastPath:
    """The receiving end of a node's socket; see _fastpath.pyi."""

    cdef Router _router
    cdef object _opened
    cdef object _lost
    cdef object _handlers
    cdef UseBuffer _uses
    cdef object _drain
    cdef dict _plans
    cdef list _leases
    cdef kq_room _room
    cdef kq_spinner _spinner
    cdef uint8_t _lowest, _highest
    cdef bint _busy  # whether the last wait brought a request: who is idle does not spin
    cdef public bint paused
    cdef public object cluster
    cdef readonly uint64_t served

    def __cinit__(self, Router router not None, *descriptors, uint8_t lowest, uint8_t highest):
        cdef int bit = 2
        self._router, self._lowest, self._highest = router, lowest, highest
        self._plans, self._leases = {}, []
        for each in descriptors:
            router.watch(each, bit)
            bit <<= 1

    def __dealloc__(self):
        free(self._room.at)

    def serve(self, opened, lost, handlers, UseBuffer uses not None, drain):
        """Who takes what has no plan, and what a use with one needs."""
        self._opened, self._lost, self._handlers = opened, lost, handlers
        self._uses, self._drain = uses, drain

    def remember(self, str user_id, bytes key_id not None, Plan plan not None):
        """Serve such requests that name the key by its name and this id, or none, by the plan from now on."""
        if len(self._plans) >= 10_000:
            self.forget()
        self._plans[user_id.encode() + plan.verb.encode() + b"\0" + plan.name.encode() + b"\0" + key_id] = plan

    def forget(self):
        """Something changed: every plan has to be made anew."""
        self._plans.clear()
        self.settle()

    cpdef settle(self):
        """Tell what was done by the plans' leases, and give back what is left of them."""
        cdef Plan plan
        while self._leases:
            plan = self._leases.pop()
            self._end_lease(plan)

    cdef _end_lease(self, Plan plan):
        cdef int leased = plan.leased, used = plan.used, failed = plan.failed
        cdef uint64_t busy_us = plan.busy_us
        plan.connection = None
        plan.leased = plan.used = plan.failed = 0
        plan.busy_us = 0
        if leased:
            self._handlers.settle_planned(plan, leased, used, failed, busy_us)

    cdef bint _lease(self, Plan plan, Connection connection, double now_s) except -1:
        """Have uses admitted, if there are none yet."""
        if plan.leased:
            if plan.used < plan.leased and now_s < plan.until_s and plan.connection is connection:
                return True
            self._end_lease(plan)
            self._leases.remove(plan)
        lease = self._handlers.lease_planned(plan, connection, now_s)
        if lease is None:
            return False
        plan.leased, plan.until_s = lease
        plan.connection = connection
        self._leases.append(plan)
        return True

    @property
    def plans(self):
        """How many plans there are."""
        return len(self._plans)

    # --- waiting ---

    def wait(self, int timeout_ms):
        """Wait until there is something to do; what, as the sum of ``REQUESTS``, and 2, 4 ... for the descriptors."""
        return self._rest(timeout_ms)

    cdef int _rest(self, int timeout_ms) except -1:
        """Whether to spin before sleeping is decided by how soon after the last wait the next request came of late:
        spinning helps where a processor is free for it, and hurts where client and node share one.
        """
        cdef int found = 0
        cdef double begun_s, now_s, before_s, spin_s
        if self.paused:
            return self._router.beside(timeout_ms)
        spin_s = kq_spin_s(&self._spinner, 0) if self._busy and timeout_ms else 0
        if self._uses.count >= USES_MAX:
            self._drain()
        begun_s = now_s = kq_now_s()
        while True:
            self._router.wait(0 if spin_s else timeout_ms, &found)
            if found or not spin_s:
                break
            with nogil:
                sched_yield()
            before_s, now_s = now_s, kq_now_s()
            if now_s - begun_s >= spin_s or now_s - before_s >= KQ_YIELD_LONG_S:
                spin_s = 0
        if self._busy:
            now_s = kq_now_s() - begun_s
            # Where no request came while it was worth waiting for one, spinning was of no use.
            if now_s < GAP_MAX_S if found & REQUESTS_ else self._spinner.spun:
                kq_waited(&self._spinner, now_s)
        self._busy = found & REQUESTS_
        return found

    @property
    def spins(self):
        """Whether waits spin at present."""
        return kq_spins(&self._spinner)

    def unwatch(self, int descriptor):
        """Wait for it no more."""
        self._router.unwatch(descriptor)

    # --- serving ---

    def run(self, int timeout_ms, int limit):
        """Wait and take in, up to so many messages at a time, until there is something else to do or the time is over;
        what, as ``wait`` says."""
        cdef double until_s = kq_now_s() + timeout_ms * 1e-3, left_s = timeout_ms * 1e-3
        cdef int found
        cdef bint more
        while True:
            more = not self.paused and self.take_in(limit) == limit
            found = self._rest(0 if more or left_s <= 0 else <int>(left_s * 1000) + 1)
            left_s = until_s - kq_now_s()
            if found & ~REQUESTS_ or left_s <= 0:
                self.settle()
                return found

    cpdef int take_in(self, int limit) except -1:
        """Take in at most so many messages, and serve or hand over each; how many there were."""
        cdef int taken = 0
        while taken < limit and self._take_one():
            taken += 1
        return taken

    cdef bint _take_one(self) except -1:
        cdef Connection connection
        cdef kq_operate request
        cdef uint8_t *content
        cdef size_t length, parts, at
        cdef char[WHERE_MAX] where
        cdef Plan plan
        connection = self._router.next(&content, &length, &parts)
        if connection is None:
            return False
        if (
            self._plans
            and parts == 1
            and kq_read_operate(content, length, &request)
            and self._lowest <= request.version <= self._highest
        ):
            memcpy(where, PyUnicode_DATA(connection.user), Z85_KEY)
            memcpy(where + Z85_KEY, request.verb.at, request.verb.length)
            where[Z85_KEY + request.verb.length] = 0
            at = Z85_KEY + request.verb.length + 1
            memcpy(where + at, request.key.at, request.key.length)
            at += request.key.length
            where[at] = 0
            memcpy(where + at + 1, request.key_id.at, request.key_id.length)
            found = self._plans.get(PyBytes_FromStringAndSize(where, at + 1 + request.key_id.length))
            if found is not None:
                plan = found
                if plan.fits(&request) and self._serve(plan, &request, connection):
                    return True
        if self._leases:
            self.settle()
        incoming = self._opened(connection, PyBytes_FromStringAndSize(<char *>content, length if parts == 1 else 0),
                                parts)
        if incoming is not None:
            self._handlers.handle(incoming)
        return True

    cdef bint _serve(self, Plan plan, kq_operate *request, Connection connection) except -1:
        cdef kq_result result
        cdef double started_s = kq_now_s(), begun_s, ended_s, recorded_s
        cdef long queue
        handlers = self._handlers
        if plan.cluster is not self.cluster:
            return False
        try:
            if not self._lease(plan, connection, started_s):
                return False
            queue = handlers.begin_planned(plan)
            if queue < 0:
                return False
        except Exception as error:
            handlers.plan_broke(error)
            return False
        if plan.worker is not None:
            return self._serve_aside(plan, request, connection, started_s)
        plan.used += 1
        begun_s = kq_now_s()
        try:
            answer = plan.result(request, &self._room, KQ_OVERHEAD, &result.data.length)
            ended_s = kq_now_s()
            result.service_us = <uint64_t>((ended_s - begun_s) * 1e6) or 1
            if plan.cluster is not self.cluster:  # another thread took a newer one meanwhile
                handlers.check_plan(plan)
            self._uses.note(plan.lines, handlers.number, <uint64_t>((ended_s - started_s) * 1e6))
            result.queue = queue
            recorded_s = kq_now_s()
        except Exception as error:
            if self._room.length:
                explicit_bzero(self._room.at, self._room.length)  # a plaintext, if it was the record that failed
            plan.failed += 1  # which is counted as any other that failed
            handlers.fail_planned(plan, request.version, request.id, connection, started_s, error)
            return True
        plan.busy_us += result.service_us
        result.version, result.id, result.loaded = request.version, request.id, True
        self._answer(connection, answer, &result)
        plan.took(started_s, begun_s, ended_s, recorded_s)
        return True

    cdef int _answer(self, Connection connection, answer, kq_result *result) except -1:
        """Reply with what stands in the room behind its head, or with this answer."""
        cdef size_t head = KQ_OVERHEAD, length
        if answer is not None:
            result.data.length = PyBytes_GET_SIZE(answer)
            if not kq_reserve(&self._room, 2 * KQ_OVERHEAD + result.data.length):
                raise MemoryError
            memcpy(self._room.at + head, PyBytes_AS_STRING(answer), result.data.length)
        result.data.at = self._room.at + head
        head -= kq_result_head(result.id, result.data.length)
        length = kq_write_result(self._room.at + head, result)
        if not self._router.reply(connection, self._room.at + head, length, 0):
            self._lost()
        explicit_bzero(self._room.at + head, length)  # it may be a plaintext
        self.served += 1
        return 0

    cdef bint _serve_aside(self, Plan plan, kq_operate *request, Connection connection, double started_s) except -1:
        """Have the plan's worker do it."""
        cdef Aside aside
        handlers = self._handlers
        if not handlers.begin_aside(plan):
            return False
        # The lease counts it neither as done nor as failed: it is counted when it is.
        plan.used += 1
        plan.failed += 1
        aside = Aside.__new__(Aside)
        aside.path, aside.plan, aside.connection = self, plan, connection
        aside.data, aside.associated = bytes_of(request.data), bytes_of(request.associated_data)
        aside.proof = bytes_of(request.proof)
        aside.version, aside.id = request.version, request.id
        aside.number, aside.started_s = handlers.number, started_s
        aside.deadline_s = started_s + request.timeout_ms * 1e-3
        aside.submitted_s = kq_now_s()
        try:
            plan.worker.submit(aside, aside.done, plan.member)
        except Exception as error:
            handlers.fail_aside(plan, request.version, request.id, aside.number, connection, started_s, error)
        return True
