/*
 * The NEON kernel for AArch64: products by two table look-ups inside registers (tbl), one for each half of a byte.
 *
 * Every AArch64 CPU has NEON, so there is nothing to know about CPUs. The tables belong to *public* scalars and lie in
 * registers while secret bytes choose among their entries, so no address depends on a secret.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { VECTOR_BYTES = 16, ROWS_MAX = 4, TABLE_BYTES = 32 };

/* `lanes` vectors at `offset` of `rows` outputs; rows and lanes are constants where this is inlined. */
INLINE void step(const uint8_t *tables, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                 uint8_t *const *outputs, size_t offset)
{
    uint8x16_t sum[ROWS_MAX][4];
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            sum[r][lane] = vdupq_n_u8(0);
    for (unsigned k = 0; k < count; k++, tables += (size_t)TABLE_BYTES * rows) {
        uint8x16_t low[4], high[4];
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++) {
            const uint8x16_t row = vld1q_u8(inputs[k] + offset + VECTOR_BYTES * lane);
            low[lane] = vandq_u8(row, vdupq_n_u8(15));
            high[lane] = vshrq_n_u8(row, 4);
        }
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; r++) {
            const uint8x16_t of_low = vld1q_u8(tables + (size_t)TABLE_BYTES * r);
            const uint8x16_t of_high = vld1q_u8(tables + (size_t)TABLE_BYTES * r + 16);
#pragma GCC unroll 4
            for (unsigned lane = 0; lane < lanes; lane++) {
                sum[r][lane] = veorq_u8(sum[r][lane], vqtbl1q_u8(of_low, low[lane]));
                sum[r][lane] = veorq_u8(sum[r][lane], vqtbl1q_u8(of_high, high[lane]));
            }
        }
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            vst1q_u8(outputs[r] + offset + VECTOR_BYTES * lane, sum[r][lane]);
}

#define ROWS(rows, lanes)                                                                                             \
    static void rows_##rows(const uint8_t *tables, unsigned count, const uint8_t *const *inputs,                      \
                            uint8_t *const *outputs, size_t offset, size_t length)                                    \
    {                                                                                                                 \
        const size_t stride = (size_t)VECTOR_BYTES * lanes;                                                           \
        for (; offset + stride <= length; offset += stride)                                                           \
            step(tables, rows, count, lanes, inputs, outputs, offset);                                                \
        for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES)                                               \
            step(tables, rows, count, 1, inputs, outputs, offset);                                                    \
        if (offset < length) /* again with the vector before it: the same result */                                   \
            step(tables, rows, count, 1, inputs, outputs, length - VECTOR_BYTES);                                     \
    }

ROWS(1, 4)
ROWS(2, 4)
ROWS(3, 4)
ROWS(4, 2)

typedef void rows_fn(const uint8_t *, unsigned, const uint8_t *const *, uint8_t *const *, size_t, size_t);
static rows_fn *const GROUPS[ROWS_MAX + 1] = {NULL, rows_1, rows_2, rows_3, rows_4};

/* Rows below one vector go through copies of one vector each. */
static void short_rows(const uint8_t *tables, unsigned rows, unsigned count, const uint8_t *const *inputs,
                       uint8_t *const *outputs, size_t length)
{
    uint8_t copy[VECTOR_BYTES] = {0};
    uint8x16_t sum[ROWS_MAX];
    for (unsigned r = 0; r < rows; r++)
        sum[r] = vdupq_n_u8(0);
    for (unsigned k = 0; k < count; k++) {
        uint8x16_t row;
        memcpy(copy, inputs[k], length);
        row = vld1q_u8(copy);
        for (unsigned r = 0; r < rows; r++, tables += TABLE_BYTES) {
            sum[r] = veorq_u8(sum[r], vqtbl1q_u8(vld1q_u8(tables), vandq_u8(row, vdupq_n_u8(15))));
            sum[r] = veorq_u8(sum[r], vqtbl1q_u8(vld1q_u8(tables + 16), vshrq_n_u8(row, 4)));
        }
    }
    for (unsigned r = 0; r < rows; r++) {
        vst1q_u8(copy, sum[r]);
        memcpy(outputs[r], copy, length);
    }
    explicit_bzero(copy, sizeof copy);
    explicit_bzero(sum, sizeof sum);
}

void gf256_list_neon(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows, unsigned count)
{
    uint8_t *const tables = list;
    for (unsigned r = 0; r < rows; r++)
        for (unsigned k = 0; k < count; k++)
            memcpy(tables + (size_t)TABLE_BYTES * (k * rows + r), field->nibbles[*matrix++], TABLE_BYTES);
}

void gf256_run_neon(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                    uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    (void)bypass; /* there is no store around the caches that compilers would emit for sure */
    if (length < VECTOR_BYTES)
        short_rows(list, rows, count, inputs, outputs, length);
    else
        GROUPS[rows](list, count, inputs, outputs, offset, length);
}

/* With a constant count the addresses stay in registers, whatever the compiler must think of the output. */
INLINE void add_some(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length)
{
    const uint8_t *terms[4];
    for (unsigned k = 0; k < count; k++)
        terms[k] = inputs[k];
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES) {
        uint8x16_t sum = vld1q_u8(terms[0] + offset);
        for (unsigned k = 1; k < count; k++)
            sum = veorq_u8(sum, vld1q_u8(terms[k] + offset));
        vst1q_u8(output + offset, sum);
    }
    for (; offset < length; offset++) {
        uint8_t sum = terms[0][offset];
        for (unsigned k = 1; k < count; k++)
            sum ^= terms[k][offset];
        output[offset] = sum;
    }
}

void gf256_add_neon(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length)
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

#else
typedef int gf256_neon_is_for_aarch64;
#endif
