"""The frames of a warm operation as ``fastwire.h`` reads and writes them, as functions of Python: for tests and tools.

The data path uses the header itself (``_fastwire.pxd``). None means that the ordinary decoder has to look.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc

from engine.protocol._fastwire cimport (
    KQ_OVERHEAD,
    kq_operate,
    kq_operate_room,
    kq_read_operate,
    kq_read_result,
    kq_result,
    kq_write_operate,
    kq_write_result,
)
from libc.stdint cimport uint8_t


def read_operate(bytes message):
    """``(version, id, verb, timeout_ms, key, key_id, data, associated_data, proof, digested)`` of a request, or None."""
    cdef kq_operate read
    if not kq_read_operate(<const uint8_t *>PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message), &read):
        return None
    return (
        read.version,
        read.id,
        bytes_of(read.verb),
        read.timeout_ms,
        bytes_of(read.key),
        bytes_of(read.key_id),
        bytes_of(read.data),
        bytes_of(read.associated_data),
        bytes_of(read.proof),
        bool(read.digested),
    )


def write_operate(
    version, number, bytes verb, timeout_ms, bytes key, bytes key_id, bytes data, bytes associated_data, bytes proof,
    digested
):
    """The request's bytes, or None where it is longer than a message may be."""
    cdef kq_operate source
    source.version, source.id, source.timeout_ms, source.digested = version, number, timeout_ms, digested
    source.verb, source.key, source.key_id = span_of(verb), span_of(key), span_of(key_id)
    source.data, source.associated_data, source.proof = span_of(data), span_of(associated_data), span_of(proof)
    cdef uint8_t *room = <uint8_t *>PyMem_Malloc(kq_operate_room(&source))
    if room == NULL:
        raise MemoryError
    try:
        length = kq_write_operate(room, &source)
        return PyBytes_FromStringAndSize(<const char *>room, length) if length else None
    finally:
        PyMem_Free(room)


def read_result(bytes message):
    """``(version, id, data, queue, service_us, loaded)`` of an ok reply, or None."""
    cdef kq_result read
    if not kq_read_result(<const uint8_t *>PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message), &read):
        return None
    return read.version, read.id, bytes_of(read.data), read.queue, read.service_us, bool(read.loaded)


def write_result(version, number, bytes data, queue, service_us, loaded):
    """The bytes of an ok reply."""
    cdef kq_result source
    source.version, source.id, source.queue, source.service_us, source.loaded = version, number, queue, service_us, loaded
    source.data = span_of(data)
    cdef uint8_t *room = <uint8_t *>PyMem_Malloc(KQ_OVERHEAD + PyBytes_GET_SIZE(data))
    if room == NULL:
        raise MemoryError
    try:
        return PyBytes_FromStringAndSize(<const char *>room, kq_write_result(room, &source))
    finally:
        PyMem_Free(room)
