"""The serving end of connections that speak ZMTP with CURVE, without a thread of its own; see _router.pyi.

One thread owns it. A message lies in the receive buffer, or in the connection's own where it did not come whole, until
the next one is taken; then it is overwritten. A connection that waits keeps no buffer.
"""

import time
from collections import deque

from zmq.utils import z85

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from engine.client._posix cimport (
    MSG_DONTWAIT,
    MSG_MORE,
    MSG_NOSIGNAL,
    POLLIN,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    accept4,
    close,
    explicit_bzero,
    getsockopt,
    poll,
    pollfd,
    recv,
    send,
    setsockopt,
)
from engine.client._zmtp cimport (
    KQ_ENDED,
    KQ_HEAD_MAX,
    KQ_JUDGED,
    KQ_KEY,
    KQ_OPEN,
    kq_begin,
    kq_end_curve,
    kq_frame,
    kq_judge,
    kq_message_head,
    kq_next_frame,
    kq_open_message,
    kq_shake,
    kq_write_message,
    sodium,
)
from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, errno as c_errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    int EPOLL_CTL_ADD
    int EPOLL_CTL_DEL
    int EPOLL_CTL_MOD
    int EPOLL_CLOEXEC
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout_ms)

cdef extern from "<netinet/tcp.h>" nogil:
    int IPPROTO_TCP
    int TCP_INFO
    int TCP_NODELAY

cdef extern from *:
    """
    #include <netinet/in.h>
    """

cdef enum:
    TURN = 8           # frames of one connection before others have their turn
    ACCEPTS = 64       # connections that are accepted in one go
    SHAKES = 16        # reads of connections in their handshake, two scalar multiplications each, in one go
    PARTS_MAX = 64     # frames of a message, which is none for anybody here if it has more than one
    KEPT_MIN = 1024
    WATCHED_MAX = 16
    MIN_RTT_AT = 148   # of tcpi_min_rtt in Linux's struct tcp_info, which the C library's may be too short for
    MORE = 1
    COMMAND = 2

cdef uint64_t OTHER = <uint64_t>1 << 63  # in an event: a descriptor that is no connection's


@cython.final
@cython.auto_pickle(False)
cdef class Connection:
    """One accepted connection; see _router.pyi."""

    def __init__(self):
        raise TypeError("connections are accepted by a router")

    def __dealloc__(self):
        cdef kq_waiting *each
        if self.open:  # its router went without a close
            close(self.fd)
        kq_end_curve(&self.curve, &sodium)
        if self.kept != NULL:
            explicit_bzero(self.kept, self.kept_room)
            free(self.kept)
        while self.first != NULL:
            each, self.first = self.first, self.first.next
            free(each)

    @property
    def proved(self):
        """Whether the peer has proved a member's key."""
        return self.curve.stage == KQ_OPEN

    @property
    def network_us(self):
        """The least time of late that the network took to the peer and back, as TCP measured it; 0 if not known."""
        cdef uint8_t[256] info
        cdef unsigned length = sizeof(info)
        cdef uint32_t least_us
        if not self.open or getsockopt(self.fd, IPPROTO_TCP, TCP_INFO, info, &length) < 0 or length < MIN_RTT_AT + 4:
            return 0
        memcpy(&least_us, &info[MIN_RTT_AT], 4)
        return 0 if least_us == 0xffffffff else least_us

    @property
    def held(self):
        """Bytes that it has in memory: a message that is not whole, and replies that were not taken."""
        return self.kept_room + self.waiting_bytes


@cython.final
@cython.auto_pickle(False)
cdef class _Place:
    """A listening descriptor, and the pair that is served there."""

    cdef int fd
    cdef int number
    cdef uint8_t[32] public
    cdef uint8_t[32] secret

    def __dealloc__(self):
        explicit_bzero(self.secret, 32)


@cython.final
@cython.auto_pickle(False)
cdef class Router:
    """Connections of members and the descriptors beside them; see _router.pyi."""

    def __cinit__(self, admit, *, size_t limit, size_t replies_max):
        self._admit, self.limit, self.replies_max = admit, limit, replies_max
        self.most = 1 << 30
        self.accepting = True
        self._connections, self._shaking, self._places, self._watched = set(), set(), {}, {}
        self._ready, self._dead = deque(), []
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            PyErr_SetFromErrno(OSError)
        self._scratch = <uint8_t *>malloc(self._room())
        if self._scratch == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self._scratch != NULL:
            explicit_bzero(self._scratch, self._room())
            free(self._scratch)
        if self._epoll > 0:
            close(self._epoll)

    cdef size_t _room(self) noexcept:
        """Bytes of the receive buffer: two of the longest messages."""
        return 2 * (self.limit + KQ_HEAD_MAX)

    def __len__(self):
        return len(self._connections)

    @property
    def connections(self):
        """Those that are open, in no order."""
        return list(self._connections)

    @property
    def pending(self):
        """Whether something was taken in that ``receive`` has not looked at."""
        return self._at < self._count or self._current is not None or bool(self._ready)

    def fileno(self):
        """Readable while there is something to do (epoll(7))."""
        return self._epoll

    # --- descriptors ---

    def listen(self, int fd, int number, bytes public not None, bytes secret not None):
        """Accept connections at a listening descriptor, which is the router's from now on."""
        cdef _Place place = _Place.__new__(_Place)
        if len(public) != KQ_KEY or len(secret) != KQ_KEY:
            raise ValueError(f"keys of {len(public)} and {len(secret)} bytes")
        place.fd, place.number = fd, number
        memcpy(place.public, PyBytes_AS_STRING(public), KQ_KEY)
        memcpy(place.secret, PyBytes_AS_STRING(secret), KQ_KEY)
        self._places[fd] = place
        if self.accepting:
            self._add(fd)

    def leave(self, int fd):
        """Close a listening descriptor. Connections that came in there stay."""
        if self._places.pop(fd, None) is not None:
            epoll_ctl(self._epoll, EPOLL_CTL_DEL, fd, NULL)
            close(fd)

    def accept(self, bint wanted):
        """Accept connections, or leave those that come in the kernel's queue."""
        if wanted is not self.accepting:
            self.accepting = wanted
            for fd in self._places:
                if wanted:
                    self._add(fd)
                else:
                    epoll_ctl(self._epoll, EPOLL_CTL_DEL, fd, NULL)

    def watch(self, int fd, int bit):
        """Have ``wait`` tell of a descriptor that is readable by that bit."""
        if len(self._watched) >= WATCHED_MAX:
            raise ValueError(f"more than {WATCHED_MAX} descriptors")
        self._watched[fd] = bit
        self._add(fd)

    def unwatch(self, int fd):
        """Tell of it no more."""
        if self._watched.pop(fd, None) is not None:
            epoll_ctl(self._epoll, EPOLL_CTL_DEL, fd, NULL)

    def _add(self, int fd):
        cdef epoll_event event
        event.events, event.data.u64 = EPOLLIN, OTHER | <uint64_t>fd
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            PyErr_SetFromErrno(OSError)

    def close(self):
        """End every connection and close every listening descriptor."""
        for connection in list(self._connections):
            self._end(connection)
        for fd in list(self._places):
            self.leave(fd)
        self._wipe()
        self._current = None
        self._count = self._at = self._round = 0
        self._ready.clear()

    # --- connections ---

    def end(self, Connection connection not None):
        """Close a connection."""
        self._end(connection)

    cdef int _end(self, Connection connection) except -1:
        if connection.open:
            connection.open = False
            epoll_ctl(self._epoll, EPOLL_CTL_DEL, connection.fd, NULL)
            close(connection.fd)
            self._connections.discard(connection)
            self._shaking.discard(connection)
            self._dead.append(connection)  # an event that was told already may name it
            kq_end_curve(&connection.curve, &sodium)  # so nothing more of it is opened, or kept by who keeps it
            if self.gone is not None:
                self.gone(connection)
        return 0

    def expire(self, double before_s):
        """End the connections whose handshake began before that and is not over; how many."""
        late = [each for each in self._shaking if (<Connection>each).since_s < before_s]
        for connection in late:
            self._end(connection)
        return len(late)

    cdef int _accept(self, int listening) except -1:
        cdef _Place place = self._places[listening]
        cdef Connection connection
        cdef epoll_event event
        cdef uint8_t[64] greeting
        cdef int fd, one = 1, i
        for i in range(ACCEPTS):
            if <size_t>len(self._connections) >= self.most:
                self.accept(False)
                return 0
            fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                if c_errno in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
                    self.failed += 1
                    self.accept(False)
                elif c_errno in (ECONNABORTED, EINTR):
                    continue
                return 0
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
            connection = Connection.__new__(Connection)
            connection.fd, connection.place, connection.since_s = fd, place.number, time.monotonic()
            connection.user = connection.member = ""
            connection.pair, connection.open = place, True
            connection.curve.server = True
            connection.curve.own_public, connection.curve.own_secret = place.public, place.secret
            event.events, event.data.ptr = EPOLLIN, <void *>connection
            if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
                close(fd)
                connection.open = False
                return 0
            self._connections.add(connection)
            self._shaking.add(connection)
            self._put(connection, greeting, kq_begin(&connection.curve, greeting))
        return 0

    cdef int _shake(self, Connection connection) except -1:
        """Go on with a handshake by what came."""
        cdef uint8_t[512] said
        cdef size_t used, length
        while self._from != self._to and connection.curve.stage != KQ_OPEN:
            used = kq_shake(&connection.curve, &sodium, self._from, self._to - self._from, said, &length)
            if length:
                self._put(connection, said, length)
            if not used:
                break
            self._from += used
            if connection.curve.stage == KQ_JUDGED:
                user = z85.encode(PyBytes_FromStringAndSize(<char *>connection.curve.peer_public, KQ_KEY)).decode()
                welcome = bool(self._admit(user))
                if not connection.open:
                    break
                if welcome:
                    connection.user = user
                self._put(connection, said, kq_judge(&connection.curve, &sodium, welcome, said))
                connection.pair = None
                if welcome:
                    self._shaking.discard(connection)
        if connection.curve.stage == KQ_ENDED:
            self._end(connection)
        return 0

    # --- waiting ---

    cdef int wait(self, int timeout_ms, int *found) except -1:
        """Wait for something to do, unless there is: 1 for connections, and the bits of watched descriptors."""
        cdef int i, count, fd
        cdef epoll_event *event
        found[0] = 0
        if self._at < self._count or self._current is not None or self._round:
            found[0] = 1 | self.beside(0)  # a round may be long
            return 0
        if self._dead:
            self._dead.clear()
        if self._ready:
            timeout_ms = 0
        self._count = self._at = self._shakes = 0
        if timeout_ms:
            with nogil:
                count = epoll_wait(self._epoll, self._events, EVENTS_MAX, timeout_ms)
        else:
            count = epoll_wait(self._epoll, self._events, EVENTS_MAX, 0)
        if count < 0:
            if c_errno == EINTR:
                PyErr_CheckSignals()
                return 0
            PyErr_SetFromErrno(OSError)
        for i in range(count):
            event = &self._events[i]
            if not event.data.u64 & OTHER:
                self._events[self._count] = event[0]
                self._count += 1
                continue
            fd = <int>(event.data.u64 & 0xffffffff)
            if fd in self._places:
                self._accept(fd)
            elif fd in self._watched:
                found[0] |= <int>self._watched[fd]
        self._round = len(self._ready)
        if self._count or self._round:
            found[0] |= 1
        return 0

    cdef int beside(self, int timeout_ms) except -1:
        """Wait for the watched descriptors alone; the bits of those that are readable."""
        cdef pollfd[WATCHED_MAX] sources
        cdef int i = 0, found = 0, count
        for fd in self._watched:
            sources[i].fd, sources[i].events, sources[i].revents = fd, POLLIN, 0
            i += 1
        with nogil:
            count = poll(sources, i, timeout_ms)
        if count > 0:
            for i, bit in enumerate(self._watched.values()):
                if sources[i].revents:
                    found |= <int>bit
        return found

    # --- messages ---

    cdef Connection next(self, uint8_t **content, size_t *length, size_t *parts):
        """The connection that the next message came by; None if there is none before the next ``wait``.

        The content lies where it came until the next call. ``parts`` is 1, or how many frames the message had: then
        its content is none. In between two waits each connection has one turn, so that new ones and what is watched
        have theirs, however much one has sent.
        """
        cdef epoll_event *event
        cdef Connection connection
        self._wipe()
        while True:
            connection = self._current
            if connection is not None:
                if connection.open and self._parse(connection, content, length, parts):
                    self._taken, self._taken_length = content[0], length[0]
                    return connection
                self._leave()
            if self._at < self._count:
                event = &self._events[self._at]
                self._at += 1
                connection = <Connection>event.data.ptr
                if not connection.open:
                    continue
                if event.events & EPOLLOUT:
                    self._flush(connection)
                if connection.open and event.events & ~EPOLLOUT and not connection.queued:
                    if connection.curve.stage != KQ_OPEN:
                        if self._shakes == SHAKES:
                            continue  # the next wait tells of it again
                        self._shakes += 1
                    self._read(connection)
            elif self._round:
                self._round -= 1
                connection = self._ready.popleft()
                connection.queued = False
                if connection.open:
                    self._current, self._turn, self._scratched = connection, TURN, False
                    self._from, self._to = connection.kept, connection.kept + connection.kept_length
            else:
                self._count = self._at = 0
                return None

    cdef void _wipe(self) noexcept:
        """Overwrite the message that was taken."""
        if self._taken_length:
            explicit_bzero(self._taken, self._taken_length)
            self._taken_length = 0

    cdef int _read(self, Connection connection) except -1:
        """Take in what came by a connection, and look at it."""
        cdef uint8_t *to = self._scratch
        cdef size_t room = self._room()
        cdef ssize_t got
        if connection.kept_length:
            to, room = connection.kept + connection.kept_length, connection.kept_room - connection.kept_length
        got = recv(connection.fd, to, room, MSG_DONTWAIT)
        if got <= 0:
            if got == 0 or c_errno not in (EAGAIN, EINTR):
                self._end(connection)
            return 0
        self._current, self._turn, self._scratched = connection, TURN, not connection.kept_length
        self._from = self._scratch
        if connection.kept_length:
            connection.kept_length += got
            self._from = connection.kept
        self._to = to + got
        if connection.curve.stage != KQ_OPEN:
            self._shake(connection)
        return 0

    cdef int _leave(self) except -1:
        """Keep what is left of the connection at hand: it is no whole message, or its turn is over."""
        cdef Connection connection = self._current
        cdef size_t left = self._to - self._from, wanted = left, needed
        cdef kq_frame frame
        cdef uint8_t *room
        cdef bint whole
        cdef int one = 1
        self._current = None
        if connection is None:  # all was closed meanwhile
            return 0
        if connection.corked:
            connection.corked = False
            if connection.open:  # tcp(7): setting it sends what waits
                setsockopt(connection.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
        if not connection.open or not left:
            if connection.kept != NULL:
                explicit_bzero(connection.kept, connection.kept_room)
                free(connection.kept)
            elif self._scratched and not connection.open:
                explicit_bzero(self._scratch, self._to - self._scratch)
            connection.kept, connection.kept_length, connection.kept_room = NULL, 0, 0
            return 0
        whole = kq_next_frame(self._from, left, self.limit, &frame, &needed) != 0
        if needed > wanted:
            wanted = needed
        if connection.kept_room < wanted + KEPT_MIN or self._scratched:
            room = <uint8_t *>malloc(wanted + KEPT_MIN)
            if room == NULL:
                self._end(connection)
                return 0
            memcpy(room, self._from, left)
            explicit_bzero(self._from, left)
            if connection.kept != NULL:
                explicit_bzero(connection.kept, connection.kept_room)
                free(connection.kept)
            connection.kept, connection.kept_room = room, wanted + KEPT_MIN
        else:
            memmove(connection.kept, self._from, left)
        connection.kept_length = left
        if whole and connection.curve.stage == KQ_OPEN:
            connection.queued = True
            self._ready.append(connection)
        return 0

    cdef bint _parse(self, Connection connection, uint8_t **content, size_t *length, size_t *parts) except -1:
        """The next whole message of the connection at hand, as long as it is its turn."""
        cdef kq_frame frame
        cdef size_t needed
        cdef uint8_t flags
        cdef int found
        while self._turn and connection.curve.stage == KQ_OPEN and self._from != self._to:
            found = kq_next_frame(self._from, self._to - self._from, self.limit, &frame, &needed)
            if not found:
                return False
            if found < 0 or not kq_open_message(&connection.curve, &sodium, &frame, content, length, &flags):
                self._end(connection)
                return False
            self._from += frame.whole
            self._turn -= 1
            if flags & COMMAND:
                self._command(connection, content[0], length[0])
                explicit_bzero(content[0], length[0])
                continue
            connection.parts += 1
            if flags & MORE:
                explicit_bzero(content[0], length[0])
                if connection.parts >= PARTS_MAX:
                    self._end(connection)
                    return False
                continue
            parts[0] = connection.parts
            connection.parts = 0
            return True
        return False

    cdef int _command(self, Connection connection, const uint8_t *content, size_t length) except -1:
        """PING is answered with its context of 16 bytes at most (RFC 37); other commands mean nothing here."""
        cdef uint8_t[128] room
        cdef uint8_t[32] pong
        if connection.waiting < self.replies_max and 7 <= length <= 7 + 16 and content[0] == 4 and content[1:5] == b"PING":
            pong[0] = 4
            memcpy(&pong[1], b"PONG", 4)
            memcpy(&pong[5], content + 7, length - 7)
            self._put(connection, room,
                      kq_write_message(room, &connection.curve, &sodium, pong, 5 + length - 7, COMMAND))
        return 0

    def receive(self):
        """The next message, without waiting: its connection, its content, and how many frames it had."""
        cdef uint8_t *content
        cdef size_t length, parts
        cdef int found, i
        cdef Connection connection
        for i in range(2):
            connection = self.next(&content, &length, &parts)
            if connection is not None:
                return connection, PyBytes_FromStringAndSize(<char *>content, length if parts == 1 else 0), parts
            self.wait(0, &found)
        return None

    def poll(self, int timeout_ms):
        """Wait until there is something to do; the bits of what, 1 for connections."""
        cdef int found
        self.wait(timeout_ms, &found)
        return found

    # --- replies ---

    def send(self, Connection connection not None, bytes data not None, *, bint more=False):
        """Send a frame; False if its peer went away, or does not take what waits for it."""
        cdef size_t length = PyBytes_GET_SIZE(data), head = kq_message_head(length)
        cdef uint8_t *room = <uint8_t *>malloc(head + length)
        if room == NULL:
            raise MemoryError
        try:
            memcpy(room + head, PyBytes_AS_STRING(data), length)
            return bool(self.reply(connection, room + head, length, MORE if more else 0))
        finally:
            explicit_bzero(room, head + length)
            free(room)

    cdef int reply(self, Connection connection, uint8_t *content, size_t length, uint8_t flags) except -1:
        """Send a frame around its content, before which there is room for ``kq_message_head`` bytes. It is lost then."""
        cdef uint8_t *frame = content - kq_message_head(length)
        if not connection.open or connection.curve.stage != KQ_OPEN or connection.waiting >= self.replies_max:
            return 0
        self._put(connection, frame, kq_write_message(frame, &connection.curve, &sodium, content, length, flags))
        return connection.open

    cdef int _put(self, Connection connection, const uint8_t *data, size_t length) except -1:
        """Send bytes now, or have them wait for their peer."""
        cdef kq_waiting *waiting
        cdef ssize_t sent = 0
        if not connection.open:
            return 0
        if connection.first == NULL:
            # With more of its requests at hand, replies go out together: one wake-up of the peer for some of them.
            connection.corked = connection is self._current and self._more_whole(connection)
            sent = send(connection.fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL | (MSG_MORE if connection.corked else 0))
            if sent < 0:
                if c_errno not in (EAGAIN, EINTR):
                    self._end(connection)
                    return 0
                sent = 0
            if <size_t>sent == length:
                return 0
        waiting = <kq_waiting *>malloc(sizeof(kq_waiting) + length - sent)
        if waiting == NULL:
            self._end(connection)
            return 0
        waiting.next, waiting.at, waiting.length = NULL, 0, length - sent
        memcpy(waiting.data, data + sent, length - sent)
        if connection.last == NULL:
            connection.first = waiting
        else:
            connection.last.next = waiting
        connection.last = waiting
        connection.waiting += 1
        connection.waiting_bytes += length - sent
        return self._want(connection, True)

    cdef bint _more_whole(self, Connection connection) noexcept:
        """Whether another message of the connection at hand is there, and will be served in this turn."""
        cdef kq_frame frame
        cdef size_t needed
        return self._turn > 0 and kq_next_frame(self._from, self._to - self._from, self.limit, &frame, &needed) > 0

    cdef int _flush(self, Connection connection) except -1:
        """Send what waits, as far as the peer takes it."""
        cdef kq_waiting *waiting
        cdef ssize_t sent
        while connection.first != NULL:
            waiting = connection.first
            sent = send(connection.fd, waiting.data + waiting.at, waiting.length - waiting.at,
                        MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                if c_errno not in (EAGAIN, EINTR):
                    self._end(connection)
                return 0
            waiting.at += sent
            connection.waiting_bytes -= sent
            if waiting.at < waiting.length:
                return 0
            connection.first = waiting.next
            if connection.first == NULL:
                connection.last = NULL
            connection.waiting -= 1
            free(waiting)
        return self._want(connection, False)

    cdef int _want(self, Connection connection, bint writes) except -1:
        cdef epoll_event event
        if connection.writes != writes and connection.open:
            connection.writes = writes
            event.events, event.data.ptr = EPOLLIN | (EPOLLOUT if writes else 0), <void *>connection
            epoll_ctl(self._epoll, EPOLL_CTL_MOD, connection.fd, &event)
        return 0
