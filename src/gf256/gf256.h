/*
 * GF(2^8) arithmetic for Shamir's secret sharing: the private header of the native core.
 *
 * Scheme: A. Shamir, "How to share a secret", CACM 22(11), 1979, byte by byte over GF(2^8). The secret is the value at
 * 0. The shares at the first t - 1 indices are the random stream itself, the others are interpolated from them and the
 * secret; that is the same distribution as drawing all t - 1 coefficients uniformly, a zero leading one included
 * (docs/shamir.md has the proof; forcing it to be non-zero leaks the secret, RUSTSEC-2024-0398).
 *
 * Representation: a byte is a polynomial over GF(2), bit i the coefficient of x^i, modulo 0x11B (FIPS 197, Vault,
 * SLIP-39) or 0x11D (libgfshare, ISA-L).
 *
 * Words: a *scalar* is a public multiplier and depends on share indices alone; a *row* is `length` bytes of a secret or
 * a share and is secret.
 *
 * Constant time: no branch and no address depends on the contents of a row, a seed or a key stream. Indices, scalars,
 * counts and lengths are public and may be branched on and looked up.
 */
#ifndef KEYQUORUM_GF256_H
#define KEYQUORUM_GF256_H

#include <stddef.h>
#include <stdint.h>

enum {
    GF256_SHARES_MAX = 255,   /* the non-zero elements of the field; 0 is where the secret lies */
    GF256_BLOCK_BYTES = 4096, /* of each row at a time, so that the random rows stay in the first-level cache */
    GF256_SEED_BYTES = 32,    /* of the generator: a 256-bit key */
    GF256_DIRECT_BYTES = 256  /* up to so many random bytes the system's generator is quicker than seeding our own */
};

/* Everything that multiplication by a *public* scalar needs. A row is never looked up in it. */
typedef struct gf256_field {
    unsigned polynomial;      /* 0x11B or 0x11D */
    uint8_t power[768];       /* of the generator; three periods, so that a sum of three logarithms needs no reduction */
    uint8_t logarithm[256];   /* to the base of the generator; that of 0 is meaningless */
    uint64_t affine[256];     /* multiplication as a bit matrix, in the layout of gf2p8affineqb */
    uint8_t nibbles[256][32]; /* products with 0x00..0x0F, then with 0x00, 0x10 .. 0xF0, for pshufb and tbl */
} gf256_field;

/*
 * The one operation that an instruction set has to offer: outputs = matrix * inputs.
 *
 *   outputs[o][i] = sum over k of matrix[o * input_count + k] * inputs[k][i],  0 <= i < length
 *
 * Public: field, matrix, counts, length, the addresses. Secret: the contents of inputs and outputs.
 * Rows need no alignment. Outputs overlap neither inputs nor each other. Exactly `length` bytes of each output are
 * written, nothing is read beyond a row, and length 0 and output_count 0 are allowed. input_count is 1..255.
 * With `bypass` the outputs are too large for the caches, and a kernel may write around them.
 * Copies of rows that a kernel makes in memory are wiped before it returns.
 */
typedef void gf256_multiply_fn(const gf256_field *field, const uint8_t *matrix, unsigned output_count,
                               unsigned input_count, const uint8_t *const *inputs, uint8_t *const *outputs,
                               size_t length, int bypass);

/* One per file gf256_<name>.c. They know nothing of CPUs: calling one that the CPU has not is a crash. */
gf256_multiply_fn gf256_multiply_gfni512;
gf256_multiply_fn gf256_multiply_gfni256;
gf256_multiply_fn gf256_multiply_avx2;
gf256_multiply_fn gf256_multiply_neon;
gf256_multiply_fn gf256_multiply_portable;

/* A cipher in counter mode under a key that is used for one call and then wiped: a generator without kept state. */
typedef struct gf256_stream {
    _Alignas(64) uint8_t keys[15 * 16]; /* AES-256: the round keys. ChaCha20: the key. Secret. */
    uint64_t block;                     /* number of the next cipher block (16 bytes; ChaCha20: 64). Public. */
} gf256_stream;

/*
 * A generator of random rows. `start` expands a seed of GF256_SEED_BYTES; `fill` writes the next `length` bytes and then
 * skips the rest of the last cipher block. AES-256-CTR (SP 800-38A) starts at the counter block 0; ChaCha20 (RFC 8439)
 * at block 0 with the nonce 0. The caller wipes the stream.
 */
typedef struct gf256_generator {
    const char *name;
    int (*supported)(void);
    void (*start)(gf256_stream *stream, const uint8_t *seed);
    void (*fill)(gf256_stream *stream, uint8_t *out, size_t length);
} gf256_generator;

void gf256_aes_start(gf256_stream *stream, const uint8_t *seed);
void gf256_aes_fill_vaes512(gf256_stream *stream, uint8_t *out, size_t length);
void gf256_aes_fill_vaes256(gf256_stream *stream, uint8_t *out, size_t length);
void gf256_aes_fill_aesni(gf256_stream *stream, uint8_t *out, size_t length);
void gf256_chacha20_start(gf256_stream *stream, const uint8_t *seed);
void gf256_chacha20_fill(gf256_stream *stream, uint8_t *out, size_t length);

typedef struct gf256_kernel {
    const char *name;
    int (*supported)(void); /* whether this CPU and operating system can run it */
    gf256_multiply_fn *multiply;
    const char *generators; /* names of those that fit it, best first, each ended by a space */
} gf256_kernel;

/* Builds the tables for public elements. Call once, before anything else here; calling it again is harmless. */
void gf256_init(void);

/* The field of a polynomial, 0x11B or 0x11D; NULL for any other. */
const gf256_field *gf256_field_of(unsigned polynomial);

/* The kernels that this machine can run, fastest first, the portable one last; NULL beyond the end. */
const gf256_kernel *gf256_kernel_at(unsigned position);

/* The generators that this machine can run, fastest first, ChaCha20 last; NULL beyond the end. */
const gf256_generator *gf256_generator_at(unsigned position);

/* The best generator for a kernel; never NULL. */
const gf256_generator *gf256_generator_of(const gf256_kernel *kernel);

/*
 * outs[o] = f(targets[o]) of the polynomial f of degree < count through (xs[j], ys[j]), by Lagrange's formula.
 *
 * Public: xs, count, targets, target_count, length. Secret: ys, outs. xs are distinct (the caller has checked),
 * 1 <= count <= 255. No row of outs overlaps another row. It can't fail.
 */
void gf256_interpolate(const gf256_kernel *kernel, const gf256_field *field, const uint8_t *xs, unsigned count,
                       const uint8_t *const *ys, const uint8_t *targets, unsigned target_count, uint8_t *const *outs,
                       size_t length);

/*
 * y_j = f(x_j) for a fresh random polynomial f of degree < threshold with f(0) = secret.
 *
 * Public: length, threshold, shares, xs. Secret: secret, ys. xs are distinct and non-zero,
 * 1 <= threshold <= shares <= 255 (the caller has checked); the rows of ys and secret are apart from each other.
 * Returns 0, or an errno value when the system's random generator fails; then all of ys is zero.
 */
int gf256_split(const gf256_kernel *kernel, const gf256_generator *generator, const gf256_field *field,
                const uint8_t *secret, size_t length, unsigned threshold, unsigned shares, const uint8_t *xs,
                uint8_t *const *ys);

#endif
