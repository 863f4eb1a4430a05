"""How the histograms are filled in C; see _histogram.pyi."""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stdint.h>

    /* Durations in units of 16 ns: exactly below 64 units, then 32 buckets for each doubling, up to 2^33 units (137 s). */
    #define KQ_HISTOGRAM_UNIT_S 16e-9
    #define KQ_HISTOGRAM_BITS 5
    #define KQ_HISTOGRAM_MAX ((UINT64_C(1) << 33) - 1)
    #define KQ_HISTOGRAM_BUCKETS 928

    typedef struct {
        uint64_t count;
        double sum_s;
        double max_s;
        uint64_t buckets[KQ_HISTOGRAM_BUCKETS];
    } kq_histogram;

    static inline unsigned kq_histogram_bucket(double seconds) {
        double told = seconds / KQ_HISTOGRAM_UNIT_S;
        uint64_t units = told < (double)KQ_HISTOGRAM_MAX ? (uint64_t)told : KQ_HISTOGRAM_MAX;
        if (units < (2u << KQ_HISTOGRAM_BITS)) return (unsigned)units;
        unsigned shift = 63u - (unsigned)__builtin_clzll(units) - KQ_HISTOGRAM_BITS;
        return (shift << KQ_HISTOGRAM_BITS) + (unsigned)(units >> shift);
    }

    /* The middle of a bucket in seconds; of the exact ones too. */
    static inline double kq_histogram_middle_s(unsigned bucket) {
        unsigned shift = bucket < (2u << KQ_HISTOGRAM_BITS) ? 0 : (bucket >> KQ_HISTOGRAM_BITS) - 1;
        uint64_t low = (uint64_t)(bucket - (shift << KQ_HISTOGRAM_BITS)) << shift;
        return ((double)low + (double)(UINT64_C(1) << shift) / 2) * KQ_HISTOGRAM_UNIT_S;
    }

    static inline void kq_histogram_take(kq_histogram *histogram, double seconds) {
        if (!(seconds > 0)) seconds = 0; /* a clock that did not go on, or no number */
        if (seconds > 1e9) seconds = 1e9;
        histogram->count++;
        histogram->sum_s += seconds;
        if (seconds > histogram->max_s) histogram->max_s = seconds;
        histogram->buckets[kq_histogram_bucket(seconds)]++;
    }
    """
    enum:
        KQ_HISTOGRAM_BUCKETS

    ctypedef struct kq_histogram:
        uint64_t count
        double sum_s
        double max_s
        uint64_t *buckets

    double kq_histogram_middle_s(unsigned bucket) nogil
    void kq_histogram_take(kq_histogram *histogram, double seconds) nogil


cdef class Histograms:
    cdef kq_histogram *_at
    cdef readonly int size

    cdef kq_histogram *_of(self, int which) except NULL
    cdef void take(self, int which, double seconds) noexcept nogil
