"""The two audit records of a use of a key, written without an object in between; see _fastlines.pyi."""

import hashlib

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

cimport cython

cdef enum:
    NUMBERS = 20  # digits of the longest number

cdef const char *_HEX = b"0123456789abcdef"
cdef object _sha256 = hashlib.sha256


cdef inline char *_put(char *at, bytes text) noexcept:
    memcpy(at, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return at + PyBytes_GET_SIZE(text)


cdef inline char *_put_number(char *at, uint64_t number) noexcept:
    cdef char[NUMBERS] digits
    cdef int count = 0
    while number or not count:
        digits[NUMBERS - 1 - count] = 48 + number % 10
        number //= 10
        count += 1
    memcpy(at, &digits[NUMBERS - count], count)
    return at + count


cdef inline char *_put_hex(char *at, bytes digest) noexcept:
    cdef const unsigned char *source = <const unsigned char *>PyBytes_AS_STRING(digest)
    cdef int i
    for i in range(DIGEST):
        at[2 * i] = _HEX[source[i] >> 4]
        at[2 * i + 1] = _HEX[source[i] & 15]
    return at + 2 * DIGEST


cdef bytes line_digest(char *start, char *end):
    """The SHA-256 of a line without its newline."""
    return _sha256(PyMemoryView_FromMemory(start, end - start, PyBUF_READ)).digest()


cdef char *line_head(char *at, uint64_t seq, bytes previous) noexcept:
    """Write what stands before a line's body, in at most LINE_HEAD bytes; ``previous`` has DIGEST."""
    return _put(_put_hex(_put(_put_number(_put(at, b'{"seq":'), seq), b',"prev":"'), previous), b'",')


@cython.final
@cython.auto_pickle(False)
cdef class UseLines:
    """The bodies of the lines of one member's uses of one key with one verb; see _fastlines.pyi."""

    def __cinit__(self, *, bytes source not None, bytes event not None, bytes outcome not None):
        self._source, self._event, self._outcome = source, event, outcome
        self.most = 2 * (len(source) + 3 * NUMBERS + 40) + len(event) + len(outcome)

    def written(self, uint64_t time_ms, uint64_t request, uint64_t elapsed_us):
        """Both bodies; see _fastlines.pyi."""
        cdef bytes room = PyBytes_FromStringAndSize(NULL, self.most)
        cdef char *start = PyBytes_AS_STRING(room)
        cdef char *second
        cdef char *end = self.bodies(start, time_ms, request, elapsed_us, &second)
        return room[:second - start], room[second - start:end - start]

    cdef char *bodies(self, char *at, uint64_t time_ms, uint64_t request, uint64_t elapsed_us,
                      char **second) noexcept:
        """Write both, one behind the other, in at most ``most`` bytes; where they end."""
        at = _put(self._begin(at, time_ms, request), self._event)
        second[0] = at
        at = _put(self._begin(at, time_ms, request), self._outcome)
        if elapsed_us:
            at = _put_number(_put(at, b',"elapsed_us":'), elapsed_us)
        return _put(at, b"}")

    cdef char *_begin(self, char *at, uint64_t time_ms, uint64_t request) noexcept:
        at = _put(_put(_put_number(_put(at, b'"time_ms":'), time_ms), b","), self._source)
        return _put_number(at, request)
