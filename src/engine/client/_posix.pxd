# The calls of the system that the native transport makes at both ends.

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *items, unsigned long count, int timeout_ms)
    short POLLIN
    short POLLOUT

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<string.h>" nogil:
    void explicit_bzero(void *start, size_t length)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_MORE
    int MSG_NOSIGNAL
    int MSG_PEEK
    int SHUT_RDWR
    int SOCK_CLOEXEC
    int SOCK_NONBLOCK
    int accept4(int fd, void *address, void *length, int flags)
    int getsockopt(int fd, int level, int option, void *value, unsigned *length)
    int setsockopt(int fd, int level, int option, const void *value, unsigned length)
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    ssize_t send(int fd, const void *buffer, size_t length, int flags)
