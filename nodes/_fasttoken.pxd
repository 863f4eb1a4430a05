"""What the node's receiving loop calls without an object in between: see _fasttoken.pyi."""

from libc.stdint cimport uint8_t


cdef struct span:
    const uint8_t *start
    size_t length


cdef class Use:
    cdef object lane
    cdef object loaded
    cdef object guard
    cdef object session
    cdef object key
    cdef object hashed
    cdef bytes header
    cdef span before
    cdef str unlike
    cdef int does
    cdef size_t most(self, size_t length) noexcept
    cdef size_t into(self, span data, span associated, span proof, uint8_t *out) except <size_t>-1
    cdef size_t _failed(self, error, const span *data, const span *associated, uint8_t *out) except <size_t>-1
