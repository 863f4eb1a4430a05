"""Clock and spinning, for both ends of the data path."""

cdef extern from *:
    """
    #include <time.h>

    static inline double kq_now_s(void) { /* monotonic seconds */
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    }

    /* Whether and for how long to offer the processor to others before going to sleep, by what waits took of late with
       and without: one in KQ_SAMPLE is made the other way. Where a yield is not back soon, others need the processor. */
    #define KQ_SAMPLE 64u
    #define KQ_SPIN_MIN_S 20e-6
    #define KQ_SPIN_MAX_S 500e-6
    #define KQ_YIELD_LONG_S 50e-6

    typedef struct {
        double spinning_s;
        double sleeping_s;
        unsigned number;
        int spun;
    } kq_spinner;

    static inline int kq_spins(const kq_spinner *spinner) { return spinner->spinning_s < spinner->sleeping_s; }

    /* How long this wait may spin, for what takes so long in itself; 0: not at all. */
    static inline double kq_spin_s(kq_spinner *spinner, double work_s) {
        spinner->spun = kq_spins(spinner) ^ (++spinner->number % KQ_SAMPLE == 0);
        if (!spinner->spun) return 0;
        double usual_s = work_s + (spinner->spinning_s > 0 ? spinner->spinning_s : spinner->sleeping_s);
        if (usual_s > KQ_SPIN_MAX_S) { /* it would only burn time */
            spinner->spun = 0;
            return 0;
        }
        double spin_s = 2 * usual_s;
        return spin_s < KQ_SPIN_MIN_S ? KQ_SPIN_MIN_S : spin_s > KQ_SPIN_MAX_S ? KQ_SPIN_MAX_S : spin_s;
    }

    /* What a wait took, beside the work that was waited for. One that was held up by something else counts as twice the
       usual, so that it does not make a poor choice of a good one for the next hundred. */
    static inline void kq_waited(kq_spinner *spinner, double took_s) {
        double *usual_s = spinner->spun ? &spinner->spinning_s : &spinner->sleeping_s;
        if (took_s < 1e-6) took_s = 1e-6;
        if (*usual_s > 0 && took_s > 2 * *usual_s) took_s = 2 * *usual_s;
        *usual_s = *usual_s > 0 ? *usual_s + (took_s - *usual_s) / 8 : took_s;
    }
    """
    double KQ_YIELD_LONG_S
    double kq_now_s() nogil

    ctypedef struct kq_spinner:
        int spun
    bint kq_spins(const kq_spinner *spinner) nogil
    double kq_spin_s(kq_spinner *spinner, double work_s) nogil
    void kq_waited(kq_spinner *spinner, double took_s) nogil
