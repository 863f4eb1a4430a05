/*
 * The GFNI kernel on 512-bit vectors: one gf2p8affineqb per product, for either field. It knows nothing of CPUs' ids.
 *
 * A scalar is a bit matrix of 8 bytes. Where few of them are needed they all stay in registers; else they are read
 * from a list as broadcast operands. Tails are masked, so no row is ever copied.
 */
#include "gf256.h"

#if defined(__x86_64__)

#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,gfni")))

enum { VECTOR_BYTES = 64, ROWS_MAX = 8 };

#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE __m512i product(__m512i row, __m512i scalar)
{
    return _mm512_gf2p8affine_epi64_epi8(row, scalar, 0);
}

INLINE __m512i broadcast(uint64_t scalar)
{
    return _mm512_set1_epi64((long long)scalar);
}

INLINE __m512i sum_of_three(__m512i a, __m512i b, __m512i c)
{
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

INLINE __m512i load(const uint8_t *from, __mmask64 mask, int whole)
{
    return whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(mask, from);
}

INLINE void store(uint8_t *to, __m512i value, __mmask64 mask, int whole, int bypass)
{
    if (!whole)
        _mm512_mask_storeu_epi8(to, mask, value);
    else if (bypass)
        _mm512_stream_si512((__m512i *)to, value);
    else
        _mm512_storeu_si512(to, value);
}

/*
 * Any number of inputs: `lanes` vectors at `offset` of `rows` outputs, with the scalars broadcast from memory. All of
 * rows, lanes, whole and bypass are constants where this is inlined.
 */
INLINE void step(const uint64_t *scalar, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                 uint8_t *const *outputs, size_t offset, __mmask64 mask, int whole, int bypass)
{
    __m512i sum[ROWS_MAX][4];
    unsigned k = 0;
#pragma GCC unroll 8
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            sum[r][lane] = _mm512_setzero_si512();
    /* Two inputs at a time: a three-way exclusive or adds both products. */
    for (; k + 2 <= count; k += 2, scalar += 2 * rows) {
        __m512i one[4], other[4];
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++) {
            one[lane] = load(inputs[k] + offset + VECTOR_BYTES * lane, mask, whole);
            other[lane] = load(inputs[k + 1] + offset + VECTOR_BYTES * lane, mask, whole);
        }
#pragma GCC unroll 8
        for (unsigned r = 0; r < rows; r++) {
            const __m512i a = broadcast(scalar[r]), b = broadcast(scalar[rows + r]);
#pragma GCC unroll 4
            for (unsigned lane = 0; lane < lanes; lane++)
                sum[r][lane] = sum_of_three(sum[r][lane], product(one[lane], a), product(other[lane], b));
        }
    }
    if (k < count) {
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++) {
            const __m512i one = load(inputs[k] + offset + VECTOR_BYTES * lane, mask, whole);
#pragma GCC unroll 8
            for (unsigned r = 0; r < rows; r++)
                sum[r][lane] = _mm512_xor_si512(sum[r][lane], product(one, broadcast(scalar[r])));
        }
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            store(outputs[r] + offset + VECTOR_BYTES * lane, sum[r][lane], mask, whole, bypass);
}

INLINE void run(const uint64_t *scalars, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    const size_t stride = (size_t)VECTOR_BYTES * lanes;
    for (; offset + stride <= length; offset += stride)
        step(scalars, rows, count, lanes, inputs, outputs, offset, 0, 1, bypass);
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES)
        step(scalars, rows, count, 1, inputs, outputs, offset, 0, 1, 0);
    if (offset < length)
        step(scalars, rows, count, 1, inputs, outputs, offset, ~0ull >> (VECTOR_BYTES - (length - offset)), 0, 0);
}

enum { FEW_MAX = 5 };

/*
 * The same for a small constant `count`: scalars and addresses, read once, stay in registers. With `sums` only row 1 is
 * multiplied; the others are as gf256_are_sums says.
 */
INLINE void few_step(__m512i scalar[4][FEW_MAX], unsigned rows, unsigned count, int sums, unsigned lanes,
                     const uint8_t *const in[FEW_MAX], uint8_t *const out[4], size_t offset, __mmask64 mask, int whole,
                     int bypass)
{
#pragma GCC unroll 4
    for (unsigned lane = 0; lane < lanes; lane++) {
        __m512i row[FEW_MAX], multiplied = _mm512_setzero_si512();
#pragma GCC unroll 5
        for (unsigned k = 0; k < count; k++)
            row[k] = load(in[k] + offset + VECTOR_BYTES * lane, mask, whole);
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; r++) {
            __m512i sum;
            if (sums && r != 1) {
                sum = r == 0 ? sum_of_three(row[0], row[1], row[2]) : sum_of_three(multiplied, row[0], row[r - 1]);
            } else {
                unsigned k = 1;
                sum = product(row[0], scalar[r][0]);
#pragma GCC unroll 2
                for (; k + 2 <= count; k += 2)
                    sum = sum_of_three(sum, product(row[k], scalar[r][k]), product(row[k + 1], scalar[r][k + 1]));
                if (k < count)
                    sum = _mm512_xor_si512(sum, product(row[k], scalar[r][k]));
                multiplied = sum;
            }
            store(out[r] + offset + VECTOR_BYTES * lane, sum, mask, whole, bypass);
        }
    }
}

INLINE void few_run(const uint64_t *scalars, unsigned rows, unsigned count, int sums, unsigned lanes,
                    const uint8_t *const *inputs, uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    const size_t stride = (size_t)VECTOR_BYTES * lanes;
    __m512i scalar[4][FEW_MAX];
    const uint8_t *in[FEW_MAX];
    uint8_t *out[4];
#pragma GCC unroll 5
    for (unsigned k = 0; k < count; k++) {
        in[k] = inputs[k];
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; r++)
            scalar[r][k] = broadcast(scalars[k * rows + r]);
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++)
        out[r] = outputs[r];
    for (; offset + stride <= length; offset += stride)
        few_step(scalar, rows, count, sums, lanes, in, out, offset, 0, 1, bypass);
    for (; offset + VECTOR_BYTES <= length; offset += VECTOR_BYTES)
        few_step(scalar, rows, count, sums, 1, in, out, offset, 0, 1, 0);
    if (offset < length)
        few_step(scalar, rows, count, sums, 1, in, out, offset, ~0ull >> (VECTOR_BYTES - (length - offset)), 0, 0);
}

#define ARGUMENTS                                                                                                     \
    const uint64_t *scalars, unsigned count, const uint8_t *const *inputs, uint8_t *const *outputs, size_t offset,     \
        size_t length, int bypass

/*
 * Any number of inputs: the scalars are broadcast from memory. Beside the caches short steps through each of many rows
 * suit the memory better than long ones: 1.15 times the speed for a combine of 10.
 */
#define ANY(rows, lanes)                                                                                              \
    static TARGET void any_##rows(ARGUMENTS)                                                                          \
    {                                                                                                                 \
        if (bypass)                                                                                                   \
            run(scalars, rows, count, 2, inputs, outputs, offset, length, 1);                                         \
        else                                                                                                          \
            run(scalars, rows, count, lanes, inputs, outputs, offset, length, 0);                                     \
    }

/* A known small number of inputs: scalars and pointers stay in registers. */
#define FEW_LOOP(name, rows, inputs_, sums, lanes)                                                                    \
    static TARGET void name(ARGUMENTS)                                                                                \
    {                                                                                                                 \
        (void)count;                                                                                                  \
        if (bypass)                                                                                                   \
            few_run(scalars, rows, inputs_, sums, lanes, inputs, outputs, offset, length, 1);                         \
        else                                                                                                          \
            few_run(scalars, rows, inputs_, sums, lanes, inputs, outputs, offset, length, 0);                         \
    }
#define FEW(rows, inputs_, lanes) FEW_LOOP(few_##rows##_##inputs_, rows, inputs_, 0, lanes)
#define SUMS(rows, lanes) FEW_LOOP(sums_##rows, rows, 3, 1, lanes)

ANY(1, 4)
ANY(2, 4)
ANY(3, 4)
ANY(4, 4)
ANY(5, 3)
ANY(6, 3)
ANY(7, 3)
ANY(8, 2)
FEW(1, 2, 4)
FEW(1, 3, 4)
FEW(1, 4, 4)
FEW(1, 5, 4)
FEW(2, 2, 4)
FEW(2, 3, 2)
FEW(3, 2, 2)
FEW(3, 3, 2)
FEW(4, 2, 2)
FEW(4, 3, 2)
SUMS(2, 2)
SUMS(3, 2)
SUMS(4, 2)

typedef void group_fn(ARGUMENTS);
static group_fn *const ANY_ROWS[ROWS_MAX + 1] = {NULL, any_1, any_2, any_3, any_4, any_5, any_6, any_7, any_8};
static group_fn *const FEW_ROWS[5][6] = {
    {NULL},
    {NULL, NULL, few_1_2, few_1_3, few_1_4, few_1_5},
    {NULL, NULL, few_2_2, few_2_3},
    {NULL, NULL, few_3_2, few_3_3},
    {NULL, NULL, few_4_2, few_4_3},
};
static group_fn *const SUMS_ROWS[5] = {NULL, NULL, sums_2, sums_3, sums_4};

enum { SUMS_BYTES_MIN = 256 }; /* shorter rows don't repay looking for sums */

int gf256_are_sums(const uint64_t *scalars, unsigned rows)
{
    const uint64_t one = 0x0102040810204080; /* multiplication by 1 as a bit matrix; sums of scalars are sums of these */
    uint64_t wrong = 0;
    if (rows < 2 || rows > 4)
        return 0;
    for (unsigned k = 0; k < 3; k++) {
        wrong |= scalars[k * rows] ^ one;
        for (unsigned r = 2; r < rows; r++)
            wrong |= scalars[k * rows + r] ^ scalars[k * rows + 1] ^ (k == 0 || k == r - 1 ? one : 0);
    }
    return wrong == 0;
}

GF256_NO_VECTORS void gf256_list_gfni512(void *list, const gf256_field *field, const uint8_t *matrix, unsigned rows,
                                      unsigned count)
{
    uint64_t *const scalars = list;
    for (unsigned r = 0; r < rows; r++)
        for (unsigned k = 0; k < count; k++)
            scalars[k * rows + r] = field->affine[*matrix++];
}

TARGET void gf256_run_gfni512(const void *list, unsigned rows, unsigned count, const uint8_t *const *inputs,
                              uint8_t *const *outputs, size_t offset, size_t length, int bypass)
{
    group_fn *group = ANY_ROWS[rows];
    if (rows < 5 && count < 6 && FEW_ROWS[rows][count] != NULL)
        group = FEW_ROWS[rows][count];
    if (count == 3 && length - offset >= SUMS_BYTES_MIN && gf256_are_sums(list, rows))
        group = SUMS_ROWS[rows];
    group(list, count, inputs, outputs, offset, length, bypass);
}

#else
typedef int gf256_gfni512_is_for_x86_64;
#endif
