"""See _histogram.pyi. A duration is taken in by a few instructions and makes no object; what is read out may take time."""

from libc.math cimport ceil
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

cimport cython

cdef enum:
    SIZE_MAX_ = 64


@cython.final
@cython.auto_pickle(False)
cdef class Histograms:
    """So many histograms of durations; see _histogram.pyi."""

    def __cinit__(self, int size=1):
        if not 1 <= size <= SIZE_MAX_:
            raise ValueError(f"{size} histograms; 1 to {SIZE_MAX_} are allowed")
        self._at = <kq_histogram *>calloc(size, sizeof(kq_histogram))
        if self._at == NULL:
            raise MemoryError
        self.size = size

    def __dealloc__(self):
        free(self._at)

    cdef void take(self, int which, double seconds) noexcept nogil:
        if 0 <= which < self.size:
            kq_histogram_take(self._at + which, seconds)

    cdef kq_histogram *_of(self, int which) except NULL:
        if not 0 <= which < self.size:
            raise IndexError(f"histogram {which}; there are {self.size}")
        return self._at + which

    def record(self, int which, double seconds):
        """Take in a duration in seconds."""
        kq_histogram_take(self._of(which), seconds)

    def record_all(self, list seconds not None):
        """Take in a duration for each histogram; a negative one is none."""
        cdef int which
        cdef double each
        for which in range(min(self.size, len(seconds))):
            each = seconds[which]
            if each >= 0:
                kq_histogram_take(self._at + which, each)

    def count(self, int which=0):
        """How many durations were taken in."""
        return self._of(which).count

    def sum_s(self, int which=0):
        """Their sum in seconds, exactly."""
        return self._of(which).sum_s

    def max_s(self, int which=0):
        """The longest in seconds, exactly; 0 without any."""
        return self._of(which).max_s

    def quantiles_s(self, quantiles, int which=0):
        """For each of the ascending ``quantiles`` the duration in seconds that so large a part does not exceed."""
        cdef kq_histogram *histogram = self._of(which)
        cdef unsigned bucket = 0
        cdef uint64_t seen = histogram.buckets[0], rank
        cdef double quantile, before = 0
        found = []
        for quantile in quantiles:
            if not before <= quantile <= 1:
                raise ValueError("quantiles are from 0 to 1, in ascending order")
            before = quantile
            if not histogram.count:
                found.append(0.0)
                continue
            # Less a trifle: 0.9 * 10 is 9, not what the next larger double would be rounded up to.
            rank = <uint64_t>ceil(quantile * <double>histogram.count * (1 - 1e-12))
            rank = min(max(rank, 1), histogram.count)
            while seen < rank:
                bucket += 1
                seen += histogram.buckets[bucket]
            found.append(min(kq_histogram_middle_s(bucket), histogram.max_s))
        return found

    def up_to(self, bounds_s, int which=0):
        """For each of the ascending bounds in seconds, how many durations are not above it."""
        cdef kq_histogram *histogram = self._of(which)
        cdef unsigned bucket = 0
        cdef uint64_t seen = 0
        cdef double bound_s
        found = []
        for bound_s in bounds_s:
            while bucket < KQ_HISTOGRAM_BUCKETS and kq_histogram_middle_s(bucket) <= bound_s:
                seen += histogram.buckets[bucket]
                bucket += 1
            found.append(seen)
        return found
