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

enum { VECTOR_BYTES = 32, ROWS_MAX = 4, TABLE_BYTES = 32 };

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
    __m256i sum[ROWS_MAX][4];
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
static rows_fn *const GROUPS[ROWS_MAX + 1] = {NULL, rows_1, rows_2, rows_3, rows_4};

/* Rows below one vector go through copies of one vector each. */
static TARGET void short_rows(const uint8_t *tables, unsigned rows, unsigned count, const uint8_t *const *inputs,
                              uint8_t *const *outputs, size_t length)
{
    const __m256i mask = _mm256_set1_epi8(15);
    uint8_t copy[VECTOR_BYTES] = {0};
    __m256i sum[ROWS_MAX];
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

void gf256_list_avx2(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows, unsigned count)
{
    uint8_t *const tables = list;
    for (unsigned r = 0; r < rows; r++)
        for (unsigned k = 0; k < count; k++)
            memcpy(tables + (size_t)TABLE_BYTES * (k * rows + r), field->nibbles[*matrix++], TABLE_BYTES);
}

TARGET void gf256_run_avx2(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                           uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    if (length < VECTOR_BYTES)
        short_rows(list, rows, count, inputs, outputs, length);
    else
        GROUPS[rows](list, count, inputs, outputs, offset, length, bypass);
}

/* With a constant count the addresses stay in registers, whatever the compiler must think of the output. */
INLINE void add_some(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length)
{
    const uint8_t *terms[4];
    for (unsigned k = 0; k < count; k++)
        terms[k] = inputs[k];
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES) {
        __m256i sum = _mm256_loadu_si256((const __m256i *)(terms[0] + offset));
        for (unsigned k = 1; k < count; k++)
            sum = _mm256_xor_si256(sum, _mm256_loadu_si256((const __m256i *)(terms[k] + offset)));
        _mm256_storeu_si256((__m256i *)(output + offset), sum);
    }
    for (; offset < length; offset++) {
        uint8_t sum = terms[0][offset];
        for (unsigned k = 1; k < count; k++)
            sum ^= terms[k][offset];
        output[offset] = sum;
    }
}

TARGET void gf256_add_avx2(unsigned count, const uint8_t *const *inputs, uint8_t *output, size_t offset, size_t length)
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
typedef int gf256_avx2_is_for_x86_64;
#endif
