/*
 * The AVX2 kernel: products by two table look-ups inside registers (pshufb), one for each half of a byte.
 *
 * It knows nothing of CPUs' ids. The tables hold the products of a *public* scalar with 0x00..0x0F and 0x00..0xF0 and
 * lie in two registers while secret bytes choose among their entries, so no address depends on a secret.
 * A row's last bytes are done again with the vector before them, so only rows below one vector are ever copied.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { VECTOR_BYTES = 32, GROUP_MAX = 4, TABLE_BYTES = 32 };

INLINE __m256i table(const uint8_t *from)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
}

INLINE void store(uint8_t *to, __m256i value, int bypass)
{
    if (bypass)
        _mm256_stream_si256((__m256i *)to, value);
    else
        _mm256_storeu_si256((__m256i *)to, value);
}

/* `lanes` vectors at `offset` of `rows` outputs; rows, lanes and bypass are constants where this is inlined. */
INLINE void step(const uint8_t *tables, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                 uint8_t *const *outputs, size_t offset, int bypass)
{
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i sum[GROUP_MAX][4];
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            sum[r][lane] = _mm256_setzero_si256();
    for (unsigned k = 0; k < count; k++, tables += (size_t)TABLE_BYTES * rows) {
        __m256i low[4], high[4];
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++) {
            const __m256i row = _mm256_loadu_si256((const __m256i *)(inputs[k] + offset + VECTOR_BYTES * lane));
            low[lane] = _mm256_and_si256(row, mask);
            high[lane] = _mm256_and_si256(_mm256_srli_epi64(row, 4), mask);
        }
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; r++) {
            const __m256i of_low = table(tables + (size_t)TABLE_BYTES * r);
            const __m256i of_high = table(tables + (size_t)TABLE_BYTES * r + 16);
#pragma GCC unroll 4
            for (unsigned lane = 0; lane < lanes; lane++) {
                sum[r][lane] = _mm256_xor_si256(sum[r][lane], _mm256_shuffle_epi8(of_low, low[lane]));
                sum[r][lane] = _mm256_xor_si256(sum[r][lane], _mm256_shuffle_epi8(of_high, high[lane]));
            }
        }
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            store(outputs[r] + offset + VECTOR_BYTES * lane, sum[r][lane], bypass);
}

INLINE void run(const uint8_t *tables, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    const size_t stride = (size_t)VECTOR_BYTES * lanes;
    for (; offset + stride <= length; offset += stride)
        step(tables, rows, count, lanes, inputs, outputs, offset, bypass);
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES)
        step(tables, rows, count, 1, inputs, outputs, offset, 0);
    if (offset < length)
        step(tables, rows, count, 1, inputs, outputs, length - VECTOR_BYTES, 0);
}

#define ROWS(rows, lanes)                                                                                             \
    static TARGET void rows_##rows(const uint8_t *tables, unsigned count, const uint8_t *const *inputs,               \
                                   uint8_t *const *outputs, size_t offset, size_t length, int bypass)                 \
    {                                                                                                                 \
        if (bypass)                                                                                                   \
            run(tables, rows, count, lanes, inputs, outputs, offset, length, 1);                                      \
        else                                                                                                          \
            run(tables, rows, count, lanes, inputs, outputs, offset, length, 0);                                      \
    }

ROWS(1, 4)
ROWS(2, 2)
ROWS(3, 2)
ROWS(4, 2)

typedef void rows_fn(const uint8_t *, unsigned, const uint8_t *const *, uint8_t *const *, size_t, size_t, int);
static rows_fn *const GROUPS[GROUP_MAX + 1] = {NULL, rows_1, rows_2, rows_3, rows_4};

/* Rows below one vector go through copies of one vector each. */
static TARGET void short_rows(const uint8_t *tables, unsigned rows, unsigned count, const uint8_t *const *inputs,
                              uint8_t *const *outputs, size_t length)
{
    const __m256i mask = _mm256_set1_epi8(15);
    uint8_t copy[VECTOR_BYTES] = {0};
    __m256i sum[GROUP_MAX];
    for (unsigned r = 0; r < rows; r++)
        sum[r] = _mm256_setzero_si256();
    for (unsigned k = 0; k < count; k++) {
        __m256i row, low, high;
        memcpy(copy, inputs[k], length);
        row = _mm256_loadu_si256((const __m256i *)copy);
        low = _mm256_and_si256(row, mask);
        high = _mm256_and_si256(_mm256_srli_epi64(row, 4), mask);
        for (unsigned r = 0; r < rows; r++, tables += TABLE_BYTES) {
            sum[r] = _mm256_xor_si256(sum[r], _mm256_shuffle_epi8(table(tables), low));
            sum[r] = _mm256_xor_si256(sum[r], _mm256_shuffle_epi8(table(tables + 16), high));
        }
    }
    for (unsigned r = 0; r < rows; r++) {
        _mm256_storeu_si256((__m256i *)copy, sum[r]);
        memcpy(outputs[r], copy, length);
    }
    explicit_bzero(copy, sizeof copy);
    explicit_bzero(sum, sizeof sum);
}

TARGET void gf256_multiply_avx2(const gf256_field *field, const uint8_t *matrix, unsigned output_count,
                                unsigned input_count, const uint8_t *const *inputs, uint8_t *const *outputs,
                                size_t length, int bypass)
{
    uint8_t tables[GROUP_MAX * GF256_SHARES_MAX * TABLE_BYTES]; /* public */
    if (length == 0)
        return;
    while (output_count > 0) {
        const unsigned rest = (output_count + GROUP_MAX - 1) / GROUP_MAX; /* groups to go: keep them alike in size */
        const unsigned rows = (output_count + rest - 1) / rest;
        for (unsigned k = 0; k < input_count; k++)
            for (unsigned r = 0; r < rows; r++)
                memcpy(tables + (size_t)TABLE_BYTES * (k * rows + r), field->nibbles[matrix[r * input_count + k]],
                       TABLE_BYTES);
        if (length < VECTOR_BYTES) {
            short_rows(tables, rows, input_count, inputs, outputs, length);
        } else {
            const size_t head = -(uintptr_t)outputs[0] % VECTOR_BYTES;
            int aligned = bypass && head + VECTOR_BYTES <= length;
            for (unsigned r = 1; r < rows; r++)
                aligned &= -(uintptr_t)outputs[r] % VECTOR_BYTES == head;
            if (aligned) /* the first vector covers the bytes before the first aligned one */
                GROUPS[rows](tables, input_count, inputs, outputs, 0, VECTOR_BYTES, 0);
            GROUPS[rows](tables, input_count, inputs, outputs, aligned ? head : 0, length, aligned);
        }
        matrix += (size_t)rows * input_count;
        outputs += rows;
        output_count -= rows;
    }
    if (bypass)
        _mm_sfence();
}

#else
typedef int gf256_avx2_is_for_x86_64;
#endif
