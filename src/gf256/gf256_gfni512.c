/*
 * The GFNI kernel on 512-bit vectors: one gf2p8affineqb per product, for either field. It knows nothing of CPUs' ids.
 *
 * A scalar is a bit matrix of 8 bytes. Where few of them are needed they all stay in registers; else they are read
 * from a list as broadcast operands. Tails are masked, so no row is ever copied.
 */
#include "gf256.h"

#if defined(__x86_64__)

#ifdef GF256_EMULATE_GFNI
#include "emulated_gfni.h"
#else
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,gfni")))
#endif

enum { VECTOR_BYTES = 64, GROUP_MAX = 8 };

#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE __m512i product(__m512i row, __m512i scalar)
{
    return _mm512_gf2p8affine_epi64_epi8(row, scalar, 0);
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
 * `lanes` vectors at `offset` of `rows` outputs. All of rows, lanes, whole and bypass are constants where this is
 * inlined, and so is `count` when the scalars shall stay in registers.
 */
INLINE void step(const uint64_t *scalars, unsigned rows, unsigned count, unsigned lanes, const uint8_t *const *inputs,
                 uint8_t *const *outputs, size_t offset, __mmask64 mask, int whole, int bypass)
{
    __m512i sum[GROUP_MAX][4];
    const uint64_t *scalar = scalars;
    unsigned k = 0;
#pragma GCC unroll 8
    for (unsigned r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++)
            sum[r][lane] = _mm512_setzero_si512();
    /* Two inputs at a time: a three-way exclusive or adds both products. */
#pragma GCC unroll 4
    for (; k + 2 <= count; k += 2, scalar += 2 * rows) {
        __m512i one[4], other[4];
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++) {
            one[lane] = load(inputs[k] + offset + VECTOR_BYTES * lane, mask, whole);
            other[lane] = load(inputs[k + 1] + offset + VECTOR_BYTES * lane, mask, whole);
        }
#pragma GCC unroll 8
        for (unsigned r = 0; r < rows; r++) {
            const __m512i a = _mm512_set1_epi64((long long)scalar[r]);
            const __m512i b = _mm512_set1_epi64((long long)scalar[rows + r]);
#pragma GCC unroll 4
            for (unsigned lane = 0; lane < lanes; lane++)
                sum[r][lane] = _mm512_ternarylogic_epi64(sum[r][lane], product(one[lane], a), product(other[lane], b), 0x96);
        }
    }
    if (k < count) {
#pragma GCC unroll 4
        for (unsigned lane = 0; lane < lanes; lane++) {
            const __m512i one = load(inputs[k] + offset + VECTOR_BYTES * lane, mask, whole);
#pragma GCC unroll 8
            for (unsigned r = 0; r < rows; r++)
                sum[r][lane] = _mm512_xor_si512(sum[r][lane], product(one, _mm512_set1_epi64((long long)scalar[r])));
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

#define ARGUMENTS                                                                                                     \
    const uint64_t *scalars, unsigned count, const uint8_t *const *inputs, uint8_t *const *outputs, size_t offset,     \
        size_t length, int bypass

/* Any number of inputs: the scalars are broadcast from memory. */
#define ANY(rows, lanes)                                                                                              \
    static TARGET void any_##rows(ARGUMENTS)                                                                          \
    {                                                                                                                 \
        if (bypass)                                                                                                   \
            run(scalars, rows, count, lanes, inputs, outputs, offset, length, 1);                                     \
        else                                                                                                          \
            run(scalars, rows, count, lanes, inputs, outputs, offset, length, 0);                                     \
    }

/* A known small number of inputs: scalars and pointers stay in registers. */
#define FEW(rows, inputs_, lanes)                                                                                     \
    static TARGET void few_##rows##_##inputs_(ARGUMENTS)                                                              \
    {                                                                                                                 \
        (void)count;                                                                                                  \
        if (bypass)                                                                                                   \
            run(scalars, rows, inputs_, lanes, inputs, outputs, offset, length, 1);                                   \
        else                                                                                                          \
            run(scalars, rows, inputs_, lanes, inputs, outputs, offset, length, 0);                                   \
    }

ANY(1, 4)
ANY(2, 4)
ANY(3, 4)
ANY(4, 2)
ANY(5, 2)
ANY(6, 2)
ANY(7, 2)
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

typedef void group_fn(ARGUMENTS);
static group_fn *const ANY_ROWS[GROUP_MAX + 1] = {NULL, any_1, any_2, any_3, any_4, any_5, any_6, any_7, any_8};
static group_fn *const FEW_ROWS[5][6] = {
    {NULL},
    {NULL, NULL, few_1_2, few_1_3, few_1_4, few_1_5},
    {NULL, NULL, few_2_2, few_2_3},
    {NULL, NULL, few_3_2, few_3_3},
    {NULL, NULL, few_4_2, few_4_3},
};

TARGET void gf256_multiply_gfni512(const gf256_field *field, const uint8_t *matrix, unsigned output_count,
                                   unsigned input_count, const uint8_t *const *inputs, uint8_t *const *outputs,
                                   size_t length, int bypass)
{
    uint64_t scalars[GROUP_MAX * GF256_SHARES_MAX]; /* public */
    while (output_count > 0) {
        const unsigned rest = (output_count + GROUP_MAX - 1) / GROUP_MAX; /* groups to go: keep them alike in size */
        const unsigned rows = (output_count + rest - 1) / rest;
        size_t offset = 0;
        int aligned = bypass;
        group_fn *group = ANY_ROWS[rows];
        if (rows < 5 && input_count < 6 && FEW_ROWS[rows][input_count] != NULL)
            group = FEW_ROWS[rows][input_count];
        for (unsigned k = 0; k < input_count; k++)
            for (unsigned r = 0; r < rows; r++)
                scalars[k * rows + r] = field->affine[matrix[r * input_count + k]];
        if (bypass) { /* needs outputs on whole cache lines; they get there together or not at all */
            const size_t head = -(uintptr_t)outputs[0] % VECTOR_BYTES;
            for (unsigned r = 1; r < rows; r++)
                aligned &= -(uintptr_t)outputs[r] % VECTOR_BYTES == head;
            if (aligned && head < length) {
                group(scalars, input_count, inputs, outputs, 0, head, 0);
                offset = head;
            }
        }
        group(scalars, input_count, inputs, outputs, offset, length, aligned);
        matrix += (size_t)rows * input_count;
        outputs += rows;
        output_count -= rows;
    }
    if (bypass)
        _mm_sfence();
}

#else
typedef int gf256_gfni512_is_for_x86_64;
#endif
