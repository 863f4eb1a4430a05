"""The shortest way of a use of a key, at the client's end; see _fastline.pyi."""

import hashlib
import os
import weakref

from engine.errors import DeadlineExceeded, NodeUnavailable
from engine.keys import KeyKind, RequestType
from engine.protocol import wire
from engine.protocol.routing import version_label

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from engine.client._histogram cimport Histograms
from engine.client._posix cimport (
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    POLLIN,
    POLLOUT,
    SHUT_RDWR,
    close,
    explicit_bzero,
    poll,
    pollfd,
    recv,
    sched_yield,
    send,
    shutdown,
)
from engine.client._spin cimport (
    KQ_YIELD_LONG_S,
    kq_now_s,
    kq_spin_s,
    kq_spinner,
    kq_spins,
    kq_waited,
)
from engine.client._zmtp cimport (
    KQ_ENDED,
    KQ_HEAD_MAX,
    KQ_OPEN,
    kq_begin,
    kq_curve,
    kq_end_curve,
    kq_frame,
    kq_message_head,
    kq_next_frame,
    kq_open_message,
    kq_shake,
    kq_write_message,
    sodium,
)
from engine.protocol._fastwire cimport (
    KQ_MAX_MESSAGE,
    KQ_MAX_PROOF,
    bytes_of,
    kq_operate,
    kq_operate_room,
    kq_read_result,
    kq_reserve,
    kq_result,
    kq_room,
    kq_write_operate,
    span_of,
)
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

cimport cython

cdef enum:
    DONE_
    NOT_SENT_
    LATE_
    OTHER_
    BROKEN_
    INTERRUPTED_
    MORE = 1
    COMMAND = 2
    BEFORE = 64          # room before a message's content for its head
    SAID_BYTES = 512

DONE, NOT_SENT, LATE, OTHER, BROKEN = DONE_, NOT_SENT_, LATE_, OTHER_, BROKEN_

cdef double FRESH_S = 0.001  # a connection that was used so lately is not looked at before it is used again


@cython.final
@cython.auto_pickle(False)
cdef class Line:
    """A connection for one thread at a time; see _fastline.pyi.

    Whether to spin before sleeping is decided by what both have taken of late: spinning helps where a processor is free
    for it, and hurts where others need it.
    """

    cdef int _fd
    cdef kq_curve _curve
    cdef size_t _limit
    cdef uint8_t *_in
    cdef size_t _from, _to
    cdef kq_room _room
    cdef kq_room _out
    cdef uint64_t _id
    cdef double _begun_s, _until_s, _used_s
    cdef kq_spinner _spinner
    cdef bint _parts
    cdef public uint8_t version
    cdef object __weakref__
    cdef object cluster
    cdef object member
    cdef object own
    cdef double since_s
    cdef public object data
    cdef public object frame
    cdef readonly uint64_t queue
    cdef readonly uint64_t service_us
    cdef readonly bint loaded
    cdef readonly double elapsed_s

    def __cinit__(self, int fd, *, size_t limit, uint8_t version):
        self._fd, self._limit, self.version = fd, limit, version
        self._curve.stage = KQ_ENDED
        self._in = <uint8_t *>malloc(self._length())
        if self._in == NULL:
            raise MemoryError

    def __dealloc__(self):
        self._close()
        if self._in != NULL:
            explicit_bzero(self._in, self._length())
            free(self._in)
        if self._room.at != NULL:
            explicit_bzero(self._room.at, self._room.length)
            free(self._room.at)
        if self._out.at != NULL:
            explicit_bzero(self._out.at, self._out.length)
            free(self._out.at)

    cdef inline size_t _length(self) noexcept nogil:
        return self._limit + KQ_HEAD_MAX

    cdef void _close(self) noexcept nogil:
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1
        kq_end_curve(&self._curve, &sodium)

    def close(self):
        """Close the connection."""
        self._close()

    def interrupt(self):
        """End the connection under the thread that uses it, which is told that it broke."""
        if self._fd >= 0:
            shutdown(self._fd, SHUT_RDWR)

    @property
    def open(self):
        """Whether uses can be asked for."""
        return self._curve.stage == KQ_OPEN

    @property
    def spins(self):
        """Whether requests spin at present."""
        return kq_spins(&self._spinner)

    def shake(self, bytes own_public not None, bytes own_secret not None, bytes server_public not None,
              double timeout_s):
        """The handshake with raw keys; whether the peer proved its key and let this one in, in time."""
        cdef uint8_t[SAID_BYTES] said
        cdef size_t length, used
        cdef double until_s = kq_now_s() + timeout_s
        for key in (own_public, own_secret, server_public):
            if len(key) != 32:
                raise ValueError(f"a key of {len(key)} bytes")
        self._curve.server = False
        self._curve.own_public = <const uint8_t *>PyBytes_AS_STRING(own_public)
        self._curve.own_secret = <const uint8_t *>PyBytes_AS_STRING(own_secret)
        self._curve.server_public = <const uint8_t *>PyBytes_AS_STRING(server_public)
        self._from = self._to = 0
        length = kq_begin(&self._curve, said)
        while self._send(said, length, until_s):
            while True:
                used = kq_shake(&self._curve, &sodium, self._in + self._from, self._to - self._from, said, &length)
                self._from += used
                if self._curve.stage == KQ_OPEN:
                    return True
                if self._curve.stage == KQ_ENDED or length:
                    break
                if not used and not self._more(until_s):
                    break
            if self._curve.stage == KQ_ENDED or not length:
                break
        self._close()
        return False

    cdef bint _send(self, const uint8_t *data, size_t length, double until_s) except -1:
        """Send all of it, in time."""
        cdef ssize_t sent
        while length:
            sent = send(self._fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent >= 0:
                data += sent
                length -= sent
            elif errno == EAGAIN or errno == EINTR:
                if not self._ready(POLLOUT, until_s):
                    return False
            else:
                return False
        return True

    cdef bint _more(self, double until_s) except -1:
        """Have more bytes of a handshake."""
        cdef ssize_t got
        if self._from and self._to == self._length():
            memmove(self._in, self._in + self._from, self._to - self._from)
            self._to -= self._from
            self._from = 0
        while self._ready(POLLIN, until_s):
            got = recv(self._fd, self._in + self._to, self._length() - self._to, MSG_DONTWAIT)
            if got > 0:
                self._to += got
                return True
            if got == 0 or (errno != EAGAIN and errno != EINTR):
                return False
        return False

    cdef bint _ready(self, short events, double until_s) except -1:
        cdef pollfd item
        cdef double left_s
        cdef int count
        while True:
            left_s = until_s - kq_now_s()
            if left_s <= 0:
                return False
            item.fd, item.events, item.revents = self._fd, events, 0
            with nogil:
                count = poll(&item, 1, <int>(left_s * 1000) + 1)
            if count > 0:
                return True
            if count < 0:
                if errno != EINTR:
                    return False
                PyErr_CheckSignals()

    def ask(self, bytes content not None, double patience_s):
        """Send a message and wait for one; see _fastline.pyi."""
        cdef size_t length = PyBytes_GET_SIZE(content)
        cdef uint8_t *at
        cdef uint8_t flags
        cdef int code
        if self._curve.stage != KQ_OPEN:
            return None
        if not kq_reserve(&self._room, BEFORE + length):
            raise MemoryError
        memcpy(self._room.at + BEFORE, PyBytes_AS_STRING(content), length)
        at = self._room.at + BEFORE - kq_message_head(length)
        length = kq_write_message(at, &self._curve, &sodium, self._room.at + BEFORE, length, 0)
        self._used_s = kq_now_s()
        self._until_s = self._used_s + patience_s
        code = BROKEN_
        if self._send(at, length, self._until_s):
            while True:
                with nogil:
                    code = self._receive(&at, &length, &flags, 0)
                if code != INTERRUPTED_:
                    break
                PyErr_CheckSignals()
        if code == OTHER_ and not flags & MORE:
            return PyBytes_FromStringAndSize(<const char *>at, length)
        self._close()
        return None

    def operate(
        self,
        uint64_t number,
        bytes verb not None,
        bytes key not None,
        bytes key_id not None,
        bytes data not None,
        bytes associated_data not None,
        bytes proof not None,
        bint digested,
        uint32_t timeout_ms,
        double patience_s,
    ):
        """Send a use of a key and wait for its result; one of the codes, see _fastline.pyi."""
        cdef kq_operate request
        cdef size_t length
        cdef uint8_t *content
        cdef uint8_t *frame
        cdef int code
        if self._curve.stage != KQ_OPEN:
            return NOT_SENT_
        self._begun_s = kq_now_s()
        request.version, request.id, request.timeout_ms, request.digested = self.version, number, timeout_ms, digested
        request.verb, request.key, request.key_id = span_of(verb), span_of(key), span_of(key_id)
        request.data, request.associated_data, request.proof = span_of(data), span_of(associated_data), span_of(proof)
        if not kq_reserve(&self._room, BEFORE + kq_operate_room(&request)):
            raise MemoryError
        content = self._room.at + BEFORE
        length = kq_write_operate(content, &request)
        if not length:
            raise ValueError(f"a request of more than {KQ_MAX_MESSAGE} bytes")
        self._id, self._until_s, self._parts = number, self._begun_s + patience_s, False
        if self._begun_s - self._used_s > FRESH_S and self._gone():
            self._close()
            return NOT_SENT_
        frame = content - kq_message_head(length)
        length = kq_write_message(frame, &self._curve, &sodium, content, length, 0)
        if not self._send(frame, length, self._until_s):
            self._close()
            self._used_s = kq_now_s()
            self.elapsed_s = self._used_s - self._begun_s
            return NOT_SENT_ if self._until_s > self._used_s else BROKEN_
        code = self._await(kq_spin_s(&self._spinner, 1e-6 * self.service_us))
        self._used_s = kq_now_s()
        self.elapsed_s = self._used_s - self._begun_s
        if code == DONE_:
            kq_waited(&self._spinner, self.elapsed_s - 1e-6 * self.service_us)
        return code

    cdef bint _gone(self) noexcept nogil:
        """Whether the peer has closed the connection meanwhile."""
        cdef uint8_t byte
        cdef ssize_t got = recv(self._fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK)
        return got == 0 or (got < 0 and errno != EAGAIN and errno != EINTR)

    def resume(self):
        """Wait on for the request that ended in ``OTHER``."""
        code = self._await(0)
        self._used_s = kq_now_s()
        self.elapsed_s = self._used_s - self._begun_s
        return code

    cdef int _await(self, double spin_s) except? -1:
        cdef kq_result result
        cdef uint8_t *content
        cdef size_t length
        cdef uint8_t flags
        cdef int code
        while True:
            with nogil:
                code = self._receive(&content, &length, &flags, spin_s)
            if code == INTERRUPTED_:
                PyErr_CheckSignals()
                continue
            if code != OTHER_:
                if code == BROKEN_:
                    self._close()
                return code
            if flags & MORE:
                self._parts = True
                continue
            if self._parts:
                self._parts = False
                self.frame = b""  # no reply has a second frame
                return OTHER_
            if kq_read_result(content, length, &result) and result.version == self.version:
                if result.id != self._id:
                    explicit_bzero(content, length)
                    continue  # the answer to an earlier request, which was given up
                self.data = bytes_of(result.data)
                explicit_bzero(content, length)
                self.queue, self.service_us, self.loaded = result.queue, result.service_us, result.loaded
                return DONE_
            self.frame = PyBytes_FromStringAndSize(<const char *>content, length)
            return OTHER_

    cdef int _receive(self, uint8_t **content, size_t *length, uint8_t *flags, double spin_s) noexcept nogil:
        """OTHER once a frame of a message is there, LATE, BROKEN or INTERRUPTED."""
        cdef kq_frame frame
        cdef size_t needed
        cdef pollfd item
        cdef ssize_t got
        cdef int found
        cdef double wait_s, now_s = kq_now_s(), before_s
        cdef double spin_until_s = now_s + spin_s if spin_s else 0
        while True:
            found = kq_next_frame(self._in + self._from, self._to - self._from, self._limit, &frame, &needed)
            if found < 0:
                return BROKEN_
            if found:
                if not kq_open_message(&self._curve, &sodium, &frame, content, length, flags):
                    return BROKEN_
                self._from += frame.whole
                if self._from == self._to:
                    self._from = self._to = 0  # it stays where it is until more is received
                if flags[0] & COMMAND:
                    continue
                return OTHER_
            if self._from and self._from + needed > self._length():
                memmove(self._in, self._in + self._from, self._to - self._from)
                self._to -= self._from
                self._from = 0
            wait_s = self._until_s - now_s
            if wait_s <= 0:  # while it spins too: a peer may send for ever what is no answer
                return LATE_
            if not spin_until_s:
                item.fd, item.events, item.revents = self._fd, POLLIN, 0
                found = poll(&item, 1, <int>(wait_s * 1000) + 1)
                if found < 0:
                    return INTERRUPTED_ if errno == EINTR else BROKEN_
                if not found:
                    return LATE_
            got = recv(self._fd, self._in + self._to, self._length() - self._to, MSG_DONTWAIT)
            if got > 0:
                self._to += got
                now_s = kq_now_s()
                continue
            if got == 0 or (errno != EAGAIN and errno != EINTR):
                return BROKEN_
            before_s, now_s = now_s, kq_now_s()
            if spin_until_s:
                if now_s < spin_until_s and now_s - before_s < KQ_YIELD_LONG_S:
                    sched_yield()
                else:
                    spin_until_s = 0


cdef int _forks = 0


def _forked():
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)

cdef enum:
    CUTS_MAX = 10_000
    WINDOW = 64              # requests of a batch that are under way at once
    REFILL = 32              # ... of which so many are awaited before others are sent
    CHUNK = 2_048            # requests of a batch for which one node is chosen
    OUT_BYTES = 128 * 1024   # requests that are sent in one go

cdef double CHOICE_S = 0.02
cdef double LINE_AGAIN_S = 1.0


@cython.final
@cython.auto_pickle(False)
cdef class _Cut:
    """The uses of one key with one verb: what is the same each time, and the node that was chosen a moment ago."""

    cdef str verb, name, request_class
    cdef bytes verb_bytes, name_bytes, key_id
    cdef object known
    cdef object hashed
    cdef Histograms times
    cdef size_t digest_bytes, most
    cdef bint older          # than the newest version of the key
    cdef bint versioned      # what is given says of which version it is
    cdef uint64_t version
    cdef object cluster
    cdef str node
    cdef object state
    cdef uint64_t changes
    cdef double until_s, patience_s
    # What came of the choice since the router was told.
    cdef uint64_t uses, service_us
    cdef double elapsed_s
    cdef uint64_t queue


cdef inline uint64_t _version_in(bytes ciphertext) noexcept:
    """As ``engine.protocol.ciphertext.version_in``."""
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(ciphertext)
    if PyBytes_GET_SIZE(ciphertext) < 7 or at[0] != c"K" or at[1] != c"Q" or at[2] != 1:
        return 0
    return <uint64_t>at[3] << 24 | <uint64_t>at[4] << 16 | <uint64_t>at[5] << 8 | at[6]


cdef struct _Done:
    # What came of a part of many uses.
    uint64_t uses, service_us, queue


@cython.final
@cython.auto_pickle(False)
cdef class Shortcuts:
    """Uses of keys by the shortest way; see _fastline.pyi."""

    cdef object _calls, _router, _source, _identity, _members
    cdef public object open_line
    cdef size_t _max_ciphertext
    cdef dict _cuts
    cdef dict _idle
    cdef dict _next_s
    cdef object _lines
    cdef int _most
    cdef int _born
    cdef bint _closed

    def __cinit__(self, calls, source, identity, members, open_line, *, int most, size_t max_ciphertext):
        self._calls, self._router, self._source = calls, calls.router, source
        self._identity, self._members, self.open_line = identity, members, open_line
        self._most, self._max_ciphertext = most, max_ciphertext
        self._cuts, self._idle, self._next_s = {}, {}, {}
        self._lines = weakref.WeakSet()
        self._born = _forks

    @property
    def forked(self):
        """Whether this process is a child of the one that it was made in."""
        return self._born != _forks

    def close(self):
        """Close every line; who uses one is told that it broke."""
        self._closed = True
        for reference in self._lines.data.copy():  # in one go: other threads may be adding
            line = reference()
            if line is not None:
                line.interrupt()
        self.reap(float("inf"))

    def reap(self, double before_s):
        """Close the lines that were last used before that (monotonic seconds)."""
        for lines in list(self._idle.values()):
            for line in list(lines):
                if (<Line>line).since_s < before_s:
                    try:
                        lines.remove(line)
                    except ValueError:
                        continue  # somebody took it meanwhile
                    (<Line>line)._close()

    def use(self, str verb not None, name, data, associated_data, proof, digest, double timeout_s, lost):
        """The result, or None where the ordinary way has to be taken; see _fastline.pyi."""
        cdef _Cut cut
        if type(name) is not str or self._closed:
            return None
        cut = self._find(verb, name)
        if cut is None or cut.older:
            return None
        if cut.versioned and type(data) is bytes and _version_in(data) != cut.version:
            if not 0 < _version_in(data) < cut.version:
                return None
            cut = self._find(verb, version_label(name, _version_in(data)))
            if cut is None:
                return None
        if digest is not None:
            if data is not None or type(digest) is not bytes or not cut.digest_bytes or <size_t>len(digest) != cut.digest_bytes:
                return None
            data = digest
        elif not self._fits(cut, data, associated_data, proof):
            return None
        elif cut.hashed is not None:
            data = cut.hashed(data).digest()
        if not self._fits(cut, data, associated_data, proof):
            return None
        return self._run(cut, data, associated_data, proof, cut.digest_bytes > 0, timeout_s, lost)

    def use_many(self, str verb not None, name, list uses not None, double timeout_s, bint stop):
        """The results of many uses, with None where the ordinary way has to be taken; see _fastline.pyi."""
        cdef _Cut cut
        cdef Line line
        cdef list results = [None] * len(uses)
        cdef size_t at = 0, end, count = len(uses)
        cdef double now_s, patience_s
        cdef int code = DONE_
        cdef _Done done
        if type(name) is not str or self._closed:
            return results
        cut = self._find(verb, name)
        if cut is not None and cut.older:
            return results
        while cut is not None and at < count and code == DONE_:
            now_s = kq_now_s()
            if not self._choose(cut, now_s):
                break
            cut.until_s = 0
            # Another thread may choose anew meanwhile.
            node, state = cut.node, cut.state
            patience_s = cut.patience_s if cut.patience_s < timeout_s else timeout_s
            done.uses = done.service_us = 0
            try:
                line = self._take(node, cut.cluster, now_s)
                if line is None:
                    self._router.dropped(node)
                    break
                end = min(at + CHUNK, count)
                code = self._many(cut, line, uses, results, at, end, node, state, timeout_s, patience_s, stop, &done)
            except BaseException:
                self._router.dropped(node)
                raise
            at = end
            if code == BROKEN_:
                self._router.failed(node, kq_now_s())
                continue
            self._give(node, line)
            if code == LATE_:
                self._router.late(node, kq_now_s())
            self._router.dropped(node)
            if done.uses:
                # How long the way was can't be told where many are on it; so that stays as it is known.
                load = wire.Load(done.queue, done.service_us // done.uses, True)
                elapsed_s = 1e-6 * (<double>done.service_us / done.uses + state.round_trip_us)
                self._router.learned_direct(node, cut.name, cut.request_class, load, elapsed_s, kq_now_s(),
                                            done.uses)
        return results

    cdef int _many(self, _Cut cut, Line line, list uses, list results, size_t begin, size_t end, str node, object state,
                   double timeout_s, double patience_s, bint stop, _Done *done) except -1:
        """Do a part of them over one line: DONE, LATE or BROKEN, or OTHER where it was stopped by an error."""
        cdef kq_operate request
        cdef kq_result result
        cdef uint64_t base = line._id + 1
        cdef size_t sent = begin, under_way = 0, awaited, filled, length, needed
        cdef uint8_t *at
        cdef uint8_t *content
        cdef uint8_t flags
        cdef bytes data, associated, proof
        cdef bint stopped = False
        cdef int code
        cdef double now_s
        cdef double[CHUNK] sent_s
        line._id += end - begin
        if not kq_reserve(&line._out, OUT_BYTES):
            raise MemoryError
        request.version, request.timeout_ms = line.version, max(1, min(<long>(timeout_s * 1000), wire.MAX_TIMEOUT_MS))
        request.verb, request.key, request.key_id = span_of(cut.verb_bytes), span_of(cut.name_bytes), span_of(cut.key_id)
        request.digested = cut.digest_bytes > 0
        while True:
            filled, now_s = 0, kq_now_s()
            while sent < end and under_way < WINDOW and not stopped:
                given = uses[sent]
                if not self._fits(cut, given[0], given[1], given[2]):
                    sent += 1  # the ordinary way says what is wrong with it
                    continue
                data, associated, proof = given
                if cut.versioned and _version_in(data) != cut.version:
                    sent += 1
                    continue
                if cut.hashed is not None:
                    data = cut.hashed(data).digest()
                request.id = base + (sent - begin)
                request.data, request.associated_data, request.proof = span_of(data), span_of(associated), span_of(proof)
                needed = BEFORE + kq_operate_room(&request)
                if filled + needed > OUT_BYTES:
                    break
                at = line._out.at + filled
                length = kq_write_operate(at + BEFORE, &request)
                if length:
                    filled += kq_write_message(at, &line._curve, &sodium, at + BEFORE, length, 0)
                    under_way += 1
                    # It was moved to the front; what stands behind it is the end of what it was before it was sealed.
                    explicit_bzero(line._out.at + filled, at + BEFORE + length - (line._out.at + filled))
                sent_s[sent - begin] = now_s
                sent += 1
            if filled:
                if not line._send(line._out.at, filled, now_s + patience_s):
                    line._close()
                    return BROKEN_
            if not under_way:
                return OTHER_ if stopped else DONE_
            awaited = under_way if sent == end or stopped or under_way < REFILL else under_way - REFILL
            line._until_s = now_s + patience_s
            while awaited:
                with nogil:
                    code = line._receive(&content, &length, &flags, 0)
                if code == INTERRUPTED_:
                    PyErr_CheckSignals()
                    continue
                if code != OTHER_:
                    if code == BROKEN_:
                        line._close()
                    return code
                if flags & MORE:
                    line._close()  # no reply has a second frame
                    return BROKEN_
                now_s = kq_now_s()
                if kq_read_result(content, length, &result) and result.version == line.version:
                    if base <= result.id < base + (end - begin):
                        results[begin + (result.id - base)] = bytes_of(result.data)
                        under_way -= 1
                        awaited -= 1
                        line._until_s = now_s + patience_s
                        cut.times.take(0, now_s - sent_s[result.id - base])
                        done.uses += 1
                        done.queue = result.queue
                        done.service_us += result.service_us
                    explicit_bzero(content, length)
                    continue
                reply = self._calls.direct_any(PyBytes_FromStringAndSize(<const char *>content, length))
                if reply is None or not base <= reply.id < base + (end - begin):
                    continue
                under_way -= 1
                awaited -= 1
                line._until_s = now_s + patience_s
                # It counts as one request by itself, with the way as it is known: many were on it.
                took_s = 1e-6 * (reply.load.service_us + state.round_trip_us)
                self._router.sent(node, now_s)
                try:
                    self._calls.direct_outcome(node, cut.verb, reply, now_s - took_s, cut.name, cut.request_class)
                except Exception as error:
                    results[begin + (reply.id - base)] = error
                    stopped = stopped or stop

    cdef bint _fits(self, _Cut cut, data, associated_data, proof) except -1:
        """Whether there is nothing wrong with what is given; the ordinary way says what."""
        return (
            type(data) is bytes and <size_t>len(data) <= cut.most
            and type(associated_data) is bytes and len(associated_data) <= wire.MAX_AAD
            and type(proof) is bytes and <size_t>len(proof) <= KQ_MAX_PROOF
        )

    cdef _Cut _find(self, str verb, str label):
        """The cut of a version, by its label; None if nothing is known of it, or it is not for such uses."""
        cdef _Cut cut = self._cuts.get((verb, label))
        if cut is None or self._calls.peek(label) is not cut.known:
            cut = self._make(verb, label)
        return cut

    cdef _Cut _make(self, str verb, str label):
        cdef _Cut cut
        known = self._calls.peek(label)
        if known is None:
            return None
        algo = known.algorithm
        if verb not in algo.operations:
            return None
        cut = _Cut.__new__(_Cut)
        cut.verb, cut.name, cut.known = verb, label, known
        cut.verb_bytes, cut.name_bytes = verb.encode(), known.info.name.encode()
        cut.key_id, cut.version, cut.older = known.record.manifest.key_id, known.version, label != known.info.name
        cut.versioned = verb == RequestType.DECRYPT and algo.kind is KeyKind.AES
        cut.request_class = known.request_class(verb)
        cut.times = self._calls.times_of(cut.request_class)
        cut.most = wire.MAX_DATA
        if verb in (RequestType.SIGN, RequestType.VERIFY) and algo.prehashed:
            cut.hashed = getattr(hashlib, algo.hash_name)
            cut.digest_bytes = cut.hashed().digest_size
            cut.most = <size_t>-1
        elif verb == RequestType.DECRYPT:
            cut.most = self._max_ciphertext
        if len(self._cuts) >= CUTS_MAX:
            self._cuts.clear()
        self._cuts[verb, label] = cut
        return cut

    cdef bint _choose(self, _Cut cut, double now_s) except -1:
        """Have a node chosen: one that has the key loaded."""
        self._settle(cut, now_s)
        cut.until_s = 0  # no other thread takes the old choice for one by this manifest
        cut.cluster = self._source.cluster
        cut.changes = self._router.changes
        found = self._router.begin_direct(cut.request_class, cut.name, cut.known.holders, now_s)
        if found is None:
            return False
        cut.node, cut.patience_s, cut.state = found
        cut.until_s = now_s + CHOICE_S
        return True

    cdef int _settle(self, _Cut cut, double now_s) except -1:
        """Tell the router what came of the choice, all uses as one."""
        cdef uint64_t uses = cut.uses
        cdef double elapsed_s = cut.elapsed_s
        if uses:
            load = wire.Load(cut.queue, cut.service_us // uses, True)
            cut.uses, cut.service_us, cut.elapsed_s = 0, 0, 0  # before other threads go on, and add to them
            self._router.learned_direct(cut.node, cut.name, cut.request_class, load, elapsed_s / uses, now_s, uses)
        return 0

    cdef object _run(self, _Cut cut, bytes data, bytes associated_data, bytes proof, bint digested, double timeout_s,
                     object lost):
        cdef double now_s = kq_now_s(), patience_s
        cdef Line line = None
        cdef int code
        cdef bint fresh = False
        cdef uint64_t number
        cdef object state, result
        cdef str node
        if (
            now_s < cut.until_s
            and cut.cluster is self._source.cluster
            and cut.changes == self._router.changes
            and not cut.state.outstanding
        ):
            cut.state.outstanding = 1
        elif self._choose(cut, now_s):
            fresh = True
        else:
            return None
        # Another thread may choose anew while this one waits.
        node, state = cut.node, cut.state
        patience_s = cut.patience_s if cut.patience_s < timeout_s else timeout_s
        try:
            line = self._take(node, cut.cluster, now_s)
            if line is None:
                self._router.dropped(node)
                return None
            number = line._id + 1
            code = line.operate(number, cut.verb_bytes, cut.name_bytes, cut.key_id, data, associated_data, proof,
                                digested, max(1, min(<long>(timeout_s * 1000), wire.MAX_TIMEOUT_MS)), patience_s)
        except ValueError:
            if line is not None:
                self._give(node, line)
            self._router.dropped(node)
            raise
        except BaseException:
            self._router.dropped(node)
            raise
        if code == DONE_:
            cut.times.take(0, line.elapsed_s)
        if code == DONE_ and line.loaded:
            result, line.data = line.data, None
            if fresh or cut.state is not state:
                self._router.answered_direct(node, cut.name, cut.request_class,
                                             wire.Load(line.queue, line.service_us, True), line.elapsed_s, line._used_s)
            else:
                if state.outstanding:
                    state.outstanding -= 1
                cut.uses += 1
                cut.queue = line.queue
                cut.service_us += line.service_us
                cut.elapsed_s += line.elapsed_s
            self._give(node, line)
            return result
        cut.until_s = 0
        return self._ended(cut, node, line, code, patience_s, lost)

    cdef object _ended(self, _Cut cut, str node, Line line, int code, double patience_s, object lost):
        """Whatever is not the plain result."""
        if code == DONE_:
            result, line.data = line.data, None
            self._router.answered_direct(node, cut.name, cut.request_class,
                                         wire.Load(line.queue, line.service_us, False), line.elapsed_s, line._used_s)
            self._give(node, line)
            return result
        if code == NOT_SENT_:
            self._router.dropped(node)
            return None
        while code == OTHER_:
            frame, line.frame = line.frame, None
            reply = self._calls.direct_reply(frame, line._id)
            if reply is not None:
                self._give(node, line)
                return self._calls.direct_outcome(node, cut.verb, reply, line._used_s - line.elapsed_s, cut.name,
                                                  cut.request_class)
            if line.elapsed_s > patience_s:
                code = LATE_
            else:
                try:
                    code = line.resume()
                except BaseException:
                    self._router.dropped(node)
                    raise
        if code == DONE_:
            cut.times.take(0, line.elapsed_s)
            return self._ended(cut, node, line, code, patience_s, lost)
        lost.spent_s = line.elapsed_s
        if code == BROKEN_:
            lost[node] = NodeUnavailable(f"{node}: the connection broke")
            self._router.failed(node, line._used_s)
            return None
        lost[node] = DeadlineExceeded(f"{node}: no reply within {line.elapsed_s * 1000:.0f} ms")
        self._give(node, line)
        self._router.late(node, line._used_s)
        self._router.dropped(node)
        return None

    # --- lines ---

    cdef Line _take(self, str node, object cluster, double now_s):
        """A line to a node by the newest manifest; None if there is none, or none to be had."""
        cdef Line line
        cdef list idle = self._idle.get(node)
        if idle is None:
            idle = self._idle.setdefault(node, [])
        while idle:
            line = idle.pop()
            if line.cluster is not cluster:
                if line.member is not self._members.get(node) or line.own is not self._identity.current:
                    line._close()
                    continue
                line.cluster = cluster
            if line._curve.stage == KQ_OPEN:
                return line
        if now_s < self._next_s.get(node, 0.0) or len(self._lines) >= self._most:
            return None
        member, own = self._members.get(node), self._identity.current
        made = None if member is None else self.open_line(own, member)
        if made is None:
            self._next_s[node] = now_s + LINE_AGAIN_S
            return None
        line = made
        line.cluster, line.member, line.own = cluster, member, own
        self._lines.add(line)
        if self._closed:  # meanwhile
            line._close()
            return None
        return line

    cdef int _give(self, str node, Line line) except -1:
        line.since_s = line._used_s
        if self._closed:
            line._close()
        elif line._curve.stage == KQ_OPEN:
            (<list>self._idle[node]).append(line)
        return 0
