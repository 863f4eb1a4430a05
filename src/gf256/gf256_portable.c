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
    unsigned top;              /* the highest bit that any scalar has */
    uint16_t ends[8];          /* adds[ends[bit + 1] .. ends[bit]) are the inputs whose scalar has the bit */
    uint8_t adds[8 * GF256_SHARES_MAX];
} recipe;

static void write_recipe(recipe *steps, const uint8_t *scalars, unsigned input_count)
{
    unsigned seen = 0, length = 0;
    for (unsigned k = 0; k < input_count; k++)
        seen |= scalars[k];
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
static inline void cook_stride(const recipe *steps, vector remainder, const uint8_t *const *inputs, uint8_t *output, size_t offset)
{
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
static inline void cook_vector(const recipe *steps, vector remainder, const uint8_t *const *inputs, uint8_t *output, size_t offset,
                               size_t width, vector *scratch)
{
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

void gf256_multiply_portable(const gf256_field *field, const uint8_t *matrix, unsigned output_count,
                             unsigned input_count, const uint8_t *const *inputs, uint8_t *const *outputs,
                             size_t length, int bypass)
{
    const vector remainder = (vector){0} + (uint8_t)field->polynomial; /* what x^8 is */
    const size_t whole = length - length % VECTOR_BYTES, strides = length - length % STRIDE_BYTES;
    recipe steps;
    vector scratch = {0};
    (void)bypass; /* C has no way to write around the caches */
    for (unsigned o = 0; o < output_count; o++) {
        size_t offset = 0;
        write_recipe(&steps, matrix + (size_t)o * input_count, input_count);
        for (; offset < strides; offset += STRIDE_BYTES)
            cook_stride(&steps, remainder, inputs, outputs[o], offset);
        for (; offset < whole; offset += VECTOR_BYTES)
            cook_vector(&steps, remainder, inputs, outputs[o], offset, VECTOR_BYTES, &scratch);
        if (offset < length)
            cook_vector(&steps, remainder, inputs, outputs[o], offset, length - offset, &scratch);
    }
    if (whole != length)
        explicit_bzero(&scratch, sizeof scratch);
}
