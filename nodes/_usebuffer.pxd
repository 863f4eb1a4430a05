from engine.protocol._fastlines cimport UseLines
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #define KQ_USES_BYTES (512 * 1024)
    #define KQ_CLOCK_S 0.0005

    typedef struct {
        uint64_t taken; /* where the first that is not in the chain begins */
        uint64_t base;  /* the number of the chain's last line then */
    } kq_mark;

    /* What is in memory shared with the file: whoever kills the process does not take it away. */
    typedef struct {
        char magic[8];
        uint64_t which; /* the mark in force */
        kq_mark marks[2];
        uint64_t end; /* where the last entry that is whole ends */
        char entries[];
    } kq_uses;

    typedef struct {
        uint32_t first;
        uint32_t second; /* bytes of the two bodies behind it */
    } kq_entry;

    static const char KQ_MAGIC[8] = "KQUSES\\1";

    static void kq_set_mark(kq_uses *uses, uint64_t taken, uint64_t base) {
        uint64_t other = !uses->which;
        uses->marks[other].taken = taken;
        uses->marks[other].base = base;
        __atomic_store_n(&uses->which, other, __ATOMIC_RELEASE);
    }
    static void kq_set_end(kq_uses *uses, uint64_t end) { __atomic_store_n(&uses->end, end, __ATOMIC_RELEASE); }
    """
    const size_t KQ_USES_BYTES
    const double KQ_CLOCK_S
    const char *KQ_MAGIC

    ctypedef struct kq_mark:
        uint64_t taken
        uint64_t base

    ctypedef struct kq_uses:
        char *magic
        uint64_t which
        kq_mark *marks
        uint64_t end
        char *entries

    ctypedef struct kq_entry:
        uint32_t first
        uint32_t second

    void kq_set_mark(kq_uses *uses, uint64_t taken, uint64_t base) nogil
    void kq_set_end(kq_uses *uses, uint64_t end) nogil
    const size_t KQ_HEAD "sizeof(kq_uses)"


cdef class UseBuffer:
    cdef object _map
    cdef Py_buffer _view
    cdef kq_uses *_uses
    cdef size_t _room
    cdef object _now_ms
    cdef object _stir
    cdef object _drain
    cdef uint64_t _time_ms
    cdef double _read_s
    cdef public object refusal
    cdef readonly Py_ssize_t count
    cdef readonly bint damaged
    cdef Py_ssize_t _counted(self) noexcept
    cdef int note(self, UseLines lines, uint64_t request, uint64_t elapsed_us) except -1
