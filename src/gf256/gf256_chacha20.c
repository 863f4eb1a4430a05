/*
 * The ChaCha20 key stream (RFC 8439, with a block counter of 64 bits), for CPUs without AES instructions.
 *
 * It knows neither CPUs nor where seeds come from. Additions, exclusive ors and rotations by fixed numbers alone, so the
 * time depends on no secret. Four blocks at a time, one in each lane of the compiler's generic vectors. Under a fresh
 * key for each call the nonce is 0 and the counter starts at 0.
 */
#define _DEFAULT_SOURCE /* explicit_bzero */
#include "gf256.h"

#include <string.h>

enum { KEY_BYTES = GF256_SEED_BYTES, BLOCK_BYTES = 64, BLOCKS = 4, WORDS = 16 };

typedef uint32_t vector __attribute__((vector_size(4 * BLOCKS)));

void gf256_chacha20_start(gf256_stream *stream, const uint8_t *seed)
{
    memcpy(stream->keys, seed, KEY_BYTES);
    stream->block = 0;
}

static uint32_t little_endian(const uint8_t *from)
{
    return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

static inline vector rotated(vector v, unsigned bits)
{
    return v << bits | v >> (32 - bits);
}

static inline void quarter_round(vector *a, vector *b, vector *c, vector *d)
{
    *a += *b, *d = rotated(*d ^ *a, 16);
    *c += *d, *b = rotated(*b ^ *c, 12);
    *a += *b, *d = rotated(*d ^ *a, 8);
    *c += *d, *b = rotated(*b ^ *c, 7);
}

/* The next BLOCKS blocks of the stream. */
static void four_blocks(const gf256_stream *stream, uint64_t first, uint8_t *out)
{
    static const uint32_t CONSTANTS[4] = {0x61707865, 0x3320646E, 0x79622D32, 0x6B206574}; /* "expand 32-byte k" */
    vector start[WORDS], state[WORDS];
    for (unsigned i = 0; i < 4; i++)
        start[i] = (vector){0} + CONSTANTS[i];
    for (unsigned i = 0; i < KEY_BYTES / 4; i++)
        start[4 + i] = (vector){0} + little_endian(stream->keys + 4 * i);
    for (unsigned lane = 0; lane < BLOCKS; lane++) {
        start[12][lane] = (uint32_t)(first + lane);
        start[13][lane] = (uint32_t)((first + lane) >> 32);
    }
    start[14] = start[15] = (vector){0};
    memcpy(state, start, sizeof state);
    for (unsigned twice = 0; twice < 10; twice++) {
        for (unsigned i = 0; i < 4; i++)
            quarter_round(&state[i], &state[4 + i], &state[8 + i], &state[12 + i]);
        for (unsigned i = 0; i < 4; i++)
            quarter_round(&state[i], &state[4 + (i + 1) % 4], &state[8 + (i + 2) % 4], &state[12 + (i + 3) % 4]);
    }
    for (unsigned i = 0; i < WORDS; i++) {
        state[i] += start[i];
        for (unsigned lane = 0; lane < BLOCKS; lane++)
            for (unsigned byte = 0; byte < 4; byte++)
                out[BLOCK_BYTES * lane + 4 * i + byte] = (uint8_t)(state[i][lane] >> 8 * byte);
    }
    explicit_bzero(start, sizeof start);
    explicit_bzero(state, sizeof state);
}

void gf256_chacha20_fill(gf256_stream *stream, uint8_t *out, size_t length)
{
    uint64_t block = stream->block;
    stream->block += length / BLOCK_BYTES + (length % BLOCK_BYTES != 0);
    for (; length >= BLOCK_BYTES * BLOCKS; length -= BLOCK_BYTES * BLOCKS, out += BLOCK_BYTES * BLOCKS) {
        four_blocks(stream, block, out);
        block += BLOCKS;
    }
    if (length > 0) {
        uint8_t rest[BLOCK_BYTES * BLOCKS];
        four_blocks(stream, block, rest);
        memcpy(out, rest, length);
        explicit_bzero(rest, sizeof rest);
    }
}
