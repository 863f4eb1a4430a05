# What the receiving loop of a node calls without an object in between.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from engine.client._zmtp cimport kq_curve


cdef extern from *:
    """
    typedef struct kq_waiting {
        struct kq_waiting *next;
        size_t at, length;
        unsigned char data[];
    } kq_waiting;
    """
    ctypedef struct kq_waiting:
        kq_waiting *next
        size_t at
        size_t length
        uint8_t *data

cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        void *ptr
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data


cdef enum:
    EVENTS_MAX = 256


cdef class Connection:
    cdef readonly int fd
    cdef readonly int place
    cdef readonly double since_s
    cdef readonly str user
    cdef public str member
    cdef readonly bint open
    cdef object pair
    cdef kq_curve curve
    cdef uint8_t *kept
    cdef size_t kept_length, kept_room
    cdef kq_waiting *first
    cdef kq_waiting *last
    cdef size_t waiting, waiting_bytes
    cdef size_t parts
    cdef bint writes
    cdef bint queued
    cdef bint corked


cdef class Router:
    cdef int _epoll
    cdef object _admit
    cdef public object gone
    cdef readonly size_t limit
    cdef readonly size_t replies_max
    cdef public size_t most
    cdef readonly bint accepting
    cdef readonly uint64_t failed
    cdef set _connections
    cdef set _shaking
    cdef dict _places
    cdef dict _watched
    cdef object _ready
    cdef list _dead
    cdef epoll_event[EVENTS_MAX] _events
    cdef int _count, _at, _round, _shakes
    cdef uint8_t *_scratch
    cdef Connection _current
    cdef uint8_t *_from
    cdef uint8_t *_to
    cdef bint _scratched
    cdef int _turn
    cdef uint8_t *_taken
    cdef size_t _taken_length

    cdef int beside(self, int timeout_ms) except -1
    cdef void _wipe(self) noexcept
    cdef int wait(self, int timeout_ms, int *found) except -1
    cdef Connection next(self, uint8_t **content, size_t *length, size_t *parts)
    cdef int reply(self, Connection connection, uint8_t *content, size_t length, uint8_t flags) except -1
    cdef bint _parse(self, Connection connection, uint8_t **content, size_t *length, size_t *parts) except -1
    cdef int _leave(self) except -1
    cdef int _read(self, Connection connection) except -1
    cdef size_t _room(self) noexcept
    cdef int _accept(self, int listening) except -1
    cdef int _shake(self, Connection connection) except -1
    cdef bint _more_whole(self, Connection connection) noexcept
    cdef int _put(self, Connection connection, const uint8_t *data, size_t length) except -1
    cdef int _flush(self, Connection connection) except -1
    cdef int _command(self, Connection connection, const uint8_t *content, size_t length) except -1
    cdef int _want(self, Connection connection, bint writes) except -1
    cdef int _end(self, Connection connection) except -1
