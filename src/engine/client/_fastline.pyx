"""One request and its reply over a connection, in C: written, sent, awaited and read without an object in between.

It works on sockets that pyzmq opened, through the very libzmq that pyzmq loaded. It knows what a use of a key looks like
on the wire (``fastwire.h``) and nothing of keys, nodes or policies. Whatever is not the plain answer to the request at
hand is given back as it is, for the ordinary transport to look at.
"""

import ctypes

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from engine.protocol._fastwire cimport (
    KQ_MAX_MESSAGE,
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
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from zmq.backend.cython import _zmq

cimport cython

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef void *_address(library, str name) except NULL:
    return <void *><size_t>ctypes.cast(getattr(library, name), ctypes.c_void_p).value


# The extension module of pyzmq leads to the libzmq that it was linked with, wherever that is.
_library = ctypes.CDLL(_zmq.__file__)
zmq_send = <send_function>_address(_library, "zmq_send")
zmq_msg_init = <message_function>_address(_library, "zmq_msg_init")
zmq_msg_close = <message_function>_address(_library, "zmq_msg_close")
zmq_msg_more = <message_function>_address(_library, "zmq_msg_more")
zmq_msg_recv = <receive_function>_address(_library, "zmq_msg_recv")
zmq_msg_data = <data_function>_address(_library, "zmq_msg_data")
zmq_msg_size = <size_function>_address(_library, "zmq_msg_size")
zmq_errno = <errno_function>_address(_library, "zmq_errno")
zmq_poll = <poll_function>_address(_library, "zmq_poll")
zmq_getsockopt = <option_function>_address(_library, "zmq_getsockopt")
zmq_msg_gets = <property_function>_address(_library, "zmq_msg_gets")
zmq_msg_get = <number_function>_address(_library, "zmq_msg_get")

cdef enum:
    DONE_
    NOT_SENT_
    LATE_
    OTHER_
    BROKEN_
    INTERRUPTED_

DONE = DONE_
"""The reply came: ``data``, ``queue``, ``service_us`` and ``loaded`` are its."""
NOT_SENT = NOT_SENT_
"""The connection is down, its queue is full, or something of it has to be looked at first; nothing was sent."""
LATE = LATE_
"""No reply came in the time given. A later one will come as ``OTHER`` to a later request, or to the channel."""
OTHER = OTHER_
"""``frame`` arrived, which is no plain result of this request: the channel looks at it, and ``resume`` goes on."""
BROKEN = BROKEN_
"""The monitor has something to tell, which may end this request; ``resume`` goes on if it does not."""


@cython.final
@cython.auto_pickle(False)
cdef class Line:
    """The two sockets of one connection (the peer's and its monitor's), used by one thread at a time.

    Whether to spin before sleeping is decided by what both have taken of late: spinning helps where a processor is free
    for it, and hurts where others need it.
    """

    cdef object _keep
    cdef void *_socket
    cdef void *_monitor
    cdef kq_room _room
    cdef uint64_t _id
    cdef double _begun_s, _until_s
    cdef kq_spinner _spinner
    cdef public object data
    cdef public object frame
    cdef readonly uint64_t queue
    cdef readonly uint64_t service_us
    cdef readonly bint loaded
    cdef readonly double elapsed_s

    def __cinit__(self, socket, monitor):
        self._keep = socket, monitor
        self._socket = <void *><size_t>socket.underlying
        self._monitor = <void *><size_t>monitor.underlying

    def __dealloc__(self):
        free(self._room.at)

    @property
    def spins(self):
        """Whether requests spin at present."""
        return kq_spins(&self._spinner)

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
        """Send a use of a key under the id ``number`` and wait ``patience_s`` seconds for its result; one of the codes.

        ``timeout_ms`` is what the node is told. ``ValueError`` if it is longer than a message may be.
        """
        cdef kq_operate request
        cdef size_t length
        self._begun_s = kq_now_s()
        request.id, request.timeout_ms, request.digested = number, timeout_ms, digested
        request.verb, request.key, request.key_id = span_of(verb), span_of(key), span_of(key_id)
        request.data, request.associated_data, request.proof = span_of(data), span_of(associated_data), span_of(proof)
        if not kq_reserve(&self._room, kq_operate_room(&request)):
            raise MemoryError
        length = kq_write_operate(self._room.at, &request)
        if not length:
            raise ValueError(f"a request of more than {KQ_MAX_MESSAGE} bytes")
        self._id, self._until_s = number, self._begun_s + patience_s
        if readable(self._monitor) or zmq_send(self._socket, self._room.at, length, ZMQ_DONTWAIT) < 0:
            return NOT_SENT_
        code = self._await(kq_spin_s(&self._spinner))
        self.elapsed_s = kq_now_s() - self._begun_s
        if code == DONE_:
            kq_waited(&self._spinner, self.elapsed_s)
        return code

    def resume(self):
        """Wait on for the request that ended in ``OTHER`` or ``BROKEN``."""
        code = self._await(0)
        self.elapsed_s = kq_now_s() - self._begun_s
        return code

    cdef int _await(self, double spin_s) except? -1:
        cdef kq_message message
        cdef kq_result result
        cdef int code
        zmq_msg_init(&message)
        try:
            while True:
                with nogil:
                    code = self._receive(&message, spin_s)
                if code == INTERRUPTED_:
                    PyErr_CheckSignals()
                    continue
                if code != OTHER_:
                    return code
                if (
                    not zmq_msg_more(&message)
                    and kq_read_result(<const uint8_t *>zmq_msg_data(&message), zmq_msg_size(&message), &result)
                    and result.id == self._id
                ):
                    self.data = bytes_of(result.data)
                    self.queue, self.service_us, self.loaded = result.queue, result.service_us, result.loaded
                    return DONE_
                self.frame = PyBytes_FromStringAndSize(<const char *>zmq_msg_data(&message), zmq_msg_size(&message))
                while zmq_msg_more(&message) and zmq_msg_recv(&message, self._socket, ZMQ_DONTWAIT) >= 0:
                    self.frame = b""  # no reply has a second frame; what remains is no message
                return OTHER_
        finally:
            zmq_msg_close(&message)

    cdef int _receive(self, kq_message *message, double spin_s) noexcept nogil:
        """OTHER once a message is there, LATE, BROKEN or INTERRUPTED."""
        cdef kq_poll_item items[2]
        cdef int error
        cdef double wait_s, now_s = kq_now_s(), before_s
        cdef double spin_until_s = now_s + spin_s if spin_s else 0
        while True:
            if zmq_msg_recv(message, self._socket, ZMQ_DONTWAIT) >= 0:
                return OTHER_
            error = zmq_errno()
            if error == EINTR:
                return INTERRUPTED_
            if error != EAGAIN:
                return BROKEN_
            before_s, now_s = now_s, kq_now_s()
            if now_s < spin_until_s and now_s - before_s < KQ_YIELD_LONG_S:
                sched_yield()
                continue
            spin_until_s = 0
            wait_s = self._until_s - now_s
            if wait_s <= 0:
                return LATE_
            items[0].socket, items[0].fd, items[0].events, items[0].revents = self._socket, 0, ZMQ_POLLIN, 0
            items[1].socket, items[1].fd, items[1].events, items[1].revents = self._monitor, 0, ZMQ_POLLIN, 0
            if zmq_poll(items, 2, <long>(wait_s * 1000) + 1) < 0:
                return INTERRUPTED_ if zmq_errno() == EINTR else BROKEN_
            if items[1].revents and not items[0].revents:
                return BROKEN_


cdef bint readable(void *socket) noexcept nogil:
    """Whether something is there to be received; a socket that is no more says so too, as receiving tells."""
    cdef int events = 0
    cdef size_t length = sizeof(events)
    return zmq_getsockopt(socket, ZMQ_EVENTS, &events, &length) < 0 or events & ZMQ_POLLIN
