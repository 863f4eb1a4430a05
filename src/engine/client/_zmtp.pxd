# The declarations of zmtp.h, and libsodium.

from libc.stdint cimport uint8_t


cdef extern from "zmtp.h" nogil:
    size_t KQ_KEY
    size_t KQ_HEAD_MAX
    size_t KQ_HANDSHAKE_MAX
    int KQ_JUDGED
    int KQ_OPEN
    int KQ_ENDED

    ctypedef struct kq_sodium:
        int (*beforenm)(uint8_t *, const uint8_t *, const uint8_t *) noexcept nogil
        int (*seal)(uint8_t *, const uint8_t *, unsigned long long, const uint8_t *, const uint8_t *) noexcept nogil
        int (*open)(uint8_t *, const uint8_t *, unsigned long long, const uint8_t *, const uint8_t *) noexcept nogil
        int (*keypair)(uint8_t *, uint8_t *) noexcept nogil
        void (*random)(void *, size_t) noexcept nogil
        void (*wipe)(void *, size_t) noexcept nogil

    ctypedef struct kq_curve:
        int stage
        int server
        int refused
        const uint8_t *own_public
        const uint8_t *own_secret
        const uint8_t *server_public
        uint8_t *peer_public

    ctypedef struct kq_frame:
        uint8_t *body
        size_t length
        size_t whole
        int command
        int more

    int kq_next_frame(uint8_t *at, size_t length, size_t limit, kq_frame *frame, size_t *needed)
    size_t kq_begin(kq_curve *curve, uint8_t *to)
    size_t kq_shake(kq_curve *curve, const kq_sodium *sodium, uint8_t *at, size_t length, uint8_t *to, size_t *said)
    size_t kq_judge(kq_curve *curve, const kq_sodium *sodium, bint welcome, uint8_t *to)
    size_t kq_message_head(size_t length)
    size_t kq_write_message(uint8_t *to, kq_curve *curve, const kq_sodium *sodium, const uint8_t *content,
                            size_t length, uint8_t flags)
    bint kq_open_message(kq_curve *curve, const kq_sodium *sodium, const kq_frame *frame, uint8_t **content,
                         size_t *length, uint8_t *flags)
    void kq_end_curve(kq_curve *curve, const kq_sodium *sodium)


cdef kq_sodium sodium
