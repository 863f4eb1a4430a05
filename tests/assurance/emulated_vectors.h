/*
 * Owns other instructions in the place of those that valgrind does not know (AVX-512, GFNI, VAES), so that it can run the
 * very sources that use them: `cc -include emulated_vectors.h -maes -mssse3 gf256_gfni512.c`, for any of the x86 kernels.
 *
 * The intrinsics are renamed, and vectors become arrays of 128-bit ones: a VAES instruction is AES-NI on each of them, and
 * GFNI is plain C. As in the instructions, nothing here branches or indexes on vectors' bytes.
 */
#ifndef EMULATED_VECTORS_H
#define EMULATED_VECTORS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static inline __m128i emulated_affine(__m128i rows, __m128i matrices)
{
    uint64_t row[2], matrix[2], out[2] = {0, 0};
    __m128i v;
    memcpy(row, &rows, sizeof row);
    memcpy(matrix, &matrices, sizeof matrix);
    for (int i = 0; i < 2; i++)
        for (int byte = 0; byte < 8; byte++)
            for (int bit = 0; bit < 8; bit++) {
                uint64_t parity = row[i] >> 8 * byte & (matrix[i] >> 8 * (7 - bit)) & 0xFF;
                parity ^= parity >> 4;
                parity ^= parity >> 2;
                parity ^= parity >> 1;
                out[i] |= (parity & 1) << (8 * byte + bit);
            }
    memcpy(&v, out, sizeof v);
    return v;
}

#define EMULATE_EACH(WIDTH, NAME, ONE)                                                                                \
    static inline emulated_##WIDTH emulated##WIDTH##_##NAME(emulated_##WIDTH a, emulated_##WIDTH b)                   \
    {                                                                                                                 \
        for (int i = 0; i < WIDTH / 128; i++)                                                                         \
            a.part[i] = ONE(a.part[i], b.part[i]);                                                                    \
        return a;                                                                                                     \
    }
#define EMULATE(WIDTH)                                                                                                \
    typedef struct {                                                                                                  \
        __m128i part[WIDTH / 128];                                                                                    \
    } emulated_##WIDTH;                                                                                               \
    static inline emulated_##WIDTH emulated##WIDTH##_load(const void *from)                                           \
    {                                                                                                                 \
        emulated_##WIDTH v;                                                                                           \
        memcpy(&v, from, sizeof v);                                                                                   \
        return v;                                                                                                     \
    }                                                                                                                 \
    static inline void emulated##WIDTH##_store(void *to, emulated_##WIDTH v)                                          \
    {                                                                                                                 \
        memcpy(to, &v, sizeof v);                                                                                     \
    }                                                                                                                 \
    static inline emulated_##WIDTH emulated##WIDTH##_all(__m128i one)                                                 \
    {                                                                                                                 \
        emulated_##WIDTH v;                                                                                           \
        for (int i = 0; i < WIDTH / 128; i++)                                                                         \
            v.part[i] = one;                                                                                          \
        return v;                                                                                                     \
    }                                                                                                                 \
    EMULATE_EACH(WIDTH, add, _mm_add_epi64)                                                                           \
    EMULATE_EACH(WIDTH, xor, _mm_xor_si128)                                                                           \
    EMULATE_EACH(WIDTH, shuffle, _mm_shuffle_epi8)                                                                    \
    EMULATE_EACH(WIDTH, round, _mm_aesenc_si128)                                                                      \
    EMULATE_EACH(WIDTH, last, _mm_aesenclast_si128)                                                                   \
    EMULATE_EACH(WIDTH, affine, emulated_affine)

EMULATE(512)
EMULATE(256)

static inline emulated_512 emulated512_load_some(uint64_t mask, const void *from)
{
    uint8_t bytes[64] = {0};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            bytes[i] = ((const uint8_t *)from)[i];
    return emulated512_load(bytes);
}

static inline void emulated512_store_some(void *to, uint64_t mask, emulated_512 v)
{
    uint8_t bytes[64];
    emulated512_store(bytes, v);
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            ((uint8_t *)to)[i] = bytes[i];
}

static inline emulated_512 emulated512_ternary(emulated_512 a, emulated_512 b, emulated_512 c, int table)
{
    if (table != 0x96) /* the exclusive or of three; the only one used */
        __builtin_trap();
    return emulated512_xor(emulated512_xor(a, b), c);
}

static inline emulated_512 emulated512_words(long long h, long long g, long long f, long long e, long long d,
                                             long long c, long long b, long long a)
{
    return emulated512_load((const long long[]){a, b, c, d, e, f, g, h});
}

static inline emulated_256 emulated256_words(long long d, long long c, long long b, long long a)
{
    return emulated256_load((const long long[]){a, b, c, d});
}

/* An intrinsic that is not here keeps its own vectors, which these don't convert to: it does not compile. */
#define target(features) /* the compiler's own loops must not use them either */
#undef _mm512_ternarylogic_epi64
#undef _mm512_gf2p8affine_epi64_epi8
#undef _mm256_gf2p8affine_epi64_epi8
#define __m512i emulated_512
#define _mm512_setzero_si512() emulated512_all(_mm_setzero_si128())
#define _mm512_set1_epi64(a) emulated512_all(_mm_set1_epi64x(a))
#define _mm512_set_epi64 emulated512_words
#define _mm512_broadcast_i32x4 emulated512_all
#define _mm512_loadu_si512 emulated512_load
#define _mm512_storeu_si512 emulated512_store
#define _mm512_stream_si512 emulated512_store
#define _mm512_maskz_loadu_epi8 emulated512_load_some
#define _mm512_mask_storeu_epi8 emulated512_store_some
#define _mm512_xor_si512 emulated512_xor
#define _mm512_ternarylogic_epi64 emulated512_ternary
#define _mm512_add_epi64 emulated512_add
#define _mm512_shuffle_epi8 emulated512_shuffle
#define _mm512_aesenc_epi128 emulated512_round
#define _mm512_aesenclast_epi128 emulated512_last
#define _mm512_gf2p8affine_epi64_epi8(rows, matrices, constant) emulated512_affine(rows, matrices)
#define __m256i emulated_256
#define _mm256_setzero_si256() emulated256_all(_mm_setzero_si128())
#define _mm256_set1_epi64x(a) emulated256_all(_mm_set1_epi64x(a))
#define _mm256_set_epi64x emulated256_words
#define _mm256_broadcastsi128_si256 emulated256_all
#define _mm256_loadu_si256 emulated256_load
#define _mm256_storeu_si256 emulated256_store
#define _mm256_stream_si256 emulated256_store
#define _mm256_xor_si256 emulated256_xor
#define _mm256_add_epi64 emulated256_add
#define _mm256_shuffle_epi8 emulated256_shuffle
#define _mm256_aesenc_epi128 emulated256_round
#define _mm256_aesenclast_epi128 emulated256_last
#define _mm256_gf2p8affine_epi64_epi8(rows, matrices, constant) emulated256_affine(rows, matrices)

#endif
