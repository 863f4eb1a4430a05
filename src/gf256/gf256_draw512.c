/*
 * Drawing and multiplying in one loop, for GFNI and VAES on 512-bit vectors and the usual 2-of-n and 3-of-n.
 *
 * It knows nothing of CPUs' ids. The random rows are multiplied while they are still in registers, and the CPU overlaps
 * the products and stores of one step with the cipher rounds of the next: a whole split then takes little more than its
 * cipher alone. What is secret, and what the stream is, is said in gf256.h and gf256_aes.c.
 */
#include "gf256.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,gfni,aes,vaes")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { VECTOR_BYTES = 64, ROUNDS = 14, BLOCKS_IN_VECTOR = 4, IN_FLIGHT = 8, INPUTS_MAX = 3, ROWS_MAX = 4 };

INLINE __m512i sum_of_three(__m512i a, __m512i b, __m512i c)
{
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

/* The next `lanes` vectors of `draws` random rows. As in gf256_aes.c the barrier keeps round keys off the stack. */
INLINE void encrypt(const gf256_stream *stream, __m512i *counters, unsigned draws, unsigned lanes,
                    __m512i drawn[INPUTS_MAX - 1][IN_FLIGHT])
{
    const __m128i *const keys = (const __m128i *)stream->keys;
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i step = _mm512_set_epi64(BLOCKS_IN_VECTOR, 0, BLOCKS_IN_VECTOR, 0, BLOCKS_IN_VECTOR, 0, BLOCKS_IN_VECTOR, 0);
    __m512i key;
    __asm__ volatile("" ::: "memory");
    key = _mm512_broadcast_i32x4(keys[0]);
#pragma GCC unroll 2
    for (unsigned d = 0; d < draws; d++)
#pragma GCC unroll 8
        for (unsigned lane = 0; lane < lanes; lane++) {
            drawn[d][lane] = _mm512_xor_si512(_mm512_shuffle_epi8(*counters, order), key);
            *counters = _mm512_add_epi64(*counters, step);
        }
#pragma GCC unroll 14
    for (unsigned round = 1; round <= ROUNDS; round++) {
        key = _mm512_broadcast_i32x4(keys[round]);
#pragma GCC unroll 2
        for (unsigned d = 0; d < draws; d++)
#pragma GCC unroll 8
            for (unsigned lane = 0; lane < lanes; lane++)
                drawn[d][lane] = round < ROUNDS ? _mm512_aesenc_epi128(drawn[d][lane], key)
                                                : _mm512_aesenclast_epi128(drawn[d][lane], key);
    }
}

/*
 * rows, draws and sums are constants where this is inlined, so that scalars and addresses stay in registers. With `sums`
 * only row 1 is multiplied; the others are as gf256_are_sums says.
 */
INLINE size_t draw(const uint64_t *list, unsigned rows, unsigned draws, int sums, const uint8_t *secret, uint8_t *const *randoms,
                   uint8_t *const *outputs, gf256_stream *stream, size_t length)
{
    const unsigned lanes = IN_FLIGHT / draws;
    const long long n = (long long)stream->block;
    __m512i counters = _mm512_set_epi64(n + 3, 0, n + 2, 0, n + 1, 0, n, 0), scalar[ROWS_MAX][INPUTS_MAX];
    uint8_t *to[INPUTS_MAX - 1], *out[ROWS_MAX];
    size_t offset = 0;
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++) {
        out[r] = outputs[r];
#pragma GCC unroll 3
        for (unsigned k = 0; k <= draws; k++)
            scalar[r][k] = _mm512_set1_epi64((long long)list[k * rows + r]);
    }
#pragma GCC unroll 2
    for (unsigned d = 0; d < draws; d++)
        to[d] = randoms[d];
    for (; offset + (size_t)VECTOR_BYTES * lanes <= length; offset += (size_t)VECTOR_BYTES * lanes) {
        __m512i drawn[INPUTS_MAX - 1][IN_FLIGHT];
        encrypt(stream, &counters, draws, lanes, drawn);
#pragma GCC unroll 8
        for (unsigned lane = 0; lane < lanes; lane++) {
            const size_t at = offset + VECTOR_BYTES * lane;
            const __m512i row = _mm512_loadu_si512(secret + at);
            __m512i multiplied = _mm512_setzero_si512();
#pragma GCC unroll 2
            for (unsigned d = 0; d < draws; d++)
                _mm512_storeu_si512(to[d] + at, drawn[d][lane]);
#pragma GCC unroll 4
            for (unsigned r = 0; r < rows; r++) {
                __m512i sum;
                if (sums && r != 1) {
                    sum = r == 0 ? sum_of_three(row, drawn[0][lane], drawn[1][lane])
                                 : sum_of_three(multiplied, row, drawn[r - 2][lane]);
                } else {
                    sum = _mm512_gf2p8affine_epi64_epi8(row, scalar[r][0], 0);
#pragma GCC unroll 2
                    for (unsigned d = 0; d < draws; d++)
                        sum = _mm512_xor_si512(sum, _mm512_gf2p8affine_epi64_epi8(drawn[d][lane], scalar[r][d + 1], 0));
                    multiplied = sum;
                }
                _mm512_storeu_si512(out[r] + at, sum);
            }
        }
    }
    stream->block += offset / VECTOR_BYTES * draws * BLOCKS_IN_VECTOR;
    return offset;
}

#define DRAW(rows, draws, sums) return draw(list, rows, draws, sums, secret, randoms, outputs, stream, length)

enum { SUMS = 4096 }; /* beyond any count * 8 + rows */

TARGET size_t gf256_draw_vaes512(const void *list, unsigned rows, unsigned count, const uint8_t *secret,
                                 uint8_t *const *randoms, uint8_t *const *outputs, gf256_stream *stream, size_t length)
{
    const unsigned sums = count == 3 && gf256_are_sums(list, rows) ? SUMS : 0;
    switch (sums + count * 8 + rows) {
    case 2 * 8 + 1:
        DRAW(1, 1, 0);
    case 2 * 8 + 2:
        DRAW(2, 1, 0);
    case 2 * 8 + 3:
        DRAW(3, 1, 0);
    case 2 * 8 + 4:
        DRAW(4, 1, 0);
    case 3 * 8 + 1:
        DRAW(1, 2, 0);
    case 3 * 8 + 2:
        DRAW(2, 2, 0);
    case 3 * 8 + 3:
        DRAW(3, 2, 0);
    case 3 * 8 + 4:
        DRAW(4, 2, 0);
    case SUMS + 3 * 8 + 2:
        DRAW(2, 2, 1);
    case SUMS + 3 * 8 + 3:
        DRAW(3, 2, 1);
    case SUMS + 3 * 8 + 4:
        DRAW(4, 2, 1);
    }
    return 0;
}

#else
typedef int gf256_draw512_is_for_x86_64;
#endif
