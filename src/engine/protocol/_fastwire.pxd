# The declarations of fastwire.h, for the modules that use it in C.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "fastwire.h" nogil:
    size_t KQ_MAX_MESSAGE
    size_t KQ_MAX_PROOF
    size_t KQ_OVERHEAD

    ctypedef struct kq_span:
        const uint8_t *at
        size_t length

    ctypedef struct kq_room:
        uint8_t *at
        size_t length

    ctypedef struct kq_operate:
        uint8_t version
        uint64_t id
        uint32_t timeout_ms
        kq_span verb
        kq_span key
        kq_span key_id
        kq_span data
        kq_span associated_data
        kq_span proof
        int digested

    ctypedef struct kq_result:
        uint8_t version
        uint64_t id
        kq_span data
        uint64_t queue
        uint64_t service_us
        int loaded

    bint kq_reserve(kq_room *room, size_t wanted)
    int kq_read_operate(const uint8_t *message, size_t length, kq_operate *read)
    int kq_read_result(const uint8_t *message, size_t length, kq_result *read)
    size_t kq_operate_room(const kq_operate *source)
    size_t kq_write_operate(uint8_t *to, const kq_operate *source)
    size_t kq_result_head(uint64_t id, size_t data)
    size_t kq_write_result(uint8_t *to, const kq_result *source)


cdef inline kq_span span_of(bytes data):
    cdef kq_span span
    span.at = <const uint8_t *>PyBytes_AS_STRING(data)
    span.length = PyBytes_GET_SIZE(data)
    return span


cdef inline bytes bytes_of(kq_span span):
    return PyBytes_FromStringAndSize(<const char *>span.at, span.length)
