from libc.stdint cimport uint64_t

cdef enum:
    DIGEST = 32
    LINE_HEAD = 112  # bytes before a line's body, at most: braces, names, a number and a hash

cdef char *line_head(char *at, uint64_t seq, bytes previous) noexcept
cdef bytes line_digest(char *start, char *end)


cdef class UseLines:
    cdef bytes _source
    cdef bytes _event
    cdef bytes _outcome
    cdef readonly size_t most
    cdef char *bodies(self, char *at, uint64_t time_ms, uint64_t request, uint64_t elapsed_us,
                      char **second) noexcept
    cdef char *_begin(self, char *at, uint64_t time_ms, uint64_t request) noexcept
