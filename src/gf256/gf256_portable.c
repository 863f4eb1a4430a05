/*
 * The portable kernel: multiplication by doublings on whole vectors, for any CPU and without a table.
 *
 * The vectors are GCC's and Clang's generic ones: SSE2 on x86-64, NEON on AArch64, plain words elsewhere.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#include <string.h>

enum {
    VECTOR_BYTES = 16,
    LANES = 4, /* independent vectors in flight: hides the latency of a doubling, and all fit in registers */
    STRIDE_BYTES = VECTOR_BYTES * LANES
};

typedef uint8_t vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t signed_vector __attribute__((vector_size(VECTOR_BYTES)));

/*
 * One output row as a straight list of steps: after each doubling, which inputs are added. Writing it down once per
 * row keeps tests of scalar bits out of the inner loop. It depends on public scalars alone.
 */
typedef struct {
    uint8_t remainder;         /* what x^8 is in the field */
    uint8_t top;               /* the highest bit that any scalar has */
    uint16_t ends[8];          /* adds[ends[bit + 1] .. ends[bit]) are the inputs whose scalar has the bit */
    uint8_t adds[];            /* up to 8 for each input */
} recipe;

static void write_recipe(recipe *steps, const uint8_t *scalars, unsigned input_count, uint8_t remainder)
{
    unsigned seen = 0, length = 0;
    for (unsigned k = 0; k < input_count; k++)
        seen |= scalars[k];
    steps->remainder = remainder;
    steps->top = 0;
    while (seen >> (steps->top + 1))
        steps->top++;
    for (unsigned bit = steps->top + 1; bit-- > 0;) {
        for (unsigned k = 0; k < input_count; k++)
            if (scalars[k] >> bit & 1)
                steps->adds[length++] = (uint8_t)k;
        steps->ends[bit] = (uint16_t)length;
    }
}

/* Times x. The arithmetic shift spreads the top bit into a mask, so there is neither a branch nor a table. */
static inline vector doubled(vector v, vector remainder)
{
    const vector carry = (vector)((signed_vector)v >> 7);
    return (v + v) ^ (carry & remainder);
}

static inline vector load(const uint8_t *from)
{
    vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* STRIDE_BYTES at `offset` of one output row. All scalars together share the seven doublings (Horner over bits). */
static inline void cook_stride(const recipe *steps, const uint8_t *const *inputs, uint8_t *output, size_t offset)
{
    const vector remainder = (vector){0} + steps->remainder;
    vector sum[LANES] = {{0}};
    unsigned next = 0;
    for (unsigned bit = steps->top;; bit--) {
        for (; next < steps->ends[bit]; next++) {
            const uint8_t *row = inputs[steps->adds[next]] + offset;
            for (unsigned lane = 0; lane < LANES; lane++)
                sum[lane] ^= load(row + VECTOR_BYTES * lane);
        }
        if (bit == 0)
            break;
        for (unsigned lane = 0; lane < LANES; lane++)
            sum[lane] = doubled(sum[lane], remainder);
    }
    for (unsigned lane = 0; lane < LANES; lane++)
        memcpy(output + offset + VECTOR_BYTES * lane, &sum[lane], VECTOR_BYTES);
}

/* `width` <= VECTOR_BYTES bytes at `offset` of one output row; reads and writes no byte beyond them. */
static inline void cook_vector(const recipe *steps, const uint8_t *const *inputs, uint8_t *output, size_t offset,
                               size_t width, vector *scratch)
{
    const vector remainder = (vector){0} + steps->remainder;
    vector sum = {0};
    unsigned next = 0;
    for (unsigned bit = steps->top;; bit--) {
        for (; next < steps->ends[bit]; next++) {
            const uint8_t *row = inputs[steps->adds[next]] + offset;
            if (width == VECTOR_BYTES) {
                sum ^= load(row);
            } else {
                memcpy(scratch, row, width);
                sum ^= *scratch;
            }
        }
        if (bit == 0)
            break;
        sum = doubled(sum, remainder);
    }
    if (width == VECTOR_BYTES) {
        memcpy(output + offset, &sum, VECTOR_BYTES);
    } else {
        *scratch = sum;
        memcpy(output + offset, scratch, width);
    }
}

void gf256_list_portable(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows, unsigned count)
{
    (void)rows; /* 1 at a time */
    write_recipe(list, matrix, count, (uint8_t)field->polynomial);
}

void gf256_run_portable(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                        uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    const recipe *const steps = list;
    (void)rows;
    (void)count;
    (void)bypass; /* C has no way to write around the caches */
    for (; offset + STRIDE_BYTES <= length; offset += STRIDE_BYTES)
        cook_stride(steps, inputs, outputs[0], offset);
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES)
        cook_vector(steps, inputs, outputs[0], offset, VECTOR_BYTES, NULL);
    if (offset < length) {
        vector scratch = {0};
        cook_vector(steps, inputs, outputs[0], offset, length - offset, &scratch);
        explicit_bzero(&scratch, sizeof scratch);
    }
}

/* With a constant count the addresses stay in registers, whatever the compiler must think of the output. */
static inline void add_some(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length)
{
    const uint8_t *terms[4];
    for (unsigned k = 0; k < count; k++)
        terms[k] = inputs[k];
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES) {
        vector sum = load(terms[0] + offset);
        for (unsigned k = 1; k < count; k++)
            sum = sum ^ load(terms[k] + offset);
        memcpy(output + offset, &sum, VECTOR_BYTES);
    }
    for (; offset < length; offset++) {
        uint8_t sum = terms[0][offset];
        for (unsigned k = 1; k < count; k++)
            sum ^= terms[k][offset];
        output[offset] = sum;
    }
}

void gf256_add_portable(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length)
{
    switch (count) {
    case 1:
        add_some(1, inputs, output, offset, length);
        break;
    case 2:
        add_some(2, inputs, output, offset, length);
        break;
    case 3:
        add_some(3, inputs, output, offset, length);
        break;
    case 4:
        add_some(4, inputs, output, offset, length);
        break;
    }
}
