/*
 * Owns plain C in the place of the vector instructions that the GFNI kernels use, so that valgrind can run their very
 * sources: it knows neither AVX-512 nor GFNI. Like the instructions, nothing here branches or indexes on vectors' bytes.
 */
#ifndef EMULATED_GFNI_H
#define EMULATED_GFNI_H

#include <stdint.h>
#include <string.h>

#define TARGET

typedef uint64_t __mmask64;

#define EMULATE(VECTOR, WORDS, PREFIX, SI)                                                                             \
    typedef struct {                                                                                                  \
        uint64_t word[WORDS];                                                                                         \
    } VECTOR;                                                                                                         \
    static inline VECTOR PREFIX##_setzero_##SI(void)                                                                  \
    {                                                                                                                 \
        VECTOR v;                                                                                                     \
        memset(&v, 0, sizeof v);                                                                                      \
        return v;                                                                                                     \
    }                                                                                                                 \
    static inline VECTOR PREFIX##_broadcast(long long a)                                                              \
    {                                                                                                                 \
        VECTOR v;                                                                                                     \
        for (int i = 0; i < WORDS; i++)                                                                               \
            v.word[i] = (uint64_t)a;                                                                                  \
        return v;                                                                                                     \
    }                                                                                                                 \
    static inline VECTOR PREFIX##_loadu_##SI(const void *from)                                                        \
    {                                                                                                                 \
        VECTOR v;                                                                                                     \
        memcpy(&v, from, sizeof v);                                                                                   \
        return v;                                                                                                     \
    }                                                                                                                 \
    static inline void PREFIX##_storeu_##SI(void *to, VECTOR v)                                                       \
    {                                                                                                                 \
        memcpy(to, &v, sizeof v);                                                                                     \
    }                                                                                                                 \
    static inline void PREFIX##_stream_##SI(VECTOR *to, VECTOR v)                                                     \
    {                                                                                                                 \
        memcpy(to, &v, sizeof v);                                                                                     \
    }                                                                                                                 \
    static inline VECTOR PREFIX##_xor_##SI(VECTOR a, VECTOR b)                                                        \
    {                                                                                                                 \
        for (int i = 0; i < WORDS; i++)                                                                               \
            a.word[i] ^= b.word[i];                                                                                   \
        return a;                                                                                                     \
    }                                                                                                                 \
    static inline VECTOR PREFIX##_gf2p8affine_epi64_epi8(VECTOR rows, VECTOR matrices, int constant)                  \
    {                                                                                                                 \
        VECTOR v;                                                                                                     \
        for (int i = 0; i < WORDS; i++) {                                                                             \
            v.word[i] = 0;                                                                                            \
            for (int byte = 0; byte < 8; byte++) {                                                                    \
                const unsigned x = rows.word[i] >> 8 * byte & 0xFF;                                                   \
                unsigned y = (unsigned)constant;                                                                      \
                for (int bit = 0; bit < 8; bit++) {                                                                   \
                    unsigned parity = x & (matrices.word[i] >> 8 * (7 - bit) & 0xFF);                                 \
                    parity ^= parity >> 4;                                                                            \
                    parity ^= parity >> 2;                                                                            \
                    parity ^= parity >> 1;                                                                            \
                    y ^= (parity & 1) << bit;                                                                         \
                }                                                                                                     \
                v.word[i] |= (uint64_t)(y & 0xFF) << 8 * byte;                                                        \
            }                                                                                                         \
        }                                                                                                             \
        return v;                                                                                                     \
    }

EMULATE(__m512i, 8, _mm512, si512)
EMULATE(__m256i, 4, _mm256, si256)
#define _mm512_set1_epi64 _mm512_broadcast
#define _mm256_set1_epi64x _mm256_broadcast

static inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table)
{
    (void)table; /* 0x96, the exclusive or of three, is the only one used */
    return _mm512_xor_si512(_mm512_xor_si512(a, b), c);
}

static inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void *from)
{
    uint8_t bytes[64] = {0};
    __m512i v;
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            bytes[i] = ((const uint8_t *)from)[i];
    memcpy(&v, bytes, sizeof v);
    return v;
}

static inline void _mm512_mask_storeu_epi8(void *to, __mmask64 mask, __m512i v)
{
    uint8_t bytes[64];
    memcpy(bytes, &v, sizeof v);
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            ((uint8_t *)to)[i] = bytes[i];
}

#endif
