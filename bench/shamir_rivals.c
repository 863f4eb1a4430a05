/*
 * Owns the timing of the native core beside its rivals inside one process; bench/shamir.py builds and drives it.
 *
 * It knows nothing of Python and decides nothing: which operation, on which rows, how often. The rivals come as
 * addresses of functions, so that two versions of one library can be measured side by side.
 */
#define _GNU_SOURCE
#include "gf256.h"

#include <string.h>
#include <time.h>

typedef void isal_encode_fn(int length, int inputs, int outputs, unsigned char *tables, unsigned char **data,
                            unsigned char **coding);
typedef void gfshare_set_fn(void *context, const unsigned char *secret);
typedef void gfshare_share_fn(void *context, unsigned char number, unsigned char *share);
typedef void gfshare_give_fn(void *context, unsigned char number, const unsigned char *share);
typedef void gfshare_extract_fn(void *context, unsigned char *secret);

/* One operation on one set of rows. Fields that an operation does not use are 0. */
typedef struct {
    int operation;
    const gf256_kernel *kernel;             /* ours */
    const gf256_field *field;
    unsigned input_count, output_count;     /* rows; a split has the secret as input 0 */
    size_t length;
    uint8_t xs[256], targets[256];
    uint8_t *inputs[256], *outputs[256];
    isal_encode_fn *encode;                 /* theirs */
    unsigned char *tables;
    void *context;
    gfshare_set_fn *set;
    gfshare_share_fn *share;
    gfshare_give_fn *give;
    gfshare_extract_fn *extract;
} work;

enum { INTERPOLATE, SPLIT, ISAL, COPY, GFSHARE_SPLIT, GFSHARE_COMBINE };

void rivals_init(void)
{
    gf256_init();
}

size_t rivals_work_bytes(void)
{
    return sizeof(work);
}

const gf256_kernel *rivals_kernel(const char *name)
{
    const gf256_kernel *kernel;
    for (unsigned position = 0; (kernel = gf256_kernel_at(position)) != NULL; position++)
        if (strcmp(kernel->name, name) == 0)
            break;
    return kernel;
}

const gf256_field *rivals_field(unsigned polynomial)
{
    return gf256_field_of(polynomial);
}

/* For libgfshare: whoever measures gives both ends ready randomness, so its own generator does nothing. */
void rivals_no_random(unsigned char *buffer, unsigned count)
{
    (void)buffer;
    (void)count;
}

static int once(work *w)
{
    switch (w->operation) {
    case INTERPOLATE:
        gf256_interpolate(w->kernel, w->field, w->xs, w->input_count, (const uint8_t *const *)w->inputs, w->targets,
                          w->output_count, w->outputs, w->length);
        return 0;
    case SPLIT: /* the whole of it; input_count is the threshold */
        return gf256_split(w->kernel, gf256_generator_of(w->kernel), w->field, w->inputs[0], w->length, w->input_count,
                           w->output_count, w->targets, w->outputs);
    case ISAL:
        w->encode((int)w->length, (int)w->input_count, (int)w->output_count, w->tables, w->inputs, w->outputs);
        return 0;
    case COPY:
        for (unsigned o = 0; o < w->output_count; o++)
            memcpy(w->outputs[o], w->inputs[0], w->length);
        return 0;
    case GFSHARE_SPLIT:
        w->set(w->context, w->inputs[0]);
        for (unsigned o = 0; o < w->output_count; o++)
            w->share(w->context, (unsigned char)o, w->outputs[o]);
        return 0;
    case GFSHARE_COMBINE:
        for (unsigned k = 0; k < w->input_count; k++)
            w->give(w->context, (unsigned char)k, w->inputs[k]);
        w->extract(w->context, w->outputs[0]);
        return 0;
    }
    return -1;
}

/* Nanoseconds that `repetitions` of the operation take, or -1 when one of them fails. */
int64_t rivals_time(work *w, unsigned repetitions)
{
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (unsigned i = 0; i < repetitions; i++) {
        if (once(w))
            return -1;
        __asm__ volatile("" ::: "memory");
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (end.tv_sec - start.tv_sec) * 1000000000LL + (end.tv_nsec - start.tv_nsec);
}
