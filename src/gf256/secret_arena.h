/*
 * Memory for secrets: never swapped, never in a core dump, empty in a forked child, fenced by pages that fault.
 *
 * It knows no field, no key and no Python. Memory comes from regions: mmap(2) with an inaccessible page before and after,
 * mlock(2), MADV_DONTDUMP and MADV_WIPEONFORK (Linux 4.14). All of it must succeed, or there is no memory: a caller
 * that is promised locked memory never gets other memory. Small pieces share regions of SECRET_REGION_BYTES, which fit
 * an RLIMIT_MEMLOCK of 64 KiB (the default of Linux before 5.16; since then, and on Debian 12, it is 8 MiB). Larger ones
 * have a region of their own and end at its last 64 bytes, so that an overrun faults at once.
 *
 * Freed memory is overwritten before it can be given out again, and all memory when the process ends by exit(3). In a
 * forked child (fork(2) keeps neither the lock nor, by MADV_WIPEONFORK, the contents) the parent's pieces read as zeros
 * and count as lost; new ones come from new, locked regions. Any thread may call any function.
 */
#ifndef KEYQUORUM_SECRET_ARENA_H
#define KEYQUORUM_SECRET_ARENA_H

#include <stddef.h>
#include <stdint.h>

enum {
    SECRET_GRANULE_BYTES = 64,       /* what pieces are aligned to and rounded up to */
    SECRET_REGION_BYTES = 32 * 1024, /* shared by small pieces */
    SECRET_SMALL_BYTES = 8 * 1024    /* larger pieces have a region of their own */
};

typedef struct {
    uint8_t *bytes;      /* `length` of them; zero when given out */
    size_t length;
    unsigned generation; /* of the process that asked for it */
} secret_piece;

/* Fills in `piece` and returns 0, or returns the errno value of mmap, mlock or madvise (and names the call). */
int secret_allocate(size_t length, secret_piece *piece, const char **failed_call);

/* Overwrites the piece and gives it back. Call it once for each piece; harmless for a parent's piece in a child. */
void secret_release(const secret_piece *piece);

/* Whether the piece was asked for by this very process, and not by the one that it was forked from. */
int secret_is_own(const secret_piece *piece);

/* Overwrites with zeros, which no compiler leaves out. */
void secret_wipe(uint8_t *bytes, size_t length);

/* 1 if equal, else 0, in a time that depends on the length alone. */
int secret_equal(const uint8_t *a, const uint8_t *b, size_t length);

/* Fills from getrandom(2); 0 or an errno value, and then all is zero. */
int secret_random(uint8_t *bytes, size_t length);

/* Bytes locked now for this process, and bytes of them given out. */
void secret_usage(size_t *locked, size_t *used);

#endif
