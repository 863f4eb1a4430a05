/*
 * The GFNI kernel on 256-bit vectors, for CPUs with GFNI but without AVX-512 (or that slow down under it).
 *
 * It knows nothing of CPUs' ids. One gf2p8affineqb per product, for either field; the scalars are broadcast from a list.
 * A row's last bytes are done again with the vector before them, so only rows below one vector are ever copied.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#if defined(__x86_64__)

#include <string.h>

#include <immintrin.h>
#define TARGET __attribute__((target("avx2,gfni")))

enum { VECTOR_BYTES = 32, ROWS_MAX = 5 };

#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE void store(uint8_t *to, __m256i value, int bypass)
{
    if (bypass)
        _mm256_stream_si256((__m256i *)to, value);
    else
        _mm256_storeu_si256((__m256i *)to, value);
}

/* `lanes` vectors at `offset` of `rows` outputs; rows, lanes and bypass are constants where this is inlined. */
INLINE void step(const uint64_t *scalars, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                 uint8_t *const *outputs, size_t offset, int bypass)
{
    __m256i sum[ROWS_MAX][4];
#pragma GCC unroll 5
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            sum[r][lane] = _mm256_setzero_si256();
    for (unsigned k = 0; k < count; k++, scalars += rows) {
        __m256i row[4];
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            row[lane] = _mm256_loadu_si256((const __m256i *)(inputs[k] + offset + VECTOR_BYTES * lane));
#pragma GCC unroll 5
        for (unsigned r = 0; r < rows; r++) {
            const __m256i scalar = _mm256_set1_epi64x((long long)scalars[r]);
#pragma GCC unroll 4
            for (unsigned lane = 0; lane < lanes; lane++)
                sum[r][lane] = _mm256_xor_si256(sum[r][lane], _mm256_gf2p8affine_epi64_epi8(row[lane], scalar, 0));
        }
    }
#pragma GCC unroll 5
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            store(outputs[r] + offset + VECTOR_BYTES * lane, sum[r][lane], bypass);
}

INLINE void run(const uint64_t *scalars, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    const size_t stride = (size_t)VECTOR_BYTES * lanes;
    for (; offset + stride <= length; offset += stride)
        step(scalars, rows, count, lanes, inputs, outputs, offset, bypass);
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES)
        step(scalars, rows, count, 1, inputs, outputs, offset, 0);
    if (offset < length)
        step(scalars, rows, count, 1, inputs, outputs, length - VECTOR_BYTES, 0);
}

#define ROWS(rows, lanes)                                                                                             \
    static TARGET void rows_##rows(const uint64_t *scalars, unsigned count, const uint8_t *const *inputs,             \
                                   uint8_t *const *outputs, size_t offset, size_t length, int bypass)                 \
    {                                                                                                                 \
        if (bypass)                                                                                                   \
            run(scalars, rows, count, lanes, inputs, outputs, offset, length, 1);                                     \
        else                                                                                                          \
            run(scalars, rows, count, lanes, inputs, outputs, offset, length, 0);                                     \
    }

ROWS(1, 4)
ROWS(2, 4)
ROWS(3, 3)
ROWS(4, 2)
ROWS(5, 2)

typedef void rows_fn(const uint64_t *, unsigned, const uint8_t *const *, uint8_t *const *, size_t, size_t, int);
static rows_fn *const GROUPS[ROWS_MAX + 1] = {NULL, rows_1, rows_2, rows_3, rows_4, rows_5};

/* Rows below one vector go through copies of one vector each. */
static TARGET void short_rows(const uint64_t *scalars, unsigned rows, unsigned count, const uint8_t *const *inputs,
                              uint8_t *const *outputs, size_t length)
{
    uint8_t copy[ROWS_MAX + 1][VECTOR_BYTES] = {{0}};
    __m256i sum[ROWS_MAX];
    for (unsigned r = 0; r < rows; r++)
        sum[r] = _mm256_setzero_si256();
    for (unsigned k = 0; k < count; k++) {
        __m256i row;
        memcpy(copy[ROWS_MAX], inputs[k], length);
        row = _mm256_loadu_si256((const __m256i *)copy[ROWS_MAX]);
        for (unsigned r = 0; r < rows; r++)
            sum[r] = _mm256_xor_si256(
                sum[r], _mm256_gf2p8affine_epi64_epi8(row, _mm256_set1_epi64x((long long)scalars[k * rows + r]), 0));
    }
    for (unsigned r = 0; r < rows; r++) {
        _mm256_storeu_si256((__m256i *)copy[r], sum[r]);
        memcpy(outputs[r], copy[r], length);
        sum[r] = _mm256_setzero_si256();
    }
    explicit_bzero(copy, sizeof copy);
    explicit_bzero(sum, sizeof sum);
}

GF256_NO_VECTORS void gf256_list_gfni256(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows,
                                      unsigned count)
{
    uint64_t *const scalars = list;
    for (unsigned r = 0; r < rows; r++)
        for (unsigned k = 0; k < count; k++)
            scalars[k * rows + r] = field->affine[*matrix++];
}

TARGET void gf256_run_gfni256(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                              uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    if (length < VECTOR_BYTES)
        short_rows(list, rows, count, inputs, outputs, length);
    else
        GROUPS[rows](list, count, inputs, outputs, offset, length, bypass);
}

#else
typedef int gf256_gfni256_is_for_x86_64;
#endif
