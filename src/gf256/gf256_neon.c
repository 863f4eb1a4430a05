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

enum { VECTOR_BYTES = 16, GROUP_MAX = 4, TABLE_BYTES = 32 };

/* `lanes` vectors at `offset` of `rows` outputs; rows and lanes are constants where this is inlined. */
INLINE void step(const uint8_t *tables, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                 uint8_t *const *outputs, size_t offset)
{
    uint8x16_t sum[GROUP_MAX][4];
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
                            uint8_t *const *outputs, size_t length)                                                   \
    {                                                                                                                 \
        const size_t stride = (size_t)VECTOR_BYTES * lanes;                                                           \
        size_t offset = 0;                                                                                            \
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

typedef void rows_fn(const uint8_t *, unsigned, const uint8_t *const *, uint8_t *const *, size_t);
static rows_fn *const GROUPS[GROUP_MAX + 1] = {NULL, rows_1, rows_2, rows_3, rows_4};

/* Rows below one vector go through copies of one vector each. */
static void short_rows(const uint8_t *tables, unsigned rows, unsigned count, const uint8_t *const *inputs,
                       uint8_t *const *outputs, size_t length)
{
    uint8_t copy[VECTOR_BYTES] = {0};
    uint8x16_t sum[GROUP_MAX];
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

void gf256_multiply_neon(const gf256_field *field, const uint8_t *matrix, unsigned output_count, unsigned input_count,
                         const uint8_t *const *inputs, uint8_t *const *outputs, size_t length, int bypass)
{
    uint8_t tables[GROUP_MAX * GF256_SHARES_MAX * TABLE_BYTES]; /* public */
    (void)bypass; /* there is no store around the caches that compilers would emit for sure */
    if (length == 0)
        return;
    while (output_count > 0) {
        const unsigned rest = (output_count + GROUP_MAX - 1) / GROUP_MAX; /* groups to go: keep them alike in size */
        const unsigned rows = (output_count + rest - 1) / rest;
        for (unsigned k = 0; k < input_count; k++)
            for (unsigned r = 0; r < rows; r++)
                memcpy(tables + (size_t)TABLE_BYTES * (k * rows + r), field->nibbles[matrix[r * input_count + k]],
                       TABLE_BYTES);
        if (length < VECTOR_BYTES)
            short_rows(tables, rows, input_count, inputs, outputs, length);
        else
            GROUPS[rows](tables, input_count, inputs, outputs, length);
        matrix += (size_t)rows * input_count;
        outputs += rows;
        output_count -= rows;
    }
}

#else
typedef int gf256_neon_is_for_aarch64;
#endif
