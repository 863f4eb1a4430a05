/*
 * The arena of secret_arena.h: regions of locked pages, cut into granules by first fit. It alone knows mmap and fork.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS, MADV_DONTDUMP, MADV_WIPEONFORK, explicit_bzero */
#include "secret_arena.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/types.h>
#include <unistd.h>

enum { GRANULES = SECRET_REGION_BYTES / SECRET_GRANULE_BYTES };

/* Bookkeeping lies in ordinary memory, so that no overrun of a secret can change it. */
typedef struct region {
    struct region *next;
    uint8_t *pages;       /* the accessible ones; a page before and one after them are not */
    size_t length;        /* of the accessible pages */
    uint8_t used[GRANULES]; /* of a shared region: 1 where given out */
    int shared;
} region;

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static region *regions;
static size_t used_bytes;
static unsigned generation; /* counts forks from here down to this process */
static int setup_error;

void secret_wipe(uint8_t *bytes, size_t length)
{
    explicit_bzero(bytes, length);
}

int secret_equal(const uint8_t *a, const uint8_t *b, size_t length)
{
    volatile uint8_t difference = 0; /* volatile: no early end once it is known */
    for (size_t i = 0; i < length; i++)
        difference |= a[i] ^ b[i];
    return difference == 0;
}

int secret_random(uint8_t *bytes, size_t length)
{
    for (size_t done = 0; done < length;) {
        const ssize_t got = getrandom(bytes + done, length - done, 0);
        if (got > 0) {
            done += (size_t)got;
        } else if (got == 0 || errno != EINTR) {
            const int error = got == 0 ? EIO : errno;
            explicit_bzero(bytes, length);
            return error;
        }
    }
    return 0;
}

static void before_fork(void)
{
    pthread_mutex_lock(&guard);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&guard);
}

/* The parent's regions stay mapped, since views of them may be open, but nothing is given out from them again. */
static void after_fork_in_child(void)
{
    regions = NULL;
    used_bytes = 0;
    generation++;
    pthread_mutex_unlock(&guard);
}

/* No lock: at exit another thread may hold it, and wiping what it uses is what is wanted. */
static void wipe_all(void)
{
    for (region *each = regions; each != NULL; each = each->next)
        explicit_bzero(each->pages, each->length);
}

static void set_up(void)
{
    setup_error = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    if (!setup_error && atexit(wipe_all) != 0)
        setup_error = ENOMEM;
}

/* A new region of at least `length` accessible bytes, or NULL with the error. Call with the lock held. */
static region *add_region(size_t length, int shared, int *error, const char **failed_call)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    region *made;
    uint8_t *mapping;
    if (length > SIZE_MAX - 3 * page) {
        *failed_call = "mmap";
        *error = ENOMEM;
        return NULL;
    }
    length = (length + page - 1) / page * page;
    made = calloc(1, sizeof *made);
    if (made == NULL) {
        *failed_call = "calloc";
        *error = ENOMEM;
        return NULL;
    }
    mapping = mmap(NULL, length + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) {
        *error = errno;
        *failed_call = "mmap";
        free(made);
        return NULL;
    }
    made->pages = mapping + page;
    made->length = length;
    made->shared = shared;
    if (mprotect(made->pages, length, PROT_READ | PROT_WRITE) != 0)
        *failed_call = "mprotect";
    else if (madvise(made->pages, length, MADV_DONTDUMP) != 0)
        *failed_call = "madvise(MADV_DONTDUMP)";
    else if (madvise(made->pages, length, MADV_WIPEONFORK) != 0)
        *failed_call = "madvise(MADV_WIPEONFORK)";
    else if (mlock(made->pages, length) != 0)
        *failed_call = "mlock";
    else {
        made->next = regions;
        regions = made;
        return made;
    }
    *error = errno;
    munmap(mapping, length + 2 * page);
    free(made);
    return NULL;
}

/* First fit for so many granules in a row; NULL if there are none. */
static uint8_t *cut(region *from, size_t granules)
{
    size_t run = 0;
    for (size_t i = 0; i < GRANULES; i++) {
        run = from->used[i] ? 0 : run + 1;
        if (run == granules) {
            memset(from->used + i + 1 - granules, 1, granules);
            return from->pages + (i + 1 - granules) * SECRET_GRANULE_BYTES;
        }
    }
    return NULL;
}

static size_t rounded(size_t length)
{
    return (length + SECRET_GRANULE_BYTES - 1) / SECRET_GRANULE_BYTES * SECRET_GRANULE_BYTES;
}

int secret_allocate(size_t length, secret_piece *piece, const char **failed_call)
{
    int error = 0;
    region *from;
    uint8_t *bytes = NULL;

    *failed_call = "pthread_atfork";
    pthread_once(&once, set_up);
    if (setup_error)
        return setup_error;
    if (length > SIZE_MAX / 2) {
        *failed_call = "mmap";
        return ENOMEM;
    }
    pthread_mutex_lock(&guard);
    if (length > SECRET_SMALL_BYTES) {
        from = add_region(length, 0, &error, failed_call);
        if (from != NULL)
            bytes = from->pages + from->length - rounded(length);
    } else {
        for (from = regions; from != NULL && bytes == NULL; from = from->next)
            if (from->shared)
                bytes = cut(from, rounded(length) / SECRET_GRANULE_BYTES);
        if (bytes == NULL) {
            from = add_region(SECRET_REGION_BYTES, 1, &error, failed_call);
            if (from != NULL)
                bytes = cut(from, rounded(length) / SECRET_GRANULE_BYTES);
        }
    }
    if (bytes != NULL) {
        piece->bytes = bytes;
        piece->length = length;
        piece->generation = generation;
        used_bytes += rounded(length);
    }
    pthread_mutex_unlock(&guard);
    return error;
}

static int is_inside(const region *place, const uint8_t *bytes)
{
    return place->pages <= bytes && bytes < place->pages + place->length;
}

void secret_release(const secret_piece *piece)
{
    explicit_bzero(piece->bytes, piece->length);
    pthread_mutex_lock(&guard);
    if (piece->generation == generation) {
        region **link = &regions;
        while (*link != NULL && !is_inside(*link, piece->bytes))
            link = &(*link)->next;
        region *found = *link;
        used_bytes -= rounded(piece->length);
        if (found != NULL && found->shared) {
            memset(found->used + (size_t)(piece->bytes - found->pages) / SECRET_GRANULE_BYTES, 0,
                   rounded(piece->length) / SECRET_GRANULE_BYTES);
        } else if (found != NULL) {
            const size_t page = (size_t)sysconf(_SC_PAGESIZE);
            *link = found->next;
            munmap(found->pages - page, found->length + 2 * page); /* which unlocks it too */
            free(found);
        }
    }
    pthread_mutex_unlock(&guard);
}

int secret_is_own(const secret_piece *piece)
{
    return piece->generation == generation;
}

void secret_usage(size_t *locked, size_t *used)
{
    pthread_mutex_lock(&guard);
    *locked = 0;
    for (const region *each = regions; each != NULL; each = each->next)
        *locked += each->length;
    *used = used_bytes;
    pthread_mutex_unlock(&guard);
}
