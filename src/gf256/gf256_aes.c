/*
 * AES-256 in counter mode (FIPS 197, SP 800-38A) by the CPU's own AES instructions, on vectors of 1, 2 and 4 blocks.
 *
 * It owns the key expansion and the key streams and knows neither CPUs nor where seeds come from. Secret: seed, round
 * keys and stream; the instructions take the same time for any of them. The counter starts at 0 under each key, and a
 * key is used for one call alone; a call that needed 2^64 blocks can't be asked for.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

enum { BLOCK_BYTES = 16, ROUNDS = 14 };

#define INLINE static inline __attribute__((always_inline))

/*
 * w ^ (w << 32) ^ (w << 64) ^ (w << 96): each word gets all words before it (FIPS 197, section 5.2). What is added to
 * them is SubWord of the last word of `other`, which `place` puts in all four columns, perhaps rotated: on equal columns
 * a last round is SubWord and an addition alone, and it takes less time than the instruction made for key expansion.
 */
INLINE __attribute__((target("aes,ssse3"))) __m128i chained(__m128i words, __m128i other, int place, int constant)
{
    const __m128i last = _mm_shuffle_epi8(other, _mm_set1_epi32(place));
    words = _mm_xor_si128(words, _mm_slli_si128(words, 4));
    words = _mm_xor_si128(words, _mm_slli_si128(words, 8));
    return _mm_aesenclast_si128(last, _mm_xor_si128(words, _mm_set1_epi32(constant)));
}

__attribute__((target("aes,ssse3"))) void gf256_aes_start(gf256_stream *stream, const uint8_t *seed)
{
    enum { SAME = 0x0F0E0D0C, ROTATED = 0x0C0F0E0D };
    __m128i *const keys = (__m128i *)stream->keys;
    __m128i even = _mm_loadu_si128((const __m128i *)seed), odd = _mm_loadu_si128((const __m128i *)(seed + BLOCK_BYTES));
    keys[0] = even;
    keys[1] = odd;
#pragma GCC unroll 7
    for (int i = 2, constant = 1; i <= ROUNDS; i += 2, constant <<= 1) {
        keys[i] = even = chained(even, odd, ROTATED, constant);
        if (i < ROUNDS)
            keys[i + 1] = odd = chained(odd, even, SAME, 0);
    }
    stream->block = 0;
}

/*
 * One key stream for each width of vector: 8 vectors in flight hide the latency of a round. Counters are kept as
 * numbers and turned into big-endian blocks by a shuffle. The barrier makes the compiler read the round keys anew from
 * the stream, which is wiped, where it would otherwise spill copies of them to the stack, which is not.
 */
#define FILL(NAME, TARGET, VECTOR, BROADCAST_KEY, COUNTERS, ADD, SHUFFLE, XOR, ROUND, LAST, STORE, ORDER, STEP)          \
    INLINE TARGET void NAME##_lanes(const gf256_stream *stream, VECTOR *counters, unsigned lanes, VECTOR *out)        \
    {                                                                                                                 \
        const __m128i *const keys = (const __m128i *)stream->keys;                                                    \
        VECTOR key;                                                                                                   \
        __asm__ volatile("" ::: "memory");                                                                            \
        key = BROADCAST_KEY(keys[0]);                                                                                 \
        _Pragma("GCC unroll 8") for (unsigned lane = 0; lane < lanes; lane++)                                         \
        {                                                                                                             \
            out[lane] = XOR(SHUFFLE(*counters, ORDER), key);                                                          \
            *counters = ADD(*counters, STEP);                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 14") for (unsigned round = 1; round < ROUNDS; round++)                                    \
        {                                                                                                             \
            key = BROADCAST_KEY(keys[round]);                                                                         \
            _Pragma("GCC unroll 8") for (unsigned lane = 0; lane < lanes; lane++)                                     \
                out[lane] = ROUND(out[lane], key);                                                                    \
        }                                                                                                             \
        key = BROADCAST_KEY(keys[ROUNDS]);                                                                            \
        _Pragma("GCC unroll 8") for (unsigned lane = 0; lane < lanes; lane++)                                         \
            out[lane] = LAST(out[lane], key);                                                                         \
    }                                                                                                                 \
    TARGET void NAME(gf256_stream *stream, uint8_t *out, size_t length)                                               \
    {                                                                                                                 \
        VECTOR counters = COUNTERS(stream->block), block[8];                                                          \
        stream->block += length / BLOCK_BYTES + (length % BLOCK_BYTES != 0);                                          \
        for (; length >= sizeof block; length -= sizeof block, out += sizeof block) {                                 \
            NAME##_lanes(stream, &counters, 8, block);                                                                \
            _Pragma("GCC unroll 8") for (unsigned lane = 0; lane < 8; lane++)                                         \
                STORE((void *)(out + sizeof(VECTOR) * lane), block[lane]);                                            \
        }                                                                                                             \
        for (; length >= sizeof(VECTOR); length -= sizeof(VECTOR), out += sizeof(VECTOR)) {                           \
            NAME##_lanes(stream, &counters, 1, block);                                                                \
            STORE((void *)out, block[0]);                                                                             \
        }                                                                                                             \
        if (length > 0) {                                                                                             \
            uint8_t rest[sizeof(VECTOR)];                                                                             \
            NAME##_lanes(stream, &counters, 1, block);                                                                \
            STORE((void *)rest, block[0]);                                                                            \
            memcpy(out, rest, length);                                                                                \
            explicit_bzero(rest, sizeof rest);                                                                        \
        }                                                                                                             \
    }

#define ORDER_128 _mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define COUNTERS_128(n) _mm_set_epi64x((long long)(n), 0)
#define SAME_128(key) (key)
FILL(gf256_aes_fill_aesni, __attribute__((target("aes,ssse3"))), __m128i, SAME_128, COUNTERS_128, _mm_add_epi64,
     _mm_shuffle_epi8, _mm_xor_si128, _mm_aesenc_si128, _mm_aesenclast_si128, _mm_storeu_si128, ORDER_128,
     _mm_set_epi64x(1, 0))

#define ORDER_256 _mm256_broadcastsi128_si256(ORDER_128)
#define COUNTERS_256(n) _mm256_set_epi64x((long long)((n) + 1), 0, (long long)(n), 0)
FILL(gf256_aes_fill_vaes256, __attribute__((target("avx2,aes,vaes"))), __m256i, _mm256_broadcastsi128_si256,
     COUNTERS_256, _mm256_add_epi64, _mm256_shuffle_epi8, _mm256_xor_si256, _mm256_aesenc_epi128,
     _mm256_aesenclast_epi128, _mm256_storeu_si256, ORDER_256, _mm256_set_epi64x(2, 0, 2, 0))

#define ORDER_512 _mm512_broadcast_i32x4(ORDER_128)
#define COUNTERS_512(n)                                                                                               \
    _mm512_set_epi64((long long)((n) + 3), 0, (long long)((n) + 2), 0, (long long)((n) + 1), 0, (long long)(n), 0)
FILL(gf256_aes_fill_vaes512, __attribute__((target("avx512f,avx512bw,aes,vaes"))), __m512i, _mm512_broadcast_i32x4,
     COUNTERS_512, _mm512_add_epi64, _mm512_shuffle_epi8, _mm512_xor_si512, _mm512_aesenc_epi128,
     _mm512_aesenclast_epi128, _mm512_storeu_si512, ORDER_512, _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0))

#else
typedef int gf256_aes_is_for_x86_64;
#endif
