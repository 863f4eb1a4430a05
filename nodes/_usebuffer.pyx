"""Uses of keys that are recorded and not yet in the audit log's chain; see _usebuffer.pyi."""

import mmap
import os

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from engine.client._spin cimport kq_now_s
from engine.protocol._fastlines cimport DIGEST, LINE_HEAD, UseLines, line_digest, line_head
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cimport cython

@cython.final
@cython.auto_pickle(False)
cdef class UseBuffer:
    """See _usebuffer.pyi."""

    def __cinit__(self, str path not None, now_ms, stir, drain):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, KQ_USES_BYTES)  # a hole would need room just when there is none
            self._map = mmap.mmap(descriptor, KQ_USES_BYTES)
        finally:
            os.close(descriptor)
        PyObject_GetBuffer(self._map, &self._view, PyBUF_WRITABLE)
        self._uses = <kq_uses *>self._view.buf
        self._room = KQ_USES_BYTES - KQ_HEAD
        self._now_ms, self._stir, self._drain = now_ms, stir, drain
        self.count = self._counted()
        if self.count < 0:
            self.damaged = self._uses.magic[0] != 0
            memset(self._uses, 0, KQ_HEAD)
            memcpy(self._uses.magic, KQ_MAGIC, 8)
            self.count = 0

    def __dealloc__(self):
        if self._uses != NULL:
            PyBuffer_Release(&self._view)

    cdef Py_ssize_t _counted(self) noexcept:
        """How many entries wait; -1 if this is no such file, or a damaged one."""
        cdef uint64_t at, end = self._uses.end
        cdef kq_entry entry
        cdef Py_ssize_t count = 0
        if memcmp(self._uses.magic, KQ_MAGIC, 8) or self._uses.which > 1 or end > self._room:
            return -1
        at = self._uses.marks[self._uses.which].taken
        while at < end:
            if end - at < sizeof(kq_entry):
                return -1
            memcpy(&entry, self._uses.entries + at, sizeof(kq_entry))
            at += sizeof(kq_entry) + entry.first + <uint64_t>entry.second
            count += 1
        return count if at == end or not count else -1  # none where ``take`` was cut short

    @property
    def base(self):
        """The number of the chain's last line when the first that waits was not in it; see _usebuffer.pyi."""
        return self._uses.marks[self._uses.which].base

    def record(self, UseLines lines not None, uint64_t request, uint64_t elapsed_us):
        """Note a use that went well; see _usebuffer.pyi."""
        self.note(lines, request, elapsed_us)

    cdef int note(self, UseLines lines, uint64_t request, uint64_t elapsed_us) except -1:
        cdef double now_s
        cdef char *start
        cdef char *second
        cdef char *end
        cdef kq_entry entry
        if self.refusal is not None:
            raise self.refusal()
        now_s = kq_now_s()
        if now_s - self._read_s > KQ_CLOCK_S:
            self._time_ms, self._read_s = self._now_ms(), now_s
        if self._room - self._uses.end < sizeof(kq_entry) + lines.most:
            self._drain()
            if self._room - self._uses.end < sizeof(kq_entry) + lines.most:
                raise self.refusal() if self.refusal is not None else MemoryError
        # From here on no other thread of Python's runs.
        start = self._uses.entries + self._uses.end + sizeof(kq_entry)
        end = lines.bodies(start, self._time_ms, request, elapsed_us, &second)
        entry.first, entry.second = second - start, end - second
        memcpy(start - sizeof(kq_entry), &entry, sizeof(kq_entry))
        kq_set_end(self._uses, end - self._uses.entries)
        self.count += 1
        if self.count == 1:
            self._stir()
        return 0

    def waiting(self):
        """The bodies of all that wait, in order; see _usebuffer.pyi."""
        cdef uint64_t at = self._uses.marks[self._uses.which].taken
        cdef kq_entry entry
        found = []
        for _ in range(self.count):
            memcpy(&entry, self._uses.entries + at, sizeof(kq_entry))
            at += sizeof(kq_entry)
            for length in (<Py_ssize_t>entry.first, <Py_ssize_t>entry.second):
                found.append(PyBytes_FromStringAndSize(self._uses.entries + at, length))
                at += length
        return found

    def chained(self, uint64_t seq, bytes previous not None):
        """The lines of all that wait, chained; see _usebuffer.pyi."""
        cdef uint64_t at = self._uses.marks[self._uses.which].taken, end = self._uses.end
        cdef Py_ssize_t count = 0, length
        cdef kq_entry entry
        cdef bytes room
        cdef char *start
        cdef char *out
        if PyBytes_GET_SIZE(previous) != DIGEST:
            raise ValueError(f"a hash of {len(previous)} bytes")
        room = PyBytes_FromStringAndSize(NULL, end - at + 2 * LINE_HEAD * self.count)
        out = start = PyBytes_AS_STRING(room)
        # What is recorded meanwhile stands behind ``end``, and nobody else takes anything out.
        while at < end:
            memcpy(&entry, self._uses.entries + at, sizeof(kq_entry))
            at += sizeof(kq_entry)
            for length in (<Py_ssize_t>entry.first, <Py_ssize_t>entry.second):
                begin = out
                out = line_head(out, seq, previous)
                memcpy(out, self._uses.entries + at, length)
                out += length
                at += length
                previous = line_digest(begin, out)
                out[0] = c"\n"
                out += 1
                seq += 1
            count += 1
        return room[:out - start], previous, count, end

    def take(self, Py_ssize_t count, uint64_t end, uint64_t seq):
        """So many are in the chain now; see _usebuffer.pyi."""
        self.count -= count
        if self.count:
            kq_set_mark(self._uses, end, seq)
            return
        # All are: begin at the front again. Between the two steps there is nothing at all to be chained.
        kq_set_mark(self._uses, self._uses.end, seq)
        kq_set_end(self._uses, 0)
        kq_set_mark(self._uses, 0, seq)
