"""The parts of libzmq's stable interface that the data path uses, of the very libzmq that pyzmq loaded."""

# From zmq.h.
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

    /* How long this wait may spin; 0: not at all. */
    static inline double kq_spin_s(kq_spinner *spinner) {
        spinner->spun = kq_spins(spinner) ^ (++spinner->number % KQ_SAMPLE == 0);
        if (!spinner->spun) return 0;
        double spin_s = 2 * (spinner->spinning_s > 0 ? spinner->spinning_s : spinner->sleeping_s);
        return spin_s < KQ_SPIN_MIN_S ? KQ_SPIN_MIN_S : spin_s > KQ_SPIN_MAX_S ? KQ_SPIN_MAX_S : spin_s;
    }

    /* What a wait took in all. */
    static inline void kq_waited(kq_spinner *spinner, double took_s) {
        double *usual_s = spinner->spun ? &spinner->spinning_s : &spinner->sleeping_s;
        *usual_s += (took_s - *usual_s) / 8;
    }

    typedef struct { _Alignas(8) unsigned char opaque[64]; } kq_message;
    typedef struct { void *socket; int fd; short events; short revents; } kq_poll_item;
    """
    double KQ_YIELD_LONG_S
    double kq_now_s() nogil

    ctypedef struct kq_spinner:
        pass
    bint kq_spins(const kq_spinner *spinner) nogil
    double kq_spin_s(kq_spinner *spinner) nogil
    void kq_waited(kq_spinner *spinner, double took_s) nogil

    ctypedef struct kq_message:
        pass
    ctypedef struct kq_poll_item:
        void *socket
        int fd
        short events
        short revents

cdef enum:
    ZMQ_DONTWAIT = 1
    ZMQ_SNDMORE = 2
    ZMQ_SRCFD = 2
    ZMQ_FD = 14
    ZMQ_EVENTS = 15
    ZMQ_POLLIN = 1

ctypedef int (*send_function)(void *socket, const void *buffer, size_t length, int flags) noexcept nogil
ctypedef int (*message_function)(kq_message *message) noexcept nogil
ctypedef int (*receive_function)(kq_message *message, void *socket, int flags) noexcept nogil
ctypedef void *(*data_function)(kq_message *message) noexcept nogil
ctypedef size_t (*size_function)(kq_message *message) noexcept nogil
ctypedef int (*errno_function)() noexcept nogil
ctypedef int (*poll_function)(kq_poll_item *items, int count, long timeout_ms) noexcept nogil
ctypedef int (*option_function)(void *socket, int option, void *value, size_t *length) noexcept nogil
ctypedef const char *(*property_function)(const kq_message *message, const char *name) noexcept nogil
ctypedef int (*number_function)(const kq_message *message, int property) noexcept nogil

cdef send_function zmq_send
cdef message_function zmq_msg_init, zmq_msg_close, zmq_msg_more
cdef receive_function zmq_msg_recv
cdef data_function zmq_msg_data
cdef size_function zmq_msg_size
cdef errno_function zmq_errno
cdef poll_function zmq_poll
cdef option_function zmq_getsockopt
cdef property_function zmq_msg_gets
cdef number_function zmq_msg_get

cdef bint readable(void *socket) noexcept nogil
